"""Video prediction foresees GridChase; the same command makes the recorded results.

python -m pytest -m slow tests/algos/test_video_learning.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "results" / "video_prediction" / "GridChase.json"


def check(result: dict[str, Any]) -> None:
    goals = result["goals"]
    for row in result["seeds"]:
        assert row["exact"] > goals["exact"]
        assert row["control"] >= goals["control"]
        assert row["permuted"] >= goals["permuted"]
        assert row["cpu_seconds"] <= goals["cpu_seconds"]
        errors = row["squared_error"]
        model = errors["model"][29]
        assert row["control"] == pytest.approx(errors["model of single steps"][29] / model, rel=0.01)
        assert row["permuted"] == pytest.approx(errors["model, permuted actions"][29] / model, rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_it_foresees_thirty_steps(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/video.py",
        "--out",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
    ]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "GridChase.json").read_text())
    assert [row["seed"] for row in found["seeds"]] == [0, 1, 2]
    check(found)
    assert (tmp_path / "GridChase.png").stat().st_size > 10_000
    assert (tmp_path / "GridChase-rollouts.png").stat().st_size > 1_000


def test_the_recorded_seeds_reach_the_goals() -> None:
    result = json.loads(RECORD.read_text())
    assert result["seeds"]
    assert (result["goals"]["exact"], result["goals"]["control"], result["goals"]["permuted"]) == (
        0.95,
        3,
        5,
    )
    check(result)
