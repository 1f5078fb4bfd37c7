"""The journal: any order of events loses nothing, leaves nothing stuck, and follows its tables."""

import json
import sqlite3
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sqlalchemy import Connection

from dicomnode.errors import JournalError
from dicomnode.generations import OnSuperseded
from dicomnode.history import History
from dicomnode.jobs import DueDelivery, Job, Jobs, Output
from dicomnode.journal import Arrival, Journal, OpenSeries
from dicomnode.lifecycle import (
    DELIVERY_TRANSITIONS,
    FINAL,
    TRANSITIONS,
    Delivery,
    Event,
    State,
    after,
    delivery_after,
)
from dicomnode.tables import Database, note

SERIES = ("1.1", "1.2")
DESTINATIONS = ("pacs", "archive")
ROUTE = "every CT"
GIVEN_UP = (Delivery.DELIVERED, Delivery.DISCARDED)
CHANGES = {(old, new) for (old, _), new in TRANSITIONS.items()}
DELIVERY_CHANGES = {(old, new) for (old, _), new in DELIVERY_TRANSITIONS.items()}
RAM = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a folder without a disk
WHERE_NO_RESULT = (Event.UNFIT, Event.BROKE)


def _arrival(series: str, index: int, association: int | None = None) -> Arrival:
    return Arrival(
        sop_instance_uid=f"{series}.{index}",
        series_uid=series,
        study_uid="1",
        modality="CT",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        sha256="0" * 64,
        size=1,
        calling_ae="CT1",
        called_ae="DICOMNODE",
        association=association,
        plane={"position": [0, 0, index], "orientation": [1, 0, 0, 0, 1, 0]},
    )


