"""Patches turned, mirrored and brightened at random, source and target alike.

What is drawn comes from the random numbers of the step, so a resumed run sees the same patches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

Place = tuple[slice, slice]


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one patch."""

    mirrored: bool = False
    degrees: float = 0.0
    gain: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Emphasis:
    """What the error of a pixel counts, by its true value: what is rare is not to be missed."""

    above: float
    """In the unit of the target: above it a pixel is of the rare kind (bone)."""
    weight: float
    below: float
    """Below it a pixel is of what is easily told (air around the patient)."""
    least_weight: float

    def weight_of(self, physical: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values of any shape, float32, unit of the target -> their weights, same shape."""
        rare = np.where(physical > self.above, np.float32(self.weight), np.float32(1))
        return np.where(physical < self.below, np.float32(self.least_weight), rare)


def draw_change(
    mirror: bool, rotate_degrees: float, jitter: float, rng: np.random.Generator
) -> Change:
    """A change of one patch; what is switched off takes no random number."""
    mirrored = mirror and bool(rng.integers(2))
    degrees = float(rng.uniform(-rotate_degrees, rotate_degrees)) if rotate_degrees else 0.0
    gain, offset = rng.uniform(-jitter, jitter, 2) if jitter else (0.0, 0.0)
    return Change(mirrored, degrees, 1.0 + float(gain), float(offset))


def cut(planes: NDArray[np.float32], at: Place, change: Change) -> NDArray[np.float32]:
    """The patch at `at`, turned about its middle and mirrored.

    Args:
        planes: (channels, rows, columns), float32; beyond their border they are continued.
        at: rows and columns of the patch.

    Returns:
        (channels, rows of `at`, columns of `at`), float32.
    """
    patch: NDArray[np.float32] = (
        planes[..., *at] if not change.degrees else _turned(planes, at, change.degrees)
    )
    return np.ascontiguousarray(patch[..., ::-1] if change.mirrored else patch)


def cut_weight(weight: NDArray[np.float32], at: Place, change: Change) -> NDArray[np.float32]:
    """As `cut`, for weights of 0 and 1: what was not in the slice weighs nothing."""
    if not change.degrees:
        return cut(weight, at, change)
    framed = np.pad(weight, ((0, 0), (1, 1), (1, 1)))
    moved = slice(at[0].start + 1, at[0].stop + 1), slice(at[1].start + 1, at[1].stop + 1)
    whole: NDArray[np.float32] = np.floor(cut(framed, moved, change) + np.float32(1e-3))
    return whole  # 1 only where all that it is made of is


def brightened(patch: NDArray[np.float32], change: Change) -> NDArray[np.float32]:
    """Network values, any shape, float32, with another contrast and brightness, in [-1, 1]."""
    if change.gain == 1.0 and change.offset == 0.0:
        return patch
    changed: NDArray[np.float32] = patch * np.float32(change.gain) + np.float32(change.offset)
    return np.clip(changed, np.float32(-1.0), np.float32(1.0))


def _turned(planes: NDArray[np.float32], at: Place, degrees: float) -> NDArray[np.float32]:
    angle = np.deg2rad(degrees)
    size = at[0].stop - at[0].start, at[1].stop - at[1].start
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in size)
    row = np.cos(angle) * rows[:, None] - np.sin(angle) * columns[None, :]
    column = np.sin(angle) * rows[:, None] + np.cos(angle) * columns[None, :]
    row += at[0].start + (size[0] - 1) / 2
    column += at[1].start + (size[1] - 1) / 2
    last = np.array([planes.shape[2] - 1, planes.shape[1] - 1])  # grid_sample: -1 first, 1 last
    places = torch.from_numpy(2.0 * np.stack([column, row], axis=-1) / np.maximum(last, 1) - 1.0)
    source = torch.from_numpy(np.ascontiguousarray(planes))[None]
    turned = F.grid_sample(source, places[None].float(), padding_mode="border", align_corners=True)
    return np.asarray(turned[0].numpy())
