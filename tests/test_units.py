"""Values in their physical unit: HU, Bq/ml and SUV by the method of QIBA, and exactly back."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.layout import check_headers
from dicomnode.imaging.pixels import Encoding, encoding_of, stored_values
from dicomnode.imaging.units import Calibration, calibrate, encoding_in_unit
from dicomnode.imaging.volume import volume_from_datasets
from tests.factories import changed, ct_series, enhanced, pet_series
from tests.judges import NODE, SUV_PACKAGE, require

HALF_LIFE, DOSE, WEIGHT = 6586.2, 370e6, 70.0


def suv_factor(seconds: float) -> float:
    """SUVbw per Bq/ml for the factory's patient, `seconds` after the administration."""
    return WEIGHT * 1000 / (DOSE * 2 ** (-seconds / HALF_LIFE))


def code_of(series: list[Dataset], unit: Any = "SUV") -> str:
    """The code with which a series is refused in a unit."""
    with pytest.raises(SeriesRefused) as caught:
        volume_from_datasets(series, unit)
    return caught.value.code


def philips(series: list[Dataset], **factors: str) -> list[Dataset]:
    """The same in counts, with Philips' private scale factors."""
    made = changed(series, Units="CNTS")
    for ds in made:
        block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
        for name, value in factors.items():
            block.add_new({"suv": 0x00, "activity": 0x09}[name], "DS", value)
    return made


def test_hu_are_rescaled_stored_values() -> None:
    assert calibrate(ct_series(2), "HU").factor == 1.0


def test_suv_is_activity_by_weight_and_decayed_dose() -> None:
    series = pet_series(3)
    activity, _ = volume_from_datasets(series, "BQML")
    suv, _ = volume_from_datasets(series, "SUV")
    assert math.isclose(calibrate(series, "SUV").factor, suv_factor(3600), rel_tol=1e-12)
    assert suv.unit == "SUV"
    assert np.allclose(suv.voxels, activity.voxels * suv_factor(3600), rtol=1e-6)
    for plane, ds in zip(activity.voxels, series, strict=True):
        assert np.array_equal(plane, (ds.pixel_array * float(ds.RescaleSlope)).astype(np.float32))


def test_activity_corrected_to_administration_needs_no_decay_of_the_dose() -> None:
    series = changed(pet_series(3), DecayCorrection="ADMIN")
    assert math.isclose(calibrate(series, "SUV").factor, suv_factor(0))


@pytest.mark.parametrize(
    ("given_at", "scanned_at", "seconds"),
    [("233000", "003000", 3600), ("092000.5", "102000.5", 3600), ("102000", "102000", 0)],
)
def test_a_dose_without_date_was_given_in_the_last_day(
    given_at: str, scanned_at: str, seconds: float
) -> None:
    times = {"SeriesTime": scanned_at, "AcquisitionTime": scanned_at}
    series = pet_series(2, tracer={"RadiopharmaceuticalStartTime": given_at}, **times)
    assert math.isclose(calibrate(series, "SUV").factor, suv_factor(seconds))


def test_the_date_of_the_dose_counts_over_its_time_of_day() -> None:
    tracer = {"RadiopharmaceuticalStartDateTime": "20250101232000"}
    assert math.isclose(calibrate(pet_series(2, tracer=tracer), "SUV").factor, suv_factor(39600))


def test_a_dose_in_another_time_zone_is_taken_over() -> None:
    tracer = {"RadiopharmaceuticalStartDateTime": "20250102002000+0000"}
    series = pet_series(2, tracer=tracer, TimezoneOffsetFromUTC="+0900")
    assert math.isclose(calibrate(series, "SUV").factor, suv_factor(3600))


def later_series(**attributes: Any) -> list[Dataset]:
    """Made by a workstation: Series Time is an hour after the acquisition."""
    return changed(pet_series(3), SeriesTime="112000", **attributes)


def test_a_later_series_time_is_replaced_by_ge_private_scan_time() -> None:
    series = later_series()
    for ds in series:
        block = ds.private_block(0x0009, "GEMS_PETD_01", create=True)
        block.add_new(0x0D, "DT", "20250102101000.00")
    assert math.isclose(calibrate(series, "SUV").factor, suv_factor(3000))


def test_a_later_series_time_is_replaced_by_the_time_computed_back_from_each_bed() -> None:
    series = later_series()
    rate, duration = math.log(2) / HALF_LIFE, 120.0
    average = math.log(rate * duration / (1 - math.exp(-rate * duration))) / rate
    for bed, ds in enumerate(series):  # the scan began at 10:15:00
        ds.AcquisitionTime = f"10{17 + 2 * bed:02d}00"
        ds.FrameReferenceTime = f"{(120 + 120 * bed + average) * 1000:.6f}"
    assert 59 < average < 60
    assert math.isclose(calibrate(series, "SUV").factor, suv_factor(3300), rel_tol=1e-9)
    assert "FrameReferenceTime" in calibrate(series, "SUV").rule


def test_a_later_series_time_is_else_replaced_by_the_earliest_acquisition() -> None:
    assert math.isclose(calibrate(later_series(), "SUV").factor, suv_factor(3600))


