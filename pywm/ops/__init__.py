"""Fused operators. Each has a compiled CPU and CUDA kernel and a plain-PyTorch reference."""

from pywm.ops._native import Backend, backend
from pywm.ops.adam_step import adam_step_
from pywm.ops.categorical_sample import CategoricalSample, categorical_sample
from pywm.ops.discounted_return import discounted_return
from pywm.ops.gae import GAE, gae
from pywm.ops.gaussian import GaussianSample, gaussian_kl, gaussian_sample
from pywm.ops.gru_gates import (
    block_gru_gates,
    gru_block_reset,
    gru_block_update,
    gru_gates,
    layernorm_gru_gates,
)
from pywm.ops.imagine import Imagined, imagine
from pywm.ops.kl_balance import KLBalance, kl_balance
from pywm.ops.lambda_return import lambda_return
from pywm.ops.laprop_step import laprop_step_
from pywm.ops.mlp import mlp
from pywm.ops.norm_act import norm_act
from pywm.ops.norm_mlp import norm_mlp
from pywm.ops.one_hot_linear import one_hot_linear
from pywm.ops.philox import philox_normal, philox_uniform
from pywm.ops.pixel_cross_entropy import pixel_cross_entropy
from pywm.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss
from pywm.ops.resize_area import resize_area
from pywm.ops.rssm import Observed, RSSMStep, rssm_observe, rssm_step
from pywm.ops.rssm_params import Gaussian, Layer, Policy, RSSMConfig, RSSMParams, RSSMState
from pywm.ops.sample_starts import Starts, sample_starts
from pywm.ops.stack_frames import stack_frames
from pywm.ops.symexp_twohot import symexp_twohot_loss, symexp_twohot_mean
from pywm.ops.vtrace import VTrace, vtrace

__all__ = [
    "GAE",
    "Backend",
    "CategoricalSample",
    "Gaussian",
    "GaussianSample",
    "Imagined",
    "KLBalance",
    "Layer",
    "Observed",
    "PPOLoss",
    "PPOStats",
    "Policy",
    "RSSMConfig",
    "RSSMParams",
    "RSSMState",
    "RSSMStep",
    "Starts",
    "VTrace",
    "adam_step_",
    "backend",
    "block_gru_gates",
    "categorical_sample",
    "discounted_return",
    "gae",
    "gaussian_kl",
    "gaussian_sample",
    "gru_block_reset",
    "gru_block_update",
    "gru_gates",
    "imagine",
    "kl_balance",
    "lambda_return",
    "laprop_step_",
    "layernorm_gru_gates",
    "mlp",
    "norm_act",
    "norm_mlp",
    "one_hot_linear",
    "philox_normal",
    "philox_uniform",
    "pixel_cross_entropy",
    "ppo_loss",
    "resize_area",
    "rssm_observe",
    "rssm_step",
    "sample_starts",
    "stack_frames",
    "symexp_twohot_loss",
    "symexp_twohot_mean",
    "vtrace",
]
