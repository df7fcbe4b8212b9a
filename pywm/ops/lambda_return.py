"""λ-returns by a reverse scan: the public function, the dispatcher's op, and its gradient."""

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
    plain_mask,
    plain_optional,
    served,
)

_entry = _native.entry("lambda_return")


def lambda_return(
    reward: Tensor,
    discount: Tensor,
    next_value: Tensor,
    lam: float | Tensor = 0.95,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Return the λ-return of every step of a batch of trajectories.

    .. math::
        R_t = r_t + d_t \bigl[(1-\lambda_t)\, v_{t+1} + \lambda_t\, R_{t+1}\bigr], \qquad R_T = v_T

    Index ``t`` is a transition, from state ``t`` to state ``t + 1``: ``reward[t]`` is paid on it, ``next_value[t]`` is the
    value of the state it leads to. The last ``next_value`` bootstraps.

    Args:
        reward: ``[T, N]`` float32 or float64 (float16 and bfloat16 through the reference), in units of reward.
        discount: ``[T, N]``, in [0, 1]; γ where the episode goes on, 0 where it terminated. A truncated step keeps γ, for
            it must bootstrap; give it λ = 0, so that nothing beyond it counts.
        next_value: ``[T, N]``, in units of return.
        lam: λ in [0, 1], a number or ``[T, N]`` (then not differentiated).
        valid: ``[T, N]`` mask (bool, or float where non-zero is true) or None. A row that is not valid gets return 0 and
            gradient 0; the row before it bootstraps from its own ``next_value``. NaN behind the mask is harmless.

    Returns:
        ``[T, N]``, dtype and device of ``reward``. Differentiable once in reward, discount and next_value.

    Raises:
        TypeError: an argument is not a dense float tensor (valid: bool or float), or dtypes differ.
        ValueError: shapes or devices differ, T is 0, or ``lam`` is out of range.

    Source:
        Sutton and Barto (2018), eq. 12.18; Hafner et al. (2020), eq. 6.
    """
    rows, number = (lam, 0.0) if isinstance(lam, Tensor) else (None, lam)
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(reward, discount, next_value, rows, number, valid, False)
        if result is NotImplemented:
            return _eager(reward, discount, next_value, rows, number, valid)  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    floats: dict[str, object] = {"reward": reward, "discount": discount, "next_value": next_value}
    if rows is not None:
        floats["lam"] = rows
    _check.scan("lambda_return", floats, optional_masks={"valid": valid})
    number = _check.number("lambda_return", "lam", number, high=1)
    if is_transformed() or not _native.supports(reward):
        mixing = number if rows is None else rows
        return in_float32(reference.lambda_return, reward, discount, next_value, mixing, valid)  # type: ignore[no-any-return]
    rows = None if rows is None else rows.detach()
    return torch.ops.pywm.lambda_return(reward, discount, next_value, rows, number, valid)  # type: ignore[no-any-return]


def _fake(reward, discount, next_value, lam_rows, lam, valid):  # type: ignore[no-untyped-def]
    return empty_like(reward)


def _forward(reward, discount, next_value, lam_rows, lam, valid):  # type: ignore[no-untyped-def]
    floats = plain(reward), plain(discount), plain(next_value), plain_optional(lam_rows)
    return served(_entry(*floats, lam, plain_mask(valid), True), "lambda_return")


def _fake_backward(grad, discount, next_value, returns, lam_rows, lam, valid, wanted):  # type: ignore[no-untyped-def]
    return tuple(empty_if(w, grad) for w in wanted)


def _backward(grad, discount, next_value, returns, lam_rows, lam, valid, wanted):  # type: ignore[no-untyped-def]
    floats = plain(grad), plain(discount), plain(next_value), plain(returns), plain_optional(lam_rows)
    kernel = _native.module().lambda_return_backward
    return served(kernel(*floats, lam, plain_mask(valid), *wanted), "lambda_return_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, discount, next_value, lam_rows, ctx.lam, valid = inputs
    ctx.save_for_backward(discount, next_value, output, lam_rows, valid)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    discount, next_value, returns, lam_rows, valid = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    run: Callable[..., Any] = torch.ops.pywm.lambda_return_backward if is_watched(grad) else _backward
    grads = run(grad, discount, next_value, returns, lam_rows, ctx.lam, valid, wanted)
    return *gradients(wanted, grads), None, None, None


define(
    "lambda_return(Tensor reward, Tensor discount, Tensor next_value, Tensor? lam_rows, float lam, Tensor? valid) "
    "-> Tensor",
    _fake,
    _forward,
)
define(
    "lambda_return_backward(Tensor grad, Tensor discount, Tensor next_value, Tensor returns, Tensor? lam_rows, "
    "float lam, Tensor? valid, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)
differentiate("lambda_return", _setup_context, _autograd, "lambda_return_backward")
_eager = eager(_forward, _setup_context, _autograd)
