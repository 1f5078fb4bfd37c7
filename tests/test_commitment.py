"""Storage Commitment SCP: what is asked, what is checked, what is told, and that it is told.

The service runs on a pynetdicom AE of its own, its peers are pynetdicom SCUs; for the whole node
and Orthanc see test_commitment_node.
"""

import contextlib
import json
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian, MRImageStorage, generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.dimse_primitives import N_ACTION
from pynetdicom.dsutils import encode
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]
from sqlalchemy import text

from dicomnode import tables as t
from dicomnode.cli import main
from dicomnode.commitment import Commitments
from dicomnode.commitment_messages import PUSH_MODEL_INSTANCE, read_request
from dicomnode.config import NodeConfig, config_from_mapping
from dicomnode.errors import OperationRefused
from dicomnode.history import History
from dicomnode.journal import Arrival, Journal
from dicomnode.spool import Spool, dataset_digest
from dicomnode.tables import Database
from dicomnode.transactions import Commitment, Transactions
from tests.certificates import OPENSSL, Authority
from tests.factories import ct_series, write_series
from tests.peers import ROOT, free_port, needs, wait_for

pytestmark = pytest.mark.network

SCU = "MODALITY"
Reported = tuple[int, Dataset]
"""Event type and event information."""


@dataclass
class Archived:
    """A data folder with a CT series in it, as the node leaves it after reception."""

    folder: Path
    uids: list[str] = field(default_factory=list)
    series_uid: str = ""

    def fill(self, slices: int = 3) -> "Archived":
        spool, database = Spool(self.folder), Database(self.folder / "journal.db")
        spool.prepare()
        for path in write_series(ct_series(slices, 16, 16), self.folder / "source"):
            header = dcmread(path)
            self.series_uid = str(header.SeriesInstanceUID)
            self.uids.append(str(header.SOPInstanceUID))
            digest, size = dataset_digest(path)
            arrival = Arrival(
                sop_instance_uid=self.uids[-1],
                series_uid=self.series_uid,
                study_uid=str(header.StudyInstanceUID),
                modality="CT",
                sop_class_uid=str(CTImageStorage),
                transfer_syntax_uid=str(header.file_meta.TransferSyntaxUID),
                sha256=digest,
                size=size,
                calling_ae="CT1",
                called_ae="DICOMNODE",
                association=None,
                plane=None,
            )
            assert spool.keep(path, self.series_uid, self.uids[-1])
            Journal(database).record_instance(arrival, time.time())
        database.close()
        return self

    @property
    def references(self) -> list[tuple[str, str]]:
        return [(str(CTImageStorage), uid) for uid in self.uids]

    def path(self, number: int) -> Path:
        return Spool(self.folder).path(self.series_uid, self.uids[number])

    def timeline(self) -> str:
        database = Database(self.folder / "journal.db")
        series = History(database).one_series(self.series_uid)
        database.close()
        return str(series)


@pytest.fixture
def archived(tmp_path: Path) -> Archived:
    folder = tmp_path / "data"
    folder.mkdir()
    return Archived(folder).fill()


def config(folder: Path, peers: dict[str, Any]) -> NodeConfig:
    data = {"node": {"data_dir": str(folder)}, "peers": peers}
    return config_from_mapping(data, folder)


class Service:
    """`Commitments` behind a listening AE, with the thread that a node would give it."""

    def __init__(self, config: NodeConfig, wait: float = 0.0, port: int = 0) -> None:
        spool = Spool(config.node.data_dir)
        self.database = Database(config.node.data_dir / "journal.db")
        self.service = Commitments(
            config, self.database, spool, lambda ae, _: config.peer_by_title(ae), wait
        )
        self._ae = AE(config.node.ae_title)
        for abstract_syntax in self.service.contexts:
            self._ae.add_supported_context(abstract_syntax)
        address = ("127.0.0.1", port)
        self._server: Any = self._ae.start_server(
            address, block=False, evt_handlers=self.service.handlers
        )
        self.port = int(self._server.server_address[1])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> "Service":
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.is_set():
            self.service.step(time.time())
            self.service.pause(0.1)

    def state(self, uid: str) -> tuple[Commitment, str] | None:
        return Transactions(self.database).state(uid)

    def stop(self) -> None:
        self._stop.set()
        self.service.stop(5)
        if self._thread.is_alive():
            self._thread.join()
        self._server.shutdown()
        self.database.close()


