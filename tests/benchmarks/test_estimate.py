"""What is claimed of the interval, and of the verdict that follows from it."""

from __future__ import annotations

from fractions import Fraction
from math import comb, inf
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.estimate import Estimate, estimate, speed, verdict
from benchmarks.results import Claim, Entry, Round

_numbers = st.floats(1e-6, 1e6)
_samples = st.lists(_numbers, min_size=1, max_size=60)


def _coverage(count: int, rank: int) -> Fraction:
    """How likely the median lies between the rank-th smallest and the rank-th largest of that many values."""
    return 1 - 2 * sum((Fraction(comb(count, fewer), 2**count) for fewer in range(rank)), Fraction(0))


def _entry(name: str, costs: list[float]) -> Entry:
    return Entry(name, False, [Round(100, 1.0, 100 * cost, 0.001, 0.002) for cost in costs])


@given(_samples)
def test_the_interval_holds_the_median_of_the_values(values: list[float]) -> None:
    value, low, high = estimate(values)
    assert value == median(values)
    assert low <= value <= high


@given(_samples.flatmap(lambda values: st.tuples(st.just(values), st.permutations(values))))
def test_the_order_of_the_values_does_not_matter(orders: tuple[list[float], list[float]]) -> None:
    assert estimate(orders[0]) == estimate(orders[1])


@given(st.lists(_numbers, min_size=1, max_size=5))
def test_fewer_than_six_values_bound_nothing(values: list[float]) -> None:
    assert estimate(values)[1:] == (0.0, inf)


@pytest.mark.parametrize("count", range(6, 201))
def test_the_interval_is_the_tightest_with_its_confidence(count: int) -> None:
    _, low, high = estimate([float(rank) for rank in range(1, count + 1)])
    rank = int(low)
    assert high == count + 1 - rank
    assert _coverage(count, rank) >= Fraction(95, 100) > _coverage(count, rank + 1)


@given(st.lists(_numbers, min_size=1, max_size=30))
def test_nothing_is_faster_than_itself(costs: list[float]) -> None:
    entry = _entry("one", costs)
    assert speed(entry, entry).value == 1


@given(st.lists(st.tuples(_numbers, st.floats(0.5, 2)), min_size=6, max_size=30), st.sampled_from([0.25, 0.5, 2, 4]))
def test_the_weather_of_a_round_strikes_both(rounds: list[tuple[float, float]], factor: float) -> None:
    ours = _entry("ours", [cost * weather for cost, weather in rounds])
    theirs = _entry("theirs", [cost * weather * factor for cost, weather in rounds])
    assert speed(ours, theirs) == pytest.approx((factor, factor, factor))


def test_entries_of_unequal_rounds_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        speed(_entry("one", [1.0] * 6), _entry("other", [1.0] * 7))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (2.0, 3.0, "holds"),
        (1.99, 3.0, "undecided"),
        (1.0, 2.0, "undecided"),
        (1.0, 1.99, "fails"),
        (0.0, inf, "undecided"),
    ],
)
def test_a_claim_holds_if_all_of_the_interval_is_on_its_side(low: float, high: float, expected: str) -> None:
    assert verdict(Claim("one", "other", 2), Estimate((low + min(high, 9)) / 2, low, high)) == expected
