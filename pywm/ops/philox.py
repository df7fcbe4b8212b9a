"""Random numbers by counting: the public functions and the dispatcher's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pywm.ops import _check, _native, reference
from pywm.ops._registry import define, served

_entry = _native.entry("philox")

_WORDS = 2**32


def philox_uniform(
    seed: int,
    offset: int,
    shape: tuple[int, int, int],
    *,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return uniform numbers in [0, 1) that depend on the seed and on their own place alone.

    Element ``(t, n, s)`` is made of word ``s % 4`` of Philox4x32-10 with the counter ``(n, offset + t, stream, s // 4)``
    and the seed as key, as ``(word >> 8) / 2**24``. So it does not depend on the shape, the device, the dtype or the
    number of threads: the step ``offset + t`` gives the same numbers, whichever call asks for it.

    Args:
        seed: in [0, 2⁶⁴).
        offset: which step the first row is; ``offset + T`` at most 2³².
        shape: ``(T, N, S)``: steps, rows of a batch (at most 2³²), numbers of each.
        stream: in [0, 2³²); streams of one seed are independent, one for each use.
        device: of the result; None is torch's default.
        dtype: float32 or float64, which hold the same numbers.

    Returns:
        ``[T, N, S]``. No gradient.

    Raises:
        TypeError: ``shape`` is not three ints, a number is no int, or dtype is another one.
        ValueError: a number is out of range.

    Source:
        Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".
    """
    return _philox("philox_uniform", seed, offset, shape, stream, device, dtype, False)


def philox_normal(
    seed: int,
    offset: int,
    shape: tuple[int, int, int],
    *,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Return standard normal numbers that depend on the seed and on their own place alone.

    Slots ``2i`` and ``2i + 1`` of a row are made of two uniform numbers, u and v, by

    .. math::
        \sqrt{-2 \ln (u + 2^{-24})} \cos 2\pi v, \qquad \sqrt{-2 \ln (u + 2^{-24})} \sin 2\pi v

    where u and v are what :func:`philox_uniform` gives for these slots. No number is beyond ±5.77. The words are the same
    on every backend; the normals agree to rounding.

    Args:
        seed: in [0, 2⁶⁴).
        offset: which step the first row is; ``offset + T`` at most 2³².
        shape: ``(T, N, S)``: steps, rows of a batch (at most 2³²), numbers of each.
        stream: in [0, 2³²); streams of one seed are independent, one for each use.
        device: of the result; None is torch's default.
        dtype: float32 or float64.

    Returns:
        ``[T, N, S]``. No gradient.

    Raises:
        TypeError: ``shape`` is not three ints, a number is no int, or dtype is another one.
        ValueError: a number is out of range.

    Source:
        Box and Muller (1958); Salmon et al. (2011).
    """
    return _philox("philox_normal", seed, offset, shape, stream, device, dtype, True)


def _philox(
    function: str,
    seed: object,
    offset: object,
    shape: object,
    stream: object,
    device: torch.device | str | None,
    dtype: torch.dtype,
    normal: bool,
) -> Tensor:
    key = _check.integer(function, "seed", seed, 0, 2**64 - 1)
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise TypeError(f"{function}: shape is {shape!r}, but (T, N, S) was expected")
    T, N, S = (_check.integer(function, "shape", n, 0, high) for n, high in zip(shape, _LARGEST, strict=True))
    start = _check.integer(function, "offset", offset, 0, _WORDS - T)
    lane = _check.integer(function, "stream", stream, 0, _WORDS - 1)
    if dtype not in _check.KERNEL_DTYPES:
        raise TypeError(f"{function}: dtype is {dtype}, but float32 or float64 was expected")
    key = key if key < 2**63 else key - 2**64  # as the dispatcher's int
    out = torch.empty((T, N, S), device=device, dtype=dtype)
    eager = not torch.compiler.is_compiling() and not _native.is_disabled()
    if eager and _entry(out, key, start, lane, normal, False) is not None:
        return out
    if not _native.supports(out):
        return reference.philox(out, key, start, lane, normal)
    torch.ops.pywm.philox_(out, key, start, lane, normal)
    return out


_LARGEST = _WORDS, _WORDS, 4 * _WORDS


def _fake(out, seed, offset, stream, normal):  # type: ignore[no-untyped-def]
    return None


def _fill(out, seed, offset, stream, normal):  # type: ignore[no-untyped-def]
    served(_entry(out, seed, offset, stream, normal, True), "philox_")


define("philox_(Tensor(a!) out, int seed, int offset, int stream, bool normal) -> ()", _fake, _fill)
