"""What a world model imagines beside what happened: open-loop prediction as pictures, films and curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pywm.envs.spaces import last_frame
from pywm.errors import UserError, require_extra
from pywm.training.report import write_gif
from pywm.types import Obs, StepOut

__all__ = ["Dream", "dream", "write_dream"]

# Columns of a picture and dimensions of a vector that are shown; more would be too small to see.
MOST_COLUMNS = 12
MOST_CURVES = 12
MOST_FILM_CURVES = 4
# Around pictures: the model has seen the row, or it has not.
SEEN, IMAGINED = (46, 160, 67), (207, 34, 46)
LEAST_SIDE = 64


class _Agent(Protocol):
    def act(
        self, obs: Obs, state: Any = None, *, is_first: np.ndarray | None = None, greedy: bool = False
    ) -> tuple[np.ndarray, Any]: ...
    def open_loop(
        self,
        obs: Mapping[str, np.ndarray],
        prev_action: Tensor,
        is_first: np.ndarray,
        context: int,
        *,
        seed: int = 0,
    ) -> Any: ...


class _Envs(Protocol):
    num_envs: int

    def reset(self, seed: int) -> Obs: ...
    def step(self, action: np.ndarray) -> StepOut: ...


class Dream(NamedTuple):
    """The first rows of some episodes, and what a model makes of them.

    Attributes:
        truth: ``key -> [T, B, ...]``; pictures ``[C, height, width]`` in [0, 1].
        prediction: likewise.
        length: ``[B]``, rows of each episode that are there; an episode may end before row T.
        context: rows that the model saw; it imagined the others.
        reward: what was paid with each row, ``[T, B]``.
        predicted_reward: likewise.
    """

    truth: dict[str, np.ndarray]
    prediction: dict[str, np.ndarray]
    length: np.ndarray
    context: int
    reward: np.ndarray
    predicted_reward: np.ndarray

    def errors(self) -> np.ndarray:
        """Return the mean squared error of each row, ``[T]``, over keys and episodes; NaN where all have ended."""
        total: Any = 0.0
        for key, x in self.truth.items():
            square = np.square(self.prediction[key] - x)
            total = total + square.reshape(*square.shape[:2], -1).mean(-1)
        there = np.arange(len(self.reward))[:, None] < self.length
        count = there.sum(1)
        return np.where(count > 0, np.where(there, total, 0).sum(1) / np.maximum(count, 1), np.nan)


def dream(agent: _Agent, envs: _Envs, *, steps: int = 45, context: int = 5, seed: int = 0) -> Dream:
    """Play the beginnings of episodes, and let the agent's world model imagine them from their first rows.

    Args:
        agent: what acts, and whose model dreams.
        envs: environments made with ``training=False``; each plays one episode.
        steps: rows to imagine.
        context: rows to look at first.
        seed: of the environments and of the model's samples.

    Raises:
        UserError: ``steps`` or ``context`` is less than 1, or every episode ended while the model was still looking.
    """
    for name, count in (("steps", steps), ("context", context)):
        if count < 1:
            raise UserError(f"dream: {name} is {count}, but expected 1 or more")
    N, T = envs.num_envs, steps + context
    obs, state = envs.reset(seed), None
    seen: list[dict[str, np.ndarray]] = [_named(obs)]
    reward = [np.zeros(N, np.float32)]
    actions: list[Tensor] = []
    length = np.full(N, T)
    is_first = np.ones(N, bool)
    for t in range(1, T):
        action, state = agent.act(obs, state, is_first=is_first, greedy=True)
        out = envs.step(action)
        actions.append(state.action)
        seen.append(_named(out.final_obs))
        reward.append(out.reward)
        ended = (out.terminated | out.truncated) & (length == T)
        length[ended] = t + 1
        obs, is_first = out.obs, out.terminated | out.truncated | ~out.valid
        if (length < T).all():
            break
    rows = len(seen)
    length = np.minimum(length, rows)
    if rows <= context or (length <= context).all():
        raise UserError(
            f"dream: context is {context}, but all episodes ended after at most {int(length.max())} rows; expected less"
        )
    truth = {key: np.stack([row[key] for row in seen]) for key in seen[0]}
    prev_action = torch.stack([torch.zeros_like(actions[0]), *actions])
    first = np.zeros((rows, N), bool)
    first[0] = True
    predicted = agent.open_loop(truth, prev_action, first, context, seed=seed)
    prediction = {key: x.float().cpu().numpy() for key, x in predicted.obs.items()}
    shown = {
        key: x.astype(np.float32) / 255 if x.dtype == np.uint8 and x.ndim == 5 else x.astype(np.float32)
        for key, x in truth.items()
        if key in prediction
    }
    return Dream(shown, prediction, length, context, np.stack(reward), predicted.reward.float().cpu().numpy())


def write_dream(found: Dream, folder: Path | str, name: str = "dream") -> list[Path]:
    """Draw a dream: of pictures a strip and a film with truth, prediction and error, of vectors curves and their film.

    Args:
        found: what to draw.
        folder: where files go; it is made.
        name: how their names begin.

    Returns:
        The files.

    Raises:
        MissingExtra: there are vectors, and matplotlib is not installed.
        UserError: the folder cannot be written to.
    """
    folder, written = Path(folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        vectors = {}
        for key, x in found.truth.items():
            if x.ndim != 5:
                vectors[key] = x
                continue
            stem = name if len(found.truth) == 1 else f"{name}_{key.replace('/', '_')}"
            written.append(_write_strip(found, key, folder / f"{stem}.png"))
            frames = [_columns(found, key, [t]) for t in range(len(x))]
            written.append(write_gif(frames, folder / f"{stem}.gif", fps=8))
        if vectors:
            stem = name if len(vectors) == len(found.truth) else f"{name}_vectors"
            curves = _Curves.of(found, vectors)
            written.append(curves.write(folder / f"{stem}.png"))
            written.append(curves.write_film(folder / f"{stem}.gif"))
    except OSError as error:
        raise UserError(f"dream: cannot write {folder}: {error}") from error
    return written


def _named(obs: Obs) -> dict[str, np.ndarray]:
    return dict(obs) if isinstance(obs, dict) else {"obs": obs}


def _picture(x: np.ndarray) -> np.ndarray:
    """Turn ``[C, height, width]`` in [0, 1] into uint8 ``[height, width, 3]``; of stacks the last frame is shown."""
    image = (last_frame(x).clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    scale = -(-LEAST_SIDE // max(image.shape[:2]))
    return image.repeat(scale, 0).repeat(scale, 1)


def _framed(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    framed = np.empty((image.shape[0] + 4, image.shape[1] + 4, 3), np.uint8)
    framed[:] = color
    framed[2:-2, 2:-2] = image
    return framed


def _columns(found: Dream, key: str, times: list[int]) -> np.ndarray:
    """Lay out truth, prediction and error, one below the other for each episode; a column for each time."""
    truth, prediction = found.truth[key], found.prediction[key]
    columns = []
    for t in times:
        color = SEEN if t < found.context else IMAGINED
        cells = []
        for b in range(min(truth.shape[1], 4)):
            there = t < found.length[b]
            error = (1 + prediction[t, b] - truth[t, b]) / 2
            for x in (truth[t, b], prediction[t, b], error):
                cells.append(_framed(_picture(x if there else np.full_like(x, 0.5)), color))
        columns.append(np.concatenate(cells, 0))
    return np.concatenate(columns, 1)


def _write_strip(found: Dream, key: str, path: Path) -> Path:
    from PIL import Image

    times = np.unique(np.linspace(0, len(found.reward) - 1, MOST_COLUMNS).round().astype(int))
    Image.fromarray(_columns(found, key, times.tolist())).save(path)
    return path


class _Curves(NamedTuple):
    """The reward and the numbers of vectors in the longest episode.

    Attributes:
        curves: label, truth ``[rows]`` and prediction ``[rows]`` of each.
        context: rows that the model saw.
    """

    curves: list[tuple[str, np.ndarray, np.ndarray]]
    context: int

    @classmethod
    def of(cls, found: Dream, vectors: Mapping[str, np.ndarray]) -> _Curves:
        b = int(found.length.argmax())
        rows = int(found.length[b])
        curves = [("reward", found.reward[:rows, b], found.predicted_reward[:rows, b])]
        for key, x in vectors.items():
            truth, prediction = (y[:rows, b].reshape(rows, -1).T for y in (x, found.prediction[key]))
            curves += [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(truth, prediction, strict=True))]
        return cls(curves, found.context)

    def write(self, path: Path) -> Path:
        """Draw the curves as a picture."""
        shown = min(len(self.curves), MOST_CURVES + 1)
        figure, _ = self._draw(shown, (7, 1.3 * shown + 0.6))
        figure.savefig(path, dpi=120)
        return path

    def write_film(self, path: Path) -> Path:
        """Draw the first curves row by row, as the model goes on from what it has seen."""
        shown = min(len(self.curves), MOST_FILM_CURVES + 1)
        figure, lines = self._draw(shown, (4, 4))  # 400 pixels, the largest side that a GIF keeps
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the limits stand, and are not to be sought again for each frame
        frames = []
        for t in range(len(self.curves[0][1])):
            for line, y in lines:
                line.set_data(np.arange(t + 1), y[: t + 1])
            figure.canvas.draw()
            frames.append(np.array(figure.canvas.buffer_rgba())[..., :3])
        return write_gif(frames, path, fps=8)

    def _draw(self, count: int, size: tuple[float, float]) -> tuple[Any, list[tuple[Any, np.ndarray]]]:
        """Return a figure of the first curves, and its lines with the numbers that they show."""
        require_extra("matplotlib", "plot")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained", dpi=100)
        FigureCanvasAgg(figure)
        grid = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        lines = []
        for axes, (label, truth, prediction) in zip(grid, self.curves[:count], strict=True):
            lines += [(axes.plot(truth, color="C0", label="truth")[0], truth)]
            lines += [(axes.plot(prediction, color="C3", linestyle="--", label="prediction")[0], prediction)]
            axes.axvline(self.context - 0.5, color="gray", linewidth=1)
            axes.set_ylabel(label, fontsize="small")
            axes.grid(alpha=0.3)
        grid[0].legend(fontsize="small", ncols=2)
        grid[-1].set_xlabel(f"step; the model sees the first {self.context} rows")
        return figure, lines
