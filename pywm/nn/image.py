"""DreamerV3's convolutional encoder and decoder of uint8 images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pywm.nn.layer import NormMLP, Parts, trunc_normal_
from pywm.ops import _check, _native, norm_act
from pywm.ops._operands import operand
from pywm.ops.rssm_params import OPERANDS

__all__ = ["ImageDecoder", "ImageEncoder"]

# Channels of the levels, from the finest on, in multiples of the depth. Each level halves both sides.
MULTIPLES = (2, 3, 4, 4)
KERNEL = 5
STRIDE = 2 ** len(MULTIPLES)


def _padded(shape: Sequence[int], name: str) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{name}: shape is {tuple(shape)}, but [C, height, width] was expected")
    channels, height, width = shape
    return channels, math.ceil(height / STRIDE) * STRIDE, math.ceil(width / STRIDE) * STRIDE


def _conv(inputs: int, outputs: int, norm: str, generator: torch.Generator | None) -> Parts:
    parts = Parts((outputs, inputs, KERNEL, KERNEL), outputs, True, norm)
    trunc_normal_(parts.weight, inputs * KERNEL * KERNEL, 1.0, generator)
    return parts


def _convolve(x: Tensor, parts: Parts, operands: str) -> Tensor:
    """Convolve ``[B, C, h, w]``, whose channels lie side by side in memory, as do the result's."""
    weight = parts.weight.contiguous(memory_format=torch.channels_last)
    return _conv2d(x, weight, parts.bias, KERNEL // 2, operands)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, operands: str) -> Tensor:
    if operands == "float32":
        return functional.conv2d(x, weight, bias, padding=padding)
    x, weight = operand(x, operands), operand(weight, operands)
    y = functional.conv2d(x, weight, padding=padding).float()
    return y if bias is None else y + bias[:, None, None]


def _norm_act(x: Tensor, parts: Parts, eps: float) -> Tensor:
    """Normalise over the channels of every pixel."""
    assert parts.scale is not None
    return norm_act(x.permute(0, 2, 3, 1).contiguous(), parts.scale, eps=eps).permute(0, 3, 1, 2)


def _doubling_taps() -> Tensor:
    """Return ``[5·5, 2·2·3·3]``: which weights of a 5 x 5 kernel meet on one pixel of a picture that is doubled before.

    Output 2i + p sees the inputs 2i + p + k - 2 (k = 0 ... 4) of the doubled picture, which are the pixels
    i + ⌊(p + k) / 2⌋ - 1 of the picture: three, whose weights are sums of one or two of the five.
    """
    taps = torch.zeros(KERNEL, 2, 3)
    for k in range(KERNEL):
        for p in range(2):
            taps[k, p, (p + k) // 2] = 1
    return torch.einsum("kpa,lqb->klpqab", taps, taps).reshape(KERNEL * KERNEL, -1)


def _convolve_doubled(x: Tensor, parts: Parts, taps: Tensor, operands: str) -> Tensor:
    """Double ``[B, C, h, w]`` by repetition and convolve it, which gives ``[B, h, w, 2, 2, C']``.

    Nine sums of weights for each of the four outputs of a pixel do what 25 weights would do with the doubled picture: a
    third of the arithmetic, and the largest tensors are never made.
    """
    assert parts.bias is not None
    outputs, inputs = parts.weight.shape[:2]
    weight = (parts.weight.flatten(2) @ taps).view(outputs, inputs, 2, 2, 3, 3)
    weight = weight.permute(2, 3, 0, 4, 5, 1).reshape(4 * outputs, 3, 3, inputs).permute(0, 3, 1, 2)
    y = _conv2d(x, weight, parts.bias.repeat(4), 1, operands)
    return y.permute(0, 2, 3, 1).unflatten(3, (2, 2, outputs))


def _interleave(x: Tensor) -> Tensor:
    """Make pictures ``[B, C, 2·h, 2·w]`` of ``[B, h, w, 2, 2, C]``."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class ImageEncoder(nn.Module):
    """Four levels of 5 x 5 convolution, 2 x 2 maximum, RMSNorm over channels and SiLU.

    Images whose sides are no multiples of 16 are padded with grey at the right and at the bottom.

    Args:
        shape: ``[C, height, width]``.
        depth: channels of a level, of which it has a multiple.
        eps: of the norms.
        operands: of convolutions and matrix products, as in :class:`pywm.models.RSSMConfig`.
        generator: source of randomness of the initialisation.

    Attributes:
        size: width of the output.
        padded: height and width of what is convolved, multiples of 16.
    """

    def __init__(
        self,
        shape: Sequence[int],
        depth: int,
        *,
        eps: float = 1e-4,
        operands: str = "float32",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check.choice("ImageEncoder", "operands", operands, OPERANDS)
        self.operands = operands
        channels, height, width = _padded(shape, "ImageEncoder")
        self.eps = eps
        self.padded = (height, width)
        self._pad = (0, width - shape[2], 0, height - shape[1])
        self.convs = nn.ModuleList()
        for multiple in MULTIPLES:
            self.convs.append(_conv(channels, depth * multiple, "rms", generator))
            channels = depth * multiple
        self.size = channels * (height // STRIDE) * (width // STRIDE)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, C, height, width]`` to ``[B, size]``."""
        x = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
        x = x.copy_(images).mul_(1 / 255).sub_(0.5)
        if any(self._pad):
            x = functional.pad(x, self._pad).contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            assert isinstance(conv, Parts)
            x = _norm_act(functional.max_pool2d(_convolve(x, conv, self.operands), 2), conv, self.eps)
        return x.permute(0, 2, 3, 1).flatten(1)


class ImageDecoder(nn.Module):
    """From ``feat`` = [deter, stoch] to a picture: two ways to the coarsest level, then four doublings.

    The deterministic state goes there through a block-diagonal layer, blocks of the state making blocks of channels, the
    stochastic one through a perceptron. Each level doubles the sides by repetition and convolves 5 x 5; all but the last
    are followed by RMSNorm over channels and SiLU.

    Args:
        shape: ``[C, height, width]``.
        deter: D.
        stoch: width of the flat stochastic state.
        depth: channels of a level, of which it has a multiple.
        units: half the hidden width of the perceptron.
        blocks: G of the block-diagonal layer; it divides D and the channels of the coarsest level.
        eps: of the norms.
        operands: of convolutions and matrix products, as in :class:`pywm.models.RSSMConfig`.
        generator: source of randomness of the initialisation.
    """

    def __init__(
        self,
        shape: Sequence[int],
        deter: int,
        stoch: int,
        *,
        depth: int,
        units: int,
        blocks: int = 8,
        eps: float = 1e-4,
        operands: str = "float32",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check.choice("ImageDecoder", "operands", operands, OPERANDS)
        self.operands = operands
        channels, height, width = _padded(shape, "ImageDecoder")
        self.shape = tuple(shape)
        self.deter, self.eps, self.blocks = deter, eps, blocks
        coarsest = depth * MULTIPLES[-1]
        if deter % blocks or coarsest % blocks:
            raise ValueError(
                f"ImageDecoder: blocks is {blocks}, but a divisor of deter, {deter}, and of the coarsest level's "
                f"channels, {coarsest}, was expected"
            )
        self._coarse = (height // STRIDE, width // STRIDE, coarsest)
        outputs = math.prod(self._coarse)
        self.from_deter = Parts((blocks, outputs // blocks, deter // blocks), outputs, True, "none")
        trunc_normal_(self.from_deter.weight, deter, 1.0, generator)
        self.from_stoch = NormMLP(
            (stoch, 2 * units), outputs, eps=eps, operands=operands, generator=generator
        )
        self.scale = nn.Parameter(torch.ones(coarsest))
        self.convs = nn.ModuleList()
        inputs = coarsest
        for multiple in MULTIPLES[-2::-1]:
            self.convs.append(_conv(inputs, depth * multiple, "rms", generator))
            inputs = depth * multiple
        self.convs.append(_conv(inputs, channels, "none", generator))
        self.register_buffer("_taps", _doubling_taps(), persistent=False)

    def forward(self, feat: Tensor) -> Tensor:
        """Map ``[B, D + S·K]`` to ``[B, C, height, width]`` in (0, 1)."""
        h, w, channels = self._coarse
        deter, stoch = feat[:, : self.deter], feat[:, self.deter :]
        G, B = self.blocks, len(feat)
        deter = operand(deter, self.operands).unflatten(1, (G, -1)).transpose(0, 1)
        weight = operand(self.from_deter.weight, self.operands)
        blocks = torch.bmm(deter, weight.transpose(1, 2)).float()
        x = blocks.view(G, B, h, w, channels // G).permute(1, 2, 3, 0, 4).flatten(3)
        assert self.from_deter.bias is not None
        x = x + self.from_deter.bias.view(G, h, w, channels // G).permute(1, 2, 0, 3).flatten(2)
        x = norm_act(x + self.from_stoch(stoch).view(B, h, w, channels), self.scale, eps=self.eps)
        x = x.permute(0, 3, 1, 2)
        for conv in self.convs:
            assert isinstance(conv, Parts)
            x = self._level(x, conv)
        _, height, width = self.shape
        return x[:, :, :height, :width]

    def _level(self, x: Tensor, conv: Parts) -> Tensor:
        """Double the sides, convolve, and apply what follows."""
        if _native.is_disabled():  # the definition
            x = _convolve(functional.interpolate(x, scale_factor=2, mode="nearest"), conv, self.operands)
            return torch.sigmoid(x) if conv.scale is None else _norm_act(x, conv, self.eps)
        assert isinstance(self._taps, Tensor)
        x = _convolve_doubled(x, conv, self._taps, self.operands)
        x = torch.sigmoid(x) if conv.scale is None else norm_act(x.contiguous(), conv.scale, eps=self.eps)
        return _interleave(x)
