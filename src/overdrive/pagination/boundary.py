"""Rows of a list whose numbers are known: from the nearest of them, in either direction, a page is found by keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

#: What is known of one list. 2,000,000 rows read from end to end are known every 2,000 rows.
MOST = 1_000

#: Rows nearer to a known one are found from there as quickly.
NEAR = 100


def nearest(numbers: Iterable[int], number: int) -> int:
    """Return which of these rows is the nearest to one of this number; 0, where the list begins, always is one."""
    return min((0, *numbers), key=lambda known: abs(known - number))


def noted(known: Mapping[int, T], number: int, value: T) -> dict[int, T]:
    """Return what is known, and a row more, thinned out where it is too much: what is left is spread evenly."""
    kept = {**known, number: value}
    while len(kept) > MOST:
        rows = [0, *sorted(kept)]
        # The last one stays: nothing else is known of what is around it.
        gaps = zip(rows, rows[1:], rows[2:], strict=False)
        _, least = min((after - before, row) for before, row, after in gaps)
        del kept[least]
    return kept
