"""Fuzz every op of the table with calls that are nearly right.

    python -m tests.fuzz_ops --calls 20000                  # what CI runs
    python -m tests.fuzz_ops --calls 200000 --op gae
    python -m tests.fuzz_ops --op gae --seed 1234 --calls 1 # one call again

Takes a good sample of ``pywm.testing.opinfo.OPS`` and mutates one to three things. A call must either return, and then
agree with the float64 reference (one call in five is compared, gradients included), or raise a ValueError or TypeError
that names the function, a mutated argument, what came and what was expected. What is certainly wrong must raise, what is
certainly legal must return. Anything else is a finding. The calls run in a subprocess that notes each seed before the
call, so that a crash or a hang is a finding too.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import inspect
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pywm import ops
from pywm.distributions import Categorical, DiagGaussian, MultiCategorical
from pywm.ops import reference
from pywm.ops._check import FLOAT_DTYPES, INTEGER_DTYPES, KERNEL_DTYPES
from pywm.testing.opinfo import OPS, OpInfo, Sample
from pywm.testing.rssm_samples import RSSM_STEP

FUZZED = (*OPS, RSSM_STEP)
COMPARED_SHARE = 5  # one call in so many is compared with the reference
HANG_SECONDS = 240  # for 200 calls
MEMORY_BYTES = (
    8 << 30
)  # address space of the subprocess: a call that wants gigabytes fails instead of swapping


class Verdict(IntEnum):
    """What a mutation does to a call. The worst one counts, but two clashes may cancel out."""

    GOOD = 0  # legal data: must return
    MAYBE = 1  # depends on the op
    CLASH = 2  # does not fit the other arguments: must raise, unless another mutation makes them fit
    BAD = 3  # no op takes this: must raise


@dataclass
class Case:
    """A call on its way: the sample, what was done to it, and what may be expected of it."""

    info: OpInfo
    sample: Sample
    rng: random.Random
    verdicts: list[Verdict] = field(default_factory=list)
    blamed: set[str] = field(default_factory=set)
    steps: list[str] = field(default_factory=list)
    contexts: list[Callable[[], contextlib.AbstractContextManager[Any]]] = field(default_factory=list)
    dist: Any = None  # replaces the whole distribution
    through: str = ""  # "vmap", "grad": called below a functorch transform
    extreme: bool = False  # NaN, infinities, huge numbers: compared with the reference in the same dtype
    comparable: bool = True

    def note(self, verdict: Verdict, name: str, what: str) -> None:
        self.verdicts.append(verdict)
        self.blamed.add(name)
        if name.startswith("dist.") or name == "nvec":
            self.blamed.add("action")  # the distribution says what an action is
        if name in ("weight", "weights[0]", "x"):
            self.blamed.add("index")  # their shapes say how many classes there are
        if name == "logits":
            self.blamed.add("target")  # likewise
        self.steps.append(f"{name}: {what}")

    @property
    def verdict(self) -> Verdict:
        if self.verdicts.count(Verdict.CLASH) > 1 and Verdict.BAD not in self.verdicts:
            return Verdict.MAYBE
        return max(self.verdicts, default=Verdict.GOOD)

    def call(self) -> tuple[Any, ...]:
        """Call the public function as users do."""
        with contextlib.ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            if self.dist is not None:
                rest = {k: x for k, x in self.sample.tensors.items() if not k.startswith("dist.")}
                numbers = {k: x for k, x in self.sample.numbers.items() if k != "nvec"}
                loss, stats = getattr(ops, self.info.name)(self.dist, **rest, **numbers)
                return loss, *stats
            if self.through == "vmap":
                return self._vmap()
            if self.through == "grad":
                return self._functional_grad()
            return self.info.op(self.sample)

    def _vmap(self) -> tuple[Any, ...]:
        names = [k for k, x in self.sample.tensors.items() if isinstance(x, Tensor)]

        def fn(*tensors: Tensor) -> tuple[Tensor, ...]:
            changed = {**self.sample.tensors, **dict(zip(names, tensors, strict=True))}
            return self.info.op(Sample(changed, dict(self.sample.numbers)))

        stacked = [torch.stack([x, x]) for x in (self.sample.tensors[k] for k in names) if x is not None]
        return tuple(x[1] for x in torch.vmap(fn)(*stacked))

    def _functional_grad(self) -> tuple[Any, ...]:
        name = next(k for k in self.info.differentiable if k in self.sample.tensors)

        def fn(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            outputs = self.info.op(Sample({**self.sample.tensors, name: x}, dict(self.sample.numbers)))
            return outputs[0].sum(), outputs

        _, outputs = torch.func.grad(fn, has_aux=True)(self.sample.tensors[name])
        return outputs  # type: ignore[no-any-return]


# ---- what is known about an op's arguments without being told ------------------------------------------------------


@functools.cache
def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a public op."""
    return dict(inspect.signature(getattr(ops, name)).parameters)


def optional(info: OpInfo, name: str) -> bool:
    """Whether an argument, or a layer's part, may be left out."""
    if name.endswith(".bias"):
        return True
    found = parameters(info.name).get(name)
    return found is not None and found.default is not inspect.Parameter.empty


def role(x: Tensor) -> str:
    """Return "mask", "classes" or "float", by what a good sample holds."""
    return "mask" if x.dtype == torch.bool else "float" if x.is_floating_point() else "classes"


