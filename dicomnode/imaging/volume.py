"""Instances of a series, in any order, as one calibrated volume in patient coordinates.

Which slice lies where is told by ImagePositionPatient and ImageOrientationPatient alone, never by
InstanceNumber, SliceLocation or the order of arrival (PS3.3 C.7.6.2.1.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.imaging.decoding import Decoding
from dicomnode.imaging.frames import Ignored
from dicomnode.imaging.layout import check_count, frame_of_reference, layout_of
from dicomnode.imaging.positions import SHEARED_DEGREES, tilt_degrees
from dicomnode.imaging.units import Unit

__all__ = ["Unit", "Volume", "volume_from_datasets"]


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """Voxels in a physical unit, slice by slice in patient coordinates.

    Slices are parallel, but may be sheared (gantry tilt) or unevenly spaced: `positions` is the
    truth, `spacing_mm` its summary.

    Attributes:
        voxels: (slices, rows, columns), float32, in `unit`.
        unit: HU, BQML (Bq/ml), SUV (g/ml) or AU (MR, no physical unit).
        positions: (slices, 3), float64, ImagePositionPatient in LPS mm, in slice order.
        orientation: (6,), float64, ImageOrientationPatient: row, then column direction.
        spacing_mm: median step along the normal, then between rows, then between columns.
        frame_of_reference_uid: empty if the slices have none in common.
        padding: (slices, rows, columns), bool: True where the source holds its PixelPaddingValue;
            None if it has no such voxel.
        digests: per slice the sha256 (hex) of the decoded stored values; empty if the volume was
            not made from instances.
        left_out: slices at an end of the stack which cannot be decoded.
    """

    voxels: NDArray[np.float32]
    unit: Unit
    positions: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]
    frame_of_reference_uid: str
    padding: NDArray[np.bool_] | None
    digests: tuple[str, ...] = ()
    left_out: tuple[Ignored, ...] = ()

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or self.positions.shape != (self.voxels.shape[0], 3):
            raise ValueError(f"voxels {self.voxels.shape}, positions {self.positions.shape}")
        if self.padding is not None and self.padding.shape != self.voxels.shape:
            raise ValueError(f"voxels {self.voxels.shape}, padding {self.padding.shape}")

    def with_voxels(self, voxels: NDArray[np.float32], unit: Unit) -> "Volume":
        """New values, (slices, rows, columns), float32, in `unit`, on the same grid."""
        if voxels.shape != self.voxels.shape:
            raise ValueError(f"voxels {voxels.shape} on a grid of {self.voxels.shape}")
        return replace(self, voxels=voxels, unit=unit, digests=())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        slices, rows, columns = self.voxels.shape
        return slices, rows, columns

    def plane(self, index: int) -> NDArray[np.float32]:
        """One slice, (rows, columns), float32, in `unit`."""
        plane: NDArray[np.float32] = self.voxels[index]
        return plane

    def padding_of(self, index: int) -> NDArray[np.bool_] | None:
        """Where one slice is padding, (rows, columns), bool; None: nowhere."""
        return None if self.padding is None else self.padding[index]

    def extremes(self) -> tuple[float, float] | None:
        """Smallest and largest value, padding aside; None: all is padding."""
        native = self.voxels if self.padding is None else self.voxels[~self.padding]
        return (float(native.min()), float(native.max())) if native.size else None

    @property
    def tilt_degrees(self) -> float:
        """Between the axis of the stack and the slice normal; 0 for a single slice."""
        return tilt_degrees(self.positions, self.orientation)

    @property
    def sheared(self) -> bool:
        """Whether slices are offset against each other in plane: fine for 2D, not for 3D models."""
        return self.tilt_degrees > SHEARED_DEGREES


def volume_from_datasets(
    datasets: Sequence[Dataset],
    unit: Unit = "HU",
    *,
    min_slices: int = 2,
    allow_lossy: bool = False,
) -> tuple[Volume, list[Dataset]]:
    """Stack the slices of instances, in any order, into one calibrated volume.

    Slice 0 has the smallest projection on the normal (row x column). Instances which are no image,
    localizers, and repeats of a SOP instance are set aside; what is returned is what was used. A
    slice that cannot be decoded is left out at an end of the stack and refuses it anywhere else.
    A series of several stacks is to be taken apart first, see `stacks.split_stacks`.

    Args:
        unit: what the voxels shall be: HU (CT), BQML or SUV (PET) or AU (MR).
        min_slices: fewer are refused.
        allow_lossy: accept what lossy compression has left (PS3.3 C.7.6.1.1.5).

    Returns:
        The volume, and the slices it was made of in slice order: datasets as given, or for frames
        of an enhanced instance their headers (see `frames.frames_of`).

    Raises:
        SeriesRefused: nothing is a slice (NOT_AN_IMAGE, NOT_CT_MR_PET, NOT_SINGLE_FRAME, LOCALIZER,
            MOSAIC, NOT_CT, NOT_PET, NOT_MR); too few are (SINGLE_SLICE, TOO_FEW_SLICES); one is
            not usable (NO_MATRIX, TOO_LARGE, COLOUR, NOT_16_BIT, NOT_HU, NO_RESCALE, BURNED_IN,
            MULTI_ENERGY, LOSSY, UNDECODABLE, NO_GEOMETRY); they are no stack (MIXED_PATIENT,
            MIXED_SERIES, MIXED_FRAME, MIXED_ORIENTATION, MIXED_MATRIX, DUPLICATE_POSITIONS,
            MISSING_SLICES); or cannot be had in the unit (see `units.calibrate`).
    """
    layout = layout_of(datasets, unit, min_slices=min_slices, allow_lossy=allow_lossy)
    decoding = Decoding(layout.datasets, layout.calibration, lambda dataset: dataset)
    voxels = np.zeros(layout.shape, np.float32)
    padding: NDArray[np.bool_] | None = None
    digests = [""] * len(voxels)
    for index in range(len(voxels)):
        if not decoding.decode(index):
            continue
        decoded = decoding.forget(index)
        voxels[index], digests[index], mask = decoded.plane(), decoded.digest, decoded.padding()
        if mask is not None:
            padding = np.zeros(layout.shape, np.bool_) if padding is None else padding
            padding[index] = mask
    where = decoding.kept()
    kept = slice(where.start, where.stop)
    ordered = layout.datasets[kept]
    check_count(len(ordered), min_slices)
    volume = Volume(
        voxels[kept],
        unit,
        layout.positions[kept],
        layout.orientation,
        layout.spacing_mm,
        frame_of_reference(ordered),
        None if padding is None else padding[kept],
        tuple(digests[kept]),
        decoding.left_out(),
    )
    return volume, ordered
