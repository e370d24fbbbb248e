"""The background thread that writes lines, and the kinds of places it writes them to.

The thread never logs and takes no lock but the ones of this package, so that whoever waits for it, as
`dictConfig` does holding logging's module lock, waits for the sink alone.
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import stat
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from typing import Protocol, TextIO

from .console import Console
from .queue import Buffer, Line, Reason, Stats

#: Seconds in which lines gather for one write.
_TICK = 0.05
#: Bytes of one write.
_BATCH = 256 * 1024
#: Seconds a caller may wait for a stalled sink, once closed.
_WRITE_THROUGH_TIMEOUT = 0.5
#: Seconds, for whoever has a deadline of its own.
_NEVER = float("inf")

Dropped = Counter[tuple[Reason, int]]


class Sink(Protocol):
    """Where lines go."""

    def write(self, lines: Sequence[bytes], deadline: float) -> int:
        """Return how many of `lines` were written whole; an error may also be raised, if none was.

        deadline: the `monotonic()` second at which to give up waiting for room.
        """

    def close(self) -> None:
        """Release what was opened; a later `write` opens it again."""


class Writer:
    """A buffer and the thread that empties it into `sink`: started with the first line, and again in a fork.

    sink: where lines go; only ever used by one thread at a time.
    max_bytes: memory the lines may take. Beyond it they are dropped.
    notice: makes the line that is written where lines were dropped.
    block: seconds to wait for room before that, once for each time the sink has stalled.
    """

    def __init__(self, sink: Sink, max_bytes: int, notice: Callable[[Dropped], bytes], block: float = 0) -> None:
        self._sink = sink
        self._buffer = Buffer(max_bytes)
        self._block = block
        self._notice = notice
        self._closed = False
        self._reset()
        _writers.add(self)

    def _reset(self) -> None:
        self._thread: threading.Thread | None = None
        self._start = threading.Lock()
        self._bell = _Bell()
        self._draining = threading.Lock()
        self._progress = threading.Condition()
        #: The thread that is writing: mostly the one above, after `close` anyone's.
        self.writing: int | None = None
        self._announced: Dropped = Counter()
        #: How many lines were settled when somebody last waited for room in vain.
        self._stalled_at = -1

    def after_fork(self) -> None:
        """Begin anew in a child: without the parent's thread, its lines, and the locks it may have held."""
        self._buffer.reset()
        self._reset()

    @property
    def stats(self) -> Stats:
        """The ledger of this process."""
        return self._buffer.stats

    @property
    def is_writing(self) -> bool:
        """Whether this thread is in the middle of writing, so that what it logs would never end."""
        return self.writing is not None and self.writing == threading.get_ident()

    def put(self, level: int, line: bytes) -> None:
        """Have `line` written soon; once closed, write it before returning, if the sink takes it in time."""
        if self._block and not self._closed and not self._buffer.has_room(level, line):
            self._wait_for_room(level, line)
        wake = self._buffer.put(level, line)
        if self._closed:
            self._drain(monotonic() + _WRITE_THROUGH_TIMEOUT)
        elif wake:
            if self._thread is None and self._start.acquire(blocking=False):
                self._start_thread()
            self._bell.ring()

    def drop(self, level: int, reason: Reason) -> None:
        """Count a line that never became one."""
        self._buffer.drop(level, reason)

    def sample(self, levels: Mapping[int, int]) -> None:
        """Count lines, by level number, that were let go on purpose."""
        self._buffer.sample(levels)

    def lose(self, levels: Mapping[int, int]) -> None:
        """Count lines, by level number, that had to make room for later ones of their request."""
        for level, count in levels.items():
            self._buffer.drop(level, "tail", count)

    def flush(self, timeout: float) -> bool:
        """Wait until every line emitted before has been written, or counted as dropped.

        timeout: seconds to wait at most. Return whether that was enough.
        """
        if self.is_writing:
            return False
        deadline = monotonic() + timeout
        target = self._buffer.accepted
        if self._closed:
            self._drain(deadline)
        else:
            self._hurry()
        with self._progress:
            return self._progress.wait_for(lambda: self._buffer.settled >= target, deadline - monotonic())

    def close(self, timeout: float) -> None:
        """Write what is buffered, stop the thread, and from now on write on the caller.

        timeout: seconds to wait at most for the sink. What it has not taken by then is left to the thread.
        """
        deadline = monotonic() + timeout
        self._closed = True
        self._hurry()
        if self.is_writing:
            return
        if self._thread is not None:
            self._thread.join(timeout)
        self._drain(deadline)
        if self._draining.acquire(blocking=False):
            try:
                self._sink.close()
            finally:
                self._draining.release()

    def reopen(self) -> None:
        """Leave writing to a thread again, once the one that `close` has stopped is gone."""
        if self._closed and (self._thread is None or not self._thread.is_alive()):
            self._thread = None
            self._start = threading.Lock()
            self._buffer.idle = True
            self._closed = False

    def _wait_for_room(self, level: int, line: bytes) -> None:
        if self._buffer.settled == self._stalled_at:
            return
        self._hurry()
        with self._progress:
            if not self._progress.wait_for(lambda: self._buffer.has_room(level, line), self._block):
                self._stalled_at = self._buffer.settled

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="overdrive-log", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down, or the machine has no thread left
            self._closed = True
            self._drain(monotonic() + _WRITE_THROUGH_TIMEOUT)
        else:
            self._thread = thread

    def _hurry(self) -> None:
        self._buffer.urgent = True
        self._bell.ring()

    def _run(self) -> None:
        while True:
            self._bell.wait()
            if not self._buffer.urgent:
                self._bell.wait(_TICK)
            closing = self._closed
            self._drain(_NEVER)
            if closing:
                return
            if not self._buffer.rest():
                self._bell.ring()

    def _drain(self, deadline: float) -> None:
        """Write everything buffered, unless another thread is at it until `deadline`: then that one will."""
        while True:
            if not self._draining.acquire(timeout=_lock_timeout(deadline)):
                return
            self.writing = threading.get_ident()
            try:
                healthy = True
                while batch := self._buffer.take(_BATCH):
                    healthy = self._write(batch, deadline)
                if healthy and self._unannounced():
                    self._write([], deadline)
            finally:
                self.writing = None
                self._draining.release()
            # Whoever gave up waiting for the lock relies on its holder to look once more.
            if self._buffer.settled >= self._buffer.accepted:
                return

    def _write(self, batch: list[Line], deadline: float) -> bool:
        """Write `batch`, and the notice where one is due; return whether the sink took everything."""
        lines = [line for _, line in batch]
        written = 0
        try:
            dropped = self._unannounced()
            if dropped:
                lines.append(self._notice(dropped))
            written = self._sink.write(lines, deadline)
            if written == len(lines):
                self._announced += dropped
            return written == len(lines)
        except Exception:
            return False  # the ledger has it, and there is nobody to tell: this is where telling ends
        finally:
            self._buffer.settle(batch, min(written, len(batch)))
            with self._progress:
                self._progress.notify_all()

    def _unannounced(self) -> Dropped:
        return self._buffer.dropped - self._announced


