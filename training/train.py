"""Train a model and write its package.

    python training/train.py training/configs/ldct-denoise.yaml
    python training/train.py training/configs/ldct-denoise.yaml runs=/tmp/runs optimisation.steps=20
    python training/train.py --dry-run training/configs/ldct-denoise.yaml
    torchrun --standalone --nproc-per-node 2 training/train.py training/configs/ldct-denoise.yaml

A run goes on from its last checkpoint. Read `main` from top to bottom: it is the whole story.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dicomnode.errors import DicomNodeError
from training import processes
from training.checkpoint import load_checkpoint, load_more, save_checkpoint
from training.config import TrainConfig, load_config
from training.errors import TrainingError
from training.interrupt import Interrupt
from training.material import Material, load_material
from training.overrides import read_settings
from training.progress import Progress
from training.recipes import Recipe
from training.recipes.build import build_recipe
from training.records import Records
from training.rehearsal import rehearse
from training.watch import Watch

CPU = torch.device("cpu")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="a file of training/configs")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dots go down"
    )
    parser.add_argument("--dry-run", action="store_true", help="one step; nothing is written")
    words = parser.parse_intermixed_args(argv)
    config = load_config(words.config, words.overrides)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    place = processes.start(config.device)
    try:
        if config.optimisation.batch_size % processes.count():
            raise TrainingError(f"optimisation.batch_size: want a multiple of {processes.count()}")
        if words.dry_run:
            for line in rehearse(config, place):
                print(line)
            return
        material = load_alike(config)
        recipe = build_recipe(config, material.epoch_steps)
        recipe.to(place)
        step = fit(recipe, material, config, read_settings(words.config, words.overrides), place)
        finish(recipe, material, config, step)
    finally:
        processes.stop()


def load_alike(config: TrainConfig) -> Material:
    """The data; the first process makes what is not cached yet, then the others read it."""
    if not processes.first():
        processes.wait()
    material = load_material(config)
    if processes.first():
        print(*material.describe(), sep="\n", flush=True)
        processes.wait()
    return material


def fit(
    recipe: Recipe,
    material: Material,
    config: TrainConfig,
    settings: Mapping[str, object],
    place: torch.device = CPU,
) -> int:
    """Train from the last checkpoint, or from nothing; returns the step it reached.

    Raises:
        TrainingError: the checkpoint cannot be used, or a loss is not finite; then the last
            checkpoint, of before, is left as it is.
    """
    path, watch = config.out / "checkpoint.pt", Watch(config.stopping)
    first = resume(path, recipe, watch, material, config)
    steps = config.optimisation.steps
    last = min(steps, config.stop_at or steps)
    if first >= last or watch.over:
        return first
    quiet = not processes.first()
    records = None if quiet else Records(config.out, settings, material.digest(), first)
    with Interrupt() as interrupt, Progress(first, last, quiet=quiet) as progress:
        for step in range(first, last):
            batch = processes.own_share(material.batch(step)).to(place)
            losses, done = recipe.step(batch, step), step + 1
            progress.step(done, losses)
            if records is not None and done % config.log_every == 0:
                records.step(done, losses)
            judged = done % config.save_every == 0 or done == steps
            stopped = processes.any_of(interrupt.asked)
            if judged:
                judge(recipe, material, config, watch, records, progress, losses, done)
            if judged or stopped or done == last:
                save(path, recipe, watch, material, config, done)
            if stopped or watch.over:
                return done
    return max(first, last)


def resume(
    path: Path, recipe: Recipe, watch: Watch, material: Material, config: TrainConfig
) -> int:
    """Restore recipe and watch; returns the step to go on from."""
    first = load_checkpoint(path, recipe, config.digest())
    more = load_more(path)
    if more.get("data", material.digest()) != material.digest():
        raise TrainingError(
            f"{path}: the data are not those it was trained on; choose another name or delete it"
        )
    if "watch" in more:
        watch.load_state_dict(more["watch"])
    return first


def judge(
    recipe: Recipe,
    material: Material,
    config: TrainConfig,
    watch: Watch,
    records: Records | None,
    progress: Progress,
    losses: Mapping[str, float],
    step: int,
) -> None:
    """Validate, write it down, and keep the weights if they are the best so far."""
    figures: dict[str, float] = {}
    if records is not None:
        networks = recipe.results()
        figures = material.figures(networks, "validation")
        line = {"step": step, "seconds": round(progress.seconds, 1), **losses, **figures}
        records.validation(line, figures)
        if (picture := material.picture(networks)) is not None:
            records.picture(picture, step)
        progress.line(" ".join(f"{key} {value:.4g}" for key, value in line.items()))
    if watch.better(processes.from_first(figures), step) and processes.first():
        save_checkpoint(config.out / "best.pt", recipe, step, config.digest())


def save(
    path: Path, recipe: Recipe, watch: Watch, material: Material, config: TrainConfig, step: int
) -> None:
    if processes.first():
        more = {"watch": watch.state_dict(), "data": material.digest()}
        save_checkpoint(path, recipe, step, config.digest(), **more)
    processes.wait()


def finish(recipe: Recipe, material: Material, config: TrainConfig, step: int) -> None:
    """Write the packages of a run that is over; say how to go on with one that is not."""
    if not processes.first():
        return
    watch = Watch(config.stopping)
    if more := load_more(config.out / "checkpoint.pt").get("watch"):
        watch.load_state_dict(more)
    if step < config.optimisation.steps and not watch.over:
        print(f"stopped after step {step}; the same command without stop_at goes on")
        return
    if config.stopping is not None:
        step = load_checkpoint(config.out / "best.pt", recipe, config.digest())
        print(f"best at step {step}: {config.stopping.figure} {watch.best:.4g}")
    recipe.to(CPU)
    for package in material.export(recipe.results(), step):
        print(f"wrote {package.path}: {package.name} {package.version}, digest {package.digest}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
