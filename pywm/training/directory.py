"""The directory of a run: where it is, what it holds, and whether a process may go on in it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pywm import config as configs
from pywm.errors import CheckpointError, UserError
from pywm.training import checkpoint, machine
from pywm.training.checkpoint import Loaded
from pywm.training.lock import LOCK_NAME
from pywm.training.log import read_metrics

if TYPE_CHECKING:
    from pywm.training.run import RunOptions

__all__ = [
    "KEPT_OPTIONS",
    "choose",
    "describe",
    "discard",
    "find_run",
    "last_time",
    "move_aside",
    "prepare",
    "read_run",
]

log = logging.getLogger(__name__)

FORMAT = 1
# What a resumed run takes over from the one before it, unless told otherwise.
KEPT_OPTIONS = ("checkpoint_every", "keep_last", "log_every", "eval_every", "eval_episodes")
_OWN_FILES = (
    "config.json",
    "command.txt",
    "env.json",
    "metrics.jsonl",
    "log.txt",
    "checkpoints",
    "videos",
    "tb",
)


def find_run(runs: Path | str, *, algo: str, env: str, seed: int) -> Path | None:
    """Return the newest run of an environment, algorithm and seed that has a checkpoint, or else the newest, or None."""
    parent = Path(runs) / _safe(env) / _safe(algo)
    found = sorted(parent.glob(f"{seed}-*"), key=lambda path: path.name)
    found = [path for path in found if path.is_dir()]
    if not found:
        return None
    # A newer one without may be a start that was killed; what there is to go on from lies before it.
    saved = [path for path in found if checkpoint.list_checkpoints(path / "checkpoints")]
    chosen = (saved or found)[-1]
    if chosen != found[-1]:
        log.warning("%s is newer, but has no checkpoint; taking %s", found[-1], chosen)
    return chosen


def read_run(folder: Path | str, *, will_make_env: bool = True) -> dict[str, Any]:
    """Read a run's ``config.json``: a dict with ``algo``, ``env``, ``seed`` and ``config``.

    Args:
        folder: the run directory, which may come from somebody else.
        will_make_env: its environment is to be made, so one whose code comes with the run is refused.

    Raises:
        CheckpointError: ``folder`` is not a run directory, or its environment is code inside it.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: refused, expected a run directory; pywm reads only its own safetensors and JSON "
            "(a .pt or pickle file can hold code)"
        )
    path = folder / "config.json"
    try:
        about = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a run directory: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    expected = {"algo": str, "env": str, "seed": int, "config": dict}
    if not isinstance(about, dict) or any(not isinstance(about.get(k), t) for k, t in expected.items()):
        raise CheckpointError(f"{path}: expected an object with {', '.join(expected)}")
    if not isinstance(about.get("run", {}), dict):
        raise CheckpointError(f"{path}: run is {repr(about['run'])[:40]}, but expected an object")
    if will_make_env:
        _refuse_own_code(folder, about["env"])
    return about


def _refuse_own_code(folder: Path, env: str) -> None:
    """A run holds data; making its environment must not execute what came with it."""
    if ":" not in env:
        return
    from pywm.envs.make import sources

    own = _names(folder)
    for source in sources(env):
        if any(name.is_relative_to(top) for name in _names(source) for top in own):
            raise CheckpointError(
                f"{folder}: refused, its environment {env!r} would be imported from {source}, inside the run "
                "directory, and a run that comes from somebody else could execute anything that way. If you "
                "trust it, move the module out of the run directory"
            )


def _names(path: Path | str) -> set[Path]:
    """Return the absolute names of a path, before and after links are followed."""
    return {Path(os.path.abspath(path)), Path(os.path.realpath(path))}


