"""The README's Python runs as it stands, in the order in which a reader tries it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pywm import cli
from pywm.ops import _native

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
RUN = re.findall(r'pywm\.load\("(.+?)"\)', README)


def test_there_is_python_in_the_readme_and_one_run_is_loaded() -> None:
    assert len(BLOCKS) == README.count("```python") >= 3
    assert len(RUN) == 1
    # As directory.choose names it.
    assert re.fullmatch(r"runs/CartPole-v1/ppo/0-\d{8}-\d{6}", RUN[0])


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_it_stands(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "pywm.load" in BLOCKS[number]:
        argv = ["train", "ppo", "CartPole-v1", "--steps", "64", "--device", "cpu", "--run-dir", RUN[0]]
        assert cli.main(argv) == 0
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[number], f"README.md, block {number + 1}", "exec"), names)
    if "imagined" in names and _native.has_backend("cpu"):
        assert names["imagined"].path == "kernel"  # one call, as it says
