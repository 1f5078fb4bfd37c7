"""Speed against quality: packages in every number format they are accepted for; table and plot.

    python training/front.py training/configs/ldct-denoise.yaml models/ldct-denoise FOLDER...
        [--side 512] [--json docs/images/front.json] [--svg docs/images/front.svg]

Quality is the gain in PSNR (body, -160 to 240 HU) on the test patients at a quarter of the dose,
mean over patients; time the median of single slices, measured in turns so that the load of the
machine falls on all alike.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.engines import Engine
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import Manifest
from dicomnode.imaging.package import read_package
from training.cases import padded
from training.config import Data, TrainConfig, load_config
from training.data import Sample, load_samples
from training.metrics import SOFT_TISSUE_WINDOW, Image, body_mask, interval, psnr
from training.split import read_split

DOSE = 0.25
ROUNDS = 9
WIDTH, HEIGHT, EDGE = 760, 440, 70
LABEL = {"fp32": -10, "bf16": 20, "int8": 34}
"""How far below its point a label stands, so that formats of nearly one quality stay legible."""


@dataclass(frozen=True, slots=True)
class Point:
    """One package in one number format."""

    package: str
    engine: str
    precision: str
    gain_db: float
    low_db: float
    high_db: float
    """95 % interval of the mean over patients."""
    seconds: float


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("packages", type=Path, nargs="+")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args(argv)
    config = load_config(args.config)
    torch.set_num_threads(2)
    engines = {}
    for path in args.packages:
        package = read_package(path)
        for precision in ("fp32", "bf16", "int8"):
            model = load_model(package, precision=precision)
            if model.precision == precision:
                engines[path.name, precision] = (model.engine, package.manifest)
    seconds = in_turns([engine for engine, _ in engines.values()], args.side)
    samples = held_out(config)
    points = []
    for ((name, precision), (engine, manifest)), time_s in zip(
        engines.items(), seconds, strict=True
    ):
        gain = interval(gains(engine, manifest, samples))
        points.append(Point(name, engine.name, precision, *gain, time_s))
        print(
            f"{name:20} {engine.name:18} {precision:4} {gain[0]:6.2f} dB "
            f"[{gain[1]:.2f}, {gain[2]:.2f}] {time_s:7.3f} s",
            flush=True,
        )
    machine = f"{platform.machine()}, 2 threads, {time.strftime('%Y-%m-%d')}"
    if args.json:
        data = {"machine": machine, "points": [asdict(point) for point in points]}
        args.json.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    if args.svg:
        args.svg.write_text(plot(points, machine), "utf-8")


def held_out(config: TrainConfig) -> list[Sample]:
    """The slices of the test patients.

    Raises:
        ConfigError: the run is not one of lower doses.
    """
    if not isinstance(config.data, Data):
        raise ConfigError("data.kind: this judges low_dose runs")
    samples, _ = load_samples(config.data, config.low_dose, config.seed, config.out / "cache")
    patients = read_split(Path(config.data.split))["test"]
    return [sample for sample in samples if sample.patient in patients]


def gains(engine: Engine, manifest: Manifest, samples: Sequence[Sample]) -> list[float]:
    """Gain in PSNR, dB, of each patient: the mean over the slices."""
    scale = manifest.input.intensity
    if not isinstance(scale, Window):
        raise ConfigError(f"{manifest.name}: want an intensity window")
    by_patient: dict[str, list[float]] = {}
    for sample in samples:
        low = sample.at_dose(DOSE, 0)
        given = padded(scale.to_network(low)[None, None], manifest)
        change = engine.run(given)[0, 0, : low.shape[0], : low.shape[1]]
        result = low + change * np.float32(scale.unit_per_network)
        by_patient.setdefault(sample.patient, []).append(_gain(result, low, sample.hu))
    return [float(np.mean(found)) for found in by_patient.values()]


def _gain(result: Image, low: Image, truth: Image) -> float:
    body = body_mask(truth)
    before = psnr(low, truth, body, SOFT_TISSUE_WINDOW)
    return psnr(result, truth, body, SOFT_TISSUE_WINDOW) - before


def in_turns(engines: Sequence[Engine], side: int) -> list[float]:
    """Median seconds of one slice of each engine; one slice of each in every round."""
    x = np.random.default_rng(0).normal(-0.5, 0.02, (1, 1, side, side)).astype(np.float32)
    found = np.zeros((ROUNDS + 1, len(engines)))
    for row in found:
        for place, engine in enumerate(engines):
            began = time.perf_counter()
            engine.run(x)
            row[place] = time.perf_counter() - began
    return [float(median) for median in np.median(found[1:], axis=0)]  # the first compiles


def plot(points: Sequence[Point], machine: str) -> str:
    """The points as SVG: seconds per slice to the right (log), gain upwards."""
    across = _scale([np.log10(point.seconds) for point in points], EDGE, WIDTH - 180)
    up = _scale([point.gain_db for point in points], HEIGHT - EDGE - 20, 30)
    colour = {"fp32": "#1b4965", "bf16": "#ca6702", "int8": "#9b2226"}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{EDGE - 20} 20V{HEIGHT - EDGE + 20}H{WIDTH - 20}" fill="none" stroke="#444"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">seconds per slice of 512 x '
        f"512 ({machine})</text>",
        f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" '
        'text-anchor="middle">gain in PSNR on test patients, dB</text>',
    ]
    for point in points:
        x, y = across(float(np.log10(point.seconds))), up(point.gain_db)
        below = y + LABEL[point.precision]
        words = f"{point.package} {point.precision}: {point.seconds:.3f} s, {point.gain_db:.2f} dB"
        lines += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour[point.precision]}">'
            f"<title>{words}</title></circle>",
            f'<text x="{x - 5:.1f}" y="{below:.1f}" fill="{colour[point.precision]}">'
            f"{point.package} {point.precision}</text>",
        ]
    gain = [point.gain_db for point in points]
    for value in np.arange(np.floor(2 * min(gain)) / 2, max(gain) + 0.5, 0.5):
        if 20 <= up(value) <= HEIGHT - EDGE + 20:
            lines.append(f'<text x="{EDGE - 48}" y="{up(value) + 4:.1f}">{value:.1f}</text>')
    for second in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        x = across(float(np.log10(second)))
        if EDGE - 20 <= x <= WIDTH - 40:
            at = f'x="{x:.1f}" y="{HEIGHT - EDGE + 38}"'
            lines.append(f'<text {at} text-anchor="middle">{second:g}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DicomNodeError as error:
        raise SystemExit(str(error)) from None
