"""Run pywm commands in processes of their own, quickly: forked from one that has imported everything.

``python processes.py`` is that process. It reads one JSON request a line and answers each with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass
class Result:
    code: int  # as a shell reports it: 128 + n for a process that died of signal n
    out: str
    err: str


class Process:
    """A running command."""

    def __init__(self, commands: Commands, pid: int, out: Path, err: Path):
        self._commands, self.pid, self._out, self._err = commands, pid, out, err

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def wait_for(self, path: Path, seconds: float = 30.0) -> None:
        """Wait until a file exists and is not empty."""
        deadline = time.monotonic() + seconds
        while not (path.exists() and path.stat().st_size):
            assert time.monotonic() < deadline, f"{path} did not appear:\n{self.err()}"
            time.sleep(0.002)

    def wait_for_text(self, text: str, seconds: float = 30.0) -> None:
        """Wait until stderr contains ``text``."""
        deadline = time.monotonic() + seconds
        while text not in self.err():
            assert time.monotonic() < deadline, f"{text!r} did not appear:\n{self.err()}"
            time.sleep(0.002)

    def wait(self, seconds: float = 60.0) -> Result:
        answer = self._commands.ask({"wait": self.pid, "seconds": seconds})
        if answer["code"] is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"the command did not end within {seconds} s:\n{self.err()}")
        code = answer["code"]
        err = self.err() if self._err.is_file() else ""  # a terminal is read by its owner
        return Result(code if code >= 0 else 128 - code, self._out.read_text(), err)


class Commands:
    """Starts pywm commands in ``folder``; ``algos`` is a folder with further algorithms."""

    def __init__(self, folder: Path, algos: Path | None = HERE / "algos"):
        self.folder = folder
        self._number = 0
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(algos or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *argv: object, limit_bytes: int | None = None, err: str | None = None) -> Process:
        """Start ``pywm argv``; no file it writes can grow beyond ``limit_bytes``; stderr goes to ``err``."""
        self._number += 1
        out_file = self.folder / f"{self._number}.out"
        err_file = Path(err) if err else self.folder / f"{self._number}.err"
        request = {
            "argv": [str(argument) for argument in argv],
            "cwd": str(self.folder),
            "out": str(out_file),
            "err": str(err_file),
            "limit_bytes": limit_bytes,
        }
        return Process(self, self.ask(request)["pid"], out_file, err_file)

    def __call__(self, *argv: object, seconds: float = 60.0, **options: Any) -> Result:
        return self.start(*argv, **options).wait(seconds)

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()


def serve(algos: str) -> None:
    import torch
    import tyro  # noqa: F401

    import pywm.algos
    import pywm.envs
    import pywm.training.run
    from pywm.cli import main

    torch.set_num_threads(1)
    if algos:
        pywm.algos.__path__.append(algos)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": wait(request["wait"], request["seconds"])}
        else:
            answer = {"pid": spawn(request, main)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    return None


def spawn(request: dict[str, Any], main: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(request["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(request["out"], flags), 1)
        os.dup2(os.open(request["err"], flags), 2)
        if request["limit_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit_bytes"],) * 2)
        sys.argv = ["pywm", *request["argv"]]
        code = main(request["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
