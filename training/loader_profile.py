"""Where the time of a run goes: reading the data, drawing batches, steps of the recipe.

    python training/loader_profile.py training/configs/mr-to-ct.yaml steps=20

Trains `steps` steps that nobody keeps and prints a line of figures; writes no checkpoint.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dicomnode.errors import DicomNodeError
from training.config import load_config
from training.errors import TrainingError
from training.material import load_material
from training.recipes.build import build_recipe

_FIRST = 2
"""Steps not counted: memory is allocated and kernels are chosen in them."""


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise TrainingError(
            "usage: python training/loader_profile.py CONFIG [steps=N] [key=value ...]"
        )
    own = [value for value in argv[1:] if value.startswith("steps=")]
    steps = int(own[-1].partition("=")[2]) if own else 20
    config = load_config(Path(argv[0]), [value for value in argv[1:] if value not in own])
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    material = load_material(config)
    read = time.perf_counter() - started
    recipe = build_recipe(config, material.epoch_steps)
    drawn, stepped = [], []
    for step in range(_FIRST + steps):
        started = time.perf_counter()
        batch = material.batch(step)
        between = time.perf_counter()
        recipe.step(batch, step)
        drawn.append(between - started)
        stepped.append(time.perf_counter() - between)
    loader, generator = (float(np.median(part[_FIRST:])) for part in (drawn, stepped))
    print(
        f"{config.name}: data read in {read:.1f} s; a batch {1000 * loader:.1f} ms, a step "
        f"{1000 * generator:.1f} ms (medians of {steps}); the loader takes "
        f"{loader / (loader + generator):.1%} of the time"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
