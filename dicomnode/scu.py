"""Storage SCU and Verification SCU: the instances of one series over one association.

Each file goes out in its own transfer syntax where the peer accepts it, else in Explicit, else in
Implicit VR Little Endian; never under a name that is not what the bytes are (PS3.5 10).
"""

import contextlib
import io
import logging
import socket
import struct
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydicom import dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association

from dicomnode import __version__
from dicomnode.config import NodeConfig, Peer
from dicomnode.credentials import ClientTls, client_tls
from dicomnode.errors import ConfigError, DeliveryError, DeliveryRefused, NoAssociation
from dicomnode.imaging.marks import IMPLEMENTATION_CLASS_UID
from dicomnode.lifecycle import ACCEPTED
from dicomnode.tls import client_context, trouble_with
from dicomnode.upper_layer import Call, Identity, Lost, NotConnected, Patience, Rejected, Titles
from dicomnode.upper_layer.negotiation import VERIFICATION

log = logging.getLogger(__name__)

_UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
_NOT_SUPPORTED = 0x0122  # SOP class not supported (PS3.7 C.5.5)
_CONNECT_SECONDS, _RESPONSE_SECONDS = 15, 120
_PATIENCE = Patience(_CONNECT_SECONDS, 30, _RESPONSE_SECONDS)
_MAX_CONTEXTS = 128
_START = 16_384
"""Bytes of a file that hold its file meta information."""
_META = (0x0002, 0x0003, 0x0010)
"""MediaStorageSOPClassUID, MediaStorageSOPInstanceUID, TransferSyntaxUID."""
_LONG = (b"OB", b"OW", b"UN", b"UT", b"UC", b"UR", b"SQ")
"""Value representations with a length of four bytes."""
_NO_REASON = 1


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer listens, and by which titles the two call each other."""

    host: str
    port: int
    called_ae: str
    calling_ae: str
    tls: ClientTls | None = None
    """How to call it with DICOM TLS; None: without."""


def address_of(name: str, peer: Peer, config: NodeConfig) -> Address | None:
    """Where the peer of this name listens; None: the configuration has no host and port for it.

    Raises:
        ConfigError: it is to be called with TLS, and nothing says who signed its certificate.
    """
    if peer.host is None or peer.port is None or "/" in peer.host:
        return None
    secured = client_tls(name, peer.tls, peer.host, config.node.tls) if peer.tls else None
    return Address(peer.host, peer.port, peer.ae_title, config.node.ae_title, secured)


OnStatus = Callable[[str, int], None]
"""Told of each accepted instance: its SOP Instance UID and the response status."""


class _NothingAccepted(DeliveryRefused):
    """The peer accepted the association and no presentation context."""


def send_instances(
    paths: Sequence[Path],
    address: Address,
    on_status: OnStatus,
    optional: Container[str] = frozenset(),
) -> None:
    """C-STORE every file over one association; sending again is safe because UIDs are stable.

    Args:
        optional: SOP classes that the peer need not take: a refusal is told to `on_status`, by
            its status (0x0122: no presentation context), and holds nothing up.

    Raises:
        DeliveryRefused: the peer refuses for good (rejection, no presentation context, 0xA9xx or
            0xCxxx); instances accepted before were told to `on_status`.
        DeliveryError: it may work later: no connection, a lost association, another status.
    """
    instances = [
        _instance(path, f"file {number} of {len(paths)}")
        for number, path in enumerate(paths, start=1)
    ]
    try:
        with _calling(address, _contexts(instances)) as call:
            refused: list[str] = []
            for instance in instances:
                _send(call, instance, address, on_status, optional, refused)
            if refused:
                words = f"{address.called_ae}: {refused[0]} ({len(refused)} instances)"
                raise DeliveryRefused(words)
    except _NothingAccepted:
        if not all(instance.sop_class in optional for instance in instances):
            raise
        for instance in instances:
            on_status(instance.sop_instance, _NOT_SUPPORTED)


def echo(address: Address) -> None:
    """C-ECHO.

    Raises:
        DeliveryError: no association, or no Success; the message says which.
    """
    context = (VERIFICATION, str(ImplicitVRLittleEndian))
    with _calling(address, [context]) as call:
        status = call.echo(*context)
        if status != 0:
            raise DeliveryError(f"{address.called_ae} answered C-ECHO with 0x{status:04X}")


@contextlib.contextmanager
def _calling(address: Address, contexts: Sequence[tuple[str, str]]) -> Iterator[Call]:
    """An association for the length of a block, at least one of its contexts accepted.

    Raises:
        DeliveryError: there is none, or it was lost.
    """
    call = _call(address, contexts)
    try:
        if not call.accepted:
            raise _NothingAccepted(f"{_where(address)} accepted no presentation context")
        yield call
    except Lost as error:
        raise DeliveryError(f"{address.called_ae}: the association was lost: {error}") from error
    except DeliveryRefused:
        call.release()
        raise
    except BaseException:  # raised again: whatever it is, the association is out of step
        call.abort()
        raise
    call.release()


def _call(address: Address, contexts: Sequence[tuple[str, str]]) -> Call:
    titles = Titles(address.calling_ae, address.called_ae)
    identity = Identity(IMPLEMENTATION_CLASS_UID, f"DICOMNODE_{__version__}"[:16])
    tls = tls_arguments(address)
    place = (address.host, address.port)
    try:
        return Call(place, titles, contexts, identity, tls=tls, patience=_PATIENCE)
    except Rejected as error:
        words = f"{_where(address)} rejected the association: {error}"
        permanent = error.rejection.result == 1 and error.rejection.reason != _NO_REASON
        raise (DeliveryRefused if permanent else NoAssociation)(words) from error
    except NotConnected as error:
        why = str(error)
        if address.tls is not None:  # a peer that refuses a certificate just closes
            why = trouble_with(address.tls, *place, time.time()) or why
        raise NoAssociation(f"{_where(address)}: no association: {why}") from error


def _where(address: Address) -> str:
    return f"{address.called_ae} at {address.host}:{address.port}"


class Associated:
    """An association of pynetdicom for the length of a block, for what is not Storage."""

    def __init__(
        self,
        address: Address,
        contexts: Sequence[tuple[str, str]],
        handlers: Sequence[Any] = (),
    ) -> None:
        """`handlers`: pynetdicom's, for what the peer asks on this association."""
        self._address, self._contexts, self._handlers = address, contexts, handlers

    def __enter__(self) -> Association:
        entity = AE(self._address.calling_ae)
        entity.connection_timeout = entity.acse_timeout = _CONNECT_SECONDS
        entity.dimse_timeout = entity.network_timeout = _RESPONSE_SECONDS
        for sop_class, transfer_syntax in self._contexts:
            entity.add_requested_context(sop_class, transfer_syntax)
        handlers: list[Any] = [(evt.EVT_CONN_OPEN, _no_delay), (evt.EVT_PDU_SENT, _quick_ack)]
        handlers += self._handlers
        address = self._address
        self._association = entity.associate(
            address.host,
            address.port,
            ae_title=address.called_ae,
            evt_handlers=handlers,
            tls_args=tls_arguments(address),
        )
        if not self._association.is_established:
            raise _not_established(self._association, address)
        return self._association

    def __exit__(self, kind: object, *_: object) -> None:
        if self._association.is_established and kind in (None, DeliveryRefused):
            self._association.release()
        else:
            self._association.abort()


