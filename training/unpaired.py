"""A translation judged where no slice has its truth: how values are spread, what comes back.

Nothing here says that a result is right: a network can draw the other kind's values in the wrong
places, and the way back can undo what the way there invented.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.inference import Model
from training.alignment import normalised_mutual_information
from training.config import Images, TrainConfig
from training.distributions import histogram_distance
from training.errors import TrainingError
from training.evaluation import MOST_PICTURES, Evaluation, Shown
from training.features import Extractor
from training.measures import Asked
from training.pairs import Pair, Plane, find_images
from training.publish import turned_round
from training.split import read_split
from training.studies import volumes_of
from training.translation import Translator, fixed, pooled_values, translator_of

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Way:
    """The package that is judged and, where there is one, that of the way back."""

    there: Model
    back: Model | None


def judge_unpaired(
    config: TrainConfig,
    data: Images,
    way: Way,
    part: str,
    asked: Asked,
    extractor: Extractor | None = None,
) -> tuple[Evaluation, float]:
    """Every volume of the source's kind of a part, beside all images of the target's kind there.

    Returns:
        The figures, and the histogram distance of the target's real images of the training
        patients to those of the part: about what a faultless translation would have.

    Raises:
        TrainingError: a package is of another unit, or the part has only one kind of image.
    """
    _check_units(data, way)
    found, split = find_images(data), read_split(Path(data.split))
    sources, targets = _of(found.sources, split[part]), _of(found.targets, split[part])
    if not sources or not targets:
        raise TrainingError(f"{data.split}: {part} has only one kind of image")
    real = pooled_values(targets)
    there = translator_of(way.there, config, data)
    back = None
    if way.back is not None:
        back = translator_of(way.back, config, turned_round(data))
    result, made = Evaluation(asked), []
    shown: dict[str, Shown] = {}
    for planes in _volumes(sources):
        results = np.stack([there(plane) for plane in planes])
        result.patients.append(planes[0].patient)
        result.figures.append(_figures(planes, results, real, back, data))
        if len(shown) < MOST_PICTURES:
            shown.setdefault(planes[0].patient, _shown(planes, results))
        if extractor is not None:
            made.append(extractor.features(results, asked.low, asked.high))
    numbers = {name: n for n, name in enumerate(sorted(set(result.patients)), start=1)}
    result.pictures = [replace(shown[name], number=numbers[name]) for name in sorted(shown)]
    if extractor is not None:
        true = [extractor.features(p.physical[None], asked.low, asked.high) for p in targets]
        result.spread = extractor.spread(np.concatenate(made), np.concatenate(true))
    trained = pooled_values(_of(found.targets, split["train"]))
    return result, histogram_distance(trained, real)


def _figures(
    planes: Sequence[Plane],
    results: Values,
    real: Values,
    back: Translator | None,
    data: Images,
) -> dict[str, float]:
    """Of one volume; see measures.PUBLISHED["unpaired"]."""
    body = np.stack([plane.body for plane in planes])
    sources = np.stack([plane.physical for plane in planes])
    figures = {
        "histogram_distance": histogram_distance(results[body], real),
        "information_kept": normalised_mutual_information(sources[body], results[body]),
    }
    if back is not None:
        scale = fixed(data.target.intensity)
        again = np.stack(
            [
                back(replace(plane, network=scale.to_network(made)[None], physical=made))
                for plane, made in zip(planes, results, strict=True)
            ]
        )
        figures["cycle_error"] = float(np.abs(again - sources)[body].mean())
    return figures


def _volumes(planes: Sequence[Plane]) -> Iterator[list[Plane]]:
    for pairs in volumes_of([Pair(plane, plane) for plane in planes]):
        yield [pair.source for pair in pairs]


def _shown(planes: Sequence[Plane], results: Values) -> Shown:
    index = int(np.argmax([plane.body.sum() for plane in planes]))
    return Shown(0, planes[index].physical, results[index], None, same_unit=False)


def _of(planes: Sequence[Plane], patients: Sequence[str]) -> list[Plane]:
    return [plane for plane in planes if plane.patient in patients]


def _check_units(data: Images, way: Way) -> None:
    wanted = {"package": (way.there, data.target.unit)}
    if way.back is not None:
        wanted["the way back"] = (way.back, data.source.unit)
    for name, (model, unit) in wanted.items():
        if (own := model.package.manifest.output.unit) != unit:
            raise TrainingError(f"{name}: its results are in {own}, the images in {unit}")