# ---- mutations of one tensor: (case, name, tensor) -> whether it was applicable -------------------------------------


class PlainSubclass(Tensor):
    """A subclass that means nothing."""


class WatchingSubclass(Tensor):
    """A subclass with an opinion of its own, which is torch's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class WrapperSubclass(Tensor):
    """A tensor that has its data elsewhere and unwraps below autograd."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> WrapperSubclass:
        wrapper: WrapperSubclass = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, **unused: Any) -> str:  # type: ignore[override]
        return f"WrapperSubclass({self.inner.shape})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map

        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, WrapperSubclass) else x

        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


class RaisingSubclass(Tensor):
    """A subclass that forbids everything."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def _shape_verdict(case: Case, name: str, before: Tensor, after: Tensor) -> Verdict:
    if after.shape == before.shape:
        return Verdict.GOOD
    # A distribution may have any width, and log_std two ranks.
    same_rows = _takes_any_width(case, name) and after.shape[:-1] == before.shape[:-1]
    any_rows = _takes_any_rows(case, name) and after.shape[-1:] == before.shape[-1:]
    # S and K are what fits.
    shared = case.info.name == "one_hot_linear" and name in ("index", "weight")
    shared |= (
        case.info.name == "norm_mlp"
        and "index" in case.sample.tensors
        and name in ("index", "x", "weights[0]")
    )
    alone = case.info.name == "symexp_twohot_mean"  # its only tensor
    tolerated = same_rows or any_rows or shared or alone or name.endswith("log_std")
    return Verdict.MAYBE if tolerated else Verdict.CLASH


def _takes_any_rows(case: Case, name: str) -> bool:
    """Whether only the last size of an argument is tied to the others: a layer's input."""
    if case.info.name == "norm_mlp":
        return name == "x" and "index" not in case.sample.tensors
    return (case.info.name, name) in (("mlp", "x"), ("norm_act", "x"), ("one_hot_linear", "index"))


def _is_of_rows(case: Case) -> bool:
    """Whether an op takes rows, none of them too, unlike scans and losses; and no empty ones."""
    return case.info.name in ("norm_act", "one_hot_linear", *ROW_OPS) or "gru" in case.info.name


def _takes_any_width(case: Case, name: str) -> bool:
    """Whether the last size of an argument is its own: the classes of a distribution."""
    return name.startswith("dist.") or name == "logits"


# Ops whose rows are not steps of a scan: there may be none of them, and the last size may not be 0.
ROW_OPS = (
    "categorical_sample",
    "kl_balance",
    "symexp_twohot_loss",
    "symexp_twohot_mean",
    "gaussian_sample",
    "gaussian_kl",
    "pixel_cross_entropy",
)


def wrong_rank(case: Case, name: str, x: Tensor) -> bool:
    choices: list[Callable[[], Tensor]] = [
        lambda: x.unsqueeze(0),
        lambda: x.unsqueeze(-1),
        lambda: x.flatten(),
        lambda: x.new_zeros(()),
        lambda: x.new_ones((1,) * 12),
        lambda: x.new_zeros((0,)),
    ]
    if x.ndim and x.shape[0]:
        choices.append(lambda: x[0])
    new = case.rng.choice(choices)()
    case.sample.tensors[name] = new
    case.note(_shape_verdict(case, name, x, new), name, f"rank {new.ndim}")
    return True


def wrong_size(case: Case, name: str, x: Tensor) -> bool:
    if x.ndim == 0:
        return False
    axis = case.rng.randrange(x.ndim)
    shape = list(x.shape)
    shape[axis] = case.rng.choice([0, 1, shape[axis] + 1, max(shape[axis] - 1, 0), shape[axis] * 2 + 3])
    new = x.new_zeros(shape)
    case.sample.tensors[name] = new
    case.note(_shape_verdict(case, name, x, new), name, f"shape {tuple(shape)}")
    return True


def transposed(case: Case, name: str, x: Tensor) -> bool:
    if x.ndim < 2:
        return False
    new = x.transpose(0, 1)
    case.sample.tensors[name] = new
    # A class of one group may be too high for another.
    moved_classes = name == "action" and not x.is_floating_point() and x.shape == new.shape
    verdict = Verdict.MAYBE if moved_classes else _shape_verdict(case, name, x, new)
    case.note(verdict, name, "transposed")
    return True


def huge(case: Case, name: str, x: Tensor) -> bool:
    """Products of sizes beyond 2^31 and 2^63; nothing is allocated, and no other argument fits."""
    if x.ndim == 0 or (
        case.info.name in ROW_OPS and name == "logits"
    ):  # legal alone, or with its rows' numbers
        return False
    if _is_of_rows(case) and any("expanded to" in step for step in case.steps):
        return False  # two of them could fit each other, and the result would fill the memory
    big = case.rng.choice([2**31, 2**31 + 1, 2**32 + 3, 2**40])
    shape = [big, *x.shape[1:]] if case.rng.random() < 0.5 else [*x.shape[:-1], big]
    if case.rng.random() < 0.3 and x.ndim > 1:
        shape = [2**31 + 1] * min(x.ndim, 2) + list(x.shape[2:])
    any_width = _takes_any_width(case, name) and list(shape[:-1]) == list(x.shape[:-1])
    if math.prod(shape) >= 2**63 or any_width:
        return False  # no such tensor exists, or a wide distribution would be computed
    if _takes_any_rows(case, name) and shape[-1] == x.shape[-1]:
        return False  # legal, and the result would fill the memory
    if case.info.name == "one_hot_linear" and name != "bias":
        return False  # likewise
    new = x.new_zeros(()).expand(shape)
    case.sample.tensors[name] = new
    case.note(_shape_verdict(case, name, x, new), name, f"expanded to {tuple(shape)}")
    return True


