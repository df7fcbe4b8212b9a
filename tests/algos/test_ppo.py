"""PPO: its parts against hand computation, every kind of space, learning on small tasks."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from pywm.algos import ppo
from pywm.envs import make
from pywm.envs.toy import Counter, Match
from pywm.errors import NumericalError, UserError
from pywm.training.evaluate import evaluate
from pywm.training.run import NullRun

SMALL: dict[str, Any] = {
    "num_envs": 2,
    "num_steps": 8,
    "batch_size": 8,
    "epochs": 2,
    "steps": 64,
    "hidden": (8,),
}


def _learner(env: Any, **settings: Any) -> ppo.Learner:
    config = ppo.Config(**{**SMALL, **settings})
    given = isinstance(env, gymnasium.vector.VectorEnv)
    envs = make(env, None if given else config.num_envs, seed=config.seed)
    learner = ppo.Learner(ppo.Agent(config, envs.observation_space, envs.action_space), envs)
    learner.start_episodes(NullRun())
    return learner


def _weights(agent: ppo.Agent) -> list[float]:
    return agent.parameters.data.tolist()


# ---- the rollout and its advantages


def _vector(mode: AutoresetMode, end: str) -> SyncVectorEnv:
    return SyncVectorEnv([lambda n=n: Counter(length=n, end=end) for n in (2, 3)], autoreset_mode=mode)


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("end", ["terminated", "truncated", "both"])
def test_advantages_equal_a_loop_over_episodes(end: str, bootstrap: bool) -> None:
    learner = _learner(_vector(AutoresetMode.SAME_STEP, end), num_steps=11, bootstrap_truncated=bootstrap)
    batch = learner.collect(NullRun())
    _, _, advantage, value, returns = (x.view(11, 2) for x in batch.columns)
    policy, rollout, config = learner.policy, learner.rollout, learner.config
    for n, length in enumerate((2, 3)):
        carry = 0.0
        for t in reversed(range(11)):
            last = (t + 1) % length == 0
            # Episode e of an environment shows 10·e + step, also in its last observation.
            final = torch.tensor([10.0 * (t // length) + t % length + 1])
            assert rollout.obs["obs"][t, n].item() == 10 * (t // length) + t % length
            with torch.no_grad():
                following = policy.value(final).item()
            if last and (end != "truncated" or not bootstrap):
                following = 0.0
            delta = rollout.reward[t, n] + config.discount * following - value[t, n].item()
            carry = delta + (0.0 if last else config.discount * config.lam * carry)
            assert advantage[t, n].item() == pytest.approx(carry, abs=1e-4)
            assert returns[t, n].item() == pytest.approx(carry + value[t, n].item(), abs=1e-4)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_all_autoreset_modes_give_the_same_rows(end: str) -> None:
    rows = {}
    for mode in AutoresetMode:
        learner = _learner(_vector(mode, end), num_steps=24)
        with torch.no_grad():
            # A policy that always takes action 0, so that the rows do not depend on how many draws there were.
            learner.policy.actor.layers[-1].bias.copy_(torch.tensor([50.0, -50.0]))
        batch = learner.collect(NullRun())
        index = slice(None) if batch.rows is None else batch.rows
        obs = batch.obs["obs"][index].squeeze(-1)
        found = {}
        n = torch.arange(48)[index] % 2
        for i in range(len(obs)):
            columns = tuple(x[index][i].item() for x in batch.columns)
            found[(int(n[i]), obs[i].item())] = columns
        rows[mode] = found
        # One row in every episode of 2 or 3 steps is a reset in NEXT_STEP mode, and it is not counted.
        expected = 48 if mode != AutoresetMode.NEXT_STEP else 24 * 2 / 3 + 24 * 3 / 4
        assert batch.num_rows == learner.env_steps == expected
    same = rows[AutoresetMode.SAME_STEP]
    assert rows[AutoresetMode.DISABLED].keys() == same.keys()
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
        # The last episode of a rollout is bootstrapped at another place where rows were lost.
        common = [key for key in rows[mode] if key[1] < 40]
        assert len(common) > 15
        for key in common:
            assert rows[mode][key] == pytest.approx(same[key], abs=1e-4), key


def test_reset_rows_are_not_learned_from() -> None:
    learner = _learner(_vector(AutoresetMode.NEXT_STEP, "terminated"), num_steps=12, batch_size=100)
    batch = learner.collect(NullRun())
    assert batch.rows is not None
    for obs, columns in learner._minibatches(batch):
        assert len(obs["obs"]) == batch.num_rows == len(columns[0])
    # In NEXT_STEP mode environment 0 (two steps an episode) resets in every third row.
    assert not set(batch.rows.tolist()) & {t * 2 for t in range(2, 12, 3)}


def test_minibatches_visit_every_row_once_in_a_new_order() -> None:
    learner = _learner(lambda: Match(), num_steps=10, batch_size=7)
    batch = learner.collect(NullRun())
    epochs = []
    for _ in range(2):
        parts = list(learner._minibatches(batch))
        assert [len(columns[0]) for _, columns in parts] == [7, 7, 6]
        for obs, columns in parts:  # rows stay together
            features = learner.policy.encoder(obs)
            with torch.no_grad():
                torch.testing.assert_close(learner.policy.value(features), columns[3])
                torch.testing.assert_close(learner.policy.dist(features).log_prob(columns[0]), columns[1])
        epochs.append(torch.cat([columns[2] for _, columns in parts]))
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0].sort()[0], batch.columns[2].sort()[0])


def test_advantages_can_be_normalised_over_the_rollout() -> None:
    batch = _learner(lambda: Match(), normalize_advantage="rollout").collect(NullRun())
    assert batch.columns[2].mean().item() == pytest.approx(0, abs=1e-6)
    assert batch.columns[2].std().item() == pytest.approx(1, abs=1e-4)


# ---- the update


def test_learning_rate_and_clip_are_annealed_to_zero() -> None:
    learner = _learner("CartPole-v1", steps=32, anneal_clip=True, lr=1.0)
    rows = [learner.update(learner.collect(NullRun()), NullRun()) for _ in range(2)]
    assert [row["lr"] for row in rows] == [1.0, 0.5]
    assert [row["clip"] for row in rows] == [0.2, 0.1]
    constant = _learner("CartPole-v1", steps=32, anneal_lr=False)
    rows = [constant.update(constant.collect(NullRun()), NullRun()) for _ in range(2)]
    assert rows[0]["lr"] == rows[1]["lr"]
    assert rows[1]["clip"] == 0.2


def test_target_kl_stops_the_epochs() -> None:
    settings: dict[str, Any] = {"lr": 0.1, "epochs": 10, "anneal_lr": False}
    learner = _learner("CartPole-v1", target_kl=1e-3, **settings)
    metrics = learner.update(learner.collect(NullRun()), NullRun())
    assert metrics["epochs"] < 10
    free = _learner("CartPole-v1", **settings)
    assert free.update(free.collect(NullRun()), NullRun())["epochs"] == 10


def test_first_minibatch_has_ratio_one() -> None:
    learner = _learner(lambda: Match(action="box"), epochs=1, batch_size=16, normalize_obs=True)
    metrics = learner.update(learner.collect(NullRun()), NullRun())
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0


def test_value_clip_changes_the_update() -> None:
    agents = [
        ppo.train(ppo.Config(**{**SMALL, "epochs": 8, "value_clip": clip, "lr": 1e-2}), "CartPole-v1")
        for clip in (None, 1e-3)
    ]
    assert _weights(agents[0]) != _weights(agents[1])


def test_each_loss_moves_its_own_network() -> None:
    learner = _learner("CartPole-v1")
    batch = learner.collect(NullRun())
    learner.config = ppo.Config(**{**SMALL, "value_coef": 0.0})
    before = {name: p.detach().clone() for name, p in learner.agent.parameters.views.items()}
    learner.update(batch, NullRun())
    for name, p in learner.agent.parameters.views.items():
        assert torch.equal(p, before[name]) == name.startswith("critic"), name


def test_torch_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ppo.train(ppo.Config(**SMALL), "CartPole-v1")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- spaces


ACTIONS: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(3, start=5),
    "multi_discrete": spaces.MultiDiscrete([2, 4]),
    "multi_binary": spaces.MultiBinary(3),
    "box": spaces.Box(np.array([-1.0, -0.1], np.float32), np.array([1.0, 0.1], np.float32)),
    "matrix": spaces.Box(-2.0, 2.0, (2, 2), np.float32),
    "unbounded": spaces.Box(-np.inf, np.inf, (1,), np.float32),
}
OBSERVATIONS: dict[str, spaces.Space] = {
    "vector": spaces.Box(-1.0, 1.0, (3,), np.float32),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float64),
    "bytes": spaces.Box(0, 255, (5,), np.uint8),
    "discrete": spaces.Discrete(4),
    "image": spaces.Box(0, 255, (18, 20, 3), np.uint8),
    "dict": spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (16, 16, 1), np.uint8),
            "speed": spaces.Box(-1.0, 1.0, (2,), np.float32),
        }
    ),
    "number": spaces.Box(-1.0, 1.0, (), np.float32),
    "dict with a number": spaces.Dict(
        {"speed": spaces.Box(-1.0, 1.0, (2,), np.float32), "time": spaces.Box(0.0, 9.0, (), np.float64)}
    ),
}


class Anything(gymnasium.Env):
    """Random observations; checks that actions belong to the space."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        flags = self.np_random.random(2) < 0.1
        return self.observation_space.sample(), 1.0, bool(flags[0]), bool(flags[1]), {}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("obs", "action"),
    [("vector", action) for action in ACTIONS]
    + [(obs, "discrete") for obs in OBSERVATIONS if obs != "vector"],
)
def test_every_space_trains_and_acts(obs: str, action: str, normalize: bool) -> None:
    config = ppo.Config(
        **{**SMALL, "normalize_obs": normalize, "normalize_reward": normalize, "log_std_init": 1.0}
    )
    observation_space, action_space = OBSERVATIONS[obs], ACTIONS[action]
    agent = ppo.train(config, lambda: Anything(observation_space, action_space))
    assert all(math.isfinite(x) for x in _weights(agent))
    envs = make(lambda: Anything(observation_space, action_space), 3, training=False)
    for greedy in (True, False):
        first = envs.reset(0)
        chosen, state = agent.act(first, greedy=greedy)
        assert chosen.shape == (3, *(action_space.shape or ()))
        assert state is None
        envs.step(chosen)
    assert np.array_equal(agent.act(first, greedy=True)[0], agent.act(first, greedy=True)[0])


