"""PDUs, requests and command sets that break the standard are aborted with the right reason."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomnode.upper_layer import Listener
from tests.fuzz import wire
from tests.fuzz.receiver import Folder, listening
from tests.fuzz.wire import CT, IMPLICIT, Wire

pytestmark = pytest.mark.network


@pytest.fixture
def handler(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def listener(handler: Folder) -> Iterator[Listener]:
    listener = listening(handler)
    yield listener
    listener.drain(0)
    assert listener.associations == 0


@pytest.fixture
def open_wire(listener: Listener) -> Iterator[Wire]:
    with Wire(listener.port) as peer:
        peer.associate()
        yield peer


@pytest.mark.parametrize(
    ("pdu", "reason"),
    [
        (wire.pdu(9, b"1234"), 1),
        (wire.associate_rq(), 2),
        (wire.pdu(2, b""), 2),
        (wire.pdu(3, bytes(4)), 2),
        (wire.pdu(6, bytes(4)), 2),
        (wire.pdu(wire.P_DATA, b"", 0xFFFFFFFF), 6),
        (wire.pdu(wire.P_DATA, b"", 131_073), 6),
        (wire.pdu(wire.P_DATA, b""), 6),
        (wire.pdu(wire.P_DATA, struct.pack(">LBB", 100, 3, 3)), 6),
        (wire.pdu(wire.P_DATA, struct.pack(">LBB", 0xFFFFFFFF, 3, 3)), 6),
        (wire.pdu(wire.P_DATA, struct.pack(">LBB", 1, 3, 3)), 6),
        (wire.p_data(5, 3, wire.ECHO_RQ), 6),
        (wire.p_data(3, 2, b"data without a command"), 5),
        (wire.p_data(3, 1, b"ab") + wire.p_data(1, 3, b"cd"), 5),
        (wire.p_data(3, 3, wire.store_rq()) + wire.p_data(3, 3, wire.store_rq()), 5),
        (wire.pdu(5, b"12345"), 6),
    ],
    ids=[
        "unknown type",
        "second request",
        "accept",
        "reject",
        "release response",
        "huge length",
        "one byte too long",
        "empty",
        "PDV longer than PDU",
        "huge PDV",
        "short PDV",
        "unknown context",
        "data without command",
        "mixed contexts",
        "command in data",
        "release length",
    ],
)
def test_an_invalid_pdu_is_aborted_with_its_reason(
    open_wire: Wire, handler: Folder, pdu: bytes, reason: int
) -> None:
    assert open_wire.ask(pdu) == (wire.ABORT, bytes([0, 0, 2, reason]))
    assert handler.ends == [("WIRE", "aborted")]


@pytest.mark.parametrize(
    "command",
    [
        b"abc",
        wire.element(0x0100, b"\1\0"),
        struct.pack("<HHL", 8, 0x16, 2) + b"ab",
        struct.pack("<HHL", 0, 0x100, 0xFFFFFFFF),
        wire.element(0x0100, b"\1\x80") + wire.element(0x0800, b"\1\1"),
        bytes(65_537),
    ],
    ids=["cut", "incomplete", "group", "length", "response", "endless"],
)
def test_an_invalid_command_set_is_aborted_by_the_user(open_wire: Wire, command: bytes) -> None:
    assert open_wire.ask(wire.p_data(3, 3, command)) == (wire.ABORT, bytes(4))


def _requests() -> list[Any]:
    whole = wire.associate_rq()[6:]
    many = [(number % 256, CT, (IMPLICIT,)) for number in range(1, 600, 2)]
    return [
        pytest.param(whole[:50], id="short"),
        pytest.param(whole[:-3], id="cut off"),
        pytest.param(whole[:68], id="no items"),
        pytest.param(wire.associate_rq(many)[6:], id="context twice"),
        pytest.param(wire.associate_rq([(2, CT, (IMPLICIT,))])[6:], id="even context"),
        pytest.param(wire.associate_rq([(1, "1." * 5000, (IMPLICIT,))])[6:], id="long UID"),
        pytest.param(wire.associate_rq([(1, CT, (IMPLICIT,) * 300)])[6:], id="many syntaxes"),
        pytest.param(wire.associate_rq([(1, CT, ())])[6:], id="no syntax"),
        pytest.param(wire.associate_rq(user=wire.item(0x99, b"") * 2000)[6:], id="many items"),
        pytest.param(wire.associate_rq(max_length=6)[6:], id="no room for data"),
        pytest.param(wire.associate_rq(max_length=7)[6:], id="room for one byte"),
        pytest.param(wire.associate_rq(user=wire.item(0x54, b"\xff\xff1"))[6:], id="role length"),
    ]


@pytest.mark.parametrize("body", _requests())
def test_an_invalid_request_is_aborted(listener: Listener, body: bytes) -> None:
    with Wire(listener.port) as peer:
        assert peer.ask(wire.pdu(1, body))[0] == wire.ABORT
        assert listener.associations == 0


def test_a_request_that_is_too_long_is_aborted_before_it_comes(listener: Listener) -> None:
    with Wire(listener.port) as peer:
        assert peer.ask(wire.pdu(1, b"", 131_073))[0] == wire.ABORT
