"""What pages keep in the cache of the lists they are of: their totals, and where in them which row is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import BindParameter, Engine, Executable
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler

from .cache.cache import Cache
from .cache.entry import Entry, Instant
from .cache.key import digest
from .cache.store import StoreUnavailable
from .cache.tags import tag_of_tenant
from .cache.values import told
from .context import RequestContext
from .errors import ConfigurationError
from .pagination.keeper import Kept
from .pagination.recipe import Query
from .pagination.select import Steps, run, run_async
from .pool.observe import Observation, observation_of
from .pool.session import sees_what_all_see, send, send_sync
from .pool.statement import Facts, facts_of

#: Of the written form of what is kept of a list.
_FORM = "boundaries.1"


class Sent(NamedTuple):
    """A statement as the database gets it: its text, its parameters by name, and what it reads."""

    sql: str
    binds: list[tuple[str, BindParameter[Any]]]
    facts: Facts


class Since(NamedTuple):
    """When something was looked for, and the seconds that what is kept instead has left."""

    instant: Instant
    ttl: float


#: What is made of a statement goes with it.
_sent: WeakKeyDictionary[Engine, WeakKeyDictionary[Executable, Sent]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ListKeeper:
    """Keeps what one request finds out about lists, for all who would find the same."""

    cache: Cache
    context: RequestContext
    db: AsyncSession | Session
    engine: Engine
    observation: Observation
    #: By name, what was named by this request.
    facts: dict[str, Facts]

    @classmethod
    def of(cls, db: AsyncSession | Session, statement: Executable, context: RequestContext | None) -> ListKeeper | None:
        """Return what keeps lists for a request; None where it might find something else than others."""
        if context is None or context.runtime is None or not context.runtime.settings.pagination.cache_totals:
            return None
        cache: Cache = context.runtime.cache
        if not cache.enabled or context.lacks_tenant:
            return None
        # A response that is compared with what is kept must not be made of what is kept.
        if context.exchange is not None and context.exchange.is_bypassed:
            return None
        engine = _plain(db).get_bind(clause=statement)  # type: ignore[arg-type]
        observation = observation_of(engine) if isinstance(engine, Engine) else None
        if not isinstance(engine, Engine) or observation is None or cache.invalidator not in observation.observers:
            return None
        if isinstance(db, Session) and not _is_beside(observation.loop):
            return None
        return cls(cache, context, db, engine, observation, {})

    def wait(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Have something awaited on the serving loop, for a thread beside it."""
        loop = self.observation.loop
        assert loop is not None
        return asyncio.run_coroutine_threadsafe(_awaited(call), loop).result()

    def name_of(self, query: Query) -> str | None:
        """Return what tells a query, with its values, from every other one; None where nothing of it can be kept."""
        # What was read in ways that nobody can name may also have set something.
        if self.context.wrote or self.context.reads.unknown or query.statement.get_execution_options():
            return None
        if not sees_what_all_see(_plain(self.db), self.engine):
            return None
        sent = _sent_as(self.engine, query.statement)
        # Which rows were looked for by their keys, and found, is known only when they have been read.
        if sent is None or sent.facts.unknown or not sent.facts.plain or sent.facts.rows_read:
            return None
        try:
            values = [told(_processed(self.engine, bind, query.parameters.get(name))) for name, bind in sent.binds]
        except ConfigurationError:
            return None
        name = digest((self.observation.name, sent.sql, values))
        self.facts[name] = sent.facts
        return name

    async def number(self, name: str, count: Steps[int]) -> int:
        """Return the number that is kept, or what these steps come to."""
        ready = None
        if isinstance(self.db, AsyncSession):
            load = partial(run_async, count, partial(send, self.db))
            # Or those who wait for it might hold every connection that it waits for.
            ready = partial(self.db.connection, bind_arguments={"bind": self.engine})
        else:
            # The request has its place at the pool, and its own thread waits for this one.
            load = partial(asyncio.to_thread, run, count, partial(send_sync, self.db))
        number: int = await self.cache.values.get_or_set(
            f"overdrive.total:{name}", load, type_=int, ttl=None, tags=(), shared=False, anew=True, ready=ready
        )
        return number

    async def look(self, name: str) -> Kept | None:
        """Return what is kept, as of now; None where nothing can be."""
        try:
            turn = await self.cache.find(self._key(name), _FORM, alone=True)
        except StoreUnavailable:
            return None
        if turn.is_off:
            return None
        if turn.entry is None:
            return Kept(None, Since(turn.instant, self.cache.ttl))
        return Kept(turn.entry.body, Since(turn.instant, self._left(turn.entry)))

    async def keep(self, name: str, body: bytes, kept: Kept) -> None:
        """Keep what was read since `kept` was looked for, unless it was written meanwhile."""
        assert isinstance(kept.since, Since)
        instant, ttl = kept.since
        tags = self.observation.naming.reads_of(self.facts[name])
        if tags is None:
            return
        if self.context.tenant is not None:
            tags |= {tag_of_tenant(self.context.tenant)}
        await self.cache.keep(self._key(name), _FORM, instant, tags, ttl, headers=[], body=body, flight=None)

    def _key(self, name: str) -> str:
        return f"list:{digest((name, self.context.tenant))}"

    def _left(self, entry: Entry) -> float:
        # With a life of its own, each addition would have what nobody heard of being written live on.
        return entry.created + entry.ttl - self.cache.clock()


def _plain(db: AsyncSession | Session) -> Session:
    return db.sync_session if isinstance(db, AsyncSession) else db


def _is_beside(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Say whether the loop runs in another thread than this one, and no other loop in this one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return loop is not None and loop.is_running()
    return False


async def _awaited(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


def _sent_as(engine: Engine, statement: Executable) -> Sent | None:
    made = _sent.setdefault(engine, WeakKeyDictionary())
    sent = made.get(statement)
    if sent is None:
        compiled = statement.compile(engine)  # type: ignore[attr-defined]
        if not isinstance(compiled, SQLCompiler):
            return None
        facts = facts_of(compiled, sql := str(compiled))
        # Without a value of its own, and none given, it is where in the rows to read.
        sent = made[statement] = Sent(sql, sorted(compiled.binds.items()), facts)
    return sent


def _processed(engine: Engine, bind: BindParameter[Any], value: Any) -> Any:
    """Return a parameter's value as the driver gets it."""
    if value is None and not bind.required:
        value = bind.effective_value
    process = bind.type.dialect_impl(engine.dialect).bind_processor(engine.dialect)
    if process is None:
        return value
    return [process(each) for each in value] if bind.expanding else process(value)
