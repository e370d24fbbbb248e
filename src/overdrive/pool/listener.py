"""Hears what the database tells of writes, and has the cache told: one connection a process, outside the pool.

Where several processes share a cache, one leads, by a lock that ends with its connection, and tells the cache for
all; the others look after it. What a leader hears comes on the connection it asks on, in one order with the answers:
so when an answer is there, and all that was heard before has been passed on, everything committed before the question
was sent is known. That is a *beat*. Others see in `pg_stat_activity` when the leader has last asked, which it does not
go on to do before it has passed everything on; one that has not for two seconds is put off its connection.

Whoever begins to lead does not know what was written meanwhile, and has all that is kept dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection
from contextvars import Context
from hashlib import blake2b
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from overdrive.errors import ConfigurationError

from .rows import condensed
from .triggers import CHANGED, CHANNEL, FUNCTION, OUTBOX, quoted, tags_of

logger = logging.getLogger("overdrive")

#: Seconds without a beat after which nothing is taken from the cache.
LEASE = 1.0
#: Seconds between two beats.
_BEAT = 0.25
#: Seconds between two looks into an outbox. What is written is heard a look later at most, and on a busy machine some
#: 20 ms later than that: with 10 ms between them within 50, for 4 % of a core in one process.
_LOOK = 0.01
#: Seconds after which a leader without a beat is put off.
_DEAD = 2.0
#: Seconds an answer is waited for.
_PATIENCE = 5.0
#: Seconds until a lost connection is opened again: at first, and at most; less up to a half, so that not all come.
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0

#: Seconds an outbox keeps what was written, and between two looks at what is older. Whoever has not looked for half
#: as long begins anew.
_KEPT = 60.0

_FIRST = f"""
SELECT EXISTS (SELECT FROM pg_trigger JOIN pg_proc p ON p.oid = tgfoid WHERE proname = '{FUNCTION}') AS triggers,
    (SELECT nspname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
        WHERE relname = '{OUTBOX}' AND relkind = 'r' LIMIT 1)::text AS outbox,
    pg_current_snapshot()::text AS snapshot, pg_backend_pid() AS pid
"""

_BEATING = "SELECT pg_backend_pid() AS pid"

# What has become visible since the snapshot. What is not visible now is of another server: it came with a dump.
_LOOKING = """
SELECT pg_backend_pid() AS pid, pg_current_snapshot()::text AS snapshot,
    ARRAY(SELECT payload FROM {outbox} WHERE transaction >= pg_snapshot_xmin($1::text::pg_snapshot)::text::bigint
        AND NOT pg_visible_in_snapshot(transaction::text::xid8, $1::text::pg_snapshot)
        AND pg_visible_in_snapshot(transaction::text::xid8, pg_current_snapshot()) ORDER BY id) AS payloads
"""

_PRUNING = "DELETE FROM {outbox} WHERE transaction < pg_snapshot_xmin($1::text::pg_snapshot)::text::bigint"

_LEADING = "SELECT pg_try_advisory_lock($1::int8) AS leads"

# The lock of a bigint key shows its halves.
_FOLLOWING = """
SELECT pg_try_advisory_lock($1::int8) AS leads, a.pid,
    extract(epoch FROM clock_timestamp() - a.query_start)::float8 AS age
