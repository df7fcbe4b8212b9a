"""The batched CartPole is gymnasium's, step for step and bit for bit."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from pywm.envs import Episode, make
from pywm.envs.cartpole import CartPole


def balance(obs: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """Balance well for a while and badly for another, so that episodes of all lengths occur."""
    good = (obs[:, 2] + 0.3 * obs[:, 3] + 0.05 * obs[:, 0] + 0.1 * obs[:, 1]) > 0
    return np.where(rng.random(len(obs)) < noise, rng.integers(0, 2, len(obs)), good).astype(np.int64)


@pytest.mark.parametrize("num_envs", [1, 5, 17])
def test_it_equals_gymnasium_step_for_step(num_envs: int) -> None:
    ours = CartPole(num_envs, max_episode_steps=90)
    theirs = gymnasium.make_vec(
        "CartPole-v1",
        num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        max_episode_steps=90,
    )
    rng = np.random.default_rng(0)
    obs, _ = ours.reset(seed=3)
    np.testing.assert_array_equal(obs, theirs.reset(seed=3)[0])
    fallen = timed_out = 0
    for t in range(700):
        action = balance(obs, rng, noise=0.05 if t < 300 else 0.9)
        mine, other = ours.step(action), theirs.step(action)
        for a, b in zip(mine[:4], other[:4], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        for n in np.flatnonzero(mine[2] | mine[3]):
            np.testing.assert_array_equal(mine[4]["final_obs"][n], other[4]["final_obs"][n])
        fallen, timed_out = fallen + mine[2].sum(), timed_out + mine[3].sum()
        obs = mine[0]
    assert fallen
    assert timed_out
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space


def test_the_registered_time_limit_is_kept() -> None:
    envs = make("CartPole-v1", 1, seed=0)
    assert isinstance(envs.env, CartPole)
    obs = envs.reset()
    for _ in range(500):
        obs = envs.step(balance(obs, np.random.default_rng(0), noise=0.0)).obs  # type: ignore[arg-type]
    assert envs.episodes() == [Episode(500.0, 500, 0)]


def test_variants_run_in_gymnasiums_own_class() -> None:
    assert not isinstance(make("CartPole-v1", 1, env_kwargs={"sutton_barto_reward": True}).env, CartPole)


def test_masked_and_listed_seeds() -> None:
    env = CartPole(3)
    first, _ = env.reset(seed=5)
    again, _ = env.reset(seed=[5, 6, 7])
    np.testing.assert_array_equal(first, again)
    after, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(after[[0, 2]], again[[0, 2]])
    assert not np.array_equal(after[1], again[1])
