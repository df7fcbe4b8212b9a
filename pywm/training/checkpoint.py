"""Checkpoints that survive a kill, a full disk and a hostile file.

A checkpoint is one directory, written under another name and renamed when every byte is on the disk::

    checkpoints/step_00050000/agent.safetensors   tensors, one file for each part of the state
                              state.json          the rest of the state: numbers, strings, lists
                              manifest.json       size and SHA-256 of every other file
    checkpoints/LATEST, BEST                      names of step directories, for people and scripts

Parts that only the newest checkpoint is to keep, such as a replay, are dropped from the older ones when a newer one stands.

Reading trusts nothing: sizes, hashes and safetensors headers are checked before a tensor is built, links
are refused, and no format that can hold code (pickle, ``.pt``) is ever opened.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pywm.errors import CheckpointError
from pywm.types import State

__all__ = [
    "MISFITS",
    "Loaded",
    "clean",
    "join",
    "list_checkpoints",
    "load",
    "part",
    "quarantine",
    "reason",
    "rng_state",
    "save",
    "seed_rng",
    "set_rng_state",
    "step_of",
    "verify",
]

log = logging.getLogger(__name__)

_FORMAT = "pywm-checkpoint"
_VERSION = 1
_STEP_NAME = re.compile(r"step_(\d{8,18})")
_FILE_NAME = re.compile(r"[a-z0-9_]{1,64}\.(safetensors|json)")
_PART_NAME = re.compile(r"[a-z0-9_]{1,64}")

# Limits that keep the memory for reading a hostile file in proportion to the file; ours stay far below them.
_MAX_MANIFEST = 1 << 20
_MAX_JSON = 1 << 24
_MAX_HEADER = 1 << 22
_MAX_DIM = 1 << 40
_MAX_RANK = 32

_MT_WORDS = 624  # the state of a Mersenne twister

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class Loaded(NamedTuple):
    """A verified checkpoint.

    Attributes:
        step: its ``env_steps``.
        state: what was saved.
        path: its directory.
        skipped: newer directories that failed their checks, with the reason.
        dropped: parts that it once held, and that only the newest checkpoint keeps.
    """

    step: int
    state: State
    path: Path
    skipped: tuple[tuple[Path, str], ...] = ()
    dropped: tuple[str, ...] = ()


def join(parts: Mapping[str, State | None]) -> State:
    """Combine the states of a run's parts; tensors become ``"part/name"``, data ``{part: data}``.

    Each part becomes one safetensors file. ``"agent"`` must be what ``Agent.load_state`` takes; parts that
    are None are left out.
    """
    tensors: dict[str, Tensor] = {}
    data: dict[str, Any] = {}
    for name, state in parts.items():
        if state is None:
            continue
        if not _PART_NAME.fullmatch(name):
            raise ValueError(
                f"join: part is {name!r}, but expected lower-case letters, digits and underscores"
            )
        tensors.update({f"{name}/{key}": tensor for key, tensor in state.tensors.items()})
        data[name] = state.data
    return State(tensors, data)


def part(state: State, name: str) -> State | None:
    """Return one part of a joined state, or None where it was left out."""
    prefix = f"{name}/"
    tensors = {key.removeprefix(prefix): t for key, t in state.tensors.items() if key.startswith(prefix)}
    if name not in state.data and not tensors:
        return None
    return State(tensors, state.data.get(name, {}))


MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a state raises whose contents are not what they should be."""