def test_continuous_actions_are_stored_as_drawn() -> None:
    learner = _learner(lambda: Match(action="box"), log_std_init=2.0)
    batch = learner.collect(NullRun())
    action, log_prob = batch.columns[:2]
    assert action.abs().max() > 1.5  # beyond the space's bound of 1
    features = learner.policy.encoder(batch.obs)
    with torch.no_grad():
        torch.testing.assert_close(learner.policy.dist(features).log_prob(action), log_prob)


def test_observation_of_the_wrong_kind_is_refused() -> None:
    learner = _learner(lambda: Match())
    with pytest.raises(UserError, match="obs is a dict, but one array was expected"):
        learner.agent.act({"obs": np.zeros((1, 4), np.float32)})


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
def test_observations_without_the_environments_dimension_are_refused(obs: str) -> None:
    learner = _learner(lambda: Match(obs=obs))
    batch = learner.envs.obs
    learner.agent.act(batch)
    bad = {key: x[0] for key, x in batch.items()} if isinstance(batch, dict) else batch[0]
    with pytest.raises(
        ValueError, match=r"act: obs(\['\w+'\])? has shape \([0-9, ]+\), but \(N, .*\) was exp"
    ):
        learner.agent.act(bad)
    wide = {key: x[..., :-1] for key, x in batch.items()} if isinstance(batch, dict) else batch[..., :-1]
    with pytest.raises(ValueError, match=r"act: obs"):
        learner.agent.act(wide)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("discount", 1.5), ("clip", 0.0), ("lr", -1.0), ("target_kl", 0.0), ("entropy_coef", -1.0),
     ("hidden", (0,)), ("seed", -1), ("value_clip", math.nan), ("normalize_advantage", "foo"), ("activation", "gelu"),
     ("max_episode_steps", 0), ("max_episode_steps", -5), ("seed", 1.5), ("steps", "10"), ("hidden", 64),
     ("lr", None), ("anneal_lr", 1), ("epochs", True), ("value_clip", "x")],
)  # fmt: skip
def test_bad_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"ppo.Config: {field} is .*expected"):
        ppo.Config(**{field: value})


