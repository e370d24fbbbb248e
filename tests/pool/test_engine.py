"""What `create_engine` makes of a URL: passwords that change, PgBouncer, sizes against the server's, SQLite."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiosqlite
import psycopg
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from pool.storm import one, pool_of
from sqlalchemy import make_url, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from support import Item, eventually, recorded, tables

from overdrive import ConfigurationError, Overdrive, Settings, create_engine
from overdrive.instrumentation.events import StatementEvent
from overdrive.pool.engine import ping
from overdrive.pool.sizes import excess

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncpg", "psycopg"])
def server_url(request: pytest.FixtureRequest, postgres_url: str) -> str:
    return postgres_url.replace("asyncpg", request.param)


# Passwords


@pytest.fixture
def rotate(postgres_server: str) -> Iterator[Callable[[str], None]]:
    """Give the role `rotating` another password, which is asked for here, unlike all others'."""
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        [hba] = connection.execute("SHOW hba_file").fetchone() or []
        rules = Path(hba).read_text()
        Path(hba).write_text("host all rotating 127.0.0.1/32 scram-sha-256\n" + rules)
        connection.execute("CREATE ROLE rotating LOGIN")
        connection.execute("SELECT pg_reload_conf()")
        yield lambda password: connection.execute(f"ALTER ROLE rotating PASSWORD '{password}'") and None
        Path(hba).write_text(rules)
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("DROP ROLE rotating")


async def test_each_connection_asks_for_its_password(server_url: str, rotate: Callable[[str], None]) -> None:
    known = "first"
    rotate(known)

    async def password() -> str:
        await asyncio.sleep(0)
        return known

    url = make_url(server_url).set(username="rotating")
    # Each connection serves once.
    engine = create_engine(url, password=password, pool_size=3, max_overflow=0, pool_recycle=0)
    stopping = asyncio.Event()
    refused: list[Exception] = []
    served = 0

    async def work() -> None:
        nonlocal served
        while not stopping.is_set():
            try:
                served += await one(engine)
            except Exception as error:  # of asyncpg's own, where it cannot connect
                refused.append(error)
                await asyncio.sleep(0.01)

    workers = [asyncio.create_task(work()) for _ in range(4)]
    for known in ("second", "third"):
        rotate(known)
        before = served
        await eventually(lambda: served >= before + 3)  # noqa: B023
    stopping.set()
    await asyncio.gather(*workers)
    # Those who had been told the old one already.
    assert all("password" in str(error) or "refused" in str(error) for error in refused)
    # A plain function's engine has been told as well.
    with Overdrive(FastAPI(), engine=engine).sync_sessions().open() as session:
        assert await asyncio.to_thread(session.scalar, select(1)) == 1
    await engine.dispose()
    session.get_bind().engine.dispose()


async def test_a_password_that_cannot_be(sqlite_url: str, postgres_url: str) -> None:
    with pytest.raises(ConfigurationError, match="password= takes a function"):
        create_engine(sqlite_url, password="secret")  # type: ignore[arg-type]
    engine = create_engine(postgres_url, password=lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigurationError, match="has to return text, not NoneType"):
        await one(engine)
    await engine.dispose()


# PgBouncer


async def test_behind_a_pgbouncer_nothing_is_left_on_the_servers_session(server_url: str) -> None:
    engine = create_engine(server_url, pgbouncer=True)
    async with engine.connect() as connection:
        for _ in range(8):
            await connection.execute(select(1))
        assert await connection.scalar(text("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''")) == 0
        changed = text("SELECT setting FROM pg_settings WHERE name = 'client_connection_check_interval'")
        assert await connection.scalar(changed) == "0"
    await engine.dispose()


def test_what_stands_behind_a_pgbouncer_is_postgresql(sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError, match="knows asyncpg and psycopg, not sqlite"):
        create_engine(sqlite_url, pgbouncer=True)


@pytest.mark.parametrize("own", [True, False])
async def test_reads_need_a_transaction_behind_a_pgbouncer_only_where_statements_have_names(
    postgres_url: str, own: bool
) -> None:
    if own:
        # What SQLAlchemy's documentation advises.
        arguments = {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__{uuid4()}__",
        }
        engine = create_async_engine(postgres_url, connect_args=arguments)
    else:
        engine = create_engine(postgres_url, pgbouncer=True)
    overdrive = Overdrive(FastAPI(), engine=engine)
    with tables(postgres_url), recorded() as events:
        async with overdrive.session() as db:
            await db.execute(select(Item))
    assert [each.transactional for each in events if isinstance(each, StatementEvent)] == [own]
    await engine.dispose()


