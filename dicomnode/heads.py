"""The attributes asked for of a usual data set, from its first bytes, at little cost.

Every received instance is asked for some: pydicom takes longer for them than the disk for a small
image. What is not as the standard has it is left to `part10.read_header`: nothing is judged here.
"""

import re
import struct
from collections.abc import Callable, Collection
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from dicomnode.part10 import DEEPEST, ENDS, LONG_VRS, UNDEFINED, VRS, is_implicit

_HEADER = struct.Struct("<HH2sH")
_LENGTH = struct.Struct("<L")
_NUMBER = r" *[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)? *"
_UID = re.compile(rb"[0-9][0-9.]{,63}\0?")
_CODES = re.compile(rb"[A-Z0-9_][A-Z0-9_ ]*(?:\\[A-Z0-9_][A-Z0-9_ ]*)* *")
_DECIMALS = re.compile(rf"{_NUMBER}(?:\\{_NUMBER})*".encode())
_INTEGER = re.compile(rb" *[+-]?[0-9]{1,12} *")


class Plain:
    """The values of a data set that holds them as PS3.5 6.2 wants them; made once for its tags."""

    def __init__(self, tags: Collection[int]) -> None:
        """`tags`: of the VRs UI, CS, DS, IS and US."""
        self._wanted = {tag: (keyword_for_tag(tag), dictionary_VR(tag).encode()) for tag in tags}
        if not {vr for _, vr in self._wanted.values()} <= set(_PLAIN):
            raise ValueError("an attribute of another VR")
        self._last = max(tags)

    def read(self, head: bytes, syntax: str) -> dict[str, Any] | None:
        """Text, number, or list of them, by keyword; None if empty, absent if not there.

        None: not to be told from `head`, the beginning of a data set in transfer syntax `syntax`:
        it is too short, or something in it is unusual.
        """
        if syntax in (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian):
            return None
        try:
            return self._collect(head, is_implicit(syntax, head))
        except (struct.error, LookupError):
            return None

    def _collect(self, head: bytes, implicit: bool) -> dict[str, Any] | None:
        """Raises struct.error or LookupError where `head` ends, or a value is unusual."""
        found: dict[str, Any] = {}
        wanted, last, at, depth = self._wanted, self._last, 0, 0
        while True:
            group, element, vr, length = _HEADER.unpack_from(head, at)
            tag = group << 16 | element
            if group == 0xFFFE or implicit:
                vr, length = b"", _LENGTH.unpack_from(head, at + 4)[0]
                at += 8
            elif vr in LONG_VRS:
                length = _LENGTH.unpack_from(head, at + 8)[0]
                at += 12
            elif vr in VRS:
                at += 8
            else:
                return None
            if not depth and tag > last:
                return found
            if not depth and tag in wanted:
                keyword, usual = wanted[tag]
                if keyword in found or vr not in (usual, b"") or at + length > len(head):
                    return None
                found[keyword] = _PLAIN[usual](head[at : at + length]) if length else None
                at += length
            elif length == UNDEFINED and depth < DEEPEST:
                depth += 1
            elif tag in ENDS:
                depth -= 1
            else:
                at += length


def _uid(value: bytes) -> str:
    return _matching(_UID, value).rstrip("\0")


def _codes(value: bytes) -> str | list[str]:
    codes = [code.rstrip(" ") for code in _matching(_CODES, value).split("\\")]
    return codes if len(codes) > 1 else codes[0]


def _decimals(value: bytes) -> float | list[float]:
    numbers = [float(number) for number in _matching(_DECIMALS, value).split("\\")]
    return numbers if len(numbers) > 1 else numbers[0]


def _integer(value: bytes) -> int:
    return int(_matching(_INTEGER, value))


def _unsigned(value: bytes) -> int:
    if len(value) != 2:
        raise LookupError
    return int.from_bytes(value, "little")


def _matching(usual: re.Pattern[bytes], value: bytes) -> str:
    if not usual.fullmatch(value):
        raise LookupError
    return value.decode("ascii")


_PLAIN: dict[bytes, Callable[[bytes], Any]] = {
    b"UI": _uid,
    b"CS": _codes,
    b"DS": _decimals,
    b"IS": _integer,
    b"US": _unsigned,
}
