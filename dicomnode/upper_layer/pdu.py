"""The PDUs of PS3.8 9.3 that an association acceptor reads and writes.

Every length is checked against what is there, and every count against a limit, before it is used.
Items we do not know are skipped, as PS3.8 9.3.1 asks.
"""

import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from dicomnode.errors import ProtocolError

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"
MAX_CONTEXTS = 128
"""Context IDs are the odd numbers from 1 to 255 (PS3.8 9.3.2.2)."""
MAX_TRANSFER_SYNTAXES = 256
"""Per presentation context; the standard knows about 60."""
MAX_USER_ITEMS = 1024
"""Sub-items of the user information item; role selection may bring one per SOP class."""

HEADER = struct.Struct(">BxL")
"""PDU type and length of what follows (PS3.8 9.3.1)."""
PDV_HEADER = struct.Struct(">LBB")
"""Item length, presentation context ID and message control header (PS3.8 9.3.5.1)."""
_ITEM = struct.Struct(">BxH")
_UID = re.compile(r"[0-9.]{1,64}")
_FIXED = 68
"""Bytes of an A-ASSOCIATE-RQ before its first item, without the PDU header."""


class PduType(IntEnum):
    """PS3.8 9.3.2 to 9.3.8."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    P_DATA_TF = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class AbortReason(IntEnum):
    """Why the service provider aborts (PS3.8 Table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNISED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNISED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class ContextResult(IntEnum):
    """Answer to one proposed presentation context (PS3.8 Table 9-18)."""

    ACCEPTANCE = 0
    USER_REJECTION = 1
    ABSTRACT_SYNTAX_NOT_SUPPORTED = 3
    TRANSFER_SYNTAXES_NOT_SUPPORTED = 4


class InvalidPdu(ProtocolError):
    """A PDU that breaks PS3.8; `reason` goes into the A-ABORT."""

    def __init__(self, words: str, reason: AbortReason = AbortReason.INVALID_PARAMETER) -> None:
        super().__init__(words)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Rejection:
    """Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 Table 9-21), and why, for the log."""

    result: int
    source: int
    reason: int
    words: str


PROTOCOL_VERSION = Rejection(1, 2, 2, "protocol version not supported")
APPLICATION_CONTEXT_NAME = Rejection(1, 1, 2, "application context name not supported")
LOCAL_LIMIT = Rejection(2, 3, 2, "local limit exceeded")
CALLING_AE = Rejection(1, 1, 3, "calling AE title not recognised")
CALLED_AE = Rejection(1, 1, 7, "called AE title not recognised")
_REJECTED = {
    (1, 1): "no reason given",
    (1, 2): "application context name not supported",
    (1, 3): "calling AE title not recognised",
    (1, 7): "called AE title not recognised",
    (2, 1): "no reason given",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "local limit exceeded",
}
"""Source and reason (PS3.8 Table 9-21)."""


@dataclass(frozen=True, slots=True)
class ProposedContext:
    """One presentation context of a request (PS3.8 9.3.2.2)."""

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnsweredContext:
    """What we answer to a proposed context (PS3.8 9.3.3.2)."""

    context_id: int
    result: ContextResult
    transfer_syntax: str = IMPLICIT_VR_LITTLE_ENDIAN
    """Not significant unless accepted, but the item must be there."""


@dataclass(frozen=True, slots=True)
class UserInformation:
    """What the requestor says of itself (PS3.7 Annex D.3.3)."""

    max_length: int = 0
    """Longest P-DATA-TF that it takes, as PDU length; 0: no limit (PS3.8 D.1)."""
    implementation_class_uid: str = ""
    implementation_version_name: str = ""
    asynchronous: bool = False
    roles: Mapping[str, tuple[bool, bool]] | None = None
    """By SOP class: does it want to be SCU, SCP? Absent: SCU (PS3.7 D.3.3.4)."""


@dataclass(frozen=True, slots=True)
class AssociateRequest:
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2)."""

    protocol_version: int
    called_ae: str
    calling_ae: str
    application_context: str
    contexts: tuple[ProposedContext, ...]
    user: UserInformation
    echoed: bytes
    """The AE titles and reserved bytes, which the answer repeats (PS3.8 9.3.3)."""


def read_associate_request(body: bytes) -> AssociateRequest:
    """Parse an A-ASSOCIATE-RQ without its PDU header.

    Raises:
        InvalidPdu: a length, a count, a context ID or a UID is wrong, or a part is missing.
    """
    if len(body) < _FIXED:
        raise InvalidPdu("the A-ASSOCIATE-RQ is too short")
    application_context = ""
    contexts: dict[int, ProposedContext] = {}
    user: UserInformation | None = None
    for kind, value in _items(body[_FIXED:], MAX_CONTEXTS + MAX_USER_ITEMS):
        if kind == 0x10:
            application_context = _uid(value)
        elif kind == 0x20:
            context = _proposed_context(value)
            if context.context_id in contexts:
                raise InvalidPdu("a presentation context ID is used twice")
            contexts[context.context_id] = context
        elif kind == 0x50:
            user = _user_information(value)
    if not application_context or not contexts or user is None:
        raise InvalidPdu("the A-ASSOCIATE-RQ lacks a mandatory item")
    return AssociateRequest(
        protocol_version=int.from_bytes(body[:2], "big"),
        called_ae=_ae_title(body[4:20]),
        calling_ae=_ae_title(body[20:36]),
        application_context=application_context,
        contexts=tuple(contexts.values()),
        user=user,
        echoed=bytes(body[4:_FIXED]),
    )


def _proposed_context(value: bytes) -> ProposedContext:
    if len(value) < 4 or not value[0] % 2:
        raise InvalidPdu("a presentation context item is not valid")
    abstract, transfer = "", []
    for kind, name in _items(value[4:], MAX_TRANSFER_SYNTAXES):
        if kind == 0x30:
            abstract = _uid(name)
        elif kind == 0x40:
            transfer.append(_uid(name))
    if not abstract or not transfer:
        raise InvalidPdu("a presentation context lacks its abstract or transfer syntax")
    return ProposedContext(value[0], abstract, tuple(transfer))


def _user_information(value: bytes) -> UserInformation:
    max_length, class_uid, version, asynchronous = 0, "", "", False
    roles: dict[str, tuple[bool, bool]] = {}
    for kind, data in _items(value, MAX_USER_ITEMS):
        if kind == 0x51:
            if len(data) != 4:
                raise InvalidPdu("the maximum length item is not 4 bytes long")
            max_length = int.from_bytes(data, "big")
        elif kind == 0x52:
            class_uid = _text(data)[:64]
        elif kind == 0x53:
            asynchronous = True
        elif kind == 0x54:
            length = int.from_bytes(data[:2], "big")
            if len(data) != 2 + length + 2:
                raise InvalidPdu("a role selection item is not valid")
            roles[_uid(data[2:-2])] = (data[-2] == 1, data[-1] == 1)
        elif kind == 0x55:
            version = _text(data)[:16]
    return UserInformation(max_length, class_uid, version, asynchronous, roles)


def _items(data: bytes, most: int) -> Iterator[tuple[int, bytes]]:
    """Type and value of each item or sub-item; at most `most` of them."""
    at = count = 0
    while at < len(data):
        if len(data) - at < _ITEM.size:
            raise InvalidPdu("an item header is cut off")
        kind, length = _ITEM.unpack_from(data, at)
        at += _ITEM.size
        count += 1
        if length > len(data) - at or count > most:
            raise InvalidPdu("an item is longer than its PDU, or there are too many items")
        yield kind, data[at : at + length]
        at += length


def _uid(data: bytes) -> str:
    text = _text(data)
    if not _UID.fullmatch(text):
        raise InvalidPdu("a UID is not valid")
    return text


def _text(data: bytes) -> str:
    return data.rstrip(b"\0 ").decode("ascii", "replace")


def _ae_title(data: bytes) -> str:
    """Without the padding; what is not printable ASCII becomes a question mark."""
    text = data.decode("ascii", "replace").strip(" \0")
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


def associate_accept(
    request: AssociateRequest,
    contexts: Sequence[AnsweredContext],
    max_length: int,
    implementation_class_uid: str,
    implementation_version_name: str,
    reporting: Collection[str] = (),
) -> bytes:
    """An A-ASSOCIATE-AC (PS3.8 9.3.3): we are SCP only, one operation at a time.

    `reporting`: SOP classes of which the requestor may be SCP.
    """
    abstract = {context.context_id: context.abstract_syntax for context in request.contexts}
    accepted = {abstract[c.context_id] for c in contexts if c.result is ContextResult.ACCEPTANCE}
    user = _item(0x51, max_length.to_bytes(4, "big"))
    user += _item(0x52, implementation_class_uid.encode("ascii"))
    if request.user.asynchronous:
        user += _item(0x53, struct.pack(">HH", 1, 1))
    for sop_class, (scu, scp) in (request.user.roles or {}).items():
        if sop_class in accepted:
            name = sop_class.encode("ascii")
            roles = bytes([scu, scp and sop_class in reporting])
            user += _item(0x54, struct.pack(">H", len(name)) + name + roles)
    user += _item(0x55, implementation_version_name.encode("ascii"))
    answers = b"".join(
        _item(0x21, bytes([c.context_id, 0, c.result, 0]) + _item(0x40, c.transfer_syntax.encode()))
        for c in contexts
    )
    items = _item(0x10, APPLICATION_CONTEXT.encode()) + answers + _item(0x50, user)
    return _pdu(PduType.ASSOCIATE_AC, struct.pack(">HH", 1, 0) + request.echoed + items)


def associate_request(
    called_ae: str,
    calling_ae: str,
    contexts: Sequence[ProposedContext],
    max_length: int,
    implementation_class_uid: str,
    implementation_version_name: str,
) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2): we are SCU only, one operation at a time."""
    titles = b"".join(title.encode("ascii").ljust(16)[:16] for title in (called_ae, calling_ae))
    proposed = b"".join(
        _item(
            0x20,
            bytes([c.context_id, 0, 0, 0])
            + _item(0x30, c.abstract_syntax.encode())
            + b"".join(_item(0x40, syntax.encode()) for syntax in c.transfer_syntaxes),
        )
        for c in contexts
    )
    user = _item(0x51, max_length.to_bytes(4, "big"))
    user += _item(0x52, implementation_class_uid.encode("ascii"))
    user += _item(0x55, implementation_version_name.encode("ascii"))
    items = _item(0x10, APPLICATION_CONTEXT.encode()) + proposed + _item(0x50, user)
    return _pdu(PduType.ASSOCIATE_RQ, struct.pack(">HH", 1, 0) + titles + bytes(32) + items)


