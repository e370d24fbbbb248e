"""How often a request executes the same statement. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Texts that are counted for one request; a request that makes more of them repeats none.
_MOST = 1000
#: Characters of a statement that are shown.
_SHOWN = 200
#: Texts and numbers; not the number of a placeholder, `$1`, nor of a name.
_VALUES = re.compile(r"'(?:[^']|'')*'|(?<![\w$])\d+(?:\.\d+)?\b")


@dataclass(frozen=True, slots=True)
class Repetition:
    """The statement a request has executed most often.

    sql: the first 200 characters of its text, a `?` for each value in it.
    place: file, line and function of the team's code that had executed it when that became too often.
    others: how many other statements were executed too often.
    """

    count: int
    sql: str
    place: tuple[str, int, str]
    others: int


class Repeats:
    """The statements of one request, by their text.

    limit: how often one may be executed.
    """

    __slots__ = ("_counts", "_limit", "_places")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, str]] = {}

    def add(self, sql: str) -> bool:
        """Count a statement; return whether this is the first time that is too often, and `came_from` wants to know."""
        count = self._counts.get(sql, 0) + 1
        if count > 1 or len(self._counts) < _MOST:
            self._counts[sql] = count
        return count == self._limit + 1

    def came_from(self, sql: str, place: tuple[str, int, str]) -> None:
        """Note where in the team's code a statement is executed too often."""
        self._places[sql] = place

    def worst(self) -> Repetition | None:
        """Return what was executed most often, if anything was too often."""
        if not self._places:
            return None
        sql = max(self._places, key=self._counts.__getitem__)
        shown = _VALUES.sub("?", " ".join(sql.split()))[:_SHOWN]
        return Repetition(self._counts[sql], shown, self._places[sql], len(self._places) - 1)
