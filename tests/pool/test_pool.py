"""`FairPool` on real servers: async engines of three drivers, and threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
import sqlalchemy
from fastapi import FastAPI
from pool.storm import make, one, pool_of, storm
from sqlalchemy import Engine, event, exc, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from support import call, eventually, outside

from overdrive import FairPool, Overdrive, PoolTimeoutError, SessionDep, Settings
from overdrive.errors import ConfigurationError
from overdrive.pool.closing import close
from overdrive.pool.housekeeping import Housekeeper

pytestmark = pytest.mark.anyio

END_ALL = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fair'")


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = make(url)
    yield engine
    await engine.dispose()


@pytest.fixture(params=["asyncpg", "psycopg"])
def server_url(request: pytest.FixtureRequest, postgres_database: str) -> str:
    return postgres_database.replace("asyncpg", request.param)


# Async


async def test_connections_are_shared_and_no_more_are_opened_than_there_may_be(engine: AsyncEngine) -> None:
    assert await asyncio.gather(*(one(engine) for _ in range(50))) == [1] * 50
    seen = pool_of(engine).statistics
    assert seen.used == seen.connecting == seen.pending_requests == seen.timeouts == 0
    assert seen.idle == seen.created == 3
    assert seen.waits > 0
    assert "3 idle" in pool_of(engine).status()


async def test_who_waits_is_served_in_turn_and_before_who_had_one(engine: AsyncEngine) -> None:
    held = [await engine.connect() for _ in range(3)]
    served: list[int] = []

    async def waiter(number: int) -> None:
        async with engine.connect():
            served.append(number)

    waiting = []
    for number in range(5):
        waiting.append(asyncio.create_task(waiter(number)))
        await asyncio.sleep(0)
    # Its own is the first to come free, and it is not the next to have it.
    await held[0].close()
    async with engine.connect():
        served.append(99)
    await asyncio.gather(*waiting)
    assert served == [0, 1, 2, 3, 4, 99]
    for connection in held[1:]:
        await connection.close()


async def test_who_is_handed_a_connection_while_it_is_cancelled_gives_it_on(url: str) -> None:
    engine = make(url, pool_size=1, max_overflow=0)
    held = await engine.connect()
    first, second = asyncio.create_task(one(engine)), asyncio.create_task(one(engine))
    await eventually(lambda: pool_of(engine).statistics.pending_requests == 2)
    await held.close()
    # Given to the first, which is cancelled before it can go on.
    assert pool_of(engine).statistics.pending_requests == 1
    first.cancel()
    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first
    assert pool_of(engine).statistics.used == 0
    await engine.dispose()


async def test_a_place_is_free_when_its_backend_is_gone_and_not_before(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = asyncio.Event()

    async def close_slowly(*connection: Any) -> None:
        await gone.wait()
        await close(*connection)

    monkeypatch.setattr("overdrive.pool.pool.close", close_slowly)
    engine = make(url, pool_size=1, max_overflow=0)
    async with engine.connect() as connection:
        await connection.invalidate()
    waiting = asyncio.create_task(one(engine))
    pool = pool_of(engine)
    await eventually(lambda: pool.statistics.pending_requests == 1)
    assert (pool.statistics.closing, pool.statistics.connecting) == (1, 0)
    gone.set()
    assert await waiting == 1
    await engine.dispose()


async def test_the_queue_ends(url: str) -> None:
    engine = make(url, pool_size=1, max_overflow=0, max_waiting=1)
    async with engine.connect():
        pool_of(engine)._timeout = 0.1
        waiting = asyncio.create_task(one(engine))
        await eventually(lambda: pool_of(engine).statistics.pending_requests == 1)
        with pytest.raises(PoolTimeoutError, match="1 are waiting for one already"):
            await one(engine)
        with pytest.raises(exc.TimeoutError, match=r"all 1 connections .* none came back in time \(pool_timeout 0.1 s"):
            await waiting
    assert pool_of(engine).statistics.timeouts == 2
    assert await one(engine) == 1
    await engine.dispose()


async def test_nobody_handles_it_and_the_client_is_told_when_to_come_again(sqlite_url: str) -> None:
    app = FastAPI()
    settings = Settings(database_url=sqlite_url, pool={"size": 1, "max_overflow": 0})  # type: ignore[arg-type]
    overdrive = Overdrive(app, settings=settings)

    @app.get("/")
    async def endpoint(db: SessionDep) -> None:
        await db.execute(select(1))

    async with overdrive.engine.connect():
        pool_of(overdrive.engine)._timeout = 0.1
        answer = await call(app, "/")
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert b"pool_timeout" in answer.body
    assert b"connections" not in answer.body
    await overdrive.aclose()


class Door:
    """Stands before a server, and lets nobody through while it is shut."""

    def __init__(self, url: str) -> None:
        self.target = make_url(url)
        self.open = False
        self.knocks = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        away = self.target.set(host="127.0.0.1", port=port)
        away = away.difference_update_query(["host", "port"])
        return away.render_as_string(hide_password=False)

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.knocks += 1
        if not self.open:
            writer.transport.abort()
            return
        host = str(self.target.query.get("host") or self.target.host)
        if host.startswith("/"):
            port = self.target.query.get("port") or self.target.port or 5432
            far_reader, far_writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            far_reader, far_writer = await asyncio.open_connection(host, self.target.port)
        both = [asyncio.create_task(pipe(reader, far_writer)), asyncio.create_task(pipe(far_reader, writer))]
        self._tasks.update(both)
        await asyncio.wait(both)


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
    writer.close()


async def test_a_failed_connect_wakes_the_next_and_all_who_wait_are_served_when_the_database_is_back(
    server_url: str,
) -> None:
    door = Door(server_url)
    async with door as url:
        engine = make(url, pool_size=2, max_overflow=0)
        callers = [asyncio.create_task(one(engine)) for _ in range(8)]
        await eventually(lambda: door.knocks >= 3)
        door.open = True
        answers = await asyncio.gather(*callers, return_exceptions=True)
        failed = [answer for answer in answers if answer != 1]
        assert 0 < len(failed) < 8
        assert not [answer for answer in failed if isinstance(answer, PoolTimeoutError)]
        assert pool_of(engine).statistics.failures == len(failed)
        assert await one(engine) == 1
        await engine.dispose()


async def test_while_the_database_refuses_a_connection_that_comes_back_is_waited_for(server_url: str) -> None:
    door = Door(server_url)
    async with door as url:
        door.open = True
        engine = make(url)
        async with engine.connect() as connection:
            await connection.execute(select(1))
            door.open = False
            knocks = door.knocks
            waiting = asyncio.create_task(one(engine))
            await eventually(lambda: door.knocks >= knocks + 2)
            assert not waiting.done()
        assert await waiting == 1
        await engine.dispose()


async def test_who_waits_for_a_connection_to_open_has_a_deadline_too(postgres_database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = make_url(postgres_database).set(host="127.0.0.1", port=silent.getsockname()[1])
        url = url.difference_update_query(["host", "port"])
        engine = make(url.render_as_string(hide_password=False), pool_timeout=0.1)
        with pytest.raises(PoolTimeoutError, match="could not be opened within pool_timeout"):
            await one(engine)
        # The attempt still has its place.
        assert pool_of(engine).statistics.connecting == 1
    await eventually(lambda: pool_of(engine).statistics.connecting == 0)
    await engine.dispose()


async def test_what_is_open_when_its_caller_is_cancelled_is_kept(server_url: str) -> None:
    engine = make(server_url)
    pool = pool_of(engine)
    caller = asyncio.create_task(one(engine))
    await asyncio.sleep(0)
    assert pool.statistics.connecting == 1
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await eventually(lambda: pool.statistics.idle == 1)
    assert await one(engine) == 1
    assert pool.statistics.created == 1
    await engine.dispose()


async def test_a_storm_of_cancellations_never_makes_more_backends_than_there_are_places(server_url: str) -> None:
    await storm(server_url, 300)


async def test_connections_that_the_server_has_ended_are_replaced(server_url: str) -> None:
    engine = make(server_url)
    watcher = outside(server_url)
    stopping = asyncio.Event()
    failures = 0

    async def work() -> None:
        nonlocal failures
        while not stopping.is_set():
            try:
                await one(engine)
            except Exception:  # of a connection that is ended while it is set up, asyncpg's own
                failures += 1

    workers = [asyncio.create_task(work()) for _ in range(10)]
    for _ in range(10):
        with watcher.connect() as connection:
            await asyncio.to_thread(connection.execute, END_ALL)
        await asyncio.sleep(0.02)
    stopping.set()
    await asyncio.gather(*workers)
    pool = pool_of(engine)
    await eventually(lambda: pool.checkedout() == pool.statistics.closing == 0)
    assert await asyncio.gather(*(one(engine) for _ in range(10))) == [1] * 10
    await engine.dispose()
    watcher.dispose()


async def test_after_idleness_a_connection_is_asked_for_an_answer_first(server_url: str) -> None:
    engine = make(server_url, validate_after=0)
    watcher = outside(server_url)
    assert await one(engine) == 1
    with watcher.connect() as connection:
        connection.execute(END_ALL)
    assert await one(engine) == 1
    assert pool_of(engine).statistics.created == 2
    await engine.dispose()
    watcher.dispose()


async def test_invalidated_connections_are_replaced_with_one_place_each(url: str) -> None:
    engine = make(url, pool_size=1, max_overflow=0)
    async with engine.connect() as connection:
        await connection.execute(select(1))
        await connection.invalidate()
        await connection.rollback()
        assert await connection.scalar(select(1)) == 1
    async with engine.connect() as connection:
        raw = await connection.get_raw_connection()
        raw.invalidate(soft=True)
    assert await one(engine) == 1
    pool = pool_of(engine)
    assert (pool.statistics.created, pool.checkedout()) == (3, 0)
    await engine.dispose()


async def test_one_beyond_the_size_stays_for_a_while(url: str) -> None:
    engine = make(url, pool_size=1, max_overflow=2, linger=0.2)
    pool = pool_of(engine)
    held = [await engine.connect() for _ in range(3)]
    for connection in held:
        await connection.close()
    assert pool.statistics.idle == 3
    await eventually(lambda: pool.statistics.idle == 1 and not pool.statistics.closing)
    await engine.dispose()


async def test_a_connection_is_replaced_at_the_end_of_its_life(url: str) -> None:
    engine = make(url, pool_recycle=0)
    assert await one(engine) == 1
    assert await one(engine) == 1
    assert pool_of(engine).statistics.created == 2
    await engine.dispose()


async def test_disposing_closes_what_is_idle_and_what_comes_back(url: str) -> None:
    engine = make(url)
    pool = pool_of(engine)
    held = await engine.connect()
    assert await one(engine) == 1
    await engine.dispose()
    assert (pool.statistics.idle, pool.statistics.used, pool.statistics.closing) == (0, 1, 0)
    await held.close()
    await eventually(lambda: pool.overflow() == -pool.size())
    assert pool_of(engine) is not pool
    assert await one(engine) == 1
    await engine.dispose()


def test_an_engine_outlives_its_event_loop(sqlite_url: str) -> None:
    engine = make(sqlite_url, pool_size=1, max_overflow=0)

    async def use() -> int:
        answer = await one(engine)
        await engine.dispose()
        return answer

    assert [asyncio.run(use()), asyncio.run(use())] == [1, 1]


async def test_taken_without_a_greenlet_only_where_nobody_would_notice(url: str) -> None:
    engine = make(url, validate_after=60)
    pool = pool_of(engine)
    assert pool.take_nowait() is None
    assert await one(engine) == 1
    taken = pool.take_nowait()
    assert taken is not None
    assert pool.take_nowait() is None
    assert pool.statistics.used == 1
    taken._reset = lambda *_args, **_options: None  # type: ignore[attr-defined]
    taken.close()
    pool._validate_after = -1
    assert pool.take_nowait() is None
    pool._validate_after = 60
    heard: list[Any] = []
    event.listen(pool, "checkout", lambda *args: heard.append(args))
    assert pool.take_nowait() is None
    assert await one(engine) == 1
    assert len(heard) == 1
    await engine.dispose()


@contextlib.contextmanager
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "overdrive"):
        yield lambda: [each.getMessage() for each in caplog.records if "has been held" in each.getMessage()]


async def test_who_keeps_a_connection_is_named_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = make(url, leak_after=0.05)
    with warnings(caplog) as named:

        async def forgetful() -> None:
            async with engine.connect():
                await eventually(lambda: bool(named()))
                await asyncio.sleep(0.6)

        await forgetful()
        [message] = named()
        assert "by no request" in message
        assert "in forgetful" in message
    await engine.dispose()


def test_numbers_that_cannot_be(sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"pool_size >= 1.*got 0, "):
        make(sqlite_url, pool_size=0)


# Threads


@pytest.fixture(params=["psycopg", "sqlite"])
def thread_url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url").replace("sqlite+aiosqlite", "sqlite"))
    return str(request.getfixturevalue("postgres_database").replace("asyncpg", "psycopg"))


@pytest.fixture
def threaded(thread_url: str) -> Iterator[Engine]:
    engine = sqlalchemy.create_engine(thread_url, poolclass=FairPool, pool_size=2, max_overflow=1, pool_timeout=10)
    yield engine
    engine.dispose()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Housekeeper:
    """The housekeeper of this test's pools alone, who looks around often."""
    monkeypatch.setattr("overdrive.pool.pool._TICK", 0.05)
    monkeypatch.setattr("overdrive.pool.pool.housekeeper", own := Housekeeper())
    return own


