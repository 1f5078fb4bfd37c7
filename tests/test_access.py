"""Who may call is decided at once, nobody starves anybody, and too much is slowed, not refused."""

import itertools
import socket
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.access import (
    HOST,
    LONGEST_WAIT_SECONDS,
    PEER_LIMIT,
    Access,
    Admission,
    Pace,
    Places,
)
from dicomnode.config import NodeSection, Peer
from dicomnode.sop_classes import problem_with, uids_of
from dicomnode.upper_layer.pdu import CALLED_AE, CALLING_AE, LOCAL_LIMIT, Rejection

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY_CAPTURE, PRIVATE = "1.2.840.10008.5.1.4.1.1.7", "1.2.276.0.7230010.3.1.0.1"


def _no_names(name: str) -> list[str]:
    raise AssertionError(f"looked up {name}")


def _access(peers: dict[str, Peer], resolve: Any = _no_names, **node: Any) -> Access:
    return Access(NodeSection(**node), peers, resolve)


def _call(access: Access, calling: str = "CT1", host: str = "10.1.2.3") -> Admission | Rejection:
    return access.admit(calling, "DICOMNODE", host, 0.0)


# who may call


def test_an_unknown_calling_title_is_refused_for_good() -> None:
    answer = _call(_access({"scanner": Peer("CT1")}), "CT2")
    assert answer is CALLING_AE
    assert (answer.result, answer.source, answer.reason) == (1, 1, 3)


def test_another_called_title_is_refused_for_good() -> None:
    answer = _access({"scanner": Peer("CT1")}).admit("CT1", "ARCHIVE", "10.1.2.3", 0.0)
    assert answer is CALLED_AE
    assert (answer.result, answer.source, answer.reason) == (1, 1, 7)


