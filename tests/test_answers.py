"""Every answer to a C-STORE request is counted, whoever chose its status: seen on associations."""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import Engine

from dicomnode.config import config_from_mapping
from dicomnode.journal import Journal
from dicomnode.redo import REDO
from dicomnode.scp import StorageScp
from dicomnode.segments import unsettled
from dicomnode.series import Carriers
from dicomnode.spool import Spool
from dicomnode.tables import Database
from tests.factories import ct_series, no_log, small_log
from tests.fuzz import wire
from tests.fuzz.receiver import data_set
from tests.fuzz.wire import CT, VERIFICATION, Wire
from tests.hostile import encoded

pytestmark = pytest.mark.network


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path)


@pytest.fixture(params=[no_log, small_log], ids=["files", "log"])
def peer(request: pytest.FixtureRequest, tmp_path: Path, spool: Spool) -> Iterator[Wire]:
    """An association of the peer "scanner" with Verification on context 1 and CT on context 3;
    of a node without and with a redo log."""
    node = {"data_dir": str(tmp_path), "bind": "127.0.0.1", "port": 0, "reserve_free_gb": 0}
    peers = {"scanner": {"ae_title": "WIRE", "host": "127.0.0.1"}}
    spool.prepare()
    database = Database(tmp_path / "journal.db")
    config = config_from_mapping({"node": node, "peers": peers}, tmp_path)
    redo = request.param(tmp_path)
    scp = StorageScp(config, spool, Journal(database), redo, Carriers(), ())
    scp.start()
    with Wire(scp.port) as connected:
        connected.associate()
        yield connected
    scp.drain(0)
    redo.close()
    database.close()


def _counted() -> dict[tuple[str, str], float]:
    name = "dicomnode_instances_received_total"
    return {
        (sample.labels["peer"], sample.labels["status"]): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == name
    }


def _asked(peer: Wire, message: bytes) -> tuple[int, dict[tuple[str, str], float]]:
    """The status that answers a message, and what was counted meanwhile."""
    before = _counted()
    status = peer.status(message)[1]
    changes = {key: value - before.get(key, 0) for key, value in _counted().items()}
    return status, {key: change for key, change in changes.items() if change}


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (wire.p_data(3, 3, wire.store_rq("../x")) + wire.p_data(3, 2, b"ab"), 0x0117),
        (wire.p_data(3, 3, wire.store_rq(sop_class="1.2.3")) + wire.p_data(3, 2, b"ab"), 0x0122),
        (wire.p_data(3, 3, wire.command(1, sop_instance="1.2")), 0xC000),
        (wire.p_data(1, 3, wire.command(1, sop_class=VERIFICATION)), 0x0211),
        (wire.store(b"no data set", "1.2.3"), 0xC000),
        (wire.store(data_set(), "1.2.3.4"), 0xA900),
    ],
    ids=["UID", "class", "no data set", "on Verification", "not parsable", "other UID"],
)
def test_a_refused_request_is_counted_once(peer: Wire, message: bytes, status: int) -> None:
    assert _asked(peer, message) == (status, {("scanner", f"0x{status:04X}"): 1})


def test_a_stored_instance_is_counted_once(peer: Wire) -> None:
    (instance,) = ct_series(1)
    message = wire.store(encoded(instance), instance.SOPInstanceUID)
    assert _asked(peer, message) == (0, {("scanner", "0x0000"): 1})


# the same SOP Instance UID again

UID = "1.2.3.4"


def _sent(peer: Wire, series: str = "1.5", name: str = "A", uid: str = UID) -> int:
    """The status of an instance with `UID`, in a series, told apart by a name."""
    (instance,) = ct_series(1, 8, 8)
    instance.SOPInstanceUID, instance.SeriesInstanceUID = uid, series
    instance.SeriesDescription = name
    return peer.status(wire.store(encoded(instance), uid))[1]


def _lies(spool: Spool) -> dict[str, list[str]]:
    """Which instances lie where."""
    return {
        what: sorted(path.parent.name for path in (spool.root / what).rglob("*.dcm"))
        for what in ("received", "quarantine")
    }


def test_the_same_bytes_again_are_acknowledged_and_kept_once(peer: Wire, spool: Spool) -> None:
    assert [_sent(peer), _sent(peer)] == [0, 0]
    assert _lies(spool) == {"received": ["1.5"], "quarantine": []}


def test_a_uid_with_a_leading_zero_is_stored_as_it_came(peer: Wire, spool: Spool) -> None:
    assert _sent(peer, series="1.2.05") == 0
    assert _lies(spool) == {"received": ["1.2.05"], "quarantine": []}


@pytest.mark.parametrize("series", ["1.5", "1.6"], ids=["same series", "another series"])
def test_other_bytes_are_refused_and_set_aside(peer: Wire, spool: Spool, series: str) -> None:
    assert _sent(peer) == 0
    before = spool.path("1.5", UID).read_bytes()
    assert _sent(peer, series, "B") == 0x0111
    assert _lies(spool) == {"received": ["1.5"], "quarantine": ["quarantine"]}
    assert spool.path("1.5", UID).read_bytes() == before
    assert not list(spool.incoming.iterdir())


