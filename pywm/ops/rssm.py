"""Recurrent state-space models: a step and a whole window as functions over tensors and a parameter structure.

A window is one call into compiled code. What does not depend on the recurrence is made of large products outside it: the
embeddings' and actions' parts before, the prior and all gradients of weights after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pywm.ops import _check, _native, reference_rssm
from pywm.ops._registry import define, differentiate, is_transformed, plain, plain_optional, served
from pywm.ops.categorical_sample import categorical_sample
from pywm.ops.gru_gates import (
    block_gru_gates,
    gru_block_reset,
    gru_block_update,
    gru_gates,
    layernorm_gru_gates,
)
from pywm.ops.norm_act import _backward as norm_act_backward
from pywm.ops.norm_act import norm_act
from pywm.ops.philox import philox_normal, philox_uniform
from pywm.ops.rssm_params import (
    CELLS,
    NORMS,
    Gaussian,
    Layer,
    RSSMConfig,
    RSSMParams,
    RSSMState,
)

__all__ = ["Observed", "RSSMStep", "rssm_observe", "rssm_step"]


class RSSMStep(NamedTuple):
    """Result of :func:`rssm_step`.

    Attributes:
        deter: ``[N, D]``.
        stoch: ``[N, S, K]`` one-hot floats with straight-through gradient; Gaussian: ``[N, S]``.
        index: ``[N, S]`` uint8, the classes; None for Gaussian latents.
        posterior: logits ``[N, S, K]`` or a :class:`Gaussian`, if an embedding was given.
        prior: likewise, if none was given.
    """

    deter: Tensor
    stoch: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    posterior: Tensor | Gaussian | None
    prior: Tensor | Gaussian | None

    @property
    def state(self) -> RSSMState:
        """What the next step takes."""
        return RSSMState(self.deter, self.stoch)


class Observed(NamedTuple):
    """Result of :func:`rssm_observe`; all time-major.

    Attributes:
        deter: ``[T, N, D]``.
        stoch: ``[T, N, S, K]`` one-hot floats with straight-through gradient; Gaussian: ``[T, N, S]``.
        index: ``[T, N, S]`` uint8, the classes; None for Gaussian latents.
        posterior: logits ``[T, N, S, K]``, of the unmixed distribution, or a :class:`Gaussian`.
        prior: likewise.
    """

    deter: Tensor
    stoch: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    posterior: Tensor | Gaussian
    prior: Tensor | Gaussian

    @property
    def state(self) -> RSSMState:
        """The state after the window, which the next window takes."""
        return RSSMState(self.deter[-1], self.stoch[-1])


def rssm_step(
    params: RSSMParams,
    state: RSSMState,
    prev_action: Tensor,
    embed: Tensor | None = None,
    is_first: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    force_stoch: Tensor | None = None,
) -> RSSMStep:
    r"""Go one step: to the posterior if an embedding is given, else to the prior.

    Args:
        params: the model.
        state: where the step starts; its stoch may be floats or uint8 classes.
        prev_action: ``[N, A]``, the action that leads to this step.
        embed: ``[N, E]``, what the encoder made of this step's observation, or None.
        is_first: ``[N]`` bool or float; true where this step begins an episode. State and action are zeroed there.
        noise: ``[N, S]`` uniforms in [0, 1), or normals for Gaussian latents; drawn if None, from torch's generator or by
            counting from a seed.
        seed: 64-bit key of :func:`pywm.ops.philox_uniform`, whose counter is (row, offset, 0): the same numbers on every
            device.
        offset: number of this step.
        force_stoch: ``[N, S]`` integer classes (Gaussian: floats) to take instead of a sample.

    Returns:
        :class:`RSSMStep`, dtype and device of ``prev_action``.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ from what the configuration says.

    Source:
        Hafner et al. (2019), (2020), (2021), (2023).
    """
    function = "rssm_step"
    if (full := _full_precision(params, prev_action, embed, is_first, noise)) and len(state) == 2:
        state = RSSMState(*_full_precision(params, *state))  # type: ignore[misc]
        prev_action, embed, is_first, noise = full
        options: dict[str, Any] = {"noise": noise, "seed": seed, "offset": offset, "force_stoch": force_stoch}
        with torch.autocast(prev_action.device.type, enabled=False):
            return rssm_step(params, state, prev_action, embed, is_first, **options)
    c = _params(function, params)
    first = _check.tensor(function, "prev_action", prev_action)
    if first.ndim != 2 or first.shape[1] != c.action:
        raise ValueError(
            f"{function}: prev_action is {tuple(first.shape)}, but [N, A] = [N, {c.action}] was expected"
        )
    N = first.shape[0]
    deter, stoch = _state(function, params, state, N, first)
    if embed is not None:
        embed = _float(function, "embed", embed, (N, c.embed), first)
    reset = None if is_first is None else _mask(function, "is_first", is_first, (N,), first)
    force = _force(function, force_stoch, (N, c.stoch), c, first)
    noise = _noise(function, noise, seed, offset, (N, c.stoch), c, first, needed=force is None)
    arguments = deter, stoch, first, embed, reset, noise, force
    fused = _native.supports(first) and N > 0 and not is_transformed()
    step = _fused_step if fused else reference_rssm.step
    deter, stats, stoch, index = step(params, *arguments)
    shown = reference_rssm.distribution(stats, c)
    posterior, prior = (None, shown) if embed is None else (shown, None)
    return RSSMStep(deter, _shaped(stoch, c), index, posterior, prior)


def rssm_observe(
    params: RSSMParams,
    embed: Tensor,
    prev_action: Tensor,
    is_first: Tensor,
    state: RSSMState,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    force_stoch: Tensor | None = None,
) -> Observed:
    r"""Filter a window of observations: the posterior of every step, and the prior that had not seen it.

    Row t is the step at which observation t arrives: ``prev_action[t]`` led to it, ``is_first[t]`` says that it began an
    episode, so that state and action before it are zeroed.

    Args:
        params: the model.
        embed: ``[T, N, E]``, the encoder's outputs.
        prev_action: ``[T, N, A]``; replay stores the action chosen after an observation, so shift it by a row.
        is_first: ``[T, N]`` bool or float, non-zero is true.
        state: before the window, ``[N, ...]``; its stoch may be floats (differentiable) or uint8 classes.
        noise: ``[T, N, S]`` uniforms in [0, 1), or normals for Gaussian latents; drawn if None, from torch's generator or
            by counting from a seed.
        seed: 64-bit key of :func:`pywm.ops.philox_uniform`, whose counter is (row, offset + t, 0): the same numbers on
            every device.
        offset: number of the first step.
        force_stoch: ``[T, N, S]`` integer classes (Gaussian: floats) to take instead of samples.

    Returns:
        :class:`Observed`, dtype and device of ``embed``. Differentiable once in the parameters, embed, prev_action and
        the state's floats.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ from what the configuration says.

    Source:
        Hafner et al. (2019), (2020), (2021), (2023).
    """
    function = "rssm_observe"
    if (full := _full_precision(params, embed, prev_action, is_first, noise)) and len(state) == 2:
        state = RSSMState(*_full_precision(params, *state))  # type: ignore[misc]
        embed, prev_action, is_first, noise = full
        options: dict[str, Any] = {"noise": noise, "seed": seed, "offset": offset, "force_stoch": force_stoch}
        with torch.autocast(embed.device.type, enabled=False):
            return rssm_observe(params, embed, prev_action, is_first, state, **options)
    c = _params(function, params)
    first = _check.tensor(function, "embed", embed)
    if first.ndim != 3 or first.shape[2] != c.embed or first.shape[0] < 1:
        raise ValueError(
            f"{function}: embed is {tuple(first.shape)}, but [T, N, E] = [T, N, {c.embed}] with T >= 1 was expected"
        )
    T, N, _ = first.shape
    prev_action = _float(function, "prev_action", prev_action, (T, N, c.action), first)
    reset = _mask(function, "is_first", is_first, (T, N), first)
    deter0, stoch0 = _state(function, params, state, N, first)
    force = _force(function, force_stoch, (T, N, c.stoch), c, first)
    noise = _noise(function, noise, seed, offset, (T, N, c.stoch), c, first, needed=force is None)
    deter, stats, stoch, index = _observe(params, first, prev_action, reset, deter0, stoch0, noise, force)
    prior = _head(deter, params.prior, c)
    shown = reference_rssm.distribution(stats, c), reference_rssm.distribution(prior, c)
    return Observed(deter, _shaped(stoch, c), index, *shown)


def _norm_act(x: Tensor, layer: Layer, c: RSSMConfig) -> Tensor:
    if c.norm == "none":
        return reference_rssm.norm_act(x, layer, c)
    assert layer.scale is not None
    return norm_act(x, layer.scale, layer.shift, norm=c.norm, act=c.act, eps=c.eps)


def _hidden(x: Tensor, layer: Layer, c: RSSMConfig) -> Tensor:
    return _norm_act(functional.linear(x, layer.weight, layer.bias), layer, c)


def _head(x: Tensor, layers: tuple[Layer, ...], c: RSSMConfig) -> Tensor:
    """A head as :func:`reference_rssm.head` defines it, with fused norms."""
    for layer in layers[:-1]:
        x = _hidden(x, layer, c)
    return functional.linear(x, layers[-1].weight, layers[-1].bias)


def _fused_step(
    params: RSSMParams,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    embed: Tensor | None,
    is_first: Tensor | None,
    noise: Tensor | None,
    force: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`reference_rssm.step` of torch's products and our ops.

    One step reads every weight once; packing them for the scan's kernels would take longer.
    """
    c = params.config
    if is_first is not None:
        reset = is_first.unsqueeze(-1)
        deter, stoch, action = (x.masked_fill(reset, 0) for x in (deter, stoch, action))
    deter = _fused_cell(params, deter, stoch, action)
    if embed is None:
        stats = _head(deter, params.prior, c)
    else:
        stats = _head(torch.cat([deter, embed], -1), params.posterior, c)
    if c.is_gaussian or force is not None or noise is None:
        stoch, index = reference_rssm.sample(stats, noise, force, c)
        return deter, stats, stoch, index
    one_hot, classes = categorical_sample(stats.unflatten(-1, (c.stoch, c.classes)), noise, unimix=c.unimix)
    return deter, stats, one_hot.flatten(-2), classes


