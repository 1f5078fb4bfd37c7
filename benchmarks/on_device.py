"""What one network reaches on a GPU: slices a second, share of the matrix product, host to host.

    python -m benchmarks.on_device [--device cuda] [--network resnet_9] [--side 512]
        [--precision bf16] [--batches 1 2 4 8 16 32] [--slices 400] [--seconds 2] [--compile]
        [--json FILE]

Every figure is a median with its spread (10th to 90th percentile), in slices a second; `of product`
is the arithmetic of the convolutions a second as a share of the best matrix product of the same
run, in the same number format. Per size of batch:

    kernels   the network as PyTorch launches it, on the device alone, nothing copied
    compiled  the same after torch.compile, which the node does not use; with --compile
    engine    TorchEngine without CUDA graphs, copies to the device and back included
    graphs    TorchEngine as the node has it

`N slices` is a series of generated CT of 512 x 512, host to host: from stored values in the host's
memory to results there, as a job has it (imaging.streaming); once with the network, and once with
one that returns its input, which shows what the host alone takes. Weights are random. At the end,
the kernels that took most of the time. On a CPU the batch is always one, and there are no graphs.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.inference import NETWORKS, flops, product, timed
from benchmarks.peers import machine
from benchmarks.time_to_result import random_package, series
from dicomnode.imaging.decoding import Decoding
from dicomnode.imaging.engines import TorchEngine, cuda
from dicomnode.imaging.engines.subpixel import without_transposed
from dicomnode.imaging.inference import Model, load_model
from dicomnode.imaging.layout import layout_of
from dicomnode.imaging.networks import Generator, build_generator
from dicomnode.imaging.package import read_package
from dicomnode.imaging.pending import in_order
from dicomnode.imaging.planes import SourcePlanes
from dicomnode.imaging.streaming import Predicting, Stages
from dicomnode.part10 import read_instances
from tests.peers import identity_package

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCT_SIDES = {"cpu": (1024, 4096), "cuda": (4096, 8192)}
BATCHES_PER_TURN = 8
"""That a figure of an engine is a mean of: they overlap."""


@dataclass(frozen=True)
class Figure:
    """Slices a second."""

    what: str
    batch: int
    median: float
    low: float
    high: float
    of_product: float
    remark: str = ""


def main() -> None:
    """Measure, print line by line, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--network", default="resnet_9", choices=list(NETWORKS))
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on each figure")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    print(f"{machine()}, torch {torch.__version__}, {where}")
    bench = Bench(args.device, args.network, args.side, args.precision, args.seconds)
    print(f"matrix product, {args.precision}: {bench.product / 1e3:.1f} TFLOP/s")
    print(f"{args.network} at {args.side}: {bench.gflop:.0f} GFLOP a slice")
    figures = list(bench.all(args.batches, args.slices, compiled=args.compile))
    print(bench.kernels(args.batches[-1]))
    if args.json:
        found = {"device": where, "product": bench.product, "gflop": bench.gflop}
        found["figures"] = [asdict(figure) for figure in figures]
        args.json.write_text(json.dumps(found, indent=1), "utf-8")


