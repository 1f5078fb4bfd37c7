"""Seconds per slice of every network, engine and number format, against two yardsticks of the run.

    python benchmarks/inference.py [--networks resnet_9,...] [--sides 256,512] [--seconds 3]
        [--device cpu] [--json FILE]

Every figure is a median of single slices with its spread (10th to 90th percentile); on a GPU of
four batches one after the other, copies overlapped, divided by their slices. `ratio` is eager fp32
torch divided by it; `of peak` the arithmetic of the convolutions per second as a share of what a
matrix product reaches in the same number format (int8: bf16) in the same run: the best of two
sizes, by torch.mm and by a 1x1 convolution, which on a CPU are MKL and oneDNN. Weights are random:
time does not depend on them, and accuracy is not measured here. `first` is the first slice, with
conversion and compilation; `again` that of a second start, which finds the compiled form on disk.
`MB` is how far the process grew, at its peak, from before the engine was made; on a GPU what torch
had of its memory. `others` is what other processes used meanwhile, in cores: where it is not 0.0 on
a CPU, the row is not to be trusted. int8 is every convolution but the first and the last one;
`kernels` is what the convolutions were computed in; on a GPU with + where they were captured.
"""

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import machine
from dicomnode.errors import PackageError
from dicomnode.imaging.engines import (
    Engine,
    FormStore,
    OpenVinoEngine,
    Starting,
    TorchEngine,
    cpu_features,
    installed,
    runs_well,
)
from dicomnode.imaging.networks import Generator, build_generator
from training.calibrate import calibrate

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet_9": ("resnet_9", {}),
    "resnet_9 width 32": ("resnet_9", {"width": 32}),
    "resnet_6": ("resnet_6", {}),
    "resnet_9 antialias": ("resnet_9", {"antialias": True}),
    "mr_ct_full": ("mr_ct_full", {}),
    "unet_256": ("unet_256", {}),
    "unet_128": ("unet_128", {}),
    "gan_circle": ("gan_circle", {}),
    "gan_circle stride 2": ("gan_circle", {"width": 128, "stride": 2}),
    "red_cnn": ("red_cnn", {}),
    "unshuffle_resnet 32": ("unshuffle_resnet", {"width": 32, "blocks": 6}),
    "unshuffle_resnet 64": ("unshuffle_resnet", {"width": 64}),
    "unshuffle_resnet 128": ("unshuffle_resnet", {"width": 128}),
    "residual_denoiser 48": ("residual_denoiser", {"width": 48}),
}
LEAST_RUNS, MOST_RUNS = 3, 100
PEAK_SIDES = {"cpu": (1024, 4096), "cuda": (4096, 8192)}
BATCHES = {"cpu": 1, "cuda": 4}
"""That go through an engine in one run."""


@dataclass(frozen=True)
class Row:
    """One network, size, engine and number format; seconds per slice."""

    network: str
    side: int
    engine: str
    precision: str
    median: float
    low: float
    high: float
    runs: int
    first: float
    """Seconds of the first slice: conversion and compilation, where the engine has them."""
    again: float
    """Seconds from nothing to the first slice where the compiled form is on disk; 0: has none."""
    gflop: float
    ratio: float
    of_peak: float
    peak_mb: float
    """How far the process grew beyond what it was before the engine was made; see above."""
    others: float
    """Cores that other processes used while it was timed."""
    kernels: str


HEADINGS = "s/slice p10 p90 first again ratio of-peak MB others kernels"


