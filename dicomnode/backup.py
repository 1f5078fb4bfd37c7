"""A consistent copy of a node that may be running: its journal and every file the journal names.

The journal is copied first, as it is at one moment; then the files of its rows. What comes later is
not in the copy; what is in the redo log only, since the node was killed or cannot change its
journal, is named; what retention deletes meanwhile is marked so in the copied journal. The folder
gets its name when everything in it is on disk: it is whole or it is not there.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from sqlalchemy import bindparam, select

from dicomnode import tables as t
from dicomnode.audit import IN_LOG, Fault, file_fault, in_log, only_in_log, stored_of
from dicomnode.errors import BackupError
from dicomnode.migrations import copy_journal
from dicomnode.spool import Spool
from dicomnode.syncing import FileSystem, sync_file, sync_folder
from dicomnode.tables import Database

JOURNAL = "journal.db"
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
_CHUNK = 1 << 20


@dataclass(slots=True)
class Copied:
    """What a backup has."""

    received: int = 0
    results: int = 0
    quarantined: int = 0
    linked: int = 0
    """Files of these that are hard links to the node's own: the same disk, the same blocks."""
    purged: int = 0
    """Files that retention deleted while the backup was made; it does not have them."""
    faults: list[Fault] = field(default_factory=list)
    """Files that are missing, or not what was received, and instances that only the redo log has:
    the backup cannot be better."""


def back_up(data_dir: Path, target: Path) -> Copied:
    """Copy a node's data folder to `target`, which must be empty or absent.

    Raises:
        BackupError: `target` is in use, lies in the data folder, or the journal cannot be copied.
        OSError: the disk refuses; nothing is left of the attempt.
    """
    target = target.resolve()
    live = Database(data_dir / JOURNAL, create=False)
    try:
        return _whole(data_dir, live, _begin(data_dir.resolve(), target), target)
    finally:
        live.close()


def _whole(data_dir: Path, live: Database, part: Path, target: Path) -> Copied:
    """Fill `part` and name it `target`, or leave nothing."""
    try:
        spool = Spool(data_dir)
        logged = in_log(spool)  # before the journal: what has left the log is in it
        only_in_log(live, logged)  # gives rows that are on their way the time they need
        copy_journal(data_dir / JOURNAL, part / JOURNAL)
        copied = _Copy(data_dir, part).run(live, logged)
        if copied.faults:
            still = in_log(spool)
            copied.faults = [
                replace(fault, what=IN_LOG) if fault.sop_instance_uid in still else fault
                for fault in copied.faults
            ]
        for folder in (part, part.parent):
            sync_folder(folder)
        part.rename(target)  # over an empty folder, if there is one
        sync_folder(part.parent)
    except BaseException:  # raised again: whatever it is, half a back-up is none
        shutil.rmtree(part, ignore_errors=True)
        raise
    return copied


def _begin(data_dir: Path, target: Path) -> Path:
    """The folder to fill, beside the one it will become."""
    if target == data_dir or data_dir in target.parents:
        raise BackupError(f"{target} is in the node's own data folder; choose another place")
    if target.is_mount():
        raise BackupError(f"{target} is the root of a file system; name a new folder in it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BackupError(f"{target} is not empty; a backup needs a folder of its own")
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.mkdir()
    except FileExistsError:
        why = "another backup is running there, or was killed: then delete it"
        raise BackupError(f"{part} is there: {why}") from None
    return part


class _Copy:
    """The files of a copied journal, on their way."""

    def __init__(self, data_dir: Path, part: Path) -> None:
        self._from, self._to = Spool(data_dir), Spool(part)
        self._part, self._copied = part, Copied()

    def run(self, live: Database, logged: Mapping[str, str]) -> Copied:
        """`logged`: see `in_log`, before the journal was copied."""
        copy = Database(self._part / JOURNAL, create=False)
        try:
            self._to.prepare()
            self._received(live, copy)
            self._results(live, copy)
            self._quarantine(copy)
            self._copied.faults += only_in_log(copy, logged)
        finally:
            copy.close()
        for folder in (self._to.received, self._to.results, self._to.quarantine):
            sync_folder(folder)
        sync_file(self._part / JOURNAL)
        if self._copied.linked:  # what came in the last seconds may be safe in the redo log only
            with closing(FileSystem(self._part)) as disk:
                disk.sync()
        return self._copied

    def _received(self, live: Database, copy: Database) -> None:
        i = t.instances.c
        for (series_uid,) in copy.read(select(t.series.c.series_uid)):
            gone = []
            (self._to.received / series_uid).mkdir()
            for stored in stored_of(copy, series_uid):
                uid = stored.uid
                source, target = (spool.path(series_uid, uid) for spool in (self._from, self._to))
                there = self._place(source, target)
                self._copied.received += there
                what = file_fault(live, self._to if there else self._from, series_uid, stored)
                if what:
                    self._copied.faults.append(Fault(uid, series_uid, what))
                elif not there:
                    gone.append({"gone": uid})
            _end_folder(self._to.received / series_uid)
            if gone:
                self._copied.purged += len(gone)
                mark = t.instances.update().where(i.sop_instance_uid == bindparam("gone"))
                with copy.write() as db:
                    db.execute(mark.values(purged=True), gone)

    def _results(self, live: Database, copy: Database) -> None:
        j, o = t.jobs.c, t.outputs.c
        made = select(o.job, o.series_uid).join_from(t.outputs, t.jobs).where(~j.purged).distinct()
        for job, series_uid in copy.read(made):
            members = select(o.sop_instance_uid).where(o.job == job, o.series_uid == series_uid)
            (self._to.results / series_uid).mkdir(exist_ok=True)
            missing = []
            for (uid,) in copy.read(members):
                source, target = (
                    spool.result_path(series_uid, uid) for spool in (self._from, self._to)
                )
                if target.exists():
                    continue  # another job made the same
                there = self._place(source, target)
                self._copied.results += there
                missing += [] if there else [uid]
            _end_folder(self._to.results / series_uid)
            if missing and live.read(select(j.id).where(j.id == job, j.purged)):
                self._copied.purged += len(missing)
                with copy.write() as db:
                    db.execute(t.jobs.update().where(j.id == job).values(purged=True))
            else:
                what = "the derived file is missing"
                self._copied.faults += [Fault(uid, series_uid, what) for uid in missing]

    def _quarantine(self, copy: Database) -> None:
        c = t.conflicts.c
        for uid, digest in copy.read(select(c.sop_instance_uid, c.sha256).distinct()):
            source, target = (
                spool.quarantined_path(uid, digest) for spool in (self._from, self._to)
            )
            self._copied.quarantined += self._place(source, target)  # an operator may delete them

    def _place(self, source: Path, target: Path) -> bool:
        """Link a file, or copy it durably to another file system; False if it is not there."""
        try:
            os.link(source, target)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            return _copy(source, target)
        self._copied.linked += 1
        return True


def _copy(source: Path, target: Path) -> bool:
    try:
        original = source.open("rb")
    except FileNotFoundError:
        return False
    with original, target.open("xb+") as copy:
        shutil.copyfileobj(original, copy, _CHUNK)
        copy.flush()
        os.fsync(copy.fileno())
        original.seek(0)
        copy.seek(0)
        digests = [hashlib.file_digest(file, "sha256").digest() for file in (original, copy)]
    if digests[0] != digests[1]:
        raise BackupError(f"{target}: the disk gives back other bytes than were written")
    return True


def _end_folder(folder: Path) -> None:
    """Make the names in it durable; a folder without any goes."""
    if any(folder.iterdir()):
        sync_folder(folder)
    else:
        folder.rmdir()
