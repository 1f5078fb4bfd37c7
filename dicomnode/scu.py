"""Storage SCU and Verification SCU: the instances of one series over one association.

Each file goes out in its own transfer syntax where the peer accepts it, else in Explicit, else in
Implicit VR Little Endian; never under a name that is not what the bytes are (PS3.5 10).
"""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicomnode.config import NodeConfig, Peer
from dicomnode.credentials import ClientTls, client_tls
from dicomnode.errors import ConfigError, DeliveryError, DeliveryRefused
from dicomnode.tls import client_context

log = logging.getLogger(__name__)

_UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
_ALREADY_THERE = 0x0111
_WARNINGS = (0xB000, 0xB006, 0xB007)
"""Stored, with a remark: coercion, elements discarded, does not match SOP class (PS3.4 B.2.3)."""
_CONNECT_SECONDS, _RESPONSE_SECONDS = 15, 120
_MAX_CONTEXTS = 128
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


def send_instances(paths: Sequence[Path], address: Address, on_status: OnStatus) -> None:
    """C-STORE every file over one association; sending again is safe because UIDs are stable.

    Raises:
        DeliveryRefused: the peer refuses for good (rejection, no presentation context, 0xA9xx or
            0xCxxx); instances accepted before were told to `on_status`.
        DeliveryError: it may work later: no connection, a lost association, another status.
    """
    with Associated(address, _contexts(paths)) as association:
        refused: list[str] = []
        for path in paths:
            _send(association, path, address, on_status, refused)
        if refused:
            raise DeliveryRefused(f"{address.called_ae}: {refused[0]} ({len(refused)} instances)")


def echo(address: Address) -> None:
    """C-ECHO.

    Raises:
        DeliveryError: no association, or no Success; the message says which.
    """
    with Associated(address, [(str(Verification), ImplicitVRLittleEndian)]) as association:
        status = association.send_c_echo().get("Status")
        if status != 0:
            raise DeliveryError(f"{address.called_ae} answered C-ECHO with {_shown(status)}")


class Associated:
    """An association for the length of a block."""

    def __init__(self, address: Address, contexts: Sequence[tuple[str, str]]) -> None:
        self._address, self._contexts = address, contexts

    def __enter__(self) -> Association:
        entity = AE(self._address.calling_ae)
        entity.connection_timeout = entity.acse_timeout = _CONNECT_SECONDS
        entity.dimse_timeout = entity.network_timeout = _RESPONSE_SECONDS
        for sop_class, transfer_syntax in self._contexts:
            entity.add_requested_context(sop_class, transfer_syntax)
        handlers: list[Any] = [(evt.EVT_CONN_OPEN, _no_delay), (evt.EVT_PDU_SENT, _quick_ack)]
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
        raise DeliveryError(f"{address.called_ae}: {error}") from error


def _not_established(association: Association, address: Address) -> DeliveryError:
    where = f"{address.called_ae} at {address.host}:{address.port}"
    answer: Any = association.acceptor.primitive
    if association.is_rejected and answer is not None:
        words = f"{where} rejected the association: {answer.reason_str}"
        permanent = answer.result == 1 and answer.diagnostic != _NO_REASON
        return DeliveryRefused(words) if permanent else DeliveryError(words)
    if association.rejected_contexts and not association.accepted_contexts:
        return DeliveryRefused(f"{where} accepted no presentation context")
    return DeliveryError(f"{where}: no association (not listening, unreachable or aborted)")


def _send(
    association: Association,
    path: Path,
    address: Address,
    on_status: OnStatus,
    refused: list[str],
) -> None:
    dataset = dcmread(path)
    syntax = _agreed_syntax(association, dataset)
    if syntax is None:
        refused.append("no presentation context accepted for this SOP class")
        return
    _convert(dataset, syntax)
    try:
        status = association.send_c_store(dataset).get("Status")
    except (ValueError, RuntimeError, OSError) as error:
        raise DeliveryError(f"{address.called_ae}: the association was lost") from error
    if status in (0, _ALREADY_THERE, *_WARNINGS):
        on_status(str(dataset.SOPInstanceUID), int(status))
    elif status is not None and (0xA900 <= status <= 0xA9FF or 0xC000 <= status <= 0xCFFF):
        refused.append(f"answered {_shown(status)}")
    else:
        raise DeliveryError(f"{address.called_ae} answered {_shown(status)}")


def _contexts(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """A presentation context per (SOP class, transfer syntax), so that the choice is ours."""
    own = {
        (str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID))
        for meta in map(read_file_meta_info, paths)
    }
    fallback = {(sop_class, str(syntax)) for sop_class, _ in own for syntax in _UNCOMPRESSED}
    return [*sorted(own), *sorted(fallback - own)][:_MAX_CONTEXTS]


def _agreed_syntax(association: Association, dataset: Dataset) -> UID | None:
    accepted = {
        context.transfer_syntax[0]
        for context in association.accepted_contexts
        if context.abstract_syntax == dataset.SOPClassUID
    }
    own = dataset.file_meta.TransferSyntaxUID
    return next((syntax for syntax in (own, *_UNCOMPRESSED) if syntax in accepted), None)


def _convert(dataset: Dataset, syntax: UID) -> None:
    """Bring a data set into the agreed transfer syntax, without loss."""
    if dataset.file_meta.TransferSyntaxUID == syntax:
        return
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        dataset.decompress(generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax


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
