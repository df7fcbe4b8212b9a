"""``kill -9`` at random moments. PYWM_KILLS says how many (CI: 20); ``kills.py`` does it to any algorithm."""

from __future__ import annotations

import os
from pathlib import Path

from kills import survive
from processes import Commands

KILLS = int(os.environ.get("PYWM_KILLS", "5"))


def test_a_training_survives_kills_and_ends_the_same(pywm: Commands, tmp_path: Path) -> None:
    argv = [
        "train",
        "tiny",
        "CartPole-v1",
        "--steps",
        "480",
        "--checkpoint-every",
        "40",
        "--payload-kib",
        "256",
    ]
    outcome = survive(pywm, argv, tmp_path, kills=KILLS)
    assert outcome.kills >= KILLS
    assert outcome.runs >= 1
