"""The cache of a service, and the passage of one request through it."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, ParamSpec, TypeVar, overload

from overdrive.context import RequestContext

from .conditional import Header, is_current, not_modified, with_etag
from .entry import FORMAT, Entry, Instant, State
from .flight import Flight, Flights, Landed, Landing
from .invalidation import Invalidator
from .policy import Policy, reason_not_to_store
from .store import Store, StoreUnavailable
from .values import Values, is_memoized, key_of_call, key_of_memoized, tag_of_call

logger = logging.getLogger("overdrive")

T = TypeVar("T")
P = ParamSpec("P")

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


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
        self.flights = Flights()
        self._values = Values(self)
        self._complained: set[tuple[str | None, str]] = set()

    def use(self, store: Store) -> None:
        """Keep entries in another store from now on; those in the old one are left there."""
        self.store = self.invalidator.store = store

    async def clear(self) -> None:
        """Drop every entry, in every worker that shares the store."""
        await self.store.clear()

    @overload
    async def invalidate(self, *tags: str) -> None: ...
    @overload
    async def invalidate(self, function: Callable[..., Any], /, *args: Any, **arguments: Any) -> None: ...
    async def invalidate(self, *what: Any, **arguments: Any) -> None:
        """Drop entries, in every worker that shares the store.

        tags: names of what they read: a table, or `engine/table` for another engine's, or a tag of one's own.
        function, arguments: an endpoint and its path parameters, or a function that `memoize` has wrapped and its
            arguments: what was kept of that call, and of one in 65,536 others.
        """
        if what and callable(what[0]):
            function = inspect.unwrap(what[0])
            if is_memoized(what[0]):
                key = key_of_memoized(function, *what[1:], **arguments)
            else:
                key = key_of_call(function, inspect.signature(function).bind_partial(*what[1:], **arguments).arguments)
            await self.invalidator.announce([tag_of_call(key)])
        else:
            await self.invalidator.announce(self.tags_of(what))

    @staticmethod
    def tags_of(names: Iterable[str]) -> list[str]:
        """Return tags as they are stamped: a table's name alone is one of the default engine's."""
        return [name if "/" in name else f"default/{name}" for name in names]

    async def get_or_set(
        self,
        key: str,
        load: Callable[[], Awaitable[T]],
        *,
        ttl: float | None = None,
        tags: Collection[str] = (),
        type: type[T] | Any = Any,  # noqa: A002
    ) -> T:
        """Return the value kept under `key`; where there is none, what `load` gives, which is kept.

        load: a coroutine function without parameters. What it reads through observed engines outdates its value when
            it is written, as with responses; who misses it at the same time waits for one execution.
        ttl: seconds it is fresh; left out, the setting `cache.ttl` decides.
        tags: what outdates it besides, by `invalidate`.
        type: what msgspec makes of the stored value: a struct, a dataclass, `list[int]`; left out, plain data.

        A request that has written loads anew. Raises what `load` raises, and `ConfigurationError` for a value that
        msgspec cannot write or read.
        """
        value: T = await self._values.get_or_set(key, load, type_=type, ttl=ttl, tags=self.tags_of(tags))
        return value

    def memoize(
        self, *, ttl: float | None = None, tags: Collection[str] = ()
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[T]]]:
        """Keep what a coroutine function returns, by its arguments; typed by its return annotation.

        ttl, tags: see `get_or_set`.
        """
        return lambda function: self._values.memoize(function, ttl, self.tags_of(tags))

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

    def held(self, key: str) -> Entry | None:
        """Return what answers a request now, if it is in this process; asks nobody."""
        if not self.enabled or self.invalidator.is_behind:
            return None
        entry = self.store.held(key)
        return entry if entry is not None and self.clock() - entry.created < entry.ttl else None

    async def _load(self, exchange: Exchange) -> None:
        while True:
            entry, instant, versions = await self.store.load(exchange.key, exchange.policy.plan.fingerprint)
            exchange.looked_up(instant)
            state = entry.state(self.clock(), instant.epoch, versions) if entry is not None else None
            if entry is not None and state is State.FRESH:
                exchange.hit(entry, self.clock())
                return
            flight = exchange.lead_or_follow()
            if flight is None:
                exchange.miss("uri-miss" if state is None else "stale", "" if state is None else state.value)
                return
            match await flight.landing():
                case Entry() as entry:
                    exchange.hit(entry, self.clock(), collapsed=True)
                    return
                case Exception() as error:
                    raise error
                case Landed.ALONE:
                    exchange.miss("uri-miss")
                    return

    async def fill(self, exchange: Exchange, body: bytes) -> Entry | None:
        """Store a response, unless something it read has been written since; return what was stored."""
        instant, policy = exchange.instant, exchange.policy
        if instant is None:
            return None
        return await self.keep(
            exchange.key,
            policy.plan.fingerprint,
            instant,
            exchange.context.reads.tags,
            policy.ttl,
            headers=with_etag(exchange.headers, body),
            body=body,
        )

    async def keep(
        self,
        key: str,
        fingerprint: str,
        instant: Instant,
        tags: Collection[str],
        ttl: float,
        *,
        headers: list[Header],
        body: bytes,
    ) -> Entry | None:
        """Store what was read after `instant`, unless one of its tags was written since; return what was stored."""
        try:
            epoch, versions = await self.store.versions(tags)
            if epoch != instant.epoch or any(version > instant.now for version in versions.values()):
                return None
            entry = Entry(FORMAT, fingerprint, epoch, versions, self.clock(), ttl, 200, headers, body)
            await self.store.save(key, entry, ttl)
        except StoreUnavailable:
            return None
        return entry

    def complain_once(self, route: str | None, reason: str) -> None:
        """Say why a route that asks to be cached is not, the first time it happens."""
        if (route, reason) not in self._complained:
            self._complained.add((route, reason))
            logger.warning("%s is marked @cached but its response cannot be: %s", route, reason)


def replayed(entry: Entry, now: float, if_none_match: bytes, said: bytes = b"") -> tuple[Message, Message]:
    """Return the messages of a response that is answered from an entry.

    now: on the cache's clock.
    if_none_match: the request's header of this name.
    said: what Cache-Status says of it, if not that it is a hit.
    """
    age = max(0, int(now - entry.created))
    headers = [
        *entry.headers,
        (b"age", b"%d" % age),
        (b"cache-status", said or b"overdrive; hit; ttl=%d" % (entry.created + entry.ttl - now)),
        (b"x-cache", b"hit"),
    ]
    status, body = entry.status, entry.body
    if if_none_match and is_current(if_none_match, headers):
        status, headers, body = 304, not_modified(headers), b""
    start = {"type": "http.response.start", "status": status, "headers": headers}
    return start, {"type": "http.response.body", "body": body}


class Exchange:
    """One request to a cached route, from its look-up to its storing.

    if_none_match: the request's header of this name.

    The headers it adds are `Cache-Status` (RFC 9211), `X-Cache` (hit, miss or bypass), `Age` on a hit
    (RFC 9111, section 5.1), a strong `ETag` (RFC 9110, section 8.8.3), and a `Cache-Control` that keeps browsers
    asking, where the endpoint sets none.
    """

    __slots__ = (
        "_cache",
        "_chunks",
        "_flight",
        "_if_none_match",
        "_mark",
        "_not_modified",
        "_start",
        "_status",
        "_storing",
        "context",
        "entry",
        "headers",
        "instant",
        "key",
        "policy",
    )

    def __init__(
        self, cache: Cache, policy: Policy, key: str, context: RequestContext, if_none_match: bytes = b""
    ) -> None:
        self.policy = policy
        self.key = key
        self.context = context
        #: The instant before the first read of this request; a fill is refused what was written after it.
        self.instant: Instant | None = context.instant
        #: The response's headers, as they are stored.
        self.headers: list[Header] = []
        #: What answers this request, once the look-up has found it.
        self.entry: Entry | None = None
        self._cache = cache
        self._if_none_match = if_none_match
        self._mark = "bypass"
        self._status = ""
        self._flight: Flight | None = None
        self._start: Message | None = None
        self._not_modified = False
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

    def hit(self, entry: Entry, now: float, *, collapsed: bool = False) -> None:
        """Note that the cache had the answer, or got it meanwhile for another request."""
        self.entry, self._mark = entry, "hit"
        self._status = "fwd=uri-miss; collapsed" if collapsed else f"hit; ttl={int(entry.created + entry.ttl - now)}"

    def lead_or_follow(self) -> Flight | None:
        """Return the flight to wait for; None where this request goes ahead, for those that ask the same meanwhile."""
        # A flight that left before a write brings what was read before it.
        flight, leads = self._cache.flights.join((self.key, self.instant))
        if not leads:
            return flight
        self._flight = flight
        return None

    # What the response passes

    async def answer(self, send: Send) -> None:
        """Send the response that the look-up has found."""
        assert self.entry is not None
        self.context.cache_status = self._mark
        for message in replayed(self.entry, self._cache.clock(), self._if_none_match, self._said()):
            await send(message)

    async def send(self, message: Message, send: Send) -> None:
        """Send a message of the response on, marked, and keep what is to be kept."""
        match message["type"]:
            case "http.response.start":
                self._start = message
                if not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                    await self._begin(send, None)
            case "http.response.body":
                chunk, more = message.get("body", b""), message.get("more_body", False)
                if self._start is not None:
                    await self._begin(send, None if more else chunk)
                await self._pass_on(message, chunk, more, send)
            case _:
                if self._start is not None:
                    await self._begin(send, None)
                await send(message)

    async def _begin(self, send: Send, body: bytes | None) -> None:
        start, self._start = self._start, None
        assert start is not None
        headers = self._marked(start["status"], list(start.get("headers", ())), body)
        if self._not_modified:
            headers = not_modified(headers)
        await send({**start, "status": 304 if self._not_modified else start["status"], "headers": headers})

    def _marked(self, status: int, own: list[Header], body: bytes | None) -> list[Header]:
        """Return the response's headers as they are to be sent, and decide whether it will be stored.

        body: all of it, where that is known already.
        """
        sent = list(own)
        if self.entry is not None and status != self.entry.status:
            # A dependency has failed on its way out, so this is not the stored answer.
            self.entry = None
            self.bypass("status")
        self.context.cache_status = self._mark
        if self.entry is not None:
            sent.append((b"age", b"%d" % max(0, int(self._cache.clock() - self.entry.created))))
        else:
            if not any(name.lower() == b"cache-control" for name, _ in sent):
                sent.append((b"cache-control", b"private, no-cache" if self.policy.plan.private else b"no-cache"))
            if self._mark == "miss":
                self._decide(status, own)
                if status == 200 and body is not None:
                    sent = with_etag(sent, body)
                self.headers = list(sent)
        self._not_modified = status == 200 and body is not None and is_current(self._if_none_match, sent)
        return [
            *sent,
            (b"cache-status", self._said()),
            (b"x-cache", self._mark.encode()),
        ]

    def _said(self) -> bytes:
        return f"overdrive; {self._status}".encode()

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

    async def _pass_on(self, message: Message, chunk: bytes, more: bool, send: Send) -> None:
        if self._storing:
            self._chunks.append(chunk)
        # A client that is slow to take its answer keeps nobody else waiting.
        if not more and self._flight is not None and self._flight.awaited:
            await self._keep()
        await send({**message, "body": b""} if self._not_modified else message)
        if not more:
            await self._keep()

    async def _keep(self) -> None:
        """Store the response, now that all of it is there, and share it with those who wait."""
        kept: Entry | None = None
        if self._storing:
            self._storing = False
            kept = await self._cache.fill(self, b"".join(self._chunks))
        self._end(kept or Landed.ALONE)

    def fail(self, error: Exception) -> None:
        """Share what the endpoint has raised with those who wait."""
        self._end(error)

    def leave(self) -> None:
        """Let somebody else take over, if this request was to answer others and has not."""
        self._end(Landed.NOWHERE)

    def _end(self, landed: Landing) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.end(landed)