def reason(error: Exception) -> str:
    """Say in words what a bare error of Python means."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def seed_rng(seed: int) -> None:
    """Seed the generators that :func:`rng_state` captures."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> State:
    """Capture the random generators of Python, NumPy and torch (CPU and every CUDA device)."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            tensors[f"cuda{device}"] = torch.cuda.get_rng_state(device)
    return State(
        tensors,
        {
            "python": [version, gauss],
            "numpy": [str(name), int(position), int(has_gauss), float(cached)],  # type: ignore[arg-type]
        },
    )


def set_rng_state(state: State, *, try_only: bool = False) -> None:
    """Set the random generators to what :func:`rng_state` captured.

    Args:
        state: of all generators; those of CUDA devices that are not there are left out.
        try_only: set new generators of Python, NumPy and torch instead, to see whether the state fits.
    """
    version, gauss = state.data["python"]
    python: Any = random.Random() if try_only else random
    gauss = None if gauss is None else float(gauss)
    python.setstate((version, tuple(state.tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached = state.data["numpy"]
    keys = state.tensors["numpy"].numpy().astype(np.uint32)
    if keys.shape != (_MT_WORDS,) or not 0 <= position <= _MT_WORDS:  # NumPy reads there, whatever it is
        raise ValueError(f"position {position} of NumPy's generator is beyond its {_MT_WORDS} words")
    numpy: Any = np.random.RandomState() if try_only else np.random
    numpy.set_state((name, keys, position, has_gauss, cached))
    words = state.tensors["torch"].cpu()
    if try_only:
        torch.Generator().set_state(words)
        return
    torch.set_rng_state(words)
    for key, tensor in state.tensors.items():
        index = key.removeprefix("cuda")
        if index != key and torch.cuda.is_available() and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor.cpu(), int(index))


def save(
    root: Path | str,
    step: int,
    state: State,
    *,
    keep_last: int = 3,
    best: bool = False,
    newest_only: Collection[str] = (),
) -> Path:
    """Write one checkpoint so that a kill at any moment leaves either it or the one before it.

    Args:
        root: the run's ``checkpoints`` directory; created when missing.
        step: ``env_steps``; a checkpoint of the same step is replaced.
        state: tensors on any device, and JSON data.
        keep_last: how many of the newest checkpoints stay (the best and this one always do).
        best: also make this the best one.
        newest_only: parts that the checkpoints of earlier steps lose, the best one too, once this one stands.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: the disk is full or not writable; the checkpoints before are untouched.
        ValueError: the state holds something that JSON or safetensors cannot.
    """
    if step < 0:
        raise ValueError(f"save: step is {step}, but expected 0 or more")
    if keep_last < 1:
        raise ValueError(f"save: keep_last is {keep_last}, but expected 1 or more")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    files = _split(state)
    text = json.dumps(state.data, default=_plain, ensure_ascii=True, separators=(",", ":"))
    if len(text) > _MAX_JSON:
        raise ValueError(
            f"save: state.data takes {len(text)} bytes, but expected at most {_MAX_JSON}; use tensors"
        )
    _check_free_space(root, sum(t.numel() * t.element_size() for t in state.tensors.values()) + len(text))

    final = root / f"step_{step:08d}"
    temporary = root / f".tmp-{step}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, tensors in files.items():
            _write_tensors(temporary / f"{name}.safetensors", tensors)
        _write(temporary / "state.json", text)
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "step": step,
            "files": {
                path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
                for path in sorted(temporary.iterdir())
            },
        }
        _write(temporary / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))
        _fsync(temporary)
        _publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _point(root, "LATEST", final.name)
    if best:
        _point(root, "BEST", final.name)
    _prune(root, final, keep_last)
    for path in list_checkpoints(root):
        if step_of(path) < step:
            _thin(path, newest_only)
    return final


def _split(state: State) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the part before the first slash, ready to be written."""
    files: dict[str, dict[str, Tensor]] = {}
    storages: set[int] = set()
    for key, tensor in state.tensors.items():
        name, slash, _ = key.partition("/")
        if not slash or not _PART_NAME.fullmatch(name):
            name = "tensors"
        copy = tensor.detach().to("cpu").contiguous()
        # safetensors refuses views of one buffer; parameters often are.
        storage = copy.untyped_storage()
        if storage.nbytes() != copy.numel() * copy.element_size() or storage.data_ptr() in storages:
            copy = copy.clone(memory_format=torch.contiguous_format)
        else:
            storages.add(storage.data_ptr())
        files.setdefault(name, {})[key] = copy
    return files


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The library wraps the system's error; callers need its number to tell a full disk from a bug.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1))), str(path)) from error
    _fsync(path)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(f"save: state.data holds a {type(value).__name__}, but expected JSON values")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_free_space(root: Path, size: int) -> None:
    # Half as much again: the manifest, the metrics and whatever else writes to the disk meanwhile.
    need, free = size + size // 2 + (1 << 16), shutil.disk_usage(root).free
    if free < need:
        message = f"{_mib(free)} free, {_mib(need)} needed for a checkpoint"
        raise OSError(errno.ENOSPC, message, str(root))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place; an older checkpoint of the same step is only dropped once the new one stands."""
    aside = final.with_name(f".old-{final.name}")
    if os.path.lexists(final):
        _remove(aside)
        os.rename(final, aside)
    os.rename(temporary, final)
    _fsync(final.parent)
    _remove(aside)


def _point(root: Path, name: str, target: str) -> None:
    temporary = root / f".{name}.tmp"
    _write(temporary, target + "\n")
    os.replace(temporary, root / name)
    _fsync(root)


def _pointer(root: Path, name: str) -> str:
    """Read LATEST or BEST; an unusable one reads as empty."""
    path = root / name
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > 64:
            return ""
        target = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return target if _STEP_NAME.fullmatch(target) else ""


def _prune(root: Path, newest: Path, keep_last: int) -> None:
    keep = {path.name for path in list_checkpoints(root)[-keep_last:]}
    keep |= {newest.name, _pointer(root, "LATEST"), _pointer(root, "BEST")}
    for path in list_checkpoints(root):
        if path.name not in keep:
            # Under another name first: a kill in the middle must not leave half a checkpoint behind.
            doomed = path.with_name(f".del-{path.name}")
            try:
                _remove(doomed)
                os.rename(path, doomed)
                _remove(doomed)
            except OSError as error:
                log.warning("cannot remove the old checkpoint %s: %s", path, error)


def _thin(path: Path, parts: Collection[str]) -> None:
    """Drop parts of an older checkpoint: first from its manifest, in one step, then from the disk."""
    names = {f"{name}.safetensors": name for name in parts}
    if path.is_symlink() or not any(os.path.lexists(path / name) for name in names):
        return
    try:
        manifest = _read_json(path, "manifest.json", _MAX_MANIFEST)
        files = _check_manifest(path, manifest, step_of(path))
        lost = sorted(names.keys() & files.keys())
        if lost:
            manifest["files"] = {name: entry for name, entry in files.items() if name not in lost}
            manifest["dropped"] = sorted({*_dropped(manifest), *(names[name] for name in lost)})
            temporary = path.with_name(f".tmp-{path.name}-manifest.json")  # where `clean` finds it
            _write(temporary, json.dumps(manifest, indent=1, sort_keys=True))
            os.replace(temporary, path / "manifest.json")
            _fsync(path)
        _remove_dropped(path)
    except (OSError, CheckpointError) as error:
        log.warning("cannot drop %s of the old checkpoint %s: %s", ", ".join(parts), path, error)


def _remove_dropped(path: Path) -> None:
    """Remove the files of the parts that a checkpoint's manifest says were dropped."""
    manifest = _read_json(path, "manifest.json", _MAX_MANIFEST)
    _check_manifest(path, manifest, step_of(path))
    for name in _dropped(manifest):
        file = path / f"{name}.safetensors"
        if os.path.lexists(file):
            file.unlink()


