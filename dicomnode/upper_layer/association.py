"""The acceptor side of PS3.8: Table 9-10 as it stands there, and its actions.

An association runs on a thread of its own and blocks. Nothing that a peer declares is believed
before it has been compared with a limit.
"""

import contextlib
import functools
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Literal

from dicomnode.upper_layer import pdu
from dicomnode.upper_layer.dimse import InvalidCommand
from dicomnode.upper_layer.negotiation import answered, is_storage
from dicomnode.upper_layer.pdu import AbortReason, ContextResult, InvalidPdu, PduType
from dicomnode.upper_layer.service import (
    SMALL_BUFFER,
    Handler,
    Identity,
    Limits,
    Others,
    Requestor,
    Service,
)
from dicomnode.upper_layer.stream import Closed, Expired, Stream

log = logging.getLogger(__name__)


class State(IntEnum):
    """States of an acceptor (PS3.8 Tables 9-1 to 9-5)."""

    IDLE = 1
    AWAITING_REQUEST = 2
    AWAITING_LOCAL_RESPONSE = 3
    ESTABLISHED = 6
    AWAITING_LOCAL_RELEASE = 8
    AWAITING_CLOSE = 13


class Event(IntEnum):
    """Events of PS3.8 Table 9-10 that an acceptor can meet."""

    ASSOCIATE_AC_PDU = 3
    ASSOCIATE_RJ_PDU = 4
    TRANSPORT_CONNECTED = 5
    ASSOCIATE_RQ_PDU = 6
    ACCEPT = 7
    REJECT = 8
    P_DATA_REQUEST = 9
    P_DATA_PDU = 10
    RELEASE_RQ_PDU = 12
    RELEASE_RP_PDU = 13
    RELEASE_RESPONSE = 14
    ABORT_REQUEST = 15
    ABORT_PDU = 16
    TRANSPORT_CLOSED = 17
    ARTIM_EXPIRED = 18
    INVALID_PDU = 19


_TABLE_9_10 = """
        Sta1   Sta2   Sta3   Sta6   Sta8   Sta13
Evt3    -      AA-1   AA-8   AA-8   AA-8   AA-6
Evt4    -      AA-1   AA-8   AA-8   AA-8   AA-6
Evt5    AE-5   -      -      -      -      -
Evt6    -      AE-6   AA-8   AA-8   AA-8   AA-7
Evt7    -      -      AE-7   -      -      -
Evt8    -      -      AE-8   -      -      -
Evt9    -      -      -      DT-1   AR-7   -
Evt10   -      AA-1   AA-8   DT-2   AA-8   AA-6
Evt12   -      AA-1   AA-8   AR-2   AA-8   AA-6
Evt13   -      AA-1   AA-8   AA-8   AA-8   AA-6
Evt14   -      -      -      -      AR-4   -
Evt15   -      -      AA-1   AA-1   AA-1   -
Evt16   -      AA-2   AA-3   AA-3   AA-3   AA-2
Evt17   -      AA-5   AA-4   AA-4   AA-4   AR-5
Evt18   -      AA-2   -      -      -      AA-2
Evt19   -      AA-1   AA-8   AA-8   AA-8   AA-7
"""


def _transitions(table: str) -> dict[tuple[State, Event], str]:
    head, *rows = (line.split() for line in table.strip().splitlines())
    states = [State(int(name.removeprefix("Sta"))) for name in head]
    return {
        (state, Event(int(row[0].removeprefix("Evt")))): action
        for row in rows
        for state, action in zip(states, row[1:], strict=True)
        if action != "-"
    }


TRANSITIONS = _transitions(_TABLE_9_10)
"""Action by state and event, as PS3.8 Table 9-10 has it."""

