"""Checks of the arguments that the recurrent state-space models' functions share, and the noise that they draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pywm.ops import _check
from pywm.ops.philox import philox_normal, philox_uniform
from pywm.ops.rssm_params import RSSMConfig, RSSMParams


def model(function: str, params: object) -> RSSMConfig:
    if not isinstance(params, RSSMParams):
        raise TypeError(f"{function}: params is a {type(params).__name__}, but RSSMParams were expected")
    return params.config


def floats(function: str, name: str, x: object, shape: tuple[int, ...], first: Tensor) -> Tensor:
    x = _check.tensor(function, name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{function}: {name} is {tuple(x.shape)}, but {shape} was expected")
    _check.like(function, name, x, "the first tensor", first)
    return x


def mask(function: str, name: str, x: object, shape: tuple[int, ...], first: Tensor) -> Tensor:
    x = _check.tensor(function, name, x, _check.MASK_DTYPES)
    if tuple(x.shape) != shape:
        raise ValueError(f"{function}: {name} is {tuple(x.shape)}, but {shape} was expected")
    _check.same_device(function, name, x, "the first tensor", first)
    return x if x.dtype == torch.bool else x != 0


def state(function: str, params: RSSMParams, state: object, N: int, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return deter and the flat stoch, as floats."""
    c = params.config
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{function}: state is a {type(state).__name__}, but an RSSMState was expected")
    deter = floats(function, "state.deter", state[0], (N, c.deter), first)
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
    return deter, floats(function, "state.stoch", stoch, shape, first).flatten(1)


def force(
    function: str, force: object, shape: tuple[int, ...], c: RSSMConfig, first: Tensor
) -> Tensor | None:
    if force is None:
        return None
    if c.is_gaussian:
        return floats(function, "force_stoch", force, shape, first)
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
    if noise is not None:
        if seed is not None:
            raise ValueError(f"{function}: seed is {seed}, but None was expected, as {name} was given")
        return floats(function, name, noise, shape, first).detach()
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


def shaped(stoch: Tensor, c: RSSMConfig) -> Tensor:
    return stoch if c.is_gaussian else stoch.unflatten(-1, (c.stoch, c.classes))


def full_precision(params: object, *tensors: object) -> list[Any] | None:
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
