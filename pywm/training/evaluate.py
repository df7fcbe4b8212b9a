"""Play episodes with a trained agent and average their returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from pywm.errors import EnvError
from pywm.types import Obs, StepOut

__all__ = ["EVAL_SEED", "MAX_STEPS", "Evaluation", "evaluate"]

# Evaluations see the same starts every time, far from the seeds that people give to training.
EVAL_SEED = 1_000_003
# Agent decisions in an episode. Atari's longest take 27,000; what goes on for longer has most likely no end.
MAX_STEPS = 100_000


class _Agent(Protocol):
    def act(
        self, obs: Obs, state: Any = None, *, is_first: np.ndarray | None = None, greedy: bool = False
    ) -> tuple[np.ndarray, Any]: ...


class _Envs(Protocol):
    num_envs: int

    def reset(self, seed: int) -> Obs: ...
    def step(self, action: np.ndarray) -> StepOut: ...
    def episodes(self) -> list[Any]: ...
    def render(self) -> np.ndarray | None: ...


class Evaluation(NamedTuple):
    """Returns of whole episodes, undiscounted and unclipped.

    Attributes:
        episodes: how many were played.
        return_mean, return_std: over the episodes (population standard deviation).
        length_mean: in agent decisions.
        seed: what the environments were reset with.
        returns: one number an episode, in the order of the environments.
    """

    episodes: int
    return_mean: float
    return_std: float
    length_mean: float
    seed: int
    returns: tuple[float, ...]

    def metrics(self) -> dict[str, float]:
        """Return the figures under their names in ``metrics.jsonl``."""
        return {
            "eval/return_mean": self.return_mean,
            "eval/return_std": self.return_std,
            "eval/length_mean": self.length_mean,
            "eval/episodes": self.episodes,
        }


def evaluate(
    agent: _Agent,
    envs: _Envs,
    *,
    episodes: int,
    seed: int,
    greedy: bool = True,
    frames: list[np.ndarray] | None = None,
    max_steps: int = MAX_STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Play ``episodes`` episodes from fresh resets.

    Every environment plays its fixed share, so that short episodes do not crowd out long ones.

    Args:
        agent: what acts.
        envs: environments made with ``training=False``, so that rewards are raw.
        episodes: how many to count.
        seed: the environments' reset seed.
        greedy: act without exploration.
        frames: when given, pictures of the first environment's first episode are appended.
        max_steps: agent decisions after which an episode counts as endless.
        progress: called after every step with the number of finished episodes and of agent decisions.

    Raises:
        ValueError: ``episodes`` or ``max_steps`` is less than 1.
        EnvError: an episode did not end within ``max_steps``.
    """
    for name, count in (("episodes", episodes), ("max_steps", max_steps)):
        if count < 1:
            raise ValueError(f"evaluate: {name} is {count}, but expected 1 or more")
    N = envs.num_envs
    share = [episodes // N + (n < episodes % N) for n in range(N)]
    finished: list[list[Any]] = [[] for _ in range(N)]
    envs.episodes()  # what an earlier use left behind
    obs, state = envs.reset(seed), None
    is_first = np.ones(N, dtype=bool)
    steps, began = 0, [0] * N
    _record(envs, frames, wanted=True)
    while any(len(done) < want for done, want in zip(finished, share, strict=True)):
        action, state = agent.act(obs, state, is_first=is_first, greedy=greedy)
        out = envs.step(action)
        obs = out.obs
        # Where a step was spent on resetting, the episode begins after it.
        is_first = out.terminated | out.truncated | ~out.valid
        steps += 1
        for episode in envs.episodes():
            began[episode.env_index] = steps
            if len(finished[episode.env_index]) < share[episode.env_index]:
                finished[episode.env_index].append(episode)
        for n in range(N):
            if steps - began[n] >= max_steps and len(finished[n]) < share[n]:
                raise EnvError(
                    f"evaluate: an episode has not ended after {max_steps:,} steps (max_steps), but expected to end. "
                    "Give the environment a time limit (max_episode_steps), or its episodes more steps"
                )
        if progress is not None:
            progress(sum(map(len, finished)), steps * N)
        _record(envs, frames, wanted=not finished[0] and share[0] > 0)
    played = [episode for done in finished for episode in done]
    returns = np.array([episode.return_ for episode in played], dtype=np.float64)
    lengths = np.array([episode.length for episode in played], dtype=np.float64)
    return Evaluation(
        episodes=len(played),
        return_mean=float(returns.mean()),
        return_std=float(returns.std()),
        length_mean=float(lengths.mean()),
        seed=seed,
        returns=tuple(returns.tolist()),
    )


def _record(envs: _Envs, frames: list[np.ndarray] | None, *, wanted: bool) -> None:
    if frames is None or not wanted:
        return
    frame = envs.render()
    if frame is not None:
        frames.append(np.array(frame, copy=True))
