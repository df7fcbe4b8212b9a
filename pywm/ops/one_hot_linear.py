"""The linear layer of one-hot vectors: the public function, the dispatcher's op, and its gradient."""

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
    gradients,
    in_float32,
    is_traced,
    is_transformed,
    is_watched,
    plain,
    plain_optional,
    served,
)

_entry = _native.entry("one_hot_linear")


def one_hot_linear(index: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Apply a linear layer to S one-hot vectors of K classes, given by their indices.

    .. math::
        y = b + \sum_{s < S} W_{:,\, s K + i_s}

    which is ``linear(one_hot(index, K).flatten(-2), weight, bias)`` without the products with 0.

    Args:
        index: ``[..., S]`` uint8, S >= 1.
        weight: ``[U, S * K]`` as in ``nn.Linear``, float32 or float64 (float16 and bfloat16 through the reference).
            K is what its width leaves to each of the S.
        bias: ``[U]`` or None.

    Returns:
        ``[..., U]``, dtype and device of ``weight``. Differentiable once in weight and bias, whose gradients add up in the
        same order in every run. On CUDA an index that is no class counts as the last one, for no error can be raised
        without waiting for the device.

    Raises:
        TypeError: index is not uint8, another argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ, or (on the CPU) an index is not below K.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(index, weight, bias, False)
        if result is NotImplemented:
            return _eager(index, weight, bias)  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    _check_call(index, weight, bias)
    check_classes("one_hot_linear", index, weight.shape[1] // index.shape[-1], weight)
    if is_transformed() or not _native.supports(weight):
        return in_float32(_reference, weight, index, bias)  # type: ignore[no-any-return]
    return torch.ops.pywm.one_hot_linear(index, weight, bias)  # type: ignore[no-any-return]


def _reference(weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    return reference.one_hot_linear(index, weight, bias)


def _check_call(index: object, weight: object, bias: object) -> None:
    i = _check.tensor("one_hot_linear", "index", index, (torch.uint8,))
    w = _check.tensor("one_hot_linear", "weight", weight)
    if i.ndim < 1 or i.shape[-1] < 1:
        raise ValueError(f"one_hot_linear: index is {tuple(i.shape)}, but [..., S] with S >= 1 was expected")
    S = i.shape[-1]
    if w.ndim != 2 or min(w.shape) < 1 or w.shape[1] % S:
        raise ValueError(
            f"one_hot_linear: weight is {tuple(w.shape)}, but [U, {S} * K] with U, K >= 1 was expected, as index is "
            f"{tuple(i.shape)}"
        )
    _check.same_device("one_hot_linear", "index", i, "weight", w)
    if bias is not None:
        _check.vector("one_hot_linear", "bias", bias, w.shape[0], "weight", w)


def check_classes(function: str, index: Tensor, K: int, *others: Tensor) -> None:
    """Name an index that is no class, as the kernels do."""
    if is_compiling() or is_traced(index, *others) or index.device.type != "cpu":
        return  # nothing to look at, or nobody to wait for it
    bad = index.flatten() >= K if K <= 255 else torch.zeros(1, dtype=torch.bool)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{function}: index is {int(index.flatten()[first])} in row {first // index.shape[-1]}, but 0 <= index < {K} "
            "was expected"
        )


def _fake(index, weight, bias):  # type: ignore[no-untyped-def]
    return weight.new_empty((*index.shape[:-1], weight.shape[0]))


def _forward(index, weight, bias):  # type: ignore[no-untyped-def]
    return served(_entry(plain(index), plain(weight), plain_optional(bias), True), "one_hot_linear")


def _fake_backward(grad, index, columns, wanted):  # type: ignore[no-untyped-def]
    U = grad.shape[-1]
    return grad.new_empty((U, columns) if wanted[0] else (0,)), grad.new_empty((U,) if wanted[1] else (0,))


def _backward(grad, index, columns, wanted):  # type: ignore[no-untyped-def]
    if grad.numel() == 0:  # no rows, which the kernel never sees
        U = grad.shape[-1]
        return grad.new_zeros((U, columns) if wanted[0] else (0,)), grad.new_zeros(
            (U,) if wanted[1] else (0,)
        )
    kernel = _native.module().one_hot_linear_backward
    return served(kernel(plain(grad), plain(index), columns, *wanted), "one_hot_linear_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    index, weight, _ = inputs
    ctx.columns = weight.shape[1]
    ctx.save_for_backward(index)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    wanted = list(ctx.needs_input_grad[1:])
    run: Callable[..., Any] = torch.ops.pywm.one_hot_linear_backward if is_watched(grad) else _backward
    return None, *gradients(wanted, run(grad, *ctx.saved_tensors, ctx.columns, wanted))


define("one_hot_linear(Tensor index, Tensor weight, Tensor? bias) -> Tensor", _fake, _forward)
define(
    "one_hot_linear_backward(Tensor grad, Tensor index, SymInt columns, bool[] wanted) -> (Tensor, Tensor)",
    _fake_backward,
    _backward,
)
differentiate("one_hot_linear", _setup_context, _autograd, "one_hot_linear_backward")
_eager = eager(_forward, _setup_context, _autograd)