def _dropped(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(manifest.get("dropped", ()))


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def clean(root: Path | str) -> None:
    """Remove what a killed process left half done. Only for the owner of the run's lock."""
    root = Path(root)
    if not root.is_dir():
        return
    for path in root.iterdir():
        name = path.name
        if name.startswith(".old-") and not os.path.lexists(root / name.removeprefix(".old-")):
            os.rename(path, root / name.removeprefix(".old-"))  # killed between the two renames
        elif name.startswith((".tmp-", ".del-", ".old-")):
            _remove(path)
        elif _STEP_NAME.fullmatch(name) and not path.is_symlink():
            with contextlib.suppress(OSError, CheckpointError):  # a damaged one is for `load` to name
                _remove_dropped(path)


def quarantine(skipped: tuple[tuple[Path, str], ...]) -> None:
    """Move damaged checkpoints out of the way of the good ones that training will write again."""
    for path, reason in skipped:
        if not os.path.lexists(path):
            continue
        aside = path.with_name(f"damaged-{path.name}")
        try:
            _remove(aside)
            os.rename(path, aside)
        except OSError as error:
            log.warning("cannot move the damaged checkpoint %s (%s) aside: %s", path, reason, error)


def step_of(path: Path) -> int:
    """Return the step a checkpoint directory is named after."""
    match = _STEP_NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: a checkpoint directory is called step_<number>")
    return int(match.group(1))


def list_checkpoints(root: Path | str) -> list[Path]:
    """List the step directories below ``root``, oldest first, whether valid or not."""
    root = Path(root)
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _STEP_NAME.fullmatch(path.name)), key=step_of)


