"""Every preset of the papers, its networks made narrow: one step, and a package of its network."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dicomnode.imaging.inference import load_model
from dicomnode.imaging.networks import plan_generator
from dicomnode.imaging.package import read_package, write_package
from training.config import TWO_WAYS, Data, Images, TrainConfig, load_config
from training.export import describe, golden_input
from training.recipes import Batch, Recipe
from training.recipes.build import build_recipe

PAPERS = sorted((Path(__file__).parents[1] / "training/configs/papers").glob("*.yaml"))
NARROW = (
    *("generator.options.width=16", "adversarial.discriminator.width=4"),
    *("adversarial.structure_divide=16", "optimisation.batch_size=1", "threads=1"),
)


def narrow(path: Path) -> TrainConfig:
    """The preset with few channels and the smallest patch that its networks take."""
    config = load_config(path, NARROW)
    spec = config.generator
    side = max(48, plan_generator(spec.architecture, spec.options).multiple)
    return load_config(path, [*NARROW, f"optimisation.patch={side}"])


def one_step(config: TrainConfig) -> tuple[Recipe, dict[str, float]]:
    rng, side = np.random.default_rng(1), config.optimisation.patch
    channels = config.data.channels if isinstance(config.data, Images) else 1
    source = torch.from_numpy(rng.uniform(-1, 1, (1, channels, side, side)).astype(np.float32))
    recipe = build_recipe(config)
    losses = recipe.step(Batch(source, -0.5 * source[:, :1], torch.ones(1, 1, side, side)), 0)
    return recipe, losses


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_preset_takes_a_step(path: Path, tmp_path: Path) -> None:
    config = narrow(path)
    recipe, losses = one_step(config)
    assert losses
    assert all(math.isfinite(value) for value in losses.values())
    results = recipe.results()
    assert set(results) == ({"forward", "backward"} if config.recipe in TWO_WAYS else {"forward"})
    assert not any(network.training for network in results.values())
    if isinstance(config.data, Data):
        generator = results["forward"]
        manifest = describe(config, generator, {}, {})
        golden = golden_input(config.seed)
        write_package(tmp_path / "package", manifest, generator.state_dict(), golden, "# card\n")
        load_model(read_package(tmp_path / "package"))  # it passes its own self-test
