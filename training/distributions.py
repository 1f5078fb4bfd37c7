"""How the values, the noise and the features of many images are spread, and how far apart that is.

None of these needs a result and its truth to show the same place.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from training.errors import TrainingError
from training.similarity import Array, Mask

Features = NDArray[np.float64]
_RANKS = 4096


def histogram_distance(values: Array, others: Array) -> float:
    """First Wasserstein distance of two sets of values, in their unit.

    The mean distance of equal ranks, of which 4096 are compared.

    Raises:
        TrainingError: a set is empty.
    """
    if not values.size or not others.size:
        raise TrainingError("histogram: no values to compare")
    ranks = (np.arange(_RANKS) + 0.5) / _RANKS
    return float(np.abs(np.quantile(values, ranks) - np.quantile(others, ranks)).mean())


def noise_spectrum(image: Array, mask: Mask, side: int = 32) -> NDArray[np.float64] | None:
    """Noise power by spatial frequency, the mean over squares that lie in `mask`.

    Args:
        image, mask: (rows, columns).
        side: of a square, pixels. From each the best fitting plane is taken off.

    Returns:
        (side // 2,), unit squared per pixel: mean power at 1, 2, ... turns per square; None where
        no square fits into `mask`.
    """
    squares = [
        image[top : top + side, left : left + side].astype(np.float64)
        for top in range(0, image.shape[0] - side + 1, side // 2)
        for left in range(0, image.shape[1] - side + 1, side // 2)
        if mask[top : top + side, left : left + side].all()
    ]
    if not squares:
        return None
    flat = np.stack(squares).reshape(len(squares), -1)
    row, column = np.indices((side, side)).reshape(2, -1) - (side - 1) / 2
    plane = np.stack([np.ones(side * side), row, column], axis=1)
    plane /= np.linalg.norm(plane, axis=0)
    noise = (flat - flat @ plane @ plane.T).reshape(-1, side, side)
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(axis=0) / side**2
    turns = np.fft.fftfreq(side, 1 / side)
    ring = np.rint(np.hypot(*np.meshgrid(turns, turns))).astype(np.intp)
    inside = ring <= side // 2
    total = np.bincount(ring[inside], power[inside], side // 2 + 1)
    count = np.bincount(ring[inside], minlength=side // 2 + 1)
    return np.asarray(total[1:] / count[1:])


def spectrum_distance(spectrum: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Sum of the absolute differences of two noise spectra over the sum of the second; 0: equal."""
    return float(np.abs(spectrum - other).sum() / max(float(other.sum()), 1e-12))


def jitter(result: Array, truth: Array, mask: Mask) -> float:
    """Mean change from slice to slice in `mask`, over that of the truth; above 1: it flickers.

    Args:
        result, truth, mask: (slices, rows, columns).

    Returns:
        NaN with one slice, or where the truth does not change.
    """
    both = mask[1:] & mask[:-1]
    if not both.any():
        return float("nan")
    own, wanted = (
        float(np.abs(np.diff(image.astype(np.float64), axis=0))[both].mean())
        for image in (result, truth)
    )
    return own / wanted if wanted else float("nan")


def frechet_distance(features: Features, others: Features) -> float:
    """Fréchet distance of two sets of features taken as normal (Heusel 2017), (images, length).

    Raises:
        TrainingError: a set has fewer than two images, or their lengths differ.
    """
    _check(features, others)
    means = features.mean(0) - others.mean(0)
    one, two = (np.atleast_2d(np.cov(kept, rowvar=False)) for kept in (features, others))
    # trace of the root of a product of covariances: its eigenvalues are real and not negative
    roots = np.sqrt(np.clip(linalg.eigvals(one @ two).real, 0.0, None)).sum()
    return float(means @ means + np.trace(one) + np.trace(two) - 2 * roots)


def kernel_distance(features: Features, others: Features) -> float:
    """Unbiased squared maximum mean discrepancy, kernel (x.y / length + 1)^3 (Binkowski 2018).

    Of all images at once, not of subsets. (images, length). It can be below zero.

    Raises:
        TrainingError: as `frechet_distance`.
    """
    _check(features, others)
    length = features.shape[1]

    def kernel(x: Features, y: Features) -> Features:
        return np.asarray((x @ y.T / length + 1.0) ** 3)

    def within(x: Features) -> float:
        every = kernel(x, x)
        return float((every.sum() - np.trace(every)) / (len(x) * (len(x) - 1)))

    return within(features) + within(others) - 2 * float(kernel(features, others).mean())


def rank_warning(number: int, other: int, length: int) -> str | None:
    """Why a Fréchet distance of so few images is not to be trusted; None: there are enough."""
    fewest = min(number, other)
    if fewest >= 2 * length:
        return None
    return (
        f"{fewest} images for {length} features: a covariance of that many needs {2 * length} or "
        "more; the distance is too large, and comparable only at the same number"
    )


def _check(features: Features, others: Features) -> None:
    if features.ndim != 2 or others.ndim != 2 or features.shape[1] != others.shape[1]:
        raise TrainingError(f"features: {features.shape} and {others.shape} do not fit together")
    if min(len(features), len(others)) < 2:
        raise TrainingError("features: two images or more of each kind are needed")
