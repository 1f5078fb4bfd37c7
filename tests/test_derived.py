"""A translated CT comes back as a derived series that says what it is and keeps every HU."""

import dataclasses
import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicomnode.derived import (
    Identity,
    OutputOptions,
    derive_series,
    derived_instance_uid,
    derived_series_uid,
    source_digests,
)
from dicomnode.errors import ConfigError, SeriesRefused
from dicomnode.imaging.marks import is_synthetic
from dicomnode.imaging.pixels import encoding_of
from dicomnode.imaging.units import Unit
from dicomnode.imaging.volume import Volume, volume_from_datasets
from tests.factories import (
    AXIAL,
    CANARY,
    CORONAL,
    NAMES,
    SAGITTAL,
    TILTED,
    changed,
    ct_series,
    file_bytes,
    write_series,
)
from tests.judges import judge

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "dicom" / "ct"
NOW = datetime(2026, 3, 4, 23, 30, 15, 250000, tzinfo=UTC)
DENOISER = Identity(
    name="ldct-denoise",
    version="1.2.0",
    digest="ab" * 32,
    architecture="residual_denoiser",
    task="denoise",
    algorithm_name="LDCT denoiser",
    algorithm_family="Deep learning",
    algorithm_version="1.2.0",
    node_version="0.1.0",
    precision="fp32 cpu",
)
ENCODINGS: dict[str, dict[str, Any]] = {
    "12 bit": {},
    "signed 16 with padding": {"signed": True, "bits_stored": 16, "padding": -2000},
    "padding as US": {"signed": True, "bits_stored": 16, "padding": -2000, "padding_vr": "US"},
    "padding in range": {"signed": True, "bits_stored": 16, "intercept": "0", "padding": -1500},
    "intercept -8192": {"bits_stored": 16, "intercept": "-8192"},
    "slope 0.5": {"bits_stored": 13, "slope": "0.5", "intercept": "-1000.25"},
    "slope 1.7": {"signed": True, "bits_stored": 14, "slope": "1.70000", "intercept": "+24"},
    "negative slope": {"signed": True, "bits_stored": 16, "slope": "-1", "intercept": "-24"},
}


def as_task(task: str) -> Identity:
    """The same model, said to do something else."""
    return dataclasses.replace(DENOISER, task=task)


def derive(
    datasets: Sequence[Dataset],
    change: NDArray[np.float32] | float = 0.0,
    identity: Identity = DENOISER,
    options: OutputOptions | None = None,
    now: datetime = NOW,
    unit: Unit = "HU",
    to: Unit = "HU",
) -> tuple[Volume, Volume, list[Dataset]]:
    """Source volume in `unit`, prediction (source plus `change`, in `to`), derived instances."""
    source, ordered = volume_from_datasets(datasets, unit, min_slices=1)
    prediction = source.with_voxels((source.voxels + change).astype(np.float32), to)
    derived = derive_series(prediction, source, ordered, identity, options or OutputOptions(), now)
    return source, prediction, list(derived)


def judged(
    datasets: Sequence[Dataset], folder: Path, change: NDArray[np.float32] | float = 0.0
) -> dict[str, list[str]]:
    """What the foreign programs find in the derived series beside its source."""
    source, prediction, derived = derive(datasets, change)
    _, ordered = volume_from_datasets(datasets)
    native = True if source.padding is None else ~source.padding
    return judge(
        write_series(ordered, folder / "source"),
        write_series(derived, folder / "derived"),
        prediction.voxels,
        native,
    )


def received(datasets: Sequence[Dataset]) -> list[Dataset]:
    """Through a file and back."""
    return [dcmread(BytesIO(file_bytes(ds))) for ds in datasets]


def uids_of(datasets: Sequence[Dataset]) -> set[str]:
    return {str(uid) for ds in datasets for uid in (ds.SOPInstanceUID, ds.SeriesInstanceUID)}


def noise(shape: tuple[int, ...], sigma: float = 20.0) -> NDArray[np.float32]:
    return np.random.default_rng(5).normal(0, sigma, shape).astype(np.float32)


