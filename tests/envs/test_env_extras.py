"""Environments of the extras, where they are installed."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from pywm.envs import Envs, dmc, make, split_keys
from pywm.envs.dmc import DMControl
from pywm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def run(envs: Envs, steps: int = 5) -> list[np.ndarray]:
    """Return the rewards of a few steps with the first action there is."""
    envs.reset()
    space = envs.action_space
    action = np.zeros((envs.num_envs, *(space.shape or ())), dtype=space.dtype)
    rewards = [envs.step(action).reward for _ in range(steps)]
    envs.close()
    return rewards


def test_dm_control() -> None:
    pytest.importorskip("dm_control", exc_type=ImportError)
    envs = make("dmc:cartpole_balance", 2, seed=1, max_episode_steps=4, env_kwargs={"action_repeat": 2})
    assert envs.observation_space.shape == (5,)
    assert envs.action_space == spaces.Box(-1.0, 1.0, (1,), np.float32)
    first = run(envs)
    assert [episode.length for episode in envs.episodes()] == [4, 4]
    assert 1.0 < first[0][0] <= 2.0
    again = run(make("dmc:cartpole_balance", 2, seed=1, max_episode_steps=4, env_kwargs={"action_repeat": 2}))
    np.testing.assert_array_equal(first, again)
    with pytest.raises(UserError, match=r"The closest are dmc:walker_walk"):
        make("dmc:walker_wlak")


def test_dm_control_episodes_are_truncated_by_the_clock() -> None:
    pytest.importorskip("dm_control", exc_type=ImportError)
    envs = make("dmc:cartpole_balance", 1, env_kwargs={"action_repeat": 100})
    envs.reset()
    outs = [envs.step(np.zeros((1, 1), dtype=np.float32)) for _ in range(10)]
    assert outs[-1].truncated[0]
    assert not outs[-1].terminated[0]
    envs.close()


def test_crafter() -> None:
    pytest.importorskip("crafter", exc_type=ImportError)
    envs = make("crafter:reward", 2, env_kwargs={"length": 3})
    assert envs.observation_space.shape == (3, 64, 64)
    assert split_keys(envs.observation_space).image == ("obs",)
    envs.reset()
    outs = [envs.step(np.zeros(2, dtype=np.int64)) for _ in range(3)]
    assert outs[-1].truncated.all()
    assert not outs[-1].terminated.any()
    envs.close()
    with pytest.raises(UserError, match="crafter:noreward"):
        make("crafter:rewards")


def test_minigrid() -> None:
    pytest.importorskip("minigrid", exc_type=ImportError)
    envs = make("MiniGrid-Empty-5x5-v0", 2)
    assert isinstance(envs.observation_space, spaces.Dict)
    assert split_keys(envs.observation_space) == ((), ("direction", "image"))
    run(envs)


def test_dmc_says_what_rendering_needs(monkeypatch):
    pytest.importorskip("dm_control.suite")
    env = DMControl("cartpole_balance", render_mode="rgb_array")

    def no_display(*_arguments, **_settings):
        raise RuntimeError("no display")

    monkeypatch.setattr(type(env._env.physics), "render", no_display)
    with pytest.raises(
        UserError, match=r"no picture with MUJOCO_GL=.* \(no display\).*apt install libegl1 libosmesa6"
    ):
        env.render()


@pytest.mark.parametrize(
    ("there", "chosen"), [({"EGL", "OSMesa"}, "egl"), ({"OSMesa"}, "osmesa"), (set(), "disable")]
)
def test_dmc_renders_with_what_is_there(monkeypatch, there, chosen):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in there else None)
    assert dmc._gl_backend() == chosen
