"""DreamerV3: the update is the paper's, the learner keeps its ratio, and a resumed run equals an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import pywm
from pywm.algos import dreamer_v3
from pywm.algos.dreamer_v3 import Agent, Config, Learner
from pywm.config import to_json
from pywm.envs import make
from pywm.errors import CheckpointError, NumericalError, UserError
from pywm.ops import _native, _operands, symexp_twohot_loss, symexp_twohot_mean
from pywm.training.checkpoint import list_checkpoints, load
from pywm.training.run import NullRun, Run, RunOptions

SMALL: dict[str, Any] = {
    "size": "tiny",
    "batch_size": 2,
    "batch_length": 5,
    "imagine_horizon": 3,
    "learning_starts": 20,
    "train_ratio": 2.0,
    "replay_size": 2000,
    "lr": 1e-3,
    "warmup": 3,
}


class Spaces(gymnasium.Env):
    """Random observations of any space; every seventh step ends in a terminal state, every eleventh is cut."""

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        return self.observation_space.sample(), 1.0, self.t % 7 == 0, self.t >= 11, {}


VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
PICTURE = spaces.Box(0, 255, (20, 24, 3), np.uint8)
SPACES = {
    "vector, discrete": (VECTOR, spaces.Discrete(3)),
    "picture, several choices": (PICTURE, spaces.MultiDiscrete([2, 3])),
    "dict, box": (
        spaces.Dict(a=PICTURE, b=VECTOR, c=spaces.Discrete(4), d=spaces.Box(0, 255, (20, 24, 1), np.uint8)),
        spaces.Box(-2, 3, (2,), np.float32),
    ),
    "index": (spaces.Discrete(5, start=2), spaces.Discrete(2)),
    "bits and choices": (
        spaces.Dict(a=spaces.MultiBinary((2, 2)), b=spaces.MultiDiscrete([2, 3]), c=VECTOR),
        spaces.Discrete(2),
    ),
    "dict with a number, discrete": (
        spaces.Dict(a=VECTOR, t=spaces.Box(0, 9, (), np.float64)),
        spaces.Discrete(3),
    ),
    "number, bits": (spaces.Box(-1, 1, (), np.float32), spaces.MultiBinary(3)),
    "vector, box without bounds": (VECTOR, spaces.Box(-np.inf, np.inf, (2,), np.float32)),
}


def learner_of(env: Any = "CartPole-v1", steps: int = 60, **config: Any) -> Learner:
    """A learner that has played, and not learnt."""
    settings = Config(**{**SMALL, **config})
    envs = make(env, settings.num_envs, seed=settings.seed)
    learner = Learner(Agent(settings, envs.observation_space, envs.action_space), envs)
    run = NullRun()
    learner.start_episodes(run)
    for _ in range(steps):
        learner.play(run)
    return learner


@pytest.mark.parametrize("name", SPACES)
def test_it_trains_on_every_kind_of_space(name: str) -> None:
    observation, action = SPACES[name]
    config = Config(**{**SMALL, "steps": 60, "num_envs": 2, "train_ratio": 1.0})
    agent = dreamer_v3.train(config, lambda: Spaces(observation, action))
    before = Agent(config, *_spaces(observation, action)).parameters.data
    assert not torch.equal(agent.parameters.data, before)
    assert bool(agent.parameters.data.isfinite().all())


def _spaces(observation: Any, action: Any) -> tuple[Any, Any]:
    envs = make(lambda: Spaces(observation, action), 1)
    return envs.observation_space, envs.action_space


def test_the_actions_of_a_box_cover_it() -> None:
    space = dreamer_v3.ActionSpace(
        spaces.Box(np.array([-2, -np.inf], np.float32), np.array([4, np.inf], np.float32))
    )
    action = space.to_env(torch.tensor([[-1.0, 7.0], [1.0, -7.0], [0.0, 0.5], [3.0, 0.0]]))
    assert action.tolist() == [[-2, 7], [4, -7], [1, 0.5], [4, 0]]
    assert action.dtype == np.float32


# ---- the update ----------------------------------------------------------------------------------------------------------


def test_the_update_is_the_papers() -> None:
    """Losses, written out again a row at a time from section 5 of the paper's description."""
    learner = learner_of(env=lambda: Spaces(VECTOR, spaces.Discrete(3)), train_ratio=4.0)
    learner.learn(NullRun())  # so that no head is zero
    agent, config = learner.agent, learner.config
    batch = learner.replay.sample(config.batch_size)
    model, T, B, H = (
        agent.networks.world_model,
        config.batch_length,
        config.batch_size,
        config.imagine_horizon,
    )
    scale = learner._scale.value.clone()
    seed, offset = learner._model_seed, learner.updates * (T + H)
    before = agent.parameters.data.clone()

    with torch.no_grad(), _native.disabled():
        start = dreamer_v3.RSSMState(batch.latents["deter"], batch.latents["stoch"])
        seen = model.observe(batch.obs, batch.prev_action, batch.is_first, start, seed=seed, offset=offset)
        states = dreamer_v3.RSSMState(seen.deter.flatten(0, 1), seen.index.flatten(0, 1))
        dream = model.rssm.imagine(agent.networks.policy(), states, H, seed=seed, offset=offset + T)
        feat = dream.feat
        reward, proceed = model.outcome(feat)
        value = symexp_twohot_mean(agent.networks.critic(feat))
        slow = symexp_twohot_mean(agent.slow_critic.module(feat))
        returns = torch.empty(H, T * B)
        for n in range(T * B):
            last = value[H, n]
            for i in reversed(range(H)):
                last = reward[i + 1, n] + proceed[i + 1, n] * (
                    (1 - config.lam) * value[i + 1, n] + config.lam * last
                )
                returns[i, n] = last
        low, high = (float(np.quantile(returns.numpy(), q)) for q in (0.05, 0.95))
        low, high = (0.99 * float(old) + 0.01 * new for old, new in zip(scale, (low, high), strict=True))
        width = max(1.0, high - low)
        outputs = agent.networks.actor(feat)
        actor, critic = 0.0, 0.0
        for n in range(T * B):
            weight = 1.0
            for i in range(H):
                weight *= float(proceed[i, n])
                log_p = outputs[i, n].log_softmax(-1)
                chosen = log_p[dream.action[i, n].argmax()]
                entropy = -(log_p.exp() * log_p).sum()
                advantage = (returns[i, n] - value[i, n]) / width
                actor -= weight * float(chosen * advantage + 3e-4 * entropy)
                logits = agent.networks.critic(feat[i, n])
                loss = symexp_twohot_loss(logits, returns[i, n]) + symexp_twohot_loss(logits, slow[i, n])
                critic += weight * float(loss)

        rows = torch.cat([seen.deter, seen.stoch.flatten(2)], -1)
        replayed = 0.0
        for b in range(B):
            last = returns[0, (T - 1) * B + b]
            for t in reversed(range(T - 1)):
                boot = returns[0, (t + 1) * B + b]
                lam = config.lam * (1 - float(batch.is_last[t + 1, b]))
                goes_on = (1 - 1 / 333) * (1 - float(batch.terminated[t + 1, b]))
                last = batch.reward[t + 1, b] + goes_on * ((1 - lam) * boot + lam * last)
                logits = agent.networks.critic(rows[t, b])
                target = symexp_twohot_mean(agent.slow_critic.module(rows[t, b]))
                loss = symexp_twohot_loss(logits, last) + symexp_twohot_loss(logits, target)
                replayed += (1 - float(batch.is_last[t, b])) * float(loss)

        predicted = model.decode(rows)["obs"]
        target = batch.obs["obs"].sign() * (1 + batch.obs["obs"].abs()).log()
        error = ((predicted - target) ** 2).sum(-1).mean()
        kl = (_mixed(seen.posterior) * (_mixed(seen.posterior) / _mixed(seen.prior)).log()).sum((-1, -2))
        goes_on = (1 - batch.terminated.float()) * (1 - 1 / 333)
        p = torch.sigmoid(model.proceed(rows)).squeeze(-1)
        bce = -(goes_on * p.log() + (1 - goes_on) * (1 - p).log()).mean()
        expected = {
            "loss/actor": actor / (H * T * B),
            "loss/critic": critic / (H * T * B),
            "loss/replay_value": replayed / ((T - 1) * B),
            "loss/obs": float(error),
            "loss/kl": float(kl.clamp(min=1).mean()),
            "loss/proceed": float(bce),
            "loss/reward": float(symexp_twohot_loss(model.reward(rows), batch.reward).mean()),
            "return_scale": width,
        }

    stats = learner.update(batch)
    for name, want in expected.items():
        assert float(stats[name]) == pytest.approx(want, rel=2e-3, abs=1e-5), name
    assert not torch.equal(agent.parameters.data, before)
    # What the model makes of the rows now is what the next windows begin with.
    again = learner.replay._gather(batch.handles._replace(start=batch.handles.start + 1))
    assert torch.allclose(again.latents["deter"], seen.deter[0], atol=1e-5)


