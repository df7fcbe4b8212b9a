"""What the fused LaProp step promises."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pywm.ops import _native, laprop_step_

# Tensors of one number, of nothing, of several blocks of 4096; borders on those of a block.
SIZES = ((1,), (2, 0, 13), (64, 4, 1, 0, 900), (4096, 1, 4095), (10000, 3, 40000, 17))
NUMBERS = {"step": 3, "lr": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 1e-6, "clip": 0.3, "min_norm": 1e-3}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def buffers(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return param, grad, exp_avg, exp_avg_sq and offsets as they are amid a run: some tensors are clipped."""
    g = torch.Generator().manual_seed(sum(sizes))
    param, grad, exp_avg, exp_avg_sq = torch.randn(4, sum(sizes), generator=g, dtype=dtype)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    for s, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        param[begin:end] *= (1, 0, 1e-5)[s % 3]
        grad[begin:end] *= (0.1, 1, 1e-6)[s % 3]
    return [param.clone(), grad.clone(), exp_avg * 0.1, exp_avg_sq.square() * 0.01, offsets]


def exact(state: list[Tensor]) -> list[Tensor]:
    return [x.to(torch.float64, copy=True) if x.is_floating_point() else x for x in state]


@contextlib.contextmanager
def kernels(count: int, device: str = "cpu") -> Iterator[None]:
    backend = ("cpu", "cuda").index(device)
    before = _native.calls()["laprop_step_"][backend]
    yield
    assert _native.calls()["laprop_step_"][backend] - before == count


