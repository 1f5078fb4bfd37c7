"""What strangers do to a port: the node goes on answering, and gives back what it took.

The receiver is a process of its own, so that its memory, threads and CPU can be read.
``DICOMNODE_LONG=1`` makes the campaigns long.
"""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.fuzz import wire
from tests.fuzz.process import ARTIM_SECONDS, Receiver, running
from tests.fuzz.wire import CT, FIND, IMPLICIT, Wire
from tests.peers import wait_for

pytestmark = pytest.mark.network
LONG = bool(os.environ.get("DICOMNODE_LONG"))
CONNECTIONS = 10_000 if LONG else 1_000
BIG_MB = 2_048 if LONG else 200


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with running(tmp_path_factory.mktemp("hostile"), "--drop") as receiver:
        yield receiver


@pytest.fixture
def receiver(program: Receiver) -> Iterator[Receiver]:
    """Checked after each test: it answers, and has given back what it took."""
    with program.unharmed():
        yield program


def test_connections_that_close_at_once_do_no_harm(receiver: Receiver) -> None:
    for number in range(CONNECTIONS):
        socket.create_connection(("127.0.0.1", receiver.port), timeout=5).close()
        if number % 250 == 0:
            receiver.alive()


def test_two_hundred_silent_connections_do_not_make_it_deaf(receiver: Receiver) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(Wire(receiver.port)) for _ in range(200)]
        assert receiver.alive() < 2
        receiver.threads_are_back(140, 2)  # beyond 128 the oldest had to go
        start = time.monotonic()
        assert held[-1].read() == (0, b"")  # closed without a word: AA-2
        assert time.monotonic() - start < ARTIM_SECONDS + 3


def test_two_hundred_idle_associations_cost_next_to_nothing(receiver: Receiver) -> None:
    with contextlib.ExitStack() as stack:
        before = receiver.status("VmRSS")
        for _ in range(200):
            stack.enter_context(Wire(receiver.port)).associate()
        each = (receiver.status("VmRSS") - before) / 200
        cpu = receiver.cpu_seconds()
        time.sleep(2)
        used = (receiver.cpu_seconds() - cpu) / 2
        print(f"{each:.0f} kB and {used / 200:.6f} of a core per idle association")
        assert each < 64
        assert used <= 0.01  # one tick of the clock


def test_associations_that_have_received_give_back_what_it_took(receiver: Receiver) -> None:
    message = wire.store(bytes(600_000))
    with contextlib.ExitStack() as stack:
        before, threads = receiver.status("VmRSS"), receiver.status("Threads")
        peers = [stack.enter_context(Wire(receiver.port)) for _ in range(100)]
        for peer in peers:
            peer.associate()
            assert peer.status(message)[1] == 0
        receiver.threads_are_back(threads + 100, 10)
        wait_for(lambda: (receiver.status("VmRSS") - before) / 100 < 64, "the memory back", 10)
        for peer in peers:
            assert peer.status(message)[1] == 0


def test_half_requests_are_closed_when_artim_expires(receiver: Receiver) -> None:
    whole = wire.associate_rq()
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(Wire(receiver.port)) for _ in range(50)]
        for number, peer in enumerate(held):
            peer.send(whole[: 1 + number * len(whole) // 51])
        receiver.alive()
        start = time.monotonic()
        assert all(peer.read() == (0, b"") for peer in held)
        assert time.monotonic() - start < ARTIM_SECONDS + 3


def test_a_request_that_drips_is_closed_when_artim_expires(receiver: Receiver) -> None:
    start = time.monotonic()
    with Wire(receiver.port) as peer, contextlib.suppress(ConnectionError):
        for byte in wire.associate_rq():
            peer.send(bytes([byte]))
            time.sleep(0.1)
    assert time.monotonic() - start < ARTIM_SECONDS + 4


def test_a_peer_that_reads_no_answers_is_given_up(receiver: Receiver) -> None:
    echoes = wire.p_data(1, 3, wire.ECHO_RQ) * 1000
    with Wire(receiver.port, 2) as peer:
        peer.associate()
        with contextlib.suppress(OSError):
            for _ in range(300):
                peer.send(echoes)
        receiver.alive()


def _flood(receiver: Receiver, start: bytes, piece: bytes, megabytes: int = 64) -> float:
    """Send `start`, then `piece` again and again, until we are cut off; MB that were taken."""
    sent = 0
    with Wire(receiver.port) as peer, contextlib.suppress(OSError):
        peer.associate()
        peer.send(start)
        while sent < megabytes << 20:
            peer.send(piece)
            sent += len(piece)
            receiver.alive() if sent % (len(piece) * 32) == 0 else None
    return sent / 2**20


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (wire.pdu(wire.P_DATA, b"", 0xFFFFFFFF), bytes(65_536)),
        (b"", wire.p_data(3, 1, bytes(60_000))),
        (b"", wire.pdu(wire.P_DATA, struct.pack(">LBB", 2, 3, 1) * 10_000)[:-6] + b"?" * 100),
        (wire.pdu(1, b"", 0x7FFFFFFF), bytes(65_536)),
        (b"", os.urandom(65_536)),
    ],
    ids=["huge PDU", "endless command", "cut PDVs", "huge request", "noise"],
)
def test_a_flood_is_cut_off_early(receiver: Receiver, start: bytes, piece: bytes) -> None:
    assert _flood(receiver, start, piece) < 32


