"""Modality Performed Procedure Step SCP (PS3.4 F.7): what a modality says its series consist of.

Kept of a step is its status and, per performed series, the SOP instances it references; nothing of
the patient or the procedure. A step COMPLETED tells when a series is complete, see `expected`.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pydicom import Dataset
from pydicom.uid import generate_uid
from pynetdicom import evt
from pynetdicom.sop_class import ModalityPerformedProcedureStep  # type: ignore[attr-defined]
from sqlalchemy import Connection, select

from dicomnode import normalized as n
from dicomnode import tables as t
from dicomnode.errors import OperationRefused
from dicomnode.normalized import Answer, answer, items_of, valid_uid
from dicomnode.part10 import MALFORMED
from dicomnode.tables import Database, note
from dicomnode.upper_layer.dimse import UNRECOGNISED_OPERATION

log = logging.getLogger(__name__)

IN_PROGRESS, COMPLETED, DISCONTINUED = "IN PROGRESS", "COMPLETED", "DISCONTINUED"
INVALID_VALUE = 0x0106
DUPLICATE_INSTANCE = 0x0111
MISSING_ATTRIBUTE = 0x0120
MISSING_VALUE = 0x0121
NO_LONGER = "Performed Procedure Step Object may no longer be updated"
NO_LONGER_ID = 0xA710
"""Error Comment and Error ID for a change after the end of a step (PS3.4 Table F.7.2-2)."""
MAX_INSTANCES = 100_000
"""References in one request."""

_AT_CREATION = (
    "ScheduledStepAttributesSequence",
    "PerformedProcedureStepID",
    "PerformedStationAETitle",
    "PerformedProcedureStepStartDate",
    "PerformedProcedureStepStartTime",
    "PerformedProcedureStepStatus",
    "Modality",
)
"""Of type 1 for N-CREATE (PS3.4 Table F.7.2-1)."""
_AT_COMPLETION = ("PerformedProcedureStepEndDate", "PerformedProcedureStepEndTime")
"""Of type 1 for a step that is COMPLETED, beside a performed series."""
_REFERENCES = ("ReferencedImageSequence", "ReferencedNonImageCompositeSOPInstanceSequence")


@dataclass(frozen=True, slots=True)
class Step:
    """What an attribute list or modification list says."""

    status: str
    """Empty: it says nothing of the status."""
    lacking: tuple[tuple[str, int], ...]
    """Attributes that are missing or empty, with the status code for it."""
    series: Mapping[str, tuple[str, ...]] | None
    """Per performed series its SOP instances; None: no word of series."""


class PerformedSteps:
    """The MPPS SCP; safe to share between threads."""

    contexts = (str(ModalityPerformedProcedureStep),)
    """Abstract syntaxes to support."""
    reports = False

    def __init__(self, database: Database) -> None:
        self._db = database

    @property
    def handlers(self) -> list[Any]:
        """What to bind on the listening AE."""
        return [
            (evt.EVT_N_CREATE, self.on_n_create),
            (evt.EVT_N_SET, self.on_n_set),
            (evt.EVT_N_GET, self.on_n_get),
        ]

    def on_n_create(self, event: evt.Event) -> Answer:
        """A step begins (statuses: PS3.7 10.1.5.1.6)."""
        return answer("performed procedure step N-CREATE", lambda: self._create(event))

    def on_n_get(self, event: evt.Event) -> Answer:
        """Not an operation of this SOP class (PS3.4 F.7.2), but of its Retrieve SOP class."""
        return answer("performed procedure step N-GET", _refuse_get)

    def on_n_set(self, event: evt.Event) -> Answer:
        """A step goes on or ends (statuses: PS3.7 10.1.3.1.9, PS3.4 Table F.7.2-2)."""
        return answer("performed procedure step N-SET", lambda: self._set(event))

    def expected(self, series_uid: str) -> frozenset[str] | None:
        """SOP instances that finished steps say the series has; None: no word, or not the last.

        A step still IN PROGRESS, DISCONTINUED or without references for this series makes the
        answer None. When all of these are received, nothing more will come. That some are not
        received proves nothing: a modality may keep images to itself.
        """
        steps, series = t.performed_steps.c, t.performed_series.c
        query = select(steps.status, series.instances).join_from(
            t.performed_series, t.performed_steps, series.step == steps.sop_instance_uid
        )
        rows = self._db.read(query.where(series.series_uid == series_uid))
        sets = [set(json.loads(row.instances)) for row in rows]
        if not rows or not all(sets) or any(row.status != COMPLETED for row in rows):
            return None
        return frozenset().union(*sets)

    def _create(self, event: evt.Event) -> Dataset | None:
        request: Any = event.request
        if request.AffectedSOPClassUID != ModalityPerformedProcedureStep:
            raise OperationRefused(n.NO_SUCH_CLASS, "not a Modality Performed Procedure Step")
        given = request.AffectedSOPInstanceUID
        uid = valid_uid(given or generate_uid(), "AffectedSOPInstanceUID", INVALID_VALUE)
        step = read_step(lambda: event.attribute_list, _AT_CREATION)
        _require(step)
        if step.status != IN_PROGRESS:
            raise OperationRefused(INVALID_VALUE, f"a step begins with the status {IN_PROGRESS}")
        calling, now = str(event.assoc.requestor.ae_title).strip(), time.time()
        with self._db.write() as db:
            if _status(db, uid) is not None:
                raise OperationRefused(DUPLICATE_INSTANCE, "this step exists already")
            values = {"sop_instance_uid": uid, "calling_ae": calling, "status": IN_PROGRESS}
            times = {"created": now, "updated": now}
            db.execute(t.performed_steps.insert().values({**values, **times}))
            _replace_series(db, uid, step.series)
        log.info("performed procedure step %s began", uid)
        if given:
            return None
        reply = Dataset()
        reply.AffectedSOPInstanceUID = uid  # ours, as the request named none (PS3.7 10.1.5.1.4)
        return reply

    def _set(self, event: evt.Event) -> None:
        request: Any = event.request
        if request.RequestedSOPClassUID != ModalityPerformedProcedureStep:
            raise OperationRefused(n.NO_SUCH_CLASS, "not a Modality Performed Procedure Step")
        uid = valid_uid(request.RequestedSOPInstanceUID, "SOP instance", n.NO_SUCH_INSTANCE)
        step = read_step(lambda: event.modification_list, _AT_COMPLETION)
        if step.status not in ("", IN_PROGRESS, COMPLETED, DISCONTINUED):
            raise OperationRefused(INVALID_VALUE, "PerformedProcedureStepStatus is no such status")
        with self._db.write() as db:
            before = _status(db, uid)
            if before is None:
                raise OperationRefused(n.NO_SUCH_INSTANCE, "there is no such step")
            if before != IN_PROGRESS:
                raise OperationRefused(n.PROCESSING_FAILURE, NO_LONGER, NO_LONGER_ID)
            _replace_series(db, uid, step.series)
            if step.status == COMPLETED:
                _require(step)
                if not _series(db, uid):
                    raise OperationRefused(MISSING_ATTRIBUTE, "PerformedSeriesSequence is missing")
            self._update(db, uid, step.status or before)
        if step.status in (COMPLETED, DISCONTINUED):
            log.info("performed procedure step %s %s", uid, step.status)

    def _update(self, db: Connection, uid: str, status: str) -> None:
        now = time.time()
        mine = t.performed_steps.c.sop_instance_uid == uid
        change = {"status": status, "updated": now}
        db.execute(t.performed_steps.update().where(mine).values(change))
        if status == IN_PROGRESS:
            return
        for series_uid, instances in _series(db, uid).items():
            text = f"performed procedure step {status}: {len(instances)} instances"
            note(db, series_uid, now, text)


def _refuse_get() -> NoReturn:
    raise OperationRefused(UNRECOGNISED_OPERATION, "N-GET is of the MPPS Retrieve SOP class")


def read_step(get: Callable[[], Dataset], wanted: tuple[str, ...]) -> Step:
    """What a step's data set says; `get` decodes it, `wanted` are the keywords it must have.

    Raises:
        OperationRefused: it cannot be parsed, has too many references, or a UID is none.
    """
    try:
        dataset = get()
        status = str(dataset.get("PerformedProcedureStepStatus") or "").strip()
        lacking = tuple(
            (keyword, MISSING_VALUE if keyword in dataset else MISSING_ATTRIBUTE)
            for keyword in wanted
            if not dataset.get(keyword)
        )
        has_series = "PerformedSeriesSequence" in dataset
        items = [_performed(item) for item in items_of(dataset, "PerformedSeriesSequence")]
    except MALFORMED as error:
        raise OperationRefused(n.PROCESSING_FAILURE, "the data set cannot be parsed") from error
    if sum(len(instances) for _, instances in items) > MAX_INSTANCES:
        raise OperationRefused(n.RESOURCE_LIMITATION, f"more than {MAX_INSTANCES} instances")
    series: dict[str, tuple[str, ...]] = {}
    for value, references in items:
        uid = valid_uid(value, "SeriesInstanceUID", INVALID_VALUE)
        checked = [valid_uid(r, "ReferencedSOPInstanceUID", INVALID_VALUE) for r in references]
        series[uid] = (*series.get(uid, ()), *checked)
    return Step(status, lacking, series if has_series else None)


def _performed(item: Dataset) -> tuple[Any, list[Any]]:
    """The series UID of a performed series, and the SOP instances it references."""
    references = [reference for keyword in _REFERENCES for reference in items_of(item, keyword)]
    return item.get("SeriesInstanceUID"), [r.get("ReferencedSOPInstanceUID") for r in references]


def _require(step: Step) -> None:
    if step.lacking:
        keyword, status = step.lacking[0]
        raise OperationRefused(status, f"{keyword} is missing or empty")


def _status(db: Connection, uid: str) -> str | None:
    s = t.performed_steps.c
    found: str | None = db.execute(select(s.status).where(s.sop_instance_uid == uid)).scalar()
    return found


def _series(db: Connection, uid: str) -> dict[str, list[str]]:
    s = t.performed_series.c
    rows = db.execute(select(s.series_uid, s.instances).where(s.step == uid)).all()
    return {series_uid: json.loads(instances) for series_uid, instances in rows}


def _replace_series(db: Connection, uid: str, series: Mapping[str, tuple[str, ...]] | None) -> None:
    """A sequence is always sent whole: what is new replaces what was (PS3.4 F.7.2.2.2)."""
    if series is None:
        return
    db.execute(t.performed_series.delete().where(t.performed_series.c.step == uid))
    rows = [
        {"step": uid, "series_uid": series_uid, "instances": json.dumps(sorted(set(instances)))}
        for series_uid, instances in series.items()
    ]
    if rows:
        db.execute(t.performed_series.insert(), rows)
