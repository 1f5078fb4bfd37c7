"""From a trained generator to a model package: manifest, card and self-test."""

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dicomnode.imaging.manifest import (
    Bounds,
    DicomSpec,
    InputSpec,
    Manifest,
    OutputSpec,
    Padding,
    Range,
    Tiling,
)
from dicomnode.imaging.networks import Generator
from dicomnode.imaging.package import ModelPackage, write_package
from dicomnode.imaging.projection import quantum_noise
from training.card import filled
from training.config import Data, TrainConfig, window_of
from training.data import Sample
from training.figures import Figures
from training.metrics import INSERTS, TISSUES
from training.split import PARTS, Split
from training.strength import spec_at


def export_package(
    config: TrainConfig,
    generator: Generator,
    samples: Sequence[Sample],
    split: Split,
    figures: Figures,
    steps: int,
) -> ModelPackage:
    """Write the package of `config` after so many steps; `figures` are of the test patients.

    Args:
        generator: at the strength that the config asks for.

    Raises:
        ConfigError: the template of the card cannot be read, or names an unknown figure.
    """
    training = describe_training(config, samples, split) | {"steps": steps}
    validation = describe_figures(figures)
    card = filled(config.card, name=config.name, version=config.version, **training, **validation)
    return write_package(
        Path(config.package),
        describe(config, generator, training, validation),
        generator.state_dict(),
        golden_input(config.seed),
        card,
    )


def describe(
    config: TrainConfig,
    generator: Generator,
    training: Mapping[str, Any],
    validation: Mapping[str, Any],
) -> Manifest:
    """What the node needs to know to serve a low-dose CT denoiser."""
    window = window_of(config)
    return Manifest(
        format=1,
        name=config.name,
        version=config.version,
        task="denoise",
        generator=spec_at(config.generator, config.strength),
        input=InputSpec(
            modality="CT",
            unit="HU",
            intensity=window,
            spacing_mm=Range(0.5, 1.0),
            matrix=Range(512, 512),
            field_of_view_mm=Range(270, 500),
            padding=Padding("reflect", generator.multiple),
        ),
        output=OutputSpec(modality="CT", unit="HU", intensity=window, residual=True),
        normalisation=normalisation_of(generator),
        tiling=tiling_of(generator),
        bounds=Bounds(
            modality=("CT",),
            pixel_spacing_mm=Range(0.4, 1.2),
            slice_thickness_mm=Range(0.6, 10.0),
            rows=Range(64, 1024),
            columns=Range(64, 1024),
            slices=Range(min=2),
            hu_range=Range(-8192, 32767),
            exclude=config.data.exclude if isinstance(config.data, Data) else {},
        ),
        dicom=DicomSpec(config.name, "Residual convolutional network", config.version),
        licence="CC BY 4.0; trained on CC BY 3.0 and CC BY 4.0 data, see MODEL_CARD.md",
        intended_use="Research on noise in adult body CT. Not a medical device; not for diagnosis.",
        training=training,
        validation=validation,
        qa={"max_mean_change": 5.0, "max_abs_change_p999": 500.0, "max_clipped_fraction": 0.02},
    )


def describe_training(
    config: TrainConfig, samples: Sequence[Sample], split: Split
) -> dict[str, Any]:
    """Where the weights come from: plain values."""
    collections = Counter(
        (sample.folder.collection, part)
        for sample in samples
        for part in PARTS
        if sample.patient in split[part]
    )
    return {
        "config_sha256": config.digest(),
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": config.optimisation.steps,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "slices": {part: _count(samples, split, part)[0] for part in PARTS},
        "patients": {part: _count(samples, split, part)[1] for part in PARTS},
        "slices_by_collection": {
            f"{collection}, {part}": count for (collection, part), count in collections.items()
        },
    }


def describe_figures(figures: Figures) -> dict[str, Any]:
    """Mean and 95 % interval over patients, each [mean, low, high]: plain values."""
    named = {
        "psnr_of_input_db": figures.psnr_low,
        "psnr_db": figures.psnr,
        "gain_db": figures.gain_db,
        "noise_left": figures.noise,
        "edge_retention": figures.edges,
    }
    named |= {f"bias_{tissue.replace(' ', '_')}_hu": figures.bias_hu(tissue) for tissue in TISSUES}
    named |= {f"insert_{index + 1}": figures.insert(index) for index in range(len(INSERTS))}
    return {
        "dose": 0.25,
        "patients_tested": len(figures.patients),
        "slices_tested": len(figures.slices),
        **{key: [round(number, 3) for number in value] for key, value in named.items()},
    }


def golden_input(seed: int) -> NDArray[np.float32]:
    """A generated slice for the self-test, (1, 96, 96), float32, HU: a noisy body with a lung."""
    row, column = np.indices((96, 96), dtype=np.float32) - 47.5
    hu = np.full((96, 96), -1000.0, np.float32)
    hu[np.hypot(row / 38, column / 44) < 1] = 40.0
    hu[np.hypot(row, column - 18) < 14] = -850.0
    hu[np.hypot(row + 4, column + 22) < 6] = 500.0
    rng = np.random.default_rng(seed)
    return hu[None] + quantum_noise(hu[None], 3.0, math.inf, 2e5, rng)


def _count(samples: Sequence[Sample], split: Split, part: str) -> tuple[int, int]:
    patients = [sample.patient for sample in samples if sample.patient in split[part]]
    return len(patients), len(set(patients))


def normalisation_of(generator: nn.Module) -> Any:
    """none, batch or instance: what the network's normalisation layers look at."""
    kinds = {type(module) for module in generator.modules()}
    if nn.InstanceNorm2d in kinds:
        return "instance"
    return "batch" if nn.BatchNorm2d in kinds else "none"


def tiling_of(generator: Generator) -> Tiling:
    """Whether the node may cut slices into tiles, and by how much these overlap."""
    if not generator.tiles_exactly:
        return Tiling(allowed=False, overlap=0)
    step = math.lcm(8, generator.multiple)
    return Tiling(allowed=True, overlap=-(-generator.receptive_field // step) * step)
