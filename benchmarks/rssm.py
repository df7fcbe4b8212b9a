"""The recurrent state-space model side by side with what is installed of the rivals.

    python benchmarks/rssm.py --size size12m                      # 2 threads, all workloads
    python benchmarks/rssm.py --size size1m --check               # exit 1 if a target is missed
    python benchmarks/rssm.py --size classic --sheeprl rivals/sheeprl --json out.json
    python benchmarks/rssm.py --size tiny --compile none --seconds 1 --workload observe

Rivals: pywm's own reference in PyTorch, torchrl's DreamerV3 modules and sheeprl's DreamerV3 (block GRU, or for "classic"
LayerNorm GRU, which torchrl lacks), each eager and with one step under torch.compile, and torchrl's compiled scan.
``--compile window`` adds the reference's whole window under torch.compile, which unrolls it and takes minutes; ``--compile
none`` leaves all of this out. sheeprl pins other versions of everything, so it is put beside, not installed:

    pip install --no-deps --target rivals/sheeprl sheeprl==0.8.4

On a GPU (``--device cuda``): the reference, eager, under torch.compile(mode="reduce-overhead") and in a CUDA graph.

Workloads: "observe" filters a window of 64 rows of 16 (posterior and prior) without gradients; "gradients" adds the
gradients of posterior, prior, deter and stoch in all parameters and embeddings; "imagine" goes 15 steps from 1024 starts
with a 3-layer actor of 18 classes, without gradients; "act" is one posterior step for 1 or 16 environments, many times in
a row, as an agent acts. A single one right after others' work finds none of its weights in the caches, and waits for memory
("cold_ms").

All in float32. With ``--operands bfloat16`` (where the CPU has instructions for it, and on GPUs) pywm's products round
their operands, and every rival runs twice: under torch.autocast to bfloat16, which the ratio is taken to, and in float32
("float32_ratio"). Every side draws its own samples, and rivals get the least work that their code allows: no losses, no
TensorDict where a tensor will do, embeddings and priors outside the recurrence where they offer it. Before anything is
timed, pywm must equal its float64 reference under forced samples, and rivals' outputs must be finite, one-hot and of our
shapes. All sides take turns within one run; figures are medians. "peak" is the share of what one large torch.mm reaches
in the same run, where 2 FLOPs are counted for each weight and row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rssm_sides import (
    A,
    CompiledReference,
    Data,
    EagerReference,
    Form,
    GraphReference,
    LeftOutError,
    Pywm,
    Sheeprl,
    SheeprlClassic,
    Side,
    TorchRL,
    find_sheeprl,
)
from run import Thunk, interleaved, machine, settle_allocator
from torch import Tensor

from pywm.models import SIZES, RSSMConfig
from pywm.ops import Layer, Policy, _native
from pywm.ops.rssm_params import OPERANDS
from pywm.training.machine import version

FORMS = {
    "size1m": Form(embed=256, units=64),
    "classic": Form(embed=4096, units=512),
    "size12m": Form(embed=1024, units=256),
    # To try this script.
    "tiny": Form(embed=12, units=16, T=4, B=2, N=8, H=3),
    "tiny-classic": Form(embed=12, units=16, T=4, B=2, N=8, H=3),
}
TINY = {"deter": 32, "hidden": 16, "stoch": 4, "classes": 4}
MODELS = {**SIZES, "tiny": TINY, "tiny-classic": {**SIZES["classic"], **TINY}}

# What is to be reached against the fastest rival, with 2 threads.
TARGETS: dict[str, dict[tuple[str, str], float]] = {
    "float32": {
        ("observe", "size1m"): 6.0,
        ("observe", "classic"): 2.5,
        ("observe", "size12m"): 2.4,
        ("gradients", "size1m"): 4.0,
        ("gradients", "classic"): 2.2,
        ("gradients", "size12m"): 2.5,
        ("imagine", "size1m"): 2.5,
        ("imagine", "classic"): 1.5,
        ("imagine", "size12m"): 1.4,
        ("act 16", "size12m"): 2.0,
        ("act 1", "size12m"): 1.5,
        ("act 1", "size1m"): 4.0,
    },
    "bfloat16": {
        ("observe", "classic"): 4.0,
        ("observe", "size12m"): 4.0,
        ("imagine", "classic"): 1.8,
        ("imagine", "size12m"): 1.8,
    },
}
AUTOCAST = ", autocast"  # behind the names of rivals under torch.autocast to bfloat16
WORKLOADS = ("observe", "gradients", "imagine", "act 1", "act 16")
COMPILE = ("none", "step", "window")
ACTING_SECONDS = 20e-3  # an agent acts many times before it learns
PRODUCT = 1536  # rows and columns of the matrices whose product measures the machine
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def sides(c: RSSMConfig) -> dict[str, tuple[type[Side], str]]:
    """Who takes part, and what of it is compiled."""
    sheeprl = SheeprlClassic if c.cell == "layernorm_gru" else Sheeprl
    return {
        "pywm": (Pywm, ""),
        "reference": (EagerReference, ""),
        "reference, compiled step": (CompiledReference, "step"),
        "reference, compiled window": (CompiledReference, "window"),
        "reference, CUDA graph": (GraphReference, ""),
        "torchrl": (TorchRL, ""),
        "torchrl, compiled step": (TorchRL, "step"),
        "torchrl, compiled scan": (TorchRL, "scan"),
        "sheeprl": (sheeprl, ""),
        "sheeprl, compiled step": (sheeprl, "step"),
    }


# ---- the gates -----------------------------------------------------------------------------------------------------------


def differentiate(side: Any, **options: Any) -> list[Tensor]:
    """Return the outputs of observe and the gradients of their sum, whose cotangents cost nobody anything."""
    outputs = side.observe(**options)
    ones = [x.new_ones(()).expand_as(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, side.leaves, ones)]


def in_double(side: Pywm) -> Pywm:
    """Return a copy of a side with the same numbers in float64."""
    exact = copy.copy(side)
    exact.d = copy.copy(side.d)
    for name, x in vars(side.d).items():
        setattr(exact.d, name, x.double() if isinstance(x, Tensor) and x.is_floating_point() else x)
    exact.model = copy.deepcopy(side.model).double()
    exact.model.config = dataclasses.replace(side.c, operands="float32")
    exact.embed = exact.d.embed.clone().requires_grad_()
    exact.leaves = [exact.embed, *exact.model.parameters()]
    layers = (Layer(*(None if x is None else x.double() for x in layer)) for layer in side.policy.layers)
    exact.policy = Policy(tuple(layers), norm=side.c.norm, act=side.c.act, eps=side.c.eps)
    return exact


def under_force(side: Pywm) -> list[Tensor]:
    """Return the results of all workloads under forced samples and actions."""
    d = side.d
    found = differentiate(side, force_stoch=d.force)
    with torch.no_grad():
        found += side.imagine(force_stoch=d.force_imagined, force_action=d.force_action)
        return [*found, *side.act_step(*d.step(d.B), force_stoch=d.force[0])]


def assert_correct(side: Pywm) -> None:
    """The green gate: kernels equal the float64 reference."""
    before = _native.calls()
    got = under_force(side)
    served = {name for name, count in _native.calls().items() if count != before.get(name)}
    on_gpu = {"rssm_enter", "rssm_leave", "norm_act", "norm_act_backward", "categorical_sample"}
    expected = on_gpu if side.d.deter.is_cuda else {"rssm_observe", "rssm_observe_backward", "rssm_imagine"}
    assert expected <= served, f"kernels served only {served}"
    with _native.disabled():
        want = under_force(in_double(side))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)
        assert error < TOLERANCE[side.c.operands], (
            f"output {i} is off the float64 reference by {error:.1e} of its largest"
        )


def assert_plausible(outputs: Any, want: Any, c: RSSMConfig, workload: str) -> None:
    """Finite, of our shapes, and one-hot where samples are; gradients have each side's own shapes."""
    assert all(x.isfinite().all() for x in outputs), "not finite"
    count = 4 if workload == "gradients" else len(want)
    shapes = [[tuple(x.shape) for x in side[:count]] for side in (outputs, want)]
    assert shapes[0] == shapes[1], f"shapes {shapes[0]}, but {shapes[1]} were expected"
    stoch = outputs[1].unflatten(-1, (c.stoch, c.classes))
    for x in (stoch.amax(-1), stoch.sum(-1)):
        assert torch.allclose(x, torch.ones_like(x)), "samples are not one-hot"


