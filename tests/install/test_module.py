"""The compiled module as it is installed: what it links, what importing it costs, what its settings refuse."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pywm
from pywm.ops import _native

pytestmark = pytest.mark.skipif(not _native.has_backend("cpu"), reason="needs the compiled module")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([*command], check=True, capture_output=True, text=True).stdout


@linux
def test_needs_no_symbol_of_torch() -> None:
    # So one build serves every torch, and an upgrade of torch cannot break it.
    undefined = tool("nm", "-D", "--undefined-only", "-C", _native.module().__file__)
    assert undefined.count("\n") > 20
    foreign = r"\b(at|c10|torch|caffe2?)::|\b(aoti_|THP|GOMP_|omp_|cuda[A-Z]|cu[A-Z]|__cuda)"
    assert not [line for line in undefined.splitlines() if re.search(foreign, line)]


@linux
def test_links_nothing_but_the_language_runtimes() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", tool("readelf", "-d", _native.module().__file__))
    runtimes = r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|asan|ubsan)\.so\.\d+|ld-linux-.*"
    assert not [library for library in needed if not re.fullmatch(runtimes, library)], needed


@linux
def test_exports_nothing_but_its_entry() -> None:
    # Symbols of ours that were visible could be mistaken for those of another extension.
    defined = tool("nm", "-D", "--defined-only", _native.module().__file__).splitlines()
    names = [line.split()[-1] for line in defined]
    assert "PyInit__C" in names
    assert not [name for name in names if "pywm" in name]


@linux
def test_kernels_of_an_instruction_set_define_no_shared_functions() -> None:
    # The linker keeps one copy of a weak function. Were it the one for AVX-512, other machines would die of it.
    build = Path(__file__).parents[2] / "build"
    objects = sorted(build.glob("**/pywm_cpu_x86_64_v*.dir/**/*.o"))
    newest = {
        p.parts[-4:]: p for p in sorted(objects, key=lambda p: p.stat().st_mtime) if "asan" not in p.parts
    }
    if not newest:
        pytest.skip("no object files: installed from a wheel, or for a processor with one instruction set")
    for path in newest.values():
        weak = [
            line for line in tool("nm", str(path)).splitlines() if re.search(r" [WwuTi] (?!.*pywm)", line)
        ]
        assert not weak, f"{path}: {weak}"


def test_a_wheel_with_cuda_imports_without_a_gpu(python: Any) -> None:
    code = (
        "import torch, pywm; from pywm.ops import _native;"
        "assert _native.module().has_cuda; assert pywm.backend(torch.ones(1)).name == 'cpu';"
        "found = pywm.backend()['cuda']; assert found.name == 'reference', found; print(found.why)"
    )
    if not _native.module().has_cuda:
        pytest.skip("built without CUDA kernels")
    result = python(code, CUDA_VISIBLE_DEVICES="")
    assert result.code == 0, result.err
    assert "GPU" in result.out


def test_backend_tells_how_it_was_built() -> None:
    module = _native.module()
    assert re.match(
        r"nvcc [\d.]+, architectures \S+" if module.has_cuda else r"PYWM_CUDA=OFF|no ", module.cuda_reason
    )


def test_an_unknown_instruction_set_is_an_error_that_names_the_known(python: Any) -> None:
    result = python("import pywm", PYWM_CPU_ISA="sse9")
    assert result.code != 0
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("ValueError: pywm: PYWM_CPU_ISA is sse9"), last
    assert _native.module().cpu_isas() in last


@pytest.mark.parametrize("argv", [("pywm", "doctor"), ("-m", "pywm", "--version")])
def test_the_command_tells_an_unknown_instruction_set_in_one_line(
    argv: tuple[str, ...], tmp_path: Path
) -> None:
    # As pip writes it.
    (tmp_path / "pywm").write_text("import sys\nfrom pywm.cli import main\nsys.exit(main())\n")
    path = os.pathsep.join([str(Path(pywm.__file__).parents[1]), *filter(None, sys.path)])
    environment = os.environ | {"PYWM_CPU_ISA": "sse9", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("pywm: PYWM_CPU_ISA is sse9"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_an_unsupported_instruction_set_is_an_error_that_names_the_supported(python: Any) -> None:
    supported = _native.module().cpu_isas().split()
    missing = [i for i in ("x86_64_v3", "x86_64_v4", "x86_64_v4_bf16") if i not in supported]
    if not missing:
        pytest.skip("this processor has them all")
    result = python("import pywm", PYWM_CPU_ISA=missing[0])
    assert result.code != 0
    last = result.err.strip().splitlines()[-1]
    assert f"PYWM_CPU_ISA is {missing[0]}, but" in last
    assert " ".join(supported) in last


def test_every_supported_instruction_set_can_be_chosen(python: Any) -> None:
    for isa in _native.module().cpu_isas().split():
        result = python("import pywm; print(pywm.backend()['cpu'].why)", PYWM_CPU_ISA=isa)
        assert isa in result.out.replace(",", " ").split(), result.err


def test_import_is_quick(python: Any) -> None:
    # Processor time, for other programs on the machine are not to blame on pywm. Measured: 0.08 s.
    code = (
        "import sys, time, torch; sys.dont_write_bytecode = False;"
        "t = time.process_time(); import pywm; print(time.process_time() - t)"
    )
    # With compiled files in their place, as an installation has them; the first run writes what is missing.
    runs = [float(python(code).out) for _ in range(6)]
    assert statistics.median(runs[1:]) <= 0.15


def test_import_brings_no_environments_and_no_command_line(python: Any) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import pywm;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    result = python(code)
    assert result.code == 0, result.err
    assert not {"gymnasium", "tyro", "rich", "PIL", "safetensors", "matplotlib"} & set(result.out.split())
