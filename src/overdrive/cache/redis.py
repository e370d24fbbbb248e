"""Entries and versions in Redis, shared by all workers.

Under the prefix lie `clock` (the epoch and the number of writes, in one string, so that they vanish together),
`tag:*` (the write a tag was last named by, and behind it the marks for which it is pending), `entry:*`, `lease:*` (who
is making an entry), `off` (what is switched off, a line each), `counts` (of all workers, a hash), `members` and
`trusted` (see `member`), `history` (which server these are of) and `writers` (the last writes, see `history`).
"""

from __future__ import annotations

import asyncio
import atexit
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from overdrive.errors import ConfigurationError
from overdrive.instrumentation.numbers import Histogram

from . import connection as wire
from .connection import Address, RedisError, ReplyError, blocking_connection, code_of, without_secrets
from .entry import Entry, Instant, decode, encode
from .history import Written
from .link import IS_CLUSTER, LEASE, REDIRECTIONS, Answer, Link, Route, instant_of, stamp_in
from .member import Connection, Member
from .near import Near
from .scripts import ADD, CLEAR, HISTORY, RELEASE, SAME_HISTORY, STAMP, SWITCH, VERSIONS, Script
from .store import LONGEST_COMMIT, NOBODY_WAITS, PENDING, Claim, Found, Mark, Push, StoreUnavailable

#: Keys whose entries' tags are remembered, to be asked for together with the entry.
_REMEMBERED = 10_000

#: What is remembered of a write: the clock and the names of the tags, milliseconds of Redis' clock, and who wrote.
_lines = msgspec.msgpack.Decoder(tuple[list[str], int, str])

#: What is told of a write: the clock and the names of the tags, and microseconds of Redis' clock.
_messages = msgspec.msgpack.Decoder(tuple[list[str], int])

#: Seconds for which an entry is kept at most, ten years: Redis refuses what it cannot add to its clock.
_LONGEST = 10 * 365 * 86_400.0

#: Seconds the counts are kept after they were last added to.
_DAY = 86_400


