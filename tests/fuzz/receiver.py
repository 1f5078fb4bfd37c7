"""A receiver with nothing behind it, for tests and benchmarks of reception alone.

As a program: ``python -m tests.fuzz.receiver FOLDER [--sync] [--drop] [--port N]`` prints its port
and receives until its standard input closes.
"""

import argparse
import itertools
import os
import struct
import sys
import threading
from pathlib import Path
from typing import Literal

from pynetdicom import AE, evt
from pynetdicom.sop_class import PatientRootQueryRetrieveInformationModelFind as Find

from dicomnode.syncing import sync_folder
from dicomnode.upper_layer import (
    CALLING_AE,
    Identity,
    Library,
    Limits,
    Listener,
    Received,
    Rejection,
    Requestor,
)
from dicomnode.upper_layer.listener import Secure
from tests.factories import ct_series, file_bytes

IDENTITY = Identity("2.25.197178909843571102798029266096429644410", "DICOMNODE_TEST")
LIMITS = Limits(artim_seconds=2, idle_seconds=4, write_seconds=2)
STRANGER = "STRANGER"
"""The one AE title that `Folder` rejects."""


class Folder:
    """A handler that moves each data set to ``<folder>/<SOP Instance UID>.<number>.dcm``."""

    def __init__(self, folder: Path, *, sync: bool = False, drop: bool = False) -> None:
        """`sync`: file and folder are synced before the answer. `drop`: nothing is kept."""
        self.folder, self.sync, self.drop = folder, sync, drop
        self.incoming = folder / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True)
        self.received: list[tuple[Requestor, Received]] = []
        self.ends: list[tuple[str, str]] = []
        self.statuses: list[int] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def request(self, requestor: Requestor) -> Rejection | None:
        return CALLING_AE if requestor.calling_ae == STRANGER else None

    def allows(self, requestor: Requestor, sop_class_uid: str) -> bool:
        return True

    def part_path(self) -> Path:
        return self.incoming / f"{next(self._numbers)}.part"

    def store(self, requestor: Requestor, received: Received) -> tuple[int, str]:
        if self.drop:
            return 0, ""
        descriptor = received.file()
        final = self.folder / f"{received.sop_instance_uid}.{received.part.stem}.dcm"
        received.part.rename(final)
        if self.sync:
            os.fsync(descriptor)
            sync_folder(self.folder)
        with self._lock:
            self.received.append((requestor, received))
        return 0, ""

    def answered(self, requestor: Requestor, status: int) -> None:
        if not self.drop:
            with self._lock:
                self.statuses.append(status)

    def ended(self, requestor: Requestor, how: Literal["released", "aborted"]) -> None:
        if not self.drop:
            with self._lock:
                self.ends.append((requestor.calling_ae, how))

    def kept(self) -> list[Path]:
        return sorted(self.folder.glob("*.dcm"))

    def half(self) -> list[Path]:
        return sorted(self.incoming.iterdir())


def find_library(limits: Limits) -> Library:
    """pynetdicom with a C-FIND that finds nothing, and Verification."""
    ae = AE("DICOMNODE")
    ae.add_supported_context(Find)
    ae.add_supported_context("1.2.840.10008.1.1")
    ae.acse_timeout = 5
    ae.network_timeout = 5
    return Library(ae, [(evt.EVT_C_FIND, lambda _: iter([(0x0000, None)]))], limits)


def listening(
    handler: Folder,
    limits: Limits = LIMITS,
    associations: int = 8,
    secure: Secure | None = None,
) -> Listener:
    """A listener on a free port of loopback."""
    listener = Listener(
        ("127.0.0.1", 0),
        handler,
        identity=IDENTITY,
        limits=limits,
        max_associations=associations,
        secure=secure,
        library=find_library(limits),
    )
    listener.start()
    return listener


def data_set(size: int = 3000) -> bytes:
    """The bytes of a CT data set, explicit VR little endian, with a tail of `size` zeros."""
    whole = file_bytes(ct_series(1)[0])
    start = 132 + 12 + int.from_bytes(whole[140:144], "little")
    return whole[start:] + struct.pack("<HH2sHL", 0xFFFC, 0xFFFC, b"OB", 0, size) + bytes(size)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--drop", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--artim", type=float, default=3.0)
    parser.add_argument("--associations", type=int, default=250)
    options = parser.parse_args()
    limits = Limits(artim_seconds=options.artim, idle_seconds=60)
    listener = Listener(
        ("127.0.0.1", options.port),
        Folder(options.folder, sync=options.sync, drop=options.drop),
        identity=IDENTITY,
        limits=limits,
        max_associations=options.associations,
        library=find_library(limits),
    )
    listener.start()
    print(listener.port, os.getpid(), flush=True)
    sys.stdin.read()
    listener.drain(0)


if __name__ == "__main__":
    main()
