"""A run that is interrupted and resumed in another process equals one that was not, bit for bit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from pywm.algos import ppo
from pywm.config import to_json
from pywm.envs.toy import Match
from pywm.errors import CheckpointError, NumericalError
from pywm.training.checkpoint import load
from pywm.training.run import Run, RunOptions

STEPS = 1024


class Forgetful(gymnasium.Env):
    """Without get_state, and with episodes longer than a rollout: they end at every checkpoint."""

    observation_space = spaces.Dict(
        {"pos": spaces.Box(-9, 9, (2,), np.float64), "bits": spaces.MultiBinary(2)}
    )
    action_space = spaces.MultiDiscrete([3, 2])

    def _obs(self) -> dict[str, np.ndarray]:
        return {"pos": self.pos.copy(), "bits": (self.pos > 0).astype(np.int8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.pos, self.t = self.np_random.normal(size=2), 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.pos = self.pos + 0.1 * (np.asarray(action) - 1) + 0.05 * self.np_random.normal(size=2)
        self.t += 1
        return self._obs(), float(-abs(self.pos).sum()), bool(abs(self.pos).max() > 4), self.t >= 77, {}


def _train(env: str, config: dict[str, Any], folder: Path, **options: Any) -> None:
    # Minibatches of half a rollout: a single one would need no shuffling.
    settings = ppo.Config(**{"hidden": (16,), "batch_size": 64, **config})
    # The checkpoint holds the global generators, too; these runs do not use them.
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with Run.open(
        RunOptions(**{"run_dir": str(folder), "progress": "off", "checkpoint_every": STEPS // 2, **options}),
        algo="ppo",
        env=env,
        seed=settings.seed,
        config=to_json(settings),
        total_steps=settings.steps,
    ) as run:
        ppo.train(settings, Forgetful if env == "forgetful" else env, run=run)


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "cartpole": ("CartPole-v1", {"num_envs": 4, "num_steps": 32, "lr": 1e-3, "anneal_clip": True}),
    "pendulum": (
        "Pendulum-v1",
        {"num_envs": 2, "num_steps": 64, "normalize_obs": True, "normalize_reward": True},
    ),
    "forgetful": (
        "forgetful",
        {"num_envs": 2, "num_steps": 64, "normalize_obs": True, "normalize_reward": True},
    ),
}


def _start(env: str, config: dict[str, Any], folder: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Train in a process of its own."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps([env, config, str(folder), options])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )


def _hash(folder: Path) -> str:
    """Hash weights, optimiser, normalisers, counters, generators, environments and metrics."""
    loaded = load(folder / "checkpoints")
    digest = hashlib.sha256(json.dumps([loaded.step, loaded.state.data], sort_keys=True).encode())
    for name, tensor in sorted(loaded.state.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = {key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("name", CONFIGS)
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    env, config = CONFIGS[name]
    config = {**config, "steps": STEPS}
    _train(env, config, tmp_path / "whole")
    _train(env, config, tmp_path / "parts", stop_at=STEPS // 2)
    assert load(tmp_path / "parts" / "checkpoints").step == STEPS // 2
    assert _start(env, config, tmp_path / "parts", resume=True).wait(120) == 0
    assert _hash(tmp_path / "parts") == _hash(tmp_path / "whole")


@pytest.mark.parametrize("stop", [STEPS // 2, STEPS // 2 + 256], ids=["at a multiple", "between two"])
def test_when_an_environment_without_state_resumes_exactly(
    stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env, config = CONFIGS["forgetful"]
    config = {**config, "steps": STEPS}
    with caplog.at_level(logging.INFO, "pywm"):
        _train(env, config, tmp_path / "whole")
    [said] = [text for text in caplog.messages if "cannot be restored" in text]
    assert said.startswith(
        "Forgetful cannot be restored: episodes end at each checkpoint (every 512 env steps)"
    )
    assert "equals an uninterrupted one only if it stopped at a multiple of that" in said
    _train(env, config, tmp_path / "parts", stop_at=stop)
    _train(env, config, tmp_path / "parts", resume=True)
    equal = _hash(tmp_path / "parts") == _hash(tmp_path / "whole")
    assert equal == (stop % (STEPS // 2) == 0)


def test_nothing_is_said_about_environments_that_are_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env, config = CONFIGS["cartpole"]
    with caplog.at_level(logging.INFO, "pywm"):
        _train(env, {**config, "steps": 128}, tmp_path)
        ppo.train(
            ppo.Config(steps=64, num_envs=2, num_steps=32, hidden=(8,)), Forgetful
        )  # takes no checkpoints
    assert not [text for text in caplog.messages if "cannot be restored" in text]


def _spoil(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the contents of a checkpoint, and make the manifest agree."""
    data = json.loads((path / "state.json").read_text())
    change(data)
    text = json.dumps(data)
    (path / "state.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest["files"]["state.json"] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "updates missing": (lambda d: d["learner"].pop("updates"), "does not fit: 'updates' is missing"),
    "updates a word": (lambda d: d["learner"].update(updates="x"), "learner.updates is 'x', but a count was"),
    "updates negative": (lambda d: d["learner"].update(updates=-1), "learner.updates is -1, but a count was"),
    "other steps": (
        lambda d: d["learner"].update(env_steps=7),
        "learner.env_steps is 7, but 256 was expected",
    ),
    "recent a word": (lambda d: d["learner"].update(recent="ab"), "does not fit"),
    "recent a number": (lambda d: d["learner"].update(recent=3), "does not fit"),
    "no learner": (lambda d: d.update(learner={}), "does not fit"),
    "no env": (lambda d: d.update(env={}), "does not fit: Envs.set_state"),
    "env's generators": (lambda d: d["env"]["env"].update(rngs=[{}]), "does not fit"),
    "env's resets": (
        lambda d: d["env"].update(resetting=[True]),
        "does not fit: Envs.set_state: resetting has",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_with_other_contents_is_named(name: str, tmp_path: Path) -> None:
    env, config = CONFIGS["cartpole"]
    config = {**config, "steps": 256}
    _train(env, config, tmp_path)
    path = tmp_path / "checkpoints/step_00000256"
    change, message = SPOILED[name]
    _spoil(path, change)
    with pytest.raises(CheckpointError) as caught:
        _train(env, {**config, "steps": 512}, tmp_path, resume=True)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_two_runs_with_one_seed_are_equal_and_two_seeds_are_not(tmp_path: Path) -> None:
    env, config = CONFIGS["cartpole"]
    config = {**config, "steps": STEPS // 2}
    process = _start(env, config, tmp_path / "a")
    _train(env, config, tmp_path / "b")
    _train(env, {**config, "seed": 1}, tmp_path / "c")
    assert process.wait(120) == 0
    assert _hash(tmp_path / "a") == _hash(tmp_path / "b") != _hash(tmp_path / "c")


def test_ctrl_c_saves_and_the_resumed_run_is_exact(tmp_path: Path) -> None:
    env, config = CONFIGS["cartpole"]
    config = {**config, "steps": 40 * STEPS, "epochs": 8}
    process = _start(env, config, tmp_path / "parts", checkpoint_every=10 * STEPS)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") >= 8:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    step = load(tmp_path / "parts" / "checkpoints").step
    assert 8 * 128 <= step < 40 * STEPS

    # An uninterrupted run as far as a little later is long enough to see.
    stop = step + 5 * 128
    _train(env, config, tmp_path / "parts", resume=True, stop_at=stop, checkpoint_every=10 * STEPS)
    _train(env, config, tmp_path / "whole", stop_at=stop, checkpoint_every=10 * STEPS)
    weights = [
        {
            key: x
            for key, x in load(tmp_path / name / "checkpoints").state.tensors.items()
            if key.startswith("agent")
        }
        for name in ("parts", "whole")
    ]
    assert all((x == weights[1][key]).all() for key, x in weights[0].items())


def test_nan_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Poisoned(Match):
        count = 0

        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            Poisoned.count += 1
            return obs, float("nan") if Poisoned.count > 300 else reward, *rest

    config = ppo.Config(steps=1000, num_envs=2, num_steps=16, batch_size=16, hidden=(8,))
    options = RunOptions(run_dir=str(tmp_path), checkpoint_every=64, progress="off")
    run = Run.open(
        options, algo="ppo", env="poisoned", seed=0, config=to_json(config), total_steps=config.steps
    )
    with pytest.raises(NumericalError, match="'reward' became NaN"), run:
        ppo.train(config, Poisoned, run=run)
    loaded = load(tmp_path / "checkpoints")
    assert 0 < loaded.step <= 300
    assert all(bool(x.isfinite().all()) for x in loaded.state.tensors.values() if x.is_floating_point())


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    _train(arguments[0], arguments[1], Path(arguments[2]), **arguments[3])
