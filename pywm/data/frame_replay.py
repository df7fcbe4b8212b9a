"""Everything that was seen of the real environment, frame by frame: windows to learn from, and stacks to start from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pywm.data.memory import free_memory
from pywm.errors import CheckpointError, UserError
from pywm.ops import sample_starts, stack_frames
from pywm.types import State

__all__ = ["FrameReplay", "FrameWindow"]

Array = npt.NDArray[Any]

STATE_FORMAT = 1


class FrameWindow(NamedTuple):
    """Windows of k frames of context and H that follow, time-major, none across a reset.

    Where an episode is younger than the context, its first frame is repeated, under actions of zeros.

    Attributes:
        frames: ``[k + H, B, C, height, width]`` uint8.
        action: ``[k + H - 1, B, A]``, row t leads from frame t to frame t + 1.
        reward: ``[H, B]`` float32, what came with each of the H frames.
        terminated: ``[H, B]`` bool, the frame is a terminal state.
        mask: ``[H, B]`` bool, the frame is there; where an episode ended before, its last frame is repeated.
    """

    frames: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    mask: Tensor


class FrameReplay:
    """All frames of ``N`` environments, from which nothing is ever dropped.

    A row is a frame with the reward that came with it and the action chosen after it, so n steps of an episode are n + 1
    rows; here an episode of two steps, then the first frame of the next one::

        row    frame   reward   is_first   is_last   terminated   action
        0      a       0        1          0         0            x
        1      b       1        0          0         0            y
        2      c       2        0          1         1            0
        3      d       0        1          …

    Args:
        size: rows of each environment to make room for; there may be more.
        num_envs: N.
        frame: ``[C, height, width]``.
        action: A, width of an action as the model takes it.
        stack: k, frames of context.

    Attributes:
        num_envs: N.
        stack: k.
        nbytes: memory of the room. The system hands it out as rows are written.

    Raises:
        UserError: there is not as much memory.
    """

    def __init__(self, size: int, num_envs: int, frame: Sequence[int], action: int, stack: int) -> None:
        for name, value in (("size", size), ("num_envs", num_envs), ("stack", stack)):
            if value < 1:
                raise ValueError(f"FrameReplay: {name} is {value}, but at least 1 was expected")
        self.num_envs, self.stack = num_envs, stack
        self._frame, self._action = tuple(frame), action
        self.nbytes = size * num_envs * (math.prod(frame) + 4 * action + 7)
        free = free_memory()
        if free is not None and self.nbytes > free:
            raise UserError(
                f"FrameReplay: size is {size * num_envs:,} frames, which take {self.nbytes / 2**30:,.2f} GiB, but "
                f"{free / 2**30:,.2f} GiB of memory are free; expected fewer steps or smaller frames"
            )
        self._columns: dict[str, Array] = {
            "frame": np.zeros((size, num_envs, *frame), np.uint8),
            "action": np.zeros((size, num_envs, action), np.float32),
            "reward": np.zeros((size, num_envs), np.float32),
            "is_first": np.zeros((size, num_envs), np.bool_),
            "is_last": np.zeros((size, num_envs), np.bool_),
            "terminated": np.zeros((size, num_envs), np.bool_),
        }
        self._count = np.zeros(num_envs, np.int64)
        self._latest = np.zeros(num_envs, np.int64)  # where the newest collection begins
        self._reward = np.zeros(num_envs, np.float32)  # that came with the frame to be written next
        self._fresh = np.ones(num_envs, np.bool_)
        self._index()

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return int(self._count.sum())

    @property
    def num_transitions(self) -> int:
        """How many windows can begin somewhere: rows that something followed on."""
        return len(self._row)

    def begin(self) -> None:
        """Begin a collection, with episodes of its own: those that run on are cut where they are."""
        self._latest[:] = self._count
        self._reward[:] = 0
        self._fresh[:] = True

    def add(
        self,
        frame: Array,
        action: Array,
        reward: Array,
        terminated: Array,
        truncated: Array,
        final: Array,
        valid: Array,
    ) -> None:
        """Write one step of all environments.

        Args:
            frame: ``[N, C, height, width]`` uint8, what was acted on.
            action: ``[N, A]``, as the model takes it.
            reward: ``[N]``, raw.
            terminated: ``[N]``.
            truncated: ``[N]``.
            final: ``[N, C, height, width]``, what the step led to.
            valid: ``[N]``, False where there was no step, but a reset.
        """
        ended = terminated | truncated
        while int(self._count.max()) + 2 > len(self._columns["frame"]):
            self._grow()
        c = self._columns
        for n in np.flatnonzero(valid).tolist():
            t = self._count[n]
            self._write(t, n, frame[n], bool(self._fresh[n]))
            c["action"][t, n] = action[n]
            self._count[n] += 1
            self._reward[n], self._fresh[n] = reward[n], False
            if ended[n]:
                self._finish(n, final[n], bool(terminated[n]))

    def end(self, frame: Array) -> None:
        """End a collection: ``frame [N, …]`` is what would have been acted on next, where an episode is running."""
        for n in np.flatnonzero(~self._fresh).tolist():
            self._finish(n, frame[n], False)
        self._index()

    def _write(self, t: int, n: int, frame: Array, is_first: bool) -> None:
        c = self._columns
        c["frame"][t, n], c["reward"][t, n], c["is_first"][t, n] = frame, self._reward[n], is_first

    def _finish(self, n: int, frame: Array, terminated: bool) -> None:
        t, c = self._count[n], self._columns
        self._write(t, n, frame, False)
        c["is_last"][t, n], c["terminated"][t, n] = True, terminated
        self._count[n] += 1
        self._reward[n], self._fresh[n] = 0, True

    def _grow(self) -> None:
        self._columns = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in self._columns.items()}

    def _index(self) -> None:
        """Find the rows that something followed on, and the first and the last row of their episodes."""
        rows, envs, firsts, lasts = ([np.zeros(0, np.int64)] for _ in range(4))
        for n in range(self.num_envs):
            count = self._count[n]
            first = np.flatnonzero(self._columns["is_first"][:count, n])
            last = np.flatnonzero(self._columns["is_last"][:count, n])
            row = np.flatnonzero(~self._columns["is_last"][:count, n])
            episode = np.searchsorted(last, row)
            rows.append(row)
            envs.append(np.full(len(row), n))
            firsts.append(first[episode])
            lasts.append(last[episode])
        self._row, self._env, self._first, self._last = map(np.concatenate, (rows, envs, firsts, lasts))

    def sample(self, batch_size: int, horizon: int, rng: np.random.Generator) -> FrameWindow:
        """Draw windows, each of whose last frames of context is any row that something followed on."""
        i = rng.integers(len(self._row), size=batch_size)
        return self._window(i, horizon)

    def _window(self, i: Array, horizon: int) -> FrameWindow:
        row, env, first, last = self._row[i], self._env[i], self._first[i], self._last[i]
        offsets = np.arange(1 - self.stack, horizon + 1)[:, None]
        wanted = row + offsets  # [k + H, B]
        rows = wanted.clip(first, last)
        c = self._columns
        action = c["action"][rows[:-1], env]
        action[wanted[:-1] < first] = 0
        ahead = rows[self.stack :]
        mask = wanted[self.stack :] <= last
        arrays = (
            c["frame"][rows, env],
            action,
            c["reward"][ahead, env],
            c["terminated"][ahead, env],
            mask,
        )
        return FrameWindow(*map(torch.from_numpy, arrays))

    def starts(self, uniform: Array, *, beginning: bool) -> Tensor:
        """Draw stacks of the newest collection, ``[B, k·C, height, width]`` uint8, none of which crosses a reset.

        Args:
            uniform: ``[B]`` in [0, 1), one number a stack.
            beginning: the first one is a true beginning of an episode, whose frame is repeated.
        """
        low, high = int(self._latest.min()), int(self._count.max())
        c, rows = self._columns, np.arange(low, high)[:, None]
        valid = (rows >= self._latest) & (rows < self._count)
        found = sample_starts(
            torch.from_numpy(uniform),
            torch.from_numpy(c["is_first"][low:high]),
            torch.from_numpy(c["is_last"][low:high]),
            stack=self.stack,
            valid=torch.from_numpy(valid),
            beginning=beginning,
        )
        N = self.num_envs
        frames = torch.from_numpy(c["frame"][low:high]).flatten(0, 1)
        return stack_frames(
            frames,
            found.row * N + found.env,
            found.first * N + found.env,
            stack=self.stack,
            stride=N,
            dtype=torch.uint8,
        )

    def state(self) -> State:
        """Return all rows. The environments must stand between two collections."""
        high = int(self._count.max())
        tensors = {name: torch.from_numpy(x[:high].copy()) for name, x in self._columns.items()}
        tensors["count"] = torch.from_numpy(self._count.copy())
        tensors["latest"] = torch.from_numpy(self._latest.copy())
        return State(tensors, {"format": STATE_FORMAT, "stack": self.stack})

    def load_state(self, state: State) -> None:
        """Put back what ``state`` returned.

        Raises:
            CheckpointError: it is of other frames, actions or environments.
        """
        if state.data.get("format") != STATE_FORMAT or state.data.get("stack") != self.stack:
            raise CheckpointError(
                f"FrameReplay.load_state: format and stack are {state.data}, but {STATE_FORMAT} and {self.stack} were "
                "expected"
            )
        high = len(state.tensors["frame"])
        for name, x in self._columns.items():
            saved = state.tensors[name].numpy()
            if saved.shape[1:] != x.shape[1:] or saved.dtype != x.dtype or len(saved) != high:
                raise CheckpointError(
                    f"FrameReplay.load_state: {name} is {saved.dtype} {saved.shape}, but {x.dtype} "
                    f"({high}, {', '.join(map(str, x.shape[1:]))}) was expected"
                )
        while high > len(self._columns["frame"]):
            self._grow()
        for name, x in self._columns.items():
            x[:high] = state.tensors[name].numpy()
        self._count[:] = state.tensors["count"].numpy()
        self._latest[:] = state.tensors["latest"].numpy()
        if int(self._count.max()) != high or (self._latest > self._count).any():
            raise CheckpointError(
                f"FrameReplay.load_state: count is {self._count}, but at most {high} was expected"
            )
        self._reward[:], self._fresh[:] = 0, True
        self._index()
