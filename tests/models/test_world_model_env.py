"""A world model as an environment: what gymnasium asks of one, and that it is the model that plays it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.utils.passive_env_checker import env_render_passive_checker
from gymnasium.vector.utils import batch_space
from torch.nn import functional

import pywm
from pywm import cli
from pywm.algos import dreamer_v3, ppo
from pywm.envs import Choices, check_env, check_vector_env, make, split_keys
from pywm.envs.spaces import ObsLayout
from pywm.errors import CheckpointError, UserError
from pywm.models import RSSMState, WorldModel, WorldModelEnv, WorldModelVectorEnv
from pywm.models.actions import ActionSpace

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
PICTURE = spaces.Box(0, 255, (20, 24, 3), np.uint8)
MIXED = spaces.Dict(
    {
        "a": PICTURE,
        "b": spaces.Dict({"c": spaces.Discrete(4, start=2), "d": spaces.Box(-0.1, 0.1, (2,), np.float64)}),
        "e": spaces.Box(-1.0, 1.0, (), np.float32),
        "f": spaces.Box(0, 255, (20, 24, 1), np.uint8),
    }
)
SPACES: dict[str, tuple[Any, Any]] = {
    "vector": (VECTOR, spaces.Discrete(3)),
    "picture": (PICTURE, spaces.MultiDiscrete([2, 3])),
    "mixed": (MIXED, spaces.Box(-1.0, 1.0, (2,), np.float32)),
    "numbers": (spaces.MultiDiscrete([2, 3]), spaces.Discrete(2, start=5)),
    "index": (spaces.Discrete(5), spaces.MultiBinary(3)),
}
SIZES = {"deter": 32, "hidden": 16, "classes": 4, "stoch": 4, "units": 16, "depth": 4, "bins": 21}


def model_of(observation: Any, action: Any, goes_on: float | None = 0.95, **options: Any) -> WorldModel:
    """A model that was never trained, whose heads say something all the same; episodes go on with a constant chance."""
    space = ObsLayout(observation).space
    keys, parts = split_keys(space), space.spaces if isinstance(space, spaces.Dict) else {"obs": space}
    g = torch.Generator().manual_seed(0)
    images, vectors = ({key: parts[key].shape for key in kind} for kind in keys)
    width = ActionSpace(action).width
    choices = {key: part.classes for key, part in parts.items() if isinstance(part, Choices)}
    model = WorldModel(
        images, vectors, width, choices=choices, generator=g, **{**SIZES, "horizon": 10.0, **options}
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
        # The outer bins are worth e^20 and more.
        model.reward.out.bias.copy_(-5.0 * (torch.arange(21) - 10).abs())
        if goes_on is not None:
            p = goes_on * model.discount
            model.proceed.out.weight.zero_()
            model.proceed.out.bias.fill_(math.log(p / (1 - p)))
    return model


def starts_of(space: Any, M: int = 6) -> Any:
    batched = batch_space(space, M)
    batched.seed(1)
    return batched.sample()


def arguments(name: str, goes_on: float | None = 0.95, **options: Any) -> tuple[Any, ...]:
    observation, action = SPACES[name]
    return model_of(observation, action, goes_on, **options), observation, action, starts_of(observation)


def actions_of(action: Any, T: int) -> list[Any]:
    action.seed(2)
    return [action.sample() for _ in range(T)]


def row(obs: Any, n: int) -> Any:
    return {key: row(part, n) for key, part in obs.items()} if isinstance(obs, dict) else obs[n]


def assert_close(a: Any, b: Any, atol: float = 1e-5) -> None:
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            assert_close(a[key], b[key], atol)
        return
    # A pixel on the edge may be rounded to the other side.
    np.testing.assert_allclose(a, b, atol=1 if np.asarray(b).dtype == np.uint8 else atol, rtol=0)


# ---- what gymnasium asks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obs", ["decoded", "latent"])
@pytest.mark.parametrize("name", SPACES)
def test_the_checkers_are_content(name: str, obs: Any) -> None:
    has_pictures = name in ("picture", "mixed")
    # A choice that was never trained is often the same one, and six seeds alike are a warning.
    fine = {"ok", "warning"} if name in ("numbers", "index") else {"ok"}
    given = arguments(name)
    mode, steps = ("rgb_array", 25) if has_pictures else (None, 60)
    env = WorldModelEnv(*given, obs=obs, max_episode_steps=9, render_mode=mode)
    gymnasium_check_env(env, skip_render_check=True)
    assert env.metadata["render_modes"] == (["rgb_array"] if has_pictures else [])
    if has_pictures:
        env_render_passive_checker(env)
    report = check_env(lambda: WorldModelEnv(*given, obs=obs, max_episode_steps=9), steps=steps)
    assert [check for check in report.checks if check.status not in fine] == []
    envs = WorldModelVectorEnv(*given, 3, obs=obs, max_episode_steps=9, render_mode=mode)
    report = check_vector_env(envs, steps=steps)
    assert [check for check in report.checks if check.status not in fine] == []


def test_observations_have_the_environments_own_space() -> None:
    for observation, action in SPACES.values():
        given = model_of(observation, action), observation, action, starts_of(observation)
        env, envs = WorldModelEnv(*given), WorldModelVectorEnv(*given, 2)
        assert env.observation_space == envs.single_observation_space == observation
        assert env.action_space == envs.single_action_space == action
    texts = spaces.Dict({"a": VECTOR, "mission": spaces.Text(3)})
    model = model_of(texts, spaces.Discrete(3))
    env = WorldModelEnv(model, texts, spaces.Discrete(3), {"a": np.zeros((1, 3), np.float32)})
    assert env.observation_space == spaces.Dict({"a": VECTOR})
    assert env.reset(seed=0)[0] in env.observation_space


def test_models_are_usable_without_gymnasium() -> None:
    code = "import sys, pywm.models; assert pywm.models.WorldModel; assert 'gymnasium' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})
    with pytest.raises(AttributeError, match=r"module 'pywm.models' has no attribute 'Env'"):
        _ = pywm.models.Env


# ---- it is the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_steps_are_samples_of_the_prior(name: str) -> None:
    """An episode, written out with the model itself and the same random numbers."""
    model, observation, action, starts = given = arguments(name)
    env = WorldModelEnv(*given, termination="never")
    latent = WorldModelEnv(*given, termination="never", obs="latent")
    rng, layout, c = seeding.np_random(7)[0], ObsLayout(observation), model.rssm.config

    def noise() -> torch.Tensor:
        return torch.from_numpy(rng.random((1, c.stoch), np.float32))

    start = layout.convert(row_of_batch(starts, int(rng.integers(6))))
    start = start if isinstance(start, dict) else {"obs": start}
    tensors = {key: torch.from_numpy(x) for key, x in start.items()}
    with torch.no_grad():
        first = torch.tensor([True])
        out = model.rssm.step(
            model.rssm.initial(1),
            torch.ones(1, c.action),
            model.encode(tensors),
            first,
            noise=noise(),
        )
        found, found_latent = env.reset(seed=7)[0], latent.reset(seed=7)[0]
        rewards = []
        for t, taken in enumerate([None, *actions_of(action, 6)]):
            if taken is not None:
                prev = ActionSpace(action).from_env(np.asarray(taken)[None])
                out = model.rssm.step(RSSMState(out.deter, out.stoch), prev, noise=noise())
                rng.random()
                found, reward, terminated, truncated, info = env.step(taken)
                found_latent = latent.step(taken)[0]
                assert (terminated, truncated, info) == (False, False, {})
                expected = model.outcome(torch.cat([out.deter, out.stoch.flatten(1)], -1))[0]
                assert reward == pytest.approx(float(expected), rel=1e-5)
                rewards.append(reward)
            feat = torch.cat([out.deter, out.stoch.flatten(1)], -1)
            np.testing.assert_allclose(found_latent, feat[0], atol=1e-6)
            assert found_latent[c.deter :].reshape(4, 4).sum(-1).tolist() == [1, 1, 1, 1]
            predicted = {key: x.numpy() for key, x in model.predict(feat).obs.items()}
            predicted = {key: 255 * x if key in model.images else x for key, x in predicted.items()}
            assert_close(found, row(layout.invert(predicted), 0))
            assert found in env.observation_space, t
    assert len(set(rewards)) == 6


def row_of_batch(obs: Any, n: int) -> Any:
    return (
        {key: row_of_batch(part, n) for key, part in obs.items()} if isinstance(obs, dict) else obs[n : n + 1]
    )


def test_gaussian_latents_have_no_bounds() -> None:
    given = arguments("vector", classes=0)
    env = WorldModelEnv(*given, obs="latent")
    assert env.observation_space == spaces.Box(
        np.array([-1] * 32 + [-np.inf] * 4, np.float32), np.array([1] * 32 + [np.inf] * 4, np.float32)
    )
    rows = np.stack([env.reset(seed=seed)[0] for seed in range(50)])
    again = np.stack([env.reset(seed=seed)[0] for seed in range(50)])
    assert np.array_equal(rows, again)
    assert (rows[:, 32:].min(0) < 0).all()
    assert env.step(0)[0] in env.observation_space


def test_pictures_are_rounded_and_vectors_clipped() -> None:
    model, _, action, starts = arguments("mixed")
    env = WorldModelEnv(model, MIXED, action, starts)
    latent = WorldModelEnv(model, MIXED, action, starts, obs="latent")
    clipped = 0
    for seed in range(20):
        obs = env.reset(seed=seed)[0]
        predicted = model.predict(torch.from_numpy(latent.reset(seed=seed)[0])[None]).obs
        picture = predicted["a"][0].detach().permute(1, 2, 0).numpy() * 255
        assert obs["a"].dtype == np.uint8
        assert np.abs(obs["a"] - picture).max() <= 0.501
        assert obs["f"].shape == (20, 24, 1)
        speed = predicted["b/d"][0].detach().double().numpy()
        np.testing.assert_allclose(obs["b"]["d"], speed.clip(-0.1, 0.1), atol=1e-6)
        clipped += int((np.abs(speed) > 0.11).any())
        assert obs["b"]["c"] == 2 + int(predicted["b/c"].argmax())
        assert obs["e"] == np.clip(predicted["e"][0].item(), -1, 1).astype(np.float32)
    assert clipped > 3


def test_a_single_environment_is_a_row_of_the_vector() -> None:
    for name in ("vector", "mixed"):
        given = arguments(name, 0.8)
        action, N, T = given[2], 4, 25
        envs = WorldModelVectorEnv(*given, N, max_episode_steps=6)
        singles = [WorldModelEnv(*given, max_episode_steps=6) for _ in range(N)]
        obs, _ = envs.reset(seed=3)
        last = [env.reset(seed=3 + n)[0] for n, env in enumerate(singles)]
        ends = 0
        taken = actions_of(batch_space(action, N), T)
        for t in range(T):
            for n in range(N):
                assert_close(row(obs, n), last[n])
            obs, reward, terminated, truncated, info = envs.step(taken[t])
            for n, env in enumerate(singles):
                last[n], r, stop, cut, _ = env.step(taken[t][n])
                assert r == pytest.approx(reward[n], rel=1e-4, abs=1e-5)
                assert (stop, cut) == (terminated[n], truncated[n])
                if stop or cut:
                    ends += 1
                    assert info["_final_obs"][n]
                    assert_close(info["final_obs"][n], last[n])
                    last[n] = env.reset()[0]
        assert ends > 10


def test_seeds_are_the_only_source_of_chance() -> None:
    given = arguments("vector", 0.9)

    def play(seed: Any, disturb: int) -> list[Any]:
        torch.manual_seed(disturb)
        np.random.seed(disturb)
        envs = WorldModelVectorEnv(*given, 3)
        out = [envs.reset(seed=seed)[0]]
        for taken in actions_of(envs.action_space, 20):
            obs, reward, terminated, *_ = envs.step(taken)
            out += [obs, reward, terminated]
        return out

    torch.manual_seed(99)  # a state that no play sets
    before = torch.get_rng_state()
    first, again, listed, other = play(5, 0), play(5, 1), play([5, 6, 7], 2), play(6, 0)
    assert not torch.equal(torch.get_rng_state(), before)  # by manual_seed
    state = torch.get_rng_state()
    play(5, 0)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first, again, listed, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
    assert not np.array_equal(first[0], other[0])
    # Environment 1 of seed 5 is environment 0 of seed 6.
    np.testing.assert_allclose(first[0][1], other[0][0], atol=1e-5)


def test_a_masked_reset_leaves_the_others_alone() -> None:
    given = arguments("vector")
    a, b = (WorldModelVectorEnv(*given, 3, max_episode_steps=4) for _ in range(2))
    a.reset(seed=0), b.reset(seed=0)
    for taken in actions_of(a.action_space, 2):
        a.step(taken), b.step(taken)
    obs, _ = a.reset(seed=[None, 9, None], options={"reset_mask": np.array([False, True, False])})
    assert_close(obs[1], WorldModelEnv(*given).reset(seed=9)[0])
    taken = np.zeros(3, int)
    for step in (3, 4):
        obs_a, _, _, truncated, info = a.step(taken)
        obs_b, *_ = b.step(taken)
        np.testing.assert_allclose(obs_a[[0, 2]], obs_b[[0, 2]], atol=1e-6)
        assert truncated.tolist() == [step == 4, False, step == 4]
    assert [x is None for x in info["final_obs"]] == [False, True, False]


# ---- starts --------------------------------------------------------------------------------------------------------------


def test_episodes_begin_at_every_start() -> None:
    model, observation, action, _ = arguments("vector")
    starts = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    env = WorldModelEnv(model, observation, action, starts, obs="latent")
    # The deterministic state does not know the first observation; what is sampled does.
    seen = {env.reset(seed=seed)[0][32:].tobytes() for seed in range(60)}
    given = [env.reset(seed=seed, options={"start": x})[0] for seed in range(15) for x in starts]
    expected = {x[32:].tobytes() for x in given}
    assert len(seen) > 4
    assert len(expected & seen) > 4


def test_a_start_can_be_given() -> None:
    given = arguments("mixed")
    env, envs = WorldModelEnv(*given), WorldModelVectorEnv(*given, 2)
    batch = starts_of(MIXED, 2)
    found = env.reset(seed=4, options={"start": row(batch, 1)})[0]
    assert_close(row(envs.reset(seed=3, options={"start": batch})[0], 1), found)
    # Nothing is drawn but the sample of the posterior.
    model, observation, action, starts = arguments("vector")
    latent = WorldModelEnv(model, observation, action, starts, obs="latent")
    noise = torch.from_numpy(seeding.np_random(4)[0].random((1, 4), np.float32))
    embed, nothing = model.encode({"obs": torch.from_numpy(starts[2:3])}), torch.zeros(1, 3)
    out = model.rssm.step(model.rssm.initial(1), nothing, embed, noise=noise)
    found = latent.reset(seed=4, options={"start": starts[2]})[0]
    np.testing.assert_allclose(found[32:], out.stoch.detach().flatten(), atol=1e-6)


def test_starts_come_from_a_function() -> None:
    model, observation, action, starts = arguments("vector")
    asked = []

    def start(seed: int) -> np.ndarray:
        asked.append(seed)
        return starts[seed % 6]

    envs = WorldModelVectorEnv(model, observation, action, start, 2, max_episode_steps=1)
    obs, _ = envs.reset(seed=0)
    assert len(asked) == len(set(asked)) == 2
    again, _ = WorldModelVectorEnv(model, observation, action, start, 2).reset(seed=0)
    assert np.array_equal(obs, again)
    assert asked[:2] == asked[2:]
    envs.step(np.zeros(2, int))
    assert len(set(asked)) == 4


# ---- ends ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goes_on", "termination", "share"),
    [
        (0.8, "sample", 0.2),
        (1.0, "sample", 0.0),  # the discount is no reason to end
        (1.05, "sample", 0.0),
        (0.55, "threshold", 0.0),
        (0.45, "threshold", 1.0),
        (0.01, "never", 0.0),
    ],
)
def test_episodes_end_as_the_rule_says(goes_on: float, termination: Any, share: float) -> None:
    given = arguments("vector", goes_on)
    N, T = 50, 40
    envs = WorldModelVectorEnv(*given, N, termination=termination, max_episode_steps=1000)
    envs.reset(seed=0)
    ends = np.stack([envs.step(np.zeros(N, int))[2:4] for _ in range(T)])
    assert not ends[:, 1].any()
    assert ends[:, 0].mean() == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)


def test_episodes_are_cut_at_the_limit() -> None:
    envs = WorldModelVectorEnv(*arguments("vector"), 2, termination="never", max_episode_steps=3)
    envs.reset(seed=0)
    cuts = [envs.step(np.zeros(2, int))[3].tolist() for _ in range(7)]
    assert cuts == [[t % 3 == 2] * 2 for t in range(7)]
    env = WorldModelEnv(*arguments("vector"), termination="never")
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(200)] == [False] * 199 + [True]


def test_the_rule_does_not_change_what_is_imagined() -> None:
    runs = []
    for termination in ("sample", "never"):
        env = WorldModelEnv(*arguments("vector", 0.9), termination=termination)
        rows = [env.reset(seed=8)[0]]
        for _ in range(30):
            obs, _, terminated, *_ = env.step(1)
            rows.append(obs)
            if terminated:
                break
        runs.append(rows)
    assert 2 < len(runs[0]) < 30
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=False))


# ---- pictures ------------------------------------------------------------------------------------------------------------


def test_pictures_stand_side_by_side() -> None:
    given = arguments("mixed")
    env = WorldModelEnv(*given, render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    frame = env.render()
    assert frame is not None
    assert frame.dtype == np.uint8
    assert frame.shape == (20, 48, 3)
    assert_close(frame[:, :24], obs["a"])
    assert_close(frame[:, 24:], obs["f"].repeat(3, -1))
    envs = WorldModelVectorEnv(*given, 2, render_mode="rgb_array", obs="latent")
    envs.reset(seed=0)
    frames = envs.render()
    assert frames is not None
    assert len(frames) == 2
    assert_close(frames[0], frame)
    assert make(envs).render(1) is not None
    assert WorldModelEnv(*given).render() is None
    assert WorldModelVectorEnv(*given, 2).render() is None


# ---- what cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": "pixels"}, "obs is 'pixels', but one of decoded, latent was expected"),
        (
            {"termination": "often"},
            "termination is 'often', but one of sample, threshold, never was expected",
        ),
        ({"max_episode_steps": 0}, "max_episode_steps is 0, but at least 1 was expected"),
        (
            {"render_mode": "rgb_array"},
            "'rgb_array', but None was, for the model predicts no pictures, expected",
        ),
        ({"model": torch.nn.Linear(1, 1)}, "model is a Linear, but a WorldModel was expected"),
        (
            {"observation_space": PICTURE},
            r"observation_space gives \{obs: picture \(3, 20, 24\)\}, but \{obs: vector \(3,\)\}, what the model",
        ),
        (
            {"observation_space": spaces.Dict(x=VECTOR)},
            r"gives \{x: vector \(3,\)\}, but \{obs: vector \(3,\)\}",
        ),
        ({"action_space": spaces.Discrete(4)}, "of width 4, but one of width 3, the model's, was expected"),
        ({"action_space": spaces.Text(4)}, r"space is Text.* but Discrete"),
        ({"starts": None}, r"starts is None, but obs: float32 \[M, 3\] was expected"),
        ({"starts": np.zeros((0, 3), np.float32)}, r"starts is float32 \[0, 3\], but obs: float32 \[M, 3\]"),
        ({"starts": np.zeros(3, np.float32)}, r"starts is float32 \[3\], but"),
        ({"starts": {"x": np.zeros((2, 3), np.float32)}}, r"starts is \{x: float32 \[2, 3\]\}, but"),
        ({"starts": [[1, 2, 3], [4]]}, "starts is a list of uneven parts, but"),
        ({"starts": [["a", "b", "c"]]}, r"starts is <U1 \[1, 3\], but"),
    ],
)
@pytest.mark.parametrize("kind", [WorldModelEnv, WorldModelVectorEnv])
def test_arguments_that_do_not_fit_are_named(kind: Any, changes: dict[str, Any], message: str) -> None:
    names = ("model", "observation_space", "action_space", "starts")
    given = dict(zip(names, arguments("vector"), strict=True)) | changes
    given |= {"num_envs": 2} if kind is WorldModelVectorEnv else {}
    with pytest.raises(UserError, match=message):
        kind(**given)


def test_pictures_as_floats_are_refused() -> None:
    model, observation, action, starts = arguments("picture")
    with pytest.raises(
        UserError, match=r"starts is float32 \[6, 20, 24, 3\], but obs: uint8 \[M, 20, 24, 3\]"
    ):
        WorldModelEnv(model, observation, action, (starts / 255).astype(np.float32))
    with pytest.raises(UserError, match="render_mode is 'human', but 'rgb_array' or None was expected"):
        WorldModelEnv(model, observation, action, starts, render_mode="human")


def test_calls_out_of_turn_are_named() -> None:
    given = arguments("vector", 0.01)
    env, envs = WorldModelEnv(*given), WorldModelVectorEnv(*given, 2)
    with pytest.raises(UserError, match=r"WorldModelEnv.step: no episode is running, but reset\(\) was"):
        env.step(0)
    with pytest.raises(UserError, match=r"WorldModelVectorEnv.step: no episode is running"):
        envs.step(np.zeros(2, int))
    with pytest.raises(
        UserError, match="no episode is running, but a reset of all environments was expected"
    ):
        envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(UserError, match=r"reset_mask is int64 \(2,\), but bool \(2,\) was expected"):
        envs.reset(options={"reset_mask": np.array([1, 0])})
    with pytest.raises(UserError, match="seed has 3 entries, but 2 were expected"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(UserError, match=r"options\['start'\] is float64 \[3, 3\], but obs: float32 \[2, 3\]"):
        envs.reset(options={"start": np.zeros((3, 3))})
    with pytest.raises(UserError, match=r"options\['start'\] is float64 \[1, 4\], but obs: float32 \[1, 3\]"):
        env.reset(options={"start": np.zeros(4)})
    with pytest.raises(UserError, match="num_envs is 0, but at least 1 was expected"):
        WorldModelVectorEnv(*given, 0)
    bad = WorldModelEnv(*given[:3], lambda seed: f"nowhere {seed}")
    with pytest.raises(
        UserError, match=r"what starts returned is <U\d+ \[1\], but obs: float32 \[1, 3\] was exp"
    ):
        bad.reset(seed=0)
    env.reset(seed=0)
    while not env.step(0)[2]:
        pass
    with pytest.raises(UserError, match="no episode is running"):
        env.step(0)


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (3, ValueError, r"action is 3, but an element of Discrete\(3\) was expected"),
        (np.array([0]), ValueError, r"action has shape \(1,\), but \(\) was expected"),
        (None, TypeError, "action has dtype object, but integers were expected"),
        (0.5, TypeError, "action has dtype float64"),
    ],
)
def test_a_bad_action_changes_nothing(action: Any, error: type[Exception], message: str) -> None:
    given = arguments("vector")
    env, other = WorldModelEnv(*given), WorldModelEnv(*given)
    env.reset(seed=0), other.reset(seed=0)
    with pytest.raises(error, match=f"^WorldModelEnv.step: {message}"):
        env.step(action)
    assert np.array_equal(env.step(1)[0], other.step(1)[0])


def test_a_bad_batch_of_actions_is_named() -> None:
    envs = WorldModelVectorEnv(*arguments("vector"), 2)
    envs.reset(seed=0)
    with pytest.raises(
        ValueError, match=r"^WorldModelVectorEnv.step: action 1 of 2 is -1, but an element of"
    ):
        envs.step(np.array([0, -1]))
    with pytest.raises(
        ValueError, match=r"^WorldModelVectorEnv.step: there are 3 actions, but 2 were expected"
    ):
        envs.step(np.zeros(3, int))


# ---- training in it ------------------------------------------------------------------------------------------------------


def test_pywms_ppo_trains_in_it() -> None:
    settings = {"num_steps": 16, "batch_size": 32, "epochs": 2, "hidden": (16,)}
    for name in ("vector", "picture", "numbers"):
        config = ppo.Config(steps=200, **settings)
        agent = ppo.train(config, WorldModelVectorEnv(*arguments(name), 4))
        assert bool(agent.parameters.data.isfinite().all())
        before = ppo.Agent(config, *_converted(name)).parameters.data
        assert not torch.equal(agent.parameters.data, before)


def _converted(name: str) -> tuple[Any, Any]:
    envs = make(WorldModelVectorEnv(*arguments(name), 1))
    return envs.observation_space, envs.action_space


def test_ppo_learns_what_the_model_pays_for() -> None:
    """A model whose reward is the action that was taken: what the agent does in the dream pays there."""
    model, observation, action, starts = arguments("vector", 1.0)
    original = model.rssm.step
    taken: list[torch.Tensor] = []

    def step(state: Any, prev_action: Any, *args: Any, **options: Any) -> Any:
        if not args:  # with an embedding an episode begins
            taken.append(functional.one_hot(prev_action.argmax(-1), 3)[:, 2].float())
        return original(state, prev_action, *args, **options)

    model.rssm.step = step  # type: ignore[method-assign]
    model.outcome = lambda feat: (taken[-1], torch.full((len(feat),), model.discount))  # type: ignore[method-assign]
    envs = WorldModelVectorEnv(model, observation, action, starts, 8, max_episode_steps=8)
    config = ppo.Config(steps=4096, num_steps=32, batch_size=64, epochs=4, lr=3e-3, hidden=(16,))
    ppo.train(config, envs)
    late = torch.cat(taken[-32:]).mean()
    assert late > 0.8


# ---- runs ----------------------------------------------------------------------------------------------------------------

SMALL = {
    "steps": 30,
    "learning-starts": 20,
    "train-ratio": 1,
    "batch-size": 2,
    "batch-length": 5,
    "imagine-horizon": 3,
    "replay-size": 1000,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DreamerV3 that has hardly begun."""
    run = tmp_path_factory.mktemp("runs") / "dreamer"
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", "dreamer_v3", "CartPole-v1", *flags, "--run-dir", str(run)]) == 0
    return run


