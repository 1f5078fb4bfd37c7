"""What could let a patient train and test at once: one PatientID under two names, images alike."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from torch.nn import functional as F

ALIKE = 0.995
"""Correlation of thumbnails above which two slices are nearly the same picture."""
_SIDE = 32
_BLOCK = 1024
"""Thumbnails compared at a time."""


@dataclass(frozen=True, slots=True)
class AlikeSlices:
    """How many slices are nearly the same as one of another patient, and of how many patients."""

    slices: int
    patients: int


def alike_slices(
    planes: Sequence[NDArray[np.float32]], patients: Sequence[str], above: float = ALIKE
) -> AlikeSlices:
    """Compare every slice with those of all other patients.

    Args:
        planes: (rows, columns), float32, of any size and unit.
        patients: whose each is.
    """
    if not planes:
        return AlikeSlices(0, 0)
    small = torch.stack([_thumbnail(plane) for plane in planes])
    number = {patient: index for index, patient in enumerate(sorted(set(patients)))}
    whose = torch.tensor([number[patient] for patient in patients])
    found = torch.zeros(len(planes), dtype=torch.bool)
    for start in range(0, len(planes), _BLOCK):
        block = slice(start, start + _BLOCK)
        alike = (small[block] @ small.T > above) & (whose[block, None] != whose[None, :])
        found[block] = alike.any(dim=1)
    return AlikeSlices(int(found.sum()), int(whose[found].unique().numel()))


def patient_id_of(path: Path) -> str:
    """PatientID of a DICOM file, or of the first one in a folder; empty: there is none."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=["PatientID"])
        except (InvalidDicomError, OSError):
            continue
        return str(header.get("PatientID") or "")
    return ""


def names_of_one_patient(named: Iterable[tuple[str, str]]) -> int:
    """How many PatientIDs stand under more than one name.

    Args:
        named: name and PatientID of every image; those without PatientID do not count.
    """
    names = defaultdict(set)
    for name, patient in named:
        if patient:
            names[patient].add(name)
    return sum(len(several) > 1 for several in names.values())


def _thumbnail(plane: NDArray[np.float32]) -> torch.Tensor:
    """1024 values of mean 0 and length 1; zeros for a slice of one value."""
    small: torch.Tensor = F.adaptive_avg_pool2d(
        torch.from_numpy(plane)[None].float(), _SIDE
    ).flatten()
    small = small - small.mean()
    scaled: torch.Tensor = small / small.norm().clamp_min(1e-6)
    return scaled
