"""The recurrent state-space model as a module that owns its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pywm.nn.layer import Parts, trunc_normal_
from pywm.ops import _check, _rssm_check
from pywm.ops.gaussian import gaussian_kl
from pywm.ops.imagine import Imagined, imagine
from pywm.ops.kl_balance import kl_balance
from pywm.ops.rssm import Observed, RSSMStep, rssm_observe, rssm_step
from pywm.ops.rssm_params import Gaussian, Policy, RSSMConfig, RSSMParams, RSSMState

__all__ = ["KL", "RSSM", "SIZES"]


def _block(deter: int, hidden: int, classes: int) -> Mapping[str, Any]:
    return MappingProxyType({"deter": deter, "hidden": hidden, "classes": classes})


SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "size1m": _block(512, 64, 4),
        "size12m": _block(2048, 256, 16),
        "size25m": _block(3072, 384, 24),
        "size50m": _block(4096, 512, 32),
        "size100m": _block(6144, 768, 48),
        "size200m": _block(8192, 1024, 64),
        "size400m": _block(12288, 1536, 96),
        # DreamerV3 of 2023, size S.
        "classic": MappingProxyType(
            {
                "deter": 512,
                "hidden": 512,
                "classes": 32,
                "cell": "layernorm_gru",
                "norm": "layer",
                "eps": 1e-3,
                "prior_layers": 1,
            }
        ),
    }
)
"""Sizes by name, as arguments of :class:`RSSMConfig`: DreamerV3's ``size1m`` to ``size400m``, and ``classic``."""


class KL(NamedTuple):
    """Result of :meth:`RSSM.kl`.

    Attributes:
        dynamics: ``[...]`` nats, at least the free ones; its gradient moves the prior only.
        representation: ``[...]``, the same number; its gradient moves the posterior only.
    """

    dynamics: Tensor
    representation: Tensor