# ---- the comparison ------------------------------------------------------------------------------------------------------


def call_of(side: Side, workload: str, *, autocast: bool = False) -> Thunk:
    call: Thunk
    if workload == "gradients":
        call = functools.partial(differentiate, side)
    else:
        call = side.act(int(workload.split()[1])) if workload.startswith("act") else getattr(side, workload)

    def quiet() -> object:
        with torch.set_grad_enabled(workload == "gradients"):
            if not autocast:  # even a switched-off one takes as long as some of these calls
                return call()
            with torch.autocast(side.d.deter.device.type, torch.bfloat16, cache_enabled=False):
                return call()

    return quiet


def compare(
    workload: str, d: Data, c: RSSMConfig, options: argparse.Namespace, sheeprl: str
) -> dict[str, Any]:
    """Return one row: medians in ms of everybody who can, and who cannot."""
    torch.compiler.reset()
    form = FORMS[options.size]
    ours = Pywm(d, c, form)
    want: Any = call_of(ours, workload)()
    thunks: dict[str, Thunk] = {}
    left_out: dict[str, str] = {}
    compile_s: dict[str, float] = {}
    precisions = [True, False] if c.operands == "bfloat16" else [False]
    for (name, (kind, compiled)), low in itertools.product(sides(c).items(), precisions):
        if kind is Pywm and low:
            continue
        if low:
            name += AUTOCAST
        start = time.perf_counter()
        try:
            if issubclass(kind, Sheeprl) and sheeprl:
                raise LeftOutError(sheeprl)
            if compiled in ("scan", "window") and workload not in ("observe", "gradients"):
                continue
            needed = {"": "none", "scan": "step"}.get(compiled, compiled)
            if COMPILE.index(needed) > COMPILE.index(options.compile):
                minutes = " (compiles for minutes)" if needed == "window" else ""
                raise LeftOutError(f"--compile {needed} includes it{minutes}")
            own = c if kind is Pywm else dataclasses.replace(c, operands="float32")
            thunk = call_of(kind(d, own, form, compiled), workload, autocast=low)
            assert_plausible(thunk(), want, c, workload)
        except LeftOutError as why:
            left_out[name] = str(why)
            continue
        except Exception as error:
            if kind is Pywm:
                raise
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        if compiled:
            compile_s[name] = round(time.perf_counter() - start, 1)
        thunks[name] = thunk
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=options.device)
    acts = workload.startswith("act")
    everybody = {**thunks, "product": lambda: torch.mm(a, b)}
    times = interleaved(everybody, options.seconds, ACTING_SECONDS if acts else 2e-3)
    cold = interleaved(everybody, options.seconds / 3) if acts else {}
    peak = 2 * PRODUCT**3 / times.pop("product")  # FLOPs in a µs
    rivals = {name: x for name, x in times.items() if name != "pywm"}
    same = {name: x for name, x in rivals.items() if name.endswith(AUTOCAST)} or rivals
    fastest = min(same, key=same.__getitem__)
    in_float32 = min(x for name, x in rivals.items() if not name.endswith(AUTOCAST))
    flops = ours.flops(workload)
    return {
        "workload": workload,
        "size": options.size,
        "gflop": round(flops * 1e-9, 3),
        "peak_gflop_s": round(peak * 1e-3, 1),
        "fastest": fastest,
        "ratio": round(rivals[fastest] / times["pywm"], 2),
        "float32_ratio": round(in_float32 / times["pywm"], 2),
        "target": TARGETS[c.operands].get((workload, options.size)),
        "ms": {name: round(x * 1e-3, 4) for name, x in sorted(times.items(), key=lambda item: item[1])},
        "cold_ms": {name: round(cold[name] * 1e-3, 4) for name in thunks if acts},
        "share_of_peak": {name: round(flops / x / peak, 3) for name, x in times.items()},
        "compile_s": compile_s,
        "left_out": left_out,
    }


