"""Build CUDA sources for the emulator and run them, in three modes.

* ``plain`` finds wrong values under several thread orders, broken barriers and deadlocks;
* ``asan`` (with UBSan) finds accesses out of bounds, misaligned vector accesses and integer overflow;
* ``tsan`` finds races between the CUDA threads, whatever their order happened to be. It is slow: small shapes only.

Binaries are kept in ``build/cuda_on_cpu`` under the hash of everything they were made from.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = Path(os.environ.get("PYWM_EMULATOR_BUILD", ROOT / "build" / "cuda_on_cpu"))
CXX = os.environ.get("CXX", "g++")

FLAGS = (
    *("-std=c++20", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DPYWM_EMULATED", f"-I{CSRC}", f"-I{HERE / 'include'}"),
)


@dataclass(frozen=True)
class Mode:
    """How kernels are compiled and run.

    Attributes:
        kernel_flags: for the sources under test.
        emulator_flags: for emulator.cpp, which no sanitizer instruments; it tells them about its fibers.
        link_flags: for programs and libraries.
        libraries: what a Python process must preload before it loads such a library.
        environment: options of the sanitizers.
    """

    name: str
    kernel_flags: tuple[str, ...] = ()
    emulator_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


_ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
MODES = {
    "plain": Mode("plain", kernel_flags=("-O1",), emulator_flags=("-O1",)),
    "asan": Mode(
        "asan",
        kernel_flags=("-O0", *_ASAN),  # optimised, it takes twice as long to compile
        emulator_flags=("-O1", "-DEMULATOR_ASAN"),
        link_flags=_ASAN,
        libraries=("libasan.so", "libubsan.so"),
        environment={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "tsan": Mode(
        "tsan",
        kernel_flags=("-O1", "-fsanitize=thread"),
        emulator_flags=("-O1", "-DEMULATOR_TSAN"),
        link_flags=("-fsanitize=thread",),
        libraries=("libtsan.so",),
        environment={"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=0"},
    ),
}

FORWARD, REVERSE, RANDOM = range(3)


@dataclass(frozen=True)
class Schedule:
    """The order in which threads take turns, and how many blocks are resident at a time."""

    order: int
    seed: int = 1
    resident: int = 1

    def arguments(self) -> list[str]:
        """Return the schedule as the programs take it on their command line."""
        return [str(self.order), str(self.seed), str(self.resident)]


SCHEDULES = {
    "forward": Schedule(FORWARD),
    "reverse": Schedule(REVERSE),
    "random": Schedule(RANDOM, seed=1, resident=2),
    "random-3": Schedule(RANDOM, seed=2, resident=3),
}


# ---- Building -------------------------------------------------------------------------------------------------------


def build(name: str, sources: Sequence[Path], mode: Mode, *, shared: bool = False) -> Path:
    """Compile ``sources`` with the emulator into a program or a shared library, and return its path."""
    jobs = [
        (HERE / "emulator.cpp", mode.emulator_flags),
        *((source, mode.kernel_flags) for source in sources),
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    key = _hash(*(str(o) for o in objects), *mode.link_flags)
    target = BUILD / f"{name}-{mode.name}-{key}{'.so' if shared else ''}"
    if not target.exists():
        _run_compiler([*(["-shared"] if shared else []), *mode.link_flags, *map(str, objects)], target)
    return target


def _compile(source: Path, flags: Sequence[str]) -> Path:
    folders = (CSRC / "cuda", CSRC / "math", HERE, HERE / "include")
    headers = [CSRC / "macros.h", CSRC / "ops.h"]
    headers += [p for folder in folders for p in sorted(folder.iterdir()) if p.suffix in {".h", ".cuh"}]
    content = [p.read_text() for p in [source, *headers]]
    target = BUILD / f"{source.stem}-{_hash(_compiler_version(), str(source), *FLAGS, *flags, *content)}.o"
    if not target.exists():
        _run_compiler([*FLAGS, *flags, "-x", "c++", "-c", str(source)], target)
    return target


def _run_compiler(arguments: Sequence[str], target: Path) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:  # another test process may build the same
        output = Path(scratch) / target.name
        done = subprocess.run([CXX, *arguments, "-o", str(output)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{CXX} failed on {target.name}:\n{done.stderr[:4000]}")
        os.replace(output, target)


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout


# ---- Running --------------------------------------------------------------------------------------------------------


@functools.cache
def why_unavailable(mode_name: str) -> str | None:
    """Return what keeps a mode from running on this machine, or None."""
    if shutil.which(CXX) is None:
        return f"the emulator needs a C++ compiler, and there is no {CXX}"
    mode = MODES[mode_name]
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "probe"
        source = program.with_suffix(".cpp")
        source.write_text("int main() { return 0; }\n")
        command = [CXX, *mode.link_flags, str(source), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            return f"{mode_name}: {CXX} cannot link {' '.join(mode.link_flags)}: {built.stderr.strip()[:200]}"
        ran = subprocess.run(
            [*_prefix(mode_name), str(program)], env=_environment(mode), capture_output=True, text=True
        )
        if ran.returncode:
            return f"{mode_name}: programs built with it do not start: {ran.stderr.strip()[:200]}"
    missing = [lib for lib in mode.libraries if not _library(lib).is_file()]
    return f"{mode_name}: {CXX} has no {', '.join(missing)}" if missing else None


@functools.cache
def _prefix(mode_name: str) -> tuple[str, ...]:
    # Older ThreadSanitizers cannot map their shadow where the kernel randomises addresses widely.
    if mode_name != "tsan" or shutil.which("setarch") is None:
        return ()
    prefix = ("setarch", platform.machine(), "-R")
    allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else ()


def _library(name: str) -> Path:
    found = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


def _environment(mode: Mode, *, preload: bool = False) -> dict[str, str]:
    environment = {**os.environ, **mode.environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if preload and mode.libraries:
        environment["LD_PRELOAD"] = " ".join(str(_library(lib)) for lib in mode.libraries)
    return environment


@dataclass(frozen=True)
class Outcome:
    """What a program left behind."""

    returncode: int
    stdout: str
    stderr: str

    def reports(self) -> list[str]:
        """Return the first line of every report of a sanitizer, with the source lines it names."""
        pattern = r"^SUMMARY: (?:Address|Thread)Sanitizer: .*$|^.*: runtime error: .*$"
        return re.findall(pattern, self.stderr, flags=re.MULTILINE)


def run_program(program: Path, arguments: Sequence[str], mode: Mode, *, timeout: float = 120) -> Outcome:
    """Run a program that :func:`build` made."""
    command = [*_prefix(mode.name), str(program), *arguments]
    return _run(command, _environment(mode), timeout)


def run_python(arguments: Sequence[str], mode: Mode, *, timeout: float = 900) -> Outcome:
    """Run a Python script that loads a shared library built in this mode."""
    command = [*_prefix(mode.name), sys.executable, *arguments]
    return _run(command, _environment(mode, preload=True), timeout)


def _run(command: Sequence[str], environment: dict[str, str], timeout: float) -> Outcome:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, errors="replace"
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