def one_in_thread(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(select(1)) or 0)


def test_threads_share_connections(threaded: Engine) -> None:
    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(one_in_thread, [threaded] * 300)) == [1] * 300
    seen = pool_of(threaded).statistics
    assert seen.used == seen.pending_requests == seen.timeouts == 0
    assert seen.idle == seen.created <= 3


def test_threads_are_served_in_turn(threaded: Engine) -> None:
    held = [threaded.connect() for _ in range(3)]
    served: list[int] = []

    def waiter(number: int) -> None:
        with threaded.connect():
            served.append(number)

    pool = pool_of(threaded)
    waiting = []
    for number in range(5):
        waiting.append(threading.Thread(target=waiter, args=(number,)))
        waiting[-1].start()
        while pool.statistics.pending_requests <= number:
            pass
    held[0].close()
    for thread in waiting:
        thread.join()
    assert served == [0, 1, 2, 3, 4]
    for connection in held[1:]:
        connection.close()


def test_a_thread_waits_no_longer_than_it_may(sqlite_url: str) -> None:
    url = sqlite_url.replace("+aiosqlite", "")
    engine = sqlalchemy.create_engine(url, poolclass=FairPool, pool_size=1, max_overflow=0)
    pool_of(engine)._timeout = 0.1
    with engine.connect(), pytest.raises(exc.TimeoutError, match="none came back in time"):
        one_in_thread(engine)
    assert one_in_thread(engine) == 1
    engine.dispose()


