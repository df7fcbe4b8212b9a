"""Pictures of training: learning curves with confidence bands, GIFs and videos of episodes."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pywm.errors import UserError, require_extra
from pywm.training.directory import read_run
from pywm.training.log import read_metrics

__all__ = [
    "Curve",
    "bootstrap_band",
    "can_write_video",
    "check_film",
    "curves",
    "find_runs",
    "iqm",
    "plot",
    "write_gif",
    "write_video",
]

BOOTSTRAP_RESAMPLES = 2000
GRID_POINTS = 200
MAX_GIF_FRAMES = 300
MAX_GIF_SIDE = 400


def iqm(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean: the mean without the lowest and the highest quarter of the scores.

    Of ``n`` scores ``floor(n / 4)`` are dropped at each end, so fewer than four are simply averaged.

    Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice";
    equal to ``scipy.stats.trim_mean(scores, 0.25)``.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=axis)
    n = ordered.shape[axis]
    cut = n // 4
    return np.take(ordered, np.arange(cut, n - cut), axis=axis).mean(axis=axis)


def bootstrap_band(
    scores: np.ndarray,
    *,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    level: float = 0.95,
    resamples: int = BOOTSTRAP_RESAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence band of a statistic over seeds, by the stratified percentile bootstrap.

    Each task is a stratum: its runs are drawn with replacement among themselves, then the statistic is taken
    over all of them.

    Args:
        scores: ``[runs, tasks, ...]``; the dimensions after the second (points of a curve) share their draws.
        statistic: maps ``[resamples, runs * tasks, ...]`` to ``[resamples, ...]``; the IQM by default.
        level: part of the resamples inside the band.
        resamples: how many.
        seed: of the draws, so that a figure is reproducible.

    Returns:
        The lower and the upper end, each ``[...]``.
    """
    scores = np.asarray(scores, dtype=np.float64)
    runs, tasks, *rest = scores.shape
    rng = np.random.default_rng(seed)
    draws = rng.integers(runs, size=(resamples, runs, tasks))
    flat = scores.reshape(runs, tasks, -1)
    values = np.empty((resamples, flat.shape[2]))
    take = statistic or (lambda sample: iqm(sample, axis=1))
    for point in range(flat.shape[2]):  # one point at a time: all at once would take gigabytes
        sample = flat[draws, np.arange(tasks), point].reshape(resamples, runs * tasks)
        values[:, point] = take(sample)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low.reshape(rest), high.reshape(rest)


class Curve(NamedTuple):
    """The learning curves of all seeds of one algorithm on one environment, on a common grid.

    Attributes:
        name: algorithm and environment.
        x: ``[points]``.
        y: ``[runs, points]``.
        seeds: one a run.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    seeds: tuple[int, ...]


def find_runs(paths: Sequence[Path | str]) -> list[Path]:
    """List the run directories at or below the given paths; an earlier attempt put aside only where it is named.

    Raises:
        UserError: a path does not exist or holds no run.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"plot: {path} does not exist")
        runs = sorted(config.parent for config in path.rglob("config.json"))
        runs = [run for run in runs if (run / "metrics.jsonl").exists() and not _is_aside(run, path)]
        if not runs:
            raise UserError(f"plot: no run (a directory with config.json and metrics.jsonl) in {path}")
        found += [run for run in runs if run not in found]
    return found


def _is_aside(run: Path, path: Path) -> bool:
    return any(re.fullmatch(r"previous-\d+", part) for part in run.relative_to(path).parts)


def curves(paths: Sequence[Path | str], *, metric: str = "return/mean", x: str = "env_steps") -> list[Curve]:
    """Read the curves of a metric, grouped by algorithm and environment.

    Curves of one group are interpolated to a common grid that ends where the shortest run ends.

    Args:
        paths: run directories, or directories above them.
        metric: key of the rows of ``metrics.jsonl``.
        x: ``"env_steps"`` or ``"hours"``.

    Raises:
        UserError: no run has the metric.
    """
    groups: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    known: set[str] = set()
    runs = find_runs(paths)
    for run in runs:
        about = read_run(run, will_make_env=False)
        rows = read_metrics(run / "metrics.jsonl")
        known.update(*rows)
        key, scale = ("env_steps", 1.0) if x == "env_steps" else ("time/total", 1 / 3600)
        points = [(row[key] * scale, row[metric]) for row in rows if _is_number(row, key, metric)]
        if points:
            xs, ys = np.array(points, dtype=np.float64).T
            groups.setdefault(f"{about['algo']} · {about['env']}", []).append((about["seed"], xs, ys))
    if not groups:
        available = ", ".join(sorted(name for name in known if not name.startswith("time/"))) or "no metric"
        raise UserError(
            f"plot: none of the {len(runs)} runs has the metric {metric!r}; they have {available}"
        )
    result = []
    for name, members in groups.items():
        start = max(xs[0] for _, xs, _ in members)
        stop = min(xs[-1] for _, xs, _ in members)
        grid = np.linspace(min(start, stop), stop, GRID_POINTS if stop > start else 1)
        y = np.stack([np.interp(grid, xs, ys) for _, xs, ys in members])
        result.append(Curve(name, grid, y, tuple(seed for seed, _, _ in members)))
    return result


def _is_number(row: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(row.get(key), (int, float)) for key in keys)


