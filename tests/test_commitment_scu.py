"""Storage Commitment SCU: destinations commit what they accepted, however rude they are.

The service runs on a pynetdicom AE of its own, its destinations are pynetdicom SCPs and Orthanc;
for the whole node see test_commitment_node.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage, generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.dsutils import encode
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from dicomnode import scu
from dicomnode.cli import main
from dicomnode.commitment_messages import PUSH_MODEL_INSTANCE, event_information, read_report
from dicomnode.commitment_scu import CommitmentRequests, Waits
from dicomnode.config import NodeConfig
from dicomnode.history import History
from dicomnode.jobs import Jobs, Output
from dicomnode.journal import Arrival, Journal
from dicomnode.lifecycle import Delivery, Event, State
from dicomnode.promises import MOST_RESENDS, Promise, Promises
from dicomnode.scu import Address, send_instances
from dicomnode.tables import Database
from dicomnode.transactions import Result
from tests.certificates import OPENSSL, Authority
from tests.factories import ct_series, write_series
from tests.peers import ORTHANC, ROOT, free_port, needs, orthanc, wait_for
from tests.test_commitment import as_event, config, refused_or_harmless
from tests.test_commitment_node import call

pytestmark = pytest.mark.network

UIDS = ("2.1.1", "2.1.2", "2.1.3")
CT = str(CTImageStorage)
QUICK = Waits(report=2.0, first=0.3, longest=1.0)
PATIENT = Waits(report=0.1, first=600.0)
"""For tests in which nothing is repeated."""


class Delivered:
    """A journal with a derived series that has been delivered to `pacs`."""

    def __init__(
        self, folder: Path, uids: Sequence[str] = UIDS, refused: Mapping[str, int] | None = None
    ) -> None:
        """`refused`: companions that the destination did not take, and with which status."""
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.database = Database(folder / "journal.db")
        self.jobs, self.promises = Jobs(self.database), Promises(self.database)
        journal = Journal(self.database)
        facts = ("1.1", "1", "CT", CT, "1.2", "0" * 64, 1, "CT1", "DICOMNODE", None, None)
        journal.record_instance(Arrival("1.1.1", *facts), 1.0)
        (seen,) = journal.open_series()
        self.jobs.close_series(seen, "routed", [("r", "routine")], [], 1)
        job = self.jobs.claim(1)
        assert job is not None
        made = [Output("2.1", uid, CT) for uid in uids]
        self.jobs.derived(job, made, ["pacs"], {}, Event.DERIVED, 2)
        self.deliver(refused=refused)

    def deliver(
        self, now: float = 3.0, refused: Mapping[str, int] | None = None
    ) -> tuple[str, ...]:
        """Send what is due; the UIDs that were sent."""
        (due,) = self.jobs.due_deliveries(now)
        assert self.jobs.begin(due.id)
        self.jobs.accepted(due.id, dict.fromkeys(due.remaining, 0) | dict(refused or {}), now)
        self.jobs.delivered(due, "", now)
        return due.remaining

    @property
    def state(self) -> Promise | None:
        found = self.promises.state(1)
        return found[0] if found else None

    @property
    def detail(self) -> str:
        found = self.promises.state(1)
        return found[1] if found else ""

    def wait(self, state: Promise, seconds: float = 30) -> None:
        wait_for(lambda: self.state is state, f"{state}, not {self.state}", seconds)

    def timeline(self) -> str:
        series = History(self.database).one_series("1.1")
        assert series is not None
        return "\n".join(event["text"] for event in series["timeline"])


@pytest.fixture
def delivered(tmp_path: Path) -> Iterator[Delivered]:
    made = Delivered(tmp_path / "data")
    yield made
    made.database.close()


class Service:
    """`CommitmentRequests` behind a listening AE, with the thread that a node would give it."""

    def __init__(
        self,
        settings: NodeConfig,
        waits: Waits = QUICK,
        port: int = 0,
        busy: Mapping[str, int] | None = None,
    ) -> None:
        self.database = Database(settings.node.data_dir / "journal.db")
        self.service = CommitmentRequests(
            settings, self.database, lambda ae, _: settings.peer_by_title(ae), waits
        )
        self.busy = dict(busy or {})
        entity = AE(settings.node.ae_title)
        for uid in self.service.contexts:
            entity.add_supported_context(uid, scu_role=True, scp_role=True)
        self._server: Any = entity.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=self.service.handlers
        )
        self.port = int(self._server.server_address[1])
        self._stop = threading.Event()
        self.service.recover(time.time())
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.service.step(self.busy, time.time())

    def stop(self) -> None:
        self._stop.set()
        self.service.stop(5)
        self.thread.join()
        self._server.shutdown()
        self.database.close()


class Pacs:
    """A Storage Commitment SCP that does what it is told."""

    def __init__(
        self,
        statuses: Sequence[int] = (),
        reports: Sequence[Mapping[str, int]] = (),
        port: int = 0,
        secure: ssl.SSLContext | None = None,
    ) -> None:
        """`statuses`: of its answers to N-ACTION; Success afterwards.

        `reports`: what it sends on the association on which it is asked, FailureReasons by
        instance, one for each request; nothing afterwards.
        """
        self.asked: list[tuple[str, list[tuple[str, str]]]] = []
        self.answers: list[int] = []
        self.associations = 0
        self.abort = False
        self.mute = threading.Event()
        self._statuses, self._reports = list(statuses), list(reports)
        entity = AE("PACS")
        entity.add_supported_context(StorageCommitmentPushModel)
        handlers: list[Any] = [
            (evt.EVT_N_ACTION, self._on_action),
            (evt.EVT_ESTABLISHED, self._on_established),
        ]
        self._server: Any = entity.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=handlers, ssl_context=secure
        )
        self.port = int(self._server.server_address[1])

    def peers(self, **more: Any) -> dict[str, Any]:
        pacs = {"ae_title": "PACS", "host": "127.0.0.1", "port": self.port}
        other = {"ae_title": "OTHER", "host": "127.0.0.1"}
        return {"pacs": {**pacs, "storage_commitment": True, **more}, "other": other}

    def _on_established(self, _event: evt.Event) -> None:
        self.associations += 1

    def _on_action(self, event: evt.Event) -> tuple[int, None]:
        if self.abort:
            event.assoc.abort()
        if self.mute.is_set():
            wait_for(lambda: not event.assoc.is_established, "the asker to give up", 30)
        information = event.action_information
        references = [
            (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
            for item in information.ReferencedSOPSequence
        ]
        self.asked.append((str(information.TransactionUID), references))
        status = self._statuses.pop(0) if self._statuses else 0
        if status == 0 and self._reports:
            arguments = (event.assoc, self.asked[-1], self._reports.pop(0))
            threading.Thread(target=self._report_on_same, args=arguments).start()
        return status, None

    def _report_on_same(
        self, association: Any, asked: tuple[str, list[tuple[str, str]]], failures: Any
    ) -> None:
        time.sleep(0.3)  # so that the response to N-ACTION is out: nothing says when it is
        self.answers.append(send(association, asked[0], results_of(asked[1], failures)))

    def stop(self) -> None:
        self._server.shutdown()


def results_of(references: Sequence[tuple[str, str]], failures: Any = None) -> list[Result]:
    return [(sop, instance, (failures or {}).get(instance, 0)) for sop, instance in references]


def send(association: Any, uid: str, results: Sequence[Result], event_type: int = 0) -> int:
    """Report; the status of the answer."""
    kind = event_type or (2 if any(failure for _, _, failure in results) else 1)
    arguments = (kind, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE)
    status, _ = association.send_n_event_report(event_information(uid, results), *arguments)
    return int(status.Status)


def report(
    port: int,
    uid: str,
    results: Sequence[Result],
    *,
    title: str = "PACS",
    event_type: int = 0,
    role: bool = True,
) -> int:
    """Call the node back, as an SCP that says so, or one that does not."""
    entity = AE(title)
    entity.add_requested_context(StorageCommitmentPushModel)
    roles = [build_role(StorageCommitmentPushModel, scp_role=True)] if role else []
    association: Any = entity.associate("127.0.0.1", port, ae_title="DICOMNODE", ext_neg=roles)
    assert association.is_established
    (context,) = association.accepted_contexts
    if not role:  # the library does not let an SCU report; such peers exist all the same
        context._as_scp = True
    assert context.as_scp
    try:
        return send(association, uid, results, event_type)
    finally:
        association.release()


@contextlib.contextmanager
def serving(
    delivered: Delivered, peers: dict[str, Any], waits: Waits = QUICK, **options: Any
) -> Iterator[Service]:
    service = Service(config(delivered.folder, peers), waits, **options)
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    peer = Pacs()
    yield peer
    peer.stop()


def test_a_report_on_the_same_association_commits_the_delivery(delivered: Delivered) -> None:
    pacs = Pacs(reports=[{}])
    with serving(delivered, pacs.peers(), Waits(report=20)):
        delivered.wait(Promise.COMMITTED)
        wait_for(lambda: pacs.answers, "its answer")
    pacs.stop()
    assert [references for _, references in pacs.asked] == [[(CT, uid) for uid in UIDS]]
    assert (pacs.answers, pacs.associations) == ([0], 1)
    assert "commitment of delivery 1 by pacs committed: 3 instances" in delivered.timeline()
    assert delivered.jobs.in_state(State.DONE) == [1]


@pytest.mark.parametrize("role", [True, False])
def test_a_peer_that_calls_back_is_believed(delivered: Delivered, pacs: Pacs, role: bool) -> None:
    """With role selection (PS3.7 D.3.3.4) or, as some do, without."""
    with serving(delivered, pacs.peers(), PATIENT) as service:
        delivered.wait(Promise.ASKED)
        ((uid, references),) = pacs.asked
        assert report(service.port, uid, results_of(references), role=role) == 0
        assert delivered.state is Promise.COMMITTED


def test_the_association_is_held_only_while_a_report_may_come(
    delivered: Delivered, pacs: Pacs
) -> None:
    with serving(delivered, pacs.peers(), Waits(report=600)) as service:
        delivered.wait(Promise.ASKED)
        assert service.service.asking() == {"pacs"}
        ((uid, references),) = pacs.asked
        assert report(service.port, uid, results_of(references)) == 0
        wait_for(lambda: not service.service.asking(), "the release", 30)


def test_only_what_was_accepted_is_to_be_committed(tmp_path: Path, pacs: Pacs) -> None:
    """A companion that the destination did not take holds nothing up, now as before."""
    delivered = Delivered(tmp_path / "data", refused={UIDS[2]: 0x0122})
    with serving(delivered, pacs.peers(), PATIENT) as service:
        delivered.wait(Promise.ASKED)
        ((uid, references),) = pacs.asked
        assert [instance for _, instance in references] == list(UIDS[:2])
        assert report(service.port, uid, results_of(references)) == 0
        assert delivered.state is Promise.COMMITTED
    delivered.database.close()


def test_without_a_report_it_is_asked_again_and_either_report_counts_once(
    delivered: Delivered, pacs: Pacs
) -> None:
    with serving(delivered, pacs.peers(), Waits(report=0.1, first=0.3, longest=0.3)) as service:
        wait_for(lambda: len(pacs.asked) >= 3, "two more requests", 30)
        (first, references), (second, _) = pacs.asked[:2]
        assert first != second
        assert "no report in time" in delivered.detail or delivered.state is Promise.ASKED
        assert report(service.port, first, results_of(references)) == 0
        assert delivered.state is Promise.COMMITTED
        assert report(service.port, second, results_of(references)) == 0  # known, and settled
        assert report(service.port, first, results_of(references, {UIDS[0]: 0x0112})) == 0
        asked = len(pacs.asked)
        wait_for(lambda: not service.service.asking(), "the last association to end", 30)
        assert len(pacs.asked) <= asked + 1  # one that was on its way
    assert delivered.state is Promise.COMMITTED
    assert delivered.timeline().count("by pacs committed") == 1


def test_what_was_not_asked_is_not_believed(delivered: Delivered, pacs: Pacs) -> None:
    with serving(delivered, pacs.peers(), PATIENT) as service:
        delivered.wait(Promise.ASKED)
        ((uid, references),) = pacs.asked
        results = results_of(references)
        assert report(service.port, generate_uid(), results) == 0x0115
        assert report(service.port, uid, results, title="OTHER") == 0x0115
        assert report(service.port, uid, results, title="STRANGER") == 0x0115
        assert report(service.port, uid, results, event_type=3) == 0x0113
        assert delivered.state is Promise.ASKED
        assert report(service.port, uid, results) == 0


def test_without_a_journal_a_report_is_not_taken(delivered: Delivered, pacs: Pacs) -> None:
    """0x0213: the peer may try again."""
    with serving(delivered, pacs.peers(), PATIENT) as service:
        delivered.wait(Promise.ASKED)
        ((uid, references),) = pacs.asked
        with delivered.database.write() as db:
            db.exec_driver_sql("ALTER TABLE promise_requests RENAME TO lost")
        status = report(service.port, uid, results_of(references))
        with delivered.database.write() as db:
            db.exec_driver_sql("ALTER TABLE lost RENAME TO promise_requests")
        assert status == 0x0213
        assert report(service.port, uid, results_of(references)) == 0


def test_what_is_not_committed_is_sent_again_and_then_committed(delivered: Delivered) -> None:
    pacs = Pacs(reports=[{UIDS[1]: 0x0112}, {}])
    with serving(delivered, pacs.peers()):
        delivered.wait(Promise.RESENDING)
        assert delivered.jobs.in_state(State.SENDING) == [1]
        assert not delivered.jobs.due_deliveries(time.time() - 30)  # it gets a moment
        sent = wait_for(lambda: delivered.jobs.due_deliveries(time.time()), "the delivery", 30)
        assert sent[0].remaining == (UIDS[1],)
        assert delivered.deliver(time.time()) == (UIDS[1],)
        delivered.wait(Promise.COMMITTED)
    pacs.stop()
    assert [len(references) for _, references in pacs.asked] == [3, 3]
    assert "1 of 3 instances not committed (0x0112); they are sent again" in delivered.timeline()
    assert delivered.jobs.in_state(State.DONE) == [1]


def send_again(delivered: Delivered) -> None:
    wait_for(lambda: delivered.jobs.due_deliveries(time.time()), "the delivery", 30)
    delivered.deliver(time.time())


def test_what_is_never_committed_is_parked_with_the_reason_and_may_be_retried(
    delivered: Delivered, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {UIDS[0]: 0x0110, UIDS[2]: 0x0213}
    pacs = Pacs(reports=[lost] * (MOST_RESENDS + 1) + [{}])
    config_file = delivered.folder.parent / "config.yaml"
    config_file.write_text(f"node: {{data_dir: {delivered.folder}}}\nroutes: []\n")

    def run(*words: str) -> tuple[int, str]:
        code = main([words[0], "--config", str(config_file), *words[1:]])
        said = capsys.readouterr()
        return code, said.out + said.err

    with serving(delivered, pacs.peers(), Waits(report=2, first=0.05, longest=60)):
        for _ in range(MOST_RESENDS):
            delivered.wait(Promise.RESENDING)
            send_again(delivered)
        delivered.wait(Promise.PARKED)
        assert delivered.detail == "2 of 3 instances not committed (0x0110, 0x0213); sent 3 times"
        assert delivered.jobs.deliveries_in_state(Delivery.DELIVERED) == [1]
        assert f"delivery 1 to pacs, not committed, parked: {delivered.detail}" in run("status")[1]
        listed = json.loads(run("status", "--json")[1])
        assert [one["delivery"] for one in listed["commitment_requests"]] == [1]
        assert listed["counts"]["commitment_requests"] == {"parked": 1}
        assert run("retry", "delivery-1") == (0, "delivery 1 queued again\n")
        delivered.wait(Promise.COMMITTED)
    pacs.stop()
    assert "delivered, 3 of 3 accepted; committed" in run("status", "1.1")[1]
    assert run("retry", "delivery-1")[0] == 1


def test_a_result_of_another_class_is_not_sent_again(delivered: Delivered) -> None:
    pacs = Pacs(reports=[{UIDS[0]: 0x0119}])
    with serving(delivered, pacs.peers()):
        delivered.wait(Promise.PARKED)
    pacs.stop()
    assert delivered.detail == "1 of 3 instances not committed (0x0119)"
    assert delivered.jobs.in_state(State.DONE) == [1]


def test_an_instance_that_the_report_does_not_name_is_not_committed(
    delivered: Delivered, pacs: Pacs
) -> None:
    with serving(delivered, pacs.peers(), PATIENT) as service:
        delivered.wait(Promise.ASKED)
        ((uid, references),) = pacs.asked
        assert report(service.port, uid, results_of(references[:2])) == 0
        assert delivered.state is Promise.RESENDING
        assert "1 of 3 instances not committed (0x0110)" in delivered.detail


def test_a_peer_that_is_busy_is_asked_again_and_one_that_refuses_is_not(
    delivered: Delivered,
) -> None:
    pacs = Pacs(statuses=[0x0213, 0x0110, 0x0124])
    with serving(delivered, pacs.peers()):
        delivered.wait(Promise.PARKED)
    pacs.stop()
    assert len({uid for uid, _ in pacs.asked}) == 3
    assert delivered.detail == "N-ACTION was answered with 0x0124"


def test_a_peer_that_does_not_commit_is_parked(delivered: Delivered) -> None:
    entity = AE("PACS")
    entity.add_supported_context("1.2.840.10008.1.1")
    server: Any = entity.start_server(("127.0.0.1", 0), block=False)
    pacs = {"ae_title": "PACS", "host": "127.0.0.1", "port": int(server.server_address[1])}
    with serving(delivered, {"pacs": {**pacs, "storage_commitment": True}}):
        delivered.wait(Promise.PARKED)
    server.shutdown()
    assert "accepted no presentation context" in delivered.detail


def test_a_peer_that_aborts_or_never_answers_is_asked_again(
    delivered: Delivered, pacs: Pacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scu, "_RESPONSE_SECONDS", 1)
    pacs.abort = True
    with serving(delivered, pacs.peers()) as service:
        wait_for(lambda: "no answer to N-ACTION" in delivered.detail, "the abort", 30)
        pacs.mute.set()
        pacs.abort = False
        before = pacs.associations
        wait_for(lambda: pacs.associations > before + 1, "two more tries", 60)
        assert delivered.state is Promise.ASKING
        pacs.mute.clear()
        delivered.wait(Promise.ASKED)
        uid, references = pacs.asked[-1]
        assert report(service.port, uid, results_of(references)) == 0


def test_a_peer_that_is_away_is_asked_when_it_is_back(delivered: Delivered) -> None:
    port = free_port()
    peers = {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": port}}
    peers["pacs"]["storage_commitment"] = True
    with serving(delivered, peers):
        wait_for(lambda: "no association" in delivered.detail, "the first attempt to fail", 30)
        assert delivered.state is Promise.ASKING
        pacs = Pacs(port=port, reports=[{}])
        delivered.wait(Promise.COMMITTED)
        pacs.stop()


@pytest.mark.parametrize("listens", [True, False])
def test_what_is_asked_in_vain_for_too_long_is_parked(
    delivered: Delivered, pacs: Pacs, listens: bool
) -> None:
    address = {} if listens else {"port": free_port()}
    with serving(delivered, pacs.peers(retry_for_hours=0, **address)):
        delivered.wait(Promise.PARKED)
    why = "no report in time" if listens else "no association"
    assert re.match(rf"given up after \d requests: .*{why}", delivered.detail)


def test_no_more_associations_are_opened_than_the_peer_takes(
    delivered: Delivered, pacs: Pacs
) -> None:
    with serving(delivered, pacs.peers(max_associations=1), busy={"pacs": 1}) as service:
        delivered.wait(Promise.ASKING)
        looks = iter(range(20))
        wait_for(lambda: next(looks) == 10 or service.service.asking(), "ten looks", 30)
        assert not pacs.asked
        service.busy.clear()
        delivered.wait(Promise.ASKED)


@needs(OPENSSL)
def test_a_peer_with_tls_is_asked_over_tls(delivered: Delivered, tmp_path: Path) -> None:
    """It takes TLS only, and only with a certificate of ours that it knows."""
    authority = Authority(tmp_path / "pki").create()
    theirs, node = authority.sign("pacs"), authority.sign("node")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.cert))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(theirs.cert, theirs.key)
    pacs = Pacs(secure=context, reports=[{}])
    ours = {"ca": str(authority.cert), "cert": str(node.cert), "key": str(node.key)}
    with serving(delivered, pacs.peers(tls=ours), Waits(report=20)):
        delivered.wait(Promise.COMMITTED)
    pacs.stop()


def serve(folder: str, port: str, peers: str) -> None:
    """The service as a process of its own, until it is killed."""
    service = Service(config(Path(folder), json.loads(peers)), PATIENT, port=int(port))
    print("listening", flush=True)
    service.thread.join()


@pytest.mark.parametrize("after_restart", ["report", "ask again"])
def test_a_kill_between_request_and_report_loses_and_doubles_nothing(
    delivered: Delivered, pacs: Pacs, after_restart: str
) -> None:
    """kill -9 once the peer was asked; it reports on the first request, or on the one after."""
    own, peers = free_port(), json.dumps(pacs.peers())
    code = f"from tests.test_commitment_scu import serve; serve({str(delivered.folder)!r}, '{own}',"
    command = [sys.executable, "-c", f"{code} {peers!r})"]

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        return process

    process = start()
    wait_for(lambda: pacs.asked, "the first request", 30)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process = start()
    try:
        if after_restart == "ask again":
            wait_for(lambda: len(pacs.asked) > 1, "the request to be repeated", 40)
        uid, references = pacs.asked[-1]
        assert report(own, uid, results_of(references)) == 0
        assert report(own, uid, results_of(references)) == 0
    finally:
        process.kill()
        process.wait(20)
    assert delivered.state is Promise.COMMITTED
    assert delivered.timeline().count("by pacs committed") == 1


@pytest.mark.peers
@needs(ORTHANC)
def test_orthanc_commits_and_gets_again_what_it_lost(tmp_path: Path) -> None:
    files = sorted(write_series(ct_series(3, 32, 32), tmp_path / "derived"))
    uids = [str(dcmread(path).SOPInstanceUID) for path in files]
    by_uid = dict(zip(uids, files, strict=True))
    with orthanc(tmp_path / "orthanc") as archive:
        address = Address("127.0.0.1", archive.port, archive.ae_title, "DICOMNODE")

        def store(some: Sequence[str]) -> None:
            send_instances([by_uid[uid] for uid in some], address, lambda *_: None)

        store(uids[1:])  # all of it was acknowledged; Orthanc has lost one since
        delivered = Delivered(tmp_path / "data", uids)
        pacs = {"ae_title": archive.ae_title, "host": "127.0.0.1", "port": archive.port}
        with serving(
            delivered, {"pacs": {**pacs, "storage_commitment": True}}, busy={"pacs": 9}
        ) as s:
            node = {"AET": "DICOMNODE", "Host": "127.0.0.1", "Port": s.port}
            call(archive, "PUT", "modalities/node", node)
            s.busy.clear()
            delivered.wait(Promise.RESENDING)
            assert "1 of 3 instances not committed (0x0112)" in delivered.detail
            wait_for(lambda: delivered.jobs.due_deliveries(time.time()), "the delivery", 30)
            store(uids[:1])
            assert delivered.deliver(time.time()) == (uids[0],)
            delivered.wait(Promise.COMMITTED)
        assert len(archive.get("instances")) == 3
    delivered.database.close()


# the report, as bytes


def event_of(encoded: bytes) -> evt.Event:
    """A report whose event information is these bytes, as pynetdicom hands it over."""
    request = N_EVENT_REPORT()
    request.MessageID = 1
    request.AffectedSOPClassUID = StorageCommitmentPushModel
    request.AffectedSOPInstanceUID = PUSH_MODEL_INSTANCE
    request.EventTypeID = 2
    request.EventInformation = BytesIO(encoded)
    return as_event(request, evt.EVT_N_EVENT_REPORT)


_RESULTS: list[Result] = [("1.2", "1.3.1", 0), ("1.2", "1.3.2", 0x0112)]
_VALID = encode(event_information("1.2.3", _RESULTS), True, True) or b""


def test_a_report_is_read_as_it_was_written() -> None:
    assert read_report(event_of(_VALID)) == ("1.2.3", _RESULTS)


def _without_reason(dataset: Dataset) -> None:
    del dataset.FailedSOPSequence[0].FailureReason


def _zero(dataset: Dataset) -> None:
    dataset.FailedSOPSequence[0].FailureReason = 0


@pytest.mark.parametrize("change", [_without_reason, _zero])
def test_what_failed_without_a_reason_failed_all_the_same(
    change: Callable[[Dataset], None],
) -> None:
    information = event_information("1.2.3", _RESULTS)
    change(information)
    encoded = encode(information, True, True) or b""
    assert read_report(event_of(encoded))[1][1] == ("1.2", "1.3.2", 0x0110)


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_a_damaged_report_is_refused_or_harmless(data: st.DataObject) -> None:
    def read(message: bytes) -> list[str]:
        uid, results = read_report(event_of(message))
        return [uid, *chain.from_iterable((sop, instance) for sop, instance, _ in results)]

    refused_or_harmless(data, _VALID, read)
