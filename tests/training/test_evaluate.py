from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pywm.errors import EnvError
from pywm.training.evaluate import evaluate
from pywm.types import StepOut


class Clockwork:
    """Environment n ends every n + 1 steps with return (n + 1) times 10, plus the episode's number."""

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.seeds: list[int] = []
        self.renders = 0
        self._finished: list[Any] = [
            SimpleNamespace(return_=-99.0, length=1, env_index=0)
        ]  # of an earlier use

    def reset(self, seed: int) -> np.ndarray:
        self.seeds.append(seed)
        self.t, self.count = 0, [0] * self.num_envs
        return np.zeros((self.num_envs, 1), np.float32)

    def step(self, action: np.ndarray) -> StepOut:
        self.t += 1
        ended = np.array([self.t % (n + 1) == 0 for n in range(self.num_envs)])
        for n in np.flatnonzero(ended):
            episode = SimpleNamespace(return_=10.0 * (n + 1) + self.count[n], length=n + 1, env_index=int(n))
            self._finished.append(episode)
            self.count[n] += 1
        obs = np.zeros((self.num_envs, 1), np.float32)
        return StepOut(obs, obs[:, 0], ended, ~ended & False, obs, np.ones(self.num_envs, bool))

    def episodes(self) -> list[Any]:
        finished, self._finished = self._finished, []
        return finished

    def render(self) -> np.ndarray:
        self.renders += 1
        return np.full((2, 2, 3), self.renders, np.uint8)


class Recorder:
    def __init__(self) -> None:
        self.greedy: list[bool] = []
        self.states: list[Any] = []

    def act(
        self, obs: np.ndarray, state: Any = None, *, is_first: Any = None, greedy: bool = False
    ) -> tuple[np.ndarray, Any]:
        self.greedy.append(greedy)
        self.states.append(state)
        return np.zeros(len(obs), np.int64), (state or 0) + 1


def test_every_environment_plays_its_share() -> None:
    envs, agent = Clockwork(3), Recorder()
    result = evaluate(agent, envs, episodes=5, seed=7)
    # Shares 2, 2, 1: the first returns of each, however many more the fast ones finished.
    assert result.returns == (10.0, 11.0, 20.0, 21.0, 30.0)
    assert result.episodes == 5
    assert result.return_mean == pytest.approx(18.4)
    assert result.return_std == pytest.approx(np.std(result.returns))
    assert result.length_mean == pytest.approx((1 + 1 + 2 + 2 + 3) / 5)
    assert (result.seed, envs.seeds) == (7, [7])
    assert all(agent.greedy)
    assert agent.states == [None, 1, 2, 3]
    assert result.metrics()["eval/return_mean"] == result.return_mean


def test_fewer_episodes_than_environments() -> None:
    result = evaluate(Recorder(), Clockwork(4), episodes=2, seed=0, greedy=False)
    assert result.returns == (10.0, 20.0)


def test_frames_are_of_the_first_environment_s_first_episode() -> None:
    envs, frames = Clockwork(1), []
    evaluate(Recorder(), envs, episodes=3, seed=0, frames=frames)
    assert [int(frame[0, 0, 0]) for frame in frames] == [1]
    envs, frames = Clockwork(2), []
    envs.num_envs = 2
    evaluate(Recorder(), envs, episodes=2, seed=0, frames=frames)
    assert len(frames) == 1
    assert envs.renders == 1


def test_without_frames_nothing_is_rendered() -> None:
    envs = Clockwork(1)
    evaluate(Recorder(), envs, episodes=1, seed=0)
    assert envs.renders == 0


def test_no_episodes_and_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="evaluate: episodes is 0, but expected 1 or more"):
        evaluate(Recorder(), Clockwork(1), episodes=0, seed=0)
    with pytest.raises(ValueError, match="evaluate: max_steps is 0, but expected 1 or more"):
        evaluate(Recorder(), Clockwork(1), episodes=1, seed=0, max_steps=0)


def test_an_episode_without_an_end_is_an_error_of_the_environment() -> None:
    # Of the lengths 1, 2, 3 the last one is too long, and the others are so only together.
    evaluate(Recorder(), Clockwork(3), episodes=9, seed=0, max_steps=4)
    with pytest.raises(EnvError, match=r"an episode has not ended after 2 steps \(max_steps\)"):
        evaluate(Recorder(), Clockwork(3), episodes=9, seed=0, max_steps=2)
    # An environment that has played its share may go on.
    evaluate(Recorder(), Clockwork(4), episodes=2, seed=0, max_steps=3)


def test_progress_is_told_after_every_step() -> None:
    told: list[tuple[int, int]] = []
    evaluate(Recorder(), Clockwork(2), episodes=3, seed=0, progress=lambda *now: told.append(now))
    assert told == [(1, 2), (3, 4)]
