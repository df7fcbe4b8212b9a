"""Observations become float32 vectors and uint8 images with channels first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from pywm.envs.spaces import ObsLayout, is_image, split_keys
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
