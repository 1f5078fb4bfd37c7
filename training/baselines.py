"""Simple filters that a trained denoiser must beat; each with strengths from weak to strong.

All images (rows, columns), float32, HU.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

Image = NDArray[np.float32]
GAUSSIAN_SIGMAS_MM = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4)
MEANS_STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
"""Of non-local means, times the noise."""


def gaussian(low: Image, pixel_spacing_mm: float, sigmas_mm: Sequence[float]) -> list[Image]:
    """One filtered image per standard deviation."""
    return [ndimage.gaussian_filter(low, sigma / pixel_spacing_mm) for sigma in sigmas_mm]


def non_local_means(
    low: Image, noise_hu: float, strengths: Sequence[float], *, patch: int = 5, reach: int = 8
) -> list[Image]:
    """Buades 2005: each pixel the mean of pixels whose neighbourhoods look alike.

    One filtered image per strength h: weights exp(-max(d^2 - 2 s^2, 0) / (h s)^2), d^2 the mean
    squared difference of the patches, s the standard deviation of the noise.
    """
    image = torch.from_numpy(np.ascontiguousarray(low))[None, None]
    padded = F.pad(image, (reach,) * 4, mode="reflect")
    rows, columns = low.shape
    total = torch.zeros(len(strengths), rows, columns)
    weights = torch.zeros_like(total)
    decay = (torch.tensor(list(strengths)) * noise_hu).square()[:, None, None]
    for down, right in product(range(2 * reach + 1), repeat=2):
        shifted = padded[..., down : down + rows, right : right + columns]
        difference = F.pad((image - shifted) ** 2, (patch // 2,) * 4, mode="reflect")
        distance = F.avg_pool2d(difference, patch, stride=1)[0]
        weight = torch.exp(-(distance - 2 * noise_hu**2).clamp_min(0) / decay)
        total += weight * shifted[0]
        weights += weight
    return [np.asarray(plane.numpy()) for plane in total / weights]
