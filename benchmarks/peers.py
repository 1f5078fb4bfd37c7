"""Generated instances, foreign receivers, and how a figure is printed, for both benchmarks."""

import contextlib
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

from dicomnode.redo import REDO
from dicomnode.segments import SEGMENT_BYTES, paths
from tests.peers import ORTHANC, STORESCP, Node, free_port, listens, orthanc, wait_for

ROOT = Path(__file__).parents[1]
_REDO_LOG_MB = 512
"""As the node has it by default."""
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}
"""Without it DCMTK's tools stall on Nagle's algorithm, about 20 instances/s: no fair match."""


def instances(kind: str, count: int, folder: Path) -> list[Path]:
    """`count` files of noise: "ct" 512x512, "pet" 128x128, or "multiframe": one of `count` MB."""
    folder.mkdir(parents=True)
    frames, rows = (count * 2, 512) if kind == "multiframe" else (1, 128 if kind == "pet" else 512)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 4096, (frames, rows, rows), dtype=np.uint16).tobytes()
    series = generate_uid()
    number = 1 if kind == "multiframe" else count
    return [
        _instance(kind, pixels, frames, rows, series, folder / f"{n:05}.dcm") for n in range(number)
    ]


def _instance(kind: str, pixels: bytes, frames: int, rows: int, series: str, path: Path) -> Path:
    sop_class = {
        "ct": CTImageStorage,
        "pet": PositronEmissionTomographyImageStorage,
        "multiframe": EnhancedCTImageStorage,
    }[kind]
    ds, meta = Dataset(), FileMetaDataset()
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, generate_uid()
    ds.StudyInstanceUID = ds.SeriesInstanceUID = series
    ds.PatientID, ds.PatientName, ds.Modality = "BENCH", "Bench^Mark", "CT"
    ds.Rows = ds.Columns = rows
    if frames > 1:
        ds.NumberOfFrames = frames
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = pixels
    ds["PixelData"].VR = "OW"
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta = meta
    ds.save_as(path, enforce_file_format=True)
    return path


@dataclass(frozen=True)
class Running:
    """A receiver that listens."""

    port: int
    pid: int = 0

    def cpu_seconds(self) -> float:
        """Of the process and its children so far; nan if we do not know the process."""
        if not self.pid:
            return float("nan")
        while True:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one ended meanwhile
                return sum(_cpu_seconds(pid) for pid in [str(self.pid), *children])


def _cpu_seconds(pid: str) -> float:
    """User and system time of a process and of the children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def ours(folder: Path, *options: str) -> Iterator[Running]:
    """Our acceptor with `tests.fuzz.receiver` behind it."""
    command = [sys.executable, "-m", "tests.fuzz.receiver", str(folder), *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("no pipes")
        try:
            yield Running(*map(int, process.stdout.readline().split()))
        finally:
            process.stdin.close()
            process.wait(20)


@contextlib.contextmanager
def node(folder: Path) -> Iterator[Running]:
    """`dicomnode serve` with its real journal, and no route."""
    senders = ("DCMSEND", "WIRE")
    peers = {name.lower(): {"ae_title": name, "host": "127.0.0.1"} for name in senders}
    waits = {"quiet_seconds": 600, "quiet_seconds_if_released": 600}
    settings = {"peers": peers, "series": waits, "device": "cpu", "routes": []}
    whole = Node(folder, {**settings, "node": {"redo_log_mb": _REDO_LOG_MB}})
    try:
        whole.start()
        segments = _REDO_LOG_MB * 1_000_000 // SEGMENT_BYTES
        redo = folder / "data" / REDO
        wait_for(lambda: len(paths(redo)) == segments, "the redo log to be made")
        yield Running(whole.port, whole.pid)
    finally:
        whole.kill()


@contextlib.contextmanager
def dcmtk(folder: Path, *options: str, preload: Path | None = None) -> Iterator[Running]:
    """DCMTK's storescp, a process per association; `preload`: a library of ours within it."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = ENVIRONMENT if preload is None else {**ENVIRONMENT, "LD_PRELOAD": str(preload)}
    with subprocess.Popen(
        [STORESCP, "--fork", "-od", str(folder), *options, str(port)], env=environment
    ) as process:
        try:
            wait_for(lambda: listens(port), "storescp to listen")
            yield Running(port, process.pid)
        finally:
            process.terminate()


@contextlib.contextmanager
def dcmtk_synced(folder: Path) -> Iterator[Running]:
    """storescp that syncs each file and its folder before it answers (`synced.c`)."""
    library = folder.parent / "synced.so"
    source = Path(__file__).with_name("synced.c")
    subprocess.run(["/usr/bin/cc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    with dcmtk(folder, preload=library) as running:
        yield running


@contextlib.contextmanager
def orthanc_receiver(folder: Path) -> Iterator[Running]:
    """Debian's Orthanc as it comes: its storage is synced."""
    if not Path(ORTHANC).exists():
        raise FileNotFoundError(ORTHANC)
    with orthanc(folder) as archive:
        yield Running(archive.port)


def shares(files: Sequence[Path], associations: int) -> list[list[Path]]:
    return [list(files[n::associations]) for n in range(associations) if files[n::associations]]


@contextlib.contextmanager
def scratch(where: Path | None) -> Iterator[Path]:
    """An empty folder, gone afterwards; each folder in it in a block group of its own (ext4).

    Where files were just deleted, ext4 without a journal looks long for an inode that it may use:
    making a file took 440 us instead of 17, whoever made it, and hid every difference.
    """
    folder = Path(tempfile.mkdtemp(prefix="dicomnode-bench-", dir=where))
    subprocess.run(["/usr/bin/chattr", "+T", folder], stderr=subprocess.DEVNULL, check=False)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settle() -> None:
    """Let what was written reach the disk, so that one run does not pay for the one before."""
    os.sync()
    time.sleep(0.2)


def report(
    title: str,
    seconds: dict[str, list[float]],
    instances: int,
    megabytes: float,
    base: str,
    cpu: Mapping[str, list[float]] | None = None,
) -> None:
    """A Markdown table: median, spread and ratio to `base` of each line; its CPU time if known."""
    print(f"\n### {title}\n")
    cpu_head, cpu_rule = (" CPU s |", "---:|") if cpu else ("", "")
    print(f"| | instances/s | MB/s | seconds: median (least - most) | x {base} |{cpu_head}")
    print(f"|---|---:|---:|---:|---:|{cpu_rule}")
    reference = statistics.median(seconds[base])
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"{median:.3f} ({min(times):.3f} - {max(times):.3f})"
        rates = f"{instances / median:.0f} | {megabytes / median:.0f}"
        used = f" {statistics.median(cpu[name]):.2f} |" if cpu else ""
        print(f"| {name} | {rates} | {spread} | {reference / median:.2f} |{used}", flush=True)


def machine() -> str:
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')} UTC, {os.cpu_count()} cores ({processor}), "
        f"Linux {platform.release()}, Python {platform.python_version()}, load {load}, "
        f"{socket.gethostname()}"
    )
