"""A direct logger is heard by whoever hears an ordinary one; its lines are the same, but for the time they take."""

from __future__ import annotations

import contextvars
import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overdrive.context import RequestContext, bind, serving
from overdrive.instrumentation.events import RequestEvent
from overdrive.log import logger as logger_module
from overdrive.log.event import END, encode, encode_event, encode_plain, line_end, summary
from overdrive.log.handler import LogHandler
from overdrive.log.logger import DirectLogger, log_directly, log_event

plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters()),
    st.binary(),
    st.decimals(),
    st.uuids(),
    st.dates(),
    st.timedeltas(),
    st.datetimes(timezones=st.sampled_from([None, UTC, ZoneInfo("Europe/Berlin")])),
)


def traced(request_id: str, method: str, path: str, trace_id: str | None) -> RequestContext:
    made = RequestContext(request_id, method, path)
    made.trace_id = trace_id
    return made


contexts = st.one_of(
    st.none(),
    st.builds(
        traced,
        request_id=st.text(),
        method=st.text(),
        path=st.text(st.characters()),
        trace_id=st.one_of(st.none(), st.text()),
    ),
)


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no text")


class Zone(tzinfo):
    """A zone that anybody may have written."""

    def utcoffset(self, _moment: datetime | None) -> timedelta:
        return timedelta(0)


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def handler(stream: io.StringIO) -> Iterator[LogHandler]:
    made = LogHandler(stream=stream)
    yield made
    made.close()


@pytest.fixture
def logger(handler: LogHandler) -> DirectLogger:
    made = DirectLogger("app", logging.INFO)
    made.addHandler(handler)
    return made


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[logging.LogRecord]:
    """The records that were made: a handler sees them before it encodes them."""
    made: list[logging.LogRecord] = []
    emit = LogHandler.emit
    monkeypatch.setattr(LogHandler, "emit", lambda handler, record: (made.append(record), emit(handler, record)))
    return made


def lines(handler: LogHandler, stream: io.StringIO) -> list[dict[str, Any]]:
    handler.flush()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def record_of(message: Any, args: Any, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("app", level, __file__, 1, message, args, None)


@given(st.text(st.characters()), st.lists(plain_values, max_size=3), contexts, st.dictionaries(st.text(), plain_values))
def test_a_plain_line_is_what_encode_returns(
    message: str, args: list[Any], context: RequestContext | None, fields: dict[str, Any]
) -> None:
    record = record_of(message, tuple(args))
    record.created = 1700000000.25
    if context is not None:
        context.fields.update(fields)
    end = END if context is None else line_end(context)
    assert end is not None
    expected = encode(record, context, context.fields if context is not None else {})
    line = encode_plain(1700000000.25, "app", logging.INFO, record.msg, record.args, end)
    assert line in (None, expected)


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("hello", ()),
        ("%s %d %.2f", ("a", 3, 1.5)),
        ('a "quoted"\n\x1b line', ()),
        ("%r", (None,)),
        ("Grüße an %s", ("日本",)),
        ("%s %s %s", (UUID(int=1), Decimal("1.50"), datetime(2026, 1, 1, tzinfo=UTC))),
    ],
)
def test_texts_and_numbers_need_no_closer_look(message: str, args: tuple[Any, ...]) -> None:
    assert encode_plain(0, "app", logging.INFO, message, args, END) is not None


@given(contexts, st.integers(100, 599), st.dictionaries(st.text(), plain_values))
def test_an_event_is_what_encode_returns(context: RequestContext | None, status: int, fields: dict[str, Any]) -> None:
    if context is None:
        return
    context.status, context.duration = status, 0.25
    context.fields.update(fields)
    record = record_of("%s", (summary(context),))
    record.created = 1700000000.25
    record.event = RequestEvent.of(context)
    line = encode_event(1700000000.25, "app", context)
    assert line is None or json.loads(line) == json.loads(encode(record, context, {}))


@pytest.mark.parametrize(("fields", "plain"), [({}, True), ({"user": 7}, True), ({"status": 7}, False)])
def test_an_event_of_texts_and_numbers_needs_no_closer_look(fields: dict[str, Any], plain: bool) -> None:
    context = RequestContext(request_id="r1", method="GET", path='/a"b')
    context.trace_id = "t1"
    context.fields.update(fields)
    assert (encode_event(0, "app", context) is not None) is plain


