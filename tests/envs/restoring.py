"""Compare a run with the same run after saving, loading and continuing it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from pywm.envs import Envs
from pywm.types import State, StepOut


def through_a_file(state: State | None) -> State:
    """What a checkpoint does to a state: tensors by value, data as JSON text."""
    assert state is not None
    return State(
        {key: value.clone() for key, value in state.tensors.items()}, json.loads(json.dumps(state.data))
    )


def act(envs: Envs, rng: np.random.Generator) -> np.ndarray:
    space = envs.action_space
    if isinstance(space, gymnasium.spaces.Box):
        return rng.uniform(space.low, space.high, (envs.num_envs, *space.shape)).astype(space.dtype)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return rng.integers(0, space.nvec, (envs.num_envs, len(space.nvec)))
    return rng.integers(0, space.n, envs.num_envs)  # type: ignore[attr-defined]


def same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def check_restoring(build: Callable[[], Envs], before: int, after: int) -> list[StepOut]:
    """Step ``before`` times, save, step ``after`` times; a fresh one from the save must do the latter, too.

    Returns:
        All steps of the first run.
    """
    envs = build()
    rng = np.random.default_rng(0)
    envs.reset(11)
    outs = [envs.step(act(envs, rng)) for _ in range(before)]
    state = through_a_file(envs.get_state())
    rest = np.random.default_rng(1)
    expected: list[StepOut] = [envs.step(act(envs, rest)) for _ in range(after)]
    episodes = envs.episodes()

    fresh = build()
    fresh.set_state(state)
    rest = np.random.default_rng(1)
    for out in expected:
        for a, b in zip(out, fresh.step(act(fresh, rest)), strict=True):
            same(a, b)
    # Saved again, the two are the same in everything.
    again, other = fresh.get_state(), envs.get_state()
    assert again is not None
    assert other is not None
    assert fresh.episodes() == episodes
    assert {**again.data, "episodes": []} == {**other.data, "episodes": []}
    assert again.tensors.keys() == other.tensors.keys()
    for key, tensor in other.tensors.items():
        same(again.tensors[key].numpy(), tensor.numpy())
    envs.close()
    fresh.close()
    return outs + expected
