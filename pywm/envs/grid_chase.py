"""A maze to be foreseen from pixels; importing this module registers it as ``pywm/GridChase-v0``.

One walks, one follows, and nothing but the first cell is random: the next picture follows from the last four and the
action. That makes it a test of models that predict pictures, for which :func:`find_player` reads a picture back.
"""

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

__all__ = ["GridChase", "GridChaseVector", "find_player"]

# A wall is #, a pellet o.
MAZE = (
    "o......o",
    ".##.##..",
    ".#....#.",
    "...##.#.",
    ".#.##...",
    ".#....#.",
    "..##.##.",
    "o......o",
)
SIDE = len(MAZE)
CELL = 4  # pixels
PIXELS = SIDE * CELL
MAX_STEPS = 200
# Rows and columns by action: up, right, down, left.
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])

WALLS = np.array([[mark == "#" for mark in line] for line in MAZE])
FREE = np.argwhere(~WALLS)
PELLETS = np.array([(r, c) for r, line in enumerate(MAZE) for c, mark in enumerate(line) if mark == "o"])
DELAY = 3  # steps that the chaser is behind

# Red is the player's alone.
PLAYER = (255, 0, 0)
WALL = (0, 0, 160)
PELLET = (0, 255, 0)
CHASER = (0, 128, 192)


def _background() -> np.ndarray:
    picture = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    picture[WALLS.repeat(CELL, 0).repeat(CELL, 1)] = WALL
    return picture


