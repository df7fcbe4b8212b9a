"""The replay of frames: windows and starts are of one episode, whatever the episodes were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pywm.data import frame_replay as module
from pywm.data.frame_replay import FrameReplay
from pywm.errors import CheckpointError, UserError

K = 3


def replay_of(
    lengths: list[list[int]], running: int = 2, size: int = 8, num_envs: int = 1, collections: int = 1
) -> FrameReplay:
    """Episodes of given lengths for each environment, and one that is cut after ``running`` steps.

    Pixel 0 of a frame is its number within the episode, pixel 1 the episode's number; the reward that comes with a frame is
    its number, the action chosen after it has that number, too.
    """
    replay = FrameReplay(size, num_envs, (1, 1, 2), 1, K)
    for collection in range(collections):
        replay.begin()
        plans = [[*plan, running] for plan in lengths]
        place = np.zeros((num_envs, 2), int)  # episode and step of each environment
        offset = 10 * collection

        def frame(place: np.ndarray, offset: int = offset) -> np.ndarray:
            return np.stack([[[[t, e + offset]]] for e, t in place]).astype(np.uint8)

        while any(e < len(plan) and t < plan[e] for (e, t), plan in zip(place, plans, strict=True)):
            valid = np.array([e < len(plan) for (e, _), plan in zip(place, plans, strict=True)])
            valid &= np.array(
                [e < len(p) - 1 or t < p[min(e, len(p) - 1)] for (e, t), p in zip(place, plans, strict=True)]
            )
            before, action = frame(place), place[:, 1:].astype(np.float32)
            place[valid, 1] += 1
            final = frame(place)
            ended = np.array(
                [v and e < len(p) - 1 and t == p[e] for v, (e, t), p in zip(valid, place, plans, strict=True)]
            )
            reward = place[:, 1].astype(np.float32)
            place[ended] = place[ended] * 0 + np.stack([place[ended, 0] + 1, 0 * place[ended, 0]], 1)
            replay.add(before, action, reward, ended, ~ended & False, final, valid)
        replay.end(frame(place))
    return replay


def test_windows_never_cross_a_reset() -> None:
    replay = replay_of([[5, 1, 7], [2, 9]], num_envs=2)
    assert replay.num_transitions == 5 + 1 + 7 + 2 + 2 + 9 + 2
    assert replay.num_rows == replay.num_transitions + 4 + 3
    H = 4
    window = replay.sample(400, H, np.random.default_rng(0))
    assert window.frames.shape == (K + H, 400, 1, 1, 2)
    t, episode = window.frames[:, :, 0, 0, 0].long(), window.frames[:, :, 0, 0, 1]
    assert bool((episode == episode[0]).all())
    assert bool((t.diff(dim=0) >= 0).all())
    # The mask says where a frame follows on another one; before the beginning and behind the end they are repeated.
    moved = t.diff(dim=0)[K - 1 :] == 1
    assert torch.equal(moved, window.mask)
    assert bool(window.mask[0].all())
    assert torch.equal(window.reward[window.mask], t[K:][window.mask].float())
    # An action is chosen after a frame, and none in the repeated ones before the first.
    begun = torch.cat([t.diff(dim=0)[: K - 1] == 1, window.mask])
    action = window.action.squeeze(-1)
    assert torch.equal(action[begun], t[:-1][begun].float())
    assert bool((action[: K - 1][~begun[: K - 1]] == 0).all())


def test_only_terminal_states_are_terminated() -> None:
    replay = replay_of([[3]], running=4)
    i = np.arange(replay.num_transitions)
    window = replay._window(i, 4)
    ends = window.terminated & window.mask
    assert ends.sum() == 3  # windows that begin 3, 2 and 1 frames before it
    episode = window.frames[K:, :, 0, 0, 1]
    assert bool((episode[ends] == 0).all())


def test_starts_are_whole_stacks_of_the_newest_collection_and_the_first_a_beginning() -> None:
    replay = replay_of([[5, 1, 7], [2, 9]], num_envs=2, collections=2)
    uniform = np.random.default_rng(0).random(500)
    stacks = replay.starts(uniform, beginning=True)
    assert stacks.shape == (500, K, 1, 2)
    assert stacks.dtype == torch.uint8
    t, episode = stacks[:, :, 0, 0].long(), stacks[:, :, 0, 1].long()
    assert bool((episode >= 10).all())  # of the second collection
    assert bool((episode == episode[:, :1]).all())
    assert t[0].tolist() == [0, 0, 0]
    assert bool((t[1:].diff(dim=1) == 1).all())
    # From every row that has a whole stack and a successor: 5 - 2, 7 - 2 and 9 - 2.
    seen = {(int(e), int(x)) for e, x in zip(episode[1:, 0], t[1:, -1], strict=True)}
    assert len(seen) == len(
        [x for n in (5, 7) for x in range(2, n)] + [x for n in (9,) for x in range(2, n)]
    ) - len({(11, x) for x in range(2, 2)})
    without = replay.starts(uniform, beginning=False)
    assert bool((without[:, :, 0, 0].long().diff(dim=1) == 1).all())


def test_it_grows_and_comes_back_as_it_was() -> None:
    replay = replay_of([[30, 4]], size=1, collections=2)
    other = FrameReplay(1, 1, (1, 1, 2), 1, K)
    other.load_state(replay.state())
    rngs = [np.random.default_rng(3) for _ in range(2)]
    a, b = (x.sample(50, 3, rng) for x, rng in zip((replay, other), rngs, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    uniform = np.random.default_rng(0).random(20)
    assert torch.equal(replay.starts(uniform, beginning=True), other.starts(uniform, beginning=True))


def test_a_state_of_other_frames_is_named() -> None:
    state = replay_of([[3]]).state()
    with pytest.raises(
        CheckpointError, match=r"frame is uint8 \(\d+, 1, 1, 1, 2\), but uint8 .* was expected"
    ):
        FrameReplay(8, 1, (1, 2, 2), 1, K).load_state(state)
    with pytest.raises(CheckpointError, match="format and stack are"):
        FrameReplay(8, 1, (1, 1, 2), 1, K + 1).load_state(state)


def test_frames_that_cannot_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 1_000_000)
    FrameReplay(1000, 1, (1, 10, 10), 3, K)
    with pytest.raises(UserError, match=r"size is 100,000 frames, which take 0.01 GiB, but 0.00 GiB"):
        FrameReplay(100_000, 1, (1, 10, 10), 3, K)
    with pytest.raises(ValueError, match="num_envs is 0, but at least 1 was expected"):
        FrameReplay(10, 0, (1, 10, 10), 3, K)
