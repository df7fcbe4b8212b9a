"""Gates of recurrent cells: the public functions, the dispatcher's ops, and their gradients.

What remains of a cell beside its matrix products, in one pass over memory each way. PlaNet's cell multiplies the state
by its reset gate before the last product, so it takes two ops.
"""

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


def block_gru_gates(gates: Tensor, deter: Tensor, *, blocks: int = 8) -> Tensor:
    r"""Return the next state of DreamerV3's block-diagonal GRU.

    .. math::
        r = \sigma(\hat r), \quad c = \tanh(r \odot \hat c), \quad u = \sigma(\hat u - 1), \quad
        h' = u \odot c + (1-u) \odot h

    The gates come block by block: of the ``3 * D / blocks`` numbers of a block the first third is the reset gate, then
    come the candidate and the update gate, as its matrix product leaves them. Update = 1 replaces the state.

    Args:
        gates: ``[..., 3 * D]`` pre-activations, float32 or float64 (float16 and bfloat16 through the reference).
        deter: ``[..., D]`` the state h.
        blocks: how many blocks D is cut into.

    Returns:
        ``[..., D]`` the next state, dtype and device of ``deter``. Differentiable once in gates and deter.

    Raises:
        TypeError: an argument is not a dense float tensor, dtypes differ, or blocks is no integer.
        ValueError: shapes or devices differ, or ``blocks`` does not divide D.

    Source:
        Hafner et al. (2025), the reference implementation of DreamerV3.
    """
    if _is_direct():
        result = _block.entry(gates, deter, blocks, False)
        if result is not None:
            return _block.apply(gates, deter, blocks) if result is NotImplemented else result  # type: ignore[no-any-return]
    D = _check_rows("block_gru_gates", deter, {"gates": (gates, 3)})
    if isinstance(blocks, bool) or not isinstance(blocks, int):
        raise TypeError(f"block_gru_gates: blocks is a {type(blocks).__name__}, but an int was expected")
    if blocks < 1 or D % blocks:
        shown = blocks if abs(blocks) < 2**63 else "an integer beyond 64 bits"
        raise ValueError(
            f"block_gru_gates: blocks is {shown}, but a divisor of {D} was expected, as deter is {tuple(deter.shape)}"
        )
    return _block.dispatch(gates, deter, blocks)


def layernorm_gru_gates(
    pre: Tensor, scale: Tensor, shift: Tensor, deter: Tensor, *, eps: float = 1e-3
) -> Tensor:
    r"""Return the next state of DreamerV2's GRU, whose gates are normalised together.

    .. math::
        (\hat r, \hat c, \hat u) = \gamma \odot \frac{p - \operatorname{mean}(p)}{\sqrt{\operatorname{var}(p) + \epsilon}}
        + \beta, \qquad
        h' = u \odot c + (1-u) \odot h

    with r = σ(r̂), c = tanh(r ⊙ ĉ) and u = σ(û - 1). One mean and variance are taken over all ``3 * D`` numbers of a row.

    Args:
        pre: ``[..., 3 * D]`` what the matrix product left: reset gate, candidate, update gate. float32 or float64
            (float16 and bfloat16 through the reference).
        scale: ``[3 * D]`` γ.
        shift: ``[3 * D]`` β.
        deter: ``[..., D]`` the state h.
        eps: ε > 0.

    Returns:
        ``[..., D]`` the next state, dtype and device of ``deter``. Differentiable once in all tensors; gradients of scale
        and shift sum over rows in the same order in every run.

    Raises:
        TypeError: an argument is not a dense float tensor, dtypes differ, or eps is no number.
        ValueError: shapes or devices differ, or eps is not positive.

    Source:
        Hafner et al. (2021), the reference implementation of DreamerV2.
    """
    if _is_direct():
        result = _layernorm.entry(pre, scale, shift, deter, eps, False)
        if result is NotImplemented:
            return _layernorm.apply(pre, scale, shift, deter, eps)  # type: ignore[no-any-return]
        if result is not None:
            return result  # type: ignore[no-any-return]
    D = _check_rows("layernorm_gru_gates", deter, {"pre": (pre, 3)})
    _check.vector("layernorm_gru_gates", "scale", scale, 3 * D, "deter", deter)
    _check.vector("layernorm_gru_gates", "shift", shift, 3 * D, "deter", deter)
    eps = _check.number("layernorm_gru_gates", "eps", eps, exclusive_low=True, finite=True)
    return _layernorm.dispatch(pre, scale, shift, deter, eps)


