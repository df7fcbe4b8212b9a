"""The tests test the compiled kernels: without them the session does not start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pywm
from pywm.ops import _native


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get("PYWM_TEST_REFERENCE") == "1" or _native.has_backend("cpu"):
        return
    pytest.exit(
        f"the compiled kernels are not loaded, so these tests would test the references: {_native.why_not}\n"
        "To test the references knowingly, set PYWM_TEST_REFERENCE=1.",
        returncode=pytest.ExitCode.USAGE_ERROR,
    )


def pytest_report_header() -> list[str]:
    lines = [f"pywm: {pywm.__version__} in {Path(pywm.__file__).parent}"]
    return lines + [f"pywm: {device}: {backend}" for device, backend in pywm.backend().items()]
