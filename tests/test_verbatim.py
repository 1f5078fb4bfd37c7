"""What odd text and odd attributes become, by the whole path from files to derived files.

Each case is one that a real object showed: names in the bytes of PS3.5 Annexes H to K, or in
another character set than the one declared.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.uid import JPEGLSLossless

from dicomnode.config import Companions, Route
from dicomnode.errors import SeriesRefused
from dicomnode.imaging.inference import Model, load_model
from dicomnode.imaging.package import read_package
from dicomnode.imaging.pixels import encoding_of
from dicomnode.orders import Order, Outcome
from dicomnode.part10 import damage_in, read_instances
from dicomnode.translating import translate
from tests.factories import ct_series, enhanced, pet_series, write_series
from tests.peers import identity_package

NOW = datetime(2026, 11, 21, 10, 30, tzinfo=UTC)
TEXTS = ("PatientName", "PatientID", "StudyDescription", "InstitutionName", "PatientComments")
LATIN_AS_UTF8 = b"M\xfcller^J\xf6rg"
SENT: dict[str, tuple[str, bytes]] = {  # SpecificCharacterSet, text as a sender wrote it
    "escapes at every delimiter": (
        "\\ISO 2022 IR 149",
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6",
    ),
    "an escape back that needs not be": ("\\ISO 2022 IR 149", b"\x1b$)C\xb1\xe8\xc8\xf1\x1b(B"),
    "Japanese": ("\\ISO 2022 IR 87", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"),
    "half-width katakana": ("ISO_IR 13", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3"),
    "a trailing delimiter": ("ISO_IR 192", "Wang^XiaoDong=王^小東=".encode()),
    "Arabic without a second escape": ("\\ISO 2022 IR 127", b"\x1b-G\xe2\xc8\xc7^\xe4\xe6\xd2"),
    "Latin 1 called UTF-8": ("ISO_IR 192", LATIN_AS_UTF8),
    "an unknown character set": ("ISO_IR 999", LATIN_AS_UTF8),
    "leading blanks": ("ISO_IR 100", b"  0012^A"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = identity_package(tmp_path_factory.mktemp("models"))
    return load_model(read_package(folder), precision="fp32")


ALONE = Companions(gsps="none", report=False)


def translated(
    model: Model, files: list[Path], results: Path, beside: Companions = ALONE
) -> Outcome:
    route = Route("r", match={}, model="identity", send_to=(), qa="off", companions=beside)
    return translate(Order.of(route, tuple(files), results, NOW), {"identity": model}, {})


def derived_of(outcome: Outcome, results: Path) -> list[Dataset]:
    """Everything that was made: images first, then their companions."""
    assert outcome.series, (outcome.refusal, outcome.broken, outcome.detail)
    made = [dcmread(path) for one in outcome.series for path in (results / one.uid).iterdir()]
    return sorted(made, key=lambda ds: "Rows" not in ds)


def with_bytes(datasets: list[Dataset], texts: dict[str, bytes], folder: Path) -> list[Path]:
    """Files in which texts are these very bytes, and are not what pydicom would write."""
    marks = {}
    for number, (keyword, data) in enumerate(texts.items()):
        data += b" " * (len(data) % 2)
        marks[f"{number:x}".rjust(len(data), "@").encode()] = data
        for ds in datasets:
            setattr(ds, keyword, f"{number:x}".rjust(len(data), "@"))
    files = write_series(datasets, folder)
    for path in files:
        content = path.read_bytes()
        for mark, data in marks.items():
            assert mark in content
            content = content.replace(mark, data)
        path.write_bytes(content)
    return files


def written(dataset: Dataset, keyword: str) -> bytes:
    element = dataset.get_item(tag_for_keyword(keyword))
    assert isinstance(element, RawDataElement)
    return bytes(element.value or b"")


@pytest.mark.parametrize("case", SENT)
@pytest.mark.parametrize("frames", [False, True], ids=["classic", "enhanced"])
def test_text_is_in_the_very_bytes_it_was_sent_in(
    case: str, frames: bool, model: Model, tmp_path: Path
) -> None:
    character_set, data = SENT[case]
    series = ct_series(3, character_set=None, SpecificCharacterSet=character_set.split("\\"))
    made = [enhanced(series)] if frames else series
    files = with_bytes(made, dict.fromkeys(TEXTS, data), tmp_path / "in")
    beside = ALONE if frames else Companions()
    objects = derived_of(translated(model, files, tmp_path / "out", beside), tmp_path / "out")
    source = dcmread(files[0])
    assert len(objects) == (3 if frames else 5)
    for ds in objects:
        assert ds.SpecificCharacterSet == source.SpecificCharacterSet
        for keyword in TEXTS:
            if keyword != "InstitutionName" or "Rows" in ds:
                assert written(ds, keyword) == written(source, keyword)


@pytest.mark.parametrize("case", ["half-width katakana", "Latin 1 called UTF-8", "leading blanks"])
def test_the_description_keeps_what_cannot_be_encoded_again(
    case: str, model: Model, tmp_path: Path
) -> None:
    character_set, data = SENT[case]
    series = ct_series(2, character_set=None, SpecificCharacterSet=character_set)
    files = with_bytes(series, {"SeriesDescription": data}, tmp_path / "in")
    for ds in derived_of(translated(model, files, tmp_path / "out"), tmp_path / "out"):
        assert written(ds, "SeriesDescription").rstrip() == data.strip() + b" [SYN identity]"


def test_text_within_a_sequence_keeps_its_bytes(model: Model, tmp_path: Path) -> None:
    item = Dataset()
    item.RequestedProcedureID, item.RequestedProcedureDescription = "1", "@" * 8
    item.add_new(0x00400FFF, "LO", "no attribute of the standard")
    series = ct_series(2, character_set=None, SpecificCharacterSet="ISO_IR 13")
    for ds in series:
        ds.RequestAttributesSequence = [item]
    files = write_series(series, tmp_path / "in")
    katakana = b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3"
    for path in files:
        path.write_bytes(path.read_bytes().replace(b"@" * 8, katakana))
    for ds in derived_of(translated(model, files, tmp_path / "out"), tmp_path / "out")[:2]:
        assert written(ds.RequestAttributesSequence[0], "RequestedProcedureDescription") == katakana


def test_a_value_in_another_vr_comes_in_the_standards(model: Model, tmp_path: Path) -> None:
    series = ct_series(2)
    for ds in series:
        for keyword, vr, value in (
            ("PixelSpacing", "FD", [0.703125, 1 / 3]),
            ("InstitutionName", "SH", "Clinic"),
            ("StudyDate", "LO", "20250102"),
            ("DataCollectionDiameter", "LO", "unknown"),
            ("StudyDescription", "SQ", [Dataset()]),
            ("ReferencedImageSequence", "LO", "none"),
        ):
            ds[keyword] = DataElement(tag_for_keyword(keyword) or 0, vr, value)
    files = write_series(series, tmp_path / "in")
    image = derived_of(translated(model, files, tmp_path / "out"), tmp_path / "out")[0]
    assert all(len(text.strip()) <= 16 for text in written(image, "PixelSpacing").split(b"\\"))
    assert image.PixelSpacing == pytest.approx([0.703125, 1 / 3])
    kept = ("PixelSpacing", "InstitutionName", "StudyDate")
    assert [image[keyword].VR for keyword in kept] == ["DS", "LO", "DA"]
    for keyword in ("DataCollectionDiameter", "StudyDescription", "ReferencedImageSequence"):
        assert keyword not in image


@pytest.mark.parametrize(
    "time", ["240000", "072760", "-72700", "0727"], ids=["24:00", "60 s", "sign", "short"]
)
def test_an_acquisition_time_that_no_clock_shows_stops_nothing(
    time: str, model: Model, tmp_path: Path
) -> None:
    files = write_series(ct_series(2, AcquisitionTime=time), tmp_path / "in")
    assert derived_of(translated(model, files, tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize(
    ("width", "function"),
    [("0", None), ("-400", None), ("0.5", None), ("0", "SIGMOID"), ("1e999", None)],
)
def test_what_is_no_window_is_not_copied(
    width: str, function: str | None, model: Model, tmp_path: Path
) -> None:
    given = {"WindowCenter": "40", "WindowWidth": width, "VOILUTFunction": function}
    files = write_series(ct_series(2, **given), tmp_path / "in")
    outcome = translated(model, files, tmp_path / "out", Companions(report=False))
    for ds in derived_of(outcome, tmp_path / "out"):
        assert "WindowWidth" not in ds
        assert "SoftcopyVOILUTSequence" not in ds


def test_a_narrow_window_of_a_sigmoid_is_one(model: Model, tmp_path: Path) -> None:
    given = {"WindowCenter": "40", "WindowWidth": "0.5", "VOILUTFunction": "SIGMOID"}
    files = write_series(ct_series(2, **given), tmp_path / "in")
    image = derived_of(translated(model, files, tmp_path / "out"), tmp_path / "out")[0]
    assert (image.WindowWidth, image.VOILUTFunction) == (0.5, "SIGMOID")


def deleted(keyword: str) -> Callable[[Dataset], None]:
    return lambda ds: ds.pop(keyword, None)


def given(keyword: str, value: Any) -> Callable[[Dataset], None]:
    return lambda ds: setattr(ds, keyword, value)


def lut(ds: Dataset) -> None:
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [2, 0, 16], "HU"
    item.add_new("LUTData", "OW", b"\0\0\1\0")
    ds.ModalityLUTSequence = [item]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (given("SliceThickness", ["2.5", "2.5"]), "UNREADABLE", "SliceThickness is missing or"),
        (given("RescaleSlope", None), "NOT_HU", "no RescaleSlope"),
        (given("RescaleIntercept", None), "NOT_HU", "no RescaleIntercept"),
        (deleted("RescaleIntercept"), "NOT_HU", "no RescaleIntercept"),
        (given("BitsStored", [12, 12]), "NOT_16_BIT", "BitsStored is missing or wrong"),
        (lut, "NOT_HU", "has a Modality LUT"),
        (deleted("Modality"), "WRONG_MODALITY", "Modality is not CT"),
        (deleted("SamplesPerPixel"), "UNDECODABLE", "SamplesPerPixel is missing"),
        (deleted("PixelRepresentation"), "UNDECODABLE", "PixelRepresentation is missing"),
        (deleted("StudyInstanceUID"), "MIXED_SERIES", "StudyInstanceUID is missing or differs"),
        (given("LossyImageCompression", "1"), "LOSSY", "lossy"),
        (given("LossyImageCompressionRatio", "8"), "LOSSY", "lossy"),
        (given("LossyImageCompressionMethod", "ISO_10918_1"), "LOSSY", "lossy"),
    ],
)
def test_what_nobody_can_know_is_refused_for_its_true_reason(
    change: Callable[[Dataset], None], code: str, words: str, model: Model, tmp_path: Path
) -> None:
    series = ct_series(2)
    for ds in series:
        change(ds)
    outcome = translated(model, write_series(series, tmp_path / "in"), tmp_path / "out")
    assert (outcome.broken, outcome.refusal) == ("", code)
    assert words in outcome.detail


def test_pet_without_a_slope_has_no_activity() -> None:
    (ds, *_) = pet_series(2)
    del ds.RescaleSlope
    with pytest.raises(SeriesRefused, match="no RescaleSlope") as caught:
        encoding_of(ds)
    assert caught.value.code == "NO_RESCALE"


def test_lossless_that_says_so_is_not_lossy(model: Model, tmp_path: Path) -> None:
    given = {"LossyImageCompression": "00", "LossyImageCompressionRatio": "1"}
    files = write_series(ct_series(2, **given), tmp_path / "in")
    assert derived_of(translated(model, files, tmp_path / "out"), tmp_path / "out")


def test_repeats_do_not_hide_what_the_instances_are(model: Model, tmp_path: Path) -> None:
    series = ct_series(1, SOPClassUID="1.2.840.10008.5.1.4.1.1.7") * 3
    outcome = translated(model, write_series(series, tmp_path / "in"), tmp_path / "out")
    assert outcome.refusal == "NOT_CT_MR_PET"


def test_a_file_cut_off_and_one_without_its_uid_are_told_apart(
    model: Model, tmp_path: Path
) -> None:
    (whole,) = write_series(ct_series(1, 64, 64, syntax=JPEGLSLossless), tmp_path / "cut")
    whole.write_bytes(whole.read_bytes()[:-8])
    assert "cut off" in translated(model, [whole], tmp_path / "out").detail
    (ds,) = ct_series(1)
    del ds.SOPInstanceUID
    path = tmp_path / "nameless.dcm"
    ds.save_as(path)
    assert "SOPInstanceUID is missing" in translated(model, [path], tmp_path / "out").detail


def test_damage_is_not_blamed_on_a_harmless_vr(tmp_path: Path) -> None:
    (ds,) = ct_series(1, KVP="120")
    ds.LongitudinalTemporalInformationModified = "MODIFIED"
    ds["LongitudinalTemporalInformationModified"].VR = "LO"
    (path,) = write_series([ds], tmp_path)
    assert damage_in(read_instances([path])).startswith("LongitudinalTemporalInformationModified")
    header = b"\x18\x00\x60\x00DS\x04\x00"
    content = path.read_bytes()
    assert header + b"120 " in content
    path.write_bytes(content.replace(header + b"120 ", header + b"n/a "))
    assert damage_in(read_instances([path])) == "KVP cannot be read"
