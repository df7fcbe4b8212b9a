"""Outputs on the CPU lie in memory of our own, which is used again once nobody holds it."""

import subprocess
import sys
import threading

import pytest
import torch

import pywm
from pywm.ops import _native


def rollout(T, N, seed=0):
    g = torch.Generator().manual_seed(seed)
    floats = [torch.randn(T, N, generator=g) for _ in range(3)]
    return *floats, torch.rand(T, N, generator=g) < 0.1, torch.zeros(T, N, dtype=torch.bool)


@pytest.fixture(autouse=True)
def kernels():
    if not _native.has_backend("cpu"):
        pytest.skip("no compiled kernels")


@pytest.fixture
def kept():
    if not _native.module().keeps_memory:
        pytest.skip("built with AddressSanitizer, which would not see what is used too late")


@pytest.mark.parametrize("shape", [(3, 5), (128, 512)])
def test_a_result_keeps_its_numbers_as_long_as_anything_holds_them(shape):
    held = []
    for seed in range(12):
        result = pywm.gae(*rollout(*shape, seed))
        # Each of these holds the storage and not the tensor.
        held.append((seed, result.advantage[1:], result.returns.view(-1).numpy()))
        del result
    for seed, advantage, returns in held:
        want = pywm.gae(*rollout(*shape, seed))
        assert torch.equal(advantage, want.advantage[1:])
        assert torch.equal(torch.from_numpy(returns), want.returns.view(-1))


def test_freed_memory_is_used_again(kept):
    inputs = rollout(256, 256)
    first = pywm.gae(*inputs)
    addresses = {first.advantage.data_ptr(), first.returns.data_ptr()}
    del first
    second = pywm.gae(*inputs)
    assert {second.advantage.data_ptr(), second.returns.data_ptr()} == addresses


def test_what_is_kept_is_bounded(kept):
    limit, most = _native.module().kept_limit, 0
    assert limit >= 64 << 20
    for i in range(1, 86):  # sizes that share no blocks would pile up
        x = torch.zeros(64, i * (limit // 85) // (4 * 64 * 8))
        pywm.discounted_return(x, x, x[0])
        most = max(most, _native.module().kept_bytes())
    assert limit / 4 < most <= limit


def test_memory_may_be_freed_by_any_thread():
    inputs = rollout(128, 300)
    want = pywm.gae(*inputs).advantage
    results = [pywm.gae(*inputs) for _ in range(8)]
    wrong = []

    def work(k):
        for _ in range(200):
            results[k] = None
            results[k] = pywm.gae(*inputs)
            if not torch.equal(results[k].advantage, want):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_results_are_ordinary_tensors(tmp_path):
    result = pywm.gae(*rollout(4, 6)).advantage
    want = result.clone()
    assert result.is_contiguous()
    assert result.stride() == (6, 1)
    assert result.data_ptr() % 64 == 0
    assert not result.requires_grad
    assert result.device.type == "cpu"
    torch.save(result, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt"), want)
    assert torch.equal(result.clone().share_memory_(), want)
    assert torch.equal(result.share_memory_(), want)
    result.add_(1).requires_grad_().sum().backward()
    assert torch.equal(result.grad, torch.ones(4, 6))
    assert result._version == 1


def test_results_in_inference_mode_are_inference_tensors():
    with torch.inference_mode():
        assert pywm.gae(*rollout(4, 6)).advantage.is_inference()


def test_tensors_may_outlive_the_module():
    code = (
        "import atexit, torch, pywm\n"
        "x = torch.zeros(256, 512)\n"
        "kept = pywm.discounted_return(x, x, x[0])\n"
        "torch.kept = kept  # goes when torch goes\n"
        "atexit.register(lambda: globals().pop('kept'))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
