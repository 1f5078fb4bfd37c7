"""An older journal brought up to date: literal steps, one transaction each, a backup before.

`tables` describes the journal as it is now; the steps lead there from every version that a release
had. A step is plain SQL, so that it still means the same when `tables` has moved on.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from dicomnode.errors import JournalError
from dicomnode.syncing import sync_file, sync_folder

log = logging.getLogger(__name__)

SCHEMA_VERSION = 3
"""The version `tables` describes."""

STEPS: dict[int, tuple[str, ...]] = {
    # 1 -> 2: crashes are counted apart from attempts; each derived instance knows its series;
    # what retention deletes is written down first; a job may withdraw what another one made
    1: (
        "ALTER TABLE jobs ADD COLUMN crashes INTEGER DEFAULT '0' NOT NULL",
        "ALTER TABLE jobs ADD COLUMN purged BOOLEAN DEFAULT '0' NOT NULL",
        "ALTER TABLE jobs ADD COLUMN retracts INTEGER",
        "ALTER TABLE jobs ADD COLUMN stacks VARCHAR",
        "ALTER TABLE deliveries ADD COLUMN begun BOOLEAN DEFAULT '0' NOT NULL",
        "UPDATE deliveries SET begun = 1 WHERE id IN (SELECT delivery FROM acceptances)",
        "CREATE TABLE outputs_2 ("
        " job INTEGER NOT NULL,"
        " sop_instance_uid VARCHAR NOT NULL,"
        " sop_class_uid VARCHAR NOT NULL,"
        " series_uid VARCHAR NOT NULL,"
        " position INTEGER DEFAULT '0' NOT NULL,"
        " PRIMARY KEY (job, sop_instance_uid),"
        " FOREIGN KEY(job) REFERENCES jobs (id))",
        "INSERT INTO outputs_2 (job, sop_instance_uid, sop_class_uid, series_uid, position)"
        " SELECT o.job, o.sop_instance_uid, o.sop_class_uid, coalesce(j.derived_uid, ''), o.rowid"
        " FROM outputs AS o JOIN jobs AS j ON j.id = o.job",
        "DROP TABLE outputs",
        "ALTER TABLE outputs_2 RENAME TO outputs",
        "CREATE INDEX ix_outputs_series_uid ON outputs (series_uid)",
        "CREATE INDEX instances_stored ON instances (series_uid) WHERE NOT purged",
        "CREATE TABLE removals ("
        " kind VARCHAR NOT NULL,"
        " series_uid VARCHAR NOT NULL,"
        " PRIMARY KEY (kind, series_uid))",
        # what a crash may have left of earlier purges
        "INSERT INTO removals (kind, series_uid)"
        " SELECT DISTINCT 'received', series_uid FROM instances WHERE purged",
    ),
    # 2 -> 3: destinations may be asked to commit what was delivered
    2: (
        "CREATE TABLE promises ("
        " delivery INTEGER NOT NULL,"
        " state VARCHAR NOT NULL,"
        " since FLOAT NOT NULL,"
        " due FLOAT NOT NULL,"
        " attempts INTEGER NOT NULL,"
        " round INTEGER NOT NULL,"
        " resent INTEGER NOT NULL,"
        " detail VARCHAR NOT NULL,"
        " PRIMARY KEY (delivery),"
        " FOREIGN KEY(delivery) REFERENCES deliveries (id))",
        "CREATE INDEX ix_promises_state ON promises (state)",
        "CREATE TABLE promise_requests ("
        " transaction_uid VARCHAR NOT NULL,"
        " delivery INTEGER NOT NULL,"
        " round INTEGER NOT NULL,"
        " PRIMARY KEY (transaction_uid),"
        " FOREIGN KEY(delivery) REFERENCES promises (delivery))",
        "CREATE INDEX ix_promise_requests_delivery ON promise_requests (delivery)",
    ),
}
"""By the version it starts from: the statements of the step to the next version."""

_WAIT_SECONDS = 30.0


def version_of(path: Path) -> int | None:
    """The schema version of a journal; None: nothing was written to it yet.

    Raises:
        JournalError: it is no journal, or cannot be opened.
    """
    with closing(_connect(path)) as db:
        return _version(db, path)


def check_version(path: Path, found: int | None) -> None:
    """Refuse any version but ours.

    Raises:
        JournalError: the journal is older, or newer, or empty; the message says what to do.
    """
    if found is None:
        raise JournalError(f"{path}: the journal is empty; has `dicomnode serve` run with it?")
    what = f"{path}: the journal has schema {found}, this version reads {SCHEMA_VERSION}"
    if found < SCHEMA_VERSION:
        raise JournalError(
            f"{what}; the next `dicomnode serve` of this version brings it up to date"
        )
    if found > SCHEMA_VERSION:
        raise JournalError(f"{what}; run the newer dicomnode, or restore a backup of that time")


def migrate(path: Path) -> None:
    """Bring an older journal up to date; what it was stays beside it as ``journal.db.v1.bak``.

    A crash leaves the version before the step that was under way.

    Raises:
        JournalError: a step failed, or the version is newer than ours; nothing is changed.
    """
    with closing(_connect(path)) as db:
        saved = False
        while True:
            with _transaction(db, path):
                version = _version(db, path)
                if version is None or version >= SCHEMA_VERSION:
                    return
                if not saved:  # under the write lock: exactly what the step starts from
                    _save(path, path.with_name(f"{path.name}.v{version}.bak"))
                    saved = True
                _step(db, version)
            log.info("journal brought from schema %d to %d", version, version + 1)


def copy_journal(path: Path, copy: Path) -> None:
    """A consistent copy of a journal that may be in use, durable when this returns.

    Raises:
        JournalError: it cannot be read, or the disk refuses.
    """
    try:
        with closing(_connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
            # one file: a journal in WAL mode cannot be read from a read-only medium
            target.execute("PRAGMA journal_mode=DELETE").fetchone()
        sync_file(copy)
        sync_folder(copy.parent)
    except (sqlite3.Error, OSError) as error:
        raise JournalError(f"{copy}: the journal could not be copied: {error}") from error


def _save(path: Path, backup: Path) -> None:
    """The copy gets its name when it is whole."""
    part = backup.with_name(f"{backup.name}.part")
    part.unlink(missing_ok=True)
    copy_journal(path, part)
    part.replace(backup)
    sync_folder(backup.parent)


def _step(db: sqlite3.Connection, version: int) -> None:
    for statement in STEPS[version]:
        db.execute(statement)
    broken = db.execute("PRAGMA foreign_key_check").fetchall()
    if broken:
        raise sqlite3.IntegrityError(f"{len(broken)} rows refer to rows that are not there")
    db.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (str(version + 1),))


def _version(db: sqlite3.Connection, path: Path) -> int | None:
    try:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        if "jobs" not in tables:
            return None
        row = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
    except sqlite3.Error as error:
        raise JournalError(f"{path}: cannot open the journal: {error}") from error
    if row is None:  # only version 1 wrote its number in a transaction of its own
        return 1
    if not str(row[0]).isdecimal():
        raise JournalError(f"{path}: the journal does not say which schema it has")
    return int(row[0])


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """All of it or nothing, and nobody else writes meanwhile."""
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except sqlite3.Error as error:
        text = f"{path}: the journal could not be brought up to date, nothing is changed: {error}"
        raise JournalError(text) from error
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _connect(path: Path) -> sqlite3.Connection:
    """A connection on which we say BEGIN ourselves; durable like the node's own.

    Foreign keys are left off: a step may replace a table that others refer to.
    """
    try:
        db = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None)
        db.execute("PRAGMA synchronous=FULL")
    except sqlite3.Error as error:
        raise JournalError(f"{path}: cannot open the journal: {error}") from error
    return db
