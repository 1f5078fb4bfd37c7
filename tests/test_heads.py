"""Attributes from the first bytes of a data set, held to what pydicom reads of the whole file."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicomnode.errors import CannotUnderstand
from dicomnode.expected import EXPECTED_KEYWORDS, expected_values
from dicomnode.heads import Plain
from dicomnode.part10 import MALFORMED
from dicomnode.scp import read_arrival_header
from dicomnode.series import ARRIVAL_KEYWORDS, plane_of
from tests.factories import ct_series, file_bytes

KEYWORDS = (*ARRIVAL_KEYWORDS, *EXPECTED_KEYWORDS)
PLAIN = Plain([tag_for_keyword(keyword) or 0 for keyword in KEYWORDS])
PET = {
    "SeriesType": ["DYNAMIC", "IMAGE"],
    "NumberOfSlices": 47,
    "NumberOfTimeSlices": 3,
    "ImageIndex": 5,
    "NumberOfFrames": 1,
    "AcquisitionNumber": "7",
    "ImagesInAcquisition": "141",
}


def _file(syntax: str) -> bytes:
    dataset = ct_series(1, 4, 4, private=True, syntax=syntax)[0]
    for keyword, value in PET.items():
        setattr(dataset, keyword, value)
    return file_bytes(dataset)


FILES = [
    (syntax, _file(syntax))
    for syntax in (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
    )
]


def _body(raw: bytes) -> int:
    """Where the data set of a Part 10 file begins."""
    return 144 + int.from_bytes(raw[140:144], "little")


def _kept(header: Any) -> tuple[Any, ...]:
    """What the journal is to keep of an instance."""
    uids = [str(header.get(keyword) or "") for keyword in ARRIVAL_KEYWORDS[:4]]
    return (*uids, str(header.get("Modality") or ""), plane_of(header), expected_values(header))


def _agrees(raw: bytes, syntax: str, length: int, path: Path) -> bool:
    """Were the first bytes enough? Then they must say what the whole file says."""
    head = PLAIN.read(raw[_body(raw) :][:length], syntax)
    if head is None:
        return False
    path.write_bytes(raw)
    assert _kept(head) == _kept(read_arrival_header(path))
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads") / "a.dcm"


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    file=st.sampled_from(FILES),
    length=st.integers(0, 2500),
    changes=st.lists(st.tuples(st.integers(0, 1999), st.integers(0, 255)), max_size=3),
)
def test_what_the_first_bytes_say_is_what_the_file_says(
    file: tuple[str, bytes], length: int, changes: list[tuple[int, int]], path: Path
) -> None:
    syntax, raw = file[0], bytearray(file[1])
    for place, value in changes:
        if _body(raw) + place < len(raw):
            raw[_body(raw) + place] = value
    _agrees(bytes(raw), syntax, length, path)


_VALUES = {
    "SeriesInstanceUID": ("UI", ["1.2.3", "1.2\\1.3", "", "1..2", "1.2 ", "x"]),
    "Modality": ("CS", ["CT", "CT ", " CT", "ct", "CT\\MR", "", "É"]),
    "ImageType": ("CS", ["ORIGINAL\\PRIMARY\\LOCALIZER", "ORIGINAL", "A\\\\B", "", "A\\ B\\C "]),
    "ImagePositionPatient": (
        "DS",
        [
            *("1\\2\\3", " 1 \\+2.5\\-.5", "1e3\\2E-2\\0", "1\\2", "5", "0", "", "1\\\\3"),
            *("1_0\\2\\3", "nan\\1\\2", "1e999\\1\\2", "1,5\\2\\3", "1.\\2\\3"),
        ],
    ),
    "ImageOrientationPatient": ("DS", ["1\\0\\0\\0\\1\\0", "1\\0\\0", "1\\0\\0\\0\\1\\x"]),
    "AcquisitionNumber": ("IS", ["1", " 12 ", "-3", "+4", "1.5", "1\\2", "", "x", "99999999"]),
    "SeriesType": ("CS", ["STATIC\\IMAGE", "STATIC", "", "WHOLE BODY\\IMAGE "]),
    "ImageIndex": ("US", ["ab", "abcd", "", "a"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            keyword: st.tuples(st.sampled_from([vr] * 8 + ["UN", "LO"]), st.sampled_from(values))
            for keyword, (vr, values) in _VALUES.items()
        },
    ),
    twice=st.booleans(),
)
@example(values={"Modality": ("CS", "CT"), "ImagePositionPatient": ("DS", "0")}, twice=True)
def test_unusual_values_are_left_to_pydicom_or_read_as_it_reads_them(
    values: dict[str, tuple[str, str]], twice: bool, path: Path
) -> None:
    raw = file_bytes(_empty())
    given_ = sorted(values.items(), key=lambda item: tag_for_keyword(item[0]) or 0)
    for keyword, (vr, text) in given_ + given_[-1:] * twice:
        raw += _element(tag_for_keyword(keyword) or 0, vr, text.encode("latin-1"))
    raw += _element(0x7FE00010, "OW", bytes(16))
    try:
        _agrees(raw, ExplicitVRLittleEndian, 10_000, path)
    except (CannotUnderstand, *MALFORMED) as error:
        pytest.fail(f"read from the first bytes, but pydicom says {type(error).__name__}")


def _empty() -> Dataset:
    dataset = ct_series(1, 2, 2)[0]
    for element in list(dataset):
        if element.tag > 0x00020010:
            del dataset[element.tag]
    dataset.SOPClassUID = dataset.SOPInstanceUID = "1.2"
    return dataset


def _element(tag: int, vr: str, value: bytes) -> bytes:
    length = len(value).to_bytes(2, "little")
    if vr in ("UN", "OW"):
        length = bytes(2) + len(value).to_bytes(4, "little")
    group, element = (tag >> 16).to_bytes(2, "little"), (tag & 0xFFFF).to_bytes(2, "little")
    return group + element + vr.encode() + length + value


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"]
)
def test_the_first_bytes_of_an_ordinary_image_are_enough(syntax: str, path: Path) -> None:
    raw = _file(syntax)
    assert _agrees(raw, syntax, len(raw), path)
    head = PLAIN.read(raw[_body(raw) :], syntax) or {}
    assert plane_of(head) is not None
    assert expected_values(head)["NumberOfTimeSlices"] == 3


def test_what_the_first_bytes_cannot_tell_is_not_guessed() -> None:
    raw = _file(ExplicitVRLittleEndian)
    body = raw[_body(raw) :]
    assert PLAIN.read(body[:100], ExplicitVRLittleEndian) is None
    assert PLAIN.read(b"", ExplicitVRLittleEndian) is None
    assert PLAIN.read(body, DeflatedExplicitVRLittleEndian) is None
    assert PLAIN.read(body, ExplicitVRBigEndian) is None


def test_items_within_items_are_stepped_over(path: Path) -> None:
    """Sequences and items of undefined length, which hold the same attributes again."""
    item = b"\xfe\xff\x00\xe0" + b"\xff\xff\xff\xff"
    ends = b"\xfe\xff\x0d\xe0" + bytes(4), b"\xfe\xff\xdd\xe0" + bytes(4)
    for depth in (1, 3, 40, 200):
        nested = _element(0x00080060, "CS", b"XX")
        for _ in range(depth):
            open_ = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"
            nested = open_ + item + nested + ends[0] + ends[1]
        raw = file_bytes(_empty()) + _element(0x00080060, "CS", b"CT") + nested
        raw += _element(0x0020000E, "UI", b"1.5\0") + _element(0x7FE00010, "OW", bytes(16))
        head = PLAIN.read(raw[_body(raw) :], ExplicitVRLittleEndian)
        assert (head is None) == (depth > 32)
        if head is not None:
            assert (head["Modality"], head["SeriesInstanceUID"]) == ("CT", "1.5")
            assert _agrees(raw, ExplicitVRLittleEndian, len(raw), path)


@pytest.mark.parametrize("vr", ["SQ", "IS", "UN"])
def test_a_number_that_is_a_sequence_is_left_to_pydicom(vr: str) -> None:
    length = (b"" if vr == "IS" else bytes(2)) + b"\xff" * (2 if vr == "IS" else 4)
    raw = file_bytes(_empty()) + b"\x28\0\x08\0" + vr.encode() + length
    raw += b"\xfe\xff\xdd\xe0" + bytes(4) + _element(0x7FE00010, "OW", bytes(16))
    assert PLAIN.read(raw[_body(raw) :], ExplicitVRLittleEndian) is None
    implicit = raw[: _body(raw)] + b"\x28\0\x08\0" + b"\xff" * 4 + bytes(60)
    assert PLAIN.read(implicit[_body(raw) :], ImplicitVRLittleEndian) is None


def test_real_images_are_read_alike(real_dicom: Path, path: Path) -> None:
    """One image of each folder; most of them need no second look."""
    folders: dict[Path, Path] = {}
    for image in sorted(real_dicom.rglob("*.dcm")):
        folders.setdefault(image.parent, image)
    enough = []
    for image in folders.values():
        raw = image.read_bytes()
        if raw[128:132] == b"DICM":
            syntax = str(read_file_meta_info(image).TransferSyntaxUID)
            enough.append(_agrees(raw, syntax, 16_384, path))
    assert sum(enough) > 0.7 * len(enough)
