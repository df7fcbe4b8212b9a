"""Discounted returns by a reverse scan: the public function, the dispatcher's op, and its gradient."""

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
    served,
)

_entry = _native.entry("discounted_return")


def discounted_return(reward: Tensor, discount: Tensor, bootstrap: Tensor) -> Tensor:
    r"""Return the discounted sum of rewards from every step on.

    .. math::
        R_t = r_t + d_t R_{t+1}, \qquad R_T = \mathrm{bootstrap}

    Index ``t`` is a transition, from state ``t`` to state ``t + 1``.

    Args:
        reward: ``[T, N]`` float32 or float64 (float16 and bfloat16 through the reference), in units of reward.
        discount: ``[T, N]``, in [0, 1]; 0 where the episode terminated.
        bootstrap: ``[N]``, value of the state after the last transition; zeros for none.

    Returns:
        ``[T, N]``, dtype and device of ``reward``. Differentiable once in all three tensors.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ, or T is 0.

    Source:
        Sutton and Barto (2018), eq. 3.8.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(reward, discount, bootstrap, False)
        if result is NotImplemented:
            return _eager(reward, discount, bootstrap)  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    _check.scan(
        "discounted_return", {"reward": reward, "discount": discount}, columns={"bootstrap": bootstrap}
    )
    if is_transformed() or not _native.supports(reward):
        return in_float32(reference.discounted_return, reward, discount, bootstrap)  # type: ignore[no-any-return]
    return torch.ops.pywm.discounted_return(reward, discount, bootstrap)  # type: ignore[no-any-return]


def _fake(reward, discount, bootstrap):  # type: ignore[no-untyped-def]
    return empty_like(reward)


def _forward(reward, discount, bootstrap):  # type: ignore[no-untyped-def]
    return served(_entry(plain(reward), plain(discount), plain(bootstrap), True), "discounted_return")


def _fake_backward(grad, discount, bootstrap, returns, wanted):  # type: ignore[no-untyped-def]
    return tuple(empty_if(w, x) for w, x in zip(wanted, (grad, grad, bootstrap), strict=True))


def _backward(grad, discount, bootstrap, returns, wanted):  # type: ignore[no-untyped-def]
    floats = plain(grad), plain(discount), plain(bootstrap), plain(returns)
    return served(_native.module().discounted_return_backward(*floats, *wanted), "discounted_return_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, discount, bootstrap = inputs
    ctx.save_for_backward(discount, bootstrap, output)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    wanted = list(ctx.needs_input_grad)
    run: Callable[..., Any] = torch.ops.pywm.discounted_return_backward if is_watched(grad) else _backward
    return gradients(wanted, run(grad, *ctx.saved_tensors, wanted))


define("discounted_return(Tensor reward, Tensor discount, Tensor bootstrap) -> Tensor", _fake, _forward)
define(
    "discounted_return_backward(Tensor grad, Tensor discount, Tensor bootstrap, Tensor returns, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)
differentiate("discounted_return", _setup_context, _autograd, "discounted_return_backward")
_eager = eager(_forward, _setup_context, _autograd)
