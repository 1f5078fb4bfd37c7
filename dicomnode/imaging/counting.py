"""Many values as how often each of them occurs: exact percentiles without keeping them all."""

import math

import numpy as np
from numpy.typing import NDArray

_MOST_PENDING = 1 << 22
"""Values, distinct within their slice, that wait to be counted together with the others."""


class Distribution:
    """Values that are given bit by bit, kept as distinct ones with their counts.

    An image of 16 bits has at most 65,536 distinct values, however many slices it has.
    """

    def __init__(self) -> None:
        self._values = np.empty(0, np.float32)
        self._numbers = np.empty(0, np.int64)
        self._pending: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
        self._waiting = 0
        self.count = 0
        """How many values were given."""

    def add(self, values: NDArray[np.float32]) -> None:
        """Values of any shape, float32, finite."""
        found, numbers = np.unique(values, return_counts=True)
        self._pending.append((found, numbers.astype(np.int64)))
        self._waiting += found.size
        self.count += values.size
        if self._waiting > _MOST_PENDING:
            self._settle()

    def counted(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Every distinct value, (n,), float32, ascending; how often it occurs, (n,), int64."""
        self._settle()
        return self._values, self._numbers

    def percentile(self, percent: float) -> float:
        """To the bit what `numpy.percentile` gives for one percentage of all values."""
        return float(self._at(percent / 100, 1.0))

    def percentiles(self, low: float, high: float) -> tuple[float, float]:
        """To the bit what `numpy.percentile` gives for two percentages of all values.

        It interpolates between two values in float64 then, in float32 for a single percentage.
        """
        one = np.float64(1.0)
        return float(self._at(low / 100, one)), float(self._at(high / 100, one))

    def _at(self, share: float, one: float) -> np.floating:
        """Linear between neighbours (Hyndman and Fan's method 7); `one` says in which format."""
        place = (self.count - 1) * share
        below = math.floor(place)
        previous, following = self._ordered(below), self._ordered(min(below + 1, self.count - 1))
        apart, gamma = following - previous, one * (place - below)
        return following - apart * (one - gamma) if gamma >= 0.5 else previous + apart * gamma

    def _ordered(self, place: int) -> np.float32:
        """The value at a place of all values in ascending order."""
        values, numbers = self.counted()
        found: np.float32 = values[np.searchsorted(np.cumsum(numbers), place, side="right")]
        return found

    def _settle(self) -> None:
        if not self._pending:
            return
        values = np.concatenate([self._values, *(found for found, _ in self._pending)])
        numbers = np.concatenate([self._numbers, *(many for _, many in self._pending)])
        self._pending, self._waiting = [], 0
        order = np.argsort(values, kind="stable")
        values, numbers = values[order], numbers[order]
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
        self._values = values[starts]
        self._numbers = np.add.reduceat(numbers, starts) if len(starts) else numbers
