"""Labelled activity maps for the delayed-PET phantoms: drawn by formula, or real FDG PET.

A map says for each voxel which tissue it is (a row of `CLASSES`) and its SUV an hour after
injection. Axes are slices (feet to head), rows (front to back), columns (right to left).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.errors import TrainingError
from training.images import onto, read_image, voxels_of

CLASSES = (
    *("outside", "muscle", "fat", "lung", "marrow", "blood", "liver", "spleen", "kidney"),
    *("myocardium", "grey matter", "white matter", "tumour", "urine"),
)
MATRIX, SPACING_MM, SLICE_MM = 96, 4.6875, 3.27
_HOUR_SUV = {  # mean and relative spread of patients: usual values of FDG reports
    "muscle": (0.7, 0.2),
    "fat": (0.3, 0.3),
    "lung": (0.5, 0.2),
    "marrow": (1.2, 0.25),
    "blood": (1.7, 0.2),
    "liver": (2.3, 0.2),
    "spleen": (2.0, 0.2),
    "kidney": (2.6, 0.25),
    "myocardium": (5.0, 0.7),
    "grey matter": (8.0, 0.25),
    "white matter": (3.0, 0.25),
    "tumour": (6.0, 0.6),
    "urine": (15.0, 0.7),
}


@dataclass(frozen=True, slots=True, eq=False)
class ActivityMap:
    """Labels, (slices, rows, columns), uint8; parts of one class that are their own lesion or
    organ, same shape, int32, from 1; SUV at an hour, same shape, float32; (z, y, x) voxel in mm.
    """

    labels: NDArray[np.uint8]
    parts: NDArray[np.int32]
    suv: NDArray[np.float32]
    spacing_mm: tuple[float, float, float]


def drawn_body(rng: np.random.Generator, slices: int = 48) -> ActivityMap:
    """A stretch of a body with its organs and some lesions, no two alike.

    Raises:
        ValueError: fewer than 8 slices.
    """
    if slices < 8:
        raise ValueError("slices: at least 8")
    foot = rng.uniform(-480, 580 - slices * SLICE_MM)
    heights = foot + np.arange(slices) * SLICE_MM
    across = (np.arange(MATRIX) - (MATRIX - 1) / 2) * SPACING_MM
    grid = np.meshgrid(heights, across, across, indexing="ij")
    labels = np.zeros(grid[0].shape, np.uint8)
    for name, shape in (*_trunk(rng), *_organs(rng)):
        labels[_inside(grid, shape)] = CLASSES.index(name)
    _add_lesions(labels, rng)
    parts = _parts(labels)
    suv = np.zeros(labels.shape, np.float32)
    for part in range(1, parts.max() + 1):
        inside = parts == part
        mean, spread = _HOUR_SUV[CLASSES[labels[inside][0]]]
        suv[inside] = min(mean * np.exp(spread * rng.standard_normal()), 40.0)
    texture = ndimage.gaussian_filter(rng.standard_normal(suv.shape).astype(np.float32), 1.5)
    suv *= 1 + 0.1 * texture / texture.std()
    return ActivityMap(labels, parts, _blurred(suv), (SLICE_MM, SPACING_MM, SPACING_MM))


def _trunk(rng: np.random.Generator) -> list[tuple[str, tuple[float, ...]]]:
    """Tissue and column with rounded ends: as in `_organs`."""
    wide, front = rng.uniform(140, 200), rng.uniform(90, 140)
    leg = rng.uniform(65, 90)
    columns = []
    for side in (-1, 1):
        columns += [
            ("fat", (-560, 0, side * 95, 320, leg, leg, 8.0)),
            ("muscle", (-560, 0, side * 95, 320, leg * 0.85, leg * 0.85, 8.0)),
            ("marrow", (-560, 0, side * 95, 320, 14, 14, 8.0)),
        ]
    return [
        *columns,
        ("fat", (-30, 0, 0, 340, front, wide, 8.0)),
        ("muscle", (-30, 0, 0, 335, front - 14, wide - 20, 8.0)),
        ("fat", (-190, -20, 0, 120, front * 0.55, wide * 0.6, 2.0)),
        ("marrow", (-50, front * 0.55, 0, 350, 17, 17, 8.0)),
        ("blood", (-40, front * 0.35, 5, 200, 11, 11, 8.0)),
        ("muscle", (400, 20, 0, 130, 55, 55, 8.0)),
    ]


def _organs(rng: np.random.Generator) -> list[tuple[str, tuple[float, ...]]]:
    """Tissue and ellipsoid: centre z, y, x, half axes z, y, x, mm; later ones cover earlier ones.

    Heights count from the dome of the diaphragm.
    """
    size = rng.uniform(0.9, 1.1)

    def ellipsoid(z: float, y: float, x: float, *axes: float) -> tuple[float, ...]:
        moved = np.array([z, y, x]) + rng.normal(0, 6, 3)
        return (*(moved * size), *(np.array(axes) * size * rng.uniform(0.9, 1.1, 3)), 2.0)

    organs = [
        *(("lung", ellipsoid(95, 0, side * 82, 120, 75, 55)) for side in (-1, 1)),
        ("blood", ellipsoid(130, 0, 0, 75, 32, 28)),
        ("liver", ellipsoid(-55, -10, -62, 75, 72, 72)),
        ("spleen", ellipsoid(-60, 35, 105, 48, 30, 28)),
        *(("kidney", ellipsoid(-130, 45, side * 62, 52, 24, 26)) for side in (-1, 1)),
        *(("urine", ellipsoid(-130, 45, side * 50, 12, 8, 8)) for side in (-1, 1)),
        ("urine", ellipsoid(-330, -10, 0, 28, 30, 38)),
    ]
    if rng.random() < 0.6:
        heart = ellipsoid(40, -20, 42, 42, 36, 38)
        cavity = (*heart[:3], *(axis * 0.6 for axis in heart[3:6]), 2.0)
        organs += [("myocardium", heart), ("blood", cavity)]
    head = ellipsoid(480, 0, 0, 85, 95, 75)
    brain = (head[0] + 25, *head[1:3], 62.0, 80.0, 66.0, 2.0)
    deep = (*brain[:3], *(axis * 0.72 for axis in brain[3:6]), 2.0)
    organs += [("muscle", head), ("grey matter", brain), ("white matter", deep)]
    return [*organs, ("grey matter", (*brain[:3], 22.0, 20.0, 26.0, 2.0))]


def _inside(grid: Sequence[NDArray[Any]], shape: tuple[float, ...]) -> NDArray[np.bool_]:
    """`shape`: centre, half axes, and the power of the first axis: 2 an ellipsoid, 8 a column."""
    z, y, x = (
        np.abs((axis - centre) / half)
        for axis, centre, half in zip(grid, shape[:3], shape[3:6], strict=True)
    )
    return np.asarray(z ** shape[6] + y**2 + x**2 <= 1.0)


def _add_lesions(labels: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Up to six round lesions of 8 to 60 mm somewhere in the body."""
    body = np.argwhere(labels > 0)
    axes = np.meshgrid(*(np.arange(n) for n in labels.shape), indexing="ij")
    for _ in range(int(rng.integers(1, 7)) if len(body) else 0):
        centre = body[rng.integers(len(body))]
        radius = np.exp(rng.uniform(np.log(4), np.log(30)))
        halves = radius * rng.uniform(0.8, 1.25, 3) / (SLICE_MM, SPACING_MM, SPACING_MM)
        inside = _inside(axes, (*centre, *halves, 2.0)) & (labels > 0)
        labels[inside] = CLASSES.index("tumour")


