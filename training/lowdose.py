"""Lower-dose versions of real CT slices: their own noise measured, more of it inserted.

A real slice stands for full dose. Its own noise is measured where tissue is uniform: how strong,
and how correlated, which tells the reconstruction kernel. Simulated quantum noise
(dicomnode.imaging.projection) is brought to the same strength and correlation. A dose of `a` times
the full one has 1/a times the variance, so the noise to add has 1/a - 1 times the slice's own.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special

from dicomnode.imaging.projection import quantum_noise
from training.errors import TrainingError

REFERENCE_PHOTONS = 1e6
"""Photons per ray of the noise that is scaled to the slice's own."""
_BLOCK = 8
_QUIET = 25.0
"""Blocks without structure are the quietest: this percentile of their variance is compared."""
_CUTOFFS_PER_MM = np.arange(0.40, 1.61, 0.05)


@dataclass(frozen=True, slots=True)
class OwnNoise:
    """What a slice holds itself, in uniform soft tissue."""

    deviation_hu: float
    """Standard deviation of what is finer than about 6 mm, HU."""
    correlation: float
    """Correlation of neighbouring pixels, -1 to 1."""


def measure_noise(hu: NDArray[np.float32], pixel_spacing_mm: float) -> OwnNoise:
    """Strength and correlation of the noise in one slice, (rows, columns), float32, HU.

    Raises:
        TrainingError: the slice has too little soft tissue to measure.
    """
    fine, blocks = _soft_tissue_blocks(hu, pixel_spacing_mm)
    variance = _block_means(fine**2, blocks)
    quiet = variance <= np.percentile(variance, 2 * _QUIET)
    products = [_block_means(fine * np.roll(fine, 1, axis), blocks)[quiet] for axis in (0, 1)]
    return OwnNoise(
        deviation_hu=math.sqrt(np.percentile(variance, _QUIET)),
        correlation=float(np.mean(products) / np.mean(variance[quiet])),
    )


def kernel_cutoff(correlation: float, pixel_spacing_mm: float) -> float:
    """End of the reconstruction kernel, 1/mm, that gives noise this correlation of neighbours."""
    table = [_expected_correlation(cutoff, pixel_spacing_mm) for cutoff in _CUTOFFS_PER_MM]
    return float(_CUTOFFS_PER_MM[np.argmin(np.abs(np.asarray(table) - correlation))])


def own_noise_again(
    hu: NDArray[np.float32],
    pixel_spacing_mm: float,
    realisations: int,
    rng: np.random.Generator,
    views: int = 360,
) -> NDArray[np.float32]:
    """Further noise like the slice's own: what half the dose would add.

    Args:
        hu: (rows, columns), float32, HU.

    Returns:
        (realisations, rows, columns), float32, HU.

    Raises:
        TrainingError: the slice's own noise cannot be measured.
    """
    own = measure_noise(hu, pixel_spacing_mm)
    noise = quantum_noise(
        np.repeat(hu[None], realisations, axis=0),
        pixel_spacing_mm,
        math.inf,
        REFERENCE_PHOTONS,
        rng,
        views=views,
        cutoff_per_mm=kernel_cutoff(own.correlation, pixel_spacing_mm),
    )
    _, blocks = _soft_tissue_blocks(hu, pixel_spacing_mm)
    quiet = [
        np.percentile(_block_means(_fine(plane, pixel_spacing_mm) ** 2, blocks), _QUIET)
        for plane in noise
    ]
    return noise * np.float32(own.deviation_hu / math.sqrt(np.mean(quiet)))


def insert_low_dose(
    hu: NDArray[np.float32], own_noise: NDArray[np.float32], dose: float
) -> NDArray[np.float32]:
    """A slice as `dose` (0 to 1) times its own would show it; all (rows, columns), float32, HU.

    Args:
        own_noise: one realisation of `own_noise_again`.
    """
    return hu + own_noise * np.float32(math.sqrt(1.0 / dose - 1.0))


def _soft_tissue_blocks(
    hu: NDArray[np.float32], pixel_spacing_mm: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Detail finer than 6 mm (rows, columns), and which blocks lie wholly in soft tissue."""
    smooth = ndimage.gaussian_filter(hu, 2.0 / pixel_spacing_mm)
    tissue = ndimage.binary_erosion((smooth > 0) & (smooth < 150), iterations=3)
    blocks: NDArray[np.bool_] = np.asarray(_as_blocks(tissue).all(axis=(1, 3)))
    if blocks.sum() < 20:
        raise TrainingError("too little soft tissue to measure the noise of a slice")
    return _fine(hu, pixel_spacing_mm), blocks


def _fine(hu: NDArray[np.float32], pixel_spacing_mm: float) -> NDArray[np.float32]:
    return np.asarray(hu - ndimage.gaussian_filter(hu, _fine_sigma(pixel_spacing_mm)), np.float32)


def _fine_sigma(pixel_spacing_mm: float) -> float:
    """Standard deviation, pixels, of a Gaussian of 6 mm full width at half maximum."""
    return 6.0 / pixel_spacing_mm / 2.355


def _as_blocks(plane: NDArray[np.generic]) -> NDArray[np.generic]:
    """(rows, columns) -> (rows / 8, 8, columns / 8, 8), the remainder cut off."""
    rows, columns = (size // _BLOCK for size in plane.shape)
    whole = plane[: rows * _BLOCK, : columns * _BLOCK]
    return whole.reshape(rows, _BLOCK, columns, _BLOCK)


def _block_means(plane: NDArray[np.float32], blocks: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray(_as_blocks(plane).mean(axis=(1, 3))[blocks], np.float64)


def _expected_correlation(cutoff_per_mm: float, pixel_spacing_mm: float) -> float:
    """Of neighbours in noise after the ramp, a Hann window, and the 6 mm high-pass above."""
    f = np.linspace(1e-3, 0.5 / pixel_spacing_mm, 400)  # up to the Nyquist frequency
    hann = np.where(f < cutoff_per_mm, 0.5 + 0.5 * np.cos(np.pi * f / cutoff_per_mm), 0.0)
    sigma_mm = _fine_sigma(pixel_spacing_mm) * pixel_spacing_mm
    high_pass = 1.0 - np.exp(-2.0 * (np.pi * f * sigma_mm) ** 2)
    power = f * hann**2 * high_pass**2 * f  # the second f: rings of the plane grow with f
    ring = special.j0(2 * np.pi * f * pixel_spacing_mm)
    return float((power * ring).sum() / power.sum())
