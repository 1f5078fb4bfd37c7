"""The model packages of a site: listed, verified, timed, described for others."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicomnode.classification import load_classifiers
from dicomnode.config import NodeConfig
from dicomnode.errors import PackageError
from dicomnode.imaging.classes import ClassifierManifest
from dicomnode.imaging.classifier import ClassifierPackage, read_any
from dicomnode.imaging.manifest import Manifest
from dicomnode.imaging.package import ModelPackage
from dicomnode.imaging.volume import Volume
from dicomnode.worker import load_models

SLICES = 8
"""Slices that `bench` times, after one that is not."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per slice of one model; `words`: engine, number format, device, why no faster one."""

    device: str
    precision: str
    words: str
    matrix: int
    median_seconds: float
    slowest_seconds: float


Package = ModelPackage | ClassifierPackage


def find_packages(
    config: NodeConfig, name: str | None = None
) -> tuple[dict[str, Package], dict[str, str]]:
    """Folder in models_dir -> its verified package, and folder -> what is wrong with the others.

    Raises:
        PackageError: the one that is named is damaged or not there.
    """
    if name:
        return {name: read_any(config.models_dir / name)}, {}
    packages: dict[str, Package] = {}
    damaged: dict[str, str] = {}
    for path in sorted(config.models_dir.glob("[!.]*/manifest.yaml")):
        try:
            packages[path.parent.name] = read_any(path.parent)
        except PackageError as error:
            damaged[path.parent.name] = str(error)
    return packages, damaged


def translator(package: Package, command: str) -> ModelPackage:
    """
    Raises:
        PackageError: it is a classifier, and `command` is for those that translate.
    """
    if isinstance(package, ClassifierPackage):
        raise PackageError(f"{command}: {package.name} is a classifier; name another package")
    return package


def describe(folder: str, package: Package) -> dict[str, Any]:
    """One line of `models list`, as data."""
    manifest = package.manifest
    if isinstance(manifest, ClassifierManifest):
        architecture, formats = manifest.network.architecture, []
    else:
        architecture, formats = manifest.generator.architecture, sorted(manifest.acceptance)
    return {
        "folder": folder,
        "name": package.name,
        "version": package.version,
        "task": manifest.task,
        "sha256": package.digest,
        "architecture": architecture,
        "licence": manifest.licence,
        "precisions": ["fp32", *formats],
    }


def verify(
    config: NodeConfig, packages: dict[str, Package], device: str
) -> Iterator[tuple[str, bool, str]]:
    """Run every self-test: folder, whether it passed, and what was chosen or what is wrong."""
    translating = {n: p for n, p in packages.items() if isinstance(p, ModelPackage)}
    classifying = {n: p for n, p in packages.items() if isinstance(p, ClassifierPackage)}
    models, failures, used = load_models(translating, device, 0, config.precision)
    classifiers = load_classifiers(classifying, used)
    words = {name: f"{model.words}; self-test: {model.self_test}" for name, model in models.items()}
    words |= dict.fromkeys(classifiers.loaded, f"torch, fp32 on {used}")
    for folder in packages:
        if folder in words:
            yield folder, True, f"passed on {used}: {words[folder]}"
        else:
            yield folder, False, {**failures, **classifiers.failures}[folder]


def bench(package: ModelPackage, device: str, precision: str) -> Timing:
    """Time a model on slices of noise, of its trained matrix or 512 x 512.

    Raises:
        PackageError: the model cannot be used on `device`.
    """
    from dicomnode.imaging.inference import predict

    models, failures, used = load_models({package.name: package}, device, 0, precision)
    if failures:
        raise PackageError(failures[package.name])
    model = models[package.name]
    seconds = []
    for plane in _planes(package.manifest, SLICES + 1):
        began = time.perf_counter()
        predict(model, plane)
        seconds.append(time.perf_counter() - began)
    measured = seconds[1:]  # the first one compiles
    side = package.manifest.input.trained_matrix() or 512
    median = float(np.median(measured))
    return Timing(used, model.precision, model.words, side, median, max(measured))


def _planes(manifest: Manifest, count: int) -> Iterable[Volume]:
    side = manifest.input.trained_matrix() or 512
    spacing = (manifest.input.field_of_view_mm.max or 0.7 * side) / side
    rng = np.random.default_rng(1)
    at, axes = np.zeros((1, 3)), np.array([1.0, 0, 0, 0, 1, 0])
    for _ in range(count):
        voxels = rng.normal(40, 40, (1, side, side)).astype(np.float32)
        yield Volume(voxels, manifest.input.unit, at, axes, (2.5, spacing, spacing), "", None)
