"""Train a model and write its package.

    python training/train.py training/configs/ldct-denoise.yaml
    python training/train.py training/configs/ldct-denoise.yaml runs=/tmp/runs optimisation.steps=20

A run goes on from its last checkpoint. Read `main` from top to bottom: it is the whole story.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dicomnode.errors import DicomNodeError
from dicomnode.imaging.networks import build_generator
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import TrainConfig, load_config, window_of
from training.data import Sample, draw_batch, load_samples
from training.export import export_package
from training.figures import Figures, denoiser, evaluate_samples
from training.recipes import Recipe
from training.recipes.supervised import Supervised
from training.split import Split, split_patients

RECIPES = {"supervised": Supervised}


def main(argv: Sequence[str]) -> None:
    config = load_config(Path(argv[0]), overrides=argv[1:])
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    samples, left_out = load_samples(
        config.data, config.low_dose, config.seed, config.out / "cache"
    )
    split = split_of(samples, config)
    train, validation, test = (
        [sample for sample in samples if sample.patient in split[part]]
        for part in ("train", "validation", "test")
    )
    print(f"slices: {len(train)} train, {len(validation)} validation, {len(test)} test")
    print(f"left out: {dict(left_out)}")
    recipe = build_recipe(config)
    step = fit(recipe, train, validation, config)
    if step < config.optimisation.steps:
        print(f"stopped after step {step}; the same command without stop_at goes on")
        return
    figures = evaluate_samples(denoiser(recipe.results()["forward"], window_of(config)), test)
    package = export_package(config, recipe.results()["forward"], samples, split, figures)
    print(f"wrote {package.path}: {package.name} {package.version}, digest {package.digest}")


def split_of(samples: Sequence[Sample], config: TrainConfig) -> Split:
    return split_patients(
        Path(config.data.split),
        {sample.patient for sample in samples},
        {sample.patient for sample in samples if sample.folder.use == "train"},
        validation_fraction=config.data.validation_fraction,
        test_fraction=config.data.test_fraction,
        seed=config.seed,
    )


def build_recipe(config: TrainConfig) -> Recipe:
    generator = build_generator(config.generator.architecture, config.generator.options)
    settings = config.optimisation
    return RECIPES[config.recipe](generator, settings, window_of(config).unit_per_network)


def fit(
    recipe: Recipe, train: Sequence[Sample], validation: Sequence[Sample], config: TrainConfig
) -> int:
    """Train from the last checkpoint, or from nothing; returns the step it reached."""
    checkpoint, settings = config.out / "checkpoint.pt", config.optimisation
    first = load_checkpoint(checkpoint, recipe, config.digest())
    last = min(settings.steps, config.stop_at or settings.steps)
    window, started = window_of(config), time.monotonic()
    for step in range(first, last):
        rng = np.random.default_rng([config.seed, step])  # a step's batch is its own affair
        batch = draw_batch(
            train, window, config.low_dose, config.details, settings.batch_size, settings.patch, rng
        )
        losses = recipe.step(batch, step)
        if (step + 1) % config.save_every == 0 or step + 1 == last:
            save_checkpoint(checkpoint, recipe, step + 1, config.digest())
            figures = evaluate_samples(denoiser(recipe.results()["forward"], window), validation)
            log(config.out, step + 1, losses, figures, time.monotonic() - started)
    return max(first, last)


def log(out: Path, step: int, losses: dict[str, float], figures: Figures, seconds: float) -> None:
    """One line on the screen and one in log.jsonl."""
    line = {"step": step, "seconds": round(seconds, 1), **losses, "gain_db": figures.gain_db[0]}
    with (out / "log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    print(" ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
