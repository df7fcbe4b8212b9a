"""Every check finds the fault that it is there for, and sound environments pass."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from pywm.envs import checks, make
from pywm.envs.cartpole import CartPole
from pywm.envs.checks import check_env, check_vector_env
from pywm.envs.toy import Counter, Match
from pywm.errors import UserError


@pytest.mark.parametrize("env", ["CartPole-v1", "pywm/Match-v0", "Pendulum-v1"])
def test_sound_environments_pass(env: str) -> None:
    report = check_env(env, steps=300)
    assert report.ok, str(report)
    text = str(report)
    assert text.startswith(env)
    assert "vector keys" in text
    assert f"{len(report.checks)} checks: " in text


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_mode_passes(mode: AutoresetMode) -> None:
    report = check_vector_env(SyncVectorEnv([lambda: Match(length=5)] * 3, autoreset_mode=mode), steps=60)
    assert {check.status for check in report.checks} == {"ok"}, str(report)
    assert len(report.checks) >= 12
    assert report.facts["autoreset"] == mode.name


def test_an_environment_that_cannot_be_made_raises() -> None:
    with pytest.raises(UserError, match="closest"):
        check_env("CartPol-v1")


# ---- single environments, each with one fault


class Base(gymnasium.Env):
    observation_space: Any = spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space: Any = spaces.Discrete(2)

    def draw(self) -> Any:
        return self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.draw(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.draw(), 1.0, self.t == 6, False, {}


class NaN(Base):
    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        return np.where(self.t == 5, np.nan, obs).astype(np.float32), *rest


class WrongDtype(Base):
    def draw(self) -> Any:
        return super().draw().astype(np.float64)


class WrongShape(Base):
    observation_space = spaces.Dict({"arm": spaces.Box(-1.0, 1.0, (3,), np.float32)})

    def draw(self) -> Any:
        return {"arm": np.zeros(2, np.float32)}


class OutOfRange(Base):
    def draw(self) -> Any:
        return super().draw() + 20


class GlobalRandom(Base):
    def draw(self) -> Any:
        return np.random.uniform(-1, 1, 2).astype(np.float32)


class Unseeded(Base):
    rng = np.random.default_rng(0)

    def step(self, action: Any) -> Any:
        _, *rest = super().step(action)
        return self.rng.uniform(-1, 1, 2).astype(np.float32), *rest


class SameArray(Base):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.array = np.zeros(2, np.float32)
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        self.array[:] = obs
        return self.array, *rest


class Endless(Base):
    def step(self, action: Any) -> Any:
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, False, truncated, info


class ListReward(Base):
    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, np.ones(1), *rest


class IntFlag(Base):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, *rest = super().step(action)
        return obs, reward, int(terminated), *rest


class OldGym(Base):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, info


class Unsupported(Base):
    observation_space = spaces.Tuple((spaces.Discrete(2),))

    def draw(self) -> Any:
        return (np.int64(0),)


@pytest.mark.parametrize(
    ("env", "check", "status", "message"),
    [
        (NaN, "finite", "failed", "after 5 steps obs holds NaN"),
        (NaN, "observations", "failed", "after 5 steps: obs holds NaN"),
        (WrongDtype, "observations", "failed", r"obs is float64 \(2,\), but expected float32 \(2,\)"),
        (
            WrongShape,
            "observations",
            "failed",
            r"obs\['arm'\] is float32 \(2,\), but expected float32 \(3,\)",
        ),
        (OutOfRange, "observations", "failed", "obs holds values from .*, but expected -10.0 to 10.0"),
        (GlobalRandom, "seeding", "failed", "self.np_random"),
        (Unseeded, "determinism", "failed", "go apart after 1 steps"),
        (SameArray, "copies", "failed", "was overwritten later"),
        (Endless, "episode end", "warning", "no episode ended"),
        (ListReward, "reward and flags", "failed", "the reward is array"),
        (IntFlag, "reward and flags", "failed", "terminated is a int, but expected bool"),
        (WrongDtype, "gymnasium", "failed", "not within the observation space"),
        (
            OldGym,
            "observations",
            "failed",
            r"Expected gymnasium's interface: step\(\) returns obs, reward, term",
        ),
    ],
)
def test_faults_of_single_environments_are_found(env: Any, check: str, status: str, message: str) -> None:
    report = check_env(env, steps=60)
    found = report[check]
    assert found.status == status, str(report)
    assert re.search(message, found.detail), found.detail
    assert report.ok == (status != "failed")


def test_a_sound_base_passes() -> None:
    report = check_env(Base, steps=60)
    assert report.ok, str(report)


def test_a_space_that_is_not_supported_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="FlattenObservation"):
        check_env(Unsupported)


# ---- vector environments, each with one fault


class Vector(VectorEnv):
    """A counter of ``2`` environments in the given mode, from which the faulty ones are made."""

    num_envs = 2
    single_observation_space: Any = spaces.Box(0.0, 1e6, (1,), np.float32)
    single_action_space = spaces.Discrete(2)
    observation_space = spaces.Box(0.0, 1e6, (2, 1), np.float32)
    action_space = spaces.MultiDiscrete([2, 2])

    def __init__(self, mode: AutoresetMode = AutoresetMode.SAME_STEP) -> None:
        self.metadata = {"autoreset_mode": mode}
        self.mode = mode
        self.t = np.zeros(2)
        self.over = np.zeros(2, bool)

    def obs(self) -> np.ndarray:
        return (self.start + self.t)[:, None].astype(np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        mask = np.ones(2, bool) if options is None else options["reset_mask"]
        if isinstance(seed, int):
            self.start = np.array([10.0 * seed, 10.0 * seed + 10])
        elif seed is not None:
            self.start = 10.0 * np.array(seed)
        self.t[mask] = 0
        self.over[mask] = False
        return self.obs(), {}

    def step(self, actions: Any) -> Any:
        resetting = self.over & (self.mode is AutoresetMode.NEXT_STEP)
        self.t = np.where(resetting, 0, self.t + 1)
        reward = np.where(resetting, 0.0, 1.0)
        self.over = self.t >= np.array([3, 4])
        terminated = self.over.copy()
        info: dict[str, Any] = {}
        if self.mode is AutoresetMode.SAME_STEP and self.over.any():
            info = {"final_obs": self.obs()}
            self.t[self.over] = 0
        return self.obs(), reward, terminated, np.zeros(2, bool), info

    def close(self, **kwargs: Any) -> None:
        pass


class NoFinal(Vector):
    def step(self, actions: Any) -> Any:
        return *super().step(actions)[:4], {}


class WrongFinal(Vector):
    def step(self, actions: Any) -> Any:
        *out, info = super().step(actions)
        return *out, {key: value.astype(np.float64) for key, value in info.items()}


class PaidReset(Vector):
    def step(self, actions: Any) -> Any:
        obs, _, *rest = super().step(actions)
        return obs, np.ones(2), *rest


class NeverResets(Vector):
    def step(self, actions: Any) -> Any:
        obs, *rest, info = super().step(actions)
        return info.get("final_obs", obs), *rest, info


class ResetsAll(Vector):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=seed)


class Drifting(Vector):
    drift = 0.0

    def step(self, actions: Any) -> Any:
        self.drift += 1
        obs, *rest = super().step(actions)
        return obs + np.float32(self.drift), *rest


class Listless(Vector):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if isinstance(seed, list):
            raise TypeError("no lists")
        return super().reset(seed=seed, options=options)


class FloatFlags(Vector):
    def step(self, actions: Any) -> Any:
        obs, reward, terminated, *rest = super().step(actions)
        return obs, reward, terminated.astype(np.float32), *rest


class ScalarReward(Vector):
    def step(self, actions: Any) -> Any:
        obs, _, *rest = super().step(actions)
        return obs, 1.0, *rest


class Infinite(Vector):
    def step(self, actions: Any) -> Any:
        obs, reward, *rest = super().step(actions)
        return obs, reward * np.inf, *rest


class Aliasing(Vector):
    def obs(self) -> np.ndarray:
        self.array = getattr(self, "array", np.zeros((2, 1), np.float32))
        self.array[:] = super().obs()
        return self.array


class OneClose(Vector):
    closed_before = False

    def close(self, **kwargs: Any) -> None:
        if self.closed_before:
            raise RuntimeError("closed already")
        self.closed_before = True


class Hanging(Vector):
    def step(self, actions: Any) -> Any:
        if np.max(actions) > 1:
            time.sleep(60)
        return super().step(actions)


class WrongBatch(Vector):
    observation_space = spaces.Box(0.0, 1e6, (3, 1), np.float32)


NEXT, SAME, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED


@pytest.mark.parametrize(
    ("build", "check", "status", "message"),
    [
        (lambda: Vector("whatever"), "metadata", "failed", "is 'whatever'"),  # type: ignore[arg-type]
        (WrongBatch, "spaces", "failed", "observation_space is Box"),
        (NoFinal, "final_obs", "failed", "info has no 'final_obs'"),
        (WrongFinal, "final_obs", "failed", "final_obs is float64"),
        (lambda: PaidReset(NEXT), "autoreset", "failed", "ended in the step before"),
        (NeverResets, "autoreset", "warning", "obs is the same as final_obs"),
        (lambda: ResetsAll(DISABLED), "autoreset", "failed", "changed environment"),
        (lambda: ResetsAll(DISABLED), "reset_mask", "failed", "changed environment 1"),
        (ResetsAll, "reset_mask", "warning", "changed environment 1"),
        (Drifting, "seed", "failed", "go apart in step 0"),
        (Listless, "seed list", "skipped", "no lists"),
        (FloatFlags, "dtypes", "failed", "terminated has dtype float32"),
        (ScalarReward, "shapes", "failed", r"reward has shape \(\)"),
        (Infinite, "finite", "failed", "reward holds NaN or infinity"),
        (Aliasing, "copies", "warning", "overwritten later"),
        (OneClose, "close", "failed", "closed already"),
        (Hanging, "bad action", "warning", "hangs"),
    ],
)
def test_faults_of_vector_environments_are_found(
    build: Callable[[], Any], check: str, status: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "BAD_ACTION_PATIENCE_S", 0.2)
    found = check_vector_env(build(), steps=30)[check]
    assert found.status == status, found
    assert re.search(message, found.detail), found.detail


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_sound_vector_passes_in_every_mode(mode: AutoresetMode) -> None:
    report = check_vector_env(Vector(mode), steps=30)
    assert {check.status for check in report.checks} == {"ok"}, str(report)


def test_an_adapter_that_counts_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.Envs, "episodes", lambda *_: [])
    assert check_vector_env(Vector(), steps=30)["episodes"].status == "failed"


def test_an_adapter_that_passes_bad_actions_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.Envs, "step", lambda *_: None)
    assert check_vector_env(Vector(), steps=30)["bad action"].status == "failed"


def test_envs_can_be_checked_and_are_closed() -> None:
    envs = make("CartPole-v1", 2)
    report = check_vector_env(envs, steps=60)
    assert report.ok
    assert report.name == "CartPole-v1"
    assert isinstance(envs.env, CartPole)
    assert envs.env.closed
    with pytest.raises(KeyError):
        report["nothing"]


def test_facts_tell_what_the_agent_will_see() -> None:
    report = check_env(lambda: Match("box", "dict"), steps=40)
    assert report.facts["image keys"] == "image"
    assert report.facts["vector keys"] == "vector"
    assert report.facts["restorable"] == "yes"
    assert check_env(Base, steps=20).facts["restorable"].startswith("no get_state")
    assert check_env(Counter, steps=20).ok