def test_no_record_is_made_for_a_plain_line(
    logger: DirectLogger, handler: LogHandler, stream: io.StringIO, records: list[logging.LogRecord]
) -> None:
    logger.info("hello %s", "world")
    logger.debug("not this")
    with serving(RequestContext(request_id="r1", method="GET", path="/")):
        bind(user=7)
        logger.warning("served")
        bind(user=8)
        logger.warning("served")
    assert records == []
    first, *served = lines(handler, stream)
    assert (first["message"], first["severity"], first["logger"]) == ("hello world", "INFO", "app")
    assert [(line["request_id"], line["user"]) for line in served] == [("r1", 7), ("r1", 8)]
    assert handler.stats.emitted == 3


@pytest.mark.parametrize(
    ("args", "more"),
    [
        (("%s", [1]), {}),
        (("%s", Unprintable()), {}),
        (("%d", "x"), {}),
        (("%c", 2**40), {}),
        (("%(a)s", {"a": 1}), {}),
        (("é\x85",), {}),
        (("\u2028",), {}),
        (("\ud800",), {}),
        (("%s", datetime(2026, 1, 1, tzinfo=Zone())), {}),
        (("\x7f",), {}),
        ((Unprintable(),), {}),
        (("hello",), {"extra": {"user": 1}}),
        (("hello",), {"exc_info": ValueError("x")}),
        (("hello",), {"stack_info": True}),
    ],
)
def test_what_needs_a_closer_look_is_a_record_with_its_caller(
    logger: DirectLogger,
    handler: LogHandler,
    stream: io.StringIO,
    records: list[logging.LogRecord],
    args: tuple[Any, ...],
    more: dict[str, Any],
) -> None:
    logger.info(*args, **more)
    assert [(record.filename, record.funcName) for record in records] == [
        ("test_logger.py", "test_what_needs_a_closer_look_is_a_record_with_its_caller")
    ]
    assert len(lines(handler, stream)) == 1


def test_whoever_calls_is_who_is_named(logger: DirectLogger, records: list[logging.LogRecord]) -> None:
    def helper() -> None:
        logger.warning("%s", [], stacklevel=2)

    def test_whoever_calls() -> None:
        helper()
        try:
            raise ValueError("x")
        except ValueError:
            logger.exception("failed")
        logger.log(logging.INFO, "hello")

    test_whoever_calls()
    assert [record.funcName for record in records] == ["test_whoever_calls"] * 3


def test_mutable_fields_are_shown_as_they_are_at_each_call(
    logger: DirectLogger, handler: LogHandler, stream: io.StringIO
) -> None:
    seen: list[int] = []
    with serving(RequestContext(request_id="r1", method="GET", path="/")):
        bind(seen=seen)
        logger.info("none")
        seen.append(1)
        logger.info("one")
    assert [line["seen"] for line in lines(handler, stream)] == [[], [1]]


def test_fields_bound_outside_a_request_are_shown(
    logger: DirectLogger, handler: LogHandler, stream: io.StringIO
) -> None:
    def run() -> None:
        bind(job="nightly")
        logger.info("hello")

    contextvars.copy_context().run(run)
    assert [line["job"] for line in lines(handler, stream)] == ["nightly"]


