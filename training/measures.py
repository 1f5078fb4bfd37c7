"""Every figure of one volume in a profile, and what each one means."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy import ndimage

from dicomnode.imaging.units import Unit
from training.distributions import histogram_distance, jitter, noise_spectrum, spectrum_distance
from training.errors import TrainingError
from training.metrics import SOFT_TISSUE_WINDOW
from training.profiles import ldctbench, synthrad2023, synthrad2025
from training.regions import AIR_TO_BONE_HU, CLASSES, class_overlap
from training.similarity import (
    Array,
    Mask,
    bias,
    mean_absolute_error,
    normalised_root_mean_square,
    peak_ratio,
    root_mean_square,
    similarity,
    similarity_of_scales,
)
from training.studies import Study

Profile = Literal["standard", "synthrad2023", "synthrad2025", "ldctbench", "unpaired"]
PROFILES: tuple[Profile, ...] = get_args(Profile)[:-1]
"""Those with a truth; `unpaired` is what images without one are judged by (unpaired.py)."""
_SMALLEST_SCALES = 176
"""Side below which a slice has no five scales."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How to judge.

    Attributes:
        low, high: the range of values that peaks and similarities are about, in the unit.
        exam: of `ldctbench`: chest, abdomen or neuro.
    """

    profile: Profile
    unit: Unit
    low: float
    high: float
    exam: str = "abdomen"


def figures_of(study: Study, asked: Asked, result: Array | None = None) -> dict[str, float]:
    """Name -> value; NaN where a figure does not apply to the volume.

    Args:
        result: judged instead of the study's own.

    Raises:
        TrainingError: a published profile is asked for what is not HU.
    """
    made = study.result if result is None else result
    if asked.profile == "standard":
        return _standard(made, study, asked)
    if asked.unit != "HU":
        raise TrainingError(f"profile: {asked.profile} judges HU, not {asked.unit}")
    if asked.profile == "synthrad2023":
        return synthrad2023(made, study.truth, study.body)
    if asked.profile == "synthrad2025":
        return synthrad2025(made, study.truth, study.body)
    return ldctbench(made, study.truth, asked.exam)


def _standard(made: Array, study: Study, asked: Asked) -> dict[str, float]:
    truth, body, low, high = study.truth, study.body, asked.low, asked.high
    return {
        "mae": mean_absolute_error(made, truth),
        "mae_body": mean_absolute_error(made, truth, body),
        "bias_body": bias(made, truth, body),
        "rmse_body": root_mean_square(made, truth, body),
        "nrmse_body": normalised_root_mean_square(made, truth, body),
        "psnr": peak_ratio(made, truth, low, high),
        "psnr_body": peak_ratio(made, truth, low, high, body),
        "ssim": _by_slice(made, truth, low, high, None),
        "ssim_body": _by_slice(made, truth, low, high, body),
        "ms_ssim": _scales(made, truth, low, high),
        "histogram_distance": histogram_distance(made[body], truth[body]),
        "jitter": jitter(made, truth, body),
        **(_of_hu(made, truth, body) if asked.unit == "HU" else {}),
        **(_of_uptake(made, study) if asked.unit == "SUV" else {}),
    }


def _of_hu(made: Array, truth: Array, body: Mask) -> dict[str, float]:
    """Figures of the window of soft tissue, and of tissue classes by the truth's HU."""
    low, high = SOFT_TISSUE_WINDOW
    first, last = AIR_TO_BONE_HU
    masks = (truth < first, (truth >= first) & (truth <= last), truth > last)
    overlaps = class_overlap(made, truth, AIR_TO_BONE_HU)
    known = [value for value in overlaps if not math.isnan(value)]
    soft = body & (truth > low) & (truth < high)
    return {
        "psnr_soft_window": peak_ratio(made, truth, low, high, body),
        "ssim_soft_window": _by_slice(made, truth, low, high, body),
        **{
            f"mae_{_key(n)}": mean_absolute_error(made, truth, m)
            for n, m in zip(CLASSES, masks, strict=True)
        },
        **{f"iou_{_key(n)}": value for n, value in zip(CLASSES, overlaps, strict=True)},
        "iou": float(np.mean(known)),
        "noise_spectrum_distance": _noise(made, truth, soft),
    }


def _of_uptake(made: Array, study: Study) -> dict[str, float]:
    """Relative errors of the patient's mean and highest uptake, and of regions of interest."""
    body, truth = made[study.body], study.truth[study.body]
    found = {
        "suv_mean_error": _relative(float(body.mean()), float(truth.mean())),
        "suv_max_error": _relative(float(body.max()), float(truth.max())),
    }
    if study.labels is not None and (regions := np.unique(study.labels[study.labels > 0])).size:
        errors = []
        for region in regions:
            own, wanted = (image[study.labels == region] for image in (made, study.truth))
            errors.append(
                (_relative(own.mean(), wanted.mean()), _relative(own.max(), wanted.max()))
            )
        means, highest = np.mean(errors, axis=0)
        found |= {"suv_mean_error_regions": float(means), "suv_max_error_regions": float(highest)}
    return found


def means_of(study: Study, asked: Asked) -> dict[str, tuple[float, float]]:
    """What two images of a volume are compared by: name -> (result, truth), in the unit."""
    made, truth = study.result, study.truth
    found = {"mean in the body": (float(made[study.body].mean()), float(truth[study.body].mean()))}
    if asked.unit == "HU":
        first, last = AIR_TO_BONE_HU
        for name, mask in {
            "mean in soft tissue": study.body & (truth >= first) & (truth <= last),
            "mean in bone": study.body & (truth > last),
        }.items():
            if mask.any():
                found[name] = float(made[mask].mean()), float(truth[mask].mean())
    if asked.unit in ("SUV", "BQML"):
        found["maximum"] = float(made[study.body].max()), float(truth[study.body].max())
    return found


