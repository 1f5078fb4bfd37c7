"""The requestor side of PS3.8 for Storage and Verification: one operation at a time.

Data sets go from the file to the socket as they are: read in large pieces, cut into PDUs of the
length the peer takes, and handed over in one system call per piece. Memory is flat whatever the
size of the file. Every wait has an end.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from dicomnode.errors import DicomNodeError
from dicomnode.upper_layer import pdu
from dicomnode.upper_layer.dimse import (
    CommandField,
    InvalidCommand,
    echo_request,
    read_response,
    store_request,
)
from dicomnode.upper_layer.pdu import (
    AbortReason,
    AnsweredContext,
    ContextResult,
    InvalidPdu,
    PduType,
    ProposedContext,
    Rejection,
)
from dicomnode.upper_layer.service import Identity
from dicomnode.upper_layer.stream import Closed, Expired, Stream, room

PIECE = 2 << 20
"""Bytes of a file that are read at once."""
_PART_SHOULD_BE = 1 << 20
"""PDU length where the peer sets no limit."""
_VECTORS = 512
"""Buffers per system call; Linux takes 1024 (IOV_MAX)."""
_OWN_PDU_BYTES = 16_384
"""Longest PDU we take: responses are short."""
_ANSWER_BYTES = 1 << 18
"""Longest A-ASSOCIATE-AC and response that is believed."""


class Rejected(DicomNodeError):
    """The peer answered with A-ASSOCIATE-RJ."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.words)
        self.rejection = rejection


class NotConnected(DicomNodeError):
    """There is no connection, or no answer to the A-ASSOCIATE-RQ."""


class Lost(DicomNodeError):
    """The association ended, or the peer broke PS3.8, in the middle of things."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long we wait, seconds."""

    connect: float = 15.0
    """For the connection and its TLS handshake."""
    association: float = 30.0
    """For the answer to A-ASSOCIATE-RQ and to A-RELEASE-RQ."""
    response: float = 120.0
    """For the response to an operation, and for the peer to take a piece of a data set."""


@dataclass(frozen=True, slots=True)
class Titles:
    """Who calls whom (PS3.8 9.3.2)."""

    calling: str
    called: str


