"""Regression by classification over bins of many sizes: the public functions, the dispatcher's ops, their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pywm.ops import _check, _native, reference
from pywm.ops._registry import (
    define,
    differentiate,
    eager,
    empty_like,
    in_float32,
    is_transformed,
    is_watched,
    plain,
    plain_optional,
    served,
)

MAX_BINS = 1023
"""Bins that the kernels keep at hand; more go to the reference."""

_entry = _native.entry("symexp_twohot_loss")
_entry_mean = _native.entry("symexp_twohot_mean")


def symexp_twohot_loss(
    logits: Tensor, target: Tensor, other: Tensor | None = None, *, other_scale: float = 1.0
) -> Tensor:
    r"""Return the cross-entropy of a two-hot target over symexp bins, or the sum of two targets' cross-entropies.

    .. math::
        b_i = \mathrm{symexp}(x_i), \quad x = \mathrm{linspace}(-20, 20, B), \quad
        \mathrm{symexp}(x) = \mathrm{sign}(x)(e^{|x|} - 1)

    .. math::
        w_i = \frac{b_{i+1} - y}{b_{i+1} - b_i}, \quad w_{i+1} = 1 - w_i \quad (b_i \le y < b_{i+1}), \qquad
        L = -\sum_j (w_j + s\, w'_j) \ln \mathrm{softmax}(l)_j

    The target is interpolated linearly between the two bins around it, as it is, not its logarithm; so the expectation of
    the two-hot is the target. Targets beyond the outermost bins, about ±4.85e8, are clipped.

    Args:
        logits: ``[..., B]`` float32 or float64 (float16 and bfloat16 through the reference), B odd, usually 255.
        target: y, ``[...]``, in its own units; a constant.
        other: y', likewise, or None for one target only. Dreamer V3's critic learns two at once, the returns and what its
            slow copy says, from one pass over the logits.
        other_scale: s >= 0, the weight of the other target's cross-entropy.

    Returns:
        ``[...]``, in nats. Differentiable once in logits. Compiled for B <= 1023; more bins run the reference.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: B is even or less than 3, shapes do not fit, devices differ, or ``other_scale`` is negative or infinite.

    Source:
        Hafner et al. (2023), "Mastering diverse domains through world models", eq. 9 and 10.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(logits, target, other, other_scale, False)
        if result is NotImplemented:
            return _eager(logits, target, other, float(other_scale))  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    first = _check_logits("symexp_twohot_loss", logits)
    _check.rows("symexp_twohot_loss", "target", target, "logits", first)
    if other is not None:
        _check.rows("symexp_twohot_loss", "other", other, "logits", first)
    scale = _check.number("symexp_twohot_loss", "other_scale", other_scale, finite=True)
    if _goes_to_the_reference(first):
        return in_float32(reference.symexp_twohot_loss, logits, target, other, scale)  # type: ignore[no-any-return]
    return torch.ops.pywm.symexp_twohot_loss(logits, target, other, scale)  # type: ignore[no-any-return]


def symexp_twohot_mean(logits: Tensor) -> Tensor:
    r"""Return the mean of a categorical distribution over symexp bins.

    .. math::
        \bar y = \sum_i \mathrm{softmax}(l)_i\, b_i

    with the bins of :func:`symexp_twohot_loss`. Bins of opposite sign are added first, so that equal logits, those of a
    new network, give exactly 0.

    Args:
        logits: ``[..., B]`` float32 or float64 (float16 and bfloat16 through the reference), B odd, usually 255.

    Returns:
        ``[...]``, in the units of the target. Differentiable once. Compiled for B <= 1023; more bins run the reference.

    Raises:
        TypeError: logits is not a dense float tensor.
        ValueError: B is even or less than 3.

    Source:
        Hafner et al. (2023), "Mastering diverse domains through world models", eq. 8.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry_mean(logits, False)
        if result is NotImplemented:
            return _eager_mean(logits)  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    first = _check_logits("symexp_twohot_mean", logits)
    if _goes_to_the_reference(first):
        return in_float32(reference.symexp_twohot_mean, logits)  # type: ignore[no-any-return]
    return torch.ops.pywm.symexp_twohot_mean(logits)  # type: ignore[no-any-return]


def _check_logits(function: str, logits: object) -> Tensor:
    first = _check.tensor(function, "logits", logits)
    if first.ndim < 1 or first.shape[-1] < 3 or first.shape[-1] % 2 == 0:
        raise ValueError(
            f"{function}: logits is {tuple(first.shape)}, but [..., B] with B odd and at least 3 was expected"
        )
    return first


def _goes_to_the_reference(logits: Tensor) -> bool:
    return is_transformed() or not _native.supports(logits) or logits.shape[-1] > MAX_BINS


# ---- the loss ---------------------------------------------------------------------------------------------------------


def _fake(logits, target, other, other_scale):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[:-1])


def _forward(logits, target, other, other_scale):  # type: ignore[no-untyped-def]
    result = _entry(plain(logits), plain(target), plain_optional(other), other_scale, True)
    return served(result, "symexp_twohot_loss")


def _fake_backward(grad, logits, target, other, other_scale):  # type: ignore[no-untyped-def]
    return empty_like(logits)


def _backward(grad, logits, target, other, other_scale):  # type: ignore[no-untyped-def]
    kernel = _native.module().symexp_twohot_loss_backward
    result = kernel(plain(grad), plain(logits), plain(target), plain_optional(other), other_scale)
    return served(result, "symexp_twohot_loss_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.other_scale = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    logits, target, other = ctx.saved_tensors
    watched = is_watched(grad)
    run: Callable[..., Any] = torch.ops.pywm.symexp_twohot_loss_backward if watched else _backward
    return run(grad, logits, target, other, ctx.other_scale), None, None, None


define(
    "symexp_twohot_loss(Tensor logits, Tensor target, Tensor? other, float other_scale) -> Tensor",
    _fake,
    _forward,
)
define(
    "symexp_twohot_loss_backward(Tensor grad, Tensor logits, Tensor target, Tensor? other, float other_scale) -> Tensor",
    _fake_backward,
    _backward,
)
differentiate("symexp_twohot_loss", _setup_context, _autograd, "symexp_twohot_loss_backward")
_eager = eager(_forward, _setup_context, _autograd)


# ---- the mean ---------------------------------------------------------------------------------------------------------


def _fake_mean(logits):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[:-1])


def _forward_mean(logits):  # type: ignore[no-untyped-def]
    return served(_entry_mean(plain(logits), True), "symexp_twohot_mean")


def _fake_mean_backward(grad, logits, mean):  # type: ignore[no-untyped-def]
    return empty_like(logits)


def _mean_backward(grad, logits, mean):  # type: ignore[no-untyped-def]
    kernel = _native.module().symexp_twohot_mean_backward
    return served(kernel(plain(grad), plain(logits), plain(mean)), "symexp_twohot_mean_backward")


def _setup_mean_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output)


def _mean_autograd(ctx: Any, grad: Tensor) -> Any:
    logits, mean = ctx.saved_tensors
    watched = is_watched(grad)
    run: Callable[..., Any] = torch.ops.pywm.symexp_twohot_mean_backward if watched else _mean_backward
    return run(grad, logits, mean)


define("symexp_twohot_mean(Tensor logits) -> Tensor", _fake_mean, _forward_mean)
define(
    "symexp_twohot_mean_backward(Tensor grad, Tensor logits, Tensor mean) -> Tensor",
    _fake_mean_backward,
    _mean_backward,
)
differentiate("symexp_twohot_mean", _setup_mean_context, _mean_autograd, "symexp_twohot_mean_backward")
_eager_mean = eager(_forward_mean, _setup_mean_context, _mean_autograd)
