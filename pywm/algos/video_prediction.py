"""Action-conditional video prediction (Oh et al. 2015, "... using deep networks in Atari games").

One file, in the paper's order: ``Config`` and ``PRESETS``; the ``Agent``, which is the policy that collects the pictures,
and holds the model that learns from them; the ``Learner``, which plays, then trains the model over its own outputs with a
curriculum of growing horizons, and compares what it foresees with what happened; and ``train``.

The run's clock, which metrics and checkpoints call ``env_steps``, counts environment steps while pictures are collected,
and goes on with one tick an update.

Deviations from the paper are those of its released code (Adam instead of RMSProp), and:

* Adam's averages are kept from phase to phase;
* pictures are collected at random unless an agent is given; the paper's came from a DQN with 30 % of random actions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from torch import Tensor

from pywm import algos
from pywm.config import Preset, check_fields
from pywm.data.frames import Frames, Windows
from pywm.envs import EnvLike, Envs, make, split_keys
from pywm.errors import CheckpointError, MissingExtra, UserError
from pywm.models.actions import ActionSpace
from pywm.models.video import ActionConditional, Curriculum
from pywm.models.world_model import Predicted
from pywm.optim import Adam, FlatParameters
from pywm.training.checkpoint import MISFITS, join, part, reason
from pywm.training.prediction import COPY, MODEL, PERMUTED, horizon_errors, plot_errors, plot_rollout, rollout
from pywm.training.run import NullRun, Run, assert_finite
from pywm.types import Obs, State

__all__ = ["PRESETS", "Agent", "Config", "train"]

log = logging.getLogger(__name__)

# What a row of metrics is the mean of.
UPDATES_PER_ROW = 50
# Vector steps between two rows of metrics while pictures are collected.
STEPS_PER_ROW = 20
# Rollouts in a strip.
SHOWN = 3
BLIND = "action-blind model"


@dataclass(frozen=True)
class Config:
    """Settings of video prediction. The defaults are the paper's."""

    # Phases to come may be added and changed; what has been learnt stays.
    may_change: ClassVar[tuple[str, ...]] = ("curriculum", "eval_horizon", "eval_rollouts", "show_steps")

    seed: int = 0
    """Seed of everything random: weights, actions, windows, environments."""
    steps: int = 500_000
    """Environment steps, over all environments together, whose pictures the model learns from."""
    test_steps: int = 50_000
    """Further steps, in other episodes, that it is tested with."""
    num_envs: int = 8
    """Parallel environments N (an environment that is already a vector has its own number)."""
    agent: str | None = None
    """Directory of a run whose agent collects the pictures; at random without one."""
    epsilon: float = 0.3
    """Share of random actions beside that agent's."""
    recurrent: bool = False
    """One frame at a time and an LSTM, in place of the last four frames."""
    curriculum: tuple[tuple[int, float, int, int], ...] = (
        (1, 1e-4, 32, 1_500_000),
        (3, 1e-5, 8, 1_000_000),
        (5, 1e-5, 8, 1_000_000),
    )
    """Phases: horizon K, learning rate, windows of an update, updates (the LSTM's batches in the paper: 4)."""
    advance: Literal["updates", "plateau"] = "updates"
    """When a phase ends: after its updates, or already when its loss no longer falls."""
    max_grad_norm: float | None = None
    """Clip the norm of the whole gradient to this."""
    blind_baseline: bool = False
    """Train a second model beside it that is not told the actions, to compare with; twice the time."""
    eval_horizon: int = 100
    """Steps ahead that errors are measured for."""
    eval_rollouts: int = 64
    """Rollouts that errors are averaged over, at most."""
    show_steps: tuple[int, ...] = (1, 10, 30, 151)
    """Steps ahead that the strip shows, as far as episodes go."""
    image_size: tuple[int, int] | None = None
    """Height and width of Atari's pictures, which then come one at a time; None leaves it at four of 84 x 84 pixels."""
    rgb: bool = False
    """Atari's pictures in colour, with ``image_size``."""
    max_episode_steps: int | None = None
    """Time limit of an episode in place of the environment's own."""

    @property
    def env_kwargs(self) -> dict[str, Any] | None:
        """What environments are made with."""
        if self.image_size is None:
            return None
        height, width = self.image_size
        return {"img_height": height, "img_width": width, "stack_num": 1, "grayscale": not self.rgb}

    @property
    def total_steps(self) -> int:
        """Where the run's clock ends at the latest: environment steps and updates."""
        rows = sum(-(-steps // self.num_envs) for steps in (self.steps, self.test_steps))
        return rows * self.num_envs + sum(updates for *_, updates in self.curriculum)

    def __post_init__(self) -> None:
        check_fields(self, "video_prediction.Config")
        for name in ("steps", "test_steps", "num_envs", "eval_horizon"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("eval_rollouts", self.eval_rollouts >= 2, "at least 2")
        self._require("epsilon", 0 <= self.epsilon <= 1, "a number in [0, 1]")
        self._require("show_steps", all(step >= 1 for step in self.show_steps), "numbers from 1 on")
        norm = self.max_grad_norm
        self._require("max_grad_norm", norm is None or 0 < norm < math.inf, "a positive number or None")
        self._require("seed", 0 <= self.seed < 2**31, "a number in [0, 2147483647]")
        self._require("rgb", not self.rgb or self.image_size is not None, "False without image_size")
        limit = self.max_episode_steps
        self._require("max_episode_steps", limit is None or limit >= 1, "at least 1 or None")
        try:
            Curriculum(self.curriculum)
        except ValueError as error:
            raise UserError(f"video_prediction.Config: {error}") from error

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(
                f"video_prediction.Config: {name} is {getattr(self, name)!r}, but {expected} was expected"
            )


PRESETS: dict[str, Preset] = {
    "gridchase": Preset(
        {
            "steps": 20_000,
            "test_steps": 12_800,
            "num_envs": 64,
            "curriculum": ((1, 1e-3, 16, 1000), (3, 5e-4, 16, 500), (5, 5e-4, 16, 1500)),
        },
        ("pywm/GridChase-v0",),
        "the player's cell right after 30 steps in 100 % of 512 rollouts (seed 0), in 4 minutes of one core",
    ),
    "atari": Preset(
        {
            "steps": 30_000,
            "test_steps": 4_000,
            "num_envs": 8,
            "image_size": (84, 84),
            "curriculum": ((1, 1e-4, 32, 100_000), (3, 1e-5, 8, 50_000), (5, 1e-5, 8, 50_000)),
        },
        ("ALE/*",),
        "made for a GPU or for patience; no figure is known",
    ),
    "oh2015": Preset(
        {"image_size": (210, 160), "rgb": True},
        (),
        "the paper's pictures and updates: days on a GPU, 50 GB of memory; no figure is known",
    ),
}


class Acting(NamedTuple):
    """What an agent remembers of ``N`` environments.

    Attributes:
        action: ``[N, A]``, the last one, as the model takes it.
        inner: what the agent remembers that collects; None at random.
    """

    action: Tensor
    inner: Any


class Agent:
    """The policy that collects pictures, and the model that foresees them.

    ::

        agent, envs = pywm.load("runs/pywm-GridChase-v0/video_prediction/0-20261128-120000")
        frames = agent.model.predict(frames, actions)  # what follows, see pywm.models.video.ActionConditional

    Args:
        config: settings.
        observation_space: of a single environment, as ``Envs.observation_space``.
        action_space: of a single environment, as ``Envs.action_space``.
        device: where the networks are.

    Attributes:
        model: the network; its parameters are views of ``parameters.data``.
        blind: the baseline that is not told the actions, or None.
        actions: how actions look to the model.
        key: of the picture among the observations.
        shape: ``[C, height, width]`` of a frame; of stacked frames the last one is taken.

    Raises:
        UserError: there is no picture, there are several, or one of a size for which there is no network.
    """

    def __init__(
        self,
        config: Config,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._observation_space = observation_space
        self.actions = ActionSpace(action_space)
        keys = split_keys(observation_space).image
        if len(keys) != 1:
            raise UserError(
                f"video_prediction: the environment shows {len(keys)} pictures {list(keys)}, but one was expected"
            )
        self.key = keys[0]
        self._is_dict = isinstance(observation_space, spaces.Dict)
        box = observation_space[self.key] if isinstance(observation_space, spaces.Dict) else observation_space
        assert box.shape is not None
        channels = 3 if box.shape[0] % 3 == 0 else 1
        self._stack = box.shape[0] // channels
        self.shape = (channels, *box.shape[1:])
        weights_seed, actions_seed = _seeds(config.seed)[:2]
        self.model = self._build(weights_seed, action_blind=False)
        self.parameters = FlatParameters(self.model)
        self.blind = self._build(weights_seed, action_blind=True) if config.blind_baseline else None
        self.blind_parameters = None if self.blind is None else FlatParameters(self.blind)
        self._generator = torch.Generator().manual_seed(actions_seed)
        self._collector: Any = None

    def _build(self, seed: int, *, action_blind: bool) -> ActionConditional:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"recurrent": self.config.recurrent, "generator": generator}
        try:
            model = ActionConditional(self.shape, self.actions.width, action_blind=action_blind, **options)
        except ValueError as error:
            raise UserError(f"video_prediction: {error}") from error
        return model.to(self.device)

    def frames(self, obs: Obs) -> np.ndarray:
        """Return the newest frames ``[..., C, height, width]`` of observations ``[..., k·C, height, width]``."""
        if isinstance(obs, dict) is not self._is_dict:
            expected = "a dict of arrays" if self._is_dict else "one array"
            raise UserError(
                f"video_prediction.Agent: obs is a {type(obs).__name__}, but {expected} was expected"
            )
        pictures = obs[self.key] if isinstance(obs, dict) else obs
        wanted = (self._stack * self.shape[0], *self.shape[1:])
        if pictures.ndim < 4 or tuple(pictures.shape[-3:]) != wanted:
            expected = ", ".join(["N", *map(str, wanted)])
            raise ValueError(
                f"video_prediction.Agent.act: obs has shape {pictures.shape}, but ({expected}) was expected"
            )
        return pictures[..., -self.shape[0] :, :, :]

    def act(
        self,
        obs: Obs,
        state: Acting | None = None,
        *,
        is_first: np.ndarray | None = None,
        greedy: bool = False,
    ) -> tuple[np.ndarray, Acting]:
        """Choose an action for each environment as it was done when the pictures were collected.

        Args:
            obs: ``[N, ...]``, or a dict of such arrays, as ``Envs`` gives them.
            state: what the last call returned; None where all episodes begin.
            is_first: ``[N]`` bool, where an episode begins.
            greedy: of no effect: the model foresees, it does not want anything.

        Returns:
            The actions ``[N, ...]`` and the state.
        """
        N = len(self.frames(obs))
        action, inner = self._random(N), None
        if self.config.agent is not None:
            collector = self.collector()
            mind = None if state is None else state.inner
            chosen, inner = collector.act(obs, mind, is_first=is_first)
            explores = torch.rand(N, 1, generator=self._generator) < self.config.epsilon
            action = torch.where(explores, action, self.actions.from_env(chosen))
        return self.actions.to_env(action), Acting(action, inner)

    def _random(self, N: int) -> Tensor:
        """Draw actions ``[N, A]``."""
        space, generator = self.actions, self._generator
        if space.kind == "normal":
            return torch.rand(N, space.width, generator=generator) * 2 - 1
        chosen = [torch.randint(n, (N,), generator=generator) for n in space.classes]
        hot = [torch.nn.functional.one_hot(x, n) for x, n in zip(chosen, space.classes, strict=True)]
        return torch.cat(hot, -1).float()

    def collector(self) -> Any:
        """Return the agent of the run that is to collect, loaded at the first call.

        Raises:
            UserError: there is no such run, or its agent sees something else.
        """
        if self._collector is None:
            assert self.config.agent is not None
            agent, envs = algos.load(self.config.agent, device=str(self.device))
            envs.close()
            if (envs.observation_space, envs.action_space) != (self._observation_space, self.actions.space):
                raise UserError(
                    f"video_prediction: agent is {self.config.agent!r}, which sees {envs.observation_space} and acts in "
                    f"{envs.action_space}, but {self._observation_space} and {self.actions.space} were expected"
                )
            self._collector = agent
        return self._collector

    def open_loop(
        self,
        obs: dict[str, np.ndarray],
        prev_action: Tensor,
        is_first: np.ndarray,
        context: int,
        *,
        seed: int = 0,
    ) -> Predicted:
        """Foresee what follows on the first ``context`` rows, for :func:`pywm.training.dream.dream`.

        Args:
            obs: ``key -> [T, B, ...]``, of which the first ``context`` rows are looked at.
            prev_action: ``[T, B, A]``, what led to each row.
            is_first: of no use here, where all windows begin an episode.
            context: frames to look at. Those behind the first few are predicted from the true ones before.
            seed: of no use here, where nothing is random.

        Returns:
            Pictures ``[T, B, ...]`` in [0, 1], in stacks where observations are stacks. Rewards are NaN: the model knows
            none.

        Raises:
            UserError: ``context`` is less than what the model looks at.
        """
        needed = self.model.context
        if context < needed:
            raise UserError(
                f"dream: context is {context}, but expected {needed} or more, the frames that the model looks at"
            )
        pictures = np.ascontiguousarray(self.frames(obs if self._is_dict else obs["obs"]))
        frames = torch.from_numpy(pictures).to(self.device)
        action = prev_action[1:].to(self.device)
        rows = [frames[:needed].float() / 255]
        for t in range(needed, context):
            rows.append(self.model.predict(frames[t - needed : t], action[t - needed : t]))
        start = context - needed
        window = torch.cat([frames[start:context], frames[context:]])
        rows.append(rollout(self.model, window, action[start:]))
        shown = torch.cat(rows)
        T, B = shown.shape[:2]
        # Stacks of the frames that were predicted, at the beginning of the first one alone.
        back = torch.arange(T)[:, None] - torch.arange(self._stack - 1, -1, -1)
        stacks = shown[back.clamp(min=0)].transpose(1, 2).flatten(2, 3)
        nothing = torch.full((T, B), math.nan)
        return Predicted({self.key: stacks}, nothing, nothing)

    def state(self) -> State:
        """Return weights, the mean picture and the generator."""
        tensors = {name: x.detach().clone() for name, x in self._tensors().items()}
        return State({**tensors, "generator": self._generator.get_state()}, {})

    def load_state(self, state: State) -> None:
        """Put back what ``state`` returned.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        with torch.no_grad():
            for name, p in self._tensors().items():
                saved = state.tensors.get(name)
                if saved is None or saved.shape != p.shape:
                    got = "missing" if saved is None else f"of shape {tuple(saved.shape)}"
                    raise CheckpointError(
                        f"video_prediction.Agent.load_state: {name} is {got}, but {tuple(p.shape)} was expected"
                    )
                p.copy_(saved)
        try:
            self._generator.set_state(state.tensors["generator"])
        except MISFITS as error:
            raise CheckpointError(f"video_prediction.Agent.load_state: {reason(error)}") from error

    def _tensors(self) -> dict[str, Tensor]:
        models = {"model": self.model} if self.blind is None else {"model": self.model, "blind": self.blind}
        return {
            f"{which}.{name}": x
            for which, model in models.items()
            for name, x in (*model.named_parameters(), *model.named_buffers())
        }


# ---- learning ------------------------------------------------------------------------------------------------------------


class Learner:
    """A training run's state: collecting, the pictures, and the updates.

    Args:
        agent: what learns.
        envs: what it looks at.

    Attributes:
        pictures: to learn from.
        test: to be tested with.
        curriculum: where learning stands.
        updates: so far.
        evaluated: whether the last evaluation was written.
    """

    def __init__(self, agent: Agent, envs: Envs) -> None:
        config, N = agent.config, envs.num_envs
        self.agent, self.envs, self.config = agent, envs, config
        self.pictures, self.test = (
            Frames(-(-steps // N), N, agent.shape, agent.actions.width)
            for steps in (config.steps, config.test_steps)
        )
        log.info("the pictures take %.2f GiB of memory", (self.pictures.size + self.test.size) / 2**30)
        self.curriculum = Curriculum(config.curriculum, advance=config.advance)
        models = [(agent.model, agent.parameters)]
        if agent.blind is not None and agent.blind_parameters is not None:
            models.append((agent.blind, agent.blind_parameters))
        self._models = [
            (model, flat, Adam(flat, eps=1e-8, max_grad_norm=config.max_grad_norm)) for model, flat in models
        ]
        self._generator = np.random.Generator(np.random.PCG64(_seeds(config.seed)[2]))
        self._acting: Acting | None = None
        self._is_first = np.ones(N, bool)
        self._windows: Windows | None = None
        self.evaluated = False
        self._losses = [0.0] * len(self._models)
        self._num_losses = 0

    @property
    def updates(self) -> int:
        return self._models[0][2].updates

    @property
    def collecting(self) -> bool:
        """Whether there are pictures still to come."""
        return not self.test.is_full

    @property
    def env_steps(self) -> int:
        """The run's clock: environment steps, then updates."""
        return (self.pictures.count + self.test.count) * self.envs.num_envs + self.updates

    # Collecting.

    def start_episodes(self, run: Run) -> None:
        """Reset the environments with the seed that belongs to the run's last checkpoint, and to the kind of pictures."""
        words = [self.config.seed, run.checkpoint_number, int(self.pictures.is_full)]
        self.envs.reset(int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x7FFFFFFF)
        self.forget()
        (self.test if self.pictures.is_full else self.pictures).restart()
        self._is_first = np.ones_like(self._is_first)

    def forget(self) -> None:
        """Let the policy forget what it saw, which is not part of a checkpoint."""
        self._acting = None

    def play(self, run: Run) -> None:
        """Act once in every environment and keep what happened; with the last picture, prepare to learn."""
        obs = self.envs.obs
        with run.phase("act"):
            action, self._acting = self.agent.act(obs, self._acting, is_first=self._is_first)
        with run.phase("env"):
            out = self.envs.step(action)
        with run.phase("replay"):
            store = self.test if self.pictures.is_full else self.pictures
            store.add(self.agent.frames(obs), self._acting.action, out)
        self._is_first = out.terminated | out.truncated | ~out.valid
        if store is self.pictures and store.is_full:
            mean = store.mean()
            for model, *_ in self._models:
                model.set_mean(mean)
            self.start_episodes(run)
        if not self.collecting:
            self._check()

    def _check(self) -> None:
        """See that episodes are long enough for what is to come, before the updates and not behind them."""
        horizons = [phase.horizon for phase in self.curriculum.phases]
        self._find(self.pictures, max(self.agent.model.rows(K) for K in horizons))
        self._rollouts()

    # Learning.

    def learn(self, run: Run) -> None:
        """Take an update."""
        self.evaluated = False
        phase = self.curriculum.phase
        rows = self.agent.model.rows(phase.horizon)
        with run.phase("replay"):
            if self._windows is None or self._windows.rows != rows:
                self._windows = self._find(self.pictures, rows)
            index = self._generator.integers(len(self._windows), size=phase.batch_size)
            frames, action = self._gather(self.pictures, self._windows[index])
        losses = []
        with run.phase("learn"):
            for i, (model, flat, optimizer) in enumerate(self._models):
                loss = model.loss(frames, action, phase.horizon)
                flat.backward(loss)
                optimizer.step(phase.lr)
                losses.append(loss.item())
                self._losses[i] += losses[i]
        self._num_losses += 1
        if not all(map(math.isfinite, losses)):
            assert_finite({"loss/prediction": torch.tensor(losses)}, env_steps=self.env_steps)
        if self.curriculum.step(losses[0]) and not self.curriculum.finished:
            K, lr, batch_size, _ = self.curriculum.phase
            log.info(
                "%s updates: on with %d steps ahead, learning rate %g, batches of %d",
                f"{self.updates:,}",
                K,
                lr,
                batch_size,
            )

    def _find(self, frames: Frames, rows: int) -> Windows:
        windows = frames.windows(rows)
        if not len(windows):
            raise UserError(
                f"video_prediction: no episode of the {frames.count * frames.num_envs:,} pictures has {rows} in a row, but "
                "expected one; collect more (steps, fewer num_envs), or look less far (curriculum, eval_horizon)"
            )
        return windows

    def _rollouts(self) -> Windows:
        config = self.config
        windows = self.test.windows(self.agent.model.context + config.eval_horizon).apart()
        if len(windows) < 2:
            raise UserError(
                f"video_prediction: eval_horizon is {config.eval_horizon}, but the {config.test_steps:,} test pictures "
                f"hold {len(windows)} rollouts of that length, and 2 were expected; lower it, or raise test_steps"
            )
        return windows

    def _gather(self, store: Frames, windows: Windows) -> tuple[Tensor, Tensor]:
        frames, action = store.gather(windows)
        return frames.to(self.agent.device), action.to(self.agent.device)

    # Looking.

    def evaluate(self, run: Run) -> dict[str, float]:
        """Predict the test pictures open loop, write errors and strips into ``RUN/prediction``, and return the figures."""
        config, model = self.config, self.agent.model
        windows = self._rollouts()
        spread = np.linspace(0, len(windows) - 1, min(config.eval_rollouts, len(windows))).round()
        frames, action = self._gather(self.test, windows[spread.astype(np.int64)])
        others = {} if self.agent.blind is None else {BLIND: self.agent.blind}
        with run.phase("eval"):
            curves = horizon_errors(model, frames, action, others=others, seed=config.seed)
        steps = [k for k in config.show_steps if k <= config.eval_horizon] or [config.eval_horizon]
        if not isinstance(run, NullRun):
            with run.phase("eval"):
                self._write(run.dir / "prediction", curves, frames.shape[1], steps)
        names = {MODEL: "model", COPY: "copy", PERMUTED: "permuted", BLIND: "blind"}
        return {f"eval/{names[name]}_{k}": errors[k - 1] for name, errors in curves.items() for k in steps}

    def _write(self, folder: Path, curves: dict[str, list[float]], rollouts: int, steps: list[int]) -> None:
        context = self.agent.model.context
        shown = next(
            (s for s in _beginnings(self.config.show_steps) if len(self.test.windows(context + s[-1]))), steps
        )
        if len(shown) < len(self.config.show_steps):
            left = ", ".join(map(str, self.config.show_steps[len(shown) :]))
            log.warning("no test episode is long enough to show step %s", left)
        windows = self.test.windows(context + shown[-1]).apart()
        frames, action = self._gather(self.test, windows[:: -(-len(windows) // SHOWN)])
        predicted = rollout(self.agent.model, frames, action).cpu().numpy()
        truth = frames[context:].cpu().numpy().astype(np.float32) / 255
        about = {"updates": self.updates, "rollouts": rollouts, "squared_error": curves}
        try:
            plot_rollout(truth, predicted, folder / "rollout.png", steps=shown)
            temporary = folder / ".errors.json.tmp"
            temporary.write_text(json.dumps(about, indent=1) + "\n")
            os.replace(temporary, folder / "errors.json")
            plot_errors(curves, folder / "errors.png", title=f"{self.envs.name}, {self.updates:,} updates")
        except MissingExtra as error:
            log.warning("no picture of the errors: %s", error)
        except (OSError, UserError) as error:  # no pictures are worth a run
            log.warning("evaluation not written: %s", error)

    def metrics(self) -> dict[str, Any]:
        """Return the figures since the last call."""
        found: dict[str, Any] = {"pictures": self.pictures.count * self.envs.num_envs}
        if self._num_losses:
            means = [loss / self._num_losses for loss in self._losses]
            found |= dict(zip(("loss/prediction", "loss/blind"), means, strict=False))
            found |= {"horizon": self.curriculum.phase.horizon, "lr": self.curriculum.phase.lr}
            assert_finite({"weights": self.agent.parameters.data}, env_steps=self.env_steps)
        self._losses, self._num_losses = [0.0] * len(self._models), 0
        return {**found, "updates": self.updates}

    @property
    def has_figures(self) -> bool:
        """Whether enough happened for a row of metrics."""
        if self.updates:
            return self._num_losses >= UPDATES_PER_ROW or self.curriculum.finished
        return (self.pictures.count + self.test.count) % STEPS_PER_ROW == 0

    # Keeping.

    def state(self) -> State:
        """Return everything the next step depends on."""
        tensors: dict[str, Tensor] = {}
        for i, (*_, optimizer) in enumerate(self._models):
            tensors |= {f"exp_avg{i}": optimizer.exp_avg, f"exp_avg_sq{i}": optimizer.exp_avg_sq}
        data = {
            "env_steps": self.env_steps,
            "updates": self.updates,
            "curriculum": self.curriculum.state().data,
            "generator": self._generator.bit_generator.state,
            "losses": self._losses,
            "num_losses": self._num_losses,
            "evaluated": self.evaluated,
            "pictures": [self.pictures.count, self.test.count],
            "is_first": self._is_first.tolist(),
        }
        stores = {"train": self.pictures.state(), "test": self.test.state()}
        pictures = {f"{kind}.{key}": x for kind, store in stores.items() for key, x in store.tensors.items()}
        collects = self.collecting and self.config.agent is not None
        return join(
            {
                "agent": self.agent.state(),
                "learner": State(tensors, data),
                "replay": State(pictures, {"num_envs": self.envs.num_envs}),
                "env": self.envs.get_state() if self.collecting else None,
                "collector": self.agent.collector().state() if collects else None,
            }
        )

    def resume(self, run: Run) -> None:
        """Continue from the checkpoint of ``run``; one that has lost its pictures to a newer one collects them again.

        Raises:
            CheckpointError: it does not fit; the message names it.
        """
        assert run.resumed is not None
        names = ("agent", "learner", "replay", "env", "collector")
        agent, learner, pictures, envs, collector = (part(run.resumed.state, name) for name in names)
        is_lean = "replay" in run.resumed.dropped
        if agent is None or learner is None or (pictures is None and not is_lean):
            raise CheckpointError(
                f"{run.resumed.path}: holds no agent, learner and pictures of video prediction"
            )
        try:
            if pictures is None:
                self._collect_again(run, learner)
            else:
                for kind, store in (("train.", self.pictures), ("test.", self.test)):
                    mine = {
                        k.removeprefix(kind): x for k, x in pictures.tensors.items() if k.startswith(kind)
                    }
                    store.load_state(State(mine, {}))
            # What was collected again moved the mean, the generators and the environments.
            self.agent.load_state(agent)
            self._load_state(learner, run.resumed.step)
            if collector is not None:
                self.agent.collector().load_state(collector)
            run.restore_rng()
            if not self.collecting:
                return
            if envs is None or pictures is None or not self.envs.restorable:
                self.start_episodes(run)
            else:
                self.envs.set_state(envs)
        except MISFITS as error:
            raise CheckpointError(f"{run.resumed.path}: does not fit: {reason(error)}") from error

    def _collect_again(self, run: Run, learner: State) -> None:
        assert run.resumed is not None
        log.warning(
            "%s: holds no pictures, which only a run's newest checkpoint keeps. They are collected again, so this run will "
            "not equal an uninterrupted one",
            run.resumed.path,
        )
        counts = learner.data["pictures"]
        self.start_episodes(run)
        while [self.pictures.count, self.test.count] < counts:
            self.play(run)

    def _load_state(self, state: State, env_steps: int) -> None:
        data = state.data
        for i, (*_, optimizer) in enumerate(self._models):
            for name in ("exp_avg", "exp_avg_sq"):
                mine, saved = getattr(optimizer, name), state.tensors[f"{name}{i}"]
                if saved.shape != mine.shape:
                    raise ValueError(
                        f"{name}{i} is {tuple(saved.shape)}, but {tuple(mine.shape)} was expected"
                    )
                mine.copy_(saved)
            optimizer.updates = int(data["updates"])
        self.curriculum.load_state(State({}, data["curriculum"]))
        self._generator.bit_generator.state = data["generator"]
        self._losses, self._num_losses = [float(x) for x in data["losses"]], int(data["num_losses"])
        self.evaluated = bool(data["evaluated"])
        self._is_first = np.array(data["is_first"], bool)
        if self._is_first.shape != (self.envs.num_envs,) or len(self._losses) != len(self._models):
            raise ValueError("is_first or losses of the learner have another length than expected")
        if env_steps != data["env_steps"] or self.env_steps != env_steps:
            raise ValueError(
                f"learner.env_steps is {data['env_steps']!r} and its parts make {self.env_steps}, but {env_steps} was "
                "expected"
            )


def train(
    config: Config, env: EnvLike, *, run: Run | None = None, device: str | torch.device = "cpu"
) -> Agent:
    """Collect pictures, learn to foresee them, and write down how well that goes.

    Args:
        config: settings; ``PRESETS`` has some that work.
        env: a gymnasium id, a function that makes an environment, or a vector environment, which is closed at the end.
        run: where metrics, checkpoints and pictures go, and what is resumed; nothing is written without one.
        device: where the networks are.

    Returns:
        The agent, whose ``model`` has learnt.

    Raises:
        NumericalError: a weight or a loss became NaN or infinite.
        UserError: there is no single picture of a size that is known, pictures do not fit into memory, or episodes are too
            short.
    """
    run = NullRun() if run is None else run
    envs = _make_envs(config, env)
    with contextlib.closing(envs):
        agent = Agent(config, envs.observation_space, envs.action_space, device)
        if config.agent is not None:
            agent.collector()
        learner = Learner(agent, envs)
        run.announce(envs)
        if run.resumed is None:
            learner.start_episodes(run)
        else:
            learner.resume(run)
        while not learner.curriculum.finished:
            if learner.collecting:
                learner.play(run)
            else:
                learner.learn(run)
            if learner.has_figures and run.log_due(learner.env_steps):
                run.log(learner.metrics(), env_steps=learner.env_steps)
            if run.eval_due(learner.env_steps) and not learner.collecting and not learner.curriculum.finished:
                run.log(learner.evaluate(run), env_steps=learner.env_steps)
            if run.checkpoint_due(learner.env_steps):
                run.save(learner.env_steps, learner.state())
                if learner.collecting:
                    learner.forget()
                    if not envs.restorable:
                        learner.start_episodes(run)
            if run.stopping:
                break
        if learner.curriculum.finished and not learner.evaluated:
            run.log(learner.evaluate(run), env_steps=learner.env_steps)
            learner.evaluated = True
        run.finish(learner.env_steps, learner.state())
    return agent


def _make_envs(config: Config, env: EnvLike) -> Envs:
    given = isinstance(env, VectorEnv | Envs)
    if config.image_size is not None and not (
        isinstance(env, str) and env.rpartition(":")[2].startswith("ALE/")
    ):
        raise UserError(
            f"video_prediction: image_size is {config.image_size}, but None was expected: only Atari's games have one"
        )
    return make(
        env,
        None if given else config.num_envs,
        seed=config.seed,
        training=False,
        max_episode_steps=None if given else config.max_episode_steps,
        env_kwargs=config.env_kwargs,
    )


def _beginnings(steps: tuple[int, ...]) -> list[list[int]]:
    """Return the steps, then the steps without the largest, and so on."""
    ordered = sorted(steps)
    return [ordered[:n] for n in range(len(ordered), 0, -1)]


def _seeds(seed: int) -> list[int]:
    """Derive independent seeds: for weights, actions and windows."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(3)]