class Plain:
    """Dreamer's optimiser, tensor by tensor, as its paper and code say."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.nu = [torch.zeros_like(p) for p in params]
        self.mu = [torch.zeros_like(p) for p in params]
        self.t = 0

    def step(self, grads: list[Tensor], lr: float) -> None:
        self.t += 1
        for p, g, nu, mu in zip(self.params, grads, self.nu, self.mu, strict=True):
            g = g / max(1.0, float(g.norm()) / (0.3 * max(1e-3, float(p.norm()))))
            nu.copy_(0.999 * nu + 0.001 * g**2)
            normalised = g / ((nu / (1 - 0.999**self.t)).sqrt() + 1e-20)
            mu.copy_(0.9 * mu + 0.1 * normalised)
            p.sub_(lr * mu / (1 - 0.9**self.t))


@both_dtypes
def test_equals_dreamers_optimiser_over_100_steps(dtype):
    torch.manual_seed(0)
    theirs = [torch.randn(shape, dtype=dtype) for shape in ((64, 4), (64,), (2, 64), (2,))]
    theirs[1].zero_()
    param = torch.cat([p.flatten() for p in theirs])
    offsets = torch.tensor([0, *itertools.accumulate(p.numel() for p in theirs)])
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    plain = Plain(theirs)
    for step in range(1, 101):
        lr = 1e-2 * (1 - step / 200)
        grads = [(3 * torch.randn_like(p) + p) * (5 if step % 7 == 0 else 0.01) for p in theirs]
        if step < 4:
            grads[3].zero_()
        plain.step(grads, lr)
        grad = torch.cat([g.flatten() for g in grads])
        with kernels(1):
            norm = laprop_step_(param, grad, exp_avg, exp_avg_sq, offsets, step=step, lr=lr)
        torch.testing.assert_close(norm, grad.norm())
    rtol, atol = (1e-4, 2e-6) if dtype == torch.float32 else (1e-12, 1e-14)
    want = torch.cat([p.flatten() for p in theirs])
    torch.testing.assert_close(param, want, rtol=rtol, atol=atol)


@both_dtypes
@pytest.mark.parametrize("clip", [0.3, None, 0.0, 1e9])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_float64_reference(sizes, clip, dtype, device):
    wanted = exact(buffers(sizes, dtype))
    state = [x.to(device) for x in buffers(sizes, dtype)]
    numbers = {**NUMBERS, "clip": clip}
    with kernels(1, device):
        norm = laprop_step_(*state, **numbers)
    with _native.disabled(), kernels(0):
        wanted_norm = laprop_step_(*wanted, **numbers)
    assert norm.shape == ()
    assert norm.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for a, b in zip((norm, *state), (wanted_norm, *wanted), strict=True):
        torch.testing.assert_close(a.cpu(), b.to(a.dtype), rtol=rtol, atol=rtol)


def test_the_first_steps_by_hand():
    """One number, clipped to 0.3 of the parameter, then not."""
    param, offsets = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0, 1])
    m, v = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert laprop_step_(param, param.new_tensor([-5.0]), m, v, offsets, step=1, lr=0.1) == 5
    assert v.item() == pytest.approx(0.001 * 0.6**2)
    assert m.item() == pytest.approx(-0.1)  # a first gradient is normalised to its sign
    assert param.item() == pytest.approx(2.1)
    laprop_step_(param, param.new_tensor([0.5]), m, v, offsets, step=2, lr=0.1)
    nu = 0.999 * 0.001 * 0.36 + 0.001 * 0.25
    mu = 0.9 * -0.1 + 0.1 * 0.5 / math.sqrt(nu / (1 - 0.999**2))
    assert param.item() == pytest.approx(2.1 - 0.1 * mu / (1 - 0.81))


def test_zeros_move_by_their_least_norm_only_and_stay_without_gradient():
    param, grad, m, v = torch.zeros(4, 6)
    grad[:3] = 100.0
    laprop_step_(param, grad, m, v, torch.tensor([0, 3, 6]), step=1, lr=0.5)
    torch.testing.assert_close((v[:3] / 0.001).sum().sqrt(), torch.tensor(3e-4))
    assert param[:3].tolist() == pytest.approx([-0.5] * 3)
    assert param[3:].tolist() == [0, 0, 0]


def test_the_gradient_is_left_as_it_is():
    state = buffers((100,))
    before = state[1].clone()
    laprop_step_(*state, step=1, lr=0.1)
    assert torch.equal(state[1], before)


@pytest.mark.parametrize("enabled", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(bad, enabled):
    state = buffers((40, 5000))
    state[1][4321] = bad
    before = [x.clone() for x in state]
    with contextlib.nullcontext() if enabled else _native.disabled():
        norm = laprop_step_(*state, step=1, lr=0.1)
    assert not norm.isfinite()
    assert all(torch.equal(x, y) for i, (x, y) in enumerate(zip(state, before, strict=True)) if i != 1)


def test_the_norm_of_large_and_small_gradients_is_right():
    """The squares of these leave float32."""
    for scale in (1e30, 1e-30):
        state = buffers((1000,))
        state[1].mul_(scale)
        norm = laprop_step_(*state, step=1, lr=0.1)
        torch.testing.assert_close(norm.double(), state[1].double().norm(), rtol=1e-6, atol=0)
        assert all(bool(x.isfinite().all()) for x in state)


@both_dtypes
@pytest.mark.parametrize("followed", [0, 1, 3000, None], ids=["nothing", "one", "some", "all"])
def test_what_follows_the_last_parameters_moves_slowly(followed, dtype, device):
    state = [x.to(device) for x in buffers((7000, 1, 4095), dtype)]
    plain = [x.clone() for x in state]
    Q = len(state[0]) if followed is None else followed
    slow = torch.randn(Q, generator=torch.Generator().manual_seed(1), dtype=dtype).to(device)
    before = slow.clone()
    with kernels(1, device):
        laprop_step_(*state, **NUMBERS, slow=slow, slow_rate=0.02)
    laprop_step_(*plain, **NUMBERS)
    assert all(torch.equal(a, b) for a, b in zip(state, plain, strict=True))  # nothing else is touched
    torch.testing.assert_close(slow, torch.lerp(before, state[0][len(state[0]) - Q :], 0.02))
    with _native.disabled():
        again, reference = [x.to(device) for x in buffers((7000, 1, 4095), dtype)], before.clone()
        laprop_step_(*again, **NUMBERS, slow=reference, slow_rate=0.02)
    torch.testing.assert_close(slow, reference)


@both_dtypes
@pytest.mark.parametrize("enabled", [True, False], ids=["kernel", "reference"])
def test_the_bfloat16_copy_is_the_new_parameters_rounded(enabled, dtype):
    state = buffers((7000, 1, 4095), dtype)
    state[0][:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38])
    state[1][:4], state[2][:4] = 0, 0
    copy = torch.full_like(state[0], 7, dtype=torch.bfloat16)
    with contextlib.nullcontext() if enabled else _native.disabled():
        laprop_step_(*state, **{**NUMBERS, "clip": None}, rounded=copy)
    assert torch.equal(copy.view(torch.int16)[4:], state[0].to(torch.bfloat16).view(torch.int16)[4:])
    torch.testing.assert_close(copy[:4], state[0][:4].to(torch.bfloat16), equal_nan=True)


@pytest.mark.parametrize("enabled", [True, False], ids=["kernel", "reference"])
def test_a_step_that_is_skipped_moves_no_follower_either(enabled):
    state = buffers((40, 5000))
    state[1][4321] = float("nan")
    slow, copy = torch.ones(30), torch.full((5040,), 7.0, dtype=torch.bfloat16)
    with contextlib.nullcontext() if enabled else _native.disabled():
        laprop_step_(*state, step=1, lr=0.1, slow=slow, slow_rate=1.0, rounded=copy)
    assert (slow == 1).all()
    assert (copy == 7).all()


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_a_buffer_of_nothing(offsets):
    state = [torch.zeros(0) for _ in range(4)]
    assert laprop_step_(*state, torch.tensor(offsets), step=1, lr=0.1) == 0


def test_views_of_a_larger_buffer_are_served_and_their_neighbours_kept():
    whole = torch.full((4, 300), 7.0)
    views = [whole[i, 13:113] for i in range(4)]
    *state, offsets = buffers((30, 70))
    for view, x in zip(views, state, strict=True):
        view.copy_(x)
    with kernels(1):
        laprop_step_(*views, offsets, step=2, lr=0.1)
    laprop_step_(*state, offsets, step=2, lr=0.1)
    for view, x in zip(views, state, strict=True):
        assert torch.equal(view, x)
    assert (whole[:, :13] == 7).all()
    assert (whole[:, 113:] == 7).all()


def test_strided_arguments_are_read_right():
    want, strided, lazy = buffers((60, 40)), buffers((60, 40)), buffers((60, 40))
    laprop_step_(*want, step=2, lr=0.1)
    strided[1] = torch.stack([strided[1], torch.zeros(100)], 1)[:, 0]
    strided[4] = torch.stack([strided[4], torch.zeros(3, dtype=torch.int64)], 1)[:, 0]
    lazy[1] = torch._neg_view(-lazy[1])
    for state in (strided, lazy):
        with kernels(1):
            laprop_step_(*state, step=2, lr=0.1)
        assert torch.equal(state[0], want[0])


def test_autograd_sees_the_change():
    param, *rest = buffers((10,))
    param = torch.nn.Parameter(param)
    y = (param * param).sum()
    with torch.no_grad():
        laprop_step_(param, *rest, step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_result_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = buffers((7, 150_000, 50_000, 3))
            norm = laprop_step_(*state, step=5, lr=0.1)
            results.append([norm, *state])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    numbers = 3, 0.1, 0.9, 0.999, 1e-20
    for clip in (None, 0.3):
        for slow, copy in ((None, None), (torch.zeros(5), torch.zeros(7, dtype=torch.bfloat16))):
            arguments = (*buffers((4, 3)), *numbers, clip, 1e-3, slow, 0.02, copy)
            torch.library.opcheck(torch.ops.pywm.laprop_step_, arguments)


def test_compiles_without_graph_break():
    torch.compiler.reset()

    def fn(param, grad, exp_avg, exp_avg_sq, offsets):
        norm = laprop_step_(param, 2 * grad, exp_avg, exp_avg_sq, offsets, step=3, lr=0.1)
        return norm + param.sum()

    got, want = buffers((20, 30)), buffers((20, 30))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    with kernels(1):
        result = compiled(*got)
    torch.testing.assert_close(result, fn(*want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


ISA = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, test_laprop_step
from pywm.ops import _native
print(_native.module().cpu_isa())
for dtype in (torch.float32, torch.float64):
    for sizes in test_laprop_step.SIZES:
        test_laprop_step.test_equals_the_float64_reference(sizes, 0.3, dtype, "cpu")
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
    o = torch.tensor([0, 2, 5])
    ok = {"step": 1, "lr": 0.1}
    yield TypeError, "param is a list, but a torch.Tensor", ([1.0], g, m, v, o), ok
    yield TypeError, "param is torch.float16, but one of float32, float64", (p.half(), g, m, v, o), ok
    yield ValueError, r"param is \(1, 5\), but \[P\], one flat buffer", (p[None], g, m, v, o), ok
    yield ValueError, r"grad is \(4,\), but \(5,\) was expected", (p, g[:4], m, v, o), ok
    yield TypeError, "exp_avg is torch.float64, but param is torch.float32", (p, g, m.double(), v, o), ok
    yield TypeError, "exp_avg_sq is a NoneType", (p, g, m, None, o), ok
    yield ValueError, r"exp_avg has strides \(2,\)", (p, g, torch.zeros(10)[::2], v, o), ok
    yield ValueError, "param requires a gradient", (p.clone().requires_grad_(), g, m, v, o), ok
    yield TypeError, "offsets is a list", (p, g, m, v, [0, 5]), ok
    yield TypeError, "offsets is torch.int32, but one of int64", (p, g, m, v, o.int()), ok
    yield ValueError, r"offsets is \(1, 3\), but \[S \+ 1\]", (p, g, m, v, o[None]), ok
    yield ValueError, r"offsets is \(0,\), but \[S \+ 1\]", (p, g, m, v, o[:0]), ok
    for bad in ([0, 2, 6], [1, 5], [0, 3, 2, 5], [0], [0, -1, 5], [0, 2, 4, 1, 2, 3, 4, 4, 4, 5]):
        yield ValueError, "offsets is .* ascending numbers from 0 to 5", (p, g, m, v, torch.tensor(bad)), ok
    for step, message in ((0, "is 0, but a number from 1 on"), (1.0, "is a float"), (True, "is a bool")):
        error = ValueError if step == 0 and step is not False else TypeError
        yield error, f"step {message}", (p, g, m, v, o), {"step": step, "lr": 0.1}
    for name, value, interval in (
        ("lr", -1.0, r"\[0, inf\)"),
        ("lr", float("nan"), r"\[0, inf\)"),
        ("beta1", 1.0, r"\[0, 1\)"),
        ("beta2", -0.1, r"\[0, 1\]"),
        ("eps", -1e-8, r"\[0, inf\)"),
        ("clip", -0.5, r"\[0, inf\)"),
        ("min_norm", -0.5, r"\[0, inf\)"),
        ("slow_rate", 1.5, r"\[0, 1\]"),
    ):
        message = f"{name} is {value}, but a number in {interval} was expected"
        yield ValueError, message, (p, g, m, v, o), {**ok, name: value}
    for name, value, error, message in (
        ("slow", [1.0], TypeError, "a list, but a torch.Tensor"),
        ("slow", p.double(), TypeError, "torch.float64, but one of float32"),
        ("slow", torch.zeros(6), ValueError, r"\(6,\), but \[Q\] with Q <= 5"),
        ("slow", torch.zeros(1, 2), ValueError, r"\(1, 2\), but \[Q\] with Q <= 5"),
        ("rounded", p, TypeError, "torch.float32, but one of bfloat16"),
        ("rounded", p[:4].bfloat16(), ValueError, r"\(4,\), but \(5,\) was expected"),
    ):
        yield error, f"{name} is {message}", (p, g, m, v, o), {**ok, name: value}
    strided = torch.zeros(10)[::2]
    yield ValueError, r"slow has strides \(2,\)", (p, g, m, v, o), {**ok, "slow": strided}
    yield (
        ValueError,
        "slow requires a gradient",
        (p, g, m, v, o),
        {**ok, "slow": p.clone().requires_grad_()},
    )


@pytest.mark.parametrize("enabled", [True, False], ids=["kernel", "reference"])
def test_bad_calls_name_the_argument(enabled):
    for error, message, arguments, kwargs in _cases():
        with (
            contextlib.nullcontext() if enabled else _native.disabled(),
            pytest.raises(error, match=f"laprop_step_: {message}"),
        ):
            laprop_step_(*arguments, **kwargs)
