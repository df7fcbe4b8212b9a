"""No bad action reaches an environment, and good ones arrive unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from pywm.envs.spaces import ActionCheck
from pywm.errors import UserError

DISCRETE = spaces.Discrete(4)
MULTI = spaces.MultiDiscrete([3, 2])
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
OPEN = spaces.Box(-np.inf, np.inf, (2,), np.float32)


@pytest.mark.parametrize(
    ("space", "action"),
    [
        (DISCRETE, np.array([0, 3])),
        (DISCRETE, np.array([0, 3], dtype=np.int32)),
        (DISCRETE, np.array([0, 3], dtype=np.uint8)),
        (DISCRETE, np.array([0, 3], dtype=">i4")),
        (spaces.Discrete(1000), np.array([0, 255], dtype=np.uint8)),
        (MULTI, np.array([[2, 1], [0, 0]])),
        (spaces.MultiBinary(3), np.array([[0, 1, 0], [1, 1, 1]], dtype=np.int8)),
        (BOX, np.array([[-2.0, 0.0], [2.0, 1.0]], dtype=np.float32)),
        (BOX, np.array([[-2.0, 0.0], [2.0, 1.0]])),
        (OPEN, np.array([[-3e38, 0.0], [3e38, 1.0]], dtype=np.float32)),
    ],
)
def test_actions_inside_the_space_pass_in_the_dtype_of_the_space(space: Any, action: np.ndarray) -> None:
    checked = ActionCheck(space, 2)(action)
    np.testing.assert_array_equal(checked, action)
    assert checked.dtype == space.dtype
    assert all(space.contains(row if row.shape else int(row)) for row in checked)


@pytest.mark.parametrize(
    ("space", "action", "message"),
    [
        (DISCRETE, np.array([0, 4]), "action of environment 1 is 4, but expected 0 to 3"),
        (DISCRETE, np.array([-1, 0]), "action of environment 0 is -1, but expected 0 to 3"),
        (DISCRETE, np.array([0, -1], dtype=np.int32), "environment 1 is -1"),
        (DISCRETE, np.array([0, 2**40]), "environment 1 is 1099511627776"),
        (DISCRETE, np.array([0, 200], dtype=np.uint8), "environment 1 is 200"),
        (DISCRETE, np.array([0, -1], dtype=">i4"), "environment 1 is -1"),
        (
            spaces.Discrete(1000),
            np.array([0, -1], dtype=np.int8),
            "environment 1 is -1, but expected 0 to 999",
        ),
        (BOX, np.array([[0.0, 0.0], [1e300, 0.0]]), "environment 1 is .*finite"),
        (DISCRETE, np.array([0]), r"shape \(1,\), but expected \(2,\)"),
        (DISCRETE, np.array([[0], [1]]), r"shape \(2, 1\), but expected \(2,\)"),
        (MULTI, np.array([[2, 1], [0, 2]]), r"environment 1 is \[0 2\], but expected 0 to \[2, 1\]"),
        (MULTI, np.array([[2, 1], [-1, 0]]), "environment 1"),
        (BOX, np.array([[np.nan, 0.0], [0.0, 0.0]], dtype=np.float32), "environment 0 is .*finite"),
        (BOX, np.array([[0.0, 0.0], [0.0, np.inf]], dtype=np.float32), "environment 1 is .*finite"),
        (BOX, np.array([[0.0, 0.0], [2.1, 0.0]], dtype=np.float32), "environment 1 .*clip the action"),
        (OPEN, np.array([[0.0, 0.0], [0.0, -np.inf]], dtype=np.float32), "environment 1 is .*finite"),
        (spaces.MultiBinary(2), np.array([[0, 1], [2, 0]], dtype=np.int8), "environment 1"),
    ],
)
def test_actions_outside_of_the_space_raise(space: Any, action: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActionCheck(space, 2)(action)


@pytest.mark.parametrize(
    ("space", "action", "message"),
    [
        (DISCRETE, [0, 1], "list, but expected a numpy.ndarray"),
        (DISCRETE, np.array([0.0, 1.0]), "dtype float64, but expected integers"),
        (DISCRETE, np.array([True, False]), "dtype bool, but expected integers"),
        (BOX, np.array([[0, 0], [1, 1]]), "dtype int64, but expected floats"),
    ],
)
def test_wrong_kinds_of_actions_raise(space: Any, action: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ActionCheck(space, 2)(action)


def test_a_rounding_error_beyond_a_bound_is_cut_off() -> None:
    over = np.nextafter(np.float32(2.0), np.float32(3.0))
    checked = ActionCheck(BOX, 1)(np.array([[over, 0.5]], dtype=np.float32))
    assert checked.tolist() == [[2.0, 0.5]]


def test_spaces_that_start_elsewhere_count_from_zero_here() -> None:
    check = ActionCheck(spaces.Discrete(3, start=-1), 3)
    assert check.space == spaces.Discrete(3)
    assert check(np.array([0, 1, 2])).tolist() == [-1, 0, 1]
    with pytest.raises(ValueError, match="expected 0 to 2"):
        check(np.array([0, 1, 3]))
    multi = ActionCheck(spaces.MultiDiscrete([2, 3], start=[5, -7]), 1)
    assert multi(np.array([[1, 2]])).tolist() == [[6, -5]]


@pytest.mark.parametrize(
    "space", [spaces.Dict({"a": DISCRETE}), spaces.Text(4), spaces.Box(0, 9, (2,), np.int64)]
)
def test_action_spaces_without_a_form_are_refused_by_name(space: Any) -> None:
    with pytest.raises(UserError, match=r"my_env: the action space is .*but expected Discrete"):
        ActionCheck(space, 2, "my_env")
