"""Pictures are kept in order, and windows of them never cross an episode's beginning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pywm.data.frames
from pywm.data.frames import Frames
from pywm.errors import CheckpointError, UserError
from pywm.types import StepOut

SHAPE = (1, 16, 16)


def fill(store: Frames, length: int = 5, mode: str = "same") -> list[list[int]]:
    """Write episodes of stream n with ``length + n`` steps; a picture is all of one number, different in every row.

    Returns:
        Of each stream, the number of the episode of every row.
    """
    N = store.num_envs
    episodes: list[list[int]] = [[] for _ in range(N)]
    t, number, resetting = np.zeros(N, int), np.zeros(N, int), np.zeros(N, bool)
    while not store.is_full:
        frames = (
            np.full((N, *SHAPE), store.count, np.uint8)
            + np.arange(N, dtype=np.uint8)[:, None, None, None] * 100
        )
        for n in range(N):
            episodes[n].append(int(number[n]) if not resetting[n] else -1 - int(number[n]))
        valid = ~resetting
        t = np.where(valid, t + 1, 0)
        ended = (t == length + np.arange(N)) & valid
        number += ended
        t = np.where(ended, 0, t)
        resetting = ended & (mode == "next")
        out = StepOut(frames, np.zeros(N), ended, np.zeros(N, bool), frames, valid)
        store.add(frames, torch.full((N, 2), float(store.count)), out)
    return episodes


@pytest.mark.parametrize("mode", ["same", "next"])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6])
def test_windows_lie_inside_episodes_and_none_is_missing(rows: int, mode: str) -> None:
    store = Frames(40, 2, SHAPE, 2)
    episodes = fill(store, mode=mode)
    windows = store.windows(rows)
    found = {(int(t), int(n)) for t, n in zip(windows.time, windows.stream, strict=True)}
    want = {
        (t, n) for n in range(2) for t in range(40 - rows + 1) if len(set(episodes[n][t : t + rows])) == 1
    }
    assert found == want
    assert len(found) > 0
    frames, action = store.gather(windows)
    assert frames.shape == (rows, len(windows), *SHAPE)
    assert action.shape == (rows - 1, len(windows), 2)
    for b, (t, n) in enumerate(zip(windows.time, windows.stream, strict=True)):
        assert frames[:, b, 0, 3, 3].tolist() == [t + i + 100 * n for i in range(rows)]
        assert action[:, b, 1].tolist() == [t + i for i in range(rows - 1)]


def test_windows_apart_do_not_overlap() -> None:
    store = Frames(40, 2, SHAPE, 2)
    fill(store, length=9)
    windows = store.windows(3)
    apart = windows.apart()
    assert len(apart) == 4 * 3 + 1 + 4 * 3  # episodes of 9 and of 10 rows
    rows = [(int(n), int(t) + i) for t, n in zip(apart.time, apart.stream, strict=True) for i in range(3)]
    assert len(set(rows)) == len(rows)
    assert len(store.windows(30).apart()) == 0


def test_a_reset_by_hand_begins_an_episode() -> None:
    store = Frames(6, 1, SHAPE, 2)
    frames, no = np.zeros((1, *SHAPE), np.uint8), np.zeros(1, bool)
    for t in range(6):
        if t == 3:
            store.restart()
        store.add(frames, torch.zeros(1, 2), StepOut(frames, np.zeros(1), no, no, frames, ~no))
    assert store.windows(3).time.tolist() == [0, 3]


def test_the_mean_picture() -> None:
    store = Frames(10, 2, SHAPE, 2)
    fill(store)
    want = store.gather(store.windows(1))[0].float().mean((0, 1)) / 255
    assert torch.allclose(store.mean(), want)


def test_it_continues_from_its_state() -> None:
    store, other = Frames(40, 2, SHAPE, 2), Frames(40, 2, SHAPE, 2)
    fill(store)
    other.load_state(store.state())
    assert other.is_full
    assert torch.equal(other.gather(other.windows(4))[0], store.gather(store.windows(4))[0])
    for name, x in store.state().tensors.items():
        assert torch.equal(other.state().tensors[name], x)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((40, 3, SHAPE, 2), "frames is torch.uint8 .* but torch.uint8 .* was expected"),
        ((40, 2, SHAPE, 5), "action is torch.float32"),
        ((30, 2, SHAPE, 2), "frames has 40 rows, but at most 30 were expected"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(shape: Any, message: str) -> None:
    store, other = Frames(40, 2, SHAPE, 2), Frames(*shape)
    fill(store)
    with pytest.raises(CheckpointError, match=message):
        other.load_state(store.state())
    assert other.count == 0


def test_what_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pywm.data.frames, "free_memory", lambda: 2**30)
    with pytest.raises(
        UserError, match=r"500,000 pictures of 3 x 210 x 160 take 46.9 GiB, but 1.0 GiB of memory"
    ):
        Frames(62_500, 8, (3, 210, 160), 4)
