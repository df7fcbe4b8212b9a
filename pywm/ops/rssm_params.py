"""The parameters and states of recurrent state-space models, as the functions in ``pywm.ops.rssm`` take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pywm.ops import _check

CELLS = ("block_gru", "layernorm_gru", "gru", "gru_block")
NORMS = ("none", "rms", "layer")
ACTIVATIONS = ("none", "silu", "elu", "relu")
STDS = ("softplus", "sigmoid2")
OPERANDS = ("float32", "bfloat16")
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class RSSMConfig:
    """The form and the sizes of a recurrent state-space model.

    Attributes:
        deter: D, width of the deterministic state.
        hidden: H, width of every hidden layer.
        stoch: S, number of stochastic variables.
        classes: K of each; 0 makes them Gaussian.
        embed: E, width of the encoder's output.
        action: A, width of an action.
        cell: ``"block_gru"`` (DreamerV3), ``"layernorm_gru"`` (V2, and V3 of 2023), ``"gru"`` (V1, torch's GRUCell) or
            ``"gru_block"`` (PlaNet, whose reset gate comes before the product).
        blocks: G, of the block-diagonal layers of ``block_gru``.
        norm: of the hidden layers: ``"rms"``, ``"layer"`` or ``"none"``.
        act: their nonlinearity: ``"silu"``, ``"elu"``, ``"relu"`` or ``"none"``.
        unimix: share of a uniform distribution in each categorical one.
        eps: of the norms of the hidden layers.
        cell_eps: of the LayerNorm inside ``layernorm_gru``.
        prior_layers: hidden layers of the prior's head; the posterior's has one.
        std: how a Gaussian's standard deviation comes about: ``"softplus"`` or ``"sigmoid2"``, 2·sigmoid(x / 2).
        min_std: what is added to it.
        operands: of matrix products in ``rssm_observe`` and ``imagine``, the policy's too: ``"float32"``, which leaves them
            in the model's dtype, or ``"bfloat16"``, which rounds weights and activations, and gradients on their way back.
            Everything else stays float32: tensors, the carried state, sums, norms, gates, softmax, losses. The model must
            be float32. What would not be faster so stays float32: CPUs without bfloat16 instructions
            (:func:`pywm.backend` says so), ``rssm_step``, and whatever PyTorch does step by step (see ``Imagined.path``; on
            CUDA also models that are observed so).

    Raises:
        TypeError: a field is of another type.
        ValueError: a field is out of range.
    """

    deter: int
    hidden: int
    stoch: int = 32
    classes: int = 32
    embed: int = 1024
    action: int = 1
    cell: str = "block_gru"
    blocks: int = 8
    norm: str = "rms"
    act: str = "silu"
    unimix: float = 0.01
    eps: float = 1e-4
    cell_eps: float = 1e-3
    prior_layers: int = 2
    std: str = "softplus"
    min_std: float = 0.1
    operands: str = "float32"

    def __post_init__(self) -> None:
        for name in ("deter", "hidden", "stoch", "embed", "action", "blocks", "prior_layers"):
            _check.integer("RSSMConfig", name, getattr(self, name), 1, _LARGEST)
        classes = _check.integer("RSSMConfig", "classes", self.classes, -_LARGEST, _LARGEST)
        if not 0 <= classes <= 256 or classes == 1:
            raise ValueError(f"RSSMConfig: classes is {classes}, but 0 (Gaussian) or 2 to 256 was expected")
        fields = {"cell": CELLS, "norm": NORMS, "act": ACTIVATIONS, "std": STDS, "operands": OPERANDS}
        for name, known in fields.items():
            _check.choice("RSSMConfig", name, getattr(self, name), known)
        for name in ("eps", "cell_eps"):
            _check.number("RSSMConfig", name, getattr(self, name), exclusive_low=True, finite=True)
        _check.number("RSSMConfig", "min_std", self.min_std, finite=True)
        if self.cell == "block_gru" and self.deter % self.blocks:
            raise ValueError(
                f"RSSMConfig: deter is {self.deter}, but a multiple of blocks, {self.blocks}, was expected"
            )
        _check.number("RSSMConfig", "unimix", self.unimix, high=1, finite=True)

    @property
    def is_gaussian(self) -> bool:
        """Whether the stochastic variables are Gaussian."""
        return self.classes == 0

    @property
    def stoch_width(self) -> int:
        """Numbers in a flat sample: S·K, or S."""
        return self.stoch if self.is_gaussian else self.stoch * self.classes

    @property
    def stats_width(self) -> int:
        """Numbers that a sample is drawn from: S·K logits, or S means and S raw standard deviations."""
        return 2 * self.stoch if self.is_gaussian else self.stoch * self.classes

    @property
    def feat(self) -> int:
        """Width of ``feat`` = [deter, stoch]."""
        return self.deter + self.stoch_width


class Layer(NamedTuple):
    """A linear layer and the norm behind it.

    Attributes:
        weight: ``[out, in]``, or ``[G, out/G, in/G]`` if block-diagonal.
        bias: ``[out]`` or None.
        scale: ``[out]``, of the norm, or None without one.
        shift: ``[out]``, of a LayerNorm, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class RSSMParams(NamedTuple):
    """All parameters of a recurrent state-space model; :meth:`pywm.models.RSSM.params` returns one.

    Attributes:
        config: form and sizes.
        deter_in: ``[H, D]``, block_gru only.
        stoch_in: ``[H, S·K]``; of the other cells ``[H, S·K + A]``, with the action's columns behind.
        action_in: ``[H, A]``, block_gru only.
        hidden: ``[G, D/G, D/G + 3H]``, block_gru only; the inputs of a block are its part of deter and the outputs of
            deter_in, stoch_in and action_in.
        gates: block_gru ``[G, 3D/G, D/G]``, in each block (reset, candidate, update); layernorm_gru ``[3D, H + D]`` with
            scale and shift, in that order too; gru ``[3D, H]``, (reset, keep, candidate); gru_block ``[2D, H + D]``,
            (reset, keep).
        candidate: gru ``[3D, D]``, the products with deter; gru_block ``[D, H + D]``; else None.
        prior: hidden layers ``[H, D]``, ``[H, H]``, ..., and the output ``[S·K or 2S, H]``.
        posterior: ``[H, D + E]`` and the output.
    """

    config: RSSMConfig
    deter_in: Layer | None
    stoch_in: Layer
    action_in: Layer | None
    hidden: Layer | None
    gates: Layer
    candidate: Layer | None
    prior: tuple[Layer, ...]
    posterior: tuple[Layer, Layer]

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """All layers with their names."""
        for name in ("deter_in", "stoch_in", "action_in", "hidden", "gates", "candidate"):
            layer = getattr(self, name)
            if layer is not None:
                yield name, layer
        for name in ("prior", "posterior"):
            for i, layer in enumerate(getattr(self, name)):
                yield f"{name}[{i}]", layer


class RSSMState(NamedTuple):
    """The state of a recurrent state-space model.

    Attributes:
        deter: ``[..., D]``.
        stoch: ``[..., S, K]`` floats, one-hot; or ``[..., S]`` uint8, the classes; Gaussian: ``[..., S]`` floats.
    """

    deter: Tensor
    stoch: Tensor


class Gaussian(NamedTuple):
    """A Gaussian latent's distribution.

    Attributes:
        mean: ``[..., S]``.
        std: ``[..., S]``.
    """

    mean: Tensor
    std: Tensor


POLICIES = ("categorical", "normal", "tanh_normal")


@dataclass(frozen=True)
class Policy:
    """A policy network as :func:`pywm.imagine` can run it in one call with the model.

    Hidden layers on ``feat`` = [deter, stoch], each with a norm and a nonlinearity, and an output.

    Attributes:
        layers: hidden layers ``[U, D + S·K]``, ``[U, U]``, ..., and the output ``[A, U]`` or ``[2A, U]``.
        kind: ``"categorical"``, one-hot classes; ``"normal"``, mean tanh(x) and std between ``min_std`` and ``max_std``
            (DreamerV3); ``"tanh_normal"``, tanh of a normal of mean 5·tanh(x / 5) and std softplus(y + log(e⁵ - 1)) +
            ``min_std`` (DreamerV1).
        classes: of each group of a categorical policy; empty: one group of all outputs.
        norm: of the hidden layers, as in :class:`RSSMConfig`.
        act: their nonlinearity.
        eps: of the norms.
        unimix: share of a uniform distribution in each categorical one.
        min_std: smallest standard deviation.
        max_std: largest, of ``"normal"``.

    Raises:
        TypeError: a field is of another type.
        ValueError: a field is out of range.
    """

    layers: tuple[Layer, ...]
    kind: str = "categorical"
    classes: tuple[int, ...] = ()
    norm: str = "rms"
    act: str = "silu"
    eps: float = 1e-4
    unimix: float = 0.01
    min_std: float = 0.1
    max_std: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("kind", POLICIES), ("norm", NORMS), ("act", ACTIVATIONS)):
            _check.choice("Policy", name, getattr(self, name), known)
        _check.number("Policy", "eps", self.eps, exclusive_low=True, finite=True)
        for name in ("min_std", "max_std"):
            _check.number("Policy", name, getattr(self, name), finite=True)
        if self.kind == "normal" and self.max_std < self.min_std:
            raise ValueError(
                f"Policy: max_std is {self.max_std}, but at least {self.min_std} was expected, as min_std is that"
            )
        _check.number("Policy", "unimix", self.unimix, high=1, finite=True)
        if not isinstance(self.layers, tuple | list):
            raise TypeError(
                f"Policy: layers is a {type(self.layers).__name__}, but a tuple of Layers was expected"
            )
        if len(self.layers) < 2:
            raise ValueError(
                f"Policy: layers is a tuple of {len(self.layers)}, but a hidden layer and an output were expected"
            )
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"Policy: layers[{i}] is a {type(layer).__name__}, but a Layer was expected")
        last = f"layers[{len(self.layers) - 1}].weight"
        weight = _check.tensor("Policy", last, self.layers[-1].weight)
        if weight.ndim != 2 or weight.shape[0] < 1:
            raise ValueError(
                f"Policy: {last} is {tuple(weight.shape)}, but [outputs, inputs] with outputs >= 1 was expected"
            )
        outputs = weight.shape[0]
        if self.kind != "categorical" and outputs % 2:
            raise ValueError(
                f"Policy: {last} is {tuple(weight.shape)}, but an even number of outputs was expected"
            )
        if not isinstance(self.classes, tuple | list):
            raise TypeError(
                f"Policy: classes is a {type(self.classes).__name__}, but a tuple of ints was expected"
            )
        if isinstance(self.classes, list):
            object.__setattr__(self, "classes", tuple(self.classes))  # to be hashed
        for i, classes in enumerate(self.classes):
            _check.integer("Policy", f"classes[{i}]", classes, 1, _LARGEST)
        if self.kind == "categorical" and sum(self.groups) != outputs:
            raise ValueError(
                f"Policy: classes is {self.classes}, but a sum of {outputs}, the outputs, was expected, as {last} is "
                f"{tuple(weight.shape)}"
            )

    @property
    def groups(self) -> tuple[int, ...]:
        """Classes of each group of a categorical policy."""
        if self.kind != "categorical":
            return ()
        return self.classes or (self.layers[-1].weight.shape[0],)

    @property
    def action(self) -> int:
        """A, width of an action."""
        outputs = self.layers[-1].weight.shape[0]
        return outputs if self.kind == "categorical" else outputs // 2

    @property
    def noise(self) -> int:
        """Random numbers of an action: a uniform a group, or a normal a dimension."""
        return len(self.groups) if self.kind == "categorical" else self.action
