"""Deleting what is old, and never what somebody may still need."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from dicomnode import retention
from dicomnode import tables as t
from dicomnode.audit import storage_faults
from dicomnode.config import RetentionSection, config_from_mapping
from dicomnode.history import History
from dicomnode.jobs import Job, Jobs, Output
from dicomnode.journal import Arrival, Journal
from dicomnode.lifecycle import Event, State
from dicomnode.node import Node
from dicomnode.promises import Promises
from dicomnode.retention import Rules, make_room, purge
from dicomnode.scp import StorageScp
from dicomnode.scu import Address, send_instances
from dicomnode.series import Carriers
from dicomnode.spool import Spool
from dicomnode.tables import Database
from dicomnode.transactions import Commitment, Transactions
from tests.factories import ct_series, enter, no_log, write_series

RULES = Rules(RetentionSection(received_hours=24, results_hours=168))
HOUR = 3600.0
LATE = 1000 * HOUR


class Shelf:
    """A spool and a journal with one series: 1.1, derived as 2.1."""

    def __init__(self, folder: Path) -> None:
        self.spool = Spool(folder)
        self.spool.prepare()
        self.database = Database(folder / "journal.db")
        self.journal, self.jobs = Journal(self.database), Jobs(self.database)

    def receive(self, index: int, at: float = 0.0, *, late: str = "regenerate") -> None:
        uid = f"1.1.{index}"
        if not self.spool.path("1.1", uid).exists():
            part = self.spool.incoming / uid
            part.write_bytes(b"received")
            self.spool.keep(part, "1.1", uid)
        facts = ("1.1", "1", "CT", "1.2", "1.2", "0" * 64, 1, "CT1", "DICOMNODE", None, None)
        self.journal.record_instance(Arrival(uid, *facts), at, late=late)

    def close(self, *routes: str) -> Job | None:
        (seen,) = self.journal.open_series()
        self.jobs.close_series(seen, "routed", [(route, "routine") for route in routes], [], 1)
        return self.jobs.claim(1)

    def derive(self, job: Job, event: Event = Event.DERIVED) -> None:
        path = self.spool.result_path("2.1", "2.1.1")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"derived")
        self.jobs.derived(job, [Output("2.1", "2.1.1", "1.2")], ["pacs"], {}, event, 2)

    def deliver(self) -> None:
        (due,) = self.jobs.due_deliveries(3)
        self.jobs.accepted(due.id, {"2.1.1": 0}, 3)
        self.jobs.delivered(due, "", 3)

    def promise(self) -> Promises:
        """What `pacs` is to commit, asked for."""
        promises = Promises(self.database)
        promises.expect(["pacs"], 4)
        return promises

    def purge(self, hours: float) -> tuple[bool, bool]:
        """What is left `hours` after everything: received files, derived files."""
        purge(self.database, self.spool, RULES, hours * HOUR)
        received = any(self.spool.stored())
        return received, self.spool.result_path("2.1", "2.1.1").exists()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def _done(shelf: Shelf) -> None:
    shelf.receive(1)
    job = shelf.close("r")
    assert job is not None
    shelf.derive(job)
    shelf.deliver()


def test_what_is_done_goes_in_its_time(shelf: Shelf) -> None:
    _done(shelf)
    assert [shelf.purge(hours) for hours in (23.9, 24.1, 167.9, 168.1)] == [
        (True, True),
        (False, True),
        (False, True),
        (False, False),
    ]


def test_what_no_route_wants_goes_in_its_time(shelf: Shelf) -> None:
    shelf.receive(1)
    shelf.close()
    assert [shelf.purge(hours)[0] for hours in (23.9, 24.1)] == [True, False]


def test_the_rows_stay_and_the_timeline_says_so(shelf: Shelf) -> None:
    _done(shelf)
    shelf.purge(1000)
    assert shelf.journal.instance_uids("1.1") == ["1.1.1"]
    assert shelf.journal.known("1.1.1") == ("1.1", "0" * 64, True)
    series = History(shelf.database).one_series("1.1")
    assert series is not None
    assert [event["text"] for event in series["timeline"]][-2:] == [
        "received files deleted after 24 hours",
        "derived files of job 1 deleted after 168 hours",
    ]


def test_purging_again_changes_nothing(shelf: Shelf) -> None:
    _done(shelf)
    assert purge(shelf.database, shelf.spool, RULES, LATE) == 2
    assert [*shelf.spool.received.iterdir(), *shelf.spool.results.iterdir()] == []
    assert purge(shelf.database, shelf.spool, RULES, LATE) == 0


def test_an_open_series_stays(shelf: Shelf) -> None:
    shelf.receive(1)
    assert shelf.purge(1000)[0]


def test_a_queued_or_running_job_keeps_its_source(shelf: Shelf) -> None:
    shelf.receive(1)
    shelf.close("first", "second")
    assert shelf.jobs.in_state(State.QUEUED)
    assert shelf.jobs.in_state(State.TRANSLATING)
    assert shelf.purge(1000)[0]


@pytest.mark.parametrize("event", [Event.UNFIT, Event.BROKE, Event.GAVE_UP])
def test_what_an_operator_may_retry_keeps_its_source(shelf: Shelf, event: Event) -> None:
    shelf.receive(1)
    job = shelf.close("r")
    assert job is not None
    shelf.jobs.finish(job, event, 2)
    assert shelf.purge(1000)[0]
    shelf.jobs.discard_job(job.id, "not wanted", 3)
    assert not shelf.purge(1000)[0]


def test_a_held_result_stays_with_its_source(shelf: Shelf) -> None:
    shelf.receive(1)
    job = shelf.close("r")
    assert job is not None
    shelf.derive(job, Event.IMPLAUSIBLE)
    assert shelf.purge(1000) == (True, True)


def test_a_parked_delivery_keeps_its_result(shelf: Shelf) -> None:
    shelf.receive(1)
    job = shelf.close("r")
    assert job is not None
    shelf.derive(job)
    (due,) = shelf.jobs.due_deliveries(2)
    shelf.jobs.park(due, "refused", 3)
    assert shelf.purge(1000) == (True, True)


def test_one_job_in_need_keeps_the_source_for_all(shelf: Shelf) -> None:
    shelf.receive(1)
    first = shelf.close("first", "second")
    assert first is not None
    shelf.derive(first)
    shelf.deliver()
    assert shelf.purge(1000) == (True, False)


def test_a_result_that_another_job_still_sends_stays(shelf: Shelf) -> None:
    shelf.receive(1)
    first = shelf.close("first", "second")
    second = shelf.jobs.claim(1)
    assert first is not None
    assert second is not None
    shelf.derive(first)
    shelf.derive(second)  # the same model and options: the same derived series
    due = shelf.jobs.due_deliveries(3)[0]
    shelf.jobs.accepted(due.id, {"2.1.1": 0}, 3)
    shelf.jobs.delivered(due, "", 3)
    assert shelf.purge(1000) == (True, True)


def test_a_late_instance_counts_from_its_own_arrival(shelf: Shelf) -> None:
    _done(shelf)
    shelf.receive(2, at=20 * HOUR, late="hold")
    assert [shelf.purge(hours)[0] for hours in (43.9, 44.1)] == [True, False]


def test_a_series_sent_again_after_its_files_went_is_stored_again(shelf: Shelf) -> None:
    _done(shelf)
    shelf.purge(30)
    shelf.receive(1, at=31 * HOUR)
    assert shelf.journal.known("1.1.1") == ("1.1", "0" * 64, False)
    assert shelf.journal.open_series() == []  # and not translated twice
    assert any(shelf.spool.stored())


def test_a_file_that_is_just_coming_in_stays(shelf: Shelf) -> None:
    _done(shelf)
    part = shelf.spool.incoming / "part"
    part.write_bytes(b"stored, its row not written yet")
    shelf.spool.keep(part, "1.1", "1.1.2")
    shelf.purge(1000)
    assert [uid for _, uid, _ in shelf.spool.stored()] == ["1.1.2"]


def _crash_before_deleting(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """The rows are marked; then the node ends."""
    with monkeypatch.context() as patch:
        patch.setattr(retention, "_REMOVE", {})
        with pytest.raises(KeyError):
            purge(shelf.database, shelf.spool, RULES, hours * HOUR)


def test_what_a_crash_left_of_a_purge_goes_at_the_next(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    _done(shelf)
    _crash_before_deleting(shelf, monkeypatch, 1000)
    assert any(shelf.spool.stored())
    assert shelf.purge(1000) == (False, False)
    assert shelf.database.read(select(t.removals)) == []


def test_an_instance_that_came_again_after_such_a_crash_stays(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    _done(shelf)
    shelf.receive(2)
    assert shelf.close() is None
    _crash_before_deleting(shelf, monkeypatch, 30)
    shelf.receive(2, at=31 * HOUR)  # its old file is still there
    shelf.purge(32)
    assert [uid for _, uid, _ in shelf.spool.stored()] == ["1.1.2"]


def test_an_instance_that_comes_again_while_its_file_is_to_go_stays(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the list of the files was read, before any is deleted."""
    _done(shelf)
    real = shelf.database.read

    def read(query: Any, values: Any = None) -> list[Any]:
        rows = real(query, values)
        if str(query).startswith("SELECT instances.sop_instance_uid"):
            shelf.receive(1, at=30 * HOUR)
        return rows

    monkeypatch.setattr(shelf.database, "read", read)
    shelf.purge(30)
    assert [uid for _, uid, _ in shelf.spool.stored()] == ["1.1.1"]
    assert shelf.journal.known("1.1.1") == ("1.1", "0" * 64, False)


