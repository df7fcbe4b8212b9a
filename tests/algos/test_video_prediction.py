"""Video prediction: what it collects and learns, what it says, and that a resumed run equals an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import pywm
from pywm.algos import ppo, video_prediction
from pywm.algos.video_prediction import Agent, Config, Learner
from pywm.config import to_json
from pywm.envs import make
from pywm.errors import CheckpointError, UserError
from pywm.training.checkpoint import load
from pywm.training.dream import dream
from pywm.training.log import read_metrics
from pywm.training.run import NullRun, Run, RunOptions

GRID = "pywm/GridChase-v0"
SMALL: dict[str, Any] = {
    "steps": 160,
    "test_steps": 160,
    "num_envs": 8,
    "curriculum": ((1, 1e-3, 4, 6), (3, 5e-4, 2, 4)),
    "eval_horizon": 6,
    "eval_rollouts": 4,
    "show_steps": (1, 5),
}


class Lamp(gymnasium.Env):
    """A lamp of 32 x 32 pixels that the action switches; it cannot be restored, and every twelfth step is cut."""

    def __init__(self, action: Any = None) -> None:
        self.observation_space = spaces.Box(0, 255, (32, 32, 1), np.uint8)
        self.action_space = action or spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.light = 0, int(self.np_random.integers(2))
        return self._obs(), {}

    def _obs(self) -> np.ndarray:
        return np.full((32, 32, 1), 60 + 120 * self.light, np.uint8)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t, self.light = self.t + 1, int(np.ravel(action)[0] > 0)
        return self._obs(), 0.0, False, self.t == 12, {}


def learner_of(env: Any = GRID, **config: Any) -> Learner:
    """A learner that has collected, and not learnt."""
    settings = Config(**{**SMALL, **config})
    envs = make(env, settings.num_envs, seed=settings.seed, env_kwargs=settings.env_kwargs)
    learner = Learner(Agent(settings, envs.observation_space, envs.action_space), envs)
    learner.start_episodes(NullRun())
    while learner.collecting:
        learner.play(NullRun())
    return learner


def test_presets_are_configurations_and_suit_their_environments() -> None:
    for preset in video_prediction.PRESETS.values():
        Config(**preset.config)
    assert video_prediction.PRESETS["gridchase"].suits(GRID)
    assert video_prediction.PRESETS["atari"].suits("ALE/Freeway-v5")


def test_it_collects_what_it_sees_and_the_actions_that_lead_on() -> None:
    learner = learner_of(Lamp)
    frames, action = learner.pictures.gather(learner.pictures.windows(2))
    assert frames.shape[2:] == (1, 32, 32)
    assert torch.equal((frames[1, :, 0, 0, 0] > 100), action[0, :, 1] > 0)
    assert 0.3 < float(action[..., 1].mean()) < 0.7
    assert torch.equal(learner.agent.model.mean, learner.pictures.mean())
    assert 0.3 < float(learner.agent.model.mean.mean()) < 0.6
    pair = [store.gather(store.windows(1))[0] for store in (learner.pictures, learner.test)]
    assert [len(x[0]) for x in pair] == [160, 160]


def test_test_pictures_are_of_other_episodes() -> None:
    learner = learner_of()
    train, test = (store.gather(store.windows(5))[0] for store in (learner.pictures, learner.test))
    seen = {train[:, b].numpy().tobytes() for b in range(train.shape[1])}
    fresh = [test[:, b].numpy().tobytes() not in seen for b in range(test.shape[1])]
    assert np.mean(fresh) > 0.9


def test_it_learns_what_the_action_does() -> None:
    curriculum = ((1, 1e-3, 8, 60), (3, 1e-3, 8, 20))
    config = Config(**{**SMALL, "curriculum": curriculum, "blind_baseline": True, "eval_horizon": 4})
    envs = make(Lamp, config.num_envs)
    learner = Learner(Agent(config, envs.observation_space, envs.action_space), envs)
    run = NullRun()
    learner.start_episodes(run)
    while not learner.curriculum.finished:
        (learner.play if learner.collecting else learner.learn)(run)
    found = learner.evaluate(run)
    assert found["eval/model_1"] < 0.1 * found["eval/blind_1"]
    assert found["eval/model_1"] < 0.1 * found["eval/copy_1"]
    assert found["eval/model_1"] < 0.1 * found["eval/permuted_1"]
    # Who knows no action can only say the mean: half the lamps are 120 off.
    assert found["eval/blind_1"] == pytest.approx(32 * 32 * (60 / 255) ** 2, rel=0.3)


@pytest.mark.parametrize(
    "space", [spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,), np.float32), spaces.MultiBinary(2)]
)
def test_it_takes_every_kind_of_action(space: Any) -> None:
    agent = video_prediction.train(Config(**SMALL), lambda: Lamp(space))
    assert bool(agent.parameters.data.isfinite().all())


def test_the_recurrent_model_trains() -> None:
    curriculum = ((1, 1e-3, 2, 2), (3, 1e-3, 2, 2))
    config = Config(**{**SMALL, "steps": 320, "test_steps": 320, "recurrent": True, "curriculum": curriculum})
    agent = video_prediction.train(config, GRID)
    assert agent.model.context == 11
    before = Agent(config, *_spaces(GRID)).parameters.data
    assert not torch.equal(agent.parameters.data, before)


def _spaces(env: Any) -> tuple[Any, Any]:
    envs = make(env, 1)
    return envs.observation_space, envs.action_space


def test_a_given_agent_collects(tmp_path: Path) -> None:
    folder = str(tmp_path / "ppo")
    config = ppo.Config(steps=64, num_envs=2, num_steps=16, batch_size=32, epochs=1)
    with Run.open(
        RunOptions(run_dir=folder, progress="off"),
        algo="ppo",
        env=GRID,
        seed=0,
        config=to_json(config),
        total_steps=64,
    ) as run:
        ppo.train(config, GRID, run=run)
    learner = learner_of(agent=folder, epsilon=0.0)
    other = learner_of()
    a, b = (x.pictures.state().tensors["action"] for x in (learner, other))
    assert a.shape == b.shape
    assert not torch.equal(a, b)
    assert bool((a.sum(-1) == 1).all())
    with pytest.raises(UserError, match=r"which sees .* were expected"):
        learner_of(Lamp, agent=folder)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        learner_of(agent=str(tmp_path / "nothing"))
    settings = {**SMALL, "agent": folder}
    _train(GRID, tmp_path / "whole", settings=settings)
    _train(GRID, tmp_path / "parts", settings=settings, stop_at=80)
    _train(GRID, tmp_path / "parts", settings=settings, resume=True)
    assert _hash(tmp_path / "parts") == _hash(tmp_path / "whole")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps is 0, but at least 1 was expected"),
        ("epsilon", 1.5, r"epsilon is 1.5, but a number in \[0, 1\] was expected"),
        ("curriculum", (), "phases is empty"),
        ("curriculum", ((0, 1e-3, 4, 6),), r"horizon of phases\[0\] is 0"),
        ("advance", "never", "advance is 'never', but expected one of 'updates', 'plateau'"),
        ("show_steps", (0,), r"show_steps is \(0,\), but numbers from 1 on was expected"),
        ("rgb", True, "rgb is True, but False without image_size was expected"),
        ("eval_rollouts", 1, "eval_rollouts is 1, but at least 2 was expected"),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**{field: value})


@pytest.mark.parametrize(
    ("env", "config", "message"),
    [
        ("CartPole-v1", {}, "the environment shows 0 pictures"),
        ("pywm/Match-v0", {}, "the environment shows 0 pictures"),
        (GRID, {"image_size": (32, 32)}, "only Atari's games have one"),
        (GRID, {"test_steps": 16}, "eval_horizon is 6, but the 16 test pictures hold 0 rollouts"),
        (GRID, {"steps": 16}, "no episode of the 16 pictures has 7 in a row"),
    ],
)
def test_an_environment_that_does_not_suit_is_refused(env: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        video_prediction.train(Config(**{**SMALL, **config}), env)


def test_atari_comes_in_single_pictures_and_last_frames_of_stacks() -> None:
    pytest.importorskip("ale_py")
    settings: dict[str, Any] = {"steps": 24, "test_steps": 24, "num_envs": 2}
    learner = learner_of("ALE/Freeway-v5", image_size=(64, 64), rgb=True, **settings)
    assert learner.agent.shape == (3, 64, 64)
    learner = learner_of("ALE/Freeway-v5", **settings)
    assert learner.agent.shape == (1, 84, 84)
    frames, _ = learner.pictures.gather(learner.pictures.windows(1))
    assert (frames.shape[2:], int(frames.max()) > 50) == ((1, 84, 84), True)
    obs = learner.envs.obs
    assert np.array_equal(learner.agent.frames(obs), obs[:, -1:])  # type: ignore[call-overload]


# ---- looking -------------------------------------------------------------------------------------------------------------


def test_a_dream_is_the_models_prediction() -> None:
    learner = learner_of()
    agent, envs = learner.agent, make(GRID, 2)
    found = dream(agent, envs, steps=5, context=6)
    frames = torch.from_numpy(found.truth["obs"]).mul(255).round().to(torch.uint8)
    assert found.prediction["obs"].shape == found.truth["obs"].shape == (11, 2, 3, 32, 32)
    assert np.array_equal(found.prediction["obs"][:4], found.truth["obs"][:4])
    action = torch.zeros(10, 2, 4)  # of no effect on the frames seen
    single = agent.model.predict(frames[:4], action[:4])
    assert not np.array_equal(found.prediction["obs"][4], found.truth["obs"][4])
    assert single.shape == (1, 2, 3, 32, 32)
    assert np.isnan(found.predicted_reward).all()
    with pytest.raises(
        UserError, match="context is 3, but expected 4 or more, the frames that the model looks at"
    ):
        dream(agent, make(GRID, 2), steps=5, context=3)


def test_the_dream_of_stacks_shows_stacks() -> None:
    pytest.importorskip("ale_py")
    learner = learner_of("ALE/Freeway-v5", steps=24, test_steps=24, num_envs=2)
    T, frames = 8, learner.pictures.gather(learner.pictures.windows(8))[0][:, :2]
    back = (torch.arange(T)[:, None] - torch.tensor([3, 2, 1, 0])).clamp(min=0)
    stacks = frames[back].transpose(1, 2).flatten(2, 3)  # [T, B, 4, 84, 84]
    action = torch.zeros(T, 2, learner.agent.actions.width)
    found = learner.agent.open_loop({"obs": stacks.numpy()}, action, np.zeros((T, 2), bool), 5)
    shown = found.obs["obs"]
    assert shown.shape == stacks.shape
    assert torch.equal(shown[7, :, 0], shown[4, :, 3])
    assert torch.equal(shown[3], stacks[3] / 255)


# ---- the run -------------------------------------------------------------------------------------------------------------


def _train(env: Any, folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> None:
    config = Config(**(settings or SMALL))
    torch.manual_seed(0)
    np.random.seed(0)
    with Run.open(
        RunOptions(**{"run_dir": str(folder), "progress": "off", "checkpoint_every": 80, **options}),
        algo="video_prediction",
        env=str(env),
        seed=config.seed,
        config=to_json(config),
        total_steps=config.total_steps,
        may_change=Config.may_change,
    ) as run:
        video_prediction.train(config, env, run=run)


def _hash(folder: Path) -> str:
    loaded = load(folder / "checkpoints")
    digest = hashlib.sha256(json.dumps([loaded.step, loaded.state.data], sort_keys=True).encode())
    for name, tensor in sorted(loaded.state.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("stop", [80, 240, 400], ids=["collecting", "collecting to test", "learning"])
@pytest.mark.parametrize("env", [GRID, Lamp], ids=["restored", "episodes cut"])
def test_resume_is_exact(env: Any, stop: int, tmp_path: Path) -> None:
    curriculum = ((1, 1e-3, 2, 70), (3, 5e-4, 2, 14))
    settings = {**SMALL, "blind_baseline": True, **({"curriculum": curriculum} if stop == 400 else {})}
    _train(env, tmp_path / "whole", settings)
    _train(env, tmp_path / "parts", settings, stop_at=stop)
    assert load(tmp_path / "parts" / "checkpoints").step == stop
    _train(env, tmp_path / "parts", settings, resume=True)
    assert _hash(tmp_path / "parts") == _hash(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is_and_goes_on_with_more_phases(tmp_path: Path) -> None:
    _train(GRID, tmp_path)
    before = _hash(tmp_path)
    rows = len(read_metrics(tmp_path / "metrics.jsonl"))
    _train(GRID, tmp_path, resume=True)
    assert _hash(tmp_path) == before
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == rows
    longer = {**SMALL, "curriculum": (*SMALL["curriculum"], (5, 1e-4, 2, 3))}
    _train(GRID, tmp_path, longer, resume=True)
    whole = tmp_path / "whole"
    _train(GRID, whole, longer)
    agents = [
        load(folder / "checkpoints").state.tensors["agent/model.factor_out.weight"]
        for folder in (tmp_path, whole)
    ]
    assert torch.equal(*agents)
    assert load(tmp_path / "checkpoints").state.data["learner"]["updates"] == 13


def test_it_writes_what_it_foresees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    caplog.set_level(logging.INFO, logger="pywm")
    settings = {**SMALL, "show_steps": (1, 5, 12, 151), "blind_baseline": True}
    _train(GRID, tmp_path, settings)
    assert sorted(path.name for path in (tmp_path / "prediction").iterdir()) == [
        "errors.json",
        "errors.png",
        "rollout.png",
    ]
    found = json.loads((tmp_path / "prediction" / "errors.json").read_text())
    assert (found["updates"], found["rollouts"]) == (10, 4)
    assert {name: len(x) for name, x in found["squared_error"].items()} == dict.fromkeys(
        ["model", "action-blind model", "copy of the last frame", "model, permuted actions"], 6
    )
    assert "no test episode is long enough to show step 151" in caplog.text
    assert "6 updates: on with 3 steps ahead, learning rate 0.0005, batches of 2" in caplog.text
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["eval/model_5"] == pytest.approx(found["squared_error"]["model"][4])
    assert {"eval/copy_1", "eval/permuted_5", "eval/blind_1"} <= last.keys()


def test_a_loaded_agent_acts_and_foresees(tmp_path: Path) -> None:
    _train(GRID, tmp_path)
    agent, envs = pywm.load(tmp_path, num_envs=3)
    obs, state = envs.reset(seed=0), None
    seen = []
    for _ in range(4):
        action, state = agent.act(obs, state, greedy=True)
        seen.append(torch.from_numpy(obs))
        obs = envs.step(action).obs
    assert state is not None
    out = agent.model.predict(torch.stack(seen), torch.zeros(5, 3, 4))
    assert out.shape == (2, 3, 3, 32, 32)
    assert float(agent.model.mean.max()) > 0.5
    with pytest.raises(ValueError, match=r"obs has shape \(3, 32, 32\), but \(N, 3, 32, 32\) was expected"):
        agent.act(obs[0])
    envs.close()


def test_an_older_checkpoint_collects_again_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SMALL, "curriculum": ((1, 1e-3, 2, 170),)}
    _train(GRID, tmp_path, settings)
    root = tmp_path / "checkpoints"
    for step in (480, 490):
        shutil.rmtree(root / f"step_{step:08d}")
    caplog.set_level(logging.WARNING, logger="pywm")
    old = load(root)
    assert (old.step, old.dropped) == (400, ("replay",))
    _train(GRID, tmp_path, settings, resume=True)
    assert f"{root / 'step_00000400'}: holds no pictures" in caplog.text
    again = load(root)
    assert (again.step, again.state.data["learner"]["updates"]) == (490, 170)
    assert again.state.tensors["replay/train.frames"].shape[:2] == (20, 8)
    mean = [x.state.tensors["agent/model.mean"] for x in (old, again)]
    assert torch.equal(*mean)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    _train(GRID, tmp_path)
    learner = learner_of(num_envs=4)
    run = NullRun()
    run.resumed = load(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"does not fit: Frames\.load_state"):
        learner.resume(run)
    run.resumed = run.resumed._replace(state=run.resumed.state._replace(tensors={}, data={}))
    with pytest.raises(CheckpointError, match="holds no agent, learner and pictures"):
        learner.resume(run)
