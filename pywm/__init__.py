"""World-model reinforcement learning at kernel speed.

The fast kernels are functions over tensors, usable in anybody's training code::

    import torch, pywm

    advantage, returns = pywm.gae(reward, value, next_value, terminated, truncated, discount=0.99, lam=0.95)

Agents are trained from the command line (``pywm train ppo CartPole-v1``) or from Python (``pywm.algos``), and loaded with
``agent, env = pywm.load(run)``. ``pywm.backend()`` tells which implementation serves which device, and why.
"""

from __future__ import annotations

from typing import Any

from pywm._version import __version__
from pywm.ops import (
    backend,
    discounted_return,
    gae,
    imagine,
    lambda_return,
    ppo_loss,
    rssm_observe,
    rssm_step,
    vtrace,
)

__all__ = [
    "__version__",
    "backend",
    "discounted_return",
    "gae",
    "imagine",
    "lambda_return",
    "load",
    "ppo_loss",
    "rssm_observe",
    "rssm_step",
    "vtrace",
]


def __getattr__(name: str) -> Any:
    # Loading a run needs environments and algorithms; users of the kernels need neither, so neither is imported here.
    if name == "load":
        from pywm.algos import load

        return load
    raise AttributeError(f"module 'pywm' has no attribute {name!r}")
