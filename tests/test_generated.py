"""What is written from the sources is up to date; ``make docs`` writes it."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pywm.ops import _native

ROOT = Path(__file__).parents[1]
GENERATOR = ROOT / "docs" / "generate.py"
if not GENERATOR.exists():
    pytest.skip("the generator is in a checkout", allow_module_level=True)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_md_is_up_to_date(generator: ModuleType) -> None:
    assert (ROOT / "docs" / "api.md").read_text() == generator.api(), "run: make docs"


@pytest.mark.skipif(not _native.has_backend("cpu"), reason="needs the compiled module")
def test_stub_is_up_to_date(generator: ModuleType) -> None:
    assert (ROOT / "pywm" / "_C.pyi").read_text() == generator.stub(), "run: make docs"


@pytest.mark.skipif(not _native.has_backend("cpu"), reason="needs the compiled module")
def test_stub_names_every_function() -> None:
    body = ast.parse((ROOT / "pywm" / "_C.pyi").read_text()).body
    stubbed = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    module = _native.module()
    assert stubbed == {n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("__")}
