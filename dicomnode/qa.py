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
from dicomnode.imaging.intensity import Window
from dicomnode.imaging.manifest import Bounds, Range
from dicomnode.imaging.package import ModelPackage
from dicomnode.imaging.volume import Volume

_BODY_HU = -500.0
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


def check_bounds(source: Volume, datasets: Sequence[Dataset], package: ModelPackage) -> None:
    """Refuse a series outside what the model was accepted for.

    Args:
        source: the volume of `datasets`, in slice order.

    Raises:
        SeriesRefused: OUT_OF_BOUNDS, naming the bound and both values.
    """
    bounds: Bounds = package.manifest.bounds
    slices, rows, columns = source.voxels.shape
    first = datasets[0]
    if first.get("Modality") not in bounds.modality:
        raise _outside(package, f"Modality is {first.get('Modality')}, not {bounds.modality}")
    thickness = first.get("SliceThickness")
    measured: dict[str, tuple[Range, float | None]] = {
        "slices": (bounds.slices, slices),
        "rows": (bounds.rows, rows),
        "columns": (bounds.columns, columns),
        "row spacing in mm": (bounds.pixel_spacing_mm, source.spacing_mm[1]),
        "column spacing in mm": (bounds.pixel_spacing_mm, source.spacing_mm[2]),
        "SliceThickness in mm": (
            bounds.slice_thickness_mm,
            None if thickness in (None, "") else float(thickness),
        ),
    }
    for what, (allowed, value) in measured.items():
        if value is not None and value not in allowed:
            raise _outside(package, f"{what} is {value:g}, allowed {_words(allowed)}")
    _check_excluded(datasets, bounds.exclude, package)
    _check_required(datasets, bounds.require, package)
    _check_range(source, bounds.hu_range, package)


def _check_excluded(
    datasets: Sequence[Dataset], excluded: Mapping[str, tuple[str, ...]], package: ModelPackage
) -> None:
    for keyword, patterns in excluded.items():
        if any(_matches(dataset, keyword, patterns) for dataset in datasets):
            raise _outside(package, f"{keyword} is excluded ({', '.join(patterns)})")


def _check_required(
    datasets: Sequence[Dataset], required: Mapping[str, tuple[str, ...]], package: ModelPackage
) -> None:
    for keyword, patterns in required.items():
        if not all(_matches(dataset, keyword, patterns) for dataset in datasets):
            raise _outside(package, f"{keyword} is not one of {', '.join(patterns)}")


def _matches(dataset: Dataset, keyword: str, patterns: Sequence[str]) -> bool:
    """Whether a value of `keyword` is one of `patterns`; an absent one reads ``None``."""
    value = dataset.get(keyword)
    texts = value if isinstance(value, MultiValue) else [value]
    return any(fnmatchcase(str(text).upper(), p.upper()) for text in texts for p in patterns)


def _check_range(source: Volume, allowed: Range, package: ModelPackage) -> None:
    voxels = source.voxels if source.padding is None else source.voxels[~source.padding]
    if voxels.size == 0:
        raise _outside(package, "every voxel is padding")
    for value in (float(voxels.min()), float(voxels.max())):
        if value not in allowed:
            raise _outside(package, f"a voxel has {value:g} {source.unit}, {_words(allowed)}")


def assess(source: Volume, prediction: Volume, package: ModelPackage) -> list[Finding]:
    """Measure a prediction against its source.

    Limits come from ``qa`` of the manifest: ``max_mean_change`` (of the body, in the output's
    unit), ``max_mean_abs_change``, ``max_abs_change_p999`` and ``max_clipped_fraction``.
    A limit on what is not measured is a PackageError at load, so none is silently ignored.
    """
    limits = package.manifest.qa
    known = _body(source)
    change = prediction.voxels[known] - source.voxels[known]
    intensity = package.manifest.output.intensity
    ends = (-np.inf, np.inf)
    if isinstance(intensity, Window):
        ends = (intensity.low, intensity.high)
    clipped = (prediction.voxels[known] <= ends[0]) | (prediction.voxels[known] >= ends[1])
    measured = {
        "finite": float(np.isfinite(prediction.voxels).all()),
        "mean_change": float(abs(change.mean())) if change.size else 0.0,
        "mean_abs_change": float(np.abs(change).mean()) if change.size else 0.0,
        "abs_change_p999": float(np.percentile(np.abs(change), 99.9)) if change.size else 0.0,
        "clipped_fraction": float(clipped.mean()) if change.size else 0.0,
    }
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


def observations(source: Volume, ignored: int) -> list[Finding]:
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


def _body(source: Volume) -> NDArray[np.bool_]:
    """Voxels that are patient rather than air or padding, (slices, rows, columns)."""
    inside = source.voxels > _BODY_HU if source.unit == "HU" else source.voxels > 0
    return inside if source.padding is None else inside & ~source.padding


def _outside(package: ModelPackage, what: str) -> SeriesRefused:
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