def tls_arguments(address: Address) -> Any:
    """What pynetdicom wants for TLS, or None.

    Raises:
        DeliveryError: a certificate file cannot be used (now).
    """
    if address.tls is None:
        return None
    try:
        return client_context(address.tls, time.time()), address.tls.server_name
    except ConfigError as error:
        raise NoAssociation(f"{address.called_ae}: {error}") from error


def _not_established(association: Association, address: Address) -> DeliveryError:
    where = f"{address.called_ae} at {address.host}:{address.port}"
    answer: Any = association.acceptor.primitive
    if association.is_rejected and answer is not None:
        words = f"{where} rejected the association: {answer.reason_str}"
        permanent = answer.result == 1 and answer.diagnostic != _NO_REASON
        return DeliveryRefused(words) if permanent else NoAssociation(words)
    if association.rejected_contexts and not association.accepted_contexts:
        return _NothingAccepted(f"{where} accepted no presentation context")
    return NoAssociation(f"{where}: no association (not listening, unreachable or aborted)")


def _send(
    call: Call,
    instance: "_Instance",
    address: Address,
    on_status: OnStatus,
    optional: Container[str],
    refused: list[str],
) -> None:
    spare = instance.sop_class in optional
    syntaxes = (instance.syntax, *map(str, _UNCOMPRESSED))
    agreed = [s for s in syntaxes if call.context(instance.sop_class, s) is not None]
    if not agreed:
        if spare:
            on_status(instance.sop_instance, _NOT_SUPPORTED)
        else:
            refused.append("no presentation context accepted for this SOP class")
        return
    context = call.accepted[instance.sop_class, agreed[0]]
    with _data_set(instance, agreed[0]) as data_set:
        status, _ = call.store(context, instance.sop_class, instance.sop_instance, data_set)
    permanent = _is_permanent(status)
    if status in ACCEPTED or (spare and (permanent or status == _NOT_SUPPORTED)):
        on_status(instance.sop_instance, status)
    elif permanent:
        refused.append(f"answered 0x{status:04X}")
    else:
        raise DeliveryError(f"{address.called_ae} answered 0x{status:04X}")


