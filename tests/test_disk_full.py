"""No room, a locked journal, a data folder that is read-only or gone: said, survived, made good.

The data folder is a small tmpfs of its own, which takes root.
"""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom import Dataset
from sqlalchemy import select

from dicomnode import tables as t
from dicomnode.audit import storage_faults
from dicomnode.config import config_from_mapping
from dicomnode.errors import JournalBusy
from dicomnode.journal import Journal
from dicomnode.scp import StorageScp
from dicomnode.series import Carriers
from dicomnode.spool import Spool
from dicomnode.tables import Database
from tests import hostile
from tests.factories import ct_series, no_log
from tests.fuzz import wire
from tests.fuzz.wire import CT, EXPLICIT, IMPLICIT, VERIFICATION, Wire
from tests.peers import (
    STORESCP,
    Archive,
    Node,
    free_port,
    needs,
    node_settings,
    running_node,
    storescp,
    wait_for,
)

pytestmark = [pytest.mark.network, pytest.mark.peers, needs(STORESCP)]
OUT_OF_RESOURCES = 0xA700
MOUNT, UMOUNT, MKFS = "/usr/bin/mount", "/usr/bin/umount", "/usr/sbin/mkfs.ext4"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB at ``<node folder>/data``."""
    folder = tmp_path / "node" / "data"
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or _mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", folder):
        pytest.skip("a tmpfs cannot be mounted here: not root, or not allowed")
    yield folder
    subprocess.run([UMOUNT, "-l", str(folder)], check=True)


def _mount(*arguments: object) -> int:
    if not Path(MOUNT).exists():
        return 1
    command = [MOUNT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with storescp(tmp_path / "dcmtk") as peer:
        yield peer


@pytest.fixture
def node(tmp_path: Path, models_dir: Path, archive: Archive, small_disk: Path) -> Iterator[Node]:
    settings = node_settings(models_dir, [archive])
    settings["peers"]["wire"] = {"ae_title": "WIRE", "host": "127.0.0.1"}
    settings["retention"] = {"require_commitment": False}
    with running_node(tmp_path / "node", settings) as running:
        yield running


def stored(port: int, datasets: list[Dataset]) -> list[int]:
    """The status of each instance, on one association."""
    statuses = []
    with Wire(port, 60) as peer:
        peer.associate([(1, VERIFICATION, (IMPLICIT,)), (3, CT, (EXPLICIT,))])
        for dataset in datasets:
            peer.send(wire.store(hostile.encoded(dataset), str(dataset.SOPInstanceUID)))
            kind, body = peer.read()
            assert kind == wire.P_DATA
            statuses.append(wire.read_response(body[6:])[1])
        peer.ask(wire.RELEASE_RQ_PDU)
    return statuses


def echo(port: int) -> float:
    """Seconds that association and C-ECHO took."""
    start = time.monotonic()
    with Wire(port, 20) as peer:
        peer.associate()
        assert peer.echo() == 0
    return time.monotonic() - start


@contextlib.contextmanager
def filled(folder: Path, leave: int = 0) -> Iterator[None]:
    """A file that takes all room but `leave` bytes, removed at the end."""
    ballast = folder / "ballast"
    room = os.statvfs(folder)
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, room.f_bavail * room.f_frsize - leave)))
    yield
    ballast.unlink()


def half_stored(node: Node) -> list[Path]:
    return list((node.folder / "data" / "incoming").iterdir())


def test_a_disk_that_fills_up_refuses_and_takes_the_same_series_again(
    node: Node, archive: Archive, small_disk: Path
) -> None:
    series = ct_series(6, 200, 250)  # 100 kB each
    with filled(small_disk, leave=350_000):
        first = stored(node.port, series)
        assert first[0] == 0
        assert set(first[1:]) == {0, OUT_OF_RESOURCES}
        assert echo(node.port) < 2
        assert half_stored(node) == []
        status, body = node.get("readyz")
        assert status == 503
        assert "the disk of node.data_dir is full" in str(body)
        kept = {path.stem for path in small_disk.glob("received/*/*.dcm")}
        accepted = {
            str(ds.SOPInstanceUID) for ds, status in zip(series, first, strict=True) if not status
        }
        assert accepted <= kept
    assert stored(node.port, series) == [0] * 6
    settled = node.wait_settled(str(series[0].SeriesInstanceUID))
    assert settled["jobs"][-1]["state"] == "done"
    assert len(_derived(archive)) == 6
    assert "Traceback" not in node.log


def _derived(archive: Archive) -> list[Path]:
    return sorted(archive.folder.glob("CT.*"))


def test_a_result_without_room_is_made_again_when_there_is_room(
    node: Node, archive: Archive, small_disk: Path
) -> None:
    series = ct_series(6, 200, 250)
    uid = str(series[0].SeriesInstanceUID)
    assert stored(node.port, series) == [0] * 6
    with filled(small_disk, leave=250_000):
        wait_for(lambda: "OUT_OF_RESOURCES" in str(node.get(f"api/v1/series/{uid}")), "no room")
        assert list(small_disk.glob("results/*/*")) == []
        assert echo(node.port) < 2
    settled = node.wait_settled(uid)
    assert [job["state"] for job in settled["jobs"]] == ["done"]
    assert len(_derived(archive)) == 6


def _lock(node: Node) -> sqlite3.Connection:
    """The journal, held by another program."""
    journal = sqlite3.connect(node.folder / "data" / "journal.db", isolation_level=None)
    journal.execute("BEGIN EXCLUSIVE")
    return journal


def test_a_locked_journal_is_out_of_resources_in_time_and_goes_on_afterwards(
    node: Node, archive: Archive
) -> None:
    series = ct_series(4)
    journal = _lock(node)
    status, body = node.get("readyz")  # nobody has met it yet
    assert status == 503
    assert body["reasons"] == ["the journal cannot be changed now: database is locked"]
    answers: dict[int, list[int]] = {}

    def send(number: int) -> None:
        answers[number] = stored(node.port, [series[number]])

    senders = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    start = time.monotonic()
    for sender in senders:
        sender.start()
    worst = max(echo(node.port) for _ in range(10))
    for sender in senders:
        sender.join()
    took = time.monotonic() - start
    print(f"refused after {took:.1f} s, worst echo {worst:.3f} s")
    assert worst < 2
    assert answers == {number: [OUT_OF_RESOURCES] for number in range(4)}
    assert took < 25  # peers give up after 30; measured: 10
    assert half_stored(node) == []
    assert f"to wire at 127.0.0.1, instance {series[0].SOPInstanceUID}: the journal" in node.log
    journal.rollback()
    assert node.get("readyz")[0] == 200
    assert stored(node.port, series) == [0] * 4
    settled = node.wait_settled(str(series[0].SeriesInstanceUID))
    assert settled["jobs"][-1]["state"] == "done"
    assert "Traceback" not in node.log


def test_what_is_under_way_while_the_journal_is_locked_is_not_lost(
    node: Node, archive: Archive
) -> None:
    series = ct_series(6)
    uid = str(series[0].SeriesInstanceUID)
    assert stored(node.port, series) == [0] * 6
    wait_for(lambda: "job 1" in str(node.get(f"api/v1/series/{uid}")), "the job to start")
    journal = _lock(node)
    wait_for(lambda: "cannot be changed now" in node.log, "the node to notice")
    journal.rollback()
    settled = node.wait_settled(uid)
    assert [job["state"] for job in settled["jobs"]] == ["done"]
    assert len(_derived(archive)) == 6


def test_a_read_only_data_folder_is_refused_and_told(node: Node, small_disk: Path) -> None:
    series = ct_series(3)
    assert stored(node.port, series[:1]) == [0]
    folder = small_disk / "incoming"  # the whole cannot be remounted: the journal is open
    assert _mount("--bind", folder, folder) == 0
    assert _mount("-o", "remount,bind,ro", folder) == 0
    assert stored(node.port, series[1:]) == [OUT_OF_RESOURCES] * 2
    assert echo(node.port) < 2
    status, body = node.get("readyz")
    assert status == 503
    assert "node.data_dir cannot be written: Read-only file system" in body["reasons"]
    subprocess.run([UMOUNT, str(folder)], check=True)
    assert stored(node.port, series) == [0] * 3
    assert node.get("readyz")[0] == 200


def test_a_file_system_that_an_error_made_read_only_is_told(tmp_path: Path) -> None:
    """ext4 then says so to who writes, and to nobody who asks for leave."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    if not Path(MKFS).exists() or subprocess.run([MKFS, "-q", image], check=False).returncode:
        pytest.skip("an ext4 cannot be made here")
    if os.geteuid() != 0 or _mount("-o", "loop", image, folder):
        pytest.skip("a file cannot be mounted here: not root, or not allowed")
    try:
        spool = Spool(folder)
        spool.prepare()
        assert spool.trouble() == ""
        assert _mount("-o", "remount,abort", folder) == 0
        assert spool.trouble() == "node.data_dir cannot be written: Read-only file system"
    finally:
        subprocess.run([UMOUNT, str(folder)], check=True)


