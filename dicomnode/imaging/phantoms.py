"""Further phantoms that no patient ever was: a thigh in CT and MR, an abdomen in early FDG PET.

Drawn by formula, with noise; the same seed gives the same bytes. They are for the models that the
chest of phantom.py is out of bounds for.
"""

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage
from scipy import ndimage

from dicomnode.imaging.phantom import Lattice, header_of_phantom, instances_of_phantom

SLICES = 24
_LIMB_MATRIX, _LIMB_MM, _SLICE_MM = 192, 0.976562, 3.27
_PET_MATRIX, _PET_MM = 96, 4.6875
_THIGH = {  # tissue -> HU; fat-normalised T1 signal, as in Soft-tissue-Sarcoma
    "air": (-1000.0, 0.0),
    "fat": (-105.0, 920.0),
    "muscle": (58.0, 330.0),
    "cortex": (1250.0, 60.0),
    "marrow": (-40.0, 860.0),
}
_EARLY_SUV = {"fat": 0.35, "muscle": 0.8, "liver": 3.6, "kidney": 3.4, "blood": 3.4, "lesion": 3.0}
_KBQ_PER_SUV = 4.2
"""Of a patient of 70 kg who was given 294 MBq."""


def thigh_ct(seed: int = 1) -> list[Dataset]:
    """One CT series of a thigh: stored 0 to 4095, HU = stored - 1024."""
    hu = _thigh(seed, 0) + np.random.default_rng([seed, 2]).normal(0, 12, _limb_shape())
    ds = header_of_phantom(seed, "thigh", "CT", "Extremity")
    ds.Laterality = "L"
    ds.SeriesDescription = "Thigh CT"
    ds.SOPClassUID = CTImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.KVP, ds.ExposureTime, ds.XRayTubeCurrent, ds.Exposure = 120, 500, 200, 100
    ds.ConvolutionKernel = "STANDARD"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = 40, 400
    return instances_of_phantom(ds, _stored(hu + 1024, 4095), _limb_lattice())


def thigh_mr(seed: int = 1) -> list[Dataset]:
    """One T1-weighted MR series of the same thigh: signal as N4 and fat normalisation leave it."""
    signal = _thigh(seed, 1) + np.random.default_rng([seed, 3]).normal(0, 12, _limb_shape())
    ds = header_of_phantom(seed, "thigh", "MR", "Extremity")
    ds.Laterality = "L"
    ds.SeriesInstanceUID += "1"  # beside the CT, in the same study
    ds.SeriesNumber = 3
    ds.SeriesDescription = "Thigh T1"
    ds.SOPClassUID = MRImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions = "SE", "NONE", ""
    ds.MRAcquisitionType, ds.EchoTrainLength = "2D", 1
    ds.RepetitionTime, ds.EchoTime = 550, 12
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.WindowCenter, ds.WindowWidth = 550, 1100
    return instances_of_phantom(ds, _stored(signal, 4095), _limb_lattice())


def early_pet(seed: int = 1) -> list[Dataset]:
    """One FDG PET series of an abdomen, started ten minutes after injection, in Bq/ml."""
    suv = _abdomen(seed)
    ds = header_of_phantom(seed, "early PET", "PT", "Abdomen")
    ds.SeriesDescription = "FDG early"
    ds.SOPClassUID = PositronEmissionTomographyImageStorage
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.SeriesType, ds.Units, ds.CountsSource = ["STATIC", "IMAGE"], "BQML", "EMISSION"
    ds.CorrectedImage, ds.DecayCorrection = ["DECY", "ATTN", "SCAT", "RAN"], "START"
    ds.NumberOfSlices, ds.PatientWeight = len(suv), 70
    ds.FrameReferenceTime, ds.ActualFrameDuration, ds.DecayFactor = 0, 840000, 1
    ds.CollimatorType = "NONE"
    del ds.PatientPosition  # not beside Patient Orientation Code Sequence
    ds.PatientOrientationCodeSequence, ds.PatientGantryRelationshipCodeSequence = [], []
    tracer = Dataset()
    tracer.RadionuclideCodeSequence = []
    tracer.Radiopharmaceutical = "Fluorodeoxyglucose F^18^"
    tracer.RadiopharmaceuticalStartDateTime = "20260105092000"
    tracer.RadiopharmaceuticalStartTime = "092000"
    tracer.RadionuclideTotalDose = 313e6  # 294 MBq of it are left at the start of the scan
    tracer.RadionuclideHalfLife, tracer.RadionuclidePositronFraction = 6586.2, 0.97
    ds.RadiopharmaceuticalInformationSequence = [tracer]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.RescaleIntercept, ds.RescaleSlope = 0, 1
    ds.WindowCenter, ds.WindowWidth = 12500, 25000
    instances = instances_of_phantom(
        ds, _stored(suv * _KBQ_PER_SUV * 1000, 32767), Lattice(_PET_MM, _SLICE_MM, 0.0)
    )
    for number, instance in enumerate(instances, 1):
        instance.ImageIndex = number
    return instances


