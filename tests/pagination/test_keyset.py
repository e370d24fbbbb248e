"""The plan against a plain sort, in Python."""

from __future__ import annotations

from functools import cmp_to_key
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overdrive.pagination.keyset import Key, Plan, Term, after, reverse

keys = st.lists(st.builds(Key, st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=3)


def _compare(keys: list[Key], one: tuple[Any, ...], other: tuple[Any, ...]) -> int:
    for key, a, b in zip(keys, one, other, strict=True):
        if a == b:
            continue
        if a is None or b is None:
            return -1 if (a is None) == key.nulls_first else 1
        return -1 if (a < b) != key.descending else 1
    return 0


def _holds(term: Term, row: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    own, value = row[term.key], values[term.key]
    match term.operator:
        case "is_null":
            return own is None
        case "is_not_null":
            return own is not None
        case "eq":
            return own is not None and own == value
        case "lt":
            return own is not None and own < value
        case "gt":
            return own is not None and own > value


def _selected(plan: Plan, row: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    return any(all(_holds(term, row, values) for term in terms) for terms in plan.alternatives)


@st.composite
def _orders(draw: st.DrawFn) -> tuple[list[Key], list[tuple[Any, ...]]]:
    order = draw(keys)
    row = st.tuples(*(st.integers(0, 2) | (st.none() if key.nullable else st.nothing()) for key in order))
    return order, draw(st.lists(row, min_size=1, max_size=12))


@given(_orders())
def test_the_plan_selects_what_sorts_after(case: tuple[list[Key], list[tuple[Any, ...]]]) -> None:
    order, rows = case
    for values in rows:
        plan = after(order, values)
        for row in rows:
            sorts_after = _compare(order, row, values) > 0
            assert _selected(plan, row, values) == sorts_after
            if plan.row_value is not None:
                assert (row > values if plan.row_value == "gt" else row < values) == sorts_after


@given(_orders())
def test_reverse_sorts_the_other_way(case: tuple[list[Key], list[tuple[Any, ...]]]) -> None:
    order, rows = case
    forward = sorted(rows, key=cmp_to_key(lambda a, b: _compare(order, a, b)))
    backward = sorted(rows, key=cmp_to_key(lambda a, b: _compare(reverse(order), a, b)))
    assert backward == forward[::-1]


ASC, DESC = Key(False, False, False), Key(True, False, False)


@pytest.mark.parametrize(
    ("order", "values", "expected"),
    [
        ([ASC, ASC], (1, 1), "gt"),
        ([DESC, DESC], (1, 1), "lt"),
        ([ASC, DESC], (1, 1), None),
        ([ASC, Key(False, False, True)], (1, 1), None),
        ([ASC, ASC], (1, None), None),
    ],
)
def test_a_row_value_needs_one_direction_and_no_nulls(order: list[Key], values: tuple[Any, ...], expected: Any) -> None:
    assert after(order, values).row_value == expected


def test_nothing_comes_after_a_null_that_sorts_last() -> None:
    assert after([Key(False, False, True)], (None,)).alternatives == ()
