"""Packages of classifiers: read, written, loaded, and asked how probable each class is.

The folder is that of any model package (see `package`), with another manifest and probabilities
for its self-test. A classifier always runs in PyTorch fp32: it looks at small images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.classes import ClassifierManifest, classifier_from_yaml, is_classifier
from dicomnode.imaging.manifest import manifest_to_yaml
from dicomnode.imaging.package import (
    Golden,
    ModelPackage,
    check_folder,
    load_state,
    read_files,
    read_golden,
    read_package,
    read_weights,
    write_files,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dicomnode.imaging.networks import Classifier


@dataclass(frozen=True, slots=True)
class ClassifierPackage:
    """A verified package of a classifier; its weights stay on disk until it is loaded."""

    path: Path
    manifest: ClassifierManifest
    digest: str
    """SHA-256 of SHA256SUMS, hexadecimal: names these exact files everywhere."""

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version


class LoadedClassifier:
    """A classifier ready to run on one device; made by `load_classifier`."""

    def __init__(self, package: ClassifierPackage, network: "Classifier", device: str) -> None:
        self.package = package
        self.device = device
        self._network = network

    def probabilities(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
        """How probable each class is for each image; an image's result depends on it alone.

        Args:
            voxels: (slices, rows, columns), float32, in the unit of the package's input.

        Returns:
            (slices, classes), float32, in [0, 1]; each slice's sum is 1.
        """
        from dicomnode.imaging.networks import probabilities_of

        seen, network = self.package.manifest.input, self._network
        images = seen.intensity.to_network(voxels)
        return probabilities_of(network, images, seen.matrix, network.channels)


def read_classifier(path: Path) -> ClassifierPackage:
    """Read and verify the package of a classifier.

    Raises:
        PackageError: a file differs from its sum, the manifest does not follow its schema, or the
            package is no classifier. The message names the file or key.
    """
    text, digest = read_files(path)
    try:
        manifest = classifier_from_yaml(text)
    except PackageError as error:
        raise PackageError(f"{path.name}: {error}") from error
    check_folder(path, manifest.name, manifest.version)
    return ClassifierPackage(path, manifest, digest)


def read_any(path: Path) -> ModelPackage | ClassifierPackage:
    """A package of either kind.

    Raises:
        PackageError: as `read_package` and `read_classifier`.
    """
    text, _ = read_files(path)
    return read_classifier(path) if is_classifier(text) else read_package(path)


def write_classifier(
    path: Path,
    manifest: ClassifierManifest,
    state: Mapping[str, "Tensor"],
    golden_input: NDArray[np.float32],
    model_card: str,
    *,
    tolerance: float = 1e-3,
) -> ClassifierPackage:
    """Write the package of a classifier whole or not at all; one at `path` is replaced.

    Args:
        golden_input: (slices, rows, columns), float32, in the input's unit; small and generated.
            Its probabilities are computed here, in float32 on the CPU.
        tolerance: of a probability, allowed by the self-test.

    Raises:
        PackageError: the state does not fit the network.
    """
    from dicomnode.imaging.networks import build_classifier

    network = build_classifier(manifest.network.architecture, manifest.network.options)
    _check_size(manifest, network)
    weights = load_state(manifest.name, network, state)
    made = ClassifierPackage(path, manifest, "")
    result = LoadedClassifier(made, network.eval(), "cpu").probabilities(golden_input)
    golden = Golden(golden_input, result, tolerance)
    write_files(path, manifest_to_yaml(manifest), weights, golden, model_card)
    return read_classifier(path)


def load_classifier(package: ClassifierPackage, device: str = "cpu") -> LoadedClassifier:
    """Load the weights and run the self-test.

    Raises:
        PackageError: the weights do not fit, the device cannot be used, or the probabilities of
            the golden input are out of tolerance.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    from torch import float32, int64

    from dicomnode.imaging.networks import plan_classifier

    name, spec = package.name, package.manifest.network
    network = plan_classifier(spec.architecture, spec.options)
    _check_size(package.manifest, network)
    try:
        state = load(read_weights(package))
        if strange := sorted(k for k, v in state.items() if v.dtype not in (float32, int64)):
            raise PackageError(f"{name}: weights must be float32: {', '.join(strange[:3])}")
        network.load_state_dict(state, strict=True, assign=True)
        loaded = LoadedClassifier(package, network.to(device).eval(), device)
    except (RuntimeError, AssertionError, SafetensorError) as error:
        raise PackageError(f"{name}: cannot load on {device}: {error}") from error
    golden = read_golden(package.path, len(package.manifest.classes))
    worst = float(np.abs(loaded.probabilities(golden.source) - golden.result).max())
    if not worst <= golden.tolerance:  # also true for NaN
        raise PackageError(
            f"{name}: self-test on {device} differs by {worst:g} in a probability, allowed "
            f"{golden.tolerance:g}; do not serve it on this device"
        )
    return loaded


def _check_size(manifest: ClassifierManifest, network: "Classifier") -> None:
    if manifest.input.matrix < network.smallest:
        raise PackageError(f"manifest.input.matrix: at least {network.smallest} for this network")
