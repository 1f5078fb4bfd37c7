"""Curves and pictures for TensorBoard: its event file, written without its package.

A file is a sequence of TFRecords, each an `Event` of tensorflow/core/util/event.proto in the wire
format of protocol buffers; only the few fields below are used.
"""

import io
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VERSION = b"brain.Event:2"
_CASTAGNOLI = 0x82F63B78


class EventFile:
    """Appends events to one new file in `folder`; readers join the files of a folder by step."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{os.getpid()}"
        self.path = folder / name
        self._append(_text(3, VERSION))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Name -> value, one point on each curve."""
        if values:
            parts = [
                _message(1, _text(1, name.encode()) + _key(2, 5) + struct.pack("<f", value))
                for name, value in values.items()
            ]
            self._append(_key(2, 0) + _varint(step) + _message(5, b"".join(parts)))

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """`pixels`: (rows, columns), uint8, grey."""
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, "png")
        rows, columns = pixels.shape
        sizes = b"".join(
            _key(field, 0) + _varint(value) for field, value in ((1, rows), (2, columns), (3, 1))
        )
        value = _text(1, name.encode()) + _message(4, sizes + _text(4, held.getvalue()))
        self._append(_key(2, 0) + _varint(step) + _message(5, _message(1, value)))

    def _append(self, event: bytes) -> None:
        record = _key(1, 1) + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(record))
        with self.path.open("ab") as stream:
            stream.write(length + _checksum(length) + record + _checksum(record))


def _key(field: int, kind: int) -> bytes:
    return bytes([field << 3 | kind])


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _text(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


_message = _text
"""A message inside a message is written as its bytes are."""


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    """The masked checksum of a TFRecord."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
