"""Our small tasks: their scores, their pictures, and that nothing but skill earns them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check

from pywm.envs import Envs, check_env, check_vector_env, make
from pywm.envs.catch import Catch, CatchVector
from pywm.envs.delayed_copy import DelayedCopy
from pywm.envs.grid import MOVES, Grid
from pywm.envs.tmaze import TMaze
from pywm.errors import UserError

Policy = Callable[[np.ndarray], np.ndarray]
IDS = ["pywm/TMaze-v0", "pywm/DelayedCopy-v0", "pywm/Grid-v0", "pywm/GridChase-v0", "pywm/Catch-v0"]


def play(envs: Envs, policy: Policy, episodes: int) -> list[Any]:
    obs, finished = envs.reset(seed=0), []
    while len(finished) < episodes:
        obs = envs.step(policy(obs)).obs
        finished += envs.episodes()
    return finished


def straight(obs: np.ndarray) -> np.ndarray:
    """Walk to the goal as the pictures ``[N, 3, height, width]`` show it."""
    places = [np.argwhere(x[k])[0] for x in obs for k in (0, 1)]
    gaps = [goal - walker for walker, goal in zip(places[::2], places[1::2], strict=True)]
    return np.array([(2 if row > 0 else 0) if row else (1 if column > 0 else 3) for row, column in gaps])


class Remember:
    def __init__(self, num_envs: int) -> None:
        self.side = np.zeros(num_envs, np.int64)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        shown = obs[:, :2].any(1)
        self.side[shown] = obs[shown, :2].argmax(1)
        return self.side


def at_random(num_envs: int, num_actions: int) -> Policy:
    rng = np.random.default_rng(0)
    return lambda _: rng.integers(0, num_actions, num_envs)


class Queue:
    """Name the symbol of ``delay`` observations ago, of ``[N, symbols + (symbols + 1)]`` one-hots."""

    def __init__(self, num_envs: int, delay: int, symbols: int = 2) -> None:
        self.queue = deque([np.zeros(num_envs, np.int64)] * (delay + 1), maxlen=delay + 1)
        self.symbols = symbols

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.queue.append(obs[:, : self.symbols].argmax(1))
        return self.queue[0]


@pytest.mark.parametrize("env_id", IDS)
def test_both_checkers_pass(env_id: str) -> None:
    report = check_env(env_id)
    assert {check.status for check in report.checks} == {"ok"}, report
    gymnasium_check(gymnasium.make(env_id, render_mode="rgb_array").unwrapped, skip_close_check=True)


def test_a_memory_finds_through_the_maze_and_nothing_else_does() -> None:
    envs = make("pywm/TMaze-v0", 8)
    finished = play(envs, Remember(8), 100)
    assert {(e.return_, e.length) for e in finished} == {(1.0, 11)}
    # Without a memory an action can depend on the junction alone, as all observations before it look alike.
    for policy in (at_random(8, 2), lambda _: np.zeros(8, np.int64), lambda _: np.ones(8, np.int64)):
        assert abs(np.mean([e.return_ for e in play(envs, policy, 800)])) < 0.15


def test_the_sign_is_seen_once_and_the_junction_at_last() -> None:
    env = TMaze(delay=3)
    seen = [env.reset(seed=1)[0]]
    for _ in range(4):
        obs, reward, terminated, truncated, _ = env.step(0)
        seen.append(obs)
        assert not truncated
    assert terminated
    assert reward in (-1, 1)
    assert np.stack(seen)[:, :2].sum(1).tolist() == [1, 0, 0, 0, 0]
    assert np.stack(seen)[:, 2].tolist() == [0, 0, 0, 1, 1]
    sides = [env.reset()[0].argmax() for _ in range(200)]
    assert 70 < sum(sides) < 130


def test_the_maze_draws_itself() -> None:
    env = TMaze(delay=3, render_mode="rgb_array")
    env.reset(seed=0)
    pictures = [env.render()]
    for _ in range(4):
        env.step(1)
        pictures.append(env.render())
    assert all(p is not None and p.shape == (48, 64, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures if p is not None}) == 5
    assert TMaze().render() is None


def test_ten_steps_of_memory_copy_all_symbols_and_nine_copy_half_of_them() -> None:
    env_id = "pywm/DelayedCopy-v0"
    best = play(make(env_id, 8), Queue(8, delay=10), 40)
    assert {(e.return_, e.length) for e in best} == {(30.0, 40)}
    short = [Queue(8, delay=delay) for delay in (0, 1, 5, 8, 9, 11)]
    for policy in (
        *short,
        lambda obs: obs[:, 3:].argmax(1),
        at_random(8, 2),
        lambda _: np.zeros(8, np.int64),
    ):
        assert np.mean([e.return_ for e in play(make(env_id, 8), policy, 400)]) == pytest.approx(15, abs=0.7)


@pytest.mark.parametrize(("symbols", "delay", "steps"), [(2, 1, 2), (3, 4, 12), (5, 10, 30)])
def test_answers_come_a_step_late_and_only_when_something_was_due(
    symbols: int, delay: int, steps: int
) -> None:
    env = DelayedCopy(symbols, delay, steps)
    obs, _ = env.reset(seed=0)
    shown, answers, rewards, truncated = [obs[0]], [obs[1]], [], False
    while not truncated:
        t = len(rewards)
        right = shown[t - delay] if t >= delay else 0
        action = right if t % 3 else (right + 1) % symbols
        obs, reward, terminated, truncated, _ = env.step(action)
        assert not terminated
        assert reward == float(t >= delay and t % 3 > 0)
        shown.append(obs[0])
        answers.append(obs[1])
        rewards.append(reward)
    assert len(rewards) == steps
    assert answers[: delay + 1] == [0] * (delay + 1)
    assert answers[delay + 1 :] == [1 + x for x in shown[: steps - delay]]


def test_the_copy_draws_itself() -> None:
    env = DelayedCopy(3, 1, 5, render_mode="rgb_array")
    env.reset(seed=0)
    pictures = [env.render()]
    for _ in range(5):
        env.step(0)
        pictures.append(env.render())
    assert all(p is not None and p.shape == (32, 48, 3) and p.dtype == np.uint8 for p in pictures)
    assert pictures[0] is not None
    assert (pictures[0][16:] == 40).all()
    assert pictures[-1] is not None
    assert not (pictures[-1][16:] == 40).all()
    assert DelayedCopy().render() is None


def test_the_straight_way_is_the_best_in_the_grid() -> None:
    envs = make("pywm/Grid-v0", 8)
    assert envs.observation_space.shape == (3, 64, 64)
    best = play(envs, straight, 800)
    assert max(e.length for e in best) <= 14
    assert all(e.return_ == pytest.approx(1 - 0.01 * e.length, abs=1e-5) for e in best)
    assert np.mean([e.return_ for e in best]) == pytest.approx(1 - 0.02 * 8 / 3, abs=0.004)
    envs = make("pywm/Grid-v0", 8)
    lucky = play(envs, at_random(8, 4), 400)
    assert max(e.length for e in lucky) == 50
    assert -0.25 < np.mean([e.return_ for e in lucky]) < 0.05


@pytest.mark.parametrize(("size", "pixels"), [(2, 16), (5, 64), (16, 16), (8, 32)])
def test_every_cell_can_be_told_apart(size: int, pixels: int) -> None:
    env = Grid(size, pixels, render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (pixels, pixels, 3)
    seen = set()
    for move in [3] * size + [0] * size + ([1] * (size - 1) + [2] + [3] * (size - 1) + [2]) * (size // 2):
        obs = env.step(move)[0]
        seen.add(obs[..., 0].tobytes())
        assert obs[..., 1].any()
        assert np.array_equal(env.render(), obs)
    assert len(seen) >= size * (size - 1)


def test_the_walls_hold_and_the_goal_ends() -> None:
    env = Grid(3, 16)
    env.reset(seed=0)
    env._walker, env._goal = (0, 0), (1, 1)
    for move in (0, 3):
        assert env.step(move)[1:4] == (-0.01, False, False)
        assert env._walker == (0, 0)
    assert env.step(1)[1:4] == (-0.01, False, False)
    obs, reward, terminated, truncated, _ = env.step(2)
    assert (reward, terminated, truncated) == (0.99, True, False)
    assert obs[8, 8].tolist() == [255, 255, 0]
    assert len(MOVES) == 4


def test_start_and_goal_differ_and_come_from_the_seed() -> None:
    env = Grid()
    starts = [env.reset(seed=i)[0] for i in range(100)]
    assert all(not (x[..., 0] & x[..., 1]).any() for x in starts)
    assert len({x.tobytes() for x in starts}) > 90
    assert all(np.array_equal(env.reset(seed=i)[0], x) for i, x in enumerate(starts))


def below(obs: np.ndarray) -> np.ndarray:
    """Go below the ball as the pictures ``[N, 1, height, width]`` show it."""
    ball = (obs[:, 0] == 255).any(1).argmax(-1)
    paddle = (obs[:, 0, -1] == 128).argmax(-1) + 1
    return np.sign(ball - paddle) + 1


def test_every_ball_can_be_caught_and_luck_catches_few() -> None:
    envs = make("pywm/Catch-v0", 8)
    assert envs.observation_space.shape == (1, 24, 24)
    best = play(envs, below, 200)
    assert {(e.return_, e.length) for e in best} == {(1.0, 22)}
    lucky = play(make("pywm/Catch-v0", 8), at_random(8, 3), 1000)
    assert -0.72 < np.mean([e.return_ for e in lucky]) < -0.55
    assert {e.return_ for e in lucky} == {-1.0, 1.0}
    for stay in (0, 1, 2):
        still = play(make("pywm/Catch-v0", 8), lambda _, a=stay: np.full(8, a), 200)
        assert np.mean([e.return_ for e in still]) < -0.4


def test_a_batch_of_balls_is_the_single_ones() -> None:
    vector, singles = CatchVector(3, render_mode="rgb_array"), [Catch("rgb_array") for _ in range(3)]
    assert check_vector_env(CatchVector(3)).ok
    obs, _ = vector.reset(seed=7)
    assert np.array_equal(obs, np.stack([env.reset(seed=7 + n)[0] for n, env in enumerate(singles)]))
    rng = np.random.default_rng(0)
    for _ in range(50):
        actions = rng.integers(0, 3, 3)
        obs, reward, terminated, truncated, info = vector.step(actions)
        for n, env in enumerate(singles):
            single, paid, ended, _, _ = env.step(actions[n])
            assert (paid, ended) == (reward[n], terminated[n])
            if ended:
                assert np.array_equal(info["final_obs"][n], single)
                single, _ = env.reset()
            assert np.array_equal(obs[n], single)
            assert np.array_equal(vector.render()[n], env.render())
        assert not truncated.any()
    assert Catch().render() is None
    assert CatchVector(1).render() is None


def test_a_ball_falls_on_from_a_saved_state() -> None:
    for source in ("pywm/Catch-v0", Catch):
        envs, other = make(source, 3), make(source, 3)
        envs.reset(0)
        for _ in range(30):
            envs.step(np.array([0, 1, 2]))
        other.reset(9)
        other.set_state(envs.get_state())
        for _ in range(30):
            a, b = envs.step(np.array([2, 1, 0])), other.step(np.array([2, 1, 0]))
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="TMaze: delay is 0, but expected 1 or more"):
        TMaze(delay=0)
    for kwargs, message in (
        ({"symbols": 1}, "symbols is 1, but expected 2 or more"),
        ({"delay": 0}, "delay is 0, but expected 1 or more"),
        ({"delay": 10, "steps": 10}, "steps is 10, but expected 11 or more"),
    ):
        with pytest.raises(UserError, match=f"DelayedCopy: {message}"):
            DelayedCopy(**kwargs)
    with pytest.raises(UserError, match="Grid: size is 1, but expected 2 or more"):
        Grid(size=1)
    for pixels in (20, 16):
        with pytest.raises(
            UserError, match=f"Grid: pixels is {pixels}, but expected a multiple of 16 from 20 on"
        ):
            Grid(size=20, pixels=pixels)
