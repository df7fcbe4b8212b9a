"""A deterministic stand-in for an algorithm: everything a run needs, nothing that learns."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any, ClassVar

import numpy as np
import torch

from pywm.config import Preset
from pywm.envs import make
from pywm.training.checkpoint import join, part
from pywm.training.run import NullRun, Run, assert_finite
from pywm.types import State

ROWS = 4  # vector steps of an iteration

PRESETS = {
    "cartpole": Preset({"lr": 0.25}, ("CartPole-v1",), "about 20, whatever it does"),
    "slow": Preset({"lr": 0.01}, ("Nothing-v0",), "nothing"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the stand-in."""

    may_change: ClassVar[tuple[str, ...]] = ("steps", "lr", "sleep", "nan_at", "crash_at", "payload_kib")

    seed: int = 0
    """seed of everything"""
    steps: int = 160
    """environment steps"""
    num_envs: int = 2
    lr: float = 0.1
    hidden: int = 8
    """size of the weights"""
    payload_kib: int = 0
    """further bytes in every checkpoint"""
    sleep: float = 0.0
    """seconds an iteration takes"""
    nan_at: int = -1
    """poison the loss at this step"""
    crash_at: int = -1
    """raise an exception at this step"""


class Agent:
    def __init__(self, config: Config, observation_space: Any, action_space: Any, device: str = "cpu"):
        self.weight = torch.randn(config.hidden)
        self.actions = action_space.n

    def act(
        self, obs: Any, state: Any = None, *, is_first: Any = None, greedy: bool = False
    ) -> tuple[np.ndarray, Any]:
        return np.random.randint(
            2, size=len(obs)
        ), None  # draws, so that an evaluation could disturb a training

    def state(self) -> State:
        return State({"weight": self.weight}, {"actions": int(self.actions)})

    def load_state(self, state: State) -> None:
        if state.tensors["weight"].shape != self.weight.shape:
            raise ValueError("weight has another shape")
        self.weight.copy_(state.tensors["weight"])


def train(config: Config, env: Any, *, run: Run | None = None, device: str = "cpu") -> Agent:
    run = run or NullRun()
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    random.seed(config.seed)
    envs = make(env, config.num_envs, seed=config.seed)
    agent = Agent(config, envs.observation_space, envs.action_space, device)
    momentum = torch.zeros(config.hidden)
    payload = torch.zeros(config.payload_kib * 1024, dtype=torch.uint8)
    envs.reset(config.seed)
    env_steps = 0
    if run.resumed is not None:
        parts = {name: part(run.resumed.state, name) for name in ("agent", "optim", "env")}
        agent.load_state(parts["agent"])
        momentum.copy_(parts["optim"].tensors["momentum"])
        envs.set_state(parts["env"])
        env_steps = run.resumed.step
        run.restore_rng()

    def state() -> State:
        optim = State({"momentum": momentum, "payload": payload}, {})
        return join({"agent": agent.state(), "optim": optim, "env": envs.get_state()})

    returns: list[float] = []
    while env_steps < config.steps:
        reward = 0.0
        for _ in range(ROWS):
            with run.phase("env"):
                reward += float(envs.step(np.random.randint(2, size=config.num_envs)).reward.sum())
        env_steps += ROWS * config.num_envs
        with run.phase("learn"):
            momentum.mul_(0.9).add_(torch.randn(config.hidden) * reward * random.random())
            agent.weight.add_(momentum, alpha=config.lr)
            loss = agent.weight.sum()
            if env_steps >= config.nan_at >= 0:
                agent.weight[1] = loss = torch.tensor(float("nan"))
            time.sleep(config.sleep)
        assert_finite({"loss/tiny": loss, "weight": agent.weight}, env_steps=env_steps)
        if env_steps >= config.crash_at >= 0:
            raise KeyError("the tiny algorithm crashed as it was told to")
        returns = [episode.return_ for episode in envs.episodes()]
        metrics = {"loss/tiny": loss, "return/mean": np.mean(returns) if returns else float("nan")}
        run.log(metrics, env_steps=env_steps)
        if run.eval_due(env_steps):
            eval_envs = make(env, 1, training=False, render_mode="rgb_array" if run.options.video else None)
            run.evaluate(agent, eval_envs, env_steps=env_steps)
            eval_envs.close()
        if run.checkpoint_due(env_steps):
            run.save(env_steps, state(), score=metrics["return/mean"])
        if run.stopping:
            break
    run.finish(env_steps, state())
    envs.close()
    return agent
