"""DreamerV3 from the command line: train, resume, evaluate, and look at its dreams."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import Commands

SETTINGS = {
    "learning-starts": 20,
    "train-ratio": 1,
    "batch-size": 2,
    "batch-length": 5,
    "imagine-horizon": 3,
    "replay-size": 1000,
    "checkpoint-every": 50,
    "run-dir": "run",
}
SMALL = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]


def test_a_run_is_trained_resumed_evaluated_and_dreamt(pywm: Commands) -> None:
    pytest.importorskip("matplotlib")
    result = pywm("train", "dreamer_v3", "CartPole-v1", "--steps", 60, "--eval-every", 60, "--video", *SMALL)
    assert result.code == 0, result.err
    assert "preset cartpole" in result.err
    assert "the replay of 1,000 rows takes" in result.err
    run = pywm.folder / "run"
    assert [path.name for path in sorted((run / "dreams").iterdir())] == [
        "dream_00000060.gif",
        "dream_00000060.png",
    ]

    result = pywm("train", "dreamer_v3", "CartPole-v1", "--run-dir", "run", "--resume", "--steps", 80)
    assert result.code == 0, result.err
    assert "resumed at 60 env steps" in result.err

    result = pywm("eval", "run", "--episodes", 2)
    assert result.code == 0, result.err
    assert result.out.startswith("dreamer_v3 on CartPole-v1: return ")

    result = pywm("dream", "run", "--context", 2, "--steps", 4, "--out", "pictures")
    assert result.code == 0, result.err
    assert result.out == "pictures/dream.png\npictures/dream.gif\n"
    assert (pywm.folder / "pictures" / "dream.png").stat().st_size > 10_000
    assert "mean squared error:" in result.err
    assert "after 1" in result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--context", 0), "dream: context is 0, but expected 1 or more"),
        (("--context", 2000), "dream: context is 2000, but all episodes ended after at most"),
        (("--sequences", 0), "dream: sequences is 0, but expected 1 or more"),
        (("--seed", -1), "dream: seed is -1, but expected a number in"),
        ((), "is of an algorithm without a world model"),
    ],
)
def test_dream_refuses(
    flags: tuple[object, ...], message: str, pywm: Commands, trained: Path, dreamer: Path
) -> None:
    result = pywm("dream", dreamer if flags else trained, *flags)
    assert result.code == 2
    assert result.err.startswith("pywm: ")
    assert message in result.err
    assert result.out == ""


@pytest.fixture(scope="module")
def dreamer(server: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    server.folder = tmp_path_factory.mktemp("dreamer")
    result = server("train", "dreamer_v3", "CartPole-v1", "--steps", 30, *SMALL)
    assert result.code == 0, result.err
    return server.folder / "run"
