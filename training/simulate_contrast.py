"""Make pairs of CT without and with contrast agent: the data of models/cect.

    python training/simulate_contrast.py ../shared/data runs/contrast-pairs

Only enhanced CT is at hand in number. So the enhancement of real enhanced slices is found
and taken off by calculation, texture and noise left in place: that is the source. The target is the
source with the same enhancement, weakened where it was arterial. What is not found (small or mixed
vessels) stays bright in both. Writes OUT/PATIENT/NUMBER/{plain,enhanced}.nii.gz.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread
from scipy import ndimage

from dicomnode.errors import DicomNodeError
from training.data import patient_hash
from training.errors import TrainingError
from training.images import read_image, voxels_of

SERIES = (
    "dicom/ct/chest_contrast_LIDC-IDRI-0001_jpegls",
    "dicom/ct/contrast_abdomen_GE_CRLM-CT-1004",
)
SLICES = "training/ct_slices_contrast_labelled/*CONTRAST_1*"
PLAIN_HU = 45.0
"""Of blood and organs without agent, where the enhancement was."""
MOST_HU = 150.0
"""What the strongest twentieth of a slice's enhancement is weakened to: a venous phase."""
_SMALLEST_MM2 = 30.0

Plane = NDArray[np.float32]


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise TrainingError("usage: python training/simulate_contrast.py DATA OUT")
    data, out = Path(argv[0]), Path(argv[1])
    sources = [*(data / name for name in SERIES), *sorted(data.glob(SLICES))]
    if len(sources) == len(SERIES) or not all(path.exists() for path in sources):
        raise TrainingError(f"{data}: {SERIES[0]}, {SERIES[1]} or {SLICES} is not there")
    for number, path in enumerate(sources):
        first = path if path.is_file() else next(p for p in sorted(path.rglob("*.dcm")))
        patient = patient_hash(dcmread(first, stop_before_pixels=True))
        write_pair(out / patient / f"{number:03}", path)
    print(f"{len(list(out.glob('*/*/enhanced.nii.gz')))} pairs in {out}")


def write_pair(folder: Path, path: Path) -> None:
    """A real enhanced series or slice without and with its enhancement, as NIfTI in HU."""
    image = read_image(path, "HU")
    mm = float(image.GetSpacing()[0])
    pairs = [pair_of(plane, mm) for plane in voxels_of(image)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, planes in zip(("plain", "enhanced"), zip(*pairs, strict=True), strict=True):
        made = sitk.GetImageFromArray(np.rint(np.stack(planes)).astype(np.int16))
        made.SetSpacing(image.GetSpacing())
        sitk.WriteImage(made, str(folder / f"{name}.nii.gz"))


def pair_of(hu: Plane, mm: float) -> tuple[Plane, Plane]:
    """A slice without its enhancement, and with it at most `MOST_HU` strong."""
    enhancement = enhancement_of(hu, mm)
    plain = hu - enhancement
    found = enhancement[enhancement > 10]
    strongest = float(np.percentile(found, 95)) if found.size else 0.0
    weaker = min(1.0, MOST_HU / strongest) if strongest else 1.0
    return plain, plain + np.float32(weaker) * enhancement


def enhancement_of(hu: Plane, mm: float) -> Plane:
    """How much brighter than `PLAIN_HU` enhanced blood and organs of a slice are.

    Regions are uniform, 85 to 650 HU, and not enclosed by something as bright, which is bone.
    Inside them the enhancement is the smooth level, so that noise stays in the image; at their
    border it goes down with the share of blood in a pixel.

    Args:
        hu: (rows, columns), float32, HU.
        mm: pixel spacing.

    Returns:
        (rows, columns), float32, HU; 0 where nothing is enhanced.
    """
    level = _regions(hu, mm)
    core = level > 0
    if not core.any():
        return np.zeros_like(hu)
    away, nearest = ndimage.distance_transform_edt(~core, return_indices=True)
    level = level[tuple(nearest)]
    smooth = ndimage.gaussian_filter(hu, 1.0 / mm)
    share = np.clip(
        (ndimage.gaussian_filter(hu, 0.6 / mm) - 50) / np.maximum(level - 50, 20), 0, 1.15
    )
    share[(away * mm > 7) | (smooth > 1.35 * level + 40)] = 0
    share[~ndimage.binary_propagation(core, mask=share > 0.12)] = 0
    border = share * (level - PLAIN_HU)
    weight = np.maximum(ndimage.gaussian_filter(core.astype(np.float32), 3 / mm), 1e-3)
    inner = ndimage.gaussian_filter(np.where(core, smooth, 0), 3 / mm) / weight - PLAIN_HU
    deep = np.clip(ndimage.distance_transform_edt(core) * mm / 3, 0, 1)
    result = np.where(core, deep * inner + (1 - deep) * border, border)
    return np.asarray(np.maximum(result, 0), np.float32)


def _regions(hu: Plane, mm: float) -> Plane:
    """The median HU of each enhanced region inside it; 0 elsewhere."""
    smooth = ndimage.gaussian_filter(hu, 1.0 / mm)
    mean = ndimage.gaussian_filter(hu, 2.0 / mm)
    spread = np.sqrt(np.maximum(ndimage.gaussian_filter(hu**2, 2.0 / mm) - mean**2, 0))
    uniform = (smooth > 85) & (smooth < 650) & (spread < np.maximum(22, 0.14 * smooth))
    opened = ndimage.binary_opening(uniform, iterations=max(1, round(1.0 / mm)))
    labels, _ = ndimage.label(opened)
    level = np.zeros_like(hu)
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        wide = tuple(slice(max(0, s.start - int(8 / mm)), s.stop + int(8 / mm)) for s in box)
        inside, values = labels[wide] == number, smooth[wide]
        if inside.sum() * mm**2 < _SMALLEST_MM2:
            continue
        own = float(np.median(values[inside]))
        alike = (values > 0.5 * (own + 50)) & (values < 1.25 * own + 20)
        away = ndimage.distance_transform_edt(~inside) * mm
        whole = ndimage.binary_propagation(inside, mask=inside | (alike & (away < 6)))
        away = ndimage.distance_transform_edt(~whole) * mm
        rim, around = values[(away > 0.3) & (away < 2.5)], values[(away > 1.0) & (away < 4.0)]
        shell = own > 130 and np.mean(rim > own) > 0.35
        if not shell and np.mean(around > own + 60) <= 0.2:
            level[wide][inside] = own
    return level


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
