"""Whatever a record holds becomes one valid JSON line that a terminal shows as it is."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overdrive.context import RequestContext
from overdrive.instrumentation.events import RequestEvent
from overdrive.log.event import encode, encode_notice, encode_text

FORGING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

forging = st.sampled_from('\n\r\0\x1b\x7f\x85\x9b\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069"\\é😀')
texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), forging))
wild_texts = st.text(st.one_of(st.characters(), forging, st.sampled_from("\ud800\udfff")))


class Hostile:
    """An object none of whose methods can be trusted."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class HostileError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    @property
    def __notes__(self) -> list[str]:
        raise ValueError("no notes")


class Text(str):
    __slots__ = ()


wild_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**80), 2**80),
        st.floats(),
        wild_texts,
        wild_texts.map(Text),
        st.binary(),
        st.datetimes(),
        st.builds(Hostile),
        st.builds(object),
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(wild_texts, st.integers(), st.floats(), st.none(), st.tuples(wild_texts)), inner),
    ),
)


def record(message: Any = "hello", *args: Any, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("app", logging.INFO, __file__, 1, message, args, None)
    made.__dict__.update(extra)
    return made


def context(**given: Any) -> RequestContext:
    made = RequestContext(request_id="r1", method="GET", path="/")
    for name, value in given.items():
        setattr(made, name, value)
    return made


def parsed(line: bytes) -> dict[str, Any]:
    assert line.endswith(b"\n")
    assert not FORGING.search(line[:-1].decode())
    loaded = json.loads(line)
    assert isinstance(loaded, dict)
    return loaded


def test_the_fixed_fields() -> None:
    made = record("%s is %d", "x", 3)
    made.created = 1700000000.25
    assert parsed(encode(made, None, {})) == {
        "timestamp": "2023-11-14T22:13:20.250000Z",
        "severity": "INFO",
        "logger": "app",
        "message": "x is 3",
    }


@pytest.mark.parametrize(
    ("created", "timestamp"),
    [
        (0.0, "1970-01-01T00:00:00.000000Z"),
        (1700000000.9999999, "2023-11-14T22:13:21.000000Z"),
        (-0.5, "1969-12-31T23:59:59.500000Z"),
        (float("nan"), None),
        (1e300, None),
    ],
)
def test_the_timestamp_is_utc_with_microseconds(created: float, timestamp: str | None) -> None:
    made = record()
    made.created = created
    assert parsed(encode(made, None, {}))["timestamp"] == timestamp


def test_the_ids_of_the_context() -> None:
    line = parsed(encode(record(), context(trace_id="t1", span_id="s1"), {}))
    assert (line["request_id"], line["trace_id"], line["span_id"]) == ("r1", "t1", "s1")
    assert "trace_id" not in parsed(encode(record(), context(), {}))


def test_extra_wins_over_bound_fields() -> None:
    line = parsed(encode(record(user=2), None, {"user": 1, "tenant": "a"}))
    assert (line["user"], line["tenant"]) == (2, "a")


def test_no_field_replaces_a_fixed_one_or_is_lost() -> None:
    fields = {"message": "m", "message_": "m_", "timestamp": 0, "exception": "e", "request_id": "forged"}
    line = parsed(encode(record(severity="s"), context(), fields))
    assert (line["message"], line["request_id"], line["severity"]) == ("hello", "r1", "INFO")
    assert {line["message_"], line["message__"]} == {"m", "m_"}
    assert (line["timestamp_"], line["exception_"]) == (0, "e")
    assert (line["request_id_"], line["severity_"]) == ("forged", "s")
    assert "exception" not in line


def test_what_others_put_on_a_record_for_themselves_is_left_out() -> None:
    line = parsed(encode(record(taskName="Task-1", asctime="now", color_message="\x1b[1mhi"), None, {}))
    assert line.keys() == {"timestamp", "severity", "logger", "message"}


def test_a_request_event_becomes_top_level_fields() -> None:
    served = context(trace_id="t1")
    served.route, served.status, served.duration, served.rows = "/items/{id}", 200, 0.5, 3
    served.fields.update(user=7, status="mine")
    line = parsed(encode(record(event=RequestEvent.of(served)), None, {}))
    assert (line["request_id"], line["trace_id"], line["method"], line["path"]) == ("r1", "t1", "GET", "/")
    assert (line["route"], line["status"], line["duration"], line["rows"]) == ("/items/{id}", 200, 0.5, 3)
    assert (line["outcome"], line["cache_status"], line["page_style"]) == ("ok", None, None)
    assert (line["bytes_sent"], line["pool_wait"], line["statements"], line["database_time"]) == (0, 0, 0, 0)
    assert (line["user"], line["status_"]) == (7, "mine")
    assert not {"event", "fields"} & line.keys()


def test_an_ordinary_field_may_be_called_event() -> None:
    assert parsed(encode(record(event="login"), None, {}))["event"] == "login"


def test_an_exception_is_structured() -> None:
    made = record()
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise HostileError from error
    except HostileError:
        made.exc_info = sys.exc_info()
    exception = parsed(encode(made, None, {}))["exception"]
    assert exception["type"].endswith(".HostileError")
    assert exception["message"] == "<unprintable HostileError>"
    assert "test_an_exception_is_structured" in exception["stacktrace"]


def test_a_stacktrace_shows_causes_and_source() -> None:
    made = record()
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("out\ner") from error
    except ValueError:
        made.exc_info = sys.exc_info()
    exception = parsed(encode(made, None, {}))["exception"]
    assert (exception["type"], exception["message"]) == ("ValueError", "out\ner")
    assert "KeyError: 'inner'" in exception["stacktrace"]
    assert 'raise KeyError("inner")' in exception["stacktrace"]


def test_exc_info_outside_an_exception_is_none() -> None:
    made = record()
    made.exc_info = (None, None, None)
    assert "exception" not in parsed(encode(made, None, {}))


def test_stack_info() -> None:
    made = record()
    made.stack_info = "Stack:\n  here"
    assert parsed(encode(made, None, {}))["stack"] == "Stack:\n  here"


@pytest.mark.parametrize(
    ("message", "args", "shown"),
    [("%d items", ("x",), "%d items"), ("%s %s", (1,), "%s %s"), (Hostile(), (), "<unprintable Hostile>")],
)
def test_a_message_that_cannot_be_formatted(message: Any, args: tuple[Any, ...], shown: str) -> None:
    line = parsed(encode(record(message, *args), None, {}))
    assert line["message"] == shown
    assert "Error: " in line["format_error"]


def test_what_json_cannot_hold() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    extra = {"endless": endless, "deep": deep, "bad": Hostile(), "big": 2**70, "huge": 10**5000}
    line = parsed(encode(record(**extra, keys={(1, "a"): 1, None: 2}, text="a\ud800"), None, {}))
    assert line["endless"] == ["[[...]]"]
    assert line["deep"] == "<unprintable list>"
    assert line["bad"] == "<unprintable Hostile>"
    assert line["big"] == 2**70
    assert line["huge"] == "<unprintable int>"
    assert line["keys"] == {"(1, 'a')": 1, "None": 2}
    assert line["text"] == "a\\ud800"


def test_one_bad_field_leaves_the_others_as_they_are() -> None:
    line = parsed(encode(record(bad={"deep": ["\ud800", 1.5, True, None, {"a"}]}, text=Text("t")), None, {}))
    assert line["bad"] == {"deep": ["\\ud800", 1.5, True, None, ["a"]]}
    assert line["text"] == "t"
    assert parsed(encode(record(text=Text("t")), None, {}))["text"] == "t"


@pytest.mark.parametrize("character", [chr(code) for code in range(0x3000) if FORGING.match(chr(code))])
def test_each_forging_character_is_escaped_on_its_own(character: str) -> None:
    assert parsed(encode(record(f"a{character}b"), None, {}))["message"] == f"a{character}b"


@given(texts, texts, texts, texts)
def test_any_text_in_any_field_comes_back(message: str, name: str, key: str, value: str) -> None:
    made = record(message)
    made.name = made.stack_info = name
    made.exc_info = (ValueError, ValueError(value), None)
    line = parsed(encode(made, context(trace_id=value), {"x" + key: value, "nested": {key: [value]}}))
    assert (line["message"], line["logger"], line["trace_id"]) == (message, name, value)
    assert line["exception"]["message"] == value
    assert line["nested"] == {key: [value]}
    assert value in line.values()


# How fast a busy machine makes them up says nothing.
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(wild_texts, st.dictionaries(wild_texts, wild_values), wild_values)
def test_anything_at_all_is_one_line(message: str, fields: dict[str, Any], argument: Any) -> None:
    made = record(message, argument)
    made.exc_info = (HostileError, HostileError(), None)
    line = parsed(encode(made, context(), fields))
    assert len(line) >= len(fields) + 6


@given(wild_texts)
def test_text_is_one_line(text: str) -> None:
    line = encode_text(text)
    assert line.endswith(b"\n")
    assert not FORGING.search(line[:-1].decode())


def test_text_stays_readable() -> None:
    assert encode_text("a\tb\nc\x1b[31m é \ud800").decode() == "a\\tb\\nc\\u001b[31m é \\ud800\n"


def test_the_notice() -> None:
    line = parsed(encode_notice(0.0, {"INFO": 2, "ERROR": 1}, {"full": 3}))
    assert (line["severity"], line["dropped"], line["reasons"]) == (
        "WARNING",
        {"INFO": 2, "ERROR": 1},
        {"full": 3},
    )
