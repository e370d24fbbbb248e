"""A map bounded in bytes that keeps what is used often, and is not emptied by what is used once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")

#: A frequency counts no further: what was used more often than this is equally dear.
_MOST = 15
#: How many entries a candidate may meet and lose to before it is turned away.
_CONTESTS = 8
_HALVES = bytes(count >> 1 for count in range(256))


class _Entry(Generic[V]):
    """A value, its size in bytes, and its uses, which are halved for each sample that ended since `sample`."""

    __slots__ = ("sample", "size", "uses", "value")

    def __init__(self, value: V, size: int, uses: int, sample: int) -> None:
        self.value = value
        self.size = size
        self.uses = uses
        self.sample = sample


class Memory(Generic[V]):
    """Keeps at most `max_bytes`, as its callers count them.

    The rule is TinyLFU's (Einziger, Friedman, Manes: "TinyLFU: A Highly Efficient Cache Admission Policy", ACM
    Transactions on Storage 13(4), 2017): where there is no room, a candidate takes the place of an entry only if it
    was used more often, so that a scan of keys used once changes nothing. Uses are counted exactly for what is kept
    and in a count-min sketch for what is not; both are halved after each sample of as many puts as the sketch has
    counters (the paper's reset). The entries a candidate meets are those longest not met; each that is weaker goes
    until there is room, each that is not weaker goes to the end of the queue.

    max_bytes: bytes; the sketch takes one 256th of it on top.
    bytes: the sizes of all entries together.
    evictions: how many entries have made room for another.
    """

    __slots__ = ("_counters", "_entries", "_left", "_mask", "_sample", "bytes", "evictions", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.evictions = 0
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        width = 1 << max(max_bytes >> 8, 256).bit_length() - 1
        self._mask = width - 1
        self._counters = bytearray(width)
        self._sample = 0
        self._left = width

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> V | None:
        """Return the value, and count a use of it."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.uses += 1
        return entry.value

    def put(self, key: Hashable, value: V, size: int) -> bool:
        """Keep `value`, or say that it is not worth it; a former value of the key is gone in either case.

        size: bytes.
        """
        former = self._take(key)
        uses = min(max(self._frequency(key), self._uses(former) if former else 0) + 1, _MOST)
        self._count(key, uses)
        if size > self.max_bytes or not self._make_room(size, uses):
            return False
        self._entries[key] = _Entry(value, size, uses, self._sample)
        self.bytes += size
        return True

    def pop(self, key: Hashable) -> V | None:
        """Take an entry out."""
        entry = self._take(key)
        return None if entry is None else entry.value

    def clear(self) -> None:
        """Take every entry out; how often keys were used is remembered."""
        self._entries.clear()
        self.bytes = 0

    def _take(self, key: Hashable) -> _Entry[V] | None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size
        return entry

    def _make_room(self, size: int, uses: int) -> bool:
        lost = 0
        while self.bytes + size > self.max_bytes:
            key, entry = next(iter(self._entries.items()))
            if (frequency := self._uses(entry)) < uses:
                self._take(key)
                self._count(key, frequency)
                self.evictions += 1
            else:
                self._entries.move_to_end(key)
                lost += 1
                if lost == _CONTESTS:
                    return False
        return True

    def _uses(self, entry: _Entry[V]) -> int:
        entry.uses = min(entry.uses, _MOST) >> (self._sample - entry.sample)
        entry.sample = self._sample
        return entry.uses

    def _places(self, key: Hashable) -> tuple[int, int, int, int]:
        # In a tuple, because an integer is its own hash.
        mixed, mask = hash((key,)), self._mask
        return mixed & mask, mixed >> 13 & mask, mixed >> 26 & mask, mixed >> 39 & mask

    def _frequency(self, key: Hashable) -> int:
        return min(self._counters[place] for place in self._places(key))

    def _count(self, key: Hashable, uses: int) -> None:
        """Let the sketch say at least `uses` of `key`, and begin a new sample where one is complete."""
        for place in self._places(key):
            self._counters[place] = max(self._counters[place], uses)
        self._left -= 1
        if self._left == 0:
            self._counters = self._counters.translate(_HALVES)
            self._left = len(self._counters)
            self._sample += 1
