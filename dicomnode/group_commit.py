"""Group commit: changes of several threads in one transaction, so that they share its fsync."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from dicomnode.errors import JournalBusy, JournalError

_Result = TypeVar("_Result")


class _Change:
    """A change waiting for its commit."""

    def __init__(self, change: Callable[[Connection], Any]) -> None:
        self._change = change
        self.result: Any = None
        self.error: Exception | None = None
        self.done = False

    def run(self, db: Connection, *, alone: bool) -> None:
        """`alone`: nobody shares the transaction, which an error then undoes as a whole."""
        try:
            with nullcontext() if alone else db.begin_nested():
                self.result = self._change(db)
        except Exception as error:
            self.error = error  # raised again, on the thread it belongs to
            if alone:
                raise


class GroupCommit:
    """The changes that wait for the next commit.

    While one thread waits for the disk, others queue their changes, and the next one to have its
    turn commits them all at once. Each has a savepoint of its own: one that raises is undone alone.
    """

    def __init__(self, engine: Engine, turn: Callable[[], AbstractContextManager[None]]) -> None:
        """`turn`: held by whoever changes the journal; may raise JournalBusy."""
        self._engine, self._turn = engine, turn
        self._queue: list[_Change] = []
        self._lock = threading.Lock()

    def commit(self, change: Callable[[Connection], _Result]) -> _Result:
        """Run `change`, durable when this returns.

        Raises:
            JournalBusy: nothing was changed, or, where it only had no turn in time, nobody knows.
        """
        mine = _Change(change)
        with self._lock:
            self._queue.append(mine)
        with self._turn():
            if not mine.done:
                self._commit_queue()
        if isinstance(mine.error, OperationalError):
            raise busy(mine.error) from mine.error
        if mine.error is not None:
            raise mine.error
        result: _Result = mine.result
        return result

    def _commit_queue(self) -> None:
        with self._lock:
            batch, self._queue = self._queue, []
        failure: Exception = JournalError("the commit was broken off; nothing was recorded")
        committed = False
        try:
            with self._engine.begin() as db:
                for change in batch:
                    change.run(db, alone=len(batch) == 1)
                    _check_open(db)
            committed = True
        except (SQLAlchemyError, JournalError) as error:
            failure = error
        finally:  # whatever ended it: nobody may take a change for durable that is not
            for change in batch:
                change.error = change.error or (None if committed else failure)
                change.done = True


def busy(error: OperationalError) -> JournalBusy:
    return JournalBusy(f"the journal cannot be changed now: {error.orig}")


def _check_open(db: Connection) -> None:
    """SQLite may give up a whole transaction by itself (full disk); its commit then says nothing.

    Raises:
        JournalBusy: it did.
    """
    connection: Any = db.connection.driver_connection
    if not connection.in_transaction:
        raise JournalBusy("the journal cannot be changed now: the transaction was given up")
