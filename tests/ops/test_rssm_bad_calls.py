"""Hundreds of spoilt calls of the models' functions: each returns or names the argument; none crashes or hangs."""

import random

import numpy as np
import pytest
import torch
from test_rssm import make, policy_of, window

import pywm
from pywm.models import RSSMState
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
