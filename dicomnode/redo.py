"""The redo log: what was received, durable with one sync, until its own files are.

To make a small file, its name and its row in the journal durable takes three syncs, each of which
changes metadata. So the bytes of an instance and what its row says are first appended to a segment
(`segments`) and synced once: it is durable. File, name and row are written next, so that
everybody sees them, but the disk may take its time. After a few seconds, or when half of the log is
full, one sync of the whole file system settles them all, and the segments are used again. After
a power failure the entries that were not settled are done again (`recovery`).
"""

import contextlib
import itertools
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dicomnode.segments import (
    LARGEST_BYTES,
    ROOM,
    SEGMENT_BYTES,
    Entry,
    Segment,
    Written,
    paths,
    unsettled,
)
from dicomnode.segments import make as make_segment
from dicomnode.syncing import sync_folder

log = logging.getLogger(__name__)

REDO = "redo"
"""The folder of the log, in the data folder."""
SETTLE_SECONDS = 5.0
"""No entry waits longer for its files to be settled; a burst shorter than that is not disturbed,
unless it fills half of the log."""
_ROOM_SECONDS = 60.0
"""Between looks whether there is room for the rest of the log."""
_FAILED = "failed"
"""The file that says that the disk refused to keep what it had taken: files may look whole."""


class RedoLog:
    """The segments; safe to share between threads."""

    def __init__(
        self,
        folder: Path,
        size: int,
        has_room: Callable[[int], bool],
        settle: Callable[[], None],
    ) -> None:
        """Nothing is opened before `restore`.

        Args:
            size: bytes of all segments together; they are made when the disk has room for them.
            has_room: may this many bytes more be taken from the disk?
            settle: makes all files and rows durable of what was in the log when it is called;
                raises OSError where the disk refuses, JournalError where it is to be tried later.
        """
        self._folder, self._has_room, self._settle = folder, has_room, settle
        self._wanted = max(1, size // SEGMENT_BYTES) if size else 0
        self._changed = threading.Condition()
        self._ready: list[Segment] = []  # the one used last is used again
        self._full: list[Segment] = []
        self._all: set[Segment] = set()
        self._numbers = itertools.count(time.time_ns())  # later than those of any earlier run
        self._names = itertools.count()
        self._refused: dict[Segment, Mapping[str, Any]] = {}
        self._stopping = self._failed = False
        self._looks = math.inf  # when `step` looks again, if nobody wakes it

    @property
    def wanted(self) -> bool:
        """Are instances to go through it from now on, or is there only what an earlier run left?"""
        return self._wanted > 0

    @property
    def trouble(self) -> str:
        """Why entries stay where they are, in words; empty: they do not."""
        if not self._failed:
            return ""
        return "the disk refused to keep what it had taken; mend it and restart"

    def refused(self) -> list[Mapping[str, Any]]:
        """The labels of entries that were refused and that the disk does not let us take back.

        Until their segments are gone, a crash would bring these instances back.
        """
        return list(self._refused.values()) if self._refused else []

    # appending

    @contextlib.contextmanager
    def entry(self, label: Mapping[str, Any], written: Written) -> Iterator[bool]:
        """Append an instance.

        Within the block: True if it is durable, and what is done there, files and rows, will be
        settled or done again; False if not, and who asks has to see to it himself. A block that
        raises has refused the instance: it is forgotten.
        """
        words = json.dumps(label).encode("ascii")
        fits = written.size <= LARGEST_BYTES and len(words) <= ROOM
        segment = self._take(written.size) if fits else None
        if segment is None:
            yield False
            return
        try:
            logged = self._append(segment, words, written)
            if not logged:
                self._take_back(segment, label)
            try:
                yield logged
            except BaseException:  # raised again: whatever it is, the instance was refused
                if logged:
                    self._take_back(segment, label)
                raise
        finally:  # not earlier: it must not be cleared before the block has done its part
            self._give_back(segment)

    def _append(self, segment: Segment, label: bytes, written: Written) -> bool:
        try:
            segment.append(next(self._numbers), label, written)
        except OSError as error:
            _give_up(segment, "the redo log cannot be written", error)
        return not segment.broken

    def _take_back(self, segment: Segment, label: Mapping[str, Any]) -> None:
        """Done again, it could take the place of what its sender sends instead."""
        try:
            segment.take_back()
        except OSError as error:
            _give_up(segment, "the redo log cannot be written", error)
            with self._changed:
                self._refused[segment] = label

    def _take(self, size: int) -> Segment | None:
        with self._changed:
            while self._ready and not (self._failed or self._stopping):
                segment = self._ready.pop()
                if segment.room >= size:
                    return segment
                self._full.append(segment)
                self._changed.notify_all()
            return None

    def _give_back(self, segment: Segment) -> None:
        with self._changed:
            due = math.inf if segment.since is None else segment.since + SETTLE_SECONDS
            if segment.broken or due <= time.monotonic():  # else it might be taken again and again
                self._full.append(segment)
            else:
                self._ready.append(segment)
            if segment.broken or due < self._looks:
                self._changed.notify_all()

    # settling

    def step(self) -> None:
        """Wait until there is something to do, and do it: settle what is due, make a segment."""
        with self._changed:
            while not self._stopping and not self._is_due() and not self._wants_more():
                pause = self._looks - time.monotonic()
                self._changed.wait(None if pause == math.inf else max(0.0, pause))
            if self._stopping:
                return
            batch = self._used() if self._is_due() else []
        if batch:
            self._clear(batch)
        else:
            self._add()

    def _is_due(self) -> bool:
        """Is something to be settled? If not, `_looks` says when to ask again."""
        self._looks = math.inf
        if self._failed:
            return False
        if any(one.broken for one in self._full) or 2 * len(self._full) > len(self._all):
            return True
        now = time.monotonic()
        since = [one.since for one in (*self._ready, *self._full) if one.since is not None]
        if since:
            self._looks = min(since) + SETTLE_SECONDS
        elif len(self._all) < self._wanted:
            self._looks = now + _ROOM_SECONDS
        return self._looks <= now

    def _wants_more(self) -> bool:
        wanted = len(self._all) < self._wanted and not self._failed
        return wanted and self._has_room(2 * SEGMENT_BYTES)

    def _used(self) -> list[Segment]:
        """All that have entries and that nobody appends to, taken out."""
        used = self._full + [one for one in self._ready if one.since is not None]
        self._ready = [one for one in self._ready if one.since is None]
        self._full = []
        return used

    def _clear(self, batch: list[Segment]) -> None:
        """Settle what the entries of some segments say; nobody else has them."""
        try:
            self._make_durable()
        except BaseException as error:  # whatever it is, the entries are still to be settled
            with self._changed:
                self._full += batch
            if not isinstance(error, OSError):
                raise
            return
        for segment in batch:
            self._empty(segment)
        with self._changed:
            for segment in batch:
                if segment.broken:
                    if segment.close(remove=True):
                        self._refused.pop(segment, None)
                    self._all.remove(segment)
                else:
                    self._ready.insert(0, segment)

    def _empty(self, segment: Segment) -> None:
        """Forget settled entries; a segment that cannot be written is broken."""
        try:
            if not segment.broken:
                segment.clear()
                if segment.to_wipe:
                    segment.wipe()
        except OSError as error:
            _give_up(segment, "a segment of the redo log is given up", error)

    def _make_durable(self) -> None:
        """Settle; where the disk refuses, what was lost may look whole: only the entries tell.

        Raises:
            OSError: the disk refuses; entries stay.
        """
        try:
            self._settle()
        except OSError as error:
            self._failed = True
            log.error("received files cannot be made durable: %s", error.strerror)
            with contextlib.suppress(OSError):
                (self._folder / _FAILED).touch()
            raise

    def wipe(self) -> None:
        """Overwrite what settled entries left: retention has deleted files that may be there still.

        Where there are new entries, too, as soon as these are settled. A segment that the disk
        does not let us overwrite is removed.
        """
        with self._changed:
            for one in self._all:
                one.to_wipe = True
        while segment := self._idle():
            try:
                segment.wipe()
            except OSError as error:
                _give_up(segment, "a segment of the redo log is given up", error)
            with self._changed:
                if segment.broken:
                    self._full.append(segment)
                    self._changed.notify_all()
                else:
                    self._ready.insert(0, segment)

    def _idle(self) -> Segment | None:
        """One that has no entries and something to wipe, taken out."""
        with self._changed:
            for number, segment in enumerate(self._ready):
                if segment.since is None and segment.to_wipe:
                    return self._ready.pop(number)
        return None

    def _add(self) -> None:
        """Make a segment; where the disk refuses, no more are tried for."""
        path = self._folder / f"{next(self._names):06}.log"
        try:
            make_segment(path)
            segment = Segment(path, soiled=0)
        except OSError as error:
            log.warning("the redo log stays smaller than wanted: %s", error.strerror)
            self._wanted = len(self._all)
            return
        with self._changed:
            self._ready.insert(0, segment)
            self._all.add(segment)

    def stop(self) -> None:
        """Nothing is appended any more, and `step` ends."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """Settle everything, when nobody uses the log any more.

        Raises:
            OSError: the disk refuses; entries stay.
        """
        batch, self._full, self._ready = self._full + self._ready, [], []
        used = [segment for segment in batch if segment.since is not None]
        settled = False
        try:
            if used and not self._failed:
                self._make_durable()
                for segment in used:
                    self._empty(segment)
            settled = not self._failed
        finally:
            for segment in batch:
                segment.close(remove=settled and segment.broken)

    # after a stop

    def restore(
        self, again: Callable[[Entry, bool], None], then: Callable[[], None] = lambda: None
    ) -> None:
        """Do again what was not settled when the node stopped, in order.

        Args:
            again: called with each, and whether files may be trusted that look whole.
            then: called after the last, before anything is settled and forgotten.

        Raises:
            OSError: the disk refuses.
        """
        self._folder.mkdir(exist_ok=True)
        sync_folder(self._folder.parent)
        for half in self._folder.glob("*.new"):
            half.unlink()
        found = paths(self._folder)
        self._names = itertools.count(1 + max((int(path.stem) for path in found), default=-1))
        entries = unsettled(self._folder)
        failed = self._folder / _FAILED
        trusted = not failed.exists()
        for entry in entries:
            again(entry, trusted)
        then()
        if entries:
            self._make_durable()
        failed.unlink(missing_ok=True)
        for path in found:
            segment = Segment(path)
            if path.stat().st_size == SEGMENT_BYTES and len(self._all) < self._wanted:
                segment.clear()
                self._ready.append(segment)
                self._all.add(segment)
            else:
                segment.close(remove=True)


def _give_up(segment: Segment, what: str, error: OSError) -> None:
    """Nothing more may be appended; it is removed when its entries are settled."""
    log.error("%s: %s", what, error.strerror)
    segment.broken = True
