"""A video model as a vector environment: rollouts have their length, their beginnings, and the law of all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from pywm.algos import ppo
from pywm.envs import Envs, check_vector_env
from pywm.errors import UserError
from pywm.models.simulated_vec_env import SimulatedVecEnv
from pywm.models.video import VideoConfig, VideoModel
from pywm.training.run import NullRun

K, N, SIDE = 2, 4, 18
SMALL: dict[str, Any] = {
    "hidden": 8, "levels": 2, "doublings": 1, "bits": 8, "group": 4, "units": 8, "posterior": (8, 8), "frames": K,
}  # fmt: skip


def model_of(**settings: Any) -> VideoModel:
    config = VideoConfig((1, SIDE, SIDE), 3, **{**SMALL, **settings})
    return VideoModel(config, torch.Generator().manual_seed(0))


def stacks(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, K, SIDE, SIDE), np.uint8)


def simulated(length: int = 5, num_envs: int = N, starts: Any = None, **settings: Any) -> SimulatedVecEnv:
    given = stacks() if starts is None else starts
    return SimulatedVecEnv(model_of(**settings), spaces.Discrete(3), given, num_envs, length=length)


@pytest.mark.parametrize("reading", ["stacked", "recurrent"])
def test_it_keeps_every_promise_of_a_vector_environment(reading: str) -> None:
    report = check_vector_env(simulated(length=7, reading=reading, done=True))
    failed = [check for check in report.checks if check.status == "failed"]
    assert not failed, report


def test_rollouts_have_exactly_their_length_and_are_truncated() -> None:
    env = simulated(length=5)
    env.reset(seed=0)
    for t in range(1, 16):
        obs, _, terminated, truncated, info = env.step(np.zeros(N, np.int64))
        assert not terminated.any()
        assert truncated.all() == (t % 5 == 0) == truncated.any()
        assert ("final_obs" in info) == bool(truncated.any())
        if truncated.any():
            assert not np.array_equal(info["final_obs"], obs)
            given = stacks()
            assert all(any(np.array_equal(x, s) for s in given) for x in obs)


def test_the_first_row_begins_where_an_episode_does() -> None:
    asked: list[tuple[int, bool]] = []

    def starts(uniform: np.ndarray, *, beginning: bool) -> torch.Tensor:
        asked.append((len(uniform), beginning))
        return torch.zeros(len(uniform), K, SIDE, SIDE, dtype=torch.uint8)

    env = simulated(length=4, starts=starts)
    env.reset(seed=0)
    env.step(np.zeros(N, np.int64))
    env.reset(options={"reset_mask": np.array([False, True, True, False])})
    for _ in range(4):
        env.step(np.zeros(N, np.int64))
    assert asked == [(4, True), (2, False), (2, True), (2, False)]


def test_an_end_that_is_foreseen_terminates_and_begins_anew() -> None:
    env = simulated(length=5, done=True)
    with torch.no_grad():
        env.model.end.weight.zero_()
        env.model.end.bias.fill_(3.0)
    env.reset(seed=0)
    _, _, terminated, truncated, info = env.step(np.zeros(N, np.int64))
    assert terminated.all()
    assert not truncated.any()
    assert info["_final_obs"].all()


def test_observations_are_the_newest_frames_and_actions_matter() -> None:
    env = simulated()
    first, _ = env.reset(seed=0)
    kept = first.copy()
    second, reward, *_ = env.step(np.zeros(N, np.int64))
    assert np.array_equal(second[:, 0], first[:, 1])
    assert np.array_equal(first, kept)
    assert set(reward.tolist()) <= {-1.0, 0.0, 1.0}
    env.reset(seed=0)
    other, *_ = env.step(np.ones(N, np.int64))
    assert not np.array_equal(other[:, 1], second[:, 1])


def test_rows_do_not_depend_on_each_other() -> None:
    one, other = simulated(), simulated()
    a, b = one.reset(seed=[1, 2, 3, 4])[0], other.reset(seed=[1, 2, 8, 9])[0]
    for _ in range(7):
        assert np.array_equal(a[:2], b[:2])
        a, b = one.step(np.array([1, 2, 0, 0]))[0], other.step(np.array([1, 2, 1, 2]))[0]
    assert not np.array_equal(a[2:], b[2:])


@pytest.mark.parametrize("reading", ["stacked", "recurrent"])
def test_it_goes_on_from_a_saved_state(reading: str) -> None:
    envs, other = (Envs(simulated(reading=reading)) for _ in range(2))
    assert envs.restorable
    envs.reset(0)
    actions = np.random.default_rng(0).integers(0, 3, (12, N))
    for action in actions[:3]:
        envs.step(action)
    other.reset(5)
    other.set_state(envs.get_state())
    for action in actions[3:]:
        a, b = envs.step(action), other.step(action)
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_ppo_trains_in_it_and_sees_beyond_the_cut() -> None:
    """With rewards of 1 for ever a value beyond the length of a rollout shows that the cut is bootstrapped."""
    env = simulated(length=5)
    with torch.no_grad():
        env.model.reward.weight.zero_()
        env.model.reward.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    config = ppo.Config(
        steps=4000, num_envs=N, num_steps=5, batch_size=20, epochs=4, lr=3e-3, discount=0.9, anneal_lr=False,
        normalize_advantage="none", max_grad_norm=None,
    )  # fmt: skip
    envs = Envs(env)
    agent = ppo.Agent(config, envs.observation_space, envs.action_space)
    learner, run = ppo.Learner(agent, envs), NullRun()
    before = agent.parameters.data.clone()
    learner.start_episodes(run)
    for _ in range(40):
        batch = learner.collect(run)
        learner.update(batch, run)
    assert batch.num_rows == 20
    assert not torch.equal(before, agent.parameters.data)
    # Without the bootstrap no state is worth more than 1 + 0.9 + … + 0.9^4 = 4.1; with it, 10.
    assert float(batch.metrics["value/mean"]) > 5


def test_pictures_are_shown() -> None:
    env = SimulatedVecEnv(model_of(), spaces.Discrete(3), stacks(), 2, render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    pictures = env.render()
    assert pictures is not None
    assert pictures[1].shape == (SIDE, SIDE, 3)
    assert np.array_equal(pictures[1][..., 0], obs[1, -1])
    assert simulated().render() is None


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_envs": 0}, "num_envs is 0, but at least 1 was expected"),
        ({"length": 0}, "length is 0, but at least 1 was expected"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a Linear, but a VideoModel was expected"),
        ({"action_space": spaces.Discrete(2)}, r"of width 2, but one of width 3, the model's, was expected"),
        (
            {"starts": stacks()[:, :1]},
            r"starts is uint8 \[6, 1, 18, 18\], but uint8 \[M, 2, 18, 18\] was expected",
        ),
        ({"render_mode": "human"}, "render_mode is 'human', but 'rgb_array' or None was expected"),
    ]
    for change, message in cases:
        arguments = {
            "model": model_of(), "action_space": spaces.Discrete(3), "starts": stacks(), "num_envs": 2, **change
        }  # fmt: skip
        with pytest.raises(UserError, match=message):
            SimulatedVecEnv(**arguments)
    env = simulated()
    with pytest.raises(UserError, match="no rollout is running"):
        env.step(np.zeros(N, np.int64))
    env.reset()
    with pytest.raises(ValueError, match="there are 3 actions, but 4 were expected"):
        env.step(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="an element of Discrete"):
        env.step(np.full(N, 3))
