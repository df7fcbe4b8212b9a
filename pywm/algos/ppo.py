"""Proximal policy optimisation (Schulman et al. 2017), with the details of the implementations that work.

One file, in the paper's order: ``Config`` and ``PRESETS``, the ``Agent`` (two networks and a distribution), ``train`` with
its loop: collect a rollout, estimate advantages (GAE), several epochs of the clipped objective.

Deviations from the paper are those of "The 37 implementation details of PPO" (Huang et al. 2022, "details" below), and:

* an episode that was cut by a time limit is bootstrapped from its last observation (details: counted as terminal;
  ``bootstrap_truncated=False`` gives that back);
* value clipping is off (details: on, where Andrychowicz et al. 2021 found that it hurts);
* the critic looks at a rollout once, after it, in one batch; nothing changes in between, so neither do the values;
* networks of a few thousand weights train on one thread whatever torch is set to, because that is faster; the setting is
  put back afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from pywm.config import Preset, check_fields
from pywm.data import ObsNormalizer, RewardNormalizer, Rollout
from pywm.data.rollout import Slot
from pywm.distributions import Categorical, DiagGaussian, MultiCategorical
from pywm.envs import EnvLike, Envs, make, split_keys
from pywm.errors import CheckpointError, UserError
from pywm.nn import MLP, Encoder
from pywm.ops import gae, ppo_loss
from pywm.optim import Adam, FlatParameters
from pywm.training.checkpoint import MISFITS, join, part, reason
from pywm.training.run import NullRun, Run, assert_finite
from pywm.types import Obs, State

__all__ = ["PRESETS", "Agent", "Config", "train"]

log = logging.getLogger(__name__)

# Episodes behind "return/mean".
RECENT_EPISODES = 20
# Networks up to this size train on one thread: a second one costs more in waiting than it computes.
MAX_SINGLE_THREAD_PARAMETERS = 50_000


@dataclass(frozen=True)
class Config:
    """Settings of PPO. The defaults are CleanRL's for classic control unless a line says otherwise."""

    seed: int = 0
    """Seed of everything random: weights, actions, minibatches, environments."""
    steps: int = 500_000
    """Environment steps to train for, over all environments together."""
    num_envs: int = 4
    """Parallel environments N (an environment that is already a vector has its own number)."""
    num_steps: int = 128
    """Steps T of a rollout; an iteration learns from T·N of them."""
    batch_size: int = 128
    """Rows of a minibatch; each epoch goes through the shuffled rollout once."""
    epochs: int = 4
    """Passes over each rollout."""
    discount: float = 0.99
    """Discount γ of an environment step."""
    lam: float = 0.95
    """λ of the generalised advantage estimate (Schulman et al. 2016): 0 trusts the critic, 1 the returns."""
    lr: float = 2.5e-4
    """Adam's learning rate; its epsilon is 1e-5 (detail 3)."""
    anneal_lr: bool = True
    """Lower the learning rate linearly to 0 over the run (detail 4)."""
    clip: float = 0.2
    """ε of the clipped objective: how far the policy may move from the one that collected the data."""
    anneal_clip: bool = False
    """Lower ε linearly to 0 over the run (rl-zoo's CartPole and Atari settings)."""
    value_clip: float | None = None
    """Clip the value's change too, within ± this (detail 9, where it is ε). Off: it helps little or hurts."""
    normalize_advantage: Literal["minibatch", "rollout", "none"] = "minibatch"
    """Over what advantages are brought to mean 0 and standard deviation 1 (detail 7)."""
    value_coef: float = 0.5
    """Weight of the value loss, which is half the mean squared error. Stable-baselines3 has no half: double its vf_coef."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    max_grad_norm: float | None = 0.5
    """Clip the norm of the whole gradient to this (detail 11)."""
    target_kl: float | None = None
    """Skip an iteration's remaining epochs once an epoch's mean KL to the old policy passes 1.5 times this."""
    bootstrap_truncated: bool = True
    """Continue the return of an episode cut by a time limit with its last observation's value (Pardo et al. 2018)."""
    normalize_obs: bool = False
    """Normalise vector observations by their running mean and variance, clipped to ±10 (details 28, 29)."""
    normalize_reward: bool = False
    """Divide rewards by the deviation of the running discounted return, clipped to ±10 (details 30, 31)."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic, which share none (detail 13). Pictures alone go through a shared
    Nature-CNN with linear heads instead (detail 21)."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Nonlinearity of the hidden layers."""
    log_std_init: float = 0.0
    """Start of the logarithm of a continuous policy's deviation, a parameter of its own (detail 24)."""
    max_episode_steps: int | None = None
    """Time limit of an episode in place of the environment's own."""

    def __post_init__(self) -> None:
        check_fields(self, "ppo.Config")
        for name in ("steps", "num_envs", "num_steps", "batch_size", "epochs"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("discount", "lam"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        for name in ("lr", "clip"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("value_clip", "max_grad_norm", "target_kl"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "a positive number or None")
        for name in ("value_coef", "entropy_coef"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number from 0 on")
        self._require("seed", 0 <= self.seed < 2**31, "a number in [0, 2147483647]")
        self._require("hidden", all(width >= 1 for width in self.hidden), "positive widths")
        limit = self.max_episode_steps
        self._require("max_episode_steps", limit is None or limit >= 1, "at least 1 or None")

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"ppo.Config: {name} is {getattr(self, name)!r}, but {expected} was expected")


MUJOCO = (
    "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5", "HumanoidStandup-v5", "Swimmer-v5",
    "Reacher-v5", "Pusher-v5", "InvertedPendulum-v5", "InvertedDoublePendulum-v5",
)  # fmt: skip


def _preset(expected: str, *envs: str, **config: Any) -> Preset:
    return Preset(config, envs, expected)


PRESETS: dict[str, Preset] = {
    # rl-baselines3-zoo
    "cartpole": _preset(
        "500 (the maximum) after 100k steps", "CartPole-v1",
        steps=100_000, num_envs=8, num_steps=32, batch_size=256, epochs=20, discount=0.98, lam=0.8, lr=1e-3,
        anneal_clip=True, value_coef=1.0, entropy_coef=0.0,
    ),
    # rl-baselines3-zoo
    "acrobot": _preset(
        "-80 or better after 1M steps", "Acrobot-v1",
        steps=1_000_000, num_envs=16, num_steps=256, batch_size=64, epochs=4, lam=0.94, lr=3e-4, anneal_lr=False,
        value_coef=1.0, entropy_coef=0.0, normalize_obs=True, normalize_reward=True,
    ),
    # rl-baselines3-zoo; in place of its state-dependent exploration a larger deviation, normalisation and annealing
    "pendulum": _preset(
        "-170 (-166 to -178 over 5 seeds) after 150k steps", "Pendulum-v1",
        steps=150_000, num_envs=4, num_steps=1024, batch_size=64, epochs=10, discount=0.9, lr=1e-3,
        value_coef=1.0, entropy_coef=0.0, normalize_obs=True, normalize_reward=True, log_std_init=0.5,
    ),
    # Shorter rollouts and more epochs than rl-baselines3-zoo's, and rewards normalised: errors of the value in the hundreds
    # would otherwise take the whole of the clipped gradient, and some seeds hover until the time limit for ever.
    "lunarlander": _preset(
        "250 or better (200 counts as solved) after 1M steps", "LunarLander-v3",
        steps=1_000_000, num_envs=16, num_steps=256, batch_size=128, epochs=8, discount=0.999, lam=0.98, lr=5e-4,
        value_coef=1.0, entropy_coef=0.01, normalize_reward=True,
    ),
    # CleanRL
    "atari": _preset(
        "Pong 20, Breakout 400 after 10M decisions (CleanRL)", "ALE/*",
        steps=10_000_000, num_envs=8, num_steps=128, batch_size=256, epochs=4, clip=0.1,
    ),
    # CleanRL
    "mujoco": _preset(
        "HalfCheetah 1400, Hopper 2300, Walker2d 2200 after 1M steps (CleanRL, on the v4 environments)", *MUJOCO,
        steps=1_000_000, num_envs=1, num_steps=2048, batch_size=64, epochs=10, lr=3e-4, value_clip=0.2,
        entropy_coef=0.0, normalize_obs=True, normalize_reward=True,
    ),
}  # fmt: skip


class ActionHead:
    """How the actor's outputs become a distribution, and its actions what an environment takes.

    Discrete spaces give a ``Categorical``, MultiDiscrete and MultiBinary a ``MultiCategorical`` (a bit is a choice of
    two), Box a ``DiagGaussian`` whose actions are stored as drawn and clipped to the space only for the environment.

    Args:
        space: the single environment's action space.

    Attributes:
        size: number of outputs of the actor.
        num_parts: choices (or real numbers) that make up an action.
        continuous: whether the policy has a standard deviation.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.continuous = isinstance(space, spaces.Box)
        self._shape: tuple[int, ...] = space.shape or ()
        self._nvec: tuple[int, ...] | None = None
        if isinstance(space, spaces.Box):
            self.size = self.num_parts = math.prod(self._shape)
            self._low, self._high = space.low, space.high
        elif isinstance(space, spaces.Discrete):
            self.size, self.num_parts = int(space.n), 1
        elif isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
            bits = (2,) * math.prod(self._shape)
            self._nvec = bits if isinstance(space, spaces.MultiBinary) else tuple(space.nvec.ravel().tolist())
            self.size, self.num_parts = sum(self._nvec), len(self._nvec)
        else:
            raise UserError(
                f"ppo.Agent: action_space is {space}, but Discrete, MultiDiscrete, MultiBinary or Box was expected"
            )

    def dist(self, outputs: Tensor, log_std: Tensor | None) -> Categorical | MultiCategorical | DiagGaussian:
        """Make a distribution of the actor's outputs ``[..., size]``."""
        if self.continuous:
            assert log_std is not None
            return DiagGaussian(outputs, log_std)
        return Categorical(outputs) if self._nvec is None else MultiCategorical(outputs, self._nvec)

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw what ``dist(...).choose`` takes, ``[*lead, num_parts]``, or ``lead`` for a single choice."""
        draw = torch.randn if self.continuous else torch.rand
        single = not self.continuous and self._nvec is None
        shape = lead if single else (*lead, self.num_parts)
        return draw(shape, generator=generator, device=generator.device)

    def to_env(self, action: Tensor) -> np.ndarray:
        """Turn actions ``[N, ...]`` into the environment's shape and range."""
        array = action.cpu().numpy().reshape(-1, *self._shape)
        return np.clip(array, self._low, self._high) if self.continuous else array


class Policy(nn.Module):
    """Actor and critic above an encoder that has weights only where there are pictures.

    Args:
        config: settings of the networks.
        observation_space: of a single environment, as ``Envs`` gives it.
        head: the action's distribution.
        generator: source of randomness of the initial weights.
    """

    def __init__(
        self,
        config: Config,
        observation_space: spaces.Space[Any],
        head: ActionHead,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        parts = _obs_parts(observation_space)
        keys = split_keys(observation_space)
        self.encoder = Encoder(
            {key: parts[key].shape for key in keys.image},
            {key: parts[key].shape for key in keys.vector},
            generator=generator,
        )
        # Behind a CNN alone the heads are linear, as in the Nature network.
        hidden = config.hidden if keys.vector else ()
        sizes, activation = (self.encoder.size, *hidden), config.activation
        self.head = head
        self.actor = MLP((*sizes, head.size), activation=activation, out_gain=0.01, generator=generator)
        self.critic = MLP((*sizes, 1), activation=activation, out_gain=1.0, generator=generator)
        self.log_std = (
            nn.Parameter(torch.full((head.size,), config.log_std_init)) if head.continuous else None
        )

    def dist(self, features: Tensor) -> Categorical | MultiCategorical | DiagGaussian:
        """Return the action distribution of features ``[..., F]``."""
        return self.head.dist(self.actor(features), self.log_std)

    def value(self, features: Tensor) -> Tensor:
        """Return the value, ``[...]``, of features ``[..., F]``."""
        value: Tensor = self.critic(features)
        return value.squeeze(-1)


class Agent:
    """A policy that acts: networks, observation normaliser, and a random generator of its own.

    Args:
        config: settings.
        observation_space: of a single environment, as ``Envs.observation_space``.
        action_space: of a single environment, as ``Envs.action_space``.
        device: where the networks are.

    Attributes:
        policy: the networks; their parameters are views of ``parameters.data``.
        parameters: all parameters as one flat buffer.
        normalizer: running statistics of the observations, or None.
        obs_slots: shape and dtype in which an observation of each key is stored; pictures stay uint8.
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
        weights_seed, actions_seed = _seeds(config.seed)[:2]
        self._is_dict = isinstance(observation_space, spaces.Dict)
        parts = _obs_parts(observation_space)
        keys = split_keys(observation_space)
        generator = torch.Generator().manual_seed(weights_seed)
        self.policy = Policy(config, observation_space, ActionHead(action_space), generator).to(self.device)
        self.parameters = FlatParameters(self.policy)
        self.normalizer = (
            ObsNormalizer({key: parts[key].shape for key in keys.vector}) if config.normalize_obs else None
        )
        self.obs_slots = {
            key: Slot(part_.shape, torch.uint8 if key in keys.image else torch.float32)
            for key, part_ in parts.items()
        }
        self._generator = torch.Generator(self.device).manual_seed(actions_seed)

    def act(
        self, obs: Obs, state: Any = None, *, is_first: np.ndarray | None = None, greedy: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Choose an action for each environment; the normaliser's statistics stay as they are.

        Args:
            obs: ``[N, ...]``, or a dict of such arrays, as ``Envs`` gives them.
            state: what the last call returned; PPO has no memory and hands it back.
            is_first: ``[N]`` bool, where an episode begins; nothing to PPO.
            greedy: take the most probable action instead of a random one.

        Returns:
            The actions ``[N, ...]`` and the state.

        Raises:
            ValueError: an observation has another shape, or lacks the dimension of the environments.
        """
        batch = self.as_batch(obs)
        for key, slot in self.obs_slots.items():
            shape = np.shape(batch[key])
            if len(shape) != len(slot.shape) + 1 or shape[1:] != tuple(slot.shape):
                name = f"obs[{key!r}]" if self._is_dict else "obs"
                expected = ", ".join(["N", *map(str, slot.shape)])
                raise ValueError(f"ppo.Agent.act: {name} has shape {shape}, but ({expected}) was expected")
        if self.normalizer is not None:
            batch = self.normalizer(batch)
        tensors = {key: torch.from_numpy(np.asarray(x)).to(self.device) for key, x in batch.items()}
        with torch.inference_mode():
            dist = self.policy.dist(self.policy.encoder(tensors))
            if greedy:
                action = dist.mode()
            else:
                num_envs = len(next(iter(tensors.values())))
                action = dist.choose(self.policy.head.noise((num_envs,), self._generator))
        return self.policy.head.to_env(action), state

    def as_batch(self, obs: Obs) -> Mapping[str, np.ndarray]:
        """Name the arrays of an observation; a single one is called ``"obs"``."""
        if isinstance(obs, dict) is not self._is_dict:
            expected = "a dict of arrays" if self._is_dict else "one array"
            raise UserError(f"ppo.Agent: obs is a {type(obs).__name__}, but {expected} was expected")
        return obs if isinstance(obs, dict) else {"obs": obs}

    def state(self) -> State:
        """Return weights, normaliser and generator."""
        tensors = {f"policy.{name}": p.detach().clone() for name, p in self.parameters.views.items()}
        tensors["generator"] = self._generator.get_state()
        if self.normalizer is not None:
            tensors |= {
                f"normalizer.{name}": torch.from_numpy(x) for name, x in self.normalizer.state().items()
            }
        return State(tensors, {})

    def load_state(self, state: State) -> None:
        """Put back what ``state`` returned.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        expected = {f"policy.{name}": p for name, p in self.parameters.views.items()}
        with torch.no_grad():
            for name, p in expected.items():
                saved = state.tensors.get(name)
                if saved is None or saved.shape != p.shape:
                    got = "missing" if saved is None else f"of shape {tuple(saved.shape)}"
                    raise CheckpointError(
                        f"ppo.Agent.load_state: {name} is {got}, but {tuple(p.shape)} was expected"
                    )
                p.copy_(saved)
        try:
            self._generator.set_state(state.tensors["generator"])
            if self.normalizer is not None:
                self.normalizer.load_state(_arrays(state, "normalizer."))
        except MISFITS as error:
            raise CheckpointError(f"ppo.Agent.load_state: {reason(error)}") from error


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
        NumericalError: a reward, value, loss or weight became NaN or infinite; the message names the first one.
    """
    run = NullRun() if run is None else run
    given = isinstance(env, VectorEnv | Envs)
    envs = make(
        env,
        None if given else config.num_envs,
        seed=config.seed,
        max_episode_steps=None if given else config.max_episode_steps,
    )
    with contextlib.closing(envs):
        agent = Agent(config, envs.observation_space, envs.action_space, device)
        learner = Learner(agent, envs)
        with _num_threads(learner.num_threads):
            run.announce(envs)
            if run.resumed is None:
                learner.start_episodes(run)
            else:
                learner.resume(run)
            while learner.env_steps < config.steps:
                metrics = learner.update(learner.collect(run), run)
                if run.log_due(learner.env_steps):
                    run.log(metrics, env_steps=learner.env_steps)
                if run.eval_due(learner.env_steps):
                    _evaluate(run, agent, env, learner.env_steps)
                if run.checkpoint_due(learner.env_steps):
                    run.save(learner.env_steps, learner.state(), score=metrics.get("return/mean"))
                    if not envs.restorable:
                        learner.start_episodes(run)
                if run.stopping:
                    break
            run.finish(learner.env_steps, learner.state())
    return agent


class Played(NamedTuple):
    """What the networks made of a rollout.

    Attributes:
        features: ``[N, F]`` of each of the T+1 observations, then ``[R, F]`` of the last ones of cut episodes.
        outputs: the actor's, ``[N, size]`` each.
        actions: as drawn, T of them.
        cut: flat indices ``t·N + n`` of the transitions that cut an episode, or None.
    """

    features: list[Tensor]
    outputs: list[Tensor]
    actions: list[Tensor]
    cut: Tensor | None


class Batch(NamedTuple):
    """A rollout with its advantages, flattened to rows.

    Attributes:
        obs: ``key -> [T·N, ...]``.
        columns: action, old log-probability, advantage, value and returns, ``[T·N, ...]`` each.
        rows: indices of the rows to learn from, or None for all; reset rows are no transitions.
        num_rows: how many rows there are to learn from.
        metrics: figures of the rollout.
    """

    obs: dict[str, Tensor]
    columns: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    rows: Tensor | None
    num_rows: int
    metrics: dict[str, Any]


class Learner:
    """A training run's state, and the two halves of its iteration: ``collect`` and ``update``.

    Args:
        agent: what learns.
        envs: what it learns in.

    Attributes:
        env_steps: environment steps so far, reset rows not counted.
        num_threads: threads that suit the networks, or None for torch's setting.
    """

    def __init__(self, agent: Agent, envs: Envs) -> None:
        config, device = agent.config, agent.device
        self.agent, self.envs, self.config = agent, envs, config
        self.policy = agent.policy
        self.optimizer = Adam(agent.parameters, lr=config.lr, eps=1e-5, max_grad_norm=config.max_grad_norm)
        self.rollout = Rollout(config.num_steps, envs.num_envs, obs=agent.obs_slots, device=device)
        self.reward_normalizer = (
            RewardNormalizer(envs.num_envs, discount=config.discount) if config.normalize_reward else None
        )
        noise_seed, shuffle_seed = _seeds(config.seed)[2:]
        self._noise = torch.Generator(device).manual_seed(noise_seed)
        # On the host, so that a run shuffles alike on every device.
        self._shuffle = torch.Generator().manual_seed(shuffle_seed)
        self.env_steps = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_EPISODES)
        small = agent.parameters.data.numel() <= MAX_SINGLE_THREAD_PARAMETERS
        self.num_threads = 1 if small and device.type == "cpu" else None

    def start_episodes(self, run: Run) -> None:
        """Reset the environments with the seed that belongs to the run's last checkpoint."""
        words = np.random.SeedSequence([self.config.seed, run.checkpoint_number]).generate_state(1)
        obs = self.envs.reset(int(words[0]) & 0x7FFFFFFF)
        if self.reward_normalizer is not None:
            self.reward_normalizer.restart()
        self.rollout.write_obs(-1, self._normalize(obs, update=True))

    def _normalize(self, obs: Obs, *, update: bool) -> Mapping[str, np.ndarray]:
        batch = self.agent.as_batch(obs)
        normalizer = self.agent.normalizer
        if normalizer is None:
            return batch
        if update:
            normalizer.update(batch)
        return normalizer(batch)

    def collect(self, run: Run) -> Batch:
        """Act for T steps with the present policy and estimate the advantages."""
        with run.phase("act"):
            return self._estimate(self._play(run))

    @torch.inference_mode()
    def _play(self, run: Run) -> Played:
        rollout, policy, envs = self.rollout, self.policy, self.envs
        encoder, actor, head = policy.encoder, policy.actor, policy.head
        env_phase = run.phase("env")
        rollout.restart()
        bare = policy.encoder.passes  # the only key there is, when it needs no encoding
        noise = head.noise((rollout.num_steps, rollout.num_envs), self._noise).unbind()
        features, outputs, actions = [], [], []
        for t in range(rollout.num_steps):
            features.append(encoder(rollout.rows[t]) if bare is None else rollout.rows[t][bare])
            outputs.append(actor(features[t]))
            actions.append(head.dist(outputs[t], policy.log_std).choose(noise[t]))
            with env_phase:
                try:
                    out = envs.step(head.to_env(actions[t]))
                except ValueError:
                    # An action that the environments refuse is one that is not finite, as `to_env` clips.
                    self._check(obs=rollout.obs["obs"][: t + 1], policy=outputs[t])
                    raise
            rollout.write_obs(t + 1, self._normalize(out.obs, update=True))
            reward = out.reward
            if self.reward_normalizer is not None:
                reward = self.reward_normalizer(reward, out.terminated | out.truncated, out.valid)
            rollout.write_step(t, reward, out.terminated, out.truncated, out.valid)
            if self.config.bootstrap_truncated and np.count_nonzero(out.truncated):
                cut = np.flatnonzero(out.truncated & ~out.terminated)
                if len(cut):
                    rollout.write_final(t, self._normalize(out.final_obs, update=False), cut)
        features.append(encoder(rollout.rows[-1]))
        final = rollout.final_obs()
        if final is not None:
            features.append(encoder(final.obs))
        return Played(features, outputs, actions, None if final is None else final.row)

    @torch.no_grad()
    def _estimate(self, played: Played) -> Batch:
        rollout, config = self.rollout, self.config
        T, N = rollout.num_steps, rollout.num_envs
        reward, terminated = rollout.column(rollout.reward), rollout.column(rollout.terminated)
        truncated, valid = rollout.column(rollout.truncated), None
        if not rollout.valid.all():
            valid = rollout.column(rollout.valid)

        values = self.policy.value(torch.cat(played.features))  # [(T+1)·N + R], R episodes were cut
        value, next_value = values[: T * N], values[N : (T + 1) * N].clone()
        if played.cut is not None:
            next_value[played.cut] = values[(T + 1) * N :]
        if not config.bootstrap_truncated:
            terminated = terminated | truncated
        advantage, returns = gae(
            reward,
            value.view(T, N),
            next_value.view(T, N),
            terminated,
            truncated,
            discount=config.discount,
            lam=config.lam,
            valid=valid,
        )
        advantage, returns = advantage.flatten(), returns.flatten()
        action = torch.cat(played.actions)
        log_prob = self.policy.head.dist(torch.cat(played.outputs), self.policy.log_std).log_prob(action)

        rows = None if valid is None else valid.flatten().nonzero().squeeze(-1)
        num_rows = T * N if rows is None else len(rows)
        self.env_steps += num_rows
        chosen = {"reward": reward.flatten(), "value": value, "log_prob": log_prob, "returns": returns}
        if rows is not None:
            chosen = {name: x[rows] for name, x in chosen.items()}
        obs = {key: x[:-1].flatten(0, 1) for key, x in rollout.obs.items()}
        self._check(**{f"obs/{key}": x for key, x in obs.items() if rows is None}, **chosen)
        if config.normalize_advantage == "rollout" and num_rows > 1:
            kept = advantage if rows is None else advantage[rows]
            advantage = (advantage - kept.mean()) / (kept.std() + 1e-8)

        self._recent += [(episode.return_, episode.length) for episode in self.envs.episodes()]
        metrics: dict[str, Any] = {}
        if self._recent:
            metrics["return/mean"], metrics["return/length"] = np.mean(self._recent, axis=0).tolist()
        # With the values from before the update: how much of the returns' variance the critic foresaw.
        residual, target = chosen["returns"] - chosen["value"], chosen["returns"]
        metrics["value/explained_variance"] = 1 - residual.var() / target.var().clamp(min=1e-12)
        metrics["value/mean"] = chosen["value"].mean()
        return Batch(obs, (action, log_prob, advantage, value, returns), rows, num_rows, metrics)

    def update(self, batch: Batch, run: Run) -> dict[str, Any]:
        """Take several epochs of minibatch steps on the clipped objective; return the iteration's metrics."""
        config = self.config
        left = max(1 - (self.env_steps - batch.num_rows) / config.steps, 0.0)
        lr = config.lr * (left if config.anneal_lr else 1.0)
        shrink = left if config.anneal_clip else 1.0
        stats: list[Tensor] = []
        epochs = 0
        with run.phase("learn"):
            while epochs < config.epochs:
                epochs += 1
                epoch_stats = [
                    self._step(obs, columns, lr, shrink) for obs, columns in self._minibatches(batch)
                ]
                stats += epoch_stats
                if config.target_kl is not None:
                    kl = torch.stack(epoch_stats)[:, KL].mean()
                    if kl > 1.5 * config.target_kl:
                        break
            table = torch.stack(stats)
            self._check(
                **{name: table[:, i] for i, name in enumerate(STATS)}, weights=self.agent.parameters.data
            )
            means = dict(zip(STATS, table.mean(0).tolist(), strict=True))
        return {
            **batch.metrics,
            **means,
            "updates": self.optimizer.updates,
            "epochs": epochs,
            "lr": lr,
            "clip": config.clip * shrink,
        }

    def _minibatches(self, batch: Batch) -> Iterator[tuple[dict[str, Tensor], tuple[Tensor, ...]]]:
        size = self.config.batch_size
        if size >= batch.num_rows and batch.rows is None:
            yield batch.obs, batch.columns  # all of it: no order to shuffle
            return
        order = torch.randperm(batch.num_rows, generator=self._shuffle)
        device = self.agent.device
        order = order.to(device) if batch.rows is None else batch.rows[order.to(device)]
        # The columns are small and shuffled at once; observations may be pictures and are fetched as they are needed.
        columns = [column[order] for column in batch.columns]
        for start in range(0, batch.num_rows, size):
            part_ = slice(start, start + size)
            obs = {key: x[order[part_]] for key, x in batch.obs.items()}
            yield obs, tuple(column[part_] for column in columns)

    def _step(self, obs: dict[str, Tensor], columns: tuple[Tensor, ...], lr: float, shrink: float) -> Tensor:
        config, policy = self.config, self.policy
        action, old_log_prob, advantage, old_value, returns = columns
        features = policy.encoder(obs)
        loss, stats = ppo_loss(
            policy.dist(features),
            action,
            old_log_prob,
            advantage,
            policy.value(features),
            returns,
            clip=config.clip * shrink,
            value_clip=None if config.value_clip is None else config.value_clip * shrink,
            old_value=None if config.value_clip is None else old_value,
            value_coef=config.value_coef,
            entropy_coef=config.entropy_coef,
            normalize_advantage=config.normalize_advantage == "minibatch",
        )
        self.agent.parameters.backward(loss)
        return torch.stack([*stats, self.optimizer.step(lr)])

    def _check(self, **tensors: Tensor) -> None:
        assert_finite(tensors, env_steps=self.env_steps)

    def state(self) -> State:
        """Return everything the next iteration depends on."""
        tensors = {
            "noise": self._noise.get_state(),
            "shuffle": self._shuffle.get_state(),
            "exp_avg": self.optimizer.exp_avg,
            "exp_avg_sq": self.optimizer.exp_avg_sq,
        }
        if self.reward_normalizer is not None:
            state = self.reward_normalizer.state()
            tensors |= {f"reward_normalizer.{name}": torch.from_numpy(x) for name, x in state.items()}
        data = {"env_steps": self.env_steps, "updates": self.optimizer.updates, "recent": list(self._recent)}
        return join(
            {
                "agent": self.agent.state(),
                "learner": State(tensors, data),
                "env": self.envs.get_state(),
            }
        )

    def resume(self, run: Run) -> None:
        """Continue from the checkpoint of ``run``.

        Raises:
            CheckpointError: it does not fit; the message names it.
        """
        assert run.resumed is not None
        agent, learner, envs = (part(run.resumed.state, name) for name in ("agent", "learner", "env"))
        if agent is None or learner is None:
            raise CheckpointError(f"{run.resumed.path}: holds no PPO agent and learner")
        try:
            self._load_state(agent, learner, envs, run)
        except MISFITS as error:
            raise CheckpointError(f"{run.resumed.path}: does not fit: {reason(error)}") from error

    def _load_state(self, agent: State, learner: State, envs: State | None, run: Run) -> None:
        assert run.resumed is not None
        self.agent.load_state(agent)
        self._noise.set_state(learner.tensors["noise"])
        self._shuffle.set_state(learner.tensors["shuffle"])
        for name in ("exp_avg", "exp_avg_sq"):
            mine, saved = getattr(self.optimizer, name), learner.tensors[name]
            if saved.shape != mine.shape:
                raise ValueError(
                    f"{name} has shape {tuple(saved.shape)}, but {tuple(mine.shape)} was expected"
                )
            mine.copy_(saved)
        updates, env_steps = learner.data["updates"], learner.data["env_steps"]
        if type(updates) is not int or updates < 0:
            raise ValueError(f"learner.updates is {updates!r}, but a count was expected")
        if env_steps != run.resumed.step:
            raise ValueError(f"learner.env_steps is {env_steps!r}, but {run.resumed.step} was expected")
        self.optimizer.updates, self.env_steps = updates, run.resumed.step
        self._recent.extend((float(return_), int(length)) for return_, length in learner.data["recent"])
        if self.reward_normalizer is not None:
            self.reward_normalizer.load_state(_arrays(learner, "reward_normalizer."))
        run.restore_rng()
        if envs is None or not self.envs.restorable:
            self.start_episodes(run)
        else:
            self.envs.set_state(envs)
            self.rollout.write_obs(-1, self._normalize(self.envs.obs, update=False))


STATS = ("loss/policy", "loss/value", "entropy", "clip_fraction", "kl", "grad_norm")
KL = STATS.index("kl")


def _evaluate(run: Run, agent: Agent, env: EnvLike, env_steps: int) -> None:
    if isinstance(env, VectorEnv | Envs):
        log.warning("a vector environment cannot be made a second time: no evaluation")
        return
    limit = agent.config.max_episode_steps
    mode = "rgb_array" if run.options.video else None
    episodes = run.options.eval_episodes
    envs = make(env, min(episodes, 8), training=False, render_mode=mode, max_episode_steps=limit)
    with contextlib.closing(envs):
        run.evaluate(agent, envs, env_steps=env_steps)


def _obs_parts(space: spaces.Space[Any]) -> dict[str, spaces.Box]:
    named = dict(space.spaces) if isinstance(space, spaces.Dict) else {"obs": space}
    parts = {}
    for key, box in named.items():
        if not isinstance(box, spaces.Box):
            raise UserError(f"ppo.Agent: observation {key!r} is {box}, but a Box was expected")
        parts[key] = box
    return parts


def _seeds(seed: int) -> list[int]:
    """Derive independent seeds: for weights, the agent's actions, the rollouts' noise and the shuffling."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(4)]


def _arrays(state: State, prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): x.cpu().numpy()
        for name, x in state.tensors.items()
        if name.startswith(prefix)
    }


@contextlib.contextmanager
def _num_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
