"""Recurrent state-space models: compiled kernels against the references, resets, windows, gradients, bad input."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import pywm
from pywm.models import RSSM, SIZES, RSSMConfig, RSSMState
from pywm.ops import Layer, Policy, _native

CELLS = ("block_gru", "layernorm_gru", "gru", "gru_block")
FORMS = [("rms", "silu"), ("layer", "elu"), ("none", "relu")]
forms = pytest.mark.parametrize(
    ("cell", "classes", "form"), list(itertools.product(CELLS, (5, 0), FORMS)), ids=str
)


def make(cell="block_gru", classes=5, form=("rms", "silu"), dtype=torch.float64, **sizes):
    options = {"deter": 24, "hidden": 18, "stoch": 3, "embed": 7, "action": 2, "blocks": 4, **sizes}
    config = RSSMConfig(cell=cell, classes=classes, norm=form[0], act=form[1], **options)
    g = torch.Generator().manual_seed(0)
    model = RSSM(config, generator=g).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # biases and scales that differ, so that a mix-up shows
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype))
    return model


def window(model, T, N, dtype=torch.float64, seed=1, resets=0.2):
    c, g = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    stoch = (N, c.stoch) if c.is_gaussian else (N, c.stoch, c.classes)
    uniform = torch.rand(T, N, c.stoch, generator=g, dtype=torch.float64).to(dtype)
    return {
        "embed": normal(T, N, c.embed),
        "prev_action": 1.5 * normal(T, N, c.action),
        "is_first": torch.rand(T, N, generator=g) < resets,
        "state": RSSMState(normal(N, c.deter), normal(*stoch)),
        "noise": normal(T, N, c.stoch) if c.is_gaussian else uniform,
    }


def in_float32(inputs):
    return {
        k: RSSMState(*(y.float() for y in x)) if k == "state" else x.float() if x.is_floating_point() else x
        for k, x in inputs.items()
    }


def floats(x):
    return list(x) if isinstance(x, tuple) else [x]


def outputs_and_gradients(model, inputs, **options):
    """All outputs, and the gradients of a random mixture of them in everything that has one."""
    inputs = dict(inputs)
    deter, stoch = (x.clone().requires_grad_() for x in inputs["state"])
    inputs["state"] = RSSMState(deter, stoch)
    for name in ("embed", "prev_action"):
        inputs[name] = inputs[name].clone().requires_grad_()
    result = model.observe(**inputs, **options)
    outputs = [result.deter, result.stoch, *floats(result.posterior), *floats(result.prior)]
    g = torch.Generator().manual_seed(7)
    loss = sum(
        (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in outputs
    )
    leaves = [inputs["embed"], inputs["prev_action"], deter, stoch, *model.parameters()]
    return outputs, torch.autograd.grad(loss, leaves, allow_unused=True), result.index


def assert_near(got, want, tol):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            scale = b.abs().max().clamp(min=1e-3)
            assert ((a - b).abs().max() / scale).item() < tol


def served(name):
    return _native.calls()[name][0]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@forms
@pytest.mark.parametrize(("T", "N"), [(4, 3), (1, 1), (3, 40)])
def test_observe_equals_the_reference(cell, classes, form, T, N, threads):
    model = make(cell, classes, form)
    inputs = window(model, T, N)
    before = served("rssm_observe"), served("rssm_observe_backward")
    got = outputs_and_gradients(model, inputs)
    assert (served("rssm_observe"), served("rssm_observe_backward")) == (before[0] + 1, before[1] + 1)
    with _native.disabled():
        want = outputs_and_gradients(model, inputs)
    assert_near(got[0], want[0], 1e-12)
    assert_near(got[1], want[1], 1e-11)
    if classes:
        assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("cell", CELLS)
def test_float32_over_a_long_window_under_forced_samples(cell):
    T, N = 64, 3
    model = make(cell, deter=48, hidden=40, stoch=6, classes=7)
    inputs = window(model, T, N, resets=0.03)
    g = torch.Generator().manual_seed(3)
    force = torch.randint(7, (T, N, 6), generator=g)
    with _native.disabled():
        want = outputs_and_gradients(model, inputs, force_stoch=force)
    model = model.float()
    got = outputs_and_gradients(model, in_float32(inputs), force_stoch=force)
    assert_near([x.double() for x in got[0]], want[0], 1e-4)
    assert_near([x.double() for x in got[1]], want[1], 1e-4)
    assert torch.equal(got[2], force.to(torch.uint8))


@pytest.mark.parametrize("N", [1, 3, 8, 70])
@pytest.mark.parametrize("cell", CELLS)
def test_float32_of_a_single_step_under_forced_samples(cell, N):
    model = make(cell, deter=48, hidden=40, stoch=6, classes=7)
    inputs = window(model, 1, N, resets=0.3)
    force = torch.randint(7, (1, N, 6), generator=torch.Generator().manual_seed(3))
    with _native.disabled():
        want, want_grads, _ = outputs_and_gradients(model, inputs, force_stoch=force)
    model = model.float()
    single = in_float32(inputs)
    got, grads, _ = outputs_and_gradients(model, single, force_stoch=force)
    assert_near([x.double() for x in got], want, 1e-5)
    assert_near([x.double() for x in grads], want_grads, 1e-5)
    state = single.pop("state")
    del single["noise"]
    with torch.no_grad():
        step = model.step(state, **{k: x[0] for k, x in single.items()}, force_stoch=force[0])
    assert_near([step.deter.double(), step.posterior.double()], [want[0][0], want[2][0]], 1e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("classes", [3, 0])
def test_gradcheck_of_the_kernel(cell, classes):
    model = make(cell, classes, deter=4, hidden=3, stoch=1, embed=2, action=1, blocks=2)
    # Straight-through gradients are no derivatives: with classes only the row before the first sample can be checked.
    T = 1 if classes else 2
    inputs = window(model, T, 2)
    inputs["prev_action"] = inputs["prev_action"].tanh()  # beyond 1 the bound's denominator is held constant
    force = torch.randint(classes, (T, 2, 1)) if classes else None
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach().requires_grad_() for p in model.parameters()]

    def run(embed, action, deter, stoch, *values):
        for name, value in zip(names, values, strict=True):
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = value
        state = RSSMState(deter, stoch)
        options = {"noise": inputs["noise"], "force_stoch": force}
        result = model.observe(embed, action, inputs["is_first"], state, **options)
        return result.deter, *floats(result.posterior)

    leaves = [x.requires_grad_() for x in (inputs["embed"], inputs["prev_action"], *inputs["state"])]
    before = served("rssm_observe_backward")
    assert torch.autograd.gradcheck(run, (*leaves, *parameters), atol=1e-6)
    assert served("rssm_observe_backward") > before


def test_two_episodes_in_one_window_equal_two_runs():
    model = make()
    inputs = window(model, 9, 2, resets=0)
    inputs["is_first"][4] = True
    whole = model.observe(**inputs)
    second = {k: x if k == "state" else x[4:] for k, x in inputs.items()}
    second["state"] = model.initial(2)
    alone = model.observe(**second)
    assert torch.equal(whole.deter[4:], alone.deter)
    assert torch.equal(whole.index[4:], alone.index)


def test_a_window_of_64_equals_two_of_32_with_the_state_carried():
    model = make(dtype=torch.float32)
    inputs = window(model, 64, 3, torch.float32, resets=0.05)
    whole = model.observe(**inputs)
    first = model.observe(**{k: x if k == "state" else x[:32] for k, x in inputs.items()})
    rest = {k: x if k == "state" else x[32:] for k, x in inputs.items()}
    for state in (first.state, RSSMState(first.deter[-1], first.index[-1])):
        rest["state"] = state
        second = model.observe(**rest)
        torch.testing.assert_close(torch.cat([first.deter, second.deter]), whole.deter, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.cat([first.index, second.index]), whole.index)


@pytest.mark.parametrize("cell", CELLS)
def test_steps_equal_a_window(cell):
    model = make(cell)
    inputs = window(model, 5, 3)
    whole = model.observe(**inputs)
    state = inputs["state"]
    for t in range(5):
        step = model.step(
            state,
            inputs["prev_action"][t],
            inputs["embed"][t],
            inputs["is_first"][t],
            noise=inputs["noise"][t],
        )
        torch.testing.assert_close(step.deter, whole.deter[t], rtol=1e-12, atol=1e-12)
        assert torch.equal(step.index, whole.index[t])
        assert step.prior is None
        state = step.state


def test_resets_ignore_what_was_before():
    model = make()
    inputs = window(model, 2, 3, resets=0)
    inputs["is_first"][:] = True
    want = model.observe(**inputs)
    inputs["state"] = RSSMState(inputs["state"].deter * float("nan"), inputs["state"].stoch * float("nan"))
    inputs["prev_action"] = inputs["prev_action"] * float("nan")
    got = model.observe(**inputs)
    assert torch.equal(got.deter, want.deter)
    assert torch.equal(got.index, want.index)


@pytest.mark.parametrize("classes", [5, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_ignore_what_a_reset_drops(cell, classes):
    model = make(cell, classes)
    inputs = window(model, 2, 3, resets=0)
    inputs["is_first"][:] = True
    want = outputs_and_gradients(model, inputs)
    inputs["state"] = RSSMState(*(x * float("nan") for x in inputs["state"]))
    got = outputs_and_gradients(model, inputs)
    assert_near(got[0], want[0], 1e-14)
    assert_near(got[1], want[1], 1e-14)


def missing(result):
    return [x.isnan() for x in (result.deter, result.stoch, *floats(result.prior))]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("classes", [5, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_spreads_as_in_the_reference(cell, classes, value):
    model = make(cell, classes)
    inputs = window(model, 5, 3, resets=0)
    inputs["is_first"][3, 1] = True
    inputs["embed"][1, :2] = value  # two sequences, one of which begins anew later
    with torch.no_grad():
        got = missing(model.observe(**inputs))
        with _native.disabled():
            want = missing(model.observe(**inputs))
    assert want[0][2:, 0].all()
    assert not want[0][3:, 1].any()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_a_policy_spreads_as_in_the_reference(cell):
    model = make(cell)
    inputs = window(model, 1, 4)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, model.config.feat, generator=g, dtype=torch.float64)
    policy = Policy(
        (Layer(hidden), Layer(torch.full((2, 6), float("nan"), dtype=torch.float64))), norm="none"
    )
    noise = {"noise": torch.rand(3, 4, 3, generator=g).double(), "action_noise": torch.rand(3, 4, 1).double()}
    with torch.no_grad():
        got = model.imagine(policy, inputs["state"], 3, **noise)
        with _native.disabled():
            want = model.imagine(policy, inputs["state"], 3, **noise)
    assert got.path == "kernel"
    assert got.action.isnan().all()
    for a, b in ((got.deter, want.deter), (got.stoch, want.stoch), (got.action, want.action)):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_says_nan_with_and_without_gradients(cell):
    model = make(cell)
    inputs = window(model, 1, 2)
    inputs["embed"][0, 0] = float("nan")
    step = {k: x if k == "state" else x[0] for k, x in inputs.items()}
    state = step.pop("state")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            result = model.step(state, **step)
        assert result.stoch[0].isnan().all()
        assert not result.stoch[1].isnan().any()


@pytest.mark.parametrize(("N", "deter", "stoch", "classes"), [(1, 40, 3, 3), (17, 24, 2, 7), (3, 136, 1, 33)])
def test_odd_sizes(N, deter, stoch, classes, threads):
    model = make(deter=deter, stoch=stoch, classes=classes, blocks=8, hidden=13)
    inputs = window(model, 3, N)
    got = outputs_and_gradients(model, inputs)
    with _native.disabled():
        want = outputs_and_gradients(model, inputs)
    assert_near(got[0], want[0], 1e-12)
    assert_near(got[1], want[1], 1e-11)


@pytest.mark.parametrize("cell", ["layernorm_gru", "gru", "gru_block"])
def test_only_cells_with_blocks_need_a_multiple_of_them(cell):
    model = make(cell, deter=21, blocks=8)
    inputs = window(model, 3, 2)
    got = outputs_and_gradients(model, inputs)
    imagined = model.imagine(policy_of(model), inputs["state"], 2, seed=1)
    with _native.disabled():
        want = outputs_and_gradients(model, inputs)
        again = model.imagine(policy_of(model), inputs["state"], 2, seed=1)
    assert_near(got[0], want[0], 1e-12)
    assert_near(got[1], want[1], 1e-11)
    assert_near([imagined.deter], [again.deter], 1e-12)
    with pytest.raises(
        ValueError, match="RSSMConfig: deter is 21, but a multiple of blocks, 8, was expected"
    ):
        make("block_gru", deter=21, blocks=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [5, 0])
def test_a_seed_serves_models_of_lower_precision(classes, dtype):
    model = make(classes=classes, dtype=dtype).requires_grad_(False)
    inputs = window(model, 2, 3, dtype)
    del inputs["noise"]
    observed = model.observe(**inputs, seed=3)
    assert observed.deter.dtype == dtype
    assert observed.deter.isfinite().all()
    step = model.step(inputs["state"], inputs["prev_action"][0], inputs["embed"][0], seed=3)
    imagined = model.imagine(lambda feat: feat[:, :2], inputs["state"], 2, seed=3)
    assert step.deter.dtype == imagined.deter.dtype == dtype


ISA = """
import sys
sys.path.insert(0, sys.argv[1])
import test_rssm
from pywm.ops import _native
print(_native.module().cpu_isa())
for cell in test_rssm.CELLS:
    for classes in (5, 0):
        test_rssm.test_observe_equals_the_reference(cell, classes, ("layer", "elu"), 4, 3, 2)
    test_rssm.test_float32_over_a_long_window_under_forced_samples(cell)
    test_rssm.test_float32_of_a_single_step_under_forced_samples(cell, 8)
    test_rssm.test_nan_in_a_policy_spreads_as_in_the_reference(cell)
