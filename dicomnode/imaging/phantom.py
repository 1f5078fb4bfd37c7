"""A low-dose chest CT that no patient ever had, as a CT series to send, to test and to show.

The anatomy is drawn by formula, the quantum noise is made in its projections, and the result
is written as complete CT Image Storage instances. The same seed gives the same bytes.
"""

import contextlib
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from dicomnode.imaging.anatomy import chest
from dicomnode.imaging.projection import quantum_noise

MATRIX: Final = 512
SPACING_MM: Final = 0.7
SLICE_MM: Final = 2.5
MIDDLE_MM: Final = -2.0
"""Height of the middle slice in the anatomy: 24 slices reach from the hila to the liver dome."""
LOW_DOSE_PHOTONS: Final = 4e4
"""Photons per ray in air: 35 to 60 HU of noise in soft tissue, as at a quarter dose or lower."""
_NAMESPACE: Final = uuid.UUID("6c7c8a3e-8b0e-5f5e-9b7a-2f6f0d3a7c11")


def phantom_heights(slices: int) -> list[float]:
    """Height of each slice in mm, from the feet to the head."""
    return [MIDDLE_MM + SLICE_MM * (i - (slices - 1) / 2) for i in range(slices)]


def phantom_volume(
    slices: int = 24, seed: int = 1, photons: float = LOW_DOSE_PHOTONS, views: int = 480
) -> NDArray[np.float32]:
    """The phantom as a scanner would show it.

    Args:
        slices: 2.5 mm each, without gap.
        seed: of anatomy and noise.
        photons: per ray in air; math.inf for an image without noise.
        views: projections per half turn that make the noise.

    Returns:
        (slices, 512, 512), float32, whole HU from -1024 to 3071.
    """
    voxels = chest(phantom_heights(slices), MATRIX, SPACING_MM, seed)
    if math.isfinite(photons):
        rng = np.random.default_rng([seed, 1])
        with _one_thread():
            voxels += quantum_noise(voxels, SPACING_MM, math.inf, photons, rng, views=views)
    return np.clip(np.rint(voxels), -1024, 3071)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The same sums on any number of cores; and quicker, as each of many small steps would wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def phantom_series(
    slices: int = 24,
    seed: int = 1,
    photons: float = LOW_DOSE_PHOTONS,
    *,
    fresh_uids: bool = False,
) -> list[Dataset]:
    """The phantom as one CT series (PS3.3 A.3), from the feet to the head.

    QualityControlImage says that it is a phantom. SyntheticData is absent, so that the node
    takes it for what it stands for: an acquired series.

    Args:
        slices: number of instances.
        seed: of anatomy, noise and, unless `fresh_uids`, of every UID.
        photons: as in `phantom_volume`.
        fresh_uids: a new study each time, instead of the same one.

    Returns:
        Data sets with file meta information, stored values 0 to 4095, HU = stored - 1024.
    """
    voxels = phantom_volume(slices, seed, photons)
    salt = uuid.uuid4().hex if fresh_uids else f"{slices} {photons}"
    common = header_of_phantom(seed, salt, "CT", "Chest")
    common.SeriesDescription = "Chest 2.5 mm low dose"
    _technique(common)
    lattice = Lattice(SPACING_MM, SLICE_MM, phantom_heights(slices)[0])
    return instances_of_phantom(common, (voxels + 1024).astype(np.uint16), lattice)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Axial slices of square pixels about the middle: spacings in mm, height of the first slice."""

    pixel_mm: float
    slice_mm: float
    first_mm: float


def instances_of_phantom(
    common: Dataset, stored: NDArray[np.uint16], lattice: Lattice
) -> list[Dataset]:
    """The instances of one series, from the feet to the head.

    Args:
        common: what all of them say, from `header_of_phantom`; SOPClassUID among it.
        stored: (slices, rows, columns), what goes into Pixel Data.
    """
    _, rows, columns = stored.shape
    result = []
    for index, plane in enumerate(stored):
        ds = Dataset()
        ds.update(common)
        ds.SOPInstanceUID = uid = uid_of_phantom(common.SeriesInstanceUID, f"instance {index}")
        ds.InstanceNumber = index + 1
        z = round(lattice.first_mm + index * lattice.slice_mm, 3)
        corner = [round(-(n - 1) / 2 * lattice.pixel_mm, 3) for n in (columns, rows)]
        ds.ImagePositionPatient = [*corner, z]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.SliceLocation = z
        ds.SliceThickness = lattice.slice_mm
        ds.PixelSpacing = [lattice.pixel_mm, lattice.pixel_mm]
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.Rows, ds.Columns = rows, columns
        ds.PixelRepresentation = 0
        ds.PixelData = plane.astype("<u2").tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID = common.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = uid
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        result.append(ds)
    return result


def uid_of_phantom(*names: object) -> UID:
    """A UID that follows from `names`."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, ' '.join(map(str, names))).int}")


def header_of_phantom(seed: int, salt: str, modality: str, what: str) -> Dataset:
    """What all instances of a phantom series say of patient, study and equipment.

    QualityControlImage says that it is a phantom.

    Args:
        seed, salt: of the UIDs.
        what: one word for the anatomy, such as ``Chest``.
    """
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName = f"Phantom^{what}"
    ds.PatientID = f"PHANTOM-{seed}"
    ds.PatientBirthDate = ""
    ds.PatientSex = "O"
    ds.StudyInstanceUID = uid_of_phantom(seed, salt, "study")
    ds.SeriesInstanceUID = uid_of_phantom(seed, salt, "series")
    ds.FrameOfReferenceUID = uid_of_phantom(seed, salt, "frame of reference")
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20260105"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "093000"
    ds.AccessionNumber = ""
    ds.ReferringPhysicianName = ""
    ds.StudyID = "1"
    ds.StudyDescription = "Phantom"
    ds.Modality = modality
    ds.SeriesNumber = 2
    ds.AcquisitionNumber = 1
    ds.BodyPartExamined = what.upper()
    ds.PatientPosition = "HFS"
    ds.PositionReferenceIndicator = ""
    ds.Manufacturer = "Generated phantom"  # not ours: the loop guard knows our own by this
    ds.ManufacturerModelName = f"{what} by formula"
    ds.DeviceSerialNumber = "0"
    ds.SoftwareVersions = "1"
    ds.QualityControlImage = "YES"
    ds.BurnedInAnnotation = "NO"
    ds.ImageComments = "Generated phantom, no patient"
    return ds


def _technique(ds: Dataset) -> None:
    """CT Image and Image Pixel modules (PS3.3 C.8.2.1, C.7.6.3)."""
    ds.SOPClassUID = CTImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.KVP = 120
    ds.ExposureTime = 500
    ds.XRayTubeCurrent = 40
    ds.Exposure = 20
    ds.ConvolutionKernel = "SOFT"
    ds.ReconstructionDiameter = round(MATRIX * SPACING_MM, 1)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = 40, 400
