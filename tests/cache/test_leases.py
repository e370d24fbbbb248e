"""One execution for all who share a store: several caches over several connections stand for several processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from cache.exchanges import ask
from redis.asyncio import Redis
from support import eventually

from overdrive.cache.cache import Cache
from overdrive.cache.redis import RedisStore
from overdrive.cache.store import NOBODY_WAITS, MemoryStore
from overdrive.context import collectors
from overdrive.demo import servers

pytestmark = pytest.mark.anyio

Workers = list[Cache]


@pytest.fixture
async def workers(redis_url: str) -> AsyncIterator[Workers]:
    caches = [Cache(RedisStore(redis_url, "test")) for _ in range(3)]
    yield caches
    for cache in caches:
        await cache.store.aclose()


@pytest.fixture
async def server(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as server:
        yield server


class Work:
    """What is to be made once: it waits, and counts how often it runs, and how many of it at a time."""

    def __init__(self, then: Callable[[int], Any] = lambda run: run) -> None:
        self.runs = self.running = self.most = 0
        self.opened = asyncio.Event()
        self.tasks: list[asyncio.Task[Any] | None] = []
        self._then = then

    async def __call__(self) -> Any:
        self.runs += 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.tasks.append(asyncio.current_task())
        run = self.runs
        try:
            await self.opened.wait()
            result = self._then(run)
            return await result if asyncio.iscoroutine(result) else result
        finally:
            self.running -= 1


async def value(cache: Cache, work: Work) -> Any:
    """What the work makes, as a value."""
    return await cache.get_or_set("key", work, tags=["items"])


async def response(cache: Cache, work: Work) -> Any:
    """How a response is answered that takes the work to make."""
    return await ask(cache, meanwhile=work)


async def crowd(workers: Workers, work: Work, how: Callable[[Cache, Work], Any] = value, each: int = 5) -> list[Any]:
    """Ask every worker at once, and wait until all of them wait."""
    tasks = [asyncio.create_task(how(cache, work)) for cache in workers for _ in range(each)]
    await eventually(lambda: work.runs > 0)
    await asyncio.sleep(0.1)
    return tasks


async def leases(server: Redis) -> list[bytes | None]:
    return [await server.get(key) async for key in server.scan_iter("test:lease:*")]


async def eventually_empty(server: Redis) -> None:
    for _ in range(250):
        if not await leases(server):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(await leases(server))


@pytest.mark.parametrize("how", [value, response])
async def test_one_execution_for_all(workers: Workers, server: Redis, how: Any) -> None:
    work = Work()
    tasks = await crowd(workers, work, how)
    work.opened.set()
    answers = await asyncio.gather(*tasks)
    assert work.runs == 1
    assert answers == [1] * 15 if how is value else sorted(answers) == ["hit"] * 14 + ["miss"]
    await eventually_empty(server)


async def test_what_was_made_between_two_looks_is_not_made_again(workers: Workers) -> None:
    """The lease is free again, and whoever takes it then finds the entry."""
    one, other = workers[:2]
    work = Work()
    work.opened.set()
    load = other.store.load

    async def made_meanwhile(key: str, fingerprint: str) -> Any:
        found = await load(key, fingerprint)
        await value(one, work)
        return found

    other.store.load = made_meanwhile  # type: ignore[method-assign]
    assert await value(other, work) == 1
    assert work.runs == 1


@pytest.mark.parametrize("how", [value, response])
async def test_whoever_is_cancelled_hands_over(workers: Workers, how: Any) -> None:
    work = Work()
    alone = await crowd(workers[:1], work, how, each=1)
    tasks = await crowd(workers[1:], work, how)
    alone[0].cancel()
    await eventually(lambda: work.runs == 2)
    work.opened.set()
    answers = await asyncio.gather(*tasks)
    assert work.runs == 2
    assert answers == [2] * 10 if how is value else sorted(answers) == ["hit"] * 9 + ["miss"]


async def test_who_waits_may_leave(workers: Workers, server: Redis) -> None:
    work = Work()
    first = await crowd(workers[:1], work)
    waiting = await crowd(workers[1:2], work)
    waiting[0].cancel()
    await asyncio.sleep(0.1)
    work.opened.set()
    assert await asyncio.gather(*first, *waiting[1:]) == [1] * 9
    assert work.runs == 1
    await eventually_empty(server)


def broken(run: int) -> Any:
    raise LookupError(run)


def unknown(run: int) -> int:
    for reads in collectors():
        reads.unknown.append("a view")
    return run


@pytest.mark.parametrize("then", [broken, unknown])
async def test_what_is_not_for_others_makes_nobody_queue(workers: Workers, server: Redis, then: Any) -> None:
    """Each process goes ahead, all at once, and an error is the error of those who waited in that process."""
    leading, waiting = Work(then), Work(then)
    first = asyncio.create_task(workers[0].get_or_set("key", leading))
    await eventually(lambda: leading.runs == 1)
    others = [asyncio.create_task(cache.get_or_set("key", waiting)) for cache in workers[1:]]
    await asyncio.sleep(0.1)
    assert waiting.runs == 0
    leading.opened.set()
    await eventually(lambda: waiting.running == 2)
    assert await leases(server) == [NOBODY_WAITS.encode()]
    waiting.opened.set()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert [type(each) for each in results] == ([LookupError] if then is broken else [int]) * 3
    assert 0 < await server.pttl((await server.keys("test:lease:*"))[0]) <= 5000


async def test_a_leader_that_is_gone_is_followed_by_one(workers: Workers) -> None:
    """It does not renew its lease, and the others take turns."""
    work = Work()
    dead = await crowd(workers[:1], work, each=1)
    workers[0].store._link()._leases.clear()  # type: ignore[attr-defined]
    tasks = await crowd(workers[1:], work)
    await eventually(lambda: work.runs == 2)
    await asyncio.sleep(0.2)
    work.opened.set()
    assert set(await asyncio.gather(*tasks)) <= {1, 2}
    await dead[0]
    assert work.runs == 2


async def test_a_leader_that_takes_long_is_waited_for(workers: Workers) -> None:
    work = Work()
    tasks = await crowd(workers, work)
    await asyncio.sleep(2.5)
    work.opened.set()
    assert await asyncio.gather(*tasks) == [1] * 15
    assert work.runs == 1


async def test_patience_ends(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.flight._PATIENCE", 0.3)
    work = Work()
    first = await crowd(workers[:1], work, each=1)
    others = [asyncio.create_task(value(cache, work)) for cache in workers[1:]]
    await eventually(lambda: work.running == 3)
    work.opened.set()
    assert len(await asyncio.gather(*first, *others)) == 3


async def test_what_was_written_meanwhile_is_made_by_one_more(workers: Workers) -> None:
    """The first result is right for those who asked its worker before the write, and for nobody else."""
    work = Work()
    first = await crowd(workers[:1], work)
    await workers[2].invalidate("items")
    others = await crowd(workers[1:], work)
    work.opened.set()
    assert await asyncio.gather(*first) == [1] * 5
    assert await asyncio.gather(*others) == [2] * 10
    assert (work.runs, work.most) == (2, 1)


@pytest.mark.parametrize("how", [value, response])
async def test_what_is_refused_is_everybodys_who_asked_before(how: Any) -> None:
    cache = Cache(MemoryStore())
    work = Work()
    tasks = await crowd([cache], work, how)
    await cache.invalidate("items")
    work.opened.set()
    answers = await asyncio.gather(*tasks)
    assert answers == [1] * 5 if how is value else sorted(answers) == ["hit"] * 4 + ["miss"]
    assert work.runs == 1
    assert await how(cache, work) == (2 if how is value else "miss")


async def test_what_is_written_all_the_time_is_not_queued_for_without_end(redis_url: str) -> None:
    workers = [Cache(RedisStore(redis_url, "test")) for _ in range(8)]

    async def outdated(run: int) -> int:
        await workers[0].invalidate("items")
        # So long that nobody who waits overlooks that somebody else has taken over.
        await asyncio.sleep(0.2)
        return run

    work = Work(outdated)
    tasks = await crowd(workers, work, each=1)
    work.opened.set()
    assert sorted(await asyncio.gather(*tasks)) == list(range(1, 9))
    assert work.most == 6
    for cache in workers:
        await cache.store.aclose()


async def test_a_client_that_takes_its_time_keeps_no_other_worker_waiting(workers: Workers) -> None:
    work, taken = Work(), asyncio.Event()
    work.opened.set()
    slow = asyncio.create_task(ask(workers[0], meanwhile=work, taken=taken.wait))
    await eventually(lambda: work.runs == 1)
    assert await asyncio.wait_for(ask(workers[1], meanwhile=work), 5) == "hit"
    assert not slow.done()
    taken.set()
    assert await slow == "miss"


async def test_redis_leaves_while_they_wait(server_directory: Path) -> None:
    work = Work()
    with servers.redis(server_directory) as url:
        workers = [Cache(RedisStore(url, "test")) for _ in range(3)]
        tasks = await crowd(workers, work)
    await eventually(lambda: work.running == 3)
    work.opened.set()
    assert len(await asyncio.gather(*tasks)) == 15
    assert work.runs == 3


async def test_a_redis_that_refuses_leases_is_one_without(workers: Workers, server: Redis) -> None:
    """Full, it takes neither leases nor entries; each process makes its own, once."""
    for cache in workers:
        await cache.store.versions(["default/items"])
    await server.config_set("maxmemory", 1)
    try:
        work = Work()
        tasks = await crowd(workers, work)
        work.opened.set()
        assert len(await asyncio.gather(*tasks)) == 15
        assert work.runs == 3
    finally:
        await server.config_set("maxmemory", 0)


async def test_a_miss_is_one_round_trip_more(workers: Workers, server: Redis) -> None:
    """The lease and the second look go together; nobody waits for the lease to be given back."""
    cache, numbers = workers[0], count()

    async def load() -> int:
        return next(numbers)

    await cache.get_or_set("first", load, tags=["items"])
    await server.config_resetstat()
    store: Any = cache.store
    batched = store.batched
    await cache.get_or_set("second", load, tags=["items"])
    await eventually_empty(server)
    stats = await server.info("commandstats")
    calls = {name: stats[f"cmdstat_{name}"]["calls"] for name in ("mget", "set", "eval", "del")}
    assert calls == {"mget": 3, "set": 2, "eval": 1, "del": 1}
    assert store.batched - batched == 3


async def test_without_others_there_are_no_leases() -> None:
    store = MemoryStore()
    assert await store.claim("key", "f", "token") is None
    store.release("key", "token", alone=True)


async def test_a_lease_is_one_holders(workers: Workers) -> None:
    one, other = (cache.store for cache in workers[:2])
    for store in one, other:
        await store.load("key", "f")

    async def holder(store: Any, token: str) -> str:
        return (await store.claim("key", "f", token)).holder

    assert [await holder(one, ""), await holder(one, "a"), await holder(other, "b")] == ["", "a", "a"]
    other.release("key", "b", alone=False)
    assert await holder(other, "") == "a"
    one.release("key", "a", alone=False)
    assert [await holder(one, ""), await holder(other, "b")] == ["", "b"]
    other.release("key", "b", alone=True)
    assert [await holder(other, ""), await holder(one, "c")] == [NOBODY_WAITS] * 2
