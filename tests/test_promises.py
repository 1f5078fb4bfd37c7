"""What destinations are to commit, in the journal; and retention over any history of it."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from dicomnode.config import RetentionSection
from dicomnode.errors import JournalError
from dicomnode.history import History
from dicomnode.jobs import Jobs, Output
from dicomnode.journal import Arrival, Journal
from dicomnode.lifecycle import FINAL, Delivery, Event, State
from dicomnode.promises import TRANSITIONS, Promise, Promises
from dicomnode.retention import Rules, make_room, purge
from dicomnode.spool import Spool
from dicomnode.tables import Database
from dicomnode.transactions import Commitment, Transactions
from tests.test_commitment_scu import CT, UIDS, Delivered
from tests.test_journal import RAM

ALL = [(CT, uid, 0) for uid in UIDS]
ONE_LOST = [*ALL[:2], (CT, UIDS[2], 0x0112)]


@pytest.fixture
def delivered(tmp_path: Path) -> Delivered:
    return Delivered(tmp_path / "data")


@pytest.fixture
def asked(delivered: Delivered) -> str:
    """The transaction UID of a request to `pacs`."""
    delivered.promises.expect(["pacs"], 4)
    return delivered.promises.begin(1)


def late_instance(delivered: Delivered, now: float) -> None:
    facts = ("1.1", "1", "CT", CT, "1.2", "0" * 64, 1, "CT1", "DICOMNODE", None, None)
    journal = Journal(delivered.database)
    journal.record_instance(Arrival("1.1.2", *facts), now)
    (seen,) = journal.open_series()
    delivered.jobs.close_series(seen, "routed", [("r", "routine")], [], now)


def test_a_delivery_is_asked_for_once_and_only_of_those_who_commit(delivered: Delivered) -> None:
    delivered.promises.expect([], 4)
    assert delivered.promises.due(5) == []
    delivered.promises.expect(["pacs"], 4)
    delivered.promises.expect(["pacs"], 4)
    (owed,) = delivered.promises.due(5)
    assert (owed.delivery, owed.peer, owed.attempts, owed.since) == (1, "pacs", 0, 4)
    assert delivered.promises.references(1) == [(CT, uid) for uid in UIDS]


def test_a_result_that_gave_way_need_not_be_committed(delivered: Delivered, asked: str) -> None:
    late_instance(delivered, 10)
    delivered.promises.step(11)
    assert delivered.state is Promise.DISCARDED
    delivered.promises.reported(asked, ONE_LOST, 12)
    assert delivered.state is Promise.DISCARDED


def test_what_is_being_sent_again_gives_way_too(delivered: Delivered, asked: str) -> None:
    delivered.promises.reported(asked, ONE_LOST, 5)
    late_instance(delivered, 10)
    delivered.promises.step(11)
    assert delivered.state is Promise.DISCARDED
    assert delivered.jobs.in_state(State.SUPERSEDED) == [1]


def test_a_late_report_commits_what_was_parked_and_does_no_harm_otherwise(
    delivered: Delivered, asked: str
) -> None:
    (owed,) = delivered.promises.due(5)
    delivered.promises.park(owed, "away", 6)
    delivered.promises.reported(asked, ONE_LOST, 7)
    assert (delivered.state, delivered.detail) == (Promise.PARKED, "away")
    delivered.promises.reported(asked, ALL, 8)
    assert delivered.state is Promise.COMMITTED


def test_a_report_from_before_the_last_sending_is_outdated(
    delivered: Delivered, asked: str
) -> None:
    delivered.promises.reported(asked, ONE_LOST, 5)
    delivered.promises.reported(asked, ALL, 6)  # of the same request: while it is sent again
    assert delivered.state is Promise.RESENDING
    delivered.deliver(7)
    delivered.promises.step(8)
    delivered.promises.reported(asked, ALL, 9)
    assert delivered.state is Promise.ASKING
    assert delivered.promises.peer_of(asked) == "pacs"  # and it is known still
    delivered.promises.reported(delivered.promises.begin(1), ALL, 10)
    assert delivered.state is Promise.COMMITTED


def test_a_parked_resend_goes_on_when_the_delivery_is_retried(
    delivered: Delivered, asked: str
) -> None:
    delivered.promises.reported(asked, ONE_LOST, 5)
    (due,) = delivered.jobs.due_deliveries(6)
    delivered.jobs.park(due, "refused", 6)
    delivered.promises.step(7)
    assert delivered.state is Promise.RESENDING
    delivered.jobs.retry_delivery(1, 8)
    delivered.deliver(9)
    delivered.promises.step(10)
    assert delivered.state is Promise.ASKING


def test_after_a_start_what_was_asked_is_asked_again_soon(delivered: Delivered, asked: str) -> None:
    (owed,) = delivered.promises.due(5)
    delivered.promises.accepted(owed, 3000, 6)
    delivered.promises.step(100)
    assert delivered.state is Promise.ASKED
    delivered.promises.recover(["pacs"], 100)
    delivered.promises.step(109)
    assert delivered.state is Promise.ASKED
    delivered.promises.step(111)
    (owed,) = delivered.promises.due(111)
    delivered.promises.postpone(owed, 3000, "absent")
    assert delivered.promises.due(200) == []
    delivered.promises.recover(["pacs"], 200)
    assert [one.detail for one in delivered.promises.due(210)] == ["absent"]
    delivered.promises.reported(asked, ALL, 212)
    assert delivered.state is Promise.COMMITTED


def test_who_need_not_commit_any_more_is_forgotten_until_it_must_again(
    delivered: Delivered, asked: str
) -> None:
    delivered.promises.recover([], 10)
    assert (delivered.state, delivered.promises.peer_of(asked)) == (None, None)
    delivered.promises.expect(["pacs"], 11)
    delivered.promises.reported(delivered.promises.begin(1), ALL, 12)
    delivered.promises.recover([], 13)
    assert delivered.state is Promise.COMMITTED


def test_an_operator_may_do_without_unless_it_is_committed(
    delivered: Delivered, asked: str
) -> None:
    delivered.promises.discard(1, "the archive is gone", 5)
    assert delivered.state is Promise.DISCARDED
    with pytest.raises(JournalError, match="a commitment that is discarded cannot be given up"):
        delivered.promises.discard(1, "again", 6)
    with pytest.raises(JournalError, match="no commitment is asked for delivery 9"):
        delivered.promises.retry(9, 6)
    delivered.promises.reported(asked, ALL, 7)
    assert delivered.state is Promise.DISCARDED


def test_every_state_of_a_commitment_can_be_reached_and_left_unless_it_is_final() -> None:
    assert {Promise.ASKING, *TRANSITIONS.values()} == set(Promise)
    left = {state for state, _ in TRANSITIONS}
    assert set(Promise) - left == {Promise.COMMITTED, Promise.DISCARDED}


# retention over any history


@dataclass(frozen=True)
class Request:
    """What was asked of `pacs`, and how often its delivery had been sent then."""

    uid: str
    delivery: int
    sent: int


class WhatMayGo(RuleBasedStateMachine):
    """Series come, are translated, sent, committed or not, parked, superseded; retention runs at
    any moment and with any time and room. `pacs` is to commit, `other` is not."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=RAM)
        self.spool = Spool(Path(self.folder.name))
        self.spool.prepare()
        self.database = Database(self.spool.root / "journal.db")
        self.jobs, self.promises = Jobs(self.database), Promises(self.database)
        self.journal, self.history = Journal(self.database), History(self.database)
        self.transactions = Transactions(self.database)
        self.now = 1000.0
        self.requests: list[Request] = []
        self.sent: Counter[int] = Counter()
        self.kept: set[int] = set()
        """Deliveries that `pacs` has committed, or an operator did without."""
        self.ours: set[str] = set()
        """Series of which we have committed an instance to somebody."""

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    @initialize()
    def one_series_is_on_its_way(self) -> None:
        self.an_instance_arrives("1.1", 1)
        self.a_series_closes("1.1")
        self.a_job_runs(Event.DERIVED)

    @rule(uid=st.sampled_from(["1.1", "1.2"]), index=st.integers(1, 2))
    def an_instance_arrives(self, uid: str, index: int) -> None:
        self.now += 1
        sop = f"{uid}.{index}"
        known = self.journal.known(sop)
        if known is None or known[2]:
            part = self.spool.incoming / sop
            part.write_bytes(b"received")
            self.spool.keep(part, uid, sop)
            part.unlink()
        facts = (uid, "1", "CT", CT, "1.2", "0" * 64, 8, "CT1", "DICOMNODE", None, None)
        self.journal.record_instance(Arrival(sop, *facts), self.now)

    @rule(uid=st.sampled_from(["1.1", "1.2"]))
    def a_series_closes(self, uid: str) -> None:
        for seen in self.journal.open_series():
            if seen.series_uid == uid:
                self.jobs.close_series(seen, "routed", [("r", "routine")], [], self.now)

    @rule(event=st.sampled_from([*[Event.DERIVED] * 3, Event.IMPLAUSIBLE, Event.BROKE]))
    def a_job_runs(self, event: Event) -> None:
        job = self.jobs.claim(self.now)
        if job is None:
            return
        if event is Event.BROKE:
            self.jobs.finish(job, event, self.now)
            return
        made = [Output(f"2.{job.id}", f"2.{job.id}.{n}", CT) for n in (1, 2)]
        for output in made:
            path = self.spool.result_path(output.series_uid, output.sop_instance_uid)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"derived")
        self.jobs.derived(job, made, ["pacs", "other"], {}, event, self.now)

    @rule(data=st.data(), how=st.sampled_from([*["delivered"] * 4, "parked", "put off"]))
    def a_delivery_ends(self, data: st.DataObject, how: str) -> None:
        due = self.jobs.due_deliveries(self.now)
        if not due:
            return
        one = data.draw(st.sampled_from(due))
        assert self.jobs.begin(one.id)
        for uid in one.remaining:  # what is sent must be there
            assert self.spool.result_path(f"2.{one.job}", uid).is_file()
        if how == "parked":
            self.jobs.park(one, "refused", self.now)
        elif how == "put off":
            self.jobs.accepted(one.id, {one.remaining[0]: 0}, self.now)
            self.jobs.postpone(one, self.now, "absent", self.now)
        else:
            self.jobs.accepted(one.id, dict.fromkeys(one.remaining, 0), self.now)
            self.jobs.delivered(one, "", self.now)
            self.sent[one.id] += 1
            self.promises.expect(["pacs"], self.now)
            self.promises.step(self.now)

    @rule()
    def pacs_is_asked(self) -> None:
        self.promises.expect(["pacs"], self.now)
        self.promises.step(self.now)
        for owed in self.promises.due(self.now):
            assert owed.peer == "pacs"
            uid = self.promises.begin(owed.delivery)
            self.requests.append(Request(uid, owed.delivery, self.sent[owed.delivery]))
            self.promises.accepted(owed, self.now + 60, self.now)

    @rule(data=st.data(), lost=st.sampled_from([0, 0, 0, 1, 2]))
    def pacs_reports(self, data: st.DataObject, lost: int) -> None:
        if not self.requests:
            return
        request = data.draw(st.sampled_from(self.requests))
        references = self.promises.references(request.delivery)
        results = [
            (sop, uid, 0x0112 if place < lost else 0) for place, (sop, uid) in enumerate(references)
        ]
        self.promises.reported(request.uid, results, self.now)
        if not lost and request.sent == self.sent[request.delivery]:
            self.kept.add(request.delivery)

    @rule()
    def we_commit_to_somebody(self) -> None:
        uid, series = f"9.{int(self.now * 1000)}", "1.2"
        self.now += 1
        known = self.journal.known("1.2.1")
        if known is None or known[2] or not self.transactions.ask(uid, "ct", [(CT, "1.2.1")], 1):
            return
        for transaction in self.transactions.due(Commitment.CHECKING, self.now):
            self.transactions.checked(transaction, [0], self.now)
            self.ours.add(series)

    @rule(act=st.sampled_from(["retry", "discard", "do without"]), data=st.data())
    def an_operator_acts(self, act: str, data: st.DataObject) -> None:
        parked = self.promises.parked()
        if act == "retry":
            for delivery in parked:
                self.promises.retry(delivery, self.now)
            for delivery in self.jobs.deliveries_in_state(Delivery.PARKED):
                self.jobs.retry_delivery(delivery, self.now)
        elif act == "do without" and parked:
            delivery = data.draw(st.sampled_from(parked))
            self.promises.discard(delivery, "not needed", self.now)
            self.kept.add(delivery)
        elif failed := self.jobs.in_state(State.FAILED):
            self.jobs.discard_job(failed[0], "not wanted", self.now)

    @rule(hours=st.sampled_from([0.0, 0.001, 0.1]))
    def time_passes(self, hours: float) -> None:
        self.now += hours * 3600 + 1

    @rule()
    def the_node_starts_again(self) -> None:
        self.jobs.recover(self.now)
        self.promises.recover(["pacs"], self.now)

    @rule(early=st.booleans(), hours=st.sampled_from([0.0, 0.05]))
    def retention_runs(self, early: bool, hours: float) -> None:
        before = self._files()
        times = RetentionSection(hours, hours, watermark_free_gb=1e6)  # no disk has so much free
        rules = Rules(times, frozenset({"pacs"}))
        (make_room if early else purge)(self.database, self.spool, rules, self.now)
        gone = before - self._files()
        for series in self.history.series():
            uid = series["series_uid"]
            jobs = series["jobs"]
            if uid in gone:
                assert not series["open"]
                assert all(self._may_lose_its_source(job) for job in jobs)
                assert not early or uid not in self.ours
                assert not early or any(self._was_delivered(job) for job in jobs)
            for job in jobs:
                if f"2.{job['id']}" in gone:
                    assert self._may_lose_its_source(job)
                    assert not early or self._was_delivered(job)

    def _files(self) -> set[str]:
        """Series with files: received and derived."""
        folders = (self.spool.received, self.spool.results)
        return {path.parent.name for folder in folders for path in folder.glob("*/*.dcm")}

    def _may_lose_its_source(self, job: dict[str, Any]) -> bool:
        """Delivered everywhere, and committed where it must be; or nobody wants it any more."""
        if job["state"] != State.DONE:
            return job["state"] in FINAL
        return all(
            delivery["state"] == Delivery.DELIVERED
            and (delivery["destination"] != "pacs" or delivery["id"] in self.kept)
            for delivery in job["deliveries"]
        )

    def _was_delivered(self, job: dict[str, Any]) -> bool:
        return job["state"] == State.DONE and bool(job["deliveries"])


WhatMayGo.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestWhatMayGo = WhatMayGo.TestCase