def is_missed(row: dict[str, Any]) -> bool:
    return row["target"] is not None and row["ratio"] < row["target"]


def show(row: dict[str, Any]) -> None:
    verdict = "no target"
    if row["target"]:
        verdict = f"target {row['target']}: {'MISSED' if is_missed(row) else 'reached'}"
    print(
        f"\n{row['size']}, {row['workload']}: {row['ratio']} x faster than {row['fastest']} ({verdict}); "
        f"{row['gflop']} GFLOP, torch.mm {row['peak_gflop_s']} GFLOP/s"
    )
    print(f"    {'':28}{'median ms':>12}{'ratio':>9}{'peak':>9}{'compiled in':>14}")
    for name, ms in row["ms"].items():
        compile_s = f"{row['compile_s'][name]:>12} s" if name in row["compile_s"] else ""
        print(
            f"    {name:28}{ms:>12.3f}{ms / row['ms']['pywm']:>9.2f}{row['share_of_peak'][name]:>9.1%}{compile_s}"
        )
    if row["cold_ms"]:
        alone = min(ms for name, ms in row["cold_ms"].items() if name != "pywm") / row["cold_ms"]["pywm"]
        figures = ", ".join(f"{name} {ms:.3f}" for name, ms in row["cold_ms"].items())
        print(f"    with the caches full of others' work, {alone:.2f} x: {figures}")
    for name, reason in row["left_out"].items():
        print(f"    {name:28}left out: {reason}")
    sys.stdout.flush()


def main() -> int:
    """Run the comparison and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(FORMS), default="size12m")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="only this one; repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--operands", choices=OPERANDS, default="float32", help="of pywm's products")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each workload")
    parser.add_argument("--sheeprl", metavar="PATH", help="a folder with sheeprl")
    parser.add_argument("--compile", choices=COMPILE, default="step", help="the most that rivals may compile")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    settle_allocator()
    sheeprl = find_sheeprl(options.sheeprl)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("rssm.py: --device is cuda, but torch sees no GPU", file=sys.stderr)
        return 2
    about = {
        **machine(options.threads),
        "operands": options.operands,
        **({} if sheeprl else {"sheeprl": version("sheeprl")}),
    }

    form = FORMS[options.size]
    c = RSSMConfig(**MODELS[options.size], embed=form.embed, action=A, operands=options.operands)
    d = Data(c, form).to(options.device)
    if options.device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "tf32": torch.backends.cuda.matmul.allow_tf32}
    assert_correct(Pywm(d, c, form))
    rows = []
    for workload in options.workload or WORKLOADS:
        rows.append(compare(workload, d, c, options, sheeprl))
        show(rows[-1])
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return 1 if options.check and any(map(is_missed, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
