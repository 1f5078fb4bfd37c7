"""From the last C-STORE response of a series to the last one of its derived series.

    python -m benchmarks.time_to_result [--slices 133 400] [--pace 0 20] [--ahead off on]
        [--models student-32 student-64 resnet_9 ldct-denoise]

The node itself, DCMTK's storescu before it and storescp behind it, generated 512x512 CT. The time
to complete (the wait for more slices) is taken off. `total` is what is left; `translate` is the job
in the worker, `send` the rest. The steps overlap, so beside them stands what each costs alone, one
after the other in one process: decode (read, decode, digest), infer (normalise, run, invert), build
(instance, file, fsync), send (C-STORE to storescp). With --pace the sender is held to so many
slices a second, as a scanner that reconstructs; `ahead` is how many slices were then inferred
before the series was complete. `start` is from starting the node to its being ready: the first
time, and `again`, when the compiled form is on disk; `worker MB` the peak memory of the worker.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import machine
from dicomnode.companions import CompanionOptions
from dicomnode.deferred import with_pixels
from dicomnode.derived import OutputOptions
from dicomnode.imaging.decoding import Decoding
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import (
    Acceptance,
    Bounds,
    DicomSpec,
    GeneratorSpec,
    InputSpec,
    Manifest,
    OutputSpec,
    Padding,
    Range,
    Tiling,
)
from dicomnode.imaging.networks import build_generator
from dicomnode.imaging.package import read_package, write_package
from dicomnode.imaging.streaming import Predicting, Stages
from dicomnode.part10 import read_instances
from dicomnode.pipeline import Task, checked_source, layout_for, translate_series
from dicomnode.results import Draft
from dicomnode.scu import Address, send_instances
from tests.factories import changed, ct_series
from tests.peers import ROOT, STORESCU, node_settings, running_node, send, storescp

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "student-32": ("unshuffle_resnet", {"width": 32, "blocks": 6}),
    "student-64": ("unshuffle_resnet", {"width": 64}),
    "resnet_9": ("resnet_9", {}),
}
"""Packages made here, with random weights: name -> architecture, options."""
WINDOW = Window(-1024.0, 3071.0)


def main() -> None:
    """Measure every combination, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slices", nargs="+", type=int, default=[133, 400])
    parser.add_argument("--models", nargs="+", default=[*NETWORKS, "ldct-denoise"])
    parser.add_argument("--pace", nargs="+", type=int, default=[0], help="slices/s; 0: no limit")
    parser.add_argument(
        "--ahead", nargs="+", choices=("off", "on"), default=["off", "on"], help="infer ahead"
    )
    options = parser.parse_args()
    print(machine(), "\n")
    names = ("model", "slices", "pace", "ahead", "total s", "translate s", "send s", "ms/slice")
    print("| " + " | ".join(names) + " | alone, ms/slice: decode | infer | build | send ", end="")
    print("| start s | again s | worker MB |")
    print("|---|" + "---:|" * (len(names) + 6))
    with tempfile.TemporaryDirectory() as work:
        for model in options.models:
            package(model, Path(work) / "models")
            for slices in options.slices:
                files = series(slices, Path(work) / f"in{slices}")
                alone = steps_alone(Path(work) / "models" / model, files[: min(slices, 12)])
                for pace in options.pace:
                    for ahead in options.ahead:
                        row = measure(Path(work), model, files, pace, ahead == "on")
                        print_row(model, slices, pace, row, alone)


def print_row(
    model: str, slices: int, pace: int, row: dict[str, float], alone: dict[str, float]
) -> None:
    cells = [model, slices, pace or "-", int(row["ahead"])]
    cells += [f"{row[name]:.2f}" for name in ("total", "translate", "send")]
    cells += [f"{1000 * row['total'] / slices:.1f}"]
    cells += [f"{1000 * alone[name]:.1f}" for name in ("decode", "infer", "build", "send")]
    cells += [f"{row['start']:.1f}", f"{row['again']:.1f}", f"{row['worker MB']:.0f}"]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def package(name: str, models: Path) -> None:
    """A package in `models`: one of the repository's, or one of `NETWORKS` with random weights."""
    models.mkdir(exist_ok=True)
    if name not in NETWORKS:
        (models / name).symlink_to(ROOT / "models" / name)
        return
    random_package(models / name, *NETWORKS[name])


def random_package(path: Path, architecture: str, options: dict[str, Any]) -> None:
    """A package with random weights that takes CT of 512 x 512."""
    name = path.name
    torch.manual_seed(0)
    generator = build_generator(architecture, options)
    spec = InputSpec(
        "CT",
        "HU",
        WINDOW,
        matrix=Range(512, 512),
        field_of_view_mm=Range(100, 900),
        padding=Padding("reflect", generator.multiple),
    )
    manifest = Manifest(
        1,
        name,
        "1.0.0",
        "denoise",
        GeneratorSpec(architecture, options),
        spec,
        OutputSpec("CT", "HU", WINDOW, residual=True),
        "instance" if generator.uses_statistics else "none",
        Tiling(),
        Bounds(("CT",)),
        DicomSpec(name, "benchmark", "1.0.0"),
        "MIT",
        "Benchmarks only: its weights are random.",
        acceptance={"bf16": Acceptance(mean_abs=50.0, p999_abs=500.0)},
    )
    state = {key: 0.01 * value for key, value in generator.state_dict().items()}
    golden = np.random.default_rng(0).normal(40, 30, (1, 64, 64)).astype(np.float32)
    write_package(path, manifest, state, golden, "# Random\n")