class Call:
    """One association that we asked for; use it on one thread."""

    def __init__(
        self,
        address: tuple[str, int],
        titles: Titles,
        contexts: Sequence[tuple[str, str]],
        identity: Identity,
        *,
        tls: tuple[ssl.SSLContext, str] | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Connect and negotiate.

        Args:
            contexts: (abstract syntax, transfer syntax), each a presentation context of its own, at
                most 128.
            tls: the context, and the name the peer's certificate is for.

        Raises:
            Rejected, NotConnected.
        """
        self._patience = patience or Patience()
        self._message = 0
        self._open = False
        self._socket = _connect(address, tls, self._patience.connect)
        self._plain = tls is None
        self._stream = Stream(self._socket, _OWN_PDU_BYTES)
        try:
            self._negotiate(titles, contexts, identity)
        except (Closed, Expired) as error:
            self._close()
            words = "no answer" if isinstance(error, Expired) else "the peer closed the connection"
            raise NotConnected(f"{words} to the association request") from error
        except InvalidPdu as error:
            self.abort()
            raise NotConnected(f"the answer to the association request: {error}") from error
        except (Rejected, NotConnected):
            self._close()
            raise

    def context(self, abstract_syntax: str, transfer_syntax: str) -> int | None:
        """The ID of the accepted presentation context; None: it was not accepted."""
        return self.accepted.get((abstract_syntax, transfer_syntax))

    def echo(self, abstract_syntax: str, transfer_syntax: str) -> int:
        """C-ECHO; the response status.

        Raises:
            Lost: there was no right response.
        """
        context = self.accepted[abstract_syntax, transfer_syntax]
        self._message += 1
        self._send([self._command(context, echo_request(abstract_syntax, self._message))])
        return self._response(context, CommandField.C_ECHO_RQ)[0]

    def store(
        self, context: int, sop_class: str, sop_instance: str, data_set: IO[bytes]
    ) -> tuple[int, str]:
        """C-STORE of what is left to read of `data_set`; response status and ErrorComment.

        Raises:
            Lost: there was no right response.
        """
        self._message = self._message % 0xFFFF + 1
        command = store_request(sop_class, sop_instance, self._message)
        first = [self._command(context, command)]
        for parts in self._parts(context, data_set):
            self._send([*first, *parts])
            first = []
        return self._response(context, CommandField.C_STORE_RQ)

    def release(self) -> None:
        """A-RELEASE, and the end of the connection whatever the peer answers."""
        if self._open:
            self._open = False
            with contextlib.suppress(Closed, Expired, Lost, InvalidPdu):
                self._stream.expire_in(self._patience.association)
                self._send([pdu.release_request()])
                while self._header()[0] is not PduType.RELEASE_RP:
                    raise Lost("no release")
        self._close()

    def abort(self, source: int = 0, reason: int = 0) -> None:
        """A-ABORT (PS3.8 9.3.8) and the end of the connection."""
        if self._open:
            self._open = False
            self._stream.send(pdu.abort(source, reason), 1.0)
        self._close()

    # association

    def _negotiate(
        self, titles: Titles, contexts: Sequence[tuple[str, str]], identity: Identity
    ) -> None:
        proposed = [
            ProposedContext(2 * number + 1, abstract, (transfer,))
            for number, (abstract, transfer) in enumerate(contexts)
        ]
        self._stream.expire_in(self._patience.association)
        request = pdu.associate_request(
            titles.called,
            titles.calling,
            proposed,
            _OWN_PDU_BYTES,
            identity.implementation_class_uid,
            identity.implementation_version_name,
        )
        self._stream.send(request, self._patience.association)
        kind, length = self._header()
        if kind is PduType.ABORT:
            raise NotConnected("the peer aborted the association request")
        if length > _ANSWER_BYTES:
            raise InvalidPdu("it is too long")
        body = self._stream.collect(length)
        if kind is PduType.ASSOCIATE_RJ:
            raise Rejected(pdu.read_associate_reject(body))
        if kind is not PduType.ASSOCIATE_AC:
            raise InvalidPdu(f"PDU type {kind}", AbortReason.UNEXPECTED_PDU)
        answers, longest = pdu.read_associate_accept(body)
        self._open = True
        self._longest = min(longest or _PART_SHOULD_BE, _PART_SHOULD_BE)
        part = max(2, self._longest - pdu.PDV_HEADER.size) & ~1
        self._pieces = room(2 * max(part, PIECE // part * part))  # pages come as they are used
        self.accepted = _agreed(proposed, answers)

    def _header(self) -> tuple[PduType, int]:
        kind, length = pdu.HEADER.unpack(self._stream.exactly(pdu.HEADER.size))
        try:
            return PduType(kind), length
        except ValueError:
            raise InvalidPdu("unrecognised PDU", AbortReason.UNRECOGNISED_PDU) from None

    # messages

    def _command(self, context: int, command: bytes) -> bytes:
        return pdu.p_data_command(context, command, self._longest)

    def _parts(self, context: int, data_set: IO[bytes]) -> Iterator[list[bytes | memoryview]]:
        """The data set as P-DATA-TF PDUs, a piece of the file at a time (PS3.8 Annex E)."""
        most = max(2, self._longest - pdu.PDV_HEADER.size) & ~1
        size = len(self._pieces) // 2
        now, spare = self._pieces[:size], self._pieces[size:]
        held = _fill(now, data_set)
        while True:
            ahead = _fill(spare, data_set) if held == size else 0
            parts: list[bytes | memoryview] = []
            for at in range(0, max(held, 1), most):
                part = now[at : min(at + most, held)]
                last = not ahead and at + most >= held
                item = pdu.PDV_HEADER.pack(len(part) + 2, context, 2 if last else 0)
                parts += [pdu.HEADER.pack(PduType.P_DATA_TF, len(item) + len(part)) + item, part]
            yield parts
            if not ahead:
                return
            now, spare, held = spare, now, ahead

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        deadline = time.monotonic() + self._patience.response
        whole = parts if self._plain else [b"".join(parts)]  # of TLS as few records as can be
        try:
            for at in range(0, len(whole), _VECTORS):
                self._stream.send_all(whole[at : at + _VECTORS], deadline)
        except (OSError, Expired) as error:
            self._close()
            raise Lost(_words(error)) from error

    def _response(self, context: int, request: CommandField) -> tuple[int, str]:
        """Status and comment of the response to the last request (PS3.7 9.3)."""
        if self._plain:
            with contextlib.suppress(OSError):  # peers with Nagle wait for our acknowledgement
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._stream.expire_in(self._patience.response)
        try:
            response = read_response(self._message_of(context), request)
            if response.message_id != self._message:
                raise InvalidPdu("a response to a message that was not sent")
        except (InvalidPdu, InvalidCommand) as error:
            reason = getattr(error, "reason", AbortReason.NOT_SPECIFIED)
            self.abort(2, reason)
            raise Lost(f"the peer broke the protocol: {error}") from error
        except (Closed, Expired) as error:
            closed = isinstance(error, Closed)
            self.abort()
            words = "the peer closed the connection" if closed else "no response in time"
            raise Lost(words) from error
        return response.status, response.comment

    def _message_of(self, context: int) -> bytes:
        """The next command set, which must be on `context` and without a data set."""
        command = bytearray()
        while True:
            kind, length = self._header()
            if kind is PduType.ABORT:
                self._open = False
                self._close()
                raise Lost("the peer aborted the association")
            if kind is not PduType.P_DATA_TF:
                raise InvalidPdu(f"PDU type {kind.name}", AbortReason.UNEXPECTED_PDU)
            if length > _OWN_PDU_BYTES:
                raise InvalidPdu("a PDU that is longer than we take")
            body = self._stream.collect(length)
            for number, control, part in _values(body):
                if number != context or not control & 1:
                    raise InvalidPdu("not the response to what was sent")
                command += part
                if len(command) > _ANSWER_BYTES:
                    raise InvalidPdu("a command set without an end")
                if control & 2:
                    return bytes(command)

    def _close(self) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            self._socket.close()


def _connect(
    address: tuple[str, int], tls: tuple[ssl.SSLContext, str] | None, seconds: float
) -> socket.socket:
    try:
        connection = socket.create_connection(address, seconds)
    except OSError as error:
        raise NotConnected(_words(error)) from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            context, name = tls
            return context.wrap_socket(connection, server_hostname=name)
    except OSError as error:
        connection.close()
        raise NotConnected(f"TLS: {_words(error)}") from error
    return connection


def _agreed(
    proposed: Sequence[ProposedContext], answers: Sequence[AnsweredContext]
) -> dict[tuple[str, str], int]:
    """What was accepted as proposed; an answer with another transfer syntax is not."""
    by_id = {answer.context_id: answer for answer in answers}
    return {
        (context.abstract_syntax, context.transfer_syntaxes[0]): context.context_id
        for context in proposed
        if (answer := by_id.get(context.context_id)) is not None
        and answer.result is ContextResult.ACCEPTANCE
        and answer.transfer_syntax == context.transfer_syntaxes[0]
    }


def _values(body: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Presentation context ID, message control header and value of each PDV."""
    at = 0
    while at < len(body):
        if len(body) - at < pdu.PDV_HEADER.size:
            raise InvalidPdu("a PDV header is cut off")
        length, context, control = pdu.PDV_HEADER.unpack_from(body, at)
        end = at + 4 + length
        if length < 2 or end > len(body):
            raise InvalidPdu("a PDV is longer than its PDU")
        yield context, control, body[at + pdu.PDV_HEADER.size : end]
        at = end


def _fill(buffer: memoryview, source: IO[bytes]) -> int:
    """Read until the buffer is full or the source has ended; how much there is."""
    held = 0
    while held < len(buffer):
        count = source.readinto(buffer[held:])  # type: ignore[attr-defined]
        if not count:
            break
        held += count
    return held


def _words(error: OSError | Expired) -> str:
    if isinstance(error, (TimeoutError, Expired)):
        return "no answer in time"
    return error.strerror or type(error).__name__
