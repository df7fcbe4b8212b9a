"""GridChase: its rules, its two forms, its pictures, and that skill pays."""

from __future__ import annotations

from collections import deque

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from pywm.envs import Envs, check_vector_env, make
from pywm.envs.grid_chase import (
    CHASER,
    FREE,
    MOVES,
    PELLETS,
    WALLS,
    GridChase,
    GridChaseVector,
    find_player,
)


def board(*cells: tuple[int, int]) -> GridChase:
    """A maze in which the player came through ``cells``, four of them."""
    env = GridChase()
    env.reset(seed=0)
    env._board.trail[0], env._board.player[0] = cells[:3], cells[3]
    env._board.pellets[0] = True
    return env


def test_it_is_batched_for_everybody_and_passes_the_check_of_vector_environments() -> None:
    assert isinstance(make("pywm/GridChase-v0", 3).env, GridChaseVector)
    theirs = gymnasium.make_vec("pywm/GridChase-v0", 3)
    assert isinstance(theirs, GridChaseVector)
    assert theirs.single_observation_space == GridChase().observation_space
    report = check_vector_env(GridChaseVector(3, max_episode_steps=20))
    assert report.ok, report


@pytest.mark.parametrize("num_envs", [1, 5])
def test_the_batch_equals_single_mazes_step_for_step(num_envs: int) -> None:
    ours = GridChaseVector(num_envs, max_episode_steps=40)
    theirs = gymnasium.make_vec(
        "pywm/GridChase-v0",
        num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        max_episode_steps=40,
    )
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    paid = caught = 0
    for _ in range(300):
        action = rng.integers(0, 4, num_envs)
        mine, other = ours.step(action), theirs.step(action)
        for a, b in zip(mine[:4], other[:4], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        for n in np.flatnonzero(mine[2] | mine[3]):
            np.testing.assert_array_equal(mine[4]["final_obs"][n], other[4]["final_obs"][n])
        paid, caught = paid + (mine[1] > 0).sum(), caught + (mine[1] < 0).sum()
    assert paid
    assert caught


def test_walls_and_edges_hold_the_player() -> None:
    env = board(*[(0, 1)] * 4)
    for move, cell in ((0, (0, 1)), (2, (0, 1)), (1, (0, 2)), (3, (0, 1))):
        env.step(move)
        assert tuple(env._board.player[0]) == cell
    assert WALLS[1, 1]


def test_the_chaser_is_where_the_player_was() -> None:
    env = board(*[(0, 3)] * 4)
    walked, followed, rewards = [(0, 3)], [], []
    for move in (2, 2, 1, 0, 0, 3, 1, 1):
        _, reward, *_ = env.step(move)
        walked.append(tuple(env._board.player[0].tolist()))
        followed.append(tuple(env._board.trail[0, 0].tolist()))
        rewards.append(reward)
    assert walked == [(0, 3), (1, 3), (2, 3), (2, 4), (2, 4), (2, 4), (2, 3), (2, 4), (2, 5)]
    assert followed == [(0, 3)] * 3 + walked[1:6]
    assert rewards == [0, 0, 0, 0, 0, 0, -1, 0]


def test_whoever_stands_still_is_caught() -> None:
    env = board((7, 4), (7, 5), (7, 6), (7, 6))
    assert [env.step(2)[1] for _ in range(4)] == [0, -1, -1, -1]
    env = board(*[(0, 1)] * 4)
    assert env.step(0)[1] == -1


def test_pellets_pay_once_and_the_last_ends() -> None:
    env = board(*[(0, 1)] * 4)
    assert env.step(3)[1:3] == (1, False)
    assert env.step(1)[1:3] == (-1, False)  # back to where the chaser waits
    assert env.step(3)[1:3] == (0, False)
    env._board.pellets[0] = [False, True, False, False]
    env._board.player[0] = (0, 6)
    assert env.step(1)[1:3] == (1, True)


def test_every_player_is_found_and_the_pictures_tell_everything() -> None:
    env, seen = board(*[(0, 1)] * 4), set()
    for player in FREE:
        for chaser in FREE:
            env._board.player[0], env._board.trail[0] = player, chaser
            picture = env._board.pictures()[0]
            seen.add(picture.tobytes())
            assert (find_player(picture.transpose(2, 0, 1)) == player).all()
            row, column = chaser * 4
            assert (tuple(picture[row, column]) == CHASER) == (player != chaser).any()
    assert len(seen) == len(FREE) ** 2
    faint = np.random.default_rng(0).normal(0, 0.1, (2, 3, 3, 32, 32))
    faint[..., 0, 8:12, 20:24] += 0.3
    assert find_player(faint).tolist() == [[[2, 5]] * 3] * 2
    with pytest.raises(ValueError, match=r"find_player: pictures is \(32, 32, 3\), but \[..., 3, 32, 32\]"):
        find_player(np.zeros((32, 32, 3)))


def greedy(env: Envs) -> np.ndarray:
    """Go the shortest way to the nearest pellet, around the chaser where that is possible."""
    board = env.env._board
    actions = []
    for n in range(env.num_envs):
        goals = {tuple(p) for p in PELLETS[board.pellets[n]].tolist()}
        start, danger = tuple(board.player[n].tolist()), tuple(board.trail[n, 1].tolist())
        queue, first = deque([start]), {start: 0}
        while queue:
            cell = queue.popleft()
            if cell in goals:
                actions.append(first[cell])
                break
            for a, (dr, dc) in enumerate(MOVES.tolist()):
                to = (cell[0] + dr, cell[1] + dc)
                inside = 0 <= to[0] < 8 and 0 <= to[1] < 8
                if inside and not WALLS[to] and to not in first and to != danger:
                    first[to] = a if cell == start else first[cell]
                    queue.append(to)
        else:
            actions.append(0)
    return np.array(actions)


def test_whoever_sees_the_way_earns_what_chance_does_not() -> None:
    returns = []
    for skilled in (True, False):
        envs, rng, finished = make("pywm/GridChase-v0", 8), np.random.default_rng(0), []
        envs.reset(0)
        while len(finished) < 16:
            envs.step(greedy(envs) if skilled else rng.integers(0, 4, 8))
            finished += envs.episodes()
        returns.append(np.mean([e.return_ for e in finished]))
    assert returns[0] > 2
    assert returns[1] < -3
