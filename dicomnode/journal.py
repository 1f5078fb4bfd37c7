"""What has been received: associations, instances, and which series are open.

The node process is the only writer while it runs, apart from an operator's `retry` and `discard`.
Every change is one transaction (see `tables.Database`); what follows a completed series is `jobs`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    BindParameter,
    Connection,
    Float,
    bindparam,
    case,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError

from dicomnode import tables as t
from dicomnode.errors import DuplicateInstance, JournalError
from dicomnode.statements import Quick
from dicomnode.tables import Database, note
from dicomnode.waiting import WaitingRows


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

    def plain(self) -> dict[str, Any]:
        """As values that JSON has; `Arrival(**plain)` is the same again."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class _Instance:
    """An arrival on its way to its row."""

    arrival: Arrival
    received: float
    late: str
    """What `series.on_late_instances` says about instances after completion."""

    def values(self) -> dict[str, Any]:
        """Of its row."""
        arrival = self.arrival
        return {
            "sop_instance_uid": arrival.sop_instance_uid,
            "series_uid": arrival.series_uid,
            "sop_class_uid": arrival.sop_class_uid,
            "transfer_syntax_uid": arrival.transfer_syntax_uid,
            "sha256": arrival.sha256,
            "size": arrival.size,
            "received": self.received,
            "association": arrival.association,
            "plane": None if arrival.plane is None else json.dumps(arrival.plane),
            "expected": json.dumps(arrival.expected) if arrival.expected else None,
            "purged": False,
        }


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
        self.waiting: WaitingRows[_Instance] = WaitingRows(self._record_all)
        """Rows of instances that are in the redo log; nobody else sees them yet."""

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

    def rewrite(self) -> None:
        """See `Database.rewrite`."""
        self._db.rewrite()

    def has_association(self, association: int) -> bool:
        mine = select(t.associations.c.id).where(t.associations.c.id == association)
        return bool(self._db.read(mine))

    # instances

    def remark(self, series_uid: str, text: str, now: float) -> None:
        """Add a line to the timeline of a series."""
        with self._db.write() as db:
            note(db, series_uid, now, text)

    def known(self, sop_instance_uid: str) -> tuple[str, str, bool] | None:
        """The series, digest and purged flag of a stored instance, or None."""
        rows = self._db.look_up(_KNOWN, {"uid": sop_instance_uid})
        return (rows[0][0], rows[0][1], bool(rows[0][2])) if rows else None

    def record_instance(
        self, arrival: Arrival, now: float, *, late: str = "regenerate", unsynced: bool = False
    ) -> bool:
        """Note one stored instance; False if it was known. Late ones open a new generation.

        `late`: what `series.on_late_instances` says about instances after completion.
        `unsynced`: its row need not be durable yet, it is in the redo log.

        Raises:
            DuplicateInstance: its SOP Instance UID is that of another instance.
        """
        row = _Instance(arrival, now, late)
        recorded = self._db.commit(lambda db: self._record(db, row), unsynced=unsynced)
        self.waiting.prove()
        return recorded

    def record_soon(self, arrival: Arrival, now: float, *, late: str) -> bool:
        """Note an instance that nobody knows and that is in the redo log: soon, with others.

        False: it is not noted, the journal may not take it; `record_instance` knows.
        """
        row = _Instance(arrival, now, late)
        return self.waiting.add(arrival.sop_instance_uid, arrival.series_uid, row)

    def _record_all(self, rows: Sequence["_Instance"]) -> None:
        """As `_record` for each, of which nobody knows any.

        In few statements: for each, SQLite leaves the interpreter and has to wait for it again.

        Raises:
            JournalError: none is recorded.
        """
        of_series: dict[str, list[_Instance]] = {}
        for row in rows:
            of_series.setdefault(row.arrival.series_uid, []).append(row)
        values = (row.values() for row in rows)
        table = json.dumps([[each[name] for name in _COLUMNS] for each in values])

        def change(db: Connection) -> None:
            if _RECORD_ALL.say(db, {"rows": table}).rowcount != len(rows):
                for row in rows:
                    self._must_be_same(db, row.arrival)
            for first, *others in of_series.values():
                if not self._open_series(db, first):
                    for row in others:
                        self._open_series(db, row)
                elif others:
                    last = others[-1]
                    _ARRIVED.say(db, {"uid": last.arrival.series_uid, "now": last.received})

        try:
            self._db.commit(change, unsynced=True)
        except (SQLAlchemyError, DuplicateInstance) as error:
            raise JournalError(type(error).__name__) from error

    def _record(self, db: Connection, row: "_Instance") -> bool:
        if not _RECORD.say(db, row.values()).rowcount:
            self._repeat(db, row)
            return False
        self._open_series(db, row)
        return True

    def _repeat(self, db: Connection, row: "_Instance") -> None:
        """It was known.

        Raises:
            DuplicateInstance: as another instance.
        """
        self._must_be_same(db, row.arrival)
        mine = t.instances.c.sop_instance_uid == row.arrival.sop_instance_uid
        db.execute(t.instances.update().where(mine).values(purged=False))
        self._touch(db, row.arrival, row.received)

    def _must_be_same(self, db: Connection, arrival: Arrival) -> None:
        i = t.instances.c
        mine = i.sop_instance_uid == arrival.sop_instance_uid
        known = db.execute(select(i.series_uid, i.sha256).where(mine)).one()
        if tuple(known) != (arrival.series_uid, arrival.sha256):
            raise DuplicateInstance("other bytes were stored under this SOP Instance UID")

    def _touch(self, db: Connection, arrival: Arrival, now: float) -> None:
        """A repeat keeps an open series waiting, and the files of a closed one for their time."""
        mine = t.series.c.series_uid == arrival.series_uid
        db.execute(t.series.update().where(mine).values(last_received=_later(now)))
        if arrival.association is not None:
            same = t.instances.c.sop_instance_uid == arrival.sop_instance_uid
            db.execute(t.instances.update().where(same).values(association=arrival.association))

    def _open_series(self, db: Connection, row: "_Instance") -> bool:
        """A new instance belongs to it; False if it stays closed all the same."""
        arrival, now = row.arrival, row.received
        known = _ARRIVED.say(db, {"uid": arrival.series_uid, "now": now}).fetchall()
        if not known:
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
            return True
        is_open, generation = known[0]
        if is_open:
            return True
        if row.late == "regenerate":
            change = {"open": True, "generation": generation + 1, "outcome": ""}
            mine = t.series.c.series_uid == arrival.series_uid
            db.execute(t.series.update().where(mine).values(change))
            text = f"late instances: open again as generation {generation + 1}"
            note(db, arrival.series_uid, now, text)
            return True
        text = f"late instance {arrival.sop_instance_uid} stored, not translated (hold)"
        note(db, arrival.series_uid, now, text)
        return False

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
_COLUMNS = [column.name for column in t.instances.columns]
_RECORD = Quick.of(insert(t.instances).on_conflict_do_nothing(), _COLUMNS)
_ROWS = func.json_each(bindparam("rows")).table_valued("value")
_RECORD_ALL = Quick.of(
    insert(t.instances)
    .from_select(
        _COLUMNS,
        select(
            *(func.json_extract(_ROWS.c.value, f"$[{n}]") for n, _ in enumerate(_COLUMNS))
        ).where(
            literal_column("true")  # else SQLite takes ON for a join's
        ),
    )
    .on_conflict_do_nothing()
)
_ARRIVED = Quick.of(
    t.series.update()
    .where(t.series.c.series_uid == bindparam("uid"))
    .values(last_received=_later(bindparam("now", type_=Float)))
    .returning(t.series.c.open, t.series.c.generation)
)
