"""Real CT slices with noise to lower their dose: found, calibrated by the node's code, cached.

Patients appear as hashes only. Nothing here is written outside the run's own cache.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.volume import volume_from_datasets
from training.config import Data, Folder
from training.doses import Details, LowDose
from training.errors import TrainingError
from training.lowdose import insert_low_dose, own_noise_again
from training.recipes import Batch

CACHE_FORMAT = 2
"""Raise it when decoding or simulation changes: older caches are then made anew."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One slice and its further noise, in memory.

    Attributes:
        patient: hash of PatientID.
        digest: SHA-256 of the decoded pixels.
        hu: (rows, columns), float32, HU.
        noise: (realisations, rows, columns), float16, HU: what half the dose would add.
    """

    patient: str
    digest: str
    folder: Folder
    pixel_spacing_mm: float
    hu: NDArray[np.float32]
    noise: NDArray[np.float16]

    def at_dose(self, dose: float, realisation: int) -> NDArray[np.float32]:
        """(rows, columns), float32, HU: this slice at `dose` times its own dose."""
        return insert_low_dose(self.hu, self.noise[realisation].astype(np.float32), dose)


def load_samples(
    data: Data, low_dose: LowDose, seed: int, cache: Path
) -> tuple[list[Sample], Counter[str]]:
    """Every usable slice, and how many were left out for which reason.

    Raises:
        TrainingError: a folder does not exist or holds no usable slice, or an instance has no
            PatientID, so that its patient could end up on both sides of the split.
    """
    samples: list[Sample] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for folder in data.folders:
        root = Path(data.root) / folder.path
        files = sorted(path for path in root.rglob("*.dcm") if path.is_file())
        if not files:
            raise TrainingError(f"data.folders: no .dcm files in {root}; correct data.root or path")
        for path in files:
            sample = _load(path, folder, data, low_dose, seed, cache)
            if isinstance(sample, str):
                left_out[sample] += 1
            elif sample.digest in seen:
                left_out["DUPLICATE_PIXELS"] += 1
            else:
                seen.add(sample.digest)
                samples.append(sample)
    if not samples:
        raise TrainingError(f"data.folders: no usable slice; left out: {dict(left_out)}")
    return samples, left_out


def patient_hash(dataset: Dataset) -> str:
    """16 hexadecimal digits that stand for a patient in splits and logs."""
    patient = str(dataset.get("PatientID") or "")
    if not patient:
        raise TrainingError(
            f"instance {dataset.get('SOPInstanceUID')} has no PatientID: a split by patient is "
            "not possible; add one, or leave the file out"
        )
    return hashlib.sha256(f"dicomnode split {patient}".encode()).hexdigest()[:16]


def draw_batch(
    samples: Sequence[Sample],
    window: Window,
    low_dose: LowDose,
    details: Details,
    batch_size: int,
    patch: int,
    rng: np.random.Generator,
) -> Batch:
    """Patches at lower and at full dose, (batch_size, 1, patch, patch).

    A patient with n slices is drawn in proportion to the square root of n, so that one whole
    series does not outweigh many single slices.
    """
    share = Counter(sample.patient for sample in samples)
    weight = np.array([share[sample.patient] ** -0.5 for sample in samples])
    indices = rng.choice(len(samples), size=batch_size, p=weight / weight.sum())
    drawn = [_draw_patch(samples[index], low_dose, details, patch, rng) for index in indices]
    source, target, weight = (np.stack(part)[:, None] for part in zip(*drawn, strict=True))
    return Batch(
        torch.from_numpy(window.to_network(source)),
        torch.from_numpy(window.to_network(target)),
        torch.from_numpy(weight),
    )


def _draw_patch(
    sample: Sample, low_dose: LowDose, details: Details, patch: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], ...]:
    """Source, target in HU and weight, each (patch, patch), float32."""
    rows, columns = sample.hu.shape
    while True:  # mostly inside the body: soft tissue or lung, rarely air
        top, left = int(rng.integers(rows - patch + 1)), int(rng.integers(columns - patch + 1))
        window = (slice(top, top + patch), slice(left, left + patch))
        target = sample.hu[window]
        if (target > -900).mean() > 0.3 or rng.random() < 0.05:
            break
    added = np.zeros((patch, patch), np.float32)
    if rng.random() < details.share:
        added = draw_details(details, patch, rng)
    target = target + added
    weight = 1.0 + np.float32(details.weight) * (np.abs(added) >= details.faintest_hu / 2)
    noise = _draw_noise(sample, window, low_dose.mixed, rng)
    dose = float(np.exp(rng.uniform(np.log(low_dose.lowest), np.log(low_dose.highest))))
    if rng.random() < low_dose.full_dose_share:
        dose = 1.0
    source = insert_low_dose(target, noise, dose)
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    return tuple(_turn(plane, turns, mirrored) for plane in (source, target, weight))


def _draw_noise(
    sample: Sample, window: tuple[slice, slice], mixed: bool, rng: np.random.Generator
) -> NDArray[np.float32]:
    """One realisation, or a mixture of all, (rows, columns), float32, HU."""
    here = (slice(None), *window)
    realisations: NDArray[np.float32] = sample.noise[here].astype(np.float32)
    weights = np.zeros(len(realisations), np.float32)
    if mixed:
        weights[:] = rng.normal(size=len(realisations))
        weights /= np.linalg.norm(weights)
    else:
        weights[int(rng.integers(len(realisations)))] = 1.0
    mixture: NDArray[np.float32] = np.tensordot(weights, realisations, axes=1)
    return mixture


def draw_details(details: Details, patch: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random ellipses with soft rims, (patch, patch), float32, HU; zero elsewhere."""
    rows, columns = np.indices((patch, patch), dtype=np.float32)
    image = np.zeros((patch, patch), np.float32)
    for _ in range(int(rng.integers(1, details.most + 1))):
        row, column = rng.uniform(0, patch, 2)
        turn = rng.uniform(0, np.pi)
        axes = np.exp(rng.uniform(np.log(details.smallest), np.log(details.largest), 2))
        faint, strong = np.log(details.faintest_hu), np.log(details.strongest_hu)
        contrast = np.exp(rng.uniform(faint, strong)) * rng.choice((-1.0, 1.0))
        along = (rows - row) * np.cos(turn) + (columns - column) * np.sin(turn)
        across = (columns - column) * np.cos(turn) - (rows - row) * np.sin(turn)
        inside = 1.0 - np.hypot(along / axes[0], across / axes[1])  # 1 at the centre, 0 at the rim
        image += np.float32(contrast) * np.clip(inside * axes.min() + 0.5, 0.0, 1.0)
    return image


