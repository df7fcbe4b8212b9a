"""What lies between environments and learning: rollouts, replay and running normalisation."""

from pywm.data.normalize import ObsNormalizer, RewardNormalizer, RunningMeanStd
from pywm.data.replay import Handles, Replay, Sequences
from pywm.data.rollout import FinalObs, Rollout, Slot

__all__ = [
    "FinalObs",
    "Handles",
    "ObsNormalizer",
    "Replay",
    "RewardNormalizer",
    "Rollout",
    "RunningMeanStd",
    "Sequences",
    "Slot",
]
