"""What was written, durable: one file, the names in a folder, or a whole file system."""

import ctypes
import os
from pathlib import Path


def sync_file(path: Path | str) -> None:
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path | str) -> None:
    """Make the names in a folder durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


class FileSystem:
    """The file system that a folder is on, to be synced as a whole."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError if it cannot be opened.

        From now on `sync` tells of errors, also of those that others were told meanwhile.
        """
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def sync(self) -> None:
        """Make durable all that was written to it.

        Raises:
            OSError: the disk refuses, or refused to keep something since it was last asked.
        """
        if _syncfs is None:
            os.sync()
        elif _syncfs(self._descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def close(self) -> None:
        os.close(self._descriptor)


_syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
"""Of Linux (2.6.39); it tells of errors since 5.8."""


def _sync(path: Path | str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