_EVENT_OF_PDU = {
    PduType.ASSOCIATE_RQ: Event.ASSOCIATE_RQ_PDU,
    PduType.ASSOCIATE_AC: Event.ASSOCIATE_AC_PDU,
    PduType.ASSOCIATE_RJ: Event.ASSOCIATE_RJ_PDU,
    PduType.P_DATA_TF: Event.P_DATA_PDU,
    PduType.RELEASE_RQ: Event.RELEASE_RQ_PDU,
    PduType.RELEASE_RP: Event.RELEASE_RP_PDU,
    PduType.ABORT: Event.ABORT_PDU,
}


class Association:
    """One association that a peer asks for; `run` serves it to its end."""

    def __init__(
        self,
        connection: socket.socket,
        host: str,
        handler: Handler,
        *,
        identity: Identity,
        limits: Limits,
        slots: threading.Semaphore,
        others: Others | None,
    ) -> None:
        """`slots`: one is held while accepted. `others`: serve what is not Storage."""
        self.state = State.IDLE
        self._connection, self._host, self._handler = connection, host, handler
        self._identity, self._limits = identity, limits
        self._slots, self._others = slots, others
        self._services = {} if others is None else others.services
        self._stream = Stream(connection, SMALL_BUFFER)
        self._requestor: Requestor | None = None  # while accepted
        self._service: Service | None = None
        self._peer_max_length = 0
        self._abort_wanted = False
        self._untouched: bytes | None = None
        self._pdu_length, self._reason = 0, AbortReason.NOT_SPECIFIED
        self._outgoing = b""  # what the next action sends
        self._silent_since = math.inf  # a message is under way

    @property
    def established(self) -> bool:
        return self._requestor is not None

    def silent(self, seconds: float) -> bool:
        """Has nothing come for so long, between messages or after the end?"""
        return time.monotonic() - self._silent_since >= seconds

    def run(self) -> bytes | None:
        """Serve until the end, then close; or return what was read of one that is not ours."""
        try:
            self._fire(Event.TRANSPORT_CONNECTED)
            while self.state is not State.IDLE and self._untouched is None:
                self._step()
        except Exception:  # keeps the end of the thread orderly; the peer will try again
            log.exception("an association from %s failed", self._host)
            self._send(pdu.abort(0, 0))
        finally:
            self._finish("aborted")
            if self._untouched is None:
                self._connection.close()
        return self._untouched

    def abort(self) -> None:
        """Ask the association's thread to abort; returns at once."""
        self._abort_wanted, self._silent_since = True, math.inf
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # below TLS, which two threads must not use at once
            socket.socket.shutdown(self._connection, socket.SHUT_RD)

    # state machine

    def _step(self) -> None:
        established = self.state is State.ESTABLISHED
        try:
            self._fire(self._next_event())
        except InvalidPdu as error:
            self._reason = error.reason
            self._note(str(error))
            self._fire(Event.INVALID_PDU)
        except InvalidCommand as error:
            self._note(str(error))
            self._fire(Event.ABORT_REQUEST)
        except Expired:
            self._fire(Event.ABORT_REQUEST if established else Event.ARTIM_EXPIRED)
        except Closed:
            wanted = self._abort_wanted and established
            self._fire(Event.ABORT_REQUEST if wanted else Event.TRANSPORT_CLOSED)

    def _fire(self, event: Event) -> None:
        action = TRANSITIONS[self.state, event]
        self.state = _ACTIONS[action](self)

    def _next_event(self) -> Event:
        """Read the header of the next PDU; what follows it is left to the action."""
        if self.state is State.AWAITING_CLOSE:
            # AA-6 would ignore PDUs; after an invalid one they are out of step, so bytes are
            self._stream.drain()
        if self.state is State.ESTABLISHED:
            self._stream.expire_in(self._limits.idle_seconds)
            if self._abort_wanted:
                return Event.ABORT_REQUEST
            if self._service is not None and not self._service.busy:
                self._silent_since = time.monotonic()
                self._service.rest()
        kind, self._pdu_length = pdu.HEADER.unpack(self._stream.exactly(pdu.HEADER.size))
        self._silent_since = math.inf
        event = _EVENT_OF_PDU.get(kind)
        if event is None:
            raise InvalidPdu("unrecognised PDU", AbortReason.UNRECOGNISED_PDU)
        self._reason = AbortReason.UNEXPECTED_PDU
        return event

    def _ae_5(self) -> State:
        """Start ARTIM."""
        self._stream.expire_in(self._limits.artim_seconds)
        return State.AWAITING_REQUEST

    def _ae_6(self) -> State:
        """Judge the A-ASSOCIATE-RQ; the answer is the next event."""
        if self._pdu_length > self._limits.max_request_bytes:
            raise InvalidPdu("the A-ASSOCIATE-RQ is too long")
        body = self._stream.collect(self._pdu_length)
        request = pdu.read_associate_request(body)
        self._peer_max_length = request.user.max_length
        if 0 < self._peer_max_length < pdu.PDV_HEADER.size + 2:  # values have even lengths
            raise InvalidPdu("the maximum length leaves no room for data")
        if self._is_elsewhere({context.abstract_syntax for context in request.contexts}):
            header = pdu.HEADER.pack(PduType.ASSOCIATE_RQ, self._pdu_length)
            self._untouched = header + body + self._stream.rest()
            return State.AWAITING_REQUEST
        requestor = Requestor(request.calling_ae, request.called_ae, self._host)
        why = self._judge(request, requestor)
        self.state = State.AWAITING_LOCAL_RESPONSE
        if why is None:
            self._requestor = requestor
            self._outgoing = self._accept(request, requestor)
            self._fire(Event.ACCEPT)
        else:
            self._note(f"rejected: {why.words}")
            self._outgoing = pdu.associate_reject(why)
            self._fire(Event.REJECT)
        return self.state

    def _is_elsewhere(self, proposed: set[str]) -> bool:
        """Is it pynetdicom's? Who may store, too, stays here, where data sets go to disk."""
        return not any(map(is_storage, proposed)) and not self._services.keys().isdisjoint(proposed)

    def _judge(self, request: pdu.AssociateRequest, requestor: Requestor) -> pdu.Rejection | None:
        if not request.protocol_version & 1:
            return pdu.PROTOCOL_VERSION
        if request.application_context != pdu.APPLICATION_CONTEXT:
            return pdu.APPLICATION_CONTEXT_NAME
        if not self._slots.acquire(blocking=False):
            return pdu.LOCAL_LIMIT
        why = self._handler.request(requestor)
        if why is not None:
            self._slots.release()
        return why

    def _accept(self, request: pdu.AssociateRequest, requestor: Requestor) -> bytes:
        """Negotiate; the A-ASSOCIATE-AC."""
        allows = functools.partial(self._handler.allows, requestor)
        user, services = request.user, self._services
        answers = [answered(context, user, allows, services) for context in request.contexts]
        abstract = {context.context_id: context.abstract_syntax for context in request.contexts}
        contexts = {
            answer.context_id: (abstract[answer.context_id], answer.transfer_syntax)
            for answer in answers
            if answer.result is ContextResult.ACCEPTANCE
        }
        others, longest = self._others, user.max_length
        guest = None if others is None else others.guest(requestor, contexts, longest)
        who = (self._handler, requestor, contexts, self._identity)
        self._service = Service(*who, self._limits, self._stream, longest, guest)
        return pdu.associate_accept(
            request,
            answers,
            self._limits.max_pdu_bytes,
            self._identity.implementation_class_uid,
            self._identity.implementation_version_name,
            [uid for uid, may_report in services.items() if may_report],
        )

    def _ae_7(self) -> State:
        """Send the A-ASSOCIATE-AC."""
        self._send(self._outgoing)
        return State.ESTABLISHED

    def _ae_8(self) -> State:
        """Send the A-ASSOCIATE-RJ and start ARTIM."""
        self._send(self._outgoing)
        return self._await_close()

    def _dt_1(self) -> State:
        """Send P-DATA-TF."""
        self._send(self._outgoing)
        return State.ESTABLISHED

    def _dt_2(self) -> State:
        """Take the presentation data values of a P-DATA-TF as they come (PS3.8 9.3.5)."""
        remaining = self._pdu_length
        if not pdu.PDV_HEADER.size <= remaining <= self._limits.max_pdu_bytes:
            raise InvalidPdu("the P-DATA-TF is empty, or longer than we announced")
        while remaining and self._service is not None:
            if remaining < pdu.PDV_HEADER.size:
                raise InvalidPdu("a presentation data value is cut off")
            header = self._stream.exactly(pdu.PDV_HEADER.size)
            length, context_id, control = pdu.PDV_HEADER.unpack(header)
            remaining -= 4 + length
            if length < 2 or remaining < 0:
                raise InvalidPdu("a presentation data value does not fit its PDU")
            answer = self._service.fragment(context_id, control, length - 2)
            if answer is not None:
                self._outgoing = answer
                self._fire(Event.P_DATA_REQUEST)
                self._service.discard()  # while the peer makes the next one ready
        if self._service is not None:
            self._service.take_whole_pdus()
        return self.state

    def _ar_2(self) -> State:
        """A-RELEASE indication; we always agree."""
        if self._pdu_length != 4:
            raise InvalidPdu("the A-RELEASE-RQ is not 4 bytes long")
        self._stream.exactly(4)
        self.state = State.AWAITING_LOCAL_RELEASE
        self._fire(Event.RELEASE_RESPONSE)
        return self.state

    def _ar_4(self) -> State:
        """Send the A-RELEASE-RP and start ARTIM."""
        cut_off = self._service is not None and self._service.busy
        self._finish("aborted" if cut_off else "released")
        self._send(pdu.release_response())
        return self._await_close()

    def _aa_1(self) -> State:
        """Send an A-ABORT as service user and start ARTIM."""
        self._finish("aborted")
        self._send(pdu.abort(0, 0))
        return self._await_close()

    def _aa_8(self) -> State:
        """Send an A-ABORT as service provider, tell the node, start ARTIM."""
        self._finish("aborted")
        self._send(pdu.abort(2, self._reason))
        return self._await_close()

    def _await_close(self) -> State:
        self._stream.expire_in(self._limits.artim_seconds)
        self._silent_since = time.monotonic()
        return State.AWAITING_CLOSE

    def _end(self) -> State:
        """Tell the node and close: AA-2 to AA-5 and AR-5, as far as each has something to do."""
        self._finish("aborted")
        return State.IDLE

    def _finish(self, how: Literal["released", "aborted"]) -> None:
        """Free what the association holds; only the first call does anything."""
        requestor, self._requestor = self._requestor, None
        if requestor is None:
            return
        try:
            if self._service is not None:
                self._service.end()
        finally:
            self._slots.release()
            self._handler.ended(requestor, how)

    def _send(self, data: bytes) -> None:
        self._stream.send(data, self._limits.write_seconds)

    def _note(self, words: str) -> None:
        log.warning("association from %s: %s", self._host, words)


_ACTIONS: dict[str, Callable[[Association], State]] = {
    "AE-5": Association._ae_5,
    "AE-6": Association._ae_6,
    "AE-7": Association._ae_7,
    "AE-8": Association._ae_8,
    "DT-1": Association._dt_1,
    "DT-2": Association._dt_2,
    "AR-2": Association._ar_2,
    "AR-4": Association._ar_4,
    "AR-5": Association._end,
    "AA-1": Association._aa_1,
    "AA-2": Association._end,
    "AA-3": Association._end,
    "AA-4": Association._end,
    "AA-5": Association._end,
    "AA-8": Association._aa_8,
}
"""AR-7 (data while releasing), AA-6 and AA-7 (PDUs while closing) cannot come up: we answer a
release at once, and read no PDUs after the end."""
