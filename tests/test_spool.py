"""The spool: whole files or none, never one over another, names that no stranger can choose."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.errors import CannotUnderstand, OutOfResources
from dicomnode.spool import OneByOne, Spool, checked_uid, dataset_digest, write_durably
from tests.factories import ct_series, file_bytes

MOUNT, UMOUNT = "/usr/bin/mount", "/usr/bin/umount"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "data")
    spool.prepare()
    return spool


def _part(spool: Spool, data: bytes, name: str = "part") -> Path:
    path = spool.incoming / name
    path.write_bytes(data)
    return path


def _files(spool: Spool) -> dict[str, bytes]:
    paths = [path for path in spool.root.rglob("*") if path.is_file()]
    return {str(path.relative_to(spool.root)): path.read_bytes() for path in paths}


def test_a_kept_file_lies_under_its_series(spool: Spool) -> None:
    part = _part(spool, b"abc")
    kept = spool.keep(part, "1.2", "1.2.3")
    assert kept == spool.root / "received/1.2/1.2.3.dcm"
    assert kept.samefile(part)  # until the journal has it
    assert _files(spool) == {"incoming/part": b"abc", "received/1.2/1.2.3.dcm": b"abc"}
    assert list(spool.stored()) == [("1.2", "1.2.3", kept)]


def test_a_stored_file_is_never_replaced(spool: Spool) -> None:
    spool.keep(_part(spool, b"first"), "1.2", "1.2.3")
    assert spool.keep(_part(spool, b"second", "other"), "1.2", "1.2.3") is None
    assert _files(spool)["received/1.2/1.2.3.dcm"] == b"first"


def test_several_at_once_make_the_folder_of_a_series(spool: Spool) -> None:
    for series in range(60):
        parts = [_part(spool, b"abc", f"{series}.{n}") for n in range(4)]
        with ThreadPoolExecutor(len(parts)) as pool:
            together = threading.Barrier(len(parts))

            def keep(number: int, series: str, parts: list[Path], start: threading.Barrier) -> bool:
                start.wait()
                return spool.keep(parts[number], series, f"1.{number}") is not None

            kept = [pool.submit(keep, n, f"2.{series}", parts, together) for n in range(4)]
            assert all(one.result() for one in kept)


def test_a_file_is_synced_by_its_descriptor_too(spool: Spool) -> None:
    part = _part(spool, b"abc")
    kept = spool.place(part, "1.2", "1.2.3")
    with part.open("rb") as file:
        spool.settle("1.2", "1.2.3", file.fileno())
    assert kept is not None
    assert kept.read_bytes() == b"abc"
    spool.take_back(kept)
    assert _files(spool) == {"incoming/part": b"abc"}


def test_a_part_that_is_not_there_is_an_error(spool: Spool) -> None:
    with pytest.raises(OutOfResources, match="could not store"):
        spool.keep(spool.incoming / "none", "1.2", "1.2.3")


def test_what_contradicts_a_stored_file_is_set_aside_whole(spool: Spool) -> None:
    part = _part(spool, b"other")
    aside = spool.set_aside(part, "1.2.3", sha256(b"other").hexdigest())
    assert aside.parent == spool.quarantine
    assert (aside.read_bytes(), part.exists()) == (b"other", False)


def test_two_contradictions_are_both_kept(spool: Spool) -> None:
    for data in (b"one", b"two"):
        spool.set_aside(_part(spool, data), "1.2.3", sha256(data).hexdigest())
    assert sorted(_files(spool).values()) == [b"one", b"two"]


def test_prepare_removes_half_written_results_and_nothing_else(spool: Spool) -> None:
    spool.keep(_part(spool, b"whole"), "1.2", "1.2.3")
    half = spool.result_path("1.9", "1.9.1").with_suffix(".part")
    half.parent.mkdir()
    half.write_bytes(b"hal")
    write_durably(spool.result_path("1.9", "1.9.2"), b"done")
    spool.prepare()
    assert _files(spool) == {
        "incoming/part": b"whole",
        "received/1.2/1.2.3.dcm": b"whole",
        "results/1.9/1.9.2.dcm": b"done",
    }


def test_leftovers_tell_what_was_kept_from_what_was_cut_off(spool: Spool) -> None:
    spool.keep(_part(spool, b"whole", "kept"), "1.2", "1.2.3")
    _part(spool, b"hal", "half")
    assert {(path.name, kept) for path, kept in spool.leftovers()} == {
        ("kept", True),
        ("half", False),
    }


def test_dropped_files_lose_both_their_names_and_no_other_file_does(spool: Spool) -> None:
    first, second = (_part(spool, name.encode(), name) for name in ("first", "second"))
    spool.keep(first, "1.2", "1.2.3")
    spool.keep(second, "1.2", "1.2.4")
    spool.keep(_part(spool, b"third", "third"), "1.3", "1.3.1")
    spool.drop([first, _part(spool, b"cut", "cut")])
    assert _files(spool) == {
        "incoming/second": b"second",
        "incoming/third": b"third",
        "received/1.2/1.2.4.dcm": b"second",
        "received/1.3/1.3.1.dcm": b"third",
    }


def test_one_thread_at_a_time_is_busy_with_an_instance() -> None:
    one_by_one = OneByOne()
    same, other = threading.Event(), threading.Event()

    def pass_by(uid: str, passed: threading.Event) -> None:
        with one_by_one.turn(uid):
            passed.set()

    with one_by_one.turn("1.1"):
        waiting = threading.Thread(target=pass_by, args=("1.1", same))
        waiting.start()
        threading.Thread(target=pass_by, args=("1.2", other)).start()
        assert other.wait(30)
        assert not same.wait(0.2)
    assert same.wait(30)
    waiting.join(30)


def test_a_result_is_written_again_with_the_same_bytes(spool: Spool) -> None:
    path = spool.result_path("1.9", "1.9.1")
    path.parent.mkdir()
    for _ in range(2):
        write_durably(path, b"result")
    assert _files(spool) == {"results/1.9/1.9.1.dcm": b"result"}


def test_without_a_reserve_it_is_the_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    monkeypatch.setattr(Spool, "free_bytes", lambda _: 4096)
    with pytest.raises(OutOfResources, match="is full"):
        spool.check_room(5000)


def test_below_the_reserve_nothing_is_stored(tmp_path: Path) -> None:
    spool = Spool(tmp_path, reserve_bytes=1 << 60)
    spool.prepare()
    assert not spool.has_room()
    with pytest.raises(OutOfResources, match="reserve_free_gb"):
        spool.keep(_part(spool, b"abc"), "1.2", "1.2.3")
    assert list(spool.stored()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if os.geteuid() or not Path(MOUNT).exists():
        pytest.skip("only root can mount a small file system")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run([MOUNT, *options], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run([UMOUNT, str(folder)], check=True)


def test_a_full_disk_is_out_of_resources_and_leaves_nothing_half_written(tiny_disk: Path) -> None:
    spool = Spool(tiny_disk)
    spool.prepare()
    path = spool.result_path("1.9", "1.9.1")
    path.parent.mkdir()
    with pytest.raises(OutOfResources, match="No space left") as refusal:
        write_durably(path, bytes(1 << 20))
    assert refusal.value.status == 0xA700
    assert _files(spool) == {}


def test_a_disk_that_refuses_the_place_is_out_of_resources(spool: Spool) -> None:
    part = _part(spool, b"abc")
    (spool.received / "1.2").write_bytes(b"a file where a folder should be")
    with pytest.raises(OutOfResources):
        spool.keep(part, "1.2", "1.2.3")


# names


@given(st.lists(st.integers(0, 10**20 - 1), min_size=1, max_size=3))
def test_a_uid_is_taken_as_it_is(parts: list[int]) -> None:
    text = ".".join(map(str, parts))
    assert checked_uid(text, "SOPInstanceUID") == text


BAD = ["", None, "..", ".", "1..2", "1.", ".1", "../../etc", "1/2", "1\\2", "1.2\0"]
BAD += ["1.2\n", " 1.2", "1.2 ", "１.2", "1.2.a", "1.-2", "1" * 65, "9" * 10_000, "1." * 10_000]  # noqa: RUF001


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text)[:20])
def test_what_is_no_uid_never_becomes_a_path(text: object) -> None:
    with pytest.raises(CannotUnderstand, match=r"^SOPInstanceUID is not a valid UID$"):
        checked_uid(text, "SOPInstanceUID")


@given(st.text(max_size=70))
def test_a_checked_uid_is_one_plain_file_name(text: str) -> None:
    try:
        uid = checked_uid(text, "UID")
    except CannotUnderstand:
        return
    assert uid.isascii()
    assert set(uid) <= set("0123456789.")
    assert Path("folder", uid).parent == Path("folder")
    assert uid not in ("", ".", "..")


# digests


def test_the_digest_is_of_the_data_set_and_not_of_the_meta_information(tmp_path: Path) -> None:
    dataset = ct_series(1, 4, 4)[0]
    digests = []
    for sender in ("CT1", "ANOTHER_SCANNER"):
        dataset.file_meta.SourceApplicationEntityTitle = sender
        path = tmp_path / sender
        path.write_bytes(file_bytes(dataset))
        digests.append(dataset_digest(path))
    assert digests[0][0] == digests[1][0]
    assert digests[0][1] < digests[1][1]


def test_one_changed_pixel_is_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    raw = file_bytes(ct_series(1, 4, 4)[0])
    path.write_bytes(raw)
    before = dataset_digest(path)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert dataset_digest(path)[0] != before[0]
    assert dataset_digest(path)[1] == before[1] == len(raw)


@given(data=st.binary(max_size=200))
def test_a_file_without_meta_information_has_a_digest_too(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "raw"
    path.write_bytes(data)
    assert dataset_digest(path) == (sha256(data).hexdigest(), len(data))


def test_a_file_is_written_although_retention_removes_its_empty_folder(spool: Spool) -> None:
    done = threading.Event()
    folder = spool.path("1.9", "1.9.1").parent

    def remove() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                folder.rmdir()

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        for _ in range(300):
            spool.write("1.9", "1.9.1", memoryview(b"abc"))
            spool.path("1.9", "1.9.1").unlink()
    finally:
        done.set()
        remover.join()


def test_nothing_is_left_of_a_file_that_cannot_be_written(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_file: int, _data: memoryview) -> int:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as full:
        full.setattr(os, "write", refuse)
        with pytest.raises(OutOfResources, match="No space left"):
            spool.write("1.9", "1.9.1", memoryview(b"abc"))
    assert not spool.has("1.9", "1.9.1")
    spool.write("1.9", "1.9.1", memoryview(b"abc"))
    assert spool.path("1.9", "1.9.1").read_bytes() == b"abc"