def gru_gates(input: Tensor, hidden: Tensor, deter: Tensor) -> Tensor:  # noqa: A002
    r"""Return the next state of the GRU of ``torch.nn.GRUCell``, which is Keras' ``reset_after``.

    .. math::
        r = \sigma(i_r + h_r), \quad z = \sigma(i_z + h_z), \quad n = \tanh(i_n + r \odot h_n), \quad
        h' = z \odot h + (1-z) \odot n

    in torch's order: reset gate, keep gate, candidate. Keep = 1 keeps the state, unlike the update gate of Dreamer's cells.
    Keras has the keep gate first.

    Args:
        input: ``[..., 3 * D]`` W·x with its bias, float32 or float64 (float16 and bfloat16 through the reference).
        hidden: ``[..., 3 * D]`` U·h with its bias.
        deter: ``[..., D]`` the state h.

    Returns:
        ``[..., D]`` the next state, dtype and device of ``deter``. Differentiable once in all arguments.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ.

    Source:
        Cho et al. (2014), in the variant of cuDNN.
    """
    if _is_direct():
        result = _reset_after.entry(input, hidden, deter, False)
        if result is not None:
            return _reset_after.apply(input, hidden, deter) if result is NotImplemented else result  # type: ignore[no-any-return]
    _check_rows("gru_gates", deter, {"input": (input, 3), "hidden": (hidden, 3)})
    return _reset_after.dispatch(input, hidden, deter)


def gru_block_reset(gates: Tensor, deter: Tensor) -> Tensor:
    r"""Return the state behind the reset gate of PlaNet's GRU: the input of its candidate's matrix product.

    .. math::
        \sigma(\hat r) \odot h

    Args:
        gates: ``[..., 2 * D]`` pre-activations of the reset gate and the update gate, float32 or float64 (float16 and
            bfloat16 through the reference).
        deter: ``[..., D]`` the state h.

    Returns:
        ``[..., D]``, dtype and device of ``deter``. Differentiable once in gates (0 for the update gate) and deter.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ.

    Source:
        TensorFlow's ``GRUBlockCell``, the cell of Hafner et al. (2019).
    """
    if _is_direct():
        result = _reset.entry(gates, deter, False)
        if result is not None:
            return _reset.apply(gates, deter) if result is NotImplemented else result  # type: ignore[no-any-return]
    _check_rows("gru_block_reset", deter, {"gates": (gates, 2)})
    return _reset.dispatch(gates, deter)


def gru_block_update(gates: Tensor, candidate: Tensor, deter: Tensor) -> Tensor:
    r"""Return the next state of PlaNet's GRU.

    .. math::
        u = \sigma(\hat u), \qquad h' = u \odot h + (1-u) \odot \tanh(\hat c)

    Update = 1 keeps the state, as the source has it.

    Args:
        gates: ``[..., 2 * D]`` pre-activations of the reset gate and the update gate, float32 or float64 (float16 and
            bfloat16 through the reference).
        candidate: ``[..., D]`` pre-activation ĉ, from the input and :func:`gru_block_reset`.
        deter: ``[..., D]`` the state h.

    Returns:
        ``[..., D]`` the next state, dtype and device of ``deter``. Differentiable once in gates (0 for the reset gate),
        candidate and deter.

    Raises:
        TypeError: an argument is not a dense float tensor, or dtypes differ.
        ValueError: shapes or devices differ.

    Source:
        TensorFlow's ``GRUBlockCell``, the cell of Hafner et al. (2019).
    """
    if _is_direct():
        result = _update.entry(gates, candidate, deter, False)
        if result is not None:
            return _update.apply(gates, candidate, deter) if result is NotImplemented else result  # type: ignore[no-any-return]
    _check_rows("gru_block_update", deter, {"gates": (gates, 2), "candidate": (candidate, 1)})
    return _update.dispatch(gates, candidate, deter)


