"""Which devices the op tests run on."""

import pytest
import torch

from pywm.ops import _native


def available_devices():
    return [
        d for d in ("cpu", "cuda") if _native.has_backend(d) and (d == "cpu" or torch.cuda.is_available())
    ]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        marks = {"cuda": pytest.mark.gpu}
        metafunc.parametrize(
            "device",
            [pytest.param(d, marks=[marks[d]] if d in marks else []) for d in available_devices()],
        )