def test_a_run_becomes_an_environment(trained: Path) -> None:
    env = WorldModelEnv.from_run(trained, num_starts=5, max_episode_steps=4, termination="never")
    real = gymnasium.make("CartPole-v1")
    assert env.observation_space == real.observation_space
    assert env.action_space == real.action_space
    agent, envs = pywm.load(trained)
    for a, b in zip(env.model.parameters(), agent.networks.world_model.parameters(), strict=True):
        assert torch.equal(a, b)
    # Its starts are the beginnings of the real environment's episodes.
    starts = np.concatenate([envs.reset(seed) for seed in range(5)])
    expected = WorldModelEnv(env.model, real.observation_space, real.action_space, starts)
    for seed in range(10):
        assert np.array_equal(env.reset(seed=seed)[0], expected.reset(seed=seed)[0])
    assert [env.step(0)[3] for _ in range(4)] == [False, False, False, True]
    many = WorldModelVectorEnv.from_run(trained, 3, num_starts=5, obs="latent")
    assert many.reset(seed=0)[0].shape == (3, many.model.rssm.config.feat)
    report = check_vector_env(WorldModelVectorEnv.from_run(trained, 2), steps=30)
    assert report.ok, str(report)
    given = WorldModelEnv.from_run(trained, starts=np.zeros((1, 4), np.float32))
    assert given.reset(seed=0)[0].shape == (4,)
    own = WorldModelEnv.from_run(trained, starts=lambda seed: real.reset(seed=seed)[0])
    assert own.reset(seed=0)[0].shape == (4,)


