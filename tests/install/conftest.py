"""Code in fresh processes without waiting for torch each time: forked from one that has imported it, but not pywm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

SERVER = """
import json, os, sys, tempfile, traceback
import torch

def child(request):
    os.environ.update(request["environment"])
    path = request["path"]
    if path:
        # An editable install finds its modules through an import hook; here the path alone decides.
        sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
        sys.path.insert(0, path)
        os.chdir(path)
    try:
        exec(request["code"], {"__name__": "__main__"})
        return 0
    except BaseException:
        traceback.print_exc()
        return 1

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = child(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        print(json.dumps({"code": code, "out": out.read(), "err": err.read()}), flush=True)
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Python:
    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )

    def __call__(self, code: str, *, path: Any = "", **environment: str) -> Result:
        """Run code that sees ``path`` first; an exception makes the exit code 1, a signal -n."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"code": code, "path": str(path), "environment": environment}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Result(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="session")
def python() -> Iterator[Python]:
    server = Python()
    yield server
    server.close()
