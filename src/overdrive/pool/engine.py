"""Engines: from a URL to a pool that is ready for a service, or to one clear sentence why not."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import sqlalchemy
from sqlalchemy import URL, Connection, Dialect, Engine, event, make_url, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import ExecutionContext
from sqlalchemy.exc import ArgumentError, InvalidRequestError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, Pool, QueuePool, StaticPool
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from overdrive.errors import ConfigurationError

from .closing import abandon, close, has_loop
from .driver import driver_of
from .observe import NEEDS_TRANSACTIONS
from .pool import FairPool
from .sizes import watch_sizes
from .statement import facts_of, first_word
from .tasks import start, to_the_end

Password = Callable[[], str | Awaitable[str]]

#: Where an engine keeps what is asked for its password.
_PASSWORD = "overdrive_password"
#: The driver a URL without one gets, and the driver that can do the same for synchronous code.
_ASYNC_DRIVERS = {"postgresql": "asyncpg", "postgres": "asyncpg", "sqlite": "aiosqlite"}
_SYNC_DRIVERS = {"postgresql+asyncpg": "postgresql+psycopg", "sqlite+aiosqlite": "sqlite"}
#: Milliseconds a writer waits for another one on SQLite, which has room for one: as long as for a pool, by default.
_BUSY_TIMEOUT = 30_000
#: Statements of SQLite that end, begin or cannot be in a transaction.
_OUTSIDE_TRANSACTIONS = frozenset(("begin", "commit", "end", "vacuum", "attach", "detach"))
#: What only a `FairPool` takes; a database in memory has one connection and no pool.
_FAIR = ("max_waiting", "linger", "validate_after", "leak_after", "min_idle")
#: By driver, what keeps it from preparing statements that a later transaction might look for on another server.
_BEHIND_PGBOUNCER: dict[str, dict[str, Any]] = {
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        # One without a name is sent together with its values, and is replaced by the next.
        "prepared_statement_name_func": str,
    },
    "psycopg": {"prepare_threshold": None},
}
#: The server ends this connection, all of them, or is on its way up (PostgreSQL, appendix A: error codes).
_SHUTTING_DOWN = frozenset(("57P01", "57P02", "57P03"))
_READ_ONLY = "25006"
#: What PostgreSQL 14 and later tell a client of on their own: whether this is a server that takes no writes.
_READ_ONLY_SERVER = ("in_hot_standby", "default_transaction_read_only")
#: Seconds after which connections may be replaced again because their server takes no writes.
_FAILOVER_PAUSE = 1.0
#: Seconds of silence after which a connection is given up, as it is opened and later: what has failed over answers at
#: the same address, while nobody tells of the other end of a connection to a machine that is gone.
_SILENCE = 3
#: By driver, how it is told so; asyncpg is no more than given so long to connect (see `_give_up_silence`).
_IMPATIENT: dict[str, dict[str, Any]] = {
    "asyncpg": {"timeout": _SILENCE},
    "psycopg": {
        "connect_timeout": _SILENCE,
        "keepalives_idle": _SILENCE - 1,
        "keepalives_interval": 1,
        "tcp_user_timeout": _SILENCE * 1000,
    },
}
_EXTRAS = {"asyncpg": "postgres", "psycopg": "postgres", "aiosqlite": "sqlite"}


def create_engine(
    url: str | URL,
    *,
    pool_size: int = 10,
    max_overflow: int = 20,
    pool_timeout: float = 30,
    pool_recycle: int = 1800,
    password: Password | None = None,
    pgbouncer: bool = False,
    processes: int | None = None,
    strict: bool = False,
    **options: Any,
) -> AsyncEngine:
    """Create an async engine with a `FairPool`.

    url: the database; `postgresql://` and `sqlite://` get their async driver.
    pool_size: connections kept open.
    max_overflow: connections opened beyond `pool_size` under load.
    pool_timeout: seconds a checkout waits before it fails.
    pool_recycle: seconds after which a connection is replaced, less up to a tenth; -1 never.
    password: a function, or a coroutine function, that is called for each new connection and returns its password: one
        that is rotated, or a token that expires.
    pgbouncer: whether the URL is that of a PgBouncer in transaction mode. Nothing is then left on a server's session,
        which may be another one with the next transaction: neither prepared statements nor settings.
    processes: how many processes have such a pool, on all machines, to be compared with the server's `max_connections`;
        left out, the variable WEB_CONCURRENCY says it, or else it is 1. What cannot fit is a WARNING with the first
        connection.
    strict: refuse to connect instead, with a `ConfigurationError`.
    options: whatever else a `FairPool` or `sqlalchemy.ext.asyncio.create_async_engine` takes.

    Raises `ConfigurationError` for a malformed URL, a bad number or a driver that is not installed.
    """
    target = _parsed(url)
    if target.drivername in _ASYNC_DRIVERS:
        target = target.set(drivername=f"{target.get_backend_name()}+{_ASYNC_DRIVERS[target.drivername]}")
    pooling = _pooling(target, options, pool_size, max_overflow, pool_timeout, pool_recycle)
    with _explained(target):
        _adapt(target, options, password, pgbouncer)
        engine = create_async_engine(target, **pooling, **options)
    _prepare_our_own(engine.sync_engine, password)
    if not pgbouncer:
        watch_sizes(engine.sync_engine, processes, strict=strict)
    return engine


def create_sync_engine(
    url: str | URL,
    *,
    pool_size: int = 10,
    max_overflow: int = 20,
    pool_timeout: float = 30,
    pool_recycle: int = 1800,
    password: Password | None = None,
    pgbouncer: bool = False,
    processes: int | None = None,
    strict: bool = False,
    **options: Any,
) -> Engine:
    """Create the engine that synchronous code uses for the same database as `create_engine(url)`."""
    target = _parsed(url)
    backend = target.get_backend_name()
    name = (
        f"{backend}+{_ASYNC_DRIVERS[target.drivername]}" if target.drivername in _ASYNC_DRIVERS else target.drivername
    )
    target = target.set(drivername=_SYNC_DRIVERS.get(name, name))
    pooling = _pooling(target, options, pool_size, max_overflow, pool_timeout, pool_recycle)
    with _explained(target):
        _adapt(target, options, password, pgbouncer)
        engine = sqlalchemy.create_engine(target, **pooling, **options)
    _prepare_our_own(engine, password)
    if not pgbouncer:
        watch_sizes(engine, processes, strict=strict)
    return engine


def _parsed(url: str | URL) -> URL:
    try:
        target = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database URL cannot be read; it looks like postgresql://user:password@host:5432/name "
            "or sqlite:///file.sqlite"
        ) from None
    if target.drivername == "postgres":
        return target.set(drivername="postgresql")
    return target


def _pooling(
    url: URL, options: dict[str, Any], size: int, overflow: int, timeout: float, recycle: int
) -> dict[str, Any]:
    numbers = all(isinstance(each, int | float) for each in (size, overflow, timeout, recycle))
    if not numbers or size < 1 or overflow < 0 or timeout <= 0 or recycle < -1:
        raise ConfigurationError(
            "a pool needs pool_size >= 1, max_overflow >= 0, pool_timeout > 0 and pool_recycle >= -1; "
            f"got {size!r}, {overflow!r}, {timeout!r} and {recycle!r}"
        )
    in_memory = url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")
    if in_memory or options.get("poolclass") in (NullPool, StaticPool):
        for option in _FAIR:
            options.pop(option, None)
        return {}
    return {
        **({} if "poolclass" in options else {"poolclass": FairPool}),
        "pool_size": size,
        "max_overflow": overflow,
        "pool_timeout": timeout,
        "pool_recycle": recycle,
    }


def _adapt(url: URL, options: dict[str, Any], password: Password | None, pgbouncer: bool) -> None:
    if password is not None and not callable(password):
        raise ConfigurationError("password= takes a function that returns one; what does not change stands in the URL")
    if url.drivername == "sqlite+aiosqlite":
        options["connect_args"] = {"async_creator_fn": _open, **options.get("connect_args", {})}
    driver = url.get_driver_name()
    impatient = {name: value for name, value in _IMPATIENT.get(driver, {}).items() if name not in url.query}
    if impatient:
        options["connect_args"] = {**impatient, **options.get("connect_args", {})}
    if not pgbouncer:
        return
    if driver not in _BEHIND_PGBOUNCER:
        raise ConfigurationError(f"pgbouncer=True knows {' and '.join(_BEHIND_PGBOUNCER)}, not {url.drivername}")
    options["connect_args"] = {**_BEHIND_PGBOUNCER[driver], **options.get("connect_args", {})}


@contextlib.contextmanager
def _explained(url: URL) -> Any:
    try:
        yield
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        install = f"pip install 'overdrive[{extra}]'" if extra else f"pip install {error.name}"
        raise ConfigurationError(f"{url.drivername} needs {error.name}, which is missing: {install}") from None
    except NoSuchModuleError:
        raise ConfigurationError(f"SQLAlchemy knows no database called {url.drivername!r}") from None
    except InvalidRequestError as error:
        raise ConfigurationError(f"{url.drivername} cannot be used here: {error}") from None


def prepare(engine: Engine) -> None:
    """Have a team's own engine keep two promises; nothing else of it is changed.

    A cancelled query ends, and a server that has been demoted or shut down is left behind.
    """
    if engine.dialect.name == "postgresql" and not event.contains(engine, "handle_error", _leave_server):
        event.listen(engine, "handle_error", _leave_server)
    watched = event.contains(engine, "connect", _end_abandoned_queries)
    if engine.dialect.name == "postgresql" and engine.dialect.is_async and not watched:
        event.listen(engine, "connect", _end_abandoned_queries)
    if engine.dialect.driver == "asyncpg":
        event.listen(engine, "connect", partial(_note_pooler, engine))
        engine.dialect.do_terminate = partial(_close_behind, engine.dialect)  # type: ignore[method-assign]
    elif engine.dialect.driver == "aiosqlite":
        engine.dialect.do_terminate = partial(_stop_thread, engine.dialect)  # type: ignore[method-assign]


def _prepare_our_own(engine: Engine, password: Password | None) -> None:
    if engine.dialect.driver == "asyncpg":
        # Before anything is said on a new connection.
        event.listen(engine, "connect", _give_up_silence)
    prepare(engine)
    if password is not None:
        setattr(engine, _PASSWORD, password)
        event.listen(engine, "do_connect", partial(_give_password, password))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _behave_like_a_server)
        event.listen(engine, "before_cursor_execute", _begin_with_the_first_write)


def begins_with_writes(engine: Engine) -> bool:
    """Say whether this is one of ours on SQLite, whose transactions begin with their first write."""
    ours = engine.dialect.name == "sqlite"
    return ours and event.contains(engine, "before_cursor_execute", _begin_with_the_first_write)


def password_of(engine: Engine) -> Password | None:
    """Return what is asked for the password of each connection, where something is."""
    return getattr(engine, _PASSWORD, None)


def _give_password(
    password: Password, dialect: Dialect, _record: Any, _arguments: Any, parameters: dict[str, Any]
) -> None:
    given = password()
    if inspect.isawaitable(given):
        given = await_only(given) if dialect.is_async else asyncio.run(_awaited(given))
    if not isinstance(given, str):
        raise ConfigurationError(f"password= has to return text, not {type(given).__name__}")
    parameters["password"] = given


async def _awaited(given: Awaitable[str]) -> str:
    return await given


def _note_pooler(engine: Engine, dbapi_connection: Any, _record: Any) -> None:
    # What is prepared by a name is executed in a second step, which only a transaction keeps on the same server.
    named = dbapi_connection._prepared_statement_name_func() != ""
    setattr(engine, NEEDS_TRANSACTIONS, named and _is_pooled_elsewhere(dbapi_connection))


def _is_pooled_elsewhere(dbapi_connection: Any) -> bool:
    """Say whether a connection has been told to prepare nothing, as is done where a pooler gives it other sessions."""
    if hasattr(dbapi_connection, "_prepared_statement_cache"):
        return dbapi_connection._prepared_statement_cache is None
    return dbapi_connection.driver_connection.prepare_threshold is None


def _give_up_silence(dbapi_connection: Any, _record: Any) -> None:
    """Have the kernel end a connection whose other end has been silent for three seconds.

    Whether something was sent and is not acknowledged (RFC 5482), or nothing was to be sent: then it asks (RFC 1122,
    section 4.2.3.6), first after two. That of a busy server answers. libpq does the same by itself.
    """
    end = dbapi_connection.driver_connection._transport.get_extra_info("socket")
    if end.family == socket.AF_UNIX:
        return
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not every system has them.
    for name, value in (
        ("TCP_KEEPIDLE", _SILENCE - 1),
        ("TCP_KEEPINTVL", 1),
        ("TCP_USER_TIMEOUT", _SILENCE * 1000),
    ):
        if (option := getattr(socket, name, None)) is not None:
            end.setsockopt(socket.IPPROTO_TCP, option, value)


def _end_abandoned_queries(dbapi_connection: Any, _record: Any) -> None:
    """Have the server notice within 100 ms that a client went away in the middle of a query.

    Where no cancel request reaches it, a backend goes on to the end of its statement; psycopg's own is cancelled with
    the task that waits for it. PostgreSQL 14 and later can watch the socket.
    """
    if _is_pooled_elsewhere(dbapi_connection):
        return
    # Older servers do not know the setting, and not every platform lets a server watch a socket.
    with contextlib.suppress(Exception):
        dbapi_connection.run_async(_have_client_watched)


async def _have_client_watched(connection: Any) -> None:
    setting = "SET client_connection_check_interval = '100ms'"
    if not hasattr(connection, "set_autocommit"):  # asyncpg begins no transaction by itself
        await connection.execute(setting)
        return
    await connection.set_autocommit(True)
    try:
        await connection.execute(setting)
    finally:
        await connection.set_autocommit(False)


def _leave_server(failure: ExceptionContext) -> None:
    """Have a connection replaced, and all as old as it, where its server is not the one that takes writes any more.

    What stands at its address now may be. The error goes to whoever met it.
    """
    connection = failure.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    code = getattr(failure.original_exception, "sqlstate", None)
    if code in _SHUTTING_DOWN or (code == _READ_ONLY and _is_demoted(connection.connection)):
        failure.is_disconnect = True


def _is_demoted(pooled: Any) -> bool:
    """Say whether it is the server that takes no writes, and not this transaction alone that was begun READ ONLY."""
    # Until another server is promoted, every write fails, and must not cost a connection each.
    if time.time() - pooled._connection_record.starttime < _FAILOVER_PAUSE:
        return False
    driver = driver_of(pooled)
    if hasattr(driver, "get_settings"):
        settings = driver.get_settings()
        told = [getattr(settings, name, None) for name in _READ_ONLY_SERVER]
    else:
        told = [driver.info.parameter_status(name) for name in _READ_ONLY_SERVER]
    return "on" in told or None in told


def _close_behind(dialect: Dialect, dbapi_connection: Any) -> None:
    """Close a cancelled connection in a task of its own, where its cancel request is not cancelled with it."""
    if has_loop():
        start(close(dialect, dbapi_connection))
    else:
        abandon(dialect, dbapi_connection)


def _stop_thread(dialect: Dialect, dbapi_connection: Any) -> None:
    """End a cancelled connection of aiosqlite, and wait for it where waiting is possible."""
    if not in_greenlet():
        abandon(dialect, dbapi_connection)
        return
    # The cancellation that has led here goes on without this one.
    with contextlib.suppress(asyncio.CancelledError):
        await_only(to_the_end(close(dialect, dbapi_connection)))


async def _open(*arguments: Any, **options: Any) -> Any:
    """Connect to SQLite; where that fails, raise when the attempt's thread has ended.

    It tells the event loop of its end, and dies with a trace on stderr where that has been closed by then.
    """
    import aiosqlite

    connection = aiosqlite.connect(*arguments, **options)
    # As SQLAlchemy has it: a connection that nobody closes must not keep the process.
    connection._thread.daemon = True
    try:
        return await connection
    except BaseException:
        await asyncio.to_thread(connection._thread.join)
        raise


def _behave_like_a_server(dbapi_connection: Any, _record: Any) -> None:
    """Enforce foreign keys, and use the write-ahead log, where no reader waits for the writer (sqlite.org/wal.html)."""
    # Python's own BEGIN comes too late for a SAVEPOINT, whose RELEASE then commits.
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT}")
    # A read-only file or an old file system cannot be switched, and works as before.
    with contextlib.suppress(sqlite3.OperationalError):
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _begin_with_the_first_write(
    connection: Connection, _cursor: Any, sql: str, _p: Any, context: ExecutionContext, _many: bool
) -> None:
    """Open the transaction with its first write, as a writer: one that starts as a reader may have to give up."""
    driver = driver_of(connection.connection)
    if driver.in_transaction or first_word(sql) in _OUTSIDE_TRANSACTIONS:
        return
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        return
    if facts_of(context.compiled, sql).writes or first_word(sql) == "savepoint":
        cursor = connection.connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        cursor.close()


def capacity_of(pool: Pool) -> int | None:
    """Return how many connections `pool` can have out at once; None where it has no bound."""
    if isinstance(pool, FairPool):
        return pool.capacity
    if not isinstance(pool, QueuePool):
        return None
    overflow: int = pool._max_overflow
    return None if overflow < 0 else pool.size() + overflow


async def ping(engine: AsyncEngine) -> None:
    """Ask the database for an answer; `ConfigurationError` says in one line why it gave none."""
    where = engine.url.render_as_string(hide_password=True)
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except Exception as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()
        raise ConfigurationError(
            f"the database {where} cannot be reached: {reason[0] if reason else error!r}"
        ) from None
