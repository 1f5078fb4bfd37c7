"""The segments of the redo log: a format that tells what was written whole.

A segment is a file whose blocks are there from the start, and a row of entries, each at a multiple
of 4,096 bytes: a block that says what it is, then a Part 10 file. An entry counts if its block and
its data set have the sums that are named in it, and if it is of the segment's present use; the
first that does not ends the segment.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import secrets
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dicomnode.syncing import sync_folder

LARGEST_BYTES = 1 << 20
"""Of a file that goes through the log: to write a larger one twice costs more than its syncs."""
SEGMENT_BYTES = 32 << 20
HEADROOM = 4096
"""In an entry, before the file."""
_MEGABYTE = 1 << 20
_BLOCK = HEADROOM
_MAGIC = b"dcmredo1"
_HEAD = struct.Struct("<8s16sQLLL32s32s")
"""Mark, use of the segment, number; bytes of the label, of the file and of what precedes its data
set; SHA-256 of the data set; SHA-256 of the block without this and of what precedes the data set.
"""
ROOM = _BLOCK - _HEAD.size
"""Bytes of a label."""


@dataclass(frozen=True, slots=True)
class Written:
    """A Part 10 file in memory, in its place in an entry."""

    block: memoryview
    """Page-aligned: `HEADROOM` bytes that are written over, the file, and room up to a multiple of
    4,096 bytes."""
    size: int
    start: int
    """Where its data set begins, in the file."""
    sha256: str
    """Of the data set."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An instance in the log, its sums checked."""

    number: int
    """In the order of their being appended, over all segments."""
    label: Mapping[str, Any]
    """What `RedoLog.entry` was given."""
    path: Path
    at: int
    size: int

    def read(self) -> bytes:
        """The Part 10 file.

        Raises:
            OSError: the disk refuses.
        """
        with self.path.open("rb") as file:
            file.seek(self.at + _BLOCK)
            return file.read(self.size)


class Segment:
    """One file of the log; whoever has it is its only user."""

    def __init__(self, path: Path, soiled: int = SEGMENT_BYTES) -> None:
        """Raises OSError if it cannot be opened; `make` makes it.

        `soiled`: how far bytes of forgotten entries may reach.
        """
        self.path = path
        self.since: float | None = None
        """When its oldest entry was appended; None: it has none."""
        self.broken = False
        self.to_wipe = False
        """Is what forgotten entries left to be overwritten as soon as there are no others?"""
        self._file = _opened(path, os.O_RDWR)
        self._use = secrets.token_bytes(16)
        self._end = self._last = 0
        self._soiled = soiled

    @property
    def room(self) -> int:
        """Bytes of the largest file that still fits."""
        return SEGMENT_BYTES - self._end - _BLOCK

    def append(self, number: int, label: bytes, written: Written) -> None:
        """Append an instance, and make it durable.

        Raises:
            OSError: the disk refuses; nothing more may be appended.
        """
        length = _rounded(_BLOCK + written.size)
        entry = written.block[:length]
        ahead = bytes(entry[_BLOCK : _BLOCK + written.start])
        sizes = (len(label), written.size, written.start)
        head = (_MAGIC, self._use, number, *sizes, bytes.fromhex(written.sha256))
        entry[:_BLOCK] = _HEAD.pack(*head, _sum(head, label, ahead)) + label.ljust(ROOM, b"\0")
        self._last, self._end = self._end, self._end + length
        _put(self._file, entry, self._last)
        os.fdatasync(self._file)
        self.since = self.since or time.monotonic()

    def take_back(self) -> None:
        """Forget the last entry, durably.

        Raises:
            OSError: the disk refuses.
        """
        _put(self._file, _ZEROS[:_BLOCK], self._last)
        os.fdatasync(self._file)
        self._soiled, self._end = max(self._soiled, self._end), self._last
        if not self._end and not self.to_wipe:
            self.since = None

    def clear(self) -> None:
        """Forget all entries, durably; what its files say is settled elsewhere.

        Raises:
            OSError: the disk refuses.
        """
        _put(self._file, _ZEROS[:_BLOCK], 0)
        os.fdatasync(self._file)
        self._soiled = max(self._soiled, self._end)
        self._use, self._end, self._last, self.since = secrets.token_bytes(16), 0, 0, None

    def wipe(self) -> None:
        """Overwrite what forgotten entries left.

        Raises:
            OSError: the disk refuses.
        """
        for at in range(0, self._soiled, _MEGABYTE):
            _put(self._file, _ZEROS, at)
        os.fdatasync(self._file)
        self._soiled, self.to_wipe = 0, False

    def close(self, *, remove: bool = False) -> bool:
        """`remove`: its file, too. True if that was wanted and is durable."""
        os.close(self._file)
        if remove:
            with contextlib.suppress(OSError):  # the next start removes it, if it is too many
                self.path.unlink()
                sync_folder(self.path.parent)
                return True
        return False


def make(path: Path) -> None:
    """Make an empty segment: whole, or not at all.

    Raises:
        OSError: the disk refuses.
    """
    part = path.with_suffix(".new")
    try:
        file = _opened(part, os.O_WRONLY | os.O_CREAT)
        try:
            for at in range(0, SEGMENT_BYTES, _MEGABYTE):
                _put(file, _ZEROS, at)
            _put(file, _ZEROS[:_BLOCK], _BLOCK)  # as entries are: not every file system takes it
            os.fsync(file)
        finally:
            os.close(file)
        part.rename(path)
        sync_folder(path.parent)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def paths(folder: Path) -> list[Path]:
    """The segments in a folder, by their numbers."""
    return sorted(path for path in folder.glob("*.log") if path.stem.isdecimal())


def unsettled(folder: Path) -> list[Entry]:
    """The entries in the segments of a folder, in the order of their being appended.

    Raises:
        OSError: the disk refuses.
    """
    found = (entry for path in paths(folder) for entry in _entries(path))
    return sorted(found, key=lambda entry: entry.number)


def _entries(path: Path) -> Iterator[Entry]:
    use, at = None, 0
    try:
        opened = path.open("rb")
    except FileNotFoundError:  # a running node gives a segment up
        return
    with opened as file:
        while len(block := _at(file, at, _BLOCK)) == _BLOCK:
            *head, told = _HEAD.unpack_from(block)
            _, mine, number, words, size, start, digest = head
            label = block[_HEAD.size : _HEAD.size + words]
            data = file.read(size) if size <= LARGEST_BYTES else b""
            if (
                head[0] != _MAGIC
                or mine != (use or mine)
                or _sum(head, label, data[:start]) != told
                or hashlib.sha256(data[start:]).digest() != digest
            ):
                return
            yield Entry(number, json.loads(label), path, at, size)
            use, at = mine, at + _rounded(_BLOCK + size)


def _opened(path: Path, flags: int) -> int:
    """Open a segment, past the page cache where the file system can do without.

    The log would fill it with what nobody reads: all of the log is read after a crash only.

    Raises:
        OSError: the disk refuses.
    """
    try:
        return os.open(path, flags | os.O_DIRECT, 0o640)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o640)


_ZEROS = memoryview(mmap.mmap(-1, _MEGABYTE))
"""As everything that is written past the page cache, at the beginning of a page."""


def _sum(head: Sequence[Any], label: bytes, ahead: bytes) -> bytes:
    return hashlib.sha256(_HEAD.pack(*head, b"") + label + ahead).digest()


def _rounded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _at(file: IO[bytes], position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)


def _put(file: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count
