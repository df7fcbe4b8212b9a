"""Matrix products whose operands are rounded to bfloat16 and whose sums are float32, by torch.

What they are is :func:`pywm.ops.reference_rssm.product`; here is how they are fast. Copies of weights live as long as a
call (in a CUDA graph they are made anew each time it is played), so none is ever stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pywm.ops import _native, reference_rssm
from pywm.ops._registry import is_transformed
from pywm.ops.rssm_params import Layer

_forced = False


@contextmanager
def forced() -> Iterator[None]:
    """Round on CPUs without bfloat16 instructions too, inside the ``with`` block, on this process; for tests."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def is_rounded_on_cpu() -> bool:
    """Whether the CPU's kernels round: where it has instructions for it, or by :func:`forced`."""
    return _forced or _native.has_bfloat16_instructions()


def cast(x: Tensor, operands: str) -> Tensor:
    """Return ``x`` in the dtype in which products take it."""
    return x.to(torch.bfloat16) if operands == "bfloat16" else x


def operand(x: Tensor, operands: str) -> Tensor:
    """Return ``x`` as torch's own functions take it, whose sums come out rounded likewise.

    Where only tests round, it is float32 again, for want of instructions.
    """
    if operands == "float32":
        return x
    x = x.to(torch.bfloat16)
    return x if x.is_cuda or _native.has_bfloat16_instructions() else x.float()


def why_not(operands: str, device: torch.device) -> str | None:
    """Say why a device gains nothing from products with such operands, or None where it does."""
    if operands == "float32" or (device.type == "cpu" and is_rounded_on_cpu()):
        return None
    if device.type == "cpu":
        return "this CPU has no bfloat16 instructions"
    if device.type != "cuda":
        return f"there is no way for it on {device.type} devices"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return f"{torch.cuda.get_device_name(device)} has no bfloat16 instructions"


def multiply(a: Tensor, b: Tensor, out: Tensor, start: Tensor | None = None) -> None:
    """Write ``start + a·b`` to ``out``, which may be ``start``; where b is bfloat16, a is rounded too.

    Args:
        a: ``[M, K]`` or ``[G, M, K]``.
        b: ``[K, N]`` or ``[G, K, N]``, of :func:`cast`.
        out: float.
        start: what can be broadcast to it, or None for zeros.
    """
    batched = a.ndim == 3
    options: dict[str, Any] = {"out": out}
    if b.dtype == torch.bfloat16:
        a = a.to(torch.bfloat16)
        if a.is_cuda:
            options["out_dtype"] = torch.float32
            if start is not None and start is not out:
                start = out.copy_(start)  # torch's versions differ in what else they take here
        elif _native.has_bfloat16_instructions():
            y = torch.matmul(a, b)  # torch rounds the sums, for want of another way on the CPU
            out.copy_(y) if start is None else torch.add(start, y, out=out)
            return
        else:
            a, b = a.float(), b.float()
    if start is None:
        (torch.bmm if batched else torch.mm)(a, b, **options)
    else:
        (torch.baddbmm if batched else torch.addmm)(start, a, b, **options)


def mm(a: Tensor, b: Tensor, operands: str) -> Tensor:
    """``[M, K]`` times ``[K, N]``."""
    if operands == "float32":
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    multiply(a, cast(b, operands), out)
    return out


class _Product(torch.autograd.Function):
    """``x [M, in]`` times a weight ``[out, in]``, transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x, weight)
        return mm(x, weight.t(), "bfloat16")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Multiply with the gradient, rounded like everything else."""
        x, weight = ctx.saved_tensors
        of_x = mm(grad, weight, "bfloat16") if ctx.needs_input_grad[0] else None
        return of_x, mm(grad.t(), x, "bfloat16") if ctx.needs_input_grad[1] else None


def linear(x: Tensor, layer: Layer, operands: str) -> Tensor:
    """:func:`reference_rssm.linear`, fast where there are kernels."""
    if operands == "float32":
        return functional.linear(x, layer.weight, layer.bias)
    if is_transformed() or not _native.supports(x):
        return reference_rssm.linear(x, layer, operands)
    rows = x.flatten(0, -2)
    if torch.is_grad_enabled():
        y: Tensor = _Product.apply(rows, layer.weight)  # type: ignore[no-untyped-call]
    else:
        y = mm(rows, layer.weight.t(), operands)
    y = y.unflatten(0, x.shape[:-1])
    return y if layer.bias is None else y + layer.bias
