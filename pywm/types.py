"""Names shared by every layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

Obs = np.ndarray | dict[str, np.ndarray]
"""A batch of observations: ``[N, ...]``, or one such array for each key of a Dict space."""


class StepOut(NamedTuple):
    """One step of ``N`` environments, whatever their autoreset mode. Index ``n`` is one environment.

    Attributes:
        obs: what to act on next; after an episode's end the first observation of the next one.
        reward: ``[N]`` float32, as the training is to see it.
        terminated: ``[N]`` bool; the episode ended in a terminal state, nothing follows it.
        truncated: ``[N]`` bool; the episode was cut, its last state has a value.
        final_obs: the true successor of the transition; equal to ``obs`` where no episode ended.
        valid: ``[N]`` bool; False where the environment ignored the action because it was resetting.
    """

    obs: Obs
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_obs: Obs
    valid: np.ndarray


class State(NamedTuple):
    """What a checkpoint holds: tensors and plain JSON data, nothing that needs code to read.

    Attributes:
        tensors: flat names to tensors.
        data: JSON-serialisable values (numbers, strings, lists, dicts).
    """

    tensors: dict[str, Tensor]
    data: dict[str, Any]
