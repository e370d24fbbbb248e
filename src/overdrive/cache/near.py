"""Entries of a shared store kept in this process, for as long as it hears of every write.

Writes are heard in the order of their numbers. An entry was found valid at some write; it is valid while none that came
after has named one of its tags, and what is heard says so, since it began to listen before that. Where a number is
missing, or nothing is heard for longer than the lease, it knows nothing any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from .entry import Entry, Instant
from .memory import Memory
from .store import size_of, statistics_of

#: Tags written since it began to listen: beyond so many, all is forgotten.
_MOST_STAMPS = 100_000


class _Held:
    """An entry, the write at which it was found valid, and the last change after which it was looked at."""

    __slots__ = ("checked", "entry", "valid_at")

    def __init__(self, entry: Entry, valid_at: int) -> None:
        self.entry = entry
        self.valid_at = valid_at
        self.checked = -1


class Near:
    """What is near of a shared store.

    max_bytes: what entries may take in all.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: Memory[_Held] = Memory(max_bytes)
        #: The write that each tag was last named by, of those heard.
        self._stamps: dict[str, int] = {}
        #: The tags of this process's own commits that are being settled, with how many these are.
        self._settling: Counter[str] = Counter()
        #: The clock when it began to listen, and the last write heard; None while it knows nothing.
        self._since: Instant | None = None
        self._last = 0
        self._changes = 0
        #: When it knows nothing any more, unless it hears something.
        self._until = float("-inf")

    def statistics(self) -> dict[str, int]:
        """Return what is kept."""
        return statistics_of(self._entries, self._stamps)

    def confirm(self, instant: Instant, until: float) -> None:
        """Know until then that nothing was missed, where this is the clock by now; else begin to listen."""
        since = self._since
        if since is None or instant != (since.epoch, self._last):
            self.forget()
            self._since, self._last = instant, instant.now
        self._until = until

    def forget(self) -> None:
        """Know nothing any more, until the clock is known again."""
        self._entries.clear()
        self._stamps.clear()
        self._since = None
        self._changes += 1

    def hear(self, instant: Instant, tags: Collection[str]) -> None:
        """Take note of a write, which is the one after the last."""
        if self._since is None:
            return
        if instant != (self._since.epoch, self._last + 1) or len(self._stamps) > _MOST_STAMPS:
            # What was written meanwhile, or under another clock, nobody knows.
            self.forget()
            return
        self._last = instant.now
        # Where a write is settled, the clock has moved and that is all: since it was marked, nothing was found valid.
        if tags:
            self.wrote(instant, tags)

    def wrote(self, instant: Instant, tags: Iterable[str]) -> None:
        """Take note of this process's own write, which may be heard later."""
        if self._since is not None and instant.epoch != self._since.epoch:
            self.forget()
        self._stamps.update(dict.fromkeys(tags, instant.now))
        self._changes += 1

    def settling(self, tags: Iterable[str]) -> None:
        """Give nothing that has read these until `settled`: their marks may be lost, and nobody has said so yet."""
        self._settling.update(tags)
        self._changes += 1

    def settled(self, tags: Iterable[str]) -> None:
        """Take note that one settlement of these was answered, and what it told of was heard."""
        self._settling.subtract(tags)
        self._settling += Counter()
        self._changes += 1

    def put(self, key: str, entry: Entry, instant: Instant) -> None:
        """Keep an entry that was found valid at `instant`, if all that is written after that is heard."""
        since = self._since
        if since is not None and instant.epoch == since.epoch and instant.now >= since.now:
            self._entries.put(key, _Held(entry, instant.now), size_of(entry))

    def drop(self, key: str) -> None:
        """Forget an entry that there is another for by now."""
        self._entries.pop(key)

    def get(self, key: str, now: float) -> Entry | None:
        """Return an entry, if nothing it read was written since.

        now: on the clock of `until`.
        """
        if now >= self._until:
            return None
        held = self._entries.get(key)
        if held is None:
            return None
        # Mostly nothing at all was written since it was last looked at.
        if held.checked != self._changes:
            tags = held.entry.versions
            if any(self._stamps.get(tag, 0) > held.valid_at or tag in self._settling for tag in tags):
                self._entries.pop(key)
                return None
            held.checked = self._changes
        return held.entry
