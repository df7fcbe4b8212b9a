"""Whole trainings side by side: pywm's PPO, stable-baselines3, and a loop in the style of CleanRL.

    python benchmarks/train.py                                  # CartPole-v1 at rl-zoo's settings
    python benchmarks/train.py --task pong --steps 20000        # ALE/Pong-v5, the Nature network
    python benchmarks/train.py --threads 1 2 --repeats 5 --json benchmarks/results/train.json
    python benchmarks/train.py --apart                          # what each fused call brings

The last table takes pywm apart: each line replaces one more fused call by the usual PyTorch code.

Needs an environment in which pywm is installed and compiled, and for the rival ``pip install stable-baselines3``; without
that one it is left out.

Each run is a process of its own; rivals take turns, so that a busy machine is busy for all of them. Steps per second cover
the training alone, not imports. All sides have the same network, environments, rollouts, minibatches and epochs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Task:
    """Settings that all rivals share."""

    env: str
    steps: int
    num_envs: int
    num_steps: int
    batch_size: int
    epochs: int
    discount: float
    lam: float
    lr: float
    clip: float
    anneal_clip: bool
    entropy_coef: float
    value_coef: float
    """Of half the mean squared error."""


TASKS = {
    "cartpole": Task("CartPole-v1", 100_000, 8, 32, 256, 20, 0.98, 0.8, 1e-3, 0.2, True, 0.0, 1.0),
    "pong": Task("ALE/Pong-v5", 20_480, 8, 128, 256, 4, 0.99, 0.95, 2.5e-4, 0.1, False, 0.01, 0.5),
}


def run_pywm(task: Task, seed: int, *replaced: str) -> tuple[float, float]:
    """Train with ``pywm.algos.ppo``; return seconds and the last return.

    ``replaced`` names calls that are replaced by plain PyTorch: ``"layers"``, ``"loss"``, ``"optimizer"``.
    """
    for name in replaced:
        PLAIN[name]()
    from pywm.algos import ppo
    from pywm.training.run import NullRun

    class Last(NullRun):
        score = float("nan")

        def log_due(self, env_steps: int) -> bool:
            return True

        def log(self, metrics: Any, *, env_steps: int) -> None:
            self.score = metrics.get("return/mean", self.score)

    shared = {k: v for k, v in vars(task).items() if k != "env"}
    run = Last()
    start = time.perf_counter()
    ppo.train(ppo.Config(seed=seed, **shared), task.env, run=run)
    return time.perf_counter() - start, run.score


def _plain_layers() -> None:
    import torch

    from pywm.nn import MLP

    def forward(self: Any, x: Any) -> Any:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)

    MLP.forward = forward  # type: ignore[method-assign]


def _plain_loss() -> None:
    import torch

    from pywm.algos import ppo
    from pywm.ops import PPOLoss, PPOStats

    def loss(
        dist: Any, action: Any, old: Any, advantage: Any, value: Any, returns: Any, **settings: Any
    ) -> Any:
        clip = settings["clip"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        log_ratio = dist.log_prob(action) - old
        ratio = log_ratio.exp()
        policy = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
        value_loss = 0.5 * (value - returns).square().mean()
        entropy = dist.entropy().mean()
        total = policy + settings["value_coef"] * value_loss - settings["entropy_coef"] * entropy
        with torch.no_grad():
            clipped, kl = ((ratio - 1).abs() > clip).float().mean(), (ratio - 1 - log_ratio).mean()
        return PPOLoss(total, PPOStats(policy.detach(), value_loss.detach(), entropy.detach(), clipped, kl))

    ppo.ppo_loss = loss  # type: ignore[assignment]


def _plain_optimizer() -> None:
    import torch

    from pywm.optim import Adam

    def step(self: Any, lr: float) -> Any:
        parameters = list(self.parameters.views.values())
        if self.updates == 0:
            self.inner = torch.optim.Adam(parameters, eps=1e-5)
        self.updates += 1
        self.inner.param_groups[0]["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.inner.step()
        return norm

    Adam.step = step  # type: ignore[method-assign]


PLAIN = {"layers": _plain_layers, "loss": _plain_loss, "optimizer": _plain_optimizer}


def run_sb3(task: Task, seed: int) -> tuple[float, float]:
    """Train with stable-baselines3."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    def falling(start: float) -> Callable[[float], float]:
        return lambda left: left * start

    start = time.perf_counter()
    if task.env.startswith("ALE/"):
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        env = make_atari_env(task.env, task.num_envs, seed=seed, env_kwargs={"frameskip": 1})
        env, policy = VecFrameStack(env, 4), "CnnPolicy"
    else:
        env, policy = make_vec_env(task.env, task.num_envs, seed=seed), "MlpPolicy"
    model = PPO(
        policy,
        env,
        learning_rate=falling(task.lr),
        n_steps=task.num_steps,
        batch_size=task.batch_size,
        n_epochs=task.epochs,
        gamma=task.discount,
        gae_lambda=task.lam,
        clip_range=falling(task.clip) if task.anneal_clip else task.clip,
        ent_coef=task.entropy_coef,
        vf_coef=task.value_coef / 2,
        seed=seed,
        device="cpu",
    )
    model.learn(task.steps)
    seconds = time.perf_counter() - start
    return seconds, float(np.mean([info["r"] for info in model.ep_info_buffer or [{"r": np.nan}]]))


