"""What the fused perceptron promises beyond the tests that the table of ops drives."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pywm.ops import _native, mlp, reference

ACTIVATIONS = ("tanh", "silu", "elu", "relu")
SIZES = (
    (4, 64, 64, 2),
    (1, 1),
    (3, 17, 65, 130),
    (5, 1, 3, 1),
    (130, 3, 1),
    (20, 300, 7),
    (2, 9, 9, 9, 9, 1),
)
TOLERANCE = {torch.float32: (2e-4, 2e-5), torch.float64: (1e-11, 1e-12)}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def network(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(len(sizes))
    weights = [torch.randn(o, i, generator=g, dtype=dtype) / math.sqrt(i) for i, o in pairwise(sizes)]
    biases = [0.3 * torch.randn(o, generator=g, dtype=dtype) for o in sizes[1:]]
    return [w.requires_grad_() for w in weights], [b.requires_grad_() for b in biases]


def rows(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(width)
    return torch.randn(count, width, generator=g, dtype=dtype).requires_grad_()


def value_and_gradients(fn, x, weights, biases, **kwargs) -> list[Tensor]:
    y = fn(x, weights, biases, **kwargs)
    g = torch.linspace(-1, 1.5, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights, *biases], g)]


def exactly(x, weights, biases, *, activation="tanh", output_activation="none") -> Tensor:
    return reference.mlp(x, weights, biases, activation, output_activation)


def double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


@contextlib.contextmanager
def kernels(forward: int = 1, backward: int = 1) -> Iterator[None]:
    before = _native.calls()
    yield
    after = _native.calls()
    ran = tuple(after[name][0] - before[name][0] for name in ("mlp", "mlp_backward"))
    assert ran == (forward, backward)


@both_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("output_activation", ["none", *ACTIVATIONS])
def test_equals_the_float64_reference_in_value_and_every_gradient(activation, output_activation, dtype):
    chosen = {"activation": activation, "output_activation": output_activation}
    rtol, atol = TOLERANCE[dtype]
    for sizes in SIZES:
        weights, biases = network(sizes, dtype)
        for count in (1, 7, 61):
            x = rows(count, sizes[0], dtype)
            with kernels():
                got = value_and_gradients(mlp, x, weights, biases, **chosen)
            exact = [double(w) for w in weights], [double(b) for b in biases]
            want = value_and_gradients(exactly, double(x), *exact, **chosen)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b.to(dtype), rtol=rtol, atol=atol)


def test_many_rows_and_deep_sums():
    """More rows and wider layers than a packed panel is deep."""
    weights, biases = network((300, 520, 33))
    x = rows(1111, 300)
    with kernels():
        got = value_and_gradients(mlp, x, weights, biases)
    exact = [double(w) for w in weights], [double(b) for b in biases]
    for a, b in zip(got, value_and_gradients(exactly, double(x), *exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-4)


@both_dtypes
def test_no_rows_give_zero_gradients(dtype):
    weights, biases = network((3, 5, 2), dtype)
    y, grad_x, *grads = value_and_gradients(mlp, rows(0, 3, dtype), weights, biases)
    assert y.shape == (0, 2)
    assert grad_x.shape == (0, 3)
    assert [g.shape for g in grads] == [p.shape for p in (*weights, *biases)]
    assert not any(g.any() for g in grads)
    with torch.no_grad():
        assert mlp(rows(0, 3, dtype), weights, biases).shape == (0, 2)


def test_leading_shape_is_free():
    weights, biases = network((3, 5, 2))
    x = rows(24, 3).detach()
    flat = mlp(x, weights, biases).detach()
    for lead in ((24,), (2, 3, 4), (24, 1), (1, 24)):
        with kernels(1, 0), torch.no_grad():
            assert torch.equal(mlp(x.view(*lead, 3), weights, biases), flat.view(*lead, 2))
    assert torch.equal(mlp(x[0], weights, biases), mlp(x[:1], weights, biases)[0])


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_strided_inputs_give_the_same_result(grad):
    weights, biases = network((4, 9, 3))
    x = rows(10, 4)

    def strided(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), float("nan"))
        wide[..., 0] = t.detach()
        view = wide[..., 0]
        return (view.t().contiguous().t() if view.ndim == 2 else view).requires_grad_()

    inputs = strided(x), [strided(w) for w in weights], [strided(b) for b in biases]
    assert not inputs[0].is_contiguous()
    if grad:
        want = value_and_gradients(mlp, x, weights, biases)
        with kernels():
            got = value_and_gradients(mlp, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    else:
        with torch.no_grad(), kernels(1, 0):
            got = mlp(*inputs)
        assert torch.equal(got, mlp(x, weights, biases))


def test_an_expanded_gradient_is_read_right():
    weights, biases = network((4, 9, 3))
    parameters = [*weights, *biases]
    got = torch.autograd.grad(mlp(rows(10, 4), weights, biases).sum(), parameters)
    want = torch.autograd.grad(mlp(rows(10, 4), weights, biases), parameters, torch.ones(10, 3))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_only_wanted_gradients_come_back():
    weights, biases = network((4, 9, 3))
    x = rows(10, 4)
    full = value_and_gradients(mlp, x, weights, biases)[1:]
    for i, wanted in enumerate((x, *weights, *biases)):
        frozen = [t.detach() for t in (x, *weights, *biases)]
        frozen[i] = wanted
        y = mlp(frozen[0], frozen[1:3], frozen[3:])
        g = torch.linspace(-1, 1.5, y.numel()).view_as(y)
        with kernels(0, 1):
            (grad,) = torch.autograd.grad(y, [wanted], g)
        assert torch.equal(grad, full[i])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_in_double_on_the_shipped_kernel(activation):
    weights, biases = network((3, 4, 5, 2), torch.float64)
    parameters = [*weights, *biases]
    x = rows(6, 3, torch.float64)

    def fn(x, *p):
        return mlp(x, p[:3], p[3:], activation=activation, output_activation="tanh")

    before = _native.calls()["mlp_backward"][0]
    assert torch.autograd.gradcheck(fn, (x, *parameters))
    assert _native.calls()["mlp_backward"][0] > before


@pytest.mark.parametrize("chosen", [("tanh", "none"), ("silu", "silu"), ("elu", "relu")], ids="-".join)
def test_opcheck(chosen):
    weights, biases = network((3, 5, 2))
    x = rows(4, 3)
    torch.library.opcheck(torch.ops.pywm.mlp, (x, weights, biases, *chosen))
    frozen = [w.detach() for w in weights]
    y, kept = (t.detach() for t in torch.ops.pywm.mlp(x, weights, biases, *chosen))
    for want_x, want_parameters in ((True, True), (True, False), (False, True)):
        saved = None if chosen[1] == "none" else y
        arguments = torch.ones(4, 2), x.detach(), saved, kept, frozen, *chosen, want_x, want_parameters
        torch.library.opcheck(torch.ops.pywm.mlp_backward, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic):
    torch.compiler.reset()
    weights, biases = network((3, 5, 2))

    def fn(x, weights, biases):
        return 2 * mlp(x + 1, weights, biases, activation="silu")

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count in (8, 11):
        x = rows(count, 3)
        with kernels():
            got = value_and_gradients(compiled, x, weights, biases)
        for a, b in zip(got, value_and_gradients(fn, x, weights, biases), strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivative_is_an_error():
    weights, biases = network((3, 5, 2))
    x = rows(4, 3)
    (grad,) = torch.autograd.grad(mlp(x, weights, biases).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), weights[0])


def test_changing_a_weight_before_the_backward_pass_is_an_error():
    weights, biases = network((3, 5, 2))
    y = mlp(rows(4, 3), weights, biases)
    with torch.no_grad():
        weights[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nan_passes_through_and_stays_in_its_row():
    weights, biases = network((3, 5, 2))
    x = rows(9, 3).detach()
    x[4, 1] = float("nan")
    for activation in ACTIVATIONS:
        y = mlp(x, weights, biases, activation=activation)
        assert y[4].isnan().all()
        assert y[torch.arange(9) != 4].isfinite().all()


def test_infinite_activations_saturate():
    one, zero = [torch.ones(1, 1)] * 2, [torch.zeros(1)] * 2
    x = torch.tensor([[float("inf")], [-float("inf")], [1e30], [-1e30], [0.0], [-0.0]])
    assert torch.equal(mlp(x, one, zero), torch.tanh(x))
    assert torch.equal(mlp(x, one, zero, activation="elu"), torch.nn.functional.elu(x))
    assert torch.equal(mlp(x, one, zero, activation="relu"), torch.relu(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_double_activations_equal_torch_for_every_size_of_argument(activation):
    x = torch.cat([torch.logspace(-30, 2.8, 4000, dtype=torch.float64), torch.linspace(0, 60, 4000).double()])
    x = torch.cat([x, -x])[:, None]
    layers = [torch.ones(1, 1).double()] * 2, [torch.zeros(1).double()] * 2
    got, want = (fn(x, *layers, activation=activation) for fn in (mlp, exactly))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_for_every_size_of_argument(activation):
    """1 x 1 layers with weight 1 and bias 0 leave the activation alone."""
    x = torch.cat([torch.logspace(-30, 2, 40000), torch.linspace(0, 12, 40000)])
    x = torch.cat([x, -x])[:, None]
    if activation == "silu":
        x = x[x > -80][:, None]  # below, the result is a denormal number
    got = mlp(x, [torch.ones(1, 1)] * 2, [torch.zeros(1)] * 2, activation=activation).double()
    want = exactly(
        x.double(),
        [torch.ones(1, 1).double()] * 2,
        [torch.zeros(1).double()] * 2,
        activation=activation,
    )
    assert ((got - want).abs() <= 5e-7 * want.abs()).all()


def test_result_does_not_depend_on_the_number_of_threads():
    weights, biases = network((20, 200, 200, 7))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(mlp, rows(1000, 20), weights, biases))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    weights, biases = network((20, 65, 7))
    x = rows(100, 20).detach()
    with torch.no_grad():
        whole = mlp(x, weights, biases)
        for first, last in ((0, 1), (3, 10), (47, 50), (99, 100)):
            assert torch.equal(mlp(x[first:last], weights, biases), whole[first:last])


ISA = """
import sys
sys.path.insert(0, sys.argv[1])
import test_mlp
from pywm.ops import _native
print(_native.module().cpu_isa())
for dtype in test_mlp.TOLERANCE:
    test_mlp.test_equals_the_float64_reference_in_value_and_every_gradient("tanh", "none", dtype)
    test_mlp.test_equals_the_float64_reference_in_value_and_every_gradient("silu", "elu", dtype)
