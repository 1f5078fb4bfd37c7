"""A device made up for tests: its lanes do their work when chance wants, in any order they may."""

import functools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dicomnode.errors import DeviceLost
from dicomnode.imaging.engines import EngineError, TorchEngine
from dicomnode.imaging.engines.conveyor import Compute, Conveyor
from dicomnode.imaging.pending import Pending, in_order


class Upset(Exception):
    """What a test raises itself."""


class SimulatedMoment:
    """Reached, when `reached` is set; failed, when `error` is."""

    def __init__(self, device: "SimulatedLanes") -> None:
        self._device = device
        self.reached = False
        self.error: Exception | None = None

    def wait(self) -> None:
        while not self.reached:
            self._device.step()
        if self.error is not None:
            raise self.error


@dataclass
class _Work:
    do: Callable[[], None]
    after: Sequence[SimulatedMoment]
    moment: SimulatedMoment

    def run(self) -> None:
        failed = [moment.error for moment in self.after if moment.error is not None]
        try:
            if failed:
                raise failed[0]
            with torch.inference_mode():
                self.do()
        except (RuntimeError, Upset, EngineError, DeviceLost) as error:
            self.moment.error = error
        self.moment.reached = True


class _Lane:
    def __init__(self, device: "SimulatedLanes") -> None:
        self._device = device
        self.queue: deque[_Work] = deque()

    def give(
        self, work: Callable[[], None], after: Sequence[SimulatedMoment] = ()
    ) -> SimulatedMoment:
        moment = SimulatedMoment(self._device)
        self.queue.append(_Work(work, after, moment))
        if self._device.at_once and self is self._device.compute:
            moment.wait()
        self._device.perhaps()
        return moment

    @property
    def may_go_on(self) -> bool:
        return bool(self.queue) and all(moment.reached for moment in self.queue[0].after)


class SimulatedLanes:
    """See `conveyor.Lanes`; `seed` decides what is done when.

    Attributes:
        at_once: computing is done, and raises, where it is given, as launches of CUDA do.
    """

    def __init__(self, seed: int, *, at_once: bool = False) -> None:
        self._chance, self.at_once = random.Random(seed), at_once
        self.there, self.compute, self.back = _Lane(self), _Lane(self), _Lane(self)
        self._slow = self._chance.choice((None, self.there, self.compute, self.back))

    def on_host(self, shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), torch.nan)

    def on_device(self, shape: Sequence[int]) -> Tensor:
        """Memory that work given to `compute` before still writes to."""
        memory = torch.empty(tuple(shape))
        self.compute.give(functools.partial(_scribble, memory))
        return memory

    def settle(self) -> None:
        while self.busy:
            self.step()

    @property
    def busy(self) -> bool:
        return any(lane.queue for lane in (self.there, self.compute, self.back))

    def perhaps(self) -> None:
        """Do some of the work, or none."""
        for _ in range(self._chance.choice((0, 0, 0, 1, 2, 5))):
            if self.busy:
                self.step()

    def step(self) -> None:
        """Do one piece of work that may be done now."""
        lanes = [lane for lane in (self.there, self.compute, self.back) if lane.may_go_on]
        assert lanes, "nothing may go on: the lanes wait for one another"
        lane = self._chance.choice([lane for lane in lanes if lane is not self._slow] or lanes)
        lane.queue[0].run()
        lane.queue.popleft()


class SimulatedEngine:
    """An engine beside this thread: a network of torch on a simulated device.

    Attributes:
        most: slices that have room at once; a larger batch runs out of memory when it is started.
        failed: how many slices were in batches that did not fit.
    """

    name, precision, remarks = "simulated 1", "fp32", ()

    def __init__(
        self, reference: TorchEngine, size: int, *, seed: int = 0, ahead: int = 2, most: int = 99
    ) -> None:
        self.lanes = SimulatedLanes(seed)
        self.conveyor = Conveyor(self.lanes, as_captured(lambda x: _whole(reference, x)))
        self.size, self.ahead, self.most = size, ahead, most
        self.failed: list[int] = []

    def batch(self, rows: int, columns: int) -> int:
        return self.size

    def run(self, x: np.ndarray) -> np.ndarray:
        parts = (x[i : i + self.size] for i in range(0, len(x), self.size))
        return np.concatenate(list(in_order(map(self.start, parts), self.ahead)))

    def start(self, x: np.ndarray) -> Pending[np.ndarray]:
        if len(x) > self.most:
            self.failed.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.conveyor.start(x, min(self.size, self.most))


def _scribble(memory: Tensor) -> None:
    memory.fill_(torch.nan)


def _whole(reference: TorchEngine, x: Tensor) -> Tensor:
    return torch.from_numpy(reference.run(x.numpy()))


def as_captured(compute: Compute) -> Compute:
    """`compute` with one memory for all results of a shape, as a captured graph has it."""
    results: dict[tuple[int, ...], Tensor] = {}

    def run(x: Tensor) -> Tensor:
        made = compute(x)
        return results.setdefault(tuple(made.shape), torch.empty_like(made)).copy_(made)

    return run
