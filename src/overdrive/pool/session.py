"""Sessions: made lazily, ended once, and loud when used after their end."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Connection, Engine, Executable, QueuePool, Result, Select, event
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker
from sqlalchemy.util import await_only

from overdrive.context import current
from overdrive.errors import OutcomeUnknownError, SessionEndedError

from . import direct
from .closing import hang_up
from .engine import capacity_of
from .entity import KEY, entity_of, make
from .observe import has_begun, lend, returns_without_waiting
from .pool import FairPool, PoolTimeoutError
from .tasks import to_the_end

logger = logging.getLogger("overdrive")

#: Says whether a response with this status keeps what its request wrote.
CommitOn = Callable[[int], bool]

#: Types of keys of which each stands for one row, whatever becomes of it on the way.
_KEYS = (int, str, UUID)

_ENDED = "overdrive_ended"
_CONNECTIONS = "overdrive_connections"
_OWNER = "overdrive_owner"
#: Where a class of sessions keeps who listens to all of them.
_HEARD = "overdrive_heard"


#: Seconds a commit that was begun in its request's time has beyond that.
_GRACE = 2.0
#: Seconds between two looks at whether a thread is done with what cannot be interrupted.
_POLL = 0.02


def _time_left() -> float | None:
    """Return the seconds after which what the request still waits for will not come; None where it has time."""
    context = current()
    if context is None or context.deadline is None:
        return None
    return max(0.0, context.deadline - time.monotonic()) + _GRACE


def successful(status: int) -> bool:
    """Commit for every status below 400, which is what a client takes for success (RFC 9110, section 15)."""
    return status < 400


class Sessions:
    """Makes the async sessions of one engine.

    maker: a team's own `async_sessionmaker`, or one made by `Sessions.of`.
    """

    def __init__(self, maker: async_sessionmaker[AsyncSession]) -> None:
        base = maker.kw.get("sync_session_class") or maker.class_.sync_session_class
        # A class of its own, so that nobody else's sessions are listened to.
        own: Any = type(base.__name__, (base,), {"get": _get} if base.get is Session.get else {})
        self._options: dict[str, Any] = {"sync_session_class": own}
        self._maker = maker
        event.listen(own, "after_transaction_create", _refuse_after_end)
        event.listen(own, "after_begin", _note_connection)
        setattr(own, _HEARD, own.__new__(own).dispatch)

    @classmethod
    def of(cls, engine: AsyncEngine, session_class: type[AsyncSession] = AsyncSession) -> Sessions:
        """Make sessions of `session_class` whose objects stay readable after a commit."""
        return cls(async_sessionmaker(engine, class_=session_class, expire_on_commit=False))

    def open(self) -> AsyncSession:
        """Return a new session, which takes a connection with its first statement."""
        session = self._maker(**self._options)
        session.info[_OWNER] = current()
        return session

    @contextlib.contextmanager
    def bound_to(self, connection: AsyncConnection) -> Iterator[None]:
        """Open every session in the block on `connection`, each inside a savepoint of its transaction."""
        options = self._options
        self._options = {**options, "bind": connection, "join_transaction_mode": "create_savepoint"}
        try:
            yield
        finally:
            self._options = options

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[AsyncSession]:
        """Commit at the end of the block, roll back if it raises, and give the connection back either way."""
        work = AsyncWork(self.open())
        try:
            yield work.session
        except BaseException:
            await to_the_end(work.abandon())
            raise
        await to_the_end(work.end(200))


class SyncSessions:
    """Makes the synchronous sessions of one engine; see `Sessions`."""

    def __init__(self, maker: sessionmaker[Session]) -> None:
        self._maker = maker
        self._options: dict[str, Any] = {}
        # A semaphore belongs to one event loop.
        self._places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        event.listen(maker.class_, "after_transaction_create", _refuse_after_end)
        event.listen(maker.class_, "after_begin", _note_connection)

    @property
    def engine(self) -> Engine:
        """Return the engine the sessions use."""
        engine: Engine = self._maker.kw["bind"]
        return engine

    @classmethod
    def of(cls, engine: Engine, session_class: type[Session] = Session) -> SyncSessions:
        """Make sessions of `session_class` whose objects stay readable after a commit."""
        return cls(sessionmaker(engine, class_=session_class, expire_on_commit=False))

    def open(self) -> Session:
        """Return a new session, which takes a connection with its first statement."""
        session = self._maker(**self._options)
        session.info[_OWNER] = current()
        return session

    async def admitted(self) -> Callable[[], None]:
        """Wait until the pool has a connection to spare for one more request; return what gives the place back.

        Plain functions would wait for it in their threads. Those are fewer than requests, and a request that holds
        a connection needs one more to serialize its response: with all of them waiting, nobody would go on.

        Raises `PoolTimeoutError` after the pool's timeout.
        """
        pool = self.engine.pool
        if (capacity := capacity_of(pool)) is None:
            return lambda: None
        assert isinstance(pool, FairPool | QueuePool)
        places = self._places.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(capacity))
        try:
            async with asyncio.timeout(pool.timeout()):
                await places.acquire()
        except TimeoutError:
            raise PoolTimeoutError(
                f"all {capacity} connections of the pool are in use, and none came back within {pool.timeout():g} s", 1
            ) from None
        return places.release

    @contextlib.contextmanager
    def bound_to(self, connection: Connection) -> Iterator[None]:
        """Open every session in the block on `connection`, each inside a savepoint of its transaction."""
        options = self._options
        self._options = {"bind": connection, "join_transaction_mode": "create_savepoint"}
        try:
            yield
        finally:
            self._options = options

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Session]:
        """Commit at the end of the block, roll back if it raises, and give the connection back either way."""
        with self.open() as session:
            yield session
            session.commit()


def _get(session: Session, class_: Any, ident: Any, **options: Any) -> Any:
    """Do what `Session.get` does; where that is fetching a row and nothing else, past the ORM's loading."""
    # With an empty dictionary for an option, a lock is asked for.
    is_plain = type(ident) in _KEYS and options.get("with_for_update") in (None, False) and not any(options.values())
    if is_plain and (entity := entity_of(class_)) is not None and _takes_rows(session, class_):
        engine = session.get_bind(class_)
        plain = direct.of(engine, entity.statement) if isinstance(engine, Engine) else None
        if plain is not None:
            assert isinstance(engine, Engine)
            rows = await_only(direct.send(engine, plain, {KEY: ident}))
            return make(entity, class_, rows[0], session) if rows else None
    return Session.get(session, class_, ident, **options)


