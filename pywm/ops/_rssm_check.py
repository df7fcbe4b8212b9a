"""Checks of the arguments that the recurrent state-space models' functions share, and the noise that they draw."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pywm.ops import _check
from pywm.ops._registry import is_traced
from pywm.ops.philox import philox_normal, philox_uniform
from pywm.ops.rssm_params import Layer, RSSMConfig, RSSMParams

# The argument of each function that sets the sizes, the dtype and the device of the others.
_FIRST = {"rssm_observe": "embed", "rssm_step": "prev_action", "imagine": "state.deter"}


def _like(function: str, name: str, x: Tensor, first: Tensor) -> None:
    _check.like(function, name, x, _FIRST[function], first)


def _same_device(function: str, name: str, x: Tensor, first: Tensor) -> None:
    _check.same_device(function, name, x, _FIRST[function], first)


def _shape(function: str, name: str, x: Tensor, shape: tuple[int, ...], first: Tensor) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{function}: {name} is {tuple(x.shape)}, but {shape} was expected, as {_FIRST[function]} is "
            f"{tuple(first.shape)}"
        )


def model(function: str, params: object) -> RSSMConfig:
    if not isinstance(params, RSSMParams):
        raise TypeError(f"{function}: params is a {type(params).__name__}, but RSSMParams were expected")
    if not isinstance(params.config, RSSMConfig):
        raise TypeError(
            f"{function}: params.config is a {type(params.config).__name__}, but an RSSMConfig was expected"
        )
    return params.config


def embeddings(function: str, embed: object, c: RSSMConfig) -> Tensor:
    """Check a window's embeddings, which set the sizes, the dtype and the device of all else."""
    x = _check.tensor(function, "embed", embed)
    if x.ndim != 3 or x.shape[2] != c.embed or x.shape[0] < 1:
        raise ValueError(
            f"{function}: embed is {tuple(x.shape)}, but [T, N, E] = [T, N, {c.embed}] with T >= 1 was expected"
        )
    return x


def pair(function: str, state: object) -> tuple[object, object]:
    """Check that a state has two parts; what they are is checked by :func:`state`."""
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{function}: state is a {type(state).__name__}, but an RSSMState was expected")
    return state


class Expected(NamedTuple):
    """A layer as a configuration wants it, with its name in messages; a bias may be missing unless ``biased``."""

    name: str
    weight: tuple[int, ...]
    norm: str
    biased: bool = False


