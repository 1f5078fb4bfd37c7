"""A copy of a running node that another one can go on from; and whether files equal the journal."""

import itertools
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from dicomnode import backup
from dicomnode.audit import IN_LOG, Fault, storage_faults
from dicomnode.backup import Copied, back_up
from dicomnode.config import RetentionSection
from dicomnode.errors import BackupError, DicomNodeError
from dicomnode.jobs import Jobs, Output
from dicomnode.journal import Arrival, Journal
from dicomnode.lifecycle import Event
from dicomnode.migrations import SCHEMA_VERSION, version_of
from dicomnode.retention import Rules, purge
from dicomnode.spool import Spool, dataset_digest
from dicomnode.tables import Database
from dicomnode.upper_layer.incoming import file_meta
from tests.factories import ct_series, enter, small_log, write_series
from tests.peers import (
    ORTHANC,
    STORESCU,
    Node,
    free_port,
    needs,
    node_settings,
    orthanc,
    send,
    wait_for,
)
from tests.test_walk import series_uid

OLD = 1e9
"""Seconds after which nothing is kept."""
RULES = Rules(RetentionSection(received_hours=24, results_hours=24))


class Data:
    """A data folder with two received series, one of them translated and delivered."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spool = folder, Spool(folder)
        self.spool.prepare()
        self.database = Database(folder / "journal.db")
        self.journal, self.jobs = Journal(self.database), Jobs(self.database)
        for series, instance in itertools.product((1, 2), (1, 2, 3)):
            self.receive(f"1.{series}", f"1.{series}.{instance}")
        for seen in self.journal.open_series():
            routes = [("r", "routine")] if seen.series_uid == "1.1" else []
            assert self.jobs.close_series(seen, "", routes, [], 10.0)
        self.translate()
        self.conflict()

    def receive(self, series: str, uid: str, content: bytes = b"received ") -> None:
        part = self.spool.incoming / uid
        part.write_bytes(content + uid.encode())
        digest, size = dataset_digest(part)
        assert self.spool.keep(part, series, uid)
        part.unlink()
        facts = (series, "1", "CT", "1.2", "1.2", digest, size, "CT1", "DICOMNODE", None, None)
        self.journal.record_instance(Arrival(uid, *facts), 5.0)

    def translate(self) -> None:
        job = self.jobs.claim(11.0)
        assert job is not None
        for uid in ("2.1.1", "2.1.2"):
            path = self.spool.result_path("2.1", uid)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"derived")
        made = [Output("2.1", uid, "1.2") for uid in ("2.1.1", "2.1.2")]
        self.jobs.derived(job, made, [], {}, Event.NOTHING_TO_SEND, 12.0)

    def conflict(self) -> None:
        part = self.spool.incoming / "part"
        part.write_bytes(b"other bytes")
        self.spool.set_aside(part, "1.1.1", "d" * 64)
        facts = ("1.1", "1", "CT", "1.2", "1.2", "d" * 64, 1, "CT1", "DICOMNODE", None, None)
        self.journal.record_conflict(Arrival("1.1.1", *facts), 13.0)

    def faults(self) -> list[Fault | int]:
        return list(storage_faults(self.database, self.spool))


def test_a_file_whose_row_comes_a_little_later_is_no_fault(tmp_path: Path) -> None:
    """As the running node writes them."""
    data = Data(tmp_path / "data")
    content = memoryview(b"received a moment ago")
    data.spool.write("1.2", "1.2.9", content)
    digest, size = dataset_digest(data.spool.path("1.2", "1.2.9"))
    facts = ("1.2", "1", "CT", "1.2", "1.2", digest, size, "CT1", "DICOMNODE", None, None)
    later = threading.Timer(0.3, data.journal.record_instance, (Arrival("1.2.9", *facts), 6.0))
    later.start()
    found = data.faults()
    later.join()
    assert found == [6]
    assert data.faults() == [7]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path / "data")


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the journal and the lock, by its path below the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(("journal.db", "lock", "node.json"))
    }


def copied_faults(target: Path) -> list[Fault | int]:
    database = Database(target / "journal.db", create=False)
    found = list(storage_faults(database, Spool(target)))
    database.close()
    return found


def test_a_changed_meta_information_is_found(data: Data) -> None:
    """Another transfer syntax there, and the same bytes are other pixels."""
    meta = file_meta("1.2", "1.3.1", "1.2", "CT1", "1.9", "X")
    data.receive("1.3", "1.3.1", meta + b"data set ")
    assert data.faults() == [7]
    path = data.spool.path("1.3", "1.3.1")
    sound = path.read_bytes()
    for was, now in ((b"\x10\0UI\4\x001.2", b"\x10\0UI\4\x001.7"), (b"1.3.1", b"1.3.2")):
        path.write_bytes(sound.replace(was, now, 1))
        what = "its file meta information is not what was written"
        assert data.faults() == [Fault("1.3.1", "1.3", what), 7]


# the backup


def test_a_backup_has_the_journal_and_every_file(data: Data, tmp_path: Path) -> None:
    copied = back_up(data.folder, tmp_path / "backup")
    assert copied == Copied(received=6, results=2, quarantined=1, linked=9)
    assert files(tmp_path / "backup") == files(data.folder)
    assert copied_faults(tmp_path / "backup") == [6]
    assert version_of(tmp_path / "backup" / "journal.db") == SCHEMA_VERSION
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "data"]
    assert not list(tmp_path.glob("backup/journal.db-*"))  # all is in the one file


def test_a_backup_names_what_only_the_redo_log_has(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the journal gets it while files are copied: the copied journal has not got it."""
    log = small_log(data.folder)
    arrival = enter(log, "1.2", "1.2.9")
    missing = [Fault("1.2.9", "1.2", IN_LOG)]
    assert back_up(data.folder, tmp_path / "first").faults == missing
    assert data.faults() == [*missing, 6]
    copy = backup.copy_journal

    def and_go_on(source: Path, target: Path) -> None:
        copy(source, target)
        data.journal.record_instance(arrival, 2.0)

    monkeypatch.setattr(backup, "copy_journal", and_go_on)
    assert back_up(data.folder, tmp_path / "second").faults == missing
    assert back_up(data.folder, tmp_path / "third").faults == [
        Fault("1.2.9", "1.2", IN_LOG)  # its file is still to come
    ]
    log.close()


