"""What a reader study says: shares with intervals, agreement between readers."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from training.reading import ARTEFACTS, SIMILARITY, Answer

NEUTRAL = 3
_Z = 1.959964  # of a two-sided 95 % interval


def analyse(answers: Sequence[Answer], draws: int = 2000) -> list[list[str]]:
    """Rows of a table: who, what, figure, 95 % interval, how many.

    Per reader the interval is Wilson's; pooled, a bootstrap over cases, since the answers of
    several readers to one case are not independent. Agreement: weighted kappa with quadratic
    weights (Cohen 1968) for every two readers, on the cases that both have answered.
    """
    readers = sorted({answer.reader for answer in answers})
    rows = []
    for reader in readers:
        own = [answer for answer in answers if answer.reader == reader]
        for what, marks in _marks(own).items():
            hits = [value for values in marks.values() for value in values]
            if hits:
                rows.append([reader, what, *_share(sum(hits), len(hits)), str(len(hits))])
    for what, marks in _marks(answers).items():
        count = sum(len(values) for values in marks.values())
        if count and len(readers) > 1:
            rows.append(["all", what, *_pooled(marks, draws), str(count)])
    for one, other in combinations(readers, 2):
        rows += _agreement(answers, one, other)
    return rows


def _marks(answers: Sequence[Answer]) -> dict[str, dict[str, list[bool]]]:
    """What is counted -> case -> whether it held, once per answer."""
    result: dict[str, dict[str, list[bool]]] = {
        "similarity neutral or better": {},
        "similar or very similar": {},
        "told real from synthetic": {},
        "synthetic taken for real": {},
        "no artefacts, real": {},
        "no artefacts, synthetic": {},
    }

    def count(what: str, case: str, held: bool) -> None:
        result[what].setdefault(case, []).append(held)

    for answer in answers:
        if answer.kind == "pair":
            count("similarity neutral or better", answer.case, answer.similarity >= NEUTRAL)
            count("similar or very similar", answer.case, answer.similarity > NEUTRAL)
            continue
        count("told real from synthetic", answer.case, answer.nature == answer.shown)
        count(f"no artefacts, {answer.shown}", answer.case, answer.artefacts == 1)
        if answer.shown == "synthetic":
            count("synthetic taken for real", answer.case, answer.nature == "real")
    return result


def _share(hits: int, count: int) -> tuple[str, str]:
    low, high = wilson(hits, count)
    return f"{100 * hits / count:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927).

    Raises:
        ValueError: nothing was counted, or more hits than that.
    """
    if not 0 <= hits <= count or count == 0:
        raise ValueError("want 0 <= hits <= count, and a count")
    share, z2 = hits / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count)
    half *= math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _pooled(marks: Mapping[str, Sequence[bool]], draws: int) -> tuple[str, str]:
    """Share over all readers; interval by drawing cases anew."""
    hits = np.array([sum(values) for values in marks.values()], float)
    counts = np.array([len(values) for values in marks.values()], float)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(hits), size=(draws, len(hits)))
    shares = hits[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(shares, (2.5, 97.5))
    share = hits.sum() / counts.sum()
    return f"{100 * share:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"


def _agreement(answers: Sequence[Answer], one: str, other: str) -> list[list[str]]:
    rows = []
    for what, kind, levels in (
        ("similarity", "pair", len(SIMILARITY)),
        ("artefacts", "single", len(ARTEFACTS)),
    ):
        given = [
            {
                (a.case, "" if kind == "pair" else a.shown): getattr(a, what)
                for a in answers
                if a.reader == reader and a.kind == kind
            }
            for reader in (one, other)
        ]
        both = sorted(given[0].keys() & given[1].keys())
        if len(both) > 1:
            scores = np.array([[marks[key] for key in both] for marks in given])
            kappa = weighted_kappa(scores[0], scores[1], levels)
            low, high = _kappa_interval(scores, levels)
            interval = f"{low:.2f} to {high:.2f}"
            rows.append(
                [f"{one}, {other}", f"kappa of {what}", f"{kappa:.2f}", interval, str(len(both))]
            )
    return rows


def weighted_kappa(one: NDArray[np.int64], other: NDArray[np.int64], levels: int) -> float:
    """Agreement of two readers beyond chance, with quadratic weights (Cohen 1968).

    Args:
        one, other: (answers,), whole numbers from 1 to `levels`.

    Returns:
        At most 1; 0 is chance; nan where both always gave one and the same answer.

    Raises:
        ValueError: different numbers of answers, or one out of range.
    """
    if one.shape != other.shape or min(one.min(), other.min()) < 1:
        raise ValueError("want as many answers of both, from 1 on")
    if max(one.max(), other.max()) > levels:
        raise ValueError(f"want answers up to {levels}")
    seen = np.zeros((levels, levels))
    np.add.at(seen, (one - 1, other - 1), 1.0)
    chance = np.outer(seen.sum(1), seen.sum(0)) / seen.sum()
    weights = (np.arange(levels)[:, None] - np.arange(levels)) ** 2
    expected = float((weights * chance).sum())
    return 1 - float((weights * seen).sum()) / expected if expected else float("nan")


def _kappa_interval(scores: NDArray[np.int64], levels: int) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    count = scores.shape[1]
    drawn = [scores[:, rng.integers(count, size=count)] for _ in range(1000)]
    kappas = [weighted_kappa(one, other, levels) for one, other in drawn]
    if np.isnan(kappas).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(kappas, (2.5, 97.5))
    return float(low), float(high)
