"""What lies between environments and learning: rollouts and running normalisation."""

from pywm.data.normalize import ObsNormalizer, RewardNormalizer, RunningMeanStd
from pywm.data.rollout import Rollout

__all__ = ["ObsNormalizer", "RewardNormalizer", "Rollout", "RunningMeanStd"]