def _parts(labels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Every connected part of every class has a number of its own, from 1."""
    parts = np.zeros(labels.shape, np.int32)
    for label in range(1, len(CLASSES)):
        found, _ = ndimage.label(labels == label)
        parts[found > 0] = found[found > 0] + parts.max()
    return parts


def _blurred(suv: NDArray[np.float32]) -> NDArray[np.float32]:
    """As a scanner of 6 mm resolution shows it."""
    sigma = [6.0 / 2.355 / mm for mm in (SLICE_MM, SPACING_MM, SPACING_MM)]
    return np.asarray(ndimage.gaussian_filter(suv, sigma), np.float32)


def real_limb(pet: Path, ct: Path, tumour: Path | None) -> ActivityMap:
    """A real FDG PET of a limb with tissues from its CT and the drawn tumour.

    Args:
        pet: in SUV, acquired about an hour after injection.
        ct: in HU, of the same place.
        tumour: mask on the lattice of the PET; None: everything above 2.5 SUV.
    """
    image = read_image(pet, "SUV")
    suv = voxels_of(image)
    hu, covered = onto(read_image(ct, "HU"), image, -1000.0)
    density = voxels_of(hu)
    labels = np.full(suv.shape, CLASSES.index("muscle"), np.uint8)
    labels[density < -30] = CLASSES.index("fat")
    labels[density > 180] = CLASSES.index("marrow")
    hot = suv > 2.5 if tumour is None else voxels_of(read_image(tumour, "SUV")) > 0.5
    labels[hot] = CLASSES.index("tumour")
    labels[(density < -400) | ~covered] = 0
    spacing = image.GetSpacing()
    return ActivityMap(labels, _parts(labels), suv, (spacing[2], spacing[1], spacing[0]))


_BOXES = (  # class, slices, columns, SUV above which it is that: read off the images by eye
    ("tumour", (8, 46), (0, 128), 2.0),
    ("urine", (50, 95), (50, 80), 6.0),
    ("kidney", (106, 150), (44, 92), 2.4),
    ("urine", (106, 150), (44, 92), 8.0),
    ("spleen", (137, 174), (82, 101), 1.4),
    ("liver", (124, 174), (36, 76), 1.5),
    ("myocardium", (163, 192), (64, 88), 3.5),
    ("grey matter", (258, 267), (0, 128), 4.0),
)


def real_whole_body(pet: Path) -> ActivityMap:
    """The whole-body FDG PET of patient STS_001 of Soft-tissue-Sarcoma, labelled by hand.

    No CT of it is at hand: muscle stands for everything that is not listed, lung for what is
    colder than it between diaphragm and neck.

    Raises:
        TrainingError: it is another series: the labels would not fit.
    """
    image = read_image(pet, "SUV")
    suv = voxels_of(image)
    if suv.shape != (267, 128, 128):
        raise TrainingError(f"{pet}: not the series of 267 slices whose organs are known")
    smooth = ndimage.gaussian_filter(suv, 1.0)
    body = ndimage.binary_fill_holes(smooth > 0.15)
    labels = np.where(body, CLASSES.index("muscle"), 0).astype(np.uint8)
    chest = labels[165:230]
    chest[(smooth[165:230] < 0.45) & (chest > 0)] = CLASSES.index("lung")
    for name, (first, last), (left, right), least in _BOXES:
        box = np.s_[first:last, :, left:right]
        labels[box][(smooth[box] > least) & (labels[box] > 0)] = CLASSES.index(name)
    spacing = image.GetSpacing()
    return ActivityMap(labels, _parts(labels), suv, (spacing[2], spacing[1], spacing[0]))