class RedisStore:
    """A store that all workers share.

    url: where Redis is: `redis://`, `rediss://` or `unix://`, as redis-py reads it. A cluster is `ClusterStore`'s.
    prefix: what every key starts with.
    max_bytes: what entries may take in this process besides, for as long as it hears of every write; 0 for none.

    Raises `ConfigurationError` for a URL that cannot be read.
    """

    def __init__(self, url: str, prefix: str, max_bytes: int = 0) -> None:
        self._url = url
        self._prefix = prefix
        self._max_bytes = max_bytes
        self.looked: Callable[[], None] = _nothing
        #: What lies together on one server has this before its name.
        self._together = self._base_of(prefix)
        self._clock = f"{self._together}:clock"
        self._switches = f"{self._together}:off"
        self._counts = f"{self._together}:counts"
        self._history = f"{self._together}:history"
        self._writers = f"{self._together}:writers"
        self._members = f"{self._together}:members"
        self._trusted = f"{self._together}:trusted"
        self.channel = f"{self._together}:writes"
        self._seen: Instant | None = None
        self._off_text: bytes | None = None
        self.off: frozenset[str] = frozenset()
        try:
            self._address = Address(url)
        except (ValueError, TypeError, RedisError) as error:
            raise ConfigurationError(
                f"the Redis URL cannot be read: {error}; it looks like redis://host:6379/0, "
                "or redis+cluster://host:6379 where it names a cluster"
            ) from None
        # Connections belong to the loop they were opened on; scripts and tests have several.
        self._routes: dict[asyncio.AbstractEventLoop, Route] = {}
        #: For each key the tags of its entry as it was last seen, with their names in Redis.
        self._tags: OrderedDict[str, dict[str, str]] = OrderedDict()
        #: Commands that were sent, and look-ups they answered.
        self.trips = 0
        self.batched = 0
        #: Entries that were damaged or another release's, and those Redis had no memory for.
        self.unreadable = 0
        self.refused_fills = 0
        #: How often Redis was found to be away, and answers with which nothing was to be served.
        self.opened = 0
        self._push_lag = Histogram()
        self.suspended = 0
        self._member: Member | None = None

    def _base_of(self, prefix: str) -> str:
        return prefix

    async def ping(self) -> None:
        """Ask Redis for an answer; `ConfigurationError` says in one line why it gave none."""
        where = without_secrets(self._url)
        try:
            async with asyncio.timeout(wire.DEADLINE):
                await self._visit()
        except (OSError, UnicodeError, StoreUnavailable) as error:
            why = str(error) or type(error).__name__
            if _is_about_login(why):
                raise ConfigurationError(
                    f"Redis at {where} refuses the user of redis_url: correct the user name and password there, "
                    f"or what Redis' ACL permits ({why})"
                ) from None
            if code_of(why) in REDIRECTIONS:
                raise ConfigurationError(f"Redis at {where} cannot be used: {IS_CLUSTER}") from None
            raise ConfigurationError(f"Redis at {where} cannot be reached: {why}") from None

    async def _visit(self) -> None:
        """Do what look-ups and announcements do."""
        # A node of a cluster may serve one name, but not two that lie in different slots.
        look_up = ("MGET", self._clock, f"{self._prefix}:entry:")
        await self._demand(self._address, look_up, self.compare_history(), self._beginning())

    def compare_history(self) -> tuple[str | int, ...]:
        """Return the command that begins a new epoch where writes may have been forgotten."""
        return "EVAL", SAME_HISTORY, 3, self._clock, self._history, self.channel, secrets.token_hex(8)

    async def described(self) -> dict[str, str]:
        """Return what Redis says of itself by INFO, and as `pushes` whether it may tell of writes: yes, or why not."""
        async with self._visiting(self._address) as connection:
            (info,) = await connection.demand(("INFO",))
            pairs = (line.partition(":") for line in info.decode().splitlines() if ":" in line)
            said = {name: value for name, _, value in pairs} | {"pushes": "yes"}
            for command in (("HELLO", 3), ("SUBSCRIBE", self.channel)):
                if isinstance(reply := await connection.ask(*command), ReplyError | StoreUnavailable):
                    said["pushes"] = str(reply)
                    break
            return said

    def _beginning(self) -> tuple[str | int, ...]:
        return "EVAL", VERSIONS.text, 3, self._clock, self._writers, self.channel, secrets.token_hex(8)

    async def _demand(self, address: Address, *commands: tuple[str | int, ...]) -> list[Any]:
        async with self._visiting(address) as connection:
            return await connection.demand(*commands)

    @asynccontextmanager
    async def _visiting(self, address: Address) -> AsyncIterator[wire.Connection]:
        """Open a connection for the block, whether the breaker is open or not."""
        link = Link(self, asyncio.get_running_loop(), address, (self._clock, self._switches))
        connection = await address.connect(link)
        try:
            yield connection
        finally:
            connection.close("closed")
            await connection.closed

    def seen(self) -> Instant | None:
        """Return the clock as it was in the last answer."""
        return self._seen

    def each_time(self, call: Callable[[], None]) -> None:
        """Have `call` called at each look for the clock that nobody has asked for."""
        self.looked = call

    def saw(self, instant: Instant) -> None:
        """Take note of the clock in an answer."""
        self._seen = instant

    def held(self, key: str) -> Entry | None:
        """Return an entry of this process, if nothing it read has been written since, by all that was heard."""
        loop = asyncio.get_running_loop()
        route = self._routes.get(loop)
        # The loop's own time may be that of before it was held up.
        return None if route is None or route.near is None else route.near.get(key, time.monotonic())

    async def load(self, key: str, fingerprint: str) -> Found:
        """Look up an entry, the clock, and the stamps of the tags the entry had last time."""
        name = f"{self._prefix}:entry:{key}"
        return await self._found(key, fingerprint, name, await self._link().read((name, *self._tags_of(key))))

    async def claim(self, key: str, fingerprint: str, token: str) -> Claim:
        """Take a lease and look the entry up, in one round trip."""
        link, name, lease = self._link(), f"{self._prefix}:entry:{key}", self._lease(key)
        refusal = link.post("SET", lease, token, "NX", "PX", LEASE) if token else None
        answer = await link.read((name, lease, *self._tags_of(key)))
        # What was sent first has been answered first.
        if refusal is not None and (error := refusal.result()) is not None:
            raise error
        holder = (answer.values[lease] or b"").decode()
        if token and holder == token:
            link.hold(lease, token)
        return Claim(await self._found(key, fingerprint, name, answer), holder)

    def release(self, key: str, token: str, *, alone: bool) -> None:
        """Give a lease back, or let it say that nobody need wait; one that cannot be given back runs out."""
        link = self._link()
        link.let_go(token)
        link.post("EVAL", RELEASE, 1, self._lease(key), token, LEASE, NOBODY_WAITS if alone else "")

    def _lease(self, key: str) -> str:
        return f"{self._together}:lease:{key}"

    def _tags_of(self, key: str) -> Collection[str]:
        return self._tags.get(key, {}).values()

    async def _found(self, key: str, fingerprint: str, name: str, answer: Answer) -> Found:
        if answer.instant is None:
            self._seen, _ = await self._stamped(())
            return Found(None, self._seen, {})
        entry = self._entry(answer, name, fingerprint)
        if entry is None:
            return Found(None, answer.instant, {})
        self._remember(key, entry.versions)
        versions = answer.stamps(self._tags[key])
        if versions is None:
            epoch, versions = await self.versions(entry.versions)
            # Cleared in between: the instant must not be later than what a request reads after it.
            if epoch != answer.instant.epoch:
                entry = None
        elif not entry.is_outdated(answer.instant.epoch, versions) and (near := self._link().near) is not None:
            near.put(key, entry, answer.instant)
        return Found(entry, answer.instant, versions)

    def _entry(self, answer: Answer, name: str, fingerprint: str) -> Entry | None:
        data = answer.values[name]
        if data is None:
            return None
        # A key that many ask for at once is decoded once.
        entry = answer.entries.get(name)
        if entry is None or entry.fingerprint != fingerprint:
            entry = decode(data, fingerprint)
            if entry is None:
                self.unreadable += 1
            else:
                answer.entries[name] = entry
        return entry

    def _remember(self, key: str, versions: Mapping[str, int]) -> None:
        known = self._tags.get(key)
        if known is None or known.keys() != versions.keys():
            self._tags[key] = self._names(versions)
            if len(self._tags) > _REMEMBERED:
                self._tags.popitem(last=False)
        self._tags.move_to_end(key)

    def _names(self, tags: Iterable[str]) -> dict[str, str]:
        return {tag: f"{self._together}:tag:{tag}" for tag in tags}

    async def versions(self, tags: Collection[str]) -> tuple[str, dict[str, int]]:
        """Return the epoch and the stamp of each tag, in one round trip, unless one is pending or was evicted."""
        names = self._names(tags)
        answer = await self._link().read(names.values())
        stamps = answer.stamps(names)
        if answer.instant is not None and stamps is not None and PENDING not in stamps.values():
            return answer.instant.epoch, stamps
        instant, stamps = await self._stamped(tags)
        return instant.epoch, stamps

    async def _stamped(self, tags: Collection[str]) -> tuple[Instant, dict[str, int]]:
        """Begin a clock and stamp tags where there is none, and return them."""
        clock, *stamps = await self._run(VERSIONS, tags, patient=False)
        return instant_of(clock), dict(zip(tags, map(stamp_in, stamps), strict=True))

    def refuses(self, tags: Collection[str]) -> str | None:
        """Refuse nothing: every worker hears of every write."""

    async def save(self, key: str, entry: Entry, ttl: float) -> None:
        """Keep an entry for `ttl` seconds, if Redis has memory for it."""
        name, data = f"{self._prefix}:entry:{key}", encode(entry)
        try:
            await self._link().ask("SET", name, data, "PX", max(1, int(min(ttl, _LONGEST) * 1000)))
        except StoreUnavailable as error:
            if code_of(str(error)) != "OOM":
                raise
            self.refused_fills += 1
        else:
            self._remember(key, entry.versions)
            if (near := self._link().near) is not None:
                near.drop(key)

    async def discard(self, key: str) -> None:
        """Keep what lies under the key no longer."""
        await self._link().ask("DEL", f"{self._prefix}:entry:{key}")

    async def bump(self, tags: Collection[str], writer: str = "") -> None:
        """Move the clock, and stamp `tags` with it."""
        await self._stamp(tags, writer)

    async def mark(self, mark: Mark) -> None:
        """Move the clock, stamp the tags with it, and have them pending."""
        try:
            await self._stamp(mark.tags, mark.writer, mark.token, int(LONGEST_COMMIT * 1000))
        except asyncio.CancelledError:
            # It may have been made, and its commit will not be sent.
            self.settle(mark)
            raise

    def settle(self, mark: Mark) -> asyncio.Future[StoreUnavailable | None]:
        """Move the clock, stamp the tags with it, and have them pending for this mark no longer."""
        link = self._link()
        # Who has made the mark has sent the script.
        settled = link.post("EVALSHA", STAMP.digest, *self._arguments(mark.tags, mark.token, 0, ""))
        if (near := link.near) is not None:
            near.settling(mark.tags)
            settled.add_done_callback(lambda _: near.settled(mark.tags))
        return settled

    async def _stamp(self, tags: Collection[str], writer: str, token: str = "", pending: int = 0) -> None:
        clock = await self._run(STAMP, tags, token, pending, writer, patient=True)
        if (near := self._link().near) is not None:
            near.wrote(instant_of(clock), tags)

    async def history(self) -> list[Written]:
        """Return the last writes, newest first."""
        now, lines = await self._link().ask("EVAL", HISTORY, 1, self._writers)
        return [self._written(line, now) for line in lines]

    def _written(self, line: bytes, now: int) -> Written:
        (clock, *names), then, writer = _lines.decode(line)
        return Written(instant_of(clock.encode()), frozenset(self._tags_in(names)), writer, (now - then) / 1000)

    async def clear(self) -> None:
        """Begin a new epoch; entries of the old one leave with their time to live."""
        link = self._link()
        await link.ask("EVAL", CLEAR, 2, self._clock, self.channel, secrets.token_hex(8))
        if link.near is not None:
            link.near.forget()

    def hear(self, off: bytes | None) -> None:
        """Take note of what is switched off now."""
        # Mostly nothing is, or nothing else than before.
        if off != self._off_text:
            self._off_text = off
            self.off = frozenset((off or b"").decode().split("\n")) - {""}

    async def switch(self, name: str, *, off: bool) -> frozenset[str]:
        """Switch `name` off, or on again: each worker hears it with its next look-up."""
        self.hear(await self._link().ask("EVAL", SWITCH, 1, self._switches, name, int(off)))
        return self.off

    async def switched_off(self) -> frozenset[str]:
        """Return what is off now."""
        self.hear(await self._link().ask("GET", self._switches))
        return self.off

    def add(self, counts: Mapping[tuple[str, str], int]) -> bool:
        """Add to the counts of all workers, behind what was asked last on this loop's connection."""
        pairs = [part for (route, name), count in counts.items() for part in (f"{route}\n{name}", count)]
        return not self._link().post("EVAL", ADD, 1, self._counts, _DAY, *pairs).done()

    async def sums(self) -> dict[str, dict[str, int]]:
        """Return these counts, of the day."""
        reply = await self._link().ask("HGETALL", self._counts)
        sums: dict[str, dict[str, int]] = {}
        pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
        for field, count in pairs:
            route, _, name = field.decode().partition("\n")
            sums.setdefault(route, {})[name] = int(count)
        return sums

    def statistics(self) -> dict[str, int]:
        """Return what was counted, and what is kept near."""
        near = [route.near.statistics() for route in self._routes.values() if route.near is not None]
        return {
            "redis.trips": self.trips,
            "redis.answered": self.batched,
            "redis.unreadable": self.unreadable,
            "redis.full": self.refused_fills,
            "redis.opened": self.opened,
        } | {name: sum(each[name] for each in near) for name in (near[0] if near else ())}

    def push(self) -> Push:
        """Return how this process hears of what others write."""
        is_told = any(route.is_told for route in self._routes.values())
        return Push("pubsub" if is_told else "none", self._push_lag)

    async def aclose(self) -> None:
        """Close this loop's connections."""
        route = self._routes.pop(asyncio.get_running_loop(), None)
        if route is not None:
            await route.aclose()
        if self._member is not None and all(loop.is_closed() for loop in self._routes):
            member, self._member = self._member, None
            atexit.unregister(member.close)
            await asyncio.to_thread(member.close)

    def member(self) -> Member:
        """Return this process among those that share the store."""
        if self._member is None or self._member.pid != os.getpid():
            names = (self._members, self._trusted, self._clock, self.channel)
            self._member = Member(names, self._connection, (RedisError, OSError))
            # A process that ends is not one that is cut off.
            atexit.register(self._member.close)
        return self._member

    def _connection(self) -> Connection:
        return blocking_connection(self._url)

    @property
    def members(self) -> int:
        """How many processes share the store, as was last heard."""
        return 0 if self._member is None else self._member.count

    def withdraw(self) -> float:
        """Let this process's lease run out."""
        return 0.0 if self._member is None else self._member.withdraw()

    def rejoin(self) -> None:
        """Take this process's lease up again."""
        if self._member is not None:
            self._member.rejoin()

    async def _run(self, script: Script, tags: Collection[str], *values: str | int, patient: bool) -> Any:
        arguments = self._arguments(tags, *values)
        link = self._link()
        try:
            return await link.ask("EVALSHA", script.digest, *arguments, patient=patient)
        except StoreUnavailable as error:
            if code_of(str(error)) != "NOSCRIPT":
                raise
        return await link.ask("EVAL", script.text, *arguments, patient=patient)

    def _arguments(self, tags: Collection[str], *values: str | int) -> tuple[str | int, ...]:
        names = (self._clock, *self._names(tags).values(), self._writers, self.channel)
        return (len(names), *names, secrets.token_hex(8), *values)

    def _link(self) -> Route:
        loop = asyncio.get_running_loop()
        route = self._routes.get(loop)
        if route is None:
            route = self._routes[loop] = self._new_route(loop)
        return route

    def _new_route(self, loop: asyncio.AbstractEventLoop) -> Route:
        near = Near(self._max_bytes) if self._max_bytes else None
        return Link(self, loop, self._address, (self._clock, self._switches, self._trusted), near)

    def heard(self, near: Near, payload: bytes) -> None:
        """Take note of a write that Redis tells of."""
        (clock, *names), microseconds = _messages.decode(payload)
        near.hear(instant_of(clock.encode()), self._tags_in(names))
        if names:
            self._push_lag.note(self.member().since(microseconds / 1000))

    def _tags_in(self, names: Iterable[str]) -> list[str]:
        return [name.removeprefix(f"{self._together}:tag:") for name in names]


def _nothing() -> None:
    """Be told of what nobody wants to know."""


def _is_about_login(error: str) -> bool:
    # A password where Redis has none is an `ERR AUTH <password> called without any password configured`.
    return code_of(error) in ("WRONGPASS", "NOAUTH", "NOPERM") or "AUTH" in error
