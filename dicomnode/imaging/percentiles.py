"""MR values <-> [-1, 1] by percentiles of the patient in the whole volume, never of one slice.

MR has no physical unit: the same tissue has other values in every scan. Two percentiles of the
foreground become -1 and 1, so that the same network sees the same tissue alike.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.errors import PackageError, SeriesRefused
from dicomnode.imaging.intensity import Intensity, Window

_BINS = 256
_OUTLIERS = 99.9  # percentile above which a value does not stretch the histogram


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

    def window_of(
        self, voxels: NDArray[np.float32], padding: NDArray[np.bool_] | None = None
    ) -> Window:
        """The window of one volume; its `to_network` and `from_network` are each other's inverse.

        Args:
            voxels: (slices, rows, columns), float32, AU: the whole volume.
            padding: (slices, rows, columns), bool: True where there is no image; None: nowhere.

        Raises:
            SeriesRefused: NO_CONTRAST, all of the foreground has one value.
        """
        inside = foreground(voxels, padding)
        low, high = np.percentile(voxels[inside], (self.low, self.high)) if inside.any() else (0, 0)
        if not low < high:
            raise SeriesRefused("NO_CONTRAST", "the volume has no foreground", "send an image")
        return Window(float(low), float(high))


def intensity_of(
    intensity: Intensity | Percentiles,
    voxels: NDArray[np.float32],
    padding: NDArray[np.bool_] | None = None,
) -> Intensity:
    """How one volume is mapped: percentiles become the window of its own foreground.

    Args:
        voxels, padding: as in `Percentiles.window_of`.

    Raises:
        SeriesRefused: NO_CONTRAST.
    """
    if isinstance(intensity, Percentiles):
        return intensity.window_of(voxels, padding)
    return intensity


def foreground(
    voxels: NDArray[np.float32], padding: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Where the patient is: (slices, rows, columns), bool; all False in an empty volume.

    Args:
        voxels: (slices, rows, columns), float32, AU.
        padding: same shape, bool: True where there is no image; None: nowhere.
    """
    image = np.ones(voxels.shape, dtype=np.bool_) if padding is None else ~padding
    if not image.any():
        return image
    bright = (voxels > otsu_threshold(voxels[image])) & image
    parts, count = ndimage.label(bright)
    if count == 0:
        return bright
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest = parts == int(sizes.argmax())
    filled = np.stack([ndimage.binary_fill_holes(plane) for plane in largest])
    result: NDArray[np.bool_] = filled & image
    return result


def otsu_threshold(values: NDArray[np.float32]) -> float:
    """The value that best parts dark from bright (Otsu 1979).

    Args:
        values: (n,), float32; a few extreme values do not change the result.
    """
    top = float(np.percentile(values, _OUTLIERS))
    counts, edges = np.histogram(np.minimum(values, top), bins=_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    total = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = total[:-1] / below - (total[-1] - total[:-1]) / above
        between = np.nan_to_num(below * above * apart**2)
    best = np.flatnonzero(between == between.max())  # a plateau where no value lies
    return float((edges[best[0] + 1] + edges[best[-1] + 1]) / 2)