test_mlp.test_many_rows_and_deep_sums()
for activation in test_mlp.ACTIVATIONS:
    test_mlp.test_activations_are_accurate_for_every_size_of_argument(activation)
"""


@pytest.mark.parametrize("isa", _native.module().cpu_isas().split() if _native.has_backend("cpu") else [])
def test_every_instruction_set(isa):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ISA, os.path.dirname(__file__)],
        env={**os.environ, "PYWM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [isa]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_the_reference_knowingly(dtype):
    weights, biases = network((3, 5, 2))
    halves = [w.detach().to(dtype) for w in weights], [b.detach().to(dtype) for b in biases]
    with kernels(0, 0):
        y = mlp(rows(4, 3).to(dtype), *halves)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), mlp(rows(4, 3), weights, biases), rtol=2e-2, atol=2e-2)


def test_disabled_kernels_leave_the_reference():
    weights, biases = network((3, 5, 2))
    x = rows(4, 3)
    with _native.disabled(), kernels(0, 0):
        got = value_and_gradients(mlp, x, weights, biases)
    for a, b in zip(got, value_and_gradients(mlp, x, weights, biases), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms_and_forward_mode_run_the_reference():
    weights, biases = network((3, 5, 2))
    x = rows(6, 3).detach()
    frozen = [w.detach() for w in weights], [b.detach() for b in biases]
    (want,) = torch.autograd.grad(mlp(x, weights, biases).sum(), weights[0])
    with kernels(0, 0):
        grad = torch.func.grad(lambda w: mlp(x, [w, frozen[0][1]], frozen[1]).sum())(frozen[0][0])
        batched = torch.vmap(lambda row: mlp(row, *frozen))(x)
        step = torch.full_like(frozen[0][0], 1e-3)
        _, along = torch.func.jvp(lambda w: mlp(x, [w, frozen[0][1]], frozen[1]), (frozen[0][0],), (step,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(frozen[0][0], step)
            pair = torch.autograd.forward_ad.unpack_dual(mlp(x, [dual, frozen[0][1]], frozen[1]))
    torch.testing.assert_close(grad, want)
    torch.testing.assert_close(batched, mlp(x, *frozen))
    torch.testing.assert_close(along.sum(), (want * step).sum())
    torch.testing.assert_close(pair.tangent, along)


def _cases():
    x, w, b = torch.zeros(4, 3), [torch.zeros(5, 3), torch.zeros(2, 5)], [torch.zeros(5), torch.zeros(2)]
    yield TypeError, "mlp: x is a list, but a torch.Tensor was expected", ([1.0], w, b), {}
    yield TypeError, "mlp: x is torch.int64, but one of float32, ", (x.long(), w, b), {}
    yield ValueError, r"mlp: x is \(\), but \[..., I\] with I >= 1 was expected", (torch.zeros(()), w, b), {}
    yield TypeError, "mlp: weights is a Tensor, but a list of tensors was expected", (x, w[0], b), {}
    yield TypeError, "mlp: biases is a NoneType, but a list of tensors was expected", (x, w, None), {}
    yield ValueError, "mlp: weights is empty, but at least one layer was expected", (x, [], []), {}
    yield ValueError, "mlp: biases is a list of 1, but 2, one a weight, was expected", (x, w, b[:1]), {}
    yield TypeError, r"mlp: weights\[1\] is a NoneType, but a torch.Tensor", (x, [w[0], None], b), {}
    message = (
        r"mlp: weights\[0\] is \(5, 3\), but \[out, 4\] with out >= 1 was expected, as x gives 4 numbers"
    )
    yield ValueError, message, (torch.zeros(4, 4), w, b), {}
    message = r"mlp: weights\[1\] is \(5, 3\), but \[out, 5\] .* as weights\[0\] gives 5 numbers"
    yield ValueError, message, (x, [w[0], w[0]], b), {}
    message = r"mlp: biases\[1\] is \(5,\), but \(2,\) was expected, as weights\[1\] is \(2, 5\)"
    yield ValueError, message, (x, w, [b[0], b[0]]), {}
    yield (
        TypeError,
        r"mlp: weights\[0\] is torch.float64, but x is torch.float32",
        (x, [w[0].double(), w[1]], b),
        {},
    )
    yield (
        TypeError,
        r"mlp: biases\[1\] is torch.float64, but x is torch.float32",
        (x, w, [b[0], b[1].double()]),
        {},
    )
    yield TypeError, r"mlp: weights\[0\] is on the meta device", (x, [w[0].to("meta"), w[1]], b), {}
    message = "mlp: activation is 'gelu', but one of tanh, silu, elu, relu was expected"
    yield ValueError, message, (x, w, b), {"activation": "gelu"}
    yield ValueError, "mlp: activation is 'none', but one of tanh", (x, w, b), {"activation": "none"}
    yield (
        ValueError,
        "mlp: output_activation is 3, but one of none, tanh",
        (x, w, b),
        {"output_activation": 3},
    )


@pytest.mark.parametrize("enabled", [True, False], ids=["kernel", "reference"])
def test_bad_calls_name_the_argument(enabled):
    for error, message, arguments, kwargs in _cases():
        with (
            contextlib.nullcontext() if enabled else _native.disabled(),
            pytest.raises(error, match=message),
        ):
            mlp(*arguments, **kwargs)
