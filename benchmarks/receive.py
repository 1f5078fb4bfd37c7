"""How fast we receive, next to DCMTK's storescp and Orthanc on the same machine in the same run.

    python -m benchmarks.receive [--repeats 5] [--ct 400] [--pet 2000] [--multiframe 300]

Generated data only. Every receiver gets the same files, in turn, `--repeats` times. Two senders:
DCMTK's dcmsend, whose own cost counts for all; and a replay of ready bytes, which costs next to
nothing and so shows the receiver. "durable" is file and folder synced before each response.
"""

import argparse
import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from pydicom.filereader import read_file_meta_info

from benchmarks.peers import (
    ENVIRONMENT,
    Running,
    dcmtk,
    dcmtk_synced,
    instances,
    machine,
    node,
    orthanc_receiver,
    ours,
    report,
    scratch,
    settle,
    shares,
)
from tests.fuzz import wire
from tests.fuzz.wire import EXPLICIT, Wire
from tests.peers import DCMSEND

Receiver = Callable[[Path], AbstractContextManager[Running]]
_PDU = 16_378
"""Bytes of data per PDV of the replay: PDUs of 16 KiB, as DCMTK sends by default."""
BASE = "DCMTK storescp"
RECEIVERS: dict[str, tuple[Receiver, bool]] = {
    BASE: (dcmtk, False),
    "DCMTK storescp, bit preserving": (lambda folder: dcmtk(folder, "-B"), False),
    "dicomnode acceptor": (ours, False),
    "DCMTK storescp, then the same syncs": (dcmtk, True),
    "DCMTK storescp, synced before each response": (dcmtk_synced, False),
    "dicomnode acceptor, durable": (lambda folder: ours(folder, "--sync"), False),
    "dicomnode, durable, with its journal": (node, False),
    "Orthanc, storage synced": (orthanc_receiver, False),
}
"""How to start each, and whether we sync its files for it after the last response."""


def by_dcmsend(port: int, files: Sequence[Path], associations: int) -> float:
    """Seconds that `associations` parallel dcmsend take."""
    command = [DCMSEND, "--no-uid-checks", "-aec", "DICOMNODE", "127.0.0.1", str(port)]
    start = time.perf_counter()
    senders = [
        subprocess.Popen([*command, *map(str, share)], env=ENVIRONMENT)
        for share in shares(files, associations)
    ]
    if sum(sender.wait() for sender in senders):
        raise RuntimeError("dcmsend failed")
    return time.perf_counter() - start


def by_replay(port: int, files: Sequence[Path], associations: int) -> float:
    """Seconds from the first request to the last release, all bytes made ready before."""
    ready = [[_message(path) for path in share] for share in shares(files, associations)]
    wires = [Wire(port, 300) for _ in ready]
    sop_class = str(read_file_meta_info(files[0]).MediaStorageSOPClassUID)
    with ThreadPoolExecutor(len(wires)) as pool:
        start = time.perf_counter()
        list(pool.map(_replay, wires, [sop_class] * len(wires), ready))
        return time.perf_counter() - start


def _replay(peer: Wire, sop_class: str, messages: Sequence[bytes]) -> None:
    with peer:
        peer.associate([(3, sop_class, (EXPLICIT,))])
        for message in messages:
            if peer.status(message)[1] != 0:
                raise RuntimeError("an instance was refused")
        peer.ask(wire.RELEASE_RQ_PDU)


def _message(path: Path) -> bytes:
    meta, whole = read_file_meta_info(path), path.read_bytes()
    start = 144 + int.from_bytes(whole[140:144], "little")
    sop_class, uid = str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID)
    parts = [whole[at : at + _PDU] for at in range(start, len(whole), _PDU)]
    last = len(parts) - 1
    message = [wire.p_data(3, 3, wire.store_rq(uid, sop_class))]
    message += [wire.p_data(3, 2 * (n == last), part) for n, part in enumerate(parts)]
    return b"".join(message)


SENDERS = {"dcmsend": by_dcmsend, "replay": by_replay}


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        for one in (path, path.parent):
            descriptor = os.open(one, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _empty(folder: Path) -> None:
    """Free the room of what was received, and keep the names until the end.

    ext4 searches long for an inode where many were just deleted: one run would pay for another.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.truncate(path, 0)


def once(
    name: str, sender: str, files: Sequence[Path], associations: int, where: Path
) -> tuple[float, float]:
    """Seconds, and the receiver's CPU seconds."""
    receiver, sync = RECEIVERS[name]
    folder = Path(tempfile.mkdtemp(dir=where))
    with contextlib.ExitStack() as after, receiver(folder / "kept") as running:
        after.callback(_empty, folder)
        settle()
        before = running.cpu_seconds()
        seconds = SENDERS[sender](running.port, files, associations)
        used = running.cpu_seconds() - before
        start = time.perf_counter()
        if sync:
            _sync(folder / "kept")
        return seconds + time.perf_counter() - start, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ct", type=int, default=400, help="instances of 512x512")
    parser.add_argument("--pet", type=int, default=2000, help="instances of 128x128")
    parser.add_argument("--multiframe", type=int, default=300, help="MB of one instance")
    parser.add_argument("--senders", nargs="+", default=list(SENDERS), choices=SENDERS)
    parser.add_argument("--associations", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--receivers", nargs="+", default=list(RECEIVERS), choices=RECEIVERS)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    options = parser.parse_args()
    print(machine())
    for kind in ("ct", "pet", "multiframe"):
        if count := getattr(options, kind):
            for sender in options.senders:
                for associations in options.associations if kind != "multiframe" else [1]:
                    with scratch(options.scratch) as data:
                        files = instances(kind, count, data / kind)
                        _compare(sender, files, associations, options, data)


def _compare(
    sender: str, files: list[Path], associations: int, options: argparse.Namespace, where: Path
) -> None:
    """Every receiver in turn, each time another one first; a table."""
    names = [BASE, *(name for name in options.receivers if name != BASE)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            with contextlib.suppress(FileNotFoundError):  # not installed
                took, used = once(name, sender, files, associations, where)
                seconds[name].append(took)
                cpu[name].append(used)
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    title = (
        f"{len(files)} x {files[0].parent.name} ({megabytes:.0f} MB), {sender}, "
        f"{associations} association{'s' * (associations > 1)}"
    )
    measured = {name: times for name, times in seconds.items() if times}
    report(title, measured, len(files), megabytes, BASE, cpu)


if __name__ == "__main__":
    main()
