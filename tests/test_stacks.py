"""A series is taken apart into its real stacks, and the rule that did it is told."""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.frames import slices_of
from dicomnode.imaging.stacks import Split, StackOfImages, split_stacks
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import (
    CORONAL,
    TILTED,
    changed,
    ct_series,
    enhanced,
    localizer,
    mr_series,
    not_an_image,
    pet_series,
)

ROOT = Path(__file__).parents[1]
UNITS: dict[str, Any] = {"CT": "HU", "MR": "AU", "PT": "SUV"}


def together(*parts: list[Dataset], renumber: bool = True) -> list[Dataset]:
    """Several series under one SeriesInstanceUID, numbered through, one after the other."""
    first = parts[0][0]
    made = []
    for part in parts:
        for ds in part:
            number = {"InstanceNumber": len(made) + 1} if renumber else {}
            made += changed(
                [ds],
                StudyInstanceUID=first.StudyInstanceUID,
                SeriesInstanceUID=first.SeriesInstanceUID,
                FrameOfReferenceUID=first.FrameOfReferenceUID,
                SOPInstanceUID=f"1.2.3.{len(made) + 1}",
                **number,
            )
    return made


def rules(split: Split) -> list[tuple[int, str]]:
    return [(len(stack.datasets), stack.rule) for stack in split.stacks]


def codes(split: Split) -> list[str | None]:
    return [stack.refusal.code if stack.refusal else None for stack in split.stacks]


def members(split: Split) -> set[tuple[str, ...]]:
    """SOP Instance UIDs of each stack in slice order."""
    return {tuple(str(ds.SOPInstanceUID) for ds in stack.datasets) for stack in split.stacks}


def test_an_ordinary_series_is_one_stack_without_a_rule() -> None:
    series = ct_series(5)
    (stack,) = split_stacks(series[::-1]).stacks
    assert stack.datasets == series
    assert (stack.rule, stack.modality, stack.refusal, stack.sheared) == ("", "CT", None, False)
    assert abs(stack.step_mm - 2.5) < 1e-6


def kinds(**attributes: tuple[Any, Any]) -> list[Dataset]:
    one = mr_series(3, **{keyword: pair[0] for keyword, pair in attributes.items()})
    return together(one, mr_series(4, seed=2, **{k: pair[1] for k, pair in attributes.items()}))


@pytest.mark.parametrize(
    ("attributes", "rule"),
    [
        ({"EchoTime": ("30", "80")}, "EchoTime 80"),
        ({"EchoNumbers": (1, 2)}, "EchoNumbers 2"),
        ({"ConvolutionKernel": ("B30f", "B70f")}, "ConvolutionKernel B70f"),
        ({"ImageType": (["ORIGINAL", "PRIMARY", "M"], ["DERIVED", "PRIMARY", "P"])}, "ImageType P"),
        ({"orientation": ((1, 0, 0, 0, 1, 0), CORONAL)}, "orientation 2"),
        ({"pixel_spacing": (("1", "1"), ("2", "2"))}, "pixel spacing 2"),
    ],
)
def test_images_of_another_kind_are_stacks_of_their_own(
    attributes: dict[str, Any], rule: str
) -> None:
    split = split_stacks(kinds(**attributes))
    assert [count for count, _ in rules(split)] == [4, 3]
    assert split.stacks[0].rule == rule
    assert codes(split) == [None, None]


def test_kinds_are_told_apart_even_where_no_position_repeats() -> None:
    low = ct_series(4, ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "ADD"])
    high = ct_series(4, seed=2, origin=(-120.5, -90.25, 330.0), step_mm=7)
    split = split_stacks(together(low, high))
    assert {rule for _, rule in rules(split)} == {"ImageType AXIAL", "ImageType AXIAL\\ADD"}


def test_an_acquisition_number_per_slice_does_not_split() -> None:
    series = ct_series(5)
    numbered = [changed([ds], AcquisitionNumber=k)[0] for k, ds in enumerate(series)]
    assert rules(split_stacks(numbered)) == [(5, "")]


@pytest.mark.parametrize(
    ("keyword", "values", "shown"),
    [
        ("AcquisitionNumber", (1, 2), "AcquisitionNumber 2"),
        ("TemporalPositionIdentifier", (1, 2), "TemporalPositionIdentifier 2"),
        ("NominalPercentageOfCardiacPhase", (40.0, 75.0), "cardiac phase 75"),
        ("FrameReferenceTime", ("0", "60000"), "FrameReferenceTime 60000"),
        ("KVP", ("80", "140"), "KVP 140"),
        ("AcquisitionTime", ("102000", "102500"), "AcquisitionTime 102500"),
        ("DiffusionBValue", (0.0, 1000.0), "diffusion 1000"),
    ],
)
def test_slices_at_the_same_position_are_told_apart_by_their_moment(
    keyword: str, values: tuple[Any, Any], shown: str
) -> None:
    given = {"AcquisitionTime": "102000"} | {keyword: values[0]}
    one, two = ct_series(4, **given), ct_series(4, seed=2, **(given | {keyword: values[1]}))
    split = split_stacks(together(one, two))
    assert [count for count, _ in rules(split)] == [4, 4]
    assert shown in {rule for _, rule in rules(split)}


