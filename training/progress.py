"""How far a run is: a bar on a terminal, a plain line a minute elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Self, TextIO

BAR = 24
"""Characters of the bar."""
REDRAW_SECONDS, LINE_SECONDS = 0.2, 60.0
_CLEAR = "\r\x1b[2K"


class Progress:
    """Steps `first` to `last` of a run; `quiet` says nothing at all."""

    def __init__(
        self,
        first: int,
        last: int,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.first, self.last, self.quiet = first, last, quiet
        self.stream, self.clock = stream or sys.stdout, clock
        self.bar = self.stream.isatty()
        self.started = self.shown = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar and not self.quiet:
            self._write(_CLEAR)

    @property
    def seconds(self) -> float:
        """Since the first step of this command."""
        return self.clock() - self.started

    def step(self, done: int, losses: Mapping[str, float]) -> None:
        """Show that step number `done` is over, now and then."""
        wait = REDRAW_SECONDS if self.bar else LINE_SECONDS
        if self.quiet or self.clock() - self.shown < wait:
            return
        self.shown = self.clock()
        rate = (done - self.first) / max(self.seconds, 1e-9)
        left = _minutes((self.last - done) / rate) if rate > 0 else "?"
        words = f"{done}/{self.last}  {rate:.2f} steps/s  {left} left"
        if self.bar:
            full = BAR * done // max(1, self.last)
            named = "  ".join(f"{name} {value:.3g}" for name, value in losses.items())
            self._write(f"{_CLEAR}[{'=' * full}{' ' * (BAR - full)}] {words}  {named}"[:150])
        else:
            self._write(f"step {words}\n")

    def line(self, words: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self._write(f"{_CLEAR if self.bar else ''}{words}\n")

    def _write(self, words: str) -> None:
        self.stream.write(words)
        self.stream.flush()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
