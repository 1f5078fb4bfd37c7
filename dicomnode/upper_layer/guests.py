"""Services of pynetdicom on an association of ours: one message in, its answer out.

A peer may propose storage together with storage commitment or MPPS. Such an association is ours, so
that its data sets stream to disk. What those services are sent is small and comes here, to an
association of pynetdicom that has no thread and no connection of its own.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pydicom.errors import BytesLengthException
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation

from dicomnode.upper_layer.dimse import InvalidCommand

_UNREADABLE = (
    AttributeError,
    BytesLengthException,
    EOFError,
    KeyError,
    NotImplementedError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
)
"""What the library raises over a command set that has wrong values, or none."""
_COMMAND, _DATA_SET = b"\3", b"\2"
"""Message control headers of what comes in one piece (PS3.8 E.2)."""


class Guest:
    """What pynetdicom is of one association of ours; used by its thread only."""

    def __init__(
        self,
        ae: AE,
        handlers: Mapping[Any, Any],
        calling_ae: str,
        host: str,
        contexts: Mapping[int, tuple[str, str]],
        max_length: int,
    ) -> None:
        """`handlers`: by event, each with its arguments. `contexts`: abstract and transfer syntax
        of those that were accepted for it, by ID. `max_length`: of a PDU; 0: any."""
        association: Any = Association(ae, "acceptor")
        association.requestor.ae_title = calling_ae
        association.requestor.address_info = AddressInformation(host, 0)
        association.requestor.maximum_length = max_length
        for event, bound in handlers.items():
            if event.is_intervention and bound and bound[0] is not None:
                association.bind(event, *bound)
        for number, names in contexts.items():
            association._accepted_cx[number] = _context(number, *names)
        association.dul.send_pdu = self._keep
        association._abort_blocking = association._abort_nonblocking = _abort
        association.abort = _abort
        self._association = association
        self._sent: list[bytes] = []

    def answer(self, context_id: int, command: bytes, data_set: bytes) -> list[bytes]:
        """Serve one request: the fragments of the answer, each behind its control header.

        Raises:
            InvalidCommand: nobody can answer it: it breaks PS3.7, or asks for what is not served.
        """
        whole, message = P_DATA(), DIMSEMessage()
        fragments = (_COMMAND + command, _DATA_SET + data_set)
        whole.presentation_data_value_list.extend((context_id, part) for part in fragments)
        try:
            message.decode_msg(whole)
            request: Any = message.message_to_primitive()
        except _UNREADABLE as error:
            raise InvalidCommand("a command set that cannot be read") from error
        if not getattr(request, "is_valid_request", False):  # a C-CANCEL has no such thing
            raise InvalidCommand("a request that lacks what each of its kind has")
        association = self._association
        association.is_established = True  # only now: nobody may send on it later
        try:
            association._serve_request(request, context_id)
        finally:
            association.is_established = False
        sent, self._sent = self._sent, []
        if not sent:
            raise InvalidCommand("a request that is not answered")
        return sent

    def _keep(self, sent: Any) -> None:
        if isinstance(sent, P_DATA):
            self._sent += [value for _, value in sent.presentation_data_value_list]


def _context(number: int, abstract_syntax: str, transfer_syntax: str) -> PresentationContext:
    context = PresentationContext()
    context.context_id, context.result = number, 0
    context.abstract_syntax, context.transfer_syntax = abstract_syntax, [transfer_syntax]
    return context


def _abort(*_: object, **__: object) -> NoReturn:
    raise InvalidCommand("not an operation of this service")


def refuse_incomplete(association: Any, note: Callable[[str], None]) -> None:
    """Let pynetdicom abort over a request that lacks an element: it would not answer."""
    serve = association._serve_request

    def checked(message: Any, context_id: int) -> None:
        asks = getattr(message, "is_valid_request", True)  # a C-CANCEL has no such thing
        if asks or message.is_valid_response:
            serve(message, context_id)
        else:
            note("a request that lacks what each of its kind has")
            association.abort()

    association._serve_request = checked
