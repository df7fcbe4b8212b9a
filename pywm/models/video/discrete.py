"""SimPLe's world model: the next frame from those before it, an action, and a few random bits.

::

    frames ─ embed ─ down ─ down ─ … ─ middle ─ … ─ up ─ up ─ 256 logits a sub-pixel
                │      └──────────── skips ────────────┘  │
    action, bits ───── injected at the bottom and at each level up; reward and end come from the bottom and the top

    in training      bits: of what really came (the posterior), noisy, rounded to -1 and 1, gradients straight through
    in simulation    bits: drawn group by group from what an LSTM has learnt to expect

Without the bits (``kind="deterministic"``) it predicts the one future that it takes for the most likely.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pywm.ops import pixel_cross_entropy

__all__ = [
    "VIDEO_SIZES",
    "Prediction",
    "VideoConfig",
    "VideoLoss",
    "VideoModel",
    "VideoState",
    "VideoWindow",
    "inv_exp",
    "inv_lin",
]

COLORS = 256
REWARDS = 3  # -1, 0 and 1
GAIN = 1.3  # of the initialisation
EPS = 1e-6  # of the norms
LONGEST_WAVE = 1e4  # pixels, of the timing signal

VIDEO_SIZES: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "small": {
        "hidden": 32, "levels": 3, "doublings": 1, "bits": 32, "units": 64, "posterior": (32, 64),
        "dropout": 0.0, "middle_dropout": 0.0,
    },
    # Small things on a plain ground, and hundreds of updates in place of tens of thousands: a mean over the picture would
    # hide a ball from the heads, and a mean over its pixels from the loss.
    "tiny": {
        "hidden": 16, "levels": 2, "doublings": 1, "bits": 16, "group": 4, "units": 32, "posterior": (16, 32),
        "dropout": 0.0, "middle_dropout": 0.0, "bit_flip": 0.0, "pool": "max", "pixel_scale": 20.0,
        "reward_scale": 2.0, "done_scale": 2.0,
    },
}  # fmt: skip
"""Sizes as arguments of :class:`VideoConfig`: the paper's, one for a GPU or patience, one for tests and small tasks."""


def inv_lin(step: float, n: int, low: float = 0.01) -> float:
    """Return low + (1 - low)·min(step/n, 1)."""
    return low + (1 - low) * (min(step / n, 1.0) if n > 0 else 1.0)


