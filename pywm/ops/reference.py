"""Every op in plain PyTorch: the definition, the fallback and the test oracle.

Written to be read, not to be fast. Differentiable by autograd, any float dtype, any device. Arguments were checked by
the public functions in ``pywm.ops``. Masks select and never multiply, so NaN behind a mask stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pywm.distributions import Categorical, DiagGaussian, MultiCategorical

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "tanh": torch.tanh,
    "silu": functional.silu,
    "elu": functional.elu,
    "relu": torch.relu,
}


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor | None,
    discount: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`pywm.ops.gae`."""
    terminated, done = terminated != 0, (terminated != 0) | (truncated != 0)
    valid = torch.ones_like(done) if valid is None else valid != 0
    delta = reward + discount * next_value.masked_fill(terminated, 0) - value
    advantage = torch.zeros_like(reward[0])
    advantages = []
    for t in range(len(reward) - 1, -1, -1):
        advantage = delta[t] + (discount * lam * advantage).masked_fill(done[t], 0)
        advantage = advantage.masked_fill(~valid[t], 0)
        advantages.append(advantage)
    stacked = torch.stack(advantages).flip(0)
    return stacked, torch.where(valid, stacked + value, value.detach())


def lambda_return(
    reward: Tensor,
    discount: Tensor,
    next_value: Tensor,
    lam: float | Tensor,
    valid: Tensor | None,
) -> Tensor:
    """See :func:`pywm.ops.lambda_return`."""
    lam = lam.detach() if isinstance(lam, Tensor) else torch.full_like(reward, lam, requires_grad=False)
    valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid != 0
    # An invalid row may hold anything: harmless inputs before any arithmetic, so that no NaN reaches a gradient.
    reward, discount, next_value, lam = (
        x.masked_fill(~valid, 0) for x in (reward, discount, next_value, lam)
    )
    next_return = next_value[-1]
    returns = []
    for t in range(len(reward) - 1, -1, -1):
        if t + 1 < len(reward):
            next_return = torch.where(valid[t + 1], next_return, next_value[t])
        mixed = (1 - lam[t]) * next_value[t] + lam[t] * next_return
        next_return = (reward[t] + discount[t] * mixed).masked_fill(~valid[t], 0)
        returns.append(next_return)
    return torch.stack(returns).flip(0)


def discounted_return(reward: Tensor, discount: Tensor, bootstrap: Tensor) -> Tensor:
    """See :func:`pywm.ops.discounted_return`."""
    next_return = bootstrap
    returns = []
    for r, d in zip(reward.flip(0), discount.flip(0), strict=True):
        next_return = r + d * next_return
        returns.append(next_return)
    return torch.stack(returns).flip(0)


