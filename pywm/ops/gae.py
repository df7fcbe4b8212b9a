"""Generalised advantage estimation: the public function, the dispatcher's op, and its gradient."""

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
    plain_mask,
    plain_optional,
    served,
)


class GAE(NamedTuple):
    """Result of :func:`gae`.

    Attributes:
        advantage: ``[T, N]``.
        returns: ``[T, N]``, advantage + value: the targets of the value function, TD(λ) returns.
    """

    advantage: Tensor
    returns: Tensor


_entry = _native.entry("gae")
if _native.has_backend("cpu"):
    _native.module().register_result("gae", GAE)


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float = 0.99,
    lam: float = 0.95,
    valid: Tensor | None = None,
) -> GAE:
    r"""Return the generalised advantage estimate and the value targets of a batch of rollouts.

    .. math::
        \delta_t = r_t + \gamma (1 - \mathrm{terminated}_t) V(s'_t) - V(s_t), \qquad
        A_t = \delta_t + \gamma\lambda (1 - \mathrm{done}_t) A_{t+1}, \qquad
        R_t = A_t + V(s_t)

    with done = terminated or truncated. Index ``t`` is a transition, from state ``t`` to state ``t + 1``. A terminated
    transition has no future, so its ``next_value`` is ignored; a truncated one bootstraps from ``next_value``, which must
    be the value of its true successor, not of the state after a reset.

    Args:
        reward: ``[T, N]`` float32 or float64 (float16 and bfloat16 through the reference), in units of reward.
        value: ``[T, N]``, V(s_t), in units of return.
        next_value: ``[T, N]``, V(s'_t); ``next_value[-1]`` bootstraps the rollout's end.
        terminated: ``[T, N]`` bool, or float where non-zero is true.
        truncated: likewise.
        discount: γ per transition, in [0, 1].
        lam: λ in [0, 1]; 0 gives one-step TD errors, 1 Monte Carlo returns minus a baseline.
        valid: ``[T, N]`` mask or None. A row that is not valid (a reset step of a vector environment) gets advantage 0,
            returns = value and gradient 0; the recursion is cut there, and NaN in it is harmless.

    Returns:
        :class:`GAE`, dtype and device of ``reward``. Differentiable once in reward, value and next_value.

    Raises:
        TypeError: an argument is not a dense float tensor (masks: bool or float), or dtypes differ.
        ValueError: shapes or devices differ, T is 0, or a number is out of range.

    Source:
        Schulman et al. (2016), eq. 16; truncation as in Pardo et al. (2018).
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(reward, value, next_value, terminated, truncated, valid, discount, lam, False)
        if result is NotImplemented:
            return GAE(*_eager(reward, value, next_value, terminated, truncated, valid, discount, lam))
        if result is not None:
            return result  # type: ignore[no-any-return]
    _check.scan(
        "gae",
        {"reward": reward, "value": value, "next_value": next_value},
        {"terminated": terminated, "truncated": truncated},
        {"valid": valid},
    )
    discount = _check.number("gae", "discount", discount, high=1)
    lam = _check.number("gae", "lam", lam, high=1)
    arguments = (reward, value, next_value, terminated, truncated, valid, discount, lam)
    if is_transformed() or not _native.supports(reward):
        return GAE(*in_float32(reference.gae, *arguments))
    return GAE(*torch.ops.pywm.gae(*arguments))


def _fake(reward, value, next_value, terminated, truncated, valid, discount, lam):  # type: ignore[no-untyped-def]
    return empty_like(reward), empty_like(reward)


def _forward(reward, value, next_value, terminated, truncated, valid, discount, lam):  # type: ignore[no-untyped-def]
    floats = plain(reward), plain(value), plain(next_value)
    masks = plain_mask(terminated), plain_mask(truncated), plain_mask(valid)
    return served(_entry(*floats, *masks, discount, lam, True), "gae")


def _fake_backward(like, grad_advantage, grad_returns, terminated, truncated, valid, discount, lam, wanted):  # type: ignore[no-untyped-def]
    return tuple(empty_if(w, like) for w in wanted)


def _backward(like, grad_advantage, grad_returns, terminated, truncated, valid, discount, lam, wanted):  # type: ignore[no-untyped-def]
    grads = plain(like), plain_optional(grad_advantage), plain_optional(grad_returns)
    masks = plain_mask(terminated), plain_mask(truncated), plain_mask(valid)
    return served(_native.module().gae_backward(*grads, *masks, discount, lam, *wanted), "gae_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, _, terminated, truncated, valid, ctx.discount, ctx.lam = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(terminated, truncated, valid)


def _autograd(ctx: Any, grad_advantage: Tensor | None, grad_returns: Tensor | None) -> Any:
    like = grad_returns if grad_advantage is None else grad_advantage
    if like is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:3])
    run: Callable[..., Any] = (
        torch.ops.pywm.gae_backward if is_watched(grad_advantage, grad_returns) else _backward
    )
    grads = run(like, grad_advantage, grad_returns, *ctx.saved_tensors, ctx.discount, ctx.lam, wanted)
    return *gradients(wanted, grads), None, None, None, None, None


define(
    "gae(Tensor reward, Tensor value, Tensor next_value, Tensor terminated, Tensor truncated, Tensor? valid, "
    "float discount, float lam) -> (Tensor, Tensor)",
    _fake,
    _forward,
)
define(
    "gae_backward(Tensor like, Tensor? grad_advantage, Tensor? grad_returns, Tensor terminated, Tensor truncated, "
    "Tensor? valid, float discount, float lam, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)
differentiate("gae", _setup_context, _autograd, "gae_backward")
_eager = eager(_forward, _setup_context, _autograd)
