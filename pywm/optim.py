"""Optimisers over one flat buffer: a step costs a handful of calls, however many layers a network has."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pywm.ops import adam_step_, laprop_step_

__all__ = ["Adam", "FlatParameters", "LaProp", "SlowCopy"]


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
        offsets: where each parameter begins in ``data``, and at last P: int64 on the device of ``data``.
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
        sizes = torch.tensor([0, *(p.numel() for p in parameters)])
        self.offsets = sizes.cumsum(0).to(self.data.device)
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
        warmup: steps over which the learning rate grows from 0, that of the first step, to ``lr``.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        max_grad_norm: float | None = None,
        warmup: int = 0,
    ) -> None:
        _check_warmup("Adam", warmup)
        self.parameters = parameters
        self.lr, self.betas, self.eps, self.max_grad_norm = lr, betas, eps, max_grad_norm
        self.warmup = warmup
        self.exp_avg = torch.zeros_like(parameters.data)
        self.exp_avg_sq = torch.zeros_like(parameters.data)
        self.updates = 0

    @property
    def next_lr(self) -> float:
        """The learning rate of the next step, ``lr · min(1, updates/warmup)``."""
        return _warm(self.lr, self.updates, self.warmup)

    @torch.no_grad()
    def step(self, lr: float | None = None) -> Tensor:
        """Clip the gradients and take one step.

        Args:
            lr: learning rate of this step, without any warm-up.

        Returns:
            The norm of the gradients before clipping, 0-d.
        """
        lr = self.next_lr if lr is None else lr
        self.updates += 1
        flat = self.parameters
        return adam_step_(
            flat.data,
            flat.grad,
            self.exp_avg,
            self.exp_avg_sq,
            step=self.updates,
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
        )


class LaProp:
    """LaProp with adaptive gradient clipping and a linear warm-up over the flat buffer of a :class:`FlatParameters`.

    Every parameter's gradient is clipped by the norm of its values, biases and scales included. A step whose gradients are
    not finite changes nothing, and its norm tells. :func:`pywm.ops.laprop_step_` has the formula; the defaults are those of
    Dreamer V3.

    Args:
        parameters: the flat buffer to optimise.
        lr: learning rate after the warm-up, unless a step is given another one.
        betas: decay of the averages of the normalised gradients and of the squares.
        eps: added to the denominator.
        clip: largest ratio of the norms of a parameter's gradient and values; None does not clip.
        min_norm: the least norm of the values that counts.
        warmup: steps over which the learning rate grows from 0, that of the first step, to ``lr``.
        slow: a copy that follows with each step, of a module whose parameters are the last ones of the buffer. It must not
            be updated elsewhere.
        rounded: whether to keep a bfloat16 copy of all parameters.

    Attributes:
        exp_avg: the average of the normalised gradients, ``[P]``.
        exp_avg_sq: the average of the squares, ``[P]``.
        rounded: the bfloat16 copy, ``[P]``, as of the last step; None without.
        updates: steps taken.

    Raises:
        ValueError: what ``slow`` follows is not the last part of the buffer, or ``warmup`` is negative.

    Source:
        Hafner et al. (2025), Dreamer V3, and its code.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        *,
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        clip: float | None = 0.3,
        min_norm: float = 1e-3,
        warmup: int = 1000,
        slow: SlowCopy | None = None,
        rounded: bool = False,
    ) -> None:
        _check_warmup("LaProp", warmup)
        if slow is not None and not slow.follows_the_end_of(parameters):
            raise ValueError(
                "LaProp: slow follows another module, but one whose parameters are the last of the buffer was expected"
            )
        self.slow = slow
        self.rounded = parameters.data.to(torch.bfloat16) if rounded else None
        self.parameters = parameters
        self.lr, self.betas, self.eps = lr, betas, eps
        self.clip, self.min_norm, self.warmup = clip, min_norm, warmup
        self.exp_avg = torch.zeros_like(parameters.data)
        self.exp_avg_sq = torch.zeros_like(parameters.data)
        self.updates = 0

    @property
    def next_lr(self) -> float:
        """The learning rate of the next step, ``lr · min(1, updates/warmup)``."""
        return _warm(self.lr, self.updates, self.warmup)

    @torch.no_grad()
    def step(self, lr: float | None = None) -> Tensor:
        """Clip the gradients and take one step.

        Args:
            lr: learning rate of this step, without any warm-up.

        Returns:
            The norm of all gradients before clipping, 0-d.
        """
        lr = self.next_lr if lr is None else lr
        self.updates += 1
        flat = self.parameters
        return laprop_step_(
            flat.data,
            flat.grad,
            self.exp_avg,
            self.exp_avg_sq,
            flat.offsets,
            step=self.updates,
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            clip=self.clip,
            min_norm=self.min_norm,
            slow=None if self.slow is None else self.slow.data,
            slow_rate=0.0 if self.slow is None else self.slow.rate,
            rounded=self.rounded,
        )


class SlowCopy:
    """A copy of a module that follows it slowly: ``slow ← (1 - rate)·slow + rate·fast`` with every update.

    Args:
        module: what is followed; copied as it is now.
        rate: the share of the module in each update; 1 copies it. Dreamer V3's critic is followed at 0.02.

    Attributes:
        module: the copy. Its parameters want no gradients.
        data: its parameters as one contiguous buffer, ``[Q]``, of which they are views.
    """

    def __init__(self, module: nn.Module, *, rate: float = 0.02) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"SlowCopy: rate is {rate}, but a number in (0, 1] was expected")
        self.rate = rate
        self.module = copy.deepcopy(module).requires_grad_(False)
        self._slow: list[Tensor] = list(self.module.parameters())
        self._fast: list[Tensor] = list(module.parameters())
        self.data = torch.cat([p.reshape(-1) for p in self._slow]) if self._slow else torch.empty(0)
        start = 0
        for p in self._slow:
            p.data = self.data[start : start + p.numel()].view_as(p)
            start += p.numel()

    def follows_the_end_of(self, parameters: FlatParameters) -> bool:
        """Whether what is followed are the last parameters of a flat buffer, in their order."""
        last = list(parameters.views.values())[len(parameters.views) - len(self._fast) :]
        return len(last) == len(self._fast) and all(a is b for a, b in zip(last, self._fast, strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Move the copy towards the module."""
        torch._foreach_lerp_(self._slow, self._fast, self.rate)


def _check_warmup(name: str, warmup: int) -> None:
    if warmup < 0:
        raise ValueError(f"{name}: warmup is {warmup}, but 0 or more was expected")


def _warm(lr: float, updates: int, warmup: int) -> float:
    return lr if updates >= warmup else lr * updates / warmup