def test_an_agent_plays_in_its_own_dream(trained: Path) -> None:
    agent, _ = pywm.load(trained)
    envs = make(WorldModelVectorEnv.from_run(trained, 3, max_episode_steps=5))
    obs, state = envs.reset(0), None
    is_first = np.ones(3, bool)
    for _ in range(12):
        action, state = agent.act(obs, state, is_first=is_first)
        out = envs.step(action)
        obs, is_first = out.obs, out.terminated | out.truncated
    assert len(envs.episodes()) >= 6


def test_an_environment_that_cannot_be_made_is_named(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "elsewhere"
    shutil.copytree(trained, run)
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**about, "env": "<lambda>"}))
    with pytest.raises(
        UserError, match=r"WorldModelEnv.from_run: env is None, but what makes an environment like"
    ):
        WorldModelEnv.from_run(run)
    env = WorldModelEnv.from_run(run, env=lambda: gymnasium.make("CartPole-v1"))
    assert env.reset(seed=0)[0].shape == (4,)
    with pytest.raises(UserError, match="num_starts is 0, but at least 1 was expected"):
        WorldModelEnv.from_run(run, num_starts=0)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        WorldModelVectorEnv.from_run(tmp_path / "nothing", 2)


def test_a_run_without_a_world_model_is_named(tmp_path: Path) -> None:
    run = str(tmp_path / "ppo")
    assert (
        cli.main(["train", "ppo", "CartPole-v1", "--steps", "64", "--device", "cpu", "--run-dir", run]) == 0
    )
    with pytest.raises(UserError, match="ppo is of an algorithm without a world model"):
        WorldModelEnv.from_run(run)


def test_a_model_goes_on_training_below(trained: Path) -> None:
    """The environment shows the model as it is, not as it was."""
    agent, envs = pywm.load(trained)
    assert isinstance(agent, dreamer_v3.Agent)
    real = envs.env
    env = WorldModelEnv(
        agent.networks.world_model, real.single_observation_space, real.single_action_space, np.zeros((1, 4))
    )
    before = env.reset(seed=0)[0]
    agent.parameters.data.mul_(1.1)
    assert not np.allclose(env.reset(seed=0)[0], before)
