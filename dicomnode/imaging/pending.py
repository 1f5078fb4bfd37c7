"""Work that was begun and whose result is waited for later."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Made = TypeVar("Made")
Given = TypeVar("Given")
Result = TypeVar("Result", covariant=True)


class Pending(Protocol[Result]):
    """Work that was begun; either of its methods is called, and once."""

    def result(self) -> Result:
        """Wait for it. Raises what the work raised."""

    def give_up(self) -> None:
        """Nobody wants the result: wait until nothing is written to its memory any more."""


@dataclass(frozen=True, slots=True)
class Ready(Generic[Made]):
    """Work that was done at once."""

    made: Made

    def result(self) -> Made:
        return self.made

    def give_up(self) -> None:
        """There is nothing to wait for."""


@dataclass(frozen=True, slots=True)
class Then(Generic[Given, Made]):
    """What `change` makes of a result, when it is asked for."""

    pending: Pending[Given]
    change: Callable[[Given], Made]

    def result(self) -> Made:
        return self.change(self.pending.result())

    def give_up(self) -> None:
        self.pending.give_up()


def in_order(begun: Iterable[Pending[Made]], ahead: int) -> Iterator[Made]:
    """The results in the order in which they were begun, at most `ahead` + 1 under way at a time.

    However this ends, by an error of `begun` or of a result, or by a caller who wants no more: what
    was begun is given up, so that afterwards nothing is written anywhere.

    Args:
        ahead: how many may be begun beyond the one that is waited for; 0: one after the other.
    """
    waiting: deque[Pending[Made]] = deque()
    try:
        for pending in begun:
            waiting.append(pending)
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for pending in waiting:
            pending.give_up()
