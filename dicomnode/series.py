"""When a series is complete and why, and what is true of all its instances.

DIMSE has no end-of-series message. What speaks for completeness: nothing new came for a while, the
sender released its association, and the positions leave no gap. The earliest safe moment wins.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag

from dicomnode.config import SeriesSection
from dicomnode.errors import CannotUnderstand
from dicomnode.imaging.positions import SAME_DIRECTION, stack_from_positions
from dicomnode.journal import OpenSeries
from dicomnode.part10 import MALFORMED, read_header

ARRIVAL_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "ImageType",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)
"""What is read of an instance when it arrives; pixel data are never touched."""

Plane = Mapping[str, Any]
"""Position and orientation of one image, as the journal keeps them."""


def plane_of(header: Dataset | Mapping[str, Any]) -> Plane | None:
    """Where an image lies in the patient, or None: no image plane, or a localizer."""
    kinds = map(str, _items(header.get("ImageType") or []))
    try:
        position = [float(value) for value in header.get("ImagePositionPatient") or []]
        orientation = [float(value) for value in header.get("ImageOrientationPatient") or []]
    except (TypeError, ValueError):
        return None
    if len(position) != 3 or len(orientation) != 6 or "LOCALIZER" in kinds:
        return None
    if not all(map(math.isfinite, position + orientation)):
        return None
    return {"position": position, "orientation": orientation}


def missing_slices(planes: Iterable[Plane | None]) -> int:
    """How many slices are missing between those that are there, over all parallel stacks."""
    stacks: list[tuple[list[float], set[tuple[float, ...]]]] = []
    for plane in planes:
        if plane is not None:
            _stack_of(plane["orientation"], stacks).add(tuple(plane["position"]))
    return sum(
        stack_from_positions(sorted(positions), orientation).missing
        for orientation, positions in stacks
        if len(positions) > 2
    )


def _stack_of(
    orientation: list[float], stacks: list[tuple[list[float], set[tuple[float, ...]]]]
) -> set[tuple[float, ...]]:
    """The positions of the stack with this orientation, to within rounding; a new one if none."""
    for other, positions in stacks:
        if all(abs(a - b) <= SAME_DIRECTION for a, b in zip(orientation, other, strict=True)):
            return positions
    stacks.append((orientation, set()))
    return stacks[-1][1]


class Carriers:
    """Which associations carry which series right now; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[int, set[str]] = defaultdict(set)
        self._released: dict[str, float] = {}

    def carries(self, association: int, series_uid: str) -> None:
        with self._lock:
            self._series[association].add(series_uid)
            self._released.pop(series_uid, None)

    def ended(self, association: int, released: bool, now: float) -> None:
        """An abort says nothing about completeness; a release does."""
        with self._lock:
            for series_uid in self._series.pop(association, set()):
                still_open = any(series_uid in carried for carried in self._series.values())
                if released and not still_open:
                    self._released[series_uid] = now

    def released_at(self, series_uid: str) -> float | None:
        """When the last association that carried the series was released; None if none was."""
        with self._lock:
            return self._released.get(series_uid)

    def forget(self, series_uid: str) -> None:
        with self._lock:
            self._released.pop(series_uid, None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a series is complete, in words."""

    complete: bool
    reason: str
    kind: str = "waiting"
    """waiting, held (for slices, or a sender cut off), announced, quiet, released, incomplete."""
    missing: int = 0
    """Slices that never came."""


def judge(
    series: OpenSeries,
    count_missing: Callable[[], int],
    released_at: float | None,
    rules: SeriesSection,
    now: float,
    started: float,
    announced: Callable[[bool], str | None] = lambda released: None,
) -> Verdict:
    """Is `series` complete at `now`? `started` is when this node began to listen.

    All times are seconds of the same clock. `count_missing` is `missing_slices` of what came. While
    the node was down nobody could send, so quiet counts from its start at the earliest.

    `announced`: who says that all instances are here (MPPS, a count in the headers), or None;
    told whether the last association that carried the series was released.
    """
    who = announced(released_at is not None)
    if who is not None and not count_missing():
        return Verdict(True, f"all announced instances are here ({who})", "announced")
    last = max(series.last_received, started)
    quiet = now - last
    hold = max(rules.hold_incomplete_seconds, rules.quiet_seconds)
    if series.interrupted and quiet < hold:
        return _waiting("the sender was cut off by a stop of this node", hold - quiet, "held")
    if released_at is None and quiet < rules.quiet_seconds:
        return _waiting("instances may still come", rules.quiet_seconds - quiet)
    missing = count_missing()
    if missing and quiet < hold:
        words = f"{missing} slices are missing between those received"
        return _waiting(words, hold - quiet, "held")
    if missing:
        reason = f"{missing} slices are missing after {hold:g} s of waiting"
        return Verdict(True, reason, "incomplete", missing)
    if quiet >= rules.quiet_seconds:
        return Verdict(True, f"nothing new for {rules.quiet_seconds:g} s", "quiet")
    if released_at is not None:
        since = now - max(released_at, last)
        wait = rules.quiet_seconds_if_released
        if since >= wait:
            return Verdict(True, f"association released {wait:g} s ago, no gap", "released")
        return _waiting("the association was just released", wait - since)
    return _waiting("instances may still come", rules.quiet_seconds - quiet)


def _waiting(why: str, seconds: float, kind: str = "waiting") -> Verdict:
    return Verdict(False, f"{why}; waiting {seconds:.0f} s more", kind)


@dataclass(frozen=True, slots=True)
class Header:
    """What holds for a whole series: attribute values by keyword, as text or numbers.

    A keyword that is absent or empty in all instances maps to an empty tuple; one whose values
    differ between instances is in `mixed` and never matches anything.
    """

    values: Mapping[str, tuple[str | float, ...]]
    mixed: frozenset[str]
    instances: int


def read_headers(paths: Sequence[Path], keywords: Iterable[str]) -> list[Dataset]:
    """The named attributes of each file, pixels left alone.

    A value that cannot be decoded counts as absent, a damaged file as empty: one odd instance must
    not stop the routing of all the others.
    """
    tags = [tag for tag in map(tag_for_keyword, keywords) if tag is not None]
    return [_read_header(path, tags) for path in paths]


def _read_header(path: Path, tags: list[int]) -> Dataset:
    try:
        header = read_header(path, tags)
    except (OSError, CannotUnderstand, *MALFORMED):
        return Dataset()
    for tag in list(header.keys()):
        if not _is_readable(header, tag):
            del header[tag]
    return header


def _is_readable(header: Dataset, tag: BaseTag) -> bool:
    try:
        element = header[tag]
        is_sequence = isinstance(element.value, DicomSequence)
        return dictionary_has_tag(tag) and is_sequence == (dictionary_VR(tag) == "SQ")
    except MALFORMED:
        return False


def common_header(
    headers: Sequence[Dataset], keywords: Iterable[str], extra: Mapping[str, str | float]
) -> Header:
    """Fold the headers of all instances into what holds for each of them.

    `extra`: facts that are no attributes, such as ``CallingAETitle``.
    """
    values: dict[str, tuple[str | float, ...]] = {key: (value,) for key, value in extra.items()}
    mixed = set()
    for keyword in keywords:
        if keyword in values or tag_for_keyword(keyword) is None:
            continue
        found = {_plain(header, keyword) for header in headers}
        if len(found) == 1:
            values[keyword] = found.pop()
        else:
            mixed.add(keyword)
    return Header(values, frozenset(mixed), len(headers))


def _plain(header: Dataset, keyword: str) -> tuple[str | float, ...]:
    """The values of an attribute as text or numbers; empty values count as absent (PS3.5 7.4).

    Of a sequence only its presence counts: it is the text SEQUENCE.
    """
    value = header.get(keyword)
    if isinstance(value, DicomSequence):
        return ("SEQUENCE",) if len(value) else ()
    plain = [_plain_item(item) for item in _items(value) if item is not None]
    return tuple(item for item in plain if item != "")


def _items(value: Any) -> Sequence[Any]:
    """The values of an attribute, of which there may be one only."""
    return value if isinstance(value, (list, MultiValue)) else [value]


def _plain_item(item: object) -> str | float:
    try:
        return float(item) if isinstance(item, (int, float)) else str(item).strip()
    except OverflowError:  # an integer of hundreds of digits
        return str(item)
