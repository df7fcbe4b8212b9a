"""DreamerV3's world model: encoder, recurrent state-space model, decoder, and the heads of reward and continuation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pywm.models.rssm import RSSM, SIZES
from pywm.nn.image import ImageDecoder, ImageEncoder
from pywm.nn.layer import NormMLP, Parts, trunc_normal_
from pywm.ops import _operands, symexp_twohot_loss, symexp_twohot_mean
from pywm.ops.rssm import Observed
from pywm.ops.rssm_params import RSSMConfig, RSSMState

__all__ = ["Predicted", "WorldModel", "WorldModelLoss", "symexp", "symlog"]


# What came with that cell in the code of 2023.
CLASSIC: Mapping[str, Any] = {name: SIZES["classic"][name] for name in ("norm", "eps", "prior_layers")}


def symlog(x: Tensor) -> Tensor:
    """Return sign(x)·ln(1 + abs(x))."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Return sign(x)·(exp(abs(x)) - 1), the inverse of :func:`symlog`."""
    return x.sign() * x.abs().expm1()


def _flat(x: Tensor, rank: int) -> Tensor:
    """Make one axis of the last ``rank``, of which there may be none."""
    return x.flatten(x.ndim - rank) if rank else x.unsqueeze(-1)


def _groups(x: Tensor, classes: tuple[int, ...]) -> Sequence[Tensor]:
    """Take the one-hots, or their logits, that lie side by side in ``[..., ΣK]`` apart."""
    if len(set(classes)) == 1:
        return [x.unflatten(-1, (len(classes), classes[0]))]  # all of them at once
    return list(torch.split(x, list(classes), -1))


def _probabilities(logits: Tensor, classes: tuple[int, ...]) -> Tensor:
    if not classes:
        return torch.sigmoid(logits)
    return torch.cat([x.softmax(-1).reshape(*logits.shape[:-1], -1) for x in _groups(logits, classes)], -1)


