"""QA: what is outside a model's bounds is refused by name; what it made is measured in words."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset

from dicomnode.errors import PackageError, SeriesRefused
from dicomnode.imaging.intensity import Unscaled, Window
from dicomnode.imaging.manifest import Bounds, Range
from dicomnode.imaging.package import ModelPackage, read_package
from dicomnode.imaging.volume import Volume, volume_from_datasets
from dicomnode.qa import (
    Finding,
    assess,
    check_bounds,
    check_limits,
    findings_as_data,
    observations,
)
from tests.factories import ct_series, pet_series


@pytest.fixture(scope="module")
def package(models_dir: Path) -> ModelPackage:
    return read_package(models_dir / "identity")


def _with(package: ModelPackage, **manifest: Any) -> ModelPackage:
    changed = dataclasses.replace(package.manifest, **manifest)
    return dataclasses.replace(package, manifest=changed)


def _bounded(package: ModelPackage, **bounds: Any) -> ModelPackage:
    return _with(package, bounds=Bounds(("CT",), **bounds))


def _series(**options: Any) -> tuple[Volume, list[Dataset]]:
    return volume_from_datasets(ct_series(5, 16, 20, **options))


def _body(hu: float = 40.0, slices: int = 2) -> Volume:
    """A volume of 10 x 10 pixels per slice, half body and half air."""
    volume, _ = volume_from_datasets(ct_series(slices, 10, 10))
    voxels = np.full((slices, 10, 10), -1000, np.float32)
    voxels[:, :5] = hu
    return volume.with_voxels(voxels, "HU")


def test_a_series_in_bounds_passes(package: ModelPackage) -> None:
    within = _bounded(
        package,
        pixel_spacing_mm=Range(0.6, 0.703125),
        slice_thickness_mm=Range(2.5, 2.5),
        rows=Range(16, 16),
        columns=Range(20, 20),
        slices=Range(5, 5),
        hu_range=Range(-1024, 3071),
    )
    check_bounds(*_series(), within)


OUTSIDE: list[tuple[dict[str, Any], str]] = [
    ({"slices": Range(6, None)}, "slices is 5, allowed 6 to any"),
    ({"rows": Range(None, 15)}, "rows is 16, allowed any to 15"),
    ({"columns": Range(21, 512)}, "columns is 20, allowed 21 to 512"),
    ({"pixel_spacing_mm": Range(0.65, 1)}, "column spacing in mm is 0.6, allowed 0.65 to 1"),
    ({"pixel_spacing_mm": Range(0.5, 0.7)}, "row spacing in mm is 0.703125, allowed 0.5 to 0.7"),
    ({"slice_thickness_mm": Range(None, 2)}, "SliceThickness in mm is 2.5, allowed any to 2"),
    ({"hu_range": Range(-500, None)}, "a voxel has -10"),
    ({"exclude": {"ConvolutionKernel": ("b3*",)}}, "ConvolutionKernel is excluded (b3*)"),
    ({"exclude": {"ImageType": ("AXIAL",)}}, "ImageType is excluded (AXIAL)"),
    (
        {"require": {"ConvolutionKernel": ("b5*", "b6*")}},
        "ConvolutionKernel is not one of b5*, b6*",
    ),
    ({"require": {"BodyPartExamined": ("LEG",)}}, "BodyPartExamined is not one of LEG"),
]


@pytest.mark.parametrize(("bounds", "what"), OUTSIDE, ids=[what for _, what in OUTSIDE])
def test_a_series_out_of_bounds_is_refused_by_the_bound(
    package: ModelPackage, bounds: dict[str, Any], what: str
) -> None:
    with pytest.raises(SeriesRefused) as refusal:
        check_bounds(*_series(), _bounded(package, **bounds))
    assert refusal.value.code == "OUT_OF_BOUNDS"
    assert f"identity 1.0.0 was not accepted for this series: {what}" in refusal.value.message


def test_another_modality_is_out_of_bounds(package: ModelPackage) -> None:
    volume, datasets = _series()
    datasets[0].Modality = "PT"
    with pytest.raises(SeriesRefused, match="Modality is PT"):
        check_bounds(volume, datasets, package)


def test_one_excluded_instance_refuses_the_series(package: ModelPackage) -> None:
    volume, datasets = _series()
    datasets[3].ConvolutionKernel = "B70f"
    excluded = _bounded(package, exclude={"ConvolutionKernel": ("B70*",)})
    with pytest.raises(SeriesRefused, match="ConvolutionKernel is excluded"):
        check_bounds(volume, datasets, excluded)


def test_one_instance_without_a_required_value_refuses_the_series(package: ModelPackage) -> None:
    volume, datasets = _series()
    required = _bounded(package, require={"BodyPartExamined": ("*LEG*", "EXTREMITY")})
    for dataset in datasets:
        dataset.BodyPartExamined = "LOWER LEG"
    check_bounds(volume, datasets, required)
    del datasets[3].BodyPartExamined
    with pytest.raises(SeriesRefused, match="BodyPartExamined is not one of"):
        check_bounds(volume, datasets, required)


@pytest.mark.parametrize(
    ("series", "what"),
    [
        ({}, None),
        ({"tracer": {"RadiopharmaceuticalStartTime": "100200.00"}}, "acquired 18 minutes"),
        ({"AcquisitionTime": "103500"}, "acquired 75 minutes"),
        ({"tracer": {"RadiopharmaceuticalStartTime": None}}, "not known"),
    ],
)
def test_pet_of_another_time_after_injection_is_out_of_bounds(
    package: ModelPackage, series: dict[str, Any], what: str | None
) -> None:
    volume, datasets = volume_from_datasets(pet_series(3, **series), "BQML")
    allowed = Bounds(("PT",), minutes_after_injection=Range(50, 70))
    if what is None:
        check_bounds(volume, datasets, _with(package, bounds=allowed))
        return
    with pytest.raises(SeriesRefused, match=what) as refusal:
        check_bounds(volume, datasets, _with(package, bounds=allowed))
    assert refusal.value.code == "OUT_OF_BOUNDS"


def test_an_absent_thickness_is_not_out_of_bounds(package: ModelPackage) -> None:
    volume, datasets = _series(SliceThickness=None)
    check_bounds(volume, datasets, _bounded(package, slice_thickness_mm=Range(None, 1)))


def test_padding_does_not_count_against_the_range(package: ModelPackage) -> None:
    bounded = _bounded(package, hu_range=Range(-1023, None))
    check_bounds(*_series(padding=0), bounded)
    volume, datasets = _series(padding=0)
    everything = dataclasses.replace(volume, padding=np.ones(volume.voxels.shape, np.bool_))
    with pytest.raises(SeriesRefused, match="every voxel is padding"):
        check_bounds(everything, datasets, bounded)


# what came out


def _assessed(
    package: ModelPackage, source: Volume, voxels: NDArray[np.floating[Any]]
) -> dict[str, Finding]:
    prediction = source.with_voxels(voxels.astype(np.float32), "HU")
    return {finding.name: finding for finding in assess(source, prediction, package)}


def test_an_unchanged_volume_has_nothing_to_complain_of(package: ModelPackage) -> None:
    limited = _with(package, qa={"max_mean_change": 0.0, "max_abs_change_p999": 0.0})
    findings = _assessed(limited, _body(), _body().voxels)
    assert all(finding.ok for finding in findings.values())
    assert findings["mean_change"].value == 0
    assert findings["finite"].value == 1


@pytest.mark.parametrize(("limit", "ok"), [(10.0, True), (9.9, False)])
def test_the_mean_change_of_the_body_is_held_to_its_limit(
    package: ModelPackage, limit: float, ok: bool
) -> None:
    source = _body()
    moved = source.voxels - np.where(source.voxels > -500, 10, 500)  # air does not count
    finding = _assessed(_with(package, qa={"max_mean_change": limit}), source, moved)["mean_change"]
    assert (finding.value, finding.limit, finding.ok) == (10.0, limit, ok)
    assert str(finding) == f"mean_change 10 (limit {limit:g}){'' if ok else ' FAILED'}"


def test_a_change_that_cancels_in_the_mean_is_seen(package: ModelPackage) -> None:
    source = _body()
    checkered = source.voxels + np.where(np.indices(source.voxels.shape).sum(0) % 2, 300, -300)
    limited = _with(package, qa={"max_mean_change": 1.0, "max_abs_change_p999": 200.0})
    findings = _assessed(limited, source, checkered)
    assert findings["mean_change"].ok
    assert (findings["abs_change_p999"].value, findings["abs_change_p999"].ok) == (300.0, False)


def test_what_reaches_the_end_of_the_window_counts_as_clipped(package: ModelPackage) -> None:
    source = _body()
    voxels = source.voxels.copy()
    voxels[:, 0] = 3071  # a fifth of the body
    output = dataclasses.replace(package.manifest.output, intensity=Window(-1024, 3071))
    limited = _with(package, output=output, qa={"max_clipped_fraction": 0.1})
    finding = _assessed(limited, source, voxels)["clipped_fraction"]
    assert (finding.value, finding.ok) == (pytest.approx(0.2), False)


def test_an_output_without_a_window_is_never_clipped(package: ModelPackage) -> None:
    output = dataclasses.replace(package.manifest.output, intensity=Unscaled())
    source = _body()
    findings = _assessed(_with(package, output=output), source, source.voxels * 0 + 1e6)
    assert findings["clipped_fraction"].value == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_no_number_fails(package: ModelPackage, bad: float) -> None:
    source = _body()
    voxels = source.voxels.copy()
    voxels[1, 9, 9] = bad  # in the air, where nothing else looks
    findings = _assessed(package, source, voxels)
    assert not findings["finite"].ok


def test_a_limit_does_not_pass_what_cannot_be_measured(package: ModelPackage) -> None:
    source = _body()
    voxels = source.voxels.copy()
    voxels[0, 0, 0] = np.nan
    findings = _assessed(_with(package, qa={"max_mean_change": 1e9}), source, voxels)
    assert not findings["mean_change"].ok


def test_findings_are_json_that_every_program_reads(package: ModelPackage) -> None:
    source = _body()
    findings = _assessed(package, source, source.voxels * np.nan)
    data = findings_as_data(list(findings.values()))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["mean_change"] == {"name": "mean_change", "value": None, "limit": None, "ok": True}


def test_a_limit_on_what_is_not_measured_is_refused(package: ModelPackage) -> None:
    check_limits(_with(package, qa={"max_mean_change": 1.0, "max_clipped_fraction": 0.1}))
    with pytest.raises(PackageError, match=r"manifest.qa: nothing measures max_mean_chnge;"):
        check_limits(_with(package, qa={"max_mean_chnge": 1.0}))


def test_a_change_between_two_units_is_neither_measured_nor_limited(package: ModelPackage) -> None:
    made = dataclasses.replace(package.manifest.output, unit="AU", residual=False)
    other = _with(package, output=made, task="ce_ct", qa={"max_clipped_fraction": 0.5})
    source = _body()
    assert set(_assessed(other, source, source.voxels)) == {"finite", "clipped_fraction"}
    with pytest.raises(PackageError, match="nothing measures max_mean_change"):
        check_limits(_with(other, qa={"max_mean_change": 1.0}))


def test_what_a_reader_should_know_of_the_source_is_told_and_nothing_else() -> None:
    straight, datasets = _series()
    assert observations(straight, 0) == []
    for index, dataset in enumerate(datasets):
        dataset.ImagePositionPatient = [0, 3.0 * index, 2.5 * index]
    tilted, _ = volume_from_datasets(datasets)
    tilt, ignored = sorted(observations(tilted, 2), key=lambda finding: -finding.value)
    assert (tilt.name, round(tilt.value, 1), tilt.ok) == ("tilt_degrees", 50.2, True)
    assert (ignored.name, ignored.value, ignored.limit) == ("ignored_instances", 2, None)