def read_associate_accept(body: bytes) -> tuple[list[AnsweredContext], int]:
    """The answered contexts of an A-ASSOCIATE-AC, and the longest P-DATA-TF it takes (0: any).

    Raises:
        InvalidPdu: a length or a count is wrong, or a part is missing.
    """
    if len(body) < _FIXED:
        raise InvalidPdu("the A-ASSOCIATE-AC is too short")
    answers, max_length = [], None
    for kind, value in _items(body[_FIXED:], MAX_CONTEXTS + MAX_USER_ITEMS):
        if kind == 0x21:
            if len(value) < 4:
                raise InvalidPdu("a presentation context item is not valid")
            accepted = value[2] == ContextResult.ACCEPTANCE
            names = [_uid(name) for kind, name in _items(value[4:], 1) if kind == 0x40 and accepted]
            result = ContextResult.ACCEPTANCE if names else ContextResult.USER_REJECTION
            answers.append(AnsweredContext(value[0], result, *names[:1]))
        elif kind == 0x50:
            max_length = _user_information(value).max_length
    if max_length is None:
        raise InvalidPdu("the A-ASSOCIATE-AC has no user information")
    if 0 < max_length < PDV_HEADER.size + 2:
        raise InvalidPdu("the peer takes PDUs of no useful length")
    return answers, max_length


