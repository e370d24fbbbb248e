"""The store inside the process, beside other processes that use the same database."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread
import pytest
import sqlalchemy
from cache.neighbour import Neighbour, neighbour
from cache.service import Service, serve
from fastapi import FastAPI
from sqlalchemy import insert, make_url, select
from support import Item

from overdrive import Overdrive, cached
from overdrive.app import _name_of_database
from overdrive.cache.alone import LoneStore, Neighbours
from overdrive.cache.store import Mark

pytestmark = pytest.mark.anyio

NAME = "a database"


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory that no other test's processes are seen in, where everybody always looks."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("overdrive.cache.alone._LOOK_INTERVAL", 0)
    return tmp_path


@pytest.fixture
def other() -> Iterator[Neighbour]:
    with neighbour(NAME) as process:
        yield process


def files(directory: Path) -> list[Path]:
    return list(directory.glob("overdrive-*"))


# Who is there


def test_who_comes_is_seen_at_once(other: Neighbour, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Neighbours(NAME)
    # Nobody waits for the next look.
    monkeypatch.setattr("overdrive.cache.alone._LOOK_INTERVAL", 3600)
    assert own.alone_since() == own.alone_since() is not None
    assert other.do("look") == "several"
    assert own.alone_since() is None


def test_who_dies_is_gone(other: Neighbour) -> None:
    own = Neighbours(NAME)
    before = own.alone_since()
    other.do("look")
    assert own.alone_since() is None
    other.kill()
    assert own.alone_since() not in (None, before)


def test_nobody_loses_its_place_by_looking(other: Neighbour) -> None:
    own = Neighbours(NAME)
    own.alone_since()
    for _ in range(20):
        assert other.do("look") == "several"
        assert own.alone_since() is None


def test_who_has_come_and_gone_was_there(other: Neighbour) -> None:
    own = Neighbours(NAME)
    before = own.alone_since()
    other.do("look")
    other.kill()
    assert own.alone_since() not in (None, before)


def test_who_only_writes_comes_where_somebody_is(other: Neighbour, own_directory: Path) -> None:
    other.do("write")
    assert not files(own_directory)
    own = Neighbours(NAME)
    assert own.alone_since() is not None
    other.do("write")
    assert own.alone_since() is None


def test_the_last_one_takes_the_file_along(other: Neighbour, own_directory: Path) -> None:
    own = Neighbours(NAME)
    before = own.alone_since()
    other.do("look")
    own.leave()
    assert len(files(own_directory)) == 1
    assert other.do("look") == "alone"
    other.do("leave")
    assert not files(own_directory)
    assert own.alone_since() not in (None, before)
    own.leave()


def test_a_file_that_was_cleaned_away_is_made_again(other: Neighbour, own_directory: Path) -> None:
    own = Neighbours(NAME)
    own.alone_since()
    files(own_directory)[0].unlink()
    assert other.do("look") == "alone"
    assert own.alone_since() is None
    assert other.do("look") == "several"


def test_who_leaves_takes_no_other_file_along(other: Neighbour, own_directory: Path) -> None:
    own = Neighbours(NAME)
    own.alone_since()
    files(own_directory)[0].unlink()
    other.do("look")
    own.leave()
    assert len(files(own_directory)) == 1


def test_who_has_written_is_seen_again(other: Neighbour, own_directory: Path) -> None:
    own = Neighbours(NAME)
    own.alone_since()
    other.do("write")
    files(own_directory)[0].unlink()
    assert own.alone_since() is not None
    other.do("write")
    assert own.alone_since() is None


def test_a_fork_is_another_process(other: Neighbour) -> None:
    other.do("look")
    other.do("fork")
    other.process.wait()
    assert Neighbours(NAME).alone_since() is None


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("postgresql+asyncpg://a:b@db/shop", "postgresql+psycopg://c:d@db/shop?sslmode=require"),
        ("postgresql://db/shop", "postgresql:///shop?host=db"),
        ("sqlite+aiosqlite:///shop.sqlite", f"sqlite:///{os.getcwd()}/shop.sqlite"),
    ],
)
def test_one_database_has_one_name(one: str, another: str) -> None:
    assert _name_of_database(make_url(one)) == _name_of_database(make_url(another))


def test_other_databases_have_other_names() -> None:
    urls = ["postgresql://db/shop", "postgresql://db/other", "postgresql://other/shop", "postgresql://db:5433/shop"]
    assert len({_name_of_database(make_url(url)) for url in urls}) == 4
    assert _name_of_database(make_url("sqlite+aiosqlite://")) is None


# What is kept


@pytest.fixture
async def service(sqlite_url: str) -> AsyncIterator[Service]:
    async with serve(sqlite_url) as running:

        @running.app.get("/plain")
        @cached
        async def plain() -> int:
            running.ran.append("/plain")
            return 1

        yield running


def beside(service: Service) -> Neighbour:
    name = _name_of_database(service.overdrive.engine.url)
    assert name is not None
    return Neighbour(name)


async def test_nothing_that_another_could_outdate(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    assert await service.marks("/names", "/names") == ["miss", "hit"]
    other = beside(service)
    try:
        other.do("look")
        with caplog.at_level(logging.WARNING, "overdrive"):
            assert await service.marks("/names", "/names") == ["miss", "miss"]
        assert await service.marks("/plain", "/plain") == ["miss", "hit"]
        answer = await service.get("/names")
        assert answer.headers["cache-status"] == "overdrive; fwd=uri-miss; detail=several-processes"
    finally:
        other.kill()
    assert len(caplog.messages) == 1
    assert "OVERDRIVE_REDIS_URL" in caplog.messages[0]
    # What was kept before is older than what the other may have written.
    assert await service.marks("/names", "/plain", "/names") == ["miss", "miss", "hit"]


async def test_values_too(service: Service) -> None:
    cache, loaded = service.overdrive.cache, list[str]()

    async def names() -> int:
        loaded.append("names")
        async with service.overdrive.session() as db:
            return len((await db.scalars(select(Item.name))).all())

    async def plain() -> int:
        loaded.append("plain")
        return 1

    with neighbour(_name_of_database(service.overdrive.engine.url) or "") as other:
        other.do("look")
        for _ in range(2):
            await cache.get_or_set("names", names)
            await cache.get_or_set("plain", plain)
        assert cache.store.statistics()["entries"] == 1
    assert loaded == ["names", "plain", "names"]


async def test_nobody_joins_who_came_before_a_write(service: Service) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> int:
        async with service.overdrive.session() as db:
            found = len((await db.scalars(select(Item.name))).all())
        begun.set()
        await go_on.wait()
        return found

    with neighbour(_name_of_database(service.overdrive.engine.url) or "") as other:
        other.do("look")
        first = asyncio.create_task(service.overdrive.cache.get_or_set("slow", slow))
        await begun.wait()
        # The other process would have written here, and answered.
        with service.database.begin() as connection:
            connection.execute(insert(Item).values(name="second"))
        second = asyncio.create_task(service.overdrive.cache.get_or_set("slow", slow))
        await asyncio.sleep(0.05)
        go_on.set()
        assert (await first, await second) == (1, 2)


async def test_two_stores_of_one_process_learn_of_another() -> None:
    stores = [LoneStore(None, [NAME]) for _ in range(2)]
    assert [store.is_alone() for store in stores] == [True, True]
    with neighbour(NAME) as other:
        other.do("look")
        assert [store.is_alone() for store in stores] == [False, False]
    assert [store.is_alone() for store in stores] == [True, True]


@asynccontextmanager
async def other_app(service: Service) -> AsyncIterator[Overdrive]:
    """Another app of this process that uses the same database, by another name and with plain functions."""
    engine = sqlalchemy.create_engine(service.database.url)
    other = Overdrive(FastAPI(), database_url="sqlite+aiosqlite://", sync_engine=engine, cache=False)
    yield other
    await other.aclose()
    engine.dispose()


async def test_what_another_app_of_this_process_writes_is_heard_of(service: Service) -> None:
    async with other_app(service) as other:

        def write() -> None:
            with other.sync_session() as db:
                db.add(Item(name="second"))

        assert await service.marks("/names", "/plain", "/names", "/plain") == ["miss", "miss", "hit", "hit"]
        await anyio.to_thread.run_sync(write)
        answer = await service.get("/names")
        assert (answer.json(), answer.headers["x-cache"]) == (["first", "second"], "miss")
        assert await service.marks("/names") == ["hit"]


async def test_what_another_app_of_this_process_is_writing_is_not_kept(service: Service) -> None:
    async with other_app(service) as other:
        mark = Mark("a1", frozenset({"default/items"}), "")
        await other.cache.store.mark(mark)
        assert await service.marks("/names", "/names") == ["miss", "miss"]
        await other.cache.store.settle(mark)
        assert await service.marks("/names", "/names") == ["miss", "hit"]


async def test_several_workers_are_known_before_they_are_there(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    async with serve(sqlite_url) as service:
        assert await service.marks("/names", "/names") == ["miss", "miss"]


async def test_where_nobody_can_tell(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    async with serve(sqlite_url) as service:
        assert await service.marks("/names", "/names") == ["miss", "miss"]
    assert "TMPDIR" in caplog.text


async def test_in_memory_nobody_else_is(own_directory: Path) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url="sqlite+aiosqlite://", cache=True)
    assert overdrive.cache.seen() is not None
    assert not files(own_directory)
    await overdrive.aclose()


async def test_who_keeps_nothing_is_nobodys_neighbour(sqlite_url: str, own_directory: Path) -> None:
    overdrive = Overdrive(FastAPI(), database_url=sqlite_url, cache=False)
    overdrive.cache.seen()
    assert not files(own_directory)
    await overdrive.aclose()
