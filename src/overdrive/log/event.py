"""A log record as one JSON line. Pure, but for the source lines `traceback` reads to show an exception.

A line is valid JSON whatever the record holds: what cannot be encoded is shown by its `repr`, a lone
surrogate as the text `\\udXXX`. No character that could forge or disguise a line in a terminal leaves here
unescaped.

A bound or extra field whose name is taken (`message`, `timestamp`, and on a request's event `status` and the
like) gets an underscore appended: `message_`.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from operator import attrgetter
from sys import getsizeof
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec

from overdrive.context import RequestContext
from overdrive.instrumentation.events import RequestEvent

from .tail import Plain

_IDS = ("request_id", "trace_id", "span_id")
_FIXED = frozenset(
    {"timestamp", "severity", "logger", "message", "format_error", "exception", "stack", *_IDS},
)
_EVENT = tuple(name for name in RequestEvent.__slots__ if name not in {*_IDS, "fields"})
_EVENT_NAMES = frozenset(_EVENT)
_event = attrgetter(*_EVENT)
#: What an event says of its request, as something that is encoded in one go.
_Event = msgspec.defstruct("_Event", ["message", *_EVENT])

#: What a record has itself. `taskName` is newer than Python 3.11; `color_message` is uvicorn's message again, for its
#: own formatter.
STANDARD = frozenset(
    {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"},
)

#: Types whose values cannot change, and whose text is no code of anybody's but Python's; and zones of such moments.
_PLAIN = frozenset({str, int, float, bool, type(None), bytes, Decimal, UUID, date, timedelta})
_DIGITS = [b"%03d" % number for number in range(1000)]
_ZONES = frozenset({type(None), timezone, ZoneInfo})
#: Characters of a text, and bits of a number, up to which it is not worth finding out what it takes; what it then
#: counts for, in bytes.
_SHORT = 64
_DELETE = 0x7F
#: The end of a line that belongs to no request.
END = b"}\n"

#: Controls, line separators and bidirectional overrides. To `str.isprintable` none of them is printable.
_ESCAPES = {
    code: f"\\u{code:04x}"
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        *(0x061C, 0x200E, 0x200F, 0x2028, 0x2029),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
} | {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}


def encode(
    record: logging.LogRecord,
    context: RequestContext | None,
    fields: Mapping[str, Any],
    span: Mapping[str, str] | None = None,
) -> bytes:
    """Return `record` as one JSON line, ended by a line feed.

    context: the request it was logged in, whose ids it gets.
    fields: what `bind` added there; the record's own `extra` wins over them.
    span: `trace_id` and `span_id` of an active span, which win over the context's.

    `extra={"event": RequestEvent(...)}` becomes top-level fields, and the event's ids win over the context's.
    """
    extra = {name: value for name, value in vars(record).items() if name not in STANDARD}
    line = _head(record)
    if isinstance(event := extra.get("event"), RequestEvent):
        del extra["event"]
        line |= _ids(event) | {name: getattr(event, name) for name in _EVENT}
        fields = {**fields, **event.fields}
    elif context is not None:
        line |= _ids(context)
    line |= span or {}
    _add(line, {**fields, **extra})
    if isinstance(record.exc_info, tuple) and record.exc_info[0] is not None:
        line["exception"] = _exception(*record.exc_info)
    if record.stack_info:
        line["stack"] = record.stack_info
    return json_line(line)


def encode_plain(created: float, name: str, level: int, message: object, args: object, end: bytes) -> bytes | None:
    """Return the line that `encode` returns for a record of these, in a fraction of its time.

    created: seconds since the epoch.
    args: what a record has; no code of theirs is run.
    end: what `line_end` returns.

    None for anything but texts and numbers, and for text beyond ASCII that is not printable: those are for `encode`.
    """
    if type(message) is not str:
        return None
    try:
        if args:
            if type(args) is not tuple:
                return None
            for arg in args:
                if type(arg) not in _PLAIN and not _is_plain_moment(arg):
                    return None
            message %= args
        if ("\x7f" in message or not message.isascii()) and not message.isprintable():
            return None
        millis, micros = divmod(round(created * 1_000_000), 1000)
        middle = _middle(name, logging.getLevelName(level))
        return b"".join((_start(millis), _DIGITS[micros], middle, _encode(message), end))
    except Exception:  # the format does not match, or it is no moment of our calendar
        return None


def line_end(context: RequestContext) -> bytes | None:
    """Return the end of every plain line of `context`: its ids and what is bound; None where that may change."""
    if context.log_end is None:
        line: dict[str, Any] = _ids(context)
        if context.fields:
            if any(type(value) not in _PLAIN and not _is_plain_moment(value) for value in context.fields.values()):
                return None
            _add(line, context.fields)
        context.log_end = b"," + json_line(line)[1:]
    return context.log_end


def plain_size(message: object, args: object) -> int | None:
    """Return the bytes that keeping these takes; None where they may change, or run code of their own."""
    if type(message) is not str:
        return None
    size = getsizeof(message) if len(message) > _SHORT else 0
    if args:
        if type(args) is not tuple:
            return None
        size += _SHORT * len(args)
        for arg in args:
            kind = type(arg)
            if kind is str:
                if len(arg) > _SHORT:
                    size += getsizeof(arg)
            elif kind is int:
                if arg.bit_length() > _SHORT:
                    size += getsizeof(arg)
            elif kind in _PLAIN or _is_plain_moment(arg):
                size += getsizeof(arg)
            else:
                return None
    return size


def _is_plain_moment(value: object) -> bool:
    return type(value) is datetime and type(value.tzinfo) in _ZONES


def encode_held(line: Plain) -> bytes:
    """Return the line that is due now for one that was held."""
    created, name, level, message, args, end = line
    encoded = encode_plain(created, name, level, message, args, end)
    if encoded is None:
        record = logging.LogRecord(name, level, "", 0, message, args, None)
        record.created = created
        encoded = encode(record, None, {}).removesuffix(END) + end
    return encoded


def encode_event(created: float, name: str, context: RequestContext) -> bytes | None:
    """Return the line that `encode` returns for a record of the event of `context`, its ids behind the rest.

    created: seconds since the epoch.

    None where a field is not plain, or is called as one of the event's own.
    """
    end = context.log_end or line_end(context)
    if end is None or not _EVENT_NAMES.isdisjoint(context.fields):
        return None
    try:
        body = _encode(_Event(summary(context), *_event(context)))
    except Exception:  # a surrogate
        return None
    if not body.isascii() or _DELETE in body:
        return None
    millis, micros = divmod(round(created * 1_000_000), 1000)
    middle = _event_middle(name, logging.getLevelName(logging.INFO))
    return b"".join((_start(millis), _DIGITS[micros], middle, body[1:-1], end))


def event_fields(context: RequestContext) -> dict[str, Any]:
    """Return what the event of `context` carries, with what is bound."""
    line: dict[str, Any] = _ids(context) | dict(zip(_EVENT, _event(context), strict=True))
    _add(line, context.fields)
    return line


def summary(event: RequestContext | RequestEvent) -> str:
    """Return the message of a request's event."""
    result = event.outcome if event.status is None else event.status
    return f"{event.method} {event.path} {result} {event.duration * 1000:.1f} ms"


