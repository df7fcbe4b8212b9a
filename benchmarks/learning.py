"""Train an algorithm on real environments with several seeds, and record what came of it.

    python benchmarks/learning.py CartPole-v1 Pendulum-v1 --seeds 5
    python benchmarks/learning.py LunarLander-v3 --seeds 5 --out docs/results/ppo
    python benchmarks/learning.py CartPole-v1 --algo dreamer_v3 --threads 1
    python benchmarks/learning.py pywm/Catch-v0 --algo simple --threads 1 --seeds 3

For every environment: ``<out>/<env>.json`` (settings, versions, machine; for each seed the wall time and the processor time
of the training, the returns of 20 greedy episodes and the learning curve) and ``<out>/<env>.png``. The runs themselves stay
below ``--runs``. A threshold that is missed makes the command fail. The time that a goal allows is compared with the
processor time of all threads, which is about the wall time of one thread on an idle core; a busy machine lengthens that
less.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro

from pywm import algos
from pywm.algos import ppo
from pywm.config import Preset, to_json
from pywm.envs import make
from pywm.training import machine, report
from pywm.training.evaluate import evaluate
from pywm.training.log import read_metrics
from pywm.training.run import Run, RunOptions

EPISODES = 20
# Far from the seeds of training, which start at 0.
EVALUATION_SEED = 1_000_000


class Goal(NamedTuple):
    """What counts as learned: in at least ``share`` of ``seeds`` seeds, ``score`` on average within ``seconds``."""

    score: float
    share: float
    seconds: float = float("inf")
    seeds: int = 5


GOALS = {
    ("ppo", "CartPole-v1"): Goal(475, 0.8, seconds=60),
    ("ppo", "Pendulum-v1"): Goal(-250, 1.0),
    ("ppo", "LunarLander-v3"): Goal(200, 1.0),
    ("ppo", "Acrobot-v1"): Goal(-100, 1.0),
    ("dreamer_v3", "CartPole-v1"): Goal(400, 0.8, seconds=1200),
    ("dreamer_v3", "Pendulum-v1"): Goal(-250, 1.0, seconds=1500, seeds=1),
    # 95 % of the best return, 30.
    ("dreamer_v3", "pywm/DelayedCopy-v0"): Goal(28.5, 1.0, seconds=240, seeds=2),
    # An episode without success returns -0.5, so that 0.9 on average means a success of 95 % and more.
    ("dreamer_v3", "pywm/Grid-v0"): Goal(0.9, 1.0, seconds=720, seeds=3),
    ("dreamer_v3", "pywm/TMaze-v0"): Goal(0.95, 1.0, seconds=240),
    ("simple", "pywm/Catch-v0"): Goal(0.8, 1.0, seconds=720, seeds=3),
}


@dataclass(frozen=True)
class Options:
    """Train an algorithm's presets with several seeds and record the results."""

    envs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Environments, each with the preset that suits it."""
    algo: str = "ppo"
    """The algorithm."""
    seeds: int | None = None
    """Train with so many seeds 0, 1, ...; by default as many as the goal asks for, or 5."""
    first_seed: int = 0
    """Begin with this one instead."""
    steps: int | None = None
    """Environment steps, in place of the preset's."""
    threads: int | None = None
    """Threads of torch, in place of its own choice (PPO takes one for small networks anyhow)."""
    out: str | None = None
    """Where the JSON and the pictures go; by default docs/results/ALGO."""
    runs: str = "runs/learning"
    """Where the runs go."""

    @property
    def folder(self) -> Path:
        return Path(self.out or f"docs/results/{self.algo}")


TRUNCATION = "pywm/Truncation-v0"

# Reward 1 for ever, cut after 5 steps, discount 0.9: what the value should be with the bootstrap, and what it would be if
# a time limit were taken for the end.
TRUNCATION_VALUES = ((True, 0.95, 10.0), (False, 1.0, 2.63), (False, 0.0, 3.57))


def main(options: Options) -> int:
    missed = 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    presets = algos.get(options.algo).PRESETS
    for env in options.envs:
        if env == TRUNCATION:
            missed += not learn_truncation(options)
            continue
        name, preset = next(((n, p) for n, p in presets.items() if p.suits(env)), (None, None))
        if preset is None:
            raise SystemExit(f"no preset suits {env}: choose from {[p.envs for p in presets.values()]}")
        missed += not learn(env, name, preset, options)
    return 1 if missed else 0


