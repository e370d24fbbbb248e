"""A commit is marked before it is sent and settled after it: what dies between the two leaves nothing stale behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cache.exchanges import ITEMS, ask
from cache.service import serve
from redis import Redis
from support import eventually, names, tables

from overdrive.cache.cache import Cache
from overdrive.cache.cluster import store_at
from overdrive.cache.redis import RedisStore
from overdrive.cache.store import PENDING, Mark, MemoryStore
from overdrive.pool.observe import Outcome

pytestmark = pytest.mark.anyio

WRITES = frozenset((ITEMS,))
OTHERS = "default/others"


@pytest.fixture
async def caches(stores_url: str | None) -> AsyncIterator[tuple[Cache, Cache]]:
    """The writer's, and that of somebody who reads: in one process they are one."""
    if stores_url is None:
        cache = Cache(MemoryStore())
        yield cache, cache
        return
    writer, reader = Cache(store_at(stores_url, "test")), Cache(store_at(stores_url, "test"))
    yield writer, reader
    await writer.aclose()
    await reader.aclose()


@pytest.fixture
def short_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.store.LONGEST_COMMIT", 0.2)
    monkeypatch.setattr("overdrive.cache.redis.LONGEST_COMMIT", 0.2)


async def heard(cache: Cache) -> None:
    """Wait until what was posted has arrived."""
    await cache.store.versions([])


async def test_before_the_commit_its_tags_are_outdated(caches: tuple[Cache, Cache]) -> None:
    writer, reader = caches
    assert [await ask(reader), await ask(reader), await ask(reader, "other", tags=(OTHERS,))] == ["miss", "hit", "miss"]
    await writer.invalidator.before(WRITES, "")
    assert [await ask(reader), await ask(reader, "other", tags=(OTHERS,))] == ["miss", "hit"]


async def test_what_is_read_before_the_commit_is_not_kept_while_it_is_pending(caches: tuple[Cache, Cache]) -> None:
    writer, reader = caches
    write = await writer.invalidator.before(WRITES, "")
    assert [await ask(reader), await ask(reader)] == ["miss", "miss"]
    await writer.invalidator.after(write, Outcome.COMMITTED)
    await heard(writer)
    assert [await ask(reader), await ask(reader)] == ["miss", "hit"]


async def test_nor_when_it_is_settled(caches: tuple[Cache, Cache]) -> None:
    """It was asked for after the mark, and has read before the commit."""
    writer, reader = caches
    write = await writer.invalidator.before(WRITES, "")

    async def commits() -> None:
        await writer.invalidator.after(write, Outcome.COMMITTED)
        await heard(writer)

    assert await ask(reader, meanwhile=commits) == "miss"
    assert [await ask(reader), await ask(reader)] == ["miss", "hit"]