class Books:
    """An open journal with everything that reads and writes it."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.journal, self.jobs = Journal(self.database), Jobs(self.database)
        self.history = History(self.database)

    def open_series(self, uid: str) -> OpenSeries:
        return next(s for s in self.journal.open_series() if s.series_uid == uid)


class LifeOfASeries(RuleBasedStateMachine):
    """Arrivals, associations, closing, work, deliveries, the operator and crashes in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=RAM)
        self.books = Books(Path(self.folder.name, "journal.db"))
        self.now = 1000.0
        self.acknowledged: dict[str, set[str]] = {uid: set() for uid in SERIES}
        self.associations: list[int] = []
        self.seen: dict[str, tuple[OpenSeries, bool]] = {}  # what was read, still true?
        self.running: list[Job] = []
        self.on_their_way: list[DueDelivery] = []
        self.before: dict[tuple[str, int], str] = {}
        self.policy: OnSuperseded = "retract"

    @initialize(policy=st.sampled_from(["retract", "retract", "keep"]))
    def a_site_says_what_becomes_of_earlier_results(self, policy: OnSuperseded) -> None:
        self.policy = policy

    def teardown(self) -> None:
        self.books.database.close()
        self.folder.cleanup()

    # what comes in

    @rule(passed=st.integers(0, 20))
    def time_passes(self, passed: int) -> None:
        self.now += passed

    @rule()
    def an_association_begins(self) -> None:
        number = self.books.journal.begin_association("CT1", "DICOMNODE", "127.0.0.1", self.now)
        self.associations.append(number)

    @precondition(lambda self: self.associations)
    @rule(how=st.sampled_from(["released", "aborted"]), data=st.data())
    def an_association_ends(self, how: str, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.associations))
        self.associations.remove(number)
        self.books.journal.end_association(number, how, self.now)

    @rule(uid=st.sampled_from(SERIES), index=st.integers(0, 4), data=st.data())
    def an_instance_arrives(self, uid: str, index: int, data: st.DataObject) -> None:
        association = data.draw(st.none() | st.sampled_from(self.associations or [None]))  # type: ignore[list-item]
        arrival = _arrival(uid, index, association)
        known = arrival.sop_instance_uid in self.acknowledged[uid]
        assert self.books.journal.record_instance(arrival, self.now) is not known
        self.acknowledged[uid].add(arrival.sop_instance_uid)
        if uid in self.seen and not known:
            self.seen[uid] = (self.seen[uid][0], False)

    # completion

    @rule(uid=st.sampled_from(SERIES))
    def an_open_series_is_looked_at(self, uid: str) -> None:
        for series in self.books.journal.open_series():
            if series.series_uid == uid:
                self.seen[uid] = (series, True)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), routed=st.booleans())
    def a_series_is_closed(self, data: st.DataObject, routed: bool) -> None:
        uid = data.draw(st.sampled_from(sorted(self.seen)))
        series, still_true = self.seen.pop(uid)
        routes = [(ROUTE, "routine"), ("urgent", "stat")] if routed else []
        outcome = "routed" if routed else "ignored"
        closed = self.books.jobs.close_series(
            series, outcome, routes, ["complete"], self.now, on_superseded=self.policy
        )
        if not still_true:
            assert not closed  # overtaken by an arrival

    # work

    @rule()
    def a_job_is_claimed(self) -> None:
        queued = self._jobs_in(State.QUEUED)
        job = self.books.jobs.claim(self.now)
        assert (job is None) == (not queued)
        if job is not None:
            self.running.append(job)

    @precondition(lambda self: self.running)
    @rule(event=st.sampled_from(WHERE_NO_RESULT))
    def a_translation_ends_without_a_result(self, event: Event) -> None:
        self.books.jobs.finish(self.running.pop(0), event, self.now, code="CODE", detail="why")

    @precondition(lambda self: self.running)
    @rule(crashed=st.booleans())
    def a_worker_is_lost(self, crashed: bool) -> None:
        self.books.jobs.lost(self.running.pop(0), "it ended", self.now, crashed=crashed)

    @precondition(lambda self: self.running)
    @rule(
        event=st.sampled_from([Event.DERIVED, Event.DERIVED, Event.IMPLAUSIBLE]),
        wanted=st.integers(0, 2),
    )
    def a_translation_ends_with_a_result(self, event: Event, wanted: int) -> None:
        job = self.running.pop(0)
        if job.retracts is not None:
            note = [Output(f"9.{job.retracts}", f"9.{job.retracts}.1", "1.2")]
            self.books.jobs.derived(job, note, [], {}, Event.DERIVED, self.now)
            return
        if event is Event.DERIVED and not wanted:
            event = Event.NOTHING_TO_SEND
        uids = self.books.journal.instance_uids(job.series_uid)
        derived = f"2.{job.series_uid}.{len(uids)}"  # the derived UIDs are made of the source's
        made = [Output(derived, f"{derived}.{uid}", "1.2") for uid in uids]
        self.books.jobs.derived(job, made, DESTINATIONS[:wanted], {}, event, self.now)

    @rule(uid=st.sampled_from(SERIES), index=st.integers(0, 9))
    def a_series_goes_all_the_way_to_the_courier(self, uid: str, index: int) -> None:
        """The usual course in one step, so that short histories reach the unusual ones."""
        self.books.journal.record_instance(_arrival(uid, index), self.now)
        self.acknowledged[uid].add(_arrival(uid, index).sop_instance_uid)
        self.seen.pop(uid, None)
        for series in self.books.journal.open_series():
            if series.series_uid == uid:
                routes, policy = [(ROUTE, "stat")], self.policy
                self.books.jobs.close_series(
                    series, "routed", routes, [], self.now, on_superseded=policy
                )
        self.every_change_of_a_state_is_in_the_tables()
        if job := self.books.jobs.claim(self.now):
            self.running.insert(0, job)
            self.every_change_of_a_state_is_in_the_tables()
            self.a_translation_ends_with_a_result(Event.DERIVED, 2)
        self.the_courier_takes_what_is_due()

    # deliveries

    @rule()
    def the_courier_takes_what_is_due(self) -> None:
        under_way = {delivery.id for delivery in self.on_their_way}
        for delivery in self.books.jobs.due_deliveries(self.now):
            same = [(d.series_uid, d.destination) for d in self.on_their_way]
            after_it = (delivery.series_uid, delivery.destination) in same
            if delivery.id in under_way or (delivery.retracts is not None and after_it):
                continue
            if delivery.retracts is None and self.policy == "retract":
                self._nothing_else_is_valid_there(delivery)
            assert self.books.jobs.begin(delivery.id)
            self.on_their_way.append(delivery)

    def _nothing_else_is_valid_there(self, delivery: DueDelivery) -> None:
        """Whatever of earlier generations a destination has is withdrawn there, or given up."""
        jobs = self._jobs()
        mine = jobs[delivery.job]
        for job in jobs.values():
            earlier = job["series_uid"] == delivery.series_uid and job["retracts"] is None
            if not earlier or job["generation"] >= mine["generation"]:
                continue
            reached = [d for d in job["deliveries"] if d["destination"] == delivery.destination]
            if any(d["accepted"] for d in reached):
                (by,) = [j for j in jobs.values() if j["retracts"] == job["id"]]
                (d,) = [d for d in by["deliveries"] if d["destination"] == delivery.destination]
                assert d["state"] in GIVEN_UP

    @precondition(lambda self: self.on_their_way)
    @rule(how_many=st.integers(0, 5), end=st.sampled_from(["", "postponed", "parked"]))
    def a_destination_takes_a_part(self, how_many: int, end: str) -> None:
        delivery = self.on_their_way[0]
        statuses = dict.fromkeys(delivery.remaining[:how_many], 0)
        sent = bool(statuses) or end != "postponed"
        self.books.jobs.accepted(delivery.id, statuses, self.now)
        if end:
            self.on_their_way.pop(0)
        if end == "postponed":
            self.books.jobs.postpone(delivery, self.now + 5, "absent", self.now, sent=sent)
        elif end == "parked":
            self._unless_given_up(delivery, self.books.jobs.park, delivery, "refused", self.now)

    @precondition(lambda self: self.on_their_way)
    @rule()
    def a_destination_takes_everything(self) -> None:
        delivery = self.on_their_way.pop(0)
        statuses = dict.fromkeys(delivery.remaining, 0)
        self.books.jobs.accepted(delivery.id, statuses, self.now)
        self._unless_given_up(delivery, self.books.jobs.delivered, delivery, "all", self.now)

    def _unless_given_up(self, delivery: DueDelivery, act: Any, *arguments: Any) -> None:
        if self._deliveries()[delivery.id]["state"] == Delivery.DISCARDED:
            with pytest.raises(JournalError, match="a delivery that is discarded cannot"):
                act(*arguments)
        else:
            act(*arguments)

    # the operator, and what happens to machines

    @rule(data=st.data(), act=st.sampled_from(["retry", "discard"]))
    def the_operator_acts_on_a_job(self, data: st.DataObject, act: str) -> None:
        jobs = self._jobs()
        if not jobs:
            return
        number = data.draw(st.sampled_from(sorted(jobs)))
        event = Event.RETRIED if act == "retry" else Event.DROPPED
        allowed = (State(jobs[number]["state"]), event) in TRANSITIONS
        try:
            if act == "retry":
                self.books.jobs.retry_job(number, self.now)
            else:
                self.books.jobs.discard_job(number, "not wanted", self.now)
        except JournalError:
            assert not allowed
        else:
            assert allowed

    @rule()
    def the_operator_retries_what_is_parked(self) -> None:
        for delivery in self.books.jobs.deliveries_in_state(Delivery.PARKED):
            self.books.jobs.retry_delivery(delivery, self.now)

    @rule()
    def the_node_is_killed_and_starts_again(self) -> None:
        self.books.database.close()
        self.books = Books(Path(self.folder.name, "journal.db"))
        self.books.journal.recover(self.now)
        self.books.jobs.recover(self.now)
        self.associations, self.running, self.on_their_way, self.seen = [], [], [], {}

    # what must hold after every step

    def _series(self) -> list[dict[str, Any]]:
        return self.books.history.series()

    def _jobs(self) -> dict[int, dict[str, Any]]:
        return {job["id"]: job for series in self._series() for job in series["jobs"]}

    def _deliveries(self) -> dict[int, dict[str, Any]]:
        jobs = self._jobs().values()
        return {delivery["id"]: delivery for job in jobs for delivery in job["deliveries"]}

    def _jobs_in(self, state: State) -> list[int]:
        return [number for number, job in self._jobs().items() if job["state"] == state]

    @invariant()
    def nothing_acknowledged_is_lost(self) -> None:
        for uid, instances in self.acknowledged.items():
            assert set(self.books.journal.instance_uids(uid)) == instances
        assert {s["series_uid"] for s in self._series()} == {
            uid for uid, instances in self.acknowledged.items() if instances
        }

    @invariant()
    def every_change_of_a_state_is_in_the_tables(self) -> None:
        states = {("job", number): job["state"] for number, job in self._jobs().items()}
        states |= {("delivery", n): d["state"] for n, d in self._deliveries().items()}
        for key, state in states.items():
            old = self.before.get(key)
            changes = CHANGES if key[0] == "job" else DELIVERY_CHANGES
            assert old in (None, state) or (old, state) in changes
            first = State.QUEUED if key[0] == "job" else Delivery.WAITING
            assert old is not None or state == first
        assert self.before.keys() <= states.keys()
        self.before = states

    @invariant()
    def done_means_that_every_destination_has_every_instance(self) -> None:
        for job in self._jobs().values():
            if job["state"] == State.DONE:
                for delivery in job["deliveries"]:
                    assert delivery["state"] == Delivery.DELIVERED
                    assert delivery["accepted"] == delivery["instances"] > 0

    @invariant()
    def nothing_is_stuck(self) -> None:
        running = {job.id for job in self.running}
        for series in self._series():
            assert series["open"] or series["outcome"]
        for number, job in self._jobs().items():
            states = {delivery["state"] for delivery in job["deliveries"]}
            owed = states & {Delivery.WAITING, Delivery.PARKED}
            assert (job["state"] == State.TRANSLATING) == (number in running)
            assert bool(owed) or job["state"] != State.SENDING
            assert not owed or job["state"] == State.SENDING or job["retracts"] is not None

    @invariant()
    def an_earlier_result_that_may_be_there_is_withdrawn_or_kept_and_noted(self) -> None:
        for series in self._series():
            jobs = {job["id"]: job for job in series["jobs"]}
            withdrawn = [job["retracts"] for job in jobs.values() if job["retracts"] is not None]
            assert len(withdrawn) == len(set(withdrawn))
            timeline = self.books.history.one_series(series["series_uid"])
            assert timeline is not None
            kept = any("both will be there" in event["text"] for event in timeline["timeline"])
            assert not kept or self.policy == "keep"
            closed = series["generation"] - int(series["open"])
            for number, job in jobs.items():
                if job["retracts"] is not None or job["generation"] >= closed:
                    continue
                reached = {d["destination"] for d in job["deliveries"] if d["accepted"]}
                if self.policy == "keep":
                    assert not reached or kept
                    continue
                assert not reached or number in withdrawn
                assert job["state"] not in (State.SENDING, State.DONE)

    @invariant()
    def a_withdrawal_reaches_every_destination_that_was_reached(self) -> None:
        jobs = self._jobs()
        for job in jobs.values():
            if job["retracts"] is None:
                continue
            before = jobs[job["retracts"]]["deliveries"]
            reached = {d["destination"] for d in before if d["accepted"]}
            assert reached <= {d["destination"] for d in job["deliveries"]}


