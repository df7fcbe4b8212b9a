"""Stable-Baselines3 on vector environments: every transition that it sees has happened, whatever the autoreset mode."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from pywm.envs import make
from pywm.envs.toy import Counter, Match
from pywm.errors import EnvError, MissingExtra, UserError
from pywm.integrations.sb3 import as_vec_env
from pywm.models import SimulatedVecEnv, VideoConfig, VideoModel, WorldModel, WorldModelVectorEnv

sb3 = pytest.importorskip("stable_baselines3", reason="the extra sb3 is not installed")

modes = pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: mode.name)


class Telling(Counter):
    """Counts, and says in its infos where it is; it draws a number with its generator."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        obs, _ = super().reset(seed=seed)
        return obs, {"begins": int(obs[0]), "options": options, "drawn": int(self.np_random.integers(1000))}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"t": self._t, "place": {"of": np.array([self._length])}}

    def render(self) -> np.ndarray:
        return np.full((2, 2, 3), self._t, np.uint8)

    def length_plus(self, x: int, *, times: int = 1) -> int:
        return times * (self._length + x)


def sync(mode: AutoresetMode, *builds: Callable[[], gymnasium.Env], **options: Any) -> SyncVectorEnv:
    return SyncVectorEnv(builds, autoreset_mode=mode, **options)


def telling(mode: AutoresetMode, **options: Any) -> SyncVectorEnv:
    """Episodes of 2 and 3 steps; the first end, the second are cut."""
    return sync(mode, lambda: Telling(2), lambda: Telling(3, "truncated"), **options)


@modes
def test_an_episode_is_reset_in_the_step_that_ends_it(mode: AutoresetMode) -> None:
    env = as_vec_env(telling(mode))
    assert env.num_envs == 2
    env.seed(0)
    assert env.reset().tolist() == [[0], [0]]
    rows = [env.step(np.array([0, 1])) for _ in range(6)]
    assert [obs.ravel().tolist() for obs, *_ in rows] == [
        [1, 1],
        [10, 2],
        [11, 10],
        [20, 11],
        [21, 12],
        [30, 20],
    ]
    # The reward of step t is t, and a half for the second's action: no action was ever ignored.
    assert [reward.tolist() for _, reward, *_ in rows] == [
        [1, 1.5],
        [2, 2.5],
        [1, 3.5],
        [2, 1.5],
        [1, 2.5],
        [2, 3.5],
    ]
    assert [done.tolist() for _, _, done, _ in rows] == [
        [False, False],
        [True, False],
        [False, True],
        [True, False],
        [False, False],
        [True, True],
    ]
    ends = [[info.get("terminal_observation") for info in infos] for *_, infos in rows]
    assert [[None if x is None else x.tolist() for x in row] for row in ends] == [
        [None, None],
        [[2], None],
        [None, [3]],
        [[12], None],
        [None, None],
        [[22], [13]],
    ]
    assert [[info["TimeLimit.truncated"] for info in infos] for *_, infos in rows] == [
        [False, False],
        [False, False],
        [False, True],
        [False, False],
        [False, False],
        [False, True],
    ]
    assert all(reward.dtype == np.float32 and done.dtype == bool for _, reward, done, _ in rows)
    # Infos are of the step that was taken; what the reset said stands apart.
    assert [[info["t"] for info in infos] for *_, infos in rows] == [
        [1, 1],
        [2, 2],
        [1, 3],
        [2, 1],
        [1, 2],
        [2, 3],
    ]
    assert [info["place"]["of"].tolist() for info in rows[0][3]] == [[2], [3]]
    assert [info["begins"] for info in env.reset_infos] == [30, 20]
    assert not [key for *_, infos in rows for info in infos for key in info if key.startswith(("final", "_"))]


@modes
def test_both_flags_at_once_are_an_end(mode: AutoresetMode) -> None:
    env = as_vec_env(sync(mode, lambda: Counter(1, "both")))
    env.reset()
    _, _, done, infos = env.step(np.array([0]))
    assert done.tolist() == [True]
    assert infos[0]["TimeLimit.truncated"] is False
    assert infos[0]["terminal_observation"].tolist() == [1]