def _turn(plane: NDArray[np.float32], turns: int, mirrored: bool) -> NDArray[np.float32]:
    turned = np.rot90(plane, turns)
    return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)


def _load(
    path: Path, folder: Folder, data: Data, low_dose: LowDose, seed: int, cache: Path
) -> Sample | str:
    """The slice of one file, or why it is left out."""
    content = path.read_bytes()
    recipe = f"{CACHE_FORMAT} {low_dose.realisations} {seed} "
    key = hashlib.sha256(recipe.encode() + content).hexdigest()[:32]
    try:
        dataset = dcmread(path)
    except InvalidDicomError:
        return "NOT_DICOM"
    for keyword, patterns in data.exclude.items():
        value = str(dataset.get(keyword, ""))
        if any(fnmatchcase(value, pattern) for pattern in patterns):
            return f"EXCLUDED_{keyword}"
    stored = cache / f"{key}-{low_dose.views}.npz"
    if not stored.exists():
        reason = _simulate(dataset, low_dose, np.random.default_rng([seed, int(key, 16)]), stored)
        if reason:
            return reason
    with np.load(stored, allow_pickle=False) as arrays:
        return Sample(
            patient_hash(dataset),
            str(arrays["digest"]),
            folder,
            float(arrays["pixel_spacing_mm"]),
            arrays["hu"],
            arrays["noise"],
        )


def _simulate(
    dataset: Dataset, low_dose: LowDose, rng: np.random.Generator, stored: Path
) -> str | None:
    """Decode one slice, make its noise and store both; returns why not, if not."""
    try:
        volume, _ = volume_from_datasets([dataset], "HU", min_slices=1)
        hu, spacing = volume.voxels[0], volume.spacing_mm[2]
        noise = own_noise_again(hu, spacing, low_dose.realisations, rng, low_dose.views)
    except SeriesRefused as error:
        return error.code
    except TrainingError:
        return "NO_SOFT_TISSUE"
    if volume.padding is not None:
        noise[:, volume.padding[0]] = 0.0
    stored.parent.mkdir(parents=True, exist_ok=True)
    partial = stored.with_suffix(".partial.npz")
    np.savez(
        partial,
        hu=hu,
        noise=noise.astype(np.float16),
        digest=np.str_(volume.digests[0]),
        pixel_spacing_mm=np.float64(spacing),
    )
    partial.replace(stored)
    return None
