"""A task that needs ten steps of memory at every step; importing this module registers it as ``pywm/DelayedCopy-v0``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pywm.errors import UserError
from pywm.types import State

__all__ = ["DelayedCopy"]

CELL = 16  # pixels
EMPTY, SHOWN, ANSWER = (40, 40, 40), (0, 200, 0), (220, 220, 60)


class DelayedCopy(gymnasium.Env):
    """Be shown a random symbol at every step, and name the one of ``delay`` steps ago.

    ::

        step      0   1   2  …  10  11  12  …  39
        shown     a   b   c  …   k   l   m  …
        to name   -   -   -  …   a   b   c  …       reward 1 if named
        answer    -   -   -  …   -   a   b  …       seen one step later

    The observation is ``[symbol shown, 1 + symbol that was to be named in the last step]``, with 0 in the second place as
    long as there was none. The answers tell what has been right, not what will be: symbols are independent of each other.

    Episodes are truncated after ``steps`` steps, of which the first ``delay`` count nothing. The best return is
    ``steps - delay``. Whoever remembers less than ``delay`` steps gets ``(steps - delay)/symbols`` on average, whatever the
    policy, since nothing that was shown later tells the symbol: of 30 that is 15 in the registered environment (2 symbols,
    delay 10, 40 steps).

    Args:
        symbols: how many there are, 2 or more.
        delay: how many steps ago, 1 or more.
        steps: length of an episode, more than ``delay``.
        render_mode: ``"rgb_array"`` draws the symbol shown, and the answer below it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(
        self, symbols: int = 2, delay: int = 10, steps: int = 40, render_mode: str | None = None
    ) -> None:
        for name, got, least in (("symbols", symbols, 2), ("delay", delay, 1), ("steps", steps, delay + 1)):
            if got < least:
                raise UserError(f"DelayedCopy: {name} is {got}, but expected {least} or more")
        self.observation_space = spaces.MultiDiscrete([symbols, symbols + 1])
        self.action_space = spaces.Discrete(symbols)
        self.render_mode = render_mode
        self._symbols, self._delay, self._steps = symbols, delay, steps
        self._t, self._shown = 0, [0]  # the last symbols, the newest last

    def _obs(self) -> np.ndarray:
        answered = self._t > self._delay
        return np.array([self._shown[-1], 1 + self._shown[0] if answered else 0])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Show the first symbol."""
        super().reset(seed=seed)
        self._t, self._shown = 0, [int(self.np_random.integers(self._symbols))]
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take the name, and show the next symbol."""
        named = self._t >= self._delay and int(action) == self._shown[-1 - self._delay]
        self._t += 1
        self._shown = [*self._shown, int(self.np_random.integers(self._symbols))][-self._delay - 2 :]
        return self._obs(), float(named), False, self._t >= self._steps, {}

    def render(self) -> np.ndarray | None:
        """Return the symbol shown and the answer below it, ``[32, 16·symbols, 3]``."""
        if self.render_mode is None:
            return None
        cells = np.empty((2, self._symbols, 3), dtype=np.uint8)
        cells[:] = EMPTY
        shown, answer = self._obs()
        cells[0, shown] = SHOWN
        if answer:
            cells[1, answer - 1] = ANSWER
        return cells.repeat(CELL, 0).repeat(CELL, 1)

    def get_state(self) -> State:
        """Return the clock and the symbols that are still to be named."""
        return State({}, {"t": self._t, "shown": list(self._shown)})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._t, self._shown = state.data["t"], list(state.data["shown"])


def register() -> None:
    """Make the id known to gymnasium; a second call does nothing."""
    if "pywm/DelayedCopy-v0" not in gymnasium.registry:
        gymnasium.register("pywm/DelayedCopy-v0", entry_point=f"{__name__}:DelayedCopy")


register()
