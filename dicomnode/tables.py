"""The tables of the journal, and how the database is opened.

Times are seconds since the epoch. SQLite in WAL mode with synchronous=FULL: a transaction that
has returned survives a power cut, unless it was committed `unsynced`.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
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
    or_,
)
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from dicomnode.errors import JournalBusy, JournalError
from dicomnode.group_commit import GroupCommit, busy
from dicomnode.migrations import SCHEMA_VERSION, check_version, migrate, version_of
from dicomnode.statements import Quick
from dicomnode.wal import lengthen, rewrite, sync_log, why_locked

BUSY_SECONDS = 5.0
"""How long a change waits for its turn, and then for another program that has locked the journal:
peers give up waiting for a response after about 30 s."""

LONGEST_WAIT_SECONDS = 3600.0
"""Nothing is put off for longer at a time."""

_Result = TypeVar("_Result")

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
Index("instances_stored", instances.c.series_uid, sqlite_where=~instances.c.purged)

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
    Column("crashes", Integer, nullable=False, server_default="0"),  # workers that crashed over it
    Column("created", Float, nullable=False),  # also the time written into the derived series
    Column("updated", Float, nullable=False),
    Column("derived_uid", String),
    Column("findings", String),  # what QA measured, JSON
    Column("purged", Boolean, nullable=False, server_default="0"),  # its derived files are gone
    Column("retracts", Integer),  # the job whose result it withdraws; null: it translates
    Column("stacks", String),  # what became of each stack of the series, JSON
)

outputs = Table(
    "outputs",
    metadata,
    Column("job", Integer, ForeignKey("jobs.id"), primary_key=True),
    Column("sop_instance_uid", String, primary_key=True),
    Column("sop_class_uid", String, nullable=False),
    Column("series_uid", String, nullable=False, index=True),  # the derived SeriesInstanceUID
    Column("position", Integer, nullable=False, server_default="0"),  # in the order of sending
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
    Column("begun", Boolean, nullable=False, server_default="0"),  # some of it may be there
)

acceptances = Table(
    "acceptances",
    metadata,
    Column("delivery", Integer, ForeignKey("deliveries.id"), primary_key=True),
    Column("sop_instance_uid", String, primary_key=True),
    Column("status", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

removals = Table(
    "removals",  # folders whose files are to be deleted; their rows say so already
    metadata,
    Column("kind", String, primary_key=True),  # received | results
    Column("series_uid", String, primary_key=True),
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

promises = Table(
    "promises",  # storage commitment of complete deliveries, asked of their destinations
    metadata,
    Column("delivery", Integer, ForeignKey("deliveries.id"), primary_key=True),
    Column("state", String, nullable=False, index=True),
    Column("since", Float, nullable=False),
    Column("due", Float, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("round", Integer, nullable=False, default=1),  # reports on earlier ones are outdated
    Column("resent", Integer, nullable=False, default=0),  # how often something was sent again
    Column("detail", String, nullable=False, default=""),
)

promise_requests = Table(
    "promise_requests",  # whose reports we understand
    metadata,
    Column("transaction_uid", String, primary_key=True),
    Column("delivery", Integer, ForeignKey("promises.delivery"), nullable=False, index=True),
    Column("round", Integer, nullable=False),
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
        self._path, self._file = path, _file_at(path)
        self._lock = threading.Lock()
        self._group = GroupCommit(self._engine, self._turn)

    def close(self) -> None:
        self._group.close()
        self._engine.dispose()

    def trouble(self) -> str:
        """Why nothing can be recorded, in words; empty: it can.

        A file that was deleted takes every change all the same, and none of them is seen again.
        """
        if _file_at(self._path) == self._file:
            return ""
        return f"{self._path.name} was deleted or replaced while it was in use; put it back"

    def locked(self) -> str:
        """Why no change can be made now, in words; empty: one could. Waits for a second."""
        return why_locked(self._engine, 1.0)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: all of it or nothing, durable when the block ends.

        Raises:
            JournalBusy: nothing was changed.
        """
        try:
            with self._turn(), self._engine.begin() as db:
                yield db
        except OperationalError as error:
            raise busy(error) from error

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=BUSY_SECONDS):
            raise JournalBusy("the journal cannot be changed now: others wait for it already")
        try:
            if trouble := self.trouble():
                raise JournalBusy(trouble)
            yield
        finally:
            self._lock.release()

    def commit(self, change: Callable[[Connection], _Result], *, unsynced: bool = False) -> _Result:
        """Run `change` in a transaction it may share with others, durable when this returns.

        `unsynced`: see `GroupCommit.commit`.

        Raises:
            JournalBusy: nothing was changed, and nothing will be.
        """
        return self._group.commit(change, unsynced=unsynced)

    def sync(self) -> None:
        """Make durable what was committed `unsynced`; raises OSError if the disk refuses."""
        sync_log(self._path)

    def rewrite(self) -> None:
        """Write what SQLite's log holds to the journal itself, durably: the log may not last.

        Raises:
            JournalBusy: somebody reads it, or the disk refuses.
        """
        rewrite(self._engine)

    def look_up(self, query: Quick, values: Mapping[str, Any]) -> list[Any]:
        """As `read`, for what is asked for every instance (8 us, not 70). Raises JournalBusy."""
        try:
            connection = self._engine.raw_connection()
        except sqlite3.Error as error:  # past SQLAlchemy, nobody translates it
            raise JournalBusy(f"the journal cannot be opened: {error}") from error
        with closing(connection):
            return query.over(connection.driver_connection, values).fetchall()

    def read(self, query: Any, values: Mapping[str, Any] | None = None) -> list[Any]:
        """The rows of one query, of the last committed state; `values` of its parameters."""
        with self._engine.connect() as connection:
            db = connection.execution_options(reads_only=True)
            return list(db.execute(query, values).all())


