"""What a request logs below WARNING, held until it is known whether anyone will want to read it.

.NET calls it log buffering, Monolog "fingers crossed".
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from threading import RLock

from overdrive.context import RequestContext

#: Bytes that one request's lines may take; the oldest make room.
_MAX_BYTES = 64 * 1024
#: Bytes of an entry besides its arguments.
_OVERHEAD = 256


#: A line that is not encoded yet, as nothing in it can change: microseconds since the epoch, the names of logger and
#: level, message and arguments, and the end of the line, with what was bound when it was logged.
Plain = tuple[int, str, str, str, tuple[object, ...], bytes]


class Tail:
    """The lines of one request for one handler: a ring in bytes.

    keep: takes each line in order, once the request has failed or was slow.
    sample: takes the lines by level number that were let go as nothing was wrong.
    lose: takes those that had to make room in a request whose lines were kept.

    Appending to a deque is atomic, so that a lock is for taking lines alone: whoever adds one to a request that has
    just ended hands it on itself.
    """

    __slots__ = ("_ended", "_gone", "_keep", "_kept", "_lines", "_lock", "_lose", "_sample", "_size", "slow")

    def __init__(
        self,
        slow: float | None,
        keep: Callable[[int, Plain | bytes], None],
        sample: Callable[[Mapping[int, int]], None],
        lose: Callable[[Mapping[int, int]], None],
    ) -> None:
        self.slow = slow
        self._keep, self._sample, self._lose = keep, sample, lose
        self._lines: deque[tuple[int, Plain | bytes, int]] = deque()
        self._size = 0
        self._gone: defaultdict[int, int] = defaultdict(int)
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
        slow = self.slow is not None and context.duration >= self.slow
        self._kept = slow or context.outcome in ("error", "cancelled")
        self._ended = True
        self._hand_on()

    def _make_room(self) -> None:
        with self._lock:
            while self._size > _MAX_BYTES and self._lines:
                level, _, size = self._lines.popleft()
                self._size -= size + _OVERHEAD
                self._gone[level] += 1

    def _hand_on(self) -> None:
        with self._lock:
            gone, self._gone = self._gone, defaultdict(int)
            held = [self._lines.popleft() for _ in range(len(self._lines))]
        if self._kept:
            for level, line, _ in held:
                self._keep(level, line)
        else:
            for level, _, _ in held:
                gone[level] += 1
        if gone:
            (self._lose if self._kept else self._sample)(gone)


def end_tails(context: RequestContext) -> None:
    """Hand on what handlers have held of a request that has ended; what it logs from now on is not held."""
    tails, context.tails = context.tails, None
    for tail in (tails or {}).values():
        tail.end(context)
