"""Redis Cluster: which node is asked for what, and what befalls nodes. The contract is in test_store."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cache.cluster import RedisCluster, redis_cluster
from cache.exchanges import ITEMS, ask
from cache.service import Service, serve
from redis import Redis
from redis.crc import key_slot
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item

from overdrive import ConfigurationError
from overdrive.cache.cache import Cache
from overdrive.cache.cluster import ClusterStore, slots_of, store_at
from overdrive.cache.entry import FORMAT, Entry
from overdrive.cache.redis import RedisStore
from overdrive.cache.store import StoreUnavailable

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(cluster: RedisCluster) -> AsyncIterator[RedisStore]:
    store = store_at(cluster.url, "test")
    yield store
    await store.aclose()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    """A cluster whose nodes a test may end."""
    with redis_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def own_store(own_cluster: RedisCluster) -> AsyncIterator[RedisStore]:
    store = store_at(own_cluster.url, "test")
    yield store
    await store.aclose()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is in earnest."""
    monkeypatch.setattr("overdrive.cache.connection.PATIENCE", 0.05)
    monkeypatch.setattr("overdrive.cache.connection.DEADLINE", 0.5)


def entry(body: bytes) -> Entry:
    return Entry(FORMAT, "f", "epoch", {}, 0.0, 60.0, 200, [], body)


async def body(store: RedisStore, key: str) -> bytes | None:
    found = (await store.load(key, "f")).entry
    return found.body if found is not None else None


async def healed(store: RedisStore) -> None:
    for _ in range(1000):
        try:
            await store.bump([])
            await store.load("key", "f")
        except StoreUnavailable:
            await asyncio.sleep(0.02)
        else:
            return
    raise AssertionError("not healed")


async def until_hit(cache: Cache, key: str) -> None:
    for _ in range(1000):
        if await ask(cache, key) == "hit":
            return
        await asyncio.sleep(0.02)
    raise AssertionError("not healed")


def said(node: Redis, error: str) -> int:
    """How often a node has given this answer."""
    stat = node.info("errorstats").get(f"errorstat_{error}", {"count": 0})
    return int(stat["count"])


# Where things are


def test_the_map_of_the_slots() -> None:
    replica = [b"10.0.0.9", 7009, b"id"]
    slots = slots_of(
        [[0, 5, [b"10.0.0.1", 7001, b"a"], replica], [7, 16383, [b"", 7002, b"b"]], [6, 6, [None, 7003]]], "asked"
    )
    assert (slots[0], slots[5]) == (("10.0.0.1", 7001),) * 2
    assert (slots[6], slots[7], slots[16383]) == (("asked", 7003), ("asked", 7002), ("asked", 7002))
    assert len(slots) == 16384
    assert slots_of([[1, 1, [b"h", 1]]], "asked")[:3] == [None, ("h", 1), None]


async def test_entries_are_on_all_nodes_and_versions_on_one(store: RedisStore, cluster: RedisCluster) -> None:
    cache = Cache(store)
    for number in range(30):
        await ask(cache, str(number))
    held = [{name.partition(b":")[0] for name in node.scan_iter()} for node in cluster.nodes]
    assert held == [{b"test", b"{test}"}, {b"test"}, {b"test"}]
    assert {await ask(cache, str(number)) for number in range(30)} == {"hit"}
    await cache.invalidate("items")
    assert {await ask(cache, str(number)) for number in range(30)} == {"miss"}


async def test_workers_share_what_is_there(store: RedisStore, cluster: RedisCluster) -> None:
    other = store_at(cluster.url.replace(str(cluster.ports[2]), str(cluster.ports[1])), "test")
    assert [await ask(Cache(store)), await ask(Cache(other))] == ["miss", "hit"]
    await Cache(other).invalidate("items")
    assert await ask(Cache(store)) == "miss"
    await other.aclose()


