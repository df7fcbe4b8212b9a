"""``kill -9`` at random moments. PYWM_KILLS says how many (CI: 20); ``kills.py`` does it to any algorithm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kills import survive
from processes import Commands

KILLS = int(os.environ.get("PYWM_KILLS", "3"))

# A replay that overflows; an update a step, so that there is a row of metrics between two checkpoints.
DREAMER = (
    "--size tiny --batch-size 2 --batch-length 5 --imagine-horizon 3 --learning-starts 20 --train-ratio 10 "
    "--replay-size 150 --steps 240 --checkpoint-every 80"
)

# Pictures are collected for two thirds of the run's clock, and learnt from for the rest.
VIDEO = (
    "--steps 160 --test-steps 160 --num-envs 4 --curriculum 1 1e-3 2 60 3 5e-4 2 20 --eval-horizon 6 --eval-rollouts 2 "
    "--show-steps 1 5 --checkpoint-every 80"
)

TRAININGS = {
    "tiny": "train tiny CartPole-v1 --steps 480 --checkpoint-every 40 --payload-kib 256",
    "ppo": "train ppo CartPole-v1 --steps 1536 --checkpoint-every 256",
    "ppo, episodes cut": "train ppo Acrobot-v1 --steps 512 --num-envs 2 --num-steps 32 --checkpoint-every 64",
    "dreamer_v3": f"train dreamer_v3 CartPole-v1 {DREAMER}",
    "video_prediction": f"train video_prediction pywm/GridChase-v0 {VIDEO}",
    "dreamer_v3, episodes cut": f"train dreamer_v3 Acrobot-v1 --num-envs 2 {DREAMER}",
}


@pytest.mark.timeout(1200)  # CI kills many times
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_survives_kills_and_ends_the_same(name: str, pywm: Commands, tmp_path: Path) -> None:
    outcome = survive(pywm, TRAININGS[name].split(), tmp_path, kills=KILLS)
    assert outcome.kills >= KILLS
    assert outcome.runs >= 1