"""


@pytest.mark.parametrize("isa", _native.module().cpu_isas().split() if _native.has_backend("cpu") else [])
def test_every_instruction_set(isa):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ISA, os.path.dirname(__file__)],
        env={**os.environ, "PYWM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [isa]


def test_no_sequences():
    model = make()
    result = model.observe(**window(model, 3, 0))
    assert result.deter.shape == (3, 0, 24)
    assert result.index.shape == (3, 0, 3)


def test_strided_inputs():
    model = make()
    inputs = window(model, 4, 3)
    want = outputs_and_gradients(model, inputs)
    wide = {
        k: x.transpose(0, 1).contiguous().transpose(0, 1) for k, x in inputs.items() if k not in ("state",)
    }
    got = outputs_and_gradients(model, {**wide, "state": inputs["state"]})
    assert_near(got[0], want[0], 1e-14)
    assert_near(got[1], want[1], 1e-14)


def test_frozen_parameters_get_no_gradient():
    model = make()
    inputs = window(model, 3, 2)
    model.gates.weight.requires_grad_(False)
    model.observe(**inputs).deter.sum().backward()
    assert model.gates.weight.grad is None
    assert model.hidden.weight.grad is not None
    for p in model.parameters():
        p.requires_grad_(False)
    assert not model.observe(**inputs).deter.requires_grad
    model = make()
    with torch.no_grad():
        assert not model.observe(**inputs).deter.requires_grad


def test_a_changed_weight_is_seen_at_once():
    model = make()
    inputs = window(model, 3, 2)
    before = model.observe(**inputs).deter
    with torch.no_grad():
        model.gates.weight.mul_(1.5)
    after = model.observe(**inputs).deter
    assert not torch.equal(before, after)
    with _native.disabled():
        torch.testing.assert_close(model.observe(**inputs).deter, after, rtol=1e-12, atol=1e-12)


def test_second_derivative_is_an_error():
    model = make()
    inputs = window(model, 2, 2)
    inputs["embed"].requires_grad_()
    first = torch.autograd.grad(
        model.observe(**inputs).deter.square().sum(), inputs["embed"], create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), inputs["embed"])


def test_every_element_is_written():
    model = make(dtype=torch.float32)
    inputs = window(model, 3, 5, torch.float32)
    _native.module().poison(True)
    try:
        outputs, gradients, _ = outputs_and_gradients(model, inputs)
        imagined = model.imagine(policy_of(model), inputs["state"], 3)
    finally:
        _native.module().poison(False)
    for x in (*outputs, *gradients, imagined.deter, imagined.action, imagined.prior, imagined.policy):
        assert x.isfinite().all()


# ---- imagination ---------------------------------------------------------------------------------------------------------


def policy_of(model, kind="categorical", hidden=11, form=("rms", "silu"), seed=5):
    c, g = model.config, torch.Generator().manual_seed(seed)
    like = model.gates.weight
    outputs = c.action if kind == "categorical" else 2 * c.action

    def layer(out, inputs, norm):
        def draw(*shape):
            return torch.randn(shape, generator=g, dtype=torch.float64).to(like.dtype)

        scale = 1 + 0.2 * draw(out) if norm != "none" else None
        shift = 0.2 * draw(out) if norm == "layer" else None
        return Layer(draw(out, inputs) / inputs**0.5, 0.3 * draw(out), scale, shift)

    layers = (layer(hidden, c.feat, form[0]), layer(hidden, hidden, form[0]), layer(outputs, hidden, "none"))
    return Policy(layers, kind=kind, norm=form[0], act=form[1])


@forms
@pytest.mark.parametrize("kind", ["categorical", "normal", "tanh_normal"])
def test_imagine_equals_the_reference(cell, classes, form, kind, threads):
    model = make(cell, classes, form)
    model.requires_grad_(False)
    policy = policy_of(model, kind)
    H, N = 4, 53
    state = window(model, 1, N)["state"]
    g = torch.Generator().manual_seed(2)
    shape = (H, N, model.config.stoch)
    draw = torch.rand if classes else torch.randn
    draw_action = torch.rand if kind == "categorical" else torch.randn
    options = {
        "noise": draw(shape, generator=g, dtype=torch.float64),
        "action_noise": draw_action(H, N, policy.noise, generator=g, dtype=torch.float64),
    }
    got = model.imagine(policy, state, H, **options)
    with _native.disabled():
        want = model.imagine(policy, state, H, **options)
    assert (got.path, want.path) == ("kernel", "steps")
    assert_near(
        [got.deter, got.stoch, got.action, *floats(got.prior), got.policy],
        [want.deter, want.stoch, want.action, *floats(want.prior), want.policy],
        1e-11,
    )
    if classes:
        assert torch.equal(got.index[1:], want.index[1:])
    assert torch.equal(got.deter[0], state.deter)


def test_imagine_under_forced_samples_and_actions():
    model = make().requires_grad_(False)
    g = torch.Generator().manual_seed(4)
    state = model.initial(6)
    force = torch.randint(5, (3, 6, 3), generator=g)
    action = torch.randn(3, 6, 2, generator=g, dtype=torch.float64)
    got = model.imagine(policy_of(model), state, 3, force_stoch=force, force_action=action)
    assert got.path == "kernel"
    assert torch.equal(got.index[1:], force.to(torch.uint8))
    assert torch.equal(got.action, action)
    with _native.disabled():
        want = model.imagine(policy_of(model), state, 3, force_stoch=force, force_action=action)
    assert_near([got.deter, got.prior, got.policy], [want.deter, want.prior, want.policy], 1e-12)


def test_imagine_takes_any_function_and_says_so():
    model = make().requires_grad_(False)
    imagined = model.imagine(lambda feat: feat[:, :2].tanh(), model.initial(4), 5)
    assert imagined.path == "steps"
    assert imagined.policy is None
    assert imagined.action.shape == (5, 4, 2)
    assert imagined.feat.shape == (6, 4, 24 + 15)


def test_gradients_go_through_imagination_where_they_are_wanted():
    model = make(classes=0)
    policy = policy_of(model, "tanh_normal")
    weight = policy.layers[0].weight.requires_grad_()
    imagined = model.imagine(policy, model.initial(4), 3)
    assert imagined.path == "kernel"
    imagined.deter[-1].sum().backward()
    assert weight.grad.abs().max() > 0
    assert model.gates.weight.grad.abs().max() > 0


def test_imagine_from_classes_equals_imagine_from_their_one_hots():
    model = make().requires_grad_(False)
    state = model.observe(**window(model, 3, 4)).state
    index = state.stoch.argmax(-1).to(torch.uint8)
    noise = torch.rand(2, 4, 3, dtype=torch.float64)
    action_noise = torch.rand(2, 4, 1, dtype=torch.float64)
    options = {"noise": noise, "action_noise": action_noise}
    a = model.imagine(policy_of(model), state, 2, **options)
    b = model.imagine(policy_of(model), RSSMState(state.deter, index), 2, **options)
    assert torch.equal(a.deter, b.deter)
    assert torch.equal(a.index, b.index)


# ---- noise ---------------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_whatever_the_window():
    model = make(dtype=torch.float32)
    inputs = window(model, 6, 3, torch.float32)
    del inputs["noise"]
    whole = model.observe(**inputs, seed=11)
    assert torch.equal(whole.index, model.observe(**inputs, seed=11).index)
    assert not torch.equal(whole.index, model.observe(**inputs, seed=12).index)
    first = model.observe(**{k: x if k == "state" else x[:4] for k, x in inputs.items()}, seed=11)
    rest = {k: x if k == "state" else x[4:] for k, x in inputs.items()}
    second = model.observe(**{**rest, "state": first.state}, seed=11, offset=4)
    assert torch.equal(torch.cat([first.index, second.index]), whole.index)
    state = inputs["state"]
    step = model.step(state, *(inputs[k][0] for k in ("prev_action", "embed", "is_first")), seed=11)
    assert torch.equal(step.index, whole.index[0])


def test_states_and_actions_have_streams_of_their_own():
    model = make().requires_grad_(False)
    a = model.imagine(policy_of(model), model.initial(5), 3, seed=3)
    with _native.disabled():
        b = model.imagine(policy_of(model), model.initial(5), 3, seed=3)
    assert (a.path, b.path) == ("kernel", "steps")
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.action.round(), b.action.round())
    uniform = {"seed": 3, "offset": 0, "shape": (3, 5, 1), "dtype": torch.float64}
    assert not torch.equal(pywm.ops.philox_uniform(**uniform), pywm.ops.philox_uniform(**uniform, stream=1))


def test_noise_and_a_seed_exclude_each_other():
    model = make()
    with pytest.raises(ValueError, match="seed is 1, but None was expected, as noise was given"):
        model.observe(**window(model, 2, 2), seed=1)


# ---- the dispatcher ------------------------------------------------------------------------------------------------------


def test_autocast_leaves_the_model_in_full_precision():
    model = make(dtype=torch.float32).requires_grad_(False)
    inputs = window(model, 3, 2, torch.float32)
    want = model.observe(**inputs)
    imagined = model.imagine(policy_of(model), want.state, 2, seed=1)
    low = inputs["embed"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = model.observe(**inputs)
        again = model.imagine(policy_of(model), want.state, 2, seed=1)
        rounded = model.observe(**{**inputs, "embed": low})
        step = model.step(inputs["state"], inputs["prev_action"][0], low[0])
    assert torch.equal(got.deter, want.deter)
    assert torch.equal(again.deter, imagined.deter)
    assert rounded.deter.dtype == step.deter.dtype == torch.float32


def test_memory_does_not_grow():
    resource = pytest.importorskip("resource")
    model = make(dtype=torch.float32)
    inputs = window(model, 2, 2, torch.float32)

    def calls(n):
        for _ in range(n):
            outputs_and_gradients(model, inputs)
            with torch.no_grad():
                model.imagine(policy_of(model), inputs["state"], 2)

    calls(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(300)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB


# ---- the module ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "core", "prior", "posterior", "embed"),
    [
        ("size1m", 274432, 45440, 57600, 256),
        ("size12m", 4341760, 722432, 918528, 1024),
        ("size25m", 9756672, 1624320, 2065920, 1536),
        ("size50m", 17334272, 2886656, 3672064, 2048),
        ("size100m", 38977536, 6492672, 8260608, 3072),
        ("size200m", 69271552, 11540480, 14684160, 4096),
        ("size400m", 155811840, 25961472, 33036288, 6144),
    ],
)
def test_parameter_counts_are_those_of_the_paper(size, core, prior, posterior, embed):
    with torch.device("meta"):
        model = RSSM(RSSMConfig(**SIZES[size], embed=embed, action=18))
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    assert (count(model.prior), count(model.posterior)) == (prior, posterior)
    assert count(model) == core + prior + posterior


def test_initialisation_has_the_published_spread():
    model = RSSM(
        RSSMConfig(deter=512, hidden=64, classes=4, embed=64, action=4),
        generator=torch.Generator().manual_seed(0),
    )
    for part, inputs in ((model.deter_in, 512), (model.gates, 512), (model.hidden, 512 + 8 * 3 * 64)):
        assert part.weight.std().item() == pytest.approx(inputs**-0.5, rel=0.05)
        assert part.weight.abs().max().item() < 2.3 * inputs**-0.5
    assert model.gates.bias.abs().max() == 0
    assert (model.hidden.scale == 1).all()


def test_kl_halves_move_their_own_side_only():
    model = make()
    q, p = (torch.randn(3, 2, 3, 5, dtype=torch.float64).mul(3).requires_grad_() for _ in range(2))
    kl = model.kl(q, p, free_nats=0.0)
    assert torch.equal(kl.dynamics, kl.representation)
    assert torch.autograd.grad(kl.dynamics.sum(), [q, p], allow_unused=True)[0] is None
    kl = model.kl(q, p, free_nats=0.0)
    assert torch.autograd.grad(kl.representation.sum(), [q, p], allow_unused=True)[1] is None
    same = model.kl(p, p)
    assert (same.dynamics == 1).all()
    assert torch.autograd.grad(same.dynamics.sum(), p)[0].abs().max() == 0


def test_sampled_frequencies_are_those_of_the_distribution():
    model = make(stoch=1, classes=6, dtype=torch.float32)
    N = 20000
    step = model.step(model.initial(N), torch.zeros(N, 2), torch.zeros(N, 7))
    p = 0.99 * step.posterior[0, 0].softmax(-1) + 0.01 / 6
    counts = torch.bincount(step.index[:, 0].long(), minlength=6)
    chi2 = ((counts - N * p) ** 2 / (N * p)).sum().item()
    assert chi2 < 25.7  # 5 degrees of freedom, one in 10,000


# ---- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"embed": torch.zeros(3, 2, 8)}, ValueError, r"embed is \(3, 2, 8\), but \[T, N, E\]"),
        ({"embed": torch.zeros(0, 2, 7)}, ValueError, "T >= 1"),
        ({"prev_action": torch.zeros(3, 2, 3)}, ValueError, r"prev_action is \(3, 2, 3\), but \(3, 2, 2\)"),
        ({"prev_action": torch.zeros(3, 2, 2).double()}, TypeError, "prev_action is torch.float64"),
        ({"prev_action": None}, TypeError, "prev_action is a NoneType"),
        ({"is_first": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, "is_first"),
        ({"is_first": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "is_first is torch.int64"),
        ({"state": torch.zeros(3)}, TypeError, "state is a Tensor"),
        ({"state": RSSMState(torch.zeros(2, 25), torch.zeros(2, 3, 5))}, ValueError, "state.deter"),
        ({"state": RSSMState(torch.zeros(2, 24), torch.zeros(2, 15))}, ValueError, "state.stoch"),
        ({"noise": torch.zeros(3, 2, 4)}, ValueError, "noise"),
        (
            {"force_stoch": torch.full((3, 2, 3), 5)},
            ValueError,
            r"force_stoch is 5 somewhere, but classes in \[0, 5\)",
        ),
        ({"force_stoch": torch.zeros(3, 2, 3)}, TypeError, "force_stoch is torch.float32"),
        (
            {"state": RSSMState(torch.zeros(2, 24), torch.full((2, 3), 7, dtype=torch.uint8))},
            ValueError,
            r"state.stoch is 7 somewhere, but classes in \[0, 5\)",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_windows_are_named(change, error, match):
    model = make(dtype=torch.float32)
    inputs = window(model, 3, 2, torch.float32)
    with pytest.raises(error, match=match):
        model.observe(**{**inputs, **change})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"horizon": 0}, ValueError, "horizon is 0"),
        ({"horizon": 1.0}, TypeError, "horizon is a float"),
        ({"policy": 3}, TypeError, "policy is a int"),
        ({"state": None}, TypeError, "state is a NoneType"),
        ({"action_noise": torch.zeros(2, 4, 2)}, ValueError, "action_noise"),
        ({"force_action": torch.zeros(2, 4, 3)}, ValueError, "force_action"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_imagination_is_named(change, error, match):
    model = make(dtype=torch.float32)
    call = {"policy": policy_of(model), "state": model.initial(4), "horizon": 2, **change}
    with pytest.raises(error, match=match):
        model.imagine(**call)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"deter": 0}, "deter is 0"),
        ({"classes": 1}, "classes is 1"),
        ({"classes": 257}, "classes is 257"),
        ({"cell": "lstm"}, "cell is 'lstm'"),
        ({"deter": 20}, "deter is 20, but a multiple of blocks"),
        ({"unimix": 1.0}, "unimix is 1.0"),
    ],
    ids=str,
)
def test_bad_configurations_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        RSSMConfig(**{"deter": 16, "hidden": 4, **change})


def test_public_names():
    assert {"rssm_step", "rssm_observe", "imagine"} <= set(pywm.__all__)


def _layers_changed(p):
    """Ways to spoil a model's parameters, and what must be said."""
    gates, hidden = p.gates, p.hidden
    narrow = p.prior[0]._replace(weight=p.prior[0].weight[:, :3])
    return [
        ({"gates": gates._replace(weight=gates.weight[:, :, :-1])}, ValueError, r"params.gates.weight is \(4, 18, 5\)"),
        ({"gates": gates._replace(weight=torch.zeros(4, 18, 50))}, ValueError, r"params.gates.weight is \(4, 18, 50\)"),
        ({"gates": gates._replace(weight=gates.weight.float())}, TypeError, "params.gates.weight is torch.float32"),
        ({"gates": gates._replace(weight=gates.weight.to("meta"))}, TypeError, "params.gates.weight is on the meta device"),
        ({"gates": gates._replace(weight=gates.weight.detach().to_sparse())}, TypeError, "params.gates.weight is torch.s"),
        ({"gates": gates._replace(weight=None)}, TypeError, "params.gates.weight is a NoneType"),
        ({"gates": gates._replace(bias=None)}, TypeError, "params.gates.bias is a NoneType"),
        ({"gates": gates._replace(bias=gates.bias[:3])}, ValueError, r"params.gates.bias is \(3,\), but \(72,\)"),
        ({"gates": None}, TypeError, "params.gates is a NoneType, but a Layer was expected"),
        ({"gates": "layer"}, TypeError, "params.gates is a str, but a Layer was expected"),
        ({"gates": (gates.weight,)}, TypeError, "params.gates is a tuple, but a Layer was expected"),
        ({"hidden": None}, TypeError, "params.hidden is a NoneType, but a Layer was expected"),
        ({"hidden": hidden._replace(scale=None)}, TypeError, "params.hidden.scale is a NoneType"),
        ({"hidden": hidden._replace(shift=hidden.scale)}, ValueError, "params.hidden.shift is a tensor, but None"),
        ({"candidate": gates}, ValueError, "params has other layers than deter_in, .* which a block_gru has"),
        ({"prior": ()}, ValueError, "params.prior is 0, but 3 layers were expected"),
        ({"prior": (narrow, *p.prior[1:])}, ValueError, r"params.prior\[0\].weight is \(18, 3\), but \(18, 24\)"),
        ({"posterior": p.posterior[:1]}, ValueError, "params.posterior is 1, but 2 layers were expected"),
        ({"posterior": 3}, ValueError, "params.posterior is a int, but 2 layers were expected"),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(19))