def test_moments_within_moments_are_found() -> None:
    series = together(
        mr_series(3, DiffusionBValue=0.0, DiffusionGradientOrientation=None),
        *(
            mr_series(3, seed=k, DiffusionBValue=1000.0, DiffusionGradientOrientation=direction)
            for k, direction in enumerate(([1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0]), start=2)
        ),
    )
    series = [changed([ds], AcquisitionTime="102000")[0] for ds in series]
    split = split_stacks(series)
    assert sorted(rules(split)) == [
        (3, "diffusion 0"),
        (3, "diffusion 1000\\0\\1\\0"),
        (3, "diffusion 1000\\1\\0\\0; by InstanceNumber, at its position image 1"),
        (3, "diffusion 1000\\1\\0\\0; by InstanceNumber, at its position image 2"),
    ]


def test_instance_numbers_are_the_last_resort() -> None:
    times = {"AcquisitionTime": "102000"}
    series = together(*(ct_series(4, seed=k, **times) for k in (1, 2, 3)))
    split = split_stacks(series[::-1])
    assert members(split) == {
        tuple(f"1.2.3.{k}" for k in range(first, first + 4)) for first in (1, 5, 9)
    }
    assert all("by InstanceNumber" in rule for _, rule in rules(split))


def test_interleaved_instance_numbers_are_a_last_resort_too() -> None:
    times = {"AcquisitionTime": "102000"}
    one, two = ct_series(4, **times), ct_series(4, seed=2, **times)
    mixed = [ds for pair in zip(one, two, strict=True) for ds in pair]
    split = split_stacks(together(mixed))
    assert members(split) == {("1.2.3.1", "1.2.3.3", "1.2.3.5", "1.2.3.7"),
                              ("1.2.3.2", "1.2.3.4", "1.2.3.6", "1.2.3.8")}  # fmt: skip


def test_unequal_counts_are_refused_with_the_counts() -> None:
    phases = [ct_series(4, seed=k, TemporalPositionIdentifier=k) for k in (1, 2, 3)]
    split = split_stacks(together(phases[0], phases[1][:3], phases[2]))
    assert codes(split) == ["UNEQUAL_COUNTS"] * 3
    refusal = split.stacks[0].refusal
    assert refusal is not None
    assert "4, 3, 4 slices" in refusal.message


def test_duplicates_that_nothing_tells_apart_are_refused() -> None:
    times = {"AcquisitionTime": "102000"}
    one, two = ct_series(4, **times), ct_series(2, seed=2, **times)
    split = split_stacks(together(one, two))
    assert rules(split) == [(6, "")]
    assert codes(split) == ["DUPLICATE_POSITIONS"]
    unnumbered = changed(together(one, one), InstanceNumber=1)
    assert codes(split_stacks(unnumbered)) == ["DUPLICATE_POSITIONS"]


def test_two_slabs_side_by_side_are_two_stacks() -> None:
    left, right = ct_series(4), ct_series(4, seed=2, origin=(120.5, -90.25, 310.0))
    split = split_stacks(together(left, right))
    assert [count for count, _ in rules(split)] == [4, 4]
    assert all(rule.startswith("place in the plane") for _, rule in rules(split))


def test_frames_of_reference_are_stacks_unless_every_slice_has_its_own() -> None:
    series = ct_series(4)
    two = [*series[:2], *changed(series[2:], FrameOfReferenceUID="1.2.9")]
    assert rules(split_stacks(two)) == [(2, "frame of reference 1"), (2, "frame of reference 2")]
    each = [changed([ds], FrameOfReferenceUID=f"1.2.{k}")[0] for k, ds in enumerate(series)]
    assert rules(split_stacks(each)) == [(4, "")]


def test_time_points_of_enhanced_frames_are_stacks() -> None:
    one, two = mr_series(3), mr_series(3, seed=2)
    mixed = [ds for pair in zip(one, two, strict=True) for ds in pair]
    split = split_stacks([enhanced(mixed, temporal=[1, 2] * 3)])
    assert rules(split) == [
        (3, "TemporalPositionIdentifier 1"),
        (3, "TemporalPositionIdentifier 2"),
    ]
    for stack, plain in zip(split.stacks, (one, two), strict=True):
        voxels = volume_from_datasets(stack.datasets, "AU")[0].voxels
        assert np.array_equal(voxels, volume_from_datasets(plain, "AU")[0].voxels)


def test_modalities_under_one_series_uid_are_stacks() -> None:
    split = split_stacks(together(ct_series(3), pet_series(3), renumber=False))
    assert {stack.modality for stack in split.stacks} == {"CT", "PT"}


