"""Validation pictures: source, result, truth and error side by side, in windows that never change.

They show patients: they stay in the folder of the run.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.units import Unit

WINDOWS: dict[str, tuple[float, float]] = {"HU": (-250.0, 450.0), "SUV": (0.0, 8.0)}
"""What black and white stand for, by unit; other units are shown as the network sees them."""
ERRORS: dict[str, float] = {"HU": 150.0, "SUV": 2.0}
"""An error of this size is white, of its negative black, none grey."""
NETWORK_ERROR = 0.25
"""The same where values are in [-1, 1]."""

Plane = NDArray[np.float32]


def grey(values: Plane, unit: Unit, network: Plane) -> NDArray[np.uint8]:
    """(rows, columns), uint8: `values` in the window of their unit, else `network` in [-1, 1]."""
    low, high = WINDOWS.get(unit, (-1.0, 1.0))
    shown = values if unit in WINDOWS else network
    return _bytes((shown - low) / (high - low))


def error(result: Plane, truth: Plane, unit: Unit, per_network: float) -> NDArray[np.uint8]:
    """(rows, columns), uint8: result minus truth; 128 is none.

    Args:
        per_network: what one unit of the network stands for.
    """
    most = ERRORS.get(unit, NETWORK_ERROR * per_network)
    return _bytes(0.5 + (result - truth) / (2 * most))


def strip(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Side by side, (rows, columns), uint8; smaller ones stand on black."""
    rows = max(image.shape[0] for image in images)
    padded = [np.pad(image, ((0, rows - image.shape[0]), (0, 2))) for image in images]
    return np.concatenate(padded, axis=1)


def stack(strips: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8] | None:
    """One below the other, (rows, columns), uint8; None: there is none."""
    if not strips:
        return None
    columns = max(image.shape[1] for image in strips)
    padded = [np.pad(image, ((0, 2), (0, columns - image.shape[1]))) for image in strips]
    return np.concatenate(padded, axis=0)


def _bytes(share: Plane) -> NDArray[np.uint8]:
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
