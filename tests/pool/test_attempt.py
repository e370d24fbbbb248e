"""Requests that have no more time, whose client has left, or that meet a dead connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, func, select, text
from starlette.responses import StreamingResponse
from support import Answer, Item, call, client, eventually, names, on_uvicorn, tables

from overdrive import Overdrive, SessionDep, Settings, SyncSessionDep
from overdrive.pool.pool import FairPool

pytestmark = pytest.mark.anyio

AT_WORK = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(%' AND state = 'active'")
END_ALL = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


class Service:
    """An app on PostgreSQL that counts how often an endpoint was run, and what another program sees."""

    def __init__(self, url: str, watcher: Engine, **pool: Any) -> None:
        self.app = FastAPI()
        self.watcher = watcher
        pool = {"size": 2, "max_overflow": 1, **pool}
        self.overdrive = Overdrive(self.app, settings=Settings(database_url=url, pool=pool))  # type: ignore[arg-type]
        self.runs = 0
        app = self.app

        @app.get("/sleep")
        @app.post("/sleep")
        async def sleep(db: SessionDep) -> None:
            await db.execute(text("SELECT pg_sleep(30)"))

        @app.get("/sleep-in-thread")
        def sleep_in_thread(db: SyncSessionDep) -> None:
            db.execute(text("SELECT pg_sleep(30)"))
            self.runs += 1

        @app.get("/read-in-thread")
        def read_in_thread(db: SyncSessionDep) -> None:
            db.execute(select(Item))
            self.runs += 1

        @app.get("/stream")
        async def stream(db: SessionDep) -> StreamingResponse:
            async def parts() -> AsyncIterator[bytes]:
                yield b"one "
                await asyncio.sleep(1.1)
                yield b"two"

            return StreamingResponse(parts())

        @app.get("/count")
        @app.post("/count")
        async def count(db: SessionDep) -> int:
            self.runs += 1
            return await db.scalar(select(func.count()).select_from(Item)) or 0

        @app.get("/write")
        async def write(db: SessionDep) -> None:
            self.runs += 1
            db.add(Item(name="written"))
            await db.flush()
            await asyncio.to_thread(self.end_all)
            await db.execute(select(Item))

    @property
    def pool(self) -> FairPool:
        pool = self.overdrive.engine.pool
        assert isinstance(pool, FairPool)
        return pool

    def end_all(self) -> None:
        with self.watcher.connect() as connection:
            connection.execute(END_ALL)

    async def is_quiet(self) -> None:
        await eventually(lambda: self.pool.checkedout() == self.pool.statistics.closing == 0)
        await eventually(lambda: self.at_work() == 0)

    def at_work(self) -> int:
        with self.watcher.connect() as connection:
            return int(connection.scalar(AT_WORK) or 0)


@pytest.fixture(params=["asyncpg", "psycopg"])
def url(request: pytest.FixtureRequest, postgres_url: str) -> str:
    return postgres_url.replace("asyncpg", request.param)


async def make(url: str, **pool: Any) -> AsyncIterator[Service]:
    with tables(url) as watcher:
        service = Service(url, watcher, **pool)
        yield service
        await service.overdrive.aclose()


@pytest.fixture
async def hurried(url: str) -> AsyncIterator[Service]:
    async for service in make(url, deadline=0.2, deadline_header="X-Time"):
        yield service


@pytest.fixture
async def service(url: str) -> AsyncIterator[Service]:
    async for service in make(url):
        yield service


# Deadlines


def is_late(answer: Answer) -> bool:
    return answer.status == 503 and b"deadline_exceeded" in answer.body and answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/sleep", "/sleep-in-thread"])
async def test_a_request_ends_with_its_time_and_so_does_what_the_database_does_for_it(
    hurried: Service, path: str
) -> None:
    assert is_late(await call(hurried.app, path))
    await hurried.is_quiet()
    assert hurried.runs == 0
    async with hurried.overdrive.session() as db:
        assert await db.scalar(select(func.count()).select_from(Item)) == 0


async def test_a_plain_read_in_a_thread_ends_as_well(hurried: Service) -> None:
    # The server says over the first connection what a plain read needs.
    with hurried.overdrive.sync_session() as db:
        await asyncio.to_thread(db.execute, select(Item))
    with hurried.watcher.connect() as watcher:
        watcher.execute(text("LOCK TABLE items"))
        reading = asyncio.create_task(call(hurried.app, "/read-in-thread"))
        await eventually(reading.done)
    assert is_late(await reading)
    assert hurried.runs == 0


async def test_waiting_for_a_connection_takes_of_the_time(hurried: Service) -> None:
    held = [await hurried.overdrive.engine.connect() for _ in range(3)]
    assert is_late(await call(hurried.app, "/count"))
    assert hurried.pool.statistics.pending_requests == 0
    for connection in held:
        await connection.close()


async def test_a_response_that_has_begun_comes_to_its_end(postgres_url: str) -> None:
    async for service in make(postgres_url, deadline=1):
        assert (await call(service.app, "/stream")).body == b"one two"


async def test_a_proxy_may_leave_less_time_and_never_more(hurried: Service) -> None:
    async with client(hurried.app) as http:
        for given in ("50", "99999", "soon", "-1"):
            assert (await http.get("/sleep", headers={"x-time": given})).status_code == 503


async def test_a_proxys_word_counts_where_it_is_trusted(postgres_url: str) -> None:
    async for service in make(postgres_url, deadline_header="x-time"):
        async with client(service.app) as http:
            assert (await http.get("/sleep", headers={"x-time": "100"})).status_code == 503
            assert (await http.get("/count", headers={"x-time": "soon"})).status_code == 200


# Dead connections


async def test_a_read_that_met_a_dead_connection_is_run_again(service: Service) -> None:
    assert (await call(service.app, "/count")).body == b"0"
    service.end_all()
    answer = await call(service.app, "/count")
    assert (answer.status, answer.body, answer.starts) == (200, b"0", 1)
    assert service.runs == 3
    await service.is_quiet()


async def test_what_is_not_safe_or_has_written_is_not_run_again(service: Service) -> None:
    assert (await call(service.app, "/count")).body == b"0"
    service.end_all()
    assert (await call(service.app, "/count", "POST")).status == 500
    assert service.runs == 2
    assert (await call(service.app, "/write")).status == 500
    assert service.runs == 3
    assert names(service.watcher) == []


async def test_no_more_than_a_tenth_is_run_again(service: Service) -> None:
    failed = 0
    for _ in range(14):
        assert (await call(service.app, "/count")).status == 200
        service.end_all()
        failed += (await call(service.app, "/count")).status == 500
        # The dead ones that are left.
        await service.overdrive.engine.dispose()
    # Ten were saved up, and twenty-eight requests have added one or two more.
    assert failed == 2
    assert service.runs == 28 + 12


# Clients that leave


async def test_the_query_of_a_client_that_has_left_ends(url: str) -> None:
    async for service in make(url, stop_abandoned=True):
        at_work = service.at_work
        with on_uvicorn(service.app) as address:
            for method in ("GET", "POST"):
                end = socket.create_connection(address)
                end.sendall(f"{method} /sleep HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n".encode())
                await eventually(lambda: at_work() == 1)  # noqa: B023
                end.close()
                if method == "GET":
                    await eventually(lambda: at_work() == 0)  # noqa: B023
                    assert service.pool.checkedout() == 0
            # It may have changed something.
            await asyncio.sleep(0.2)
            assert at_work() == 1
            service.end_all()
