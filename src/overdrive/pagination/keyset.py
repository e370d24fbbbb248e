"""Which rows come strictly after a position, for any order, with NULLs where they sort.

The answer is a plan, in terms of keys by their number, that any query language can be written from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Operator = Literal["eq", "lt", "gt", "is_null", "is_not_null"]


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


class Term(NamedTuple):
    """A comparison of the key numbered `key` with that key's value at the position."""

    key: int
    operator: Operator


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows for which every term of one of the alternatives holds; without alternatives, no row.

    row_value: the operator with which one comparison of all keys as a row says the same (SQL:1992, 8.2),
        where there is one.
    """

    alternatives: tuple[tuple[Term, ...], ...]
    row_value: Literal["lt", "gt"] | None


def reverse(keys: Sequence[Key]) -> list[Key]:
    """Return the order that walks the same rows from the other end."""
    return [Key(not key.descending, not key.nulls_first, key.nullable) for key in keys]


def after(keys: Sequence[Key], values: Sequence[object]) -> Plan:
    """Plan the rows strictly after the one with these values.

    Each alternative is equal on some leading keys and later on the next one.
    """
    alternatives: list[tuple[Term, ...]] = []
    equal: tuple[Term, ...] = ()
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        alternatives += [(*equal, Term(number, operator)) for operator in _later(key, value)]
        equal = (*equal, Term(number, "is_null" if value is None else "eq"))
    return Plan(tuple(alternatives), _row_value(keys, values))


def _later(key: Key, value: object) -> list[Operator]:
    if value is None:
        return ["is_not_null"] if key.nulls_first else []
    beyond: Operator = "lt" if key.descending else "gt"
    return [beyond, "is_null"] if key.nullable and not key.nulls_first else [beyond]


def _row_value(keys: Sequence[Key], values: Sequence[object]) -> Literal["lt", "gt"] | None:
    uniform = len({key.descending for key in keys}) == 1
    # A comparison with a NULL in it is unknown, not false or true.
    if not uniform or any(key.nullable for key in keys) or any(value is None for value in values):
        return None
    return "lt" if keys[0].descending else "gt"
