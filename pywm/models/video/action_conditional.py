"""Action-conditional video prediction (Oh et al. 2015, "... using deep networks in Atari games").

Convolutions encode the last frames, a product of factors lets the action act on the code, deconvolutions draw the next
frame, which takes the newest place among the frames when more than one step is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["PROFILES", "ActionConditional", "Profile", "Stage"]

FRAMES = 4  # that the feed-forward encoder sees
LSTM_CONTEXT = 11  # frames that the recurrent encoder looks at before it predicts
LSTM_ROWS = 10  # single steps that it learns from in a window
# Bounds of the uniform distributions that initial weights are drawn from.
ENCODE_INIT, ACTION_INIT, LSTM_INIT = 1.0, 0.1, 0.08
LSTM_CLIP = 0.1  # of the gradients that reach the LSTM's outputs, each by itself


class Stage(NamedTuple):
    """A convolution, and the deconvolution that mirrors it.

    Attributes:
        channels: of the output.
        kernel, stride: of both directions.
        padding: of height and width.
    """

    channels: int
    kernel: int
    stride: int
    padding: tuple[int, int]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output.

        Raises:
            ValueError: the mirrored deconvolution would not give back the input's size.
        """
        sides = []
        for side, padding in zip((height, width), self.padding, strict=True):
            steps, rest = divmod(side + 2 * padding - self.kernel, self.stride)
            if steps < 0 or rest:
                raise ValueError(
                    f"Stage.size: side is {side}, but expected one that {self} covers without a rest"
                )
            sides.append(steps + 1)
        return sides[0], sides[1]


class Profile(NamedTuple):
    """Sizes of the networks for one size of pictures.

    Attributes:
        stages: the convolutions, from the picture on.
        hidden: width of the code, and of the factors.
    """

    stages: tuple[Stage, ...]
    hidden: int


PROFILES: Mapping[tuple[int, int], Profile] = {
    (210, 160): Profile(
        (
            Stage(64, 8, 2, (0, 1)),
            Stage(128, 6, 2, (1, 1)),
            Stage(128, 6, 2, (1, 1)),
            Stage(128, 4, 2, (0, 0)),
        ),
        2048,
    ),
    (84, 84): Profile((Stage(64, 8, 4, (2, 2)), Stage(128, 3, 2, (0, 0)), Stage(128, 4, 2, (1, 1))), 1024),
    (64, 64): Profile((Stage(64, 8, 4, (2, 2)), Stage(128, 4, 2, (1, 1)), Stage(128, 4, 2, (1, 1))), 1024),
    (32, 32): Profile((Stage(64, 4, 4, (0, 0)), Stage(64, 2, 2, (0, 0)), Stage(64, 3, 1, (1, 1))), 256),
}
"""Sizes by height and width of the pictures: the paper's for whole Atari screens, and smaller ones that a CPU can train."""