def test_a_data_folder_that_is_gone_is_refused_and_told(node: Node, small_disk: Path) -> None:
    assert stored(node.port, ct_series(1)) == [0]
    for name in ("incoming", "received", "results", "quarantine"):
        (small_disk / name).rename(small_disk / f"was-{name}")
    assert stored(node.port, ct_series(2, seed=2)) == [OUT_OF_RESOURCES] * 2
    assert echo(node.port) < 2
    status, body = node.get("readyz")
    assert status == 503
    assert "node.data_dir has lost its folders; restart when it is back" in body["reasons"]
    assert node.get("metrics")[0] == 200


def test_what_a_full_journal_took_is_there(small_disk: Path) -> None:
    """Group commits on a disk that fills up: a change that did not raise is durable."""
    database = Database(small_disk / "journal.db")
    taken: list[str] = []
    refused = threading.Event()

    def note(text: str) -> Callable[..., None]:
        return lambda db: t.note(db, "1.2.3", 0.0, text)

    def write(thread: int) -> None:
        for number in range(400):
            text = f"{thread} {number} " + "x" * 20_000
            try:
                database.commit(note(text))
                taken.append(text)
            except JournalBusy:
                refused.set()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused.is_set()
    database.close()
    again = Database(small_disk / "journal.db", create=False)
    there = {text for (text,) in again.read(select(t.events.c.text))}
    assert set(taken) <= there
    assert taken


