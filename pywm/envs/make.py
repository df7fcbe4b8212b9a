"""From a name, a function or a vector environment to ``Envs``."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

# These register our own environments.
import pywm.envs.delayed_copy
import pywm.envs.grid
import pywm.envs.grid_chase
import pywm.envs.tmaze
import pywm.envs.toy  # noqa: F401
from pywm.config import suggest
from pywm.envs.atari import Atari
from pywm.envs.cartpole import CartPole
from pywm.envs.catch import CatchVector
from pywm.envs.grid_chase import MAX_STEPS, GridChaseVector
from pywm.envs.vector import Envs, missing_extra
from pywm.errors import EnvError, MissingExtra, PywmError, UserError

__all__ = ["EnvLike", "make", "sources"]

EnvLike = str | Callable[..., gymnasium.Env] | VectorEnv | Envs

# Packages that register their environments when imported, by the beginning of the ids, and their extras.
PACKAGES = {
    "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"),
    "ALE/": ("ale_py", "atari"),
}


def make(
    env: EnvLike,
    num_envs: int | None = None,
    *,
    seed: int = 0,
    training: bool = True,
    render_mode: str | None = None,
    max_episode_steps: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
) -> Envs:
    """Make ``num_envs`` environments that step together under one law.

    ==============================  ==================================================================
    ``"CartPole-v1"``               any gymnasium id; CartPole-v1, pywm/Catch-v0 and pywm/GridChase-v0 run in one batched
                                    step
    ``"my_pkg:MyEnv-v0"``           the module is imported first, also from the working directory
    ``"my_pkg:MyEnv"``              a class or function of a module
    ``"ALE/Pong-v5"``               ALE's native vector environment: uint8 ``[4, 84, 84]``, see ``Atari``
    ``"dmc:walker_walk"``           DeepMind Control, observations side by side in one vector
    ``"crafter:reward"``            Crafter, uint8 ``[3, 64, 64]``; also ``"crafter:noreward"``
    a callable                      returns one ``gymnasium.Env`` a call
    a ``VectorEnv``                 taken as it is, in any autoreset mode
    ==============================  ==================================================================

    Args:
        env: what to make, see above.
        num_envs: how many; None means 1, or as many as the ``VectorEnv`` has.
        seed: the seed of the first ``reset()``.
        training: Atari rewards are clipped to their sign; off, rewards are raw everywhere. Episodes always
            report raw returns.
        render_mode: ``"rgb_array"`` for ``Envs.render``.
        max_episode_steps: truncate episodes after so many steps, instead of the registered number.
        env_kwargs: arguments for the environment (Atari: of ``pywm.envs.atari.Atari``).

    Returns:
        The environments, not reset yet.

    Raises:
        UserError: no such environment; the message lists the closest names.
        MissingExtra: a package is not installed; the message says how to install it.
        EnvError: the environment failed while it was built.
    """
    if num_envs is not None and num_envs < 1:
        raise UserError(f"make: num_envs is {num_envs}, but expected at least 1")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise UserError(f"make: max_episode_steps is {max_episode_steps}, but expected at least 1 or None")
    if isinstance(env, Envs | VectorEnv):
        return _adopt(env, num_envs, seed)
    count = num_envs or 1
    kwargs = dict(env_kwargs or {})
    clip = False
    if not isinstance(env, str):
        if not callable(env):
            raise UserError(f"make: env is {env!r}, but expected an id, a callable or a gymnasium VectorEnv")
        name = getattr(env, "__qualname__", type(env).__name__)
        build = functools.partial(_call, env, name, render_mode, max_episode_steps, kwargs)
        source = _sync(build, count, name)
    else:
        name = env
        source = _from_id(env, count, render_mode, max_episode_steps, kwargs)
        clip = training and isinstance(source, Atari)
    return Envs(source, name=name, seed=seed, clip_reward=clip)


def _adopt(env: Envs | VectorEnv, num_envs: int | None, seed: int) -> Envs:
    if num_envs is not None and num_envs != env.num_envs:
        raise UserError(f"make: num_envs is {num_envs}, but expected {env.num_envs}, the size of {env}")
    return env if isinstance(env, Envs) else Envs(env, seed=seed)


def _from_id(
    env_id: str, count: int, render_mode: str | None, max_episode_steps: int | None, kwargs: dict[str, Any]
) -> VectorEnv:
    if env_id.startswith("dmc:"):
        from pywm.envs.dmc import DMControl

        task = env_id.removeprefix("dmc:")
        build = functools.partial(
            _call, DMControl, env_id, render_mode, max_episode_steps, {"task": task, **kwargs}
        )
        return _sync(build, count, env_id)
    if env_id.startswith("crafter:"):
        from pywm.envs.crafter import Crafter

        task = env_id.removeprefix("crafter:")
        build = functools.partial(
            _call, Crafter, env_id, render_mode, max_episode_steps, {"task": task, **kwargs}
        )
        return _sync(build, count, env_id)

    module, _, name = env_id.rpartition(":")
    if module:
        _import_module(module, env_id)
    for start, (package, extra) in PACKAGES.items():
        if name.startswith(start):
            _register(package, extra, env_id)
    spec = gymnasium.registry.get(name)
    if spec is None:
        factory = getattr(sys.modules.get(module), name, None) if module else None
        if callable(factory):
            build = functools.partial(_call, factory, env_id, render_mode, max_episode_steps, kwargs)
            return _sync(build, count, env_id)
        raise UserError(_unknown_in(module, name) or _unknown(name))

    if name.startswith("ALE/"):
        if max_episode_steps is not None:
            frameskip = kwargs.get("frameskip", spec.kwargs.get("frameskip", 4))
            kwargs["max_num_frames_per_episode"] = max_episode_steps * frameskip
        return _guarded(functools.partial(Atari, name, count, render_mode=render_mode, **kwargs), env_id)
    if name == "CartPole-v1" and render_mode is None and not kwargs:
        limit = spec.max_episode_steps if max_episode_steps is None else max_episode_steps
        return CartPole(count, limit or 500)
    if name == "pywm/GridChase-v0" and not kwargs:
        limit = spec.max_episode_steps if max_episode_steps is None else max_episode_steps
        return GridChaseVector(count, limit or MAX_STEPS, render_mode)
    if name == "pywm/Catch-v0" and max_episode_steps is None and not kwargs:
        return CatchVector(count, render_mode)
    if spec.entry_point is None:
        return _guarded(lambda: gymnasium.make_vec(name, count, render_mode=render_mode, **kwargs), env_id)
    # gymnasium's passive checker would look at every step; `pywm check-env` looks once, and closer.
    options: dict[str, Any] = {
        "render_mode": render_mode,
        "max_episode_steps": max_episode_steps,
        "disable_env_checker": True,
    }
    return _sync(functools.partial(gymnasium.make, name, **options, **kwargs), count, env_id)


def _sync(build: Callable[[], gymnasium.Env], count: int, name: str) -> VectorEnv:
    return _guarded(lambda: SyncVectorEnv([build] * count, autoreset_mode=AutoresetMode.SAME_STEP), name)


def _guarded(build: Callable[[], VectorEnv], name: str) -> VectorEnv:
    try:
        with warnings.catch_warnings():
            # Raised inside Box2D's C code, which crashes the interpreter where warnings are errors.
            warnings.filterwarnings("ignore", r"builtin type swig\w+ has no __module__", DeprecationWarning)
            return build()
    except PywmError:
        raise
    except Exception as error:
        failure = missing_extra(error, name) or EnvError(
            f"{name} raised {type(error).__name__} while it was built: {error}"
        )
        raise failure from error


def _call(
    factory: Callable[..., gymnasium.Env],
    name: str,
    render_mode: str | None,
    max_episode_steps: int | None,
    kwargs: dict[str, Any],
) -> gymnasium.Env:
    if render_mode is not None and _takes(factory, "render_mode"):
        kwargs = {"render_mode": render_mode, **kwargs}
    return _limit(functools.partial(factory, **kwargs), name, max_episode_steps)


def _limit(build: Callable[[], gymnasium.Env], name: str, max_episode_steps: int | None) -> gymnasium.Env:
    env = build()
    if not isinstance(env, gymnasium.Env):
        raise UserError(
            f"make: {name} returned a {type(env).__name__}, but expected a gymnasium.Env (pass a VectorEnv "
            "itself, not a function that makes it)"
        )
    return env if max_episode_steps is None else gymnasium.wrappers.TimeLimit(env, max_episode_steps)


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def sources(env_id: str) -> list[str]:
    """List the files and folders that an id's module would be imported from, without importing anything.

    Args:
        env_id: an id like ``"my_pkg.envs:MyEnv-v0"``.

    Returns:
        Those of each part of the dotted name, parents first; nothing for an id that names no module.
    """
    module = env_id.rpartition(":")[0]
    if not module or env_id.startswith(("dmc:", "crafter:")):
        return []
    found: list[str] = []
    parts = module.split(".")
    path: Any = None
    with _working_directory(module):
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            loaded = sys.modules.get(name)
            if loaded is not None:
                file, path = getattr(loaded, "__file__", None), getattr(loaded, "__path__", None)
            else:
                spec = _find_spec(name, path)
                if spec is None:
                    break
                file, path = spec.origin if spec.has_location else None, spec.submodule_search_locations
            if file is not None:
                found.append(file)
            if path is None:  # no package: it has no further parts
                break
            found.extend(path)
    return found


def _find_spec(name: str, path: Any) -> ModuleSpec | None:
    """Find a module as an import would. Unlike ``importlib.util.find_spec`` this imports no parents."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None


