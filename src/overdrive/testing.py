"""What a team's tests need: rolled-back sessions, a cache to look at, a clock, events and assertions.

    @pytest.fixture
    async def db():
        async with rolled_back(overdrive) as session:
            yield session

Under pytest the cache is off until a test asks for it with `caching`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from overdrive.app import Overdrive
from overdrive.cache.store import MemoryStore
from overdrive.instrumentation.events import Event, StatementEvent, subscribed


class HasHeaders(Protocol):
    """A response of any client."""

    @property
    def headers(self) -> Any:
        """Return a mapping of its headers."""


# Sessions


@asynccontextmanager
async def rolled_back(overdrive: Overdrive, engine: str = "default") -> AsyncIterator[AsyncSession]:
    """Undo whatever happens to a database in the block; its value is a session that sees it.

    Every async session that `overdrive` opens in the block is on one connection, in a savepoint of one transaction:
    a request commits, rolls back and invalidates as ever, and the next one sees what it left. Requests take turns,
    as they share the connection.
    """
    sessions = overdrive.sessions(engine)
    async with overdrive.engines[engine].connect() as connection:
        transaction = await connection.begin()
        with sessions.bound_to(connection):
            session = sessions.open()
            try:
                yield session
            finally:
                await session.close()
                await transaction.rollback()
                # What was cached in the block was read from rows that are gone.
                await overdrive.cache.clear()


@contextmanager
def rolled_back_sync(overdrive: Overdrive, engine: str = "default") -> Iterator[Session]:
    """Undo whatever synchronous sessions do in the block; see `rolled_back`."""
    sessions = overdrive.sync_sessions(engine)
    with sessions.engine.connect() as connection, connection.begin() as transaction, sessions.bound_to(connection):
        session = sessions.open()
        try:
            yield session
        finally:
            session.close()
            transaction.rollback()


# The cache


class Clock:
    """The cache's clock, which a test moves."""

    def __init__(self, now: float = 1_000_000_000) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time, in seconds."""
        return self.now

    def tick(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


@contextmanager
def caching(overdrive: Overdrive) -> Iterator[Clock]:
    """Switch the cache on for the block, empty and in the process; its value is the cache's clock."""
    cache = overdrive.cache
    before = cache.enabled, cache.clock, cache.store
    clock = Clock()
    cache.use(MemoryStore())
    cache.enabled, cache.clock = True, clock
    try:
        yield clock
    finally:
        cache.enabled, cache.clock, store = before
        cache.use(store)


def assert_cached(response: HasHeaders) -> None:
    """Fail unless `response` came from the cache, with what the cache said instead."""
    assert response.headers.get("x-cache") == "hit", _said(response)


def assert_not_cached(response: HasHeaders) -> None:
    """Fail if `response` came from the cache."""
    assert response.headers.get("x-cache") != "hit", _said(response)


def _said(response: HasHeaders) -> str:
    return f"Cache-Status: {response.headers.get('cache-status', 'none; the route is not cached')}"


# Events


@contextmanager
def recorded_events() -> Iterator[list[Event]]:
    """Record what happens in the block: each statement and each request, in their order."""
    events: list[Event] = []
    with subscribed(events.append):
        yield events


@contextmanager
def assert_queries(max: int) -> Iterator[None]:  # noqa: A002
    """Fail, naming them, if the block sends more than `max` statements to observed engines."""
    with recorded_events() as events:
        yield
    sent = [event.sql for event in events if isinstance(event, StatementEvent)]
    assert len(sent) <= max, f"{len(sent)} statements, not {max}:\n" + "\n".join(sent)
