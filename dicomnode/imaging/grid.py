"""From the grid of a source to the grid a model was trained on, and back; never silently."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.layout import Layout
from dicomnode.imaging.manifest import Manifest
from dicomnode.imaging.planes import Planes

Voxels = NDArray[np.float32]
SAME_MM = 0.01
"""Fields of view that differ by less are the same: DICOM writes spacings with few digits."""


@dataclass(frozen=True, slots=True)
class Regrid:
    """Both ways between a source's slices and square slices of the trained matrix.

    Both grids have the same centre. Interpolation is linear, over the area of a target pixel where
    that is the larger one.
    """

    rows: int
    columns: int
    spacing_mm: tuple[float, float]
    """Between rows, then between columns of the source."""
    matrix: int
    trained_spacing_mm: float

    def there(self, voxels: Voxels) -> Voxels:
        """(slices, rows, columns) of the source -> (slices, matrix, matrix), same unit.

        Around the source lies its lowest value, as air does.
        """
        lowest = float(voxels.min())
        return np.stack([self.plane_there(plane, lowest) for plane in voxels])

    def back(self, voxels: Voxels) -> Voxels:
        """(slices, matrix, matrix) -> (slices, rows, columns) of the source, same unit."""
        lowest = float(voxels.min())
        return np.stack([self.plane_back(plane, lowest) for plane in voxels])

    def plane_there(self, plane: Voxels, around: float) -> Voxels:
        """(rows, columns) of the source -> (matrix, matrix); `around`: lowest of the volume."""
        trained, (row, column) = self.trained_spacing_mm, self.spacing_mm
        down = _weights(self.matrix, self.rows, trained, row)
        right = _weights(self.matrix, self.columns, trained, column)
        return _apply(plane, down, right, around)

    def plane_back(self, plane: Voxels, around: float) -> Voxels:
        """(matrix, matrix) -> (rows, columns) of the source; `around`: lowest of the volume."""
        trained, (row, column) = self.trained_spacing_mm, self.spacing_mm
        down = _weights(self.rows, self.matrix, row, trained)
        right = _weights(self.columns, self.matrix, column, trained)
        return _apply(plane, down, right, around)

    def run(self, voxels: Voxels, predict: Callable[[Voxels], Voxels], *, residual: bool) -> Voxels:
        """`predict` on the trained grid, its result on the source's grid.

        With `residual` only the difference that the model makes is interpolated back, so that the
        detail of the source is kept.
        """
        source = self.there(voxels)
        prediction = predict(source)
        if residual:
            return voxels + self.back(prediction - source)
        return self.back(prediction)

    def __str__(self) -> str:
        source = f"{self.rows} x {self.columns} of {self.spacing_mm[0]:g} x {self.spacing_mm[1]:g}"
        return (
            f"resampled from {source} mm to {self.matrix} x {self.matrix} of"
            f" {self.trained_spacing_mm:g} mm and back"
        )


def regrid_for(source: Planes | Layout, manifest: Manifest) -> Regrid | None:
    """How `source` comes to the trained grid; None: it is on it, or the model takes any.

    Raises:
        PackageError: the model takes its own grid alone, or the field of view is too large for
            it: the patient would be cut off.
    """
    if manifest.grid == "any":
        return None
    spec = manifest.input
    _, rows, columns = source.shape
    _, row_mm, column_mm = source.spacing_mm
    low, high = spec.field_of_view_mm.min or 0.0, spec.field_of_view_mm.max or 0.0
    sides = (rows * row_mm, columns * column_mm)
    in_range = low - SAME_MM <= min(sides) and max(sides) <= high + SAME_MM
    if in_range and rows in spec.matrix and columns in spec.matrix:
        return None
    words = f"{rows} x {columns} pixels, {sides[0]:.1f} x {sides[1]:.1f} mm"
    wanted = f"{spec.matrix.min:g} to {spec.matrix.max:g} pixels, {low:g} to {high:g} mm a side"
    if manifest.grid == "exact":
        raise PackageError(f"the model takes slices of {wanted}; got {words}")
    if max(sides) > high + SAME_MM:
        raise PackageError(f"the model takes at most {high:g} mm of field of view; got {words}")
    side, matrix = max(low, *sides), spec.trained_matrix()
    return Regrid(rows, columns, (row_mm, column_mm), matrix, side / matrix)


@functools.lru_cache(maxsize=8)
def _weights(targets: int, sources: int, target_mm: float, source_mm: float) -> NDArray[np.float64]:
    """(targets, sources): each target pixel as a weighted mean of source pixels; 0 beyond them."""
    centre = (np.arange(targets) - (targets - 1) / 2) * target_mm
    place = centre / source_mm + (sources - 1) / 2
    width = max(1.0, target_mm / source_mm)
    weights = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(sources)) / width)
    weights[(place < -0.5) | (place > sources - 0.5)] = 0.0
    total = weights.sum(1, keepdims=True)
    result: NDArray[np.float64] = np.divide(weights, total, out=weights, where=total > 0)
    result.flags.writeable = False  # it is kept
    return result


def _apply(
    plane: Voxels, down: NDArray[np.float64], right: NDArray[np.float64], outside: float
) -> Voxels:
    result: NDArray[np.float64] = down @ (plane.astype(np.float64) - outside) @ right.T + outside
    return result.astype(np.float32)
