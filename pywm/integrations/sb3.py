"""Stable-Baselines3 on gymnasium's vector environments.

SB3 resets an environment in the step that ends its episode: ``step`` returns the next episode's first observation, the info
holds the last one. What each of gymnasium's autoreset modes needs for that, told by an episode ``a b c`` before ``d``::

    source       rows of obs              what the adapter does                        SB3: obs    terminal_observation
    SAME_STEP    a  b  d                  takes c from info["final_obs"]               a  b  d     .  .  c
    DISABLED     a  b  c | reset: d       resets what ended                            a  b  d     .  .  c
    NEXT_STEP    a  b  c  d               resets what ended, before the step that      a  b  d     .  .  c
                                          would have done it and ignored an action

So no step is ever spent on a reset, and no transition from c to d, which never was, reaches an agent.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from pywm.errors import EnvError, UserError, require_extra

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

__all__ = ["as_vec_env"]

Indices = None | int | Iterable[int]


def as_vec_env(vector_env: VectorEnv[Any, Any, Any]) -> VecEnv:
    """Show a gymnasium vector environment to Stable-Baselines3.

    ::

        model = stable_baselines3.PPO("MlpPolicy", as_vec_env(WorldModelVectorEnv.from_run(run, 16)))

    Episodes' returns are what SB3's ``VecMonitor`` counts: wrap the result in one to see them.

    ``get_attr``, ``set_attr``, ``env_method`` and ``env_is_wrapped`` reach the single environments of ``SyncVectorEnv`` and
    ``AsyncVectorEnv``. An environment that is one batch has no parts: its own attribute or method stands for each of them
    (a method is called once), and an attribute can only be set for all at a time.

    Args:
        vector_env: any of gymnasium's vector environments, in any autoreset mode. In ``NEXT_STEP`` and ``DISABLED`` it must
            be able to reset some environments and leave the others alone (``reset(options={"reset_mask": ...})``), as
            gymnasium's ``SyncVectorEnv`` and ``AsyncVectorEnv`` are; its ``CartPoleVectorEnv`` is not, and is refused
            when the first episode ends.

    Returns:
        The adapter, a ``stable_baselines3.common.vec_env.VecEnv``. Rewards are float32, arrays are copies. It raises
        :class:`pywm.errors.EnvError` where the environment breaks its autoreset mode.

    Raises:
        MissingExtra: Stable-Baselines3 is not installed.
        UserError: this is no vector environment, or it does not say its autoreset mode.
    """
    require_extra("stable_baselines3", "sb3")
    if not isinstance(vector_env, VectorEnv):
        hint = "; of pywm.envs.Envs take .env" if hasattr(vector_env, "env") else ""
        raise UserError(
            f"as_vec_env: vector_env is a {type(vector_env).__name__}, but a gymnasium.vector.VectorEnv was expected{hint}"
        )
    mode = vector_env.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise UserError(
            f"as_vec_env: metadata['autoreset_mode'] is {mode!r}, but a gymnasium.vector.AutoresetMode was expected"
        )
    adapter: VecEnv = _adapter()(vector_env, mode)
    return adapter


@functools.cache
def _adapter() -> Any:
    """Put the methods below onto SB3's base class, which is not there before it is imported."""
    from stable_baselines3.common.vec_env import VecEnv

    return type("GymnasiumVecEnv", (_Adapter, VecEnv), {"__doc__": _Adapter.__doc__, "__module__": __name__})


