"""One law for every vector environment: gymnasium's three autoreset modes become ``StepOut``.

An episode of three states, ``a b c``, then ``d`` begins the next one, as each source and ``Envs`` tell it::

    source       rows of obs           where the last observation is     Envs: obs        final_obs  valid
    SAME_STEP    a  b  d               info["final_obs"]                 a  b  d          .  b  c    1 1 1
    DISABLED     a  b  c | reset: d    obs                               a  b  d          .  b  c    1 1 1
    NEXT_STEP    a  b  c  d            obs; the action before d is lost  a  b  c  d       .  b  c d  1 1 1 0

Whatever the mode, ``final_obs`` is the successor of the transition, so ``next_value = value(final_obs)``, and
rows with ``valid`` false are no transitions at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import error as gym_error
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from pywm.envs.restore import can_restore, get_sync_state, set_sync_state
from pywm.envs.spaces import ActionCheck, ObsLayout
from pywm.errors import CheckpointError, EnvError, MissingExtra, PywmError, UserError
from pywm.types import Obs, State, StepOut

__all__ = ["Envs", "Episode"]

STATE_FORMAT = 1


class Episode(NamedTuple):
    """A finished episode.

    Attributes:
        return_: undiscounted sum of the raw rewards, before any clipping.
        length: number of steps that the environment took with an action.
        env_index: which of the parallel environments played it.
    """

    return_: float
    length: int
    env_index: int


class Envs:
    """``N`` environments in lockstep under one law, whatever gymnasium's autoreset mode.

    Observations are float32 or uint8 arrays ``[N, ...]`` or flat dicts of them (``spaces.ObsLayout`` says how
    they are made), rewards float32, flags bool. No returned array is written to later.

    Args:
        env: the vector environment; closed together with this object.
        name: what messages call it.
        seed: the seed of ``reset()`` without one.
        clip_reward: give the training the sign of the reward; ``episodes`` still counts the raw one.

    Attributes:
        num_envs: ``N``.
        name: what messages call the environment.
        observation_space: of a single environment, as converted: a Box or a flat Dict of Boxes.
        originals: the environment's own space of each key of the observation; a single one is called ``"obs"``.
        action_space: of a single environment; Discrete spaces count from 0.
        restorable: whether ``get_state`` and ``set_state`` work.
        env: the vector environment itself.

    Raises:
        UserError: the spaces are not supported, or the environment does not say its autoreset mode.
    """

    def __init__(
        self, env: VectorEnv, *, name: str | None = None, seed: int = 0, clip_reward: bool = False
    ) -> None:
        # Any: what is asked of it beyond VectorEnv (get_state, envs) is checked first.
        self.env: Any = env
        self.num_envs = int(env.num_envs)
        self.name = name or default_name(env)
        self._mode = _autoreset_mode(env, self.name)
        self._seed = seed
        self._clip = clip_reward
        self._layout = ObsLayout(env.single_observation_space, self.name)
        self._check = ActionCheck(env.single_action_space, self.num_envs, self.name)
        self.observation_space: spaces.Space[Any] = self._layout.space
        self.originals = self._layout.originals
        self.action_space: spaces.Space[Any] = self._check.space
        self.restorable = _is_restorable(env)
        self._fresh = _returns_fresh_arrays(env)
        self._all_valid = np.ones(self.num_envs, dtype=bool)
        self._all_valid.flags.writeable = False
        self._obs: Obs | None = None
        self._episodes: list[Episode] = []
        self._closed = False
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._started = np.zeros(self.num_envs, dtype=np.int64)
        self._returns = np.zeros(self.num_envs, dtype=np.float64)
        self._resetting: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"Envs({self.name}, num_envs={self.num_envs}, source={self._mode.value})"

    @property
    def obs(self) -> Obs:
        """What to act on next: the last ``obs`` that ``reset``, ``step`` or ``set_state`` produced."""
        if self._obs is None:
            raise UserError("Envs.obs: the environments are fresh, but expected a call of reset() before")
        return self._obs

    def reset(self, seed: int | None = None) -> Obs:
        """Start new episodes everywhere; running ones are dropped without a record.

        Args:
            seed: seed of the first environment; environment ``n`` gets its own, derived from it.

        Returns:
            The first observations ``[N, ...]``.

        Raises:
            EnvError: an environment failed.
        """
        try:
            raw, _ = self.env.reset(seed=self._seed if seed is None else seed)
        except PywmError:
            raise
        except Exception as error:
            raise self._failure("reset", error) from error
        self._clear()
        self._obs = self._layout.convert(raw if self._fresh else _copy(raw))
        return self._obs

    def step(self, action: np.ndarray) -> StepOut:
        """Act once in every environment.

        Args:
            action: ``[N, ...]``; checked for type, shape, range and finiteness before anything is stepped.

        Returns:
            The step; see ``StepOut`` and the table above.

        Raises:
            TypeError, ValueError: the action does not fit; nothing was stepped.
            EnvError: an environment failed.
        """
        checked = self._check(action)
        try:
            raw, reward, terminated, truncated, info = self.env.step(checked)
        except PywmError:
            raise
        except Exception as error:
            raise self._failure("step", error) from error

        if not self._fresh:
            raw = _copy(raw)
            terminated, truncated = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        valid = self._all_valid
        if self._resetting is not None:
            valid = ~self._resetting
            self._started[self._resetting] = self._steps + 1
            self._resetting = None
        self._steps += 1
        self._returns += reward
        reward = (np.sign(reward) if self._clip else np.asarray(reward)).astype(np.float32)

        final_raw = raw
        ended = np.logical_or(terminated, truncated)
        if np.count_nonzero(ended):
            rows = ended.nonzero()[0].tolist()
            self._record(rows)
            if self._mode is AutoresetMode.SAME_STEP:
                final_raw = _merge_final(raw, info, rows, self.name)
            elif self._mode is AutoresetMode.NEXT_STEP:
                self._resetting = ended
            else:
                raw = self._reset_ended(ended)
        if "life_lost" in info:
            terminated = terminated | info["life_lost"]
        final_obs = obs = self._layout.convert(raw)
        if final_raw is not raw:
            final_obs = self._layout.convert(final_raw)
        self._obs = obs
        return StepOut(obs, reward, terminated, truncated, final_obs, valid)

    def episodes(self) -> list[Episode]:
        """Return the episodes that finished since the last call, in order, and forget them."""
        finished, self._episodes = self._episodes, []
        return finished

    def _record(self, rows: list[int]) -> None:
        for n in rows:
            length = self._steps - int(self._started[n])
            self._episodes.append(Episode(float(self._returns[n]), length, n))
            self._returns[n] = 0.0
            self._started[n] = self._steps

    def _reset_ended(self, ended: np.ndarray) -> Any:
        try:
            raw, _ = self.env.reset(options={"reset_mask": ended})
        except PywmError:
            raise
        except Exception as error:
            raise self._failure("reset", error) from error
        return raw if self._fresh else _copy(raw)

    def _failure(self, where: str, error: Exception) -> Exception:
        index = _failed_index(error)
        which = self.name if index is None else f"environment {index} of {self.name}"
        return missing_extra(error, self.name) or EnvError(
            f"{which} raised {type(error).__name__} in {where}: {error}{old_interface(error)}"
        )

    def get_state(self) -> State | None:
        """Return everything that the next steps depend on, bit for bit, or None where it cannot be reached.

        Contains the environments' variables and random generators, the running episodes, flags of pending
        resets, episodes not fetched yet, and the current observation.
        """
        if not self.restorable or self._obs is None:
            return None
        inner = get_sync_state(self.env) if type(self.env) is SyncVectorEnv else self.env.get_state()
        tensors = {f"env.{key}": value for key, value in inner.tensors.items()}
        for key, value in _flat(self._obs).items():
            tensors[f"obs.{key}"] = torch.from_numpy(value.copy())
        tensors["returns"] = torch.from_numpy(self._returns.copy())
        tensors["started"] = torch.from_numpy(self._started.copy())
        data = {
            "format": STATE_FORMAT,
            "name": self.name,
            "num_envs": self.num_envs,
            "mode": self._mode.value,
            "steps": self._steps,
            "resetting": None if self._resetting is None else self._resetting.tolist(),
            "episodes": [list(episode) for episode in self._episodes],
            "env": inner.data,
        }
        return State(tensors, data)

    def set_state(self, state: State) -> None:
        """Continue exactly where ``get_state`` was called; ``obs`` then holds what to act on.

        Raises:
            CheckpointError: the state is of another environment, or these cannot be restored.
        """
        if not self.restorable:
            raise CheckpointError(f"Envs.set_state: {self.name} cannot be restored")
        data = state.data
        name, mode = self.name, self._mode.value
        mine = {"format": STATE_FORMAT, "name": name, "num_envs": self.num_envs, "mode": mode}
        for key, value in mine.items():
            if data.get(key) != value:
                raise CheckpointError(f"Envs.set_state: {key} is {data.get(key)!r}, but expected {value!r}")
        inner = State(_under("env.", state.tensors), data["env"])
        if type(self.env) is SyncVectorEnv:
            self.reset()  # wrappers that insist on a reset before a step
            set_sync_state(self.env, inner)
        else:
            self.env.set_state(inner)
        self._steps = int(data["steps"])
        self._returns = state.tensors["returns"].numpy().copy()
        self._started = state.tensors["started"].numpy().copy()
        resetting = data["resetting"]
        self._resetting = None if resetting is None else np.array(resetting, dtype=bool)
        if type(self.env) is SyncVectorEnv and self._resetting is not None:
            self.env._autoreset_envs = self._resetting.copy()
        self._episodes = [Episode(float(r), int(length), int(n)) for r, length, n in data["episodes"]]
        obs = {key: state.tensors[f"obs.{key}"].numpy().copy() for key in _keys(self.observation_space)}
        self._obs = obs if isinstance(self.observation_space, spaces.Dict) else obs["obs"]
        flags = self._all_valid if self._resetting is None else self._resetting
        for key, value in {"returns": self._returns, "started": self._started, "resetting": flags}.items():
            if value.shape != (self.num_envs,):
                raise CheckpointError(
                    f"Envs.set_state: {key} has shape {value.shape}, but expected ({self.num_envs},)"
                )

    def render(self, index: int = 0) -> np.ndarray | None:
        """Return the picture ``[height, width, 3]`` of one environment, or None where it draws nothing.

        Args:
            index: which of the parallel environments.

        Raises:
            MissingExtra: the drawing library is not installed.
        """
        if self.env.render_mode is None:
            return None
        try:
            if type(self.env) is SyncVectorEnv:
                frame = self.env.envs[index].render()
            else:
                frames = self.env.render()
                frame = None if frames is None else frames[index]
        except PywmError:
            raise
        except Exception as error:
            raise self._failure("render", error) from error
        return None if frame is None else np.asarray(frame)

    def close(self) -> None:
        """Close the environments; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self.env.close()