def test_bad_parameters_are_named(case):
    model = make()
    inputs = window(model, 2, 2)
    change, kind, message = _layers_changed(model.params())[case]
    params = model.params()._replace(**change)
    step = (inputs["prev_action"][0], inputs["embed"][0], inputs["is_first"][0])
    for function, call in {
        "rssm_observe": lambda: pywm.rssm_observe(params, **inputs),
        "rssm_step": lambda: pywm.rssm_step(params, inputs["state"], *step),
        "imagine": lambda: pywm.imagine(params, policy_of(model), inputs["state"], 2),
    }.items():
        with pytest.raises(kind, match=f"{function}: {message}"):
            call()


def test_bad_policies_are_named():
    model = make().requires_grad_(False)
    state, good = model.initial(2), policy_of(model)
    first, *rest = good.layers
    for layer, message in {
        first._replace(weight=first.weight[:, 1:]): r"policy.layers\[0\].weight is \(\d+, \d+\), but",
        first._replace(scale=None): r"policy.layers\[0\].scale is a NoneType",
        first._replace(bias=first.bias[:2]): r"policy.layers\[0\].bias is \(2,\), but",
    }.items():
        policy = Policy((layer, *rest), kind=good.kind, norm=good.norm, act=good.act)
        with pytest.raises((TypeError, ValueError), match=f"imagine: {message}"):
            model.imagine(policy, state, 2)


