from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
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
