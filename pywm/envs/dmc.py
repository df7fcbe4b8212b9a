"""DeepMind Control tasks as gymnasium environments: ``dmc:walker_walk``."""

from __future__ import annotations

import ctypes.util
import difflib
import os
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pywm.errors import UserError, require_extra

__all__ = ["DMControl"]


def _gl_backend() -> str:
    """Return the first way of rendering without a display whose library is there; training needs none."""
    for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            return name
    return "disable"


class DMControl(gymnasium.Env):
    """A task of ``dm_control.suite``; the observations of the task stand side by side in one float32 vector.

    Episodes end by the clock of the task, which is a truncation, unless the task says that its discount is 0.

    Args:
        task: ``"<domain>_<task>"``, for instance ``"walker_walk"`` or ``"ball_in_cup_catch"``.
        action_repeat: every action is applied so many times; rewards are added.
        size: height and width of a rendered picture.
        camera: number of the camera.
        render_mode: ``"rgb_array"`` or None.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(
        self,
        task: str,
        *,
        action_repeat: int = 1,
        size: tuple[int, int] = (240, 320),
        camera: int = 0,
        render_mode: str | None = None,
    ) -> None:
        # Without a display the default back end fails, when dm_control is imported; these two need none.
        os.environ.setdefault("MUJOCO_GL", _gl_backend())
        self._suite = require_extra("dm_control.suite", "dmc")
        known = {f"{domain}_{name}": (domain, name) for domain, name in self._suite.ALL_TASKS}
        if task not in known:
            close = difflib.get_close_matches(task, known, n=3, cutoff=0.0)
            names = ", ".join(f"dmc:{name}" for name in close)
            raise UserError(f"No env 'dmc:{task}'. The closest are {names}")
        self._domain, self._task = known[task]
        self.render_mode = render_mode
        self._repeat, self._size, self._camera = action_repeat, size, camera
        self._env = self._suite.load(self._domain, self._task)
        action = self._env.action_spec()
        low, high = action.minimum.astype(np.float32), action.maximum.astype(np.float32)
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        width = sum(int(np.prod(part.shape)) for part in self._env.observation_spec().values())
        self.observation_space = spaces.Box(-np.inf, np.inf, (width,), np.float32)

    @staticmethod
    def _vector(observation: dict[str, Any]) -> np.ndarray:
        return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; a seed also seeds the task's own generator."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.task._random = np.random.RandomState(seed)
        return self._vector(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply the action ``action_repeat`` times, or until the episode ends."""
        reward = 0.0
        for _ in range(self._repeat):
            now = self._env.step(action)
            reward += now.reward or 0.0
            if now.last():
                break
        terminated = bool(now.last() and now.discount == 0.0)
        return self._vector(now.observation), reward, terminated, bool(now.last() and not terminated), {}

    def render(self) -> np.ndarray | None:
        """Return the picture of the camera ``[height, width, 3]``."""
        if self.render_mode is None:
            return None
        try:
            return np.asarray(self._env.physics.render(*self._size, camera_id=self._camera))
        except Exception as error:
            raise UserError(
                f"dmc:{self._domain}_{self._task}: no picture with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); egl and "
                "osmesa need no display: apt install libegl1 libosmesa6"
            ) from error

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()