def main() -> None:
    """Measure, print a table row by row, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--sides", default="256,512")
    parser.add_argument("--seconds", type=float, default=3.0, help="to spend on each figure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    peaks = {kind: peak(kind, args.device, args.seconds) for kind in ("fp32", "bf16")}
    words = f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{words}; device {args.device}")
    print("matrix product: " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in peaks.items()))
    headings = "".join(f"{heading:>8}" for heading in HEADINGS.split())
    print(f"{'network':22} {'side':>4} {'engine':18} {'':4}{headings}")
    rows = []
    for name in args.networks.split(","):
        for side in map(int, args.sides.split(",")):
            for row in measure(name, side, args.device, args.seconds, peaks):
                rows.append(row)
                print(line(row), flush=True)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process, every engine in turn: {peak_mb:.0f} MB")
    for told in targets(rows):
        print(told)
    if args.json:
        result = {"machine": words, "peaks": peaks, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1), "utf-8")


def line(row: Row) -> str:
    """A row as it is printed."""
    return (
        f"{row.network:22} {row.side:4} {row.engine:18} {row.precision:4}{row.median:8.4f}"
        f"{row.low:8.4f}{row.high:8.4f}{row.first:8.2f}{row.again:8.2f}{row.ratio:8.1f}"
        f"{row.of_peak:8.0%}{row.peak_mb:8.0f}{row.others:8.1f} {row.kernels:>7}"
    )


def targets(rows: list[Row]) -> Iterator[str]:
    """What is wanted of a processor with AMX, and what this one reached, as far as measured."""
    has = "" if "amx_bf16" in cpu_features() else ", which this processor does not have"
    yield f"wanted with AMX{has}:"
    at_512 = [row for row in rows if row.side == 512 and row.precision != "int8"]
    slow = {row.network: row.median * row.ratio for row in at_512}
    wanted = {
        "resnet_9": "9 x eager fp32 and 75 % of the matrix product",
        "unet_256": "7 x eager fp32",
        "unshuffle_resnet 32": "100 x resnet_9 in eager fp32",
        "unshuffle_resnet 64": "100 x resnet_9 in eager fp32",
        "unshuffle_resnet 128": "100 x resnet_9 in eager fp32",
    }
    for name, words in wanted.items():
        best = min((r for r in at_512 if r.network == name), key=lambda r: r.median, default=None)
        if best is not None:
            beside = ""
            if "resnet_9" in slow:
                beside = f", {slow['resnet_9'] / best.median:.0f} x resnet_9 in eager fp32"
            yield (
                f"  {name} at 512: {words}; here {best.ratio:.1f} x itself in eager fp32{beside},"
                f" {best.of_peak:.0%} of the product ({best.engine}, {best.precision})"
            )


def peak(precision: str, device: str, seconds: float) -> float:
    """GFLOP/s of a matrix product, the best way there is to have one from torch."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return max(
        product(side, dtype, device, seconds / 4, as_convolution=as_convolution)
        for side in PEAK_SIDES[device.partition(":")[0]]
        for as_convolution in (False, True)
    )


@torch.inference_mode()
def product(
    side: int, dtype: torch.dtype, device: str, seconds: float, *, as_convolution: bool
) -> float:
    """GFLOP/s of one square matrix product."""
    a = torch.rand(side, side, device=device).to(dtype)
    pixels = math.isqrt(side)
    x = a.reshape(1, pixels, pixels, side).permute(0, 3, 1, 2)  # channels last
    weight = a.reshape(side, side, 1, 1)

    def run() -> None:
        if as_convolution:
            torch.conv2d(x, weight)
        else:
            torch.mm(a, a)
        if a.is_cuda:
            torch.cuda.synchronize()

    run()
    return 2 * side**3 / float(np.median(timed(run, seconds))) / 1e9


def measure(
    name: str, side: int, device: str, seconds: float, peaks: dict[str, float]
) -> Iterator[Row]:
    """Every engine and number format of one network at one size; eager fp32 torch first."""
    architecture, options = NETWORKS[name]
    torch.manual_seed(0)
    generator = build_generator(architecture, options)
    one = np.random.default_rng(0).normal(0, 0.3, (1, 1, side, side)).astype(np.float32)
    gflop = flops(generator, side) / 1e9
    eager = 0.0
    for make, precision in engines(generator, device):
        before = memory_mb()
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            engine = make()
            count = engine.batch(side, side) * BATCHES[device.partition(":")[0]]
            x = np.repeat(np.repeat(one, generator.slices, axis=1), count, axis=0)
            began = time.perf_counter()
            engine.run(x)
            first = time.perf_counter() - began
            grown = memory_mb(peak=True) - before
            if device != "cpu":
                grown = torch.cuda.max_memory_reserved(device) / 2**20
            again = second_start(make, x, engine)
            idle = others()
            found = np.array(timed(functools.partial(engine.run, x), seconds)) / len(x)
        except PackageError as error:
            print(f"{name:22} {side:4} {precision}: {error}")
            continue
        beside = others() - idle
        median = float(np.median(found))
        eager = eager or median
        low, high = np.quantile(found, [0.1, 0.9])
        speed = gflop / median / peaks["bf16" if precision != "fp32" else "fp32"]
        ran = kernels(engine)
        yield Row(
            name, side, engine.name, precision, median, float(low), float(high), len(found),
            first, again, gflop, eager / median, speed, grown,
            max(0.0, beside / (float(found.sum()) * len(x))), ran,
        )  # fmt: skip
        del engine