def missing_extra(error: BaseException, name: str) -> MissingExtra | None:
    """Translate gymnasium's complaint about a missing dependency into the extra of pywm that brings it."""
    if not isinstance(error, gym_error.DependencyNotInstalled | ModuleNotFoundError):
        return None
    text = str(error).lower()
    for sign, extra in EXTRAS.items():
        if sign in text:
            install = f'pip install "pywm[{extra}]"'
            return MissingExtra(f"{name} needs a package that is missing. Install it with: {install}")
    return None


# Words in gymnasium's messages, and the extra that brings the package.
EXTRAS = {
    "box2d": "box2d",
    "mujoco": "mujoco",
    "pygame": "classic",
    "classic-control": "classic",
    "toy-text": "classic",
    "ale_py": "atari",
    "ale-py": "atari",
    "dm_control": "dmc",
    "minigrid": "minigrid",
    "crafter": "crafter",
}


def old_interface(error: Exception) -> str:
    """Return a hint at what gymnasium changed where its own code could not unpack what an environment returned, or ""."""
    if not isinstance(error, ValueError) or "values to unpack" not in str(error):
        return ""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    if not where.startswith(("gymnasium.", "pywm.envs.")):  # somebody else's mistake, about something else
        return ""
    return (
        ". Expected gymnasium's interface: step() returns obs, reward, terminated, truncated, info, and reset() "
        "obs, info (in the old gym: obs, reward, done, info, and obs)"
    )


