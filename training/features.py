"""Features of images by a network whose file is named and hashed, and how far two sets are apart.

There is no default: a Fréchet distance means nothing without the network, the windows and the
number of images. Only with the Inception of the original (TensorFlow 2015) weights is it called
FID; with a classifier package it is FD[name:hash], with random weights FD[random:seed].
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from torch.nn import functional as F

from dicomnode.errors import PackageError
from dicomnode.imaging.classifier import read_classifier
from dicomnode.imaging.networks import build_classifier
from dicomnode.imaging.networks.densenet import DenseNet
from dicomnode.imaging.package import read_weights
from training.distributions import Features, frechet_distance, kernel_distance, rank_warning
from training.errors import TrainingError
from training.inception import FID_SHA256, INCEPTION_SIDE, load_inception
from training.similarity import Array

_AT_ONCE = 8
"""Slices per pass of the network."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Distances of the features of results and truths, and all they depend on."""

    name: str
    frechet: float
    kernel: float
    """Squared maximum mean discrepancy (KID of these features), times 1."""
    results: int
    truths: int
    length: int
    window: str
    warning: str | None


@dataclass(frozen=True, slots=True)
class Extractor:
    """A network that makes features of slices.

    Attributes:
        name: as it is reported, for example ``FID`` or ``FD[chest-classes:1a2b3c4d]``.
        side: rows and columns a slice is resampled to.
        apply: (slices, 1, side, side), float32, in [0, 255] -> (slices, length).
    """

    name: str
    side: int
    apply: Callable[[torch.Tensor], torch.Tensor]

    @torch.inference_mode()
    def features(self, volume: Array, low: float, high: float) -> Features:
        """(slices, length) of a volume, (slices, rows, columns), by whole greys of [low, high]."""
        grey = np.rint((np.clip(volume, low, high) - low) * (255.0 / (high - low)))
        slices = torch.from_numpy(grey.astype(np.float32))[:, None]
        parts = []
        for start in range(0, len(slices), _AT_ONCE):
            some = slices[start : start + _AT_ONCE]
            if some.shape[2:] != (self.side, self.side):
                size = (self.side, self.side)
                some = F.interpolate(some, size, mode="bilinear", align_corners=False)
            parts.append(self.apply(some).double().numpy())
        return np.concatenate(parts)

    def spread(self, made: Features, true: Features) -> Spread:
        """Of results and truths, (slices, length) each."""
        return Spread(
            self.name,
            frechet_distance(made, true),
            kernel_distance(made, true),
            len(made),
            len(true),
            made.shape[1],
            f"the range in 256 greys, resampled to {self.side} x {self.side}, bilinear",
            rank_warning(len(made), len(true), made.shape[1]),
        )


def load_extractor(words: str) -> Extractor:
    """What `features=` names.

    Args:
        words: ``inception:FILE`` (pytorch-fid's weights), the folder of a classifier package, or
            ``random:SEED`` (for tests of the machinery, not for judging).

    Raises:
        TrainingError: it is none of these, or cannot be read.
    """
    kind, _, rest = words.partition(":")
    if kind == "random" and rest.isdigit():
        return _random(int(rest))
    if kind == "inception" and rest:
        return _inception(Path(rest))
    return _classifier(Path(words))


def _random(seed: int) -> Extractor:
    """Two convolutions of random weights: 16 features."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(16, 1, 7, 7, generator=generator) / 7
    second = torch.randn(16, 16, 3, 3, generator=generator) / 12

    def apply(grey: torch.Tensor) -> torch.Tensor:
        found = F.relu(F.conv2d(grey / 127.5 - 1, first, stride=2))
        return F.relu(F.conv2d(found, second, stride=2)).mean((2, 3))

    return Extractor(f"FD[random:{seed}]", 64, apply)


def _inception(path: Path) -> Extractor:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainingError(f"features: {path} cannot be read") from error
    network = load_inception(path)
    known = digest.startswith(FID_SHA256)
    name = f"FID (Inception 2015, pool3, {digest[:8]})" if known else f"FD[inception:{digest[:8]}]"

    def apply(grey: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = network((grey / 127.5 - 1).expand(-1, 3, -1, -1))
        return made

    return Extractor(name, INCEPTION_SIDE, apply)


def _classifier(path: Path) -> Extractor:
    try:
        package = read_classifier(path)
        spec = package.manifest.network
        network = build_classifier(spec.architecture, spec.options)
        network.load_state_dict(load(read_weights(package)))
    except PackageError as error:
        raise TrainingError(
            f"features: want inception:FILE, random:SEED or the folder of a classifier; {error}"
        ) from error
    if not isinstance(network, DenseNet):
        raise TrainingError(f"features: a {spec.architecture} has no features")
    dense = network.eval()

    def apply(grey: torch.Tensor) -> torch.Tensor:
        seen = (grey / 127.5 - 1).expand(-1, dense.channels, -1, -1)
        return F.relu(dense.features(seen)).mean((2, 3))

    name = f"FD[{package.name}:{package.digest[:8]}]"
    return Extractor(name, package.manifest.input.matrix, apply)
