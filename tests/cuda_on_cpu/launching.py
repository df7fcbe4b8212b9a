"""Calls of the CUDA launchers in the emulator, and what came of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from emulation import CSRC, HERE, MODES, Outcome, Schedule, build, run_python

SOURCES = [
    CSRC / "cuda" / "gae.cu",
    CSRC / "cuda" / "lambda_return.cu",
    CSRC / "cuda" / "discounted_return.cu",
    CSRC / "cuda" / "ppo_loss.cu",
    CSRC / "cuda" / "laprop_step.cu",
    CSRC / "cuda" / "norm_act.cu",
    CSRC / "cuda" / "gru_gates.cu",
    CSRC / "cuda" / "one_hot_linear.cu",
    CSRC / "cuda" / "philox.cu",
    CSRC / "cuda" / "categorical_sample.cu",
    CSRC / "cuda" / "kl_balance.cu",
    CSRC / "cuda" / "rssm_step.cu",
    CSRC / "cuda" / "symexp_twohot.cu",
    CSRC / "cuda" / "gaussian.cu",
    CSRC / "cuda" / "pixel_cross_entropy.cu",
    CSRC / "cuda" / "stack_frames.cu",
    CSRC / "cuda" / "resize_area.cu",
    CSRC / "cuda" / "sample_starts.cu",
    HERE / "launchers.cu",
]


@dataclass(frozen=True)
class Call:
    """One call of a launcher.

    Attributes:
        op: name of the launcher.
        dtype: ``float32`` or ``float64``.
        arrays: the inputs; fields not named here or in ``outputs`` are null.
        outputs: shapes of the outputs, all of ``dtype``; they start as NaN.
        byte_outputs: shapes of outputs of one byte an element.
        index_outputs: shapes of outputs of int64.
        numbers: sizes and options.
        workspace_columns: for the PPO loss: how many columns of log_std are summed over rows.
        partial_columns: for a normalisation: how many columns of scale and shift are summed over rows.
        in_place: names of the arrays that are outputs, too.
    """

    op: str
    dtype: str
    arrays: dict[str, np.ndarray]
    outputs: dict[str, tuple[int, ...]]
    numbers: dict[str, Any]
    workspace_columns: int | None = None
    partial_columns: int | None = None
    byte_outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    index_outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()


@dataclass
class Result:
    """What a call left behind.

    Attributes:
        outputs: by name; empty where it failed.
        failure: the emulator's complaint, or how the process ended.
        report: what a sanitizer said during the call.
    """

    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    failure: str = ""
    report: str = ""

    def require_clean(self) -> dict[str, np.ndarray]:
        """Return the outputs; raise where anything was wrong but values."""
        assert not self.failure, f"{self.failure}\n{self.report[:6000]}"
        assert not self.report, self.report[:6000]
        return self.outputs


def launch_all(calls: Sequence[tuple[Call, Schedule]], mode_name: str) -> list[Result]:
    """Run the calls one after the other. One that kills its process does not keep the others from running."""
    mode = MODES[mode_name]
    library = build("launchers", SOURCES, mode, shared=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request"
        _write_request(request, calls)
        while len(results) < len(calls):
            arguments = [
                str(HERE / "run_launchers.py"),
                str(library),
                str(request),
                scratch,
                str(len(results)),
            ]
            results += _collect(run_python(arguments, mode), Path(scratch), len(results), len(calls))
    return results


def _write_request(request: Path, calls: Sequence[tuple[Call, Schedule]]) -> None:
    arrays, description = {}, []
    for number, (call, schedule) in enumerate(calls):
        arrays |= {f"{number}/{name}": array for name, array in call.arrays.items()}
        entry: dict[str, Any] = {
            "op": call.op,
            "dtype": call.dtype,
            "arrays": list(call.arrays),
            "outputs": {name: list(shape) for name, shape in call.outputs.items()},
            "byte_outputs": {name: list(shape) for name, shape in call.byte_outputs.items()},
            "index_outputs": {name: list(shape) for name, shape in call.index_outputs.items()},
            "in_place": {name: list(call.arrays[name].shape) for name in call.in_place},
            "numbers": call.numbers,
            "schedule": [schedule.order, schedule.seed, schedule.resident],
        }
        if call.workspace_columns is not None:
            entry["workspace_columns"] = call.workspace_columns
        if call.partial_columns is not None:
            entry["partial_columns"] = call.partial_columns
        description.append(entry)
    request.with_suffix(".json").write_text(json.dumps(description))
    np.savez(request.with_suffix(".npz"), **arrays)


def _collect(outcome: Outcome, scratch: Path, first: int, count: int) -> list[Result]:
    """Read the results of one process: up to the last call, or to the one that ended it."""
    parts = outcome.stderr.split("== call ")
    reports = {}
    for part in parts[1:]:
        number, _, text = part.partition("\n")
        reports[int(number)] = text.strip()
    results = []
    for number in range(first, count):
        result = Result(report=reports.get(number, ""))
        results.append(result)
        complaint = scratch / f"{number}.txt"
        if complaint.exists():
            result.failure = complaint.read_text()
        elif (scratch / f"{number}.npz").exists():
            with np.load(scratch / f"{number}.npz") as archive:
                result.outputs = dict(archive)
        else:
            started = "" if number in reports else f" before the call:\n{parts[0][-2000:]}"
            result.failure = f"the process ended with status {outcome.returncode}{started}"
            break
    return results
