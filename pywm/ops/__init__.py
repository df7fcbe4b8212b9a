"""Fused operators. Each has a compiled CPU and CUDA kernel and a plain-PyTorch reference."""

from pywm.ops._native import Backend, backend
from pywm.ops.adam_step import adam_step_
from pywm.ops.discounted_return import discounted_return
from pywm.ops.gae import GAE, gae
from pywm.ops.imagine import Imagined, imagine
from pywm.ops.lambda_return import lambda_return
from pywm.ops.mlp import mlp
from pywm.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss
from pywm.ops.rssm import Observed, RSSMStep, rssm_observe, rssm_step
from pywm.ops.rssm_params import Gaussian, Layer, Policy, RSSMConfig, RSSMParams, RSSMState
from pywm.ops.vtrace import VTrace, vtrace

__all__ = [
    "GAE",
    "Backend",
    "Gaussian",
    "Imagined",
    "Layer",
    "Observed",
    "PPOLoss",
    "PPOStats",
    "Policy",
    "RSSMConfig",
    "RSSMParams",
    "RSSMState",
    "RSSMStep",
    "VTrace",
    "adam_step_",
    "backend",
    "discounted_return",
    "gae",
    "imagine",
    "lambda_return",
    "mlp",
    "ppo_loss",
    "rssm_observe",
    "rssm_step",
    "vtrace",
]
