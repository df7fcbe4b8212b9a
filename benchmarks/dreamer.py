"""One whole update of DreamerV3 side by side with what is installed of the rivals.

    python benchmarks/dreamer.py                                     # size1m, vectors, 2 threads
    python benchmarks/dreamer.py --size size12m --obs pixels --sheeprl rivals/sheeprl --json out.json
    python benchmarks/dreamer.py --compile none --check              # exit 1 if the target is missed

An update is all that happens between a batch and the new weights: encoder, recurrent model, decoder and heads, imagination,
losses, backward pass, optimiser, slow critic. Batch 16, length 64, horizon 15, 18 discrete actions, float32; observations
are 24 numbers or pictures of 3 x 64 x 64.

Rivals: pywm's own reference in PyTorch; torchrl's DreamerV3Loss with its own optimiser and stepper; sheeprl's ``train`` of
dreamer_v3_5. Each eager and with torch.compile on all but the loops ("step": a step of the recurrent model, networks,
losses); ``--compile whole`` adds what the rivals themselves offer, the compilation of whole losses, loops and all, which
takes many minutes. sheeprl pins other versions of everything, so it is put beside, not installed:

    pip install --no-deps --target rivals/sheeprl sheeprl==0.8.4

All have the same sizes, the same batch, the same horizons and the same losses, but each its own samples and initial
weights. torchrl's own convolutions have strides, which makes them another model of a quarter of the arithmetic: with
pictures torchrl is compared with our convolutions, as they are without kernels, and shown with its own beside.

Before anything is timed, the losses of two updates with kernels must equal those of the reference from the same seeds, and
everybody's losses must be finite. All sides take turns within one run; figures are medians. The parameters of each side and
the FLOPs of its products of matrices and convolutions are printed, so that a reader sees whether the work is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from dreamer_sides import (
    CompiledReference,
    Form,
    Pywm,
    Reference,
    Sheeprl,
    Side,
    TorchRL,
    TorchRLStrided,
    find_update,
)
from rssm_sides import LeftOutError
from run import interleaved, machine, settle_allocator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pywm.ops import _native
from pywm.training.machine import version

# What is to be reached against the fastest rival, with 2 threads.
TARGETS = {("size1m", "vectors"): 2.5, ("size12m", "vectors"): 1.7, ("size1m", "pixels"): 1.8}
AIMS = {("size12m", "pixels"): 1.25}
COMPILE = ("none", "step", "whole")
PARTS = (
    "encode",
    "observe",
    "decode and heads",
    "imagine",
    "losses",
    "backward",
    "optimiser",
    "write back",
)
KERNELS = {
    "kl_balance",
    "kl_balance_backward",
    "lambda_return",
    "laprop_step_",
    "norm_act",
    "norm_act_backward",
    "rssm_imagine",
    "rssm_observe",
    "rssm_observe_backward",
    "symexp_twohot_loss",
    "symexp_twohot_loss_backward",
    "symexp_twohot_mean",
}
TOLERANCE = 1e-3
LEAST = 0.1  # losses below this are compared with this: an actor's is a sum of both signs

SIDES: dict[str, tuple[type[Side], str]] = {
    "pywm": (Pywm, ""),
    "reference": (Reference, ""),
    "reference, compiled step": (CompiledReference, "step"),
    "torchrl": (TorchRL, ""),
    "torchrl, compiled step": (TorchRL, "step"),
    "torchrl, compiled whole": (TorchRL, "whole"),
    "torchrl, strided": (TorchRLStrided, ""),
    "torchrl, strided, compiled step": (TorchRLStrided, "step"),
    "sheeprl": (Sheeprl, ""),
    "sheeprl, compiled step": (Sheeprl, "step"),
    "sheeprl, compiled whole": (Sheeprl, "whole"),
}


def assert_correct(form: Form) -> None:
    """The green gate: two updates with kernels equal those of the reference."""
    ours, reference = Pywm(form), Reference(form)
    before = _native.calls()
    for update in range(2):
        got, want = ours.update(), reference.update()
        for name, x in want.items():
            a, b = float(got[name]), float(x)
            error = abs(a - b) / max(abs(b), LEAST)
            assert error < TOLERANCE, f"update {update}: {name} is {a}, but the reference's is {b}"
    served = {name for name, count in _native.calls().items() if count != before.get(name)}
    assert served >= KERNELS, f"kernels served only {sorted(served)}"


def assert_finite(losses: dict[str, Any]) -> None:
    for name, x in losses.items():
        assert bool(torch.as_tensor(x).isfinite().all()), f"{name} is {x}"


class Products(TorchDispatchMode):
    """Counts the FLOPs of products of matrices and convolutions; those inside our kernels it does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def gflop(side: Side) -> float:
    with Products() as counter:
        side.update()
    return counter.flops * 1e-9