class _Adapter:
    """A gymnasium vector environment as a ``VecEnv``; see :func:`as_vec_env`."""

    num_envs: int
    reset_infos: list[dict[str, Any]]
    render_mode: str | None
    _seeds: list[int | None]
    _options: list[dict[str, Any]]
    _reset_seeds: Any
    _reset_options: Any
    _get_indices: Any

    def __init__(self, venv: VectorEnv[Any, Any, Any], mode: AutoresetMode) -> None:
        self.venv, self._mode = venv, mode
        self._actions: Any = None
        super().__init__(venv.num_envs, venv.single_observation_space, venv.single_action_space)  # type: ignore[call-arg]

    # ---- playing

    def reset(self) -> Any:
        """Begin an episode everywhere, with the seeds of ``seed`` and the options of ``set_options``, once."""
        options = self._options[0]
        if any(other != options for other in self._options):
            raise UserError(
                "VecEnv.reset: options differ, but the same ones for all environments were expected"
            )
        # SB3 counts seeds up from the first, and so does gymnasium; not every environment takes a list.
        obs, info = self.venv.reset(seed=self._seeds[0], options=dict(options) or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_info_of(info, n, self.num_envs) for n in range(self.num_envs)]
        return _copy(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions; ``step_wait`` takes the step."""
        # Policies over bits give floats.
        self._actions = np.asarray(actions).astype(self.venv.single_action_space.dtype, copy=False)

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step everything; begin the next episode where one ended."""
        raw, rewards, terminations, truncations, info = self.venv.step(self._actions)
        obs, reward = _copy(raw), np.array(rewards, dtype=np.float32)
        terminated, truncated = np.array(terminations, dtype=bool), np.array(truncations, dtype=bool)
        ended = terminated | truncated
        infos = [_info_of(info, n, self.num_envs) for n in range(self.num_envs)]
        rows = np.flatnonzero(ended).tolist()
        if rows:
            if self._mode is AutoresetMode.SAME_STEP:
                last = self._last_ones(info, rows)
                for n in rows:
                    # Of this step is the final info; what stands beside it is of the reset, and what wrappers have added.
                    self.reset_infos[n] = infos[n]
                    infos[n] = {**infos[n], **_final_info_of(info, n, self.num_envs)}
            else:
                last = {n: _rows(obs, n) for n in rows}
                obs = self._reset_ended(obs, ended, rows)
            for n in rows:
                infos[n]["terminal_observation"] = last[n]
        for n, cut in enumerate((truncated & ~terminated).tolist()):
            infos[n]["TimeLimit.truncated"] = cut
        return obs, reward, ended, infos

    def _last_ones(self, info: dict[str, Any], rows: list[int]) -> dict[int, Any]:
        if "final_obs" not in info:
            raise EnvError(f"{self.venv} ended an episode in SAME_STEP mode without info['final_obs']")
        return {n: _copy(_rows(info["final_obs"], n)) for n in rows}

    def _reset_ended(self, obs: Any, ended: np.ndarray, rows: list[int]) -> Any:
        raw, info = self.venv.reset(options={"reset_mask": ended.copy()})
        after = _copy(raw)
        if not _same(_rows(obs, ~ended), _rows(after, ~ended)):
            raise EnvError(
                f"{self.venv} in {self._mode.name} mode was told to reset the environments {rows}, but others changed. "
                "Make it with autoreset_mode=AutoresetMode.SAME_STEP (gymnasium.make_vec: "
                'vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})'
            )
        for n in rows:
            self.reset_infos[n] = _info_of(info, n, self.num_envs)
        return after

    def close(self) -> None:
        """Close the environment."""
        self.venv.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return a picture of each environment, None where it draws nothing."""
        if self.render_mode != "rgb_array":
            warnings.warn(f"render_mode is {self.render_mode!r}, but 'rgb_array' was expected", stacklevel=2)
            return [None] * self.num_envs
        frames: Any = self.venv.render()
        return [None] * self.num_envs if frames is None else list(frames)

    # ---- reaching inside

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute of each environment."""
        chosen, inner = self._chosen(indices), self._inner("get_attr")
        if inner is None:
            return [getattr(self._holder(attr_name), attr_name)] * len(chosen)
        values = inner(attr_name)
        return [values[n] for n in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute of each environment."""
        chosen, inner = self._chosen(indices), self._inner("set_attr")
        everywhere = len(set(chosen)) == self.num_envs
        if inner is not None:
            values = [value] * self.num_envs if everywhere else self.get_attr(attr_name)
            for n in chosen:
                values[n] = value
            inner(attr_name, values)
        elif everywhere:
            setattr(self._holder(attr_name), attr_name, value)
        else:
            raise UserError(
                f"VecEnv.set_attr: indices are {chosen}, but all were expected: {self.venv} is one batch without parts"
            )

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of each environment."""
        chosen, inner = self._chosen(indices), self._inner("call")
        parts = getattr(self.venv.unwrapped, "envs", None)
        if parts is not None:
            methods = [parts[n].get_wrapper_attr(method_name) for n in chosen]
            return [method(*method_args, **method_kwargs) for method in methods]
        if inner is None:
            method = getattr(self._holder(method_name), method_name)
            return [method(*method_args, **method_kwargs)] * len(chosen)
        if len(set(chosen)) < self.num_envs:
            raise UserError(
                f"VecEnv.env_method: indices are {chosen}, but all were expected: {self.venv} calls all or none"
            )
        values = inner(method_name, *method_args, **method_kwargs)
        return [values[n] for n in chosen]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """Say of each environment whether it is in such a wrapper, alone or with the others."""
        from stable_baselines3.common.env_util import is_wrapped

        chosen = self._chosen(indices)
        if any(isinstance(layer, wrapper_class) for layer in self._layers()):
            return [True] * len(chosen)
        parts = getattr(self.venv.unwrapped, "envs", None)
        return [parts is not None and is_wrapped(parts[n], wrapper_class) for n in chosen]

    def _chosen(self, indices: Indices) -> list[int]:
        return [range(self.num_envs)[n] for n in self._get_indices(indices)]

    def _layers(self) -> list[Any]:
        """Return the vector environment's wrappers, from outside in, and itself."""
        layers: list[Any] = [self.venv]
        while layers[-1] is not self.venv.unwrapped:
            layers.append(layers[-1].env)
        return layers

    def _holder(self, name: str) -> Any:
        """Return the outermost layer of one batch that has an attribute; gymnasium's vector wrappers pass none on."""
        layers = self._layers()
        return next((layer for layer in layers if hasattr(layer, name)), layers[-1])

    def _inner(self, name: str) -> Any:
        """Return the method with which the environment reaches its parts, or None where it has none."""
        return getattr(self.venv.unwrapped, name, None)


def _copy(obs: Any) -> Any:
    if isinstance(obs, Mapping):
        return {key: _copy(part) for key, part in obs.items()}
    return tuple(_copy(part) for part in obs) if isinstance(obs, tuple) else np.array(obs)


def _rows(obs: Any, n: int | np.ndarray) -> Any:
    if isinstance(obs, Mapping):
        return {key: _rows(part, n) for key, part in obs.items()}
    return tuple(_rows(part, n) for part in obs) if isinstance(obs, tuple) else obs[n]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _info_of(info: Mapping[str, Any], n: int, N: int) -> dict[str, Any]:
    """Return what gymnasium's dict of arrays says of environment ``n``; ``_key`` tells who has a ``key``."""
    found: dict[str, Any] = {}
    for key, value in info.items():
        if key.startswith("_") or key in ("final_obs", "final_info"):
            continue
        if f"_{key}" in info and not info[f"_{key}"][n]:
            continue
        if isinstance(value, Mapping):
            found[key] = _info_of(value, n, N)
        else:
            found[key] = value[n] if isinstance(value, np.ndarray) and value.shape[:1] == (N,) else value
    return found


def _final_info_of(info: Mapping[str, Any], n: int, N: int) -> dict[str, Any]:
    final = info.get("final_info")
    if isinstance(final, Mapping):
        return _info_of(final, n, N)
    return {} if final is None or final[n] is None else dict(final[n])
