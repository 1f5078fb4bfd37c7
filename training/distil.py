"""Train a small network to give what a larger one's package gives.

    python training/distil.py training/configs/ldct-denoise-fast.yaml teacher=models/ldct-denoise
    python training/distil.py CONFIG teacher=FOLDER share=0.5 generator.options.width=16

CONFIG is a run like any other (docs/TRAINING.md), with the student as its generator. What it is
trained towards is `share` of the teacher's result and, for the rest, the true image: for a loss
that is quadratic in small errors the same as both losses side by side. Where a known detail was
put in the truth alone counts, for a teacher may have learned to take some of it away.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.networks import Generator
from dicomnode.imaging.package import ModelPackage, read_package, with_manifest
from training.config import Classes, Images, TrainConfig, load_config, window_of
from training.errors import TrainingError
from training.material import Material, load_material
from training.overrides import read_settings
from training.recipes import Batch
from training.recipes.adversarial import translate
from training.recipes.build import build_recipe
from training.train import finish, fit

SHARE = "0.7"
"""Of the teacher's result in what the student is trained towards."""


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ConfigError("usage: python training/distil.py CONFIG teacher=FOLDER [share=0.7]")
    options = {"teacher": "", "share": SHARE}
    own = [word for word in argv[1:] if word.partition("=")[0] in options]
    overrides = [word for word in argv[1:] if word not in own]
    config = load_config(Path(argv[0]), overrides)
    options |= dict(word.split("=", 1) for word in own)
    if not options["teacher"]:
        raise ConfigError("teacher: missing; name the folder of a model package")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    teacher = Teacher(read_package(Path(options["teacher"])), float(options["share"]), config)
    remember(teacher, config.out)
    material = Taught(load_material(config), teacher)
    print(*material.describe(), sep="\n", flush=True)
    recipe = build_recipe(config, material.epoch_steps)
    step = fit(recipe, material, config, read_settings(Path(argv[0]), overrides))
    finish(recipe, material, config, step)


class Teacher:
    """A package whose results, in [-1, 1], are what a student is trained towards."""

    def __init__(self, package: ModelPackage, share: float, config: TrainConfig) -> None:
        """
        Raises:
            ConfigError: `share` is not from 0 to 1.
            TrainingError: the teacher takes or gives something else than the student will.
        """
        if not 0.0 <= share <= 1.0:
            raise ConfigError("share: from 0 to 1")
        self.package, self.share = package, share
        manifest = package.manifest
        data = config.data
        if isinstance(data, Classes):
            raise ConfigError("data.kind: a classifier has no teacher of images")
        wanted: tuple[Any, Any, int] = (window_of(config), window_of(config), 1)
        if isinstance(data, Images):
            wanted = (data.source.intensity, data.target.intensity, data.slices)
        given = (manifest.input.intensity, manifest.output.intensity, manifest.input.slices)
        if given != wanted:
            raise TrainingError(
                f"teacher: {package.name} was trained with other intensities or slices than this "
                f"run: {given}, not {wanted}"
            )
        self._generator = load_model(package, precision="fp32").generator

    @torch.inference_mode()
    def of(self, source: Tensor) -> Tensor:
        """(batch, slices, rows, columns), float32, in [-1, 1] -> (batch, 1, rows, columns)."""
        residual = self.package.manifest.output.residual
        return translate(self._generator, source, residual=residual, precision="bf16").clone()

    def describe(self) -> dict[str, str | float]:
        """For the student's manifest: plain values."""
        return {
            "teacher": f"{self.package.name} {self.package.version}",
            "teacher_sha256": self.package.digest,
            "teacher_share": self.share,
        }


class Taught:
    """A material with a teacher's results in the place of its targets."""

    def __init__(self, material: Material, teacher: Teacher) -> None:
        self._material, self._teacher = material, teacher
        self.epoch_steps = material.epoch_steps

    def describe(self) -> list[str]:
        words = self._teacher.describe()
        return [
            *self._material.describe(),
            f"teacher: {words['teacher']}, {words['teacher_share']}",
        ]

    def batch(self, step: int) -> Batch:
        batch = self._material.batch(step)
        share = self._teacher.share * (batch.weight <= 1.0)
        wanted = self._teacher.of(batch.source)
        return batch._replace(target=batch.target + share * (wanted - batch.target))

    def figures(self, networks: Mapping[str, Generator], part: str) -> dict[str, float]:
        return self._material.figures(networks, part)

    def picture(self, networks: Mapping[str, Generator]) -> NDArray[np.uint8] | None:
        return self._material.picture(networks)

    def digest(self) -> str:
        return self._material.digest()

    def export(self, networks: Mapping[str, Generator], steps: int) -> list[ModelPackage]:
        """As the material does; the manifest names the teacher."""
        written = []
        for package in self._material.export(networks, steps):
            training = {**package.manifest.training, **self._teacher.describe()}
            written.append(with_manifest(package, replace(package.manifest, training=training)))
        return written


def remember(teacher: Teacher, out: Path) -> None:
    """Note the teacher beside the checkpoint.

    Raises:
        TrainingError: the run there has another teacher; going on would mix them.
    """
    note, words = out / "teacher.json", teacher.describe()
    if note.exists() and json.loads(note.read_text("utf-8")) != words:
        raise TrainingError(f"{out} belongs to a run with another teacher; choose another name")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(words), "utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
