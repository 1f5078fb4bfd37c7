"""A model and the pairs it is judged on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.config import Images
from training.pairs import Found, Pair
from training.split import Split
from training.translation import Translator


@dataclass(frozen=True, slots=True)
class Case:
    """What a proof needs.

    Attributes:
        part: whose patients are judged: train, validation or test.
        apply: the model, from a source slice to (rows, columns), float32, in the target's unit.
    """

    data: Images
    found: Found
    split: Split
    part: str
    apply: Translator

    def pairs(self, part: str | None = None) -> list[Pair]:
        """All pairs of slices of a part, `self.part` if none is given."""
        wanted = self.split[part or self.part]
        together = zip(self.found.sources, self.found.targets, strict=True)
        return [Pair(one, other) for one, other in together if one.patient in wanted]

    def patients(self) -> list[str]:
        """The patients judged, sorted."""
        return sorted({pair.source.patient for pair in self.pairs()})


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table; numbers with two digits."""
    lines = [" | ".join(head), "|".join("---" for _ in head)]
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(" | ".join(cells))
    return [f"| {line} |" for line in lines]


def spread(values: Sequence[float]) -> str:
    """Mean, and the range over patients."""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
