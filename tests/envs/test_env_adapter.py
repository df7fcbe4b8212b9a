"""The one law: whatever the autoreset mode, the same transitions and the same advantages come out."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

import pywm
from pywm.envs import Envs, Episode, make
from pywm.envs.cartpole import CartPole
from pywm.envs.toy import Counter, Match
from pywm.errors import EnvError, UserError
from pywm.types import StepOut

MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED]


def play(envs: Envs, steps: int, seed: int | None = None) -> None:
    if seed is not None:
        envs.reset(seed)
    for _ in range(steps):
        envs.step(np.zeros(envs.num_envs, dtype=np.int64))


def counters(mode: AutoresetMode) -> Envs:
    """Return three: one terminates after 2 steps, one is truncated after 3, one does both after 4."""
    kinds = [(2, "terminated"), (3, "truncated"), (4, "both")]
    return Envs(SyncVectorEnv([lambda k=k: Counter(*k) for k in kinds], autoreset_mode=mode))


class Row(NamedTuple):
    obs: float
    action: int
    reward: float
    terminated: bool
    truncated: bool
    final_obs: float


def policy(obs: np.ndarray) -> np.ndarray:
    return (obs[:, 0].astype(np.int64) // 2) % 2


def value(obs: np.ndarray) -> np.ndarray:
    return np.sin(obs[..., 0] * 1.3)


def collect(envs: Envs, steps: int) -> tuple[list[list[Row]], list[list[float]]]:
    """Return, for each environment, its valid rows and their advantages up to its last finished episode."""
    obs = envs.reset(0)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("obs", "action", *StepOut._fields[1:])}
    for _ in range(steps):
        action = policy(obs)
        out = envs.step(action)
        for name, array in zip(columns, (obs, action, *out[1:]), strict=True):
            columns[name].append(array)
        obs = out.obs
    data = {name: np.stack(arrays) for name, arrays in columns.items()}
    advantage, _ = pywm.gae(
        torch.from_numpy(data["reward"]),
        torch.from_numpy(value(data["obs"])),
        torch.from_numpy(value(data["final_obs"])),
        torch.from_numpy(data["terminated"]),
        torch.from_numpy(data["truncated"]),
        valid=torch.from_numpy(data["valid"]),
    )
    rows: list[list[Row]] = []
    advantages: list[list[float]] = []
    for n in range(envs.num_envs):
        ended = data["terminated"][:, n] | data["truncated"][:, n]
        last = np.flatnonzero(ended)[-1] + 1
        keep = np.flatnonzero(data["valid"][:last, n])
        rows.append(
            [Row(*(data[name][t, n].item() for name in Row._fields)) for t in keep]  # type: ignore[call-arg]
        )
        advantages.append(advantage[keep, n].tolist())
    return rows, advantages


def test_all_modes_store_the_same_transitions_and_give_the_same_advantages() -> None:
    expected_rows, expected_advantages = collect(counters(AutoresetMode.SAME_STEP), 60)
    for mode in MODES[1:]:
        rows, advantages = collect(counters(mode), 60)
        for n in range(3):
            shared = min(len(rows[n]), len(expected_rows[n]))
            assert shared > 25
            assert rows[n][:shared] == expected_rows[n][:shared]
            np.testing.assert_allclose(advantages[n][:shared], expected_advantages[n][:shared], rtol=1e-6)


def test_the_transitions_are_those_of_the_counter() -> None:
    rows, _ = collect(counters(AutoresetMode.SAME_STEP), 9)
    assert rows[1][:4] == [
        Row(0.0, 0, 1.0, False, False, 1.0),
        Row(1.0, 0, 2.0, False, False, 2.0),
        Row(2.0, 1, 3.5, False, True, 3.0),
        Row(10.0, 1, 1.5, False, False, 11.0),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_episodes_are_counted_alike(mode: AutoresetMode) -> None:
    envs = counters(mode)
    envs.reset(0)
    ones = np.ones(3, dtype=np.int64)
    for _ in range(12):
        envs.step(ones)
    found = envs.episodes()
    assert envs.episodes() == []
    for n, length in enumerate((2, 3, 4)):
        mine = [episode for episode in found if episode.env_index == n]
        expected = Episode(length * (length + 1) / 2 + length / 2, length, n)
        lost = 1 if mode is AutoresetMode.NEXT_STEP else 0
        assert mine == [expected] * ((12 + lost) // (length + lost))


def test_valid_is_false_exactly_for_the_steps_that_only_reset() -> None:
    envs = counters(AutoresetMode.NEXT_STEP)
    envs.reset(0)
    ended = np.zeros(3, dtype=bool)
    for _ in range(20):
        out = envs.step(np.zeros(3, dtype=np.int64))
        np.testing.assert_array_equal(out.valid, ~ended)
        ended = out.terminated | out.truncated
        assert not ended[~out.valid].any()


@pytest.mark.parametrize("mode", MODES)
def test_final_obs_is_obs_where_no_episode_ended(mode: AutoresetMode) -> None:
    envs = counters(mode)
    envs.reset(0)
    for _ in range(12):
        out = envs.step(np.zeros(3, dtype=np.int64))
        running = ~(out.terminated | out.truncated)
        np.testing.assert_array_equal(out.obs[running], out.final_obs[running])


@pytest.mark.parametrize("form", ["vector", "image", "dict"])
def test_final_observations_of_every_form_agree_between_modes(form: str) -> None:
    runs = []
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        build = [lambda n=n: Match("box", form, length=2 + n) for n in range(3)]
        envs = Envs(SyncVectorEnv(build, autoreset_mode=mode))
        envs.reset(5)
        runs.append([envs.step(np.zeros((3, 2), dtype=np.float32)) for _ in range(9)])
    for a, b in zip(*runs, strict=True):
        for name in ("obs", "final_obs"):
            x, y = getattr(a, name), getattr(b, name)
            for key in x if form == "dict" else [None]:
                np.testing.assert_array_equal(*((x, y) if key is None else (x[key], y[key])))


def nested(length: int) -> gymnasium.Env:
    class Nested(gymnasium.Env):
        observation_space = spaces.Dict(
            {
                "a": spaces.Dict({"x": spaces.Box(-9.0, 9.0, (2,), np.float64), "n": spaces.Discrete(9)}),
                "say": spaces.Text(5),
            }
        )
        action_space = spaces.Discrete(2)

        def _obs(self) -> dict[str, Any]:
            return {"a": {"x": np.full(2, self.t, dtype=np.float64), "n": np.int64(self.t)}, "say": "hello"}

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.t = 0
            return self._obs(), {}

        def step(self, action: Any) -> Any:
            self.t += 1
            return self._obs(), 1.0, self.t == length, False, {}

    return Nested()


@pytest.mark.parametrize("mode", MODES)
def test_nested_dicts_are_flattened_with_their_final_observations(mode: AutoresetMode) -> None:
    envs = Envs(SyncVectorEnv([lambda: nested(2), lambda: nested(3)], autoreset_mode=mode))
    assert list(envs.observation_space.spaces) == ["a/n", "a/x"]  # type: ignore[attr-defined]
    envs.reset(0)
    envs.step(np.zeros(2, dtype=np.int64))
    out = envs.step(np.zeros(2, dtype=np.int64))
    assert out.final_obs["a/x"].dtype == np.float32
    np.testing.assert_array_equal(out.final_obs["a/x"][:, 0], [2, 2])
    np.testing.assert_array_equal(out.final_obs["a/n"].argmax(1), [2, 2])
    np.testing.assert_array_equal(out.obs["a/x"][:, 0], [2 if mode is AutoresetMode.NEXT_STEP else 0, 2])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_asynchronous_source_obeys_the_same_law() -> None:
    kinds = [(2, "terminated"), (3, "truncated"), (4, "both")]
    build = [lambda k=k: Counter(*k) for k in kinds]
    envs = Envs(AsyncVectorEnv(build, autoreset_mode=AutoresetMode.SAME_STEP))
    try:
        assert collect(envs, 15) == collect(counters(AutoresetMode.SAME_STEP), 15)
    finally:
        envs.close()


class Reusing(VectorEnv):
    """Writes every result into the same arrays, as a vector environment may."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    num_envs = 2
    single_observation_space = spaces.Box(0.0, 99.0, (1,), np.float32)
    single_action_space = spaces.Discrete(2)
    observation_space = spaces.Box(0.0, 99.0, (2, 1), np.float32)
    action_space = spaces.MultiDiscrete([2, 2])

    def __init__(self) -> None:
        self.arrays = (np.zeros((2, 1), np.float32), np.zeros(2), np.zeros(2, bool), np.zeros(2, bool))

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.arrays[0][:] = 0
        return self.arrays[0], {}

    def step(self, actions: Any) -> Any:
        for array in self.arrays[:2]:
            array += 1
        self.arrays[3][:] = self.arrays[0][:, 0] >= 3
        return *self.arrays, {"final_obs": self.arrays[0]}


