"""Seconds per slice of every network, engine and number format, against two yardsticks of the run.

    python benchmarks/inference.py [--networks resnet_9,...] [--sides 256,512] [--seconds 3]
        [--device cpu] [--json FILE]

Every figure is a median of single slices with its spread (10th to 90th percentile). `ratio` is
eager fp32 torch divided by it; `of peak` the arithmetic of the convolutions per second as a share
of what a square matrix product reaches in the same number format in the same run (torch, same
threads). Weights are random: time does not depend on them, and accuracy is not measured here.
`first` is the first slice, with conversion and compilation; `again` that of a second start, which
finds the compiled form on disk. int8 is every convolution but the first and the last one.
"""

import argparse
import json
import platform
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

from dicomnode.errors import PackageError
from dicomnode.imaging.engines import (
    Engine,
    FormStore,
    OpenVinoEngine,
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
    "unshuffle_resnet 64": ("unshuffle_resnet", {"width": 64}),
    "unshuffle_resnet 128": ("unshuffle_resnet", {"width": 128}),
    "residual_denoiser 48": ("residual_denoiser", {"width": 48}),
}
LEAST_RUNS, MOST_RUNS = 3, 100
PEAK_SIDE = 2048


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
    words = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{words}; {time.strftime('%Y-%m-%d')}; device {args.device}")
    print("matrix product: " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in peaks.items()))
    print(
        f"{'network':22} {'side':>4} {'engine':18} {'':4} {'s/slice':>8} {'p10':>8} {'p90':>8} "
        f"{'first':>6} {'again':>6} {'ratio':>6} {'of peak':>7}"
    )
    rows = []
    for name in args.networks.split(","):
        for side in map(int, args.sides.split(",")):
            for row in measure(name, side, args.device, args.seconds, peaks):
                rows.append(row)
                print(
                    f"{row.network:22} {row.side:4} {row.engine:18} {row.precision:4} "
                    f"{row.median:8.4f} {row.low:8.4f} {row.high:8.4f} {row.first:6.2f} "
                    f"{row.again:6.2f} {row.ratio:6.1f} {row.of_peak:6.0%}",
                    flush=True,
                )
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process, every engine in turn: {peak_mb:.0f} MB")
    if "amx_bf16" in cpu_features():
        print("AMX: wanted are ResNet-9 at 512 in bf16 9 x fp32 and 75 % of the matrix product,")
        print("U-Net-256 7 x, unshuffle_resnet 100 x ResNet-9 in fp32")
    else:
        print("no AMX: the targets for AMX (9 x, 75 %) are not asked of this processor")
    if args.json:
        result = {"machine": words, "peaks": peaks, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1), "utf-8")


def peak(precision: str, device: str, seconds: float) -> float:
    """GFLOP/s of a square matrix product."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a = torch.rand(PEAK_SIDE, PEAK_SIDE, device=device).to(dtype)

    def product() -> None:
        torch.mm(a, a)
        if a.is_cuda:
            torch.cuda.synchronize()

    product()
    return 2 * PEAK_SIDE**3 / float(np.median(timed(product, seconds))) / 1e9


def measure(
    name: str, side: int, device: str, seconds: float, peaks: dict[str, float]
) -> Iterator[Row]:
    """Every engine and number format of one network at one size; eager fp32 torch first."""
    architecture, options = NETWORKS[name]
    torch.manual_seed(0)
    generator = build_generator(architecture, options)
    x = np.random.default_rng(0).normal(0, 0.3, (1, 1, side, side)).astype(np.float32)
    gflop = flops(generator, side) / 1e9
    eager = 0.0
    for make, precision in engines(generator, device):
        try:
            engine = make()
            began = time.perf_counter()
            engine.run(x)
            first = time.perf_counter() - began
            again = second_start(make, x, engine)
            found = timed(lambda run=engine.run: run(x), seconds)  # type: ignore[misc]
        except PackageError as error:
            print(f"{name:22} {side:4} {precision}: {error}")
            continue
        median = float(np.median(found))
        eager = eager or median
        low, high = np.quantile(found, [0.1, 0.9])
        speed = gflop / median / peaks["bf16" if precision != "fp32" else "fp32"]
        yield Row(
            name, side, engine.name, precision, median, float(low), float(high), len(found),
            first, again, gflop, eager / median, speed,
        )  # fmt: skip


def engines(generator: Generator, device: str) -> Iterator[tuple[Callable[[], Engine], str]]:
    """What can be measured here, eager fp32 torch first."""
    features = cpu_features()
    yield (lambda: TorchEngine(generator, device, "fp32")), "fp32"
    if device != "cpu":
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
