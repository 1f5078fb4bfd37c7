"""A recipe is one way to train: which networks, which losses, in which order.

train.py knows only this interface; a recipe knows nothing of files or configuration files.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dicomnode.imaging.networks import Generator


class Batch(NamedTuple):
    """Paired patches, each (batch, 1, rows, columns), float32."""

    source: Tensor
    """Lower dose, in [-1, 1]."""
    target: Tensor
    """Full dose, in [-1, 1]."""
    weight: Tensor
    """What an error of this pixel counts; 1 or more."""


class Recipe(Protocol):
    """What `train.fit` needs."""

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """Optimiser step number `step`; returns the losses by name."""

    def result(self) -> Generator:
        """The network that goes into the package, in eval mode."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly here; tensors and plain values only."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
