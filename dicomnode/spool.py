"""SOP instances as Part 10 files: durable, here or in the redo log, before anyone hears of it.

<root>/received/<SeriesInstanceUID>/<SOPInstanceUID>.dcm   as received
<root>/results/<derived SeriesInstanceUID>/...             what is sent
<root>/quarantine/<SOPInstanceUID>.<sha256>.dcm            another data set under a known UID
<root>/incoming/                                           being received; emptied at start
"""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from dicomnode.errors import CannotUnderstand, OutOfResources
from dicomnode.syncing import sync_file, sync_folder

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
"""A component that begins with 0 breaks PS3.5 9.1, but de-identifiers write it: it is harmless."""
_PREAMBLE = 132
_FULL = "the disk of node.data_dir is full"
_LEAST_FREE_BYTES = 1 << 20
"""With less the disk is called full, whatever is to be kept free: hardly an instance is smaller."""
DRAFTS = ".draft-"
"""How the names of folders under results begin in which a series is not finished."""


def checked_uid(value: object, what: str) -> str:
    """`value` as a UID that is safe as a file name (PS3.5 9.1).

    Raises:
        CannotUnderstand: it is not 1 to 64 characters of digits and dots in UID form.
    """
    text = str(value or "")
    if len(text) > 64 or not _UID.fullmatch(text):
        raise CannotUnderstand(f"{what} is not a valid UID")
    return text


