"""SimPLe (Kaiser et al. 2020, "Model-based reinforcement learning for Atari"): PPO inside a learned video model.

One file, in the paper's order: ``Config`` and ``PRESETS``; the ``Agent``, a policy that sees a stack of frames and the
world model beside it; the ``Learner`` with the three parts of an iteration, *collect* real steps, train the *model* on all
of them, train the *policy* in the model; and ``train``, which repeats them. Model, policy and their optimisers stay warm.

Deviations:

* the policy is that of :mod:`pywm.algos.ppo` with its Nature network, trained by it as it is (paper: two convolutions of
  5 x 5, an embedding of the iteration's number, dropout);
* starts are drawn over all frames of the newest collection alike (released code: a rollout first, then a frame of it);
* the policy learns nothing from the real steps themselves (released code: one pass of PPO over them);
* a head for the end of episodes can be switched on; then rollouts end there, too.

Where the paper and its released code differ, or where the paper leaves two readings, there is a setting, and its default is
the paper's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from torch import Tensor

from pywm.algos import ppo
from pywm.config import Preset, check_fields
from pywm.data.frame_replay import FrameReplay
from pywm.data.memory import free_memory
from pywm.envs import EnvLike, Envs, is_image, make
from pywm.errors import CheckpointError, UserError
from pywm.models.actions import ActionSpace
from pywm.models.simulated_vec_env import SimulatedVecEnv
from pywm.models.video.discrete import VIDEO_SIZES, VideoConfig, VideoModel, VideoState, VideoWindow
from pywm.models.world_model import Predicted
from pywm.ops import _operands
from pywm.optim import Adam, FlatParameters
from pywm.training import checkpoint
from pywm.training.checkpoint import MISFITS, join, part, reason
from pywm.training.dream import Dream, dream, write_dream
from pywm.training.evaluate import EVAL_SEED
from pywm.training.run import NullRun, Run, assert_finite
from pywm.types import Obs, State

__all__ = ["PRESETS", "Agent", "Config", "evaluate_temperatures", "model_figures", "train"]

log = logging.getLogger(__name__)

# Updates of the model, and iterations of PPO, behind a row of metrics.
UPDATES_PER_ROW = 100
POLICY_UPDATES_PER_ROW = 10
# Within an iteration, which may take hours, a checkpoint is written this often.
SECONDS_BETWEEN_CHECKPOINTS = 600.0
TEMPERATURES = (0.0, 0.5, 1.0)
# The released code's iterations with three times the model's updates, and with twice the policy's.
LONG_MODEL, LONG_POLICY = (0, 1, 4, 9, 14), (1, 7, 11)


@dataclass(frozen=True)
class Config:
    """Settings of SimPLe. The defaults are the paper's for Atari at 100,000 steps unless a line says otherwise."""

    seed: int = 0
    """Seed of everything random: weights, actions, windows, noise of the model, environments, simulations."""
    steps: int = 96_000
    """Real environment steps to learn from (decisions of the agent); at 6,400 an iteration these are 15 iterations."""
    num_envs: int = 1
    """Parallel real environments N (an environment that is already a vector has its own number)."""
    steps_per_iteration: int = 6400
    """Real steps of an iteration; the first ones are those of a policy that has learnt nothing."""
    size: Literal["paper", "small", "tiny"] = "paper"
    """Size of the world model."""
    model: Literal["sd", "deterministic"] = "sd"
    """Stochastic with a discrete latent, or deterministic."""
    reading: Literal["stacked", "recurrent"] = "stacked"
    """What the model sees: the last frames side by side (paper's figure), or one frame and a memory (released code)."""
    frames: int = 4
    """Frames of context k, for the model and for the policy."""
    horizon: int = 6
    """Frames that the model predicts one after the other in training (released code's long setting: 16)."""
    pixels: Literal["softmax", "l2"] = "softmax"
    """Loss of a sub-pixel: 256 classes, or squares."""
    cutoff: float | None = None
    """Loss that does not count; None is 0.03 for softmax and 10 shades for l2 (released code: 2.4)."""
    done: bool = False
    """Predict the end of episodes, too, and end rollouts there (paper: no)."""
    input_noise: float = 0.0
    """Share of the input's pixels that are replaced by the median in training (deterministic model: 0.05)."""
    schedule: Literal["paper", "t2t"] = "paper"
    """More model updates in iteration 0 only, or in 0, 1, 4, 9 and 14, and more of PPO in 1, 7, 11 and the last."""
    first_model_updates: int = 45_000
    """Updates of the model in the first iteration, ..."""
    model_updates: int = 15_000
    """... and in each of the others."""
    model_batch_size: int = 4
    """Windows of a model update."""
    model_optimizer: Literal["adafactor", "adam"] = "adafactor"
    """Of the model."""
    model_lr: float = 2e-3
    """Its learning rate, ..."""
    model_lr_warmup: int = 2000
    """... and the updates over which that rises from 0."""
    model_max_grad_norm: float = 1.0
    """Largest norm of the model's gradient."""
    model_warmup: int = 40_000
    """Updates over which the model's bits become discrete and its own frames take the place of true ones."""
    checkpoint_activations: bool = False
    """Keep only frames between the steps of a window and compute the rest again on the way back: less memory, a third more
    time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the model's products and convolutions multiply; devices without bfloat16 instructions stay at float32."""
    policy_updates: int = 1000
    """Iterations of PPO in the model, in each iteration."""
    agents: int = 16
    """Parallel rollouts in the model."""
    rollout_length: int = 50
    """Steps of a rollout in the model, after which it is cut and bootstrapped."""
    batch_size: int = 320
    """Rows of a minibatch of PPO: 20 steps of 16 agents."""
    epochs: int = 3
    """Passes over each rollout."""
    discount: float = 0.95
    """Discount γ of an environment step (paper, section 5; section 6.4 and the released code have 0.99)."""
    lam: float = 0.95
    """λ of the generalised advantage estimate."""
    lr: float = 1e-4
    """PPO's learning rate."""
    clip: float = 0.1
    """ε of PPO's clipped objective."""
    value_coef: float = 1.0
    """Weight of the value loss."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Largest norm of the policy's gradient."""
    eval_temperature: float = 0.5
    """A greedy agent samples from its logits over this; 0 takes the most likely action, which is often worse."""
    image_size: tuple[int, int] | None = None
    """Height and width of Atari's pictures, which then come one at a time; None leaves pictures as they are."""
    grey: bool = False
    """Atari's pictures without colours."""
    max_episode_steps: int | None = None
    """Time limit of an episode in place of the environment's own."""

    @property
    def env_kwargs(self) -> dict[str, Any] | None:
        """What environments are made with."""
        if self.image_size is None:
            return None
        height, width = self.image_size
        return {
            "img_height": height, "img_width": width, "stack_num": 1, "grayscale": self.grey,
            "maxpool": False, "noop_max": 8,
        }  # fmt: skip

    @property
    def iterations(self) -> int:
        """How often it collects, trains the model and trains the policy."""
        return math.ceil(self.steps / self.steps_per_iteration)

    def model_updates_after(self, iteration: int) -> int:
        """Return the model's updates up to the end of an iteration, which count from 0."""
        long = LONG_MODEL if self.schedule == "t2t" else (0,)
        return sum(
            self.first_model_updates if i in long else self.model_updates for i in range(iteration + 1)
        )

    def policy_updates_of(self, iteration: int) -> int:
        """Return the iterations of PPO in an iteration."""
        if self.schedule == "paper":
            return self.policy_updates
        last = iteration == self.iterations - 1
        return self.policy_updates * (3 if last else 2 if iteration in LONG_POLICY else 1)

    def __post_init__(self) -> None:
        check_fields(self, "simple.Config")
        for name in (
            "steps", "num_envs", "steps_per_iteration", "frames", "horizon", "first_model_updates",
            "model_updates", "model_batch_size", "policy_updates", "agents", "rollout_length", "batch_size", "epochs",
        ):  # fmt: skip
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("discount", "lam"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        for name in ("model_lr", "lr", "clip", "model_max_grad_norm", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("value_coef", "entropy_coef", "eval_temperature", "model_lr_warmup", "model_warmup"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number from 0 on")
        self._require("cutoff", self.cutoff is None or self.cutoff >= 0, "a number from 0 on or None")
        self._require("input_noise", 0 <= self.input_noise < 1, "a share below 1")
        self._require("seed", 0 <= self.seed < 2**31, "a number in [0, 2147483647]")
        size = self.image_size
        self._require("image_size", size is None or min(size) >= 16, "sides of at least 16 or None")
        limit = self.max_episode_steps
        self._require("max_episode_steps", limit is None or limit >= 1, "at least 1 or None")

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"simple.Config: {name} is {getattr(self, name)!r}, but {expected} was expected")


PRESETS: dict[str, Preset] = {
    "simple-tiny": Preset(
        {
            "size": "tiny", "done": True, "steps": 6000, "steps_per_iteration": 1500,
            "first_model_updates": 600, "model_updates": 200, "model_batch_size": 16, "horizon": 2,
            "model_optimizer": "adam", "model_lr": 2e-3, "model_lr_warmup": 50, "model_warmup": 3000,
            "policy_updates": 60, "rollout_length": 25, "batch_size": 200, "epochs": 4, "lr": 1e-3, "clip": 0.2,
        },
        ("pywm/*",),
        "more than a random policy on pywm/Catch-v0; the goal, 0.8 after 6,000 steps, is not reached yet",
    ),
    "simple-small": Preset(
        {
            "size": "small", "steps_per_iteration": 6400, "first_model_updates": 15_000, "model_updates": 5000,
            "model_batch_size": 16, "horizon": 8, "model_optimizer": "adam", "model_lr": 3e-4,
            "model_lr_warmup": 500, "model_warmup": 10_000, "image_size": (64, 64), "grey": True,
        },
        ("ALE/*",),
        "made for a GPU; no score is known",
    ),
    "simple-paper": Preset(
        {"image_size": (105, 80)},
        (),
        "the paper's settings: weeks on one GPU; no score is known (published: docs/simple.md)",
    ),
}  # fmt: skip


def _video_config(config: Config, shape: tuple[int, ...], action: int) -> VideoConfig:
    size = dict(VIDEO_SIZES[config.size])
    if config.model == "deterministic":
        size["bits"] = 0
        if config.size == "paper":
            size |= {"hidden": 64, "doublings": 2}
    return VideoConfig(
        shape=(shape[0], shape[1], shape[2]),
        action=action,
        kind=config.model,
        reading=config.reading,
        frames=config.frames,
        pixels=config.pixels,
        cutoff=config.cutoff if config.cutoff is not None else 0.03 if config.pixels == "softmax" else 10.0,
        done=config.done,
        input_noise=config.input_noise,
        warmup=config.model_warmup,
        **size,
    )


def _ppo_config(config: Config) -> ppo.Config:
    same = ("seed", "batch_size", "epochs", "discount", "lam", "lr", "clip", "value_coef", "entropy_coef")
    return ppo.Config(
        num_envs=config.agents,
        num_steps=config.rollout_length,
        anneal_lr=False,
        normalize_advantage="rollout",
        max_grad_norm=config.max_grad_norm,
        **{name: getattr(config, name) for name in same},
    )


class Carry(NamedTuple):
    """What an agent remembers of ``N`` environments.

    Attributes:
        frames: ``[N, k·C, height, width]`` uint8, oldest first.
        action: ``[N, A]``, the last one, as the model takes it.
    """

    frames: np.ndarray
    action: Tensor


class Agent:
    """A policy that sees the last frames, and the world model that it was trained in.

    Args:
        config: settings.
        observation_space: of a single environment, as ``Envs.observation_space``: a picture.
        action_space: of a single environment, as ``Envs.action_space``.
        device: where the networks are.

    Attributes:
        model: the world model; its parameters are views of ``parameters.data``.
        policy: PPO's agent, whose observations are stacks of frames.
        actions: how actions look to the model.
        parameters: all parameters of the model as one flat buffer.
        generator: what actions are drawn with outside of training.

    Raises:
        UserError: the environment shows something else than one picture.
    """

    def __init__(
        self,
        config: Config,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: str | torch.device = "cpu",
    ) -> None:
        if not is_image(observation_space):
            raise UserError(
                f"simple.Agent: observation_space is {observation_space}, but one picture was expected: uint8, "
                "[height, width, channels] with sides of 16 or more"
            )
        self.config, self.device = config, torch.device(device)
        self.actions = ActionSpace(action_space)
        self.frame: tuple[int, ...] = tuple(observation_space.shape or ())
        model_seed, actions_seed = _seeds(config.seed)[:2]
        shape = _video_config(config, self.frame, self.actions.width)
        self.model = VideoModel(shape, torch.Generator().manual_seed(model_seed)).to(self.device)
        self.parameters = FlatParameters(self.model)
        stack = (config.frames * self.frame[0], *self.frame[1:])
        self.policy = ppo.Agent(
            _ppo_config(config), spaces.Box(0, 255, stack, np.uint8), action_space, self.device
        )
        self.model.rounds = _rounds_on(self.device, config.precision)
        self.generator = torch.Generator(self.device).manual_seed(actions_seed)

    def look(self, obs: np.ndarray, carry: Carry | None, is_first: np.ndarray) -> np.ndarray:
        """Put frames ``[N, C, height, width]`` behind those of the carry; where an episode begins, repeat them."""
        repeated = np.tile(obs, (1, self.config.frames, 1, 1))
        if carry is None:
            return repeated
        moved = np.concatenate([carry.frames[:, self.frame[0] :], obs], 1)
        return np.where(is_first[:, None, None, None], repeated, moved)

    @torch.inference_mode()
    def choose(self, stack: np.ndarray, generator: torch.Generator, temperature: float) -> np.ndarray:
        """Draw the environment's actions ``[N, ...]`` for stacks of frames from the policy's logits over a temperature."""
        policy = self.policy.policy
        outputs = policy.actor(policy.encoder({"obs": torch.from_numpy(stack).to(self.device)}))
        if temperature == 0 or policy.head.continuous:
            dist = policy.head.dist(outputs, policy.log_std)
            if temperature == 0:
                return policy.head.to_env(dist.mode())
        else:
            dist = policy.head.dist(outputs / temperature, None)
        return policy.head.to_env(dist.choose(policy.head.noise((len(stack),), generator)))

    def act(
        self,
        obs: Obs,
        state: Carry | None = None,
        *,
        is_first: np.ndarray | None = None,
        greedy: bool = False,
        temperature: float | None = None,
    ) -> tuple[np.ndarray, Carry]:
        """Choose an action for each environment.

        Args:
            obs: ``[N, C, height, width]`` uint8, as ``Envs`` gives them.
            state: what the last call returned; None where all episodes begin.
            is_first: ``[N]`` bool, where an episode begins; by default where there is no state.
            greedy: act as in evaluation, at ``eval_temperature`` instead of 1.
            temperature: of the policy's logits, instead of either.

        Returns:
            The actions ``[N, ...]`` and the state.

        Raises:
            ValueError: an observation has another shape.
        """
        frames = np.asarray(obs)
        if frames.ndim != 4 or frames.shape[1:] != self.frame:
            expected = ", ".join(["N", *map(str, self.frame)])
            raise ValueError(f"simple.Agent.act: obs has shape {frames.shape}, but ({expected}) was expected")
        first = np.full(len(frames), state is None) if is_first is None else np.asarray(is_first, bool)
        if first.shape != (len(frames),):
            raise ValueError(
                f"simple.Agent.act: is_first is {first.shape}, but ({len(frames)},) was expected"
            )
        if state is not None and len(state.frames) != len(frames):
            raise ValueError(
                f"simple.Agent.act: state is of {len(state.frames)} environments, but {len(frames)} were expected"
            )
        if temperature is None:
            temperature = self.config.eval_temperature if greedy else 1.0
        stack = self.look(frames, state, first)
        action = self.choose(stack, self.generator, temperature)
        return action, Carry(stack, self.actions.from_env(action, "simple.Agent.act"))

    @torch.no_grad()
    def open_loop(
        self,
        obs: Mapping[str, np.ndarray],
        prev_action: Tensor,
        is_first: np.ndarray,
        context: int,
        *,
        seed: int = 0,
    ) -> Predicted:
        """Predict every row of an episode from those before it, of which the model sees the first ``context``.

        Args:
            obs: ``"obs" -> [T, B, C, height, width]`` uint8.
            prev_action: ``[T, B, A]``, row t led to frame t.
            is_first: ``[T, B]``; only row 0 begins an episode.
            context: true rows; behind them the model sees its own.
            seed: of the latents.
        """
        truth = torch.from_numpy(np.asarray(obs["obs"])).to(self.device)
        T, B, C = truth.shape[:3]
        generator = torch.Generator().manual_seed(seed)
        groups = self.model.config.groups
        state = self.model.begin(truth[0].repeat(1, self.config.frames, 1, 1))
        frames, reward, goes_on = [truth[0]], [torch.zeros(B)], [torch.ones(B)]
        for t in range(1, T):
            uniform = torch.rand(B, groups, generator=generator).to(self.device)
            predicted, state = self.model.step(state, prev_action[t].to(self.device), uniform)
            frames.append(predicted.frame)
            reward.append(predicted.reward.cpu())
            goes_on.append(1 - predicted.end.cpu())
            if t < context:
                state = VideoState(torch.cat([state.frames[:, :-C], truth[t]], 1), state.memory)
        return Predicted(
            {"obs": torch.stack(frames).float() / 255}, torch.stack(reward), torch.stack(goes_on)
        )

    def state(self) -> State:
        """Return the weights of model and policy, and the generators."""
        policy = self.policy.state()
        tensors = {f"model.{name}": p.detach().clone() for name, p in self.parameters.views.items()}
        tensors |= {f"policy.{name}": x for name, x in policy.tensors.items()}
        tensors["generator"] = self.generator.get_state()
        return State(tensors, {})

    def load_state(self, state: State) -> None:
        """Put back what ``state`` returned.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        with torch.no_grad():
            for name, p in self.parameters.views.items():
                saved = state.tensors.get(f"model.{name}")
                if saved is None or saved.shape != p.shape:
                    got = "missing" if saved is None else f"of shape {tuple(saved.shape)}"
                    raise CheckpointError(
                        f"simple.Agent.load_state: model.{name} is {got}, but {tuple(p.shape)} was expected"
                    )
                p.copy_(saved)
        policy = {
            name.removeprefix("policy."): x for name, x in state.tensors.items() if name.startswith("policy.")
        }
        self.policy.load_state(State(policy, {}))
        try:
            self.generator.set_state(state.tensors["generator"])
        except MISFITS as error:
            raise CheckpointError(f"simple.Agent.load_state: {reason(error)}") from error

    def load_frames(self, run: Path | str, which: str = "latest") -> FrameReplay | None:
        """Return the real frames of a checkpoint, or None where it holds none."""
        loaded = checkpoint.load(Path(run) / "checkpoints", which=which, parts=("replay",))
        saved = part(loaded.state, "replay")
        if saved is None or not saved.tensors:
            return None
        rows, num_envs = saved.tensors["frame"].shape[:2]
        replay = FrameReplay(rows, num_envs, self.frame, self.actions.width, self.config.frames)
        replay.load_state(saved)
        return replay


# ---- learning ------------------------------------------------------------------------------------------------------------


class Adafactor:
    """Adafactor (Shazeer and Stern 2018) with clipping of the whole norm, over the parameters of a flat buffer.

    Args:
        parameters: what to optimise.
        lr: learning rate, relative to the size of a parameter.
        max_grad_norm: largest norm of the gradient.
        warmup: steps over which the learning rate rises from 0.

    Attributes:
        updates: steps taken.
    """

    def __init__(
        self, parameters: FlatParameters, *, lr: float, max_grad_norm: float, warmup: int = 0
    ) -> None:
        self.parameters, self.lr, self.warmup, self.max_grad_norm = parameters, lr, warmup, max_grad_norm
        self._inner = torch.optim.Adafactor(list(parameters.views.values()), lr=lr)
        self.updates = 0

    @torch.no_grad()
    def step(self) -> Tensor:
        """Clip the gradient, take a step, and return the norm before clipping, 0-d."""
        grad = self.parameters.grad
        norm = torch.linalg.vector_norm(grad)
        grad.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self._inner.param_groups[0]["lr"] = self.lr * min(1.0, (self.updates + 1) / max(self.warmup, 1))
        self._inner.step()
        self.updates += 1
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages."""
        found = self._inner.state_dict()["state"]
        return {f"{i}.{name}": x for i, kept in found.items() for name, x in kept.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``tensors`` returned."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, x in tensors.items():
            i, _, key = name.partition(".")
            state.setdefault(int(i), {})[key] = x.clone()
        self._inner.load_state_dict({**self._inner.state_dict(), "state": state})


class _AdamState(Adam):
    """Adam with its averages by name."""

    def tensors(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, mine in self.tensors().items():
            if tensors[name].shape != mine.shape:
                raise ValueError(
                    f"{name} is {tuple(tensors[name].shape)}, but {tuple(mine.shape)} was expected"
                )
            mine.copy_(tensors[name])


def _optimizer(config: Config, parameters: FlatParameters) -> Adafactor | _AdamState:
    options: dict[str, Any] = {
        "lr": config.model_lr, "max_grad_norm": config.model_max_grad_norm, "warmup": config.model_lr_warmup,
    }  # fmt: skip
    if config.model_optimizer == "adafactor":
        return Adafactor(parameters, **options)
    return _AdamState(parameters, eps=1e-8, **options)


class _Simulation(NullRun):
    """What PPO takes for its run inside the model: the seed of a new start, or where it stood."""

    def __init__(self, number: int, resumed: checkpoint.Loaded | None = None) -> None:
        super().__init__()
        self.checkpoint_number, self.resumed = number, resumed

    def restore_rng(self) -> None:
        """Leave the generators to the real run."""


class Learner:
    """A training run's state, and the three parts of an iteration: ``collect``, ``learn_model`` and ``learn_policy``.

    Args:
        agent: what learns.
        envs: the real environments.

    Attributes:
        env_steps: real steps so far, reset rows not counted.
        iteration: the present one, from 0.
        replay: everything seen so far.
        simulation: the model as an environment.
        ppo: what trains the policy in it.
    """

    def __init__(self, agent: Agent, envs: Envs) -> None:
        config = agent.config
        self.agent, self.envs, self.config = agent, envs, config
        self._data_seed, self._noise_seed = _seeds(config.seed)[2:4]
        self.optimizer = _optimizer(config, agent.parameters)
        rows = math.ceil(config.steps / envs.num_envs)
        self.replay = FrameReplay(
            rows + rows // 8 + 2 * config.iterations + 64,
            envs.num_envs,
            agent.frame,
            agent.actions.width,
            config.frames,
        )
        self.simulation = SimulatedVecEnv(
            agent.model, agent.actions.space, self.replay.starts, config.agents, length=config.rollout_length
        )
        self.ppo = ppo.Learner(agent.policy, Envs(self.simulation, name="simulation"))
        self.env_steps = self.iteration = 0
        self._policy_updates = 0  # of this iteration
        self._returns: list[float] = []  # of the newest collection
        self._saved = time.monotonic()

    @property
    def model_updates(self) -> int:
        """Updates of the model so far."""
        return self.optimizer.updates

    @property
    def score(self) -> float | None:
        """The mean return of the newest collection's episodes, or None where none ended."""
        return float(np.mean(self._returns)) if self._returns else None

    def collect(self, run: Run) -> None:
        """Play real steps with the present policy, sampling its actions, in new episodes."""
        config, envs, agent, N = self.config, self.envs, self.agent, self.envs.num_envs
        goal = min((self.iteration + 1) * config.steps_per_iteration, config.steps)
        seeds = np.random.SeedSequence([self._data_seed, self.iteration]).generate_state(2)
        generator = torch.Generator(agent.device).manual_seed(int(seeds[0]))
        envs.reset(int(seeds[1]) & 0x7FFFFFFF)
        envs.episodes()
        self.replay.begin()
        carry, is_first = None, np.ones(N, bool)
        while self.env_steps < goal:
            obs = np.asarray(envs.obs)
            with run.phase("act"):
                stack = agent.look(obs, carry, is_first)
                action = agent.choose(stack, generator, 1.0)
                carry = Carry(stack, agent.actions.from_env(action, "simple.Learner.collect"))
            with run.phase("env"):
                out = envs.step(action)
            final = np.asarray(out.final_obs)
            self.replay.add(
                obs, carry.action.numpy(), out.reward, out.terminated, out.truncated, final, out.valid
            )
            self.env_steps += int(np.count_nonzero(out.valid))
            is_first = out.terminated | out.truncated | ~out.valid
        self.replay.end(np.asarray(envs.obs))
        self._returns = [episode.return_ for episode in envs.episodes()]
        metrics: dict[str, Any] = {"iteration": self.iteration, "replay/rows": self.replay.num_rows}
        if self._returns:
            metrics["return/mean"] = self.score
        run.log_due(self.env_steps)
        run.log(metrics, env_steps=self.env_steps)

    def learn_model(self, run: Run) -> None:
        """Train the model on everything seen so far, or until the run is to stop."""
        goal = self.config.model_updates_after(self.iteration)
        sums: dict[str, Tensor] = {}
        count = 0
        while self.model_updates < goal and not run.stopping:
            with run.phase("model"):
                stats = self.update_model()
            sums = {name: sums[name] + x if sums else x for name, x in stats.items()}
            count += 1
            if count == UPDATES_PER_ROW or self.model_updates == goal:
                means = dict(zip(sums, (torch.stack(list(sums.values())) / count).tolist(), strict=True))
                assert_finite({"weights": self.agent.parameters.data}, env_steps=self.env_steps)
                if run.log_due(self.env_steps):
                    run.log({**means, "model/updates": self.model_updates}, env_steps=self.env_steps)
                sums, count = {}, 0
            self._save_now_and_then(run)

    def update_model(self) -> dict[str, Tensor]:
        """Take one step on windows of real frames; return its figures."""
        config, updates = self.config, self.model_updates
        words = np.random.SeedSequence([self._noise_seed, updates]).generate_state(2)
        rng = np.random.default_rng(int(words[0]))
        window = _window(self.replay.sample(config.model_batch_size, config.horizon, rng), self.agent.device)
        loss = self.agent.model.loss(
            window,
            updates=updates,
            seed=int(words[1]),
            checkpoint_activations=config.checkpoint_activations,
        )
        self.agent.parameters.backward(loss.total)
        norm = self.optimizer.step()
        return {**loss.stats, "model/grad_norm": norm}

    def learn_policy(self, run: Run) -> None:
        """Train the policy in the model, or until the run is to stop."""
        goal = self.config.policy_updates_of(self.iteration)
        if self._policy_updates == 0:
            self.ppo.start_episodes(_Simulation(self.iteration))
        while self._policy_updates < goal and not run.stopping:
            metrics = self.ppo.update(self.ppo.collect(run), run)
            self._policy_updates += 1
            if self._policy_updates % POLICY_UPDATES_PER_ROW == 0 and run.log_due(self.env_steps):
                renamed = {
                    "simulated/return": metrics.pop("return/mean", None),
                    "simulated/length": metrics.pop("return/length", None),
                }
                kept = {name: x for name, x in renamed.items() if x is not None}
                run.log({**metrics, **kept, "simulated/steps": self.ppo.env_steps}, env_steps=self.env_steps)
            self._save_now_and_then(run)
        if self._policy_updates >= goal:
            self.iteration, self._policy_updates = self.iteration + 1, 0

    def _save_now_and_then(self, run: Run) -> None:
        if time.monotonic() - self._saved > SECONDS_BETWEEN_CHECKPOINTS:
            self.save(run)

    def save(self, run: Run) -> None:
        """Write a checkpoint, in place of one with as many real steps."""
        run.save(self.env_steps, self.state(), score=self.score, replace=True)
        self._saved = time.monotonic()

    def state(self) -> State:
        """Return everything that the rest of the training depends on."""
        inner = self.ppo.state()
        tensors = {f"optimizer.{name}": x for name, x in self.optimizer.tensors().items()}
        data = {
            "env_steps": self.env_steps,
            "iteration": self.iteration,
            "model_updates": self.model_updates,
            "policy_updates": self._policy_updates,
            "simulated_steps": self.ppo.env_steps,
            "returns": self._returns,
        }
        return join(
            {
                "agent": self.agent.state(),
                "learner": State(tensors, data),
                "ppo": part(inner, "learner"),
                "simulation": part(inner, "env"),
                "replay": self.replay.state(),
            }
        )

    def resume(self, run: Run) -> None:
        """Continue from the checkpoint of ``run``.

        Raises:
            CheckpointError: it does not fit, or has lost its frames to a newer one; the message names it.
        """
        assert run.resumed is not None
        path = run.resumed.path
        agent, learner, inner, simulation, replay = (
            part(run.resumed.state, name) for name in ("agent", "learner", "ppo", "simulation", "replay")
        )
        if replay is None and "replay" in run.resumed.dropped:
            raise CheckpointError(
                f"{path}: holds no frames, which only a run's newest checkpoint keeps, and without them there is "
                "nothing to train the model on. Start anew with --fresh"
            )
        if agent is None or learner is None or inner is None or replay is None:
            raise CheckpointError(f"{path}: holds no agent, learner and frames of SimPLe")
        try:
            self.agent.load_state(agent)
            self._load_state(learner, run.resumed.step)
            self.replay.load_state(replay)
            # Simulations are in the middle of something only where the policy is.
            parts = {"agent": self.agent.policy.state(), "learner": inner, "env": simulation}
            saved = run.resumed._replace(step=learner.data["simulated_steps"], state=join(parts))
            self.ppo.resume(_Simulation(self.iteration, saved))
            run.restore_rng()
        except MISFITS as error:
            raise CheckpointError(f"{path}: does not fit: {reason(error)}") from error

    def _load_state(self, state: State, env_steps: int) -> None:
        data = state.data
        for name in ("iteration", "model_updates", "policy_updates", "simulated_steps"):
            if type(data[name]) is not int or data[name] < 0:
                raise ValueError(f"learner.{name} is {data[name]!r}, but a count was expected")
        if data["env_steps"] != env_steps:
            raise ValueError(f"learner.env_steps is {data['env_steps']!r}, but {env_steps} was expected")
        self.env_steps, self.iteration = env_steps, data["iteration"]
        self._policy_updates = data["policy_updates"]
        self._returns = [float(x) for x in data["returns"]]
        prefix = "optimizer."
        self.optimizer.load_tensors(
            {name.removeprefix(prefix): x for name, x in state.tensors.items() if name.startswith(prefix)}
        )
        self.optimizer.updates = data["model_updates"]

    @property
    def has_collected(self) -> bool:
        """Whether the real steps of this iteration are there."""
        return self.env_steps >= min(
            (self.iteration + 1) * self.config.steps_per_iteration, self.config.steps
        )


def train(
    config: Config, env: EnvLike, *, run: Run | None = None, device: str | torch.device = "cpu"
) -> Agent:
    """Train an agent.

    Args:
        config: settings; ``PRESETS`` has some that work.
        env: a gymnasium id, a function that makes an environment, or a vector environment, which is closed at the end.
        run: where metrics and checkpoints go, and what is resumed; nothing is written without one.
        device: where the networks are.

    Returns:
        The trained agent.

    Raises:
        NumericalError: a reward, value, loss or weight became NaN or infinite.
        UserError: the environment shows no picture, or there is not enough memory.
    """
    run = NullRun() if run is None else run
    envs = _make_envs(config, env)
    with contextlib.closing(envs):
        agent = Agent(config, envs.observation_space, envs.action_space, device)
        learner = Learner(agent, envs)
        log.info("%s", announce(learner))
        if run.resumed is not None:
            learner.resume(run)
        while learner.iteration < config.iterations:
            if not learner.has_collected:
                learner.collect(run)
                learner.save(run)
            learner.learn_model(run)
            learner.learn_policy(run)
            if run.stopping:
                break
            if run.eval_due(learner.env_steps):
                _evaluate(run, agent, env, learner.env_steps)
            learner.save(run)
        run.finish(learner.env_steps, learner.state(), score=learner.score, replace=True)
    return agent


def announce(learner: Learner) -> str:
    """Say how large the model is, what memory its training takes, and for how long it will go on, from a trial.

    Raises:
        UserError: there is not as much memory; the message names the settings that save some.
    """
    agent, config = learner.agent, learner.config
    c = agent.model.config
    window = _blank_window(c, 1, 1, agent.device)
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if not x.is_leaf or not x.requires_grad:
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = agent.model.loss(window, updates=0, seed=0).total
    logits = 4 * math.prod(c.shape) * (256 if c.pixels == "softmax" else 1)
    # What the way back needs of a step of one window, and the gradient of its logits.
    step = sum(sizes.values()) + logits
    agent.parameters.backward(loss)
    agent.parameters.grad.zero_()
    kept = 1 if config.checkpoint_activations else config.horizon
    need = config.model_batch_size * step * kept + 3 * 4 * agent.parameters.data.numel()
    free = _free_memory(agent.device)
    takes = f"{need / 2**30:,.2f} GiB"
    if free is not None and need > free:
        fits = max(int(free / need * config.model_batch_size), 0)
        raise UserError(
            f"simple: model_batch_size is {config.model_batch_size}, horizon is {config.horizon}, which take {takes} "
            f"in a model update ({logits * config.model_batch_size / 2**20:,.0f} MiB of them logits of a frame), but "
            f"{free / 2**30:,.2f} GiB of memory are free; expected at most {fits} windows, a shorter horizon, "
            "--checkpoint-activations or --pixels l2"
        )
    # A whole update, twice: the first one also makes what the others use.
    window = _blank_window(c, config.model_batch_size, config.horizon, agent.device)
    for _ in range(2):
        began = time.perf_counter()
        loss = agent.model.loss(
            window, updates=0, seed=0, checkpoint_activations=config.checkpoint_activations
        ).total
        agent.parameters.backward(loss)
        loss.detach().cpu()  # waits for the device
        seconds = time.perf_counter() - began
    agent.parameters.grad.zero_()
    stack = torch.zeros(config.agents, c.frames * c.shape[0], *c.shape[1:], dtype=torch.uint8)
    state = agent.model.begin(stack.to(agent.device))
    action = torch.zeros(config.agents, c.action, device=agent.device)
    uniform = torch.zeros(config.agents, c.groups, device=agent.device)
    began = time.perf_counter()
    for _ in range(3):
        predicted, _state = agent.model.step(state, action, uniform)
        predicted.reward.cpu()
    simulated = (time.perf_counter() - began) / 3
    updates = config.model_updates_after(config.iterations - 1)
    rollouts = sum(config.policy_updates_of(i) for i in range(config.iterations))
    hours = (updates * seconds + rollouts * config.rollout_length * simulated) / 3600
    return (
        f"the {c.kind} model has {agent.parameters.data.numel():,} parameters; an update takes about {takes} and "
        f"{seconds:.2g} s, {config.agents} simulated steps take {simulated:.2g} s; {updates:,} updates and "
        f"{rollouts * config.rollout_length * config.agents:,} simulated steps are about {hours:.2g} hours, "
        f"besides the real steps and PPO; frames: {learner.replay.nbytes / 2**30:.2g} GiB"
    )


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def _blank_window(c: VideoConfig, B: int, H: int, device: torch.device) -> VideoWindow:
    k = c.frames
    window = VideoWindow(
        torch.zeros(k + H, B, *c.shape, dtype=torch.uint8),
        torch.zeros(k + H - 1, B, c.action),
        torch.ones(H, B, dtype=torch.uint8),
        torch.zeros(H, B, dtype=torch.bool),
        torch.ones(H, B, dtype=torch.bool),
    )
    return VideoWindow(*(x.to(device) for x in window))


def _window(window: Any, device: torch.device) -> VideoWindow:
    """Turn real rewards into classes: clipped to [-1, 1] and rounded."""
    classes = (window.reward.clamp(-1, 1).round() + 1).to(torch.uint8)
    parts = (window.frames, window.action, classes, window.terminated, window.mask)
    return VideoWindow(*(x.to(device) for x in parts))


# ---- evaluation ----------------------------------------------------------------------------------------------------------


def evaluate_temperatures(
    agent: Agent, envs: Envs, *, episodes: int, seed: int = EVAL_SEED, max_steps: int = 100_000
) -> dict[str, float]:
    """Play whole episodes at temperatures 0, 0.5 and 1 of the policy's logits, as the paper reports them.

    Args:
        agent: what acts.
        envs: environments made with ``training=False``, so that rewards are raw.
        episodes: how many, at each temperature; environments play equal shares, rounded up.
        seed: of the environments.
        max_steps: agent decisions after which an episode counts as it stands.

    Returns:
        ``eval/return_t0``, ``eval/return_t0.5`` and ``eval/return_t1``, and ``eval/clipped_t…`` of rewards in [-1, 1].
    """
    found: dict[str, float] = {}
    share = math.ceil(episodes / envs.num_envs)
    for temperature in TEMPERATURES:
        N = envs.num_envs
        obs, state, is_first = envs.reset(seed), None, np.ones(N, bool)
        raw, clipped, left = np.zeros(N), np.zeros(N), np.full(N, share)
        for _ in range(max_steps):
            action, state = agent.act(obs, state, is_first=is_first, temperature=temperature)
            out = envs.step(action)
            counts = (left > 0) & out.valid
            raw += np.where(counts, out.reward, 0)
            clipped += np.where(counts, out.reward.clip(-1, 1), 0)
            ended = out.terminated | out.truncated
            left -= ended & (left > 0)
            obs, is_first = out.obs, ended | ~out.valid
            if (left == 0).all():
                break
        envs.episodes()
        found[f"eval/return_t{temperature:g}"] = float(raw.sum() / (share * N))
        found[f"eval/clipped_t{temperature:g}"] = float(clipped.sum() / (share * N))
    return found


def model_figures(
    agent: Agent, envs: Envs, *, context: int | None = None, steps: int = 45, seed: int = EVAL_SEED
) -> dict[str, float]:
    """Compare what the model imagines with what the environment does under the same actions.

    Args:
        agent: what acts, and whose model imagines.
        envs: environments made with ``training=False``; each plays one episode.
        context: rows that the model sees; as many as it takes by default.
        steps: rows to imagine.
        seed: of the environments and of the model's latents.

    Returns:
        ``model/frame_error_k``, the mean squared error k steps ahead (pictures in [0, 1]), ``model/exact_frames``, the
        share of imagined frames without a wrong sub-pixel, ``model/reward_recall``, the share of rewards that are not 0
        which it foresaw, and ``model/reward_accuracy`` over all steps.
    """
    context = agent.config.frames if context is None else context
    return _figures(dream(agent, envs, steps=steps, context=context, seed=seed))


def _figures(found: Dream) -> dict[str, float]:
    errors = found.errors()
    figures = {
        f"model/frame_error_{k}": float(errors[found.context + k - 1])
        for k in (1, 5, 15, 30)
        if found.context + k <= len(errors)
    }
    there = np.arange(len(found.reward))[:, None] < found.length
    there[: found.context] = False
    truth = np.rint(found.reward.clip(-1, 1))[there]
    predicted = found.predicted_reward[there]
    wrong = np.abs(found.truth["obs"] - found.prediction["obs"]).max((2, 3, 4))[there]
    figures["model/exact_frames"] = float((wrong < 0.5 / 255).mean())
    figures["model/reward_accuracy"] = float((truth == predicted).mean())
    if (truth != 0).any():
        figures["model/reward_recall"] = float((predicted == truth)[truth != 0].mean())
    return figures


def _make_envs(config: Config, env: EnvLike) -> Envs:
    given = isinstance(env, VectorEnv | Envs)
    if config.image_size is not None and not (
        isinstance(env, str) and env.rpartition(":")[2].startswith("ALE/")
    ):
        raise UserError(
            f"simple: image_size is {config.image_size}, but None was expected: only Atari's games have one"
        )
    return make(
        env,
        None if given else config.num_envs,
        seed=config.seed,
        training=False,  # rewards are kept as they are, and become classes when they are learnt
        max_episode_steps=None if given else config.max_episode_steps,
        env_kwargs=config.env_kwargs,
    )


def _evaluate(run: Run, agent: Agent, env: EnvLike, env_steps: int) -> None:
    if isinstance(env, VectorEnv | Envs):
        log.warning("a vector environment cannot be made a second time: no evaluation")
        return
    episodes, mode = run.options.eval_episodes, "rgb_array" if run.options.video else None
    with _eval_envs(agent.config, env, min(episodes, 8), mode) as envs:
        # What evaluation draws is not to change what follows.
        generator, before = agent.generator.get_state(), checkpoint.rng_state()
        run.evaluate(agent, envs, env_steps=env_steps)
        with run.phase("eval"):
            figures = evaluate_temperatures(agent, envs, episodes=episodes)
            try:
                found = dream(agent, envs, context=agent.config.frames, seed=EVAL_SEED)
                figures |= _figures(found)
                if run.options.video:
                    write_dream(found, run.dir / "dreams", f"dream_{env_steps:08d}")
            except UserError as error:  # no picture is worth a run
                log.warning("no dream at %s env steps: %s", f"{env_steps:,}", error)
        checkpoint.set_rng_state(before)
        agent.generator.set_state(generator)
        run.log(figures, env_steps=env_steps)


@contextlib.contextmanager
def _eval_envs(config: Config, env: EnvLike, count: int, render_mode: str | None) -> Iterator[Envs]:
    envs = make(
        env,
        count,
        training=False,
        render_mode=render_mode,
        max_episode_steps=config.max_episode_steps,
        env_kwargs=config.env_kwargs,
    )
    with contextlib.closing(envs):
        yield envs


def _rounds_on(device: torch.device, precision: str) -> bool:
    """Say whether to round; a device that gains nothing from it does not."""
    why_not = _operands.why_not(precision, device)
    if why_not is not None:
        log.warning(
            "precision is %s, but %s, so it would be no faster: everything stays float32", precision, why_not
        )
    return precision == "bfloat16" and why_not is None


def _seeds(seed: int) -> list[int]:
    """Derive independent seeds: for the model's weights, the agent's actions, the real steps and the model's training."""
    return [int(word) for word in np.random.SeedSequence([seed, 7]).generate_state(4)]
