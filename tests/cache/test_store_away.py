"""Redis away: requests are slower, never wrong, and nobody restarts anything. Promise 9."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import anyio.lowlevel
import pytest
from anyio import sleep
from cache.exchanges import ITEMS, ask
from cache.service import Service, serve
from redis import Redis
from redis.exceptions import ResponseError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item, call

from overdrive import ConfigurationError, SessionDep, cached
from overdrive.cache.cache import Cache
from overdrive.cache.link import Link
from overdrive.cache.redis import RedisStore
from overdrive.cache.store import StoreUnavailable
from overdrive.demo import servers

pytestmark = pytest.mark.anyio

AWAY = "overdrive; fwd=bypass; detail=store-unavailable"

Start = Callable[[], AbstractContextManager[str]]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
def start(port: int, server_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a Redis that is at the same address each time, and empty."""
    monkeypatch.setattr(servers, "_free_port", lambda: port)
    return lambda: servers.redis(server_directory)


@pytest.fixture
def running(start: Start) -> Iterator[str]:
    with start() as url:
        yield url


@pytest.fixture
async def service(sqlite_url: str, port: int) -> AsyncIterator[Service]:
    # Each hit asks Redis.
    async with serve(sqlite_url, f"redis://127.0.0.1:{port}/0", max_bytes=0) as running:
        yield running


async def add(db: AsyncSession) -> None:
    db.add(Item(name="new"))


async def healed(service: Service, path: str = "/names") -> list[Any]:
    """Ask until the cache is in use again; returned are the bodies."""
    bodies = []
    for _ in range(200):
        answer = await service.get(path)
        assert answer.status_code == 200
        bodies.append(answer.json())
        if answer.headers["x-cache"] == "hit":
            return bodies
        await sleep(0.02)
    raise AssertionError(f"not healed: {answer.headers['cache-status']}")


async def test_nothing_listens(service: Service) -> None:
    for _ in range(2):
        answer = await service.get()
        assert (answer.status_code, answer.json()) == (200, ["first"])
        assert answer.headers["cache-status"] == AWAY
        assert answer.headers["x-cache"] == "bypass"
    assert await service.write(add) == 200
    assert (await service.get()).json() == ["first", "new"]


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A breaker that has opened stays open for the whole test."""
    monkeypatch.setattr("overdrive.cache.link.FIRST_PAUSE", 600.0)


@pytest.fixture
def mute() -> Iterator[socket.socket]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def visitors(listener: socket.socket) -> int:
    """How many have connected since this was last asked."""
    for number in count():
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return number
    raise AssertionError


@pytest.mark.usefixtures("rests")
@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_a_server_that_never_answers_is_not_waited_for_again(
    sqlite_url: str, mute: socket.socket, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(sqlite_url, f"{scheme}://127.0.0.1:{mute.getsockname()[1]}/0") as service:
        answers = await asyncio.gather(*(service.get() for _ in range(20)))
        assert {answer.headers["cache-status"] for answer in answers} == {AWAY}
        assert await service.write(add) == 200
        assert [(await service.get()).headers["cache-status"] for _ in range(3)] == [AWAY] * 3
        assert visitors(mute) == 1
    assert caplog.text.count("is left alone until it does") == 1


async def test_a_server_stops_and_returns(service: Service, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start():
        assert await service.marks("/names", "/names") == ["miss", "hit"]
    answer = await service.get()
    assert (answer.status_code, answer.json(), answer.headers["cache-status"]) == (200, ["first"], AWAY)
    assert await service.write(add) == 200
    assert "could not be told of a write" in caplog.text
    with start():
        assert all(body == ["first", "new"] for body in await healed(service))


async def test_a_server_hangs_and_goes_on(service: Service, running: str) -> None:
    with Redis.from_url(running) as redis:
        process = redis.info()["process_id"]
    assert await service.marks("/names", "/names") == ["miss", "hit"]
    os.kill(process, signal.SIGSTOP)
    try:
        answer = await asyncio.wait_for(service.get(), 4)
        assert (answer.json(), answer.headers["cache-status"]) == (["first"], AWAY)
    finally:
        os.kill(process, signal.SIGCONT)
    assert await healed(service)


async def test_a_server_stops_while_a_request_is_answered(service: Service, start: Start) -> None:
    running = ExitStack()
    running.enter_context(start())

    @service.app.get("/stopping")
    @cached
    async def stopping(db: SessionDep) -> list[str]:
        running.close()
        return list(await db.scalars(select(Item.name)))

    answer = await call(service.app, "/stopping")
    assert (answer.status, answer.body, answer.headers["x-cache"]) == (200, b'["first"]', "miss")
    # Nor is the failure to store it a failure of the request.
    assert answer.error is None
    assert (await service.get("/stopping")).headers["cache-status"] == AWAY
    with start():
        assert await healed(service, "/stopping")


async def test_a_write_that_redis_did_not_hear_of_is_never_served_over(
    service: Service, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old entry is there all the time, with every stamp as it was."""
    assert await service.marks("/names", "/names") == ["miss", "hit"]

    async def lost(*_write: Any) -> None:
        raise StoreUnavailable("lost on the way")

    with monkeypatch.context() as patch:
        for announcing in ("mark", "bump"):
            patch.setattr(service.overdrive.cache.store, announcing, lost)
        assert await service.write(add) == 200
        answer = await service.get()
        assert (answer.json(), answer.headers["cache-status"]) == (["first", "new"], AWAY)
    assert all(body == ["first", "new"] for body in await healed(service))


