"""Storage SCU against real peers and rude ones: bytes, transfer syntaxes, statuses, every end."""

import contextlib
import io
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom import AE, evt

from dicomnode.errors import DeliveryError, DeliveryRefused, NoAssociation
from dicomnode.scu import Address, echo, send_instances
from dicomnode.upper_layer import Call, Identity, Lost, NotConnected, Patience, Titles
from tests.factories import ct_series, write_series
from tests.peers import STORESCP, free_port, needs, storescp

pytestmark = [pytest.mark.network]
CT = "1.2.840.10008.5.1.4.1.1.2"
ME = Identity("1.2.3", "TEST")


def _address(port: int, called: str = "DCMTK") -> Address:
    return Address("127.0.0.1", port, called, "DICOMNODE")


def _sent(paths: list[Path], address: Address) -> dict[str, int]:
    statuses: dict[str, int] = {}
    send_instances(paths, address, statuses.__setitem__)
    return statuses


def _series(folder: Path, count: int = 3, syntax: str | None = None) -> list[Path]:
    datasets = ct_series(count, 32, 32)
    for dataset in datasets if syntax else []:
        dataset.compress(syntax, generate_instance_uid=False)
    return sorted(write_series(datasets, folder))


# real peers


@needs(STORESCP)
@pytest.mark.peers
@pytest.mark.parametrize("pdu", ["4096", "16384", "131072"])
def test_storescp_gets_the_bytes_of_the_file(tmp_path: Path, pdu: str) -> None:
    paths = _series(tmp_path / "sent")
    with storescp(tmp_path / "kept", "DCMTK", 0, "-B", "-pdu", pdu) as archive:
        assert set(_sent(paths, _address(archive.port)).values()) == {0}
        kept = sorted((tmp_path / "kept").iterdir())
    assert len(kept) == len(paths)
    by_uid = {dcmread(path).SOPInstanceUID: path for path in kept}
    for path in paths:
        assert dcmread(path) == dcmread(by_uid[dcmread(path).SOPInstanceUID])


@needs(STORESCP)
@pytest.mark.peers
@pytest.mark.parametrize(
    ("syntax", "option", "arrives"),
    [
        (JPEGLSLossless, "+xt", JPEGLSLossless),
        (JPEGLSLossless, "+xe", ExplicitVRLittleEndian),
        (RLELossless, "+xi", ImplicitVRLittleEndian),
        (None, "+xi", ImplicitVRLittleEndian),
    ],
)
def test_a_data_set_goes_in_its_own_syntax_or_converted_without_loss(
    tmp_path: Path, syntax: str | None, option: str, arrives: str
) -> None:
    paths = _series(tmp_path / "sent", 1, syntax)
    with storescp(tmp_path / "kept", "DCMTK", 0, "-B", option) as archive:
        _sent(paths, _address(archive.port))
        (kept,) = (tmp_path / "kept").iterdir()
    got, given_ = dcmread(kept), dcmread(paths[0])
    assert got.file_meta.TransferSyntaxUID == arrives
    assert np.array_equal(got.pixel_array, given_.pixel_array)


@needs(STORESCP)
@pytest.mark.peers
def test_a_peer_that_refuses_is_retried_or_parked_by_its_reason(tmp_path: Path) -> None:
    paths = _series(tmp_path / "sent", 1)
    words = "rejected the association: no reason given"
    running = storescp(tmp_path / "kept", "DCMTK", 0, "--refuse")
    with running as archive, pytest.raises(NoAssociation, match=words):
        _sent(paths, _address(archive.port))


@needs(STORESCP)
@pytest.mark.peers
@pytest.mark.parametrize("option", ["--abort-after", "--abort-during"])
def test_a_peer_that_aborts_is_a_lost_association(tmp_path: Path, option: str) -> None:
    running = storescp(tmp_path / "kept", "DCMTK", 0, option)
    with running as archive, pytest.raises(DeliveryError, match="lost"):
        _sent(_series(tmp_path / "sent"), _address(archive.port))


