"""Statements and commits of an engine, seen where they reach the driver.

`before_cursor_execute` sees flushes, bulk statements, Core and association tables alike; the dialect's own
`do_commit` is the only place that knows how a COMMIT ended. The state of a transaction is kept with its DBAPI
connection, so that every `Connection` and `Session` on it shares it.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Engine, PoolProxiedConnection, QueuePool, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import ExecutionContext
from sqlalchemy.util import await_only

from overdrive.context import Reads, RequestContext, collectors, current
from overdrive.errors import ConfigurationError
from overdrive.instrumentation.events import StatementEvent, listening, publish
from overdrive.instrumentation.repeats import Repeats

from .driver import driver_of, is_idle
from .holders import team_lines
from .naming import Named, Naming
from .pool import FairPool
from .rows import condensed
from .statement import Facts, facts_of, outline
from .tasks import loop_beside, to_the_end

T = TypeVar("T")


class Outcome(enum.Enum):
    """How a COMMIT ended, as far as this process can know."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    #: The answer was lost, or the wait for it was cancelled: the rows may be there or not.
    UNKNOWN = "unknown"


class CommitObserver(Protocol):
    """Is told of every commit that wrote something, before and after it.

    `before` may raise to refuse the commit; `after` runs to its end even when the waiting task is cancelled.
    A released savepoint is reported like a commit, and its writes again with the commit that follows: under an
    outer transaction that never commits here (a test's, a script's) it is the only report there will be.
    """

    async def before(self, writes: frozenset[str], sql: str) -> Any:
        """Prepare for `writes` (tags) to become visible; what is returned is handed to `after`.

        sql: the first statement that wrote, in outline (`statement.outline`).
        """

    async def after(self, token: Any, outcome: Outcome) -> None:
        """Learn how the commit that `before` announced has ended."""


class Admission(Protocol):
    """Decides when a request may have a connection."""

    def enter(self, context: RequestContext) -> Callable[[], None] | None:
        """Admit a request, and return what says that its connection is back; None where it must `wait`."""

    async def wait(self, context: RequestContext) -> Callable[[], None]:
        """Have a request wait until it is admitted; may raise to refuse it."""


#: Where an engine keeps its observation.
_ATTRIBUTE = "overdrive_observation"
#: Where an engine notes that its statements need a transaction each.
NEEDS_TRANSACTIONS = "overdrive_needs_transactions"

#: Observers whose `before` has been called, each with the token it returned.
Announced = list[tuple[CommitObserver, Any]]


#: Tags of rows beyond which they are gathered by tables.
_MANY = 100


class _Transaction:
    """What is known of a DBAPI connection between two ends of a transaction."""

    __slots__ = (
        "announced",
        "began",
        "named",
        "owner",
        "reads",
        "relaxed",
        "reshapes",
        "sql",
        "started",
        "temporary",
        "writes",
    )

    def __init__(self) -> None:
        #: Whether the database has been asked for anything but plain reads since the last end.
        self.began = False
        #: Whether the driver has been told not to begin one.
        self.relaxed = False
        self.writes: set[str] = set()
        #: The first statement that wrote.
        self.sql = ""
        #: Of the statement that is being executed.
        self.named: Named | None = None
        self.reads: frozenset[str] = frozenset()
        self.started = 0.0
        #: Whom a statement in autocommit was announced to, with what they answered.
        self.announced: Announced = []
        #: Whether names may mean something else when it has ended.
        self.reshapes = False
        #: The request whose session has the connection.
        self.owner: RequestContext | None = None
        #: Names of temporary tables that were made on the connection, as long as that lasts.
        self.temporary: frozenset[str] = frozenset()

    def wrote(self, tags: frozenset[str], sql: str) -> None:
        self.sql = self.sql or sql
        self.writes |= tags
        if len(self.writes) > _MANY:
            self.writes = condensed(self.writes)

    def end(self) -> None:
        self.began = False
        self.writes.clear()
        self.sql = ""


