"""The wrappers of csrc/cuda/device.cuh do what they say: in the emulator always, on a GPU where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import CSRC, HERE, MODES, build, run_program, why_unavailable

SOURCE = HERE / "conformance.cu"


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


@pytest.mark.parametrize("mode", MODES)
def test_wrappers_conform_in_the_emulator(mode: str) -> None:
    reason = why_unavailable(mode)
    if reason:
        pytest.skip(reason)
    outcome = run_program(build("conformance", [SOURCE], MODES[mode]), [], MODES[mode])
    assert outcome.returncode == 0, f"{outcome.stdout}\n{outcome.stderr[:3000]}"
    assert not outcome.reports(), outcome.stderr[:3000]
    assert all(line.startswith("PASS ") for line in lines(outcome.stdout))


@pytest.mark.gpu
def test_wrappers_conform_on_the_device(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc on PATH")
    program = tmp_path / "conformance"
    command = [nvcc, "-std=c++20", "-arch=native", f"-I{CSRC}", str(SOURCE), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:3000]
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
