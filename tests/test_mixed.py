"""Associations that store and also ask for storage commitment, or tell of a step: one for all."""

import contextlib
import struct
from collections.abc import Iterator

import pytest
from pydicom import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    ModalityPerformedProcedureStep,
    StorageCommitmentPushModel,
    Verification,
)

from tests.factories import ct_series
from tests.fuzz import wire
from tests.fuzz.wire import Wire
from tests.peers import Node, free_port, running_node, wait_for
from tests.test_mpps import beginning

pytestmark = pytest.mark.network
COMMITMENT, INSTANCE = str(StorageCommitmentPushModel), "1.2.840.10008.1.20.1.1"
CANARY = "CANARY^NAME"


@pytest.fixture(scope="module")
def reports() -> list[Dataset]:
    return []


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, reports: list[Dataset]) -> Iterator[Node]:
    """A node, and a scanner that listens for its reports; the scanner may store CT only."""
    port, scanner = free_port(), AE("CT1")
    scanner.add_supported_context(COMMITMENT, scu_role=True, scp_role=True)

    def on_report(event: evt.Event) -> tuple[int, None]:
        reports.append(event.event_information)
        return 0x0000, None

    handlers = [(evt.EVT_N_EVENT_REPORT, on_report)]
    server = scanner.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    peer = {"ae_title": "CT1", "host": "127.0.0.1", "port": port, "sop_classes": ["CT"]}
    folder = tmp_path_factory.mktemp("node")
    with running_node(folder, {"peers": {"scanner": peer}}) as under_test:
        yield under_test
    server.shutdown()


@pytest.fixture
def association(node: Node) -> Iterator[Association]:
    """One that proposes all four services at once, as some modalities do."""
    scanner = AE("CT1")
    for service in (CTImageStorage, COMMITMENT, ModalityPerformedProcedureStep, Verification):
        scanner.add_requested_context(service, [ExplicitVRLittleEndian])
    opened = scanner.associate("127.0.0.1", node.port, ae_title="DICOMNODE")
    yield opened
    opened.release()


def test_a_scanner_stores_and_asks_to_commit_on_one_association(
    association: Association, reports: list[Dataset]
) -> None:
    images = ct_series(3, 32, 32)
    assert [association.send_c_store(image).Status for image in images] == [0, 0, 0]
    information = Dataset()
    information.TransactionUID = generate_uid()
    information.ReferencedSOPSequence = [Dataset() for _ in images]
    for item, image in zip(information.ReferencedSOPSequence, images, strict=True):
        item.ReferencedSOPClassUID = image.SOPClassUID
        item.ReferencedSOPInstanceUID = image.SOPInstanceUID
    status, _ = association.send_n_action(information, 1, COMMITMENT, INSTANCE)
    assert status.Status == 0
    (report,) = wait_for(lambda: reports, "the report", 30)
    assert report.TransactionUID == information.TransactionUID
    assert len(report.ReferencedSOPSequence) == 3
    assert "FailedSOPSequence" not in report
    assert association.send_c_echo().Status == 0


def test_a_procedure_step_on_an_association_that_stores_is_answered(
    association: Association,
) -> None:
    uid, step = generate_uid(), ModalityPerformedProcedureStep
    first, _ = association.send_n_create(beginning(), step, uid)
    again, _ = association.send_n_create(beginning(), step, uid)
    assert (first.Status, again.Status) == (0x0000, 0x0111)
    assert again.ErrorComment == "this step exists already"


def test_who_stores_may_report_on_the_same_association(node: Node) -> None:
    """A destination reports on our requests: it proposes the SCP role (PS3.7 D.3.3.4)."""
    name = COMMITMENT.encode()
    role = wire.item(0x54, struct.pack(">H", len(name)) + name + b"\0\1")
    contexts = [(1, wire.CT, (wire.EXPLICIT,)), (3, COMMITMENT, (wire.IMPLICIT,))]
    with Wire(node.port) as peer:
        peer.send(wire.associate_rq(contexts, calling="CT1", user=role))
        kind, body = peer.read()
        assert kind == wire.ASSOCIATE_AC
        assert role in body


@pytest.mark.parametrize("also", [(), ((1, wire.CT, (wire.EXPLICIT,)),)], ids=["alone", "stores"])
@pytest.mark.parametrize("named", [COMMITMENT, CANARY], ids=["no action type", "no UID"])
def test_a_request_that_cannot_be_answered_is_aborted_and_not_quoted(
    node: Node, also: wire.Contexts, named: str
) -> None:
    """The requestor would wait for ever; pynetdicom would log what it was sent."""
    value = named.encode() + bytes(len(named) % 2)
    command = wire.element(0x0003, value) + wire.element(0x0100, struct.pack("<H", 0x0130))
    command += wire.element(0x0110, b"\1\0") + wire.element(0x0800, b"\1\1")
    command += wire.element(0x1001, INSTANCE.encode())
    command += wire.element(0x1008, b"\1\0") if named == CANARY else b""
    with Wire(node.port) as peer:
        contexts = [*also, (3, COMMITMENT, (wire.IMPLICIT,))]
        peer.send(wire.associate_rq(contexts, calling="CT1"))
        assert peer.read()[0] == wire.ASSOCIATE_AC
        peer.send(wire.p_data(3, 3, command))
        assert peer.read()[0] == wire.ABORT
    assert CANARY not in node.log


def test_a_data_set_for_a_service_beside_storage_is_bounded(node: Node) -> None:
    contexts = [(1, wire.CT, (wire.EXPLICIT,)), (3, COMMITMENT, (wire.IMPLICIT,))]
    command = wire.command(0x0130, sop_class=COMMITMENT, data_set=True)
    with Wire(node.port) as peer:
        peer.send(wire.associate_rq(contexts, calling="CT1"))
        assert peer.read()[0] == wire.ASSOCIATE_AC
        peer.send(wire.p_data(3, 3, command))
        with contextlib.suppress(ConnectionError):
            for _ in range(90):  # of 100 kB: 9 MB
                peer.send(wire.p_data(3, 0, bytes(100_000)))
        assert peer.read()[0] == wire.ABORT