def observe(engine: Engine, name: str, observer: CommitObserver | None = None) -> Observation:
    """Put an engine under observation, or join the one it is under already.

    Raises `ConfigurationError` where it is observed under another name: its tags would not agree.
    """
    observation = observation_of(engine)
    if observation is None:
        observation = Observation(engine, name)
        setattr(engine, _ATTRIBUTE, observation)
    elif observation.name != name:
        raise ConfigurationError(
            f"this engine is known as {observation.name!r} already, and cannot be {name!r} as well: its rows would "
            "have two names"
        )
    if observer is not None:
        observation.observers.append(observer)
    return observation


def observation_of(engine: Engine) -> Observation | None:
    """Return what observes an engine, if anything does."""
    return getattr(engine, _ATTRIBUTE, None)


class Observation:
    """One engine under observation; made by `observe`, once for all who observe it.

    engine: the synchronous face of the engine (`AsyncEngine.sync_engine`).
    name: what its tags start with; the same in every process that writes to the same database.

    On PostgreSQL at READ COMMITTED, a plain SELECT that comes before anything else in its transaction runs
    without one: each statement takes its own snapshot either way, and BEGIN and ROLLBACK are two round trips.
    A transaction begins with the first statement that is not a plain SELECT.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        #: Who is told of commits.
        self.observers: list[CommitObserver] = []
        #: The loop on which a synchronous engine's commits are reported, once one serves.
        self.loop: asyncio.AbstractEventLoop | None = None
        #: Whom requests ask before they have a connection.
        self.admission: Admission | None = None
        #: When the database was last asked for something, and when it last gave an answer.
        self._asked_at = self._answered_at = 0.0
        self.naming = Naming(engine, name, self._tell_of_everything)
        #: Connections whose driver's own somebody has, by `id`; and whether that may be anybody but SQLAlchemy, which
        #: wants the first for itself.
        self._taken: set[int] = set()
        self._is_connected = getattr(engine.dialect, "default_isolation_level", None) is not None
        self._listen()

    def _listen(self) -> None:
        event.listen(self.engine, "before_cursor_execute", self._before_cursor_execute)
        event.listen(self.engine, "after_cursor_execute", self._after_cursor_execute)
        event.listen(self.engine, "handle_error", self._handle_error)
        event.listen(self.engine, "checkin", self._checkin)
        event.listen(self.engine, "connect", self._connected)
        dialect: Any = self.engine.dialect
        dialect.do_commit = self._committing(dialect.do_commit)
        dialect.do_commit_twophase = self._committing_prepared(dialect.do_commit_twophase)
        dialect.do_rollback = self._rolling_back(dialect.do_rollback)
        dialect.do_release_savepoint = self._releasing(dialect.do_release_savepoint)
        dialect.get_driver_connection = self._taking_out(dialect.get_driver_connection)
        engine: Any = self.engine
        engine.raw_connection = self._checking_out(engine.raw_connection)

    # Statements: the seam. A fetch that goes past SQLAlchemy's cursor calls `started` and `finished` itself.

    def started(
        self,
        info: dict[Any, Any],
        named: Named,
        sql: str,
        parameters: Sequence[Mapping[str, Any]] = (),
        *,
        autocommit: bool,
    ) -> None:
        """Note that a statement is about to run on the connection with `info`.

        parameters: by their names, for each time it is executed.
        """
        transaction, facts = _transaction_of(info), named.facts
        reads, writes = self.naming.tags_of(named, parameters)
        transaction.named, transaction.reads = named, reads
        unknown = named.unknown
        if transaction.temporary and (hidden := transaction.temporary & facts.names_read):
            unknown = f"a temporary table was made on this connection, and may hide {min(hidden)}"
        context = current() or transaction.owner
        for collector in _readers(transaction):
            _collect(collector, reads)
            if unknown:
                collector.unknown.append(unknown)
        if facts.temporary:
            transaction.temporary |= facts.temporary
        if facts.reshapes:
            transaction.reshapes = True
            self.naming.forget()
        if writes:
            transaction.wrote(writes, sql)
            if context is not None:
                context.wrote |= writes
            if autocommit:
                self._announce(writes, sql, transaction.announced)
        self._asked_at = transaction.started = time.perf_counter()
        if transaction.started >= self.naming.look_at:
            self.naming.look_later(transaction.started)

    def finished(self, info: dict[Any, Any], sql: str, rows: int, *, autocommit: bool) -> None:
        """Note that the statement last started on the connection with `info` was answered."""
        transaction = _transaction_of(info)
        self._answered_at = now = time.perf_counter()
        duration = now - transaction.started
        named, transaction.named = transaction.named, None
        if (context := current()) is not None:
            context.statements += 1
            context.database_time += duration
            context.rows += max(rows, 0)
            # Looking for the place is dear, and done once.
            if (limit := context.repeated_statements) is not None:
                repeats = context.repeats = context.repeats or Repeats(limit)
                if repeats.add(sql) and (place := next(team_lines(), None)):
                    repeats.came_from(sql, place)
        if named is None:
            return
        if named.rows_read and rows < 1:
            # What is not there yet may come without being named.
            tables = self.naming.tagged(each.table for each in named.rows_read)
            transaction.reads |= tables
            for collector in _readers(transaction):
                _collect(collector, tables)
        if listening():
            transactional = transaction.began and not autocommit
            writes = self.naming.tagged(named.facts.writes)
            publish(StatementEvent(self.name, sql, duration, rows, transaction.reads, writes, transactional))
        if autocommit and named.writes:
            if named.facts.reshapes:
                self.naming.forget()
            self._report(transaction.announced, Outcome.COMMITTED)

    def is_silent(self, seconds: float) -> bool:
        """Say whether the database owes an answer, and has given none to anybody for so long."""
        return self._asked_at > self._answered_at and time.perf_counter() - self._asked_at > seconds

    def _connected(self, dbapi_connection: Any, _record: Any) -> None:
        self._is_connected = True
        self.naming.connected(dbapi_connection)

    def _before_cursor_execute(
        self, connection: Connection, cursor: Any, sql: str, _p: Any, context: ExecutionContext, _many: bool
    ) -> None:
        facts = facts_of(context.compiled, sql)
        schemas = context.execution_options.get("schema_translate_map")
        naming = self.naming
        named = naming.named(facts, schemas)
        if naming.lacks(named):
            naming.ask(connection.connection, named)
            named = naming.named(facts, schemas)
        autocommit = self._is_autocommit(connection)
        if not autocommit:
            self._begin_late(connection, context, facts)
        # Statements that SQLAlchemy has not compiled have no names for theirs, nor facts that ask for them.
        parameters = getattr(context, "compiled_parameters", None) or ()
        self.started(connection.info, named, sql, parameters, autocommit=autocommit)

    def _after_cursor_execute(
        self, connection: Connection, cursor: Any, sql: str, _p: Any, context: ExecutionContext, _many: bool
    ) -> None:
        transaction, autocommit = _transaction_of(connection.info), self._is_autocommit(connection)
        named = transaction.named
        self.finished(connection.info, sql, _count_of(cursor), autocommit=autocommit)
        if named is None or autocommit or not transaction.writes:
            return
        # Textual SQL may have been a COMMIT, and a driver may be in autocommit without SQLAlchemy's knowing.
        if is_idle(self.engine, connection.connection):
            with self._announced(transaction):
                self._end(transaction)

    def _handle_error(self, failure: ExceptionContext) -> None:
        # An error is an answer, unless it is of the driver, or of who does not wait for it.
        if failure.sqlalchemy_exception is not None and not failure.is_disconnect:
            self._answered_at = time.perf_counter()
        connection = failure.connection
        if connection is None or connection.invalidated or connection.closed:
            return
        transaction = _transaction_of(connection.info)
        named, transaction.named = transaction.named, None
        if named is not None and named.writes and self._is_autocommit(connection):
            self._report(transaction.announced, Outcome.UNKNOWN)

    def _begin_late(self, connection: Connection, context: ExecutionContext, facts: Facts) -> None:
        """Let the driver send BEGIN only when a statement needs the transaction it opens."""
        transaction = _transaction_of(connection.info)
        if transaction.began:
            return
        request = current()
        deadline = None if request is None or self.engine.dialect.name != "postgresql" else request.deadline
        # Nobody can cancel what waits in a thread: there the server ends it, which takes a transaction.
        plain = facts.plain and not _streams(context) and (deadline is None or self.engine.dialect.is_async)
        if self.reads_need_no_transaction(connection.get_execution_options()):
            dbapi_connection: Any = connection.connection.dbapi_connection
            if transaction.relaxed != plain:
                transaction.relaxed = dbapi_connection.autocommit = plain
            transaction.began = not plain
        else:
            # SQLite begins by itself before the first write, and reads outside a transaction.
            transaction.began = not (plain and self.engine.dialect.name == "sqlite")
        if transaction.began and deadline is not None:
            _limit(connection, deadline - time.monotonic())

    def reads_need_no_transaction(self, options: Mapping[str, Any]) -> bool:
        """Say whether a plain SELECT means the same outside a transaction, under these execution options."""
        dialect: Any = self.engine.dialect
        return (
            dialect.driver in ("asyncpg", "psycopg", "psycopg_async")
            # What the server says over the first connection.
            and getattr(dialect, "default_isolation_level", None) == "READ COMMITTED"
            and getattr(dialect, "_on_connect_isolation_level", "unknown") in (None, "READ COMMITTED")
            and options.get("isolation_level") in (None, "READ COMMITTED")
            and not getattr(self.engine, NEEDS_TRANSACTIONS, False)
        )

    def _is_autocommit(self, connection: Connection) -> bool:
        level = connection.get_execution_options().get("isolation_level")
        if level is None:
            level = getattr(self.engine.dialect, "_on_connect_isolation_level", None)
        return bool(level == "AUTOCOMMIT")

    # Ends of transactions

    def _committing(self, commit: Callable[..., None]) -> Callable[..., None]:
        def do_commit(connection: Any, *args: Any, **kwargs: Any) -> None:
            transaction = _transaction_of(_info_of(connection))
            if is_idle(self.engine, connection):
                return
            self._wrote_unseen(connection.dbapi_connection, transaction)
            try:
                with self._announced(transaction):
                    self._asked_at = time.perf_counter()
                    commit(connection, *args, **kwargs)
                    self._answered_at = time.perf_counter()
            except Exception as error:
                # SQLAlchemy takes a transaction whose commit has failed for ended. It is still open where the
                # observer refused the commit, and always on SQLite.
                if self._is_refused(error):
                    self.engine.dialect.do_rollback(connection)
                raise
            self._end(transaction)

        return do_commit

    def _committing_prepared(self, commit: Callable[..., None]) -> Callable[..., None]:
        def do_commit_twophase(connection: Connection, *args: Any, **kwargs: Any) -> None:
            transaction = _transaction_of(connection.info)
            if kwargs.get("recover"):
                # It was prepared elsewhere, maybe by another process.
                transaction.wrote(frozenset((self.naming.everything,)), "COMMIT PREPARED")
            # What is prepared is not the connection's any more, which seems to be idle.
            with self._announced(transaction):
                commit(connection, *args, **kwargs)
            self._end(transaction)

        return do_commit_twophase

    def _rolling_back(self, rollback: Callable[..., None]) -> Callable[..., None]:
        def do_rollback(connection: Any) -> None:
            transaction = _transaction_of(_info_of(connection))
            if not is_idle(self.engine, connection):
                rollback(connection)
            self._end(transaction)

        return do_rollback

    def _releasing(self, release: Callable[..., None]) -> Callable[..., None]:
        def do_release_savepoint(connection: Connection, name: str) -> None:
            with self._announced(_transaction_of(connection.info)):
                release(connection, name)

        return do_release_savepoint

    @contextmanager
    def _announced(self, transaction: _Transaction) -> Iterator[None]:
        """Tell the observers of what the block makes visible, before and after it."""
        announced: Announced = []
        dialect: Any = self.engine.dialect
        outcome = Outcome.UNKNOWN
        is_sent = False
        try:
            if transaction.writes:
                self._announce(frozenset(transaction.writes), transaction.sql, announced)
            is_sent = True
            yield
            outcome = Outcome.COMMITTED
        except Exception as error:
            # Once it is sent, an error of anybody but the server, a time limit of the driver's say, tells nothing.
            if not is_sent or (isinstance(error, dialect.dbapi.Error) and self._is_refused(error)):
                outcome = Outcome.ROLLED_BACK
            raise
        finally:
            if transaction.reshapes:
                self.naming.forget()
            self._report(announced, outcome)

    def _end(self, transaction: _Transaction) -> None:
        transaction.end()
        if transaction.reshapes:
            transaction.reshapes = False
            self.naming.forget()

    def _taking_out(self, driver_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Have the driver's own connection counted as a reading and a write of which nothing is known: of COPY, say."""

        def get_driver_connection(dbapi_connection: Any) -> Any:
            if self._is_connected:
                self._taken.add(id(dbapi_connection))
                for collector in collectors():
                    collector.unknown.append("the driver's own connection was taken, and what it is asked nobody sees")
            return driver_of(dbapi_connection)

        return get_driver_connection

    def was_taken(self, pooled: PoolProxiedConnection) -> bool:
        """Say whether somebody has the driver's own connection of a pooled one."""
        return id(pooled.dbapi_connection) in self._taken

    def _wrote_unseen(self, dbapi_connection: Any, transaction: _Transaction) -> None:
        if id(dbapi_connection) in self._taken:
            transaction.wrote(frozenset((self.naming.everything,)), "what the driver's own connection was asked")

    def _checking_out(self, raw_connection: Callable[[], Any]) -> Callable[[], Any]:
        def checkout() -> Any:
            context = current()
            if context is None:
                return raw_connection()
            leave = None
            # Plain functions were admitted when they were given their session: here they are in a thread.
            if self.admission is not None and self.engine.dialect.is_async:
                leave = self.admission.enter(context) or await_only(self.admission.wait(context))
            asked = time.perf_counter()
            try:
                pooled = raw_connection()
            except BaseException:
                if leave is not None:
                    leave()
                raise
            finally:
                context.pool_wait += time.perf_counter() - asked
            if leave is not None:
                pooled.record_info[_LEAVE] = leave
            return pooled

        return checkout

    def _checkin(self, dbapi_connection: Any, record: Any) -> None:
        if (leave := record.record_info.pop(_LEAVE, None)) is not None:
            leave()
        if id(dbapi_connection) in self._taken:
            self._taken.discard(id(dbapi_connection))
            self._tell_of_everything("what the driver's own connection was asked")
        transaction = record.info.get(_KEY)
        if transaction is None:
            return
        self._end(transaction)
        transaction.owner = None
        if transaction.relaxed and dbapi_connection is not None:
            transaction.relaxed = dbapi_connection.autocommit = False

    def _is_refused(self, error: Exception) -> bool:
        """Say whether a commit has failed for certain: its server says so, or it was not sent.

        A server that ends or loses the connection (SQLSTATE 57P and class 08) may have kept it before, and a driver
        that finds the connection gone knows nothing.
        """
        dialect: Any = self.engine.dialect
        if not isinstance(error, dialect.dbapi.Error):
            return True
        if dialect.name != "postgresql":
            return not dialect.is_disconnect(error, None, None)
        state = getattr(error, "sqlstate", None)
        return state is not None and not state.startswith(("08", "57P"))

    # Reporting, from whatever is executing: a greenlet of an async engine, a worker thread, a script

    def _announce(self, writes: frozenset[str], sql: str, announced: Announced) -> None:
        for observer in self.observers:
            announced.append((observer, self._wait(observer.before(writes, outline(sql)))))

    def _report(self, announced: Announced, outcome: Outcome) -> None:
        if announced:
            told = _tell(announced[:], outcome)
            announced.clear()
            self._wait(to_the_end(told))

    def _tell_of_everything(self, why: str) -> None:
        """Tell of a write that was not seen, of which nobody knows more than that it is over."""
        announced: Announced = []
        self._announce(frozenset((self.naming.everything,)), why, announced)
        self._report(announced, Outcome.COMMITTED)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self.engine.dialect.is_async:
            return await_only(coroutine)
        return _run_from_thread(coroutine, self.loop)


