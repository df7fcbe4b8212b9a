"""Hundreds of spoilt calls of the models' functions: each returns or names the argument; none crashes or hangs."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_rssm import make, policy_of, window

import pywm
from pywm.models import RSSMConfig, RSSMState
from pywm.ops import Layer, Policy

CELLS = ("block_gru", "layernorm_gru", "gru", "gru_block")
T, N = 3, 2


def mutations(x, rng):
    """What may come instead of a tensor."""
    axis = rng.randrange(x.ndim)
    size = x.shape[axis]
    return rng.choice(
        [
            lambda: None,
            lambda: "tensor",
            lambda: 3.5,
            lambda: x.tolist(),
            lambda: x.numpy(),
            lambda: x.unsqueeze(0),
            lambda: x[0],
            lambda: x.flatten(),
            lambda: x.new_zeros((0,)),
            lambda: x.new_zeros([*x.shape[:axis], size + 1, *x.shape[axis + 1 :]]),
            lambda: x.new_zeros([*x.shape[:axis], max(size - 1, 0), *x.shape[axis + 1 :]]),
            lambda: x.new_zeros(()).expand([*x.shape[:axis], 2**40, *x.shape[axis + 1 :]]),
            lambda: x.to(torch.float16),
            lambda: x.to(torch.int64),
            lambda: x.to(torch.complex64),
            lambda: x.double() if x.dtype == torch.float32 else x.float(),
            lambda: x.to(torch.uint8),
            lambda: x.bool(),
            lambda: x.to("meta"),
            lambda: x.to_sparse(),
            lambda: torch.nn.parameter.UninitializedParameter(),
            # Legal:
            lambda: x.clone(),
            lambda: x.transpose(0, -1).contiguous().transpose(0, -1),
            lambda: x.flip(0),
            lambda: x.new_zeros(()).expand(x.shape),
            lambda: torch.full_like(x, float("nan")) if x.is_floating_point() else x,
            lambda: torch.full_like(x, 1e30) if x.is_floating_point() else x,
            lambda: torch.nn.Parameter(x) if x.is_floating_point() else x,
        ]
    )()


def spoilt_layer(layer, rng):
    part = rng.choice([i for i, x in enumerate(layer) if x is not None])
    return layer._replace(**{layer._fields[part]: mutations(layer[part].detach(), rng)})


def spoilt(model, policy, seed):
    """A function, its call, and what was changed."""
    rng = random.Random(seed)
    c = model.config
    inputs = window(model, T, N, torch.float32)
    g = torch.Generator().manual_seed(seed)
    force = torch.rand(T, N, c.stoch, generator=g)
    if not c.is_gaussian:
        force = (force * c.classes).long()
    arguments = {
        "embed": inputs["embed"],
        "prev_action": inputs["prev_action"],
        "is_first": inputs["is_first"],
        "state.deter": inputs["state"].deter,
        "state.stoch": inputs["state"].stoch,
        "noise": inputs["noise"],
    }
    if rng.random() < 0.4:
        arguments["force_stoch"] = force
        if rng.random() < 0.5:
            del arguments["noise"]
    numbers = {}
    if rng.random() < 0.2 and "noise" in arguments:
        del arguments["noise"]
        numbers = {
            "seed": rng.choice([0, 2**64 - 1, -1, 2**64, 1.5, "1"]),
            "offset": rng.choice([0, 7, -1, 2**40, None]),
        }
    function = rng.choice(["rssm_observe", "rssm_step", "imagine"])
    if function != "rssm_observe":
        arguments = {k: x if k.startswith("state") else x[0] for k, x in arguments.items()}
    params = model.params()
    changed = []
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        what = rng.choice([*arguments, "params", "policy"])
        if what in changed:
            continue  # what is huge must not be copied
        changed.append(what)
        if what == "params":
            names = [n for n in params._fields[1:7] if isinstance(getattr(params, n), Layer)]
            name = rng.choice(names)
            params = params._replace(**{name: spoilt_layer(getattr(params, name), rng)})
        elif what == "policy":
            layers = list(policy.layers)
            i = rng.randrange(len(layers) - 1)
            layers[i] = spoilt_layer(layers[i], rng)
            policy = Policy(tuple(layers), norm=policy.norm, act=policy.act)
        elif isinstance(arguments[what], torch.Tensor):
            arguments[what] = mutations(arguments[what], rng)
    state = RSSMState(arguments.pop("state.deter"), arguments.pop("state.stoch"))
    numbers |= {k: arguments[k] for k in ("noise", "force_stoch") if k in arguments}
    rest = [arguments[k] for k in ("embed", "prev_action", "is_first")]

    def call():
        if function == "rssm_observe":
            return pywm.rssm_observe(params, *rest, state, **numbers)
        if function == "rssm_step":
            embed = rest[0] if rng.random() < 0.7 else None
            return pywm.rssm_step(
                params, state, rest[1], embed, rest[2] if rng.random() < 0.7 else None, **numbers
            )
        numbers_of_rows = {
            k: x.unsqueeze(0) if isinstance(x, torch.Tensor) and x.ndim == 2 else x
            for k, x in numbers.items()
        }
        return pywm.imagine(params, policy, state, 1, **numbers_of_rows)

    return function, call, changed


@pytest.mark.parametrize("classes", [5, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_spoilt_calls_return_or_say_why(cell, classes):
    model = make(cell, classes, dtype=torch.float32)
    policy = policy_of(model)
    returned = raised = 0
    for seed in range(250):
        function, call, changed = spoilt(model, policy, seed)
        try:
            with torch.set_grad_enabled(seed % 3 == 0), np.errstate(all="ignore"):
                call()
            returned += 1
        except (TypeError, ValueError) as error:
            raised += 1
            text = str(error)
            assert text.startswith(f"{function}: "), (seed, changed, text)
            assert " but " in text, (seed, changed, text)
        except Exception as error:
            raise AssertionError(
                f"seed {seed}, {function}, {changed}: {type(error).__name__}: {error}"
            ) from error
    assert returned > 25
    assert raised > 25


# ---- what a policy that is a function returns ----------------------------------------------------------------------------

ACTION = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("action", "error", "match"),
    [
        (
            torch.zeros(4, 3),
            ValueError,
            r"is \(4, 3\), but \(4, 2\) was expected, as state.deter is \(4, 24\)",
        ),
        (torch.zeros(1, 2), ValueError, r"is \(1, 2\), but \(4, 2\)"),
        (torch.zeros(4), ValueError, r"is \(4,\), but \(4, 2\)"),
        (None, TypeError, "is a NoneType, but a torch.Tensor"),
        (np.zeros((4, 2), np.float32), TypeError, "is a ndarray, but a torch.Tensor"),
        (ACTION.double(), TypeError, "is torch.float64, but state.deter is torch.float32"),
        (ACTION.half(), TypeError, "is torch.float16, but state.deter is torch.float32"),
        (ACTION.long(), TypeError, "is torch.int64, but one of"),
        (ACTION.bool(), TypeError, "is torch.bool, but one of"),
        (ACTION.to(torch.complex64), TypeError, "is torch.complex64, but one of"),
        (ACTION.to_sparse(), TypeError, "is torch.sparse_coo, but a dense"),
        (ACTION.to("meta"), TypeError, "is on the meta device"),
    ],
    ids=str,
)
def test_actions_of_a_function_are_looked_at_in_each_step(action, error, match):
    model = make(dtype=torch.float32).requires_grad_(False)
    calls = iter([ACTION, action])
    with pytest.raises(error, match=f"imagine: policy's action {match}"):
        model.imagine(lambda _: next(calls), model.initial(4), 2)


def test_a_function_takes_no_noise_of_actions():
    model = make(dtype=torch.float32)
    with pytest.raises(
        ValueError, match="imagine: action_noise is a Tensor, but None was expected, as policy"
    ):
        model.imagine(lambda feat: feat[:, :2], model.initial(4), 2, action_noise=torch.zeros(2, 4, 2))


def test_a_function_is_compiled_with_its_check():
    model = make(dtype=torch.float32).requires_grad_(False)
    state = model.initial(4)

    def dream(width):
        return model.imagine(lambda feat: feat[:, :width].tanh(), state, 2, seed=1).deter

    compiled = torch.compile(dream, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(2), dream(2))


# ---- policies and configurations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"eps": -1}, ValueError, r"eps is -1, but a number in \(0, inf\)"),
        ({"eps": "x"}, TypeError, "eps is a str"),
        ({"unimix": 2.0}, ValueError, r"unimix is 2.0, but a number in \[0, 1\)"),
        ({"unimix": 1.0}, ValueError, "unimix is 1.0"),
        ({"unimix": "x"}, TypeError, "unimix is a str"),
        ({"kind": "normal", "min_std": 2.0, "max_std": 1.0}, ValueError, "max_std is 1.0, but at least 2.0"),
        ({"min_std": -2.0}, ValueError, "min_std is -2.0"),
        ({"max_std": float("nan")}, ValueError, "max_std is nan"),
        ({"classes": (-1, 3)}, ValueError, r"classes\[0\] is -1"),
        ({"classes": (0, 2)}, ValueError, r"classes\[0\] is 0"),
        ({"classes": (1.0, 1.0)}, TypeError, r"classes\[0\] is a float"),
        ({"classes": (1, 2)}, ValueError, r"classes is \(1, 2\), but a sum of 2"),
        ({"classes": 3}, TypeError, "classes is a int, but a tuple"),
        ({"layers": None}, TypeError, "layers is a NoneType, but a tuple"),
        (
            {"layers": (torch.zeros(3, 39), torch.zeros(2, 3))},
            TypeError,
            r"layers\[0\] is a Tensor, but a Layer",
        ),
        (
            {"layers": (Layer(torch.zeros(3, 39)), Layer(None))},
            TypeError,
            r"layers\[1\].weight is a NoneType",
        ),
        (
            {"layers": (Layer(torch.zeros(3, 39)), Layer(torch.zeros(0, 3)))},
            ValueError,
            ".* with outputs >= 1",
        ),
        ({"kind": ["normal"]}, ValueError, "kind is .*, but one of"),
    ],
    ids=str,
)
def test_bad_policies_are_named_when_they_are_made(change, error, match):
    good = policy_of(make(dtype=torch.float32), "normal" if change.get("kind") == "normal" else "categorical")
    with pytest.raises(error, match=f"^Policy: {match}"):
        replace(good, **change)


def test_classes_may_be_a_list():
    assert replace(policy_of(make(dtype=torch.float32)), classes=[1, 1]).groups == (1, 1)


def test_hidden_layers_of_a_policy_have_rows():
    model = make(dtype=torch.float32)
    narrow = Layer(torch.zeros(0, 39), scale=torch.zeros(0))
    with pytest.raises(ValueError, match=r"imagine: policy.layers\[0\].weight is \(0, 39\), but \[U, 39\]"):
        model.imagine(Policy((narrow, Layer(torch.zeros(2, 0)))), model.initial(2), 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"eps": -1}, ValueError, "eps is -1"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"eps": "x"}, TypeError, "eps is a str"),
        ({"cell_eps": "x"}, TypeError, "cell_eps is a str"),
        ({"cell_eps": -5}, ValueError, "cell_eps is -5"),
        ({"min_std": -1}, ValueError, "min_std is -1"),
        ({"min_std": "x"}, TypeError, "min_std is a str"),
        ({"unimix": "x"}, TypeError, "unimix is a str"),
        ({"stoch": 2.0}, TypeError, "stoch is a float"),
        ({"classes": 3.5}, TypeError, "classes is a float"),
        ({"classes": -1}, ValueError, "classes is -1, but 0"),
        ({"prior_layers": 1.5}, TypeError, "prior_layers is a float"),
        ({"blocks": True}, TypeError, "blocks is a bool"),
        ({"deter": "x"}, TypeError, "deter is a str"),
        ({"cell": torch.zeros(2)}, ValueError, "cell is tensor"),
    ],
    ids=str,
)
def test_fields_of_a_configuration_are_looked_at(change, error, match):
    with pytest.raises(error, match=f"^RSSMConfig: {match}"):
        RSSMConfig(**{"deter": 16, "hidden": 4, **change})


# ---- edges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "embed", [[1], None, torch.zeros(3), np.zeros((3, 2, 7))], ids=lambda x: type(x).__name__
)
def test_a_window_without_a_state_is_looked_at_first(embed):
    inputs = window(model := make(dtype=torch.float32), T, N, torch.float32)
    with pytest.raises((TypeError, ValueError), match=r"rssm_observe: embed is .*, but"):
        model.observe(embed, inputs["prev_action"], inputs["is_first"])


@pytest.mark.parametrize(
    ("rows", "error"), [(-1, ValueError), ("a", TypeError), (2.0, TypeError), (2**31, ValueError)]
)
def test_a_bad_number_of_initial_states_is_named(rows, error):
    with pytest.raises(error, match=r"RSSM\.initial: N is "):
        make().initial(rows)


def _calls(params, inputs, policy):
    action, embed, is_first = (inputs[k] for k in ("prev_action", "embed", "is_first"))
    return {
        "rssm_step": lambda state: pywm.rssm_step(params, state, action[0], embed[0]),
        "rssm_observe": lambda state: pywm.rssm_observe(params, embed, action, is_first, state),
        "imagine": lambda state: pywm.imagine(params, policy, state, 2),
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", ["rssm_step", "rssm_observe", "imagine"])
def test_bad_structures_are_named_under_autocast_too(name, autocast):
    model = make(dtype=torch.float32).requires_grad_(False)
    inputs, policy = window(model, T, N, torch.float32), policy_of(model)
    params = model.params()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for state, match in {
            None: "state is a NoneType, but an RSSMState",
            (1, 2): "state.deter is a int, but a torch.Tensor",
            (1,): "state is a tuple, but an RSSMState",
        }.items():
            with pytest.raises(TypeError, match=f"{name}: {match}"):
                _calls(params, inputs, policy)[name](state)
        for change, match in (
            ({"config": None}, "params.config is a NoneType, but an RSSMConfig"),
            ({"gates": None}, "params.gates is a NoneType, but a Layer"),
            ({"gates": params.gates._replace(weight=None)}, "params.gates.weight is a NoneType"),
        ):
            with pytest.raises(TypeError, match=f"{name}: {match}"):
                _calls(params._replace(**change), inputs, policy)[name](inputs["state"])


def test_what_cannot_be_cast_is_named_under_autocast():
    model = make(dtype=torch.float32).requires_grad_(False)
    inputs = window(model, T, N, torch.float32)
    for bad in (torch.nn.parameter.UninitializedParameter(), inputs["prev_action"].to_sparse()):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="prev_action is "):
            model.observe(**{**inputs, "prev_action": bad})


@pytest.mark.parametrize(
    ("free_nats", "error"), [(-1, ValueError), ("x", TypeError), (float("nan"), ValueError)]
)
@pytest.mark.parametrize("classes", [5, 0])
def test_bad_free_nats_are_named(classes, free_nats, error):
    model = make(classes=classes)
    observed = model.observe(**window(model, T, N))
    with pytest.raises(error, match="free_nats is "):
        model.kl(observed.posterior, observed.prior, free_nats=free_nats)


@pytest.mark.parametrize("horizon", [2**63, 2**31])
def test_a_huge_horizon_is_named(horizon):
    model = make()
    with pytest.raises(ValueError, match=f"imagine: horizon is {horizon}, but an int in"):
        model.imagine(policy_of(model), model.initial(1), horizon)


def test_a_horizon_may_be_numpys():
    model = make().requires_grad_(False)
    assert len(model.imagine(policy_of(model), model.initial(1), np.int64(2)).action) == 2


def test_the_last_offset_is_named_by_the_function_that_was_called():
    model = make(dtype=torch.float32).requires_grad_(False)
    inputs = window(model, T, N, torch.float32)
    last = 2**32 - T
    del inputs["noise"]
    model.observe(**inputs, seed=1, offset=last)
    model.imagine(policy_of(model), inputs["state"], T, seed=1, offset=last)
    with pytest.raises(ValueError, match=rf"rssm_observe: offset is {last + 1}, but an int in \[0, {last}\]"):
        model.observe(**inputs, seed=1, offset=last + 1)
    with pytest.raises(ValueError, match=f"imagine: offset is {last + 1}"):
        model.imagine(policy_of(model), inputs["state"], T, seed=1, offset=last + 1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("offset", ["x", -1, 2**32, None, True])
def test_a_bad_offset_is_named_without_a_seed_too(offset, grad):
    model = make(dtype=torch.float32)
    with torch.set_grad_enabled(grad), pytest.raises((TypeError, ValueError), match="rssm_step: offset is "):
        model.step(model.initial(2), torch.zeros(2, 2), torch.zeros(2, 7), offset=offset)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.int8])
@pytest.mark.parametrize("bad", [5, 256, -1])
def test_classes_out_of_range_are_refused_where_a_graph_hid_them(bad, dtype):
    if bad == 256 and dtype == torch.int8:
        pytest.skip("no such number")
    model = make(dtype=torch.float32).requires_grad_(False)
    inputs = window(model, T, N, torch.float32)
    del inputs["noise"]

    def deter(force):
        return model.observe(**inputs, force_stoch=force).deter

    compiled = torch.compile(deter, fullgraph=True, backend="aot_eager")
    good = torch.full((T, N, 3), 4, dtype=dtype)
    torch.testing.assert_close(compiled(good), deter(good))
    with pytest.raises(ValueError, match="rssm_observe: force_stoch is out of range somewhere"):
        compiled(torch.full((T, N, 3), bad, dtype=dtype))
