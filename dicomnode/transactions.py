"""Storage commitment transactions in the journal: asked, checked, reported (PS3.4 Annex J).

A transaction changes its state only along `TRANSITIONS`. Nothing has to be recovered after a stop:
what was being checked is checked again, what was being reported is reported again.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, select

from dicomnode import tables as t
from dicomnode.errors import JournalError
from dicomnode.tables import Database, note


class Commitment(StrEnum):
    """State of a storage commitment transaction."""

    CHECKING = "checking"
    """Its instances are still to be compared with what was received."""
    REPORTING = "reporting"
    """The result is known; the peer has not answered our N-EVENT-REPORT yet."""
    REPORTED = "reported"
    PARKED = "parked"
    """The peer refused the report, or could not be reached in time; the detail says why."""


TRANSITIONS: dict[tuple[Commitment, str], Commitment] = {
    (Commitment.CHECKING, "checked"): Commitment.REPORTING,
    (Commitment.REPORTING, "answered"): Commitment.REPORTED,
    (Commitment.REPORTING, "refused"): Commitment.PARKED,
    (Commitment.REPORTING, "outdated"): Commitment.CHECKING,  # a file went away meanwhile
    (Commitment.REPORTED, "asked again"): Commitment.CHECKING,  # our report got lost on its way
    (Commitment.PARKED, "asked again"): Commitment.CHECKING,
    (Commitment.PARKED, "retried"): Commitment.CHECKING,  # by the operator
}

Reference = tuple[str, str]
"""SOP Class UID and SOP Instance UID of an instance that is to be committed."""
Result = tuple[str, str, int]
"""The same with its FailureReason (PS3.3 C.14.1.1); 0: committed."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the journal has of a referenced instance."""

    series_uid: str
    sop_class_uid: str
    sha256: str
    purged: bool


@dataclass(frozen=True, slots=True)
class Transaction:
    uid: str
    peer: str
    asked: float
    attempts: int


