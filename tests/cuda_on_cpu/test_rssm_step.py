"""The CUDA scan of recurrent state-space models under the emulator: its own kernels, and whole windows made of all."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from emulation import FORWARD, MODES, RANDOM, SCHEDULES, build, why_unavailable
from launching import SOURCES, Call, launch_all
from run_launchers import struct_type

from pywm.models import RSSM, RSSMConfig, RSSMState
from pywm.ops import Layer, Policy, _native, rssm_products

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}


@dataclass(frozen=True)
class Form:
    """Sizes of a step, and whether the sample before came as classes."""

    N: int
    D: int
    H: int
    groups: int
    classes: int
    gathered: bool = True

    def __str__(self) -> str:
        """Return a short name for the test's id."""
        return f"{self.N}x{self.D}-{self.H}-{self.groups}x{self.classes}" + "-floats" * (not self.gathered)


FORMS = [
    Form(1, 1, 1, 1, 2),
    Form(3, 40, 5, 2, 5),
    Form(5, 7, 33, 3, 40, gathered=False),
    Form(2, 300, 20, 4, 3),
    Form(4, 20, 300, 1, 256),
]
SMALL = [Form(3, 40, 5, 2, 5), Form(2, 3, 4, 2, 3, gathered=False)]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def enter(f: Form, dtype: str) -> tuple[Call, dict[str, np.ndarray]]:
    g = np.random.default_rng(f.N * f.D)
    arrays: dict[str, Any] = {"deter": g.standard_normal((f.N, f.D)), "add": g.standard_normal((f.N, f.H))}
    is_first = np.arange(f.N) % 3 == 1
    if f.gathered:
        packed = g.standard_normal((f.groups * f.classes, f.H))
        index = g.integers(0, f.classes, (f.N, f.groups)).astype(np.uint8)
        columns = index + f.classes * np.arange(f.groups)
        product = packed[columns].sum(1)
        arrays |= {"packed": packed, "index": index}
    else:
        product = arrays["stoch_proj"] = g.standard_normal((f.N, f.H))
    keep = ~is_first[:, None]
    u = np.full((f.N, 2, f.H), np.nan)  # rows lie apart
    u[:, 0] = arrays["add"] + np.where(keep, product, 0)
    arrays = {k: x if x.dtype == np.uint8 else x.astype(dtype) for k, x in arrays.items()}
    numbers = {"N": f.N, "D": f.D, "H": f.H, "groups": f.groups, "classes": f.classes}
    numbers |= {"add_stride": f.H, "u_stride": 2 * f.H}
    call = Call(
        "rssm_enter", dtype, {**arrays, "is_first": is_first}, {"h": (f.N, f.D), "u": (f.N, 2, f.H)}, numbers
    )
    return call, {"h": np.where(keep, arrays["deter"], 0), "u": u}


def leave(f: Form, dtype: str, everything: bool) -> tuple[Call, dict[str, np.ndarray]]:
    g = np.random.default_rng(f.N * f.D)
    wide, narrow = (f.N, f.groups, f.classes), (f.N, f.D)
    arrays: dict[str, Any] = {"logits": g.standard_normal(wide), "carry_deter": g.standard_normal(narrow)}
    arrays |= {"carry_stoch": g.standard_normal(wide)}
    outer = {"outer_logits": wide, "outer_stoch": wide, "outer_deter": narrow}
    if everything:
        arrays |= {name: g.standard_normal(shape) for name, shape in outer.items()}
    behind = np.arange(f.N) % 2 == 1
    keep = ~behind[:, None]
    get = {name: arrays.get(name, np.zeros(shape)) for name, shape in outer.items()}
    grad = get["outer_stoch"] + np.where(keep[..., None], arrays["carry_stoch"], 0)
    p = softmax(arrays["logits"])
    logits = get["outer_logits"] + 0.9 * p * (grad - (p * grad).sum(-1, keepdims=True))
    deter = get["outer_deter"] + np.where(keep, arrays["carry_deter"], 0)
    arrays = {k: x.astype(dtype) for k, x in arrays.items()} | {"is_first_behind": behind}
    numbers = {"N": f.N, "D": f.D, "groups": f.groups, "classes": f.classes, "unimix": 0.1}
    call = Call("rssm_leave", dtype, arrays, {"grad_logits": wide, "grad_h": narrow}, numbers)
    return call, {"grad_logits": logits, "grad_h": deter}


def cases(f: Form, dtype: str) -> list[tuple[Call, dict[str, np.ndarray]]]:
    return [enter(f, dtype), leave(f, dtype, True), leave(f, dtype, False)]


