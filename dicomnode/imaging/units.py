"""What rescaled values must be multiplied by to be in a physical unit: HU, Bq/ml, SUV.

SUV is body-weight SUV (SUVbw, g/ml) by the method of QIBA's FDG-PET/CT profile: rescaled Bq/ml x
weight / (dose at the time that values are decay-corrected to). Activity that stayed in the syringe
is not in the attributes and not subtracted; scanners that know it write the net dose.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from pydicom import Dataset
from pydicom.valuerep import DA, DT, TM

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.pixels import Encoding, numbers_of, refused

Unit = Literal["HU", "BQML", "SUV", "AU"]

MODALITY: dict[Unit, str] = {"HU": "CT", "BQML": "PT", "SUV": "PT", "AU": "MR"}
"""Which images can be in a unit."""

LONGEST_HALF_LIVES = 20.0
"""A dose given longer ago than this, in half-lives, is taken for a wrong date."""

_ONE_FOR_ALL = (
    "Units",
    "SUVType",
    "PatientWeight",
    "CorrectedImage",
    "DecayCorrection",
    "SeriesDate",
    "SeriesTime",
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How rescaled values come into a unit: times `factor`; and how that is known.

    One for all slices of a stack; what differs from slice to slice is their rescale.
    """

    factor: float
    rule: str


def calibrate(headers: Sequence[Dataset], unit: Unit) -> Calibration:
    """How the slices of one stack come into a unit.

    Args:
        headers: one per slice, in any order.

    Raises:
        SeriesRefused: NOT_BQML (Units cannot be converted), NOT_CORRECTED (for attenuation or
            decay), NO_WEIGHT, NO_DOSE (or no half-life), NO_TIMES, MIXED_UNITS.
    """
    if MODALITY[unit] != "PT":
        return Calibration(1.0, "rescaled values")
    for keyword in _ONE_FOR_ALL:
        if len({str(header.get(keyword)) for header in headers}) > 1:
            raise SeriesRefused("MIXED_UNITS", f"{keyword} differs", "send one reconstruction")
    units = str(headers[0].get("Units"))
    if units == "CNTS":
        return _from_counts(headers, unit)
    if units == "GML":
        return _from_suv(headers, unit)
    if units != "BQML":
        raise refused("NOT_BQML", headers[0], "Units is not BQML", "send PET in Bq/ml")
    return Calibration(1.0, "Bq/ml") if unit == "BQML" else _suv_of_bqml(headers)


def encoding_in_unit(encoding: Encoding, calibration: Calibration) -> Encoding:
    """The encoding of the same stored values in the calibrated unit: exact both ways."""
    return replace(
        encoding,
        slope=encoding.slope * calibration.factor,
        intercept=encoding.intercept * calibration.factor,
    )


def _from_counts(headers: Sequence[Dataset], unit: Unit) -> Calibration:
    """Philips: (7053,xx00) makes SUV of counts, (7053,xx09) makes Bq/ml."""
    to_suv, to_bqml = _philips(headers, 0x00), _philips(headers, 0x09)
    if unit == "SUV" and to_suv is not None:
        return Calibration(to_suv, "counts x Philips (7053,xx00)")
    if to_bqml is not None:
        if unit == "BQML":
            return Calibration(to_bqml, "counts x Philips (7053,xx09)")
        suv = _suv_of_bqml(headers)
        return Calibration(to_bqml * suv.factor, f"counts x Philips (7053,xx09), {suv.rule}")
    if to_suv is not None:
        suv = _suv_of_bqml(headers)
        return Calibration(
            to_suv / suv.factor, f"counts x Philips (7053,xx00) back from {suv.rule}"
        )
    raise refused("NOT_BQML", headers[0], "Units is CNTS without a scale", "send PET in Bq/ml")