def vtrace(
    log_ratio: Tensor,
    reward: Tensor,
    discount: Tensor,
    value: Tensor,
    next_value: Tensor,
    truncated: Tensor,
    lam: float,
    rho_clip: float,
    c_clip: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`pywm.ops.vtrace`."""
    ratio = log_ratio.detach().exp()
    largest = torch.finfo(ratio.dtype).max  # torch refuses bounds that the dtype cannot hold
    rho, c = ratio.clamp(max=min(rho_clip, largest)), lam * ratio.clamp(max=min(c_clip, largest))
    truncated = truncated != 0
    delta = rho * (reward + discount * next_value - value)
    next_y = torch.zeros_like(reward[0])
    corrections, advantages = [], []
    for t in range(len(reward) - 1, -1, -1):
        next_y = next_y.masked_fill(truncated[t], 0)
        advantages.append(rho[t] * (reward[t] + discount[t] * (next_value[t] + next_y) - value[t]))
        next_y = delta[t] + discount[t] * c[t] * next_y
        corrections.append(next_y)
    return value + torch.stack(corrections).flip(0), torch.stack(advantages).flip(0)


def ppo_loss(
    dist: Categorical | MultiCategorical | DiagGaussian,
    action: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    value: Tensor,
    returns: Tensor,
    old_value: Tensor | None,
    valid: Tensor | None,
    clip: float,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    normalize_advantage: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`pywm.ops.ppo_loss`. Returns the loss and the five statistics stacked, ``[5]``."""
    action, old_log_prob = action.detach(), old_log_prob.detach()
    advantage, returns = advantage.detach(), returns.detach()
    largest = torch.finfo(value.dtype).max  # torch refuses bounds that the dtype cannot hold
    clip, value_clip = min(clip, largest), value_clip if value_clip is None else min(value_clip, largest)
    valid = torch.ones_like(advantage, dtype=torch.bool) if valid is None else valid != 0
    count = valid.sum()

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~valid, 0).sum() / count.clamp(min=1)

    # An invalid row may hold anything: give it harmless inputs before any arithmetic, so that no NaN reaches a gradient.
    dist = _select_rows(dist, valid)
    if isinstance(dist, Categorical):
        action = action.masked_fill(~valid, 0)
    else:
        action = action.masked_fill(~valid.unsqueeze(-1), 0)
    old_log_prob, advantage, returns, value = (
        x.masked_fill(~valid, 0) for x in (old_log_prob, advantage, returns, value)
    )

    if normalize_advantage:
        centred = advantage - mean(advantage)
        variance = centred.masked_fill(~valid, 0).square().sum() / (count - 1).clamp(min=1)
        advantage = torch.where(count >= 2, centred / (variance.sqrt() + 1e-8), advantage)
    log_ratio = dist.log_prob(action) - old_log_prob
    ratio = log_ratio.exp()
    policy_loss = -mean(torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage))

    squared_error = (value - returns).square()
    if value_clip is not None:
        assert old_value is not None
        old_value = old_value.detach().masked_fill(~valid, 0)
        clipped = old_value + (value - old_value).clamp(-value_clip, value_clip)
        squared_error = torch.maximum(squared_error, (clipped - returns).square())
    value_loss = 0.5 * mean(squared_error)

    entropy = mean(dist.entropy())
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
    clip_fraction = mean(((ratio - 1).abs() > clip).to(ratio.dtype))
    approx_kl = mean((ratio - 1) - log_ratio)
    return loss, torch.stack([policy_loss, value_loss, entropy, clip_fraction, approx_kl]).detach()


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    output_activation: str,
) -> Tensor:
    """See :func:`pywm.ops.mlp`."""
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        z: Tensor = functional.linear(x, weight, bias)
        x = _ACTIVATIONS[output_activation if i == last else activation](z)
    return x


def norm_act(x: Tensor, scale: Tensor, shift: Tensor | None, norm: str, act: str, eps: float) -> Tensor:
    """See :func:`pywm.ops.norm_act`."""
    y = scale * _normalise(x, norm, eps)
    return _ACTIVATIONS[act](y if shift is None else y + shift)


def block_gru_gates(gates: Tensor, deter: Tensor, blocks: int) -> Tensor:
    """See :func:`pywm.ops.block_gru_gates`."""
    size = deter.shape[-1] // blocks
    reset, candidate, update = gates.unflatten(-1, (blocks, 3, size)).unbind(-2)
    return _gru(reset, candidate, update, deter.unflatten(-1, (blocks, size))).flatten(-2)


def layernorm_gru_gates(pre: Tensor, scale: Tensor, shift: Tensor, deter: Tensor, eps: float) -> Tensor:
    """See :func:`pywm.ops.layernorm_gru_gates`."""
    reset, candidate, update = (scale * _normalise(pre, "layer", eps) + shift).chunk(3, -1)
    return _gru(reset, candidate, update, deter)


def gru_gates(input: Tensor, hidden: Tensor, deter: Tensor) -> Tensor:  # noqa: A002
    """See :func:`pywm.ops.gru_gates`."""
    (i_reset, i_keep, i_candidate), (h_reset, h_keep, h_candidate) = input.chunk(3, -1), hidden.chunk(3, -1)
    reset, keep = torch.sigmoid(i_reset + h_reset), torch.sigmoid(i_keep + h_keep)
    candidate = torch.tanh(i_candidate + reset * h_candidate)
    return keep * deter + (1 - keep) * candidate


def gru_block_reset(gates: Tensor, deter: Tensor) -> Tensor:
    """See :func:`pywm.ops.gru_block_reset`."""
    reset, _ = gates.chunk(2, -1)
    return torch.sigmoid(reset) * deter