def _mixed(logits: Tensor) -> Tensor:
    return 0.99 * logits.softmax(-1) + 0.01 / logits.shape[-1]


def test_kernels_and_reference_learn_alike() -> None:
    learner, other = (
        learner_of(env=lambda: Spaces(PICTURE, spaces.Box(-1, 1, (2,), np.float32))) for _ in range(2)
    )
    for i in range(3):
        batch = learner.replay.sample(2)
        stats = learner.update(batch)
        with _native.disabled():
            want = other.update(other.replay.sample(2))
        for name, x in stats.items():
            assert float(x) == pytest.approx(float(want[name]), rel=1e-2, abs=1e-4), (i, name)


def test_the_critic_starts_at_zero_and_the_first_update_changes_nothing() -> None:
    learner = learner_of()
    before = learner.agent.parameters.data.clone()
    stats = learner.update(learner.replay.sample(2))
    assert torch.equal(learner.agent.parameters.data, before)  # the warm-up begins at 0
    assert float(stats["imagined/value"]) == 0
    assert float(stats["loss/reward"]) == pytest.approx(math.log(255), rel=1e-4)
    learner.update(learner.replay.sample(2))
    assert not torch.equal(learner.agent.parameters.data, before)


class Clock(gymnasium.Env):
    """Shows the hour, one of five, which goes on whatever is done."""

    observation_space, action_space = spaces.Discrete(5), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.hour = int(self.np_random.integers(5))
        return self.hour, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.hour = (self.hour + 1) % 5
        return self.hour, 0.0, False, False, {}


