"""Kill a training at random moments; it must always resume, lose little, and end as if nothing had happened.

For any algorithm, by hand::

    python tests/training/kills.py --kills 200 -- train ppo CartPole-v1 --steps 40000 --checkpoint-every 4000
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import Commands

from pywm.training import checkpoint
from pywm.training.log import read_metrics


@dataclass
class Outcome:
    kills: int = 0
    runs: int = 0  # trainings that were completed, each equal to the undisturbed one
    during_save: int = 0  # kills that left a temporary directory behind
    most_lost: int = 0  # environment steps
    seconds: float = 0.0  # what the undisturbed training takes

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.during_save} of them inside a save; {self.runs} trainings ended "
            f"equal to the undisturbed one of {self.seconds:.1f} s; at most {self.most_lost} env steps lost"
        )


def survive(commands: Commands, argv: list[str], folder: Path, *, kills: int, seed: int = 0) -> Outcome:
    """Train with ``pywm argv`` under ``kills`` SIGKILLs at uniformly random moments.

    Args:
        commands: what starts the processes.
        argv: a training from its beginning, without ``--run-dir``, with ``--checkpoint-every``.
        folder: where the run directories go.
        kills: how many.
        seed: of the moments.
    """
    interval = int(argv[argv.index("--checkpoint-every") + 1])
    rng = random.Random(seed)
    outcome = Outcome()
    commands("--version")  # the first command waits for the imports
    begin = time.monotonic()
    reference = folder / "undisturbed"
    result = commands(*argv, "--run-dir", reference, seconds=600)
    assert result.code == 0, result.err
    assert _iteration(reference) <= interval
    outcome.seconds = time.monotonic() - begin
    iteration = _iteration(reference)

    for victim in (folder / f"victim-{i}" for i in itertools.count()):
        while True:
            process = commands.start(*argv, "--run-dir", victim, "--resume")
            if outcome.kills < kills:
                time.sleep(rng.uniform(0, outcome.seconds))
                process.send(signal.SIGKILL)
            result = process.wait(600)
            if result.code == 0:
                break
            assert result.code == 128 + signal.SIGKILL, result.err
            outcome.kills += 1
            outcome.during_save += any((victim / "checkpoints").glob(".tmp-*"))
            lost = _inspect(victim)
            assert lost <= interval + iteration, f"{lost} steps lost, the interval is {interval}"
            outcome.most_lost = max(outcome.most_lost, lost)
        outcome.runs += 1
        assert fingerprint(victim) == fingerprint(reference)
        shutil.rmtree(victim)
        if outcome.kills >= kills:
            return outcome
    raise AssertionError  # count() has no end


def fingerprint(run: Path) -> dict[str, Any]:
    """What equal trainings have in common: the newest checkpoint's hashes, all metrics but the times."""
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    checkpoint.verify(newest)
    rows = read_metrics(run / "metrics.jsonl")
    return {
        "checkpoint": json.loads((newest / "manifest.json").read_text()),
        "metrics": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
    }


def _inspect(run: Path) -> int:
    """Verify every checkpoint a killed process left; return how many steps of the log it had not saved."""
    found = checkpoint.list_checkpoints(run / "checkpoints")
    for path in found:
        checkpoint.verify(path)
    if found:
        assert not checkpoint.load(run / "checkpoints").dropped, f"{found[-1]} is to keep everything"
    metrics = run / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    reached = rows[-1]["env_steps"] if rows else 0
    return max(reached - (checkpoint.step_of(found[-1]) if found else 0), 0)


def _iteration(run: Path) -> int:
    steps = [row["env_steps"] for row in read_metrics(run / "metrics.jsonl")]
    return max(b - a for a, b in itertools.pairwise([0, *steps]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("argv", nargs="+", help="train ALGO ENV ... --checkpoint-every N, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder))
        outcome = survive(commands, arguments.argv, Path(folder), kills=arguments.kills, seed=arguments.seed)
        commands.close()
    sys.stdout.write(f"{outcome}\n")


if __name__ == "__main__":
    main()
