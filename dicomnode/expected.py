"""How many instances a series will have, where its own attributes say so.

The count decides how early a series is called complete, so it must never be too small; a count
that is too large is harmless, because then the quiet time decides as if there were none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pydicom import Dataset

EXPECTED_KEYWORDS = (
    "NumberOfSeriesRelatedInstances",
    "ImagesInAcquisition",
    "AcquisitionNumber",
    "NumberOfFrames",
    "NumberOfSlices",
    "NumberOfTimeSlices",
    "NumberOfTimeSlots",
    "NumberOfRRIntervals",
    "SeriesType",
    "ImageIndex",
)
"""What is read of an instance's header for it."""

Values = Mapping[str, int | str]
"""Of one instance: what it says for each of `EXPECTED_KEYWORDS`; absent where it says nothing."""


@dataclass(frozen=True, slots=True)
class Expected:
    count: int
    """Instances of the whole series; at least as many as have been received."""
    keyword: str
    """The attribute that says so."""
    alone: bool
    """The series is complete when so many are received. False: only if, besides, the association
    that carried it was released."""


def expected_values(header: Dataset | Mapping[str, Any]) -> dict[str, int | str]:
    """What one instance says, as plain values that a journal can keep as JSON.

    Values that cannot be decoded or make no sense count as absent.
    """
    values = {keyword: _value(header, keyword) for keyword in EXPECTED_KEYWORDS}
    return {keyword: value for keyword, value in values.items() if value is not None}


def expected_count(instances: Iterable[Values], received: int | None = None) -> Expected | None:
    """How many instances the series will have, by what all that were received say; None: no word.

    Where many say the same, it is enough to give that once, and how many were `received`.

    Instances must agree: an attribute that differs between them, or that is smaller than what has
    been received already, says nothing.

    - NumberOfSeriesRelatedInstances (0020,1209) is an attribute of queries (PS3.4 C.6.1.1.4), which
      archives and gateways write into what they forward, from their own count of the series. Safe
      alone when all instances carry the same count: an archive that forwards while it still
      receives counts upwards, and then they differ.
    - NumberOfSlices (0054,0081) is the maximum of a PET series (PS3.3 C.8.9.1): all images of a
      STATIC or WHOLE BODY series, to be multiplied by the time slices of a DYNAMIC one, or the R-R
      intervals and time slots of a GATED one. Safe alone, unless an ImageIndex, which runs over
      the whole series, is beyond it. NumberOfTimeSlices means something for DYNAMIC series only:
      GE writes the bed position into it. A REPROJECTION has angles, not slices: no word.
    - ImagesInAcquisition (0020,1002) counts the images of one acquisition (PS3.3 C.7.6.1), not of
      the series. An acquisition may have several reconstructions in several series: then it is too
      large and harmless. But a series may have several acquisitions (bolus monitoring, shuttle
      scans), and the second is not announced by the first: then it is too small, and the
      acquisitions cannot be added up either, since the last may not have begun. So: only for a
      single acquisition of single-frame images, and never alone; the released association must
      say, too, that nothing more comes.
    """
    said = list(instances)
    received = len(said) if received is None else received
    for count, keyword, alone in (
        (_agreed(said, "NumberOfSeriesRelatedInstances"), "NumberOfSeriesRelatedInstances", True),
        (_pet_images(said), "NumberOfSlices", True),
        (_one_acquisition(said), "ImagesInAcquisition", False),
    ):
        if isinstance(count, int) and count >= max(1, received):
            return Expected(count, keyword, alone)
    return None


def _agreed(said: list[Values], keyword: str) -> int | str | None:
    """The value that every instance gives, or None."""
    values = {values.get(keyword) for values in said}
    return values.pop() if len(values) == 1 else None


def _pet_images(said: list[Values]) -> int | None:
    kind = str(_agreed(said, "SeriesType") or "").split("\\")
    factors = _PET_FACTORS.get(kind[0]) if kind[1:] == ["IMAGE"] else None
    if factors is None:
        return None
    counts = [_agreed(said, keyword) for keyword in ("NumberOfSlices", *factors)]
    numbers = [count for count in counts if isinstance(count, int)]
    if len(numbers) != len(counts):
        return None
    total = prod(numbers)
    indices = [values.get("ImageIndex") for values in said]
    return total if all(i <= total for i in indices if isinstance(i, int)) else None


_PET_FACTORS: dict[str, tuple[str, ...]] = {
    "STATIC": (),
    "WHOLE BODY": (),
    "DYNAMIC": ("NumberOfTimeSlices",),
    "GATED": ("NumberOfRRIntervals", "NumberOfTimeSlots"),
}
"""By what NumberOfSlices is multiplied for each first value of SeriesType."""


def _one_acquisition(said: list[Values]) -> int | None:
    number, count = _agreed(said, "AcquisitionNumber"), _agreed(said, "ImagesInAcquisition")
    many_frames = any(values.get("NumberOfFrames", 1) != 1 for values in said)
    return count if isinstance(count, int) and number is not None and not many_frames else None


def _value(header: Dataset | Mapping[str, Any], keyword: str) -> int | str | None:
    try:
        value = header.get(keyword)
        if value is None:  # of most: to be told so by an error takes longer
            return None
        if keyword == "SeriesType":
            return "\\".join(map(str, value or ())) or None
        number = int(str(value))
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, OverflowError):
        return None
    return number if 0 <= number < 10**7 else None
