"""Group commit: changes of several threads in one transaction, so that they share its fsync."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from dicomnode.errors import JournalBusy, JournalError

_Result = TypeVar("_Result")


class _Change:
    """A change waiting for its commit."""

    def __init__(self, change: Callable[[Connection], Any], unsynced: bool) -> None:
        self._change, self.unsynced = change, unsynced
        self.result: Any = None
        self.error: Exception | None = None
        self.done = False

    def run(self, db: Connection, *, alone: bool) -> None:
        """`alone`: nobody shares the transaction, which an error then undoes as a whole."""
        try:
            with nullcontext() if alone else _savepoint(db):
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
        self._db: Connection | None = None  # kept: taking one from the pool costs more than it does
        self._syncs = True  # as connections come from the pool

    def close(self) -> None:
        """Give the connection back; the next commit takes another."""
        db, self._db = self._db, None
        if db is not None:
            if not self._syncs:  # nobody else is to have it so
                db.invalidate()
            db.close()
        self._syncs = True

    def commit(self, change: Callable[[Connection], _Result], *, unsynced: bool = False) -> _Result:
        """Run `change`, durable when this returns.

        `unsynced`: everybody sees it then, but after a power failure it may be gone, unless
        a change that was not `unsynced` was committed after it.

        Raises:
            JournalBusy: nothing was changed, and nothing will be.
        """
        mine = _Change(change, unsynced)
        with self._lock:
            self._queue.append(mine)
        try:
            with self._turn():
                if not mine.done:
                    self._commit_queue()
        except JournalBusy:
            if self._withdraw(mine):
                raise
            while not mine.done:  # whoever has the turn is committing it
                with suppress(JournalBusy), self._turn():
                    pass
        if isinstance(mine.error, OperationalError):
            raise busy(mine.error) from mine.error
        if mine.error is not None:
            raise mine.error
        result: _Result = mine.result
        return result

    def _withdraw(self, change: _Change) -> bool:
        """Take a change back; False if somebody has taken it to commit it."""
        with self._lock:
            waits = change in self._queue
            if waits:
                self._queue.remove(change)
        return waits

    def _commit_queue(self) -> None:
        with self._lock:
            batch, self._queue = self._queue, []
        failure: Exception = JournalError("the commit was broken off; nothing was recorded")
        committed = False
        try:
            self._db = self._db or self._engine.connect()
            self._sync(self._db, not all(change.unsynced for change in batch))
            with _transaction(self._db) as db:
                for change in batch:
                    change.run(db, alone=len(batch) == 1)
                    _check_open(db)
            committed = True
        except (SQLAlchemyError, JournalError) as error:
            failure = error
            self.close()
        finally:  # whatever ended it: nobody may take a change for durable that is not
            for change in batch:
                change.error = change.error or (None if committed else failure)
                change.done = True

    def _sync(self, db: Connection, syncs: bool) -> None:
        """Are the next commits of `db` durable? SQLite syncs its log as a whole, or not at all.

        Raises:
            JournalBusy: it cannot be changed.
        """
        if syncs is not self._syncs:
            driver: Any = db.connection.driver_connection
            try:
                driver.execute(f"PRAGMA synchronous={'FULL' if syncs else 'NORMAL'}")
            except sqlite3.Error as error:
                raise JournalBusy(f"the journal cannot be changed now: {error}") from error
            self._syncs = syncs


@contextmanager
def _transaction(db: Connection) -> Iterator[Connection]:
    """All of it or nothing; SQLAlchemy takes longer to begin and to commit than SQLite.

    Raises:
        JournalBusy: nothing was changed.
    """
    driver: Any = db.connection.driver_connection
    try:
        driver.execute("BEGIN IMMEDIATE")
        yield db
        driver.execute("COMMIT")
    except sqlite3.Error as error:
        raise JournalBusy(f"the journal cannot be changed now: {error}") from error
    finally:
        if driver.in_transaction:
            with suppress(sqlite3.Error):  # then the connection is closed, to the same end
                driver.execute("ROLLBACK")
        db.rollback()  # for SQLAlchemy, which may have been used within: nothing is left to do


@contextmanager
def _savepoint(db: Connection) -> Iterator[None]:
    """What is done within is undone if it fails, and nothing else."""
    driver: Any = db.connection.driver_connection
    driver.execute("SAVEPOINT change")
    try:
        yield
    except Exception:  # raised again: whatever it is, its change is undone
        if driver.in_transaction:  # else SQLite gave up all of it
            driver.execute("ROLLBACK TO change")
            driver.execute("RELEASE change")
        raise
    driver.execute("RELEASE change")


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
