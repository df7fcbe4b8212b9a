"""The layers of the package and of csrc, read off the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pywm"
CSRC = ROOT / "csrc"
if not CSRC.is_dir():
    pytest.skip("the layers are read off a checkout", allow_module_level=True)

LAYERS = [  # lowest first; names on one line may not import each other
    ["_version", "errors", "types"],
    ["config"],
    ["distributions"],
    ["ops"],
    ["nn", "envs", "optim", "testing"],
    ["losses", "data"],
    ["models"],
    ["planning", "training"],
    ["algos"],
    ["integrations", "doctor"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

MODULES = sorted(PACKAGE.rglob("*.py"))
modules = pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(PACKAGE)) for p in MODULES])


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a source names in an import, in functions too: ``pywm.ops.gae``, ``torch``."""
    package = ["pywm", *path.relative_to(PACKAGE).parent.parts] if path.is_relative_to(PACKAGE) else []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from pywm import ops` imports pywm.ops; `from pywm.ops import gae` is pywm.ops or pywm.ops.gae.
            yield from (f"{module}.{alias.name}" for alias in node.names)


@modules
def test_belongs_to_a_layer(path: Path) -> None:
    assert layer_of(path) == "__init__" or layer_of(path) in RANK, "name its place in LAYERS"


@modules
def test_imports_only_lower_layers(path: Path) -> None:
    layer = layer_of(path)
    if layer == "__init__":  # the face of the package: what it may import, test_import.py measures
        return
    for name in imports(path):
        parts = name.split(".")
        other = parts[1] if parts[0] == "pywm" and len(parts) > 1 else ""
        if other in RANK and other != layer:
            assert RANK[other] < RANK[layer], f"pywm.{layer} may not import pywm.{other}"


@modules
def test_algorithms_do_not_import_each_other(path: Path) -> None:
    allowed = {("simple", "ppo")}  # SimPLe trains its policy with PPO
    if path.parent != PACKAGE / "algos" or path.stem == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if (
            parts[:2] == ["pywm", "algos"]
            and len(parts) > 2
            and (PACKAGE / "algos" / f"{parts[2]}.py").exists()
        ):
            assert parts[2] == path.stem or (path.stem, parts[2]) in allowed, name


@modules
def test_only_native_touches_the_compiled_module(path: Path) -> None:
    if path != PACKAGE / "ops" / "_native.py":
        assert not [name for name in imports(path) if name.split(".")[:2] == ["pywm", "_C"]]


@modules
def test_optional_packages_are_imported_where_they_are_needed(path: Path) -> None:
    optional = {"ale_py", "Box2D", "mujoco", "dm_control", "minigrid", "crafter", "tensorboard", "wandb"}
    optional |= {"imageio", "imageio_ffmpeg", "matplotlib", "pygame", "stable_baselines3"}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not optional & {name.split(".")[0] for name in names}, names


@modules
def test_no_module_without_a_subject(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}


def test_the_ops_are_tested_without_environments_and_command_line() -> None:
    # A GPU machine may have torch and the build tools only.
    for path in [Path(__file__).with_name("conftest.py"), *sorted((ROOT / "tests" / "ops").rglob("*.py"))]:
        for name in imports(path):
            assert name.split(".")[0] not in {"gymnasium", "tyro", "rich"}, f"{path.name} imports {name}"
            assert not re.match(r"pywm\.(envs|algos|cli|training|doctor)\b", name), (
                f"{path.name} imports {name}"
            )


# ---- C++ -------------------------------------------------------------------------------------------------------------

SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cuh", ".cu"})
sources = pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(CSRC)) for p in SOURCES])

ALLOWED_HEADERS = {  # by folder of csrc; standard headers have no dot and no slash
    "math": r"\.\./macros\.h|\w+\.h",
    "cpu": r"\.\./(math/\w+|ops|macros)\.h|\w+\.h",
    "cuda": r"\.\./(math/\w+|ops|macros)\.h|\w+\.cuh|cuda\w*\.h|cub/.*",
    "bindings": r"\.\./(ops|tensor|cpu/\w+)\.h|\w+\.h|pybind11/.*",
    "": r"(ops|macros|tensor)\.h",
}

# Compiled once for each instruction set. An inline function of another header could end up as the copy that the
# linker keeps for everybody: compiled for AVX-512, called on a machine without.
FOR_EVERY_ISA = sorted(
    {*(CSRC / "cpu").glob("*.cpp")} - {CSRC / "cpu" / n for n in ("dispatch.cpp", "parallel.cpp")}
)
PLAIN_HEADERS = {"bit", "cmath", "cstddef", "cstdint", "cstring", "immintrin.h", "limits", "type_traits"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', path.read_text(), re.MULTILINE)


@sources
def test_includes_only_allowed_headers(path: Path) -> None:
    folder = path.parent.name if path.parent != CSRC else ""
    system = {"cpu": {"immintrin.h", "dlfcn.h", "pthread.h", "sched.h"}, "bindings": {"sys/mman.h"}}
    for header in includes(path):
        standard = re.fullmatch(r"[a-z_]+", header)
        assert (
            standard or header in system.get(folder, set()) or re.fullmatch(ALLOWED_HEADERS[folder], header)
        ), header


@sources
def test_one_folder_knows_pybind11_and_none_torch(path: Path) -> None:
    for header in includes(path):
        assert not header.startswith("pybind11/") or path.parent == CSRC / "bindings"
        assert not re.match(r"(torch|ATen|c10)/", header)


@sources
def test_formulas_include_nothing_but_arithmetic(path: Path) -> None:
    if path.parent == CSRC / "math":
        standard = {header for header in includes(path) if not header.endswith(".h")}
        assert standard <= {"cmath", "cstdint", "bit"}


@sources
def test_one_file_knows_ptx(path: Path) -> None:
    if path.name != "device.cuh":
        assert not re.search(r"\basm\b", re.sub(r"//.*", "", path.read_text()))


@pytest.mark.parametrize("path", FOR_EVERY_ISA, ids=lambda p: p.name)
def test_kernels_share_no_code_between_instruction_sets(path: Path) -> None:
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        for header in includes(source):
            own = (source.parent / header).resolve()
            if own.is_file():
                waiting.append(own)
            else:
                assert header in PLAIN_HEADERS, f"{source.name} includes <{header}>"


# What dispatches, shares out or asks the runtime computes nothing; of the headers, these hold kernels.
NO_KERNELS = {"cpu/dispatch.cpp", "cpu/parallel.cpp", "cpu/table.cpp", "cuda/device.cu"}
KERNEL_HEADERS = {"cpu/gemm.h", "cpu/rssm_cells.h", "cuda/scan.cuh"}
KERNELS = [
    p
    for p in SOURCES
    if p.parent.name in {"cpu", "cuda"}
    and (p.suffix in {".cpp", ".cu"} or str(p.relative_to(CSRC)) in KERNEL_HEADERS)
    and str(p.relative_to(CSRC)) not in NO_KERNELS
]


@pytest.mark.parametrize("path", KERNELS, ids=[str(p.relative_to(CSRC)) for p in KERNELS])
def test_kernels_say_what_they_do(path: Path) -> None:
    comment = re.match(r"(?://.*\n)*", path.read_text())
    assert comment is not None
    words = re.findall(r"^// (What|Layout|Mapping|Cost|Numerics|Source):", comment[0], re.MULTILINE)
    assert words == ["What", "Layout", "Mapping", "Cost", "Numerics", "Source"]


def test_every_source_is_built() -> None:
    built = set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    assert built == {str(p.relative_to(ROOT)) for p in SOURCES if p.suffix in {".cpp", ".cu"}}