def _from_suv(headers: Sequence[Dataset], unit: Unit) -> Calibration:
    if str(headers[0].get("SUVType") or "BW") != "BW":
        raise refused("NOT_BQML", headers[0], "SUVType is not BW", "send PET in Bq/ml")
    if unit == "SUV":
        return Calibration(1.0, "SUVbw as stored")
    suv = _suv_of_bqml(headers)
    return Calibration(1 / suv.factor, f"back from {suv.rule}")


def _philips(headers: Sequence[Dataset], offset: int) -> float | None:
    """A scale factor that all slices share; None if absent or 0."""
    found = {_private(header, 0x7053, "Philips PET Private Group", offset) for header in headers}
    if len(found) > 1:
        raise SeriesRefused("MIXED_UNITS", "Philips scale differs", "send one reconstruction")
    try:
        factor = float(found.pop() or 0)
    except ValueError:
        return None
    return factor if math.isfinite(factor) and factor > 0 else None


def _private(header: Dataset, group: int, creator: str, offset: int) -> str | None:
    try:
        value = header.private_block(group, creator)[offset].value
    except KeyError:
        return None
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    return text.strip(" \0") or None


def _suv_of_bqml(headers: Sequence[Dataset]) -> Calibration:
    """SUVbw per Bq/ml, in g/ml."""
    first = headers[0]
    decay = first.get("DecayCorrection")
    if _is_enhanced(first):  # corrected to DecayCorrectionDateTime, whatever that is
        decay = "START" if first.get("DecayCorrectionDateTime") else None
    if not _is_corrected(first) or decay not in ("START", "ADMIN"):
        raise refused(
            "NOT_CORRECTED",
            first,
            "is not corrected for attenuation and, to START or ADMIN, for decay",
            "send a fully corrected reconstruction",
        )
    weight = _positive(first, "PatientWeight", "NO_WEIGHT")
    tracer = _tracer(first)
    dose = _positive(tracer, "RadionuclideTotalDose", "NO_DOSE", first)
    if decay == "ADMIN":
        return Calibration(weight * 1000 / dose, "Bq/ml decay-corrected to administration")
    half_life = _positive(tracer, "RadionuclideHalfLife", "NO_DOSE", first)
    scanned, how = _scan_time(headers, half_life)
    seconds = _seconds_since_dose(first, tracer, scanned)
    if not 0 <= seconds <= LONGEST_HALF_LIVES * half_life:
        raise refused("NO_TIMES", first, "dose and scan times do not fit", "send true times")
    left = dose * 2 ** (-seconds / half_life)
    return Calibration(weight * 1000 / left, f"Bq/ml decay-corrected to {how}")


def _is_enhanced(header: Dataset) -> bool:
    return "DecayCorrected" in header


def _is_corrected(header: Dataset) -> bool:
    """For attenuation and decay."""
    if _is_enhanced(header):
        return {header.get("DecayCorrected"), header.get("AttenuationCorrected")} == {"YES"}
    corrected = header.get("CorrectedImage") or ()
    return {"ATTN", "DECY"} <= ({corrected} if isinstance(corrected, str) else set(corrected))


def _positive(dataset: Dataset, keyword: str, code: str, instance: Dataset | None = None) -> float:
    named = dataset if instance is None else instance
    try:
        number = numbers_of(dataset, keyword, 1, code)[0]
    except SeriesRefused as error:
        raise refused(code, named, f"{keyword} is missing", "complete it at the scanner") from error
    if number <= 0:
        raise refused(code, named, f"{keyword} is not positive", "complete it at the scanner")
    return number


def _tracer(first: Dataset) -> Dataset:
    items = first.get("RadiopharmaceuticalInformationSequence") or []
    if len(items) != 1:
        raise refused("NO_DOSE", first, f"{len(items)} radiopharmaceuticals", "send one tracer")
    tracer: Dataset = items[0]
    return tracer


