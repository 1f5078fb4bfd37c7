"""Make lower-dose versions of CT images: DICOM to DICOM or NPY, NIfTI, NPY and PNG to NPY.

    python training/simulate_low_dose.py SERIES OUT dose=0.25
    python training/simulate_low_dose.py SERIES OUT dose=0.1 method=own
    python training/simulate_low_dose.py IMAGE.png OUT method=pixel_poisson eight_bit=[-1024,3071]

`projection`: the image is taken for the truth and projected (Beer-Lambert); Poisson and electronic
noise; what that changes in the reconstruction is added to the image, so that no detail is lost.
`own`: the image's own noise, measured, and more of it (training/lowdose.py). `pixel_poisson`: each
pixel drawn on its own, as in the low-dose paper; its noise is white, and none is in air: not what
scanners make. Derived instances say in every header what was done to them.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicomnode.errors import ConfigError, DicomNodeError, PackageError, SeriesRefused
from dicomnode.imaging.manifest import read_as
from dicomnode.imaging.marks import IMPLEMENTATION_CLASS_UID, MANUFACTURER, reproducible_uid
from dicomnode.imaging.pixels import Encoding, encode, encoding_of, stored_values, without_loss
from dicomnode.imaging.projection import WATER_PER_MM, coarse_integrals, reconstruct
from dicomnode.imaging.volume import Volume, volume_from_datasets
from training.errors import TrainingError
from training.images import IMAGE_SUFFIXES, read_image, voxels_of
from training.lowdose import insert_low_dose, own_noise_again

_NOT_TRUE_ANY_MORE = (  # of the dose that is not shown, and of files that were not changed
    *("CTDIvol", "Exposure", "ExposureTime", "ExposureInuAs", "ExposureInmAs", "XRayTubeCurrent"),
    *("XRayTubeCurrentInmA", "XRayTubeCurrentInuA", "ExposureModulationType"),
    *("IrradiationEventUID", "CTDIPhantomTypeCodeSequence", "EstimatedDoseSaving"),
    *("DigitalSignaturesSequence", "MACParametersSequence", "IconImageSequence"),
    *("InstanceCreationDate", "InstanceCreationTime", "InstanceCreatorUID"),
    *("SmallestImagePixelValue", "LargestImagePixelValue", "PixelPaddingRangeLimit"),
)


@dataclass(frozen=True, slots=True)
class LowDoseRun:
    """What is simulated."""

    dose: float = 0.25
    """Part of the dose of the source, above 0 and up to 1."""
    method: Literal["projection", "own", "pixel_poisson"] = "projection"
    photons: float = 2e5
    """Per ray in air at the full dose; of `projection`."""
    electronic: float = 10.0
    """Standard deviation of the detector's own noise, photons; of `projection`."""
    views: int = 360
    """Projections over half a turn."""
    seed: int = 1
    format: Literal["dicom", "npy"] = "dicom"
    """Of what is made of DICOM; everything else becomes NPY."""
    eight_bit: tuple[float, ...] = ()
    """HU of grey 0 and 255 of an 8-bit PNG; empty: such images are refused."""

    def __post_init__(self) -> None:
        if not 0 < self.dose <= 1:
            raise ConfigError("dose: above 0 and up to 1")
        if self.photons < 1 or self.electronic < 0 or self.views < 1:
            raise ConfigError("photons and views: from 1 on; electronic: from 0 on")
        if len(self.eight_bit) not in (0, 2):
            raise ConfigError("eight_bit: want two values, those of grey 0 and 255")


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        raise TrainingError(
            "usage: python training/simulate_low_dose.py SOURCE OUT [key=value ...]"
        )
    run, source, out = read_run(argv[2:]), Path(argv[0]), Path(argv[1])
    every = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    out.mkdir(parents=True, exist_ok=True)
    written, left_out = 0, Counter[str]()
    for path in every:
        for result in simulate_file(path, run, left_out):
            written += 1
            if isinstance(result, Dataset):
                result.save_as(out / f"{written:05}.dcm", enforce_file_format=True)
            else:
                np.save(out / f"{written:05}.npy", result)
            if sys.stdout.isatty():
                print(f"\r{written} images", end="", flush=True)
    print(f"\r{written} images in {out}; left out: {dict(left_out)}")
    if not written:
        raise TrainingError(f"{source}: no CT image; left out: {dict(left_out)}")