def wrong_dtype(case: Case, name: str, x: Tensor) -> bool:
    if name in case.blamed:  # it would undo what was done
        return False
    dtype = case.rng.choice(
        [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.int16,
         torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
         torch.float8_e4m3fn, torch.float8_e5m2]
    )  # fmt: skip
    kind = role(x)
    classes = (torch.uint8,) if x.dtype == torch.uint8 else INTEGER_DTYPES
    legal = {"mask": (torch.bool, *FLOAT_DTYPES), "classes": classes, "float": FLOAT_DTYPES}[kind]
    verdict = Verdict.GOOD if dtype in legal else Verdict.BAD
    if kind == "float" and dtype in legal and dtype != x.dtype:
        verdict = Verdict.MAYBE if _floats_left(case) == 1 else Verdict.CLASH
    case.sample.tensors[name] = x.to(dtype)
    case.note(verdict, name, str(dtype))
    return True


def _floats_left(case: Case) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # some of them raise
        return sum(t.is_floating_point() for t in case.sample.tensors.values() if isinstance(t, Tensor))


def quantized(case: Case, name: str, x: Tensor) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.sample.tensors[name] = torch.quantize_per_tensor(x.float(), 0.1, 3, torch.quint8)
    case.note(Verdict.BAD, name, "quantized")
    return True


def meta(case: Case, name: str, x: Tensor) -> bool:
    case.sample.tensors[name] = x.to("meta")
    case.note(Verdict.BAD, name, "on meta")
    return True