# Values


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_a_model_that_changes_nothing_gives_back_every_stored_value(
    encoding: dict[str, Any],
) -> None:
    series = ct_series(4, **encoding)
    _, _, derived = derive(series, identity=dataclasses.replace(DENOISER, task="identity"))
    for source, ds in zip(series, received(derived), strict=True):
        assert np.array_equal(ds.pixel_array, source.pixel_array)
        for keyword in ("RescaleSlope", "RescaleIntercept", "BitsStored", "PixelRepresentation"):
            assert ds[keyword].value == source[keyword].value
    again, _ = volume_from_datasets(received(derived))
    assert again.digests == volume_from_datasets(series)[0].digests


@settings(max_examples=25, deadline=None)
@given(
    bits_stored=st.integers(12, 16),
    signed=st.booleans(),
    slope=st.sampled_from(["1", "0.5", "0.25", "2", "1.7", "-1"]),
    intercept=st.sampled_from(["-1024", "0", "-8192", "-1000.5"]),
    padded=st.booleans(),
    sigma=st.sampled_from([3.0, 300.0, 3000.0]),
)
def test_any_prediction_is_stored_within_half_a_quantum_and_padding_stays(
    bits_stored: int, signed: bool, slope: str, intercept: str, padded: bool, sigma: float
) -> None:
    series = ct_series(
        2,
        12,
        14,
        bits_stored=bits_stored,
        signed=signed,
        slope=slope,
        intercept=intercept,
        padding=(-2000 if signed else 7) if padded else None,
    )
    source, prediction, derived = derive(series, noise((2, 12, 14), sigma))
    read, _ = volume_from_datasets(received(derived))
    mask = np.zeros(source.voxels.shape, bool) if source.padding is None else source.padding
    assert np.array_equal(mask, np.zeros_like(mask) if read.padding is None else read.padding)
    for index, ds in enumerate(derived):
        encoding = encoding_of(ds)
        clash = encoding.is_padding(encoding.to_stored(prediction.voxels[index]))
        allowed = np.where(False if clash is None else clash, 1.5, 0.5) * abs(encoding.slope)
        error = np.abs(read.voxels[index] - prediction.voxels[index])
        assert np.all((error <= allowed + 1e-3) | mask[index])
    if padded:
        assert np.abs(read.voxels - source.voxels)[mask].max() <= 0.5


def test_values_that_do_not_fit_make_the_whole_series_signed_16_bit() -> None:
    series = ct_series(3, slope="0.5", bits_stored=13)
    change = np.zeros((3, 32, 40), np.float32)
    change[1, 5, 5] = -3000
    _, prediction, derived = derive(series, change)
    assert {(ds.BitsStored, ds.PixelRepresentation, str(ds.RescaleSlope)) for ds in derived} == {
        (16, 1, "1")
    }
    read, _ = volume_from_datasets(received(derived))
    assert np.abs(read.voxels - prediction.voxels).max() <= 0.5


def test_no_native_pixel_is_stored_as_padding() -> None:
    series = ct_series(2, signed=True, bits_stored=16, intercept="0", padding=-1500)
    source, _ = volume_from_datasets(series)
    assert source.padding is not None
    change = np.where(source.padding, 700, -1500 - source.voxels).astype(np.float32)
    change[0, 20, 20] += 0.3
    change[0, 21, 21] -= 0.3
    _, _, derived = derive(series, change)
    stored = np.stack([ds.pixel_array for ds in derived])
    assert np.array_equal(stored == -1500, source.padding)
    assert np.abs(stored[~source.padding] + 1500).max() == 1
    assert (stored[0, 20, 20], stored[0, 21, 21]) == (-1499, -1501)


@pytest.mark.parametrize(
    ("value", "code"), [(np.nan, "OUTPUT_NOT_FINITE"), (1e6, "OUTPUT_OUT_OF_RANGE")]
)
def test_a_prediction_that_is_no_ct_is_refused(value: float, code: str) -> None:
    change = np.zeros((3, 32, 40), np.float32)
    change[1, 2, 3] = value
    with pytest.raises(SeriesRefused) as caught:
        derive(ct_series(3), change)
    assert caught.value.code == code


def test_a_task_that_nobody_knows_is_refused() -> None:
    with pytest.raises(SeriesRefused) as caught:
        derive(ct_series(3), identity=dataclasses.replace(DENOISER, task="guess"))
    assert caught.value.code == "UNKNOWN_TASK"


