"""Convolutional encoders of uint8 images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pywm.nn.mlp import orthogonal_

__all__ = ["NatureCNN"]

# (channels, kernel, stride) of each layer. The first is Mnih et al. 2015; the second serves images too small for it.
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
SMALL = ((32, 3, 2), (64, 3, 2), (64, 3, 1))
MIN_NATURE_SIDE = 36
MIN_SMALL_SIDE = 15


class NatureCNN(nn.Module):
    """The network of "Human-level control" (Mnih et al. 2015): three convolutions and a linear layer, all ReLU.

    Images with a side under 36 pixels get 3 x 3 kernels instead of 8, 4 and 3.

    Args:
        shape: ``[C, height, width]`` of an image.
        width: size of the output.
        generator: source of randomness of the initialisation.
    """

    def __init__(
        self, shape: Sequence[int], *, width: int = 512, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < MIN_SMALL_SIDE:
            raise ValueError(
                f"NatureCNN: shape is {tuple(shape)}, but [C, height, width] with sides >= {MIN_SMALL_SIDE} was expected"
            )
        channels, height, length = shape
        self.convs = nn.ModuleList()
        for filters, kernel, stride in NATURE if min(height, length) >= MIN_NATURE_SIDE else SMALL:
            conv = nn.Conv2d(channels, filters, kernel, stride)
            orthogonal_(conv, math.sqrt(2), generator)
            self.convs.append(conv)
            channels = filters
            height, length = (height - kernel) // stride + 1, (length - kernel) // stride + 1
        self.linear = nn.Linear(channels * height * length, width)
        orthogonal_(self.linear, math.sqrt(2), generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map uint8 images ``[B, C, height, width]`` to features ``[B, width]``."""
        # oneDNN convolves, and above all differentiates, channels that lie side by side a quarter faster on CPUs.
        layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
        x = torch.empty(x.shape, device=x.device, memory_format=layout).copy_(x).div_(255)
        for conv in self.convs:
            x = torch.relu_(conv(x))
        return torch.relu_(self.linear(x.flatten(1)))
