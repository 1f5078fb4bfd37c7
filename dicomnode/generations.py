"""What late instances mean for what was made before: superseded, withdrawn, or kept.

Never two valid results of one series at a destination: where an earlier generation may have
arrived, a job of its own kind withdraws it (a Key Object Selection, IHE RAD IOCM), and nothing of
a later generation goes there before that is done.
"""

from typing import Literal

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, select

from dicomnode import tables as t
from dicomnode.errors import JournalError
from dicomnode.lifecycle import TRANSITIONS, Delivery, Event, State, after
from dicomnode.tables import note

OnSuperseded = Literal["retract", "keep"]
WITHDRAWAL_PRIORITY = -1
"""Before every translation: until it is sent, nothing of the later generation is."""
OWED = (Delivery.WAITING, Delivery.PARKED)


def advance(
    db: Connection, job: int, event: Event, now: float, detail: str, code: str = ""
) -> State:
    """Bring a job to its next state, and say so in the timeline.

    Raises:
        JournalError: there is no such job, or the table has no such change.
    """
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


def supersede(
    db: Connection, series_uid: str, generation: int, on_superseded: OnSuperseded, now: float
) -> None:
    """Make every earlier result of a series give way to a generation that has just closed."""
    j = t.jobs.c
    earlier = select(j.id, j.state, j.generation, j.route).where(
        j.series_uid == series_uid, j.generation < generation, j.retracts.is_(None)
    )
    for job, state, its_generation, route in db.execute(earlier).all():
        d = t.deliveries.c
        reached = list(
            db.execute(select(d.destination).where(d.job == job, d.begun).order_by(d.id)).scalars()
        )
        if reached and on_superseded == "keep":
            where = ", ".join(reached)
            text = f"generation {its_generation} stays at {where}: both will be there"
            note(db, series_uid, now, f"{text} (series.on_superseded: keep)", job)
            continue
        owed = t.deliveries.update().where(d.job == job, d.state.in_(OWED))
        db.execute(owed.values(state=Delivery.DISCARDED, detail="superseded"))
        can = (State(state), Event.OVERTAKEN) in TRANSITIONS and state != State.TRANSLATING
        if can:
            advance(db, job, Event.OVERTAKEN, now, f"by generation {generation}")
        if reached:
            _withdraw(db, series_uid, generation, job, route, reached, now)


def _withdraw(
    db: Connection,
    series_uid: str,
    generation: int,
    job: int,
    route: str,
    destinations: list[str],
    now: float,
) -> None:
    """Queue the job that withdraws another one's result, once, with a delivery per destination."""
    j = t.jobs.c
    if db.execute(select(j.id).where(j.retracts == job)).first() is not None:
        return
    row = t.jobs.insert().values(
        series_uid=series_uid,
        generation=generation,
        route=route,
        retracts=job,
        state=State.QUEUED,
        priority=WITHDRAWAL_PRIORITY,
        created=now,
        updated=now,
    )
    number = int(db.execute(row.returning(j.id)).scalar_one())
    rows = [
        {
            "job": number,
            "destination": name,
            "state": Delivery.WAITING,
            "created": now,
            "due": now,
        }
        for name in destinations
    ]
    db.execute(t.deliveries.insert(), rows)
    words = f"job {number} withdraws what job {job} made from {', '.join(destinations)}"
    note(db, series_uid, now, f"{words}; only then is generation {generation} sent", number)


def withdrawn(series_uid: str) -> Select[tuple[str]]:
    """Derived SeriesInstanceUIDs of a source series that were, or are to be, withdrawn."""
    j, o = t.jobs.c, t.outputs.c
    retracted = select(j.retracts).where(j.series_uid == series_uid, j.retracts.is_not(None))
    return select(o.series_uid).where(o.job.in_(retracted)).distinct()


def waits_for_withdrawal() -> ColumnElement[bool]:
    """Whether a delivery (of `tables.deliveries` joined with `tables.jobs`) has to wait."""
    j, d = t.jobs.c, t.deliveries.c
    job, delivery = t.jobs.alias("withdrawal"), t.deliveries.alias("withdrawn")
    owed = (
        select(delivery.c.id)
        .join_from(delivery, job, delivery.c.job == job.c.id)
        .where(
            job.c.retracts.is_not(None),
            job.c.series_uid == j.series_uid,
            delivery.c.destination == d.destination,
            delivery.c.state.in_(OWED),
        )
    )
    return and_(j.retracts.is_(None), exists(owed.correlate(t.jobs, t.deliveries)))