def test_instances_in_another_order_than_the_volume_are_an_error() -> None:
    source, ordered = volume_from_datasets(ct_series(3))
    with pytest.raises(ValueError, match="slice order"):
        derive_series(source, source, ordered[::-1], DENOISER, OutputOptions(), NOW)
    with pytest.raises(ValueError, match="zone"):
        derive_series(source, source, ordered, DENOISER, OutputOptions(), NOW.replace(tzinfo=None))


# Identity


def test_the_same_input_gives_the_same_bytes_in_any_order_and_syntax() -> None:
    series = ct_series(4, private=True, character_set="\\ISO 2022 IR 149")
    first = [file_bytes(ds) for ds in derive(series, 1.5)[2]]
    assert [file_bytes(ds) for ds in derive(series[::-1], 1.5)[2]] == first
    for syntax in (JPEGLSLossless, RLELossless, DeflatedExplicitVRLittleEndian):
        packed = ct_series(4, private=True, character_set="\\ISO 2022 IR 149", syntax=syntax)
        assert [file_bytes(ds) for ds in derive(packed, 1.5)[2]] == first


def test_a_later_time_changes_bytes_but_no_uid() -> None:
    series = ct_series(3)
    one, other = derive(series)[2], derive(series, now=NOW + timedelta(hours=1))[2]
    assert [ds.SOPInstanceUID for ds in one] == [ds.SOPInstanceUID for ds in other]
    assert file_bytes(one[0]) != file_bytes(other[0])


@pytest.mark.parametrize(
    "variation",
    [
        {"identity": dataclasses.replace(DENOISER, digest="cd" * 32)},
        {"options": OutputOptions(series_number="+2000")},
        {"options": OutputOptions(description="{source} [SYN2 {model}]")},
        {"options": OutputOptions(content_qualification="PRODUCT")},
        {"slices": 4},
        {"pixel": 1},
    ],
    ids=lambda variation: next(iter(variation)),
)
def test_another_package_option_or_set_of_images_shares_no_uid(variation: dict[str, Any]) -> None:
    series = ct_series(5)
    plain = derive(series)[2]
    other = changed(series[: variation.pop("slices", 5)])
    if variation.pop("pixel", 0):
        pixels = other[2].pixel_array.copy()
        pixels[3, 3] += 1
        other[2].PixelData = pixels.tobytes()
    varied = derive(other, **variation)[2]
    uids = [
        {str(u) for ds in s for u in (ds.SOPInstanceUID, ds.SeriesInstanceUID)}
        for s in (plain, varied)
    ]
    assert not uids[0] & uids[1]


@given(st.dictionaries(st.text("0123456789.", min_size=1), st.text("abcdef"), min_size=1))
def test_every_uid_is_a_version_5_uuid_and_independent_of_order(digests: dict[str, str]) -> None:
    options = OutputOptions()
    series = derived_series_uid(digests, "ab", options)
    assert derived_series_uid(dict(reversed(digests.items())), "ab", options) == series
    instances = {derived_instance_uid(series, uid) for uid in digests}
    assert len(instances | {series}) == len(digests) + 1
    for uid in instances | {series}:
        assert re.fullmatch(r"2\.25\.[1-9][0-9]{0,38}", uid)
        assert uuid.UUID(int=int(uid[5:])).version == 5


def test_digests_are_of_the_pixels_alone() -> None:
    series = ct_series(3)
    assert source_digests(series) == source_digests(changed(series, SeriesDescription="other"))
    assert tuple(source_digests(series).values()) == volume_from_datasets(series)[0].digests


# Attributes