async def test_threads_have_somebody_to_keep_their_pool_in_order(thread_url: str, own: Housekeeper) -> None:
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 2, "linger": 0.1, "validate_after": 0.1}
    engine = sqlalchemy.create_engine(thread_url, poolclass=FairPool, min_idle=1, **options)
    pool, asked = pool_of(engine), Mock(wraps=engine.dialect.do_ping)
    engine.dialect.do_ping = asked  # type: ignore[method-assign]
    held = [engine.connect() for _ in range(3)]
    held[0].invalidate()
    for connection in held:
        connection.close()
    # One beyond the size goes, and who is left is asked for an answer, again and again.
    await eventually(lambda: pool.statistics.idle == 1 and asked.call_count > 2)
    held_again = engine.raw_connection()
    held_again.invalidate()
    held_again.close()
    await eventually(lambda: pool.statistics.idle == 1)
    assert pool.statistics.created == 4
    assert own.is_running
    engine.dispose()
    await eventually(lambda: not own.is_running)


async def test_what_was_silent_in_threads_is_found_dead_and_replaced(postgres_database: str, own: Housekeeper) -> None:
    url = postgres_database.replace("asyncpg", "psycopg") + "?application_name=fair"
    engine = sqlalchemy.create_engine(url, poolclass=FairPool, pool_size=2, validate_after=0.1, min_idle=2)
    pool = pool_of(engine)
    assert one_in_thread(engine) == 1
    await eventually(lambda: pool.statistics.idle == 2)
    watcher = outside(postgres_database)
    with watcher.connect() as connection:
        connection.execute(END_ALL)
    watcher.dispose()
    await eventually(lambda: pool.statistics.created >= 4 and pool.statistics.idle == 2)
    assert pool.statistics.failures == 0
    engine.dispose()


