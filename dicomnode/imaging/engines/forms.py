"""How a generator is computed on a device: as it stands, or captured where that is faster.

Which of the two is faster depends on the device, the network and the size of a batch: a capture
saves the time that the host takes to launch every kernel, which is much of it for small networks
and nothing for large ones. So both are timed on the first batch of each shape.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dicomnode.imaging.engines.base import EngineError
from dicomnode.imaging.engines.conveyor import Compute

log = logging.getLogger(__name__)

KEPT = 2
"""Captures kept: each holds the memory of all its intermediate results."""
TRIALS = 3
"""Times that each form is timed; the fastest counts."""


class Forms:
    """The generator of one engine; called with batches, in the order of the lane that computes."""

    def __init__(
        self,
        eager: Compute,
        capture: Callable[[Compute, Tensor], Compute],
        seconds: Callable[[Callable[[], object]], float],
        settle: Callable[[], None],
    ) -> None:
        """
        Args:
            capture: of a computation and a batch: the same computation for batches of this shape;
                raises `EngineError`: it cannot be captured.
            seconds: that the device takes for something.
            settle: waits until the device has done all its work; a capture goes only then.
        """
        self._eager, self._capture = eager, capture
        self._seconds, self._settle = seconds, settle
        self._chosen: OrderedDict[tuple[int, ...], _Form] = OrderedDict()

    @property
    def words(self) -> tuple[str, ...]:
        """What was chosen for each shape that is kept."""
        return tuple(f"{_named(shape)}: {form.words}" for shape, form in self._chosen.items())

    def __call__(self, x: Tensor) -> Tensor:
        """See `conveyor.Compute`."""
        shape = tuple(x.shape)
        if shape not in self._chosen:
            self._make_room()
            self._chosen[shape] = self._choose(x)
            log.info("batches of %s: %s", _named(shape), self._chosen[shape].words)
        self._chosen.move_to_end(shape)
        return self._chosen[shape].run(x)

    def clear(self) -> None:
        """Give back the memory of every capture; the next batch of each shape is tried anew."""
        if self._chosen:
            self._settle()
            self._chosen.clear()

    def _make_room(self) -> None:
        if len(self._chosen) >= KEPT:
            self._settle()
            self._chosen.popitem(last=False)

    def _choose(self, x: Tensor) -> "_Form":
        eager = self._eager
        expected = eager(x).clone()
        try:
            captured = self._capture(eager, x)
            if not torch.equal(captured(x), expected):
                return _Form(eager, "kernel by kernel: captured it gives other bits")
            pairs = [
                (self._seconds(lambda: eager(x)), self._seconds(lambda: captured(x)))
                for _ in range(TRIALS)
            ]
        except EngineError as error:
            return _Form(eager, f"kernel by kernel: {error}")
        finally:
            self._settle()
        slow, fast = (min(times) for times in zip(*pairs, strict=True))
        ratio = f"{slow / fast:.2f} times as fast"
        if fast < slow:
            return _Form(captured, f"captured, {ratio} as kernel by kernel")
        return _Form(eager, f"kernel by kernel: captured only {ratio}")


@dataclass(frozen=True, slots=True)
class _Form:
    run: Compute
    words: str


def _named(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