def test_results_are_never_written_to_later() -> None:
    envs = Envs(Reusing())
    first = envs.reset(0)
    outs = [envs.step(np.zeros(2, dtype=np.int64)) for _ in range(3)]
    assert first.tolist() == [[0.0], [0.0]]
    assert [out.obs[0, 0] for out in outs] == [1.0, 2.0, 3.0]
    assert [out.reward[0] for out in outs] == [1.0, 2.0, 3.0]
    assert [bool(out.truncated[0]) for out in outs] == [False, False, True]


def test_types_are_the_same_for_every_source() -> None:
    for env in ("CartPole-v1", "pywm/Counter-v0", "Pendulum-v1"):
        envs = make(env, 2, seed=0)
        assert envs.reset().dtype == np.float32
        out = envs.step(np.zeros((2, *(envs.action_space.shape or ())), dtype=envs.action_space.dtype))
        assert [array.dtype for array in out] == ["f4", "f4", "?", "?", "f4", "?"]
        assert all(array.shape[0] == 2 for array in out)
        envs.close()


def test_clipped_rewards_leave_the_episode_returns_raw() -> None:
    envs = Envs(SyncVectorEnv([Counter], autoreset_mode=AutoresetMode.SAME_STEP), clip_reward=True)
    envs.reset(0)
    rewards = [envs.step(np.ones(1, dtype=np.int64)).reward[0] for _ in range(3)]
    assert rewards == [1.0, 1.0, 1.0]
    assert envs.episodes() == [Episode(1.5 + 2.5 + 3.5, 3, 0)]