async def test_a_thread_that_keeps_a_connection_is_named(
    thread_url: str, own: Housekeeper, caplog: pytest.LogCaptureFixture
) -> None:
    engine = sqlalchemy.create_engine(thread_url, poolclass=FairPool, leak_after=0.05)
    with warnings(caplog) as named, engine.connect():
        await eventually(lambda: bool(named()))
    assert "in test_a_thread_that_keeps_a_connection_is_named" in named()[0]
    engine.dispose()


def test_threads_try_again_one_at_a_time_until_the_database_is_back(postgres_database: str) -> None:
    url = postgres_database.replace("asyncpg", "psycopg")
    engine = sqlalchemy.create_engine(url, poolclass=FairPool, pool_size=2, max_overflow=0, pool_timeout=10)
    refused = threading.Semaphore(0)
    healthy = threading.Event()

    @event.listens_for(engine, "do_connect")
    def connect(*_: Any) -> None:
        if not healthy.is_set():
            refused.release()
            raise OSError("refused")

    def caller(_: int) -> int:
        try:
            return one_in_thread(engine)
        except OSError:
            return 0

    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(caller, range(8))
        for _ in range(4):
            assert refused.acquire(timeout=10)
        healthy.set()
        assert 0 < sum(answers) <= 4
    assert pool_of(engine).statistics.timeouts == 0
    engine.dispose()


