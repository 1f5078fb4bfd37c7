"""How well probabilities of classes agree with the truth, and whether two sets of them differ."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.intp]
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval by bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def accuracy(probabilities: Floats, truth: Labels) -> float:
    """Share of cases whose most probable class is the true one.

    Args:
        probabilities: (cases, classes).
        truth: (cases,).
    """
    return float((probabilities.argmax(1) == truth).mean())


def area_under_curve(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive case scores higher than a negative one; equal scores count half.

    Args:
        scores, positive: (cases,).

    Returns:
        NaN where there is no positive or no negative case.
    """
    above, below = scores[positive], scores[~positive]
    if not (above.size and below.size):
        return math.nan
    wins = (above[:, None] > below[None]).mean() + 0.5 * (above[:, None] == below[None]).mean()
    return float(wins)


def mean_area(probabilities: Floats, truth: Labels) -> float:
    """Mean over the classes that are there of one class against all others."""
    areas = [
        area_under_curve(probabilities[:, label], truth == label)
        for label in range(probabilities.shape[1])
    ]
    return float(np.nanmean(areas)) if not np.isnan(areas).all() else math.nan


def bootstrap(
    figure: Callable[[NDArray[np.intp]], float], groups: Sequence[str], seed: int = 0
) -> Estimate:
    """A figure of all cases, and its interval over groups of cases that belong together.

    Args:
        figure: of the cases whose numbers it is given, (n,); repeats count again.
        groups: the group (patient) of each case.
    """
    members = [np.flatnonzero(np.array(groups) == group) for group in sorted(set(groups))]
    rng = np.random.default_rng(seed)
    drawn = [
        figure(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]))
        for _ in range(_DRAWS)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Estimate(figure(np.arange(len(groups))), float(low), float(high))


def mcnemar(right: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Exact McNemar test of two ways to classify the same cases.

    Args:
        right, other: (cases,): whether each way was right.

    Returns:
        Cases that only the first has right, that only the other has, and the two-sided p.
    """
    first, second = int((right & ~other).sum()), int((other & ~right).sum())
    count = first + second
    tail = sum(math.comb(count, k) for k in range(min(first, second) + 1))
    return first, second, min(1.0, 2 * tail / 2**count)
