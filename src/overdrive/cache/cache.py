"""The cache of a service, and the passage of one request through it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable

from overdrive.context import RequestContext

from .entry import FORMAT, Entry, Instant, State
from .invalidation import Invalidator
from .policy import Header, Policy, reason_not_to_store
from .store import Store, StoreUnavailable

logger = logging.getLogger("overdrive")


class Cache:
    """Keeps whole responses until they expire or something they read is written.

    store: where they are kept.
    enabled: whether anything is looked up or stored; may be changed at any time.
    ttl: seconds an entry is fresh where its route says nothing.
    max_body: bytes above which a body is not stored.
    clock: seconds since any fixed moment, the same one in every process that shares the store.
    """

    def __init__(
        self,
        store: Store,
        *,
        enabled: bool = True,
        ttl: float = 60,
        max_body: int = 1_048_576,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.enabled = enabled
        self.ttl = ttl
        self.max_body = max_body
        self.clock = clock
        self.invalidator = Invalidator(store)
        self._complained: set[tuple[str | None, str]] = set()

    def use(self, store: Store) -> None:
        """Keep entries in another store from now on; those in the old one are left there."""
        self.store = self.invalidator.store = store

    async def clear(self) -> None:
        """Drop every entry, in every worker that shares the store."""
        await self.store.clear()

    async def invalidate(self, *tags: str) -> None:
        """Drop every entry that read one of `tags`: a table's name, or `engine/table` for another engine's."""
        await self.invalidator.announce([tag if "/" in tag else f"default/{tag}" for tag in tags])

    def seen(self) -> Instant | None:
        """Return the write clock as this process last saw it, without asking anyone."""
        return self.store.seen()

    async def look_up(self, exchange: Exchange) -> None:
        """Find the entry that answers this request, and note on `exchange` how the look-up went."""
        if not self.enabled:
            exchange.bypass("off")
            return
        try:
            await self.invalidator.catch_up()
            await self._load(exchange)
        except StoreUnavailable:
            # The store has said why, and fails at once until it answers again.
            exchange.bypass("store-unavailable")

    async def _load(self, exchange: Exchange) -> None:
        entry, instant, versions = await self.store.load(exchange.key, exchange.policy.plan.fingerprint)
        exchange.looked_up(instant)
        if entry is None:
            exchange.miss("uri-miss")
            return
        state = entry.state(self.clock(), instant.epoch, versions)
        if state is State.FRESH:
            exchange.hit(entry, self.clock())
        else:
            exchange.miss("stale", state.value)

    async def fill(self, exchange: Exchange, body: bytes) -> None:
        """Store a response that was sent, unless something it read has been written since."""
        instant, tags = exchange.instant, exchange.context.reads.tags
        if instant is None:
            return
        with contextlib.suppress(StoreUnavailable):
            epoch, versions = await self.store.versions(tags)
            if epoch != instant.epoch or any(version > instant.now for version in versions.values()):
                return
            plan, ttl = exchange.policy.plan, exchange.policy.ttl
            entry = Entry(FORMAT, plan.fingerprint, epoch, versions, self.clock(), ttl, 200, exchange.headers, body)
            await self.store.save(exchange.key, entry, ttl)

    def complain_once(self, route: str | None, reason: str) -> None:
        """Say why a route that asks to be cached is not, the first time it happens."""
        if (route, reason) not in self._complained:
            self._complained.add((route, reason))
            logger.warning("%s is marked @cached but its response cannot be: %s", route, reason)


class Exchange:
    """One request to a cached route, from its look-up to its storing.

    The headers it adds are `Cache-Status` (RFC 9211), `X-Cache` (hit, miss or bypass), `Age` on a hit
    (RFC 9111, section 5.1), and a `Cache-Control` that keeps browsers asking, where the endpoint sets none.
    """

    __slots__ = (
        "_cache",
        "_chunks",
        "_mark",
        "_status",
        "_storing",
        "context",
        "entry",
        "headers",
        "instant",
        "key",
        "policy",
    )

    def __init__(self, cache: Cache, policy: Policy, key: str, context: RequestContext) -> None:
        self.policy = policy
        self.key = key
        self.context = context
        #: The instant before the first read of this request; a fill is refused what was written after it.
        self.instant: Instant | None = context.instant
        self.headers: list[Header] = []
        self._cache = cache
        #: What answers this request, once the look-up has found it.
        self.entry: Entry | None = None
        self._mark = "bypass"
        self._status = ""
        self._storing = False
        self._chunks: list[bytes] = []

    async def look_up(self) -> None:
        """Set `entry` to what answers this request, if there is such an entry."""
        if self.context.wrote:
            self.bypass("wrote")
        else:
            await self._cache.look_up(self)

    # What the cache notes here

    def looked_up(self, instant: Instant) -> None:
        """Take the look-up's instant, the freshest there is, unless dependencies have read before it."""
        if not self.context.statements:
            self.instant = instant

    def bypass(self, why: str) -> None:
        """Note that the cache does not take part."""
        self._mark, self._status = "bypass", f"fwd=bypass; detail={why}"

    def miss(self, kind: str, detail: str = "") -> None:
        """Note that the cache had no answer."""
        self._mark, self._status = "miss", f"fwd={kind}" + (f"; detail={detail}" if detail else "")

    def hit(self, entry: Entry, now: float) -> None:
        """Note that the cache had the answer."""
        self.entry, self._mark = entry, "hit"
        self._status = f"hit; ttl={int(entry.created + entry.ttl - now)}"

    # What the response passes

    def start(self, status: int, headers: Iterable[Header]) -> list[Header]:
        """Return the response's headers as they are to be sent, and decide whether it will be stored."""
        own = list(headers)
        sent = list(own)
        if self.entry is not None and status != self.entry.status:
            # A dependency has failed on its way out, so this is not the stored answer.
            self.entry = None
            self.bypass("status")
        self.context.cache_status = self._mark
        if self.entry is not None:
            age = max(0, int(self._cache.clock() - self.entry.created))
            sent.append((b"age", b"%d" % age))
        else:
            if not any(name.lower() == b"cache-control" for name, _ in sent):
                sent.append((b"cache-control", b"private, no-cache" if self.policy.plan.private else b"no-cache"))
            if self._mark == "miss":
                self._decide(status, own)
                self.headers = list(sent)
        return [
            *sent,
            (b"cache-status", f"overdrive; {self._status}".encode()),
            (b"x-cache", self._mark.encode()),
        ]

    def _decide(self, status: int, headers: list[Header]) -> None:
        reason = self._reason_not_to_store(status, headers)
        if reason is None:
            self._status += "; stored"
        else:
            # A parameter has one value, and why nothing is stored outlives why nothing was found.
            self._status = f"{self._status.partition('; detail=')[0]}; detail={reason}"
        self._storing = reason is None

    def _reason_not_to_store(self, status: int, headers: list[Header]) -> str | None:
        if self.context.wrote:
            return "wrote"
        if unknown := self.context.reads.unknown:
            self._cache.complain_once(self.context.route, unknown[0])
            return "unknown-reads"
        return reason_not_to_store(status, headers, self.policy, self._cache.max_body)

    async def body(self, chunk: bytes, *, more: bool) -> None:
        """Gather what is sent, and store it when that was all."""
        if self._storing:
            self._chunks.append(chunk)
            if not more:
                self._storing = False
                await self._cache.fill(self, b"".join(self._chunks))
