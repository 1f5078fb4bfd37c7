"""Do the stored files equal what the journal says? The check behind ``check --storage``."""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import select

from dicomnode import tables as t
from dicomnode.spool import Spool, dataset_digest
from dicomnode.tables import Database


@dataclass(frozen=True, slots=True)
class Fault:
    """One file or row that does not fit the other."""

    sop_instance_uid: str
    series_uid: str
    what: str


def storage_faults(database: Database, spool: Spool) -> Iterator[Fault | int]:
    """Compare every row with its file, and every file with its row.

    Yields a `Fault` for each difference and, at the end, how many instances were compared. Reads
    every byte stored; may run beside a running node.
    """
    i = t.instances.c
    query = select(i.sop_instance_uid, i.series_uid, i.sha256).where(~i.purged)
    known: set[tuple[str, str]] = set()
    for uid, series_uid, digest in database.read(query):
        known.add((series_uid, uid))
        path = spool.path(series_uid, uid)
        if not path.is_file():
            yield Fault(uid, series_uid, "the file is missing; send the instance again")
        elif dataset_digest(path)[0] != digest:
            yield Fault(uid, series_uid, "the stored bytes are not those received")
    for series_uid, uid, _ in spool.stored():
        if (series_uid, uid) not in known and not _known_now(database, uid):
            yield Fault(uid, series_uid, "a file without a journal entry; never acknowledged")
    yield len(known)


def _known_now(database: Database, uid: str) -> bool:
    """It may have arrived since the rows were read."""
    i = t.instances.c
    return bool(database.read(select(i.size).where(i.sop_instance_uid == uid, ~i.purged)))
