"""Which routes a series takes, and why not the others: patterns over attributes, never code."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pydicom.datadict import dictionary_VR, tag_for_keyword

from dicomnode.conditions import Condition
from dicomnode.config import Route
from dicomnode.imaging.marks import MARK_KEYWORDS
from dicomnode.series import Header

_SHOWN_VR = {"CS", "DS", "IS", "US", "SS", "UL", "SL", "FL", "FD", "UI", "AE"}


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one route for one series."""

    route: Route
    reasons: tuple[str, ...]
    """Why not; empty: the series takes this route."""

    @property
    def taken(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        outcome = "matches" if self.taken else "does not match: " + "; ".join(self.reasons)
        return f"route '{self.route.name}' {outcome}"


def decide(header: Header, routes: Sequence[Route], synthetic: bool) -> list[Decision]:
    """Every route in order with its verdict; all that match run, up to a `final` one.

    `synthetic`: an instance of the series is synthetic or came from us (loop guard).
    """
    decisions: list[Decision] = []
    closed_by = ""
    for route in routes:
        reasons = mismatches(header, route)
        if synthetic and not route.accept_synthetic:
            reasons.append("ALREADY_SYNTHETIC: translating it again could loop (accept_synthetic)")
        if closed_by:
            reasons.append(f"route '{closed_by}' is final")
        decisions.append(Decision(route, tuple(reasons)))
        if route.final and not reasons:
            closed_by = route.name
    return decisions


def keywords_of(routes: Sequence[Route]) -> list[str]:
    """Every keyword that decides about a route."""
    return sorted({keyword for route in routes for keyword in route.match} | set(MARK_KEYWORDS))


def mismatches(header: Header, route: Route) -> list[str]:
    """Why the conditions of `route.match` do not hold, in words; empty: they do."""
    reasons = []
    for keyword, condition in route.match.items():
        if keyword in header.mixed:
            reasons.append(f"{keyword} is not the same in all instances")
        elif why := _why_not(keyword, header.values.get(keyword, ()), condition):
            reasons.append(why)
    return reasons


def _why_not(keyword: str, values: tuple[str | float, ...], condition: Condition) -> str | None:
    if condition.present is not None and bool(values) != condition.present:
        return f"{keyword} is {'absent' if condition.present else 'present'}"
    wants = _tests(condition)
    if wants and not values:
        return f"{keyword} is absent"
    for words, test in wants:
        if test(values):
            continue
        if _is_private(keyword):  # what it is not could tell what it is, too
            return f"{keyword} is something else than asked for (values not shown)"
        return f"{keyword} is {_shown(values)}, not {words}"
    return None


def _tests(condition: Condition) -> list[tuple[str, "_Test"]]:
    """The parts of a condition that look at values, each with its words."""
    tests = []
    if condition.any is not None:
        tests.append((" or ".join(condition.any), _Test(condition.any)))
    if condition.none_of is not None:
        words = f"anything but {' or '.join(condition.none_of)}"
        tests.append((words, _Test(condition.none_of, wanted=False)))
    if condition.regex is not None:
        tests.append((f"like /{condition.regex}/", _Test((), regex=condition.regex)))
    if condition.min is not None:
        tests.append((f"{condition.min:g} or more", _Test((), low=condition.min)))
    if condition.max is not None:
        tests.append((f"{condition.max:g} or less", _Test((), high=condition.max)))
    return tests


@dataclass(frozen=True, slots=True)
class _Test:
    """One part of a condition; a multi-valued attribute passes if any of its values does."""

    patterns: tuple[str, ...]
    wanted: bool = True
    regex: str | None = None
    low: float | None = None
    high: float | None = None

    def __call__(self, values: tuple[str | float, ...]) -> bool:
        return any(self._passes(value) for value in values) == self.wanted

    def _passes(self, value: str | float) -> bool:
        if self.regex is not None:
            return re.fullmatch(self.regex, _text(value), re.IGNORECASE) is not None
        if self.low is not None or self.high is not None:
            number = _number(value)
            if number is None:
                return False
            return (self.low is None or number >= self.low) and (
                self.high is None or number <= self.high
            )
        return any(_same(value, pattern) for pattern in self.patterns)


def _same(value: str | float, pattern: str) -> bool:
    number, wanted = _number(value), _number(pattern)
    if isinstance(value, float) and number is not None and wanted is not None:
        return number == wanted
    text, wild = _text(value).casefold(), pattern.strip().casefold()
    return fnmatchcase(text, wild.replace("[", "[[]"))


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _text(value: str | float) -> str:
    return f"{value:.15g}" if isinstance(value, float) else value


def _is_private(keyword: str) -> bool:
    """Could its value tell about the patient? Then it appears in no message."""
    tag = tag_for_keyword(keyword)
    return tag is not None and (tag >> 16 == 0x0010 or dictionary_VR(tag) not in _SHOWN_VR)


def _shown(values: tuple[str | float, ...]) -> str:
    return "\\".join(_text(value) for value in values)