FIND_RQ = wire.p_data(1, 3, wire.command(0x20, sop_class=FIND, data_set=True))


@pytest.mark.parametrize(
    ("start", "piece", "most_mb"),
    [
        (b"", wire.p_data(1, 1, bytes(60_000)), 32),
        (b"", FIND_RQ * 500, 32),
        (FIND_RQ, wire.p_data(1, 0, bytes(60_000)), 32),
        (b"", wire.p_data(1, 3, wire.command(0x30, sop_class=FIND)) * 100, 65),  # if it keeps up
    ],
    ids=["endless command", "commands without data", "endless data set", "endless requests"],
)
def test_a_flood_that_the_library_would_hold_takes_no_memory(
    receiver: Receiver, start: bytes, piece: bytes, most_mb: int
) -> None:
    """An association with a service that pynetdicom serves, and keeps in memory."""
    sent, before, most = 0, receiver.status("VmRSS"), 0
    with Wire(receiver.port) as peer, contextlib.suppress(OSError):
        peer.associate([(1, FIND, (IMPLICIT,))])
        peer.send(start)
        while sent < 64 << 20:
            peer.send(piece)
            sent += len(piece)
            most = max(most, receiver.status("VmRSS") - before)
    print(f"ended after {sent >> 10} kB; memory moved by {most} kB meanwhile")
    assert sent < most_mb << 20
    assert most < 24_576


def test_huge_requests_are_not_believed(receiver: Receiver) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            peer = stack.enter_context(Wire(receiver.port))
            with contextlib.suppress(OSError):
                peer.send(wire.pdu(1, b"", 131_072) + bytes(60_000))
        receiver.alive()


def test_aborts_at_every_point_leave_nothing(receiver: Receiver) -> None:
    session = wire.associate_rq() + wire.p_data(1, 3, wire.ECHO_RQ)
    session += wire.store(os.urandom(3000), size=700) + wire.RELEASE_RQ_PDU
    step = 1 if LONG else 23
    for cut in range(0, len(session), step):
        with Wire(receiver.port) as peer:
            peer.send(session[:cut] + (wire.ABORT_PDU if cut % 2 else b""))
            if cut % 3 == 0:  # with a reset instead of an orderly close
                linger = struct.pack("ii", 1, 0)
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    receiver.alive()


def test_a_large_instance_takes_no_memory(receiver: Receiver) -> None:
    before, most = receiver.status("VmRSS"), 0
    piece = wire.p_data(3, 0, bytes(131_066))
    with Wire(receiver.port, 60) as peer:
        peer.associate([(1, wire.VERIFICATION, (IMPLICIT,)), (3, CT, (IMPLICIT,))])
        peer.send(wire.p_data(3, 3, wire.store_rq()))
        for number in range(BIG_MB * 8):
            peer.send(piece)
            if number % 200 == 0:
                most = max(most, receiver.status("VmRSS"))
        assert peer.status(wire.p_data(3, 2, b""))[1] == 0
    print(f"{BIG_MB} MB took {most - before} kB")
    assert most - before < 4096


def test_an_echo_takes_less_than_a_millisecond_and_a_set_up_less_than_five(
    receiver: Receiver,
) -> None:
    contexts = [(n, CT, (IMPLICIT,)) for n in range(3, 256, 2)]
    set_up, echo = [], []
    for _ in range(30):
        with Wire(receiver.port) as peer:
            start = time.perf_counter()
            peer.associate([(1, wire.VERIFICATION, (IMPLICIT,)), *contexts])
            set_up.append(time.perf_counter() - start)
            for _ in range(20):
                start = time.perf_counter()
                assert peer.echo() == 0
                echo.append(time.perf_counter() - start)
    for times, what, most in ((set_up, "set-up of 128 contexts", 5), (echo, "echo", 1)):
        ordered = [seconds * 1000 for seconds in sorted(times)]
        print(f"{what}: median {ordered[len(ordered) // 2]:.3f} ms")
        assert ordered[len(ordered) // 5] < most  # a busy machine may delay the others
