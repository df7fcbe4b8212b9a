"""One-hot samples with a straight-through gradient: the public function, the dispatcher's op, and its gradient."""

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
    empty_like,
    is_transformed,
    is_watched,
    plain,
    served,
)

MAX_CLASSES = 256
"""Classes of a group that an index of one byte can tell apart."""

_entry = _native.entry("categorical_sample")


class CategoricalSample(NamedTuple):
    """Result of :func:`categorical_sample`.

    Attributes:
        stoch: ``[..., S, K]``, one-hot; carries the straight-through gradient.
        index: ``[..., S]`` uint8, the classes; no gradient.
    """

    stoch: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls


def categorical_sample(logits: Tensor, uniform: Tensor, *, unimix: float = 0.01) -> CategoricalSample:
    r"""Sample groups of categorical variables, with a share of uniform probability.

    .. math::
        \pi = \mathrm{softmax}(l), \quad p = (1 - \epsilon)\pi + \epsilon/K, \quad
        k = \#\bigl\{j : \textstyle\sum_{i \le j} p_i \le u \sum_i p_i\bigr\}, \quad z = \mathrm{onehot}(k)

    by inverse CDF, one uniform number a group. The gradient goes straight through: that of z is taken for that of p,

    .. math::
        \bar l = (1 - \epsilon)\, \pi \odot (\bar z - \langle \pi, \bar z \rangle)

    The sums over i run in the order of the classes, in the tensor's dtype, on every backend: the same logits and uniform
    numbers give the same sample, unless the number lies within rounding of a boundary.

    Args:
        logits: ``[..., S, K]`` float32 or float64 (float16 and bfloat16 through the reference), S groups of K <= 256
            classes.
        uniform: ``[..., S]`` in [0, 1); a constant. :func:`philox_uniform` makes them.
        unimix: ε in [0, 1].

    Returns:
        :class:`CategoricalSample`, ``stoch`` of the dtype of ``logits``. Differentiable once in logits. NaN logits give a
        NaN ``stoch``.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes do not fit, devices differ, or ``unimix`` is out of range.

    Source:
        Hafner et al. (2023), "Mastering diverse domains through world models"; Bengio et al. (2013) for the gradient.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(logits, uniform, unimix, False)
        if result is NotImplemented:
            return CategoricalSample(*_eager(logits, uniform, unimix))
        if result is not None:
            return CategoricalSample(*result)
    _check_call(logits, uniform)
    share = _check.number("categorical_sample", "unimix", unimix, high=1)
    if is_transformed() or not _native.supports(logits):
        return CategoricalSample(*_reference(logits, uniform, share))
    return CategoricalSample(*torch.ops.pywm.categorical_sample(logits, uniform, share))


def _check_call(logits: object, uniform: object) -> None:
    name = "categorical_sample"
    first = _check.tensor(name, "logits", logits)
    if first.ndim < 2 or not 1 <= first.shape[-1] <= MAX_CLASSES:
        raise ValueError(
            f"{name}: logits is {tuple(first.shape)}, but [..., S, K] with 1 <= K <= {MAX_CLASSES} was expected"
        )
    _check.rows(name, "uniform", uniform, "logits", first)


def _reference(logits: Tensor, uniform: Tensor, unimix: float) -> tuple[Tensor, Tensor]:
    if logits.dtype in _check.KERNEL_DTYPES:
        return reference.categorical_sample(logits, uniform, unimix)
    stoch, index = reference.categorical_sample(logits.float(), uniform.float(), unimix)
    return stoch.to(logits.dtype), index


def _fake(logits, uniform, unimix):  # type: ignore[no-untyped-def]
    return empty_like(logits), logits.new_empty(logits.shape[:-1], dtype=torch.uint8)


def _forward(logits, uniform, unimix):  # type: ignore[no-untyped-def]
    return served(_entry(plain(logits), plain(uniform), unimix, True), "categorical_sample")


def _fake_backward(grad, logits, unimix):  # type: ignore[no-untyped-def]
    return empty_like(logits)


def _backward(grad, logits, unimix):  # type: ignore[no-untyped-def]
    kernel = _native.module().categorical_sample_backward
    return served(kernel(plain(grad), plain(logits), unimix), "categorical_sample_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    logits, _, ctx.unimix = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits)


def _autograd(ctx: Any, grad: Tensor | None, unused: None) -> Any:
    if grad is None or not ctx.needs_input_grad[0]:
        return None, None, None
    (logits,) = ctx.saved_tensors
    run: Callable[..., Any] = torch.ops.pywm.categorical_sample_backward if is_watched(grad) else _backward
    return run(grad, logits, ctx.unimix), None, None


define("categorical_sample(Tensor logits, Tensor uniform, float unimix) -> (Tensor, Tensor)", _fake, _forward)
define(
    "categorical_sample_backward(Tensor grad, Tensor logits, float unimix) -> Tensor",
    _fake_backward,
    _backward,
)
differentiate("categorical_sample", _setup_context, _autograd, "categorical_sample_backward")
_eager = eager(_forward, _setup_context, _autograd)
