"""The few lines of ``torch.library`` that every op repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from pywm.ops import _native

_library = torch.library.Library("pywm", "DEF")


def define(schema: str, fake: Callable[..., Any], kernel: Callable[..., Any], cuda: bool = True) -> None:
    """Define an op for the dispatcher: its schema, its shapes, and its kernel on every device that has one.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        fake: returns empty outputs of the right shape, dtype and device.
        kernel: runs the compiled kernel on contiguous inputs.
        cuda: whether there is a CUDA kernel too.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    torch.library.register_fake(f"pywm::{name}", fake, lib=_library)
    for device in ("CPU", "CUDA") if cuda else ("CPU",):
        if _native.has_backend(device.lower()):
            _library.impl(name, kernel, device)


def differentiate(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    backward_op: str | None = None,
) -> None:
    """Register the backward of op ``name``; differentiating ``backward_op`` raises instead of giving zeros.

    Args:
        name: the op.
        setup_context: saves what the backward pass needs.
        backward: from the outputs' gradients to the inputs'.
        backward_op: the op that it calls when somebody may be looking (see :func:`is_watched`).
    """
    torch.library.register_autograd(f"pywm::{name}", backward, setup_context=setup_context, lib=_library)
    if backward_op is not None:

        def second(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(_NOT_TWICE.format(name=name))

        torch.library.register_autograd(f"pywm::{backward_op}", second, lib=_library)


def eager(
    kernel: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Make the op with its gradient, past the dispatcher, whose bookkeeping takes longer than many a kernel.

    For inputs that the binding found plain. Takes what :func:`define` and :func:`differentiate` take.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = kernel(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    return Eager.apply


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work; only the references know their tensors."""
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether a backward call must go through the dispatcher: somebody traces it, or will differentiate it."""
    return torch.is_grad_enabled() or is_traced(*tensors)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether somebody records or batches the call, so that its tensors may hold no numbers."""
    if torch._C._len_torch_dispatch_stack() or _are_functorch_transforms_active():
        return True
    return any(x is not None and type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in tensors)


_NOT_TWICE = "pywm.{name} is differentiable once, not twice; use pywm.ops.reference for second derivatives"


def once(name: str, backward: Callable[..., Any], *inputs: Any) -> Any:
    """Call a backward pass of op ``name`` that is no op of the dispatcher; its own derivative raises."""
    return _Once.apply(name, backward, *inputs) if torch.is_grad_enabled() else backward(*inputs)  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """A backward pass that depends on its inputs, but nobody knows how."""

    @staticmethod
    def forward(ctx: Any, name: str, backward: Callable[..., Any], *inputs: Any) -> Any:
        """Call it."""
        ctx.name = name
        return tuple(backward(*inputs))

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        """Refuse."""
        raise RuntimeError(_NOT_TWICE.format(name=ctx.name))


def empty_like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor of the shape of ``x``: what a kernel returns."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_if(wanted: bool, x: Tensor) -> Tensor:
    """Return what a backward kernel returns for ``x``: an empty tensor ``[0]`` where no gradient is wanted."""
    return empty_like(x) if wanted else x.new_empty((0,))


def gradients(wanted: Sequence[bool], results: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Replace the placeholders of unwanted gradients by None."""
    return tuple(r if w else None for w, r in zip(wanted, results, strict=True))


def plain(x: Tensor) -> Tensor:
    """Return ``x`` as a kernel reads it: an ordinary, contiguous tensor without lazy sign."""
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        x = x.as_subclass(Tensor)
    return x.resolve_neg().contiguous()


def plain_optional(x: Tensor | None) -> Tensor | None:
    """Return :func:`plain` of ``x``, or None."""
    return None if x is None else plain(x)


def plain_mask(x: Tensor | None) -> Tensor | None:
    """Return a mask as a kernel reads it: contiguous bool, non-zero is true."""
    if x is None:
        return None
    return plain(x if x.dtype == torch.bool else x != 0)


def served(result: Any, name: str) -> Any:
    """Return what the kernel returned; None would mean that the checks let something through."""
    if result is None:
        raise RuntimeError(
            f"pywm.{name}: the kernel declined inputs that passed the checks; please report this"
        )
    return result


def in_float32(reference: Callable[..., Any], *arguments: Any) -> Any:
    """Run a reference in float32 for half-precision tensors, and round its results back."""
    first = next(a for a in arguments if isinstance(a, Tensor))
    if first.dtype not in (torch.float16, torch.bfloat16):
        return reference(*arguments)
    wide = [a.float() if isinstance(a, Tensor) and a.dtype == first.dtype else a for a in arguments]
    results = reference(*wide)
    if isinstance(results, Tensor):
        return results.to(first.dtype)
    return tuple(r.to(first.dtype) for r in results)
