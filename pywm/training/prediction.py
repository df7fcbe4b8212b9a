"""How well pictures are foreseen: errors against the horizon, with what to compare them to, and strips to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pywm.envs.spaces import last_frame
from pywm.errors import UserError, require_extra

__all__ = ["COPY", "MODEL", "PERMUTED", "horizon_errors", "plot_errors", "plot_rollout", "rollout"]

MODEL, COPY, PERMUTED = "model", "copy of the last frame", "model, permuted actions"
# Rollouts that are predicted at once; more would only take memory.
CHUNK = 64
LEAST_SIDE = 96  # pixels of a picture in a strip
GAP = 4


class _Model(Protocol):
    context: int

    def predict(self, frames: Tensor, action: Tensor) -> Tensor: ...


def rollout(model: _Model, frames: Tensor, action: Tensor) -> Tensor:
    """Predict from the first frames of windows to their end, from the model's own outputs.

    Args:
        model: sees ``model.context`` frames.
        frames: uint8 windows ``[context + H, B, C, height, width]``.
        action: ``[context + H - 1, B, A]``.

    Returns:
        ``[H, B, C, height, width]`` in [0, 1].
    """
    chunks = [
        model.predict(x, a)
        for x, a in zip(frames[: model.context].split(CHUNK, 1), action.split(CHUNK, 1), strict=True)
    ]
    return torch.cat(chunks, 1)


def horizon_errors(
    model: _Model,
    frames: Tensor,
    action: Tensor,
    *,
    others: Mapping[str, _Model] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Compare predictions with the truth, step by step.

    Args:
        model: what predicts.
        frames: windows as in :func:`rollout`, of two rollouts at least.
        action: likewise.
        others: further models, and what to call them.
        seed: of the permutation.

    Returns:
        The squared error of steps 1 to H, summed over pixels and channels in [0, 1] and averaged over rollouts: of the
        model, of the other models, of the last frame that was seen, and of the model under the actions of another rollout.
        Where that is no worse, actions are not heeded.

    Raises:
        ValueError: there are fewer than two rollouts.
    """
    B, context = frames.shape[1], model.context
    if B < 2:
        raise ValueError(f"horizon_errors: frames holds {B} rollouts, but 2 or more were expected")
    truth = frames[context:]
    # Everybody gets somebody else's: the next one's in a random circle.
    circle = torch.randperm(B, generator=torch.Generator().manual_seed(seed)).to(action.device)
    other = torch.empty_like(circle)
    other[circle] = circle.roll(1)
    found = {MODEL: _errors(rollout(model, frames, action), truth)}
    for name, baseline in (others or {}).items():
        found[name] = _errors(rollout(baseline, frames, action), truth)
    found[COPY] = _errors(frames[context - 1 : context].float().div(255).expand(truth.shape), truth)
    found[PERMUTED] = _errors(rollout(model, frames, action[:, other]), truth)
    return found


def _errors(prediction: Tensor, truth: Tensor) -> list[float]:
    return [
        float((x - y.float() / 255).square().sum((1, 2, 3)).mean())
        for x, y in zip(prediction, truth, strict=True)
    ]


def plot_rollout(
    truth: np.ndarray, prediction: np.ndarray, path: Path | str, *, steps: Sequence[int] = (1, 10, 30, 151)
) -> Path:
    """Draw predictions (left) beside the truth (right), a column for each step and a row for each rollout.

    Args:
        truth: ``[H, B, C, height, width]`` in [0, 1]; row 0 is step 1.
        prediction: likewise.
        path: the picture, a PNG.
        steps: which to show. The default are those that Oh et al. (2015) show.

    Raises:
        ValueError: a step is not there.
        UserError: the picture cannot be written.
    """
    from PIL import Image, ImageDraw

    if not steps or not all(1 <= step <= len(truth) for step in steps):
        raise ValueError(
            f"plot_rollout: steps is {tuple(steps)}, but numbers from 1 to {len(truth)} were expected"
        )
    columns = []
    for step in steps:
        cells = []
        for b in range(truth.shape[1]):
            pair = [_picture(x[step - 1, b]) for x in (prediction, truth)]
            between = np.full((len(pair[0]), 2, 3), 255, np.uint8)
            cells.append(_framed(np.concatenate([pair[0], between, pair[1]], 1)))
        columns.append(_titled(np.concatenate(cells, 0), f"step {step}: prediction | truth"))
    image = Image.fromarray(np.concatenate(columns, 1))
    draw = ImageDraw.Draw(image)
    for i, step in enumerate(steps):
        draw.text((i * columns[0].shape[1] + GAP, 1), f"step {step}: prediction | truth", fill=(0, 0, 0))
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"plot_rollout: cannot write {path}: {error}") from error
    return path


def _picture(x: np.ndarray) -> np.ndarray:
    image = (last_frame(x).clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    scale = -(-LEAST_SIDE // max(image.shape[:2]))
    return image.repeat(scale, 0).repeat(scale, 1)


def _framed(image: np.ndarray) -> np.ndarray:
    return np.pad(image, ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)


def _titled(image: np.ndarray, title: str) -> np.ndarray:
    """Leave room for a line above, and at the right for what of it is wider than the picture."""
    missing = max(6 * len(title) + 2 * GAP - image.shape[1], 0)
    return np.pad(image, ((12, 0), (0, missing), (0, 0)), constant_values=255)


def plot_errors(curves: Mapping[str, Sequence[float]], path: Path | str, *, title: str = "") -> Path:
    """Draw errors against the horizon, on a logarithmic scale.

    Args:
        curves: what :func:`horizon_errors` returned, or more of the kind.
        path: the picture; its ending says the format.
        title: above it.

    Raises:
        MissingExtra: matplotlib is not installed.
        UserError: the picture cannot be written.
    """
    require_extra("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for name, errors in curves.items():
        axes.plot(np.arange(1, len(errors) + 1), errors, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("steps ahead")
    axes.set_ylabel("squared error, summed over the picture")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"plot_errors: cannot write {path}: {error}") from error
    return path