def test_c_echo_and_nobody_there() -> None:
    port = free_port()
    with pytest.raises(NoAssociation, match="Connection refused"):
        echo(_address(port))
    with _pynetdicom(lambda event: 0) as port:
        echo(_address(port, "ANY"))


@contextlib.contextmanager
def _pynetdicom(answer: Callable[[Any], int], called: bool = False) -> Iterator[int]:
    """pynetdicom's SCP, which answers every C-STORE as told."""
    entity = AE("PEER")
    entity.require_called_aet = called
    entity.add_supported_context("1.2.840.10008.1.1")
    entity.add_supported_context(CT, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    handlers: list[Any] = [(evt.EVT_C_STORE, answer)]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


@pytest.mark.parametrize("status", [0x0000, 0x0111, 0xB000, 0xB006, 0xB007])
def test_what_counts_as_delivered(tmp_path: Path, status: int) -> None:
    with _pynetdicom(lambda event: status) as port:
        assert set(_sent(_series(tmp_path), _address(port)).values()) == {status}


@pytest.mark.parametrize("status", [0xA900, 0xA9FF, 0xC000, 0xC123])
def test_what_is_refused_for_good_does_not_stop_the_others(tmp_path: Path, status: int) -> None:
    paths = _series(tmp_path)
    bad = str(dcmread(paths[1]).SOPInstanceUID)
    told: dict[str, int] = {}

    def answer(event: Any) -> int:
        return status if event.request.AffectedSOPInstanceUID == bad else 0

    with _pynetdicom(answer) as port, pytest.raises(DeliveryRefused, match=f"0x{status:04X}"):
        send_instances(paths, _address(port), told.__setitem__)
    assert len(told) == 2
    assert bad not in told


@pytest.mark.parametrize("status", [0xA700, 0x0110, 0x0124])
def test_any_other_status_is_tried_again(tmp_path: Path, status: int) -> None:
    with _pynetdicom(lambda event: status) as port, pytest.raises(DeliveryError) as caught:
        _sent(_series(tmp_path), _address(port))
    assert not isinstance(caught.value, DeliveryRefused)


def test_a_wrong_called_title_is_refused_for_good(tmp_path: Path) -> None:
    words = "called AE title not recognised"
    running = _pynetdicom(lambda event: 0, called=True)
    with running as port, pytest.raises(DeliveryRefused, match=words):
        _sent(_series(tmp_path), _address(port, "NOBODY"))


def test_a_file_that_is_not_part_10_is_named(tmp_path: Path) -> None:
    whole = _series(tmp_path / "source", 1)[0].read_bytes()
    for content in (b"nothing", bytes(128) + b"DICM", whole[:200], whole[:132] + whole[400:]):
        (tmp_path / "a.dcm").write_bytes(content)
        with pytest.raises(DeliveryRefused, match="file 1 of 1"):
            _sent([tmp_path / "a.dcm"], _address(1))
    with pytest.raises(DeliveryError, match="cannot be read now") as caught:
        _sent([tmp_path / "gone.dcm"], _address(1))
    assert not isinstance(caught.value, DeliveryRefused)  # tried again


# any size, any PDU length


class Sink:
    """An acceptor of a few lines, so that it takes any PDU length and shows what came."""

    def __init__(self, longest: int) -> None:
        self.longest, self.data, self.pdus = longest, bytearray(), list[int]()
        self.odd = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        peer, _ = self.listener.accept()
        with peer, peer.makefile("rb") as stream:
            self.receive(stream)
            peer.sendall(accept(self.longest))
            while (kind := self.receive_data(stream)) == 4:
                if self.done:
                    peer.sendall(response(1))
            peer.sendall(bytes([6, 0, 0, 0, 0, 4, 0, 0, 0, 0]) if kind == 5 else b"")

    def receive(self, stream: Any) -> tuple[int, bytes]:
        kind, length = struct.unpack(">BxL", stream.read(6))
        return kind, stream.read(length)

    def receive_data(self, stream: Any) -> int:
        kind, body = self.receive(stream)
        self.done = False
        if kind == 4:
            self.pdus.append(len(body))
            length, _, control = struct.unpack(">LBB", body[:6])
            self.odd |= len(body) % 2 or length != len(body) - 4
            if not control & 1:
                self.data += body[6:]
                self.done = bool(control & 2)
        return kind


def accept(longest: int) -> bytes:
    """A-ASSOCIATE-AC for presentation context 1."""

    def item(kind: int, value: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(value)) + value

    syntax = item(0x40, b"1.2.840.10008.1.2.1")
    user = item(0x50, item(0x51, struct.pack(">L", longest)) + item(0x52, b"1.2"))
    body = item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x21, bytes([1, 0, 0, 0]) + syntax) + user
    body = struct.pack(">HH", 1, 0) + b" " * 32 + bytes(32) + body
    return struct.pack(">BxL", 2, len(body)) + body


