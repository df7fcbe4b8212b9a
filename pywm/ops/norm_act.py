"""Normalisation with an activation in one pass: the public function, the dispatcher's op, and its gradient."""

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
    empty_if,
    empty_like,
    gradients,
    in_float32,
    is_transformed,
    is_watched,
    plain,
    plain_optional,
    served,
)

NORMS = ("rms", "layer")
ACTIVATIONS = ("none", "tanh", "silu", "elu", "relu")

_entry = _native.entry("norm_act")


def norm_act(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    norm: str = "rms",
    act: str = "silu",
    eps: float = 1e-4,
) -> Tensor:
    r"""Normalise the last axis, scale and shift it, and apply an activation.

    .. math::
        y = f(\gamma \odot \hat x + \beta), \qquad
        \hat x_{\text{rms}} = \frac{x}{\sqrt{\operatorname{mean}(x^2) + \epsilon}}, \quad
        \hat x_{\text{layer}} = \frac{x - \operatorname{mean}(x)}{\sqrt{\operatorname{var}(x) + \epsilon}}

    with γ the scale, β the shift and the variance over D, not D - 1, numbers.

    Args:
        x: ``[..., D]``, D >= 1, float32 or float64 (float16 and bfloat16 through the reference).
        scale: ``[D]``.
        shift: ``[D]`` or None; only with ``norm="layer"``.
        norm: ``"rms"`` or ``"layer"``.
        act: ``"silu"``, ``"elu"``, ``"relu"``, ``"tanh"`` or ``"none"``.
        eps: ε > 0, in units of x squared.

    Returns:
        ``[..., D]``, dtype and device of ``x``. Differentiable once in x, scale and shift. The backward pass keeps x and
        computes its statistics again; it sums over rows in the same order in every run.

    Raises:
        TypeError: an argument is not a dense float tensor, dtypes differ, or eps is no number.
        ValueError: shapes or devices differ, norm or act is unknown, eps is not positive, or a shift came with RMS.

    Source:
        Zhang and Sennrich (2019), eq. 4; Ba et al. (2016), eq. 3. DreamerV3 normalises with RMS and ε = 1e-4.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(x, scale, shift, norm, act, eps, False)
        if result is NotImplemented:
            return _eager(x, scale, shift, norm, act, eps)  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    eps = _check_call(x, scale, shift, norm, act, eps)
    if is_transformed() or not _native.supports(x):
        return in_float32(reference.norm_act, x, scale, shift, norm, act, eps)  # type: ignore[no-any-return]
    return torch.ops.pywm.norm_act(x, scale, shift, norm, act, eps)  # type: ignore[no-any-return]


def _check_call(x: object, scale: object, shift: object, norm: object, act: object, eps: object) -> float:
    first = _check.tensor("norm_act", "x", x)
    if first.ndim < 1 or first.shape[-1] < 1:
        raise ValueError(f"norm_act: x is {tuple(first.shape)}, but [..., D] with D >= 1 was expected")
    _check.choice("norm_act", "norm", norm, NORMS)
    _check.choice("norm_act", "act", act, ACTIVATIONS)
    _check.vector("norm_act", "scale", scale, first.shape[-1], "x", first)
    if shift is not None:
        _check.vector("norm_act", "shift", shift, first.shape[-1], "x", first)
        if norm == "rms":
            raise ValueError("norm_act: shift is a tensor, but None was expected, as norm is rms")
    return _check.number("norm_act", "eps", eps, exclusive_low=True, finite=True)


def _fake(x, scale, shift, norm, act, eps):  # type: ignore[no-untyped-def]
    return empty_like(x)


def _forward(x, scale, shift, norm, act, eps):  # type: ignore[no-untyped-def]
    return served(_entry(plain(x), plain(scale), plain_optional(shift), norm, act, eps, True), "norm_act")


def _fake_backward(grad, x, scale, shift, norm, act, eps, wanted):  # type: ignore[no-untyped-def]
    return tuple(empty_if(w, t) for w, t in zip(wanted, (x, scale, scale), strict=True))


def _backward(grad, x, scale, shift, norm, act, eps, wanted):  # type: ignore[no-untyped-def]
    if x.numel() == 0:  # no rows, which the kernel never sees
        return tuple(
            x.new_zeros(t.shape if w else (0,)) for w, t in zip(wanted, (x, scale, scale), strict=True)
        )
    kernel = _native.module().norm_act_backward
    tensors = plain(grad), plain(x), plain(scale), plain_optional(shift)
    return served(kernel(*tensors, norm, act, eps, *wanted), "norm_act_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, scale, shift, *ctx.options = inputs
    ctx.save_for_backward(x, scale, shift)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    wanted = list(ctx.needs_input_grad[:3])
    run: Callable[..., Any] = torch.ops.pywm.norm_act_backward if is_watched(grad) else _backward
    grads = run(grad, *ctx.saved_tensors, *ctx.options, wanted)
    return *gradients(wanted, grads), None, None, None


define(
    "norm_act(Tensor x, Tensor scale, Tensor? shift, str norm, str act, float eps) -> Tensor", _fake, _forward
)
define(
    "norm_act_backward(Tensor grad, Tensor x, Tensor scale, Tensor? shift, str norm, str act, float eps, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)
differentiate("norm_act", _setup_context, _autograd, "norm_act_backward")
_eager = eager(_forward, _setup_context, _autograd)
