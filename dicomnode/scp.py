"""Verification and Storage SCP: association -> presentation context -> instance -> status.

Success is answered only when the instance is on disk, its folder is synced and its journal entry
is durable (PS3.4 B.2.2). Instances are kept as received; pixel data are never decoded here.
"""

import ipaddress
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.errors import InvalidDicomError
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, _config, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode import metrics
from dicomnode.config import NodeConfig, Peer
from dicomnode.errors import (
    CannotUnderstand,
    DataSetMismatch,
    DuplicateInstance,
    InstanceRefused,
    OutOfResources,
)
from dicomnode.journal import Arrival, Journal
from dicomnode.series import ARRIVAL_KEYWORDS, Carriers, plane_of
from dicomnode.spool import Spool, checked_uid, dataset_digest

log = logging.getLogger(__name__)

SUCCESS = 0x0000
_ARRIVAL_TAGS = [tag for tag in map(tag_for_keyword, ARRIVAL_KEYWORDS) if tag is not None]
_ACSE_SECONDS = 15
"""How long a connected peer may take to ask for an association (ARTIM, PS3.8 9.1.5)."""
_IDLE_SECONDS = 300
_REJECTED_PERMANENT, _SERVICE_USER, _CALLING, _CALLED = 1, 1, 3, 7


@dataclass(slots=True)
class _Open:
    """An association that is open now."""

    calling_ae: str
    called_ae: str
    host: str
    peer: str
    """Our name for the caller; "unknown" if it is not in `peers`."""
    number: int | None = None
    """Its row in the journal, made with the first instance it brings."""


class StorageScp:
    """The listening AE."""

    def __init__(
        self, config: NodeConfig, spool: Spool, journal: Journal, carriers: Carriers
    ) -> None:
        self._config, self._spool = config, spool
        self._journal, self._carriers = journal, carriers
        self._open: dict[Any, _Open] = {}
        self._lock = threading.Lock()
        self._server: ThreadedAssociationServer | None = None
        self._ae = AE(config.node.ae_title)
        self._ae.maximum_associations = config.node.max_associations
        self._ae.maximum_pdu_size = config.node.max_pdu_bytes
        self._ae.acse_timeout = _ACSE_SECONDS
        self._ae.network_timeout = _IDLE_SECONDS
        for context in AllStoragePresentationContexts:
            if context.abstract_syntax is not None:
                self._ae.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
        self._ae.add_supported_context(Verification)

    @property
    def port(self) -> int:
        """The port we listen on; 0 before `start`."""
        return 0 if self._server is None else int(self._server.server_address[1])

    @property
    def listening(self) -> bool:
        return self._server is not None

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address is in use or not ours.
        """
        # received data sets stream to files beside the spool, so that a rename keeps them
        _config.STORE_RECV_CHUNKED_DATASET = True
        tempfile.tempdir = str(self._spool.incoming)
        handlers: list[Any] = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_C_STORE, self.on_c_store),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, self._on_aborted),
            (evt.EVT_CONN_CLOSE, self._on_aborted),
        ]
        server = self._ae.start_server(
            (self._config.node.bind, self._config.node.port), block=False, evt_handlers=handlers
        )
        self._server = server

    def drain(self, grace: float) -> None:
        """Take no new associations; let the open ones end for `grace` seconds, then abort them."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        deadline = time.monotonic() + grace
        for association in self._ae.active_associations:
            association.join(max(0.0, deadline - time.monotonic()))
        for association in self._ae.active_associations:
            association.abort()

    # associations

    def _on_requested(self, event: evt.Event) -> None:
        """Reject who is not in `peers` (PS3.8 9.3.4), before anything is negotiated."""
        association = event.assoc
        request: Any = association.requestor.primitive
        calling = str(request.calling_ae_title).strip()
        called = str(request.called_ae_title).strip()
        host = str(association.requestor.address)
        peer = caller(self._config.peers, calling, host)
        if called != self._config.node.ae_title:
            self._reject(association, _CALLED, "called AE title", calling, host)
        elif peer is None and self._config.node.unknown_callers == "refuse":
            self._reject(association, _CALLING, "calling AE title or host", calling, host)
        else:
            with self._lock:
                self._open[association] = _Open(calling, called, host, peer or "unknown")
                metrics.associations_open.set(len(self._open))

    def _reject(self, association: Any, reason: int, words: str, calling: str, host: str) -> None:
        log.warning(
            "rejected an association from %r at %s: %s not recognised", calling, host, words
        )
        metrics.associations_rejected.labels(words).inc()
        association.acse.send_reject(_REJECTED_PERMANENT, _SERVICE_USER, reason)
        association.kill()

    def _on_released(self, event: evt.Event) -> None:
        self._end(event.assoc, "released")

    def _on_aborted(self, event: evt.Event) -> None:
        self._end(event.assoc, "aborted")  # also a closed connection; a no-op after a release

    def _end(self, association: Any, how: str) -> None:
        with self._lock:
            ended = self._open.pop(association, None)
            metrics.associations_open.set(len(self._open))
        if ended is not None and ended.number is not None:
            now = time.time()
            self._journal.end_association(ended.number, how, now)
            self._carriers.ended(ended.number, how == "released", now)

    # instances

    def on_c_store(self, event: evt.Event) -> int | Dataset:
        """Answer one C-STORE request with a status of PS3.4 Table B.2-1."""
        with self._lock:
            source = self._open.get(event.assoc)
        try:
            if source is None:
                raise CannotUnderstand("the association is not open")
            self._keep(event, source)
            status, answer = SUCCESS, Dataset()
        except InstanceRefused as refusal:
            status, answer = refusal.status, Dataset()
            answer.ErrorComment = str(refusal)[:64]
            log.warning("answered 0x%04X: %s", status, refusal)
        answer.Status = status
        peer = "unknown" if source is None else source.peer
        metrics.instances_received.labels(peer, f"0x{status:04X}").inc()
        return answer

    def _keep(self, event: evt.Event, source: _Open) -> None:
        part: Path = event.dataset_path
        if not self._spool.has_room():
            raise OutOfResources("free space is below node.reserve_free_gb")
        arrival = self._arrival(part, event, source)
        now = time.time()
        self._carriers.carries(arrival.association or 0, arrival.series_uid)
        known = self._journal.known(arrival.sop_instance_uid)
        if known is not None and (known[0], known[1]) != (arrival.series_uid, arrival.sha256):
            self._refuse_other(part, arrival, now)
        if known is None or known[2]:
            kept = self._spool.keep(part, arrival.series_uid, arrival.sop_instance_uid)
            if kept is None:
                self._adopt_or_refuse(part, arrival, now)
        late = self._config.series.on_late_instances
        if self._journal.record_instance(arrival, now, late=late):
            metrics.bytes_received.inc(arrival.size)

    def _adopt_or_refuse(self, part: Path, arrival: Arrival, now: float) -> None:
        """A file is there without a row: the same instance on another association, or another."""
        there = self._spool.path(arrival.series_uid, arrival.sop_instance_uid)
        if dataset_digest(there)[0] != arrival.sha256:
            self._refuse_other(part, arrival, now)

    def _refuse_other(self, part: Path, arrival: Arrival, now: float) -> None:
        self._spool.set_aside(part, arrival.sop_instance_uid, arrival.sha256)
        self._journal.record_conflict(arrival, now)
        raise DuplicateInstance("other bytes are stored under this SOP Instance UID")

    def _arrival(self, part: Path, event: evt.Event, source: _Open) -> Arrival:
        request: Any = event.request
        header = read_arrival_header(part)
        sop_class = checked_uid(header.get("SOPClassUID"), "SOPClassUID")
        sop_instance = checked_uid(header.get("SOPInstanceUID"), "SOPInstanceUID")
        if sop_class != request.AffectedSOPClassUID:
            raise DataSetMismatch("SOPClassUID differs from the Affected SOP Class UID")
        if sop_instance != request.AffectedSOPInstanceUID:
            raise DataSetMismatch("SOPInstanceUID differs from the Affected SOP Instance UID")
        digest, size = dataset_digest(part)
        if source.number is None:
            source.number = self._journal.begin_association(
                source.calling_ae, source.called_ae, source.host, time.time()
            )
        return arrival_of(header, str(event.context.transfer_syntax), digest, size, source)


