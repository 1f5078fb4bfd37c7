"""The five output types, each by its whole path, and what may not be made (derived.md 2)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.valuerep import format_number_as_ds

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import encoding_of
from dicomnode.imaging.units import Unit
from dicomnode.imaging.volume import volume_from_datasets
from dicomnode.outputs import check_source
from tests.factories import changed, ct_series, enhanced, mr_series, write_series
from tests.judges import (
    DCIODVFY,
    NODE,
    SUV_PACKAGE,
    dciodvfy,
    require,
    suv_factors,
)
from tests.tasks import KINDS, SOURCES, ge_pet, made_of, translated
from tests.test_derived import as_task, derive, noise, received

HANGUL = "\\ISO 2022 IR 149"
KOREAN = "Hong^Gildong=洪^吉洞=홍^길동"


# Attributes of each type


def test_contrast_enhanced_ct_has_no_contrast_module_and_no_dose_index(tmp_path: Path) -> None:
    series = ct_series(3, CTDIvol=7.5, ContrastBolusAgent="", ContrastBolusRoute="")
    for ds in made_of("ce_ct", series, tmp_path):
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "AXIAL", "SYNTHETIC", "CE_CT"]
        assert "CTDIvol" not in ds
        assert not [e for e in ds if e.keyword.startswith("Contrast")]
        assert (ds.KVP, ds.ConvolutionKernel, ds.RescaleType) == (120, "B30f", "HU")
        assert (ds.WindowCenter, ds.SyntheticData) == (40, "YES")


def test_denoised_ct_keeps_agent_and_dose_index(tmp_path: Path) -> None:
    series = ct_series(2, CTDIvol=7.5, ContrastBolusAgent="Iomeprol")
    ds = made_of("denoise", series, tmp_path)[0]
    assert (ds.ContrastBolusAgent, ds.CTDIvol) == ("Iomeprol", 7.5)


@pytest.mark.parametrize(
    ("part", "window"), [(None, (40, 80)), ("BRAIN", (40, 80)), ("PELVIS", (40, 400))]
)
def test_ct_of_mr_is_signed_whole_hu_and_has_no_mr_attribute(
    part: str | None, window: tuple[int, int], tmp_path: Path
) -> None:
    series = mr_series(3, BodyPartExamined=part, ContrastBolusAgent="Gd", MagneticFieldStrength="3")
    for ds in made_of("syn_ct", series, tmp_path):
        assert (ds.Modality, ds.SOPClassUID.name) == ("CT", "CT Image Storage")
        assert list(ds.ImageType)[2:] == ["AXIAL", "SYNTHETIC", "SYN_CT"]
        assert (ds.BitsStored, ds.PixelRepresentation) == (16, 1)
        assert (str(ds.RescaleSlope), str(ds.RescaleIntercept), ds.RescaleType) == ("1", "0", "HU")
        assert ds["KVP"].VM == 0
        assert (ds.WindowCenter, ds.WindowWidth) == window
        for keyword in (
            "ScanningSequence",
            "EchoTime",
            "MagneticFieldStrength",
            "PixelPaddingValue",
        ):
            assert keyword not in ds
        assert "ContrastBolusAgent" not in ds
        assert "IrradiationEventUID" not in ds


def test_outside_the_source_ct_of_mr_is_air_and_mr_of_ct_is_zero(tmp_path: Path) -> None:
    stored = np.full((2, 16, 16), 900)
    stored[:, 0, 0] = 5
    series = mr_series(2, padding=5, stored=stored)
    assert made_of("syn_ct", series, tmp_path)[0].pixel_array[0, :2].tolist() == [-1000, 160]
    series = ct_series(2, signed=True, bits_stored=16, padding=-2000)
    assert made_of("syn_mr", series, tmp_path / "mr")[0].pixel_array[0, 0] == 0


def test_mr_of_ct_is_12_bit_without_rescale_and_says_that_no_sequence_ran(tmp_path: Path) -> None:
    derived = made_of("syn_mr", ct_series(4, GantryDetectorTilt="12"), tmp_path)
    for ds in derived:
        assert (ds.Modality, ds.SOPClassUID.name) == ("MR", "MR Image Storage")
        assert list(ds.ImageType)[2:] == ["OTHER", "SYNTHETIC", "SYN_MR"]
        assert (ds.ScanningSequence, ds.SequenceVariant) == ("RM", "NONE")
        for keyword in ("ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime"):
            assert ds[keyword].VM == 0
        assert (ds.BitsStored, ds.PixelRepresentation) == (12, 0)
        for keyword in ("RescaleSlope", "RescaleType", "KVP", "GantryDetectorTilt", "Exposure"):
            assert keyword not in ds
    stored = np.stack([ds.pixel_array for ds in derived])
    low, high = np.percentile(stored, (1, 99))
    assert len({(ds.WindowCenter, ds.WindowWidth) for ds in derived}) == 1
    assert derived[0].WindowCenter == pytest.approx((low + high) / 2)
    assert derived[0].WindowWidth == pytest.approx(high - low)


def test_delayed_pet_has_one_slope_its_sources_times_and_suv(tmp_path: Path) -> None:
    series = ge_pet(4)
    derived = made_of("delayed_pet", series, tmp_path)
    assert len({str(ds.RescaleSlope) for ds in derived}) == 1
    peak = max(float(np.max(ds.pixel_array)) for ds in derived)
    assert peak == 32767
    for index, (source, ds) in enumerate(zip(series, derived, strict=True), 1):
        assert list(ds.ImageType) == ["DERIVED", "PRIMARY", "SYNTHETIC", "DLY_PET"]
        assert (ds.Units, ds.BitsStored, ds.PixelRepresentation) == ("BQML", 16, 0)
        assert (ds.RescaleIntercept, "RescaleType" in ds) == (0, False)
        assert len(str(ds.RescaleSlope)) <= 16
        assert (ds.NumberOfSlices, ds.ImageIndex) == (4, index)
        same = ("SeriesDate", "SeriesTime", "AcquisitionTime", "DecayFactor", "FrameReferenceTime")
        for keyword in (*same, "PatientWeight", "DoseCalibrationFactor", "CorrectedImage"):
            assert ds[keyword].value == source[keyword].value
        assert "PrimaryPromptsCountsAccumulated" not in ds
        assert "PatientPosition" not in ds
    require(NODE, SUV_PACKAGE)
    factors = suv_factors(derived)
    assert factors == suv_factors(series)
    assert derived[0].WindowWidth == pytest.approx(7 / factors[0], rel=1e-6)


def test_pet_without_series_time_gets_none_of_ours(tmp_path: Path) -> None:
    series = changed(ge_pet(2), SeriesTime=None, DecayCorrection="ADMIN")
    assert "SeriesTime" not in made_of("delayed_pet", series, tmp_path)[0]


def test_pet_says_the_position_of_the_patient_once(tmp_path: Path) -> None:
    both = changed(ge_pet(2), PatientPosition="HFS")
    assert "PatientPosition" not in made_of("delayed_pet", both, tmp_path / "a")[0]
    without = changed(both, PatientOrientationCodeSequence=[])
    assert made_of("delayed_pet", without, tmp_path / "b")[0].PatientPosition == "HFS"


def test_pet_in_suv_and_in_g_per_ml_come_out_in_bq_per_ml(tmp_path: Path) -> None:
    suv = dataclasses.replace(KINDS["delayed_pet"], given="SUV", made="SUV")
    plain = translated(KINDS["delayed_pet"], ge_pet(3), tmp_path)
    by_suv = translated(suv, ge_pet(3), tmp_path / "suv")
    for one, other in zip(plain.derived, by_suv.derived, strict=True):
        a = one.pixel_array * float(one.RescaleSlope)
        b = other.pixel_array * float(other.RescaleSlope)
        assert np.abs(a - b).max() <= float(one.RescaleSlope)
        assert other.Units == "BQML"
    in_grams = changed(ge_pet(3), Units="GML", SUVType="BW")
    for ds in made_of("delayed_pet", in_grams, tmp_path / "gml"):
        assert ds.Units == "BQML"
        assert "SUVType" not in ds


def test_a_pet_whose_suv_nobody_can_tell_gets_a_window_from_its_values(tmp_path: Path) -> None:
    ds = made_of("delayed_pet", ge_pet(2, PatientWeight=None), tmp_path)[0]
    assert ds.WindowCenterWidthExplanation == "0 TO LARGEST"


@pytest.mark.parametrize("task", KINDS)
def test_every_type_lies_on_its_source_and_names_it(task: str, tmp_path: Path) -> None:
    done = translated(KINDS[task], SOURCES[task](), tmp_path)
    for source, ds in zip(done.datasets, received(list(done.derived)), strict=True):
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            assert str(ds[keyword].value) == str(source[keyword].value)
        assert ds.FrameOfReferenceUID == source.FrameOfReferenceUID
        image = ds.SourceImageSequence[0]
        assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert image.SpatialLocationsPreserved == "YES"
        listed = ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
        assert listed.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert ds.DerivationCodeSequence[0].CodeValue == ds.ImageType[-1]
        assert f"task={task}; " in ds.DerivationDescription
        assert ds.DeviceSerialNumber in ds.DerivationDescription


# Values


@pytest.mark.parametrize(
    ("task", "series", "unit", "to"),
    [
        ("syn_ct", lambda: mr_series(2), "AU", "HU"),
        ("syn_mr", lambda: ct_series(2), "HU", "AU"),
        ("delayed_pet", lambda: ge_pet(2), "BQML", "BQML"),
    ],
)
@pytest.mark.parametrize("sigma", [0.3, 30.0, 700.0])
def test_every_encoding_keeps_a_prediction_to_half_a_quantum(
    task: str, series: Any, unit: Unit, to: Unit, sigma: float
) -> None:
    made = series()
    shape = (2, *made[0].pixel_array.shape)
    change = 1500 + np.clip(noise(shape, sigma), -400, 400)
    change -= 500 if task == "delayed_pet" else 0
    _, prediction, derived = derive(made, change, as_task(task), unit=unit, to=to)
    for plane, ds in zip(prediction.voxels, derived, strict=True):
        slope = float(ds.get("RescaleSlope", 1))
        error = np.abs(ds.pixel_array.astype(float) * slope - plane)
        assert error.max() <= slope / 2 * (1 + 1e-6) + 1e-6 * plane.max()


@pytest.mark.parametrize(
    ("task", "change", "code"),
    [
        ("syn_mr", 4000.0, "OUTPUT_OUT_OF_RANGE"),
        ("syn_mr", 0.0, "OUTPUT_OUT_OF_RANGE"),
        ("syn_mr", np.nan, "OUTPUT_NOT_FINITE"),
    ],
)
def test_a_prediction_that_the_iod_cannot_hold_is_refused(
    task: str, change: float, code: str
) -> None:
    with pytest.raises(SeriesRefused) as caught:
        derive(ct_series(2), change, as_task(task), to="AU")
    assert caught.value.code == code


def test_a_small_undershoot_of_activity_is_zero_and_a_large_one_is_refused() -> None:
    series = ge_pet(2)
    change = np.zeros((2, 24, 28), np.float32)
    change[0, 0, 0] = -1
    source, _, derived = derive(series, change, as_task("delayed_pet"), unit="BQML", to="BQML")
    assert source.voxels[0, 0, 0] == 0
    assert derived[0].pixel_array[0, 0] == 0
    change[0, 0, 0] = -5000
    with pytest.raises(SeriesRefused) as caught:
        derive(series, change, as_task("delayed_pet"), unit="BQML", to="BQML")
    assert caught.value.code == "OUTPUT_OUT_OF_RANGE"


def test_a_pet_without_any_activity_is_stored_with_slope_1() -> None:
    series = ge_pet(2)
    none = -volume_from_datasets(series, "BQML")[0].voxels
    derived = derive(series, none, as_task("delayed_pet"), unit="BQML", to="BQML")[2]
    assert [(str(ds.RescaleSlope), ds.pixel_array.max()) for ds in derived] == [("1", 0)] * 2


def test_the_slope_of_pet_is_used_as_it_is_written() -> None:
    ds = derive(ge_pet(2), 0.0, as_task("delayed_pet"), unit="BQML", to="BQML")[2][0]
    assert encoding_of(ds).slope == float(str(ds.RescaleSlope))
    assert format_number_as_ds(float(ds.RescaleSlope)) == str(ds.RescaleSlope)


# Refusals


def refused(task: str, datasets: Sequence[Dataset], tmp_path: Path) -> str:
    with pytest.raises(SeriesRefused) as caught:
        translated(KINDS[task], datasets, tmp_path)
    assert caught.value.remedy
    return caught.value.code


@pytest.mark.parametrize(
    ("task", "attributes", "code"),
    [
        ("ce_ct", {"ContrastBolusAgent": "Iomeprol"}, "CONTRAST_GIVEN"),
        ("delayed_pet", {"Units": "PROPCPS"}, "NOT_BQML"),
        ("delayed_pet", {"Units": "CNTS"}, "NOT_BQML"),
        ("delayed_pet", {"SeriesType": ["DYNAMIC", "IMAGE"]}, "NOT_STATIC"),
        ("delayed_pet", {"SeriesType": ["GATED", "IMAGE"]}, "NOT_STATIC"),
        ("denoise", {"MultienergyCTAcquisition": "YES"}, "MULTI_ENERGY"),
        (
            "denoise",
            {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
            "COLOUR",
        ),
        ("denoise", {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "NOT_16_BIT"),
        ("denoise", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "LOCALIZER"),
        ("syn_ct", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "MOSAIC"),
    ],
    ids=str,
)
def test_what_a_type_may_not_be_made_of_is_refused_by_name(
    task: str, attributes: dict[str, Any], code: str, tmp_path: Path
) -> None:
    source = {"delayed_pet": ge_pet, "syn_ct": mr_series}.get(task, ct_series)(3)
    assert refused(task, changed(source, **attributes), tmp_path) == code


def test_positions_that_repeat_unequally_are_refused(tmp_path: Path) -> None:
    series = ct_series(4)
    twice = changed(series[:2], SOPInstanceUID="1.2.3", InstanceNumber=9)[1]
    assert refused("denoise", [*series, twice], tmp_path) == "DUPLICATE_POSITIONS"


def test_a_synthetic_series_is_refused_unless_it_is_accepted(tmp_path: Path) -> None:
    ours = made_of("denoise", ct_series(2), tmp_path)
    with pytest.raises(SeriesRefused) as caught:
        check_source(ours, "denoise")
    assert caught.value.code == "ALREADY_SYNTHETIC"
    check_source(ours, "denoise", accept_synthetic=True)


def test_a_series_of_another_modality_is_refused() -> None:
    with pytest.raises(SeriesRefused) as caught:
        check_source(ct_series(1), "syn_ct")
    assert caught.value.code == "WRONG_MODALITY"


# Enhanced sources


def test_an_enhanced_source_gives_classic_instances_that_name_their_frames(tmp_path: Path) -> None:
    classic = mr_series(4)
    derived = made_of("syn_ct", [enhanced(classic)], tmp_path)
    alike = made_of("syn_ct", classic, tmp_path / "classic")
    assert [ds.InstanceNumber for ds in derived] == [1, 2, 3, 4]
    assert len({ds.SOPInstanceUID for ds in derived}) == 4
    for number, (ds, twin) in enumerate(zip(derived, alike, strict=True), 1):
        for item in (ds.SourceImageSequence, ds.ReferencedSeriesSequence[0][0x0008114A].value):
            assert item[0].ReferencedFrameNumber == number
            assert item[0].ReferencedSOPClassUID.name == "Enhanced MR Image Storage"
        assert "NumberOfFrames" not in ds
        assert "ReferencedFrameNumber" not in ds
        assert not [e for e in ds.iterall() if e.tag.is_private]
        assert ds.ImagePositionPatient == twin.ImagePositionPatient
        assert np.array_equal(ds.pixel_array, twin.pixel_array)


@pytest.mark.parametrize("task", ["denoise", "syn_mr", "syn_ct"])
def test_foreign_programs_accept_what_is_made_of_enhanced_images(task: str, tmp_path: Path) -> None:
    require(DCIODVFY)
    source = enhanced(mr_series(3) if task == "syn_ct" else ct_series(3))
    paths = write_series(made_of(task, [source], tmp_path), tmp_path / "derived")
    assert dciodvfy(paths) == set()
