"""LaProp with adaptive gradient clipping over one flat buffer: the public function and the dispatcher's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pywm.ops import _check, _native, reference
from pywm.ops._registry import define, plain, served

_entry = _native.entry("laprop_step_")


def laprop_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    offsets: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
    clip: float | None = 0.3,
    min_norm: float = 1e-3,
    slow: Tensor | None = None,
    slow_rate: float = 0.02,
    rounded: Tensor | None = None,
) -> Tensor:
    r"""Clip each tensor's gradient by the norm of its values and take one step of LaProp, in place.

    .. math::
        g_s \leftarrow \frac{g_s}{\max\bigl(1, \frac{\lVert g_s \rVert}
            {c \max(\lVert \theta_s \rVert, \rho)}\bigr)}, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) \frac{g}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}, \quad
        \theta \leftarrow \theta - \mathrm{lr} \frac{m}{1 - \beta_1^k}, \quad
        \bar\theta \leftarrow \bar\theta + \tau (\theta - \bar\theta)

    Index s is a tensor of the network, a part of the flat buffer. Unlike Adam, LaProp normalises first and averages then.
    ``grad`` itself is left as it is. **If the norm of the whole gradient is NaN or infinite, nothing is changed**: the
    step is skipped, and the caller sees it in the result.

    Args:
        param: θ, ``[P]`` float32 or float64, contiguous; changed in place. All parameters of a network in one buffer.
        grad: ``[P]``.
        exp_avg: m, ``[P]``, contiguous; changed in place; zeros at first.
        exp_avg_sq: v, likewise.
        offsets: ``[S + 1]`` int64, ascending from 0 to P: tensor s is ``param[offsets[s]:offsets[s + 1]]``. Checked on the
            CPU; elsewhere a look would wait for the device.
        step: k >= 1, which step this is.
        lr: learning rate >= 0.
        beta1: β₁ in [0, 1), decay of m.
        beta2: β₂ in [0, 1), decay of v.
        eps: ε >= 0, added to the denominator.
        clip: c >= 0, the largest ratio of the norms of gradient and values; None does not clip.
        min_norm: ρ >= 0, the least norm of the values that counts, so that tensors of zeros can leave zero.
        slow: θ̄, ``[Q]`` with Q <= P, contiguous, or None: changed in place, follows the last Q parameters, where a critic
            may lie whose targets should move slowly.
        slow_rate: τ in [0, 1].
        rounded: ``[P]`` bfloat16, contiguous, or None: written with the new parameters, for products with bfloat16
            operands.

    Returns:
        0-d, the norm of the whole gradient before clipping. The same on any number of threads.

    Raises:
        TypeError: an argument is not a dense float32 or float64 tensor, dtypes differ, ``offsets`` is not int64, or
            ``rounded`` is not bfloat16.
        ValueError: shapes or devices differ, a buffer that is changed is not contiguous or requires a gradient, the offsets
            are none, or a number is out of range.

    Source:
        Ziyin et al. (2020), LaProp; Brock et al. (2021), High-performance large-scale image recognition without
        normalization, section 4, with whole tensors for units; Hafner et al. (2025), Dreamer V3, and its code.
    """
    if not torch.compiler.is_compiling() and not _native.is_disabled():
        state = param, grad, exp_avg, exp_avg_sq, offsets
        numbers = step, lr, beta1, beta2, eps, clip, min_norm
        norm = _entry(*state, *numbers, slow, slow_rate, rounded, False)
        if norm is not None:
            changed = (param, exp_avg, exp_avg_sq, slow, rounded)
            torch.autograd.graph.increment_version([x for x in changed if x is not None])
            return norm  # type: ignore[no-any-return]
    function = "laprop_step_"
    _check.flat_buffers(function, param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_offsets(offsets, param)
    step = _check.step(function, step)
    lr = _check.number(function, "lr", lr, finite=True)
    beta1, beta2 = _check.decay(function, "beta1", beta1), _check.decay(function, "beta2", beta2)
    eps = _check.number(function, "eps", eps, finite=True)
    min_norm = _check.number(function, "min_norm", min_norm, finite=True)
    if clip is not None:
        clip = _check.number(function, "clip", clip, finite=True)
    slow_rate = _check.number(function, "slow_rate", slow_rate, high=1)
    _check_followers(param, slow, rounded)
    state = param, grad, exp_avg, exp_avg_sq, offsets
    arguments = *state, step, lr, beta1, beta2, eps, clip, min_norm, slow, slow_rate, rounded
    if not _native.supports(param):
        return reference.laprop_step_(*arguments)
    return torch.ops.pywm.laprop_step_(*arguments)  # type: ignore[no-any-return]


def _check_offsets(offsets: object, param: Tensor) -> None:
    x = _check.tensor("laprop_step_", "offsets", offsets, (torch.int64,))
    _check.same_device("laprop_step_", "offsets", x, "param", param)
    if x.ndim != 1 or x.shape[0] < 1:
        raise ValueError(f"laprop_step_: offsets is {tuple(x.shape)}, but [S + 1] was expected")
    # What a tracer holds has no values.
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) is not Tensor:
        return
    P = param.shape[0]
    if int(x[0]) != 0 or int(x[-1]) != P or bool((x.diff() < 0).any()):
        raise ValueError(
            f"laprop_step_: offsets is {x.tolist() if len(x) < 9 else [*x[:4].tolist(), '...', *x[-4:].tolist()]}, but "
            f"ascending numbers from 0 to {P} were expected"
        )


def _check_followers(param: Tensor, slow: object, rounded: object) -> None:
    function, P = "laprop_step_", param.shape[0]
    if slow is not None:
        x = _check.tensor(function, "slow", slow, (param.dtype,))
        if x.ndim != 1 or x.shape[0] > P:
            raise ValueError(
                f"{function}: slow is {tuple(x.shape)}, but [Q] with Q <= {P}, the parameters, was expected"
            )
        _check.same_device(function, "slow", x, "param", param)
        _check.changed(function, "slow", x)
    if rounded is not None:
        x = _check.tensor(function, "rounded", rounded, (torch.bfloat16,))
        if x.shape != param.shape:
            raise ValueError(
                f"{function}: rounded is {tuple(x.shape)}, but {(P,)} was expected, the shape of param"
            )
        _check.same_device(function, "rounded", x, "param", param)
        _check.changed(function, "rounded", x)


def _fake(param, *rest):  # type: ignore[no-untyped-def]
    return param.new_empty(())


def _forward(param, grad, exp_avg, exp_avg_sq, offsets, *rest):  # type: ignore[no-untyped-def]
    if param.numel() == 0:
        return param.new_zeros(())
    *numbers, slow, slow_rate, rounded = rest
    slow, rounded = (None if x is None else x.detach() for x in (slow, rounded))
    state = param.detach(), plain(grad), exp_avg.detach(), exp_avg_sq.detach(), plain(offsets)
    return served(_entry(*state, *numbers, slow, slow_rate, rounded, True), "laprop_step_")


define(
    "laprop_step_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor offsets, int step, "
    "float lr, float beta1, float beta2, float eps, float? clip, float min_norm, Tensor(d!)? slow, float slow_rate, "
    "Tensor(e!)? rounded) -> Tensor",
    _fake,
    _forward,
)