def test_presets_are_configurations() -> None:
    for preset in ppo.PRESETS.values():
        config = ppo.Config(**preset.config)
        assert config.num_envs * config.num_steps >= config.batch_size
        assert preset.expected
    assert ppo.PRESETS["mujoco"].suits("Hopper-v5")
    assert ppo.PRESETS["atari"].suits("ALE/Pong-v5")


# ---- repetition, state


def test_same_seed_same_weights_whatever_else_is_random() -> None:
    config = ppo.Config(**{**SMALL, "normalize_obs": True, "normalize_reward": True})
    torch.manual_seed(1)
    first = _weights(ppo.train(config, "CartPole-v1"))
    torch.manual_seed(2)
    np.random.seed(2)
    assert _weights(ppo.train(config, "CartPole-v1")) == first
    other = ppo.Config(**{**SMALL, "normalize_obs": True, "normalize_reward": True, "seed": 1})
    assert _weights(ppo.train(other, "CartPole-v1")) != first


def test_agent_state_round_trips_with_its_normaliser_and_generator() -> None:
    config = ppo.Config(**{**SMALL, "normalize_obs": True})
    agent = ppo.train(config, "CartPole-v1")
    envs = make("CartPole-v1", 4)
    other = ppo.Agent(
        ppo.Config(**{**SMALL, "normalize_obs": True, "seed": 9}), envs.observation_space, envs.action_space
    )
    obs = envs.reset(0) + np.float32(0.3)
    other.load_state(agent.state())
    assert agent.normalizer is not None
    assert other.normalizer is not None
    assert agent.normalizer.state()["obs/mean"].any()
    assert all(
        np.array_equal(x, other.normalizer.state()[key]) for key, x in agent.normalizer.state().items()
    )
    for _ in range(5):
        assert np.array_equal(agent.act(obs)[0], other.act(obs)[0])
    assert np.array_equal(agent.act(obs, greedy=True)[0], other.act(obs, greedy=True)[0])
    broken = agent.state()
    del broken.tensors["policy.actor.layers.0.weight"]
    with pytest.raises(UserError, match=r"policy.actor.layers.0.weight is missing"):
        other.load_state(broken)


