"""Does a denoiser help a classifier? The same held-out pictures at full dose, low dose, denoised.

    python training/downstream.py training/configs/chest-classes.yaml
    python training/downstream.py CONFIG denoiser=models/ldct-denoise dose=0.25 part=test

Prints accuracy and area under the curve of each version with 95 % intervals over groups of
pictures, McNemar's test between versions, and what can be had without looking at anatomy. The
classifier is the package that training/train.py wrote for CONFIG. Low dose is the paper's: 12-bit
grey, then Poisson noise at a share of it, pixel by pixel; no scanner makes such noise.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.classifier import LoadedClassifier, load_classifier, read_classifier
from dicomnode.imaging.inference import Model, load_model, predict
from dicomnode.imaging.package import read_package
from dicomnode.imaging.volume import Volume
from training.agreement import (
    Floats,
    Labels,
    accuracy,
    area_under_curve,
    bootstrap,
    mcnemar,
    mean_area,
)
from training.classification import labels_of
from training.config import Classes, load_config
from training.pictures import Picture, find_pictures, plainly_known
from training.split import PARTS, read_split

Grey = NDArray[np.float32]
SPACING_MM = 0.7
"""Of a pixel, for the denoiser's sake; the pictures do not say."""


def main(argv: Sequence[str]) -> None:
    if not argv:
        raise ConfigError(
            "usage: python training/downstream.py CONFIG [denoiser=FOLDER dose=0.25 part=test]"
        )
    options = {"denoiser": "models/ldct-denoise", "dose": "0.25", "part": "test"}
    own = [word for word in argv[1:] if word.partition("=")[0] in options]
    config = load_config(Path(argv[0]), [word for word in argv[1:] if word not in own])
    options |= dict(word.split("=", 1) for word in own)
    if not isinstance(config.data, Classes):
        raise ConfigError("data.kind: this judges classifiers")
    if options["part"] not in PARTS:
        raise ConfigError(f"part: want one of {', '.join(PARTS)}")
    torch.set_num_threads(config.threads)
    denoiser = load_model(read_package(Path(options["denoiser"])))
    found = find_pictures(config.data)
    split = read_split(Path(config.data.split))
    asked = [p for p in found.pictures if p.group in split[options["part"]]]
    train = [p for p in found.pictures if p.group in split["train"]]
    versions = versions_of(asked, config.data, float(options["dose"]), denoiser, config.seed)
    classifier = load_classifier(read_classifier(Path(config.package)))
    found_by = probabilities(classifier, versions)
    for line in table(asked, train, found_by, config.data):
        print(line)
    print()
    print(*(f"warning: {words}" for words in found.warnings), sep="\n")


def versions_of(
    pictures: Sequence[Picture], data: Classes, dose: float, denoiser: Model, seed: int
) -> dict[str, list[Grey]]:
    """The same pictures as they are, at a lower dose, and denoised in two ways; grey, 0 to 255."""
    rng = np.random.default_rng(seed)
    low = [pixel_poisson(picture.grey, dose, rng) for picture in pictures]
    name = denoiser.package.name
    return {
        "full dose": [picture.grey for picture in pictures],
        f"dose {dose:g}": low,
        f"denoised, {name}": [_denoised(grey, data, denoiser) for grey in low],
        "denoised, Gaussian of 1 pixel": [_blurred(grey) for grey in low],
    }


def pixel_poisson(grey: Grey, dose: float, rng: np.random.Generator) -> Grey:
    """12-bit grey values as counts at `dose`, as the low-dose paper simulates.

    (rows, columns), float32, 0 to 255 -> the same, with Poisson noise.
    """
    counts = rng.poisson(grey / 255.0 * 4095.0 * dose) / dose
    noisy: Grey = np.clip(counts / 4095.0 * 255.0, 0.0, 255.0).astype(np.float32)
    return noisy


def _blurred(grey: Grey) -> Grey:
    blurred: Grey = ndimage.gaussian_filter(grey, 1.0)
    return blurred


def _denoised(grey: Grey, data: Classes, model: Model) -> Grey:
    low, high = data.grey_hu
    hu = (low + grey / 255.0 * (high - low)).astype(np.float32)[None]
    axes = np.array([1.0, 0, 0, 0, 1, 0])
    spacing = (SPACING_MM, SPACING_MM, SPACING_MM)
    source = Volume(hu, "HU", np.zeros((1, 3)), axes, spacing, "", None)
    made = (predict(model, source).voxels[0] - low) / (high - low) * 255.0
    result: Grey = np.clip(made, 0.0, 255.0).astype(np.float32)
    return result


def probabilities(
    classifier: LoadedClassifier, versions: Mapping[str, Sequence[Grey]]
) -> dict[str, Floats]:
    """What a package says of each version, (pictures, classes), as the node would serve it."""
    window = classifier.package.manifest.input.intensity
    scale = (window.high - window.low) / 255.0
    return {
        name: np.concatenate(
            [
                classifier.probabilities((window.low + grey * scale).astype(np.float32)[None])
                for grey in greys
            ]
        ).astype(np.float64)
        for name, greys in versions.items()
    }


def table(
    asked: Sequence[Picture],
    train: Sequence[Picture],
    found_by: Mapping[str, Floats],
    data: Classes,
) -> list[str]:
    """The figures as lines of Markdown."""
    truth, groups = labels_of(asked), [picture.group for picture in asked]
    names = [one.name for one in data.classes]
    lines = [
        f"{len(asked)} pictures in {len(set(groups))} groups; intervals are over groups",
        "",
        f"| pictures | accuracy | mean AUC | {' | '.join(f'found of {n}' for n in names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for name, found in found_by.items():
        lines.append(_row(name, found, truth, groups, len(names)))
    plain = np.eye(len(names))[plainly_known(train, asked)]
    lines.append(_row("size and brightness alone, no network", plain, truth, groups, len(names)))
    lines += ["", "| versions | only the first right | only the second right | McNemar p |"]
    lines.append("|---|---|---|---|")
    versions = list(found_by)
    for first, second in [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]:
        one, other = (found_by[versions[i]].argmax(1) == truth for i in (first, second))
        only, only_other, p = mcnemar(one, other)
        said = f"{versions[first]} - {versions[second]}"
        lines.append(f"| {said} | {only} | {only_other} | {p:.3g} |")
    return lines


def _row(name: str, found: Floats, truth: Labels, groups: Sequence[str], classes: int) -> str:
    right = bootstrap(lambda index: accuracy(found[index], truth[index]), groups)
    area = bootstrap(lambda index: mean_area(found[index], truth[index]), groups)
    chosen = found.argmax(1)
    each = []
    for label in range(classes):
        mine = truth == label
        share = float((chosen[mine] == label).mean())
        each.append(f"{share:.2f} (AUC {area_under_curve(found[:, label], mine):.2f})")
    return f"| {name} | {right} | {area} | {' | '.join(each)} |"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
