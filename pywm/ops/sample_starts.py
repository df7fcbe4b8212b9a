"""Where imagined rollouts start in stored ones: the public function and the dispatcher's op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pywm.ops import _check, _native, reference
from pywm.ops._registry import define, is_traced, is_transformed, plain, plain_mask, served
from pywm.ops.stack_frames import MAX_STACK

_COMPILED = hasattr(_native._C, "sample_starts")


class Starts(NamedTuple):
    """Result of :func:`sample_starts`.

    Attributes:
        row: ``[B]`` int64, the newest row of each stack.
        env: ``[B]`` int64, its environment.
        first: ``[B]`` int64, the oldest row that the stack shows: ``row - stack + 1``, or ``row`` for a true beginning, whose
            frame a stack repeats. ``stack_frames(storage.flatten(0, 1), row * N + env, first * N + env, stride=N)``.
    """

    row: Tensor
    env: Tensor
    first: Tensor


def sample_starts(
    uniform: Tensor,
    is_first: Tensor,
    is_last: Tensor | None = None,
    *,
    stack: int = 4,
    valid: Tensor | None = None,
    beginning: bool = True,
) -> Starts:
    r"""Draw the places where rollouts in a world model start: stacks of real frames that cross no reset.

    Row t of environment n is a start if the ``stack`` rows that end there belong to one episode: they are rows of the
    storage, valid, none but the oldest is first, and the newest is not last. Each of the S starts, in the order of their
    rows, then of the environments, has equal probability:

    .. math::
        \text{start number } \lfloor u_b S \rfloor

    With ``beginning`` the first of the batch is drawn from the rows that are first instead (and valid, and not last): a true
    episode beginning, as a reset shows it. A pure function of its arguments, in integers and float64: the same on every
    backend.

    Args:
        uniform: u, ``[B]`` float32 or float64 in [0, 1). :func:`philox_uniform` makes them.
        is_first: ``[T, N]`` bool, the row begins an episode. What came before row 0 is not known: it is no beginning unless
            it says so.
        is_last: ``[T, N]`` bool, nothing follows the row, an episode's last observation; None where such rows are not stored.
        stack: rows of a stack, at least 1.
        valid: ``[T, N]`` bool, the row holds a frame; None if all do.
        beginning: whether the first of the batch is a true episode beginning.

    Returns:
        :class:`Starts`. No gradient. On CUDA, where no error can be raised without waiting for the device, -1 in all three
        where there is nothing to draw from.

    Raises:
        TypeError: uniform is not a dense float tensor, or a mask is not bool.
        ValueError: shapes do not fit, devices differ, ``stack`` is out of range, or (on the CPU) there is no start, or no
            true beginning.

    Source:
        Kaiser et al. (2020), "Model-based reinforcement learning for Atari", and its code, which draws a rollout first and
        then a row of it; here all rows are alike.
    """
    _check_call(uniform, is_first, is_last, valid)
    count = _check.integer("sample_starts", "stack", stack, 1, MAX_STACK)
    begins = _check.flag("sample_starts", "beginning", beginning)
    if not _COMPILED or is_transformed() or not _native.supports(uniform):
        drawn = reference.sample_starts(uniform, is_first, is_last, valid, count, begins)
    else:
        drawn = torch.ops.pywm.sample_starts(uniform, is_first, is_last, valid, count, begins)
    if not (is_compiling() or is_traced(uniform, is_first)):
        _check_found(drawn[0], count, begins)
    return Starts(*drawn)


def _check_call(uniform: object, is_first: object, is_last: object, valid: object) -> None:
    name = "sample_starts"
    u = _check.tensor(name, "uniform", uniform, _check.KERNEL_DTYPES)
    if u.ndim != 1:
        raise ValueError(f"{name}: uniform is {tuple(u.shape)}, but [B] was expected")
    first = _check.tensor(name, "is_first", is_first, (torch.bool,))
    if first.ndim != 2 or min(first.shape) < 1:
        raise ValueError(f"{name}: is_first is {tuple(first.shape)}, but [T, N] with T, N >= 1 was expected")
    _check.same_device(name, "is_first", first, "uniform", u)
    for argument, x in (("is_last", is_last), ("valid", valid)):
        if x is None:
            continue
        mask = _check.tensor(name, argument, x, (torch.bool,))
        if mask.shape != first.shape:
            raise ValueError(
                f"{name}: {argument} is {tuple(mask.shape)}, but {tuple(first.shape)} was expected, the shape of is_first"
            )
        _check.same_device(name, argument, mask, "uniform", u)


def _check_found(row: Tensor, stack: int, beginning: bool) -> None:
    if row.device.type != "cpu" or not bool((row < 0).any()):
        return
    if beginning and int(row[0]) < 0:
        raise ValueError(
            "sample_starts: is_first is nowhere true, but a row that begins an episode was expected"
        )
    raise ValueError(
        f"sample_starts: stack is {stack}, but a number of rows that some episode has before its last was expected"
    )


def _fake(uniform, is_first, is_last, valid, stack, beginning):  # type: ignore[no-untyped-def]
    return tuple(uniform.new_empty(uniform.shape, dtype=torch.int64) for _ in range(3))


def _forward(uniform, is_first, is_last, valid, stack, beginning):  # type: ignore[no-untyped-def]
    out = [torch.empty(uniform.shape, dtype=torch.int64, device=uniform.device) for _ in range(3)]
    masks = plain(is_first), plain_mask(is_last), plain_mask(valid)
    served(_native.module().sample_starts(*out, plain(uniform), *masks, stack, beginning), "sample_starts")
    return tuple(out)


define(
    "sample_starts(Tensor uniform, Tensor is_first, Tensor? is_last, Tensor? valid, int stack, bool beginning) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
    _forward,
)
