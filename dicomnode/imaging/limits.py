"""What slices must satisfy before any is decoded: one patient, a sane matrix, fit for a model."""

from collections.abc import Sequence

from pydicom import Dataset

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import has_decoder, is_lossy, refused

MOST_VOXELS = 1 << 30
"""Of one volume: 4 GiB as float32, and the prediction takes as much again."""
LARGEST_MATRIX = 8192
"""Rows or columns; also what a decoder may be asked to allocate for one frame."""
LARGEST_SPACING_MM = 1000.0
"""Between pixels."""

_PATIENT = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate")


def check_one_patient(images: Sequence[Dataset]) -> None:
    """All slices must be of one patient, by everything that identifies one (PS3.3 C.7.1.1).

    Raises:
        SeriesRefused: MIXED_PATIENT.
    """
    for keyword in _PATIENT:
        if len({str(image.get(keyword) or "") for image in images}) > 1:
            raise SeriesRefused("MIXED_PATIENT", f"{keyword} differs", "send one patient's series")


def check_size(images: Sequence[Dataset]) -> None:
    """Before anything is allocated: numbers in a header cost their sender nothing.

    Raises:
        SeriesRefused: NO_MATRIX, TOO_LARGE.
    """
    voxels = 0
    for image in images:
        size = image.get("Rows"), image.get("Columns")
        if not all(isinstance(number, int) and number > 0 for number in size):
            raise refused("NO_MATRIX", image, "Rows or Columns is no number", "send it again")
        voxels += int(image.Rows) * int(image.Columns)
        if max(image.Rows, image.Columns) > LARGEST_MATRIX or voxels > MOST_VOXELS:
            what = f"more than {LARGEST_MATRIX} rows or columns, or {MOST_VOXELS} voxels in all"
            raise refused("TOO_LARGE", image, what, "send smaller images, or several series")


def check_image(dataset: Dataset, allow_lossy: bool) -> None:
    """Refuse what is a slice, but not one that a model may see; pixels are not looked at.

    Raises:
        SeriesRefused: COLOUR, BURNED_IN, MULTI_ENERGY, LOSSY.
    """
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
