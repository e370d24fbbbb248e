"""What a page asks of whoever keeps what was found out about a list."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .recipe import Query
from .select import Steps


class Kept(NamedTuple):
    """What is kept of a list, and from where it is right.

    body: None where nothing is kept yet.
    since: of the keeper's, to be handed back to it.
    """

    body: bytes | None
    since: object


class Keeper(Protocol):
    """Keeps what was found out about a list until something it depends on is written."""

    def name_of(self, query: Query) -> str | None:
        """Return what tells a query, with its values, from every other one; None where nothing of it can be kept."""

    async def number(self, name: str, count: Steps[int]) -> int:
        """Return the number that is kept, or what these steps come to."""

    async def look(self, name: str) -> Kept | None:
        """Return what is kept, as of now; None where nothing can be."""

    async def keep(self, name: str, body: bytes, kept: Kept) -> None:
        """Keep what was read since `kept` was looked for, unless it was written meanwhile."""
