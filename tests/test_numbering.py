"""SeriesNumbers: no two of what is made of the series of a study are equal, and all fit an IS."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.numbering import (
    CLASSIFIER,
    GSPS,
    QA_REPORT,
    RETRACTION,
    companion_number,
    images_number,
)

KINDS = (GSPS, QA_REPORT, CLASSIFIER, RETRACTION)
LARGEST = 2**31 - 1


def family(source: Any, rule: str | int, stacks: int) -> list[int]:
    """Every number that is given to something made of one source series."""
    images = [images_number(source, rule, stack) for stack in range(1, stacks + 1)]
    return images + [companion_number(number, kind) for number, kind in product(images, KINDS)]


@given(
    st.sets(st.integers(0, 100_000), min_size=1, max_size=12),
    st.integers(22, 100_000),
    st.lists(st.integers(1, 30), min_size=12, max_size=12),
)
def test_no_two_numbers_of_a_study_are_equal(
    sources: set[int], offset: int, stacks: list[int]
) -> None:
    made = [
        number
        for source, count in zip(sorted(sources), stacks, strict=False)
        for number in family(source, f"+{offset}", count)
    ]
    assert len(set(made)) == len(made)
    assert not {n for n in made if n > 214_747} & sources


def test_neighbouring_series_under_the_usual_rule_do_not_share_a_number() -> None:
    made = [number for source in range(1, 40) for number in family(source, "+1000", 3)]
    assert len(set(made)) == len(made)


def test_five_hundred_and_twenty_stacks_stay_in_their_block() -> None:
    one, other = family(3, "+1000", 520), family(4, "+1000", 520)
    assert len({*one, *other}) == 2 * 520 * (1 + len(KINDS))


@pytest.mark.parametrize(
    ("source", "rule", "number", "companion"),
    [
        (4, "+1000", 1004, 10040002),
        (201, "+1000", 1201, 12010002),
        (4, 77, 77, 770002),
        (None, "+1000", 1000, 10000002),
        (-3, "+1000", 1000, 10000002),
        ("x", "+1000", 1000, 10000002),
        (2**31 - 1, "+1000", 1000, 10000002),
        (999_000, "+1000", 1_000_000, 1_000_002),
        (4, 999_999_999, 999_999_999, 1_000_000_001),
    ],
)
def test_a_number_follows_from_the_source_and_the_rule(
    source: Any, rule: str | int, number: int, companion: int
) -> None:
    assert images_number(source, rule) == images_number(source, rule, 1) == number
    assert companion_number(number, QA_REPORT) == companion


@given(
    st.one_of(st.none(), st.integers(-(2**40), 2**40)),
    st.one_of(st.integers(1, 999_999_999), st.integers(1, 999_999_999).map("+{}".format)),
    st.integers(0, 3000),
)
def test_every_number_is_an_integer_string(source: Any, rule: str | int, stack: int) -> None:
    number = images_number(source, rule, stack)
    assert 0 <= number <= LARGEST
    assert all(0 < companion_number(number, kind) <= LARGEST for kind in KINDS)


@pytest.mark.parametrize("number", [None, 0, LARGEST, LARGEST - 1])
def test_a_companion_of_images_with_no_usable_number_has_one(number: Any) -> None:
    assert 0 < companion_number(number, RETRACTION) <= LARGEST
