"""Patches turned, mirrored, scaled and given other grey values at random.

Source and target are moved alike; the values of the source alone are changed.

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
    scale: float = 1.0
    """Above 1 what is shown gets larger."""
    curve: float = 1.0
    """Exponent of the values as a share of their window: below 1 dark ones get brighter."""
    slope: tuple[float, float] = (0.0, 0.0)
    """Logarithm of the gain at the last row, and at the last column; opposite at the first."""

    @property
    def in_place(self) -> bool:
        """Every pixel of the patch is one of the slice."""
        return self.degrees == 0.0 and self.scale == 1.0


@dataclass(frozen=True, slots=True)
class Vary:
    """How far size and values of a patch are changed at random, beyond `Images.jitter`; 0: not."""

    scale: float = 0.0
    """Patches are enlarged or reduced by a factor of up to e to this power."""
    curve: float = 0.0
    """Values of the source, as a share of their window, are taken to a power of up to e to this."""
    shade: float = 0.0
    """The source gets brighter to one side, as near a coil: at the edges by up to e to this."""


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
    mirror: bool,
    rotate_degrees: float,
    jitter: float,
    rng: np.random.Generator,
    vary: Vary | None = None,
) -> Change:
    """A change of one patch; what is switched off takes no random number."""

    def drawn(reach: float) -> float:
        return float(rng.uniform(-reach, reach)) if reach else 0.0

    vary = vary or Vary()
    mirrored = mirror and bool(rng.integers(2))
    degrees = drawn(rotate_degrees)
    gain, offset = drawn(jitter), drawn(jitter)
    scale, curve = np.exp(drawn(vary.scale)), np.exp(drawn(vary.curve))
    slope = drawn(vary.shade), drawn(vary.shade)
    return Change(mirrored, degrees, 1.0 + gain, offset, float(scale), float(curve), slope)


def at_least(planes: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
    """(n, rows, columns): small slices are continued by their border up to `patch` pixels.

    The weight of what is added is that of its value.
    """
    _, rows, columns = planes.shape
    more = (0, max(0, patch - rows)), (0, max(0, patch - columns))
    if more == ((0, 0), (0, 0)):
        return planes
    return np.pad(planes, ((0, 0), *more), mode="edge")


def cut(planes: NDArray[np.float32], at: Place, change: Change) -> NDArray[np.float32]:
    """The patch at `at`, turned about its middle, scaled and mirrored.

    Args:
        planes: (channels, rows, columns), float32; beyond their border they are continued.
        at: rows and columns of the patch.

    Returns:
        (channels, rows of `at`, columns of `at`), float32.
    """
    patch: NDArray[np.float32] = (
        planes[..., *at] if change.in_place else _turned(planes, at, change)
    )
    return np.ascontiguousarray(patch[..., ::-1] if change.mirrored else patch)


def cut_weight(weight: NDArray[np.float32], at: Place, change: Change) -> NDArray[np.float32]:
    """As `cut`, for weights of 0 and 1: what was not in the slice weighs nothing."""
    if change.in_place:
        return cut(weight, at, change)
    framed = np.pad(weight, ((0, 0), (1, 1), (1, 1)))
    moved = slice(at[0].start + 1, at[0].stop + 1), slice(at[1].start + 1, at[1].stop + 1)
    whole: NDArray[np.float32] = np.floor(cut(framed, moved, change) + np.float32(1e-3))
    return whole  # 1 only where all that it is made of is


def brightened(patch: NDArray[np.float32], change: Change) -> NDArray[np.float32]:
    """Network values, (..., rows, columns), float32, changed as MR changes, in [-1, 1].

    The curve first, then a gain that goes across the patch as a coil's does, then contrast and
    brightness.
    """
    changed = patch
    if change.curve != 1.0 or any(change.slope):
        share = (np.clip(patch, -1.0, 1.0) * 0.5 + 0.5) ** np.float32(change.curve)
        rows, columns = (np.linspace(-1, 1, n, dtype=np.float32) for n in patch.shape[-2:])
        field = np.exp(change.slope[0] * rows[:, None] + change.slope[1] * columns)
        changed = np.asarray(share * field.astype(np.float32) * 2 - 1, np.float32)
    if change.gain != 1.0 or change.offset != 0.0:
        changed = changed * np.float32(change.gain) + np.float32(change.offset)
    return patch if changed is patch else np.clip(changed, np.float32(-1.0), np.float32(1.0))


def _turned(planes: NDArray[np.float32], at: Place, change: Change) -> NDArray[np.float32]:
    angle = np.deg2rad(change.degrees)
    size = at[0].stop - at[0].start, at[1].stop - at[1].start
    rows, columns = ((np.arange(n) - (n - 1) / 2) / change.scale for n in size)
    row = np.cos(angle) * rows[:, None] - np.sin(angle) * columns[None, :]
    column = np.sin(angle) * rows[:, None] + np.cos(angle) * columns[None, :]
    row += at[0].start + (size[0] - 1) / 2
    column += at[1].start + (size[1] - 1) / 2
    last = np.array([planes.shape[2] - 1, planes.shape[1] - 1])  # grid_sample: -1 first, 1 last
    places = torch.from_numpy(2.0 * np.stack([column, row], axis=-1) / np.maximum(last, 1) - 1.0)
    source = torch.from_numpy(np.ascontiguousarray(planes))[None]
    turned = F.grid_sample(source, places[None].float(), padding_mode="border", align_corners=True)
    return np.asarray(turned[0].numpy())
