"""Products with bfloat16 operands: how far they are from float64, how near to the rounded reference, and who refuses them.

CPUs without the instructions run the same packed kernels in portable code here, which nobody else gets to see, and the code
for the instructions with a stand-in for them.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_imagine_backward import case, run, zeros_are_none
from test_rssm import assert_near, make, outputs_and_gradients, served, window
from torch.nn import functional

import pywm
from pywm.models import RSSM, RSSMConfig, RSSMState
from pywm.ops import Layer, _native, _operands, reference_rssm, rssm_products

CXX = os.environ.get("CXX", "g++")
CELLS = ("block_gru", "layernorm_gru")
T, N = 64, 3
SIZES = {"deter": 48, "hidden": 40, "stoch": 6, "classes": 7}


@pytest.fixture(autouse=True)
def one_thread():
    """Small sizes: a team would wait for its members most of the time. Two threads have a test of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact_sums(monkeypatch):
    """Keep torch's own products from rounding their sums, as they do on CPUs with the instructions; ours never do."""
    monkeypatch.setattr(_native, "has_bfloat16_instructions", lambda: False)


def ways():
    """The kernels of the CPU, and what GPUs do."""
    return {"kernels": _operands.forced, "products": rssm_products.forced}


def in_single(inputs):
    return {
        k: RSSMState(*(y.float() for y in x)) if k == "state" else x.float() if x.is_floating_point() else x
        for k, x in inputs.items()
    }


