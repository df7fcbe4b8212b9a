"""The CUDA kernels on pixels, executed by the emulator, against the references."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from emulation import SCHEDULES, why_unavailable
from launching import Call, Result, launch_all
from test_distributions import DTYPES_OF, SCHEDULES_OF, TOLERANCE, Case, Setting
from torch import Tensor

from pywm.ops import reference

# One row, a block's, several blocks'; classes fewer and more than lanes, and no multiple of them; pictures smaller and
# larger than a block; fewer cells than threads, and more.
SETTINGS = [
    *(
        Setting(op, sizes, (cutoff,))
        for op in ("pixel_cross_entropy", "pixel_cross_entropy_backward")
        for sizes, cutoff in [((1, 1), 0.03), ((9, 5), 0.1), ((20, 33), 0.0), ((21, 256), 0.03)]
    ),
    *(
        Setting("stack_frames", sizes, options)
        for sizes in [(1, 1, 1, 1, 1, 1), (7, 2, 1, 35, 3, 1), (12, 2, 2, 300, 2, 4)]
        for options in [(False, False), (False, True), (True, False), (True, True)]
    ),
    *(Setting("stack_frames_bytes", sizes) for sizes in [(1, 1, 1, 1, 1, 1), (12, 2, 2, 300, 2, 4)]),
    *(
        Setting("resize_area", sizes)
        for sizes in [(1, 1, 1, 1, 1), (3, 21, 16, 10, 8), (2, 33, 47, 5, 31), (2, 20, 30, 20, 30)]
    ),
    *(
        Setting("sample_starts", sizes, options)
        for sizes in [(1, 1, 1, 1), (40, 3, 4, 3), (300, 7, 3, 2)]
        for options in [(False, False), (True, False), (True, True)]
    ),
]
# More rows, pictures or pixels than all blocks hold at a time.
LARGE = [
    Setting("pixel_cross_entropy", (33000, 4), (0.1,)),
    Setting("pixel_cross_entropy_backward", (33000, 4), (0.1,)),
    Setting("stack_frames", (5, 33000, 2, 3, 1, 1), (True, True)),
    Setting("stack_frames_bytes", (5, 33000, 2, 3, 1, 1)),
    Setting("resize_area", (105000, 4, 3, 3, 4 - 1)),
]


def cross_entropy_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    (M, K), (cutoff,) = setting.sizes, setting.options
    target = g.integers(K, size=M).astype(np.uint8)
    logits = g.standard_normal((M, K)).astype(dtype)
    logits[::3] *= 20  # some sure of their target, some of another one
    logits[np.arange(M), target] += np.where(g.random(M) < 0.4, 12, 0).astype(dtype)
    if M > 2:
        logits[1, target[1]] = -np.inf  # of probability zero
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    loss = reference.pixel_cross_entropy(leaf, torch.from_numpy(target), cutoff)
    numbers = {"M": M, "K": K, "cutoff": cutoff}
    arrays = {"logits": logits, "target": target}
    if not setting.op.endswith("backward"):
        return Case(Call(setting.op, dtype, arrays, {"loss": (M,)}, numbers), {"loss": loss.detach().numpy()})
    grad = g.standard_normal(M).astype(dtype)
    (expected,) = torch.autograd.grad(
        (loss * torch.from_numpy(grad).double()).nan_to_num(0, 0, 0).sum(), leaf
    )
    if M > 2:  # an infinite loss has a finite gradient, which a sum that holds infinity would hide
        softmax = leaf[1].detach().softmax(-1)
        softmax[int(target[1])] -= 1
        expected[1] = softmax * float(grad[1])
    arrays |= {"grad": grad, "loss": loss.detach().numpy().astype(dtype)}
    return Case(
        Call(setting.op, dtype, arrays, {"grad_logits": (M, K)}, numbers), {"grad_logits": expected.numpy()}
    )


def stack_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    R, B, C, pixels, stack, stride = setting.sizes
    frames = g.integers(256, size=(R, C, 1, pixels), dtype=np.uint8)
    frames[0] = 9  # of one colour
    index = g.integers(R, size=B)
    first = index - stride * (g.integers(R, size=B) % (index // stride + 1))
    numbers = {"R": R, "B": B, "C": C, "pixels": pixels, "stack": stack, "stride": stride, "scale": 0.25}
    arrays = {"frames": frames, "index": index, "first": first}
    tensors = [torch.from_numpy(x) for x in arrays.values()]
    shape = (B, stack * C, 1, pixels)
    if setting.op == "stack_frames_bytes":
        raw = reference.stack_frames(*tensors, None, stack, stride, 0.25, False, torch.uint8)
        return Case(
            Call(setting.op, dtype, arrays, {}, numbers, byte_outputs={"out": shape}), {"out": raw.numpy()}
        )
    standardize, noisy = setting.options
    numbers["standardize"] = standardize
    noise: Tensor | None = None
    if noisy:
        arrays["noise"] = g.standard_normal(shape).astype(dtype)
        noise = torch.from_numpy(arrays["noise"]).double()
    expected = reference.stack_frames(*tensors, noise, stack, stride, 0.25, standardize, torch.float64)
    return Case(Call(setting.op, dtype, arrays, {"out": shape}, numbers), {"out": expected.numpy()})


def resize_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    M, h, w, h2, w2 = setting.sizes
    frames = g.integers(256, size=(M, h, w), dtype=np.uint8)
    expected = reference.resize_area(torch.from_numpy(frames), h2, w2).numpy()
    numbers = {"M": M, "h": h, "w": w, "h2": h2, "w2": w2}
    call = Call(setting.op, dtype, {"frames": frames}, {}, numbers, byte_outputs={"out": (M, h2, w2)})
    return Case(call, {"out": expected})


def starts_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    (T, N, stack, B), (lasts, holes) = setting.sizes, setting.options
    masks = {"is_first": g.random((T, N)) < 0.1}
    if lasts:
        masks["is_last"] = np.roll(masks["is_first"], -1, 0)
    if holes:
        masks["valid"] = g.random((T, N)) < 0.9
    uniform = g.random(B).astype(dtype)
    given = [torch.from_numpy(masks[k]) if k in masks else None for k in ("is_first", "is_last", "valid")]
    beginning = T > 1
    found = reference.sample_starts(torch.from_numpy(uniform), given[0], given[1], given[2], stack, beginning)  # type: ignore[arg-type]
    expected = {name: x.numpy() for name, x in zip(("row", "env", "first"), found, strict=True)}
    arrays = {"uniform": uniform, **{name: x.astype(np.uint8) for name, x in masks.items()}}
    numbers = {"T": T, "N": N, "stack": stack, "B": B, "beginning": beginning}
    call = Call(setting.op, dtype, arrays, {}, numbers, index_outputs=dict.fromkeys(expected, (B,)))
    return Case(call, expected)


BUILDERS: dict[str, Callable[[Setting, str, np.random.Generator], Case]] = {
    "pixel_cross_entropy": cross_entropy_case,
    "pixel_cross_entropy_backward": cross_entropy_case,
    "stack_frames": stack_case,
    "stack_frames_bytes": stack_case,
    "resize_area": resize_case,
    "sample_starts": starts_case,
}


@functools.cache
def build_case(setting: Setting, dtype: str) -> Case:
    """Return a call and what it must give."""
    g = np.random.default_rng(zlib.crc32(str(setting).encode()))
    return BUILDERS[setting.op](setting, dtype, g)


@functools.cache
def results(mode: str, settings: tuple[Setting, ...]) -> dict[tuple[Setting, str, str], Result]:
    """Run every case in one process; the tests then look at their own."""
    keys = [(s, dtype, order) for s in settings for dtype in DTYPES_OF[mode] for order in SCHEDULES_OF[mode]]
    calls = [(build_case(s, dtype).call, SCHEDULES[order]) for s, dtype, order in keys]
    return dict(zip(keys, launch_all(calls, mode), strict=True))


def check(setting: Setting, mode: str, settings: list[Setting]) -> None:
    reason = why_unavailable(mode)
    if reason:
        pytest.skip(reason)
    found = results(mode, tuple(settings))
    for dtype in DTYPES_OF[mode]:
        expected = build_case(setting, dtype).expected
        for order in SCHEDULES_OF[mode]:
            outputs = found[setting, dtype, order].require_clean()
            assert outputs.keys() == expected.keys()
            for name, want in expected.items():
                compare(outputs[name], want, dtype, f"{mode} {dtype} {order} {name}")


def compare(got: np.ndarray, want: np.ndarray, dtype: str, what: str) -> None:
    tolerance: Any = TOLERANCE[dtype] if want.dtype == np.float64 else 0
    np.testing.assert_allclose(got, want, tolerance, tolerance, err_msg=what)


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kernels_agree_with_the_reference(setting: Setting, mode: str) -> None:
    check(setting, mode, SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["plain", "asan"])
@pytest.mark.parametrize("setting", LARGE, ids=str)
def test_large_kernels_agree_with_the_reference(setting: Setting, mode: str) -> None:
    check(setting, mode, LARGE)


def test_what_is_no_class_and_no_row_counts_as_the_nearest() -> None:
    """No error can be raised on a device that nobody waits for; no address may be left, either."""
    reason = why_unavailable("asan")
    if reason:
        pytest.skip(reason)
    losses = build_case(Setting("pixel_cross_entropy", (9, 5), (0.1,)), "float32").call
    gradients = build_case(Setting("pixel_cross_entropy_backward", (9, 5), (0.1,)), "float32").call
    stacks = build_case(Setting("stack_frames", (7, 3, 2, 35, 2, 1), (False, False)), "float32").call
    target = np.full(9, 200, np.uint8)
    last = np.full(9, 4, np.uint8)
    pairs = [
        ({"target": target}, {"target": last}, losses),
        ({"target": target}, {"target": last}, gradients),
        (
            {"index": np.array([-5, 99, 3]), "first": np.array([-9, 99, 0])},
            {"index": np.array([0, 6, 3]), "first": np.array([0, 6, 0])},
            stacks,
        ),
    ]
    for wrong, nearest, call in pairs:
        runs = [
            (
                Call(call.op, call.dtype, {**call.arrays, **change}, call.outputs, call.numbers),
                SCHEDULES["forward"],
            )
            for change in (wrong, nearest)
        ]
        got, want = (result.require_clean() for result in launch_all(runs, "asan"))
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=call.op)


def test_where_there_is_nothing_to_draw_the_places_are_minus_one() -> None:
    case = build_case(Setting("sample_starts", (40, 3, 4, 3), (True, False)), "float32").call
    nowhere = {**case.arrays, "is_first": np.ones((40, 3), np.uint8), "is_last": np.ones((40, 3), np.uint8)}
    call = Call(case.op, case.dtype, nowhere, {}, case.numbers, index_outputs=case.index_outputs)
    outputs = launch_all([(call, SCHEDULES["forward"])], "plain")[0].require_clean()
    assert all((x == -1).all() for x in outputs.values())