@pytest.mark.parametrize(
    ("wanted", "host", "known"),
    [
        (None, "192.0.2.7", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.4", False),
        ("10.1.0.0/16", "10.1.255.1", True),
        ("10.1.0.0/16", "10.2.0.1", False),
        ("10.1.2.3", "::ffff:10.1.2.3", True),  # a dual-stack socket shows IPv4 so
        ("10.1.0.0/16", "::ffff:10.2.0.1", False),
        ("fe80::1", "fe80::1%eth0", True),
        ("2001:db8::/32", "2001:db8::5", True),
        ("10.1.0.0/16", "2001:db8::5", False),
        ("10.1.2.3", "not an address", False),
    ],
)
def test_the_address_must_be_the_peers(wanted: str | None, host: str, known: bool) -> None:
    answer = _call(_access({"scanner": Peer("CT1", wanted)}), host=host)
    assert isinstance(answer, Admission) if known else answer is HOST


def test_peers_of_one_title_are_told_apart_by_their_address() -> None:
    access = _access({"a": Peer("CT1", "10.0.0.1"), "b": Peer("CT1", "10.0.0.2")})
    answer = _call(access, host="10.0.0.2")
    assert isinstance(answer, Admission)
    assert answer.peer == "b"


def test_strangers_come_in_only_where_the_node_accepts_them() -> None:
    peers = {"unknown": Peer("CT1", sop_classes=("CT",))}
    assert _call(_access(peers), "CT9") is CALLING_AE
    answer = _call(_access(peers, unknown_callers="accept"), "CT9")
    assert isinstance(answer, Admission)
    assert answer.peer is None  # not the peer that somebody has called `unknown`


# host names


def test_a_host_name_is_looked_up_beforehand_and_never_while_a_peer_waits() -> None:
    asked: list[str] = []

    def resolve(name: str) -> list[str]:
        asked.append(name)
        return ["10.1.2.3", "fe80::1%eth0"]

    access = _access({"scanner": Peer("CT1", "ct1.hospital.example")}, resolve)
    assert _call(access) is HOST
    assert asked == []
    access.refresh()
    assert isinstance(_call(access), Admission)
    assert _call(access, host="10.1.2.4") is HOST
    assert asked == ["ct1.hospital.example"]


def test_a_name_server_that_fails_leaves_the_addresses_known_before() -> None:
    answers: list[list[str] | OSError] = [["10.1.2.3"], OSError("no name server"), ["10.1.2.9"]]

    def resolve(_: str) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    access = _access({"scanner": Peer("CT1", "ct1.hospital.example")}, resolve)
    access.refresh()
    access.refresh()
    assert isinstance(_call(access), Admission)
    access.refresh()  # it has moved
    assert _call(access) is HOST
    assert isinstance(_call(access, host="10.1.2.9"), Admission)


def test_a_name_server_that_hangs_stops_nobody() -> None:
    hangs, go_on = threading.Event(), threading.Event()

    def resolve(_: str) -> list[str]:
        hangs.set()
        assert go_on.wait(10)
        return []

    peers = {"slow": Peer("CT1", "ct1.hospital.example"), "known": Peer("MR1", "10.0.0.5")}
    access = _access(peers, resolve)
    refresh = threading.Thread(target=access.refresh)
    refresh.start()
    try:
        assert hangs.wait(10)
        assert isinstance(_call(access, "MR1", "10.0.0.5"), Admission)
        assert _call(access) is HOST
    finally:
        go_on.set()
        refresh.join(10)


def test_localhost_has_an_address_and_nonsense_is_no_crash() -> None:
    peers = {"here": Peer("CT1", "localhost"), "odd": Peer("CT2", "a" * 70 + ".example")}
    access = Access(NodeSection(), peers)
    access.refresh()
    host = socket.gethostbyname("localhost")
    assert isinstance(_call(access, host=host), Admission)
    assert _call(access, "CT2") is HOST


# how many at a time

_PEER = st.sampled_from(["a", "b", "c", None])
_LIMITS = st.tuples(*[st.integers(0, 6)] * 3)


def _of_limits(limits: tuple[int, ...]) -> dict[str, Peer]:
    return {
        name: Peer(name, max_incoming_associations=limit)
        for name, limit in zip("abc", limits, strict=True)
    }


@given(st.integers(1, 24), _LIMITS, st.lists(st.tuples(st.booleans(), _PEER), max_size=80))
def test_whatever_the_others_do_a_peer_below_its_share_gets_in(
    total: int, limits: tuple[int, ...], steps: list[tuple[bool, str | None]]
) -> None:
    peers = _of_limits(limits)
    places, taken = Places(total, peers), Counter[str | None]()
    for comes, peer in steps:
        if comes:
            why = places.take(peer)
            assert why is None or taken[peer] >= places.share(peer)
            taken[peer] += why is None
        elif taken[peer]:
            places.give(peer)
            taken[peer] -= 1
        assert sum(taken.values()) <= total
        for name in peers:
            assert not limits["abc".index(name)] or taken[name] <= limits["abc".index(name)]


@given(st.integers(3, 200))
def test_one_scanner_cannot_take_what_is_kept_for_another(total: int) -> None:
    peers = _of_limits((0, 0, 0))
    places = Places(total, peers)
    while places.take("a") is None:
        pass
    for name in ("b", "c"):
        share = places.share(name)
        assert share >= 1
        assert [places.take(name) for _ in range(share + 1)] == [None] * share + [LOCAL_LIMIT]
    assert places.take(None) is LOCAL_LIMIT


def test_a_single_peer_may_use_every_place() -> None:
    places = Places(4, {"only": Peer("CT1")})
    assert [places.take("only") for _ in range(5)] == [None] * 4 + [LOCAL_LIMIT]


def test_more_peers_than_places_share_them_first_come_first_served() -> None:
    peers = {str(n): Peer(f"CT{n}") for n in range(5)}
    places = Places(3, peers)
    assert [places.take(name) for name in "0123"] == [None, None, None, LOCAL_LIMIT]


def test_a_peer_at_its_own_limit_may_try_again_later() -> None:
    access = _access({"scanner": Peer("CT1", max_incoming_associations=1)})
    first = _call(access)
    assert isinstance(first, Admission)
    second = _call(access)
    assert second is PEER_LIMIT
    assert (second.result, second.source, second.reason) == (2, 3, 2)
    access.leave(first)
    assert isinstance(_call(access), Admission)


def test_leaving_twice_gives_one_place_back() -> None:
    access = _access({"scanner": Peer("CT1", max_incoming_associations=2)})
    first, second = _call(access), _call(access)
    assert isinstance(first, Admission)
    assert isinstance(second, Admission)
    access.leave(first)
    access.leave(first)
    assert isinstance(_call(access), Admission)
    assert _call(access) is PEER_LIMIT


def test_many_threads_at_once_never_exceed_the_limit() -> None:
    access = _access({"a": Peer("CT1"), "b": Peer("CT2")}, max_associations=8)
    kept: list[Admission] = []

    def come_and_go(title: str) -> None:
        for round_ in range(300):
            answer = _call(access, title)
            if isinstance(answer, Admission) and round_ == 299:
                kept.append(answer)
            elif isinstance(answer, Admission):
                access.leave(answer)

    threads = [threading.Thread(target=come_and_go, args=(f"CT{n % 2 + 1}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for admission in kept:
        access.leave(admission)
    admitted = [_call(access, "CT1") for _ in range(8)]
    assert sum(isinstance(answer, Admission) for answer in admitted) == 6  # 2 are kept for b


# what it may store


def test_a_modality_stands_for_its_classic_and_enhanced_classes() -> None:
    access = _access({"scanner": Peer("CT1", sop_classes=("CT", "SecondaryCaptureImageStorage"))})
    for uid in (CT, ENHANCED_CT, SECONDARY_CAPTURE):
        assert access.allowed_sop_class("scanner", uid)
    for uid in ("1.2.840.10008.5.1.4.1.1.4", PRIVATE, "", f"{CT}.9"):
        assert not access.allowed_sop_class("scanner", uid)


def test_a_private_class_can_be_named_by_its_uid() -> None:
    access = _access({"scanner": Peer("CT1", sop_classes=(PRIVATE,))})
    assert access.allowed_sop_class("scanner", PRIVATE)
    assert not access.allowed_sop_class("scanner", CT)


@pytest.mark.parametrize("names", [("*",), ("CT", "*")])
def test_a_star_is_every_class(names: tuple[str, ...]) -> None:
    access = _access({"scanner": Peer("CT1", sop_classes=names)})
    assert uids_of(names) is None
    assert access.allowed_sop_class("scanner", PRIVATE)
    assert access.allowed_sop_class(None, PRIVATE)


@pytest.mark.parametrize("name", ["XX", "ct", "", "1", "1.2.", "1..2", "1." * 40 + "1", "1.2\n"])
def test_what_is_no_sop_class_is_named_in_the_error(name: str) -> None:
    assert str(problem_with(["CT", name])).startswith(f"{name!r} is no SOP class")


def test_an_empty_list_is_an_error_and_not_everything() -> None:
    assert "names nothing" in str(problem_with([]))


# how much

_RATE = st.floats(0.01, 1e4)
_WORK = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50)), min_size=1, max_size=60)


@given(_RATE, _WORK)
def test_who_waits_stays_within_the_pace(rate: float, work: list[tuple[float, float]]) -> None:
    pace, now = Pace(rate), 0.0
    sent = [(pause, min(size, rate * 4)) for pause, size in work]  # so that no wait is cut short
    began, answered = [], []
    for pause, amount in sent:
        now += pause
        began.append(now)
        now += pace.wait(amount, now)
        answered.append(now)
    for first, last in itertools.combinations_with_replacement(range(len(sent)), 2):
        amount = sum(size for _, size in sent[first:last])
        assert amount <= rate * (answered[last] - began[first] + 1.0) * (1 + 1e-9) + 1e-6


@given(_RATE, _WORK)
def test_who_is_slower_than_the_pace_never_waits(
    rate: float, work: list[tuple[float, float]]
) -> None:
    pace, now = Pace(rate), 0.0
    for pause, amount in work:
        assert pace.wait(amount, now) <= 1e-6
        now += pause + amount / rate


@given(_RATE, st.lists(st.tuples(st.floats(-100, 100), st.floats(0, 1e12)), max_size=30))
def test_no_wait_is_longer_than_a_peer_bears(rate: float, work: list[tuple[float, float]]) -> None:
    pace, now = Pace(rate), 0.0
    for step, amount in work:
        now += step  # a clock may even go back
        assert 0.0 <= pace.wait(amount, now) <= LONGEST_WAIT_SECONDS + 1e-9


def test_one_huge_instance_is_forgiven_after_the_longest_wait() -> None:
    pace = Pace(1.0)
    assert pace.wait(1e6, 0.0) == 0.0
    assert pace.wait(1.0, 1.0) == pytest.approx(LONGEST_WAIT_SECONDS - 1.0)
    assert pace.wait(1.0, 2.0 + LONGEST_WAIT_SECONDS) == 0.0


def test_zero_is_no_limit() -> None:
    pace = Pace(0.0)
    assert [pace.wait(1e12, 0.0) for _ in range(3)] == [0.0] * 3


def test_associations_of_one_peer_share_its_pace_and_others_do_not() -> None:
    peers = {"slowed": Peer("CT1", max_instances_per_second=2.0), "free": Peer("CT2")}
    access = _access(peers)
    waits = [access.delay("slowed", 1, 10, 100.0) for _ in range(4)]
    assert waits == [0.0, 0.0, 0.0, 0.5]
    assert access.delay("free", 1, 10**12, 100.0) == 0.0
    assert access.delay(None, 1, 10**12, 100.0) == 0.0


def test_the_slower_of_instances_and_megabytes_counts() -> None:
    peer = Peer("CT1", max_instances_per_second=10.0, max_megabytes_per_second=4.0)
    access = _access({"slowed": peer})
    assert access.delay("slowed", 1, 12_000_000, 50.0) == 0.0
    assert access.delay("slowed", 1, 1, 50.0) == pytest.approx(2.0)
