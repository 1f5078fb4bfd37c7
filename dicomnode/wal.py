"""The journal as a file of SQLite: its write-ahead log, and whether it can be changed."""

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from sqlalchemy import Engine

from dicomnode.errors import JournalBusy
from dicomnode.syncing import sync_file


def lengthen(engine: Engine) -> None:
    """Give the write-ahead log its usual length (1,000 pages, then SQLite starts it over) at once.

    A commit that makes it longer also changes its inode, which takes the disk twice as long. More
    than SQLite's page cache holds goes to the log before the commit; taken back, it stays room.
    """
    connection = engine.raw_connection()
    try:
        db = connection.cursor()
        for statement in (
            "BEGIN IMMEDIATE",
            "CREATE TABLE room (bytes BLOB)",
            "INSERT INTO room VALUES (zeroblob(8000000))",
            "ROLLBACK",
        ):
            db.execute(statement)
    except sqlite3.Error:
        connection.rollback()  # too little room now: it will say so where it matters
    finally:
        connection.close()


def rewrite(engine: Engine) -> None:
    """Write what the write-ahead log holds to the database itself, durably.

    Raises:
        JournalBusy: somebody reads it, or the disk refuses.
    """
    connection = engine.raw_connection()
    try:
        statement = "PRAGMA wal_checkpoint(TRUNCATE)"
        waits = connection.cursor().execute(statement).fetchone()[0]
    except sqlite3.Error as error:
        raise JournalBusy(f"the journal cannot be changed now: {error}") from error
    finally:
        connection.close()
    if waits:
        raise JournalBusy("the journal cannot be written anew: another program reads it")


def sync_log(journal: Path) -> None:
    """Make durable what was committed without a sync.

    Raises:
        OSError: the disk refuses.
    """
    with suppress(FileNotFoundError):  # SQLite has moved it all to the journal
        sync_file(Path(f"{os.path.realpath(journal)}-wal"))


def why_locked(engine: Engine, seconds: float) -> str:
    """Why no change can be made, in words; empty: one could. Waits for `seconds` at most."""
    try:
        with closing(engine.raw_connection()) as connection:
            db = connection.cursor()
            usual = db.execute("PRAGMA busy_timeout").fetchone()[0]
            db.execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")
            try:
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
            finally:
                db.execute(f"PRAGMA busy_timeout = {usual}")
    except sqlite3.Error as error:
        return f"the journal cannot be changed now: {error}"
    return ""
