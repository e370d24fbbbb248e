"""The contract of the stores, for each of them; and what is Redis's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cache.exchanges import ITEMS, ask
from msgspec.structs import replace
from redis.asyncio import Redis

from overdrive import ConfigurationError
from overdrive.cache.cache import Cache
from overdrive.cache.entry import FORMAT, Entry
from overdrive.cache.redis import RedisStore
from overdrive.cache.store import MemoryStore, Store, StoreUnavailable
from overdrive.demo import servers

pytestmark = pytest.mark.anyio

OTHERS = "default/others"


@pytest.fixture
async def store(store_url: str | None) -> AsyncIterator[Store]:
    store = RedisStore(store_url, "test") if store_url else MemoryStore()
    yield store
    await store.aclose()


@pytest.fixture
def cache(store: Store) -> Cache:
    return Cache(store)


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[tuple[RedisStore, RedisStore]]:
    """Those of two workers."""
    stores = RedisStore(redis_url, "test"), RedisStore(redis_url, "test")
    yield stores
    for store in stores:
        await store.aclose()


@pytest.fixture
async def server(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as server:
        yield server


def entry(body: bytes) -> Entry:
    return Entry(FORMAT, "f", "epoch", {}, 0.0, 60.0, 200, [], body)


async def body(store: Store, key: str, fingerprint: str = "f") -> bytes | None:
    found = (await store.load(key, fingerprint)).entry
    return found.body if found is not None else None


# The contract


async def test_what_is_saved_is_found(store: Store) -> None:
    assert (await store.load("key", "f")).entry is None
    await store.save("key", entry(b"one"), 60)
    await store.save("key", entry(b"\0two"), 60)
    await store.save("other", entry(b"three"), 60)
    assert [await body(store, key) for key in ("key", "other")] == [b"\0two", b"three"]
    assert await body(store, "key", "another release's") is None


async def test_a_bump_moves_the_clock_and_the_tags_it_names(store: Store) -> None:
    epoch, before = await store.versions([ITEMS, OTHERS])
    await store.bump([ITEMS])
    await store.bump([ITEMS])
    same_epoch, after = await store.versions([ITEMS, OTHERS])
    assert same_epoch == epoch
    assert after == {ITEMS: before[ITEMS] + 2, OTHERS: before[OTHERS]}
    assert (await store.load("key", "f")).instant == (epoch, after[ITEMS])


async def test_no_tag_has_no_stamp(store: Store) -> None:
    epoch, versions = await store.versions([])
    assert (epoch, versions) == ((await store.load("key", "f")).instant.epoch, {})


async def test_clearing_begins_an_epoch(store: Store) -> None:
    epoch, _ = await store.versions([])
    await store.clear()
    new, _ = await store.versions([])
    assert new != epoch


async def test_seen_is_never_in_the_future(store: Store) -> None:
    await store.load("key", "f")
    seen = store.seen()
    assert seen is not None
    await store.bump([ITEMS])
    _, versions = await store.versions([ITEMS])
    assert seen.now < versions[ITEMS]
    assert (await store.load("key", "f")).instant == store.seen()


# What a cache makes of it


async def test_an_answer_is_kept_until_its_tag_is_written(cache: Cache) -> None:
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]
    await cache.store.bump([OTHERS])
    assert await ask(cache) == "hit"
    await cache.store.bump([OTHERS, ITEMS])
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


@pytest.mark.parametrize("forget", ["bump", "clear"])
async def test_what_was_written_while_it_was_read_is_not_kept(cache: Cache, forget: str) -> None:
    async def meanwhile() -> None:
        await (cache.store.bump([ITEMS]) if forget == "bump" else cache.store.clear())

    await ask(cache, meanwhile=meanwhile)
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


async def test_what_was_written_elsewhere_meanwhile_is(cache: Cache) -> None:
    assert await ask(cache, tags=(ITEMS, OTHERS)) == "miss"

    async def meanwhile() -> None:
        await cache.store.bump([OTHERS])

    await ask(cache, "other", meanwhile=meanwhile)
    assert await ask(cache, "other") == "hit"


async def test_clearing_forgets_answers_and_nothing_else(cache: Cache) -> None:
    for _ in range(3):
        await cache.store.bump([ITEMS])
    await ask(cache)
    await cache.clear()
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


async def test_an_entry_of_another_release_is_a_miss_and_is_replaced(cache: Cache) -> None:
    await cache.store.save("key", replace(entry(b"old"), fingerprint="another release's"), 60)
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


# The store inside the process


async def test_its_entries_take_no_more_than_they_may() -> None:
    store = MemoryStore(max_bytes=100_000)
    for number in range(50):
        await store.save(str(number), entry(b"x" * 9_000), 60)
    kept = [number for number in range(50) if await body(store, str(number)) is not None]
    assert len(kept) == 10
    await store.save("huge", entry(b"x" * 100_000), 60)
    assert await body(store, "huge") is None


async def test_what_is_asked_for_often_stays() -> None:
    store = MemoryStore(max_bytes=100_000)
    await store.save("often", entry(b"x" * 9_000), 60)
    for number in range(200):
        assert store.held("often") is None  # outdated, and yet asked for
        await store.load("often", "f")
        await store.save(str(number), entry(b"x" * 9_000), 60)
    assert await body(store, "often") is not None


async def test_tags_without_end_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.store._MOST_STAMPS", 100)
    store = MemoryStore()
    epoch, _ = await store.versions([])
    for number in range(102):
        await store.bump([f"call/{number}"])
    assert (await store.versions([]))[0] != epoch


async def test_what_is_held_is_not_outdated() -> None:
    store = MemoryStore()
    epoch, versions = await store.versions([ITEMS])
    kept = replace(entry(b"kept"), epoch=epoch, versions=versions)
    await store.save("key", kept, 60)
    assert [store.held("key"), store.held("other")] == [kept, None]
    await store.bump([OTHERS])
    assert store.held("key") is kept
    await store.bump([ITEMS])
    assert store.held("key") is None
    await store.save("key", kept, 60)
    assert store.held("key") is None
    await store.clear()
    await store.save("key", kept, 60)
    assert store.held("key") is None


# Redis


async def test_a_damaged_entry_is_a_miss_and_is_replaced(stores: tuple[RedisStore, RedisStore], server: Redis) -> None:
    cache = Cache(stores[0])
    await server.set("test:entry:key", b"\xffnonsense")
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


async def test_workers_share_entries_and_writes(stores: tuple[RedisStore, RedisStore]) -> None:
    one, other = map(Cache, stores)
    assert [await ask(one), await ask(other)] == ["miss", "hit"]
    await other.invalidate("items")
    assert [await ask(one), await ask(other)] == ["miss", "hit"]
    await one.clear()
    assert [await ask(other), await ask(one)] == ["miss", "hit"]


async def test_another_workers_write_refuses_a_fill(stores: tuple[RedisStore, RedisStore]) -> None:
    one, other = map(Cache, stores)
    await ask(one)
    await one.clear()
    await ask(one, meanwhile=lambda: other.invalidate("items"))
    assert await ask(one) == "miss"


async def test_prefixes_do_not_see_each_other(redis_url: str, server: Redis) -> None:
    one, other = Cache(RedisStore(redis_url, "one")), Cache(RedisStore(redis_url, "other"))
    assert [await ask(one), await ask(other)] == ["miss", "miss"]
    await one.invalidate("items")
    await one.clear()
    assert [await ask(other), await ask(one)] == ["hit", "miss"]
    async for key in server.scan_iter():
        assert key.startswith((b"one:", b"other:"))
    await one.store.aclose()
    await other.store.aclose()


async def test_time_to_live_is_redis_own(stores: tuple[RedisStore, RedisStore], server: Redis) -> None:
    await stores[0].save("long", entry(b""), 60)
    await stores[0].save("short", entry(b""), 0.0001)
    assert 50_000 < await server.pttl("test:entry:long") <= 60_000
    # A time to live of nothing would be refused.
    assert await server.pttl("test:entry:short") in (-2, 0, 1)


@pytest.mark.parametrize("lost", ["test:tag:default/items", "test:clock", "test:*"])
async def test_what_redis_has_evicted_is_not_taken_for_unchanged(
    stores: tuple[RedisStore, RedisStore], server: Redis, lost: str
) -> None:
    """The entry itself survives: everything else may be lost, together or by itself."""
    cache = Cache(stores[0])
    await cache.store.bump([ITEMS])
    await ask(cache, body=b"old")
    old = await server.get("test:entry:key")
    assert old is not None
    await cache.store.bump([ITEMS])

    async for key in server.scan_iter(lost):
        await server.delete(key)
    await server.set("test:entry:key", old)

    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


async def test_an_empty_redis_is_a_new_beginning(stores: tuple[RedisStore, RedisStore], server: Redis) -> None:
    cache = Cache(stores[0])
    await ask(cache)
    await server.flushdb()
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


@pytest.mark.parametrize("lost", ["test:tag:default/items", "test:clock"])
async def test_a_fill_over_an_eviction_is_sound(
    stores: tuple[RedisStore, RedisStore], server: Redis, lost: str
) -> None:
    cache = Cache(stores[0])
    await ask(cache)
    await cache.clear()

    async def written_and_evicted() -> None:
        await cache.store.bump([ITEMS])
        await server.delete(lost)

    await ask(cache, meanwhile=written_and_evicted)
    assert await ask(cache) == "miss"


async def test_a_crowd_is_no_outage(stores: tuple[RedisStore, RedisStore]) -> None:
    await asyncio.gather(*(stores[0].load(str(number), "f") for number in range(500)))


async def test_a_store_that_is_away_says_so(server_directory: Path) -> None:
    with servers.redis(server_directory) as url:
        store = RedisStore(url, "test")
        await store.ping()
    for method in (
        store.load("key", "f"),
        store.versions([ITEMS]),
        store.save("key", entry(b""), 1),
        store.bump([]),
        store.clear(),
    ):
        with pytest.raises(StoreUnavailable):
            await method
    secret = RedisStore(url.replace("://", "://user:secret@"), "test")
    with pytest.raises(ConfigurationError, match="cannot be reached") as raised:
        await secret.ping()
    assert "secret" not in str(raised.value)


def test_a_url_that_cannot_be_read_is_a_setting_that_cannot_work() -> None:
    with pytest.raises(ConfigurationError, match="redis://host"):
        RedisStore("localhost:6379", "test")


async def test_each_loop_has_connections_of_its_own(redis_url: str) -> None:
    store = RedisStore(redis_url, "test")

    async def visit() -> None:
        await store.bump([ITEMS])
        await store.aclose()

    await store.bump([ITEMS])
    await asyncio.to_thread(asyncio.run, visit())
    assert (await store.load("key", "f")).instant.now == 2
    await store.aclose()
