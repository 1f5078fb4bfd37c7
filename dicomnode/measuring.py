"""How a model changed a volume, measured slice by slice: the numbers that QA holds to limits."""

import math

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.planes import Plane
from dicomnode.imaging.units import Unit

_BODY_HU = -500.0
_SHARE = 1e-3
"""Of the voxels, that may change by more than the 99.9th percentile."""


class Change:
    """Differences of the body, that is of voxels which are patient rather than air or padding."""

    def __init__(self, unit: Unit, voxels: int, ends: tuple[float, float]) -> None:
        """
        Args:
            unit: of the source; of the result where a difference shall mean anything.
            voxels: of the whole volume, at most.
            ends: of the window that results are clipped to.
        """
        self._body_above = _BODY_HU if unit == "HU" else 0.0
        self._ends = ends
        self._largest = _Largest(int(voxels * _SHARE) + 3)
        self._voxels = self._clipped = 0
        self._sum = self._absolute = 0.0
        self._finite = True

    def add(self, source: Plane, padding: NDArray[np.bool_] | None, result: Plane) -> None:
        """One slice and what became of it; slices come in order."""
        body = source > self._body_above
        if padding is not None:
            body &= ~padding
        made = result[body]
        change = made - source[body]
        low, high = self._ends
        self._finite = self._finite and bool(np.isfinite(result).all())
        self._voxels += made.size
        self._clipped += int(np.count_nonzero((made <= low) | (made >= high)))
        self._sum += float(change.sum(dtype=np.float64))
        np.abs(change, out=change)
        self._absolute += float(change.sum(dtype=np.float64))
        self._largest.add(change)

    def measured(self) -> dict[str, float]:
        """By name: ``finite`` (1 or 0), and what `qa.MEASURED` names; 0 where there is no body."""
        count = max(self._voxels, 1)
        return {
            "finite": float(self._finite),
            "mean_change": abs(self._sum) / count,
            "mean_abs_change": self._absolute / count,
            "abs_change_p999": self._largest.quantile(1 - _SHARE),
            "clipped_fraction": self._clipped / count,
        }


class _Largest:
    """The largest of many numbers that are given bit by bit, and how many there were."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._kept = np.empty(0, np.float32)
        self._floor = -np.inf

    def add(self, values: NDArray[np.float32]) -> None:
        self._count += values.size
        beyond = values[~(values < self._floor)]  # NaN too, which is the largest of all
        self._kept = np.concatenate([self._kept, beyond])
        if self._kept.size > 2 * self._most:
            self._kept = np.partition(self._kept, -self._most)[-self._most :]
            self._floor = float(self._kept[0])

    def quantile(self, q: float) -> float:
        """Linear between neighbours, as `numpy.quantile`; `q` so high that `most` reaches it."""
        if self._count == 0:
            return 0.0
        ordered = np.sort(self._kept)
        if np.isnan(ordered[-1]):
            return math.nan
        place = (self._count - 1) * q
        below = math.floor(place)
        first, second = (
            float(ordered[min(i, self._count - 1) - self._count]) for i in (below, below + 1)
        )
        return first + (second - first) * (place - below)
