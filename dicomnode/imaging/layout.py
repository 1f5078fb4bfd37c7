"""The slices of one stack in order, and what they must satisfy, told by their headers alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.frames import TRANSLATABLE, slices_of, why_nothing
from dicomnode.imaging.limits import (
    LARGEST_SPACING_MM,
    check_image,
    check_one_patient,
    check_size,
)
from dicomnode.imaging.pixels import numbers_of, refused
from dicomnode.imaging.positions import (
    SAME_DIRECTION,
    Stack,
    refuse_gaps,
    stack_from_positions,
)
from dicomnode.imaging.units import MODALITY, Calibration, Unit, calibrate


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The slices of one stack in order and where they lie, told by their headers alone.

    Attributes:
        datasets: in slice order.
        min_slices: fewer are refused, also when some cannot be decoded.
        positions, orientation, spacing_mm: as of a `Volume`.
    """

    datasets: list[Dataset]
    unit: Unit
    calibration: Calibration
    min_slices: int
    positions: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        first = self.datasets[0]
        return len(self.datasets), int(first.Rows), int(first.Columns)


def layout_of(
    datasets: Sequence[Dataset],
    unit: Unit = "HU",
    *,
    min_slices: int = 2,
    allow_lossy: bool = False,
) -> Layout:
    """All that `volume_from_datasets` does before it decodes the first slice.

    Raises:
        SeriesRefused: as `volume_from_datasets`, for what headers tell.
    """
    images = _images(datasets, unit)
    check_count(len(images), min_slices)
    for image in images:
        check_image(image, allow_lossy)
    calibration = calibrate(images, unit)
    orientation, spacing = _common_geometry(images)
    positions = [numbers_of(image, "ImagePositionPatient", 3, "NO_GEOMETRY") for image in images]
    stack = stack_from_positions(positions, orientation)
    _check_stack(stack)
    return Layout(
        [images[index] for index in stack.order],
        unit,
        calibration,
        min_slices,
        np.asarray([positions[index] for index in stack.order], dtype=np.float64),
        np.asarray(orientation, dtype=np.float64),
        (stack.median_step_mm, *spacing),
    )


def check_headers(
    headers: Sequence[Dataset], unit: Unit, *, min_slices: int = 2, allow_lossy: bool = False
) -> None:
    """What `volume_from_datasets` refuses of one stack that headers alone tell, pixels absent.

    Raises:
        SeriesRefused: NOT_CT, NOT_MR, NOT_PET, SINGLE_SLICE, TOO_FEW_SLICES, NO_GEOMETRY, MIXED_*,
            and as `limits.check_size`, `limits.check_image` and `units.calibrate` do.
    """
    wanted = MODALITY[unit]
    if TRANSLATABLE[headers[0].SOPClassUID] != wanted:
        code = "NOT_PET" if wanted == "PT" else f"NOT_{wanted}"
        raise SeriesRefused(code, f"{len(headers)} slices are not {wanted}", "send slices")
    check_count(len(headers), min_slices)
    check_size(headers)
    for header in headers:
        check_image(header, allow_lossy)
    calibrate(headers, unit)
    _common_geometry(headers)


def check_count(count: int, min_slices: int) -> None:
    """Refuse a stack of too few slices.

    Raises:
        SeriesRefused: SINGLE_SLICE, TOO_FEW_SLICES.
    """
    if count < max(min_slices, 1):
        raise SeriesRefused(
            "SINGLE_SLICE" if count == 1 else "TOO_FEW_SLICES",
            f"{count} image(s), at least {min_slices} needed",
            "send the whole series",
        )


def _images(datasets: Sequence[Dataset], unit: Unit) -> list[Dataset]:
    """What may be a slice; the rest is set aside, or the reason for refusal if nothing is left."""
    slices, ignored = slices_of(datasets)
    wanted = MODALITY[unit]
    images = []
    reasons = [item.code for item in ignored]
    for header in slices:
        if TRANSLATABLE[header.SOPClassUID] != wanted:
            reasons.append("NOT_PET" if wanted == "PT" else f"NOT_{wanted}")
        elif "PixelData" not in header:
            reasons.append("NOT_AN_IMAGE")
        else:
            images.append(header)
    for item in ignored:  # frames that nobody can place: there may be a gap where they belong
        if item.code in ("NO_GEOMETRY", "UNDECODABLE"):
            raise SeriesRefused(item.code, item.reason, "send it again")
    if not images:
        raise SeriesRefused(
            why_nothing(reasons), f"none of {len(datasets)} instances is a slice", "send slices"
        )
    check_one_patient(images)
    check_size(images)
    return images


def _common_geometry(
    images: Sequence[Dataset],
) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Orientation and pixel spacing of the first slice, which all the others must share."""
    first = images[0]
    orientation = numbers_of(first, "ImageOrientationPatient", 6, "NO_GEOMETRY")
    spacing = numbers_of(first, "PixelSpacing", 2, "NO_GEOMETRY")
    axes = np.asarray(orientation).reshape(2, 3)
    sane = 0 < min(spacing) <= max(spacing) <= LARGEST_SPACING_MM
    if not sane or not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3):
        raise refused("NO_GEOMETRY", first, "spacing or orientation is no grid", "send it again")
    for image in images:
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
            if not image.get(keyword) or image[keyword].value != first.get(keyword):
                raise refused(
                    "MIXED_SERIES", image, f"{keyword} is missing or differs", "send one series"
                )
        directions = numbers_of(image, "ImageOrientationPatient", 6, "NO_GEOMETRY")
        if not np.allclose(directions, orientation, rtol=0, atol=SAME_DIRECTION):
            raise refused("MIXED_ORIENTATION", image, "another orientation", "split the series")
        if (image.Rows, image.Columns) != (first.Rows, first.Columns) or not np.allclose(
            numbers_of(image, "PixelSpacing", 2, "NO_GEOMETRY"), spacing, rtol=1e-4
        ):
            raise refused("MIXED_MATRIX", image, "another matrix or spacing", "split the series")
    return orientation, (spacing[0], spacing[1])


def frame_of_reference(images: Sequence[Dataset]) -> str:
    """The Frame of Reference UID that all slices share, empty if they have none in common.

    Some de-identifiers replace it anew in every slice; two frames in one series are refused.
    """
    uids = {str(image.get("FrameOfReferenceUID") or "") for image in images}
    instances = {str(image.SOPInstanceUID) for image in images}
    if len(uids) == 1:
        return uids.pop()
    if len(uids) == len(instances) and "" not in uids:
        return ""
    raise SeriesRefused(
        "MIXED_FRAME", f"{len(uids)} FrameOfReferenceUIDs in one series", "split the series"
    )


def _check_stack(stack: Stack) -> None:
    if stack.duplicates:
        raise SeriesRefused(
            "DUPLICATE_POSITIONS",
            f"{stack.duplicates} slice(s) lie where another one lies",
            "send each phase or reconstruction as its own series",
        )
    refusal = refuse_gaps(stack)
    if refusal is not None:
        raise refusal
