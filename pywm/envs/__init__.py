"""Environments: one adapter for all of them, small ones of our own, and the checks.

``make(id, n)`` gives ``Envs``, whose ``step`` returns ``pywm.types.StepOut`` whatever is behind it.
"""

from __future__ import annotations

from pywm.envs.checks import Report, check_env, check_vector_env
from pywm.envs.make import EnvLike, make
from pywm.envs.spaces import Choices, ObsKeys, is_image, split_keys
from pywm.envs.vector import Envs, Episode

__all__ = [
    "Choices",
    "EnvLike",
    "Envs",
    "Episode",
    "ObsKeys",
    "Report",
    "check_env",
    "check_vector_env",
    "is_image",
    "make",
    "split_keys",
]