def test_it_learns_to_tell_the_hour_from_a_discrete_observation() -> None:
    learner = learner_of(env=Clock, steps=80, batch_size=8, batch_length=8)
    model = learner.agent.networks.world_model
    assert model.choices == {"obs": (5,)}
    first = float(learner.update(learner.replay.sample(8))["loss/obs"])
    assert first == pytest.approx(math.log(5), abs=0.6)
    for _ in range(150):
        last = learner.update(learner.replay.sample(8))
    assert float(last["loss/obs"]) < 0.05
    batch = learner.replay.sample(8)
    seen = learner.agent.open_loop(
        {"obs": batch.obs["obs"].numpy()}, batch.prev_action, batch.is_first.numpy(), 3
    )
    assert float((seen.obs["obs"].argmax(-1) == batch.obs["obs"].argmax(-1)).float()[:3].mean()) > 0.95


# ---- the switches to 2023 ------------------------------------------------------------------------------------------------

SWITCHES: dict[str, dict[str, Any]] = {
    "cell": {"cell": "layernorm_gru"},
    "optimizer": {"optimizer": "adam"},
    "states": {"store_states": False},
    "unimix": {"actor_unimix": 0.01},
    "all": {**dreamer_v3.PRESETS["2023"].config, "size": "tiny", "lr": 1e-3},
}


def test_presets_are_configurations() -> None:
    for preset in dreamer_v3.PRESETS.values():
        Config(**preset.config)
    # Nobody gets the old version who did not ask for it.
    assert not dreamer_v3.PRESETS["2023"].suits("CartPole-v1")


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_learns_something_else(name: str) -> None:
    plain, switched = (learner_of(**config) for config in ({}, SWITCHES[name]))
    for learner in (plain, switched):
        learner.learn(NullRun())
        assert learner.updates >= 5
        assert bool(learner.agent.parameters.data.isfinite().all())
    a, b = plain.agent.parameters.data, switched.agent.parameters.data
    assert a.shape != b.shape or not torch.equal(a, b)