def test_a_reset_drops_running_episodes() -> None:
    envs = counters(AutoresetMode.NEXT_STEP)
    envs.reset(0)
    envs.step(np.zeros(3, dtype=np.int64))
    envs.step(np.zeros(3, dtype=np.int64))
    assert len(envs.episodes()) == 1
    envs.reset(1)
    out = envs.step(np.zeros(3, dtype=np.int64))
    assert out.valid.all()
    envs.step(np.zeros(3, dtype=np.int64))
    assert envs.episodes() == [Episode(3.0, 2, 0)]


def test_seeds_decide_the_run() -> None:
    envs = make("CartPole-v1", 3, seed=7)
    a = envs.reset()
    assert not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(a, envs.reset(7))
    assert not np.array_equal(a, envs.reset(8))


class Failing(Counter):
    def __init__(self, where: str) -> None:
        super().__init__(2)
        self.where = where

    def step(self, action: Any) -> Any:
        if self.where == "step":
            raise RuntimeError("the physics exploded")
        return super().step(action)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if self.where == "reset" and seed is None:
            raise RuntimeError("the physics exploded")
        return super().reset(seed=seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["step", "reset"])
def test_a_failure_names_the_environment_and_the_cause(mode: AutoresetMode, where: str) -> None:
    build = [lambda: Counter(9), lambda: Counter(9), lambda: Failing(where)]
    envs = Envs(SyncVectorEnv(build, autoreset_mode=mode), name="my_pkg:MyEnv-v0")
    envs.reset(0)
    message = r"environment 2 of my_pkg:MyEnv-v0 raised RuntimeError in (step|reset): the physics exploded"
    with pytest.raises(EnvError, match=message) as info:
        play(envs, 4)
    assert isinstance(info.value.__cause__, RuntimeError)
    assert info.value.exit_code == 3


class OldGym(Counter):
    """With the interface that gym had before gymnasium."""

    def __init__(self, where: str) -> None:
        super().__init__(9)
        self.where = where

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if self.where == "inside":
            _, _ = [1, 2, 3]  # a mistake of its own, with the same words
        if self.where == "step":
            return obs, reward, terminated or truncated, info
        return obs, reward, terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0] if self.where == "reset" else super().reset(seed=seed)


@pytest.mark.parametrize("where", ["step", "reset", "inside"])
def test_the_interface_of_the_old_gym_is_recognised(where: str) -> None:
    envs = Envs(SyncVectorEnv([lambda: OldGym(where)] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    with pytest.raises(EnvError, match="values to unpack") as info:
        play(envs, 1, seed=0)
    hint = "Expected gymnasium's interface: step() returns obs, reward, terminated, truncated, info"
    assert (hint in str(info.value)) == (where != "inside")


def test_a_source_that_does_not_say_its_mode_is_refused() -> None:
    env = Reusing()
    env.metadata = {}
    with pytest.raises(UserError, match=r"autoreset_mode.*is None, but expected"):
        Envs(env)


def test_a_same_step_source_without_final_obs_is_an_error_of_the_environment() -> None:
    class Mute(Reusing):
        def step(self, actions: Any) -> Any:
            return *super().step(actions)[:4], {}

    envs = Envs(Mute())
    envs.reset(0)
    with pytest.raises(EnvError, match="final_obs"):
        play(envs, 4)


def test_obs_before_the_first_reset_is_an_error() -> None:
    with pytest.raises(UserError, match="reset"):
        _ = make("CartPole-v1").obs


def test_closing_twice_closes_the_source_once() -> None:
    class Closing(Reusing):
        closings = 0

        def close(self, **kwargs: Any) -> None:
            self.closings += 1

    env = Closing()
    envs = Envs(env)
    envs.close()
    envs.close()
    assert env.closings == 1


def test_the_adapter_adds_little_to_a_step() -> None:
    raw, envs = CartPole(8, max_episode_steps=10**6), Envs(CartPole(8, max_episode_steps=10**6))
    raw.reset(seed=0)
    envs.reset(0)
    action = np.array([0, 1] * 4)

    def fastest(step: Any) -> float:
        best = float("inf")
        for _ in range(300):
            start = time.perf_counter()
            step(action)
            best = min(best, time.perf_counter() - start)
        return best

    # About 4 µs on the machines this was written on; the bound leaves room for slower ones.
    assert fastest(envs.step) - fastest(raw.step) < 25e-6