def response(message: int, context: int = 1, field: int = 0x8001) -> bytes:
    """A C-STORE response, Success."""
    values = [(0x0100, field), (0x0120, message), (0x0800, 0x0101), (0x0900, 0)]
    command = b"".join(struct.pack("<HHLH", 0, tag, 2, value) for tag, value in values)
    command = struct.pack("<HHLL", 0, 0, 4, len(command)) + command
    body = struct.pack(">LBB", len(command) + 2, context, 3) + command
    return struct.pack(">BxL", 4, len(body)) + body


def _call(port: int, seconds: float = 5.0) -> Call:
    contexts = [(CT, "1.2.840.10008.1.2.1")]
    patience = Patience(seconds, seconds, seconds)
    return Call(("127.0.0.1", port), Titles("A", "B"), contexts, ME, patience=patience)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    longest=st.sampled_from([0, 8, 9, 100, 4096, 16384, 65537, 1 << 24]),
    size=st.one_of(
        st.integers(0, 1500).map(lambda half: 2 * half),
        st.sampled_from([1 << 16, (2 << 20) - 2, 5_000_002]),
    ),
)
def test_any_size_arrives_whole_in_pdus_the_peer_takes(longest: int, size: int) -> None:
    longest = longest if longest == 0 or size < 10_000 else max(longest, 4096)
    data = np.random.default_rng(size).bytes(size)
    sink = Sink(longest)
    call = _call(sink.port)
    assert call.store(1, CT, "1.2.3", io.BytesIO(data)) == (0, "")
    call.release()
    sink.thread.join(5)
    assert bytes(sink.data) == data
    assert not sink.odd  # every fragment is of even length
    assert max(sink.pdus) <= (longest or 1 << 20)


def test_a_large_file_is_sent_in_flat_memory() -> None:
    import tracemalloc

    with tempfile.TemporaryFile() as file:
        file.truncate(200_000_000)
        sink = Sink(131_072)
        sink.receive_data = _forget(sink)  # type: ignore[method-assign]
        call = _call(sink.port, 60)
        tracemalloc.start()
        file.seek(0)
        assert call.store(1, CT, "1.2.3", file)[0] == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        call.release()
    assert peak < 16_000_000


def _forget(sink: Sink) -> Callable[[Any], int]:
    receive = Sink.receive_data

    def again(stream: Any) -> int:
        kind = receive(sink, stream)
        sink.data.clear()
        sink.pdus.clear()
        return kind

    return again


# rude peers


def pdv(value: bytes, control: int) -> bytes:
    """A P-DATA-TF with one presentation data value on context 1."""
    return struct.pack(">BxLLBB", 4, len(value) + 6, len(value) + 2, 1, control) + value