@pytest.mark.parametrize("unmarked", [False, True])
async def test_a_commit_of_which_nobody_knows_may_become_visible_later(
    caches: tuple[Cache, Cache], unmarked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = caches
    write = await writer.invalidator.before(WRITES, "")
    if unmarked:
        # The store was away before the commit, and is there after it.
        await writer.store.settle(write.mark)
        write = write._replace(is_marked=False)
    await writer.invalidator.after(write, Outcome.UNKNOWN)
    await heard(writer)
    assert [await ask(reader, body=b"before"), await ask(reader, body=b"before")] == ["miss", "miss"]
    assert not writer.invalidator.is_behind


@pytest.mark.usefixtures("short_commits")
async def test_a_mark_that_has_run_out_is_resolved_by_whoever_finds_it(caches: tuple[Cache, Cache]) -> None:
    writer, reader = caches
    await writer.invalidator.before(WRITES, "")

    async def deadline() -> None:
        await asyncio.sleep(0.25)

    # It has read before the commit became visible, and brings it when the mark has run out.
    assert await ask(reader, meanwhile=deadline) == "miss"
    assert [await ask(reader), await ask(reader)] == ["miss", "hit"]
    _, versions = await reader.store.versions(WRITES)
    assert versions[ITEMS] < PENDING


@pytest.mark.usefixtures("short_commits")
async def test_a_mark_of_which_nobody_asks_runs_out_with_the_next_one(caches: tuple[Cache, Cache]) -> None:
    writer, reader = caches
    await writer.invalidator.before(WRITES, "")
    await asyncio.sleep(0.25)
    await writer.invalidator.after(await writer.invalidator.before(WRITES, ""), Outcome.COMMITTED)
    await heard(writer)
    assert [await ask(reader), await ask(reader)] == ["miss", "hit"]


async def test_several_may_be_pending_on_one_tag(caches: tuple[Cache, Cache]) -> None:
    writer, reader = caches
    writes = [await each.invalidator.before(WRITES, "") for each in (writer, reader, writer)]
    for each in (writes[1], writes[0]):
        await writer.invalidator.after(each, Outcome.COMMITTED)
        await heard(writer)
        assert [await ask(reader), await ask(reader)] == ["miss", "miss"]
    await writer.invalidator.after(writes[2], Outcome.ROLLED_BACK)
    await heard(writer)
    assert [await ask(reader), await ask(reader)] == ["miss", "hit"]


async def test_a_bump_and_a_new_epoch_leave_the_marks(caches: tuple[Cache, Cache]) -> None:
    writer, reader = caches
    write = await writer.invalidator.before(WRITES, "")
    await reader.invalidate("items")
    await reader.clear()
    assert [await ask(reader), await ask(reader)] == ["miss", "miss"]
    await writer.invalidator.after(write, Outcome.COMMITTED)
    await heard(writer)
    assert [await ask(reader), await ask(reader)] == ["miss", "hit"]


async def test_an_entry_that_is_pending_costs_no_second_trip(redis_url: str) -> None:
    writer, reader = RedisStore(redis_url, "test"), RedisStore(redis_url, "test")
    await ask(Cache(reader))
    await writer.mark(Mark("a", WRITES, ""))
    trips = reader.trips
    assert (await reader.load("key", "fingerprint")).versions == {ITEMS: PENDING}
    assert reader.trips == trips + 1
    await writer.aclose()
    await reader.aclose()


# Faults


@pytest.fixture
async def cache(redis_url: str) -> AsyncIterator[Cache]:
    cache = Cache(RedisStore(redis_url, "test"))
    yield cache
    await cache.aclose()


async def test_who_is_cancelled_while_it_marks_takes_the_mark_back(cache: Cache) -> None:
    await cache.store.bump([])
    marking = asyncio.create_task(cache.invalidator.before(WRITES, ""))
    await asyncio.sleep(0)
    marking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await marking
    await heard(cache)
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_settlement_that_is_lost_is_made_up_for(cache: Cache, is_known: bool) -> None:
    write = await cache.invalidator.before(WRITES, "")
    connection_of(cache)._transport.abort()
    if is_known:
        await asyncio.sleep(0.01)
    await cache.invalidator.after(write, Outcome.COMMITTED)
    if not is_known:
        await eventually(lambda: cache.invalidator.is_behind)
    # What it was to end is ended, too.
    for _ in range(200):
        if await ask(cache) == "hit":
            break
        await asyncio.sleep(0.02)
    assert await ask(cache) == "hit"
    assert not cache.invalidator.is_behind


def connection_of(cache: Cache) -> Any:
    store = cache.store
    assert isinstance(store, RedisStore)
    return store._link()._connection  # type: ignore[attr-defined]


@pytest.mark.parametrize(("strict", "on_its_way"), [(False, 1), (True, 0)])
async def test_a_commit_is_one_round_trip_and_a_strict_one_two(cache: Cache, strict: bool, on_its_way: int) -> None:
    cache.invalidator.strict = strict
    await cache.invalidator.after(await cache.invalidator.before(WRITES, ""), Outcome.COMMITTED)
    assert len(connection_of(cache)._trips) == on_its_way


# A process that is killed at its COMMIT

_WRITER = """
import asyncio, os, signal, sys
from fastapi import FastAPI
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import create_async_engine
from overdrive import Overdrive
from support import Item

engine = create_async_engine(sys.argv[1])
commit = engine.dialect.do_commit

def commit_and_die(connection):
    commit(connection)
    os.kill(os.getpid(), signal.SIGKILL)

engine.dialect.do_commit = commit_and_die
overdrive = Overdrive(FastAPI(), engine=engine, redis_url=sys.argv[2], cache=True)

async def main():
    async with overdrive.session() as session:
        await session.execute(insert(Item).values(name="new"))

asyncio.run(main())
"""


async def test_a_process_that_is_killed_at_its_commit_leaves_nothing_stale(postgres_url: str, redis_url: str) -> None:
    async with serve(postgres_url, redis_url) as service:
        assert await service.marks("/names", "/names") == ["miss", "hit"]
        command = [sys.executable, "-c", _WRITER, postgres_url, redis_url]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        writer = await asyncio.create_subprocess_exec(*command, env=environment)
        assert await writer.wait() == -signal.SIGKILL
        assert names(service.database) == ["first", "new"]
        for _ in range(3):
            assert (await service.get()).json() == ["first", "new"]


SCRIPT = """
import os, sys
from sqlalchemy import insert
from support import Item
from overdrive.cache.cache import Cache
from overdrive.cache.redis import RedisStore
from overdrive.pool.engine import create_sync_engine
from overdrive.pool.observe import observe
engine = create_sync_engine(sys.argv[1])
store = RedisStore(sys.argv[2], "test")
observe(engine, "default", Cache(store).invalidator)
def write():
    with engine.begin() as connection:
        connection.execute(insert(Item).values(name="x"))
for _ in range(5):
    write()
engine.dispose()
child = os.fork()
write()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(store.trips)
"""


def test_a_scripts_commits_share_a_connection_and_a_forked_childs_have_theirs(redis_url: str, sqlite_url: str) -> None:
    with tables(sqlite_url) as database, Redis.from_url(redis_url) as redis:
        connected = redis.info("stats")["total_connections_received"]
        arguments = [sqlite_url.replace("+aiosqlite", ""), redis_url]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SCRIPT, *arguments]
        script = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        # Two for each process: its commits' and its lease's.
        assert redis.info("stats")["total_connections_received"] - connected == 4, script.stderr
        assert int(redis.get("test:clock").split()[1]) == 7 * 2
        assert len(names(database)) == 7
