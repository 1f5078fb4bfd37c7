"""The acceptor of PS3.8 against its own table, against raw bytes and against pynetdicom."""

import contextlib
import hashlib
import os
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pynetdicom import AE, build_role, evt
from pynetdicom.fsm import TRANSITION_TABLE
from pynetdicom.sop_class import (
    CTImageStorage,
    PatientRootQueryRetrieveInformationModelFind,
    Verification,
)

from dicomnode.errors import OutOfResources
from dicomnode.segments import HEADROOM, LARGEST_BYTES
from dicomnode.spool import dataset_digest
from dicomnode.upper_layer import Library, Limits, Listener, Received, Requestor
from dicomnode.upper_layer.association import TRANSITIONS, Association
from dicomnode.upper_layer.dimse import read_command
from dicomnode.upper_layer.incoming import BLOCK, Incoming, file_meta
from dicomnode.upper_layer.negotiation import is_storage
from dicomnode.upper_layer.stream import room
from tests.fuzz import wire
from tests.fuzz.receiver import IDENTITY, STRANGER, Folder, data_set, listening
from tests.fuzz.wire import CT, EXPLICIT, IMPLICIT, VERIFICATION, Wire
from tests.peers import wait_for

pytestmark = pytest.mark.network

How = Literal["released", "aborted"]
LARGE = 12 * wire.p_data(3, 0, bytes(100_000))
"""Part of a data set that is not kept in memory."""


@pytest.fixture
def handler(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "kept")


@pytest.fixture
def listener(handler: Folder) -> Iterator[Listener]:
    listener = listening(handler)
    yield listener
    listener.drain(0)
    assert listener.associations == 0


@pytest.fixture
def open_wire(listener: Listener) -> Iterator[Wire]:
    """An association with Verification on context 1 and CT on context 3."""
    with Wire(listener.port) as peer:
        peer.associate()
        yield peer


# the table


def test_the_state_table_is_that_of_the_standard() -> None:
    ours = {
        (f"Evt{event}", f"Sta{state}"): action for (state, event), action in TRANSITIONS.items()
    }
    states = {state for _, state in ours}
    requestor_only = {"Evt1", "Evt2", "Evt11"}  # connect, release request: we never do
    theirs = {
        (event, state): action
        for (event, state), action in TRANSITION_TABLE.items()
        if state in states and event not in requestor_only
    }
    assert ours == theirs


# negotiation


def test_what_could_be_archived_is_accepted_and_the_rest_is_not() -> None:
    storage = [
        "1.2.840.10008.5.1.4.1.1.2",
        "1.2.840.10008.5.1.4.1.1.6",
        "1.3.46.670589.11.0.0.12.1",
    ]
    assert all(map(is_storage, [*storage, "1.2.840.10008.5.1.4.1.1.999.9"]))
    assert not any(map(is_storage, [VERIFICATION, wire.FIND, "1.2.840.10008.5.1.4.1.1.200.4"]))


def test_the_first_known_transfer_syntax_is_taken(listener: Listener) -> None:
    contexts = [
        (1, CT, ("1.2.3.4", "1.2.840.10008.1.2.4.90", IMPLICIT)),
        (3, CT, ("1.2.3.4",)),
        (5, "1.2.840.10008.5.1.4.34.4.1", (IMPLICIT,)),
        (7, "1.3.46.670589.11.0.0.12.1", (EXPLICIT,)),
    ]
    with Wire(listener.port) as peer:
        results = wire.context_results(peer.associate(contexts))
    assert results[1] == (0, "1.2.840.10008.1.2.4.90")
    assert (results[3][0], results[5][0], results[7][0]) == (4, 3, 0)


def test_a_class_that_the_peer_may_not_store_is_rejected(
    handler: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "allows", lambda _, sop_class: sop_class != CT)
    listener = listening(handler)
    with Wire(listener.port) as peer:
        results = wire.context_results(peer.associate())
    listener.drain(0)
    assert (results[1][0], results[3][0]) == (0, 1)


