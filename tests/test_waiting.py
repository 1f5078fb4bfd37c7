"""Rows that wait for the journal: each is written once, none is lost, and who asks is told."""

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, select

from dicomnode import tables as t
from dicomnode import waiting
from dicomnode.errors import JournalBusy, JournalError
from dicomnode.journal import Arrival, Journal
from dicomnode.tables import Database
from dicomnode.waiting import WaitingRows
from tests.peers import wait_for


class Written:
    """Rows with somebody who writes them, or cannot."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.locked = False
        self.rows = WaitingRows(self._write)

    def _write(self, rows: Sequence[int]) -> None:
        if self.locked:
            raise JournalBusy("the journal cannot be changed now: database is locked")
        self.batches.append(list(rows))

    def add(self, number: int) -> bool:
        return self.rows.add(str(number), str(number % 2), number)


@pytest.fixture(scope="module", autouse=True)
def _long_proofs() -> Iterator[None]:
    """So that no pause of the machine makes a test fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting, "_PROOF_SECONDS", 600.0)
        yield


@pytest.fixture
def written() -> Written:
    return Written()


def test_nothing_waits_before_the_journal_was_seen_to_take_a_change(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not written.add(1)
    written.rows.prove()
    assert written.add(1)
    monkeypatch.setattr(waiting, "_PROOF_SECONDS", 0.0)
    assert not written.add(2)
    written.rows.flush()
    assert written.batches == [[1]]


def test_what_waits_is_written_together_and_once(written: Written) -> None:
    written.rows.prove()
    assert all(written.add(number) for number in range(5))
    assert not written.add(3)
    assert written.rows.has("3")
    assert written.rows.has_of("1")
    written.rows.flush()
    written.rows.flush()
    assert written.batches == [[0, 1, 2, 3, 4]]
    assert not written.rows.has("3")
    assert not written.rows.has_of("1")


def test_what_cannot_be_written_waits_on_and_nothing_joins_it(written: Written) -> None:
    written.rows.prove()
    assert written.add(1)
    written.locked = True
    with pytest.raises(JournalBusy):
        written.rows.flush()
    assert written.rows.has("1")
    assert "received wait for the journal" in written.rows.trouble
    assert "database is locked" in written.rows.trouble
    assert not written.add(2)
    written.locked = False
    written.rows.flush()
    assert written.batches == [[1]]
    assert not written.rows.trouble
    assert written.add(2)


def test_no_more_wait_than_memory_is_for(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_MOST", 3)
    written.rows.prove()
    assert [written.add(number) for number in range(5)] == [True, True, True, False, False]


def test_many_threads_and_the_writing_one_lose_nothing(written: Written) -> None:
    written.rows.prove()
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            written.rows.step()

    def add(number: int) -> None:
        while not written.add(number):
            written.rows.flush()

    writer = threading.Thread(target=write)
    writer.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(2_000)))
    wait_for(lambda: not written.rows.has_of("0") and not written.rows.has_of("1"), "all rows", 60)
    done.set()
    written.rows.stop()
    writer.join()
    assert sorted(number for batch in written.batches for number in batch) == list(range(2_000))


def test_who_waits_behind_a_failure_does_not_wait_as_long_again(written: Written) -> None:
    started, fail = threading.Event(), threading.Event()
    attempts: list[int] = []

    def write(_: Sequence[int]) -> None:
        attempts.append(1)
        started.set()
        fail.wait(20)
        raise JournalBusy("the journal cannot be changed now: database is locked")

    rows = WaitingRows(write)
    rows.prove()
    assert rows.add("1", "1", 1)

    def flush() -> str:
        with pytest.raises(JournalBusy) as caught:
            rows.flush()
        return str(caught.value)

    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(flush)
        assert started.wait(20)
        others = [pool.submit(flush) for _ in range(5)]
        wait_for(lambda: pool._work_queue.empty(), "all to be under way", 10)
        threading.Event().wait(1.0)  # for each to come to the turn
        fail.set()
        assert all("database is locked" in one.result() for one in (first, *others))
    assert len(attempts) == 1
    assert rows.has("1")


