"""Recurrent state-space models in plain PyTorch: the definition, the fallback and the test oracle.

Written to be read, step by step and equation by equation. Differentiable by autograd, any float dtype, any device.
Arguments were checked by the public functions in ``pywm.ops.rssm``.

With ``operands="bfloat16"`` a product rounds what it multiplies to the nearest bfloat16, ties to even, and sums in float32.
So do the two products of its gradient: the gradient that comes in is rounded, the other operand was, and what goes out is
float32. Biases, and their gradients, are not rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pywm.ops.rssm_params import Gaussian, Layer, Policy, RSSMConfig, RSSMParams


def norm_act(x: Tensor, layer: Layer, config: RSSMConfig | Policy) -> Tensor:
    """The norm and the nonlinearity behind a hidden layer."""
    if config.norm == "rms":
        assert layer.scale is not None
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.eps) * layer.scale
    elif config.norm == "layer":
        x = functional.layer_norm(x, x.shape[-1:], layer.scale, layer.shift, config.eps)
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "elu": functional.elu,
        "relu": functional.relu,
    }
    return acts[config.act](x) if config.act in acts else x


def rounded(x: Tensor) -> Tensor:
    """``x`` rounded to bfloat16, in its own dtype; the gradient passes."""
    return x + (x.to(torch.bfloat16).to(x.dtype) - x).detach()


class _RoundGradient(torch.autograd.Function):
    """The same tensor, whose gradient is rounded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Return a copy."""
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        """Round."""
        return rounded(grad)

    @staticmethod
    def jvp(_: Any, tangent: Tensor) -> Tensor:
        """Return a copy."""
        return tangent.clone()


def product(x: Tensor, weight: Tensor, operands: str, equation: str = "...i,oi->...o") -> Tensor:
    """Multiply, with both operands rounded to bfloat16 if that is what ``operands`` says."""
    if operands == "float32":
        return torch.einsum(equation, x, weight)
    result: Tensor = _RoundGradient.apply(torch.einsum(equation, rounded(x), rounded(weight)))  # type: ignore[no-untyped-call]
    return result


def linear(x: Tensor, layer: Layer, operands: str) -> Tensor:
    """``x [..., in]`` times a weight ``[out, in]``, and the bias."""
    if operands == "float32":
        return functional.linear(x, layer.weight, layer.bias)
    y = product(x, layer.weight, operands)
    return y if layer.bias is None else y + layer.bias


def hidden_layer(x: Tensor, layer: Layer, config: RSSMConfig | Policy, operands: str) -> Tensor:
    """A linear layer, its norm, its nonlinearity."""
    return norm_act(linear(x, layer, operands), layer, config)


def block_linear(x: Tensor, layer: Layer, operands: str) -> Tensor:
    """``x [..., G, in/G]`` times a block-diagonal weight, with the blocks side by side ``[..., out]``."""
    y = product(x, layer.weight, operands, "...gi,goi->...go").flatten(-2)
    return y if layer.bias is None else y + layer.bias


def bounded(action: Tensor) -> Tensor:
    """DreamerV3's a / max(1, |a|), whose denominator is a constant to the gradient."""
    return action / action.detach().abs().clamp(min=1)


