"""Judge a package on held-out patients, or results on their truth: figures, a page, a card.

    python training/evaluate.py training/configs/ldct-denoise.yaml
    python training/evaluate.py training/configs/ldct-denoise.yaml part=validation dose=0.1
    python training/evaluate.py training/configs/ldct-denoise.yaml patients=yes compare=yes
    python training/evaluate.py training/configs/cect.yaml profile=synthrad2025 card=yes
    python training/evaluate.py training/configs/chest-classes.yaml
    python training/evaluate.py result=FOLDER truth=FOLDER unit=HU out=FOLDER

Writes report.html and metrics.json to `out` (of a config: runs/NAME/evaluation-PART). Figures are
means over patients; an interval is the 95 % bootstrap interval over patients. docs/TRAINING.md
says what each option and figure is.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.inference import Model, load_model
from dicomnode.imaging.package import read_package
from dicomnode.imaging.units import Unit
from training.card import write_evaluation
from training.class_figures import judge_classes
from training.config import Classes, Data, Images, TrainConfig, load_config
from training.denoising import judge_denoiser
from training.evaluation import Evaluation, evaluate
from training.features import load_extractor
from training.measures import PROFILES, Asked, Profile, meaning
from training.profiles import EXAMS
from training.publish import turned_round
from training.report import report
from training.split import PARTS
from training.studies import (
    RANGES,
    Folders,
    folder_studies,
    image_studies,
    low_dose_studies,
    window_of,
)
from training.unpaired import Way, judge_unpaired

_BOTH = {"profile": "standard", "exam": "abdomen", "range": "", "features": "", "out": ""}
_OF_CONFIG = {
    "part": "test",
    "dose": "0.25",
    "package": "",
    "other": "",
    "patients": "no",
    "compare": "no",
    "way": "forward",
    "back": "",
    "card": "no",
    **_BOTH,
}
_OF_KINDS: Mapping[type, tuple[str, ...]] = {
    Data: ("part", "dose", "package", "other", "patients", "compare", "card", *_BOTH),
    Images: ("part", "package", "other", "way", "back", "card", *_BOTH),
    Classes: ("part", "package", "out"),
}
"""Options that mean something for each kind of data."""
_OF_FOLDERS = {
    **dict.fromkeys(("result", "truth", "unit", "mask", "other", "labels", "patient"), ""),
    **_BOTH,
}
Options = Mapping[str, str]


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ConfigError(f"want a config, or result= and truth=\n{__doc__}")
    if argv[0].partition("=")[0] in _OF_FOLDERS:
        judge_folders(argv)
    else:
        judge_config(argv)


def judge_config(argv: Sequence[str]) -> None:
    """A package on a part of the patients of a run."""
    own = [word for word in argv[1:] if word.partition("=")[0] in _OF_CONFIG]
    config = load_config(Path(argv[0]), [word for word in argv[1:] if word not in own])
    given = dict(word.split("=", 1) for word in own)
    options = _OF_CONFIG | given
    _check(options)
    if odd := sorted(set(given) - set(_OF_KINDS[type(config.data)])):
        raise ConfigError(f"{odd[0]}: means nothing for data.kind: {config.data.kind}")
    if options["part"] not in PARTS:
        raise ConfigError(f"part: want one of {', '.join(PARTS)}")
    torch.set_num_threads(config.threads)
    out = Path(options["out"] or config.out / f"evaluation-{options['part']}")
    if isinstance(config.data, Classes):
        path = Path(options["package"] or config.package)
        print(*judge_classes(config.data, path, options["part"], out), sep="\n")
        return
    if isinstance(config.data, Data):
        found, model, more = _denoiser(config, config.data, options)
    elif config.data.paired:
        found, model, more = _translation(config, config.data, options)
    else:
        found, model, more = _unpaired(config, config.data, options)
    package = model.package
    facts = {
        "package": f"{package.name} {package.version}, digest {package.digest}",
        "patients": f"part {options['part']} of {config.data.split}",
        "data": _collections(config.data),
        **more,
    }
    data = _write(found, out, package.name, argv, facts)
    if options["card"] == "yes":
        written = write_evaluation(package, data)
        print(f"wrote the figures to the card of {package.path}, digest {written.digest}")


Judged = tuple[Evaluation, Model, dict[str, str]]
"""The figures, the package they are of, and what else the report is to say."""


def _denoiser(config: TrainConfig, data: Data, options: Options) -> Judged:
    model = _load("package", Path(options["package"] or config.package))
    part, dose = options["part"], _number("dose", options["dose"])
    words = (options["patients"] == "yes", options["compare"] == "yes")
    judge_denoiser(config, data, model, part, dose, *words)
    asked = _asked(options, "HU", None)
    extractor = load_extractor(options["features"]) if options["features"] else None
    other, facts = _other(options)
    studies = low_dose_studies(config, data, model, part, dose, other)
    return evaluate(studies, asked, extractor), model, facts | {"dose": options["dose"]}


def _translation(config: TrainConfig, data: Images, options: Options) -> Judged:
    if options["back"]:
        raise ConfigError("back: pairs have their truth; the way back is of images without")
    data, package, _ = _way(config, data, options)
    model = _load("package", package)
    asked = _asked(options, data.target.unit, window_of(data))
    extractor = load_extractor(options["features"]) if options["features"] else None
    other, facts = _other(options)
    studies = image_studies(config, data, model, options["part"], other)
    return evaluate(studies, asked, extractor), model, facts


def _other(options: Options) -> tuple[Model | None, dict[str, str]]:
    """The package it is compared with, if one is named."""
    if not options["other"]:
        return None, {}
    other = _load("other", Path(options["other"]))
    package = other.package
    words = f"{package.name} {package.version}, digest {package.digest}"
    return other, {"compared with": words}


def _unpaired(config: TrainConfig, data: Images, options: Options) -> Judged:
    if options["other"]:
        raise ConfigError("other: images without pairs have no truth to compare two packages by")
    if options["profile"] != "standard":
        raise ConfigError("profile: images without pairs have no truth; only the standard one")
    data, package, back = _way(config, data, options)
    model = _load("package", package)
    other = _load("back", back) if back is not None else None
    asked = replace(_asked(options, data.target.unit, window_of(data)), profile="unpaired")
    extractor = load_extractor(options["features"]) if options["features"] else None
    way = Way(model, other)
    found, floor = judge_unpaired(config, data, way, options["part"], asked, extractor)
    words = f"{floor:.4g} {asked.unit}: real images of the training patients to those of this part"
    return found, model, {"histogram distance to compare with": words}


def _way(config: TrainConfig, data: Images, options: Options) -> tuple[Images, Path, Path | None]:
    """The images as the way that is judged sees them, its package, and that of the way back."""
    there: str = config.package
    back = config.backward.package if config.backward is not None else None
    if options["way"] == "backward":
        if back is None:
            raise ConfigError("way: the config has no backward")
        there, back, data = back, there, turned_round(data)
    back = options["back"] or back
    return data, Path(options["package"] or there), Path(back) if back else None


def _load(key: str, path: Path) -> Model:
    if not path.is_dir():
        raise ConfigError(f"{key}: no package {path}; train it first, or name one by {key}=FOLDER")
    return load_model(read_package(path))


def judge_folders(argv: Sequence[str]) -> None:
    """Results of any program beside their truth."""
    options = dict(_OF_FOLDERS)
    for word in argv:
        key, equals, value = word.partition("=")
        if key not in options or not equals:
            raise ConfigError(f"{word}: want {', '.join(f'{name}=' for name in options)}")
        options[key] = value
    _check(options)
    for key in ("result", "truth", "unit", "out"):
        if not options[key]:
            raise ConfigError(f"{key}: missing")
    if options["unit"] not in get_args(Unit):
        raise ConfigError(f"unit: want one of {', '.join(get_args(Unit))}")
    paths = {key: Path(options[key]) for key in ("mask", "other", "labels") if options[key]}
    unit = cast(Unit, options["unit"])
    folders = Folders(
        Path(options["result"]), Path(options["truth"]), unit, **paths, patient=options["patient"]
    )
    extractor = load_extractor(options["features"]) if options["features"] else None
    found = evaluate(folder_studies(folders), _asked(options, unit, None), extractor)
    facts = {"patients": "by name" if options["patient"] else "every volume taken for one"}
    _write(found, Path(options["out"]), "Evaluation", argv, facts)


def _asked(options: Options, unit: Unit, window: tuple[float, float] | None) -> Asked:
    low, high = RANGES.get(unit) or window or (0.0, 0.0)
    if options["range"]:
        low, high = _range(options["range"])
    if not low < high:
        raise ConfigError(f"range: missing; {unit} have none of their own (range=LOW,HIGH)")
    return Asked(cast(Profile, options["profile"]), unit, low, high, options["exam"])


def _range(words: str) -> tuple[float, float]:
    first, _, second = words.partition(",")
    return _number("range", first), _number("range", second)


def _number(key: str, words: str) -> float:
    try:
        return float(words)
    except ValueError as error:
        raise ConfigError(f"{key}: {words!r} is not a number") from error


def _check(options: Options) -> None:
    among = {"profile": PROFILES, "exam": tuple(EXAMS), "way": ("forward", "backward")}
    among |= dict.fromkeys(("patients", "compare", "card"), ("yes", "no"))
    for key, words in among.items():
        if key in options and options[key] not in words:
            raise ConfigError(f"{key}: want one of {', '.join(words)}")


def _collections(data: Data | Images) -> str:
    if isinstance(data, Images):
        return data.collection
    return "; ".join(folder.collection for folder in data.folders)


def _write(
    found: Evaluation, out: Path, title: str, argv: Sequence[str], facts: Mapping[str, str]
) -> dict[str, Any]:
    """The table on the screen, and the two files."""
    command = shlex.join(["python", "training/evaluate.py", *argv])
    facts = {**facts, "command": command, "torch": torch.__version__}
    data = {"format": 1, **facts, **found.as_data()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", "utf-8")
    (out / "report.html").write_text(report(found, title, facts), "utf-8")
    number = len(set(found.patients))
    print(f"profile {found.asked.profile}: {number} patients, {len(found.patients)} volumes")
    for name, over in found.summaries().items():
        unit = meaning(name, found.asked)[1]
        print(f"  {name:28} {over.mean:10.4g}  [{over.low:.4g}, {over.high:.4g}]  {unit}")
    if found.spread is not None:
        print(f"  {found.spread.name}: {found.spread.frechet:.4g}")
    print(f"wrote {out / 'report.html'} and {out / 'metrics.json'}")
    return data


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
