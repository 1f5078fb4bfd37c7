"""A recipe is one way to train: which networks, which losses, in which order.

train.py knows only this interface; a recipe knows nothing of files or configuration files. Random
numbers of a step come from the seed and the step alone, so that no random state has to be kept.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import device, nn

from dicomnode.imaging.networks import Generator
from training.recipes.batch import Batch

__all__ = ["Average", "Batch", "Parts", "Recipe", "step_rng"]

_Network = TypeVar("_Network", bound=nn.Module)


class Recipe(Protocol):
    """What `train.fit` needs."""

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """Optimiser step number `step`; returns the losses by name."""

    def results(self) -> Mapping[str, Generator]:
        """The networks that go into packages, in eval mode: ``forward`` and maybe ``backward``."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly here; tensors and plain values only."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def to(self, place: device) -> None:
        """Move everything to another device, before the first step."""


class Parts:
    """Networks, optimisers, pools and scales by name: their state is that of the recipe."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state.get(name, {}) if name == "descent" else state[name])

    def to(self, place: device) -> None:
        for part in self.parts.values():
            if isinstance(part, nn.Module | Average):
                part.to(place)


def step_rng(seed: int, step: int) -> torch.Generator:
    """The random numbers of a step; dropout, which takes the global ones, is seeded with it."""
    start = (seed * 1_000_003 + step) % 2**63
    torch.manual_seed(start)
    return torch.Generator().manual_seed(start)


class Average(Generic[_Network]):
    """What a package gets of a network: the running mean of its weights, or these themselves."""

    def __init__(self, network: _Network, decay: float) -> None:
        """`decay`: of the mean; 0: there is none, and nothing is kept beside the network."""
        self.network, self.decay = network, decay
        self.mean = _still(network) if decay > 0 else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """w' <- d w' + (1 - d) w, with a shorter memory at the start; buffers are copied."""
        if self.mean is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = zip(self.mean.parameters(), self.network.parameters(), strict=True)
        for mean, current in weights:
            mean.lerp_(current, 1.0 - decay)
        buffers = zip(self.mean.buffers(), self.network.buffers(), strict=True)
        for held, newest in buffers:
            held.copy_(newest)

    def result(self) -> _Network:
        """In eval mode; the network that is trained is not it, and goes on as it is."""
        return _still(self.network) if self.mean is None else self.mean

    def to(self, place: device) -> None:
        if self.mean is not None:
            self.mean.to(place)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.mean is None else dict(self.mean.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.mean is not None:
            self.mean.load_state_dict(state)


def _still(network: _Network) -> _Network:
    """A copy in eval mode that nothing trains."""
    return deepcopy(network).eval().requires_grad_(False)
