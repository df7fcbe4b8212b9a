"""Running statistics equal those of all rows together; nothing changes them but an update."""

from __future__ import annotations

import numpy as np
import pytest

from pywm.data import ObsNormalizer, RewardNormalizer, RunningMeanStd


@pytest.mark.parametrize("sizes", [[1] * 40, [5, 1, 30, 4], [40]])
def test_running_statistics_equal_the_whole(sizes: list[int]) -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (40, 3)) * [1.0, 10.0, 0.1]
    stats = RunningMeanStd((3,))
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        stats.update(batch)
    # The 1e-4 imagined rows of the start leave a trace of this size.
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, x.var(0), rtol=1e-3)
    assert stats.count == pytest.approx(40, abs=1e-3)


def test_large_offsets_lose_no_precision() -> None:
    x = np.random.default_rng(0).normal(1e6, 1e-2, (1000, 1))
    stats = RunningMeanStd((1,))
    stats.count = 0.0
    for batch in np.split(x, 100):
        stats.update(batch)
    np.testing.assert_allclose(stats.var, x.var(0), rtol=1e-6)


def test_observations_are_normalised_clipped_and_left_alone() -> None:
    normalizer = ObsNormalizer({"a": (2,)}, limit=5.0)
    rng = np.random.default_rng(0)
    a = rng.normal(4.0, 3.0, (2000, 2)).astype(np.float32)
    picture = np.full((2000, 1), 9, np.uint8)
    normalizer.update({"a": a, "b": picture})
    out = normalizer({"a": a, "b": picture})
    assert out["a"].dtype == np.float32
    np.testing.assert_allclose(out["a"].mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(out["a"].std(0), 1, atol=1e-2)
    assert out["b"] is picture
    assert normalizer({"a": np.full((1, 2), 1e9, np.float32)})["a"].tolist() == [[5.0, 5.0]]
    again = normalizer({"a": a, "b": picture})
    assert np.array_equal(out["a"], again["a"])


def test_observation_statistics_round_trip() -> None:
    normalizer = ObsNormalizer({"a": (2,), "b": ()})
    rng = np.random.default_rng(0)
    normalizer.update({"a": rng.normal(size=(5, 2)), "b": rng.normal(size=5)})
    other = ObsNormalizer({"a": (2,), "b": ()})
    other.load_state(normalizer.state())
    for key, x in normalizer.state().items():
        assert np.array_equal(x, other.state()[key])
    with pytest.raises(ValueError, match=r"mean is \(2,\), but \(3,\) was expected"):
        ObsNormalizer({"a": (3,)}).load_state(normalizer.state())


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return() -> None:
    rng = np.random.default_rng(0)
    reward = rng.normal(2.0, 1.0, (50, 3))
    is_last = rng.random((50, 3)) < 0.1
    normalizer = RewardNormalizer(3, discount=0.9, limit=10.0)
    running, seen = np.zeros(3), [np.zeros(0)]
    for t in range(50):
        got = normalizer(reward[t].astype(np.float32), is_last[t], np.ones(3, bool))
        running = 0.9 * running + reward[t].astype(np.float32)
        seen.append(running.copy())
        running[is_last[t]] = 0
        if t > 0:
            expected = reward[t] / np.sqrt(np.concatenate(seen).var())
            np.testing.assert_allclose(got, np.clip(expected, -10, 10), rtol=1e-3)
    assert got.dtype == np.float32


def test_reset_rows_do_not_count_for_the_reward_statistics() -> None:
    normalizers = [RewardNormalizer(1, discount=0.5) for _ in range(2)]
    true, false = np.ones(1, bool), np.zeros(1, bool)
    for normalizer in normalizers:
        normalizer(np.array([3.0]), true, true)
    normalizers[1](np.array([np.nan]), false, false)
    for normalizer in normalizers:
        normalizer(np.array([2.0]), false, true)
    states = [normalizer.state() for normalizer in normalizers]
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])


def test_reward_normaliser_round_trips_with_its_running_returns() -> None:
    normalizer = RewardNormalizer(2, discount=0.9)
    normalizer(np.array([1.0, 2.0]), np.array([False, True]), np.ones(2, bool))
    other = RewardNormalizer(2, discount=0.9)
    other.load_state(normalizer.state())
    assert other.returns.tolist() == [1.0, 0.0]
    step = np.array([5.0, 6.0]), np.zeros(2, bool), np.ones(2, bool)
    assert np.array_equal(normalizer(*step), other(*step))
    other.restart()
    assert other.returns.tolist() == [0.0, 0.0]
    assert other.stats.count == normalizer.stats.count
    with pytest.raises(ValueError, match="returns is"):
        RewardNormalizer(3, discount=0.9).load_state(normalizer.state())
