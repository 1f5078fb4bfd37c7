"""Where contrast-enhanced CT is made of plain CT: enhancement where it was, nothing elsewhere."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.config import Images
from training.images import read_image, voxels_of
from training.pairs import Pair, Plane
from training.proofs.case import Case, spread, table
from training.translation import Translator, fixed

ENHANCED_HU = 20.0
"""From here on a pixel counts as enhanced in truth."""
_ELSEWHERE = {
    "lung": (-950, -500),
    "fat": (-150, -50),
    "other soft tissue": (0, 85),
    "bone": (300, 2000),
}
Values = NDArray[np.float32]


def lines(case: Case) -> list[str]:
    """Enhancement in HU where there is some in truth, and change of HU everywhere else."""
    rows = []
    for name, (low, high) in {"enhanced in truth": (None, None), **_ELSEWHERE}.items():
        true, made = [], []
        for patient in case.patients():
            pairs = [pair for pair in case.pairs() if pair.source.patient == patient]
            parts = [_inside(case, pair, low, high) for pair in pairs]
            both = np.concatenate(parts, axis=1)
            if both.shape[1] > 50:
                true.append(float(both[0].mean()))
                made.append(float(both[1].mean()))
        if true:
            rows.append([name, len(true), spread(true), spread(made)])
    return table(["where", "patients", "true change, HU (range)", "the model's, HU (range)"], rows)


def plain_lines(apply: Translator, data: Images, files: Sequence[Path]) -> list[str]:
    """What real slices without agent change by, there being no truth beside them.

    Args:
        files: one slice each, of patients who did not train.
    """
    changes: dict[str, list[tuple[float, float]]] = {name: [] for name in _ELSEWHERE}
    for path in files:
        hu = voxels_of(read_image(path, "HU"))
        network = fixed(data.source.intensity).to_network(hu)
        everywhere = np.ones(hu.shape[1:], np.bool_)
        change = apply(Plane("", 0, (1.0, 1.0), network, hu[0], everywhere)) - hu[0]
        for name, (low, high) in _ELSEWHERE.items():
            inside = change[(hu[0] > low) & (hu[0] < high)]
            if inside.size > 50:
                changes[name].append((float(inside.mean()), float((inside > 30).mean())))
    rows = [
        [name, len(found), spread([one for one, _ in found]), spread([100 * o for _, o in found])]
        for name, found in changes.items()
        if found
    ]
    head = ["where", "slices", "mean change, HU (range)", "raised by over 30 HU, % (range)"]
    return table(head, rows)


def _inside(case: Case, pair: Pair, low: float | None, high: float | None) -> Values:
    """(2, pixels): true and made change of HU in one class of pixels."""
    plain = pair.source.physical
    true = pair.target.physical - plain
    made = case.apply(pair.source) - plain
    if low is None or high is None:
        inside = true > ENHANCED_HU
    else:
        inside = (plain > low) & (plain < high) & (true <= 1.0)
    return np.stack([true[inside & pair.target.body], made[inside & pair.target.body]])