def _is_direct() -> bool:
    return not is_compiling() and not _native.is_disabled() and forward_ad._current_level < 0


def _check_rows(function: str, deter: object, others: dict[str, tuple[object, int]]) -> int:
    """Check the state and the tensors beside it, some multiple of its width. Returns the width."""
    first = _check.tensor(function, "deter", deter)
    if first.ndim < 1 or first.shape[-1] < 1:
        raise ValueError(f"{function}: deter is {tuple(first.shape)}, but [..., D] with D >= 1 was expected")
    *rows, D = first.shape
    for name, (other, factor) in others.items():
        x = _check.tensor(function, name, other)
        expected = (*rows, factor * D)
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{function}: {name} is {tuple(x.shape)}, but {expected} was expected, as deter is {tuple(first.shape)}"
            )
        _check.like(function, name, x, "deter", first)
    return D


class _Op:
    """An op whose tensors all have gradients, and whose one output looks like its last tensor, the state."""

    def __init__(self, name: str, tensors: str, options: str = "") -> None:
        names = tensors.split()
        self.name, self.count = name, len(names)
        self.entry = _native.entry(name)
        parameters = ", ".join([*(f"Tensor {x}" for x in names), *([options] if options else [])])
        outputs = ", ".join(["Tensor"] * self.count)
        define(f"{name}({parameters}) -> Tensor", self._fake, self._forward)
        schema = f"{name}_backward(Tensor grad, {parameters}, bool[] wanted) -> ({outputs})"
        define(schema, self._fake_backward, self._backward)
        differentiate(name, self._setup_context, self._autograd, f"{name}_backward")
        self.apply = eager(self._forward, self._setup_context, self._autograd)

    def dispatch(self, *inputs: Any) -> Tensor:
        """Run what serves the inputs, which were checked: the reference or the dispatcher's op."""
        if is_transformed() or not _native.supports(inputs[self.count - 1]):
            return in_float32(getattr(reference, self.name), *inputs)  # type: ignore[no-any-return]
        return getattr(torch.ops.pywm, self.name)(*inputs)  # type: ignore[no-any-return]

    def _fake(self, *inputs: Any) -> Tensor:
        return empty_like(inputs[self.count - 1])

    def _forward(self, *inputs: Any) -> Any:
        tensors = (plain(x) for x in inputs[: self.count])
        return served(self.entry(*tensors, *inputs[self.count :], True), self.name)

    def _fake_backward(self, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, wanted = arguments
        return tuple(empty_if(w, x) for w, x in zip(wanted, inputs[: self.count], strict=True))

    def _backward(self, grad: Tensor, *arguments: Any) -> Any:
        *inputs, wanted = arguments
        tensors, options = inputs[: self.count], inputs[self.count :]
        if grad.numel() == 0:  # no rows, which the kernel never sees
            return tuple(x.new_zeros(x.shape if w else (0,)) for w, x in zip(wanted, tensors, strict=True))
        kernel: Callable[..., Any] = getattr(_native.module(), f"{self.name}_backward")
        return served(
            kernel(plain(grad), *(plain(x) for x in tensors), *options, *wanted), f"{self.name}_backward"
        )

    def _setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[: self.count])
        ctx.options = inputs[self.count :]

    def _autograd(self, ctx: Any, grad: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[: self.count])
        watched = is_watched(grad)
        run = getattr(torch.ops.pywm, f"{self.name}_backward") if watched else self._backward
        grads = run(grad, *ctx.saved_tensors, *ctx.options, wanted)
        return *gradients(wanted, grads), *(None for _ in ctx.options)


_block = _Op("block_gru_gates", "gates deter", "int blocks")
_layernorm = _Op("layernorm_gru_gates", "pre scale shift deter", "float eps")
_reset_after = _Op("gru_gates", "input hidden deter")
_reset = _Op("gru_block_reset", "gates deter")
_update = _Op("gru_block_update", "gates candidate deter")
