"""`overdrive doctor`, second chapter: what it says of how an app is set up."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Request
from redis import Redis
from sqlalchemy import create_engine as sync_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from overdrive import (
    CursorPage,
    LogHandler,
    Overdrive,
    SessionDep,
    Settings,
    add_pagination,
    cached,
    create_engine,
    get_session,
)
from overdrive.diagnosis import Setup, advice_on, set_up
from overdrive.errors import ConfigurationError

pytestmark = pytest.mark.anyio


class Passing:
    def __init__(self, app: Any) -> None:
        self.app = app


async def of(app: FastAPI, **options: Any) -> Setup:
    overdrive = Overdrive(app, **options)
    try:
        return await set_up(app)
    finally:
        await overdrive.aclose()


def served() -> FastAPI:
    app = FastAPI()

    @app.get("/feed", response_model=CursorPage[int])
    async def feed(db: SessionDep) -> None: ...

    @app.get("/one")
    @cached
    async def one(db: SessionDep) -> None: ...

    return app


async def test_what_there_is(sqlite_url: str) -> None:
    app = served()
    app.add_middleware(Passing)
    setup = await of(app, database_url=sqlite_url)
    assert setup.layers.index("Observer") < setup.layers.index("Passing") < setup.layers.index("RequestPath")
    assert setup.routes == {
        "GET /feed": ["page by cursor", "async session"],
        "GET /one": ["async session", "cached"],
    }
    assert setup.findings == []
    assert setup.as_text().splitlines()[1:] == [
        "route   GET /feed  page by cursor; async session",
        "route   GET /one   async session; cached",
    ]


async def test_without_the_rest_of_it() -> None:
    setup = await set_up(add_pagination(served()))
    assert setup.routes["GET /feed"] == ["page by cursor", "async session"]
    with pytest.raises(ConfigurationError, match="add_pagination"):
        await set_up(FastAPI())


async def test_a_route_that_is_not_cached(sqlite_url: str) -> None:
    app = served()

    @app.get("/whole")
    @cached
    async def whole(request: Request) -> None: ...

    setup = await of(app, database_url=sqlite_url)
    (finding,) = setup.findings
    assert finding.startswith("GET /whole is marked @cached and is not cached: whole() takes the whole request")


async def test_sessions_that_end_too_late(sqlite_url: str) -> None:
    app, made = served(), async_sessionmaker()
    engine = sync_engine("sqlite://")

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with made() as session:
            yield session

    def get_sync_db() -> Iterator[Session]:
        with Session(engine) as session:
            yield session

    async def get_lock() -> AsyncIterator[None]:
        yield

    for number in range(4):
        app.get(f"/late/{number}", dependencies=[Depends(get_db), Depends(get_lock)])(len)
    app.get("/sync", dependencies=[Depends(get_sync_db)])(len)
    assert (await of(app, database_url=sqlite_url)).findings == [
        "get_db() ends its sessions after the response was sent, on GET /late/0, GET /late/1, GET /late/2 and 1 more: "
        "app.dependency_overrides[get_db] = overdrive.get_session",
        "get_sync_db() ends its sessions after the response was sent, on GET /sync: "
        "app.dependency_overrides[get_sync_db] = overdrive.get_sync_session",
    ]
    app.dependency_overrides = {get_db: get_session, get_sync_db: get_session}
    assert (await set_up(app)).findings == []
    engine.dispose()


async def test_several_workers(sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    alone, signed = (await of(served(), database_url=sqlite_url)).findings
    assert "on GET /one: OVERDRIVE_REDIS_URL=" in alone
    assert "on GET /feed: OVERDRIVE_PAGINATION__SECRETS=" in signed
    pagination: Any = {"secrets": ["0123456789abcdef"]}
    settings = Settings(database_url=sqlite_url, redis_url=redis_url, pagination=pagination)
    assert (await of(served(), settings=settings)).findings == []


async def test_pools_that_do_not_fit(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = await of(served(), engine=create_engine(postgres_url, pool_size=3, max_overflow=4))
    (size,) = setup.sizes
    assert size.startswith("default: 1 worker x 7 connections = 7 of ")
    assert setup.findings == []
    setup = await of(served(), engine=create_engine(postgres_url, pool_size=1000, max_overflow=0))
    (finding,) = setup.findings
    assert "may want 1000 connections of " in finding
    assert "OVERDRIVE_POOL__SIZE" in finding


async def test_a_database_that_is_away() -> None:
    (finding,) = (await of(served(), database_url="postgresql://127.0.0.1:1/none")).findings
    assert finding.startswith("the database of default cannot be asked for its limits: ")


# Redis


async def test_redis_as_it_should_be(sqlite_url: str, redis_url: str) -> None:
    assert (await of(served(), database_url=sqlite_url, redis_url=redis_url)).findings == []


async def test_redis_that_may_not_tell_of_writes(sqlite_url: str, redis_url: str) -> None:
    with Redis.from_url(redis_url) as server:
        server.acl_setuser("silent", enabled=True, passwords=["+pass"], commands=["+@all", "-subscribe"], keys=["*"])
        try:
            url = redis_url.replace("redis://", "redis://silent:pass@")
            (finding,) = (await of(served(), database_url=sqlite_url, redis_url=url)).findings
        finally:
            server.acl_deluser("silent")
    assert finding.startswith("Redis may not tell of writes")


async def test_redis_that_is_away(sqlite_url: str) -> None:
    (finding,) = (await of(served(), database_url=sqlite_url, redis_url="redis://127.0.0.1:1")).findings
    assert finding.startswith("Redis cannot be asked: ")


GOOD = {"redis_version": "7.2.4", "maxmemory": "0", "maxmemory_policy": "noeviction", "pushes": "yes"}


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ({}, ""),
        ({"redis_version": "6.2.14"}, ""),
        ({"redis_version": "6.0.20"}, "upgrade"),
        ({"maxmemory": "1000"}, "maxmemory-policy allkeys-lru"),
        ({"maxmemory": "1000", "maxmemory_policy": "volatile-lru"}, ""),
        ({"maxmemory": "1000", "maxmemory_policy": "allkeys-lfu"}, ""),
        ({"maxmemory": "1000", "maxmemory_policy": "allkeys-random"}, "maxmemory-policy allkeys-lru"),
        ({"pushes": "NOPERM"}, "NOPERM"),
    ],
)
def test_what_is_good_for_redis(said: dict[str, str], advice: str) -> None:
    found = list(advice_on(GOOD | said))
    assert len(found) == bool(advice)
    assert not found or advice in found[0]


# Loggers


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("shop")
    yield logger
    logger.handlers.clear()
    logger.disabled, logger.propagate = False, True


async def findings(sqlite_url: str) -> list[str]:
    return (await of(served(), database_url=sqlite_url)).findings


async def test_loggers_that_configuration_has_disabled(sqlite_url: str, logger: logging.Logger) -> None:
    logger.disabled = True
    (finding,) = await findings(sqlite_url)
    assert finding.startswith("the loggers shop are disabled")
    assert finding.endswith("disable_existing_loggers=False")


async def test_lines_that_are_written_twice(sqlite_url: str, logger: logging.Logger, tmp_path: Path) -> None:
    root = LogHandler(tmp_path / "log")
    logging.root.addHandler(root)
    try:
        logger.addHandler(logging.FileHandler(tmp_path / "log", delay=True))
        (finding,) = await findings(sqlite_url)
        assert finding.startswith(f"what shop logs is written to {tmp_path / 'log'} twice")
        assert finding.endswith("logging.getLogger('shop').propagate = False")
        logger.propagate = False
        assert await findings(sqlite_url) == []
        logger.propagate = True
        logger.handlers[:] = [logging.FileHandler(tmp_path / "another", delay=True)]
        assert await findings(sqlite_url) == []
    finally:
        logging.root.removeHandler(root)
        root.close()