def test_a_folder_that_cannot_be_deleted_is_tried_again(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    _done(shelf)
    in_the_way = shelf.spool.path("1.1", "1.1.1")
    in_the_way.unlink()
    in_the_way.mkdir()  # a folder where the file was: not even root can unlink it
    assert shelf.purge(1000)[1] is False  # the others go all the same
    assert "received of series 1.1 cannot be deleted" in caplog.text
    in_the_way.rmdir()
    in_the_way.write_bytes(b"received")
    assert shelf.purge(1001) == (False, False)


def test_results_another_job_may_just_be_writing_stay(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A series came again and is translated anew, to the same UIDs, when a purge goes on."""
    _done(shelf)
    _crash_before_deleting(shelf, monkeypatch, 1000)
    shelf.receive(2, at=1000 * HOUR)
    again = shelf.close("r")
    assert again is not None
    assert shelf.purge(1001)[1]
    shelf.derive(again)
    assert shelf.purge(1002)[1]  # known, and to be sent
    shelf.deliver()
    assert not shelf.purge(5000)[1]


def test_results_no_job_knows_go_when_they_are_old(shelf: Shelf) -> None:
    """Their translation was overtaken by late instances."""
    path = shelf.spool.result_path("2.9", "2.9.1")
    path.parent.mkdir()
    path.write_bytes(b"overtaken")
    written = path.parent.stat().st_mtime
    assert purge(shelf.database, shelf.spool, RULES, written + 167.9 * HOUR) == 0
    assert purge(shelf.database, shelf.spool, RULES, written + 168.1 * HOUR) == 1
    assert not path.parent.exists()


def test_results_that_are_just_being_written_stay_even_if_none_are_kept(shelf: Shelf) -> None:
    shelf.spool.result_path("2.9", "2.9.1").parent.mkdir()
    none_kept = Rules(RetentionSection(received_hours=0, results_hours=0))
    assert purge(shelf.database, shelf.spool, none_kept, time.time() + 60) == 0


def test_what_a_peer_asked_to_commit_stays_until_it_was_told(shelf: Shelf) -> None:
    shelf.receive(1)
    assert shelf.close() is None
    transactions = Transactions(shelf.database)
    assert transactions.ask("9.1", "pacs", [("1.2", "1.1.1")], 5)
    assert shelf.purge(LATE / HOUR) == (True, False)
    (transaction,) = transactions.due(Commitment.CHECKING, 10)
    transactions.checked(transaction, [0], 10)
    (transaction,) = transactions.due(Commitment.REPORTING, 10)
    transactions.reported(transaction, 10)
    assert shelf.purge(LATE / HOUR) == (False, False)


# what destinations are to commit


WAITING = Rules(RULES.times, frozenset({"pacs"}))
NOT_WAITING = Rules(RetentionSection(24, 168, require_commitment=False), frozenset({"pacs"}))


def _left(shelf: Shelf, rules: Rules) -> tuple[bool, bool]:
    purge(shelf.database, shelf.spool, rules, LATE)
    return any(shelf.spool.stored()), shelf.spool.result_path("2.1", "2.1.1").exists()


def test_what_is_delivered_and_not_committed_stays(shelf: Shelf) -> None:
    _done(shelf)
    assert _left(shelf, WAITING) == (True, True)  # nobody was even asked yet
    promises = shelf.promise()
    assert _left(shelf, WAITING) == (True, True)
    uid = promises.begin(1)
    promises.reported(uid, [("1.2", "2.1.1", 0)], 5)
    assert _left(shelf, WAITING) == (False, False)


def test_what_no_peer_need_commit_goes(shelf: Shelf) -> None:
    _done(shelf)
    shelf.promise()
    assert _left(shelf, NOT_WAITING) == (False, False)


def test_what_is_parked_uncommitted_stays_until_an_operator_does_without(shelf: Shelf) -> None:
    _done(shelf)
    promises = shelf.promise()
    (owed,) = promises.due(5)
    promises.park(owed, "refused", 6)
    assert _left(shelf, WAITING) == (True, True)
    promises.discard(1, "the archive is gone", 7)
    assert _left(shelf, WAITING) == (False, False)


# too little room


class Full:
    """A disk with `free` bytes, and what the files on it take."""

    def __init__(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self._shelf, self.free = shelf, free
        monkeypatch.setattr(Spool, "free_bytes", lambda _: self.free)

    def make_room(self, to: int, peers: Sequence[str] = ()) -> int:
        times = RetentionSection(1e6, 1e6, watermark_free_gb=to / 1e9)
        rules = Rules(times, frozenset(peers))
        return make_room(self._shelf.database, self._shelf.spool, rules, 10)

    def files(self) -> list[str]:
        spool = self._shelf.spool
        folders = (spool.received, spool.results)
        return sorted(path.stem for folder in folders for path in folder.glob("*/*.dcm"))


class Shelves(Shelf):
    """A shelf with series 1.1, 1.2, ..., delivered in this order."""

    def fill(self, number: int, at: float) -> None:
        uid = f"1.{number}"
        part = self.spool.incoming / uid
        part.write_bytes(b"received")  # 8 bytes
        self.spool.keep(part, uid, f"{uid}.1")
        part.unlink()
        facts = (uid, "1", "CT", "1.2", "1.2", "0" * 64, 8, "CT1", "DICOMNODE", None, None)
        self.journal.record_instance(Arrival(f"{uid}.1", *facts), at)
        job = self.close("r")
        assert job is not None
        path = self.spool.result_path(f"2.{number}", f"2.{number}.1")
        path.parent.mkdir()
        path.write_bytes(b"derived")  # 7 bytes
        made = [Output(f"2.{number}", f"2.{number}.1", "1.2")]
        self.jobs.derived(job, made, ["pacs"], {}, Event.DERIVED, at)
        (due,) = self.jobs.due_deliveries(at)
        self.jobs.accepted(due.id, {f"2.{number}.1": 0}, at)
        self.jobs.delivered(due, "", at)


@pytest.fixture
def shelves(tmp_path: Path) -> Shelves:
    made = Shelves(tmp_path)
    for number in (1, 2, 3):
        made.fill(number, float(number))
    return made


def test_the_oldest_that_is_delivered_makes_room(
    shelves: Shelves, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full(shelves, monkeypatch, free=1000)
    assert full.make_room(to=1000) == 0
    assert full.make_room(to=1001) == 8
    assert full.files() == ["1.2.1", "1.3.1", "2.1.1", "2.2.1", "2.3.1"]
    assert full.make_room(to=1010) == 15  # 7, and 8 more because 7 is too little
    assert full.files() == ["1.3.1", "2.2.1", "2.3.1"]
    text = "received files deleted early: free space is below retention.watermark_free_gb"
    assert text in str(History(shelves.database).one_series("1.1"))
    assert shelves.journal.known("1.1.1") == ("1.1", "0" * 64, True)


def test_without_a_watermark_nothing_goes_early(
    shelves: Shelves, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full(shelves, monkeypatch, free=0)
    assert full.make_room(to=0) == 0
    assert len(full.files()) == 6


def test_only_what_is_delivered_and_committed_makes_room(
    shelves: Shelves, monkeypatch: pytest.MonkeyPatch
) -> None:
    promises = shelves.promise()
    promises.reported(promises.begin(2), [("1.2", "2.2.1", 0)], 5)
    full = Full(shelves, monkeypatch, free=0)
    assert full.make_room(to=1000, peers=["pacs"]) == 15
    assert full.files() == ["1.1.1", "1.3.1", "2.1.1", "2.3.1"]


def test_what_nobody_got_makes_no_room(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """No route took it, or the route is a shadow: it stays for its time."""
    shelf.receive(1)
    job = shelf.close("shadow")
    assert job is not None
    path = shelf.spool.result_path("2.1", "2.1.1")
    path.parent.mkdir()
    path.write_bytes(b"derived")
    made = [Output("2.1", "2.1.1", "1.2")]
    shelf.jobs.derived(job, made, [], {}, Event.NOTHING_TO_SEND, 2)
    full = Full(shelf, monkeypatch, free=0)
    assert full.make_room(to=1000) == 0
    assert full.files() == ["1.1.1", "2.1.1"]


def test_what_we_have_committed_makes_no_room(
    shelves: Shelves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays here for as long as the conformance statement says."""
    transactions = Transactions(shelves.database)
    assert transactions.ask("9.1", "scanner", [("1.2", "1.1.1"), ("1.2", "9.9")], 5)
    (transaction,) = transactions.due(Commitment.CHECKING, 6)
    transactions.checked(transaction, [0, 0x0112], 6)
    (transaction,) = transactions.due(Commitment.REPORTING, 7)
    transactions.reported(transaction, 7)
    full = Full(shelves, monkeypatch, free=0)
    full.make_room(to=1000)
    assert full.files() == ["1.1.1"]


def test_a_commitment_holds_for_the_whole_time_from_its_report_on(shelf: Shelf) -> None:
    shelf.receive(1)
    assert shelf.close() is None
    transactions = Transactions(shelf.database)
    assert transactions.ask("9.1", "scanner", [("1.2", "1.1.1")], 20 * HOUR)
    (transaction,) = transactions.due(Commitment.CHECKING, 20 * HOUR)
    transactions.checked(transaction, [0], 20 * HOUR)
    (transaction,) = transactions.due(Commitment.REPORTING, 20 * HOUR)
    transactions.reported(transaction, 20 * HOUR)
    assert [shelf.purge(hours)[0] for hours in (43.9, 44.1)] == [True, False]


def test_what_a_backup_holds_by_a_hard_link_makes_no_room(
    shelves: Shelves, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = shelves.spool.path("1.1", "1.1.1")
    (tmp_path / "backup").hardlink_to(held)
    full = Full(shelves, monkeypatch, free=0)
    assert full.make_room(to=7) == 7
    assert "1.1.1" in full.files()
    assert "2.1.1" not in full.files()


def test_what_was_deleted_is_overwritten_in_the_log_also_where_the_round_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"data_dir": str(tmp_path / "data"), "bind": "127.0.0.1", "port": 0}
    node = Node(config_from_mapping({"node": folder, "http": {"port": 0}}, tmp_path))
    log = node._redo
    Spool(tmp_path / "data").prepare()
    log.restore(lambda *_: None)
    log.step()
    for uid in ("1.2.8", "1.2.9"):  # the first goes in any case
        enter(log, "1.2", uid)
    (segment,) = (tmp_path / "data" / "redo").iterdir()

    def refuse(*_: object) -> int:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("dicomnode.node.make_room", refuse)
    assert b"1.2.9" in segment.read_bytes()
    with pytest.raises(OSError, match="Input/output"):
        node.keep_house()
    log.stop()
    log.close()
    assert b"1.2.9" not in segment.read_bytes()


class PurgedInBetween(Journal):
    """Retention runs at the worst moment: when an instance was found stored, before its row says
    that it came again."""

    shelf: Shelf
    times = 0

    def record_instance(
        self, arrival: Arrival, now: float, *, late: str = "regenerate", unsynced: bool = False
    ) -> bool:
        if self.known(arrival.sop_instance_uid):
            for seen in self.open_series():
                self.shelf.jobs.close_series(seen, "", [], [], now)
            self.times += purge(self.shelf.database, self.shelf.spool, RULES, now + LATE)
        return super().record_instance(arrival, now, late=late, unsynced=unsynced)


@pytest.mark.network
def test_what_is_acknowledged_while_retention_runs_is_there(shelf: Shelf, tmp_path: Path) -> None:
    peers = {"scanner": {"ae_title": "CT1", "host": "127.0.0.1"}}
    node = {"data_dir": str(tmp_path), "bind": "127.0.0.1", "port": 0}
    config = config_from_mapping({"node": node, "peers": peers}, tmp_path)
    journal = PurgedInBetween(shelf.database)
    journal.shelf = shelf
    scp = StorageScp(config, shelf.spool, journal, no_log(tmp_path), Carriers(), ())
    files = write_series(ct_series(1, 16, 16), tmp_path / "source")
    answers: list[int] = []
    scp.start()
    try:
        address = Address("127.0.0.1", scp.port, "DICOMNODE", "CT1")
        for _ in range(2):
            send_instances(files, address, lambda _, status: answers.append(status))
    finally:
        scp.drain(5)
    assert (answers, journal.times) == ([0, 0], 1)
    assert list(storage_faults(shelf.database, shelf.spool)) == [1]