@contextlib.contextmanager
def _working_directory(module: str) -> Iterator[None]:
    """Put the working directory on the path for a module that is nowhere else.

    A console script does not have it there, and users keep their environments in it. An installed module gets
    none of its imports from it: the working directory may be one that somebody else has written.
    """
    spec = _find_spec(module.partition(".")[0], None)
    if spec is not None and spec.origin is not None:  # a mere folder of that name has no origin
        yield
        return
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


def _import_module(module: str, env_id: str) -> None:
    try:
        with _working_directory(module):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(
                f"make: the module {module!r} of {env_id!r} cannot be found, but expected one that is "
                "installed or in the working directory"
            ) from error
        raise EnvError(f"{env_id}: importing {module!r} raised {type(error).__name__}: {error}") from error
    except Exception as error:
        raise EnvError(f"{env_id}: importing {module!r} raised {type(error).__name__}: {error}") from error


def _register(package: str, extra: str, env_id: str) -> None:
    try:
        gymnasium.register_envs(importlib.import_module(package))
    except ModuleNotFoundError as error:
        raise MissingExtra(f'No env {env_id!r}: install it with: pip install "pywm[{extra}]"') from error


def _unknown(name: str) -> str:
    """Say that there is no such id, and the three closest, with and without namespace and version."""
    known = {i for i, spec in gymnasium.registry.items() if "ale_py" not in str(spec.entry_point)}
    try:
        roms = importlib.import_module("ale_py.roms")
        known |= {f"ALE/{rom.title().replace('_', '')}-v5" for rom in roms.get_all_rom_ids()}
    except ImportError:
        pass

    def likeness(other: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()
        return max(whole, difflib.SequenceMatcher(None, _base(name), _base(other)).ratio()), whole

    close = sorted(sorted(known, reverse=True), key=likeness, reverse=True)[:3]
    return (
        f"No env {name!r}. The closest are {', '.join(close)}. "
        'Write "my_pkg:MyEnv-v0" for an environment that the package my_pkg registers'
    )


def _unknown_in(module: str, name: str) -> str:
    """Say that a module has no such environment, and which it has; "" where it has none at all, or there is no module."""
    if not module:
        return ""
    package = module.partition(".")[0]
    own = {
        i
        for i, spec in gymnasium.registry.items()
        if _module_of(spec.entry_point).partition(".")[0] == package
    }
    for key, value in vars(sys.modules[module]).items():
        is_env = inspect.isclass(value) and issubclass(value, gymnasium.Env)
        if is_env and not key.startswith("_") and not value.__module__.startswith("gymnasium."):
            own.add(key)
    return f"No env {name!r} in the module {module!r}.{suggest(name, own)}" if own else ""


def _module_of(entry_point: Any) -> str:
    if isinstance(entry_point, str):
        return entry_point.partition(":")[0]
    return getattr(entry_point, "__module__", None) or ""


def _base(name: str) -> str:
    return re.sub(r"-v\d+$", "", name.rpartition("/")[2]).lower()