class _Board:
    """The rules for N mazes at once.

    Attributes:
        player: ``[N, 2]``, row and column.
        trail: ``[N, 3, 2]``, where the player was, the longest ago first: that is where the chaser is.
        pellets: ``[N, P]``, which are left.
    """

    def __init__(self, N: int) -> None:
        self.player = np.zeros((N, 2), np.int64)
        self.trail = np.zeros((N, DELAY, 2), np.int64)
        self.pellets = np.ones((N, len(PELLETS)), bool)
        self._rows = np.arange(N)
        self._background = _background()

    def start(self, n: int, rng: np.random.Generator) -> None:
        """Draw the cell of maze ``n`` where player and chaser begin."""
        self.player[n] = self.trail[n] = FREE[rng.integers(len(FREE))]
        self.pellets[n] = True
        self._eat()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Move player and chaser; return rewards and ends, ``[N]`` each."""
        self.trail = np.concatenate([self.trail[:, 1:], self.player[:, None]], 1)
        self.player = self._go(self.player, MOVES[action])
        reward = self._eat().astype(np.float64)
        caught = (self.player == self.trail[:, 0]).all(1)
        return reward - caught, np.asarray(~self.pellets.any(1))

    def _go(self, at: np.ndarray, by: np.ndarray) -> np.ndarray:
        to = np.clip(at + by, 0, SIDE - 1)
        return np.where(WALLS[to[:, 0], to[:, 1]][:, None], at, to)

    def _eat(self) -> np.ndarray:
        eaten = self.pellets & (self.player[:, None] == PELLETS).all(-1)
        self.pellets &= ~eaten
        return eaten.any(1)

    def pictures(self) -> np.ndarray:
        """Draw all mazes, ``[N, pixels, pixels, 3]``."""
        N = len(self._rows)
        cells = np.broadcast_to(self._background, (N, *self._background.shape)).copy()
        cells = cells.reshape(N, SIDE, CELL, SIDE, CELL, 3)
        for k, (row, column) in enumerate(PELLETS):
            cells[self.pellets[:, k], row, 1:3, column, 1:3] = PELLET
        cells[self._rows, self.trail[:, 0, 0], :, self.trail[:, 0, 1]] = np.array(CHASER)
        cells[self._rows, self.player[:, 0], :, self.player[:, 1]] = PLAYER
        return cells.reshape(N, PIXELS, PIXELS, 3)

    def get_state(self) -> State:
        """Return copies of everything."""
        arrays = {"player": self.player, "trail": self.trail, "pellets": self.pellets}
        return State({name: torch.from_numpy(x.copy()) for name, x in arrays.items()}, {})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        for name in ("player", "trail", "pellets"):
            getattr(self, name)[:] = state.tensors[name].numpy()


class GridChase(gymnasium.Env):
    """Eat the pellets of a maze that is seen from above, with a chaser behind.

    The player (red) begins in a random cell of a fixed maze of 8 x 8, and moves by a cell with each step, unless a wall
    (blue) is there. The chaser (blue-green) follows the track: it is where the player was three steps before. To be in one
    cell with it costs 1, so whoever stands still or turns around in a dead end is caught. Each of the four pellets (green)
    pays 1; with the last one the episode terminates, and it is truncated after 200 steps. The picture is ``[32, 32, 3]``
    uint8; the last four pictures and the action say what the next one will be.

    Args:
        render_mode: ``"rgb_array"`` shows the picture.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)
        self.action_space = spaces.Discrete(len(MOVES))
        self.render_mode = render_mode
        self._board = _Board(1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw the first cell."""
        super().reset(seed=seed)
        self._board.start(0, self.np_random)
        return self._board.pictures()[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move up (0), right (1), down (2) or left (3)."""
        reward, terminated = self._board.step(np.array([int(action)]))
        return self._board.pictures()[0], float(reward[0]), bool(terminated[0]), False, {}

    def render(self) -> np.ndarray | None:
        """Return the picture."""
        return None if self.render_mode is None else self._board.pictures()[0]

    def get_state(self) -> State:
        """Return the player's last cells and the pellets that are left."""
        return self._board.get_state()

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._board.set_state(state)


class GridChaseVector(VectorEnv):
    """``N`` of :class:`GridChase` in one NumPy step, equal to them step for step, in SAME_STEP mode.

    Args:
        num_envs: ``N``.
        max_episode_steps: episodes are truncated after this many steps.
        render_mode: ``"rgb_array"`` shows the pictures.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    returns_fresh_arrays = True

    def __init__(
        self, num_envs: int, max_episode_steps: int = MAX_STEPS, render_mode: str | None = None
    ) -> None:
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)
        self.single_action_space = spaces.Discrete(len(MOVES))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self._limit = max_episode_steps
        self._board = _Board(num_envs)
        self._elapsed = np.zeros(num_envs, np.int64)
        self._rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes in all mazes, or in those of ``options["reset_mask"]``."""
        seeds = [seed + n for n in range(self.num_envs)] if isinstance(seed, int) else seed
        mask = (options or {}).get("reset_mask")
        for n in range(self.num_envs) if mask is None else np.flatnonzero(mask).tolist():
            if seeds is not None and seeds[n] is not None:
                self._rngs[n] = seeding.np_random(seeds[n])[0]
            self._start(n)
        return self._board.pictures(), {}

    def _start(self, n: int) -> None:
        self._board.start(n, self._rngs[n])
        self._elapsed[n] = 0

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Move up (0), right (1), down (2) or left (3) in every maze."""
        reward, terminated = self._board.step(np.asarray(actions))
        self._elapsed += 1
        truncated = self._elapsed >= self._limit
        obs = self._board.pictures()
        info: dict[str, Any] = {}
        ended = terminated | truncated
        if ended.any():
            info = {"final_obs": obs, "_final_obs": ended}
            for n in np.flatnonzero(ended).tolist():
                self._start(n)
            obs = self._board.pictures()
        return obs, reward, terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return the pictures."""
        return None if self.render_mode is None else tuple(self._board.pictures())

    def get_state(self) -> State:
        """Return the mazes, their clocks and their generators."""
        tensors = {**self._board.get_state().tensors, "elapsed": torch.from_numpy(self._elapsed.copy())}
        return State(tensors, {"rngs": [get_rng(rng) for rng in self._rngs]})

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        self._board.set_state(state)
        self._elapsed[:] = state.tensors["elapsed"].numpy()
        for rng, saved in zip(self._rngs, state.data["rngs"], strict=True):
            set_rng(rng, saved)


def find_player(pictures: np.ndarray) -> np.ndarray:
    """Read the player's cell, row and column, off pictures ``[..., 3, 32, 32]`` of any dtype: where red is strongest.

    Returns:
        ``[..., 2]`` int64.

    Raises:
        ValueError: the pictures have another shape.
    """
    if pictures.ndim < 3 or pictures.shape[-3:] != (3, PIXELS, PIXELS):
        raise ValueError(
            f"find_player: pictures is {pictures.shape}, but [..., 3, {PIXELS}, {PIXELS}] was expected"
        )
    red = pictures[..., 0, :, :].astype(np.float64)
    red = red.reshape(*red.shape[:-2], SIDE, CELL, SIDE, CELL).mean((-3, -1))
    cell = red.reshape(*red.shape[:-2], SIDE * SIDE).argmax(-1)
    return np.stack([cell // SIDE, cell % SIDE], -1)


def register() -> None:
    """Make the id known to gymnasium; a second call does nothing."""
    if "pywm/GridChase-v0" not in gymnasium.registry:
        gymnasium.register(
            "pywm/GridChase-v0",
            entry_point=f"{__name__}:GridChase",
            vector_entry_point=f"{__name__}:GridChaseVector",
            max_episode_steps=MAX_STEPS,
        )


register()