@contextlib.contextmanager
def serving(archived: Archived, peers: dict[str, Any], wait: float = 0.0) -> Iterator[Service]:
    service = Service(config(archived.folder, peers), wait).start()
    try:
        yield service
    finally:
        service.stop()


class Modality:
    """An SCU that listens for reports, as a scanner does."""

    def __init__(
        self, port: int = 0, statuses: Sequence[int] = (), secure: ssl.SSLContext | None = None
    ) -> None:
        """`statuses`: what the first reports are answered with; Success afterwards."""
        self.reports: list[Reported] = []
        self.roles: list[bool] = []
        self._statuses = list(statuses)
        self._ae = AE(SCU)
        self._ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        handlers: list[Any] = [(evt.EVT_N_EVENT_REPORT, self.on_report)]
        self._handlers = handlers
        self._server: Any = self._ae.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=handlers, ssl_context=secure
        )
        self.port = int(self._server.server_address[1])

    @property
    def peer(self) -> dict[str, Any]:
        return {"modality": {"ae_title": SCU, "host": "127.0.0.1", "port": self.port}}

    def on_report(self, event: evt.Event) -> tuple[int, None]:
        roles = event.assoc.requestor.role_selection
        self.roles += [bool(role.scp_role) and not role.scu_role for role in roles.values()]
        status = self._statuses.pop(0) if self._statuses else 0
        if status == 0:
            assert event.event_type is not None
            self.reports.append((event.event_type, event.event_information))
        return status, None

    def stop(self) -> None:
        self._server.shutdown()


@pytest.fixture
def modality() -> Iterator[Modality]:
    peer = Modality()
    yield peer
    peer.stop()


def information(uid: str | None, references: Sequence[tuple[str, str]] | None) -> Dataset:
    dataset = Dataset()
    if uid is not None:
        dataset.TransactionUID = uid
    if references is not None:
        dataset.ReferencedSOPSequence = []
        for sop_class, instance in references:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
            dataset.ReferencedSOPSequence.append(item)
    return dataset


@contextlib.contextmanager
def associated(port: int, title: str = SCU, handlers: Sequence[Any] = ()) -> Iterator[Any]:
    entity = AE(title)
    entity.add_requested_context(StorageCommitmentPushModel)
    association = entity.associate(
        "127.0.0.1", port, ae_title="DICOMNODE", evt_handlers=list(handlers)
    )
    assert association.is_established
    try:
        yield association
    finally:
        association.release()


def ask(
    port: int,
    dataset: Dataset | None,
    *,
    title: str = SCU,
    action: int = 1,
    instance: str = PUSH_MODEL_INSTANCE,
) -> int:
    """The status that a request is answered with."""
    with associated(port, title) as association:
        answer, _ = association.send_n_action(dataset, action, StorageCommitmentPushModel, instance)
        return int(answer.Status)


def failures(report: Dataset) -> dict[str, int]:
    return {
        str(item.ReferencedSOPInstanceUID): int(item.FailureReason)
        for item in report.get("FailedSOPSequence", [])
    }


