"""The helpers for users' tests, used as a user's tests would use them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select
from support import Item, client, names, tables

from overdrive import Overdrive, SessionDep, SyncSessionDep, cached
from overdrive.testing import (
    assert_cached,
    assert_not_cached,
    assert_queries,
    caching,
    recorded_events,
    rolled_back,
    rolled_back_sync,
)

pytestmark = pytest.mark.anyio


def served(url: str) -> tuple[FastAPI, Overdrive]:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    @app.get("/count")
    @cached(ttl=60)
    async def count(db: SessionDep) -> int | None:
        return await db.scalar(select(func.count()).select_from(Item))

    @app.post("/items")
    async def add(db: SessionDep, name: str, fail: bool = False) -> None:
        db.add(Item(name=name))
        await db.flush()
        if fail:
            raise HTTPException(409)

    @app.get("/sync-names")
    def sync_names(db: SyncSessionDep) -> list[str]:
        return list(db.scalars(select(Item.name)))

    @app.post("/sync-items")
    def sync_add(db: SyncSessionDep, name: str) -> None:
        db.add(Item(name=name))

    return app, overdrive


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    with tables(url) as engine:
        yield engine


@pytest.fixture
async def service(url: str, database: Engine) -> AsyncIterator[tuple[FastAPI, Overdrive]]:
    app, overdrive = served(url)
    yield app, overdrive
    await overdrive.aclose()


async def test_requests_see_each_other_and_nothing_stays(service: tuple[FastAPI, Overdrive], database: Engine) -> None:
    app, overdrive = service
    async with rolled_back(overdrive) as db, client(app) as http:
        db.add(Item(name="arranged"))
        await db.commit()
        assert (await http.get("/count")).json() == 1
        assert (await http.post("/items?name=posted")).status_code == 200
        assert (await http.get("/count")).json() == 2
        assert list(await db.scalars(select(Item.name).order_by(Item.id))) == ["arranged", "posted"]
    assert names(database) == []
    # Afterwards sessions are their own again.
    async with client(app) as http:
        await http.post("/items?name=kept")
    assert names(database) == ["kept"]


async def test_request_that_fails_undoes_itself_alone(service: tuple[FastAPI, Overdrive]) -> None:
    app, overdrive = service
    async with rolled_back(overdrive), client(app) as http:
        await http.post("/items?name=kept")
        assert (await http.post("/items?name=undone&fail=true")).status_code == 409
        assert (await http.get("/count")).json() == 1


async def test_invalidation_is_right_inside_the_outer_transaction(service: tuple[FastAPI, Overdrive]) -> None:
    app, overdrive = service
    with caching(overdrive):
        async with rolled_back(overdrive) as db, client(app) as http:
            assert (await http.get("/count")).json() == 0
            assert_cached(await http.get("/count"))
            await http.post("/items?name=posted")
            response = await http.get("/count")
            assert_not_cached(response)
            assert response.json() == 1
            db.add(Item(name="by the test"))
            await db.commit()
            assert (await http.get("/count")).json() == 2
        async with client(app) as http:
            response = await http.get("/count")
            assert_not_cached(response)
            assert response.json() == 0


async def test_cache_is_off_under_pytest_until_asked_for(service: tuple[FastAPI, Overdrive]) -> None:
    app, overdrive = service
    async with client(app) as http:
        await http.get("/count")
        response = await http.get("/count")
        assert_not_cached(response)
        with pytest.raises(AssertionError, match="Cache-Status: overdrive; fwd=bypass; detail=off"):
            assert_cached(response)
        with caching(overdrive):
            await http.get("/count")
            assert_cached(await http.get("/count"))
        with caching(overdrive):
            assert_not_cached(await http.get("/count"))
        assert not overdrive.cache.enabled


async def test_clock(service: tuple[FastAPI, Overdrive]) -> None:
    app, overdrive = service
    with caching(overdrive) as clock:
        async with client(app) as http:
            await http.get("/count")
            clock.tick(59)
            response = await http.get("/count")
            assert_cached(response)
            assert response.headers["age"] == "59"
            clock.tick(1)
            assert_not_cached(await http.get("/count"))


async def test_queries_are_counted_and_named(service: tuple[FastAPI, Overdrive]) -> None:
    app, _ = service
    async with client(app) as http:
        with assert_queries(max=1):
            await http.get("/count")
        with pytest.raises(AssertionError, match=r"2 statements, not 1:\nSELECT count"), assert_queries(max=1):
            await asyncio.gather(http.get("/count"), http.get("/count"))


async def test_events_are_recorded_in_order(service: tuple[FastAPI, Overdrive]) -> None:
    app, _ = service
    async with client(app) as http:
        with recorded_events() as events:
            await http.get("/count")
    assert [type(event).__name__ for event in events] == ["StatementEvent", "RequestEvent"]


def test_synchronous_sessions_and_client(url: str, database: Engine) -> None:
    app, overdrive = served(url)
    with TestClient(app) as http, rolled_back_sync(overdrive) as db:
        db.add(Item(name="arranged"))
        db.commit()
        assert http.post("/sync-items?name=posted").status_code == 200
        assert http.get("/sync-names").json() == ["arranged", "posted"]
    assert names(database) == []
