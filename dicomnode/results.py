"""A derived series as Part 10 files: written out of sight, then there as a whole."""

import contextlib
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from dicomnode.errors import OutOfResources
from dicomnode.orders import DerivedSeries
from dicomnode.spool import DRAFTS, write_durably
from dicomnode.syncing import sync_folder

if TYPE_CHECKING:
    from pydicom import Dataset

_WRITERS = 2
"""Files that are written at a time: each waits for the disk."""
_AHEAD = 4
"""Instances that may wait to be written: what is built faster than the disk takes it waits."""


class Draft:
    """One derived series and its companions on their way to the results folder.

    The files are durable one by one, but nobody sees them before `commit` renames their folder.
    What a crash leaves is removed at the start of the node.

    To be used as a context manager: whatever was not committed is gone at the end.
    """

    def __init__(self, results: Path) -> None:
        """
        Raises:
            OutOfResources: the disk refuses.
        """
        self._results = results
        self._folder = results / f"{DRAFTS}{uuid.uuid4().hex}"
        with _disk():
            self._folder.mkdir(parents=True)
        self._names: list[tuple[str, str, str]] = []
        self._pool = ThreadPoolExecutor(_WRITERS, "write")
        self._room = threading.BoundedSemaphore(_AHEAD)
        self._written: list[Future[None]] = []
        self._failure: OutOfResources | None = None

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, dataset: "Dataset") -> None:
        """Write one instance, images first; waits while too many are on their way to the disk.

        Raises:
            OutOfResources: the disk refused an earlier one.
        """
        self._room.acquire()
        try:
            if self._failure is not None:
                raise self._failure
            buffer = BytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
        except BaseException:  # raised again: whatever it is, nobody will free the room
            self._room.release()
            raise
        uid = str(dataset.SOPInstanceUID)
        self._names.append((str(dataset.SeriesInstanceUID), uid, str(dataset.SOPClassUID)))
        self._written.append(self._pool.submit(self._write, uid, buffer))

    def restart(self) -> None:
        """Forget what was added."""
        for future in self._written:
            with contextlib.suppress(OutOfResources):
                future.result()
        self._written, self._names = [], []
        for path in self._folder.iterdir():
            path.unlink()

    def commit(self) -> DerivedSeries:
        """All files at their place, durably. The folder is named by the series of the first.

        A file that is there already is kept: its UID says what is in it, and somebody may have it.

        Raises:
            OutOfResources: the disk refuses.
        """
        for future in self._written:
            future.result()
        first = self._names[0][0]
        final = self._results / first
        with _disk():
            sync_folder(self._folder)
            try:
                self._folder.rename(final)
            except OSError:  # it is there, not empty
                self._move_into(final)
            sync_folder(self._results)
        kinds: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []
        for series, uid, sop_class in self._names:
            kinds[series != first].append((uid, sop_class))
        return DerivedSeries(first, tuple(kinds[0]), companions=tuple(kinds[1]))

    def _move_into(self, final: Path) -> None:
        final.mkdir(exist_ok=True)
        for path in self._folder.iterdir():
            if not (final / path.name).exists():
                path.rename(final / path.name)
        sync_folder(final)

    def _write(self, uid: str, buffer: BytesIO) -> None:
        try:
            write_durably(self._folder / f"{uid}.dcm", buffer.getvalue())
        except OutOfResources as error:
            self._failure = error
            raise
        finally:
            self._room.release()


def write_series(datasets: "Iterable[Dataset]", results: Path) -> DerivedSeries:
    """Write a derived series and what goes with it into one folder of the results.

    Raises:
        OutOfResources: the disk refuses; nothing is left of the series.
    """
    with Draft(results) as draft:
        for dataset in datasets:
            draft.add(dataset)
        return draft.commit()


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutOfResources(error.strerror or "the disk refuses") from error
