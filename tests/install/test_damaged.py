"""A missing, broken or wrong compiled module leaves a package that works, and says why and what mends it."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pywm
from pywm.ops import _native

PACKAGE = Path(pywm.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
pytestmark = pytest.mark.skipif(not _native.has_backend("cpu"), reason="needs the compiled module")

USE = """
import torch, pywm
x = torch.ones(3, 2)
flags = torch.zeros(3, 2, dtype=torch.bool)
advantage, returns = pywm.gae(x, x, x, flags, flags)
assert advantage.shape == (3, 2)
print(pywm.__file__)
print(pywm.backend(x))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return the folder of a copy of the package with its compiled module."""
    copy = tmp_path / "pywm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "_C.*.so", "_C.*.pyd"))
    shutil.copy(_native.module().__file__, copy / f"_C{SUFFIX}")
    return copy


def use(python: Any, package: Path) -> str:
    """Call an op of this copy in a process of its own; return what pywm.backend said."""
    result = python(USE, path=package.parent)
    assert result.code == 0, f"{result.code}: {result.err}"
    path, said = result.out.splitlines()
    assert Path(path).parent == package
    return said


def delete(module: Path) -> None:
    module.unlink()


def truncate(module: Path) -> None:
    os.truncate(module, module.stat().st_size // 2)


def empty(module: Path) -> None:
    os.truncate(module, 0)


def end_with_zeros(module: Path) -> None:
    # What a file system may leave after a power cut: the length is right, the last blocks were never written.
    size = module.stat().st_size
    os.truncate(module, size - 4096)
    os.truncate(module, size)


def replace_by_text(module: Path) -> None:
    module.write_text("version https://git-lfs.github.com/spec/v1\n")


def be_of_another_python(module: Path) -> None:
    module.rename(module.with_name("_C.cpython-37m-x86_64-linux-gnu.so"))


def be_another_library(module: Path) -> None:
    other = next(Path(sysconfig.get_path("platlib"), "numpy").rglob(f"*{SUFFIX}"), None)
    if other is None:
        pytest.skip("no other extension module at hand")
    shutil.copy(other, module)


def be_unreadable(module: Path) -> None:
    module.unlink()
    module.symlink_to("nowhere.so")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (delete, "no compiled module in this installation"),
        (truncate, "the compiled module is damaged"),
        (empty, "the compiled module does not load"),
        (end_with_zeros, "the compiled module is damaged"),
        (replace_by_text, "the compiled module does not load"),
        (be_of_another_python, "the compiled module is of another Python (found _C.cpython-37m"),
        (be_another_library, "the compiled module does not load"),
        (be_unreadable, "no compiled module in this installation"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_references_take_over(python: Any, package: Path, damage: Callable[[Path], None], why: str) -> None:
    if damage in (truncate, end_with_zeros) and sys.platform != "linux":
        pytest.skip("the check reads ELF files")
    damage(package / f"_C{SUFFIX}")
    said = use(python, package)
    assert said.startswith(f"reference: {why}"), said
    assert "; mend it with: pip install " in said


def test_a_module_of_another_version_is_not_used(python: Any, package: Path) -> None:
    (package / "_version.py").write_text('__version__ = "9.9.9"\n')
    said = use(python, package)
    assert f"the compiled module is of version {pywm.__version__}, the package of 9.9.9" in said
    assert "; mend it with: pip install " in said


def test_a_torch_without_the_exchange_api_is_not_fatal(python: Any, package: Path) -> None:
    # What an older torch looks like to the module.
    hide = "import torch\nfor name in ('__dlpack_c_exchange_api__', '__c_dlpack_exchange_api__'):\n"
    hide += "    if hasattr(torch.Tensor, name):\n        delattr(torch.Tensor, name)\n"
    version = package / "_version.py"
    version.write_text(version.read_text() + hide)
    assert "need torch >= 2.10" in use(python, package)


def test_the_copy_itself_works(python: Any, package: Path) -> None:
    assert use(python, package).startswith("cpu: compiled kernels")


@pytest.mark.parametrize(("allowed", "outcome"), [("", "would test the references"), ("1", "1 passed")])
def test_a_test_session_without_kernels_aborts(
    python: Any, package: Path, allowed: str, outcome: str
) -> None:
    delete(package / f"_C{SUFFIX}")
    session = package.parent / "session"
    session.mkdir()
    shutil.copy(Path(__file__).parents[1] / "conftest.py", session)
    (session / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    code = "import pytest\npytest.main(['-p', 'no:cacheprovider', '--rootdir=session', 'session'])"
    result = python(code, path=package.parent, PYWM_TEST_REFERENCE=allowed)
    assert outcome in result.out + result.err
    assert ("passed" in result.out) == bool(allowed)
