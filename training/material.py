"""What a run trains on and is judged by: lower-dose versions of slices, or two kinds of images."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.networks import Generator
from dicomnode.imaging.package import ModelPackage
from training import data as low_dose
from training import pairs, strips
from training.classification import PicturesByClass
from training.config import TWO_WAYS, Classes, Data, Images, TrainConfig, window_of
from training.errors import TrainingError
from training.export import export_package
from training.figures import denoiser, evaluate_samples
from training.publish import export_translation
from training.recipes import Batch
from training.split import PARTS, Split, split_patients
from training.strength import at_strength
from training.translation import Translator, evaluate_planes, fixed, translator

PICTURES, PICTURE_DOSE = 3, 0.25
"""Slices of a validation picture, and their dose where that is lowered."""
_Any = TypeVar("_Any")


class Material(Protocol):
    """What `train` needs of the data."""

    epoch_steps: int
    """Steps that bring every training slice once."""

    def describe(self) -> list[str]:
        """Lines for the screen: how much there is, what was left out, warnings."""

    def batch(self, step: int) -> Batch:
        """The batch of a step: a function of the seed and the step alone."""

    def figures(self, networks: Mapping[str, Generator], part: str) -> dict[str, float]:
        """How the networks do on the patients of a part: name -> mean over patients."""

    def picture(self, networks: Mapping[str, Generator]) -> NDArray[np.uint8] | None:
        """Validation slices, source | result | truth | error, (rows, columns), uint8."""

    def digest(self) -> str:
        """SHA-256 of every value that is trained or judged on."""

    def export(self, networks: Mapping[str, Generator], steps: int) -> list[ModelPackage]:
        """Judge on the test patients and write the packages, of networks trained so many steps."""


def load_material(config: TrainConfig) -> Material:
    """Find, read, split.

    Raises:
        TrainingError: the data cannot be used; the message says which and why.
    """
    if isinstance(config.data, Data):
        return LowDoseSlices(config, config.data)
    if isinstance(config.data, Classes):
        return PicturesByClass(config, config.data)
    return ImagePairs(config, config.data)


class LowDoseSlices:
    """Real CT slices, with noise for a lower dose."""

    def __init__(self, config: TrainConfig, data: Data) -> None:
        self._config, self._data = config, data
        self._samples, self._left_out = low_dose.load_samples(
            data, config.low_dose, config.seed, config.out / "cache"
        )
        trained = {s.patient for s in self._samples if s.folder.use == "train"}
        self._split = _split(config, {s.patient for s in self._samples}, trained)
        self._parts = {
            part: [s for s in self._samples if s.patient in self._split[part]] for part in PARTS
        }
        self.epoch_steps = _steps(len(self._parts["train"]), config)
        self._digest = _sha256(array for s in self._samples for array in (s.hu, s.noise))

    def describe(self) -> list[str]:
        sizes = ", ".join(f"{len(self._parts[part])} {part}" for part in PARTS)
        return [f"slices: {sizes}", f"left out: {dict(self._left_out)}"]

    def batch(self, step: int) -> Batch:
        seed, two_ways = self._config.seed, self._config.recipe in TWO_WAYS
        batch = self._draw(np.random.default_rng([seed, step]))
        if two_ways:  # full dose of other places
            other = self._draw(np.random.default_rng([seed, step, 1]))
            batch = batch._replace(target=other.target)
        return batch

    def _draw(self, rng: np.random.Generator) -> Batch:
        config, settings = self._config, self._config.optimisation
        return low_dose.draw_batch(
            self._parts["train"],
            window_of(config),
            config.low_dose,
            config.details,
            settings.batch_size,
            settings.patch,
            rng,
        )

    def figures(self, networks: Mapping[str, Generator], part: str) -> dict[str, float]:
        network = denoiser(networks["forward"], window_of(self._config))
        return {"gain_db": evaluate_samples(network, self._parts[part]).gain_db[0]}

    def picture(self, networks: Mapping[str, Generator]) -> NDArray[np.uint8] | None:
        network = denoiser(networks["forward"], window_of(self._config))
        found = []
        for sample in _spread(self._parts["validation"]):
            low = sample.at_dose(PICTURE_DOSE, 0)
            result = network(low)
            shown = [strips.grey(hu, "HU", hu) for hu in (low, result, sample.hu)]
            found.append(strips.strip([*shown, strips.error(result, sample.hu, "HU", 1.0)]))
        return strips.stack(found)

    def digest(self) -> str:
        return self._digest

    def export(self, networks: Mapping[str, Generator], steps: int) -> list[ModelPackage]:
        config = self._config
        generator = at_strength(config.generator, networks["forward"], config.strength)
        network = denoiser(generator, window_of(config))
        figures = evaluate_samples(network, self._parts["test"])
        package = export_package(config, generator, self._samples, self._split, figures, steps)
        return [package]


class ImagePairs:
    """Two kinds of images, of one place or not."""

    def __init__(self, config: TrainConfig, data: Images) -> None:
        self._config, self._data = config, data
        self._found = pairs.find_images(data)
        self._split = _split(config, self._found.patients, set())
        missed = {
            "train": True,
            "validation": config.stopping is not None,
            "test": bool(self._split["test"]),  # a split may say that nobody tests
        }
        if empty := [part for part in PARTS if missed[part] and not self._planes(part)]:
            raise TrainingError(f"{data.split}: no slice is in {', '.join(empty)}; see the split")
        self.epoch_steps = _steps(len(self._planes("train")), config)
        planes = (*self._found.sources, *self._found.targets)
        self._digest = _sha256(part for p in planes for part in (p.network, p.physical))

    def describe(self) -> list[str]:
        sizes = ", ".join(f"{len(self._planes(part))} {part}" for part in PARTS)
        lines = [f"slices: {sizes}", f"left out: {dict(self._found.left_out)}"]
        return [*lines, *(f"warning: {words}" for words in self._found.warnings)]

    def batch(self, step: int) -> Batch:
        settings = self._config.optimisation
        rng = np.random.default_rng([self._config.seed, step])
        patients = self._split["train"]
        return pairs.draw_batch(
            self._found, patients, self._data, settings.batch_size, settings.patch, rng
        )

    def figures(self, networks: Mapping[str, Generator], part: str) -> dict[str, float]:
        if not self._planes(part):
            return {}  # nobody validates: nothing is chosen
        network = translator(networks["forward"], self._config, self._data)
        return evaluate_planes(network, self._found, self._split[part], self._data).means()

    def picture(self, networks: Mapping[str, Generator]) -> NDArray[np.uint8] | None:
        network = translator(networks["forward"], self._config, self._data)
        part = self._split["validation"]
        held_out = [i for i, plane in enumerate(self._found.sources) if plane.patient in part]
        return strips.stack([self._strip(network, index) for index in _spread(held_out)])

    def digest(self) -> str:
        return self._digest

    def export(self, networks: Mapping[str, Generator], steps: int) -> list[ModelPackage]:
        return export_translation(
            self._config, self._data, networks, self._found, self._split, steps
        )

    def _strip(self, network: Translator, index: int) -> NDArray[np.uint8]:
        """One slice: with its truth where both show one place, else source and result alone."""
        data, source = self._data, self._found.sources[index]
        middle = source.network[len(source.network) // 2]
        result, scale = network(source), fixed(data.target.intensity)
        shown = [strips.grey(source.physical, data.source.unit, middle)]
        shown += [strips.grey(result, data.target.unit, scale.to_network(result))]
        if data.paired:
            target = self._found.targets[index]
            truth, unit = target.physical, data.target.unit
            shown += [strips.grey(truth, unit, target.network[0])]
            shown += [strips.error(result, truth, unit, scale.unit_per_network)]
        return strips.strip(shown)

    def _planes(self, part: str) -> list[pairs.Plane]:
        return [plane for plane in self._found.sources if plane.patient in self._split[part]]


def _spread(held_out: Sequence[_Any]) -> list[_Any]:
    """A few of them, evenly."""
    every = max(1, len(held_out) // PICTURES)
    return list(held_out[every // 2 :: every][:PICTURES])


def _sha256(arrays: Iterable[NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _steps(slices: int, config: TrainConfig) -> int:
    return max(1, -(-slices // config.optimisation.batch_size))


def _split(config: TrainConfig, patients: set[str], train_only: set[str]) -> Split:
    data = config.data
    return split_patients(
        Path(data.split),
        patients,
        train_only,
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
        seed=config.seed,
    )
