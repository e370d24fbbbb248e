"""What a request logs below WARNING, held until it is known whether anyone will want to read it.

.NET calls it log buffering, Monolog "fingers crossed".
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter

from overdrive.context import RequestContext

#: Bytes that one request's lines may take; the oldest make room.
_MAX_BYTES = 64 * 1024
#: Bytes of an entry besides its arguments.
_OVERHEAD = 256


#: A line that is not encoded yet, as nothing in it can change: microseconds since the epoch, the logger's name,
#: message and arguments, and the end of the line, with what was bound when it was logged.
Plain = tuple[int, str, str, tuple[object, ...], bytes]

_Held = tuple[int, Plain | bytes, int]
_level_of: Callable[[_Held], int] = itemgetter(0)


class Tail:
    """The lines of one request for one handler: a ring in bytes.

    keep: takes each line in order, once the request has failed or was slow.
    sample: takes the lines by level number that were let go as nothing was wrong.
    lose: takes those that had to make room in a request whose lines were kept.

    Nothing is locked, as every operation on a deque is atomic: whoever adds a line to a request that has just ended
    hands it on itself.
    """

    __slots__ = ("_ended", "_gone", "_keep", "_kept", "_lines", "_lose", "_sample", "_size", "slow")

    def __init__(
        self,
        slow: float | None,
        keep: Callable[[int, Plain | bytes], None],
        sample: Callable[[Counter[int]], None],
        lose: Callable[[Counter[int]], None],
    ) -> None:
        self.slow = slow
        self._keep, self._sample, self._lose = keep, sample, lose
        self._lines: deque[_Held] = deque()
        self._size = 0
        self._gone: Counter[int] = Counter()
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
        slow = self.slow is not None and context.duration >= self.slow
        self._kept = slow or context.outcome in ("error", "cancelled")
        self._ended = True
        self._hand_on()

    def _make_room(self) -> None:
        while self._size > _MAX_BYTES and self._lines:
            level, _, size = self._lines.popleft()
            self._size -= size + _OVERHEAD
            self._gone[level] += 1

    def _hand_on(self) -> None:
        gone, self._gone = self._gone, Counter()
        held: list[_Held] = []
        with suppress(IndexError):  # it is empty, or another thread had the last one
            while True:
                held.append(self._lines.popleft())
        if self._kept:
            for level, line, _ in held:
                self._keep(level, line)
        else:
            gone.update(map(_level_of, held))
        if gone:
            (self._lose if self._kept else self._sample)(gone)


def end_tails(context: RequestContext) -> None:
    """Hand on what handlers have held of a request that has ended; what it logs from now on is not held."""
    tails, context.tails = context.tails, None
    for tail in (tails or {}).values():
        tail.end(context)
