"""The closed list of classifiers that a package may name, and how one is applied to images."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dicomnode.imaging.networks.base import Classifier
from dicomnode.imaging.networks.densenet import Brightness, DenseNet
from dicomnode.imaging.networks.registry import plan_network

CLASSIFIERS: Mapping[str, Callable[..., Classifier]] = {
    "densenet121": DenseNet,
    "brightness": Brightness,
}
"""Name in a manifest -> classifier. With other `blocks`, `growth` and `width` than its own
`densenet121` is a smaller or larger network of the same kind; a package says which."""

MOST_WEIGHTS = 1 << 28


def build_classifier(architecture: str, options: Mapping[str, Any]) -> Classifier:
    """Build the classifier a package names, in eval mode.

    Raises:
        PackageError: there is no such classifier, or it does not take these options.
    """
    plan_classifier(architecture, options)
    return CLASSIFIERS[architecture](**options).eval()


def plan_classifier(architecture: str, options: Mapping[str, Any]) -> Classifier:
    """The same without memory for its weights, which live on torch's `meta` device.

    Raises:
        PackageError: as `build_classifier`; or it would have more weights than a package may.
    """
    return plan_network(CLASSIFIERS, "network", architecture, options, MOST_WEIGHTS)


def as_squares(images: Tensor, side: int) -> Tensor:
    """Images as a classifier sees them: padded below and right to a square with the lowest value a
    network sees, -1, and resampled to `side` x `side`.

    (batch, rows, columns), float32, in [-1, 1] -> (batch, 1, side, side), float32, in [-1, 1].
    Resampling is bilinear and averages where it makes smaller, so that nothing aliases. Training
    and serving both call this.
    """
    rows, columns = images.shape[1:]
    longest = max(rows, columns)
    square = F.pad(images[:, None], (0, longest - columns, 0, longest - rows), value=-1.0)
    if longest == side:
        return square
    small = F.interpolate(square, (side, side), mode="bilinear", antialias=True)
    return small.clamp(-1.0, 1.0)


@torch.inference_mode()
def probabilities_of(
    network: nn.Module, images: NDArray[np.float32], side: int, channels: int
) -> NDArray[np.float32]:
    """How probable each class is for each image, one image at a time.

    (images, rows, columns), float32, network scale -> (images, classes), float32, rows of sum 1.
    A result depends on its own image alone.
    """
    where = next(network.parameters()).device
    found = []
    for image in images:
        x = as_squares(torch.from_numpy(np.ascontiguousarray(image))[None].to(where), side)
        found.append(torch.softmax(network(x.expand(-1, channels, -1, -1)).float(), 1).cpu())
    result: NDArray[np.float32] = torch.cat(found).numpy()
    return result
