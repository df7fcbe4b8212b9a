"""Gradients through imagination: the compiled reverse scan against the reference, gradient by gradient."""

import gc
import itertools
import weakref

import pytest
import torch
from test_rssm import CELLS, assert_near, floats, make, policy_of, served, window

from pywm.models import RSSMState
from pywm.ops import Layer, Policy, _native

KINDS = ("categorical", "normal", "tanh_normal")
FORM = {  # of each cell, a norm and a nonlinearity that some Dreamer has with it, or that no other cell here has
    "block_gru": ("rms", "silu"),
    "layernorm_gru": ("layer", "elu"),
    "gru": ("none", "elu"),
    "gru_block": ("none", "relu"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small sizes: a team would wait for its members most of the time. Two threads have a test of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def differentiable(policy):
    layers = [
        Layer(*(None if x is None else x.detach().clone().requires_grad_() for x in layer))
        for layer in policy.layers
    ]
    return Policy(tuple(layers), kind=policy.kind, classes=policy.classes, norm=policy.norm, act=policy.act)


def case(cell, classes, kind, H, N, dtype=torch.float64, **sizes):
    """A model, a policy, a start, and the noise of H steps."""
    model = make(cell, classes, FORM[cell], dtype, **sizes)
    policy = differentiable(policy_of(model, kind, form=FORM[cell]))
    g = torch.Generator().manual_seed(2)
    shape = (H, N, model.config.stoch)
    options = {
        "noise": (torch.rand if classes else torch.randn)(shape, generator=g, dtype=torch.float64),
        "action_noise": (torch.rand if kind == "categorical" else torch.randn)(
            H, N, policy.noise, generator=g, dtype=torch.float64
        ),
    }
    state = window(model, 1, max(N, 1), dtype)["state"]
    state = RSSMState(state.deter[:N], state.stoch[:N])
    return model, policy, state, {k: x.to(dtype) for k, x in options.items()}


def tensors_of(policy):
    return [x for layer in policy.layers for x in layer if x is not None]


def run(model, policy, state, H, options, parts=None, path="kernel"):
    """All outputs, and the gradients of a random mixture of those in ``parts`` in everything that has one."""
    deter, stoch = (x.clone().requires_grad_() for x in state)
    options = {
        k: x.clone().requires_grad_() if k == "force_action" else x for k, x in options.items()
    }  # the others have no gradient
    result = model.imagine(policy, RSSMState(deter, stoch), H, **options)
    assert result.path == path
    outputs = {
        "deter": [result.deter],
        "stoch": [result.stoch],
        "action": [result.action],
        "prior": floats(result.prior),
        "policy": [result.policy],
    }
    g = torch.Generator().manual_seed(7)
    loss = 0
    for name, xs in outputs.items():
        for x in xs:
            weight = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)
            if parts is None or name in parts:
                loss = loss + (x * weight).sum()
    forced = [options["force_action"]] if "force_action" in options else []
    leaves = [deter, stoch, *forced, *tensors_of(policy), *model.parameters()]
    flat = [x for xs in outputs.values() for x in xs]
    return flat, torch.autograd.grad(loss, leaves, allow_unused=True)


def reference(*arguments, **options):
    with _native.disabled():
        return run(*arguments, **options, path="steps")


def zeros_are_none(gradients):
    """The compiled call may leave out a gradient of zeros, or the reference."""
    return [None if g is None or not g.any() else g for g in gradients]


def assert_equal_to_reference(arguments, tol=1e-10, **options):
    before = served("rssm_imagine"), served("rssm_imagine_backward")
    got = run(*arguments, **options)
    assert served("rssm_imagine") == before[0] + 1
    assert served("rssm_imagine_backward") <= before[1] + 1
    want = reference(*arguments, **options)
    assert_near(got[0], want[0], tol)
    assert_near(zeros_are_none(got[1]), zeros_are_none(want[1]), tol)
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [5, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_every_output_and_gradient_equals_the_reference(cell, classes, kind):
    model, policy, state, options = case(cell, classes, kind, 4, 7)
    before = served("rssm_imagine_backward")
    assert_equal_to_reference((model, policy, state, 4, options))
    assert served("rssm_imagine_backward") == before + 1


@pytest.mark.parametrize("form", [("rms", "silu"), ("layer", "elu"), ("none", "relu")], ids=str)
@pytest.mark.parametrize("prior_layers", [1, 3])
@pytest.mark.parametrize("cell", ["block_gru", "gru"])
def test_norms_and_depths_of_the_prior(cell, prior_layers, form):
    model = make(cell, 5, form, prior_layers=prior_layers)
    policy = differentiable(policy_of(model, "normal", form=form))
    _, _, state, options = case(cell, 5, "normal", 3, 5)
    assert_equal_to_reference((model, policy, state, 3, options))


@pytest.mark.parametrize("part", ["deter", "stoch", "action", "prior", "policy"])
@pytest.mark.parametrize(("classes", "kind"), [(5, "categorical"), (0, "tanh_normal")])
def test_a_gradient_of_one_output_alone(part, classes, kind):
    model, policy, state, options = case("layernorm_gru", classes, kind, 3, 4)
    assert_equal_to_reference((model, policy, state, 3, options), parts=(part,))


@pytest.mark.parametrize("cell", CELLS)
def test_forced_samples_and_actions(cell):
    g = torch.Generator().manual_seed(4)
    for classes in (5, 0):
        model, policy, state, options = case(cell, classes, "normal", 3, 6)
        force = torch.randint(5, (3, 6, 3), generator=g) if classes else options["noise"] * 0.7
        action = 1.5 * torch.randn(3, 6, 2, generator=g, dtype=torch.float64)  # beyond the bound, too
        assert_equal_to_reference((model, policy, state, 3, {"force_stoch": force, "force_action": action}))
        options["force_stoch"] = force
        del options["noise"]
        assert_equal_to_reference((model, policy, state, 3, options))


@pytest.mark.parametrize(
    ("N", "H", "sizes"),
    [
        (1, 1, {}),
        (3, 1, {"hidden": 13, "deter": 40, "blocks": 8}),
        (17, 2, {"stoch": 1, "classes": 33, "deter": 40, "hidden": 5}),
        (100, 2, {}),  # more than a block of rows
        (1, 5, {"prior_layers": 3}),
    ],
    ids=str,
)
def test_odd_sizes(N, H, sizes):
    for cell, kind in zip(CELLS, ("categorical", "normal", "tanh_normal", "normal"), strict=True):
        classes = sizes.get("classes", 5)
        rest = {k: x for k, x in sizes.items() if k != "classes"}
        model, policy, state, options = case(cell, classes, kind, H, N, **rest)
        assert_equal_to_reference((model, policy, state, H, options))


@pytest.mark.parametrize(
    ("cell", "classes", "kind"),
    list(zip(CELLS, (7, 7, 0, 0), ("categorical", "normal", *KINDS[1:]), strict=True)),
)
def test_float32_over_a_horizon_under_forced_samples(cell, classes, kind):
    H, N = 15, 6
    model, policy, state, options = case(cell, classes, kind, H, N, deter=48, hidden=40, stoch=6)
    g = torch.Generator().manual_seed(3)
    options["force_stoch"] = torch.randint(7, (H, N, 6), generator=g) if classes else options["noise"]
    if kind == "categorical":  # the ends of the interval, at which no rounding changes a class
        options["action_noise"] = (options["action_noise"] > 0.5).double() * (1 - 2**-8)
    want = reference(model, policy, state, H, options)
    model = model.float()
    layers = [Layer(*(None if x is None else x.detach().float() for x in layer)) for layer in policy.layers]
    single = differentiable(Policy(tuple(layers), kind=kind, norm=policy.norm, act=policy.act))
    low = {k: x.float() if x.is_floating_point() else x for k, x in options.items()}
    got = run(model, single, RSSMState(*(x.float() for x in state)), H, low)
    assert_near([x.double() for x in got[0]], want[0], 1e-4)
    of = [None if g is None else g.double() for g in got[1]]
    assert_near(zeros_are_none(of), zeros_are_none(want[1]), 1e-4)


def _with_values(model, policy, values):
    """Put tensors in the places of a model's and a policy's parameters; return the policy."""
    rest = iter(values)
    layers = [Layer(*(None if x is None else next(rest) for x in layer)) for layer in policy.layers]
    for name, _ in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        value = next(rest)
        del module._parameters[last]
        module._parameters[last] = value
    return Policy(tuple(layers), kind=policy.kind, norm=policy.norm, act=policy.act)


TINY = {"deter": 4, "hidden": 3, "stoch": 1, "embed": 2, "action": 1, "blocks": 2}


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_the_scan_in_double(cell):
    """Under given actions, for the policy's view of a state has no gradient, on purpose."""
    model, policy, state, options = case(cell, 0, "normal", 3, 2, **TINY)
    options["force_action"] = torch.randn(3, 2, 1, dtype=torch.float64).tanh()
    values = [x.detach().requires_grad_() for x in (*tensors_of(policy), *model.parameters())]
    start = [x.clone().requires_grad_() for x in (*state, options.pop("force_action"))]

    def imagined(deter, stoch, action, *values):
        own = _with_values(model, policy, values)
        result = model.imagine(own, RSSMState(deter, stoch), 3, force_action=action, noise=options["noise"])
        return result.deter, result.stoch, *result.prior

    before = served("rssm_imagine_backward")
    assert torch.autograd.gradcheck(imagined, (*start, *values), atol=1e-6)
    assert served("rssm_imagine_backward") > before


@pytest.mark.parametrize("kind", ["normal", "tanh_normal"])
def test_gradcheck_of_the_policy_in_double(kind):
    model, policy, state, options = case("gru", 0, kind, 1, 2, **TINY)
    values = [x.detach().requires_grad_() for x in (*tensors_of(policy), *model.parameters())]

    def imagined(*values):
        result = model.imagine(_with_values(model, policy, values), state, 1, **options)
        return result.deter, result.stoch, result.action, *result.prior, result.policy

    assert torch.autograd.gradcheck(imagined, values, atol=1e-6)


def test_features_reach_the_policy_without_gradient():
    model, policy, state, options = case("gru", 0, "tanh_normal", 1, 3)
    deter = state.deter.clone().requires_grad_()
    result = model.imagine(policy, RSSMState(deter, state.stoch), 1, **options)
    assert torch.autograd.grad(result.action.sum(), deter, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(result.policy.sum(), deter, allow_unused=True)[0] is None


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_tensors_get_no_gradient_and_change_none(cell):
    model, policy, state, options = case(cell, 0, "tanh_normal", 3, 4)
    whole = run(model, policy, state, 3, options)[1]
    parameters = [*tensors_of(policy), *model.parameters()]
    for frozen in (parameters[::2], parameters[1::2], list(model.parameters()), tensors_of(policy)):
        for p in parameters:
            p.requires_grad_(all(p is not x for x in frozen))
        result = model.imagine(policy, state, 3, **options)
        assert result.path == "kernel"
        g = torch.Generator().manual_seed(7)
        xs = [result.deter, result.stoch, result.action, *result.prior, result.policy]
        weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in xs]
        loss = sum((x * w).sum() for x, w in zip(xs, weights, strict=True))
        loss.backward()
        for p, want in zip(parameters, whole[2:], strict=True):
            if not p.requires_grad:
                assert p.grad is None
            elif want is not None and want.any():
                assert_near([p.grad], [want], 1e-11)
            p.grad = None


def test_nothing_is_kept_where_nobody_wants_gradients():
    model, policy, state, options = case("gru", 0, "tanh_normal", 2, 3)
    with torch.no_grad():
        result = model.imagine(policy, state, 2, **options)
    for x in (result.deter, result.stoch, result.action, *result.prior, result.policy):
        assert not x.requires_grad
    for x in (*tensors_of(policy), *model.parameters()):
        x.requires_grad_(False)
    assert not model.imagine(policy, state, 2, **options).deter.requires_grad


def test_a_graph_goes_with_its_outputs():
    """Neither the policy's part of the graph nor the model's holds on to itself."""
    model, policy, state, options = case("gru", 0, "tanh_normal", 2, 3)
    gc.disable()
    try:
        result = model.imagine(policy, state, 2, **options)
        told = [weakref.ref(x.grad_fn) for x in (result.deter, result.policy)]
        del result
        assert [x() for x in told] == [None, None]
    finally:
        gc.enable()


def test_no_starts_and_starts_from_classes():
    model, policy, state, options = case("layernorm_gru", 5, "categorical", 2, 0)
    result = model.imagine(policy, state, 2, **options)
    assert result.path == "steps"
    result.deter.sum().backward()
    model, policy, state, options = case("layernorm_gru", 5, "categorical", 2, 4)
    index = state.stoch.argmax(-1).to(torch.uint8)
    one_hot = torch.nn.functional.one_hot(index.long(), 5).double()
    want = run(model, policy, RSSMState(state.deter, one_hot), 2, options)
    deter = state.deter.clone().requires_grad_()
    got = model.imagine(policy, RSSMState(deter, index), 2, **options)
    assert got.path == "kernel"
    assert torch.equal(got.deter, want[0][0])
    got.deter.sum().backward()
    assert deter.grad.abs().max() > 0


@pytest.mark.parametrize("N", [1, 3, 130])
@pytest.mark.parametrize("cell", CELLS)
def test_one_and_two_threads_give_the_same(cell, N):
    model, policy, state, options = case(cell, 5, "normal", 2, N)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(model, policy, state, 2, options))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)
    assert_near(
        zeros_are_none(results[0][1]), zeros_are_none(results[1][1]), 1e-12
    )  # sums meet in another order