def test_normaliser_is_frozen_while_acting() -> None:
    agent = ppo.train(ppo.Config(**{**SMALL, "normalize_obs": True}), "CartPole-v1")
    assert agent.normalizer is not None
    before = agent.normalizer.state()
    envs = make("CartPole-v1", 2, training=False)
    evaluate(agent, envs, episodes=2, seed=0)
    assert all(np.array_equal(x, agent.normalizer.state()[key]) for key, x in before.items())


def test_normaliser_sees_every_observation_once() -> None:
    learner = _learner(lambda: Match(length=3), normalize_obs=True)
    learner.collect(NullRun())
    learner.collect(NullRun())
    assert learner.agent.normalizer is not None
    # Two environments; the first observation and one in each of 16 steps.
    assert learner.agent.normalizer.state()["obs/count"] == pytest.approx(2 * 17, abs=1e-3)


def test_rewards_are_normalised_for_learning_but_not_for_the_record() -> None:
    learner = _learner(lambda: Counter(length=4), normalize_reward=True, num_steps=50)
    batch = learner.collect(NullRun())
    # Rewards are t + action/2: 10 to 12 an episode. Divided by a deviation of the discounted sum, they are smaller.
    assert 10 <= batch.metrics["return/mean"] <= 12
    assert 0 < learner.rollout.reward[10:].max() < 2


