"""Deleting what is old: never what is still to be translated, delivered or committed.

Only files go; the journal keeps every row, so that a series that is sent again after its files
were purged is known, stored again and not translated twice. Rows are marked first, with a note of
the folder whose files are to go; what a crash, or a disk that refuses, leaves of them is deleted
at the next look.
"""

import contextlib
import logging
import shutil
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import Connection, Select, exists, select
from sqlalchemy.dialects.sqlite import insert

from dicomnode import tables as t
from dicomnode.config import RetentionSection
from dicomnode.lifecycle import FINAL, State
from dicomnode.spool import Spool
from dicomnode.tables import Database, note
from dicomnode.transactions import Commitment

log = logging.getLogger(__name__)

UNFINISHED = tuple(state for state in State if state not in FINAL)
_AT_A_TIME = 500
"""Files deleted while nothing else can be written: a few milliseconds."""
_LEAST_STRAY_HOURS = 1.0
"""Nobody still writes into a results folder that did not change for so long."""


class Removal(StrEnum):
    """Whose files are to be deleted."""

    RECEIVED = "received"
    RESULTS = "results"


def purge(database: Database, spool: Spool, rules: RetentionSection, now: float) -> int:
    """Delete files past their time; returns how many series folders went."""
    _mark_received(database, rules, now)
    _mark_results(database, rules, now)
    removed = _strays(database, spool, rules, now)
    for kind, series_uid in database.read(select(t.removals.c.kind, t.removals.c.series_uid)):
        try:
            removed += _REMOVE[Removal(kind)](database, spool, series_uid)
        except OSError as error:
            log.warning("%s of series %s cannot be deleted: %s", kind, series_uid, error.strerror)
    return removed


def _mark_received(database: Database, rules: RetentionSection, now: float) -> None:
    s, i = t.series.c, t.instances.c
    c, items = t.commitments.c, t.commitment_items.c
    promised = (
        select(i.series_uid)
        .join_from(t.commitment_items, t.instances, items.sop_instance_uid == i.sop_instance_uid)
        .join(t.commitments, c.transaction_uid == items.transaction_uid)
        .where(c.state.in_((Commitment.CHECKING, Commitment.REPORTING)))
    )
    old = select(s.series_uid).where(
        ~s.open,
        s.last_received < now - rules.received_hours * 3600,
        s.series_uid.not_in(_with_jobs(*UNFINISHED)),
        s.series_uid.not_in(promised),  # asked to commit, and not told the result yet
        exists().where(i.series_uid == s.series_uid, ~i.purged),
    )
    for (uid,) in database.read(old):
        with database.write() as db:  # the rows first: a file without a row would be adopted
            if db.execute(old.where(s.series_uid == uid)).one_or_none() is None:
                continue  # an instance came meanwhile
            mine = i.series_uid == uid
            db.execute(t.instances.update().where(mine, ~i.purged).values(purged=True))
            _note_removals(db, Removal.RECEIVED, [uid])
            note(db, uid, now, f"received files deleted after {rules.received_hours:g} hours")


def _mark_results(database: Database, rules: RetentionSection, now: float) -> None:
    j, o = t.jobs.c, t.outputs.c
    old = select(j.id, j.series_uid).where(
        j.state.in_(FINAL),
        j.updated < now - rules.results_hours * 3600,
        ~j.purged,
        exists().where(o.job == j.id),
    )
    for job, series_uid in database.read(old):
        with database.write() as db:
            if db.execute(old.where(j.id == job)).one_or_none() is None:
                continue
            made = db.execute(select(o.series_uid).where(o.job == job).distinct()).scalars().all()
            db.execute(t.jobs.update().where(j.id == job).values(purged=True))
            _note_removals(db, Removal.RESULTS, made)
            text = f"derived files of job {job} deleted after {rules.results_hours:g} hours"
            note(db, series_uid, now, text, job)


def _with_jobs(*states: State) -> Select[tuple[str]]:
    """Source series that have a job in one of these states."""
    return select(t.jobs.c.series_uid).where(t.jobs.c.state.in_(states))


def _note_removals(db: Connection, kind: Removal, series_uids: Sequence[str]) -> None:
    rows = [{"kind": kind, "series_uid": uid} for uid in series_uids]
    db.execute(insert(t.removals).on_conflict_do_nothing(), rows)


def _done(db: Connection, kind: Removal, series_uid: str) -> None:
    r = t.removals.c
    db.execute(t.removals.delete().where(r.kind == kind, r.series_uid == series_uid))


def _remove_received(database: Database, spool: Spool, series_uid: str) -> int:
    """Delete the files whose rows are marked; others may be coming in just now.

    No row changes while a file goes: an instance that comes again is either marked no longer, or
    finds its file gone once its row is written (`scp`).
    """
    i = t.instances.c
    marked = select(i.sop_instance_uid).where(i.series_uid == series_uid, i.purged)
    uids = [uid for (uid,) in database.read(marked)]
    for start in range(0, len(uids), _AT_A_TIME):
        some = uids[start : start + _AT_A_TIME]
        with database.write() as db:
            for (uid,) in db.execute(marked.where(i.sop_instance_uid.in_(some))):
                spool.path(series_uid, uid).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or gone
        (spool.received / series_uid).rmdir()
    with database.write() as db:
        _done(db, Removal.RECEIVED, series_uid)
    return 1


def _remove_results(database: Database, spool: Spool, series_uid: str) -> int:
    """Delete a derived series, unless a later job has made, or may be making, the same again."""
    j, o = t.jobs.c, t.outputs.c
    makers = (
        select(j.series_uid, j.purged)
        .join_from(t.outputs, t.jobs, o.job == j.id)
        .where(o.series_uid == series_uid)
        .distinct()
    )
    with database.write() as db:
        found = db.execute(makers).all()
        sources = [source for source, _ in found]
        making = _with_jobs(State.TRANSLATING).where(j.series_uid.in_(sources))
        if db.execute(making.limit(1)).first() is not None:
            return 0  # it may just be writing them; looked at again next time
        _done(db, Removal.RESULTS, series_uid)
        if not all(purged for _, purged in found):
            return 0  # the last of them to grow old takes it along
        folder = spool.results / series_uid
        if not folder.is_dir():
            return 0
        shutil.rmtree(folder)
    return 1


_REMOVE = {Removal.RECEIVED: _remove_received, Removal.RESULTS: _remove_results}


def _strays(database: Database, spool: Spool, rules: RetentionSection, now: float) -> int:
    """Delete old results that no job knows: their translation was overtaken, or cut off."""
    before = now - max(rules.results_hours, _LEAST_STRAY_HOURS) * 3600
    gone = 0
    for folder in spool.results.iterdir():
        known = select(t.outputs.c.job).where(t.outputs.c.series_uid == folder.name).limit(1)
        if folder.stat().st_mtime < before and not database.read(known):
            shutil.rmtree(folder, ignore_errors=True)
            gone += 1
    return gone