def test_the_cell_of_2023_is_dense_and_has_layer_norms() -> None:
    rssm = learner_of(steps=1, cell="layernorm_gru").agent.networks.world_model.rssm
    params, (D, H) = rssm.params(), (128, 64)
    assert rssm.config.cell == "layernorm_gru"
    assert (rssm.config.norm, rssm.config.eps, rssm.config.prior_layers) == ("layer", 1e-3, 1)
    assert params.gates.weight.shape == (3 * D, H + D)
    assert params.gates.shift is not None
    assert params.posterior[0].shift is not None
    assert len(params.prior) == 2  # a layer and the output


def test_adam_clips_the_norm_of_the_whole_gradient() -> None:
    limit = 1e-3
    learner, free = (learner_of(optimizer="adam", warmup=0, max_grad_norm=norm) for norm in (limit, 1e9))
    batch = learner.replay.sample(2)
    for x in (learner, free):
        stats = x.update(batch)
        assert float(stats["grad_norm"]) > 10 * limit  # before clipping
    clipped, whole = (x.optimizer.exp_avg.norm() / 0.1 for x in (learner, free))
    assert float(clipped) == pytest.approx(limit, rel=1e-3)
    assert float(whole) == pytest.approx(float(stats["grad_norm"]), rel=1e-3)


def test_without_stored_states_windows_begin_with_zeros() -> None:
    learner, stored = learner_of(store_states=False), learner_of()
    assert learner.replay.sample(2).latents == {}
    assert "latents.deter" in stored.replay.state().data["columns"]
    assert "latents.deter" not in learner.replay.state().data["columns"]
    batch = learner.replay.sample(2)
    batch.is_first[0] = False  # or the state before it would not matter
    rows = batch.obs, batch.prev_action, batch.is_first, batch.reward, batch.terminated
    want = learner.agent.networks.world_model.loss(*rows, seed=learner._model_seed, offset=0).stats
    got = learner.update(batch)
    for name in ("loss/obs", "loss/kl", "loss/reward"):
        assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-6), name


# ---- precision -----------------------------------------------------------------------------------------------------------

ROUNDED = {"precision": "bfloat16"}
SIGHTS = spaces.Dict(a=PICTURE, b=VECTOR, c=spaces.Discrete(4))


def _sights() -> gymnasium.Env:
    return Spaces(SIGHTS, spaces.Discrete(3))


def test_a_cpu_without_bfloat16_instructions_says_so_and_stays_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_native, "has_bfloat16_instructions", lambda: False)
    caplog.set_level(logging.WARNING, logger="pywm")
    plain = learner_of(env=_sights)
    assert "precision" not in caplog.text
    learner = learner_of(env=_sights, **ROUNDED)
    assert "precision is bfloat16, but this CPU has no bfloat16 instructions" in caplog.text
    assert "everything stays float32" in caplog.text
    for x in (plain, learner):
        x.learn(NullRun())
        assert x.updates > 3
    assert torch.equal(plain.agent.parameters.data, learner.agent.parameters.data)


def test_bfloat16_rounds_what_is_multiplied_and_keeps_all_else_in_float32() -> None:
    plain = learner_of(env=_sights, warmup=0)
    with _operands.forced():
        learner, reference = (learner_of(env=_sights, warmup=0, **ROUNDED) for _ in range(2))
        assert learner.agent.networks.world_model.rssm.config.operands == "bfloat16"
        batch = learner.replay.sample(2)
        # Acting is the same in all of them: states are of single steps, which round nothing but the heads.
        got = learner.update(batch)
        with _native.disabled():
            want = reference.update(batch)
    exact = plain.update(batch)
    for name, x in got.items():
        assert x.dtype == torch.float32, name
        assert float(x) == pytest.approx(float(exact[name]), rel=0.1, abs=0.05), name
        assert float(x) == pytest.approx(float(want[name]), rel=0.1, abs=0.05), name
    assert any(float(got[name]) != float(exact[name]) for name in ("loss/a", "loss/b", "loss/c"))
    grads = [x.agent.parameters.grad for x in (learner, reference, plain)]
    assert all(g.dtype == torch.float32 for g in grads)
    for other in grads[1:]:
        assert float((grads[0] - other).norm()) < 0.1 * float(other.norm())
    assert learner.agent.parameters.data.dtype == torch.float32
    # Smaller than a step of bfloat16, and not lost: what is trained are float32 weights.
    weights = learner.agent.parameters.data
    assert not torch.equal(weights, weights.to(torch.bfloat16).float())