@dataclass(frozen=True, slots=True)
class Spool:
    """The folders under ``data_dir`` that hold SOP instances."""

    root: Path
    reserve_bytes: int = 0
    """Free bytes that must remain; below it nothing more is stored."""

    @property
    def incoming(self) -> Path:
        return self.root / "incoming"

    @property
    def received(self) -> Path:
        return self.root / "received"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    def prepare(self) -> None:
        """Make the folders; results half-written by an earlier run are removed."""
        for folder in (self.incoming, self.received, self.results, self.quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        for part in self.results.glob("*/*.part"):
            part.unlink(missing_ok=True)
        self.remove_drafts()

    def remove_drafts(self) -> None:
        """Remove what a worker that is gone was writing; nobody may be writing now."""
        for draft in self.results.glob(f"{DRAFTS}*"):
            shutil.rmtree(draft, ignore_errors=True)

    def leftovers(self) -> Iterator[tuple[Path, bool]]:
        """What an earlier run was receiving, and whether it had a place already.

        Such a file may be cut off or lack its journal entry; the others were cut off on their way.
        """
        for path in self.incoming.iterdir():
            yield path, path.stat().st_nlink > 1

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def has_room(self, size: int = 0) -> bool:
        return self.free_bytes() - size >= self.reserve_bytes

    def check_room(self, size: int = 0) -> None:
        """Raises OutOfResources if `size` bytes more would leave less than `reserve_bytes`."""
        if not self.has_room(size):
            full = "free space is below node.reserve_free_gb"
            raise OutOfResources(full if self.reserve_bytes else _FULL)

    def trouble(self) -> str:
        """Why nothing can be stored now, in words; empty: it can."""
        try:
            free = self.free_bytes()
            if free < self.reserve_bytes:
                return "free space is below node.reserve_free_gb"
            if free < _LEAST_FREE_BYTES:
                return _FULL
        except OSError as error:
            return f"node.data_dir cannot be used: {_reason(error)}; restart when it is back"
        for folder in (self.incoming, self.received, self.results, self.quarantine):
            if not folder.is_dir():
                return "node.data_dir has lost its folders; restart when it is back"
            try:  # by writing: a file system that an error made read-only tells nobody else
                with TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                return f"node.data_dir cannot be written: {_reason(error)}"
        return ""

    def keep(self, part: Path, series_uid: str, sop_instance_uid: str) -> Path | None:
        """Give a complete received file its place, durably; None if another file is there.

        As `place`, then `settle`.

        Raises:
            OutOfResources: less than `reserve_bytes` is left, or the disk refuses.
        """
        kept = self.place(part, series_uid, sop_instance_uid)
        try:
            self.settle(series_uid, sop_instance_uid)
        except OutOfResources:
            if kept is not None:
                kept.unlink(missing_ok=True)
            raise
        return kept

    def place(self, part: Path, series_uid: str, sop_instance_uid: str) -> Path | None:
        """Give a complete received file its place; None if another file is there.

        `part` stays as a second name of the file: whoever received it removes it once the journal
        has the instance. What a crash leaves in `incoming` is thus all there is to recover, beside
        the redo log.

        The file gets its name before it is synced: a file system with a journal then writes file
        and name in one transaction, and the folder's own sync finds nothing left to write (0.55
        instead of 0.99 ms for a PET). Who calls sees to it that nobody else keeps the same
        instance meanwhile.

        Raises:
            OutOfResources: less than `reserve_bytes` is left, or the disk refuses.
        """
        folder, final = self._place(series_uid, sop_instance_uid)
        try:
            self.check_room()
            return Path(final) if _link(part, final, folder) else None
        except OSError as error:
            raise OutOfResources(f"could not store the instance: {_reason(error)}") from error

    def write(self, series_uid: str, sop_instance_uid: str, data: memoryview) -> None:
        """Write an instance that is safe elsewhere, and that no file has the name of; not synced.

        Raises:
            OutOfResources: the disk refuses; it is not there.
        """
        folder, final = self._place(series_uid, sop_instance_uid)
        try:
            file = _opened(final, folder)
            try:
                while data:
                    data = data[os.write(file, data) :]
            except OSError:
                self.take_back(Path(final))
                raise
            finally:
                os.close(file)
        except OSError as error:
            raise OutOfResources(f"could not store the instance: {_reason(error)}") from error

    def has(self, series_uid: str, sop_instance_uid: str) -> bool:
        """Is there a file of this name?"""
        return os.path.lexists(self._place(series_uid, sop_instance_uid)[1])

    def settle(self, series_uid: str, sop_instance_uid: str, descriptor: int | None = None) -> None:
        """Make an instance that has its place durable there, file and name.

        `descriptor`: of the same file, if it is open.

        Raises:
            OutOfResources: the disk refuses.
        """
        folder, final = self._place(series_uid, sop_instance_uid)
        try:
            if descriptor is not None:
                os.fsync(descriptor)
            else:
                sync_file(final)
            sync_folder(folder)
        except OSError as error:
            raise OutOfResources(f"could not store the instance: {_reason(error)}") from error

    def take_back(self, kept: Path) -> None:
        """Remove what `place` gave a place, durably.

        Raises:
            OutOfResources: the disk refuses.
        """
        try:
            kept.unlink()
            sync_folder(kept.parent)
        except OSError as error:
            raise OutOfResources(f"could not store the instance: {_reason(error)}") from error

    def drop(self, parts: Collection[Path]) -> None:
        """Remove files in `incoming` under both their names, which only the inode tells."""
        numbers = {part.stat().st_ino for part in parts}
        for folder in filter(Path.is_dir, self.received.iterdir()):
            with os.scandir(folder) as entries:
                doomed = [entry.path for entry in entries if entry.inode() in numbers]
            for path in doomed:
                Path(path).unlink()
        for part in parts:
            part.unlink()

    def put_back(self, series_uid: str, sop_instance_uid: str, data: bytes) -> None:
        """Write an instance anew, in place of whatever a power failure left of it; not synced.

        Raises:
            OSError: the disk refuses.
        """
        folder, final = self._place(series_uid, sop_instance_uid)
        Path(folder).mkdir(parents=True, exist_ok=True)
        part = self.incoming / "again.part"
        part.write_bytes(data)
        part.replace(final)

    def set_aside(self, part: Path, sop_instance_uid: str, digest: str) -> Path:
        """Move a file that contradicts a stored one to quarantine, durably."""
        final = self.quarantined_path(sop_instance_uid, digest)
        try:
            sync_file(part)
            part.replace(final)
            sync_folder(final.parent)
        except OSError as error:
            raise OutOfResources(f"could not quarantine: {_reason(error)}") from error
        return final

    def path(self, series_uid: str, sop_instance_uid: str) -> Path:
        return Path(self._place(series_uid, sop_instance_uid)[1])

    def _place(self, series_uid: str, sop_instance_uid: str) -> tuple[str, str]:
        """Folder and file of a received instance; to make a Path takes longer than a link."""
        folder = f"{self.root}/received/{series_uid}"
        return folder, f"{folder}/{sop_instance_uid}.dcm"

    def result_path(self, derived_uid: str, sop_instance_uid: str) -> Path:
        return self.results / derived_uid / f"{sop_instance_uid}.dcm"

    def quarantined_path(self, sop_instance_uid: str, digest: str) -> Path:
        return self.quarantine / f"{sop_instance_uid}.{digest[:16]}.dcm"

    def stored(self) -> Iterator[tuple[str, str, Path]]:
        """Every received file: its series, its SOP Instance UID and its path."""
        for path in self.received.glob("*/*.dcm"):
            yield path.parent.name, path.stem, path


class OneByOne:
    """Lets one thread at a time be busy with the same instance."""

    def __init__(self) -> None:
        self._busy: set[str] = set()
        self._freed = threading.Condition()

    @contextmanager
    def turn(self, sop_instance_uid: str) -> Iterator[None]:
        """Wait until nobody else is busy with it."""
        with self._freed:
            self._freed.wait_for(lambda: sop_instance_uid not in self._busy)
            self._busy.add(sop_instance_uid)
        try:
            yield
        finally:
            with self._freed:
                self._busy.remove(sop_instance_uid)
                self._freed.notify_all()


def dataset_digest(path: Path) -> tuple[str, int]:
    """SHA-256 of the data set of a Part 10 file (its meta information left out), and file size.

    The meta information is the receiver's own; the data set is what the peer sent (PS3.10 7.1).
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        head = file.read(_PREAMBLE + 12)
        if len(head) == _PREAMBLE + 12 and head[128:136] == b"DICM\x02\x00\x00\x00":
            file.seek(_PREAMBLE + 12 + int.from_bytes(head[-4:], "little"))
        else:
            file.seek(0)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        size = file.tell()
    return digest.hexdigest(), size


def write_durably(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: `path` is whole or absent; the caller syncs its folder once.

    Raises:
        OutOfResources: the disk refuses.
    """
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutOfResources(f"could not write a result: {_reason(error)}") from error


def _link(part: Path, final: str, folder: str) -> bool:
    """Unlike a rename, never replaces what is there; False if something is."""
    try:
        os.link(part, final)
    except FileExistsError:
        return False
    except FileNotFoundError:
        if not part.exists():
            raise
        _make_folder(folder)
        return _link(part, final, folder)
    return True


def _opened(final: str, folder: str) -> int:
    """A new file; its folder may have to be made, and retention may remove an empty one."""
    while True:
        try:
            return os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        except FileNotFoundError:
            _make_folder(folder)


def _make_folder(folder: str) -> None:
    """Durably; not those above it: without them this is no longer the folder we know."""
    Path(folder).mkdir(exist_ok=True)
    sync_folder(Path(folder).parent)


def _reason(error: OSError) -> str:
    """The system's words without the path, which carries UIDs only but tells nobody anything."""
    return os.strerror(error.errno) if error.errno else "unknown reason"
