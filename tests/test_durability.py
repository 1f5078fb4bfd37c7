"""Success is answered only after the disk has everything: seen in the system calls themselves."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from dicomnode.segments import paths, unsettled
from tests.factories import ct_series, write_series
from tests.fuzz import wire
from tests.fuzz.wire import Wire
from tests.hostile import encoded
from tests.peers import STORESCU, Node, needs, node_settings, send, wait_for
from tests.test_walk import series_uid

STRACE = "/usr/bin/strace"
pytestmark = [pytest.mark.network, pytest.mark.peers, needs(STORESCU, STRACE)]

_NAMES = re.compile(r"\b(link|linkat)\(|\bopen(at)?\(.*\bO_EXCL\b")
_RESPONSE = re.compile(r'send(to|msg)\(\d+<[^>]*>, [^"]*"\\4\\0')
"""A P-DATA-TF PDU goes out: the C-STORE response."""


@pytest.fixture(params=["log", "files"])
def node(request: pytest.FixtureRequest, tmp_path: Path, models_dir: Path) -> Iterator[Node]:
    """With a redo log, and without one."""
    megabytes = 34 if request.param == "log" else 0
    settings = {**node_settings(models_dir, []), "node": {"redo_log_mb": megabytes}}
    settings["node"]["unknown_callers"] = "accept"
    under_test = Node(tmp_path / "node", settings).start()
    wait_for(lambda: _open_segments(under_test) == bool(megabytes), "the redo log")
    yield under_test
    under_test.kill()


def _open_segments(node: Node) -> int:
    """The node uses a segment a little after its file is there."""
    descriptors = Path(f"/proc/{node.pid}/fd").iterdir()
    return sum(
        re.search(r"/redo/\d+\.log$", os.path.realpath(one)) is not None for one in descriptors
    )


def _log(node: Node) -> Path:
    return node.folder / "data" / "redo"


def test_an_instance_is_synced_before_each_response(node: Node, tmp_path: Path) -> None:
    """File, folder and journal, one after the other; or all that they will say, in the redo log."""
    files = write_series(ct_series(6, 64, 64), tmp_path / "source")
    logs = paths(_log(node))
    wanted = ["log", "name"] if logs else ["name", "file", "folder", "journal"]
    trace = tmp_path / "trace"
    watched = "trace=fsync,fdatasync,open,openat,link,linkat,sendto,sendmsg"
    with _traced(node, "-y", "-e", watched, "-o", str(trace)):
        assert send(STORESCU, files, node.port).returncode == 0
        wait_for(lambda: len(_RESPONSE.findall(trace.read_text())) >= 6, "six responses", 20)

    calls: list[str] = []
    responses = 0
    for line in trace.read_text().splitlines():
        if _RESPONSE.search(line):
            responses += 1
            assert calls[-len(wanted) :] == wanted, (responses, calls)
            calls = []
        elif (what := _what(line)) and (not calls or calls[-1] != what):
            calls.append(what)
    assert responses == 6


def test_an_instance_that_the_disk_does_not_take_is_refused_and_leaves_nothing(
    node: Node, tmp_path: Path
) -> None:
    files = write_series(ct_series(3, 64, 64), tmp_path / "source")
    assert send(STORESCU, files[:1], node.port).returncode == 0  # its folder is there
    data = node.folder / "data"
    broken = [*paths(_log(node)), *data.glob("received/*")]
    faults = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO"]
    faults += [word for path in broken for word in ("-P", str(path.resolve()))]
    with _traced(node, *faults, "-o", str(tmp_path / "trace")):
        refused = send(STORESCU, files[1:], node.port, "CT1", "-v")
    assert "Refused: OutOfResources" in refused.stdout + refused.stderr
    assert len(list(data.glob("received/*/*"))) == 1
    assert not list(data.glob("incoming/*"))
    assert "could not store the instance" in node.log
    assert ("the redo log cannot be written" in node.log) is (len(broken) == 2)
    assert send(STORESCU, files, node.port).returncode == 0
    assert len(list(data.glob("received/*/*.dcm"))) == 3


def test_what_was_not_acknowledged_before_a_stop_is_gone_and_can_be_sent_again(
    node: Node, tmp_path: Path
) -> None:
    """As a power failure leaves it: names without rows, and files whose end never got there."""
    files = write_series(ct_series(4, 64, 64), tmp_path / "source")
    assert send(STORESCU, files[:2], node.port).returncode == 0
    node.kill()
    received, incoming = node.folder / "data" / "received", node.folder / "data" / "incoming"
    folder = next(received.iterdir())
    acknowledged = sorted(folder.glob("*.dcm"))
    os.link(acknowledged[0], incoming / "0.part")  # its response was under way
    for number, (path, cut) in enumerate(((files[2], None), (files[3], 700)), start=1):
        part = incoming / f"{number}.part"
        part.write_bytes(path.read_bytes()[:cut])
        os.link(part, folder / f"1.2.3.{number}.dcm")
    (incoming / "9.part").write_bytes(b"half")
    node.start()
    assert sorted(folder.glob("*.dcm")) == acknowledged
    assert not list(incoming.iterdir())
    assert "removed 2 instances that the stop kept from being acknowledged" in node.log
    assert send(STORESCU, files, node.port).returncode == 0
    assert len(list(folder.glob("*.dcm"))) == 4
    assert node.run("check", "--storage").returncode == 0


@pytest.mark.parametrize("node", ["log"], indirect=True)
def test_what_a_power_failure_takes_back_comes_from_the_redo_log(
    node: Node, tmp_path: Path
) -> None:
    """As it leaves files and rows that were not synced yet: cut, empty, gone, or of other bytes."""
    first = write_series(ct_series(1, 64, 64), tmp_path / "first")
    assert send(STORESCU, first, node.port).returncode == 0
    journal, older = node.folder / "data" / "journal.db", tmp_path / "older.db"
    with closing(sqlite3.connect(journal)) as db, closing(sqlite3.connect(older)) as copy:
        db.backup(copy)
    files = write_series(ct_series(5, 64, 64, seed=2), tmp_path / "source")
    _wait_until_settled(node)
    assert send(STORESCU, files, node.port).returncode == 0
    node.kill()  # within the five seconds of SETTLE_SECONDS
    kept = sorted((node.folder / "data" / "received" / series_uid(files)).iterdir())
    whole = [path.read_bytes() for path in kept]
    kept[0].write_bytes(whole[0][:5000])
    kept[1].write_bytes(b"")
    kept[2].unlink()
    kept[3].write_bytes(bytes(len(whole[3])))
    for suffix in ("-wal", "-shm"):
        journal.with_name(journal.name + suffix).unlink(missing_ok=True)
    shutil.copy(older, journal)

    checked = node.run("check", "--storage")
    assert checked.returncode == 1
    assert checked.stdout.count("it is in the redo log: the node puts it right") == 5
    copied = node.run("backup", str(tmp_path / "copy"))
    assert copied.returncode == 1
    assert copied.stdout.count("it is in the redo log: the node puts it right") == 5
    node.start()
    assert "restored 5 instances from the redo log" in node.log
    assert [path.read_bytes() for path in kept] == whole
    assert node.run("check", "--storage").returncode == 0
    assert node.get(f"api/v1/series/{series_uid(files)}")[1]["instances"] == 5


@pytest.mark.parametrize("node", ["log"], indirect=True)
def test_a_repeat_in_the_redo_log_leaves_the_first_as_it_is(node: Node, tmp_path: Path) -> None:
    """Its file meta information names another sender."""
    files = write_series(ct_series(2, 64, 64), tmp_path / "source")
    assert send(STORESCU, files, node.port).returncode == 0
    _wait_until_settled(node)
    assert send(STORESCU, files, node.port, "PACS").returncode == 0
    node.kill()
    kept = sorted((node.folder / "data" / "received").glob("*/*.dcm"))
    first = [path.read_bytes() for path in kept]
    assert len(unsettled(_log(node))) == 2
    node.start()
    assert [path.read_bytes() for path in kept] == first
    assert node.run("check", "--storage").returncode == 0


@pytest.mark.parametrize("node", ["log"], indirect=True)
def test_after_a_disk_that_forgot_nothing_is_trusted_and_all_is_written_anew(
    node: Node, tmp_path: Path
) -> None:
    files = write_series(ct_series(3, 64, 64), tmp_path / "source")
    _wait_until_settled(node)
    assert send(STORESCU, files, node.port).returncode == 0
    node.kill()
    kept = sorted((node.folder / "data" / "received").glob("*/*.dcm"))
    whole = [path.read_bytes() for path in kept]
    for number, path in enumerate(kept):
        (tmp_path / str(number)).hardlink_to(path)
    (_log(node) / "failed").touch()
    node.start()
    assert "restored 3 instances from the redo log" in node.log
    assert [path.read_bytes() for path in kept] == whole
    assert not any((tmp_path / str(number)).samefile(path) for number, path in enumerate(kept))
    assert not (_log(node) / "failed").exists()
    assert node.run("check", "--storage").returncode == 0


def _wait_until_settled(node: Node) -> None:
    """So that what comes next has all its time."""
    wait_for(lambda: not unsettled(_log(node)), "the log to be settled", 30)


@pytest.mark.parametrize("node", ["log"], indirect=True)
def test_the_file_of_what_is_refused_is_gone_before_the_log_forgets_it(
    node: Node, tmp_path: Path
) -> None:
    """A power failure could bring back half of it, which nobody knows."""
    first, second = ct_series(2, 64, 64)
    trace, watched = tmp_path / "trace", "trace=fsync,fdatasync,unlink,unlinkat,sendto,sendmsg"
    with Wire(node.port, 30) as peer:
        peer.associate()
        assert peer.status(wire.store(encoded(first), first.SOPInstanceUID))[1] == 0
        threading.Event().wait(0.5)  # nobody knows any more whether the journal takes changes
        journal = sqlite3.connect(node.folder / "data" / "journal.db", isolation_level=None)
        journal.execute("BEGIN EXCLUSIVE")
        with _traced(node, "-y", "-e", watched, "-o", str(trace)):
            status = peer.status(wire.store(encoded(second), second.SOPInstanceUID))[1]
        journal.close()
        assert status == 0xA700
        calls = []
        for line in trace.read_text().splitlines():
            gone = "unlink" in line and "/received/" in line
            if what := "unlink" if gone else _what(line):
                calls.append(what)
        calls = [call for call in calls if call != "journal"]
        gone_at = calls.index("unlink")  # the log may be settled before and afterwards
        assert calls[gone_at - 1 : gone_at + 3] == ["log", "unlink", "folder", "log"]
        assert peer.status(wire.store(encoded(second), second.SOPInstanceUID))[1] == 0


@contextmanager
def _traced(node: Node, *options: str) -> Iterator[None]:
    """strace is attached to every thread of the node."""
    command = [STRACE, "-f", *options, "-p", str(node.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr is not None
        if b"attached" not in tracer.stderr.readline():
            pytest.skip("strace may not attach to processes here")
        try:
            yield
        finally:  # else a failure within would wait for it for ever
            tracer.send_signal(signal.SIGINT)
            tracer.wait(20)


def _what(line: str) -> str | None:
    """What a system call makes durable, or names."""
    if "resumed" in line or "ENOENT" in line:
        return None
    if _NAMES.search(line):
        return "name" if "/received/" in line else None
    if "sync(" not in line:
        return None
    if "/redo/" in line:
        return "log"
    if ".db" in line:
        return "journal"
    if "/incoming/" in line or ".dcm" in line:
        return "file"
    return "folder" if "/received/" in line else None
