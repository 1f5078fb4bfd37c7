"""One series as its real stacks: parallel slices of one kind, each position once.

A SeriesInstanceUID may hold several reconstructions, echoes, phases or time points. What tells them
apart is looked for in the order of two tables: attributes that make images of another kind always
split; attributes of another moment split only where slices lie at the same position, since some
scanners number every slice anew.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydicom import Dataset

from dicomnode.errors import SeriesRefused
from dicomnode.imaging.frames import TRANSLATABLE, Ignored, frame_number, slices_of, why_nothing
from dicomnode.imaging.limits import check_one_patient
from dicomnode.imaging.pixels import numbers_of
from dicomnode.imaging.positions import (
    SAME_DIRECTION,
    SAME_POSITION_MM,
    SHEARED_DEGREES,
    Stack,
    refuse_gaps,
    stack_from_positions,
    tilt_degrees,
)

_SHOWN = 40
"""Characters of an attribute's value that a rule repeats."""


@dataclass(frozen=True, slots=True, eq=False)
class StackOfImages:
    """Slices that may become one volume.

    Attributes:
        rule: what tells this stack from the others of its series, in words; empty if there are no
            others.
        datasets: slices in slice order (see `volume.Stack`), as `frames.slices_of` gives them.
        modality: CT, MR or PT.
        refusal: why this can be no volume; None: nothing against it so far.
        step_mm: median distance of neighbours along the normal; 0 for a single slice.
        tilt_degrees: of the stack's axis from the slice normal.
    """

    rule: str
    datasets: list[Dataset]
    modality: str
    refusal: SeriesRefused | None = None
    step_mm: float = 0.0
    tilt_degrees: float = 0.0

    @property
    def name(self) -> str:
        """The values in `rule` without their attributes, short enough for a description."""
        return " ".join(part.rsplit(" ", 1)[-1] for part in self.rule.split("; "))

    @property
    def sheared(self) -> bool:
        """Whether slices are offset in plane, as by a gantry tilt."""
        return self.tilt_degrees > SHEARED_DEGREES


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The stacks of a series, largest first, then by InstanceNumber; and what is no slice."""

    stacks: tuple[StackOfImages, ...]
    ignored: tuple[Ignored, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    rule: tuple[str, ...]
    slices: list[Dataset]
    refusal: SeriesRefused | None = None


def split_stacks(datasets: Iterable[Dataset]) -> Split:
    """Take one series apart into its stacks; pixel data is not looked at and need not be there.

    The result does not depend on the order of `datasets`.
    """
    slices, ignored = slices_of(datasets)
    slices.sort(key=_identity)
    groups = [_Group((), slices)] if slices else []
    for name, kinds in _KINDS:
        groups = [part for group in groups for part in _by(group, name, kinds(group.slices))]
    groups = [part for group in groups for part in _without_repeats(group)]
    stacks = sorted(map(_stack, groups), key=lambda stack: -len(stack.datasets))
    return Split(tuple(stacks), tuple(ignored))


def usable_stacks(headers: Sequence[Dataset]) -> Split:
    """`split_stacks`, refusing what must not be taken apart.

    Raises:
        SeriesRefused: nothing is a slice (its code says what there is instead); frames are there
            that nobody can place (NO_GEOMETRY, UNDECODABLE); the slices are of several patients
            (MIXED_PATIENT).
    """
    split = split_stacks(headers)
    for item in split.ignored:
        if item.code in ("NO_GEOMETRY", "UNDECODABLE"):
            raise SeriesRefused(item.code, item.reason, "send it again")
    if not split.stacks:
        code = why_nothing([item.code for item in split.ignored])
        raise SeriesRefused(code, f"none of {len(headers)} instances is a slice", "send slices")
    check_one_patient([header for stack in split.stacks for header in stack.datasets])
    return split


def slices_in(stack: StackOfImages, datasets: Iterable[Dataset]) -> list[Dataset]:
    """The slices of a stack among whole instances, which may hold frames of other stacks too."""
    wanted = {_slice(header) for header in stack.datasets}
    return [found for found in slices_of(datasets)[0] if _slice(found) in wanted]


def _slice(header: Dataset) -> tuple[str, int | None]:
    return str(header.get("SOPInstanceUID")), frame_number(header)


def _identity(header: Dataset) -> tuple[int, str, int]:
    number = header.get("InstanceNumber")
    frame = header.get("ReferencedFrameNumber")
    return (
        int(number) if isinstance(number, int) else 0,
        str(header.get("SOPInstanceUID")),
        int(frame) if isinstance(frame, int) else 0,
    )


def _by(group: _Group, name: str, values: Sequence[Hashable]) -> list[_Group]:
    """A group taken apart by one value per slice, in order of first appearance."""
    if len(set(values)) < 2:
        return [group]
    parts: dict[Hashable, list[Dataset]] = defaultdict(list)
    for value, header in zip(values, group.slices, strict=True):
        parts[value].append(header)
    return [
        _Group((*group.rule, f"{name} {_text(value)}".strip()), part)
        for value, part in parts.items()
    ]


def _text(value: Hashable) -> str:
    items = value if isinstance(value, tuple) else (value,)
    text = "\\".join(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
    return "".join(c for c in text if c.isprintable())[:_SHOWN] or "(none)"


def _attribute(keyword: str, first: int = 0) -> Callable[[Sequence[Dataset]], list[Hashable]]:
    """The values of an attribute, from value number `first` on (counted from 0)."""
    return lambda headers: [_plain(header, keyword)[first:] for header in headers]


def _plain(header: Dataset, keyword: str) -> tuple[str | float, ...]:
    try:
        value = header.get(keyword)
    except (ValueError, OverflowError):  # a number that is none
        return ("unreadable",)
    if value is None or value == "":
        return ()
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(
        round(float(item), 3) if isinstance(item, int | float) else str(item) for item in items
    )


def _numbers(header: Dataset, keyword: str, count: int) -> tuple[float, ...]:
    """The numbers of an attribute, or () if it is missing or damaged."""
    try:
        return numbers_of(header, keyword, count, "NO_GEOMETRY")
    except SeriesRefused:
        return ()


def _near(keyword: str, count: int, tolerance: float) -> Callable[[Sequence[Dataset]], list[int]]:
    """Which slices have nearly the same numbers: a number per slice, the same for the same."""

    def kinds(headers: Sequence[Dataset]) -> list[int]:
        known: list[tuple[float, ...]] = []
        found = []
        for header in headers:
            values = _numbers(header, keyword, count)
            same = (
                index
                for index, other in enumerate(known)
                if len(other) == len(values) and np.allclose(other, values, 0, tolerance)
            )
            index = next(same, len(known))
            if index == len(known):
                known.append(values)
            found.append(index + 1)
        return found

    return kinds


def _modality(headers: Sequence[Dataset]) -> list[str]:
    return [TRANSLATABLE[header.SOPClassUID] for header in headers]


def _frame_of_reference(headers: Sequence[Dataset]) -> list[int]:
    """Frames of reference; some de-identifiers give every instance its own, which tells nothing."""
    uids = [str(header.get("FrameOfReferenceUID") or "") for header in headers]
    known = list(dict.fromkeys(uids))
    alone = len(known) == len({str(header.get("SOPInstanceUID")) for header in headers})
    return [0 if alone else known.index(uid) + 1 for uid in uids]


def _aside(headers: Sequence[Dataset]) -> list[Hashable]:
    """Where in its plane a slice lies, to 1 mm: slabs side by side have the same positions."""
    orientation = _numbers(headers[0], "ImageOrientationPatient", 6)
    axes = np.asarray(orientation).reshape(2, 3)
    return [
        tuple(float(round(x)) for x in axes @ np.asarray(_numbers(h, "ImagePositionPatient", 3)))
        for h in headers
    ]


def _diffusion(headers: Sequence[Dataset]) -> list[Hashable]:
    """b-value and gradient direction; frames have the direction one level deeper."""
    found: list[Hashable] = []
    for header in headers:
        nested = (header.get("DiffusionGradientDirectionSequence") or [header])[0]
        direction = _plain(nested, "DiffusionGradientOrientation")
        found.append((*_plain(header, "DiffusionBValue"), *direction))
    return found


_Kinds = Callable[[Sequence[Dataset]], Sequence[Hashable]]
_KINDS: tuple[tuple[str, _Kinds], ...] = (  # images of another kind
    ("Modality", _modality),
    ("frame of reference", _frame_of_reference),
    ("orientation", _near("ImageOrientationPatient", 6, SAME_DIRECTION)),
    ("Rows", _attribute("Rows")),
    ("Columns", _attribute("Columns")),
    ("pixel spacing", _near("PixelSpacing", 2, 1e-4)),
    ("ImageType", _attribute("ImageType", 2)),
    ("ComplexImageComponent", _attribute("ComplexImageComponent")),
    ("ConvolutionKernel", _attribute("ConvolutionKernel")),
    ("EchoTime", _attribute("EchoTime")),
    ("EchoNumbers", _attribute("EchoNumbers")),
    ("StackID", _attribute("StackID")),
)
_MOMENTS: tuple[tuple[str, _Kinds], ...] = (  # the same again, at another moment or setting
    ("place in the plane", _aside),
    ("TemporalPositionIdentifier", _attribute("TemporalPositionIdentifier")),
    ("cardiac phase", _attribute("NominalPercentageOfCardiacPhase")),
    ("TriggerTime", _attribute("TriggerTime")),
    ("diffusion", _diffusion),
    ("InversionTime", _attribute("InversionTime")),
    ("FlipAngle", _attribute("FlipAngle")),
    ("KVP", _attribute("KVP")),
    ("FrameReferenceTime", _attribute("FrameReferenceTime")),
    ("AcquisitionNumber", _attribute("AcquisitionNumber")),
    ("AcquisitionDateTime", _attribute("AcquisitionDateTime")),
    ("AcquisitionTime", _attribute("AcquisitionTime")),
)


def _without_repeats(group: _Group) -> list[_Group]:
    """Take slices at the same position apart, by the first attribute which does so evenly."""
    geometry = _geometry(group.slices)
    if geometry is None:
        refusal = SeriesRefused("NO_GEOMETRY", "position or orientation missing", "send it again")
        return [replace(group, refusal=refusal)]
    stack, places = geometry
    if not stack.duplicates:
        return [group]
    for name, kinds in _MOMENTS:
        values = kinds(group.slices)
        if len(set(values)) > 1 and _is_even(values, places):
            parts = _by(group, name, values)
            return [done for part in parts for done in _without_repeats(part)]
    counts = Counter(places)
    if len(set(counts.values())) == 1 and _numbered_once(group.slices):
        return _by(group, "by InstanceNumber, at its position image", _turns(places))
    return _uneven(group, places)


def _geometry(headers: Sequence[Dataset]) -> tuple[Stack, list[int]] | None:
    """The slices as a stack, and for each the number of its position, from 0."""
    orientation = _numbers(headers[0], "ImageOrientationPatient", 6)
    positions = [_numbers(header, "ImagePositionPatient", 3) for header in headers]
    if not orientation or not all(positions):
        return None
    stack = stack_from_positions(positions, orientation)
    places = [0] * len(headers)
    place = 0
    for index, step in zip(stack.order[1:], stack.steps_mm, strict=True):
        place += step >= SAME_POSITION_MM
        places[index] = place
    return stack, places


def _is_even(values: Sequence[Hashable], places: Sequence[int]) -> bool:
    """Whether every value is found at every position."""
    covered: dict[Hashable, set[int]] = defaultdict(set)
    for value, place in zip(values, places, strict=True):
        covered[value].add(place)
    return all(len(found) == len(set(places)) for found in covered.values())


def _numbered_once(headers: Sequence[Dataset]) -> bool:
    """Whether InstanceNumber, or the frame number within one instance, orders all slices."""
    return len({_identity(header)[::2] for header in headers}) == len(headers)


def _turns(places: Sequence[int]) -> list[int]:
    """How many slices at the same position came before, plus 1; slices are in numbered order."""
    seen: Counter[int] = Counter()
    turns = []
    for place in places:
        seen[place] += 1
        turns.append(seen[place])
    return turns


def _uneven(group: _Group, places: Sequence[int]) -> list[_Group]:
    """Slices lie at the same position, and nothing parts them into complete stacks: refused."""
    most = max(Counter(places).values())
    for name, kinds in _MOMENTS:
        parts = _by(group, name, kinds(group.slices))
        if len(parts) == most and not any(_repeats(part.slices) for part in parts):
            counts = ", ".join(str(len(part.slices)) for part in parts)
            refusal = SeriesRefused(
                "UNEQUAL_COUNTS", f"stacks by {name} have {counts} slices", "send all slices"
            )
            return [replace(part, refusal=refusal) for part in parts]
    refusal = SeriesRefused(
        "DUPLICATE_POSITIONS",
        f"{len(places)} slices at {len(set(places))} positions and nothing tells them apart",
        "send each phase or reconstruction as its own series",
    )
    return [replace(group, refusal=refusal)]


def _repeats(headers: Sequence[Dataset]) -> bool:
    geometry = _geometry(headers)
    return geometry is None or geometry[0].duplicates > 0


def _stack(group: _Group) -> StackOfImages:
    """A finished group in slice order, with the gaps it may have."""
    made = StackOfImages("; ".join(group.rule), group.slices, _modality(group.slices)[0])
    geometry = _geometry(group.slices)
    if geometry is None:
        return replace(made, refusal=group.refusal)
    stack = geometry[0]
    ordered = [group.slices[index] for index in stack.order]
    positions = [_numbers(header, "ImagePositionPatient", 3) for header in ordered]
    return replace(
        made,
        datasets=ordered,
        refusal=group.refusal or refuse_gaps(stack),
        step_mm=stack.median_step_mm,
        tilt_degrees=tilt_degrees(positions, _numbers(ordered[0], "ImageOrientationPatient", 6)),
    )