def gru_block_update(gates: Tensor, candidate: Tensor, deter: Tensor) -> Tensor:
    """See :func:`pywm.ops.gru_block_update`."""
    update = torch.sigmoid(gates.chunk(2, -1)[1])
    return update * deter + (1 - update) * torch.tanh(candidate)


def one_hot_linear(index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`pywm.ops.one_hot_linear`."""
    S = index.shape[-1]
    K = weight.shape[1] // S
    columns = index.long().clamp(max=K - 1) + K * torch.arange(S, device=index.device)
    y = weight.t()[columns].sum(-2)
    return y if bias is None else y + bias


def philox_words(row: Tensor, step: Tensor, stream: Tensor, block: Tensor, seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 bits, held in int64, of counters in int64 that broadcast."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = torch.broadcast_tensors(row, step, stream, block)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64
        c0, c1, c2, c3 = ((b >> 32) & mask) ^ c1 ^ k0, b & mask, ((a >> 32) & mask) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def philox(out: Tensor, seed: int, offset: int, stream: int, normal: bool) -> Tensor:
    """See :func:`pywm.ops.philox_uniform` and :func:`pywm.ops.philox_normal`. Only the shape of ``out`` matters."""
    T, N, S = out.shape

    def count(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int64, device=out.device)

    words = philox_words(
        count(N).view(1, N, 1),
        offset + count(T).view(T, 1, 1),
        torch.tensor(stream, dtype=torch.int64, device=out.device),
        count((S + 3) // 4),
        seed,
    )
    uniform = (torch.stack(words, -1) >> 8).to(out.dtype) / 2**24
    if normal:
        radius = (-2 * (uniform[..., ::2] + 2**-24).log()).sqrt()
        angle = 2 * math.pi * uniform[..., 1::2]
        uniform = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(3)
    return uniform.flatten(2)[..., :S].contiguous()


def categorical_sample(logits: Tensor, uniform: Tensor, unimix: float) -> tuple[Tensor, Tensor]:
    """See :func:`pywm.ops.categorical_sample`."""
    K = logits.shape[-1]
    probs = (1 - unimix) * logits.softmax(-1) + unimix / K
    total = torch.zeros_like(uniform)
    sums = []
    for prob in probs.detach().unbind(-1):  # one class after the other, as the kernels do
        total = total + prob
        sums.append(total)
    below = torch.stack(sums, -1) <= (uniform.detach() * total).unsqueeze(-1)
    index = below.sum(-1).clamp(max=K - 1)
    onehot = (torch.arange(K, device=logits.device) == index.unsqueeze(-1)).to(logits.dtype)
    return onehot + (probs - probs.detach()), index.to(torch.uint8)


def kl_balance(
    posterior: Tensor, prior: Tensor, unimix: float, free_nats: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pywm.ops.kl_balance`."""

    def log_probs(logits: Tensor) -> Tensor:
        if unimix == 0:
            return logits.log_softmax(-1)
        return ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()

    def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1))

    free = min(free_nats, torch.finfo(posterior.dtype).max)

    def beyond_free(kl: Tensor) -> Tensor:
        return torch.where(kl <= free, torch.full_like(kl, free), kl)

    log_q, log_p = log_probs(posterior), log_probs(prior)
    dynamics, representation = divergence(log_q.detach(), log_p), divergence(log_q, log_p.detach())
    return beyond_free(dynamics), beyond_free(representation), representation.detach()


