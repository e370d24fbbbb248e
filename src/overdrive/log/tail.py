"""What a request logs below WARNING, held until it is known whether anyone will want to read it.

.NET calls it log buffering, Monolog "fingers crossed".
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import RLock
from typing import Protocol

from overdrive.context import RequestContext

#: Bytes that one request's lines may take; the oldest make room.
_MAX_BYTES = 64 * 1024
#: Bytes of an entry besides its arguments.
_OVERHEAD = 256


#: A line that is not encoded yet, as nothing in it can change: seconds since the epoch, the logger's name, level,
#: message and arguments, and the end of the line, with what was bound when it was logged.
Plain = tuple[float, str, int, str, tuple[object, ...], bytes]


class Keeper(Protocol):
    """Who decides for how long, and takes what comes of it."""

    #: Seconds from which a request counts as slow.
    slow: float | None

    def keep(self, level: int, line: Plain | bytes) -> None:
        """Write a line of a request that has failed or was slow."""

    def sample(self, levels: Mapping[int, int]) -> None:
        """Count lines, by level number, that were let go as nothing was wrong."""

    def lose(self, levels: Mapping[int, int]) -> None:
        """Count lines, by level number, that had to make room in a request whose lines were kept."""


class Tail:
    """The lines of one request for one handler: a ring in bytes.

    Appending to a list is atomic, so that a lock is for taking lines alone: whoever adds one to a request that has
    just ended hands it on itself.
    """

    __slots__ = ("_ended", "_gone", "_keeper", "_kept", "_lines", "_lock", "_size")

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._lines: list[tuple[int, Plain | bytes, int]] = []
        self._size = 0
        self._gone: dict[int, int] = {}
        self._lock = RLock()
        self._ended = self._kept = False

    def hold(self, level: int, line: Plain | bytes, size: int) -> None:
        """Add a line of `size` bytes."""
        self._lines.append((level, line, size))
        self._size += size + _OVERHEAD
        if self._size > _MAX_BYTES:
            self._make_room()
        if self._ended:
            self._hand_on()

    def end(self, context: RequestContext) -> None:
        """Hand on what was held, as the request has ended."""
        slow = self._keeper.slow
        self._kept = context.outcome in ("error", "cancelled") or (slow is not None and context.duration >= slow)
        self._ended = True
        self._hand_on()

    def _make_room(self) -> None:
        with self._lock:
            oldest = 0
            while self._size > _MAX_BYTES and oldest < len(self._lines):
                level, _, size = self._lines[oldest]
                self._size -= size + _OVERHEAD
                self._gone[level] = self._gone.get(level, 0) + 1
                oldest += 1
            del self._lines[:oldest]

    def _hand_on(self) -> None:
        with self._lock:
            gone, self._gone = self._gone, {}
            held = self._lines[:]
            del self._lines[: len(held)]
        if self._kept:
            for level, line, _ in held:
                self._keeper.keep(level, line)
            if gone:
                self._keeper.lose(gone)
            return
        for level, _, _ in held:
            gone[level] = gone.get(level, 0) + 1
        if gone:
            self._keeper.sample(gone)


def end_tails(context: RequestContext) -> None:
    """Hand on what handlers have held of a request that has ended; what it logs from now on is not held."""
    tails, context.tails = context.tails, None
    for tail in (tails or {}).values():
        tail.end(context)
