"""A series is closed in its time, whatever somebody does to the machine's clock meanwhile."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from dicomnode import tables as t
from dicomnode import waiting
from dicomnode.completion import Completion
from dicomnode.config import config_from_mapping
from dicomnode.errors import JournalBusy
from dicomnode.jobs import Jobs, Output
from dicomnode.journal import Arrival, Journal
from dicomnode.lifecycle import Event
from dicomnode.series import Carriers, Plane
from dicomnode.spool import Spool
from dicomnode.tables import Database
from dicomnode.transactions import Commitment, Transactions

QUIET, RELEASED = 10.0, 2.0
NOW = 1_000_000.0
YEAR = 365 * 86_400.0


class Reception:
    """A node's reception without its network: arrivals, releases, and the look at each."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "journal.db")
        self.journal, self.jobs, self.spool = (
            Journal(self.database),
            Jobs(self.database),
            Spool(folder),
        )
        waits = {"quiet_seconds": QUIET, "quiet_seconds_if_released": RELEASED}
        config = config_from_mapping({"series": waits, "node": {"data_dir": str(folder)}}, folder)
        self.carriers = Carriers()
        self.completion = Completion(
            config, self.spool, self.journal, self.jobs, self.carriers, lambda _: None
        )

    def receive(
        self, uid: str, now: float, series: str = "1.1", plane: Plane | None = None
    ) -> None:
        facts = (series, "1", "CT", "1.2", "1.2", "0" * 64, 1, "CT1", "DICOMNODE", None, plane)
        self.journal.record_instance(Arrival(uid, *facts), now)

    def events(self) -> Sequence[Any]:
        return self.database.read(select(t.events.c.text).order_by(t.events.c.id))

    def closed(self, now: float, clock: float) -> bool:
        return self.completion.step(now, clock)[1] == 1