def plot(
    paths: Sequence[Path | str],
    out: Path | str = "curves.png",
    *,
    metric: str = "return/mean",
    x: str = "env_steps",
    level: float = 0.95,
) -> Path:
    """Draw learning curves: every seed thin, their IQM bold, and its bootstrap confidence band.

    Args:
        paths: run directories, or directories above them.
        out: the picture; its ending says the format (png, svg, pdf).
        metric: key of the rows of ``metrics.jsonl``.
        x: ``"env_steps"`` or ``"hours"``.
        level: of the confidence band.

    Raises:
        MissingExtra: matplotlib is not installed.
        UserError: there is nothing to draw, or the picture cannot be written.
    """
    if not 0 < level < 1:
        raise UserError(f"plot: level is {level}, but expected a number between 0 and 1")
    require_extra("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, curve in enumerate(curves(paths, metric=metric, x=x)):
        color, n = f"C{i % 10}", len(curve.seeds)
        marker = "o" if len(curve.x) == 1 else None
        if n > 1:
            for y in curve.y:
                axes.plot(curve.x, y, color=color, linewidth=0.6, alpha=0.4)
            low, high = bootstrap_band(curve.y[:, None], level=level)
            axes.fill_between(curve.x, low, high, color=color, alpha=0.2, linewidth=0)
        seeds = f"{n} seeds, {level:.0%} band" if n > 1 else f"seed {curve.seeds[0]}"
        label = f"{curve.name} ({seeds})"
        axes.plot(curve.x, iqm(curve.y), color=color, linewidth=2, marker=marker, label=label)
    axes.set_xlabel("environment steps" if x == "env_steps" else "hours")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"plot: cannot write {out}: {error}") from error
    return out


def _frame(frame: np.ndarray) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.ndim == 4:  # one row of environments: the first
        frame = frame[0]
    if (
        frame.dtype != np.uint8
        or frame.ndim not in (2, 3)
        or (frame.ndim == 3 and frame.shape[2] not in (1, 3))
    ):
        raise ValueError(
            f"write_gif: a frame is {frame.dtype} {frame.shape}, but expected uint8 [height, width, 3]"
        )
    if frame.ndim == 2:
        frame = frame[:, :, None]
    return np.broadcast_to(frame, (*frame.shape[:2], 3))


def check_film(kind: Literal["gif", "video"], path: Path | str) -> None:
    """Make sure, before anything is played, that a film can be written; a missing folder is made, as by ``plot``.

    Args:
        kind: a ``"video"`` is an mp4.
        path: the film.

    Raises:
        UserError: the name has another ending, or the place cannot be written to.
        MissingExtra: an mp4 needs the extra ``video``.
    """
    path = Path(path)
    ending = {"gif": ".gif", "video": ".mp4"}[kind]
    if path.suffix.lower() != ending:
        raise UserError(f"eval: {kind} is {str(path)!r}, but expected a file name that ends in {ending}")
    if kind == "video":
        require_extra("imageio", "video")
        require_extra("imageio_ffmpeg", "video")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"eval: cannot write {path}: {error}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"eval: cannot write {path}: it is a directory, or writing there is not permitted")


def write_gif(frames: Sequence[np.ndarray], path: Path | str, *, fps: int = 25) -> Path:
    """Write frames as an endless GIF; long episodes are thinned and large pictures shrunk to keep it small.

    Args:
        frames: uint8 ``[height, width, 3]`` or ``[height, width]``, all of one size.
        path: the file.
        fps: frames a second.

    Raises:
        ValueError: there is no frame or one is not a picture.
    """
    from PIL import Image

    if not len(frames):
        raise ValueError("write_gif: frames is empty, but expected at least one picture")
    stride = -(-len(frames) // MAX_GIF_FRAMES)
    images = [Image.fromarray(np.ascontiguousarray(_frame(frame))) for frame in frames[::stride]]
    shrink = -(-max(images[0].size) // MAX_GIF_SIDE)
    if shrink > 1:
        images = [image.reduce(shrink) for image in images]
    path = Path(path)
    # GIF counts in hundredths of a second, and players slow down what is below two.
    duration = max(round(100 * stride / fps), 2) * 10
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    return path


def can_write_video() -> bool:
    """Whether the extra ``video`` is installed."""
    return all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))


def write_video(frames: Sequence[np.ndarray], path: Path | str, *, fps: int = 25) -> Path:
    """Write frames as an mp4.

    Odd sizes are padded by repeating the last row or column: the encoder writes an empty file for them, and
    says nothing.

    Args:
        frames: uint8 ``[height, width, 3]`` or ``[height, width]``, all of one size.
        path: the file.
        fps: frames a second.

    Raises:
        MissingExtra: imageio is not installed.
        OSError: the encoder wrote nothing.
    """
    imageio = require_extra("imageio.v2", "video")
    require_extra("imageio_ffmpeg", "video")
    if not len(frames):
        raise ValueError("write_video: frames is empty, but expected at least one picture")
    path = Path(path)
    with imageio.get_writer(path, fps=fps, macro_block_size=1) as writer:
        for frame in map(_frame, frames):
            height, width, _ = frame.shape
            writer.append_data(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
    if not path.exists() or path.stat().st_size == 0:
        path.unlink(missing_ok=True)
        raise OSError(f"the encoder wrote nothing to {path}")
    return path