def committed(report: Dataset) -> list[str]:
    return [str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence", [])]


def test_everything_stored_is_committed(archived: Archived, modality: Modality) -> None:
    uid = generate_uid()
    with serving(archived, modality.peer) as service:
        assert ask(service.port, information(uid, archived.references)) == 0
        wait_for(lambda: modality.reports, "the report", 20)
        wait_for(lambda: service.state(uid) == (Commitment.REPORTED, ""), "its end", 20)
    [(event_type, report)] = modality.reports
    assert event_type == 1
    assert str(report.TransactionUID) == uid
    assert committed(report) == archived.uids
    assert "FailedSOPSequence" not in report
    assert modality.roles == [True]  # we proposed the SCP role, and only that
    assert "storage commitment asked by modality: 3 instances checked, 0" in archived.timeline()
    assert "storage commitment reported: modality" in archived.timeline()


def damage(archived: Archived, number: int) -> None:
    """Change one bit of the pixels, as a bad disk would."""
    data = bytearray(archived.path(number).read_bytes())
    data[-5] ^= 1
    archived.path(number).write_bytes(data)


def purge(archived: Archived, number: int) -> None:
    database = Database(archived.folder / "journal.db")
    mine = t.instances.c.sop_instance_uid == archived.uids[number]
    with database.write() as db:
        db.execute(t.instances.update().where(mine).values(purged=True))
    database.close()


def test_each_failure_has_its_reason(tmp_path: Path, modality: Modality) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    archived = Archived(folder).fill(5)
    damage(archived, 0)
    archived.path(1).unlink()
    purge(archived, 2)
    unknown = generate_uid()
    references = archived.references
    references[3] = (str(MRImageStorage), archived.uids[3])
    references.append((str(CTImageStorage), unknown))
    with serving(archived, modality.peer) as service:
        assert ask(service.port, information(generate_uid(), references)) == 0
        wait_for(lambda: modality.reports, "the report", 20)
    [(event_type, report)] = modality.reports
    assert event_type == 2
    assert committed(report) == [archived.uids[4]]
    assert failures(report) == {
        archived.uids[0]: 0x0110,
        archived.uids[1]: 0x0110,
        archived.uids[2]: 0x0112,
        archived.uids[3]: 0x0119,
        unknown: 0x0112,
    }
    assert "5 instances checked, 4 cannot be committed" in archived.timeline()


@pytest.fixture(scope="module")
def asked_wrongly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("data")
    peers = {"modality": {"ae_title": SCU, "host": "127.0.0.1", "port": free_port()}}
    with serving(Archived(folder), peers) as service:
        yield service


@pytest.mark.parametrize(
    ("dataset", "options", "status"),
    [
        (information("1.2.3", None), {}, 0x0115),
        (information("1.2.3", []), {}, 0x0115),
        (information(None, [("1.2", "1.3")]), {}, 0x0115),
        (information("1.2.3", [("1.2", "")]), {}, 0x0115),
        (information("1.2.3", [("", "1.3")]), {}, 0x0115),
        (information("../../etc", [("1.2", "1.3")]), {}, 0x0115),
        (None, {}, 0x0115),
        (information("1.2.3", [("1.2", "1.3")]), {"action": 2}, 0x0123),
        (information("1.2.3", [("1.2", "1.3")]), {"instance": "1.2.3"}, 0x0112),
        (information("1.2.3", [("1.2", "1.3")]), {"title": "STRANGER"}, 0x0124),
    ],
)
def test_a_wrong_request_is_refused_and_not_recorded(
    asked_wrongly: Service, dataset: Dataset | None, options: dict[str, Any], status: int
) -> None:
    assert ask(asked_wrongly.port, dataset, **options) == status
    assert asked_wrongly.state("1.2.3") is None


def test_without_a_journal_nothing_is_promised(archived: Archived, modality: Modality) -> None:
    """0x0213 says that it may be tried again; the association goes on."""
    uid = generate_uid()
    with serving(archived, modality.peer) as service:
        with service.database.write() as db:
            db.execute(text("ALTER TABLE commitment_items RENAME TO lost"))
        assert ask(service.port, information(uid, archived.references)) == 0x0213
        with service.database.write() as db:
            db.execute(text("ALTER TABLE lost RENAME TO commitment_items"))
        assert service.state(uid) is None
        assert ask(service.port, information(uid, archived.references)) == 0


def event_of(encoded: bytes) -> evt.Event:
    """A request whose action information is these bytes, as pynetdicom hands it over."""
    request = N_ACTION()
    request.MessageID = 1
    request.RequestedSOPClassUID = StorageCommitmentPushModel
    request.RequestedSOPInstanceUID = PUSH_MODEL_INSTANCE
    request.ActionTypeID = 1
    request.ActionInformation = BytesIO(encoded)
    return as_event(request, evt.EVT_N_ACTION)


def as_event(request: Any, kind: Any) -> evt.Event:
    """A message of the push model as pynetdicom hands it over."""
    context = build_context(StorageCommitmentPushModel, ImplicitVRLittleEndian)
    context.context_id = 1
    attributes = {"request": request, "context": context.as_tuple}
    return evt.Event(cast(Any, None), kind, attributes)


_VALID = encode(information("1.2.3", [("1.2", "1.3.1"), ("1.2", "1.3.2")]), True, True) or b""


def test_a_request_is_read_as_it_was_written() -> None:
    assert read_request(event_of(_VALID)) == ("1.2.3", [("1.2", "1.3.1"), ("1.2", "1.3.2")])


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_a_damaged_request_is_refused_or_harmless(data: st.DataObject) -> None:
    def read(message: bytes) -> list[str]:
        uid, references = read_request(event_of(message))
        return [uid, *chain.from_iterable(references)]

    refused_or_harmless(data, _VALID, read)


def refused_or_harmless(
    data: st.DataObject, valid: bytes, read: Callable[[bytes], list[str]]
) -> None:
    """Bytes changed, cut off, or put in between: `read` tells UIDs, or refuses with 0x0115."""
    encoded = bytearray(valid[: data.draw(st.integers(0, len(valid)))])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(encoded)))
        encoded[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=4))
    status, uids = 0x0115, ["1"]
    try:
        uids = read(bytes(encoded))
    except OperationRefused as refusal:
        status = refusal.status
    assert status == 0x0115
    assert all(map(_is_uid, uids))


