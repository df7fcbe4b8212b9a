"""Tests that every op must pass. A new op gets them by its row in pywm.testing.opinfo.OPS."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pywm.ops import _native, kl_balance
from pywm.testing.opinfo import OPS

CASES = [(info, variant) for info in OPS for variant in info.variants]
cases = pytest.mark.parametrize(
    ("info", "variant"), CASES, ids=[f"{info.name}-{variant}" for info, variant in CASES]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def leaves(info, sample):
    return [x for k, x in sample.tensors.items() if k in info.differentiable]


def with_grad(info, sample):
    return sample.map(lambda k, x: x.detach().clone().requires_grad_() if k in info.differentiable else x)


def forward_and_gradients(info, fn, sample):
    """All outputs, then the gradients of a weighted sum of the differentiable ones."""
    outputs = fn(sample)
    total = 0
    for i, x in enumerate(outputs[: info.differentiable_outputs]):
        weight = torch.linspace(-1 + i, 1.5, max(x.numel(), 1), dtype=x.dtype, device=x.device)
        total = total + (x.flatten() * weight[: x.numel()]).sum()
    return outputs, torch.autograd.grad(total, leaves(info, sample))


@contextlib.contextmanager
def served_by_kernel(info, device, at_least=1):
    """Assert that compiled kernels of the device ran inside the block, and that it was not the reference."""
    before = _native.calls()
    yield
    column = 0 if device == "cpu" else 1
    ran = sum(_native.calls()[k][column] - before[k][column] for k in info.kernels)
    assert ran >= at_least, f"{info.name}: compiled kernels ran {ran} times on {device}"


def skip_without_kernel(info, device):
    if device not in info.devices:
        pytest.skip(f"{info.name} has no {device} kernel by design; the reference serves it")


def skip_what_is_not_dispatched(info):
    if not info.dispatched:
        pytest.skip(f"{info.name} is no op of the dispatcher by design; tracers see its steps")


def compare(info, got, want, dtype):
    rtol, atol = info.tol[dtype]
    names = (*info.outputs, *(f"grad of {k}" for k in info.differentiable))
    for name, g, w in zip(names, (*got[0], *got[1]), (*want[0], *want[1]), strict=False):
        g, w = g.detach().cpu(), w.detach().to(dtype)
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol, msg=f"{name}: {g} is not {w}")


@cases
@dtypes
def test_matches_the_float64_reference_in_value_and_every_gradient(info, variant, device, dtype):
    skip_without_kernel(info, device)
    for seed, shape in enumerate(info.shapes):
        sample = with_grad(info, info.sample(shape, variant, dtype, device, seed))
        exact = with_grad(info, info.sample(shape, variant, dtype, "cpu", seed).double())
        empty = next(iter(sample.tensors.values())).numel() == 0
        with contextlib.nullcontext() if empty else served_by_kernel(info, device):
            got = forward_and_gradients(info, info.op, sample)
        compare(info, got, forward_and_gradients(info, info.reference, exact), dtype)


@cases
def test_fast_path_equals_the_differentiable_path(info, variant, device):
    skip_without_kernel(info, device)
    for shape in info.shapes:
        sample = info.sample(shape, variant, device=device)
        plain = info.op(sample)
        graph = info.op(with_grad(info, sample))
        for a, b in zip(plain, graph, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)
            assert not a.requires_grad


@cases
def test_gradcheck_in_double_on_the_shipped_kernel(info, variant, device):
    skip_without_kernel(info, device)
    if variant in info.no_derivative:
        pytest.skip(f"{info.name}: its gradient is not its derivative; its own tests look at it")
    sample = with_grad(info, info.sample(info.shapes[0], variant, torch.float64, device))
    names = [k for k in sample.tensors if k in info.differentiable]

    def fn(*inputs):
        changed = dict(zip(names, inputs, strict=True))
        outputs = info.op(sample.map(lambda k, x: changed.get(k, x)))
        # Invalid rows of an output may pass a value through without its gradient, on purpose: they are not compared.
        valid = sample.tensors.get("valid")
        return tuple(
            x if valid is None or valid.shape != x.shape else x.masked_fill(~valid, 0)
            for x in outputs[: info.differentiable_outputs]
        )

    with served_by_kernel(info, device):
        assert torch.autograd.gradcheck(fn, tuple(sample.tensors[k] for k in names))


class Recorder(TorchDispatchMode):
    """Collects the dispatcher calls of pywm's ops with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pywm":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