class Bench:
    """One network at one size in one number format on one device."""

    def __init__(
        self, device: str, network: str, side: int, precision: str, seconds: float
    ) -> None:
        self.device, self.name, self.side, self.seconds = device, network, side, seconds
        self.precision: Any = precision
        self.kind = device.partition(":")[0]
        torch.manual_seed(0)
        architecture, options = NETWORKS[network]
        self.network = build_generator(architecture, options).eval()
        self.gflop = flops(self.network, side) / 1e9
        self.product = max(
            product(n, DTYPES[precision], device, seconds / 4, as_convolution=as_convolution)
            for n in PRODUCT_SIDES[self.kind]
            for as_convolution in (False, True)
        )

    def all(self, batches: list[int], slices: int, *, compiled: bool) -> Iterator[Figure]:
        """Every figure, printed as it comes."""
        for batch in batches:
            yield self.told("kernels", batch, self.on_device(batch, self.moved()))
            if compiled:
                made = torch.compile(self.moved(), dynamic=False)
                yield self.told("compiled", batch, self.on_device(batch, made))
            for graphs in (False, True) if self.kind == "cuda" else (False,):
                engine = TorchEngine(
                    self.network, self.device, self.precision, graphs=graphs, at_once=batch
                )
                found = self.through(engine, batch)
                what = "graphs" if graphs else "engine"
                yield self.told(what, batch, found, "; ".join(engine.remarks))
        with tempfile.TemporaryDirectory() as work:
            for name in ("identity", self.name):
                model = self.model(name, Path(work))
                at_once = model.engine.batch(512, 512)
                found = self.host_to_host(model, slices, Path(work))
                yield self.told(f"{slices} slices, {name}", at_once, found, model.words)

    def told(self, what: str, batch: int, seconds: list[float], remark: str = "") -> Figure:
        """Seconds per slice -> slices per second, printed."""
        low, median, high = np.quantile(1 / np.array(seconds), [0.1, 0.5, 0.9])
        share = 0.0 if what.endswith("identity") else float(median) * self.gflop / self.product
        figure = Figure(what, batch, float(median), float(low), float(high), share, remark)
        print(
            f"{what:24} batch {batch:3}  {median:9.2f} slices/s ({low:.2f} to {high:.2f})"
            f"  {share:5.0%} of product  {remark}",
            flush=True,
        )
        return figure

    def moved(self) -> Generator:
        """The network as `TorchEngine` has it on a device."""
        own = without_transposed(self.network).to(self.device)
        return own.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def on_device(self, batch: int, network: Callable[[Any], Any]) -> list[float]:
        """Seconds per slice of the network alone."""
        x = torch.rand(batch, self.network.slices, self.side, self.side, device=self.device)
        x = x.contiguous(memory_format=torch.channels_last)

        def run() -> None:
            network(x)
            if self.kind == "cuda":
                torch.cuda.synchronize()

        with torch.inference_mode(), self.numbers():
            run()
            run()
            return [seconds / batch for seconds in timed(run, self.seconds)]

    @contextlib.contextmanager
    def numbers(self) -> Iterator[None]:
        """As `TorchEngine` has them."""
        with contextlib.ExitStack() as stack:
            if self.kind == "cuda":
                stack.enter_context(cuda.same_kernels())
            if self.precision != "fp32":
                stack.enter_context(torch.autocast(self.kind, DTYPES[self.precision]))
            yield

    def through(self, engine: TorchEngine, batch: int) -> list[float]:
        """Seconds per slice of an engine that is fed batch after batch."""
        shape = (batch, self.network.slices, self.side, self.side)
        x = np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float32)

        def run() -> None:
            begun = (engine.start(x) for _ in range(BATCHES_PER_TURN))
            for _ in in_order(begun, engine.ahead):
                pass

        engine.run(x)
        return [seconds / batch / BATCHES_PER_TURN for seconds in timed(run, self.seconds)]

    def model(self, name: str, work: Path) -> Model:
        """A package with random weights, or the one that returns its input, loaded."""
        if name == "identity":
            return load_model(read_package(identity_package(work)), self.device)
        path = work / "network"
        random_package(path, *NETWORKS[name])
        return load_model(read_package(path), self.device, self.precision)

    def host_to_host(self, model: Model, slices: int, work: Path) -> list[float]:
        """Seconds per slice of whole series."""
        datasets = read_instances(series(slices, work / "in"))
        layout = layout_of(datasets, "HU", min_slices=1, allow_lossy=True)
        decoding = Decoding(layout.datasets, layout.calibration, lambda dataset: dataset)
        for index in range(slices):
            decoding.decode(index)
        source = SourcePlanes(layout, decoding)
        stages = Stages(lambda index: None, lambda: source)

        def run() -> None:
            for _ in Predicting(model, layout, decoding, stages).planes():
                pass

        if self.kind == "cuda":
            run()
        return [seconds / slices for seconds in timed(run, self.seconds)]

    def kernels(self, batch: int) -> str:
        """A table of what took most of the time on the device."""
        x = torch.rand(batch, self.network.slices, self.side, self.side, device=self.device)
        network, on_gpu = self.moved(), self.kind == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.inference_mode(), self.numbers():
            network(x)
            with profile(activities=kinds) as found:
                network(x)
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        return found.key_averages().table(sort_by=order, row_limit=15)


if __name__ == "__main__":
    main()