FROM (SELECT 1) AS one
LEFT JOIN pg_locks l ON l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.database =
    (SELECT oid FROM pg_database WHERE datname = current_database())
    AND l.classid = ($1::int8 >> 32 & 4294967295)::oid AND l.objid = ($1::int8 & 4294967295)::oid
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
LIMIT 1
"""


class Cache(Protocol):
    """Who is told."""

    @property
    def owes(self) -> bool:
        """Say whether something that was announced has not come to everybody yet."""

    async def announce(self, tags: Collection[str], writer: str) -> None:
        """Drop what depends on any of the tags; writer: who wrote, for people."""


class _LostError(Exception):
    """Why nothing is heard any more."""


class Listener:
    """Listens to one database.

    engine: whose database it is, and how it is reached.
    name: what its tags start with.
    told: who is told of writes.
    clear: drops everything that is kept.
    shared_by: what names the cache that other processes share; None where it is this process's alone.

    Raises `ConfigurationError` for a database that does not notify.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        name: str,
        told: Cache,
        clear: Callable[[], Awaitable[None]],
        shared_by: str | None = None,
    ) -> None:
        if engine.dialect.name != "postgresql":
            raise ConfigurationError(
                f"cache.listen is for PostgreSQL, and the engine {name!r} is {engine.dialect.name}'s"
            )
        self._engine = engine
        self._name = name
        self._told = told
        self._clear = clear
        self._lock = None if shared_by is None else _number(f"{shared_by} {name}")
        self._task: asyncio.Task[None] | None = None
        self._known = float("-inf")
        self._why = ""
        #: Whether this process tells the cache.
        self.leads = False

    @property
    def is_deaf(self) -> bool:
        """Say whether something may have been written, more than a second ago, that nobody has told the cache of."""
        return time.monotonic() - self._known > LEASE

    def start(self) -> None:
        """Begin to listen, in the running loop."""
        self._known = float("-inf")
        # Not in the context of the request that happens to be the first.
        self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def aclose(self) -> None:
        """Listen no longer: from now on nothing is taken from the cache."""
        task, self._task = self._task, None
        if task is not None and task.get_loop() is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait([task])
        self._known = float("-inf")

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            before = self._known
            try:
                async with asyncio.timeout(_PATIENCE):
                    connection = await _opened(self._engine)
                try:
                    await self._listen(connection)
                finally:
                    self.leads = False
                    connection.abandon()
            except Exception as error:
                self._complain(error)
            pause = _FIRST_PAUSE if self._known > before else min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause * random.uniform(0.5, 1))

    def _complain(self, error: Exception) -> None:
        why = str(error) or type(error).__name__
        if why != self._why:
            self._why = why
            logger.warning(
                "nobody listens to what others write to the database of the engine %s, and nothing is taken from the "
                "cache until somebody does: %s",
                self._name,
                why,
            )

    async def _listen(self, connection: _Heard) -> None:
        if self._lock is not None and not (await connection.ask(_LEADING, self._lock))["leads"]:
            await self._follow(connection, self._lock)
        await connection.listen()
        first = await connection.ask(_FIRST)
        if not first["triggers"]:
            logger.warning(
                "the database of the engine %s has no triggers, and tells of no writes: overdrive triggers install",
                self._name,
            )
        self.leads = True
        await self._lead(connection, first)

    async def _follow(self, connection: _Heard, lock: int) -> None:
        """Look after the leader, until this process leads."""
        while True:
            sent = time.monotonic()
            found = await connection.ask(_FOLLOWING, lock)
            if found["leads"]:
                return
            if found["pid"] is not None and found["age"] is None:
                raise _LostError(
                    "pg_stat_activity does not show the process that listens: all have to be of one role, or in "
                    "pg_read_all_stats, with track_activities on"
                )
            if found["age"] is not None:
                # What it has asked says that it has passed on what it had heard until it asked before.
                self._known = max(self._known, sent - found["age"] - _BEAT)
                if not self.is_deaf:
                    self._heard_again()
                if found["age"] > _DEAD:
                    await connection.ask("SELECT pg_terminate_backend($1::int4)", found["pid"])
            await connection.pause(_BEAT)

    async def _lead(self, connection: _Heard, first: Any) -> None:
        await self._clear()
        snapshot, outbox = first["snapshot"], first["outbox"] and quoted(first["outbox"], OUTBOX)
        kept, kept_at = snapshot, time.monotonic()
        looked_at = due = kept_at
        while True:
            payloads = connection.take()
            if (now := time.monotonic()) >= due:
                looked_at, before = now, looked_at
                if now - before > _KEPT / 2:
                    raise _LostError("this process stood still, or could not reach the cache's store, for too long")
                if outbox:
                    found = await connection.ask(_LOOKING.format(outbox=outbox), snapshot)
                    snapshot = found["snapshot"]
                    payloads += found["payloads"]
                else:
                    found = await connection.ask(_BEATING)
                if found["pid"] != first["pid"]:
                    raise _LostError(
                        "another backend answers than before, as with a pooler in transaction mode: name the server "
                        "itself in cache.direct_url"
                    )
                # What came before the answer.
                payloads += connection.take()
                due = now + (_LOOK if outbox else _BEAT)
            if CHANGED in payloads:
                return
            await self._pass_on(payloads)
            self._known = looked_at
            self._heard_again()
            if outbox and now - kept_at > _KEPT:
                await connection.ask(_PRUNING.format(outbox=outbox), kept)
                kept, kept_at = snapshot, now
            await connection.pause(max(0.0, due - time.monotonic()))

    async def _pass_on(self, payloads: Collection[str]) -> None:
        """Return when the cache has been told; until then this process asks nothing, and others notice that."""
        tags = condensed({tag for each in payloads for tag in tags_of(each, self._name)})
        if tags:
            await self._told.announce(tags, "triggers")
        while self._told.owes:
            await asyncio.sleep(_BEAT)
            await self._told.announce((), "triggers")

    def _heard_again(self) -> None:
        if self._why:
            self._why = ""
            logger.info("somebody listens again to what others write to the database of the engine %s", self._name)


