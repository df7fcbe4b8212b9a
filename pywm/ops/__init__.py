"""Fused operators. Each has a compiled CPU and CUDA kernel and a plain-PyTorch reference."""

from pywm.ops._native import Backend, backend
from pywm.ops.adam_step import adam_step_
from pywm.ops.categorical_sample import CategoricalSample, categorical_sample
from pywm.ops.discounted_return import discounted_return
from pywm.ops.gae import GAE, gae
from pywm.ops.gaussian import GaussianSample, gaussian_kl, gaussian_sample
from pywm.ops.kl_balance import KLBalance, kl_balance
from pywm.ops.lambda_return import lambda_return
from pywm.ops.mlp import mlp
from pywm.ops.philox import philox_normal, philox_uniform
from pywm.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss
from pywm.ops.symexp_twohot import symexp_twohot_loss, symexp_twohot_mean
from pywm.ops.vtrace import VTrace, vtrace

__all__ = [
    "GAE",
    "Backend",
    "CategoricalSample",
    "GaussianSample",
    "KLBalance",
    "PPOLoss",
    "PPOStats",
    "VTrace",
    "adam_step_",
    "backend",
    "categorical_sample",
    "discounted_return",
    "gae",
    "gaussian_kl",
    "gaussian_sample",
    "kl_balance",
    "lambda_return",
    "mlp",
    "philox_normal",
    "philox_uniform",
    "ppo_loss",
    "symexp_twohot_loss",
    "symexp_twohot_mean",
    "vtrace",
]
