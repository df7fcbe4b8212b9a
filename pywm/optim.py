"""Optimisers over one flat buffer: a step costs a handful of calls, however many layers a network has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pywm.ops import adam_step_

__all__ = ["Adam", "FlatParameters"]


class FlatParameters:
    """The parameters of a module, moved into one contiguous buffer; the gradients likewise.

    The module keeps its parameters, which become views: what an optimiser writes to ``data`` the module sees. Build it
    when the module is on its device, and once.

    Args:
        module: the module, all of whose parameters are float32 and on one device.

    Attributes:
        data: the values, ``[P]``, in the order of ``module.parameters()``.
        grad: the gradients, ``[P]``.
        views: name of each parameter to the parameter itself, a view of ``data`` whose ``.grad`` is a view of ``grad``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.views = dict(module.named_parameters())
        parameters = list(self.views.values())
        if not parameters:
            raise ValueError("FlatParameters: module has no parameters, but at least one was expected")
        for name, p in self.views.items():
            if p.dtype != torch.float32 or p.device != parameters[0].device:
                raise ValueError(
                    f"FlatParameters: {name} is {p.dtype} on {p.device}, but float32 on {parameters[0].device} was expected"
                )
        with torch.no_grad():
            self.data = torch.cat([p.reshape(-1) for p in parameters])
        self.grad = torch.zeros_like(self.data)
        self._parameters = parameters
        self._grads = []
        start = 0
        for p in parameters:
            stop = start + p.numel()
            grad = self.grad[start:stop].view_as(p)
            p.data = self.data[start:stop].view_as(p)
            p.grad = grad
            self._grads.append(grad)
            start = stop

    def backward(self, loss: Tensor) -> None:
        """Write the gradients of a scalar ``loss`` into ``grad``, replacing what was there."""
        grads = torch.autograd.grad(loss, self._parameters)
        torch._foreach_copy_(self._grads, grads)

    def first_non_finite(self) -> str | None:
        """Return the name of the first parameter that holds NaN or infinity, or None."""
        if bool(torch.isfinite(self.data).all()):
            return None
        return next(name for name, p in self.views.items() if not bool(torch.isfinite(p).all()))


class Adam:
    """Adam with global-norm clipping over the flat buffer of a :class:`FlatParameters`: one call a step.

    What ``clip_grad_norm_`` and ``torch.optim.Adam`` do together, but for gradients that are not finite: such a step
    changes nothing, and its norm tells. :func:`pywm.ops.adam_step_` has the formula.

    Args:
        parameters: the flat buffer to optimise.
        lr: learning rate, unless a step is given another one.
        betas: decay of the two averages.
        eps: added to the denominator; PPO takes 1e-5.
        max_grad_norm: largest norm of the whole gradient; None does not clip.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        max_grad_norm: float | None = None,
    ) -> None:
        self.parameters = parameters
        self.lr, self.betas, self.eps, self.max_grad_norm = lr, betas, eps, max_grad_norm
        self.exp_avg = torch.zeros_like(parameters.data)
        self.exp_avg_sq = torch.zeros_like(parameters.data)
        self.updates = 0

    @torch.no_grad()
    def step(self, lr: float | None = None) -> Tensor:
        """Clip the gradients and take one step.

        Args:
            lr: learning rate of this step.

        Returns:
            The norm of the gradients before clipping, 0-d.
        """
        self.updates += 1
        flat = self.parameters
        return adam_step_(
            flat.data,
            flat.grad,
            self.exp_avg,
            self.exp_avg_sq,
            step=self.updates,
            lr=self.lr if lr is None else lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
        )
