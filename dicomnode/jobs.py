"""What is to be done: translating jobs and deliveries, from a completed series to the last answer.

States change only along the tables of `lifecycle`. Work may be repeated after a crash; what it
makes has the same UIDs and bytes, so repeating it is safe. Retries of a delivery never repeat the
translation: the stored bytes are sent again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects.sqlite import insert

from dicomnode import tables as t
from dicomnode.errors import JournalError
from dicomnode.journal import OpenSeries
from dicomnode.lifecycle import TRANSITIONS, Delivery, Event, State, after, delivery_after
from dicomnode.tables import Database, note

MAX_CRASHES = 5
"""Workers that may crash over one job before it is parked."""
MAX_ATTEMPTS = 25
"""Tries in all: a worker that is killed, or a node that stops, says little about the job."""
PRIORITIES = {"stat": 0, "routine": 1, "offpeak": 2}


@dataclass(frozen=True, slots=True)
class Job:
    id: int
    series_uid: str
    generation: int
    route: str
    attempts: int
    created: float


@dataclass(frozen=True, slots=True)
class DueDelivery:
    id: int
    job: int
    series_uid: str
    derived_uid: str
    destination: str
    attempts: int
    created: float
    remaining: tuple[str, ...]
    """SOP Instance UIDs the destination has not accepted yet."""


class Jobs:
    """The working half of the journal; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def recover(self, now: float) -> None:
        """After a stop: what was being translated is translated again, with the same UIDs."""
        j = t.jobs.c
        running = select(j.id, j.attempts, j.crashes).where(j.state == State.TRANSLATING)
        with self._db.write() as db:
            for job in db.execute(running).all():
                event = _after_loss(job.attempts, job.crashes)
                detail = f"the node stopped in attempt {job.attempts}"
                self._advance(db, job.id, event, now, detail, "NODE_STOPPED")

    def close_series(
        self,
        seen: OpenSeries,
        outcome: str,
        routes: Sequence[tuple[str, str]],
        notes: Sequence[str],
        now: float,
    ) -> bool:
        """Close a series and queue a job per (route, priority); False if it was overtaken.

        Nothing happens if an instance arrived after `seen` was read.
        """
        s = t.series.c
        with self._db.write() as db:
            closed = db.execute(
                t.series.update()
                .where(s.series_uid == seen.series_uid, s.open)
                .where(s.last_received == seen.last_received)
                .values(open=False, interrupted=False, outcome=outcome)
            )
            if not closed.rowcount:
                return False
            for text in notes:
                note(db, seen.series_uid, now, text)
            self._supersede(db, seen, now)
            for route, priority in routes:
                db.execute(
                    t.jobs.insert().values(
                        series_uid=seen.series_uid,
                        generation=seen.generation,
                        route=route,
                        state=State.QUEUED,
                        priority=PRIORITIES[priority],
                        created=now,
                        updated=now,
                    )
                )
            return True

    def _supersede(self, db: Connection, seen: OpenSeries, now: float) -> None:
        """An earlier generation that has sent nothing yet gives way to this one."""
        j = t.jobs.c
        earlier = select(j.id, j.state).where(
            j.series_uid == seen.series_uid, j.generation < seen.generation
        )
        for job, state in db.execute(earlier).all():
            mine = t.deliveries.c.job == job
            accepted = select(func.count()).select_from(t.acceptances.join(t.deliveries))
            if db.execute(accepted.where(mine)).scalar_one():
                text = "an earlier generation is already at a destination: both will be there"
                note(db, seen.series_uid, now, text, job)
            elif (State(state), Event.OVERTAKEN) in TRANSITIONS and state != State.TRANSLATING:
                db.execute(t.deliveries.update().where(mine).values(state=Delivery.DISCARDED))
                self._advance(db, job, Event.OVERTAKEN, now, f"by generation {seen.generation}")

    # jobs

    def claim(self, now: float) -> Job | None:
        """Take the next queued job: by priority, then by how long it is queued.

        One that lost its worker is behind all that were queued then: it may be to blame.
        """
        j = t.jobs.c
        columns = (j.id, j.series_uid, j.generation, j.route, j.attempts, j.created)
        query = (
            select(*columns).where(j.state == State.QUEUED).order_by(j.priority, j.updated, j.id)
        )
        with self._db.write() as db:
            row = db.execute(query.limit(1)).one_or_none()
            if row is None:
                return None
            self._advance(db, row.id, Event.CLAIMED, now, "")
            db.execute(t.jobs.update().where(j.id == row.id).values(attempts=row.attempts + 1))
            return Job(
                row.id, row.series_uid, row.generation, row.route, row.attempts + 1, row.created
            )

    def lost(self, job: Job, detail: str, now: float, *, crashed: bool) -> State:
        """Its worker is gone: queue the job again, or park it after too many losses."""
        j = t.jobs.c
        with self._db.write() as db:
            mine = t.jobs.update().where(j.id == job.id)
            change = mine.values(crashes=j.crashes + int(crashed)).returning(j.crashes)
            crashes = db.execute(change).scalar_one()
            if overtaken := self._overtaken(db, job):
                return self._advance(db, job.id, Event.OVERTAKEN, now, overtaken)
            event = _after_loss(job.attempts, crashes)
            return self._advance(db, job.id, event, now, detail, "WORKER_LOST")

    def finish(
        self, job: Job, event: Event, now: float, *, code: str = "", detail: str = ""
    ) -> State:
        """End a translation without anything to send."""
        with self._db.write() as db:
            if overtaken := self._overtaken(db, job):
                return self._advance(db, job.id, Event.OVERTAKEN, now, overtaken)
            return self._advance(db, job.id, event, now, detail, code)

    def derived(
        self,
        job: Job,
        derived_uid: str,
        instances: Sequence[tuple[str, str]],
        destinations: Sequence[str],
        findings: Mapping[str, Any],
        event: Event,
        now: float,
        *,
        code: str = "",
        detail: str = "",
    ) -> State:
        """Record what a translation made, as (SOP Instance UID, SOP Class UID), and queue it.

        A job of an overtaken generation is superseded instead: never two valid results.
        """
        with self._db.write() as db:
            if overtaken := self._overtaken(db, job):
                return self._advance(db, job.id, Event.OVERTAKEN, now, overtaken)
            db.execute(t.outputs.delete().where(t.outputs.c.job == job.id))  # of an earlier try
            rows = [
                {"job": job.id, "sop_instance_uid": uid, "sop_class_uid": sop_class}
                for uid, sop_class in instances
            ]
            db.execute(t.outputs.insert(), rows)
            db.execute(
                t.jobs.update()
                .where(t.jobs.c.id == job.id)
                .values(derived_uid=derived_uid, findings=json.dumps(findings))
            )
            state = self._advance(db, job.id, event, now, detail, code)
            if state is State.SENDING:
                for name in destinations:
                    db.execute(
                        t.deliveries.insert().values(
                            job=job.id,
                            destination=name,
                            state=Delivery.WAITING,
                            created=now,
                            due=now,
                        )
                    )
            return state

    def _overtaken(self, db: Connection, job: Job) -> str:
        """By which later generation of its series, in words; empty: it is the current one."""
        s = t.series.c
        current = db.execute(select(s.generation).where(s.series_uid == job.series_uid))
        generation = current.scalar_one()
        return "" if generation == job.generation else f"by generation {generation}"

    def _advance(
        self, db: Connection, job: int, event: Event, now: float, detail: str, code: str = ""
    ) -> State:
        row = db.execute(
            select(t.jobs.c.state, t.jobs.c.series_uid).where(t.jobs.c.id == job)
        ).one_or_none()
        if row is None:
            raise JournalError(f"there is no job {job}")
        state = after(State(row.state), event)
        change = {"state": state, "updated": now, "code": code, "detail": detail}
        db.execute(t.jobs.update().where(t.jobs.c.id == job).values(change))
        words = ": ".join(part for part in (f"job {job} {state}", code, detail) if part)
        note(db, row.series_uid, now, words, job)
        return state

    # deliveries

    def due_deliveries(self, now: float) -> list[DueDelivery]:
        d, j = t.deliveries.c, t.jobs.c
        query = (
            select(d.id, d.job, j.series_uid, j.derived_uid, d.destination, d.attempts, d.created)
            .join_from(t.deliveries, t.jobs, d.job == j.id)
            .where(d.state == Delivery.WAITING, d.due <= now, j.state == State.SENDING)
            .order_by(j.priority, d.due)
        )
        rows = self._db.read(query)
        return [
            DueDelivery(**row._mapping, remaining=self._remaining(row.id, row.job)) for row in rows
        ]

    def _remaining(self, delivery: int, job: int) -> tuple[str, ...]:
        o, a = t.outputs.c, t.acceptances.c
        accepted = select(a.sop_instance_uid).where(a.delivery == delivery)
        query = select(o.sop_instance_uid).where(o.job == job, o.sop_instance_uid.not_in(accepted))
        return tuple(uid for (uid,) in self._db.read(query))

    def accepted(self, delivery: int, statuses: Mapping[str, int], now: float) -> None:
        """Note instances that the destination has, by SOP Instance UID and response status."""
        if not statuses:
            return
        rows = [
            {"delivery": delivery, "sop_instance_uid": uid, "status": status, "at": now}
            for uid, status in statuses.items()
        ]
        d, j = t.deliveries.c, t.jobs.c
        given_up = select(d.job, d.destination, j.series_uid).join_from(t.deliveries, t.jobs)
        with self._db.write() as db:
            db.execute(insert(t.acceptances).on_conflict_do_nothing(), rows)
            query = given_up.where(d.id == delivery, d.state == Delivery.DISCARDED)
            if row := db.execute(query).one_or_none():  # they were on their way already
                text = f"{len(rows)} instances reached {row.destination} after they were given up"
                note(db, row.series_uid, now, text, row.job)

    def delivered(self, delivery: DueDelivery, detail: str, now: float) -> None:
        """The destination has every instance; the job is done with its last delivery."""
        with self._db.write() as db:
            self._move(db, delivery.id, "accepted", detail, now)
            self._finish_if_delivered(db, delivery.job, now)

    def postpone(self, delivery: DueDelivery, until: float, detail: str, now: float) -> None:
        """Try again at `until`; nothing happens if the delivery was given up meanwhile."""
        with self._db.write() as db:
            waiting = db.execute(
                t.deliveries.update()
                .where(t.deliveries.c.id == delivery.id, t.deliveries.c.state == Delivery.WAITING)
                .values(attempts=t.deliveries.c.attempts + 1, due=until, detail=detail)
            )
            if waiting.rowcount:
                text = f"delivery {delivery.id} to {delivery.destination} put off: {detail}"
                note(db, delivery.series_uid, now, text, delivery.job)

    def park(self, delivery: DueDelivery, detail: str, now: float) -> None:
        with self._db.write() as db:
            self._move(db, delivery.id, "refused", detail, now)

    def _move(self, db: Connection, delivery: int, event: str, detail: str, now: float) -> int:
        d, j = t.deliveries.c, t.jobs.c
        row = db.execute(
            select(d.state, d.job, d.destination, j.series_uid)
            .join_from(t.deliveries, t.jobs, d.job == j.id)
            .where(d.id == delivery)
        ).one_or_none()
        if row is None:
            raise JournalError(f"there is no delivery {delivery}")
        state = delivery_after(Delivery(row.state), event)
        change: dict[str, Any] = {"state": state, "detail": detail}
        if state is Delivery.WAITING:
            change |= {"due": now, "created": now, "attempts": 0}
        db.execute(t.deliveries.update().where(d.id == delivery).values(change))
        text = f"delivery {delivery} to {row.destination} {state}"
        note(db, row.series_uid, now, f"{text}: {detail}" if detail else text, row.job)
        return int(row.job)

    def _finish_if_delivered(self, db: Connection, job: int, now: float) -> None:
        left = select(func.count()).where(
            t.deliveries.c.job == job,
            t.deliveries.c.state.in_((Delivery.WAITING, Delivery.PARKED)),
        )
        if db.execute(left).scalar_one() == 0:
            self._advance(db, job, Event.DELIVERED, now, "")

    # the operator

    def in_state(self, state: State) -> list[int]:
        query = select(t.jobs.c.id).where(t.jobs.c.state == state).order_by(t.jobs.c.id)
        return [job for (job,) in self._db.read(query)]

    def deliveries_in_state(self, state: Delivery) -> list[int]:
        query = select(t.deliveries.c.id).where(t.deliveries.c.state == state)
        return [delivery for (delivery,) in self._db.read(query.order_by(t.deliveries.c.id))]

    def retry_job(self, job: int, now: float) -> None:
        with self._db.write() as db:
            self._advance(db, job, Event.RETRIED, now, "by the operator")
            db.execute(t.jobs.update().where(t.jobs.c.id == job).values(attempts=0, crashes=0))

    def retry_delivery(self, delivery: int, now: float) -> None:
        with self._db.write() as db:
            self._move(db, delivery, "retried", "by the operator", now)

    def discard_job(self, job: int, why: str, now: float) -> None:
        """Give a job up for good, its waiting deliveries with it."""
        d = t.deliveries.c
        with self._db.write() as db:
            self._advance(db, job, Event.DROPPED, now, why)
            owed = d.state.in_((Delivery.WAITING, Delivery.PARKED))
            db.execute(
                t.deliveries.update()
                .where(d.job == job, owed)
                .values(state=Delivery.DISCARDED, detail=why)
            )


def _after_loss(attempts: int, crashes: int) -> Event:
    too_many = crashes >= MAX_CRASHES or attempts >= MAX_ATTEMPTS
    return Event.GAVE_UP if too_many else Event.WORKER_LOST
