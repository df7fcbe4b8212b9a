"""What observations and actions look like inside pywm, and how a gymnasium space becomes that.

Observations are float32 vectors and uint8 images ``[C, height, width]``, one array or a flat dict of arrays.
Actions are checked before an environment sees them: a native simulator that is handed an action out of its
range may hang for ever instead of raising.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from pywm.errors import UserError
from pywm.types import Obs

__all__ = ["ActionCheck", "Choices", "ObsKeys", "ObsLayout", "is_image", "last_frame", "origin", "split_keys"]

log = logging.getLogger(__name__)

# Smaller uint8 grids (MiniGrid's 7 x 7 object codes) are codes, not pixels; a convolution has nothing to see.
MIN_IMAGE_SIDE = 16

# By how much of a bound a float32 action may overstep it after a few operations.
ROUNDING = 1e-5

Space = spaces.Space[Any]
Convert = Callable[[Any], np.ndarray]


class ObsKeys(NamedTuple):
    """Keys of an observation space by kind; a space without keys is the single key ``"obs"``."""

    image: tuple[str, ...]
    vector: tuple[str, ...]


class Choices(spaces.Box):
    """A vector of zeros and ones that stands for choices: what a discrete observation becomes.

    Args:
        shape: of the vector.
        classes: of each choice, one-hots of which lie side by side; empty where every number is a bit by itself.

    Attributes:
        classes: the same.
    """

    def __init__(self, shape: tuple[int, ...], classes: tuple[int, ...] = ()) -> None:
        super().__init__(0.0, 1.0, shape, np.float32)
        self.classes = classes


def is_image(space: Space) -> bool:
    """Say whether a (converted) space holds pictures: uint8 ``[C, height, width]`` with sides >= 16."""
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and min(space.shape[1:]) >= MIN_IMAGE_SIDE
    )


def split_keys(space: Space) -> ObsKeys:
    """Split the keys of an ``Envs.observation_space`` into images and everything else.

    Args:
        space: a Box, or a Dict of Boxes, as ``Envs`` exposes it.

    Returns:
        Image keys and vector keys in the order of the space; ``("obs",)`` stands for a Box.
    """
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"obs": space}
    image = tuple(key for key, part in parts.items() if is_image(part))
    return ObsKeys(image, tuple(key for key in parts if key not in image))


def last_frame(picture: np.ndarray) -> np.ndarray:
    """Return the colours ``[..., 3, height, width]`` of a (converted) picture ``[..., C, height, width]``.

    Of a stack of frames they are the last one's; a channel alone is grey.
    """
    if picture.shape[-3] % 3 == 0:
        return picture[..., -3:, :, :]
    return np.repeat(picture[..., -1:, :, :], 3, -3)


class ObsLayout:
    """How batches of raw observations become pywm's: the converted space and the function that converts.

    ====================  ==============================================================================
    Box uint8             unchanged; pictures ``[h, w, C]``, ``[h, w]`` and stacks ``[k, h, w, C]``
                          become ``[C, h, w]``, ``[1, h, w]`` and ``[k·C, h, w]``
    Box, other dtypes     float32
    Discrete              one-hot float32 ``[n]``, a :class:`Choices`
    MultiDiscrete         one-hots side by side, float32, a :class:`Choices`
    MultiBinary           float32, a :class:`Choices`
    Dict                  a flat dict; keys of nested Dicts are joined with ``/``
    texts inside a Dict   left out, with a warning in the log
    ====================  ==============================================================================

    Args:
        space: the single environment's observation space.
        name: the environment, for the messages.

    Attributes:
        space: the converted space of a single environment.
        original: the space that was given, without the texts.
        originals: the space that each key of ``space`` was made of.
        identity: whether ``convert`` hands its argument back unchanged.

    Raises:
        UserError: a space that has no such form; the message names the key and a wrapper that helps.
    """

    def __init__(self, space: Space, name: str = "environment") -> None:
        self._leaves: list[tuple[str, tuple[str, ...], Convert | None]] = []
        self.originals: dict[str, Space] = {}
        converted: dict[str, Space] = {}
        for path, leaf in _leaves(space, ()):
            # By dtype, because packages have classes of their own for texts (MiniGrid's mission).
            if path and leaf.dtype is not None and leaf.dtype.kind == "U":
                _say_left_out(name, "/".join(path))
                continue
            key = "/".join(path) or "obs"
            converted[key], convert = _convert_leaf(leaf, key, name)
            self._leaves.append((key, path, convert))
            self.originals[key] = leaf
        if not converted:
            raise UserError(f"{name}: the observation space is {space}, but expected at least one array")
        is_dict = isinstance(space, spaces.Dict)
        self.space: Space = spaces.Dict(converted) if is_dict else converted["obs"]
        self.original: Space = _without_texts(space)
        self._single = None if is_dict else self._leaves[0][2]
        self._is_dict = is_dict
        self.identity = not is_dict and self._single is None

    def convert(self, raw: Any) -> Obs:
        """Convert a batch of raw observations; arrays that need no conversion are passed through."""
        if not self._is_dict:
            return raw if self._single is None else self._single(raw)
        obs: dict[str, np.ndarray] = {}
        for key, path, convert in self._leaves:
            part = raw
            for step in path:
                part = part[step]
            obs[key] = part if convert is None else convert(part)
        return obs

    def invert(self, obs: Mapping[str, np.ndarray]) -> Any:
        """Turn what looks like converted observations into elements of ``original``: the nearest, by rounding and clipping.

        Args:
            obs: ``key -> [N, ...]`` floats; a space without keys is the single key ``"obs"``.

        Returns:
            A batch as the environment itself would give it: an array, or a (nested) dict of arrays. What is one of
            several choices is the largest of its numbers.
        """
        raw: dict[str, Any] = {}
        for key, path, _ in self._leaves:
            part = _invert_leaf(self.originals[key], np.asarray(obs[key]))
            if not path:
                return part
            below = raw
            for step in path[:-1]:
                below = below.setdefault(step, {})
            below[path[-1]] = part
        return raw


@functools.cache
def _say_left_out(name: str, key: str) -> None:
    log.warning("%s: the observation %r is text and is left out", name, key)


def _leaves(space: Space, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Space]]:
    if not isinstance(space, spaces.Dict):
        return [(path, space)]
    return [leaf for key, part in space.spaces.items() for leaf in _leaves(part, (*path, str(key)))]


def _without_texts(space: Space) -> Space:
    if not isinstance(space, spaces.Dict):
        return space
    parts = {key: _without_texts(part) for key, part in space.spaces.items()}
    # A Dict in which nothing is left has no leaf in the observation either.
    kept = {
        key: part
        for key, part in parts.items()
        if (part.spaces if isinstance(part, spaces.Dict) else part.dtype is None or part.dtype.kind != "U")
    }
    return space if kept == dict(space.spaces) else spaces.Dict(kept)


def _convert_leaf(space: Space, key: str, name: str) -> tuple[spaces.Box, Convert | None]:
    if isinstance(space, spaces.Box):
        return _convert_box(space)
    if isinstance(space, spaces.Discrete):
        n, start = int(space.n), int(space.start)
        eye = np.eye(n, dtype=np.float32)
        return Choices((n,), (n,)), lambda raw: eye[np.asarray(raw) - start]
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        starts = np.asarray(space.start)
        eyes = [np.eye(int(n), dtype=np.float32) for n in space.nvec]

        def one_hots(raw: Any) -> np.ndarray:
            index = np.asarray(raw) - starts
            return np.concatenate([eye[index[:, k]] for k, eye in enumerate(eyes)], axis=1)

        return Choices((int(space.nvec.sum()),), tuple(int(n) for n in space.nvec)), one_hots
    if isinstance(space, spaces.MultiBinary):
        return Choices(space.shape), _to_float32
    raise UserError(
        f"{name}: the observation space of key {key!r} is {space}, but expected Box, Discrete, "
        "MultiDiscrete, MultiBinary or a Dict of these. Wrap the environment in "
        "gymnasium.wrappers.FlattenObservation, or leave the key out: gymnasium.wrappers.FilterObservation"
    )


def origin(space: Space) -> str:
    """Say in a few words what the numbers of a vector key are, whose space was ``space`` before it was converted."""
    if isinstance(space, spaces.Discrete):
        return f"a one-hot of Discrete({space.n})"
    if isinstance(space, spaces.MultiDiscrete):
        return f"one-hots of MultiDiscrete({space.nvec.tolist()})"
    if isinstance(space, spaces.MultiBinary):
        return "bits"
    text = str(space.dtype)
    if len(space.shape or ()) < 2:
        return text
    # What was meant as a picture and is none would learn slowly, and nothing else would tell.
    return f"{text}, flattened: a picture would be uint8 with sides of {MIN_IMAGE_SIDE} or more"


def _to_float32(raw: Any) -> np.ndarray:
    return np.asarray(raw).astype(np.float32)


def _convert_box(space: spaces.Box) -> tuple[spaces.Box, Convert | None]:
    if space.dtype == np.float32:
        return space, None
    if space.dtype != np.uint8:
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        return spaces.Box(low, high, dtype=np.float32), _to_float32
    axes = _image_axes(space.shape)
    if axes is None:
        return space, None

    def to_channels_first(raw: Any) -> np.ndarray:
        moved = np.transpose(raw, (0, *(axis + 1 for axis in axes)))
        height, width = moved.shape[-2:]
        return np.ascontiguousarray(moved).reshape(len(raw), -1, height, width)

    low = to_channels_first(space.low[None])[0]
    high = to_channels_first(space.high[None])[0]
    return spaces.Box(low, high, dtype=np.uint8), to_channels_first


def _invert_leaf(space: Space, x: np.ndarray) -> np.ndarray:
    if isinstance(space, spaces.Discrete):
        return x.argmax(-1) + np.int64(space.start)
    if isinstance(space, spaces.MultiDiscrete):
        groups = np.split(x, np.cumsum(space.nvec)[:-1], -1)
        index = np.stack([group.argmax(-1) for group in groups], -1) + space.start
        return index.astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return (x > 0.5).astype(space.dtype)
    assert isinstance(space, spaces.Box)
    axes = _image_axes(space.shape) if space.dtype == np.uint8 else None
    if axes is not None:
        moved = x.reshape(len(x), *(space.shape[axis] for axis in axes))
        x = np.transpose(moved, (0, *(int(axis) + 1 for axis in np.argsort(axes))))
    low, high = space.low, space.high
    if space.dtype.kind == "f":
        # An open bound still excludes infinity.
        limit = np.finfo(space.dtype).max
        low, high = np.maximum(low, -limit), np.minimum(high, limit)
        with np.errstate(over="ignore"):
            x = x.astype(space.dtype)
        return np.clip(x, low, high)
    # In floats first: a number beyond an integer's range would come out at the other end of it.
    wide = np.float32 if space.dtype.itemsize <= 2 else np.float64
    return np.ascontiguousarray(np.clip(np.rint(x.astype(wide)), low, high)).astype(space.dtype)


def _image_axes(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the order of axes that puts channels first, or None where nothing is to be moved."""
    if len(shape) == 2 and min(shape) >= MIN_IMAGE_SIDE:
        return (0, 1)
    if len(shape) == 3 and shape[2] in (1, 3, 4) and min(shape[:2]) >= MIN_IMAGE_SIDE:
        return (2, 0, 1)
    if len(shape) == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) >= MIN_IMAGE_SIDE:
        return (0, 3, 1, 2)
    return None


