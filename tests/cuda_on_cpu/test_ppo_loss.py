"""The CUDA PPO loss, executed by the emulator, against the float64 reference: loss, statistics, every gradient."""

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
from torch import Tensor

from pywm.distributions import Categorical, DiagGaussian, MultiCategorical
from pywm.ops import reference

TOLERANCE = {"float32": 5e-5, "float64": 1e-10}
STATS = 5


@dataclass(frozen=True)
class Setting:
    """What distinguishes one test case.

    Attributes:
        rows: M.
        nvec: classes of each group, for the categorical family.
        parts: A, for the Gaussian.
        shared: whether log_std is [A].
        valid: share of valid rows; None: no mask. Invalid rows hold NaN.
        forbidden: some logits are -inf.
    """

    rows: int
    nvec: tuple[int, ...] = ()
    parts: int = 0
    shared: bool = False
    valid: float | None = None
    forbidden: bool = False
    value_clip: float | None = 0.2
    entropy_coef: float = 0.01
    normalize: bool = True

    def __str__(self) -> str:
        """Return a short name for the test's id."""
        if self.nvec:
            name = f"{self.rows}x{'+'.join(map(str, self.nvec))}"
        else:
            name = f"{self.rows}x{self.parts}{'s' if self.shared else ''}"
        flags = {
            f"valid{self.valid}": self.valid is not None,
            "forbidden": self.forbidden,
            "unclipped": self.value_clip is None,
            "raw": not self.normalize,
        }
        return "-".join([name, *(flag for flag, is_set in flags.items() if is_set)])


# Rows by 1, 8 and 32 lanes; one row, one block, several; several partial moments; masks that leave none, one, some.
CATEGORICAL = [
    Setting(1, nvec=(2,)),
    Setting(2, nvec=(1,)),
    Setting(300, nvec=(6,)),
    Setting(300, nvec=(6,), valid=0.7),
    Setting(1100, nvec=(3,), valid=0.5, normalize=False, value_clip=None),
    Setting(20, nvec=(4,), valid=0.0),
    Setting(40, nvec=(4,), valid=0.03),
    Setting(33, nvec=(18,), forbidden=True),
    Setting(65, nvec=(18,), valid=0.6, value_clip=None),
    Setting(19, nvec=(70,), valid=0.8, forbidden=True),
    Setting(50, nvec=(3, 2, 4), valid=0.8),
    Setting(21, nvec=(9, 40), normalize=False),
    Setting(10, nvec=(2,) * 32),
]
GAUSSIAN = [
    Setting(1, parts=1, shared=True),
    Setting(1, parts=3),
    Setting(300, parts=3, shared=True),
    Setting(300, parts=3, shared=True, valid=0.7),
    Setting(70, parts=3, valid=0.7, normalize=False),
    Setting(20, parts=2, shared=True, valid=0.0),
    Setting(65, parts=17, shared=True, valid=0.6, value_clip=None),
    Setting(33, parts=17),
    Setting(19, parts=70, shared=True, valid=0.8),
    Setting(9, parts=70, valid=0.8),
]
# More rows than all blocks hold at a time, for each number of lanes.
LARGE = [
    Setting(8200, nvec=(66,), valid=0.9),
    Setting(8200, parts=66, shared=True, valid=0.9),
    Setting(33000, nvec=(9, 2), valid=0.9),
    Setting(33000, parts=9, shared=True),
    Setting(262200, nvec=(2,)),
    Setting(262200, parts=1, shared=True, valid=0.9),
]
SETTINGS = [*CATEGORICAL, *GAUSSIAN]


@dataclass(frozen=True)
class Case:
    """A call and what it must give, by output."""

    call: Call
    expected: dict[str, np.ndarray]


def _leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


