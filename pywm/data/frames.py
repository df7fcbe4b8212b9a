"""Pictures in the order in which they were seen, and windows of them that lie inside an episode."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pywm.data.memory import free_memory
from pywm.errors import CheckpointError, UserError
from pywm.types import State, StepOut

__all__ = ["Frames", "Windows"]

log = logging.getLogger(__name__)


class Windows:
    """Where the windows of :class:`Frames` begin.

    Args:
        rows: in a window.
        time, stream: ``[W]``, the first row of each and whose it is.
    """

    def __init__(self, rows: int, time: npt.NDArray[np.int64], stream: npt.NDArray[np.int64]) -> None:
        self.rows, self.time, self.stream = rows, time, stream

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, index: npt.NDArray[Any] | slice) -> Windows:
        return Windows(self.rows, self.time[index], self.stream[index])

    def apart(self) -> Windows:
        """Choose windows of a stream that do not overlap, as early as possible."""
        chosen, free = [], -1
        last = -1
        order = np.lexsort((self.time, self.stream))
        for i in order.tolist():
            if self.stream[i] != last:
                last, free = int(self.stream[i]), -1
            if self.time[i] >= free:
                chosen.append(i)
                free = int(self.time[i]) + self.rows
        return self[np.array(chosen, np.int64)]


class Frames:
    """Pictures and actions of ``N`` environments, time-major, filled once.

    Row t holds the picture of state t, the action taken there, and whether an episode began with it. The picture that an
    episode ends with is not kept, where the environment does not show it: the next row begins another one.

    Args:
        rows: T, which there is room for.
        num_envs: N.
        shape: ``[C, height, width]`` of a uint8 picture.
        actions: width A of an action.

    Attributes:
        count: rows that were written.
        size: bytes that the pictures take.

    Raises:
        UserError: there is less memory free than it takes.
    """

    def __init__(self, rows: int, num_envs: int, shape: Sequence[int], actions: int) -> None:
        self.rows, self.num_envs, self.shape, self.actions = rows, num_envs, tuple(shape), actions
        self.size = rows * num_envs * math.prod(shape)
        free = free_memory()
        if free is not None and self.size > free:
            raise UserError(
                f"Frames: {rows * num_envs:,} pictures of {' x '.join(map(str, shape))} take {_gib(self.size)}, but "
                f"{_gib(free)} of memory are free; expected fewer or smaller ones"
            )
        self._frames = torch.zeros((rows, num_envs, *shape), dtype=torch.uint8)
        self._action = torch.zeros((rows, num_envs, actions))
        self._is_first = np.zeros((rows, num_envs), bool)
        self._begins = np.ones(num_envs, bool)
        self.count = 0

    @property
    def is_full(self) -> bool:
        """Whether there is no room left."""
        return self.count == self.rows

    def add(self, frames: npt.NDArray[np.uint8], action: Tensor, out: StepOut) -> None:
        """Write a row: pictures ``[N, C, height, width]`` that were acted on, actions ``[N, A]``, and their outcome."""
        assert not self.is_full
        self._frames[self.count] = torch.from_numpy(np.ascontiguousarray(frames))
        self._action[self.count] = action
        self._is_first[self.count] = self._begins
        self._begins = out.terminated | out.truncated | ~out.valid
        self.count += 1

    def restart(self) -> None:
        """Say that all environments were reset."""
        self._begins = np.ones_like(self._begins)

    def mean(self) -> Tensor:
        """Return the mean picture ``[C, height, width]``, in [0, 1]."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for row in self._frames[: self.count]:
            total += row.sum(0, dtype=torch.float64)
        return (total / (255 * max(self.count, 1) * self.num_envs)).float()

    def windows(self, rows: int) -> Windows:
        """Return all windows of so many rows that lie inside an episode."""
        starts = self.count - rows + 1
        if starts < 1:
            empty = np.zeros(0, np.int64)
            return Windows(rows, empty, empty)
        begun = np.concatenate(
            [np.zeros((1, self.num_envs), np.int64), self._is_first[: self.count].cumsum(0)]
        )
        whole = begun[rows:] == begun[1 : starts + 1]
        time, stream = np.nonzero(whole)
        return Windows(rows, time.astype(np.int64), stream.astype(np.int64))

    def gather(self, windows: Windows) -> tuple[Tensor, Tensor]:
        """Return the pictures ``[rows, B, C, height, width]`` and the actions between them, ``[rows - 1, B, A]``."""
        steps = windows.time + np.arange(windows.rows)[:, None]
        index = torch.from_numpy(steps * self.num_envs + windows.stream)
        frames = self._frames.flatten(0, 1)[index]
        return frames, self._action.flatten(0, 1)[index[:-1]]

    def state(self) -> State:
        """Return a copy of the rows that were written."""
        tensors = {
            "frames": self._frames[: self.count].clone(),
            "action": self._action[: self.count].clone(),
            "is_first": torch.from_numpy(self._is_first[: self.count].copy()),
            "begins": torch.from_numpy(self._begins.copy()),
        }
        return State(tensors, {})

    def load_state(self, state: State) -> None:
        """Put back what ``state`` returned.

        Raises:
            CheckpointError: it is of other pictures, environments or actions, or too long; nothing was changed.
        """
        x = state.tensors
        count = len(x["frames"])
        N = self.num_envs
        expected = {
            "frames": (torch.uint8, (count, N, *self.shape)),
            "action": (torch.float32, (count, N, self.actions)),
            "is_first": (torch.bool, (count, N)),
            "begins": (torch.bool, (N,)),
        }
        for name, (dtype, shape) in expected.items():
            if x[name].dtype != dtype or tuple(x[name].shape) != shape:
                got = f"{x[name].dtype} {tuple(x[name].shape)}"
                raise CheckpointError(f"Frames.load_state: {name} is {got}, but {dtype} {shape} was expected")
        if count > self.rows:
            raise CheckpointError(
                f"Frames.load_state: frames has {count} rows, but at most {self.rows} were expected"
            )
        self._frames[:count], self._action[:count] = x["frames"], x["action"]
        self._is_first[:count] = x["is_first"].numpy()
        self._begins = x["begins"].numpy().copy()
        self.count = count


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