def _choice_loss(logits: Tensor, target: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Return the negative log-likelihood of one-hots or bits ``target``, summed over everything."""
    if not classes:
        return functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    pairs = zip(_groups(logits, classes), _groups(target, classes), strict=True)
    return -torch.stack([(x.log_softmax(-1) * one_hot).sum() for x, one_hot in pairs]).sum()


class Predicted(NamedTuple):
    """What a world model says of states.

    Attributes:
        obs: ``key -> [..., *shape]``: pictures in [0, 1], vectors in their own units, of choices the probabilities.
        reward: ``[...]``, expected.
        discount: ``[...]``, the probability to go on times γ.
    """

    obs: dict[str, Tensor]
    reward: Tensor
    discount: Tensor


class WorldModelLoss(NamedTuple):
    """Result of :meth:`WorldModel.loss`.

    Attributes:
        total: the weighted sum, a scalar.
        feat: ``[T, B, D + S·K]`` of the posterior, differentiable.
        observed: the window's states.
        stats: name to unweighted loss, scalars without gradient.
    """

    total: Tensor
    feat: Tensor
    observed: Observed
    stats: dict[str, Tensor]


class WorldModel(nn.Module):
    """An encoder of observations, an :class:`RSSM`, and what is read off its states.

    Vectors enter as their symlog, choices as their one-hots, all of them as one; pictures as one stack of channels.
    Predictions are of symlogs and of pictures in [0, 1], under squared errors; of choices as categoricals; of rewards as a
    categorical over symexp bins; of continuation as a Bernoulli whose target has the discount in it.

    Args:
        images: ``[C, height, width]`` of each picture's key; all of one size.
        vectors: shape of each other key.
        choices: of those of them that are discrete, the classes of each choice, whose one-hots lie side by side; empty
            where every number is a bit.
        action: A, width of an action.
        deter: D.
        hidden: H, of the recurrent model's layers.
        classes: K.
        stoch: S.
        units: U, width of all perceptrons.
        depth: channels of the convolutions, of which each level has a multiple.
        bins: B, of the reward's distribution; odd.
        horizon: γ = 1 - 1/horizon is part of what the continuation's head learns.
        unimix: share of a uniform distribution in the latents'.
        cell: of the recurrent model: ``"block_gru"``, or ``"layernorm_gru"`` of 2023, with LayerNorms in the whole
            recurrent model and one layer before the prior's output.
        operands: of matrix products and convolutions: ``"bfloat16"`` rounds what they multiply, here and in the recurrent
            model; see :class:`RSSMConfig`. Parameters, everything else and losses stay float32.
        generator: source of randomness of the initialisation.

    Attributes:
        rssm: the recurrent part.
        discount: γ.

    Raises:
        ValueError: there is no observation, pictures differ in size, or choices do not fit their vector.

    Source:
        Hafner et al. (2025), "Mastering diverse control tasks through world models", and its code.
    """

    def __init__(
        self,
        images: Mapping[str, Sequence[int]],
        vectors: Mapping[str, Sequence[int]],
        action: int,
        *,
        deter: int,
        hidden: int,
        classes: int,
        stoch: int = 32,
        units: int,
        depth: int,
        choices: Mapping[str, Sequence[int]] | None = None,
        bins: int = 255,
        horizon: float = 333.0,
        unimix: float = 0.01,
        cell: str = "block_gru",
        operands: str = "float32",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not images and not vectors:
            raise ValueError("WorldModel: images and vectors are empty, but at least one key was expected")
        self.images = {key: tuple(images[key]) for key in sorted(images)}
        self.vectors = {key: tuple(vectors[key]) for key in sorted(vectors)}
        self.choices = {key: tuple(groups) for key, groups in (choices or {}).items()}
        for key, groups in self.choices.items():
            if key not in self.vectors or (groups and self.vectors[key] != (sum(groups),)):
                raise ValueError(
                    f"WorldModel: choices[{key!r}] is {groups}, but classes that fit its vector, "
                    f"{self.vectors.get(key, 'which is missing')}, were expected"
                )
        sides = {shape[1:] for shape in self.images.values()}
        if len(sides) > 1:
            raise ValueError(
                f"WorldModel: images have the sizes {sorted(sides)}, but pictures of one size were expected"
            )
        self.discount = 1 - 1 / horizon
        embed = 0
        self.vector_encoder = self.image_encoder = None
        if vectors:
            width = sum(math.prod(shape) for shape in vectors.values())
            self.vector_encoder = NormMLP(
                (width, units, units, units), operands=operands, generator=generator
            )
            embed += units
        if images:
            stack = (sum(shape[0] for shape in self.images.values()), *sides.pop())
            self.image_encoder = ImageEncoder(stack, depth, operands=operands, generator=generator)
            embed += self.image_encoder.size
        config = RSSMConfig(
            deter=deter,
            hidden=hidden,
            stoch=stoch,
            classes=classes,
            embed=embed,
            action=action,
            unimix=unimix,
            cell=cell,
            operands=operands,
            **(CLASSIC if cell == "layernorm_gru" else {}),
        )
        self.rssm = RSSM(config, generator=generator)
        self.vector_decoder = self.image_decoder = None
        # Keys of a Dict space may hold dots, which names of modules may not: the outputs are numbered.
        self.vector_outputs = nn.ModuleList()
        if vectors:
            self.vector_decoder = NormMLP(
                (config.feat, units, units, units), operands=operands, generator=generator
            )
            for shape in self.vectors.values():
                size = math.prod(shape)
                self.vector_outputs.append(Parts((size, units), size, True, "none"))
                trunc_normal_(self.vector_outputs[-1].weight, units, 1.0, generator)  # type: ignore[arg-type]
        if images:
            self.image_decoder = ImageDecoder(
                stack,
                deter,
                config.stoch_width,
                depth=depth,
                units=units,
                operands=operands,
                generator=generator,
            )
        self.reward = NormMLP(
            (config.feat, units), bins, out_scale=0.0, operands=operands, generator=generator
        )
        self.proceed = NormMLP((config.feat, units), 1, operands=operands, generator=generator)

    def encode(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Turn observations ``key -> [..., *shape]`` into embeddings ``[..., E]``.

        Pictures are uint8, vectors floats, choices one-hots or bits. Acting and training both come here.
        """
        parts = []
        if self.vector_encoder is not None:
            vectors = [self._entering(key, obs[key]) for key in self.vectors]
            parts.append(self.vector_encoder(vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)))
        if self.image_encoder is not None:
            images = [obs[key] for key in self.images]
            x = images[0] if len(images) == 1 else torch.cat(images, -3)
            lead = x.shape[:-3]
            parts.append(self.image_encoder(x.flatten(0, -4)).unflatten(0, lead))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _entering(self, key: str, x: Tensor) -> Tensor:
        x = _flat(x, len(self.vectors[key])).float()
        return x if key in self.choices else symlog(x)

    def decode(self, feat: Tensor) -> dict[str, Tensor]:
        """Predict observations from ``feat`` ``[..., D + S·K]``: symlogs, logits of choices, pictures in [0, 1]."""
        found: dict[str, Tensor] = {}
        if self.vector_decoder is not None:
            x = self.vector_decoder(feat)
            for part, (key, shape) in zip(self.vector_outputs, self.vectors.items(), strict=True):
                assert isinstance(part, Parts)
                y = _operands.linear(x, part.layer(), self.rssm.config.operands)
                found[key] = y.unflatten(-1, shape or (1,))
                if not shape:
                    found[key] = found[key].squeeze(-1)
        if self.image_decoder is not None:
            stack = self.image_decoder(feat.flatten(0, -2)).unflatten(0, feat.shape[:-1])
            channels = [shape[0] for shape in self.images.values()]
            found |= dict(zip(self.images, stack.split(channels, -3), strict=True))
        return found

    def predict(self, feat: Tensor) -> Predicted:
        """Say what states look like, pay, and whether they go on; ``feat`` is ``[..., D + S·K]``."""
        return Predicted(self.predict_obs(feat), *self.outcome(feat))

    def predict_obs(self, feat: Tensor) -> dict[str, Tensor]:
        """Say what states look like, as :class:`Predicted` has it; ``feat`` is ``[..., D + S·K]``."""
        obs = self.decode(feat)
        for key in self.vectors:
            obs[key] = (
                _probabilities(obs[key], self.choices[key]) if key in self.choices else symexp(obs[key])
            )
        return obs

    def outcome(self, feat: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the expected reward and the discount of states, ``[...]`` each; ``index``: see :class:`NormMLP`."""
        proceed = torch.sigmoid(self.proceed(feat, index).squeeze(-1))
        return symexp_twohot_mean(self.reward(feat, index)), proceed

    def observe(
        self,
        obs: Mapping[str, Tensor],
        prev_action: Tensor,
        is_first: Tensor,
        state: RSSMState | None = None,
        *,
        seed: int | None = None,
        offset: int = 0,
    ) -> Observed:
        """Filter a window ``key -> [T, B, ...]`` of observations; see :func:`pywm.rssm_observe`."""
        embed = self.encode(obs)
        return self.rssm.observe(embed, prev_action, is_first, state, seed=seed, offset=offset)

    @torch.no_grad()
    def open_loop(
        self,
        obs: Mapping[str, Tensor],
        prev_action: Tensor,
        is_first: Tensor,
        context: int,
        *,
        seed: int = 0,
    ) -> Predicted:
        """Look at the first rows of a window and imagine the others under the actions that were taken.

        Args:
            obs: ``key -> [T, B, ...]``, of which ``context`` rows are looked at.
            prev_action: ``[T, B, A]``, what led to each row.
            is_first: ``[T, B]`` bool.
            context: how many rows are looked at, from 1 to T.
            seed: of the samples.

        Returns:
            What the model makes of all T rows, ``[T, B, ...]``: of the first ones it has seen, of the others it has not.

        Raises:
            ValueError: ``context`` is out of range.
        """
        T = len(prev_action)
        if not 1 <= context <= T:
            raise ValueError(
                f"WorldModel.open_loop: context is {context}, but 1 to {T}, the rows, was expected"
            )
        seen = {key: x[:context] for key, x in obs.items()}
        observed = self.observe(seen, prev_action[:context], is_first[:context], seed=seed)
        feat = torch.cat([observed.deter, observed.stoch.flatten(2)], -1)
        if context < T:
            imagined = self.rssm.imagine(
                lambda feat: feat.new_zeros(len(feat), self.rssm.config.action),  # every action is given
                observed.state,
                T - context,
                seed=seed,
                offset=context,
                force_action=prev_action[context:],
            )
            feat = torch.cat([feat, imagined.feat[1:]])
        return self.predict(feat)

    def loss(
        self,
        obs: Mapping[str, Tensor],
        prev_action: Tensor,
        is_first: Tensor,
        reward: Tensor,
        terminated: Tensor,
        state: RSSMState | None = None,
        *,
        free_nats: float = 1.0,
        dynamics_scale: float = 1.0,
        representation_scale: float = 0.1,
        seed: int | None = None,
        offset: int = 0,
    ) -> WorldModelLoss:
        r"""Return what training minimises on a window of ``[T, B]`` rows.

        .. math::
            L = \sum_\text{keys} L_\text{key} + L_\text{reward} + L_\text{proceed}
                + \beta_\text{dyn} \max(f, \mathrm{KL}(\mathrm{sg}(q) \| p))
                + \beta_\text{rep} \max(f, \mathrm{KL}(q \| \mathrm{sg}(p)))

        Of pictures and vectors it is the squared error, summed over an observation, without a half; of choices the
        negative log-likelihood, summed likewise. Everything is averaged over rows.

        Args:
            obs: ``key -> [T, B, ...]``, pictures uint8.
            prev_action: ``[T, B, A]``, what led to each row.
            is_first: ``[T, B]`` bool.
            reward: ``[T, B]``, what came with each row.
            terminated: ``[T, B]`` bool: nothing follows.
            state: of the model before the window; zeros by default.
            free_nats: f.
            dynamics_scale: β of the prior's side.
            representation_scale: β of the posterior's.
            seed: of the samples; see :func:`pywm.rssm_observe`.
            offset: number of the first row, likewise.
        """
        observed = self.observe(obs, prev_action, is_first, state, seed=seed, offset=offset)
        feat = torch.cat([observed.deter, observed.stoch.flatten(2)], -1)
        losses: dict[str, Tensor] = {}
        for key, x in self.decode(feat).items():
            if key in self.choices:
                losses[key] = _choice_loss(x, obs[key].float(), self.choices[key]) / reward.numel()
                continue
            if key in self.images:  # laid out as the prediction, over which there are three passes
                target = torch.empty_like(x).copy_(obs[key]).mul_(1 / 255)
            else:
                target = symlog(obs[key].float())
            losses[key] = functional.mse_loss(x, target, reduction="sum") / reward.numel()
        losses["reward"] = symexp_twohot_loss(self.reward(feat), reward).mean()
        goes_on = (~terminated).to(feat.dtype) * self.discount
        logit = self.proceed(feat).squeeze(-1)
        losses["proceed"] = functional.binary_cross_entropy_with_logits(logit, goes_on)
        kl = self.rssm.kl(observed.posterior, observed.prior, free_nats=free_nats)
        dynamics = kl.dynamics.mean()
        total = torch.stack(list(losses.values())).sum()
        total = total + dynamics_scale * dynamics + representation_scale * kl.representation.mean()
        stats = {f"loss/{name}": x.detach() for name, x in losses.items()}
        return WorldModelLoss(total, feat, observed, {**stats, "loss/kl": dynamics.detach()})