def inv_exp(step: float, n: int, low: float = 0.01) -> float:
    """Return low^(max(n - step, 0)/n): ``low`` at 0, 1 from n on."""
    return float(low ** (max(n - step, 0) / n)) if n > 0 else 1.0


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """Shape of a :class:`VideoModel`. The defaults are those of the paper's stochastic discrete model.

    Attributes:
        shape: ``[C, height, width]`` of a frame.
        action: A, width of an action as the model takes it.
        kind: ``"sd"``, with a discrete latent, or ``"deterministic"``.
        reading: what a call sees: the last ``frames`` frames side by side (``"stacked"``, the paper's figure), or the last
            one and a full-resolution memory of those before it (``"recurrent"``, the released code).
        frames: k, of context.
        hidden: channels of the first level.
        levels: how often the sides are halved.
        doublings: in how many of the levels the channels double.
        middle: residual blocks at the bottom.
        memory: channels of the recurrent reading's memory.
        bits: of the latent, 0 in deterministic models.
        group: bits that the predictor draws together.
        units: width of the predictor.
        posterior: channels of the two convolutions that see what really came.
        dropout: of each level down.
        middle_dropout: of the residual blocks.
        predictor_dropout: of the predictor.
        pixels: ``"softmax"``, 256 logits for each sub-pixel, or ``"l2"``, a number.
        cutoff: C of the pixel loss, which does not count below it.
        pixel_scale: weight of the pixel loss, a mean over sub-pixels.
        reward_scale: weight of the reward's loss.
        pool: how reward and end look at the whole picture: the ``"mean"`` over it (paper), or the ``"max"``, in which
            something small does not drown.
        done: predict the end of the episode, too.
        done_scale: weight of ends in that loss.
        input_noise: share of the pixels that are replaced by the median in training.
        bit_noise: deviation of the noise before bits are rounded.
        bit_flip: probability that a bit is turned over.
        warmup: updates over which bits become discrete, the predictor's own samples come into use and frames of the
            model's own take the place of true ones (a quarter of it for the exponential part), half of it over which
            examples that do without the latent become rare.
        latent_sampling: at the end, share of examples whose bits the predictor has drawn.
        latent_use: at the end, share of examples with a latent.
        sampling: at the end, share of examples that go on with the model's own frame.
    """

    shape: tuple[int, int, int]
    action: int
    kind: Literal["sd", "deterministic"] = "sd"
    reading: Literal["stacked", "recurrent"] = "stacked"
    frames: int = 4
    hidden: int = 96
    levels: int = 6
    doublings: int = 3
    middle: int = 2
    memory: int = 64
    bits: int = 128
    group: int = 8
    units: int = 128
    posterior: tuple[int, int] = (128, 512)
    dropout: float = 0.15
    middle_dropout: float = 0.5
    predictor_dropout: float = 0.1
    pixels: Literal["softmax", "l2"] = "softmax"
    cutoff: float = 0.03
    pixel_scale: float = 1.0
    reward_scale: float = 1.0
    pool: Literal["mean", "max"] = "mean"
    done: bool = False
    done_scale: float = 10.0
    input_noise: float = 0.0
    bit_noise: float = 0.2
    bit_flip: float = 0.1
    warmup: int = 40_000
    latent_sampling: float = 0.5
    latent_use: float = 0.8
    sampling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("action", "frames", "hidden", "levels", "group", "units"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("dropout", "middle_dropout", "predictor_dropout", "input_noise", "bit_flip"):
            self._require(name, 0 <= getattr(self, name) < 1, "a share below 1")
        for name in ("latent_sampling", "latent_use", "sampling"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a share")
        self._require("shape", len(self.shape) == 3 and min(self.shape) >= 1, "[C, height, width]")
        self._require("group", self.group <= 12, "at most 12")
        if self.kind == "sd":
            self._require("bits", self.bits >= 1 and self.bits % self.group == 0, "a multiple of group")

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"VideoConfig: {name} is {getattr(self, name)!r}, but {expected} was expected")

    @property
    def groups(self) -> int:
        """How many groups of bits there are, G; 0 where there is no latent."""
        return self.bits // self.group if self.kind == "sd" else 0

    @property
    def seen(self) -> int:
        """Frames that a call sees."""
        return self.frames if self.reading == "stacked" else 1


class VideoWindow(NamedTuple):
    """Windows of real data, time-major: k frames of context and H that follow, none across a reset.

    Attributes:
        frames: ``[k + H, B, C, height, width]`` uint8.
        action: ``[k + H - 1, B, A]``, row t leads from frame t to frame t + 1.
        reward: ``[H, B]``, the class of the reward that came with each of the H frames: 0, 1 and 2 for -1, 0 and 1.
        terminated: ``[H, B]`` bool, the frame is the last one because the episode ended.
        mask: ``[H, B]`` bool, the frame is there: an episode may end before the window does.
    """

    frames: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    mask: Tensor


class VideoState(NamedTuple):
    """Where a simulation stands.

    Attributes:
        frames: ``[B, k·C, height, width]`` uint8, oldest first.
        memory: ``[B, M, height, width]`` of the recurrent reading, or None.
    """

    frames: Tensor
    memory: Tensor | None


class Prediction(NamedTuple):
    """What comes next.

    Attributes:
        frame: ``[B, C, height, width]`` uint8, the likeliest.
        reward: ``[B]``, the likeliest: -1, 0 or 1.
        end: ``[B]``, the probability that the episode ends there; 0 in models without that head.
    """

    frame: Tensor
    reward: Tensor
    end: Tensor


class VideoLoss(NamedTuple):
    """Result of :meth:`VideoModel.loss`.

    Attributes:
        total: a scalar.
        stats: its parts and other figures, 0-d, without gradients.
    """

    total: Tensor
    stats: dict[str, Tensor]


class _Out(NamedTuple):
    """What the network makes of a step: pixels ``[B, height, width, C(, 256)]``, reward ``[B, 3]``, end ``[B]``."""

    pixels: Tensor
    reward: Tensor
    end: Tensor
    memory: Tensor | None
    predictor_loss: Tensor


class _Conv(nn.Conv2d):
    """A convolution whose output has the size that TensorFlow's SAME padding gives."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=(kernel - stride + 1) // 2)
        self._stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_pad(x, self._stride))


class _Norm(nn.Module):
    """Layer norm over the channels of every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return functional.layer_norm(rows, rows.shape[-1:], self.scale, self.shift, EPS).permute(0, 3, 1, 2)


class _Inject(nn.Module):
    """x·σ(W a) + W' a: what ``a`` says, in every pixel of x."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.gate, self.add = nn.Linear(width, channels), nn.Linear(width, channels)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        gate: Tensor = torch.sigmoid(self.gate(a))
        add: Tensor = self.add(a)
        return x * gate[:, :, None, None] + add[:, :, None, None]


class _Predictor(nn.Module):
    """An LSTM that goes through the groups of bits, each a choice of 2^group, from what the bottom of the network knows."""

    def __init__(self, inputs: int, config: VideoConfig) -> None:
        super().__init__()
        self.groups, self.dropout, units = config.groups, config.predictor_dropout, config.units
        self.first = nn.ModuleList(nn.Linear(inputs, units) for _ in range(3))
        self.cell = nn.LSTMCell(units, units)
        self.embed = nn.Embedding(2**config.group, units)
        self.out = nn.Linear(units, 2**config.group)

    def forward(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy, averaged over groups, ``[B]``, of the indices ``[B, G]``."""
        h, c, entry = (layer(x) for layer in self.first)
        outs = []
        for g in range(self.groups):
            h, c = self.cell(entry, (h, c))
            outs.append(_drop(h, self.dropout, generator))
            entry = self.embed(index[:, g])
        logits = self.out(torch.stack(outs, 1))
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), index.flatten(), reduction="none")
        return loss.view_as(index).mean(1)

    @torch.no_grad()
    def draw(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Draw indices ``[B, G]`` by inverting the cumulative distribution at ``uniform [B, G]``."""
        h, c, entry = (layer(x) for layer in self.first)
        index = []
        for g in range(self.groups):
            h, c = self.cell(entry, (h, c))
            below = self.out(h).float().softmax(-1).cumsum(-1)
            index.append((below <= uniform[:, g : g + 1]).sum(-1).clamp(max=below.shape[-1] - 1))
            entry = self.embed(index[-1])
        return torch.stack(index, 1)


class VideoModel(nn.Module):
    """SimPLe's world model.

    Args:
        config: its shape.
        generator: source of randomness of the initialisation.

    Attributes:
        config: the same.
        rounds: multiply in bfloat16 (weights, norms, the predictor, losses and the memory stay float32); False at first.

    Source:
        Kaiser et al. (2020), Model-Based Reinforcement Learning for Atari, and the sizes of its released code.
    """

    def __init__(self, config: VideoConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.rounds = False
        channels, height, width = c.shape
        if c.reading == "recurrent":
            self.remember = _Conv(c.memory + channels, 2 * c.memory, 3)
        self.embed = nn.Conv2d(channels * c.seen + (c.memory if c.reading == "recurrent" else 0), c.hidden, 1)
        sizes, filters = [(height, width)], [c.hidden]
        for level in range(c.levels):
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
            filters.append(filters[-1] * (2 if level < c.doublings else 1))
        self._sizes = sizes
        self.down = nn.ModuleList(_Conv(a, b, 4, 2) for a, b in itertools.pairwise(filters))
        self.down_norms = nn.ModuleList(_Norm(b) for b in filters[1:])
        self.inject_action = nn.ModuleList(_Inject(c.action, b) for b in filters[:0:-1])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 4, 2, 1) for a, b in zip(filters[-2::-1], filters[:0:-1], strict=True)
        )
        self.up_norms = nn.ModuleList(_Norm(a) for a in filters[-2::-1])
        self.middle = nn.ModuleList(_Conv(filters[-1], filters[-1], 3) for _ in range(c.middle))
        self.middle_norms = nn.ModuleList(_Norm(filters[-1]) for _ in range(c.middle - 1))
        if c.kind == "sd":
            self.inject_bits = nn.ModuleList(_Inject(c.bits, b) for b in filters[:0:-1])
            self.target_embed = nn.Conv2d(channels * (c.seen + 1), c.hidden, 1)
            self.target_action = _Inject(c.action, c.hidden)
            wide = (c.hidden, *c.posterior)
            self.target_convs = nn.ModuleList(_Conv(a, b, 8, 4) for a, b in itertools.pairwise(wide))
            self.target_attention = nn.ModuleList(nn.Conv2d(b, 1, 1) for b in wide[1:])
            self.to_bits = nn.Linear(sum(wide[1:]), c.bits)
            self.predictor = _Predictor(filters[-1] * math.prod(sizes[-1]), c)
        self.pixels = nn.Linear(c.hidden, channels * (COLORS if c.pixels == "softmax" else 1))
        self.summary = nn.Linear(filters[-1] + c.hidden, 128)
        self.reward = nn.Linear(128, REWARDS)
        if c.done:
            self.end = nn.Linear(128, 1)
        # Waves for every level: at its size before the convolution down, and at its size and channels after that up.
        for level, (size, count) in enumerate(zip(sizes, filters, strict=True)):
            self.register_buffer(f"_waves{level}", _waves(count, *size), persistent=False)
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator | None) -> None:
        for name, p in self.named_parameters():
            if p.ndim < 2:
                if "bias" in name:
                    nn.init.zeros_(p)
                continue
            if name == "predictor.embed.weight":
                nn.init.normal_(p, generator=generator)
                continue
            # Transposed kernels are [in, out, ...]: of their taps a quarter meets in a pixel.
            fan_in = p.shape[0] * p[0, 0].numel() / 4 if name.startswith("up.") else p[0].numel()
            limit = GAIN * math.sqrt(3 / fan_in)
            nn.init.uniform_(p, -limit, limit, generator=generator)

    # ---- the network

    def _precision(self, like: Tensor, rounds: bool = True) -> Any:
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.rounds and rounds)

    def _timed(self, x: Tensor, level: int) -> Tensor:
        waves = self.get_buffer(f"_waves{level}")
        return x + waves.to(x.dtype)

    def _network(
        self,
        frames: Tensor,
        memory: Tensor | None,
        action: Tensor,
        generator: torch.Generator | None,
        *,
        target: Tensor | None = None,
        updates: int = 0,
        uniform: Tensor | None = None,
    ) -> _Out:
        """Predict what follows on frames ``[B, seen·C, height, width]``.

        In training (``target`` is there) the latent is the posterior's, else the predictor's, drawn with ``uniform``.
        """
        c = self.config
        standard = _standardise(frames)
        x, memory = self._embed(standard, memory)
        skips = []
        for level, (conv, norm) in enumerate(zip(self.down, self.down_norms, strict=True)):
            skips.append(x)
            x = self._timed(_drop(x, c.dropout, generator), level)
            x = norm(torch.relu(conv(x)))
        x = self.inject_action[0](x, action)
        bits: Tensor | None = None
        use: Tensor | None = None
        predictor_loss = torch.zeros(len(x), device=x.device)
        if c.kind == "sd" and target is not None:
            assert generator is not None
            bits, use, predictor_loss = self._posterior(x, standard, target, action, updates, generator)
        elif c.kind == "sd":
            assert uniform is not None
            with self._precision(x, rounds=False):
                bits = self._to_signs(self.predictor.draw(x.flatten(1).float(), uniform))
        x = self._with_bits(x, bits, use, 0)

        bottom = x
        for i, conv in enumerate(self.middle):
            y = torch.relu(conv(_drop(x, c.middle_dropout, generator)))
            x = y if i == 0 else self.middle_norms[i - 1](x + y)

        for i, (conv, norm) in enumerate(zip(self.up, self.up_norms, strict=True)):
            x = _drop(x, c.dropout, generator)
            if i > 0:
                x = self._with_bits(self.inject_action[i](x, action), bits, use, i)
            skip = skips[-1 - i]
            x = torch.relu(conv(x))[:, :, : skip.shape[2], : skip.shape[3]]
            x = self._timed(norm(x + skip), c.levels - 1 - i)

        pixels = self.pixels(x.permute(0, 2, 3, 1))
        if c.pixels == "softmax":
            pixels = pixels.unflatten(-1, (c.shape[0], COLORS))
        else:
            pixels = (pixels.float() + 0.5) * COLORS
        parts = (bottom, x)
        pooled = [part.mean((2, 3)) if c.pool == "mean" else part.amax((2, 3)) for part in parts]
        summary = torch.relu(self.summary(torch.cat(pooled, 1)))
        end = self.end(summary).squeeze(-1).float() if c.done else torch.zeros(len(x), device=x.device)
        return _Out(pixels, self.reward(summary).float(), end, memory, predictor_loss)

    def _embed(self, standard: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = standard
        if self.config.reading == "recurrent":
            assert memory is not None
            x = torch.cat([memory, standard], 1)
            memory = self._remember(x, memory)
        return self._timed(self.embed(x.contiguous(memory_format=torch.channels_last)), 0), memory

    def _remember(self, x: Tensor, memory: Tensor) -> Tensor:
        gate, candidate = self.remember(x).chunk(2, 1)
        gate, candidate = torch.sigmoid(gate.float()), torch.tanh(candidate.float())
        return memory * gate + candidate * (1 - gate)

    def _with_bits(self, x: Tensor, bits: Tensor | None, use: Tensor | None, level: int) -> Tensor:
        if bits is None:
            return x
        injected: Tensor = self.inject_bits[level](x, bits)
        return injected if use is None else torch.where(use[:, None, None, None], injected, x)

    def _posterior(
        self,
        x: Tensor,
        standard: Tensor,
        target: Tensor,
        action: Tensor,
        updates: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return bits ``[B, bits]``, which examples use them ``[B]``, and the predictor's loss ``[B]``."""
        c, B = self.config, len(x)
        y = torch.cat([standard, _standardise(target)], 1).contiguous(memory_format=torch.channels_last)
        y = self.target_action(self._timed(self.target_embed(y), 0), action)
        found = []
        for conv, attention in zip(self.target_convs, self.target_attention, strict=True):
            y = torch.relu(conv(y))
            weight = attention(y).flatten(2).softmax(-1)  # [B, 1, h·w]
            found.append((y.flatten(2) * weight).sum(-1))
        raw = self.to_bits(torch.cat(found, 1)).float()
        bits, clean = self.discretise(raw, updates, generator)
        index = self._to_index(clean)
        # Bits as the simulation will draw them, so that what is above learns to live with them.
        drawn_share = c.latent_sampling * inv_lin(updates, c.warmup)
        with self._precision(x, rounds=False):
            known = x.flatten(1).float()
            loss = self.predictor(known, index, generator)
            drawn = self.predictor.draw(known, _uniform((B, c.groups), x, generator))
        other = self._to_signs(drawn)
        chosen = _uniform((B, 1), x, generator) < drawn_share
        bits = torch.where(chosen, bits + (other - bits).detach(), bits)
        use = _uniform((B,), x, generator) < c.latent_use * inv_lin(updates, c.warmup // 2)
        return bits, use, loss

    def discretise(self, raw: Tensor, updates: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Make bits of numbers, as in training.

        Args:
            raw: ``[B, bits]``.
            updates: how far training is.
            generator: source of randomness.

        Returns:
            The bits, noisy and turned over here and there, with gradients straight through (at first many are the numbers
            themselves, squashed), and the bits without any of that.
        """
        c = self.config
        noise = torch.randn(raw.shape, generator=generator, device=raw.device).clamp(-2, 2)
        soft = torch.tanh(raw + c.bit_noise * noise)
        hard = torch.where(soft > 0, 1.0, -1.0)
        bits = soft + (hard - soft).detach()
        bits = torch.where(_uniform(raw.shape, raw, generator) < c.bit_flip, -bits, bits)
        is_hard = _uniform(raw.shape, raw, generator) < inv_lin(updates, c.warmup)
        return torch.where(is_hard, bits, soft), torch.where(raw > 0, 1.0, -1.0).detach()

    def _to_index(self, bits: Tensor) -> Tensor:
        grouped = (bits > 0).unflatten(1, (self.config.groups, self.config.group))
        place = 2 ** torch.arange(self.config.group, device=bits.device)
        index: Tensor = (grouped * place).sum(-1)
        return index

    def _to_signs(self, index: Tensor) -> Tensor:
        place = 2 ** torch.arange(self.config.group, device=index.device)
        bits = (index[:, :, None] // place) % 2
        return (2.0 * bits - 1.0).flatten(1)

    # ---- training

    def loss(
        self, window: VideoWindow, *, updates: int, seed: int, checkpoint_activations: bool = False
    ) -> VideoLoss:
        """Predict each window step by step and compare.

        Each next frame is the true one or, more and more often, the model's own, through which no gradient flows.

        Args:
            window: real data.
            updates: how far training is, for the schedules.
            seed: of all noise: the same seed gives the same loss and gradient.
            checkpoint_activations: keep only the frames between steps, and compute the rest again on the way back.

        Returns:
            The loss: of pixels and rewards, of the predictor, and of the end of episodes where there is that head.
        """
        c, k = self.config, self.config.frames
        H, B = window.mask.shape
        generator = _generator(seed, window.frames.device)
        share = c.sampling * inv_exp(updates, c.warmup // 4) * inv_lin(updates, c.warmup)
        own = _uniform((H, B), window.action, generator) < share
        own[-1] = False  # nothing follows
        mask = window.mask.float()
        total = mask.sum().clamp(min=1)
        sums: dict[str, Tensor] = {}
        memory: Tensor | None = None
        begin = k - 1 if c.reading == "stacked" else 0
        if c.reading == "recurrent":
            memory = window.action.new_zeros(B, c.memory, *c.shape[1:])
        frames = list(window.frames[: k if c.reading == "stacked" else 1].unbind())
        for t in range(begin, k + H - 1):
            h = t - k + 1  # negative in the recurrent reading's context
            wanted = h >= 0 and bool(own[h].any())
            seen = torch.cat(frames[-c.seen :], 1)
            arguments = (seen, memory, window, t, updates, _mix(seed, t), wanted)
            if checkpoint_activations:
                # All randomness comes from the seed, so the second pass draws what the first one drew.
                losses, memory, frame = checkpoint(
                    self._step_losses, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                losses, memory, frame = self._step_losses(*arguments)
            weight = mask[h] if h >= 0 else torch.full_like(mask[0], 1 / H)
            kept = losses if h >= 0 else {"pixels": losses["pixels"], "predictor": losses["predictor"]}
            for name, x in kept.items():
                name = name if h >= 0 else f"context_{name}"
                value = (x * weight).sum()
                sums[name] = sums[name] + value if name in sums else value
            truth = window.frames[t + 1]
            if wanted and frame is not None:
                truth = torch.where(own[h][:, None, None, None], frame, truth)
            frames = [*frames[1 - c.seen :], truth] if c.seen > 1 else [truth]
        means = {name: x / (B if name.startswith("context") else total) for name, x in sums.items()}
        scale = {"pixels": c.pixel_scale, "context_pixels": c.pixel_scale, "reward": c.reward_scale}
        loss = torch.stack([scale.get(name, 1.0) * x for name, x in means.items()]).sum()
        stats = {f"loss/{name}": x.detach() for name, x in means.items()}
        return VideoLoss(loss, {"loss/model": loss.detach(), **stats})

    def _step_losses(
        self,
        seen: Tensor,
        memory: Tensor | None,
        window: VideoWindow,
        t: int,
        updates: int,
        seed: int,
        wanted: bool,
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Return the losses ``[B]`` of predicting frame ``t + 1``, the memory, and that frame where it is wanted."""
        c, generator, h = self.config, _generator(seed, seen.device), t - self.config.frames + 1
        if c.input_noise > 0:
            seen = _spoil(seen, c.input_noise, generator)
        target = window.frames[t + 1]
        with self._precision(seen):
            out = self._network(seen, memory, window.action[t], generator, target=target, updates=updates)
        losses = {"pixels": self.pixel_loss(out.pixels, target.permute(0, 2, 3, 1)).flatten(1).mean(1)}
        if c.kind == "sd":
            losses["predictor"] = out.predictor_loss
        else:
            losses["predictor"] = torch.zeros_like(losses["pixels"])
        if h >= 0:
            classes = window.reward[h].long()
            losses["reward"] = functional.cross_entropy(out.reward, classes, reduction="none")
            if c.done:
                ends = window.terminated[h].float()
                scale = torch.where(window.terminated[h], c.done_scale, 1.0)
                losses["end"] = scale * functional.binary_cross_entropy_with_logits(
                    out.end, ends, reduction="none"
                )
        frame = self._to_frame(out.pixels) if wanted else None
        return losses, out.memory, frame

    def pixel_loss(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Return the loss ``[..., C]`` of each sub-pixel of a uint8 ``target [..., C]``; below ``cutoff`` it is 0.

        Args:
            pixels: ``[..., C, 256]`` logits, or ``[..., C]`` numbers.
            target: what came.
        """
        c = self.config
        if c.pixels == "softmax":
            return pixel_cross_entropy(pixels.float(), target, cutoff=c.cutoff)
        # Half a shade up, so that the number without its fraction is the shade.
        return torch.relu((pixels - target.float() - 0.5).square() - c.cutoff**2)

    @torch.no_grad()
    def _to_frame(self, pixels: Tensor) -> Tensor:
        if self.config.pixels == "softmax":
            frame = pixels.argmax(-1).to(torch.uint8)
        else:
            frame = pixels.clamp(0, COLORS - 1).to(torch.uint8)
        return frame.permute(0, 3, 1, 2)

    # ---- simulation

    @torch.no_grad()
    def begin(self, frames: Tensor) -> VideoState:
        """Start from real frames ``[B, k·C, height, width]`` uint8, oldest first."""
        c = self.config
        if c.reading == "stacked":
            return VideoState(frames, None)
        memory = torch.zeros(len(frames), c.memory, *c.shape[1:], device=frames.device)
        for frame in frames.split(c.shape[0], 1)[:-1]:
            with self._precision(frame):
                memory = self._remember(torch.cat([memory, _standardise(frame)], 1), memory)
        return VideoState(frames, memory)

    @torch.no_grad()
    def step(self, state: VideoState, action: Tensor, uniform: Tensor) -> tuple[Prediction, VideoState]:
        """Go on by a step.

        Args:
            state: where the simulation stands.
            action: ``[B, A]``.
            uniform: ``[B, G]`` in [0, 1), the randomness of the latent.
        """
        c = self.config
        seen = state.frames[:, -c.seen * c.shape[0] :]
        with self._precision(seen):
            out = self._network(seen, state.memory, action, None, uniform=uniform)
        frame = self._to_frame(out.pixels)
        end = torch.sigmoid(out.end) if c.done else out.end
        reward = out.reward.argmax(-1).float() - 1
        frames = torch.cat([state.frames[:, c.shape[0] :], frame], 1)
        return Prediction(frame, reward, end), VideoState(frames, out.memory)


def _pad(x: Tensor, multiple: int) -> Tensor:
    height, width = x.shape[2:]
    more = (-height % multiple, -width % multiple)
    return functional.pad(x, (0, more[1], 0, more[0])) if any(more) else x


def _standardise(frames: Tensor) -> Tensor:
    """Bring every channel of every picture to mean 0 and deviation 1; of a plain one the deviation stays small."""
    x = frames.float()
    std, mean = torch.std_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) / std.clamp(min=1 / math.sqrt(x[0, 0].numel()))


def _spoil(frames: Tensor, share: float, generator: torch.Generator) -> Tensor:
    median = frames.flatten(2).median(-1).values[:, :, None, None]
    hit = _uniform((len(frames), 1, *frames.shape[2:]), frames.float(), generator) < share
    return torch.where(hit, median, frames)


def _waves(channels: int, height: int, width: int) -> Tensor:
    """Return ``[1, channels, height, width]``: sines and cosines of the row, then of the column, of growing wavelength."""
    count = channels // 4
    waves = torch.zeros(1, channels, height, width)
    if count == 0:
        return waves
    rate = LONGEST_WAVE ** -(torch.arange(count) / max(count - 1, 1))
    for axis, size in enumerate((height, width)):
        angle = torch.arange(size)[:, None] * rate  # [size, count]
        wave = torch.cat([angle.sin(), angle.cos()], 1).T  # [2·count, size]
        wave = wave[:, :, None] if axis == 0 else wave[:, None, :]
        waves[0, 2 * count * axis : 2 * count * (axis + 1)] = wave
    return waves.contiguous(memory_format=torch.channels_last)


def _uniform(shape: Any, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device)


def _drop(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Drop numbers at random where there is a generator, which is in training."""
    if share == 0 or generator is None:
        return x
    return x * (_uniform(x.shape, x, generator) >= share).to(x.dtype) / (1 - share)


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _mix(seed: int, t: int) -> int:
    return int(np.random.SeedSequence([seed, t]).generate_state(1)[0])
