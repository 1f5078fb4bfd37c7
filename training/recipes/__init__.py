"""A recipe is one way to train: which networks, which losses, in which order.

train.py knows only this interface; a recipe knows nothing of files or configuration files. Random
numbers of a step come from the seed and the step alone, so that no random state has to be kept.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dicomnode.imaging.networks import Generator

_Network = TypeVar("_Network", bound=nn.Module)


class Batch(NamedTuple):
    """Patches, each (batch, channels, rows, columns), float32."""

    source: Tensor
    """What the generator is given, in [-1, 1]."""
    target: Tensor
    """What it is to become, in [-1, 1]; of another patient where the data are unpaired."""
    weight: Tensor
    """What an error of this pixel counts; (batch, 1, rows, columns)."""


class Recipe(Protocol):
    """What `train.fit` needs."""

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """Optimiser step number `step`; returns the losses by name."""

    def results(self) -> Mapping[str, Generator]:
        """The networks that go into packages, in eval mode: ``forward`` and maybe ``backward``."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly here; tensors and plain values only."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Parts:
    """Networks, optimisers and pools by name: their state is that of the recipe."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def step_rng(seed: int, step: int) -> torch.Generator:
    """The random numbers of a step; dropout, which takes the global ones, is seeded with it."""
    start = (seed * 1_000_003 + step) % 2**63
    torch.manual_seed(start)
    return torch.Generator().manual_seed(start)


def average_of(network: _Network) -> _Network:
    """A copy to hold the running mean of its weights, in eval mode."""
    return deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """w' <- d w' + (1 - d) w, with a shorter memory at the start; buffers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    weights = zip(average.parameters(), network.parameters(), strict=True)
    for mean, current in weights:
        mean.lerp_(current, 1.0 - decay)
    buffers = zip(average.buffers(), network.buffers(), strict=True)
    for held, newest in buffers:
        held.copy_(newest)
