"""loguru and structlog in front of a `LogHandler`, for teams that keep theirs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NoReturn

from overdrive.log.event import STANDARD
from overdrive.log.handler import LogHandler


def loguru_sink(handler: LogHandler) -> Callable[[Any], None]:
    """Return what `loguru.logger.add` takes: `logger.add(loguru_sink(handler), format="")`.

    What is bound there becomes fields of the line; a name that a record has already gets an underscore appended.
    """

    def write(message: Any) -> None:
        told = message.record
        record = _record(told["name"] or "loguru", told["level"].no, told["message"], told["extra"])
        record.levelname = told["level"].name
        record.created = told["time"].timestamp()
        if (exception := told["exception"]) is not None:
            record.exc_info = (exception.type, exception.value, exception.traceback)
        handler.handle(record)

    return write


def structlog_processor(handler: LogHandler) -> Callable[[Any, str, MutableMapping[str, Any]], NoReturn]:
    """Return the last processor of a structlog configuration: what comes to it is written, and goes no further.

    `event` is the message, `logger` the logger's name; `level` and `timestamp`, which the line has itself, are left
    out, so neither needs a processor.
    """
    from structlog import DropEvent

    def write(_logger: Any, method: str, event: MutableMapping[str, Any]) -> NoReturn:
        fields = dict(event)
        level = logging.getLevelNamesMapping().get(fields.pop("level", method).upper(), logging.INFO)
        exc_info = fields.pop("exc_info", None)
        fields.pop("timestamp", None)
        record = _record(fields.pop("logger", "structlog"), level, fields.pop("event", ""), fields)
        if isinstance(exc_info, BaseException):
            record.exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
        elif exc_info:
            record.exc_info = exc_info if isinstance(exc_info, tuple) else sys.exc_info()
        if level >= handler.level:
            handler.handle(record)
        raise DropEvent

    return write


def _record(name: str, level: int, message: Any, fields: Mapping[str, Any]) -> logging.LogRecord:
    record = logging.LogRecord(name, level, "", 0, message, None, None)
    vars(record).update({f"{name}_" if name in STANDARD else name: value for name, value in fields.items()})
    return record
