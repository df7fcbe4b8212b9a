"""The flat optimiser equals torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pywm.nn import MLP
from pywm.optim import Adam, FlatParameters, LaProp, SlowCopy


def _network(seed: int = 0) -> MLP:
    return MLP((3, 8, 8, 2), generator=torch.Generator().manual_seed(seed))


def _loss(network: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
    return (network(x) * 10).square().mean()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9])
def test_adam_and_clipping_equal_torch(max_grad_norm: float | None) -> None:
    ours, theirs = _network(), _network()
    flat = FlatParameters(ours)
    optimizer = Adam(flat, eps=1e-5, max_grad_norm=max_grad_norm)
    reference = torch.optim.Adam(theirs.parameters(), eps=1e-5)
    for step in range(50):
        lr = 1e-2 * (1 - step / 50)
        flat.backward(_loss(ours, step))
        norm = optimizer.step(lr)

        reference.zero_grad()
        _loss(theirs, step).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or float("inf"))
        reference.param_groups[0]["lr"] = lr
        reference.step()
        torch.testing.assert_close(norm, expected_norm)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_parameters_and_gradients_are_views_of_the_flat_buffers() -> None:
    network = _network()
    before = [p.detach().clone() for p in network.parameters()]
    flat = FlatParameters(network)
    for p, q in zip(network.parameters(), before, strict=True):
        assert torch.equal(p, q)
        assert p.untyped_storage().data_ptr() == flat.data.untyped_storage().data_ptr()
    assert flat.data.numel() == sum(p.numel() for p in before)

    flat.backward(_loss(network, 0))
    expected = torch.autograd.grad(_loss(network, 0), list(network.parameters()))
    assert torch.equal(flat.grad, torch.cat([g.flatten() for g in expected]))
    for p, g in zip(network.parameters(), expected, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)
    with torch.no_grad():
        flat.data.zero_()
    assert all(bool((p == 0).all()) for p in network.parameters())


def test_backward_replaces_the_gradients() -> None:
    network = _network()
    flat = FlatParameters(network)
    flat.backward(_loss(network, 0))
    once = flat.grad.clone()
    flat.backward(_loss(network, 0))
    assert torch.equal(flat.grad, once)


def test_double_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"FlatParameters: weight is torch.float64"):
        FlatParameters(nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="no parameters"):
        FlatParameters(nn.ReLU())


def test_gradients_that_are_not_finite_change_nothing() -> None:
    network = _network()
    flat = FlatParameters(network)
    optimizer = Adam(flat, max_grad_norm=0.5)
    before = flat.data.clone()
    flat.grad.fill_(1.0)[3] = float("nan")
    assert optimizer.step().isnan()
    assert torch.equal(flat.data, before)
    assert not optimizer.exp_avg.any()


def test_laprop_warms_up_from_zero_and_clips_each_parameter() -> None:
    network = _network()
    flat = FlatParameters(network)
    sizes = [p.numel() for p in network.parameters()]
    assert flat.offsets.diff().tolist() == sizes
    optimizer = LaProp(flat, lr=0.1, warmup=4)
    start = flat.data.clone()
    rates = []
    for step in range(7):
        flat.backward(_loss(network, step))
        rates.append(optimizer.next_lr)
        norm = optimizer.step()
        assert norm == pytest.approx(float(flat.grad.norm()))
        if step == 0:
            assert torch.equal(flat.data, start)
            clipped = optimizer.exp_avg_sq.div(0.001).split(sizes)  # the squares of the clipped gradients
            for g, p, c in zip(flat.grad.split(sizes), start.split(sizes), clipped, strict=True):
                limit = 0.3 * max(1e-3, float(p.norm()))
                assert float(c.sum().sqrt()) == pytest.approx(min(limit, float(g.norm())), rel=1e-3)
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert optimizer.updates == 7
    assert not torch.equal(flat.data, start)
    before = flat.data.clone()
    optimizer.step(0.0)
    assert torch.equal(flat.data, before)
    assert LaProp(flat, warmup=0).next_lr == 4e-5
    adam = Adam(flat, lr=0.1, warmup=2)
    for rate in (0, 0.05, 0.1, 0.1):
        before = flat.data.clone()
        flat.backward(_loss(network, 0))
        assert adam.next_lr == pytest.approx(rate)
        adam.step()
        assert torch.equal(flat.data, before) == (rate == 0)
    for kind in (LaProp, Adam):
        with pytest.raises(ValueError, match=f"{kind.__name__}: warmup is -1, but 0 or more was expected"):
            kind(flat, warmup=-1)


def test_laprop_learns() -> None:
    network = _network()
    flat = FlatParameters(network)
    optimizer = LaProp(flat, lr=1e-2, warmup=10)
    losses = []
    for _ in range(150):
        loss = _loss(network, 0)
        flat.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_what_follows_the_end_of_the_buffer_moves_with_the_step() -> None:
    network = _network()
    flat = FlatParameters(network)
    last = network.layers[-1]
    slow, alone = SlowCopy(last, rate=0.25), SlowCopy(last, rate=0.25)
    optimizer = LaProp(flat, lr=1e-2, warmup=0, slow=slow, rounded=True)
    for _ in range(3):
        flat.backward(_loss(network, 0))
        optimizer.step()
        alone.update()
        assert optimizer.rounded is not None
        assert torch.equal(optimizer.rounded, flat.data.bfloat16())
    torch.testing.assert_close(slow.data, alone.data)
    assert not torch.equal(slow.data, flat.data[-len(slow.data) :])
    copied = torch.cat([p.flatten() for p in slow.module.parameters()])
    assert torch.equal(copied, slow.data)
    first = SlowCopy(network.layers[0])
    with pytest.raises(ValueError, match="LaProp: slow follows another module, but one whose parameters"):
        LaProp(flat, slow=first)


def test_a_slow_copy_follows() -> None:
    network = _network()
    flat = FlatParameters(network)
    slow = SlowCopy(network, rate=0.25)
    begin = flat.data.clone()
    assert all(not p.requires_grad for p in slow.module.parameters())
    with torch.no_grad():
        flat.data.add_(1.0)
    assert torch.equal(torch.cat([p.flatten() for p in slow.module.parameters()]), begin)
    for share in (0.25, 0.4375):
        slow.update()
        copied = torch.cat([p.flatten() for p in slow.module.parameters()])
        torch.testing.assert_close(copied, begin + share)
    assert torch.equal(flat.data, begin + 1)
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"SlowCopy: rate is {rate}, but a number in"):
            SlowCopy(network, rate=rate)
