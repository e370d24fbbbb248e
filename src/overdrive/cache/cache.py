"""The cache of a service."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, overload

import msgspec

from overdrive.context import OF_ROWS
from overdrive.errors import ConfigurationError

from .conditional import Header
from .entry import FORMAT, Entry, Form, Instant, State
from .flight import Flight, Flights, Landed, Landing, patience
from .invalidation import Invalidator
from .policy import may_be_stale
from .refresh import Refreshes
from .store import NOBODY_WAITS, Claim, Found, Store, StoreUnavailable
from .tags import dropped, tag_of_tenant, tags_of
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


#: Seconds between two looks for what another process makes: at first, and at most.
_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.05

#: How many may be waited for, one after the other; what is written all the time would else be made by one at a time.
_LEADERS = 2


class Turn(NamedTuple):
    """What a look-up comes to.

    instant: the clock before anything the caller may read.
    state: what the entry that was found is worth; None where there was none.
    entry: what answers; None where the caller is to make it.
    former: the entry that would have answered, and may yet, in the windows of its route.
    flight: whom the caller makes it for, too; what it brings ends it.
    collapsed: whether the entry was made meanwhile, for another request.
    is_off: whether the cache is not to take part.
    """

    instant: Instant
    state: State | None
    entry: Entry | None
    former: Entry | None = None
    flight: Flight | None = None
    collapsed: bool = False
    is_off: bool = False


def _check(ttl: float | None) -> None:
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl < math.inf):
        raise ConfigurationError(f"ttl= takes a positive number of seconds, not {ttl!r}")


def _give_back(store: Store, key: str, token: str, landed: Landing) -> None:
    store.release(key, token, alone=landed is Landed.ALONE or isinstance(landed, Exception))


class Cache:
    """Keeps whole responses until they expire or something they read is written.

    store: where they are kept.
    enabled: whether anything is looked up or stored; may be changed at any time.
    ttl: seconds an entry is fresh where its route says nothing.
    max_body: bytes above which a body is not stored.
    clock: seconds since any fixed moment, the same one in every process that shares the store.
    strict: whether commits wait until the store has heard of their end; see `Invalidator`.
    """

    def __init__(
        self,
        store: Store,
        *,
        enabled: bool = True,
        ttl: float = 60,
        max_body: int = 1_048_576,
        clock: Callable[[], float] = time.time,
        strict: bool = False,
    ) -> None:
        self.store = store
        self.enabled = enabled
        self.ttl = ttl
        self.max_body = max_body
        self.clock = clock
        self.invalidator = Invalidator(store, strict=strict)
        self.flights = Flights()
        self.refreshes = Refreshes()
        self.ledger = Ledger()
        self.values = Values(self)
        self._reported_at = time.monotonic()
        self._complained: set[tuple[str | None, str]] = set()
        store.each_time(self._report_in_time)

    def use(self, store: Store) -> None:
        """Keep entries in another store from now on; those in the old one are left there."""
        self.store = self.invalidator.store = store
        store.each_time(self._report_in_time)

    async def clear(self, *, tenant: str | None = None) -> None:
        """Drop every entry, in every worker that shares the store.

        tenant: whose alone, by the name that `Overdrive(tenant=...)` gives: responses, values, and those of one in
            65,536 other tenants.
        """
        if tenant is None:
            await self.store.clear()
        else:
            await self.invalidator.announce([tag_of_tenant(tenant)], "clear()")

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
        self.invalidator.close()
        await self.store.aclose()

    def _report_in_time(self) -> None:
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_INTERVAL:
            self._reported_at = now
            self._report()

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

        What is dropped is gone, for all tenants, and answers nobody in any window. Raises `ConfigurationError` for tags
        that are no names.
        """
        if what and callable(what[0]):
            function = inspect.unwrap(what[0])
            if is_memoized(what[0]):
                key = key_of_memoized(function, *what[1:], **arguments)
            else:
                key = key_of_call(function, inspect.signature(function).bind_partial(*what[1:], **arguments).arguments)
            await self.invalidator.announce([tag_of_call(key)], "invalidate()")
        else:
            named = tags_of(what)
            # What read rows of a table by their keys does not depend on all of it.
            rows = [tag + OF_ROWS for tag in named]
            await self.invalidator.announce([*named, *rows, *dropped(named)], "invalidate()")

    async def get_or_set(
        self,
        key: str,
        load: Callable[[], Awaitable[T]],
        *,
        ttl: float | None = None,
        tags: Collection[str] = (),
        type: type[T] | Any = Any,  # noqa: A002
        shared: bool = False,
    ) -> T:
        """Return the value kept under `key`; where there is none, what `load` gives, which is kept.

        load: a coroutine function without parameters. What it reads through observed engines outdates its value when
            it is written, as with responses; who misses it at the same time waits for one execution.
        ttl: seconds it is fresh; left out, the setting `cache.ttl` decides.
        tags: what outdates it besides, by `invalidate`.
        type: what msgspec makes of the stored value: a struct, a dataclass, `list[int]`; left out, plain data.
        shared: whether all tenants have the same one. Left out, each has its own, and a request of none loads anew;
            what is kept outside of requests is not theirs either.

        A tenant has values of its own, where the app has several: what one's request has read is not for another's.
        A request that has written loads anew. Raises what `load` raises, and `ConfigurationError` for a value that
        msgspec cannot write or read, a `ttl` that is not positive, and tags that are no names.
        """
        _check(ttl)
        value: T = await self.values.get_or_set(key, load, type_=type, ttl=ttl, tags=tags_of(tags), shared=shared)
        return value

    def memoize(
        self,
        *,
        ttl: float | None = None,
        tags: Collection[str] = (),
        shared: bool = False,
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[T]]]:
        """Keep what a coroutine function returns, by its arguments; typed by its return annotation.

        ttl, tags, shared: see `get_or_set`. The arguments are plain data, and models or dataclasses of it: a call with
        any other raises `ConfigurationError`, as nothing tells it from the next.
        """
        _check(ttl)
        own = tags_of(tags)
        return lambda function: self.values.memoize(function, ttl, own, shared=shared)

    def seen(self) -> Instant | None:
        """Return the write clock as this process last saw it, without asking anyone."""
        # Whoever keeps nothing is nobody's neighbour: `overdrive explain` is not.
        return self.store.seen() if self.enabled else None

    async def look_up(self, exchange: Exchange, found: Found | None = None) -> None:
        """Find the entry that answers this request, and note on `exchange` how the look-up went."""
        if not self.enabled:
            exchange.bypass("off")
            return
        try:
            turn = await self.find(
                exchange.key,
                exchange.policy.plan.fingerprint,
                stale=exchange.stale,
                route=exchange.policy.route,
                # Nobody is sent another's response in shadow.
                alone=exchange.policy.trust.mode == "shadow",
                found=found,
            )
        except StoreUnavailable:
            # The store has said why, and fails at once until it answers again.
            exchange.bypass("store-unavailable")
        else:
            exchange.looked_up(turn, self.clock())
            self._report_in_time()

    def held(self, policy: Policy, key: str) -> Entry | None:
        """Return what answers a request now, if it is in this process; asks nobody."""
        if not self._answers_at_once(policy):
            return None
        entry = self.store.held(key)
        if entry is None or not entry.is_fresh(self.clock()):
            return None
        policy.trust.answered_at_once()
        return entry

    async def glance(self, policy: Policy, key: str) -> Entry | Found | None:
        """Return what answers a request now, by one question to the store; else its answer, for `look_up`."""
        if not self._answers_at_once(policy):
            return None
        try:
            found = await self.store.load(key, policy.plan.fingerprint)
        except StoreUnavailable:
            return None
        entry = self._judged(found).entry
        # What is switched off is heard with the answer.
        if entry is None or self.is_off(policy.route):
            return found
        policy.trust.answered_at_once()
        self._report_in_time()
        return entry

    def _answers_at_once(self, policy: Policy) -> bool:
        return self.enabled and not (policy.trust.due or self.invalidator.is_behind or self.is_off(policy.route))

    def is_off(self, route: str | None) -> bool:
        """Say whether a route was switched off, or, where it is None, everything."""
        off = self.store.off
        return bool(off) and is_off(off, route)

    async def find(
        self,
        key: str,
        fingerprint: str,
        *,
        stale: float = 0,
        route: str | None = None,
        alone: bool = False,
        found: Found | None = None,
    ) -> Turn:
        """Return what answers, or whose turn it is to make it; all who ask at once get it from one execution.

        stale: seconds after its end in which an entry answers, too.
        route: what may have been switched off.
        alone: do not wait for others, nor have them wait.
        found: what the store has answered already.

        Raises what that execution has raised, and `StoreUnavailable`.
        """
        await self.invalidator.catch_up()
        if self.invalidator.is_deaf:
            raise StoreUnavailable("nobody hears what others write to the database")
        if found is None and (near := self._near(key, fingerprint, route)) is not None:
            return near
        until: float | None = None
        while True:
            turn = self._judged(found or await self.store.load(key, fingerprint))
            found = None
            if self.is_off(route):
                return Turn(turn.instant, None, None, is_off=True)
            if alone or turn.entry is not None:
                return turn
            former, state = turn.former, turn.state
            if former is not None and state is not None and former.answers(self.clock(), stale, state):
                return turn
            until = until or patience()
            flight, leads = self.flights.join((key, fingerprint), turn.instant)
            if leads:
                return await self._take_off(flight, turn, key, fingerprint, until)
            match await flight.landing(until):
                case Entry() as entry:
                    return Turn(turn.instant, State.FRESH, entry, collapsed=True)
                case Exception() as error:
                    raise error
                case Landed.ALONE:
                    return turn

    def _near(self, key: str, fingerprint: str, route: str | None) -> Turn | None:
        """Return what answers, if it is in this process."""
        entry, instant = self.store.held(key), self.store.seen()
        if entry is None or instant is None or entry.fingerprint != fingerprint or self.is_off(route):
            return None
        return Turn(instant, State.FRESH, entry) if entry.is_fresh(self.clock()) else None

    def _judged(self, found: Found) -> Turn:
        entry, instant, versions = found
        if entry is None:
            return Turn(instant, None, None)
        state = entry.state(self.clock(), instant.epoch, versions)
        if state is State.FRESH:
            return Turn(instant, state, entry)
        may_answer = state is State.EXPIRED or entry.may_be_outdated(instant.epoch, versions)
        return Turn(instant, state, None, former=entry if may_answer and may_be_stale(entry.headers) else None)

    async def _take_off(self, flight: Flight, turn: Turn, key: str, fingerprint: str, until: float) -> Turn:
        """Let the caller make the entry, unless another process does."""
        token = secrets.token_hex(8)
        flight.lease = partial(_give_back, self.store, key, token)
        try:
            claim = await self.store.claim(key, fingerprint, token)
            if claim is None:
                flight.lease = None
            else:
                turn = await self._wait_for_others(claim, key, fingerprint, token, until)
        except StoreUnavailable:
            # There is nobody to wait for. A lease that was granted after all runs out.
            pass
        except BaseException:
            flight.end(Landed.NOWHERE)
            raise
        if turn.entry is not None:
            flight.end(turn.entry)
            return turn._replace(collapsed=True)
        flight.instant = turn.instant
        return turn._replace(flight=flight)

    async def _wait_for_others(self, claim: Claim, key: str, fingerprint: str, token: str, until: float) -> Turn:
        """Look again until the entry is there, or its lease is ours, or waiting is of no use."""
        leaders, pause = set[str](), _FIRST_PAUSE
        while True:
            turn = self._judged(claim.found)
            if turn.entry is not None or claim.holder in (token, NOBODY_WAITS):
                return turn
            if claim.holder:
                leaders.add(claim.holder)
                if len(leaders) > _LEADERS or asyncio.get_running_loop().time() >= until:
                    return turn
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            claim = await self.store.claim(key, fingerprint, "" if claim.holder else token) or claim

    async def fill(self, exchange: Exchange, headers: list[Header], body: bytes, form: Form | None = None) -> Landing:
        """Store a response, unless something it read has been written since; return what others get of it.

        form: its body as gzip, if it was made.
        """
        instant, policy, tags = exchange.instant, exchange.policy, exchange.context.reads.tags
        if instant is None:
            return Landed.ALONE
        landing, stored = await self.keep(
            exchange.key,
            policy.plan.fingerprint,
            instant,
            tags | dropped(tags) if policy.outdated else tags,
            policy.ttl,
            headers=headers,
            body=body,
            form=form,
            keep_for=policy.kept_for,
            flight=exchange.flight,
        )
        policy.trust.stored(len(body) if stored else None)
        return landing

    async def supersede(self, key: str) -> None:
        """Forget what was kept, now that there is another response in its place, which is not kept."""
        with suppress(StoreUnavailable):
            await self.store.discard(key)

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
        form: Form | None = None,
        keep_for: float | None = None,
        flight: Flight | None,
    ) -> tuple[Landing, bool]:
        """Store what was read after `instant`, unless one of its tags was written since.

        Return what others get of it, and whether it was stored.

        keep_for: seconds after which it is of no use, if not at the end of its time to live.

        Those who joined the flight asked before that write, so they get what is not stored, too, unless some of it
        was read before the flight began.
        """
        unstamped = dict.fromkeys(tags, 0)
        entry = Entry(FORMAT, fingerprint, instant.epoch, unstamped, self.clock(), ttl, 200, headers, body, form)
        not_kept = entry if flight is not None and flight.instant == instant else Landed.NOWHERE
        if self.store.refuses(tags):
            return not_kept, False
        try:
            epoch, versions = await self.store.versions(tags)
            if epoch != instant.epoch or any(version > instant.now for version in versions.values()):
                return not_kept, False
            entry = msgspec.structs.replace(entry, versions=versions)
            await self.store.save(key, entry, keep_for or ttl)
        except StoreUnavailable:
            return not_kept, False
        return entry, True

    def complain_once(self, route: str | None, reason: str) -> None:
        """Say why a route that asks to be cached is not, the first time it happens."""
        if (route, reason) not in self._complained:
            self._complained.add((route, reason))
            cure = "where tables are all it reads, name them: @cached(depends=[...])"
            logger.warning("%s is marked @cached but its response cannot be: %s; %s", route, reason, cure)
