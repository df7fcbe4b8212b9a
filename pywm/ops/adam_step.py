"""Adam with a clipped global norm over one flat buffer: the public function and the dispatcher's op."""

from __future__ import annotations

import torch
from torch import Tensor

from pywm.ops import _check, _native, reference
from pywm.ops._registry import define, plain, served

_entry = _native.entry("adam_step_")


def adam_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    max_grad_norm: float | None = None,
) -> Tensor:
    r"""Clip the gradient's norm and take one step of Adam, in place.

    .. math::
        g \leftarrow g \min\Bigl(1, \frac{c}{\lVert g \rVert + 10^{-6}}\Bigr), \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \mathrm{lr}\,
            \frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}

    What ``clip_grad_norm_`` and ``torch.optim.Adam`` do together, but ``grad`` itself is left as it is. **If the norm is
    NaN or infinite, nothing is changed**: the step is skipped, and the caller sees it in the result.

    Args:
        param: θ, ``[P]`` float32 or float64, contiguous; changed in place. All parameters of a network in one buffer.
        grad: ``[P]``.
        exp_avg: m, ``[P]``, contiguous; changed in place; zeros at first.
        exp_avg_sq: v, likewise.
        step: k >= 1, which step this is.
        lr: learning rate >= 0.
        beta1: β₁ in [0, 1), decay of m.
        beta2: β₂ in [0, 1), decay of v.
        eps: ε >= 0, added to the denominator.
        max_grad_norm: c >= 0; None does not clip.

    Returns:
        0-d, the norm of the gradient before clipping. The same on any number of threads. Compiled on CPU; other devices
        run the reference.

    Raises:
        TypeError: an argument is not a dense float32 or float64 tensor, or dtypes differ.
        ValueError: shapes or devices differ, a buffer that is changed is not contiguous or requires a gradient, or a
            number is out of range.

    Source:
        Kingma and Ba (2015), algorithm 1; clipping as in Pascanu et al. (2013).
    """
    if not torch.compiler.is_compiling() and not _native.is_disabled():
        norm = _entry(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, max_grad_norm, False)
        if norm is not None:
            torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))
            return norm  # type: ignore[no-any-return]
    _check.flat_buffers("adam_step_", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    step = _check.step("adam_step_", step)
    lr = _check.number("adam_step_", "lr", lr, finite=True)
    beta1, beta2 = _check.decay("adam_step_", "beta1", beta1), _check.decay("adam_step_", "beta2", beta2)
    eps = _check.number("adam_step_", "eps", eps, finite=True)
    if max_grad_norm is not None:
        max_grad_norm = _check.number("adam_step_", "max_grad_norm", max_grad_norm)
    arguments = param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, max_grad_norm
    if not (_native.supports(param) and param.device.type == "cpu"):
        return reference.adam_step_(*arguments)
    return torch.ops.pywm.adam_step_(*arguments)  # type: ignore[no-any-return]


def _fake(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, max_grad_norm):  # type: ignore[no-untyped-def]
    return param.new_empty(())


def _forward(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, max_grad_norm):  # type: ignore[no-untyped-def]
    if param.numel() == 0:
        return param.new_zeros(())
    state = param.detach(), plain(grad), exp_avg.detach(), exp_avg_sq.detach()
    return served(_entry(*state, step, lr, beta1, beta2, eps, max_grad_norm, True), "adam_step_")


define(
    "adam_step_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, int step, float lr, "
    "float beta1, float beta2, float eps, float? max_grad_norm) -> Tensor",
    _fake,
    _forward,
    cuda=False,
)
