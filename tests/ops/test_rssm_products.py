"""The way of GPUs: scans of products and row kernels against the reference, and recordings that are played again."""

import itertools
import sys

import pytest
import torch
from test_rssm import FORMS, assert_near, floats, make, outputs_and_gradients, policy_of, window

import pywm
from pywm.models import RSSMState
from pywm.ops import _native, cuda_graphs, rssm_products
from pywm.ops.cuda_graphs import Graphs

CELLS = rssm_products.CELLS
forms = pytest.mark.parametrize(("cell", "form"), list(itertools.product(CELLS, FORMS[:2])), ids=str)


def on(device, inputs):
    return {
        k: RSSMState(*(y.to(device) for y in x)) if k == "state" else x.to(device) for k, x in inputs.items()
    }


@forms
@pytest.mark.parametrize(("T", "N"), [(4, 3), (1, 1), (3, 40), (17, 5)])
@pytest.mark.parametrize("forced", [False, True])
def test_observe_equals_the_reference(device, cell, form, T, N, forced):
    model = make(cell, 5, form).to(device)
    inputs = on(device, window(model, T, N))
    g = torch.Generator().manual_seed(4)
    options = {"force_stoch": torch.randint(5, (T, N, 3), generator=g).to(device)} if forced else {}
    with _native.disabled():
        want = outputs_and_gradients(model, inputs, **options)
    with rssm_products.forced():
        for _ in range(3):  # on a GPU: as it is, recorded, played
            got = outputs_and_gradients(model, inputs, **options)
            assert_near(got[0], want[0], 1e-11)
            assert_near(got[1], want[1], 1e-10)
            assert torch.equal(got[2], want[2])


def test_gradients_that_nobody_sends():
    model = make()
    inputs = window(model, 5, 3)
    for name in ("deter", "stoch", "posterior", "prior"):
        grads = []
        for way in (rssm_products.forced(), _native.disabled()):
            with way:
                x = getattr(model.observe(**inputs), name)
                weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
                grads.append(torch.autograd.grad(x, list(model.parameters()), weight, allow_unused=True))
        got, want = ([torch.zeros(()) if g is None else g for g in side] for side in grads)
        assert_near([a * torch.ones_like(b) for a, b in zip(got, want, strict=True)], want, 1e-10)


@forms
@pytest.mark.parametrize("kind", ["categorical", "normal", "tanh_normal"])
@pytest.mark.parametrize("start", ["floats", "classes"])
def test_imagine_equals_the_reference(device, cell, form, kind, start):
    model = make(cell, 5, form).requires_grad_(False).to(device)
    policy = policy_of(model, kind)
    H, N = 4, 21
    state = on(device, window(model, 1, N))["state"]
    if start == "classes":
        state = RSSMState(state.deter, state.stoch.argmax(-1).to(torch.uint8))
    g = torch.Generator().manual_seed(2)
    draw = torch.rand if kind == "categorical" else torch.randn
    options = {
        "noise": torch.rand(H, N, 3, generator=g, dtype=torch.float64).to(device),
        "action_noise": draw(H, N, policy.noise, generator=g, dtype=torch.float64).to(device),
    }
    with _native.disabled():
        want = model.imagine(policy, state, H, **options)
    for _ in range(3):
        with rssm_products.forced():
            got = model.imagine(policy, state, H, **options)
        assert (got.path, want.path) == ("products", "steps")
        assert_near(
            [got.deter, got.stoch, got.action, *floats(got.prior), got.policy],
            [want.deter, want.stoch, want.action, *floats(want.prior), want.policy],
            1e-11,
        )
        assert torch.equal(got.index, want.index)


def test_imagine_under_forced_samples_actions_and_several_groups():
    model = make(action=7).requires_grad_(False)
    policy = policy_of(model)
    policy = pywm.ops.Policy(policy.layers, classes=(4, 3), norm=policy.norm, act=policy.act)
    state = model.initial(6)
    g = torch.Generator().manual_seed(4)
    forced = {
        "force_stoch": torch.randint(5, (3, 6, 3), generator=g),
        "force_action": torch.randn(3, 6, 7, generator=g, dtype=torch.float64),
    }
    for options in (forced, {"seed": 5}):
        with rssm_products.forced():
            got = model.imagine(policy, state, 3, **options)
        want = model.imagine(policy, state, 3, **options)
        assert (got.path, want.path) == ("products", "kernel")
        assert_near(
            [got.deter, got.action, got.prior, got.policy],
            [want.deter, want.action, want.prior, want.policy],
            1e-11,
        )


def test_other_models_go_step_by_step():
    for cell, classes, form in (("gru", 5, FORMS[0]), ("block_gru", 0, FORMS[0]), ("block_gru", 5, FORMS[2])):
        model = make(cell, classes, form)
        inputs = window(model, 3, 2)
        with rssm_products.forced():
            got = outputs_and_gradients(model, inputs)
        with _native.disabled():
            want = outputs_and_gradients(model, inputs)
        assert_near(got[0], want[0], 1e-12)


# ---- recordings ----------------------------------------------------------------------------------------------------------


class Recorder:
    """Plays a recording by calling the function again into the same memory, as a graph does."""

    def __init__(self):
        self.recorded = self.played = 0
        self.fails = False

    def __call__(self, call):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.recorded += 1
        outputs = call()
        for x in outputs:
            x.fill_(77)  # a recording computes nothing

        def play():
            self.played += 1
            for mine, made in zip(outputs, call(), strict=True):
                mine.copy_(made)

        return outputs, play


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    found = Graphs(made)
    for module in ("rssm_scan", "imagine"):  # the latter's name in the package is the function's
        monkeypatch.setattr(sys.modules[f"pywm.ops.{module}"], "graphs", found)
    made.graphs = found
    return made