def test_every_instance_says_that_it_is_synthetic_and_how_it_came_about() -> None:
    series = ct_series(3)
    for source, ds in zip(series, received(derive(series)[2]), strict=True):
        assert ds.SyntheticData == "YES"
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "AXIAL", "SYNTHETIC", "DENOISE"]
        assert ds.SeriesDescription == "Thorax 2.5 soft [SYN ldct-denoise]"
        assert ds.SeriesNumber == 1004
        assert ds.ContentQualification == "RESEARCH"
        assert ds.Manufacturer == "dicomnode"
        assert "NOT ACQUIRED" in ds.ImageComments
        for said in ("ldct-denoise", "1.2.0", "ab" * 32, "residual_denoiser", "fp32 cpu"):
            assert said in ds.DerivationDescription
        assert ds.DerivationCodeSequence[0].CodeValue == "DENOISE"
        assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert ds.RelatedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
        assert [
            (item.Manufacturer, item.PurposeOfReferenceCodeSequence[0].CodeValue)
            for item in ds.ContributingEquipmentSequence
        ] == [
            ("Phantom Works", "109101"),
            ("dicomnode", "109100"),
            ("Highdicom open-source contributors", "109102"),
        ]
        scanner, node, _ = ds.ContributingEquipmentSequence
        assert scanner.ContributionDateTime == "20250102102000.5"
        assert scanner.DeviceSerialNumber == "0815"
        assert "ab" * 32 in node.ContributionDescription
        assert ds.RescaleType == "HU"
        assert (ds.WindowCenter, ds.WindowWidth) == (40, 400)
        assert ds.WindowCenterWidthExplanation == "SOFT"
        assert ds.InstanceNumber == source.InstanceNumber


@pytest.mark.parametrize("character_set", NAMES, ids=str)
def test_name_and_character_set_are_byte_for_byte_the_sources(character_set: str | None) -> None:
    series = ct_series(2, character_set=character_set)
    for source, ds in zip(series, derive(series)[2], strict=True):
        ours = dcmread(BytesIO(file_bytes(ds)))
        theirs = dcmread(BytesIO(file_bytes(source)))
        for keyword in ("PatientName", "PatientID", "SpecificCharacterSet"):
            assert (keyword in ours) == (keyword in theirs)
            if keyword in theirs:
                assert ours.get_item(keyword).value == theirs.get_item(keyword).value


def test_nothing_that_is_not_on_the_list_leaves() -> None:
    series = ct_series(2, private=True)
    assert CANARY.encode() in file_bytes(series[0])
    for ds in derive(series)[2]:
        assert CANARY.encode() not in file_bytes(ds)
        assert ds.RequestAttributesSequence[0].ScheduledProcedureStepID == "R1"
        assert ds.ProcedureCodeSequence[0].CodeValue == "CT1"


def test_the_source_is_left_as_it_was() -> None:
    series = ct_series(3, private=True)
    before = [file_bytes(ds) for ds in series]
    for ds in derive(series)[2]:
        ds.RequestAttributesSequence[0].ScheduledProcedureStepID = "changed"
        ds.PatientName = "changed"
        ds.PixelSpacing[0] = 9
    assert [file_bytes(ds) for ds in series] == before


def test_the_contrast_agent_is_kept_if_there_was_one() -> None:
    with_agent = derive(ct_series(2, ContrastBolusAgent="Iomeprol", ContrastBolusVolume="90"))[2]
    assert (with_agent[0].ContrastBolusAgent, with_agent[0].ContrastBolusVolume) == ("Iomeprol", 90)
    assert "ContrastBolusAgent" not in derive(ct_series(2, ContrastBolusAgent=""))[2][0]


@pytest.mark.parametrize("center", ["", None])
def test_a_window_is_not_invented(center: str | None) -> None:
    assert "WindowCenter" not in derive(ct_series(2, WindowCenter=center))[2][0]


def test_a_window_at_zero_is_a_window() -> None:
    ds = derive(ct_series(2, WindowCenter="0", WindowWidth="1"))[2][0]
    assert (ds.WindowCenter, ds.WindowWidth) == (0, 1)


def test_malformed_values_of_the_source_do_not_stop_it() -> None:
    series = ct_series(2, PatientWeight="71.25", Exposure=123)
    for old, new in ((b"71.25 ", b"70 kg "), (b"123 ", b"1x3 "), (b"19600229", b"1960ABCD")):
        series = [dcmread(BytesIO(file_bytes(ds).replace(old, new))) for ds in series]
    with pytest.warns(UserWarning, match="Invalid value for VR IS"):
        derived = derive(series)[2]
    written = received(derived)[0]
    assert (written.PatientWeight, written.PatientBirthDate) == ("70 kg", "1960ABCD")


def test_what_must_be_there_is_written_empty_if_the_source_has_it_not() -> None:
    type_2 = ("KVP", "AcquisitionNumber", "PositionReferenceIndicator", "PatientBirthDate")
    ds = received(derive(ct_series(2, **dict.fromkeys(type_2)))[2])[0]
    for keyword in type_2:
        assert ds[keyword].VM == 0


