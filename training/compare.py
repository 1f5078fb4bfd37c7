"""A denoiser against simple filters, at the same PSNR and at the same noise.

A filter alone can look sharp by leaving the noise in. So each is compared where one figure is
equal, slice by slice, with the strength chosen in knowledge of the full-dose image.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from training.baselines import GAUSSIAN_SIGMAS_MM, MEANS_STRENGTHS, gaussian, non_local_means
from training.data import Sample
from training.figures import Denoiser, Figures, SliceFigures, evaluate_slice
from training.lowdose import measure_noise
from training.metrics import (
    SOFT_TISSUE_WINDOW,
    Image,
    body_mask,
    noise_left,
    psnr,
    tissue_masks,
)

SHARES = tuple(np.linspace(0.05, 1.0, 39))
"""How much of its correction a denoiser applies when it is turned down."""
Filter = Callable[[Image, Sequence[float]], list[Image]]
Measure = Callable[[Image], float]


def _gaussian_for(sample: Sample, dose: float) -> Filter:
    return lambda image, sigmas_mm: gaussian(image, sample.pixel_spacing_mm, sigmas_mm)


def _means_for(sample: Sample, dose: float) -> Filter:
    noise = measure_noise(sample.hu, sample.pixel_spacing_mm).deviation_hu / math.sqrt(dose)
    return lambda image, strengths: non_local_means(image, noise, strengths)


FILTERS: Mapping[str, tuple[Callable[[Sample, float], Filter], Sequence[float]]] = {
    "Gaussian": (_gaussian_for, GAUSSIAN_SIGMAS_MM),
    "non-local means": (_means_for, MEANS_STRENGTHS),
}


def filter_at_same_psnr(
    name: str, samples: Sequence[Sample], dose: float, goal: Figures
) -> Figures:
    """The filter at the strength whose PSNR is nearest to the network's: its best, if below."""
    return _matched_filter(name, samples, dose, goal, _psnr_of, lambda item: item.psnr)


def filter_at_same_noise(
    name: str, samples: Sequence[Sample], dose: float, goal: Figures
) -> Figures:
    """The filter at the strength that leaves as much noise in soft tissue as the network."""
    return _matched_filter(name, samples, dose, goal, _noise_of, lambda item: item.noise)


def turned_down(apply: Denoiser, samples: Sequence[Sample], dose: float, goal: Figures) -> Figures:
    """The network with so much of its correction left out that its PSNR is that of `goal`."""
    results = []
    for sample, reached in zip(samples, goal.slices, strict=True):
        low = sample.at_dose(dose, 0)
        change = apply(low) - low
        images = [low + np.float32(share) * change for share in SHARES]
        best = SHARES[_nearest(images, _psnr_of(sample, low), reached.psnr)]
        results.append(evaluate_slice(_share_of(apply, best), sample, low))
    return Figures(results)


def _matched_filter(
    name: str,
    samples: Sequence[Sample],
    dose: float,
    goal: Figures,
    measure: Callable[[Sample, Image], Measure],
    reached: Callable[[SliceFigures], float],
) -> Figures:
    family, strengths = FILTERS[name]
    results = []
    for sample, item in zip(samples, goal.slices, strict=True):
        low = sample.at_dose(dose, 0)
        filtered = family(sample, dose)
        best = _nearest(filtered(low, strengths), measure(sample, low), reached(item))
        results.append(evaluate_slice(_at_strength(filtered, strengths[best]), sample, low))
    return Figures(results)


def _nearest(images: Sequence[Image], measure: Measure, goal: float) -> int:
    return int(np.argmin([abs(measure(image) - goal) for image in images]))


def _psnr_of(sample: Sample, low: Image) -> Measure:
    body = body_mask(sample.hu)
    return lambda image: psnr(image, sample.hu, body, SOFT_TISSUE_WINDOW)


def _noise_of(sample: Sample, low: Image) -> Measure:
    tissue = tissue_masks(sample.hu, sample.pixel_spacing_mm, body_mask(sample.hu))["soft tissue"]
    return lambda image: noise_left(image, low, sample.hu, tissue)


def _at_strength(filtered: Filter, strength: float) -> Denoiser:
    return lambda image: filtered(image, [strength])[0]


def _share_of(apply: Denoiser, share: float) -> Denoiser:
    return lambda image: image + np.float32(share) * (apply(image) - image)
