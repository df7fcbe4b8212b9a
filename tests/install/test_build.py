"""pip always succeeds, unless kernels were asked for in so many words; the build says what it chose."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [
    m for m in ("scikit_build_core", "pybind11", "cmake", "ninja", "pip") if not importlib.util.find_spec(m)
]
pytestmark = pytest.mark.skipif(
    bool(MISSING) or not (ROOT / "CMakeLists.txt").exists(),
    reason=f"needs a checkout and the build tools{f' ({MISSING} missing)' if MISSING else ''}",
)
NOTHING = "/nonexistent"


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYWM_")}
    bin_folder = str(Path(sys.executable).parent)
    return kept | {"PATH": os.pathsep.join([bin_folder, kept.get("PATH", "")])} | changes


def wheel(folder: Path, **changes: str) -> tuple[int, str, Path | None]:
    """Build a wheel with the tools at hand; return pip's exit code, what it said, and the wheel."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-v"]
    command += ["-w", str(folder), f"-Cbuild-dir={folder / 'build'}"]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr, next(folder.glob("*.whl"), None)


def assert_pure(path: Path | None) -> None:
    assert path is not None
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert not [name for name in names if re.search(r"\.(so|pyd|dylib|cpp|cu)$", name)]
    assert {"pywm/__init__.py", "pywm/py.typed", "pywm/_C.pyi", "pywm/ops/reference.py"} <= set(names)


def test_without_a_compiler_it_is_pure_python_and_says_so(tmp_path: Path) -> None:
    code, said, path = wheel(tmp_path, CXX=f"{NOTHING}/c++", CC=f"{NOTHING}/cc", PYWM_CUDA="OFF")
    assert code == 0, said
    assert_pure(path)
    assert "nothing could be compiled" in said


def test_no_ext_is_pure_python_and_says_so(tmp_path: Path) -> None:
    code, said, path = wheel(tmp_path, PYWM_NO_EXT="1")
    assert code == 0, said
    assert_pure(path)
    assert "PYWM_NO_EXT is set" in said


def test_required_kernels_without_a_compiler_fail(tmp_path: Path) -> None:
    code, said, path = wheel(tmp_path, CXX=f"{NOTHING}/c++", PYWM_CUDA="OFF", PYWM_REQUIRE_EXT="1")
    assert code != 0
    assert path is None
    assert f"{NOTHING}/c++" in said


def test_required_cuda_without_nvcc_fails_with_the_remedy(tmp_path: Path) -> None:
    code, said, path = wheel(tmp_path, CUDACXX=f"{NOTHING}/nvcc", PYWM_CUDA="ON")
    assert code != 0
    assert path is None
    assert "PYWM_CUDA=ON, but no working CUDA compiler was found" in re.sub(r"\s+", " ", said)


def configure(folder: Path, choice: str) -> tuple[int, str]:
    import pybind11

    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPYWM_CUDA={choice}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    changes = {"CUDACXX": f"{NOTHING}/nvcc"}
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=280)
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("choice", "answer"),
    [
        ("AUTO", "pywm: CUDA kernels OFF (no CUDA compiler was found when it was built)"),
        ("OFF", "pywm: CUDA kernels OFF (PYWM_CUDA=OFF)"),
        ("perhaps", "PYWM_CUDA is 'perhaps', but AUTO, ON or OFF was expected"),
    ],
)
def test_the_build_says_what_it_chose(tmp_path: Path, choice: str, answer: str) -> None:
    code, said = configure(tmp_path, choice)
    assert answer in said
    assert (code == 0) == (choice != "perhaps")


def test_building_asks_for_no_torch() -> None:
    # pip would download the newest torch, with its CUDA packages, into the build environment.
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in 3.11")
    import tomllib

    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {re.match(r"[\w-]+", r)[0] for r in required} == {"scikit-build-core", "pybind11"}
