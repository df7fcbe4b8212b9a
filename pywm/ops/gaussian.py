"""Gaussian latent states: samples and KL divergence. The public functions, the dispatcher's ops, their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

KINDS = ("softplus", "sigmoid2")

_entry = _native.entry("gaussian_sample")
_entry_kl = _native.entry("gaussian_kl")


class GaussianSample(NamedTuple):
    """Result of :func:`gaussian_sample`, both ``[...]``.

    Attributes:
        sample: mean + std·noise.
        std: the standard deviation.
    """

    sample: Tensor
    std: Tensor


def gaussian_sample(
    mean: Tensor, raw_std: Tensor, noise: Tensor, *, min_std: float = 0.1, kind: str = "softplus"
) -> GaussianSample:
    r"""Sample a diagonal Gaussian whose standard deviation comes from an unbounded number.

    .. math::
        z = \mu + s\,\xi, \qquad s = \ln(1 + e^{\hat s}) + s_0
        \quad\text{or}\quad s = 2\,\sigma(\hat s / 2) + s_0

    Args:
        mean: μ, any shape ``[...]``, float32 or float64 (float16 and bfloat16 through the reference).
        raw_std: ŝ, the same shape.
        noise: ξ, standard normal, the same shape; a constant. :func:`philox_normal` makes it.
        min_std: s₀ >= 0, the least standard deviation.
        kind: ``"softplus"`` or ``"sigmoid2"``, the first or the second formula of s.

    Returns:
        :class:`GaussianSample`. Both differentiable once in mean and raw_std.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ, ``min_std`` is negative, or ``kind`` is unknown.

    Source:
        Hafner et al. (2019), "Learning latent dynamics for planning from pixels" (softplus); the code of Hafner et al.
        (2021), "Mastering Atari with discrete world models" (sigmoid2).
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0 and _is_kind(kind):
        result = _entry(mean, raw_std, noise, min_std, kind == "sigmoid2", False)
        if result is NotImplemented:
            return GaussianSample(*_eager(mean, raw_std, noise, min_std, kind == "sigmoid2"))
        if result is not None:
            return GaussianSample(*result)
    first = _check.tensor("gaussian_sample", "mean", mean)
    _check.same("gaussian_sample", "raw_std", raw_std, "mean", first)
    _check.same("gaussian_sample", "noise", noise, "mean", first)
    least = _check.number("gaussian_sample", "min_std", min_std, finite=True)
    if not _is_kind(kind):
        raise ValueError(f"gaussian_sample: kind is {kind!r}, but one of {', '.join(KINDS)} was expected")
    sigmoid2 = kind == "sigmoid2"
    if is_transformed() or not _native.supports(first):
        results = in_float32(reference.gaussian_sample, mean, raw_std, noise, least, sigmoid2)
        return GaussianSample(*results)
    return GaussianSample(*torch.ops.pywm.gaussian_sample(mean, raw_std, noise, least, sigmoid2))


