"""The CUDA kernels over rows, executed by the emulator, against the float64 reference: values and every gradient."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from emulation import SCHEDULES, why_unavailable
from launching import Call, Result, launch_all

from pywm.ops import reference

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
ACTIVATIONS = ("none", "tanh", "silu", "elu", "relu")  # in the order of csrc/ops.h


@dataclass(frozen=True)
class Setting:
    """What distinguishes one test case.

    Attributes:
        op: name of the launcher.
        rows: M.
        width: D, or U for the linear layer.
        norm: of norm_act.
        act: of norm_act.
        shifted: whether norm_act has a shift, or the linear layer a bias.
        groups: of the one-hot vectors.
        classes: of each of them.
        turns: of norm_act: rows of scale and shift, taken in turn.
    """

    op: str
    rows: int
    width: int
    norm: str = "rms"
    act: str = "silu"
    shifted: bool = False
    groups: int = 0
    classes: int = 0
    turns: int = 1

    def __str__(self) -> str:
        """Return a short name for the test's id."""
        parts = [self.op, f"{self.rows}x{self.width}"]
        if self.op == "norm_act":
            parts += [self.norm, self.act, *(["shift"] if self.shifted else [])]
            parts += [f"{self.turns} turns"] if self.turns > 1 else []
        if self.groups:
            parts += [f"{self.groups}x{self.classes}", *(["bias"] if self.shifted else [])]
        return "-".join(parts)


# A warp and a block a row, one row, more rows than a block takes, widths that are no multiple of anything.
SHAPES = ((1, 1), (3, 40), (19, 5), (2, 300), (9, 260))
GATES = ("block_gru_gates", "layernorm_gru_gates", "gru_gates", "gru_block_reset", "gru_block_update")
SETTINGS = [
    *(Setting("norm_act", *shape) for shape in SHAPES),
    *(Setting("norm_act", *shape, norm="layer", act="elu", shifted=True) for shape in SHAPES[1:]),
    *(Setting("norm_act", 9, 33, norm="layer", act=act) for act in ACTIVATIONS),
    *(Setting("norm_act", 6, width, norm="layer", shifted=True, turns=3) for width in (5, 260)),
    Setting("norm_act", 4, 40, turns=2),
    *(Setting(op, *shape) for op in GATES for shape in SHAPES),
    Setting("one_hot_linear", 1, 1, groups=1, classes=1),
    Setting("one_hot_linear", 3, 40, groups=2, classes=5, shifted=True),
    Setting("one_hot_linear", 70, 33, groups=3, classes=32, shifted=True),
    Setting("one_hot_linear", 9, 7, groups=2, classes=40),
    Setting("one_hot_linear", 5, 3, groups=1, classes=300, shifted=True),
]
# More rows than all blocks hold at a time.
LARGE = [
    Setting("norm_act", 2200, 3, norm="layer", shifted=True),
    Setting("norm_act", 300, 257, norm="layer", shifted=True),
    Setting("layernorm_gru_gates", 2200, 2),
    Setting("layernorm_gru_gates", 270, 90),
]
# Sums over rows, and shared memory: where threads meet. Small, for ThreadSanitizer is slow.
RACES = [
    Setting("norm_act", 9, 3, norm="layer", shifted=True),
    Setting("norm_act", 2, 260, norm="layer", shifted=True),
    Setting("layernorm_gru_gates", 3, 2),
    Setting("layernorm_gru_gates", 2, 90),
    Setting("block_gru_gates", 3, 40),
    Setting("one_hot_linear", 3, 7, groups=2, classes=5, shifted=True),
]


@dataclass(frozen=True)
class Case:
    """Calls of a forward and a backward launcher, and what they must give, by output."""

    forward: Call
    backward: Call
    expected: dict[str, np.ndarray]


