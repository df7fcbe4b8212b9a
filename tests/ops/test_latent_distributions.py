"""What the ops on latent states and two-hot heads promise beyond what every op does."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from pywm.ops import (
    _native,
    categorical_sample,
    gaussian_kl,
    gaussian_sample,
    kl_balance,
    philox_uniform,
    reference,
    symexp_twohot_loss,
    symexp_twohot_mean,
)

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


# ---- categorical_sample -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 32, 40])
@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5])
def test_samples_have_the_frequencies_of_the_probabilities(K, unimix, device):
    N = 100_000
    logits = randn(K, device=device)
    uniform = philox_uniform(K, 0, (1, N, 1), device=device)[0]
    stoch, index = categorical_sample(logits.expand(N, 1, K), uniform, unimix=unimix)
    assert (stoch.sum(-1) == 1).all()
    assert ((stoch == 0) | (stoch == 1)).all()
    assert (stoch.argmax(-1) == index).all()
    expected = N * ((1 - unimix) * logits.double().softmax(-1) + unimix / K).cpu()
    counts = index.cpu().flatten().long().bincount(minlength=K)
    degrees = K - 1
    # χ² beyond 4 standard deviations
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 4 * math.sqrt(2 * degrees)


@both_dtypes
@pytest.mark.parametrize("K", [1, 2, 5, 31, 32, 33, 64, 100, 256])
@pytest.mark.parametrize("unimix", [0.0, 0.01, 1.0])
def test_kernel_and_reference_choose_the_same_class(K, unimix, dtype, device):
    logits = 3 * randn(300, 7, K, seed=K, dtype=dtype)
    uniform = torch.rand(300, 7, generator=torch.Generator().manual_seed(K), dtype=dtype)
    cdf = ((1 - unimix) * logits.double().softmax(-1) + unimix / K).cumsum(-1)
    clear = (cdf - uniform.unsqueeze(-1)).abs().amin(-1) > 1e-5
    assert clear.float().mean() > 0.9
    stoch, index = categorical_sample(logits.to(device), uniform.to(device), unimix=unimix)
    want_stoch, want = reference.categorical_sample(logits, uniform, unimix)
    assert (index.cpu() == want)[clear].all()
    assert (stoch.cpu() == want_stoch)[clear].all()
    exact = (cdf <= uniform.double().unsqueeze(-1)).sum(-1).clamp(max=K - 1)
    assert (index.cpu() == exact)[clear].all()


def test_the_outermost_uniform_numbers_choose_possible_classes(device):
    logits = torch.tensor([-200.0, 0.0, 1.0, -200.0], device=device).expand(2, 4)
    uniform = torch.tensor([0.0, 1 - 2**-24], device=device)
    _, index = categorical_sample(logits, uniform, unimix=0.0)
    assert index.tolist() == [1, 2]
    _, index = categorical_sample(logits, uniform, unimix=0.01)
    assert index.tolist() == [0, 3]
    beyond = torch.tensor([-1.0, 2.0], device=device)
    assert categorical_sample(logits, beyond).index.tolist() == [0, 3]


@both_dtypes
def test_the_gradient_goes_straight_through_the_sample(dtype, device):
    logits = randn(4, 3, 8, dtype=dtype, device=device).requires_grad_()
    uniform = torch.rand(4, 3, dtype=dtype, device=device)
    stoch, index = categorical_sample(logits, uniform, unimix=0.1)
    assert not index.requires_grad
    weight = randn(4, 3, 8, seed=1, dtype=dtype, device=device)
    (got,) = torch.autograd.grad((stoch * weight).sum(), logits)
    probs = 0.9 * logits.softmax(-1) + 0.1 / 8
    (want,) = torch.autograd.grad((probs * weight).sum(), logits)
    torch.testing.assert_close(got, want)


def test_the_largest_probability_is_bounded_by_unimix(device):
    """Golden number: 0.99 + 0.01/K, so that share of uniform numbers chooses the largest class."""
    K = 32
    logits = torch.zeros(2, 1, K, device=device)
    logits[..., 0] = 1000
    bound = 0.99 + 0.01 / K
    uniform = torch.tensor([[bound - 1e-6], [bound + 1e-6]], device=device)
    assert categorical_sample(logits, uniform).index.flatten().tolist() == [0, 1]


def test_nan_logits_give_a_nan_sample(device):
    logits = torch.zeros(2, 1, 4, device=device)
    logits[0, 0, 2] = math.nan
    stoch, _ = categorical_sample(logits, torch.full((2, 1), 0.5, device=device))
    assert stoch[0].isnan().all()
    assert stoch[1].isfinite().all()


# ---- kl_balance ---------------------------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_equal_distributions_cost_the_free_nats_and_have_no_gradient(unimix, dtype, device):
    """Golden number: KL(p, p) = 0, both losses exactly the free nats, zero gradient."""
    logits = 3 * randn(5, 32, 32, dtype=dtype, device=device)
    posterior, prior = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    result = kl_balance(posterior, prior, unimix=unimix)
    assert (result.kl == 0).all()
    assert (result.dynamics == 1).all()
    assert (result.representation == 1).all()
    for grad in torch.autograd.grad((result.dynamics + result.representation).sum(), (posterior, prior)):
        assert (grad == 0).all()


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.3])
def test_each_loss_moves_one_of_the_two(unimix, device):
    posterior = randn(3, 4, 6, dtype=torch.float64, device=device).requires_grad_()
    prior = randn(3, 4, 6, seed=1, dtype=torch.float64, device=device).requires_grad_()

    def losses(q, p):
        return kl_balance(q, p, unimix=unimix, free_nats=0.3)

    # With the other one held, the gradient is the derivative.
    assert torch.autograd.gradcheck(lambda p: losses(posterior.detach(), p).dynamics, prior)
    assert torch.autograd.gradcheck(lambda q: losses(q, prior.detach()).representation, posterior)
    result = losses(posterior, prior)
    assert not result.kl.requires_grad
    torch.testing.assert_close(result.dynamics, result.representation, rtol=0, atol=0)
    grads = torch.autograd.grad(
        result.dynamics.sum(), (posterior, prior), retain_graph=True, allow_unused=True
    )
    assert grads[0] is None or (grads[0] == 0).all()
    grads = torch.autograd.grad(result.representation.sum(), (posterior, prior), allow_unused=True)
    assert grads[1] is None or (grads[1] == 0).all()


def test_free_nats_are_those_of_a_row(device):
    """Two groups of 0.7 nats each are beyond 1 nat together; half as many are not."""
    posterior = torch.zeros(2, 2, 2, device=device)
    posterior[..., 0] = 3.0
    prior = posterior.flip(-1) * 0.1
    posterior[1, 1], prior[1, 1] = 0, 0
    result = kl_balance(posterior, prior, unimix=0.0)
    assert result.kl[0] > 1 > result.kl[1] > 0.5
    assert result.dynamics.tolist() == [result.kl[0].item(), 1.0]


def test_the_divergence_is_that_of_torch(device):
    posterior, prior = 2 * randn(2, 6, 3, 5, dtype=torch.float64, device=device)
    want = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=posterior), torch.distributions.Categorical(logits=prior)
    ).sum(-1)
    torch.testing.assert_close(kl_balance(posterior, prior, unimix=0.0).kl, want)


def test_more_classes_than_the_kernel_holds_run_the_reference():
    posterior, prior = randn(2, 3, 2, 257)
    before = _native.calls()
    result = kl_balance(posterior, prior)
    assert _native.calls() == before
    want = reference.kl_balance(posterior, prior, 0.01, 1.0)
    torch.testing.assert_close(tuple(result), want)


# ---- two-hot ------------------------------------------------------------------------------------------------------------


@both_dtypes
def test_zero_logits_cost_ln_255_and_mean_exactly_zero(dtype, device):
    """Golden number: ln 255 = 5.5413."""
    logits = torch.zeros(4, 255, dtype=dtype, device=device)
    target = torch.tensor([0.0, 1.5, -1e6, 1e30], dtype=dtype, device=device)
    loss = symexp_twohot_loss(logits, target)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(255)))
    assert (symexp_twohot_mean(logits) == 0).all()
    assert (symexp_twohot_mean(logits + 3) == 0).all()


@both_dtypes
def test_a_target_at_a_bin_is_one_hot(dtype, device):
    bins = reference.symexp_bins(255, dtype, torch.device("cpu")).to(device)
    assert bins[127] == 0
    assert (bins == -bins.flip(0)).all()
    torch.testing.assert_close(bins[-1].cpu().double(), torch.tensor(math.expm1(20.0), dtype=torch.float64))
    logits = randn(255, 255, dtype=dtype, device=device)
    rtol, atol = (
        (1e-5, 1e-4) if dtype == torch.float32 else (1e-12, 1e-10)
    )  # the last digits of a bin may differ
    want = functional.cross_entropy(logits, torch.arange(255, device=device), reduction="none")
    torch.testing.assert_close(symexp_twohot_loss(logits, bins), want, rtol=rtol, atol=atol)
    beyond = torch.tensor([-3e9, 3e9], dtype=dtype, device=device)
    want = functional.cross_entropy(logits[:2], torch.tensor([0, 254], device=device), reduction="none")
    torch.testing.assert_close(symexp_twohot_loss(logits[:2], beyond), want, rtol=rtol, atol=atol)


@both_dtypes
def test_the_mean_of_a_two_hot_is_its_target(dtype, device):
    size = torch.logspace(-3, 8.6, 200, dtype=dtype)
    target = torch.cat([-size, torch.zeros(1, dtype=dtype), size]).to(device)
    logits = torch.zeros(len(target), 255, dtype=dtype, device=device, requires_grad=True)
    # The gradient at equal logits is softmax - w.
    (grad,) = torch.autograd.grad(symexp_twohot_loss(logits, target).sum(), logits)
    weights = (1 / 255 - grad).clamp(min=1e-30)
    weights = torch.where(weights > 1e-6, weights, 1e-30)
    torch.testing.assert_close(symexp_twohot_mean(weights.log()), target, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("B", [0, 1, 2, 4, 254])
def test_an_even_number_of_bins_is_refused(B):
    for op, arguments in ((symexp_twohot_loss, (torch.zeros(3),)), (symexp_twohot_mean, ())):
        with pytest.raises(ValueError, match=rf"{op.__name__}: logits is \(3, {B}\), but .* odd"):
            op(torch.zeros(3, B), *arguments)


def test_more_bins_than_the_kernel_holds_run_the_reference():
    logits, target = randn(3, 1025), randn(3)
    before = _native.calls()
    torch.testing.assert_close(
        symexp_twohot_loss(logits, target), reference.symexp_twohot_loss(logits, target)
    )
    torch.testing.assert_close(symexp_twohot_mean(logits), reference.symexp_twohot_mean(logits))
    assert _native.calls() == before
    symexp_twohot_loss(randn(3, 1023), target)
    assert _native.calls() != before


# ---- Gaussian -----------------------------------------------------------------------------------------------------------


@both_dtypes
def test_standard_deviations_of_all_sizes(dtype, device):
    raw = torch.linspace(-80, 80, 1601, dtype=dtype, device=device)
    zeros = torch.zeros_like(raw)
    std = gaussian_sample(zeros, raw, zeros, min_std=0.0).std
    want = raw.double().clamp(min=0) + torch.log1p((-raw.double().abs()).exp())
    rtol = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(std.double(), want, rtol=rtol, atol=0)
    std = gaussian_sample(zeros, raw, zeros, min_std=0.1, kind="sigmoid2").std
    torch.testing.assert_close(std.double(), 2 * (raw.double() / 2).sigmoid() + 0.1, rtol=rtol, atol=0)


def test_equal_gaussians_have_no_divergence(device):
    mean, std = randn(7, 30, device=device), randn(7, 30, seed=1, device=device).exp()
    tensors = [x.clone().requires_grad_() for x in (mean, std, mean, std)]
    kl = gaussian_kl(*tensors)
    assert kl.abs().max() < 1e-5
    for grad in torch.autograd.grad(kl.sum(), tensors):
        assert grad.abs().max() < 1e-5 / std.min()


def test_the_gaussian_divergence_is_that_of_torch(device):
    mean_q, mean_p, q, p = randn(4, 5, 3, dtype=torch.float64, device=device)
    want = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean_q, q.exp()), torch.distributions.Normal(mean_p, p.exp())
    )
    torch.testing.assert_close(gaussian_kl(mean_q, q.exp(), mean_p, p.exp()), want.sum(-1))


def test_an_unknown_kind_is_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="gaussian_sample: kind is 'exp', but one of softplus, sigmoid2"):
        gaussian_sample(x, x, x, kind="exp")
