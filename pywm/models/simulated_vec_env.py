"""A learned video model as a gymnasium vector environment: SimPLe's env', in which anybody's agent can train.

::

    real:        f0 f1 f2 f3                          a stack of real frames, from anywhere in the newest data
    imagined:             f3 ──action──► f4 ──action──► f5  …            at most ``length`` steps, then truncated
    observed:    [f0 … f3]          [f1 … f4]      [f2 … f5]

Row 0 always begins where a real episode begins, so that those frames keep being practised. Rewards are -1, 0 or 1, the
likeliest. An episode is truncated at ``length``, so an agent that bootstraps there sees beyond it; it terminates only where
the model has learnt to predict ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from pywm.envs.restore import get_rng, set_rng
from pywm.envs.spaces import last_frame
from pywm.errors import CheckpointError, UserError
from pywm.models.actions import ActionSpace
from pywm.models.video.discrete import VideoModel, VideoState
from pywm.types import State

__all__ = ["SimulatedVecEnv"]

LENGTH = 50
FRAMES_PER_SECOND = 10

Starts = Callable[..., Tensor]


class SimulatedVecEnv(VectorEnv[Any, Any, Any]):
    """``N`` rollouts in a video model, in SAME_STEP mode.

    Args:
        model: the world model. It is used as it is: what trains it meanwhile changes this environment.
        action_space: of the real environment.
        starts: ``starts(uniform [B], beginning=True)`` returns uint8 stacks ``[B, k·C, height, width]`` as a function of
            the numbers, of which the first is a true beginning of an episode where asked for:
            :meth:`pywm.data.frame_replay.FrameReplay.starts`. Or an array of stacks, ``[M, k·C, height, width]``, whose
            first is taken for the beginning.
        num_envs: N.
        length: steps after which a rollout is truncated.
        render_mode: ``"rgb_array"`` for pictures.

    Attributes:
        model: the world model.

    Raises:
        UserError: an argument is not one of those, or the action space does not fit the model.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": FRAMES_PER_SECOND,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    returns_fresh_arrays = True

    def __init__(
        self,
        model: VideoModel,
        action_space: spaces.Space[Any],
        starts: Starts | np.ndarray,
        num_envs: int,
        *,
        length: int = LENGTH,
        render_mode: str | None = None,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("length", length)):
            if value < 1:
                raise UserError(f"SimulatedVecEnv: {name} is {value}, but at least 1 was expected")
        if not isinstance(model, VideoModel):
            raise UserError(
                f"SimulatedVecEnv: model is a {type(model).__name__}, but a VideoModel was expected"
            )
        if render_mode not in (None, "rgb_array"):
            raise UserError(
                f"SimulatedVecEnv: render_mode is {render_mode!r}, but 'rgb_array' or None was expected"
            )
        c = model.config
        self._actions = ActionSpace(action_space)
        if self._actions.width != c.action:
            raise UserError(
                f"SimulatedVecEnv: action_space is {action_space}, of width {self._actions.width}, but one of width "
                f"{c.action}, the model's, was expected"
            )
        shape = (c.frames * c.shape[0], *c.shape[1:])
        self.model, self.num_envs, self.render_mode = model, num_envs, render_mode
        self.single_observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.single_action_space = action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self._starts = starts if callable(starts) else _from_array(starts, shape)
        self._length = length
        self._device = next(model.parameters()).device
        self._rngs = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self._elapsed = np.zeros(num_envs, np.int64)
        self._state = VideoState(torch.zeros(num_envs, *shape, dtype=torch.uint8, device=self._device), None)
        self._running = False

    @classmethod
    def from_run(
        cls,
        run: Path | str,
        num_envs: int,
        *,
        which: str = "latest",
        device: str = "cpu",
        **options: Any,
    ) -> SimulatedVecEnv:
        """Take the world model and the real frames of a run of SimPLe.

        Args:
            run: the run's directory.
            num_envs: N.
            which: ``"latest"``, ``"best"`` or the name of a step directory; only the newest has frames to start from.
            device: where the model goes.
            options: ``length`` and ``render_mode``.

        Raises:
            CheckpointError: this is no run, or its checkpoint holds no frames.
            UserError: the run has no video model.
        """
        import pywm  # the package's front door: agents are above models

        agent, envs = pywm.load(run, which=which, device=device)
        envs.close()
        if not isinstance(getattr(agent, "model", None), VideoModel):
            raise UserError(f"SimulatedVecEnv.from_run: {run} is of an algorithm without a video model")
        replay = agent.load_frames(run, which=which)
        if replay is None:
            raise CheckpointError(
                f"{run}: holds no frames to start from, which only a run's newest checkpoint keeps"
            )
        return cls(agent.model, agent.actions.space, replay.starts, num_envs, **options)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a rollout everywhere, or in the rows of ``options["reset_mask"]``.

        Args:
            seed: of row 0, those of the others count from there; or one for each.
            options: ``"reset_mask"``: ``[N]`` bool, where to begin; the other rollouts go on.

        Raises:
            UserError: an argument is not what it should be.
        """
        N = self.num_envs
        seeds = [int(seed) + n for n in range(N)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None and len(seeds) != N:
            raise UserError(f"SimulatedVecEnv.reset: seed has {len(seeds)} entries, but {N} were expected")
        mask = np.asarray((options or {}).get("reset_mask", np.ones(N, bool)))
        if mask.shape != (N,) or mask.dtype != bool:
            raise UserError(
                f"SimulatedVecEnv.reset: reset_mask is {mask.dtype} {mask.shape}, but bool ({N},) was expected"
            )
        if not self._running and not mask.all():
            raise UserError(
                "SimulatedVecEnv.reset: no rollout is running, but a reset of all rows was expected first"
            )
        rows = np.flatnonzero(mask).tolist()
        if seeds is not None:
            for n in rows:
                if seeds[n] is not None:
                    self._rngs[n] = seeding.np_random(int(seeds[n]))[0]
        self._begin(rows)
        self._running = True
        return self._obs(), {}

    def _begin(self, rows: list[int]) -> None:
        if not rows:
            return
        uniform = np.array([self._rngs[n].random() for n in rows])
        begun = self.model.begin(self._starts(uniform, beginning=rows[0] == 0).to(self._device))
        if len(rows) == self.num_envs:
            self._state = begun
        else:
            memory = self._state.memory
            if memory is not None and begun.memory is not None:
                memory = _put(memory, rows, begun.memory)
            self._state = VideoState(_put(self._state.frames, rows, begun.frames), memory)
        self._elapsed[rows] = 0

    def _obs(self) -> np.ndarray:
        return self._state.frames.cpu().numpy()

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Imagine a step of every rollout.

        Args:
            actions: ``[N, ...]``, in the action space.

        Raises:
            TypeError, ValueError: they are not; nothing was imagined.
            UserError: ``reset`` was never called.
        """
        if not self._running:
            raise UserError("SimulatedVecEnv.step: no rollout is running, but reset() was expected before")
        taken = self._actions.from_env(np.asarray(actions), "SimulatedVecEnv.step")
        if len(taken) != self.num_envs:
            raise ValueError(
                f"SimulatedVecEnv.step: there are {len(taken)} actions, but {self.num_envs} were expected"
            )
        groups = self.model.config.groups
        uniform = np.stack([rng.random(groups, dtype=np.float32) for rng in self._rngs])
        predicted, self._state = self.model.step(
            self._state, taken.to(self._device), torch.from_numpy(uniform).to(self._device)
        )
        reward = predicted.reward.double().cpu().numpy()
        terminated = (predicted.end > 0.5).cpu().numpy()
        self._elapsed += 1
        truncated = (self._elapsed >= self._length) & ~terminated
        obs, info = self._obs(), dict[str, Any]()
        ended = terminated | truncated
        if np.count_nonzero(ended):
            info = {"final_obs": obs, "_final_obs": ended}
            rows = np.flatnonzero(ended).tolist()
            self._begin(rows)
            obs = self._obs()
        return obs, reward, terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return the newest frame of every rollout, uint8 ``[height, width, 3]``."""
        if self.render_mode is None:
            return None
        newest = self._state.frames[:, -self.model.config.shape[0] :].cpu().numpy()
        return tuple(np.ascontiguousarray(last_frame(newest).transpose(0, 2, 3, 1)))

    def get_state(self) -> State:
        """Return the rollouts, their clocks and generators; of the model and the starts nothing."""
        tensors = {"frames": self._state.frames.clone(), "elapsed": torch.from_numpy(self._elapsed.copy())}
        if self._state.memory is not None:
            tensors["memory"] = self._state.memory.clone()
        data = {"rngs": [get_rng(rng) for rng in self._rngs], "running": self._running}
        return State(tensors, data)

    def set_state(self, state: State) -> None:
        """Continue from a state of ``get_state``."""
        memory = state.tensors.get("memory")
        self._state = VideoState(
            state.tensors["frames"].to(self._device), None if memory is None else memory.to(self._device)
        )
        self._elapsed[:] = state.tensors["elapsed"].numpy()
        for rng, saved in zip(self._rngs, state.data["rngs"], strict=True):
            set_rng(rng, saved)
        self._running = bool(state.data["running"])


def _put(x: Tensor, rows: list[int], new: Tensor) -> Tensor:
    x = x.clone()
    x[rows] = new
    return x


def _from_array(stacks: np.ndarray, shape: tuple[int, ...]) -> Starts:
    stacks = np.asarray(stacks)
    if stacks.ndim != 4 or stacks.shape[1:] != shape or not len(stacks) or stacks.dtype != np.uint8:
        expected = ", ".join(["M", *map(str, shape)])
        raise UserError(
            f"SimulatedVecEnv: starts is {stacks.dtype} {list(stacks.shape)}, but uint8 [{expected}] was expected"
        )

    def starts(uniform: np.ndarray, *, beginning: bool) -> Tensor:
        index = (uniform * len(stacks)).astype(np.int64)
        if beginning:
            index[0] = 0
        return torch.from_numpy(stacks[index])

    return starts
