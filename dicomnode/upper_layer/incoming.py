"""One data set on its way from the network to a Part 10 file; a large one is never in memory."""

import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dicomnode.segments import HEADROOM, LARGEST_BYTES

BLOCK = HEADROOM + LARGEST_BYTES
"""What a data set needs until it goes to its file, if it does: a small one stays in memory, in the
place where the redo log wants it."""
_STEP = 262_144
"""Fragments are gathered, then hashed and, of a large data set, written: to do so 16 KiB at a time
costs a third more, 64 KiB a tenth, and more than the processor's cache holds costs more, too.
Hashing on a second thread was tried: a CT takes 0.1 ms more CPU time, and as soon as the cores are
busy, longer (docs/PERFORMANCE.md)."""
HEAD = 16_384
"""Bytes of a data set that are kept for whoever stores it: most headers need no second look."""
_LONG = {"OB"}
"""Of the VRs used here, those with a 4-byte length (PS3.5 7.1.2)."""


@dataclass(frozen=True, slots=True)
class Received:
    """A data set that came whole, and what its C-STORE request said of it."""

    sop_class_uid: str
    sop_instance_uid: str
    """Affected SOP Class and Instance UID of the request; the data set may say otherwise."""
    transfer_syntax_uid: str
    message_id: int
    part: Path
    """Part 10 file, not synced; removed after the answer unless it was moved."""
    block: memoryview | None
    """The same file in memory, after `HEADROOM` bytes that nobody needs; valid until
    `Handler.store` returns. None: it is too large."""
    file: Callable[[], int]
    """Makes the file at `part`, unless it is there: a large one is. Its descriptor, open for
    reading and writing until `Handler.store` returns; raises OSError if the disk refuses."""
    sha256: str
    """Of the data set as sent, file meta information left out."""
    size: int
    """Of the data set, bytes."""
    file_size: int
    """Of the file, bytes."""
    head: bytes = b""
    """The first bytes of the data set."""


class Incoming:
    """A data set that grows with each fragment, and its file."""

    def __init__(self, part: Path, meta: bytes, block: memoryview) -> None:
        """`block`: room of `BLOCK` bytes that only we use."""
        self.part = part
        self.size = 0
        self.head = b""
        self._meta_size = len(meta)
        self._digest = hashlib.sha256()
        self._block, self._overflowed, self._file = block, False, -1
        self._done = self._end = HEADROOM + len(meta)  # of the block: hashed, filled
        self._stop = HEADROOM + _STEP
        block[HEADROOM : self._end] = meta

    def add(self, fragment: memoryview) -> None:
        """Raises OSError if the disk refuses."""
        self.size += len(fragment)
        while fragment:
            start = self._end
            some, fragment = fragment[: self._stop - start], fragment[self._stop - start :]
            self._end += len(some)
            self._block[start : self._end] = some
            if self._end == self._stop:
                self._advance()

    def finish(self) -> tuple[str, int]:
        """SHA-256 of the data set, size of the file.

        Raises OSError if the disk refuses.
        """
        self._hash()
        if self._overflowed:
            self._write()
        return self._digest.hexdigest(), self._meta_size + self.size

    @property
    def block(self) -> memoryview | None:
        """Holds the whole file, after `HEADROOM` bytes; None if part of it is on disk only."""
        return None if self._overflowed else self._block

    def file(self) -> int:
        """Descriptor of the file, which is made if need be; all that was hashed is in it.

        Raises OSError if the disk refuses.
        """
        if self._file < 0:
            self._open()
            self._write()
        return self._file

    def discard(self) -> None:
        """Close the file, if there is one, and remove it if it is still where it was."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
            self.part.unlink(missing_ok=True)

    def _advance(self) -> None:
        self._hash()
        if self._end == BLOCK or self._overflowed:
            if not self._overflowed:
                self._overflowed = True
                self._open()
            self._write()
            self._done = self._end = HEADROOM
        self._stop = min(BLOCK, self._end + _STEP)

    def _hash(self) -> None:
        data, self._done = self._block[self._done : self._end], self._end
        self.head = self.head or bytes(data[:HEAD])
        self._digest.update(data)

    def _open(self) -> None:
        self._file = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)

    def _write(self) -> None:
        data = self._block[HEADROOM : self._end]
        while data:
            data = data[os.write(self._file, data) :]


def file_meta(
    sop_class_uid: str,
    sop_instance_uid: str,
    transfer_syntax_uid: str,
    calling_ae: str,
    implementation_class_uid: str,
    implementation_version_name: str,
) -> bytes:
    """Preamble, prefix and File Meta Information of a received instance (PS3.10 7.1)."""
    elements = b"".join(
        (
            meta_element(0x0001, "OB", b"\0\1"),
            meta_element(0x0002, "UI", sop_class_uid.encode("ascii")),
            meta_element(0x0003, "UI", sop_instance_uid.encode("ascii")),
            meta_element(0x0010, "UI", transfer_syntax_uid.encode("ascii")),
            meta_element(0x0012, "UI", implementation_class_uid.encode("ascii")),
            meta_element(0x0013, "SH", implementation_version_name.encode("ascii")),
            meta_element(0x0016, "AE", calling_ae.encode("ascii", "replace")),
        )
    )
    return bytes(128) + b"DICM" + meta_element(0, "UL", struct.pack("<L", len(elements))) + elements


def meta_element(element: int, vr: str, value: bytes) -> bytes:
    """One element of group 0002, explicit VR little endian, padded to even length (PS3.10 7.1)."""
    value += (b"\0" if vr in ("UI", "OB") else b" ") * (len(value) % 2)
    length = struct.pack("<HL", 0, len(value)) if vr in _LONG else struct.pack("<H", len(value))
    return struct.pack("<HH", 2, element) + vr.encode() + length + value