def _fused_cell(params: RSSMParams, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
    c = params.config
    if c.cell == "block_gru":
        assert params.deter_in is not None
        assert params.action_in is not None
        assert params.hidden is not None
        action = _hidden(reference_rssm.bounded(action), params.action_in, c)
        x = torch.cat([_hidden(deter, params.deter_in, c), _hidden(stoch, params.stoch_in, c), action], -1)
        blocks = deter.unflatten(-1, (c.blocks, -1)).transpose(0, 1)
        y = _blocks(torch.cat([blocks, x.expand(c.blocks, *x.shape)], -1), params.hidden)
        y = _norm_act(y, params.hidden, c)
        pre = _blocks(y.unflatten(-1, (c.blocks, -1)).transpose(0, 1), params.gates)
        return block_gru_gates(pre, deter, blocks=c.blocks)
    x = _hidden(torch.cat([stoch, action], -1), params.stoch_in, c)
    gates = params.gates
    if c.cell == "layernorm_gru":
        assert gates.scale is not None
        assert gates.shift is not None
        pre = functional.linear(torch.cat([x, deter], -1), gates.weight, gates.bias)
        return layernorm_gru_gates(pre, gates.scale, gates.shift, deter, eps=c.cell_eps)
    assert params.candidate is not None
    weight, bias, *_ = params.candidate
    if c.cell == "gru":
        from_deter = functional.linear(deter, weight, bias)
        return gru_gates(functional.linear(x, gates.weight, gates.bias), from_deter, deter)
    pre = functional.linear(torch.cat([x, deter], -1), gates.weight, gates.bias)
    candidate = functional.linear(torch.cat([x, gru_block_reset(pre, deter)], -1), weight, bias)
    return gru_block_update(pre, candidate, deter)


def _blocks(x: Tensor, layer: Layer) -> Tensor:
    """``x [G, N, in/G]`` times a block-diagonal weight: ``[N, out]``."""
    y = torch.bmm(x, layer.weight.transpose(1, 2)).transpose(0, 1).flatten(1)
    return y if layer.bias is None else y + layer.bias


def _full_precision(params: object, *tensors: object) -> list[Any] | None:
    """Under autocast, the tensors in the dtype of the parameters; else None.

    The recurrence keeps its state in full precision, as Dreamer does with its norms and losses.
    """
    x = tensors[0]
    if not isinstance(x, Tensor) or not isinstance(params, RSSMParams):
        return None
    if not torch.is_autocast_enabled(x.device.type):
        return None
    dtype = params.gates.weight.dtype
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


# ---- checks --------------------------------------------------------------------------------------------------------------


def _params(function: str, params: object) -> RSSMConfig:
    if not isinstance(params, RSSMParams):
        raise TypeError(f"{function}: params is a {type(params).__name__}, but RSSMParams were expected")
    return params.config


def _float(function: str, name: str, x: object, shape: tuple[int, ...], first: Tensor) -> Tensor:
    x = _check.tensor(function, name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{function}: {name} is {tuple(x.shape)}, but {shape} was expected")
    _check.like(function, name, x, "the first tensor", first)
    return x


def _mask(function: str, name: str, x: object, shape: tuple[int, ...], first: Tensor) -> Tensor:
    x = _check.tensor(function, name, x, _check.MASK_DTYPES)
    if tuple(x.shape) != shape:
        raise ValueError(f"{function}: {name} is {tuple(x.shape)}, but {shape} was expected")
    _check.same_device(function, name, x, "the first tensor", first)
    return x if x.dtype == torch.bool else x != 0


def _state(function: str, params: RSSMParams, state: object, N: int, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return deter and the flat stoch, as floats."""
    c = params.config
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{function}: state is a {type(state).__name__}, but an RSSMState was expected")
    deter = _float(function, "state.deter", state[0], (N, c.deter), first)
    stoch = state[1]
    if isinstance(stoch, Tensor) and stoch.dtype == torch.uint8 and not c.is_gaussian:
        _check.tensor(function, "state.stoch", stoch, (torch.uint8,))
        if tuple(stoch.shape) != (N, c.stoch):
            raise ValueError(
                f"{function}: state.stoch is {tuple(stoch.shape)} uint8, but {(N, c.stoch)} was expected"
            )
        _check.same_device(function, "state.stoch", stoch, "the first tensor", first)
        return deter, functional.one_hot(stoch.long(), c.classes).to(first.dtype).flatten(1)
    shape = (N, c.stoch) if c.is_gaussian else (N, c.stoch, c.classes)
    return deter, _float(function, "state.stoch", stoch, shape, first).flatten(1)


def _force(
    function: str, force: object, shape: tuple[int, ...], c: RSSMConfig, first: Tensor
) -> Tensor | None:
    if force is None:
        return None
    if c.is_gaussian:
        return _float(function, "force_stoch", force, shape, first)
    x = _check.tensor(function, "force_stoch", force, _check.INTEGER_DTYPES)
    if tuple(x.shape) != shape:
        raise ValueError(f"{function}: force_stoch is {tuple(x.shape)}, but {shape} was expected")
    _check.same_device(function, "force_stoch", x, "the first tensor", first)
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() > 0:
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= c.classes:
            bad = low if low < 0 else high
            raise ValueError(
                f"{function}: force_stoch has {bad}, but classes in [0, {c.classes}) were expected"
            )
    return x.to(torch.uint8)


def _noise(
    function: str,
    noise: object,
    seed: object,
    offset: object,
    shape: tuple[int, ...],
    c: RSSMConfig,
    first: Tensor,
    needed: bool,
) -> Tensor | None:
    return _draw(function, "noise", noise, seed, offset, 0, shape, c.is_gaussian, first, needed)


def _draw(
    function: str,
    name: str,
    noise: object,
    seed: object,
    offset: object,
    stream: int,
    shape: tuple[int, ...],
    normal: bool,
    first: Tensor,
    needed: bool,
) -> Tensor | None:
    """Return the noise that was given, or draw it: by counting if there is a seed, else from torch's generator."""
    if noise is not None:
        if seed is not None:
            raise ValueError(f"{function}: seed is {seed}, but None was expected, as {name} was given")
        return _float(function, name, noise, shape, first).detach()
    if not needed:
        return None
    if seed is not None:
        seed = _check.integer(function, "seed", seed, 0, 2**64 - 1)
        offset = _check.integer(function, "offset", offset, 0, 2**32 - 1)
        T, N, S = shape if len(shape) == 3 else (1, *shape)
        count = philox_normal if normal else philox_uniform
        drawn = count(seed, offset, (T, N, S), stream=stream, device=first.device, dtype=first.dtype)
        return drawn.view(shape)
    draw = torch.randn if normal else torch.rand
    return draw(shape, dtype=first.dtype, device=first.device)


def _shaped(stoch: Tensor, c: RSSMConfig) -> Tensor:
    return stoch if c.is_gaussian else stoch.unflatten(-1, (c.stoch, c.classes))


# ---- the scan ------------------------------------------------------------------------------------------------------------

# Layers of the scan in the order in which the kernel takes them, and whether its bias is the kernel's business.
_KERNEL_LAYERS = ("deter_in", "stoch_in", "hidden", "gates", "candidate", "posterior", "out")
_LAYERS = ("deter_in", "stoch_in", "action_in", "hidden", "gates", "candidate", "posterior", "out")


def _layer(params: RSSMParams, name: str) -> Layer | None:
    if name == "posterior":
        return params.posterior[0]
    if name == "out":
        return params.posterior[1]
    layer: Layer | None = getattr(params, name)
    return layer


def _flat(params: RSSMParams) -> tuple[list[Tensor], int]:
    """The scan's tensors, and a bit mask that tells which of the layers' parts they are."""
    tensors: list[Tensor] = []
    present = 0
    for i, name in enumerate(_LAYERS):
        for j, x in enumerate(_layer(params, name) or ()):
            if x is not None:
                tensors.append(x)
                present |= 1 << (4 * i + j)
    return tensors, present


class _Scan(NamedTuple):
    """The form of a scan: what a kernel must know beside tensors, as the dispatcher can carry it."""

    sizes: list[int]
    numbers: list[float]

    @staticmethod
    def of(c: RSSMConfig, present: int) -> _Scan:
        kinds = CELLS.index(c.cell), NORMS.index(c.norm), {"none": 0, "silu": 2, "elu": 3, "relu": 4}[c.act]
        sizes = [*kinds, c.deter, c.hidden, c.stoch, c.classes, c.blocks, int(c.std == "sigmoid2"), present]
        return _Scan(sizes, [c.unimix, c.eps, c.cell_eps, c.min_std])

    def form(self) -> tuple[Any, ...]:
        """As the binding takes it."""
        return (*self.sizes[:8], *self.numbers, self.sizes[8])

    def config(self) -> RSSMConfig:
        cell, norm, act, deter, hidden, stoch, classes, blocks, sigmoid2, _ = self.sizes
        unimix, eps, cell_eps, min_std = self.numbers
        return RSSMConfig(
            deter=deter,
            hidden=hidden,
            stoch=stoch,
            classes=classes,
            cell=CELLS[cell],
            blocks=blocks,
            norm=NORMS[norm],
            act=("none", "", "silu", "elu", "relu")[act],
            unimix=unimix,
            eps=eps,
            cell_eps=cell_eps,
            std="sigmoid2" if sigmoid2 else "softplus",
            min_std=min_std,
        )

    def layers(self, tensors: list[Tensor]) -> dict[str, Layer]:
        """Undo :func:`_flat`."""
        rest = iter(tensors)
        found = {}
        for i, name in enumerate(_LAYERS):
            parts = [next(rest) if self.sizes[9] >> (4 * i + j) & 1 else None for j in range(4)]
            if parts[0] is not None:
                found[name] = Layer(*parts)  # type: ignore[arg-type]
        return found


def _observe(
    params: RSSMParams,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor | None,
    force: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    c = params.config
    served_by_kernel = (
        _native.supports(embed) and embed.device.type == "cpu" and embed.shape[1] > 0 and not is_transformed()
    )
    if not served_by_kernel:
        return reference_rssm.observe(params, embed, action, is_first, deter, stoch, noise, force)
    action = action.masked_fill(is_first.unsqueeze(-1), 0)
    if c.cell == "block_gru":
        action = reference_rssm.bounded(action)
    tensors, present = _flat(params)
    scan = _Scan.of(c, present)
    inputs = (embed, action, is_first, deter, stoch, noise, force)
    if torch.compiler.is_compiling() or any(type(x) not in _PLAIN for x in (embed, *tensors)):
        deter, stats, stoch, index, *_ = torch.ops.pywm.rssm_observe(*inputs, tensors, *scan)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (embed, action, deter, stoch, *tensors)):
        deter, stats, stoch, index, *_ = _Eager.apply(scan, *inputs, *tensors)  # type: ignore[no-untyped-call]
    else:
        deter, stats, stoch, index, *_ = _forward(*inputs, tensors, *scan, keep=False)
    return deter, stats, stoch, None if c.is_gaussian else index


_PLAIN = (Tensor, torch.nn.Parameter)


def _columns(weight: Tensor, begin: int, end: int | None = None) -> Tensor:
    return weight.flatten(0, -2)[:, begin:end]


def _action_features(layers: dict[str, Layer], c: RSSMConfig, action: Tensor) -> Tensor:
    """What the cell sees of the actions, before the recurrence: ``[T·N, H]`` (block_gru), or they themselves."""
    if c.cell != "block_gru":
        return action
    return reference_rssm.hidden_layer(action, layers["action_in"], c)


def _forward(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor | None,
    force: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    numbers: Sequence[float],
    keep: bool = True,
) -> Any:
    scan = _Scan(list(sizes), list(numbers))
    c, layers = scan.config(), scan.layers([plain(x) for x in tensors])
    T, N, _ = embed.shape
    D, H, Z = c.deter, c.hidden, c.stoch_width
    embed, action, deter, stoch = (plain(x) for x in (embed, action, deter, stoch))
    posterior, stoch_in = layers["posterior"], layers["stoch_in"]
    token_proj = functional.linear(embed.flatten(0, 1), _columns(posterior.weight, D), posterior.bias)
    features = _action_features(layers, c, action.flatten(0, 1))
    if c.cell == "block_gru":
        into = layers["hidden"]
        action_proj = functional.linear(features, _columns(into.weight, D // c.blocks + 2 * H), into.bias)
    else:
        action_proj = functional.linear(features, stoch_in.weight[:, Z:], stoch_in.bias)
    stoch_proj = functional.linear(stoch, stoch_in.weight[:, :Z])
    index = embed.new_empty((T, N, c.stoch) if not c.is_gaussian else (0,), dtype=torch.uint8)
    result = _native.module().rssm_observe(
        scan.form(),
        _kernel_layers(layers),
        token_proj.view(T, N, H),
        action_proj.view(T, N, -1),
        deter,
        stoch_proj,
        plain_optional(noise),
        plain(is_first),
        plain_optional(force),
        None if c.is_gaussian else index,
        keep,
    )
    deters, stats, stochs, *kept = served(result, "rssm_observe")
    return deters, stats, stochs, index, *kept


def _kernel_layers(layers: dict[str, Layer]) -> tuple[Tensor | None, ...]:
    flat: list[Tensor | None] = []
    for name in _KERNEL_LAYERS:
        flat += layers.get(name, Layer(None))  # type: ignore[arg-type]
    return tuple(flat)


def _backward(
    grad_deter: Tensor | None,
    grad_stats: Tensor | None,
    grad_stoch: Tensor | None,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter0: Tensor,
    stoch0: Tensor,
    noise: Tensor | None,
    tensors: Sequence[Tensor],
    deter: Tensor,
    stats: Tensor,
    stoch: Tensor,
    u: Tensor,
    cell1: Tensor,
    cell2: Tensor,
    o: Tensor,
    sizes: Sequence[int],
    numbers: Sequence[float],
) -> Any:
    """Return the gradients of embed, action, the initial deter and stoch, and of all tensors."""
    scan = _Scan(list(sizes), list(numbers))
    c = scan.config()
    tensors = [plain(x) for x in tensors]
    layers = scan.layers(tensors)
    T, N, _ = embed.shape
    D, H, Z, G = c.deter, c.hidden, c.stoch_width, c.blocks
    embed, action, is_first, deter0, stoch0 = (plain(x) for x in (embed, action, is_first, deter0, stoch0))
    if c.is_gaussian:  # also where samples were forced
        mean, std = reference_rssm.distribution(stats, c)
        noise = (stoch - mean) / std
    result = served(
        _native.module().rssm_observe_backward(
            scan.form(), _kernel_layers(layers), plain_optional(grad_deter), plain_optional(grad_stats),
            plain_optional(grad_stoch), deter0, deter, stats, plain_optional(noise), is_first, u, cell1, cell2, o,
        ),
        "rssm_observe_backward",
    )  # fmt: skip
    grad_deter0, grad_stoch_proj, *rows, norms = result
    d_stats, d_o, d_cell1, d_cell2, d_u, x, y, head = (r.flatten(0, 1) for r in rows)
    keep = (~is_first).unsqueeze(-1)
    before = torch.cat([deter0.unsqueeze(0), deter[:-1]]).mul_(keep).flatten(0, 1)
    stoch_before = torch.cat([stoch0.unsqueeze(0), stoch[:-1]]).mul_(keep).flatten(0, 1)
    rows_of = {"embed": embed.flatten(0, 1), "action": action.flatten(0, 1), "deter": deter.flatten(0, 1)}
    grads: dict[str, list[Tensor | None]] = {name: [None] * 4 for name in layers}

    def weight(name: str, *pairs: tuple[Tensor, Tensor]) -> None:
        """Gradient of a dense weight whose inputs lie side by side."""
        w = layers[name].weight
        out = torch.empty_like(w)
        column = 0
        for grad, inputs in pairs:
            torch.mm(grad.t(), inputs, out=out[:, column : column + inputs.shape[1]])
            column += inputs.shape[1]
        grads[name][0] = out
        if layers[name].bias is not None:
            grads[name][1] = pairs[0][0].sum(0)

    posterior = layers["posterior"].weight
    grad_embed = (d_o @ posterior[:, D:]).view(T, N, -1)
    weight("posterior", (d_o, rows_of["deter"]), (d_o, rows_of["embed"]))
    weight("out", (d_stats, head))
    if c.cell == "block_gru":
        Dg = D // G
        weight("deter_in", (d_u[:, :H], before))
        weight("stoch_in", (d_u[:, H:], stoch_before))
        hidden = layers["hidden"]
        wide = _columns(hidden.weight, 0)
        grads["action_in"], features, grad_action = _through_action(
            layers, c, rows_of["action"], d_cell1 @ wide[:, Dg + 2 * H :]
        )
        out = torch.empty_like(wide)
        for g in range(G):
            block = slice(g * Dg, (g + 1) * Dg)
            torch.mm(d_cell1[:, block].t(), before[:, block], out=out[block, :Dg])
        torch.mm(d_cell1.t(), x, out=out[:, Dg : Dg + 2 * H])
        torch.mm(d_cell1.t(), features, out=out[:, Dg + 2 * H :])
        grads["hidden"][0] = out.view_as(hidden.weight)
        if hidden.bias is not None:
            grads["hidden"][1] = d_cell1.sum(0)
        gates = torch.empty_like(layers["gates"].weight)
        for g in range(G):
            torch.mm(d_cell2[:, 3 * g * Dg : 3 * (g + 1) * Dg].t(), y[:, g * Dg : (g + 1) * Dg], out=gates[g])
        grads["gates"][0] = gates
        if layers["gates"].bias is not None:
            grads["gates"][1] = d_cell2.sum(0)
    else:
        weight("stoch_in", (d_u, stoch_before), (d_u, rows_of["action"]))
        grad_action = d_u @ layers["stoch_in"].weight[:, Z:]
        if c.cell == "layernorm_gru":
            weight("gates", (d_cell1, x), (d_cell1, before))
        elif c.cell == "gru":
            weight("gates", (d_cell1, x))
            weight("candidate", (d_cell2, before))
        else:
            weight("gates", (d_cell1, x), (d_cell1, before))
            weight("candidate", (d_cell2, x), (d_cell2, y))
    grad_stoch0 = grad_stoch_proj @ layers["stoch_in"].weight[:, :Z]
    named = ["stoch_in", "posterior"]
    if c.cell == "block_gru":
        named = ["deter_in", "stoch_in", "hidden", "posterior"]
    elif c.cell == "layernorm_gru":
        named = ["stoch_in", "gates", "posterior"]
    position = 0
    for name in named:
        for part in (2, 3):
            of = layers[name][part]
            if of is not None:
                grads[name][part] = norms[position : position + len(of)]
                position += len(of)
    flat = [
        g
        for name in _LAYERS
        if name in layers
        for g, of in zip(grads[name], layers[name], strict=True)
        if of is not None
    ]
    return [grad_embed, grad_action.reshape(action.shape), grad_deter0, grad_stoch0, *flat]


def _through_action(
    layers: dict[str, Layer], c: RSSMConfig, action: Tensor, grad: Tensor
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Return the gradients of action_in's parts, its outputs, and the gradient of the actions."""
    layer = layers["action_in"]
    pre = functional.linear(action, layer.weight, layer.bias)
    parts: list[Tensor | None] = [None] * 4
    features = reference_rssm.norm_act(pre, layer, c)
    if c.norm == "none":
        aten = torch.ops.aten
        through: dict[str, Callable[[], Tensor]] = {
            "none": lambda: grad,
            "silu": lambda: aten.silu_backward(grad, pre),
            "elu": lambda: aten.elu_backward(grad, 1.0, 1.0, 1.0, False, pre),
            "relu": lambda: aten.threshold_backward(grad, pre, 0.0),
        }
        grad = through[c.act]()
    else:
        wanted = [True, True, layer.shift is not None]
        options = (c.norm, c.act, c.eps, wanted)
        grads = norm_act_backward(grad, pre, layer.scale, layer.shift, *options)  # type: ignore[no-untyped-call]
        grad, parts[2], shift = grads
        parts[3] = None if layer.shift is None else shift
    parts[0] = grad.t() @ action
    parts[1] = None if layer.bias is None else grad.sum(0)
    return parts, features, grad @ layer.weight


class _Eager(torch.autograd.Function):
    """The scan with its gradient, past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, scan: _Scan, *inputs: Any) -> Any:
        """See :func:`rssm_observe`."""
        embed, action, is_first, deter, stoch, noise, _, *tensors = inputs
        output = _forward(embed, action, is_first, deter, stoch, noise, inputs[6], tensors, *scan)
        ctx.scan = scan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(embed, action, is_first, deter, stoch, noise, *tensors, *output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of all inputs."""
        embed, action, is_first, deter, stoch, noise, *rest = ctx.saved_tensors
        tensors, (deters, stats, stochs, _, *kept) = rest[:-8], rest[-8:]
        inputs = (embed, action, is_first, deter, stoch, noise, tensors, deters, stats, stochs, *kept)
        if torch.is_grad_enabled():  # somebody will differentiate again, which the dispatcher's op refuses
            results = torch.ops.pywm.rssm_observe_backward(*grads[:3], *inputs, *ctx.scan)
        else:
            differentiate_once: Any = _backward
            results = differentiate_once(*grads[:3], *inputs, *ctx.scan)
        grad_embed, grad_action, grad_deter, grad_stoch, *flat = results
        return None, grad_embed, grad_action, None, grad_deter, grad_stoch, None, None, *flat


def _fake(embed, action, is_first, deter, stoch, noise, force, tensors, sizes, numbers):  # type: ignore[no-untyped-def]
    cell, _, _, D, H, S, K, *_ = sizes
    T, N, _ = embed.shape
    Z, Q = (S, 2 * S) if K == 0 else (S * K, S * K)
    widths = {0: (2 * H, D, 3 * D), 1: (H, 3 * D, 0), 2: (H, 3 * D, 3 * D), 3: (H, 2 * D, D)}[cell]
    outputs = [embed.new_empty((T, N, width)) for width in (D, Q, Z)]
    outputs.append(embed.new_empty((0,) if K == 0 else (T, N, S), dtype=torch.uint8))
    return *outputs, *(embed.new_empty((T, N, width)) for width in (*widths, H))


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_deter, grad_stats, grad_stoch, embed, action, is_first, deter0, stoch0, noise, tensors, *unused
):
    return [x.new_empty(x.shape) for x in (embed, action, deter0, stoch0, *tensors)]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    embed, action, is_first, deter, stoch, noise, _, tensors, sizes, numbers = inputs
    ctx.scan = _Scan(list(sizes), list(numbers))
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(embed, action, is_first, deter, stoch, noise, *tensors, *output)


def _autograd(ctx: Any, *grads: Tensor | None) -> Any:
    embed, action, is_first, deter, stoch, noise, *rest = ctx.saved_tensors
    tensors, (deters, stats, stochs, _, *kept) = rest[:-8], rest[-8:]
    results = torch.ops.pywm.rssm_observe_backward(
        *grads[:3],
        embed,
        action,
        is_first,
        deter,
        stoch,
        noise,
        tensors,
        deters,
        stats,
        stochs,
        *kept,
        *ctx.scan,
    )
    grad_embed, grad_action, grad_deter, grad_stoch, *flat = results
    return grad_embed, grad_action, None, grad_deter, grad_stoch, None, None, flat, None, None


define(
    "rssm_observe(Tensor embed, Tensor action, Tensor is_first, Tensor deter, Tensor stoch, Tensor? noise, "
    "Tensor? force, Tensor[] tensors, int[] sizes, float[] numbers) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _forward,
    cuda=False,
)
define(
    "rssm_observe_backward(Tensor? grad_deter, Tensor? grad_stats, Tensor? grad_stoch, Tensor embed, Tensor action, "
    "Tensor is_first, Tensor deter0, Tensor stoch0, Tensor? noise, Tensor[] tensors, Tensor deter, Tensor stats, "
    "Tensor stoch, Tensor u, Tensor cell1, Tensor cell2, Tensor o, int[] sizes, float[] numbers) -> Tensor[]",
    _fake_backward,
    _backward,
    cuda=False,
)
differentiate("rssm_observe", _setup_context, _autograd, "rssm_observe_backward")
