"""The command sets of PS3.7 that a Storage and Verification SCP reads and writes."""

import re
import struct
from dataclasses import dataclass
from enum import IntEnum

from dicomnode.errors import ProtocolError

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
CANNOT_UNDERSTAND = 0xC000
INVALID_SOP_INSTANCE = 0x0117
SOP_CLASS_NOT_SUPPORTED = 0x0122
UNRECOGNISED_OPERATION = 0x0211
"""Statuses of PS3.7 Annex C and PS3.4 Table B.2-1 that we answer on our own account."""

_RESPONSE = 0x8000
"""The bit that makes a command field a response (PS3.7 Table E.1-1)."""
_NO_DATA_SET = 0x0101
_ELEMENT = struct.Struct("<HHL")
_UID = re.compile(r"[0-9.]{1,64}")


class CommandField(IntEnum):
    """PS3.7 Table E.1-1, as far as we tell them apart."""

    C_STORE_RQ = 0x0001
    C_ECHO_RQ = 0x0030
    C_CANCEL_RQ = 0x0FFF


class InvalidCommand(ProtocolError):
    """A command set that breaks PS3.7."""


@dataclass(frozen=True, slots=True)
class Command:
    """A request, as its command set tells (PS3.7 9.3)."""

    field: int
    message_id: int
    has_data_set: bool
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    """Affected SOP Class and Instance UID; empty if absent or no UID."""

    @property
    def is_response(self) -> bool:
        return bool(self.field & _RESPONSE)


def read_command(data: bytes) -> Command:
    """Parse a command set: implicit VR little endian, group 0000 only (PS3.7 6.3.1).

    Raises:
        InvalidCommand: a length is wrong, or an element that every request has is missing.
    """
    elements = _elements(data)
    field = _number(elements, 0x0100)
    cancel = field == CommandField.C_CANCEL_RQ
    return Command(
        field=field,
        message_id=0 if cancel or field & _RESPONSE else _number(elements, 0x0110),
        has_data_set=_number(elements, 0x0800) != _NO_DATA_SET,
        sop_class_uid=_uid(elements.get(0x0002, b"")),
        sop_instance_uid=_uid(elements.get(0x1000, b"")),
    )


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to a request of ours."""

    message_id: int
    """Of the request."""
    status: int
    comment: str
    """ErrorComment; a peer's words, which may hold anything: never log them."""


def read_response(data: bytes, request: CommandField) -> Response:
    """Parse the command set of the response to a C-STORE or C-ECHO `request` (PS3.7 9.3).

    Raises:
        InvalidCommand: a length is wrong, it is no such response, or it lacks an element.
    """
    elements = _elements(data)
    if _number(elements, 0x0100) != request | _RESPONSE:
        raise InvalidCommand("not the response to this kind of request")
    comment = elements.get(0x0902, b"").decode("ascii", "replace").strip(" \0")
    return Response(_number(elements, 0x0120), _number(elements, 0x0900), comment)


def echo_request(sop_class_uid: str, message_id: int) -> bytes:
    """The command set of a C-ECHO request (PS3.7 9.3.5.1)."""
    elements = _element(0x0002, _padded(sop_class_uid, b"\0"))
    elements += _short(0x0100, CommandField.C_ECHO_RQ) + _short(0x0110, message_id)
    elements += _short(0x0800, _NO_DATA_SET)
    return _element(0x0000, struct.pack("<L", len(elements))) + elements


def store_request(sop_class_uid: str, sop_instance_uid: str, message_id: int) -> bytes:
    """The command set of a C-STORE request of medium priority (PS3.7 9.3.1.1)."""
    elements = _element(0x0002, _padded(sop_class_uid, b"\0"))
    elements += _short(0x0100, CommandField.C_STORE_RQ) + _short(0x0110, message_id)
    elements += _short(0x0700, 0) + _short(0x0800, 1)
    elements += _element(0x1000, _padded(sop_instance_uid, b"\0"))
    return _element(0x0000, struct.pack("<L", len(elements))) + elements


def response(command: Command, status: int, comment: str = "") -> bytes:
    """The command set that answers `command`; `comment` is cut to 64 characters (VR LO)."""
    elements = b""
    if command.sop_class_uid:
        elements += _element(0x0002, _padded(command.sop_class_uid, b"\0"))
    elements += _short(0x0100, command.field | _RESPONSE)
    elements += _short(0x0120, command.message_id)
    elements += _short(0x0800, _NO_DATA_SET)
    elements += _short(0x0900, status)
    if comment:
        elements += _element(0x0902, _padded(comment[:64].replace("\\", "/"), b" "))
    if command.sop_instance_uid:
        elements += _element(0x1000, _padded(command.sop_instance_uid, b"\0"))
    return _element(0x0000, struct.pack("<L", len(elements))) + elements


def _elements(data: bytes) -> dict[int, bytes]:
    elements: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if len(data) - at < _ELEMENT.size:
            raise InvalidCommand("a command element is cut off")
        group, element, length = _ELEMENT.unpack_from(data, at)
        at += _ELEMENT.size
        if group != 0 or length > len(data) - at:
            raise InvalidCommand("a command element has a wrong group or length")
        elements[element] = data[at : at + length]
        at += length
    return elements


def _number(elements: dict[int, bytes], element: int) -> int:
    value = elements.get(element, b"")
    if len(value) != 2:
        raise InvalidCommand(f"command element (0000,{element:04X}) is missing or not 2 bytes")
    return int.from_bytes(value, "little")


def _uid(value: bytes) -> str:
    text = value.rstrip(b"\0 ").decode("ascii", "replace")
    return text if _UID.fullmatch(text) else ""


def _short(element: int, value: int) -> bytes:
    return _element(element, struct.pack("<H", value))


def _element(element: int, value: bytes) -> bytes:
    return _ELEMENT.pack(0, element, len(value)) + value


def _padded(text: str, padding: bytes) -> bytes:
    value = text.encode("ascii", "replace")
    return value + padding * (len(value) % 2)