def wrong_layout(case: Case, name: str, x: Tensor) -> bool:
    kinds = (
        ["coo", "nested", "jagged"]
        + (["csr"] if x.ndim == 2 else [])
        + ["mkldnn"] * (x.dtype == torch.float32)
    )
    kind = case.rng.choice(kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "coo":
            new = x.to_sparse()
        elif kind == "csr":
            new = x.to_sparse_csr()
        elif kind == "mkldnn":
            new = x.to_mkldnn()
        else:
            layout = torch.strided if kind == "nested" else torch.jagged
            rows = [torch.zeros(2, 3), torch.zeros(4, 3)]
            new = torch.nested.nested_tensor(rows, layout=layout)
    case.sample.tensors[name] = new
    case.note(Verdict.BAD, name, kind)
    return True


def not_a_tensor(case: Case, name: str, x: Tensor) -> bool:
    if name in case.blamed:  # it would undo what was done
        return False
    choices: list[Any] = [
        x.numpy() if x.dtype != torch.bfloat16 else np.zeros(3),
        x[:3].tolist() if x.ndim else x.item(),
        "tensor", b"tensor", object(), {}, (x,), [x],
        range(3), np.datetime64("2026"), type(x), ..., 1j, x.shape,
        lambda: x,
    ]  # fmt: skip
    new = case.rng.choice(choices)
    kept = isinstance(new, int | float) and optional(case.info, name)  # tolist of a 0-d tensor is a number
    case.sample.tensors[name] = new
    case.note(Verdict.MAYBE if kept else Verdict.BAD, name, f"a {type(new).__name__}")
    return True


def a_number(case: Case, name: str, x: Tensor) -> bool:
    if name in case.blamed:  # it would undo what was done
        return False
    number = case.rng.choice([0, 1, 0.5, True, float("nan"), 10**400, -1])
    case.sample.tensors[name] = number  # type: ignore[assignment]
    case.note(
        Verdict.MAYBE if optional(case.info, name) else Verdict.BAD, name, f"the number {str(number)[:9]}"
    )
    return True


def none(case: Case, name: str, x: Tensor) -> bool:
    if name in case.blamed:  # it would undo what was done
        return False
    case.sample.tensors[name] = None
    if name.endswith(
        ("noise", "force_stoch", "force_action")
    ):  # then somebody draws, and the reference other numbers
        case.comparable = False
    if _floats_left(case) == 1:  # nobody is left to clash with
        case.verdicts = [Verdict.MAYBE if v is Verdict.CLASH else v for v in case.verdicts]
    case.note(Verdict.MAYBE if optional(case.info, name) else Verdict.BAD, name, "None")
    return True


def strided(case: Case, name: str, x: Tensor) -> bool:
    wide = x.new_zeros((*x.shape, 3))
    wide[..., 1] = x
    case.sample.tensors[name] = wide[..., 1]
    case.note(Verdict.GOOD, name, "strided")
    return True


def column_major(case: Case, name: str, x: Tensor) -> bool:
    case.sample.tensors[name] = (
        x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    )
    case.note(Verdict.GOOD, name, "column-major")
    return True


def offset(case: Case, name: str, x: Tensor) -> bool:
    shift = case.rng.choice([1, 2, 7])
    flat = x.new_zeros(x.numel() + shift)
    flat[shift:] = x.flatten()
    case.sample.tensors[name] = flat[shift:].view(x.shape)
    case.note(Verdict.GOOD, name, f"at offset {shift}")
    return True


def _moved(x: Tensor) -> Verdict:
    """Elsewhere, a class may be none: the groups of a multi-discrete action differ in size."""
    return Verdict.MAYBE if role(x) == "classes" else Verdict.GOOD


def expanded(case: Case, name: str, x: Tensor) -> bool:
    if x.ndim == 0 or x.numel() == 0:
        return False
    first = (
        x.narrow(case.rng.randrange(x.ndim), 0, 1)
        if case.rng.random() < 0.5
        else x.flatten()[:1].view([1] * x.ndim)
    )
    case.sample.tensors[name] = first.expand(x.shape)
    case.note(_moved(x), name, "expanded")
    return True


def overlapping(case: Case, name: str, x: Tensor) -> bool:
    if x.ndim == 0 or x.numel() == 0:
        return False
    strides = [case.rng.choice([0, 1]) for _ in x.shape]
    case.sample.tensors[name] = x.contiguous().as_strided(x.shape, strides)
    case.note(_moved(x), name, f"overlapping with strides {strides}")
    return True


def flipped(case: Case, name: str, x: Tensor) -> bool:
    """NumPy's negative strides, as far as torch lets them in: by a copy."""
    if x.ndim == 0:
        return False
    case.sample.tensors[name] = torch.from_numpy(x.numpy()[::-1].copy())
    case.note(_moved(x), name, "flipped")
    return True


def negative_bit(case: Case, name: str, x: Tensor) -> bool:
    if not x.is_floating_point():
        return False
    case.sample.tensors[name] = torch._neg_view(-x)
    case.note(Verdict.GOOD, name, "with the negative bit")
    return True


def inference(case: Case, name: str, x: Tensor) -> bool:
    with torch.inference_mode():
        case.sample.tensors[name] = x.clone()
    case.note(Verdict.GOOD, name, "an inference tensor")
    return True


def wants_gradient(case: Case, name: str, x: Tensor) -> bool:
    if not x.is_floating_point():
        return False
    leaf = x.clone().requires_grad_()
    kinds = {"leaf": leaf, "inner": leaf * 1, "parameter": torch.nn.Parameter(x.clone())}
    kind = case.rng.choice(list(kinds))
    case.sample.tensors[name] = kinds[kind]
    case.note(Verdict.GOOD, name, f"wants a gradient ({kind})")
    return True


def special_values(case: Case, name: str, x: Tensor) -> bool:
    if not x.is_floating_point() or x.numel() == 0:
        return False
    values = [float("nan"), float("inf"), -float("inf"), 1e-40, -0.0]
    # Huge λ, huge weights and huge rows of one mean make sums that overflow or cancel by their order alone.
    sums = (
        "mlp",
        "norm_mlp",
        "one_hot_linear",
        "norm_act",
        "layernorm_gru_gates",
        "rssm_observe",
        "rssm_step",
        "imagine",
    )
    if case.info.name not in sums and name != "lam":
        values += [3e38, -3e38]
    share = case.rng.choice([0.1, 1.0])
    hit = torch.rand(x.shape, generator=torch.Generator().manual_seed(case.rng.randrange(2**31))) < share
    case.sample.tensors[name] = torch.where(hit, torch.tensor(case.rng.choice(values), dtype=x.dtype), x)
    case.extreme = True
    case.note(Verdict.GOOD, name, "special values")
    return True


def wrong_class(case: Case, name: str, x: Tensor) -> bool:
    """An action that is no class. Behind a mask it would be legal."""
    if role(x) != "classes" or x.numel() == 0:
        return False
    logits = case.sample.tensors.get("logits")
    if name == "target" and not (type(logits) is Tensor and logits.ndim and logits.shape[-1] < 100):
        return False  # every byte is a class, or nobody knows how many there are
    new = x.clone()
    none = [100, 255] if x.dtype == torch.uint8 else [-1, 2**31, -(2**63), 2**63 - 1, 10**6]
    new.view(-1)[case.rng.randrange(x.numel())] = case.rng.choice(none)
    case.sample.tensors[name] = new
    case.note(Verdict.MAYBE if "valid" in case.sample.tensors else Verdict.BAD, name, "not a class")
    return True


def subclass(case: Case, name: str, x: Tensor) -> bool:
    kind = case.rng.choice([PlainSubclass, WatchingSubclass, WrapperSubclass, RaisingSubclass])
    new = WrapperSubclass(x) if kind is WrapperSubclass else x.as_subclass(kind)
    case.sample.tensors[name] = new
    # torch asks the forbidding one before us and raises TypeError by itself; see TORCH_ERRORS.
    case.note(Verdict.MAYBE if kind is RaisingSubclass else Verdict.GOOD, name, f"a {kind.__name__}")
    return True


def fake(case: Case, name: str, x: Tensor) -> bool:
    case.sample.tensors[name] = FakeTensorMode().from_tensor(x)
    case.comparable = False
    case.note(Verdict.MAYBE, name, "a FakeTensor")
    return True


TENSOR_MUTATIONS: tuple[tuple[Callable[[Case, str, Tensor], bool], int], ...] = (
    (wrong_rank, 4), (wrong_size, 4), (transposed, 2), (huge, 2), (wrong_dtype, 6), (quantized, 1), (meta, 2),
    (wrong_layout, 3), (not_a_tensor, 3), (a_number, 1), (none, 2), (strided, 2), (column_major, 2), (offset, 2),
    (expanded, 2), (overlapping, 2), (flipped, 1), (negative_bit, 2), (inference, 1), (wants_gradient, 4),
    (special_values, 3), (wrong_class, 2), (subclass, 2), (fake, 1),
)  # fmt: skip


# ---- mutations of a number, or of the whole call --------------------------------------------------------------------


def number_of_another_kind(case: Case) -> bool:
    """A number out of range, not a number, or something else in its place."""
    defaults = {
        k: p.default for k, p in parameters(case.info.name).items() if p.kind is p.KEYWORD_ONLY or k == "lam"
    }
    names = [
        k
        for k in defaults
        if k not in case.sample.tensors and k not in case.blamed and not isinstance(defaults[k], Tensor)
    ]
    names = [k for k in names if k not in ("valid", "old_value")] + [
        k for k in ("nvec",) if k in case.sample.numbers and k not in case.blamed
    ]
    if not names:
        return False
    name = case.rng.choice(names)
    tensor = torch.tensor(0.5)
    values: list[tuple[Any, Verdict]] = [
        (float("nan"), Verdict.BAD), (-1, Verdict.BAD), (-1e-9, Verdict.BAD), (-float("inf"), Verdict.BAD),
        (float("inf"), Verdict.MAYBE), (10**400, Verdict.MAYBE), (1.0000001, Verdict.MAYBE), (0, Verdict.MAYBE),
        (1, Verdict.MAYBE), (1e-320, Verdict.MAYBE), (1e300, Verdict.MAYBE), ("0.9", Verdict.BAD), (b"", Verdict.BAD),
        (None, Verdict.MAYBE), (True, Verdict.MAYBE), (1 + 0j, Verdict.BAD), ([0.5], Verdict.BAD), (object(), Verdict.BAD),
        (Fraction(1, 2), Verdict.MAYBE), (np.float32(0.5), Verdict.MAYBE), (np.float64(0.5), Verdict.MAYBE),
        (np.array(0.5), Verdict.BAD), (tensor, Verdict.BAD), (tensor.to("meta"), Verdict.BAD), (float, Verdict.BAD),
    ]  # fmt: skip
    if name == "nvec":
        width = sum(case.sample.numbers["nvec"])
        values = [
            ((), Verdict.BAD), ((width + 1,), Verdict.BAD), ((width, 0), Verdict.BAD), ((-1, width + 1), Verdict.BAD),
            ((2**63 - 1, 2**63 - 1, 2 + width), Verdict.BAD), ((10**30,), Verdict.BAD), ((width,), Verdict.CLASH),
            ("ab", Verdict.BAD), (None, Verdict.BAD), (3, Verdict.BAD), ((0.5, 1), Verdict.BAD), ((None,), Verdict.BAD),
            (torch.tensor([1, width - 1]), Verdict.CLASH), ((float("nan"),), Verdict.BAD),
        ]  # fmt: skip
    value, verdict = case.rng.choice(values)
    case.sample.numbers[name] = value
    case.extreme = True
    case.note(verdict, name, f"{str(value)[:20]} ({type(value).__name__})")
    return True


def other_distribution(case: Case) -> bool:
    if case.dist is not None or any(k.startswith("dist.") for k in case.blamed):
        return False
    if not any(k.startswith("dist.") for k in case.sample.tensors):
        return False
    first = next(x for k, x in case.sample.tensors.items() if k.startswith("dist."))
    choices: list[tuple[Any, Verdict]] = [
        ("categorical", Verdict.BAD),
        (first, Verdict.BAD),
        (object(), Verdict.BAD),
        (Categorical, Verdict.BAD),
        (torch.distributions.Bernoulli(0.5), Verdict.BAD),
        (Categorical(None), Verdict.BAD),  # type: ignore[arg-type]
        (Categorical([[0.0, 1.0]]), Verdict.BAD),  # type: ignore[arg-type]
        (DiagGaussian(first, None), Verdict.BAD),  # type: ignore[arg-type]
        (DiagGaussian(None, first), Verdict.BAD),  # type: ignore[arg-type]
        (DiagGaussian(first, 0.0), Verdict.BAD),  # type: ignore[arg-type]
        (DiagGaussian(first, first), Verdict.MAYBE),  # type: ignore[arg-type]
        (Categorical(first), Verdict.MAYBE),  # type: ignore[arg-type]
        (MultiCategorical(first, case.rng.choice([(0,), (-1, 3), (2**70,), (1,) * 100, ()])), Verdict.BAD),  # type: ignore[arg-type]
    ]
    case.dist, verdict = case.rng.choice(choices)
    case.comparable = False
    case.blamed.update(case.sample.tensors)  # an action of the kind before may be what is wrong now
    case.note(verdict, "dist", f"another distribution, {type(case.dist).__name__}")
    return True


def everything_of_dtype(case: Case) -> bool:
    if case.steps:
        return False
    dtype = case.rng.choice([torch.float16, torch.bfloat16])
    for name, x in case.sample.tensors.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            case.sample.tensors[name] = x.to(dtype)
    case.extreme = True  # sums of many rows overflow or round: the reference in the same dtype does so too
    case.note(Verdict.GOOD, next(iter(case.sample.tensors)), f"all {dtype}")
    return True


def everything_fake(case: Case) -> bool:
    if case.steps:
        return False
    mode = FakeTensorMode()
    for name, x in case.sample.tensors.items():
        if type(x) is Tensor:
            case.sample.tensors[name] = mode.from_tensor(x)
    if case.rng.random() < 0.5:
        case.contexts.append(lambda: mode)
    case.comparable = False
    case.note(Verdict.GOOD, next(iter(case.sample.tensors)), "all FakeTensors")
    return True


def everything_long_and_empty(case: Case) -> bool:
    """Sizes beyond 2^31 that hold nothing."""
    if case.steps or _is_of_rows(case):
        return False
    shape = (2**31 + 1, 0)
    tensors = case.sample.tensors
    if not all(
        type(x) is Tensor and x.ndim == 2 and x.dtype in (*KERNEL_DTYPES, torch.bool)
        for x in tensors.values()
    ):
        return False
    case.sample.tensors = {k: torch.zeros(shape, dtype=x.dtype) for k, x in tensors.items() if x is not None}
    case.comparable = False  # the reference walks all the rows
    case.note(Verdict.GOOD, next(iter(case.sample.tensors)), f"all {shape}")
    return True


def no_rows(case: Case) -> bool:
    if case.steps:
        return False
    for name, x in case.sample.tensors.items():
        if isinstance(x, Tensor) and x.ndim and not name.endswith(("bootstrap", "log_std")):
            case.sample.tensors[name] = x[:0]
            case.blamed.add(name)
    scan = next(iter(case.sample.tensors.values()))
    empty_scan = (
        isinstance(scan, Tensor)
        and not _is_of_rows(case)
        and not any(k.startswith("dist.") for k in case.sample.tensors)
    )
    case.note(
        Verdict.BAD if empty_scan else Verdict.MAYBE, next(iter(case.sample.tensors)), "all without rows"
    )
    return True


def under_a_context(case: Case) -> bool:
    kinds: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "deterministic": _deterministic,
        "default_dtype": _default_double,
    }
    kind = case.rng.choice(list(kinds))
    case.contexts.append(kinds[kind])
    case.note(Verdict.GOOD, next(iter(case.sample.tensors)), f"under {kind}")
    return True