def symexp_bins(B: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the bins of :func:`pywm.ops.symexp_twohot_loss`, antisymmetric, with an exact 0 in the middle."""
    half = torch.linspace(0, 20, (B + 1) // 2, dtype=torch.float64, device=device).expm1().to(dtype)
    return torch.cat([-half[1:].flip(0), half])


def symexp_twohot_loss(logits: Tensor, target: Tensor) -> Tensor:
    """See :func:`pywm.ops.symexp_twohot_loss`."""
    B = logits.shape[-1]
    bins = symexp_bins(B, logits.dtype, logits.device)
    target = target.detach()
    y = torch.where(target < bins[0], bins[0], torch.where(target > bins[-1], bins[-1], target))
    low = ((bins <= y.unsqueeze(-1)).sum(-1) - 1).clamp(0, B - 2)
    weight = (y - bins[low]) / (bins[low + 1] - bins[low])
    log_probs = logits.log_softmax(-1)
    of_low = log_probs.gather(-1, low.unsqueeze(-1)).squeeze(-1)
    of_high = log_probs.gather(-1, low.unsqueeze(-1) + 1).squeeze(-1)
    return -((1 - weight) * of_low + weight * of_high)


def symexp_twohot_mean(logits: Tensor) -> Tensor:
    """See :func:`pywm.ops.symexp_twohot_mean`."""
    middle = logits.shape[-1] // 2
    bins = symexp_bins(logits.shape[-1], logits.dtype, logits.device)
    probs = logits.softmax(-1)
    pairs = probs[..., middle + 1 :] - probs[..., :middle].flip(-1)
    return (bins[middle + 1 :] * pairs).sum(-1)


def gaussian_sample(
    mean: Tensor, raw_std: Tensor, noise: Tensor, min_std: float, sigmoid2: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`pywm.ops.gaussian_sample`."""
    if sigmoid2:
        std = 2 * torch.sigmoid(raw_std / 2) + min_std
    else:
        std = torch.logaddexp(raw_std, torch.zeros_like(raw_std)) + min_std
    return mean + std * noise.detach(), std


def gaussian_kl(mean_q: Tensor, std_q: Tensor, mean_p: Tensor, std_p: Tensor) -> Tensor:
    """See :func:`pywm.ops.gaussian_kl`."""
    ratio, z = std_q / std_p, (mean_q - mean_p) / std_p
    return (0.5 * (ratio.square() + z.square() - 1) - ratio.log()).sum(-1)


def pixel_cross_entropy(logits: Tensor, target: Tensor, cutoff: float) -> Tensor:
    """See :func:`pywm.ops.pixel_cross_entropy`."""
    log_prob = logits.log_softmax(-1).gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
    return torch.relu(-log_prob - cutoff)


def stack_frames(
    frames: Tensor,
    index: Tensor,
    first: Tensor,
    noise: Tensor | None,
    stack: int,
    stride: int,
    scale: float,
    standardize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`pywm.ops.stack_frames`."""
    back = stride * torch.arange(stack - 1, -1, -1, device=frames.device)
    rows = torch.maximum(index.unsqueeze(-1) - back, first.unsqueeze(-1))
    chosen = frames[rows].flatten(1, 2)
    if dtype == torch.uint8:
        return chosen
    x = chosen.double()
    if standardize:
        centred = x - x.mean((-2, -1), keepdim=True)
        std = centred.square().mean((-2, -1), keepdim=True).sqrt()
        x = centred / std.clamp(min=frames[0, 0].numel() ** -0.5)
    else:
        x = x * scale
    return x.to(dtype) if noise is None else x.to(dtype) + noise


def area_overlap(n: int, n2: int, device: torch.device) -> Tensor:
    """Return how much of each of ``n`` pixels each of ``n2`` larger ones covers, ``[n2, n]`` in units of 1 / n2."""
    small, large = torch.arange(n, device=device), torch.arange(n2, device=device).unsqueeze(-1)
    end = torch.minimum((large + 1) * n, (small + 1) * n2)
    return (end - torch.maximum(large * n, small * n2)).clamp(min=0)


def resize_area(frames: Tensor, height: int, width: int) -> Tensor:
    """See :func:`pywm.ops.resize_area`."""
    h, w = frames.shape[-2:]
    rows, columns = (area_overlap(n, m, frames.device).double() for n, m in ((h, height), (w, width)))
    total = (rows @ frames.double() @ columns.T).long()  # sums of integers below 2^53: exact
    return ((2 * total + h * w) // (2 * h * w)).to(torch.uint8)


def sample_starts(
    uniform: Tensor,
    is_first: Tensor,
    is_last: Tensor | None,
    valid: Tensor | None,
    stack: int,
    beginning: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pywm.ops.sample_starts`."""
    T, N = is_first.shape
    holds = torch.ones_like(is_first) if valid is None else valid
    start = holds if is_last is None else holds & ~is_last
    whole = start.clone()
    whole[: stack - 1] = False
    for j in range(min(stack - 1, T)):
        whole[j:] &= ~is_first[: T - j]
        whole[j + 1 :] &= holds[: T - j - 1]

    def pick(cells: Tensor, u: Tensor) -> Tensor:
        count = cells.flatten().cumsum(0)
        k = (u.double() * count[-1]).long().minimum(count[-1] - 1)
        return torch.searchsorted(count, k + 1).where(count[-1] > 0, -1)

    cell = pick(whole, uniform)
    if beginning:
        cell = torch.cat([pick(start & is_first, uniform[:1]), cell[1:]])
    row = torch.where(cell < 0, -1, cell // N)
    env = torch.where(cell < 0, -1, cell % N)
    first = (row - (stack - 1)).clamp(min=-1)
    return row, env, torch.cat([row[:1], first[1:]]) if beginning else first


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm: torch's own sum of a million float32 squares on a CPU is wrong by up to a thousandth."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.to(x.dtype)


def adam_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    max_grad_norm: float | None,
) -> Tensor:
    """See :func:`pywm.ops.adam_step_`. Selects instead of branching on the norm, which would wait for the device."""
    with torch.no_grad():
        norm: Tensor = _norm(grad)
        finite = torch.isfinite(norm)
        if max_grad_norm is not None:
            grad = grad * (max_grad_norm / (norm + 1e-6)).clamp(max=1)
        m = torch.lerp(exp_avg, grad, 1 - beta1)
        v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
        denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
        new_param = param - lr / (1 - beta1**step) * (m / denominator)
        for buffer, new in ((param, new_param), (exp_avg, m), (exp_avg_sq, v)):
            buffer.copy_(torch.where(finite, new, buffer))
        return norm


def laprop_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    offsets: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip: float | None,
    min_norm: float,
) -> Tensor:
    """See :func:`pywm.ops.laprop_step_`. Selects instead of branching on the norm, as above; looks at the offsets."""
    with torch.no_grad():
        norm: Tensor = _norm(grad)
        finite = torch.isfinite(norm)
        if clip is not None:
            sizes = offsets.diff().tolist()
            clipped = []
            for g, p in zip(grad.split(sizes), param.split(sizes), strict=True):
                limit = clip * _norm(p).clamp(min=min_norm)
                size = _norm(g)
                clipped.append(torch.where(size > limit, g * (limit / size), g))
            grad = torch.cat(clipped)
        v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
        normalised = grad / (v.sqrt() / math.sqrt(1 - beta2**step) + eps)
        m = torch.lerp(exp_avg, normalised, 1 - beta1)
        new_param = param - lr / (1 - beta1**step) * m
        for buffer, new in ((param, new_param), (exp_avg, m), (exp_avg_sq, v)):
            buffer.copy_(torch.where(finite, new, buffer))
        return norm


def _select_rows(
    dist: Categorical | MultiCategorical | DiagGaussian, valid: Tensor
) -> Categorical | MultiCategorical | DiagGaussian:
    """Replace the parameters of invalid rows by zeros, which also cuts their gradients."""
    mask = ~valid.unsqueeze(-1)
    if isinstance(dist, Categorical):
        return Categorical(dist.logits.masked_fill(mask, 0))
    if isinstance(dist, MultiCategorical):
        return MultiCategorical(dist.logits.masked_fill(mask, 0), dist.nvec)
    log_std = dist.log_std
    if log_std.ndim == dist.mean.ndim and dist.mean.ndim > 1:
        log_std = log_std.masked_fill(mask, 0)
    return DiagGaussian(dist.mean.masked_fill(mask, 0), log_std)


def _normalise(x: Tensor, norm: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def _gru(reset: Tensor, candidate: Tensor, update: Tensor, deter: Tensor) -> Tensor:
    """Return Dreamer's next state from its gates' pre-activations."""
    candidate = torch.tanh(torch.sigmoid(reset) * candidate)
    update = torch.sigmoid(update - 1)
    return update * candidate + (1 - update) * deter
