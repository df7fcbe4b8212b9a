"""Running normalisation of observations and rewards: saved in checkpoints, frozen in evaluation.

Source: OpenAI's baselines, ``VecNormalize``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["ObsNormalizer", "RewardNormalizer", "RunningMeanStd"]

Array = npt.NDArray[np.float64]


class RunningMeanStd:
    """Mean and variance of all rows seen so far, merged batch by batch (Chan et al. 1979).

    Starts as if 1e-4 rows of mean 0 and variance 1 had been seen, so that the first batch decides.

    Args:
        shape: shape of one row.
    """

    def __init__(self, shape: Sequence[int] = ()) -> None:
        self.mean: Array = np.zeros(shape)
        self.var: Array = np.ones(shape)
        self.count = 1e-4

    def update(self, x: npt.NDArray[np.floating]) -> None:
        """Take in the rows ``[B, ...]``."""
        rows = len(x)
        if rows == 0:
            return
        x = x.astype(np.float64, copy=False)
        total = self.count + rows
        if rows == 1:
            delta, spread = x[0] - self.mean, 0.0
        else:
            mean = x.mean(0)
            delta = mean - self.mean
            spread = np.square(x - mean).sum(0)
        squares = self.var * self.count + spread + np.square(delta) * (self.count * rows / total)
        self.mean = self.mean + delta * (rows / total)
        self.var = squares / total
        self.count = total

    def state(self) -> dict[str, Array]:
        """Return copies of the statistics."""
        return {"mean": np.array(self.mean), "var": np.array(self.var), "count": np.array(self.count)}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Put back what ``state`` returned."""
        if np.shape(state["mean"]) != self.mean.shape:
            raise ValueError(
                f"RunningMeanStd.load_state: mean is {np.shape(state['mean'])}, but {self.mean.shape} was expected"
            )
        self.mean = np.array(state["mean"], np.float64)
        self.var = np.array(state["var"], np.float64)
        self.count = float(state["count"])


class ObsNormalizer:
    """``clip((obs - mean) / √(var + 1e-8), ±limit)`` for each key, with statistics of all observations seen.

    Args:
        shapes: shape of an observation of each key that is normalised; other keys pass unchanged.
        limit: bound of the result; PPO takes 10.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], *, limit: float = 10.0) -> None:
        self.limit = limit
        self._stats = {key: RunningMeanStd(shape) for key, shape in shapes.items()}

    def update(self, obs: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Take in a batch of observations, ``key -> [N, ...]``."""
        for key, stats in self._stats.items():
            stats.update(obs[key].astype(np.float64))

    def __call__(self, obs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        """Return the normalised observations, float32, without changing the statistics."""
        normalized = dict(obs)
        for key, stats in self._stats.items():
            x = (obs[key].astype(np.float64) - stats.mean) / np.sqrt(stats.var + 1e-8)
            normalized[key] = np.clip(x, -self.limit, self.limit).astype(np.float32)
        return normalized

    def state(self) -> dict[str, Array]:
        """Return ``key/name`` to array."""
        return {f"{key}/{name}": x for key, s in self._stats.items() for name, x in s.state().items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Put back what ``state`` returned."""
        for key, stats in self._stats.items():
            stats.load_state({name: state[f"{key}/{name}"] for name in ("mean", "var", "count")})


class RewardNormalizer:
    """Divide rewards by the standard deviation of the running discounted return; the mean is not subtracted.

    ``G ← discount·G + reward``, the variance of all ``G`` is tracked, and ``G`` starts at 0 with every episode.

    Args:
        num_envs: environments ``N``.
        discount: γ.
        limit: bound of the result; PPO takes 10.
    """

    def __init__(self, num_envs: int, *, discount: float, limit: float = 10.0) -> None:
        self.discount, self.limit = discount, limit
        self.stats = RunningMeanStd()
        self.returns: Array = np.zeros(num_envs)

    def __call__(
        self, reward: npt.NDArray[np.floating], is_last: npt.NDArray[np.bool_], valid: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """Take in one step and return its rewards, normalised.

        Args:
            reward: ``[N]``.
            is_last: ``[N]``, the step ended an episode.
            valid: ``[N]``, False for a reset row, which is no step and is left out of the statistics.
        """
        self.returns = np.where(valid, self.discount * self.returns + reward, self.returns)
        self.stats.update(self.returns if valid.all() else self.returns[valid])
        self.returns[is_last] = 0
        scaled = reward / math.sqrt(float(self.stats.var) + 1e-8)
        clipped: npt.NDArray[np.float32] = np.clip(scaled, -self.limit, self.limit).astype(np.float32)
        return clipped

    def restart(self) -> None:
        """Begin new episodes everywhere, keeping the statistics."""
        self.returns = np.zeros_like(self.returns)

    def state(self) -> dict[str, Array]:
        """Return the statistics and the running returns."""
        return {**self.stats.state(), "returns": self.returns.copy()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Put back what ``state`` returned."""
        self.stats.load_state(state)
        if np.shape(state["returns"]) != self.returns.shape:
            raise ValueError(
                f"RewardNormalizer.load_state: returns is {np.shape(state['returns'])}, "
                f"but {self.returns.shape} was expected"
            )
        self.returns = np.array(state["returns"], np.float64)
