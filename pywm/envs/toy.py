"""Small environments of our own: each shows one thing, runs in microseconds, and can be saved and restored.

Importing this module registers them with gymnasium as ``pywm/Counter-v0``, ``pywm/Truncation-v0`` and
``pywm/Match-v0``.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from pywm.errors import UserError
from pywm.types import State

__all__ = ["Counter", "Match", "Truncation"]


class Counter(gymnasium.Env):
    """Count: every observation says which episode and which step it is, so that no row can be mistaken.

    The observation is ``[10·episode + t]``, the reward of step ``t`` (from 1) is ``t + action/2``.

    Args:
        length: steps in an episode.
        end: ``"terminated"``, ``"truncated"`` or ``"both"``: which flag the last step raises.
        render_mode: accepted and ignored.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, length: int = 3, end: str = "terminated", render_mode: str | None = None) -> None:
        if end not in ("terminated", "truncated", "both"):
            raise UserError(f"Counter: end is {end!r}, but expected 'terminated', 'truncated' or 'both'")
        self.observation_space = spaces.Box(0.0, np.inf, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.render_mode = render_mode
        self._length, self._end = length, end
        self._episode, self._t = -1, 0

    def _obs(self) -> np.ndarray:
        return np.array([10 * self._episode + self._t], dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin the next episode; with a seed, begin with episode 0 again."""
        super().reset(seed=seed)
        self._episode = 0 if seed is not None else self._episode + 1
        self._t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Count one further."""
        self._t += 1
        last = self._t >= self._length
        terminated, truncated = last and self._end != "truncated", last and self._end != "terminated"
        return self._obs(), self._t + float(action) / 2, terminated, truncated, {}

    def get_state(self) -> State:
        """Return the counters."""
        return State({}, {"episode": self._episode, "t": self._t})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._episode, self._t = state.data["episode"], state.data["t"]


class Truncation(gymnasium.Env):
    """One state for ever, reward 1; the registered environment is truncated after 5 steps.

    With a discount of 0.9 the value is ``1/(1 - 0.9) = 10`` if truncation keeps its bootstrap, and
    less than 4 if it is mistaken for termination.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the only state."""
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Stay, and be paid for it."""
        return np.ones(1, dtype=np.float32), 1.0, False, False, {}

    def get_state(self) -> State:
        """Return nothing: there is nothing to remember."""
        return State({}, {})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""


class Match(gymnasium.Env):
    """Do what the observation shows: a contextual bandit in every kind of space.

    A target is drawn in every step. Discrete actions are paid the share of their parts that match, continuous
    ones ``1 - |action - target|``, averaged. The best return is ``length`` in all variants.

    Args:
        action: ``"discrete"`` (4 choices), ``"multi_discrete"`` (3 and 2) or ``"box"`` (2 numbers in ±1).
        obs: ``"vector"``, ``"image"`` (uint8 ``[3, 36, 36]``, stripes show the target) or ``"dict"`` (both).
        length: steps in an episode, which ends in a terminal state.
        render_mode: ``"rgb_array"`` draws the picture of ``obs="image"``.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self, action: str = "discrete", obs: str = "vector", length: int = 8, render_mode: str | None = None
    ) -> None:
        actions: dict[str, spaces.Space[Any]] = {
            "discrete": spaces.Discrete(4),
            "multi_discrete": spaces.MultiDiscrete([3, 2]),
            "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
        }
        if action not in actions:
            raise UserError(f"Match: action is {action!r}, but expected one of {', '.join(actions)}")
        self.action_space = actions[action]
        # How many choices each part has; None where they are numbers.
        self._counts = {"discrete": [4], "multi_discrete": [3, 2], "box": None}[action]
        self._parts = 2 if self._counts is None else len(self._counts)
        width = self._parts if self._counts is None else sum(self._counts)
        vector = spaces.Box(-1.0, 1.0, (width,), np.float32)
        image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
        forms: dict[str, spaces.Space[Any]] = {
            "vector": vector,
            "image": image,
            "dict": spaces.Dict({"image": image, "vector": vector}),
        }
        if obs not in forms:
            raise UserError(f"Match: obs is {obs!r}, but expected one of {', '.join(forms)}")
        self.observation_space = forms[obs]
        self.render_mode = render_mode
        self._form, self._length = obs, length
        self._t = 0
        self._target = np.zeros(self._parts)

    def _draw(self) -> None:
        if self._counts is None:
            self._target = self.np_random.uniform(-1.0, 1.0, self._parts)
        else:
            self._target = self.np_random.integers(0, self._counts).astype(np.float64)

    def _vector(self) -> np.ndarray:
        if self._counts is None:
            return self._target.astype(np.float32)
        pairs = zip(self._counts, self._target.astype(np.int64), strict=True)
        return np.concatenate([np.eye(n, dtype=np.float32)[k] for n, k in pairs])

    def _image(self) -> np.ndarray:
        picture = np.zeros((3, 36, 36), dtype=np.uint8)
        for part in range(self._parts):
            n = 2.0 if self._counts is None else self._counts[part] - 1.0
            share = (self._target[part] + (1.0 if self._counts is None else 0.0)) / n
            column = round(share * 30)
            picture[part, :, column : column + 6] = 255
        return picture

    def _obs(self) -> Any:
        if self._form == "vector":
            return self._vector()
        if self._form == "image":
            return self._image()
        return {"image": self._image(), "vector": self._vector()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Draw the first target."""
        super().reset(seed=seed)
        self._t = 0
        self._draw()
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Pay for the match and draw the next target."""
        given = np.atleast_1d(np.asarray(action, dtype=np.float64))
        if self._counts is None:
            reward = float(1.0 - np.abs(given - self._target).mean())
        else:
            reward = float((given == self._target).mean())
        self._t += 1
        self._draw()
        return self._obs(), reward, self._t >= self._length, False, {}

    def render(self) -> np.ndarray | None:
        """Return the target as a picture ``[36, 36, 3]``."""
        if self.render_mode is None:
            return None
        return np.ascontiguousarray(self._image().transpose(1, 2, 0))

    def get_state(self) -> State:
        """Return the clock and the target."""
        return State({"target": torch.from_numpy(self._target.copy())}, {"t": self._t})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._t = state.data["t"]
        self._target = state.tensors["target"].numpy().copy()


def register() -> None:
    """Make the ids known to gymnasium; a second call does nothing."""
    for name, limit in (("Counter", None), ("Truncation", 5), ("Match", None)):
        if f"pywm/{name}-v0" not in gymnasium.registry:
            gymnasium.register(f"pywm/{name}-v0", entry_point=f"{__name__}:{name}", max_episode_steps=limit)


register()