def _failed_index(error: Exception) -> int | None:
    """Find which environment of a SyncVectorEnv raised.

    The vector environment does not say it, but its loop variable is still in the traceback; asking there
    costs nothing as long as nothing fails.
    """
    loops = (SyncVectorEnv.step.__code__, SyncVectorEnv.reset.__code__)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in loops:
            return trace.tb_frame.f_locals.get("i")
        trace = trace.tb_next
    return None


def default_name(env: VectorEnv) -> str:
    """Return what messages call a vector environment that came without a name."""
    return env.spec.id if env.spec is not None else type(env).__name__


def _autoreset_mode(env: VectorEnv, name: str) -> AutoresetMode:
    mode = env.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError:
        raise UserError(
            f"{name}: metadata['autoreset_mode'] is {mode!r}, but expected a gymnasium.vector.AutoresetMode. "
            'Add to the class: metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}'
        ) from None


def _is_restorable(env: VectorEnv) -> bool:
    if type(env) is SyncVectorEnv:
        return all(can_restore(single) for single in env.envs)
    if not getattr(env, "restorable", True):
        return False
    # Asked of the class: a wrapper passes on what it wraps, without its own state.
    return callable(getattr(type(env), "get_state", None)) and callable(getattr(type(env), "set_state", None))


def _returns_fresh_arrays(env: VectorEnv) -> bool:
    """Say whether the environment never writes again to what it returned; a copy is then not needed."""
    if type(env) in (SyncVectorEnv, AsyncVectorEnv):
        return bool(getattr(env, "copy", False))
    return bool(getattr(type(env), "returns_fresh_arrays", False))


