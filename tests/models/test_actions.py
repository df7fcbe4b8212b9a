"""Actions of environments and of models: one is the other, there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from pywm.errors import UserError
from pywm.models.actions import ActionSpace

SPACES = [
    (spaces.Discrete(4), 4),
    (spaces.Discrete(3, start=-1), 3),
    (spaces.MultiDiscrete([2, 3, 2]), 7),
    (spaces.MultiDiscrete([2, 3], start=[5, -2]), 5),
    (spaces.MultiBinary(3), 6),
    (spaces.MultiBinary([2, 2]), 8),
    (spaces.Box(-1, 1, (3,), np.float32), 3),
    (spaces.Box(np.array([-2.0, 0.5]), np.array([4.0, 0.5]), dtype=np.float64), 2),
    (spaces.Box(-1, 1, (), np.float32), 1),
    (spaces.Box(-3, 3, (2, 2), np.float32), 4),
    (spaces.Box(np.array([-np.inf, 0], np.float32), np.array([np.inf, np.inf], np.float32)), 2),
]


@pytest.mark.parametrize(("space", "width"), SPACES, ids=str)
def test_there_and_back(space: spaces.Space[Any], width: int) -> None:
    space.seed(0)
    actions = ActionSpace(space)
    taken = np.stack([np.asarray(space.sample()) for _ in range(20)])
    model = actions.from_env(taken)
    assert model.shape == (20, width) == (20, actions.width)
    assert model.dtype == torch.float32
    back = actions.to_env(model)
    assert back.shape == taken.shape
    np.testing.assert_allclose(back, taken, rtol=1e-5, atol=1e-5)
    if actions.kind == "categorical":
        assert [len(group.unique()) for group in model.split(actions.classes, -1)] == [2] * len(
            actions.classes
        )
        assert model.sum(-1).tolist() == [len(actions.classes)] * 20
    assert len(actions.from_env(taken[:0])) == 0


def test_what_the_model_sees_is_written_out() -> None:
    assert ActionSpace(spaces.Discrete(3, start=5)).from_env(np.array([7, 5])).tolist() == [
        [0, 0, 1],
        [1, 0, 0],
    ]
    two = ActionSpace(spaces.MultiDiscrete([2, 3]))
    assert two.from_env(np.array([[1, 0]])).tolist() == [[0, 1, 1, 0, 0]]
    box = ActionSpace(spaces.Box(np.array([-2, -np.inf], np.float32), np.array([4, np.inf], np.float32)))
    assert box.from_env(np.array([[1.0, 7.0], [4.0, -7.0]])).tolist() == [[0, 7], [1, -7]]
    # A bound may be overstepped by a rounding error.
    assert box.from_env(np.array([[4.00001, 0.0], [-2.00001, 0.0]])).tolist() == [[1, 0], [-1, 0]]
    half = ActionSpace(spaces.Box(0, np.inf, (1,), np.float32))
    assert half.from_env(np.array([[-1e-6], [3.0]])).tolist() == [[0], [3]]


@pytest.mark.parametrize(
    ("space", "action", "error", "message"),
    [
        (
            spaces.Discrete(3),
            [0, 3],
            ValueError,
            r"action 1 of 2 is 3, but an element of Discrete\(3\) was exp",
        ),
        (spaces.Discrete(3), [-1], ValueError, "action is -1, but an element"),
        (spaces.Discrete(3, start=5), [4], ValueError, "action is 4, but an element"),
        (spaces.Discrete(3), [[0]], ValueError, r"action has shape \(1, 1\), but \(N\) was expected"),
        (spaces.Discrete(3), 0, ValueError, r"action has shape \(\), but \(N\) was expected"),
        (spaces.Discrete(3), [0.0], TypeError, "action has dtype float64, but integers were expected"),
        (spaces.Discrete(3), ["left"], TypeError, "action has dtype <U4, but integers"),
        (spaces.MultiDiscrete([2, 3]), [[0, 2], [2, 0]], ValueError, r"action 1 of 2 is \[2 0\], but"),
        (spaces.MultiBinary(2), [[0, 2]], ValueError, r"action is \[0 2\], but"),
        (spaces.Box(-1, 1, (2,)), [[0.0, 1.1]], ValueError, r"action is \[0.  1.1\], but an element of Box"),
        (spaces.Box(-1, 1, (2,)), [[0.0, np.nan]], ValueError, r"action is \[ 0. nan\], but"),
        (spaces.Box(0, np.inf, (1,)), [[-0.5]], ValueError, r"action is \[-0.5\], but"),
        (spaces.Box(-np.inf, np.inf, (1,)), [[np.inf]], ValueError, r"action is \[inf\], but"),
        (
            spaces.Box(-1, 1, (2,)),
            [[0.0]],
            ValueError,
            r"action has shape \(1, 1\), but \(N, 2\) was expected",
        ),
        (spaces.Box(-1, 1, (1,)), [["x"]], TypeError, "action has dtype <U1, but numbers were expected"),
    ],
)
def test_what_is_no_action_is_named(space: Any, action: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^play: {message}"):
        ActionSpace(space).from_env(np.array(action), "play")


def test_a_space_without_a_form_is_named() -> None:
    with pytest.raises(UserError, match=r"ActionSpace: space is Text\(.*but Discrete, MultiDiscrete"):
        ActionSpace(spaces.Text(3))


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (spaces.Discrete(4), "categorical of 4"),
        (spaces.MultiDiscrete([2, 3]), "2 categoricals of 2, 3"),
        (spaces.MultiBinary(2), "2 categoricals of 2, 2"),
        (spaces.Box(-3, 3, (2, 2), np.float32), "normal of dimension 4, [-1, 1] scaled to the bounds"),
        (spaces.Box(-np.inf, np.inf, (2,), np.float32), "normal of dimension 2, without bounds"),
        (
            spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, np.inf]), dtype=np.float64),
            "normal of dimension 2, 1 of them with [-1, 1] scaled to the bounds",
        ),
    ],
    ids=str,
)
def test_the_head_is_told_in_words(space: spaces.Space[Any], text: str) -> None:
    assert str(ActionSpace(space)) == text
