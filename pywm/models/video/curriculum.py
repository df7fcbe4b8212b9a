"""How far ahead a model learns to predict, in phases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from pywm.types import State

__all__ = ["Curriculum", "Phase"]


class Phase(NamedTuple):
    """A part of a :class:`Curriculum`.

    Attributes:
        horizon: K, how many steps are predicted from the model's own outputs.
        lr: learning rate.
        batch_size: windows of an update.
        updates: how many updates the phase takes, or takes at most.
    """

    horizon: int
    lr: float
    batch_size: int
    updates: int


class Curriculum:
    """Phases with growing horizons, one after the other.

    ::

        curriculum = Curriculum([(1, 1e-4, 32, 1_500_000), (3, 1e-5, 8, 1_000_000), (5, 1e-5, 8, 1_000_000)])
        while not curriculum.finished:
            K, lr, batch_size, _ = curriculum.phase
            ...
            curriculum.step(loss)

    Args:
        phases: in their order; tuples are taken, too.
        advance: ``"updates"`` goes on when a phase's updates are done; ``"plateau"`` also when the loss no longer
            falls: its mean over ``window`` updates was not below ``1 - tolerance`` times the best one before,
            ``patience`` times in a row.
        window, patience, tolerance: of the plateau.

    Attributes:
        phases: all of them.
        index: which one is running; ``len(phases)`` at the end.
        updates: of the running phase so far.

    Raises:
        ValueError: there is no phase, or a number is out of range.

    Source:
        Oh et al. (2015), 4.1: K = 1, 3 and 5.
    """

    def __init__(
        self,
        phases: Iterable[Sequence[float]],
        *,
        advance: Literal["updates", "plateau"] = "updates",
        window: int = 100,
        patience: int = 3,
        tolerance: float = 0.01,
    ) -> None:
        self.phases = tuple(_phase(i, numbers) for i, numbers in enumerate(phases))
        if not self.phases:
            raise ValueError("Curriculum: phases is empty, but expected at least one")
        if advance not in ("updates", "plateau"):
            raise ValueError(f"Curriculum: advance is {advance!r}, but expected 'updates' or 'plateau'")
        for name, count in (("window", window), ("patience", patience)):
            if count < 1:
                raise ValueError(f"Curriculum: {name} is {count}, but expected 1 or more")
        if not 0 <= tolerance < 1:
            raise ValueError(f"Curriculum: tolerance is {tolerance}, but expected a number in [0, 1)")
        self._by_plateau = advance == "plateau"
        self._window, self._patience, self._tolerance = window, patience, tolerance
        self.index = 0
        self._begin()

    @classmethod
    def doubling(cls, horizon: int, lr: float, batch_size: int, updates: int) -> Curriculum:
        """Double K from phase to phase, 1, 2, 4, ... up to ``horizon``, each with the same settings."""
        if horizon < 1:
            raise ValueError(f"Curriculum.doubling: horizon is {horizon}, but expected 1 or more")
        horizons = [2**i for i in range(horizon.bit_length()) if 2**i < horizon]
        return cls([(K, lr, batch_size, updates) for K in (*horizons, horizon)])

    def _begin(self) -> None:
        self.updates = 0
        self._best = math.inf
        self._waited = 0
        self._sum = 0.0

    @property
    def finished(self) -> bool:
        """Whether all phases are done."""
        return self.index == len(self.phases)

    @property
    def phase(self) -> Phase:
        """The running phase, or the last one at the end."""
        return self.phases[min(self.index, len(self.phases) - 1)]

    @property
    def total(self) -> int:
        """The most updates that all phases take together."""
        return sum(phase.updates for phase in self.phases)

    @property
    def most_left(self) -> int:
        """The most updates that are still to come."""
        return sum(phase.updates for phase in self.phases[self.index :]) - self.updates

    def step(self, loss: float) -> bool:
        """Count an update, and go on to the next phase where this one is done.

        Args:
            loss: of the update.

        Returns:
            Whether a phase ended.
        """
        assert not self.finished
        self.updates += 1
        self._sum += loss
        if self._by_plateau and self.updates % self._window == 0:
            mean, self._sum = self._sum / self._window, 0.0
            improved = mean < (1 - self._tolerance) * self._best
            self._waited = 0 if improved else self._waited + 1
            self._best = min(self._best, mean)
        if self.updates < self.phase.updates and self._waited < self._patience:
            return False
        self.index += 1
        self._begin()
        return True

    def state(self) -> State:
        """Return where it stands."""
        best = None if math.isinf(self._best) else self._best
        data = {"index": self.index, "updates": self.updates, "sum": self._sum, "best": best}
        return State({}, {**data, "waited": self._waited})

    def load_state(self, state: State) -> None:
        """Continue from a state of ``state``.

        Raises:
            ValueError: it lies beyond the phases.
        """
        data = state.data
        index, updates = int(data["index"]), int(data["updates"])
        inside = 0 <= index < len(self.phases) and 0 <= updates < self.phases[index].updates
        if not inside and (index, updates) != (len(self.phases), 0):
            raise ValueError(
                f"Curriculum.load_state: index is {index} and updates is {updates}, but expected a place in "
                f"{len(self.phases)} phases"
            )
        self.index, self.updates = index, updates
        self._sum, self._waited = float(data["sum"]), int(data["waited"])
        self._best = math.inf if data["best"] is None else float(data["best"])


def _phase(i: int, numbers: Sequence[float]) -> Phase:
    if len(numbers) != len(Phase._fields):
        raise ValueError(
            f"Curriculum: phases[{i}] is {tuple(numbers)}, but expected (horizon, lr, batch_size, updates)"
        )
    horizon, lr, batch_size, updates = numbers
    for name, count in (("horizon", horizon), ("batch_size", batch_size), ("updates", updates)):
        if count != int(count) or count < 1:
            raise ValueError(
                f"Curriculum: {name} of phases[{i}] is {count}, but expected a whole number from 1 on"
            )
    if not 0 < lr < math.inf:
        raise ValueError(f"Curriculum: lr of phases[{i}] is {lr}, but expected a positive number")
    return Phase(int(horizon), float(lr), int(batch_size), int(updates))
