"""Commitments we ask of destinations, in the journal: one per delivery that is complete.

A promise changes its state only along `TRANSITIONS`. A transaction UID is written down before its
request goes out, so that a report is understood whatever happened meanwhile. What is not committed
is sent again, by the delivery itself, `MOST_RESENDS` times; then the promise is parked.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydicom.uid import generate_uid
from sqlalchemy import Connection, Select, exists, select

from dicomnode import tables as t
from dicomnode.errors import JournalError
from dicomnode.generations import advance
from dicomnode.lifecycle import ACCEPTED, Delivery, Event, State, delivery_after
from dicomnode.tables import Database, note
from dicomnode.transactions import Reference, Result

PROCESSING_FAILURE = 0x0110
"""Our FailureReason for an instance that a report does not name (PS3.3 C.14.1.1)."""
FOR_GOOD = (0x0119, 0x0122)
"""FailureReasons that sending again does not mend: class/instance conflict, class not supported."""
MOST_RESENDS = 2
_AFTER_START_SECONDS = 10.0
"""A report may have come while we were away: ask again this soon after a start."""
_NO_REPORT = {"overdue": "no report in time"}
_AT_A_TIME = 100
_GIVEN_UP = (State.SUPERSEDED, State.DISCARDED)


class Promise(StrEnum):
    """State of a commitment that a destination is to make."""

    ASKING = "asking"
    """The request is to be sent (again)."""
    ASKED = "asked"
    """The destination has accepted the request; its report is awaited."""
    COMMITTED = "committed"
    RESENDING = "resending"
    """Not committed: the delivery sends what is missing once more."""
    PARKED = "parked"
    """Refused, not committed in the end, or no report in time; the detail says why."""
    DISCARDED = "discarded"
    """Nobody needs it: the result gave way, or an operator gave the commitment up."""


TRANSITIONS: dict[tuple[Promise, str], Promise] = {
    (Promise.ASKING, "accepted"): Promise.ASKED,
    (Promise.ASKING, "refused"): Promise.PARKED,
    (Promise.ASKING, "committed"): Promise.COMMITTED,  # the report was faster than the response
    (Promise.ASKING, "not committed"): Promise.RESENDING,
    (Promise.ASKING, "not committed for good"): Promise.PARKED,
    (Promise.ASKING, "given up"): Promise.DISCARDED,
    (Promise.ASKED, "overdue"): Promise.ASKING,
    (Promise.ASKED, "committed"): Promise.COMMITTED,
    (Promise.ASKED, "not committed"): Promise.RESENDING,
    (Promise.ASKED, "not committed for good"): Promise.PARKED,
    (Promise.ASKED, "given up"): Promise.DISCARDED,
    (Promise.RESENDING, "sent again"): Promise.ASKING,
    (Promise.RESENDING, "given up"): Promise.DISCARDED,
    (Promise.PARKED, "retried"): Promise.ASKING,  # by the operator
    (Promise.PARKED, "committed"): Promise.COMMITTED,  # a late report
    (Promise.PARKED, "given up"): Promise.DISCARDED,
}


@dataclass(frozen=True, slots=True)
class Owed:
    """A commitment that is to be asked for now."""

    delivery: int
    peer: str
    attempts: int
    since: float
    """When it was first asked for, or taken up again: seconds since the epoch."""
    detail: str = ""
    """Why the last request came to nothing."""


class Promises:
    """What destinations are to commit; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def recover(self, peers: Collection[str], now: float) -> None:
        """After a start: what was asked before is asked again soon, of `peers` alone.

        The configuration may ask others to commit than before; nothing is owed by the others.
        """
        p, r = t.promises.c, t.promise_requests.c
        d = t.deliveries.c
        others = select(d.id).where(d.destination.not_in(list(peers)))
        gone = p.delivery.in_(others), p.state.not_in((Promise.COMMITTED, Promise.DISCARDED))
        with self._db.write() as db:
            forgotten = select(p.delivery).where(*gone)
            db.execute(t.promise_requests.delete().where(r.delivery.in_(forgotten)))
            db.execute(t.promises.delete().where(*gone))
            waiting = p.state.in_((Promise.ASKING, Promise.ASKED))
            late = waiting, p.due > now + _AFTER_START_SECONDS
            soon = {"due": now + _AFTER_START_SECONDS}
            db.execute(t.promises.update().where(*late).values(soon))

    def expect(self, peers: Collection[str], now: float) -> None:
        """Have every complete delivery to `peers` committed, once; what was sent again, anew."""
        d, j, p = t.deliveries.c, t.jobs.c, t.promises.c
        complete = d.state == Delivery.DELIVERED, d.destination.in_(list(peers))
        new = (
            select(d.id)
            .join_from(t.deliveries, t.jobs, j.id == d.job)
            .where(*complete, j.state.in_((State.SENDING, State.DONE)), ~j.purged)
            .where(~exists().where(p.delivery == d.id), _has_accepted())
        )
        while found := self._db.read(new.limit(_AT_A_TIME)):
            with self._db.write() as db:
                ids = [delivery for (delivery,) in found]
                for (delivery,) in db.execute(new.where(d.id.in_(ids))).all():
                    row = {"delivery": delivery, "state": Promise.ASKING, "since": now, "due": now}
                    db.execute(t.promises.insert().values(row))

    def step(self, now: float) -> None:
        """Bring every promise to where it stands now."""
        p, d, j = t.promises.c, t.deliveries.c, t.jobs.c
        found = select(p.delivery).join_from(t.promises, t.deliveries, p.delivery == d.id)
        found = found.join(t.jobs, j.id == d.job)
        changes = (
            ("given up", (p.state.in_(_states_before("given up")), j.state.in_(_GIVEN_UP))),
            ("sent again", (p.state == Promise.RESENDING, d.state == Delivery.DELIVERED)),
            ("overdue", (p.state == Promise.ASKED, t.is_due(p.due, now))),
        )
        for event, condition in changes:
            for (delivery,) in self._db.read(found.where(*condition)):
                with self._db.write() as db:
                    if db.execute(found.where(*condition, p.delivery == delivery)).first():
                        self._move(db, delivery, event, now, _NO_REPORT.get(event, ""))

    def due(self, now: float) -> list[Owed]:
        """What is to be asked for now, the oldest first."""
        p, d = t.promises.c, t.deliveries.c
        query = select(p.delivery, d.destination, p.attempts, p.since, p.detail)
        query = query.join_from(t.promises, t.deliveries).where(
            p.state == Promise.ASKING, t.is_due(p.due, now)
        )
        return [Owed(*row) for row in self._db.read(query.order_by(p.due, p.delivery))]

    def begin(self, delivery: int) -> str:
        """A new transaction UID for a request that is about to go out."""
        p, uid = t.promises.c, str(generate_uid())
        with self._db.write() as db:
            turn = db.execute(select(p.round).where(p.delivery == delivery)).scalar_one()
            row = {"transaction_uid": uid, "delivery": delivery, "round": turn}
            db.execute(t.promise_requests.insert().values(row))
        return uid

    def references(self, delivery: int) -> list[Reference]:
        """What the destination has accepted, and is to commit."""
        return [(row[0], row[1]) for row in self._db.read(_accepted(delivery))]

    def state(self, delivery: int) -> tuple[Promise, str] | None:
        """State and detail, or None if nothing is asked for this delivery."""
        p = t.promises.c
        rows = self._db.read(select(p.state, p.detail).where(p.delivery == delivery))
        return (Promise(rows[0].state), rows[0].detail) if rows else None

    # what became of a request

    def accepted(self, owed: Owed, report_due: float, now: float) -> None:
        """The destination accepted the request; its report may have been faster."""
        self._move_if_asking(owed, "accepted", "", now, due=report_due)

    def park(self, owed: Owed, detail: str, now: float) -> None:
        """Ask no more, unless an operator says so."""
        self._move_if_asking(owed, "refused", detail, now)

    def _move_if_asking(
        self, owed: Owed, event: str, detail: str, now: float, **more: float
    ) -> None:
        p = t.promises.c
        mine = p.delivery == owed.delivery
        with self._db.write() as db:
            if db.execute(select(p.state).where(mine)).scalar() == Promise.ASKING:
                self._move(db, owed.delivery, event, now, detail)
                change = {"attempts": p.attempts + 1, **more}
                db.execute(t.promises.update().where(mine).values(change))

    def postpone(self, owed: Owed, until: float, detail: str) -> None:
        """The next request goes out at `until`."""
        p = t.promises.c
        mine = p.delivery == owed.delivery, p.state == Promise.ASKING
        change = {"due": until, "attempts": p.attempts + 1, "detail": detail}
        with self._db.write() as db:
            db.execute(t.promises.update().where(*mine).values(change))

    # reports

    def peer_of(self, transaction_uid: str) -> str | None:
        """Who was asked with this transaction UID; None: nobody."""
        r, d = t.promise_requests.c, t.deliveries.c
        query = select(d.destination).join_from(
            t.promise_requests, t.deliveries, r.delivery == d.id
        )
        rows = self._db.read(query.where(r.transaction_uid == transaction_uid))
        return str(rows[0].destination) if rows else None

    def reported(
        self, transaction_uid: str, results: Sequence[Result], now: float, resend_after: float = 0.0
    ) -> None:
        """Note what a destination has committed, and have sent again what it has not.

        A report on what is settled, or on what was sent again since, changes nothing.

        Args:
            resend_after: seconds before what it lacks is sent again; double at the second time.
        """
        r, p = t.promise_requests.c, t.promises.c
        asked = r.transaction_uid == transaction_uid
        query = select(p.delivery, p.state, p.resent).join_from(t.promises, t.promise_requests)
        failures = {instance: failure for _, instance, failure in results}
        with self._db.write() as db:
            row = db.execute(query.where(asked, r.round == p.round)).one_or_none()
            if row is None or (Promise(row.state), "committed") not in TRANSITIONS:
                return
            owed = [found.sop_instance_uid for found in db.execute(_accepted(row.delivery))]
            missed = {u: f for u in owed if (f := failures.get(u, PROCESSING_FAILURE))}
            if not missed:
                self._move(db, row.delivery, "committed", now, f"{len(owed)} instances")
            elif row.state != Promise.PARKED:
                text = f"{len(missed)} of {len(owed)} instances not committed ({_reasons(missed)})"
                at = now + resend_after * 2**row.resent
                self._missed(db, row.delivery, missed, text, now, at, row.resent)

    def _missed(
        self,
        db: Connection,
        delivery: int,
        missed: dict[str, int],
        text: str,
        now: float,
        at: float,
        resent: int,
    ) -> None:
        d, j, p, a = t.deliveries.c, t.jobs.c, t.promises.c, t.acceptances.c
        query = select(d.state, j.id, j.state.label("job_state"), j.purged)
        row = db.execute(query.join_from(t.deliveries, t.jobs).where(d.id == delivery)).one()
        gone = row.purged or row.job_state not in (State.SENDING, State.DONE)
        lasting = any(failure in FOR_GOOD for failure in missed.values())
        if gone or lasting or resent >= MOST_RESENDS:
            words = "" if not resent else f"; sent {resent + 1} times"
            self._move(db, delivery, "not committed for good", now, text + words)
            return
        uids = list(missed)
        lost = t.acceptances.delete().where(a.delivery == delivery)
        for start in range(0, len(uids), _AT_A_TIME):
            some = uids[start : start + _AT_A_TIME]
            db.execute(lost.where(a.sop_instance_uid.in_(some)))
        state = delivery_after(Delivery(row.state), "not committed")
        change = {"state": state, "detail": text, "due": at, "created": now, "attempts": 0}
        db.execute(t.deliveries.update().where(d.id == delivery).values(change))
        if row.job_state == State.DONE:
            advance(db, row.id, Event.NOT_COMMITTED, now, f"delivery {delivery}: {text}")
        self._move(db, delivery, "not committed", now, f"{text}; they are sent again")
        db.execute(t.promises.update().where(p.delivery == delivery).values(resent=resent + 1))

    # the operator

    def retry(self, delivery: int, now: float) -> None:
        """Ask for a parked commitment anew, with all its tries.

        Raises:
            JournalError: there is none for this delivery, or it is not parked.
        """
        with self._db.write() as db:
            self._move(db, delivery, "retried", now, "by the operator")
            fresh = t.promises.update().where(t.promises.c.delivery == delivery)
            db.execute(fresh.values(resent=0))

    def discard(self, delivery: int, why: str, now: float) -> None:
        """Do without this commitment: retention then no longer waits for it.

        Raises:
            JournalError: there is none for this delivery, or it is committed.
        """
        with self._db.write() as db:
            self._move(db, delivery, "given up", now, why)

    def parked(self) -> list[int]:
        """Deliveries whose commitment is parked, the oldest first."""
        p = t.promises.c
        query = select(p.delivery).where(p.state == Promise.PARKED).order_by(p.since)
        return [delivery for (delivery,) in self._db.read(query)]

    def _move(self, db: Connection, delivery: int, event: str, now: float, detail: str) -> None:
        p, d, j = t.promises.c, t.deliveries.c, t.jobs.c
        query = select(p.state, d.destination, d.job, j.series_uid)
        query = query.join_from(t.promises, t.deliveries).join(t.jobs, j.id == d.job)
        row = db.execute(query.where(p.delivery == delivery)).one_or_none()
        if row is None:
            raise JournalError(f"no commitment is asked for delivery {delivery}")
        try:
            state = TRANSITIONS[Promise(row.state), event]
        except KeyError:
            raise JournalError(f"a commitment that is {row.state} cannot be {event}") from None
        change: dict[str, Any] = {"state": state, "detail": detail, "due": now}
        if event in ("sent again", "retried"):
            change |= {"attempts": 0, "since": now, "round": p.round + 1}
        db.execute(t.promises.update().where(p.delivery == delivery).values(change))
        if event != "overdue":  # it may happen often
            text = f"commitment of delivery {delivery} by {row.destination} {state}"
            note(db, row.series_uid, now, f"{text}: {detail}" if detail else text, row.job)