def test_with_bfloat16_it_learns_to_tell_the_hour() -> None:
    with _operands.forced():
        learner = learner_of(env=Clock, steps=80, batch_size=8, batch_length=8, **ROUNDED)
        for _ in range(150):
            last = learner.update(learner.replay.sample(8))
    assert float(last["loss/obs"]) < 0.1


# ---- acting --------------------------------------------------------------------------------------------------------------


def test_an_agent_forgets_where_an_episode_begins() -> None:
    learner = learner_of()
    agent = learner.agent
    obs = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    _, state = agent.act(obs)
    _, state = agent.act(obs, state)
    seed = agent._generator.get_state()
    _, kept = agent.act(obs, state)
    agent._generator.set_state(seed)
    _, some = agent.act(obs, state, is_first=np.array([True, False, True]))
    agent._generator.set_state(seed)
    _, fresh = agent.act(obs)
    assert torch.equal(some.deter[1], kept.deter[1])
    assert torch.allclose(some.deter[::2], fresh.deter[::2])
    assert not torch.allclose(some.deter[0], kept.deter[0])


@pytest.mark.parametrize("by", ["sample", "mode"])
def test_greedy_samples_unless_it_is_told_otherwise(by: str) -> None:
    agent = learner_of(steps=1, evaluate_by=by).agent
    action, state = agent.act(np.zeros((64, 4), np.float32), greedy=True)
    feat = torch.cat([state.deter, state.stoch.flatten(1)], -1)
    best = agent.networks.actor(feat).argmax(-1).numpy()
    assert (action == best).all() == (by == "mode")


def test_what_an_agent_cannot_act_on_is_named() -> None:
    agent = learner_of(steps=1).agent
    with pytest.raises(ValueError, match=r"obs has shape \(4,\), but \(N, 4\) was expected"):
        agent.act(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"state is of 1 environments, but 2 were expected"):
        agent.act(np.zeros((2, 4), np.float32), agent.initial(1))
    with pytest.raises(ValueError, match=r"is_first is \(3,\), but \(2,\) was expected"):
        agent.act(np.zeros((2, 4), np.float32), is_first=np.zeros(3, bool))
    with pytest.raises(UserError, match="obs is a dict, but one array was expected"):
        agent.act({"obs": np.zeros((2, 4), np.float32)})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bins", 254, "bins is 254, but an odd number from 3 on was expected"),
        ("size", "huge", "size is 'huge', but expected one of 'tiny'"),
        ("train_ratio", 0.0, "train_ratio is 0.0, but a positive number was expected"),
        ("return_low", 0.99, "return_low is 0.99, but less than return_high was expected"),
        ("horizon", 1.0, "horizon is 1.0, but a number above 1 was expected"),
        ("image_size", 8, "image_size is 8, but at least 16 or None was expected"),
        ("batch_length", 1, "batch_length is 1, but at least 2 was expected"),
        ("cell", "gru", "cell is 'gru', but expected one of 'block_gru', 'layernorm_gru'"),
        ("optimizer", "sgd", "optimizer is 'sgd', but expected one of 'laprop', 'adam'"),
        ("max_grad_norm", 0.0, "max_grad_norm is 0.0, but a positive number was expected"),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**{field: value})


# ---- the run -------------------------------------------------------------------------------------------------------------


class Forgetful(Spaces):
    """Without get_state: episodes end at every checkpoint."""

    def __init__(self) -> None:
        super().__init__(VECTOR, spaces.Discrete(2))


