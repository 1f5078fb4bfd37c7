"""A folder of DICOM without a network: which series are there, what would become of them, `run`."""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from dicomnode.config import NodeConfig, Route
from dicomnode.errors import PackageError, SeriesRefused
from dicomnode.imaging.marks import is_synthetic
from dicomnode.imaging.package import ModelPackage, read_package
from dicomnode.imaging.volume import Volume
from dicomnode.routing import Decision, decide, keywords_of
from dicomnode.series import ARRIVAL_KEYWORDS, common_header, missing_slices, plane_of, read_headers
from dicomnode.worker import Order, Outcome, load_models, translate


@dataclass(frozen=True, slots=True)
class Explained:
    """What the configuration makes of one series found in files."""

    series_uid: str
    instances: int
    missing: int
    """Slices that are missing between those that are there."""
    decisions: list[Decision]


def find_series(paths: Iterable[Path]) -> tuple[dict[str, list[Path]], int]:
    """Files by SeriesInstanceUID, folders searched to any depth, and how many are no DICOM."""
    found: dict[str, list[Path]] = defaultdict(list)
    others = 0
    for path in _files(paths):
        try:
            header = dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
            uid = str(header.get("SeriesInstanceUID") or "")
        except (InvalidDicomError, EOFError, ValueError, KeyError, OSError):
            uid = ""
        if uid:
            found[uid].append(path)
        else:
            others += 1
    return dict(found), others


def explain(paths: Iterable[Path], config: NodeConfig) -> tuple[list[Explained], int]:
    """Per series which routes match, and of the others why not; runs nothing.

    Calling and called AE title are not in files: routes that ask for them do not match here.
    """
    series, others = find_series(paths)
    return [_explain(uid, files, config) for uid, files in sorted(series.items())], others


def _explain(series_uid: str, files: Sequence[Path], config: NodeConfig) -> Explained:
    keywords = sorted({*keywords_of(config.routes), *ARRIVAL_KEYWORDS})
    headers = read_headers(files, keywords)
    facts: dict[str, str | float] = {"Instances": float(len(files))}
    header = common_header(headers, keywords, facts)
    decisions = decide(header, config.routes, any(map(is_synthetic, headers)))
    return Explained(series_uid, len(files), missing_slices(map(plane_of, headers)), decisions)


def run(paths: Iterable[Path], model: str, out: Path, config: NodeConfig) -> dict[str, Outcome]:
    """Translate every series found with one model; results go to ``out/<derived series UID>/``.

    Returns:
        What became of each series, by its SeriesInstanceUID.

    Raises:
        PackageError: the model cannot be used.
    """
    package = read_package(config.models_dir / model)
    models, failures, _ = load_models({model: package}, config.device, 0)
    if failures:
        raise PackageError(failures[model])
    route = Route(name="offline", match={}, model=model, send_to=(), qa="flag")
    series, _ = find_series(paths)
    out.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    outcomes = {}
    for uid, files in sorted(series.items()):
        headers = read_headers(files, keywords_of(()))
        if any(map(is_synthetic, headers)):
            refusal = SeriesRefused("ALREADY_SYNTHETIC", "the series is synthetic", "send a source")
            outcomes[uid] = Outcome(refusal=refusal.code, detail=refusal.message)
        else:
            order = Order.of(route, tuple(files), out, now)
            outcomes[uid] = translate(order, models, failures)
    return outcomes


def bench(package: ModelPackage, device: str, slices: int = 8) -> tuple[str, float, float]:
    """Seconds per 512x512 slice of a model: the device used, the median and the slowest.

    Raises:
        PackageError: the model cannot be used on `device`.
    """
    from dicomnode.imaging.inference import predict

    models, failures, used = load_models({package.name: package}, device, 0)
    if failures:
        raise PackageError(failures[package.name])
    rng = np.random.default_rng(1)
    seconds = []
    for _ in range(slices):
        voxels = rng.normal(40, 40, (1, 512, 512)).astype(np.float32)
        at, axes = np.zeros((1, 3)), np.array([1.0, 0, 0, 0, 1, 0])
        plane = Volume(voxels, package.manifest.input.unit, at, axes, (2.5, 0.7, 0.7), "", None)
        began = time.perf_counter()
        predict(models[package.name], plane)
        seconds.append(time.perf_counter() - began)
    return used, float(np.median(seconds)), max(seconds)


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file())
        else:
            yield path
