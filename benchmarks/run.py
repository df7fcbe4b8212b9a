"""Time every op of the table against its reference and against the memory bound; an op that is wrong is not timed.

    python benchmarks/run.py                                # all ops, all workloads
    python benchmarks/run.py --op gae --threads 1 --json out.json
    python benchmarks/run.py --op gae --check               # exit 1 if the backward pass misses its target

All columns of a row are measured in turns within one run, so that a busy machine is busy for all of them; figures are
medians. The bound is the time of a triad (a = b + s·c) over as many bytes as the op must move, with the same threads:
what the caches and the memory of this machine allow. Absolute times are those of this machine in this minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pywm
from pywm.ops import _native
from pywm.testing.opinfo import OPS, OpInfo, Sample
from pywm.training.machine import facts, version

# A backward pass may take this much of the forward's time per byte moved, where autograd's own 100 µs do not decide.
BACKWARD_TARGET = 1.3
BACKWARD_SHAPES = ((256, 1024), (1024, 4096))

Thunk = Callable[[], object]


def synchronize() -> None:
    """Wait for the GPU, if one has been used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(thunks: dict[str, Thunk], seconds: float, burst_seconds: float = 2e-3) -> dict[str, float]:
    """Median time of a call of each thunk in µs, measured in turns for about ``seconds`` in all.

    A turn is one call, or of short ones as many as fit into ``burst_seconds``, 200 at most. Who is called several times a
    turn finds the caches full of the others, and threads asleep, at first: a tenth of his calls, and one at least, come
    before the clock starts.
    """
    bursts = {}
    for name, thunk in thunks.items():
        thunk()
        synchronize()
        start, calls = time.perf_counter(), 0
        # Long enough for the clock, short enough that nobody has a quiet moment for himself.
        while calls < 200 and time.perf_counter() - start < burst_seconds:
            thunk()
            synchronize()
            calls += 1
        bursts[name] = calls
    times: dict[str, list[float]] = {name: [] for name in thunks}
    deadline = time.perf_counter() + seconds
    while len(times[next(iter(times))]) < 5 or time.perf_counter() < deadline:
        for name, thunk in thunks.items():
            burst = range(bursts[name])
            for _ in range(-(-len(burst) // 10) if len(burst) > 1 else 0):
                thunk()
            start = time.perf_counter()
            for _ in burst:
                thunk()
            synchronize()
            times[name].append((time.perf_counter() - start) / len(burst) * 1e6)
    return {name: statistics.median(x) for name, x in times.items()}


def settle_allocator() -> None:
    """Bring the C library's allocator to where a training process has it.

    It hands large blocks back to the system at once until it has seen a larger one freed; each call would then measure the
    system's page faults (512 of them for 2 MB) instead of the op. This serves all sides, for all allocate through it.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def machine(threads: int) -> dict[str, Any]:
    """Return what a reader needs to judge the figures."""
    packages = ("numba", "stable-baselines3", "torchrl", "tianshou")
    return {
        **facts(),
        **{name: found for name in packages if (found := version(name))},
        "threads_used": threads,
        "kernels": str(pywm.backend(torch.zeros(1))),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def triad(num_bytes: int, device: str = "cpu") -> Thunk:
    """Return a triad that moves ``num_bytes``: two arrays read, one written."""
    a, b, c = (torch.ones(max(num_bytes // 12, 1), device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=1.5, out=a)


def assert_correct(info: OpInfo, sample: Sample) -> None:
    """The green gate: a fast wrong kernel has no speed."""
    rtol, atol = info.tol[torch.float32]
    wants = info.reference(sample.double())
    before = _native.calls()
    for name, got, want in zip(info.outputs, info.op(sample), wants, strict=True):
        torch.testing.assert_close(
            got, want.float(), rtol=10 * rtol, atol=10 * atol, msg=lambda m, n=name: f"{info.name}: {n}: {m}"
        )
    assert _native.calls() != before, f"{info.name}: no compiled kernel served the call"


def backward_of(info: OpInfo, op: Callable[[Sample], tuple[torch.Tensor, ...]], sample: Sample) -> Thunk:
    """Return a call of the backward pass alone, for a graph made once."""
    sample = sample.map(lambda k, x: x.clone().requires_grad_() if k in info.differentiable else x)
    outputs = op(sample)[: info.differentiable_outputs]
    leaves = [x for k, x in sample.tensors.items() if k in info.differentiable]
    weights = [torch.ones_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, weights, retain_graph=True)


def measure(info: OpInfo, workload: str, seconds: float, device: str) -> dict[str, Any]:
    """Return one row: medians in µs, and ratios."""
    shape = info.bench_shapes[workload]
    sample = info.sample(shape, device=device)
    assert_correct(info, sample)
    moved, moved_backward = info.bytes_moved(shape, 4), info.bytes_moved_backward(shape, 4)
    times = interleaved(
        {
            "pywm": lambda: info.op(sample),
            "backward": backward_of(info, info.op, sample),
            "bound": triad(moved, device),
            "bound_backward": triad(moved_backward, device),
            "reference": lambda: info.reference(sample),
        },
        seconds,
    )
    per_byte = (times["backward"] / moved_backward) / (times["pywm"] / moved)
    return {
        "op": info.name,
        "workload": workload,
        "shape": list(shape),
        **{f"{k}_us": round(v, 2) for k, v in times.items()},
        "reference_ratio": round(times["reference"] / times["pywm"], 1),
        "times_bound": round(times["pywm"] / times["bound"], 2),
        "backward_per_byte": round(per_byte, 2),
        "gb_s": round(moved / times["pywm"] * 1e-3, 1),
    }


def main() -> int:
    """Run the benchmarks and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=[info.name for info in OPS])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workload", help="only this one")
    parser.add_argument("--check", action="store_true", help="fail when a backward pass misses its target")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settle_allocator()
    about = machine(options.threads)

    print(f"{pywm.backend(torch.zeros(1, device=options.device))}; medians in µs")
    columns = (
        "pywm_us",
        "bound_us",
        "times_bound",
        "reference_us",
        "reference_ratio",
        "backward_us",
        "backward_per_byte",
    )
    print(f"{'op':18}{'workload':17}{'shape':>14}" + "".join(f"{c:>19}" for c in columns))
    rows = []
    for info in OPS:
        if options.op not in (None, info.name) or options.device not in info.devices:
            continue
        for workload in info.bench_shapes:
            if options.workload not in (None, workload):
                continue
            row = measure(info, workload, options.seconds, options.device)
            rows.append(row)
            shape = "x".join(map(str, row["shape"]))
            print(
                f"{info.name:18}{workload:17}{shape:>14}" + "".join(f"{row[c]!s:>19}" for c in columns),
                flush=True,
            )
    if options.json:
        report = {"machine": about, "rows": rows}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    slow = [
        r for r in rows if tuple(r["shape"]) in BACKWARD_SHAPES and r["backward_per_byte"] > BACKWARD_TARGET
    ]
    for row in slow:
        print(
            f"MISSED: backward of {row['op']} {row['workload']} takes {row['backward_per_byte']} x the forward's per byte"
        )
    return 1 if options.check and slow else 0


if __name__ == "__main__":
    sys.exit(main())