@modes
def test_dicts_and_pictures_pass(mode: AutoresetMode) -> None:
    env = as_vec_env(sync(mode, lambda: Match("box", "dict", 2), lambda: Match("box", "dict", 3)))
    single = Match("box", "dict", 2)
    env.seed(4)
    obs = env.reset()
    first, _ = single.reset(seed=4)
    action = np.zeros((2, 2))
    for _ in range(5):
        assert np.array_equal(obs["image"][0], first["image"])
        assert np.array_equal(obs["vector"][0], first["vector"])
        first, reward, ended, _, _ = single.step(action[0])
        obs, rewards, done, infos = env.step(action)
        assert rewards[0] == np.float32(reward)
        assert done[0] == ended
        if ended:
            assert np.array_equal(infos[0]["terminal_observation"]["image"], first["image"])
            assert np.array_equal(infos[0]["terminal_observation"]["vector"], first["vector"])
            first, _ = single.reset()


@modes
def test_what_was_returned_is_not_written_to(mode: AutoresetMode) -> None:
    env = as_vec_env(telling(mode, copy=False))
    obs = env.reset()
    kept = [(obs, obs.copy())]
    for _ in range(6):
        obs, reward, _, infos = env.step(np.zeros(2, int))
        kept += [(x, x.copy()) for x in (obs, reward)]
        kept += [(x, x.copy()) for x in (info.get("terminal_observation") for info in infos) if x is not None]
    assert all(np.array_equal(now, then) for now, then in kept)


