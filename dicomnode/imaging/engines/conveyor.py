"""Batches on their way through a device: copied there, computed, copied back.

Three lanes do their work in order, each beside the others: while batch k is computed, batch k + 1
is copied to the device and batch k - 1 back. What one lane hands to the next it hands over at a
`Moment`, never by luck of timing. The memory that a batch goes through, its `Slot`, belongs to that
batch alone until the host has waited for its last copy; then nothing of it is under way, and the
slot is free for another. So no buffer is written while another lane may still read it.

Nothing here knows CUDA: `engines.cuda` has its lanes.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from dicomnode.errors import DeviceLost
from dicomnode.imaging.engines.base import EngineError, Voxels

Compute = Callable[[Tensor], Tensor]
"""(batch, slices, rows, columns), float32 -> (batch, 1, rows, columns), any floating-point type;
the result may lie in memory that the next call writes to."""
KEPT_SLOTS = 3
"""Free slots that are kept for the next batches: one for each lane."""


class Moment(Protocol):
    """A place in the work of a lane."""

    def wait(self) -> None:
        """Wait, on this thread, until the lane is there. Raises what went wrong on the way."""


M = TypeVar("M", bound=Moment)
"""The moments of one kind of device."""


class Lane(Protocol[M]):
    """Does its work in the order in which it was given, beside this thread and other lanes."""

    def give(self, work: Callable[[], None], after: Sequence[M] = ()) -> M:
        """Do `work` when all before it is done and the moments `after` are reached.

        Work may begin before this returns, and what it raises may be raised here.
        """


class Lanes(Protocol[M]):
    """A device: its three lanes and its memory."""

    @property
    def there(self) -> Lane[M]: ...
    @property
    def compute(self) -> Lane[M]: ...
    @property
    def back(self) -> Lane[M]: ...

    def on_host(self, shape: Sequence[int]) -> Tensor:
        """float32, in memory of the host that lanes copy from and to beside other work."""

    def on_device(self, shape: Sequence[int]) -> Tensor:
        """float32, in memory of the device that earlier work of `compute` may still be using."""

    def settle(self) -> None:
        """Wait until every lane has done all its work."""


@dataclass(slots=True)
class Slot(Generic[M]):
    """What one batch goes through: on the host, (batch, slices, rows, columns), float32, to where
    it is copied on the device, and from where the result is copied to where the host reads it, with
    one slice each.

    Attributes:
        after: what has to be reached before anything is written to it.
    """

    source: Tensor
    given: Tensor
    made: Tensor
    result: Tensor
    after: list[M]


class Conveyor(Generic[M]):
    """One generator on one device, fed with batches."""

    def __init__(self, lanes: Lanes[M], compute: Compute) -> None:
        self._lanes, self._compute = lanes, compute
        self._free: list[Slot[M]] = []
        self.slots = 0
        """How many slots there are, in use or free."""

    def start(self, x: Voxels, size: int) -> "Batch[M]":
        """Begin a batch of up to `size` slices.

        It is filled up with its last slice, so that every batch is computed in the same way,
        whatever the number of slices that is left at the end.

        Args:
            x: (batch, slices, rows, columns), float32.

        Raises:
            EngineError: the generator does not make one slice of each.
            DeviceLost: the device failed.
            RuntimeError: it has no memory left.
        """
        shape = (size, *x.shape[1:])
        slot = self._slot(shape)
        source = slot.source.numpy()
        source[: len(x)] = x
        source[len(x) :] = x[-1]
        try:
            return Batch(self, slot, len(x), self._begin(slot))
        except BaseException:  # raised again: whatever it is, the slot is lost
            self.slots -= 1
            with contextlib.suppress(RuntimeError, DeviceLost):  # one reason is enough
                self._lanes.settle()
            raise

    def _slot(self, shape: tuple[int, ...]) -> Slot[M]:
        for slot in self._free:
            if slot.source.shape == shape:
                self._free.remove(slot)
                return slot
        lanes, one = self._lanes, (shape[0], 1, *shape[2:])
        source, result = lanes.on_host(shape), lanes.on_host(one)
        given, made = lanes.on_device(shape), lanes.on_device(one)
        slot = Slot(source, given, made, result, [lanes.compute.give(lambda: None)])
        self.slots += 1
        return slot

    def _begin(self, slot: Slot[M]) -> M:
        lanes = self._lanes

        def there() -> None:
            slot.given.copy_(slot.source, non_blocking=True)

        def compute() -> None:
            result = self._compute(slot.given)
            if result.shape != slot.made.shape:
                made, given = tuple(result.shape), tuple(slot.given.shape)
                raise EngineError(f"the generator made {made} of {given}: one result per slice")
            slot.made.copy_(result)

        def back() -> None:
            slot.result.copy_(slot.made, non_blocking=True)

        after, slot.after = slot.after, []
        sent = lanes.there.give(there, after)
        computed = lanes.compute.give(compute, [sent])
        return lanes.back.give(back, [computed])

    def take_back(self, slot: Slot[M]) -> None:
        """Nothing of this slot is under way any more."""
        self._free.append(slot)
        if len(self._free) > KEPT_SLOTS:
            self._free.pop(0)
            self.slots -= 1

    def lose(self) -> None:
        """A slot whose work failed is not used again."""
        self.slots -= 1

    def clear(self) -> None:
        """Give back the memory of free slots, when all lanes have done their work."""
        self._lanes.settle()
        self.slots -= len(self._free)
        self._free.clear()


class Batch(Generic[M]):
    """A batch on its way; see `Pending`."""

    def __init__(self, conveyor: Conveyor[M], slot: Slot[M], count: int, done: M) -> None:
        self._conveyor, self._slot, self._count, self._done = conveyor, slot, count, done

    def result(self) -> Voxels:
        """(batch, 1, rows, columns), float32, in memory of its own."""
        try:
            self._done.wait()
        except BaseException:  # raised again: whatever it is, the slot is lost
            self._conveyor.lose()
            raise
        result: Voxels = self._slot.result.numpy()[: self._count].copy()
        self._conveyor.take_back(self._slot)
        return result

    def give_up(self) -> None:
        """Wait for it; what it raises, the next batch on this device raises again."""
        try:
            self._done.wait()
        except (RuntimeError, DeviceLost):
            self._conveyor.lose()
        else:
            self._conveyor.take_back(self._slot)
