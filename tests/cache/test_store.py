"""The contract of the stores, for each of them; and what is Redis's own."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cache.exchanges import ITEMS, ask
from msgspec.structs import replace
from redis.asyncio import Redis

from overdrive import ConfigurationError
from overdrive.cache.cache import Cache
from overdrive.cache.cluster import store_at
from overdrive.cache.entry import FORMAT, Entry
from overdrive.cache.redis import RedisStore
from overdrive.cache.store import MemoryStore, Store, StoreUnavailable
from overdrive.demo import servers

pytestmark = pytest.mark.anyio

OTHERS = "default/others"


@pytest.fixture
async def store(stores_url: str | None) -> AsyncIterator[Store]:
    store = store_at(stores_url, "test") if stores_url else MemoryStore()
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
    await cache.store.versions([])
    await server.set("test:entry:key", b"\xffnonsense")
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]
    # It is looked at again when its lease is taken.
    assert stores[0].unreadable == 2


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


async def trusted(store: RedisStore, server: Redis) -> None:
    """Do what the store's member does soon by itself: renew its lease where it was lost with everything else."""
    store.member()._call.set()
    while not await server.exists("test:trusted"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


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
    await trusted(stores[0], server)

    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]


async def test_an_empty_redis_is_a_new_beginning(stores: tuple[RedisStore, RedisStore], server: Redis) -> None:
    cache = Cache(stores[0])
    await ask(cache)
    await server.flushdb()
    assert await ask(cache) == "bypass"
    await trusted(stores[0], server)
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


async def commands(server: Redis) -> dict[str, int]:
    """The commands Redis has got since it was last asked this, with how often."""
    stats = await server.info("commandstats")
    await server.config_resetstat()
    calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}
    return {name: number for name, number in calls.items() if name not in ("info", "config", "config|resetstat")}


async def test_a_hit_is_one_command(stores: tuple[RedisStore, RedisStore], server: Redis) -> None:
    one, other = map(Cache, stores)
    await ask(one, tags=(ITEMS, OTHERS))
    # The other worker has to learn what the entry depends on.
    assert await ask(other) == "hit"
    await commands(server)
    for cache in (one, other):
        assert await ask(cache) == "hit"
        assert await commands(server) == {"mget": 1}


async def test_an_entry_with_other_tags_is_found(stores: tuple[RedisStore, RedisStore], server: Redis) -> None:
    one, other = map(Cache, stores)
    await ask(one)
    await other.invalidate("items")
    await ask(other, tags=(ITEMS, OTHERS))
    assert await ask(one) == "hit"
    await commands(server)
    assert await ask(one) == "hit"
    assert await commands(server) == {"mget": 1}
    await other.invalidate("others")
    assert await ask(one) == "miss"


async def test_the_look_ups_of_a_tick_are_one_command(stores: tuple[RedisStore, RedisStore], server: Redis) -> None:
    store = stores[0]
    epoch, versions = await store.versions([ITEMS])
    for number in range(10):
        kept = replace(entry(b"%d" % number), epoch=epoch, versions=versions)
        await store.save(str(number), kept, 60)
    await commands(server)
    trips, batched = store.trips, store.batched
    found = await asyncio.gather(*(store.load(str(number % 10), "f") for number in range(50)))
    assert [each.entry.body for each in found if each.entry] == [b"%d" % (number % 10) for number in range(50)]
    assert all(each.versions == versions for each in found)
    assert await commands(server) == {"mget": 1}
    assert (store.trips - trips, store.batched - batched) == (1, 50)


async def test_two_releases_that_ask_in_one_tick_do_not_get_each_others_entries(
    stores: tuple[RedisStore, RedisStore],
) -> None:
    await stores[0].versions([])
    await stores[0].save("key", entry(b"body"), 60)
    found = await asyncio.gather(*(stores[0].load("key", fingerprint) for fingerprint in ("f", "g", "f")))
    assert [each.entry is not None for each in found] == [True, False, True]