def _takes_rows(session: Session, class_: type) -> bool:
    """Say whether nobody would learn that the session had sent a statement for an entity, and has got it."""
    heard = _heard(session)
    return (
        _is_untouched(session)
        and adds_nothing(session, class_)
        and not heard.before_attach
        and not heard.after_attach
        and not heard.detached_to_persistent
        and not heard.loaded_as_persistent
    )


def _refuse_after_end(session: Session, transaction: SessionTransaction) -> None:
    if _ENDED in session.info:
        transaction.close()
        raise SessionEndedError(
            "this request's session ended when its response began, and its connection is already serving "
            "others. Where work goes on after that (background tasks, streams, tasks of your own) take "
            "`sessions: SessionFactoryDep` and open one there: `async with sessions() as db: ...`"
        )


def _note_connection(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    session.info.setdefault(_CONNECTIONS, []).append(connection)
    lend(connection, session.info.get(_OWNER))


def _ends_without_waiting(session: Session) -> bool:
    """Say whether committing and closing a session would ask the database for nothing and run no code of a team's."""
    return (
        not session.new
        and not session.dirty
        and not session.deleted
        and not _heard(session).before_commit
        and not _heard(session).after_commit
        and all(map(_returns_without_waiting, session.info.get(_CONNECTIONS, ())))
    )


def _returns_without_waiting(connection: Connection) -> bool:
    return connection.closed or (
        not connection.invalidated and returns_without_waiting(connection.engine, connection.connection)
    )


class AsyncWork:
    """An async session, and when what it did is kept. `end` and `abandon` act once, whichever comes first."""

    def __init__(self, session: AsyncSession, commit_on: CommitOn = successful) -> None:
        self.session = session
        self._commit_on = commit_on
        self._over = False

    def settle(self, status: int) -> bool:
        """Do what `end` would, where that waits for nothing, as after plain reads; say whether it was done."""
        session = self.session.sync_session
        if self._over or (session.in_transaction() and not _ends_without_waiting(session)):
            return False
        self._over = True
        session.info[_ENDED] = True
        session.close()
        return True

    async def end(self, status: int) -> None:
        """Commit or roll back as the status asks; raises what the commit raises, with nothing kept.

        Raises `OutcomeUnknownError` where it is not answered within two seconds of the request's deadline.
        """
        if self._over:
            return
        self._over = True
        try:
            if self.session.in_transaction() and self._commit_on(status):
                await self._commit()
        finally:
            await self._close()

    async def _commit(self) -> None:
        limit = asyncio.timeout(_time_left())
        try:
            async with limit:
                await self.session.commit()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise OutcomeUnknownError(
                "the database has not answered a COMMIT: what this request wrote may be there or not; look, or send it "
                "again where that does no harm"
            ) from error

    async def abandon(self) -> None:
        """Roll back and give the connection back."""
        if not self._over:
            self._over = True
            await self._close()

    async def _close(self) -> None:
        self.session.sync_session.info[_ENDED] = True
        if not self.session.in_transaction():
            # There is no connection to give back, so this touches no socket.
            self.session.sync_session.close()
            return
        try:
            await self.session.close()
        except Exception:
            logger.exception("a session could not be closed cleanly; its connection is discarded")


class SyncWork:
    """A synchronous session of a request, ended in threads that no endpoint can keep busy.

    leave: gives back the request's place at the pool (`SyncSessions.admitted`).
    """

    def __init__(self, session: Session, commit_on: CommitOn, leave: Callable[[], None]) -> None:
        self.session = session
        self._commit_on = commit_on
        self._leave = leave
        self._over = False
        # Nobody can cancel what waits in a thread.
        left = _time_left()
        self._hanging_up = None if left is None else asyncio.get_running_loop().call_later(left, self._hang_up)

    def _hang_up(self) -> None:
        for connection in self.session.info.get(_CONNECTIONS, ()):
            if not connection.closed and not connection.invalidated:
                hang_up(connection.connection.driver_connection)

    def settle(self, status: int) -> bool:
        """Threads end it."""
        return False

    async def end(self, status: int) -> None:
        """Commit or roll back as the status asks; raises what the commit raises, with nothing kept."""
        if not self._over:
            self._over = True
            await self._finish(self._commit_on(status))

    async def abandon(self) -> None:
        """Roll back and give the connection back."""
        if not self._over:
            self._over = True
            await self._finish(commit=False)

    async def _finish(self, commit: bool) -> None:
        try:
            if self.session.in_transaction():
                await to_thread.run_sync(self._close, commit, limiter=_ending_threads())
            else:
                self.session.info[_ENDED] = True
                self.session.close()
        finally:
            if self._hanging_up is not None:
                self._hanging_up.cancel()
            self._leave()

    def _close(self, commit: bool) -> None:
        try:
            if commit:
                self.session.commit()
        finally:
            self.session.info[_ENDED] = True
            try:
                while not self._is_closed():
                    time.sleep(_POLL)
            except Exception:
                logger.exception("a session could not be closed cleanly; its connection is discarded")

    def _is_closed(self) -> bool:
        """Close the session; say whether that was possible.

        It is not while a request's thread, which goes on where its request is cancelled, waits for a connection.
        """
        try:
            self.session.close()
        except IllegalStateChangeError:
            return False
        return True


#: Threads in which synchronous sessions end: as many as can commit at once without crowding the loop.
_ENDING_THREADS = 20
# A limiter belongs to one event loop.
_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, CapacityLimiter] = WeakKeyDictionary()


