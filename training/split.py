"""Which patients train, validate and test: written to a file once, then only read and checked."""

import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from training.errors import TrainingError

PARTS = ("train", "validation", "test")
Split = Mapping[str, tuple[str, ...]]


def split_patients(
    path: Path,
    patients: Iterable[str],
    train_only: Iterable[str],
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> Split:
    """Read the split at `path`, or draw one and write it there.

    Args:
        patients: hashes of all patients.
        train_only: those among them that are never held out.

    Raises:
        TrainingError: a patient is in two parts, or in none, or one who must train is held out.
    """
    everyone, kept = set(patients), set(train_only)
    if not path.exists():
        candidates = sorted(everyone - kept)
        random.Random(seed).shuffle(candidates)  # noqa: S311  # a split, not a secret
        held_out = round(test_fraction * len(candidates))
        validation = held_out + round(validation_fraction * len(candidates))
        drawn = {
            "test": candidates[:held_out],
            "validation": candidates[held_out:validation],
            "train": candidates[validation:] + sorted(kept),
        }
        _write(path, {part: tuple(sorted(drawn[part])) for part in PARTS})
    split = read_split(path)
    if missing := everyone - set().union(*split.values()):
        raise TrainingError(f"{path}: {len(missing)} patients of the data are in no part; add them")
    if held := kept & (set(split["test"]) | set(split["validation"])):
        raise TrainingError(f"{path}: {len(held)} patients of `use: train` folders are held out")
    return split


def read_split(path: Path) -> Split:
    """Read and check a split.

    Raises:
        TrainingError: it is not three lists of patients, or a patient is in two of them.
    """
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise TrainingError(f"{path}: cannot read the split: {error}") from error
    if not isinstance(data, dict) or set(data) != set(PARTS):
        raise TrainingError(f"{path}: want the keys {', '.join(PARTS)}, each a list of patients")
    split = {part: tuple(str(patient) for patient in data[part] or ()) for part in PARTS}
    everyone = [patient for part in PARTS for patient in split[part]]
    if twice := sorted({patient for patient in everyone if everyone.count(patient) > 1}):
        raise TrainingError(
            f"{path}: patients in more than one place: {', '.join(twice)}; "
            "a patient who trains cannot test"
        )
    return split


def _write(path: Path, split: Split) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "# Patients of each part, as hashes (training/data.py patient_hash). Do not edit.\n"
    body = yaml.safe_dump({part: list(split[part]) for part in PARTS}, sort_keys=False)
    path.write_text(head + body, "utf-8")
