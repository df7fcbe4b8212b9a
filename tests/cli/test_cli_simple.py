"""SimPLe from the command line: train, resume, evaluate, and look at what its model imagines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Commands

ROOT = Path(__file__).parents[2]

SETTINGS = {
    "steps-per-iteration": 30,
    "first-model-updates": 2,
    "model-updates": 1,
    "model-batch-size": 2,
    "horizon": 2,
    "policy-updates": 2,
    "agents": 2,
    "rollout-length": 4,
    "batch-size": 8,
    "epochs": 1,
    "run-dir": "run",
}
SMALL = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]


def test_a_run_is_trained_resumed_evaluated_and_dreamt(pywm: Commands) -> None:
    result = pywm(
        "train",
        "simple",
        "pywm/Catch-v0",
        "--steps",
        30,
        "--eval-every",
        30,
        "--eval-episodes",
        1,
        "--video",
        *SMALL,
    )
    assert result.code == 0, result.err
    assert "preset simple-tiny" in result.err
    assert "an update takes about" in result.err
    run = pywm.folder / "run"
    assert (run / "dreams" / "dream_00000030.gif").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = {key for row in rows for key in row}
    assert {
        "return/mean",
        "loss/pixels",
        "eval/return_t0.5",
        "eval/clipped_t1",
        "model/reward_accuracy",
    } <= keys

    result = pywm("train", "simple", "pywm/Catch-v0", "--run-dir", "run", "--resume", "--steps", 60)
    assert result.code == 0, result.err
    assert "resumed at 30 env steps" in result.err

    result = pywm("eval", "run", "--episodes", 2)
    assert result.code == 0, result.err
    assert result.out.startswith("simple on pywm/Catch-v0: return ")

    result = pywm("dream", "run", "--context", 4, "--steps", 10, "--out", "pictures")
    assert result.code == 0, result.err
    assert result.out == "pictures/dream.png\npictures/dream.gif\n"
    assert "mean squared error:" in result.err


def test_the_fields_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    words = ["--algos", "ppo", "--steps", "128", "--seeds", "2", "--out", "out", "--runs", "runs"]
    result = subprocess.run(
        [sys.executable, "-m", "pywm", "bench", "sample-efficiency", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "ppo seed 1: " in result.stdout
    runs = json.loads((tmp_path / "out" / "pywm_Catch-v0.json").read_text())["runs"]
    assert [(row["algorithm"], row["seed"], row["steps"]) for row in runs] == [
        ("ppo", 0, 128),
        ("ppo", 1, 128),
    ]
    assert (tmp_path / "out" / "pywm_Catch-v0.png").stat().st_size > 10_000