def test_stored_suv_is_taken_and_can_be_brought_to_activity() -> None:
    series = changed(pet_series(2), Units="GML", SUVType="BW")
    assert calibrate(series, "SUV").factor == 1.0
    assert math.isclose(calibrate(series, "BQML").factor, 1 / suv_factor(3600))
    assert code_of(changed(series, SUVType="LBM")) == "NOT_BQML"


def test_philips_counts_become_suv_and_activity() -> None:
    series = pet_series(2)
    both = philips(series, suv="0.000238", activity="1.7")
    assert calibrate(both, "SUV").factor == 0.000238
    assert calibrate(both, "BQML").factor == 1.7
    activity = philips(series, suv="0", activity="1.7")
    assert math.isclose(calibrate(activity, "SUV").factor, 1.7 * suv_factor(3600))
    suv = philips(series, suv="0.000238")
    assert math.isclose(calibrate(suv, "BQML").factor, 0.000238 / suv_factor(3600))
    assert code_of(changed(series, Units="CNTS")) == "NOT_BQML"


def test_enhanced_pet_has_its_unit_and_reference_time_elsewhere() -> None:
    series = pet_series(3)
    activity, _ = volume_from_datasets(series, "BQML")
    whole = enhanced(series)
    for group, ds in zip(whole.PerFrameFunctionalGroupsSequence, series, strict=True):
        code, mapping = Dataset(), Dataset()
        code.CodeValue, code.CodingSchemeDesignator = "Bq/ml", "UCUM"
        mapping.MeasurementUnitsCodeSequence = [code]
        mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = float(ds.RescaleSlope), 0.0
        group.RealWorldValueMappingSequence = [mapping]
        del group.PixelValueTransformationSequence
    for keyword in ("Units", "CorrectedImage", "DecayCorrection", "SeriesTime"):
        delattr(whole, keyword)
    whole.DecayCorrected = whole.AttenuationCorrected = "YES"
    whole.DecayCorrectionDateTime = "20250102095000"
    again, _ = volume_from_datasets([whole], "BQML")
    suv, ordered = volume_from_datasets([whole], "SUV")
    assert np.array_equal(again.voxels, activity.voxels)
    assert math.isclose(calibrate(ordered, "SUV").factor, suv_factor(1800))
    assert np.allclose(suv.voxels, activity.voxels * suv_factor(1800), rtol=1e-6)
    whole.AttenuationCorrected = "NO"
    assert code_of([whole]) == "NOT_CORRECTED"


@pytest.mark.parametrize(
    ("code", "attributes"),
    [
        ("NO_WEIGHT", {"PatientWeight": None}),
        ("NO_WEIGHT", {"PatientWeight": "0"}),
        ("NOT_CORRECTED", {"CorrectedImage": ["DECY"]}),
        ("NOT_CORRECTED", {"CorrectedImage": "ATTN"}),
        ("NOT_CORRECTED", {"DecayCorrection": "NONE"}),
        ("NOT_CORRECTED", {"DecayCorrection": None}),
        ("NOT_BQML", {"Units": "PROPCPS"}),
        ("NOT_BQML", {"Units": None}),
        ("NO_DOSE", {"RadiopharmaceuticalInformationSequence": None}),
        ("NO_TIMES", {"SeriesTime": None}),
        ("NO_TIMES", {"AcquisitionDate": None}),
    ],
)
def test_suv_is_refused_where_it_would_be_a_guess(code: str, attributes: dict[str, Any]) -> None:
    series = changed(pet_series(2), **attributes)
    assert code_of(series) == code
    with pytest.raises(SeriesRefused) as caught:  # `dicomnode explain` must know it too
        check_headers(series, "SUV")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("code", "tracer"),
    [
        ("NO_DOSE", {"RadionuclideTotalDose": None}),
        ("NO_DOSE", {"RadionuclideHalfLife": "0"}),
        ("NO_TIMES", {"RadiopharmaceuticalStartTime": None}),
        ("NO_TIMES", {"RadiopharmaceuticalStartDateTime": "20250103092000"}),
        ("NO_TIMES", {"RadiopharmaceuticalStartDateTime": "20240102092000"}),
        ("NO_TIMES", {"RadiopharmaceuticalStartDateTime": "2025"}),
    ],
)
def test_suv_is_refused_where_the_dose_cannot_be_known(code: str, tracer: dict[str, Any]) -> None:
    assert code_of(pet_series(2, tracer=tracer)) == code


def test_slices_of_different_weight_or_unit_are_refused() -> None:
    series = pet_series(3)
    assert code_of([*series[:2], *changed(series[2:], PatientWeight="71")]) == "MIXED_UNITS"
    assert code_of([*series[:2], *changed(series[2:], Units="GML")]) == "MIXED_UNITS"


def test_a_refusal_has_no_weight_or_dose_in_it() -> None:
    with pytest.raises(SeriesRefused) as caught:
        calibrate(changed(pet_series(2), PatientWeight="-123.5"), "SUV")
    assert "123" not in str(caught.value).replace(str(pet_series(2)[0].SOPInstanceUID), "")


