"""Routes: which a series takes, why not the others, and that no reason tells about the patient."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset

from dicomnode.config import Route, config_from_mapping
from dicomnode.routing import decide, keywords_of, mismatches
from dicomnode.series import Header, common_header
from tests.factories import ct_series

NOBODY = Path("/etc/dicomnode")


def _routes(*matches: dict[str, Any], **keys: Any) -> tuple[Route, ...]:
    """Routes as config.yaml gives them, named a, b, c ..."""
    routes = [
        {"name": "abc"[i], "match": match, "model": "m", "send_to": [], **keys}
        for i, match in enumerate(matches)
    ]
    return config_from_mapping({"routes": routes}, NOBODY).routes


def _header(**attributes: Any) -> Header:
    """The header of a series of two instances that have these attributes."""
    datasets = []
    for _ in range(2):
        dataset = Dataset()
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        datasets.append(dataset)
    return common_header(datasets, [*attributes, "ContrastBolusAgent", "KVP"], {})


def _why_not(match: dict[str, Any], header: Header) -> list[str]:
    return mismatches(header, _routes(match)[0])


CT = _header(
    Modality="CT",
    BodyPartExamined="CHEST",
    SliceThickness="2.500000",
    ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
    SeriesNumber="4",
    ConvolutionKernel=["B30f", "3"],
    SoftwareVersions="1.10",
    Rows=512,
    SeriesDescription="",
)

TAKES: list[dict[str, Any]] = [
    {},
    {"Modality": "CT"},
    {"Modality": "ct"},
    {"Modality": " CT "},
    {"Modality": ["MR", "CT"]},
    {"Modality": {"any": "C?"}},
    {"BodyPartExamined": "CH*"},
    {"BodyPartExamined": "*"},
    {"SliceThickness": 2.5},
    {"SliceThickness": "2.5"},
    {"SliceThickness": "2.500000"},
    {"SliceThickness": {"min": 2.5, "max": 2.5}},
    {"SliceThickness": {"min": 1}},
    {"SeriesNumber": 4},
    {"SeriesNumber": [3, 4]},
    {"Rows": "512"},
    {"Rows": {"regex": "5.."}},
    {"ImageType": "AXIAL"},
    {"ImageType": {"not": "LOCALIZER"}},
    {"ImageType": {"any": ["PRIMARY"], "not": ["DERIVED", "LOCALIZER"]}},
    {"ConvolutionKernel": "b30*"},
    {"SoftwareVersions": "1.10"},
    {"SoftwareVersions": {"regex": "1\\.[0-9]+"}},
    {"ContrastBolusAgent": {"present": False}},
    {"SeriesDescription": {"present": False}},  # empty counts as absent
    {"Modality": {"present": True}},
    {"Modality": {"regex": "ct|mr"}},
]


@pytest.mark.parametrize("match", TAKES, ids=str)
def test_a_condition_that_holds(match: dict[str, Any]) -> None:
    assert _why_not(match, CT) == []


REFUSES: list[tuple[dict[str, Any], str]] = [
    ({"Modality": "MR"}, "Modality is CT, not MR"),
    ({"Modality": ["MR", "PT"]}, "Modality is CT, not MR or PT"),
    ({"Modality": "C"}, "Modality is CT, not C"),
    ({"Modality": "[C]T"}, "Modality is CT, not [C]T"),  # no character sets, only * and ?
    ({"Modality": {"not": "C*"}}, "Modality is CT, not anything but C*"),
    ({"Modality": {"regex": "C"}}, "Modality is CT, not like /C/"),
    ({"ImageType": {"not": "AXIAL"}}, "ImageType is ORIGINAL\\PRIMARY\\AXIAL, not anything but"),
    ({"SliceThickness": {"max": 2}}, "SliceThickness is 2.5, not 2 or less"),
    ({"SliceThickness": {"min": 3}}, "SliceThickness is 2.5, not 3 or more"),
    ({"SliceThickness": 2.51}, "SliceThickness is 2.5, not 2.51"),
    ({"Modality": {"min": 1}}, "Modality is CT, not 1 or more"),
    ({"KVP": {"min": 1}}, "KVP is absent"),
    ({"KVP": {"not": 120}}, "KVP is absent"),
    ({"KVP": {"present": True}}, "KVP is absent"),
    ({"Modality": {"present": False}}, "Modality is present"),
    ({"SoftwareVersions": "1.1"}, "SoftwareVersions is something else than asked for"),
    ({"Modality": "{__import__('os')}"}, "Modality is CT, not {__import__('os')}"),
]


@pytest.mark.parametrize(("match", "reason"), REFUSES, ids=[reason for _, reason in REFUSES])
def test_a_condition_that_does_not_hold_says_why(match: dict[str, Any], reason: str) -> None:
    assert [why[: len(reason)] for why in _why_not(match, CT)] == [reason]


@pytest.mark.parametrize(
    "condition", ["CHEST", "*", {"present": True}, {"present": False}, {"not": "HEAD"}], ids=str
)
def test_an_attribute_that_differs_between_instances_never_matches(condition: Any) -> None:
    parts = [Dataset(), Dataset()]
    parts[0].BodyPartExamined, parts[1].BodyPartExamined = "CHEST", "ABDOMEN"
    header = common_header(parts, ["BodyPartExamined"], {})
    reasons = _why_not({"BodyPartExamined": condition}, header)
    assert reasons == ["BodyPartExamined is not the same in all instances"]


def test_an_attribute_that_only_some_instances_have_never_matches() -> None:
    parts = [Dataset(), Dataset()]
    parts[0].ContrastBolusAgent = "ULTRAVIST"
    header = common_header(parts, ["ContrastBolusAgent"], {})
    assert _why_not({"ContrastBolusAgent": {"present": False}}, header) != []


def test_one_number_in_two_spellings_is_one_value() -> None:
    parts = [Dataset(), Dataset()]
    parts[0].SliceThickness, parts[1].SliceThickness = "2.5", "2.500000"
    header = common_header(parts, ["SliceThickness"], {})
    assert _why_not({"SliceThickness": 2.5}, header) == []


def test_who_called_and_how_many_came_are_facts_to_match() -> None:
    facts = {"CallingAETitle": "CT1", "CalledAETitle": "DICOMNODE", "Instances": 24.0}
    header = common_header([Dataset()] * 24, [], facts)
    match = {"CallingAETitle": "CT?", "CalledAETitle": "DICOMNODE", "Instances": {"min": 24}}
    assert _why_not(match, header) == []
    assert _why_not({"Instances": {"min": 25}}, header) == ["Instances is 24, not 25 or more"]
    assert _why_not({"CallingAETitle": "MR1"}, header) == ["CallingAETitle is CT1, not MR1"]


def test_a_large_number_keeps_its_digits() -> None:
    header = _header(SeriesNumber="1234567")
    assert _why_not({"SeriesNumber": "12345??"}, header) == []


def test_every_matching_route_runs_up_to_a_final_one() -> None:
    first, second, third = _routes({"Modality": "CT"}, {"Modality": "CT"}, {"Modality": "MR"})
    final = _routes({"Modality": "CT"}, final=True)[0]
    taken = [d.taken for d in decide(CT, [first, second, third], synthetic=False)]
    assert taken == [True, True, False]
    decisions = decide(CT, [final, second], synthetic=False)
    assert [d.reasons for d in decisions] == [(), ("route 'a' is final",)]


def test_a_final_route_that_does_not_match_stops_nothing() -> None:
    routes = [_routes({"Modality": "MR"}, final=True)[0], _routes({}, {})[1]]
    assert [d.taken for d in decide(CT, routes, synthetic=False)] == [False, True]


def test_a_synthetic_series_is_only_taken_by_a_route_that_accepts_it() -> None:
    careful, willing = _routes({})[0], _routes({}, accept_synthetic=True)[0]
    decisions = decide(CT, [careful, willing], synthetic=True)
    assert [d.taken for d in decisions] == [False, True]
    assert "ALREADY_SYNTHETIC" in str(decisions[0])


def test_a_final_route_that_the_loop_guard_closed_stops_nothing() -> None:
    routes = [_routes({}, final=True)[0], _routes({}, {}, accept_synthetic=True)[1]]
    assert [d.taken for d in decide(CT, routes, synthetic=True)] == [False, True]


def test_the_loop_guard_reads_its_marks_whatever_the_routes_ask() -> None:
    keywords = keywords_of(_routes({"Modality": "CT"}))
    assert {"SyntheticData", "ContributingEquipmentSequence", "Modality"} <= set(keywords)


# properties

_TEXT = st.text("ABab*?[]!. 019-", min_size=1, max_size=6).filter(str.strip)
_PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "Modality": st.sampled_from(["CT", "MR", "PT"]),
    "BodyPartExamined": st.text("AB_ 01", min_size=1, max_size=6).filter(str.strip),
    "Manufacturer": _TEXT,
    "SliceThickness": st.decimals(-999, 999, places=3).map(str),
    "SeriesNumber": st.integers(-(2**31), 2**31 - 1),
    "Rows": st.integers(1, 65535),
    "ImageType": st.lists(st.sampled_from(["ORIGINAL", "PRIMARY", "AXIAL"]), min_size=2),
}
_ATTRIBUTES = st.fixed_dictionaries(_PLAIN)


def _own(header: Header, keyword: str) -> str:
    value = header.values[keyword][-1]
    return str(value)


@given(_ATTRIBUTES)
def test_a_route_of_a_headers_own_values_matches_it(attributes: dict[str, Any]) -> None:
    header = _header(**attributes)
    assert _why_not({keyword: _own(header, keyword) for keyword in attributes}, header) == []


@given(_ATTRIBUTES, st.sampled_from(sorted(_PLAIN)))
def test_one_changed_value_is_one_reason(attributes: dict[str, Any], changed: str) -> None:
    header = _header(**attributes)
    match = {keyword: _own(header, keyword) for keyword in attributes}
    match[changed] = "anything else"
    reasons = _why_not(match, header)
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{changed} is ")


@given(st.decimals(-999, 999, places=3), st.decimals("0.001", 9, places=3))
def test_limits_include_their_ends_and_nothing_beyond(value: Any, beyond: Any) -> None:
    header = _header(SliceThickness=str(value))
    ends = {"min": float(value), "max": float(value)}
    assert _why_not({"SliceThickness": ends}, header) == []
    assert _why_not({"SliceThickness": {"min": float(value + beyond)}}, header) != []
    assert _why_not({"SliceThickness": {"max": float(value - beyond)}}, header) != []


_PATIENT = ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge"]
_TELLING = [*_PATIENT, "AccessionNumber", "SeriesDescription", "InstitutionName", "StudyDate"]


@pytest.mark.parametrize("keyword", [*_TELLING, "ReferringPhysicianName", "ProtocolName"])
def test_no_reason_shows_what_could_tell_about_the_patient(keyword: str) -> None:
    dataset = ct_series(1)[0]
    value = str(dataset[keyword].value)
    header = common_header([dataset], [keyword], {})
    conditions: list[Any] = [
        "other",
        {"not": value},
        {"not": value[:1] + "*"},
        {"regex": "(?!" + re.escape(value) + ").*"},
        {"min": 1e9},
        {"present": False},
    ]
    reasons = [why for c in conditions for why in _why_not({keyword: c}, header)]
    assert len(reasons) == len(conditions)
    assert [why for why in reasons if value in why.replace(keyword, "")] == []
