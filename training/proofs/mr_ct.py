"""CT from MR and MR from CT against what needs no network: one value, and a value per intensity."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.units import Unit
from training.pairs import Pair
from training.proofs.case import Case, spread, table

BONE_HU = 200.0
_BODY: Mapping[Unit, float] = {"HU": -500.0, "AU": 50.0}
"""A pixel of the true image above this is the patient."""
_BINS = np.linspace(-1.2, 1.6, 80)
Values = NDArray[np.float32]


def ct_from_mr(case: Case) -> list[str]:
    """MAE in the body in HU, its parts by tissue of the true CT, and overlap of bone."""
    results = _results(case)
    rows = [
        [
            name,
            spread([_mae(*item) for item in pairs]),
            *(
                spread([_mae(*_where(*item, low, high)) for item in pairs])
                for low, high in _TISSUES
            ),
            spread([_overlap(*item) for item in pairs]),
        ]
        for name, pairs in results.items()
    ]
    head = [
        "mean over patients (range)",
        "MAE, HU",
        "fat and air",
        "soft tissue",
        "bone",
        "IoU bone",
    ]
    return table(head, rows)


_TISSUES = ((-np.inf, -30.0), (-30.0, BONE_HU), (BONE_HU, np.inf))


def mr_from_ct(case: Case) -> list[str]:
    """MAE in the body in units of the fat-normalised MR, and correlation with the true MR."""
    rows = [
        [
            name,
            spread([_mae(*item) for item in pairs]),
            spread([_correlation(*item) for item in pairs]),
        ]
        for name, pairs in _results(case).items()
    ]
    return table(["mean over patients (range)", "MAE", "correlation"], rows)


def _results(case: Case) -> Mapping[str, list[tuple[Values, Values]]]:
    """Name of a method -> for each patient its values and the true ones, in the body."""
    training, unit = case.pairs("train"), case.data.target.unit
    shown = np.concatenate([_given(pair, unit) for pair in training])
    wanted = np.concatenate([_true(pair, unit) for pair in training])
    middle = np.float32(np.median(wanted))
    bins = np.digitize(shown, _BINS)
    by_intensity = np.array(
        [
            np.median(wanted[bins == place]) if (bins == place).any() else middle
            for place in range(len(_BINS) + 1)
        ],
        np.float32,
    )
    methods: Mapping[str, Callable[[Pair], Values]] = {
        "one value, the median": lambda pair: np.full_like(_true(pair, unit), middle),
        "a value per intensity": lambda pair: by_intensity[np.digitize(_given(pair, unit), _BINS)],
        "the model": lambda pair: case.apply(pair.source)[_body(pair, unit)],
    }
    return {name: _by_patient(case, method) for name, method in methods.items()}


def _by_patient(case: Case, method: Callable[[Pair], Values]) -> list[tuple[Values, Values]]:
    pairs = case.pairs()
    result = []
    for patient in case.patients():
        own = [pair for pair in pairs if pair.source.patient == patient]
        made = np.concatenate([method(pair) for pair in own])
        result.append((made, np.concatenate([_true(pair, case.data.target.unit) for pair in own])))
    return result


def _body(pair: Pair, unit: Unit) -> NDArray[np.bool_]:
    return np.asarray(pair.target.body & (pair.target.physical > _BODY[unit]), np.bool_)


def _given(pair: Pair, unit: Unit) -> Values:
    middle = len(pair.source.network) // 2
    given: Values = pair.source.network[middle][_body(pair, unit)]
    return given


def _true(pair: Pair, unit: Unit) -> Values:
    return pair.target.physical[_body(pair, unit)]


def _where(made: Values, true: Values, low: float, high: float) -> tuple[Values, Values]:
    inside = (true >= low) & (true < high)
    return made[inside], true[inside]


def _mae(made: Values, true: Values) -> float:
    return float(np.abs(made - true).mean()) if true.size else float("nan")


def _overlap(made: Values, true: Values) -> float:
    """Intersection over union of what is bone."""
    one, other = made > BONE_HU, true > BONE_HU
    return float((one & other).sum() / max((one | other).sum(), 1))


def _correlation(made: Values, true: Values) -> float:
    if made.std() == 0:
        return 0.0
    return float(np.corrcoef(made, true)[0, 1])