def load(root: Path | str, *, which: str = "latest", parts: Collection[str] | None = None) -> Loaded:
    """Load the newest checkpoint that passes every check, saying which ones did not.

    Args:
        root: the run's ``checkpoints`` directory.
        which: ``"latest"``, ``"best"``, or the name of a step directory (then nothing else is tried).
        parts: what to read; everything by default. The others are neither read nor checked, however large they are.

    Raises:
        CheckpointError: there is none, or none of that name, or none is valid; the message names what is there, or
            every file at fault.
    """
    root = Path(root)
    if root.is_file():
        raise CheckpointError(
            f"{root}: refused, pywm reads only its own directories of safetensors and JSON "
            "(a .pt or pickle file can hold code)"
        )
    candidates = list_checkpoints(root)[::-1]
    if not candidates:
        raise CheckpointError(f"no checkpoint in {root}")
    if which != "latest":
        name = _pointer(root, "BEST") if which == "best" else which
        if name not in {path.name for path in candidates}:
            names = ", ".join(path.name for path in candidates)
            raise CheckpointError(f"no checkpoint {which!r} in {root}; there are {names}")
        if which == "best":
            candidates.sort(key=lambda path: path.name != name)
        else:
            candidates = [root / which]

    skipped: list[tuple[Path, str]] = []
    for i, path in enumerate(candidates):
        try:
            loaded = _load_one(path, parts)
        except CheckpointError as error:
            skipped.append((path, str(error)))
            following = (
                f"falling back to {candidates[i + 1].name}" if i + 1 < len(candidates) else "no other is left"
            )
            log.warning("%s; %s", error, following)
            continue
        return loaded._replace(skipped=tuple(skipped))
    reasons = "\n".join(f"  {reason}" for _, reason in skipped)
    raise CheckpointError(f"no valid checkpoint in {root}:\n{reasons}")


def _load_one(path: Path, parts: Collection[str] | None) -> Loaded:
    from safetensors.torch import load_file

    names = verify(path, parts)
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name.endswith(".safetensors"):
            try:
                tensors.update(load_file(path / name))
            except Exception as error:  # whatever the library raises, the file is at fault
                raise CheckpointError(f"{path.name}: cannot read {name}: {error}") from error
    data = _read_json(path, "state.json", _MAX_JSON)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name}: state.json does not hold an object")
    dropped = _dropped(_read_json(path, "manifest.json", _MAX_MANIFEST))
    # Half a part, its numbers without its tensors, would be taken for damage.
    kept = {k: v for k, v in data.items() if k not in dropped and (parts is None or k in parts)}
    state = State(tensors, kept)
    _check_parts(path, state)
    return Loaded(step_of(path), state, path, dropped=dropped)


def _check_parts(path: Path, state: State) -> None:
    """Check what a run itself wrote. What an algorithm wrote, only the algorithm knows."""

    def fault(key: str, value: Any, expected: str) -> CheckpointError:
        got = repr(value)[:40]
        return CheckpointError(f"{path.name}: state.json: {key} is {got}, but expected {expected}")

    for name, data in state.data.items():
        if not isinstance(data, dict):
            raise fault(name, data, "an object")
    run = state.data.get("run")
    if run is not None:
        for key in ("checkpoint_number", "metrics_rows"):
            if not _is_int(run.get(key)):
                raise fault(f"run.{key}", run.get(key), "a count")
        best = run.get("best_score")
        if best is not None and (isinstance(best, bool) or not isinstance(best, (int, float))):
            raise fault("run.best_score", best, "a number or null")
    rng = part(state, "rng")
    if rng is not None:
        try:
            set_rng_state(rng, try_only=True)
        except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path.name}: state.json and rng.safetensors do not fit the random generators: {error!r}"
            ) from error