def read_run(overrides: Sequence[str]) -> LowDoseRun:
    """Settings from ``key=value``.

    Raises:
        ConfigError: a key is unknown or wrong.
    """
    pairs = (override.partition("=") for override in overrides)
    try:
        values = {key: yaml.safe_load(value) for key, _, value in pairs}
        if isinstance(values.get("photons"), str):
            values["photons"] = float(values["photons"])  # YAML takes 2e5 for text
        run: LowDoseRun = read_as(LowDoseRun, values, "low dose")
    except (yaml.YAMLError, ValueError, PackageError) as error:
        raise ConfigError(str(error)) from error
    return run


def simulate_file(
    path: Path, run: LowDoseRun, left_out: Counter[str]
) -> Iterator[Dataset | NDArray[np.float32]]:
    """What is made of one file: derived instances, or (slices, rows, columns), float32, HU.

    Args:
        left_out: counts, by reason, the files that are no CT image.

    Raises:
        TrainingError: an image without DICOM cannot be read.
    """
    if path.name.endswith(IMAGE_SUFFIXES):
        eight_bit = (run.eight_bit[0], run.eight_bit[1]) if run.eight_bit else None
        image = read_image(path, "HU", eight_bit)
        hu, spacing = voxels_of(image), float(image.GetSpacing()[0])
        yield np.concatenate([lower_dose(plane[None], spacing, run) for plane in hu])
        return
    try:
        dataset = dcmread(path)
        volume, used = volume_from_datasets([dataset], "HU", min_slices=1, allow_lossy=True)
        if used[0] is not dataset:
            left_out["MULTI_FRAME"] += 1
            return
        lowered = lower_dose(volume.voxels, volume.spacing_mm[2], run)
    except InvalidDicomError:
        left_out["NOT_DICOM"] += 1
    except SeriesRefused as error:
        left_out[error.code] += 1
    except TrainingError:
        left_out["NO_SOFT_TISSUE"] += 1
    else:
        if volume.padding is not None:
            lowered = np.where(volume.padding, volume.voxels, lowered)
        yield lowered if run.format == "npy" else derived(dataset, volume, lowered[0], run)


def lower_dose(
    hu: NDArray[np.float32], pixel_spacing_mm: float, run: LowDoseRun
) -> NDArray[np.float32]:
    """Slices at the lower dose, (slices, rows, columns), float32, HU; same input, same noise.

    Raises:
        TrainingError: of `own`: a slice has too little soft tissue to measure its noise.
    """
    digest = hashlib.sha256(np.ascontiguousarray(hu).tobytes()).hexdigest()
    rng = np.random.default_rng([run.seed, int(digest[:32], 16)])
    if run.method == "pixel_poisson":
        return pixel_poisson(hu, run.dose, rng)
    if run.method == "own":
        noise = [own_noise_again(plane, pixel_spacing_mm, 1, rng, run.views)[0] for plane in hu]
        return insert_low_dose(hu, np.stack(noise), run.dose)
    return hu + projection_noise(
        hu, pixel_spacing_mm, run.dose * run.photons, rng, run.electronic, run.views
    )


