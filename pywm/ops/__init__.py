"""Fused operators. Each has a compiled CPU and CUDA kernel and a plain-PyTorch reference."""

from pywm.ops._native import Backend, backend
from pywm.ops.adam_step import adam_step_
from pywm.ops.discounted_return import discounted_return
from pywm.ops.gae import GAE, gae
from pywm.ops.lambda_return import lambda_return
from pywm.ops.mlp import mlp
from pywm.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss
from pywm.ops.vtrace import VTrace, vtrace

__all__ = [
    "GAE",
    "Backend",
    "PPOLoss",
    "PPOStats",
    "VTrace",
    "adam_step_",
    "backend",
    "discounted_return",
    "gae",
    "lambda_return",
    "mlp",
    "ppo_loss",
    "vtrace",
]