def _train(
    env: Any, folder: Path, steps: int = 160, settings: dict[str, Any] | None = None, **options: Any
) -> None:
    config = Config(**{**SMALL, "steps": steps, "num_envs": 2, **(settings or {})})
    torch.manual_seed(0)
    np.random.seed(0)
    with Run.open(
        RunOptions(**{"run_dir": str(folder), "progress": "off", "checkpoint_every": 40, **options}),
        algo="dreamer_v3",
        env=str(env),
        seed=config.seed,
        config=to_json(config),
        total_steps=config.steps,
    ) as run:
        dreamer_v3.train(config, env, run=run)


def _hash(folder: Path) -> str:
    loaded = load(folder / "checkpoints")
    digest = hashlib.sha256(json.dumps([loaded.step, loaded.state.data], sort_keys=True).encode())
    for name, tensor in sorted(loaded.state.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("env", ["CartPole-v1", Forgetful], ids=["restored", "episodes cut"])
def test_resume_is_exact(env: Any, tmp_path: Path) -> None:
    _train(env, tmp_path / "whole")
    _train(env, tmp_path / "parts", stop_at=80)
    assert load(tmp_path / "parts" / "checkpoints").step == 80
    _train(env, tmp_path / "parts", resume=True)
    assert _hash(tmp_path / "parts") == _hash(tmp_path / "whole")


def test_the_variant_of_2023_resumes_exactly(tmp_path: Path) -> None:
    variant = {"settings": SWITCHES["all"]}
    _train("CartPole-v1", tmp_path / "whole", 120, **variant)
    _train("CartPole-v1", tmp_path / "parts", 120, stop_at=80, **variant)
    _train("CartPole-v1", tmp_path / "parts", 120, resume=True, **variant)
    assert _hash(tmp_path / "parts") == _hash(tmp_path / "whole")


def test_an_older_checkpoint_has_no_replay_and_says_what_that_means(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _train("CartPole-v1", tmp_path, steps=80)
    root = tmp_path / "checkpoints"
    assert [(path / "replay.safetensors").exists() for path in list_checkpoints(root)] == [False, True]
    agent, envs = pywm.load(tmp_path, which="step_00000040", env="CartPole-v1")
    envs.close()
    old = load(root, which="step_00000040")
    assert torch.equal(
        agent.parameters.views["critic.out.weight"],
        old.state.tensors["agent/networks.critic.out.weight"],
    )

    shutil.rmtree(root / "step_00000080")
    caplog.set_level(logging.WARNING, logger="pywm")
    _train("CartPole-v1", tmp_path, steps=80, resume=True)
    assert f"{root / 'step_00000040'}: holds no replay" in caplog.text
    assert "learns again when that holds 20 windows" in caplog.text
    again = load(root)
    updates = [x.state.data["learner"]["updates"] for x in (old, again)]
    assert updates[1] > updates[0] > 0
    # The 40 steps since, and the last observation of what episodes ended.
    count = again.state.tensors["replay/count"].tolist()
    assert 40 <= sum(count) < 50
    # What an empty replay takes for the beginning of an episode is one.
    first = again.state.tensors["replay/column.obs.obs"][[0, count[0]]]
    assert float(first.abs().max()) <= 0.05


def test_a_checkpoint_that_lacks_the_replay_is_named(tmp_path: Path) -> None:
    _train("CartPole-v1", tmp_path, steps=40)
    learner = learner_of()
    run = NullRun()
    run.resumed = load(tmp_path / "checkpoints")
    state = run.resumed.state
    kept = {name: x for name, x in state.tensors.items() if not name.startswith("replay")}
    run.resumed = run.resumed._replace(
        state=state._replace(tensors=kept, data={k: v for k, v in state.data.items() if k != "replay"})
    )
    with pytest.raises(CheckpointError, match="holds no agent, learner and replay"):
        learner.resume(run)


def test_the_train_ratio_is_kept_exactly() -> None:
    for ratio in (0.3, 1.0, 2.5):
        learner = learner_of(steps=0, train_ratio=ratio, learning_starts=20)
        for _ in range(90):
            learner.play(NullRun())
            learner.learn(NullRun())
        # Windows of 6 rows: the twentieth is there with row 25.
        counted = learner._learning_steps
        assert 62 <= counted <= 68
        assert learner.updates == int(counted * ratio / 10)


def test_a_reward_that_is_not_finite_stops_the_run() -> None:
    class Poisoned(Forgetful):
        def step(self, action: Any) -> Any:
            obs, reward, *rest = super().step(action)
            return obs, float("nan") if self.t == 5 else reward, *rest

    with pytest.raises(NumericalError, match="'reward' became NaN"):
        dreamer_v3.train(Config(**{**SMALL, "steps": 60}), Poisoned)


def test_atari_comes_in_single_pictures_of_the_asked_size_and_raw_rewards() -> None:
    pytest.importorskip("ale_py")
    config = Config(**{**SMALL, "steps": 24, "num_envs": 2, "image_size": 32, "learning_starts": 1})
    agent = dreamer_v3.train(config, "ALE/Breakout-v5")
    assert agent.networks.world_model.images == {"obs": (1, 32, 32)}
    with pytest.raises(
        UserError, match="image_size is 32, but None was expected: only Atari's games have one"
    ):
        dreamer_v3.train(config, "CartPole-v1")


def test_a_replay_that_cannot_fit_is_refused_before_the_first_step() -> None:
    with pytest.raises(UserError, match="replay_size is 9,000,000,000, which takes"):
        dreamer_v3.train(Config(**{**SMALL, "replay_size": 9_000_000_000}), "CartPole-v1")


def describe(observation: spaces.Space[Any], action: spaces.Space[Any], **settings: Any) -> dict[str, str]:
    return dreamer_v3.describe(Config(**{**SMALL, **settings}), lambda: Spaces(observation, action))


def test_it_says_how_every_key_of_an_observation_enters() -> None:
    observation = spaces.Dict(
        camera=PICTURE,
        arm=spaces.Dict(angle=VECTOR, grip=spaces.Discrete(4)),
        code=spaces.MultiDiscrete([2, 3]),
        bits=spaces.MultiBinary(3),
        time=spaces.Box(0, 9, (), np.int64),
    )
    found = describe(observation, spaces.Discrete(5))
    assert found["obs/camera"] == "picture of 20 x 24 in 3 channels, padded to 32 x 32"
    assert found["obs/arm/angle"] == "vector of 3 numbers (float32), as symlogs"
    assert found["obs/arm/grip"] == "vector of 4 numbers (a one-hot of Discrete(4)), decoded as categoricals"
    assert (
        found["obs/code"]
        == "vector of 5 numbers (one-hots of MultiDiscrete([2, 3])), decoded as categoricals"
    )
    assert found["obs/bits"] == "vector of 3 numbers (bits), decoded as bits"
    assert found["obs/time"] == "vector of 1 number (int64), as symlogs"
    assert describe(spaces.Box(0, 255, (32, 48), np.uint8), spaces.Discrete(2))["obs"] == (
        "picture of 32 x 48 in 1 channel"
    )
    forgotten = describe(spaces.Box(0, 1, (32, 48, 3), np.float32), spaces.Discrete(2))["obs"]
    assert "4608 numbers (float32, flattened: a picture would be uint8" in forgotten


def test_what_it_says_of_networks_and_replay_is_what_training_makes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="pywm")
    found = describe(*SPACES["dict, box"], num_envs=3)
    config = Config(**{**SMALL, "num_envs": 3, "steps": 3})
    agent = dreamer_v3.train(config, lambda: Spaces(*SPACES["dict, box"]))
    assert found["networks"] == f"tiny, {sum(p.numel() for p in agent.networks.parameters()):,} parameters"
    trained = [record.message for record in caplog.records if "rows takes" in record.message]
    assert len(trained) == 1
    # What is free changes from moment to moment.
    assert found["replay"].partition(";")[0] == trained[0].partition(";")[0]


def test_what_training_would_refuse_is_refused() -> None:
    two = spaces.Dict(a=PICTURE, b=spaces.Box(0, 255, (32, 32, 3), np.uint8))
    for act in (
        lambda: describe(two, spaces.Discrete(2)),
        lambda: dreamer_v3.train(Config(**SMALL), lambda: Spaces(two, spaces.Discrete(2))),
    ):
        with pytest.raises(UserError, match=r"pictures of one size were expected"):
            act()
    with pytest.raises(UserError, match="replay_size is 9,000,000,000, which takes"):
        describe(VECTOR, spaces.Discrete(2), replay_size=9_000_000_000)
