"""What a recipe is given at each step."""

from typing import NamedTuple

from torch import Tensor, device


class Batch(NamedTuple):
    """Patches, each (batch, channels, rows, columns), float32."""

    source: Tensor
    """What the generator is given, in [-1, 1]."""
    target: Tensor
    """What it is to become, in [-1, 1]; of another patient where the data are unpaired."""
    weight: Tensor
    """What an error of this pixel counts; (batch, 1, rows, columns)."""

    def to(self, place: device) -> "Batch":
        """The same on another device."""
        return Batch(*(part.to(place, non_blocking=True) for part in self))
