"""How far results in fewer bits are from those in fp32, on slices whose truth is known."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import Manifest
from training.cases import Case
from training.metrics import SOFT_TISSUE_WINDOW

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Found:
    """Differences to fp32 over all pixels of all slices, in the output's unit."""

    mean_abs: float
    p999_abs: float
    max_abs: float
    body_bias: float
    """Mean of the signed difference inside the body: of the slice where it is largest."""
    ssim_drop: float
    """Of the structural similarity to the truth, mean over slices."""
    seconds: float
    """Median per slice, as this machine was at that moment."""

    def as_data(self) -> dict[str, float]:
        """By name, without the time."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}

    def __str__(self) -> str:
        words = ", ".join(f"{name} {value:.3g}" for name, value in self.as_data().items())
        return f"{words}, {self.seconds:.3f} s"


def compare(
    run: Callable[[Case], Image],
    cases: Sequence[Case],
    reference: Sequence[Image],
    manifest: Manifest,
) -> Found:
    """`run` against `reference`, what fp32 made of the same cases: (1, 1, rows, columns) each."""
    differences, biases, drops, seconds = [], [], [], []
    for case, expected in zip(cases, reference, strict=True):
        began = time.perf_counter()
        made = run(case)
        seconds.append(time.perf_counter() - began)
        right, result = case.physical(expected, manifest), case.physical(made, manifest)
        difference = result - right
        differences.append(np.abs(difference).ravel())
        biases.append(abs(float(difference[case.body].mean())) if case.body.any() else 0.0)
        low, high = _shown(manifest)
        drops.append(ssim(right, case.truth, low, high) - ssim(result, case.truth, low, high))
    every = np.concatenate(differences)
    return Found(
        float(every.mean()),
        float(np.quantile(every, 0.999)),
        float(every.max()),
        max(biases),
        float(np.mean(drops)),
        float(np.median(seconds)),
    )


def worst_of(found: Sequence[Found]) -> Found:
    """The largest of each figure."""
    return Found(*(max(column) for column in zip(*map(_row, found), strict=True)))


def ssim(image: Image, truth: Image, low: float, high: float) -> float:
    """Structural similarity (Wang 2004: Gaussian of 1.5 pixels, K 0.01 and 0.03), mean of a slice.

    (rows, columns) each; both are clipped to [low, high], whose width is the range.
    """
    x, y = (np.clip(plane, low, high).astype(np.float64) for plane in (image, truth))

    def local(plane: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(ndimage.gaussian_filter(plane, 1.5, truncate=3.5))

    mean_x, mean_y = local(x), local(y)
    spread_x, spread_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    both = local(x * y) - mean_x * mean_y
    one, two = (0.01 * (high - low)) ** 2, (0.03 * (high - low)) ** 2
    top = (2 * mean_x * mean_y + one) * (2 * both + two)
    bottom = (mean_x**2 + mean_y**2 + one) * (spread_x + spread_y + two)
    return float((top / bottom).mean())


def _row(found: Found) -> tuple[float, ...]:
    return tuple(asdict(found).values())


def _shown(manifest: Manifest) -> tuple[float, float]:
    """The range a similarity is judged in: soft tissue in HU, else the whole window."""
    scale = manifest.output.intensity
    if manifest.output.unit == "HU" or not isinstance(scale, Window):
        return SOFT_TISSUE_WINDOW
    return scale.low, scale.high
