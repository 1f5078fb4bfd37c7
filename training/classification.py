"""A classifier's data: drawn in batches, judged by group, written as a package."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.errors import ConfigError
from dicomnode.imaging.classes import Class, ClassifierInput, ClassifierManifest
from dicomnode.imaging.classifier import ClassifierPackage, write_classifier
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import DicomSpec
from dicomnode.imaging.networks import Classifier, probabilities_of
from training.agreement import accuracy, bootstrap, mean_area
from training.card import filled
from training.config import Classes, TrainConfig
from training.errors import TrainingError
from training.pictures import Picture, as_network_sees, draw_batch, find_pictures, plainly_known
from training.recipes import Batch
from training.split import PARTS, Split, split_patients


class PicturesByClass:
    """Pictures in folders named by their class; see `material.Material`."""

    def __init__(self, config: TrainConfig, data: Classes) -> None:
        self._config, self._data = config, data
        self._found = find_pictures(data)
        self._split = split_pictures(config, data, self._found.pictures)
        if empty := [part for part in PARTS if not self._part(part)]:
            raise TrainingError(f"{data.split}: no picture is in {', '.join(empty)}; see the split")
        train = self._part("train")
        self._seen = torch.stack([as_network_sees(picture, data.matrix) for picture in train])
        self._labels = np.array([picture.label for picture in train], np.intp)
        if absent := set(range(len(data.classes))) - set(self._labels.tolist()):
            names = ", ".join(data.classes[label].name for label in sorted(absent))
            raise TrainingError(f"{data.split}: no picture to train on of {names}")
        self.epoch_steps = -(-len(train) // config.optimisation.batch_size)
        self._digest = hashlib.sha256()
        for picture in self._found.pictures:
            self._digest.update(picture.grey.tobytes() + bytes([picture.label]))

    def describe(self) -> list[str]:
        sizes = ", ".join(f"{len(self._part(part))} {part}" for part in PARTS)
        groups = len({picture.group for picture in self._found.pictures})
        lines = [f"pictures: {sizes}; {groups} groups that are kept together"]
        lines.append(f"left out: {self._found.left_out}")
        return lines + [f"warning: {words}" for words in self._found.warnings]

    def batch(self, step: int) -> Batch:
        size, rng = (
            self._config.optimisation.batch_size,
            np.random.default_rng([self._config.seed, step]),
        )
        return draw_batch(self._seen, self._labels, self._data, size, rng)

    def figures(self, networks: Mapping[str, Any], part: str) -> dict[str, float]:
        pictures = self._part(part)
        found = classified(networks["forward"], pictures, self._data)
        truth = labels_of(pictures)
        return {"accuracy": accuracy(found, truth), "area_under_curve": mean_area(found, truth)}

    def picture(self, networks: Mapping[str, Any]) -> None:
        """A classifier makes no image."""

    def digest(self) -> str:
        return self._digest.hexdigest()

    def export(self, networks: Mapping[str, Any], steps: int) -> list[Any]:
        """One package, which is a classifier's."""
        return [self._write(networks["forward"], steps)]

    def _part(self, part: str) -> list[Picture]:
        return [picture for picture in self._found.pictures if picture.group in self._split[part]]

    def _write(self, network: Classifier, steps: int) -> ClassifierPackage:
        config, test = self._config, self._part("test")
        training = {
            "config_sha256": config.digest(),
            "collection": self._data.collection,
            "recipe": config.recipe,
            "seed": config.seed,
            "steps": steps,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "pictures": {part: len(self._part(part)) for part in PARTS},
        }
        found, truth = classified(network, test, self._data), labels_of(test)
        guessed = plainly_known(self._part("train"), test)
        groups = [picture.group for picture in test]
        right = bootstrap(lambda index: accuracy(found[index], truth[index]), groups)
        validation = {
            "pictures": len(test),
            "accuracy": [round(x, 3) for x in (right.value, right.low, right.high)],
            "area_under_curve": round(mean_area(found, truth), 3),
            "accuracy_by_size_and_brightness_alone": round(float((guessed == truth).mean()), 3),
            "warnings": list(self._found.warnings),
        }
        manifest = manifest_of(config, self._data, training, validation)
        card = filled(config.card, name=config.name, version=config.version, **validation)
        golden = _golden(self._data, config.seed)
        return write_classifier(Path(config.package), manifest, network.state_dict(), golden, card)


def manifest_of(
    config: TrainConfig,
    data: Classes,
    training: Mapping[str, Any],
    validation: Mapping[str, Any],
) -> ClassifierManifest:
    """manifest.yaml of the classifier that `config` trains.

    Raises:
        ConfigError: `classifier` is missing.
    """
    publish = config.classifier
    if publish is None:
        raise ConfigError("classifier: missing; it says what the package is for")
    low, high = data.grey_hu
    return ClassifierManifest(
        format=1,
        name=config.name,
        version=config.version,
        task="classify",
        network=config.generator,
        input=ClassifierInput("CT", "HU", Window(low, high), data.matrix),
        classes=tuple(Class(one.name, one.code) for one in data.classes),
        bounds=publish.bounds,
        dicom=DicomSpec(config.name, publish.algorithm_family, config.version),
        licence=publish.licence,
        intended_use=publish.intended_use,
        site=publish.site,
        training=training,
        validation=validation,
    )


def split_pictures(config: TrainConfig, data: Classes, pictures: Sequence[Picture]) -> Split:
    """Which groups of pictures train, validate and test."""
    return split_patients(
        Path(data.split),
        {picture.group for picture in pictures},
        (),
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
        seed=config.seed,
    )


def labels_of(pictures: Sequence[Picture]) -> NDArray[np.intp]:
    """(pictures,): the class of each."""
    return np.array([picture.label for picture in pictures], np.intp)


def classified(
    network: Classifier, pictures: Sequence[Picture], data: Classes
) -> NDArray[np.float64]:
    """(pictures, classes): probabilities, by the same code that serves."""
    found = [
        probabilities_of(network, picture.grey[None] / 127.5 - 1.0, data.matrix, network.channels)
        for picture in pictures
    ]
    return np.concatenate(found).astype(np.float64)


def _golden(data: Classes, seed: int) -> NDArray[np.float32]:
    """Two pictures of noise, (2, 96, 96), float32, HU."""
    low, high = data.grey_hu
    noise = np.random.default_rng(seed).uniform(low, high, (2, 96, 96))
    return noise.astype(np.float32)