def _copy(raw: Any) -> Any:
    if isinstance(raw, dict):
        return {key: _copy(part) for key, part in raw.items()}
    return raw.copy() if isinstance(raw, np.ndarray) else raw


def _merge_final(raw: Any, info: dict[str, Any], rows: list[int], name: str) -> Any:
    if "final_obs" not in info:
        raise EnvError(f"{name} ended an episode in SAME_STEP mode without info['final_obs']")
    merged = _copy(raw)
    # Only the rows that ended are read: the others may hold anything (None, or garbage in ALE's case).
    for n in rows:
        _put_row(merged, info["final_obs"], n)
    return merged


def _put_row(merged: Any, final: Any, n: int) -> None:
    """Write row ``n``: ``final`` is batched in the same form, or an array of single observations."""
    if not isinstance(merged, dict):
        merged[n] = final[n]
    elif isinstance(final, dict):
        for key, part in merged.items():
            if isinstance(part, dict | np.ndarray):
                _put_row(part, final[key], n)
    else:
        _put_single(merged, final[n], n)


def _put_single(merged: dict[str, Any], single: dict[str, Any], n: int) -> None:
    for key, part in merged.items():
        if isinstance(part, dict):
            _put_single(part, single[key], n)
        elif isinstance(part, np.ndarray):
            part[n] = single[key]


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _flat(obs: Obs) -> dict[str, np.ndarray]:
    return obs if isinstance(obs, dict) else {"obs": obs}


def _keys(space: spaces.Space[Any]) -> list[str]:
    return list(space.spaces) if isinstance(space, spaces.Dict) else ["obs"]
