"""What a row of the table of ops is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pywm.ops import _native

__all__ = ["OpInfo", "Sample", "mask", "normal"]


@dataclass
class Sample:
    """Arguments of one call, by name; tensors inside distributions are named ``dist.logits`` and so on.

    Attributes:
        tensors: what can be strided, cast, poisoned, differentiated.
        numbers: everything else.
    """

    tensors: dict[str, Tensor | None]
    numbers: dict[str, Any] = field(default_factory=dict)

    def map(self, fn: Callable[[str, Tensor], Tensor]) -> Sample:
        """Apply ``fn(name, tensor)`` to every tensor."""
        return Sample(
            {k: None if x is None else fn(k, x) for k, x in self.tensors.items()}, dict(self.numbers)
        )

    def double(self) -> Sample:
        """Return the sample in float64, detached."""
        return self.map(lambda _, x: x.detach().double() if x.is_floating_point() else x)


def _untimed(shape: tuple[int, ...], item: int) -> int:
    raise NotImplementedError(f"no traffic is known for {shape} of {item} bytes")


@dataclass(frozen=True)
class OpInfo:
    """What the generic tests and benchmarks need to know about an op.

    Attributes:
        name: its name in ``pywm.ops``.
        call: calls the public function with a sample and returns its outputs as a flat tuple of tensors.
        variants: builders of samples ``(shape, generator, dtype) -> Sample``, by what is special about them.
        outputs: names of the outputs; the first ``differentiable_outputs`` carry gradients.
        differentiable: names of the tensors with a gradient.
        kernels: names under which its kernels count their calls, forward then backward.
        shapes: test sizes; the first is small enough for gradcheck.
        bench_shapes: sizes worth timing, by the workload they come from; none for what ``benchmarks/rssm.py`` times.
        bytes_moved: least traffic to and from memory of a forward call in bytes, from a shape and an item size.
        bytes_moved_backward: the same for a backward call with all gradients wanted.
        no_derivative: variants whose gradient is not the derivative, as gradcheck measures it: a straight-through one.
        torch_products: whether torch's own products are part of it, which round as strides suit them.
        dispatched: whether it is one op to torch's dispatcher, and so to tracers; else they see its steps.
        devices: where compiled kernels exist.
        tol: (rtol, atol) against the float64 reference, by dtype.
    """

    name: str
    call: Callable[[Sample], tuple[Tensor, ...]]
    variants: Mapping[str, Callable[[tuple[int, ...], torch.Generator, torch.dtype], Sample]]
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...]
    kernels: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bench_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bytes_moved: Callable[[tuple[int, ...], int], int] = _untimed
    bytes_moved_backward: Callable[[tuple[int, ...], int], int] = _untimed
    differentiable_outputs: int = 1
    no_derivative: tuple[str, ...] = ()
    torch_products: bool = False
    dispatched: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    tol: Mapping[torch.dtype, tuple[float, float]] = field(
        default_factory=lambda: {torch.float32: (2e-5, 2e-5), torch.float64: (1e-11, 1e-11)}
    )

    def sample(
        self,
        shape: tuple[int, ...],
        variant: str = "plain",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> Sample:
        """Build the arguments of a call."""
        generator = torch.Generator().manual_seed(seed)
        return self.variants[variant](shape, generator, dtype).map(lambda _, x: x.to(device))

    def op(self, sample: Sample) -> tuple[Tensor, ...]:
        """Call the op as users do."""
        return self.call(sample)

    def reference(self, sample: Sample) -> tuple[Tensor, ...]:
        """Call the op with compiled kernels switched off: its definition in plain PyTorch."""
        with _native.disabled():
            return self.call(sample)


def mask(shape: tuple[int, ...], g: torch.Generator, share: float) -> Tensor:
    """Return booleans of which about ``share`` are true."""
    return torch.rand(shape, generator=g) < share


def normal(*shape: int, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=g, dtype=dtype)