@pytest.mark.parametrize("method", ["handle", "callHandlers", "makeRecord"])
def test_who_replaces_a_method_of_all_loggers_sees_every_record(
    logger: DirectLogger, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    stock = getattr(logging.Logger, method)
    monkeypatch.setattr(logging.Logger, method, lambda *args, **more: stock(*args, **more))
    logger.info("hello")
    assert [record.getMessage() for record in records] == ["hello"]


def test_a_record_factory_sees_every_record(logger: DirectLogger, records: list[logging.LogRecord]) -> None:
    logging.setLogRecordFactory(lambda *args, **more: logging.LogRecord(*args, **more))
    try:
        logger.info("hello")
    finally:
        logging.setLogRecordFactory(logging.LogRecord)
    assert len(records) == 1


def test_filters_and_formatters_have_their_say(
    logger: DirectLogger, handler: LogHandler, stream: io.StringIO, records: list[logging.LogRecord]
) -> None:
    for filterer in (logger, handler):
        filterer.addFilter(lambda record: record.msg != "refused")
        logger.info("refused")
        logger.info("kept")
        filterer.filters.clear()
    assert [line["message"] for line in lines(handler, stream)] == ["kept", "kept"]
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.info("text")
    handler.flush()
    assert stream.getvalue().splitlines()[-1] == "text"
    assert len(records) == 3


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_each_level_has_its_own_method(
    logger: DirectLogger, handler: LogHandler, stream: io.StringIO, records: list[logging.LogRecord], level: str
) -> None:
    logger.setLevel(logging.DEBUG)
    getattr(logger, level)("hello")
    logger.disabled = True
    getattr(logger, level)("not this")
    assert [line["severity"] for line in lines(handler, stream)] == [level.upper()]
    assert records == []


def test_what_arguments_log_while_they_are_shown_is_written_too(
    logger: DirectLogger, handler: LogHandler, stream: io.StringIO
) -> None:
    class Talkative:
        def __str__(self) -> str:
            logger.info("inside")
            logger.info("%s", self)
            return "done"

    logger.info("%s", Talkative())
    assert [line["message"] for line in lines(handler, stream)][:2] == ["inside", "done"]
    assert handler.stats.dropped == {"INFO": 1}
    assert handler.stats.emitted == 3


def test_every_handler_hears_what_it_wants(handler: LogHandler, stream: io.StringIO) -> None:
    class Other(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    heard: list[str] = []
    parent, child = DirectLogger("a", logging.INFO), DirectLogger("a.b", logging.INFO)
    child.parent = parent
    child.addHandler(logging.NullHandler())
    parent.addHandler(Other(logging.WARNING))
    parent.addHandler(handler)
    child.info("info")
    child.warning("warning")
    child.propagate = False
    child.warning("nobody hears this")
    assert heard == ["warning"]
    assert [line["message"] for line in lines(handler, stream)] == ["info", "warning"]


def test_an_event_is_left_to_the_logger_where_others_listen(
    handler: LogHandler, stream: io.StringIO, records: list[logging.LogRecord]
) -> None:
    context = RequestContext(request_id="r1", method="GET", path="/")
    logger = logging.Logger("app")
    logger.addHandler(handler)
    log_event(logger, context)
    assert len(records) == 0
    with serving(context):
        bind(items=[])
    log_event(logger, context)
    assert len(records) == 1
    with serving(context):
        bind(items=1)
    logger.addHandler(logging.StreamHandler(io.StringIO()))
    log_event(logger, context)
    assert len(records) == 2
    assert [line["message"] for line in lines(handler, stream)] == ["GET / ok 0.0 ms"] * 3


@pytest.fixture
def logger_class() -> Iterator[None]:
    names = set(logging.root.manager.loggerDict)
    yield
    logging.setLoggerClass(logging.Logger)
    for name, made in list(logging.root.manager.loggerDict.items()):
        if type(made) is DirectLogger:
            made.__class__ = logging.Logger
        if name not in names:
            del logging.root.manager.loggerDict[name]


@pytest.mark.usefixtures("logger_class")
def test_log_directly_changes_loggers_that_are_and_those_to_come_and_no_others() -> None:
    class Own(logging.Logger):
        pass

    before = logging.getLogger("test_logger.before")
    logging.setLoggerClass(Own)
    own = logging.getLogger("test_logger.own")
    log_directly()
    assert (type(before), type(own)) == (DirectLogger, Own)
    assert logging.getLoggerClass() is Own
    logging.setLoggerClass(logging.Logger)
    log_directly()
    assert type(logging.getLogger("test_logger.after")) is DirectLogger
    assert type(logging.root) is logging.RootLogger


def test_a_logging_that_was_replaced_before_is_not_bypassed(
    logger: DirectLogger, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger_module, "_is_stock", False)
    logger.info("hello")
    assert len(records) == 1
