"""DreamerV3 (Hafner et al. 2025, "Mastering diverse control tasks through world models").

One file, in the paper's order: ``Config`` and ``PRESETS``; the networks, a world model, an actor and a critic; the
``Agent``, which filters what it sees and acts on the state; the ``Learner`` with the three losses and one optimiser; and
``train``, which plays, fills the replay and learns from it.

The algorithm is that of the paper's own code of 2024 to 2026. Deviations:

* samples inside an update are counted from a seed, not drawn from a stream, so a resumed run repeats them exactly;
* training waits for the actor's newest weights, where the paper's code acts with those of the update before.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from pywm.config import Preset, check_fields
from pywm.data.replay import Replay, Sequences
from pywm.data.rollout import Slot
from pywm.envs import Choices, EnvLike, Envs, make, split_keys
from pywm.envs.spaces import origin
from pywm.errors import CheckpointError, UserError
from pywm.models.actions import ActionSpace
from pywm.models.rssm import SIZES
from pywm.models.world_model import Predicted, WorldModel
from pywm.nn.layer import NormMLP
from pywm.ops import Policy, _operands, lambda_return, symexp_twohot_loss, symexp_twohot_mean
from pywm.ops.reference_rssm import act as draw_action
from pywm.ops.rssm_params import RSSMState
from pywm.optim import Adam, FlatParameters, LaProp, SlowCopy
from pywm.training.checkpoint import MISFITS, join, part, reason
from pywm.training.dream import dream, write_dream
from pywm.training.evaluate import EVAL_SEED
from pywm.training.run import NullRun, Run, assert_finite
from pywm.types import Obs, State, StepOut

__all__ = ["PRESETS", "Agent", "Config", "describe", "train"]

log = logging.getLogger(__name__)

# Episodes behind "return/mean".
RECENT_EPISODES = 20
# Updates behind a row of metrics, where nobody asks for another number of rows.
UPDATES_PER_ROW = 50

WIDTHS: Mapping[str, Mapping[str, int]] = {
    "tiny": {"deter": 128, "hidden": 64, "classes": 4, "stoch": 16, "units": 64, "depth": 8},
    **{
        name: {**size, "units": size["hidden"], "depth": size["hidden"] // 16}
        for name, size in SIZES.items()
        if name.startswith("size")
    },
    "classic": {"deter": 512, "hidden": 512, "classes": 32, "units": 512, "depth": 32},
}
"""Sizes of the networks: those of the paper, one for two cores of a CPU, and size S of 2023 (``classic``)."""


@dataclass(frozen=True)
class Config:
    """Settings of DreamerV3. The defaults are the paper's, which are the same for all tasks."""

    seed: int = 0
    """Seed of everything random: weights, actions, samples of the model, windows of the replay, environments."""
    steps: int = 1_000_000
    """Environment steps to train for, over all environments together."""
    num_envs: int = 1
    """Parallel environments N (an environment that is already a vector has its own number)."""
    size: Literal[
        "tiny", "size1m", "size12m", "size25m", "size50m", "size100m", "size200m", "size400m", "classic"
    ] = "size12m"
    """Size of the networks; ``size12m`` has about 12 million parameters with pictures."""
    cell: Literal["block_gru", "layernorm_gru"] = "block_gru"
    """Recurrent cell; ``layernorm_gru``, with LayerNorms and a prior of one layer, is that of 2023."""
    train_ratio: float = 512.0
    """Rows of replay to learn from for each environment step."""
    batch_size: int = 16
    """Windows B of an update."""
    batch_length: int = 64
    """Rows T of a window."""
    replay_size: int = 1_000_000
    """Rows that the replay keeps (paper: 5,000,000). A row is a step, or the last observation of an episode."""
    learning_starts: int = 1024
    """Windows that the replay must hold before learning begins."""
    store_states: bool = True
    """Keep the model's states with the rows, for windows to begin with; else they begin with zeros (2023)."""
    optimizer: Literal["laprop", "adam"] = "laprop"
    """LaProp with adaptive clipping (``grad_clip``), or Adam with clipping of the whole norm (``max_grad_norm``, 2023)."""
    lr: float = 4e-5
    """Learning rate."""
    warmup: int = 1000
    """Updates over which the learning rate rises from 0."""
    grad_clip: float = 0.3
    """Under LaProp, largest ratio of a gradient's norm to its parameter's (adaptive gradient clipping)."""
    max_grad_norm: float = 1000.0
    """Under Adam, largest norm of all gradients together."""
    horizon: float = 333.0
    """Discount γ = 1 - 1/horizon."""
    lam: float = 0.95
    """λ of the returns, imagined and replayed."""
    imagine_horizon: int = 15
    """Steps H of imagination, from every row of the batch."""
    entropy_coef: float = 3e-4
    """Weight of the policy's entropy."""
    return_low: float = 0.05
    """The returns' scale is the distance between two of their quantiles, this one and ..."""
    return_high: float = 0.95
    """... this one."""
    return_rate: float = 0.01
    """How fast the scale follows."""
    free_nats: float = 1.0
    """KL divergence that costs nothing."""
    dynamics_scale: float = 1.0
    """Weight of the KL that trains the prior."""
    representation_scale: float = 0.1
    """Weight of the KL that trains the posterior."""
    replay_value_scale: float = 0.3
    """Weight of the critic's loss on replayed rows, whose gradient reaches the world model."""
    slow_rate: float = 0.02
    """How fast the slow critic follows the critic."""
    slow_scale: float = 1.0
    """Weight of the critic's loss towards the slow critic."""
    unimix: float = 0.01
    """Share of a uniform distribution in the latents."""
    actor_unimix: float = 0.0
    """The same in discrete policies (the code of 2023 had 0.01)."""
    bins: int = 255
    """Bins of the reward's and the critic's distributions."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What products and convolutions multiply; weights, everything else and losses are float32. Devices without bfloat16
    instructions stay at float32, and say so."""
    evaluate_by: Literal["sample", "mode"] = "sample"
    """What a greedy agent does: the paper's samples all the same."""
    image_size: int | None = None
    """Side of Atari's pictures, which then come one at a time; None leaves it at four of 84 x 84 pixels."""
    max_episode_steps: int | None = None
    """Time limit of an episode in place of the environment's own."""

    @property
    def env_kwargs(self) -> dict[str, Any] | None:
        """What environments are made with."""
        if self.image_size is None:
            return None
        # What moves is for the model to remember.
        return {"img_height": self.image_size, "img_width": self.image_size, "stack_num": 1}

    def __post_init__(self) -> None:
        check_fields(self, "dreamer_v3.Config")
        for name in ("steps", "num_envs", "batch_size", "imagine_horizon", "learning_starts", "replay_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("batch_length", self.batch_length >= 2, "at least 2")
        for name in (
            "lam",
            "unimix",
            "actor_unimix",
            "return_low",
            "return_high",
            "return_rate",
            "slow_rate",
        ):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        for name in ("train_ratio", "lr", "grad_clip", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in (
            "entropy_coef",
            "free_nats",
            "dynamics_scale",
            "representation_scale",
            "replay_value_scale",
        ):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number from 0 on")
        self._require("slow_scale", 0 <= self.slow_scale < math.inf, "a number from 0 on")
        self._require("slow_rate", self.slow_rate > 0, "a positive number")
        self._require("warmup", self.warmup >= 0, "a number from 0 on")
        self._require("horizon", 1 < self.horizon < math.inf, "a number above 1")
        self._require("return_low", self.return_low < self.return_high, "less than return_high")
        self._require("bins", self.bins >= 3 and self.bins % 2 == 1, "an odd number from 3 on")
        self._require("seed", 0 <= self.seed < 2**31, "a number in [0, 2147483647]")
        self._require("image_size", self.image_size is None or self.image_size >= 16, "at least 16 or None")
        limit = self.max_episode_steps
        self._require("max_episode_steps", limit is None or limit >= 1, "at least 1 or None")

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(
                f"dreamer_v3.Config: {name} is {getattr(self, name)!r}, but {expected} was expected"
            )


# For two cores of a CPU: a few thousand updates have to do, so the learning rate is higher and the networks are small.
TINY: dict[str, Any] = {
    "size": "tiny",
    "steps": 200_000,
    "batch_size": 16,
    "batch_length": 32,
    "train_ratio": 32.0,
    "lr": 1e-3,
    "warmup": 100,
    "bins": 127,
    "replay_size": 100_000,
    "learning_starts": 512,
}

PRESETS: dict[str, Preset] = {
    "cartpole": Preset(
        {**TINY, "steps": 40_000},
        ("CartPole-v1",),
        "459, 500, 486, 500 and 313 after 40k steps with seeds 0 to 4, 8 to 17 minutes each on one core",
    ),
    "copy": Preset(
        {
            **TINY,
            "steps": 26_000,
            "num_envs": 8,
            "train_ratio": 64.0,
            "horizon": 5.0,
            "imagine_horizon": 2,
            "entropy_coef": 0.03,
            "free_nats": 0.1,
            "representation_scale": 0.02,
        },
        ("pywm/DelayedCopy-v0",),
        "29.7 and 29.9 of 30 after 26k steps with seeds 0 and 1, in 3 minutes of one core",
    ),
    "pendulum": Preset(
        {**TINY, "steps": 12_000, "num_envs": 4, "train_ratio": 64.0},
        ("Pendulum-v1",),
        "-159 after 12k steps with seed 0, in 4 minutes of one core",
    ),
    "atari": Preset(
        {
            "size": "size1m",
            "steps": 400_000,
            "num_envs": 4,
            "train_ratio": 32.0,
            "lr": 1e-4,
            "image_size": 64,
            "replay_size": 200_000,
        },
        ("ALE/*",),
        "made for a GPU or for patience; no score is known",
    ),
    "tiny": Preset(TINY, ("*",), "a first result on two cores of a CPU; no score is known"),
    "2023": Preset(
        {
            "size": "classic",
            "cell": "layernorm_gru",
            "optimizer": "adam",
            "lr": 1e-4,
            "warmup": 0,
            "dynamics_scale": 0.5,
            "replay_value_scale": 0.0,
            "store_states": False,
            "actor_unimix": 0.01,
        },
        (),
        "the first version of DreamerV3, as far as its settings go; no score is known",
    ),
}


# ---- networks ------------------------------------------------------------------------------------------------------------


class Networks(nn.Module):
    """The world model, the actor, and last the critic, whose parameters a slow copy follows."""

    def __init__(
        self,
        config: Config,
        observation_space: spaces.Space[Any],
        actions: ActionSpace,
        seed: int,
        operands: str = "float32",
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        keys, parts = split_keys(observation_space), _obs_parts(observation_space)
        widths = dict(WIDTHS[config.size])
        try:
            self.world_model = WorldModel(
                {key: parts[key].shape for key in keys.image},
                {key: parts[key].shape for key in keys.vector},
                actions.width,
                choices={key: part.classes for key, part in parts.items() if isinstance(part, Choices)},
                bins=config.bins,
                horizon=config.horizon,
                unimix=config.unimix,
                cell=config.cell,
                operands=operands,
                generator=generator,
                **widths,
            )
        except ValueError as error:  # what the environment shows, for instance pictures of two sizes
            raise UserError(f"dreamer_v3: {error}") from error
        self.kind, self.classes, self.unimix = actions.kind, actions.classes, config.actor_unimix
        feat, units = self.world_model.rssm.config.feat, widths["units"]
        outputs = actions.width * (1 if actions.kind == "categorical" else 2)
        sizes: tuple[int, ...] = (feat, units, units, units)
        options: dict[str, Any] = {"operands": operands, "generator": generator}
        self.actor = NormMLP(sizes, outputs, out_scale=0.01, **options)
        self.critic = NormMLP(sizes, config.bins, out_scale=0.0, **options)

    def policy(self) -> Policy:
        """Return the actor as :func:`pywm.imagine` takes it."""
        return Policy(self.actor.layers(), kind=self.kind, classes=self.classes, unimix=self.unimix)

    def log_prob_and_entropy(self, outputs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a policy's ``outputs [..., O]`` say of actions ``[..., A]``, summed over an action's parts."""
        if self.kind == "normal":
            mean, raw = outputs.chunk(2, -1)
            mean, std = torch.tanh(mean), 0.9 * torch.sigmoid(raw + 2) + 0.1
            log_prob = -0.5 * ((action - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
            entropy = std.log() + 0.5 * math.log(2 * math.pi * math.e)
            return log_prob.sum(-1), entropy.sum(-1)
        log_probs = []
        for logits in outputs.split(self.classes, -1):
            group = torch.log_softmax(logits, -1)
            if self.unimix > 0:
                group = (group.exp() * (1 - self.unimix) + self.unimix / logits.shape[-1]).log()
            log_probs.append(group)
        log_p = log_probs[0] if len(log_probs) == 1 else torch.cat(log_probs, -1)
        return (log_p * action).sum(-1), -(log_p.exp() * log_p).sum(-1)


class Carry(NamedTuple):
    """What an agent remembers of ``N`` environments.

    Attributes:
        deter: ``[N, D]``.
        stoch: ``[N, S, K]`` one-hot.
        action: ``[N, A]``, the last one, as the model takes it.
    """

    deter: Tensor
    stoch: Tensor
    action: Tensor


class Agent:
    """A policy that acts: networks, and a random generator of its own.

    Args:
        config: settings.
        observation_space: of a single environment, as ``Envs.observation_space``.
        action_space: of a single environment, as ``Envs.action_space``.
        device: where the networks are.

    Attributes:
        networks: world model, actor and critic; their parameters are views of ``parameters.data``.
        slow_critic: the copy of the critic that follows it.
        parameters: all parameters of ``networks`` as one flat buffer.
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
        self.actions = ActionSpace(action_space)
        self._is_dict = isinstance(observation_space, spaces.Dict)
        operands = _operands_on(self.device, config.precision)
        networks = Networks(config, observation_space, self.actions, weights_seed, operands)
        self.networks = networks.to(self.device)
        self.parameters = FlatParameters(self.networks)
        self.slow_critic = SlowCopy(self.networks.critic, rate=config.slow_rate)
        self.obs_slots = {
            key: Slot(box.shape, torch.uint8 if key in self.networks.world_model.images else torch.float32)
            for key, box in _obs_parts(observation_space).items()
        }
        self._generator = torch.Generator(self.device).manual_seed(actions_seed)

    def initial(self, N: int) -> Carry:
        """Return the memory before an episode."""
        deter, stoch = self.networks.world_model.rssm.initial(N)
        return Carry(deter, stoch, deter.new_zeros(N, self.actions.width))

    @torch.no_grad()
    def step(
        self,
        obs: Mapping[str, Tensor],
        carry: Carry,
        is_first: Tensor,
        generator: torch.Generator,
        *,
        mode: bool = False,
    ) -> tuple[Carry, Tensor]:
        """Filter an observation and act on the state.

        Args:
            obs: ``key -> [N, ...]``.
            carry: what the last call returned.
            is_first: ``[N]`` bool, where an episode begins; the memory is dropped there.
            generator: source of randomness.
            mode: take the policy's mode instead of a sample.

        Returns:
            The memory, and the classes ``[N, S]`` of its stochastic state.
        """
        networks, N, device = self.networks, len(is_first), self.device
        model, policy = networks.world_model, networks.policy()
        c = model.rssm.config
        noise = torch.rand(N, c.stoch, generator=generator, device=device)
        embed = model.encode(obs)
        out = model.rssm.step(RSSMState(carry.deter, carry.stoch), carry.action, embed, is_first, noise=noise)
        outputs = networks.actor(torch.cat([out.deter, out.stoch.flatten(1)], -1))
        draw = torch.rand if policy.kind == "categorical" else torch.randn
        action_noise = draw(N, policy.noise, generator=generator, device=device)
        action = self._mode(outputs) if mode else draw_action(policy, outputs, action_noise)
        assert out.index is not None
        return Carry(out.deter, out.stoch, action), out.index

    def _mode(self, outputs: Tensor) -> Tensor:
        if self.actions.kind == "normal":
            return torch.tanh(outputs.chunk(2, -1)[0])
        groups = outputs.split(self.actions.classes, -1)
        return torch.cat([nn.functional.one_hot(g.argmax(-1), g.shape[-1]).to(g.dtype) for g in groups], -1)

    def act(
        self,
        obs: Obs,
        state: Carry | None = None,
        *,
        is_first: np.ndarray | None = None,
        greedy: bool = False,
    ) -> tuple[np.ndarray, Carry]:
        """Choose an action for each environment.

        Args:
            obs: ``[N, ...]``, or a dict of such arrays, as ``Envs`` gives them.
            state: what the last call returned; None where all episodes begin.
            is_first: ``[N]`` bool, where an episode begins; by default where there is no state.
            greedy: act as in evaluation, which is by sampling unless ``evaluate_by`` says otherwise.

        Returns:
            The actions ``[N, ...]`` and the state.

        Raises:
            ValueError: an observation has another shape, or lacks the dimension of the environments.
        """
        tensors = self.to_tensors(obs)
        N = len(next(iter(tensors.values())))
        fresh = state is None
        first = np.full(N, fresh) if is_first is None else np.asarray(is_first, bool)
        if first.shape != (N,):
            raise ValueError(f"dreamer_v3.Agent.act: is_first is {first.shape}, but ({N},) was expected")
        carry = self.initial(N) if state is None else state
        if len(carry.deter) != N:
            raise ValueError(
                f"dreamer_v3.Agent.act: state is of {len(carry.deter)} environments, but {N} were expected"
            )
        mode = greedy and self.config.evaluate_by == "mode"
        carry, _ = self.step(
            tensors, carry, torch.from_numpy(first).to(self.device), self._generator, mode=mode
        )
        return self.actions.to_env(carry.action), carry

    def open_loop(
        self,
        obs: Mapping[str, np.ndarray],
        prev_action: Tensor,
        is_first: np.ndarray,
        context: int,
        *,
        seed: int = 0,
    ) -> Predicted:
        """Imagine what follows on the first ``context`` rows; see :meth:`pywm.models.WorldModel.open_loop`."""
        tensors = {key: torch.from_numpy(np.asarray(x)).to(self.device) for key, x in obs.items()}
        first = torch.from_numpy(is_first).to(self.device)
        return self.networks.world_model.open_loop(tensors, prev_action, first, context, seed=seed)

    def to_tensors(self, obs: Obs) -> dict[str, Tensor]:
        """Return observations ``key -> [N, ...]`` as the model takes them; a single one is called ``"obs"``."""
        if isinstance(obs, dict) is not self._is_dict:
            expected = "a dict of arrays" if self._is_dict else "one array"
            raise UserError(f"dreamer_v3.Agent: obs is a {type(obs).__name__}, but {expected} was expected")
        named = obs if isinstance(obs, dict) else {"obs": obs}
        tensors = {}
        for key, slot in self.obs_slots.items():
            if key not in named:
                raise ValueError(
                    f"dreamer_v3.Agent: obs has the keys {sorted(named)}, but {key!r} was expected, too"
                )
            array = np.asarray(named[key])
            if array.ndim != len(slot.shape) + 1 or array.shape[1:] != tuple(slot.shape):
                name = f"obs[{key!r}]" if self._is_dict else "obs"
                expected = ", ".join(["N", *map(str, slot.shape)])
                raise ValueError(
                    f"dreamer_v3.Agent.act: {name} has shape {array.shape}, but ({expected}) was expected"
                )
            tensors[key] = torch.from_numpy(array).to(self.device)
        return tensors

    def state(self) -> State:
        """Return weights and generator."""
        tensors = {f"networks.{name}": p.detach().clone() for name, p in self.parameters.views.items()}
        slow = self.slow_critic.module.named_parameters()
        tensors |= {f"slow_critic.{name}": p.detach().clone() for name, p in slow}
        tensors["generator"] = self._generator.get_state()
        return State(tensors, {})

    def load_state(self, state: State) -> None:
        """Put back what ``state`` returned.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        expected = {f"networks.{name}": p for name, p in self.parameters.views.items()}
        expected |= {f"slow_critic.{name}": p for name, p in self.slow_critic.module.named_parameters()}
        with torch.no_grad():
            for name, p in expected.items():
                saved = state.tensors.get(name)
                if saved is None or saved.shape != p.shape:
                    got = "missing" if saved is None else f"of shape {tuple(saved.shape)}"
                    raise CheckpointError(
                        f"dreamer_v3.Agent.load_state: {name} is {got}, but {tuple(p.shape)} was expected"
                    )
                p.copy_(saved)
        try:
            self._generator.set_state(state.tensors["generator"])
        except MISFITS as error:
            raise CheckpointError(f"dreamer_v3.Agent.load_state: {reason(error)}") from error


# ---- learning ------------------------------------------------------------------------------------------------------------


def _optimizer(config: Config, parameters: FlatParameters, slow_critic: SlowCopy) -> LaProp | Adam:
    if config.optimizer == "laprop":
        return LaProp(parameters, lr=config.lr, clip=config.grad_clip, warmup=config.warmup, slow=slow_critic)
    return Adam(parameters, lr=config.lr, eps=1e-8, max_grad_norm=config.max_grad_norm, warmup=config.warmup)


class ReturnScale:
    """The distance between two quantiles of the returns, followed by an average, and at least 1.

    Source:
        Hafner et al. (2025), eq. 7.
    """

    def __init__(self, low: float, high: float, rate: float, device: torch.device) -> None:
        self._quantiles = torch.tensor([low, high], device=device)
        self._rate = rate
        self.value = torch.zeros(2, device=device)

    def __call__(self, returns: Tensor) -> Tensor:
        """Take returns ``[...]`` in, and return the scale, 0-d."""
        self.value.lerp_(torch.quantile(returns.flatten(), self._quantiles), self._rate)
        return (self.value[1] - self.value[0]).clamp(min=1.0)


class Learner:
    """A training run's state: acting, the replay, and the update.

    Args:
        agent: what learns.
        envs: what it learns in.

    Attributes:
        env_steps: environment steps so far, reset rows not counted.
        updates: optimiser steps so far.
    """

    def __init__(self, agent: Agent, envs: Envs) -> None:
        config, device = agent.config, agent.device
        self.agent, self.envs, self.config = agent, envs, config
        self.optimizer = _optimizer(config, agent.parameters, agent.slow_critic)
        act_seed, replay_seed, self._model_seed = _seeds(config.seed)[2:]
        self.replay = Replay(
            config.replay_size,
            envs.num_envs,
            length=config.batch_length,
            seed=replay_seed,
            device=device,
            **_replay_slots(agent),
        )
        self._generator = torch.Generator(device).manual_seed(act_seed)
        self._scale = ReturnScale(config.return_low, config.return_high, config.return_rate, device)
        self.carry = agent.initial(envs.num_envs)
        self.env_steps = 0
        self._learning_steps = 0  # of them since learning began
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_EPISODES)
        self._stats: dict[str, Tensor] = {}
        self._num_stats = 0

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    def start_episodes(self, run: Run) -> None:
        """Reset the environments with the seed that belongs to the run's last checkpoint."""
        words = np.random.SeedSequence([self.config.seed, run.checkpoint_number]).generate_state(1)
        self.envs.reset(int(words[0]) & 0x7FFFFFFF)
        self.replay.restart()
        self.carry = self.agent.initial(self.envs.num_envs)

    def play(self, run: Run) -> None:
        """Act once in every environment and keep what happened."""
        envs, obs = self.envs, self.envs.obs
        with run.phase("act"):
            is_first = torch.from_numpy(self.replay.is_first).to(self.agent.device)
            self.carry, index = self.agent.step(
                self.agent.to_tensors(obs), self.carry, is_first, self._generator
            )
            action = self.agent.actions.to_env(self.carry.action)
        with run.phase("env"):
            out = envs.step(action)
        self._check(out)
        with run.phase("replay"):
            latents = {"deter": self.carry.deter, "stoch": index} if self.config.store_states else {}
            self.replay.add(obs, self.carry.action, out, **latents)
        steps = int(np.count_nonzero(out.valid))
        self.env_steps += steps
        if self.replay.num_windows >= self.config.learning_starts:
            self._learning_steps += steps
        self._recent += [(episode.return_, episode.length) for episode in envs.episodes()]

    def _check(self, out: StepOut) -> None:
        """Stop at the first number that is not finite, before the replay keeps it."""
        seen = out.final_obs if isinstance(out.final_obs, dict) else {"obs": out.final_obs}
        vectors = [f"obs/{key}" for key in self.agent.networks.world_model.vectors]
        arrays = {"reward": out.reward, **{name: seen[name[4:]] for name in vectors}}
        if all(np.isfinite(x).all() for x in arrays.values()):
            return
        assert_finite(
            {name: torch.from_numpy(np.asarray(x)) for name, x in arrays.items()}, env_steps=self.env_steps
        )

    def learn(self, run: Run) -> None:
        """Take as many updates as the steps so far call for."""
        rows = self.config.batch_size * self.config.batch_length
        while self.updates < int(self._learning_steps * self.config.train_ratio / rows):
            with run.phase("replay"):
                batch = self.replay.sample(self.config.batch_size)
            with run.phase("learn"):
                stats = self.update(batch)
                if not self._num_stats:
                    self._stats = stats
                else:
                    self._stats = {name: self._stats[name] + x for name, x in stats.items()}
                self._num_stats += 1

    def update(self, batch: Sequences) -> dict[str, Tensor]:
        """Learn from windows: one loss, one backward pass, one optimiser step."""
        config, networks = self.config, self.agent.networks
        T, B = batch.reward.shape
        H, model = config.imagine_horizon, networks.world_model
        if config.store_states:
            start = RSSMState(batch.latents["deter"], batch.latents["stoch"])
        else:
            start = model.rssm.initial(B)
        world = model.loss(
            batch.obs,
            batch.prev_action,
            batch.is_first,
            batch.reward,
            batch.terminated,
            start,
            free_nats=config.free_nats,
            dynamics_scale=config.dynamics_scale,
            representation_scale=config.representation_scale,
            seed=self._model_seed,
            offset=self.updates * (T + H),
        )

        # Imagination, without gradients, from every row.
        with torch.no_grad():
            observed = world.observed
            assert observed.index is not None
            starts = RSSMState(observed.deter.flatten(0, 1), observed.index.flatten(0, 1))
            imagined = model.rssm.imagine(
                networks.policy(), starts, H, seed=self._model_seed, offset=self.updates * (T + H) + T
            )
            # [H + 1, T·B, ...], then without the last row, then that one.
            rows = (imagined.deter, imagined.index) if networks.critic.gathers else (imagined.feat, None)
            states, last = (
                [None if x is None else x[part] for x in rows] for part in (slice(-1), slice(-1, None))
            )
            reward, proceed = model.outcome(*rows)
        value_logits = networks.critic(*states)
        with torch.no_grad():
            value = torch.cat([symexp_twohot_mean(x) for x in (value_logits, networks.critic(*last))])
            slow_value = symexp_twohot_mean(self.agent.slow_critic.module(*states))
            returns = lambda_return(reward[1:], proceed[1:], value[1:], config.lam)
            weight = proceed[:-1].cumprod(0)
            scale = self._scale(returns)
            advantage = (returns - value[:-1]) / scale

        log_prob, entropy = networks.log_prob_and_entropy(networks.actor(*states), imagined.action)
        actor_loss = -(weight * (log_prob * advantage + config.entropy_coef * entropy)).mean()
        critic_loss = (weight * self._value_loss(value_logits, returns, slow_value)).mean()

        # The critic on what was seen: the returns of the replay, bootstrapped by those of imagination.
        boot = returns[0].view(T, B)
        discount = (~batch.terminated).to(boot.dtype) * model.discount
        goes_on = (~batch.is_last).to(boot.dtype)
        replayed = lambda_return(batch.reward[1:], discount[1:], boot[1:], config.lam * goes_on[1:])
        seen, slow_value = world.feat[:-1], slow_value[0].view(T, B)[:-1]  # imagination began there
        replay_loss = (goes_on[:-1] * self._value_loss(networks.critic(seen), replayed, slow_value)).mean()

        loss = world.total + actor_loss + critic_loss + config.replay_value_scale * replay_loss
        self.agent.parameters.backward(loss)
        norm = self.optimizer.step()
        if config.optimizer == "adam":  # LaProp moves the slow critic in the same call
            self.agent.slow_critic.update()
        if config.store_states:
            self.replay.write_back(batch.handles, deter=observed.deter, stoch=observed.index)
        return {
            **world.stats,
            "loss/actor": actor_loss.detach(),
            "loss/critic": critic_loss.detach(),
            "loss/replay_value": replay_loss.detach(),
            "entropy": entropy.detach().mean(),
            "imagined/return": returns.mean(),
            "imagined/reward": reward.mean(),
            "imagined/value": value.mean(),
            "return_scale": scale,
            "grad_norm": norm,
        }

    def _value_loss(self, logits: Tensor, returns: Tensor, slow_value: Tensor) -> Tensor:
        return symexp_twohot_loss(logits, returns, slow_value, other_scale=self.config.slow_scale)

    @property
    def score(self) -> float | None:
        """The mean return of the last episodes, from what a checkpoint holds; None before the first one ended."""
        return float(np.mean([return_ for return_, _ in self._recent])) if self._recent else None

    def metrics(self) -> dict[str, Any]:
        """Return the figures since the last call; averages over updates."""
        found: dict[str, Any] = {}
        if self._recent:
            found["return/mean"], found["return/length"] = np.mean(self._recent, axis=0).tolist()
        if self._num_stats:
            names = list(self._stats)
            means = torch.stack([self._stats[name] for name in names]) / self._num_stats
            assert_finite({"weights": self.agent.parameters.data}, env_steps=self.env_steps)
            found |= dict(zip(names, means.tolist(), strict=True))
        self._stats, self._num_stats = {}, 0
        return {**found, "updates": self.updates, "replay/rows": self.replay.num_rows}

    @property
    def has_figures(self) -> bool:
        """Whether enough updates were taken for a row of metrics."""
        return self._num_stats >= UPDATES_PER_ROW

    def state(self) -> State:
        """Return everything the next step depends on."""
        tensors = {
            "generator": self._generator.get_state(),
            "exp_avg": self.optimizer.exp_avg,
            "exp_avg_sq": self.optimizer.exp_avg_sq,
            "return_scale": self._scale.value,
            **{f"carry.{name}": x for name, x in self.carry._asdict().items()},
            **{f"stats.{name}": x for name, x in self._stats.items()},
        }
        data = {
            "env_steps": self.env_steps,
            "learning_steps": self._learning_steps,
            "updates": self.updates,
            "num_stats": self._num_stats,
            "recent": list(self._recent),
        }
        return join(
            {
                "agent": self.agent.state(),
                "learner": State(tensors, data),
                "replay": self.replay.state(),
                "env": self.envs.get_state(),
            }
        )

    def resume(self, run: Run) -> None:
        """Continue from the checkpoint of ``run``; one that has lost its replay to a newer one begins an empty one.

        Raises:
            CheckpointError: it does not fit; the message names it.
        """
        assert run.resumed is not None
        names = ("agent", "learner", "replay", "env")
        agent, learner, replay, envs = (part(run.resumed.state, name) for name in names)
        is_lean = "replay" in run.resumed.dropped
        if agent is None or learner is None or (replay is None and not is_lean):
            raise CheckpointError(f"{run.resumed.path}: holds no agent, learner and replay of DreamerV3")
        try:
            self.agent.load_state(agent)
            self._load_state(learner, run.resumed.step)
            if replay is not None:
                self.replay.load_state(replay)
            else:
                log.warning(
                    "%s: holds no replay, which only a run's newest checkpoint keeps. Weights, optimiser and counts are "
                    "there: training goes on with an empty replay and learns again when that holds %s windows, so this "
                    "run will not equal an uninterrupted one",
                    run.resumed.path,
                    f"{self.config.learning_starts:,}",
                )
            run.restore_rng()
            if envs is None or replay is None or not self.envs.restorable:
                self.start_episodes(run)
            else:
                self.envs.set_state(envs)
        except MISFITS as error:
            raise CheckpointError(f"{run.resumed.path}: does not fit: {reason(error)}") from error

    def _load_state(self, state: State, env_steps: int) -> None:
        self._generator.set_state(state.tensors["generator"])
        places = {
            "exp_avg": self.optimizer.exp_avg,
            "exp_avg_sq": self.optimizer.exp_avg_sq,
            "return_scale": self._scale.value,
            **{f"carry.{name}": x for name, x in self.carry._asdict().items()},
        }
        for name, mine in places.items():
            saved = state.tensors[name]
            if saved.shape != mine.shape:
                raise ValueError(f"{name} is {tuple(saved.shape)}, but {tuple(mine.shape)} was expected")
            mine.copy_(saved)
        for name in ("updates", "learning_steps", "num_stats"):
            value = state.data[name]
            if type(value) is not int or value < 0:
                raise ValueError(f"learner.{name} is {value!r}, but a count was expected")
        if state.data["env_steps"] != env_steps:
            raise ValueError(
                f"learner.env_steps is {state.data['env_steps']!r}, but {env_steps} was expected"
            )
        self.env_steps = env_steps
        self.optimizer.updates, self._learning_steps = state.data["updates"], state.data["learning_steps"]
        self._num_stats = state.data["num_stats"]
        self._stats = {
            name.removeprefix("stats."): x.to(self.agent.device)
            for name, x in state.tensors.items()
            if name.startswith("stats.")
        }
        self._recent.extend((float(return_), int(length)) for return_, length in state.data["recent"])


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
        NumericalError: a weight became NaN or infinite.
        UserError: the replay does not fit into memory.
    """
    run = NullRun() if run is None else run
    envs = _make_envs(config, env)
    with contextlib.closing(envs):
        agent = Agent(config, envs.observation_space, envs.action_space, device)
        learner = Learner(agent, envs)
        run.announce(envs)
        if run.resumed is None:
            learner.start_episodes(run)
        else:
            learner.resume(run)
        while learner.env_steps < config.steps:
            learner.play(run)
            learner.learn(run)
            if learner.has_figures and run.log_due(learner.env_steps):
                run.log(learner.metrics(), env_steps=learner.env_steps)
            if run.eval_due(learner.env_steps):
                _evaluate(run, agent, env, learner.env_steps)
            if run.checkpoint_due(learner.env_steps):
                run.save(learner.env_steps, learner.state(), score=learner.score)
                if not envs.restorable:
                    learner.start_episodes(run)
            if run.stopping:
                break
        run.finish(learner.env_steps, learner.state())
    return agent


def describe(config: Config, env: EnvLike) -> dict[str, str]:
    """Say what training makes of an environment, read off the networks that it would train.

    Args:
        config: settings.
        env: as for :func:`train`; a vector environment is closed at the end.

    Returns:
        A line on each key of the observation, and on ``"action"``, ``"networks"`` and ``"replay"``.

    Raises:
        UserError: training refuses it, for the same reason.
    """
    envs = _make_envs(config, env)
    with contextlib.closing(envs):
        agent = Agent(config, envs.observation_space, envs.action_space)
        replay = Replay.memory(config.replay_size, envs.num_envs, **_replay_slots(agent))
    model, found = agent.networks.world_model, {}
    for key, (channels, *sides) in model.images.items():
        assert model.image_encoder is not None
        padded = list(model.image_encoder.padded)
        text = f"picture of {sides[0]} x {sides[1]} in {channels} channel{'s' * (channels > 1)}"
        found[key] = text if padded == sides else f"{text}, padded to {padded[0]} x {padded[1]}"
    for key, shape in model.vectors.items():
        size = math.prod(shape)
        kind = "as symlogs"
        if key in model.choices:
            kind = "decoded as categoricals" if model.choices[key] else "decoded as bits"
        found[key] = f"vector of {size} number{'s' * (size > 1)} ({origin(envs.originals[key])}), {kind}"
    if isinstance(envs.observation_space, spaces.Dict):
        found = {f"obs/{key}": text for key, text in found.items()}
    found["action"] = str(agent.actions)
    found["networks"] = f"{config.size}, {agent.parameters.data.numel():,} parameters"
    return {**found, "replay": replay}


def _make_envs(config: Config, env: EnvLike) -> Envs:
    given = isinstance(env, VectorEnv | Envs)
    if config.image_size is not None and not (
        isinstance(env, str) and env.rpartition(":")[2].startswith("ALE/")
    ):
        raise UserError(
            f"dreamer_v3: image_size is {config.image_size}, but None was expected: only Atari's games have one"
        )
    return make(
        env,
        None if given else config.num_envs,
        seed=config.seed,
        training=False,  # rewards as they are: symexp bins need no clipping
        max_episode_steps=None if given else config.max_episode_steps,
        env_kwargs=config.env_kwargs,
    )


def _replay_slots(agent: Agent) -> dict[str, Any]:
    """Return what a row of the replay holds, as arguments of :class:`pywm.data.replay.Replay`."""
    c = agent.networks.world_model.rssm.config
    latents = {"deter": Slot((c.deter,), torch.float32), "stoch": Slot((c.stoch,), torch.uint8)}
    return {
        "obs": agent.obs_slots,
        "action": Slot((agent.actions.width,), torch.float32),
        "latents": latents if agent.config.store_states else {},
    }


def _evaluate(run: Run, agent: Agent, env: EnvLike, env_steps: int) -> None:
    if isinstance(env, VectorEnv | Envs):
        log.warning("a vector environment cannot be made a second time: no evaluation")
        return
    limit = agent.config.max_episode_steps
    mode = "rgb_array" if run.options.video else None
    episodes = run.options.eval_episodes
    envs = make(
        env,
        min(episodes, 8),
        training=False,
        render_mode=mode,
        max_episode_steps=limit,
        env_kwargs=agent.config.env_kwargs,
    )
    with contextlib.closing(envs):
        run.evaluate(agent, envs, env_steps=env_steps)
        if run.options.video:
            _write_dream(run, agent, envs, env_steps)


def _write_dream(run: Run, agent: Agent, envs: Envs, env_steps: int) -> None:
    try:
        write_dream(dream(agent, envs, seed=EVAL_SEED), run.dir / "dreams", f"dream_{env_steps:08d}")
    except UserError as error:  # no pictures are worth a run
        log.warning("no dream at %s env steps: %s", f"{env_steps:,}", error)


def _operands_on(device: torch.device, precision: str) -> str:
    why_not = _operands.why_not(precision, device)
    if why_not is None:
        return precision
    log.warning(
        "precision is %s, but %s, so it would be no faster: everything stays float32", precision, why_not
    )
    return "float32"


def _obs_parts(space: spaces.Space[Any]) -> dict[str, spaces.Box]:
    named = dict(space.spaces) if isinstance(space, spaces.Dict) else {"obs": space}
    parts = {}
    for key, box in named.items():
        if not isinstance(box, spaces.Box):
            raise UserError(f"dreamer_v3.Agent: observation {key!r} is {box}, but a Box was expected")
        parts[key] = box
    return parts


def _seeds(seed: int) -> list[int]:
    """Derive independent seeds: for weights, the agent's actions, those of training, the replay and the model's samples."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(5)]
