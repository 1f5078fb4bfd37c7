"""From the trained generators of a translation to model packages."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dicomnode.errors import ConfigError
from dicomnode.imaging.intensity import Equalised, Intensity, Window
from dicomnode.imaging.manifest import (
    DicomSpec,
    InputSpec,
    Manifest,
    OutputSpec,
    Padding,
    Range,
)
from dicomnode.imaging.networks import Generator
from dicomnode.imaging.package import ModelPackage, write_package
from dicomnode.imaging.percentiles import Percentiles
from training.card import filled
from training.config import Backward, Images, Publish, TrainConfig
from training.export import golden_input, normalisation_of, tiling_of
from training.pairs import Found, Plane
from training.split import PARTS, Split
from training.translation import TranslationFigures, evaluate_planes, translator


def export_translation(
    config: TrainConfig,
    data: Images,
    networks: Mapping[str, Generator],
    found: Found,
    split: Split,
    steps: int,
) -> list[ModelPackage]:
    """Write the package of `config` after so many steps, and that of the way back if there is one.

    Raises:
        ConfigError: a card cannot be read, or names an unknown figure.
    """
    if config.publish is None:
        raise ConfigError("publish: missing; it says what the package is for")
    figures = evaluate_planes(
        translator(networks["forward"], config, data), found, split["test"], data
    )
    forward = Backward(config.name, config.package, config.card, config.publish)
    written = [
        _write(config, data, forward, networks["forward"], found.sources, split, figures, steps)
    ]
    if config.backward is not None:
        if "backward" not in networks:
            raise ConfigError(f"backward: {config.recipe} trains one way only; remove the key")
        turned, back = turned_round(data), Found(found.targets, found.sources, {}, ())
        figures = evaluate_planes(
            translator(networks["backward"], config, turned), back, split["test"], turned
        )
        backward, network = config.backward, networks["backward"]
        written.append(
            _write(config, turned, backward, network, back.sources, split, figures, steps)
        )
    return written


def turned_round(data: Images) -> Images:
    """The same images with source and target exchanged."""
    return replace(data, source=data.target, target=data.source)


def _write(
    config: TrainConfig,
    data: Images,
    target: Backward,
    generator: Generator,
    planes: Sequence[Plane],
    split: Split,
    figures: TranslationFigures,
    steps: int,
) -> ModelPackage:
    training = _describe_training(config, data, planes, split) | {"steps": steps}
    validation = _describe_figures(figures)
    manifest = _manifest(config, data, target, generator, planes, training, validation)
    card = filled(target.card, name=target.name, version=config.version, **training, **validation)
    golden = golden_body(config.seed, data.source.intensity, generator)
    return write_package(Path(target.package), manifest, generator.state_dict(), golden, card)


def _manifest(
    config: TrainConfig,
    data: Images,
    target: Backward,
    generator: Generator,
    planes: Sequence[Plane],
    training: Mapping[str, Any],
    validation: Mapping[str, Any],
) -> Manifest:
    publish: Publish = target.publish
    spacing = [plane.spacing_mm[0] for plane in planes]
    sides = [max(plane.physical.shape) for plane in planes]
    view = [plane.spacing_mm[1] * plane.physical.shape[1] for plane in planes]
    return Manifest(
        format=1,
        name=target.name,
        version=config.version,
        task=publish.task,
        generator=config.generator,
        input=InputSpec(
            modality=data.source.modality,
            unit=data.source.unit,
            intensity=data.source.intensity,
            slices=data.slices,
            equalised=data.equalised,
            spacing_mm=Range(min(spacing), max(spacing)),
            matrix=Range(min(sides), max(sides)),
            field_of_view_mm=Range(min(view), max(view)),
            padding=Padding(publish.padding, generator.multiple),
        ),
        output=OutputSpec(
            modality=data.target.modality,
            unit="AU" if isinstance(data.target.intensity, Equalised) else data.target.unit,
            intensity=data.target.intensity,
            residual=config.residual,
        ),
        normalisation=normalisation_of(generator),
        tiling=tiling_of(generator),
        bounds=publish.bounds,
        dicom=DicomSpec(target.name, publish.algorithm_family, config.version, publish.remark),
        licence=publish.licence,
        intended_use=publish.intended_use,
        training=training,
        validation=validation,
        qa=publish.qa,
    )


def _describe_training(
    config: TrainConfig, data: Images, planes: Sequence[Plane], split: Split
) -> dict[str, Any]:
    """Where the weights come from: plain values."""
    mine = {part: [plane for plane in planes if plane.patient in split[part]] for part in PARTS}
    return {
        "config_sha256": config.digest(),
        "collection": data.collection,
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": config.optimisation.steps,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "slices": {part: len(mine[part]) for part in PARTS},
        "patients": {part: len({plane.patient for plane in mine[part]}) for part in PARTS},
    }


def _describe_figures(figures: TranslationFigures) -> dict[str, Any]:
    """Name -> [mean over patients, lowest, highest], and how many there were."""
    patients = list(figures.by_patient().values())
    result: dict[str, Any] = {"patients_tested": len(patients)}
    for name in patients[0] if patients else ():
        values = [patient[name] for patient in patients]
        result[name] = [round(f(values), 3) for f in (lambda v: float(np.mean(v)), min, max)]
    return result


def golden_body(
    seed: int, intensity: Intensity | Percentiles, generator: Generator
) -> NDArray[np.float32]:
    """A generated body for the self-test, (slices, rows, columns), float32, source's unit."""
    hu = np.clip(golden_input(seed), -1000.0, 1000.0)
    side = max(96, generator.multiple)
    hu = np.pad(hu, ((0, 0), (0, side - 96), (0, side - 96)), mode="edge")
    low, high = 0.0, 1000.0
    if isinstance(intensity, Window | Equalised):
        low, high = intensity.low, intensity.high
    body = low + (hu + 1000.0) / 2000.0 * (high - low)
    return np.repeat(body, 3, axis=0).astype(np.float32)