def _one_hot_window(model, T=5, N=4, dtype=torch.float64):
    inputs = window(model, T, N, dtype, resets=0.3)
    A = model.config.action
    g = torch.Generator().manual_seed(9)
    action = torch.nn.functional.one_hot(torch.randint(A, (T, N), generator=g), A).to(dtype)
    action[1, 2] = 0  # what a replay has where nothing was done
    return {**inputs, "prev_action": action}


def _gradients(model, inputs):
    result = model.observe(**inputs)
    outputs = [result.deter, result.stoch, result.posterior, result.prior]
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(model.parameters()), weights)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_hot_actions_are_looked_up(form, threads):
    """What the cell sees of a class is computed once; values and gradients are those of the product."""
    model = make(form=form, action=6)
    inputs = _one_hot_window(model)
    with _native.disabled():
        want = _gradients(model, inputs)
    got = _gradients(model, inputs)
    assert_near(got, want, 1e-11)
    inputs["prev_action"][2, 1] *= 0.5  # no class any more
    with _native.disabled():
        want = _gradients(model, inputs)
    assert_near(_gradients(model, inputs), want, 1e-11)


@pytest.mark.parametrize("spoilt", [0.5, 2.0, -1.0, float("nan")])
def test_actions_that_are_no_classes_are_told_from_them(spoilt):
    classes = torch.empty(2, 3, dtype=torch.uint8)
    action = torch.eye(4)[torch.tensor([[0, 1, 2], [3, 3, 0]])]
    is_first = torch.tensor([[False, True, False], [False, False, False]])
    check = _native.module().action_classes
    assert check(action, is_first, classes)
    assert classes.tolist() == [[0, 4, 2], [3, 3, 0]]
    action[1, 2, 3] = spoilt
    assert not check(action, is_first, classes)
    action[1, 2] = 0
    assert check(action, is_first, classes)
    assert classes[1, 2] == 4
    action[0, 1] = spoilt  # zeroed where an episode begins, whatever it was
    assert check(action, is_first, classes)
    assert check(action, is_first, classes.to(torch.int64)) is None


