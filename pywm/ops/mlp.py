"""Multilayer perceptrons in one call: the public function, the dispatcher's op, and its gradient.

A layer is a few microseconds of arithmetic for a small network, and several times that of dispatch and bookkeeping in
PyTorch, forward and backward. Here all layers are one call each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pywm.ops import _check, _native, reference
from pywm.ops._registry import (
    define,
    differentiate,
    in_float32,
    is_transformed,
    plain,
    plain_optional,
    served,
)

ACTIVATIONS = ("tanh", "silu", "elu", "relu")
OUTPUT_ACTIVATIONS = ("none", *ACTIVATIONS)

_entry = _native.entry("mlp")
_entry_backward = _native.entry("mlp_backward")


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "tanh",
    output_activation: str = "none",
) -> Tensor:
    r"""Apply linear layers with a nonlinearity between them.

    .. math::
        h_0 = x, \qquad h_l = f(W_l h_{l-1} + b_l) \ (l < L), \qquad y = g(W_L h_{L-1} + b_L)

    with f the activation and g the output activation, usually none.

    Args:
        x: ``[..., I]`` float32 or float64 (float16 and bfloat16 through the reference).
        weights: L >= 1 tensors ``[out, in]``, as in ``nn.Linear``; each takes what the one before gives.
        biases: L tensors ``[out]``.
        activation: ``"tanh"``, ``"silu"``, ``"elu"`` or ``"relu"``, of all layers but the last.
        output_activation: the same or ``"none"``, of the last layer.

    Returns:
        ``[..., O]``, dtype and device of ``x``. Differentiable once in x, weights and biases. Compiled on CPU; other
        devices, ``torch.func`` transforms and forward-mode differentiation run the reference.

    Raises:
        TypeError: an argument is not a dense float tensor, dtypes differ, or weights or biases is no list.
        ValueError: a layer does not fit the one before, devices differ, or an activation is unknown.
    """
    transformed = is_transformed()
    if not torch.compiler.is_compiling() and not _native.is_disabled() and not transformed:
        result = _entry(x, weights, biases, activation, output_activation, False, False)
        if result is not None:
            if result is not NotImplemented:
                return result  # type: ignore[no-any-return]
            return _Eager.apply(activation, output_activation, x, *weights, *biases)  # type: ignore[no-any-return, no-untyped-call]
    _check_call(x, weights, biases, activation, output_activation)
    if transformed or not (_native.supports(x) and x.device.type == "cpu"):
        arguments = x, len(weights), activation, output_activation, *weights, *biases
        return in_float32(_reference, *arguments)  # type: ignore[no-any-return]
    y, _ = torch.ops.pywm.mlp(x, list(weights), list(biases), activation, output_activation)
    return y  # type: ignore[no-any-return]


def _reference(x: Tensor, count: int, activation: str, output_activation: str, *parameters: Tensor) -> Tensor:
    return reference.mlp(x, parameters[:count], parameters[count:], activation, output_activation)


def _check_call(
    x: object, weights: object, biases: object, activation: object, output_activation: object
) -> None:
    first = _check.tensor("mlp", "x", x)
    if first.ndim < 1 or first.shape[-1] < 1:
        raise ValueError(f"mlp: x is {tuple(first.shape)}, but [..., I] with I >= 1 was expected")
    for name, tensors in (("weights", weights), ("biases", biases)):
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"mlp: {name} is a {type(tensors).__name__}, but a list of tensors was expected")
    assert isinstance(weights, list | tuple)
    assert isinstance(biases, list | tuple)
    if not weights:
        raise ValueError("mlp: weights is empty, but at least one layer was expected")
    if len(biases) != len(weights):
        raise ValueError(
            f"mlp: biases is a list of {len(biases)}, but {len(weights)}, one a weight, was expected"
        )
    width, giver = first.shape[-1], "x"
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        weight = _check.tensor("mlp", f"weights[{i}]", weight)
        bias = _check.tensor("mlp", f"biases[{i}]", bias)
        if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] < 1:
            raise ValueError(
                f"mlp: weights[{i}] is {tuple(weight.shape)}, but [out, {width}] with out >= 1 was expected, as "
                f"{giver} gives {width} numbers"
            )
        width, giver = weight.shape[0], f"weights[{i}]"
        if tuple(bias.shape) != (width,):
            raise ValueError(
                f"mlp: biases[{i}] is {tuple(bias.shape)}, but {(width,)} was expected, as {giver} is "
                f"{tuple(weight.shape)}"
            )
        _check.like("mlp", f"weights[{i}]", weight, "x", first)
        _check.like("mlp", f"biases[{i}]", bias, "x", first)
    for name, value, known in (
        ("activation", activation, ACTIVATIONS),
        ("output_activation", output_activation, OUTPUT_ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"mlp: {name} is {value!r}, but one of {', '.join(known)} was expected")


def row_count(x: Tensor) -> Any:
    """Return how many rows ``[..., D]`` has; a tracer's sizes are no integers."""
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