def is_served_anew(engine: Engine) -> bool:
    pool = pool_of(engine)
    fresh = pool.statistics.idle == 0 and one_in_thread(engine) == 1
    pool._timeout = 0.1
    held = [engine.connect() for _ in range(3)]
    try:
        engine.connect()
    except PoolTimeoutError:
        return fresh and bool(held)
    return False


# Python 3.12 and later warn of the parent's threads, which the child does without.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_connections_of_its_own(threaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tick comes before anybody has waited for too long.
    monkeypatch.setattr("overdrive.pool.pool._TICK", 0.05)
    assert one_in_thread(threaded) == 1
    child = os.fork()
    if not child:
        # Its end, where it would wait for ever.
        signal.alarm(20)
        os._exit(0 if is_served_anew(threaded) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    # Had the child closed it, the server would have gone.
    assert one_in_thread(threaded) == 1
    assert pool_of(threaded).statistics.created == 1


def test_settings_reach_the_pool() -> None:
    settings = Settings(
        database_url="postgresql://h/d",
        pool={"max_waiting": 7, "linger": 3, "validate_after": 4, "leak_after": 5},  # type: ignore[arg-type]
    )
    overdrive = Overdrive(FastAPI(), settings=settings)
    for pool in (pool_of(overdrive.engine), pool_of(overdrive.sync_sessions().engine)):
        assert (pool._fair.max_waiting, pool._fair.linger, pool._validate_after) == (7, 3, 4)
        assert pool._options["leak_after"] == 5