@functools.lru_cache(maxsize=64)
def expected(
    c: RSSMConfig,
) -> tuple[tuple[Expected | None, ...], tuple[Expected, ...], tuple[Expected, ...]]:
    """The layers of the cell, of the prior and of the posterior; None where the cell has none."""
    D, H, Z, A, G = c.deter, c.hidden, c.stoch_width, c.action, c.blocks
    block = c.cell == "block_gru"
    gates = {
        "block_gru": Expected("params.gates", (G, 3 * D // G, D // G), "none", True),
        "layernorm_gru": Expected("params.gates", (3 * D, H + D), "layer"),
        "gru": Expected("params.gates", (3 * D, H), "none"),
        "gru_block": Expected("params.gates", (2 * D, H + D), "none"),
    }[c.cell]
    candidate = {"gru": (3 * D, D), "gru_block": (D, H + D)}.get(c.cell)
    cell = (
        Expected("params.deter_in", (H, D), c.norm) if block else None,
        Expected("params.stoch_in", (H, Z if block else Z + A), c.norm),
        Expected("params.action_in", (H, A), c.norm) if block else None,
        Expected("params.hidden", (G, D // G, D // G + 3 * H), c.norm) if block else None,
        gates,
        Expected("params.candidate", candidate, "none") if candidate else None,
    )
    widths = [D] + [H] * c.prior_layers
    prior = [Expected(f"params.prior[{i}]", (H, width), c.norm) for i, width in enumerate(widths[:-1])]
    prior.append(Expected(f"params.prior[{c.prior_layers}]", (c.stats_width, H), "none"))
    posterior = (
        Expected("params.posterior[0]", (H, D + c.embed), c.norm),
        Expected("params.posterior[1]", (c.stats_width, H), "none"),
    )
    return cell, tuple(prior), posterior


def parameters(function: str, params: RSSMParams, first: Tensor) -> None:
    """Check all tensors of a model against its configuration, and against the dtype and device of the first argument."""
    operands = params.config.operands
    if operands != "float32" and first.dtype != torch.float32:
        raise TypeError(
            f"{function}: {_FIRST[function]} is {first.dtype}, but torch.float32 was expected, as the operands are "
            f"{operands}"
        )
    if torch.compiler.is_compiling():
        return  # torch.compile checks the products' shapes itself, and does not trace what is cached
    cell, prior, posterior = expected(params.config)
    for wanted, layer in zip(cell, params[1:7], strict=True):
        if wanted is not None:
            one_layer(function, wanted, layer, first)
        elif layer is not None:
            names = ", ".join(e.name.removeprefix("params.") for e in cell if e is not None)
            raise ValueError(
                f"{function}: params has other layers than {names}, which a {params.config.cell} has"
            )
    for name, all_wanted in (("prior", prior), ("posterior", posterior)):
        layers = getattr(params, name)
        if not isinstance(layers, tuple | list) or len(layers) != len(all_wanted):
            count = len(layers) if isinstance(layers, tuple | list) else f"a {type(layers).__name__}"
            raise ValueError(
                f"{function}: params.{name} is {count}, but {len(all_wanted)} layers were expected"
            )
        for wanted, layer in zip(all_wanted, layers, strict=True):
            one_layer(function, wanted, layer, first)


def one_layer(function: str, wanted: Expected, layer: object, first: Tensor) -> None:
    """Check a layer's tensors."""
    if type(layer) is Layer:  # nothing to say, in most calls
        weight, bias, scale, shift = layer
        shape, norm = wanted.weight, wanted.norm
        if (
            _fits(weight, shape, first)
            and (_fits(bias, (_outputs(shape),), first) if bias is not None else not wanted.biased)
            and (scale is None if norm == "none" else _fits(scale, (_outputs(shape),), first))
            and (_fits(shift, (_outputs(shape),), first) if norm == "layer" else shift is None)
        ):
            return
    name = wanted.name
    if not isinstance(layer, tuple) or len(layer) != 4:
        raise TypeError(f"{function}: {name} is a {type(layer).__name__}, but a Layer was expected")
    outputs = (_outputs(wanted.weight),)
    has_scale, has_shift = wanted.norm != "none", wanted.norm == "layer"
    parts = {"weight": (wanted.weight, True), "bias": (outputs, wanted.biased)}
    parts |= {"scale": (outputs, has_scale), "shift": (outputs, has_shift)}
    for (part, (shape, needed)), x in zip(parts.items(), layer, strict=True):
        if x is None and not needed:
            continue
        if x is not None and not needed and part != "bias":
            raise ValueError(
                f"{function}: {name}.{part} is a tensor, but None was expected, as its norm is {wanted.norm}"
            )
        x = _check.tensor(function, f"{name}.{part}", x)
        if tuple(x.shape) != shape:
            why = "" if part == "weight" else f", as {name}.weight is {wanted.weight}"
            raise ValueError(f"{function}: {name}.{part} is {tuple(x.shape)}, but {shape} was expected{why}")
        _like(function, f"{name}.{part}", x, first)


def _outputs(weight: tuple[int, ...]) -> int:
    return weight[0] if len(weight) == 2 else weight[0] * weight[1]


def _fits(x: object, shape: tuple[int, ...], first: Tensor) -> bool:
    return (
        (type(x) is torch.nn.Parameter or type(x) is Tensor)
        and not x.is_nested  # it has no shape to look at
        and x.shape == shape
        and x.dtype == first.dtype
        and x.device == first.device
        and x.layout == torch.strided
    )


def floats(function: str, name: str, x: object, shape: tuple[int, ...], first: Tensor) -> Tensor:
    x = _check.tensor(function, name, x)
    _shape(function, name, x, shape, first)
    _like(function, name, x, first)
    return x


def mask(function: str, name: str, x: object, shape: tuple[int, ...], first: Tensor) -> Tensor:
    x = _check.tensor(function, name, x, _check.MASK_DTYPES)
    _shape(function, name, x, shape, first)
    _same_device(function, name, x, first)
    return x if x.dtype == torch.bool else x != 0


def state(function: str, params: RSSMParams, state: object, N: int, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return deter and the flat stoch, as floats."""
    c = params.config
    given, stoch = pair(function, state)
    deter = floats(function, "state.deter", given, (N, c.deter), first)
    if isinstance(stoch, Tensor) and stoch.dtype == torch.uint8 and not c.is_gaussian:
        _check.tensor(function, "state.stoch", stoch, (torch.uint8,))
        if tuple(stoch.shape) != (N, c.stoch):
            raise ValueError(
                f"{function}: state.stoch is {tuple(stoch.shape)} uint8, but {(N, c.stoch)} was expected, as "
                f"{_FIRST[function]} is {tuple(first.shape)}"
            )
        _same_device(function, "state.stoch", stoch, first)
        _classes(function, "state.stoch", stoch, c)
        return deter, functional.one_hot(stoch.long(), c.classes).to(first.dtype).flatten(1)
    shape = (N, c.stoch) if c.is_gaussian else (N, c.stoch, c.classes)
    return deter, floats(function, "state.stoch", stoch, shape, first).flatten(1)


def force(
    function: str, force: object, shape: tuple[int, ...], c: RSSMConfig, first: Tensor
) -> Tensor | None:
    if force is None:
        return None
    if c.is_gaussian:
        return floats(function, "force_stoch", force, shape, first).detach()
    x = _check.tensor(function, "force_stoch", force, _check.INTEGER_DTYPES)
    _shape(function, "force_stoch", x, shape, first)
    _same_device(function, "force_stoch", x, first)
    _classes(function, "force_stoch", x, c)
    if x.dtype == torch.uint8:
        return x
    # What could not be read is cut to 255, and does not wrap around to a class: the kernels refuse it.
    return x.long().clamp(-1, 255).to(torch.uint8)


def refused(function: str, force: Tensor | None, c: RSSMConfig) -> None:
    """Raise if it is for the classes in ``force``, which nobody could read before, that a kernel declined a call."""
    if force is not None and not c.is_gaussian and force.numel() and int(force.max()) >= c.classes:
        raise ValueError(
            f"{function}: force_stoch is out of range somewhere, but classes in [0, {c.classes}) were expected"
        )


def _classes(function: str, name: str, x: Tensor, c: RSSMConfig) -> None:
    """Check numbers that are there to be read without waiting for a device or breaking a graph."""
    if torch.compiler.is_compiling() or is_traced(x) or x.device.type != "cpu" or x.numel() == 0:
        return
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= c.classes:
        raise ValueError(
            f"{function}: {name} is {low if low < 0 else high} somewhere, but classes in [0, {c.classes}) were expected"
        )


def noise(
    function: str,
    noise: object,
    seed: object,
    offset: object,
    shape: tuple[int, ...],
    c: RSSMConfig,
    first: Tensor,
    needed: bool,
) -> Tensor | None:
    return draw(function, "noise", noise, seed, offset, 0, shape, c.is_gaussian, first, needed)


def draw(
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
    if seed is not None:
        seed = _check.integer(function, "seed", seed, 0, 2**64 - 1)
    steps = shape[0] if len(shape) == 3 and seed is not None else 1
    offset = _check.integer(function, "offset", offset, 0, 2**32 - steps)
    if noise is not None:
        if seed is not None:
            raise ValueError(f"{function}: seed is {seed}, but None was expected, as {name} was given")
        return floats(function, name, noise, shape, first).detach()
    if not needed:
        return None
    if seed is not None:
        T, N, S = shape if len(shape) == 3 else (1, *shape)
        count = philox_normal if normal else philox_uniform
        dtype = first.dtype if first.dtype in _check.KERNEL_DTYPES else torch.float32
        drawn = count(seed, offset, (T, N, S), stream=stream, device=first.device, dtype=dtype)
        return drawn.view(shape).to(first.dtype)
    draw = torch.randn if normal else torch.rand
    return draw(shape, dtype=first.dtype, device=first.device)


def shaped(stoch: Tensor, c: RSSMConfig) -> Tensor:
    return stoch if c.is_gaussian else stoch.unflatten(-1, (c.stoch, c.classes))


def full_precision(function: str, params: RSSMParams, *tensors: object) -> list[Any] | None:
    """Under autocast, the tensors in the dtype of the parameters; else None.

    The recurrence keeps its state in full precision, as Dreamer does with its norms and losses.
    """
    x = tensors[0]
    if not isinstance(x, Tensor) or x.device.type == "meta":  # there is no autocast of meta
        return None
    if not torch.is_autocast_enabled(x.device.type):
        return None
    if not isinstance(params.gates, Layer):
        raise TypeError(
            f"{function}: params.gates is a {type(params.gates).__name__}, but a Layer was expected"
        )
    dtype = _check.tensor(function, "params.gates.weight", params.gates.weight).dtype
    return [t.to(dtype) if _is_dense_float(t) else t for t in tensors]  # type: ignore[attr-defined]


def _is_dense_float(x: object) -> bool:
    """Whether a cast does not fail; what it would fail for is refused by the checks."""
    return (
        isinstance(x, Tensor)
        and not isinstance(x, UninitializedParameter | UninitializedBuffer)
        and not (x.is_nested or x.is_quantized)
        and x.layout is torch.strided
        and x.is_floating_point()
    )