def test_who_comes_to_the_turn_after_a_failure_and_a_success_is_told_of_the_success(
    written: Written,
) -> None:
    """The failure came first, while it waited; then somebody else wrote what waits."""
    written.rows.prove()
    assert written.add(1)
    written.locked = True
    turn = written.rows._turn
    turn.acquire()
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(written.rows.flush)
        wait_for(lambda: pool._work_queue.empty(), "it to be under way", 10)
        threading.Event().wait(0.3)  # for it to come to the turn
        written.rows._turn = threading.Lock()
        with pytest.raises(JournalBusy):
            written.rows.flush()
        written.locked = False
        written.rows.flush()
        turn.release()
        last.result()
    assert written.batches == [[1]]


# in the journal

_SERIES = ("1.1", "1.2", "1.3")
_TABLES: tuple[Table, ...] = (t.instances, t.series, t.events)


def _arrival(series: str, number: int) -> Arrival:
    plane = {"position": [0.0, 0.5, number / 3], "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]}
    facts = ("9", "CT", "1.2", "1.2.1", f"{number:064}", number, "CT1", "NODE", None)
    expected = {"ImagesInAcquisition": number} if number % 2 else {}
    return Arrival(f"{series}.{number}", series, *facts, plane if number % 3 else None, expected)


def _rows(database: Database) -> list[list[tuple[object, ...]]]:
    return [
        sorted(map(tuple, database.read(select(*(c for c in table.c if c.name != "id")))), key=str)
        for table in _TABLES
    ]


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, Database]]:
    both = tmp_path_factory.mktemp("journals")
    pair = Database(both / "one.db"), Database(both / "all.db")
    yield pair
    for database in pair:
        database.close()


_numbers = iter(range(1, 1 << 40))


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=4),
    closed=st.sets(st.integers(0, 2)),
    late=st.sampled_from(["regenerate", "hold"]),
)
def test_together_they_say_what_each_would_have_said(
    databases: tuple[Database, Database], batches: list[list[int]], closed: set[int], late: str
) -> None:
    one, together = (Journal(database) for database in databases)
    for database in databases:
        with database.write() as db:
            for table in reversed(_TABLES):
                db.execute(table.delete())
    now = 1_700_000_000.123
    for batch in batches:
        together.waiting.prove()
        for which in batch:
            arrival, now = _arrival(_SERIES[which], next(_numbers)), now + 0.015625
            one.record_instance(arrival, now, late=late)
            assert together.record_soon(arrival, now, late=late)
        together.waiting.flush()
        for database in databases:
            with database.write() as db:
                ended = [_SERIES[which] for which in closed]
                db.execute(
                    t.series.update().where(t.series.c.series_uid.in_(ended)).values(open=False)
                )
    assert _rows(databases[0]) == _rows(databases[1])


def test_what_was_written_already_may_be_written_again(
    databases: tuple[Database, Database],
) -> None:
    """The same instance, that is."""
    journal = Journal(databases[0])
    journal.waiting.prove()
    arrival = _arrival("1.4", next(_numbers))
    assert journal.record_soon(arrival, 5.0, late="hold")
    Journal(databases[0]).record_instance(arrival, 5.0)
    journal.waiting.flush()
    assert journal.instance_uids("1.4") == [arrival.sop_instance_uid]


def test_two_instances_of_one_uid_are_not_taken_for_one(
    databases: tuple[Database, Database],
) -> None:
    journal = Journal(databases[0])
    journal.waiting.prove()
    arrival = _arrival("1.5", next(_numbers))
    assert journal.record_soon(arrival, 5.0, late="hold")
    Journal(databases[0]).record_instance(replace(arrival, series_uid="1.6"), 5.0)
    with pytest.raises(JournalError):
        journal.waiting.flush()
    assert "DuplicateInstance" in journal.waiting.trouble
    assert journal.instance_uids("1.5") == []


def test_a_journal_that_somebody_holds_gets_its_rows_later(tmp_path: Path) -> None:
    database = Database(tmp_path / "journal.db")
    journal = Journal(database)
    assert journal.record_instance(_arrival("1.1", 1), time.time())
    other = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert journal.record_soon(_arrival("1.1", 2), time.time(), late="hold")
    with pytest.raises(JournalBusy):
        journal.waiting.flush()
    assert "database is locked" in journal.waiting.trouble
    assert not journal.record_soon(_arrival("1.1", 3), time.time(), late="hold")
    other.close()
    journal.waiting.flush()
    assert journal.instance_uids("1.1") == ["1.1.1", "1.1.2"]
    assert not journal.waiting.trouble
    database.close()