@pytest.mark.parametrize(
    ("again", "status"),
    [(("1.5", "A"), 0), (("1.5", "B"), 0x0111), (("1.6", "A"), 0x0111)],
    ids=["same bytes", "other bytes", "another series"],
)
def test_an_instance_whose_row_waits_is_known(
    peer: Wire, spool: Spool, tmp_path: Path, again: tuple[str, str], status: int
) -> None:
    """It does where the journal just took another, and there is a redo log."""
    assert [_sent(peer, uid="1.2.3.3"), _sent(peer)] == [0, 0]
    assert _sent(peer, *again) == status
    assert _lies(spool) == {
        "received": ["1.5", "1.5"],
        "quarantine": ["quarantine"] if status else [],
    }
    with sqlite3.connect(tmp_path / "journal.db") as journal:
        found = journal.execute("SELECT sop_instance_uid, series_uid FROM instances").fetchall()
    assert sorted(found) == [("1.2.3.3", "1.5"), (UID, "1.5")]


def test_a_file_that_retention_deletes_meanwhile_is_stored_again(
    peer: Wire, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its name and the look into it."""
    assert _sent(peer) == 0
    known = Journal.known

    def deleted(journal: Journal, uid: str) -> object:
        found = known(journal, uid)
        if found is not None and spool.has("1.5", uid):
            spool.path("1.5", uid).unlink()
            return (*found[:2], True)
        return found

    monkeypatch.setattr(Journal, "known", deleted)
    assert _sent(peer) == 0
    assert _lies(spool) == {"received": ["1.5"], "quarantine": []}


def test_a_journal_that_cannot_be_opened_once_more_is_out_of_resources(
    peer: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Engine) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    assert _sent(peer, uid="1.2.3.9") == 0
    with monkeypatch.context() as broken:
        broken.setattr(Engine, "raw_connection", refuse)
        assert _sent(peer) == 0xA700
    assert _sent(peer) == 0


@pytest.mark.parametrize("peer", [small_log], ids=["log"], indirect=True)
def test_other_bytes_wait_until_what_was_refused_cannot_come_back(
    peer: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash would do the log's entry again, which might displace them."""

    def refuse(descriptor: int) -> None:
        raise OSError(5, os.strerror(5))

    assert _sent(peer, uid="1.2.3.9") == 0
    with monkeypatch.context() as broken:
        for name in ("fsync", "fdatasync"):
            broken.setattr(os, name, refuse)
        assert _sent(peer) == 0xA700
    assert len(unsettled(tmp_path / REDO)) == 1  # its entry is overwritten, only not for sure
    assert [_sent(peer, name="B"), _sent(peer, uid="1.2.3.8")] == [0xA700, 0]
    assert _sent(peer) == 0


def test_a_file_that_was_lost_comes_back_with_the_same_bytes_only(peer: Wire, spool: Spool) -> None:
    assert _sent(peer) == 0
    spool.path("1.5", UID).unlink()
    assert _sent(peer, "1.5", "B") == 0x0111
    assert _lies(spool)["received"] == []
    assert _sent(peer) == 0
    assert _lies(spool)["received"] == ["1.5"]


def test_a_file_that_the_journal_does_not_know_is_adopted_by_its_bytes(
    peer: Wire, spool: Spool, tmp_path: Path
) -> None:
    assert _sent(peer) == 0
    with sqlite3.connect(tmp_path / "journal.db") as journal:
        journal.execute("DELETE FROM instances")
    assert _sent(peer, "1.5", "B") == 0x0111
    assert _sent(peer) == 0
    with sqlite3.connect(tmp_path / "journal.db") as journal:
        assert journal.execute("SELECT sop_instance_uid FROM instances").fetchall() == [(UID,)]


def test_a_refusal_for_want_of_room_is_counted_before_anything_is_received(
    peer: Wire, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spool, "has_room", lambda *_: False)
    counted = {("scanner", "0xA700"): 1}
    assert _asked(peer, wire.store(data_set())) == (0xA700, counted)


def test_a_disk_that_cannot_be_written_is_counted(peer: Wire, spool: Spool) -> None:
    (instance,) = ct_series(1)
    message = wire.store(encoded(instance), instance.SOPInstanceUID)
    spool.incoming.rmdir()
    spool.received.rmdir()
    assert _asked(peer, message) == (0xA700, {("scanner", "0xA700"): 1})
    assert not spool.received.exists()
    spool.prepare()
    assert _asked(peer, message) == (0, {("scanner", "0x0000"): 1})


def test_what_was_refused_is_not_in_the_redo_log(peer: Wire, spool: Spool, tmp_path: Path) -> None:
    """Done again, it would take the place of what its sender sends instead."""
    assert _sent(peer, uid="1.2.3.3") == 0
    spool.path("1.9", UID).parent.touch()  # no folder: nothing can be written into it
    assert _sent(peer, series="1.9") == 0xA700
    spool.path("1.9", UID).parent.unlink()
    assert _sent(peer, series="1.9", name="B") == 0
    kept = spool.path("1.9", UID).read_bytes()
    logged = [entry.read() for entry in unsettled(tmp_path / "redo")]
    assert logged[1:] in ([], [kept])


def test_an_echo_is_no_instance(peer: Wire) -> None:
    assert _asked(peer, wire.p_data(1, 3, wire.ECHO_RQ)) == (0, {})
    assert _asked(peer, wire.p_data(3, 3, wire.command(0x30, sop_class=CT))) == (0x0211, {})
