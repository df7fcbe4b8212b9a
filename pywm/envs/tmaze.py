"""A task that only a memory solves; importing this module registers it as ``pywm/TMaze-v0``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pywm.errors import UserError
from pywm.types import State

__all__ = ["TMaze"]

CELL = 16  # pixels
FLOOR, WALL, SIGN, WALKER = (40, 40, 40), (120, 120, 120), (0, 200, 0), (220, 40, 40)


class TMaze(gymnasium.Env):
    """Be shown a side, be carried along a corridor, and turn to that side at its end.

    ::

                              ┌ 0: left
        sign ── ── … ── ── junction          ``delay`` steps from the sign to the junction
                              └ 1: right

    The observation is ``[sign is left, sign is right, at the junction]``: a sign in the first one, zeros on the way, then
    the junction. Actions count at the junction only, where the episode ends: 1 for the side of the sign, -1 for the other.

    With a memory the return is 1. Without one it is 0 on average, whatever the policy; a random one had -0.004 in 10,000
    episodes. Episodes have ``delay + 1`` steps.

    Args:
        delay: steps between the sign and the junction, 1 or more; 10 in the registered environment.
        render_mode: ``"rgb_array"`` draws the maze, with the sign as long as it is seen.

    Source:
        Bakker (2002), Reinforcement learning with long short-term memory; without the walking.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, delay: int = 10, render_mode: str | None = None) -> None:
        if delay < 1:
            raise UserError(f"TMaze: delay is {delay}, but expected 1 or more")
        self.observation_space = spaces.Box(0.0, 1.0, (3,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.render_mode = render_mode
        self._delay = delay
        self._t, self._side, self._turned = 0, 0, -1

    def _obs(self) -> np.ndarray:
        obs = np.zeros(3, dtype=np.float32)
        if self._t == 0:
            obs[self._side] = 1
        obs[2] = self._t >= self._delay
        return obs

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a side and show it."""
        super().reset(seed=seed)
        self._t, self._side, self._turned = 0, int(self.np_random.integers(2)), -1
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Go a step along the corridor, or turn at its end."""
        if self._t < self._delay:
            self._t += 1
            return self._obs(), 0.0, False, False, {}
        self._turned = int(action)
        return self._obs(), 1.0 if self._turned == self._side else -1.0, True, False, {}

    def render(self) -> np.ndarray | None:
        """Return the maze from above, ``[48, 16·(delay + 1), 3]``."""
        if self.render_mode is None:
            return None
        cells = np.empty((3, self._delay + 1, 3), dtype=np.uint8)
        cells[:] = WALL
        cells[1] = cells[:, -1] = FLOOR
        row = 1 if self._turned < 0 else 2 * self._turned
        if self._t == 0:
            cells[2 * self._side, 0] = SIGN
        cells[row, self._t] = WALKER
        return cells.repeat(CELL, 0).repeat(CELL, 1)

    def get_state(self) -> State:
        """Return the clock, the side and the turn."""
        return State({}, {"t": self._t, "side": self._side, "turned": self._turned})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._t, self._side, self._turned = (state.data[key] for key in ("t", "side", "turned"))


def register() -> None:
    """Make the id known to gymnasium; a second call does nothing."""
    if "pywm/TMaze-v0" not in gymnasium.registry:
        gymnasium.register("pywm/TMaze-v0", entry_point=f"{__name__}:TMaze")


register()
