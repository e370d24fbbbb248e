"""A database that says nothing, over a wire that swallows what is sent: nobody waits for it for ever."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from pool.storm import one, pool_of
from pool.wire import Loss, Wire, wire
from sqlalchemy import Engine, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from support import Item, call, client, eventually, names, tables

from overdrive import Overdrive, SessionDep, Settings, SyncSessionDep, create_engine, health_router
from overdrive.pool.engine import create_sync_engine
from overdrive.pool.observe import Outcome

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.pool.closing._CANCEL_TIMEOUT", 0.1)
    monkeypatch.setattr("overdrive.pool.closing._CLOSE_TIMEOUT", 0.2)
    monkeypatch.setattr("overdrive.pool.session._GRACE", 0.1)


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver_url(request: pytest.FixtureRequest, postgres_url: str) -> str:
    return postgres_url.replace("asyncpg", request.param)


@pytest.fixture
def wired(driver_url: str) -> Iterator[tuple[Wire, str]]:
    with wire(driver_url) as ends:
        yield ends


async def is_quiet(engine: AsyncEngine) -> None:
    pool = pool_of(engine)
    await eventually(lambda: pool.checkedout() == pool.statistics.closing == 0)


@pytest.mark.parametrize("fault", ["forget", "silence"])
async def test_who_gives_up_a_silent_connection_is_let_go_and_its_place_is_free(
    wired: tuple[Wire, str], fault: str
) -> None:
    between, url = wired
    engine = create_engine(url, pool_size=2, max_overflow=0)
    await asyncio.gather(one(engine), one(engine))
    # Where new connections are silent, too, nothing that would cancel the statement arrives.
    getattr(between, fault)()
    waiting = {asyncio.create_task(one(engine)) for _ in range(2)}
    await asyncio.sleep(0.1)
    for task in waiting:
        task.cancel()
    _, left = await asyncio.wait(waiting, timeout=3)
    assert not left
    between.is_silent = False
    assert await asyncio.wait_for(one(engine), 3) == 1
    await is_quiet(engine)
    await engine.dispose()


async def test_a_place_is_not_lost_to_a_server_that_falls_silent_while_it_is_connected_to(
    driver_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_engine(driver_url, pool_size=1, max_overflow=0, pool_timeout=0.5)
    # What is first said on a connection is not heard any more.
    monkeypatch.setattr("overdrive.pool.engine._have_client_watched", lambda _: asyncio.sleep(30))
    with pytest.raises(Exception, match="could not be opened within"):
        await one(engine)
    monkeypatch.undo()
    assert await one(engine) == 1
    await engine.dispose()


async def test_kernel_is_told_to_give_up_silence(driver_url: str) -> None:
    engine, other = create_engine(driver_url), create_sync_engine(driver_url)
    expected = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_USER_TIMEOUT": 3000}

    def options(driver: Any) -> dict[str, int]:
        number = driver.fileno() if hasattr(driver, "fileno") else driver._transport.get_extra_info("socket").fileno()
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as end:
            return {
                name: end.getsockopt(
                    socket.SOL_SOCKET if name.startswith("SO") else socket.IPPROTO_TCP, getattr(socket, name)
                )
                for name in expected
            }

    async with engine.connect() as connection:
        assert options((await connection.get_raw_connection()).driver_connection) == expected
    with other.connect() as connection_of_thread:
        assert options(connection_of_thread.connection.driver_connection) == expected
    await engine.dispose()
    other.dispose()


class Told:
    """What is told of the ends of commits."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    async def before(self, writes: frozenset[str], sql: str) -> None:
        pass

    async def after(self, token: None, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


class Service:
    """An app that writes, at the other end of a wire."""

    def __init__(self, url: str, **pool: Any) -> None:
        self.app = FastAPI()
        pool = {"size": 2, "max_overflow": 0, "deadline": 1, **pool}
        settings = Settings(database_url=url, pool=pool, admission={"away_after": 0})  # type: ignore[arg-type]
        self.overdrive = Overdrive(self.app, settings=settings)
        self.app.include_router(health_router)
        self.runs = 0
        self.told = Told()
        self.overdrive.sync_sessions()
        for observation in self.overdrive._observations:
            observation.observers = [self.told]

        @self.app.get("/async")
        async def write(db: SessionDep) -> None:
            self.runs += 1
            db.add(Item(name="written"))

        @self.app.get("/sync")
        def write_in_thread(db: SyncSessionDep) -> None:
            self.runs += 1
            db.add(Item(name="written"))

        @self.app.get("/read")
        async def read(db: SessionDep) -> int:
            return len((await db.scalars(select(Item))).all())

        @self.app.get("/read-in-thread")
        def read_in_thread(db: SyncSessionDep) -> int:
            return len(db.scalars(select(Item)).all())

    @property
    def checked_out(self) -> int:
        engines = self.overdrive.engine, self.overdrive.sync_sessions().engine
        return sum(pool_of(engine).checkedout() + pool_of(engine).statistics.closing for engine in engines)


@pytest.fixture
def database(postgres_url: str) -> Iterator[Engine]:
    with tables(postgres_url) as engine:
        yield engine


# Plain functions have psycopg, whatever the rest has.
@pytest.mark.parametrize(
    ("driver_url", "path"),
    [("asyncpg", "/async"), ("psycopg", "/async"), ("psycopg", "/sync")],
    indirect=["driver_url"],
)
@pytest.mark.parametrize("loss", ["silent", "closed"])
async def test_a_commit_without_an_answer_is_no_success_and_is_not_sent_again(
    wired: tuple[Wire, str], database: Engine, path: str, loss: Loss
) -> None:
    between, url = wired
    service = Service(url)
    assert (await call(service.app, path)).status == 200
    between.loses_commits = loss
    answer = await asyncio.wait_for(call(service.app, path), 5)
    assert (answer.status, answer.starts) == (500, 1)
    assert (service.runs, between.commits) == (2, 2)
    # It was kept, which nobody here can know.
    assert service.told.outcomes == [Outcome.COMMITTED, Outcome.UNKNOWN]
    between.loses_commits = None
    await eventually(lambda: names(database) == ["written"] * 2)
    assert (await call(service.app, path)).status == 200
    await eventually(lambda: service.checked_out == 0)
    await service.overdrive.aclose()


@pytest.mark.parametrize(
    ("driver_url", "path"),
    [("asyncpg", "/read"), ("psycopg", "/read-in-thread")],
    indirect=["driver_url"],
)
async def test_a_deadline_holds_where_the_database_is_silent(
    wired: tuple[Wire, str], database: Engine, path: str
) -> None:
    between, url = wired
    service = Service(url)
    assert (await call(service.app, path)).status == 200
    between.silence()
    assert (await asyncio.wait_for(call(service.app, path), 5)).status == 503
    between.is_silent = False
    await eventually(lambda: service.checked_out == 0)
    assert (await call(service.app, path)).status == 200
    await service.overdrive.aclose()


async def test_ready_tells_of_a_silent_database_with_all_connections_out_and_of_its_return(
    wired: tuple[Wire, str], database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.health._PATIENCE", 0.1)
    monkeypatch.setattr("overdrive.health._GOOD_FOR", 0.1)
    between, url = wired
    service = Service(url, deadline=None)
    engine = service.overdrive.engine

    async def status(http: Any, expected: int) -> None:
        for _ in range(100):
            if (await http.get("/ready")).status_code == expected:
                return
            await asyncio.sleep(0.03)
        raise AssertionError(f"/ready did not answer {expected}")

    async with client(service.app) as http:
        assert (await http.get("/ready")).status_code == 200
        await asyncio.gather(*(http.get("/read") for _ in range(2)))
        between.silence()
        held = [asyncio.create_task(one(engine)) for _ in range(2)]
        await status(http, 503)
        assert pool_of(engine).checkedout() == 2
        for task in held:
            task.cancel()
        await asyncio.wait(held)
        between.is_silent = False
        await status(http, 200)
        # All are out, and none of them owes an answer.
        connections = [await engine.connect() for _ in range(2)]
        for connection in connections:
            await connection.execute(text("SELECT 1"))
        await asyncio.sleep(0.3)
        await status(http, 200)
        for connection in connections:
            await connection.close()
    asking = service.overdrive.readiness._asking
    assert asking is not None
    await asyncio.wait([asking])
    await service.overdrive.aclose()
