"""Does an environment keep its promises? ``pywm check-env`` in the library.

``check_env`` looks at one environment and then at two of them in a vector; ``check_vector_env`` at a vector
environment. Every check is tried on its own, so that one run shows everything that is wrong.
"""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from pywm.envs.make import EnvLike, make
from pywm.envs.restore import can_restore
from pywm.envs.spaces import ActionCheck, ObsLayout, split_keys
from pywm.envs.vector import Envs, default_name, old_interface

__all__ = ["Check", "Report", "check_env", "check_vector_env"]

Space = spaces.Space[Any]

MAX_STEPS = 1000
MAX_PIXEL_STEPS = 200
ATARI_STEPS = 40
BAD_ACTION_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        name: what was checked.
        status: ``"ok"``, ``"warning"``, ``"failed"`` or ``"skipped"``.
        detail: what was seen.
    """

    name: str
    status: str
    detail: str


@dataclass
class Report:
    """What the checks found; ``str(report)`` is the text of ``pywm check-env``.

    Attributes:
        name: the environment.
        facts: what kind of environment it is.
        checks: every check in order.
    """

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def __str__(self) -> str:
        width = max([len(key) for key in self.facts] + [len(check.name) for check in self.checks], default=0)
        lines = [self.name]
        lines += [f"  {'':8} {key:{width}}  {value}" for key, value in self.facts.items()]
        lines += [f"  {check.status:8} {check.name:{width}}  {check.detail}" for check in self.checks]
        counts = dict.fromkeys(("ok", "warning", "failed", "skipped"), 0)
        for check in self.checks:
            counts[check.status] += 1
        summary = ", ".join(f"{n} {status}" for status, n in counts.items())
        lines.append(f"{len(self.checks)} checks: {summary}")
        return "\n".join(lines)


class _FailedError(Exception):
    """A broken promise."""


class _DoubtError(Exception):
    """Something that works but deserves a look."""


class _SkippedError(Exception):
    """A check that does not apply."""


def _run(report: Report, name: str, check: Callable[[], str]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report.checks.append(Check(name, "ok", check()))
    except _FailedError as fault:
        report.checks.append(Check(name, "failed", str(fault)))
    except _DoubtError as doubt:
        report.checks.append(Check(name, "warning", str(doubt)))
    except _SkippedError as skip:
        report.checks.append(Check(name, "skipped", str(skip)))
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        text = f"raised {type(error).__name__}: {text}{old_interface(error)}"
        report.checks.append(Check(name, "failed", text))


def check_env(
    env: EnvLike, *, seed: int = 0, steps: int = MAX_STEPS, env_kwargs: dict[str, Any] | None = None
) -> Report:
    """Check an environment that ``make`` understands: a single one first, then two in a vector.

    Args:
        env: see ``make``. A ``VectorEnv`` goes to ``check_vector_env``, which closes it.
        seed: seed of the first run.
        steps: how many random steps to take at most in each run.
        env_kwargs: arguments for the environment.

    Returns:
        The report; ``report.ok`` says whether anything failed.

    Raises:
        UserError, MissingExtra, EnvError: the environment cannot be made at all.
    """
    if isinstance(env, VectorEnv | Envs):
        return check_vector_env(env, seed=seed, steps=steps)
    # Games last longer than the check, so that a time limit has to show what happens at an end.
    limit = ATARI_STEPS if isinstance(env, str) and env.startswith("ALE/") else None
    vector = make(env, 2, seed=seed, max_episode_steps=limit, env_kwargs=env_kwargs)
    report = Report(vector.name)
    if type(vector.env) is SyncVectorEnv:
        single: Any = make(env, 1, seed=seed, env_kwargs=env_kwargs).env
        _check_single(report, single.envs[0], seed, steps)
        single.close()
    found = check_vector_env(vector, seed=seed, steps=steps)
    report.facts = found.facts
    report.checks += [Check(f"vector {check.name}", check.status, check.detail) for check in found.checks]
    return report


# ---- a single environment


def _check_single(report: Report, env: gymnasium.Env, seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    env.action_space.seed(seed)
    actions = [env.action_space.sample() for _ in range(_step_limit(env.observation_space, steps))]
    _run(report, "gymnasium", lambda: _gymnasium(env))
    _run(report, "observations", lambda: _single_observations(env, seed, actions))
    _run(report, "finite", lambda: _single_finite(env, seed, actions))
    _run(report, "reward and flags", lambda: _single_reward(env, seed, actions))
    _run(report, "seeding", lambda: _single_seeding(env, seed, rng))
    _run(report, "determinism", lambda: _single_determinism(env, seed, actions))
    _run(report, "copies", lambda: _single_copies(env, seed, actions))
    _run(report, "episode end", lambda: _single_end(env, seed, actions))


def _step_limit(space: Space, steps: int) -> int:
    pixels = any(isinstance(part, spaces.Box) and len(part.shape) >= 2 for part in _parts(space))
    return min(steps, MAX_PIXEL_STEPS) if pixels else steps


def _parts(space: Space) -> list[Space]:
    if not isinstance(space, spaces.Dict):
        return [space]
    return [below for part in space.spaces.values() for below in _parts(part)]


def _gymnasium(env: gymnasium.Env) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gymnasium_check_env(env.unwrapped, skip_render_check=True, skip_close_check=True)
    told = [str(warning.message).replace("\x1b[33mWARN: ", "").replace("\x1b[0m", "") for warning in caught]
    if told:
        raise _DoubtError(f"gymnasium's own checker warns: {told[0].strip()}" + _more(told))
    return "gymnasium's own checker is content"


def _more(items: list[Any]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


def _walk(env: gymnasium.Env, seed: int, actions: list[Any]) -> Any:
    """Yield ``(t, obs, reward, terminated, truncated)`` of resets and steps, over as many episodes as fit."""
    obs, _ = env.reset(seed=seed)
    yield -1, obs, 0.0, False, False
    for t, action in enumerate(actions):
        obs, reward, terminated, truncated, _ = env.step(action)
        yield t, obs, reward, terminated, truncated
        if terminated or truncated:
            obs, _ = env.reset()
            yield t, obs, 0.0, False, False


def _single_observations(env: gymnasium.Env, seed: int, actions: list[Any]) -> str:
    for t, obs, *_ in _walk(env, seed, actions):
        if not env.observation_space.contains(obs):
            raise _FailedError(f"after {t + 1} steps: {_why_outside(env.observation_space, obs)}")
    return f"{len(actions)} random steps stay inside the observation space"


def _why_outside(space: Space, obs: Any, key: str = "obs") -> str:
    """Name the key, the shape and the dtype of the part that is outside of its space."""
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, dict) or obs.keys() != space.spaces.keys():
            keys = sorted(obs) if isinstance(obs, dict) else type(obs).__name__
            return f"{key} has the keys {keys}, but expected {sorted(space.spaces)}"
        for name, part in space.spaces.items():
            if not part.contains(obs[name]):
                return _why_outside(part, obs[name], f"{key}[{name!r}]")
    if isinstance(space, spaces.Box):
        if not isinstance(obs, np.ndarray):
            return f"{key} is a {type(obs).__name__}, but expected a numpy.ndarray"
        if obs.dtype != space.dtype or obs.shape != space.shape:
            return f"{key} is {obs.dtype} {obs.shape}, but expected {space.dtype} {space.shape}"
        if not np.isfinite(obs.astype(np.float64)).all():
            return f"{key} holds NaN or infinity"
        found, expected = f"{obs.min()} to {obs.max()}", f"{space.low.min()} to {space.high.max()}"
        return f"{key} holds values from {found}, but expected {expected}"
    return f"{key} is {obs!r}, but expected an element of {space}"


def _single_finite(env: gymnasium.Env, seed: int, actions: list[Any]) -> str:
    for t, obs, reward, *_ in _walk(env, seed, actions):
        for key, part in _arrays(obs).items():
            if not np.isfinite(part).all():
                raise _FailedError(f"after {t + 1} steps {key} holds NaN or infinity")
        if not np.isfinite(float(reward)):
            raise _FailedError(f"after {t + 1} steps the reward is {reward}")
    return "no NaN and no infinity in observations and rewards"


def _arrays(obs: Any, key: str = "obs") -> dict[str, np.ndarray]:
    if isinstance(obs, dict):
        return {k: v for name, part in obs.items() for k, v in _arrays(part, f"{key}[{name!r}]").items()}
    array = np.asarray(obs)
    return {key: array} if array.dtype.kind in "biuf" else {}


def _single_reward(env: gymnasium.Env, seed: int, actions: list[Any]) -> str:
    for t, _, reward, terminated, truncated in _walk(env, seed, actions):
        if isinstance(reward, str) or np.ndim(reward) != 0:
            raise _FailedError(f"after {t + 1} steps the reward is {reward!r}, but expected a number")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                raise _FailedError(
                    f"after {t + 1} steps {name} is a {type(flag).__name__}, but expected bool"
                )
    return "rewards are numbers, flags are bool"


def _single_seeding(env: gymnasium.Env, seed: int, rng: np.random.Generator) -> str:
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        first = copy.deepcopy(env.reset(seed=seed)[0])
        # An environment that draws from the global generators looks seeded until they differ.
        np.random.seed(int(rng.integers(2**31)))
        random.seed(int(rng.integers(2**31)))
        again = copy.deepcopy(env.reset(seed=seed)[0])
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    if not _same(first, again):
        raise _FailedError(
            f"reset(seed={seed}) gives another observation the second time: draw from self.np_random, and "
            "call super().reset(seed=seed) first"
        )
    others = [copy.deepcopy(env.reset(seed=seed + k)[0]) for k in range(1, 6)]
    if all(_same(first, other) for other in others):
        raise _DoubtError(
            "six different seeds give the same first observation; right only if the start is fixed"
        )
    return "the same seed gives the same start, others differ"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _single_determinism(env: gymnasium.Env, seed: int, actions: list[Any]) -> str:
    runs = [[copy.deepcopy(row) for row in _walk(env, seed, actions[:200])] for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        if not _same(a[1], b[1]) or a[2:] != b[2:]:
            raise _FailedError(f"the same seed and actions go apart after {a[0] + 1} steps")
    return "the same seed and actions give the same episodes"


def _single_copies(env: gymnasium.Env, seed: int, actions: list[Any]) -> str:
    kept = [(row[0], row[1], copy.deepcopy(row[1])) for row in _walk(env, seed, actions[:50])]
    for t, obs, before in kept:
        if not _same(obs, before):
            raise _FailedError(f"the observation after {t + 1} steps was overwritten later: return a copy")
    return "returned observations are not written to later"


def _single_end(env: gymnasium.Env, seed: int, actions: list[Any]) -> str:
    ends = sum(terminated or truncated for *_, terminated, truncated in _walk(env, seed, actions))
    if not ends:
        raise _DoubtError(f"no episode ended in {len(actions)} random steps; register max_episode_steps")
    return f"{ends} episodes ended in {len(actions)} random steps"


# ---- a vector environment


class Step(NamedTuple):
    """What a vector environment returned, copied."""

    obs: Any
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info: dict[str, Any]


@dataclass
class Trace:
    """A run of a vector environment: what reset returned, what every step returned, and copies made at once.

    ``resets`` holds, by step, the observations after the masked reset of DISABLED mode.
    """

    start: Any
    steps: list[Step]
    resets: dict[int, Any]
    kept: list[tuple[Any, Any]]


def check_vector_env(source: VectorEnv | Envs, *, seed: int = 0, steps: int = MAX_STEPS) -> Report:
    """Check what a vector environment promises, and close it.

    The checks: metadata, spaces, reset, shapes, dtypes, finite, seed, seed list, reset_mask, autoreset,
    final_obs, episodes, copies, bad action, close.

    Args:
        source: the vector environment, or ``Envs`` around one.
        seed: seed of the first run.
        steps: how many random steps to take at most in each run.

    Returns:
        The report; ``report.ok`` says whether anything failed.
    """
    name = source.name if isinstance(source, Envs) else default_name(source)
    env = source.env if isinstance(source, Envs) else source
    report = Report(name, _facts(env))
    mode = env.metadata.get("autoreset_mode")
    env.action_space.seed(seed)
    limit = _step_limit(env.single_observation_space, steps)
    actions = [env.action_space.sample() for _ in range(limit)]
    traces: dict[str, Trace] = {}

    def trace() -> Trace:
        if "first" not in traces:
            traces["first"] = _play(env, seed, actions, mode)
        return traces["first"]

    _run(report, "metadata", lambda: _metadata(mode))
    _run(report, "spaces", lambda: _vector_spaces(env, name))
    _run(report, "reset", lambda: _vector_reset(env, seed))
    _run(report, "shapes", lambda: _shapes(env, trace()))
    _run(report, "dtypes", lambda: _dtypes(env, trace()))
    _run(report, "finite", lambda: _finite(trace()))
    _run(report, "seed", lambda: _seed_int(env, seed, actions, mode, trace()))
    _run(report, "seed list", lambda: _seed_list(env, seed, trace()))
    _run(report, "reset_mask", lambda: _reset_mask(env, seed, mode))
    _run(report, "autoreset", lambda: _autoreset(trace(), mode))
    _run(report, "final_obs", lambda: _final_obs(env, trace(), mode))
    _run(report, "episodes", lambda: _episodes(env, seed, actions, trace(), mode))
    _run(report, "copies", lambda: _copies(trace()))
    _run(report, "bad action", lambda: _bad_action(env, seed, name))
    _run(report, "close", lambda: _close(env))
    return report


def _facts(env: VectorEnv) -> dict[str, str]:
    facts = {
        "observation": str(env.single_observation_space).replace("\n", ""),
        "action": str(env.single_action_space).replace("\n", ""),
    }
    try:
        keys = split_keys(ObsLayout(env.single_observation_space).space)
        facts["image keys"] = ", ".join(keys.image) or "none"
        facts["vector keys"] = ", ".join(keys.vector) or "none"
        facts["restorable"] = "yes" if Envs(env).restorable else _why_not_restorable(env)
    except Exception as error:
        facts["pywm"] = str(error)
    mode = env.metadata.get("autoreset_mode")
    facts["autoreset"] = getattr(mode, "name", str(mode))
    return facts


def _why_not_restorable(env: VectorEnv) -> str:
    if isinstance(env, SyncVectorEnv) and not all(can_restore(single) for single in env.envs):
        return "no get_state() and set_state(); runs end the episodes at each checkpoint"
    return "no; runs end the episodes at each checkpoint"


def _play(env: VectorEnv, seed: Any, actions: list[Any], mode: Any, limit: int | None = None) -> Trace:
    obs, _ = env.reset(seed=seed)
    trace = Trace(copy.deepcopy(obs), [], {}, [(obs, copy.deepcopy(obs))])
    for t, action in enumerate(actions[:limit]):
        out = env.step(action)
        if t < 50:
            trace.kept.append((out[:4], copy.deepcopy(out[:4])))
        trace.steps.append(Step(*copy.deepcopy(out)))
        ended = np.logical_or(out[2], out[3])
        if mode is AutoresetMode.DISABLED and ended.any():
            trace.resets[t] = copy.deepcopy(env.reset(options={"reset_mask": ended})[0])
    return trace


def _rows(obs: Any, n: int) -> Any:
    if isinstance(obs, dict):
        return {key: _rows(part, n) for key, part in obs.items()}
    return obs[n]


def _ends(trace: Trace) -> list[tuple[int, int]]:
    return [
        (t, int(n))
        for t, step in enumerate(trace.steps)
        for n in np.flatnonzero(np.logical_or(step.terminated, step.truncated))
    ]


def _some_ends(trace: Trace) -> list[tuple[int, int]]:
    ends = _ends(trace)
    if not ends:
        raise _SkippedError(f"no episode ended in {len(trace.steps)} random steps")
    return ends


def _metadata(mode: Any) -> str:
    if not isinstance(mode, AutoresetMode):
        raise _FailedError(
            f"metadata['autoreset_mode'] is {mode!r}, but expected a gymnasium.vector.AutoresetMode"
        )
    return f"autoreset_mode is {mode.name}"


def _vector_spaces(env: VectorEnv, name: str) -> str:
    layout = ObsLayout(env.single_observation_space, name)
    ActionCheck(env.single_action_space, env.num_envs, name)
    for kind in ("observation_space", "action_space"):
        single, batch = getattr(env, f"single_{kind}"), getattr(env, kind)
        expected = batch_space(single, env.num_envs)
        if type(batch) is not type(expected) or batch.shape != expected.shape:
            raise _FailedError(f"{kind} is {batch}, but expected {expected} (a batch of single_{kind})")
    return f"supported; the agent sees {layout.space}".replace("\n", "")


def _vector_reset(env: VectorEnv, seed: int) -> str:
    out = env.reset(seed=seed)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        raise _FailedError(f"reset returned {type(out).__name__}, but expected (observations, info)")
    if not env.observation_space.contains(out[0]):
        raise _FailedError(f"reset: {_why_outside(env.observation_space, out[0])}")
    return "the first observations are in the observation space"


def _shapes(env: VectorEnv, trace: Trace) -> str:
    expected = {key: part.shape for key, part in _arrays(trace.start).items()}
    for t, step in enumerate(trace.steps):
        for name in ("reward", "terminated", "truncated"):
            shape = np.shape(getattr(step, name))
            if shape != (env.num_envs,):
                raise _FailedError(f"step {t}: {name} has shape {shape}, but expected {(env.num_envs,)}")
        for key, part in _arrays(step.obs).items():
            if part.shape != expected.get(key):
                raise _FailedError(
                    f"step {t}: {key} has shape {part.shape}, but expected {expected.get(key)}"
                )
    return f"{len(trace.steps)} steps of {env.num_envs} environments"


def _dtypes(env: VectorEnv, trace: Trace) -> str:
    for t, step in enumerate(trace.steps):
        for name in ("terminated", "truncated"):
            dtype = np.asarray(getattr(step, name)).dtype
            if dtype != np.bool_:
                raise _FailedError(f"step {t}: {name} has dtype {dtype}, but expected bool")
        dtype = np.asarray(step.reward).dtype
        if dtype.kind not in "iuf":
            raise _FailedError(f"step {t}: reward has dtype {dtype}, but expected a number")
        if not env.observation_space.contains(step.obs):
            raise _FailedError(f"step {t}: {_why_outside(env.observation_space, step.obs)}")
    return "flags are bool, rewards numbers, observations as the space says"


def _finite(trace: Trace) -> str:
    for t, step in enumerate(trace.steps):
        for key, part in {**_arrays(step.obs), "reward": np.asarray(step.reward)}.items():
            if not np.isfinite(part).all():
                raise _FailedError(f"step {t}: {key} holds NaN or infinity")
    return "no NaN and no infinity in observations and rewards"


def _same_traces(a: Trace, b: Trace) -> int | None:
    """Return the first step in which two runs differ, -1 for the reset, None if they are the same."""
    if not _same(a.start, b.start):
        return -1
    for t, (x, y) in enumerate(zip(a.steps, b.steps, strict=False)):
        if not all(_same(p, q) for p, q in zip(x[:4], y[:4], strict=True)):
            return t
    return None


def _seed_int(env: VectorEnv, seed: int, actions: list[Any], mode: Any, trace: Trace) -> str:
    limit = min(200, len(actions))
    first = _same_traces(trace, _play(env, seed, actions, mode, limit))
    if first is not None:
        raise _FailedError(f"reset(seed={seed}) and the same actions go apart in step {first}")
    if _same_traces(trace, _play(env, seed + 1000, actions, mode, limit)) is None:
        raise _DoubtError("another seed gives the same run; right only if nothing in it is random")
    return "the same seed gives the same run, another one another"


def _seed_list(env: VectorEnv, seed: int, trace: Trace) -> str:
    try:
        seeds: Any = [seed + n for n in range(env.num_envs)]
        obs, _ = env.reset(seed=seeds)
    except TypeError as error:
        raise _SkippedError(f"reset takes no list of seeds: {error}") from error
    if not _same(obs, trace.start):
        raise _DoubtError(f"reset(seed=[{seed}, {seed + 1}, ...]) differs from reset(seed={seed})")
    return "a list of consecutive seeds is the same as the first of them"


def _reset_mask(env: VectorEnv, seed: int, mode: Any) -> str:
    complaint = _FailedError if mode is AutoresetMode.DISABLED else _DoubtError
    if env.num_envs < 2:
        raise _SkippedError("needs at least 2 environments")
    obs, _ = env.reset(seed=seed)
    before = copy.deepcopy(obs)
    for _ in range(2):
        obs, _, terminated, truncated, _ = env.step(_zero_actions(env))
        if np.logical_or(terminated, truncated).any():
            raise _SkippedError("episodes are too short to try it")
        before = copy.deepcopy(obs)
    mask = np.zeros(env.num_envs, dtype=bool)
    mask[0] = True
    try:
        after, _ = env.reset(options={"reset_mask": mask})
    except Exception as error:
        raise complaint(f"reset with a reset_mask raised {type(error).__name__}: {error}") from error
    for n in range(1, env.num_envs):
        if not _same(_rows(before, n), _rows(after, n)):
            raise complaint(f"a reset_mask for environment 0 alone changed environment {n}")
    return "a masked reset leaves the other environments alone"


def _zero_actions(env: VectorEnv) -> Any:
    check = ActionCheck(env.single_action_space, env.num_envs)
    space = check.space
    middle = np.zeros((env.num_envs, *(space.shape or ())), dtype=space.dtype)
    if isinstance(space, spaces.Box):
        middle = np.clip(middle, space.low, space.high)
    return check(middle)


def _autoreset(trace: Trace, mode: Any) -> str:
    ends = _some_ends(trace)
    last = len(trace.steps) - 1
    if mode is AutoresetMode.NEXT_STEP:
        for t, n in ends:
            if t == last:
                continue
            after = trace.steps[t + 1]
            if after.reward[n] != 0 or after.terminated[n] or after.truncated[n]:
                raise _FailedError(
                    f"step {t + 1}: environment {n} ended in the step before, so this one only resets it: "
                    f"reward and flags are {after.reward[n]}, {after.terminated[n]}, {after.truncated[n]}, "
                    "but expected 0, False, False"
                )
        return f"after each of {len(ends)} ends comes a step that only resets"
    if mode is AutoresetMode.SAME_STEP:
        told = [(t, n) for t, n in ends if "final_obs" in trace.steps[t].info]
        if told and all(_same(_rows(trace.steps[t].obs, n), _final_row(trace.steps[t], n)) for t, n in told):
            raise _DoubtError(
                f"at each of {len(told)} ends obs is the same as final_obs; right only if episodes begin "
                "where they end, otherwise nothing is reset, or reset() writes into what step() returned"
            )
        return f"at each of {len(ends)} ends obs is the beginning of the next episode"
    if mode is AutoresetMode.DISABLED:
        for t, n in ends:
            for other in range(len(trace.steps[t].reward)):
                ended = trace.steps[t].terminated[other] or trace.steps[t].truncated[other]
                if not ended and not _same(_rows(trace.steps[t].obs, other), _rows(trace.resets[t], other)):
                    raise _FailedError(f"step {t}: resetting environment {n} changed environment {other}")
        return f"after each of {len(ends)} ends a masked reset began the next episode"
    raise _SkippedError("the mode is unknown")


def _final_row(step: Step, n: int) -> Any:
    return _rows(step.info["final_obs"], n)


def _final_obs(env: VectorEnv, trace: Trace, mode: Any) -> str:
    ends = _some_ends(trace)
    if mode is not AutoresetMode.SAME_STEP:
        return f"obs itself holds the last observation ({getattr(mode, 'name', mode)})"
    for t, n in ends:
        step = trace.steps[t]
        if "final_obs" not in step.info:
            raise _FailedError(f"step {t}: environment {n} ended, but info has no 'final_obs'")
        if not env.single_observation_space.contains(_final_row(step, n)):
            raise _FailedError(
                f"step {t}: {_why_outside(env.single_observation_space, _final_row(step, n), 'final_obs')}"
            )
    return f"info['final_obs'] is there at each of {len(ends)} ends"


def _episodes(env: VectorEnv, seed: int, actions: list[Any], trace: Trace, mode: Any) -> str:
    _some_ends(trace)
    counted: list[tuple[float, int, int]] = []
    returns, lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, dtype=int)
    resetting = np.zeros(env.num_envs, dtype=bool)
    for step in trace.steps:
        for n in range(env.num_envs):
            if not resetting[n]:
                returns[n] += step.reward[n]
                lengths[n] += 1
            ended = bool(step.terminated[n] or step.truncated[n])
            if ended:
                counted.append((float(returns[n]), int(lengths[n]), n))
                returns[n], lengths[n] = 0.0, 0
            resetting[n] = ended and mode is AutoresetMode.NEXT_STEP
    envs = Envs(env)
    envs.reset(seed)
    start = np.asarray(getattr(env.single_action_space, "start", 0))
    for action in actions[: len(trace.steps)]:
        envs.step(np.asarray(action) - start if start.any() else np.asarray(action))
    found = [tuple(episode) for episode in envs.episodes()]
    if found != counted:
        raise _FailedError(f"the adapter counted {found[:3]}... but by hand these are {counted[:3]}...")
    return f"{len(found)} episodes, returns and lengths as counted by hand"


def _copies(trace: Trace) -> str:
    for t, (returned, at_once) in enumerate(trace.kept):
        if not _same(returned, at_once):
            raise _DoubtError(
                f"what step {t - 1} returned was overwritten later; pywm copies it, other code may not"
            )
    return "returned arrays are not written to later"


def _bad_action(env: VectorEnv, seed: int, name: str) -> str:
    envs = Envs(env, name=name)
    space = envs.action_space
    bad = np.zeros((env.num_envs, *(space.shape or ())), dtype=space.dtype)
    bad[-1] = np.nan if isinstance(space, spaces.Box) else 100 if bad.itemsize == 1 else 2**31 - 1
    envs.reset(seed)
    try:
        envs.step(bad)
    except ValueError:
        pass
    else:
        raise _FailedError("the adapter let an action out of its range pass")
    if "ale" in type(env).__module__ or "atari" in type(env).__module__:
        return "refused by the adapter (ALE itself would wait for ever)"
    outcome: list[str] = []

    def ask() -> None:
        try:
            env.step(bad)
            outcome.append("accepts it")
        except BaseException as error:
            outcome.append(f"raises {type(error).__name__}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(BAD_ACTION_PATIENCE_S)
    if not outcome:
        seconds = f"{BAD_ACTION_PATIENCE_S:.0f} s"
        raise _DoubtError(f"refused by the adapter; the environment itself hangs (waited {seconds})")
    return f"refused by the adapter; the environment itself {outcome[0]}"


def _close(env: VectorEnv) -> str:
    env.close()
    env.close()
    return "closing twice does no harm"
