"""The whole node with Orthanc: each commits what the other one stored; MPPS."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import CTImageStorage, generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import ModalityPerformedProcedureStep

from tests.factories import ct_series, write_series
from tests.peers import (
    ORTHANC,
    STORESCU,
    Archive,
    Node,
    needs,
    node_settings,
    orthanc,
    running_node,
    send,
    wait_for,
)
from tests.test_mpps import beginning, ending
from tests.test_walk import series_uid, source_instances

pytestmark = [pytest.mark.network, pytest.mark.peers, needs(ORTHANC)]


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with orthanc(tmp_path / "orthanc") as peer:
        yield peer


@pytest.fixture
def node(tmp_path: Path, models_dir: Path, archive: Archive) -> Iterator[Node]:
    settings = node_settings(models_dir, [archive], match={"Modality": "XX"})
    under_test = Node(tmp_path / "node", settings).start()
    address = {"AET": "DICOMNODE", "Host": "127.0.0.1", "Port": under_test.port}
    call(archive, "PUT", "modalities/node", address)
    yield under_test
    under_test.kill()
    print(under_test.log[-8000:])


def stored_by_orthanc(archive: Archive, folder: Path) -> tuple[str, list[str]]:
    """A CT series that Orthanc has sent to the node: its UID, and those of its instances."""
    files = sorted(write_series(ct_series(4, 32, 32), folder))
    for path in files:
        url = f"http://127.0.0.1:{archive.http}/instances"
        upload = urllib.request.Request(url, path.read_bytes(), method="POST")
        urllib.request.urlopen(upload, timeout=20).close()
    call(archive, "POST", "modalities/node/store", archive.get("instances"))
    return series_uid(files), sorted(source_instances(files))


def call(peer: Archive, method: str, path: str, body: Any) -> Any:
    """Orthanc's answer to a request with a JSON body."""
    http = urllib.request.Request(
        f"http://127.0.0.1:{peer.http}/{path}", json.dumps(body).encode(), method=method
    )
    with urllib.request.urlopen(http, timeout=20) as answer:
        return json.loads(answer.read() or b"null")


def request(peer: Archive, references: list[tuple[str, str]]) -> str:
    """Let Orthanc ask the node; where its report will be."""
    body = {"DicomInstances": [list(reference) for reference in references]}
    answer = call(peer, "POST", "modalities/node/storage-commitment", body)
    return str(answer["Path"]).lstrip("/")


def finished(peer: Archive, path: str) -> Any:
    """Orthanc's report once it is no longer pending."""
    wait_for(lambda: peer.get(path)["Status"] != "Pending", "Orthanc's report", 40)
    return peer.get(path)


def test_orthanc_has_committed_what_it_sent(node: Node, archive: Archive, tmp_path: Path) -> None:
    series, uids = stored_by_orthanc(archive, tmp_path / "source")
    path = request(archive, [(str(CTImageStorage), uid) for uid in uids])
    everything = finished(archive, path)
    assert everything["Status"] == "Success"
    assert sorted(item["SOPInstanceUID"] for item in everything["Success"]) == uids
    assert "storage commitment reported: orthanc" in str(node.status(series))


def test_a_request_survives_a_kill_and_names_what_was_never_sent(
    node: Node, archive: Archive, tmp_path: Path
) -> None:
    """The unknown instance makes the node wait before it checks: it is killed meanwhile."""
    _, uids = stored_by_orthanc(archive, tmp_path / "source")
    unknown = generate_uid()
    path = request(archive, [(str(CTImageStorage), uid) for uid in (*uids, unknown)])
    node.kill()
    assert archive.get(path)["Status"] == "Pending"
    node.start()
    report = finished(archive, path)
    assert report["Status"] == "Failure"
    assert sorted(item["SOPInstanceUID"] for item in report["Success"]) == uids
    failed = [(item["SOPInstanceUID"], item["FailureReason"]) for item in report["Failures"]]
    assert failed == [(unknown, 0x0112)]


@needs(STORESCU)
def test_a_completed_step_ends_the_waiting_for_its_series(tmp_path: Path, models_dir: Path) -> None:
    """The quiet times are far away: only the modality's word can complete the series."""
    settings = node_settings(
        models_dir, [], match={"Modality": "XX"}, quiet_seconds=500, quiet_seconds_if_released=500
    )
    files = sorted(write_series(ct_series(4, 32, 32), tmp_path / "source"))
    series, uids = series_uid(files), sorted(source_instances(files))
    with running_node(tmp_path / "node", settings) as node:
        modality, step = AE("CT1"), generate_uid()
        modality.add_requested_context(ModalityPerformedProcedureStep)
        association = modality.associate("127.0.0.1", node.port, ae_title="DICOMNODE")
        service = ModalityPerformedProcedureStep
        assert association.send_n_create(beginning(), service, step)[0].Status == 0
        assert send(STORESCU, files[:-1], node.port).returncode == 0
        done = ending("COMPLETED", {series: uids})
        assert association.send_n_set(done, service, step)[0].Status == 0
        association.release()
        assert node.status(series)["open"]  # one that the step names is not here yet
        assert send(STORESCU, files[-1], node.port).returncode == 0
        settled = node.wait_settled(series, 20)
    assert "complete: all announced instances are here (MPPS completed)" in str(settled)


def committing(models: Path, archive: Archive) -> dict[str, Any]:
    """Settings under which Orthanc gets every CT series, and is to commit the results."""
    settings = node_settings(models, [archive])
    settings["peers"]["orthanc"]["storage_commitment"] = True
    return settings


def commitment(node: Node, series: str) -> dict[str, Any]:
    """What became of the commitment of the one delivery of a series."""
    (job,) = node.status(series)["jobs"]
    (delivery,) = job["deliveries"]
    asked: dict[str, Any] = delivery["commitment"] or {"state": None}
    return asked


def introduce(archive: Archive, node: Node) -> None:
    """Orthanc learns where the node listens: it reports on an association of its own."""
    address = {"AET": "DICOMNODE", "Host": "127.0.0.1", "Port": node.port}
    call(archive, "PUT", "modalities/node", address)


@needs(STORESCU)
def test_orthanc_commits_once_though_the_node_was_killed_after_it_had_asked(
    tmp_path: Path, models_dir: Path, archive: Archive
) -> None:
    """Orthanc cannot report: it does not know the node. After kill -9 it does."""
    files = sorted(write_series(ct_series(4, 32, 32), tmp_path / "source"))
    series = series_uid(files)
    with running_node(tmp_path / "node", committing(models_dir, archive)) as node:
        assert send(STORESCU, files, node.port).returncode == 0
        node.wait_settled(series)
        wait_for(
            lambda: commitment(node, series)["state"] in ("asked", "asking"), "it is asked", 40
        )
        wait_for(lambda: "asking orthanc to commit" in node.log, "the request", 40)
        node.kill()
        introduce(archive, node)
        node.start()
        wait_for(lambda: commitment(node, series)["state"] == "committed", "Orthanc's report", 60)
        said = node.run("status", series).stdout
        assert "delivered, 4 of 4 accepted; committed" in said
        assert said.count("commitment of delivery 1 by orthanc committed: 4 instances") == 1
        assert "commitment requests: 1 committed" in node.run("status").stdout
        assert 'dicomnode_commitment_requests{state="committed"} 1.0' in node.get("metrics")[1]
        assert node.stop() == 0
    assert len(archive.get("instances")) == 4
