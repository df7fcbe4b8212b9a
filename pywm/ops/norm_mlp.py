"""DreamerV3's perceptron in one call: the public function, the dispatcher's op, and its gradient.

Its layers are products with few columns, norms and activations. One by one each of them reads and writes all rows; here a
few rows go through all layers while they are near the core. One-hot inputs are gathered instead of multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
from pywm.ops.mlp import row_count
from pywm.ops.norm_act import norm_act
from pywm.ops.one_hot_linear import check_classes

_entry = _native.entry("norm_mlp")
_entry_backward = _native.entry("norm_mlp_backward")


def norm_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    index: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    r"""Apply linear layers, each with RMSNorm and SiLU behind it, and perhaps a last one without.

    .. math::
        z_l = W_l h_{l-1} + b_l, \qquad
        h_l = \operatorname{SiLU}\!\left(\gamma_l \odot
        \frac{z_l}{\sqrt{\operatorname{mean}(z_l^2) + \epsilon}}\right)

    with :math:`h_0 = x`, behind which the one-hot vectors of ``index`` stand if it is given. There are L layers; of the
    last one z is returned where it has no scale, and h where it has one.

    Args:
        x: ``[..., I]`` float32 or float64 (float16 and bfloat16 through the reference).
        weights: L >= 1 tensors ``[out, in]``, as in ``nn.Linear``; each takes what the one before gives, the first
            ``I + S * K`` numbers.
        biases: L tensors ``[out]``.
        scales: γ, L tensors ``[out]``, or L - 1 for a last layer without norm and activation.
        index: ``[..., S]`` uint8, the classes of S one-hot vectors, or None. K, 256 at most, is what the first weight's
            width leaves to each of them.
        eps: ε, above 0.

    Returns:
        ``[..., O]``, dtype and device of ``x``. Differentiable once in x, weights, biases and scales. One call on the CPU,
        up to 16 layers; other devices, ``torch.func`` transforms and forward-mode differentiation go layer by layer.

    Raises:
        TypeError: a tensor is not a dense float tensor (index: uint8), dtypes differ, or an argument is no list.
        ValueError: a layer does not fit the one before, devices differ, eps is not above 0, or (on the CPU) an index is
            not below K.

    Source:
        Hafner et al. (2025), "Mastering diverse control tasks through world models": its heads, encoder and decoder.
    """
    transformed = is_transformed()
    if not torch.compiler.is_compiling() and not _native.is_disabled() and not transformed:
        result = _entry(x, index, weights, biases, scales, eps, False, False)
        if result is not None:
            if result is not NotImplemented:
                return result  # type: ignore[no-any-return]
            return _Eager.apply(eps, len(weights), x, index, *weights, *biases, *scales)  # type: ignore[no-any-return, no-untyped-call]
    eps = _check_call(x, weights, biases, scales, index, eps)
    if transformed or not (_native.supports(x) and x.device.type == "cpu") or len(weights) > _MOST_LAYERS:
        arguments = x, index, len(weights), eps, *weights, *biases, *scales
        return in_float32(_layer_by_layer, *arguments)  # type: ignore[no-any-return]
    y, _ = torch.ops.pywm.norm_mlp(x, index, list(weights), list(biases), list(scales), eps)
    return y  # type: ignore[no-any-return]


MAX_CLASSES = 256
"""Classes that an index of one byte tells apart."""

_MOST_LAYERS = 16  # of the kernel


def _layer_by_layer(x: Tensor, index: Tensor | None, count: int, eps: float, *parameters: Tensor) -> Tensor:
    """Return what :func:`norm_mlp` is defined as."""
    weights, biases, scales = parameters[:count], parameters[count : 2 * count], parameters[2 * count :]
    if index is not None:
        groups = index.shape[-1]
        classes = (weights[0].shape[1] - x.shape[-1]) // groups
        codes = index.long().clamp(max=classes - 1)  # on the CPU all of them were looked at
        one_hot = functional.one_hot(codes, classes).flatten(-2).to(x.dtype)
        x = torch.cat([x, one_hot], -1)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = functional.linear(x, weight, bias)
        if i < len(scales) and x.is_cuda:
            x = norm_act(x, scales[i], eps=eps)
        elif i < len(scales):
            x = reference.norm_act(x, scales[i], None, "rms", "silu", eps)
    return x


def _check_call(
    x: object, weights: object, biases: object, scales: object, index: object, eps: object
) -> float:
    first = _check.tensor("norm_mlp", "x", x)
    if first.ndim < 1 or first.shape[-1] < 1:
        raise ValueError(f"norm_mlp: x is {tuple(first.shape)}, but [..., I] with I >= 1 was expected")
    for name, tensors in (("weights", weights), ("biases", biases), ("scales", scales)):
        if not isinstance(tensors, list | tuple):
            raise TypeError(
                f"norm_mlp: {name} is a {type(tensors).__name__}, but a list of tensors was expected"
            )
    assert isinstance(weights, list | tuple)
    assert isinstance(biases, list | tuple)
    assert isinstance(scales, list | tuple)
    if not weights:
        raise ValueError("norm_mlp: weights is empty, but at least one layer was expected")
    if len(biases) != len(weights):
        raise ValueError(
            f"norm_mlp: biases is a list of {len(biases)}, but {len(weights)}, one a weight, was expected"
        )
    if len(weights) - len(scales) not in (0, 1):
        raise ValueError(
            f"norm_mlp: scales is a list of {len(scales)}, but {len(weights)} or {len(weights) - 1} was expected, as "
            f"weights has {len(weights)}"
        )
    width: int | None = first.shape[-1]
    giver = "x"
    if index is not None:
        width = _check_index(first, index, weights[0])
        giver = "x with index"
    for i, weight in enumerate(weights):
        weight = _check.tensor("norm_mlp", f"weights[{i}]", weight)
        if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] < 1:
            raise ValueError(
                f"norm_mlp: weights[{i}] is {tuple(weight.shape)}, but [out, {width}] with out >= 1 was expected, as "
                f"{giver} gives {width} numbers"
            )
        width, giver = weight.shape[0], f"weights[{i}]"
        _check.like("norm_mlp", giver, weight, "x", first)
        for name, vectors in (("biases", biases), ("scales", scales)):
            if i >= len(vectors):
                continue
            vector = _check.tensor("norm_mlp", f"{name}[{i}]", vectors[i])
            if tuple(vector.shape) != (width,):
                raise ValueError(
                    f"norm_mlp: {name}[{i}] is {tuple(vector.shape)}, but {(width,)} was expected, as {giver} is "
                    f"{tuple(weight.shape)}"
                )
            _check.like("norm_mlp", f"{name}[{i}]", vector, "x", first)
    return _check.number("norm_mlp", "eps", eps, exclusive_low=True, finite=True)


def _check_index(x: Tensor, index: object, weight: object) -> int:
    """Return the width of what the first layer takes."""
    i = _check.tensor("norm_mlp", "index", index, (torch.uint8,))
    if i.ndim != x.ndim or i.shape[:-1] != x.shape[:-1] or i.shape[-1] < 1:
        raise ValueError(
            f"norm_mlp: index is {tuple(i.shape)}, but {(*x.shape[:-1], 'S')} with S >= 1 was expected, as x is "
            f"{tuple(x.shape)}"
        )
    _check.same_device("norm_mlp", "index", i, "x", x)
    w = _check.tensor("norm_mlp", "weights[0]", weight)
    S, I = i.shape[-1], x.shape[-1]  # noqa: E741
    if w.ndim != 2 or w.shape[1] <= I or (w.shape[1] - I) % S or w.shape[1] - I > S * MAX_CLASSES:
        raise ValueError(
            f"norm_mlp: weights[0] is {tuple(w.shape)}, but [out, {I} + {S} * K] with 1 <= K <= {MAX_CLASSES} was "
            "expected, as x is "
            f"{tuple(x.shape)} and index {tuple(i.shape)}"
        )
    classes = (w.shape[1] - I) // S
    check_classes("norm_mlp", i, classes, x, w)
    return int(w.shape[1])


class _Eager(torch.autograd.Function):
    """The op with its gradient, past the dispatcher. The binding found the inputs plain."""

    @staticmethod
    def forward(
        ctx: Any, eps: float, count: int, x: Tensor, index: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        """See :func:`norm_mlp`."""
        weights, biases, scales = parameters[:count], parameters[count : 2 * count], parameters[2 * count :]
        y, kept = served(_entry(x, index, weights, biases, scales, eps, True, True), "norm_mlp")
        ctx.eps, ctx.count = eps, count
        ctx.save_for_backward(x, index, kept, *weights, *scales)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of all inputs."""
        x, index, kept, *rest = ctx.saved_tensors
        weights, scales = rest[: ctx.count], rest[ctx.count :]
        wanted = ctx.needs_input_grad
        arguments = (plain(grads[0]), x, index, kept, weights, scales, ctx.eps, wanted[2], any(wanted[4:]))
        # With create_graph grad mode is on, and the dispatcher's op refuses to be differentiated again.
        results = None if torch.is_grad_enabled() else _entry_backward(*arguments)
        if results is None:
            results = torch.ops.pywm.norm_mlp_backward(*arguments)
        grad_x = results[0] if wanted[2] else None
        parameters = results[1:] if any(wanted[4:]) else (None,) * (2 * len(weights) + len(scales))
        return None, None, grad_x, None, *parameters


