"""Results beside their truth, volume by volume: of a package on a part of a run's patients, or of
two folders."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from dicomnode.imaging.inference import Model
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.percentiles import Percentiles
from dicomnode.imaging.units import Unit
from training.config import Data, Images, TrainConfig
from training.data import load_samples
from training.errors import TrainingError
from training.figures import Denoiser, denoiser
from training.images import IMAGE_SUFFIXES, ITK_SUFFIXES, read_image, voxels_of
from training.metrics import body_mask
from training.pairs import Pair, find_images, patient_of
from training.regions import body_above, body_of
from training.split import read_split
from training.translation import translator_of

Voxels = NDArray[np.float32]
RANGES: dict[Unit, tuple[float, float]] = {"HU": (-1024.0, 3071.0), "SUV": (0.0, 20.0)}
"""Values that peaks and similarities are about, unless a run's window or the user says others."""


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """One volume; every array is (slices, rows, columns).

    Attributes:
        patient: hash of what names the patient.
        result, truth: float32, in the unit that is judged.
        body: bool: where the patient is.
        source: float32: what the result was made of, for the picture; None: not known.
        other: float32, in the unit: what the result is compared with; None: nothing.
        labels: whole numbers: regions of interest, 0 none; None: there are none.
        same_unit: the source is in the unit that is judged.
    """

    patient: str
    result: Voxels
    truth: Voxels
    body: NDArray[np.bool_]
    source: Voxels | None = None
    other: Voxels | None = None
    labels: NDArray[np.intp] | None = None
    same_unit: bool = False


@dataclass(frozen=True, slots=True)
class Folders:
    """Images of one kind each; a file, or a folder of one DICOM series, is one volume."""

    result: Path
    truth: Path
    unit: Unit
    mask: Path | None = None
    """Above 0: the patient, instead of what is found in the truth."""
    other: Path | None = None
    """Results of another method."""
    labels: Path | None = None
    """Regions of interest: whole numbers, 0 none."""
    patient: str = ""
    """Regular expression whose first group names the patient; empty: each volume is one."""


def low_dose_studies(
    config: TrainConfig,
    data: Data,
    model: Model,
    part: str,
    dose: float,
    other: Model | None = None,
) -> Iterator[Study]:
    """Every held-out slice, denoised; compared with what `other` makes of it, or with the slice at
    the lower dose as it is."""
    samples, _ = load_samples(data, config.low_dose, config.seed, config.out / "cache")
    apply = _denoiser_of(model)
    compared = apply if other is None else _denoiser_of(other)
    wanted = read_split(Path(data.split))[part]
    for sample in (sample for sample in samples if sample.patient in wanted):
        low = sample.at_dose(dose, 0)
        body = body_mask(sample.hu)
        if body.any():
            given = low[None]
            made = apply(low)[None]
            beside = given if other is None else compared(low)[None]
            truth = sample.hu[None]
            yield Study(sample.patient, made, truth, body[None], given, beside, same_unit=True)


def _denoiser_of(model: Model) -> Denoiser:
    scale = model.package.manifest.input.intensity
    if isinstance(scale, Percentiles):
        raise TrainingError("package: percentiles are of a whole volume; these are slices")
    return denoiser(model.generator, scale)


def image_studies(
    config: TrainConfig, data: Images, model: Model, part: str, other: Model | None = None
) -> Iterator[Study]:
    """Every held-out volume, translated; compared with what `other` makes of it, or else with its
    source where that has the same unit.

    Raises:
        TrainingError: the images are not paired, or a package gives another unit or takes other
            intensities or slices.
    """
    unit = data.target.unit
    for name, one in (("package", model), ("other", other)):
        if one is not None and (own := one.package.manifest.output.unit) != unit:
            raise TrainingError(f"{name}: its results are in {own}, the truth in {unit}")
    if not data.paired:
        raise TrainingError("data.paired: without pairs there is no truth to compare with")
    found = find_images(data)
    wanted = read_split(Path(data.split))[part]
    apply = translator_of(model, config, data)
    compared = apply if other is None else translator_of(other, config, data)
    pairs = [
        Pair(source, target)
        for source, target in zip(found.sources, found.targets, strict=True)
        if source.patient in wanted
    ]
    for planes in volumes_of(pairs):
        sources = np.stack([pair.source.physical for pair in planes])
        same = data.source.unit == unit
        beside = sources if same else None
        if other is not None:
            beside = np.stack([compared(pair.source) for pair in planes])
        yield Study(
            planes[0].source.patient,
            np.stack([apply(pair.source) for pair in planes]),
            np.stack([pair.target.physical for pair in planes]),
            np.stack([pair.target.body for pair in planes]),
            sources,
            beside,
            same_unit=same,
        )


