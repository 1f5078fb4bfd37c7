"""Is the input in the model's bounds, and is its output plausible? Findings with their limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.multival import MultiValue

from dicomnode.errors import PackageError, SeriesRefused
from dicomnode.imaging.classifier import ClassifierPackage
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.layout import Layout
from dicomnode.imaging.manifest import Bounds, Range
from dicomnode.imaging.package import ModelPackage
from dicomnode.imaging.pixels import is_empty, numbers_of
from dicomnode.imaging.planes import Planes
from dicomnode.imaging.units import minutes_after_injection
from dicomnode.measuring import Change

Package = ModelPackage | ClassifierPackage
MEASURED = ("mean_change", "mean_abs_change", "abs_change_p999", "clipped_fraction")
"""What `assess` measures and a manifest may limit, as ``max_<name>``."""
_CHANGES = MEASURED[:3]
"""Of these there are none where the result has another unit than its source."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One measurement of a translated series and the limit it is held to."""

    name: str
    value: float
    limit: float | None
    """None: measured, not limited."""
    ok: bool

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" (limit {self.limit:g})"
        return f"{self.name} {self.value:.4g}{limit}{'' if self.ok else ' FAILED'}"


def check_bounds(source: Planes, datasets: Sequence[Dataset], package: ModelPackage) -> None:
    """Refuse a series outside what the model was accepted for.

    Args:
        source: the volume of `datasets`, in slice order.

    Raises:
        SeriesRefused: OUT_OF_BOUNDS, naming the bound and both values.
    """
    check_headers(datasets, package)
    ends = source.extremes()
    if ends is None:
        raise _outside(package, "every voxel is padding")
    check_values(np.array(ends), source.unit, package)


def check_headers(datasets: Sequence[Dataset], package: Package) -> None:
    """The part of `check_bounds` that headers decide, pixels not looked at.

    Args:
        datasets: the slices of one stack.

    Raises:
        SeriesRefused: OUT_OF_BOUNDS, naming the bound and both values; UNREADABLE: SliceThickness
            is no number.
    """
    bounds: Bounds = package.manifest.bounds
    first = datasets[0]
    if first.get("Modality") not in bounds.modality:
        raise _outside(package, f"Modality is {first.get('Modality')}, not {bounds.modality}")
    between = numbers_of(first, "PixelSpacing", 2, "NO_GEOMETRY")
    measured: dict[str, tuple[Range, float | None]] = {
        "slices": (bounds.slices, len(datasets)),
        "rows": (bounds.rows, first.Rows),
        "columns": (bounds.columns, first.Columns),
        "row spacing in mm": (bounds.pixel_spacing_mm, between[0]),
        "column spacing in mm": (bounds.pixel_spacing_mm, between[1]),
        "SliceThickness in mm": (bounds.slice_thickness_mm, _thickness(first)),
    }
    for what, (allowed, value) in measured.items():
        if value is not None and value not in allowed:
            raise _outside(package, f"{what} is {value:g}, allowed {_words(allowed)}")
    _check_excluded(datasets, bounds.exclude, package)
    _check_required(datasets, bounds.require, package)
    _check_injection(datasets, bounds.minutes_after_injection, package)


def _thickness(header: Dataset) -> float | None:
    """SliceThickness in mm; None: it is absent or empty."""
    if is_empty(header, "SliceThickness"):
        return None
    return numbers_of(header, "SliceThickness", 1, "UNREADABLE")[0]


def _check_excluded(
    datasets: Sequence[Dataset], excluded: Mapping[str, tuple[str, ...]], package: Package
) -> None:
    for keyword, patterns in excluded.items():
        if any(_matches(dataset, keyword, patterns) for dataset in datasets):
            raise _outside(package, f"{keyword} is excluded ({', '.join(patterns)})")


def _check_required(
    datasets: Sequence[Dataset], required: Mapping[str, tuple[str, ...]], package: Package
) -> None:
    for keyword, patterns in required.items():
        if not all(_matches(dataset, keyword, patterns) for dataset in datasets):
            raise _outside(package, f"{keyword} is not one of {', '.join(patterns)}")


def _check_injection(datasets: Sequence[Dataset], allowed: Range, package: Package) -> None:
    if allowed == Range():
        return
    try:
        times = minutes_after_injection(datasets)
    except SeriesRefused as error:
        raise _outside(package, f"the time after injection is not known ({error.code})") from error
    for minutes in times:
        if minutes not in allowed:
            what = f"acquired {minutes:.0f} minutes after injection, allowed {_words(allowed)}"
            raise _outside(package, what)


