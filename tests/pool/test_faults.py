"""What a database does to a pool, for real: in the end nobody holds anything and everybody is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from pool.storm import make, one, pool_of
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from support import eventually, outside

pytestmark = pytest.mark.anyio

ALL = "FROM pg_stat_activity WHERE application_name = 'fair' AND datname = current_database()"


@pytest.fixture(params=["asyncpg", "psycopg"])
def server_url(request: pytest.FixtureRequest, postgres_url: str) -> str:
    return postgres_url.replace("asyncpg", request.param)


@pytest.fixture
async def engine(server_url: str) -> AsyncIterator[AsyncEngine]:
    engine = make(server_url)
    yield engine
    await engine.dispose()


async def warm(engine: AsyncEngine, connections: int = 3) -> None:
    held = [await engine.connect() for _ in range(connections)]
    for connection in held:
        await connection.execute(select(1))
    for connection in held:
        await connection.close()


async def write(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO written DEFAULT VALUES"))


@pytest.fixture
async def written(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS written"))
        await connection.execute(text("CREATE TABLE written (id serial PRIMARY KEY)"))


async def demote(engine: AsyncEngine) -> None:
    """Have the servers of all its connections take no writes, as when another one has been promoted."""
    held = [await engine.connect() for _ in range(3)]
    for connection in held:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("SET default_transaction_read_only = on"))
    for connection in held:
        await connection.close()


@pytest.mark.usefixtures("written")
async def test_after_a_failover_all_connections_are_replaced_with_the_first_write_that_fails(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.pool.engine._FAILOVER_PAUSE", 0)
    await demote(engine)
    with pytest.raises(DBAPIError, match="read-only transaction"):
        await write(engine)
    await asyncio.gather(*(write(engine) for _ in range(6)))
    pool = pool_of(engine)
    await eventually(lambda: pool.checkedout() == pool.statistics.closing == 0)
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM written")) == 6


@pytest.mark.usefixtures("written")
async def test_until_there_is_another_server_a_write_that_fails_costs_no_connection(engine: AsyncEngine) -> None:
    await warm(engine)
    await demote(engine)
    created = pool_of(engine).statistics.created
    for _ in range(3):
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await write(engine)
    assert pool_of(engine).statistics.created == created


@pytest.mark.usefixtures("written")
async def test_a_transaction_begun_read_only_costs_no_connection(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.pool.engine._FAILOVER_PAUSE", 0)
    await warm(engine)
    created = pool_of(engine).statistics.created
    async with engine.connect() as connection:
        await connection.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await connection.execute(text("INSERT INTO written DEFAULT VALUES"))
    assert await one(engine) == 1
    assert pool_of(engine).statistics.created == created


async def test_what_has_been_silent_is_asked_behind_the_scenes_and_replaced(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.pool.pool._TICK", 0.05)
    engine = make(server_url, validate_after=0.1, min_idle=2)
    pool = pool_of(engine)
    assert await one(engine) == 1
    await eventually(lambda: pool.statistics.idle == 2)
    watcher = outside(server_url)
    with watcher.connect() as connection:
        connection.execute(text(f"SELECT pg_terminate_backend(pid) {ALL}"))
    watcher.dispose()
    await eventually(lambda: pool.statistics.created >= 4 and pool.statistics.idle == 2)
    assert pool.statistics.failures == 0
    await engine.dispose()