def encode_text(text: str) -> bytes:
    """Return `text` as one line, its control characters and line breaks escaped, ended by a line feed."""
    return _utf8(escaped(text)).encode() + b"\n"


def encode_notice(created: float, levels: Mapping[str, int], reasons: Mapping[str, int]) -> bytes:
    """Return the JSON line that stands for lines that were dropped.

    created: seconds since the epoch.
    levels, reasons: how many were dropped, by level name and by reason; two views of the same lines.
    """
    return json_line(
        {
            "timestamp": _timestamp(created),
            "severity": "WARNING",
            "logger": "overdrive.log",
            "message": "log lines were dropped",
            "dropped": levels,
            "reasons": reasons,
        }
    )


def safe_repr(value: object) -> str:
    """Return `repr(value)`, or a substitute where that raises."""
    try:
        return repr(value)
    except Exception:
        return f"<unprintable {type(value).__name__}>"


def _head(record: logging.LogRecord) -> dict[str, Any]:
    line = {
        "timestamp": _timestamp(record.created),
        "severity": record.levelname,
        "logger": record.name,
    }
    try:
        return line | {"message": record.getMessage()}
    except Exception as error:
        reason = f"{type(error).__name__}: {_safe_str(error)}"
        return line | {"message": _safe_str(record.msg), "format_error": reason}


