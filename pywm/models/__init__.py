"""World models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pywm.models.rssm import RSSM, SIZES
from pywm.models.video import VideoConfig, VideoModel
from pywm.models.world_model import Predicted, WorldModel
from pywm.ops.rssm_params import RSSMConfig, RSSMState

if TYPE_CHECKING:
    from pywm.models.simulated_vec_env import SimulatedVecEnv
    from pywm.models.world_model_env import WorldModelEnv, WorldModelVectorEnv

__all__ = [
    "RSSM",
    "SIZES",
    "Predicted",
    "RSSMConfig",
    "RSSMState",
    "SimulatedVecEnv",
    "VideoConfig",
    "VideoModel",
    "WorldModel",
    "WorldModelEnv",
    "WorldModelVectorEnv",
]


def __getattr__(name: str) -> Any:
    # Models are usable without gymnasium, which the environments need.
    if name == "SimulatedVecEnv":
        from pywm.models import simulated_vec_env

        return simulated_vec_env.SimulatedVecEnv
    if name in ("WorldModelEnv", "WorldModelVectorEnv"):
        from pywm.models import world_model_env

        return getattr(world_model_env, name)
    raise AttributeError(f"module 'pywm.models' has no attribute {name!r}")
