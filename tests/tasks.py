"""Every output type made by its whole path: a package that scales and shifts, run over a series.

`SOURCES` are pydicom's own CT and MR files and a PET as GE scanners write it; nothing is fetched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset, dcmread

from dicomnode.companions import CompanionOptions, companions, header_of
from dicomnode.derived import OutputOptions
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.intensity import Unscaled
from dicomnode.imaging.manifest import (
    Bounds,
    DicomSpec,
    GeneratorSpec,
    InputSpec,
    Manifest,
    OutputSpec,
    Range,
    Tiling,
)
from dicomnode.imaging.package import ModelPackage, write_package
from dicomnode.imaging.units import Unit
from dicomnode.label import label_pixels
from dicomnode.outputs import OUTPUTS
from dicomnode.pipeline import Translation, identity_of, translate_series
from tests.factories import changed, file_bytes, pet_series, write_series

NOW = datetime(2026, 3, 4, 23, 30, 15, 250000, tzinfo=UTC)
PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"


@dataclass(frozen=True, slots=True)
class Kind:
    """One task, in which units, and result = scale * input + offset."""

    task: str
    given: Unit
    made: Unit
    scale: float
    offset: float


KINDS = {
    kind.task: kind
    for kind in (
        Kind("denoise", "HU", "HU", 0.97, 3.3),
        Kind("ce_ct", "HU", "HU", 1.0, 37.25),
        Kind("syn_ct", "AU", "HU", 0.4, -200.0),
        Kind("syn_mr", "HU", "AU", 0.8, 900.0),
        Kind("delayed_pet", "BQML", "BQML", 1.3, 0.0),
    )
}


def package_for(kind: Kind, models: Path, version: str = "1.0.0") -> ModelPackage:
    """A package of a task that says by its architecture that it is no trained model."""
    output = OUTPUTS[kind.task]
    manifest = Manifest(
        format=1,
        name=f"affine-{kind.task.replace('_', '-')}",
        version=version,
        task=kind.task,  # type: ignore[arg-type]
        generator=GeneratorSpec("affine", {"scale": kind.scale, "offset": kind.offset}),
        input=InputSpec(output.source, kind.given, Unscaled()),
        output=OutputSpec(output.modality, kind.made, Unscaled()),
        normalisation="none",
        tiling=Tiling(True, 0),
        bounds=Bounds((output.source,), slices=Range(min=1)),
        dicom=DicomSpec("affine", "test", "1.0.0"),
        licence="MIT",
        intended_use="Tests only.",
    )
    golden = np.linspace(0, 1000, 256, dtype=np.float32).reshape(1, 16, 16)
    return write_package(models / manifest.name, manifest, {}, golden, "# For tests\n")


def ct5n() -> list[Dataset]:
    """Five slices of CT, 16 x 16, with padding (pydicom's dicomdirtests/98892001/CT5N)."""
    return [dcmread(p) for p in sorted((PYDICOM / "dicomdirtests/98892001/CT5N").iterdir())]


def mr_small() -> list[Dataset]:
    """One slice of MR, 64 x 64 (pydicom's MR_small.dcm)."""
    return [dcmread(PYDICOM / "MR_small.dcm")]


def ge_pet(slices: int = 5, **options: object) -> list[Dataset]:
    """A static FDG PET with what a GE Discovery writes, valid against the PET Image IOD."""
    position = _code("F-10450", "recumbent")
    position.PatientOrientationModifierCodeSequence = [_code("F-10340", "supine")]
    tracer = {
        "RadionuclideCodeSequence": [_code("C-111A1", "18F")],
        "RadiopharmaceuticalCodeSequence": [_code("C-B1031", "Fluorodeoxyglucose F^18^")],
    }
    given: dict[str, object] = {
        "Manufacturer": "GE MEDICAL SYSTEMS",
        "ManufacturerModelName": "Discovery ST",
        "CorrectedImage": ["DECY", "ATTN", "SCAT", "DTIM", "RAN", "NORM"],
        "CollimatorType": "RING",
        "RandomsCorrectionMethod": "SING",
        "AttenuationCorrectionMethod": "measured,, 0.096000 cm-1,",
        "ScatterCorrectionMethod": "Convolution subtraction",
        "ReconstructionMethod": "OSEM",
        "AxialMash": [3, 2],
        "SliceSensitivityFactor": "3.53037",
        "DecayFactor": "1.01268",
        "DoseCalibrationFactor": "164.0",
        "PrimaryPromptsCountsAccumulated": 34932,
        "PatientOrientationCodeSequence": [position],
        "PatientGantryRelationshipCodeSequence": [_code("F-10470", "headfirst")],
        "PatientSize": "1.63",
        "RescaleType": None,
    }
    made = pet_series(slices, 24, 28, tracer=tracer, **(given | options))
    return changed(made, PatientPosition=None)  # one of the two says it


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SRT", meaning
    return item


SOURCES: dict[str, Callable[[], list[Dataset]]] = {
    "denoise": ct5n,
    "ce_ct": ct5n,
    "syn_mr": ct5n,
    "syn_ct": mr_small,
    "delayed_pet": ge_pet,
}


def translated(
    kind: Kind, datasets: Sequence[Dataset], models: Path, options: OutputOptions | None = None
) -> Translation:
    """A series by the whole path: package, volume, model, quality checks, derived instances."""
    model = load_model(package_for(kind, models))
    return translate_series(datasets, model, options or OutputOptions(), NOW)


def make_series(kind: Kind, datasets: Sequence[Dataset], folder: Path) -> tuple[Path, Path]:
    """SRC_DIR and DERIVED_DIR of a translated series, as `judge_dicom.py` wants them."""
    source, derived, _ = make_all(kind, datasets, folder)
    return source, derived


def make_all(
    kind: Kind, datasets: Sequence[Dataset], folder: Path, options: OutputOptions | None = None
) -> tuple[Path, Path, Path]:
    """As `make_series`, and the folder of the companions."""
    model = load_model(package_for(kind, folder / "models"))
    done = translate_series(datasets, model, options or OutputOptions(), NOW)
    source, derived, beside = folder / "source", folder / "derived", folder / "companions"
    images = list(done.derived)
    write_series(done.datasets, source)
    write_series(images, derived)
    expected = done.prediction.voxels.copy()
    if done.source.padding is not None:
        expected[done.source.padding] = np.nan
    if options is not None and options.label == "burned":
        expected[:, label_pixels(*expected.shape[1:])] = np.nan
    np.save(derived / "prediction.npy", expected)
    headers = [header_of(image) for image in images]
    made = companions(headers, done.findings, identity_of(model), CompanionOptions(), NOW)
    write_series(made, beside)
    return source, derived, beside


def made_of(
    task: str, datasets: Sequence[Dataset], tmp_path: Path, options: OutputOptions | None = None
) -> list[Dataset]:
    """Derived instances of a task as a receiver reads them."""
    made = translated(KINDS[task], datasets, tmp_path, options).derived
    return [dcmread(BytesIO(file_bytes(ds))) for ds in made]
