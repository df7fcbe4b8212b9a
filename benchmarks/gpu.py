"""Time the CUDA kernels against torch eager, torch.compile and a CUDA graph of the reference, on this GPU.

    python benchmarks/gpu.py --json out.json          # all ops
    python benchmarks/gpu.py --op gae --seconds 60

Each op runs at the workloads of the table in pywm.testing.opinfo. Inputs rotate among copies that together exceed the
second-level cache, so that the large shapes are read from memory. An op that disagrees with its reference is not timed.
The bound is the bytes an op must move over the bandwidth of a device-to-device copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import pywm
from pywm.ops import _native
from pywm.testing.opinfo import OPS, OpInfo, Sample

CACHE_BYTES = 256 << 20  # several times the second-level cache of any GPU so far
COMPILE_ROWS = 64  # longer loops take minutes to compile
REFERENCE_ELEMENTS = 1 << 22  # above, one eager reference call is enough


def time_calls(fn: Callable[[int], object], seconds: float = 0.3) -> float:
    """Median time of a call in µs, by events around bursts; ``fn(i)`` gets the number of the call."""
    for i in range(3):
        fn(i)
    torch.cuda.synchronize()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fn(0)
    stop.record()
    stop.synchronize()
    burst = max(1, min(100, int(10 / max(start.elapsed_time(stop), 1e-3))))
    times, deadline = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < deadline:
        start.record()
        for i in range(burst):
            fn(i)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / burst * 1e3)
    return sorted(times)[len(times) // 2]


def graph_of(fn: Callable[[], object]) -> Callable[[int], None]:
    """Capture one call in a CUDA graph, and return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return lambda i: graph.replay()


def copy_bandwidth() -> float:
    """Bytes read plus written a second by a large copy."""
    x = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (time_calls(lambda i: y.copy_(x)) * 1e-6)


def agree(info: OpInfo, sample: Sample) -> None:
    """The green gate: a fast wrong kernel has no speed."""
    rtol, atol = info.tol[torch.float32]
    wants = info.reference(sample.map(lambda _, x: x.cpu()).double())
    for name, got, want in zip(info.outputs, info.op(sample), wants, strict=True):
        torch.testing.assert_close(
            got.cpu(), want.float(), rtol=10 * rtol, atol=10 * atol, msg=f"{info.name}: {name}"
        )


def measure(info: OpInfo, workload: str, bandwidth: float) -> dict[str, object]:
    """Return one row: medians in µs and their ratios to ours."""
    shape = info.bench_shapes[workload]
    moved = info.bytes_moved(shape, 4)
    copies = max(1, min(8, CACHE_BYTES // max(moved, 1)))
    samples = [info.sample(shape, device="cuda", seed=s) for s in range(copies)]
    agree(info, samples[0])
    row: dict[str, object] = {"op": info.name, "workload": workload, "shape": list(shape), "bytes": moved}
    ours = time_calls(lambda i: info.op(samples[i % copies]))
    row["pywm_us"] = round(ours, 2)
    row["pywm_graph_us"] = round(time_calls(graph_of(lambda: info.op(samples[0]))), 2)
    row["bound_us"] = round(moved / bandwidth * 1e6, 3)

    grads = samples[0].map(lambda k, x: x.clone().requires_grad_() if k in info.differentiable else x)
    leaves = [x for k, x in grads.tensors.items() if k in info.differentiable]

    def both(op: Callable[[Sample], tuple[torch.Tensor, ...]]) -> None:
        total = sum(x.sum() for x in op(grads)[: info.differentiable_outputs])
        torch.autograd.grad(total, leaves)

    row["pywm_forward_backward_us"] = round(time_calls(lambda i: both(info.op)), 2)
    slow = shape[0] * (shape[1] if len(shape) > 1 else 1) > REFERENCE_ELEMENTS
    seconds = 0.0 if slow else 0.3
    row["eager_us"] = round(time_calls(lambda i: info.reference(samples[i % copies]), seconds), 2)
    row["eager_forward_backward_us"] = round(time_calls(lambda i: both(info.reference), seconds), 2)
    try:
        row["eager_graph_us"] = round(time_calls(graph_of(lambda: info.reference(samples[0]))), 2)
    except Exception as error:
        row["eager_graph_us"] = None
        row["eager_graph_error"] = str(error).splitlines()[0]
        torch.cuda.synchronize()
    if info.name == "ppo_loss" or shape[0] <= COMPILE_ROWS:
        with _native.disabled():
            torch.compiler.reset()
            compiled = torch.compile(info.call, mode="reduce-overhead")
            row["compile_us"] = round(time_calls(lambda i: compiled(samples[i % copies])), 2)
    best = min(float(row[k]) for k in ("eager_us", "eager_graph_us", "compile_us") if row.get(k))  # type: ignore[arg-type]
    row["ratio_to_best"] = round(best / min(ours, float(row["pywm_graph_us"])), 2)  # type: ignore[arg-type]
    row["times_bound"] = round(float(row["pywm_graph_us"]) / max(moved / bandwidth * 1e6, 1e-3), 2)  # type: ignore[arg-type]
    return row


def main() -> int:
    """Run the benchmarks and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=[info.name for info in OPS])
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument(
        "--seconds", type=float, default=200, help="start no further workload after this long"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() or not _native.has_backend("cuda"):
        print(f"no CUDA kernels to time: {pywm.backend()['cuda']}", file=sys.stderr)
        return 2

    started = time.perf_counter()
    bandwidth = copy_bandwidth()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "pywm": pywm.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(machine)
    columns = (
        "pywm_us",
        "pywm_graph_us",
        "bound_us",
        "compile_us",
        "eager_graph_us",
        "eager_us",
        "ratio_to_best",
    )
    print(f"{'op':18}{'workload':17}" + "".join(f"{c:>16}" for c in columns))
    rows, skipped = [], []

    def save() -> None:
        if options.json:
            report = {"machine": machine, "rows": rows, "skipped": skipped}
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")

    for info in OPS:
        if "cuda" not in info.devices or options.op not in (None, info.name):
            continue
        for workload in info.bench_shapes:
            if time.perf_counter() - started > options.seconds:
                skipped.append(f"{info.name} {workload}: no time left")
                continue
            try:
                row = measure(info, workload, bandwidth)
            except Exception as error:  # one broken workload must not cost the others
                skipped.append(f"{info.name} {workload}: {type(error).__name__}: {error}")
                continue
            rows.append(row)
            print(
                f"{info.name:18}{workload:17}" + "".join(f"{row.get(c)!s:>16}" for c in columns), flush=True
            )
            save()
    for line in skipped:
        print("skipped:", line)
    save()
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
