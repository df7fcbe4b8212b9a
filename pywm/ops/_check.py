"""The checks of every op, once: what came, what was expected, and the name of the argument.

The eager path does not pass here when all is well: the binding looks at the tensors in C++ and declines what it cannot
serve. Whatever it declines comes here, where a bad call gets its message and a good one goes on to the dispatcher.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

KERNEL_DTYPES = (torch.float32, torch.float64)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float16, torch.bfloat16)
MASK_DTYPES = (torch.bool, *FLOAT_DTYPES)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(function: str, name: str, x: object, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> Tensor:
    """Check that ``x`` is an ordinary dense tensor of one of ``dtypes``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} is a {type(x).__name__}, but a torch.Tensor was expected")
    if isinstance(x, UninitializedParameter | UninitializedBuffer):
        raise TypeError(f"{function}: {name} is an {type(x).__name__}, but data was expected")
    if type(x).__name__ == "MaskedTensor":  # its data has holes; torch imports its class on demand
        raise TypeError(f"{function}: {name} is a MaskedTensor, but a dense (strided) tensor was expected")
    if x.layout is not torch.strided or x.is_quantized or x.is_nested:
        kind = "quantized" if x.is_quantized else "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{function}: {name} is {kind}, but a dense (strided) tensor was expected")
    if x.device.type == "meta":
        raise TypeError(f"{function}: {name} is on the meta device and holds no data, but data was expected")
    if x.dtype not in dtypes:
        raise TypeError(f"{function}: {name} is {x.dtype}, but one of {_names(dtypes)} was expected")
    return x


