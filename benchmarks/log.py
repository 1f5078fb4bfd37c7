"""What one sync costs: of bytes whose place on the disk is there already, and of a new file.

    python -m benchmarks.log [--scratch FOLDER] [--repeats 400]

The first is what the redo log asks of the disk for each instance (docs/ARCHITECTURE.md), the second
what its own file would.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from benchmarks.peers import machine, scratch

PLACE_BYTES = 256 << 20
SIZES = {"PET": 40_000, "CT": 530_000}


def _existing(folder: Path, data: bytes, repeats: int) -> list[float]:
    """Milliseconds of each write into a file that was written before."""
    file = os.open(folder / "log", os.O_RDWR | os.O_CREAT)
    try:
        for _ in range(PLACE_BYTES >> 20):
            os.write(file, bytes(1 << 20))
        os.fsync(file)
        step = -(-len(data) // 4096) * 4096
        taken = []
        for number in range(repeats):
            start = time.perf_counter()
            os.pwrite(file, data, number * step % (PLACE_BYTES - step) // 4096 * 4096)
            os.fdatasync(file)
            taken.append((time.perf_counter() - start) * 1e3)
        return taken
    finally:
        os.close(file)


def _new(folder: Path, data: bytes, repeats: int) -> list[float]:
    """Milliseconds of each new file."""
    taken = []
    for number in range(repeats):
        start = time.perf_counter()
        file = os.open(folder / f"{len(data)}.{number}", os.O_WRONLY | os.O_CREAT)
        os.write(file, data)
        os.fsync(file)
        os.close(file)
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    parser.add_argument("--repeats", type=int, default=400)
    options = parser.parse_args()
    print(machine())
    print("| | ms: median (10th - 90th percentile) |\n|---|---:|")
    with scratch(options.scratch) as folder:
        for name, size in SIZES.items():
            for what, measure in (("bytes in place", _existing), ("new file", _new)):
                taken = measure(folder, os.urandom(size), options.repeats)
                tenths = statistics.quantiles(taken, n=10)
                spread = f"{tenths[0]:.2f} - {tenths[-1]:.2f}"
                print(f"| {name}, {what} | {statistics.median(taken):.2f} ({spread}) |")


if __name__ == "__main__":
    main()
