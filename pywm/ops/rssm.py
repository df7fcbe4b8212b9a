"""Recurrent state-space models: a step and a whole window as functions over tensors and a parameter structure.

A window is one call into compiled code. What does not depend on the recurrence is made of large products outside it: the
embeddings' and actions' parts before, the prior and all gradients of weights after.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from pywm.ops import _check, _native, _operands, _rssm_check, reference_rssm, rssm_scan
from pywm.ops._registry import is_transformed
from pywm.ops.categorical_sample import categorical_sample
from pywm.ops.gru_gates import (
    block_gru_gates,
    gru_block_reset,
    gru_block_update,
    gru_gates,
    layernorm_gru_gates,
)
from pywm.ops.norm_act import norm_act
from pywm.ops.philox import philox_uniform
from pywm.ops.rssm_params import (
    Gaussian,
    Layer,
    Policy,
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
    if (
        acted := _act(params, state, prev_action, embed, is_first, noise, seed, offset, force_stoch)
    ) is not None:
        return acted
    c = _rssm_check.model(function, params)
    _rssm_check.pair(function, state)
    if full := _rssm_check.full_precision(function, params, prev_action, *state, embed, is_first, noise):
        prev_action, deter, stoch, embed, is_first, noise = full
        state = RSSMState(deter, stoch)
        options: dict[str, Any] = {"noise": noise, "seed": seed, "offset": offset, "force_stoch": force_stoch}
        with torch.autocast(prev_action.device.type, enabled=False):
            return rssm_step(params, state, prev_action, embed, is_first, **options)
    first = _check.tensor(function, "prev_action", prev_action)
    if first.ndim != 2 or first.shape[1] != c.action:
        raise ValueError(
            f"{function}: prev_action is {tuple(first.shape)}, but [N, A] = [N, {c.action}] was expected"
        )
    _rssm_check.parameters(function, params, first)
    params = rssm_scan.in_float32(params)  # a step reads every weight once: rounding them would take longer
    c = params.config
    N = first.shape[0]
    deter, stoch = _rssm_check.state(function, params, state, N, first)
    if embed is not None:
        embed = _rssm_check.floats(function, "embed", embed, (N, c.embed), first)
    reset = None if is_first is None else _rssm_check.mask(function, "is_first", is_first, (N,), first)
    force = _rssm_check.force(function, force_stoch, (N, c.stoch), c, first)
    noise = _rssm_check.noise(function, noise, seed, offset, (N, c.stoch), c, first, needed=force is None)
    arguments = deter, stoch, first, embed, reset, noise, force
    fused = _native.supports(first) and N > 0 and not is_transformed()
    step = _fused_step if fused else reference_rssm.step
    deter, stats, stoch, index = step(params, *arguments)
    shown = reference_rssm.distribution(stats, c)
    posterior, prior = (None, shown) if embed is None else (shown, None)
    return RSSMStep(deter, _rssm_check.shaped(stoch, c), index, posterior, prior)


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
    c = _rssm_check.model(function, params)
    _rssm_check.pair(function, state)
    if full := _rssm_check.full_precision(function, params, embed, *state, prev_action, is_first, noise):
        embed, deter, stoch, prev_action, is_first, noise = full
        state = RSSMState(deter, stoch)
        options: dict[str, Any] = {"noise": noise, "seed": seed, "offset": offset, "force_stoch": force_stoch}
        with torch.autocast(embed.device.type, enabled=False):
            return rssm_observe(params, embed, prev_action, is_first, state, **options)
    first = _rssm_check.embeddings(function, embed, c)
    _rssm_check.parameters(function, params, first)
    params = rssm_scan.as_multiplied(params, first)
    c = params.config
    T, N, _ = first.shape
    prev_action = _rssm_check.floats(function, "prev_action", prev_action, (T, N, c.action), first)
    reset = _rssm_check.mask(function, "is_first", is_first, (T, N), first)
    deter0, stoch0 = _rssm_check.state(function, params, state, N, first)
    force = _rssm_check.force(function, force_stoch, (T, N, c.stoch), c, first)
    noise = _rssm_check.noise(function, noise, seed, offset, (T, N, c.stoch), c, first, needed=force is None)
    deter, stats, stoch, index = rssm_scan.observe(
        params, first, prev_action, reset, deter0, stoch0, noise, force
    )
    prior = _head(deter, params.prior, c)
    shown = reference_rssm.distribution(stats, c), reference_rssm.distribution(prior, c)
    return Observed(deter, _rssm_check.shaped(stoch, c), index, *shown)


def _act(
    params: RSSMParams,
    state: RSSMState,
    prev_action: Tensor,
    embed: Tensor | None,
    is_first: Tensor | None,
    noise: Tensor | None,
    seed: int | None,
    offset: int,
    force: Tensor | None,
) -> RSSMStep | None:
    """A step of a few states in one call, where it is plain and nobody wants gradients; else None, and no complaint."""
    if torch.compiler.is_compiling() or _native.is_disabled() or forward_ad._current_level >= 0:
        return None
    if type(params) is not RSSMParams or type(state) is not RSSMState:
        return None
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64 or noise is not None):
        return None
    if type(offset) is not int or not 0 <= offset < 2**32:
        return None
    deter, stoch = state
    if type(deter) is not Tensor or deter.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if noise is not None and type(noise) is not Tensor:
        return None
    c = params.config
    if not isinstance(c, RSSMConfig):
        return None
    if c.operands != "float32" and deter.dtype != torch.float32:
        return None
    if force is not None and (noise is not None or type(force) is not Tensor or force.dtype != torch.uint8):
        return None
    draw: Any = noise
    if force is None and noise is None:

        def draw() -> Tensor:
            if seed is not None:
                return philox_uniform(seed, offset, (1, deter.shape[0], c.stoch), dtype=deter.dtype)[0]
            return torch.rand(deter.shape[0], c.stoch, dtype=deter.dtype)

    result = _entry(_form(c), params, deter, stoch, prev_action, embed, is_first, draw, force)
    if result is None:
        return None
    deter, stoch, index, logits = result
    return RSSMStep(deter, stoch, index, *((None, logits) if embed is None else (logits, None)))


_entry = _native.entry("rssm_act")


@functools.lru_cache(maxsize=64)
def _form(c: RSSMConfig) -> tuple[Any, ...]:
    return rssm_scan.Scan.of(c, 0).form()


def activate(x: Tensor, layer: Layer, c: RSSMConfig | Policy) -> Tensor:
    """The norm and the nonlinearity behind a hidden layer, fused."""
    if c.norm == "none":
        return reference_rssm.norm_act(x, layer, c)
    assert layer.scale is not None
    return norm_act(x, layer.scale, layer.shift, norm=c.norm, act=c.act, eps=c.eps)


def _hidden(x: Tensor, layer: Layer, c: RSSMConfig) -> Tensor:
    return activate(_operands.linear(x, layer, c.operands), layer, c)


def _head(x: Tensor, layers: tuple[Layer, ...], c: RSSMConfig) -> Tensor:
    """A head as :func:`reference_rssm.head` defines it, with fused norms."""
    for layer in layers[:-1]:
        x = _hidden(x, layer, c)
    return _operands.linear(x, layers[-1], c.operands)


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
        y = activate(y, params.hidden, c)
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
