"""One process a run directory."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path

from pywm.errors import UserError

__all__ = ["LOCK_NAME", "RunLock"]

LOCK_NAME = ".lock"

_held: set[str] = set()
_guard = threading.Lock()


class RunLock:
    """An exclusive lock on a run directory that the system releases when its process dies.

    A POSIX record lock, not ``flock``: forked environment workers do not inherit it, so a killed trainer's
    orphans never block the resume. The file stays; its content only tells people who holds it.

    Raises:
        UserError: another process, or another run in this one, holds the lock.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK_NAME
        self._key = str(folder.resolve())
        with _guard:
            # Record locks do not conflict within one process.
            if self._key in _held:
                raise UserError(f"run directory {folder} is in use by another run of this process")
            _held.add(self._key)
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            self._lock(folder)
        except BaseException:
            with _guard:
                _held.discard(self._key)
            raise

    def _lock(self, folder: Path) -> None:
        try:
            import fcntl
        except ImportError:  # no record locks on this system; the run goes on without
            return
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = self._owner()
            os.close(self._descriptor)
            raise UserError(
                f"run directory {folder} is in use by {owner}; "
                "wait for it, stop it, or choose another --run-dir"
            ) from error
        note = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        # The note is a courtesy: a full disk must not stop a resume.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(note).encode(), 0)

    def _owner(self) -> str:
        try:
            note = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {note['pid']} on {note['host']} since {note['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Let others use the directory."""
        with _guard:
            if self._key in _held:
                os.close(self._descriptor)
                _held.discard(self._key)
