"""SUV of organs and lesions against the true delayed image, beside the early image rescaled."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from training.errors import TrainingError
from training.pairs import Pair, patient_of
from training.pet_anatomy import CLASSES
from training.proofs.case import Case, table

_LEAST_VOXELS = 20
"""Of a part of an organ in a body; smaller ones say little."""


def lines(case: Case) -> list[str]:
    """Per tissue: bodies, true SUV, bias in percent of it of the model and of two plain ways."""
    labels = _labels(case)
    factor = _factor(case.pairs("train"))
    measured = {name: _means(case, labels, CLASSES.index(name), factor) for name in CLASSES[1:]}
    rows = []
    for name, means in measured.items():
        if means.size:
            bias = 100 * (means[:, 1:] / means[:, :1] - 1)
            cells = [f"{b.mean():+.1f} (sd {b.std():.1f}, MAE {abs(b).mean():.1f})" for b in bias.T]
            rows.append([name, len(means), float(means[:, 0].mean()), *cells])
    head = ["tissue", "bodies", "true SUVmean", "bias of the model, %", "early as it is, %"]
    return [
        *table([*head, f"early times {factor:.3f}, %"], rows),
        "",
        "bias: mean over bodies (standard deviation, mean absolute value)",
    ]


def _means(
    case: Case, labels: dict[tuple[str, int], NDArray[np.uint8]], label: int, factor: float
) -> NDArray[np.float64]:
    """(bodies, 4): mean SUV inside: true, the model's, the early image's, that times `factor`."""
    sums: dict[str, NDArray[np.float64]] = {}
    for pair in case.pairs():
        inside = labels[pair.source.patient, pair.source.number] == label
        if inside.any():
            early = pair.source.physical[inside]
            images = (pair.target.physical[inside], case.apply(pair.source)[inside], early)
            values = [inside.sum(), *(image.sum() for image in images), factor * early.sum()]
            sums[pair.source.patient] = sums.get(pair.source.patient, 0) + np.array(values, float)
    kept = [value[1:] / value[0] for value in sums.values() if value[0] >= _LEAST_VOXELS]
    return np.array(kept)


def _factor(pairs: list[Pair]) -> float:
    """The one factor of the early image that fits the delayed training images best."""
    products = [np.vdot(p.source.physical, p.target.physical) for p in pairs]
    squares = [np.vdot(p.source.physical, p.source.physical) for p in pairs]
    return float(np.sum(products) / np.sum(squares))


def _labels(case: Case) -> dict[tuple[str, int], NDArray[np.uint8]]:
    """(patient, slice) -> (rows, columns), uint8: what simulate_delayed_pet.py wrote beside."""
    found = {}
    root = Path(case.data.root)
    for path in sorted(root.glob("*/labels.nii.gz")):
        patient = patient_of(path.relative_to(root).as_posix(), case.data.patient)
        volume = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        found.update({(patient, number): plane for number, plane in enumerate(volume)})
    if not found:
        raise TrainingError(f"{root}: no labels; see training/simulate_delayed_pet.py")
    return found
