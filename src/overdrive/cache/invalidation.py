"""Commits become stamps: what a commit wrote, no entry that read it survives."""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol

from overdrive.context import current

from .history import OUTSIDE, of_request, together
from .store import Mark, Store, StoreUnavailable

logger = logging.getLogger("overdrive")

#: Seconds between two attempts to announce what is left over.
_PAUSE = 0.1


class Write(NamedTuple):
    """A commit that is on its way.

    is_marked: whether the store has heard of it.
    """

    mark: Mark
    is_marked: bool


class _Owed:
    """A write that the store is to be told of; each is another one."""

    __slots__ = ("writer",)

    def __init__(self, writer: str) -> None:
        self.writer = writer


class Listening(Protocol):
    """Whoever hears of writes that no engine here sees."""

    @property
    def is_deaf(self) -> bool:
        """Say whether there may be writes of which nobody has heard for too long."""


class Invalidator:
    """Announces writes to a store, and remembers those it could not announce.

    store: which is told before a commit, so that nothing that was true before it is served or kept from then on, and
        once more after it.
    strict: whether a commit returns only when the store has heard of its end. If not, a request in another process
        that began with that of the commit may share its answer for as long as the message takes.

    It is the cache's side of `pool.observe.CommitObserver`. While a write is unannounced, or one of those who listen
    for others' writes is deaf, this process takes nothing from the store.
    """

    def __init__(self, store: Store, *, strict: bool = False) -> None:
        self.store = store
        self.strict = strict
        #: Each tag with its last write, as one may be written again while it is being announced.
        self._unannounced: dict[str, _Owed] = {}
        self._trying: asyncio.Task[None] | None = None
        #: The marks that may be lost, and whether it is known how their commits have ended.
        self._lost: dict[Mark, bool] = {}
        #: Who listens for writes from outside.
        self.listeners: tuple[Listening, ...] = ()
        #: By an engine's name, those of others that use the same database: rows are tagged by the one that read them.
        self.namesakes: Mapping[str, Collection[str]] = {}

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

    async def before(self, writes: frozenset[str], sql: str) -> Write:
        """Mark what the commit will write; sql: the first statement that did, without values."""
        request = current()
        who = OUTSIDE if request is None else of_request(request.method, request.route)
        mark = Mark(secrets.token_hex(8), self._under_all_names(writes), f"{who} ({sql})")
        try:
            await self.store.mark(mark)
        except StoreUnavailable:
            # The commit goes on: what the store could not be told, it may be after it.
            return Write(mark, is_marked=False)
        return Write(mark, is_marked=True)

    def _under_all_names(self, writes: frozenset[str]) -> frozenset[str]:
        return writes.union(
            other + tag.removeprefix(name)
            for name, others in self.namesakes.items()
            for tag in writes
            if tag.startswith(f"{name}/")
            for other in others
        )

    async def after(self, write: Write, outcome: enum.Enum) -> None:
        """Settle what has ended, and announce what could not be marked.

        What nobody knows the end of stays marked: it may become visible when all have forgotten it.
        """
        mark, is_known = write.mark, outcome.value != "unknown"
        if write.is_marked:
            if not is_known:
                return
            settled = self.store.settle(mark)
            if not settled.done():
                if not self.strict:
                    settled.add_done_callback(partial(self._settled, mark))
                    return
                await asyncio.wait([settled])
            if settled.result() is None:
                return
        elif outcome.value == "rolled_back":
            return
        self._lost[mark] = is_known
        await self.announce(mark.tags, mark.writer)
        await self._outlast()

    def _settled(self, mark: Mark, settled: asyncio.Future[StoreUnavailable | None]) -> None:
        if settled.cancelled() or settled.result() is not None:
            self._lost[mark] = True
            self._unannounced |= dict.fromkeys(mark.tags, _Owed(mark.writer))

    async def _outlast(self) -> None:
        """Wait until the others have been told of all writes, or take nothing from the store for want of that."""
        until = time.monotonic() + (self.store.withdraw() if self.owes else 0)
        while self.owes and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _PAUSE))
            with suppress(StoreUnavailable):
                await self.catch_up()

    async def announce(self, tags: Collection[str], writer: str) -> None:
        """Stamp `tags`, and whatever could not be stamped before; a dead store never fails the caller.

        writer: who wrote, for people.
        """
        self._unannounced |= dict.fromkeys(tags, _Owed(writer))
        try:
            await self.catch_up()
        except StoreUnavailable as error:
            logger.error("the cache could not be told of a write and is left alone until it can: %s", error)
            self.store.withdraw()
            if self._trying is None or self._trying.done() or self._trying.get_loop() is not asyncio.get_running_loop():
                self._trying = asyncio.ensure_future(self._try_again())

    async def _try_again(self) -> None:
        """Announce what is left over as soon as that can be done: until then nobody is served from the store."""
        while self.owes:
            await asyncio.sleep(_PAUSE)
            with suppress(StoreUnavailable):
                await self.catch_up()

    def close(self) -> None:
        """Try no longer: what is left over has kept the store from serving others, and they will forget us."""
        if self._trying is not None and self._trying.get_loop() is asyncio.get_running_loop():
            self._trying.cancel()

    async def catch_up(self) -> None:
        """Announce what is left over; raises `StoreUnavailable` while that cannot be done."""
        if not self._unannounced:
            return
        announced, lost = dict(self._unannounced), dict(self._lost)
        await self.store.bump(announced, together(owed.writer for owed in announced.values()))
        for mark, is_known in lost.items():
            if is_known:
                self.store.settle(mark)
            else:
                await self.store.mark(mark)
            self._lost.pop(mark, None)
        for tag, write in announced.items():
            if self._unannounced.get(tag) is write:
                del self._unannounced[tag]
        if not self._unannounced:
            self.store.rejoin()
