"""Video prediction from the command line: train, resume, evaluate, and look at what it foresees."""

from __future__ import annotations

import pytest
from processes import Commands

SETTINGS = {
    "steps": "160",
    "test-steps": "320",
    "num-envs": "8",
    "curriculum": "1 1e-3 4 6 3 5e-4 2 4",
    "eval-horizon": "8",
    "eval-rollouts": "4",
    "show-steps": "1 8",
    "checkpoint-every": "200",
    "run-dir": "run",
}
SMALL = [word for name, value in SETTINGS.items() for word in (f"--{name}", *value.split())]


def test_a_run_is_trained_resumed_evaluated_and_dreamt(pywm: Commands) -> None:
    pytest.importorskip("matplotlib")
    result = pywm("train", "video_prediction", "pywm/GridChase-v0", *SMALL, "--stop-at", 400)
    assert result.code == 0, result.err
    assert "preset gridchase" in result.err
    run = pywm.folder / "run"
    assert not (run / "prediction").exists()

    result = pywm("train", "video_prediction", "pywm/GridChase-v0", "--run-dir", "run", "--resume")
    assert result.code == 0, result.err
    assert "resumed at 400 env steps" in result.err
    assert "finished at 490 env steps" in result.err
    assert (run / "prediction" / "rollout.png").stat().st_size > 1000

    result = pywm("eval", "run", "--episodes", 2)
    assert result.code == 0, result.err
    assert result.out.startswith("video_prediction on pywm/GridChase-v0: return ")

    result = pywm("dream", "run", "--context", 4, "--steps", 4, "--out", "pictures")
    assert result.code == 0, result.err
    assert result.out == "pictures/dream.png\npictures/dream.gif\n"
    result = pywm("dream", "run", "--context", 2)
    assert result.code == 2
    assert "context is 2, but expected 4 or more" in result.err


def test_an_environment_without_pictures_leaves_no_run_behind(pywm: Commands) -> None:
    result = pywm("train", "video_prediction", "CartPole-v1", "--run-dir", "run")
    assert result.code == 2
    assert "the environment shows 0 pictures" in result.err
    assert not (pywm.folder / "run").exists()
