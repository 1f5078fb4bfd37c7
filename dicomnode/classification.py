"""A classifier looks at the images of a derived series; its report, or why there is none.

What goes wrong here costs the report and never the images.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode import __version__
from dicomnode.errors import PackageError, SeriesRefused
from dicomnode.imaging.classifier import (
    ClassifierPackage,
    LoadedClassifier,
    load_classifier,
)
from dicomnode.imaging.pixels import encoding_of, stored_values
from dicomnode.provenance import Identity
from dicomnode.qa import check_headers, check_values
from dicomnode.report import classifier_report

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Classifiers:
    """The loaded classifiers by the names that routes give them, and why others are not."""

    loaded: Mapping[str, LoadedClassifier] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    def for_series(self, name: str | None) -> "Classification | None":
        """For one derived series; None: its route asks for no classifier."""
        if name is None:
            return None
        why_not = self.failures.get(name, "not loaded")
        return Classification(name, self.loaded.get(name), why_not)


def load_classifiers(packages: Mapping[str, ClassifierPackage], device: str) -> Classifiers:
    """Load classifiers and run their self-tests; what cannot be loaded is among `failures`."""
    loaded: dict[str, LoadedClassifier] = {}
    failures: dict[str, str] = {}
    for name, package in packages.items():
        try:
            loaded[name] = load_classifier(package, device)
            log.info("classifier %s %s loaded on %s", name, package.version, device)
        except PackageError as error:
            failures[name] = str(error)
            log.error("classifier %s not loaded: %s", name, error)
    return Classifiers(loaded, failures)


class Classification:
    """One derived series before one classifier.

    The probability of a class is the mean over the images: each is looked at as it will be sent.
    """

    def __init__(self, name: str, classifier: LoadedClassifier | None, why_not: str = "") -> None:
        """
        Args:
            name: of the package, as the route names it.
            classifier: None: it could not be loaded; `why_not` says why.
        """
        self.name = name
        self._classifier, self._why_not = classifier, why_not
        self.start()

    def start(self) -> None:
        """Forget what was looked at: the series is made, or made anew."""
        self.problem = self._why_not if self._classifier is None else ""
        """Why there is no report, in a sentence; empty: there is one."""
        self._found: list[NDArray[np.float32]] = []

    def look(self, image: Dataset) -> None:
        """Classify one derived image, as it is stored. Raises nothing of its own."""
        if self._classifier is None or self.problem:
            return
        try:
            self._found.append(_probabilities(self._classifier, image))
        except SeriesRefused as refusal:
            self.problem = f"{refusal.code}: {refusal.message}"
        except (RuntimeError, MemoryError) as error:  # of torch: no memory, lost device
            log.exception("classifier %s broke", self.name)
            self.problem = f"{type(error).__name__}; traceback in the log"

    def reports(self, images: Sequence[Dataset], now: datetime, number: int) -> Iterator[Dataset]:
        """The report, or nothing and a `problem`.

        Args:
            images: headers of all images that were looked at.
            now: aware; that of the derivation.
            number: SeriesNumber of the report.
        """
        if self._classifier is None or self.problem:
            return
        package = self._classifier.package
        try:
            check_headers(images, package)
        except SeriesRefused as refusal:
            self.problem = f"{refusal.code}: {refusal.message}"
            return
        mean = np.asarray(self._found, np.float64).mean(0).tolist()
        identity = _identity(package, self._classifier.device, len(images))
        yield classifier_report(images, package.manifest, mean, identity, now, series_number=number)

    def __str__(self) -> str:
        """For the timeline; empty: there is a report."""
        return f"no report of classifier {self.name}: {self.problem}" if self.problem else ""


def _probabilities(classifier: LoadedClassifier, image: Dataset) -> NDArray[np.float32]:
    """(classes,), float32, of one image, whose padding is seen as the darkest value.

    Raises:
        SeriesRefused: OUT_OF_BOUNDS, or the image's values cannot be had.
    """
    package, given = classifier.package, classifier.package.manifest.input
    if image.get("Modality") != given.modality:
        what = f"classifier {package.name} takes {given.modality}, not {image.get('Modality')}"
        raise SeriesRefused("OUT_OF_BOUNDS", what, "leave it off this route")
    encoding, stored = encoding_of(image), stored_values(image)
    voxels, padding = encoding.to_physical(stored), encoding.is_padding(stored)
    native = voxels if padding is None else voxels[~padding]
    if native.size:
        check_values(native, given.unit, package)
    if padding is not None:
        voxels[padding] = given.intensity.low
    found: NDArray[np.float32] = classifier.probabilities(voxels[None])[0]
    return found


def _identity(package: ClassifierPackage, device: str, images: int) -> Identity:
    manifest = package.manifest
    return Identity(
        name=manifest.name,
        version=manifest.version,
        digest=package.digest,
        architecture=manifest.network.architecture,
        task=manifest.task,
        algorithm_name=manifest.dicom.algorithm_name,
        algorithm_family=manifest.dicom.algorithm_family,
        algorithm_version=manifest.dicom.algorithm_version,
        node_version=__version__,
        precision=f"fp32 {device.partition(':')[0]}",
        params=f"mean of {images} images",
    )
