"""Entries and versions in Redis Cluster: a store over many servers, each of which has a share of the keys.

The clock, the tags and the leases lie in one slot, which their hash tag names: `{overdrive}:clock` and so on. So one
node has them all, one MGET reads them as of one moment, and the scripts move them together. The entries are spread
over the slots of all nodes (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/).

A look-up asks the entry's node and the clock's node at the same time, and which answers first does not matter. What
an entry says of itself, that its answer is right while its tags have these stamps in this epoch, stays true
whenever the entry was read. Whether they have them is read from the clock's node, at one moment between the look-up's
beginning and its end: after every write that was answered before, and before whatever the request reads next.

A replica that takes over may not have heard of the last writes, and a stamp would be what it was before them. So the
clock's node is asked whether it is the one that was used before (`scripts.SAME_HISTORY`) where it may be another: a
replica that was promoted, a server that restarted, the node that the slot has moved to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from overdrive.errors import ConfigurationError

from . import connection as wire
from . import link as links
from .connection import Address, key_slot
from .link import Answer, Link
from .near import Near
from .redis import RedisStore
from .store import StoreUnavailable

T = TypeVar("T")

#: A node's host and port.
Node = tuple[str, int]

_SLOTS = 16_384

_SCHEMES = ("redis+cluster", "rediss+cluster")

_NO_CLUSTER = "cluster support disabled"


def store_at(url: str, prefix: str, max_bytes: int = 0) -> RedisStore:
    """Return the store that a URL names: on one server, or `redis+cluster://`, `rediss+cluster://` on a cluster.

    max_bytes: what entries may take in this process besides; with a cluster none are there.

    Raises `ConfigurationError` for a URL that cannot be read.
    """
    if url.partition("://")[0] in _SCHEMES:
        return ClusterStore(url, prefix)
    return RedisStore(url, prefix, max_bytes)


def slots_of(reply: Iterable[Any], asked: str) -> list[Node | None]:
    """Return the node that serves each slot, by the reply to CLUSTER SLOTS.

    asked: the host that has replied, which a node that does not know its own address leaves out.
    """
    slots: list[Node | None] = [None] * _SLOTS
    for first, last, (host, port, *_), *_replicas in reply:
        slots[first : last + 1] = [((host or b"").decode() or asked, port)] * (last + 1 - first)
    return slots


class ClusterStore(RedisStore):
    """A store that all workers share, over the nodes of a Redis Cluster.

    url: where one node is, any of them: `redis+cluster://host:port`, or `rediss+cluster://` with TLS. User,
        password and options hold for all nodes.
    prefix: what every key starts with.

    A node that is away takes its entries along: they are misses. With the clock's node the store is away.
    Raises `ConfigurationError` for a URL that cannot be read, or names a database other than 0.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self._node_url = url.replace("+cluster://", "://", 1)
        super().__init__(self._node_url, prefix)
        if self._address.database:
            raise ConfigurationError(
                f"a Redis Cluster has one database: leave /{self._address.database} out of its URL"
            )
        if prefix.startswith("}"):
            raise ConfigurationError("with a Redis Cluster, the cache's prefix must not start with a closing brace")
        self._url = url

    def _base_of(self, prefix: str) -> str:
        # Names with the same hash tag lie in the same slot.
        return f"{{{prefix}}}"

    def _new_route(self, loop: asyncio.AbstractEventLoop) -> Cluster:
        seed = urlsplit(self._node_url)
        return Cluster(self, loop, (seed.hostname or "localhost", seed.port or 6379))

    def new_link(self, cluster: Cluster, loop: asyncio.AbstractEventLoop, node: Node) -> NodeLink:
        """Return a link to a node."""
        return NodeLink(cluster, self, loop, self._address_of(node), node[0], (self._clock, self._switches))

    def _address_of(self, node: Node) -> Address:
        url, (host, port) = urlsplit(self._node_url), node
        user, at, _ = url.netloc.rpartition("@")
        return Address(url._replace(netloc=f"{user}{at}{f'[{host}]' if ':' in host else host}:{port}").geturl())

    @property
    def clock(self) -> str:
        """The clock's name in Redis."""
        return self._clock

    async def _visit(self) -> None:
        try:
            (reply,) = await self._demand(self._address, ("CLUSTER", "SLOTS"))
        except StoreUnavailable as error:
            if _NO_CLUSTER not in str(error):
                raise
            raise ConfigurationError(
                f"Redis at {self._address.where} is not a cluster: redis_url must begin with redis://, "
                "or rediss:// with TLS"
            ) from None
        node = slots_of(reply, urlsplit(self._node_url).hostname or "localhost")[key_slot(self._clock.encode())]
        if node is None:
            raise StoreUnavailable(f"no node of the cluster serves the slot of {self._clock}")
        await self._demand(self._address_of(node), ("MGET", self._clock), self.compare_history(), self._beginning())