LifeOfASeries.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestLifeOfASeries = LifeOfASeries.TestCase


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path / "journal.db")


def _closed(books: Books, *indices: int, now: float = 10.0) -> Job:
    """A series of these instances, closed and its job claimed."""
    for index in indices:
        books.journal.record_instance(_arrival("1.1", index), now)
    series = books.open_series("1.1")
    assert books.jobs.close_series(series, "routed", [(ROUTE, "routine")], [], now)
    job = books.jobs.claim(now)
    assert job is not None
    return job


def _derived(books: Books, job: Job, *uids: str, event: Event = Event.DERIVED) -> State:
    made = [Output("2.1", uid, "1.2") for uid in uids]
    return books.jobs.derived(job, made, ["pacs"], {"finite": 1}, event, 20.0)


def _texts(books: Books, uid: str = "1.1") -> str:
    series = books.history.one_series(uid)
    assert series is not None
    return "\n".join(event["text"] for event in series["timeline"])


def test_closing_is_overtaken_by_an_arrival_in_between(books: Books) -> None:
    books.journal.record_instance(_arrival("1.1", 1), 10)
    seen = books.open_series("1.1")
    books.journal.record_instance(_arrival("1.1", 2), 11)
    assert not books.jobs.close_series(seen, "routed", [(ROUTE, "stat")], ["complete"], 12)
    assert books.jobs.claim(12) is None
    assert "complete" not in _texts(books)