def _fake(x, index, weights, biases, scales, eps):  # type: ignore[no-untyped-def]
    kept = sum(s.shape[0] for s in scales)
    return x.new_empty((*x.shape[:-1], weights[-1].shape[0])), x.new_empty((row_count(x) * kept,))


def _forward(x, index, weights, biases, scales, eps):  # type: ignore[no-untyped-def]
    parameters = [[plain(p) for p in group] for group in (weights, biases, scales)]
    return served(_entry(plain(x), plain_optional(index), *parameters, eps, True, True), "norm_mlp")


def _parameter_shapes(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Any]:
    return [w.shape for w in weights] + [w.shape[:1] for w in weights] + [s.shape for s in scales]


def _fake_backward(grad, x, index, kept, weights, scales, eps, want_x, want_parameters):  # type: ignore[no-untyped-def]
    shapes = [x.shape if want_x else (0,)]
    shapes += _parameter_shapes(weights, scales) if want_parameters else []
    return [x.new_empty(shape) for shape in shapes]


def _backward(grad, x, index, kept, weights, scales, eps, want_x, want_parameters):  # type: ignore[no-untyped-def]
    if x.numel() == 0:  # no rows, which the kernel never sees
        shapes = [x.shape if want_x else (0,)]
        shapes += _parameter_shapes(weights, scales) if want_parameters else []
        return [x.new_zeros(shape) for shape in shapes]
    tensors = plain(grad), plain(x), plain_optional(index), kept
    parameters = [plain(w) for w in weights], [plain(s) for s in scales]
    result = _entry_backward(*tensors, *parameters, eps, want_x, want_parameters)
    return served(result, "norm_mlp_backward")


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, index, weights, _, scales, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.count = len(weights)
    ctx.save_for_backward(x, index, output[1], *weights, *scales)


