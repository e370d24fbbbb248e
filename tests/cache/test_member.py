"""Who shares a Redis is heard by all, or nobody is served: one-sided partitions, dead processes, another Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cache.exchanges import ask
from cache.service import Service, serve
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item, eventually

from overdrive.cache.cache import Cache
from overdrive.cache.member import Member, _is_gone
from overdrive.cache.redis import RedisStore
from overdrive.demo import servers

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quick(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that end before long, and yet later than the wait for an answer."""
    monkeypatch.setattr("overdrive.cache.connection.PATIENCE", 0.1)
    monkeypatch.setattr("overdrive.cache.connection.DEADLINE", 0.2)
    monkeypatch.setattr("overdrive.cache.member._LEASE", 0.8)
    monkeypatch.setattr("overdrive.cache.member._INTERVAL", 0.05)
    monkeypatch.setattr("overdrive.cache.member._CONCERN", 0.5)


class Proxy:
    """A way to Redis on which everything may stand still: nothing is refused, and nothing lost."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._ways: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.StreamWriter] = []

    def stall(self) -> None:
        self._goes_on.clear()

    def resume(self) -> None:
        self._goes_on.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, to_upstream = await asyncio.open_connection("127.0.0.1", self._port)
        self._ends += [writer, to_upstream]
        for source, target in ((reader, to_upstream), (upstream, writer)):
            self._ways.append(asyncio.create_task(self._copy(source, target)))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                await self._goes_on.wait()
                target.write(data)
        await self._goes_on.wait()
        target.close()

    async def aclose(self) -> None:
        for way in self._ways:
            way.cancel()
        await asyncio.wait(self._ways)
        for end in self._ends:
            end.transport.abort()
        await asyncio.sleep(0)


def port_of(redis_url: str) -> int:
    return int(redis_url.rpartition(":")[2].partition("/")[0])


@asynccontextmanager
async def proxy_to(redis_url: str) -> AsyncIterator[tuple[Proxy, str]]:
    proxy = Proxy(port_of(redis_url))
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
        yield proxy, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        await proxy.aclose()


@pytest.fixture
def redis(redis_url: str) -> Redis:
    return Redis.from_url(redis_url, decode_responses=True)


async def until_hit(service: Service) -> None:
    for _ in range(250):
        if await service.marks("/names") == ["hit"]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("no hit within 5 s")


def store_of(service: Service) -> RedisStore:
    store = service.overdrive.cache.store
    assert isinstance(store, RedisStore)
    return store


async def test_a_writer_that_is_cut_off_answers_when_nobody_serves_older(sqlite_url: str, redis_url: str) -> None:
    async with (
        proxy_to(redis_url) as (proxy, by_proxy),
        serve(sqlite_url, by_proxy) as writer,
        serve(sqlite_url, redis_url) as reader,
    ):
        await until_hit(writer)
        await until_hit(reader)
        near = store_of(reader)._link().near
        assert near is not None
        while not len(near._entries):
            await reader.get()
        seen = store_of(reader).seen()
        assert seen is not None
        proxy.stall()

        async def rename(db: AsyncSession) -> None:
            await db.execute(update(Item).values(name="renamed"))

        assert await writer.write(rename) == 200
        assert writer.overdrive.cache.invalidator.is_behind
        for _ in range(20):
            assert (await reader.get()).json() == ["renamed"]
            await asyncio.sleep(0.01)
        assert store_of(reader).suspended > 0
        assert await reader.marks("/names") == ["bypass"]
        # The second write has nothing to wait for; whoever is stalled sends late what was sent before.
        assert await writer.write(rename) == 200
        proxy.resume()
        # It announces its writes by itself, and nothing else is forgotten.
        await until_hit(reader)
        assert (await reader.get()).json() == ["renamed"]
        now = store_of(reader).seen()
        assert now is not None
        assert now.epoch == seen.epoch
        await until_hit(writer)


async def test_a_write_that_can_be_announced_after_all_is_not_waited_for(
    sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.cache.member._LEASE", 600.0)
    async with serve(sqlite_url, redis_url) as service:
        await until_hit(service)
        with Redis.from_url(redis_url) as redis:
            redis.client_kill_filter(_type="pubsub")

        async def rename(db: AsyncSession) -> None:
            await db.execute(update(Item).values(name="renamed"))

        assert await asyncio.wait_for(service.write(rename), 60) == 200
        assert not service.overdrive.cache.invalidator.is_behind


async def test_what_is_renewed_late_is_not_renewed(redis_url: str, redis: Redis) -> None:
    store = RedisStore(redis_url, "test")
    await store.load("key", "f")
    member = store.member()
    late = member.renewal()
    assert late is not None
    # It ends when it was to end, whenever the command arrives.
    await asyncio.sleep(member.withdraw())
    redis.execute_command(*late)
    assert not redis.exists("test:trusted")
    with pytest.raises(Exception, match="cut off"):
        await store.load("key", "f")
    member.rejoin()
    await eventually(lambda: bool(redis.exists("test:trusted")))
    await store.load("key", "f")
    await store.aclose()


async def test_a_loop_that_is_held_up_is_not_cut_off(redis_url: str, redis: Redis) -> None:
    store = RedisStore(redis_url, "test")
    await store.load("key", "f")
    time.sleep(1.0)  # noqa: ASYNC251
    assert redis.exists("test:trusted")
    await store.aclose()


async def test_who_leaves_is_missed_by_nobody(redis_url: str, redis: Redis) -> None:
    one, other = RedisStore(redis_url, "test"), RedisStore(redis_url, "test")
    for store in (one, other):
        await store.load("key", "f")
    await eventually(lambda: one.members == 2)
    epoch = redis.get("test:clock")
    await other.aclose()
    assert redis.zcard("test:members") == 1
    assert redis.get("test:clock") == epoch
    await one.aclose()


_MEMBER = """
import asyncio, os, signal, sys
from overdrive.cache import member
from overdrive.cache.redis import RedisStore

