"""Writes from outside, seen by an app: through triggers, a listener and the cache; and the commands around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from cache.service import Service, add_routes
from fastapi import FastAPI
from sqlalchemy import insert, select
from support import Base, Item, client, eventually, outside, tables

from overdrive import Overdrive, SessionDep, Settings, cached
from overdrive.pool import listener
from overdrive.pool.outside import Database, installation, keys_of, run
from overdrive.pool.triggers import Via

pytestmark = pytest.mark.anyio

DRIVERS = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
VIAS = pytest.mark.parametrize("via", ["notify", "outbox"])


def install(url: str, via: Via = "notify") -> None:
    engine = outside(url)
    with engine.begin() as connection:
        database = Database(connection)
        for sql in installation(database, database.announced(keys_of([Base.metadata])), via):
            run(connection, sql)
    engine.dispose()


@contextlib.contextmanager
def psql(url: str) -> Iterator[psycopg.Connection[Any]]:
    """What another program has."""
    with psycopg.connect(url.replace("+asyncpg", "").replace("+psycopg", ""), autocommit=True) as connection:
        yield connection


@asynccontextmanager
async def listening(url: str, redis_url: str | None = None, **cache: Any) -> AsyncIterator[Service]:
    """An app that hears, with a cached list and a cached row."""
    app = FastAPI()
    settings = Settings.load(database_url=url, redis_url=redis_url, cache={"listen": True, **cache})
    overdrive = Overdrive(app, settings=settings, cache=True)
    async with client(app) as http:
        service = Service(app, overdrive, http, outside(url))
        add_routes(service)

        @app.get("/items/{item_id}")
        @cached
        async def item(item_id: int, db: SessionDep) -> str | None:
            return await db.scalar(select(Item.name).where(Item.id == item_id))

        overdrive.enter_loop()
        await eventually(lambda: not overdrive.cache.invalidator.is_behind)
        try:
            yield service
        finally:
            await overdrive.aclose()
            service.database.dispose()


@pytest.fixture
def database(postgres_database: str) -> Iterator[str]:
    with tables(postgres_database) as engine, engine.begin() as connection:
        connection.execute(insert(Item).values([{"name": "first"}, {"name": "second"}]))
    yield postgres_database


async def changed(service: Service, path: str, before: Any) -> Any:
    """What the app answers as soon as it is something else."""
    for _ in range(250):
        if (answer := (await service.get(path)).json()) != before:
            return answer
        await asyncio.sleep(0.01)
    raise AssertionError(f"{path} is still {before}")


@DRIVERS
@VIAS
async def test_a_write_of_psql_is_seen(database: str, driver: str, via: Via) -> None:
    install(database, via)
    async with listening(database.replace("asyncpg", driver)) as service:
        assert await service.marks("/names", "/names", "/items/1", "/items/1", "/items/2", "/items/2") == (
            ["miss", "hit"] * 3
        )
        with psql(database) as connection:
            connection.execute("UPDATE items SET name = 'changed' WHERE id = 1")
            assert await changed(service, "/names", ["first", "second"]) == ["changed", "second"]
            # Only what read that row, or the table, is dropped.
            assert await service.marks("/items/1", "/items/2") == ["miss", "hit"]
            connection.execute("TRUNCATE items")
            assert await changed(service, "/names", ["changed", "second"]) == []
            await service.marks("/names")
            connection.execute("NOTIFY overdrive")
            await eventually_miss(service, "/names")


async def eventually_miss(service: Service, path: str) -> None:
    for _ in range(250):
        if await service.marks(path) == ["miss"]:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{path} is still served")


async def test_a_lost_listener_leaves_nothing_stale(database: str, store_url: str | None) -> None:
    install(database)
    async with listening(database, store_url) as service:
        assert await service.marks("/names", "/names") == ["miss", "hit"]
        with psql(database) as connection:
            # Nobody hears this.
            connection.execute("BEGIN")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE query = 'SELECT pg_backend_pid() AS pid' AND pid <> pg_backend_pid()"
            )
            connection.execute("SET LOCAL session_replication_role = replica")
            connection.execute("UPDATE items SET name = 'unheard' WHERE id = 1")
            connection.execute("COMMIT")
        assert await changed(service, "/names", ["first", "second"]) == ["unheard", "second"]
        await eventually(lambda: not service.overdrive.cache.invalidator.is_behind)
        await service.marks("/names")
        assert await service.marks("/names") == ["hit"]


async def test_nothing_is_served_while_nobody_listens(database: str, store_url: str | None) -> None:
    install(database)
    async with listening(database, store_url) as service:
        assert await service.marks("/names", "/names") == ["miss", "hit"]
        (each,) = service.overdrive.cache.invalidator.listeners
        assert isinstance(each, listener.Listener)
        await each.aclose()
        assert await service.marks("/names", "/names") == ["bypass", "bypass"]
        each.start()
        await eventually(lambda: not each.is_deaf)
        # What was kept is of before.
        assert await service.marks("/names", "/names") == ["miss", "hit"]


@pytest.fixture(params=["memory", "redis"])
def store_url(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("redis_url") if request.param == "redis" else None


async def test_an_outbox_is_read_in_the_order_of_commits(database: str) -> None:
    """A row with a lower number and an older transaction may come later, also that of a prepared transaction."""
    install(database, "outbox")
    async with listening(database) as service:
        with psql(database) as early, psql(database) as late, psql(database) as prepared:
            early.execute("BEGIN")
            early.execute("UPDATE items SET name = 'early' WHERE id = 1")
            late.execute("UPDATE items SET name = 'late' WHERE id = 2")
            await changed(service, "/items/2", "second")
            assert await service.marks("/items/1", "/items/1") == ["miss", "hit"]
            early.execute("COMMIT")
            assert await changed(service, "/items/1", "first") == "early"
            prepared.execute("BEGIN")
            prepared.execute("UPDATE items SET name = 'prepared' WHERE id = 1")
            prepared.execute("PREPARE TRANSACTION 'one'")
            late.execute("UPDATE items SET name = 'later' WHERE id = 2")
            await changed(service, "/items/2", "late")
            assert await service.marks("/items/1") == ["hit"]
            prepared.execute("COMMIT PREPARED 'one'")
            assert await changed(service, "/items/1", "early") == "prepared"


async def test_an_outbox_is_pruned(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_KEPT", 0.2)
    install(database, "outbox")
    async with listening(database):
        with psql(database) as connection:
            connection.execute("UPDATE items SET name = 'x'")
            left = connection.execute("SELECT count(*) FROM overdrive_outbox").fetchone()
            assert left == (1,)
            await eventually(lambda: connection.execute("SELECT count(*) FROM overdrive_outbox").fetchone() == (0,))
