"""One data set on its way from the network to a Part 10 file; it is never held in memory."""

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

BLOCK = 262_144
"""Fragments are gathered into blocks: writing and hashing 16 KiB at a time costs a third more, 64
KiB a tenth. Hashing on a second thread was tried: a CT takes 0.1 ms more CPU time, and as soon as
the cores are busy, longer (docs/PERFORMANCE.md)."""
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
    """Part 10 file, not synced; removed after `Handler.store` unless it was moved."""
    descriptor: int
    """Of the same file, open until `Handler.store` returns."""
    sha256: str
    """Of the data set as sent, file meta information left out."""
    size: int
    """Of the data set, bytes."""
    file_size: int
    """Of the file, bytes."""
    head: bytes = b""
    """The first bytes of the data set."""


class Incoming:
    """A part file that grows with each fragment."""

    def __init__(self, part: Path, meta: bytes, block: memoryview) -> None:
        """Raises OSError if the file cannot be made. `block`: room that only we use."""
        self.part = part
        self.size = 0
        self.head = b""
        self._meta_size = self._undigested = len(meta)
        self._digest = hashlib.sha256()
        self._block, self._filled = block, len(meta)
        self._file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        block[: len(meta)] = meta

    def add(self, fragment: memoryview) -> None:
        """Raises OSError if the disk refuses."""
        self.size += len(fragment)
        while fragment:
            start = self._filled
            part, fragment = fragment[: BLOCK - start], fragment[BLOCK - start :]
            self._filled += len(part)
            self._block[start : self._filled] = part
            if self._filled == BLOCK:
                self._flush()

    def finish(self) -> tuple[str, int, int]:
        """SHA-256 of the data set, size of the file, its descriptor; the file stays open.

        Raises OSError if the disk refuses.
        """
        self._flush()
        return self._digest.hexdigest(), self._meta_size + self.size, self._file

    def discard(self) -> None:
        """Close the file, and remove it if it is still where it was."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
        self.part.unlink(missing_ok=True)

    def _flush(self) -> None:
        data, self._filled = self._block[: self._filled], 0
        own, self._undigested = data[self._undigested :], 0
        self.head = self.head or bytes(own[:HEAD])
        self._digest.update(own)
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
