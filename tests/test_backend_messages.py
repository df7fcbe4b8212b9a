"""What is said when kernels are not used: once, in one line, with what mends it."""

import logging
import subprocess
import sys

import pytest

from pywm.ops import _native

BUILT = "nvcc 13.0, architectures 80-real 86-real 90-real 120"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1), (13, 0)])
def test_gpu_that_the_kernels_run_on(capability):
    assert _native._missing_architecture(BUILT, capability) == ""


@pytest.mark.parametrize("capability", [(7, 5), (10, 0)])
def test_gpu_that_the_kernels_were_not_built_for(capability):
    said = _native._missing_architecture(BUILT, capability)
    arch = "".join(map(str, capability))
    assert said.startswith(
        f"sm_{arch} is not among the architectures that the kernels were built for (80, 86, 90, 120)"
    )
    assert f"PYWM_CUDA_ARCHS={arch} pip install" in said


def test_virtual_architectures_are_compiled_for_newer_gpus_only():
    assert _native._missing_architecture("architectures 90-virtual", (10, 0)) == ""
    assert _native._missing_architecture("architectures 90-virtual", (8, 9)) != ""


@pytest.mark.parametrize("built", ["architectures native", "architectures 90a-real", "nvcc 13.0"])
def test_names_of_architectures_that_say_nothing_against_this_gpu(built):
    assert _native._missing_architecture(built, (9, 0)) == ""


def test_missing_module_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "why_not", "no compiler; mend it with: this command")
    entry = _native.entry("gae")
    with caplog.at_level(logging.WARNING, "pywm"):
        assert entry(1, 2) is None
        assert entry(3) is None
    assert [r.message for r in caplog.records] == [
        "compiled kernels are not used: no compiler; mend it with: this command"
    ]


def test_module_that_does_not_load_is_told_at_the_first_use_of_an_op():
    script = """
import sys
sys.modules["pywm._C"] = None
import torch, pywm
print("imported", file=sys.stderr)
x, mask = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)
pywm.gae(x, x, x, mask, mask)
pywm.gae(x, x, x, mask, mask)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = run.stderr.split("imported")
    assert before == ""
    assert after.count("compiled kernels are not used: ") == 1
