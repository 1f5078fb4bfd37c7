"""When a series is complete: a table of moments, and properties over every history of arrivals."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
)

from dicomnode.config import SeriesSection
from dicomnode.imaging.marks import is_synthetic
from dicomnode.journal import OpenSeries
from dicomnode.routing import keywords_of
from dicomnode.series import (
    ARRIVAL_KEYWORDS,
    Carriers,
    Verdict,
    common_header,
    judge,
    missing_slices,
    plane_of,
    read_headers,
)
from tests.factories import (
    AXIAL,
    CORONAL,
    SAGITTAL,
    TILTED,
    changed,
    ct_series,
    file_bytes,
    localizer,
    secondary_capture,
)

RULES = SeriesSection(10.0, 2.0, 300.0)
LAST = 1000.0


def _judged(
    after: float,
    *,
    missing: int = 0,
    released: float | None = None,
    interrupted: bool = False,
    started: float = 0.0,
    rules: SeriesSection = RULES,
) -> Verdict:
    """The verdict `after` seconds from the last arrival; `released`: seconds from it, too."""
    series = OpenSeries("1.2", LAST, 1, interrupted, "CT1", "DICOMNODE")
    released_at = None if released is None else LAST + released
    return judge(series, lambda: missing, released_at, rules, LAST + after, LAST + started)


@pytest.mark.parametrize(
    ("facts", "moment", "kind"),
    [
        ({}, 10, "quiet"),
        ({"released": 0}, 2, "released"),
        ({"released": 1}, 3, "released"),
        ({"released": 9}, 10, "quiet"),  # quiet comes first
        ({"released": -5}, 2, "released"),  # a release before the last arrival counts from that
        ({"missing": 1}, 300, "incomplete"),
        ({"missing": 1, "released": 0}, 300, "incomplete"),
        ({"interrupted": True}, 300, "quiet"),
        ({"interrupted": True, "released": 0}, 300, "quiet"),
        ({"interrupted": True, "missing": 3}, 300, "incomplete"),
        ({"started": 50}, 60, "quiet"),
        ({"started": 50, "released": 0}, 52, "released"),
        ({"started": 50, "missing": 1}, 350, "incomplete"),
        ({"started": 50, "interrupted": True}, 350, "quiet"),
    ],
    ids=str,
)
def test_a_series_is_complete_at_the_earliest_safe_moment(
    facts: dict[str, Any], moment: float, kind: str
) -> None:
    assert not _judged(moment - 0.01, **facts).complete
    assert (_judged(moment, **facts).complete, _judged(moment, **facts).kind) == (True, kind)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "instances may still come; waiting 9 s more"),
        ({"missing": 2}, "instances may still come; waiting 9 s more"),
        ({"missing": 2, "released": 0}, "2 slices are missing between those received; waiting 299"),
        ({"released": 0.5}, "the association was just released; waiting 2 s more"),
        ({"interrupted": True}, "the sender was cut off by a stop of this node; waiting 299 s"),
    ],
    ids=str,
)
def test_a_series_that_waits_says_for_what(facts: dict[str, Any], words: str) -> None:
    verdict = _judged(1, **facts)
    kind = "held" if "missing" in words or "cut off" in words else "waiting"
    assert (verdict.kind, verdict.reason[: len(words)]) == (kind, words)


def test_a_complete_series_says_why() -> None:
    assert _judged(10).reason == "nothing new for 10 s"
    assert _judged(2, released=0).reason == "association released 2 s ago, no gap"
    missing = _judged(300, missing=4)
    assert missing.reason == "4 slices are missing after 300 s of waiting"
    assert missing.missing == 4


def test_positions_are_not_looked_at_before_anything_can_be_decided() -> None:
    def never() -> int:
        raise AssertionError("asked for positions while instances are still coming")

    series = OpenSeries("1.2", LAST, 1, False, "CT1", "DICOMNODE")
    assert not judge(series, never, None, RULES, LAST + 9, 0).complete


_SECONDS = st.integers(0, 400).map(float)
_RULES = st.builds(SeriesSection, _SECONDS, _SECONDS, _SECONDS)
_FACTS = st.fixed_dictionaries(
    {
        "missing": st.integers(0, 3),
        "released": st.none() | st.integers(-50, 50).map(float),
        "interrupted": st.booleans(),
        "started": st.integers(-50, 50).map(float),
    }
)


def _may_still_come(after: float, facts: dict[str, Any], rules: SeriesSection) -> bool:
    """The rules of DESIGN 1.3, said another way: is somebody still given time?"""
    quiet = after - max(0.0, facts["started"])
    hold = max(rules.hold_incomplete_seconds, rules.quiet_seconds)
    if facts["missing"] or facts["interrupted"]:
        return quiet < hold
    released = facts["released"]
    if released is None:
        return quiet < rules.quiet_seconds
    since = after - max(released, facts["started"], 0.0)
    return quiet < rules.quiet_seconds and since < rules.quiet_seconds_if_released


@given(_SECONDS, _FACTS, _RULES)
def test_complete_exactly_when_no_rule_gives_more_time(
    after: float, facts: dict[str, Any], rules: SeriesSection
) -> None:
    assert _judged(after, **facts, rules=rules).complete != _may_still_come(after, facts, rules)


@given(_FACTS, _RULES)
def test_no_series_waits_for_ever(facts: dict[str, Any], rules: SeriesSection) -> None:
    assert _judged(50 + 400, **facts, rules=rules).complete


@given(_FACTS, _RULES, _SECONDS, _SECONDS)
def test_a_complete_series_does_not_become_incomplete(
    facts: dict[str, Any], rules: SeriesSection, one: float, other: float
) -> None:
    early, late = sorted((one, other))
    assert _judged(late, **facts, rules=rules).complete >= (
        _judged(early, **facts, rules=rules).complete
    )


# associations


def test_a_series_is_released_with_its_last_association() -> None:
    carriers = Carriers()
    carriers.carries(1, "a")
    carriers.carries(2, "a")
    carriers.ended(1, released=True, now=10)
    assert carriers.released_at("a") is None
    carriers.ended(2, released=True, now=11)
    assert carriers.released_at("a") == 11


def test_an_abort_says_nothing_about_completeness() -> None:
    carriers = Carriers()
    carriers.carries(1, "a")
    carriers.ended(1, released=False, now=10)
    assert carriers.released_at("a") is None


def test_a_new_association_takes_the_release_back() -> None:
    carriers = Carriers()
    carriers.carries(1, "a")
    carriers.ended(1, released=True, now=10)
    carriers.carries(2, "a")
    assert carriers.released_at("a") is None


def test_an_association_releases_every_series_it_carried_and_no_other() -> None:
    carriers = Carriers()
    for association, series in ((1, "a"), (1, "b"), (2, "c")):
        carriers.carries(association, series)
    carriers.ended(1, released=True, now=10)
    assert [carriers.released_at(uid) for uid in "abc"] == [10, 10, None]
    carriers.forget("a")
    assert carriers.released_at("a") is None


# gaps


def _missing(datasets: Sequence[Dataset]) -> int:
    return missing_slices(map(plane_of, datasets))


ORIENTATIONS = {"axial": AXIAL, "coronal": CORONAL, "sagittal": SAGITTAL, "tilted": TILTED}


@given(st.sets(st.integers(1, 22), max_size=3), st.randoms(use_true_random=False), st.data())
def test_every_slice_taken_out_is_missed(lost: set[int], random: Any, data: st.DataObject) -> None:
    orientation = data.draw(st.sampled_from(sorted(ORIENTATIONS)))
    normal = np.cross(ORIENTATIONS[orientation][:3], ORIENTATIONS[orientation][3:])
    step = data.draw(st.sampled_from([0.5, 1.25, 2.5, 7.0]))
    planes: list[Any] = [
        {"position": list(100 - i * step * normal), "orientation": ORIENTATIONS[orientation]}
        for i in range(24)
        if i not in lost
    ]
    planes.append(None)
    random.shuffle(planes)
    assert missing_slices(planes) == len(lost)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_stack_as_a_scanner_writes_it_has_no_gap(name: str) -> None:
    stack = ct_series(8, 4, 4, orientation=ORIENTATIONS[name])
    assert _missing(stack) == 0
    assert _missing([*stack[:3], *stack[5:]]) == 2


def test_a_sheared_stack_has_no_gap() -> None:
    stack = ct_series(8, 4, 4, orientation=TILTED, travel=(0.0, 0.0, 1.0))
    assert (_missing(stack), _missing(stack[:3] + stack[4:])) == (0, 1)


def test_the_ends_cannot_be_missed() -> None:
    stack = ct_series(8, 4, 4)
    assert _missing(stack[2:-2]) == 0


def test_a_localizer_or_a_screenshot_in_the_series_is_no_slice() -> None:
    stack = ct_series(6, 4, 4)
    far = changed(stack[:1], ImagePositionPatient=[0, 0, 420])[0]
    beside = changed([localizer(far)], ImageOrientationPatient=list(AXIAL))
    others = [localizer(stack[0]), secondary_capture(stack[0]), *beside]
    assert (_missing([*stack, *others]), _missing([*stack[:2], *stack[3:], *others])) == (0, 1)


def test_direction_cosines_that_differ_in_rounding_are_one_stack() -> None:
    planes = []
    for index in range(9):
        cosine = 0.1235 + (1e-6 if index % 4 else -1e-6)  # on either side of a rounding step
        orientation = [math.sqrt(1 - cosine**2), cosine, 0.0, 0.0, 0.0, -1.0]
        planes.append({"position": [0.0, 3.0 * index, 0.0], "orientation": orientation})
    assert missing_slices(planes) == 0
    assert missing_slices(planes[:4] + planes[5:]) == 1


def test_each_of_two_parallel_stacks_is_looked_at() -> None:
    axial, coronal = ct_series(6, 4, 4), ct_series(6, 4, 4, seed=2, orientation=CORONAL)
    assert _missing(axial + coronal) == 0
    assert _missing([*axial[:2], *axial[3:], *coronal[:3], *coronal[4:]]) == 2


def test_blocks_of_another_spacing_are_no_gap() -> None:
    positions = [-4.0 * i for i in range(10)] + [-36 - 7.0 * i for i in range(1, 10)]
    planes = [{"position": [0, 0, z], "orientation": AXIAL} for z in positions]
    assert missing_slices(planes) == 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_positions_have_no_gap(count: int) -> None:
    assert _missing(ct_series(2, 4, 4)[:count]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


def _written(folder: Path, raw: bytes) -> Path:
    path = folder / f"{abs(hash(raw))}.dcm"
    path.write_bytes(raw)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("text", ["", "1\\2", "nan\\0\\0", "inf\\0\\0", "a\\b\\c", "1e999\\0\\0"])
def test_a_position_that_is_none_is_not_used(text: str, folder: Path) -> None:
    def plane(position: str) -> Any:
        elements = [("ImagePositionPatient", "DS", position.encode())]
        elements.append(("ImageOrientationPatient", "DS", b"1\\0\\0\\0\\1\\0 "))
        path = _written(folder, _strange(elements))
        return plane_of(read_headers([path], ARRIVAL_KEYWORDS)[0])

    assert plane("1\\2\\3") == {"position": [1, 2, 3], "orientation": list(AXIAL)}
    assert plane(text) is None


# what holds for all instances

_VRS = ["CS", "DS", "IS", "LO", "UI", "US", "SL", "FD", "SQ", "UN", "OB", "PN", "DA", "AT", "XX"]
_KEYWORDS = [*keywords_of(()), "Rows", "SliceThickness", "SeriesNumber", "ImageType", "PatientName"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    elements=st.lists(
        st.tuples(st.sampled_from(_KEYWORDS), st.sampled_from(_VRS), st.binary(max_size=9)),
        max_size=4,
        unique_by=lambda element: element[0],
    )
)
def test_no_header_stops_the_routing_of_others(
    elements: list[tuple[str, str, bytes]], folder: Path
) -> None:
    files = [_strange(elements), file_bytes(ct_series(1, 4, 4)[0])]
    headers = read_headers([_written(folder, raw) for raw in files], _KEYWORDS)
    header = common_header(headers, _KEYWORDS, {})
    assert header.instances == 2
    assert not any(map(is_synthetic, headers[1:]))
    assert is_synthetic(headers[0]) in (True, False)
    assert plane_of(headers[0]) is None


def _strange(elements: list[tuple[str, str, bytes]]) -> bytes:
    """A Part 10 file with elements of these VRs and raw values."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.SOPInstanceUID = "1.2"
    raw = file_bytes(dataset)
    long = ("SQ", "UN", "OB")
    for keyword, vr, value in sorted(elements, key=lambda e: tag_for_keyword(e[0]) or 0):
        tag = tag_for_keyword(keyword) or 0
        size = bytes(2) + len(value).to_bytes(4, "little")
        length = size if vr in long else len(value).to_bytes(2, "little")
        group, element = (tag >> 16).to_bytes(2, "little"), (tag & 0xFFFF).to_bytes(2, "little")
        raw += group + element + vr.encode() + length + value
    return raw


