"""``kill -9`` at random moments. PYWM_KILLS says how many (CI: 20); ``kills.py`` does it to any algorithm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kills import survive
from processes import Commands

KILLS = int(os.environ.get("PYWM_KILLS", "5"))

TRAININGS = {
    "tiny": "train tiny CartPole-v1 --steps 480 --checkpoint-every 40 --payload-kib 256",
    "ppo": "train ppo CartPole-v1 --steps 1536 --checkpoint-every 256",
    "ppo, episodes cut": "train ppo Acrobot-v1 --steps 512 --num-envs 2 --num-steps 32 --checkpoint-every 64",
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_survives_kills_and_ends_the_same(name: str, pywm: Commands, tmp_path: Path) -> None:
    outcome = survive(pywm, TRAININGS[name].split(), tmp_path, kills=KILLS)
    assert outcome.kills >= KILLS
    assert outcome.runs >= 1