def kernels(engine: Engine) -> str:
    """What the convolutions were computed in; on a GPU with + where it was a captured graph."""
    if isinstance(engine, OpenVinoEngine):
        return "+".join(sorted(engine.kernels))
    captured = isinstance(engine, Starting) and any(": captured, " in r for r in engine.remarks)
    return engine.precision + "+" * captured


def memory_mb(*, peak: bool = False) -> float:
    """What the process has in memory now; with `peak` the most since this was last called without.

    Linux; elsewhere 0.
    """
    try:
        if not peak:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", "ascii")
        status = Path("/proc/self/status").read_text("ascii", "replace")
    except (OSError, AttributeError):
        return 0.0
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024


def others() -> float:
    """Seconds of CPU time that other processes used since the machine started; Linux, else 0."""
    try:
        ticks = Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    busy = sum(map(int, ticks)) - int(ticks[3]) - int(ticks[4])  # idle and waiting for a disk
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def engines(generator: Generator, device: str) -> Iterator[tuple[Callable[[], Engine], str]]:
    """What can be measured here, eager fp32 torch first."""
    features = cpu_features()
    yield (lambda: TorchEngine(generator, device, "fp32", graphs=False)), "fp32"
    if device != "cpu":
        yield (lambda: TorchEngine(generator, device, "fp32")), "fp32"
        yield (lambda: TorchEngine(generator, device, "bf16", graphs=False)), "bf16"
        yield (lambda: TorchEngine(generator, device, "bf16")), "bf16"
        yield (lambda: TorchEngine(generator, device, "fp16")), "fp16"
        return
    if runs_well("bf16", features):
        yield (lambda: TorchEngine(generator, device, "bf16")), "bf16"
    if not installed():
        return
    kept: dict[str, Any] = {"digest": str(id(generator)), "store": FormStore(Path(FORMS.name))}
    yield (lambda: OpenVinoEngine(generator, "fp32", **kept)), "fp32"
    if runs_well("bf16", features):
        yield (lambda: OpenVinoEngine(generator, "bf16", **kept)), "bf16"
    if runs_well("int8", features):
        side = max(64, generator.multiple)
        noise = np.random.default_rng(1).normal(0, 0.3, (1, generator.slices, side, side))
        limits = calibrate(generator, [noise.astype(np.float32)])
        yield (lambda: OpenVinoEngine(generator, "int8", limits=limits, **kept)), "int8"


FORMS = tempfile.TemporaryDirectory(prefix="dicomnode-forms-")
"""Compiled forms, until the end of the run."""


def second_start(make: Callable[[], Engine], x: Any, engine: Engine) -> float:
    """Seconds from making the engine again to its first slice; 0: it keeps no compiled form."""
    if not isinstance(engine, OpenVinoEngine):
        return 0.0
    began = time.perf_counter()
    make().run(x)
    return time.perf_counter() - began


def flops(generator: Generator, side: int) -> float:
    """Floating-point operations of the convolutions for one slice: two per multiply-add."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        generator(torch.zeros(1, generator.slices, side, side))
    return float(counter.get_total_flops())


def timed(run: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of single runs, for about as long as asked."""
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < LEAST_RUNS or (time.perf_counter() < until and len(found) < MOST_RUNS):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found


if __name__ == "__main__":
    main()
