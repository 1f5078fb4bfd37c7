"""Slices of one part of a run's patients, as a package's generator is given them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.manifest import Manifest
from dicomnode.imaging.networks import pad_to_multiple
from dicomnode.imaging.percentiles import Percentiles
from training.config import Data, Images, TrainConfig
from training.data import load_samples
from training.errors import TrainingError
from training.metrics import body_mask
from training.pairs import find_images
from training.split import read_split

Image = NDArray[np.float32]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One slice.

    Attributes:
        given: (1, slices, rows, columns), float32, in [-1, 1]: a multiple of the generator's.
        source: (rows, columns), float32, physical: what a residual is added to.
        truth: (rows, columns), float32, in the output's unit.
        body: (rows, columns), bool.
    """

    given: Image
    source: Image
    truth: Image
    body: NDArray[np.bool_]

    def physical(self, made: Image, manifest: Manifest) -> Image:
        """What a generator made of `given`, (1, 1, rows, columns), in the output's unit."""
        rows, columns = self.truth.shape
        scale = manifest.output.intensity
        if isinstance(scale, Percentiles):
            raise TrainingError(f"{manifest.name}: its result has no window of its own")
        change = made[0, 0, :rows, :columns]
        if manifest.output.residual:
            return self.source + change * np.float32(scale.unit_per_network)
        return scale.from_network(change)

    def middle(self, side: int) -> "Case":
        """Its middle, `side` rows and columns; all of it if it is smaller."""
        rows, columns = self.truth.shape
        if min(rows, columns) < side:
            return self
        top, left = (rows - side) // 2, (columns - side) // 2
        part = (slice(top, top + side), slice(left, left + side))
        given = np.ascontiguousarray(self.given[:, :, *part])
        return Case(given, self.source[part], self.truth[part], self.body[part])


def load_cases(config: TrainConfig, manifest: Manifest, part: str, most: int) -> list[Case]:
    """Up to `most` slices of the patients of a part, spread evenly over all there are.

    A low-dose slice comes at different doses, each with its own noise.

    Raises:
        TrainingError: there is none, or the run is of another kind.
    """
    patients = read_split(Path(config.data.split))[part]
    if isinstance(config.data, Data):
        cases = _low_dose(config, config.data, manifest, patients, most)
    elif isinstance(config.data, Images):
        cases = _pairs(config.data, manifest, patients, most)
    else:
        raise TrainingError("data.kind: a classifier makes no images")
    if not cases:
        raise TrainingError(f"{config.data.split}: no slice is in {part}")
    return cases


def _low_dose(
    config: TrainConfig, data: Data, manifest: Manifest, patients: Sequence[str], most: int
) -> list[Case]:
    scale = manifest.input.intensity
    if isinstance(scale, Percentiles):
        raise TrainingError(f"{manifest.name}: percentiles are of a whole volume, not of a slice")
    low_dose = config.low_dose
    samples, _ = load_samples(data, low_dose, config.seed, config.out / "cache")
    own = [sample for sample in samples if sample.patient in patients]
    doses = np.geomspace(low_dose.lowest, low_dose.highest, low_dose.realisations)
    drawn = [(sample, n) for n in range(low_dose.realisations) for sample in own]
    cases = []
    for sample, number in spread(drawn, most):
        source = sample.at_dose(float(doses[number]), number)
        given = padded(scale.to_network(source)[None, None], manifest)
        cases.append(Case(given, source, sample.hu, body_mask(sample.hu)))
    return cases


def _pairs(data: Images, manifest: Manifest, patients: Sequence[str], most: int) -> list[Case]:
    if not data.paired:
        raise TrainingError("data.paired: without pairs there is no truth to compare with")
    found = find_images(data)
    own = [
        (source, target)
        for source, target in zip(found.sources, found.targets, strict=True)
        if source.patient in patients
    ]
    return [
        Case(padded(source.network[None], manifest), source.physical, target.physical, target.body)
        for source, target in spread(own, most)
    ]


def padded(given: Image, manifest: Manifest) -> Image:
    """(1, slices, rows, columns) grown at its ends as the node does it."""
    padding = manifest.input.padding
    grown = pad_to_multiple(given, padding.multiple, padding.mode)
    return np.ascontiguousarray(grown, np.float32)


def spread(items: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of `items`, evenly from first to last."""
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most)]
