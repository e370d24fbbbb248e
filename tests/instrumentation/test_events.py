"""Events reach whoever listens, and nobody who has stopped; one listener's fault is not another's."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest

from overdrive.context import RequestContext
from overdrive.instrumentation.events import Event, RequestEvent, StatementEvent, listening, publish, subscribed


def event(sql: str = "SELECT 1") -> StatementEvent:
    return StatementEvent("default", sql, 0.1, 1, frozenset(), frozenset(), transactional=True)


def test_a_listener_hears_what_happens_in_its_block_only() -> None:
    heard: list[Event] = []
    publish(event("before"))
    with subscribed(heard.append):
        publish(event("inside"))
    publish(event("after"))
    assert heard == [event("inside")]


def test_a_listener_is_removed_where_its_block_raises() -> None:
    heard: list[Event] = []
    with pytest.raises(ZeroDivisionError), subscribed(heard.append):
        raise ZeroDivisionError
    publish(event())
    assert heard == []


def test_listening_says_whether_anyone_does() -> None:
    assert not listening()
    with subscribed(print), subscribed(repr):  # type: ignore[arg-type]
        assert listening()
    assert not listening()


def test_everyone_hears_everything_in_the_order_of_subscription() -> None:
    heard: list[str] = []
    with subscribed(lambda _: heard.append("first")):
        with subscribed(lambda _: heard.append("second")):
            publish(event())
        publish(event())
    assert heard == ["first", "second", "first"]


def test_a_callable_subscribed_twice_is_called_twice_and_removed_once_at_a_time() -> None:
    heard: list[Event] = []
    listener = heard.append
    with subscribed(listener):
        with subscribed(listener):
            publish(event())
            assert len(heard) == 2
        publish(event())
        assert len(heard) == 3


def test_a_listener_that_raises_is_reported_and_the_others_still_called(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Event] = []

    def broken(_event: Event) -> None:
        raise ZeroDivisionError

    with subscribed(broken), subscribed(heard.append):
        publish(event())
        publish(event())
    assert heard == [event(), event()]
    assert [(record.name, record.levelno) for record in caplog.records] == [("overdrive", logging.ERROR)] * 2
    assert "broken" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_request_event_carries_every_field_it_names() -> None:
    context = RequestContext(request_id="1", method="GET", path="/")
    values: dict[str, Any] = {name: object() for name in RequestEvent.__slots__}
    for name, value in values.items():
        setattr(context, name, value)
    made = RequestEvent.of(context)
    assert {name: getattr(made, name) for name in values} == values
    assert set(values) == {field.name for field in dataclasses.fields(RequestEvent)}


def test_events_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        event().rows = 2  # type: ignore[misc]
