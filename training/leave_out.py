"""Judge a translation by leaving one patient out at a time: train on the others, prove on that one.

    python training/leave_out.py training/configs/mr-to-ct.yaml optimisation.steps=700
    python training/leave_out.py training/configs/mr-to-ct.yaml spare=test

For every patient of CONFIG a run NAME-leave-K of its own, with a split of its own beside it; a run
goes on where it was stopped. All others train; if CONFIG stops early, the patient after the one
left out, in the order of their hashes, validates instead. With `spare=test` the images of CONFIG's
test patients are not even read: a method is chosen without those who then judge it. What is
published is another model, trained on the split of CONFIG: these figures say how well the method
does on a patient it never saw.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

from dicomnode.errors import ConfigError, DicomNodeError
from training.config import Images, TrainConfig, load_config
from training.errors import TrainingError
from training.material import load_material
from training.overrides import read_settings
from training.pairs import Found, find_images
from training.proofs import mr_ct
from training.proofs.case import Case, table
from training.recipes.build import build_recipe
from training.split import read_split
from training.train import fit
from training.translation import translator

FEWEST = 3
"""Patients: one to train, one to validate, one to leave out."""
TASKS = ("syn_ct", "syn_mr")
SPARE = "spare=test"


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ConfigError("usage: python training/leave_out.py CONFIG [spare=test] [key=value ...]")
    words = [word for word in argv[1:] if word != SPARE]
    config = load_config(Path(argv[0]), words)
    if (
        not isinstance(config.data, Images)
        or not config.publish
        or config.publish.task not in TASKS
    ):
        raise ConfigError(f"publish.task: want one of {', '.join(TASKS)}: they have such a proof")
    torch.set_num_threads(config.threads)
    data = config.data
    if SPARE in argv[1:]:
        data = replace(data, without=(*data.without, *read_split(Path(data.split))["test"]))
    found = find_images(data)
    patients = sorted(found.patients)
    if len(patients) < FEWEST:
        raise TrainingError(f"{len(patients)} patients; want {FEWEST} or more")
    settings = read_settings(Path(argv[0]), words)
    judged = [
        judge(config, own_data(config, data, patients, number), found, settings, number)
        for number in range(len(patients))
    ]
    print(*lines(judged), sep="\n")


def own_data(config: TrainConfig, data: Images, patients: Sequence[str], number: int) -> Images:
    """The same images split so that patient `number` is left out; writes the split."""
    out, after = patients[number], patients[(number + 1) % len(patients)]
    chosen = [] if config.stopping is None else [after]
    split = {
        "train": [patient for patient in patients if patient not in (out, *chosen)],
        "validation": chosen,
        "test": [out],
    }
    path = Path(config.runs) / f"{_name(config, number)}.split.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(split, sort_keys=False), "utf-8")
    return replace(data, split=str(path))


def judge(
    config: TrainConfig, data: Images, found: Found, settings: Mapping[str, object], number: int
) -> tuple[int, dict[str, tuple[float, ...]]]:
    """Train without the patient; slices of that patient, and figures: the model's and beside it."""
    own = replace(config, name=_name(config, number), data=data)
    torch.manual_seed(own.seed)
    material = load_material(own)
    recipe = build_recipe(own, material.epoch_steps)
    fit(recipe, material, own, settings)
    apply = translator(recipe.results()["forward"], own, data)
    case = Case(data, found, read_split(Path(data.split)), "test", apply)
    figures = {name: both[0] for name, both in mr_ct.beside_intensity(case).items()}
    return len(case.pairs()), figures


def _name(config: TrainConfig, number: int) -> str:
    return f"{config.name}-leave-{number + 1}"


def lines(judged: Sequence[tuple[int, Mapping[str, tuple[float, ...]]]]) -> list[str]:
    """A row per patient: the model / one value / one per intensity / the same told the body."""
    names = list(judged[0][1])
    rows = [
        [number, slices, *(_cell(figures[name]) for name in names)]
        for number, (slices, figures) in enumerate(judged, 1)
    ]
    means = np.nanmean([[figures[name] for name in names] for _, figures in judged], axis=0)
    rows.append(["mean", "", *(_cell(values) for values in means)])
    words = (
        "of each: the model / one value / a value per intensity / the same, told where the body is"
    )
    return [*table(["left out", "slices", *names], rows), "", words]


def _cell(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
