"""An engine with a `FairPool`, and a storm of cancellations on it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from typing import Any

from sqlalchemy import Engine, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support import eventually, outside

from overdrive import FairPool
from overdrive.pool.engine import prepare

BACKENDS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fair' AND datname = current_database()"
    " AND state = 'active'"
)


def make(url: str, **options: Any) -> AsyncEngine:
    """An engine of SQLAlchemy's own with the pool alone."""
    named = {"server_settings": {"application_name": "fair"}} if "asyncpg" in url else {"application_name": "fair"}
    engine = create_async_engine(
        url,
        poolclass=FairPool,
        connect_args={} if "sqlite" in url else named,
        **{"pool_size": 2, "max_overflow": 1, "pool_timeout": 5, **options},
    )
    prepare(engine.sync_engine)
    return engine


def pool_of(engine: AsyncEngine | Engine) -> FairPool:
    pool = engine.pool
    assert isinstance(pool, FairPool)
    return pool


async def one(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int(await connection.scalar(select(1)) or 0)


async def storm(url: str, cancellations: int) -> None:
    engine = make(url)
    watcher = outside(url)
    calm = threading.Event()
    most = 0

    def watch() -> None:
        nonlocal most
        with watcher.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not calm.wait(0.002):
                most = max(most, int(connection.scalar(BACKENDS) or 0))

    async def victim() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(0.02)"))

    async def attack() -> None:
        task = asyncio.create_task(victim())
        await asyncio.sleep(random.random() * 0.04)
        for _ in range(random.choice((1, 1, 2))):
            task.cancel()
            await asyncio.sleep(0)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    watching = asyncio.create_task(asyncio.to_thread(watch))
    for _ in range(cancellations // 10):
        await asyncio.gather(*(attack() for _ in range(10)))
    pool = pool_of(engine)
    await eventually(lambda: pool.checkedout() == 0)
    calm.set()
    await watching
    assert 0 < most <= pool.capacity
    assert await asyncio.gather(*(one(engine) for _ in range(10))) == [1] * 10
    await engine.dispose()
    watcher.dispose()
