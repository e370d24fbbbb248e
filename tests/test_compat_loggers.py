"""What loguru and structlog are told is written by a LogHandler: their fields, levels and exceptions."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from loguru import logger as loguru_logger

from overdrive import LogHandler
from overdrive.compat.loggers import loguru_sink, structlog_processor


class Sink:
    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.handler = LogHandler(stream=self.stream, level="INFO", redact=["password"])

    @property
    def lines(self) -> list[dict[str, Any]]:
        self.handler.flush()
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.handler.close()


@pytest.fixture
def loguru(sink: Sink) -> Iterator[Any]:
    added = loguru_logger.add(loguru_sink(sink.handler), format="", level="INFO")
    yield loguru_logger
    loguru_logger.remove(added)


def test_loguru(loguru: Any, sink: Sink) -> None:
    loguru.bind(user=7, name="x", password="hush").success("hello {}%s", "world")
    loguru.debug("not this")
    try:
        raise ValueError("no")
    except ValueError:
        loguru.exception("failed")
    told, failed = sink.lines
    assert (told["message"], told["severity"], told["logger"]) == ("hello world%s", "SUCCESS", __name__)
    assert (told["user"], told["name_"], told["password"]) == (7, "x", "[redacted]")
    assert (failed["exception"]["type"], failed["exception"]["message"]) == ("ValueError", "no")
    assert "raise ValueError" in failed["exception"]["stacktrace"]
    assert sink.handler.stats.emitted == 2


def structlogs(sink: Sink, *processors: Any) -> Any:
    return structlog.wrap_logger(None, processors=[*processors, structlog_processor(sink.handler)])


def test_structlog(sink: Sink) -> None:
    logger = structlogs(sink, structlog.processors.add_log_level, structlog.processors.TimeStamper())
    logger.bind(user=7, args="x", logger="shop").warning("100 %s", password="hush")
    logger.debug("not this")
    structlogs(sink).error("plain")
    told, plain = sink.lines
    assert (told["message"], told["severity"], told["logger"]) == ("100 %s", "WARNING", "shop")
    assert (told["user"], told["args_"], told["password"]) == (7, "x", "[redacted]")
    assert told["timestamp"].endswith("Z")
    assert (plain["severity"], plain["logger"]) == ("ERROR", "structlog")


def test_exceptions_of_structlog(sink: Sink) -> None:
    error = ValueError("no")
    logger = structlogs(sink)
    try:
        raise error
    except ValueError:
        logger.exception("of now")
    logger.error("an object", exc_info=error)
    logger.error("a tuple", exc_info=(ValueError, error, error.__traceback__))
    assert [line["exception"]["message"] for line in sink.lines] == ["no"] * 3
    assert [line["severity"] for line in sink.lines] == ["ERROR"] * 3


def test_a_message_that_is_no_text(sink: Sink) -> None:
    structlogs(sink).info({"a": 1})
    assert sink.lines[0]["message"] == "{'a': 1}"