class ActionConditional(nn.Module):
    """Predict the next frames from the last ones and the actions.

    With the code ``h`` of the frames and the action ``a``, one-hot or numbers::

        h_dec = W_dec ((W_enc h) ⊙ (W_a a)) + b

    Frames are uint8 outside; inside they are divided by 255, and the mean picture is taken off. Nothing bounds what the
    decoder draws. Index t of an action is the step from frame t to frame t + 1.

    Args:
        shape: ``[C, height, width]`` of a frame; height and width are a key of :data:`PROFILES`.
        actions: width A of an action.
        recurrent: an LSTM behind the convolutions, which see one frame at a time, in place of the last four frames.
        action_blind: a baseline that is told nothing: every action is the mean of all.
        generator: source of randomness of the initialisation.

    Attributes:
        context: frames that have to be there before the first prediction.
        sizes: ``[C, height, width]`` of the picture and behind every convolution.
        mean: the mean picture, a buffer, zero until :meth:`set_mean`.

    Raises:
        ValueError: there is no profile for the shape, or no action.

    Source:
        Oh et al. (2015), section 3 and appendix A, and their code, whose initialisation this is: the rest by Glorot and
        Bengio's rule as Caffe has it, U(-√(3/inputs), √(3/inputs)), biases zero.
    """

    mean: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        actions: int,
        *,
        recurrent: bool = False,
        action_blind: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(shape) != 3 or shape[0] < 1 or tuple(shape[1:]) not in PROFILES:
            known = ", ".join(f"{height} x {width}" for height, width in PROFILES)
            raise ValueError(
                f"ActionConditional: shape is {tuple(shape)}, but [C, height, width] was expected, with height x width one "
                f"of {known}"
            )
        if actions < 1:
            raise ValueError(f"ActionConditional: actions is {actions}, but 1 or more was expected")
        profile = PROFILES[shape[1], shape[2]]
        C, height, width = shape
        self.shape, self.actions = (C, height, width), actions
        self.recurrent, self.action_blind = recurrent, action_blind
        self.context = LSTM_CONTEXT if recurrent else FRAMES
        self._frames = 1 if recurrent else FRAMES
        self.register_buffer("mean", torch.zeros(self.shape))

        self.sizes = [(C, height, width)]
        self.convs = nn.ModuleList()
        inputs = C * self._frames
        for stage in profile.stages:
            self.convs.append(nn.Conv2d(inputs, stage.channels, stage.kernel, stage.stride, stage.padding))
            inputs = stage.channels
            self.sizes.append((inputs, *stage.size(*self.sizes[-1][1:])))
        flat, hidden = math.prod(self.sizes[-1]), profile.hidden
        self.encode_out = nn.Linear(flat, hidden)
        self.lstm = nn.LSTMCell(hidden, hidden) if recurrent else None
        self.factor_code = nn.Linear(hidden, hidden, bias=False)
        self.factor_action = nn.Linear(actions, hidden, bias=False)
        self.factor_out = nn.Linear(hidden, hidden)
        self.decode_in = nn.Linear(hidden, flat)
        self.deconvs = nn.ModuleList()
        outputs = [C, *(stage.channels for stage in profile.stages[:-1])]
        for stage, channels in zip(reversed(profile.stages), reversed(outputs), strict=True):
            self.deconvs.append(
                nn.ConvTranspose2d(stage.channels, channels, stage.kernel, stage.stride, stage.padding)
            )
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                bound = math.sqrt(3 / module.weight[0].numel())
                if module is self.factor_code:
                    bound = ENCODE_INIT
                elif module is self.factor_action:
                    bound = ACTION_INIT
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        if self.lstm is not None:
            for p in self.lstm.parameters():
                p.uniform_(-LSTM_INIT, LSTM_INIT, generator=generator)

    def set_mean(self, mean: Tensor) -> None:
        """Set the mean picture ``[C, height, width]``, in [0, 1], that is taken off all frames."""
        if tuple(mean.shape) != self.shape:
            raise ValueError(
                f"ActionConditional.set_mean: mean is {tuple(mean.shape)}, but {self.shape} was expected"
            )
        self.mean.copy_(mean)

    def rows(self, horizon: int) -> int:
        """Return how many frames a window has that :meth:`loss` is to learn ``horizon`` steps from.

        The recurrent model learns single steps from ten places of a window, longer ones from its end, as in the paper.
        """
        return self.context + (LSTM_ROWS if self.recurrent and horizon == 1 else horizon)

    def normalize(self, frames: Tensor) -> Tensor:
        """Turn uint8 frames ``[..., C, height, width]`` into what the network takes."""
        return frames.to(self.mean.dtype).div(255).sub_(self.mean)

    def encode(self, frames: Tensor) -> Tensor:
        """Map ``[B, frames·C, height, width]`` to codes ``[B, hidden]``."""
        x = frames.contiguous(memory_format=_layout(frames))
        for conv in self.convs:
            x = torch.relu_(conv(x))
        code: Tensor = torch.relu_(self.encode_out(x.flatten(1)))
        return code

    def transform(self, code: Tensor, action: Tensor) -> Tensor:
        """Let actions ``[B, A]`` act on codes ``[B, hidden]``."""
        if self.action_blind:
            action = torch.full_like(action, 1 / self.actions)
        acted: Tensor = self.factor_out(self.factor_code(code) * self.factor_action(action))
        return acted

    def decode(self, code: Tensor) -> Tensor:
        """Draw ``[B, hidden]`` as pictures without their mean, ``[B, C, height, width]``."""
        x = torch.relu_(self.decode_in(code)).view(-1, *self.sizes[-1])
        x = x.contiguous(memory_format=_layout(x))
        for i, deconv in enumerate(self.deconvs):
            x = deconv(x)
            if i < len(self.deconvs) - 1:
                x = torch.relu_(x)
        return x

    def forward(self, frames: Tensor, action: Tensor) -> Tensor:
        """Predict from the model's own predictions.

        Args:
            frames: normalised, ``[T, B, C, height, width]``, the newest last, T at least ``context``.
            action: ``[T - 1 + K, B, A]``; the last K lead to the predictions, those before between the frames.

        Returns:
            The K frames that follow, normalised, ``[K, B, C, height, width]``.

        Raises:
            ValueError: there are too few frames or actions.
        """
        self._check(frames, action)
        T, K = len(frames), len(action) - len(frames) + 1
        predicted: list[Tensor] = []
        if self.lstm is None:
            seen = list(frames[-FRAMES:])
            for k in range(K):
                x = self.decode(self.transform(self.encode(torch.cat(seen, 1)), action[T - 1 + k]))
                predicted.append(x)
                seen = [*seen[1:], x]
            return torch.stack(predicted)
        state = self._watch(frames)[-1]
        for k in range(K):
            if k:
                state = self._remember(self.encode(predicted[-1]), state)
            predicted.append(self.decode(self.transform(state[0], action[T - 1 + k])))
        return torch.stack(predicted)

    def _watch(self, frames: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the LSTM's states behind frames ``[T, B, C, height, width]``."""
        codes = self.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        zero = torch.zeros_like(codes[0])
        state, states = (zero, zero), []
        for code in codes:
            state = self._remember(code, state)
            states.append(state)
        return states

    def _remember(self, code: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.lstm is not None
        output, cell = self.lstm(code, state)
        if output.requires_grad:
            output.register_hook(lambda grad: grad.clamp(-LSTM_CLIP, LSTM_CLIP))
        return output, cell

    def loss(self, frames: Tensor, action: Tensor, horizon: int) -> Tensor:
        """Return ``1/(2·K·B) Σ (prediction - truth)²`` over K predicted steps, B windows and all pixels, 0-d.

        Args:
            frames: uint8 windows ``[rows(K), B, C, height, width]``.
            action: ``[rows(K) - 1, B, A]``.
            horizon: K. From the second step on the model sees what it has predicted, and the gradient goes through it.
        """
        expected = (self.rows(horizon), self.rows(horizon) - 1)
        if (len(frames), len(action)) != expected:
            raise ValueError(
                f"ActionConditional.loss: frames and action have {len(frames)} and {len(action)} rows, but "
                f"{expected[0]} and {expected[1]} were expected for a horizon of {horizon}"
            )
        x, T, B = self.normalize(frames), self.context, frames.shape[1]
        target = x[T:]
        if self.recurrent and horizon == 1:
            codes = torch.stack([output for output, _ in self._watch(x[:-1])[T - 1 :]])
            drawn = self.decode(self.transform(codes.flatten(0, 1), action[T - 1 :].flatten(0, 1)))
            predicted = drawn.unflatten(0, codes.shape[:2])
        else:
            predicted = self(x[:T], action)
        total: Tensor = (predicted - target).square().sum()
        return total / (2 * len(target) * B)

    @torch.no_grad()
    def predict(self, frames: Tensor, action: Tensor) -> Tensor:
        """Predict like :meth:`forward`, from uint8 frames to pictures that are cut to [0, 1].

        What the model sees of its own predictions is not cut, as in training.
        """
        predicted: Tensor = self(self.normalize(frames), action)
        return predicted.add_(self.mean).clamp_(0, 1)

    def _check(self, frames: Tensor, action: Tensor) -> None:
        if frames.ndim != 5 or tuple(frames.shape[2:]) != self.shape or len(frames) < self.context:
            C, height, width = self.shape
            raise ValueError(
                f"ActionConditional: frames is {tuple(frames.shape)}, but [T, B, {C}, {height}, {width}] was expected with "
                f"T from {self.context} on"
            )
        wanted = (frames.shape[1], self.actions)
        if action.ndim != 3 or tuple(action.shape[1:]) != wanted or len(action) < len(frames):
            raise ValueError(
                f"ActionConditional: action is {tuple(action.shape)}, but [{len(frames) - 1} + K, {wanted[0]}, "
                f"{wanted[1]}] was expected"
            )


def _layout(x: Tensor) -> torch.memory_format:
    # oneDNN convolves, and above all differentiates, channels that lie side by side faster on CPUs.
    return torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
