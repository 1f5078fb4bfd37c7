"""Storage and Verification SCP: fragments -> command -> data set -> answer (PS3.7)."""

import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from dicomnode.errors import InstanceRefused
from dicomnode.upper_layer import dimse, pdu
from dicomnode.upper_layer.dimse import Command, CommandField, InvalidCommand
from dicomnode.upper_layer.guests import Guest
from dicomnode.upper_layer.incoming import BLOCK, Incoming, Received, file_meta
from dicomnode.upper_layer.negotiation import VERIFICATION, is_ours
from dicomnode.upper_layer.pdu import (
    HEADER,
    PDV_HEADER,
    AbortReason,
    InvalidPdu,
    PduType,
    Rejection,
)
from dicomnode.upper_layer.stream import Stream, room

log = logging.getLogger(__name__)

_COMMAND, _LAST = 1, 2
"""Bits of the message control header (PS3.8 Annex E.2)."""
_ONE_PDV = struct.Struct(">BxLLBB")
"""The header of a P-DATA-TF and of its first presentation data value."""
_LARGE_BUFFER = 262_144
SMALL_BUFFER = 2_048
"""Of an association that receives no data set."""
_REST_SECONDS = 1.0
"""After this long without a message, large buffers go back to the system."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one association may take."""

    max_pdu_bytes: int = 131_072
    """Longest P-DATA-TF we take, as PDU length; announced in the A-ASSOCIATE-AC."""
    max_request_bytes: int = 131_072
    """Longest A-ASSOCIATE-RQ."""
    max_command_bytes: int = 65_536
    max_data_set_bytes: int = 1 << 34
    max_library_bytes: int = 8 << 20
    """Longest data set of a service that pynetdicom serves, which holds it in memory; a storage
    commitment request for 50,000 instances."""
    artim_seconds: float = 15.0
    """For the whole A-ASSOCIATE-RQ to arrive, and for the peer to close in the end (PS3.8 9.1)."""
    idle_seconds: float = 300.0
    """For each further PDU to arrive whole."""
    write_seconds: float = 30.0
    """For the peer to take an answer."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are (PS3.7 D.3.3.2)."""

    implementation_class_uid: str
    implementation_version_name: str


@dataclass(frozen=True, slots=True, eq=False)
class Requestor:
    """Who asked for an association; equal only to itself, so it can be the key to what it did."""

    calling_ae: str
    called_ae: str
    host: str


class Handler(Protocol):
    """What the node adds; called on the thread of the association, so it must be thread-safe."""

    def request(self, requestor: Requestor) -> Rejection | None:
        """May it associate? Asked before anything is negotiated; None: yes, and it will."""

    def allows(self, requestor: Requestor, sop_class_uid: str) -> bool:
        """May it store instances of this class? No: its presentation context is rejected."""

    def part_path(self) -> Path:
        """A name for the next data set that no file has, where a rename can keep it.

        Raises:
            InstanceRefused: answered without storing, after the data set has been read away.
        """

    def store(self, requestor: Requestor, received: Received) -> tuple[int, str]:
        """Keep a data set; the status and an ErrorComment ("" for none).

        Raises:
            InstanceRefused: its status and text are answered.
            OSError: 0xA700 is answered.
        """

    def answered(self, requestor: Requestor, status: int) -> None:
        """Called before each C-STORE response is sent, whoever chose its status."""

    def ended(self, requestor: Requestor, how: Literal["released", "aborted"]) -> None:
        """Called once for each `request` that got None, before the connection closes."""


class Others(Protocol):
    """Services beside Storage and Verification."""

    services: Mapping[str, bool]
    """Their abstract syntaxes; may the requestor be SCP, too?"""

    def guest(
        self, requestor: Requestor, contexts: Mapping[int, tuple[str, str]], max_length: int
    ) -> Guest | None:
        """Serves what of `contexts` is theirs to one requestor; None: nothing is.

        `max_length`: of a PDU that it takes; 0: any.
        """