def _reasons(missed: dict[str, int]) -> str:
    return ", ".join(f"0x{failure:04X}" for failure in sorted(set(missed.values())))


def _accepted(delivery: int) -> Select[tuple[str, str]]:
    """SOP Class UID and SOP Instance UID of what a destination has accepted."""
    a, o, d = t.acceptances.c, t.outputs.c, t.deliveries.c
    query = select(o.sop_class_uid, o.sop_instance_uid).join_from(
        t.acceptances, t.deliveries, a.delivery == d.id
    )
    mine = (o.job == d.job) & (o.sop_instance_uid == a.sop_instance_uid)
    query = query.join(t.outputs, mine).where(d.id == delivery, a.status.in_(ACCEPTED))
    return query.order_by(o.position, o.sop_instance_uid)


def _has_accepted() -> Any:
    """Has the destination accepted anything of a delivery (of `tables.deliveries`)?"""
    a = t.acceptances.c
    return exists().where(a.delivery == t.deliveries.c.id, a.status.in_(ACCEPTED))


def uncommitted(peers: Collection[str]) -> Select[tuple[int]]:
    """Jobs with a complete delivery that one of these peers is still to commit."""
    d, p = t.deliveries.c, t.promises.c
    settled = (Promise.COMMITTED, Promise.DISCARDED)
    kept = exists().where(p.delivery == d.id, p.state.in_(settled))
    where = (d.destination.in_(list(peers)), d.state == Delivery.DELIVERED, _has_accepted(), ~kept)
    return (
        select(d.job)
        .join_from(t.deliveries, t.jobs)
        .where(*where, t.jobs.c.state.not_in(_GIVEN_UP))
    )


def _states_before(event: str) -> list[Promise]:
    """The states in which it can happen."""
    return [state for state, what in TRANSITIONS if what == event]