def projection_noise(
    hu: NDArray[np.float32],
    pixel_spacing_mm: float,
    photons: float,
    rng: np.random.Generator,
    electronic: float = 0.0,
    views: int = 360,
) -> NDArray[np.float32]:
    """What counting photons changes in the reconstruction; (slices, rows, columns), float32, HU.

    A ray of line integral p is measured with Poisson(`photons` e^-p) photons and the detector's
    noise; at least one counts. The images are taken for free of noise.
    """
    integrals = coarse_integrals(hu, pixel_spacing_mm, views)
    counted = rng.poisson(photons * np.exp(-integrals.astype(np.float64)))
    measured = counted + rng.normal(0.0, electronic, counted.shape)
    error = -np.log(np.maximum(measured, 1.0) / photons) - integrals
    matrix = (hu.shape[1], hu.shape[2])
    image = reconstruct(error.astype(np.float32), pixel_spacing_mm, matrix)
    return image * np.float32(1000.0 / WATER_PER_MM)


def pixel_poisson(
    hu: NDArray[np.float32], dose: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Each pixel as Poisson(dose I) / dose, I = HU + 1024 on 12 bits; any shape, float32, HU."""
    grey = np.clip(hu, -1024, 3071) + 1024.0
    return np.asarray(rng.poisson(dose * grey) / dose - 1024.0, np.float32)


def derived(source: Dataset, volume: Volume, hu: NDArray[np.float32], run: LowDoseRun) -> Dataset:
    """A CT instance that shows `source` at the lower dose, and says so.

    Args:
        volume: of `source` alone.
        hu: (rows, columns), float32, HU.
    """
    made = deepcopy(source)
    made.remove_private_tags()
    for keyword in _NOT_TRUE_ANY_MORE:
        made.pop(keyword, None)
    _store(made, source, None if volume.padding is None else volume.padding[0], hu)
    what = json.dumps(asdict(run), sort_keys=True)
    made.SOPInstanceUID = reproducible_uid("low dose", what, str(source.SOPInstanceUID))
    made.SeriesInstanceUID = reproducible_uid("low dose", what, str(source.SeriesInstanceUID))
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    made.file_meta.ImplementationVersionName = "DICOMNODE"
    made.ImageType = ["DERIVED", "SECONDARY", "AXIAL", "SIM_LOW_DOSE"]
    made.SyntheticData = "YES"
    made.SeriesDescription = f"SIMULATED {run.dose:.0%} DOSE, NOT ACQUIRED ({run.method})"
    number = source.get("SeriesNumber")
    made.SeriesNumber = (number if isinstance(number, int) and number > 0 else 0) + 7000
    made.DerivationDescription = f"Simulated lower dose, training/simulate_low_dose.py: {what}"
    made.SourceImageSequence = [_reference(source)]
    equipment = Dataset()
    equipment.Manufacturer = MANUFACTURER
    equipment.ContributionDescription = "Simulated noise of a lower dose was added"
    equipment.PurposeOfReferenceCodeSequence = [_code("109102", "Processing Equipment")]
    made.ContributingEquipmentSequence = [
        *(made.get("ContributingEquipmentSequence") or []),
        equipment,
    ]
    return made


def _store(
    made: Dataset, source: Dataset, padding: NDArray[np.bool_] | None, hu: NDArray[np.float32]
) -> None:
    """Stored as the source if the values fit, else as signed 16-bit HU."""
    encoding, padded = encoding_of(source), stored_values(source)
    native = True if padding is None else ~padding
    if not without_loss(encoding, hu, native):
        outside = (
            round(float(encoding.to_physical(padded)[padding].min())) if padding is not None else 0
        )
        pair = None if padding is None else (outside, outside)
        encoding, padded = (
            Encoding(16, True, 1.0, 0.0, pair),
            np.full_like(padded, outside, np.int16),
        )
        made.RescaleSlope, made.RescaleIntercept = "1", "0"
        made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 15, 1
        made.pop("PixelPaddingValue", None)
        if padding is not None:
            made.add_new("PixelPaddingValue", "SS", outside)
    stored = encode(encoding, hu, padding, padded)
    made.add_new("PixelData", "OW", stored.astype(stored.dtype.newbyteorder("<")).tobytes())


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [
        _code("121322", "Source image for image processing operation")
    ]
    return item


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
