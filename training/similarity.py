"""How near a result is to the truth: errors, peak signal-to-noise ratio, structural similarity.

Every image is (rows, columns) or (slices, rows, columns), float32 or float64, in a physical unit;
`low` and `high` say which values of that unit a figure is about. There is no default range: a
peak of 400 HU or of 4095 HU makes 20 dB of difference for the same two images.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.errors import TrainingError

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the five scales, finest first (Wang, Simoncelli and Bovik 2003)."""
WINDOW = 7
"""Side of the uniform window, pixels."""


def mean_absolute_error(result: Array, truth: Array, mask: Mask | None = None) -> float:
    """Mean of |result - truth| where `mask` is (everywhere: None), in their unit."""
    return float(np.abs(_error(result, truth, mask)).mean())


def bias(result: Array, truth: Array, mask: Mask | None = None) -> float:
    """Mean of result - truth, in their unit."""
    return float(_error(result, truth, mask).mean())


def root_mean_square(result: Array, truth: Array, mask: Mask | None = None) -> float:
    """Square root of the mean squared error, in their unit."""
    return float(np.sqrt((_error(result, truth, mask) ** 2).mean()))


def normalised_root_mean_square(result: Array, truth: Array, mask: Mask | None = None) -> float:
    """Root mean square of the error over that of the truth (Euclidean), no unit.

    Raises:
        TrainingError: the truth is zero everywhere.
    """
    wanted = truth if mask is None else truth[mask]
    size = float(np.sqrt((wanted.astype(np.float64) ** 2).mean()))
    if size == 0:
        raise TrainingError("nrmse: the truth is zero everywhere")
    return root_mean_square(result, truth, mask) / size


def peak_ratio(
    result: Array, truth: Array, low: float, high: float, mask: Mask | None = None
) -> float:
    """Peak signal-to-noise ratio of both clipped to [low, high], whose width is the peak, dB.

    Returns:
        Infinity for equal images.
    """
    error = _error(np.clip(result, low, high), np.clip(truth, low, high), mask)
    mean_square = float((error**2).mean())
    return float(10 * np.log10((high - low) ** 2 / mean_square)) if mean_square else float("inf")


def similarity_map(result: Array, truth: Array, width: float, gaussian: bool = False) -> Array:
    """Structural similarity of each pixel (Wang 2004, K 0.01 and 0.03), in the shape of the images.

    Args:
        width: of the range of values, in the images' unit.
        gaussian: a Gaussian window of 1.5 pixels cut at 5 and the population covariance, as in
            the paper; else a uniform window of 7 pixels and the sample covariance.

    Raises:
        TrainingError: an axis is shorter than the window.
    """
    if min(truth.shape) < (11 if gaussian else WINDOW):
        raise TrainingError(f"ssim: images of {truth.shape} are smaller than the window")
    one, two = (0.01 * width) ** 2, (0.03 * width) ** 2
    mean_x, mean_y, var_x, var_y, both = moments(result, truth, gaussian)
    top = (2 * mean_x * mean_y + one) * (2 * both + two)
    bottom = (mean_x**2 + mean_y**2 + one) * (var_x + var_y + two)
    return np.asarray(top / bottom)


def similarity(
    result: Array,
    truth: Array,
    low: float,
    high: float,
    *,
    mask: Mask | None = None,
    gaussian: bool = False,
) -> float:
    """Mean structural similarity of both clipped to [low, high] and shifted to start at zero.

    The border that the window does not fit into is left out; of the rest, the mean inside `mask`.
    scikit-image's `structural_similarity` (with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False` for `gaussian`) gives the same number.
    """
    x, y = (np.clip(image, low, high) - low for image in (result, truth))
    found = similarity_map(x, y, high - low, gaussian)
    return float(within(found, mask, 5 if gaussian else WINDOW // 2))


def within(found: Array, mask: Mask | None, border: int) -> np.float64:
    """Mean of a map without its border, inside `mask`; NaN where nothing is left."""
    inner = tuple(slice(border, side - border) for side in found.shape)
    kept = found[inner] if mask is None else found[inner][mask[inner]]
    return kept.mean(dtype=np.float64) if kept.size else np.float64(np.nan)


def similarity_of_scales(
    result: Array,
    truth: Array,
    low: float,
    high: float,
    *,
    weights: Sequence[float] = SCALES,
) -> float:
    """Multi-scale structural similarity of one slice (Wang 2003), both clipped to [low, high].

    Gaussian windows; contrast and structure at every scale, luminance at the last; from scale to
    scale the mean of 2 x 2 pixels. MONAI gives the same number; torchmetrics counts the border of
    the last scale, continued by reflection, as well.

    Args:
        result, truth: (rows, columns).

    Raises:
        TrainingError: a side is shorter than the window at the last scale.
    """
    smallest = 11 * 2 ** (len(weights) - 1)
    if min(truth.shape) < smallest:
        raise TrainingError(f"ms_ssim: {truth.shape} is too small; want {smallest} or more")
    x: Array = np.clip(result, low, high).astype(np.float64) - low
    y: Array = np.clip(truth, low, high).astype(np.float64) - low
    one, two = (0.01 * (high - low)) ** 2, (0.03 * (high - low)) ** 2
    product = 1.0
    for scale, weight in enumerate(weights):
        mean_x, mean_y, var_x, var_y, both = moments(x, y, gaussian=True)
        contrast = (2 * both + two) / (var_x + var_y + two)
        if scale == len(weights) - 1:
            contrast *= (2 * mean_x * mean_y + one) / (mean_x**2 + mean_y**2 + one)
        product *= max(0.0, float(within(contrast, None, 5))) ** weight
        x, y = halved(x), halved(y)
    return product


def halved(plane: Array) -> Array:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    rows, columns = (side // 2 for side in plane.shape)
    squares = plane[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2)
    return np.asarray(squares.mean(axis=(1, 3)))


def moments(x: Array, y: Array, gaussian: bool) -> tuple[Array, Array, Array, Array, Array]:
    """Local means, variances and covariance, each in the shape of the images."""

    def local(image: Array) -> Array:
        if gaussian:
            return np.asarray(ndimage.gaussian_filter(image, 1.5, truncate=3.5))
        return np.asarray(ndimage.uniform_filter(image, size=WINDOW))

    count = WINDOW**x.ndim
    norm = 1.0 if gaussian else count / (count - 1)
    mean_x, mean_y = local(x), local(y)
    return (
        mean_x,
        mean_y,
        norm * (local(x * x) - mean_x * mean_x),
        norm * (local(y * y) - mean_y * mean_y),
        norm * (local(x * y) - mean_x * mean_y),
    )


def _error(result: Array, truth: Array, mask: Mask | None) -> NDArray[np.float64]:
    if result.shape != truth.shape:
        raise TrainingError(f"result {result.shape} and truth {truth.shape} differ in size")
    if mask is None:
        return np.asarray(result.astype(np.float64) - truth)
    if not mask.any():
        return np.full(1, np.nan)
    return np.asarray(result[mask].astype(np.float64) - truth[mask])