@contextlib.contextmanager
def _rude(*answers: bytes, close: bool = True) -> Iterator[int]:
    """Sends each answer after something has come, then closes, or says nothing more."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            for answer in answers:
                peer.recv(1 << 20)
                peer.sendall(answer)
            if close:
                peer.shutdown(socket.SHUT_RDWR)
            over.wait(20)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        listener.close()
        thread.join(5)


OK = accept(16384)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed"),
        (OK[:50], "closed"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "unrecognised PDU"),
        (b"\2\0\xff\xff\xff\xff", "too long"),
        (bytes([7, 0, 0, 0, 0, 4, 0, 0, 2, 0]), "aborted"),
        (bytes([4, 0, 0, 0, 0, 0]), "PDU type"),
        (bytes([3, 0, 0, 0, 0, 2, 0, 0]), "4 bytes"),
        (accept(3), "no useful length"),
    ],
)
def test_a_rude_answer_is_no_association(answer: bytes, words: str) -> None:
    with _rude(answer) as port, pytest.raises(NotConnected, match=words):
        _call(port)


def test_silence_ends_with_our_patience() -> None:
    with _rude(close=False) as port, pytest.raises(NotConnected, match="no answer"):
        _call(port, 0.3)
    with _rude(OK, close=False) as port:
        call = _call(port, 0.5)
        with pytest.raises(Lost, match="no response in time"):
            call.store(1, CT, "1.2.3", io.BytesIO(bytes(10)))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed"),
        (response(1)[:20], "closed"),
        (response(2), "not sent"),
        (response(1, context=3), "not the response"),
        (response(1, field=0x0001), "not the response to this kind"),
        (response(1, field=0x8030), "not the response to this kind"),
        (bytes([7, 0, 0, 0, 0, 4, 0, 0, 0, 0]), "aborted"),
        (bytes([5, 0, 0, 0, 0, 4, 0, 0, 0, 0]), "RELEASE_RQ"),
        (b"\4\0\x7f\xff\xff\xff", "longer than we take"),
        (b"\4\0\0\0\0\6\xff\xff\xff\xff\1\3", "longer than its PDU"),
        (b"\4\0\0\0\0\3abc", "cut off"),
        (b"\xee" * 64, "unrecognised PDU"),
        (pdv(b"\0\0", 2), "not the response"),
        (pdv(bytes(16000), 1) * 20, "without an end"),
        (b"\4\0\0\0\0\x08" + struct.pack(">LBB", 4, 1, 3) + b"ab", "protocol"),
    ],
)
def test_a_rude_response_is_a_lost_association(answer: bytes, words: str) -> None:
    with _rude(OK, answer) as port:
        call = _call(port)
        with pytest.raises(Lost, match=words):
            call.store(1, CT, "1.2.3", io.BytesIO(bytes(10)))


def test_a_peer_that_takes_a_data_set_drop_by_drop_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each drop is in time; all of them together are not."""
    connect = socket.create_connection

    def narrow(address: tuple[str, int], seconds: float) -> socket.socket:
        connection = connect(address, seconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)  # or it takes megabytes
        return connection

    monkeypatch.setattr(socket, "create_connection", narrow)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    over = threading.Event()

    def sip() -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            peer.recv(1 << 16)
            peer.sendall(OK)
            while not over.wait(0.01) and peer.recv(8_192):
                pass

    thread = threading.Thread(target=sip, daemon=True)
    thread.start()
    with listener:
        call = _call(listener.getsockname()[1], 0.8)
        with pytest.raises(Lost, match="no answer in time"):
            call.store(1, CT, "1.2.3", io.BytesIO(bytes(6 << 20)))
        over.set()
        thread.join(5)


def test_a_peer_that_closes_instead_of_answering_the_release_costs_nothing() -> None:
    with _rude(OK, response(1)) as port:
        call = _call(port)
        assert call.store(1, CT, "1.2.3", io.BytesIO(bytes(10))) == (0, "")
        call.release()
