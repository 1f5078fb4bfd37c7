"""Frames of an enhanced instance are slices like any other."""

import warnings
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.frames import frame_number, frames_of, is_enhanced, slices_of
from dicomnode.imaging.pixels import stored_values
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import (
    CANARY,
    TILTED,
    changed,
    ct_series,
    enhanced,
    file_bytes,
    localizer,
    mr_series,
    not_an_image,
    pet_series,
    secondary_capture,
)

KINDS: tuple[tuple[Any, Any], ...] = (
    (ct_series, "HU"),
    (mr_series, "AU"),
    (pet_series, "BQML"),
    (pet_series, "SUV"),
)
SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
)


def same_volume(one: list[Dataset], other: list[Dataset], unit: Any) -> bool:
    """Whether two sets of instances give the same voxels in the same places."""
    a, b = (volume_from_datasets(datasets, unit)[0] for datasets in (one, other))
    return (
        np.array_equal(a.voxels, b.voxels)
        and np.array_equal(a.positions, b.positions)
        and np.array_equal(a.orientation, b.orientation)
        and a.spacing_mm == b.spacing_mm
        and a.digests == b.digests
        and a.frame_of_reference_uid == b.frame_of_reference_uid
    )


@pytest.mark.parametrize(("make", "unit"), KINDS)
def test_an_enhanced_instance_is_the_volume_of_the_classic_series(make: Any, unit: Any) -> None:
    series = make(4)
    assert same_volume([enhanced(series[::-1])], series, unit)
    groups = ["PlaneOrientationSequence"]
    assert same_volume([enhanced(series, shared=groups)], series, unit)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_frames_decode_from_every_lossless_transfer_syntax(syntax: UID) -> None:
    series = ct_series(3, padding=0)
    assert same_volume([enhanced(series, syntax=syntax)], series, "HU")


def test_a_stack_over_several_enhanced_instances_is_one_volume() -> None:
    series = ct_series(6)
    parts = [enhanced(series[4:]), enhanced(series[:4])]
    assert same_volume(parts, series, "HU")
    ordered = volume_from_datasets(parts)[1]
    assert [frame_number(header) for header in ordered] == [1, 2, 3, 4, 1, 2]
    assert [h.SOPInstanceUID for h in ordered[3:5]] == [d.SOPInstanceUID for d in parts[::-1]]


def test_a_frame_can_be_referred_to() -> None:
    series = mr_series(3)
    whole = enhanced(series)
    frames = frames_of(whole)
    assert [frame.number for frame in frames] == [1, 2, 3]
    for frame, ds in zip(frames, series, strict=True):
        assert frame.dataset is whole
        assert frame_number(frame.header) == frame.number
        assert frame.header.SOPInstanceUID == whole.SOPInstanceUID
        assert frame.header.SOPClassUID == whole.SOPClassUID
        assert np.array_equal(stored_values(frame.header), ds.pixel_array)


def test_a_header_reads_like_the_classic_image() -> None:
    series = mr_series(3, orientation=TILTED, EchoTime="12.5")
    for frame, ds in zip(frames_of(enhanced(series, temporal=[3, 3, 3])), series, strict=True):
        for keyword in [
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
            "SliceThickness",
            "ImageType",
            "EchoTime",
            "AcquisitionDate",
            "AcquisitionTime",
            "RescaleSlope",
            "PatientName",
            "Rows",
        ]:
            assert frame.header[keyword].value == ds[keyword].value, keyword
        assert str(frame.header.ImagePositionPatient) == str(ds.ImagePositionPatient)
        assert frame.header.TemporalPositionIdentifier == 3
        assert "NumberOfFrames" not in frame.header


def test_nothing_private_is_in_a_header() -> None:
    whole = enhanced(ct_series(2, private=True))
    assert CANARY in str(whole.PerFrameFunctionalGroupsSequence[0])
    for frame in frames_of(whole):
        assert not any(element.tag.is_private for element in frame.header)


def test_a_classic_instance_is_its_own_only_frame() -> None:
    dataset = ct_series(1)[0]
    (frame,) = frames_of(dataset)
    assert frame.header is frame.dataset is dataset
    assert frame.number is None
    assert frame_number(dataset) is None
    assert not is_enhanced(dataset)