def below_functorch(case: Case) -> bool:
    if case.steps:
        return False
    case.through = case.rng.choice(["vmap", "grad"])
    case.comparable = False
    case.note(Verdict.MAYBE, next(iter(case.sample.tensors)), f"below torch.func.{case.through}")
    return True


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """New memory is filled with NaN by torch itself."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _default_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CALL_MUTATIONS: tuple[tuple[Callable[[Case], bool], int], ...] = (
    (number_of_another_kind, 14),
    (other_distribution, 8),
    (everything_of_dtype, 1),
    (everything_fake, 1),
    (everything_long_and_empty, 1),
    (no_rows, 1),
    (under_a_context, 2),
    (below_functorch, 1),
)

# Errors that are torch's own to raise, by what must have been done, the type and the text. Nothing else is excused.
TORCH_ERRORS: tuple[tuple[str, type[Exception], str, str], ...] = (
    (
        "a FakeTensor",
        Exception,
        r"[Ff]ake",
        "torch forbids mixing fake and real tensors, or fake tensors of two modes",
    ),
    (
        "all FakeTensors",
        Exception,
        r"[Ff]ake",
        "the same, after another mutation left a real tensor among them",
    ),
    (
        "RaisingSubclass",
        TypeError,
        r"__torch_function__|implementation",
        "the subclass itself forbids every operation",
    ),
    (
        "Subclass; ",
        TypeError,
        r"Multiple dispatch failed",
        "two unrelated subclasses: neither knows the other",
    ),
    (
        "inference",
        RuntimeError,
        r"[Ii]nference tensors",
        "an inference tensor cannot be saved for a gradient",
    ),
    (
        "below torch.func",
        Exception,
        r"vmap|functorch|torch\.func|[Bb]atching|transform",
        "functorch's own limits",
    ),
)


# ---- one call --------------------------------------------------------------------------------------------------------


def weighted(rng: random.Random, table: tuple[tuple[Any, int], ...]) -> Any:
    return rng.choices([fn for fn, _ in table], [weight for _, weight in table])[0]


def is_ordinary(x: Tensor, device: str) -> bool:
    """Whether nothing has been done to a tensor that would keep another mutation from working."""
    return (
        x.layout is torch.strided
        and x.device.type == device
        and not (x.is_nested or x.is_quantized or x.is_inference() or x.is_neg() or x.requires_grad)
        and x.dtype in (*FLOAT_DTYPES, torch.bool, torch.int64)
        and x.numel() < 2**31
    )


def build(info: OpInfo, seed: int, device: str = "cpu") -> Case:
    """Return call number ``seed`` of an op."""
    rng = random.Random(f"{info.name} {seed}")
    variant = rng.choice(list(info.variants))
    shape = rng.choice([s for s in info.shapes if all(n <= 300 for n in s)])
    if len(shape) == 2 and rng.random() < 0.5:
        shape = (rng.randint(1, 9), rng.randint(1, 9))
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    case = Case(info, info.sample(shape, variant, dtype, device, seed), rng)
    wanted, tries = rng.choice([1, 1, 2, 3]), 0
    while len(case.steps) < wanted and tries < 50 and not case.through:
        tries += 1
        with contextlib.suppress(RuntimeError, TypeError):  # torch itself, or NumPy, makes no such tensor
            if rng.random() < 0.25:
                weighted(rng, CALL_MUTATIONS)(case)
                continue
            name = rng.choice(
                [k for k in case.sample.tensors if case.dist is None or not k.startswith("dist.")]
            )
            x = case.sample.tensors[name]
            if type(x) is Tensor and is_ordinary(
                x, device
            ):  # the tensor mutations build upon an ordinary one
                weighted(rng, TENSOR_MUTATIONS)(case, name, x)
    return case


def ordinary(x: Any) -> Any:
    """Return a tensor as the reference takes it: dense, real, without a history."""
    if isinstance(x, WrapperSubclass):
        x = x.inner
    return x.detach().as_subclass(Tensor).resolve_neg().clone() if isinstance(x, Tensor) else x


def compare(case: Case, outputs: tuple[Tensor, ...]) -> str:
    """Return how the outputs, and the gradients where there are any, differ from the reference's; "" if they do not."""
    info = case.info
    dtype = outputs[0].dtype
    wide = dtype if case.extreme else torch.float64
    leaves = {k: x for k, x in case.sample.tensors.items() if isinstance(x, Tensor) and x.requires_grad}
    inputs: dict[str, Any] = {}
    for k, x in case.sample.tensors.items():
        plain = ordinary(x)
        if isinstance(plain, Tensor) and plain.is_floating_point() and not _is_mask(case, k):
            plain = plain.to(wide)
        inputs[k] = plain.requires_grad_() if k in leaves else plain
    with contextlib.ExitStack() as stack:
        if torch.is_inference(outputs[0]):
            stack.enter_context(torch.inference_mode())
        if torch.no_grad in case.contexts:  # then the op was asked for no gradient either
            stack.enter_context(torch.no_grad())
        expected = info.reference(Sample(inputs, dict(case.sample.numbers)))
    rtol, atol = info.tol.get(dtype, (2e-2, 2e-2))
    advantage = inputs.get("advantage")
    constant = advantage is not None and advantage.numel() and (advantage == advantage.flatten()[0]).all()
    if info.name == "ppo_loss" and advantage is not None and constant:
        # Normalising equal advantages divides rounding errors by 1e-8.
        atol = max(atol, 1e8 * torch.finfo(dtype).eps * float(advantage.abs().max()))
    if info.name == "symexp_twohot_mean":
        # Bins of 5e8 cancel out.
        bins = reference.symexp_bins(inputs["logits"].shape[-1], wide, torch.device("cpu"))
        sizes = (inputs["logits"].detach().softmax(-1).nan_to_num(0) * bins.abs()).sum(-1)
        atol = max(atol, 64 * torch.finfo(dtype).eps * float(sizes.max() if sizes.numel() else 0))
    pairs = list(zip(info.outputs, outputs, expected, strict=True))
    leaves = {k: x for k, x in leaves.items() if k in info.differentiable}
    got = gradients(outputs, list(leaves.values()))
    want = gradients(expected, [inputs[k] for k in leaves])
    pairs += [(f"gradient of {k}", *_both(g, w)) for k, g, w in zip(leaves, got, want, strict=True)]
    for name, a, b in pairs:
        if a.shape != b.shape:
            return f"{name} is {tuple(a.shape)}, the reference's is {tuple(b.shape)}"
        a, b = ordinary(a), ordinary(b).to(a.dtype)
        if case.extreme:
            # Overflow and NaN meet other operations on the way; where both are finite, they must agree.
            both = a.isfinite() & b.isfinite() & (a.abs() < 1e15) & (b.abs() < 1e15)
            a, b = torch.where(both, a, 0), torch.where(both, b, 0)
            rtol, atol = 10 * rtol, 10 * atol
        if not torch.allclose(a, b, rtol, atol, equal_nan=True):
            return f"{name} differs from the reference by {(a - b).abs().max().item():.3g}"
    return ""


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of the sum of the outputs, None where there is none."""
    graph = [x.sum() for x in outputs if x.requires_grad and x.numel()]
    if not graph or not leaves:
        return (None,) * len(leaves)
    return torch.autograd.grad(graph, leaves, allow_unused=True)


def _is_mask(case: Case, name: str) -> bool:
    return name in ("terminated", "truncated", "valid")


def _both(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return two gradients, of which an absent one means zeros."""
    if a is None:
        return (torch.zeros(()), torch.zeros(())) if b is None else (torch.zeros_like(b), b)
    return a, torch.zeros_like(a) if b is None else b