def _file_at(path: Path) -> tuple[int, int] | None:
    """Which file this is now; None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def note(db: Connection, series_uid: str, now: float, text: str, job: int | None = None) -> None:
    """Add a line to the timeline of a series; no patient attribute may be in it."""
    db.execute(events.insert().values(at=now, series_uid=series_uid, job=job, text=text))


def is_due(column: Any, now: float) -> Any:
    """Is the moment in `column` here? One that lies too far ahead was set by a clock set back."""
    return or_(column <= now, column > now + LONGEST_WAIT_SECONDS)


def _open(path: Path, *, create: bool = True) -> Engine:
    """The engine over a journal file; with `create`, a new or older one is brought up to date.

    Raises:
        JournalError: there is no journal (and `create` is false), it cannot be opened, or its
            schema is another one.
    """
    if not create and not path.is_file():
        raise JournalError(f"no journal at {path}; has `dicomnode serve` run with this config?")
    if create:
        migrate(path)
    found = version_of(path)
    if found is not None or not create:
        check_version(path, found)
    # the connection used last first: what it has read of the file is still in its memory
    url, wait = f"sqlite:///{path}", {"timeout": BUSY_SECONDS}
    engine = create_engine(url, connect_args=wait, pool_use_lifo=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        if connection.get_execution_options().get("reads_only"):
            return  # it waits for nobody
        if not connection.connection.driver_connection.in_transaction:  # of GroupCommit
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    if found is None:
        _create(engine, path)
    if create:
        lengthen(engine)
    return engine


def _create(engine: Engine, path: Path) -> None:
    """All tables and the version, or nothing."""
    version = meta.insert().prefix_with("OR IGNORE")
    try:
        with engine.begin() as db:
            metadata.create_all(db)
            db.execute(version.values(key="schema", value=str(SCHEMA_VERSION)))
    except SQLAlchemyError as error:
        reason = getattr(error, "orig", error)
        raise JournalError(f"{path}: cannot open the journal: {reason}") from error
