"""Every barrier of the kernels is needed, and the tests would notice: without it, ThreadSanitizer reports a race."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import emulation
import pytest
from emulation import CSRC, HERE, MODES, SCHEDULES, build, run_program, why_unavailable
from launching import SOURCES, launch_all
from test_distributions import SETTINGS as DISTRIBUTIONS
from test_distributions import build_case as build_distribution_case
from test_pixel_kernels import SETTINGS as PIXELS
from test_pixel_kernels import build_case as build_pixel_case
from test_ppo_loss import Setting, build_case
from test_rows import Setting as RowSetting
from test_rows import build_case as build_row_case
from test_scans import BUILDERS, cases

BARRIER = re.compile(r"^\s*__sync(?:threads|warp)\(\);")
FILES = sorted(p for p in (CSRC / "cuda").iterdir() if p.suffix in {".cu", ".cuh"})
BARRIERS = [
    (path.name, number)
    for path in FILES
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if BARRIER.match(line)
]
# Several rows a block at a time and several times, so that barriers at the end of a loop matter too.
SETTINGS = [Setting(300, nvec=(6,), valid=0.7), Setting(8200, parts=66, shared=True)]

ROW_SETTINGS = [
    RowSetting("norm_act", 3, 300, norm="layer", shifted=True),
    RowSetting("one_hot_linear", 70, 33, groups=3, classes=32, shifted=True),
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "number"), BARRIERS, ids=[f"{name}:{number}" for name, number in BARRIERS])
def test_a_missing_barrier_is_noticed(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = why_unavailable("tsan")
    if reason:
        pytest.skip(reason)
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("cpu"))
    lines = (copy / "cuda" / name).read_text().splitlines(keepends=True)
    lines[number - 1] = BARRIER.sub("", lines[number - 1])
    (copy / "cuda" / name).write_text("".join(lines))
    flags = [f"-I{copy}" if flag == f"-I{CSRC}" else flag for flag in emulation.FLAGS]
    monkeypatch.setattr(emulation, "FLAGS", tuple(flags))
    monkeypatch.setattr(emulation, "CSRC", copy)
    monkeypatch.setattr(emulation, "BUILD", tmp_path / "build")
    monkeypatch.setattr(
        "launching.SOURCES", [copy / p.relative_to(CSRC) if CSRC in p.parents else p for p in SOURCES]
    )

    assert races_of_the_launchers() or races_of_the_conformance_program()


def races_of_the_launchers() -> list[str]:
    calls = [case.call for op in BUILDERS for case in cases(op, (40, 1)).values()]
    calls += [build_case(setting, "float32").call for setting in SETTINGS]
    rows = [build_row_case(setting, "float32") for setting in ROW_SETTINGS]
    calls += [call for case in rows for call in (case.forward, case.backward)]
    calls += [build_distribution_case(setting, "float32").call for setting in DISTRIBUTIONS]
    calls += [build_pixel_case(setting, "float32").call for setting in PIXELS]
    results = launch_all([(call, SCHEDULES["forward"]) for call in calls], "tsan")
    return [result.report for result in results if "data race" in result.report]


def races_of_the_conformance_program() -> list[str]:
    """It calls what the kernels share more often than they do, yet."""
    mode = MODES["tsan"]
    return run_program(build("conformance", [HERE / "conformance.cu"], mode), [], mode).reports()