def series(slices: int, folder: Path) -> list[Path]:
    """A CT series whose slices differ in their place and their UID."""
    if folder.exists():
        return sorted(folder.iterdir())
    folder.mkdir()
    images = ct_series(min(slices, 24), 512, 512, pixel_spacing=["0.7", "0.7"])
    for index in range(slices):
        uid = f"{images[0].SeriesInstanceUID[:40]}.{index + 1}"
        (image,) = changed(
            [images[index % len(images)]], SOPInstanceUID=uid, InstanceNumber=index + 1
        )
        image.file_meta.MediaStorageSOPInstanceUID = uid
        image.ImagePositionPatient = [0, 0, float(index)]
        image.PixelData = index.to_bytes(2, "little") + image.PixelData[2:]  # no two alike
        image.save_as(folder / f"{index:05}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


def measure(work: Path, model: str, files: list[Path], pace: int, ahead: bool) -> dict[str, float]:
    """Seconds of one series through a node of its own."""
    with tempfile.TemporaryDirectory(dir=work) as folder, storescp(Path(folder) / "pacs") as pacs:
        settings = node_settings(
            work / "models", [pacs], model=model, companions=True, quiet_seconds=20
        )
        settings["routes"][0]["qa"] = "off"
        settings["peers"]["scanner"]["max_instances_per_second"] = pace
        settings["worker"] = {"speculative": ahead, "speculative_gb": 2}
        began = time.perf_counter()
        with contextlib.redirect_stdout(None), running_node(Path(folder) / "n", settings) as node:
            start = time.perf_counter() - began
            if send(STORESCU, files, node.port).returncode:
                raise RuntimeError("storescu failed")
            uid = str(read_instances(files[:1], pixels=False)[0].SeriesInstanceUID)
            settled = node.wait_settled(uid, 3000)
            found = node.get("metrics")[1]
            (worker,) = (pid for name, pid in node.children() if name == "worker")
            megabytes = peak_mb(worker)
            node.stop()
            began = time.perf_counter()
            node.start()
            again = time.perf_counter() - began
    if [job["state"] for job in settled["jobs"]] != ["done"]:
        raise RuntimeError(f"not done: {settled['jobs'][0]['detail']}")
    at = moments(settled["timeline"])
    used = [line for line in found.splitlines() if line.startswith("dicomnode_slices_ahead_total{")]
    return {
        "ahead": float(used[0].split()[-1]),
        "total": at["delivered"] - at["complete"],
        "translate": at["sending"] - at["complete"],
        "send": at["delivered"] - at["sending"],
        "start": start,
        "again": again,
        "worker MB": megabytes,
    }


def peak_mb(pid: int) -> float:
    """The most that a process had in memory so far."""
    status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def moments(timeline: list[dict[str, Any]]) -> dict[str, float]:
    """When the series was found complete, the job had made all, the last instance was accepted."""
    words = {"complete": "complete: ", "sending": " sending", "delivered": " delivered"}
    return {
        name: next(event["at"] for event in timeline if word in event["text"])
        for name, word in words.items()
    }


def steps_alone(package_path: Path, files: list[Path]) -> dict[str, float]:
    """Seconds per slice of each step, one after the other, of a series of a few slices."""
    model = load_model(read_package(package_path), "cpu")
    task = Task(OutputOptions(), datetime.now(UTC), companions=CompanionOptions())
    seconds: dict[str, float] = {}
    headers = read_instances(files, pixels="later")
    layout = layout_for(headers, model, task)
    with timed(seconds, "decode"):
        read_instances(files, pixels="later")
        decoding = Decoding(layout.datasets, layout.calibration, with_pixels)
        for index in range(len(files)):
            decoding.decode(index)
    source = checked_source(layout, decoding, model)
    stages = Stages(lambda index: None, lambda: source)
    first = Predicting(model, layout, decoding, stages).planes()
    next(first)  # compiles
    with timed(seconds, "infer"):
        for _ in Predicting(model, layout, decoding, stages).planes():
            pass
    whole = [with_pixels(header) for header in headers]
    made = translate_series(whole, model, task.options, task.now, companions=task.companions)
    with tempfile.TemporaryDirectory() as folder, storescp(Path(folder) / "pacs") as pacs:
        with Draft(Path(folder)) as draft:
            first_image = next(made.derived)  # loads tables
            with timed(seconds, "build"):
                draft.add(first_image)
                for dataset in made.derived:
                    draft.add(dataset)
                written = draft.commit()
        paths = sorted((Path(folder) / written.uid).iterdir())
        address = Address("127.0.0.1", pacs.port, pacs.ae_title, "BENCH")
        with timed(seconds, "send"):
            send_instances(paths, address, lambda uid, status: None)
    return {name: value / len(files) for name, value in seconds.items()}


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


if __name__ == "__main__":
    main()
