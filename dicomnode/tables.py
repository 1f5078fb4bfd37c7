"""The tables of the journal, and how the database is opened.

Times are seconds since the epoch. SQLite in WAL mode with synchronous=FULL: a transaction that
has returned survives a power cut.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    select,
)
from sqlalchemy.exc import SQLAlchemyError

from dicomnode.errors import JournalError

SCHEMA_VERSION = 1

metadata = MetaData()

meta = Table("meta", metadata, Column("key", String, primary_key=True), Column("value", String))

associations = Table(
    "associations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("calling_ae", String, nullable=False),
    Column("called_ae", String, nullable=False),
    Column("host", String, nullable=False),
    Column("started", Float, nullable=False),
    Column("ended", Float),
    Column("how", String),  # released | aborted | lost (this node stopped under it)
)

instances = Table(
    "instances",
    metadata,
    Column("sop_instance_uid", String, primary_key=True),
    Column("series_uid", String, nullable=False, index=True),
    Column("sop_class_uid", String, nullable=False),
    Column("transfer_syntax_uid", String, nullable=False),
    Column("sha256", String, nullable=False),  # of the data set as received
    Column("size", Integer, nullable=False),
    Column("received", Float, nullable=False),
    Column("association", Integer, index=True),
    Column("plane", String),  # position, orientation: JSON; null: no image plane
    Column("expected", String),  # what it says of the size of its series: JSON
    Column("purged", Boolean, nullable=False, default=False),
)

conflicts = Table(
    "conflicts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sop_instance_uid", String, nullable=False),
    Column("series_uid", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("received", Float, nullable=False),
)

series = Table(
    "series",
    metadata,
    Column("series_uid", String, primary_key=True),
    Column("study_uid", String, nullable=False),
    Column("modality", String, nullable=False),
    Column("calling_ae", String, nullable=False),
    Column("called_ae", String, nullable=False),
    Column("first_received", Float, nullable=False),
    Column("last_received", Float, nullable=False),
    Column("open", Boolean, nullable=False, index=True),
    Column("generation", Integer, nullable=False, default=1),
    Column("interrupted", Boolean, nullable=False, default=False),
    Column("outcome", String, nullable=False, default=""),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("series_uid", String, ForeignKey("series.series_uid"), nullable=False, index=True),
    Column("generation", Integer, nullable=False),
    Column("route", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("code", String, nullable=False, default=""),
    Column("detail", String, nullable=False, default=""),
    Column("priority", Integer, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("crashes", Integer, nullable=False, default=0),  # workers that crashed over it
    Column("created", Float, nullable=False),  # also the time written into the derived series
    Column("updated", Float, nullable=False),
    Column("derived_uid", String),
    Column("findings", String),  # what QA measured, JSON
)

outputs = Table(
    "outputs",
    metadata,
    Column("job", Integer, ForeignKey("jobs.id"), primary_key=True),
    Column("sop_instance_uid", String, primary_key=True),
    Column("sop_class_uid", String, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job", Integer, ForeignKey("jobs.id"), nullable=False, index=True),
    Column("destination", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("attempts", Integer, nullable=False, default=0),
    Column("created", Float, nullable=False),
    Column("due", Float, nullable=False),
    Column("detail", String, nullable=False, default=""),
)

acceptances = Table(
    "acceptances",
    metadata,
    Column("delivery", Integer, ForeignKey("deliveries.id"), primary_key=True),
    Column("sop_instance_uid", String, primary_key=True),
    Column("status", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("series_uid", String, nullable=False),
    Column("job", Integer),
    Column("text", String, nullable=False),
    Index("events_by_series", "series_uid", "id"),
)


_Result = TypeVar("_Result")


class _Change:
    """A change waiting for its commit."""

    def __init__(self, change: Callable[[Connection], Any]) -> None:
        self._change = change
        self.result: Any = None
        self.error: Exception | None = None
        self.done = False

    def run(self, db: Connection) -> None:
        try:
            with db.begin_nested():
                self.result = self._change(db)
        except Exception as error:  # noqa: BLE001 (raised again, on the thread it belongs to)
            self.error = error


commitments = Table(
    "commitments",
    metadata,
    Column("transaction_uid", String, primary_key=True),
    Column("peer", String, nullable=False),  # its name in the configuration
    Column("state", String, nullable=False, index=True),
    Column("asked", Float, nullable=False),
    Column("due", Float, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("updated", Float, nullable=False),
    Column("detail", String, nullable=False, default=""),
)

commitment_items = Table(
    "commitment_items",
    metadata,
    Column("transaction_uid", String, ForeignKey("commitments.transaction_uid"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("sop_class_uid", String, nullable=False),
    Column("sop_instance_uid", String, nullable=False, index=True),
    Column("failure", Integer),  # FailureReason; 0: committed; null: not checked yet
)

performed_steps = Table(
    "performed_steps",
    metadata,
    Column("sop_instance_uid", String, primary_key=True),
    Column("calling_ae", String, nullable=False),
    Column("status", String, nullable=False),  # IN PROGRESS | COMPLETED | DISCONTINUED
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
)

performed_series = Table(
    "performed_series",
    metadata,
    Column("step", String, ForeignKey("performed_steps.sop_instance_uid"), primary_key=True),
    Column("series_uid", String, primary_key=True, index=True),
    Column("instances", String, nullable=False),  # SOP Instance UIDs: JSON
)


class Database:
    """One journal file; safe to share between threads."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self._engine = _open(path, create=create)
        self._lock = threading.Lock()
        self._queue: list[_Change] = []
        self._queue_lock = threading.Lock()

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: all of it or nothing, durable when the block ends."""
        with self._lock, self._engine.begin() as db:
            yield db

    def commit(self, change: Callable[[Connection], _Result]) -> _Result:
        """Run `change` in a transaction it may share with others, durable when this returns.

        Group commit: while one thread waits for the disk, others queue their changes, and the next
        one to hold the lock commits them all at once. Each has a savepoint of its own: one that
        raises is undone alone.
        """
        mine = _Change(change)
        with self._queue_lock:
            self._queue.append(mine)
        with self._lock:
            if not mine.done:
                self._commit_queue()
        if mine.error is not None:
            raise mine.error
        result: _Result = mine.result
        return result

    def _commit_queue(self) -> None:
        with self._queue_lock:
            batch, self._queue = self._queue, []
        failure: Exception = JournalError("the commit was broken off; nothing was recorded")
        committed = False
        try:
            with self._engine.begin() as db:
                for change in batch:
                    change.run(db)
            committed = True
        except SQLAlchemyError as error:
            failure = error
        finally:  # whatever ended it: nobody may take a change for durable that is not
            for change in batch:
                change.error = change.error or (None if committed else failure)
                change.done = True

    def read(self, query: Any) -> list[Any]:
        """The rows of one query, of the last committed state."""
        with self._engine.connect() as connection:
            db = connection.execution_options(isolation_level="AUTOCOMMIT")
            return list(db.execute(query).all())


def note(db: Connection, series_uid: str, now: float, text: str, job: int | None = None) -> None:
    """Add a line to the timeline of a series; no patient attribute may be in it."""
    db.execute(events.insert().values(at=now, series_uid=series_uid, job=job, text=text))


def _open(path: Path, *, create: bool = True) -> Engine:
    """The engine over a journal file, its tables made if they are new.

    Raises:
        JournalError: there is no journal (and `create` is false), it cannot be opened, or its
            schema is another one.
    """
    if not create and not path.is_file():
        raise JournalError(f"no journal at {path}; has `dicomnode serve` run with this config?")
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        metadata.create_all(engine)
    except SQLAlchemyError as error:
        reason = getattr(error, "orig", error)
        raise JournalError(f"{path}: cannot open the journal: {reason}") from error
    with engine.begin() as db:
        found = db.execute(select(meta.c.value).where(meta.c.key == "schema")).scalar()
        if found is None:
            db.execute(meta.insert().values(key="schema", value=str(SCHEMA_VERSION)))
        elif found != str(SCHEMA_VERSION):
            raise JournalError(f"{path}: schema {found}, this version reads {SCHEMA_VERSION}")
    return engine
