"""Deleting what is old: never what is still to be translated, delivered or committed.

Only files go; the journal keeps every row, so that a series that is sent again after its files
were purged is known, stored again and not translated twice. Rows are marked first, with a note of
the folder whose files are to go; what a crash, or a disk that refuses, leaves of them is deleted
at the next look.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, func, or_, select
from sqlalchemy.dialects.sqlite import insert

from dicomnode import tables as t
from dicomnode.config import NodeConfig, RetentionSection
from dicomnode.lifecycle import FINAL, Delivery, State
from dicomnode.promises import uncommitted
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


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be deleted, and when."""

    times: RetentionSection
    committing: frozenset[str] = frozenset()
    """Peers that are to commit what they accepted before it may go."""

    @staticmethod
    def of(config: NodeConfig) -> "Rules":
        return Rules(config.retention, config.committing_peers)

    @property
    def waits_for(self) -> frozenset[str]:
        return self.committing if self.times.require_commitment else frozenset()


def purge(database: Database, spool: Spool, rules: Rules, now: float) -> int:
    """Delete files past their time; returns how many series folders went."""
    old = f"after {rules.times.received_hours:g} hours"
    for (uid,) in database.read(_old_received(rules, now)):
        _mark_received(database, _old_received(rules, now), uid, old, now)
    old = f"after {rules.times.results_hours:g} hours"
    for (job,) in database.read(_old_results(rules, now)):
        _mark_results(database, _old_results(rules, now), job, old, now)
    return _strays(database, spool, rules.times, now) + _remove_marked(database, spool)


def make_room(database: Database, spool: Spool, rules: Rules, now: float) -> int:
    """Delete what is delivered, the oldest first, until enough is free; the bytes it frees.

    What a backup holds by a hard link stays: to delete it would free nothing.
    """
    wanted = int(rules.times.watermark_free_gb * 1e9) - spool.free_bytes()
    freed = 0
    for kind, name, folders in _delivered(database, spool, rules) if wanted > 0 else ():
        if freed >= wanted:
            break
        size = _frees(folders)
        if size and _mark_delivered(database, rules, kind, name, now):
            freed += size
    if freed:
        _remove_marked(database, spool)
    return freed


# what may go


def _old_received(rules: Rules, now: float) -> Select[tuple[str]]:
    """Source series whose time is over."""
    s, i = t.series.c, t.instances.c
    before = now - rules.times.received_hours * 3600
    told_since = and_(t.commitment_items.c.failure == 0, t.commitments.c.updated >= before)
    return select(s.series_uid).where(
        ~s.open,
        s.last_received < before,
        s.series_uid.not_in(_with_jobs(t.jobs.c.state.in_(UNFINISHED))),
        s.series_uid.not_in(_with_jobs(t.jobs.c.id.in_(uncommitted(rules.waits_for)))),
        s.series_uid.not_in(_promised(told_since)),
        exists().where(i.series_uid == s.series_uid, ~i.purged),
    )


def _old_results(rules: Rules, now: float) -> Select[tuple[int]]:
    """Jobs whose derived files are past their time."""
    j = t.jobs.c
    old = j.updated < now - rules.times.results_hours * 3600
    return _finished(rules).where(old)


def _finished(rules: Rules) -> Select[tuple[int]]:
    """Jobs that have derived files nobody needs any more."""
    j, o = t.jobs.c, t.outputs.c
    return select(j.id).where(
        j.state.in_(FINAL),
        ~j.purged,
        exists().where(o.job == j.id),
        j.id.not_in(uncommitted(rules.waits_for)),
    )


def _delivered_received(rules: Rules) -> Select[tuple[str]]:
    """Source series of which a result was delivered, and nothing more is owed to anybody."""
    s, i = t.series.c, t.instances.c
    return select(s.series_uid).where(
        ~s.open,
        s.series_uid.in_(_with_jobs(_is_delivered())),
        s.series_uid.not_in(_with_jobs(t.jobs.c.state.in_(UNFINISHED))),
        s.series_uid.not_in(_with_jobs(t.jobs.c.id.in_(uncommitted(rules.waits_for)))),
        s.series_uid.not_in(_promised(t.commitment_items.c.failure == 0)),
        exists().where(i.series_uid == s.series_uid, ~i.purged),
    )


def _delivered_results(rules: Rules) -> Select[tuple[int]]:
    """Jobs that have delivered their result to every destination."""
    still_open = select(t.series.c.series_uid).where(t.series.c.open)
    may_be_withdrawn = t.jobs.c.series_uid.in_(still_open)
    return _finished(rules).where(_is_delivered(), ~may_be_withdrawn)


def _is_delivered() -> ColumnElement[bool]:
    """Has a job (of `tables.jobs`) delivered all it owes, to somebody at least?"""
    j, d = t.jobs.c, t.deliveries.c
    mine = d.job == j.id
    return and_(
        j.state == State.DONE,
        exists().where(mine, d.state == Delivery.DELIVERED),
        ~exists().where(mine, d.state != Delivery.DELIVERED),
    )