def test_roles_and_asynchronous_operations_are_answered(listener: Listener) -> None:
    ae = AE()
    ae.add_requested_context(CTImageStorage)
    both = build_role(CTImageStorage, scu_role=True, scp_role=True)
    association = ae.associate("127.0.0.1", listener.port, ext_neg=[both])
    roles = association.acceptor.role_selection[CTImageStorage]
    assert (roles.scu_role, roles.scp_role) == (True, False)
    association.release()
    window = wire.item(0x53, struct.pack(">HH", 8, 8))
    with Wire(listener.port) as peer:
        assert wire.item(0x53, struct.pack(">HH", 1, 1)) in peer.associate(user=window)


def test_a_peer_that_wants_to_be_scp_only_gets_no_context(listener: Listener) -> None:
    uid = CT.encode()
    role = wire.item(0x54, struct.pack(">H", len(uid)) + uid + bytes([0, 1]))
    with Wire(listener.port) as peer:
        assert wire.context_results(peer.associate(user=role))[3][0] == 1


def test_items_that_nobody_knows_are_ignored(listener: Listener) -> None:
    with Wire(listener.port) as peer:
        peer.associate(user=wire.item(0x99, b"?" * 50) + wire.item(0x58, b"\1\0\0\1a\0\0"))
        assert peer.echo() == 0


@pytest.mark.parametrize(
    ("request_pdu", "why"),
    [
        (wire.associate_rq(calling=STRANGER), (1, 1, 3)),
        (wire.associate_rq(application="1.2.3"), (1, 1, 2)),
        (wire.associate_rq(version=2), (1, 2, 2)),
    ],
    ids=["calling AE", "application context", "protocol version"],
)
def test_who_may_not_associate_is_told_why(
    listener: Listener, handler: Folder, request_pdu: bytes, why: tuple[int, int, int]
) -> None:
    with Wire(listener.port) as peer:
        assert peer.ask(request_pdu) == (wire.ASSOCIATE_RJ, bytes([0, *why]))
    assert handler.ends == []


def test_one_association_too_many_is_told_to_come_back(handler: Folder) -> None:
    listener = listening(handler, associations=1)
    with Wire(listener.port) as first, Wire(listener.port) as second:
        first.associate()
        assert second.ask(wire.associate_rq()) == (wire.ASSOCIATE_RJ, bytes([0, 2, 3, 2]))
        first.ask(wire.RELEASE_RQ_PDU)
    with Wire(listener.port) as third:
        third.associate()
    listener.drain(0)


def test_rejected_strangers_take_no_place(handler: Folder) -> None:
    listener = listening(handler, associations=1)
    for _ in range(3):
        with Wire(listener.port) as stranger:
            stranger.ask(wire.associate_rq(calling=STRANGER))
    with Wire(listener.port) as peer:
        peer.associate()
    listener.drain(0)


def test_other_services_reach_the_library_untouched(listener: Listener) -> None:
    ae = AE()
    ae.add_requested_context(PatientRootQueryRetrieveInformationModelFind)
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", listener.port)
    assert association.is_established
    assert listener.associations == 1
    assert association.send_c_echo().Status == 0
    assert association.acceptor.implementation_class_uid != IDENTITY.implementation_class_uid
    association.release()


def test_a_huge_length_does_not_reach_the_library(listener: Listener) -> None:
    with Wire(listener.port) as peer:
        peer.associate([(1, wire.FIND, (IMPLICIT,))])
        peer.send(wire.pdu(wire.P_DATA, b"", 0xFFFFFFFF))
        kind, _ = peer.read()
        assert kind in (0, wire.ABORT)


FLOOD = [(1, wire.VERIFICATION, (IMPLICIT,)), (3, wire.FIND, (IMPLICIT,))]


