"""KL divergence of categorical states, balanced: the public function, the dispatcher's op, and its gradient."""

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
    gradients,
    in_float32,
    is_transformed,
    is_watched,
    plain,
    plain_optional,
    served,
)

MAX_CLASSES = 256
"""Classes of a group that the kernels keep at hand; more go to the reference."""

_entry = _native.entry("kl_balance")


class KLBalance(NamedTuple):
    """Result of :func:`kl_balance`, all ``[...]``, in nats.

    Attributes:
        dynamics: max(free_nats, KL); its gradient moves the prior only.
        representation: the same number; its gradient moves the posterior only.
        kl: KL itself, without gradient.
    """

    dynamics: Tensor
    representation: Tensor
    kl: Tensor


def kl_balance(
    posterior: Tensor, prior: Tensor, *, unimix: float = 0.01, free_nats: float = 1.0
) -> KLBalance:
    r"""Return the KL divergence from prior to posterior, for training each towards the other.

    .. math::
        q = (1-\epsilon)\,\mathrm{softmax}(l_q) + \epsilon/K, \quad
        p = (1-\epsilon)\,\mathrm{softmax}(l_p) + \epsilon/K, \quad
        \mathrm{KL} = \sum_{s,k} q_{sk} \ln \frac{q_{sk}}{p_{sk}}

    .. math::
        L_\mathrm{dyn} = \max\bigl(f, \mathrm{KL}(\mathrm{sg}(q) \,\|\, p)\bigr), \qquad
        L_\mathrm{rep} = \max\bigl(f, \mathrm{KL}(q \,\|\, \mathrm{sg}(p))\bigr)

    Free nats are those of a whole row, after the sum over its groups. Where KL <= f there is no gradient.

    Args:
        posterior: logits of q, ``[..., S, K]`` float32 or float64 (float16 and bfloat16 through the reference).
        prior: logits of p, likewise.
        unimix: ε in [0, 1], the share of uniform probability.
        free_nats: f >= 0.

    Returns:
        :class:`KLBalance`. Differentiable once: ``dynamics`` in prior, ``representation`` in posterior. Compiled for
        K <= 256; more classes run the reference.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ, S or K is 0, or a number is out of range.

    Source:
        Hafner et al. (2023), "Mastering diverse domains through world models", eq. 5; Hafner et al. (2021) for the
        balancing.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(posterior, prior, unimix, free_nats, False)
        if result is NotImplemented:
            return KLBalance(*_eager(posterior, prior, unimix, free_nats))
        if result is not None:
            return KLBalance(*result)
    first = _check.tensor("kl_balance", "posterior", posterior)
    if first.ndim < 2 or first.shape[-1] < 1 or first.shape[-2] < 1:
        raise ValueError(
            f"kl_balance: posterior is {tuple(first.shape)}, but [..., S, K] with S >= 1 and K >= 1 was expected"
        )
    _check.same("kl_balance", "prior", prior, "posterior", first)
    share = _check.number("kl_balance", "unimix", unimix, high=1)
    free = _check.number("kl_balance", "free_nats", free_nats)
    if is_transformed() or not _native.supports(first) or first.shape[-1] > MAX_CLASSES:
        return KLBalance(*in_float32(reference.kl_balance, posterior, prior, share, free))
    return KLBalance(*torch.ops.pywm.kl_balance(posterior, prior, share, free))


def _fake(posterior, prior, unimix, free_nats):  # type: ignore[no-untyped-def]
    return tuple(posterior.new_empty(posterior.shape[:-2]) for _ in range(3))


def _forward(posterior, prior, unimix, free_nats):  # type: ignore[no-untyped-def]
    return served(_entry(plain(posterior), plain(prior), unimix, free_nats, True), "kl_balance")


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_dynamics, grad_representation, posterior, prior, kl, unimix, free_nats, wanted
):
    return empty_if(wanted[0], posterior), empty_if(wanted[1], prior)


def _backward(  # type: ignore[no-untyped-def]
    grad_dynamics, grad_representation, posterior, prior, kl, unimix, free_nats, wanted
):
    grads = plain_optional(grad_dynamics), plain_optional(grad_representation)
    floats = plain(posterior), plain(prior), plain(kl)
    kernel = _native.module().kl_balance_backward
    return served(kernel(*grads, *floats, unimix, free_nats, *wanted), "kl_balance_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    posterior, prior, ctx.unimix, ctx.free_nats = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(posterior, prior, output[2])


def _autograd(ctx: Any, dynamics: Tensor | None, representation: Tensor | None, unused: None) -> Any:
    posterior, prior, kl = ctx.saved_tensors
    # Each loss moves one of the two only.
    wanted = [
        ctx.needs_input_grad[0] and representation is not None,
        ctx.needs_input_grad[1] and dynamics is not None,
    ]
    if not any(wanted):
        return None, None, None, None
    watched = is_watched(dynamics, representation)
    run: Callable[..., Any] = torch.ops.pywm.kl_balance_backward if watched else _backward
    grads = run(dynamics, representation, posterior, prior, kl, ctx.unimix, ctx.free_nats, wanted)
    return *gradients(wanted, grads), None, None


define(
    "kl_balance(Tensor posterior, Tensor prior, float unimix, float free_nats) -> (Tensor, Tensor, Tensor)",
    _fake,
    _forward,
)
define(
    "kl_balance_backward(Tensor? grad_dynamics, Tensor? grad_representation, Tensor posterior, Tensor prior, Tensor kl, "
    "float unimix, float free_nats, bool[] wanted) -> (Tensor, Tensor)",
    _fake_backward,
    _backward,
)
differentiate("kl_balance", _setup_context, _autograd, "kl_balance_backward")
_eager = eager(_forward, _setup_context, _autograd)
