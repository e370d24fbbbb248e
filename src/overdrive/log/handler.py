"""The handler for the standard library's logging that never makes its caller wait for a file or a pipe."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TextIO

from overdrive.context import RequestContext, bound, current
from overdrive.errors import ConfigurationError

from .event import encode, encode_event, encode_notice, encode_plain, encode_text, safe_repr
from .queue import Stats, by_level, by_reason
from .writer import Dropped, FileSink, StreamSink, Writer

#: Seconds `flush` and `close` wait for a stalled sink.
_TIMEOUT = 2.0


#: What every record has; a record with more has an `extra`, or what another handler has left on it.
_ATTRIBUTES = len(vars(logging.makeLogRecord({})))


class _JsonLines(logging.Formatter):
    """The handler's own format. It stands where a formatter would, or `logging.basicConfig` would add one."""

    def format(self, record: logging.LogRecord) -> str:
        return encode(record, current(), bound()).decode().rstrip()


_JSON_LINES = _JsonLines()


class LogHandler(logging.Handler):
    """Turns each record into one JSON line, or with a formatter into one line of its text; writes it behind.

    path: a file to append to, opened with the first record and again after logrotate has moved it.
    stream: an open text stream instead; `sys.stderr` where neither is given.
    level: the lowest level it takes.
    max_bytes: memory that lines waiting for the sink may take; more are dropped, counted, and announced in
        the stream. An eighth of it is kept for ERROR and above.

    Raises `ConfigurationError` where both `path` and `stream` are given.

    A record is encoded where it is logged, so that its arguments are shown as they were. After `close`, which
    `logging.config` calls on the handlers it finds, records are written by their callers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        stream: TextIO | None = None,
        level: int | str = logging.NOTSET,
        max_bytes: int = 8 * 1024 * 1024,
    ) -> None:
        if path is not None and stream is not None:
            raise ConfigurationError("LogHandler writes to a path or to a stream: leave one of them out")
        super().__init__(level)
        self.formatter = _JSON_LINES
        sink = FileSink(path) if path is not None else StreamSink(sys.stderr if stream is None else stream)
        self._writer = Writer(sink, max_bytes, self._notice)
        self._encoding = _Encoding()

    @property
    def stats(self) -> Stats:
        """What became of the records of this process so far."""
        return self._writer.stats

    def createLock(self) -> None:  # noqa: N802
        """Make none: there is nothing to take turns for."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit `record` unless a filter rejects it; return whether none did."""
        kept: bool | logging.LogRecord = self.filter(record)
        if kept:  # since Python 3.12 it may be another record
            self.emit(kept if isinstance(kept, logging.LogRecord) else record)
        return bool(kept)

    def emit(self, record: logging.LogRecord) -> None:
        """Encode `record` and leave it to the writer."""
        if self._encoding.active or self._writer.is_writing:
            self._writer.drop(record.levelno, "recursion")
            return
        if self.formatter is _JSON_LINES and (line := _plain_line(record)) is not None:
            self._writer.put(record.levelno, line)
            return
        self._encoding.active = True
        try:
            line = self._line(record)
        except Exception:
            self._writer.drop(record.levelno, "encoding")
            return
        finally:
            self._encoding.active = False
        self._writer.put(record.levelno, line)

    def put_plain(self, name: str, level: int, message: object, args: object) -> bool:
        """Write the line that a record of these would get, if it is a simple one; return whether it is.

        For loggers that would make the record for this handler alone.
        """
        if self.formatter is not _JSON_LINES or self.filters or self._writer.is_writing:
            return False
        line = _plain(time.time_ns() // 1000, name, logging.getLevelName(level), message, args)
        if line is None:
            return False
        self._writer.put(level, line)
        return True

    def put_event(self, name: str, context: RequestContext) -> bool:
        """Write the event of `context` as the logger called `name` would; return whether that can be done here."""
        if self.formatter is not _JSON_LINES or self.filters or self._writer.is_writing:
            return False
        line = encode_event(time.time_ns() // 1000, name, context)
        if line is None:
            return False
        self._writer.put(logging.INFO, line)
        return True

    def flush(self) -> None:
        """Wait until what was logged so far is written, at most 2 seconds."""
        self._writer.flush(_TIMEOUT)

    def close(self) -> None:
        """Write what is left, in at most 2 seconds, and from now on write each record as it comes."""
        self._writer.close(_TIMEOUT)
        super().close()

    def reopen(self) -> None:
        """Write behind the callers again, after a `close` that was not the end.

        `uvicorn.run(app)` configures logging after the app has, and closes what it finds; Overdrive calls this
        when the app begins to serve.
        """
        self._writer.reopen()

    def _line(self, record: logging.LogRecord) -> bytes:
        if self.formatter is None or self.formatter is _JSON_LINES:
            return encode(record, current(), bound())
        try:
            return encode_text(self.formatter.format(record))
        except Exception as error:
            return encode(record, current(), {**bound(), "formatter_error": safe_repr(error)})

    def _notice(self, dropped: Dropped) -> bytes:
        levels = by_level(dropped)
        if self.formatter in (_JSON_LINES, None):
            return encode_notice(time.time(), levels, by_reason(dropped))
        counts = ", ".join(f"{level} {count}" for level, count in levels.items())
        return encode_text(f"log lines were dropped: {counts}")


def _plain_line(record: logging.LogRecord) -> bytes | None:
    """Return the line of a record that is as the logger has made it; None where `encode` must look closer."""
    try:
        if record.exc_info or record.stack_info or len(vars(record)) != _ATTRIBUTES:
            return None
        created = round(record.created * 1_000_000)
        return _plain(created, record.name, record.levelname, record.msg, record.args)
    except Exception:  # it is not what it should be
        return None


def _plain(created: int, name: str, level: str, message: object, args: object) -> bytes | None:
    context = current()
    if context is None and bound():
        return None
    return encode_plain(created, name, level, message, args, context)


class _Encoding(threading.local):
    """Whether this thread is in the middle of encoding a record."""

    active = False
