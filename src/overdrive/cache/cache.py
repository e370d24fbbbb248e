"""The cache of a service."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from overdrive.errors import ConfigurationError

from .conditional import Header, with_etag
from .entry import FORMAT, Entry, Instant, State
from .flight import Flights, Landed
from .invalidation import Invalidator
from .store import Store, StoreUnavailable
from .trust import EVERYTHING, Ledger, is_known, is_off, template_of
from .values import Values, is_memoized, key_of_call, key_of_memoized, tag_of_call

if TYPE_CHECKING:
    from .exchange import Exchange
    from .policy import Policy

logger = logging.getLogger("overdrive")

#: Seconds between two reports of what was counted to those who share the store.
_REPORT_INTERVAL = 5.0

T = TypeVar("T")
P = ParamSpec("P")


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
        self.ledger = Ledger()
        self._values = Values(self)
        self._reported_at = time.monotonic()
        self._complained: set[tuple[str | None, str]] = set()

    def use(self, store: Store) -> None:
        """Keep entries in another store from now on; those in the old one are left there."""
        self.store = self.invalidator.store = store

    async def clear(self) -> None:
        """Drop every entry, in every worker that shares the store."""
        await self.store.clear()

    async def off(self, route: str | None = None) -> frozenset[str]:
        """Switch the cache off, for one route or for all, in every worker that shares the store, with its next look-up.

        route: its template, `/users/{user_id}` or `GET /users/{user_id}`; left out, the whole cache, values too.

        Requests go on to their endpoints, and writes are announced as ever, so that nothing is outdated when it is
        switched on again. Returns the names of what is off now, `*` for everything. Raises `ConfigurationError` for
        a route that is not cached here, and `StoreUnavailable` where the others could not be told.
        """
        return await self.store.switch(self._name_of(route), off=True)

    async def on(self, route: str | None = None) -> frozenset[str]:
        """Undo `off` with the same argument: a route that is off by itself stays off when all are switched on."""
        return await self.store.switch(self._name_of(route), off=False)

    def _name_of(self, route: str | None) -> str:
        if route is None:
            return EVERYTHING
        known = self.ledger.routes
        # Before the app's first request nobody knows what routes there will be.
        if known and not is_known(route, known):
            raise ConfigurationError(f"no cached route is called {route!r}; there are {', '.join(sorted(known))}")
        return template_of(route)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Return what was counted in this process: for each cached route, by its name, the counts of `Trust`."""
        return self.ledger.statistics()

    async def aclose(self) -> None:
        """Give back what the store holds open, and tell those who share it what was counted here."""
        self._report()
        await self.store.aclose()

    def _report(self) -> None:
        if self.enabled and (counts := self.ledger.unreported()) and self.store.add(counts):
            self.ledger.reported(counts)

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
        else:
            now = time.monotonic()
            if now - self._reported_at >= _REPORT_INTERVAL:
                self._reported_at = now
                self._report()

    def held(self, policy: Policy, key: str) -> Entry | None:
        """Return what answers a request now, if it is in this process; asks nobody."""
        trust = policy.trust
        if not self.enabled or trust.due or self.invalidator.is_behind:
            return None
        if self.store.off and self.is_off(policy.route):
            return None
        entry = self.store.held(key)
        if entry is None or self.clock() - entry.created >= entry.ttl:
            return None
        trust.at_once += 1
        if trust.verify:
            trust.decide()
        return entry

    def is_off(self, route: str | None) -> bool:
        """Say whether a route was switched off, or, where it is None, everything."""
        off = self.store.off
        return bool(off) and is_off(off, route)

    async def _load(self, exchange: Exchange) -> None:
        while True:
            entry, instant, versions = await self.store.load(exchange.key, exchange.policy.plan.fingerprint)
            exchange.looked_up(instant)
            if self.is_off(exchange.policy.route):
                exchange.bypass("off")
                return
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
        entry = await self.keep(
            exchange.key,
            policy.plan.fingerprint,
            instant,
            exchange.context.reads.tags,
            policy.ttl,
            headers=with_etag(exchange.headers, body),
            body=body,
        )
        policy.trust.stored(None if entry is None else len(body))
        return entry

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
