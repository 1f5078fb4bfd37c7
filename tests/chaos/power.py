"""The power fails under load, again and again: what was acknowledged is there afterwards.

    python -m tests.chaos.power --cuts 100 [--system ext4] [--redo-log-mb 70]

The node's data folder is a file system of its own. A cut is the call that file systems have to test
themselves with (EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN): from that moment nothing reaches the disk,
and what was only in memory is lost. The node is killed, the file system mounted again, the node
started. What is not tested so: a disk that says that it has written and has not. Needs root.
"""

import argparse
import contextlib
import fcntl
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import Dataset
from pydicom.uid import generate_uid

from dicomnode.errors import DeliveryError
from dicomnode.scu import Address, send_instances
from dicomnode.spool import dataset_digest
from tests.factories import ct_series
from tests.peers import Node

_SHUTDOWN = 0x8004587D
_NO_FLUSH = struct.pack("I", 2)
"""What the journal of the file system has in memory is lost, too."""
_IMAGE_BYTES = 3 << 30
SENDERS, SLICES = 4, 40


class NoDisk(Exception):
    """No file system can be made here, at all; the text says why."""


class Disk:
    """A file system in a file, which can lose its power."""

    def __init__(self, folder: Path, system: str) -> None:
        """Raises NoDisk."""
        self.mount, self._image, self._system = folder / "disk", folder / "disk.img", system
        if os.geteuid() != 0:
            raise NoDisk("to mount a file system takes root")
        self.mount.mkdir()
        with self._image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        try:
            _run("mkfs." + system, "-q", str(self._image))
            self.attach()
        except FileNotFoundError as error:
            raise NoDisk(f"not installed: {error.filename}") from None
        except subprocess.CalledProcessError as error:
            raise NoDisk(f"{error.cmd[0]}: {error.stderr.strip()}") from None

    def attach(self) -> None:
        """Raises CalledProcessError: after a cut, no file system is left."""
        _run("mount", "-o", "loop", "-t", self._system, str(self._image), str(self.mount))

    def detach(self) -> None:
        _run("umount", str(self.mount))

    def cut(self) -> None:
        """Nothing more reaches the disk."""
        descriptor = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _NO_FLUSH)
        finally:
            os.close(descriptor)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


@contextlib.contextmanager
def disk(folder: Path, system: str) -> Iterator[Disk]:
    """Raises NoDisk."""
    one = Disk(folder, system)
    try:
        yield one
    finally:
        one.detach()


@dataclass
class Tally:
    """What the cuts did."""

    cuts: int = 0
    kills: int = 0
    """Of the node, right before a cut."""
    acknowledged: dict[str, str] = field(default_factory=dict)
    """SOP Instance UID, and SHA-256 of the data set."""
    restored: int = 0
    lost: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.cuts} power cuts, {self.kills} right after a kill -9; "
            f"{len(self.acknowledged)} instances acknowledged, lost {len(self.lost)}; "
            f"{self.restored} were done again from the redo log"
            + "".join(f"\n{line}" for line in self.lost[:5] + self.trouble)
        )


class Sender(threading.Thread):
    """Sends series after series until the power fails; knows what was acknowledged."""

    def __init__(self, port: int, folder: Path) -> None:
        super().__init__()
        self._port, self._folder = port, folder
        self.acknowledged: dict[str, str] = {}

    def run(self) -> None:
        address = Address("127.0.0.1", self._port, "DICOMNODE", "CT1")
        self._folder.mkdir(exist_ok=True)
        image = ct_series(1, 96, 96)[0]
        with contextlib.suppress(DeliveryError):
            while True:
                self._send(image, address)

    def _send(self, image: Dataset, address: Address) -> None:
        sums, files = {}, []
        image.SeriesInstanceUID = generate_uid()
        for number in range(SLICES):
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            files.append(self._folder / f"{number}.dcm")
            image.save_as(files[-1])
            sums[image.SOPInstanceUID] = dataset_digest(files[-1])[0]

        def said(uid: str, status: int) -> None:
            if status == 0:
                self.acknowledged[uid] = sums[uid]

        send_instances(files, address, said)


def campaign(
    folder: Path, cuts: int, seed: int, system: str = "ext4", redo_log_mb: int = 70
) -> Tally:
    """Cut the power `cuts` times, and look after each what is there.

    Raises:
        NoDisk: no file system can be made here.
    """
    tally, moments = Tally(), random.Random(seed)
    with disk(folder, system) as place:
        (folder / "node").mkdir()
        (folder / "node" / "data").symlink_to(place.mount)
        peers = {"scanner": {"ae_title": "CT1", "host": "127.0.0.1"}}
        waits = {"quiet_seconds": 600, "quiet_seconds_if_released": 600}
        settings = {"node": {"redo_log_mb": redo_log_mb}, "peers": peers, "series": waits}
        node = Node(folder / "node", {**settings, "device": "cpu", "routes": []})
        try:
            node.start()
            for _ in range(cuts):
                senders = [Sender(node.port, folder / f"source{one}") for one in range(SENDERS)]
                for sender in senders:
                    sender.start()
                time.sleep(moments.uniform(0.2, 7.0))  # the moment is the experiment
                if moments.random() < 0.3:  # what a kill left is done again, and cut off at once
                    node.kill()
                    node.start()
                    tally.kills += 1
                place.cut()
                for sender in senders:
                    sender.join()
                    tally.acknowledged |= sender.acknowledged
                node.kill()
                place.detach()
                place.attach()
                node.start()
                tally.cuts += 1
                _count(node, tally)
                if tally.lost or tally.trouble:
                    break
        finally:
            node.kill()
    return tally


def _count(node: Node, tally: Tally) -> None:
    """Is every acknowledged instance there, byte for byte, and does the journal agree?"""
    said = [line for line in node.log.splitlines() if "from the redo log" in line]
    tally.restored = sum(int(line.split("restored ")[1].split()[0]) for line in said)
    kept = {path.stem: path for path in (node.folder / "data" / "received").glob("*/*.dcm")}
    for uid, digest in tally.acknowledged.items():
        if uid not in kept or dataset_digest(kept[uid])[0] != digest:
            tally.lost.append(f"cut {tally.cuts}: {uid} {'differs' if uid in kept else 'is gone'}")
    checked = node.run("check", "--storage")
    if checked.returncode:
        tally.trouble.append(checked.stdout + checked.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--system", default="ext4", choices=("ext4", "xfs"))
    parser.add_argument("--redo-log-mb", type=int, default=70)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(
            Path(folder), options.cuts, options.seed, options.system, options.redo_log_mb
        )
    print(f"{tally}; seed {options.seed}, {time.monotonic() - began:.0f} s")
    return 1 if tally.lost or tally.trouble else 0


if __name__ == "__main__":
    sys.exit(main())
