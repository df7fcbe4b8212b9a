"""The algorithms, one file each. A file in this folder is its registration."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from pywm.config import Preset, from_json, suggest
from pywm.errors import CheckpointError, UserError

__all__ = ["algorithms", "choose_preset", "get", "load"]


def algorithms() -> list[str]:
    """List the names of all algorithms."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> ModuleType:
    """Import an algorithm's module, which exports ``Config``, ``Agent``, ``train`` and ``PRESETS``.

    Raises:
        UserError: there is none of that name; the closest one is suggested.
    """
    if name not in algorithms():
        raise UserError(f"no algorithm {name!r}.{suggest(name, algorithms())}")
    return importlib.import_module(f"{__name__}.{name}")


def choose_preset(module: ModuleType, env: str, name: str | None = None) -> tuple[str, Preset] | None:
    """Choose the preset called ``name``, or else the first one made for the environment.

    Returns:
        Its name and the preset, or None where none was asked for and none suits.

    Raises:
        UserError: the algorithm has no preset of that name.
    """
    presets: dict[str, Preset] = getattr(module, "PRESETS", {})
    if name is not None:
        if name not in presets:
            algo = module.__name__.rpartition(".")[2]
            raise UserError(f"{algo} has no preset {name!r}.{suggest(name, presets)}")
        return name, presets[name]
    return next(((key, preset) for key, preset in presets.items() if preset.suits(env)), None)


def load(
    run_dir: Path | str,
    *,
    env: Any = None,
    num_envs: int = 1,
    which: str = "latest",
    device: str = "cpu",
    render_mode: str | None = None,
) -> tuple[Any, Any]:
    """Load the agent of a run, and an environment like the one it was trained in.

    ::

        agent, env = pywm.load("runs/CartPole-v1/ppo/0-20261122-120000")
        obs, state = env.reset(seed=0), None
        action, state = agent.act(obs, state, greedy=True)

    Args:
        run_dir: the run's directory.
        env: what to make the environment from; needed where the run was trained in a callable.
        num_envs: parallel environments.
        which: ``"latest"``, ``"best"`` or the name of a step directory.
        device: where the agent's networks go.
        render_mode: of the environment; ``"rgb_array"`` for pictures.

    Returns:
        The agent and a :class:`pywm.envs.Envs` with raw rewards.

    Raises:
        CheckpointError: this is no run, or it has no valid checkpoint.
    """
    from pywm.envs import make
    from pywm.training import checkpoint
    from pywm.training.directory import read_run

    about = read_run(run_dir)
    module = get(about["algo"])
    config = from_json(module.Config, about["config"])
    loaded = checkpoint.load(Path(run_dir) / "checkpoints", which=which, parts=("agent",))
    state = checkpoint.part(loaded.state, "agent")
    if state is None:
        raise CheckpointError(f"{loaded.path}: holds no agent")
    envs = make(
        about["env"] if env is None else env,
        num_envs,
        seed=about["seed"],
        training=False,
        render_mode=render_mode,
        max_episode_steps=getattr(config, "max_episode_steps", None),
        env_kwargs=getattr(config, "env_kwargs", None),
    )
    try:
        agent = module.Agent(config, envs.observation_space, envs.action_space, device)
        agent.load_state(state)
    except (KeyError, RuntimeError, ValueError) as error:
        envs.close()
        raise CheckpointError(f"{loaded.path}: does not fit the agent: {error}") from error
    except BaseException:
        envs.close()
        raise
    return agent, envs