def learn_truncation(options: Options) -> bool:
    """Learn the value of an episode that is only ever cut, with and without the bootstrap; say whether it is right."""
    rows = []
    for bootstrap, lam, expected in TRUNCATION_VALUES:
        for seed in range(options.first_seed, options.first_seed + (options.seeds or 5)):
            config = ppo.Config(
                steps=8_000, num_envs=4, num_steps=25, batch_size=100, epochs=20, lr=1e-2, discount=0.9, lam=lam,
                bootstrap_truncated=bootstrap, max_grad_norm=None, hidden=(16,), seed=seed,
            )  # fmt: skip
            value = ppo.train(config, TRUNCATION).policy.value(torch.ones(1, 1)).item()
            rows.append(
                {"bootstrap": bootstrap, "lam": lam, "seed": seed, "value": value, "expected": expected}
            )
            print(f"{TRUNCATION} {rows[-1]}", flush=True)
    out = options.folder
    out.mkdir(parents=True, exist_ok=True)
    result = {"algorithm": "ppo", "env": TRUNCATION, "machine": machine.facts(), "runs": rows}
    (out / "pywm_Truncation-v0.json").write_text(json.dumps(result, indent=1) + "\n")
    return all(abs(row["value"] - row["expected"]) <= 0.02 * row["expected"] for row in rows)


def learn(env: str, name: str, preset: Preset, options: Options) -> bool:
    """Train all seeds of one environment; say whether its goal was met."""
    module = algos.get(options.algo)
    config = module.Config(**preset.config)
    if options.steps is not None:
        config = replace(config, steps=options.steps)
    folder = Path(options.runs) / options.algo / env.replace("/", "_")
    goal, rows = GOALS.get((options.algo, env)), []
    for seed in range(
        options.first_seed, options.first_seed + (options.seeds or (goal.seeds if goal else 5))
    ):
        rows.append(row := train(module, env, replace(config, seed=seed), folder / str(seed)))
        print(
            f"{env} seed {seed}: {row['return_mean']:.1f} ± {row['return_std']:.1f} after {row['steps']} steps, "
            f"{row['seconds']:.1f} s ({row['steps'] / row['seconds']:.0f} steps/s), {row['cpu_seconds']:.1f} s of a core",
            flush=True,
        )
    reached = True
    if goal is not None:
        good = [row["return_mean"] >= goal.score and row["cpu_seconds"] <= goal.seconds for row in rows]
        reached = np.mean(good) >= goal.share
        print(f"{env}: {sum(good)} of {len(good)} seeds reached {goal.score:g}", "" if reached else "MISSED")
    out = options.folder
    out.mkdir(parents=True, exist_ok=True)
    stem = env.replace("/", "_")
    result = {
        "algorithm": options.algo,
        "env": env,
        "preset": name,
        "config": to_json(config),
        "goal": goal._asdict() | {"seconds": min(goal.seconds, 1e9)} if goal else None,
        "episodes": EPISODES,
        "machine": machine.facts(),
        "threads": 1 if options.algo == "ppo" else torch.get_num_threads(),
        "seeds": rows,
    }
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    report.plot([folder / str(row["seed"]) for row in rows], out / f"{stem}.png")
    return bool(reached)


def train(module: Any, env: str, config: Any, folder: Path) -> dict[str, Any]:
    """Train one seed in a run of its own and play greedy episodes with the result."""
    options = RunOptions(
        run_dir=str(folder), fresh=True, progress="off", checkpoint_every=max(config.steps // 4, 1)
    )
    with Run.open(
        options,
        algo=module.__name__.rpartition(".")[2],
        env=env,
        seed=config.seed,
        config=to_json(config),
        total_steps=config.steps,
    ) as run:
        start, cpu_start = time.perf_counter(), time.process_time()
        agent = module.train(config, env, run=run)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        if run.interrupted:
            raise SystemExit(130)
    envs = make(env, EPISODES, training=False)
    result = evaluate(agent, envs, episodes=EPISODES, seed=EVALUATION_SEED + config.seed)
    envs.close()
    metrics = [row for row in read_metrics(folder / "metrics.jsonl") if "return/mean" in row]
    every = max(len(metrics) // 50, 1)
    return {
        "seed": config.seed,
        "steps": metrics[-1]["env_steps"],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "return_mean": result.return_mean,
        "return_std": result.return_std,
        "returns": [round(x, 2) for x in result.returns],
        "curve": [[row["env_steps"], round(row["return/mean"], 2)] for row in metrics[::every]],
    }


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