async def _tell(announced: Announced, outcome: Outcome) -> None:
    """Tell everybody, whatever the others do; what the first one raises is raised in the end."""
    told = (observer.after(token, outcome) for observer, token in announced)
    for result in await asyncio.gather(*told, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def has_begun(connection: Connection) -> bool:
    """Say whether the database was asked for anything but plain reads since the last end of a transaction."""
    # A driver told so (PEP 249's way) opens one on SQLite for reads as well.
    is_open = getattr(driver_of(connection.connection), "in_transaction", False)
    return is_open or _transaction_of(connection.info).began


def returns_without_waiting(engine: Engine, pooled: PoolProxiedConnection) -> bool:
    """Say whether giving a pooled connection back would ask nobody for anything."""
    pool = engine.pool
    # A `QueuePool` closes one beyond its size as it comes back, and psycopg's is taken out of autocommit, which waits.
    kept = isinstance(pool, FairPool) or (isinstance(pool, QueuePool) and pool.overflow() <= 0)
    observation = observation_of(engine)
    is_seen = observation is None or not observation.was_taken(pooled)
    return kept and is_seen and "psycopg" not in engine.dialect.driver and pooled.is_valid and is_idle(engine, pooled)


_KEY = "overdrive"
_LEAVE = "overdrive_leave"


def _transaction_of(info: dict[Any, Any]) -> _Transaction:
    transaction = info.get(_KEY)
    if transaction is None:
        transaction = info[_KEY] = _Transaction()
    return transaction


def _info_of(connection: Any) -> dict[Any, Any]:
    """Return the connection's notes; an engine's very first connection has none yet, nor anything to note."""
    try:
        return connection.info  # type: ignore[no-any-return]
    except NotImplementedError:
        return {}


def lend(connection: Connection, owner: RequestContext | None) -> None:
    """Note whose session has a connection: in a thread of an executor nobody else knows which request it is for."""
    _transaction_of(connection.info).owner = owner


def _readers(transaction: _Transaction) -> tuple[Reads, ...]:
    return collectors() or (() if transaction.owner is None else (transaction.owner.reads,))


def _collect(collector: Reads, tags: frozenset[str]) -> None:
    collector.tags |= tags
    if len(collector.tags) > _MANY:
        collector.tags = condensed(collector.tags)


def _count_of(cursor: Any) -> int:
    """Return the rows that a statement returned or changed; -1 where nobody says."""
    # SQLite does not count what a SELECT returns, but SQLAlchemy's asynchronous cursors have fetched it all.
    fetched = getattr(cursor, "_rows", None) if cursor.rowcount < 0 and cursor.description else None
    return cursor.rowcount if fetched is None else len(fetched)


def _limit(connection: Connection, seconds: float) -> None:
    """Have the server end each statement of this transaction that takes longer."""
    cursor = connection.connection.cursor()
    cursor.execute(f"SET LOCAL statement_timeout = {max(1, math.ceil(seconds * 1000))}")
    cursor.close()


def _streams(context: ExecutionContext) -> bool:
    """Say whether rows are fetched through a server-side cursor, which lives in a transaction."""
    options = context.execution_options
    return bool(options.get("stream_results") or options.get("yield_per"))


def _run_from_thread(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop | None) -> T:
    """Run `coroutine` for code that cannot await: on the loop that serves, or on one for all of these."""
    try:
        here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if loop is None or not loop.is_running() or here is loop:
        loop = loop_beside()
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()