def _by_slice(made: Array, truth: Array, low: float, high: float, body: Mask | None) -> float:
    """Mean of the slices' similarities, Gaussian windows; NaN where none is large enough."""
    if min(truth.shape[1:]) < 11:
        return math.nan
    values = [
        similarity(x, y, low, high, mask=None if body is None else body[index], gaussian=True)
        for index, (x, y) in enumerate(zip(made, truth, strict=True))
    ]
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _scales(made: Array, truth: Array, low: float, high: float) -> float:
    if min(truth.shape[1:]) < _SMALLEST_SCALES:
        return math.nan
    pairs = zip(made, truth, strict=True)
    return float(np.mean([similarity_of_scales(x, y, low, high) for x, y in pairs]))


def _noise(made: Array, truth: Array, mask: Mask) -> float:
    """Over the slices in which a square of 16 pixels lies within soft tissue, away from edges."""
    distances = []
    for x, y, tissue in zip(made, truth, mask, strict=True):
        inside = ndimage.binary_erosion(tissue, iterations=3)  # what is blurred spills over
        own, wanted = noise_spectrum(x, inside, 16), noise_spectrum(y, inside, 16)
        if own is not None and wanted is not None:
            distances.append(spectrum_distance(own, wanted))
    return float(np.mean(distances)) if distances else math.nan


def _relative(value: float, truth: float) -> float:
    return float(100.0 * (value - truth) / truth) if truth else math.nan


def _key(name: str) -> str:
    return name.replace(" ", "_")


MEANING: Mapping[str, tuple[str, str]] = {
    "mae": ("mean absolute error, whole image", "unit"),
    "mae_body": ("mean absolute error inside the body", "unit"),
    "bias_body": ("mean of result minus truth inside the body", "unit"),
    "rmse_body": ("root mean squared error inside the body", "unit"),
    "nrmse_body": ("rmse_body over the root mean square of the truth there", "1"),
    "psnr": ("peak signal-to-noise ratio, whole image; peak: the range", "dB"),
    "psnr_body": ("peak signal-to-noise ratio inside the body; peak: the range", "dB"),
    "psnr_soft_window": ("psnr_body with both clipped to [-160, 240] HU; peak: 400 HU", "dB"),
    "ssim": ("structural similarity by slice, Gaussian window, whole image", "1"),
    "ssim_body": ("ssim with the mean inside the body only", "1"),
    "ssim_soft_window": ("ssim_body with both clipped to [-160, 240] HU", "1"),
    "ms_ssim": ("structural similarity of five scales by slice; sides of 176 or more", "1"),
    "histogram_distance": ("first Wasserstein distance of the values in the body", "unit"),
    "jitter": ("change from slice to slice in the body over the truth's; 1: alike", "1"),
    "mae_air": ("mean absolute error where the truth is below -400 HU", "unit"),
    "mae_soft_tissue": ("mean absolute error where the truth is from -400 to 160 HU", "unit"),
    "mae_bone": ("mean absolute error where the truth is above 160 HU", "unit"),
    "iou_air": ("intersection over union of what is below -400 HU", "1"),
    "iou_soft_tissue": ("intersection over union of what is from -400 to 160 HU", "1"),
    "iou_bone": ("intersection over union of what is above 160 HU", "1"),
    "iou": ("mean of the three intersections over unions", "1"),
    "noise_spectrum_distance": ("difference of noise power in soft tissue over the truth's", "1"),
    "suv_mean_error": ("error of the body's mean SUV", "%"),
    "suv_max_error": ("error of the body's highest SUV", "%"),
    "suv_mean_error_regions": ("error of the mean SUV of a region, mean over regions", "%"),
    "suv_max_error_regions": ("error of the highest SUV of a region, mean over regions", "%"),
}
"""Figure of the profile `standard` -> what it is, and its unit (`unit`: that of the images)."""
_2023 = "inside the mask, clipped to [-1024, 3000] HU"
_2025 = "inside the mask, clipped to [-1024, 3071] HU"
PUBLISHED: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "synthrad2023": {
        "mae": ("mean absolute error inside the mask", "unit"),
        "psnr": (f"peak signal-to-noise ratio {_2023}; peak: 4024 HU", "dB"),
        "ssim": (f"structural similarity in 7 x 7 x 7 voxels {_2023}", "1"),
    },
    "synthrad2025": {
        "mae": ("mean absolute error inside the mask", "unit"),
        "psnr": (f"peak signal-to-noise ratio {_2025}; peak: 4095 HU", "dB"),
        "ms_ssim": (f"structural similarity of five scales {_2025}", "1"),
    },
    "ldctbench": {
        "ssim": ("structural similarity by slice in the exam's window", "1"),
        "psnr": ("peak signal-to-noise ratio by slice in the exam's window", "dB"),
        "rmse": ("root mean squared error by slice, clipped to [-1024, 1900] HU", "unit"),
    },
}
"""The same of the published profiles."""
_UNPAIRED: Mapping[str, tuple[str, str]] = {
    "histogram_distance": (
        "first Wasserstein distance of the values in the body to those of real images of other "
        "patients",
        "unit",
    ),
    "information_kept": (
        "normalised mutual information of source and result in the body; 1: strangers",
        "1",
    ),
    "cycle_error": (
        "mean absolute error of what the way back makes of the result, in the source's unit",
        "source's unit",
    ),
}


def meaning(name: str, asked: Asked) -> tuple[str, str]:
    """What a figure is, and its unit."""
    known = {**PUBLISHED, "unpaired": _UNPAIRED}
    words, unit = known.get(asked.profile, MEANING)[name]
    return words, asked.unit if unit == "unit" else unit