def _inputs(s: Setting, g: np.random.Generator) -> dict[str, np.ndarray]:
    M, D = s.rows, s.width
    if s.op == "norm_act":
        row = (s.turns, D) if s.turns > 1 else (D,)
        arrays = {"x": 0.3 + g.standard_normal((M, D)), "scale": g.standard_normal(row)}
        return arrays | ({"shift": g.standard_normal(row)} if s.shifted else {})
    if s.op == "one_hot_linear":
        arrays = {"weight": g.standard_normal((D, s.groups * s.classes))}
        arrays["index"] = g.integers(0, min(s.classes, 256), (M, s.groups)).astype(np.uint8)
        return arrays | ({"bias": g.standard_normal(D)} if s.shifted else {})
    factors = {
        "block_gru_gates": {"gates": 3},
        "layernorm_gru_gates": {"pre": 3},
        "gru_gates": {"input": 3, "hidden": 3},
        "gru_block_reset": {"gates": 2},
        "gru_block_update": {"gates": 2, "candidate": 1},
    }[s.op]
    arrays = {name: g.standard_normal((M, k * D)) for name, k in factors.items()}
    if s.op == "layernorm_gru_gates":
        arrays |= {"scale": g.standard_normal(3 * D), "shift": g.standard_normal(3 * D)}
    return arrays | {"deter": g.standard_normal((M, D))}


