"""World models."""

from pywm.models.rssm import RSSM, SIZES
from pywm.ops.rssm_params import RSSMConfig, RSSMState

__all__ = ["RSSM", "SIZES", "RSSMConfig", "RSSMState"]
