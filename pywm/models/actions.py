"""How an environment's actions look to a world model, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional

from pywm.envs.spaces import ROUNDING
from pywm.errors import UserError

__all__ = ["ActionSpace"]


class ActionSpace:
    """How an environment's actions look to the model: one-hots side by side, or numbers in [-1, 1].

    Args:
        space: of a single environment.

    Attributes:
        space: the same.
        kind: ``"categorical"`` or ``"normal"``.
        classes: of each choice of a categorical action.
        width: A.

    Raises:
        UserError: the space is not Discrete, MultiDiscrete, MultiBinary or Box.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space
        self._shape: tuple[int, ...] = space.shape or ()
        self.classes: tuple[int, ...] = ()
        if isinstance(space, spaces.Box):
            self.kind, self.width = "normal", math.prod(self._shape)
            low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
            bounded = np.isfinite(low) & np.isfinite(high)
            # A dimension without bounds takes the numbers as they are.
            self._low = np.where(bounded, low, -1.0)
            self._high = np.where(bounded, high, 1.0)
            self._bounded, self._dtype = bounded, space.dtype
            self._least, self._most = low, high
            return
        self.kind = "categorical"
        start: Any = 0
        if isinstance(space, spaces.Discrete):
            self.classes, start = (int(space.n),), space.start
        elif isinstance(space, spaces.MultiDiscrete):
            self.classes, start = tuple(int(n) for n in space.nvec.ravel()), space.start
        elif isinstance(space, spaces.MultiBinary):
            self.classes = (2,) * math.prod(self._shape)
        else:
            raise UserError(
                f"ActionSpace: space is {space}, but Discrete, MultiDiscrete, MultiBinary or Box was expected"
            )
        self._start = np.broadcast_to(np.asarray(start, np.int64), self._shape).ravel()
        self.width = sum(self.classes)

    def __str__(self) -> str:
        """Say what a policy's head is like."""
        if self.kind == "categorical":
            if len(self.classes) == 1:
                return f"categorical of {self.classes[0]}"
            return f"{len(self.classes)} categoricals of {', '.join(map(str, self.classes))}"
        text = f"normal of dimension {self.width}"
        if self._bounded.all():
            return f"{text}, [-1, 1] scaled to the bounds"
        if not self._bounded.any():
            return f"{text}, without bounds"
        return f"{text}, {int(self._bounded.sum())} of them with [-1, 1] scaled to the bounds"

    def to_env(self, action: Tensor) -> np.ndarray:
        """Turn the model's actions ``[N, A]`` into the environment's ``[N, ...]``."""
        if self.kind == "categorical":
            groups = [group.argmax(-1) for group in action.split(self.classes, -1)]
            index = torch.stack(groups, -1).cpu().numpy() + self._start
            return index.reshape(-1, *self._shape)
        x = action.cpu().numpy().astype(np.float64)
        scaled = self._low + (np.clip(x, -1, 1) + 1) * 0.5 * (self._high - self._low)
        array = np.where(self._bounded, np.clip(scaled, self._low, self._high), x)
        return array.astype(self._dtype).reshape(-1, *self._shape)

    def from_env(self, action: np.ndarray, function: str = "ActionSpace.from_env") -> Tensor:
        """Turn the environment's actions ``[N, ...]`` into the model's ``[N, A]``, float32 on the CPU.

        The inverse of :meth:`to_env`. Numbers may overstep their bounds by a rounding error, which is cut off.

        Args:
            action: in the space, N of them.
            function: what messages call the caller.

        Raises:
            TypeError: the dtype is of another kind.
            ValueError: the shape is another, or an action is not in the space.
        """
        array = np.asarray(action)
        kinds = "iuf" if self.kind == "normal" else "iub"
        if array.dtype.kind not in kinds:
            wanted = "numbers" if self.kind == "normal" else "integers"
            raise TypeError(f"{function}: action has dtype {array.dtype}, but {wanted} were expected")
        if array.ndim != len(self._shape) + 1 or array.shape[1:] != self._shape:
            wanted = ", ".join(["N", *map(str, self._shape)])
            raise ValueError(f"{function}: action has shape {array.shape}, but ({wanted}) was expected")
        rows = array.reshape(len(array), math.prod(self._shape))
        if self.kind == "categorical":
            index = rows.astype(np.int64) - self._start
            self._check(function, array, (index >= 0) & (index < np.array(self.classes)))
            columns = torch.from_numpy(index).unbind(-1)
            one_hots = [functional.one_hot(x, n) for x, n in zip(columns, self.classes, strict=True)]
            return torch.cat(one_hots, -1).float()
        rows = rows.astype(np.float64)
        least, most = self._least, self._most
        slack = ROUNDING * np.maximum(np.where(self._bounded, np.maximum(abs(least), abs(most)), 1.0), 1.0)
        inside = (rows >= least - slack) & (rows <= most + slack) & np.isfinite(rows)
        self._check(function, array, inside)
        width = self._high - self._low
        scaled = (rows - self._low) / np.where(width > 0, width, 1.0) * 2 - 1
        scaled = np.where(width > 0, scaled.clip(-1, 1), 0.0)
        return torch.from_numpy(np.where(self._bounded, scaled, rows.clip(least, most))).float()

    def _check(self, function: str, action: np.ndarray, inside: np.ndarray) -> None:
        if not inside.all():
            n = int(np.argmin(inside.all(-1)))
            which = "action" if len(action) == 1 else f"action {n} of {len(action)}"
            raise ValueError(
                f"{function}: {which} is {action[n]}, but an element of {self.space} was expected"
            )
