"""Facts about the machine and the installed versions, for ``env.json`` and ``pywm doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from pywm._version import __version__
from pywm.data import memory

__all__ = ["facts", "free_disk", "free_memory", "version"]

_PACKAGES = ("numpy", "gymnasium", "safetensors", "ale-py", "mujoco", "box2d", "minigrid")


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """Collect what a reader needs to reproduce a run: versions and hardware, nothing personal."""
    versions = {name: version(name) for name in _PACKAGES}
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "pywm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: found for name, found in versions.items() if found},
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes("MemTotal") / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def free_disk(path: Path | str = ".") -> int:
    """Return the free bytes of the disk that holds ``path``."""
    return shutil.disk_usage(path).free


def free_memory() -> int:
    """Return the bytes of memory that can be had without swapping; 0 where the system does not tell."""
    return memory.free_memory() or 0


def _memory_bytes(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