def _ending_threads() -> CapacityLimiter:
    loop = asyncio.get_running_loop()
    if loop not in _limiters:
        _limiters[loop] = CapacityLimiter(_ENDING_THREADS)
    return _limiters[loop]


async def send(session: AsyncSession, statement: Executable, parameters: Mapping[str, Any], columns: bool) -> Any:
    """Send a statement for an endpoint through its session, with everything a team hangs on that; return its result.

    columns: whether it selects columns, and `adds_nothing` allows to leave all that out. Then the result may be a
        list of rows, and the session need not have had their connection.
    """
    if columns:
        assert isinstance(statement, Select)
        engine = session.sync_session.get_bind(clause=statement)
        if isinstance(engine, Engine) and _is_untouched(session.sync_session):
            plain = direct.of(engine, statement)
            if plain is not None:
                return await direct.send(engine, plain, parameters)
        return await session.run_sync(send_sync, statement, parameters, columns)
    if _is_discouraged(session):
        options = {"prebuffer_rows": True}
        return await session.run_sync(_execute, statement, parameters, execution_options=options)
    return await session.execute(statement, parameters)


def send_sync(session: Session, statement: Executable, parameters: Mapping[str, Any], columns: bool) -> Result[Any]:
    """Send a statement through a synchronous session; see `send`."""
    if columns:
        return session.connection(bind_arguments={"clause": statement}).execute(statement, parameters)
    return _execute(session, statement, parameters)