@contextlib.contextmanager
def slow_library(handler: Folder) -> Iterator[tuple[Listener, threading.Event, list[int]]]:
    """A listener whose library answers the first C-ECHO only when the event is set; the requests
    that it has begun to serve."""
    free, begun = threading.Event(), list[int]()

    def on_echo(_event: evt.Event) -> int:
        begun.append(len(begun))
        free.wait(30)
        return 0x0000

    entity = AE("DICOMNODE")
    entity.add_supported_context(Verification)
    entity.add_supported_context(PatientRootQueryRetrieveInformationModelFind)
    library = Library(entity, [(evt.EVT_C_ECHO, on_echo)], Limits())
    listener = Listener(
        ("127.0.0.1", 0),
        handler,
        identity=IDENTITY,
        limits=Limits(),
        max_associations=8,
        library=library,
    )
    listener.start()
    try:
        yield listener, free, begun
    finally:
        free.set()
        listener.drain(0)


def test_a_flood_of_unanswered_requests_ends_the_library_association(handler: Folder) -> None:
    """pynetdicom reads on while a handler is busy, and keeps all that comes in memory."""
    with slow_library(handler) as (listener, _, begun), Wire(listener.port) as peer:
        peer.associate(FLOOD)
        peer.send(wire.p_data(1, 3, wire.ECHO_RQ) * 500)
        assert peer.read()[0] == wire.ABORT
        assert begun == [0]


def test_64_requests_at_a_time_are_answered(handler: Folder) -> None:
    with slow_library(handler) as (listener, free, _), Wire(listener.port) as peer:
        peer.associate(FLOOD)
        peer.send(wire.p_data(1, 3, wire.ECHO_RQ) * 64)
        free.set()
        answers = [peer.read() for _ in range(64)]
        assert {kind for kind, _ in answers} == {wire.P_DATA}


# messages


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 131_066])
def test_a_data_set_is_kept_as_received_in_fragments_of_any_size(
    open_wire: Wire, handler: Folder, size: int
) -> None:
    sent = data_set(200 if size < 10 else 600_000)
    assert open_wire.status(wire.store(sent, size=size)) == (0x8001, 0, "")
    (path,) = handler.kept()
    requestor, received = handler.received[0]
    assert received.sha256 == hashlib.sha256(sent).hexdigest() == dataset_digest(path)[0]
    assert (received.size, received.file_size) == (len(sent), path.stat().st_size)
    assert path.read_bytes().endswith(sent)
    assert (requestor.calling_ae, requestor.called_ae) == ("WIRE", "DICOMNODE")


def test_many_large_data_sets_are_hashed_as_they_are_sent(open_wire: Wire, handler: Folder) -> None:
    """They are gathered in one block, which serves them all."""
    for number in range(6):
        sent = os.urandom(4_194_304 + 40 * (number % 2))
        assert open_wire.status(wire.store(sent, f"1.2.{number}", 131_000))[1] == 0
        digest = hashlib.sha256(sent).hexdigest()
        path = next(path for path in handler.kept() if path.name.startswith(f"1.2.{number}."))
        assert handler.received[-1][1].sha256 == digest == dataset_digest(path)[0]


def test_a_pdu_of_two_fragments_among_others_is_two_fragments(
    open_wire: Wire, handler: Folder
) -> None:
    one, two = (wire.pdv(3, 0, os.urandom(50)) for _ in range(2))
    values = [one, two, one + two, two, two + one + one, one]
    data = b"".join(wire.pdu(wire.P_DATA, value) for value in values)
    open_wire.status(wire.p_data(3, 3, wire.store_rq()) + data + wire.p_data(3, 2, b"end"))
    fragments = {one: one[6:], two: two[6:]}
    sent = b"".join(fragments[o] for o in (one, two, one, two, two, two, one, one, one)) + b"end"
    assert handler.received[0][1].sha256 == hashlib.sha256(sent).hexdigest()