def _reference(s: Setting, tensors: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    if s.op == "norm_act":
        scale, shift = tensors["scale"], tensors.get("shift")
        if s.turns > 1:
            y = [
                reference.norm_act(
                    tensors["x"][i :: s.turns],
                    scale[i],
                    None if shift is None else shift[i],
                    s.norm,
                    s.act,
                    eps,
                )
                for i in range(s.turns)
            ]
            return torch.stack(y, 1).flatten(0, 1)
        return reference.norm_act(tensors["x"], scale, shift, s.norm, s.act, eps)
    if s.op == "one_hot_linear":
        return reference.one_hot_linear(tensors["index"], tensors["weight"], tensors.get("bias"))
    options: dict[str, Any] = {"block_gru_gates": {"blocks": 1}, "layernorm_gru_gates": {"eps": eps}}.get(
        s.op, {}
    )
    return getattr(reference, s.op)(**tensors, **options)  # type: ignore[no-any-return]


@functools.cache
def build_case(s: Setting, dtype: str) -> Case:
    g = np.random.default_rng(zlib.crc32(str(s).encode()))
    arrays = {k: x if x.dtype == np.uint8 else x.astype(dtype) for k, x in _inputs(s, g).items()}
    grad = g.standard_normal((s.rows, s.width)).astype(dtype)
    eps = 0.25  # exact in both dtypes, and large enough for rows of one number
    tensors = {
        k: torch.from_numpy(x) if x.dtype == np.uint8 else torch.from_numpy(x).double().requires_grad_()
        for k, x in arrays.items()
    }
    y = _reference(s, tensors, eps)
    leaves = {k: x for k, x in tensors.items() if x.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.from_numpy(grad).double())
    expected = {"y": y.detach().numpy()}
    expected |= {
        f"grad_{k}": x.numpy()
        for k, x in zip(leaves, gradients, strict=True)
        if s.turns == 1 or k == "x"  # the sums are of one layer
    }
    numbers: dict[str, Any] = {"M": s.rows, "D": s.width}
    columns = None
    if s.op == "one_hot_linear":
        numbers = {"M": s.rows, "U": s.width, "groups": s.groups, "classes": s.classes}
    if s.op == "norm_act":
        numbers |= {"eps": eps, "activation": ACTIVATIONS.index(s.act), "layer": s.norm == "layer"}
        numbers |= {"turns": s.turns}
        columns = s.width if s.turns == 1 else None
    if s.op == "layernorm_gru_gates":
        numbers |= {"eps": eps}
        columns = 3 * s.width
    forward = Call(s.op, dtype, arrays, {"y": expected["y"].shape}, numbers)
    wanted = {name: x.shape for name, x in expected.items() if name != "y"}
    kept = {k: x for k, x in arrays.items() if s.op != "one_hot_linear" or k == "index"}
    backward = Call(
        f"{s.op}_backward", dtype, {"grad": grad, **kept}, wanted, numbers, partial_columns=columns
    )
    return Case(forward, backward, expected)


SCHEDULES_OF = {"plain": ("forward", "reverse", "random-3"), "asan": ("random",), "tsan": ("random",)}
DTYPES_OF = {"plain": tuple(TOLERANCE), "asan": tuple(TOLERANCE), "tsan": ("float32",)}


@functools.cache
def results(
    mode: str, settings: tuple[Setting, ...]
) -> dict[tuple[Setting, str, str], tuple[Result, Result]]:
    """Run every case in one process; the tests then look at their own."""
    keys = [(s, dtype, order) for s in settings for dtype in DTYPES_OF[mode] for order in SCHEDULES_OF[mode]]
    calls = []
    for s, dtype, order in keys:
        case = build_case(s, dtype)
        calls += [(case.forward, SCHEDULES[order]), (case.backward, SCHEDULES[order])]
    found = launch_all(calls, mode)
    return dict(zip(keys, zip(found[::2], found[1::2], strict=True), strict=True))


def compare(got: dict[str, np.ndarray], case: Case, message: str) -> None:
    tolerance = TOLERANCE[case.forward.dtype]
    for name, array in got.items():
        expected = case.expected[name]
        scale = max(1.0, float(np.abs(expected).max()))  # sums over many rows, some of which cancel
        np.testing.assert_allclose(
            array / scale, expected / scale, tolerance, tolerance, err_msg=f"{message} {name}"
        )


def check(setting: Setting, mode: str, settings: list[Setting]) -> None:
    reason = why_unavailable(mode)
    if reason:
        pytest.skip(reason)
    found = results(mode, tuple(settings))
    for dtype in DTYPES_OF[mode]:
        outputs = []
        for order in SCHEDULES_OF[mode]:
            forward, backward = found[setting, dtype, order]
            outputs.append(forward.require_clean() | backward.require_clean())
        assert outputs[0].keys() == build_case(setting, dtype).expected.keys()
        compare(outputs[0], build_case(setting, dtype), f"{mode} {dtype}")
        for other in outputs[1:]:
            for name, array in outputs[0].items():
                np.testing.assert_array_equal(other[name], array, err_msg=f"{name} depends on the schedule")


@pytest.mark.parametrize("mode", ["plain", "asan"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kernels_agree_with_the_reference(setting: Setting, mode: str) -> None:
    check(setting, mode, SETTINGS)


@pytest.mark.parametrize("setting", RACES, ids=str)
def test_threads_do_not_race(setting: Setting) -> None:
    check(setting, "tsan", RACES)


@pytest.mark.parametrize("setting", LARGE, ids=str)
def test_more_rows_than_blocks(setting: Setting) -> None:
    check(setting, "plain", LARGE)


@pytest.mark.parametrize(
    "setting",
    [Setting("norm_act", 9, 33, norm="layer", shifted=True), *(Setting(op, 3, 40) for op in GATES)],
    ids=str,
)
def test_gradients_that_nobody_wants_are_not_written(setting: Setting) -> None:
    case = build_case(setting, "float32")
    calls = []
    for name, shape in case.backward.outputs.items():
        sums = name in ("grad_scale", "grad_shift")
        columns = case.backward.partial_columns if sums else None
        call = replace(case.backward, outputs={name: shape}, partial_columns=columns)
        calls.append((call, SCHEDULES["forward"]))
    for result in launch_all(calls, "plain"):
        compare(result.require_clean(), case, "alone")


def test_an_index_that_is_no_class_counts_as_the_last() -> None:
    """No error can be raised without waiting for the device; and nothing out of bounds is touched."""
    case = build_case(Setting("one_hot_linear", 3, 40, groups=2, classes=5, shifted=True), "float32")
    index = case.forward.arrays["index"].copy()
    index[1, 1] = 200
    clamped = np.minimum(index, 4)
    mode = "plain" if why_unavailable("asan") else "asan"
    calls = [
        (replace(call, arrays=call.arrays | {"index": chosen}), SCHEDULES["forward"])
        for call in (case.forward, case.backward)
        for chosen in (index, clamped)
    ]
    got = [result.require_clean() for result in launch_all(calls, mode)]
    for wrong, right in (got[:2], got[2:]):
        for name, array in right.items():
            np.testing.assert_array_equal(wrong[name], array)
