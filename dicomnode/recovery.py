"""What a stop, or a crash, left behind; and that only one node has a data folder."""

import contextlib
import fcntl
import logging
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import IO

from dicomnode.errors import (
    ConfigError,
    DuplicateInstance,
    InstanceRefused,
    JournalBusy,
    OutOfResources,
)
from dicomnode.jobs import Jobs
from dicomnode.journal import Arrival, Journal
from dicomnode.premises import link_problem
from dicomnode.redo import RedoLog
from dicomnode.scp import read_arrival_header
from dicomnode.segments import Entry
from dicomnode.spool import Spool, dataset_digest
from dicomnode.syncing import sync_folder

log = logging.getLogger(__name__)


def lock_folder(data_dir: Path) -> IO[str]:
    """One node per data folder: the lock goes with the process, whatever ends it.

    Raises:
        ConfigError: another node has it.
    """
    file = (data_dir / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError("node.data_dir: another dicomnode is using this folder") from error
    return file


def refuse_lost_journal(spool: Spool, journal: Path) -> None:
    """A new journal knows nothing of what was acknowledged before: nobody would translate it.

    Raises:
        ConfigError: the file `journal` is not there, or empty, and received instances are.
    """
    if not _has_tables(journal) and next(spool.stored(), None) is not None:
        raise ConfigError(
            f"node.data_dir: {spool.received} has instances that were acknowledged, but "
            f"{journal.name} is gone: put it or a back-up in its place; or move the folder away, "
            "start, and send its files to the node again"
        )


def _has_tables(journal: Path) -> bool:
    """Was it ever a journal? What is damaged or locked was; whoever opens it next says more."""
    if not journal.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(journal)) as db:
            return bool(
                db.execute("SELECT 1 FROM sqlite_master WHERE name = 'instances'").fetchall()
            )
    except sqlite3.Error:
        return True


def recover(
    spool: Spool, journal: Journal, redo: RedoLog, jobs: Jobs, now: float, late: str
) -> None:
    """Bring files and rows together again.

    `late`: what `series.on_late_instances` says.

    Raises:
        ConfigError: the folders cannot be used.
    """
    spool.prepare()
    for folder in (spool.received, spool.quarantine):
        if why := link_problem(spool.incoming, folder):
            raise ConfigError(f"node.data_dir: {why}")
    _restore(spool, journal, redo, late)
    journal.recover(now)
    jobs.recover(now)
    unsaid = []
    for part, placed in spool.leftovers():
        if placed and not _is_journalled(part, journal):
            unsaid.append(part)
        else:
            part.unlink()
    if unsaid:
        spool.drop(unsaid)
        words = "removed %d instances that the stop kept from being acknowledged"
        log.info(words, len(unsaid))


def _restore(spool: Spool, journal: Journal, redo: RedoLog, late: str) -> None:
    """Do again what a power failure undid: instances that were acknowledged, file and row."""
    restored, doubted = 0, False

    def again(entry: Entry, trusted: bool) -> None:
        nonlocal restored, doubted
        doubted = doubted or not trusted
        arrival = Arrival(**entry.label["arrival"])
        place = (arrival.series_uid, arrival.sop_instance_uid)
        known = journal.known(arrival.sop_instance_uid)
        if known is not None and known[:2] != (arrival.series_uid, arrival.sha256):
            return  # refused with 0x0111
        whole = trusted and _holds(spool.path(*place), arrival)
        if not whole:
            spool.put_back(*place, entry.read())
        if not redo.wanted:  # the file system may be one that cannot be synced as a whole
            spool.settle(*place)
        if known is None or known[2]:
            if arrival.association is None or not journal.has_association(arrival.association):
                arrival = replace(arrival, association=None)  # the journal is an older copy
            with contextlib.suppress(DuplicateInstance):
                journal.record_instance(arrival, entry.label["received"], late=late, unsynced=True)
        elif whole:
            return
        restored += 1

    def then() -> None:
        if not redo.wanted:
            sync_folder(spool.received)
        if doubted:  # the rows, too, may be whole in memory only
            journal.rewrite()

    try:
        redo.restore(again, then)
    except (JournalBusy, OutOfResources) as error:
        raise ConfigError(f"node.data_dir: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"node.data_dir: the redo log cannot be used: {error.strerror}; mend the disk"
        ) from error
    if restored:
        log.info("restored %d instances from the redo log", restored)


def _holds(path: Path, arrival: Arrival) -> bool:
    """Is the whole instance there?"""
    try:
        return dataset_digest(path)[0] == arrival.sha256
    except OSError:
        return False


def _is_journalled(part: Path, journal: Journal) -> bool:
    """Was this instance acknowledged, or about to be?

    Where it was not its sender will send it again, and its file may have been cut off by a power
    failure: the journal knows an instance only when it is durable, and what a power failure took
    of those that were is back by now.
    """
    try:
        header = read_arrival_header(part)
    except (InstanceRefused, OSError):
        return False
    known = journal.known(str(header.get("SOPInstanceUID")))
    return known is not None and known[0] == header.get("SeriesInstanceUID") and not known[2]