def _number(name: str) -> int:
    """Return the key of an advisory lock."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), signed=True)


# Connections


class _Heard(Protocol):
    """A connection of a driver, with what was heard on it. Whatever is awaited raises once it is lost."""

    async def listen(self) -> None:
        """Hear announcements from now on."""

    async def ask(self, sql: str, *values: Any) -> Any:
        """Execute a statement, and return the first row, if there is one."""

    def take(self) -> list[str]:
        """Return what was heard, once."""

    async def pause(self, seconds: float) -> None:
        """Wait until something is heard, or that long."""

    def abandon(self) -> None:
        """Close it without waiting."""


async def _opened(engine: AsyncEngine) -> _Heard:
    """Open a connection as the engine does, outside its pool."""
    pool: Any = engine.sync_engine.pool
    adapted: Any = await greenlet_spawn(pool._invoke_creator, None)
    if engine.dialect.driver == "asyncpg":
        return _Asyncpg(adapted.driver_connection)
    await adapted.driver_connection.set_autocommit(True)
    return _Psycopg(adapted.driver_connection)


class _Asyncpg:
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._heard: list[str] = []
        self._woken = asyncio.Event()
        connection.add_termination_listener(lambda _connection: self._woken.set())

    async def listen(self) -> None:
        await self._connection.add_listener(CHANNEL, self._hear)

    def _hear(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        self._heard.append(payload)
        self._woken.set()

    async def ask(self, sql: str, *values: Any) -> Any:
        return await self._connection.fetchrow(sql, *values, timeout=_PATIENCE)

    def take(self) -> list[str]:
        heard, self._heard = self._heard, []
        return heard

    async def pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)
        self._woken.clear()
        if self._connection.is_closed():
            raise _LostError("the database has closed the connection")

    def abandon(self) -> None:
        self._connection.terminate()


class _Psycopg:
    def __init__(self, connection: Any) -> None:
        from psycopg import AsyncRawCursor
        from psycopg.rows import dict_row

        self._connection = connection
        self._cursor = AsyncRawCursor(connection, row_factory=dict_row)
        self._heard: list[str] = []

    async def listen(self) -> None:
        await self.ask(f"LISTEN {CHANNEL}")

    async def ask(self, sql: str, *values: Any) -> Any:
        async with asyncio.timeout(_PATIENCE):
            await self._cursor.execute(sql, values)
            return await self._cursor.fetchone() if self._cursor.description else None

    def take(self) -> list[str]:
        heard, self._heard = self._heard, []
        return heard

    async def pause(self, seconds: float) -> None:
        async for told in self._connection.notifies(timeout=seconds, stop_after=1):
            self._heard.append(told.payload)

    def abandon(self) -> None:
        self._connection.pgconn.finish()
