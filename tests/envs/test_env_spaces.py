"""Observations become float32 vectors and uint8 images with channels first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from pywm.envs.spaces import Choices, ObsLayout, is_image, last_frame, split_keys
from pywm.errors import UserError


def picture(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


@pytest.mark.parametrize(
    ("shape", "converted"),
    [
        ((4, 84, 84), (4, 84, 84)),
        ((3, 64, 64), (3, 64, 64)),
        ((96, 96, 3), (3, 96, 96)),
        ((84, 84), (1, 84, 84)),
        ((4, 64, 64, 3), (12, 64, 64)),
        ((7, 7, 3), (7, 7, 3)),
        ((128,), (128,)),
    ],
)
def test_pictures_get_their_channels_first(shape: tuple[int, ...], converted: tuple[int, ...]) -> None:
    layout = ObsLayout(picture(*shape))
    assert layout.space.shape == converted
    batch = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    out = layout.convert(batch)
    assert isinstance(out, np.ndarray)
    assert out.shape == (2, *converted)
    assert out.dtype == np.uint8
    assert out.flags.c_contiguous
    assert is_image(layout.space) == (len(converted) == 3 and converted != (7, 7, 3))


def test_a_stack_of_colour_frames_keeps_the_oldest_first() -> None:
    batch = np.arange(2 * 2 * 16 * 16 * 3, dtype=np.int64).reshape(2, 2, 16, 16, 3).astype(np.uint8)
    out = ObsLayout(picture(2, 16, 16, 3)).convert(batch)
    for frame in range(2):
        for colour in range(3):
            np.testing.assert_array_equal(out[:, 3 * frame + colour], batch[:, frame, :, :, colour])


def test_what_needs_no_change_is_passed_through() -> None:
    layout = ObsLayout(spaces.Box(-1.0, 1.0, (3,), np.float32))
    batch = np.zeros((2, 3), dtype=np.float32)
    assert layout.identity
    assert layout.convert(batch) is batch


@pytest.mark.parametrize(
    ("space", "batch", "expected"),
    [
        (spaces.Box(-9.0, 9.0, (1,), np.float64), np.array([[1.5], [2.5]]), [[1.5], [2.5]]),
        (spaces.Box(-9, 9, (1,), np.int64), np.array([[1], [-2]]), [[1], [-2]]),
        (spaces.Discrete(3), np.array([0, 2]), [[1, 0, 0], [0, 0, 1]]),
        (spaces.Discrete(2, start=5), np.array([5, 6]), [[1, 0], [0, 1]]),
        (spaces.MultiDiscrete([2, 3]), np.array([[1, 0], [0, 2]]), [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]),
        (spaces.MultiBinary(2), np.array([[1, 0], [1, 1]], dtype=np.int8), [[1, 0], [1, 1]]),
    ],
)
def test_everything_else_becomes_float32(space: Any, batch: np.ndarray, expected: Any) -> None:
    layout = ObsLayout(space)
    out = layout.convert(batch)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, expected)
    assert layout.space.contains(out[0])


@pytest.mark.parametrize(
    ("space", "classes"),
    [
        (spaces.Discrete(4, start=2), (4,)),
        (spaces.MultiDiscrete([2, 3]), (2, 3)),
        (spaces.MultiBinary((2, 3)), ()),
    ],
)
def test_choices_are_known_as_such(space: Any, classes: tuple[int, ...]) -> None:
    alone, among = ObsLayout(space).space, ObsLayout(spaces.Dict(a=space)).space
    for part in (alone, among["a"]):
        assert isinstance(part, Choices)
        assert part.classes == classes
        assert part.shape == (space.shape if not classes else (sum(classes),))
    assert not isinstance(ObsLayout(spaces.Box(0.0, 1.0, (3,), np.float32)).space, Choices)


def test_dicts_are_split_into_images_and_vectors() -> None:
    space = spaces.Dict(
        {
            "camera": picture(64, 64, 3),
            "codes": picture(7, 7, 3),
            "inner": spaces.Dict({"depth": picture(32, 32), "speed": spaces.Box(0.0, 1.0, (2,), np.float64)}),
            "mode": spaces.Discrete(3),
            "mission": spaces.Text(10),
        }
    )
    layout = ObsLayout(space)
    keys = split_keys(layout.space)
    assert keys.image == ("camera", "inner/depth")
    assert set(keys.vector) == {"codes", "inner/speed", "mode"}
    raw = {
        "camera": np.zeros((2, 64, 64, 3), np.uint8),
        "codes": np.zeros((2, 7, 7, 3), np.uint8),
        "inner": {"depth": np.zeros((2, 32, 32), np.uint8), "speed": np.zeros((2, 2))},
        "mode": np.array([0, 2]),
        "mission": ("go", "stop"),
    }
    out = layout.convert(raw)
    assert isinstance(out, dict)
    assert {key: value.shape for key, value in out.items()} == {
        "camera": (2, 3, 64, 64),
        "codes": (2, 7, 7, 3),
        "inner/depth": (2, 1, 32, 32),
        "inner/speed": (2, 2),
        "mode": (2, 3),
    }


def test_a_space_without_keys_is_called_obs() -> None:
    assert split_keys(picture(3, 64, 64)) == (("obs",), ())
    assert split_keys(spaces.Box(0.0, 1.0, (3,), np.float32)) == ((), ("obs",))


@pytest.mark.parametrize(
    ("space", "key"),
    [
        (spaces.Tuple((spaces.Discrete(2),)), "'obs'"),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Sequence(spaces.Discrete(2))})}), "'a/b'"),
    ],
)
def test_spaces_without_a_form_are_refused_with_key_and_wrapper(space: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"my_env: .*key {key} is .*FlattenObservation"):
        ObsLayout(space, "my_env")


def test_a_dict_of_nothing_but_text_is_refused() -> None:
    with pytest.raises(UserError, match="expected at least one array"):
        ObsLayout(spaces.Dict({"mission": spaces.Text(3)}))


NEAREST = [
    (spaces.Box(-1.0, 1.0, (2,), np.float32), [[-3.0, 0.25]], [[-1.0, 0.25]]),
    (spaces.Box(-0.1, 0.1, (2,), np.float64), [[-3.0, 3.0]], [[-0.1, 0.1]]),
    (spaces.Box(-np.inf, np.inf, (1,), np.float32), [[np.inf]], [[np.finfo(np.float32).max]]),
    (spaces.Box(-5, 5, (3,), np.int8), [[2.6, -200.0, 200.0]], [[3, -5, 5]]),
    (spaces.Box(0, 255, (3,), np.uint8), [[-7.0, 99.6, 300.0]], [[0, 100, 255]]),
    (spaces.Box(0.0, 1.0, (), np.float32), [0.5, 2.0], [0.5, 1.0]),
    (spaces.Discrete(3), [[0.1, 0.2, 0.0]], [1]),
    (spaces.Discrete(2, start=5), [[0.1, 0.2]], [6]),
    (spaces.MultiDiscrete([2, 3], start=[0, 4]), [[0.9, 0.1, 0.2, 0.2, 0.6]], [[0, 6]]),
    (spaces.MultiBinary(3), [[0.4, 0.6, 7.0]], [[0, 1, 1]]),
]


@pytest.mark.parametrize(("space", "x", "expected"), NEAREST, ids=lambda x: str(x)[:20])
def test_a_prediction_becomes_the_nearest_element(space: Any, x: Any, expected: Any) -> None:
    found = ObsLayout(space).invert({"obs": np.array(x, np.float32)})
    assert found.dtype == space.dtype
    assert found.tolist() == expected
    assert all(space.contains(row if space.shape else np.array(row, space.dtype)) for row in found)


@pytest.mark.parametrize(
    "space",
    [
        picture(96, 80, 3),
        picture(84, 82),
        picture(4, 64, 60, 3),
        picture(3, 64, 60),
        picture(7, 7, 3),
        spaces.Discrete(4, start=2),
        spaces.MultiDiscrete([2, 3, 4]),
        spaces.MultiBinary([2, 3]),
        spaces.Box(-9.0, 9.0, (2, 3), np.float64),
        spaces.Dict(a=picture(20, 24, 3), b=spaces.Dict(c=spaces.Discrete(3), d=spaces.Box(-1, 1, (2,)))),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_was_converted_can_be_inverted(space: Any) -> None:
    batched = batch_space(space, 3)
    batched.seed(0)
    raw, layout = batched.sample(), ObsLayout(space)
    out = layout.convert(raw)
    found = layout.invert(out if isinstance(out, dict) else {"obs": out})
    assert batched.contains(found)
    for a, b in zip(leaves(found), leaves(raw), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert layout.original == space


def leaves(raw: Any) -> list[np.ndarray]:
    if not isinstance(raw, dict):
        return [raw]
    return [leaf for key in sorted(raw) for leaf in leaves(raw[key])]


def test_texts_are_not_in_the_original_space() -> None:
    vector = spaces.Box(0.0, 1.0, (2,), np.float32)
    space = spaces.Dict({"a": vector, "mission": spaces.Text(3), "b": spaces.Dict({"hint": spaces.Text(3)})})
    assert ObsLayout(space).original == spaces.Dict({"a": vector})


def test_a_frame_is_shown_in_colours() -> None:
    stack = np.arange(6)[:, None, None] * np.ones((1, 2, 2))
    assert last_frame(stack)[:, 0, 0].tolist() == [3, 4, 5]
    assert last_frame(stack[:4])[:, 0, 0].tolist() == [3, 3, 3]
    assert last_frame(stack[None, :1]).shape == (1, 3, 2, 2)
