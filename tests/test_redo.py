"""The redo log: what it has taken is there after whatever happens, and nothing else is."""

import contextlib
import hashlib
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode import redo
from dicomnode.errors import JournalBusy
from dicomnode.redo import RedoLog
from dicomnode.segments import (
    HEADROOM,
    LARGEST_BYTES,
    SEGMENT_BYTES,
    Entry,
    Segment,
    Written,
    make,
    paths,
    unsettled,
)
from tests.peers import wait_for


def written(data: bytes) -> Written:
    """A file of which the first third precedes the data set."""
    block = memoryview(mmap.mmap(-1, HEADROOM + max(len(data), LARGEST_BYTES)))
    block[HEADROOM : HEADROOM + len(data)] = data
    start = len(data) // 3
    return Written(block, len(data), start, hashlib.sha256(data[start:]).hexdigest())


class Log:
    """A log with its thread, as the node has it; what is settled is counted."""

    def __init__(
        self, folder: Path, segments: int = 2, disk: Callable[[], None] | None = None
    ) -> None:
        self.folder, self.settled = folder, 0
        self._disk = disk
        self.redo = RedoLog(folder, segments * SEGMENT_BYTES, lambda _: True, self._settle)
        self.again: list[tuple[Entry, bytes, bool]] = []
        self.redo.restore(lambda entry, trusted: self.again.append((entry, entry.read(), trusted)))
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        made = lambda: len(self.redo._all) == segments  # noqa: E731 - a file is there before it
        wait_for(made, "the segments")

    def _settle(self) -> None:
        if self._disk is not None:
            self._disk()
        self.settled += 1

    def _work(self) -> None:
        while not self.redo._stopping:
            with contextlib.suppress(JournalBusy, ZeroDivisionError):
                self.redo.step()

    def take(self, data: bytes, label: dict[str, object] | None = None) -> bool:
        with self.redo.entry(label or {}, written(data)) as logged:
            return logged

    def stop(self) -> None:
        self.redo.stop()
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self.redo.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    one = Log(tmp_path / "redo")
    yield one
    one.stop()


def _kept(folder: Path) -> list[bytes]:
    return [entry.read() for entry in unsettled(folder)]


def test_what_was_appended_is_there_in_its_order(log: Log) -> None:
    files = [os.urandom(size) for size in (1, 3, 4095, 4096, 4097, 40_000, LARGEST_BYTES)]
    for number, data in enumerate(files):
        assert log.take(data, {"number": number, "text": "Ä"})
    entries = unsettled(log.folder)
    assert [entry.read() for entry in entries] == files
    assert [dict(entry.label) for entry in entries] == [
        {"number": number, "text": "Ä"} for number in range(len(files))
    ]


def test_what_does_not_fit_is_left_to_others(log: Log) -> None:
    assert not log.take(bytes(LARGEST_BYTES + 1))
    assert not log.take(b"abc", {"text": "x" * 5000})
    assert log.take(b"abc")
    assert _kept(log.folder) == [b"abc"]


def test_what_is_refused_after_all_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo", segments=1)
    for data in (b"refused", b"kept", b"refused", b"and this"):
        with contextlib.suppress(JournalBusy), log.redo.entry({}, written(data)) as logged:
            assert logged
            if data == b"refused":
                raise JournalBusy("its row cannot be written")
    assert _kept(log.folder) == [b"kept", b"and this"]
    log.stop()
    assert [data for _, data, _ in Log(tmp_path / "redo").again] == [b"kept", b"and this"]


def test_a_log_without_space_takes_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo", segments=0)
    assert not log.take(b"abc")
    log.close()


def test_a_log_for_which_the_disk_has_no_room_takes_nothing(tmp_path: Path) -> None:
    redo_log = RedoLog(tmp_path / "redo", SEGMENT_BYTES, lambda _: False, lambda: None)
    redo_log.restore(lambda *_: None)
    worker = threading.Thread(target=redo_log.step)
    worker.start()
    redo_log.stop()
    worker.join()
    assert list((tmp_path / "redo").iterdir()) == []


def test_after_a_stop_in_order_nothing_is_left_and_the_segments_are_used_again(
    tmp_path: Path,
) -> None:
    log = Log(tmp_path / "redo")
    assert log.take(b"abc")
    log.close()
    assert log.settled == 1
    inodes = {path.stat().st_ino for path in log.folder.glob("*.log")}
    again = Log(tmp_path / "redo")
    assert again.again == []
    assert {path.stat().st_ino for path in again.folder.glob("*.log")} == inodes
    assert again.take(b"d")
    assert _kept(again.folder) == [b"d"]
    again.stop()