@functools.cache
def build_case(setting: Setting, dtype: str) -> Case:
    g = np.random.default_rng(zlib.crc32(str(setting).encode()))
    M = setting.rows
    common = {name: g.standard_normal(M) for name in ("advantage", "value", "returns", "old_value")}
    common["old_log_prob"] = np.full(M, -1.0) + 0.3 * g.standard_normal(M)
    valid = None if setting.valid is None else g.random(M) < setting.valid
    if setting.valid == 0.03:
        valid = np.arange(M) == 7
    action: np.ndarray
    if setting.nvec:
        width = sum(setting.nvec)
        parameters = {"logits": g.standard_normal((M, width))}
        action = np.stack([g.integers(0, n, M) for n in setting.nvec], -1)
        common["old_log_prob"] = -np.sum(np.log(setting.nvec)) + 0.3 * g.standard_normal(M)
        if setting.forbidden:
            forbidden = g.random((M, width)) < 0.2
            first = np.cumsum([0, *setting.nvec[:-1]])
            forbidden[np.arange(M)[:, None], action + first] = False
            parameters["logits"][forbidden] = -np.inf
    else:
        shape = (setting.parts,) if setting.shared else (M, setting.parts)
        parameters = {
            "mean": g.standard_normal((M, setting.parts)),
            "log_std": 0.3 * g.standard_normal(shape),
        }
        action = parameters["mean"] + g.standard_normal((M, setting.parts))
        common["old_log_prob"] = -1.4 * setting.parts + 0.3 * g.standard_normal(M)
    if valid is not None:
        for x in (*common.values(), *(p for p in parameters.values() if p.ndim == 2)):
            x[~valid] = np.nan
        action[~valid] = 10**6 if setting.nvec else np.nan

    common = {name: x.astype(dtype) for name, x in common.items()}
    parameters = {name: x.astype(dtype) for name, x in parameters.items()}
    if not setting.nvec:
        action = action.astype(dtype)
    # At a corner of the objective float32 and float64 may stand on different sides, where the gradients differ.
    looked_at = action if valid is None else np.where(valid[:, None], action, np.zeros((), action.dtype))
    dist, chosen = _distribution(
        setting, {name: torch.from_numpy(x).double() for name, x in parameters.items()}, looked_at
    )
    ratio = np.exp(dist.log_prob(chosen).numpy() - common["old_log_prob"])
    common["old_log_prob"][np.abs(np.abs(ratio - 1) - 0.2) < 1e-4] += 0.01
    change = common["value"] - common["old_value"]
    common["old_value"][np.abs(np.abs(change) - (setting.value_clip or 0)) < 1e-4] += 0.01
    arrays = {**common, **parameters, "action": action}
    if valid is not None:
        arrays["valid"] = valid.view(np.uint8)
    if setting.value_clip is None:
        del arrays["old_value"]
    numbers: dict[str, Any] = {
        "M": M,
        "clip": 0.2,
        "value_clip": -1.0 if setting.value_clip is None else setting.value_clip,
        "value_coef": 0.5,
        "entropy_coef": setting.entropy_coef,
        "normalize_advantage": setting.normalize,
    }
    outputs: dict[str, tuple[int, ...]] = {"loss": (1,), "stats": (STATS,), "grad_value": (M,)}
    outputs |= {f"grad_{name}": x.shape for name, x in parameters.items()}
    columns = 0
    if setting.nvec:
        op = "ppo_loss_categorical"
        arrays["nvec"] = np.array(setting.nvec, np.int64)
        numbers |= {"G": len(setting.nvec), "width": sum(setting.nvec)}
    else:
        op = "ppo_loss_gaussian"
        numbers |= {"A": setting.parts, "log_std_rows": 1 if setting.shared else M}
        columns = setting.parts if setting.shared else 0
    call = Call(op, dtype, arrays, outputs, numbers, workspace_columns=columns)
    return Case(call, _reference(setting, common, parameters, action, valid))


def _distribution(
    setting: Setting, parameters: dict[str, Tensor], action: np.ndarray
) -> tuple[Categorical | MultiCategorical | DiagGaussian, Tensor]:
    chosen = torch.from_numpy(action)
    if len(setting.nvec) == 1:
        return Categorical(parameters["logits"]), chosen.squeeze(-1)
    if setting.nvec:
        return MultiCategorical(parameters["logits"], setting.nvec), chosen
    return DiagGaussian(parameters["mean"], parameters["log_std"]), chosen.double()


