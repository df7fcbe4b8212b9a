"""The examples, and the Python of the documents, run as they stand, with fewer steps."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pywm import cli
from pywm.envs import check_env

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are in a checkout", allow_module_level=True)

SETTINGS = {
    "steps": 40,
    "learning-starts": 20,
    "train-ratio": 1,
    "batch-size": 2,
    "batch-length": 5,
    "imagine-horizon": 3,
    "replay-size": 1000,
    "device": "cpu",
}


def train(run: str) -> None:
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", "dreamer_v3", "CartPole-v1", *flags, "--run-dir", run]) == 0


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r'EXAMPLES / "(\w+\.py)"', Path(__file__).read_text("utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_ppo_trains_in_a_dream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stable_baselines3", reason="the extra sb3 is not installed")
    run = str(tmp_path / "run")
    train(run)
    main = runpy.run_path(str(EXAMPLES / "ppo_in_a_dream.py"))["main"]
    capsys.readouterr()
    assert main([run, "--steps", "256", "--num-envs", "2", "--length", "8", "--episodes", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    number = r"-?\d+\.\d ± \d+\.\d over 3 episodes"
    assert len(out) == 2
    assert re.fullmatch(f"return in the dream: {number}", out[0])
    assert re.fullmatch(f"return for real: {number}", out[1])
    assert float(out[1].split()[3]) >= 8  # CartPole pays 1 a step, and falls after 8 at the earliest


def test_a_loop_of_ones_own_learns(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]
    assert main(["--iterations", "21"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert [int(line.split()[0]) for line in lines] == [0, 10, 20]
    losses = [float(line.split()[-1]) for line in lines]
    assert losses[2] < losses[0]


def test_dreamer_trains_in_an_environment_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "own_environment.py"))
    assert check_env(names["Thermostat"]).ok
    assert names["main"](["--steps", "60", "--learning-starts", "8", "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"return \d+\.\d before, \d+\.\d after training\n", out)


def test_an_agent_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pygame", reason="the extra classic is not installed")
    run, gif = str(tmp_path / "run"), tmp_path / "episode.gif"
    train(run)
    main = runpy.run_path(str(EXAMPLES / "watch_agent.py"))["main"]
    capsys.readouterr()
    assert main([run, "--gif", str(gif)]) == 0
    *steps, total, written = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(r" *\d+  action [01]  reward 1", line) for line in steps)
    assert total.startswith(f"return {len(steps)} after {len(steps)} steps (")
    assert written == str(gif)
    with Image.open(gif) as film:
        # Equal pictures in a row become one that is shown for longer.
        assert 1 < film.n_frames <= len(steps)


def test_the_python_of_the_dreamers_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_baselines3", reason="the extra sb3 is not installed")
    page = (ROOT / "docs" / "dreamer_v3.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    [run] = set(re.findall(r'"(runs/[^"]+)"', blocks[0]))
    monkeypatch.chdir(tmp_path)
    train(run)
    code, count = re.subn(r"\b\d+_000\b", "256", blocks[0])
    assert count == 1
    names: dict[str, Any] = {}
    exec(compile(code, "docs/dreamer_v3.md", "exec"), names)
    assert names["agent"].num_timesteps >= 256