def test_one_hot_actions_that_want_gradients_get_them():
    model = make(action=6)
    inputs = _one_hot_window(model)
    got, want = outputs_and_gradients(model, inputs), None
    with _native.disabled():
        want = outputs_and_gradients(model, inputs)
    assert_near(got[1], want[1], 1e-11)
    assert got[1][1].abs().max() > 0


# ---- acting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("cell", ["block_gru", "layernorm_gru"])
@pytest.mark.parametrize("N", [1, 3, 4, 17, 64])
def test_acting_is_one_call_and_equals_the_reference(cell, form, dtype, N, threads):
    model = make(cell, 5, form, dtype).requires_grad_(False)
    inputs = window(model, 1, N, dtype, resets=0.4)
    tol = 1e-11 if dtype == torch.float64 else 2e-4
    state = inputs["state"]
    states = [state, RSSMState(state.deter, state.stoch.argmax(-1).to(torch.uint8))]
    action, noise = inputs["prev_action"][0], inputs["noise"][0]
    g = torch.Generator().manual_seed(1)
    drawn = [{"noise": noise}, {"force_stoch": torch.randint(5, (N, 3), generator=g).to(torch.uint8)}]
    firsts, embeds = [inputs["is_first"][0], None], [inputs["embed"][0], None]
    for start, embed, first, options in itertools.product(states, embeds, firsts, drawn):
        before = served("rssm_act")
        got = model.step(start, action, embed, first, **options)
        assert served("rssm_act") == before + 1
        with _native.disabled():
            want = model.step(start, action, embed, first, **options)
        assert (got.prior is None, got.posterior is None) == (embed is not None, embed is None)
        logits = [next(x for x in (step.prior, step.posterior) if x is not None) for step in (got, want)]
        assert_near([got.deter, logits[0]], [want.deter, logits[1]], tol)
        assert torch.equal(got.index, want.index)
        assert torch.equal(got.stoch, want.stoch.round())