@cases
def test_opcheck(info, variant, device):
    """Schema, autograd registration, fake tensors and AOT dispatch agree with the kernel, forward and backward."""
    skip_without_kernel(info, device)
    skip_what_is_not_dispatched(info)
    sample = with_grad(info, info.sample(info.shapes[0], variant, torch.float32, device))
    with Recorder() as recorder:
        forward_and_gradients(info, info.op, sample)
    assert recorder.seen
    for func, args in recorder.seen:
        if "backward" in func.name():  # differentiable once: its own derivative raises, as another test shows
            args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        else:  # it looks for the gradients of its arguments, which only leaves keep
            args = tree_map_only(torch.Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), args)
        torch.library.opcheck(func, tuple(args))


@cases
def test_compiles_without_graph_break(info, variant, device):
    skip_without_kernel(info, device)
    skip_what_is_not_dispatched(info)
    torch.compiler.reset()
    sample = with_grad(info, info.sample(info.shapes[0], variant, torch.float32, device))
    names = list(sample.tensors)

    def fn(*tensors):
        changed = dict(zip(names, tensors, strict=True))
        return info.call(type(sample)(changed, sample.numbers))

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got = forward_and_gradients(info, lambda s: compiled(*s.tensors.values()), sample)
    want = forward_and_gradients(info, info.op, sample)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_numbers_that_change_between_compiled_calls_do_not_break_the_graph():
    torch.compiler.reset()
    logits, other = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))

    def fn(posterior, prior, free_nats):
        return kl_balance(posterior, prior, free_nats=free_nats).dynamics

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for free_nats in (1.0, 0.9, 0.5):  # the second one makes torch carry it as a symbol
        torch.testing.assert_close(compiled(logits, other, free_nats), fn(logits, other, free_nats))