class Transactions:
    """The storage commitment part of the journal; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def ask(self, uid: str, peer: str, references: Sequence[Reference], now: float) -> bool:
        """Record a request, durably; asking the same again starts a finished one anew.

        False: the transaction UID is in use for other instances or by another peer (PS3.4 J.3.2.1).
        """
        c = t.commitments.c
        with self._db.write() as db:
            row = db.execute(select(c.peer, c.state).where(c.transaction_uid == uid)).one_or_none()
            if row is None:
                start: dict[str, Any] = {"transaction_uid": uid, "peer": peer}
                start |= {"state": Commitment.CHECKING, "asked": now, "due": now, "updated": now}
                db.execute(t.commitments.insert().values(start))
                rows = [
                    {
                        "transaction_uid": uid,
                        "position": position,
                        "sop_class_uid": sop_class,
                        "sop_instance_uid": instance,
                    }
                    for position, (sop_class, instance) in enumerate(references)
                ]
                db.execute(t.commitment_items.insert(), rows)
                return True
            known = {(sop_class, sop) for sop_class, sop, _ in db.execute(_items(uid)).all()}
            if row.peer != peer or known != set(references):
                return False
            if (Commitment(row.state), "asked again") in TRANSITIONS:
                self._move(db, uid, "asked again", now, "")
                self._renew(db, uid, now)
            return True

    def retry(self, uid: str, now: float) -> None:
        """Check and report a parked transaction anew.

        Raises:
            JournalError: there is none with this UID, or it is not parked.
        """
        with self._db.write() as db:
            self._move(db, uid, "retried", now, "by the operator")
            self._renew(db, uid, now)

    def parked(self) -> list[str]:
        """Transaction UIDs, the oldest request first."""
        c = t.commitments.c
        query = select(c.transaction_uid).where(c.state == Commitment.PARKED).order_by(c.asked)
        return [uid for (uid,) in self._db.read(query)]

    def open_of(self, peer: str) -> int:
        """How many transactions of this peer are not finished."""
        unfinished = t.commitments.c.state.in_((Commitment.CHECKING, Commitment.REPORTING))
        query = select(func.count()).select_from(t.commitments)
        return int(self._db.read(query.where(t.commitments.c.peer == peer, unfinished))[0][0])

    def due(self, state: Commitment, now: float) -> list[Transaction]:
        """The transactions in `state` whose turn it is, the oldest first."""
        c = t.commitments.c
        query = select(c.transaction_uid, c.peer, c.asked, c.attempts)
        rows = self._db.read(query.where(c.state == state, t.is_due(c.due, now)).order_by(c.asked))
        return [Transaction(*row) for row in rows]

    def state(self, uid: str) -> tuple[Commitment, str] | None:
        """State and detail of a transaction, or None if it is not known."""
        c = t.commitments.c
        rows = self._db.read(select(c.state, c.detail).where(c.transaction_uid == uid))
        return (Commitment(rows[0].state), rows[0].detail) if rows else None

    def references(self, uid: str) -> list[Reference]:
        """In the order of the request."""
        return [(row[0], row[1]) for row in self._db.read(_items(uid))]

    def results(self, uid: str) -> list[Result]:
        """What the check found, in the order of the request."""
        return [(row[0], row[1], row[2]) for row in self._db.read(_items(uid))]

    def stored(self, uid: str) -> dict[str, Stored]:
        """What the journal has of the references, by SOP Instance UID."""
        i, r = t.instances.c, t.commitment_items.c
        columns = (i.sop_instance_uid, i.series_uid, i.sop_class_uid, i.sha256, i.purged)
        query = select(*columns).join_from(
            t.commitment_items, t.instances, r.sop_instance_uid == i.sop_instance_uid
        )
        rows = self._db.read(query.where(r.transaction_uid == uid))
        return {row[0]: Stored(*row[1:]) for row in rows}

    def checked(self, transaction: Transaction, failures: Sequence[int], now: float) -> None:
        """Record the FailureReason of each reference, in order; the report is due now."""
        r, uid = t.commitment_items.c, transaction.uid
        mine = t.commitment_items.update().where(r.transaction_uid == uid)
        failed = [{"at": n, "why": failure} for n, failure in enumerate(failures) if failure]
        with self._db.write() as db:
            db.execute(mine.values(failure=0))
            if failed:
                one = mine.where(r.position == bindparam("at")).values(failure=bindparam("why"))
                db.execute(one, failed)
            self._move(db, uid, "checked", now, "")
            for series_uid, reasons in _reasons_by_series(db, uid).items():
                bad = sum(count for failure, count in reasons.items() if failure)
                text = (
                    f"storage commitment asked by {transaction.peer}: {reasons.total()} instances"
                )
                note(db, series_uid, now, f"{text} checked, {bad} cannot be committed")

    def reported(self, transaction: Transaction, now: float) -> None:
        self._end(transaction, "answered", "", now)

    def park(self, transaction: Transaction, detail: str, now: float) -> None:
        self._end(transaction, "refused", detail, now)

    def _end(self, transaction: Transaction, event: str, detail: str, now: float) -> None:
        with self._db.write() as db:
            state = self._move(db, transaction.uid, event, now, detail)
            text = f"storage commitment {state}: {transaction.peer}"
            for series_uid in _reasons_by_series(db, transaction.uid):
                note(db, series_uid, now, f"{text}: {detail}" if detail else text)

    def outdated(self, transaction: Transaction, now: float) -> None:
        """The result holds no longer: check again before anything is promised."""
        with self._db.write() as db:
            self._move(db, transaction.uid, "outdated", now, "")

    def postpone(self, transaction: Transaction, until: float, detail: str, now: float) -> None:
        """The next attempt, of the check or of the report, is due at `until`."""
        c = t.commitments.c
        with self._db.write() as db:
            change = {"due": until, "attempts": c.attempts + 1, "detail": detail, "updated": now}
            mine = c.transaction_uid == transaction.uid
            db.execute(t.commitments.update().where(mine).values(change))

    def hurry(self, peer: str, now: float) -> None:
        """Reports to this peer are due now, whatever they were put off for."""
        c = t.commitments.c
        with self._db.write() as db:
            mine = (c.peer == peer, c.state == Commitment.REPORTING)
            db.execute(t.commitments.update().where(*mine).values(due=now))

    def _renew(self, db: Connection, uid: str, now: float) -> None:
        """All its tries are before it again."""
        again = {"asked": now, "due": now, "attempts": 0}
        mine = t.commitments.c.transaction_uid == uid
        db.execute(t.commitments.update().where(mine).values(again))

    def _move(self, db: Connection, uid: str, event: str, now: float, detail: str) -> Commitment:
        c = t.commitments.c
        state = db.execute(select(c.state).where(c.transaction_uid == uid)).scalar()
        if state is None:
            raise JournalError(f"there is no storage commitment {uid}")
        try:
            after = TRANSITIONS[Commitment(state), event]
        except KeyError:
            raise JournalError(f"a storage commitment {state} cannot be {event}") from None
        change = {"state": after, "updated": now, "due": now, "detail": detail}
        if event == "checked":
            change["attempts"] = 0
        db.execute(t.commitments.update().where(c.transaction_uid == uid).values(change))
        return after


def _items(uid: str) -> Select[Any]:
    r = t.commitment_items.c
    query = select(r.sop_class_uid, r.sop_instance_uid, r.failure)
    return query.where(r.transaction_uid == uid).order_by(r.position)


def _reasons_by_series(db: Connection, uid: str) -> dict[str, Counter[int]]:
    """How often each FailureReason occurs in each series; unknown instances have none."""
    r, i = t.commitment_items.c, t.instances.c
    query = select(i.series_uid, r.failure).join_from(
        t.commitment_items, t.instances, r.sop_instance_uid == i.sop_instance_uid
    )
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for series_uid, failure in db.execute(query.where(r.transaction_uid == uid)).all():
        found[series_uid][failure] += 1
    return found
