"""A hundred thousand writes through an app while its database fails: what was answered with 2xx is there.

Half of the requests are plain functions, one in fifty has a client that leaves. The database is one of two, the other
of which follows it in step; it is ended, stopped, locked, filled and crashed, its answers to COMMIT are lost, the
network falls silent, and in the end its machine is gone and the other one is promoted.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count, cycle
from pathlib import Path

import psycopg
import pytest
from fastapi import FastAPI
from pool.faults import crash, end_all, lock_the_table, stop_one, take_all_connections
from pool.storm import pool_of
from pool.wire import Loss, Wire, wire
from sqlalchemy import make_url, text
from support import call, eventually

from overdrive import Overdrive, SessionDep, Settings, SyncSessionDep
from overdrive.demo import servers

pytestmark = pytest.mark.anyio

WRITES = int(os.environ.get("SOAK_WRITES", "100000"))
INSERT = text("INSERT INTO written VALUES (:number)")


@contextmanager
def two_servers(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the URLs of a server and of the one that follows it: a commit is answered when both have it."""
    # Under root the servers are another account's.
    directory.chmod(0o755)
    first, second = directory / "first", directory / "second"
    options = {"wal_level": "replica", "max_wal_senders": "5", "max_connections": "100"}
    with servers.postgres(first, **options):
        pass
    shutil.copytree(first / "data", second / "data")
    (second / "data" / "standby.signal").touch()
    owner = (first / "data").stat()
    for path in (second, *second.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)
    in_step = {"synchronous_commit": "remote_write", "synchronous_standby_names": "*"}
    with servers.postgres(first, **options, **in_step) as primary:
        port = str(make_url(primary).port)
        source = f"host=127.0.0.1 port={port} user=postgres"
        alone = {"synchronous_commit": "on", "primary_conninfo": source}
        with servers.postgres(second, **options, **alone) as standby:
            yield primary, standby


class Service:
    """An app that writes, and twenty clients that note what was acknowledged."""

    def __init__(self, url: str) -> None:
        self.app = FastAPI()
        pool = {"size": 3, "max_overflow": 2, "deadline": 1}
        self.overdrive = Overdrive(self.app, settings=Settings(database_url=url, pool=pool))  # type: ignore[arg-type]
        self.acknowledged: set[int] = set()
        self.refused = Counter[int]()
        self._numbers = count(1)
        self._stopping = asyncio.Event()

        @self.app.post("/async")
        async def write(db: SessionDep, number: int) -> None:
            await db.execute(INSERT, {"number": number})

        @self.app.post("/sync")
        def write_in_thread(db: SyncSessionDep, number: int) -> None:
            db.execute(INSERT, {"number": number})

    async def client(self, path: str) -> None:
        while not self._stopping.is_set():
            number = next(self._numbers)
            asking = asyncio.create_task(call(self.app, f"{path}?number={number}", "POST"))
            if random.random() < 0.02:
                await asyncio.sleep(random.random() / 100)
                asking.cancel()
                await asyncio.wait([asking])
                continue
            status = (await asking).status
            if status == 200:
                self.acknowledged.add(number)
            else:
                self.refused[status] += 1
                await asyncio.sleep(0.01)

    async def __aenter__(self) -> Service:
        self._clients = [asyncio.create_task(self.client(path)) for path in ("/async", "/sync") * 10]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        await asyncio.gather(*self._clients)

    async def goes_on(self) -> None:
        """Wait until both kinds are answered again."""
        before = len(self.acknowledged)
        await eventually(lambda: len(self.acknowledged) > before + 40, 30)

    @property
    def held(self) -> int:
        pools = [pool_of(engine) for engine in (self.overdrive.engine, self.overdrive.sync_sessions().engine)]
        return sum(pool.checkedout() + pool.statistics.closing for pool in pools)


def lose_commits(between: Wire, how: Loss) -> Callable[[str], Awaitable[None]]:
    async def lose(_server: str) -> None:
        between.loses_commits = how
        await asyncio.sleep(2)
        between.loses_commits = None

    return lose


def fall_silent(between: Wire) -> Callable[[str], Awaitable[None]]:
    async def silence(_server: str) -> None:
        between.silence()
        await asyncio.sleep(2)
        between.is_silent = False

    return silence


def forget(between: Wire) -> Callable[[str], Awaitable[None]]:
    async def forget(_server: str) -> None:
        between.forget()

    return forget


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_what_was_answered_is_there(
    server_directory: Path, driver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with two_servers(server_directory) as (primary, standby), wire(primary) as (between, url):
        with psycopg.connect(primary, autocommit=True) as outside:
            outside.execute("CREATE TABLE written (number int PRIMARY KEY)")
        faults = {
            "terminate storm": end_all,
            "stopped backend": stop_one,
            "locked table": lock_the_table,
            "no connections left": take_all_connections,
            "crash": crash,
            "COMMIT not answered": lose_commits(between, "silent"),
            "COMMIT cut off": lose_commits(between, "closed"),
            "silent network": fall_silent(between),
            "forgotten connections": forget(between),
        }
        took: dict[str, float] = {}

        async def measured(name: str) -> None:
            began = time.monotonic()
            await service.goes_on()
            took[name] = max(took.get(name, 0), time.monotonic() - began)

        async with Service(make_url(url).set(drivername=f"postgresql+{driver}").render_as_string(False)) as service:
            await service.goes_on()
            for name in cycle(faults):
                await faults[name](primary)
                await measured(name)
                # Most of the time all is well.
                goal = len(service.acknowledged) + WRITES // 30
                await eventually(lambda: len(service.acknowledged) > goal, 600)  # noqa: B023
                if len(service.acknowledged) >= WRITES:
                    break
            # Its machine is gone, and says so to nobody.
            between.forget()
            between.server = "127.0.0.1", make_url(standby).port or 0
            with psycopg.connect(standby, autocommit=True) as promoted:
                promoted.execute("SELECT pg_promote()")
            await measured("promotion")
        await eventually(lambda: service.held == 0, 10)
        with psycopg.connect(standby) as outside:
            there = {number for (number,) in outside.execute("SELECT number FROM written")}
        assert service.acknowledged <= there
        await service.overdrive.aclose()
    with capsys.disabled():
        print(f"\n{driver}: {len(service.acknowledged)} acknowledged, {dict(service.refused)}; usable again after")
        for name, seconds in took.items():
            print(f"    {name}: {seconds:.2f} s")
