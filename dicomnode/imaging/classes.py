"""manifest.yaml of a classifier's package, key by key: what it takes, and what its classes mean.

Data only, as in `manifest`; its `task` is ``classify``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dicomnode.errors import PackageError
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import Bounds, DicomSpec, GeneratorSpec, read_as, values_in
from dicomnode.imaging.units import MODALITY

MOST_CLASSES = 100
"""More make a report that nobody reads."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A coded concept (PS3.3 8.8)."""

    value: str
    scheme: str
    """CodingSchemeDesignator: SCT, DCM, ..."""
    meaning: str

    def __post_init__(self) -> None:
        for key, text, limit in (
            ("value", self.value, 16),
            ("scheme", self.scheme, 16),
            ("meaning", self.meaning, 64),
        ):
            if not (text.strip() and text.isascii() and text.isprintable() and len(text) <= limit):
                raise PackageError(f"{key}: 1 to {limit} characters of printable ASCII")
            if "\\" in text:
                raise PackageError(f"{key}: no backslash")


@dataclass(frozen=True, slots=True)
class Class:
    """One output of the network."""

    name: str
    """A word of our own, as in the model card."""
    code: Coded
    """The finding it stands for."""


@dataclass(frozen=True, slots=True)
class ClassifierInput:
    """What the network sees of an image: one window of values, on a small square."""

    modality: Literal["CT", "MR", "PT"]
    unit: Literal["HU", "AU", "BQML"]
    intensity: Window
    matrix: int
    """Rows and columns that every image is resampled to."""

    def __post_init__(self) -> None:
        if MODALITY[self.unit] != self.modality:
            raise PackageError(f"input.unit: {self.modality} is not in {self.unit}")
        if not 16 <= self.matrix <= 1024:
            raise PackageError("input.matrix: from 16 to 1024")


@dataclass(frozen=True, slots=True)
class ClassifierManifest:
    """manifest.yaml of a classifier, key by key."""

    format: Literal[1]
    name: str
    version: str
    task: Literal["classify"]
    network: GeneratorSpec
    """Architecture and options; `classes` and `channels` are among the options."""
    input: ClassifierInput
    classes: tuple[Class, ...]
    """In the order of the network's outputs."""
    bounds: Bounds
    dicom: DicomSpec
    licence: str
    intended_use: str
    site: Coded | None = None
    """The finding site of every class; None: not said."""
    training: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise PackageError("manifest.name: use letters, digits, '-' and '_'")
        if not 2 <= len(self.classes) <= MOST_CLASSES:
            raise PackageError(f"manifest.classes: from 2 to {MOST_CLASSES}")
        for what in ("name", "code"):
            if len({getattr(one, what) for one in self.classes}) < len(self.classes):
                raise PackageError(f"manifest.classes: two have the same {what}")
        if self.network.options.get("classes") != len(self.classes):
            raise PackageError("manifest.network.options.classes: as many as `classes` has")


def classifier_from_yaml(text: bytes) -> ClassifierManifest:
    """Parse the manifest.yaml of a classifier.

    Raises:
        PackageError: it is not YAML, or a key is unknown, missing or wrong; the key is named.
    """
    manifest: ClassifierManifest = read_as(ClassifierManifest, values_in(text), "manifest")
    return manifest


def is_classifier(text: bytes) -> bool:
    """Whether a manifest.yaml is that of a classifier; one that cannot be read is not.

    Which of two schemas it is then held to.
    """
    try:
        values = values_in(text)
    except PackageError:
        return False
    return isinstance(values, dict) and values.get("task") == "classify"
