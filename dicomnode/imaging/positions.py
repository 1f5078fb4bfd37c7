"""Where slices lie: their order along the normal, the gaps between them, a tilt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dicomnode.errors import SeriesRefused

GAP_TOLERANCE = 0.1
"""How far a step may be from a whole multiple of the median step and still be a gap, in steps."""
SAME_POSITION_MM = 0.01
"""Slices closer than this along the normal lie at the same position."""
SAME_DIRECTION = 1e-4
"""Largest difference of a direction cosine within one stack: 0.05 mm at 500 mm."""
SHEARED_DEGREES = 0.1
"""A stack whose axis is farther than this from the slice normal is sheared (gantry tilt)."""


@dataclass(frozen=True, slots=True)
class Stack:
    """What positions alone tell about parallel slices.

    Attributes:
        order: indices into the positions given, from the smallest to the largest projection on
            the slice normal (row direction x column direction).
        steps_mm: distance along the normal between neighbours in that order.
        gaps: ordered slices after which at least one is missing.
    """

    order: tuple[int, ...]
    steps_mm: tuple[float, ...]
    gaps: tuple[int, ...]

    @property
    def median_step_mm(self) -> float:
        """The usual distance between neighbours, mm; the lower median, 0 for a single slice."""
        return sorted(self.steps_mm)[(len(self.steps_mm) - 1) // 2] if self.steps_mm else 0.0

    @property
    def missing(self) -> int:
        """How many slices the gaps have room for."""
        return sum(round(self.steps_mm[gap] / self.median_step_mm) - 1 for gap in self.gaps)

    @property
    def duplicates(self) -> int:
        """How many slices lie where their predecessor lies."""
        return sum(step < SAME_POSITION_MM for step in self.steps_mm)


def stack_from_positions(
    positions: Sequence[Sequence[float]], orientation: Sequence[float]
) -> Stack:
    """Order parallel slices along their normal and find the gaps between them.

    A gap is a step of two, three, ... times the median step, to within `GAP_TOLERANCE` steps.
    Other irregularities (blocks of 4 mm and 7 mm; 3.19, 3.27, 3.29 mm) are how the series is.

    Args:
        positions: (slices, 3), ImagePositionPatient, LPS mm, in any order.
        orientation: (6,), ImageOrientationPatient of all of them.
    """
    directions = np.asarray(orientation, dtype=np.float64)
    normal = np.cross(directions[:3], directions[3:])
    along = np.asarray(positions, dtype=np.float64).reshape(-1, 3) @ normal
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    median = Stack((), tuple(steps), ()).median_step_mm
    multiples = steps / median if median > SAME_POSITION_MM else np.zeros_like(steps)
    whole = np.rint(multiples)
    gaps = np.flatnonzero((whole >= 2) & (np.abs(multiples - whole) <= GAP_TOLERANCE))
    return Stack(
        tuple(int(index) for index in order),
        tuple(float(step) for step in steps),
        tuple(int(gap) for gap in gaps),
    )


def tilt_degrees(
    positions: NDArray[np.float64] | Sequence[Sequence[float]],
    orientation: NDArray[np.float64] | Sequence[float],
) -> float:
    """Angle between slice normal and the line from first to last slice, 0 to 90 degrees.

    Args:
        positions: (slices, 3), LPS mm, in slice order.
        orientation: (6,), of all slices.
    """
    places = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
    directions = np.asarray(orientation, dtype=np.float64)
    normal = np.cross(directions[:3], directions[3:])
    axis = places[-1] - places[0]
    along = float(axis @ normal)
    aside = float(np.linalg.norm(axis - along * normal))
    return float(np.degrees(np.arctan2(aside, abs(along)))) if along or aside else 0.0


def refuse_gaps(stack: Stack) -> SeriesRefused | None:
    """Why a stack with gaps is no volume; None if it has none."""
    if not stack.gaps:
        return None
    return SeriesRefused(
        "MISSING_SLICES",
        f"{stack.missing} slice(s) missing in {len(stack.gaps)} gap(s), "
        f"first after slice {stack.gaps[0] + 1} of {len(stack.order)}",
        "send the missing slices",
    )
