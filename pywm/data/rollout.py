"""Storage of one on-policy rollout: allocated once, written step by step, read as ``[T, N]`` tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["FinalObs", "Rollout", "Slot"]

Batch = Mapping[str, npt.NDArray[np.generic]]


class Slot(NamedTuple):
    """Shape (of one environment's entry) and dtype of a stored quantity."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class FinalObs(NamedTuple):
    """Last observations of the episodes that were cut during a rollout.

    Attributes:
        row: flat indices ``t·N + n`` of the transitions that led to them, int64 ``[R]``.
        obs: ``key -> [R, ...]``.
    """

    row: Tensor
    obs: dict[str, Tensor]


class Rollout:
    """``T`` steps of ``N`` environments, time-major.

    ::

        obs      0 ──────► 1 ──────► 2   …   T          T+1 rows
        action   0         1         2   …  (T-1)       taken in obs t           : T rows
        reward, terminated, truncated, valid of the transition t → t+1           : T rows

    Each observation is stored once, in the dtype it came in: ``obs[t+1]`` is what to act on next, which after the end
    of an episode is the next one's first. The true successor is kept only where an episode was cut.

    Args:
        num_steps: ``T``.
        num_envs: ``N``.
        obs: key to shape and dtype of an observation.
        device: where observations live; rewards and masks are gathered on the host, as they come from there.

    Attributes:
        obs: ``key -> [T+1, N, ...]``.
        rows: ``rows[t]`` is ``key -> [N, ...]``, views of row ``t``.
        reward: float32 array ``[T, N]``, on the host, as are ``terminated``, ``truncated`` and ``valid`` (bool).
    """

    def __init__(
        self,
        num_steps: int,
        num_envs: int,
        *,
        obs: Mapping[str, Slot],
        device: torch.device | str = "cpu",
    ) -> None:
        T, N = num_steps, num_envs
        self.num_steps, self.num_envs = T, N
        self.device = torch.device(device)
        self.obs = {
            key: torch.zeros((T + 1, N, *slot.shape), dtype=slot.dtype, device=device)
            for key, slot in obs.items()
        }
        self.rows = [{key: x[t] for key, x in self.obs.items()} for t in range(T + 1)]
        self.reward: npt.NDArray[np.float32] = np.zeros((T, N), np.float32)
        self.terminated: npt.NDArray[np.bool_] = np.zeros((T, N), np.bool_)
        self.truncated: npt.NDArray[np.bool_] = np.zeros((T, N), np.bool_)
        self.valid: npt.NDArray[np.bool_] = np.ones((T, N), np.bool_)
        # On the CPU a NumPy view makes writing an observation one copy with a cast, without any torch call.
        on_host = self.device.type == "cpu"
        self._views = {key: x.numpy() for key, x in self.obs.items()} if on_host else {}
        self._final: list[tuple[int, npt.NDArray[np.intp], dict[str, npt.NDArray[np.generic]]]] = []

    def write_obs(self, t: int, obs: Batch) -> None:
        """Store the observations ``key -> [N, ...]`` as row ``t``."""
        if self._views:
            for key, view in self._views.items():
                view[t] = obs[key]
        else:
            for key, x in self.rows[t].items():
                x.copy_(torch.from_numpy(np.ascontiguousarray(obs[key])), non_blocking=True)

    def write_step(
        self,
        t: int,
        reward: npt.NDArray[np.floating],
        terminated: npt.NDArray[np.bool_],
        truncated: npt.NDArray[np.bool_],
        valid: npt.NDArray[np.bool_],
    ) -> None:
        """Store the ``[N]`` results of transition ``t``."""
        self.reward[t], self.terminated[t] = reward, terminated
        self.truncated[t], self.valid[t] = truncated, valid

    def write_final(self, t: int, final_obs: Batch, envs: npt.NDArray[np.intp]) -> None:
        """Keep the last observations of the environments ``envs``, whose episodes were cut in transition ``t``."""
        self._final.append((t, envs, {key: final_obs[key][envs] for key in self.obs}))

    def final_obs(self) -> FinalObs | None:
        """Return everything ``write_final`` kept in this rollout, or None."""
        if not self._final:
            return None
        row = np.concatenate([t * self.num_envs + envs for t, envs, _ in self._final])
        obs = {
            key: torch.from_numpy(np.concatenate([part[key] for _, _, part in self._final])).to(
                self.device, x.dtype
            )
            for key, x in self.obs.items()
        }
        return FinalObs(torch.from_numpy(row).to(self.device), obs)

    def restart(self) -> None:
        """Begin the next rollout where this one ended: its last observation becomes row 0."""
        self._final.clear()
        for x in self.obs.values():
            x[0].copy_(x[-1])

    def column(self, array: npt.NDArray[np.generic]) -> Tensor:
        """Return a host array as a tensor on the device, sharing memory where that is the host."""
        return torch.from_numpy(array).to(self.device)
