"""A received instance gets its place: in the redo log, as a file, in the journal, or in quarantine.

The same bytes again change nothing; other bytes under a known SOP Instance UID are refused and set
aside. An instance that was kept is durable.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from sqlalchemy.exc import SQLAlchemyError

from dicomnode import metrics
from dicomnode.errors import DuplicateInstance, JournalError, OutOfResources
from dicomnode.journal import Arrival, Journal
from dicomnode.redo import RedoLog
from dicomnode.segments import HEADROOM, Written
from dicomnode.spool import OneByOne, Spool, dataset_digest
from dicomnode.upper_layer import Received


class Storing:
    """Where instances are kept; safe to share between threads."""

    def __init__(self, spool: Spool, journal: Journal, redo: RedoLog, late: str) -> None:
        """`late`: what `series.on_late_instances` says."""
        self._spool, self._journal, self._redo, self._late = spool, journal, redo, late
        self._one_by_one = OneByOne()

    def keep(self, received: Received, arrival: Arrival, now: float) -> None:
        """Keep an instance that came, durably.

        Raises:
            InstanceRefused: it is not kept; why, with its status.
            JournalError, SQLAlchemyError: the journal cannot be written; it is not kept.
            OSError: the disk refuses.
        """
        with self._one_by_one.turn(arrival.sop_instance_uid):
            self._keep_in_turn(received, arrival, now)

    def _keep_in_turn(self, received: Received, arrival: Arrival, now: float) -> None:
        if self._journal.waiting.has(arrival.sop_instance_uid):
            self._journal.waiting.flush()
        if trouble := self._redo.trouble:
            raise OutOfResources(trouble)
        for label in self._redo.refused():
            known = label["arrival"]["sop_instance_uid"], label["arrival"]["sha256"]
            if known[0] == arrival.sop_instance_uid and known[1] != arrival.sha256:
                raise OutOfResources("what was refused before is in the redo log; send it later")
        if self._keep_in_log(received, arrival, now) or self._keep_file(received, arrival, now):
            metrics.bytes_received.inc(received.file_size)

    def _keep_in_log(self, received: Received, arrival: Arrival, now: float) -> bool:
        """The usual: a small instance that is new; in the log first, so that a crash leaves no
        file that is nobody's. False if it is not so."""
        place, block = (arrival.series_uid, arrival.sop_instance_uid), received.block
        if block is None or self._spool.has(*place) or self._journal.known(place[1]) is not None:
            return False
        self._spool.check_room(received.file_size)
        with self._logged(received, arrival, now) as logged:
            if not logged:
                return False
            self._spool.write(*place, block[HEADROOM : HEADROOM + received.file_size])
            try:
                if not self._journal.record_soon(arrival, now, late=self._late):
                    self._journal.record_instance(arrival, now, late=self._late, unsynced=True)
            except (JournalError, SQLAlchemyError):
                self._spool.take_back(self._spool.path(*place))  # before the log forgets it
                raise
        metrics.instances_durable.labels("log").inc()
        return True

    def _keep_file(self, received: Received, arrival: Arrival, now: float) -> bool:
        """False if it was known. Whether it is is asked first only where a file is there."""
        part, place = received.part, (arrival.series_uid, arrival.sop_instance_uid)
        descriptor = received.file()
        while (kept := self._spool.place(part, *place)) is None:
            with contextlib.suppress(FileNotFoundError):  # retention has just deleted what is there
                self._compare(part, arrival, now)
                break
        try:
            with self._logged(received, arrival, now) as logged:
                if not logged:
                    self._spool.settle(*place, None if kept is None else descriptor)
                recorded = self._journal.record_instance(
                    arrival, now, late=self._late, unsynced=logged
                )
        except (OutOfResources, JournalError, SQLAlchemyError):
            if kept is not None:
                kept.unlink(missing_ok=True)
            raise
        except DuplicateInstance:
            if kept is not None:  # beside the known one, or in the place of one that is deleted
                self._spool.take_back(kept)
            self._refuse_other(part, arrival, now)
        metrics.instances_durable.labels("log" if logged else "file").inc()
        if not recorded and not self._spool.has(*place):
            # retention deleted it before its row said that it is wanted again; now it does
            self._spool.keep(part, *place)
        return recorded

    @contextlib.contextmanager
    def _logged(self, received: Received, arrival: Arrival, now: float) -> Iterator[bool]:
        """See `RedoLog.entry`."""
        if received.block is None:
            yield False
            return
        start = received.file_size - received.size
        written = Written(received.block, received.file_size, start, received.sha256)
        with self._redo.entry({"received": now, "arrival": arrival.plain()}, written) as logged:
            yield logged

    def _compare(self, part: Path, arrival: Arrival, now: float) -> None:
        """A file is there: of the same data set?"""
        known = self._journal.known(arrival.sop_instance_uid)
        if known is None or known[2]:
            self._adopt_or_refuse(part, arrival, now)
        elif (known[0], known[1]) != (arrival.series_uid, arrival.sha256):
            self._refuse_other(part, arrival, now)

    def _adopt_or_refuse(self, part: Path, arrival: Arrival, now: float) -> None:
        """A file is there that its row calls deleted, or without a row."""
        there = self._spool.path(arrival.series_uid, arrival.sop_instance_uid)
        if dataset_digest(there)[0] != arrival.sha256:
            self._refuse_other(part, arrival, now)

    def _refuse_other(self, part: Path, arrival: Arrival, now: float) -> NoReturn:
        self._spool.set_aside(part, arrival.sop_instance_uid, arrival.sha256)
        self._journal.record_conflict(arrival, now)
        raise DuplicateInstance("other bytes were stored under this SOP Instance UID")