def volumes_of(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Slices that follow one another in one volume, volume by volume."""

    def breaks(one: Pair, other: Pair) -> bool:
        return (
            one.target.patient != other.target.patient
            or one.target.physical.shape != other.target.physical.shape
            or other.target.number != one.target.number + 1
        )

    numbers = np.cumsum([0, *(breaks(*two) for two in pairwise(pairs))])
    numbered = zip(numbers.tolist(), pairs, strict=False)
    return [[pair for _, pair in some] for _, some in groupby(numbered, key=lambda item: item[0])]


def window_of(data: Images) -> tuple[float, float] | None:
    """The range of values of a run's target; None: it has no window."""
    scale = data.target.intensity
    return (scale.low, scale.high) if isinstance(scale, Window) else None


def folder_studies(folders: Folders) -> Iterator[Study]:
    """Every volume that both folders have, by name.

    Raises:
        TrainingError: a folder is missing or empty, the names do not match, sizes or positions
            differ, values are not of the unit, or a mask is empty.
    """
    kinds = {
        kind: _volumes(path)
        for kind in ("result", "truth", "mask", "other", "labels")
        if (path := getattr(folders, kind)) is not None
    }
    for kind, named in kinds.items():
        if odd := len(set(named) ^ set(kinds["truth"])):
            raise TrainingError(
                f"{kind} and truth: {odd} of the names in one are not in the other; "
                "volumes belong together by the name of their file or folder"
            )
    for name in sorted(kinds["truth"]):
        images = {kind: _read(named[name], kind, folders.unit) for kind, named in kinds.items()}
        yield _study(patient_of(name, folders.patient), folders.unit, images)


def _read(path: Path, kind: str, unit: Unit) -> Any:
    """An image in `unit`; of a mask or labels the numbers as they are, which may be of 8 bits."""
    if kind not in ("mask", "labels"):
        return read_image(path, unit)
    if not path.name.endswith(ITK_SUFFIXES):
        raise TrainingError(f"{path}: a {kind} must be one of {', '.join(ITK_SUFFIXES)}")
    try:
        return sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkFloat32)
    except RuntimeError as error:
        raise TrainingError(f"{path}: cannot be read as NIfTI, MetaImage or NRRD") from error


def _study(patient: str, unit: Unit, images: dict[str, Any]) -> Study:
    voxels = {kind: voxels_of(image) for kind, image in images.items()}
    for kind, image in images.items():
        if image.GetSize() != images["truth"].GetSize():
            sizes = voxels[kind].shape, voxels["truth"].shape
            raise TrainingError(f"{kind} of {sizes[0]} and truth of {sizes[1]} voxels do not match")
        if not _same_place(image, images["truth"]):
            raise TrainingError(f"{kind} and truth are at different places, or of other spacing")
    check_unit(voxels["truth"], unit)
    if "mask" in voxels:
        body = np.asarray(voxels["mask"] > 0, np.bool_)
    else:
        body = body_of(voxels["truth"], body_above(voxels["truth"], unit))
    if not body.any():
        raise TrainingError("mask: nothing is inside it" if "mask" in voxels else "truth: no body")
    labels = voxels["labels"].astype(np.intp) if "labels" in voxels else None
    return Study(
        patient, voxels["result"], voxels["truth"], body, None, voxels.get("other"), labels
    )


def check_unit(truth: Voxels, unit: Unit) -> None:
    """Refuse what cannot be of a unit.

    Raises:
        TrainingError: grey values of 8 bits are given as HU, or there are values below zero in SUV.
    """
    low, high = float(truth.min()), float(truth.max())
    if unit == "HU" and low >= 0 and high <= 255:
        raise TrainingError(f"truth: values from {low:g} to {high:g} are not HU")
    if unit in ("SUV", "BQML") and low < -1e-3 * max(high, 1.0):
        raise TrainingError(f"truth: a value of {low:g} is not {unit}")


def _same_place(image: Any, truth: Any) -> bool:
    near = 0.01 * min(truth.GetSpacing())
    return (
        np.allclose(image.GetSpacing(), truth.GetSpacing(), rtol=0.01)
        and np.allclose(image.GetOrigin(), truth.GetOrigin(), atol=max(near, 1e-3))
        and np.allclose(image.GetDirection(), truth.GetDirection(), atol=1e-3)
    )


def _volumes(folder: Path) -> dict[str, Path]:
    """Name without its suffix -> file, or folder of one DICOM series."""
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if any(path.suffix == ".dcm" for path in entries):
        return {"series": folder}
    found = {
        re.sub(r"\.(nii\.gz|[^.]+)$", "", path.name): path
        for path in entries
        if path.is_dir() or path.name.endswith(IMAGE_SUFFIXES)
    }
    if not found:
        raise TrainingError(f"{folder}: no image in it; want {', '.join(IMAGE_SUFFIXES)} or DICOM")
    return found