def gaussian_kl(mean_q: Tensor, std_q: Tensor, mean_p: Tensor, std_p: Tensor) -> Tensor:
    r"""Return the KL divergence of diagonal Gaussians, summed over the last dimension.

    .. math::
        \mathrm{KL}(q \,\|\, p) = \sum_z \ln \frac{s_p}{s_q} + \frac{s_q^2 + (\mu_q - \mu_p)^2}{2 s_p^2} - \frac12

    Args:
        mean_q: ``[..., Z]`` float32 or float64 (float16 and bfloat16 through the reference).
        std_q: standard deviations, ``[..., Z]``, positive.
        mean_p: ``[..., Z]``.
        std_p: ``[..., Z]``, positive.

    Returns:
        ``[...]``, in nats. Differentiable once in all four.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ, or Z is 0.

    Source:
        Kullback and Leibler (1951), for Gaussians.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry_kl(mean_q, std_q, mean_p, std_p, False)
        if result is NotImplemented:
            return _eager_kl(mean_q, std_q, mean_p, std_p)  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    first = _check.tensor("gaussian_kl", "mean_q", mean_q)
    if first.ndim < 1 or first.shape[-1] < 1:
        raise ValueError(
            f"gaussian_kl: mean_q is {tuple(first.shape)}, but [..., Z] with Z >= 1 was expected"
        )
    for name, x in (("std_q", std_q), ("mean_p", mean_p), ("std_p", std_p)):
        _check.same("gaussian_kl", name, x, "mean_q", first)
    if is_transformed() or not _native.supports(first):
        return in_float32(reference.gaussian_kl, mean_q, std_q, mean_p, std_p)  # type: ignore[no-any-return]
    return torch.ops.pywm.gaussian_kl(mean_q, std_q, mean_p, std_p)  # type: ignore[no-any-return]


def _is_kind(kind: object) -> bool:
    return isinstance(kind, str) and kind in KINDS


# ---- the sample -------------------------------------------------------------------------------------------------------


def _fake(mean, raw_std, noise, min_std, sigmoid2):  # type: ignore[no-untyped-def]
    return empty_like(mean), empty_like(mean)


def _forward(mean, raw_std, noise, min_std, sigmoid2):  # type: ignore[no-untyped-def]
    floats = plain(mean), plain(raw_std), plain(noise)
    return served(_entry(*floats, min_std, sigmoid2, True), "gaussian_sample")


def _fake_backward(grad_sample, grad_std, raw_std, noise, sigmoid2, wanted):  # type: ignore[no-untyped-def]
    return empty_if(wanted[0], raw_std), empty_if(wanted[1], raw_std)


def _backward(grad_sample, grad_std, raw_std, noise, sigmoid2, wanted):  # type: ignore[no-untyped-def]
    floats = plain_optional(grad_sample), plain_optional(grad_std), plain(raw_std), plain(noise)
    kernel = _native.module().gaussian_sample_backward
    return served(kernel(*floats, sigmoid2, *wanted), "gaussian_sample_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, raw_std, noise, _, ctx.sigmoid2 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(raw_std, noise)


def _autograd(ctx: Any, grad_sample: Tensor | None, grad_std: Tensor | None) -> Any:
    raw_std, noise = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    if not any(wanted) or (grad_sample is None and grad_std is None):
        return (None,) * 5
    watched = is_watched(grad_sample, grad_std)
    run: Callable[..., Any] = torch.ops.pywm.gaussian_sample_backward if watched else _backward
    grads = run(grad_sample, grad_std, raw_std, noise, ctx.sigmoid2, wanted)
    return *gradients(wanted, grads), None, None, None


define(
    "gaussian_sample(Tensor mean, Tensor raw_std, Tensor noise, float min_std, bool sigmoid2) -> (Tensor, Tensor)",
    _fake,
    _forward,
)
define(
    "gaussian_sample_backward(Tensor? grad_sample, Tensor? grad_std, Tensor raw_std, Tensor noise, bool sigmoid2, "
    "bool[] wanted) -> (Tensor, Tensor)",
    _fake_backward,
    _backward,
)
differentiate("gaussian_sample", _setup_context, _autograd, "gaussian_sample_backward")
_eager = eager(_forward, _setup_context, _autograd)


# ---- the divergence ---------------------------------------------------------------------------------------------------


def _fake_kl(mean_q, std_q, mean_p, std_p):  # type: ignore[no-untyped-def]
    return mean_q.new_empty(mean_q.shape[:-1])


def _forward_kl(mean_q, std_q, mean_p, std_p):  # type: ignore[no-untyped-def]
    floats = plain(mean_q), plain(std_q), plain(mean_p), plain(std_p)
    return served(_entry_kl(*floats, True), "gaussian_kl")


def _fake_kl_backward(grad, mean_q, std_q, mean_p, std_p, wanted):  # type: ignore[no-untyped-def]
    return tuple(empty_if(w, mean_q) for w in wanted)


def _kl_backward(grad, mean_q, std_q, mean_p, std_p, wanted):  # type: ignore[no-untyped-def]
    floats = plain(grad), plain(mean_q), plain(std_q), plain(mean_p), plain(std_p)
    return served(_native.module().gaussian_kl_backward(*floats, *wanted), "gaussian_kl_backward")


def _setup_kl_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _kl_autograd(ctx: Any, grad: Tensor) -> Any:
    wanted = list(ctx.needs_input_grad)
    run: Callable[..., Any] = torch.ops.pywm.gaussian_kl_backward if is_watched(grad) else _kl_backward
    return gradients(wanted, run(grad, *ctx.saved_tensors, wanted))


define(
    "gaussian_kl(Tensor mean_q, Tensor std_q, Tensor mean_p, Tensor std_p) -> Tensor",
    _fake_kl,
    _forward_kl,
)
define(
    "gaussian_kl_backward(Tensor grad, Tensor mean_q, Tensor std_q, Tensor mean_p, Tensor std_p, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_kl_backward,
    _kl_backward,
)
differentiate("gaussian_kl", _setup_kl_context, _kl_autograd, "gaussian_kl_backward")
_eager_kl = eager(_forward_kl, _setup_kl_context, _kl_autograd)
