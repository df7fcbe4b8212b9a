"""Read and write the whole state of gymnasium environments, as far as it can be reached.

Restorable are the environments of gymnasium's classic control, and every environment whose unwrapped class
has ``get_state() -> State`` and ``set_state(State)`` for its own variables, under wrappers that hold no state
of their own. The random generator and the time limit are taken care of here.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv

from pywm.errors import CheckpointError
from pywm.types import State

__all__ = ["can_restore", "get_rng", "get_sync_state", "set_rng", "set_sync_state"]

# The attributes that are the state, by class. A subclass may hold more, so the class must match exactly.
CLASSIC: dict[str, tuple[str, ...]] = {
    "gymnasium.envs.classic_control.cartpole.CartPoleEnv": ("state", "steps_beyond_terminated"),
    "gymnasium.envs.classic_control.pendulum.PendulumEnv": ("state", "last_u"),
    "gymnasium.envs.classic_control.acrobot.AcrobotEnv": ("state",),
    "gymnasium.envs.classic_control.mountain_car.MountainCarEnv": ("state",),
    "gymnasium.envs.classic_control.continuous_mountain_car.Continuous_MountainCarEnv": ("state",),
}

# Wrappers without memory between steps.
STATELESS = {
    "TimeLimit",
    "OrderEnforcing",
    "PassiveEnvChecker",
    "FlattenObservation",
    "FilterObservation",
    "DtypeObservation",
    "RescaleObservation",
    "ReshapeObservation",
    "GrayscaleObservation",
    "ResizeObservation",
    "ClipAction",
    "RescaleAction",
    "ClipReward",
}


def get_rng(generator: np.random.Generator) -> dict[str, Any]:
    """Return the state of a NumPy generator as JSON data."""
    state: dict[str, Any] = _to_json(generator.bit_generator.state)
    return state


def set_rng(generator: np.random.Generator, state: dict[str, Any]) -> None:
    """Put a NumPy generator into a state of ``get_rng``."""
    kind = type(generator.bit_generator).__name__
    if state.get("bit_generator") != kind:
        raise CheckpointError(f"the saved generator is {state.get('bit_generator')}, but expected {kind}")
    generator.bit_generator.state = _from_json(state)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"array", "dtype"}:
        return np.array(value["array"], dtype=value["dtype"])
    return {key: _from_json(part) for key, part in value.items()}


def _class_name(env: gymnasium.Env) -> str:
    return f"{type(env).__module__}.{type(env).__qualname__}"


def _wrappers(env: gymnasium.Env) -> list[gymnasium.Wrapper]:
    found = []
    while isinstance(env, gymnasium.Wrapper):
        found.append(env)
        env = env.env
    return found


def can_restore(env: gymnasium.Env) -> bool:
    """Say whether the whole state of a single environment can be saved and put back."""
    if any(type(wrapper).__name__ not in STATELESS for wrapper in _wrappers(env)):
        return False
    inner = env.unwrapped
    return _class_name(inner) in CLASSIC or _has_own_state(inner)


def _has_own_state(env: gymnasium.Env) -> bool:
    return callable(getattr(env, "get_state", None)) and callable(getattr(env, "set_state", None))


def get_sync_state(env: SyncVectorEnv) -> State:
    """Return the state of every environment of a SyncVectorEnv; all of them must be restorable."""
    tensors: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []
    for n, single in enumerate(env.envs):
        row, arrays = _get_single(single)
        rows.append(row)
        tensors.update({f"{n}.{key}": torch.from_numpy(value) for key, value in arrays.items()})
    return State(tensors, {"envs": rows})


def set_sync_state(env: SyncVectorEnv, state: State) -> None:
    """Put a SyncVectorEnv, which has been reset before, into a state of ``get_sync_state``."""
    for n, (single, row) in enumerate(zip(env.envs, state.data["envs"], strict=True)):
        mine = {key: value for key, value in state.tensors.items() if key.startswith(f"{n}.")}
        _set_single(single, row, {key.removeprefix(f"{n}."): value for key, value in mine.items()})


def _get_single(env: gymnasium.Env) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    inner: Any = env.unwrapped
    row: dict[str, Any] = {
        "class": _class_name(inner),
        "rng": get_rng(inner.np_random),
        "elapsed": [getattr(wrapper, "_elapsed_steps", None) for wrapper in _wrappers(env)],
    }
    arrays: dict[str, np.ndarray] = {}
    if _has_own_state(inner):
        own = inner.get_state()
        row["own"] = own.data
        arrays.update({f"own.{key}": value.numpy().copy() for key, value in own.tensors.items()})
        return row, arrays
    row["plain"] = {}
    for key in CLASSIC[row["class"]]:
        value = getattr(inner, key, None)
        if isinstance(value, np.ndarray):
            arrays[key] = value.copy()
        elif isinstance(value, tuple | list):
            row["plain"][key] = {"tuple": [float(part) for part in value]}
        else:
            row["plain"][key] = _to_json(value)
    return row, arrays


def _set_single(env: gymnasium.Env, row: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
    inner: Any = env.unwrapped
    if row["class"] != _class_name(inner):
        mine = _class_name(inner)
        raise CheckpointError(f"the saved environment is {row['class']}, but this one is {mine}")
    set_rng(inner.np_random, row["rng"])
    for wrapper, elapsed in zip(_wrappers(env), row["elapsed"], strict=True):
        if elapsed is not None:
            wrapper.__dict__["_elapsed_steps"] = elapsed
    if "own" in row:
        inner.set_state(State({key.removeprefix("own."): value for key, value in arrays.items()}, row["own"]))
        return
    for key, value in row["plain"].items():
        is_tuple = isinstance(value, dict) and "tuple" in value
        setattr(inner, key, tuple(value["tuple"]) if is_tuple else value)
    for key, value in arrays.items():
        setattr(inner, key, value.numpy().copy())