def judge(case: Case, seed: int) -> tuple[str, str]:
    """Make the call. Returns ("returned" | "compared" | "raised" | "torch's", "") or ("finding", what is wrong)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = case.call()
            if case.verdict in (Verdict.CLASH, Verdict.BAD):
                return "finding", "a bad call returned"
            if len(outputs) != len(case.info.outputs) or not all(isinstance(x, Tensor) for x in outputs):
                return "finding", f"returned {[type(x).__name__ for x in outputs]}"
            if seed % COMPARED_SHARE or not case.comparable:
                return "returned", ""
            difference = compare(case, outputs)
            return ("finding", difference) if difference else ("compared", "")
    except Exception as error:
        text = str(error)
        if excused(case, error):
            return "torch's", ""
        kind = type(error).__name__
        if case.verdict is Verdict.GOOD:
            return "finding", f"a legal call raised {kind}: {text}"
        if not isinstance(error, ValueError | TypeError):
            return "finding", f"raised {kind}: {text}"
        return ("raised", "") if well_said(case, text) else ("finding", f"an unclear {kind}: {text}")


def excused(case: Case, error: Exception) -> bool:
    """Whether the error is torch's own to raise."""
    done = "".join(f"{step}; " for step in case.steps)
    return any(
        what in done and isinstance(error, kind) and re.search(text, str(error))
        for what, kind, text, _ in TORCH_ERRORS
    )