def test_closing_is_overtaken_even_by_an_arrival_of_the_same_moment(books: Books) -> None:
    books.journal.record_instance(_arrival("1.1", 1), 10)
    seen = books.open_series("1.1")
    books.journal.record_instance(_arrival("1.1", 2), 10)
    assert not books.jobs.close_series(seen, "routed", [], [], 12)


def test_a_repeat_keeps_an_open_series_waiting_and_a_closed_one_closed(books: Books) -> None:
    books.journal.record_instance(_arrival("1.1", 1), 10)
    books.journal.record_instance(_arrival("1.1", 1), 15)
    assert books.open_series("1.1").last_received == 15
    books.jobs.close_series(books.open_series("1.1"), "ignored", [], [], 20)
    books.journal.record_instance(_arrival("1.1", 1), 30)
    assert books.journal.open_series() == []


def test_a_late_instance_opens_a_new_generation_or_is_only_kept(books: Books) -> None:
    _closed(books, 1)
    books.journal.record_instance(_arrival("1.1", 2), 30, late="hold")
    assert books.journal.open_series() == []
    assert "stored, not translated (hold)" in _texts(books)
    books.journal.record_instance(_arrival("1.1", 3), 40, late="regenerate")
    assert books.open_series("1.1").generation == 2
    assert books.journal.instance_uids("1.1") == ["1.1.1", "1.1.2", "1.1.3"]


