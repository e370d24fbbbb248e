"""Commits become stamps: what a commit wrote, no entry that read it survives."""

from __future__ import annotations

import enum
import logging
from collections.abc import Collection
from typing import Protocol

from .store import Store, StoreUnavailable

logger = logging.getLogger("overdrive")


class Listening(Protocol):
    """Whoever hears of writes that no engine here sees."""

    @property
    def is_deaf(self) -> bool:
        """Say whether there may be writes of which nobody has heard for too long."""


class Invalidator:
    """Announces writes to a store, and remembers those it could not announce.

    It is the cache's side of `pool.observe.CommitObserver`. While a write is unannounced, or one of those who listen
    for others' writes is deaf, this process takes nothing from the store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        #: Each tag with its last write, as one may be written again while it is being announced.
        self._unannounced: dict[str, object] = {}
        #: Who listens for writes from outside.
        self.listeners: tuple[Listening, ...] = ()

    @property
    def owes(self) -> bool:
        """Say whether there are writes that the store has not been told of."""
        return bool(self._unannounced)

    @property
    def is_deaf(self) -> bool:
        """Say whether there may be writes from outside that nobody has heard of."""
        return bool(self.listeners) and any(listener.is_deaf for listener in self.listeners)

    @property
    def is_behind(self) -> bool:
        """Say whether nothing may be taken from the store, as far as this process knows."""
        return self.owes or self.is_deaf

    async def before(self, writes: frozenset[str]) -> frozenset[str]:
        """Carry the writes over the commit."""
        return writes

    async def after(self, token: frozenset[str], outcome: enum.Enum) -> None:
        """Announce what was, or may have been, committed."""
        if outcome.value != "rolled_back":
            await self.announce(token)

    async def announce(self, tags: Collection[str]) -> None:
        """Stamp `tags`, and whatever could not be stamped before; a dead store never fails the caller."""
        self._unannounced |= dict.fromkeys(tags, object())
        try:
            await self.catch_up()
        except StoreUnavailable as error:
            logger.error("the cache could not be told of a write and is left alone until it can: %s", error)

    async def catch_up(self) -> None:
        """Announce what is left over; raises `StoreUnavailable` while that cannot be done."""
        if self._unannounced:
            announced = dict(self._unannounced)
            await self.store.bump(announced)
            for tag, write in announced.items():
                if self._unannounced.get(tag) is write:
                    del self._unannounced[tag]
