"""Instances of a series, in any order, as one calibrated volume in patient coordinates.

Which slice lies where is told by ImagePositionPatient and ImageOrientationPatient alone, never by
InstanceNumber, SliceLocation or the order of arrival (PS3.3 C.7.6.2.1.1).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.frames import TRANSLATABLE, Ignored, frame_number, slices_of
from dicomnode.imaging.limits import LARGEST_SPACING_MM, check_one_patient, check_size
from dicomnode.imaging.pixels import (
    encoding_of,
    has_decoder,
    is_lossy,
    numbers_of,
    pixel_digest,
    refused,
    stored_values,
)
from dicomnode.imaging.units import MODALITY, Calibration, Unit, calibrate, encoding_in_unit

__all__ = ["Stack", "Unit", "Volume", "stack_from_positions", "volume_from_datasets"]

GAP_TOLERANCE = 0.1
"""How far a step may be from a whole multiple of the median step and still be a gap, in steps."""
SAME_POSITION_MM = 0.01
"""Slices closer than this along the normal lie at the same position."""
SAME_DIRECTION = 1e-4
"""Largest difference of a direction cosine within one stack: 0.05 mm at 500 mm."""
MOST_LEFT_OUT = 3
"""With more slices than this that cannot be decoded a stack is refused: a try can take seconds."""
SHEARED_DEGREES = 0.1
"""A stack whose axis is farther than this from the slice normal is sheared (gantry tilt)."""


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
    def tilt_degrees(self) -> float:
        """Between the axis of the stack and the slice normal; 0 for a single slice."""
        return tilt_degrees(self.positions, self.orientation)

    @property
    def sheared(self) -> bool:
        """Whether slices are offset against each other in plane: fine for 2D, not for 3D models."""
        return self.tilt_degrees > SHEARED_DEGREES


@dataclass(frozen=True, slots=True)
class Stack:
    """What positions alone tell about parallel slices.

    Attributes:
        order: indices into the positions given, from the smallest to the largest projection on
            the slice normal (row direction x column direction).
        steps_mm: distance along the normal between neighbours in that order.
        gaps: ordered slices after which at least one is missing.
    """

    order: tuple[int, ...]
    steps_mm: tuple[float, ...]
    gaps: tuple[int, ...]

    @property
    def median_step_mm(self) -> float:
        """The usual distance between neighbours, mm; the lower median, 0 for a single slice."""
        return sorted(self.steps_mm)[(len(self.steps_mm) - 1) // 2] if self.steps_mm else 0.0

    @property
    def missing(self) -> int:
        """How many slices the gaps have room for."""
        return sum(round(self.steps_mm[gap] / self.median_step_mm) - 1 for gap in self.gaps)

    @property
    def duplicates(self) -> int:
        """How many slices lie where their predecessor lies."""
        return sum(step < SAME_POSITION_MM for step in self.steps_mm)


def stack_from_positions(
    positions: Sequence[Sequence[float]], orientation: Sequence[float]
) -> Stack:
    """Order parallel slices along their normal and find the gaps between them.

    A gap is a step of two, three, ... times the median step, to within `GAP_TOLERANCE` steps.
    Other irregularities (blocks of 4 mm and 7 mm; 3.19, 3.27, 3.29 mm) are how the series is.

    Args:
        positions: (slices, 3), ImagePositionPatient, LPS mm, in any order.
        orientation: (6,), ImageOrientationPatient of all of them.
    """
    directions = np.asarray(orientation, dtype=np.float64)
    normal = np.cross(directions[:3], directions[3:])
    along = np.asarray(positions, dtype=np.float64).reshape(-1, 3) @ normal
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    median = Stack((), tuple(steps), ()).median_step_mm
    multiples = steps / median if median > SAME_POSITION_MM else np.zeros_like(steps)
    whole = np.rint(multiples)
    gaps = np.flatnonzero((whole >= 2) & (np.abs(multiples - whole) <= GAP_TOLERANCE))
    return Stack(
        tuple(int(index) for index in order),
        tuple(float(step) for step in steps),
        tuple(int(gap) for gap in gaps),
    )


def tilt_degrees(
    positions: NDArray[np.float64] | Sequence[Sequence[float]],
    orientation: NDArray[np.float64] | Sequence[float],
) -> float:
    """Angle between slice normal and the line from first to last slice, 0 to 90 degrees.

    Args:
        positions: (slices, 3), LPS mm, in slice order.
        orientation: (6,), of all slices.
    """
    places = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
    directions = np.asarray(orientation, dtype=np.float64)
    normal = np.cross(directions[:3], directions[3:])
    axis = places[-1] - places[0]
    along = float(axis @ normal)
    aside = float(np.linalg.norm(axis - along * normal))
    return float(np.degrees(np.arctan2(aside, abs(along)))) if along or aside else 0.0


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
    images = _images(datasets, unit)
    _check_count(len(images), min_slices)
    for image in images:
        _check_image(image, allow_lossy)
    calibration = calibrate(images, unit)
    orientation, spacing = _common_geometry(images)
    positions = [numbers_of(image, "ImagePositionPatient", 3, "NO_GEOMETRY") for image in images]
    stack = stack_from_positions(positions, orientation)
    _check_stack(stack)
    ordered = [images[index] for index in stack.order]
    voxels, padding, digests, left_out = _decode(ordered, calibration)
    kept = slice(*_kept(ordered, left_out))
    ordered, voxels = ordered[kept], voxels[kept]
    _check_count(len(ordered), min_slices)
    volume = Volume(
        voxels,
        unit,
        np.asarray([positions[index] for index in stack.order[kept]], dtype=np.float64),
        np.asarray(orientation, dtype=np.float64),
        (stack.median_step_mm, *spacing),
        _frame_of_reference(ordered),
        None if padding is None else padding[kept],
        digests[kept],
        tuple(
            Ignored(str(ds.SOPInstanceUID), error.code, error.message, frame_number(ds))
            for ds, error in left_out
        ),
    )
    return volume, ordered


def _check_count(count: int, min_slices: int) -> None:
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
        code, _ = Counter(sorted(reasons)).most_common(1)[0] if reasons else ("NOT_AN_IMAGE", 0)
        raise SeriesRefused(code, f"none of {len(datasets)} instances is a slice", "send slices")
    check_one_patient(images)
    check_size(images)
    return images


def _check_image(dataset: Dataset, allow_lossy: bool) -> None:
    """Refuse what is a slice, but not one that a model may see."""
    if dataset.get("SamplesPerPixel", 1) != 1 or "MONOCHROME" not in str(
        dataset.get("PhotometricInterpretation")
    ):
        raise refused("COLOUR", dataset, "is not greyscale", "send the original")
    if dataset.get("BurnedInAnnotation") == "YES":
        raise refused("BURNED_IN", dataset, "has burned-in annotation", "send the original")
    if dataset.get("MultienergyCTAcquisition") == "YES":
        raise refused("MULTI_ENERGY", dataset, "is multi-energy CT", "send a single-energy image")
    if "COLOR" in str(dataset.get("PixelPresentation")):
        raise refused("COLOUR", dataset, "has colour beside greyscale", "send the original")
    if has_decoder(dataset) and is_lossy(dataset) and not allow_lossy:
        raise refused("LOSSY", dataset, "is lossy compressed", "allow_lossy: true on the route")


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
                raise refused("MIXED_SERIES", image, f"{keyword} differs", "send one series")
        directions = numbers_of(image, "ImageOrientationPatient", 6, "NO_GEOMETRY")
        if not np.allclose(directions, orientation, rtol=0, atol=SAME_DIRECTION):
            raise refused("MIXED_ORIENTATION", image, "another orientation", "split the series")
        if (image.Rows, image.Columns) != (first.Rows, first.Columns) or not np.allclose(
            numbers_of(image, "PixelSpacing", 2, "NO_GEOMETRY"), spacing, rtol=1e-4
        ):
            raise refused("MIXED_MATRIX", image, "another matrix or spacing", "split the series")
    return orientation, (spacing[0], spacing[1])


def _frame_of_reference(images: Sequence[Dataset]) -> str:
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


def refuse_gaps(stack: Stack) -> SeriesRefused | None:
    """Why a stack with gaps is no volume; None if it has none."""
    if not stack.gaps:
        return None
    return SeriesRefused(
        "MISSING_SLICES",
        f"{stack.missing} slice(s) missing in {len(stack.gaps)} gap(s), "
        f"first after slice {stack.gaps[0] + 1} of {len(stack.order)}",
        "send the missing slices",
    )


def _decode(
    ordered: Sequence[Dataset], calibration: Calibration
) -> tuple[
    NDArray[np.float32],
    NDArray[np.bool_] | None,
    tuple[str, ...],
    list[tuple[Dataset, SeriesRefused]],
]:
    """Voxels, padding and digests slice by slice, and what could not be decoded (voxels are 0).

    One slice at a time: decoders hold the interpreter lock, so threads do not help.
    """
    shape = (len(ordered), int(ordered[0].Rows), int(ordered[0].Columns))
    voxels = np.zeros(shape, dtype=np.float32)
    padding: NDArray[np.bool_] | None = None
    digests, broken = [], []
    for index, dataset in enumerate(ordered):
        encoding = encoding_in_unit(encoding_of(dataset), calibration)
        try:
            stored = stored_values(dataset)
        except SeriesRefused as error:
            broken.append((dataset, error))
            digests.append("")
            if len(broken) > MOST_LEFT_OUT:
                raise
            continue
        voxels[index] = encoding.to_physical(stored)
        digests.append(pixel_digest(stored))
        mask = encoding.is_padding(stored)
        if mask is not None:
            padding = np.zeros(shape, dtype=np.bool_) if padding is None else padding
            padding[index] = mask
    return voxels, padding, tuple(digests), broken


def _kept(
    ordered: Sequence[Dataset], broken: Sequence[tuple[Dataset, SeriesRefused]]
) -> tuple[int, int]:
    """From which slice to which the stack is whole; a broken slice between them refuses it."""
    bad = {id(dataset) for dataset, _ in broken}
    good = [index for index, dataset in enumerate(ordered) if id(dataset) not in bad]
    if broken and (not good or good[-1] - good[0] + 1 != len(good)):
        raise broken[0][1]
    return good[0], good[-1] + 1
