"""World models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pywm.models.rssm import RSSM, SIZES
from pywm.models.world_model import Predicted, WorldModel
from pywm.ops.rssm_params import RSSMConfig, RSSMState

if TYPE_CHECKING:
    from pywm.models.world_model_env import WorldModelEnv, WorldModelVectorEnv

__all__ = [
    "RSSM",
    "SIZES",
    "Predicted",
    "RSSMConfig",
    "RSSMState",
    "WorldModel",
    "WorldModelEnv",
    "WorldModelVectorEnv",
]


def __getattr__(name: str) -> Any:
    # Models are usable without gymnasium, which the environments need.
    if name in ("WorldModelEnv", "WorldModelVectorEnv"):
        from pywm.models import world_model_env

        return getattr(world_model_env, name)
    raise AttributeError(f"module 'pywm.models' has no attribute {name!r}")
