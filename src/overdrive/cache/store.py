"""Where entries and the versions of tags are kept: the contract, and the store inside the process.

A store has a write clock: `bump` moves it and stamps the tags that were written. An entry holds the stamps its
tags had when it was filled, and is valid while they have not changed. What it read may have been written while
it was being read, so a fill names the instant before its first read, and is refused if a stamp is younger.

A commit is marked before it is sent, and settled when its outcome is known. Between the two, and until a deadline where
nobody can say how it ended, its tags are pending: what reads them is not kept. So whoever dies between the two, or
does not learn how it ended, leaves nothing behind that is taken for valid.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from overdrive.instrumentation.numbers import Histogram

from .entry import Entry, Instant
from .history import Written
from .memory import Memory


class Found(NamedTuple):
    """The answer to a look-up.

    entry: what is kept under the key, if it can be read.
    instant: the clock at that moment.
    versions: the stamps of the entry's tags at that moment.
    """

    entry: Entry | None
    instant: Instant
    versions: Mapping[str, int]


#: Who holds the lease of a key whose last response was not for others: each makes its own.
NOBODY_WAITS = "alone"


class Claim(NamedTuple):
    """The answer to who may make an entry.

    found: the look-up, as of a moment at which the lease was the holder's.
    holder: the token of whoever makes the entry, `NOBODY_WAITS`, or nothing where the lease is free.
    """

    found: Found
    holder: str


class Mark(NamedTuple):
    """A write that is about to become visible.

    token: tells it from others of the same tags; hexadecimal.
    writer: who writes, for people.
    """

    token: str
    tags: frozenset[str]
    writer: str


PushMode: TypeAlias = Literal["pubsub", "none"]


class Push(NamedTuple):
    """How a process hears of what others write.

    mode: "pubsub" where it is told of each write, "none" where it has to ask.
    lag: from a write's mark to when it was told here.
    """

    mode: PushMode
    lag: Histogram


#: The stamp of a tag that is pending: later than any instant, so that no fill may have read it.
PENDING = 1 << 62

#: Seconds after which a commit that was not settled is taken for visible, or for one that will never be.
LONGEST_COMMIT = 30.0


class StoreUnavailable(Exception):  # noqa: N818
    """The store did not answer; a request goes on without it."""


class Store(Protocol):
    """The contract of the stores. Whatever is awaited may raise `StoreUnavailable`.

    off: the names of what is switched off, as this process last heard: each look-up brings the present ones.
    """

    off: frozenset[str]

    def seen(self) -> Instant | None:
        """Return an instant that is not in the future, without asking anyone; None where none is known."""

    def held(self, key: str) -> Entry | None:
        """Return an entry of this process, if nothing it read has been written since, without asking anyone."""

    async def load(self, key: str, fingerprint: str) -> Found:
        """Look up an entry; one that is damaged, or has another fingerprint, is none."""

    async def versions(self, tags: Collection[str]) -> tuple[str, dict[str, int]]:
        """Return the epoch and the stamp of each tag, made up of the clock where a tag has none.

        That of a pending tag is `PENDING`; one that has been pending for too long is stamped anew.
        """

    def refuses(self, tags: Collection[str]) -> str | None:
        """Say in a word why nothing that has read these is kept; None where it is."""

    async def save(self, key: str, entry: Entry, ttl: float) -> None:
        """Keep an entry for `ttl` seconds at least."""

    async def discard(self, key: str) -> None:
        """Keep what lies under the key no longer."""

    async def claim(self, key: str, fingerprint: str, token: str) -> Claim | None:
        """Take the lease of a key if it is free, and look the entry up after that.

        token: whose the lease is to be; empty to see only whose it is.

        Whoever holds the lease keeps it while its process lives, and for five seconds at most after that. None where no
        other process shares the store, and there is nobody to agree with.
        """

    def release(self, key: str, token: str, *, alone: bool) -> None:
        """Give the lease back if it is `token`'s, without waiting for anyone.

        alone: whether those who wait are to go ahead all at once, since what was made is not for them.
        """

    async def bump(self, tags: Collection[str], writer: str = "") -> None:
        """Move the clock, and stamp `tags` with it; writer: who wrote, for people."""

    async def mark(self, mark: Mark) -> None:
        """Do as `bump` does, and have the tags pending until the mark is settled, or for 30 seconds."""

    def settle(self, mark: Mark) -> asyncio.Future[StoreUnavailable | None]:
        """Do as `bump` does, and have the tags pending for this mark no longer; without waiting for anyone.

        The future's result is the error that has come of it, if any.
        """

    async def history(self) -> list[Written]:
        """Return the last writes, newest first, as far as they are remembered for others."""

    def withdraw(self) -> float:
        """Have nothing served to others, as this process has writes that they cannot be told of.

        Returns the seconds until that is so.
        """

    def rejoin(self) -> None:
        """Undo `withdraw`, now that they have been told."""

    def each_time(self, call: Callable[[], None]) -> None:
        """Have `call` called now and then, where look-ups may stay away since entries are in this process."""

    async def clear(self) -> None:
        """Begin a new epoch: no entry is valid any more."""

    async def switch(self, name: str, *, off: bool) -> frozenset[str]:
        """Switch `name` off, or on again, for all who share the store; return what is off now."""

    async def switched_off(self) -> frozenset[str]:
        """Return what is off now."""

    def add(self, counts: Mapping[tuple[str, str], int]) -> bool:
        """Add to the counts of all who share the store, by route and name, without waiting; say whether it was sent."""

    async def sums(self) -> dict[str, dict[str, int]] | None:
        """Return these counts, by route and by name; None where nobody shares the store."""

    def statistics(self) -> dict[str, int]:
        """Return what this process has of it and has counted, by name."""

    def push(self) -> Push | None:
        """Return how this process hears of what others write; None where nobody shares the store."""

    async def aclose(self) -> None:
        """Give connections back."""


#: Tags are tables, but also rows and calls that were written: beyond so many, all is forgotten.
_MOST_STAMPS = 250_000
#: Bytes that an entry, each of its headers and each of its tags take besides their text.
_OVERHEAD, _OF_A_HEADER, _OF_A_TAG = 800, 120, 100
#: Where Linux says how many bytes a container may use (cgroup v2 and v1).
_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def bytes_of_process(max_bytes: int | None) -> int:
    """Return the bytes that entries may take in this process: by default a sixteenth of what it may use.

    That is what its container may use, or the machine has.
    """
    if max_bytes is not None:
        return max_bytes
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [1 << 30]
    for path in _LIMITS:
        with suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    return min(limits) // 16


def size_of(entry: Entry) -> int:
    """Return the bytes an entry takes in memory, about."""
    forms = (entry,) if entry.gzipped is None else (entry, entry.gzipped)
    headers = sum(len(name) + len(value) + _OF_A_HEADER for form in forms for name, value in form.headers)
    tags = sum(len(tag) + _OF_A_TAG for tag in entry.versions)
    return sum(len(form.body) for form in forms) + headers + tags + _OVERHEAD


def statistics_of(entries: Memory[Any], tags: Sized) -> dict[str, int]:
    """Return what entries in the process come to, by name."""
    return {
        "entries": len(entries),
        "memory": entries.bytes,
        "evictions": entries.evictions,
        "tags": len(tags),
    }


class _Held:
    """An entry, and the instant at which it was last found not to be outdated."""

    __slots__ = ("checked", "entry")

    def __init__(self, entry: Entry, checked: Instant | None) -> None:
        self.entry = entry
        self.checked = checked


class MemoryStore:
    """Entries inside the process, for a service of one worker; `alone` sees to it that it is one.

    max_bytes: what entries may take in all; left out, a sixteenth of the memory that the process may use.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._entries: Memory[_Held] = Memory(bytes_of_process(max_bytes))
        self._stamps: dict[str, int] = {}
        #: The marks of each tag that is pending, with the time at which they have run out.
        self._pending: dict[str, dict[str, float]] = {}
        self._instant = Instant(secrets.token_hex(8), 0)
        self.off: frozenset[str] = frozenset()

    def seen(self) -> Instant:
        """Return the clock: this store is in the process."""
        return self._instant

    def held(self, key: str) -> Entry | None:
        """Return an entry, if nothing it read has been written since."""
        held = self._entries.get(key)
        if held is None:
            return None
        entry = held.entry
        # Mostly nothing at all was written since it was last looked at.
        if held.checked is not self._instant:
            if entry.is_outdated(self._instant.epoch, self._stamps_of(entry.versions)):
                return None
            held.checked = self._instant
        return entry

    async def load(self, key: str, fingerprint: str) -> Found:
        """Look up an entry."""
        held = self._entries.get(key)
        if held is None or held.entry.fingerprint != fingerprint:
            return Found(None, self._instant, {})
        return Found(held.entry, self._instant, self._stamps_of(held.entry.versions))

    async def versions(self, tags: Collection[str]) -> tuple[str, dict[str, int]]:
        """Return the epoch and the stamp of each tag; one that was never written has zero."""
        pending = self._pending.keys() & set(tags)
        if over := {tag for tag in pending if max(self._pending[tag].values()) <= time.monotonic()}:
            for tag in over:
                del self._pending[tag]
            await self.bump(over)
        return self._instant.epoch, self._stamps_of(tags) | dict.fromkeys(pending - over, PENDING)

    def _stamps_of(self, tags: Iterable[str]) -> dict[str, int]:
        return {tag: self._stamps.get(tag, 0) for tag in tags}

    def refuses(self, tags: Collection[str]) -> str | None:
        """Refuse nothing."""

    async def save(self, key: str, entry: Entry, ttl: float) -> None:
        """Keep an entry until it is pushed out; whether it has expired is judged when it is read."""
        # As if it had been looked at before all writes.
        self._entries.put(key, _Held(entry, None), size_of(entry))

    async def discard(self, key: str) -> None:
        """Keep what lies under the key no longer."""
        self._entries.pop(key)

    async def claim(self, key: str, fingerprint: str, token: str) -> None:
        """No other process makes entries here."""

    def release(self, key: str, token: str, *, alone: bool) -> None:
        """There are no leases."""

    async def bump(self, tags: Collection[str], writer: str = "") -> None:
        """Move the clock, and stamp `tags` with it."""
        if len(self._stamps) > _MOST_STAMPS:
            await self.clear()
        self._stamp(tags)

    def _stamp(self, tags: Iterable[str]) -> None:
        self._instant = Instant(self._instant.epoch, self._instant.now + 1)
        self._stamps.update(dict.fromkeys(tags, self._instant.now))

    async def mark(self, mark: Mark) -> None:
        """Stamp the tags, and have them pending."""
        await self.bump(mark.tags)
        deadline = time.monotonic() + LONGEST_COMMIT
        for tag in mark.tags:
            self._pending.setdefault(tag, {})[mark.token] = deadline

    def settle(self, mark: Mark) -> asyncio.Future[StoreUnavailable | None]:
        """Stamp the tags, and have them pending for this mark no longer."""
        self._stamp(mark.tags)
        now = time.monotonic()
        for tag in mark.tags:
            marks = self._pending.pop(tag, {})
            if left := {token: until for token, until in marks.items() if token != mark.token and until > now}:
                self._pending[tag] = left
        settled: asyncio.Future[StoreUnavailable | None] = asyncio.get_running_loop().create_future()
        settled.set_result(None)
        return settled

    async def history(self) -> list[Written]:
        """Nobody else could ask."""
        return []

    def withdraw(self) -> float:
        """Nobody else is served from here."""
        return 0.0

    def rejoin(self) -> None:
        """Nobody else is served from here."""

    def each_time(self, call: Callable[[], None]) -> None:
        """Nobody else is to be told of anything."""

    async def clear(self) -> None:
        """Begin a new epoch and forget every entry."""
        self.begin_anew()

    def begin_anew(self) -> None:
        """Do so at once."""
        self._instant = Instant(secrets.token_hex(8), 0)
        self._entries.clear()
        self._stamps.clear()

    async def switch(self, name: str, *, off: bool) -> frozenset[str]:
        """Switch `name` off, or on again."""
        self.off = self.off | {name} if off else self.off - {name}
        return self.off

    async def switched_off(self) -> frozenset[str]:
        """Return what is off."""
        return self.off

    def add(self, counts: Mapping[tuple[str, str], int]) -> bool:
        """Nobody else is there to be told."""
        return False

    async def sums(self) -> None:
        """Nobody shares this store."""

    def statistics(self) -> dict[str, int]:
        """Return what is kept."""
        return statistics_of(self._entries, self._stamps)

    def push(self) -> None:
        """Nobody else writes here."""

    async def aclose(self) -> None:
        """Nothing is open."""