async def main():
    await RedisStore(sys.argv[1], "test").load("key", "f")
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["dies", "ends"])
async def test_a_process_that_is_gone(redis_url: str, redis: Redis, how: str) -> None:
    """That was killed is forgotten with all that it may have known; one that has come to its end has left."""
    cache = Cache(RedisStore(redis_url, "test"))
    await ask(cache)
    epoch = redis.get("test:clock")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _MEMBER, redis_url, how, env=environment)
    assert await process.wait() == (-signal.SIGKILL if how == "dies" else 0)
    if how == "dies":
        await eventually(lambda: redis.get("test:clock") != epoch, 4)
    await eventually(lambda: redis.zcard("test:members") == 1, 4)
    await eventually(lambda: bool(redis.exists("test:trusted")), 4)
    assert (redis.get("test:clock") == epoch) == (how == "ends")
    await cache.aclose()


async def test_a_member_of_another_machine_is_forgotten_in_time(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.cache.member._ABSENCE", 1.0)
    cache = Cache(RedisStore(redis_url, "test"))
    await ask(cache)
    epoch = redis.get("test:clock")
    redis.zadd("test:members", {"elsewhere:somewhere:1:2:abcd": time.time() * 1000})
    await eventually(lambda: not redis.exists("test:trusted"))
    assert await ask(cache) == "bypass"
    await eventually(lambda: bool(redis.exists("test:trusted")))
    assert redis.get("test:clock") != epoch
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]
    await cache.aclose()


async def test_members_that_were_evicted_are_a_new_epoch(redis_url: str, redis: Redis) -> None:
    store = RedisStore(redis_url, "test")
    await store.load("key", "f")
    epoch = redis.get("test:clock")
    redis.delete("test:members")
    await eventually(lambda: redis.get("test:clock") != epoch)
    await store.aclose()