def test_headers_given_again_are_the_same_slices() -> None:
    headers, _ = slices_of([enhanced(ct_series(4))])
    again, ignored = slices_of([headers[2], *headers])
    assert again == [headers[2], headers[0], headers[1], headers[3]]
    assert [(item.code, item.frame) for item in ignored] == [("REPEATED", None)]


def test_frames_are_known_without_pixel_data() -> None:
    whole = enhanced(ct_series(3))
    del whole.PixelData
    headers, ignored = slices_of([whole])
    assert len(headers) == 3
    assert ignored == []


def test_native_frames_are_views_into_the_instance() -> None:
    whole = enhanced(ct_series(3))
    for frame in frames_of(whole):
        assert isinstance(frame.header.PixelData, memoryview)
        assert frame.header.PixelData.obj is whole.PixelData


def test_what_is_no_slice_is_named() -> None:
    series = ct_series(2)
    mosaic = changed(mr_series(1, seed=3), ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])[0]
    hidden = mr_series(1, seed=2)[0]
    hidden.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 25)
    odd = [localizer(series[0]), not_an_image(series[0]), secondary_capture(series[0]), mosaic]
    slices, ignored = slices_of([*odd, hidden, *series, series[0]])
    assert slices == series
    assert [item.code for item in ignored] == [
        "LOCALIZER",
        "NOT_AN_IMAGE",
        "NOT_CT_MR_PET",
        "MOSAIC",
        "MOSAIC",
        "REPEATED",
    ]
    assert ignored[0].sop_instance_uid == odd[0].SOPInstanceUID


def test_functional_groups_that_do_not_fit_the_frames_are_no_geometry() -> None:
    whole = enhanced(ct_series(3))
    whole.NumberOfFrames = 4
    with pytest.raises(SeriesRefused) as caught:
        frames_of(whole)
    assert caught.value.code == "NO_GEOMETRY"


@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_pixel_data_that_does_not_fit_the_frames_is_undecodable(syntax: UID | None) -> None:
    whole = enhanced(ct_series(3), syntax=syntax) if syntax else enhanced(ct_series(3))
    whole.PixelData = encapsulate([b"one", b"two"]) if syntax else whole.PixelData[:-2]
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets([whole])
    assert caught.value.code == "UNDECODABLE"


def test_an_enhanced_instance_that_cannot_be_placed_refuses_the_series() -> None:
    series = ct_series(6)
    parts = [enhanced(series[:4]), enhanced(series[4:])]
    del parts[1].PerFrameFunctionalGroupsSequence
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets(parts)
    assert caught.value.code == "NO_GEOMETRY"


def test_legacy_converted_frames_of_highdicom_are_the_volume_they_came_from() -> None:
    series = ct_series(4, SOPClassUID=UID("1.2.840.10008.5.1.4.1.1.2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
            series, "1.2.3.4", 7, "1.2.3.5", 1
        )
    again = changed([converted])
    assert file_bytes(again[0])
    assert same_volume(again, series, "HU")
    times = {float(header.AcquisitionTime) for header in slices_of(again)[0]}
    assert times == {float(ds.AcquisitionTime) for ds in series}


def test_real_enhanced_frames_have_the_values_pydicom_decodes(real_dicom: Path) -> None:
    paths = sorted((real_dicom / "odd").glob("enhanced_mr*/**/*.dcm"))
    assert paths
    for path in paths:
        whole = dcmread(path)
        headers, ignored = slices_of([whole])
        assert ignored == []
        stored = whole.pixel_array
        for index, header in enumerate(headers):
            group = whole.PerFrameFunctionalGroupsSequence[index]
            place = group.PlanePositionSequence[0].ImagePositionPatient
            assert np.array_equal(stored_values(header), stored[index])
            assert header.ImagePositionPatient == place
            assert header.EchoTime == group.MREchoSequence[0].EffectiveEchoTime


def test_enhanced_ct_in_other_units_than_hu_is_refused() -> None:
    whole = enhanced(changed(ct_series(3), RescaleType="US"))
    assert whole.SOPClassUID == EnhancedCTImageStorage
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets([whole])
    assert caught.value.code == "NOT_HU"
