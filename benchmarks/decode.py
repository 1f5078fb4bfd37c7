"""Time and memory per slice: our reader beside SimpleITK's GDCM series reader, on the same files.

    python benchmarks/decode.py [FOLDER ...]

Each FOLDER holds one CT series; without any, generated 512 x 512 series in four transfer syntaxes
are read. Each reading is a process of its own; both readers start with file names and end with a
calibrated volume. Printed: medians of the repeats, in a table. Memory is what the peak of the
process grew by.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from pydicom import dcmread
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

GENERATED = (ExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless)


def read_with_ours(files: list[str]) -> float:
    """One volume of one stack; returns its mean, so that both readers can be compared."""
    from dicomnode.imaging.stacks import split_stacks
    from dicomnode.imaging.volume import volume_from_datasets

    stacks = split_stacks(dcmread(file) for file in files).stacks
    volumes = [volume_from_datasets(stack.datasets, min_slices=1)[0] for stack in stacks]
    return float(
        sum(v.voxels.sum(dtype="f8") for v in volumes) / sum(v.voxels.size for v in volumes)
    )


def read_with_gdcm(files: list[str]) -> float:
    """The same by SimpleITK, which is told the files in slice order."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.SetOutputPixelType(sitk.sitkFloat32)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = reader.Execute()  # owns what the view shows
    return float(sitk.GetArrayViewFromImage(image).mean(dtype="f8"))


READERS = {"dicomnode": read_with_ours, "gdcm": read_with_gdcm}


def measure(reader: str, files: list[str]) -> None:
    """In a process of its own: print seconds and mebibytes, import and first call not counted."""
    READERS[reader](files[:1])
    before = peak_mebibytes()
    began = time.perf_counter()
    mean = READERS[reader](files)
    seconds = time.perf_counter() - began
    grown = peak_mebibytes() - before
    print(json.dumps({"seconds": seconds, "mebibytes": grown, "mean": mean}))


def peak_mebibytes() -> float:
    """Peak memory of this process alone; ru_maxrss would count that of the parent (Linux)."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def in_slice_order(folder: Path) -> list[str]:
    """File names along the z axis, as a caller of SimpleITK must sort them."""
    files = [path for path in folder.iterdir() if path.suffix != ".md"]
    return [str(p) for p in sorted(files, key=lambda p: float(_header(p).ImagePositionPatient[2]))]


def _header(path: Path):  # type: ignore[no-untyped-def]
    return dcmread(path, stop_before_pixels=True)


def compare(name: str, files: list[str], repeats: int) -> None:
    """One line of the table."""
    found: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
    for _ in range(repeats):
        for reader in READERS:
            command = [sys.executable, __file__, "--measure", reader, *files]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[reader].append(json.loads(done.stdout))
    cells = [
        name[:44],
        UID(_header(Path(files[0])).file_meta.TransferSyntaxUID).name[:24],
        len(files),
    ]
    both = {}
    for reader, results in found.items():
        both[reader] = [
            statistics.median(r[key] for r in results) * scale / len(files)
            for key, scale in (("seconds", 1000), ("mebibytes", 1))
        ]
        cells += [f"{both[reader][0]:.2f}", f"{both[reader][1]:.2f}"]
    cells.append(f"{both['dicomnode'][0] / both['gdcm'][0]:.2f}")
    same = abs(found["dicomnode"][0]["mean"] - found["gdcm"][0]["mean"]) < 1e-2
    print("| " + " | ".join(map(str, cells)) + f" | {'yes' if same else 'NO'} |", flush=True)


def generated(folder: Path, syntax: UID, slices: int) -> list[str]:
    """A series of 512 x 512 slices of a noisy body in a transfer syntax."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.factories import ct_series, write_series

    series = ct_series(slices, 512, 512, syntax=syntax)
    return [str(path) for path in write_series(series, folder)]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slices", type=int, default=24, help="of each generated series")
    parser.add_argument("--measure", choices=READERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, [str(path) for path in given.folders])
        return
    heads = ["series", "transfer syntax", "slices", "ours ms", "ours MiB", "GDCM ms", "GDCM MiB"]
    heads += ["time ratio", "same"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for folder in given.folders:
        compare(folder.name, in_slice_order(folder), given.repeats)
    if not given.folders:
        for syntax in GENERATED:
            with TemporaryDirectory() as folder:
                compare("generated", generated(Path(folder), syntax, given.slices), given.repeats)


if __name__ == "__main__":
    main()
