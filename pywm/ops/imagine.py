"""Imagination: policy, cell, prior and sample for a whole horizon in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pywm.ops import (
    _check,
    _native,
    _operands,
    _rssm_check,
    imagine_backward,
    reference_rssm,
    rssm_products,
    rssm_scan,
)
from pywm.ops._registry import is_traced, is_transformed, plain, plain_optional, served
from pywm.ops.cuda_graphs import graphs
from pywm.ops.rssm_params import NORMS, POLICIES, Gaussian, Layer, Policy, RSSMParams, RSSMState

__all__ = ["Imagined", "imagine"]


class Imagined(NamedTuple):
    """Result of :func:`imagine`; all time-major, N trajectories.

    Attributes:
        deter: ``[H + 1, N, D]``; row 0 is the start.
        stoch: ``[H + 1, N, S, K]`` one-hot floats, or ``[H + 1, N, S]`` for Gaussian latents.
        index: ``[H + 1, N, S]`` uint8, the classes; None for Gaussian latents.
        action: ``[H, N, A]``; row t is taken in state t.
        prior: logits ``[H, N, S, K]`` of what row t + 1 was drawn from, or a :class:`Gaussian`.
        policy: ``[H, N, outputs]`` of the policy network, or None if it is a function.
        path: ``"kernel"`` if one compiled call did it all, ``"products"`` if torch's products and row kernels did (CUDA, in
            one recorded graph from the second call on), ``"steps"`` if PyTorch went step by step.
    """

    deter: Tensor
    stoch: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    action: Tensor
    prior: Tensor | Gaussian
    policy: Tensor | None
    path: str

    @property
    def feat(self) -> Tensor:
        """``[H + 1, N, D + S·K]``: what heads take."""
        return torch.cat([self.deter, self.stoch.flatten(2)], -1)


def imagine(
    params: RSSMParams,
    policy: Policy | Callable[[Tensor], Tensor],
    state: RSSMState,
    horizon: int,
    *,
    noise: Tensor | None = None,
    action_noise: Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    force_stoch: Tensor | None = None,
    force_action: Tensor | None = None,
) -> Imagined:
    r"""Imagine ``horizon`` steps from N starts: the policy acts on the state, the prior goes on from there.

    One compiled call if the policy is a :class:`Policy`, and on the CPU one more for its gradient, through the dynamics
    (as in DreamerV1; DreamerV3's goes through the actions' probabilities only). Otherwise PyTorch goes step by step. Either
    way it is differentiable, by a kernel once, in the model, the policy, the start and ``force_action``; features reach the
    policy without gradient, as in all Dreamers.

    Args:
        params: the model.
        policy: a :class:`Policy`, or any function from ``feat [N, D + S·K]`` to actions ``[N, A]``.
        state: N starts; flatten a window's states time-major. The stoch may be floats or uint8 classes.
        horizon: H, at least 1.
        noise: ``[H, N, S]`` uniforms in [0, 1), or normals for Gaussian latents; drawn if None, from torch's generator or
            by counting from a seed.
        action_noise: ``[H, N, groups]`` uniforms for categorical policies, ``[H, N, A]`` normals for others; likewise.
            None if the policy is a function.
        seed: 64-bit key of :func:`pywm.ops.philox_uniform`, whose counter is (row, offset + t, 0 for states or 1 for
            actions): the same numbers on every device.
        offset: number of the first step.
        force_stoch: ``[H, N, S]`` integer classes (Gaussian: floats) to take instead of samples.
        force_action: ``[H, N, A]`` actions to take instead of the policy's.

    Returns:
        :class:`Imagined`, dtype and device of ``state.deter``.

    Raises:
        TypeError: an argument is not what it should be, or dtypes differ.
        ValueError: shapes, devices or numbers differ from what the configuration says.

    Source:
        Hafner et al. (2020), (2021), (2023).
    """
    function = "imagine"
    c = _rssm_check.model(function, params)
    _rssm_check.pair(function, state)
    if full := _rssm_check.full_precision(function, params, *state, noise, action_noise, force_action):
        deter, stoch, noise, action_noise, force_action = full
        options: dict[str, Any] = {
            "noise": noise,
            "action_noise": action_noise,
            "seed": seed,
            "offset": offset,
        }
        with torch.autocast(deter.device.type, enabled=False):
            options |= {"force_stoch": force_stoch, "force_action": force_action}
            return imagine(params, policy, RSSMState(deter, stoch), horizon, **options)
    first = _check.tensor(function, "state.deter", state[0])
    if first.ndim != 2 or first.shape[1] != c.deter:
        raise ValueError(
            f"{function}: state.deter is {tuple(first.shape)}, but [N, D] = [N, {c.deter}] was expected"
        )
    _rssm_check.parameters(function, params, first)
    params = rssm_scan.as_multiplied(params, first)
    c = params.config
    N = first.shape[0]
    horizon = _check.integer(function, "horizon", horizon, 1, 2**31 - 1)
    network = policy if isinstance(policy, Policy) else None
    if network is None and not callable(policy):
        raise TypeError(
            f"{function}: policy is a {type(policy).__name__}, but a Policy or a function was expected"
        )
    if network is None and action_noise is not None:
        raise ValueError(
            f"{function}: action_noise is a {type(action_noise).__name__}, but None was expected, as policy is a "
            "function, which draws its own"
        )
    deter, stoch = _rssm_check.state(function, params, state, N, first)
    force = _rssm_check.force(function, force_stoch, (horizon, N, c.stoch), c, first)
    shape: tuple[int, ...] = (horizon, N, c.stoch)
    noise = _rssm_check.noise(function, noise, seed, offset, shape, c, first, needed=force is None)
    if force_action is not None:
        force_action = _rssm_check.floats(
            function, "force_action", force_action, (horizon, N, c.action), first
        )
    if network is not None:
        _check_policy(function, network, params, first)
        shape = (horizon, N, network.noise)
        normal = network.kind != "categorical"
        action_noise = _rssm_check.draw(
            function,
            "action_noise",
            action_noise,
            seed,
            offset,
            1,
            shape,
            normal,
            first,
            needed=force_action is None,
        )
    if network is not None and _is_served(
        params, network, first, state[1], force_action, noise, action_noise, force
    ):
        return _kernel(
            params, network, deter, stoch, state[1], horizon, noise, action_noise, force, force_action
        )
    if _native.supports(first):  # one step at a time, rounding weights takes longer than it saves
        params = rssm_scan.in_float32(params)
    start = stoch if c.is_gaussian else stoch.unflatten(-1, (c.stoch, c.classes))
    acting = network if network is not None else _checked(policy, (N, c.action), first)  # type: ignore[arg-type]
    rows = reference_rssm.imagine(
        params, acting, deter, stoch, horizon, noise, action_noise, force, force_action
    )
    deters, stochs, indices, actions, priors, outputs = rows
    index = None
    if not c.is_gaussian:
        index = torch.stack([_classes(start), *indices])  # type: ignore[list-item]
    return Imagined(
        torch.stack([deter, *deters]),
        _rssm_check.shaped(torch.stack([stoch, *stochs]), c),
        index,
        torch.stack(actions),
        reference_rssm.distribution(torch.stack(priors), c),
        None if network is None else torch.stack(outputs),
        "steps",
    )


def _classes(stoch: Tensor) -> Tensor:
    return stoch.argmax(-1).to(torch.uint8)


def _checked(
    policy: Callable[[Tensor], Tensor], shape: tuple[int, int], first: Tensor
) -> Callable[[Tensor], Tensor]:
    """The same function, whose actions are looked at."""

    def act(feat: Tensor) -> Tensor:
        return _rssm_check.floats("imagine", "policy's action", policy(feat), shape, first)

    return act


def _check_policy(function: str, policy: Policy, params: RSSMParams, first: Tensor) -> None:
    c = params.config
    width, last = c.feat, len(policy.layers) - 1
    if policy.action != c.action:
        outputs = c.action if policy.kind == "categorical" else 2 * c.action
        raise ValueError(
            f"{function}: policy.layers[{last}].weight is {tuple(policy.layers[last].weight.shape)}, but {outputs} "
            f"outputs were expected, as the model's actions are {c.action} wide"
        )
    for i, layer in enumerate(policy.layers):
        name = f"policy.layers[{i}]"
        weight = _check.tensor(function, f"{name}.weight", layer.weight)
        if weight.ndim != 2 or weight.shape[0] < 1:
            raise ValueError(
                f"{function}: {name}.weight is {tuple(weight.shape)}, but [U, {width}] with U >= 1 was expected"
            )
        outputs = weight.shape[0]
        norm = "none" if i == last else policy.norm
        _rssm_check.one_layer(function, _rssm_check.Expected(name, (outputs, width), norm), layer, first)
        width = outputs


def _tensors(params: RSSMParams, policy: Policy) -> list[Tensor]:
    return _layers_tensors([layer for _, layer in params.layers()]) + _layers_tensors(policy.layers)


def _layers_tensors(layers: Sequence[Layer]) -> list[Tensor]:
    return [x for layer in layers for x in layer if x is not None]


def _is_served(
    params: RSSMParams,
    policy: Policy,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor | None,
    *inputs: Tensor | None,
) -> bool:
    if not rssm_scan.is_served(deter, params.config) or deter.shape[0] == 0:
        return False
    if torch.compiler.is_compiling() or is_transformed():
        return False
    widths = {layer.weight.shape[0] for layer in policy.layers[:-1]}
    if (
        len(widths) != 1
        or len(policy.layers) > 16
        or len(params.prior) > 16
        or max(policy.groups, default=0) > 256
    ):
        return False
    tensors = _tensors(params, policy)
    if is_traced(deter, stoch, action, *inputs, *tensors):
        return False
    # On CUDA, gradients go step by step.
    return not (rssm_scan.by_products(deter) and _wants_gradients(deter, stoch, action, *tensors))


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _kernel(
    params: RSSMParams,
    policy: Policy,
    deter: Tensor,
    stoch: Tensor,
    given: Tensor,
    horizon: int,
    noise: Tensor | None,
    action_noise: Tensor | None,
    force: Tensor | None,
    force_action: Tensor | None,
) -> Imagined:
    _native.let_products_work()
    c = params.config
    N, D, Z = deter.shape[0], c.deter, c.stoch_width
    start = deter, stoch
    deter, stoch = plain(deter.detach()), plain(stoch.detach())
    tensors, present = rssm_scan.flat(params)
    scan = rssm_scan.Scan.of(c, present)
    layers = scan.layers([plain(x.detach()) for x in tensors])
    prior = _plain_layers(params.prior)
    network = _plain_layers(policy.layers)
    if rssm_scan.by_products(deter):
        index0 = given if given.dtype == torch.uint8 else _classes(stoch.unflatten(-1, (c.stoch, c.classes)))
        inputs = (deter, stoch, index0, noise, action_noise, force, force_action)
        own = [Layer(*layer) for layer in prior], policy, [Layer(*layer) for layer in network]
        options = policy.kind, policy.groups, policy.norm, policy.act, policy.eps, policy.unimix
        deters, stochs, classes, action, stats, outputs = graphs.run(
            "imagine",
            (*scan.sizes, *scan.numbers, *options, policy.min_std, policy.max_std, horizon, c.action),
            functools.partial(rssm_products.imagine, c, layers, *own, horizon),
            [x for layer in (*layers.values(), *prior, *network) for x in layer if x is not None],
            [plain_optional(x) for x in inputs],
        )
        shown = reference_rssm.distribution(stats, c)
        return Imagined(deters, _rssm_check.shaped(stochs, c), classes, action, shown, outputs, "products")
    new = _native.module().new_output
    deters, stochs = (served(new(deter, (horizon + 1, N, width), False), "imagine") for width in (D, Z))
    deters[0].copy_(deter)
    stochs[0].copy_(stoch)
    index = None
    if not c.is_gaussian:
        index = served(new(deter, (horizon + 1, N, c.stoch), True), "imagine")
        index[0] = (
            given if given.dtype == torch.uint8 else _classes(stoch.unflatten(-1, (c.stoch, c.classes)))
        )
    action_in = layers.get("action_in")
    acts = {"none": 0, "silu": 2, "elu": 3, "relu": 4}
    form: tuple[Any, ...] = (
        network,
        policy.layers[0].weight.shape[0],
        policy.layers[-1].weight.shape[0],
        NORMS.index(policy.norm),
        acts[policy.act],
        policy.eps,
        POLICIES.index(policy.kind),
        policy.groups,
        policy.unimix,
        policy.min_std,
        policy.max_std,
    )
    result = _native.module().rssm_imagine(
        scan.form(),
        rssm_scan.kernel_layers(layers),
        None if action_in is None else (tuple(action_in),),
        prior,
        form,
        _operands.linear(stochs[0], Layer(layers["stoch_in"].weight[:, :Z]), c.operands),
        _operands.linear(stochs[0], Layer(network[0][0][:, D:]), c.operands),
        plain_optional(noise),
        plain_optional(action_noise),
        plain_optional(force),
        plain_optional(None if force_action is None else force_action.detach()),
        deters,
        stochs,
        index,
        _wants_gradients(*_layers_tensors(policy.layers)),
    )
    if result is None:
        _rssm_check.refused("imagine", force, c)
    *made, kept = served(result, "imagine")
    rows = imagine_backward.Rows(deters, stochs, *made)
    if _wants_gradients(*start, force_action, *_tensors(params, policy)):
        rows = imagine_backward.differentiable(
            params, policy, rows, kept, index, *start, noise, action_noise, force_action
        )
    shown = reference_rssm.distribution(rows.prior, c)
    stochs = _rssm_check.shaped(rows.stoch, c)
    return Imagined(rows.deter, stochs, index, rows.action, shown, rows.policy, "kernel")


def _plain_layers(layers: Any) -> tuple[Any, ...]:
    return tuple(tuple(None if x is None else plain(x.detach()) for x in layer) for layer in layers)
