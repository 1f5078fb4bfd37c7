"""What is to be done: translating jobs and deliveries, from a completed series to the last answer.

States change only along the tables of `lifecycle`. Work may be repeated after a crash; what it
makes has the same UIDs and bytes, so repeating it is safe. Retries of a delivery never repeat the
translation: the stored bytes are sent again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Select, func, select
from sqlalchemy.dialects.sqlite import insert

from dicomnode import tables as t
from dicomnode.errors import JournalError
from dicomnode.generations import OnSuperseded, advance, supersede, waits_for_withdrawal, withdrawn
from dicomnode.journal import OpenSeries
from dicomnode.lifecycle import Delivery, Event, State, delivery_after
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
    priority: int
    """The smaller, the more urgent."""
    retracts: int | None = None
    """The job whose result this one withdraws; None: it translates."""


@dataclass(frozen=True, slots=True)
class Output:
    """One instance that a job made."""

    series_uid: str
    """The derived series it is, or goes with; names its folder."""
    sop_instance_uid: str
    sop_class_uid: str


@dataclass(frozen=True, slots=True)
class DueDelivery:
    id: int
    job: int
    series_uid: str
    destination: str
    attempts: int
    created: float
    begun: bool
    """Whether the destination may have some of it already."""
    retracts: int | None
    outputs: tuple[Output, ...]
    """What the destination has not accepted yet, in the order of sending."""

    @property
    def remaining(self) -> tuple[str, ...]:
        """SOP Instance UIDs of `outputs`."""
        return tuple(output.sop_instance_uid for output in self.outputs)


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
                advance(db, job.id, event, now, detail, "NODE_STOPPED")

    def close_series(
        self,
        seen: OpenSeries,
        outcome: str,
        routes: Sequence[tuple[str, str]],
        notes: Sequence[str],
        now: float,
        *,
        on_superseded: OnSuperseded = "retract",
        overtaken: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Close a series and queue a job per (route, priority); False if it was overtaken.

        Nothing happens if an instance arrived after `seen` was read, or waits for its row: that is
        `overtaken`, asked when no row can be written. `on_superseded`: what is done about an
        earlier generation that a destination may have.
        """
        s = t.series.c
        with self._db.write() as db:
            if overtaken():
                return False
            unchanged = s.last_received == seen.last_received
            mine = t.series.update().where(s.series_uid == seen.series_uid, s.open, unchanged)
            if not db.execute(mine.values(open=False, interrupted=False, outcome=outcome)).rowcount:
                return False
            for text in notes:
                note(db, seen.series_uid, now, text)
            supersede(db, seen.series_uid, seen.generation, on_superseded, now)
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

    # jobs

    def claim(self, now: float, before: int | None = None) -> Job | None:
        """Take the next queued job: by priority, then by how long it is queued.

        One that lost its worker is behind all that were queued then: it may be to blame.

        `before`: only one that is more urgent than this priority.
        """
        j = t.jobs.c
        columns = (j.id, j.series_uid, j.generation, j.route, j.attempts, j.created, j.priority)
        wanted = [] if before is None else [j.priority < before]
        query = select(*columns, j.retracts).where(j.state == State.QUEUED, *wanted)
        query = query.order_by(j.priority, j.updated, j.id).limit(1)
        if not self._db.read(query):  # mostly: then nobody has to wait
            return None
        with self._db.write() as db:
            row = db.execute(query).one_or_none()
            if row is None:
                return None
            why = "" if row.retracts is None else f"to withdraw what job {row.retracts} made"
            advance(db, row.id, Event.CLAIMED, now, why)
            db.execute(t.jobs.update().where(j.id == row.id).values(attempts=row.attempts + 1))
            return Job(**{**row._mapping, "attempts": row.attempts + 1})

    def lost(
        self, job: Job, detail: str, now: float, *, crashed: bool, code: str = "WORKER_LOST"
    ) -> State:
        """Its worker is gone, or had no room: queue the job again, or park it after too many."""
        j = t.jobs.c
        with self._db.write() as db:
            mine = t.jobs.update().where(j.id == job.id)
            change = mine.values(crashes=j.crashes + int(crashed)).returning(j.crashes)
            crashes = db.execute(change).scalar_one()
            if overtaken := self._overtaken(db, job):
                return advance(db, job.id, Event.OVERTAKEN, now, overtaken)
            event = _after_loss(job.attempts, crashes)
            return advance(db, job.id, event, now, detail, code)

    def finish(
        self,
        job: Job,
        event: Event,
        now: float,
        *,
        code: str = "",
        detail: str = "",
        stacks: Sequence[Mapping[str, Any]] = (),
    ) -> State:
        """End a translation without anything to send."""
        with self._db.write() as db:
            if overtaken := self._overtaken(db, job):
                return advance(db, job.id, Event.OVERTAKEN, now, overtaken)
            self._describe(db, job, stacks, now)
            return advance(db, job.id, event, now, detail, code)

    def derived(
        self,
        job: Job,
        outputs: Sequence[Output],
        destinations: Sequence[str],
        findings: Mapping[str, Any],
        event: Event,
        now: float,
        *,
        code: str = "",
        detail: str = "",
        stacks: Sequence[Mapping[str, Any]] = (),
    ) -> State:
        """Record what a job made, in the order of sending, and queue it for delivery.

        A job of an overtaken generation is superseded instead: never two valid results.
        """
        with self._db.write() as db:
            if overtaken := self._overtaken(db, job):
                return advance(db, job.id, Event.OVERTAKEN, now, overtaken)
            self._describe(db, job, stacks, now)
            db.execute(t.outputs.delete().where(t.outputs.c.job == job.id))  # of an earlier try
            rows = [
                {"job": job.id, "position": position, **asdict(output)}
                for position, output in enumerate(outputs)
            ]
            db.execute(t.outputs.insert(), rows)
            made = {"derived_uid": outputs[0].series_uid, "findings": json.dumps(findings)}
            db.execute(t.jobs.update().where(t.jobs.c.id == job.id).values(made))
            state = advance(db, job.id, event, now, detail, code)
            if state is State.SENDING and destinations:
                common = {"job": job.id, "state": Delivery.WAITING, "created": now, "due": now}
                rows = [{**common, "destination": name} for name in destinations]
                db.execute(t.deliveries.insert(), rows)
            return state

    def _describe(
        self, db: Connection, job: Job, stacks: Sequence[Mapping[str, Any]], now: float
    ) -> None:
        """What became of each stack of the series; its ``text`` goes to the timeline."""
        said = json.dumps(list(stacks)) if stacks else None
        db.execute(t.jobs.update().where(t.jobs.c.id == job.id).values(stacks=said))
        for stack in stacks:
            note(db, job.series_uid, now, stack["text"], job.id)

    def _overtaken(self, db: Connection, job: Job) -> str:
        """By which later generation of its series, in words; empty: it is the current one.

        What withdraws an earlier result is never overtaken.
        """
        s = t.series.c
        current = db.execute(select(s.generation).where(s.series_uid == job.series_uid))
        generation = current.scalar_one()
        now_current = job.retracts is not None or generation == job.generation
        return "" if now_current else f"by generation {generation}"

    def outputs(self, job: int) -> list[Output]:
        """What a job made, in the order of sending."""
        return [Output(*row) for row in self._db.read(_outputs_of(job))]

    def withdrawn(self, series_uid: str) -> frozenset[str]:
        """Derived SeriesInstanceUIDs of a source series that must not be used again."""
        return frozenset(uid for (uid,) in self._db.read(withdrawn(series_uid)))

    # deliveries

    def due_deliveries(self, now: float) -> list[DueDelivery]:
        """What may be sent now, the most urgent first.

        Nothing goes where an earlier generation of the same series is still to be withdrawn.
        """
        d, j = t.deliveries.c, t.jobs.c
        columns = (d.id, d.job, j.series_uid, d.destination, d.attempts, d.created, d.begun)
        query = (
            select(*columns, j.retracts)
            .join_from(t.deliveries, t.jobs, d.job == j.id)
            .where(d.state == Delivery.WAITING, t.is_due(d.due, now), j.state == State.SENDING)
            .where(~waits_for_withdrawal())
            .order_by(j.priority, d.due)
        )
        rows = self._db.read(query)
        return [
            DueDelivery(**row._mapping, outputs=self._remaining(row.id, row.job)) for row in rows
        ]

    def _remaining(self, delivery: int, job: int) -> tuple[Output, ...]:
        a = t.acceptances.c
        accepted = select(a.sop_instance_uid).where(a.delivery == delivery)
        query = _outputs_of(job).where(t.outputs.c.sop_instance_uid.not_in(accepted))
        return tuple(Output(*row) for row in self._db.read(query))

    def begin(self, delivery: int) -> bool:
        """Note that a delivery is about to be sent; False: it was given up, do not.

        From here on the destination may have some of it, whatever is heard of it again.
        """
        mine = t.deliveries.c.id == delivery, t.deliveries.c.state == Delivery.WAITING
        with self._db.write() as db:
            begun = db.execute(t.deliveries.update().where(*mine).values(begun=True))
            return bool(begun.rowcount)

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

    def postpone(
        self, delivery: DueDelivery, until: float, detail: str, now: float, *, sent: bool = True
    ) -> None:
        """Try again at `until`; nothing happens if the delivery was given up meanwhile.

        `sent`: whether the destination may have got something in this attempt.
        """
        begun = sent or delivery.begun
        with self._db.write() as db:
            waiting = db.execute(
                t.deliveries.update()
                .where(t.deliveries.c.id == delivery.id, t.deliveries.c.state == Delivery.WAITING)
                .values(attempts=t.deliveries.c.attempts + 1, due=until, detail=detail, begun=begun)
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
            advance(db, job, Event.DELIVERED, now, "")

    # the operator

    def in_state(self, state: State) -> list[int]:
        query = select(t.jobs.c.id).where(t.jobs.c.state == state).order_by(t.jobs.c.id)
        return [job for (job,) in self._db.read(query)]

    def deliveries_in_state(self, state: Delivery) -> list[int]:
        query = select(t.deliveries.c.id).where(t.deliveries.c.state == state)
        return [delivery for (delivery,) in self._db.read(query.order_by(t.deliveries.c.id))]

    def retry_job(self, job: int, now: float) -> None:
        with self._db.write() as db:
            advance(db, job, Event.RETRIED, now, "by the operator")
            db.execute(t.jobs.update().where(t.jobs.c.id == job).values(attempts=0, crashes=0))

    def retry_delivery(self, delivery: int, now: float) -> None:
        with self._db.write() as db:
            self._move(db, delivery, "retried", "by the operator", now)

    def discard_job(self, job: int, why: str, now: float) -> None:
        """Give a job up for good, its waiting deliveries with it."""
        d = t.deliveries.c
        with self._db.write() as db:
            advance(db, job, Event.DROPPED, now, why)
            owed = d.state.in_((Delivery.WAITING, Delivery.PARKED))
            db.execute(
                t.deliveries.update()
                .where(d.job == job, owed)
                .values(state=Delivery.DISCARDED, detail=why)
            )


def _outputs_of(job: int) -> Select[tuple[str, str, str]]:
    o = t.outputs.c
    columns = select(o.series_uid, o.sop_instance_uid, o.sop_class_uid)
    return columns.where(o.job == job).order_by(o.position, o.sop_instance_uid)


def _after_loss(attempts: int, crashes: int) -> Event:
    too_many = crashes >= MAX_CRASHES or attempts >= MAX_ATTEMPTS
    return Event.GAVE_UP if too_many else Event.WORKER_LOST