def _safe(name: str) -> str:
    """Make one path component of a name: ``ALE/Pong-v5`` becomes ``ALE-Pong-v5``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "env"


def choose(options: RunOptions, algo: str, env: str, seed: int) -> Path:
    """Return the run's directory: the one asked for, the newest to resume, or a new one."""
    if options.run_dir is not None:
        return Path(options.run_dir)
    if options.resume:
        found = find_run(options.runs, algo=algo, env=env, seed=seed)
        if found is None:
            raise UserError(
                f"resume: no run of {algo} on {env} with seed {seed} below {options.runs}/; "
                "leave --resume out to start one, or name it with --run-dir"
            )
        return found
    parent = Path(options.runs) / _safe(env) / _safe(algo)
    stamp = f"{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1000):
        folder = parent / (stamp if attempt == 1 else f"{stamp}-{attempt:03d}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot create the run directory {folder}: {error}") from error
        return folder
    raise UserError(f"cannot find a free name for a run directory in {parent}")


def prepare(
    folder: Path, options: RunOptions, about: dict[str, Any], may_change: Collection[str]
) -> Loaded | None:
    """Bring the directory into the state that the options ask for; return the checkpoint to go on from."""
    checkpoints = folder / "checkpoints"
    checkpoint.clean(checkpoints)
    if not options.resume:
        steps = _steps_of(folder)
        if steps:
            raise UserError(
                f"{folder} already has step {steps}: add --resume to go on or --fresh to start over"
            )
        return None
    if not checkpoint.list_checkpoints(checkpoints):
        log.warning("%s has no checkpoint yet; starting from the beginning", folder)
        return None
    # Before the checkpoint: when the configuration does not fit, its tensors would only puzzle.
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"resume: {folder / 'config.json'} is missing, but expected beside the checkpoints, for it holds the "
            "settings that they were made with. Put it back, or start over with --fresh (what is there is kept aside)"
        )
    old = read_run(folder)
    for key in ("algo", "env", "seed"):
        if old[key] != about[key]:
            raise UserError(
                f"resume: {folder} is a run of {key} {old[key]!r}, but {about[key]!r} was asked for"
            )
    changes = configs.check_resume(old["config"], about["config"], may_change)
    changes += configs.diff(old.get("run", {}), about["run"])
    if changes:
        log.warning("resume with other settings:\n%s", configs.table(changes))
    try:
        loaded = checkpoint.load(checkpoints)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nStart over with --fresh (what is there is kept aside).") from error
    checkpoint.quarantine(loaded.skipped)
    return loaded


def _steps_of(folder: Path) -> int:
    steps = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder / "checkpoints")]
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        steps += [
            row["env_steps"] for row in read_metrics(metrics)[-1:] if isinstance(row.get("env_steps"), int)
        ]
    return max(steps, default=0)


def move_aside(folder: Path) -> None:
    """Move an earlier run out of the way, into ``previous-<n>`` of the same directory."""
    present = [folder / name for name in _OWN_FILES if (folder / name).exists()]
    if not present:
        return
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for path in present:
        shutil.move(path, aside / path.name)
    log.warning("what was in %s is now in %s", folder, aside)


def describe(folder: Path, about: dict[str, Any], command: str | None) -> None:
    """Write down what is trained, on what machine, and how it was called."""
    _write_json(folder / "config.json", about)
    _write_json(folder / "env.json", machine.facts())
    with open(folder / "command.txt", "a", encoding="utf-8") as file:
        file.write((command or f"# from Python: {Path(sys.argv[0]).name}") + "\n")


def discard(folder: Path) -> bool:
    """Remove a run directory in which nothing happened yet; one that holds anything of value stays.

    Returns:
        Whether it is gone.
    """
    metrics = folder / "metrics.jsonl"
    if checkpoint.list_checkpoints(folder / "checkpoints") or (metrics.exists() and metrics.stat().st_size):
        return False
    known = {*_OWN_FILES, LOCK_NAME}
    if any(path.name not in known for path in folder.iterdir()):
        return False
    shutil.rmtree(folder)
    return True


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    os.replace(temporary, path)


def last_time(metrics: Path) -> float:
    """Return the seconds that earlier processes of the run have spent."""
    rows = read_metrics(metrics)
    value = rows[-1].get("time/total") if rows else None
    return float(value) if isinstance(value, (int, float)) else 0.0
