"""A classifier that only tells bright images from dark ones, honest in its name; for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicomnode.imaging.classes import Class, ClassifierInput, ClassifierManifest, Coded
from dicomnode.imaging.classifier import ClassifierPackage, write_classifier
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import Bounds, DicomSpec, GeneratorSpec

LUNG = tuple(
    Class(name, Coded(value, "SCT", meaning))
    for name, value, meaning in (
        ("adenocarcinoma", "254626006", "Adenocarcinoma of lung"),
        ("large_cell_carcinoma", "22687000", "Large cell carcinoma"),
        ("squamous_cell_carcinoma", "254634000", "Squamous cell carcinoma of lung"),
        ("normal", "17621005", "Normal"),
    )
)
BRIGHTNESS = ClassifierManifest(
    format=1,
    name="brightness",
    version="1.0.0",
    task="classify",
    network=GeneratorSpec("brightness", {"classes": 4}),
    input=ClassifierInput("CT", "HU", Window(-1000, 1000), 16),
    classes=LUNG,
    site=Coded("39607008", "SCT", "Lung structure"),
    bounds=Bounds(("CT",)),
    dicom=DicomSpec("brightness", "test", "1.0.0"),
    licence="MIT",
    intended_use="Tests only: it tells bright images from dark ones.",
)
SLOPES = (2.0, 1.0, -1.0, -2.0)


def brightness(models: Path, name: str = "brightness", **manifest: Any) -> ClassifierPackage:
    """Its package: logits of the four classes are 2, 1, -1 and -2 times the mean of an image."""
    state = {
        "classifier.weight": torch.tensor(SLOPES)[:, None],
        "classifier.bias": torch.zeros(4),
    }
    golden = np.linspace(-1500, 1500, 512, dtype=np.float32).reshape(2, 16, 16)
    given = replace(BRIGHTNESS, name=name, **manifest)
    return write_classifier(models / name, given, state, golden, "# For tests\n")
