"""World models that predict pictures from pictures and actions."""

from pywm.models.video.action_conditional import PROFILES, ActionConditional, Profile, Stage
from pywm.models.video.curriculum import Curriculum, Phase

__all__ = ["PROFILES", "ActionConditional", "Curriculum", "Phase", "Profile", "Stage"]