@functools.cache
def results(mode: str, forms: tuple[Form, ...]) -> Any:
    dtypes = ("float32",) if mode == "tsan" else ("float32", "float64")
    keys = [(f, dtype, order) for f in forms for dtype in dtypes for order in ("forward", "random")]
    calls = [(call, SCHEDULES[order]) for f, dtype, order in keys for call, _ in cases(f, dtype)]
    found = launch_all(calls, mode)
    return {key: found[3 * i : 3 * i + 3] for i, key in enumerate(keys)}


@pytest.mark.parametrize(
    ("mode", "form"),
    [(mode, f) for mode in ("plain", "asan") for f in FORMS] + [("tsan", f) for f in SMALL],
    ids=str,
)
def test_steps_agree_with_numpy(mode: str, form: Form) -> None:
    if reason := why_unavailable(mode):
        pytest.skip(reason)
    for (f, dtype, order), got in results(mode, tuple(SMALL if mode == "tsan" else FORMS)).items():
        if f != form:
            continue
        for result, (_, expected) in zip(got, cases(form, dtype), strict=True):
            for name, x in result.require_clean().items():
                want = expected[name]
                written = ~np.isnan(want)  # the gaps between u's rows are nobody's
                np.testing.assert_array_equal(np.isnan(x), ~written, err_msg=name)
                np.testing.assert_allclose(
                    x[written], want[written], TOLERANCE[dtype], TOLERANCE[dtype], err_msg=f"{order} {name}"
                )


def test_a_class_beyond_the_last_counts_as_the_last() -> None:
    call, _ = enter(Form(3, 40, 5, 2, 5), "float32")
    index = call.arrays["index"].copy()
    index[0, 1] = 200
    mode = "plain" if why_unavailable("asan") else "asan"
    calls = [
        (replace(call, arrays=call.arrays | {"index": x}), SCHEDULES["forward"])
        for x in (index, np.minimum(index, 4))
    ]
    wrong, right = (result.require_clean() for result in launch_all(calls, mode))
    for name, x in right.items():
        np.testing.assert_array_equal(wrong[name], x)


# ---- whole windows -------------------------------------------------------------------------------------------------------


class EmulatedRows(rssm_products.Rows):
    """The row kernels of csrc/cuda, run by the emulator in this process."""

    def __init__(self, order: int) -> None:
        self.library = ctypes.CDLL(str(build("launchers", SOURCES, MODES["plain"], shared=True)))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.library.emulator_set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        self.library.emulator_set_schedule(order, 1, 2)
        self.launches = 0

    def launch(self, op: str, like: torch.Tensor, tensors: dict[str, Any], **numbers: Any) -> None:
        args = struct_type(op, str(like.dtype).removeprefix("torch."))()
        for name, x in tensors.items():
            if x is not None:
                assert x.is_contiguous() or name == "u", name
                setattr(args, name, x.data_ptr())
        for name, x in numbers.items():
            setattr(args, name, x)
        launcher = getattr(self.library, f"{op}_{'f32' if like.dtype == torch.float32 else 'f64'}")
        launcher.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        assert not launcher(ctypes.byref(args), ctypes.sizeof(args)), self.library.emulator_error()
        self.launches += 1

    @staticmethod
    def norm(layer: Layer, c: Any) -> dict[str, Any]:
        turns = layer.scale.shape[0] if layer.scale.ndim == 2 else 1
        kind = ("none", "tanh", "silu", "elu", "relu").index(c.act)
        return {"eps": c.eps, "activation": kind, "layer": c.norm == "layer", "turns": turns}

    def norm_act(self, x, layer, c, y):
        tensors = {"x": x, "scale": layer.scale, "shift": layer.shift, "y": y}
        self.launch("norm_act", x, tensors, M=x.shape[0], D=x.shape[1], **self.norm(layer, c))

    def norm_act_backward(self, grad, x, layer, c, grad_x):
        tensors = {"grad": grad, "x": x, "scale": layer.scale, "shift": layer.shift, "grad_x": grad_x}
        self.launch("norm_act_backward", x, tensors, M=x.shape[0], D=x.shape[1], **self.norm(layer, c))

    def block_gates(self, gates, deter, y):
        M, D = deter.shape
        self.launch("block_gru_gates", deter, {"gates": gates, "deter": deter, "y": y}, M=M, D=D)

    def block_gates_backward(self, grad, gates, deter, grad_gates, grad_deter):
        tensors = {"grad": grad, "gates": gates, "deter": deter}
        tensors |= {"grad_gates": grad_gates, "grad_deter": grad_deter}
        self.launch("block_gru_gates_backward", deter, tensors, M=deter.shape[0], D=deter.shape[1])

    def layernorm_gates(self, pre, layer, eps, deter, y):
        tensors = {"pre": pre, "scale": layer.scale, "shift": layer.shift, "deter": deter, "y": y}
        self.launch("layernorm_gru_gates", deter, tensors, M=deter.shape[0], D=deter.shape[1], eps=eps)

    def layernorm_gates_backward(self, grad, pre, layer, eps, deter, grad_pre, grad_deter):
        tensors = {"grad": grad, "pre": pre, "scale": layer.scale, "shift": layer.shift, "deter": deter}
        tensors |= {"grad_pre": grad_pre, "grad_deter": grad_deter}
        M, D = deter.shape
        self.launch("layernorm_gru_gates_backward", deter, tensors, M=M, D=D, eps=eps)

    def sample(self, logits, uniform, unimix, stoch, index):
        tensors = {"logits": logits, "uniform": uniform, "stoch": stoch, "index": index}
        M, K = logits.shape
        self.launch("categorical_sample", logits, tensors, M=M, K=K, unimix=unimix)

    def enter(self, deter, add, stoch_proj, packed, index, is_first, h, u):
        tensors = {"deter": deter, "add": add, "stoch_proj": stoch_proj, "index": index, "is_first": is_first}
        (N, D), H = deter.shape, u.shape[1]
        groups = 0 if index is None else index.shape[1]
        sizes = {
            "N": N,
            "D": D,
            "H": H,
            "groups": groups,
            "classes": packed.shape[0] // groups if groups else 0,
        }
        strides = {"add_stride": 0 if add.ndim == 1 else H, "u_stride": u.stride(0)}
        self.launch("rssm_enter", deter, tensors | {"packed": packed, "h": h, "u": u}, **sizes, **strides)

    def leave(self, logits, *rest):
        names = (
            "outer_logits",
            "outer_stoch",
            "outer_deter",
            "carry_stoch",
            "carry_deter",
            "is_first_behind",
        )
        *inputs, unimix, grad_logits, grad_h = rest
        tensors = {"logits": logits, **dict(zip(names, inputs, strict=True))}
        tensors |= {"grad_logits": grad_logits, "grad_h": grad_h}
        N, groups, classes = logits.shape
        sizes = {"N": N, "D": grad_h.shape[1], "groups": groups, "classes": classes}
        self.launch("rssm_leave", logits, tensors, **sizes, unimix=unimix)


