"""Figures of merit in HU. Every image is (rows, columns), float32, HU; masks are bool.

`truth` is the full-dose image: real, so it holds noise of its own. A perfect denoiser of a
quarter-dose image therefore gains about 6 dB against it, not infinitely many.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
SOFT_TISSUE_WINDOW = (-160.0, 240.0)
TISSUES = {
    "lung": (-980.0, -600.0),
    "fat": (-140.0, -60.0),
    "soft tissue": (0.0, 120.0),
    "bone": (250.0, 2000.0),
}
"""Range of the locally averaged full-dose image, HU."""


def body_mask(truth: Image) -> Mask:
    """The largest object denser than -500 HU, with what it encloses (lung, bowel gas)."""
    labels, count = ndimage.label(ndimage.binary_opening(truth > -500, iterations=2))
    if count == 0:
        return np.zeros(truth.shape, np.bool_)
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return np.asarray(ndimage.binary_fill_holes(labels == largest), np.bool_)


def psnr(result: Image, truth: Image, mask: Mask, window: tuple[float, float]) -> float:
    """Peak signal-to-noise ratio inside `mask`, both clipped to `window`, range = its width, dB."""
    low, high = window
    error = np.clip(result, low, high) - np.clip(truth, low, high)
    return float(10 * np.log10((high - low) ** 2 / np.mean(error[mask].astype(np.float64) ** 2)))


def tissue_masks(truth: Image, pixel_spacing_mm: float, body: Mask) -> dict[str, Mask]:
    """Where each tissue is, one pixel away from its border.

    Decided on the full-dose image averaged over 3 mm. Without the average, noise itself would
    decide: "bone" would be the pixels that noise pushed up, which any denoiser seems to lower.
    """
    smooth = ndimage.gaussian_filter(truth, 1.3 / pixel_spacing_mm)
    return {
        name: ndimage.binary_erosion((smooth >= low) & (smooth <= high) & body)
        for name, (low, high) in TISSUES.items()
    }


def edge_retention(result: Image, truth: Image, pixel_spacing_mm: float, body: Mask) -> float:
    """Share of the steepness of soft-tissue edges that is left; 1: all of it.

    Edges are the steepest 5 % of the body's pixels with nothing outside -160 to 240 HU within
    4 mm: fat, muscle, vessels and organs. (Blurred lung or bone would spill steep slopes over
    their neighbours.) The direction of an edge comes from the full-dose image averaged over 2 mm;
    noise averages out of the projection on a fixed direction and cannot pass for sharpness.
    """
    smooth = ndimage.gaussian_filter(truth, 0.85 / pixel_spacing_mm)
    low, high = SOFT_TISSUE_WINDOW
    reach = max(1, round(4.0 / pixel_spacing_mm))
    inside = ndimage.binary_erosion(body & (smooth > low) & (smooth < high), iterations=reach)
    reference = _gradient(smooth)
    steepness = np.hypot(*reference)
    edges = inside & (steepness >= np.percentile(steepness[inside], 95))

    def slope(image: Image) -> float:
        return float((_gradient(image) * reference)[:, edges].sum())

    return slope(result) / slope(truth)


def _gradient(image: Image) -> Image:
    """(2, rows, columns): down the rows, along the columns, HU per pixel."""
    return np.stack([np.gradient(image, axis=axis) for axis in (0, 1)])


def noise_left(result: Image, low: Image, truth: Image, tissue: Mask) -> float:
    """Standard deviation of the error in a tissue, over that of the input there; 1: all is left."""
    return float((result - truth)[tissue].std() / (low - truth)[tissue].std())


@dataclass(frozen=True, slots=True)
class Insert:
    """A known detail to be put into an image: a round spot with a soft rim."""

    diameter_mm: float
    contrast_hu: float

    def __str__(self) -> str:
        return f"{self.diameter_mm:g} mm {self.contrast_hu:+g} HU"


INSERTS = (Insert(6.0, -30.0), Insert(4.0, 50.0))
"""A hypodense lesion and a small enhanced vessel."""


def insert_image(
    truth: Image, pixel_spacing_mm: float, insert: Insert, rng: np.random.Generator
) -> Image:
    """Up to 12 copies of `insert` in soft tissue, 25 mm apart, zero elsewhere."""
    smooth = ndimage.gaussian_filter(truth, 2.0 / pixel_spacing_mm)
    room = int(np.ceil(insert.diameter_mm / pixel_spacing_mm))
    allowed = ndimage.binary_erosion((smooth > 0) & (smooth < 150), iterations=room)
    rows, columns = np.indices(truth.shape, dtype=np.float32)
    image = np.zeros_like(truth)
    for _ in range(12):
        places = np.argwhere(allowed)
        if not len(places):
            break
        row, column = places[rng.integers(len(places))]
        distance_mm = np.hypot(rows - row, columns - column) * pixel_spacing_mm
        rim = (insert.diameter_mm / 2 - distance_mm) / pixel_spacing_mm + 0.5
        image += np.float32(insert.contrast_hu) * np.clip(rim, 0.0, 1.0)
        allowed &= distance_mm > 25.0
    return image


def insert_recovery(with_insert: Image, without: Image, inserted: Image) -> float:
    """Share of the inserted contrast that a method lets through; 1: all of it.

    The difference of its results with and without the insert, under the same noise, projected on
    the insert: what does not change with the detail cannot count as the detail.
    """
    return float(((with_insert - without) * inserted).sum() / (inserted**2).sum())


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % interval by bootstrap; `values`: one per patient."""
    data = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(5000, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(data.mean()), float(low), float(high)