@settings(max_examples=200, deadline=None)
@given(
    stored=st.lists(st.integers(0, 65535), min_size=1, max_size=40),
    slope=st.floats(1e-5, 100),
    offset=st.integers(-500, 500),
    factor=st.floats(1e-7, 1e-2),
)
def test_suv_goes_back_into_the_very_stored_values(
    stored: list[int], slope: float, offset: int, factor: float
) -> None:
    rescaled = Encoding(16, False, slope, offset * slope)
    encoding = encoding_in_unit(rescaled, Calibration(factor, ""))
    values = np.asarray(stored, dtype=np.uint16)
    suv = encoding.to_physical(values)
    exact = factor * (slope * values.astype(np.float64) + offset * slope)
    assert np.allclose(suv, exact, rtol=1e-6, atol=factor * slope * 1e-3)
    assert np.array_equal(encoding.to_stored(suv), values)


def test_a_real_pet_goes_to_suv_and_back(real_dicom: Path) -> None:
    paths = sorted((real_dicom / "pet" / "fdg_wholebody_STS_001_GE_BQML").glob("*.dcm"))[:40]
    volume, ordered = volume_from_datasets([dcmread(path) for path in paths], "SUV")
    calibration = calibrate(ordered, "SUV")
    assert math.isclose(calibration.factor, 71000 / (388777472 * 2 ** (-2711 / 6588)))
    for plane, ds in zip(volume.voxels, ordered, strict=True):
        encoding = encoding_in_unit(encoding_of(ds), calibration)
        assert np.array_equal(encoding.to_stored(plane), stored_values(ds))


def test_real_suv_images_are_taken_as_they_are(real_dicom: Path) -> None:
    for folder in sorted((real_dicom / "paired_mr_ct_pet").glob("STS_*/PET")):
        series = [dcmread(path) for path in sorted(folder.glob("*.dcm"))]
        volume, ordered = volume_from_datasets(series, "SUV")
        assert calibrate(ordered, "SUV").factor == 1.0
        assert 5 < volume.voxels.max() < 30


_ASK = """
const {calculateSUVScalingFactors} = require(process.argv[1]);
const instances = JSON.parse(require('fs').readFileSync(0));
console.warn = () => {};
console.log(JSON.stringify(calculateSUVScalingFactors(instances).map(f => f.suvbw)));
"""


def judged(series: list[Dataset]) -> list[float]:
    """The factor of each instance by OHIF's calculate-suv."""
    require(NODE, SUV_PACKAGE)
    asked = [_metadata(ds) for ds in series]
    done = subprocess.run(
        [str(NODE), "-e", _ASK, str(SUV_PACKAGE)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    factors: list[float] = json.loads(done.stdout)
    return factors


def _metadata(ds: Dataset) -> dict[str, Any]:
    tracer = ds.RadiopharmaceuticalInformationSequence[0]
    made: dict[str, Any] = {"CorrectedImage": list(ds.CorrectedImage)}
    texts = "Units DecayCorrection SeriesDate SeriesTime AcquisitionDate AcquisitionTime"
    for keyword in texts.split():
        made[keyword] = str(ds[keyword].value)
    made["PatientWeight"] = float(ds.PatientWeight)
    for keyword in ("RadionuclideTotalDose", "RadionuclideHalfLife"):
        made[keyword] = float(tracer[keyword].value)
    for keyword in ("RadiopharmaceuticalStartTime", "RadiopharmaceuticalStartDateTime"):
        if tracer.get(keyword):
            made[keyword] = str(tracer[keyword].value)
    try:
        block = ds.private_block(0x7053, "Philips PET Private Group")
    except KeyError:
        return made
    names = {0x00: "SUVScaleFactor", 0x09: "ActivityConcentrationScaleFactor"}
    made["PhilipsPETPrivateGroup"] = {
        name: float(block[offset].value) for offset, name in names.items() if offset in block
    }
    return made


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["plain", "dated", "counts", "counts to activity", "later"])
def test_suv_is_what_a_viewer_computes(kind: str) -> None:
    tracer = {"RadiopharmaceuticalStartDateTime": "20250102091000"} if kind == "dated" else {}
    series = pet_series(3, tracer=tracer)
    if kind.startswith("counts"):
        suv = "0.0002" if kind == "counts" else "0"
        series = philips(series, suv=suv, activity="1.7")
    if kind == "later":
        series = changed(series, SeriesTime="112000")
    ours = calibrate(series, "SUV").factor
    assert np.allclose(judged(series), ours, rtol=1e-12)


@pytest.mark.peers
def test_suv_of_a_real_series_is_what_a_viewer_computes(real_dicom: Path) -> None:
    paths = sorted((real_dicom / "pet" / "fdg_wholebody_STS_001_GE_BQML").glob("*.dcm"))
    series = [dcmread(path, stop_before_pixels=True) for path in paths]
    assert np.allclose(judged(series), calibrate(series, "SUV").factor, rtol=1e-12)
