"""What the fused Adam step promises."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pywm.ops import _native, adam_step_

SIZES = (1, 2, 15, 64, 1000, 4097, 40000)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def buffers(size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return param, grad, exp_avg and exp_avg_sq as they are amid a run."""
    g = torch.Generator().manual_seed(size)
    param, grad, exp_avg, exp_avg_sq = torch.randn(4, size, generator=g, dtype=dtype)
    return [param.clone(), grad.clone(), exp_avg * 0.1, exp_avg_sq.square() * 0.01]


@contextlib.contextmanager
def kernels(count: int) -> Iterator[None]:
    before = _native.calls()["adam_step_"][0]
    yield
    assert _native.calls()["adam_step_"][0] - before == count


@both_dtypes
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9, 0.0])
def test_equals_torch_over_100_steps(max_grad_norm, dtype):
    torch.manual_seed(0)
    theirs = [torch.randn(shape, dtype=dtype) for shape in ((64, 4), (64,), (2, 64), (2,))]
    param = torch.cat([p.flatten() for p in theirs])
    theirs = [torch.nn.Parameter(p) for p in theirs]
    optimizer = torch.optim.Adam(theirs, betas=(0.8, 0.95), eps=1e-5, foreach=False)
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    exact = [x.to(torch.float64, copy=True) for x in (param, exp_avg, exp_avg_sq)]
    rtol, atol = (1e-4, 2e-6) if dtype == torch.float32 else (1e-12, 1e-14)
    for step in range(1, 101):
        lr = 1e-2 * (1 - step / 200)
        for p in theirs:
            p.grad = (3 * torch.randn_like(p) + p.detach()) * (5 if step % 7 == 0 else 0.1)
        grad = torch.cat([p.grad.flatten() for p in theirs])
        numbers = {"step": step, "lr": lr, "beta1": 0.8, "beta2": 0.95, "eps": 1e-5}
        numbers["max_grad_norm"] = max_grad_norm
        with kernels(1):
            norm = adam_step_(param, grad, exp_avg, exp_avg_sq, **numbers)
        with _native.disabled(), kernels(0):
            adam_step_(exact[0], grad.double(), exact[1], exact[2], **numbers)
        limit = float("inf") if max_grad_norm is None else max_grad_norm
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    torch.testing.assert_close(param, torch.cat([p.detach().flatten() for p in theirs]), rtol=rtol, atol=atol)
    for x, want in zip((param, exp_avg, exp_avg_sq), exact, strict=True):
        torch.testing.assert_close(x, want.to(dtype), rtol=rtol, atol=atol)


@both_dtypes
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_float64_reference(size, dtype):
    state = buffers(size, dtype)
    exact = [x.to(torch.float64, copy=True) for x in state]
    numbers = {"step": 3, "lr": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 1e-6, "max_grad_norm": 0.5}
    with kernels(1):
        norm = adam_step_(*state, **numbers)
    with _native.disabled():
        exact_norm = adam_step_(*exact, **numbers)
    assert norm.shape == ()
    assert norm.dtype == dtype
    for a, b in zip((norm, *state), (exact_norm, *exact), strict=True):
        rtol = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(a, b.to(dtype), rtol=rtol, atol=rtol)


def test_the_gradient_is_left_as_it_is():
    state = buffers(100)
    before = state[1].clone()
    adam_step_(*state, step=1, lr=0.1, max_grad_norm=1e-3)
    assert torch.equal(state[1], before)


def test_the_learning_rate_zero_moves_the_averages_only():
    state = buffers(100)
    before = [x.clone() for x in state]
    adam_step_(*state, step=1, lr=0)
    assert torch.equal(state[0], before[0])
    assert not torch.equal(state[2], before[2])