class Cluster:
    """From one event loop to the nodes of a cluster: a link to each, and which of them serves what.

    seed: the node that the URL names, which is asked when no other answers.
    """

    near: Near | None = None
    is_told = False

    def __init__(self, store: ClusterStore, loop: asyncio.AbstractEventLoop, seed: Node) -> None:
        self._store = store
        self._loop = loop
        self._clock_slot = key_slot(store.clock.encode())
        self._links: dict[Node, NodeLink] = {}
        self._link(seed)
        #: The node of each slot; None until they are learnt, and when a node was found to be away.
        self._slots: list[Node | None] | None = None
        #: The connection on which the clock's history was compared: what another one would read is not trusted.
        self._trusted: object = None
        self._learning: asyncio.Task[None] | None = None
        self._retry_at = float("-inf")
        self._why = ""
        #: The entries that are on their way.
        self._reading: dict[str, asyncio.Task[bytes | None]] = {}

    async def read(self, names: Collection[str]) -> Answer:
        """Return the clock and what lies under `names`; nothing under an entry whose node is away."""
        versions = [name for name in names if self._is_by_the_clock(name)]
        entries = {name: self._entry(name) for name in names if not self._is_by_the_clock(name)}
        answer = await self._sent(self._clock_slot, lambda link: link.read(versions), patient=False)
        for name, entry in entries.items():
            # Not awaited itself: others wait for it too, and who is cancelled would take it along.
            await asyncio.wait([entry])
            answer.values[name] = entry.result()
        return answer

    def _is_by_the_clock(self, name: str) -> bool:
        return key_slot(name.encode()) == self._clock_slot

    def _entry(self, name: str) -> asyncio.Task[bytes | None]:
        task = self._reading.get(name)
        if task is None:
            task = self._reading[name] = self._loop.create_task(self._read_entry(name))
        return task

    async def _read_entry(self, name: str) -> bytes | None:
        try:
            value: bytes | None = await self.ask("GET", name, patient=False)
        except StoreUnavailable:
            return None
        else:
            return value
        finally:
            del self._reading[name]

    async def ask(self, *command: str | int | bytes, patient: bool = True) -> Any:
        """Send one command to the node that serves its first key, and return the reply."""
        key = command[3] if command[0] in ("EVAL", "EVALSHA") else command[1]
        slot = key_slot(str(key).encode())

        async def send(link: NodeLink) -> Any:
            try:
                return await link.ask(*command, patient=patient)
            except StoreUnavailable as error:
                other = self._link(_redirected(error, "ASK", link))
            # Both are sent before anything else can be: ASKING holds for the one command that follows it.
            return (await asyncio.gather(other.ask("ASKING"), other.ask(*command, patient=patient)))[1]

        return await self._sent(slot, send, patient=patient)

    def post(self, *command: str | int | bytes) -> asyncio.Future[StoreUnavailable | None]:
        """Send a command to the clock's node without waiting; the result is its error, if any."""
        return self._by_the_clock().post(*command)

    def hold(self, lease: str, token: str) -> None:
        """Renew a lease until it is let go."""
        self._by_the_clock().hold(lease, token)

    def let_go(self, token: str) -> None:
        """Renew a lease no longer."""
        for link in self._links.values():
            link.let_go(token)

    def _by_the_clock(self) -> NodeLink:
        node = self._slots[self._clock_slot] if self._slots is not None else None
        # Any other node refuses, and a lease that is not given back runs out.
        return self._link(node) if node is not None else next(iter(self._links.values()))

    async def _sent(self, slot: int, send: Callable[[NodeLink], Awaitable[T]], *, patient: bool) -> T:
        link = await self._serving(slot, patient)
        try:
            return await send(link)
        except StoreUnavailable as error:
            node = _redirected(error, "MOVED", link)
            if self._slots is not None:
                self._slots[slot] = node
        return await send(await self._serving(slot, patient))

    async def _serving(self, slot: int, patient: bool) -> NodeLink:
        """Return the link to the node that serves a slot, once the clock's can be trusted."""
        if not self._is_ready():
            await asyncio.wait([self._learning or self._learn()], timeout=_patience(patient))
            if not self._is_ready():
                raise StoreUnavailable(self._why)
        assert self._slots is not None
        return self._keeper(self._slots, slot)

    def _is_ready(self) -> bool:
        if self._slots is None or self._trusted is None:
            return False
        clock = self._slots[self._clock_slot]
        return clock is not None and self._link(clock).connection is self._trusted

    def _keeper(self, slots: list[Node | None], slot: int) -> NodeLink:
        node = slots[slot]
        if node is None:
            raise StoreUnavailable(f"no node of the cluster serves slot {slot}")
        return self._link(node)

    def _link(self, node: Node) -> NodeLink:
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = self._store.new_link(self, self._loop, node)
        return link

    def forget(self) -> None:
        """Take note that a node is away: another one may serve its slots by now."""
        self._slots = None

    def _learn(self) -> asyncio.Task[None]:
        if self._loop.time() < self._retry_at:
            raise StoreUnavailable(self._why)
        self._why = "the cluster's nodes are not known yet"
        self._learning = self._loop.create_task(self._try_to_learn())
        return self._learning

    async def _try_to_learn(self) -> None:
        try:
            slots = self._slots or await self._ask_for_slots()
            clock = await self._clock_with_its_history(slots)
            # Who found a node to be away meanwhile has no newer map than this one.
            self._slots, self._trusted = slots, clock.connection
        except StoreUnavailable as error:
            self._slots, self._why = None, str(error)
            self._retry_at = self._loop.time() + links.FIRST_PAUSE
        finally:
            self._learning = None

    async def _clock_with_its_history(self, slots: list[Node | None]) -> NodeLink:
        link = self._keeper(slots, self._clock_slot)
        try:
            await link.ask(*self._store.compare_history())
        except StoreUnavailable as error:
            # Who gave us the map may not have heard of a move yet.
            slots[self._clock_slot] = _redirected(error, "MOVED", link)
            link = self._keeper(slots, self._clock_slot)
            await link.ask(*self._store.compare_history())
        return link

    async def _ask_for_slots(self) -> list[Node | None]:
        """Ask the nodes for their map, one after the other until one answers, first those that are connected."""
        for link in sorted(self._links.values(), key=lambda link: link.connection is None):
            try:
                return slots_of(await link.ask("CLUSTER", "SLOTS"), link.host)
            except StoreUnavailable as error:
                why = str(error)
        raise StoreUnavailable(why)

    async def aclose(self) -> None:
        """Close the connections to all nodes, or give up connecting."""
        # Nobody is to open one again meanwhile.
        self._trusted, self._retry_at, self._why = None, float("inf"), "closed"
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.wait([self._learning])
        for link in self._links.values():
            await link.aclose()


