"""Dreams: what is recorded, what is drawn, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from pywm.errors import UserError
from pywm.models import Predicted
from pywm.training.dream import dream, write_dream
from pywm.types import StepOut


class Walk:
    """Counts its steps; environment n ends after 4 + 4n of them, or never."""

    num_envs = 2

    def __init__(self, picture: bool = False, endless: bool = False) -> None:
        self.picture, self.endless = picture, endless

    def _obs(self, t: np.ndarray) -> Any:
        vector = np.stack([t, -t], -1).astype(np.float32)
        if not self.picture:
            return vector
        return {
            "v": vector,
            "p": np.broadcast_to((10 * t)[:, None, None, None], (2, 3, 8, 8)).astype(np.uint8),
        }

    def reset(self, seed: int) -> Any:
        self.t = np.zeros(2, int)
        return self._obs(self.t)

    def step(self, action: np.ndarray) -> StepOut:
        self.t = self.t + 1
        ended = (self.t == np.array([4, 8])) & (not self.endless)
        final = self._obs(self.t)
        self.t = np.where(ended, 0, self.t)
        return StepOut(
            self._obs(self.t), self.t.astype(np.float32), ended, ended & False, final, np.ones(2, bool)
        )


class Memory(NamedTuple):
    action: torch.Tensor


class Counter:
    """Predicts one too much in every number behind the context."""

    def act(self, obs: Any, state: Any = None, *, is_first: Any = None, greedy: bool = False) -> Any:
        t = 0 if state is None else int(state.action[0, 0]) + 1
        return np.zeros(2, int), Memory(torch.full((2, 1), float(t)))

    def open_loop(
        self, obs: Any, prev_action: Any, is_first: Any, context: int, *, seed: int = 0
    ) -> Predicted:
        self.prev_action, self.is_first = prev_action, is_first
        found = {}
        for key, x in obs.items():
            y = torch.from_numpy(np.array(x)).float()
            found[key] = y / 255 if x.dtype == np.uint8 else y
            found[key][context:] += 1
        T = len(prev_action)
        return Predicted(found, torch.zeros(T, 2), torch.ones(T, 2))


def test_rows_are_those_of_the_first_episode() -> None:
    agent = Counter()
    found = dream(agent, Walk(), steps=20, context=3)
    # It stops when all have ended: rows 0 to 8.
    assert found.truth["obs"][:, 1, 0].tolist() == list(range(9))
    assert found.truth["obs"][:5, 0, 0].tolist() == list(range(5))
    assert found.length.tolist() == [5, 9]
    assert agent.prev_action[:, 0, 0].tolist() == [0, *range(8)]
    assert agent.is_first[:, 0].tolist() == [True] + 8 * [False]
    assert found.errors().tolist() == 3 * [0] + 6 * [1]


def test_an_endless_episode_is_cut() -> None:
    found = dream(Counter(), Walk(endless=True), steps=5, context=2)
    assert len(found.reward) == 7
    assert found.length.tolist() == [7, 7]


def test_pictures_and_curves_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = dream(Counter(), Walk(picture=True), steps=20, context=3)
    written = write_dream(found, tmp_path / "new")
    assert [path.name for path in written] == [
        "dream_p.png",
        "dream_p.gif",
        "dream_vectors.png",
        "dream_vectors.gif",
    ]
    assert all(path.stat().st_size > 100 for path in written)
    with Image.open(written[0]) as picture:
        strip = np.asarray(picture)
    # Two episodes of truth, prediction and error; nine columns, green while it looks.
    assert strip.shape == (6 * 68, 9 * 68, 3)
    assert strip[0, 0].tolist() == [46, 160, 67]
    assert strip[0, 4 * 68].tolist() == [207, 34, 46]
    assert strip[30, 68 + 30].tolist() == [10, 10, 10]
    assert strip[68 + 30, 68 + 30].tolist() == [10, 10, 10]
    assert strip[2 * 68 + 30, 68 + 30].tolist() == [128, 128, 128]
    with Image.open(written[1]) as film:
        assert film.n_frames == 9


def test_the_film_of_curves_grows_to_the_right(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = dream(Counter(), Walk(endless=True), steps=6, context=2)
    assert [path.name for path in write_dream(found, tmp_path)] == ["dream.png", "dream.gif"]
    with Image.open(tmp_path / "dream.gif") as film:
        assert film.size == (400, 400)
        assert film.n_frames == 8
        frames = []
        for t in range(film.n_frames):
            film.seek(t)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    # How far the blue lines of the truth and the red ones of the prediction have come, below the legend.
    for channel, other in ((2, 0), (0, 2)):
        reached = []
        for frame in frames[1:]:
            colored = (frame[..., channel] - frame[..., other] > 80)[150:]
            reached.append(int(np.nonzero(colored.any(0))[0].max()))
        assert np.diff(reached).min() > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, but expected 1 or more"),
        ({"context": 0}, "context is 0, but expected 1 or more"),
        ({"context": 9}, "context is 9, but all episodes ended after at most 9 rows; expected less"),
    ],
)
def test_what_cannot_be_dreamt_is_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dream(Counter(), Walk(), **options)
