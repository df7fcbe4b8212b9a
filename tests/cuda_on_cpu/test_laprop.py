"""The CUDA kernels of the LaProp step, executed by the emulator, against the float64 reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from emulation import SCHEDULES, why_unavailable
from launching import Call, launch_all

from pywm.ops import reference

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
NUMBERS = {"step": 3, "lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-20, "clip": 0.3, "min_norm": 1e-3}
# One number; tensors of nothing and many in a piece; one of several pieces; the border of a tensor on that of a piece.
SIZES = ([1], [0, 3, 0, 5, 1, 0], [40] * 130, [100, 9000, 7], [4096, 4096, 1], [8191, 1, 0, 300])
MODES = ["plain", "asan", "tsan"]


def build_call(
    sizes: list[int],
    dtype: str,
    clip: float | None = 0.3,
    bad: float | None = None,
    followed: int | None = None,
) -> Call:
    rng = np.random.default_rng(sum(sizes))
    P = sum(sizes)
    param, grad, exp_avg, exp_avg_sq = rng.standard_normal((4, P)).astype(dtype)
    offsets = np.cumsum([0, *sizes])
    # Some tensors of zeros, some gradients that are clipped and some that are not.
    for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
        param[begin:end] *= (1, 0, 1e-5)[i % 3]
        grad[begin:end] *= (0.1, 1, 1e-6)[i % 3]
    if bad is not None:
        grad[P // 2] = bad
    arrays = {
        "param": param,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq**2,
        "offsets": offsets,
    }
    numbers = {**NUMBERS, "clip": -1.0 if clip is None else clip, "P": P, "segments": len(sizes)}
    changed: tuple[str, ...] = ("param", "exp_avg", "exp_avg_sq")
    copies = {}
    if followed is not None:
        arrays["slow"] = rng.standard_normal(followed).astype(dtype)
        numbers |= {"followed": followed, "slow_rate": 0.25}
        changed, copies = (*changed, "slow"), {"rounded": (2 * P,)}
    return Call("laprop_step", dtype, arrays, {"norm": (1,)}, numbers, byte_outputs=copies, in_place=changed)


def expected(call: Call) -> dict[str, np.ndarray]:
    tensors = {name: torch.from_numpy(x.copy()) for name, x in call.arrays.items()}
    tensors = {name: x if name == "offsets" else x.double() for name, x in tensors.items()}
    numbers = {name: call.numbers[name] for name in (*NUMBERS, "slow_rate") if name in call.numbers}
    numbers["clip"] = None if numbers["clip"] < 0 else numbers["clip"]
    norm = reference.laprop_step_(**tensors, **numbers)
    return {"norm": norm[None].numpy(), **{name: tensors[name].numpy() for name in call.in_place}}


@pytest.mark.parametrize("mode", MODES)
def test_the_kernels_agree_with_the_reference(mode: str) -> None:
    if reason := why_unavailable(mode):
        pytest.skip(reason)
    dtypes = ("float32",) if mode == "tsan" else ("float32", "float64")
    orders = ("forward",) if mode == "tsan" else tuple(SCHEDULES)
    calls = [
        (build_call(sizes, dtype, clip, followed=followed), SCHEDULES[order])
        for sizes in SIZES
        for dtype in dtypes
        for clip, followed in ((0.3, None), (None, None), (0.3, (sum(sizes) + 1) // 2))
        for order in orders
    ]
    for (call, _), result in zip(calls, launch_all(calls, mode), strict=True):
        got = result.require_clean()
        tolerance = TOLERANCE[call.dtype]
        for name, want in expected(call).items():
            np.testing.assert_allclose(got[name], want, rtol=tolerance, atol=tolerance, err_msg=name)
        if "rounded" in got:
            copy = torch.from_numpy(got["rounded"].view(np.int16)).view(torch.bfloat16)
            assert torch.equal(copy, torch.from_numpy(got["param"]).to(torch.bfloat16))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    calls = [
        (build_call([40, 5000, 3], "float32", bad=bad, followed=100), SCHEDULES["forward"])
        for bad in (np.nan, np.inf)
    ]
    for (call, _), result in zip(calls, launch_all(calls, "plain"), strict=True):
        got = result.require_clean()
        assert not np.isfinite(got["norm"]).any()
        for name in call.in_place:
            np.testing.assert_array_equal(got[name], call.arrays[name])
        assert (got["rounded"] == 0xFF).all()  # as it was


def test_offsets_that_are_none_touch_nothing_else() -> None:
    """No error can be raised without waiting for the device."""
    mode = "plain" if why_unavailable("asan") else "asan"
    call = build_call([40, 5000, 3], "float32")
    wrong = (
        [0, 9000, 20, 4],
        [-5, -3, -2, -1],
        [9000, 9000, 9000, 9000],
        [2**62, 0, -(2**62), 7],
        [5043, 5040, 40, 0],
    )
    calls = [
        (Call(**{**vars(call), "arrays": {**call.arrays, "offsets": np.array(o)}}), SCHEDULES["forward"])
        for o in wrong
    ]
    for result in launch_all(calls, mode):
        result.require_clean()