# ---- numbers that are not finite


class Poisoned(Match):
    """Turn one quantity to NaN after a while."""

    def __init__(self, what: str) -> None:
        super().__init__(action="box")
        self._what, self._count = what, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        self._count += 1
        bad = self._count > 20
        if bad and self._what == "obs":
            obs = obs * np.float32(np.nan)
        return obs, math.nan if bad and self._what == "reward" else reward, terminated, truncated, info


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("what", ["obs", "reward"])
def test_nan_stops_with_the_name_of_the_first_bad_tensor(what: str, normalize: bool) -> None:
    config = ppo.Config(**{**SMALL, "steps": 1000, "normalize_obs": normalize, "normalize_reward": normalize})
    with pytest.raises(NumericalError, match=f"'{what}.*became NaN"):
        ppo.train(config, lambda: Poisoned(what))


def test_exploding_weights_stop_the_training() -> None:
    config = ppo.Config(**{**SMALL, "steps": 10_000, "lr": 1e30, "anneal_lr": False})
    with pytest.raises(NumericalError, match="became"):
        ppo.train(config, lambda: Match(action="box"))


# ---- learning


def _score(agent: ppo.Agent, env: Any) -> float:
    return evaluate(agent, make(env, 8, training=False), episodes=32, seed=1).return_mean


@pytest.mark.parametrize(
    ("action", "obs", "steps", "chance", "score"),
    [
        ("discrete", "vector", 6_000, 2.0, 7.0),
        ("multi_discrete", "vector", 6_000, 3.3, 7.0),
        ("box", "vector", 10_000, 3.3, 6.0),
        ("discrete", "image", 2_500, 2.0, 6.0),
        ("discrete", "dict", 2_500, 2.0, 6.0),
    ],
)
def test_learns_to_match(action: str, obs: str, steps: int, chance: float, score: float) -> None:
    """The best return is 8; ``chance`` is what a random policy gets."""
    assert chance < score - 2
    config = ppo.Config(
        steps=steps,
        num_envs=8,
        num_steps=32,
        batch_size=64,
        epochs=8,
        lr=3e-3,
        lam=0.0,
        discount=0.0,
        log_std_init=-0.5,
    )
    if obs != "vector":
        config = ppo.Config(
            steps=steps, num_envs=8, num_steps=16, batch_size=32, lr=5e-4, lam=0.0, discount=0.0
        )
    env = lambda: Match(action=action, obs=obs)  # noqa: E731
    assert _score(ppo.train(config, env), env) > score


@pytest.mark.parametrize(
    ("bootstrap", "lam", "expected"), [(True, 0.95, 10.0), (False, 1.0, 2.63), (False, 0.0, 3.57)]
)
def test_value_of_an_episode_that_is_only_cut(bootstrap: bool, lam: float, expected: float) -> None:
    """Reward 1 for ever with a discount of 0.9 is worth 10; time limits taken for the end make it less."""
    config = ppo.Config(
        steps=8_000, num_envs=4, num_steps=25, batch_size=100, epochs=20, lr=1e-2, discount=0.9, lam=lam,
        bootstrap_truncated=bootstrap, max_grad_norm=None, hidden=(16,),
    )  # fmt: skip
    agent = ppo.train(config, "pywm/Truncation-v0")
    value = agent.policy.value(torch.ones(1, 1)).item()
    assert value == pytest.approx(expected, rel=0.02)
