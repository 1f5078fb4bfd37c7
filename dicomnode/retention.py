"""Deleting what is old: never what is still to be translated or delivered.

Only files go; the journal keeps every row, so that a series that is sent again after its files
were purged is known, stored again and not translated twice.
"""

import contextlib
import logging
import shutil

from sqlalchemy import select

from dicomnode import tables as t
from dicomnode.config import RetentionSection
from dicomnode.lifecycle import FINAL
from dicomnode.spool import Spool
from dicomnode.tables import Database, note
from dicomnode.transactions import Commitment

log = logging.getLogger(__name__)


def purge(database: Database, spool: Spool, rules: RetentionSection, now: float) -> int:
    """Delete files past their time; returns how many series folders went."""
    return _received(database, spool, rules, now) + _results(database, spool, rules, now)


def _received(database: Database, spool: Spool, rules: RetentionSection, now: float) -> int:
    s, i = t.series.c, t.instances.c
    owing = select(t.jobs.c.series_uid).where(t.jobs.c.state.not_in(FINAL))
    stored = select(i.series_uid).where(~i.purged)
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
        s.series_uid.not_in(owing),
        s.series_uid.not_in(promised),  # asked to commit, and not told the result yet
        s.series_uid.in_(stored),
    )
    gone = 0
    for (uid,) in database.read(old):
        mine = i.series_uid == uid
        with database.write() as db:  # the rows first: a file without a row would be adopted
            if db.execute(old.where(s.series_uid == uid)).one_or_none() is None:
                continue  # an instance came meanwhile
            rows = db.execute(select(i.sop_instance_uid).where(mine, ~i.purged)).all()
            db.execute(t.instances.update().where(mine).values(purged=True))
            note(db, uid, now, f"received files deleted after {rules.received_hours:g} hours")
        for (sop_instance_uid,) in rows:  # only these: others may be coming in just now
            spool.path(uid, sop_instance_uid).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or gone
            (spool.received / uid).rmdir()
        gone += 1
    return gone


def _results(database: Database, spool: Spool, rules: RetentionSection, now: float) -> int:
    j = t.jobs.c
    needed = select(j.derived_uid).where(j.state.not_in(FINAL), j.derived_uid.is_not(None))
    old = select(j.derived_uid).where(
        j.state.in_(FINAL),
        j.updated < now - rules.results_hours * 3600,
        j.derived_uid.is_not(None),
        j.derived_uid.not_in(needed),
    )
    gone = 0
    for (uid,) in database.read(old.distinct()):
        folder = spool.results / uid
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            gone += 1
    return gone
