"""Lines in other vocabularies, without secrets, and with the ids of active spans."""

from __future__ import annotations

import io
import json
import logging
import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NonRecordingSpan, SpanContext, use_span

from overdrive.context import RequestContext, bind, serving
from overdrive.errors import ConfigurationError
from overdrive.log.event import json_line
from overdrive.log.handler import LogHandler
from overdrive.log.logger import DirectLogger, log_event
from overdrive.log.shape import REDACTED, Shape


def logged(message: str, *args: object, extra: Any = None, formatter: str | None = None, **options: Any) -> str:
    stream = io.StringIO()
    handler = LogHandler(stream=stream, **options)
    if formatter is not None:
        handler.setFormatter(logging.Formatter(formatter))
    logger = DirectLogger("app")
    logger.addHandler(handler)
    logger.info(message, *args, extra=extra)
    handler.close()
    return stream.getvalue()


def test_fields_have_the_names_that_are_wanted() -> None:
    names = {"severity": "level", "timestamp": "@timestamp", "logger": "user"}
    line = json.loads(logged("hello", extra={"user": 7}, names=names))
    assert line.keys() == {"@timestamp", "level", "user", "message", "user_"}
    assert (line["level"], line["user"], line["user_"]) == ("INFO", "app", 7)


def test_values_of_secret_fields_are_not_shown_at_any_depth() -> None:
    extra = {"Password": "x1", "request": {"headers": [{"X-Api-Key": "x2", "host": "h"}]}, "token": {"a": "x3"}}
    line = logged("hello", extra=extra, redact=["password", "x_api_key", "token"])
    assert not any(secret in line for secret in ("x1", "x2", "x3"))
    shown = json.loads(line)
    assert shown["request"] == {"headers": [{"X-Api-Key": REDACTED, "host": "h"}]}
    assert (shown["Password"], shown["token"]) == (REDACTED, REDACTED)


def test_what_a_pattern_matches_is_shown_nowhere() -> None:
    options = {"redact_patterns": [r"\b\d{16}\b"]}
    card = "4111111111111111"
    assert card not in logged("paid with %s", card, extra={"cards": [card]}, **options)
    assert card not in logged("paid with %s", card, formatter="%(message)s", **options)
    stream = io.StringIO()
    handler = LogHandler(stream=stream, **options)  # type: ignore[arg-type]
    try:
        raise ValueError(card)
    except ValueError as error:
        record = logging.LogRecord("app", 40, "", 1, "failed", (), (ValueError, error, error.__traceback__))
    handler.handle(record)
    handler.close()
    line = json.loads(stream.getvalue())
    assert line["exception"]["message"] == REDACTED
    assert f"ValueError: {REDACTED}" in line["exception"]["stacktrace"]


def test_held_lines_and_events_are_redacted_too() -> None:
    stream = io.StringIO()
    handler = LogHandler(stream=stream, tail="errors", redact=["token"], redact_patterns=["secret"])
    logger = DirectLogger("app", logging.DEBUG)
    logger.addHandler(handler)
    with serving(RequestContext(request_id="r1", method="GET", path="/secret")) as context:
        bind(token="hush")
        logger.debug("a %s", "secret")
        context.outcome = "error"
        for tail in (context.tails or {}).values():
            tail.end(context)
        context.tails = None
        log_event(logger, context)
    handler.close()
    assert len(stream.getvalue().splitlines()) == 2
    assert not any(word in stream.getvalue() for word in ("hush", "secret"))


@given(
    st.dictionaries(
        st.sampled_from(["a", "A", "b", "c_", "d-e"]),
        st.recursive(
            st.sampled_from(["secret", "xsecretx", "no", 1, None]),
            lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from(["a", "d_E"]), inner)),
        ),
    )
)
def test_no_secret_is_left_and_no_field_is_lost(fields: dict[str, Any]) -> None:
    shape = Shape({"b": "a", "c_": "a"}, ["D-E"], ["secret"])
    line = shape.line(json_line(fields))
    assert b"secret" not in line
    assert len(json.loads(line)) == len(fields)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"redact": "password"}, "put the one into a list"),
        ({"redact_patterns": "x"}, "put the one into a list"),
        ({"redact_patterns": ["("]}, "is no pattern"),
    ],
)
def test_a_shape_that_is_none_is_refused(options: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigurationError, match=fix):
        LogHandler(**options)


def test_lines_in_an_active_span_carry_its_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", ModuleType("opentelemetry.sdk.trace"))
    stream = io.StringIO()
    handler = LogHandler(stream=stream)
    logger = DirectLogger("app", logging.INFO)
    logger.addHandler(handler)
    span = NonRecordingSpan(SpanContext(trace_id=0xABC, span_id=0xD, is_remote=False))
    context = RequestContext(request_id="r1", method="GET", path="/")
    context.trace_id, context.span_id = "t", "s"
    with serving(context):
        logger.info("before")
        with use_span(span):
            logger.info("inside")
    with use_span(span):
        logger.info("alone")
    handler.close()
    before, inside, alone = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (before["trace_id"], before["span_id"]) == ("t", "s")
    assert (inside["trace_id"], inside["span_id"]) == (f"{0xABC:032x}", f"{0xD:016x}")
    assert inside["request_id"] == "r1"
    assert alone["span_id"] == inside["span_id"]
