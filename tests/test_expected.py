"""Expected counts: when the attributes of a series say how many instances it will have."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

from dicomnode.expected import EXPECTED_KEYWORDS, Expected, expected_count, expected_values


def header(**attributes: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def count(received: int, **attributes: Any) -> Expected | None:
    """What `received` instances with the same attributes say together."""
    return expected_count([expected_values(header(**attributes))] * received)


PET = {"SeriesType": ["STATIC", "IMAGE"], "NumberOfSlices": 47}


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"NumberOfSeriesRelatedInstances": "40"}, 40),
        (PET, 47),
        ({**PET, "SeriesType": ["WHOLE BODY", "IMAGE"]}, 47),
        ({**PET, "SeriesType": ["DYNAMIC", "IMAGE"], "NumberOfTimeSlices": 10}, 470),
        (
            {
                **PET,
                "SeriesType": ["GATED", "IMAGE"],
                "NumberOfRRIntervals": 2,
                "NumberOfTimeSlots": 8,
            },
            752,
        ),
    ],
)
def test_what_counts_the_whole_series_is_enough_alone(
    attributes: dict[str, Any], expected: int
) -> None:
    found = count(3, **attributes)
    assert found is not None
    assert (found.count, found.alone) == (expected, True)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"NumberOfSeriesRelatedInstances": ""},
        {"NumberOfSeriesRelatedInstances": "2"},  # three are here
        {**PET, "NumberOfSlices": 2},
        {**PET, "SeriesType": ["STATIC", "REPROJECTION"]},
        {**PET, "SeriesType": ["DYNAMIC", "IMAGE"]},  # of how many times?
        {**PET, "ImageIndex": 48},
        {"NumberOfSlices": 47},  # of what?
        {"ImagesInAcquisition": "40"},  # of which acquisition?
        {"ImagesInAcquisition": "40", "AcquisitionNumber": "1", "NumberOfFrames": "8"},
    ],
)
def test_what_may_be_too_small_says_nothing(attributes: dict[str, Any]) -> None:
    assert count(3, **attributes) is None


def test_the_images_of_an_acquisition_need_the_end_of_the_association_too() -> None:
    found = count(3, ImagesInAcquisition="40", AcquisitionNumber="1")
    assert found == Expected(40, "ImagesInAcquisition", False)


def test_two_acquisitions_cannot_be_added_up() -> None:
    """A third may not have begun."""
    said = [
        expected_values(header(ImagesInAcquisition="2", AcquisitionNumber=number))
        for number in ("1", "1", "2", "2")
    ]
    assert expected_count(said) is None


def test_an_archive_that_is_still_counting_says_nothing() -> None:
    said = [expected_values(header(NumberOfSeriesRelatedInstances=n)) for n in ("1", "2", "3")]
    assert expected_count(said) is None


def test_the_bed_position_that_ge_writes_into_a_static_series_does_not_matter() -> None:
    said = [expected_values(header(**PET, NumberOfTimeSlices=bed)) for bed in (1, 2, 3)]
    assert expected_count(said) == Expected(47, "NumberOfSlices", True)


def test_nothing_received_says_nothing() -> None:
    assert expected_count([]) is None


_SOME = st.fixed_dictionaries(
    {},
    optional={
        **{k: st.integers(-2, 30) for k in EXPECTED_KEYWORDS if k != "SeriesType"},
        "SeriesType": st.sampled_from(["STATIC\\IMAGE", "DYNAMIC\\IMAGE", "GATED\\IMAGE", "", "X"]),
    },
)


@given(st.lists(_SOME, max_size=12))
def test_a_series_never_has_more_than_is_expected(said: list[dict[str, int | str]]) -> None:
    found = expected_count(said)
    assert found is None or found.count >= len(said) > 0


@given(st.text(max_size=20))
def test_no_value_of_a_stranger_breaks_it(text: str) -> None:
    dataset = Dataset()
    for keyword in EXPECTED_KEYWORDS:
        dataset.add_new(keyword, "LO", text)
    expected_count([expected_values(dataset)])


def test_real_series_have_as_many_images_as_they_say(real_dicom: Path) -> None:
    """Only complete series: what says a count must be right, and never too small."""
    series: dict[tuple[str, str], list[dict[str, int | str]]] = defaultdict(list)
    for path in sorted(real_dicom.rglob("*.dcm")):
        if "codecs" in path.parts:  # the same instance many times
            continue
        try:
            dataset = dcmread(
                path,
                stop_before_pixels=True,
                specific_tags=[*EXPECTED_KEYWORDS, "SeriesInstanceUID"],
            )
        except InvalidDicomError:
            continue
        folder = str(path.parent.relative_to(real_dicom))
        series[folder, str(dataset.get("SeriesInstanceUID"))].append(expected_values(dataset))
    found = {}
    for (folder, _), said in series.items():
        if expected := expected_count(said):
            found[folder] = (len(said), expected)
            print(f"{folder}: {len(said)} files, {expected}")
    assert [folder for folder, (have, said) in found.items() if have != said.count] == []
    assert "pet/fdg_wholebody_STS_001_GE_BQML" in found
