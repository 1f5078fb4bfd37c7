"""Mutated sessions: whatever bytes come, each connection ends and the receiver lives.

``DICOMNODE_FUZZ=100000`` sets the number of inputs.
"""

import contextlib
import itertools
import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import wire
from tests.fuzz.process import Receiver, running
from tests.fuzz.wire import Wire

pytestmark = pytest.mark.network
INPUTS = int(os.environ.get("DICOMNODE_FUZZ", "400"))
_DATA = bytes(range(256)) * 4
SESSIONS = (
    [
        wire.associate_rq(),
        wire.p_data(1, 3, wire.ECHO_RQ),
        wire.store(_DATA, size=300),
        wire.store(_DATA, "1.2.3.5"),
        wire.RELEASE_RQ_PDU,
    ],
    [
        wire.associate_rq(user=wire.item(0x53, b"\0\1\0\1") + wire.item(0x99, b"?")),
        wire.pdu(wire.P_DATA, wire.pdv(3, 3, wire.store_rq()) + wire.pdv(3, 2, _DATA)),
        wire.p_data(3, 3, wire.command(0x21, data_set=True)) + wire.p_data(3, 2, b"ab"),
        wire.ABORT_PDU,
    ],
    [wire.associate_rq(), wire.p_data(1, 1, wire.ECHO_RQ[:9]), wire.p_data(1, 3, wire.ECHO_RQ[9:])],
)
_TELLING = [b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\1", b"\4"]


def _mutated(session: list[bytes], rng: random.Random) -> bytes:
    """Whole PDUs dropped, doubled or swapped, then bytes changed, cut out or put in."""
    parts = list(session)
    for _ in range(rng.choice([0, 0, 1, 2])):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        parts[at] = rng.choice([b"", parts[at] * 2, parts[other], parts[at][: rng.randrange(90)]])
    data = bytearray(b"".join(parts))
    for _ in range(rng.choice([0, 1, 1, 2, 4, 16])):
        # two times of three near the start of a PDU, where lengths and types are
        starts = list(itertools.accumulate(map(len, parts), initial=0))[:-1]
        near = min(rng.choice(starts) + rng.randrange(90), len(data))
        at = near if rng.random() < 0.66 else rng.randrange(len(data) + 1)
        value = rng.choice([*_TELLING, rng.randbytes(rng.randrange(1, 9))])
        end = at + rng.choice([0, len(value), len(value), rng.randrange(20)])
        data[at:end] = value
    return bytes(data)


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with running(tmp_path_factory.mktemp("mutations"), "--drop") as program, program.unharmed():
        yield program


@settings(max_examples=INPUTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    number=st.integers(0, len(SESSIONS) - 1),
    rng=st.randoms(use_true_random=True),
    cuts=st.lists(st.integers(1, 3000), max_size=3),
)
def test_a_mutated_session_ends_and_the_receiver_lives(
    receiver: Receiver, number: int, rng: random.Random, cuts: list[int]
) -> None:
    data = _mutated(SESSIONS[number], rng)
    with Wire(receiver.port) as peer:
        with contextlib.suppress(OSError):  # it may close before it has all
            for start, end in itertools.pairwise([0, *sorted(cuts), len(data)]):
                peer.send(data[start:end])
            peer.socket.shutdown(1)
        answers = 0
        while (kind := peer.read()[0]) != 0:
            assert kind in (wire.ASSOCIATE_AC, wire.ASSOCIATE_RJ, 4, wire.RELEASE_RP, wire.ABORT)
            answers += 1
            assert answers < 100
    if rng.randrange(50) == 0:
        receiver.alive()
