"""What a run trains on and is judged by: lower-dose versions of slices, or two kinds of images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from dicomnode.imaging.networks import Generator
from dicomnode.imaging.package import ModelPackage
from training import data as low_dose
from training import pairs
from training.config import Data, Images, TrainConfig, window_of
from training.errors import TrainingError
from training.export import export_package
from training.figures import denoiser, evaluate_samples
from training.publish import export_translation
from training.recipes import Batch
from training.split import PARTS, Split, split_patients
from training.translation import evaluate_planes, translator


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

    def export(self, networks: Mapping[str, Generator]) -> list[ModelPackage]:
        """Judge on the test patients and write the packages."""


def load_material(config: TrainConfig) -> Material:
    """Find, read, split.

    Raises:
        TrainingError: the data cannot be used; the message says which and why.
    """
    if isinstance(config.data, Data):
        return LowDoseSlices(config, config.data)
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

    def describe(self) -> list[str]:
        sizes = ", ".join(f"{len(self._parts[part])} {part}" for part in PARTS)
        return [f"slices: {sizes}", f"left out: {dict(self._left_out)}"]

    def batch(self, step: int) -> Batch:
        config, settings = self._config, self._config.optimisation
        return low_dose.draw_batch(
            self._parts["train"],
            window_of(config),
            config.low_dose,
            config.details,
            settings.batch_size,
            settings.patch,
            np.random.default_rng([config.seed, step]),
        )

    def figures(self, networks: Mapping[str, Generator], part: str) -> dict[str, float]:
        network = denoiser(networks["forward"], window_of(self._config))
        return {"gain_db": evaluate_samples(network, self._parts[part]).gain_db[0]}

    def export(self, networks: Mapping[str, Generator]) -> list[ModelPackage]:
        network = denoiser(networks["forward"], window_of(self._config))
        figures = evaluate_samples(network, self._parts["test"])
        package = export_package(
            self._config, networks["forward"], self._samples, self._split, figures
        )
        return [package]


class ImagePairs:
    """Two kinds of images, of one place or not."""

    def __init__(self, config: TrainConfig, data: Images) -> None:
        self._config, self._data = config, data
        self._found = pairs.find_images(data)
        self._split = _split(config, self._found.patients, set())
        if empty := [part for part in PARTS if not self._planes(part)]:
            raise TrainingError(f"{data.split}: no slice is in {', '.join(empty)}; see the split")
        self.epoch_steps = _steps(len(self._planes("train")), config)

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
        network = translator(networks["forward"], self._config, self._data)
        return evaluate_planes(network, self._found, self._split[part], self._data).means()

    def export(self, networks: Mapping[str, Generator]) -> list[ModelPackage]:
        return export_translation(self._config, self._data, networks, self._found, self._split)

    def _planes(self, part: str) -> list[pairs.Plane]:
        return [plane for plane in self._found.sources if plane.patient in self._split[part]]


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
