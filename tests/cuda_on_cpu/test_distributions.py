"""The CUDA kernels of random numbers and distributions, executed by the emulator, against the float64 references."""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from emulation import MODES, SCHEDULES, build, why_unavailable
from launching import SOURCES, Call, Result, launch_all
from torch import Tensor

from pywm.ops import _native, philox_normal, philox_uniform, reference

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}


@dataclass(frozen=True)
class Case:
    """A call and what it must give, by output."""

    call: Call
    expected: dict[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """One test case: the op, its sizes, and options."""

    op: str
    sizes: tuple[int, ...]
    options: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """Return a short name for the test's id."""
        return "-".join([self.op, "x".join(map(str, self.sizes)), *map(str, self.options)])


# One row, a block's, several blocks'; classes fewer and more than lanes, and no multiple of them.
SETTINGS = [
    Setting("philox", (1, 1, 1), (0, 0, 0, False)),
    Setting("philox", (3, 7, 30), (2**64 - 1, 2**32 - 3, 2**32 - 1, False)),
    Setting("philox", (2, 300, 5), (12345678901234567890, 7, 1, False)),
    Setting("philox", (3, 7, 30), (99, 0, 5, True)),
    *(
        Setting(op, sizes, options)
        for op in ("categorical_sample", "categorical_sample_backward")
        for sizes, options in [
            ((1, 1), (0.01,)),
            ((9, 5), (0.0,)),
            ((20, 32), (0.01,)),
            ((17, 33), (0.5,)),
            ((5, 256), (0.01,)),
        ]
    ),
    *(
        Setting(op, sizes, options)
        for op in ("kl_balance", "kl_balance_backward")
        for sizes, options in [
            ((1, 1, 1), (0.01, 1.0)),
            ((3, 9, 5), (0.0, 0.0)),
            ((4, 3, 32), (0.01, 4.0)),
            ((2, 20, 33), (0.1, 1.0)),
            ((2, 1, 200), (0.01, 0.5)),
        ]
    ),
    *(
        Setting(op, sizes)
        for op in (
            "symexp_twohot_loss",
            "symexp_twohot_loss_backward",
            "symexp_twohot_mean",
            "symexp_twohot_mean_backward",
        )
        for sizes in [(1, 3), (9, 15), (20, 255), (3, 1023)]
    ),
    *(
        Setting(op, sizes, (0.5,))
        for op in ("symexp_twohot_loss", "symexp_twohot_loss_backward")
        for sizes in [(1, 3), (20, 255)]
    ),
    *(
        Setting(op, sizes, (sigmoid2,))
        for op in ("gaussian_sample", "gaussian_sample_backward")
        for sizes in [(1,), (257,), (1000,)]
        for sigmoid2 in (False, True)
    ),
    *(
        Setting(op, sizes)
        for op in ("gaussian_kl", "gaussian_kl_backward")
        for sizes in [(1, 1), (9, 30), (20, 33), (3, 200)]
    ),
]
# More rows than all blocks hold at a time.
LARGE = [
    Setting("categorical_sample", (33000, 4), (0.01,)),
    Setting("categorical_sample_backward", (33000, 4), (0.01,)),
    Setting("kl_balance", (4200, 2, 3), (0.01, 1.0)),
    Setting("kl_balance_backward", (16500, 2, 3), (0.01, 1.0)),
    Setting("symexp_twohot_loss", (33000, 3)),
    Setting("gaussian_kl", (33000, 2)),
    Setting("gaussian_sample", (1050000,), (False,)),
    Setting("philox", (3, 100000, 15), (1, 2, 3, False)),
]


def _leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def _backward(
    outputs: list[Tensor], incoming: list[np.ndarray], inputs: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    total = sum((o * torch.from_numpy(g).double()).sum() for o, g in zip(outputs, incoming, strict=True))
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, list(inputs.values()))
    return {f"grad_{name}": g.numpy() for name, g in zip(inputs, grads, strict=True)}


def _case(
    setting: Setting,
    dtype: str,
    arrays: dict[str, np.ndarray],
    numbers: dict[str, Any],
    expected: dict[str, np.ndarray],
) -> Case:
    byte_outputs = {name: x.shape for name, x in expected.items() if x.dtype == np.uint8}
    outputs = {name: x.shape for name, x in expected.items() if x.dtype != np.uint8}
    return Case(Call(setting.op, dtype, arrays, outputs, numbers, byte_outputs=byte_outputs), expected)


def philox_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    seed, offset, stream, normal = setting.options
    T, N, S = setting.sizes
    op = philox_normal if normal else philox_uniform
    with _native.disabled():
        out = op(seed, offset, setting.sizes, stream=stream, dtype=torch.float64)
    numbers = {"T": T, "N": N, "slots": S, "seed": seed, "offset": offset, "stream": stream, "normal": normal}
    return _case(setting, dtype, {}, numbers, {"out": out.numpy()})


def categorical_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    (M, K), (unimix,) = setting.sizes, setting.options
    logits = (2 * g.standard_normal((M, K))).astype(dtype)
    uniform = g.random(M).astype(dtype)
    probs = (1 - unimix) * torch.from_numpy(logits).double().softmax(-1).numpy() + unimix / K
    edges = np.concatenate([np.zeros((M, 1)), probs.cumsum(-1)], -1)
    near = np.abs(edges - uniform[:, None]).min(-1) < 1e-5
    class_ = probs.argmax(-1)
    uniform[near] = (edges[np.arange(M), class_] + probs.max(-1) / 2)[near]
    leaf = _leaf(logits)
    stoch, index = reference.categorical_sample(leaf, torch.from_numpy(uniform).double(), unimix)
    numbers = {"M": M, "K": K, "unimix": unimix}
    if setting.op == "categorical_sample":
        expected = {"stoch": stoch.detach().numpy(), "index": index.numpy()}
        return _case(setting, dtype, {"logits": logits, "uniform": uniform}, numbers, expected)
    grad = g.standard_normal((M, K)).astype(dtype)
    expected = _backward([stoch], [grad], {"logits": leaf})
    return _case(setting, dtype, {"grad": grad, "logits": logits}, numbers, expected)


def kl_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    (M, G, K), (unimix, free_nats) = setting.sizes, setting.options
    posterior, prior = ((2 * g.standard_normal((M, G, K))).astype(dtype) for _ in range(2))
    if free_nats > 1:  # a row whose nats are free, but whose gradient would not be zero
        posterior[0] = prior[0] + (0.3 * g.standard_normal((G, K))).astype(dtype)
    leaves = {"posterior": _leaf(posterior), "prior": _leaf(prior)}
    dynamics, representation, kl = reference.kl_balance(*leaves.values(), unimix, free_nats)
    numbers = {"M": M, "G": G, "K": K, "unimix": unimix, "free_nats": free_nats}
    arrays = {"posterior": posterior, "prior": prior}
    if setting.op == "kl_balance":
        expected = {
            "dynamics": dynamics.detach().numpy(),
            "representation": representation.detach().numpy(),
            "kl": kl.numpy(),
        }
        return _case(setting, dtype, arrays, numbers, expected)
    grads = [g.standard_normal(M).astype(dtype) for _ in range(2)]
    arrays |= {"grad_dynamics": grads[0], "grad_representation": grads[1], "kl": kl.numpy().astype(dtype)}
    return _case(setting, dtype, arrays, numbers, _backward([dynamics, representation], grads, leaves))


def twohot_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    M, B = setting.sizes
    numbers = {"M": M, "B": B}
    grad = g.standard_normal(M).astype(dtype)
    if "loss" in setting.op:
        logits = g.standard_normal((M, B)).astype(dtype)
        targets = (np.sign(g.standard_normal((2, M))) * np.expm1(25 * g.random((2, M)))).astype(dtype)
        targets[0, 0] = 0
        names = ("target", "other") if setting.options else ("target",)
        if setting.options:
            numbers["other_scale"] = setting.options[0]
        arrays, leaf = {"logits": logits, **dict(zip(names, targets, strict=False))}, _leaf(logits)
        exact = [torch.from_numpy(arrays[name]).double() for name in names]
        output, name = reference.symexp_twohot_loss(leaf, *exact, *setting.options), "loss"
    else:
        x = np.linspace(-20, 20, B)
        logits = (g.standard_normal((M, B)) - (x - g.standard_normal((M, 1))) ** 2).astype(dtype)
        logits[0] = 1
        arrays, leaf = {"logits": logits}, _leaf(logits)
        output, name = reference.symexp_twohot_mean(leaf), "mean"
    if not setting.op.endswith("backward"):
        return _case(setting, dtype, arrays, numbers, {name: output.detach().numpy()})
    if name == "mean":
        grad[0] = 0  # at equal logits the gradient is a fifth of a billion
        arrays["mean"] = output.detach().numpy().astype(dtype)
    return _case(
        setting, dtype, arrays | {"grad": grad}, numbers, _backward([output], [grad], {"logits": leaf})
    )


def gaussian_sample_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    (P,), (sigmoid2,) = setting.sizes, setting.options
    mean, raw, noise, *grads = ((s * g.standard_normal(P)).astype(dtype) for s in (1, 5, 1, 1, 1))
    leaves = {"mean": _leaf(mean), "raw_std": _leaf(raw)}
    min_std = 0.125
    sample, std = reference.gaussian_sample(
        *leaves.values(), torch.from_numpy(noise).double(), min_std, sigmoid2
    )
    if setting.op == "gaussian_sample":
        arrays = {"mean": mean, "raw_std": raw, "noise": noise}
        numbers = {"P": P, "min_std": min_std, "sigmoid2": sigmoid2}
        expected = {"sample": sample.detach().numpy(), "std": std.detach().numpy()}
        return _case(setting, dtype, arrays, numbers, expected)
    arrays = {"grad_sample": grads[0], "grad_std": grads[1], "raw_std": raw, "noise": noise}
    return _case(
        setting, dtype, arrays, {"P": P, "sigmoid2": sigmoid2}, _backward([sample, std], grads, leaves)
    )


def gaussian_kl_case(setting: Setting, dtype: str, g: np.random.Generator) -> Case:
    M, Z = setting.sizes
    arrays = {
        name: g.standard_normal((M, Z)).astype(dtype) for name in ("mean_q", "std_q", "mean_p", "std_p")
    }
    for name in ("std_q", "std_p"):
        arrays[name] = np.exp(0.5 * arrays[name])
    leaves = {name: _leaf(x) for name, x in arrays.items()}
    kl = reference.gaussian_kl(*leaves.values())
    numbers = {"M": M, "Z": Z}
    if setting.op == "gaussian_kl":
        return _case(setting, dtype, arrays, numbers, {"kl": kl.detach().numpy()})
    grad = g.standard_normal(M).astype(dtype)
    return _case(setting, dtype, arrays | {"grad": grad}, numbers, _backward([kl], [grad], leaves))


BUILDERS: dict[str, Callable[[Setting, str, np.random.Generator], Case]] = {
    "philox": philox_case,
    "categorical_sample": categorical_case,
    "kl_balance": kl_case,
    "symexp_twohot_loss": twohot_case,
    "symexp_twohot_mean": twohot_case,
    "gaussian_sample": gaussian_sample_case,
    "gaussian_kl": gaussian_kl_case,
}


@functools.cache
def build_case(setting: Setting, dtype: str) -> Case:
    """Return a call and what it must give."""
    g = np.random.default_rng(zlib.crc32(str(setting).encode()))
    return BUILDERS[setting.op.removesuffix("_backward")](setting, dtype, g)


SCHEDULES_OF = {"plain": ("forward", "reverse", "random-3"), "asan": ("random",), "tsan": ("random",)}
DTYPES_OF = {"plain": tuple(TOLERANCE), "asan": tuple(TOLERANCE), "tsan": ("float32",)}


@functools.cache
def results(mode: str, settings: tuple[Setting, ...]) -> dict[tuple[Setting, str, str], Result]:
    """Run every case in one process; the tests then look at their own."""
    keys = [(s, dtype, order) for s in settings for dtype in DTYPES_OF[mode] for order in SCHEDULES_OF[mode]]
    calls = [(build_case(s, dtype).call, SCHEDULES[order]) for s, dtype, order in keys]
    return dict(zip(keys, launch_all(calls, mode), strict=True))


def check(setting: Setting, mode: str, settings: list[Setting]) -> None:
    reason = why_unavailable(mode)
    if reason:
        pytest.skip(reason)
    found = results(mode, tuple(settings))
    for dtype in DTYPES_OF[mode]:
        outputs = [found[setting, dtype, order].require_clean() for order in SCHEDULES_OF[mode]]
        case = build_case(setting, dtype)
        assert outputs[0].keys() == case.expected.keys()
        for name, expected in case.expected.items():
            exact = setting.op == "categorical_sample" or (setting.op == "philox" and not setting.options[3])
            tolerance = 0 if exact else TOLERANCE[dtype]
            np.testing.assert_allclose(
                outputs[0][name], expected, tolerance, tolerance, err_msg=f"{mode} {dtype} {name}"
            )
            for other in outputs[1:]:
                np.testing.assert_array_equal(
                    other[name], outputs[0][name], err_msg=f"{name} depends on the schedule"
                )


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kernels_agree_with_the_reference(setting: Setting, mode: str) -> None:
    check(setting, mode, SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["plain", "asan"])
@pytest.mark.parametrize("setting", LARGE, ids=str)
def test_large_kernels_agree_with_the_reference(setting: Setting, mode: str) -> None:
    check(setting, mode, LARGE)


@pytest.mark.parametrize(
    ("setting", "absent"),
    [
        (Setting("kl_balance_backward", (2, 3, 5), (0.01, 0.0)), ("grad_posterior", "grad_representation")),
        (Setting("kl_balance_backward", (2, 3, 5), (0.01, 0.0)), ("grad_prior", "grad_dynamics")),
        (Setting("gaussian_sample_backward", (40,), (False,)), ("grad_mean",)),
        (Setting("gaussian_sample_backward", (40,), (False,)), ("grad_raw_std",)),
        (Setting("gaussian_kl_backward", (3, 5)), ("grad_mean_q", "grad_std_p")),
    ],
    ids=str,
)
def test_gradients_that_nobody_wants_are_not_written(setting: Setting, absent: tuple[str, ...]) -> None:
    case = build_case(setting, "float32")
    arrays = {name: x for name, x in case.call.arrays.items() if name not in absent}
    outputs = {name: shape for name, shape in case.call.outputs.items() if name not in absent}
    call = Call(setting.op, "float32", arrays, outputs, case.call.numbers)
    got = launch_all([(call, SCHEDULES["forward"])], "plain")[0].require_clean()
    assert got.keys() == outputs.keys()
    for name, array in got.items():
        np.testing.assert_allclose(array, case.expected[name], 2e-5, 2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_formula_gives_the_published_words(
    counter: tuple[int, ...], seed: int, words: tuple[int, ...]
) -> None:
    """Random123's known answers, from the header that all backends share."""
    library = ctypes.CDLL(str(build("launchers", SOURCES, MODES["plain"], shared=True)))
    got = (ctypes.c_uint32 * 4)()
    library.philox_words((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint64(seed), got)
    assert tuple(got) == words
