"""Draw the field's figure: return against real steps of several algorithms on one task, seeds and confidence bands.

    python benchmarks/sample_efficiency.py --env pywm/Catch-v0 --steps 6000 --seeds 3
    pywm bench sample-efficiency --algos simple ppo --steps 6000

Every algorithm trains with the preset that suits the environment, and sees the same number of real steps; the curves are
the returns of its training episodes. Afterwards each seed plays 20 episodes greedily. ``<out>/<env>.png`` and ``.json``.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from pywm import algos
from pywm.config import to_json
from pywm.envs import make
from pywm.training import machine, report
from pywm.training.evaluate import evaluate
from pywm.training.run import Run, RunOptions

EPISODES = 20
# Far from the seeds of training, which start at 0.
EVALUATION_SEED = 1_000_000


@dataclass(frozen=True)
class Options:
    """Train several algorithms on one environment and draw their returns against real steps."""

    env: str = "pywm/Catch-v0"
    """The environment."""
    algos: tuple[str, ...] = ("simple", "dreamer_v3", "ppo")
    """The algorithms."""
    steps: int = 6000
    """Real environment steps for each of them."""
    seeds: int = 3
    """Train with seeds 0, 1, ..."""
    threads: int = 1
    """Threads of torch."""
    out: str = "docs/results/sample_efficiency"
    """Where the JSON and the picture go."""
    runs: str = "runs/sample_efficiency"
    """Where the runs go."""


def main(options: Options) -> int:
    torch.set_num_threads(options.threads)
    stem = options.env.replace("/", "_").replace(":", "_")
    rows, folders = [], []
    for name in options.algos:
        for seed in range(options.seeds):
            folders.append(folder := Path(options.runs) / stem / name / str(seed))
            rows.append(row := train(name, seed, folder, options))
            print(
                f"{name} seed {seed}: {row['return_mean']:.2f} after {row['steps']} real steps, {row['seconds']:.0f} s",
                flush=True,
            )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {"env": options.env, "steps": options.steps, "machine": machine.facts(), "runs": rows}
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(report.plot(folders, out / f"{stem}.png"))
    return 0


def train(name: str, seed: int, folder: Path, options: Options) -> dict[str, Any]:
    """Train one algorithm with one seed in a run of its own, and play greedy episodes with the result."""
    module = algos.get(name)
    chosen = algos.choose_preset(module, options.env)
    settings = {} if chosen is None else dict(chosen[1].config)
    config = replace(module.Config(**settings), steps=options.steps, seed=seed)
    if name == "ppo":
        # Rollouts that leave it at least 30 updates.
        config = replace(
            config, num_steps=min(config.num_steps, max(8, options.steps // config.num_envs // 30))
        )
    run_options = RunOptions(
        run_dir=str(folder), fresh=True, progress="off", checkpoint_every=math.ceil(options.steps / 2)
    )
    with Run.open(
        run_options, algo=name, env=options.env, seed=seed, config=to_json(config), total_steps=options.steps
    ) as run:
        start = time.perf_counter()
        agent = module.train(config, options.env, run=run)
        seconds = time.perf_counter() - start
        if run.interrupted:
            raise SystemExit(130)
    kwargs = getattr(config, "env_kwargs", None)
    envs = make(options.env, EPISODES, training=False, env_kwargs=kwargs)
    result = evaluate(agent, envs, episodes=EPISODES, seed=EVALUATION_SEED + seed)
    envs.close()
    return {
        "algorithm": name,
        "seed": seed,
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "return_mean": result.return_mean,
        "return_std": result.return_std,
        "config": to_json(config),
    }


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
