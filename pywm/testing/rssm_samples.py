"""The rows of the recurrent state-space model; shapes are [T, N] or [H, N], the model's sizes come with the variant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pywm import ops
from pywm.ops import Gaussian, Layer, Policy, RSSMConfig, RSSMParams, RSSMState, _rssm_check
from pywm.testing.sample import OpInfo, Sample, mask, normal

__all__ = ["RSSM_OPS", "RSSM_STEP"]

# Of each cell: the norm and the nonlinearity of its hidden layers, and how many of them its prior has.
_CELLS = {
    "block_gru": ("rms", "silu", 2),
    "layernorm_gru": ("layer", "elu", 1),
    "gru": ("none", "elu", 1),
    "gru_block": ("none", "relu", 1),
}


def _rssm_config(cell: str, classes: int) -> RSSMConfig:
    norm, act, prior_layers = _CELLS[cell]
    # Norms of a few numbers: a smaller eps would make their derivatives differences of large numbers.
    return RSSMConfig(
        deter=4, hidden=3, stoch=2, classes=classes, embed=3, action=2, cell=cell, blocks=2, norm=norm, act=act,
        eps=1e-2, cell_eps=1e-2, prior_layers=prior_layers,
    )  # fmt: skip


def _rssm_layer(wanted: _rssm_check.Expected, g: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors by their names in messages."""
    *blocks, rows, inputs = wanted.weight
    outputs = math.prod(blocks) * rows
    parts = {
        "weight": normal(*wanted.weight, g=g, dtype=dtype) / inputs**0.5,
        "bias": 0.3 * normal(outputs, g=g, dtype=dtype),
    }
    if wanted.norm != "none":
        parts["scale"] = 1 + 0.3 * normal(outputs, g=g, dtype=dtype)
    if wanted.norm == "layer":
        parts["shift"] = 0.3 * normal(outputs, g=g, dtype=dtype)
    return {f"{wanted.name}.{part}": x for part, x in parts.items()}


def _draws(c: RSSMConfig, forced: bool, rows: tuple[int, int], g: torch.Generator, dtype: torch.dtype) -> Any:
    """Noise or samples whose classes no rounding can change: uniforms are near 0 or 1, and no class is that unlikely."""
    shape = (*rows, c.stoch)
    if c.is_gaussian:
        return {"force_stoch" if forced else "noise": normal(*shape, g=g, dtype=dtype)}
    if forced:
        return {"force_stoch": torch.randint(c.classes, shape, generator=g)}
    return {"noise": _extremes(shape, g, dtype)}


