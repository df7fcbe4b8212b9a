"""Compiled kernels of pywm; written from the module by `make docs`, do not edit."""

from typing import Any

__version__: str
cuda_reason: str
has_cuda: bool
keeps_memory: bool
kept_limit: int
max_groups: int

def action_classes(action: Any, is_first: Any, classes: Any) -> Any: ...
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
def categorical_sample(logits: Any, uniform: Any, unimix: Any, direct: bool) -> Any: ...
def categorical_sample_backward(grad: Any, logits: Any, unimix: float) -> Any: ...
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
def gaussian_kl(mean_q: Any, std_q: Any, mean_p: Any, std_p: Any, direct: bool) -> Any: ...
def gaussian_kl_backward(
    grad: Any,
    mean_q: Any,
    std_q: Any,
    mean_p: Any,
    std_p: Any,
    want_mean_q: bool,
    want_std_q: bool,
    want_mean_p: bool,
    want_std_p: bool,
) -> Any: ...
def gaussian_sample(
    mean: Any,
    raw_std: Any,
    noise: Any,
    min_std: Any,
    sigmoid2: bool,
    direct: bool,
) -> Any: ...
def gaussian_sample_backward(
    grad_sample: Any,
    grad_std: Any,
    raw_std: Any,
    noise: Any,
    sigmoid2: bool,
    want_mean: bool,
    want_raw_std: bool,
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
def kept_bytes() -> int: ...
def kl_balance(posterior: Any, prior: Any, unimix: Any, free_nats: Any, direct: bool) -> Any: ...
def kl_balance_backward(
    grad_dynamics: Any,
    grad_representation: Any,
    posterior: Any,
    prior: Any,
    kl: Any,
    unimix: float,
    free_nats: float,
    want_posterior: bool,
    want_prior: bool,
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
def laprop_step_(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    offsets: Any,
    step: Any,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    clip: Any,
    min_norm: Any,
    slow: Any,
    slow_rate: Any,
    rounded: Any,
    direct: bool,
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
def new_output(like: Any, sizes: Any, bytes: bool) -> Any: ...
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
def norm_mlp(
    x: Any,
    index: Any,
    weights: Any,
    biases: Any,
    scales: Any,
    eps: Any,
    keep: bool,
    direct: bool,
) -> Any: ...
def norm_mlp_backward(
    grad: Any,
    x: Any,
    index: Any,
    kept: Any,
    weights: Any,
    scales: Any,
    eps: Any,
    want_x: bool,
    want_parameters: bool,
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
def philox(out: Any, seed: Any, offset: Any, stream: Any, normal: bool, direct: bool) -> Any: ...
def pixel_cross_entropy(logits: Any, target: Any, cutoff: Any, direct: bool) -> Any: ...
def pixel_cross_entropy_backward(grad: Any, logits: Any, target: Any, loss: Any, cutoff: float) -> Any: ...
def poison(on: bool) -> None: ...
def ppo_loss_categorical(
    logits: Any,
    nvec: Any,
    action: Any,
    old_log_prob: Any,
    advantage: Any,
    value: Any,
    returns: Any,
    old_value: Any,
    valid: Any,
    clip: Any,
    value_clip: Any,
    value_coef: Any,
    entropy_coef: Any,
    normalize_advantage: Any,
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
    clip: Any,
    value_clip: Any,
    value_coef: Any,
    entropy_coef: Any,
    normalize_advantage: Any,
    want_dist: bool,
    want_value: bool,
    direct: bool,
) -> Any: ...
def register_result(name: str, type: type[Any]) -> None: ...
def resize_area(out: Any, frames: Any) -> Any: ...
def rows_block_gru_gates(gates: Any, deter: Any, y: Any) -> Any: ...
def rows_block_gru_gates_backward(
    grad: Any,
    gates: Any,
    deter: Any,
    grad_gates: Any,
    grad_deter: Any,
) -> Any: ...
def rows_categorical_sample(logits: Any, uniform: Any, unimix: Any, stoch: Any, index: Any) -> Any: ...
def rows_layernorm_gru_gates(pre: Any, scale: Any, shift: Any, deter: Any, eps: Any, y: Any) -> Any: ...
def rows_layernorm_gru_gates_backward(
    grad: Any,
    pre: Any,
    scale: Any,
    shift: Any,
    deter: Any,
    eps: Any,
    grad_pre: Any,
    grad_deter: Any,
) -> Any: ...
def rows_norm_act(x: Any, scale: Any, shift: Any, norm: Any, act: Any, eps: Any, y: Any) -> Any: ...
def rows_norm_act_backward(
    grad: Any,
    x: Any,
    scale: Any,
    shift: Any,
    norm: Any,
    act: Any,
    eps: Any,
    grad_x: Any,
) -> Any: ...
def rssm_act(
    form: Any,
    params: Any,
    deter: Any,
    stoch: Any,
    action: Any,
    embed: Any,
    is_first: Any,
    noise: Any,
    force: Any,
) -> Any: ...
def rssm_enter(
    deter: Any,
    add: Any,
    stoch_proj: Any,
    packed: Any,
    index: Any,
    is_first: Any,
    h: Any,
    u: Any,
) -> Any: ...
def rssm_imagine(
    form: Any,
    weights: Any,
    action_in: Any,
    prior: Any,
    policy: Any,
    stoch_proj: Any,
    policy_proj: Any,
    noise: Any,
    action_noise: Any,
    force: Any,
    force_action: Any,
    deter: Any,
    stoch: Any,
    index: Any,
    keep: bool,
) -> Any: ...
def rssm_imagine_backward(
    form: Any,
    weights: Any,
    prior: Any,
    grad_deter: Any,
    grad_stoch: Any,
    grad_stats: Any,
    action_proj: Any,
    stoch_proj: Any,
    deter: Any,
    stoch: Any,
    stats: Any,
    noise: Any,
    index: Any,
) -> Any: ...
def rssm_leave(
    logits: Any,
    outer_logits: Any,
    outer_stoch: Any,
    outer_deter: Any,
    carry_stoch: Any,
    carry_deter: Any,
    is_first_behind: Any,
    unimix: Any,
    grad_logits: Any,
    grad_h: Any,
) -> Any: ...
def rssm_observe(
    form: Any,
    weights: Any,
    token_proj: Any,
    action_proj: Any,
    action_class: Any,
    deter0: Any,
    stoch_proj: Any,
    noise: Any,
    is_first: Any,
    force: Any,
    index: Any,
    keep: bool,
) -> Any: ...
def rssm_observe_backward(
    form: Any,
    weights: Any,
    grad_deter: Any,
    grad_stats: Any,
    grad_stoch: Any,
    deter0: Any,
    deter: Any,
    stats: Any,
    noise: Any,
    is_first: Any,
    u: Any,
    cell1: Any,
    cell2: Any,
    o: Any,
) -> Any: ...
def sample_starts(
    row: Any,
    env: Any,
    first: Any,
    uniform: Any,
    is_first: Any,
    is_last: Any,
    valid: Any,
    stack: int,
    beginning: bool,
) -> Any: ...
def stack_frames(
    out: Any,
    frames: Any,
    index: Any,
    first: Any,
    noise: Any,
    stack: int,
    stride: int,
    scale: float,
    standardize: bool,
) -> Any: ...
def symexp_twohot_loss(logits: Any, target: Any, other: Any, other_scale: Any, direct: bool) -> Any: ...
def symexp_twohot_loss_backward(
    grad: Any,
    logits: Any,
    target: Any,
    other: Any,
    other_scale: float,
) -> Any: ...
def symexp_twohot_mean(logits: Any, direct: bool) -> Any: ...
def symexp_twohot_mean_backward(grad: Any, logits: Any, mean: Any) -> Any: ...
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