def _promised(told: ColumnElement[bool]) -> Select[tuple[str]]:
    """Source series with an instance we are asked to commit, or have committed as `told` says."""
    i, c, items = t.instances.c, t.commitments.c, t.commitment_items.c
    not_told_yet = c.state.in_((Commitment.CHECKING, Commitment.REPORTING))
    return (
        select(i.series_uid)
        .join_from(t.commitment_items, t.instances, items.sop_instance_uid == i.sop_instance_uid)
        .join(t.commitments, c.transaction_uid == items.transaction_uid)
        .where(or_(not_told_yet, told))
    )


def _with_jobs(condition: ColumnElement[bool]) -> Select[tuple[str]]:
    """Source series that have such a job."""
    return select(t.jobs.c.series_uid).where(condition)


# the oldest of what is delivered

_Name = str | int
"""SeriesInstanceUID of a source series, or number of a job."""


def _delivered(
    database: Database, spool: Spool, rules: Rules
) -> Iterable[tuple[Removal, _Name, list[Path]]]:
    """Source series and jobs whose files may make room, with their folders, the oldest first."""
    j, o = t.jobs.c, t.outputs.c
    received = (
        select(func.max(j.updated), j.series_uid)
        .where(j.series_uid.in_(_delivered_received(rules)), j.state == State.DONE)
        .group_by(j.series_uid)
    )
    results = select(j.updated, j.id).where(j.id.in_(_delivered_results(rules)))
    found: list[tuple[float, Removal, _Name]] = []
    found += [(row[0], Removal.RECEIVED, row[1]) for row in database.read(received)]
    found += [(row[0], Removal.RESULTS, row[1]) for row in database.read(results)]
    for _, kind, name in sorted(found, key=lambda one: one[0]):  # of one time: received first
        if kind is Removal.RECEIVED:
            yield kind, name, [spool.received / str(name)]
        else:
            made = select(o.series_uid).where(o.job == name).distinct()
            yield kind, name, [spool.results / uid for (uid,) in database.read(made)]


def _frees(folders: Iterable[Path]) -> int:
    """Bytes that the disk gets back when these folders go."""
    size = 0
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
            for file in folder.iterdir():
                status = file.stat()
                size += status.st_size if status.st_nlink == 1 else 0
    return size


def _mark_delivered(
    database: Database, rules: Rules, kind: Removal, name: _Name, now: float
) -> bool:
    why = "early: free space is below retention.watermark_free_gb"
    if kind is Removal.RECEIVED:
        return _mark_received(database, _delivered_received(rules), str(name), why, now)
    return _mark_results(database, _delivered_results(rules), int(name), why, now)


# marked, then removed


def _mark_received(
    database: Database, may_go: Select[tuple[str]], uid: str, why: str, now: float
) -> bool:
    """Mark a source series for removal, if it may (still) go."""
    i = t.instances.c
    with database.write() as db:  # the rows first: they must not promise a file that is gone
        if db.execute(may_go.where(t.series.c.series_uid == uid)).one_or_none() is None:
            return False  # an instance came meanwhile
        mine = i.series_uid == uid
        db.execute(t.instances.update().where(mine, ~i.purged).values(purged=True))
        _note_removals(db, Removal.RECEIVED, [uid])
        note(db, uid, now, f"received files deleted {why}")
        return True


def _mark_results(
    database: Database, may_go: Select[tuple[int]], job: int, why: str, now: float
) -> bool:
    """Mark what a job made for removal, if it may (still) go."""
    j, o = t.jobs.c, t.outputs.c
    with database.write() as db:
        if db.execute(may_go.where(j.id == job)).one_or_none() is None:
            return False
        series_uid = db.execute(select(j.series_uid).where(j.id == job)).scalar_one()
        made = db.execute(select(o.series_uid).where(o.job == job).distinct()).scalars().all()
        db.execute(t.jobs.update().where(j.id == job).values(purged=True))
        _note_removals(db, Removal.RESULTS, made)
        note(db, series_uid, now, f"derived files of job {job} deleted {why}", job)
        return True


def _note_removals(db: Connection, kind: Removal, series_uids: Sequence[str]) -> None:
    rows = [{"kind": kind, "series_uid": uid} for uid in series_uids]
    db.execute(insert(t.removals).on_conflict_do_nothing(), rows)


def _remove_marked(database: Database, spool: Spool) -> int:
    """Delete the files of whatever is marked; how many folders went."""
    removed = 0
    for kind, series_uid in database.read(select(t.removals.c.kind, t.removals.c.series_uid)):
        try:
            removed += _REMOVE[Removal(kind)](database, spool, series_uid)
        except OSError as error:
            log.warning("%s of series %s cannot be deleted: %s", kind, series_uid, error.strerror)
    return removed


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
        making = _with_jobs(j.state == State.TRANSLATING).where(j.series_uid.in_(sources))
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
