"""A low-dose denoiser on held-out patients, beside its input and maybe beside another version.

Noise is looked at in squares of 16 pixels within uniform soft tissue: its power by spatial
frequency in the result over that in the full-dose slice. Below one it looks smoother than a scan
of full dose (plastic), above one noisier. Anatomy in the squares is part of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.data import Sample
from training.distributions import noise_spectrum, spectrum_distance
from training.errors import TrainingError
from training.figures import Denoiser
from training.intervals import difference, summary
from training.metrics import (
    SOFT_TISSUE_WINDOW,
    TISSUES,
    Image,
    Mask,
    body_mask,
    edge_retention,
    psnr,
    tissue_masks,
)
from training.proofs.case import table
from training.similarity import mean_absolute_error, similarity

DOSES = (0.5, 0.25, 0.1)
REALISATION = 0
"""Which of a slice's noise images is used."""
SIDE = 16
"""Of the squares whose noise is measured, pixels."""
_BANDS = {"low": slice(0, 2), "middle": slice(2, 5), "high": slice(5, 8)}
"""Rings of a square's spectrum: up to 1/8, up to 5/16 and up to 1/2 turn per pixel."""
_PAIR_SPACING_MM = 0.7
"""Taken for slices without a header."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One slice that took no part in training.

    Attributes:
        truth, low: (rows, columns), float32, HU: at full and at lower dose.
    """

    patient: str
    truth: Image
    low: Image
    spacing_mm: float


def at_dose(samples: Sequence[Sample], dose: float) -> list[Held]:
    """Slices with noise that lowers their dose to `dose` times their own."""
    return [
        Held(s.patient, s.hu, s.at_dose(dose, REALISATION), s.pixel_spacing_mm) for s in samples
    ]


def scanned_pair(folder: Path) -> list[Held]:
    """One slice of the AAPM challenge, `*_input.npy` (quarter dose) and `*_target.npy`.

    Their values are (HU + 1024) / 4096.

    Raises:
        TrainingError: the folder does not hold one of each, of one size.
    """
    found = [sorted(folder.glob(f"*_{name}.npy")) for name in ("target", "input")]
    if [len(paths) for paths in found] != [1, 1]:
        raise TrainingError(f"pair: {folder} does not hold one *_input.npy and one *_target.npy")
    try:
        truth, low = (
            (np.load(paths[0], allow_pickle=False) * 4096.0 - 1024.0).astype(np.float32)
            for paths in found
        )
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"pair: {folder}: {error}") from error
    if truth.ndim != 2 or truth.shape != low.shape:
        raise TrainingError(f"pair: {folder}: {low.shape} and {truth.shape} are no two slices")
    return [Held("the pair", truth, low, _PAIR_SPACING_MM)]


def lines(held: Sequence[Held], methods: Mapping[str, Denoiser]) -> list[str]:
    """A table: a line per figure, a column for the input and for each method.

    Means over patients; of two methods also what the second has more than the first, with the 95 %
    interval over patients where there are two or more.
    """
    every = {"input": lambda low: low, **methods}
    patients = [one.patient for one in held]
    found = {name: [figures(apply(one.low), one) for one in held] for name, apply in every.items()}
    rows = []
    for figure in found["input"][0]:
        values = {name: [slice_[figure] for slice_ in found[name]] for name in every}
        row: list[object] = [figure]
        row += [_number(summary(values[name], patients).mean) for name in every]
        if len(methods) == 2:
            first, second = (values[name] for name in methods)
            row.append(_change(second, first, patients))
        rows.append(row)
    more = ["second minus first (95 %)"] if len(methods) == 2 else []
    return table(["figure", *every, *more], rows)


def figures(result: Image, one: Held) -> dict[str, float]:
    """Name with unit -> value; NaN where a slice has no such place."""
    truth, (low, high) = one.truth, SOFT_TISSUE_WINDOW
    body = body_mask(truth)
    tissues = tissue_masks(truth, one.spacing_mm, body)
    return {
        "PSNR, dB": psnr(result, truth, body, SOFT_TISSUE_WINDOW),
        "SSIM": similarity(result, truth, low, high, mask=body, gaussian=True),
        "MAE in the body, HU": mean_absolute_error(result, truth, body),
        **{f"bias in {tissue}, HU": _bias(result, truth, tissues[tissue]) for tissue in TISSUES},
        "edge retention": edge_retention(result, truth, one.spacing_mm, body),
        **_noise(result, one),
    }


def _bias(result: Image, truth: Image, mask: Mask) -> float:
    return float((result - truth)[mask].mean()) if mask.sum() >= 200 else float("nan")


def _noise(result: Image, one: Held) -> dict[str, float]:
    """Of the result's noise spectrum beside that of the full dose."""
    smooth = ndimage.gaussian_filter(one.truth, 2.0 / one.spacing_mm)
    tissue = ndimage.binary_erosion((smooth > 0) & (smooth < 150) & body_mask(one.truth))
    own, full = (noise_spectrum(image, tissue, SIDE) for image in (result, one.truth))
    if own is None or full is None:
        own = full = np.full(SIDE // 2, np.nan)
    ring = np.arange(1, SIDE // 2 + 1)
    return {
        "noise power distance": spectrum_distance(own, full),
        "noise power over full dose": float((ring * own).sum() / (ring * full).sum()),
        **{
            f"... at {name} frequencies": float((own / full)[band].mean())
            for name, band in _BANDS.items()
        },
        "frequency of most noise, 1/mm": _peak(own, one.spacing_mm),
        "... in the full dose": _peak(full, one.spacing_mm),
    }


def _peak(spectrum: NDArray[np.float64], spacing_mm: float) -> float:
    """Middle of the ring of frequencies with the most power, 1/mm; wide rings have more of it."""
    power = np.arange(1, spectrum.size + 1) * spectrum
    if not np.isfinite(power).all():
        return float("nan")
    return float((np.argmax(power) + 1) / (SIDE * spacing_mm))


def _change(values: Sequence[float], others: Sequence[float], patients: Sequence[str]) -> str:
    found = difference(values, others, patients)
    if found.patients < 2:
        return _signed(found.mean)
    return f"{_signed(found.mean)} ({_signed(found.low)} to {_signed(found.high)})"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"
