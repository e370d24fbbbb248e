"""Cancellation: no acknowledged commit is lost, no connection leaks, no query goes on without its client."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import anyio
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Engine, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item, call, eventually, names, outside, tables

from overdrive import Overdrive, RequestSession, SessionDep, SessionFactoryDep, Settings, SyncSessionDep
from overdrive.pool.observe import Outcome

pytestmark = pytest.mark.anyio

ACTIVE = text(
    "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep(%'"
    " AND pid <> pg_backend_pid()"
)


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    with tables(url) as engine:
        yield engine


def small_pool(url: str) -> Settings:
    return Settings(database_url=url, pool={"size": 3, "max_overflow": 0, "timeout": 10})  # type: ignore[arg-type]


def checked_out(overdrive: Overdrive) -> int:
    pool: Any = overdrive.engine.sync_engine.pool
    return int(pool.checkedout())


@contextmanager
def unread_outcomes_allowed() -> Iterator[None]:
    """asyncpg leaves the outcome of an interrupted TLS negotiation unread, which asyncio reports."""
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _loop, _report: None)
    try:
        yield
        gc.collect()
    finally:
        loop.set_exception_handler(handler)


@pytest.mark.parametrize(
    ("driver", "watching"),
    [("asyncpg", True), ("asyncpg", False), ("psycopg", True)],
    ids=["asyncpg", "asyncpg-unwatched", "psycopg"],
)
@pytest.mark.parametrize("style", ["native", "anyio"])
async def test_twenty_cancelled_queries_leave_no_backends_behind(
    postgres_url: str, driver: str, style: str, watching: bool
) -> None:
    """The cancel request of asyncpg is enough by itself, on a server that does not watch its clients."""
    app = FastAPI()
    overdrive = Overdrive(app, settings=small_pool(postgres_url.replace("asyncpg", driver)))

    @app.get("/slow")
    async def slow(db: SessionDep) -> None:
        if not watching:
            await db.execute(text("SET client_connection_check_interval = 0"))
        await db.execute(select(func.pg_sleep(30)))

    async def cancelled() -> None:
        if style == "native":
            task = asyncio.create_task(call(app, "/slow"))
            await asyncio.sleep(0.15)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with anyio.move_on_after(0.15):
                await call(app, "/slow")

    watcher = outside(postgres_url)

    def active() -> int:
        with watcher.connect() as connection:
            return int(connection.scalar(ACTIVE) or 0)

    with unread_outcomes_allowed():
        for _ in range(5):
            await asyncio.gather(*(cancelled() for _ in range(4)))
        await eventually(lambda: active() <= 3, seconds=1)
        await eventually(lambda: active() == 0)
        await eventually(lambda: checked_out(overdrive) == 0)
    watcher.dispose()
    await overdrive.aclose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_server_watches_its_clients(postgres_url: str, driver: str) -> None:
    overdrive = Overdrive(FastAPI(), database_url=postgres_url.replace("asyncpg", driver))
    async with overdrive.session() as db:
        assert await db.scalar(text("SHOW client_connection_check_interval")) == "100ms"
    await overdrive.aclose()


class Gate:
    """Holds a commit up, just before the server is asked or just after it has answered."""

    def __init__(self, overdrive: Overdrive, where: str) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        self.outcomes: list[Outcome] = []
        self.where = where
        for observation in overdrive._observations:
            observation.observers = [self]

    async def before(self, writes: frozenset[str], sql: str) -> None:
        if self.where == "before":
            await self._wait()

    async def after(self, token: None, outcome: Outcome) -> None:
        if self.where == "after":
            await self._wait()
        self.outcomes.append(outcome)

    async def _wait(self) -> None:
        self.reached.set()
        await self.opened.wait()


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("style", ["native", "twice", "anyio"])
async def test_request_cancelled_while_it_commits_commits(url: str, database: Engine, where: str, style: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)
    gate = Gate(overdrive, where)

    @app.post("/")
    async def endpoint(db: SessionDep) -> None:
        db.add(Item(name="kept"))

    if style == "anyio":
        async with anyio.create_task_group() as group:
            group.start_soon(call, app, "/", "POST")
            await gate.reached.wait()
            group.cancel_scope.cancel()
    else:
        task = asyncio.create_task(call(app, "/", "POST"))
        await gate.reached.wait()
        for _ in range(2 if style == "twice" else 1):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.opened.set()
    await eventually(lambda: gate.outcomes == [Outcome.COMMITTED])
    await eventually(lambda: checked_out(overdrive) == 0)
    assert names(database) == ["kept"]
    await overdrive.aclose()


async def test_cancelled_endpoint_rolls_back_and_gives_its_connection_back(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)
    written = asyncio.Event()

    @app.post("/")
    async def endpoint(db: SessionDep) -> None:
        db.add(Item(name="lost"))
        await db.flush()
        written.set()
        await asyncio.sleep(30)

    task = asyncio.create_task(call(app, "/", "POST"))
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: checked_out(overdrive) == 0)
    assert names(database) == []
    await overdrive.aclose()


async def test_cancelled_block_of_a_factory_rolls_back(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)
    written = asyncio.Event()

    async def work() -> None:
        async with overdrive.session() as db:
            db.add(Item(name="lost"))
            await db.flush()
            written.set()
            await asyncio.sleep(30)

    task = asyncio.create_task(work())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: checked_out(overdrive) == 0)
    assert names(database) == []
    await overdrive.aclose()


async def test_a_thread_that_waits_when_its_request_is_cancelled_leaves_no_connection(
    url: str, database: Engine
) -> None:
    app = FastAPI()
    settings = Settings(database_url=url, pool={"size": 1, "max_overflow": 0})  # type: ignore[arg-type]
    overdrive = Overdrive(app, settings=settings)
    engine = overdrive.sync_sessions().engine
    pool: Any = engine.pool
    with engine.connect():
        pass

    @app.get("/")
    def endpoint(db: SyncSessionDep) -> None:
        db.execute(select(Item))

    held = await asyncio.to_thread(engine.connect)
    task = asyncio.create_task(call(app, "/"))
    await eventually(lambda: pool.statistics.pending_requests == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.1)
    held.close()
    await eventually(lambda: pool.statistics.pending_requests == pool.checkedout() == 0)
    with engine.connect() as connection:
        assert connection.scalar(select(1)) == 1
    await overdrive.aclose()


async def test_many_plain_functions_on_a_small_pool_do_not_deadlock(url: str, database: Engine) -> None:
    """Were forty endpoint threads to wait for two connections, those that have one would find none to go on in."""
    app = FastAPI()
    patient = {"pool": {"size": 2, "max_overflow": 0, "timeout": 20}, "admission": {"max_wait": 20}}
    settings = Settings(database_url=url, **patient)  # type: ignore[arg-type]
    overdrive = Overdrive(app, settings=settings)
    inside = threading.Semaphore(0)

    @app.post("/")
    def endpoint(db: SyncSessionDep, name: str) -> int:
        inside.release()
        db.add(Item(name=name))
        db.flush()
        return 1

    answers = await asyncio.gather(*(call(app, f"/?name={n}", "POST") for n in range(60)))
    assert {answer.status for answer in answers} == {200}
    assert len(names(database)) == 60
    await overdrive.aclose()


async def test_two_sessions_of_a_request_both_end(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    @app.get("/")
    async def endpoint(
        one: SessionDep, two: Annotated[AsyncSession, Depends(RequestSession())], sessions: SessionFactoryDep
    ) -> bool:
        await one.execute(select(Item))
        await two.execute(select(Item))
        return one is not two

    seen: list[int] = []
    answer = await call(app, "/", at_start=lambda: seen.append(checked_out(overdrive)))
    assert (answer.body, seen) == (b"true", [0])
    await overdrive.aclose()