def _execute(session: Session, /, statement: Executable, parameters: Mapping[str, Any], **options: Any) -> Result[Any]:
    execute = type(session).execute
    if _is_discouraged(session):
        execute = inspect.unwrap(execute)
    return execute(session, statement, parameters, **options)


def _is_discouraged(session: AsyncSession | Session) -> bool:
    """Say whether the session warns of `execute`, as SQLModel's do, whose `exec` returns something else."""
    return hasattr(type(session).execute, "__deprecated__")


def _is_untouched(session: Session) -> bool:
    """Say whether a session has not asked a database for anything yet, and nobody but us would learn that it had."""
    heard = _heard(session)
    return (
        (_has_no_connection(session) if session.in_transaction() else session.autobegin)
        and _ENDED not in session.info
        and _are_ours(heard.after_begin, _note_connection)
        and _are_ours(heard.after_transaction_create, _refuse_after_end)
        and not heard.before_commit
        and not heard.after_commit
        and not heard.after_rollback
        and not heard.after_soft_rollback
        and not heard.after_transaction_end
    )


def _has_no_connection(session: Session) -> bool:
    """Say whether a session that has begun has got no further, as with what was made of a row; sure of ours alone."""
    is_ours = bool(_heard(session).after_begin)
    return is_ours and _CONNECTIONS not in session.info and not session.in_nested_transaction()


def _heard(session: Session) -> Any:
    """Return who listens to a session. It has no list of its own until it is asked for one, which is dear."""
    if "dispatch" in vars(session):
        return session.dispatch
    return getattr(type(session), _HEARD, None) or session.dispatch


def _are_ours(listeners: Iterable[Any], ours: Callable[..., None]) -> bool:
    return all(each is ours for each in listeners)


def adds_nothing(session: Session, class_: type) -> bool:
    """Say whether reading rows of `class_` through the session is no more than sending the statement.

    It is more where the session's class or its listeners take part, where it has options, where changes wait to be
    flushed, and where it holds instances of the class, whose attributes it would not read again.
    """
    return (
        _is_plain(session)
        # What is dirty is held.
        and (not (held := session.identity_map.keys()) or _holds_nothing_of(session, held, class_))
    )


def _is_plain(session: Session) -> bool:
    """Say whether the session leaves statements as they are, and has nothing but changes to flush before them."""
    kind = type(session)
    return (
        kind.get_bind is Session.get_bind
        and (kind.execute is Session.execute or inspect.unwrap(kind.execute) is Session.execute)
        and not _heard(session).do_orm_execute
        and not getattr(session, "execution_options", None)
        and not session.new
        and not session.deleted
    )


def sees_what_all_see(session: Session, engine: Engine) -> bool:
    """Say whether a plain SELECT through the session gives what it would give through any other of this engine.

    It may give something else where somebody has a say in what is sent, and once a transaction has begun: that may have
    written, may be above READ COMMITTED, or may have set what row-level security goes by.
    """
    heard = _heard(session)
    return (
        direct.is_ours_alone(engine)
        and _is_plain(session)
        and not session.dirty
        and _are_ours(heard.after_begin, _note_connection)
        and _are_ours(heard.after_transaction_create, _refuse_after_end)
        and (not session.in_transaction() or (bool(heard.after_begin) and _has_only_read(session)))
    )


def _has_only_read(session: Session) -> bool:
    return not any(
        not connection.closed and (has_begun(connection) or connection.get_execution_options())
        for connection in session.info.get(_CONNECTIONS, ())
    )


def _holds_nothing_of(session: Session, held: Iterable[Any], class_: type) -> bool:
    return not session.dirty and not any(issubclass(key[0], class_) for key in held)
