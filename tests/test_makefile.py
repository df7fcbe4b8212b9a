"""``make demo`` does what it says, with fewer steps: each command of its recipe runs, and the files it names are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pywm import cli

MAKEFILE = Path(__file__).parents[1] / "Makefile"
if not MAKEFILE.is_file():
    pytest.skip("the Makefile is in a checkout", allow_module_level=True)

# The last of two equal flags counts, as it does for whoever sets ARGS.
ARGS = "--steps 80 --learning-starts 20 --train-ratio 16 --batch-size 2 --batch-length 5 --imagine-horizon 3 --device cpu"


def test_the_demo_trains_and_writes_the_files_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    recipe = re.findall(r"^demo:.*\n((?:\t.*\n)+)", MAKEFILE.read_text("utf-8"), re.MULTILINE)
    assert len(recipe) == 1
    lines = [line.strip() for line in recipe[0].splitlines()]
    commands = [
        shlex.split(line.replace("$(ARGS)", ARGS).removeprefix("$(BIN)/pywm "))
        for line in lines
        if line.startswith("$(BIN)/pywm ")
    ]
    assert [command[0] for command in commands] == ["train", "plot", "dream", "eval"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"^dreamer_v3 on CartPole-v1: return \d+\.\d\d ± ", out, re.MULTILINE)
    named = re.findall(
        r"runs/[\w/]+\.(?:png|gif)", " ".join(line for line in lines if line.startswith("@echo"))
    )
    assert [Path(name).name for name in named] == ["curve.png", "dream.png", "dream.gif"]
    for name in named:
        assert (tmp_path / name).stat().st_size > 1000
        assert name in out