def _matches(dataset: Dataset, keyword: str, patterns: Sequence[str]) -> bool:
    """Whether a value of `keyword` is one of `patterns`; an absent one reads ``None``."""
    value = dataset.get(keyword)
    texts = value if isinstance(value, MultiValue) else [value]
    return any(fnmatchcase(str(text).upper(), p.upper()) for text in texts for p in patterns)


def check_values(voxels: NDArray[np.float32], unit: str, package: Package) -> None:
    """The part of `check_bounds` that looks at pixels.

    Args:
        voxels: any shape, not empty, float32, in `unit`; without padding.

    Raises:
        SeriesRefused: OUT_OF_BOUNDS, naming value and limits.
    """
    allowed = package.manifest.bounds.hu_range
    for value in (float(voxels.min()), float(voxels.max())):
        if value not in allowed:
            raise _outside(package, f"a voxel has {value:g} {unit}, {_words(allowed)}")


def assess(source: Planes, prediction: Planes, package: ModelPackage) -> list[Finding]:
    """Measure a prediction against its source; see `findings_of`."""
    change = change_of(source, package)
    for index in range(source.shape[0]):
        change.add(source.plane(index), source.padding_of(index), prediction.plane(index))
    return findings_of(change, package)


def change_of(source: Planes | Layout, package: ModelPackage) -> Change:
    """What is to be given each slice of `source` and its result, in order."""
    intensity = package.manifest.output.intensity
    ends = (-np.inf, np.inf)
    if isinstance(intensity, Window):
        ends = (intensity.low, intensity.high)
    return Change(source.unit, math.prod(source.shape), ends)


def findings_of(change: Change, package: ModelPackage) -> list[Finding]:
    """What was measured, and the limits it is held to.

    Limits come from ``qa`` of the manifest: ``max_mean_change`` (of the body, in the output's
    unit), ``max_mean_abs_change``, ``max_abs_change_p999`` and ``max_clipped_fraction``.
    A limit on what is not measured is a PackageError at load, so none is silently ignored.
    """
    measured, limits = change.measured(), package.manifest.qa
    findings = [Finding("finite", measured["finite"], 1.0, measured["finite"] == 1.0)]
    for name in _measured(package):
        limit = limits.get(f"max_{name}")
        value = measured[name]
        findings.append(Finding(name, value, limit, limit is None or value <= limit))
    return findings


def _measured(package: ModelPackage) -> tuple[str, ...]:
    manifest = package.manifest
    same_unit = manifest.input.unit == manifest.output.unit
    return tuple(name for name in MEASURED if same_unit or name not in _CHANGES)


def observations(source: Planes, ignored: int) -> list[Finding]:
    """What a reader should know of the source, and no limit holds; only what there is to tell.

    Args:
        ignored: instances of the series that are no slice of any stack.
    """
    told = {
        "left_out_slices": float(len(source.left_out)),
        "ignored_instances": float(ignored),
        "tilt_degrees": source.tilt_degrees if source.sheared else 0.0,
    }
    return [Finding(name, value, None, ok=True) for name, value in told.items() if value]


def findings_as_data(findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings by name, fit for JSON: a value that is not finite becomes None."""
    data = {finding.name: asdict(finding) for finding in findings}
    for finding in data.values():
        finding["value"] = finding["value"] if math.isfinite(finding["value"]) else None
    return data


def _outside(package: Package, what: str) -> SeriesRefused:
    return SeriesRefused(
        "OUT_OF_BOUNDS",
        f"model {package.name} {package.version} was not accepted for this series: {what}",
        "route it to another model, or not at all",
    )


def _words(allowed: Range) -> str:
    low = "any" if allowed.min is None else f"{allowed.min:g}"
    high = "any" if allowed.max is None else f"{allowed.max:g}"
    return f"{low} to {high}"


def check_limits(package: ModelPackage) -> None:
    """A limit on something that is not measured would never be held: refuse it.

    Raises:
        PackageError: the manifest's ``qa`` names an unknown limit, or one of a change between two
            units.
    """
    measured = {f"max_{name}" for name in _measured(package)}
    if unknown := sorted(set(package.manifest.qa) - measured):
        raise PackageError(
            f"{package.name}: manifest.qa: nothing measures {', '.join(unknown)}; "
            f"known: {', '.join(sorted(measured))}"
        )
