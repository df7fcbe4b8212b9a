"""What goes wrong in a launcher reaches the test that called it, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from emulation import SCHEDULES, why_unavailable
from launching import launch_all
from test_scans import cases


def test_a_buffer_that_is_too_small_is_reported_and_the_next_call_runs() -> None:
    reason = why_unavailable("asan")
    if reason:
        pytest.skip(reason)
    right = cases("discounted_return", (9, 33))["plain-float32-forward"].call
    wrong = replace(right, outputs={"returns": (9, 32)})
    calls = [(call, SCHEDULES["forward"]) for call in (right, wrong, right)]
    before, between, after = launch_all(calls, "asan")
    assert "heap-buffer-overflow" in between.report
    assert "scan.cuh" in between.report
    assert between.failure
    assert before.require_clean().keys() == after.require_clean().keys() == {"returns"}


def test_a_complaint_of_the_emulator_is_passed_on() -> None:
    call = cases("discounted_return", (8, 3))["plain-float32-forward"].call
    # More columns than blocks of a grid.
    impossible = replace(call, numbers=call.numbers | {"T": 1, "N": 128 * 2**31}, outputs={"returns": (1, 1)})
    result = launch_all([(impossible, SCHEDULES["forward"])], "plain")[0]
    assert "invalid launch" in result.failure
