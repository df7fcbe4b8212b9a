"""The CUDA scans, executed by the emulator, against the float64 references."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulation import SCHEDULES, why_unavailable
from launching import Call, Result, launch_all
from torch import Tensor

from pywm.ops import reference

# Every way through scan.cuh: one thread a column (T <= 8, or very wide), chunks whose rows stay in registers, chunks that
# read twice, fewer columns than a warp, chunks without rows, widths that are no multiple of a block.
SHAPES = [(1, 1), (1, 200), (8, 3), (9, 33), (16, 40), (40, 1), (70, 5), (133, 3)]
LARGE_SHAPES = [(300, 70), (2100, 2), (11, 65600)]
TOLERANCE = {"float32": 3e-5, "float64": 1e-11}
DISCOUNT, LAM = 0.97, 0.9


@dataclass(frozen=True)
class Case:
    """A call and what it must give, by output."""

    call: Call
    expected: dict[str, np.ndarray]


def _random(op: str, shape: tuple[int, ...], variant: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{op} {shape} {variant}".encode()))


def _leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def _gradients(outputs: list[Tensor], incoming: list[np.ndarray], inputs: list[Tensor]) -> list[np.ndarray]:
    scalar = sum((o * torch.from_numpy(g)).nansum() for o, g in zip(outputs, incoming, strict=True))
    return [g.numpy() for g in torch.autograd.grad(scalar, inputs)]


def gae_case(shape: tuple[int, int], variant: str, dtype: str, backward: bool) -> Case:
    g = _random("gae", shape, variant)
    reward, value, next_value, grad_advantage, grad_returns = (g.standard_normal(shape) for _ in range(5))
    terminated, truncated = (g.random(shape) < 0.15 for _ in range(2))
    valid = g.random(shape) < 0.75 if variant == "masked" else None
    next_value[terminated] = np.nan
    if valid is not None:
        reward[~valid], next_value[~valid] = np.nan, np.nan
    if variant == "nan":  # in valid rows: reaches back to the end of an episode, no further
        reward[g.random(shape) < 0.05] = np.nan
    cast = [x.astype(dtype) for x in (reward, value, next_value)]
    leaves = [_leaf(x) for x in cast]
    masks = [torch.from_numpy(x) for x in (terminated, truncated)]
    mask = None if valid is None else torch.from_numpy(valid)
    outputs = reference.gae(*leaves, *masks, mask, DISCOUNT, LAM)
    flags = {"terminated": terminated.view(np.uint8), "truncated": truncated.view(np.uint8)}
    if valid is not None:
        flags["valid"] = valid.view(np.uint8)
    numbers = {"T": shape[0], "N": shape[1], "discount": DISCOUNT, "lam": LAM}
    if not backward:
        arrays = dict(zip(("reward", "value", "next_value"), cast, strict=True)) | flags
        expected = {"advantage": outputs[0].detach().numpy(), "returns": outputs[1].detach().numpy()}
        return Case(Call("gae", dtype, arrays, dict.fromkeys(expected, shape), numbers), expected)
    incoming = {"grad_advantage": grad_advantage.astype(dtype), "grad_returns": grad_returns.astype(dtype)}
    names = ["grad_reward", "grad_value", "grad_next_value"]
    grads = _gradients(list(outputs), [x.astype(np.float64) for x in incoming.values()], leaves)
    expected = dict(zip(names, grads, strict=True))
    return Case(Call("gae_backward", dtype, incoming | flags, dict.fromkeys(names, shape), numbers), expected)


def lambda_return_case(shape: tuple[int, int], variant: str, dtype: str, backward: bool) -> Case:
    g = _random("lambda_return", shape, variant)
    reward, next_value, grad = (g.standard_normal(shape) for _ in range(3))
    discount = 0.99 * (g.random(shape) > 0.1)
    lam_rows = g.random(shape).astype(dtype) if variant == "rows" else None
    valid = g.random(shape) < 0.75 if variant == "masked" else None
    if valid is not None:
        reward[~valid], next_value[~valid], discount[~valid] = np.nan, np.nan, np.nan
    if variant == "nan":
        next_value[g.random(shape) < 0.05] = np.nan
    cast = [x.astype(dtype) for x in (reward, discount, next_value)]
    leaves = [_leaf(x) for x in cast]
    lam = LAM if lam_rows is None else torch.from_numpy(lam_rows).double()
    mask = None if valid is None else torch.from_numpy(valid)
    returns = reference.lambda_return(*leaves, lam, mask)
    arrays = dict(zip(("reward", "discount", "next_value"), cast, strict=True))
    if lam_rows is not None:
        arrays["lam_rows"] = lam_rows
    if valid is not None:
        arrays["valid"] = valid.view(np.uint8)
    numbers = {"T": shape[0], "N": shape[1], "lam": LAM}
    forward = returns.detach().numpy()
    if not backward:
        return Case(Call("lambda_return", dtype, arrays, {"returns": shape}, numbers), {"returns": forward})
    del arrays["reward"]
    arrays |= {"grad": grad.astype(dtype), "returns": forward.astype(dtype)}
    names = ["grad_reward", "grad_discount", "grad_next_value"]
    grads = _gradients([returns], [arrays["grad"].astype(np.float64)], leaves)
    call = Call("lambda_return_backward", dtype, arrays, dict.fromkeys(names, shape), numbers)
    return Case(call, dict(zip(names, grads, strict=True)))


def discounted_return_case(shape: tuple[int, int], variant: str, dtype: str, backward: bool) -> Case:
    g = _random("discounted_return", shape, variant)
    reward, grad = (g.standard_normal(shape).astype(dtype) for _ in range(2))
    discount = (0.99 * (g.random(shape) > 0.1)).astype(dtype)
    bootstrap = g.standard_normal(shape[1]).astype(dtype)
    leaves = [_leaf(x) for x in (reward, discount, bootstrap)]
    returns = reference.discounted_return(*leaves)
    forward = returns.detach().numpy()
    arrays = {"reward": reward, "discount": discount, "bootstrap": bootstrap}
    numbers = {"T": shape[0], "N": shape[1]}
    if not backward:
        call = Call("discounted_return", dtype, arrays, {"returns": shape}, numbers)
        return Case(call, {"returns": forward})
    del arrays["reward"]
    arrays |= {"grad": grad, "returns": forward.astype(dtype)}
    outputs = {"grad_reward": shape, "grad_discount": shape, "grad_bootstrap": (shape[1],)}
    grads = _gradients([returns], [grad.astype(np.float64)], leaves)
    call = Call("discounted_return_backward", dtype, arrays, outputs, numbers)
    return Case(call, dict(zip(outputs, grads, strict=True)))


BUILDERS: dict[str, tuple[Callable[..., Case], tuple[str, ...]]] = {
    "gae": (gae_case, ("plain", "masked", "nan")),
    "lambda_return": (lambda_return_case, ("plain", "masked", "rows", "nan")),
    "discounted_return": (discounted_return_case, ("plain",)),
}


@functools.cache
def cases(op: str, shape: tuple[int, int]) -> dict[str, Case]:
    """Return every variant of an op at a shape, forward and backward, by a name."""
    builder, variants = BUILDERS[op]
    result = {}
    for variant in variants:
        for dtype in TOLERANCE:
            for backward in (False, True):
                if variant == "nan" and backward:
                    continue  # the gradients do not depend on the values, or are NaN where those are
                direction = "backward" if backward else "forward"
                result[f"{variant}-{dtype}-{direction}"] = builder(shape, variant, dtype, backward)
    return result


# Race detection does not depend on the order of the threads, and is slow.
SCHEDULES_OF = {"plain": tuple(SCHEDULES), "asan": ("random",), "tsan": ("random",)}


@functools.cache
def results(
    mode: str, shapes: tuple[tuple[int, int], ...]
) -> dict[tuple[str, tuple[int, int], str, str], Result]:
    """Run every case in one process; the tests then look at their own."""
    keys, calls = [], []
    for op in BUILDERS:
        for shape in shapes:
            for name, case in cases(op, shape).items():
                for schedule in SCHEDULES_OF[mode]:
                    keys.append((op, shape, name, schedule))
                    calls.append((case.call, SCHEDULES[schedule]))
    return dict(zip(keys, launch_all(calls, mode), strict=True))


def check(op: str, shape: tuple[int, int], mode: str, shapes: list[tuple[int, int]]) -> None:
    reason = why_unavailable(mode)
    if reason:
        pytest.skip(reason)
    found = results(mode, tuple(shapes))
    for name, case in cases(op, shape).items():
        for schedule in SCHEDULES_OF[mode]:
            outputs = found[op, shape, name, schedule].require_clean()
            for output, expected in case.expected.items():
                tolerance = TOLERANCE[case.call.dtype]
                message = f"{name} {schedule} {output}"
                np.testing.assert_allclose(outputs[output], expected, tolerance, tolerance, err_msg=message)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("op", BUILDERS)
def test_scan_agrees_with_the_reference(op: str, mode: str, shape: tuple[int, int]) -> None:
    check(op, shape, mode, SHAPES)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["plain", "asan"])
@pytest.mark.parametrize("op", BUILDERS)
def test_large_scan_agrees_with_the_reference(op: str, mode: str, shape: tuple[int, int]) -> None:
    check(op, shape, mode, LARGE_SHAPES)


@pytest.mark.parametrize("op", BUILDERS)
def test_gradients_that_nobody_wants_are_not_written(op: str) -> None:
    """Each output alone equals what it is among the others, and null pointers are not followed."""
    case = cases(op, (9, 33))["plain-float32-backward"]
    calls = []
    for output in case.expected:
        alone = {output: case.call.outputs[output]}
        calls.append(
            (
                Call(case.call.op, case.call.dtype, case.call.arrays, alone, case.call.numbers),
                SCHEDULES["forward"],
            )
        )
    tolerance = TOLERANCE["float32"]
    for output, result in zip(case.expected, launch_all(calls, "plain"), strict=True):
        got = result.require_clean()
        np.testing.assert_allclose(got[output], case.expected[output], tolerance, tolerance)


@pytest.mark.parametrize("missing", ["grad_advantage", "grad_returns"])
def test_a_missing_incoming_gradient_is_zero(missing: str) -> None:
    case = cases("gae", (9, 33))["masked-float64-backward"]
    arrays = dict(case.call.arrays)
    arrays[missing] = np.zeros((9, 33))
    without = {name: array for name, array in arrays.items() if name != missing}
    call = case.call
    calls = [Call(call.op, call.dtype, a, call.outputs, call.numbers) for a in (arrays, without)]
    zeros, absent = launch_all([(c, SCHEDULES["forward"]) for c in calls], "plain")
    for name, expected in zeros.require_clean().items():
        np.testing.assert_array_equal(absent.require_clean()[name], expected)