# The store by itself


@pytest.fixture
async def store(port: int) -> AsyncIterator[RedisStore]:
    store = RedisStore(f"redis://127.0.0.1:{port}/0", "test")
    yield store
    await store.aclose()


@pytest.fixture
def redis(running: str) -> Iterator[Redis]:
    with Redis.from_url(running) as redis:
        yield redis


@contextmanager
def stopped(redis: Redis) -> Iterator[None]:
    """Redis keeps its connections and says nothing."""
    process = redis.info()["process_id"]
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


async def crowd(store: RedisStore, size: int = 50) -> list[BaseException]:
    """Look up as many things at once; returned is what went wrong."""
    found = await asyncio.gather(*(store.load(str(number), "f") for number in range(size)), return_exceptions=True)
    return [each for each in found if isinstance(each, BaseException)]


async def recovered(store: RedisStore) -> None:
    for _ in range(500):
        try:
            await store.load("key", "f")
        except StoreUnavailable:
            await sleep(0.02)
        else:
            return
    raise AssertionError("not recovered")


@pytest.mark.usefixtures("rests")
async def test_silence_is_waited_for_once(store: RedisStore, redis: Redis) -> None:
    assert await crowd(store) == []
    with stopped(redis):
        trips = store.trips
        failures = await crowd(store)
        assert [type(failure) for failure in failures] == [StoreUnavailable] * 50
        assert len(await crowd(store)) == 50
        # Those who came later were not even sent.
        assert store.trips == trips + 1
        with pytest.raises(StoreUnavailable):
            await store.bump([ITEMS])
        assert len(await crowd(store)) == 50
        assert store.opened == 1


