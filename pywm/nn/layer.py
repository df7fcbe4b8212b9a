"""A linear layer with the norm behind it, under the names of :class:`pywm.ops.rssm_params.Layer`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pywm.ops import _check, _native, _operands, norm_act, norm_mlp
from pywm.ops.rssm_params import OPERANDS, Layer

__all__ = ["NormMLP", "Parts", "trunc_normal_"]


def trunc_normal_(
    weight: Tensor, fan_in: int, scale: float = 1.0, generator: torch.Generator | None = None
) -> None:
    """Fill a weight with DreamerV3's initialisation: a normal cut off at two deviations, of variance 1 / ``fan_in``.

    Args:
        weight: written in place.
        fan_in: inputs of the whole layer.
        scale: factor on top.
        generator: source of randomness; torch's global one by default.
    """
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0, generator=generator)
        weight.mul_(1.1368 * scale / math.sqrt(fan_in))  # 1.1368 makes up for what was cut off


# A named tuple's own constructor takes as long again as the tuple.
_new = tuple.__new__


class Parts(nn.Module):
    """The parameters of one layer.

    Args:
        shape: of the weight, ``[out, in]`` or ``[G, out/G, in/G]``.
        out: outputs.
        bias: whether there is one.
        norm: behind the layer: ``"none"``, ``"rms"`` (a scale) or ``"layer"`` (and a shift).
    """

    def __init__(self, shape: tuple[int, ...], out: int, bias: bool, norm: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.scale = nn.Parameter(torch.ones(out)) if norm != "none" else None
        self.shift = nn.Parameter(torch.zeros(out)) if norm == "layer" else None

    def layer(self) -> Layer:
        """Return the parameters as the ops take them."""
        # Not self.weight: a module's attributes are found by a search that takes longer than a small network's arithmetic.
        of = self._parameters
        return _new(Layer, (of["weight"], of.get("bias"), of.get("scale"), of.get("shift")))


class NormMLP(nn.Module):
    """DreamerV3's perceptron: linear layers, each with RMSNorm and SiLU behind it, and perhaps a linear output.

    Args:
        sizes: width of the input, then of the hidden layers.
        out: outputs, or None to end with the last hidden layer.
        out_scale: factor on the output's initial weights; 0 begins with zeros.
        eps: of the norms.
        operands: of the matrix products, as in :class:`pywm.models.RSSMConfig`.
        generator: source of randomness of the initialisation.

    Attributes:
        size: width of the output.

    Source:
        Hafner et al. (2025), "Mastering diverse control tasks through world models", and its code.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        out: int | None = None,
        *,
        out_scale: float = 1.0,
        eps: float = 1e-4,
        operands: str = "float32",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check.choice("NormMLP", "operands", operands, OPERANDS)
        self.operands = operands
        if not sizes or min(sizes) < 1 or (len(sizes) < 2 and out is None):
            raise ValueError(
                f"NormMLP: sizes is {tuple(sizes)}, but the input's and a hidden width were expected"
            )
        self.eps = eps
        self.size = sizes[-1] if out is None else out
        self.hidden = nn.ModuleList()
        for inputs, outputs in itertools.pairwise(sizes):
            self.hidden.append(Parts((outputs, inputs), outputs, True, "rms"))
            trunc_normal_(self.hidden[-1].weight, inputs, 1.0, generator)  # type: ignore[arg-type]
        self.out = None
        if out is not None:
            self.out = Parts((out, sizes[-1]), out, True, "none")
            trunc_normal_(self.out.weight, sizes[-1], out_scale, generator)

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers as :class:`pywm.ops.Policy` takes them."""
        # Not self.hidden: see Parts.layer.
        hidden, out = self._modules["hidden"], self._modules.get("out")
        assert hidden is not None
        parts = [*hidden._modules.values()] if out is None else [*hidden._modules.values(), out]
        return tuple(part.layer() for part in parts)  # type: ignore[union-attr,operator]

    @property
    def gathers(self) -> bool:
        """Whether indices cost less than one-hot vectors: where there is a kernel that gathers."""
        weight = self.layers()[0].weight
        return self.operands == "float32" and weight.device.type == "cpu" and not _native.is_disabled()

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Map ``[..., sizes[0]]`` to ``[..., size]``; with ``index``, see :func:`pywm.ops.norm_mlp`."""
        weights, biases, scales, _ = zip(*self.layers(), strict=True)
        if self.operands == "float32":
            if scales[-1] is None:
                scales = scales[:-1]
            return norm_mlp(x, weights, biases, scales, index=index, eps=self.eps)
        if index is not None:
            raise ValueError(
                f"NormMLP: index came, but none was expected, as the operands are {self.operands}: only float32 gathers"
            )
        for weight, bias, scale in zip(weights, biases, scales, strict=True):
            x = _operands.linear(x, Layer(weight, bias), self.operands)
            if scale is not None:
                x = norm_act(x, scale, eps=self.eps)
        return x
