"""Action distributions: small containers of tensors with log-probability, entropy, sample and mode.

Sampling takes a :class:`torch.Generator`, so a run that saves the generator's state resumes exactly. Categorical samples
are drawn by inverse CDF from one uniform number a group, as everywhere in pywm; ``choose`` takes the noise itself.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Categorical", "DiagGaussian", "MultiCategorical"]


def _choose(logits: Tensor, uniform: Tensor) -> Tensor:
    cdf = torch.softmax(logits.float(), -1).cumsum(-1)
    # Scaled by the last sum, which rounding may leave below 1: a class with probability 0 is never chosen.
    index = torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[..., -1:], right=True)
    return index.squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _entropy(logits: Tensor) -> Tensor:
    log_prob = torch.log_softmax(logits, -1)
    prob = log_prob.exp()
    # A class with probability 0 (logit -inf) adds nothing, rather than 0·(-inf).
    return -(prob * log_prob.masked_fill(prob == 0, 0)).sum(-1)


@dataclass(frozen=True, eq=False)
class Categorical:
    """One choice among ``A`` classes.

    Attributes:
        logits: ``[..., A]``, unnormalised; ``-inf`` forbids a class.
    """

    logits: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the log-probability, ``[...]``, of integer actions ``[...]``."""
        log_prob = torch.log_softmax(self.logits, -1)
        return log_prob.gather(-1, action.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, ``[...]``."""
        return _entropy(self.logits)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw an int64 action, ``[...]``."""
        shape, device = self.logits.shape[:-1], self.logits.device
        return self.choose(torch.rand(shape, generator=generator, device=device))

    def choose(self, noise: Tensor) -> Tensor:
        """Return the int64 action, ``[...]``, that uniform numbers ``[...]`` in [0, 1) pick by inverse CDF."""
        return _choose(self.logits, noise)

    def mode(self) -> Tensor:
        """Return the most probable action, int64 ``[...]``."""
        return self.logits.argmax(-1)


@dataclass(frozen=True, eq=False)
class MultiCategorical:
    """Several independent choices; log-probabilities and entropies are summed over them.

    Attributes:
        logits: ``[..., sum(nvec)]``, the groups one after the other.
        nvec: number of classes of each group.
    """

    logits: Tensor
    nvec: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            nvec = tuple(operator.index(n) for n in self.nvec)
        except TypeError:
            text = f"MultiCategorical: nvec is {self.nvec!r}, but a sequence of integers was expected"
            raise TypeError(text) from None
        object.__setattr__(self, "nvec", nvec)

    def _groups(self) -> list[Categorical]:
        return [Categorical(x) for x in self.logits.split(self.nvec, -1)]

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the log-probability, ``[...]``, of integer actions ``[..., G]``."""
        parts = [group.log_prob(action[..., g]) for g, group in enumerate(self._groups())]
        return torch.stack(parts, -1).sum(-1)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, ``[...]``."""
        return torch.stack([group.entropy() for group in self._groups()], -1).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw an int64 action, ``[..., G]``."""
        shape = (*self.logits.shape[:-1], len(self.nvec))
        return self.choose(torch.rand(shape, generator=generator, device=self.logits.device))

    def choose(self, noise: Tensor) -> Tensor:
        """Return the int64 action, ``[..., G]``, that uniform numbers ``[..., G]`` in [0, 1) pick by inverse CDF."""
        groups = zip(self._groups(), noise.unbind(-1), strict=True)
        return torch.stack([group.choose(u) for group, u in groups], -1)

    def mode(self) -> Tensor:
        """Return the most probable action, int64 ``[..., G]``."""
        return torch.stack([group.mode() for group in self._groups()], -1)


@dataclass(frozen=True, eq=False)
class DiagGaussian:
    """Independent normal distributions; log-probabilities and entropies are summed over the action's parts.

    Attributes:
        mean: ``[..., A]``.
        log_std: ``[A]`` (one for all states) or ``[..., A]``.
    """

    mean: Tensor
    log_std: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the log-density, ``[...]``, of actions ``[..., A]``."""
        z = (action - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z * z - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Return the differential entropy in nats, ``[...]``."""
        per_part = self.log_std + 0.5 * math.log(2 * math.pi * math.e)
        return per_part.expand(self.mean.shape).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw an action, ``[..., A]``; not clipped to any action space."""
        mean = self.mean
        return self.choose(torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype))

    def choose(self, noise: Tensor) -> Tensor:
        """Return the action, ``[..., A]``, that standard normal numbers ``[..., A]`` pick."""
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        """Return the mean, ``[..., A]``."""
        return self.mean
