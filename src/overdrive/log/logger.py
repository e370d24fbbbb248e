"""Loggers that make no record where nobody but a `LogHandler` would see it.

More than half of what a log call costs the standard library is spent on looking for its caller and on a `LogRecord`
of twenty-two attributes. Neither is in a line of JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from time import time
from typing import Any, Protocol

from overdrive.context import RequestContext
from overdrive.instrumentation.events import RequestEvent

from .event import event_fields, summary
from .handler import LogHandler

_Logger = logging.Logger
#: What error trackers and tracers replace to see each record.
_handle, _call_handlers, _make_record = _Logger.handle, _Logger.callHandlers, _Logger.makeRecord
_is_stock = all(each.__module__ == "logging" for each in (_handle, _call_handlers, _make_record))


def _logging_at(level: int) -> Callable[..., None]:
    def log(self: logging.Logger, msg: object, *args: object, **options: Any) -> None:
        if self.isEnabledFor(level):
            handler = None if options else sole_handler(self, level)
            if handler is not None and handler.put_plain(time(), self.name, level, msg, args):
                return
            # Who called is whoever called this.
            options["stacklevel"] = options.get("stacklevel", 1) + 1
            self._log(level, msg, args, **options)

    return log


class DirectLogger(logging.Logger):
    """A logger that hands its lines to a `LogHandler` that is alone to hear them, and is else as any other.

    Where there are filters, another handler, a formatter, a record factory, an `extra`, an exception or an argument
    that is not plain, it makes the record that it always made; so it does for `log`, whose level may be any.
    """

    debug = _logging_at(logging.DEBUG)
    info = _logging_at(logging.INFO)
    warning = _logging_at(logging.WARNING)
    error = _logging_at(logging.ERROR)
    critical = _logging_at(logging.CRITICAL)


def log_directly() -> None:
    """Make every ordinary logger of this process a `DirectLogger`: those there are, and those that come.

    Loggers of a class of their own, and the root logger, stay what they are.
    """
    if logging.getLoggerClass() is logging.Logger:
        logging.setLoggerClass(DirectLogger)
    for logger in list(logging.root.manager.loggerDict.values()):
        if type(logger) is logging.Logger:
            logger.__class__ = DirectLogger


class BindingLogger(Protocol):
    """A logger of structlog or loguru."""

    def bind(self, **fields: Any) -> Any:
        """Return a logger with these fields."""


def log_event(logger: logging.Logger, context: RequestContext) -> None:
    """Log the event of `context`; without a record, if a `LogHandler` is alone to hear `logger`."""
    handler = sole_handler(logger, logging.INFO)
    if handler is None or not handler.put_event(logger.name, context):
        logger.info("%s", summary(context), extra={"event": RequestEvent.of(context)})


def let_event_go(logger: logging.Logger) -> None:
    """Count an event that is not logged, on each `LogHandler` that would have had it."""
    for handler in _heard(logger, logging.INFO):
        if isinstance(handler, LogHandler):
            handler.sample({logging.INFO: 1})


def bind_event(logger: BindingLogger, context: RequestContext) -> None:
    """Log the event of `context` as structlog and loguru do."""
    try:
        logger.bind(**event_fields(context)).info(summary(context))
    except Exception:  # of a processor, say: the request is answered already
        logging.getLogger("overdrive").exception("an event could not be logged to %r", logger)


def sole_handler(logger: logging.Logger, level: int) -> LogHandler | None:
    """Return the `LogHandler` that is alone to see what `logger` logs at `level`, with nothing in between."""
    if logger.filters or not (
        _is_stock
        and _Logger.callHandlers is _call_handlers
        and _Logger.handle is _handle
        and _Logger.makeRecord is _make_record
        and logging.getLogRecordFactory() is logging.LogRecord
    ):
        return None
    found = None
    ancestor: logging.Logger | None = logger
    while ancestor is not None:  # what `_heard` yields; a generator would take twice as long, for every line
        for handler in ancestor.handlers:
            if level >= handler.level and type(handler) is not logging.NullHandler:
                if found is not None or type(handler) is not LogHandler or handler.filters:
                    return None
                found = handler
        ancestor = ancestor.parent if ancestor.propagate else None
    return found


def _heard(logger: logging.Logger, level: int) -> Iterator[logging.Handler]:
    ancestor: logging.Logger | None = logger
    while ancestor is not None:
        for handler in ancestor.handlers:
            if level >= handler.level:
                yield handler
        ancestor = ancestor.parent if ancestor.propagate else None
