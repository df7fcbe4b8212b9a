"""The ops on pixels side by side with PyTorch and OpenCV: time and memory.

    python benchmarks/pixels.py                         # 2 threads, all workloads
    python benchmarks/pixels.py --check                 # exit 1 if a target is missed
    python benchmarks/pixels.py --only loss --compile --json out.json

The loss is ``relu(cross_entropy - cutoff).mean()`` and its backward pass, for logits with the classes last, as torch's
own is fastest; torch gets its targets as int64, which it needs and we do not, for nothing. `untrained`: no sub-pixel is
below the cut-off, which is our worst case; `trained`: nine of ten are. Memory is what the process needed at most, beyond
the logits and the targets that were there before, while it ran once, measured in a process of its own for each side
(CUDA: what torch's allocator handed out, and what was there before counts as well).

The other ops are timed against the same result by torch, and the area resize against OpenCV, where it is installed. All
sides take turns within one run; figures are medians; a side whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import Thunk, interleaved, machine, settle_allocator
from torch import Tensor
from torch.nn import functional

from pywm import ops

CUTOFF = 0.03
LEVELS = 256
WORKLOADS = {"catch": (16, 24 * 24), "grey": (16, 64 * 64), "atari": (4, 3 * 105 * 80)}
SHARES = {"untrained": 0.0, "trained": 0.9}

# What is to be reached: times faster forward and backward; peak memory by torch's; extra memory by the logits'.
SPEED, PEAK, EXTRA = 2.5, 0.6, 0.05


# ---- the loss --------------------------------------------------------------------------------------------------------


def pixels(workload: str, share: float, device: str) -> tuple[Tensor, Tensor]:
    """Logits, of which a share of rows is sure of its target, and targets."""
    g = torch.Generator().manual_seed(0)
    shape = WORKLOADS[workload]
    logits = torch.randn(*shape, LEVELS, generator=g)
    target = torch.randint(LEVELS, shape, generator=g)
    sure = (torch.rand(shape, generator=g) < share).float().unsqueeze(-1)
    logits.scatter_add_(-1, target.unsqueeze(-1), 20 * sure)
    return logits.to(device).requires_grad_(), target.to(torch.uint8).to(device)


def pywm_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return our loss."""
    return ops.pixel_cross_entropy(logits, target, cutoff=CUTOFF).mean()


def torch_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the same by torch; ``target`` is int64."""
    ce = functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    return (ce - CUTOFF).relu().mean()


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Thunk:
    """Return forward and backward of a loss."""
    return lambda: torch.autograd.grad(loss(logits, target), logits)


def compare_loss(workload: str, share: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return one row: medians in µs, and ratios."""
    logits, target = pixels(workload, SHARES[share], options.device)
    sides = {"pywm": step(pywm_loss, logits, target), "torch": step(torch_loss, logits, target.long())}
    if options.compile:
        sides["torch.compile"] = step(torch.compile(torch_loss), logits, target.long())
    torch.testing.assert_close(pywm_loss(logits, target), torch_loss(logits, target.long()))
    (want,) = sides["torch"]()  # type: ignore[misc]
    largest = float(want.abs().max())
    for name, side in sides.items():
        (got,) = side()  # type: ignore[misc]
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    del got, want
    times = interleaved(sides, options.seconds)
    return {
        "op": "pixel_cross_entropy",
        "workload": workload,
        "share": share,
        "shape": [*WORKLOADS[workload], LEVELS],
        **{f"{name}_us": round(t, 1) for name, t in times.items()},
        "ratio": round(times["torch"] / times["pywm"], 2),
    }


# ---- memory ----------------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """Return a number of bytes that the system keeps about this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(side: str, workload: str, device: str) -> dict[str, int]:
    """Run one side once; return the bytes of the logits, and the most that was needed besides."""
    loss, wide = (pywm_loss, False) if side == "pywm" else (torch_loss, True)
    small = torch.randn(4, LEVELS, device=device, requires_grad=True)
    classes = torch.zeros(4, dtype=torch.int64 if wide else torch.uint8, device=device)
    step(loss, small, classes)()  # libraries, threads, caches
    logits, target = pixels(workload, 0.0, device)
    target = target.long() if wide else target
    size = logits.numel() * logits.element_size()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, logits, target)()
        torch.cuda.synchronize()
        return {"logits": size, "besides": torch.cuda.max_memory_allocated() - before}
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins here
    before = _status("VmRSS")
    step(loss, logits, target)()
    return {"logits": size, "besides": _status("VmHWM") - before}


def memory(workload: str, device: str) -> dict[str, Any]:
    """Return one row: bytes, and ratios."""
    needs = {}
    for side in ("pywm", "torch"):
        command = [sys.executable, __file__, "--memory", side, workload, "--device", device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        needs[side] = json.loads(done.stdout)
    size = needs["pywm"]["logits"]
    ours, theirs = needs["pywm"]["besides"], needs["torch"]["besides"]
    return {
        "workload": workload,
        "logits_mib": round(size / 2**20, 1),
        "pywm_mib": round((size + ours) / 2**20, 1),
        "torch_mib": round((size + theirs) / 2**20, 1),
        "peak": round((size + ours) / (size + theirs), 3),
        "extra": round((ours - size) / size, 4),  # less the gradient
    }


# ---- the others ------------------------------------------------------------------------------------------------------


def _opencv(frames: Tensor, size: tuple[int, int]) -> Thunk | None:
    if importlib.util.find_spec("cv2") is None:
        return None
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    pictures = frames.flatten(0, -3).numpy()

    def resize() -> None:
        for picture in pictures:
            cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)

    return resize


