"""Crafter as a gymnasium environment: ``crafter:reward`` and ``crafter:noreward``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pywm.errors import UserError, require_extra

__all__ = ["Crafter"]


class Crafter(gymnasium.Env):
    """Crafter, whose own class is older than gymnasium, with terminated (death) apart from truncated (time).

    The same seed gives the same world, but not always the same run: Crafter keeps its creatures in sets,
    whose order is that of their addresses.

    Args:
        task: ``"reward"`` or ``"noreward"``.
        size: height and width of the picture.
        length: steps after which an episode is cut.
        render_mode: ``"rgb_array"`` or None.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        task: str = "reward",
        *,
        size: tuple[int, int] = (64, 64),
        length: int = 10_000,
        render_mode: str | None = None,
    ) -> None:
        if task not in ("reward", "noreward"):
            raise UserError(f"No env 'crafter:{task}'. There are crafter:reward and crafter:noreward")
        self._crafter = require_extra("crafter", "crafter")
        self._options = {"size": size, "length": length, "reward": task == "reward"}
        self._env = self._crafter.Env(**self._options)
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 255, (*size, 3), np.uint8)
        self.action_space = spaces.Discrete(self._env.action_space.n)
        self._last: np.ndarray | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in a new world."""
        super().reset(seed=seed)
        if seed is not None:
            # Crafter takes its seed when it is built.
            self._env = self._crafter.Env(**self._options, seed=seed)
        self._last = self._env.reset()
        return self._last, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act; the discount in ``info`` tells death from the end of time."""
        self._last, reward, over, info = self._env.step(int(action))
        terminated = bool(over and info["discount"] == 0.0)
        achievements = dict(info["achievements"])
        truncated = bool(over and not terminated)
        return self._last, float(reward), terminated, truncated, {"achievements": achievements}

    def render(self) -> np.ndarray | None:
        """Return the last picture ``[height, width, 3]``."""
        return None if self.render_mode is None else self._last
