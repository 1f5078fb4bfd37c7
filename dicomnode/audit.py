"""Do the stored files equal what the journal says? The check behind ``check --storage``.

One series at a time: as little memory for a million instances as for a hundred.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import select

from dicomnode import tables as t
from dicomnode.redo import REDO
from dicomnode.segments import unsettled
from dicomnode.spool import Spool, dataset_digest
from dicomnode.tables import Database
from dicomnode.upper_layer.incoming import meta_element


@dataclass(frozen=True, slots=True)
class Fault:
    """One file or row that does not fit the other."""

    sop_instance_uid: str
    series_uid: str
    what: str


@dataclass(frozen=True, slots=True)
class Stored:
    """What the journal says of an instance whose file should be there."""

    uid: str
    digest: str
    sop_class_uid: str
    transfer_syntax_uid: str


def storage_faults(database: Database, spool: Spool) -> Iterator[Fault | int]:
    """Compare every row with its file, and every file with its row.

    Yields a `Fault` for each difference and, at the end, how many instances were compared. Reads
    every byte stored; may run beside a running node.
    """
    first = logged = in_log(spool)
    read, told = time.monotonic(), set[str]()
    for found in _differences(database, spool):
        if isinstance(found, Fault):
            if time.monotonic() - read > _STALE_SECONDS:
                logged, read = in_log(spool), time.monotonic()
            if found.sop_instance_uid in logged:
                told.add(found.sop_instance_uid)
                found = replace(found, what=IN_LOG)
        else:  # the last, the count
            others = {uid: series for uid, series in first.items() if uid not in told}
            yield from only_in_log(database, others)
        yield found


IN_LOG = (
    "it is in the redo log: the node puts it right as soon as the journal can be changed, or when "
    "it starts; then try again"
)
_STALE_SECONDS = 1.0
"""After so long a running node may have new instances in its redo log, or have noted what was."""


def in_log(spool: Spool) -> dict[str, str]:
    """The instances that the next start does again, each with its series."""
    arrivals = [entry.label["arrival"] for entry in unsettled(spool.root / REDO)]
    return {arrival["sop_instance_uid"]: arrival["series_uid"] for arrival in arrivals}


def only_in_log(database: Database, logged: Mapping[str, str]) -> list[Fault]:
    """Those that the journal does not get: no node runs, or it cannot change the journal."""
    faults: list[Fault] = []
    for pause in (0.0, _STALE_SECONDS):  # the row of an instance comes a little after its entry
        time.sleep(pause)
        rows = ((uid, series, _row(database, series, uid)) for uid, series in logged.items())
        faults = [Fault(uid, series, IN_LOG) for uid, series, row in rows if row is None]
        if not faults:
            break
    return faults


def _differences(database: Database, spool: Spool) -> Iterator[Fault | int]:
    compared = 0
    for series_uid in _series(database, spool):
        here = {path.stem for path in (spool.received / series_uid).glob("*.dcm")}
        for stored in stored_of(database, series_uid):
            compared += 1
            here.discard(stored.uid)
            if what := file_fault(database, spool, series_uid, stored):
                yield Fault(stored.uid, series_uid, what)
        strays = _strays(database, series_uid, sorted(here))
        if any(_is_young(spool.path(series_uid, uid)) for uid in strays):
            time.sleep(_STALE_SECONDS)  # the row of an instance comes a little after its file
            strays = _strays(database, series_uid, strays)
        for uid, what in strays.items():
            yield Fault(uid, series_uid, what)
    yield compared


def _is_young(path: Path) -> bool:
    try:
        return abs(time.time() - path.stat().st_mtime) < 2 * _STALE_SECONDS
    except FileNotFoundError:
        return False


def stored_of(database: Database, series_uid: str) -> list[Stored]:
    """Each instance of a series whose file should be there."""
    i = t.instances.c
    what = (i.sop_instance_uid, i.sha256, i.sop_class_uid, i.transfer_syntax_uid)
    rows = database.read(select(*what).where(i.series_uid == series_uid, ~i.purged))
    return [Stored(*row) for row in rows]


def file_fault(database: Database, spool: Spool, series_uid: str, stored: Stored) -> str:
    """What is wrong with the file of an instance; empty: nothing, or retention deleted it."""
    path = spool.path(series_uid, stored.uid)
    try:
        if dataset_digest(path)[0] == stored.digest:
            fits = _meta_fits(path, stored)
            return "" if fits else "its file meta information is not what was written"
    except FileNotFoundError:
        wanted = _row(database, series_uid, stored.uid) is False
        return "the file is missing; send the instance again" if wanted else ""
    except OSError as error:
        return f"the file cannot be read: {error.strerror}"
    return "the stored bytes are not those received"


def _meta_fits(path: Path, stored: Stored) -> bool:
    """Does the file say of what it holds, and how it is encoded, what the journal says?

    The digest is of the data set alone; the rest of the meta information decides nothing.
    """
    with path.open("rb") as file:
        meta = file.read(_META_BYTES)
    if meta[128:132] != b"DICM":  # without a mark all of the file was digested
        return True
    named = {  # Media Storage SOP Class and Instance UID, Transfer Syntax UID
        0x0002: stored.sop_class_uid,
        0x0003: stored.uid,
        0x0010: stored.transfer_syntax_uid,
    }
    return all(meta_element(number, "UI", uid.encode()) in meta for number, uid in named.items())


_META_BYTES = 1024


def _series(database: Database, spool: Spool) -> Iterator[str]:
    """Every series of the journal, then folders that none of them has."""
    known = {uid for (uid,) in database.read(select(t.series.c.series_uid))}
    yield from sorted(known)
    folders = spool.received.iterdir() if spool.received.is_dir() else ()
    yield from sorted(folder.name for folder in folders if folder.name not in known)


def _row(database: Database, series_uid: str, uid: str) -> bool | None:
    """Whether retention deleted an instance, now; None: it is not known."""
    i = t.instances.c
    query = select(i.purged).where(i.sop_instance_uid == uid, i.series_uid == series_uid)
    rows = database.read(query)
    return bool(rows[0][0]) if rows else None


def _strays(database: Database, series_uid: str, uids: Iterable[str]) -> dict[str, str]:
    """The instances whose file should not be there, and why."""
    found = {uid: _stray(database, series_uid, uid) for uid in uids}
    return {uid: what for uid, what in found.items() if what}


def _stray(database: Database, series_uid: str, uid: str) -> str:
    """Why a file should not be there; empty: it came meanwhile, or is about to be deleted."""
    purged = _row(database, series_uid, uid)
    if purged is None:
        return "a file without a journal entry; send the instance again, or delete the file"
    going = select(t.removals.c.kind).where(t.removals.c.series_uid == series_uid)
    if purged and not database.read(going):
        return "retention deleted it, and yet its file is here; delete it"
    return ""