def like(function: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """Check that ``x`` has the dtype and device of the first argument."""
    if x.dtype != first.dtype:
        raise TypeError(f"{function}: {name} is {x.dtype}, but {first_name} is {first.dtype}")
    same_device(function, name, x, first_name, first)


def same_device(function: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """Check that ``x`` lies on the device of the first argument."""
    if x.device != first.device:
        raise ValueError(f"{function}: {name} is on {x.device}, but {first_name} is on {first.device}")


def vector(function: str, name: str, x: object, size: int, first_name: str, first: Tensor) -> None:
    """Check that ``x`` is a float tensor ``[size]`` with the dtype and device of the first argument."""
    x = tensor(function, name, x)
    if tuple(x.shape) != (size,):
        raise ValueError(
            f"{function}: {name} is {tuple(x.shape)}, but {(size,)} was expected, as {first_name} is "
            f"{tuple(first.shape)}"
        )
    like(function, name, x, first_name, first)


def choice(function: str, name: str, x: object, known: Sequence[str]) -> None:
    """Check that ``x`` is one of ``known``."""
    if not isinstance(x, str) or x not in known:
        raise ValueError(f"{function}: {name} is {x!r}, but one of {', '.join(known)} was expected")


def same(function: str, name: str, x: object, first_name: str, first: Tensor) -> Tensor:
    """Check that ``x`` is a float tensor with the shape, dtype and device of the first argument."""
    return _floats(function, name, x, tuple(first.shape), first_name, first)


def rows(function: str, name: str, x: object, first_name: str, first: Tensor) -> Tensor:
    """Check that ``x`` is a float tensor with one number for each row of the first argument's last dimension."""
    return _floats(function, name, x, tuple(first.shape[:-1]), first_name, first)


def _floats(
    function: str, name: str, x: object, expected: tuple[int, ...], first_name: str, first: Tensor
) -> Tensor:
    x = tensor(function, name, x)
    if tuple(x.shape) != expected:
        raise ValueError(
            f"{function}: {name} is {tuple(x.shape)}, but {expected} was expected, as {first_name} is "
            f"{tuple(first.shape)}"
        )
    like(function, name, x, first_name, first)
    return x


def scan(
    function: str,
    floats: dict[str, object],
    masks: dict[str, object] | None = None,
    optional_masks: dict[str, object] | None = None,
    columns: dict[str, object] | None = None,
) -> tuple[int, int]:
    """Check the tensors of a reverse scan; the first of ``floats`` sets T, N, dtype and device.

    Args:
        function: name used in messages.
        floats: ``[T, N]`` float tensors.
        masks: ``[T, N]`` bool or float tensors.
        optional_masks: likewise, or None.
        columns: ``[N]`` float tensors.

    Returns:
        ``(T, N)``.
    """
    first_name, first_object = next(iter(floats.items()))
    first = tensor(function, first_name, first_object)
    if first.ndim != 2 or first.shape[0] < 1:
        raise ValueError(
            f"{function}: {first_name} is {tuple(first.shape)}, but [T, N] with T >= 1 was expected"
        )
    T, N = first.shape
    for name, x in floats.items():
        x = tensor(function, name, x)
        _shape(function, name, x, (T, N), first_name)
        like(function, name, x, first_name, first)
    given = {k: x for k, x in (optional_masks or {}).items() if x is not None}
    for name, x in {**(masks or {}), **given}.items():
        x = tensor(function, name, x, MASK_DTYPES)
        _shape(function, name, x, (T, N), first_name)
        same_device(function, name, x, first_name, first)
    for name, x in (columns or {}).items():
        x = tensor(function, name, x)
        if tuple(x.shape) != (N,):
            raise ValueError(
                f"{function}: {name} is {tuple(x.shape)}, but [N] = {(N,)} was expected, as {first_name} is {(T, N)}"
            )
        like(function, name, x, first_name, first)
    return T, N


def _shape(function: str, name: str, x: Tensor, expected: tuple[int, int], first_name: str) -> None:
    if tuple(x.shape) == expected:
        return
    hint = ""
    if tuple(x.shape) == expected[::-1]:
        hint = "; it looks transposed: pywm is time-major, [T, N]"
    raise ValueError(
        f"{function}: {name} is {tuple(x.shape)}, but {expected} was expected, the shape of {first_name}{hint}"
    )


def number(
    function: str,
    name: str,
    x: object,
    low: float = 0.0,
    high: float = math.inf,
    *,
    exclusive_low: bool = False,
    finite: bool = False,
) -> float:
    """Check that ``x`` is a real number in [low, high], or (low, high] with ``exclusive_low``; ``finite``: not infinite."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{function}: {name} is a {type(x).__name__}, but a number was expected")
    try:
        value = float(x)
    except OverflowError:
        value = math.nan
    above, below = low < value if exclusive_low else low <= value, value < high if finite else value <= high
    if not (above and below):
        # Only here: a tracer that carries the number as a symbol cannot write it down.
        is_too_large = isinstance(x, int) and math.isnan(value)
        shown = "an integer beyond the range of floats" if is_too_large else str(x)
        opening, closing = "(" if exclusive_low else "[", ")" if finite else "]"
        raise ValueError(
            f"{function}: {name} is {shown}, but a number in {opening}{low:g}, {high:g}{closing} was expected"
        )
    return value


def integer(function: str, name: str, x: object, low: int, high: int) -> int:
    """Check that ``x`` is an integer in [low, high]."""
    if isinstance(x, bool) or not isinstance(x, numbers.Integral | torch.SymInt):
        raise TypeError(f"{function}: {name} is a {type(x).__name__}, but an int was expected")
    value = x if isinstance(x, torch.SymInt) else int(x)
    if not low <= value <= high:
        raise ValueError(f"{function}: {name} is {value}, but an int in [{low}, {high}] was expected")
    return value  # type: ignore[return-value]


def flag(function: str, name: str, x: object) -> bool:
    """Check that ``x`` is True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{function}: {name} is a {type(x).__name__}, but a bool was expected")
    return x


def step(function: str, x: object) -> int:
    """Check the number of an optimiser's step, from 1 on."""
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        raise TypeError(f"{function}: step is a {type(x).__name__}, but an int was expected")
    if x < 1:
        raise ValueError(f"{function}: step is {x}, but a number from 1 on was expected")
    return x  # type: ignore[return-value]


def decay(function: str, name: str, x: object) -> float:
    """Check the decay of a running average, in [0, 1)."""
    beta = number(function, name, x, high=1)
    if beta == 1:
        raise ValueError(f"{function}: {name} is {x}, but a number in [0, 1) was expected")
    return beta


def changed(function: str, name: str, x: Tensor) -> None:
    """Check that ``x`` may be changed in place: contiguous, and not watched by autograd."""
    # A tracer cannot ask for the lazy sign; what it traces has none.
    lazy = not torch.compiler.is_compiling() and x.is_neg()
    if not x.is_contiguous() or lazy:
        raise ValueError(
            f"{function}: {name} has strides {x.stride()}{' and a lazy sign' if lazy else ''}, but a plain "
            "contiguous buffer was expected, for it is changed in place"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: {name} requires a gradient, but a buffer that autograd does not watch was expected; "
            "call it under torch.no_grad()"
        )


def flat_buffers(function: str, *, param: object, grad: object, exp_avg: object, exp_avg_sq: object) -> None:
    """Check an optimiser's buffers ``[P]``; all but the gradient are changed in place."""
    first = tensor(function, "param", param, KERNEL_DTYPES)
    if first.ndim != 1:
        raise ValueError(f"{function}: param is {tuple(first.shape)}, but [P], one flat buffer, was expected")
    for name, x in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        x = tensor(function, name, x, KERNEL_DTYPES)
        if x.shape != first.shape:
            raise ValueError(
                f"{function}: {name} is {tuple(x.shape)}, but {tuple(first.shape)} was expected, the shape of param"
            )
        like(function, name, x, "param", first)
        if name != "grad":
            changed(function, name, x)
