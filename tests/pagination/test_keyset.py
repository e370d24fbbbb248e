"""The ranges against a plain sort, in Python."""

from __future__ import annotations

from functools import cmp_to_key
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overdrive.pagination.keyset import Key, Range, after, reverse

keys = st.lists(st.builds(Key, st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=3)


def _compare(keys: list[Key], one: tuple[Any, ...], other: tuple[Any, ...]) -> int:
    for key, a, b in zip(keys, one, other, strict=True):
        if a == b:
            continue
        if a is None or b is None:
            return -1 if (a is None) == key.nulls_first else 1
        return -1 if (a < b) != key.descending else 1
    return 0


def _selected(found: Range, row: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    if row[: found.start] != values[: found.start]:
        return False
    own, beyond = row[found.start : found.end], values[found.start : found.end]
    match found.operator:
        case "is_null":
            return own == (None,)
        case "is_not_null":
            return own != (None,)
        case operator:
            return _row_is_beyond(own, beyond, operator) is True


def _row_is_beyond(own: tuple[Any, ...], values: tuple[Any, ...], operator: str) -> bool | None:
    """Compare rows as SQL does: pair by pair, unknown at the first NULL."""
    for one, other in zip(own, values, strict=True):
        if one is None or other is None:
            return None
        if one != other:
            return bool(one < other if operator in ("lt", "le") else one > other)
    return operator in ("le", "ge")


@st.composite
def _orders(draw: st.DrawFn) -> tuple[list[Key], list[tuple[Any, ...]]]:
    order = draw(keys)
    row = st.tuples(*(st.integers(0, 2) | (st.none() if key.nullable else st.nothing()) for key in order))
    return order, draw(st.lists(row, min_size=1, max_size=12))


@given(_orders(), st.booleans(), st.booleans())
def test_the_ranges_are_what_sorts_after_nearest_first(
    case: tuple[list[Key], list[tuple[Any, ...]]], row_values: bool, inclusive: bool
) -> None:
    order, rows = case
    rows = sorted(rows, key=cmp_to_key(lambda a, b: _compare(order, a, b)))
    for values in rows:
        ranges = after(order, values, row_values=row_values, inclusive=inclusive)
        walked = [row for found in ranges for row in rows if _selected(found, row, values)]
        assert walked == [row for row in rows if _compare(order, row, values) >= (0 if inclusive else 1)]


@given(_orders())
def test_reverse_sorts_the_other_way(case: tuple[list[Key], list[tuple[Any, ...]]]) -> None:
    order, rows = case
    forward = sorted(rows, key=cmp_to_key(lambda a, b: _compare(order, a, b)))
    backward = sorted(rows, key=cmp_to_key(lambda a, b: _compare(reverse(order), a, b)))
    assert backward == forward[::-1]


ASC, DESC = Key(False, False, False), Key(True, False, False)
NULLS_FIRST, NULLS_LAST = Key(False, True, True), Key(False, False, True)


@pytest.mark.parametrize(
    ("order", "values", "expected"),
    [
        ([ASC, ASC], (1, 1), [(0, 2, "gt")]),
        ([DESC, DESC, DESC], (1, 1, 1), [(0, 3, "lt")]),
        ([ASC, DESC], (1, 1), [(1, 2, "lt"), (0, 1, "gt")]),
        ([ASC, DESC, DESC], (1, 1, 1), [(1, 3, "lt"), (0, 1, "gt")]),
        ([ASC, NULLS_FIRST], (1, 1), [(0, 2, "gt")]),
        ([ASC, NULLS_LAST], (1, 1), [(1, 2, "gt"), (1, 2, "is_null"), (0, 1, "gt")]),
        ([NULLS_LAST, ASC], (1, 1), [(0, 2, "gt"), (0, 1, "is_null")]),
        ([NULLS_LAST, ASC], (None, 1), [(1, 2, "gt")]),
        ([NULLS_FIRST, ASC], (None, 1), [(1, 2, "gt"), (0, 1, "is_not_null")]),
        ([NULLS_LAST], (None,), []),
    ],
)
def test_as_few_ranges_as_an_index_has(order: list[Key], values: tuple[Any, ...], expected: list[Any]) -> None:
    assert after(order, values, row_values=True) == expected


def test_without_row_values_each_key_has_a_range() -> None:
    assert after([ASC, ASC], (1, 1), row_values=False) == [(1, 2, "gt"), (0, 1, "gt")]