def test_times_are_those_of_the_sources_time_zone() -> None:
    korean = derive(ct_series(2, TimezoneOffsetFromUTC="+0900"))[2][0]
    assert (korean.InstanceCreationDate, korean.ContentTime) == ("20260305", "083015.250000")
    node = korean.ContributingEquipmentSequence[-1]
    assert str(node.ContributionDateTime) == "20260305083015.250000+0900"
    local = derive(ct_series(2), now=NOW.astimezone(timezone(timedelta(hours=-5))))[2][0]
    assert (local.SeriesDate, local.SeriesTime) == ("20260304", "183015.250000")
    assert "TimezoneOffsetFromUTC" not in local


def test_a_source_without_frame_of_reference_gets_one_for_all_slices() -> None:
    derived = derive(ct_series(3, FrameOfReferenceUID=None))[2]
    assert len({ds.FrameOfReferenceUID for ds in derived}) == 1
    assert derived[0].FrameOfReferenceUID.startswith("2.25.")


def test_lossy_compression_of_the_source_is_said_with_its_method_and_ratio() -> None:
    series = ct_series(2)
    for ds in series:
        ds.compress(JPEGLSNearLossless, jls_error=2, generate_instance_uid=False)
    source, ordered = volume_from_datasets(received(series), allow_lossy=True)
    ds = next(derive_series(source, source, ordered, DENOISER, OutputOptions(), NOW))
    assert (ds.LossyImageCompression, ds.LossyImageCompressionMethod) == ("01", "ISO_14495_1")
    assert ds.LossyImageCompressionRatio > 1
    again = changed(series, LossyImageCompressionRatio="7.5", LossyImageCompressionMethod="OTHER")
    source, ordered = volume_from_datasets(again, allow_lossy=True)
    ds = next(derive_series(source, source, ordered, DENOISER, OutputOptions(), NOW))
    assert (ds.LossyImageCompressionMethod, ds.LossyImageCompressionRatio) == ("OTHER", 7.5)


def test_the_longest_derivation_description_fits_and_ends_with_not_acquired() -> None:
    long = {f.name: "x" * 300 for f in dataclasses.fields(Identity)}
    identity = Identity(**{**long, "digest": "ab" * 32, "task": "denoise"})
    text = derive(ct_series(2), identity=identity)[2][0].DerivationDescription
    assert len(text) <= 1024
    assert text.endswith("; not acquired")


def test_unusable_instance_numbers_are_counted_anew_along_the_stack() -> None:
    assert [ds.InstanceNumber for ds in derive(ct_series(3, InstanceNumber=0))[2]] == [1, 2, 3]


def test_a_derived_source_that_lists_its_scanner_names_its_maker_as_processing() -> None:
    series = received(derive(ct_series(3))[2])
    again = derive(series)[2][0]
    purposes = [
        item.PurposeOfReferenceCodeSequence[0].CodeValue
        for item in again.ContributingEquipmentSequence
    ]
    assert purposes == ["109101", "109100", "109102", "109102", "109100", "109102"]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.from_regex(r"[a-z][a-z0-9-]{0,70}", fullmatch=True))
def test_the_marker_is_never_cut_off_the_description(source: str, model: str) -> None:
    series = changed(ct_series(2, 4, 4, character_set="ISO_IR 192"))
    for ds in series:
        ds.add(pydicom.DataElement("SeriesDescription", "LO", source, already_converted=True))
    text = derive(series, identity=dataclasses.replace(DENOISER, name=model))[2][
        0
    ].SeriesDescription
    assert len(text) <= 64
    assert re.search(r"\[SYN [a-z0-9-]+~?\]$", text)
    if len(source) > 64 and source.isprintable() and not source.isspace():
        assert "~" in text


def test_a_long_description_is_cut_before_the_marker() -> None:
    text = derive(ct_series(2, SeriesDescription="x" * 64))[2][0].SeriesDescription
    assert text == "x" * 44 + "~ [SYN ldct-denoise]"
    assert len(text) == 64


def test_the_remark_of_a_demonstration_is_never_cut() -> None:
    identity = dataclasses.replace(DENOISER, name="m" * 80, remark="LIMB DEMO")
    options = OutputOptions(
        description="{source} " + "Y" * 39 + "{model}", stack=2, stack_name="s" * 30
    )
    series = ct_series(2, SeriesDescription="x" * 64)
    text = derive(series, identity=identity, options=options)[2][0].SeriesDescription
    assert len(text) <= 64
    assert "LIMB DEMO (stack 2" in text