def test_recordings_are_played_with_new_inputs_and_weights(recorder):
    model = make()
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    before = None
    for i in range(6):
        inputs = window(model, 4, 3, seed=i)
        with _native.disabled():
            want = outputs_and_gradients(model, inputs)
        with rssm_products.forced():
            got = outputs_and_gradients(model, inputs)
        assert_near(got[0], want[0], 1e-11)
        assert_near(got[1], want[1], 1e-10)
        if before is not None:
            assert_near(before[0], before[1], 0.0 + 1e-30)  # the call before keeps what it got
        before = got[0], [x.clone() for x in got[0]]
        if i % 3 == 0:
            for p, g in zip(model.parameters(), got[1][4:], strict=True):
                p.grad = g
            optimiser.step()
        elif i % 3 == 1:
            model.load_state_dict({k: x + 0.1 for k, x in model.state_dict().items()})
        else:
            with torch.no_grad():
                next(model.parameters()).mul_(0.5)
    assert recorder.recorded == 2  # forward and backward, once each
    assert recorder.played == 2 * 5


def test_recordings_round_the_weights_as_they_are(recorder):
    model = make(operands="bfloat16", dtype=torch.float32)
    inputs = {
        k: RSSMState(*(y.float() for y in x)) if k == "state" else x.float() if x.is_floating_point() else x
        for k, x in window(model, 4, 3).items()
    }
    found = []
    with torch.no_grad(), rssm_products.forced():
        for _ in range(4):
            found.append(model.observe(**inputs).deter)
            model.gates.weight.mul_(1.5)
        assert recorder.played == 3
        model.gates.weight.div_(1.5**4)
        recorder.graphs.clear()
        for got in found:
            assert_near([got], [model.observe(**inputs).deter], 1e-2)
            model.gates.weight.mul_(1.5)
    assert all((a - b).abs().max() > 0.05 for a, b in itertools.pairwise(found))


def test_other_shapes_forms_and_weights_have_recordings_of_their_own(recorder):
    models = [make(), make(), make(form=("layer", "elu"))]
    with rssm_products.forced(), torch.no_grad():
        for _ in range(2):
            for model in models:
                for T in (2, 3):
                    model.observe(**window(model, T, 2))
    assert recorder.recorded == 6
    replaced = torch.nn.Parameter(torch.zeros_like(models[0].params().gates.weight))
    with torch.no_grad(), rssm_products.forced():
        want = models[0].observe(**window(models[0], 2, 2)).deter.clone()
        owner, name = next(
            (m, n)
            for m in models[0].modules()
            for n, p in m.named_parameters(recurse=False)
            if p is models[0].params().gates.weight
        )
        setattr(owner, name, replaced)
        assert not torch.equal(models[0].observe(**window(models[0], 2, 2)).deter, want)


def test_the_least_recently_used_make_room(recorder):
    model = make()
    with rssm_products.forced(), torch.no_grad():
        for _ in range(2):
            for T in range(1, cuda_graphs.MOST + 1):
                model.observe(**window(model, T, 2))
        assert recorder.recorded == cuda_graphs.MOST
        for T in range(20, 24):
            model.observe(**window(model, T, 2))
        model.observe(**window(model, 1, 2))
        model.observe(**window(model, 1, 2))
        assert recorder.recorded == cuda_graphs.MOST + 1
    recorder.graphs.clear()
    assert not recorder.graphs._found


def test_what_cannot_be_recorded_runs_as_it_is(recorder, caplog):
    model = make()
    recorder.fails = True
    inputs = window(model, 3, 2)
    with _native.disabled():
        want = model.observe(**inputs).deter
    with rssm_products.forced(), torch.no_grad():
        for _ in range(4):
            assert_near([model.observe(**inputs).deter], [want], 1e-11)
    assert recorder.graphs.why_not == (
        "recording rssm_observe failed: operation not permitted when stream is capturing"
    )
    assert len(caplog.records) == 1


def test_the_backend_says_whether_scans_are_recorded(monkeypatch):
    assert _native._scans() == "scans recorded as CUDA graphs"
    monkeypatch.setattr(cuda_graphs.graphs, "why_not", "PYWM_CUDA_GRAPHS=0")
    assert _native._scans() == "scans launch by launch (PYWM_CUDA_GRAPHS=0)"


def test_recordings_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("PYWM_CUDA_GRAPHS", "0")
    recorder = Recorder()
    found = Graphs(recorder)
    for _ in range(3):
        (y,) = found.run("double", (), lambda x: [2 * x], [], [torch.ones(2)])
        assert torch.equal(y, torch.full((2,), 2.0))
    assert not recorder.recorded


def test_recordings_of_imagination(recorder):
    model = make().requires_grad_(False)
    policy = policy_of(model)
    for i in range(4):
        state = window(model, 1, 5, seed=i)["state"]
        with _native.disabled():
            want = model.imagine(policy, state, 3, seed=i)
        with rssm_products.forced():
            got = model.imagine(policy, state, 3, seed=i)
        assert_near([got.deter, got.action], [want.deter, want.action], 1e-11)
    assert (recorder.recorded, recorder.played) == (1, 3)