@cases
def test_strided_and_expanded_inputs_give_the_same_result(info, variant, device):
    skip_without_kernel(info, device)
    shape = (6, 4)
    sample = info.sample(shape, variant, device=device)

    def strided(_, x):
        wide = torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)
        wide[..., 0] = x
        view = wide[..., 0]
        return view.t().contiguous().t() if view.ndim == 2 else view

    want = forward_and_gradients(info, info.op, with_grad(info, sample))
    inputs = sample.map(strided)
    for k in info.differentiable:
        if k in inputs.tensors:
            inputs.tensors[k].requires_grad_()
    with served_by_kernel(info, device):
        got = forward_and_gradients(info, info.op, inputs)
    tol = 1e-5 if info.torch_products else 0.0
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)

    expanded = sample.map(lambda _, x: x[:1].expand(x.shape) if x.ndim else x)
    same = expanded.map(lambda _, x: x.contiguous())
    for a, b in zip(info.op(expanded), info.op(same), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """New memory holds NaN: an element that a kernel skips stays NaN."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    _native.module().poison(True)
    yield
    _native.module().poison(False)


@cases
def test_writes_every_element(info, variant, device, poisoned_outputs):
    skip_without_kernel(info, device)
    for shape in info.shapes:
        sample = info.sample(shape, variant, device=device)
        for x in info.op(sample):
            assert x.isfinite().all()
        outputs, gradients = forward_and_gradients(info, info.op, with_grad(info, sample))
        for x in (*outputs, *gradients):
            assert x.isfinite().all()


@cases
def test_second_derivative_is_an_error_not_zero(info, variant, device):
    skip_without_kernel(info, device)
    sample = with_grad(info, info.sample(info.shapes[0], variant, torch.float64, device))
    outputs = info.op(sample)
    total = sum(x.sum() for x in outputs[: info.differentiable_outputs])
    total = total * total  # so that the incoming gradient depends on the inputs
    first = torch.autograd.grad(total, leaves(info, sample), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sum(g.sum() for g in first), leaves(info, sample))


@cases
@pytest.mark.parametrize("path", ["eager", "dispatcher"])
def test_second_derivative_of_a_plain_sum_is_an_error_unless_it_is_zero(info, variant, path, device):
    """Here the incoming gradient is a constant: only what the backward pass saved can tell that there is more."""
    skip_without_kernel(info, device)
    if path == "dispatcher":
        skip_what_is_not_dispatched(info)
    sample = with_grad(info, info.sample(info.shapes[0], variant, torch.float64, device))

    def penalty(op):
        outputs = op(sample)
        total = sum(x.sum() for x in outputs[: info.differentiable_outputs])
        first = torch.autograd.grad(total, leaves(info, sample), create_graph=True)
        return sum(g.square().sum() for g in first)

    second = penalty(info.reference)
    curved = second.requires_grad and any(
        g is not None and bool(g.abs().max() > 1e-12)
        for g in torch.autograd.grad(second, leaves(info, sample), allow_unused=True)
    )
    if not curved:
        # And the sum of a one-hot is 1 whatever the logits are.
        assert info.name in ("gae", "discounted_return", "vtrace", "one_hot_linear", "categorical_sample"), (
            "only a linear op has no second derivative"
        )
        return
    # A mode that watches sends calls through the dispatcher.
    with Recorder() if path == "dispatcher" else contextlib.nullcontext():
        got = penalty(info.op)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(got, leaves(info, sample))


@cases
def test_gradients_nobody_needs_are_not_computed(info, variant, device):
    skip_without_kernel(info, device)
    sample = info.sample(info.shapes[5], variant, torch.float32, device)
    names = [k for k in sample.tensors if k in info.differentiable]
    full = forward_and_gradients(info, info.op, with_grad(info, sample))[1]
    for i, name in enumerate(names):
        only = sample.map(lambda k, x: x.clone().requires_grad_() if k == name else x)  # noqa: B023
        outputs = info.op(only)
        total = 0
        for j, x in enumerate(outputs[: info.differentiable_outputs]):
            if x.requires_grad:
                weight = torch.linspace(-1 + j, 1.5, x.numel(), dtype=x.dtype, device=x.device)
                total = total + (x.flatten() * weight).sum()
        (grad,) = torch.autograd.grad(total, only.tensors[name])
        torch.testing.assert_close(grad, full[i])


@cases
def test_negative_bit_views_keep_their_sign(info, variant, device):
    skip_without_kernel(info, device)
    sample = info.sample((6, 4), variant, device=device)
    lazy = sample.map(lambda _, x: torch._neg_view(-x) if x.is_floating_point() else x)
    for a, b in zip(info.op(lazy), info.op(sample), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@cases
def test_fake_tensors_have_the_outputs_shapes(info, variant):
    for shape in info.shapes[:4]:
        sample = info.sample(shape, variant)
        real = info.op(sample)
        with FakeTensorMode() as mode:
            fake = info.op(sample.map(lambda _, x: mode.from_tensor(x)))
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@cases
def test_make_fx_records_the_op_not_its_result(info, variant):
    from torch.fx.experimental.proxy_tensor import make_fx

    skip_what_is_not_dispatched(info)
    sample = info.sample(info.shapes[0], variant)
    names = list(sample.tensors)

    def fn(*tensors):
        return info.call(type(sample)(dict(zip(names, tensors, strict=True)), sample.numbers))

    graph = make_fx(fn)(*sample.tensors.values())
    assert any("pywm" in str(node.target) for node in graph.graph.nodes)


@cases
def test_nan_inputs_are_data(info, variant, device):
    skip_without_kernel(info, device)
    sample = info.sample(info.shapes[5], variant, device=device)
    nan = sample.map(lambda _, x: torch.full_like(x, float("nan")) if x.is_floating_point() else x)
    assert info.op(nan)[0].isnan().any()


@pytest.mark.parametrize("info", OPS, ids=lambda info: info.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_runs_the_reference_knowingly(info, dtype):
    sample = info.sample(info.shapes[0]).map(lambda _, x: x.to(dtype) if x.is_floating_point() else x)
    before = _native.calls()
    outputs = info.op(sample)
    assert _native.calls() == before
    assert outputs[0].dtype == dtype
    told = _native.backend(next(iter(sample.tensors.values())))
    assert told.name == "reference"
    assert str(dtype) in told.why
    wide = info.op(sample.map(lambda _, x: x.float() if x.is_floating_point() else x))
    torch.testing.assert_close(outputs[0].float(), wide[0], rtol=2e-2, atol=2e-2)


# torch's own, when it first differentiates forward
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@cases
def test_functional_and_forward_mode_derivatives_agree_with_the_backward_pass(info, variant):
    sample = info.sample(info.shapes[-1], variant, torch.float64, "cpu")
    names = [k for k in sample.tensors if k in info.differentiable]

    def total(*chosen):
        changed = dict(zip(names, chosen, strict=True))
        outputs = info.op(sample.map(lambda k, x: changed.get(k, x)))
        return sum(x.square().sum() for x in outputs[: info.differentiable_outputs])

    values = tuple(sample.tensors[k] for k in names)
    tracked = tuple(x.clone().requires_grad_() for x in values)
    want = torch.autograd.grad(total(*tracked), tracked)
    got = torch.func.grad(total, argnums=tuple(range(len(names))))(*values)
    torch.testing.assert_close(got, want)
    # A tangent that is lost on the way would be taken for zero.
    directions = tuple(torch.ones_like(x) for x in values)
    along = sum(g.sum() for g in want)
    torch.testing.assert_close(torch.func.jvp(total, values, directions)[1], along)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, d) for x, d in zip(values, directions, strict=True)]
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(total(*duals)).tangent, along)


@cases
def test_vmap_and_inference_mode(info, variant):
    sample = info.sample(info.shapes[0], variant)
    with torch.inference_mode():
        inside = info.op(sample)
    outside = info.op(sample)
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a.clone(), b, rtol=0, atol=0)
    names = [k for k in sample.tensors if k in info.differentiable]

    def call(*chosen):
        changed = dict(zip(names, chosen, strict=True))
        return info.op(sample.map(lambda k, x: changed.get(k, x)))[: info.differentiable_outputs]

    twice = torch.vmap(call)(*(torch.stack([sample.tensors[k]] * 2) for k in names))
    for both, b in zip(twice, outside, strict=False):
        torch.testing.assert_close(both[1], b)


THREADS = """
import threading, torch
from pywm.testing.opinfo import OPS
torch.set_num_threads(2)
for info in OPS:
    samples = [info.sample(info.shapes[5 if info.name != "ppo_loss" else 6], seed=s) for s in range(8)]
    want = [info.op(s) for s in samples]
    wrong = []
    def work(i):
        for _ in range(1000):
            got = info.op(samples[i])
            if not all(torch.equal(a, b) for a, b in zip(got, want[i])):
                wrong.append(i)
                return
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong, (info.name, wrong)
print("equal")
"""

FORK = """
import os, sys, torch
from pywm.testing.opinfo import OPS
torch.set_num_threads(2)
info = OPS[0]
sample = info.sample((256, 1024))
want = info.op(sample)  # large enough for the thread pool, so that its workers exist
child = os.fork()
if child == 0:
    got = info.op(sample)
    # Compared by NumPy: torch's own parallel loops hang in such a child.
    os._exit(0 if (got[0].numpy() == want[0].numpy()).all() else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
print("forked")
"""


@pytest.mark.parametrize(("script", "word"), [(THREADS, "equal"), (FORK, "forked")], ids=["threads", "fork"])
def test_threads_and_forks(script, word):
    """Eight Python threads of 1,000 calls equal the serial results; an op in a forked child returns."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert word in run.stdout


def test_result_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for info in OPS:
            sample = info.sample((40, 2000) if info.name != "ppo_loss" else (5000, 4))
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(info.op(sample))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)