def read_associate_reject(body: bytes) -> Rejection:
    """An A-ASSOCIATE-RJ, its reason in the words of PS3.8 Table 9-21.

    Raises:
        InvalidPdu: it is not 4 bytes long.
    """
    if len(body) != 4:
        raise InvalidPdu("the A-ASSOCIATE-RJ is not 4 bytes long")
    _, result, source, reason = body
    words = _REJECTED.get((source, reason), f"source {source}, reason {reason}")
    return Rejection(result, source, reason, words)


def associate_reject(why: Rejection) -> bytes:
    return _pdu(PduType.ASSOCIATE_RJ, bytes([0, why.result, why.source, why.reason]))


def release_request() -> bytes:
    return _pdu(PduType.RELEASE_RQ, bytes(4))


def release_response() -> bytes:
    return _pdu(PduType.RELEASE_RP, bytes(4))


def abort(source: int, reason: int) -> bytes:
    """`source`: 0 service user, 2 service provider (PS3.8 9.3.8)."""
    return _pdu(PduType.ABORT, bytes([0, 0, source, reason]))


def p_data(context_id: int, fragment: bytes) -> bytes:
    """A fragment behind its message control header as a P-DATA-TF PDU (PS3.8 9.3.5, E.2)."""
    header = struct.pack(">LB", len(fragment) + 1, context_id)
    return _pdu(PduType.P_DATA_TF, header + fragment)


def p_data_command(context_id: int, command: bytes, max_length: int) -> bytes:
    """A command set as P-DATA-TF PDUs no longer than the peer takes (PS3.8 9.3.5, PS3.7 6.3.1)."""
    most = (
        (max_length - PDV_HEADER.size) & ~1 if max_length else len(command)
    )  # even, as values are
    pdus = []
    for at in range(0, len(command), most):
        part = command[at : at + most]
        control = 3 if at + most >= len(command) else 1
        pdus.append(p_data(context_id, bytes([control]) + part))
    return b"".join(pdus)


def _pdu(kind: PduType, body: bytes) -> bytes:
    return HEADER.pack(kind, len(body)) + body


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM.pack(kind, len(value)) + value
