"""Errors against the horizon, and what they are compared to; strips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pywm.errors import UserError
from pywm.training.prediction import COPY, MODEL, PERMUTED, horizon_errors, plot_errors, plot_rollout, rollout

SIDE = 16


class Shifter:
    """Knows a world in which the action says how bright the next frame is; ``off`` is added, growing with the steps."""

    context = 2

    def __init__(self, off: float = 0.0) -> None:
        self.off = off

    def predict(self, frames: Tensor, action: Tensor) -> Tensor:
        K = len(action) - len(frames) + 1
        grey = action[len(frames) - 1 :, :, 0] + self.off * torch.arange(1, K + 1)[:, None]
        return grey[:, :, None, None, None].expand(K, frames.shape[1], 3, SIDE, SIDE)


def world(B: int, H: int = 6) -> tuple[Tensor, Tensor]:
    action = torch.rand(H + 1, B, 1, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    grey = torch.cat([torch.zeros(1, B, 1), action]).mul(255).round().to(torch.uint8)
    return grey[..., None, None].expand(H + 2, B, 3, SIDE, SIDE).contiguous(), action


def test_errors_grow_as_they_should_and_are_compared() -> None:
    frames, action = world(100)
    found = horizon_errors(Shifter(0.01), frames, action, others={"another": Shifter(0.02)})
    assert list(found) == [MODEL, "another", COPY, PERMUTED]
    pixels = 3 * SIDE * SIDE
    for name, off in ((MODEL, 0.01), ("another", 0.02)):
        assert found[name] == pytest.approx([pixels * (off * k) ** 2 for k in range(1, 7)], rel=1e-3)
    truth, last = frames[2:].float() / 255, frames[1].float() / 255
    assert found[COPY] == pytest.approx((truth - last).square().sum((2, 3, 4)).mean(1).tolist(), rel=1e-4)
    # Two independent uniform numbers are 1/6 apart on average, squared.
    assert np.mean(found[PERMUTED]) == pytest.approx(pixels / 6, rel=0.2)


def test_nobody_keeps_the_own_actions() -> None:
    frames, action = world(2)
    assert min(horizon_errors(Shifter(), frames, action)[PERMUTED]) > 0
    with pytest.raises(ValueError, match="frames holds 1 rollouts, but 2 or more were expected"):
        horizon_errors(Shifter(), frames[:, :1], action[:, :1])


def test_rollouts_are_predicted_in_pieces() -> None:
    frames, action = world(130)
    assert torch.equal(rollout(Shifter(), frames, action), Shifter().predict(frames[:2], action))


def test_a_strip_shows_prediction_and_truth_at_the_steps(tmp_path: Path) -> None:
    truth = np.zeros((40, 2, 3, SIDE, SIDE), np.float32)
    prediction = truth.copy()
    truth[29, 1, 1], prediction[9, 0, 0] = 1, 1
    path = plot_rollout(truth, prediction, tmp_path / "new" / "strip.png", steps=(1, 10, 30))
    with Image.open(path) as picture:
        image = np.asarray(picture).astype(int)
    green = np.argwhere((image == (0, 255, 0)).all(-1))
    red = np.argwhere((image == (255, 0, 0)).all(-1))
    assert len(green) == len(red) == 96 * 96
    assert red[:, 1].mean() < green[:, 1].mean()  # an earlier step
    assert red[:, 0].mean() < green[:, 0].mean()  # another rollout
    with pytest.raises(ValueError, match=r"steps is \(1, 41\), but numbers from 1 to 40 were expected"):
        plot_rollout(truth, prediction, tmp_path / "strip.png", steps=(1, 41))
    grey = plot_rollout(truth[:, :, :1], prediction[:, :, :1], tmp_path / "grey.png", steps=(1,))
    with Image.open(grey) as picture:
        assert picture.mode == "RGB"


def test_curves_are_drawn_and_a_bad_place_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_errors({MODEL: [1.0, 2.0], COPY: [3.0, 4.0]}, tmp_path / "a" / "errors.png")
    assert path.stat().st_size > 5000
    with pytest.raises(UserError, match="plot_errors: cannot write"):
        plot_errors({MODEL: [1.0]}, tmp_path / "errors.xyz")
