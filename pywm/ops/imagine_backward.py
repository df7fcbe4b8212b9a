"""Gradients through imagination, for the states that one compiled call has imagined.

The policy sees features without gradient. So the reverse scan is the model's alone, one call again, and all that lies
outside the recurrence is made of large products over all rows: the gradients of the model's weights and of the actions, and
the policy from its first layer to its actions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pywm.ops import _native, _operands, reference_rssm, rssm_scan
from pywm.ops._registry import once, plain, plain_optional, served
from pywm.ops.rssm import activate
from pywm.ops.rssm_params import Layer, Policy, RSSMConfig, RSSMParams


class Rows(NamedTuple):
    """What imagination made, without gradient; stoch is flat.

    Attributes:
        deter: ``[H + 1, N, D]``.
        stoch: ``[H + 1, N, S·K]``.
        action: ``[H, N, A]``.
        prior: ``[H, N, ...]``, the statistics.
        policy: ``[H, N, outputs]``.
    """

    deter: Tensor
    stoch: Tensor
    action: Tensor
    prior: Tensor
    policy: Tensor


def differentiable(
    params: RSSMParams,
    policy: Policy,
    rows: Rows,
    kept: Tensor | None,
    index: Tensor | None,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor | None,
    action_noise: Tensor | None,
    force_action: Tensor | None,
) -> Rows:
    """Return ``rows`` as functions of the parameters, the policy, the start ``deter`` and ``stoch``, and force_action.

    ``kept`` are the pre-activations of the policy's hidden layers, ``[layers, H, N, U]``.
    """
    c = params.config
    tensors = [x for layer in policy.layers for x in layer if x is not None]
    given = rows.policy if force_action is not None else (rows.policy, rows.action)
    # Detached, for the others will be outputs of these two functions, which would hold on to themselves.
    seen = rows.policy.detach(), kept, rows.deter.detach(), rows.stoch.detach(), action_noise
    outputs = _Policy.apply((policy, c.operands), given, *seen, *tensors)  # type: ignore[no-untyped-call]
    outputs, action = (outputs, force_action) if force_action is not None else outputs
    flat, present = rssm_scan.flat(params)
    form = _Form(c, rssm_scan.Scan.of(c, present), tuple(_present(layer) for layer in params.prior))
    bounded = reference_rssm.bounded(action) if c.cell == "block_gru" else action
    prior = [x for layer in params.prior for x in layer if x is not None]
    made = rows.deter, rows.stoch, rows.prior
    result = _Model.apply(form, made, bounded, deter, stoch, noise, index, *flat, *prior)  # type: ignore[no-untyped-call]
    deters, stochs, stats = result
    return Rows(deters, stochs, action, stats, outputs)


def _present(layer: Layer) -> tuple[bool, ...]:
    return tuple(x is not None for x in layer)


def _layers(present: Sequence[tuple[bool, ...]], tensors: Sequence[Tensor]) -> tuple[Layer, ...]:
    """Undo the flattening of a list of layers."""
    rest = iter(tensors)
    return tuple(Layer(*(next(rest) if here else None for here in parts)) for parts in present)  # type: ignore[arg-type]


class _Policy(torch.autograd.Function):
    """The policy's outputs, and its actions if there are some, as functions of its parameters."""

    @staticmethod
    def forward(ctx: Any, form: tuple[Policy, str], given: Any, *inputs: Any) -> Any:
        """Return what is given; ``form`` is the policy and what its products' operands are rounded to."""
        ctx.form = form
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return given

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of its parameters."""
        call = functools.partial(_policy_backward, *ctx.form, len(grads), ctx.needs_input_grad[7:])
        return *(None,) * 7, *once("imagine", call, *grads, *ctx.saved_tensors)


def _policy_backward(
    policy: Policy, operands: str, count: int, wanted: Sequence[bool], *inputs: Any
) -> list[Tensor | None]:
    """Go back through the actions and the network, with all rows at once."""
    grads, (outputs, kept, deter, stoch, noise, *tensors) = inputs[:count], inputs[count:]
    layers = _layers([_present(layer) for layer in policy.layers], [plain(x.detach()) for x in tensors])
    grad = grads[0]
    if count > 1 and grads[1] is not None:
        through = _through(lambda x: reference_rssm.act(policy, x, noise), [outputs], grads[1])[1][0]
        grad = through if grad is None else grad + through
    if grad is None or not any(wanted):
        return [None] * len(tensors)
    grad = plain(grad.detach()).flatten(0, 1)
    feat = torch.cat([deter[:-1], stoch[:-1]], -1).flatten(0, 1)
    of: list[list[Tensor | None]] = [[None] * 4 for _ in layers]
    for i in reversed(range(len(layers))):
        taken = feat
        if i > 0:
            below = layers[i - 1]
            norm = [x for x in below[2:] if x is not None]
            pre = [kept[i - 1].flatten(0, 1), *norm]
            # What the layer took is computed again, with its norm and nonlinearity.
            grad_taken = _operands.mm(grad, layers[i].weight, operands)
            taken, through_norm = _through(
                lambda x, *norm: activate(x, Layer(x, None, *norm), policy), pre, grad_taken
            )
            of[i - 1][2 : 2 + len(norm)] = through_norm[1:]
        of[i][:2] = rssm_scan.weight_gradient(layers[i], (grad, taken), operands=operands)[:2]
        if i > 0:
            grad = through_norm[0]
    flat = [
        g
        for layer, parts in zip(layers, of, strict=True)
        for g, x in zip(parts, layer, strict=True)
        if x is not None
    ]
    return [g if w else None for g, w in zip(flat, wanted, strict=True)]


def _through(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return what a function of rows gives, and the gradients of its inputs."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        result = function(*leaves)
    return result.detach(), list(torch.autograd.grad(result, leaves, grad.detach()))


class _Form(NamedTuple):
    """The form of a model: its configuration, its scan, and which parts the layers of its prior have."""

    config: RSSMConfig
    scan: rssm_scan.Scan
    prior: tuple[tuple[bool, ...], ...]


class _Model(torch.autograd.Function):
    """The states and the prior's statistics as functions of the actions, the start and the parameters."""

    @staticmethod
    def forward(
        ctx: Any, form: _Form, made: tuple[Tensor, Tensor, Tensor], action: Tensor, *inputs: Any
    ) -> Any:
        """Return what is made."""
        _, _, *constants = inputs  # the start is the first row of the states
        ctx.form = form
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*made, action, *constants)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of the actions, the start and the parameters."""
        call = functools.partial(_model_backward, ctx.form, ctx.needs_input_grad[7:])
        action, deter, stoch, *tensors = once("imagine", call, *grads, *ctx.saved_tensors)
        return None, None, action, deter, stoch, None, None, *tensors


def _model_backward(form: _Form, wanted: Sequence[bool], *inputs: Any) -> list[Tensor | None]:
    grads, (deter, stoch, stats, action, noise, index, *tensors) = inputs[:3], inputs[3:]
    c, scan = form.config, form.scan
    D, H, Z = c.deter, c.hidden, c.stoch_width
    tensors = [plain(x.detach()) for x in tensors]
    of_scan = len(tensors) - sum(map(sum, form.prior))
    layers, prior = scan.layers(tensors[:of_scan]), _layers(form.prior, tensors[of_scan:])
    action = plain(action.detach())
    if c.is_gaussian:  # also where samples were forced
        mean, std = reference_rssm.distribution(stats, c)
        noise = (stoch[1:] - mean) / std
    stoch_in = layers["stoch_in"]
    if c.cell == "block_gru":
        into = layers["hidden"]
        columns = into.weight.flatten(0, -2)[:, D // c.blocks + 2 * H :]
        features = rssm_scan.action_features(layers, c, action)
        action_proj = _operands.linear(features, Layer(columns, into.bias), c.operands)
    else:
        action_proj = _operands.linear(action, Layer(stoch_in.weight[:, Z:], stoch_in.bias), c.operands)
    result = _native.module().rssm_imagine_backward(
        scan.form(),
        rssm_scan.kernel_layers(layers),
        tuple(tuple(layer) for layer in prior),
        *(plain_optional(g) for g in grads),
        action_proj,
        _operands.linear(stoch[0], Layer(stoch_in.weight[:, :Z]), c.operands),
        deter,
        stoch,
        stats,
        plain_optional(noise),
        index,
    )
    grad_deter, grad_stoch, d_stats, d_prior, *planes, prior_x, norms = served(
        result, "rssm_imagine_backward"
    )
    d_cell1, d_cell2, d_u, x, y = (plane.flatten(0, 1) for plane in planes)
    before, stoch_before = deter[:-1].flatten(0, 1), stoch[:-1].flatten(0, 1)
    rows = rssm_scan.CellRows(d_cell1, d_cell2, d_u, x, y, before, stoch_before, action.flatten(0, 1))
    needed = iter(wanted)
    names = [name for name, layer in layers.items() if sum(next(needed) for x in layer if x is not None)]
    of, grad_action = rssm_scan.cell_gradients(layers, c, rows, names)
    of_prior: list[list[Tensor | None]] = []
    taken = deter[1:].flatten(0, 1)
    for i, layer in enumerate(prior):
        d = d_prior[i].flatten(0, 1) if i < len(d_prior) else d_stats.flatten(0, 1)
        count = sum(next(needed) for x in layer if x is not None)
        of_prior.append(
            rssm_scan.weight_gradient(layer, (d, taken), operands=c.operands) if count else [None] * 4
        )
        if i < len(d_prior):
            taken = prior_x[i].flatten(0, 1)
    hidden = list(zip(prior[:-1], of_prior[:-1], strict=True))
    rssm_scan.norm_gradients([*((layers[name], of[name]) for name in rssm_scan.normed(c)), *hidden], norms)
    pairs = [*((layers[name], of[name]) for name in layers), *zip(prior, of_prior, strict=True)]
    flat = [g for layer, parts in pairs for g, x in zip(parts, layer, strict=True) if x is not None]
    return [grad_action.view_as(action), grad_deter, grad_stoch, *flat]
