"""Compiled forms on disk: made again whenever they are absent, old or damaged."""

import contextlib
import hashlib
import os
from pathlib import Path

MAGIC = b"dicomnode compiled form 1\n"
MOST_FORMS = 24
"""Forms kept in one folder; the least recently used go first."""
LARGEST_BYTES = 4 << 30


class FormStore:
    """A folder of compiled forms, each under the sum of all that it depends on.

    A form holds its own sum: one that is cut off or has a changed bit is not read. Nobody but the
    node writes here; who can, can also change the node.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: str) -> Path:
        """Where the form of `key` lies: any text that names all that the form depends on."""
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.form"

    def read(self, key: str) -> bytes | None:
        """The form as it was written; None: there is none that can be trusted."""
        path = self.path(key)
        try:
            if path.stat().st_size > LARGEST_BYTES:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        head, digest, form = data[: len(MAGIC)], data[len(MAGIC) :][:32], data[len(MAGIC) + 32 :]
        if head != MAGIC or hashlib.sha256(form).digest() != digest:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return form

    def write(self, key: str, form: bytes) -> None:
        """Keep a form, whole or not at all; a full disk is no reason to stop."""
        path = self.path(key)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(MAGIC + hashlib.sha256(form).digest() + form)
            partial.rename(path)
            self._forget_oldest()
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _forget_oldest(self) -> None:
        forms = sorted(self._folder.glob("*.form"), key=lambda p: p.stat().st_mtime_ns)
        for path in forms[:-MOST_FORMS]:
            path.unlink(missing_ok=True)