def _patience(patient: bool) -> float:
    return wire.DEADLINE if patient else wire.PATIENCE


class NodeLink(Link):
    """From one event loop to one node of a cluster.

    cluster: told when the node is away.
    host: what the node is called.
    """

    # A node that refers to another one is well.
    _harmless = (*Link._harmless, "MOVED", "ASK", "TRYAGAIN")
    _has_members = False

    def __init__(
        self,
        cluster: Cluster,
        store: RedisStore,
        loop: asyncio.AbstractEventLoop,
        address: Address,
        host: str,
        always: tuple[str, ...],
    ) -> None:
        super().__init__(store, loop, address, always)
        self._cluster = cluster
        self.host = host

    @property
    def connection(self) -> object:
        """The connection as it is now; None where there is none."""
        return self._connection

    async def _arrive(self, connection: object) -> None:
        """Only the clock's node is compared, when it is known which one it is."""

    def _open(self, why: str) -> None:
        super()._open(why)
        self._cluster.forget()


def _redirected(error: StoreUnavailable, how: str, link: NodeLink) -> Node:
    """Return the node that a MOVED or an ASK names; raise any other error again."""
    match str(error).split():
        case [said, _, where] if said == how:
            host, _, port = where.rpartition(":")
            return host or link.host, int(port)
    raise error
