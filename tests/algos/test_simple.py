"""SimPLe: collects, trains the model, trains the policy in it, and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import pywm
from pywm.algos import ppo, simple
from pywm.algos.simple import Adafactor, Agent, Config, Learner
from pywm.config import to_json
from pywm.envs import make
from pywm.errors import CheckpointError, UserError
from pywm.models import VideoModel
from pywm.models.simulated_vec_env import SimulatedVecEnv
from pywm.optim import FlatParameters
from pywm.training.checkpoint import load
from pywm.training.run import NullRun, Run, RunOptions

SMALL: dict[str, Any] = {
    "size": "tiny", "done": True, "steps": 90, "steps_per_iteration": 45, "first_model_updates": 3, "model_updates": 2,
    "model_batch_size": 2, "horizon": 2, "frames": 2, "model_optimizer": "adam", "model_lr_warmup": 1,
    "model_warmup": 5, "policy_updates": 2, "agents": 3, "rollout_length": 4, "batch_size": 6, "epochs": 1,
}  # fmt: skip


class Stripes(gymnasium.Env):
    """A stripe that goes where it is told; episodes of 9 steps, every other one is cut. Nothing can be restored."""

    def __init__(self, space: spaces.Space[Any] | None = None) -> None:
        self.observation_space = spaces.Box(0, 255, (16, 18, 3), np.uint8)
        self.action_space = space or spaces.Discrete(2)
        self.episode = 0

    def _obs(self) -> np.ndarray:
        picture = np.zeros((16, 18, 3), np.uint8)
        picture[:, self.at % 18] = 255
        return picture

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode = 0 if seed is not None else self.episode + 1
        self.t, self.at = 0, int(self.np_random.integers(18))
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.at += int(np.sum(action))
        last = self.t == 9
        return self._obs(), 3.0 * last, last and self.episode % 2 == 0, last and self.episode % 2 == 1, {}


def learner_of(env: Any = "pywm/Catch-v0", **config: Any) -> Learner:
    settings = Config(**{**SMALL, **config})
    envs = make(env, settings.num_envs, training=False)
    return Learner(Agent(settings, envs.observation_space, envs.action_space), envs)


# ---- the order of things


def test_model_and_policy_learn_in_turn_and_stay_warm() -> None:
    learner, run = learner_of(), NullRun()
    model, policy = learner.agent.parameters.data, learner.agent.policy.parameters.data
    seen = []
    for i in range(2):
        before = model.clone(), policy.clone()
        learner.collect(run)
        assert torch.equal(model, before[0])
        assert torch.equal(policy, before[1])
        learner.learn_model(run)
        assert not torch.equal(model, before[0])
        assert torch.equal(policy, before[1])
        between = model.clone()
        learner.learn_policy(run)
        assert torch.equal(model, between)
        assert not torch.equal(policy, before[1])
        assert learner.env_steps == 45 * (i + 1)
        seen.append((learner.model_updates, learner.ppo.env_steps, learner.ppo.optimizer.updates))
    assert seen == [(3, 2 * 12, 2 * 2), (5, 4 * 12, 4 * 2)]
    assert learner.simulation.model is learner.agent.model
    assert learner.iteration == 2


def test_rollouts_have_exactly_their_length_and_the_policy_sees_beyond_it() -> None:
    learner, run = learner_of(done=False), NullRun()
    learner.collect(run)
    learner.ppo.start_episodes(simple._Simulation(0))
    batch = learner.ppo.collect(run)
    assert batch.num_rows == 3 * 4
    assert learner.ppo.rollout.truncated[-1].all()
    assert not learner.ppo.rollout.truncated[:-1].any()
    assert not learner.ppo.rollout.terminated.any()
    final = learner.ppo.rollout.final_obs()
    assert final is not None
    assert final.row.tolist() == [9, 10, 11]


def test_the_data_are_the_environments() -> None:
    learner = learner_of(env=Stripes, steps=60, steps_per_iteration=30)
    for i in range(2):
        learner.collect(NullRun())
        learner.iteration = i + 1
    c = learner.replay._columns
    count = learner.replay.num_rows
    # Three episodes of 9 steps and 3 steps of a fourth, twice, each with its last frame.
    assert count == 2 * (3 * 10 + 4)
    frames = c["frame"][:count, 0, 0, 0].argmax(-1)
    moved = np.diff(frames) % 18
    goes_on = ~c["is_last"][:count, 0][:-1]
    taken = c["action"][:count, 0].argmax(-1)[:-1]
    assert (moved == taken)[goes_on].all()
    assert c["reward"][:count, 0].sum() == 2 * 3 * 3.0
    assert c["terminated"][:count, 0].sum() == 2 * 2
    assert c["is_first"][:count, 0].sum() == c["is_last"][:count, 0].sum() == 2 * 4
    window = simple._window(learner.replay.sample(64, 2, np.random.default_rng(0)), torch.device("cpu"))
    assert set(window.reward.unique().tolist()) == {1, 2}  # 3 counts as 1, which is class 2


def test_several_environments_fill_one_replay() -> None:
    learner = learner_of(num_envs=3)
    learner.collect(NullRun())
    assert learner.env_steps == 45
    assert learner.replay.num_transitions == 45


def test_a_stack_repeats_the_first_frame_and_then_moves() -> None:
    agent = learner_of(env=Stripes).agent
    frames = np.random.default_rng(0).integers(0, 255, (3, 2, 3, 16, 18), np.uint8)
    _, carry = agent.act(frames[0])
    assert np.array_equal(carry.frames, np.concatenate([frames[0], frames[0]], 1))
    _, carry = agent.act(frames[1], carry, is_first=np.array([False, True]))
    assert np.array_equal(carry.frames[0], np.concatenate([frames[0, 0], frames[1, 0]]))
    assert np.array_equal(carry.frames[1], np.concatenate([frames[1, 1], frames[1, 1]]))
    assert carry.action.shape == (2, 2)


def test_a_temperature_sharpens_the_policy() -> None:
    agent = learner_of().agent
    with torch.no_grad():
        agent.policy.policy.actor.layers[-1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
        agent.policy.policy.actor.layers[-1].weight.zero_()
    obs = np.zeros((4000, 1, 24, 24), np.uint8)
    share = {t: float((agent.act(obs, temperature=t)[0] == 1).mean()) for t in (0.0, 0.5, 1.0)}
    assert share[0.0] == 1
    assert share[0.5] == pytest.approx(np.exp(2) / (np.exp(2) + 2), abs=0.03)
    assert share[1.0] == pytest.approx(np.e / (np.e + 2), abs=0.03)
    greedy = float((agent.act(obs, greedy=True)[0] == 1).mean())
    assert greedy == pytest.approx(share[0.5], abs=0.03)


def test_schedules_are_the_papers_and_the_released_codes() -> None:
    paper, t2t = Config(), Config(schedule="t2t")
    assert paper.iterations == 15
    assert [paper.model_updates_after(i) for i in (0, 1, 14)] == [45_000, 60_000, 45_000 + 14 * 15_000]
    assert [t2t.model_updates_after(i) for i in (0, 1, 2, 14)] == [
        45_000,
        90_000,
        105_000,
        5 * 45_000 + 10 * 15_000,
    ]
    assert {paper.policy_updates_of(i) for i in range(15)} == {1000}
    assert sum(t2t.policy_updates_of(i) for i in range(15)) == 20_000


def test_presets_are_configurations_and_the_defaults_are_the_papers() -> None:
    for preset in simple.PRESETS.values():
        Config(**preset.config)
    plain = Config()
    assert (plain.discount, plain.reading, plain.pixels, plain.schedule) == (
        0.95,
        "stacked",
        "softmax",
        "paper",
    )
    assert simple._video_config(Config(), (3, 105, 80), 6).cutoff == 0.03
    assert simple._video_config(Config(pixels="l2"), (3, 105, 80), 6).cutoff == 10
    assert simple.PRESETS["simple-tiny"].suits("pywm/Catch-v0")
    assert simple.PRESETS["simple-small"].suits("ALE/Freeway-v5")


@pytest.mark.parametrize(
    "change",
    [
        {"model": "deterministic", "input_noise": 0.05},
        {"reading": "recurrent"},
        {"pixels": "l2"},
        {"model_optimizer": "adafactor"},
        {"checkpoint_activations": True},
        {"schedule": "t2t"},
        {"done": False},
        {"precision": "bfloat16"},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_switch_trains(change: dict[str, Any]) -> None:
    agent = simple.train(Config(**{**SMALL, **change, "steps": 45}), "pywm/Catch-v0")
    assert bool(agent.parameters.data.isfinite().all())


@pytest.mark.parametrize(
    "space", [spaces.MultiDiscrete([2, 2]), spaces.Box(0, 1, (1,), np.float32)], ids=["choices", "numbers"]
)
def test_other_actions_train(space: Any) -> None:
    agent = simple.train(Config(**{**SMALL, "steps": 45}), lambda: Stripes(space))
    assert bool(agent.parameters.data.isfinite().all())


def test_adafactor_learns_and_comes_back() -> None:
    def make_one() -> tuple[torch.nn.Linear, Adafactor]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, Adafactor(FlatParameters(layer), lr=0.1, max_grad_norm=1.0, warmup=5)

    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    layer, optimizer = make_one()

    def step(layer: torch.nn.Linear, optimizer: Adafactor) -> float:
        loss = (layer(x) - x[:, :2]).square().mean()
        optimizer.parameters.backward(loss)
        optimizer.step()
        return loss.item()

    losses = [step(layer, optimizer) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    other, second = make_one()
    second.load_tensors({name: value.clone() for name, value in optimizer.tensors().items()})
    second.parameters.data.copy_(optimizer.parameters.data)
    second.updates = optimizer.updates
    assert [step(layer, optimizer) for _ in range(3)] == [step(other, second) for _ in range(3)]


# ---- what it says and refuses


def test_memory_and_time_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pywm")
    simple.train(Config(**{**SMALL, "steps": 45}), "pywm/Catch-v0")
    [said] = [text for text in caplog.messages if "the sd model has" in text]
    assert "an update takes about" in said
    assert "3 updates and 24 simulated steps are about" in said


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple, "_free_memory", lambda _: 8 * 2**20)
    with pytest.raises(
        UserError, match=r"model_batch_size is 64, horizon is 2, which take 0\.\d\d GiB"
    ) as caught:
        simple.announce(learner_of(model_batch_size=64))
    assert "logits of a frame" in str(caught.value)
    assert "--checkpoint-activations" in str(caught.value)


def test_recomputing_takes_less_memory() -> None:
    needs = []
    for saves in (False, True):
        text = simple.announce(learner_of(horizon=8, checkpoint_activations=saves, model_batch_size=16))
        needs.append(float(text.split("an update takes about ")[1].split(" GiB")[0]))
    assert needs[1] < 0.4 * needs[0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", "huge", "size is 'huge', but expected one of 'paper'"),
        ("steps", 0, "steps is 0, but at least 1 was expected"),
        ("discount", 1.5, r"discount is 1.5, but a number in \[0, 1\] was expected"),
        ("cutoff", -1.0, "cutoff is -1.0, but a number from 0 on or None was expected"),
        ("image_size", (8, 64), r"image_size is \(8, 64\), but sides of at least 16 or None was expected"),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**{field: value})


def test_what_it_cannot_see_is_named() -> None:
    with pytest.raises(UserError, match="but one picture was expected"):
        simple.train(Config(**SMALL), "CartPole-v1")
    with pytest.raises(
        UserError, match=r"image_size is \(64, 64\), but None was expected: only Atari's games"
    ):
        simple.train(Config(**{**SMALL, "image_size": (64, 64)}), "pywm/Catch-v0")
    agent = learner_of().agent
    with pytest.raises(ValueError, match=r"obs has shape \(1, 24, 24\), but \(N, 1, 24, 24\) was expected"):
        agent.act(np.zeros((1, 24, 24), np.uint8))
    _, carry = agent.act(np.zeros((1, 1, 24, 24), np.uint8))
    with pytest.raises(ValueError, match="state is of 1 environments, but 2 were expected"):
        agent.act(np.zeros((2, 1, 24, 24), np.uint8), carry)


# ---- figures


def test_figures_of_a_perfect_model_are_perfect() -> None:
    learner = learner_of()
    envs = make("pywm/Catch-v0", 4, training=False)
    figures = simple.model_figures(learner.agent, envs)
    assert set(figures) == {
        "model/frame_error_1", "model/frame_error_5", "model/frame_error_15", "model/exact_frames",
        "model/reward_accuracy", "model/reward_recall",
    }  # fmt: skip
    found = simple.dream(learner.agent, envs, steps=21, context=2, seed=3)
    perfect = found._replace(prediction=found.truth, predicted_reward=found.reward)
    assert simple._figures(perfect)["model/exact_frames"] == 1
    assert simple._figures(perfect)["model/reward_recall"] == 1
    assert simple._figures(perfect)["model/frame_error_15"] == 0
    blind = found._replace(prediction=found.truth, predicted_reward=0 * found.reward)
    assert simple._figures(blind)["model/reward_recall"] == 0
    assert 0.9 < simple._figures(blind)["model/reward_accuracy"] < 1


def test_open_loop_shows_the_truth_while_it_looks() -> None:
    learner = learner_of()
    envs = make("pywm/Catch-v0", 2, training=False)
    found = simple.dream(learner.agent, envs, steps=6, context=3, seed=0)
    obs = {"obs": (found.truth["obs"] * 255).round().astype(np.uint8)}
    actions = torch.eye(3)[torch.ones(len(obs["obs"]), 2, dtype=torch.long)]
    first = np.zeros(actions.shape[:2], bool)
    far = learner.agent.open_loop(obs, actions, first, 3, seed=1)
    changed = {"obs": obs["obs"].copy()}
    changed["obs"][3:] = 7
    assert torch.equal(far.obs["obs"], learner.agent.open_loop(changed, actions, first, 3, seed=1).obs["obs"])
    changed["obs"][2] = 7
    assert not torch.equal(
        far.obs["obs"], learner.agent.open_loop(changed, actions, first, 3, seed=1).obs["obs"]
    )


def test_returns_at_all_temperatures_are_raw_and_clipped() -> None:
    class Rich(Stripes):
        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            return obs, 5.0 if reward else 0.0, *rest

    learner = learner_of(env=Rich)
    found = simple.evaluate_temperatures(learner.agent, make(Rich, 2, training=False), episodes=3)
    assert found == {
        f"eval/{kind}_t{t}": value
        for t in ("0", "0.5", "1")
        for kind, value in (("return", 5.0), ("clipped", 1.0))
    }


# ---- the run


def _train(env: Any, folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> None:
    config = Config(**{**SMALL, **(settings or {})})
    with Run.open(
        RunOptions(**{"run_dir": str(folder), "progress": "off", **options}),
        algo="simple",
        env=str(env) if isinstance(env, str) else env.__name__,
        seed=config.seed,
        config=to_json(config),
        total_steps=config.steps,
    ) as run:
        simple.train(config, env, run=run)


def _hash(folder: Path) -> str:
    loaded = load(folder / "checkpoints")
    data = {name: value for name, value in loaded.state.data.items() if name != "run"}
    digest = hashlib.sha256(json.dumps([loaded.step, data], sort_keys=True).encode())
    for name, tensor in sorted(loaded.state.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("pywm/Catch-v0", {}),
        (Stripes, {"model_optimizer": "adafactor", "num_envs": 2, "reading": "recurrent"}),
    ],
    ids=["restorable", "not restorable"],
)
def test_resume_is_exact(env: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    _train(env, tmp_path / "whole", settings, eval_every=45, eval_episodes=1)
    _train(env, tmp_path / "parts", settings, stop_at=90)
    assert load(tmp_path / "parts" / "checkpoints").state.data["learner"]["iteration"] == 1
    _train(env, tmp_path / "parts", settings, resume=True)
    assert _hash(tmp_path / "parts") == _hash(tmp_path / "whole")


@pytest.mark.parametrize("phase", ["model", "policy"])
def test_a_stop_in_the_middle_of_an_iteration_loses_nothing(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train("pywm/Catch-v0", tmp_path / "whole")
    method = {"model": "update_model", "policy": "_save_now_and_then"}[phase]
    calls = []
    real = getattr(Learner, method)

    def counted(self: Learner, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == {"model": 2, "policy": 4}[phase]:
            run.stop()
        return real(self, *arguments)

    config = Config(**SMALL)
    options = RunOptions(run_dir=str(tmp_path / "parts"), progress="off")
    run = Run.open(
        options, algo="simple", env="pywm/Catch-v0", seed=0, config=to_json(config), total_steps=config.steps
    )
    with monkeypatch.context() as patch, run:
        patch.setattr(Learner, method, counted)
        simple.train(config, "pywm/Catch-v0", run=run)
    learner = load(tmp_path / "parts" / "checkpoints").state.data["learner"]
    assert (learner["env_steps"], learner["model_updates"], learner["policy_updates"]) == (
        45, {"model": 2, "policy": 3}[phase], {"model": 0, "policy": 1}[phase],
    )  # fmt: skip
    _train("pywm/Catch-v0", tmp_path / "parts", resume=True)
    assert _hash(tmp_path / "parts") == _hash(tmp_path / "whole")


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    settings = {"steps": 45 * 40}
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "parts"), json.dumps(settings)],
        # As many threads as the run that it is compared with has here: sums depend on it.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        },
    )
    root, deadline = tmp_path / "parts" / "checkpoints", time.monotonic() + 120
    while not (root / "step_00000090").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = load(root).step
    assert 90 <= step < 45 * 40
    stop = {"stop_at": step + 45}
    _train("pywm/Catch-v0", tmp_path / "parts", settings, resume=True, **stop)
    _train("pywm/Catch-v0", tmp_path / "whole", settings, **stop)
    assert _hash(tmp_path / "parts") == _hash(tmp_path / "whole")


def test_a_run_is_loaded_and_its_model_is_an_environment(tmp_path: Path) -> None:
    _train("pywm/Catch-v0", tmp_path, {"steps": 45})
    agent, envs = pywm.load(tmp_path)
    action, _ = agent.act(envs.reset(seed=0), None)
    assert action.shape == (1,)
    assert isinstance(agent.model, VideoModel)
    simulated = SimulatedVecEnv.from_run(tmp_path, 4, length=6)
    obs, _ = simulated.reset(seed=0)
    assert obs.shape == (4, 2, 24, 24)
    trained = ppo.train(ppo.Config(steps=48, num_envs=4, num_steps=6, batch_size=12), simulated)
    assert trained.policy is not None


def test_a_checkpoint_without_frames_cannot_be_resumed(tmp_path: Path) -> None:
    _train("pywm/Catch-v0", tmp_path)
    root = tmp_path / "checkpoints"
    newest = root / "step_00000090"
    newest.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="holds no frames, which only a run's newest checkpoint keeps"):
        _train("pywm/Catch-v0", tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="holds no frames to start from"):
        SimulatedVecEnv.from_run(tmp_path, 2)


@pytest.mark.parametrize("env", ["ALE/Freeway-v5", "ALE/Pong-v5"])
def test_atari_runs_from_end_to_end(env: str) -> None:
    pytest.importorskip("ale_py")
    settings = {**SMALL, "image_size": (32, 32), "grey": True, "steps": 24, "steps_per_iteration": 24}
    agent = simple.train(Config(**settings), env)
    assert agent.frame == (1, 32, 32)
    agent = simple.train(Config(**{**settings, "grey": False, "first_model_updates": 1}), env)
    assert agent.frame == (3, 32, 32)


if __name__ == "__main__":
    _train("pywm/Catch-v0", Path(sys.argv[1]), json.loads(sys.argv[2]))