def _scan_time(headers: Sequence[Dataset], half_life: float) -> tuple[datetime, str]:
    """The moment that values are decay-corrected to, START, and which attribute told it.

    Series Date and Time, unless they are later than the acquisition: then the series was made by
    a workstation. The scanner's own time is then in GE's (0009,xx0d), or is computed back from
    Frame Reference Time, the time of the average count rate of each bed position.
    """
    first = headers[0]
    if _is_enhanced(first):
        return _parsed(first, str(first.DecayCorrectionDateTime)), "DecayCorrectionDateTime"
    series = _moment(first, "SeriesDate", "SeriesTime")
    acquired = [_moment(header, "AcquisitionDate", "AcquisitionTime") for header in headers]
    if series <= min(acquired):
        return series, "SeriesTime"
    private = _private(first, 0x0009, "GEMS_PETD_01", 0x0D)
    if private is not None:
        return _parsed(first, private), "the scan time in GE (0009,xx0d)"
    starts = [
        start + offset
        for header, start in zip(headers, acquired, strict=True)
        if (offset := _from_acquisition(header, half_life)) is not None
    ]
    if not starts:
        return min(acquired), "the earliest AcquisitionTime"
    seconds = statistics.median((start - min(starts)).total_seconds() for start in starts)
    return min(starts) + timedelta(seconds=seconds), "the scan time by FrameReferenceTime"


def _from_acquisition(header: Dataset, half_life: float) -> timedelta | None:
    """From the start of a bed position back (below 0) to the start of the scan."""
    reference = numbers_of(header, "FrameReferenceTime", 1, "NO_TIMES", default=(0.0,))[0]
    duration = numbers_of(header, "ActualFrameDuration", 1, "NO_TIMES", default=(0.0,))[0]
    if reference <= 0 or duration <= 0:
        return None
    rate = math.log(2) / half_life
    decays = rate * duration / 1000
    average = math.log(decays / -math.expm1(-decays)) / rate
    return timedelta(seconds=average - reference / 1000)


def _seconds_since_dose(first: Dataset, tracer: Dataset, scanned: datetime) -> float:
    """From the administration to the scan; without a date the dose was given in the last 24 h."""
    given = str(tracer.get("RadiopharmaceuticalStartDateTime") or "")
    if given:
        return (scanned - _parsed(first, given)).total_seconds()
    time = str(tracer.get("RadiopharmaceuticalStartTime") or "")
    day = f"{scanned:%Y%m%d}"
    elapsed = (scanned - _parsed(first, day + time if time else "")).total_seconds()
    return elapsed if elapsed >= 0 else elapsed + 24 * 3600


def minutes_after_injection(headers: Sequence[Dataset]) -> tuple[float, float]:
    """When the slices of a PET stack were acquired: the earliest and the latest, in minutes.

    Raises:
        SeriesRefused: NO_TIMES (of the dose or of an acquisition), NO_DOSE (several tracers).
    """
    tracer = _tracer(headers[0])
    started = [_moment(header, "AcquisitionDate", "AcquisitionTime") for header in headers]
    seconds = [_seconds_since_dose(headers[0], tracer, moment) for moment in started]
    return min(seconds) / 60, max(seconds) / 60


def _moment(header: Dataset, date: str, time: str) -> datetime:
    try:
        day, clock = DA(str(header.get(date) or "")), TM(str(header.get(time) or ""))
    except ValueError as error:
        raise _no_time(header) from error
    if day is None or clock is None:
        raise _no_time(header)
    return datetime.combine(day, clock)


def _parsed(header: Dataset, text: str) -> datetime:
    """A DT value in the time zone of the instance's other times, without that zone."""
    zone = str(header.get("TimezoneOffsetFromUTC") or "")
    try:
        moment = DT(text.strip())
        local = DT(f"20000101000000{zone}") if zone else None
    except ValueError as error:
        raise _no_time(header) from error
    if moment is None or len(text.strip()) < 10:
        raise _no_time(header)
    if moment.tzinfo is not None and local is not None:
        return moment.astimezone(local.tzinfo).replace(tzinfo=None)
    return moment.replace(tzinfo=None)


def _no_time(header: Dataset) -> SeriesRefused:
    return refused("NO_TIMES", header, "a date or time is missing or wrong", "send true times")
