from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from processes import Commands


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture
def pywm(server: Commands, tmp_path: Path) -> Commands:
    """Run ``pywm ...`` in a fresh process, in this test's folder."""
    server.folder = tmp_path
    return server


@pytest.fixture(scope="session")
def trained(server: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    server.folder = tmp_path_factory.mktemp("trained")
    result = server("train", "tiny", "CartPole-v1", "--steps", 80, "--run-dir", "run")
    assert result.code == 0, result.err
    return server.folder / "run"