def test_a_job_is_done_only_with_the_last_of_two_deliveries(
    tmp_path: Path, models_dir: Path, archive: Archive
) -> None:
    late = Archive("LATE", free_port(), folder=tmp_path / "late")
    series = ct_series(3)
    uid = str(series[0].SeriesInstanceUID)
    settings = node_settings(models_dir, [archive, late])
    settings["peers"]["wire"] = {"ae_title": "WIRE", "host": "127.0.0.1"}
    with running_node(tmp_path / "node", settings) as node:
        assert stored(node.port, series) == [0] * 3

        def deliveries() -> list[str]:
            found = node.get(f"api/v1/series/{uid}")[1]
            jobs = found.get("jobs") or [{"deliveries": []}]
            return [delivery["state"] for delivery in jobs[0]["deliveries"]]

        wait_for(lambda: deliveries() == ["delivered", "waiting"], "the first delivery")
        wait_for(lambda: "put off" in node.log, "the second to fail")
        assert node.get(f"api/v1/series/{uid}")[1]["jobs"][0]["state"] == "sending"
        with storescp(late.folder, "LATE", late.port):
            settled = node.wait_settled(uid)
            assert settled["jobs"][0]["state"] == "done"
            assert deliveries() == ["delivered", "delivered"]
            assert len(_derived(late)) == len(_derived(archive)) == 3


def test_a_journal_that_was_deleted_or_replaced_is_refused_and_told(tmp_path: Path) -> None:
    """SQLite would go on in the deleted file, and every promise would be gone with the process."""
    node = {"data_dir": str(tmp_path), "bind": "127.0.0.1", "port": 0, "reserve_free_gb": 0}
    peers = {"wire": {"ae_title": "WIRE", "host": "127.0.0.1"}}
    config = config_from_mapping({"node": node, "peers": peers}, tmp_path)
    spool, file = Spool(tmp_path), tmp_path / "journal.db"
    spool.prepare()
    database, series = Database(file), ct_series(4)
    scp = StorageScp(config, spool, Journal(database), no_log(tmp_path), Carriers(), ())
    scp.start()
    try:
        assert stored(scp.port, series[:1]) == [0]
        file.rename(tmp_path / "away")
        assert stored(scp.port, series[:2]) == [OUT_OF_RESOURCES] * 2
        said = database.trouble()
        shutil.copy(tmp_path / "away", file)
        assert stored(scp.port, series[1:2]) == [OUT_OF_RESOURCES]
        (tmp_path / "away").replace(file)
        assert stored(scp.port, series) == [0] * 4
    finally:
        scp.drain(5)
    assert said == "journal.db was deleted or replaced while it was in use; put it back"
    assert database.trouble() == ""
    assert list(storage_faults(database, spool)) == [4]
