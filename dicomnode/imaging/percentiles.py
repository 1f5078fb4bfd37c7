"""MR values <-> [-1, 1] by percentiles of the patient in the whole volume, never of one slice.

MR has no physical unit: the same tissue has other values in every scan. Two percentiles of the
foreground become -1 and 1, so that the same network sees the same tissue alike. A volume is looked
at slice by slice, more than once, and never held as a whole.
"""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.errors import PackageError, SeriesRefused
from dicomnode.imaging.counting import Distribution
from dicomnode.imaging.intensity import Intensity, Window

_BINS = 256
_OUTLIERS = 99.9  # percentile above which a value does not stretch the histogram

Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Slices(Protocol):
    """A volume whose slices may be asked for one by one; `planes.Planes` are."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    def plane(self, index: int) -> Plane:
        """(rows, columns), float32."""

    def padding_of(self, index: int) -> Mask | None:
        """(rows, columns), bool: True where there is no image; None: nowhere."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A volume in memory, as slices.

    Attributes:
        voxels: (slices, rows, columns), float32, AU.
        padding: (slices, rows, columns), bool: True where there is no image; None: nowhere.
    """

    voxels: NDArray[np.float32]
    padding: NDArray[np.bool_] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        slices, rows, columns = self.voxels.shape
        return slices, rows, columns

    def plane(self, index: int) -> Plane:
        plane: Plane = self.voxels[index]
        return plane

    def padding_of(self, index: int) -> Mask | None:
        return None if self.padding is None else self.padding[index]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A window made for each volume from two percentiles of its foreground, declared as data.

    Foreground: above Otsu's threshold, the largest connected part, holes of each slice filled.
    """

    low: float = 0.5
    high: float = 99.5
    kind: Literal["percentiles"] = "percentiles"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise PackageError(
                f"intensity: percentiles {self.low} and {self.high}; give 0 <= low < high <= 100"
            )

    def window_of(self, volume: Slices) -> Window:
        """The window of one volume; its `to_network` and `from_network` are each other's inverse.

        Raises:
            SeriesRefused: NO_CONTRAST, all of the foreground has one value.
        """
        inside = Distribution()
        for index, mask in enumerate(foreground_slices(volume)):
            inside.add(volume.plane(index)[mask])
        low, high = inside.percentiles(self.low, self.high) if inside.count else (0.0, 0.0)
        if not low < high:
            raise SeriesRefused("NO_CONTRAST", "the volume has no foreground", "send an image")
        return Window(low, high)


def intensity_of(intensity: Intensity | Percentiles, volume: Slices) -> Intensity:
    """How one volume is mapped: percentiles become the window of its own foreground.

    Raises:
        SeriesRefused: NO_CONTRAST.
    """
    return intensity.window_of(volume) if isinstance(intensity, Percentiles) else intensity


def foreground(
    voxels: NDArray[np.float32], padding: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Where the patient is: (slices, rows, columns), bool; all False in an empty volume.

    Args:
        voxels, padding: as in `Whole`.
    """
    return np.stack(list(foreground_slices(Whole(voxels, padding))))


def foreground_slices(volume: Slices) -> Iterator[Mask]:
    """Where the patient is: of each slice (rows, columns), bool; nowhere in an empty volume."""
    images = Distribution()
    for index in range(volume.shape[0]):
        padding, plane = volume.padding_of(index), volume.plane(index)
        images.add(plane if padding is None else plane[~padding])
    threshold = _otsu(images) if images.count else math.inf
    parts = _Parts()
    for index in range(volume.shape[0]):
        parts.add(_bright(volume, index, threshold))
    for index, part in enumerate(parts.largest()):
        bright, padding = _bright(volume, index, threshold), volume.padding_of(index)
        labels, _ = ndimage.label(bright)
        filled: Mask = ndimage.binary_fill_holes(np.isin(labels, part))
        yield filled if padding is None else filled & ~padding


def _bright(volume: Slices, index: int, threshold: float) -> Mask:
    bright: Mask = volume.plane(index) > threshold
    padding = volume.padding_of(index)
    return bright if padding is None else bright & ~padding


class _Parts:
    """Connected parts of a volume (by faces), of which only one slice is looked at at a time."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        """Of each slice: the number of its first part."""
        self._joined, self._sizes = array("i", [0]), array("q", [0])  # 0: what is not bright
        self._before: NDArray[np.int64] | None = None

    def add(self, bright: Mask) -> None:
        """The next slice."""
        labels, count = ndimage.label(bright)
        first = len(self._joined)
        self._firsts.append(first)
        self._joined.extend(range(first, first + count))
        self._sizes.extend(np.bincount(labels.ravel(), minlength=count + 1)[1:].tolist())
        here = np.where(bright, labels.astype(np.int64) + (first - 1), 0)
        if self._before is not None:
            both, parts = bright & (self._before > 0), len(self._joined)
            for pair in np.unique(self._before[both] * parts + here[both]).tolist():
                self._join(*divmod(pair, parts))
        self._before = here

    def _root(self, part: int) -> int:
        while self._joined[part] != part:
            self._joined[part] = self._joined[self._joined[part]]
            part = self._joined[part]
        return part

    def _join(self, one: int, other: int) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        if low != high:  # the number of a part is that of where it begins
            self._joined[high] = low
            self._sizes[low] += self._sizes[high]
            self._sizes[high] = 0

    def largest(self) -> Iterator[list[int]]:
        """Of each slice the labels that belong to the largest part; the first of equal ones."""
        root = int(np.argmax(self._sizes))
        ends = [*self._firsts[1:], len(self._joined)]
        for first, end in zip(self._firsts, ends, strict=True):
            mine = range(first, end) if root else ()
            yield [part - first + 1 for part in mine if self._root(part) == root]


def otsu_threshold(values: NDArray[np.float32]) -> float:
    """The value that best parts dark from bright (Otsu 1979).

    Args:
        values: (n,), float32; a few extreme values do not change the result.
    """
    given = Distribution()
    given.add(values)
    return _otsu(given)


def _otsu(given: Distribution) -> float:
    top = given.percentile(_OUTLIERS)
    values, numbers = given.counted()
    clipped = np.minimum(values, np.float32(top))
    counts, edges = np.histogram(clipped, bins=_BINS, weights=numbers)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    total = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = total[:-1] / below - (total[-1] - total[:-1]) / above
        between = np.nan_to_num(below * above * apart**2)
    best = np.flatnonzero(between == between.max())  # a plateau where no value lies
    return float((edges[best[0] + 1] + edges[best[-1] + 1]) / 2)