def _ids(source: RequestContext | RequestEvent) -> dict[str, str]:
    ids = {"request_id": source.request_id}
    if source.trace_id is not None:
        ids["trace_id"] = source.trace_id
    if source.span_id is not None:
        ids["span_id"] = source.span_id
    return ids


def _add(line: dict[str, Any], fields: Mapping[Any, Any]) -> None:
    for key, value in fields.items():
        name = _name(key)
        while name in line or name in _FIXED:
            name += "_"
        line[name] = value


@lru_cache(maxsize=4)
def _start(millis: int) -> bytes:
    return b'{"timestamp":"%b.%03d' % (_second(millis // 1000).encode(), millis % 1000)


@lru_cache(maxsize=1024)
def _middle(name: str, level: str) -> bytes:
    fields = json_line({"severity": level, "logger": name, "message": ""})
    return b'Z",' + fields.removeprefix(b"{").removesuffix(b'""}\n')


@lru_cache(maxsize=16)
def _event_middle(name: str, level: str) -> bytes:
    return _middle(name, level).removesuffix(b'"message":')


def _timestamp(created: float) -> str | None:
    try:
        seconds, microseconds = divmod(round(created * 1_000_000), 1_000_000)
        return f"{_second(seconds)}.{microseconds:06}Z"
    except (ValueError, OverflowError, OSError):  # not a moment of our calendar
        return None


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _exception(kind: type[BaseException], error: BaseException, trace: Any) -> dict[str, str]:
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return {
        "type": module + kind.__qualname__,
        "message": _safe_str(error),
        "stacktrace": _stacktrace(kind, error, trace),
    }


def _stacktrace(kind: type[BaseException], error: BaseException, trace: Any) -> str:
    try:
        return "".join(traceback.TracebackException(kind, error, trace, compact=True).format())
    except Exception:  # the exception's own attributes raise: its frames are still worth having
        return "".join(traceback.format_tb(trace))


def _safe_str(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"<unprintable {type(value).__name__}>"


def json_line(line: dict[str, Any]) -> bytes:
    """Return `line` as JSON, ended by a line feed, whatever it holds."""
    try:
        encoded = _encode(line)
    except Exception:
        encoded = msgspec.json.encode({_name(key): _encodable(value) for key, value in line.items()})
    if encoded.isascii() and _DELETE not in encoded:
        return encoded + b"\n"
    return escaped(encoded.decode()).encode() + b"\n"


def _substitute(value: object) -> str:
    """Return what stands for an object msgspec cannot encode; a subclass of `str` is one of them."""
    return str.__str__(value) if isinstance(value, str) else safe_repr(value)


_encode = msgspec.json.Encoder(enc_hook=_substitute).encode


def _encodable(value: object) -> Any:
    try:
        return _plain(value, frozenset())
    except Exception:  # nested too deeply, or a container whose own methods raise
        return _utf8(safe_repr(value))


def _plain(value: object, parents: frozenset[int]) -> Any:
    """Return `value` as something every JSON encoder takes. `parents` are the ids of what contains it."""
    if isinstance(value, str):
        return _utf8(value)
    if not isinstance(value, dict | list | tuple | set | frozenset):
        return _leaf(value)
    if id(value) in parents:
        return _utf8(safe_repr(value))
    parents |= {id(value)}
    if isinstance(value, dict):
        return {_name(key): _plain(item, parents) for key, item in value.items()}
    return [_plain(item, parents) for item in value]


def _leaf(value: object) -> Any:
    try:
        return msgspec.Raw(msgspec.json.encode(value, enc_hook=_substitute))
    except Exception:
        return _utf8(safe_repr(value))


def _name(key: object) -> str:
    return _utf8(key if isinstance(key, str) else safe_repr(key))


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def escaped(text: str) -> str:
    """Return `text` without a character that a terminal would obey."""
    return text if text.isprintable() else text.translate(_ESCAPES)