def test_a_gap_is_told_for_its_stack_alone() -> None:
    echoes = [mr_series(6, seed=k, EchoTime=f"{k}0") for k in (1, 2)]
    split = split_stacks(together(echoes[0], echoes[1][:2] + echoes[1][3:]))
    assert codes(split) == [None, "MISSING_SLICES"]


def test_a_series_without_geometry_is_refused_not_lost() -> None:
    series = ct_series(3)
    split = split_stacks([*series[:2], *changed(series[2:], ImagePositionPatient=None)])
    assert codes(split) == ["NO_GEOMETRY"]
    assert len(split.stacks[0].datasets) == 3
    broken = changed(series, ImagePositionPatient=["1", "2"])
    assert codes(split_stacks(broken)) == ["NO_GEOMETRY"]


def test_a_tilted_stack_is_sheared() -> None:
    (stack,) = split_stacks(ct_series(4, orientation=TILTED, travel=(0, 0, 1))).stacks
    assert stack.sheared
    assert abs(stack.tilt_degrees - 18.5) < 0.01


def test_ignored_instances_come_with_their_reasons() -> None:
    series = ct_series(3)
    split = split_stacks([localizer(series[0]), *series, not_an_image(series[0]), series[1]])
    assert rules(split) == [(3, "")]
    assert [item.code for item in split.ignored] == ["LOCALIZER", "NOT_AN_IMAGE", "REPEATED"]
    assert split_stacks([]).stacks == ()


def test_headers_alone_give_the_same_stacks() -> None:
    series = kinds(EchoTime=("30", "80"))
    bare = changed(series, PixelData=None)
    assert members(split_stacks(bare)) == members(split_stacks(series))


@settings(max_examples=25, deadline=None)
@given(
    shuffle=st.randoms(use_true_random=False),
    echoes=st.integers(1, 3),
    phases=st.integers(1, 3),
    slices=st.integers(2, 4),
)
def test_any_order_of_any_echoes_and_phases_gives_the_same_stacks(
    shuffle: random.Random, echoes: int, phases: int, slices: int
) -> None:
    parts = [
        mr_series(slices, 4, 4, EchoTime=f"{echo}0", TemporalPositionIdentifier=phase)
        for echo in range(1, echoes + 1)
        for phase in range(1, phases + 1)
    ]
    series = together(*parts)
    split = split_stacks(series)
    assert members(split) == {
        tuple(f"1.2.3.{part * slices + k + 1}" for k in range(slices)) for part in range(len(parts))
    }
    assert codes(split) == [None] * len(parts)
    shuffle.shuffle(series)
    again = split_stacks(series)
    assert rules(again) == rules(split)
    assert members(again) == members(split)


def test_every_slice_is_in_one_stack() -> None:
    series = together(ct_series(4), ct_series(3, seed=2), mr_series(2))
    held = [ds for stack in split_stacks(series).stacks for ds in stack.datasets]
    assert sorted(map(id, held)) == sorted(map(id, slices_of(series)[0]))


# Every real folder: what it is, and what becomes of it. docs/SERIES.md is this table.


def verdict(stack: StackOfImages) -> str:
    """As the worker finds it: what is against the stack itself comes first."""
    if stack.refusal is not None:
        return stack.refusal.code
    try:
        volume, _ = volume_from_datasets(stack.datasets, UNITS[stack.modality], min_slices=1)
    except SeriesRefused as refusal:
        return refusal.code
    shape = " x ".join(str(size) for size in volume.voxels.shape)
    sheared = ", sheared" if volume.sheared else ""
    return f"{volume.unit}, {shape}{sheared}"


def rows_of(root: Path) -> list[str]:
    """One line of the table per folder of real images."""
    series: dict[Path, dict[str, list[Dataset]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            ds = dcmread(path)
            series[path.parent.relative_to(root)][str(ds.get("SeriesInstanceUID"))].append(ds)
    rows = []
    for folder, by_uid in sorted(series.items()):
        lines: dict[str, int] = defaultdict(int)
        for datasets in by_uid.values():
            for line in _lines(split_stacks(datasets)):
                lines[line] += 1
        cells = [f"{count} x {line}" if count > 1 else line for line, count in lines.items()]
        rows += [f"| {folder} | {cell} |" for cell in cells]
    return rows


def _lines(split: Split) -> list[str]:
    found = [
        f"{len(stack.datasets)} | {stack.rule.replace('|', '/') or '-'} | {verdict(stack)}"
        for stack in split.stacks
    ]
    ignored: dict[str, int] = defaultdict(int)
    for item in split.ignored:
        ignored[item.code] += 1
    return found + [f"{count} | not a slice | {code}" for code, count in sorted(ignored.items())]


@pytest.mark.slow
def test_every_real_folder_gives_the_stacks_or_refusals_of_the_table(real_dicom: Path) -> None:
    documented = [
        line
        for line in (ROOT / "docs" / "SERIES.md").read_text("utf-8").splitlines()
        if line.startswith(("| codecs/", "| ct/", "| mr/", "| odd/", "| paired", "| pet/"))
    ]
    assert rows_of(real_dicom) == documented
