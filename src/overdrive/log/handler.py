"""The handler for the standard library's logging that never makes its caller wait for a file or a pipe."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal, TextIO

from overdrive.context import RequestContext, bound, current
from overdrive.errors import ConfigurationError

from .console import Console
from .event import (
    END,
    encode,
    encode_event,
    encode_held,
    encode_notice,
    encode_plain,
    encode_text,
    line_end,
    plain_size,
    safe_repr,
)
from .queue import Stats, by_level, by_reason
from .shape import Shape
from .tail import Plain, Tail
from .writer import Dropped, FileSink, PrettySink, Sink, StreamSink, Writer

#: Seconds `flush` and `close` wait for a stalled sink.
_TIMEOUT = 2.0

_WARNING = logging.WARNING

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
    block: seconds that a caller waits for room before its line is dropped, an event loop with all it serves too: so
        long at most for each time the sink has stalled, as the next line waits only once it has taken some again.
    tail: with `"errors"`, what a request logs below WARNING is held, in at most 64 KiB of its newest lines, and
        written only if the request raised, was cancelled, was answered with a status of 500 or above, or was slow.
        It takes the context that `Overdrive` gives each request; elsewhere lines are written at once.
    slow: seconds from which a request counts as slow.
    names: what fields are called instead, by their name here: `{"severity": "level", "trace_id": "trace.id"}`.
    redact: names of fields whose value is not shown: of `extra`, of `bind`, and of dictionaries in these.
    redact_patterns: regular expressions; what they match in any text of a line is not shown.
    pretty: whether a stream gets lines for people instead of JSON, with tracebacks below; left out, if it is a
        terminal. Those have colours, but for `NO_COLOR` (https://no-color.org).

    Raises `ConfigurationError` where both `path` and `stream` are given, for a path that cannot be written, and for
    options that say nothing.

    `names`, `redact` and `redact_patterns` cost every line some microseconds more, on its caller. Lines logged in an
    active span of OpenTelemetry carry its ids.

    A record is encoded where it is logged, so that its arguments are shown as they were. After `close`, which
    `logging.config` calls on the handlers it finds, records are written by their callers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        stream: TextIO | None = None,
        level: int | str = logging.NOTSET,
        max_bytes: int = 8 * 1024 * 1024,
        block: float = 0,
        tail: Literal["errors"] | None = None,
        slow: float | None = None,
        names: Mapping[str, str] | None = None,
        redact: Collection[str] = (),
        redact_patterns: Collection[str] = (),
        pretty: bool | None = None,
    ) -> None:
        if path is not None and stream is not None:
            raise ConfigurationError("LogHandler writes to a path or to a stream: leave one of them out")
        if path is not None and not _is_writable(path):
            raise ConfigurationError(
                f"LogHandler(path={os.fspath(path)!r}): there can be no such file, or it may not be written here; "
                "make its directory first"
            )
        if max_bytes < 1:
            raise ConfigurationError(f"LogHandler(max_bytes={max_bytes!r}): it takes bytes, from 1")
        if pretty and path is not None:
            raise ConfigurationError("LogHandler(pretty=True) is for a stream: a file gets JSON")
        if tail not in (None, "errors"):
            raise ConfigurationError(f'LogHandler(tail={tail!r}): there is tail="errors", or none')
        if not 0 <= block < float("inf"):
            raise ConfigurationError(f"LogHandler(block={block!r}): it takes seconds, from 0")
        if slow is not None and tail is None:
            raise ConfigurationError('LogHandler(slow=...) says which requests are kept: it goes with tail="errors"')
        super().__init__(level)
        self.formatter = _JSON_LINES
        #: Where it writes, as handlers of the standard library say it.
        self.baseFilename = None if path is None else os.path.abspath(path)
        self.stream = None if path is not None else sys.stderr if stream is None else stream
        sink = FileSink(path) if path is not None else _stream_sink(stream, pretty, names or {})
        self._writer = Writer(sink, max_bytes, self._notice, block)
        self._encoding = _Encoding()
        self._tail = tail is not None
        self.slow = slow
        shape = Shape(names or {}, redact, redact_patterns)
        self._shape = shape if shape else None

    @property
    def stats(self) -> Stats:
        """What became of the records of this process so far."""
        return self._writer.stats

    def createLock(self) -> None:  # noqa: N802
        """Make none: there is nothing to take turns for."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit `record` unless a filter rejects it; return whether none did."""
        if self.filters:
            kept: bool | logging.LogRecord = self.filter(record)
            if not kept:
                return False
            if isinstance(kept, logging.LogRecord):  # since Python 3.12 it may be another record
                record = kept
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Encode `record` and leave it to the writer."""
        if self._put_simple(record):
            return
        if self._encoding.active or self._writer.is_writing:
            self._writer.drop(record.levelno, "recursion")
            return
        self._encoding.active = True
        try:
            line = self._line(record)
        except Exception:
            self._writer.drop(record.levelno, "encoding")
            return
        finally:
            self._encoding.active = False
        context = current()
        if context is not None and self._holds(record.levelno, context):
            self._tail_of(context).hold(record.levelno, line, len(line))
        else:
            self._writer.put(record.levelno, line)

    def put_plain(self, created: float, name: str, level: int, message: Any, args: Any) -> bool:
        """Write the line that a record of these would get, if it is a simple one; return whether it is.

        created: seconds since the epoch.

        Filters are not asked, as there is no record.
        """
        context = current()
        end = (None if bound() else END) if context is None else context.log_end or line_end(context)
        if end is None or not self._is_prepared():
            return False
        if self._tail and level < _WARNING and context is not None and (tails := context.tails) is not None:
            size = plain_size(message, args)
            if size is None:
                return False
            tail = tails.get(self) or self._tail_of(context)
            tail.hold(level, (created, name, level, message, args, end), size)
            return True
        line = encode_plain(created, name, level, message, args, end)
        if line is None:
            return False
        self._writer.put(level, line)
        return True

    def put_event(self, name: str, context: RequestContext) -> bool:
        """Write the event of `context` as the logger called `name` would; return whether that can be done here."""
        if not self._is_prepared():
            return False
        line = encode_event(time.time(), name, context)
        if line is None:
            return False
        self._writer.put(logging.INFO, line)
        return True

    def sample(self, levels: Mapping[int, int]) -> None:
        """Count lines, by level number, that were let go on purpose."""
        self._writer.sample(levels)

    def keep(self, level: int, line: Plain | bytes) -> None:
        """Write a line that was held."""
        self._writer.put(level, line if isinstance(line, bytes) else encode_held(line))

    def lose(self, levels: Mapping[int, int]) -> None:
        """Count lines, by level number, that were held and had to make room for later ones of their request."""
        self._writer.lose(levels)

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

    def _put_simple(self, record: logging.LogRecord) -> bool:
        """Write a record that is as its logger has made it, if it is one of texts and numbers."""
        try:
            if record.exc_info or record.stack_info or len(vars(record)) != _ATTRIBUTES:
                return False
            if record.levelname != logging.getLevelName(record.levelno):
                return False
            return self.put_plain(record.created, record.name, record.levelno, record.msg, record.args)
        except Exception:  # it is not what it should be
            return False

    def _holds(self, level: int, context: RequestContext) -> bool:
        return self._tail and level < _WARNING and context.tails is not None

    def _tail_of(self, context: RequestContext) -> Tail:
        tails = context.tails
        tail: Tail | None = tails.get(self) if tails is not None else None
        if tail is None:
            tail = Tail(self)
            if tails is not None:
                tails[self] = tail
            if context.tails is None:  # it has just ended
                tail.end(context)
        return tail

    def _is_prepared(self) -> bool:
        """Say whether lines may be joined from prepared parts: JSON as it is here, and no span to look up."""
        return (
            self.formatter is _JSON_LINES
            and self._shape is None
            and not ((writer := self._writer).writing is not None and writer.is_writing)
            and ("opentelemetry.sdk.trace" not in sys.modules or _span() is None)
        )

    def _line(self, record: logging.LogRecord) -> bytes:
        fields = bound()
        if self.formatter is not None and self.formatter is not _JSON_LINES:
            try:
                text = self.formatter.format(record)
                return encode_text(self._shape.text(text) if self._shape else text)
            except Exception as error:
                fields = {**fields, "formatter_error": safe_repr(error)}
        line = encode(record, current(), fields, _span())
        return self._shape.line(line) if self._shape else line

    def _notice(self, dropped: Dropped) -> bytes:
        levels = by_level(dropped)
        if self.formatter in (_JSON_LINES, None):
            line = encode_notice(time.time(), levels, by_reason(dropped))
            return self._shape.line(line) if self._shape else line
        counts = ", ".join(f"{level} {count}" for level, count in levels.items())
        return encode_text(f"log lines were dropped: {counts}")


def _is_writable(path: str | os.PathLike[str]) -> bool:
    """Say whether a file is there to be written, or can be made; it is opened with its first line."""
    if os.path.exists(path):
        return os.access(path, os.W_OK) and not os.path.isdir(path)
    return os.access(os.path.dirname(os.path.abspath(path)), os.W_OK | os.X_OK)


def _stream_sink(given: TextIO | None, pretty: bool | None, names: Mapping[str, str]) -> Sink:
    stream = sys.stderr if given is None else given
    is_terminal = hasattr(stream, "isatty") and stream.isatty()
    if not (is_terminal if pretty is None else pretty):
        return StreamSink(stream)
    return PrettySink(stream, Console(names, colours=is_terminal and not os.environ.get("NO_COLOR")))


def _span() -> dict[str, str] | None:
    """Return the ids of the active span, where anybody traces: https://opentelemetry.io/docs/specs/otel/logs/."""
    if "opentelemetry.sdk.trace" not in sys.modules:  # the interface alone, which FastAPI imports, starts no span
        return None
    span = sys.modules["opentelemetry.trace"].get_current_span().get_span_context()
    return {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"} if span.is_valid else None


class _Encoding(threading.local):
    """Whether this thread is in the middle of encoding a record."""

    active = False
