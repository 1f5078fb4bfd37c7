"""Print every figure of a model card, from the package and the held-out patients.

    python training/evaluate.py training/configs/ldct-denoise.yaml
    python training/evaluate.py training/configs/ldct-denoise.yaml part=validation dose=0.1
    python training/evaluate.py training/configs/ldct-denoise.yaml baselines=yes

Figures are means over patients; an interval is the 95 % bootstrap interval over patients.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.networks import Generator, Scale, run_generator
from dicomnode.imaging.package import read_package
from training.baselines import GAUSSIAN_SIGMAS_MM, MEANS_STRENGTHS, gaussian, non_local_means
from training.config import load_config
from training.data import Sample, load_samples
from training.lowdose import measure_noise
from training.metrics import (
    INSERTS,
    SOFT_TISSUE_WINDOW,
    TISSUES,
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
from training.split import PARTS, read_split

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


def main(argv: Sequence[str]) -> None:
    options = {"part": "test", "dose": "0.25", "package": "", "baselines": "no"}
    own = [word for word in argv[1:] if word.partition("=")[0] in options]
    config = load_config(Path(argv[0]), [word for word in argv[1:] if word not in own])
    options |= dict(word.split("=", 1) for word in own)
    if options["part"] not in PARTS:
        raise ConfigError(f"part: want one of {', '.join(PARTS)}")
    torch.set_num_threads(config.threads)
    model = load_model(read_package(Path(options["package"] or config.package)))
    samples, _ = load_samples(config.data, config.low_dose, config.seed, config.out / "cache")
    patients = read_split(Path(config.data.split))[options["part"]]
    held_out = [sample for sample in samples if sample.patient in patients]
    dose = float(options["dose"])
    network = denoiser(model.generator, model.package.manifest.input.intensity)
    figures = evaluate_samples(network, held_out, dose)
    print(f"{model.package.name} {model.package.version}, digest {model.package.digest}")
    print(f"{options['part']} at {dose:g} of the dose: ", end="")
    print(f"{len(figures.patients)} patients, {len(figures.slices)} slices\n")
    print_figures(model.package.name, figures)
    if options["baselines"] == "yes":
        for name in FILTERS:
            print_figures(name, evaluate_filter(name, held_out, dose, figures))


def evaluate_samples(
    apply: Denoiser, samples: Sequence[Sample], dose: float = 0.25, realisation: int = 0
) -> Figures:
    """`apply` on every sample at `dose`."""
    return Figures(
        [_evaluate(apply, sample, sample.at_dose(dose, realisation)) for sample in samples]
    )


def denoiser(generator: Generator, window: Scale) -> Denoiser:
    """A residual generator as a function of one slice, (rows, columns), float32, HU."""

    def apply(low: Image) -> Image:
        result: Image = run_generator(generator, low[None], window, window, residual=True)[0]
        return result

    return apply


def evaluate_filter(name: str, samples: Sequence[Sample], dose: float, goal: Figures) -> Figures:
    """A filter at the strength, chosen slice by slice, whose PSNR is nearest to the network's.

    That is its best strength where it does not reach the network, and no more smoothing than it
    needs where it does: the choice knows the full-dose image, to the filter's advantage.
    """
    family, strengths = FILTERS[name]
    results = []
    for sample, reached in zip(samples, goal.slices, strict=True):
        low, body = sample.at_dose(dose, 0), body_mask(sample.hu)
        filtered = family(sample, low)
        distances = [
            abs(psnr(image, sample.hu, body, SOFT_TISSUE_WINDOW) - reached.psnr)
            for image in filtered(low, strengths)
        ]
        best = strengths[int(np.argmin(distances))]
        results.append(_evaluate(_at_strength(filtered, best), sample, low))
    return Figures(results)


Filter = Callable[[Image, Sequence[float]], list[Image]]


def _gaussian_for(sample: Sample, low: Image) -> Filter:
    return lambda image, sigmas_mm: gaussian(image, sample.pixel_spacing_mm, sigmas_mm)


def _means_for(sample: Sample, low: Image) -> Filter:
    noise = measure_noise(low, sample.pixel_spacing_mm).deviation_hu
    return lambda image, strengths: non_local_means(image, noise, strengths)


FILTERS: Mapping[str, tuple[Callable[[Sample, Image], Filter], Sequence[float]]] = {
    "Gaussian": (_gaussian_for, GAUSSIAN_SIGMAS_MM),
    "non-local means": (_means_for, MEANS_STRENGTHS),
}


def _at_strength(filtered: Filter, strength: float) -> Denoiser:
    return lambda image: filtered(image, [strength])[0]


def _evaluate(apply: Denoiser, sample: Sample, low: Image) -> SliceFigures:
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


def print_figures(name: str, figures: Figures) -> None:
    """A table: what, mean over patients, 95 % interval over patients."""
    rows = {
        "PSNR of the input, dB": figures.psnr_low,
        "PSNR, dB": figures.psnr,
        "gain, dB": figures.gain_db,
        **{f"bias in {tissue}, HU": figures.bias_hu(tissue) for tissue in TISSUES},
        "noise left in soft tissue": figures.noise,
        "edge retention": figures.edges,
        **{f"recovery of {item}": figures.insert(i) for i, item in enumerate(INSERTS)},
    }
    print(name)
    for label, (mean, low, high) in rows.items():
        print(f"  {label:28} {mean:8.3f}  [{low:.3f}, {high:.3f}]")
    print(flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
