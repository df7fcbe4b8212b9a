"""Replay of sequences: one stream of rows for each environment, sampled as windows that may span episodes."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pywm.data.memory import free_memory
from pywm.data.rollout import Slot
from pywm.errors import CheckpointError, UserError
from pywm.types import Obs, State, StepOut

__all__ = ["Handles", "Replay", "Sequences"]

log = logging.getLogger(__name__)

STATE_FORMAT = 1

Array = npt.NDArray[Any]
Index = npt.NDArray[np.int64]


class Handles(NamedTuple):
    """Where sampled windows lie, for :meth:`Replay.write_back`; they stay true when rows are evicted.

    Attributes:
        env: ``[B]``, the stream.
        start: ``[B]``, how many rows of the stream came before the window's context row.
    """

    env: Index
    start: Index


class Sequences(NamedTuple):
    """Windows of ``T`` rows, time-major, and what the context row before each of them gives.

    Attributes:
        obs: ``key -> [T, B, ...]``, in the dtype in which they are stored.
        prev_action: ``[T, B, ...]``, the action that led to the row; zeros where ``is_first``.
        reward: ``[T, B]`` float32, what came with the observation; 0 where ``is_first``.
        is_first: ``[T, B]`` bool, the observation came from a reset.
        is_last: ``[T, B]`` bool, the episode ended here, for whatever reason.
        terminated: ``[T, B]`` bool, it ended in a terminal state, so that nothing follows.
        latents: ``name -> [B, ...]``, the model's state at the context row: where the recurrence starts.
        handles: for :meth:`Replay.write_back`.
    """

    obs: dict[str, Tensor]
    prev_action: Tensor
    reward: Tensor
    is_first: Tensor
    is_last: Tensor
    terminated: Tensor
    latents: dict[str, Tensor]
    handles: Handles


class Replay:
    """The last rows of every environment, from which windows of ``T + 1`` rows are drawn.

    A row is an observation with what came with it and the action chosen after it. :meth:`add` takes steps and makes
    rows of them; here an episode of two steps, then the first step of the next one, as ``pywm.envs.Envs`` gives them::

        step   acted on   action   out.reward   out.obs   out.final_obs
        1      a          x        1            b         b
        2      b          y        2            d         c               terminated
        3      d          z        0            e         e

        row    obs   reward   is_first   is_last   terminated   action   written by step
        0      a     0        1          0         0            x        1
        1      b     1        0          0         0            y        2
        2      c     2        0          1         1            0        2
        3      d     0        1          0         0            z        3

    So n steps of an episode make n + 1 rows, its true last observation is one of them, and the streams of different
    environments grow at their own pace. A source that spends a step on resetting (``out.valid``) gives the same rows.

    A sampled window takes its ``latents`` and the first ``prev_action`` from row 0, the *context*, and shows rows 1 to
    T. Here, and nowhere else, stored actions are shifted: ``prev_action[t]`` is the action of the row before::

        row           0     1     2   …   T
        obs …               1     2   …   T        T rows
        prev_action         0     1   …  T-1       T rows
        latents       0                            1 row: the model's state where the window begins

    Rows are kept until their stream has no room left; then the oldest goes. Windows begin anywhere in a stream, each
    place with equal probability, span episodes, and never reach from the newest row into the oldest.

    *Online queue*: whenever a stream has grown by ``T + 1`` rows, these are a window that waits to be sampled: first
    come, first served, before any random one. So every step is learnt from once soon after it was made.

    Args:
        size: rows of all environments together; this is the flag ``replay_size``.
        num_envs: number of streams ``N``, each of which gets ``size // N`` rows.
        length: ``T``.
        obs: key to shape and dtype of an observation; a single one is called ``"obs"``. Pictures are uint8 and kept once.
        action: shape and dtype of an action as the model takes it, so that zeros are none: a one-hot, or real numbers.
        latents: name to shape and dtype of what is kept of the model's state, as ``{"deter": Slot((D,),
            torch.float32), "stoch": Slot((S,), torch.uint8)}``; none for models without stored states.
        seed: of the random windows.
        device: where sampled tensors go; what is stored stays on the host.

    Attributes:
        num_envs: ``N``.
        length: ``T``.
        capacity: rows of a stream.
        nbytes: memory that it takes when full. The system hands it out as rows are written.
        is_first: ``[N]`` bool, whether the observation to act on next begins an episode. An agent with a memory of its
            own resets it there.

    Raises:
        UserError: there is not as much memory, or ``size`` holds no window; the message names ``replay_size``.
        ValueError: another number is out of range.

    Source:
        Hafner et al. (2025), Dreamer V3, and its code: rows, online queue, replayed latents.
    """

    def __init__(
        self,
        size: int,
        num_envs: int,
        *,
        length: int,
        obs: Mapping[str, Slot],
        action: Slot,
        latents: Mapping[str, Slot] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_envs", num_envs), ("length", length)):
            if value < 1:
                raise ValueError(f"Replay: {name} is {value}, but 1 or more was expected")
        if size < num_envs * (length + 1):
            raise UserError(
                f"replay_size is {size:,}, but expected at least {num_envs * (length + 1):,}: a window of {length + 1} "
                f"rows for each of the {num_envs} environments"
            )
        self.num_envs, self.length, self.capacity = num_envs, length, size // num_envs
        self.device = torch.device(device)
        self._latents = dict(latents or {})
        self._slots = _slots(obs, action, self._latents)
        self._obs_keys = tuple(obs)
        self.nbytes = self.measure(size, num_envs, obs=obs, action=action, latents=latents)
        log.info("%s", self.memory(size, num_envs, obs=obs, action=action, latents=latents))
        rows = self.capacity * num_envs
        try:
            # NumPy's memory, for torch fills its own where deterministic algorithms are asked for.
            self._views = {
                name: np.empty((rows, *slot.shape), _numpy_dtype(slot)) for name, slot in self._slots.items()
            }
        except MemoryError as error:
            raise UserError(f"replay_size is {size:,}, but the system refuses the memory: {error}") from error
        self._columns = {
            name: torch.from_numpy(view).view(self._slots[name].dtype) for name, view in self._views.items()
        }
        # Rows written to each stream since the beginning: row i lies in slot i % capacity.
        self._count: Index = np.zeros(num_envs, np.int64)
        self._reward: npt.NDArray[np.float32] = np.zeros(num_envs, np.float32)
        self.is_first: npt.NDArray[np.bool_] = np.ones(num_envs, np.bool_)
        self._queue: deque[tuple[int, int]] = deque()
        self._generator = np.random.Generator(np.random.PCG64(seed))

    @staticmethod
    def measure(
        size: int,
        num_envs: int,
        *,
        obs: Mapping[str, Slot],
        action: Slot,
        latents: Mapping[str, Slot] | None = None,
    ) -> int:
        """Return the bytes that a replay takes when full, without taking any; the arguments are those of the class."""
        return size // num_envs * num_envs * _row_bytes(_slots(obs, action, latents or {}))

    @classmethod
    def memory(
        cls,
        size: int,
        num_envs: int,
        *,
        obs: Mapping[str, Slot],
        action: Slot,
        latents: Mapping[str, Slot] | None = None,
    ) -> str:
        """Say how much memory a replay takes, without taking any; the arguments are those of the class.

        Raises:
            UserError: there is not as much; the message names ``replay_size``.
        """
        nbytes = cls.measure(size, num_envs, obs=obs, action=action, latents=latents)
        free, row = free_memory(), _row_bytes(_slots(obs, action, latents or {}))
        takes = f"{nbytes / 2**30:,.2f} GiB ({row:,} bytes a row)"
        if free is not None and nbytes > free:
            raise UserError(
                f"replay_size is {size:,}, which takes {takes}, but {free / 2**30:,.2f} GiB of memory are free; "
                f"expected at most {free // row:,}"
            )
        known = "" if free is None else f"; {free / 2**30:,.2f} GiB are free"
        return f"the replay of {size:,} rows takes {takes} of memory when full{known}"

    @property
    def num_rows(self) -> int:
        """How many rows are there to be read."""
        return int(np.minimum(self._count, self.capacity).sum())

    @property
    def num_windows(self) -> int:
        """How many different windows can be sampled."""
        return int(self._windows().sum())

    @property
    def num_queued(self) -> int:
        """How many windows wait in the online queue."""
        return sum(not self._is_evicted(*window) for window in self._queue)

    def _windows(self) -> Index:
        windows: Index = np.maximum(np.minimum(self._count, self.capacity) - self.length, 0)
        return windows

    def add(self, obs: Obs, action: Tensor | Array, out: StepOut, **latents: Tensor | Array) -> None:
        """Write one step of all environments: the rows acted on, and the last rows of the episodes it ended.

        Args:
            obs: ``[N, ...]`` or a dict of such arrays: what was acted on, the ``out.obs`` of the step before.
            action: ``[N, ...]``, what was chosen, as the model takes it.
            out: what ``Envs.step`` returned for it.
            **latents: ``[N, ...]``, the model's state that chose the action.

        Raises:
            TypeError: an array has a dtype that the stored one cannot hold.
            ValueError: a name is missing or unknown, or an array has another shape; nothing was written.
        """
        if obs is out.obs:
            raise ValueError(
                "Replay.add: obs is out.obs, but what was acted on, the observation before it, was expected"
            )
        results = {name: getattr(out, name) for name in ("reward", "terminated", "truncated", "valid")}
        for name, x in results.items():
            if np.shape(x) != (self.num_envs,):
                raise ValueError(
                    f"Replay.add: out.{name} is {np.shape(x)}, but ({self.num_envs},) was expected"
                )
        rows = self._obs_columns("obs", obs)
        rows["action"] = self._checked("add", "action", action, (self.num_envs,))
        rows |= self._latent_columns("add", latents, (self.num_envs,))
        ended = (out.terminated | out.truncated) & out.valid
        final = self._obs_columns("out.final_obs", out.final_obs) if ended.any() else {}

        flags = {"is_last": np.zeros_like(ended), "terminated": np.zeros_like(ended)}
        # What an environment was handed while it reset led nowhere, and what it showed then is its last row already.
        self._write(
            np.flatnonzero(out.valid), {**rows, **flags, "reward": self._reward, "is_first": self.is_first}
        )
        if final:
            # The model never saw these rows; its state there is used by nobody, as the next row begins an episode.
            blank = {name: np.zeros_like(rows[name]) for name in rows if name not in final}
            flags = {"is_first": np.zeros_like(ended), "is_last": ended, "terminated": out.terminated}
            self._write(np.flatnonzero(ended), {**blank, **final, **flags, "reward": out.reward})
        self._reward = np.where(ended | ~out.valid, 0, out.reward).astype(np.float32)
        self.is_first = ended | ~out.valid

    def _write(self, envs: npt.NDArray[np.intp], columns: Mapping[str, Array]) -> None:
        at = envs * self.capacity + self._count[envs] % self.capacity
        for name, view in self._views.items():
            view[at] = columns[name][envs]
        self._count[envs] += 1
        stride = self.length + 1
        for n in envs[self._count[envs] % stride == 0].tolist():
            self._queue.append((n, int(self._count[n]) - stride))
            while self._is_evicted(*self._queue[0]):  # never empties it: the new one is there
                self._queue.popleft()

    def _is_evicted(self, env: int, row: int) -> bool:
        return row < int(self._count[env]) - self.capacity

    def restart(self) -> None:
        """Say that all environments were reset without having ended: the rows before end aborted episodes.

        Those rows become ``is_last`` and lose the action that led nowhere.
        """
        aborted = np.flatnonzero(~self.is_first)
        at = aborted * self.capacity + (self._count[aborted] - 1) % self.capacity
        self._views["is_last"][at] = True
        self._views["action"][at] = 0
        self._reward = np.zeros_like(self._reward)
        self.is_first = np.ones_like(self.is_first)

    def sample(self, batch_size: int) -> Sequences:
        """Draw windows: first those of the online queue, then random ones, each place with equal probability.

        Args:
            batch_size: ``B``.

        Returns:
            The windows, on ``device``.

        Raises:
            ValueError: ``batch_size`` is less than 1, or there is no window yet.
        """
        if batch_size < 1:
            raise ValueError(f"Replay.sample: batch_size is {batch_size}, but 1 or more was expected")
        windows = self._windows()
        ends = np.cumsum(windows)
        if ends[-1] == 0:
            raise ValueError(
                f"Replay.sample: num_windows is 0, but a stream of at least {self.length + 1} rows was expected"
            )
        queued: list[tuple[int, int]] = []
        while self._queue and len(queued) < batch_size:
            window = self._queue.popleft()
            if not self._is_evicted(*window):
                queued.append(window)
        picked = self._generator.integers(ends[-1], size=batch_size - len(queued))
        env = np.searchsorted(ends, picked, side="right")
        oldest = np.maximum(self._count - self.capacity, 0)
        start = oldest[env] + picked - (ends - windows)[env]
        if queued:
            first = np.array(queued, np.int64)
            env, start = np.concatenate([first[:, 0], env]), np.concatenate([first[:, 1], start])
        return self._gather(Handles(env, start))

    def _gather(self, handles: Handles) -> Sequences:
        rows = self._rows_of(handles)
        shape = (self.length, len(handles.env))
        context, before, now = (torch.from_numpy(x.ravel()) for x in (rows[0], rows[:-1], rows[1:]))

        def read(name: str, index: Tensor) -> Tensor:
            return torch.index_select(self._columns[name], 0, index).to(self.device)

        def window(name: str, index: Tensor = now) -> Tensor:
            return read(name, index).view(*shape, *self._slots[name].shape)

        return Sequences(
            obs={key: window(f"obs.{key}") for key in self._obs_keys},
            prev_action=window("action", before),
            reward=window("reward"),
            is_first=window("is_first"),
            is_last=window("is_last"),
            terminated=window("terminated"),
            latents={name: read(f"latents.{name}", context) for name in self._latents},
            handles=handles,
        )

    def _rows_of(self, handles: Handles) -> Index:
        """Return the places of the windows' rows in the memory, ``[T + 1, B]``."""
        rows: Index = handles.start + np.arange(self.length + 1)[:, None]
        return handles.env * self.capacity + rows % self.capacity

    def write_back(self, handles: Handles, **latents: Tensor | Array) -> None:
        """Replace the latents of rows 1 to T by those that the model makes of them now.

        Rows that were evicted since are left out. A row of several windows gets the one that lies deepest in its window.

        Args:
            handles: of the windows.
            **latents: ``[T, B, ...]``.

        Raises:
            TypeError: an array has a dtype that the stored one cannot hold.
            ValueError: a name is missing or unknown, or an array has another shape; nothing was written.
        """
        values = self._latent_columns("write_back", latents, (self.length, len(handles.env)))
        rows = self._rows_of(handles)[1:]
        there = (
            handles.start + np.arange(1, self.length + 1)[:, None]
            >= (self._count - self.capacity)[handles.env]
        )
        for name, x in values.items():
            # NumPy assigns in order, and the last of equal indices stays.
            self._views[name][rows[there]] = x[there]

    def _obs_columns(self, argument: str, obs: Obs) -> dict[str, Array]:
        named = obs if isinstance(obs, dict) else {"obs": obs}
        if missing := [key for key in self._obs_keys if key not in named]:
            raise ValueError(
                f"Replay.add: {argument} has the keys {sorted(named)}, but {missing[0]!r} was expected, too"
            )
        return {
            f"obs.{key}": self._checked("add", f"obs.{key}", named[key], (self.num_envs,), argument)
            for key in self._obs_keys
        }

    def _latent_columns(
        self, function: str, latents: Mapping[str, Tensor | Array], lead: tuple[int, ...]
    ) -> dict[str, Array]:
        if set(latents) != set(self._latents):
            raise ValueError(
                f"Replay.{function}: the latents are {sorted(latents)}, but {sorted(self._latents)} were expected"
            )
        return {
            f"latents.{k}": self._checked(function, f"latents.{k}", x, lead, k) for k, x in latents.items()
        }

    def _checked(
        self,
        function: str,
        column: str,
        x: Tensor | Array,
        lead: tuple[int, ...],
        argument: str | None = None,
    ) -> Array:
        """Return an array that can be written to a column, or say why it cannot."""
        argument, slot = argument or column, self._slots[column]
        expected = (*lead, *slot.shape)
        if tuple(np.shape(x)) != expected:
            raise ValueError(
                f"Replay.{function}: {argument} is {tuple(np.shape(x))}, but {expected} was expected"
            )
        if slot.dtype == torch.bfloat16:  # which NumPy lacks: its bits as integers
            return torch.as_tensor(x).detach().cpu().to(torch.bfloat16).view(torch.int16).numpy()
        if isinstance(x, Tensor):
            x = x.detach().cpu()
            x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
        array, dtype = np.asarray(x), self._views[column].dtype
        if not np.can_cast(array.dtype, dtype, "same_kind" if dtype.kind == "f" else "safe"):
            raise TypeError(f"Replay.{function}: {argument} is {array.dtype}, but {dtype} was expected")
        return array

    def state(self) -> State:
        """Return a copy of everything that later samples depend on; of the rows, those that were written."""
        rows = torch.from_numpy(self._filled(self._count))
        queue = np.array(self._queue, np.int64).reshape(-1, 2)
        tensors = {f"column.{name}": torch.index_select(x, 0, rows) for name, x in self._columns.items()}
        tensors |= {
            "count": torch.from_numpy(self._count.copy()),
            "reward": torch.from_numpy(self._reward.copy()),
            "is_first": torch.from_numpy(self.is_first.copy()),
            "queue": torch.from_numpy(queue),
        }
        return State(tensors, {**self._mine(), "generator": self._generator.bit_generator.state})

    def load_state(self, state: State) -> None:
        """Put back what ``state`` returned.

        Raises:
            CheckpointError: it is damaged or of a replay with other rows, streams or windows; nothing was changed.
        """
        for key, value in self._mine().items():
            if state.data.get(key) != value:
                raise CheckpointError(
                    f"Replay.load_state: {key} is {state.data.get(key)!r}, but {value!r} was expected"
                )
        N = self.num_envs
        count = _loaded(state, "count", (N,), torch.int64)
        if len(count) and int(count.min()) < 0:
            raise CheckpointError(f"Replay.load_state: count is {count.tolist()}, but expected 0 or more")
        rows = self._filled(count.numpy())
        reward = _loaded(state, "reward", (N,), torch.float32)
        is_first = _loaded(state, "is_first", (N,), torch.bool)
        columns = {
            name: _loaded(state, f"column.{name}", (len(rows), *slot.shape), slot.dtype)
            for name, slot in self._slots.items()
        }
        queue = _loaded(state, "queue", None, torch.int64)
        if queue.ndim != 2 or queue.shape[1] != 2:
            raise CheckpointError(
                f"Replay.load_state: queue is {tuple(queue.shape)}, but [Q, 2] was expected"
            )
        for env, start in queue.tolist():
            if not (0 <= env < N and 0 <= start <= int(count[env]) - self.length - 1):
                raise CheckpointError(
                    f"Replay.load_state: queue holds row {start} of stream {env}, but no window begins there"
                )
        generator = np.random.PCG64()
        try:
            generator.state = state.data["generator"]
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(f"Replay.load_state: generator does not fit: {error}") from error

        index = torch.from_numpy(rows)
        for name, x in columns.items():
            self._columns[name].index_copy_(0, index, x.cpu())
        self._count, self._reward = count.numpy().copy(), reward.numpy().copy()
        self.is_first = is_first.numpy().copy()
        self._queue = deque((env, start) for env, start in queue.tolist())
        self._generator = np.random.Generator(generator)

    def _filled(self, count: Index) -> Index:
        """Return the places of all rows, stream after stream."""
        streams = [
            n * self.capacity + np.arange(min(end, self.capacity)) for n, end in enumerate(count.tolist())
        ]
        rows: Index = np.concatenate(streams)
        return rows

    def _mine(self) -> dict[str, Any]:
        """Return what a state must have in common with this replay."""
        return {
            "format": STATE_FORMAT,
            "num_envs": self.num_envs,
            "length": self.length,
            "replay_size": self.capacity * self.num_envs,
            "columns": {name: [list(slot.shape), str(slot.dtype)] for name, slot in self._slots.items()},
        }


def _slots(obs: Mapping[str, Slot], action: Slot, latents: Mapping[str, Slot]) -> dict[str, Slot]:
    flag = Slot((), torch.bool)
    return {
        **{f"obs.{key}": slot for key, slot in obs.items()},
        "action": action,
        "reward": Slot((), torch.float32),
        "is_first": flag,
        "is_last": flag,
        "terminated": flag,
        **{f"latents.{name}": slot for name, slot in latents.items()},
    }


def _row_bytes(slots: Mapping[str, Slot]) -> int:
    return sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in slots.values())


def _numpy_dtype(slot: Slot) -> np.dtype[Any]:
    dtype = torch.int16 if slot.dtype == torch.bfloat16 else slot.dtype
    return torch.empty(0, dtype=dtype).numpy().dtype


def _loaded(state: State, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    x = state.tensors.get(name)
    if x is None or x.dtype != dtype or (shape is not None and tuple(x.shape) != shape):
        got = "missing" if x is None else f"{x.dtype} {tuple(x.shape)}"
        raise CheckpointError(f"Replay.load_state: {name} is {got}, but {dtype} {shape or ''} was expected")
    return x.cpu()
