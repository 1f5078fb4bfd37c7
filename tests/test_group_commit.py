"""Changes that share a transaction: each is whole or not there, whatever the others do."""

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, select

from dicomnode import tables
from dicomnode.errors import DuplicateInstance, JournalBusy, JournalError
from dicomnode.statements import Quick
from dicomnode.tables import Database, events, note
from tests.peers import wait_for

_NOTE = Quick.of(events.insert(), ["at", "series_uid", "text"])


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "journal.db")
    yield database
    database.close()


def _texts(database: Database) -> set[str]:
    """What a reader of the file sees."""
    return {text for (text,) in database.read(select(events.c.text))}


@pytest.mark.parametrize("quick", [True, False], ids=["past SQLAlchemy", "by SQLAlchemy"])
def test_of_changes_that_wait_together_only_those_that_fail_are_undone(
    database: Database, quick: bool
) -> None:
    held, begun = threading.Event(), threading.Barrier(9)

    def first(db: Connection) -> None:
        note(db, "1", 1.0, "first")
        begun.wait(60)  # the others are about to queue behind us
        held.wait(0.3)

    def other(number: int) -> None:
        def change(db: Connection) -> None:
            text = f"change {number}"
            if quick:
                _NOTE.say(db, {"at": 1.0, "series_uid": "1", "text": text})
            else:
                note(db, "1", 1.0, text)
            if number % 3 == 0:
                raise JournalError(text)

        begun.wait(60)
        database.commit(change)

    with ThreadPoolExecutor(9) as pool:
        done = pool.submit(database.commit, first)
        others = [pool.submit(other, number) for number in range(8)]
        done.result()
        failed = [str(one.exception()) for one in others if one.exception()]
    assert sorted(failed) == [f"change {n}" for n in (0, 3, 6)]
    assert _texts(database) == {"first"} | {f"change {n}" for n in (1, 2, 4, 5, 7)}


def test_a_journal_that_was_locked_takes_the_next_change(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BUSY_SECONDS", 0.2)
    impatient = Database(tmp_path / "journal.db")
    impatient.commit(lambda db: note(db, "1", 1.0, "before"))
    other = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(JournalBusy, match="cannot be changed now: database is locked"):
        impatient.commit(lambda db: note(db, "1", 1.0, "under the lock"))
    other.rollback()
    other.close()
    impatient.commit(lambda db: note(db, "1", 1.0, "after"))
    impatient.close()
    assert _texts(database) == {"before", "after"}


def test_a_change_is_seen_by_others_only_when_it_is_whole(database: Database) -> None:
    def change(db: Connection) -> set[str]:
        note(db, "1", 1.0, "half")
        return _texts(database)

    assert database.commit(change) == set()
    assert _texts(database) == {"half"}


def test_a_transaction_that_sqlite_gives_up_counts_for_nothing(database: Database) -> None:
    """As a full disk may make it: within the change of one, under all that share it."""

    def given_up(db: Connection) -> None:
        note(db, "1", 1.0, "lost")
        driver: sqlite3.Connection = db.connection.driver_connection  # type: ignore[assignment]
        driver.execute("ROLLBACK")

    with pytest.raises(JournalBusy, match="given up"):
        database.commit(given_up)
    database.commit(lambda db: note(db, "1", 1.0, "after"))
    assert _texts(database) == {"after"}


def test_a_change_that_is_refused_alone_leaves_nothing_open(database: Database) -> None:
    def refused(db: Connection) -> None:
        _NOTE.say(db, {"at": 1.0, "series_uid": "1", "text": "refused"})
        raise DuplicateInstance("other bytes")

    with pytest.raises(DuplicateInstance):
        database.commit(refused)
    database.commit(lambda db: note(db, "1", 1.0, "after"))
    assert _texts(database) == {"after"}


def test_a_change_that_had_no_turn_in_time_is_not_made_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BUSY_SECONDS", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def slow(db: Connection) -> None:
        entered.set()
        leave.wait(20)
        note(db, "1", 1.0, "slow")

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(database.commit, slow)
        assert entered.wait(20)
        with pytest.raises(JournalBusy, match="others wait for it already"):
            database.commit(lambda db: note(db, "1", 1.0, "too late"))
        leave.set()
        first.result()
    database.commit(lambda db: note(db, "1", 1.0, "next"))
    assert _texts(database) == {"slow", "next"}


def test_a_change_that_is_being_made_when_its_time_is_up_is_waited_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may be told that it was not made."""
    monkeypatch.setattr(tables, "BUSY_SECONDS", 2.0)
    holding, entered, leave = threading.Event(), threading.Event(), threading.Event()

    def first(db: Connection) -> None:
        holding.set()
        wait_for(lambda: len(database._group._queue) == 2, "both others to wait", 20, every=0.01)

    def slow(db: Connection) -> None:
        entered.set()
        leave.wait(20)
        note(db, "1", 1.0, "slow")

    with ThreadPoolExecutor(3) as pool:
        changes = [pool.submit(database.commit, first)]
        assert holding.wait(20)
        changes += [pool.submit(database.commit, slow)]
        wait_for(lambda: len(database._group._queue) == 1, "the slow one to wait", 20, every=0.01)
        changes += [pool.submit(database.commit, lambda db: note(db, "1", 1.0, "with it"))]
        assert entered.wait(20)
        threading.Event().wait(3.0)  # longer than it would wait for its turn
        leave.set()
        for change in changes:
            change.result()
    assert _texts(database) == {"slow", "with it"}
