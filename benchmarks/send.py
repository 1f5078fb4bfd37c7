"""How fast we send, next to DCMTK's dcmsend and storescu, to the same receivers in the same run.

    python -m benchmarks.send [--repeats 5] [--ct 400] [--pet 2000] [--multiframe 300]

Generated data only. Each sender sends the same files to each receiver in turn, `--repeats` times.
"""

import argparse
import contextlib
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.peers import (
    ENVIRONMENT,
    dcmtk,
    instances,
    machine,
    orthanc_receiver,
    ours,
    report,
    scratch,
    settle,
    shares,
)
from dicomnode.scu import Address, send_instances
from tests.peers import DCMSEND, STORESCU

BASE = "dcmsend"
RECEIVERS = {
    "DCMTK storescp, bit preserving": lambda folder: dcmtk(folder, "-B"),
    "dicomnode acceptor, nothing kept": lambda folder: ours(folder, "--drop"),
    "Orthanc, storage synced": orthanc_receiver,
}


def _by_program(*command: str) -> Callable[[int, list[list[Path]]], float]:
    def run(port: int, parts: list[list[Path]]) -> float:
        start = time.perf_counter()
        senders = [
            subprocess.Popen([*command, "127.0.0.1", str(port), *map(str, part)], env=ENVIRONMENT)
            for part in parts
        ]
        if sum(sender.wait() for sender in senders):
            raise RuntimeError(f"{command[0]} failed")
        return time.perf_counter() - start

    return run


def _by_us(port: int, parts: list[list[Path]]) -> float:
    """One process per association, as the outbox has; their start is not counted."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(parts), mp_context=context) as pool:
        list(pool.map(_warm, [0.3] * len(parts)))
        start = time.perf_counter()
        list(pool.map(_send, [port] * len(parts), parts))
        return time.perf_counter() - start


def _warm(seconds: float) -> None:
    time.sleep(seconds)  # long enough that every process of the pool gets one


def _send(port: int, paths: Sequence[Path]) -> None:
    address = Address("127.0.0.1", port, "ANY-SCP", "DICOMNODE")
    send_instances(paths, address, lambda uid, status: None)


SENDERS = {
    BASE: _by_program(DCMSEND, "--no-uid-checks"),
    "storescu": _by_program(STORESCU),
    "dicomnode": _by_us,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ct", type=int, default=400, help="instances of 512x512")
    parser.add_argument("--pet", type=int, default=2000, help="instances of 128x128")
    parser.add_argument("--multiframe", type=int, default=300, help="MB of one instance")
    parser.add_argument("--associations", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--receivers", nargs="+", default=list(RECEIVERS), choices=RECEIVERS)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    options = parser.parse_args()
    print(machine())
    with scratch(options.scratch) as data:
        for kind in ("ct", "pet", "multiframe"):
            count = getattr(options, kind)
            files = instances(kind, count, data / kind) if count else []
            for associations in [1] if len(files) == 1 else options.associations if files else []:
                for receiver in options.receivers:
                    with contextlib.suppress(FileNotFoundError):  # not installed
                        _measure(receiver, files, associations, options.repeats, data)


def _measure(
    receiver: str, files: list[Path], associations: int, repeats: int, where: Path
) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in SENDERS}
    parts = shares(files, associations)
    for _ in range(repeats):
        for name, sender in SENDERS.items():
            with scratch(where) as folder, RECEIVERS[receiver](folder / "kept") as running:
                settle()
                seconds[name].append(sender(running.port, parts))
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    size = f"{len(files)} x {files[0].parent.name} ({megabytes:.0f} MB)"
    title = f"{size} to {receiver}, {associations} association{'s' * (associations > 1)}"
    report(title, seconds, len(files), megabytes, BASE)


if __name__ == "__main__":
    main()
