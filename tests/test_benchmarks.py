"""What the benchmarks promise besides figures: limits that hold, and no figures of something else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

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
