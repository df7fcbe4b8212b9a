"""Catch a falling ball from pixels, one environment or a batch; importing this module registers ``pywm/Catch-v0``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from pywm.envs.restore import get_rng, set_rng
from pywm.types import State

__all__ = ["Catch", "CatchVector"]

SIDE = 24  # pixels
STEPS = SIDE - 2  # from the second row to the last
FIRST_COLUMN, COLUMNS = 4, 16  # where balls fall
# Grey values.
PADDLE, BALL = 128, 255
MOVES = np.array([-1, 0, 1])  # by action


def _pictures(t: np.ndarray, ball: np.ndarray, paddle: np.ndarray) -> np.ndarray:
    """Draw ``[N, side, side, 1]`` uint8; the paddle hides what is below it, the ball is drawn over the paddle."""
    rows = np.arange(len(t))
    picture = np.zeros((len(t), SIDE, SIDE, 1), dtype=np.uint8)
    for offset in (-1, 0, 1):
        picture[rows, SIDE - 1, paddle + offset, 0] = PADDLE
    picture[rows, 1 + t, ball, 0] = BALL
    return picture


class CatchVector(VectorEnv[Any, Any, Any]):
    """``N`` environments of :class:`Catch` in one NumPy step, equal to them bit for bit, in SAME_STEP mode.

    Args:
        num_envs: ``N``.
        render_mode: ``"rgb_array"`` shows the pictures.
    """

    metadata = {  # noqa: RUF012
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": ["rgb_array"],
        "render_fps": 10,
    }
    returns_fresh_arrays = True

    def __init__(self, num_envs: int = 1, render_mode: str | None = None) -> None:
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = spaces.Box(0, 255, (SIDE, SIDE, 1), np.uint8)
        self.single_action_space = spaces.Discrete(len(MOVES))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]
        # Rows: steps so far, column of the ball, middle of the paddle.
        self._state = np.zeros((3, num_envs), dtype=np.int64)
        self._state[2] = SIDE // 2

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new episodes in all environments, or in those of ``options["reset_mask"]``."""
        seeds = [seed + n for n in range(self.num_envs)] if isinstance(seed, int) else seed
        mask = (options or {}).get("reset_mask")
        for n in range(self.num_envs) if mask is None else np.flatnonzero(mask).tolist():
            if seeds is not None and seeds[n] is not None:
                self._rngs[n] = seeding.np_random(seeds[n])[0]
            self._begin(n)
        return _pictures(*self._state), {}

    def _begin(self, n: int) -> None:
        self._state[:, n] = _start(self._rngs[n])

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Move every paddle to the left (0), not at all (1), or to the right (2)."""
        t, ball, paddle = self._state
        t += 1
        np.clip(paddle + MOVES[actions], 1, SIDE - 2, out=paddle)
        obs = _pictures(t, ball, paddle)
        terminated = t >= STEPS
        reward = np.where(terminated, np.where(abs(ball - paddle) <= 1, 1.0, -1.0), 0.0)
        info: dict[str, Any] = {}
        if np.count_nonzero(terminated):
            info = {"final_obs": obs.copy(), "_final_obs": terminated}
            rows = np.flatnonzero(terminated)
            for n in rows.tolist():
                self._begin(n)
            obs[rows] = _pictures(*self._state[:, rows])
        return obs, reward, terminated, np.zeros(self.num_envs, dtype=bool), info

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return the picture of every environment, ``[24, 24, 3]``."""
        return None if self.render_mode is None else tuple(np.repeat(_pictures(*self._state), 3, axis=-1))

    def get_state(self) -> State:
        """Return clocks, balls, paddles and generators."""
        state = torch.from_numpy(self._state.copy())
        return State({"state": state}, {"rngs": [get_rng(rng) for rng in self._rngs]})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._state[:] = state.tensors["state"].numpy()
        for rng, saved in zip(self._rngs, state.data["rngs"], strict=True):
            set_rng(rng, saved)


class Catch(gymnasium.Env):
    """Be under the ball when it lands.

    The picture ``[24, 24, 1]`` uint8 shows the ball (255) falling by a pixel a step from the second row, in one of the 16
    middle columns, and the paddle (128, three pixels) in the last row, which begins in the middle. After 22 steps the ball
    is in the paddle's row: the reward is 1 if it hit one of the three pixels and -1 if not, and the episode ends. All
    rewards before are 0.

    The best return is 1: no ball is farther away than the paddle can go. A random policy returned -0.640 in 10,000
    episodes.

    Args:
        render_mode: ``"rgb_array"`` shows the picture.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(0, 255, (SIDE, SIDE, 1), np.uint8)
        self.action_space = spaces.Discrete(len(MOVES))
        self.render_mode = render_mode
        self._t, self._ball, self._paddle = 0, 0, SIDE // 2

    def _picture(self) -> np.ndarray:
        return _pictures(*np.array([[self._t], [self._ball], [self._paddle]]))[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Drop a ball."""
        super().reset(seed=seed)
        self._t, self._ball, self._paddle = _start(self.np_random)
        return self._picture(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the paddle to the left (0), not at all (1), or to the right (2)."""
        self._t += 1
        self._paddle = min(max(self._paddle + int(MOVES[int(action)]), 1), SIDE - 2)
        landed = self._t >= STEPS
        reward = (1.0 if abs(self._ball - self._paddle) <= 1 else -1.0) if landed else 0.0
        return self._picture(), reward, landed, False, {}

    def render(self) -> np.ndarray | None:
        """Return the picture, ``[24, 24, 3]``."""
        return None if self.render_mode is None else np.repeat(self._picture(), 3, axis=-1)

    def get_state(self) -> State:
        """Return clock, ball and paddle."""
        return State({}, {"t": self._t, "ball": self._ball, "paddle": self._paddle})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._t, self._ball, self._paddle = (state.data[key] for key in ("t", "ball", "paddle"))


def _start(rng: np.random.Generator) -> tuple[int, int, int]:
    """Return clock, ball and paddle of a new episode."""
    return 0, FIRST_COLUMN + int(rng.integers(COLUMNS)), SIDE // 2


def register() -> None:
    """Make the id known to gymnasium; a second call does nothing."""
    if "pywm/Catch-v0" not in gymnasium.registry:
        gymnasium.register(
            "pywm/Catch-v0",
            entry_point=f"{__name__}:Catch",
            vector_entry_point=f"{__name__}:CatchVector",
        )


register()
