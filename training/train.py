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

import torch

from dicomnode.errors import DicomNodeError
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import TrainConfig, load_config
from training.material import Material, load_material
from training.recipes import Recipe
from training.recipes.build import build_recipe


def main(argv: Sequence[str]) -> None:
    config = load_config(Path(argv[0]), overrides=argv[1:])
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    material = load_material(config)
    print(*material.describe(), sep="\n", flush=True)
    recipe = build_recipe(config, material.epoch_steps)
    step = fit(recipe, material, config)
    if step < config.optimisation.steps:
        print(f"stopped after step {step}; the same command without stop_at goes on")
        return
    for package in material.export(recipe.results()):
        print(f"wrote {package.path}: {package.name} {package.version}, digest {package.digest}")


def fit(recipe: Recipe, material: Material, config: TrainConfig) -> int:
    """Train from the last checkpoint, or from nothing; returns the step it reached."""
    checkpoint, settings = config.out / "checkpoint.pt", config.optimisation
    first = load_checkpoint(checkpoint, recipe, config.digest())
    last = min(settings.steps, config.stop_at or settings.steps)
    started = time.monotonic()
    for step in range(first, last):
        losses = recipe.step(material.batch(step), step)
        if (step + 1) % config.save_every == 0 or step + 1 == last:
            save_checkpoint(checkpoint, recipe, step + 1, config.digest())
            figures = material.figures(recipe.results(), "validation")
            log(config.out, step + 1, losses | figures, time.monotonic() - started)
    return max(first, last)


def log(out: Path, step: int, figures: dict[str, float], seconds: float) -> None:
    """One line on the screen and one in log.jsonl."""
    line = {"step": step, "seconds": round(seconds, 1), **figures}
    with (out / "log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    print(" ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
