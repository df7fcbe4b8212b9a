"""The emulator must catch every planted fault, and report nothing on the same kernels done right."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulation import CSRC, CXX, FLAGS, HERE, MODES, SCHEDULES, Outcome, build, run_program, why_unavailable

SOURCE = HERE / "faults.cu"

# Fault: the mode that must catch it in every schedule, what it says, and the marks of the lines it must name.
# "wrong" is a result that differs; "caught" a broken rule that the scheduler found.
PLANTED = {
    "missing_syncthreads": [("plain", "wrong", ()), ("tsan", "data race", ("missing_syncthreads",))],
    "missing_second_syncthreads": [
        ("plain", "wrong", ()),
        ("tsan", "data race", ("missing_second_syncthreads", "second_syncthreads_read")),
    ],
    "uninitialised_shared": [("plain", "wrong", ())],
    "barrier_divergence": [("plain", "caught: .*barrier divergence", ("barrier_divergence",))],
    "deadlock": [("plain", "caught: .*deadlock", ("deadlock",))],
    "livelock": [("plain", "caught: .*livelock", ())],
    "global_out_of_bounds": [("asan", "heap-buffer-overflow", ("global_out_of_bounds",))],
    "static_shared_out_of_bounds": [("asan", "out of bounds", ("static_shared_out_of_bounds",))],
    "dynamic_shared_out_of_bounds": [("asan", "heap-buffer-overflow", ("dynamic_shared_out_of_bounds",))],
    "misaligned_vector_load": [("asan", "misaligned address", ("misaligned_vector_load",))],
    "int_overflow": [("asan", "signed integer overflow", ("int_overflow",))],
    "cp_async_without_commit": [("plain", "wrong", ())],
    "cp_async_without_wait": [("plain", "wrong", ())],
    "cp_async_wait_keeps_too_many": [("plain", "wrong", ())],
    "cp_async_without_barrier": [("plain", "wrong", ()), ("tsan", "data race", ("cp_async",))],
    "misaligned_cp_async": [("plain", "caught: .*cp.async.*not aligned", ())],
    "misaligned_ldmatrix": [("plain", "caught: .*ldmatrix.*aligned", ())],
    "missing_syncwarp": [("tsan", "data race", ("missing_syncwarp",))],
    "shuffle_in_divergent_branch": [("plain", "caught: .*deadlock", ("shuffle_in_divergent_branch",))],
    "lanes_at_different_shuffles": [("plain", "caught: .*warp divergence", ("lanes_at_different_shuffles",))],
    "shuffle_outside_mask": [("plain", "caught: .*not in mask", ("shuffle_outside_mask",))],
    "block_race": [("tsan", "data race", ("block_race",))],
    "grid_sync_replaced_by_syncthreads": [("tsan", "data race", ("grid_barrier",))],
    "grid_sync_without_cooperative_launch": [("plain", "caught: .*not cooperative", ())],
    "hand_barrier_without_fence": [("tsan", "data race", ("grid_barrier",))],
    "last_block_without_fence": [("tsan", "data race", ("missing_fence",))],
    "too_many_threads": [("plain", "caught: .*invalid launch", ())],
    "no_blocks": [("plain", "caught: .*invalid launch", ())],
    "much_shared_unasked": [("plain", "caught: .*dynamic shared memory", ())],
}
CLEAN = [
    "clean_atomics",
    "clean_cp_async",
    "clean_dynamic_shared",
    "clean_early_exit",
    "clean_global_bounds",
    "clean_grid_sync",
    "clean_hand_barrier",
    "clean_last_block",
    "clean_much_shared",
    "clean_second_syncthreads",
    "clean_syncthreads",
    "clean_syncwarp",
]
# Race detection does not depend on the order of the threads, and is slow.
SCHEDULES_OF = {"plain": tuple(SCHEDULES), "asan": tuple(SCHEDULES), "tsan": ("forward", "random")}
CATCHES = [
    (fault, *way, schedule)
    for fault, ways in PLANTED.items()
    for way in ways
    for schedule in SCHEDULES_OF[way[0]]
]


def faults_program(mode_name: str) -> Path:
    reason = why_unavailable(mode_name)
    if reason:
        pytest.skip(reason)
    return build("faults", [SOURCE], MODES[mode_name])


def run_fault(name: str, mode_name: str, schedule_name: str) -> Outcome:
    program = faults_program(mode_name)
    return run_program(program, [name, *SCHEDULES[schedule_name].arguments()], MODES[mode_name])


def marked_lines(mark: str) -> set[int]:
    lines = SOURCE.read_text().splitlines()
    return {i for i, line in enumerate(lines, 1) if re.search(rf"// FAULT .*\b{mark}\b", line)}


def named_lines(text: str) -> set[int]:
    return {int(number) for number in re.findall(rf"{SOURCE.name}:(\d+)", text)}


@pytest.mark.parametrize(
    ("fault", "mode", "finding", "marks", "schedule"), CATCHES, ids=[f"{c[0]}-{c[1]}-{c[4]}" for c in CATCHES]
)
def test_a_planted_fault_is_caught(
    fault: str, mode: str, finding: str, marks: tuple[str, ...], schedule: str
) -> None:
    outcome = run_fault(fault, mode, schedule)
    said = outcome.stdout if mode == "plain" else "\n".join([*outcome.reports(), outcome.stderr])
    assert re.search(finding, said), f"{outcome.stdout}\n{outcome.stderr[:2000]}"
    if marks:
        faulty = set().union(*(marked_lines(mark) for mark in marks))
        assert faulty, f"no line is marked {marks}"
        assert named_lines(said) & faulty, f"names {named_lines(said)}, not {faulty}\n{said[:3000]}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_kernel_passes(name: str, mode: str) -> None:
    for schedule in SCHEDULES_OF[mode]:
        outcome = run_fault(name, mode, schedule)
        assert outcome.stdout == "ok\n", f"{schedule}: {outcome.stdout}\n{outcome.stderr[:2000]}"
        assert not outcome.reports(), f"{schedule}: {outcome.stderr[:3000]}"
        assert outcome.returncode == 0


def test_every_kernel_of_the_program_is_expected_here() -> None:
    listed = run_program(faults_program("plain"), ["--list"], MODES["plain"]).stdout.split()
    assert sorted(listed) == sorted([*PLANTED, *CLEAN])


def test_the_schedules_differ() -> None:
    """A missing grid barrier shows in some orders only: that is why there are several, and ThreadSanitizer."""
    outputs = {s: run_fault("grid_sync_replaced_by_syncthreads", "plain", s).stdout for s in SCHEDULES}
    assert outputs["forward"] == "ok\n"
    assert any(text.startswith("wrong") for text in outputs.values())


def test_plain_shared_arrays_do_not_compile(tmp_path: Path) -> None:
    """A __shared__ that the emulator ignored would be one array a thread; so it is an error."""
    source = tmp_path / "kernel.cu"
    source.write_text('#include "cuda/device.cuh"\n__global__ void kernel() { __shared__ float row[32]; }\n')
    command = [CXX, *FLAGS, f"-I{CSRC}", "-fsyntax-only", "-x", "c++", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "__shared__" in done.stderr