@pytest.mark.parametrize(
    "stray",
    [
        wire.p_data(1, 0, bytes(100)),
        wire.p_data(5, 0, bytes(100)),
        wire.p_data(3, 1, bytes(100)),
        wire.p_data(3, 0, bytes(5000)),
        wire.pdu(wire.P_DATA, struct.pack(">LBB", 200, 3, 0) + bytes(100)),
        wire.pdu(wire.P_DATA, struct.pack(">LBB", 1, 3, 0)),
        wire.pdu(9, struct.pack(">LBB", 102, 3, 0) + bytes(100)),
    ],
    ids=["context", "no context", "command", "too long", "longer", "empty", "type"],
)
def test_a_stray_pdu_among_many_is_found(handler: Folder, stray: bytes) -> None:
    """They come at once, so that those before it are taken together."""
    listener = listening(handler, Limits(max_pdu_bytes=4096, artim_seconds=2))
    fragments = wire.p_data(3, 0, bytes(100)) * 20
    message = wire.p_data(3, 3, wire.store_rq()) + fragments + stray + fragments
    with Wire(listener.port) as peer:
        peer.associate()
        assert peer.ask(message + wire.p_data(3, 2, b"")) == (wire.ABORT, ANY)
    listener.drain(0)
    assert handler.half() == handler.kept() == []


def test_the_file_says_where_it_came_from(open_wire: Wire, handler: Folder) -> None:
    open_wire.status(wire.store(data_set(), "1.2.3.45"))
    meta = dcmread(handler.kept()[0]).file_meta
    assert meta.MediaStorageSOPClassUID == CT
    assert meta.MediaStorageSOPInstanceUID == "1.2.3.45"
    assert meta.TransferSyntaxUID == EXPLICIT
    assert meta.ImplementationClassUID == IDENTITY.implementation_class_uid
    assert meta.SourceApplicationEntityTitle == "WIRE"


@settings(deadline=None, max_examples=60)
@given(cuts=st.lists(st.integers(1, 400), max_size=12), whole=st.booleans())
def test_cut_a_message_as_you_like_and_it_is_the_same(
    session_port: int, cuts: list[int], whole: bool
) -> None:
    """Command and data set in any number of PDVs per PDU, sent in any number of pieces."""
    command, data = wire.store_rq(), data_set(100)
    values = [wire.pdv(3, 1, command[:20]), wire.pdv(3, 3, command[20:])]
    values += [wire.pdv(3, 0, data[at : at + 97]) for at in range(0, len(data), 97)]
    values += [wire.pdv(3, 2, b"")]
    if whole:
        stream = wire.pdu(wire.P_DATA, b"".join(values))
    else:
        stream = b"".join(wire.pdu(wire.P_DATA, value) for value in values)
    with Wire(session_port) as peer:
        peer.associate()
        for cut in cuts:
            peer.send(stream[:cut])
            stream = stream[cut:]
        assert peer.status(stream + wire.p_data(1, 3, wire.ECHO_RQ))[:2] == (0x8001, 0)
        assert wire.read_response(peer.read()[1][6:])[:2] == (0x8030, 0)


@pytest.fixture(scope="module")
def session_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    listener = listening(Folder(tmp_path_factory.mktemp("any"), drop=True))
    yield listener.port
    listener.drain(0)


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (wire.p_data(3, 3, wire.command(0x30, sop_class=CT)), 0x0211),
        (wire.p_data(1, 3, wire.command(0x20, sop_class=VERIFICATION)), 0x0211),
        (wire.p_data(3, 3, wire.store_rq(sop_class="1.2.3")) + wire.p_data(3, 2, b"ab"), 0x0122),
        (wire.p_data(3, 3, wire.store_rq("")) + wire.p_data(3, 2, b"ab"), 0x0117),
        (wire.p_data(3, 3, wire.store_rq("../../etc/x")) + wire.p_data(3, 2, b"ab"), 0x0117),
        (wire.p_data(3, 3, wire.store_rq("1." * 5000)) + wire.p_data(3, 2, b"ab"), 0x0117),
        (wire.p_data(3, 3, wire.command(1, sop_instance="1.2")), 0xC000),
    ],
    ids=["echo on CT", "find", "class", "no UID", "path", "long UID", "no data set"],
)
def test_what_we_cannot_do_is_answered_and_the_association_lives(
    open_wire: Wire, handler: Folder, message: bytes, status: int
) -> None:
    assert open_wire.status(message)[1] == status
    assert open_wire.echo() == 0
    assert handler.kept() == handler.half() == []