class FileSink:
    """A file that is appended to, opened with the first line, and again after it was moved or removed.

    path: its name. The folder must exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)
        self._fd: int | None = None
        self._lines = _Descriptor()

    def write(self, lines: Sequence[bytes], deadline: float) -> int:
        """Append `lines`; `OSError` where the file cannot be opened."""
        fd = self._opened()
        return self._lines.write(fd, self._stat.st_mode, lines, deadline)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _opened(self) -> int:
        if self._fd is not None and self._moved():
            self.close()
            self._lines = _Descriptor()
        if self._fd is None:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            self._stat = os.fstat(self._fd)
        return self._fd

    def _moved(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), self._stat)
        except FileNotFoundError:
            return True


class StreamSink:
    """An open text stream; one that has a descriptor is written to beside its buffer.

    stream: stays open, whatever happens to the sink.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines = _Descriptor()

    def write(self, lines: Sequence[bytes], deadline: float) -> int:
        """Write `lines`; whatever the stream raises."""
        try:
            fd = self._stream.fileno()
        except (AttributeError, io.UnsupportedOperation):
            self._stream.write(b"".join(lines).decode())
            self._stream.flush()
            return len(lines)
        # Each time anew, as a stream's descriptor may be led elsewhere.
        return self._lines.write(fd, os.fstat(fd).st_mode, lines, deadline)

    def close(self) -> None:
        """Do nothing: the stream is its owner's to close."""