def compare(form: Form, options: argparse.Namespace, sheeprl: str) -> dict[str, Any]:
    """Return medians in ms of everybody who can, and who cannot."""
    made: dict[str, Side] = {}
    left_out: dict[str, str] = {}
    compile_s: dict[str, float] = {}
    work: dict[str, float] = {}
    for name, (kind, compiled) in SIDES.items():
        start = time.perf_counter()
        try:
            if kind is Sheeprl and sheeprl:
                raise LeftOutError(sheeprl)
            if kind is TorchRLStrided and form.obs != "pixels":
                continue
            if COMPILE.index(compiled or "none") > COMPILE.index(options.compile):
                minutes = " (compiles for many minutes)" if compiled == "whole" else ""
                raise LeftOutError(f"--compile {compiled} includes it{minutes}")
            side = kind(form, compiled)
            assert_finite(side.update())
            if compiled:
                side.update()  # what is compiled anew where a first step has been taken
                compile_s[name] = round(time.perf_counter() - start, 1)
            elif not isinstance(side, Pywm) or isinstance(side, Reference):
                work[name] = round(gflop(side), 1)
        except LeftOutError as why:
            left_out[name] = str(why)
            continue
        except Exception as error:
            if kind in (Pywm, Reference):
                raise
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        made[name] = side
    ours = made["pywm"]
    assert isinstance(ours, Pywm)
    ours.history.clear()
    times = interleaved({name: side.update for name, side in made.items()}, options.seconds)
    rivals = {name: x for name, x in times.items() if name != "pywm" and not made[name].other}
    fastest = min(rivals, key=rivals.__getitem__)
    parts = {name: statistics.median(x.get(name, 0.0) for x in ours.history) for name in PARTS}
    return {
        "size": form.size,
        "obs": form.obs,
        "fastest": fastest,
        "ratio": round(rivals[fastest] / times["pywm"], 2),
        "target": TARGETS.get((form.size, form.obs)),
        "aim": AIMS.get((form.size, form.obs)),
        "ms": {name: round(x * 1e-3, 1) for name, x in sorted(times.items(), key=lambda item: item[1])},
        "parts_ms": {name: round(x * 1e3, 1) for name, x in parts.items()},
        "parameters": {name: sum(p.numel() for p in side.parameters()) for name, side in made.items()},
        "gflop": work,
        "compile_s": compile_s,
        "left_out": left_out,
        "not_compared": {name: side.other for name, side in made.items() if side.other},
    }


def is_missed(row: dict[str, Any]) -> bool:
    return row["target"] is not None and row["ratio"] < row["target"]


def show(row: dict[str, Any]) -> None:
    verdict = f"no target, aim {row['aim']}" if row["aim"] else "no target"
    if row["target"]:
        verdict = f"target {row['target']}: {'MISSED' if is_missed(row) else 'reached'}"
    print(f"\n{row['size']}, {row['obs']}: {row['ratio']} x faster than {row['fastest']} ({verdict})")
    print(f"    {'':34}{'median ms':>12}{'ratio':>9}{'parameters':>14}{'GFLOP':>9}{'compiled in':>14}")
    for name, ms in row["ms"].items():
        work = row["gflop"].get(name, "")
        compile_s = f"{row['compile_s'][name]:>12} s" if name in row["compile_s"] else ""
        print(
            f"    {name:34}{ms:>12.1f}{ms / row['ms']['pywm']:>9.2f}{row['parameters'][name]:>14,}{work:>9}{compile_s}"
        )
    for name, why in row["not_compared"].items():
        print(f"    {name}: not compared, for it has {why}")
    for name, reason in row["left_out"].items():
        print(f"    {name:34}left out: {reason}")
    total = row["ms"]["pywm"]
    print(f"    {'parts of pywm':34}{'median ms':>12}{'share':>9}")
    for name, ms in row["parts_ms"].items():
        print(f"    {name:34}{ms:>12.1f}{ms / total:>9.0%}")
    sys.stdout.flush()


def main() -> int:
    """Run the comparison and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "size1m", "size12m"), default="size1m")
    parser.add_argument("--obs", choices=("vectors", "pixels"), default="vectors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all sides together")
    parser.add_argument("--sheeprl", metavar="PATH", help="a folder with sheeprl")
    parser.add_argument("--compile", choices=COMPILE, default="step", help="the most that rivals may compile")
    parser.add_argument("--check", action="store_true", help="fail when the target is missed")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    settle_allocator()
    sheeprl = find_update(options.sheeprl)
    about = {**machine(options.threads), **({} if sheeprl else {"sheeprl": version("sheeprl")})}

    form = Form(options.size, options.obs)
    assert_correct(form)
    row = compare(form, options, sheeprl)
    show(row)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": about, "rows": [row]}, indent=1) + "\n")
    return 1 if options.check and is_missed(row) else 0


if __name__ == "__main__":
    sys.exit(main())