@pytest.mark.parametrize(
    ("rule", "source", "number"),
    [("+1000", 4, 1004), (7, 4, 7), ("+5", None, 5), ("+1000", 2147483000, 1000)],
)
def test_the_series_number_follows_the_route(
    rule: str | int, source: int | None, number: int
) -> None:
    series = ct_series(2, SeriesNumber=source)
    assert derive(series, options=OutputOptions(series_number=rule))[2][0].SeriesNumber == number


@pytest.mark.parametrize(
    "wrong",
    [
        {"series_number": "1000+"},
        {"series_number": 0},
        {"description": "{source}"},
        {"description": "{source} [합성]"},
        {"description": "{source} a\\b"},
        {"description": "{source} " + "x" * 41},
        {"content_qualification": "research"},
    ],
    ids=str,
)
def test_options_that_cannot_be_used_name_the_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: "):
        OutputOptions(**wrong)


def test_a_source_for_research_is_never_upgraded() -> None:
    series = ct_series(2, ContentQualification="SERVICE")
    options = OutputOptions(content_qualification="PRODUCT")
    assert derive(series, options=options)[2][0].ContentQualification == "SERVICE"


def test_the_loop_guard_knows_our_own_and_others_synthetic_images() -> None:
    series = ct_series(2)
    assert not is_synthetic(series[0])
    ours = received(derive(series)[2])[0]
    assert is_synthetic(ours)
    del ours.SyntheticData
    assert is_synthetic(ours)
    ours.Manufacturer = "Archive that coerces"
    assert is_synthetic(ours)
    assert is_synthetic(changed(series, SyntheticData="YES")[0])


# Foreign programs


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_foreign_programs_accept_every_encoding(encoding: dict[str, Any], tmp_path: Path) -> None:
    assert judged(ct_series(3, **encoding), tmp_path, noise((3, 32, 40))) == {}


@pytest.mark.parametrize("character_set", NAMES, ids=str)
def test_foreign_programs_read_the_names(character_set: str | None, tmp_path: Path) -> None:
    assert judged(ct_series(2, character_set=character_set), tmp_path) == {}


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL, TILTED], ids=str)
@pytest.mark.parametrize("patient_position", ["HFS", "FFP"])
def test_foreign_programs_see_the_same_geometry(
    orientation: tuple[float, ...], patient_position: str, tmp_path: Path
) -> None:
    travel = (0, 0, 1) if orientation == TILTED else None
    series = ct_series(3, orientation=orientation, patient_position=patient_position, travel=travel)
    assert judged(series[::-1], tmp_path) == {}


def test_foreign_programs_accept_a_series_with_contrast_and_orders(tmp_path: Path) -> None:
    series = ct_series(2, private=True, ContrastBolusAgent="Iomeprol", Laterality="")
    assert judged(series, tmp_path) == {}


@pytest.mark.parametrize(
    "folder",
    [
        "chest_contrast_LIDC-IDRI-0001_jpegls",
        "noncontrast_chest_RICORD-1A-001012_jpeglossless",
        "contrast_abdomen_GE_CRLM-CT-1004",
        "brain_gantry_tilt_18.5deg_GE",
    ],
)
def test_foreign_programs_accept_what_is_derived_of_real_ct(folder: str, tmp_path: Path) -> None:
    if not (REAL / folder).is_dir():
        pytest.skip(f"no real data at {REAL / folder}")
    files = sorted((REAL / folder).rglob("*.dcm"))
    every = sorted(
        (dcmread(path) for path in files), key=lambda ds: float(ds.ImagePositionPatient[2])
    )
    series = every[10:14]
    assert judged(series, tmp_path, noise((4, 512, 512), 15)) == {}
    for source, ds in zip(series, derive(series)[2], strict=True):
        assert np.array_equal(ds.pixel_array, source.pixel_array)


def test_foreign_programs_accept_what_is_derived_of_pydicoms_ct(tmp_path: Path) -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests" / "98892001"
    series = [dcmread(path) for path in sorted((folder / "CT5N").iterdir())]
    assert judged(series, tmp_path, noise((5, 16, 16))) == {}
