"""What has been received: associations, instances, and which series are open.

The node process is the only writer while it runs, apart from an operator's `retry` and `discard`.
Every change is one transaction (see `tables.Database`); what follows a completed series is `jobs`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BindParameter, Connection, Float, bindparam, case, func, select
from sqlalchemy.dialects.sqlite import insert

from dicomnode import tables as t
from dicomnode.errors import DuplicateInstance
from dicomnode.statements import Quick
from dicomnode.tables import Database, note


@dataclass(frozen=True, slots=True)
class Arrival:
    """One stored instance, as its data set and its association tell."""

    sop_instance_uid: str
    series_uid: str
    study_uid: str
    modality: str
    sop_class_uid: str
    transfer_syntax_uid: str
    sha256: str
    size: int
    calling_ae: str
    called_ae: str
    association: int | None
    plane: Mapping[str, Any] | None
    expected: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OpenSeries:
    series_uid: str
    last_received: float
    generation: int
    interrupted: bool
    calling_ae: str
    called_ae: str


class Journal:
    """The receiving half of the journal; safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # associations

    def begin_association(self, calling_ae: str, called_ae: str, host: str, now: float) -> int:
        row = t.associations.insert().values(
            calling_ae=calling_ae, called_ae=called_ae, host=host, started=now
        )
        number = row.returning(t.associations.c.id)
        return self._db.commit(lambda db: int(db.execute(number).scalar_one()))

    def end_association(self, association: int, how: str, now: float) -> None:
        """`how`: released or aborted. A release says that the sender had sent all it wanted."""
        with self._db.write() as db:
            db.execute(
                t.associations.update()
                .where(t.associations.c.id == association)
                .values(ended=now, how=how)
            )
            if how == "released":
                carried = select(t.instances.c.series_uid).where(
                    t.instances.c.association == association
                )
                db.execute(
                    t.series.update()
                    .where(t.series.c.series_uid.in_(carried))
                    .values(interrupted=False)
                )

    def recover(self, now: float) -> None:
        """After a stop: mark the associations this node cut off, and the series they carried."""
        with self._db.write() as db:
            cut = select(t.associations.c.id).where(t.associations.c.ended.is_(None))
            carried = select(t.instances.c.series_uid).where(t.instances.c.association.in_(cut))
            db.execute(
                t.series.update()
                .where(t.series.c.open, t.series.c.series_uid.in_(carried))
                .values(interrupted=True)
            )
            db.execute(
                t.associations.update()
                .where(t.associations.c.ended.is_(None))
                .values(ended=now, how="lost")
            )

    # instances

    def remark(self, series_uid: str, text: str, now: float) -> None:
        """Add a line to the timeline of a series."""
        with self._db.write() as db:
            note(db, series_uid, now, text)

    def known(self, sop_instance_uid: str) -> tuple[str, str, bool] | None:
        """The series, digest and purged flag of a stored instance, or None."""
        rows = self._db.look_up(_KNOWN, {"uid": sop_instance_uid})
        return (rows[0][0], rows[0][1], bool(rows[0][2])) if rows else None

    def record_instance(self, arrival: Arrival, now: float, *, late: str = "regenerate") -> bool:
        """Note one stored instance; False if it was known. Late ones open a new generation.

        `late`: what `series.on_late_instances` says about instances after completion.

        Raises:
            DuplicateInstance: its SOP Instance UID is that of another instance.
        """
        values = {
            "sop_instance_uid": arrival.sop_instance_uid,
            "series_uid": arrival.series_uid,
            "sop_class_uid": arrival.sop_class_uid,
            "transfer_syntax_uid": arrival.transfer_syntax_uid,
            "sha256": arrival.sha256,
            "size": arrival.size,
            "received": now,
            "association": arrival.association,
            "plane": None if arrival.plane is None else json.dumps(arrival.plane),
            "expected": json.dumps(arrival.expected) if arrival.expected else None,
            "purged": False,
        }

        def change(db: Connection) -> bool:
            if _RECORD.say(db, values).rowcount:
                self._open_series(db, arrival, now, late)
                return True
            i = t.instances.c
            mine = i.sop_instance_uid == arrival.sop_instance_uid
            known = db.execute(select(i.series_uid, i.sha256).where(mine)).one()
            if tuple(known) != (arrival.series_uid, arrival.sha256):
                raise DuplicateInstance("other bytes are stored under this SOP Instance UID")
            db.execute(t.instances.update().where(mine).values(purged=False))
            self._touch(db, arrival, now)
            return False

        return self._db.commit(change)

    def _touch(self, db: Connection, arrival: Arrival, now: float) -> None:
        """A repeat keeps an open series waiting, and the files of a closed one for their time."""
        mine = t.series.c.series_uid == arrival.series_uid
        db.execute(t.series.update().where(mine).values(last_received=_later(now)))
        if arrival.association is not None:
            same = t.instances.c.sop_instance_uid == arrival.sop_instance_uid
            db.execute(t.instances.update().where(same).values(association=arrival.association))

    def _open_series(self, db: Connection, arrival: Arrival, now: float, late: str) -> None:
        row = _SERIES.say(db, {"uid": arrival.series_uid}).fetchone()
        if row is None:
            db.execute(
                t.series.insert().values(
                    series_uid=arrival.series_uid,
                    study_uid=arrival.study_uid,
                    modality=arrival.modality,
                    calling_ae=arrival.calling_ae,
                    called_ae=arrival.called_ae,
                    first_received=now,
                    last_received=now,
                    open=True,
                )
            )
            note(db, arrival.series_uid, now, f"first instance from {arrival.calling_ae}")
            return
        _ARRIVED.say(db, {"uid": arrival.series_uid, "now": now})
        is_open, generation = row
        if is_open:
            return
        if late == "regenerate":
            change = {"open": True, "generation": generation + 1, "outcome": ""}
            mine = t.series.c.series_uid == arrival.series_uid
            db.execute(t.series.update().where(mine).values(change))
            text = f"late instances: open again as generation {generation + 1}"
            note(db, arrival.series_uid, now, text)
        else:
            text = f"late instance {arrival.sop_instance_uid} stored, not translated (hold)"
            note(db, arrival.series_uid, now, text)

    def record_conflict(self, arrival: Arrival, now: float) -> None:
        with self._db.write() as db:
            db.execute(
                t.conflicts.insert().values(
                    sop_instance_uid=arrival.sop_instance_uid,
                    series_uid=arrival.series_uid,
                    sha256=arrival.sha256,
                    received=now,
                )
            )
            text = f"instance {arrival.sop_instance_uid} came again with other bytes: quarantined"
            note(db, arrival.series_uid, now, text)

    def instance_uids(self, series_uid: str) -> list[str]:
        i = t.instances.c
        query = select(i.sop_instance_uid).where(i.series_uid == series_uid)
        return [uid for (uid,) in self._db.read(query.order_by(i.sop_instance_uid))]

    def planes(self, series_uid: str) -> list[dict[str, Any] | None]:
        """What each instance's header said of its image plane, as recorded on arrival."""
        query = select(t.instances.c.plane).where(t.instances.c.series_uid == series_uid)
        return [None if plane is None else json.loads(plane) for (plane,) in self._db.read(query)]

    def announcements(self, series_uid: str) -> list[tuple[dict[str, int | str], int]]:
        """What instances say of the size of their series, and how many say the same."""
        i = t.instances.c
        query = select(i.expected, func.count()).where(i.series_uid == series_uid)
        rows = self._db.read(query.group_by(i.expected))
        return [(json.loads(said) if said else {}, count) for said, count in rows]

    def generation(self, series_uid: str) -> int:
        """How often the series was opened: a later one takes the place of those before."""
        query = select(t.series.c.generation).where(t.series.c.series_uid == series_uid)
        return int(self._db.read(query)[0][0])

    def open_series(self) -> list[OpenSeries]:
        s = t.series.c
        columns = (s.series_uid, s.last_received, s.generation, s.interrupted)
        query = select(*columns, s.calling_ae, s.called_ae).where(s.open)
        return [OpenSeries(*row) for row in self._db.read(query)]


def _later(now: float | BindParameter[float]) -> Any:
    """`now`, or a moment after what is recorded: `close_series` must notice every arrival."""
    recorded = t.series.c.last_received
    return case((recorded < now, now), else_=recorded + 1e-6)


# What is asked and said for every instance
_KNOWN = Quick.of(
    select(t.instances.c.series_uid, t.instances.c.sha256, t.instances.c.purged).where(
        t.instances.c.sop_instance_uid == bindparam("uid")
    )
)
_RECORD = Quick.of(
    insert(t.instances).on_conflict_do_nothing(), [column.name for column in t.instances.columns]
)
_SERIES = Quick.of(
    select(t.series.c.open, t.series.c.generation).where(t.series.c.series_uid == bindparam("uid"))
)
_ARRIVED = Quick.of(
    t.series.update()
    .where(t.series.c.series_uid == bindparam("uid"))
    .values(last_received=_later(bindparam("now", type_=Float)))
)
