"""Which rows come strictly after a position, for any order, with NULLs where they sort.

The answer is a list of ranges, in terms of keys by their number, that any query language can be written from. Each
range is one that an index in this order holds in one piece, in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Operator = Literal["lt", "le", "gt", "ge", "is_null", "is_not_null"]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of an order.

    descending: whether larger values come first.
    nulls_first: whether NULLs come before every value.
    nullable: whether there may be NULLs.
    """

    descending: bool
    nulls_first: bool
    nullable: bool


class Range(NamedTuple):
    """Rows that equal the position in the keys before `start`, and are beyond it, or at it, in those up to `end`.

    operator: how the keys from `start` to before `end` compare with their values at the position: as a row where
        there are several (SQL:1992, 8.2), and then none of the values is NULL.
    """

    start: int
    end: int
    operator: Operator


def reverse(keys: Sequence[Key]) -> list[Key]:
    """Return the order that walks the same rows from the other end."""
    return [Key(not key.descending, not key.nulls_first, key.nullable) for key in keys]


def after(keys: Sequence[Key], values: Sequence[object], *, row_values: bool, inclusive: bool = False) -> list[Range]:
    """Return the ranges of rows strictly after the one with these values, the nearest first.

    No two have a row in common, and every row of one comes before all of the next.

    row_values: whether a comparison of several keys as a row is one range of an index.
    inclusive: whether the row with these values is wanted, too.
    """
    ranges = []
    end = len(keys)
    for number in reversed(range(len(keys))):
        if row_values and number > 0 and _is_one_row(keys, values, number):
            continue
        key, value = keys[number], values[number]
        has_row = inclusive and end == len(keys)
        if value is not None:
            ranges.append(Range(number, end, _beyond(key, has_row)))
            if key.nullable and not key.nulls_first:
                ranges.append(Range(number, number + 1, "is_null"))
        else:
            if has_row:
                ranges.append(Range(number, end, "is_null"))
            if key.nulls_first:
                ranges.append(Range(number, number + 1, "is_not_null"))
        end = number
    return ranges


def _beyond(key: Key, or_at: bool) -> Operator:
    if key.descending:
        return "le" if or_at else "lt"
    return "ge" if or_at else "gt"


def _is_one_row(keys: Sequence[Key], values: Sequence[object], number: int) -> bool:
    """Say whether one comparison of this key and the one before it, as a row, finds what is beyond either."""
    before, key = keys[number - 1], keys[number]
    # A comparison with a NULL in it is unknown, so it leaves out NULLs: rightly so where they come first.
    return (
        before.descending == key.descending
        and values[number - 1] is not None
        and values[number] is not None
        and (key.nulls_first or not key.nullable)
    )