# Sizes


@given(
    processes=st.integers(1, 50),
    capacities=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    limit=st.integers(10, 500),
    reserved=st.integers(0, 9),
)
def test_pools_fit_or_it_is_said_why_not(processes: int, capacities: list[int], limit: int, reserved: int) -> None:
    complaint = excess(processes, capacities, limit, reserved)
    wanted = processes * sum(capacities)
    assert (complaint is None) is (wanted <= limit - reserved)
    assert complaint is None or f"= {wanted}, but" in complaint


async def test_pools_that_cannot_all_be_full_are_told_of_once(
    server_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    # Whatever other tests have left open to the same server is counted, too.
    server_url = server_url.replace("127.0.0.1", "localhost")
    overdrive = Overdrive(FastAPI(), settings=Settings(database_url=server_url))
    engine = overdrive.engine
    with caplog.at_level(logging.WARNING, "overdrive"):
        held = [await engine.connect() for _ in range(2)]
        assert not caplog.records
        with overdrive.sync_session() as session:
            await asyncio.to_thread(session.scalar, select(1))
        [record] = caplog.records
        assert "4 processes x (30 + 30) = 240, but max_connections 200 - 3 reserved = 197" in record.getMessage()
    for connection in held:
        await connection.close()
    await overdrive.aclose()


async def test_strict_refuses_to_connect(server_url: str) -> None:
    engine = create_engine(server_url.replace("127.0.0.1", "localhost"), processes=9, strict=True)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"9 processes x \(.*30\)"):
            await one(engine)
    assert pool_of(engine).checkedout() == 0
    await engine.dispose()


# SQLite


async def test_nothing_is_left_of_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = aiosqlite.Connection.stop

    def stop_late(connection: aiosqlite.Connection) -> Any:
        connection._tx.put_nowait((None, partial(time.sleep, 0.1)))
        return stop(connection)

    monkeypatch.setattr(aiosqlite.Connection, "stop", stop_late)
    threads = set(threading.enumerate())
    with pytest.raises(ConfigurationError, match="unable to open"):
        await ping(create_engine(f"sqlite:///{tmp_path}/nowhere/shop.sqlite"))
    # It would tell an event loop of its end that may be closed by then.
    assert not [each for each in set(threading.enumerate()) - threads if "_connection_worker_thread" in each.name]


async def test_writers_queue_on_sqlite(sqlite_url: str) -> None:
    with tables(sqlite_url) as watcher:
        overdrive = Overdrive(FastAPI(), settings=Settings(database_url=sqlite_url))

        async def write(number: int) -> None:
            async with overdrive.session() as db:
                # A reader that turns into a writer, while others do.
                await db.scalars(select(Item))
                db.add(Item(name=str(number)))
                await db.flush()
                await asyncio.sleep(0)

        def write_from_thread(number: int) -> None:
            with overdrive.sync_session() as db:
                db.add(Item(name=str(number)))

        with ThreadPoolExecutor(8) as threads:
            in_threads = [threads.submit(write_from_thread, number) for number in range(32, 40)]
            await asyncio.gather(*(write(number) for number in range(32)))
            await asyncio.gather(*map(asyncio.wrap_future, in_threads))
        with watcher.connect() as connection:
            assert sorted(map(int, connection.scalars(select(Item.name)))) == list(range(40))
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        await overdrive.aclose()


async def test_a_cancelled_statement_of_sqlite_ends_before_its_end(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    rows, begun, loop = [0], asyncio.Event(), asyncio.get_running_loop()

    def tick(row: int) -> int:
        rows[0] = row
        if row == 1000:
            loop.call_soon_threadsafe(begun.set)
        return row

    async def count() -> None:
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            assert raw.driver_connection is not None
            await raw.driver_connection.create_function("tick", 1, tick)
            numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000)"
            await connection.execute(text(f"{numbers} SELECT max(tick(i)) FROM n"))

    counting = asyncio.create_task(count())
    await begun.wait()
    counting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await counting
    await engine.dispose()
    assert rows[0] < 3_000_000