def _extremes(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randint(2, shape, generator=g).to(dtype) * (1 - 2**-8)  # bfloat16 has it, too


def _model_tensors(c: RSSMConfig, N: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """A state and the parameters."""
    stoch = (N, c.stoch) if c.is_gaussian else (N, c.stoch, c.classes)
    tensors: dict[str, Tensor | None] = {
        "state.deter": normal(N, c.deter, g=g, dtype=dtype),
        "state.stoch": normal(*stoch, g=g, dtype=dtype),
    }
    cell, prior, posterior = _rssm_check.expected(c)
    for wanted in (*cell, *prior, *posterior):
        if wanted is not None:
            tensors |= _rssm_layer(wanted, g, dtype)
    return tensors


def _rssm_observe(cell: str, classes: int, forced: bool) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        T, N = shape
        c = _rssm_config(cell, classes)
        tensors: dict[str, Tensor | None] = {
            "embed": normal(T, N, c.embed, g=g, dtype=dtype),
            "prev_action": normal(T, N, c.action, g=g, dtype=dtype).tanh(),
            "is_first": mask(shape, g, 0.2),
        }
        tensors |= {**_draws(c, forced, (T, N), g, dtype), **_model_tensors(c, N, g, dtype)}
        return Sample(tensors, {"config": c})

    return build


def _rssm_step(cell: str, classes: int, forced: bool) -> Callable[..., Sample]:
    window = _rssm_observe(cell, classes, forced)

    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        sample = window((1, *shape), g, dtype)
        of_state = ("state.", "params.")
        row: dict[str, Any] = {
            k: x if x is None or k.startswith(of_state) else x[0] for k, x in sample.tensors.items()
        }
        # A step to the posterior does not look at the prior.
        return Sample(row, {**sample.numbers, "prior": _list_of_layers(row, "params.prior")})

    return build


# Of each policy: its kind, and the classes of a categorical one's groups.
_POLICIES: dict[str, tuple[str, tuple[int, ...]]] = {
    "block_gru": ("categorical", (3, 2)),
    "layernorm_gru": ("tanh_normal", ()),
    "gru": ("normal", ()),
    "gru_block": ("categorical", ()),
}


def _imagine(cell: str, classes: int, forced: bool) -> Callable[..., Sample]:
    def build(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Sample:
        H, N = shape
        kind, groups = _POLICIES[cell]
        c = replace(_rssm_config(cell, classes), action=sum(groups) or 2)
        U, outputs = 3, c.action if kind == "categorical" else 2 * c.action
        tensors = _model_tensors(c, N, g, dtype)
        for i, (rows, inputs, norm) in enumerate(((U, c.feat, c.norm), (U, U, c.norm), (outputs, U, "none"))):
            wanted = _rssm_check.Expected(f"policy.layers[{i}]", (rows, inputs), norm)
            tensors |= _rssm_layer(wanted, g, dtype)
        tensors |= _draws(c, forced, (H, N), g, dtype)
        if kind != "categorical":
            tensors["action_noise"] = normal(H, N, c.action, g=g, dtype=dtype)
        elif forced:
            tensors["force_action"] = normal(H, N, c.action, g=g, dtype=dtype).tanh()
        else:
            tensors["action_noise"] = _extremes((H, N, len(groups) or 1), g, dtype)
        return Sample(tensors, {"config": c, "kind": kind, "classes": groups, "horizon": H})

    return build


def _layers(tensors: dict[str, Any], name: str) -> Layer | None:
    parts = [tensors.pop(f"{name}.{part}", _ABSENT) for part in Layer._fields]
    return None if parts[0] is _ABSENT else Layer(*(None if x is _ABSENT else x for x in parts))  # type: ignore[arg-type]


_ABSENT = object()


def _list_of_layers(tensors: dict[str, Any], name: str) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    while (layer := _layers(tensors, f"{name}[{len(layers)}]")) is not None:
        layers.append(layer)
    return tuple(layers)


def _structures(tensors: dict[str, Any], config: RSSMConfig) -> tuple[RSSMParams, RSSMState]:
    """Take the parameters and the state out of tensors with names."""
    cell = [_layers(tensors, f"params.{name}") for name in RSSMParams._fields[1:7]]
    heads = [_list_of_layers(tensors, f"params.{name}") for name in ("prior", "posterior")]
    params = RSSMParams(config, *cell, *heads)  # type: ignore[arg-type]
    return params, RSSMState(tensors.pop("state.deter"), tensors.pop("state.stoch"))


def _joined(x: Tensor | Gaussian) -> Tensor:
    return torch.cat([*x], -1) if isinstance(x, Gaussian) else x


def _rssm_observe_call(sample: Sample) -> tuple[Tensor, ...]:
    tensors: dict[str, Any] = dict(sample.tensors)
    numbers = dict(sample.numbers)
    params, state = _structures(tensors, numbers.pop("config"))
    result = ops.rssm_observe(params, state=state, **tensors, **numbers)
    return result.deter, result.stoch, _joined(result.posterior), _joined(result.prior)


def _usual_dtype(sample: Sample) -> torch.dtype:
    """That of most parameters: a fuzzer may have changed some."""
    found = Counter(getattr(x, "dtype", None) for k, x in sample.tensors.items() if k.startswith("params."))
    dtype = found.most_common(1)[0][0]
    return dtype if dtype is not None and dtype.is_floating_point else torch.float32


def _rssm_step_call(sample: Sample) -> tuple[Tensor, ...]:
    tensors: dict[str, Any] = dict(sample.tensors)
    numbers = dict(sample.numbers)
    params, state = _structures(tensors, numbers.pop("config"))
    dtype = _usual_dtype(sample)
    prior = [
        Layer(*(None if x is None else x.to(dtype) for x in layer))  # type: ignore[arg-type]
        for layer in numbers.pop("prior")
    ]
    result = ops.rssm_step(params._replace(prior=tuple(prior)), state, **tensors, **numbers)
    stats = result.prior if result.posterior is None else result.posterior
    assert stats is not None
    return result.deter, result.stoch, _joined(stats)


def _imagine_call(sample: Sample) -> tuple[Tensor, ...]:
    tensors: dict[str, Any] = dict(sample.tensors)
    numbers = dict(sample.numbers)
    c = numbers.pop("config")
    params, state = _structures(tensors, c)
    options = {"norm": c.norm, "act": c.act, "eps": c.eps}
    layers = _list_of_layers(tensors, "policy.layers")
    policy = Policy(layers, kind=numbers.pop("kind"), classes=numbers.pop("classes"), **options)
    result = ops.imagine(params, policy, state, numbers.pop("horizon"), **tensors, **numbers)
    assert result.policy is not None
    return result.deter, result.stoch, result.action, _joined(result.prior), result.policy


def _rssm_variants(
    build: Callable[[str, int, bool], Callable[..., Sample]],
) -> dict[str, Callable[..., Sample]]:
    """Each cell with the latents of the model that it comes from, forced or drawn; other tests have all the mixtures."""
    return {
        "plain": build("block_gru", 3, True),
        "layernorm_gru": build("layernorm_gru", 3, False),
        "gru_gaussian": build("gru", 0, False),
        "gru_block_gaussian": build("gru_block", 0, True),
    }


def _floats_of(variants: Mapping[str, Callable[..., Sample]], *constant: str) -> tuple[str, ...]:
    """The names of all float tensors in some variant that are not constants to the gradient."""
    g = torch.Generator()
    samples = [build((1, 1), g, torch.float32) for build in variants.values()]
    found = {k: x for sample in samples for k, x in sample.tensors.items()}
    floats = [k for k, x in found.items() if isinstance(x, Tensor) and x.is_floating_point()]
    return tuple(k for k in floats if not k.startswith(constant))


_RSSM_OBSERVE = _rssm_variants(_rssm_observe)
_IMAGINE = _rssm_variants(_imagine)
_RSSM_NO_DERIVATIVE = (
    "plain",
    "layernorm_gru",
    "gru_block_gaussian",
)  # classes, or a forced sample: a constant
_RSSM_TOL = {torch.float32: (1e-3, 1e-4), torch.float64: (1e-9, 1e-9)}
_RSSM_SHAPES = ((2, 2), (1, 1), (3, 1), (1, 17), (2, 0), (3, 9))

RSSM_OPS: tuple[OpInfo, ...] = (
    OpInfo(
        name="rssm_observe",
        call=_rssm_observe_call,
        variants=_RSSM_OBSERVE,
        outputs=("deter", "stoch", "posterior", "prior"),
        differentiable=_floats_of(_RSSM_OBSERVE, "noise", "force_stoch"),
        kernels=("rssm_observe", "rssm_observe_backward"),
        shapes=_RSSM_SHAPES,
        differentiable_outputs=4,
        no_derivative=_RSSM_NO_DERIVATIVE,
        torch_products=True,
        devices=("cpu",),  # on CUDA it is made of products and row kernels, which tests of their own look at
        tol=_RSSM_TOL,
    ),
    OpInfo(
        name="imagine",
        call=_imagine_call,
        variants=_IMAGINE,
        outputs=("deter", "stoch", "action", "prior", "policy"),
        differentiable=_floats_of(_IMAGINE, "noise", "action_noise", "force_stoch", "params.posterior"),
        kernels=("rssm_imagine", "rssm_imagine_backward"),
        shapes=_RSSM_SHAPES,
        differentiable_outputs=5,
        no_derivative=tuple(_IMAGINE),  # no gradient goes from the policy's actions to the state that it saw
        torch_products=True,
        dispatched=False,
        devices=("cpu",),
        tol=_RSSM_TOL,
    ),
)

# Not among them: with gradients a step is made of other ops. The fuzzer calls it all the same.
RSSM_STEP = OpInfo(
    name="rssm_step",
    call=_rssm_step_call,
    variants=_rssm_variants(_rssm_step),
    outputs=("deter", "stoch", "posterior"),
    differentiable=_floats_of(_RSSM_OBSERVE, "noise", "force_stoch", "params.prior"),
    kernels=("rssm_act",),
    shapes=((2,), (1,), (5,), (0,), (70,)),
    differentiable_outputs=3,
    no_derivative=_RSSM_NO_DERIVATIVE,
    torch_products=True,
    dispatched=False,
    devices=("cpu",),
    tol=_RSSM_TOL,
)
