"""Published ways to judge a result, as their organisers' scripts compute them, and our own.

A report always names its profile: the same two images have a PSNR of 27 dB in one and 47 dB in
another. Volumes are (slices, rows, columns), float32 or float64, HU; masks bool.

Sources: SynthRAD2023/metrics fe7e385 and SynthRAD2025/evaluation 17cac47 (image_metrics.py),
ldct-benchmark 0.0.15 (evaluate/utils.py). They are followed operation by operation in the type
that is given, so that the same input gives the same bits.
"""

from collections.abc import Mapping

import numpy as np
from scipy import signal

from training.errors import TrainingError
from training.similarity import SCALES, WINDOW, Array, Mask, moments, similarity_map, within

Range = tuple[float, float]
SYNTHRAD_2023: Range = (-1024.0, 3000.0)
SYNTHRAD_2025: Range = (-1024.0, 3071.0)
EXAMS: Mapping[str, Range] = {"chest": (-600, 1500), "abdomen": (50, 400), "neuro": (40, 80)}
"""Centre and width of ldct-benchmark's windows, HU."""
_SMALLEST = 97
"""Sides below this are padded before the scales of SynthRAD2025."""


def synthrad2023(result: Array, truth: Array, mask: Mask) -> dict[str, float]:
    """MAE in HU, PSNR in dB and SSIM inside `mask`.

    Raises:
        TrainingError: the mask is empty, or an axis is shorter than 7.
    """
    _check(result, truth, mask)
    low, high = SYNTHRAD_2023
    x, y = (np.where(mask, np.clip(image, low, high), low) - low for image in (truth, result))
    found = similarity_map(x, y, high - low)
    return {
        "mae": _masked_mae(result, truth, mask),
        "psnr": _peak_ratio(result, truth, mask, SYNTHRAD_2023),
        "ssim": float(within(found, mask, WINDOW // 2)),
    }


def synthrad2025(result: Array, truth: Array, mask: Mask) -> dict[str, float]:
    """MAE in HU, PSNR in dB and multi-scale SSIM inside `mask`.

    The organisers meant to weigh luminance at the last scale only; their script weighs it at every
    scale, and so does this.

    Raises:
        TrainingError: the mask is empty.
    """
    _check(result, truth, mask)
    low = SYNTHRAD_2025[0]
    result, truth = (
        np.where(mask, image, np.asarray(low, image.dtype)) for image in (result, truth)
    )
    return {
        "mae": _masked_mae(result, truth, mask),
        "psnr": _peak_ratio(result, truth, mask, SYNTHRAD_2025),
        "ms_ssim": _synthrad_scales(result, truth, mask),
    }


def ldctbench(result: Array, truth: Array, exam: str) -> dict[str, float]:
    """SSIM and PSNR in the exam's window and RMSE in HU, each the mean over the slices.

    Raises:
        TrainingError: `exam` is none of theirs, or a slice is smaller than 7 x 7.
    """
    if exam not in EXAMS:
        raise TrainingError(f"exam: {exam!r} is not one of {', '.join(EXAMS)}")
    _same_size(result, truth)
    slices = [_ldctbench_slice(x, y, exam) for x, y in zip(result, truth, strict=True)]
    return {name: float(np.mean([item[name] for item in slices])) for name in slices[0]}


def _ldctbench_slice(result: Array, truth: Array, exam: str) -> dict[str, float]:
    offset = 1024  # their pixels are HU + 1024
    centre, width = EXAMS[exam]
    x, y = (_windowed(image + offset, centre + offset, width) for image in (result, truth))
    clipped = (np.clip(image + offset, 0.0, 2924.0) for image in (result, truth))
    with np.errstate(divide="ignore"):  # equal images have an infinite ratio
        peak = 10 * np.log10(1.0 / _mean_square(x, y))
    found = similarity_map(x, y, 1.0)
    return {
        "ssim": float(within(found, None, WINDOW // 2)),
        "psnr": float(peak),
        "rmse": float(np.sqrt(_mean_square(*clipped))),
    }


def _windowed(image: Array, centre: float, width: float) -> Array:
    """The window of PS3.3 C.11.2.1.2 as values from 0 to 1."""
    low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    inside = (image - (centre - 0.5)) / (width - 1.0) + 0.5
    return np.where(image <= low, 0.0, np.where(image > high, 1.0, inside)).astype(image.dtype)


def _synthrad_scales(result: Array, truth: Array, mask: Mask) -> float:
    low, high = SYNTHRAD_2025
    more = [
        (max(0, (_SMALLEST - n) // 2), max(0, _SMALLEST - n - (_SMALLEST - n) // 2))
        for n in truth.shape
    ]
    images = [
        np.pad(np.clip(image, low, high) - low, more, mode="edge") for image in (truth, result)
    ]
    kept = np.pad(mask, more, mode="edge")
    product = np.float64(1.0)
    for weight in np.array(SCALES):
        found = _synthrad_map(images[0], images[1], high - low, weight)
        product *= np.clip(within(found, kept, WINDOW // 2), 0, 1)
        small = [signal.fftconvolve(image, np.ones((2, 2, 2)) / 8, mode="same") for image in images]
        images, kept = [image[::2, ::2, ::2] for image in small], kept[::2, ::2, ::2]
    return float(product)


def _synthrad_map(x: Array, y: Array, width: float, weight: np.float64) -> Array:
    """Luminance, contrast and structure of each voxel, each to the power of `weight`."""
    one, two = (0.01 * width) ** 2, (0.03 * width) ** 2
    three = two / 2
    mean_x, mean_y, var_x, var_y, both = moments(x, y, gaussian=False)
    root_x, root_y = (np.clip(var, 0, None) ** 0.5 for var in (var_x, var_y))
    luminance = (2 * mean_x * mean_y + one) / (mean_x * mean_x + mean_y * mean_y + one)
    contrast = (2 * root_x * root_y + two) / (var_x + var_y + two)
    structure = (both + three) / (root_x * root_y + three)
    parts = (np.clip(part, 0, None) ** weight for part in (luminance, contrast, structure))
    first, second, third = parts
    return np.asarray(first * second * third)


def _masked_mae(result: Array, truth: Array, mask: Mask) -> float:
    kept = mask.astype(np.float64)
    return float(np.sum(np.abs(truth * kept - result * kept)) / kept.sum())


def _peak_ratio(result: Array, truth: Array, mask: Mask, among: Range) -> float:
    low, high = among
    x, y = (np.clip(image, low, high)[mask] for image in (truth, result))
    with np.errstate(divide="ignore"):  # equal images have an infinite ratio
        return float(10 * np.log10((high - low) ** 2 / _mean_square(x, y)))


def _mean_square(x: Array, y: Array) -> np.float64:
    return np.mean((x - y) ** 2, dtype=np.float64)


def _check(result: Array, truth: Array, mask: Mask) -> None:
    _same_size(result, truth)
    if mask.shape != truth.shape:
        raise TrainingError(f"mask {mask.shape} and truth {truth.shape} differ in size")
    if not mask.any():
        raise TrainingError("mask: nothing is inside it")


def _same_size(result: Array, truth: Array) -> None:
    if result.shape != truth.shape:
        raise TrainingError(f"result {result.shape} and truth {truth.shape} differ in size")