def plane(place: float) -> Plane:
    return {"position": [0.0, 0.0, place], "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]}


@pytest.fixture
def reception(tmp_path: Path) -> Reception:
    return Reception(tmp_path)


def test_a_journal_that_cannot_be_changed_is_told_once_and_not_for_each_series(
    reception: Reception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By who called, who also waits before the next look."""

    def refuse(*_: object) -> None:
        raise JournalBusy("the journal cannot be changed now")

    for series in ("1.1", "1.2"):
        reception.receive(f"{series}.1", NOW, series)
    with monkeypatch.context() as broken:
        broken.setattr(Completion, "_say_why", refuse)
        with pytest.raises(JournalBusy):
            reception.completion.step(NOW, 0.0)
    assert not caplog.records
    assert reception.completion.step(NOW + QUIET, QUIET) == (2, 2)  # both waits went on meanwhile


def test_a_clock_set_back_does_not_keep_a_series_open(reception: Reception) -> None:
    reception.receive("1.1.1", NOW + YEAR)  # the clock was a year ahead
    assert not reception.closed(NOW, 100.0)
    assert not reception.closed(NOW + 9.9, 109.9)
    assert reception.closed(NOW + 10.0, 110.0)


def test_a_clock_set_forward_does_not_end_the_waiting(reception: Reception) -> None:
    reception.receive("1.1.1", NOW)
    assert not reception.closed(NOW, 100.0)
    assert not reception.closed(NOW + YEAR, 100.2)
    assert reception.closed(NOW + YEAR + 9.8, 110.0)


def test_an_instance_after_a_clock_was_set_back_is_noticed(reception: Reception) -> None:
    reception.receive("1.1.1", NOW + YEAR)
    assert not reception.closed(NOW, 100.0)
    reception.receive("1.1.2", NOW + 5)
    assert not reception.closed(NOW + 5, 105.0)
    assert not reception.closed(NOW + 14.9, 114.9)
    assert reception.closed(NOW + 15, 115.0)


def test_a_release_counts_by_the_same_clock(reception: Reception) -> None:
    reception.carriers.carries(1, "1.1")
    reception.receive("1.1.1", NOW + YEAR)
    assert not reception.closed(NOW + YEAR, 100.0)
    reception.carriers.ended(1, released=True, now=101.0)
    assert not reception.closed(NOW, 102.9)
    assert reception.closed(NOW, 103.0)


def test_after_a_start_the_waiting_begins_anew(tmp_path: Path) -> None:
    Reception(tmp_path).receive("1.1.1", NOW)
    again = Reception(tmp_path)
    assert not again.closed(NOW + YEAR, 5.0)
    assert again.closed(NOW + YEAR, 15.0)


def test_the_timeline_says_once_what_an_incomplete_series_waits_for(reception: Reception) -> None:
    for place in (0, 2, 4, 8):
        reception.receive(f"1.1.{place}", NOW, plane=plane(place))
    for second in (0, 11, 12, 299):
        assert not reception.closed(NOW + second, 100.0 + second)
    texts = [event.text for event in reception.events()]
    waits = "1 slices are missing between those received; waiting 289 s more"
    assert texts == ["first instance from CT1", waits]
    assert reception.closed(NOW + 300, 400.0)


numbers = itertools.count()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.booleans(), st.floats(-YEAR, YEAR)), min_size=1, max_size=12))
def test_what_the_clock_shows_changes_nothing(
    reception: Reception, seconds: Sequence[tuple[bool, float]]
) -> None:
    """Each second something arrives, or not, and the clock is set to whatever; then quiet."""
    series = f"1.{next(numbers)}"
    reception.receive(f"{series}.0", NOW, series)
    last, clock = 0.0, 0.0
    assert not reception.closed(NOW, clock)
    for arrives, error in seconds:
        clock += 1.0
        if arrives:
            reception.receive(f"{series}.{clock:.0f}", NOW + error, series)
            last = clock
        assert reception.closed(NOW + error, clock) == (clock - last >= QUIET)
        if clock - last >= QUIET:
            return
    error = seconds[-1][1]
    assert not reception.closed(NOW + error, last + QUIET - 0.1)
    assert reception.closed(NOW - error, last + QUIET)


def _delivery(reception: Reception, until: float) -> Callable[[float], bool]:
    reception.receive("1.1.1", NOW)
    (seen,) = reception.journal.open_series()
    reception.jobs.close_series(seen, "", [("r", "routine")], [], NOW)
    job = reception.jobs.claim(NOW)
    assert job is not None
    made = [Output("2.1", "2.1.1", "1.2")]
    reception.jobs.derived(job, made, ["pacs"], {}, Event.DERIVED, NOW)
    (due,) = reception.jobs.due_deliveries(NOW)
    reception.jobs.postpone(due, until, "absent", NOW)
    return lambda now: bool(reception.jobs.due_deliveries(now))


def _commitment(reception: Reception, until: float) -> Callable[[float], bool]:
    transactions = Transactions(reception.database)
    transactions.ask("9.1", "pacs", [("1.2", "1.1.1")], NOW)
    (due,) = transactions.due(Commitment.CHECKING, NOW)
    transactions.postpone(due, until, "absent", NOW)
    return lambda now: bool(transactions.due(Commitment.CHECKING, now))


@pytest.mark.parametrize("put_off", [_delivery, _commitment])
def test_what_was_put_off_under_a_clock_that_was_ahead_is_due_at_once(
    reception: Reception, put_off: Callable[[Reception, float], Callable[[float], bool]]
) -> None:
    is_due = put_off(reception, NOW + 600.0)
    assert [is_due(moment) for moment in (NOW, NOW + 599.0, NOW + 600.0)] == [False, False, True]
    assert is_due(NOW - YEAR)


def test_a_series_is_not_closed_while_one_of_its_instances_has_no_row_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was acknowledged: closed without it, the series would have to be made again."""
    monkeypatch.setattr(waiting, "_PROOF_SECONDS", 600.0)
    node = Reception(tmp_path)
    node.receive("1.1.1", NOW)
    assert not node.closed(NOW, 0.0)
    arrival = Arrival(
        "1.1.2", "1.1", "1", "CT", "1.2", "1.2", "0" * 64, 1, "CT1", "DICOMNODE", None, None
    )
    assert node.journal.record_soon(arrival, NOW, late="regenerate")
    assert not node.closed(NOW + QUIET, QUIET + 1)
    node.journal.waiting.flush()
    assert not node.closed(NOW + QUIET, QUIET + 2)  # it came, so it is waited for anew
    assert node.closed(NOW + 2 * QUIET, 2 * QUIET + 3)
    assert node.journal.generation("1.1") == 1
    assert node.journal.instance_uids("1.1") == ["1.1.1", "1.1.2"]
