"""A classifier's package judged on held-out pictures: figures, who is taken for whom, a page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicomnode.imaging.classifier import load_classifier, read_classifier
from training.agreement import Floats, Labels, accuracy, area_under_curve, bootstrap, mean_area
from training.classification import labels_of
from training.config import Classes
from training.downstream import probabilities
from training.errors import TrainingError
from training.pictures import find_pictures, plainly_known
from training.report import page, table
from training.split import read_split


def judge_classes(data: Classes, package: Path, part: str, out: Path) -> list[str]:
    """Write metrics.json and report.html to `out`; returns lines for the screen.

    Raises:
        TrainingError: the part has no picture, or the package knows other classes.
        PackageError: the package is no classifier, or is damaged.
    """
    classifier = load_classifier(read_classifier(package))
    if [one.name for one in classifier.package.manifest.classes] != [c.name for c in data.classes]:
        raise TrainingError(f"{package}: it knows other classes than data.classes")
    found, split = find_pictures(data), read_split(Path(data.split))
    asked, train = (
        [picture for picture in found.pictures if picture.group in split[name]]
        for name in (part, "train")
    )
    if not asked:
        raise TrainingError(f"{data.split}: no picture is in {part}")
    given = probabilities(classifier, {part: [picture.grey for picture in asked]})[part]
    truth, groups = labels_of(asked), [picture.group for picture in asked]
    plain = np.eye(len(data.classes))[plainly_known(train, asked)]
    facts = {
        "package": f"{classifier.package.name} {classifier.package.version}, "
        f"digest {classifier.package.digest}",
        "pictures": f"part {part} of {data.split}",
        "data": data.collection,
        "torch": torch.__version__,
    }
    figures = {"format": 1, **facts, **_figures(given, plain, truth, groups, data)}
    figures["warnings"] = list(found.warnings)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    (out / "report.html").write_text(_report(figures, facts), "utf-8")
    lines = [f"{name}: {figures[name]}" for name in ("pictures_judged", "groups")]
    lines += [f"  {' '.join(row)}" for row in _rows(figures)]
    lines += [f"warning: {words}" for words in found.warnings]
    return [*lines, f"wrote {out / 'report.html'} and {out / 'metrics.json'}"]


def _figures(
    given: Floats, plain: Floats, truth: Labels, groups: list[str], data: Classes
) -> dict[str, Any]:
    """Plain values: accuracy, areas, and who is taken for whom."""
    names = [one.name for one in data.classes]
    chosen = given.argmax(1)
    taken = [
        [int(((truth == i) & (chosen == j)).sum()) for j in range(len(names))]
        for i in range(len(names))
    ]
    each = {
        name: {
            "pictures": int((truth == label).sum()),
            "found": _known(float(np.mean(chosen[truth == label] == label)))
            if (truth == label).any()
            else None,
            "area_under_curve": _known(area_under_curve(given[:, label], truth == label)),
        }
        for label, name in enumerate(names)
    }

    def over_groups(figure: Any, of: Floats) -> list[float | None]:
        estimate = bootstrap(lambda index: figure(of[index], truth[index]), groups)
        return [_known(value) for value in (estimate.value, estimate.low, estimate.high)]

    return {
        "pictures_judged": len(truth),
        "groups": len(set(groups)),
        "accuracy": over_groups(accuracy, given),
        "area_under_curve": over_groups(mean_area, given),
        "accuracy_by_size_and_brightness_alone": over_groups(accuracy, plain),
        "classes": each,
        "taken_for": {"rows_true_columns_said": names, "pictures": taken},
    }


def _known(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


_WORDS = {
    "accuracy": "accuracy",
    "area_under_curve": "mean area under the curve, one class against the others",
    "accuracy_by_size_and_brightness_alone": "accuracy by size and brightness alone, no network",
}


def _rows(figures: dict[str, Any]) -> list[list[str]]:
    """Figure, value and 95 % interval."""
    shown = []
    for name, words in _WORDS.items():
        value, low, high = (_said(number) for number in figures[name])
        shown.append([words, value, f"[{low}, {high}]"])
    return shown


def _said(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"


def _report(figures: dict[str, Any], facts: dict[str, str]) -> str:
    names = figures["taken_for"]["rows_true_columns_said"]
    each = [
        [name, str(own["pictures"]), _said(own["found"]), _said(own["area_under_curve"])]
        for name, own in figures["classes"].items()
    ]
    taken = [
        [name, *(str(number) for number in row)]
        for name, row in zip(names, figures["taken_for"]["pictures"], strict=True)
    ]
    judged = f"{figures['pictures_judged']} pictures in {figures['groups']} groups that are kept"
    return page(
        "Evaluation of a classifier",
        facts,
        figures["warnings"],
        [
            f"<h2>Figures</h2><p>{judged} together; 95 % intervals by bootstrap over groups.</p>",
            table(["figure", "value", "95 % interval"], _rows(figures)),
            "<h2>Classes</h2>",
            table(["class", "pictures", "found", "area under the curve"], each),
            "<h2>Taken for</h2><p>Rows: what they are. Columns: what is said.</p>",
            table(["", *names], taken),
        ],
    )
