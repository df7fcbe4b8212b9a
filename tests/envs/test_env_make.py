"""What ``make`` accepts, and what it says when it cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from pywm.envs import Envs, make
from pywm.envs.make import sources
from pywm.envs.toy import Counter, Match, Truncation
from pywm.errors import EnvError, MissingExtra, UserError


def play(envs: Envs, steps: int = 6) -> None:
    envs.reset()
    space = envs.action_space
    for _ in range(steps):
        envs.step(np.zeros((envs.num_envs, *(space.shape or ())), dtype=space.dtype))


def test_callables_with_arguments_and_a_time_limit() -> None:
    envs = make(Counter, 2, env_kwargs={"length": 9}, max_episode_steps=4)
    play(envs, 4)
    assert [episode.length for episode in envs.episodes()] == [4, 4]
    assert envs.name == "Counter"
    assert make(lambda: Match("box")).action_space.shape == (2,)


def test_the_time_limit_of_an_id_can_be_changed() -> None:
    envs = make("CartPole-v1", 1, max_episode_steps=5)
    play(envs, 5)
    assert envs.episodes()[0].length == 5
    envs = make("pywm/Truncation-v0", 1)
    play(envs, 5)
    assert envs.episodes()[0].length == 5


def test_vector_environments_are_taken_as_they_are() -> None:
    vector = SyncVectorEnv([Truncation] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert make(vector).num_envs == 3
    assert make(make(vector), 3).env is vector
    with pytest.raises(UserError, match="num_envs is 2, but expected 3"):
        make(vector, 2)


def test_the_seed_of_make_is_that_of_the_first_reset() -> None:
    np.testing.assert_array_equal(make("CartPole-v1", 2, seed=4).reset(), make("CartPole-v1", 2).reset(4))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    for name in [name for name in sys.modules if name.startswith("someones_pkg")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_package_in_the_working_directory_registers_its_environment(package: Path) -> None:
    (package / "someones_pkg.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('someones/Env-v0', entry_point='pywm.envs.toy:Counter', max_episode_steps=2)\n"
    )
    envs = make("someones_pkg:someones/Env-v0", 2)
    play(envs, 2)
    assert len(envs.episodes()) == 2
    assert "" not in sys.path


def test_a_class_of_a_module_needs_no_registration(package: Path) -> None:
    (package / "someones_pkg_2.py").write_text("from pywm.envs.toy import Counter as MyEnv\n")
    play(make("someones_pkg_2:MyEnv", 2, env_kwargs={"length": 5}))


def test_where_a_module_is_imported_from_is_found_without_importing(package: Path) -> None:
    (package / "someones_pkg_5/inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/mod.py"):
        (package / "someones_pkg_5" / name).write_text("raise AssertionError('imported')\n")
    folder = str(package / "someones_pkg_5")
    assert sources("someones_pkg_5.inner.mod:Env-v0") == [
        *(f"{folder}/__init__.py", folder),
        *(f"{folder}/inner/__init__.py", f"{folder}/inner"),
        f"{folder}/inner/mod.py",
    ]
    assert sources("gymnasium:CartPole-v1")[0] == gymnasium.__file__
    for name in ("CartPole-v1", "dmc:walker_walk", "crafter:reward", "not_there.at_all:Env-v0", "sys:x"):
        assert sources(name) == [], name
    assert "" not in sys.path


def test_an_installed_module_imports_nothing_from_the_working_directory(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = package / "site"
    site.mkdir()
    (site / "someones_pkg_6.py").write_text(
        "try:\n    import someones_pkg_7\nexcept ImportError:\n    pass\n"
        "from pywm.envs.toy import Counter as MyEnv\n"
    )
    (package / "someones_pkg_7.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(site)
    play(make("someones_pkg_6:MyEnv", 1, env_kwargs={"length": 5}))


def test_a_folder_elsewhere_does_not_hide_a_package_of_the_working_directory(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "site/someones_pkg_8").mkdir(parents=True)
    monkeypatch.syspath_prepend(package / "site")
    (package / "someones_pkg_8.py").write_text("from pywm.envs.toy import Counter as MyEnv\n")
    play(make("someones_pkg_8:MyEnv", 1, env_kwargs={"length": 5}))


def test_a_missing_module_is_named(package: Path) -> None:
    with pytest.raises(
        UserError, match=r"module 'someones_pkg_3' of 'someones_pkg_3:Env-v0' cannot be found"
    ):
        make("someones_pkg_3:Env-v0")


@pytest.mark.parametrize("line", ["import not_there_at_all", "raise RuntimeError('broken inside')"])
def test_a_module_that_fails_is_an_error_of_the_environment(package: Path, line: str) -> None:
    (package / "someones_pkg_4.py").write_text(line + "\n")
    with pytest.raises(
        EnvError, match=r"importing 'someones_pkg_4' raised .*(not_there_at_all|broken inside)"
    ):
        make("someones_pkg_4:Env-v0")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CartPol-v1", "CartPole-v1"),
        ("cartpole", "CartPole-v1"),
        ("LunarLander-v9", "LunarLander-v3"),
        ("pywm/Count-v0", "pywm/Counter-v0"),
    ],
)
def test_an_unknown_id_lists_the_three_closest(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"No env '{name}'. The closest are .*{expected}") as info:
        make(name)
    closest = str(info.value).split("closest are ")[1].split(". Write")[0]
    assert len(closest.split(", ")) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Robt", r"Did you mean 'Robot'\?"),
        ("someones/Arm-v1", r"Did you mean 'someones/Arm-v0'\?"),
        ("Nope", "Choose from Robot, someones/Arm-v0.$"),
    ],
)
def test_a_typo_in_one_s_own_module_is_answered_with_what_is_there(
    name: str, expected: str, package: Path
) -> None:
    (package / "someones_pkg_5.py").write_text(
        "import gymnasium\n"
        "from gymnasium import Env, Wrapper\n"
        "class Robot(Env): pass\n"
        "class _Hidden(Env): pass\n"
        "gymnasium.register('someones/Arm-v0', entry_point='someones_pkg_5.deep:Arm')\n"
    )
    with pytest.raises(UserError, match=rf"No env '{name}' in the module 'someones_pkg_5'. {expected}"):
        make(f"someones_pkg_5:{name}")
    gymnasium.registry.pop("someones/Arm-v0")


def test_a_module_without_environments_leaves_the_closest_of_all(package: Path) -> None:
    (package / "someones_pkg_6.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"No env 'CartPol-v1'. The closest are .*CartPole-v1"):
        make("someones_pkg_6:CartPol-v1")


@pytest.mark.parametrize(
    ("env_id", "module", "extra"),
    [
        ("ALE/Pong-v5", "ale_py", "atari"),
        ("dmc:walker_walk", "dm_control.suite", "dmc"),
        ("crafter:reward", "crafter", "crafter"),
        ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"),
        ("LunarLander-v3", "Box2D", "box2d"),
        ("Hopper-v5", "mujoco", "mujoco"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    env_id: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in [
        name for name in sys.modules if name.startswith(("gymnasium.envs.box2d", "gymnasium.envs.mujoco"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtra, match=rf'pip install "pywm\[{extra}\]"') as info:
        make(env_id)
    assert info.value.exit_code == 2


def test_drawing_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = make("CartPole-v1", 1, render_mode="rgb_array")
    envs.reset()
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(MissingExtra, match=r'pip install "pywm\[classic\]"'):
        envs.render()


def test_pictures_are_drawn_of_one_environment() -> None:
    envs = make("pywm/Match-v0", 2, render_mode="rgb_array", env_kwargs={"obs": "image"})
    obs = envs.reset()
    assert isinstance(obs, np.ndarray)
    frame = envs.render(1)
    assert frame is not None
    np.testing.assert_array_equal(frame, obs[1].transpose(1, 2, 0))
    assert make("CartPole-v1").render() is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pygame")
def test_cartpole_can_be_drawn() -> None:
    pytest.importorskip("pygame")
    envs = make("CartPole-v1", 2, render_mode="rgb_array")
    envs.reset()
    frame = envs.render()
    assert frame is not None
    assert frame.shape == (400, 600, 3)
    envs.close()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="num_envs is 0"):
        make("CartPole-v1", 0)
    for limit in (0, -5):
        for env in ("CartPole-v1", "Acrobot-v1", Counter):
            with pytest.raises(
                UserError, match=f"max_episode_steps is {limit}, but expected at least 1 or N"
            ):
                make(env, 1, max_episode_steps=limit)
    with pytest.raises(UserError, match="expected an id, a callable or a gymnasium VectorEnv"):
        make(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"returned a SyncVectorEnv, but expected a gymnasium\.Env"):
        make(lambda: SyncVectorEnv([Counter]))  # type: ignore[arg-type, return-value]
    with pytest.raises(EnvError, match=r"Counter raised TypeError while it was built: .*'nonsense'"):
        make(Counter, env_kwargs={"nonsense": 1})


def test_box2d_loads_where_warnings_are_errors() -> None:
    pytest.importorskip("pygame")
    envs = make("LunarLander-v3", 2)
    play(envs)
    assert not envs.restorable
    envs.close()


def test_every_gymnasium_environment_here_runs() -> None:
    for env_id in ("Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "FrozenLake-v1"):
        envs = make(env_id, 2)
        play(envs)
        assert isinstance(envs.observation_space, gymnasium.spaces.Box)
        envs.close()


def test_the_toys_pay_what_they_promise() -> None:
    actions: dict[str, Any] = {
        "discrete": lambda obs: obs.argmax(1),
        "multi_discrete": lambda obs: np.stack([obs[:, :3].argmax(1), obs[:, 3:].argmax(1)], axis=1),
        "box": lambda obs: obs,
    }
    for action, policy in actions.items():
        envs = make("pywm/Match-v0", 2, env_kwargs={"action": action})
        obs = envs.reset()
        for _ in range(8):
            obs = envs.step(policy(obs)).obs
        assert [episode.return_ for episode in envs.episodes()] == pytest.approx([8.0, 8.0], abs=1e-6)
    with pytest.raises(UserError, match="Match: obs is 'sound'"):
        Match(obs="sound")
    with pytest.raises(UserError, match="Match: action is 'dance'"):
        Match(action="dance")
    with pytest.raises(UserError, match="Counter: end is 'never'"):
        Counter(end="never")