def cell(params: RSSMParams, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
    """The deterministic part of a step.

    Args:
        params: the model.
        deter: ``[N, D]``, masked.
        stoch: ``[N, S·K]``, flat and masked.
        action: ``[N, A]``, masked.

    Returns:
        The new deter ``[N, D]``.
    """
    c = params.config
    D = c.deter
    if c.cell == "block_gru":
        assert params.deter_in is not None
        assert params.action_in is not None
        assert params.hidden is not None
        x = torch.cat(
            [
                hidden_layer(deter, params.deter_in, c, c.operands),
                hidden_layer(stoch, params.stoch_in, c, c.operands),
                hidden_layer(bounded(action), params.action_in, c, c.operands),
            ],
            -1,
        )
        blocks = deter.unflatten(-1, (c.blocks, -1))
        inputs = torch.cat([blocks, x.unsqueeze(-2).expand(*x.shape[:-1], c.blocks, -1)], -1)
        y = norm_act(block_linear(inputs, params.hidden, c.operands), params.hidden, c)
        gates = block_linear(y.unflatten(-1, (c.blocks, -1)), params.gates, c.operands)
        reset, candidate, update = (g.flatten(-2) for g in gates.unflatten(-1, (c.blocks, -1)).chunk(3, -1))
        return _dreamer_gates(reset, candidate, update, deter)
    x = hidden_layer(torch.cat([stoch, action], -1), params.stoch_in, c, c.operands)
    both = torch.cat([x, deter], -1)
    if c.cell == "layernorm_gru":
        pre = linear(both, params.gates, c.operands)
        pre = functional.layer_norm(pre, (3 * D,), params.gates.scale, params.gates.shift, c.cell_eps)
        reset, candidate, update = pre.chunk(3, -1)
        return _dreamer_gates(reset, candidate, update, deter)
    assert params.candidate is not None
    if c.cell == "gru":
        reset_x, keep_x, candidate_x = linear(x, params.gates, c.operands).chunk(3, -1)
        reset_h, keep_h, candidate_h = linear(deter, params.candidate, c.operands).chunk(3, -1)
        keep = torch.sigmoid(keep_x + keep_h)
        candidate = torch.tanh(candidate_x + torch.sigmoid(reset_x + reset_h) * candidate_h)
        return keep * deter + (1 - keep) * candidate
    reset, keep = torch.sigmoid(linear(both, params.gates, c.operands)).chunk(2, -1)
    candidate = torch.tanh(linear(torch.cat([x, reset * deter], -1), params.candidate, c.operands))
    return keep * deter + (1 - keep) * candidate


def _dreamer_gates(reset: Tensor, candidate: Tensor, update: Tensor, deter: Tensor) -> Tensor:
    update = torch.sigmoid(update - 1)
    return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * deter


def head(x: Tensor, layers: Sequence[Layer], config: RSSMConfig | Policy, operands: str) -> Tensor:
    """Hidden layers and an output: what a sample is drawn from, ``[..., S·K]`` logits or ``[..., 2S]``."""
    for layer in layers[:-1]:
        x = hidden_layer(x, layer, config, operands)
    return linear(x, layers[-1], operands)


def distribution(stats: Tensor, config: RSSMConfig) -> Tensor | Gaussian:
    """Logits ``[..., S, K]``, or mean and standard deviation."""
    if not config.is_gaussian:
        logits: Tensor = stats.unflatten(-1, (config.stoch, config.classes))
        return logits
    mean, raw = stats.chunk(2, -1)
    std = functional.softplus(raw) if config.std == "softplus" else 2 * torch.sigmoid(raw / 2)
    return Gaussian(mean, std + config.min_std)


def probs(logits: Tensor, unimix: float) -> Tensor:
    """Class probabilities, mixed with a uniform distribution."""
    return (1 - unimix) * torch.softmax(logits, -1) + unimix / logits.shape[-1]


def sample(
    stats: Tensor, noise: Tensor | None, force: Tensor | None, config: RSSMConfig
) -> tuple[Tensor, Tensor | None]:
    """Draw a sample ``[..., S·K or S]`` with its gradient, and its classes ``[..., S]`` uint8.

    Categorical: inverse CDF, the classes' probabilities summed in their order; straight-through gradient. Gaussian:
    reparameterised.
    """
    if config.is_gaussian:
        mean, std = distribution(stats, config)
        if force is not None:
            noise = ((force - mean) / std).detach()
            return force + (mean - mean.detach()) + (std - std.detach()) * noise, None
        assert noise is not None
        return mean + std * noise, None
    logits = stats.unflatten(-1, (config.stoch, config.classes))
    p = probs(logits, config.unimix)
    if force is None:
        assert noise is not None
        cdf = p.detach().cumsum(-1)
        below = cdf <= noise.unsqueeze(-1) * cdf[..., -1:]
        index = below.sum(-1).clamp(max=config.classes - 1).to(torch.uint8)
    else:
        index = force.to(torch.uint8)
    one_hot = functional.one_hot(index.long(), config.classes).to(p.dtype)
    return (one_hot + (p - p.detach())).flatten(-2), index


def step(
    params: RSSMParams,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    embed: Tensor | None,
    is_first: Tensor | None,
    noise: Tensor | None,
    force: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One step; ``stoch`` is flat.

    Returns:
        deter ``[N, D]``, the statistics of the posterior or prior, the flat sample, its classes or None.
    """
    c = params.config
    if is_first is not None:
        reset = is_first.unsqueeze(-1)
        deter, stoch, action = (x.masked_fill(reset, 0) for x in (deter, stoch, action))
    deter = cell(params, deter, stoch, action)
    if embed is None:
        stats = head(deter, params.prior, c, c.operands)
    else:
        stats = head(torch.cat([deter, embed], -1), params.posterior, c, c.operands)
    stoch, index = sample(stats, noise, force, c)
    return deter, stats, stoch, index


def observe(
    params: RSSMParams,
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor | None,
    force: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All steps of a window; see :func:`step`, with ``[T, ...]`` in front."""
    rows = []
    for t in range(len(embed)):
        at = (None if noise is None else noise[t], None if force is None else force[t])
        row = step(params, deter, stoch, action[t], embed[t], is_first[t], *at)
        deter, _, stoch, _ = row
        rows.append(row)
    deters, stats, stochs, indices = zip(*rows, strict=True)
    index = None if indices[0] is None else torch.stack(indices)
    return torch.stack(deters), torch.stack(stats), torch.stack(stochs), index


def act(policy: Policy, stats: Tensor, noise: Tensor) -> Tensor:
    """Turn a policy's outputs into an action ``[..., A]``, with its gradient (straight-through for classes)."""
    if policy.kind == "categorical":
        actions = []
        for i, logits in enumerate(stats.split(policy.groups, -1)):
            p = probs(logits, policy.unimix)
            cdf = p.detach().cumsum(-1)
            below = cdf <= noise[..., i : i + 1] * cdf[..., -1:]
            index = below.sum(-1).clamp(max=logits.shape[-1] - 1)
            actions.append(functional.one_hot(index, logits.shape[-1]).to(p.dtype) + (p - p.detach()))
        return torch.cat(actions, -1)
    mean, raw = stats.chunk(2, -1)
    if policy.kind == "normal":
        std = (policy.max_std - policy.min_std) * torch.sigmoid(raw + 2) + policy.min_std
        return torch.tanh(mean) + std * noise
    std = functional.softplus(raw + math.log(math.exp(5) - 1)) + policy.min_std
    return torch.tanh(5 * torch.tanh(mean / 5) + std * noise)


def imagine(
    params: RSSMParams,
    policy: Policy | Callable[[Tensor], Tensor],
    deter: Tensor,
    stoch: Tensor,
    horizon: int,
    noise: Tensor | None,
    action_noise: Tensor | None,
    force: Tensor | None,
    force_action: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor], list[Tensor], list[Tensor]]:
    """Steps of policy and prior from ``deter [N, D]`` and the flat ``stoch``; the policy sees features without gradient.

    Returns:
        deter, stoch and index of the steps after the start, actions, the prior's statistics, the policy's outputs.
    """
    rows = []
    for t in range(horizon):
        feat = torch.cat([deter, stoch], -1)
        outputs = None
        if isinstance(policy, Policy):
            outputs = head(feat.detach(), policy.layers, policy, params.config.operands)
            if force_action is None:
                assert action_noise is not None
                action = act(policy, outputs, action_noise[t])
        elif force_action is None:
            action = policy(feat.detach())
        if force_action is not None:
            action = force_action[t]
        at = (None if noise is None else noise[t], None if force is None else force[t])
        deter, stats, stoch, index = step(params, deter, stoch, action, None, None, *at)
        rows.append((deter, stoch, index, action, stats, outputs))
    return tuple(list(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]
