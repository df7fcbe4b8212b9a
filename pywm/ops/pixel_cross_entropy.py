"""Cross-entropy of pixels as classes, cut off where it is small: the public function, the dispatcher's op, its gradient."""

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
    is_traced,
    is_transformed,
    is_watched,
    plain,
    served,
)

MAX_CLASSES = 256
"""Classes that a target of one byte can tell apart."""

_COMPILED = hasattr(_native._C, "pixel_cross_entropy")
_entry = _native.entry("pixel_cross_entropy") if _COMPILED else lambda *_: None


def pixel_cross_entropy(logits: Tensor, target: Tensor, *, cutoff: float = 0.03) -> Tensor:
    r"""Return the cross-entropy of every sub-pixel, less a cut-off below which nothing is to be learnt.

    .. math::
        L = \max(0, -\ln \mathrm{softmax}(l)_y - C), \qquad
        \bar l = \bar L \, (\mathrm{softmax}(l) - \mathrm{onehot}(y)) \ \text{where} \ L > 0, \text{ else exactly } 0

    A sub-pixel whose probability is above exp(-C), 97 % for the default, pulls no more, and leaves the gradient to the few
    that are wrong. There is no log-softmax in memory: the forward pass writes the losses, and the backward pass, which
    keeps them, the logits and the targets, computes the probabilities again; rows without a loss cost it no more than
    their zeros.

    Args:
        logits: ``[..., K]`` float32 or float64 (float16 and bfloat16 through the reference, in float32, with its
            log-softmax in memory), 1 <= K <= 256 classes, usually the 256 values of a byte.
        target: y, ``[...]`` uint8, below K.
        cutoff: C in nats, 0 or more.

    Returns:
        ``[...]``, in nats; its mean is SimPLe's loss. Differentiable once in logits. On CUDA a target that is no class
        counts as the last one, for no error can be raised without waiting for the device.

    Raises:
        TypeError: logits is not a dense float tensor, or target is not uint8.
        ValueError: shapes do not fit, devices differ, cutoff is out of range, or (on the CPU) a target is not below K.

    Source:
        Kaiser et al. (2020), "Model-based reinforcement learning for Atari", and its code: ``relu(loss - cutoff)``.
    """
    if not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0:
        result = _entry(logits, target, cutoff, False)
        if result is NotImplemented:
            return _eager(logits, target, cutoff)  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    _check_call(logits, target)
    nats = _check.number("pixel_cross_entropy", "cutoff", cutoff, finite=True)
    check_classes("pixel_cross_entropy", logits, target)
    if not _COMPILED or is_transformed() or not _native.supports(logits):
        return _reference(logits, target, nats)
    return torch.ops.pywm.pixel_cross_entropy(logits, target, nats)  # type: ignore[no-any-return]


def _check_call(logits: object, target: object) -> None:
    name = "pixel_cross_entropy"
    first = _check.tensor(name, "logits", logits)
    if first.ndim < 1 or not 1 <= first.shape[-1] <= MAX_CLASSES:
        raise ValueError(
            f"{name}: logits is {tuple(first.shape)}, but [..., K] with 1 <= K <= {MAX_CLASSES} was expected"
        )
    classes = _check.tensor(name, "target", target, (torch.uint8,))
    if classes.shape != first.shape[:-1]:
        raise ValueError(
            f"{name}: target is {tuple(classes.shape)}, but {tuple(first.shape[:-1])} was expected, as logits is "
            f"{tuple(first.shape)}"
        )
    _check.same_device(name, "target", classes, "logits", first)


def check_classes(function: str, logits: Tensor, target: Tensor) -> None:
    """Name a target that is no class, as the kernel does."""
    K = logits.shape[-1]
    if is_compiling() or is_traced(logits, target) or target.device.type != "cpu" or K == MAX_CLASSES:
        return  # nothing to look at, or nobody to wait for it
    bad = target.flatten() >= K
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{function}: target is {int(target.flatten()[row])} in row {row}, but 0 <= target < {K} was expected"
        )


def _reference(logits: Tensor, target: Tensor, cutoff: float) -> Tensor:
    if logits.dtype in _check.KERNEL_DTYPES:
        return reference.pixel_cross_entropy(logits, target, cutoff)
    return reference.pixel_cross_entropy(logits.float(), target, cutoff).to(logits.dtype)


def _fake(logits, target, cutoff):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[:-1])


def _forward(logits, target, cutoff):  # type: ignore[no-untyped-def]
    return served(_entry(plain(logits), plain(target), cutoff, True), "pixel_cross_entropy")


def _fake_backward(grad, logits, target, loss, cutoff):  # type: ignore[no-untyped-def]
    return empty_like(logits)


def _backward(grad, logits, target, loss, cutoff):  # type: ignore[no-untyped-def]
    kernel = _native.module().pixel_cross_entropy_backward
    return served(
        kernel(plain(grad), plain(logits), plain(target), plain(loss), cutoff), "pixel_cross_entropy_backward"
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    logits, target, ctx.cutoff = inputs
    ctx.save_for_backward(logits, target, output)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    if not ctx.needs_input_grad[0]:
        return None, None, None
    logits, target, loss = ctx.saved_tensors
    watched = is_watched(grad)
    run: Callable[..., Any] = torch.ops.pywm.pixel_cross_entropy_backward if watched else _backward
    return run(grad, logits, target, loss, ctx.cutoff), None, None


define("pixel_cross_entropy(Tensor logits, Tensor target, float cutoff) -> Tensor", _fake, _forward)
define(
    "pixel_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor loss, float cutoff) -> Tensor",
    _fake_backward,
    _backward,
)
differentiate("pixel_cross_entropy", _setup_context, _autograd, "pixel_cross_entropy_backward")
_eager = eager(_forward, _setup_context, _autograd)