class ActionCheck:
    """Check a batch of actions and bring it to the dtype that the environment expects.

    Discrete actions always count from 0 here; a space with another start is shifted.
    Box actions may overstep their bounds by a rounding error, which is cut off; real clipping is the
    algorithm's duty.

    Args:
        space: the single environment's action space.
        num_envs: number of environments ``N``.
        name: the environment, for the messages.

    Attributes:
        space: the action space that algorithms see.

    Raises:
        UserError: the space is not Discrete, MultiDiscrete, MultiBinary or a Box of floats.
    """

    def __init__(self, space: Space, num_envs: int, name: str = "environment") -> None:
        self.space = space
        self._dtype = np.dtype(space.dtype)
        self._shape: tuple[int, ...] = (num_envs, *(space.shape or ()))
        self._is_box = False
        self._start = np.zeros((), dtype=np.int64)
        # By dtype: the unsigned dtype of the same size, and the largest choice of every entry in it.
        self._limits: dict[np.dtype[Any], tuple[np.dtype[Any], np.ndarray]] = {}
        if isinstance(space, spaces.Discrete):
            self._top, self._start = np.asarray(space.n - 1), np.asarray(space.start)
            self.space = spaces.Discrete(int(space.n))
        elif isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
            self._top, self._start = space.nvec - 1, np.asarray(space.start)
            self.space = spaces.MultiDiscrete(space.nvec)
        elif isinstance(space, spaces.MultiBinary):
            self._top = np.asarray(1)
        elif isinstance(space, spaces.Box) and self._dtype.kind == "f":
            self._is_box = True
            # An open bound still excludes infinity. Broadcast here, because it costs time in every step.
            limit = np.finfo(self._dtype).max
            self._low = np.maximum(space.low, -limit) + np.zeros(self._shape, dtype=self._dtype)
            self._high = np.minimum(space.high, limit) + np.zeros(self._shape, dtype=self._dtype)
        else:
            raise UserError(
                f"{name}: the action space is {space}, but expected Discrete, MultiDiscrete (one axis), "
                "MultiBinary or a Box of floats. Wrap the environment in gymnasium.wrappers.TransformAction"
            )
        self._shifted = bool(np.any(self._start))

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Return the action for the environment, or raise before anything is stepped.

        Raises:
            TypeError: not a NumPy array, or of a wrong kind of dtype.
            ValueError: wrong shape, out of range or not finite.
        """
        if type(action) is not np.ndarray:
            raise TypeError(f"Envs.step: action is a {type(action).__name__}, but expected a numpy.ndarray")
        if action.shape != self._shape:
            raise ValueError(f"Envs.step: action has shape {action.shape}, but expected {self._shape}")
        if self._is_box:
            return self._check_box(action)
        # Negative integers seen as unsigned are large: one comparison covers both ends of the range.
        unsigned, top = self._limits.get(action.dtype) or self._limit(action.dtype)
        outside = action.view(unsigned) > top
        if np.count_nonzero(outside):
            n = int(np.argwhere(outside)[0, 0])
            raise ValueError(
                f"Envs.step: action of environment {n} is {action[n]}, but expected 0 to {self._top.tolist()}"
            )
        if self._shifted:
            return np.asarray(action + self._start, dtype=self._dtype)
        return action if action.dtype == self._dtype else action.astype(self._dtype)

    def _limit(self, dtype: np.dtype[Any]) -> tuple[np.dtype[Any], np.ndarray]:
        if dtype.kind not in "iu":
            raise TypeError(f"Envs.step: action has dtype {dtype}, but expected integers")
        unsigned = np.dtype(f"{dtype.byteorder}u{dtype.itemsize}")
        top = np.minimum(self._top.astype(np.uint64), np.uint64(np.iinfo(dtype).max)).astype(unsigned)
        self._limits[dtype] = unsigned, np.broadcast_to(top, self._shape).copy()
        return self._limits[dtype]

    def _check_box(self, action: np.ndarray) -> np.ndarray:
        if action.dtype != self._dtype:
            if action.dtype.kind != "f":
                raise TypeError(f"Envs.step: action has dtype {action.dtype}, but expected floats")
            with np.errstate(over="ignore"):
                action = action.astype(self._dtype)
        # Comparisons with NaN are false, so this line also finds what is not finite.
        inside = (action >= self._low) & (action <= self._high)
        if np.count_nonzero(inside) == inside.size:
            return action
        if not np.isfinite(action).all():
            n = int(np.argwhere(~np.isfinite(action))[0, 0])
            raise ValueError(f"Envs.step: action of environment {n} is {action[n]}, but expected finite ones")
        slack = ROUNDING * np.maximum(
            np.maximum(np.abs(self._low), np.abs(self._high)), 1.0, dtype=np.float64
        )
        near = (action >= self._low - slack) & (action <= self._high + slack)
        if not near.all():
            n = int(np.argwhere(~near)[0, 0])
            raise ValueError(
                f"Envs.step: action of environment {n} is {action[n]}, but expected values between "
                f"{self._low[n]} and {self._high[n]} (clip the action before stepping)"
            )
        return np.asarray(np.clip(action, self._low, self._high))
