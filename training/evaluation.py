"""All volumes of an evaluation judged, and what their patients say together."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingError
from training.features import Extractor, Spread
from training.intervals import Agreement, Difference, Summary, agreement, difference, summary
from training.measures import Asked, figures_of, meaning, means_of
from training.studies import Study

MOST_PICTURES = 8
"""Patients of whom a report shows a slice."""


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """One slice for the report: the one with most of the body, (rows, columns) each, float32.

    Attributes:
        number: of the patient, as in every table.
        source: in its own unit; None: not known.
        truth: None: there is none.
    """

    number: int
    source: NDArray[np.float32] | None
    result: NDArray[np.float32]
    truth: NDArray[np.float32] | None
    same_unit: bool
    """The source is in the unit of the result."""


@dataclass(slots=True, eq=False)
class Evaluation:
    """Figures of every volume, in the order they came; `others` those of what it is compared with.

    Attributes:
        patients: hash of each volume's patient.
        compared: name -> (result, truth) of each volume that has it, with the patient's hash.
        spread: distances of features; None: not asked for.
    """

    asked: Asked
    patients: list[str] = field(default_factory=list)
    figures: list[Mapping[str, float]] = field(default_factory=list)
    others: list[Mapping[str, float]] = field(default_factory=list)
    compared: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    pictures: list[Shown] = field(default_factory=list)
    spread: Spread | None = None

    @property
    def names(self) -> list[str]:
        """Figures that any volume has, in the profile's order."""
        every = dict.fromkeys(name for figures in self.figures for name in figures)
        return [name for name in every if any(np.isfinite(self._column(name)))]

    def summaries(self) -> dict[str, Summary]:
        """Figure -> over patients."""
        return {name: summary(self._column(name), self.patients) for name in self.names}

    def differences(self) -> dict[str, Difference]:
        """Figure -> result minus what it is compared with, over patients; empty: nothing is."""
        if not self.others:
            return {}
        columns = {name: [found[name] for found in self.others] for name in self.names}
        return {
            name: difference(self._column(name), other, self.patients)
            for name, other in columns.items()
        }

    def pairs(self) -> dict[str, list[tuple[float, float]]]:
        """Name -> (result, truth), the mean of each patient, in the order of the hashes."""
        found = {}
        for name, rows in self.compared.items():
            patients = sorted({patient for patient, _, _ in rows})
            own = {p: [(made, truth) for q, made, truth in rows if q == p] for p in patients}
            found[name] = [(float(a), float(b)) for a, b in (np.mean(own[p], 0) for p in patients)]
        return found

    def agreements(self) -> dict[str, Agreement]:
        """Bland and Altman of each of `pairs` that has two patients or more."""
        return {
            name: agreement([made for made, _ in pairs], [truth for _, truth in pairs])
            for name, pairs in self.pairs().items()
            if len(pairs) > 1
        }

    def by_patient(self) -> list[dict[str, float]]:
        """Figure -> mean over the patient's volumes, patient by patient in the order of hashes."""
        rows = []
        for patient in sorted(set(self.patients)):
            own = [f for p, f in zip(self.patients, self.figures, strict=True) if p == patient]
            known = {name: [f[name] for f in own if np.isfinite(f[name])] for name in self.names}
            rows.append({name: float(np.mean(v)) for name, v in known.items() if v})
        return rows

    def _column(self, name: str) -> list[float]:
        return [figures.get(name, float("nan")) for figures in self.figures]

    def as_data(self) -> dict[str, Any]:
        """Plain values for metrics.json; what is not a number is None."""
        asked = self.asked
        data: dict[str, Any] = _plain(
            {
                "profile": asked.profile,
                "unit": asked.unit,
                "range": [asked.low, asked.high],
                "exam": asked.exam if asked.profile == "ldctbench" else None,
                "patients": len(set(self.patients)),
                "volumes": len(self.patients),
                "meaning": {name: " / ".join(meaning(name, asked)) for name in self.names},
                "figures": {name: asdict(found) for name, found in self.summaries().items()},
                "against_other": {name: asdict(d) for name, d in self.differences().items()},
                "agreement": {name: asdict(found) for name, found in self.agreements().items()},
                "features": asdict(self.spread) if self.spread else None,
                "by_patient": self.by_patient(),
            }
        )
        return data


def evaluate(
    studies: Iterable[Study], asked: Asked, extractor: Extractor | None = None
) -> Evaluation:
    """Judge every volume.

    Raises:
        TrainingError: there is no volume, or a volume cannot be judged so.
    """
    found = Evaluation(asked)
    made, true = [], []
    shown: dict[str, Shown] = {}
    for study in studies:
        found.patients.append(study.patient)
        found.figures.append(figures_of(study, asked))
        if study.other is not None:
            found.others.append(figures_of(study, asked, study.other))
        for name, (value, truth) in means_of(study, asked).items():
            found.compared.setdefault(name, []).append((study.patient, value, truth))
        if len(shown) < MOST_PICTURES or study.patient in shown:
            shown.setdefault(study.patient, _shown(study))
        if extractor is not None:
            made.append(extractor.features(study.result, asked.low, asked.high))
            true.append(extractor.features(study.truth, asked.low, asked.high))
    if not found.patients:
        raise TrainingError("nothing to judge: no volume of this part")
    if found.others and len(found.others) != len(found.figures):
        raise TrainingError("other: only some of the volumes have one")
    numbers = {patient: n for n, patient in enumerate(sorted(set(found.patients)), start=1)}
    for patient, picture in sorted(shown.items(), key=lambda item: numbers[item[0]]):
        found.pictures.append(replace(picture, number=numbers[patient]))
    if extractor is not None:
        found.spread = extractor.spread(np.concatenate(made), np.concatenate(true))
    return found


def _shown(study: Study) -> Shown:
    index = int(study.body.sum(axis=(1, 2)).argmax())
    source = None if study.source is None else study.source[index]
    return Shown(0, source, study.result[index], study.truth[index], study.same_unit)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value
