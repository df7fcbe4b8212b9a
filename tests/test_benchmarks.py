"""What the benchmarks promise besides figures: limits that hold, and no figures of something else."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pywm.ops import _native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    """``gpu.sh bench`` with a Python that starts a process, notes its id and waits."""
    if not Path("/proc/self/stat").exists() or shutil.which("bash") is None:
        pytest.skip("needs bash and /proc")
    (tmp_path / "work/pywm").mkdir(parents=True)
    (tmp_path / "work/pywm/_C.fake.so").touch()
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/sh\nsleep 77 &\necho $! > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid\nwait\n"
    )
    fake.chmod(0o755)
    settings = {"OUT": tmp_path / "out", "WORK": tmp_path / "work", "PYTHON": fake}
    return ["env", *(f"{k}={v}" for k, v in settings.items()), "bash", str(BENCHMARKS / "gpu.sh"), "bench"]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def wait_until_dead(pid: int, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < deadline, f"{pid} lives on"
        time.sleep(0.01)


def test_a_phase_beyond_its_limit_ends_with_all_that_it_started(script: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        script, capture_output=True, text=True, env=os.environ | {"LIMIT_bench": "1"}, timeout=30
    )
    assert done.returncode == 1, done.stderr
    assert "bench: timed out in" in done.stdout
    assert json.loads((tmp_path / "out/gpu.json").read_text())["bench"]["status"] == "timed out"
    wait_until_dead(int((tmp_path / "pid").read_text()))


def test_an_interrupted_script_takes_its_phase_along(script: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130
    wait_until_dead(int((tmp_path / "pid").read_text()))


def test_references_are_not_timed_as_pywm(monkeypatch: pytest.MonkeyPatch) -> None:
    train = load("train", monkeypatch)
    monkeypatch.setattr(train, "measure", lambda *_: pytest.fail("timed something"))
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "why_not", "no compiler; mend it with: a command")
    with pytest.raises(
        SystemExit, match=r"train\.py: pywm has no compiled kernels.*no compiler; mend it with: a command"
    ):
        train.main(train.Options())


def test_the_pywm_that_is_timed_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    train = load("train", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    paths: list[str] = []

    def run(*_: object, env: dict[str, str], **__: object) -> SimpleNamespace:
        paths.append(env["PYTHONPATH"])
        return SimpleNamespace(stdout="[1.0, 2.0]\n")

    monkeypatch.setattr(train.subprocess, "run", run)
    train.measure("pywm", train.TASKS["cartpole"], 1, 0)
    assert paths == ["somewhere"]  # and not a checkout before it, which may have no kernels