class Service:
    """The messages of one association, one after the other."""

    def __init__(
        self,
        handler: Handler,
        requestor: Requestor,
        contexts: dict[int, tuple[str, str]],
        identity: Identity,
        limits: Limits,
        stream: Stream,
        max_length: int,
        guest: Guest | None = None,
    ) -> None:
        """`contexts`: abstract and transfer syntax of the accepted ones, by ID. `max_length`: of a
        PDU that the peer takes; 0: any. `guest`: serves those that are not `is_ours`."""
        self._handler, self._requestor = handler, requestor
        self._contexts, self._identity = contexts, identity
        self._limits, self._stream = limits, stream
        self._max_length, self._guest = max_length, guest
        self._guest_command = b""  # complete; whatever data set it has is gathered
        self._gathered = bytearray()
        self._context_id = 0  # of the message that is being received; 0: none
        self._command_set = bytearray()
        self._command: Command | None = None  # complete; its data set is being received
        self._incoming: Incoming | None = None
        self._block: memoryview | None = None  # kept from one data set to the next
        self._refusal: tuple[int, str] | None = None

    @property
    def busy(self) -> bool:
        """Is a message half-received?"""
        return self._context_id != 0

    def discard(self) -> None:
        """Remove what is left of a data set: half-received, or answered."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.discard()

    def rest(self) -> None:
        """Give back what receiving data sets needs, for as long as none come."""
        if self._block is not None and self._stream.silent(_REST_SECONDS):
            self._release()

    def end(self) -> None:
        """The association has ended."""
        try:
            self.discard()
        finally:
            self._release()

    def _release(self) -> None:
        self._block = None
        self._stream.resize(SMALL_BUFFER)

    def fragment(self, context_id: int, control: int, length: int) -> bytes | None:
        """Take one presentation data value (PS3.8 Annex E).

        Returns the PDUs that answer, when a message is whole; then `discard` what it brought.

        Raises:
            InvalidPdu: the fragment does not belong here.
            InvalidCommand: the command set is not valid.
            Closed, Expired: it did not come whole.
        """
        if context_id not in self._contexts:
            raise InvalidPdu("a presentation context that was not accepted")
        if self._context_id not in (0, context_id):
            raise InvalidPdu("two messages are mixed", AbortReason.UNEXPECTED_PARAMETER)
        if bool(control & _COMMAND) is not (self._command is None):
            raise InvalidPdu("a fragment out of order", AbortReason.UNEXPECTED_PARAMETER)
        self._context_id = context_id
        if not control & _COMMAND:
            self._add(length)
        elif len(self._command_set) + length > self._limits.max_command_bytes:
            raise InvalidCommand("the command set is too long")
        else:
            self._command_set += self._stream.collect(length)
        if not control & _LAST:
            return None
        command = self._command or self._begin()
        if control & _COMMAND and command.has_data_set:
            self._command = command
            return None
        return self._complete(command)

    def take_whole_pdus(self) -> None:
        """Take P-DATA-TF PDUs that have come whole and only continue the data set.

        Each has one fragment, not the last, of the message that is being received. So there is
        nothing to decide, and most of an image comes in them: anything else is left to `fragment`.
        It saves 5 % of the CPU time of a CT in PDUs of 16 KiB.
        """
        while self._command is not None:
            ahead = self._stream.ahead()
            if len(ahead) < _ONE_PDV.size:
                return
            kind, length, pdv_length, context_id, control = _ONE_PDV.unpack_from(ahead)
            if (
                (kind, context_id, control) != (PduType.P_DATA_TF, self._context_id, 0)
                or not PDV_HEADER.size <= length <= self._limits.max_pdu_bytes
                or pdv_length != length - 4
                or len(ahead) < HEADER.size + length
            ):
                return
            self._keep(self._stream.exactly(HEADER.size + length)[_ONE_PDV.size :])

    def _begin(self) -> Command:
        """A command set is whole: judge it, and get ready for its data set."""
        whole, self._command_set = bytes(self._command_set), bytearray()
        command = dimse.read_command(whole)
        if command.is_response:
            raise InvalidCommand("a response to nothing that we asked")
        abstract_syntax, transfer_syntax = self._contexts[self._context_id]
        if not is_ours(abstract_syntax):
            self._guest_command = whole
            return command
        self._refusal = _refusal(command, abstract_syntax)
        if self._refusal is None and command.field == CommandField.C_STORE_RQ:
            self._open(command, transfer_syntax)
        return command

    def _open(self, command: Command, transfer_syntax: str) -> None:
        meta = file_meta(
            command.sop_class_uid,
            command.sop_instance_uid,
            transfer_syntax,
            self._requestor.calling_ae,
            self._identity.implementation_class_uid,
            self._identity.implementation_version_name,
        )
        try:
            part = self._handler.part_path()
            self._block = room(BLOCK) if self._block is None else self._block
            self._incoming = Incoming(part, meta, self._block)
            self._stream.resize(_LARGE_BUFFER)
        except InstanceRefused as refusal:
            self._refusal = (refusal.status, str(refusal))
        except OSError as error:
            self._refuse(_out_of_resources(error))

    def _add(self, length: int) -> None:
        """Stream a fragment on its way; or read it away, if the data set is refused."""
        while length:
            data = self._stream.some(length)
            length -= len(data)
            self._keep(data)

    def _keep(self, data: memoryview) -> None:
        if self._guest_command:
            self._gather(data)
        if self._incoming is None:
            return
        try:
            self._incoming.add(data)
        except OSError as error:
            self._refuse(_out_of_resources(error))
            return
        if self._incoming.size > self._limits.max_data_set_bytes:
            self._refuse((dimse.OUT_OF_RESOURCES, "the data set is too large for this node"))

    def _gather(self, data: memoryview) -> None:
        self._gathered += data
        if len(self._gathered) > self._limits.max_library_bytes:
            raise InvalidCommand("the data set is too long")

    def _refuse(self, why: tuple[int, str]) -> None:
        self._refusal = why
        self.discard()

    def _complete(self, command: Command) -> bytes | None:
        """A message is whole: do what it asks; the PDUs that answer."""
        self._command = None
        context_id, transfer_syntax = self._context_id, self._contexts[self._context_id][1]
        self._context_id = 0
        if self._guest_command:
            return self._ask_guest(context_id)
        if command.field == CommandField.C_CANCEL_RQ:
            return None  # nothing to cancel, and no answer (PS3.7 9.3.2.3)
        status, comment = self._refusal or (dimse.SUCCESS, "")
        if self._refusal is not None:
            log.warning("answered 0x%04X to %s: %s", status, self._requestor.host, comment)
        if self._incoming is not None:
            status, comment = self._store(self._incoming, command, transfer_syntax)
            if status != dimse.SUCCESS:  # nothing is there when the peer hears so
                self.discard()
        if command.field == CommandField.C_STORE_RQ:
            self._handler.answered(self._requestor, status)
        answer = dimse.response(command, status, comment)
        return pdu.p_data_command(context_id, answer, self._max_length)

    def _ask_guest(self, context_id: int) -> bytes:
        command, self._guest_command = self._guest_command, b""
        data_set, self._gathered = bytes(self._gathered), bytearray()
        if self._guest is None:
            raise InvalidCommand("nobody serves this presentation context")
        fragments = self._guest.answer(context_id, command, data_set)
        return b"".join(pdu.p_data(context_id, fragment) for fragment in fragments)

    def _store(self, incoming: Incoming, command: Command, transfer_syntax: str) -> tuple[int, str]:
        try:
            digest, file_size = incoming.finish()
            received = Received(
                sop_class_uid=command.sop_class_uid,
                sop_instance_uid=command.sop_instance_uid,
                transfer_syntax_uid=transfer_syntax,
                message_id=command.message_id,
                part=incoming.part,
                block=incoming.block,
                file=incoming.file,
                sha256=digest,
                size=incoming.size,
                file_size=file_size,
                head=incoming.head,
            )
            return self._handler.store(self._requestor, received)
        except InstanceRefused as refusal:
            return refusal.status, str(refusal)
        except OSError as error:
            log.warning(
                "could not store an instance from %s: %s", self._requestor.host, error.strerror
            )
            return _out_of_resources(error)


def _out_of_resources(error: OSError) -> tuple[int, str]:
    return dimse.OUT_OF_RESOURCES, f"could not store: {error.strerror or 'the disk refused'}"


def _refusal(command: Command, abstract_syntax: str) -> tuple[int, str] | None:
    """Status and comment for a request that we do not perform; None if we do (PS3.7 9.1)."""
    verification = abstract_syntax == VERIFICATION
    performed = CommandField.C_ECHO_RQ if verification else CommandField.C_STORE_RQ
    if command.field != performed:
        return dimse.UNRECOGNISED_OPERATION, "not an operation of this SOP class"
    if command.sop_class_uid != abstract_syntax:
        return dimse.SOP_CLASS_NOT_SUPPORTED, "not the SOP class of the presentation context"
    if not verification and not command.sop_instance_uid:
        return dimse.INVALID_SOP_INSTANCE, "the Affected SOP Instance UID is not valid"
    if not verification and not command.has_data_set:
        return dimse.CANNOT_UNDERSTAND, "a C-STORE request without a data set"
    return None
