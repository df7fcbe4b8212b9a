"""Smaller pictures by averages over areas: the public function and the dispatcher's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pywm.ops import _check, _native, reference
from pywm.ops._registry import define, is_transformed, plain, served

MAX_SIDE = 32767
"""Pixels of a side: sums over a whole picture stay exact."""

_COMPILED = hasattr(_native._C, "resize_area")


def resize_area(frames: Tensor, size: tuple[int, int]) -> Tensor:
    r"""Shrink pictures: a pixel becomes the average of the area that it covers.

    .. math::
        y_{ij} = \Bigl\lfloor \frac{1}{h w} \sum_{p, q} a_{ip}\, b_{jq}\, x_{pq} + \tfrac{1}{2} \Bigr\rfloor

    where a and b are how far pixel p of h covers pixel i of h', and q of w covers j of w', in units of 1/h' and 1/w'. All
    of it is done in integers: the result is the same to the bit on every backend, and within 1 of OpenCV's ``INTER_AREA``,
    which rounds its weights to float32, and halves to even.

    Args:
        frames: ``[..., height, width]`` uint8; channels are one of the leading dimensions.
        size: ``(h', w')``, each at least 1 and at most what it was; the ratio may be any.

    Returns:
        ``[..., h', w']`` uint8. No gradient.

    Raises:
        TypeError: frames is not uint8, or size is not two ints.
        ValueError: frames has fewer than two dimensions, or ``size`` is out of range.

    Source:
        OpenCV, ``cv2.resize(..., interpolation=cv2.INTER_AREA)``, which Atari's usual preprocessing calls.
    """
    name = "resize_area"
    x = _check.tensor(name, "frames", frames, (torch.uint8,))
    if x.ndim < 2 or not all(1 <= n <= MAX_SIDE for n in x.shape[-2:]):
        raise ValueError(
            f"{name}: frames is {tuple(x.shape)}, but [..., height, width] with sides of 1 to {MAX_SIDE} was expected"
        )
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"{name}: size is {size!r}, but (height, width) was expected")
    height, width = (
        _check.integer(name, f"size[{i}]", n, 1, most)
        for i, (n, most) in enumerate(zip(size, x.shape[-2:], strict=True))
    )
    if not _COMPILED or is_transformed() or not _native.has_backend(x.device.type):
        return reference.resize_area(x, height, width)
    return torch.ops.pywm.resize_area(x, height, width)  # type: ignore[no-any-return]


def _fake(frames, height, width):  # type: ignore[no-untyped-def]
    return frames.new_empty((*frames.shape[:-2], height, width))


def _forward(frames, height, width):  # type: ignore[no-untyped-def]
    out = torch.empty((*frames.shape[:-2], height, width), dtype=torch.uint8, device=frames.device)
    served(_native.module().resize_area(out, plain(frames)), "resize_area")
    return out


define("resize_area(Tensor frames, SymInt height, SymInt width) -> Tensor", _fake, _forward)