def _is_permanent(status: int | None) -> bool:
    """Whether the same instance would be answered so again (PS3.4 B.2.3)."""
    return status is not None and (0xA900 <= status <= 0xA9FF or 0xC000 <= status <= 0xCFFF)


@dataclass(frozen=True, slots=True)
class _Instance:
    """A Part 10 file, and what its file meta information says (PS3.10 7.1)."""

    path: Path
    sop_class: str
    sop_instance: str
    syntax: str
    offset: int
    """Where its data set starts."""


def _instance(path: Path, which: str) -> _Instance:
    """`which`: how to call it in words; a name of a file may be a patient's."""
    try:
        with path.open("rb", buffering=0) as file:
            start = file.read(_START)
        if start[128:132] != b"DICM":
            raise DeliveryRefused(f"{which} is not a DICOM Part 10 file")
        meta, offset = _file_meta(start)
        sop_class, sop_instance, syntax = (
            meta[element].rstrip(b"\0 ").decode("ascii") for element in _META
        )
        return _Instance(path, sop_class, sop_instance, syntax, offset)
    except OSError as error:
        raise DeliveryError(f"{which} cannot be read now: {error.strerror}") from error
    except (KeyError, ValueError, struct.error) as error:
        raise DeliveryRefused(f"{which} has no file meta information") from error


def _file_meta(start: bytes) -> tuple[dict[int, bytes], int]:
    """Values of group 0002 by element, and where the data set starts (PS3.10 7.1, PS3.5 7.1.2).

    Raises:
        KeyError, ValueError, struct.error: it is not explicit VR, or longer than `start`.
    """
    values, at = {}, 132
    while start[at : at + 2] == b"\2\0":
        (element,) = struct.unpack_from("<H", start, at + 2)
        if start[at + 4 : at + 6] in _LONG:
            (length,) = struct.unpack_from("<L", start, at + 8)
            at += 12
        else:
            (length,) = struct.unpack_from("<H", start, at + 6)
            at += 8
        values[element] = start[at : at + length]
        at += length
    if at >= len(start):
        raise ValueError("the file meta information has no end")
    return values, at


def _contexts(instances: Sequence[_Instance]) -> list[tuple[str, str]]:
    """A presentation context per (SOP class, transfer syntax), so that the choice is ours."""
    own = {(instance.sop_class, instance.syntax) for instance in instances}
    fallback = {(sop_class, str(syntax)) for sop_class, _ in own for syntax in _UNCOMPRESSED}
    return [*sorted(own), *sorted(fallback - own)][:_MAX_CONTEXTS]


@contextlib.contextmanager
def _data_set(instance: _Instance, syntax: str) -> Iterator[IO[bytes]]:
    """The data set in the agreed transfer syntax: as stored, or converted without loss."""
    if syntax == instance.syntax:
        with instance.path.open("rb", buffering=0) as file:
            file.seek(instance.offset)
            yield file
        return
    dataset = dcmread(instance.path)
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        dataset.decompress(generate_instance_uid=False)
    del dataset.file_meta
    dataset.preamble = None
    whole = io.BytesIO()
    dataset.save_as(whole, implicit_vr=UID(syntax).is_implicit_VR, little_endian=True)
    whole.seek(0)
    yield whole


def _no_delay(event: evt.Event) -> None:
    """Small PDUs go out at once (many peers run with Nagle, and wait for our ACK)."""
    _set_tcp(event, socket.TCP_NODELAY)


def _quick_ack(event: evt.Event) -> None:
    """Ask for an immediate ACK of the response; Linux forgets this option, so after each PDU."""
    _set_tcp(event, socket.TCP_QUICKACK)


def _set_tcp(event: evt.Event, option: int) -> None:
    transport: Any = event.assoc.dul.socket
    if transport is not None and transport.socket is not None:
        try:
            transport.socket.setsockopt(socket.IPPROTO_TCP, option, 1)
        except OSError:  # the peer has closed meanwhile; the association finds out by itself
            return


def _shown(status: int | None) -> str:
    return "no response" if status is None else f"0x{status:04X}"