def model_of(cell: str) -> RSSM:
    sizes = {"deter": 24, "hidden": 18, "stoch": 3, "classes": 5, "embed": 7, "action": 2, "blocks": 4}
    c = RSSMConfig(cell=cell, norm="layer" if cell == "layernorm_gru" else "rms", **sizes)
    return RSSM(c, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("order", [FORWARD, RANDOM])
@pytest.mark.parametrize("cell", rssm_products.CELLS)
def test_a_window_equals_the_reference(cell: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_unavailable("plain"):
        pytest.skip(reason)
    rows = EmulatedRows(order)
    monkeypatch.setattr(rssm_products, "rows", rows)
    model, g = model_of(cell), torch.Generator().manual_seed(1)
    T, N = 4, 3
    embed = torch.randn(T, N, 7, generator=g).double().requires_grad_()
    action, noise = torch.randn(T, N, 2, generator=g).double(), torch.rand(T, N, 3, generator=g).double()
    is_first = torch.rand(T, N, generator=g) < 0.3
    state = RSSMState(torch.randn(N, 24, generator=g).double(), torch.randn(N, 3, 5, generator=g).double())

    def run() -> list[torch.Tensor]:
        r = model.observe(embed, action, is_first, state, noise=noise)
        outputs = [r.deter, r.stoch, r.posterior, r.prior]
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double() for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [embed, *model.parameters()], weights)]

    with _native.disabled():
        want = run()
    with rssm_products.forced():
        got = run()
    assert rows.launches >= 9 * T
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", rssm_products.CELLS)
def test_imagination_equals_the_reference(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_unavailable("plain"):
        pytest.skip(reason)
    rows = EmulatedRows(RANDOM)
    monkeypatch.setattr(rssm_products, "rows", rows)
    model, g = model_of(cell), torch.Generator().manual_seed(1)
    width, layers = model.config.feat, []
    for outputs, scale in ((9, torch.ones(9).double()), (2, None)):
        layers.append(Layer(torch.randn(outputs, width, generator=g).double() / 4, None, scale))
        width = outputs
    policy = Policy(tuple(layers))
    index = torch.randint(5, (4, 3), generator=g).to(torch.uint8)
    state = RSSMState(torch.randn(4, 24, generator=g).double(), index)
    noise = {
        "noise": torch.rand(3, 4, 3, generator=g).double(),
        "action_noise": torch.rand(3, 4, 1, generator=g).double(),
    }
    with torch.no_grad():
        with _native.disabled():
            want = model.imagine(policy, state, 3, **noise)
        with rssm_products.forced():
            got = model.imagine(policy, state, 3, **noise)
    assert (want.path, got.path) == ("steps", "products")
    assert rows.launches >= 3 * 8
    for a, b in zip(got[:-1], want[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