def _limb_shape() -> tuple[int, int, int]:
    return SLICES, _LIMB_MATRIX, _LIMB_MATRIX


def _limb_lattice() -> Lattice:
    return Lattice(_LIMB_MM, _SLICE_MM, 0.0)


def _stored(values: NDArray[np.float64], highest: int) -> NDArray[np.uint16]:
    return np.clip(np.rint(values), 0, highest).astype(np.uint16)


def _thigh(seed: int, kind: int) -> NDArray[np.float64]:
    """(slices, rows, columns): HU (kind 0) or T1 signal (kind 1), without noise."""
    rng = np.random.default_rng([seed, 1])
    across = (np.arange(_LIMB_MATRIX) - (_LIMB_MATRIX - 1) / 2) * _LIMB_MM
    z, y, x = np.meshgrid(np.arange(SLICES) * _SLICE_MM, across, across, indexing="ij")
    angle, taper = np.arctan2(y, x), 1 - z / 900
    ripple = 1 + 0.05 * np.cos(2 * angle + rng.uniform(0, 6)) + 0.02 * np.cos(3 * angle)
    away = np.hypot(x, y) / (taper * ripple)
    bone = np.hypot(x - 8, y - 5) / taper
    image = np.full(z.shape, _THIGH["air"][kind])
    image[away < 78] = _THIGH["fat"][kind]
    image[away < 64] = _THIGH["muscle"][kind]
    septa = np.abs(np.sin(1.5 * angle + 0.3 * np.sin(away / 9))) < 0.035
    image[septa & (away < 64) & (away > 20)] = _THIGH["fat"][kind]
    image[bone < 15] = _THIGH["cortex"][kind]
    image[bone < 8.5] = _THIGH["marrow"][kind]
    return np.asarray(ndimage.gaussian_filter(image, [0.3, 0.6, 0.6]), np.float64)


def _abdomen(seed: int) -> NDArray[np.float64]:
    """(slices, rows, columns): SUV of an early frame, with noise."""
    across = (np.arange(_PET_MATRIX) - (_PET_MATRIX - 1) / 2) * _PET_MM
    z, y, x = np.meshgrid(np.arange(SLICES) * _SLICE_MM, across, across, indexing="ij")
    suv = np.full(z.shape, 0.02)
    shapes = (  # tissue, centre and half axes: z, y, x in mm
        ("fat", (0, 0, 0), (1e6, 115, 165)),
        ("muscle", (0, 0, 0), (1e6, 100, 148)),
        ("liver", (45, -10, -60), (75, 70, 72)),
        ("kidney", (10, 45, 62), (52, 24, 26)),
        ("kidney", (10, 45, -62), (40, 22, 24)),
        ("blood", (0, 35, 5), (1e6, 11, 11)),
        ("lesion", (40, -30, 70), (14, 14, 14)),
    )
    for tissue, centre, half in shapes:
        parts = zip((z, y, x), centre, half, strict=True)
        suv[sum(((axis - at) / size) ** 2 for axis, at, size in parts) <= 1] = _EARLY_SUV[tissue]
    grain = np.random.default_rng([seed, 4]).standard_normal(suv.shape)
    grain = ndimage.gaussian_filter(grain, [0.5, 0.4, 0.4])
    seen = ndimage.gaussian_filter(suv, [6 / 2.355 / mm for mm in (_SLICE_MM, _PET_MM, _PET_MM)])
    return np.asarray(np.maximum(seen + 0.07 * np.sqrt(seen) * grain / grain.std(), 0), np.float64)
