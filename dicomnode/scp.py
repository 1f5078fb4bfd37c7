"""Storage, Verification, Storage Commitment and MPPS SCP: association -> instance -> status.

Success is answered only when the instance, and what the journal says of it, are durable (PS3.4
B.2.2). Instances are kept as received; pixel data are never decoded here. `upper_layer` serves
Storage and Verification, pynetdicom the other services.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pynetdicom import AE, evt
from sqlalchemy.exc import SQLAlchemyError

from dicomnode import __version__, metrics, tls
from dicomnode.access import Access, Admission
from dicomnode.config import NodeConfig
from dicomnode.errors import (
    CannotUnderstand,
    DataSetMismatch,
    InstanceRefused,
    JournalError,
    OutOfResources,
)
from dicomnode.expected import EXPECTED_KEYWORDS, expected_values
from dicomnode.heads import Plain
from dicomnode.imaging.marks import IMPLEMENTATION_CLASS_UID
from dicomnode.journal import Arrival, Journal
from dicomnode.part10 import MALFORMED, read_header
from dicomnode.redo import RedoLog
from dicomnode.series import ARRIVAL_KEYWORDS, Carriers, plane_of
from dicomnode.spool import Spool, checked_uid
from dicomnode.storing import Storing
from dicomnode.upper_layer import (
    Identity,
    Library,
    Limits,
    Listener,
    Received,
    Rejection,
    Requestor,
)

log = logging.getLogger(__name__)

SUCCESS = 0x0000
_ANSWERED = "answered 0x%04X to %s, instance %s: %s"
_NOT_AUTHORISED = 0x0124
_ARRIVAL_TAGS = [
    tag for tag in map(tag_for_keyword, (*ARRIVAL_KEYWORDS, *EXPECTED_KEYWORDS)) if tag is not None
]
_PLAIN = Plain(_ARRIVAL_TAGS)


class LibraryService(Protocol):
    """A service that pynetdicom serves: storage commitment, MPPS."""

    @property
    def contexts(self) -> tuple[str, ...]: ...

    @property
    def handlers(self) -> list[Any]: ...

    @property
    def reports(self) -> bool:
        """Does its SCP call us, to report (PS3.7 D.3.3.4: role selection)?"""


@dataclass(slots=True)
class _Open:
    """An association that is open now."""

    requestor: Requestor
    admission: Admission
    number: int | None = None
    """Its row in the journal, made with the first instance it brings."""

    @property
    def peer(self) -> str:
        return self.admission.peer or "unknown"

    @property
    def caller(self) -> str:
        """For the log."""
        return f"{self.peer} at {self.requestor.host}"


class StorageScp:
    """The listening AE; the `Handler` of its own upper layer."""

    def __init__(
        self,
        config: NodeConfig,
        spool: Spool,
        journal: Journal,
        redo: RedoLog,
        carriers: Carriers,
        services: Sequence[LibraryService],
    ) -> None:
        """Nothing listens before `start`.

        Raises:
            ConfigError: the TLS files cannot be used.
        """
        self._config, self._spool = config, spool
        self._journal, self._carriers = journal, carriers
        self.access = Access(config.node, config.peers)
        self._open: dict[object, _Open] = {}
        self._lock = threading.Lock()
        self._incoming, self._parts = str(spool.incoming), itertools.count()
        self._storing = Storing(spool, journal, redo, config.series.on_late_instances)
        limits = Limits(max_pdu_bytes=config.node.max_pdu_bytes)
        self._listener = Listener(
            (config.node.bind, config.node.port),
            self,
            identity=Identity(IMPLEMENTATION_CLASS_UID, f"DICOMNODE_{__version__}"[:16]),
            limits=limits,
            max_associations=config.node.max_associations,
            secure=_secure(config, limits),
            library=self._library(services, limits) if services else None,
        )

    @property
    def port(self) -> int:
        """The port we listen on; 0 when we do not."""
        return self._listener.port

    @property
    def listening(self) -> bool:
        return self._listener.port != 0

    @property
    def associations(self) -> int:
        return self._listener.associations

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address is in use or not ours.
        """
        self._listener.start()

    def drain(self, grace: float) -> None:
        """Take no new associations; let the open ones end for `grace` seconds, then abort them."""
        self._listener.drain(grace)

    # associations

    def request(self, requestor: Requestor) -> Rejection | None:
        """Reject who is not in `peers`, or has no place left (PS3.8 9.3.4)."""
        admitted = self._admit(requestor)
        return admitted if isinstance(admitted, Rejection) else None

    def _admit(self, requestor: Requestor) -> _Open | Rejection:
        calling, called = requestor.calling_ae, requestor.called_ae
        admission = self.access.admit(calling, called, requestor.host, time.time())
        if isinstance(admission, Rejection):
            log.warning("rejected %r at %s: %s", calling, requestor.host, admission.words)
            metrics.associations_rejected.labels(admission.words).inc()
            return admission
        opened = _Open(requestor, admission)
        with self._lock:
            self._open[requestor] = opened
        return opened

    def allows(self, requestor: Requestor, sop_class_uid: str) -> bool:
        opened = self._opened(requestor)
        return self.access.allowed_sop_class(opened.admission.peer, sop_class_uid)

    def ended(self, requestor: Requestor, how: Literal["released", "aborted"]) -> None:
        with self._lock:
            opened = self._open.pop(requestor, None)
        if opened is None:
            return
        self.access.leave(opened.admission)
        if opened.number is not None:
            now = time.time()
            self._carriers.ended(opened.number, how == "released", time.monotonic())
            try:
                self._journal.waiting.flush()
                self._journal.end_association(opened.number, how, now)
            except (SQLAlchemyError, JournalError):  # it counts as lost after the next start
                log.error("association %d ended, which the journal cannot note", opened.number)

    def _opened(self, requestor: Requestor) -> _Open:
        with self._lock:
            return self._open[requestor]

    # instances

    def part_path(self) -> Path:
        """Where the next data set is received.

        Raises:
            OutOfResources: less than `node.reserve_free_gb` is free.
        """
        self._spool.check_room()
        return Path(f"{self._incoming}/{next(self._parts)}.part")

    def store(self, requestor: Requestor, received: Received) -> tuple[int, str]:
        """Answer one C-STORE request with a status of PS3.4 Table B.2-1 and an ErrorComment."""
        opened = self._opened(requestor)
        try:
            self._keep(received, opened)
            status, comment = SUCCESS, ""
        except InstanceRefused as refusal:
            status, comment = refusal.status, str(refusal)
            log.warning(_ANSWERED, status, opened.caller, received.sop_instance_uid, refusal)
        except (SQLAlchemyError, JournalError) as error:
            status, comment = OutOfResources.status, "the journal cannot be written now; try again"
            why = error if isinstance(error, JournalError) else type(error).__name__
            log.error(_ANSWERED, status, opened.caller, received.sop_instance_uid, why)
        peer, size = opened.admission.peer, received.size
        wait = self.access.delay(peer, 1, size, time.monotonic())  # its pace, by the config
        if wait > 0:  # to sleep for nothing may cost a turn of the scheduler
            time.sleep(wait)
        return status, comment

    def answered(self, requestor: Requestor, status: int) -> None:
        metrics.instances_received.labels(self._opened(requestor).peer, f"0x{status:04X}").inc()

    def _keep(self, received: Received, opened: _Open) -> None:
        arrival, number = self._arrival(received, opened)
        self._carriers.carries(number, arrival.series_uid)
        self._storing.keep(received, arrival, time.time())

    def _arrival(self, received: Received, opened: _Open) -> tuple[Arrival, int]:
        """What the journal is to keep, and the association's number in it."""
        plain = _PLAIN.read(received.head, received.transfer_syntax_uid)
        if plain is None:
            received.file()
        header = read_arrival_header(received.part) if plain is None else plain
        sop_class = checked_uid(header.get("SOPClassUID"), "SOPClassUID")
        sop_instance = checked_uid(header.get("SOPInstanceUID"), "SOPInstanceUID")
        if sop_class != received.sop_class_uid:
            raise DataSetMismatch("SOPClassUID differs from the Affected SOP Class UID")
        if sop_instance != received.sop_instance_uid:
            raise DataSetMismatch("SOPInstanceUID differs from the Affected SOP Instance UID")
        who = opened.requestor
        if opened.number is None:
            opened.number = self._journal.begin_association(
                who.calling_ae, who.called_ae, who.host, time.time()
            )
        arrival = Arrival(
            sop_instance_uid=sop_instance,
            series_uid=checked_uid(header.get("SeriesInstanceUID"), "SeriesInstanceUID"),
            study_uid=checked_uid(header.get("StudyInstanceUID"), "StudyInstanceUID"),
            modality=str(header.get("Modality") or "")[:16],
            sop_class_uid=sop_class,
            transfer_syntax_uid=received.transfer_syntax_uid,
            sha256=received.sha256,
            size=received.file_size,
            calling_ae=who.calling_ae,
            called_ae=who.called_ae,
            association=opened.number,
            plane=plane_of(header),
            expected=expected_values(header),
        )
        return arrival, opened.number

    # what pynetdicom serves: associations that ask for more than Storage and Verification

    def _library(self, services: Sequence[LibraryService], limits: Limits) -> Library:
        entity = AE(self._config.node.ae_title)
        entity.maximum_associations = self._config.node.max_associations
        entity.maximum_pdu_size = self._config.node.max_pdu_bytes
        entity.acse_timeout = limits.artim_seconds
        entity.network_timeout = limits.idle_seconds
        handlers: list[Any] = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, self._on_aborted),
            (evt.EVT_CONN_CLOSE, self._on_aborted),
        ]
        reporting = {uid for service in services if service.reports for uid in service.contexts}
        for service in services:
            handlers += service.handlers
            for abstract_syntax in service.contexts:
                both = True if abstract_syntax in reporting else None  # may the caller be the SCP?
                entity.add_supported_context(abstract_syntax, scu_role=both, scp_role=both)
        entity.add_supported_context("1.2.840.10008.1.1")
        return Library(entity, handlers, limits)

    def _on_requested(self, event: evt.Event) -> None:
        association: Any = event.assoc
        request = association.requestor.primitive
        requestor = Requestor(
            str(request.calling_ae_title).strip(),
            str(request.called_ae_title).strip(),
            str(association.requestor.address),
        )
        admitted = self._admit(requestor)
        if isinstance(admitted, Rejection):
            answer = (admitted.result, admitted.source, admitted.reason)
            association.acse.send_reject(*answer)
            association.kill()
            return
        with self._lock:
            self._open[association] = self._open.pop(requestor)

    def _on_released(self, event: evt.Event) -> None:
        self._library_ended(event.assoc, "released")

    def _on_aborted(self, event: evt.Event) -> None:
        self._library_ended(event.assoc, "aborted")  # also a closed connection; no-op if released

    def _library_ended(self, association: Any, how: Literal["released", "aborted"]) -> None:
        with self._lock:
            opened = self._open.pop(association, None)
        if opened is not None:
            self.access.leave(opened.admission)


def _secure(config: NodeConfig, limits: Limits) -> Callable[[Any], Any] | None:
    """The TLS handshake of a connection, by certificates that are read again when they change."""
    if config.node.tls is None:
        return None
    reloader = tls.Reloader(config.node.tls)
    return lambda connection: tls.wrap(connection, reloader.context(), limits.artim_seconds)


def read_arrival_header(path: Path) -> Dataset:
    """The few attributes we need of a received file; its pixel data are not read.

    Raises:
        CannotUnderstand: the data set cannot be parsed up to there.
        OSError: the disk refuses.
    """
    return _decoded(read_header(path, _ARRIVAL_TAGS))


def _decoded(header: Dataset) -> Dataset:
    try:
        for _ in header:
            pass  # values are parsed on access
    except MALFORMED as error:
        raise CannotUnderstand("the data set cannot be parsed") from error
    return header