class Careless(VectorEnv):
    """One batch that counts, in NEXT_STEP mode, and resets everything whatever the mask says."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, lengths: tuple[int, ...], heeds: bool = False) -> None:
        self.num_envs, self.heeds = len(lengths), heeds
        self.single_observation_space = spaces.Box(0, 100, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, len(lengths))
        self.action_space = batch_space(self.single_action_space, len(lengths))
        self.lengths, self.t = np.array(lengths), np.zeros(len(lengths))
        self.ended = np.zeros(len(lengths), bool)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        mask = (options or {}).get("reset_mask") if self.heeds else None
        rows = slice(None) if mask is None else mask
        self.t[rows], self.ended[rows] = 0, False
        return self.t[:, None].astype(np.float32), {"seed": seed, "version": np.arange(7)}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.t = np.where(self.ended, 0, self.t + 1)
        reward = np.where(self.ended, 0.0, 1.0)
        self.ended = ~self.ended & (self.t >= self.lengths)
        return self.t[:, None].astype(np.float32), reward, self.ended, self.ended & False, {"lap": 2 * self.t}

    def double(self, x: int) -> int:
        return 2 * x


def test_a_vector_that_resets_all_is_refused_before_it_does_harm() -> None:
    env = as_vec_env(Careless((2, 3)))
    env.reset()
    env.step(np.zeros(2, int))
    with pytest.raises(
        EnvError, match=r"Careless.* in NEXT_STEP mode was told to reset the environments \[0\], but"
    ):
        env.step(np.zeros(2, int))
    # Where all end at once it resets what it should.
    env = as_vec_env(Careless((2, 2)))
    env.reset()
    obs = [env.step(np.zeros(2, int))[0].ravel().tolist() for _ in range(4)]
    assert obs == [[1, 1], [0, 0], [1, 1], [0, 0]]


def test_a_batch_that_heeds_the_mask_is_served() -> None:
    env = as_vec_env(Careless((2, 3), heeds=True))
    env.reset()
    rows = [env.step(np.zeros(2, int)) for _ in range(4)]
    assert [obs.ravel().tolist() for obs, *_ in rows] == [[1, 1], [0, 2], [1, 0], [0, 1]]
    assert all(reward.tolist() == [1, 1] for _, reward, *_ in rows)
    assert [info["lap"] for info in rows[1][3]] == [4, 4]
    assert env.reset_infos[0]["version"].tolist() == list(range(7))  # of all of them


def test_an_end_without_its_observation_is_named() -> None:
    class Silent(Careless):
        metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    env = as_vec_env(Silent((1, 1)))
    env.reset()
    with pytest.raises(EnvError, match=r"in SAME_STEP mode without info\['final_obs'\]"):
        env.step(np.zeros(2, int))


def test_last_observations_may_be_one_batch_that_is_used_again() -> None:
    class Reusing(Careless):
        metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
        last = np.zeros((2, 1), np.float32)

        def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
            _, reward, ended, cut, _ = super().step(actions)
            self.last[:, 0] = self.t
            self.t, self.ended = np.where(ended, 0, self.t), ended & False
            return self.t[:, None].astype(np.float32), reward, ended, cut, {"final_obs": self.last}

    env = as_vec_env(Reusing((2, 3)))
    env.reset()
    rows = [env.step(np.zeros(2, int))[3] for _ in range(3)]
    assert rows[1][0]["terminal_observation"].tolist() == [2]
    assert rows[2][1]["terminal_observation"].tolist() == [3]


# ---- what Stable-Baselines3 keeps ----------------------------------------------------------------------------------------


@modes
def test_a_replay_holds_no_transition_that_never_was(mode: AutoresetMode) -> None:
    env = as_vec_env(sync(mode, lambda: Counter(2), lambda: Counter(5, "truncated"), lambda: Counter(1)))
    model = sb3.DQN("MlpPolicy", env, learning_starts=1000, buffer_size=300, device="cpu", seed=0)
    model.learn(90)
    buffer = model.replay_buffer
    obs, following, reward = buffer.observations[:30], buffer.next_observations[:30], buffer.rewards[:30]
    assert np.array_equal(following - obs, np.ones_like(obs))
    # The reward of step t is t and half the action, so the action is that of the transition.
    t = following[..., 0] % 10
    assert np.array_equal(reward, t + buffer.actions[:30, :, 0] / 2)
    assert np.array_equal(buffer.dones[:30].astype(bool), t == np.array([2, 5, 1]))
    assert np.array_equal(buffer.timeouts[:30].astype(bool), (t == 5) & (np.arange(3) == 1))


@modes
def test_a_rollout_bootstraps_what_was_cut(mode: AutoresetMode) -> None:
    env = as_vec_env(sync(mode, lambda: Counter(3), lambda: Counter(4, "truncated")))
    model = sb3.PPO("MlpPolicy", env, n_steps=24, batch_size=48, n_epochs=1, gamma=0.5, device="cpu", seed=0)
    with torch.no_grad():
        for p in model.policy.value_net.parameters():
            p.fill_(0.0)
        model.policy.value_net.bias.fill_(8.0)  # the value of everything
    model.policy.optimizer.param_groups[0]["lr"] = 0.0
    model.collect_rollouts(model.env, *_collecting(model))
    buffer = model.rollout_buffer
    t = buffer.observations[..., 0] % 10 + 1
    cut = (t == 4) & (np.arange(2) == 1)
    expected = t + buffer.actions[..., 0] / 2 + np.where(cut, 0.5 * 8.0, 0.0)
    assert np.array_equal(buffer.rewards, expected)
    assert np.array_equal(buffer.episode_starts[1:].astype(bool), (t == np.array([3, 4]))[:-1])
    assert cut.sum() == 6


def _collecting(model: Any) -> tuple[Any, Any, int]:
    _, callback = model._setup_learn(48)
    return callback, model.rollout_buffer, model.n_steps


@modes
def test_the_monitor_counts_episodes(mode: AutoresetMode) -> None:
    from stable_baselines3.common.vec_env import VecMonitor

    env = VecMonitor(as_vec_env(telling(mode)))
    env.reset()
    infos = [info for _ in range(6) for info in env.step(np.zeros(2, int))[3]]
    found = [(info["episode"]["r"], info["episode"]["l"]) for info in infos if "episode" in info]
    assert found == [(3, 2), (6, 3), (3, 2), (3, 2), (6, 3)]


def test_statistics_of_gymnasiums_wrapper_arrive() -> None:
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(telling(AutoresetMode.SAME_STEP))
    env = as_vec_env(wrapped)
    env.reset()
    infos = [info for _ in range(3) for info in env.step(np.zeros(2, int))[3]]
    assert [info["episode"]["r"] for info in infos if "episode" in info] == [3, 6]


# ---- reaching inside -----------------------------------------------------------------------------------------------------


def test_parts_are_reached() -> None:
    env = as_vec_env(
        sync(
            AutoresetMode.NEXT_STEP,
            lambda: Telling(2, render_mode="rgb_array"),
            lambda: TimeLimited(Telling(3, render_mode="rgb_array")),
        )
    )
    assert env.get_attr("_length") == [2, 3]
    assert env.get_attr("_length", 1) == env.get_attr("_length", [-1]) == [3]
    assert env.env_method("length_plus", 1, times=2) == [6, 8]
    assert env.env_method("length_plus", 1, indices=[1]) == [4]
    env.set_attr("_length", 7, indices=0)
    assert env.get_attr("_length") == [7, 3]
    env.set_attr("_length", [1, 2])
    assert env.get_attr("_length") == [[1, 2], [1, 2]]
    env.set_attr("_length", 9)
    assert env.env_is_wrapped(TimeLimited) == [False, True]
    assert env.env_is_wrapped(TimeLimited, 1) == [True]
    assert env.has_attr("_length")
    assert not env.has_attr("width")
    assert env.render_mode == "rgb_array"
    env.reset()
    env.step(np.zeros(2, int))
    assert [image.mean() for image in env.get_images()] == [1, 1]
    assert env.render().shape == (4, 2, 3)
    env.close()


class TimeLimited(gymnasium.Wrapper):
    """A wrapper."""


def test_a_batch_answers_for_its_parts() -> None:
    env = as_vec_env(gymnasium.wrappers.vector.RecordEpisodeStatistics(Careless((2, 3))))
    assert env.get_attr("heeds", [1]) == [False]
    assert env.get_attr("episode_count") == [0, 0]  # of the wrapper
    env.set_attr("heeds", True)
    assert env.get_attr("heeds") == [True, True]
    assert env.env_method("double", 4) == [8, 8]
    with pytest.raises(
        UserError, match=r"indices are \[1\], but all were expected: .* is one batch without parts"
    ):
        env.set_attr("heeds", False, indices=1)
    with pytest.raises(AttributeError):
        env.get_attr("width")
    assert env.env_is_wrapped(gymnasium.wrappers.vector.RecordEpisodeStatistics) == [True, True]
    assert env.env_is_wrapped(TimeLimited, [0]) == [False]
    assert env.render_mode is None
    with pytest.warns(UserWarning, match="render_mode is None, but 'rgb_array' was expected"):
        assert env.get_images() == [None, None]


def test_seeds_and_options_count_once() -> None:
    env = as_vec_env(telling(AutoresetMode.SAME_STEP))
    assert env.seed(3) == [3, 4]
    env.set_options({"a": 1})
    env.reset()
    drawn = [info["drawn"] for info in env.reset_infos]
    assert [info["options"] for info in env.reset_infos] == [{"a": 1}, {"a": 1}]
    env.reset()
    assert [info["drawn"] for info in env.reset_infos] != drawn
    assert [info["options"] for info in env.reset_infos] == [None, None]
    env.seed(3)
    env.reset()
    assert [info["drawn"] for info in env.reset_infos] == drawn
    assert drawn == [Telling(2).reset(seed=seed)[1]["drawn"] for seed in (3, 4)]
    env.set_options([{"a": 1}, {"a": 2}])
    with pytest.raises(
        UserError, match="options differ, but the same ones for all environments were expected"
    ):
        env.reset()


# ---- what cannot be ------------------------------------------------------------------------------------------------------


def test_what_is_no_vector_environment_is_named() -> None:
    with pytest.raises(
        UserError, match=r"vector_env is a Counter, but a gymnasium.vector.VectorEnv was expected$"
    ):
        as_vec_env(Counter())  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"vector_env is a Envs, but .* was expected; of pywm.envs.Envs take .env"
    ):
        as_vec_env(make("CartPole-v1", 2))  # type: ignore[arg-type]

    class Vague(Careless):
        metadata = {}  # noqa: RUF012

    with pytest.raises(UserError, match=r"metadata\['autoreset_mode'\] is None, but a gymnasium.vector.Auto"):
        as_vec_env(Vague((1,)))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(MissingExtra, match=r'stable_baselines3 is not installed.* pip install "pywm\[sb3\]"'):
        as_vec_env(Careless((1,)))


# ---- in a dream ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "obs"),
    [
        (spaces.Discrete(3), "decoded"),
        (spaces.MultiDiscrete([2, 3]), "latent"),
        (spaces.MultiBinary(2), "decoded"),
        (spaces.Box(-2, 2, (2,), np.float32), "decoded"),
    ],
    ids=str,
)
def test_ppo_trains_inside_a_world_model(action: Any, obs: Any) -> None:
    from pywm.models.actions import ActionSpace

    space = spaces.Box(-1, 1, (4,), np.float32)
    sizes = {"deter": 32, "hidden": 16, "classes": 4, "stoch": 4, "units": 16, "depth": 4, "bins": 21}
    model = WorldModel({}, {"obs": (4,)}, ActionSpace(action).width, **sizes)
    starts = np.random.default_rng(0).uniform(-1, 1, (8, 4)).astype(np.float32)
    envs = WorldModelVectorEnv(model, space, action, starts, 4, obs=obs, max_episode_steps=10)
    agent = sb3.PPO(
        "MlpPolicy", as_vec_env(envs), n_steps=32, batch_size=64, n_epochs=2, device="cpu", seed=0
    )
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(256)
    assert agent.num_timesteps == 256
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert all(bool(p.isfinite().all()) for p in agent.policy.parameters())


def test_pictures_of_a_world_model_are_seen() -> None:
    space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    sizes = {"deter": 32, "hidden": 16, "classes": 4, "stoch": 4, "units": 16, "depth": 4, "bins": 21}
    model = WorldModel({"obs": (3, 36, 36)}, {}, 2, **sizes)
    starts = np.zeros((1, 36, 36, 3), np.uint8)
    envs = WorldModelVectorEnv(model, space, spaces.Discrete(2), starts, 2, render_mode="rgb_array")
    adapted = as_vec_env(envs)
    agent = sb3.PPO("CnnPolicy", adapted, n_steps=8, batch_size=16, n_epochs=1, device="cpu", seed=0)
    agent.learn(16)
    assert adapted.render().shape == (72, 36, 3)


def test_ppo_trains_inside_a_video_model() -> None:
    config = VideoConfig(
        (1, 36, 36), 3, hidden=8, levels=2, doublings=1, bits=8, group=4, units=8, posterior=(8, 8), done=True
    )
    starts = np.random.default_rng(0).integers(0, 255, (5, 4, 36, 36), np.uint8)
    envs = SimulatedVecEnv(
        VideoModel(config), spaces.Discrete(3), starts, 4, length=6, render_mode="rgb_array"
    )
    adapted = as_vec_env(envs)
    agent = sb3.PPO("CnnPolicy", adapted, n_steps=8, batch_size=16, n_epochs=1, device="cpu", seed=0)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(64)
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    _, _, done, infos = adapted.step(np.zeros(4, int))
    for _ in range(6):
        _, _, done, infos = adapted.step(np.zeros(4, int))
        for ended, info in zip(done, infos, strict=True):
            assert not ended or info["terminal_observation"].shape == (4, 36, 36)
    assert adapted.render().shape == (72, 72, 3)
