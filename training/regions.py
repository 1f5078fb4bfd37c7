"""Where a patient and each tissue is in a volume, and how the tissues of two volumes overlap."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from dicomnode.imaging.units import Unit
from training.similarity import Array, Mask

AIR_TO_BONE_HU = (-400.0, 160.0)
"""Air is below, bone above, soft tissue from the first to the second (Ang 2022)."""
CLASSES = ("air", "soft tissue", "bone")


def body_above(truth: Array, unit: Unit) -> float:
    """The value that separates the patient from the air: -500 HU, SUV 0.2, or Otsu's of an MR."""
    return {"HU": -500.0, "SUV": 0.2}.get(unit) or otsu(truth)


def otsu(values: Array) -> float:
    """The threshold that separates values best into two classes (Otsu 1979), of 256 bins."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    mean_below = np.cumsum(counts * centres) / np.maximum(below, 1)
    mean_above = (np.cumsum((counts * centres)[::-1]) / np.maximum(np.cumsum(counts[::-1]), 1))[
        ::-1
    ]
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(centres[int(np.argmax(between))])


def body_of(truth: Array, above: float) -> Mask:
    """The largest object above a value, slice by slice with what it encloses, the table cut off.

    Args:
        truth: (slices, rows, columns).
    """
    slim = np.ones((1, 3, 3), np.bool_)
    solid = ndimage.binary_opening(truth > above, slim, iterations=2)  # a table hangs by a thread
    labels, count = ndimage.label(solid)
    if count == 0:
        return np.asarray(truth > above, np.bool_)
    largest = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return np.stack([np.asarray(ndimage.binary_fill_holes(plane), np.bool_) for plane in largest])


def class_overlap(result: Array, truth: Array, edges: Sequence[float]) -> tuple[float, ...]:
    """Intersection over union of each class of values: below, between and above `edges`.

    A value equal to an edge is of the class below it, but for the first edge, whose class begins
    with it (as in Ang 2022: air < -400, soft tissue -400 to 160, bone > 160 HU).

    Returns:
        One per class; NaN where neither image has the class.
    """
    overlaps = []
    for own, wanted in zip(_classes(result, edges), _classes(truth, edges), strict=True):
        union = int((own | wanted).sum())
        overlaps.append(float((own & wanted).sum()) / union if union else float("nan"))
    return tuple(overlaps)


def _classes(image: Array, edges: Sequence[float]) -> list[Mask]:
    low, high = edges
    return [image < low, (image >= low) & (image <= high), image > high]