def test_a_cancel_is_not_answered(open_wire: Wire) -> None:
    elements = wire.element(0x0100, b"\xff\x0f") + wire.element(0x0120, b"\1\0")
    elements += wire.element(0x0800, b"\1\1")
    open_wire.send(wire.p_data(3, 3, elements))
    assert open_wire.echo() == 0


def test_an_answer_fits_the_longest_pdu_that_the_peer_takes(listener: Listener) -> None:
    with Wire(listener.port) as peer:
        peer.associate(max_length=40)
        peer.send(wire.p_data(1, 3, wire.ECHO_RQ))
        answer, last = b"", False
        while not last:
            kind, body = peer.read()
            assert kind == wire.P_DATA
            assert len(body) <= 40
            answer, last = answer + body[6:], bool(body[5] & 2)
    assert wire.read_response(answer)[:2] == (0x8030, 0)
    assert read_command(answer).is_response


def test_a_refused_data_set_is_read_away(
    open_wire: Wire, handler: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> Path:
        raise OutOfResources("no room")

    monkeypatch.setattr(handler, "part_path", full)
    assert open_wire.status(wire.store(data_set(500_000))) == (0x8001, 0xA700, "no room")
    monkeypatch.undo()
    assert open_wire.status(wire.store(data_set()))[1] == 0


def test_a_disk_that_refuses_in_the_middle_is_out_of_resources(
    open_wire: Wire, handler: Folder
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        field, status, comment = open_wire.status(wire.store(data_set(300_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (field, status, comment) == (0x8001, 0xA700, "could not store: File too large")
    assert handler.half() == handler.kept() == []
    assert open_wire.status(wire.store(data_set(300_000)))[1] == 0


def test_a_data_set_beyond_the_limit_is_refused(handler: Folder) -> None:
    listener = listening(handler, Limits(max_data_set_bytes=10_000))
    with Wire(listener.port) as peer:
        peer.associate()
        assert peer.status(wire.store(data_set(500_000)))[1] == 0xA700
        assert peer.status(wire.store(data_set(10)))[1] == 0
    listener.drain(0)
    assert handler.half() == []


def test_what_the_handler_refuses_is_answered_in_64_characters(
    open_wire: Wire, handler: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(requestor: Requestor, received: Received) -> tuple[int, str]:
        raise OutOfResources("the disk of this node is full\\ " * 5)

    monkeypatch.setattr(handler, "store", refuse)
    field, status, comment = open_wire.status(wire.store(data_set()))
    assert (field, status) == (0x8001, 0xA700)
    assert 60 <= len(comment) <= 64
    assert "\\" not in comment
    assert handler.half() == []


def test_a_bug_in_the_handler_aborts_and_leaves_nothing(
    open_wire: Wire, listener: Listener, handler: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(requestor: Requestor, received: Received) -> tuple[int, str]:
        raise ZeroDivisionError

    monkeypatch.setattr(handler, "store", fail)
    assert open_wire.ask(wire.store(data_set()))[0] == wire.ABORT
    wait_for(lambda: handler.ends == [("WIRE", "aborted")], "the association to end", 5)
    assert handler.half() == []
    with Wire(listener.port) as peer:
        peer.associate()


# ends


def test_a_release_is_answered_and_told(open_wire: Wire, handler: Folder) -> None:
    assert open_wire.ask(wire.RELEASE_RQ_PDU) == (wire.RELEASE_RP, bytes(4))
    assert handler.ends == [("WIRE", "released")]


@pytest.mark.parametrize("how", ["abort", "close", "release"])
def test_an_end_inside_a_data_set_leaves_no_file(
    open_wire: Wire, listener: Listener, handler: Folder, how: str
) -> None:
    open_wire.send(wire.p_data(3, 3, wire.store_rq()) + LARGE)
    wait_for(handler.half, "the file to begin", 5)
    if how == "close":
        open_wire.socket.close()
    else:
        open_wire.send(wire.ABORT_PDU if how == "abort" else wire.RELEASE_RQ_PDU)
    wait_for(lambda: handler.ends == [("WIRE", "aborted")], "the association to end", 5)
    assert handler.half() == handler.kept() == []
    assert listener.associations == 0


def test_a_silent_association_is_aborted_when_its_time_is_up(
    handler: Folder, listener: Listener
) -> None:
    with Wire(listener.port) as peer:
        peer.associate()
        assert peer.read() == (wire.ABORT, bytes(4))
    assert handler.ends == [("WIRE", "aborted")]


def test_drain_lets_associations_end_and_aborts_the_rest(handler: Folder) -> None:
    listener = listening(handler)
    with Wire(listener.port) as peer:
        peer.associate()
        peer.send(wire.p_data(3, 3, wire.store_rq()) + LARGE)
        wait_for(handler.half, "the file to begin", 5)
        listener.drain(0.3)
        assert peer.read() == (wire.ABORT, bytes(4))
    assert handler.half() == []
    assert handler.ends == [("WIRE", "aborted")]
    assert listener.port == 0


def test_drain_waits_for_messages_and_not_for_silent_peers(
    handler: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.upper_layer.listener._SILENT_SECONDS", 0.5)
    listener = listening(handler)
    draining = threading.Thread(target=listener.drain, args=(30,))
    with Wire(listener.port) as silent, Wire(listener.port) as working:
        whole = wire.store(bytes(200_000), "1.2.3")
        silent.associate()
        assert silent.echo() == 0
        working.associate()
        working.send(whole[:100_000])
        draining.start()
        assert silent.read() == (wire.ABORT, bytes(4))
        assert draining.is_alive()
        assert working.status(whole[100_000:])[1] == 0
        assert working.ask(wire.RELEASE_RQ_PDU)[0] == wire.RELEASE_RP
        draining.join(10)  # neither has closed its connection
    assert not draining.is_alive()
    assert sorted(handler.ends) == [("WIRE", "aborted"), ("WIRE", "released")]


def test_drain_lets_the_answer_to_a_release_go_out(
    handler: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the node takes to note the end."""
    listener, noted = listening(handler), threading.Event()
    ended = handler.ended

    def slow(requestor: Requestor, how: How) -> None:
        noted.wait(10)
        ended(requestor, how)

    monkeypatch.setattr(handler, "ended", slow)
    draining = threading.Thread(target=listener.drain, args=(30,))
    with Wire(listener.port) as peer:
        peer.associate()
        peer.send(wire.RELEASE_RQ_PDU)
        wait_for(lambda: listener.associations == 0, "the end to be noted", 5)
        draining.start()
        wait_for(lambda: listener.port == 0, "the drain to begin", 5)
        threading.Timer(0.5, noted.set).start()
        assert peer.read()[0] == wire.RELEASE_RP
    draining.join(10)
    assert not draining.is_alive()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released whenever a drain looks at an association."""
    looks, silent = threading.Semaphore(0), Association.silent

    def noted(association: Association, seconds: float) -> bool:
        looks.release()
        return silent(association, seconds)

    monkeypatch.setattr(Association, "silent", noted)
    return looks


def test_drain_waits_for_who_associates_meanwhile(
    handler: Folder, looks: threading.Semaphore
) -> None:
    """Its connection was open before."""
    listener = listening(handler)
    draining = threading.Thread(target=listener.drain, args=(30,))
    with Wire(listener.port) as first, Wire(listener.port) as second:
        whole = [wire.store(bytes(200_000), f"1.2.{number}") for number in range(2)]
        first.associate()
        first.send(whole[0][:100_000])
        draining.start()
        assert looks.acquire(timeout=10)
        second.associate()
        second.send(whole[1][:100_000])
        assert first.status(whole[0][100_000:])[1] == 0
        assert first.ask(wire.RELEASE_RQ_PDU)[0] == wire.RELEASE_RP
        first.socket.close()
        while looks.acquire(blocking=False):
            pass
        for _ in range(3):
            assert looks.acquire(timeout=10)
        assert second.status(whole[1][100_000:])[1] == 0
        assert second.ask(wire.RELEASE_RQ_PDU)[0] == wire.RELEASE_RP
    draining.join(10)
    assert not draining.is_alive()


def test_a_silent_association_is_told_of_its_abort_however_long_that_takes_to_note(
    handler: Folder, looks: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.upper_layer.listener._SILENT_SECONDS", 0.1)
    listener, ended = listening(handler), handler.ended

    def slow(requestor: Requestor, how: How) -> None:
        for _ in range(3):
            assert looks.acquire(timeout=10)
        ended(requestor, how)

    monkeypatch.setattr(handler, "ended", slow)
    draining = threading.Thread(target=listener.drain, args=(30,))
    with Wire(listener.port) as peer:
        peer.associate()
        draining.start()
        assert peer.read() == (wire.ABORT, bytes(4))
    draining.join(10)
    assert not draining.is_alive()


def test_a_connection_that_is_accepted_while_we_stop_is_closed(
    handler: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = listening(handler)
    accepted, go_on = threading.Event(), threading.Event()

    def slow(_: Listener) -> None:
        accepted.set()
        go_on.wait(10)

    monkeypatch.setattr(Listener, "_make_room", slow)
    with Wire(listener.port) as peer:
        assert accepted.wait(10)
        listener.drain(5)
        go_on.set()
        assert peer.ask(wire.associate_rq())[0] == 0  # closed
    assert listener.associations == 0


# a data set on its way

_META = file_meta("1.2", "1.2.3", EXPLICIT, "CT1", "1.2.4", "X")
_STEPS = (0, 1, 2, 262_144, LARGEST_BYTES, LARGEST_BYTES + 262_144)


@settings(max_examples=60, deadline=None)
@given(
    size=st.builds(
        lambda near, off: max(1, near + off), st.sampled_from(_STEPS), st.integers(-700, 700)
    ),
    fragment=st.sampled_from([1_000, 16_378, 131_066, 700_000]),
    asked=st.booleans(),
)
def test_a_data_set_of_any_size_is_the_same_in_memory_and_in_its_file(
    tmp_path_factory: pytest.TempPathFactory, size: int, fragment: int, asked: bool
) -> None:
    part = tmp_path_factory.mktemp("part") / "0.part"
    data = memoryview(os.urandom(size))
    incoming = Incoming(part, _META, room(BLOCK))
    for at in range(0, size, fragment):
        incoming.add(data[at : at + fragment])
    digest, file_size = incoming.finish()
    whole = _META + bytes(data)
    assert (digest, file_size) == (hashlib.sha256(data).hexdigest(), len(whole))
    assert incoming.head == bytes(data[:16_384])
    large = len(whole) >= LARGEST_BYTES
    assert part.exists() is (incoming.block is None) is large
    if incoming.block is not None:
        assert bytes(incoming.block[HEADROOM : HEADROOM + file_size]) == whole
    if asked or large:
        assert os.pread(incoming.file(), len(whole) + 1, 0) == part.read_bytes() == whole
    incoming.discard()
    assert not part.exists()