class PrettySink:
    """An open text stream on which each line is shown as people read it.

    stream: stays open, whatever happens to the sink.
    """

    def __init__(self, stream: TextIO, console: Console) -> None:
        self._stream = stream
        self._console = console

    def write(self, lines: Sequence[bytes], deadline: float) -> int:
        """Show `lines`; whatever the stream raises."""
        try:
            fd = self._stream.fileno()
        except (AttributeError, io.UnsupportedOperation):
            self._stream.write(b"".join(map(self._console.show, lines)).decode())
            self._stream.flush()
            return len(lines)
        for number, line in enumerate(lines):
            shown = self._console.show(line)
            if _send(fd, shown, len(shown), deadline) < len(shown):
                return number
        return len(lines)

    def close(self) -> None:
        """Do nothing: the stream is its owner's to close."""


class _Descriptor:
    """Whole lines on a raw descriptor, in one write; on a pipe in writes that others' cannot interrupt.

    What is longer than `PIPE_BUF` takes several (POSIX, write): on a pipe, processes write one after the other.
    """

    def __init__(self) -> None:
        self._torn = False

    def write(self, fd: int, mode: int, lines: Sequence[bytes], deadline: float) -> int:
        """Return how many of `lines` were written whole; `mode` is that of what is open as `fd`."""
        if not stat.S_ISFIFO(mode):
            return self._write(fd, lines, sys.maxsize, deadline)
        with _alone(fd, deadline):
            return self._write(fd, lines, select.PIPE_BUF, deadline)

    def _write(self, fd: int, lines: Sequence[bytes], step: int, deadline: float) -> int:
        if self._torn:
            self._torn = _send(fd, b"\n", step, deadline) == 0
        written = 0
        for number, chunk in _chunks(lines, step):
            sent = 0 if self._torn else _send(fd, chunk, step, deadline)
            if sent < len(chunk):
                self._torn = self._torn or (sent > 0 and not chunk.endswith(b"\n", 0, sent))
                return written + chunk.count(b"\n", 0, sent)
            written += number
        return written


@contextmanager
def _alone(fd: int, deadline: float) -> Iterator[None]:
    """Keep other processes that ask for it from writing to `fd`; not beyond `deadline`, for which lines are late."""
    # A record lock belongs to its process; one of flock() would be shared by workers that inherited the descriptor.
    with suppress(OSError):  # where a pipe cannot be locked, short lines are whole in any case
        if deadline == _NEVER:
            fcntl.lockf(fd, fcntl.LOCK_EX)
        else:
            _lock_until(fd, deadline)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.lockf(fd, fcntl.LOCK_UN)


def _lock_until(fd: int, deadline: float) -> None:
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() >= deadline:
                return
            sleep(0.001)
        else:
            return


def _chunks(lines: Sequence[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """Join as many lines as fit into `size` bytes, at least one; with how many they are."""
    joined = b"".join(lines)
    if len(joined) <= size:
        yield len(lines), joined
        return
    first = length = 0
    for number, line in enumerate(lines):
        if number > first and length + len(line) > size:
            yield number - first, b"".join(lines[first:number])
            first, length = number, 0
        length += len(line)
    yield len(lines) - first, b"".join(lines[first:])


def _send(fd: int, data: bytes, step: int, deadline: float) -> int:
    """Write `data`, `step` bytes at once; return how much was written before an error or `deadline`."""
    sent = 0
    while sent < len(data):
        try:
            if deadline != _NEVER and not _writable(fd, deadline):
                break
            sent += os.write(fd, data[sent : sent + step])
        except BlockingIOError:  # someone else made the descriptor non-blocking
            _writable(fd, deadline)
        except OSError:
            break
    return sent


def _writable(fd: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(None if deadline == _NEVER else max(0.0, deadline - monotonic()) * 1000))


def _lock_timeout(deadline: float) -> float:
    return -1 if deadline == _NEVER else max(0.0, deadline - monotonic())


class _Bell:
    """A wake-up call for one thread. A ring never waits, so that a signal handler may at any moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # it rings already
            self._lock.release()

    def wait(self, timeout: float = -1) -> None:
        self._lock.acquire(timeout=timeout)


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _after_fork() -> None:
    for writer in _writers:
        writer.after_fork()


os.register_at_fork(after_in_child=_after_fork)
