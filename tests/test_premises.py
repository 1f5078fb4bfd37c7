"""What a machine must offer, and what a start refuses: a folder, addresses, a lost journal."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicomnode import premises
from dicomnode.cli import main
from dicomnode.errors import ConfigError
from dicomnode.jobs import Jobs
from dicomnode.journal import Journal
from dicomnode.premises import address_problem, folder_problem
from dicomnode.recovery import recover, refuse_lost_journal
from dicomnode.spool import Spool
from dicomnode.tables import Database
from tests.factories import enter, no_log, small_log
from tests.peers import Node


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "data")
    made.prepare()
    return made


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders on two file systems, or on one without hard links."""

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(premises.os, "link", refuse)


def received(spool: Spool) -> Path:
    path = spool.path("1.2.3", "1.2.3.4")
    path.parent.mkdir()
    path.write_bytes(b"acknowledged")
    return path


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_can_be_used_is_left_as_it_was(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "a" / "data"
    if there:
        Spool(folder).prepare()
    before = sorted(tmp_path.rglob("*"))
    assert folder_problem(folder) == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_check_names_a_folder_and_addresses_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    config = tmp_path / "config.yaml"
    config.write_text(
        "node: {data_dir: file, bind: 203.0.113.8}\nhttp: {bind: 203.0.113.7, token: x}\n"
    )
    assert main(["check", "--config", str(config)]) == 1
    told = capsys.readouterr().err
    assert f"node.data_dir: {tmp_path / 'file'} is not a folder\n" in told
    assert "node.bind: 203.0.113.8: Cannot assign requested address; give an address" in told
    assert "http.bind: 203.0.113.7: Cannot assign requested address; give an address" in told


@pytest.mark.parametrize("bind", ["127.0.0.1", "localhost", "0.0.0.0", "::1"])  # noqa: S104
def test_an_address_of_this_machine_is_no_problem(bind: str) -> None:
    assert address_problem(bind) == ""


@pytest.mark.usefixtures("no_links")
def test_a_data_folder_across_file_systems_is_refused_before_anything_is_received(
    spool: Spool,
) -> None:
    """Else every C-STORE would be answered with 0xA700, and the node call itself ready."""
    assert "cross-device" in folder_problem(spool.root)
    database = Database(spool.root / "journal.db")
    with pytest.raises(ConfigError, match=r"node\.data_dir: .*received: Invalid cross-device link"):
        recover(spool, Journal(database), no_log(spool.root), Jobs(database), 0.0, "hold")
    database.close()


def test_what_the_log_left_is_synced_by_itself_where_there_is_to_be_no_log(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data folder may have been moved to a file system whose sync as a whole says nothing."""
    enter(small_log(spool.root), "1.2", "1.2.9")
    synced, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    database = Database(spool.root / "journal.db")
    monkeypatch.setattr(os, "fsync", noted)
    recover(spool, Journal(database), no_log(spool.root), Jobs(database), 0.0, "hold")
    database.close()
    file = spool.path("1.2", "1.2.9")
    assert file.read_bytes() == bytes(100)
    assert {file, file.parent, spool.received} <= set(synced)


def test_a_journal_that_is_gone_is_not_replaced_by_a_new_one(spool: Spool) -> None:
    journal = spool.root / "journal.db"
    refuse_lost_journal(spool, journal)  # nothing was received yet
    received(spool)
    for _ in "missing", "empty":
        with pytest.raises(ConfigError, match=r"acknowledged, but journal\.db is gone: put it"):
            refuse_lost_journal(spool, journal)
        journal.touch()
    sqlite3.connect(journal).execute("PRAGMA user_version = 1").connection.close()
    with pytest.raises(ConfigError, match="is gone"):
        refuse_lost_journal(spool, journal)
    journal.unlink()
    Database(journal).close()
    refuse_lost_journal(spool, journal)  # older than what was received, but a journal
    journal.write_bytes(b"damaged" * 1000)
    refuse_lost_journal(spool, journal)  # whoever opens it will say so


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    under_test = Node(tmp_path / "node", {"peers": {}})
    yield under_test
    under_test.kill()


@pytest.mark.network
def test_a_node_without_its_journal_does_not_start(node: Node) -> None:
    before = os.umask(0), signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may run this
    node.start()
    os.umask(before[0])
    signal.signal(signal.SIGHUP, before[1])
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (node.folder / "data").iterdir()]
    assert not any(mode & 0o027 for mode in modes)  # it knows which patient has which study
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)  # the terminal was closed: an orderly stop
    assert node.process.wait(60) == 0
    received(Spool(node.folder / "data"))
    for path in (node.folder / "data").glob("journal.db*"):
        path.unlink()
    command = [sys.executable, "-m", "dicomnode", "serve", "--config", str(node.config)]
    for _ in range(2):
        started = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert started.returncode == 1
        assert "journal.db is gone" in started.stderr
        assert "Traceback" not in started.stderr


def test_a_terminal_that_lacks_a_letter_gets_its_number(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("peers: {x: {ae_title: X}}\nnode: {data_dir: Hjørring}\n", "utf-8")
    (tmp_path / "Hjørring").touch()
    code = "import sys; from dicomnode.cli import main; sys.exit(main(sys.argv[1:]))"
    told = subprocess.run(
        [sys.executable, "-c", code, "check", "--config", str(config)],
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 1
    assert "Hj\\xf8rring is not a folder" in told.stderr


def test_the_kind_of_a_file_system_is_that_of_the_mount_beneath(tmp_path: Path) -> None:
    said = subprocess.run(
        ["/usr/bin/stat", "-f", "-c", "%T", "/proc", "/dev", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert premises.kind_of(Path("/proc/self")) == said[0] == "proc"
    link = tmp_path / "link"
    link.symlink_to("/proc")
    assert premises.kind_of(link) == "proc"
    assert premises.kind_of(tmp_path / "to come").startswith(said[2].split("/")[0][:3])