def _is_uid(text: str) -> bool:
    return re.fullmatch(r"[0-9.]{1,64}", text) is not None


def test_the_same_request_again_is_the_same_transaction(
    archived: Archived, modality: Modality
) -> None:
    uid = generate_uid()
    request = information(uid, archived.references)
    with serving(archived, modality.peer) as service:
        assert ask(service.port, request) == 0
        wait_for(lambda: service.state(uid) == (Commitment.REPORTED, ""), "the first end", 20)
        assert ask(service.port, information(uid, archived.references[:2])) == 0x0115
        assert len(modality.reports) == 1
        assert ask(service.port, request) == 0  # it has not seen our report, perhaps
        wait_for(lambda: len(modality.reports) == 2, "the report again", 20)
    assert modality.reports[0] == modality.reports[1]


def test_an_instance_that_comes_after_the_request_is_waited_for(
    tmp_path: Path, modality: Modality
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Spool(folder).prepare()
    coming = ct_series(3, 16, 16)
    references = [(str(CTImageStorage), str(ds.SOPInstanceUID)) for ds in coming]
    uid = generate_uid()
    empty = Archived(folder)
    with serving(empty, modality.peer, wait=30) as service:
        assert ask(service.port, information(uid, references)) == 0
        expected = (Commitment.CHECKING, "3 instances are not here yet")
        wait_for(lambda: service.state(uid) == expected, "the check to wait", 20)
        empty.fill()
        wait_for(lambda: modality.reports, "the report", 20)
    assert modality.reports[0][0] == 1


def test_a_report_is_repeated_until_it_is_answered(archived: Archived) -> None:
    """The peer is down, then busy, then takes it."""
    port, uid = free_port(), generate_uid()
    peers = {"modality": {"ae_title": SCU, "host": "127.0.0.1", "port": port}}
    with serving(archived, peers) as service:
        assert ask(service.port, information(uid, archived.references)) == 0

        def put_off() -> bool:
            state, detail = service.state(uid) or (None, "")
            return state is Commitment.REPORTING and "not listening" in detail

        wait_for(put_off, "the first attempt to fail", 20)
        modality = Modality(port, statuses=[0x0213])
        wait_for(lambda: modality.reports, "the report", 30)
        wait_for(lambda: service.state(uid) == (Commitment.REPORTED, ""), "its end", 20)
        modality.stop()


@needs(OPENSSL)
def test_a_peer_with_tls_gets_its_report_over_tls(archived: Archived, tmp_path: Path) -> None:
    """It takes TLS only, and only with a certificate of ours that it knows."""
    authority = Authority(tmp_path / "pki").create()
    scanner, node = authority.sign("scanner"), authority.sign("node")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.cert))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(scanner.cert, scanner.key)
    modality = Modality(secure=context)
    ours = {"ca": str(authority.cert), "cert": str(node.cert), "key": str(node.key)}
    with serving(archived, {"modality": {**modality.peer["modality"], "tls": ours}}) as service:
        assert ask(service.port, information(generate_uid(), archived.references)) == 0
        wait_for(lambda: modality.reports, "the report", 20)
    modality.stop()
    assert modality.reports[0][0] == 1


