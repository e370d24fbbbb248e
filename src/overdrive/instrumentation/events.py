"""The events Overdrive publishes, and the one place where a listener is added.

A listener is called where the event happens, on the event loop or in a worker thread: it must not block. One that
raises is reported to the logger `overdrive` and called again next time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from overdrive.context import Outcome, RequestContext

logger = logging.getLogger("overdrive")


@dataclass(frozen=True, slots=True)
class StatementEvent:
    """One statement sent to a database, however it was sent.

    engine: the name the engine was observed under.
    sql: the statement's text, with placeholders.
    duration: seconds from execution to the driver's answer.
    rows: rows returned or changed, where the driver says; otherwise -1.
    reads, writes: tags; `writes` of `engine/*` means that the statement could not be read.
    transactional: False where the statement ran outside a transaction.
    """

    engine: str
    sql: str
    duration: float
    rows: int
    reads: frozenset[str]
    writes: frozenset[str]
    transactional: bool


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """One request, whatever became of it. Durations are seconds, sizes bytes."""

    request_id: str
    trace_id: str | None
    span_id: str | None
    method: str
    path: str
    route: str | None
    status: int | None
    outcome: Outcome
    duration: float
    bytes_sent: int
    cache_status: str | None
    page_style: str | None
    pool_wait: float
    statements: int
    database_time: float
    rows: int
    fields: dict[str, Any]

    @classmethod
    def of(cls, context: RequestContext) -> RequestEvent:
        """Freeze what `context` has gathered."""
        return cls(**{name: getattr(context, name) for name in cls.__slots__})


Event = StatementEvent | RequestEvent
Listener = Callable[[Event], None]

_listeners: tuple[Listener, ...] = ()


def publish(event: Event) -> None:
    """Hand `event` to every listener."""
    for listener in _listeners:
        try:
            listener(event)
        except Exception:
            logger.exception("event listener %r failed", listener)


def listening() -> bool:
    """Say whether anyone listens, so that an event nobody wants need not be made."""
    return bool(_listeners)


@contextmanager
def subscribed(listener: Listener) -> Iterator[None]:
    """Call `listener` with every event of this process while the block runs."""
    global _listeners
    _listeners = (*_listeners, listener)
    try:
        yield
    finally:
        # Only this one: the same callable may have been subscribed elsewhere too.
        remaining = list(_listeners)
        remaining.remove(listener)
        _listeners = tuple(remaining)