def verify(path: Path, parts: Collection[str] | None = None) -> list[str]:
    """Check a checkpoint directory completely, without building a tensor.

    Args:
        path: the directory.
        parts: whose tensors to check; all by default.

    Returns:
        The names of the files that were checked.

    Raises:
        CheckpointError: naming the directory, the file and the fault.
    """
    path = Path(path)
    wanted = None if parts is None else {f"{name}.safetensors" for name in parts}
    step = step_of(path)
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise CheckpointError(f"{path.name}: is not a directory of its own (links are refused)")
        manifest = _read_json(path, "manifest.json", _MAX_MANIFEST)
        files = _check_manifest(path, manifest, step)
        if wanted is not None:
            files = {
                name: x for name, x in files.items() if name in wanted or not name.endswith(".safetensors")
            }
        for name, entry in files.items():
            size = _regular_size(path, name)
            if size != entry["size"]:
                raise CheckpointError(
                    f"{path.name}: {name} has {size} bytes, the manifest says {entry['size']}"
                )
        for name, entry in files.items():
            if _sha256(path / name) != entry["sha256"]:
                raise CheckpointError(f"{path.name}: sha256 mismatch in {name}")
            if name.endswith(".safetensors"):
                _check_header(path, name, entry["size"])
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    return list(files)


def _regular_size(path: Path, name: str) -> int:
    try:
        status = (path / name).lstat()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: {name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name}: {name} is not a regular file (links are refused)")
    return status.st_size


def _read_json(path: Path, name: str, limit: int) -> Any:
    size = _regular_size(path, name)
    if size > limit:
        raise CheckpointError(f"{path.name}: {name} has {size} bytes, more than the limit of {limit}")
    try:
        return _parse_json((path / name).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path.name}: {name} is not valid JSON: {error}") from error


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _check_manifest(path: Path, manifest: Any, step: int) -> dict[str, dict[str, Any]]:
    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{path.name}: manifest.json {what}")

    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise fault(f"is not a {_FORMAT} manifest")
    if manifest.get("version") != _VERSION:
        raise fault(f"has version {str(manifest.get('version'))[:40]}, this pywm reads version {_VERSION}")
    if manifest.get("step") != step:
        raise fault(f"is of step {str(manifest.get('step'))[:40]}, the directory of step {step}")
    files = manifest.get("files")
    if not isinstance(files, dict) or "state.json" not in files:
        raise fault("does not list state.json")
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name) or name == "manifest.json":
            raise fault(f"lists the file name {name[:80]!r}, which is refused")
        if (
            not isinstance(entry, dict)
            or not _is_int(entry.get("size"))
            or not isinstance(entry.get("sha256"), str)
        ):
            raise fault(f"has no size and sha256 for {name}")
    dropped = manifest.get("dropped", [])
    if not isinstance(dropped, list) or not all(
        isinstance(name, str) and _PART_NAME.fullmatch(name) and f"{name}.safetensors" not in files
        for name in dropped
    ):
        raise fault(f"has {str(dropped)[:80]} for what was dropped, but expected names of parts it lacks")
    return files


def _check_header(path: Path, name: str, size: int) -> None:
    """Check that a safetensors header describes exactly the bytes that follow it."""

    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{path.name}: {name}: {what}")

    with open(path / name, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise fault(f"header length {length} exceeds the file's {size} bytes")
        if length > _MAX_HEADER:
            raise fault(f"header length {length} exceeds the limit of {_MAX_HEADER}")
        raw = file.read(length)
    try:
        header = _parse_json(raw)
    except ValueError as error:
        raise fault(f"header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise fault("header is not an object")
    header.pop("__metadata__", None)

    spans = []
    for key, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise fault(f"tensor {key[:80]!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
            raise fault(f"tensor {key[:80]!r} has dtype {str(dtype)[:40]!r}")
        if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_int, shape)):
            raise fault(f"tensor {key[:80]!r} has shape {str(shape)[:80]}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_int, offsets)):
            raise fault(f"tensor {key[:80]!r} has data_offsets {str(offsets)[:80]}")
        nbytes = _DTYPE_BYTES[dtype]
        for dim in shape:
            nbytes *= dim
        if offsets[1] - offsets[0] != nbytes:
            raise fault(
                f"tensor {key[:80]!r} of shape {str(shape)[:80]} does not fit its data_offsets {offsets}"
            )
        spans.append((offsets[0], offsets[1]))
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise fault(f"tensor data overlap or leave a gap at byte {min(begin, end)}")
        end = stop
    if end != size - 8 - length:
        raise fault(f"tensor data end at byte {end}, the file at {size - 8 - length}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_DIM
