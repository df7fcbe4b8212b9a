"""How much memory there is, asked before a large piece of it is taken."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_memory"]


def free_memory(root: Path | str = "/") -> int | None:
    """Return how many bytes of memory can be had without swapping.

    What the kernel calls available, or what is left of the limit of a container (control groups, version 1 and 2) where
    that is less: beyond it the process is killed, not refused.

    Args:
        root: the root of the file system, where ``proc`` and ``sys`` are.

    Returns:
        Bytes, or None where the system does not tell.
    """
    root = Path(root)
    free = [_available(root / "proc/meminfo"), *_left_of_limits(root)]
    return min((bytes_ for bytes_ in free if bytes_ is not None), default=None)


def _available(path: Path) -> int | None:
    kib = _fields(path).get("MemAvailable:")
    return None if kib is None else kib * 1024


def _left_of_limits(root: Path) -> list[int | None]:
    """Return what each control group that this process is in, down from the root, leaves it."""
    left: list[int | None] = []
    for line in _lines(root / "proc/self/cgroup"):
        controllers, colon, path = line.partition(":")[2].partition(":")
        if not colon:
            continue
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        # A container often sees its own group as the root, whatever the path says; what is not there limits nothing.
        left += [_left(folder, *names) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return left


def _left(group: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None:
        return None
    # Files that were read lately count as used, but make room.
    return max(most - used + _fields(group / "memory.stat").get(cache, 0), 0)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _fields(path: Path) -> dict[str, int]:
    words = [line.split() for line in _lines(path)]
    return {word[0]: int(word[1]) for word in words if len(word) >= 2 and word[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
