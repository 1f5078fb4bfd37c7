"""Rows that may wait: what they say is durable in the redo log already, so many share a commit.

A commit for each instance takes longer than to receive a small one. Rows wait for a few
milliseconds, and only while the journal was just seen to take changes: where it is locked, or the
disk is full, the sender of the next instance is to hear so.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from dicomnode.errors import JournalBusy, JournalError

_Row = TypeVar("_Row")

_GATHER_SECONDS = 0.01
"""Rows that come meanwhile share the commit."""
_PROOF_SECONDS = 0.25
"""Since the last commit: longer ago, nobody knows whether the next can be made."""
_MOST = 2_000
"""Rows that wait; the next is not let in."""


class WaitingRows(Generic[_Row]):
    """What is to be written; safe to share between threads."""

    def __init__(self, write: Callable[[Sequence[_Row]], None]) -> None:
        """`write`: all of them in one transaction, or nothing and a JournalError; called by one
        thread at a time."""
        self._write = write
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._rows: dict[str, tuple[str, _Row]] = {}
        self._proved = -_PROOF_SECONDS
        self._wake = threading.Event()
        self._trouble, self._failures = "", 0

    @property
    def trouble(self) -> str:
        """Why rows wait longer than they should, in words; empty: they do not."""
        return self._trouble

    def prove(self) -> None:
        """A change was just committed."""
        self._proved = time.monotonic()

    def add(self, name: str, group: str, row: _Row) -> bool:
        """Let a row wait; False if it must not: one of its `name` waits, or nobody knows how long.

        `group`: what `has_of` asks for.
        """
        with self._lock:
            recently = time.monotonic() - self._proved < _PROOF_SECONDS
            if not recently or self._trouble or name in self._rows or len(self._rows) >= _MOST:
                return False
            self._rows[name] = group, row
        self._wake.set()
        return True

    def has(self, name: str) -> bool:
        return name in self._rows

    def has_of(self, group: str) -> bool:
        with self._lock:
            return any(one == group for one, _ in self._rows.values())

    def flush(self) -> None:
        """Write what waits when this is called.

        Raises:
            JournalError: nothing was written, and all wait on.
        """
        if not self._rows:
            return
        failures = self._failures
        with self._turn:
            if self._trouble and self._failures != failures:
                # of who was before us: we would wait as long again
                raise JournalBusy(self._trouble)
            with self._lock:
                batch = dict(self._rows)
            if not batch:
                return
            try:
                self._write([row for _, row in batch.values()])
            except JournalError as error:
                self._trouble = f"instances that were received wait for the journal: {error}"
                self._failures += 1
                self._wake.set()
                raise
            with self._lock:
                for name in batch:
                    del self._rows[name]
                self._trouble = ""
            self.prove()

    def step(self) -> None:
        """Wait until there are rows, and a little for others; write them."""
        self._wake.wait()
        self._wake.clear()
        time.sleep(_GATHER_SECONDS)
        self.flush()

    def stop(self) -> None:
        """`step` ends."""
        self._wake.set()
