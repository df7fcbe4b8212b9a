"""Atari games: ALE's native vector environment, with what it lacks.

*Raw rewards.* ALE clips rewards inside; here that is switched off, and ``Envs`` clips what the training sees,
so that episodes report the game's score in training, too.

*Exact restoring.* The native environment gives no access to the emulators' state. But everything in it
follows from the seed of a seeded reset and the actions since, so these are remembered and played again on
restoring. To keep that short, an environment whose record is longer than ``replay_steps`` gets a new seed
with its next episode; a new seed makes ALE load the ROM again, too slow (about 0.1 s) for every episode.

*Terminal lives.* ``episodic_life`` raises ``terminated`` for the training when a life is lost, while the
game, and the episode that is counted, goes on.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from pywm.errors import CheckpointError, UserError, require_extra
from pywm.types import State

__all__ = ["Atari"]

log = logging.getLogger(__name__)

MAX_SEED = 2**31 - 1


class Atari(VectorEnv):
    """``N`` games of ALE as a vector environment in DISABLED mode, with raw rewards and a state to save.

    Args:
        env_id: ``"ALE/Pong-v5"`` and the like.
        num_envs: ``N``.
        episodic_life: report the loss of a life in ``info["life_lost"]``. Off by default, as ALE's authors
            recommend since v5; the classical DQN and PPO presets have it on.
        replay_steps: bound on the length of the record that restoring plays again, apart from the running
            episode; 0 keeps no record, and the environment cannot be restored.
        kwargs: further arguments of ``ale_py.AtariVectorEnv`` (``stack_num``, ``img_height``, ``frameskip``,
            ``repeat_action_probability``, ``noop_max``, ``use_fire_reset``, ``num_threads``, ...).
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": ["rgb_array"]}  # noqa: RUF012
    returns_fresh_arrays = True

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        episodic_life: bool = False,
        replay_steps: int = 20_000,
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        ale_py = require_extra("ale_py", "atari")
        gymnasium.register_envs(ale_py)
        for name in ("reward_clipping", "autoreset_mode", "life_loss_info", "batch_size"):
            if name in kwargs:
                raise UserError(
                    f"Atari: {name} is {kwargs[name]!r}, but expected nothing: pywm sets it (rewards come "
                    "raw and are clipped by make(..., training=True); see also episodic_life)"
                )
        # NEXT_STEP is the mode in which a masked reset finds the game as the last step left it.
        self._env: Any = gymnasium.make_vec(
            env_id, num_envs, reward_clipping=False, autoreset_mode=AutoresetMode.NEXT_STEP, **kwargs
        )
        self.spec = self._env.spec
        self.render_mode = render_mode
        self.num_envs = num_envs
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self.single_observation_space = self._env.single_observation_space
        self.single_action_space = self._env.single_action_space
        self.restorable = replay_steps > 0
        self._version = ale_py.__version__
        self._episodic_life = episodic_life
        self._replay_steps = replay_steps
        self._seed = 0
        self._lives = np.zeros(num_envs, dtype=np.int32)
        self._obs: np.ndarray | None = None
        # The record: environment n was last seeded with _seeds[n], before row _anchors[n] of _actions.
        self._draws = np.zeros(num_envs, dtype=np.int64)
        self._seeds = np.zeros(num_envs, dtype=np.int64)
        self._anchors = np.zeros(num_envs, dtype=np.int64)
        dtype = np.uint8 if self.single_action_space.shape == () else self.single_action_space.dtype
        self._actions = np.empty((256, num_envs, *(self.single_action_space.shape or ())), dtype=dtype)
        self._rows = 0

    def _draw_seeds(self, index: Sequence[int]) -> np.ndarray:
        """Return the next seed of each given environment: a function of ``reset``'s seed and a counter."""
        for n in index:
            entropy = np.random.SeedSequence([self._seed, n, int(self._draws[n])])
            self._seeds[n] = int(entropy.generate_state(1)[0]) % MAX_SEED
            self._draws[n] += 1
            self._anchors[n] = self._rows
        return self._seeds[list(index)].astype(np.int32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new games: everywhere, or where ``options["reset_mask"]`` is true."""
        mask = (options or {}).get("reset_mask")
        if mask is not None:
            return self._reset_some(mask)
        if seed is not None and not isinstance(seed, int | np.integer):
            raise TypeError(f"Atari.reset: seed is a {type(seed).__name__}, but expected an int")
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        self._draws[:] = 0
        self._rows = 0
        obs, info = self._env.reset(seed=self._draw_seeds(range(self.num_envs)))
        return self._keep(obs, info), info

    def _reset_some(self, mask: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        index = np.flatnonzero(mask).tolist()
        seeds = np.full(len(index), -1, dtype=np.int32)
        due = [n for n in index if self.restorable and self._rows - self._anchors[n] >= self._replay_steps]
        if due:
            seeds[np.isin(index, due)] = self._draw_seeds(due)
        obs, info = self._env.reset(seed=seeds, options={"reset_mask": mask})
        return self._keep(obs, info), info

    def _keep(self, obs: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        self._lives, self._obs = info["lives"], obs
        return obs

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Play one action in every game; one out of range would make ALE wait for ever, so check before."""
        if self.restorable:
            if self._rows == len(self._actions):
                self._make_room()
            self._actions[self._rows] = actions
            self._rows += 1
        before = self._lives
        obs, reward, terminated, truncated, info = self._env.step(actions)
        self._keep(obs, info)
        if self._episodic_life:
            info["life_lost"] = self._lives < before
        return obs, reward, terminated, truncated, info

    def _make_room(self) -> None:
        """Forget the rows that no environment needs any more, or double the record."""
        first = int(self._anchors.min())
        if first < len(self._actions) // 2:
            self._actions = np.concatenate([self._actions, np.empty_like(self._actions)])
        else:
            self._actions[: self._rows - first] = self._actions[first : self._rows].copy()
            self._anchors -= first
            self._rows -= first

    def get_state(self) -> State:
        """Return the seeds and the actions since; ``set_state`` plays them again."""
        first = int(self._anchors.min())
        data = {
            "seed": self._seed,
            "draws": self._draws.tolist(),
            "seeds": self._seeds.tolist(),
            "lengths": (self._rows - self._anchors).tolist(),
            "checksum": zlib.crc32(np.ascontiguousarray(self._obs).data),
            "ale_py": self._version,
        }
        return State({"actions": torch.from_numpy(self._actions[first : self._rows].copy())}, data)

    def set_state(self, state: State) -> None:
        """Play the record of ``get_state`` again; takes as long as the steps in it.

        Raises:
            CheckpointError: the games did not come out the same, so the emulator is another one.
        """
        actions = state.tensors["actions"].numpy()
        rows = len(actions)
        data = state.data
        starts = rows - np.array(data["lengths"], dtype=np.int64)
        seeds = np.array(data["seeds"], dtype=np.int32)
        if rows > 2000:
            log.info("restoring %d games by playing %d steps of each again", self.num_envs, rows)
        obs, info = self._env.reset(seed=seeds)
        ended = np.zeros(self.num_envs, dtype=bool)
        for t in range(rows + 1):
            # Until its own start an environment plays anything; the seeded reset wipes that out.
            begins = (starts == t) & (t > 0)
            if (begins | ended).any():
                mask = begins | ended
                now = np.where(begins, seeds, -1)[mask]
                obs, info = self._env.reset(seed=now, options={"reset_mask": mask})
            if t == rows:
                break
            action = actions[t].astype(self.single_action_space.dtype)
            obs, _, terminated, truncated, info = self._env.step(action)
            ended = (terminated | truncated) & (starts <= t)
        self._keep(obs, info)
        self._seed = int(data["seed"])
        self._draws = np.array(data["draws"], dtype=np.int64)
        self._seeds = seeds.astype(np.int64)
        self._anchors = starts
        self._actions = np.concatenate([actions, np.empty_like(self._actions[:256])])
        self._rows = rows
        if zlib.crc32(np.ascontiguousarray(obs).data) != data["checksum"]:
            raise CheckpointError(
                f"Atari.set_state: the games saved with ale-py {data['ale_py']} do not come out the same "
                f"with ale-py {self._version}. Install the former, or start a new run"
            )

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return the newest frame of every game ``[height, width, 3]``, in the size that the agent sees."""
        if self.render_mode is None or self._obs is None:
            return None
        newest = self._obs[:, -1]
        return tuple(newest if newest.ndim == 4 else np.repeat(newest[..., None], 3, axis=-1))

    def close_extras(self, **kwargs: Any) -> None:
        """Close the native environment."""
        self._env.close()