class _Eager(torch.autograd.Function):
    """The op with its gradient, past the dispatcher, whose bookkeeping takes longer than a small network's arithmetic.

    The binding found the inputs plain.
    """

    @staticmethod
    def forward(ctx: Any, activation: str, output_activation: str, x: Tensor, *parameters: Tensor) -> Tensor:
        """See :func:`mlp`."""
        count = len(parameters) // 2
        weights, biases = parameters[:count], parameters[count:]
        y, kept = served(_entry(x, weights, biases, activation, output_activation, True, True), "mlp")
        ctx.activations = activation, output_activation
        ctx.save_for_backward(x, kept, None if output_activation == "none" else y, *weights)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of all inputs."""
        x, kept, y, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        arguments = (plain(grads[0]), x, y, kept, weights, *ctx.activations, wanted[2], any(wanted[3:]))
        # With create_graph grad mode is on, and the dispatcher's op refuses to be differentiated again.
        results = None if torch.is_grad_enabled() else _entry_backward(*arguments)
        if results is None:
            results = torch.ops.pywm.mlp_backward(*arguments)
        grad_x = results[0] if wanted[2] else None
        parameters = results[1:] if any(wanted[3:]) else (None,) * (2 * len(weights))
        return None, None, grad_x, *parameters


def _fake(x, weights, biases, activation, output_activation):  # type: ignore[no-untyped-def]
    hidden = sum(w.shape[0] for w in weights[:-1])
    per_row = hidden * (2 if activation == "silu" else 1)
    per_row += weights[-1].shape[0] if output_activation == "silu" else 0
    return x.new_empty((*x.shape[:-1], weights[-1].shape[0])), x.new_empty((row_count(x) * per_row,))


def _forward(x, weights, biases, activation, output_activation):  # type: ignore[no-untyped-def]
    parameters = [plain(w) for w in weights], [plain(b) for b in biases]
    return served(_entry(plain(x), *parameters, activation, output_activation, True, True), "mlp")


def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, y, kept, weights, activation, output_activation, want_x, want_parameters
):
    results = [x.new_empty(x.shape if want_x else (0,))]
    if want_parameters:
        results += [w.new_empty(w.shape) for w in weights]
        results += [w.new_empty(w.shape[:1]) for w in weights]
    return results


def _backward(  # type: ignore[no-untyped-def]
    grad, x, y, kept, weights, activation, output_activation, want_x, want_parameters
):
    if x.numel() == 0:  # no rows, which the kernel never sees
        results = [x.new_zeros(x.shape if want_x else (0,))]
        if want_parameters:
            results += [w.new_zeros(w.shape) for w in weights]
            results += [w.new_zeros(w.shape[:1]) for w in weights]
        return results
    tensors = plain(grad), plain(x), plain_optional(y), kept, [plain(w) for w in weights]
    result = _entry_backward(*tensors, activation, output_activation, want_x, want_parameters)
    return served(result, "mlp_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, _, *ctx.activations = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], None if ctx.activations[1] == "none" else output[0], *weights)


def _autograd(ctx: Any, grad: Tensor | None, unused: None) -> Any:
    x, kept, y, *weights = ctx.saved_tensors
    count = len(weights)
    if grad is None:
        return (None,) * 5
    want_x, want_weights, want_biases = ctx.needs_input_grad[:3]
    want = any(want_weights) or any(want_biases)
    results = torch.ops.pywm.mlp_backward(grad, x, y, kept, weights, *ctx.activations, want_x, want)
    grad_weights, grad_biases = (
        (results[1 : count + 1], results[count + 1 :]) if want else ([None] * count, [None] * count)
    )
    return results[0] if want_x else None, list(grad_weights), list(grad_biases), None, None


define(
    "mlp(Tensor x, Tensor[] weights, Tensor[] biases, str activation, str output_activation) -> (Tensor, Tensor)",
    _fake,
    _forward,
    cuda=False,
)
define(
    "mlp_backward(Tensor grad, Tensor x, Tensor? y, Tensor kept, Tensor[] weights, str activation, "
    "str output_activation, bool want_x, bool want_parameters) -> Tensor[]",
    _fake_backward,
    _backward,
    cuda=False,
)
differentiate("mlp", _setup_context, _autograd, "mlp_backward")