def run_loop(task: Task, seed: int) -> tuple[float, float]:
    """Train with a plain loop as single-file implementations have it: one script, no library but torch."""
    import gymnasium
    import torch
    from gymnasium.vector import AutoresetMode
    from torch import nn

    torch.manual_seed(seed)
    start = time.perf_counter()
    atari = task.env.startswith("ALE/")
    if atari:
        import ale_py

        gymnasium.register_envs(ale_py)
        envs = gymnasium.make_vec(
            task.env, task.num_envs, vectorization_mode="vector_entry_point",
            autoreset_mode=AutoresetMode.SAME_STEP,
        )  # fmt: skip
    else:
        envs = gymnasium.make_vec(
            task.env, task.num_envs, vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        )  # fmt: skip
    actions = int(envs.single_action_space.n)

    def layer(module: Any, gain: float = 2**0.5) -> Any:
        nn.init.orthogonal_(module.weight, gain)
        nn.init.zeros_(module.bias)
        return module

    def mlp(out: int, gain: float) -> nn.Module:
        size = int(np.prod(envs.single_observation_space.shape))
        return nn.Sequential(
            layer(nn.Linear(size, 64)),
            nn.Tanh(),
            layer(nn.Linear(64, 64)),
            nn.Tanh(),
            layer(nn.Linear(64, out), gain),
        )

    if atari:
        body: nn.Module = nn.Sequential(
            layer(nn.Conv2d(4, 32, 8, 4)), nn.ReLU(), layer(nn.Conv2d(32, 64, 4, 2)), nn.ReLU(),
            layer(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(), nn.Flatten(), layer(nn.Linear(3136, 512)), nn.ReLU(),
        )  # fmt: skip
        actor, critic = layer(nn.Linear(512, actions), 0.01), layer(nn.Linear(512, 1), 1.0)
    else:
        body, actor, critic = nn.Identity(), mlp(actions, 0.01), mlp(1, 1.0)
    network = nn.ModuleList([body, actor, critic])
    optimizer = torch.optim.Adam(network.parameters(), lr=task.lr, eps=1e-5)

    T, N = task.num_steps, task.num_envs
    shape = envs.single_observation_space.shape
    obs = torch.zeros((T, N, *shape))
    action, log_prob, reward, done, value = (torch.zeros(T, N) for _ in range(5))

    def forward(x: Any) -> tuple[Any, Any]:
        hidden = body(x / 255.0) if atari else body(x)
        return torch.distributions.Categorical(logits=actor(hidden)), critic(hidden).flatten()

    next_obs, next_done = torch.Tensor(envs.reset(seed=seed)[0]), torch.zeros(N)
    returns, finished = np.zeros(N), [float("nan")]
    iterations = task.steps // (T * N)
    for iteration in range(iterations):
        left = 1 - iteration / iterations
        optimizer.param_groups[0]["lr"] = left * task.lr
        clip = task.clip * left if task.anneal_clip else task.clip
        for t in range(T):
            obs[t], done[t] = next_obs, next_done
            with torch.no_grad():
                dist, value[t] = forward(next_obs)
                action[t] = dist.sample()
                log_prob[t] = dist.log_prob(action[t])
            raw, r, terminated, truncated, _ = envs.step(action[t].long().numpy())
            reward[t] = torch.as_tensor(r)
            ended = np.logical_or(terminated, truncated)
            returns += r
            finished += returns[ended].tolist()
            returns[ended] = 0
            next_obs, next_done = torch.Tensor(raw), torch.Tensor(ended)
        with torch.no_grad():
            next_value = forward(next_obs)[1]
            advantage, carry = torch.zeros_like(reward), torch.zeros(N)
            for t in reversed(range(T)):
                alive = 1 - (next_done if t == T - 1 else done[t + 1])
                following = next_value if t == T - 1 else value[t + 1]
                delta = reward[t] + task.discount * following * alive - value[t]
                advantage[t] = carry = delta + task.discount * task.lam * alive * carry
            target = advantage + value
        rows = [x.reshape(T * N, *x.shape[2:]) for x in (obs, action, log_prob, advantage, target)]
        for _ in range(task.epochs):
            order = np.random.permutation(T * N)
            for first in range(0, T * N, task.batch_size):
                o, a, lp, adv, ret = (x[order[first : first + task.batch_size]] for x in rows)
                dist, new_value = forward(o)
                ratio = (dist.log_prob(a) - lp).exp()
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                policy_loss = torch.max(-adv * ratio, -adv * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
                value_loss = 0.5 * (new_value - ret).square().mean()
                loss = policy_loss + task.value_coef * value_loss - task.entropy_coef * dist.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 0.5)
                optimizer.step()
    return time.perf_counter() - start, float(np.mean(finished[-20:]))


RIVALS = {"pywm": run_pywm, "stable-baselines3": run_sb3, "loop in CleanRL's style": run_loop}
NEEDS = {"stable-baselines3": "stable-baselines3"}
# Replaced one after the other, so that the gain of each is measured with the others' help gone.
APART = {
    "pywm, PyTorch layers": ("layers",),
    "and PyTorch loss": ("layers", "loss"),
    "and PyTorch optimiser": ("layers", "loss", "optimizer"),
}


@dataclass(frozen=True)
class Options:
    """Compare whole PPO trainings."""

    task: Literal["cartpole", "pong"] = "cartpole"
    """What to train on."""
    steps: int | None = None
    """Environment steps, in place of the task's."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of torch threads to try."""
    repeats: int = 3
    """Runs of each; the median counts."""
    rivals: tuple[str, ...] = tuple(RIVALS)
    """Whom to compare."""
    apart: bool = False
    """Compare pywm with itself, its fused calls replaced one after the other, instead."""
    json: str | None = None
    """Write the figures here, too."""


def measure(rival: str, task: Task, threads: int, seed: int) -> tuple[float, float]:
    """Run one training in a process of its own; return steps per second and the last return."""
    job = json.dumps([rival, vars(task), threads, seed])
    # Its path is that of this process: the pywm that is timed is the one whose kernels were looked for.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", __file__, "--job", job]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, score = json.loads(out.splitlines()[-1])
    return task.steps / seconds, score


def work(job: str) -> None:
    rival, task, threads, seed = json.loads(job)
    import torch

    torch.set_num_threads(threads)
    if rival in APART:
        result = run_pywm(Task(**task), seed, *APART[rival])
    else:
        result = RIVALS[rival](Task(**task), seed)
    print(json.dumps(result))


def main(options: Options) -> None:
    from pywm.ops import _native
    from pywm.training import machine

    if not _native.has_backend("cpu"):
        raise SystemExit(
            f"train.py: pywm has no compiled kernels, but they are what is timed: {_native.why_not}"
        )
    task = TASKS[options.task]
    if options.steps is not None:
        task = Task(**{**vars(task), "steps": options.steps})
    rivals = ("pywm", *APART) if options.apart else options.rivals
    for rival, package in NEEDS.items():
        if rival in rivals and machine.version(package) is None:
            print(f"{rival}: left out, {package} is not installed (pip install {package})")
            rivals = tuple(r for r in rivals if r != rival)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for repeat in range(options.repeats):
        for threads in options.threads:
            for rival in rivals:
                found.setdefault((rival, threads), []).append(measure(rival, task, threads, repeat))
                speed = found[rival, threads][-1][0]
                print(f"{rival}, {threads} threads, seed {repeat}: {speed:.0f} steps/s", flush=True)
    print(f"\nPPO on {task.env}: {task.steps} steps, {task.num_envs} x {task.num_steps}, {task.epochs} epochs of "
          f"{task.batch_size} rows; medians of {options.repeats}, interleaved")  # fmt: skip
    print(f"{'':26} {'threads':>7} {'steps/s':>9} {'range':>15} {'pywm is':>9} {'last return':>12}")
    ours = {
        threads: statistics.median(s for s, _ in runs)
        for (rival, threads), runs in found.items()
        if rival == "pywm"
    }
    rows = []
    for (rival, threads), runs in found.items():
        speeds, scores = [s for s, _ in runs], [score for _, score in runs]
        median = statistics.median(speeds)
        rows.append({"rival": rival, "threads": threads, "steps_per_second": speeds, "returns": scores})
        ratio = f"{ours[threads] / median:.2f}x" if rival != "pywm" and threads in ours else ""
        span = f"{min(speeds):.0f}-{max(speeds):.0f}"
        print(f"{rival:26} {threads:>7} {median:>9.0f} {span:>15} {ratio:>9} {np.mean(scores):>12.1f}")
    if options.json:
        versions = {"stable-baselines3": machine.version("stable-baselines3")}
        result = {"task": vars(task), "machine": {**machine.facts(), **versions}, "runs": rows}
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        work(sys.argv[2])
    else:
        import tyro

        main(tyro.cli(Options))
