"""Stacks of frames from a storage of bytes: the public function and the dispatcher's op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pywm.ops import _check, _native, reference
from pywm.ops._registry import define, is_traced, is_transformed, plain, plain_optional, served

MAX_STACK = 1024
"""Frames of a stack."""

_COMPILED = hasattr(_native._C, "stack_frames")


def stack_frames(
    frames: Tensor,
    index: Tensor,
    first: Tensor,
    *,
    stack: int = 4,
    stride: int = 1,
    scale: float = 1 / 255,
    standardize: bool = False,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Gather the frames that end at each index, oldest first, and turn bytes into what a network takes.

    .. math::
        r_{bj} = \max(i_b - (k - 1 - j)\, s,\; f_b), \quad j = 0 \dots k - 1, \qquad
        y_b = [\phi(x_{r_{b0}}), \dots, \phi(x_{r_{b,k-1}})] + \epsilon_b

    for stacks of k frames that lie s rows apart. A stack never reaches behind row f, where its episode begins: the first
    frame is repeated instead, as at a reset. φ is one of

    .. math::
        \phi(x) = \mathrm{scale} \cdot x, \qquad \phi(x) = \frac{x - \mu}{\max(\sigma, 1 / \sqrt{h w})}

    the second with ``standardize``, where μ and σ are those of one channel of one frame.

    A storage ``[rows, N, C, height, width]`` of N environments is ``frames.flatten(0, 1)`` with ``stride=N``: row t of
    environment n has index ``t * N + n``. Streams one behind the other, as ``pywm.data.Replay`` has them, take a stride of 1.

    Args:
        frames: ``[R, C, height, width]`` uint8.
        index: ``[B]`` int64, the newest row of each stack.
        first: ``[B]`` int64, the row where the episode of that row begins, a multiple of ``stride`` rows before it.
        stack: k, at least 1.
        stride: s, how many rows a frame is from the next one of its environment.
        scale: what bytes are multiplied by.
        standardize: make zero mean and unit variance instead of scaling.
        noise: ε, ``[B, stack * C, height, width]`` of ``dtype``, which is added; a constant.
        dtype: of the result: float32, float64, or uint8 for the bytes as they are.

    Returns:
        ``[B, stack * C, height, width]``. No gradient. On CUDA, where no error can be raised without waiting for the device,
        a row that is not there counts as the nearest one.

    Raises:
        TypeError: frames is not uint8, index or first not int64, or noise not of ``dtype``; dtype is another one.
        ValueError: shapes do not fit, devices differ, a number is out of range, noise or ``standardize`` comes with bytes,
            or (on the CPU) an index is not in the storage or does not lie a multiple of ``stride`` behind its first row.

    Source:
        Mnih et al. (2015) for stacks; Kaiser et al. (2020), and its code, for standardised frames.
    """
    _check_call(frames, index, first, noise, dtype)
    count = _check.integer("stack_frames", "stack", stack, 1, MAX_STACK)
    step = _check.integer("stack_frames", "stride", stride, 1, 2**62)
    factor = _check.number("stack_frames", "scale", scale, -float("inf"))
    standard = _check.flag("stack_frames", "standardize", standardize)
    if dtype == torch.uint8 and (standard or noise is not None):
        wrong = "standardize is True" if standard else "noise is a Tensor"
        raise ValueError(
            f"stack_frames: {wrong}, but nothing that changes bytes was expected, as dtype is uint8"
        )
    if noise is not None:
        noise = noise.detach()
        _check_noise(noise, frames, index, count, dtype)
    if not (is_compiling() or is_traced(frames, index, first)):
        _check_rows(len(frames), index, first, step)
    if not _COMPILED or is_transformed() or not _native.has_backend(frames.device.type):
        return reference.stack_frames(frames, index, first, noise, count, step, factor, standard, dtype)
    return torch.ops.pywm.stack_frames(  # type: ignore[no-any-return]
        frames, index, first, noise, count, step, factor, standard, dtype
    )


def _check_call(frames: object, index: object, first: object, noise: object, dtype: object) -> None:
    name = "stack_frames"
    storage = _check.tensor(name, "frames", frames, (torch.uint8,))
    if storage.ndim != 4 or min(storage.shape) < 1:
        raise ValueError(
            f"{name}: frames is {tuple(storage.shape)}, but [R, C, height, width] with no size 0 was expected"
        )
    rows = _check.tensor(name, "index", index, (torch.int64,))
    if rows.ndim != 1:
        raise ValueError(f"{name}: index is {tuple(rows.shape)}, but [B] was expected")
    begins = _check.tensor(name, "first", first, (torch.int64,))
    if begins.shape != rows.shape:
        raise ValueError(
            f"{name}: first is {tuple(begins.shape)}, but {tuple(rows.shape)} was expected, the shape of index"
        )
    for argument, x in (("index", rows), ("first", begins)):
        _check.same_device(name, argument, x, "frames", storage)
    if dtype not in (*_check.KERNEL_DTYPES, torch.uint8):
        raise TypeError(f"{name}: dtype is {dtype}, but float32, float64 or uint8 was expected")
    if noise is not None:
        _check.tensor(name, "noise", noise)


def _check_noise(noise: Tensor, frames: Tensor, index: Tensor, stack: int, dtype: torch.dtype) -> None:
    expected = (len(index), stack * frames.shape[1], *frames.shape[2:])
    if tuple(noise.shape) != expected:
        raise ValueError(
            f"stack_frames: noise is {tuple(noise.shape)}, but {expected} was expected, the shape of the result"
        )
    if noise.dtype != dtype:
        raise TypeError(f"stack_frames: noise is {noise.dtype}, but {dtype} was expected, the result's dtype")
    _check.same_device("stack_frames", "noise", noise, "frames", frames)


def _check_rows(R: int, index: Tensor, first: Tensor, stride: int) -> None:
    if index.device.type != "cpu":
        return  # nobody to wait for it
    wrong = (
        ("index", index, (index < 0) | (index >= R), f"a row of the storage, 0 <= index < {R},"),
        ("first", first, (first < 0) | (first > index), "a row of the storage that is not behind its index"),
        ("first", first, (index - first) % stride != 0, f"a multiple of {stride} rows before its index"),
    )
    for name, x, bad, expected in wrong:
        if bool(bad.any()):
            b = int(bad.nonzero()[0])
            at = f"{int(x[b])} in place {b}" + (
                f", whose index is {int(index[b])}" if name == "first" else ""
            )
            raise ValueError(f"stack_frames: {name} is {at}, but {expected} was expected")


def _shape(frames: Tensor, index: Tensor, stack: int) -> tuple[int, ...]:
    return len(index), stack * frames.shape[1], frames.shape[2], frames.shape[3]


def _fake(frames, index, first, noise, stack, stride, scale, standardize, dtype):  # type: ignore[no-untyped-def]
    return frames.new_empty((index.shape[0], stack * frames.shape[1], *frames.shape[2:]), dtype=dtype)


def _forward(frames, index, first, noise, stack, stride, scale, standardize, dtype):  # type: ignore[no-untyped-def]
    out = torch.empty(_shape(frames, index, stack), dtype=dtype, device=frames.device)
    kernel = _native.module().stack_frames
    arguments = plain(frames), plain(index), plain(first), plain_optional(noise)
    served(kernel(out, *arguments, stack, stride, scale, standardize), "stack_frames")
    return out


define(
    "stack_frames(Tensor frames, Tensor index, Tensor first, Tensor? noise, int stack, int stride, float scale, "
    "bool standardize, ScalarType dtype) -> Tensor",
    _fake,
    _forward,
)
