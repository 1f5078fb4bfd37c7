"""The card of a package: its template filled in, and later the figures of an evaluation."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dicomnode.errors import ConfigError
from dicomnode.imaging.manifest import manifest_to_yaml
from dicomnode.imaging.package import (
    ModelPackage,
    read_golden,
    read_package,
    read_weights,
    write_files,
)

_HEADING = "## Evaluation"


def filled(template: str, /, **facts: Any) -> str:
    """The card whose template is in this file, with these facts in their places.

    Raises:
        ConfigError: the template cannot be read, or names a fact that there is not.
    """
    try:
        return Path(template).read_text("utf-8").format(**facts)
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"card: {template}: {error!r}") from error


def write_evaluation(package: ModelPackage, data: Mapping[str, Any]) -> ModelPackage:
    """Write a package again with the figures of metrics.json; weights and self-test stay.

    An earlier evaluation in the card is replaced; the package's digest is another one then.

    Args:
        data: what metrics.json holds.
    """
    kept = ("profile", "unit", "range", "exam", "patients", "volumes", "command")
    figures = {
        name: [found["mean"], found["low"], found["high"]]
        for name, found in data["figures"].items()
    }
    evaluation = {key: data[key] for key in kept if data[key] is not None} | {"figures": figures}
    manifest = package.manifest
    manifest = replace(manifest, validation={**manifest.validation, "evaluation": evaluation})
    card = (package.path / "MODEL_CARD.md").read_text("utf-8")
    card = f"{without(card).rstrip()}\n\n{section(data)}"
    golden = read_golden(package.path)
    write_files(package.path, manifest_to_yaml(manifest), read_weights(package), golden, card)
    return read_package(package.path)


def section(data: Mapping[str, Any]) -> str:
    """The part of a card that holds the figures and the command that gives them again."""
    lines = [
        _HEADING,
        "",
        f"Profile {data['profile']}, range {data['range'][0]:g} to {data['range'][1]:g} "
        f"{data['unit']}; {data['patients']} patients, {data['volumes']} volumes. Means over "
        "patients with 95 % intervals, by",
        "",
        f"    {data['command']}",
        "",
        "| figure | mean | 95 % interval | what it is |",
        "|---|---|---|---|",
    ]
    for name, found in data["figures"].items():
        words, _, unit = data["meaning"][name].rpartition(" / ")
        interval = f"{found['low']:.4g} to {found['high']:.4g}"
        lines.append(f"| {name} | {found['mean']:.4g} {unit} | {interval} | {words} |")
    if features := data["features"]:
        lines += [
            "",
            f"{features['name']}: {features['frechet']:.4g}, of {features['results']} slices of "
            f"results and {features['truths']} of truths.",
        ]
    return "\n".join(lines) + "\n"


def without(card: str) -> str:
    """A card without the section of an earlier evaluation."""
    before, found, after = card.partition(f"{_HEADING}\n")
    if not found:
        return card
    _, following, rest = after.partition("\n## ")
    return before + (f"## {rest}" if following else "")