def test_a_file_that_is_no_dicom_counts_as_empty(folder: Path) -> None:
    (header,) = read_headers([_written(folder, b"nothing")], ["Modality"])
    assert common_header([header], ["Modality"], {}).values["Modality"] == ()


def test_of_a_sequence_only_the_presence_counts(folder: Path) -> None:
    with_one = ct_series(1, 4, 4, private=True)[0]
    keyword = "RequestAttributesSequence"
    headers = read_headers([_written(folder, file_bytes(with_one))], [keyword])
    assert common_header(headers, [keyword], {}).values[keyword] == ("SEQUENCE",)


# real series


def _real(folder: Path) -> list[Dataset]:
    tags = ["ImageType", "ImagePositionPatient", "ImageOrientationPatient"]
    files = sorted(path for path in folder.rglob("*") if path.suffix in ("", ".dcm"))
    return [dcmread(path, stop_before_pixels=True, specific_tags=tags) for path in files]


@pytest.mark.parametrize(
    "name",
    [
        "ct/brain_gantry_tilt_18.5deg_GE",
        "pet/fdg_wholebody_STS_001_GE_BQML",
        "ct/chest_contrast_LIDC-IDRI-0001_jpegls",
        "ct/contrast_abdomen_GE_CRLM-CT-1004",
        "ct/noncontrast_chest_RICORD-1A-001012_jpeglossless",
        "mr/brain_FLAIR_REMBRANDT_HF0990",
    ],
)
def test_a_complete_real_series_has_no_gap(name: str, real_dicom: Path) -> None:
    series = _real(real_dicom / name)
    assert len(series) > 20
    assert _missing(series) == 0


def test_a_slice_taken_out_of_a_real_series_is_missed(real_dicom: Path) -> None:
    series = _real(real_dicom / "ct/chest_contrast_LIDC-IDRI-0001_jpegls")
    middle = sorted(series, key=lambda ds: float(ds.ImagePositionPatient[2]))
    assert _missing(middle[:60] + middle[61:]) == 1


def test_the_missing_slice_of_a_real_series_is_missed(real_dicom: Path) -> None:
    assert _missing(_real(real_dicom / "odd/ct_inconsistent_slice_increment_GE")) == 1