async def test_one_that_leaves_takes_nobody_along(stores: tuple[RedisStore, RedisStore]) -> None:
    await stores[0].versions([])
    await stores[0].save("key", entry(b"body"), 60)
    tasks = [asyncio.create_task(body(stores[0], "key")) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    assert await asyncio.gather(*tasks[1:]) == [b"body"] * 2
    assert tasks[0].cancelled()


async def test_what_is_remembered_of_keys_is_bounded(
    stores: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.cache.redis._REMEMBERED", 2)
    cache = Cache(stores[0])
    for key in "abac":
        await ask(cache, key)

    async def trips(key: str) -> int:
        before = stores[0].trips
        assert await ask(cache, key) == "hit"
        return stores[0].trips - before

    assert [await trips(key) for key in "acbba"] == [1, 1, 2, 1, 2]


async def test_scripts_are_sent_once(stores: tuple[RedisStore, RedisStore], server: Redis) -> None:
    await stores[0].load("key", "f")
    await server.script_flush()
    await commands(server)
    for times in (1, 0):
        await stores[0].bump([ITEMS])
        assert (await commands(server)).get("eval", 0) == times


async def test_an_epoch_that_ends_between_two_trips_ends_the_entry(
    stores: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = stores
    await ask(Cache(one))
    versions = other.versions

    async def cleared(tags: Collection[str]) -> tuple[str, dict[str, int]]:
        await one.clear()
        return await versions(tags)

    monkeypatch.setattr(other, "versions", cleared)
    assert (await other.load("key", "fingerprint")).entry is None


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
    with pytest.raises(ConfigurationError, match="unheard_of"):
        RedisStore("redis://localhost:6379?unheard_of=1", "test")


async def test_each_loop_has_connections_of_its_own(redis_url: str) -> None:
    store = RedisStore(redis_url, "test")

    async def visit() -> None:
        await store.bump([ITEMS])
        await store.aclose()

    await store.bump([ITEMS])
    await asyncio.to_thread(asyncio.run, visit())
    assert (await store.load("key", "f")).instant.now == 2
    await store.aclose()


def test_uvloop_is_a_loop_like_any_other(redis_url: str) -> None:
    async def visit() -> bytes | None:
        store = RedisStore(redis_url, "test")
        await store.versions([])
        await store.save("key", entry(b"body"), 60)
        found = await body(store, "key")
        await store.aclose()
        return found

    assert uvloop.run(visit()) == b"body"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_loop_that_was_held_up_reads_before_it_judges(redis_url: str, run: Callable[..., None]) -> None:

    async def visit() -> None:
        store = RedisStore(redis_url, "test")
        await store.versions([])
        trips = store.trips
        look_up = asyncio.create_task(store.load("key", "f"))
        while store.trips == trips:  # noqa: ASYNC110
            await asyncio.sleep(0)
        time.sleep(0.2)  # noqa: ASYNC251
        await look_up
        await store.aclose()

    run(visit())


# What the URL says


@asynccontextmanager
async def listening(
    redis_url: str, listen: Callable[..., Awaitable[asyncio.Server]], **where: Any
) -> AsyncIterator[asyncio.Server]:
    """Another way to the same Redis."""
    host, port = redis_url.removeprefix("redis://").removesuffix("/0").split(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, to_upstream = await asyncio.open_connection(host, port)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(copy(reader, to_upstream), copy(upstream, writer))
        served.set()

    served = asyncio.Event()
    server = await listen(serve, **where)
    yield server
    server.close()
    await served.wait()


async def test_a_unix_socket(redis_url: str, tmp_path: Path) -> None:
    async with listening(redis_url, asyncio.start_unix_server, path=tmp_path / "redis"):
        store = RedisStore(f"unix://{tmp_path / 'redis'}", "test")
        await store.bump([ITEMS])
        assert (await store.load("key", "f")).instant.now == 1
        await store.aclose()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of localhost, and its key, in one file."""
    path = tmp_path / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", tmp_path / "cert"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *names], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (tmp_path / "cert").read_bytes())
    return path


async def test_tls(redis_url: str, certificate: Path) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    async with listening(redis_url, asyncio.start_server, host="localhost", port=0, ssl=tls) as server:
        where = f"rediss://localhost:{server.sockets[0].getsockname()[1]}/0"
        store = RedisStore(f"{where}?ssl_ca_certs={certificate}", "test")
        await store.bump([ITEMS])
        assert (await store.load("key", "f")).instant.now == 1
        await store.aclose()
        unknown = RedisStore(where, "test")
        with pytest.raises(ConfigurationError, match="certificate"):
            await unknown.ping()
        await unknown.aclose()


async def test_a_database_and_a_name(redis_url: str, server: Redis) -> None:
    store = RedisStore(redis_url.removesuffix("/0") + "/3?client_name=overdrive", "test")
    await store.bump([ITEMS])
    clients = [(client["name"], client["db"]) for client in await server.client_list()]
    assert ("overdrive", "3") in clients
    assert not await server.exists("test:clock")
    await store.clear()
    await store.aclose()


@pytest.fixture
def own_server(server_directory: Path) -> Iterator[str]:
    """A Redis that a test may change as it likes."""
    with servers.redis(server_directory) as url:
        yield url


async def test_a_user_and_a_password(own_server: str) -> None:
    async with Redis.from_url(own_server) as server:
        await server.acl_setuser("app", enabled=True, passwords=["+p@ss"], keys=["*"], commands=["+@all"])
        await server.config_set("requirepass", "secret")
    for login in ("app:p%40ss@", ":secret@"):
        store = RedisStore(own_server.replace("://", f"://{login}"), "test")
        await store.ping()
        await store.aclose()


@pytest.mark.parametrize("login", ["", "app:wr0ng@", "nobody:wr0ng@", ":wr0ng@", "reader:p%40ss@"])
async def test_a_login_that_is_refused_is_a_setting_to_correct(own_server: str, login: str) -> None:
    async with Redis.from_url(own_server) as server:
        await server.acl_setuser("app", enabled=True, passwords=["+p@ss"], keys=["*"], commands=["+@all"])
        await server.acl_setuser("reader", enabled=True, passwords=["+p@ss"], keys=["*"], commands=["+@read", "+ping"])
        await server.config_set("requirepass", "secret")
    url = own_server.replace("://", f"://{login}") + "?password=wr0ng" * (not login)
    store = RedisStore(url, "test")
    with pytest.raises(ConfigurationError, match="correct the user name and password there") as raised:
        await store.ping()
    assert not any(secret in str(raised.value) for secret in ("wr0ng", "p@ss", "p%40ss"))
    with pytest.raises(StoreUnavailable):
        await store.bump([ITEMS])
    await store.aclose()


async def test_a_password_that_redis_does_not_have_is_a_setting_to_correct(redis_url: str) -> None:
    store = RedisStore(redis_url.replace("://", "://:wr0ng@"), "test")
    with pytest.raises(ConfigurationError, match="correct the user name and password there"):
        await store.ping()
    await store.aclose()