def test_files_are_copied_where_they_cannot_be_linked(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another file system."""

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = back_up(data.folder, tmp_path / "backup")
    assert copied == Copied(received=6, results=2, quarantined=1, linked=0)
    assert files(tmp_path / "backup") == files(data.folder)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system here")  # noqa: S108
def test_a_backup_to_another_file_system_shares_nothing(data: Data) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert back_up(data.folder, Path(other) / "backup").linked == 0
        assert copied_faults(Path(other) / "backup") == [6]
        assert files(Path(other) / "backup") == files(data.folder)


def test_what_comes_after_the_snapshot_is_not_in_it(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete for every row it has: neither a row without a file nor a file without a row."""
    after(monkeypatch, lambda: data.receive("1.2", "1.2.4"))
    assert back_up(data.folder, tmp_path / "backup").received == 6
    assert copied_faults(tmp_path / "backup") == [6]
    assert data.faults() == [7]


def test_what_retention_deletes_meanwhile_is_marked_so(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after(monkeypatch, lambda: purge(data.database, data.spool, RULES, OLD))
    copied = back_up(data.folder, tmp_path / "backup")
    assert (copied.received, copied.results, copied.purged, copied.faults) == (0, 0, 8, [])
    assert copied_faults(tmp_path / "backup") == [0]
    again = back_up(tmp_path / "backup", tmp_path / "second")
    assert (again.purged, again.faults) == (0, [])  # its journal does not expect them


def after(monkeypatch: pytest.MonkeyPatch, event: object) -> None:
    """Let `event` happen between the copy of the journal and that of the files."""
    real = backup.copy_journal

    def copy(path: Path, copy: Path) -> None:
        real(path, copy)
        assert callable(event)
        event()

    monkeypatch.setattr(backup, "copy_journal", copy)


def test_missing_and_damaged_files_are_named_and_the_rest_is_copied(
    data: Data, tmp_path: Path
) -> None:
    data.spool.path("1.1", "1.1.1").unlink()
    data.spool.path("1.1", "1.1.2").write_bytes(b"damaged")
    data.spool.result_path("2.1", "2.1.2").unlink()
    copied = back_up(data.folder, tmp_path / "backup")
    assert [(fault.sop_instance_uid, fault.what) for fault in copied.faults] == [
        ("1.1.1", "the file is missing; send the instance again"),
        ("1.1.2", "the stored bytes are not those received"),
        ("2.1.2", "the derived file is missing"),
    ]
    assert (copied.received, copied.results, copied.purged) == (5, 1, 0)


def test_an_empty_folder_is_filled_and_a_used_one_refused(data: Data, tmp_path: Path) -> None:
    target = tmp_path / "backup"
    target.mkdir()
    back_up(data.folder, target)
    before = files(target)
    with pytest.raises(BackupError, match="is not empty"):
        back_up(data.folder, target)
    assert files(target) == before


@pytest.mark.parametrize("where", ["data", "data/backup", "data/received/backup"])
def test_a_backup_does_not_go_into_what_it_copies(data: Data, tmp_path: Path, where: str) -> None:
    with pytest.raises(BackupError, match="own data folder"):
        back_up(data.folder, tmp_path / where)


def test_two_backups_do_not_share_a_folder(data: Data, tmp_path: Path) -> None:
    (tmp_path / "backup.part").mkdir()
    with pytest.raises(BackupError, match="another backup is running there, or was killed"):
        back_up(data.folder, tmp_path / "backup")
    assert (tmp_path / "backup.part").is_dir()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_backup_that_fails(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    left = itertools.count()
    real = os.link

    def link(*paths: Path) -> None:
        if next(left) == 4:
            raise error
        real(*paths)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(type(error)):
        back_up(data.folder, tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_without_a_journal_cannot_be_backed_up(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DicomNodeError):
        back_up(tmp_path / "data", tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert list((tmp_path / "data").iterdir()) == []


# check --storage


def test_what_is_stored_equals_the_journal(data: Data) -> None:
    assert data.faults() == [6]


def test_every_difference_is_a_fault(data: Data) -> None:
    data.spool.path("1.1", "1.1.1").unlink()
    data.spool.path("1.2", "1.2.3").write_bytes(b"damaged")
    data.spool.path("1.2", "1.9").write_bytes(b"nobody knows it")
    data.spool.path("1.7", "1.7.1").parent.mkdir()
    data.spool.path("1.7", "1.7.1").write_bytes(b"nor this")
    *faults, compared = data.faults()
    assert compared == 6
    assert [(f.sop_instance_uid, f.what.split(";")[0]) for f in faults if isinstance(f, Fault)] == [
        ("1.1.1", "the file is missing"),
        ("1.2.3", "the stored bytes are not those received"),
        ("1.9", "a file without a journal entry"),
        ("1.7.1", "a file without a journal entry"),
    ]


def test_what_retention_deleted_is_no_fault(data: Data) -> None:
    path = data.spool.path("1.1", "1.1.1")
    content = path.read_bytes()
    purge(data.database, data.spool, RULES, OLD)
    assert data.faults() == [0]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    (fault, _) = data.faults()
    assert isinstance(fault, Fault)
    assert fault.what == "retention deleted it, and yet its file is here; delete it"
    with closing(sqlite3.connect(data.folder / "journal.db")) as db, db:
        db.execute("INSERT INTO removals VALUES ('received', '1.1')")
    assert data.faults() == [0]  # the next purge deletes it


# the whole way

SLICES = 12


class Load(threading.Thread):
    """Real senders that send one series after the other until they are told to stop."""

    def __init__(self, sources: list[list[Path]], port: int) -> None:
        super().__init__()
        self._sources, self._port = sources, port
        self.enough = threading.Event()
        self.sent = 0

    def run(self) -> None:
        for files_ in itertools.cycle(self._sources):
            if self.enough.is_set():
                return
            self.sent += send(STORESCU, files_, self._port).returncode == 0


@pytest.fixture
def sources(tmp_path: Path) -> list[list[Path]]:
    return [
        sorted(write_series(ct_series(SLICES, 64, 64, seed=seed), tmp_path / f"source{seed}"))
        for seed in range(5)
    ]


@pytest.mark.network
@pytest.mark.peers
@needs(STORESCU, ORTHANC)
def test_a_node_goes_on_from_a_backup_made_under_load(
    tmp_path: Path, models_dir: Path, sources: list[list[Path]]
) -> None:
    """Its deliveries too; what came after the backup is sent again; nothing arrives twice."""
    port = free_port()
    settings = node_settings(models_dir, [], quiet_seconds=4)
    settings["peers"]["orthanc"] = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": port}
    settings["routes"][0]["send_to"] = ["orthanc"]
    node = Node(tmp_path / "node", settings).start()
    loads = [Load(sources[1:3], node.port), Load(sources[3:], node.port)]
    try:
        assert send(STORESCU, sources[0], node.port).returncode == 0
        wait_for(lambda: "put off" in str(node.status(series_uid(sources[0]))), "a delivery", 60)
        for load in loads:
            load.start()
        wait_for(lambda: all(load.sent for load in loads), "the load", 60)
        made = node.run("backup", str(tmp_path / "backup"))
        assert made.returncode == 0, made.stdout + made.stderr
        assert "hard links do not survive the loss of this disk" in made.stdout
    finally:
        node.kill()  # under load: whoever sends sees its association break
        for load in loads:
            load.enough.set()
            load.join(60)
    assert copied_faults(tmp_path / "backup")[:-1] == []

    with orthanc(tmp_path / "orthanc", port=port) as archive:
        for number in (1, 2):  # the second finds at the destination what the first delivered
            restored = Node(tmp_path / f"restored{number}", settings)
            copy = ["cp", "-a", str(tmp_path / "backup"), str(restored.folder / "data")]
            restored.folder.mkdir()
            subprocess.run(copy, check=True)
            try:
                restored.start()
                for files_ in sources[1:]:  # what got no answer, or came after the backup
                    assert send(STORESCU, files_, restored.port).returncode == 0
                for files_ in sources:
                    settled = restored.wait_settled(series_uid(files_))
                    assert [job["state"] for job in settled["jobs"]] == ["done"], settled
                checked = restored.run("check", "--storage")
                assert checked.returncode == 0, checked.stdout
                assert f"{SLICES * len(sources)} stored instances" in checked.stdout
            finally:
                restored.kill()
                print(restored.log[-3000:])
            assert archive.count() == SLICES * len(sources)
            assert len(archive.derived_series()) == len(sources)


def test_a_backup_of_a_killed_backup_needs_the_rest_of_it_gone(data: Data, tmp_path: Path) -> None:
    """kill -9 leaves a folder that is named as a part, never one that looks like a backup."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dicomnode import backup\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "backup.sync_file = die\n"
        "backup.back_up(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", program, str(data.folder), str(tmp_path / "backup")]
    assert subprocess.run(command, check=False).returncode == -9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.part", "data"]