def _reference(
    setting: Setting,
    common: dict[str, np.ndarray],
    parameters: dict[str, np.ndarray],
    action: np.ndarray,
    valid: np.ndarray | None,
) -> dict[str, np.ndarray]:
    leaves = {name: _leaf(x) for name, x in parameters.items()}
    value = _leaf(common["value"])
    dist, chosen = _distribution(setting, leaves, action)
    constants = {name: torch.from_numpy(x).double() for name, x in common.items()}
    loss, stats = reference.ppo_loss(
        dist,
        chosen,
        constants["old_log_prob"],
        constants["advantage"],
        value,
        constants["returns"],
        None if setting.value_clip is None else constants["old_value"],
        None if valid is None else torch.from_numpy(valid),
        clip=0.2,
        value_clip=setting.value_clip,
        value_coef=0.5,
        entropy_coef=setting.entropy_coef,
        normalize_advantage=setting.normalize,
    )
    gradients = torch.autograd.grad(loss, [value, *leaves.values()])
    names = ["grad_value", *(f"grad_{name}" for name in leaves)]
    expected = {"loss": loss.detach().reshape(1).numpy(), "stats": stats.numpy()}
    return expected | {name: x.numpy() for name, x in zip(names, gradients, strict=True)}


SCHEDULES_OF = {"plain": ("forward", "reverse", "random-3"), "asan": ("random",), "tsan": ("random",)}
DTYPES_OF = {"plain": tuple(TOLERANCE), "asan": tuple(TOLERANCE), "tsan": ("float32",)}


@functools.cache
def results(mode: str, settings: tuple[Setting, ...]) -> dict[tuple[Setting, str, str], Result]:
    """Run every case in one process; the tests then look at their own."""
    keys = [(s, dtype, order) for s in settings for dtype in DTYPES_OF[mode] for order in SCHEDULES_OF[mode]]
    calls = [(build_case(s, dtype).call, SCHEDULES[order]) for s, dtype, order in keys]
    return dict(zip(keys, launch_all(calls, mode), strict=True))


def compare(got: dict[str, np.ndarray], case: Case, message: str) -> None:
    tolerance = TOLERANCE[case.call.dtype]
    rows = case.call.numbers["M"]
    for name, expected in case.expected.items():
        # Gradients are means over rows: on their own scale, they are as exact as the rest.
        scale = rows if name.startswith("grad_") else 1
        np.testing.assert_allclose(
            got[name] * scale, expected * scale, tolerance, tolerance, err_msg=f"{message} {name}"
        )


def check(setting: Setting, mode: str, settings: list[Setting]) -> None:
    reason = why_unavailable(mode)
    if reason:
        pytest.skip(reason)
    found = results(mode, tuple(settings))
    for dtype in DTYPES_OF[mode]:
        outputs = [found[setting, dtype, order].require_clean() for order in SCHEDULES_OF[mode]]
        compare(outputs[0], build_case(setting, dtype), f"{mode} {dtype}")
        for other in outputs[1:]:
            for name, array in outputs[0].items():
                np.testing.assert_array_equal(other[name], array, err_msg=f"{name} depends on the schedule")


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_loss_agrees_with_the_reference(setting: Setting, mode: str) -> None:
    check(setting, mode, SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["plain", "asan"])
@pytest.mark.parametrize("setting", LARGE, ids=str)
def test_large_loss_agrees_with_the_reference(setting: Setting, mode: str) -> None:
    check(setting, mode, LARGE)


@pytest.mark.parametrize("setting", [Setting(33, nvec=(18,)), Setting(33, parts=3, shared=True)], ids=str)
def test_gradients_that_nobody_wants_are_not_written(setting: Setting) -> None:
    case = build_case(setting, "float32")
    wanted = [["loss", "stats"], ["loss", "stats", "grad_value"], ["loss", "stats", list(case.expected)[-1]]]
    calls = [
        (
            replace(case.call, outputs={name: case.call.outputs[name] for name in names}),
            SCHEDULES["forward"],
        )
        for names in wanted
    ]
    for names, result in zip(wanted, launch_all(calls, "plain"), strict=True):
        got = result.require_clean()
        compare(got, replace(case, expected={name: case.expected[name] for name in names}), str(names))


@pytest.mark.parametrize("action", [-1, 4])
def test_an_action_that_is_no_class_gives_nan(action: int) -> None:
    """No error can be raised without waiting for the device; and nothing out of bounds is read."""
    case = build_case(Setting(20, nvec=(4,)), "float32")
    actions = case.call.arrays["action"].copy()
    actions[3] = action
    call = replace(case.call, arrays=case.call.arrays | {"action": actions})
    reason = why_unavailable("asan")
    mode = "plain" if reason else "asan"
    got = launch_all([(call, SCHEDULES["forward"])], mode)[0].require_clean()
    assert np.isnan(got["loss"]).all()