def test_acting_with_two_threads_on_a_model_worth_them():
    model = make(deter=512, hidden=64, stoch=8, classes=4, embed=64, blocks=8, dtype=torch.float32)
    model.requires_grad_(False)
    inputs = window(model, 1, 16, torch.float32)
    arguments = (inputs["state"], inputs["prev_action"][0], inputs["embed"][0], inputs["is_first"][0])
    steps = []
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        steps.append(model.step(*arguments, noise=inputs["noise"][0]))
    torch.set_num_threads(before)
    for a, b in zip(steps[0][:3], steps[1][:3], strict=True):
        assert torch.equal(a, b)  # every output is one member's work, in the same order


def test_a_step_draws_as_often_whoever_serves_it():
    """A call that the acting kernel declines must not have drawn already."""
    model = make(dtype=torch.float32)
    inputs = window(model, 1, 2, torch.float32)
    arguments = (inputs["state"], inputs["prev_action"][0], inputs["embed"][0], inputs["is_first"][0])
    drawn = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            before = served("rssm_act")
            torch.manual_seed(3)
            step = model.step(*arguments)
            assert served("rssm_act") - before == (0 if grad else 1)
            drawn.append((step.index, torch.rand(1)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_a_seed_acts_in_one_call_and_means_its_noise():
    model = make(dtype=torch.float32).requires_grad_(False)
    inputs = window(model, 1, 3, torch.float32)
    arguments = (inputs["state"], inputs["prev_action"][0], inputs["embed"][0], inputs["is_first"][0])
    noise = pywm.ops.philox_uniform(2**64 - 1, 7, (1, 3, model.config.stoch))[0]
    before = served("rssm_act")
    counted = model.step(*arguments, seed=2**64 - 1, offset=7)
    assert served("rssm_act") == before + 1
    assert torch.equal(counted.index, model.step(*arguments, noise=noise).index)
    with _native.disabled():
        assert torch.equal(counted.index, model.step(*arguments, seed=2**64 - 1, offset=7).index)
    for wrong in ({"seed": 2**64}, {"seed": -1}, {"seed": 1, "offset": -1}, {"seed": 1, "noise": noise}):
        with pytest.raises(ValueError, match=r"rssm_step: (seed|offset) is"):
            model.step(*arguments, **wrong)


def test_a_function_is_no_noise():
    model = make(dtype=torch.float32).requires_grad_(False)
    action = torch.zeros(2, model.config.action)
    with pytest.raises(TypeError, match=r"rssm_step: noise is a function, but a torch\.Tensor was expected"):
        model.step(model.initial(2), action, noise=lambda: torch.zeros(2, 3))


def test_weights_changed_in_place_are_seen_by_the_next_step():
    model = make().requires_grad_(False)
    inputs = window(model, 1, 2)
    arguments = (inputs["state"], inputs["prev_action"][0], inputs["embed"][0])
    for change in (
        lambda: next(model.parameters()).mul_(0.5),
        lambda: model.load_state_dict({k: x + 0.1 for k, x in model.state_dict().items()}),
        lambda: model.params().gates.weight.data.add_(0.3),
    ):
        change()
        got = model.step(*arguments, noise=inputs["noise"][0])
        with _native.disabled():
            want = model.step(*arguments, noise=inputs["noise"][0])
        assert_near([got.deter, got.posterior], [want.deter, want.posterior], 1e-11)
