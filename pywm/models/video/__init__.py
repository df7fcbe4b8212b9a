"""World models that predict pictures, frame by frame."""

from __future__ import annotations

from pywm.models.video.discrete import (
    VIDEO_SIZES,
    Prediction,
    VideoConfig,
    VideoLoss,
    VideoModel,
    VideoState,
    VideoWindow,
)

__all__ = [
    "VIDEO_SIZES",
    "Prediction",
    "VideoConfig",
    "VideoLoss",
    "VideoModel",
    "VideoState",
    "VideoWindow",
]