@pytest.mark.parametrize("enabled", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(bad, enabled):
    state = buffers(5000)
    state[1][4321] = bad
    before = [x.clone() for x in state]
    with contextlib.nullcontext() if enabled else _native.disabled():
        norm = adam_step_(*state, step=1, lr=0.1, max_grad_norm=0.5)
    assert not norm.isfinite()
    assert all(torch.equal(x, y) for x, y in zip(state[::2], before[::2], strict=True))
    assert torch.equal(state[3], before[3])


def test_the_norm_of_large_and_small_gradients_is_right():
    """The squares of these leave float32."""
    for scale in (1e30, 1e-30):
        state = buffers(1000)
        state[1].mul_(scale)
        norm = adam_step_(*state, step=1, lr=0.1, max_grad_norm=1.0)
        want = state[1].double().norm()
        torch.testing.assert_close(norm.double(), want, rtol=1e-6, atol=0)


def test_a_buffer_of_nothing():
    state = [torch.zeros(0) for _ in range(4)]
    assert adam_step_(*state, step=1, lr=0.1) == 0


def test_views_of_a_larger_buffer_are_served_and_their_neighbours_kept():
    whole = torch.full((4, 300), 7.0)
    views = [whole[i, 13:113] for i in range(4)]
    state = buffers(100)
    for view, x in zip(views, state, strict=True):
        view.copy_(x)
    with kernels(1):
        adam_step_(*views, step=2, lr=0.1)
    adam_step_(*state, step=2, lr=0.1)
    for view, x in zip(views, state, strict=True):
        assert torch.equal(view, x)
    assert (whole[:, :13] == 7).all()
    assert (whole[:, 113:] == 7).all()


def test_a_strided_or_negated_gradient_is_read_right():
    want, strided, lazy = buffers(100), buffers(100), buffers(100)
    adam_step_(*want, step=2, lr=0.1)
    wide = torch.zeros(100, 2)
    wide[:, 0] = strided[1]
    strided[1] = wide[:, 0]
    lazy[1] = torch._neg_view(-lazy[1])
    for state in (strided, lazy):
        with kernels(1):
            adam_step_(*state, step=2, lr=0.1)
        assert torch.equal(state[0], want[0])


def test_parameters_are_stepped_without_grad_and_autograd_sees_the_change():
    param, grad, exp_avg, exp_avg_sq = buffers(10)
    param = torch.nn.Parameter(param)
    y = (param * param).sum()
    with torch.no_grad():
        adam_step_(param, grad, exp_avg, exp_avg_sq, step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_result_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = buffers(200_003)
            norm = adam_step_(*state, step=5, lr=0.1, max_grad_norm=0.5)
            results.append([norm, *state])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    numbers = 3, 0.1, 0.9, 0.999, 1e-8
    for max_grad_norm in (None, 0.5):
        torch.library.opcheck(torch.ops.pywm.adam_step_, (*buffers(7), *numbers, max_grad_norm))


def test_compiles_without_graph_break():
    torch.compiler.reset()

    def fn(param, grad, exp_avg, exp_avg_sq):
        norm = adam_step_(param, 2 * grad, exp_avg, exp_avg_sq, step=3, lr=0.1, max_grad_norm=0.5)
        return norm + param.sum()

    got, want = buffers(50), buffers(50)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    with kernels(1):
        result = compiled(*got)
    torch.testing.assert_close(result, fn(*want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


ISA = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, test_adam_step
from pywm.ops import _native
print(_native.module().cpu_isa())
for dtype in (torch.float32, torch.float64):
    for size in test_adam_step.SIZES:
        test_adam_step.test_equals_the_float64_reference(size, dtype)
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


def _cases():
    p, g, m, v = (torch.zeros(5) for _ in range(4))
    ok = {"step": 1, "lr": 0.1}
    yield TypeError, "adam_step_: param is a list, but a torch.Tensor", ([1.0], g, m, v), ok
    yield (
        TypeError,
        "adam_step_: param is torch.float16, but one of float32, float64",
        (p.half(), g, m, v),
        ok,
    )
    message = r"adam_step_: param is \(1, 5\), but \[P\], one flat buffer, was expected"
    yield ValueError, message, (p[None], g, m, v), ok
    message = r"adam_step_: grad is \(4,\), but \(5,\) was expected, the shape of param"
    yield ValueError, message, (p, g[:4], m, v), ok
    yield (
        TypeError,
        "adam_step_: exp_avg is torch.float64, but param is torch.float32",
        (p, g, m.double(), v),
        ok,
    )
    yield TypeError, "adam_step_: exp_avg_sq is a NoneType", (p, g, m, None), ok
    message = (
        r"adam_step_: param has strides \(0,\), but a plain contiguous buffer was expected, for it is changed"
    )
    yield ValueError, message, (torch.zeros(1).expand(5), g, m, v), ok
    yield ValueError, r"adam_step_: exp_avg has strides \(2,\)", (p, g, torch.zeros(10)[::2], v), ok
    yield ValueError, "adam_step_: exp_avg_sq has .* and a lazy sign", (p, g, m, torch._neg_view(v)), ok
    yield ValueError, "adam_step_: param requires a gradient", (p.clone().requires_grad_(), g, m, v), ok
    for step, message in ((0, "is 0, but a number from 1 on"), (1.0, "is a float"), (True, "is a bool")):
        error = ValueError if step == 0 and step is not False else TypeError
        yield error, f"adam_step_: step {message}", (p, g, m, v), {"step": step, "lr": 0.1}
    for name, value, expected in (
        ("lr", -1.0, r"\[0, inf\)"),
        ("lr", float("nan"), r"\[0, inf\)"),
        ("beta1", 1.0, r"\[0, 1\)"),
        ("beta2", -0.1, r"\[0, 1\]"),
        ("eps", -1e-8, r"\[0, inf\)"),
        ("max_grad_norm", -0.5, r"\[0, inf\]"),
    ):
        message = f"adam_step_: {name} is {value}, but a number in {expected} was expected"
        yield ValueError, message, (p, g, m, v), {**ok, name: value}
    yield (
        TypeError,
        "adam_step_: lr is a Tensor, but a number was expected",
        (p, g, m, v),
        {"step": 1, "lr": p},
    )


@pytest.mark.parametrize("enabled", [True, False], ids=["kernel", "reference"])
def test_bad_calls_name_the_argument(enabled):
    for error, message, arguments, kwargs in _cases():
        with (
            contextlib.nullcontext() if enabled else _native.disabled(),
            pytest.raises(error, match=message),
        ):
            adam_step_(*arguments, **kwargs)
