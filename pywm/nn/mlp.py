"""Multilayer perceptrons with PPO's initialisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pywm.ops import mlp

__all__ = ["ACTIVATIONS", "MLP", "orthogonal_"]

ACTIVATIONS = ("tanh", "silu", "elu", "relu")


def orthogonal_(
    layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2), generator: torch.Generator | None = None
) -> None:
    """Set a layer's weight to an orthogonal matrix times ``gain`` and its bias to zero, in place.

    Args:
        layer: a linear or convolutional layer.
        gain: √2 before a nonlinearity; PPO takes 0.01 for the policy's last layer and 1 for the value's.
        generator: source of randomness; torch's global one by default.
    """
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class MLP(nn.Module):
    """Linear layers with a nonlinearity between them; the last layer is linear.

    Args:
        sizes: widths from the input to the output; two numbers make a single linear layer.
        activation: ``"tanh"``, ``"silu"``, ``"elu"`` or ``"relu"``.
        out_gain: gain of the last layer's orthogonal initialisation; the hidden ones have √2.
        generator: source of randomness of the initialisation.

    Attributes:
        layers: the linear layers, first to last.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: str = "tanh",
        out_gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"MLP: sizes is {tuple(sizes)}, but at least two positive widths were expected")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"MLP: activation is {activation!r}, but one of {', '.join(ACTIVATIONS)} was expected"
            )
        self.activation = activation
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        for layer in layers:
            orthogonal_(layer, out_gain if layer is layers[-1] else math.sqrt(2), generator)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., sizes[0]]`` to ``[..., sizes[-1]]``, all layers in one call."""
        # Not layer.weight: a module's attributes are found by a search that takes longer than a small network's arithmetic.
        # Nor a list made once: functional_call and load_state_dict(assign=True) replace parameters.
        layers = [layer._parameters for layer in self._modules["layers"]._modules.values()]  # type: ignore[union-attr]
        weights, biases = [layer["weight"] for layer in layers], [layer["bias"] for layer in layers]
        return mlp(x, weights, biases, activation=self.activation)  # type: ignore[arg-type]
