"""Who wrote last: what is remembered of writes, for people, and which of them has outdated an entry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .entry import Instant

#: Who commits where there is no request.
OUTSIDE = "a write outside of a request"

#: Writers that are named, of those whose writes were announced as one.
_MOST_NAMED = 3


class Written(NamedTuple):
    """A write that is remembered.

    instant: the write clock after it.
    tags: what it wrote.
    writer: who wrote; never with values.
    age: seconds since then.
    """

    instant: Instant
    tags: frozenset[str]
    writer: str
    age: float


def of_request(method: str, route: str | None) -> str:
    """Return how a request is called that writes; route: its template, for a path has values."""
    return f"{method} {route or 'of an unknown route'}"


def together(writers: Iterable[str]) -> str:
    """Return who has made writes that are announced as one: which of them wrote which tag is not told apart."""
    named = list(dict.fromkeys(writers))
    return " or ".join(named[:_MOST_NAMED] + ["another write"] * (len(named) > _MOST_NAMED))


def outdated_by(tag: str, since: Instant, now: int, history: Iterable[Written]) -> str:
    """Return which write was the last that named `tag`, after one instant and until another of the same epoch.

    history: newest first.
    """
    for written in history:
        epoch, number = written.instant
        if epoch == since.epoch and since.now < number <= now and tag in written.tags:
            return f"outdated by {written.writer or 'an unnamed write'}, {written.age:.1f} s ago"
    return "outdated by a write that is no longer remembered"
