"""A database that fails under load: nothing acknowledged is lost, and a second later all is well again.

A round ends all backends again and again, stops one, locks the table, takes all connections there are, and has the
server start anew after a crash.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pool.faults import OURS, crash, end_all, lock_the_table, stop_one, take_all_connections
from pool.storm import make, one, pool_of
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine
from support import eventually

from overdrive.demo import servers

pytestmark = pytest.mark.anyio


@pytest.fixture
def server(server_directory: Path) -> Iterator[str]:
    """A server of its own: it is made to crash."""
    with servers.postgres(server_directory) as url:
        yield url


class Load:
    """Twenty clients that write a row each time, give up after a second, and note what was acknowledged."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.acknowledged: set[int] = set()
        self.failed = 0
        self._next = 0
        self._stopping = asyncio.Event()

    async def client(self) -> None:
        while not self._stopping.is_set():
            self._next += 1
            number = self._next
            try:
                async with asyncio.timeout(1), self.engine.begin() as connection:
                    await connection.execute(text("INSERT INTO written VALUES (:number)"), {"number": number})
                self.acknowledged.add(number)
            except Exception:
                self.failed += 1
                await asyncio.sleep(0.01)

    async def __aenter__(self) -> Load:
        self._clients = [asyncio.create_task(self.client()) for _ in range(20)]
        await self.goes_on()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        await asyncio.gather(*self._clients)

    async def goes_on(self) -> None:
        """Wait until writes are acknowledged again."""
        before = len(self.acknowledged)
        await eventually(lambda: len(self.acknowledged) > before + 20, 20)


FAULTS = [end_all, stop_one, lock_the_table, take_all_connections, crash]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_whatever_happens_nothing_acknowledged_is_lost(server: str, driver: str, rounds: Iterator[int]) -> None:
    # A crash loses the last commits of a server that does not wait for its disk, so that they are not counted then.
    engine = make(make_url(server).set(drivername=f"postgresql+{driver}").render_as_string(False), pool_size=5)
    pool = pool_of(engine)
    for _ in rounds:
        for fault in FAULTS:
            async with engine.begin() as connection:
                await connection.execute(text("DROP TABLE IF EXISTS written"))
                await connection.execute(text("CREATE TABLE written (number int PRIMARY KEY)"))
            async with Load(engine) as load:
                await fault(server)
                await load.goes_on()
            await eventually(lambda: pool.checkedout() == pool.statistics.closing == 0)
            assert await asyncio.gather(*(one(engine) for _ in range(20))) == [1] * 20
            with psycopg.connect(server) as outside:
                there = {number for (number,) in outside.execute("SELECT number FROM written")}
                [backends] = outside.execute(f"SELECT count(*) {OURS}").fetchone() or []
            assert fault is crash or load.acknowledged <= there
            assert backends <= pool.capacity
    await engine.dispose()