async def test_a_look_up_does_not_wait_as_long_as_a_write(
    store: RedisStore, redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("overdrive.cache.connection.DEADLINE", 600.0)
    await store.bump([ITEMS])
    with stopped(redis):
        write = asyncio.create_task(store.bump([ITEMS]))
        assert len(await crowd(store)) == 50
        assert not write.done()
    # What comes late is heard: the write's answer, and those nobody waits for any more.
    await write
    _, versions = await store.versions([ITEMS])
    assert versions == {ITEMS: 2}
    assert (store.opened, caplog.text.count("which no request waits for")) == (0, 1)


async def test_a_server_that_goes_on_is_found_by_one_probe(store: RedisStore, redis: Redis) -> None:
    await store.bump([ITEMS])
    with stopped(redis), pytest.raises(StoreUnavailable):
        await store.bump([ITEMS])
    connected = redis.info("stats")["total_connections_received"]
    for _ in range(500):
        if not await crowd(store):
            break
        await sleep(0.02)
    assert await crowd(store) == []
    assert redis.info("stats")["total_connections_received"] == connected + 1
    assert store.opened == 1


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_a_ping_does_not_wait_for_ever(mute: socket.socket, scheme: str) -> None:
    store = RedisStore(f"{scheme}://127.0.0.1:{mute.getsockname()[1]}/0", "test")
    with pytest.raises(ConfigurationError, match="cannot be reached"):
        await asyncio.wait_for(store.ping(), 30)
    await store.aclose()


async def test_one_probe_at_a_time(mute: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.link.FIRST_PAUSE", 0.0)
    store = RedisStore(f"redis://127.0.0.1:{mute.getsockname()[1]}/0", "test")
    assert len(await crowd(store)) == 50
    assert visitors(mute) == 1
    # The pause is over: one tries, and nobody waits for it.
    monkeypatch.setattr("overdrive.cache.connection.DEADLINE", 600.0)
    for _ in range(5):
        assert len(await asyncio.wait_for(crowd(store), 60)) == 50
        await sleep(0.01)
    assert visitors(mute) == 1
    await store.aclose()


Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


@asynccontextmanager
async def pretending(
    answer: Callable[[Reader, Writer], Awaitable[None]], max_bytes: int = 0
) -> AsyncIterator[RedisStore]:
    """A store on a server that does as `answer` does, after it has greeted."""

    async def serve(reader: Reader, writer: Writer) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"PING\r\n")
            writer.write(b"+PONG\r\n")
            await reader.readuntil(b"TIME\r\n")
            writer.write(b"$-1\r\n*2\r\n$1\r\n1\r\n$1\r\n1\r\n")
            await reader.readuntil(b"ZCARD")
            writer.write(b"*5\r\n:1\r\n:1\r\n:1\r\n*0\r\n*0\r\n")
            await answer(reader, writer)
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        store = RedisStore(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", "test", max_bytes)
        yield store
        await store.aclose()


async def test_a_server_that_hangs_up_when_it_is_to_push_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"HELLO")
        writer.close()

    async with pretending(answer, max_bytes=1_000_000) as store:
        for _ in range(3):
            assert len(await crowd(store, 5)) == 5
        assert store.opened == 1
    assert [record.getMessage() for record in caplog.records if "answers again" in record.message] == []


async def test_a_connection_that_is_gone_says_so_at_once() -> None:
    async def answer(reader: Reader, writer: Writer) -> None:
        await reader.read()

    async with pretending(answer) as store:
        link = store._link()
        assert isinstance(link, Link)
        connection = await store._address.connect(link)
        connection.close("gone")
        reply = await asyncio.wait_for(connection.ask("PING"), 5)
        assert str(reply) == "gone"
        await connection.closed


async def test_the_pauses_grow() -> None:
    """Although each probe finds Redis well, and what is asked then does not."""
    tried = 0

    async def answer(reader: Reader, writer: Writer) -> None:
        nonlocal tried
        tried += 1
        await reader.readuntil(b"MGET\r\n")
        writer.write(b"-LOADING Redis is loading the dataset in memory\r\n")

    async with pretending(answer) as store:
        failures: list[BaseException] = []
        for _ in range(100):
            failures += await crowd(store, 5)
            await sleep(0.01)
    assert [type(failure) for failure in failures] == [StoreUnavailable] * 500
    # In a second; ten times, if each pause were as short as the first may be. The last one may not have been used.
    assert 2 <= store.opened <= tried <= store.opened + 1 <= 7


async def test_a_reply_in_parts_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.connection.PATIENCE", 0.5)

    async def answer(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"MGET\r\n")
        writer.write(b"*4\r\n$10\r\nepoch")
        for part in (b" ", b"1", b"2", b"3", b"4", b"\r\n$-1\r\n$4\r\n2000\r\n$-1", b"\r\n"):
            await sleep(0.1)
            writer.write(part)

    async with pretending(answer) as store:
        assert (await store.load("key", "f")).instant == ("epoch", 1234)


async def test_a_server_that_is_behind_is_not_waited_for() -> None:
    async def answer(reader: Reader, writer: Writer) -> None:
        for _ in range(50):
            await reader.readuntil(b"SET\r\n")
            await sleep(0.01)
            writer.write(b"+OK\r\n")

    async with pretending(answer) as store:
        writes = asyncio.gather(*(store._link().ask("SET", "a", "b") for _ in range(50)))
        while store.trips < 50:
            await anyio.lowlevel.checkpoint()
        with pytest.raises(StoreUnavailable, match="no request waits for"):
            await store.load("key", "f")
        assert not writes.done()
        await writes


async def test_nonsense_is_a_failure() -> None:
    async def answer(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"MGET\r\n")
        writer.write(b"HTTP/1.1 400 Bad Request\r\n")

    async with pretending(answer) as store:
        with pytest.raises(StoreUnavailable, match="not understood"):
            await store.load("key", "f")
        assert store.opened == 1


async def test_a_server_that_restarts_while_nobody_asks_is_no_failure(store: RedisStore, start: Start) -> None:
    with start():
        await store.bump([ITEMS])
    with start():
        await sleep(0.05)
        assert (await store.load("key", "f")).instant.now == 0
    assert store.opened == 0


async def test_a_server_that_is_busy_is_away(store: RedisStore, redis: Redis) -> None:
    await store.bump([ITEMS])
    redis.config_set("lua-time-limit", 1)
    for times in (1, 2):
        busy = asyncio.create_task(asyncio.to_thread(loop_forever, redis))
        await sleep(0.1)
        with pytest.raises(StoreUnavailable):
            await store.bump([ITEMS])
        redis.script_kill()
        await busy
        await recovered(store)
        assert store.opened == times


def loop_forever(redis: Redis) -> None:
    with pytest.raises(ResponseError, match="killed"):
        redis.eval("while true do end", 0)


async def test_full_memory_refuses_fills_and_nothing_else(
    store: RedisStore, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(store)
    await ask(cache)
    redis.config_set("maxmemory", 1)
    assert [await ask(cache, "other"), await ask(cache, "other")] == ["miss", "miss"]
    assert await ask(cache) == "hit"
    assert (store.refused_fills, store.opened) == (2, 0)
    assert caplog.text.count("raise its maxmemory") == 1
    # A write that cannot be announced is not forgotten.
    await cache.invalidate("items")
    assert await ask(cache) == "bypass"
    redis.config_set("maxmemory", 0)
    assert [await ask(cache), await ask(cache), await ask(cache, "other")] == ["miss", "hit", "miss"]


async def test_a_replica_serves_until_there_is_a_write(
    store: RedisStore, redis: Redis, mute: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(store)
    await ask(cache)
    redis.replicaof("127.0.0.1", mute.getsockname()[1])
    assert await ask(cache) == "hit"
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="READONLY"):
            await store.bump([ITEMS])
        with pytest.raises(StoreUnavailable, match="READONLY"):
            await store.clear()
    assert caplog.text.count("read-only replica") == 1
    assert store.opened == 0
    await cache.invalidate("items")
    assert await ask(cache) == "bypass"
    redis.replicaof("NO", "ONE")
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


async def test_closing_gives_up_connecting(mute: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.connection.DEADLINE", 600.0)
    store = RedisStore(f"redis://127.0.0.1:{mute.getsockname()[1]}/0", "test")
    look_up = asyncio.create_task(store.load("key", "f"))
    await sleep(0.1)
    # Those who come later do not wait with the first.
    assert len(await asyncio.wait_for(crowd(store), 30)) == 50
    assert not look_up.done()
    await store.aclose()
    with pytest.raises(StoreUnavailable, match="closed"):
        await look_up


async def test_closing_fails_what_is_under_way(store: RedisStore, redis: Redis) -> None:
    await store.bump([ITEMS])
    with stopped(redis):
        write = asyncio.create_task(store.bump([ITEMS]))
        look_up = asyncio.create_task(store.load("key", "f"))
        await anyio.lowlevel.checkpoint()
        await store.aclose()
        for task in (write, look_up):
            with pytest.raises(StoreUnavailable, match="closed"):
                await task