def errors(got, want):
    """Norms of the differences by those of what is wanted, from the largest on."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True) if b is not None]
    return sorted([((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in pairs], reverse=True)


def together(gradients):
    return [torch.cat([g.double().flatten() for g in gradients if g is not None])]


def assert_within_bfloat16(got, exact):
    """Outputs and the whole gradient within a hundredth; the gradient of a single tensor may be the worst of twenty."""
    assert errors(got[0], exact[0])[0] < 1e-2
    assert errors(together(got[1]), together(exact[1]))[0] < 1e-2
    assert errors(got[1], exact[1])[0] < 2e-2


def observed(cell, operands, dtype=torch.float32):
    """Outputs and gradients of a window of 64 steps under forced samples."""
    model = make(cell, dtype=dtype, operands=operands, **SIZES)
    inputs = window(model, T, N, resets=0.03)
    force = torch.randint(7, (T, N, 6), generator=torch.Generator().manual_seed(3))
    inputs = inputs if dtype == torch.float64 else in_single(inputs)
    return outputs_and_gradients(model, inputs, force_stoch=force)[:2]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("exact_sums")
def test_a_window_of_64_is_near_the_float64_reference(cell):
    with _native.disabled():
        exact = observed(cell, "float32", torch.float64)
        rounded = observed(cell, "bfloat16")
    single = observed(cell, "float32")
    assert_within_bfloat16(rounded, exact)
    for name, way in ways().items():
        before = served("rssm_observe"), served("rssm_observe_backward")
        with way():
            got = observed(cell, "bfloat16")
        count = int(name == "kernels")
        assert (served("rssm_observe"), served("rssm_observe_backward")) == (
            before[0] + count,
            before[1] + count,
        )
        assert_within_bfloat16(got, exact)
        # A sum in another order can round another way.
        assert errors(got[0], rounded[0])[0] < 2e-3
        assert errors(together(got[1]), together(rounded[1]))[0] < 2e-3
        assert errors(got[0], single[0])[2] > 1e-3  # all outputs but the samples, which are forced
        assert errors(got[1], single[1])[-2] > 1e-3  # and all gradients but the last bias's, a sum of ours


def both(model, call, way):
    with way():
        got = call(model)
    with _native.disabled():
        want = call(model)
    return got, want


@pytest.mark.parametrize("cell", ["block_gru", "layernorm_gru", "gru", "gru_block"])
@pytest.mark.parametrize("classes", [5, 0])
@pytest.mark.parametrize("name", ways())
@pytest.mark.usefixtures("exact_sums")
def test_a_step_equals_the_rounded_reference(cell, classes, name):
    if name == "products" and (cell not in CELLS or classes == 0):
        pytest.skip("GPUs go step by step there")
    way = ways()[name]
    # Odd sizes: half a pair, and panels that are not full.
    model = make(cell, classes, deter=36, hidden=13, stoch=3, operands="bfloat16", dtype=torch.float32)
    inputs = in_single(window(model, 1, 29))
    got, want = both(model, lambda m: outputs_and_gradients(m, inputs), way)
    assert errors(got[0], want[0])[0] < 1e-3
    assert (
        errors(got[1], want[1])[0] < 4e-3
    )  # some numbers lie where a sum in another order rounds another way
    with _native.disabled():
        single = make(cell, classes, deter=36, hidden=13, stoch=3, dtype=torch.float32)
        assert not torch.allclose(outputs_and_gradients(single, inputs)[0][0], want[0][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sequences", [3, 40])
def test_a_team_equals_one_thread(sequences):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = make(deter=272, hidden=33, operands="bfloat16", dtype=torch.float32)
        with _operands.forced():
            results.append(outputs_and_gradients(model, in_single(window(model, 3, sequences))))
    assert errors(results[0][0], results[1][0])[0] < 1e-3
    assert errors(results[0][1], results[1][1])[0] < 2e-3


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["categorical", "normal"])
@pytest.mark.usefixtures("exact_sums")
def test_imagination_and_its_gradients(cell, kind):
    H = 5
    cases = []
    for operands, dtype in (("bfloat16", torch.float32), ("float32", torch.float64)):
        model, policy, state, options = case(cell, 5, kind, H, 40, dtype, operands=operands)
        g = torch.Generator().manual_seed(4)
        options["force_stoch"] = torch.randint(5, (H, 40, 3), generator=g)
        if kind == "categorical":
            taken = torch.randint(2, (H, 40), generator=g)
            options["force_action"] = functional.one_hot(taken, 2).to(dtype)
        cases.append((model, policy, state, H, options))
    with _native.disabled():
        rounded, exact = (run(*each, path="steps") for each in cases)
    with _operands.forced():
        got = run(*cases[0])
    got, rounded, exact = ((outputs, zeros_are_none(grads)) for outputs, grads in (got, rounded, exact))
    assert_within_bfloat16(got, exact)
    assert errors(got[0], rounded[0])[0] < 1e-3
    assert errors(got[1], rounded[1])[0] < 2e-3


@pytest.mark.usefixtures("exact_sums")
def test_imagination_of_gpus():
    model = make(operands="bfloat16", dtype=torch.float32, action=7).requires_grad_(False)
    _, policy, state, options = case("block_gru", 5, "categorical", 3, 9, torch.float32, action=7)
    for layer in policy.layers:
        for x in layer:
            if x is not None:
                x.requires_grad_(False)
    options["force_stoch"] = torch.randint(5, (3, 9, 3), generator=torch.Generator().manual_seed(4))
    with _native.disabled():
        want = model.imagine(policy, state, 3, **options)
    for way, path in ((rssm_products.forced, "products"), (_operands.forced, "kernel")):
        with way():
            got = model.imagine(policy, state, 3, **options)
        assert got.path == path
        assert torch.equal(got.action, want.action)
        assert_near([got.deter, got.prior, got.policy], [want.deter, want.prior, want.policy], 2e-3)


def test_torchs_own_bfloat16_products(monkeypatch):
    """What CPUs with the instructions do outside the scan: torch rounds the results too."""
    monkeypatch.setattr(_native, "has_bfloat16_instructions", lambda: True)
    got = observed("block_gru", "bfloat16")
    with rssm_products.forced():
        products = observed("block_gru", "bfloat16")
    with _native.disabled():
        exact = observed("block_gru", "float32", torch.float64)
    for each in (got, products):
        assert_within_bfloat16(each, exact)


@pytest.mark.usefixtures("exact_sums")
def test_the_reference_rounds_both_operands_of_every_product():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 7, generator=g, requires_grad=True), torch.randn(3, 7, generator=g)
    weight.requires_grad_()
    bias, grad = torch.randn(3, generator=g, requires_grad=True), torch.randn(5, 3, generator=g)
    y = reference_rssm.linear(x, Layer(weight, bias), "bfloat16")
    of_x, of_weight, of_bias = torch.autograd.grad(y, (x, weight, bias), grad)
    a, b, d = (t.detach().bfloat16().float() for t in (x, weight, grad))
    torch.testing.assert_close(y, a @ b.t() + bias)
    torch.testing.assert_close(of_x, d @ b)
    torch.testing.assert_close(of_weight, d.t() @ a)
    torch.testing.assert_close(of_bias, grad.sum(0))
    fast = _operands.linear(x, Layer(weight, bias), "bfloat16")
    again = torch.autograd.grad(fast, (x, weight, bias), grad)
    for got, want in zip((fast, *again), (y, of_x, of_weight, of_bias), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_reference_can_be_transformed():
    x, weight = torch.randn(4, 5, 7), torch.randn(3, 7)

    def product(x):
        return reference_rssm.product(x, weight, "bfloat16")

    torch.testing.assert_close(torch.vmap(product)(x), product(x))
    y, tangent = torch.func.jvp(product, (x[0],), (x[1],))
    torch.testing.assert_close(y, product(x[0]))
    rounded = weight.bfloat16().float()
    torch.testing.assert_close(tangent, x[1] @ rounded.t())


@pytest.mark.skipif(_native.has_bfloat16_instructions(), reason="this CPU has bfloat16 instructions")
def test_a_cpu_without_the_instructions_multiplies_in_float32():
    inputs = in_single(window(make(), 3, 2))
    results = []
    for operands in ("bfloat16", "float32"):
        model = make(dtype=torch.float32, operands=operands)
        results.append(outputs_and_gradients(model, inputs))
    for got, want in zip([*results[0][0], *results[0][1]], [*results[1][0], *results[1][1]], strict=True):
        assert torch.equal(got, want)
    assert pywm.backend(inputs["embed"]).why.endswith(
        "without bfloat16 instructions: such operands stay float32"
    )


def test_a_single_step_stays_float32():
    models = [make(dtype=torch.float32, operands=operands) for operands in ("bfloat16", "float32")]
    inputs = in_single(window(models[0], 1, 2))
    steps = []
    for context in (contextlib.nullcontext, _operands.forced, _native.disabled):
        for model in models:
            with context():
                rows = inputs["prev_action"][0], inputs["embed"][0], inputs["is_first"][0]
                steps.append(model.step(inputs["state"], *rows, noise=inputs["noise"][0]).deter)
    for got, want in zip(steps[::2], steps[1::2], strict=True):
        assert torch.equal(got, want)


def test_what_goes_step_by_step_stays_float32():
    results = []
    for operands in ("bfloat16", "float32"):
        model = make(dtype=torch.float32, operands=operands)
        other = make("gru", dtype=torch.float32, operands=operands)
        inputs = in_single(window(model, 3, 2))
        force = torch.zeros(2, 2, 3, dtype=torch.uint8)
        with _operands.forced():
            imagined = model.imagine(lambda feat: feat[:, :2], inputs["state"], 2, force_stoch=force)
        with rssm_products.forced():
            observed = other.observe(**inputs)
        assert imagined.path == "steps"
        results.append([imagined.deter, imagined.prior, observed.deter, observed.prior])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_a_changed_weight_is_seen_at_once():
    model = make(operands="bfloat16", dtype=torch.float32)
    inputs = in_single(window(model, 3, 2))
    for way in ways().values():
        with way():
            before = model.observe(**inputs).deter
            with torch.no_grad():
                model.gates.weight.mul_(1.5)
            after = model.observe(**inputs).deter
        assert (before - after).abs().max() > 1e-3


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no {CXX}")
def test_the_instructions_by_their_definition(tmp_path):
    """The code of processors with AVX512-BF16, whose intrinsics a header of ours defines."""
    here = Path(__file__).parent / "pairs"
    if not (here / "../../../csrc").is_dir():
        pytest.skip("compiled from a checkout")
    program = tmp_path / "pairs"
    flags = ["-std=c++20", "-O1", "-Wno-psabi", "-D__AVX512F__", "-D__AVX512BF16__", f"-I{here}"]
    subprocess.run([CXX, *flags, here / "pairs.cpp", "-o", program], check=True)
    count, largest = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert int(count) == 2 * 6 * 3 * 3 * 2
    assert float(largest) < 3e-5


def test_what_is_refused():
    with pytest.raises(
        ValueError, match="RSSMConfig: operands is 'float16', but one of float32, bfloat16 was"
    ):
        RSSMConfig(deter=8, hidden=4, operands="float16")
    model = make(operands="bfloat16")
    inputs = window(model, 2, 2)
    said = "is torch.float64, but torch.float32 was expected, as the operands are bfloat16"
    with pytest.raises(TypeError, match=f"rssm_observe: embed {said}"):
        model.observe(**inputs)
    with pytest.raises(TypeError, match=f"rssm_step: prev_action {said}"):
        model.step(inputs["state"], inputs["prev_action"][0], inputs["embed"][0])
    _, policy, *_ = case("block_gru", 5, "categorical", 1, 1)
    with pytest.raises(TypeError, match=f"imagine: state.deter {said}"):
        model.imagine(policy, inputs["state"], 2)
    assert RSSM(RSSMConfig(deter=16, hidden=4)).config.operands == "float32"
