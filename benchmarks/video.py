"""Train video prediction with several seeds, with and without its curriculum, and record how far it foresees.

    python benchmarks/video.py                       # GridChase, seeds 0 to 2, one thread
    python benchmarks/video.py --seeds 1 --blind     # and a model that is not told the actions

A seed collects its pictures and takes the first phase once; then one model goes on with the curriculum of the preset, and
another one, the control, takes as many updates of single steps, in the same batches and at the same learning rates.
Errors are of fresh rollouts. ``<out>/GridChase.json`` has settings, versions, machine, figures and times,
``<out>/GridChase.png`` the errors against the horizon, ``<out>/GridChase-rollouts.png`` the first seed's predictions. A
goal that is missed makes the command fail.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from pywm.algos import video_prediction
from pywm.algos.video_prediction import BLIND, Agent, Config
from pywm.config import to_json
from pywm.data.frames import Frames
from pywm.envs import make
from pywm.envs.grid_chase import find_player
from pywm.training import machine
from pywm.training.prediction import MODEL, PERMUTED, horizon_errors, plot_errors, plot_rollout, rollout
from pywm.training.run import Run, RunOptions

ENV = "pywm/GridChase-v0"
CONTROL = "model of single steps"
HORIZON = 30
STEPS = (1, 10, HORIZON)
ROLLOUTS = 512
# Far from the seeds of training, which start at 0.
EVALUATION_SEED = 1_000_000
# At step 30: the player's cell is right in more than this share of rollouts, the control's error is at least this many
# times the model's, and so is the model's under the actions of others. All within this processor time, on one thread.
GOALS = {"exact": 0.95, "control": 3.0, "permuted": 5.0, "cpu_seconds": 1440}


@dataclass(frozen=True)
class Options:
    """Train video prediction on GridChase with several seeds and record the results."""

    seeds: int = 3
    """Train with seeds 0, 1, ..."""
    first_seed: int = 0
    """Begin with this one instead."""
    blind: bool = False
    """Train a model that is not told the actions beside the first seed's."""
    threads: int = 1
    """Threads of torch."""
    out: str = "docs/results/video_prediction"
    """Where the JSON and the pictures go."""
    runs: str = "runs/video"
    """Where the runs go."""


def main(options: Options) -> int:
    torch.set_num_threads(options.threads)
    base = Config(**video_prediction.PRESETS["gridchase"].config)
    base = replace(base, eval_horizon=HORIZON, show_steps=STEPS)
    out, rows, curves = Path(options.out), [], []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        config = replace(base, seed=seed, blind_baseline=options.blind and seed == options.first_seed)
        row, errors, agent = learn(config, Path(options.runs) / str(seed))
        if not rows:
            draw(agent, out / "GridChase-rollouts.png")
        rows.append(row)
        curves.append(errors)
        print(
            f"seed {seed}: player right at step {HORIZON} in {row['exact']:.1%}; control {row['control']:.1f} and permuted "
            f"actions {row['permuted']:.1f} times the error; {row['cpu_seconds']:.0f} s of processor in "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
        result = {
            "algorithm": "video_prediction",
            "env": ENV,
            "config": to_json(base),
            "control": control_of(base),
            "goals": GOALS,
            "rollouts": ROLLOUTS,
            "machine": machine.facts(),
            "threads": options.threads,
            "seeds": rows,
        }
        (out / "GridChase.json").write_text(json.dumps(result, indent=1) + "\n")
        names = dict.fromkeys(name for found in curves for name in found)
        mean = {name: np.mean([found[name] for found in curves if name in found], 0) for name in names}
        plot_errors(mean, out / "GridChase.png", title=f"{ENV}, mean of {len(rows)} seeds")
    missed = [row["seed"] for row in rows if not reaches(row)]
    print(f"{len(rows) - len(missed)} of {len(rows)} seeds reached their goals", "MISSED" if missed else "")
    return 1 if missed else 0


def reaches(row: dict[str, Any]) -> bool:
    above = row["exact"] > GOALS["exact"] and all(
        row[name] >= GOALS[name] for name in ("control", "permuted")
    )
    return above and row["cpu_seconds"] <= GOALS["cpu_seconds"]


def control_of(config: Config) -> list[tuple[int, float, int, int]]:
    """Return the phases of the control: the same, but every horizon is 1."""
    return [(1, *rest) for _, *rest in config.curriculum]


def learn(config: Config, folder: Path) -> tuple[dict[str, Any], dict[str, list[float]], Agent]:
    """Train a seed's two models; return its figures, its errors and the model with the curriculum."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter(), time.process_time()
    train(replace(config, curriculum=config.curriculum[:1]), folder / "first")
    agents, spent = [], [(time.perf_counter() - began[0], time.process_time() - began[1])]
    for name, phases in (("curriculum", config.curriculum), ("control", tuple(control_of(config)))):
        shutil.copytree(folder / "first", folder / name, ignore=shutil.ignore_patterns(".lock"))
        began = time.perf_counter(), time.process_time()
        agents.append(train(replace(config, curriculum=phases), folder / name, resume=True))
        spent.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    agent, control = agents
    frames, action = windows(agent, config.seed)
    others = {CONTROL: control.model, **({} if agent.blind is None else {BLIND: agent.blind})}
    errors = horizon_errors(agent.model, frames, action, others=others)
    cells = [find_player(x[-1].numpy()) for x in (rollout(agent.model, frames, action), frames)]
    seconds, cpu_seconds = np.sum(spent, 0)
    last = {name: found[-1] for name, found in errors.items()}
    row = {
        "seed": config.seed,
        "exact": float((cells[0] == cells[1]).all(-1).mean()),
        "control": last[CONTROL] / last[MODEL],
        "permuted": last[PERMUTED] / last[MODEL],
        "seconds": round(float(seconds), 1),
        "cpu_seconds": round(float(cpu_seconds), 1),
        "squared_error": {name: [round(x, 3) for x in found] for name, found in errors.items()},
    }
    return row, errors, agent


def train(config: Config, folder: Path, *, resume: bool = False) -> Agent:
    options = RunOptions(run_dir=str(folder), resume=resume, progress="off", checkpoint_every=10**9)
    with Run.open(
        options,
        algo="video_prediction",
        env=ENV,
        seed=config.seed,
        config=to_json(config),
        total_steps=config.total_steps,
        may_change=Config.may_change,
    ) as run:
        agent = video_prediction.train(config, ENV, run=run)
        if run.interrupted:
            raise SystemExit(130)
    return agent


def windows(agent: Agent, seed: int) -> tuple[Tensor, Tensor]:
    """Play at random in mazes that nobody has seen, and return one stretch of each."""
    rows, start = agent.model.context + HORIZON, 20
    envs = make(ENV, ROLLOUTS, seed=EVALUATION_SEED + seed * ROLLOUTS)
    store = Frames(start + rows, ROLLOUTS, agent.shape, agent.actions.width)
    obs, state = envs.reset(), None
    while not store.is_full:
        action, state = agent.act(obs, state)
        out = envs.step(action)
        store.add(agent.frames(obs), state.action, out)
        obs = out.obs
    found = store.windows(rows)
    return store.gather(found[found.time == start])


def draw(agent: Agent, path: Path) -> None:
    """Draw three rollouts."""
    frames, action = (x[:, :3] for x in windows(agent, agent.config.seed))
    truth = frames[agent.model.context :].numpy().astype(np.float32) / 255
    plot_rollout(truth, rollout(agent.model, frames, action).numpy(), path, steps=STEPS)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
