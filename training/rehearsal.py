"""A run tried out: everything is read, one step is made, nothing is written."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from dicomnode.imaging.networks import count_weights
from training import processes
from training.config import TrainConfig
from training.material import load_material
from training.recipes.build import build_recipe


def rehearse(config: TrainConfig, place: torch.device) -> list[str]:
    """Lines for the screen: what there is, what a step costs, where the figures start.

    Of several processes the first has something to say.

    Raises:
        DicomNodeError: whatever would stop the run itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        material = load_material(_elsewhere(config, Path(folder)))
    recipe = build_recipe(config, material.epoch_steps)
    recipe.to(place)
    began = time.monotonic()
    losses = recipe.step(processes.own_share(material.batch(0)).to(place), 0)
    seconds = time.monotonic() - began
    if not processes.first():
        return []
    weights = {name: count_weights(network) for name, network in recipe.results().items()}
    figures = material.figures(recipe.results(), "validation")
    lines = [*material.describe(), f"data: SHA-256 {material.digest()}"]
    lines += [f"generator {name}: {count} weights" for name, count in weights.items()]
    epochs = config.optimisation.steps / material.epoch_steps
    lines += [f"steps: {config.optimisation.steps}, {epochs:.1f} times every slice"]
    lines += [f"step 0 on {place}: {seconds:.2f} s, {_named(losses)}"]
    return [*lines, f"validation after it: {_named(figures)}", "dry run: nothing was written"]


def _elsewhere(config: TrainConfig, folder: Path) -> TrainConfig:
    """The same run with its split and its cache in `folder`, which know what there is already."""
    split = folder / "split.yaml"
    if Path(config.data.split).exists():
        split.write_bytes(Path(config.data.split).read_bytes())
    elsewhere = replace(
        config, runs=str(folder / "runs"), data=replace(config.data, split=str(split))
    )
    cache, known = elsewhere.out / "cache", config.out / "cache"
    cache.mkdir(parents=True)
    for path in known.iterdir() if known.is_dir() else ():
        (cache / path.name).symlink_to(path.resolve())
    return elsewhere


def _named(values: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in values.items())
