"""Encoded lines on their way to the writer, bounded in bytes, and the ledger of what became of each."""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

#: Why a line was not written: the buffer was `full`, the `sink` failed, it was logged while another one was
#: encoded or written (`recursion`), its record could not be turned into a line at all (`encoding`), or it had to make
#: room for later ones of its request (`tail`).
Reason = Literal["full", "sink", "recursion", "encoding", "tail"]

#: A level number, and the bytes.
Line = tuple[int, bytes]

#: Bytes a line takes besides its text: two objects' headers and a slot. Short lines are bounded by them.
_OVERHEAD = 128
_ERROR = logging.ERROR


@dataclass(frozen=True, slots=True)
class Stats:
    """What became of the lines of this process.

    `emitted == written + sum(sampled.values()) + sum(dropped.values()) + pending`; a line that is held until its
    request has ended is emitted then.

    sampled: lines by level name that were let go on purpose.
    dropped: lines by level name.
    pending: lines that are buffered or being written.
    """

    emitted: int
    written: int
    sampled: dict[str, int]
    dropped: dict[str, int]
    pending: int


class Buffer:
    """A queue of lines for one consumer that never keeps its producers waiting.

    max_bytes: memory the lines may take, those being written included. The last eighth is for ERROR and up.

    Producers share a deque, whose operations are atomic, and no lock: that is for the counts of what is taken and
    dropped. It is reentrant, for a signal handler that logs, and is held for no more than a few statements;
    `reset` makes a new one in a forked child, where a thread that no longer exists may have held it.

    The ledger is exact, as it counts what is in the deque. The size is as exact as `+=` between threads: what an
    interrupted one has missed is forgotten when the buffer is next empty.
    """

    def __init__(self, max_bytes: int) -> None:
        self._limit = max_bytes
        self._limit_below_error = max_bytes - max_bytes // 8
        #: Bytes from which the writer is not left to its tick.
        self._early = max_bytes // 8
        self.reset()

    def reset(self) -> None:
        """Forget every line and count, as a forked child must: they are its parent's."""
        self._lock = threading.RLock()
        self._lines: deque[Line] = deque()
        self._size = 0
        #: Lines that were ever taken, what those take that are being written, and lines that are written or dropped.
        self._taken = 0
        self._taken_size = 0
        self.settled = 0
        self._written = 0
        self._sampled: Counter[int] = Counter()
        self._dropped: defaultdict[tuple[Reason, int], int] = defaultdict(int)
        #: Whether the writer waits for a line, and must be woken by the first.
        self.idle = True
        #: Whether what is buffered should be written without waiting for the tick.
        self.urgent = False

    @property
    def accepted(self) -> int:
        """Lines that were ever appended."""
        with self._lock:
            return self._taken + len(self._lines)

    def has_room(self, level: int, line: bytes) -> bool:
        """Say whether `put` would not drop `line` now."""
        limit = self._limit if level >= logging.ERROR else self._limit_below_error
        return self._size + len(line) + _OVERHEAD <= limit

    def put(self, level: int, line: bytes) -> bool:
        """Append `line`, or drop it where there is no room. Return whether the writer must be woken."""
        size = self._size + len(line) + _OVERHEAD
        if size < self._early and level < _ERROR:
            self._size = size
            self._lines.append((level, line))
        elif size > self._limit_below_error and (level < _ERROR or size > self._limit):
            self.drop(level, "full")
        else:
            self._size = size
            self._lines.append((level, line))
            if not self.urgent:
                self.urgent = True
                return True
        if self.idle:
            self.idle = False
            return True
        return False

    def rest(self) -> bool:
        """Have the next line wake the writer, unless lines came that did not; return whether there are none."""
        self.idle = True
        self.idle = not self._lines
        return self.idle

    def drop(self, level: int, reason: Reason, count: int = 1) -> None:
        """Count lines that never became any."""
        with self._lock:
            self._dropped[reason, level] += count

    def sample(self, levels: Mapping[int, int]) -> None:
        """Count lines, by level number, that were let go on purpose."""
        with self._lock:
            for level, count in levels.items():
                self._sampled[level] += count

    def take(self, max_bytes: int) -> list[Line]:
        """Remove and return the oldest lines, up to the one that reaches `max_bytes`. Settle them after."""
        batch: list[Line] = []
        lines, size = self._lines, 0
        with self._lock:
            self.urgent = False
            while lines and size < max_bytes:
                line = lines.popleft()
                batch.append(line)
                size += len(line[1])
            self._taken += len(batch)
            self._taken_size = size + len(batch) * _OVERHEAD
        return batch

    def settle(self, batch: Sequence[Line], written: int) -> None:
        """Count the first `written` lines of `batch` as written, and the others as dropped by the sink."""
        with self._lock:
            self._size = self._size - self._taken_size if self._lines else 0
            self._taken_size = 0
            self._written += written
            for level, _ in batch[written:]:
                self._dropped["sink", level] += 1
            self.settled += len(batch)

    @property
    def dropped(self) -> Counter[tuple[Reason, int]]:
        """Lines that were dropped, by reason and level number."""
        with self._lock:
            return Counter(self._dropped)

    @property
    def stats(self) -> Stats:
        """The ledger, all of it read at one moment."""
        with self._lock:
            accepted = self._taken + len(self._lines)
            refused = sum(count for (reason, _), count in self._dropped.items() if reason != "sink")
            return Stats(
                emitted=accepted + refused + self._sampled.total(),
                written=self._written,
                sampled={logging.getLevelName(level): count for level, count in self._sampled.items()},
                dropped=by_level(Counter(self._dropped)),
                pending=accepted - self.settled,
            )


def by_level(dropped: Counter[tuple[Reason, int]]) -> dict[str, int]:
    """Sum up by level name."""
    levels: Counter[str] = Counter()
    for (_, level), count in dropped.items():
        levels[logging.getLevelName(level)] += count
    return dict(levels)


def by_reason(dropped: Counter[tuple[Reason, int]]) -> dict[str, int]:
    """Sum up by reason."""
    reasons: Counter[str] = Counter()
    for (reason, _), count in dropped.items():
        reasons[reason] += count
    return dict(reasons)
