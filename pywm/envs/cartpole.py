"""All CartPoles of a batch in one NumPy step, equal to gymnasium's ``CartPoleEnv`` bit for bit.

The same float64 formulas in the same order, the same generator for each environment, the same time limit;
what is saved is the Python loop over the environments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from pywm.envs.restore import get_rng, set_rng
from pywm.types import State

__all__ = ["CartPole"]

GRAVITY = 9.8
MASS_POLE = 0.1
TOTAL_MASS = 0.1 + 1.0  # kg, pole and cart
HALF_LENGTH = 0.5  # m
POLE_MASS_LENGTH = MASS_POLE * HALF_LENGTH
FORCE = 10.0  # N
TAU = 0.02  # s between two states
MAX_ANGLE = 12 * 2 * math.pi / 360
MAX_POSITION = 2.4  # m


class CartPole(VectorEnv):
    """``N`` CartPole-v1 environments; a full stand-in for gymnasium's in SAME_STEP mode.

    Args:
        num_envs: ``N``.
        max_episode_steps: episodes are truncated after this many steps.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012
    returns_fresh_arrays = True

    def __init__(self, num_envs: int, max_episode_steps: int = 500) -> None:
        high = np.array([MAX_POSITION * 2, np.inf, MAX_ANGLE * 2, np.inf], dtype=np.float32)
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._limit = max_episode_steps
        self._rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._ones = np.ones(num_envs)
        self._forces = np.array([-FORCE, FORCE])
        # Rows: position, velocity, angle, angular velocity. The views are made once, not in every step.
        self._state = np.zeros((4, num_envs))
        self._values, self._rates = self._state[0::2], self._state[1::2]
        self._angle, self._spin = self._state[2], self._state[3]
        self._accelerations, self._growth = np.empty((2, num_envs)), np.empty((2, num_envs))
        self._work = np.empty((4, num_envs))
        self._outside = np.empty((2, num_envs), dtype=bool)
        # Constants as arrays: a Python number costs a conversion in every operation.
        self._bounds = np.array([[MAX_POSITION], [MAX_ANGLE]]).repeat(num_envs, axis=1)
        numbers = (GRAVITY, MASS_POLE, TOTAL_MASS, HALF_LENGTH, POLE_MASS_LENGTH, 4.0 / 3.0)
        self._numbers = tuple(np.full(num_envs, number) for number in numbers)
        self._tau = np.full((2, num_envs), TAU)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes in all environments, or in those of ``options["reset_mask"]``."""
        seeds = [seed + n for n in range(self.num_envs)] if isinstance(seed, int) else seed
        mask = (options or {}).get("reset_mask")
        for n in range(self.num_envs) if mask is None else np.flatnonzero(mask).tolist():
            if seeds is not None and seeds[n] is not None:
                self._rngs[n] = seeding.np_random(seeds[n])[0]
            self._start(n)
        return self._state.T.astype(np.float32), {}

    def _start(self, n: int) -> None:
        self._state[:, n] = self._rngs[n].uniform(-0.05, 0.05, size=4)
        self._elapsed[n] = 0

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Push every cart to the left (0) or to the right (1)."""
        gravity, mass_pole, total_mass, half_length, pole_mass_length, four_thirds = self._numbers
        cos, sin, push, pull = self._work
        cart_acceleration, spin_acceleration = self._accelerations
        growth = self._growth
        np.cos(self._angle, out=cos)
        np.sin(self._angle, out=sin)

        # push = (±force + ml·spin²·sin) / total mass
        np.square(self._spin, out=push)
        push *= pole_mass_length
        push *= sin
        push += self._forces[actions]
        push /= total_mass

        # angular acceleration = (g·sin - cos·push) / (l·(4/3 - m·cos²/total mass))
        np.multiply(sin, gravity, out=spin_acceleration)
        np.multiply(cos, push, out=pull)
        spin_acceleration -= pull
        np.square(cos, out=pull)
        pull *= mass_pole
        pull /= total_mass
        np.subtract(four_thirds, pull, out=pull)
        pull *= half_length
        spin_acceleration /= pull

        # acceleration of the cart = push - ml·angular acceleration·cos/total mass
        np.multiply(spin_acceleration, pole_mass_length, out=pull)
        pull *= cos
        pull /= total_mass
        np.subtract(push, pull, out=cart_acceleration)

        # Explicit Euler: the positions grow by the old velocities.
        np.multiply(self._rates, self._tau, out=growth)
        np.add(self._values, growth, out=self._values)
        np.multiply(self._accelerations, self._tau, out=growth)
        np.add(self._rates, growth, out=self._rates)

        np.abs(self._values, out=growth)
        np.greater(growth, self._bounds, out=self._outside)
        terminated = self._outside[0] | self._outside[1]
        self._elapsed += 1
        truncated = self._elapsed >= self._limit
        obs = self._state.T.astype(np.float32, order="C")
        info: dict[str, Any] = {}
        ended = terminated | truncated
        if np.count_nonzero(ended):
            info = {"final_obs": obs.copy(), "_final_obs": ended}
            for n in ended.nonzero()[0].tolist():
                self._start(n)
                obs[n] = self._state[:, n]
        return obs, self._ones.copy(), terminated, truncated, info

    def get_state(self) -> State:
        """Return the positions, clocks and generators of all environments."""
        state, elapsed = torch.from_numpy(self._state.copy()), torch.from_numpy(self._elapsed.copy())
        return State({"state": state, "elapsed": elapsed}, {"rngs": [get_rng(rng) for rng in self._rngs]})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._state[:] = state.tensors["state"].numpy()
        self._elapsed[:] = state.tensors["elapsed"].numpy()
        for rng, saved in zip(self._rngs, state.data["rngs"], strict=True):
            set_rng(rng, saved)
