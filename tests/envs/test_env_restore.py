"""Saved, put into fresh environments, and continued: every number is the same."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from restoring import act, check_restoring, same, through_a_file

from pywm.envs import Envs, make
from pywm.envs.toy import Counter, Match
from pywm.errors import CheckpointError
from pywm.types import State


@pytest.mark.parametrize(
    ("env_id", "limit"),
    [
        ("CartPole-v1", None),
        ("CartPole-v1", 15),
        ("CartPole-v0", 30),
        ("Pendulum-v1", 30),
        ("Acrobot-v1", 30),
        ("MountainCar-v0", 30),
        ("MountainCarContinuous-v0", 30),
        ("pywm/Counter-v0", None),
        ("pywm/Truncation-v0", None),
        ("pywm/Match-v0", None),
        ("pywm/TMaze-v0", None),
        ("pywm/DelayedCopy-v0", None),
        ("pywm/Grid-v0", None),
        ("pywm/GridChase-v0", 30),
    ],
)
@pytest.mark.filterwarnings("ignore:.*out of date.*:DeprecationWarning")
def test_registered_environments_continue_exactly(env_id: str, limit: int | None) -> None:
    check_restoring(lambda: make(env_id, 3, max_episode_steps=limit), 47, 70)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("before", [0, 1, 2, 3, 4, 5])
def test_every_mode_continues_exactly_even_with_a_reset_pending(mode: AutoresetMode, before: int) -> None:
    kinds = [(2, "terminated"), (3, "truncated"), (4, "both")]

    def build() -> Envs:
        return Envs(SyncVectorEnv([lambda k=k: Counter(*k) for k in kinds], autoreset_mode=mode))

    check_restoring(build, before, 12)


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
@pytest.mark.parametrize("action", ["discrete", "multi_discrete", "box"])
def test_every_form_of_match_continues_exactly(action: str, obs: str) -> None:
    check_restoring(lambda: make("pywm/Match-v0", 2, env_kwargs={"action": action, "obs": obs}), 5, 10)


def test_the_current_observation_is_part_of_the_state() -> None:
    envs = make("CartPole-v1", 2, seed=3)
    envs.reset()
    out = envs.step(np.array([0, 1]))
    fresh = make("CartPole-v1", 2)
    fresh.set_state(through_a_file(envs.get_state()))
    same(fresh.obs, out.obs)


def test_saving_changes_nothing() -> None:
    runs = []
    for save in (False, True):
        envs = make("CartPole-v1", 2, seed=3)
        envs.reset()
        rng = np.random.default_rng(0)
        outs = []
        for _ in range(60):
            outs.append(envs.step(act(envs, rng)))
            if save:
                envs.get_state()
        runs.append(outs)
    for a, b in zip(*runs, strict=True):
        same(a.obs, b.obs)


def test_episodes_not_fetched_yet_are_kept() -> None:
    envs = make("pywm/Counter-v0", 2)
    envs.reset(0)
    for _ in range(4):
        envs.step(np.zeros(2, dtype=np.int64))
    fresh = make("pywm/Counter-v0", 2)
    fresh.set_state(through_a_file(envs.get_state()))
    assert fresh.episodes() == envs.episodes() != []


class Hidden(gymnasium.Wrapper):
    """A wrapper with a memory that nobody saves."""


def test_what_cannot_be_reached_is_not_restorable() -> None:
    class Subclass(Match):
        pass

    assert make(Subclass).restorable
    hidden = make(lambda: Hidden(Match()))
    assert not hidden.restorable
    hidden.reset(0)
    assert hidden.get_state() is None
    with pytest.raises(CheckpointError, match="cannot be restored"):
        hidden.set_state(State({}, {}))

    class Pendulum(PendulumEnv):
        pass

    assert not make(Pendulum).restorable


def test_a_vector_wrapper_does_not_borrow_the_state_of_what_it_wraps() -> None:
    inner = make("CartPole-v1", 2).env
    assert not make(gymnasium.wrappers.vector.RecordEpisodeStatistics(inner)).restorable


def test_a_state_of_something_else_is_refused() -> None:
    envs = make("CartPole-v1", 2)
    assert envs.get_state() is None
    envs.reset(0)
    state = through_a_file(envs.get_state())
    with pytest.raises(CheckpointError, match="num_envs is 2, but expected 3"):
        make("CartPole-v1", 3).set_state(state)
    with pytest.raises(CheckpointError, match="name is 'CartPole-v1', but expected 'pywm/Counter-v0'"):
        make("pywm/Counter-v0", 2).set_state(state)