def arrival_of(
    header: Dataset, transfer_syntax_uid: str, digest: str, size: int, source: _Open
) -> Arrival:
    """What the journal keeps of an instance.

    Raises:
        CannotUnderstand: a UID is missing or not valid.
    """
    return Arrival(
        sop_instance_uid=checked_uid(header.get("SOPInstanceUID"), "SOPInstanceUID"),
        series_uid=checked_uid(header.get("SeriesInstanceUID"), "SeriesInstanceUID"),
        study_uid=checked_uid(header.get("StudyInstanceUID"), "StudyInstanceUID"),
        modality=str(header.get("Modality") or "")[:16],
        sop_class_uid=checked_uid(header.get("SOPClassUID"), "SOPClassUID"),
        transfer_syntax_uid=transfer_syntax_uid,
        sha256=digest,
        size=size,
        calling_ae=source.calling_ae,
        called_ae=source.called_ae,
        association=source.number,
        plane=plane_of(header),
    )


def adopt_orphan(path: Path, journal: Journal, now: float) -> bool:
    """Journal a stored file that has no row: it was cut off between file and row.

    It was never acknowledged, so its sender will send it again; keeping it loses nothing either.
    False if it cannot be read.
    """
    try:
        header = read_arrival_header(path)
        syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
        digest, size = dataset_digest(path)
        arrival = arrival_of(header, syntax, digest, size, _Open("", "", "", "unknown"))
    except InstanceRefused:
        return False
    journal.record_instance(arrival, now)
    return True


def read_arrival_header(path: Path) -> Dataset:
    """The few attributes we need of a received file; its pixel data are not read.

    Raises:
        CannotUnderstand: the data set cannot be parsed up to there.
    """
    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=list(_ARRIVAL_TAGS))
        for tag in _ARRIVAL_TAGS:
            header.get(tag)  # values are parsed on access
    except (
        InvalidDicomError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        NotImplementedError,
        RecursionError,
        OSError,
    ) as error:
        raise CannotUnderstand("the data set cannot be parsed") from error
    return header


def caller(peers: Mapping[str, Peer], calling: str, host: str) -> str | None:
    """Our name of the peer that calls with this AE title from this host, or None."""
    for name, peer in peers.items():
        if peer.ae_title == calling and (peer.host is None or _is_host(peer.host, host)):
            return name
    return None


def _is_host(wanted: str, host: str) -> bool:
    """Is `host`, a numeric address, the name, address or network `wanted`?"""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    try:
        return address in ipaddress.ip_network(wanted, strict=False)
    except ValueError:
        pass
    try:
        found = {info[4][0] for info in socket.getaddrinfo(wanted, None)}
    except OSError:
        return False
    return str(address) in found
