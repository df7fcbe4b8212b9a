"""Compiled kernels of pywm; written from the module by `make docs`, do not edit."""

from collections.abc import Sequence
from typing import Any

__version__: str
cuda_reason: str
has_cuda: bool
max_groups: int

def adam_step_(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    step: Any,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    max_grad_norm: Any,
    direct: bool,
) -> Any: ...
def block_gru_gates(gates: Any, deter: Any, blocks: Any, direct: bool) -> Any: ...
def block_gru_gates_backward(
    grad: Any,
    gates: Any,
    deter: Any,
    blocks: Any,
    want_gates: bool,
    want_deter: bool,
) -> Any: ...
def calls() -> dict[str, tuple[int, int]]: ...
def cpu_isa() -> str: ...
def cpu_isas() -> str: ...
def cuda_device_count() -> int: ...
def cuda_status() -> str: ...
def discounted_return(reward: Any, discount: Any, bootstrap: Any, direct: bool) -> Any: ...
def discounted_return_backward(
    grad: Any,
    discount: Any,
    bootstrap: Any,
    returns: Any,
    want_reward: bool,
    want_discount: bool,
    want_bootstrap: bool,
) -> Any: ...
def gae(
    reward: Any,
    value: Any,
    next_value: Any,
    terminated: Any,
    truncated: Any,
    valid: Any,
    discount: Any,
    lam: Any,
    direct: bool,
) -> Any: ...
def gae_backward(
    like: Any,
    grad_advantage: Any,
    grad_returns: Any,
    terminated: Any,
    truncated: Any,
    valid: Any,
    discount: float,
    lam: float,
    want_reward: bool,
    want_value: bool,
    want_next_value: bool,
) -> Any: ...
def gru_block_reset(gates: Any, deter: Any, direct: bool) -> Any: ...
def gru_block_reset_backward(
    grad: Any,
    gates: Any,
    deter: Any,
    want_gates: bool,
    want_deter: bool,
) -> Any: ...
def gru_block_update(gates: Any, candidate: Any, deter: Any, direct: bool) -> Any: ...
def gru_block_update_backward(
    grad: Any,
    gates: Any,
    candidate: Any,
    deter: Any,
    want_gates: bool,
    want_candidate: bool,
    want_deter: bool,
) -> Any: ...
def gru_gates(input: Any, hidden: Any, deter: Any, direct: bool) -> Any: ...
def gru_gates_backward(
    grad: Any,
    input: Any,
    hidden: Any,
    deter: Any,
    want_input: bool,
    want_hidden: bool,
    want_deter: bool,
) -> Any: ...
def lambda_return(
    reward: Any,
    discount: Any,
    next_value: Any,
    lam_rows: Any,
    lam: Any,
    valid: Any,
    direct: bool,
) -> Any: ...
def lambda_return_backward(
    grad: Any,
    discount: Any,
    next_value: Any,
    returns: Any,
    lam_rows: Any,
    lam: float,
    valid: Any,
    want_reward: bool,
    want_discount: bool,
    want_next_value: bool,
) -> Any: ...
def layernorm_gru_gates(pre: Any, scale: Any, shift: Any, deter: Any, eps: Any, direct: bool) -> Any: ...
def layernorm_gru_gates_backward(
    grad: Any,
    pre: Any,
    scale: Any,
    shift: Any,
    deter: Any,
    eps: float,
    want_pre: bool,
    want_scale: bool,
    want_shift: bool,
    want_deter: bool,
) -> Any: ...
def mlp(
    x: Any,
    weights: Any,
    biases: Any,
    activation: Any,
    output_activation: Any,
    keep: bool,
    direct: bool,
) -> Any: ...
def mlp_backward(
    grad: Any,
    x: Any,
    y: Any,
    kept: Any,
    weights: Any,
    activation: Any,
    output_activation: Any,
    want_x: bool,
    want_parameters: bool,
) -> Any: ...
def norm_act(x: Any, scale: Any, shift: Any, norm: Any, act: Any, eps: Any, direct: bool) -> Any: ...
def norm_act_backward(
    grad: Any,
    x: Any,
    scale: Any,
    shift: Any,
    norm: Any,
    act: Any,
    eps: Any,
    want_x: bool,
    want_scale: bool,
    want_shift: bool,
) -> Any: ...
def num_threads() -> int: ...
def one_hot_linear(index: Any, weight: Any, bias: Any, direct: bool) -> Any: ...
def one_hot_linear_backward(
    grad: Any,
    index: Any,
    columns: int,
    want_weight: bool,
    want_bias: bool,
) -> Any: ...
def poison(on: bool) -> None: ...
def ppo_loss_categorical(
    logits: Any,
    nvec: Sequence[int],
    action: Any,
    old_log_prob: Any,
    advantage: Any,
    value: Any,
    returns: Any,
    old_value: Any,
    valid: Any,
    clip: float,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
    normalize_advantage: bool,
    grouped: bool,
    want_dist: bool,
    want_value: bool,
    direct: bool,
) -> Any: ...
def ppo_loss_gaussian(
    mean: Any,
    log_std: Any,
    action: Any,
    old_log_prob: Any,
    advantage: Any,
    value: Any,
    returns: Any,
    old_value: Any,
    valid: Any,
    clip: float,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
    normalize_advantage: bool,
    want_dist: bool,
    want_value: bool,
    direct: bool,
) -> Any: ...
def register_result(name: str, type: type[Any]) -> None: ...
def vtrace(
    log_ratio: Any,
    reward: Any,
    discount: Any,
    value: Any,
    next_value: Any,
    truncated: Any,
    lam: Any,
    rho_clip: Any,
    c_clip: Any,
    keep: bool,
    direct: bool,
) -> Any: ...
def vtrace_backward(
    grad_target: Any,
    grad_advantage: Any,
    log_ratio: Any,
    discount: Any,
    next_value: Any,
    y: Any,
    truncated: Any,
    lam: float,
    rho_clip: float,
    c_clip: float,
    want_reward: bool,
    want_discount: bool,
    want_value: bool,
    want_next_value: bool,
) -> Any: ...