async def test_who_asks_for_the_same_at_once_waits_for_one_answer(store: RedisStore, cluster: RedisCluster) -> None:
    await store.save("key", entry(b"body"), 60)
    for node in cluster.nodes:
        node.config_resetstat()
    tasks = [asyncio.create_task(body(store, "key")) for _ in range(50)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    assert await asyncio.gather(*tasks[1:]) == [b"body"] * 49
    stats = [node.info("commandstats") for node in cluster.nodes]
    assert sum(each.get("cmdstat_get", {"calls": 0})["calls"] for each in stats) == 1
    assert [each.get("cmdstat_mget", {"calls": 0})["calls"] for each in stats] == [1, 0, 0]


# Slots that move


async def test_a_slot_that_has_moved_is_followed_once(store: RedisStore, cluster: RedisCluster) -> None:
    key = cluster.key_at(1)
    slot = key_slot(f"test:entry:{key}".encode())
    await store.save(key, entry(b"body"), 60)
    before = said(cluster.nodes[1], "MOVED")
    cluster.move(slot, 1, 2)
    try:
        assert [await body(store, key) for _ in range(3)] == [b"body"] * 3
        assert said(cluster.nodes[1], "MOVED") == before + 1
        await store.save(key, entry(b"new"), 60)
        assert await body(store, key) == b"new"
        assert store.opened == 0
    finally:
        cluster.move(slot, 2, 1)
    assert await body(store, key) == b"new"


async def test_a_slot_that_is_moving_is_looked_for_on_both_nodes(store: RedisStore, cluster: RedisCluster) -> None:
    key = cluster.key_at(1)
    name = f"test:entry:{key}"
    slot = key_slot(name.encode())
    await store.save(key, entry(b"body"), 60)
    cluster.begin_to_move(slot, 1, 2)
    try:
        assert await body(store, key) == b"body"
        cluster.move_keys(slot, 1, 2)
        found = await asyncio.gather(*(body(store, each) for each in (key, "other", cluster.key_at(2), "another", key)))
        assert found == [b"body", None, None, None, b"body"]
        await store.save(key, entry(b"new"), 60)
        assert await body(store, key) == b"new"
        assert said(cluster.nodes[1], "ASK") > 0
        assert store.opened == 0
    finally:
        cluster.move_keys(slot, 1, 2)
        cluster.hand_over(slot, 1, 2)
        cluster.move(slot, 2, 1)


async def test_while_the_clock_moves_nothing_is_served(
    store: RedisStore, cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(store)
    old = slots_of(cluster.nodes[2].execute_command("CLUSTER SLOTS"), "127.0.0.1")
    slot = key_slot(b"{test}")
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]
    cluster.begin_to_move(slot, 0, 1)
    try:
        cluster.move_keys(slot, 0, 1)
        assert await ask(cache) == "bypass"
        # A write is remembered until it can be announced.
        await cache.invalidate("items")
        assert await ask(cache) == "bypass"
        cluster.hand_over(slot, 0, 1)
        # As where the node that is asked for the map has not heard of the move.
        with monkeypatch.context() as patch:
            patch.setattr("overdrive.cache.cluster.slots_of", lambda _reply, _asked: list(old))
            late = store_at(cluster.url, "test")
            await late.bump([])
            await late.aclose()
        await healed(store)
        assert [await ask(cache), await ask(cache)] == ["miss", "hit"]
        await cache.invalidate("items")
        assert await ask(cache) == "miss"
        assert store.opened == 0
    finally:
        cluster.move(slot, 1, 0)


# Nodes that go away


@pytest.mark.usefixtures("impatient")
async def test_a_node_takes_its_entries_along_and_no_others(
    own_store: RedisStore, own_cluster: RedisCluster, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [own_cluster.key_at(node) for node in range(3)]
    cache = Cache(own_store)
    assert [await ask(cache, key) for key in keys] == ["miss"] * 3
    own_cluster.stop(1)
    for _ in range(3):
        assert [await ask(cache, key) for key in keys] == ["hit", "miss", "hit"]
    with pytest.raises(StoreUnavailable):
        await own_store.save(keys[1], entry(b""), 60)
    await cache.invalidate("items")
    assert [await ask(cache, key) for key in keys] == ["miss"] * 3
    assert own_store.opened == 1
    assert f":{own_cluster.ports[1]} does not answer and is left alone" in caplog.text
    own_cluster.start(1)
    await until_hit(cache, keys[1])


@pytest.mark.usefixtures("impatient")
async def test_the_store_is_away_with_the_clocks_node(own_store: RedisStore, own_cluster: RedisCluster) -> None:
    cache = Cache(own_store)
    key = own_cluster.key_at(1)
    await ask(cache, key)
    epoch, _ = await own_store.versions([])
    own_cluster.stop(0)
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await own_store.load(key, "f")
        with pytest.raises(StoreUnavailable):
            await own_store.bump([ITEMS])
    assert await ask(cache, key) == "bypass"
    own_cluster.start(0)
    await healed(own_store)
    assert (await own_store.versions([]))[0] != epoch
    assert [await ask(cache, key), await ask(cache, key)] == ["miss", "hit"]


@contextmanager
def stopped(node: Redis) -> Iterator[None]:
    """A node keeps its connections and says nothing."""
    process = node.info()["process_id"]
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("silent", [0, 1])
async def test_a_node_that_says_nothing_is_not_waited_for(
    store: RedisStore, cluster: RedisCluster, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.cache.connection.DEADLINE", 600.0)
    cache = Cache(store)
    keys = [cluster.key_at(node) for node in range(3)]
    for key in keys * 2:
        await ask(cache, key)
    with stopped(cluster.nodes[silent]):
        trips = store.trips
        if silent:
            for sent in (4, 3):
                looking = (store.load(key, "fingerprint") for key in keys)
                found = await asyncio.wait_for(asyncio.gather(*looking), 20)
                assert [each.entry is not None for each in found] == [True, False, True]
                # Its entries are not even asked for any more.
                trips += sent
                assert store.trips == trips
        else:
            with pytest.raises(StoreUnavailable, match="no request waits for"):
                await store.load(keys[1], "f")
            # The entry was asked for without waiting for the clock.
            assert store.trips == trips + 2
    for key in keys:
        await until_hit(cache, key)


async def test_a_replica_that_has_not_heard_of_a_write_brings_no_entry_back(
    store: RedisStore, cluster: RedisCluster
) -> None:
    """It takes over with the clock and the stamps as they were before that write."""
    cache, node = Cache(store), cluster.nodes[0]
    await cache.invalidate("items")
    await ask(cache)
    old = {name: node.get(name) for name in node.scan_iter("{test}:*", _type="string")}
    await cache.invalidate("items")
    node.mset({name: value for name, value in old.items() if value is not None})
    node.execute_command("DEBUG", "CHANGE-REPL-ID")
    node.client_kill_filter(_type="normal", skipme=True)
    # The connection is lost while nobody asks.
    await asyncio.sleep(0.1)
    await healed(store)
    assert [await ask(cache), await ask(cache)] == ["miss", "hit"]
    # The same history is the same epoch.
    node.client_kill_filter(_type="normal", skipme=True)
    await healed(store)
    assert await ask(cache) == "hit"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("node", [0, 1])
async def test_a_replica_takes_over(own_store: RedisStore, own_cluster: RedisCluster, node: int) -> None:
    cache, key = Cache(own_store), own_cluster.key_at(1)
    replica = own_cluster.add_replica(node)
    assert [await ask(cache, key), await ask(cache, key)] == ["miss", "hit"]
    epoch, _ = await own_store.versions([])
    own_cluster.nodes[node].wait(1, 5000)
    own_cluster.stop(node)
    assert await ask(cache, key) == ("bypass" if node == 0 else "miss")
    own_cluster.take_over(replica, node)
    await healed(own_store)
    # Under another clock no entry is what it was.
    assert ((await own_store.versions([]))[0] == epoch) == (node == 1)
    if node == 0:
        assert await ask(cache, key) == "miss"
    await until_hit(cache, key)


async def test_closing_gives_up_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.connection.DEADLINE", 600.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        store = store_at(f"redis+cluster://127.0.0.1:{mute.getsockname()[1]}", "test")
        write = asyncio.create_task(store.bump([ITEMS]))
        await asyncio.sleep(0.05)
        await store.aclose()
        with pytest.raises(StoreUnavailable, match="closed"):
            await write


async def test_each_loop_has_connections_of_its_own(store: RedisStore) -> None:
    async def visit() -> None:
        await store.bump([ITEMS])
        await store.aclose()

    await store.bump([ITEMS])
    await asyncio.to_thread(asyncio.run, visit())
    assert (await store.load("key", "f")).instant.now == 2


# What the URL says


async def test_a_cluster_answers_a_ping(store: RedisStore) -> None:
    await store.ping()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis+cluster://h:6379/3", "leave /3 out"),
        ("redis+cluster://h:6379?unheard_of=1", "unheard_of"),
        ("redis+cluster://h:port", r"redis\+cluster://host"),
        ("unix+cluster:///socket", r"redis\+cluster://host"),
        ("redis+clutter://h:6379", r"redis\+cluster://host"),
    ],
)
def test_a_url_that_cannot_be_read_is_a_setting_that_cannot_work(url: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        store_at(url, "test")


def test_a_prefix_that_would_part_the_clock_from_the_tags() -> None:
    with pytest.raises(ConfigurationError, match="closing brace"):
        store_at("redis+cluster://h", "}x")


@pytest.mark.parametrize("prefix", ["a", "{a", "a}b", "{a}", "{}"])
def test_the_clock_and_the_tags_are_in_one_slot(prefix: str) -> None:
    store = ClusterStore("redis+cluster://h", prefix)
    names = [store.clock, store._history, *store._names(["{x}", "y"]).values()]
    assert len({key_slot(name.encode()) for name in names}) == 1


async def test_what_the_url_says_holds_for_all_nodes() -> None:
    store = ClusterStore("rediss+cluster://app:p%40ss@h:1?client_name=me&ssl_check_hostname=false", "test")
    for host in ("::1", "other"):
        parts = store._address_of((host, 7001))._parts
        assert (parts.host, parts.port, parts.username, parts.password) == (host, 7001, "app", "p@ss")
        assert (parts.client_name, type(parts).__name__) == ("me", "SSLConnection")


async def test_a_user_and_a_password(cluster: RedisCluster) -> None:
    for node in cluster.nodes:
        node.acl_setuser("app", enabled=True, passwords=["+p@ss"], keys=["*"], commands=["+@all"])
    try:
        store = store_at(cluster.url.replace("://", "://app:p%40ss@"), "test")
        await store.ping()
        assert [await ask(Cache(store), key) for key in "abcabc"] == ["miss"] * 3 + ["hit"] * 3
        await store.aclose()
        store = store_at(cluster.url.replace("://", "://app:wr0ng@"), "test")
        with pytest.raises(ConfigurationError, match="correct the user name and password there") as raised:
            await store.ping()
        assert "wr0ng" not in str(raised.value)
        await store.aclose()
    finally:
        for node in cluster.nodes:
            node.acl_deluser("app")


async def test_a_cluster_that_is_away_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    store = store_at(f"redis+cluster://user:secret@127.0.0.1:{port}", "test")
    with pytest.raises(ConfigurationError, match=rf"redis\+cluster://127.0.0.1:{port} cannot be reached") as raised:
        await store.ping()
    assert "secret" not in str(raised.value)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await store.load("key", "f")
    await store.aclose()


async def test_one_server_is_no_cluster(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    store = store_at(redis_url.replace("redis://", "redis+cluster://"), "test")
    with pytest.raises(ConfigurationError, match="is not a cluster: redis_url must begin with redis://"):
        await store.ping()
    with pytest.raises(StoreUnavailable, match="cluster support disabled"):
        await store.load("key", "f")
    assert "cluster support disabled" in caplog.text
    await store.aclose()


@pytest.mark.parametrize("node", [0, 1, 2])
async def test_a_cluster_is_not_one_server(cluster: RedisCluster, node: int, caplog: pytest.LogCaptureFixture) -> None:
    store = RedisStore(f"redis://127.0.0.1:{cluster.ports[node]}/0", "test")
    with pytest.raises(ConfigurationError, match=r"must begin with redis\+cluster://"):
        await store.ping()
    with pytest.raises(StoreUnavailable):
        await store.load("key", "f")
    assert caplog.text.count("must begin with redis+cluster://") == 1
    await store.aclose()


# A service


@pytest.fixture
async def service(sqlite_url: str, cluster: RedisCluster) -> AsyncIterator[Service]:
    async with serve(sqlite_url, cluster.url) as running:
        yield running


async def test_a_service_on_a_cluster(service: Service) -> None:
    async def add(db: AsyncSession) -> None:
        db.add(Item(name="new"))

    assert await service.marks("/names", "/names") == ["miss", "hit"]
    assert await service.write(add) == 200
    answer = await service.get()
    assert (answer.headers["x-cache"], answer.json()) == ("miss", ["first", "new"])
    assert await service.marks("/names") == ["hit"]
