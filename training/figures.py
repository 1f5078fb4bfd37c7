"""The figures of one denoiser on held-out slices, averaged by patient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dicomnode.imaging.networks import Generator, Scale, run_generator
from training.data import Sample
from training.metrics import (
    INSERTS,
    SOFT_TISSUE_WINDOW,
    Image,
    body_mask,
    edge_retention,
    insert_image,
    insert_recovery,
    interval,
    noise_left,
    psnr,
    tissue_masks,
)

Denoiser = Callable[[Image], Image]


@dataclass(frozen=True, slots=True)
class SliceFigures:
    """One method on one slice."""

    patient: str
    psnr_low: float
    """Of the low-dose input, dB."""
    psnr: float
    """Of the result, dB."""
    bias_hu: Mapping[str, float]
    """Tissue -> mean of result minus full dose; only tissues with 200 pixels or more."""
    edges: float
    """Edge retention."""
    inserts: tuple[float, ...]
    """Insert recovery, in the order of metrics.INSERTS."""
    noise: float
    """Noise left in soft tissue, as a share of the input's."""


Interval = tuple[float, float, float]


class Figures:
    """One method on all slices, averaged by patient: mean, low end, high end."""

    def __init__(self, slices: Sequence[SliceFigures]) -> None:
        self.slices = tuple(slices)

    @cached_property
    def patients(self) -> tuple[str, ...]:
        return tuple(sorted({item.patient for item in self.slices}))

    def over_patients(self, value: Callable[[SliceFigures], float | None]) -> Interval:
        """Slices are averaged within a patient first; a slice without the value is skipped."""
        means = []
        for patient in self.patients:
            own = [value(item) for item in self.slices if item.patient == patient]
            known = [number for number in own if number is not None]
            if known:
                means.append(float(np.mean(known)))
        return interval(means) if means else (float("nan"),) * 3

    @property
    def gain_db(self) -> Interval:
        return self.over_patients(lambda item: item.psnr - item.psnr_low)

    @property
    def psnr_low(self) -> Interval:
        return self.over_patients(lambda item: item.psnr_low)

    @property
    def psnr(self) -> Interval:
        return self.over_patients(lambda item: item.psnr)

    @property
    def edges(self) -> Interval:
        return self.over_patients(lambda item: item.edges)

    def bias_hu(self, tissue: str) -> Interval:
        return self.over_patients(lambda item: item.bias_hu.get(tissue))

    @property
    def noise(self) -> Interval:
        return self.over_patients(lambda item: item.noise)

    def insert(self, index: int) -> Interval:
        return self.over_patients(lambda item: item.inserts[index])


def evaluate_samples(
    apply: Denoiser, samples: Sequence[Sample], dose: float = 0.25, realisation: int = 0
) -> Figures:
    """`apply` on every sample at `dose`."""
    return Figures(
        [evaluate_slice(apply, sample, sample.at_dose(dose, realisation)) for sample in samples]
    )


def denoiser(generator: Generator, window: Scale) -> Denoiser:
    """A residual generator as a function of one slice, (rows, columns), float32, HU."""

    device = str(next((weight.device for weight in generator.parameters()), "cpu"))

    def apply(low: Image) -> Image:
        result: Image = run_generator(
            generator, low[None], window, window, residual=True, device=device
        )[0]
        return result

    return apply


def evaluate_slice(apply: Denoiser, sample: Sample, low: Image) -> SliceFigures:
    """Every figure of `apply` on one slice at a lower dose, `low` (rows, columns), float32, HU."""
    truth, spacing = sample.hu, sample.pixel_spacing_mm
    body = body_mask(truth)
    result = apply(low)
    error = result - truth
    tissues = tissue_masks(truth, spacing, body)
    rng = np.random.default_rng(int(sample.digest[:8], 16))
    return SliceFigures(
        sample.patient,
        psnr(low, truth, body, SOFT_TISSUE_WINDOW),
        psnr(result, truth, body, SOFT_TISSUE_WINDOW),
        {name: float(error[mask].mean()) for name, mask in tissues.items() if mask.sum() >= 200},
        edge_retention(result, truth, spacing, body),
        tuple(
            insert_recovery(apply(low + inserted), result, inserted)
            for inserted in (insert_image(truth, spacing, insert, rng) for insert in INSERTS)
        ),
        noise_left(result, low, truth, tissues["soft tissue"]),
    )
