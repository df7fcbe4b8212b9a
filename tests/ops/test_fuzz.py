"""A short run of the fuzzer, and that it would find what it looks for."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pywm.ops import _native
from pywm.testing.opinfo import OPS

FUZZER = Path(__file__).parents[1] / "fuzz_ops.py"


@pytest.fixture
def fuzz_ops(monkeypatch):
    monkeypatch.syspath_prepend(str(FUZZER.parent))
    import fuzz_ops

    return fuzz_ops


def test_nearly_right_calls_return_the_right_thing_or_say_what_is_wrong():
    # All ops in one process, for importing torch takes as long as the calls of an op.
    run = subprocess.run(
        [sys.executable, str(FUZZER), "--calls", "200", "--seed", "1000000"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    for info in OPS:
        assert f"{info.name}:" in run.stdout


def _outcomes(fuzz_ops, info, calls=60):
    return [fuzz_ops.judge(fuzz_ops.build(info, seed), seed) for seed in range(calls)]


def test_other_exceptions_are_found(fuzz_ops):
    def broken(sample):
        raise RuntimeError("gae: reward is wrong, but right was expected")

    outcomes = _outcomes(fuzz_ops, replace(OPS[0], call=broken))
    assert any(what == "finding" and "RuntimeError" in text for what, text in outcomes)


def test_messages_without_a_name_are_found(fuzz_ops):
    def broken(sample):
        raise ValueError("bad shape")

    outcomes = _outcomes(fuzz_ops, replace(OPS[0], call=broken))
    assert any(what == "finding" and "unclear" in text for what, text in outcomes)


def test_bad_calls_that_return_and_wrong_results_are_found(fuzz_ops):
    def broken(sample):
        from pywm.testing.opinfo import Sample

        good = OPS[0].sample((3, 2))
        wrong = 0 if _native.is_disabled() else 1  # the reference stays right
        return tuple(x + wrong for x in OPS[0].op(Sample(good.tensors, good.numbers)))

    outcomes = _outcomes(fuzz_ops, replace(OPS[0], call=broken))
    assert any("a bad call returned" in text for _, text in outcomes)
    assert any("differs from the reference" in text for _, text in outcomes)


def test_crashes_are_found(fuzz_ops, tmp_path, monkeypatch):
    script = tmp_path / "crashing.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FUZZER.parent)!r})\n"
        "import os, fuzz_ops\n"
        "fuzz_ops.judge = lambda case, seed: os.abort() if seed == 3 else ('returned', '')\n"
        "fuzz_ops.main()\n"
    )
    monkeypatch.setattr(fuzz_ops, "__file__", str(script))
    findings, totals = fuzz_ops.drive(["gae", "vtrace"], 6, 0, 60.0, "cpu")
    assert [(f["op"], f["seed"]) for f in findings] == [("gae", 3), ("vtrace", 3)]
    assert "crash" in findings[0]["finding"]
    assert totals["returned"] == 2 * 2  # behind the crash; what came before has no total
