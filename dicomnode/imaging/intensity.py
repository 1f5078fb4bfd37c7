"""Physical values <-> what a network sees, declared as data in a model package and invertible.

Training and serving call the same methods, so they cannot drift apart.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dicomnode.errors import PackageError
from dicomnode.imaging.equalise import Equalisation, equalised


@dataclass(frozen=True, slots=True)
class Window:
    """A fixed range of physical values, mapped linearly to [-1, 1]; clipped outside."""

    low: float
    high: float
    kind: Literal["window"] = "window"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise PackageError(
                f"intensity: the window [{self.low}, {self.high}] is empty; low must be below high"
            )

    @property
    def unit_per_network(self) -> float:
        """How much of the physical unit one network unit stands for (half the window)."""
        return (self.high - self.low) / 2

    def to_network(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Physical values, any shape, float32 -> the same shape, float32, in [-1, 1]."""
        clipped = np.clip(voxels, self.low, self.high)
        return ((clipped - self.low) / self.unit_per_network - 1.0).astype(np.float32)

    def from_network(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Network values, any shape, float32 -> the same shape, float32, physical unit.

        Values beyond [-1, 1] are not clipped: a network that overshoots is seen by the checks of
        its output, not hidden.
        """
        return ((values + 1.0) * self.unit_per_network + self.low).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Unscaled:
    """Physical values as they are: no window, no clipping, nothing lost."""

    kind: Literal["none"] = "none"

    @property
    def unit_per_network(self) -> float:
        """One: the network works in the physical unit."""
        return 1.0

    def to_network(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
        """The values themselves, float32."""
        return voxels

    def from_network(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The values themselves, float32."""
        return values


@dataclass(frozen=True, slots=True)
class Equalised:
    """A window, then histogram equalisation of each slice: the option of the contrast paper.

    There is no way back to physical values: a result is grey, from 0 to 4095, and not HU.
    """

    low: float
    high: float
    method: Equalisation = "global"
    kind: Literal["equalised"] = "equalised"

    def __post_init__(self) -> None:
        Window(self.low, self.high)

    @property
    def unit_per_network(self) -> float:
        """How many grey values one network unit stands for."""
        return GREY_LEVELS / 2

    def to_network(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Physical values, (..., rows, columns), float32 -> the same shape, float32, in [-1, 1]."""
        return equalised(Window(self.low, self.high).to_network(voxels), self.method)

    def from_network(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Network values, any shape, float32 -> the same shape, float32, grey, 0 to 4095."""
        return Window(0.0, GREY_LEVELS).from_network(values)


GREY_LEVELS = 4095.0
"""The largest grey value of an equalised result."""
Intensity = Window | Unscaled | Equalised