@pytest.mark.parametrize("of", ["deter", "policy"])
def test_second_derivative_is_an_error(of):
    model, policy, state, options = case("gru", 0, "tanh_normal", 2, 2)
    weight = policy.layers[0].weight
    result = model.imagine(policy, state, 2, **options)
    first = torch.autograd.grad(getattr(result, of).square().sum(), weight, create_graph=True)[0]
    want = torch.autograd.grad(
        getattr(model.imagine(policy, state, 2, **options), of).square().sum(), weight
    )[0]
    assert torch.equal(first, want)
    with pytest.raises(RuntimeError, match="imagine is differentiable once"):
        torch.autograd.grad(first.sum(), weight)


def test_a_graph_may_be_walked_twice_and_a_changed_weight_is_an_error():
    model, policy, state, options = case("gru", 0, "tanh_normal", 2, 2)
    result = model.imagine(policy, state, 2, **options)
    weight = policy.layers[0].weight
    a, b = (torch.autograd.grad(result.deter.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(a, b)
    with torch.no_grad():
        model.gates.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.deter.sum(), weight)


def test_every_gradient_is_written():
    for (cell, classes), kind in itertools.product(zip(CELLS, (5, 5, 0, 0), strict=True), ("normal",)):
        arguments = case(cell, classes, kind, 3, 5, torch.float32)
        model, policy, state, options = arguments
        _native.module().poison(True)
        try:
            outputs, gradients = run(model, policy, state, 3, options)
        finally:
            _native.module().poison(False)
        for x in (*outputs, *(g for g in gradients if g is not None)):
            assert x.isfinite().all()