def test_a_report_that_the_peer_refuses_is_parked(archived: Archived) -> None:
    modality, uid = Modality(statuses=[0x0115]), generate_uid()
    with serving(archived, modality.peer) as service:
        assert ask(service.port, information(uid, archived.references)) == 0
        parked = (Commitment.PARKED, "N-EVENT-REPORT was answered with 0x0115")
        wait_for(lambda: service.state(uid) == parked, "the parking", 20)
    modality.stop()
    assert "storage commitment parked: modality: N-EVENT-REPORT was" in archived.timeline()


def test_a_peer_that_stays_away_too_long_is_given_up(archived: Archived) -> None:
    uid = generate_uid()
    peer = {"ae_title": SCU, "host": "127.0.0.1", "port": free_port(), "retry_for_hours": 0}
    with serving(archived, {"modality": peer}) as service:
        assert ask(service.port, information(uid, archived.references)) == 0

        def parked() -> bool:
            state, detail = service.state(uid) or (None, "")
            return state is Commitment.PARKED and "not listening" in detail

        wait_for(parked, "the parking", 20)


def test_nothing_is_promised_that_went_away_before_the_report(archived: Archived) -> None:
    port, uid = free_port(), generate_uid()
    peers = {"modality": {"ae_title": SCU, "host": "127.0.0.1", "port": port}}
    with serving(archived, peers) as service:
        assert ask(service.port, information(uid, archived.references)) == 0
        wait_for(
            lambda: (service.state(uid) or (None,))[0] is Commitment.REPORTING, "the check", 20
        )
        purge(archived, 1)
        modality = Modality(port)
        wait_for(lambda: modality.reports, "the report", 30)
        modality.stop()
    [(event_type, report)] = modality.reports
    assert event_type == 2
    assert failures(report) == {archived.uids[1]: 0x0112}


def test_a_parked_commitment_is_listed_and_reported_after_a_retry(
    archived: Archived, capsys: pytest.CaptureFixture[str]
) -> None:
    port, uid = free_port(), generate_uid()
    config_file = archived.folder.parent / "config.yaml"
    config_file.write_text(f"node: {{data_dir: {archived.folder}}}\nroutes: []\n")

    def run(*words: str) -> tuple[int, str]:
        code = main([words[0], "--config", str(config_file), *words[1:]])
        said = capsys.readouterr()
        return code, said.out + said.err

    peers = {
        "modality": {
            "ae_title": SCU,
            "host": "127.0.0.1",
            "port": port,
            "retry_for_hours": 0,
        }
    }
    with serving(archived, peers) as service:
        assert ask(service.port, information(uid, archived.references)) == 0
        wait_for(lambda: f"commitment:{uid} of 3" in run("status")[1], "the listing", 20)
        wait_for(lambda: "to modality: parked since" in run("status")[1], "the parking", 20)
        assert "not listening" in run("status")[1]
        listed = json.loads(run("status", "--json")[1])
        assert listed["counts"]["commitments"] == {"parked": 1}
        assert [one["transaction_uid"] for one in listed["commitments"]] == [uid]
        modality = Modality(port)
        assert run("retry", f"commitment:{uid}") == (0, f"commitment:{uid} queued again\n")
        wait_for(lambda: modality.reports, "the report", 20)
        modality.stop()
        wait_for(lambda: "commitment:" not in run("status")[1], "the end of it", 20)
    assert committed(modality.reports[0][1]) == archived.uids
    code, said = run("retry", f"commitment:{uid}")  # once is enough
    assert (code, "a storage commitment reported cannot be retried" in said) == (1, True)
    assert run("retry", "commitment:1.2.3")[0] == 1


