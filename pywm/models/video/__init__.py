"""World models that predict pictures from pictures and actions, frame by frame."""

from __future__ import annotations

from pywm.models.video.action_conditional import PROFILES, ActionConditional, Profile, Stage
from pywm.models.video.curriculum import Curriculum, Phase
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
    "PROFILES",
    "VIDEO_SIZES",
    "ActionConditional",
    "Curriculum",
    "Phase",
    "Prediction",
    "Profile",
    "Stage",
    "VideoConfig",
    "VideoLoss",
    "VideoModel",
    "VideoState",
    "VideoWindow",
]