@pytest.mark.parametrize("event", [Event.DERIVED, Event.IMPLAUSIBLE, *WHERE_NO_RESULT])
def test_a_translation_that_was_overtaken_counts_for_nothing(books: Books, event: Event) -> None:
    job = _closed(books, 1, 2)
    books.journal.record_instance(_arrival("1.1", 3), 15)
    if event in WHERE_NO_RESULT:
        state = books.jobs.finish(job, event, 20, code="CODE")
    else:
        state = _derived(books, job, "2.1.1", event=event)
    assert state is State.SUPERSEDED
    assert books.jobs.due_deliveries(99) == []


def test_a_lost_worker_of_an_overtaken_generation_counts_for_nothing(books: Books) -> None:
    job = _closed(books, 1, 2)
    books.journal.record_instance(_arrival("1.1", 3), 15)
    assert books.jobs.lost(job, "it ended", 20, crashed=True) is State.SUPERSEDED


def test_what_was_not_yet_sent_gives_way_to_a_new_generation(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1")
    second = _closed(books, 2, now=30)
    assert books.jobs.in_state(State.SUPERSEDED) == [1]
    assert books.jobs.deliveries_in_state(Delivery.DISCARDED) == [1]
    assert second.generation == 2


def _sent(books: Books, *uids: str, job: Job | None = None) -> None:
    """Series 1.1 translated, and these instances taken by the destination."""
    _derived(books, job or _closed(books, 1), "2.1.1", "2.1.2")
    (due,) = books.jobs.due_deliveries(20)
    assert books.jobs.begin(due.id)
    books.jobs.accepted(due.id, dict.fromkeys(uids, 0), 21)
    if uids == due.remaining:
        books.jobs.delivered(due, "all", 22)


@pytest.mark.parametrize("uids", [("2.1.1", "2.1.2"), ("2.1.1",), ()])
def test_what_may_have_been_sent_is_withdrawn_before_a_new_generation_is_sent(
    books: Books, uids: tuple[str, ...]
) -> None:
    _sent(books, *uids)
    withdrawal = _closed(books, 2, now=30)  # claimed before the translation, whatever the route
    assert (withdrawal.retracts, withdrawal.generation) == (1, 2)
    assert books.jobs.in_state(State.SUPERSEDED) == [1]
    translation = books.jobs.claim(31)
    assert translation is not None
    made = [Output("2.2", "2.2.1", "1.2")]
    books.jobs.derived(translation, made, ["pacs", "archive"], {}, Event.DERIVED, 32)
    (other,) = books.jobs.due_deliveries(33)
    assert (other.destination, other.job) == ("archive", translation.id)  # has nothing of before
    books.jobs.derived(withdrawal, [Output("9.1", "9.1.1", "1.3")], [], {}, Event.DERIVED, 34)
    first, *_ = books.jobs.due_deliveries(35)
    assert (first.job, first.destination, first.remaining) == (withdrawal.id, "pacs", ("9.1.1",))
    books.jobs.accepted(first.id, {"9.1.1": 0}, 36)
    books.jobs.delivered(first, "1 instances", 36)
    assert {d.destination for d in books.jobs.due_deliveries(37)} == {"pacs", "archive"}
    assert "job 2 withdraws what job 1 made from pacs; only then is generation 2 sent" in _texts(
        books
    )


def test_a_withdrawal_that_was_given_up_lets_the_new_generation_go(books: Books) -> None:
    _sent(books, "2.1.1")
    withdrawal = _closed(books, 2, now=30)
    translation = books.jobs.claim(31)
    assert translation is not None
    _derived(books, translation, "2.2.1")
    assert books.jobs.due_deliveries(33) == []
    books.jobs.finish(withdrawal, Event.BROKE, 34, code="CODE")
    assert books.jobs.due_deliveries(35) == []
    books.jobs.discard_job(withdrawal.id, "done by hand", 36)
    assert [d.job for d in books.jobs.due_deliveries(37)] == [translation.id]


def test_a_withdrawal_is_not_overtaken_by_a_third_generation(books: Books) -> None:
    _sent(books, "2.1.1")
    withdrawal = _closed(books, 2, now=30)
    books.journal.record_instance(_arrival("1.1", 3), 31)
    made = [Output("9.1", "9.1.1", "1.3")]
    assert books.jobs.derived(withdrawal, made, [], {}, Event.DERIVED, 32) is State.SENDING
    _closed(books, 4, now=33)
    assert [job["retracts"] for job in books.history.series()[0]["jobs"]].count(1) == 1


def test_withdrawn_uids_are_known(books: Books) -> None:
    _sent(books, "2.1.1")
    assert books.jobs.withdrawn("1.1") == frozenset()
    _closed(books, 2, now=30)
    assert books.jobs.withdrawn("1.1") == {"2.1"}
    assert books.jobs.outputs(1) == [Output("2.1", uid, "1.2") for uid in ("2.1.1", "2.1.2")]


def test_a_site_may_keep_both_and_the_timeline_says_so(books: Books) -> None:
    _sent(books, "2.1.1")
    books.journal.record_instance(_arrival("1.1", 2), 30)
    seen = books.open_series("1.1")
    routes = [(ROUTE, "routine")]
    assert books.jobs.close_series(seen, "routed", routes, [], 31, on_superseded="keep")
    assert books.jobs.in_state(State.SENDING) == [1]
    assert "generation 1 stays at pacs: both will be there" in _texts(books)


def test_nothing_is_withdrawn_from_where_no_association_came_about(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1")
    (due,) = books.jobs.due_deliveries(20)
    assert books.jobs.begin(due.id)
    books.jobs.postpone(due, 50, "not listening", 21, sent=False)
    assert _closed(books, 2, now=30).retracts is None


def test_instances_that_arrive_after_their_delivery_was_given_up_are_noted(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1")
    (due,) = books.jobs.due_deliveries(20)
    assert books.jobs.begin(due.id)
    _closed(books, 2, now=30)
    books.jobs.accepted(due.id, {"2.1.1": 0}, 31)
    assert "1 instances reached pacs after they were given up" in _texts(books)


def test_a_delivery_that_was_given_up_is_not_begun(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1")
    (due,) = books.jobs.due_deliveries(20)
    books.jobs.discard_job(1, "not wanted", 21)
    assert not books.jobs.begin(due.id)


def test_a_delivery_that_was_given_up_is_not_put_off(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1")
    (due,) = books.jobs.due_deliveries(20)
    books.jobs.discard_job(1, "not wanted", 21)
    books.jobs.postpone(due, 99, "absent", 22)
    assert "put off" not in _texts(books)


def test_only_what_is_missing_is_sent_again(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1", "2.1.2", "2.1.3")
    (due,) = books.jobs.due_deliveries(20)
    assert due.remaining == ("2.1.1", "2.1.2", "2.1.3")
    books.jobs.accepted(due.id, {"2.1.1": 0, "2.1.3": 0xB000}, 21)
    books.jobs.accepted(due.id, {"2.1.1": 0}, 21)  # told twice, counted once
    books.jobs.postpone(due, 50, "absent", 21)
    assert books.jobs.due_deliveries(49) == []
    (again,) = books.jobs.due_deliveries(50)
    assert (again.remaining, again.attempts) == (("2.1.2",), 1)


def test_a_job_made_again_otherwise_owes_only_what_it_made_last(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1", event=Event.IMPLAUSIBLE)
    books.jobs.retry_job(1, 30)  # after the route was changed to qa: flag: other UIDs
    job = books.jobs.claim(31)
    assert job is not None
    _derived(books, job, "2.7.1")
    (due,) = books.jobs.due_deliveries(40)
    assert due.remaining == ("2.7.1",)


def _lose(books: Books, job: Job, *, times: int, crashed: bool) -> tuple[Job, State]:
    """Lose the worker of a claimed job so often; the job as last claimed, and its state."""
    state = State.TRANSLATING
    for turn in range(times):
        if turn:
            again = books.jobs.claim(20 + turn)
            assert again is not None
            job = again
        state = books.jobs.lost(job, "dicomnode-worker ended", 20 + turn, crashed=crashed)
    return job, state


def test_a_job_over_which_five_workers_crashed_is_parked(books: Books) -> None:
    _job, state = _lose(books, _closed(books, 1), times=4, crashed=True)
    assert state is State.QUEUED
    again = books.jobs.claim(30)
    assert again is not None
    assert books.jobs.lost(again, "crashed", 31, crashed=True) is State.FAILED


def test_killing_the_worker_from_outside_does_not_park_a_job_soon(books: Books) -> None:
    job, state = _lose(books, _closed(books, 1), times=24, crashed=False)
    assert (job.attempts, state) == (24, State.QUEUED)
    again = books.jobs.claim(50)
    assert again is not None
    assert books.jobs.lost(again, "killed", 51, crashed=False) is State.FAILED


def test_a_job_that_brings_the_whole_node_down_is_parked_in_the_end(books: Books) -> None:
    job = _closed(books, 1)
    for turn in range(25):
        if turn:
            assert books.jobs.claim(20 + turn) is not None
        books.jobs.recover(20 + turn)
    assert books.jobs.in_state(State.FAILED) == [job.id]


def test_a_job_that_lost_its_worker_goes_behind_those_that_wait(books: Books) -> None:
    first = _closed(books, 1)
    books.journal.record_instance(_arrival("1.2", 1), 10)
    seen = books.open_series("1.2")
    books.jobs.close_series(seen, "routed", [(ROUTE, "routine")], [], 11)
    books.jobs.lost(first, "killed", 20, crashed=False)
    order = [books.jobs.claim(21), books.jobs.claim(22)]
    assert [job and job.series_uid for job in order] == ["1.2", "1.1"]


def test_the_operators_retry_has_all_its_attempts(books: Books) -> None:
    job, state = _lose(books, _closed(books, 1), times=5, crashed=True)
    assert state is State.FAILED
    books.jobs.retry_job(job.id, 23)
    retried = books.jobs.claim(24)
    assert retried is not None
    assert retried.attempts == 1
    assert books.jobs.lost(retried, "crashed", 25, crashed=True) is State.QUEUED


def test_urgent_jobs_come_first_then_the_oldest(books: Books) -> None:
    for uid, routes in (("1.1", ["offpeak", "routine"]), ("1.2", ["stat", "routine"])):
        books.journal.record_instance(_arrival(uid, 1), 10)
        pairs = [(priority, priority) for priority in routes]
        books.jobs.close_series(books.open_series(uid), "routed", pairs, [], 11)
    claimed = [books.jobs.claim(12) for _ in range(5)]
    assert [job and (job.series_uid, job.route) for job in claimed] == [
        ("1.2", "stat"),
        ("1.1", "routine"),
        ("1.2", "routine"),
        ("1.1", "offpeak"),
        None,
    ]


def test_a_parked_delivery_keeps_its_job_and_starts_afresh_when_retried(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1")
    (due,) = books.jobs.due_deliveries(20)
    books.jobs.park(due, "refused for good", 21)
    assert books.jobs.due_deliveries(99) == []
    assert books.jobs.in_state(State.SENDING) == [1]
    books.jobs.retry_delivery(due.id, 1000)
    (again,) = books.jobs.due_deliveries(1000)
    assert (again.attempts, again.created) == (0, 1000)


def test_a_stop_marks_the_series_whose_sender_was_cut_off(books: Books) -> None:
    for uid in SERIES:
        number = books.journal.begin_association("CT1", "DICOMNODE", "127.0.0.1", 1)
        books.journal.record_instance(_arrival(uid, 1, number), 10)
        if uid == "1.1":
            books.journal.end_association(number, "released", 11)
    books.journal.recover(20)
    assert [books.open_series(uid).interrupted for uid in SERIES] == [False, True]
    number = books.journal.begin_association("CT1", "DICOMNODE", "127.0.0.1", 21)
    books.journal.record_instance(_arrival("1.2", 1, number), 22)  # sent again: a repeat
    books.journal.end_association(number, "released", 23)
    assert not books.open_series("1.2").interrupted


def test_a_stop_puts_a_running_translation_back(books: Books) -> None:
    job = _closed(books, 1)
    books.jobs.recover(20)
    again = books.jobs.claim(21)
    assert again is not None
    assert (again.id, again.attempts, again.created) == (job.id, 2, job.created)


def test_other_bytes_under_a_known_uid_are_on_the_record(books: Books) -> None:
    books.journal.record_instance(_arrival("1.1", 1), 10)
    books.journal.record_conflict(_arrival("1.1", 1), 11)
    series = books.history.one_series("1.1")
    assert series is not None
    assert series["quarantined"] == ["1.1.1"]
    assert "came again with other bytes" in _texts(books)


def test_what_is_recorded_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    first = Books(path)
    first.journal.record_instance(_arrival("1.1", 1), 10)
    second = Books(path)  # the first is never closed
    assert second.journal.known("1.1.1") == ("1.1", "0" * 64, False)
    assert second.journal.planes("1.1") == first.journal.planes("1.1")


# the tables


def test_nothing_but_the_table_changes_a_state() -> None:
    for state in State:
        for event in Event:
            if (state, event) in TRANSITIONS:
                assert after(state, event) is TRANSITIONS[state, event]
            else:
                with pytest.raises(JournalError, match="cannot be"):
                    after(state, event)
    with pytest.raises(JournalError, match="a delivery that is delivered cannot be dropped"):
        delivery_after(Delivery.DELIVERED, "dropped")


def test_every_state_can_be_reached_and_left_unless_it_is_final() -> None:
    assert {State.QUEUED, *TRANSITIONS.values()} == set(State)
    assert {state for state, _ in TRANSITIONS} == (set(State) - FINAL) | {State.DONE}
    left = [event for state, event in TRANSITIONS if state is State.DONE]
    assert left == [Event.OVERTAKEN, Event.NOT_COMMITTED]


# the database


def test_a_journal_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    database = Database(path)
    with database.write() as db:
        db.exec_driver_sql("UPDATE meta SET value = '999' WHERE key = 'schema'")
    database.close()
    with pytest.raises(JournalError, match="schema 999, this version reads"):
        Database(path)


def test_a_file_that_is_no_journal_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is no database, but long enough to be looked at" * 100)
    with pytest.raises(JournalError, match="cannot open the journal"):
        Database(path)


def test_no_journal_is_made_when_there_is_none_to_read(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal at"):
        Database(tmp_path / "journal.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_change_that_fails_is_undone_whole(books: Books) -> None:
    def change(db: Connection) -> None:
        note(db, "1.1", 1.0, "never happened")
        raise JournalError("broken off")

    with pytest.raises(JournalError, match="broken off"):
        books.database.commit(change)
    books.journal.record_instance(_arrival("1.1", 1), 10)
    assert "never happened" not in _texts(books)


def test_many_threads_record_at_once_and_none_is_lost(books: Books) -> None:
    def record(thread: int) -> None:
        for index in range(10):
            books.journal.record_instance(_arrival("1.1", thread * 100 + index), 10.0 + index)

    threads = [threading.Thread(target=record, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(books.journal.instance_uids("1.1")) == 80


def test_history_can_be_written_as_json(books: Books) -> None:
    _derived(books, _closed(books, 1), "2.1.1")
    for view in (books.history.series(), books.history.one_series("1.1"), books.history.counts()):
        assert json.loads(json.dumps(view, allow_nan=False)) == view


def test_who_only_reads_waits_for_nobody_who_writes(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    database = Database(path)
    Journal(database).record_instance(_arrival("1.2", 1), 10.0)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    assert [one.series_uid for one in Journal(database).open_series()] == ["1.2"]
    assert Journal(database).known("1.2.1") is not None
    writer.rollback()
    writer.close()
    database.close()
