"""V-trace targets by a reverse scan: the public function, the dispatcher's op, and its gradient."""

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


class VTrace(NamedTuple):
    """Result of :func:`vtrace`.

    Attributes:
        target: ``[T, N]``, off-policy corrected targets of the value function.
        advantage: ``[T, N]``, weighted advantages for the policy gradient.
    """

    target: Tensor
    advantage: Tensor


_entry = _native.entry("vtrace")


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    discount: Tensor,
    value: Tensor,
    next_value: Tensor,
    truncated: Tensor,
    *,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> VTrace:
    r"""Return V-trace targets and advantages of off-policy trajectories.

    .. math::
        \rho_t = \min(\bar\rho, \pi/\mu), \quad c_t = \lambda \min(\bar c, \pi/\mu), \quad m_t = 1 - \mathrm{truncated}_t

        y_t = \rho_t (r_t + d_t v_{t+1} - v_t) + d_t c_t m_t y_{t+1}, \qquad \mathrm{target}_t = v_t + y_t

        \mathrm{advantage}_t = \rho_t \bigl(r_t + d_t (v_{t+1} + m_t y_{t+1}) - v_t\bigr)

    Index ``t`` is a transition, from state ``t`` to state ``t + 1``; ``next_value[t]`` is the value of its true successor.

    Args:
        log_ratio: ``[T, N]`` float32 or float64, log π(a|s) - log μ(a|s); a constant, no gradient.
        reward: ``[T, N]``, in units of reward.
        discount: ``[T, N]``, in [0, 1]; 0 where the episode terminated, γ where it was truncated.
        value: ``[T, N]``, in units of return.
        next_value: ``[T, N]``.
        truncated: ``[T, N]`` bool, or float where non-zero is true; cuts the recursion, keeps the bootstrap.
        lam: λ in [0, 1].
        rho_clip: ρ̄ > 0, clips the weight of the temporal difference.
        c_clip: c̄ > 0, clips the trace.

    Returns:
        :class:`VTrace`. Differentiable once in reward, discount, value and next_value. Compiled on CPU; other devices
        run the reference.

    Raises:
        TypeError: an argument is not a dense float tensor (truncated: bool or float), or dtypes differ.
        ValueError: shapes or devices differ, T is 0, or a number is out of range.

    Source:
        Espeholt et al. (2018), eq. 1 and remark 1; λ as in their section 4.1's generalisation. Truncation is ours.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        numbers = lam, rho_clip, c_clip
        result = _entry(log_ratio, reward, discount, value, next_value, truncated, *numbers, False, False)
        if result is NotImplemented:
            target, advantage, _ = _eager(
                log_ratio.detach(), reward, discount, value, next_value, truncated, *numbers
            )
            return VTrace(target, advantage)
        if result is not None:
            return VTrace(*result)
    _check.scan(
        "vtrace",
        {
            "log_ratio": log_ratio,
            "reward": reward,
            "discount": discount,
            "value": value,
            "next_value": next_value,
        },
        {"truncated": truncated},
    )
    lam = _check.number("vtrace", "lam", lam, high=1)
    rho_clip = _check.number("vtrace", "rho_clip", rho_clip, exclusive_low=True)
    c_clip = _check.number("vtrace", "c_clip", c_clip, exclusive_low=True)
    arguments = (log_ratio, reward, discount, value, next_value, truncated, lam, rho_clip, c_clip)
    if is_transformed() or not (_native.supports(reward) and reward.device.type == "cpu"):
        return VTrace(*in_float32(reference.vtrace, *arguments))
    target, advantage, _ = torch.ops.pywm.vtrace(log_ratio.detach(), *arguments[1:])
    return VTrace(target, advantage)


def _fake(log_ratio, reward, discount, value, next_value, truncated, lam, rho_clip, c_clip):  # type: ignore[no-untyped-def]
    return tuple(empty_like(reward) for _ in range(3))


def _forward(log_ratio, reward, discount, value, next_value, truncated, lam, rho_clip, c_clip):  # type: ignore[no-untyped-def]
    floats = plain(log_ratio), plain(reward), plain(discount), plain(value), plain(next_value)
    return served(_entry(*floats, plain_mask(truncated), lam, rho_clip, c_clip, True, True), "vtrace")


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_target, grad_advantage, log_ratio, discount, next_value, y, truncated, lam, rho_clip, c_clip, wanted
):
    return tuple(empty_if(w, log_ratio) for w in wanted)


def _backward(  # type: ignore[no-untyped-def]
    grad_target, grad_advantage, log_ratio, discount, next_value, y, truncated, lam, rho_clip, c_clip, wanted
):
    grads = plain_optional(grad_target), plain_optional(grad_advantage)
    floats = plain(log_ratio), plain(discount), plain(next_value), plain(y)
    kernel = _native.module().vtrace_backward
    return served(
        kernel(*grads, *floats, plain_mask(truncated), lam, rho_clip, c_clip, *wanted), "vtrace_backward"
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    log_ratio, _, discount, _, next_value, truncated, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(log_ratio, discount, next_value, output[2], truncated)


def _autograd(ctx: Any, grad_target: Tensor | None, grad_advantage: Tensor | None, grad_y: None) -> Any:
    if grad_target is None and grad_advantage is None:
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[1:5])
    run: Callable[..., Any] = (
        torch.ops.pywm.vtrace_backward if is_watched(grad_target, grad_advantage) else _backward
    )
    grads = run(grad_target, grad_advantage, *ctx.saved_tensors, *ctx.numbers, wanted)
    return None, *gradients(wanted, grads), None, None, None, None


define(
    "vtrace(Tensor log_ratio, Tensor reward, Tensor discount, Tensor value, Tensor next_value, Tensor truncated, "
    "float lam, float rho_clip, float c_clip) -> (Tensor, Tensor, Tensor)",
    _fake,
    _forward,
    cuda=False,
)
define(
    "vtrace_backward(Tensor? grad_target, Tensor? grad_advantage, Tensor log_ratio, Tensor discount, "
    "Tensor next_value, Tensor y, Tensor truncated, float lam, float rho_clip, float c_clip, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
    cuda=False,
)
differentiate("vtrace", _setup_context, _autograd, "vtrace_backward")
_eager = eager(_forward, _setup_context, _autograd)
