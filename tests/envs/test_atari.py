"""ALE's native vector environment behind the adapter: raw returns, no hang, exact restoring."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from restoring import check_restoring, same, through_a_file

from pywm.envs import Envs, make
from pywm.envs.atari import Atari
from pywm.envs.checks import check_env
from pywm.errors import CheckpointError, UserError
from pywm.types import State

ale_py = pytest.importorskip("ale_py")

N = 2
ONE_THREAD = {"num_threads": 1}


def play(envs: Envs, steps: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [envs.step(rng.integers(0, envs.action_space.n, envs.num_envs)) for _ in range(steps)]  # type: ignore[attr-defined]


def test_training_sees_clipped_rewards_and_episodes_report_the_score() -> None:
    runs = {}
    for training in (True, False):
        limit = {"max_episode_steps": 40, "env_kwargs": ONE_THREAD}
        envs = make("ALE/Asterix-v5", N, seed=3, training=training, **limit)  # type: ignore[arg-type]
        obs = envs.reset()
        assert isinstance(obs, np.ndarray)
        assert (obs.shape, obs.dtype) == ((N, 4, 84, 84), np.uint8)
        outs = play(envs, 45)
        runs[training] = (np.stack([out.reward for out in outs]), envs.episodes())
        assert outs[0].reward.dtype == np.float32
        assert outs[0].terminated.dtype == outs[0].truncated.dtype == np.bool_
        assert sum(out.truncated.sum() for out in outs) == N
        envs.close()
    clipped, raw = runs[True][0], runs[False][0]
    assert raw.max() >= 10.0
    np.testing.assert_array_equal(clipped, np.sign(raw))
    assert runs[True][1] == runs[False][1]
    for episode in runs[False][1]:
        assert episode.length == 40
        assert episode.return_ == raw[:40, episode.env_index].sum()


def test_an_action_out_of_range_raises_and_does_not_hang() -> None:
    envs = make("ALE/Pong-v5", N, seed=0, env_kwargs=ONE_THREAD)
    envs.reset()
    raised: list[str] = []

    def ask() -> None:
        for bad in (6, -1, 99):
            try:
                envs.step(np.array([0, bad]))
            except ValueError as error:
                raised.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(10)
    assert raised == [
        f"Envs.step: action of environment 1 is {bad}, but expected 0 to 5" for bad in (6, -1, 99)
    ]
    envs.step(np.array([0, 5], dtype=np.int32))
    envs.close()


def breakout(**kwargs: Any) -> Envs:
    # Short episodes and frequent new seeds: restoring has to get both right.
    options = {"replay_steps": 40, **ONE_THREAD, **kwargs}
    return make("ALE/Breakout-v5", N, seed=1, max_episode_steps=25, env_kwargs=options)


def test_games_continue_exactly() -> None:
    outs = check_restoring(breakout, 60, 20)
    assert [out.truncated.sum() for out in outs[:60]].count(N) == 2


def test_games_that_are_lost_continue_exactly() -> None:
    # Many frames a step, so that a game is lost in about 50 steps; the games of the two differ in length.
    def build() -> Envs:
        return make("ALE/Breakout-v5", N, env_kwargs={"frameskip": 20, "replay_steps": 45, **ONE_THREAD})

    outs = check_restoring(build, 110, 10)
    assert sum(out.terminated.sum() for out in outs[:110]) >= 3


def test_a_long_record_forgets_what_no_game_needs() -> None:
    envs = make("ALE/Breakout-v5", 1, max_episode_steps=25, env_kwargs={"replay_steps": 100, **ONE_THREAD})
    envs.reset()
    play(envs, 290)
    assert isinstance(envs.env, Atari)
    state = envs.get_state()
    assert state is not None
    assert 0 < len(state.tensors["env.actions"]) <= 100 + 25
    assert len(envs.env._actions) == 256
    last = envs.obs
    envs.set_state(through_a_file(state))
    same(envs.env._obs, last)
    envs.close()


def test_a_different_emulator_is_noticed() -> None:
    envs = breakout()
    envs.reset()
    play(envs, 10)
    state = through_a_file(envs.get_state())
    state.data["env"]["ale_py"] = "0.0.1"
    state.tensors["env.actions"][:] = 1
    with pytest.raises(CheckpointError, match=r"saved with ale-py 0\.0\.1 do not come out the same"):
        envs.set_state(state)
    envs.close()


def test_the_record_can_be_switched_off() -> None:
    envs = breakout(replay_steps=0)
    assert not envs.restorable
    envs.reset()
    play(envs, 30)
    assert envs.get_state() is None
    with pytest.raises(CheckpointError):
        envs.set_state(State({}, {}))
    envs.close()


def test_the_loss_of_a_life_is_terminal_for_training_only() -> None:
    runs = []
    for episodic_life in (False, True):
        options = {"episodic_life": episodic_life, "frameskip": 20, **ONE_THREAD}
        envs = make("ALE/Breakout-v5", 1, seed=1, env_kwargs=options)
        envs.reset()
        runs.append((play(envs, 70), envs.episodes()))
        envs.close()
    (plain, plain_episodes), (lives, lives_episodes) = runs
    assert plain_episodes == lives_episodes != []
    lost = 0
    for a, b in zip(plain, lives, strict=True):
        same(a.obs, b.obs)
        assert (b.terminated | ~a.terminated).all()
        lost += int((b.terminated & ~a.terminated).sum())
        alive = b.terminated & ~a.terminated
        np.testing.assert_array_equal(b.final_obs[alive], b.obs[alive])
    assert lost >= 4 * len(plain_episodes)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_a_native_vector_environment_made_by_the_user_obeys_the_law(mode: AutoresetMode) -> None:
    gymnasium.register_envs(ale_py)
    native = gymnasium.make_vec(
        "ALE/Pong-v5", N, autoreset_mode=mode, max_num_frames_per_episode=40, num_threads=1
    )
    envs = make(native)
    assert not envs.restorable
    envs.reset(0)
    outs = play(envs, 24)
    ended = [t for t, out in enumerate(outs) if out.truncated[0]]
    assert len(ended) >= 2
    for t, out in enumerate(outs):
        if mode is AutoresetMode.NEXT_STEP:
            assert out.final_obs is out.obs
            assert out.valid.all() == (t - 1 not in ended)
        else:
            assert out.valid.all()
            fresh = (out.obs[:, :3] == 0).all(axis=(1, 2, 3))
            np.testing.assert_array_equal(fresh, out.truncated)
            assert not (out.final_obs[:, :3] == 0).all(axis=(1, 2, 3)).any() or t < 3
    lengths = {episode.length for episode in envs.episodes()}
    assert lengths == {10}
    envs.close()


def test_colour_frames_are_stacked_in_the_channels() -> None:
    options = {"grayscale": False, "stack_num": 2, "img_height": 64, "img_width": 64, **ONE_THREAD}
    envs = make("ALE/Pong-v5", 1, env_kwargs=options, render_mode="rgb_array")
    obs = envs.reset()
    assert isinstance(obs, np.ndarray)
    assert obs.shape == (1, 6, 64, 64)
    frame = envs.render()
    assert frame is not None
    np.testing.assert_array_equal(frame, obs[0, 3:].transpose(1, 2, 0))
    envs.close()
    grey = make("ALE/Pong-v5", 1, env_kwargs=ONE_THREAD, render_mode="rgb_array")
    grey.reset()
    frame = grey.render()
    assert frame is not None
    assert frame.shape == (84, 84, 3)
    grey.close()


def test_what_the_adapter_decides_cannot_be_given() -> None:
    with pytest.raises(UserError, match="reward_clipping is True, but expected nothing"):
        make("ALE/Pong-v5", 1, env_kwargs={"reward_clipping": True})


def test_an_unknown_game_lists_the_closest() -> None:
    with pytest.raises(UserError, match=r"No env 'ALE/Brakout-v5'. The closest are ALE/Breakout-v5"):
        make("ALE/Brakout-v5")


def test_the_checks_pass_without_asking_ale_for_the_impossible() -> None:
    report = check_env("ALE/Pong-v5", steps=42, env_kwargs=ONE_THREAD)
    assert report.ok, str(report)
    assert "wait for ever" in report["vector bad action"].detail
    assert report["vector autoreset"].status == "ok"
    assert report.facts["restorable"] == "yes"
