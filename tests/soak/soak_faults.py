"""A database that fails under load: nothing acknowledged is lost, and a second later all is well again.

A round ends all backends again and again, stops one, locks the table, takes all connections there are, and has the
server start anew after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pool.storm import make, one, pool_of
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine
from support import eventually

from overdrive.demo import servers

pytestmark = pytest.mark.anyio

OURS = "FROM pg_stat_activity WHERE application_name = 'fair'"
END_ALL = f"SELECT pg_terminate_backend(pid) {OURS}"


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


async def end_all(server: str) -> None:
    with psycopg.connect(server, autocommit=True) as outside:
        for _ in range(20):
            outside.execute(END_ALL)
            await asyncio.sleep(0.05)


async def stop_one(server: str) -> None:
    with psycopg.connect(server, autocommit=True) as outside:
        [pid] = outside.execute(f"SELECT pid {OURS} LIMIT 1").fetchone() or []
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(3)
    os.kill(pid, signal.SIGCONT)


async def lock_the_table(server: str) -> None:
    with psycopg.connect(server) as outside:
        # Whoever is writing needs this loop to come to an end.
        await asyncio.to_thread(outside.execute, "LOCK TABLE written")
        await asyncio.sleep(3)


async def take_all_connections(server: str) -> None:
    with contextlib.ExitStack() as held:
        with psycopg.connect(server, autocommit=True) as outside:
            outside.execute(END_ALL)
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    held.enter_context(psycopg.connect(server))
        await asyncio.sleep(2)


async def crash(server: str) -> None:
    with psycopg.connect(server, autocommit=True) as outside:
        [pid] = outside.execute(f"SELECT pid {OURS} LIMIT 1").fetchone() or []
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(2)


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