def _autograd(ctx: Any, grad: Tensor | None, unused: None) -> Any:
    if grad is None:
        return (None,) * 6
    x, index, kept, *rest = ctx.saved_tensors
    weights, scales = rest[: ctx.count], rest[ctx.count :]
    want_x, _, *want_parameters = ctx.needs_input_grad[:5]
    want = any(any(each) for each in want_parameters)
    results = torch.ops.pywm.norm_mlp_backward(grad, x, index, kept, weights, scales, ctx.eps, want_x, want)
    count, norms = len(weights), len(scales)
    found = results[1:] if want else [None] * (2 * count + norms)
    groups = list(found[:count]), list(found[count : 2 * count]), list(found[2 * count :])
    return results[0] if want_x else None, None, *groups, None


define(
    "norm_mlp(Tensor x, Tensor? index, Tensor[] weights, Tensor[] biases, Tensor[] scales, float eps) "
    "-> (Tensor, Tensor)",
    _fake,
    _forward,
    cuda=False,
)
define(
    "norm_mlp_backward(Tensor grad, Tensor x, Tensor? index, Tensor kept, Tensor[] weights, Tensor[] scales, float eps, "
    "bool want_x, bool want_parameters) -> Tensor[]",
    _fake_backward,
    _backward,
    cuda=False,
)
differentiate("norm_mlp", _setup_context, _autograd, "norm_mlp_backward")