def test_all_that_failed_includes_parked_commitments(
    archived: Archived, capsys: pytest.CaptureFixture[str]
) -> None:
    database = Database(archived.folder / "journal.db")
    transactions = Transactions(database)
    assert transactions.ask("9.1", "modality", archived.references, 1.0)
    (transaction,) = transactions.due(Commitment.CHECKING, 2.0)
    transactions.checked(transaction, [0, 0, 0], 3.0)
    transactions.park(transaction, "gone", 4.0)
    config_file = archived.folder.parent / "config.yaml"
    config_file.write_text(f"node: {{data_dir: {archived.folder}}}\nroutes: []\n")
    assert main(["retry", "--config", str(config_file), "--all-failed"]) == 0
    assert "1 storage commitments queued again" in capsys.readouterr().out
    assert [one.uid for one in transactions.due(Commitment.CHECKING, time.time())] == ["9.1"]


def test_a_peer_without_an_address_hears_on_its_own_association(archived: Archived) -> None:
    listener = Modality()  # only its handler is used
    handlers = [(evt.EVT_N_EVENT_REPORT, listener.on_report)]
    first, second = generate_uid(), generate_uid()
    with serving(archived, {"modality": {"ae_title": SCU}}) as service:
        with associated(service.port, handlers=handlers) as association:
            arguments = (StorageCommitmentPushModel, PUSH_MODEL_INSTANCE)
            request = information(first, archived.references)
            status, _ = association.send_n_action(request, 1, *arguments)
            assert status.Status == 0
            wait_for(lambda: listener.reports, "the report", 20)
        # a request whose association ends at once is answered on the next one
        assert ask(service.port, information(second, archived.references)) == 0
        wait_for(lambda: "has ended" in str(service.state(second)), "the report to wait", 20)
        assert len(listener.reports) == 1
        with associated(service.port, handlers=handlers) as association:
            request = information(generate_uid(), archived.references)
            status, _ = association.send_n_action(request, 1, *arguments)
            wait_for(lambda: len(listener.reports) == 3, "both reports", 20)
    listener.stop()
    told = {str(report.TransactionUID) for _, report in listener.reports}
    assert {first, second} < told


def serve(folder: str, port: str, peers: str) -> None:
    """The service as a process of its own, until it is killed."""
    service = Service(config(Path(folder), json.loads(peers)), port=int(port)).start()
    print("listening", flush=True)
    service._thread.join()


def test_a_killed_service_still_reports_what_it_was_asked(archived: Archived) -> None:
    """kill -9 right after the N-ACTION response; the peer listens only after the restart."""
    own, port, uid = free_port(), free_port(), generate_uid()
    peers = json.dumps({"modality": {"ae_title": SCU, "host": "127.0.0.1", "port": port}})
    code = f"from tests.test_commitment import serve; serve({str(archived.folder)!r}, '{own}', "
    command = [sys.executable, "-c", f"{code}{peers!r})"]

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        return process

    process = start()
    assert ask(own, information(uid, archived.references)) == 0
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    modality = Modality(port)
    process = start()
    try:
        wait_for(lambda: modality.reports, "the report", 30)
    finally:
        process.kill()
        process.wait(20)
        modality.stop()
    assert committed(modality.reports[0][1]) == archived.uids