async def test_members_that_were_evicted_are_waited_for(sqlite_url: str, redis_url: str, redis: Redis) -> None:
    """One of them is cut off, and may write what nobody hears of."""
    async with (
        proxy_to(redis_url) as (proxy, way),
        serve(sqlite_url, redis_url) as reader,
        serve(sqlite_url, way) as writer,
    ):
        for service in (reader, writer):
            await until_hit(service)
        await eventually(lambda: store_of(reader).members == 2)
        proxy.stall()
        redis.flushdb()
        await eventually(lambda: bool(redis.zcard("overdrive:members")))
        for _ in range(10):
            await reader.get("/names")
            await asyncio.sleep(0.02)

        async def rename(db: AsyncSession) -> None:
            await db.execute(update(Item).values(name="renamed"))

        assert await writer.write(rename) == 200
        for _ in range(10):
            assert (await reader.get("/names")).json() == ["renamed"]
            await asyncio.sleep(0.05)
        proxy.resume()
        await until_hit(reader)


def test_whose_process_is_gone_is_known_on_its_own_machine() -> None:
    store = RedisStore("redis://localhost/0", "test")
    member = store.member().id
    name, place, pid, started, token = member.split(":")
    assert not _is_gone(member)
    assert not _is_gone(":".join((name, "another", "999999999", started, token)))
    assert _is_gone(":".join((name, place, "999999999", started, token)))
    assert _is_gone(":".join((name, place, pid, "1", token)))


def test_a_forked_process_is_another_member(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RedisStore("redis://localhost/0", "test")
    parent = store.member()
    assert store.member() is parent
    monkeypatch.setattr(os, "getpid", lambda: parent.pid + 1)
    assert store.member() is not parent
    # Nor does the child's end end the parent's lease.
    parent.close()
    assert not parent._is_closed


# Another Redis


async def test_a_redis_that_restarts_with_old_stamps_serves_nothing_old(
    server_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setattr(servers, "_free_port", lambda: port)
    cache = None
    with servers.redis(server_directory) as url, Redis.from_url(url) as redis:
        cache = Cache(RedisStore(url, "test"))
        await cache.invalidate("items")
        assert [await ask(cache, body=b"old"), await ask(cache)] == ["miss", "hit"]
        redis.save()
        await cache.invalidate("items")
    with servers.redis(server_directory) as url, Redis.from_url(url) as redis:
        assert redis.exists("test:entry:key")
        marks = []
        while "hit" not in marks:
            marks.append(await ask(cache, body=b"new"))
            await asyncio.sleep(0.02)
            assert len(marks) < 250
        # It has been made anew before it was found.
        assert "miss" in marks
        await cache.aclose()


# consistency="strict"


async def test_strict_keeps_nothing_near(sqlite_url: str, redis_url: str) -> None:
    async with (
        serve(sqlite_url, redis_url, consistency="strict") as one,
        serve(sqlite_url, redis_url, consistency="strict") as other,
    ):
        assert one.overdrive.cache.invalidator.strict
        await until_hit(other)
        for number in range(5):
            trips = store_of(other).trips
            assert await other.marks("/names") == ["hit"]
            assert store_of(other).trips == trips + 1

            async def rename(db: AsyncSession, name: str = f"name {number}") -> None:
                await db.execute(update(Item).values(name=name))

            assert await one.write(rename) == 200
            assert (await other.get()).json() == [f"name {number}"]


@given(*[st.floats(0, 1e6)] * 5, st.integers(0, 2**41))
def test_nothing_is_said_to_have_been_heard_sooner_than_it_was(
    sent: float, way: float, back: float, written: float, heard: float, origin: int
) -> None:
    """Redis' clock is ahead of ours by `origin`, and was read on the way of a question."""
    member = Member(("", "", "", ""), never, ())
    member.learn(sent, sent + way + back, origin + (sent + way) * 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("overdrive.cache.member.time.monotonic", lambda: written + heard)
        lag = member.since(origin + written * 1000)
    assert lag == pytest.approx(heard + way, abs=1e-2)


def never() -> Any:
    raise AssertionError("nothing is asked")
