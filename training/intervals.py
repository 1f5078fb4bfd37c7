"""What figures of patients say together: intervals, agreement of two methods, paired tests.

A patient is the unit: several images of one are averaged before anything is computed, so that one
long series does not pass for many patients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from training.errors import TrainingError

_DRAWS = 5000


@dataclass(frozen=True, slots=True)
class Summary:
    """A figure over patients: mean, its 95 % interval by bootstrap, standard deviation, number."""

    mean: float
    low: float
    high: float
    deviation: float
    patients: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What one method has more than another, over patients."""

    mean: float
    low: float
    high: float
    """95 % interval of the mean, by bootstrap over patients."""
    t_test: float
    """Two-sided p of the paired t-test."""
    wilcoxon: float
    """Two-sided p of the signed-rank test."""
    patients: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Bland and Altman 1986: differences of two measurements of the same thing."""

    bias: float
    bias_interval: tuple[float, float]
    lower: float
    lower_interval: tuple[float, float]
    upper: float
    upper_interval: tuple[float, float]
    """Limits of agreement, bias -+ 1.96 standard deviations; intervals are 95 %."""
    number: int


def by_patient(
    values: Sequence[float], patients: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The patients in order, and the mean of each one's values that are numbers."""
    known = [(p, v) for p, v in zip(patients, values, strict=True) if math.isfinite(v)]
    names = tuple(sorted({patient for patient, _ in known}))
    means = [float(np.mean([v for p, v in known if p == name])) for name in names]
    return names, np.asarray(means, np.float64)


def summary(values: Sequence[float], patients: Sequence[str], seed: int = 0) -> Summary:
    """Over patients; NaN of everything where no value is a number."""
    _, means = by_patient(values, patients)
    if not means.size:
        return Summary(math.nan, math.nan, math.nan, math.nan, 0)
    low, high = _interval(means, seed)
    deviation = float(means.std(ddof=1)) if means.size > 1 else math.nan
    return Summary(float(means.mean()), low, high, deviation, means.size)


def difference(
    values: Sequence[float], others: Sequence[float], patients: Sequence[str], seed: int = 0
) -> Difference:
    """`values` minus `others`, of the same images in the same order.

    The p values are NaN with fewer than two patients, and 1 where nothing differs.
    """
    _, means = by_patient(np.subtract(values, others).tolist(), patients)
    if not means.size:
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    low, high = _interval(means, seed)
    t_test = wilcoxon = math.nan
    if means.size > 1:
        same = not means.any()
        steady = bool(np.ptp(means) <= 1e-12 * np.abs(means).max())
        t_test = 1.0 if same else 0.0 if steady else float(stats.ttest_1samp(means, 0.0).pvalue)
        wilcoxon = 1.0 if same else float(stats.wilcoxon(means).pvalue)
    return Difference(float(means.mean()), low, high, t_test, wilcoxon, means.size)


def agreement(values: Sequence[float], others: Sequence[float]) -> Agreement:
    """`values` minus `others`, one pair per patient (or per lymph node).

    Raises:
        TrainingError: fewer than two pairs.
    """
    difference = np.subtract(values, others)
    number = difference.size
    if number < 2:
        raise TrainingError(f"agreement: {number} pairs; two or more are needed")
    bias, spread = float(difference.mean()), float(difference.std(ddof=1))
    factor = float(stats.t.ppf(0.975, number - 1)) * spread
    lower, upper = bias - 1.96 * spread, bias + 1.96 * spread
    of_bias, of_limit = factor / math.sqrt(number), factor * math.sqrt(3 / number)
    return Agreement(
        bias,
        (bias - of_bias, bias + of_bias),
        lower,
        (lower - of_limit, lower + of_limit),
        upper,
        (upper - of_limit, upper + of_limit),
        number,
    )


def _interval(means: NDArray[np.float64], seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    drawn = means[rng.integers(means.size, size=(_DRAWS, means.size))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