def test_what_a_kill_leaves_is_done_again_once(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo")
    for number in range(3):
        assert log.take(bytes([number]))
    log.stop()  # and no close
    again = Log(tmp_path / "redo")
    assert [(data, trusted) for _, data, trusted in again.again] == [
        (bytes([number]), True) for number in range(3)
    ]
    assert again.settled == 1
    again.stop()
    assert Log(tmp_path / "redo").again == []


def test_what_settled_entries_left_can_be_overwritten(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo", segments=1)
    secret = os.urandom(64)
    assert log.take(secret * 1000)
    log.close()
    segment = _names(log)[0]
    assert secret in segment.read_bytes()
    again = Log(tmp_path / "redo", segments=1)
    again.redo.wipe()
    assert secret not in segment.read_bytes()
    assert again.take(secret)
    again.redo.wipe()  # what is not settled stays, until it is
    assert _kept(again.folder) == [secret]
    wait_for(lambda: secret not in segment.read_bytes(), "what was left to be overwritten", 20)
    again.close()


def test_what_was_refused_can_be_overwritten_too(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo", segments=1)
    secret = os.urandom(64)
    with contextlib.suppress(JournalBusy), log.redo.entry({}, written(secret)):
        raise JournalBusy("its row cannot be written")
    assert secret in _names(log)[0].read_bytes()
    log.redo.wipe()
    assert secret not in _names(log)[0].read_bytes()
    log.stop()


def test_what_is_refused_while_deleted_images_are_overwritten_is_so_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redo, "SETTLE_SECONDS", 0.05)
    log = Log(tmp_path / "redo", segments=1)
    secret = os.urandom(64)
    with contextlib.suppress(JournalBusy), log.redo.entry({}, written(secret)):
        log.redo.wipe()
        raise JournalBusy("its row cannot be written")
    overwritten = lambda: secret not in _names(log)[0].read_bytes()  # noqa: E731
    wait_for(overwritten, "it to be overwritten", 30)
    log.stop()


def test_what_is_to_be_overwritten_is_so_by_a_stop_in_order(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo", segments=1)
    secret = os.urandom(64)
    assert log.take(secret)
    log.redo.wipe()
    log.close()
    assert secret not in _names(log)[0].read_bytes()


def test_a_smaller_log_gives_its_room_back(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo", segments=3)
    assert log.take(b"abc")
    log.stop()
    (tmp_path / "redo" / "000009.new").write_bytes(b"half made")
    again = Log(tmp_path / "redo", segments=1)
    assert [data for _, data, _ in again.again] == [b"abc"]
    assert len(list((tmp_path / "redo").iterdir())) == 1
    again.stop()


def test_half_a_log_is_settled_at_once_and_used_again(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo", segments=2)
    data = os.urandom(LARGEST_BYTES)
    taken = 0
    for _ in range(5 * SEGMENT_BYTES // LARGEST_BYTES):
        taken += log.take(data)
        if len(_names(log)) < 2:
            wait_for(lambda: len(_names(log)) == 2, "the segments to come back")
    assert log.settled > 1
    assert taken * len(data) > 2 * SEGMENT_BYTES
    log.close()


def _names(log: Log) -> list[Path]:
    return paths(log.folder)


def test_what_waited_long_is_settled(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redo, "SETTLE_SECONDS", 0.05)
    assert log.take(b"abc")
    wait_for(lambda: log.settled == 1, "the log to be settled", 5, every=0.01)
    wait_for(lambda: _kept(log.folder) == [], "the entry to be forgotten", 5, every=0.01)
    assert log.take(b"d")
    wait_for(lambda: log.settled == 2, "the log to be settled again", 5, every=0.01)


def test_what_waited_long_while_more_was_appended_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segment is in use when its time has come."""
    monkeypatch.setattr(redo, "SETTLE_SECONDS", 0.1)
    log = Log(tmp_path / "redo", segments=1)
    assert log.take(b"abc")
    with log.redo.entry({}, written(b"d")):
        threading.Event().wait(0.5)  # so that it has been looked for
        assert log.settled == 0
    wait_for(lambda: log.settled == 1, "the log to be settled", 20, every=0.01)
    log.stop()


def test_nothing_is_settled_while_its_file_or_row_is_still_to_come(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redo, "SETTLE_SECONDS", 0.0)
    data = b"abcdef"
    with log.redo.entry({}, written(data)) as logged:
        assert logged
        assert log.take(b"another")  # the other segment, which is settled
        wait_for(lambda: log.settled >= 1, "the other to be settled", 5, every=0.01)
        wait_for(lambda: _kept(log.folder) == [data], "this one alone to stay", 5, every=0.01)
    wait_for(lambda: _kept(log.folder) == [], "this one to be settled", 5, every=0.01)


def test_entries_stay_where_the_disk_refuses_to_settle_and_no_file_is_trusted_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redo, "SETTLE_SECONDS", 0.05)

    def refuse() -> None:
        raise OSError(5, os.strerror(5))

    log = Log(tmp_path / "redo", disk=refuse)
    assert log.take(b"abc")
    wait_for(lambda: log.redo.trouble, "the trouble to be told", 5, every=0.01)
    assert "mend it and restart" in log.redo.trouble
    assert "received files cannot be made durable: Input/output error" in caplog.text
    assert not log.take(b"d")
    log.close()
    assert log.settled == 0
    again = Log(tmp_path / "redo")
    assert [(data, trusted) for _, data, trusted in again.again] == [(b"abc", False)]
    assert not again.redo.trouble
    again.close()
    assert Log(tmp_path / "redo").again == []


@pytest.mark.parametrize("error", [JournalBusy, ZeroDivisionError], ids=["busy", "unexpected"])
def test_what_the_journal_does_not_take_yet_is_settled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Its files and rows are not lost by that: nothing is distrusted."""
    monkeypatch.setattr(redo, "SETTLE_SECONDS", 0.05)
    locked = [True]

    def settle() -> None:
        if locked:
            locked.append(True)
            raise error("the journal cannot be changed now")

    log = Log(tmp_path / "redo", disk=settle)
    assert log.take(b"abc")
    wait_for(lambda: len(locked) > 3, "it to be tried again", 20, every=0.01)
    assert _kept(log.folder) == [b"abc"]
    assert not log.redo.trouble
    locked.clear()
    wait_for(lambda: _kept(log.folder) == [], "it to be settled", 20, every=0.01)
    locked.append(True)
    assert log.take(b"d")
    log.stop()
    with pytest.raises(error):
        log.redo.close()
    again = Log(tmp_path / "redo")
    assert [(data, trusted) for _, data, trusted in again.again] == [(b"d", True)]
    again.close()


@pytest.mark.parametrize("when", ["at the end", "at the start"])
def test_a_settling_that_failed_is_not_forgotten(tmp_path: Path, when: str) -> None:
    """The system tells of an error once; whoever asks again hears nothing."""

    def refuse() -> None:
        raise OSError(5, os.strerror(5))

    log = Log(tmp_path / "redo", disk=refuse if when == "at the end" else None)
    assert log.take(b"abc")
    log.stop()
    if when == "at the end":
        with pytest.raises(OSError, match="Input/output"):
            log.redo.close()
    else:
        refused = RedoLog(tmp_path / "redo", SEGMENT_BYTES, lambda _: True, refuse)
        with pytest.raises(OSError, match="Input/output"):
            refused.restore(lambda *_: None)
    again = Log(tmp_path / "redo")
    assert [(data, trusted) for _, data, trusted in again.again] == [(b"abc", False)]
    again.close()


def test_a_segment_that_cannot_be_written_is_not_used_again(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name for path in _names(log)}

    def refuse(_descriptor: int) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", refuse)
        assert not log.take(b"abc")
    replaced = lambda: len(_names(log)) == 2 and {p.name for p in _names(log)} != before  # noqa: E731
    wait_for(replaced, "another segment in its place", 5, every=0.01)
    assert log.take(b"d")
    assert _kept(log.folder) == [b"d"]


def test_an_instance_whose_sync_failed_is_taken_out_of_the_log_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked has to see to it himself, and may have to refuse it."""
    log, sync = Log(tmp_path / "redo"), os.fdatasync
    log.stop()
    answers = itertools.chain([OSError(5, os.strerror(5))], itertools.repeat(None))

    def refuse_once(descriptor: int) -> None:
        sync(descriptor)
        if error := next(answers):
            raise error

    log.redo._stopping = False
    monkeypatch.setattr(os, "fdatasync", refuse_once)
    assert not log.take(b"abc")
    assert _kept(log.folder) == []
    assert log.redo.refused() == []


def test_what_cannot_be_taken_out_again_is_told_until_its_segment_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, sync = Log(tmp_path / "redo"), os.fdatasync
    log.stop()

    def refuse(descriptor: int) -> None:
        sync(descriptor)
        raise OSError(5, os.strerror(5))

    log.redo._stopping = False
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", refuse)
        broken.setattr(os, "pwrite", only_once(os.pwrite))
        assert not log.take(b"abc", {"who": 1})
    assert _kept(log.folder) == [b"abc"]
    assert log.redo.refused() == [{"who": 1}]
    log.redo.step()
    assert _kept(log.folder) == []
    assert log.redo.refused() == []


def only_once(write: Callable[..., int]) -> Callable[..., int]:
    calls = itertools.count()

    def once(*arguments: object) -> int:
        if next(calls):
            raise OSError(5, os.strerror(5))
        return write(*arguments)

    return once


def test_one_segment_that_cannot_be_overwritten_does_not_keep_the_others_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(tmp_path / "redo", segments=3)
    secrets = [os.urandom(64) for _ in range(3)]
    with contextlib.ExitStack() as all_at_once:  # a segment each
        for secret in secrets:
            assert all_at_once.enter_context(log.redo.entry({}, written(secret)))
    log.close()
    again = Log(tmp_path / "redo", segments=3)
    bad, write = again.redo._ready[0]._file, os.pwrite

    def refuse(descriptor: int, data: bytes, at: int) -> int:
        if descriptor == bad:
            raise OSError(5, os.strerror(5))
        return write(descriptor, data, at)

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", refuse)
        again.redo.wipe()

    def left() -> list[bytes]:
        return [s for s in secrets for path in _names(again) if s in path.read_bytes()]

    wait_for(lambda: not left(), "the segment that is left to be given up", 20)
    again.close()


def test_a_segment_that_is_given_up_meanwhile_has_no_entries(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For who looks at the log of a running node."""
    assert log.take(b"abc")
    there = paths(log.folder)
    monkeypatch.setattr("dicomnode.segments.paths", lambda _: [*there, log.folder / "9.log"])
    assert _kept(log.folder) == [b"abc"]


def test_a_segment_that_cannot_be_emptied_is_given_up_once_its_files_are_settled(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redo, "SETTLE_SECONDS", 0.05)

    def refuse(_segment: Segment) -> None:
        raise OSError(5, os.strerror(5))

    before = {path.name for path in _names(log)}
    with monkeypatch.context() as broken:
        broken.setattr(Segment, "clear", refuse)
        assert log.take(b"abc")
        wait_for(lambda: {path.name for path in _names(log)} - before, "another segment", 20)
    assert log.settled == 1
    assert _kept(log.folder) == []
    assert log.take(b"d")
    assert not log.redo.trouble


def test_several_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    log = Log(tmp_path / "redo", segments=4)
    files = [os.urandom(1 + 997 * number) for number in range(64)]
    with ThreadPoolExecutor(8) as pool:  # twice as many as there are segments
        taken = pool.map(lambda data: any(log.take(data) for _ in range(10_000)), files)
        assert all(taken)
    assert set(_kept(log.folder)) == set(files)
    log.close()


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segment]:
    path = tmp_path_factory.mktemp("segment") / "0.log"
    make(path)
    one = Segment(path)
    yield one
    one.close()


_PAGE = 4096


@settings(max_examples=150, deadline=None)
@given(
    earlier=st.lists(st.integers(1, 30_000), max_size=4),
    sizes=st.lists(st.integers(1, 30_000), min_size=1, max_size=5),
    kept=st.sets(st.integers(0, 45)),
    all_kept=st.integers(0, 60),
)
def test_of_what_a_power_failure_leaves_only_whole_entries_count(
    segment: Segment, earlier: list[int], sizes: list[int], kept: set[int], all_kept: int
) -> None:
    """It keeps any of the pages that were not synced yet, and of the others what was there."""
    for size in earlier:  # of a use that is over
        segment.append(1, b"{}", written(os.urandom(size)))
    segment.clear()
    before = segment.path.read_bytes()[: 64 * _PAGE]
    files = [os.urandom(size) for size in sizes]
    places, at = [], 0
    for number, data in enumerate(files):
        segment.append(number, b"{}", written(data))
        places.append(slice(at, at + _PAGE + len(data)))
        at += _PAGE + -(-len(data) // _PAGE) * _PAGE
    after = segment.path.read_bytes()[: 64 * _PAGE]
    left = bytearray(after)
    for n in range(all_kept, 64):
        if n not in kept:
            left[n * _PAGE : (n + 1) * _PAGE] = before[n * _PAGE : (n + 1) * _PAGE]
    whole = list(itertools.takewhile(lambda place: left[place] == after[place], places))
    cut = segment.path.with_name("1.log")
    cut.write_bytes(left)
    try:
        found = [entry.read() for entry in unsettled(cut.parent) if entry.path == cut]
    finally:
        cut.unlink()
        segment.clear()
    assert found == files[: len(whole)]