def well_said(case: Case, text: str) -> bool:
    """Whether a message names the function, a mutated argument, what came and what was expected."""
    function = case.info.name
    if text.startswith("Policy: "):  # it looks at its own layers when it is made
        text = "imagine: " + re.sub(r"\blayers\[", "policy.layers[", text.removeprefix("Policy: "))
    head = re.match(rf"{function}: .+ (is|are) .+, but .+", text, re.DOTALL) or text.startswith(
        "MultiCategorical: nvec is"
    )
    return bool(head) and any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in case.blamed)


# ---- the subprocess that makes the calls, and the driver ------------------------------------------------------------


def work(names: list[str], first: int, last: int, log: str, seconds: float, device: str) -> None:
    """Make the calls ``first`` to ``last`` of each op; print findings and totals as JSON lines."""
    if "asan" not in os.environ.get("LD_PRELOAD", "") and device == "cpu":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    deadline = time.monotonic() + seconds
    table = {info.name: info for info in FUZZED}
    note = os.open(log, os.O_WRONLY)
    for name in names:
        totals: Counter[str] = Counter()
        start = time.process_time()
        for seed in range(first, last):
            os.pwrite(note, f"{name} {seed} ".ljust(64).encode(), 0)
            if seed % 200 == first % 200:
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
                if time.monotonic() > deadline:
                    break
            case = build(table[name], seed, device)
            outcome, text = judge(case, seed)
            totals[outcome] += 1
            if text:
                say({"op": name, "seed": seed, "finding": text, "steps": case.steps})
        say({"op": name, "totals": totals, "seconds": time.process_time() - start})
    faulthandler.cancel_dump_traceback_later()


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def drive(
    names: list[str], calls: int, seed: int, seconds: float, device: str
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Run the calls of all ops in subprocesses; a crash becomes a finding, and the rest goes on after it."""
    findings: list[dict[str, Any]] = []
    totals: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    # Importing torch takes as long as some hundred calls: one process for all, unless one of them ends it.
    waiting = [(names, seed)]
    while waiting:
        group, first = waiting.pop(0)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            log.write_text(f"{group[0]} {first} ")
            arguments = [word for name in group for word in ("--op", name)]
            arguments += ["--work", str(log), "--seed", str(first), "--calls", str(seed + calls - first)]
            arguments += ["--seconds", str(max(deadline - time.monotonic(), 0)), "--device", device]
            run = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, *arguments],
                capture_output=True, text=True, env=environment, check=False,
            )  # fmt: skip
            last_op, at = log.read_text().split()[:2]
        for line in map(json.loads, run.stdout.splitlines()):
            if "finding" in line:
                findings.append(line)
            else:
                totals.update(line["totals"])
                report(line["op"], line)
        if run.returncode == 0:
            continue
        why = "hang" if "Timeout (" in run.stderr else f"crash, exit status {run.returncode}"
        findings.append(
            {"op": last_op, "seed": int(at), "finding": f"{why}: {run.stderr.strip()[-1500:]}", "steps": []}
        )
        later = group[group.index(last_op) + 1 :]
        waiting += [([last_op], int(at) + 1)] if int(at) + 1 < seed + calls else []
        waiting += [(later, seed)] if later else []
    return findings, totals


def report(name: str, line: dict[str, Any]) -> None:
    totals = ", ".join(f"{n} {what}" for what, n in sorted(line["totals"].items()))
    sys.stdout.write(f"{name}: {totals} in {line['seconds']:.0f} s of CPU time\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=20_000, help="calls an op")
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="number of the first call")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this time, done or not")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.op or [info.name for info in FUZZED]
    if arguments.work:
        last = arguments.seed + arguments.calls
        work(names, arguments.seed, last, arguments.work, arguments.seconds, arguments.device)
        return 0
    start = time.monotonic()
    findings, totals = drive(names, arguments.calls, arguments.seed, arguments.seconds, arguments.device)
    seen: Counter[str] = Counter()
    for finding in findings:
        kind = finding["op"] + re.sub(r"[\d.]+|\([^)]*\)", "", finding["finding"])[:60]
        seen[kind] += 1
        if seen[kind] <= 2:
            again = f"python -m tests.fuzz_ops --op {finding['op']} --seed {finding['seed']} --calls 1"
            sys.stdout.write(
                f"\nFINDING {finding['finding']}\n  after: {'; '.join(finding['steps'])}\n  again: {again}\n"
            )
    made = sum(totals.values())
    sys.stdout.write(
        f"{made} calls, {len(findings)} findings ({len(seen)} kinds), {time.monotonic() - start:.0f} s\n"
    )
    if made < arguments.calls * len(names):
        sys.stdout.write(f"stopped before the {arguments.calls} calls an op that were asked for\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