class RSSM(nn.Module):
    """A recurrent state-space model.

    Initialised as in DreamerV3: truncated normal of the whole layer's inputs (of a block-diagonal layer too), biases 0,
    scales 1. States begin at 0. PlaNet's gates have bias 1.

    Args:
        config: form and sizes; ``RSSMConfig(**SIZES["size12m"], embed=E, action=A)`` for a named one.
        generator: source of randomness of the initialisation.

    Attributes:
        config: form and sizes.
    """

    def __init__(self, config: RSSMConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(config, RSSMConfig):
            raise TypeError(f"RSSM: config is a {type(config).__name__}, but an RSSMConfig was expected")
        self.config = c = config
        D, H, Z, A, E, G = c.deter, c.hidden, c.stoch_width, c.action, c.embed, c.blocks

        def dense(outputs: int, inputs: int, norm: str = c.norm) -> Parts:
            return Parts((outputs, inputs), outputs, True, norm)

        def block(outputs: int, inputs: int, norm: str) -> Parts:
            return Parts((G, outputs // G, inputs), outputs, True, norm)

        if c.cell == "block_gru":
            self.deter_in = dense(H, D)
            self.stoch_in = dense(H, Z)
            self.action_in = dense(H, A)
            self.hidden = block(D, D // G + 3 * H, c.norm)
            self.gates = block(3 * D, D // G, "none")
        else:
            self.stoch_in = dense(H, Z + A)
            if c.cell == "layernorm_gru":
                self.gates = dense(3 * D, H + D, "layer")
            elif c.cell == "gru":
                self.gates = dense(3 * D, H, "none")
                self.candidate = dense(3 * D, D, "none")
            else:
                self.gates = dense(2 * D, H + D, "none")
                self.candidate = dense(D, H + D, "none")
        widths = [D, *[H] * c.prior_layers]
        self.prior = nn.ModuleList([dense(b, a) for a, b in itertools.pairwise(widths)])
        self.prior.append(dense(c.stats_width, H, "none"))
        self.posterior = nn.ModuleList([dense(H, D + E), dense(c.stats_width, H, "none")])
        for part in self.modules():
            if isinstance(part, Parts):
                inputs = part.weight.shape[-1] * (part.weight.shape[0] if part.weight.ndim == 3 else 1)
                trunc_normal_(part.weight, inputs, 1.0, generator)
        if c.cell == "gru_block":
            assert self.gates.bias is not None
            nn.init.ones_(self.gates.bias)

    def params(self) -> RSSMParams:
        """Return the parameters as the functions take them; they are the module's own, not copies."""
        # Called in every acting step: a search for attributes and a function a layer would double what this takes.
        parts: dict[str, Any] = self._modules
        deter_in, action_in, hidden = parts.get("deter_in"), parts.get("action_in"), parts.get("hidden")
        candidate = parts.get("candidate")
        return RSSMParams(
            self.config,
            deter_in and deter_in.layer(),
            parts["stoch_in"].layer(),
            action_in and action_in.layer(),
            hidden and hidden.layer(),
            parts["gates"].layer(),
            candidate and candidate.layer(),
            tuple([part.layer() for part in parts["prior"]._modules.values()]),
            tuple([part.layer() for part in parts["posterior"]._modules.values()]),
        )

    def initial(self, N: int) -> RSSMState:
        """Return the state before an episode: zeros, on the device and of the dtype of the parameters.

        Args:
            N: number of sequences.

        Raises:
            TypeError: N is no int.
            ValueError: N is negative or huge.
        """
        N = _check.integer("RSSM.initial", "N", N, 0, 2**31 - 1)
        c, like = self.config, self.gates.weight
        stoch = (N, c.stoch) if c.is_gaussian else (N, c.stoch, c.classes)
        return RSSMState(like.new_zeros(N, c.deter), like.new_zeros(stoch))

    def step(self, state: RSSMState, prev_action: Tensor, *args: Any, **options: Any) -> RSSMStep:
        """Go one step; see :func:`pywm.rssm_step`."""
        return rssm_step(self.params(), state, prev_action, *args, **options)

    def observe(
        self,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        state: RSSMState | None = None,
        **options: Any,
    ) -> Observed:
        """Filter a window; see :func:`pywm.rssm_observe`. Without a state it begins at zeros."""
        if state is None:
            state = self.initial(_rssm_check.embeddings("rssm_observe", embed, self.config).shape[1])
        return rssm_observe(self.params(), embed, prev_action, is_first, state, **options)

    def imagine(
        self, policy: Policy | Callable[[Tensor], Tensor], state: RSSMState, horizon: int, **options: Any
    ) -> Imagined:
        """Imagine from N starts; see :func:`pywm.imagine`."""
        return imagine(self.params(), policy, state, horizon, **options)

    def kl(self, posterior: Tensor | Gaussian, prior: Tensor | Gaussian, *, free_nats: float = 1.0) -> KL:
        """Return the two halves of the balanced KL divergence, KL(posterior || prior) in nats.

        Args:
            posterior: logits ``[..., S, K]`` or a Gaussian.
            prior: likewise.
            free_nats: below so many nats, summed over the S variables, a row costs this constant and has no gradient.

        Returns:
            :class:`KL`, each ``[...]``.

        Source:
            Hafner et al. (2023), eq. 5.
        """
        if isinstance(posterior, Gaussian):
            free_nats = _check.number("kl", "free_nats", free_nats)
            if not isinstance(prior, Gaussian):
                raise TypeError(f"kl: prior is a {type(prior).__name__}, but a Gaussian was expected")
            q, p = posterior, prior
            dynamics = gaussian_kl(q.mean.detach(), q.std.detach(), p.mean, p.std)
            representation = gaussian_kl(q.mean, q.std, p.mean.detach(), p.std.detach())
            return KL(dynamics.clamp(min=free_nats), representation.clamp(min=free_nats))
        if isinstance(prior, Gaussian):
            raise TypeError("kl: prior is a Gaussian, but logits were expected")
        result = kl_balance(posterior, prior, unimix=self.config.unimix, free_nats=free_nats)
        return KL(result.dynamics, result.representation)
