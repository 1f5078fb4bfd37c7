"""CT from MR and MR from CT against what needs no network: one value, and a value per intensity.

Of CT the mean absolute error in the body in HU, its parts by tissue of the true CT, and the overlap
of bone; of MR the error in units of the fat-normalised MR, and the correlation with the true MR.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.units import Unit
from training.pairs import Pair
from training.proofs.case import Case, spread, table

BONE_HU = 200.0
MODEL, ONE, BY_INTENSITY = "the model", "one value, the median", "a value per intensity"
TOLD = "a value per intensity, told where the body is"
"""The model is not told; dark in the body is bone, dark around it air."""
_BODY: Mapping[Unit, float] = {"HU": -500.0, "AU": 50.0}
"""A pixel of the true image above this is the patient."""
_BINS = np.linspace(-1.2, 1.6, 80)
Values = NDArray[np.float32]
Figure = Callable[[Values, Values], float]
"""Of what was made and what is true, both (pixels of one patient,)."""


def lines(case: Case) -> list[str]:
    """What every method comes to on the patients judged: mean over patients, and range."""
    rows = [
        [
            name,
            *(
                spread([figure(*item) for item in pairs])
                for figure in _FIGURES[_unit(case)].values()
            ),
        ]
        for name, pairs in _results(case).items()
    ]
    return table(["mean over patients (range)", *_FIGURES[_unit(case)]], rows)


def beside_intensity(case: Case) -> dict[str, list[tuple[float, ...]]]:
    """Name of a figure -> for each patient judged: of MODEL, ONE, BY_INTENSITY and TOLD."""
    results = _results(case)
    each = list(zip(*(results[name] for name in (MODEL, ONE, BY_INTENSITY, TOLD)), strict=True))
    return {
        name: [tuple(figure(*item) for item in patient) for patient in each]
        for name, figure in _FIGURES[_unit(case)].items()
    }


def _results(case: Case) -> Mapping[str, list[tuple[Values, Values]]]:
    """Name of a method -> for each patient its values and the true ones, in the body."""
    training, unit = case.pairs("train"), _unit(case)
    middle = np.float32(np.median(np.concatenate([_true(pair, unit) for pair in training])))
    told = _by_intensity(training, lambda pair: _body(pair, unit), middle)
    untold = _by_intensity(training, lambda pair: pair.target.body, middle)

    def looked_up(values: Values, pair: Pair) -> Values:
        return values[np.digitize(_given(pair, _body(pair, unit)), _BINS)]

    methods: Mapping[str, Callable[[Pair], Values]] = {
        ONE: lambda pair: np.full_like(_true(pair, unit), middle),
        BY_INTENSITY: lambda pair: looked_up(untold, pair),
        TOLD: lambda pair: looked_up(told, pair),
        MODEL: lambda pair: case.apply(pair.source)[_body(pair, unit)],
    }
    return {name: _by_patient(case, method) for name, method in methods.items()}


def _by_intensity(
    pairs: Sequence[Pair], where: Callable[[Pair], NDArray[np.bool_]], middle: np.float32
) -> Values:
    """The median of the true values for each bin of the source's; `middle` where there are none."""
    shown = np.digitize(np.concatenate([_given(pair, where(pair)) for pair in pairs]), _BINS)
    wanted = np.concatenate([pair.target.physical[where(pair)] for pair in pairs])
    bins = [wanted[shown == place] for place in range(len(_BINS) + 1)]
    return np.array([np.median(one) if one.size else middle for one in bins], np.float32)


def _by_patient(case: Case, method: Callable[[Pair], Values]) -> list[tuple[Values, Values]]:
    pairs = case.pairs()
    result = []
    for patient in case.patients():
        own = [pair for pair in pairs if pair.source.patient == patient]
        made = np.concatenate([method(pair) for pair in own])
        result.append((made, np.concatenate([_true(pair, _unit(case)) for pair in own])))
    return result


def _unit(case: Case) -> Unit:
    return case.data.target.unit


def _body(pair: Pair, unit: Unit) -> NDArray[np.bool_]:
    return np.asarray(pair.target.body & (pair.target.physical > _BODY[unit]), np.bool_)


def _given(pair: Pair, where: NDArray[np.bool_]) -> Values:
    middle = len(pair.source.network) // 2
    given: Values = pair.source.network[middle][where]
    return given


def _true(pair: Pair, unit: Unit) -> Values:
    return pair.target.physical[_body(pair, unit)]


def _mae_where(low: float, high: float) -> Figure:
    """The error where the true values are from `low` to below `high`."""

    def figure(made: Values, true: Values) -> float:
        inside = (true >= low) & (true < high)
        return _mae(made[inside], true[inside])

    return figure


def _mae(made: Values, true: Values) -> float:
    return float(np.abs(made - true).mean()) if true.size else float("nan")


def _overlap(made: Values, true: Values) -> float:
    """Intersection over union of what is bone."""
    one, other = made > BONE_HU, true > BONE_HU
    return int((one & other).sum()) / max(int((one | other).sum()), 1)


def _correlation(made: Values, true: Values) -> float:
    if made.min() == made.max():
        return 0.0
    return float(np.corrcoef(made, true)[0, 1])


_FIGURES: Mapping[Unit, Mapping[str, Figure]] = {
    "HU": {
        "MAE, HU": _mae,
        "fat and air": _mae_where(-np.inf, -30.0),
        "soft tissue": _mae_where(-30.0, BONE_HU),
        "bone": _mae_where(BONE_HU, np.inf),
        "IoU bone": _overlap,
    },
    "AU": {"MAE": _mae, "correlation": _correlation},
}