def compare_others(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows of the ops without a gradient."""
    g = torch.Generator().manual_seed(0)
    device, rows = options.device, []

    def row(op: str, workload: str, sides: dict[str, Thunk | None]) -> None:
        times = interleaved({name: side for name, side in sides.items() if side is not None}, options.seconds)
        rivals = [t for name, t in times.items() if name != "pywm"]
        found = {f"{name}_us": round(t, 1) for name, t in times.items()}
        rows.append({"op": op, "workload": workload, **found, "ratio": round(min(rivals) / times["pywm"], 2)})

    for T, N, B, shape in (
        (6400, 1, 16, (3, 105, 80)),
        (800, 8, 64, (1, 84, 84)),
        (1500, 16, 64, (1, 24, 24)),
    ):
        storage = torch.randint(256, (T, N, *shape), generator=g, dtype=torch.uint8).to(device)
        t, n = (torch.randint(4 if high == T else 0, high, (B,), generator=g).to(device) for high in (T, N))
        frames, index, first = storage.flatten(0, 1), t * N + n, (t - 2) * N + n
        back = torch.arange(3, -1, -1, device=device) * N

        def by_torch(frames=frames, index=index, first=first, back=back) -> Tensor:  # type: ignore[no-untyped-def]
            chosen = frames[torch.maximum(index.unsqueeze(-1) - back, first.unsqueeze(-1))]
            return chosen.flatten(1, 2).float().mul_(1 / 255)

        def by_us(frames=frames, index=index, first=first, N=N) -> Tensor:  # type: ignore[no-untyped-def]
            return ops.stack_frames(frames, index, first, stride=N)

        torch.testing.assert_close(by_us(), by_torch())
        row("stack_frames", f"{B} x 4 x {'x'.join(map(str, shape))}", {"pywm": by_us, "torch": by_torch})

    for count, before, after in (
        (16, (210, 160), (84, 84)),
        (48, (210, 160), (105, 80)),
        (16, (210, 160), (64, 64)),
    ):
        frames = torch.randint(256, (count, 1, *before), generator=g, dtype=torch.uint8).to(device)

        def area(frames=frames, after=after) -> Tensor:  # type: ignore[no-untyped-def]
            return functional.interpolate(frames.float(), after, mode="area").round_().to(torch.uint8)

        def ours(frames=frames, after=after) -> Tensor:  # type: ignore[no-untyped-def]
            return ops.resize_area(frames, after)

        sides: dict[str, Thunk | None] = {"pywm": ours, "torch": area}
        if before[0] % after[0] or before[1] % after[1]:
            del sides["torch"]  # its areas begin and end with whole pixels: another picture
        else:
            assert (area().int() - ours().int()).abs().max() <= 1
        sides["opencv"] = _opencv(frames.cpu(), after) if device == "cpu" else None
        if len([side for side in sides.values() if side]) > 1:
            row("resize_area", f"{count} x {before[0]}x{before[1]} to {after[0]}x{after[1]}", sides)

    for T, N in ((6400, 1), (6400, 16)):
        is_first = (torch.rand(T, N, generator=g) < 0.005).to(device)
        is_first[0] = True
        is_last = torch.cat([is_first[1:], is_first.new_zeros(1, N)])
        uniform = torch.rand(16, generator=g).to(device)
        with_us = lambda: ops.sample_starts(uniform, is_first, is_last)  # noqa: B023, E731
        by_steps = lambda: ops.reference.sample_starts(uniform, is_first, is_last, None, 4, True)  # noqa: B023, E731
        assert all(torch.equal(a, b) for a, b in zip(with_us(), by_steps(), strict=True))
        row("sample_starts", f"16 of {T} x {N}", {"pywm": with_us, "torch": by_steps})
    return rows


def main() -> int:
    """Run the comparison and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["loss", "memory", "others"])
    parser.add_argument("--compile", action="store_true", help="torch.compile of torch's loss, too")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(measure_memory(*options.memory, options.device)))
        return 0
    settle_allocator()
    report: dict[str, Any] = {"machine": machine(options.threads)}
    missed = []
    if options.only in (None, "loss"):
        report["loss"] = [compare_loss(w, s, options) for w in WORKLOADS for s in SHARES]
        for row in report["loss"]:
            verdict = "reached" if row["ratio"] >= SPEED else "MISSED"
            missed += [verdict] * (verdict == "MISSED" and options.device == "cpu")
            times = ", ".join(f"{k.removesuffix('_us')} {v} µs" for k, v in row.items() if k.endswith("_us"))
            print(
                f"loss {row['workload']} {row['share']}: {times}; {row['ratio']} x (target {SPEED}: {verdict})"
            )
    if options.only in (None, "memory"):
        report["memory"] = [
            memory(w, options.device) for w in WORKLOADS if w != "catch"
        ]  # too small to be seen
        for row in report["memory"]:
            verdict = "reached" if row["peak"] <= PEAK and row["extra"] <= EXTRA else "MISSED"
            missed += [verdict] * (verdict == "MISSED")
            print(
                f"memory {row['workload']}: logits {row['logits_mib']} MiB, peak pywm {row['pywm_mib']}, torch "
                f"{row['torch_mib']}: {row['peak']} of it; beyond logits and gradient {100 * row['extra']:.2f} % of the "
                f"logits (targets {PEAK}, {100 * EXTRA:.0f} %: {verdict})"
            )
    if options.only in (None, "others"):
        report["others"] = compare_others(options)
        for row in report["others"]:
            times = ", ".join(f"{k.removesuffix('_us')} {v} µs" for k, v in row.items() if k.endswith("_us"))
            print(f"{row['op']} {row['workload']}: {times}; {row['ratio']} x")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
