"""Entries and versions in Redis, shared by all workers. The one module that knows Redis.

Under the prefix lie `clock` (the epoch and the number of writes, in one string, so that they vanish together),
`tag:*` (the write a tag was last named by, and behind it the marks for which it is pending), `entry:*`, `lease:*` (who
is making an entry), `off` (what is switched off, a line each), `counts` (of all workers, a hash), `members` and
`trusted` (see `member`) and `history` (which server these are of).

What all look-ups of one tick of the event loop need is asked for with one MGET, which Redis answers as of one
moment. redis-py reads the URL; commands go over one connection for each loop, answered in their order
(https://redis.io/docs/latest/develop/reference/protocol-spec/), and hiredis parses the answers. On the same connection
Redis tells of every write (RESP3 lets it push), in their order among the answers: so each answer says that all that
was written before it has been heard, and entries may be kept in this process (`near`).
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import logging
import os
import random
import re
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, cast

import msgspec

from overdrive.errors import ConfigurationError

from .entry import Entry, Instant, decode, encode
from .member import Connection, Member
from .near import Near
from .store import LONGEST_COMMIT, NOBODY_WAITS, PENDING, Claim, Found, Mark, StoreUnavailable

try:
    from hiredis import ProtocolError, PushNotification, Reader, ReplyError, pack_command
    from redis import ConnectionPool as BlockingPool
    from redis.asyncio import ConnectionPool, SSLConnection, UnixDomainSocketConnection
    from redis.backoff import NoBackoff
    from redis.crc import key_slot as key_slot
    from redis.exceptions import RedisError
    from redis.retry import Retry
except ImportError:
    raise ConfigurationError("redis_url needs redis-py, which is missing: pip install 'overdrive[redis]'") from None

logger = logging.getLogger("overdrive")

#: Seconds a look-up waits for Redis before it goes on without; the database answers sooner than a dead cache.
_PATIENCE = 0.05

#: How often in a row a loop that is held up is no reason to call Redis late.
_MOST_EXCUSES = 10

#: Seconds of silence after which Redis is given up; a write should reach the other workers if it can.
_DEADLINE = 0.5

#: Seconds until Redis is tried again: at first, and at most.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0

#: Keys whose entries' tags are remembered, to be asked for together with the entry.
_REMEMBERED = 10_000

#: Seconds the counts are kept after they were last added to.
_DAY = 86_400

#: Seconds between two warnings of the same kind.
_WARNING_INTERVAL = 60.0

#: The refusals that leave look-ups possible, and what is to be done about them.
_WRITE_REFUSALS = {
    "OOM": "Redis is out of memory and keeps nothing new: raise its maxmemory, or let it evict with allkeys-lru",
    "READONLY": "Redis is a read-only replica and cannot be told of writes: redis_url must name the primary",
    "MISCONF": "Redis refuses writes since it cannot save to its disk: see its log",
}

#: What only the nodes of a cluster say.
_REDIRECTIONS = ("MOVED", "ASK", "CROSSSLOT")
_IS_CLUSTER = "it is a cluster: redis_url must begin with redis+cluster://, or rediss+cluster:// with TLS"


class _Script:
    """What Redis runs as one command, and the name it knows it by once it has seen it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# KEYS: clock, tags...  ARGV: an epoch, should there be none.
_CLOCK = """
local clock = redis.call('GET', KEYS[1])
if not clock then
    clock = ARGV[1] .. ' 0'
    redis.call('SET', KEYS[1], clock)
end
local epoch, now = string.match(clock, '(%S+) (%d+)')
"""

# What scripts that look at tags have in common. A tag's value is its stamp, and ` token=deadline` for each mark.
_TAGS = f"""{_CLOCK}
local time = redis.call('TIME')
local milliseconds = time[1] * 1000 + math.floor(time[2] / 1000)

local function marks_of(value, settled)
    local open, over = '', false
    for token, deadline in string.gmatch(value or '', ' (%x+)=(%d+)') do
        if token ~= settled and tonumber(deadline) > milliseconds then
            open = open .. ' ' .. token .. '=' .. deadline
        else
            over = true
        end
    end
    return open, over
end

local function move()
    now = string.format('%.0f', now + 1)
    clock = epoch .. ' ' .. now
    redis.call('SET', KEYS[1], clock)
end

-- Where the user may use no channels, nobody can listen to one either.
local function tell(told)
    redis.pcall('PUBLISH', KEYS[#KEYS], cmsgpack.pack(told))
end
"""

# KEYS: clock, tags..., a channel. Returns the clock and the tags' stamps.
# A tag whose stamp was evicted gets the present one: entries that hold an older stamp stay invalid, and one that
# holds this very stamp is right, since no write came after it. So does a tag whose stamp is ahead of the clock:
# it is of an earlier epoch, and no fill could be older than it. A mark that has run out is a write that nobody has
# said the end of: it may have become visible at any moment until now, so the tag is stamped anew. No entry holds the
# stamp it had, and nobody need hear of the tag.
_VERSIONS = _Script(f"""{_TAGS}
local answer, over = {{}}, {{}}
for i = 2, #KEYS - 1 do
    local value = redis.call('GET', KEYS[i])
    local open, expired = marks_of(value)
    local stamp = string.match(value or '', '^%d+')
    if open ~= '' then
        stamp = 'pending'
    elseif expired then
        over[#over + 1] = i
    elseif not stamp or tonumber(stamp) > tonumber(now) then
        stamp = now
        redis.call('SET', KEYS[i], stamp)
    end
    answer[i] = stamp
end
if #over > 0 then
    move()
    for _, i in ipairs(over) do
        redis.call('SET', KEYS[i], now)
        answer[i] = now
    end
    tell({{clock}})
end
answer[1] = clock
return answer
""")

# KEYS: clock, tags..., a channel.  ARGV: an epoch, a mark's token if any, milliseconds for which it is pending: 0 where
# it is settled. Returns the clock. Who listens is not told of the tags once more when they are settled.
_STAMP = _Script(f"""{_TAGS}
move()
local told, token, pending = {{clock}}, ARGV[2], tonumber(ARGV[3])
for i = 2, #KEYS - 1 do
    local marks = marks_of(redis.call('GET', KEYS[i]), token)
    if pending > 0 then
        marks = marks .. ' ' .. token .. '=' .. string.format('%.0f', milliseconds + pending)
    end
    redis.call('SET', KEYS[i], now .. marks)
    if token == '' or pending > 0 then
        told[i] = KEYS[i]
    end
end
tell(told)
return clock
""")

# KEYS: clock, history, channel.  ARGV: an epoch, should the history be another one: that of a server which restarted,
# or of another one that has its place by now. Either may have forgotten the last writes.
_SAME_HISTORY = """
local history = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    .. string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
if redis.call('GET', KEYS[2]) ~= history then
    local clock = ARGV[1] .. ' 0'
    redis.call('SET', KEYS[1], clock)
    redis.call('SET', KEYS[2], history)
    redis.pcall('PUBLISH', KEYS[3], cmsgpack.pack({clock}))
end
"""

# KEYS: clock, channel.  ARGV: an epoch.
_CLEAR = """
local clock = ARGV[1] .. ' 0'
redis.call('SET', KEYS[1], clock)
redis.pcall('PUBLISH', KEYS[2], cmsgpack.pack({clock}))
"""

#: Seconds for which it is taken for granted that every write was heard, and between two looks where nobody asks.
_NEAR_LEASE = 1.0
_NEAR_RENEWAL = 0.3

#: Milliseconds a lease outlives its holder, and seconds between the renewals while one is held. A loop that a crowd
#: of thousands holds up for some seconds is not dead.
_LEASE = 5000
_RENEWAL = 0.3

# KEYS: leases...  ARGV: milliseconds, the token of each.
_RENEW = """
for i = 1, #KEYS do
    if redis.call('GET', KEYS[i]) == ARGV[i + 1] then
        redis.call('PEXPIRE', KEYS[i], ARGV[1])
    end
end
"""

# KEYS: a lease.  ARGV: its token, milliseconds, and what it is to say for so long, if anything.
_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
    if ARGV[3] == '' then
        redis.call('DEL', KEYS[1])
    else
        redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
    end
end
"""

# KEYS: what is off.  ARGV: a name, and whether it is to be off. Returns what is off now.
_SWITCH = """
local names = {}
for name in string.gmatch(redis.call('GET', KEYS[1]) or '', '[^\\n]+') do
    if name ~= ARGV[1] then names[#names + 1] = name end
end
if ARGV[2] == '1' then names[#names + 1] = ARGV[1] end
local text = table.concat(names, '\\n')
if text == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], text) end
return text
"""

# KEYS: the counts.  ARGV: seconds they are kept, then name and number of each.
_ADD = """
for i = 2, #ARGV, 2 do
    redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""

_LATE = f"Redis takes more than {_PATIENCE:g} s to answer, which no request waits for"

_CUT_OFF = "a process that shares it is cut off from it: nothing is served until it is back, or was away for 10 s"

#: What the parser says of a reply that has not arrived as a whole.
_NOT_ALL = object()


class Route(Protocol):
    """From one event loop to Redis: to one server, or to several that share the keys.

    near: what is kept in this process besides, where anything is.
    """

    near: Near | None

    async def read(self, names: Collection[str]) -> Answer:
        """Return the clock and what lies under `names`."""

    async def ask(self, *command: str | int | bytes, patient: bool = True) -> Any:
        """Send one command, and return the reply to it."""

    def post(self, *command: str | int | bytes) -> asyncio.Future[StoreUnavailable | None]:
        """Send a command to the clock's server without waiting; the result is its error, if any."""

    def hold(self, lease: str, token: str) -> None:
        """Renew a lease until it is let go."""

    def let_go(self, token: str) -> None:
        """Renew a lease no longer."""

    async def aclose(self) -> None:
        """Close the connections."""


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
        self.suspended = 0
        self._member: Member | None = None

    def _base_of(self, prefix: str) -> str:
        return prefix

    async def ping(self) -> None:
        """Ask Redis for an answer; `ConfigurationError` says in one line why it gave none."""
        where = _without_secrets(self._url)
        try:
            async with asyncio.timeout(_DEADLINE):
                await self._visit()
        except (OSError, UnicodeError, StoreUnavailable) as error:
            why = str(error) or type(error).__name__
            if _is_about_login(why):
                raise ConfigurationError(
                    f"Redis at {where} refuses the user of redis_url: correct the user name and password there, "
                    f"or what Redis' ACL permits ({why})"
                ) from None
            if _code(why) in _REDIRECTIONS:
                raise ConfigurationError(f"Redis at {where} cannot be used: {_IS_CLUSTER}") from None
            raise ConfigurationError(f"Redis at {where} cannot be reached: {why}") from None

    async def _visit(self) -> None:
        """Do what look-ups and announcements do."""
        # A node of a cluster may serve one name, but not two that lie in different slots.
        look_up = ("MGET", self._clock, f"{self._prefix}:entry:")
        await self._demand(self._address, look_up, self.compare_history(), self._beginning())

    def compare_history(self) -> tuple[str | int, ...]:
        """Return the command that begins a new epoch where writes may have been forgotten."""
        return "EVAL", _SAME_HISTORY, 3, self._clock, self._history, self.channel, secrets.token_hex(8)

    async def described(self) -> dict[str, str]:
        """Return what Redis says of itself by INFO, and as `pushes` whether it may tell of writes: yes, or why not."""
        loop = asyncio.get_running_loop()
        connection = await self._address.connect(Link(self, loop, self._address, (self._clock, self._switches)))
        try:
            (info,) = await connection.demand(("INFO",))
            pairs = (line.partition(":") for line in info.decode().splitlines() if ":" in line)
            said = {name: value for name, _, value in pairs} | {"pushes": "yes"}
            for command in (("HELLO", 3), ("SUBSCRIBE", self.channel)):
                if isinstance(reply := await connection.ask(*command), ReplyError | StoreUnavailable):
                    said["pushes"] = str(reply)
                    break
            return said
        finally:
            connection.close("closed")
            await connection.closed

    def _beginning(self) -> tuple[str | int, ...]:
        return "EVAL", _VERSIONS.text, 2, self._clock, self.channel, secrets.token_hex(8)

    async def _demand(self, address: Address, *commands: tuple[str | int, ...]) -> list[Any]:
        """Send commands on a connection of their own, whether the breaker is open or not."""
        connection = await address.connect(
            Link(self, asyncio.get_running_loop(), address, (self._clock, self._switches))
        )
        try:
            return await connection.demand(*commands)
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
        refusal = link.post("SET", lease, token, "NX", "PX", _LEASE) if token else None
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
        link.post("EVAL", _RELEASE, 1, self._lease(key), token, _LEASE, NOBODY_WAITS if alone else "")

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
        clock, *stamps = await self._run(_VERSIONS, tags, patient=False)
        return _instant(clock), dict(zip(tags, map(_stamp_in, stamps), strict=True))

    def refuses(self, tags: Collection[str]) -> str | None:
        """Refuse nothing: every worker hears of every write."""

    async def save(self, key: str, entry: Entry, ttl: float) -> None:
        """Keep an entry for `ttl` seconds, if Redis has memory for it."""
        name, data = f"{self._prefix}:entry:{key}", encode(entry)
        try:
            await self._link().ask("SET", name, data, "PX", max(1, int(ttl * 1000)))
        except StoreUnavailable as error:
            if _code(str(error)) != "OOM":
                raise
            self.refused_fills += 1
        else:
            self._remember(key, entry.versions)
            if (near := self._link().near) is not None:
                near.drop(key)

    async def bump(self, tags: Collection[str]) -> None:
        """Move the clock, and stamp `tags` with it."""
        await self._stamp(tags)

    async def mark(self, mark: Mark) -> None:
        """Move the clock, stamp the tags with it, and have them pending."""
        try:
            await self._stamp(mark.tags, mark.token, int(LONGEST_COMMIT * 1000))
        except asyncio.CancelledError:
            # It may have been made, and its commit will not be sent.
            self.settle(mark)
            raise

    def settle(self, mark: Mark) -> asyncio.Future[StoreUnavailable | None]:
        """Move the clock, stamp the tags with it, and have them pending for this mark no longer."""
        # Who has made the mark has sent the script.
        return self._link().post("EVALSHA", _STAMP.digest, *self._arguments(mark.tags, mark.token, 0))

    async def _stamp(self, tags: Collection[str], token: str = "", pending: int = 0) -> None:
        clock = await self._run(_STAMP, tags, token, pending, patient=True)
        if (near := self._link().near) is not None:
            near.wrote(_instant(clock), tags)

    async def clear(self) -> None:
        """Begin a new epoch; entries of the old one leave with their time to live."""
        link = self._link()
        await link.ask("EVAL", _CLEAR, 2, self._clock, self.channel, secrets.token_hex(8))
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
        self.hear(await self._link().ask("EVAL", _SWITCH, 1, self._switches, name, int(off)))
        return self.off

    async def switched_off(self) -> frozenset[str]:
        """Return what is off now."""
        self.hear(await self._link().ask("GET", self._switches))
        return self.off

    def add(self, counts: Mapping[tuple[str, str], int]) -> bool:
        """Add to the counts of all workers, behind what was asked last on this loop's connection."""
        pairs = [part for (route, name), count in counts.items() for part in (f"{route}\n{name}", count)]
        return not self._link().post("EVAL", _ADD, 1, self._counts, _DAY, *pairs).done()

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
        pool: Any = BlockingPool.from_url(
            self._url,
            socket_timeout=_DEADLINE,
            socket_connect_timeout=_DEADLINE,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
        )
        connection: Connection = pool.make_connection()
        return connection

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

    async def _run(self, script: _Script, tags: Collection[str], *values: str | int, patient: bool) -> Any:
        arguments = self._arguments(tags, *values)
        link = self._link()
        try:
            return await link.ask("EVALSHA", script.digest, *arguments, patient=patient)
        except StoreUnavailable as error:
            if _code(str(error)) != "NOSCRIPT":
                raise
        return await link.ask("EVAL", script.text, *arguments, patient=patient)

    def _arguments(self, tags: Collection[str], *values: str | int) -> tuple[str | int, ...]:
        names = (self._clock, *self._names(tags).values(), self.channel)
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
        clock, *names = msgspec.msgpack.decode(payload, type=list[str])
        near.hear(_instant(clock.encode()), [name.removeprefix(f"{self._together}:tag:") for name in names])


class Answer:
    """What Redis held at one moment, under the names the look-ups of one tick asked for.

    instant: the clock; None where there is none.
    values: what lies under each name.
    entries: those of the values that have been decoded.
    """

    __slots__ = ("entries", "instant", "values")

    def __init__(self, clock: bytes | None, values: dict[str, bytes | None]) -> None:
        self.instant = None if clock is None else _instant(clock)
        self.values = values
        self.entries: dict[str, Entry] = {}

    def stamps(self, names: dict[str, str]) -> dict[str, int] | None:
        """Return the stamp of each tag, or `PENDING`.

        None where one was not asked for, is missing or is ahead of the clock.
        """
        if self.instant is None:
            return None
        stamps = {}
        for tag, name in names.items():
            value = self.values.get(name)
            if value is None or self.instant.now < (stamp := _stamp_in(value)) != PENDING:
                return None
            stamps[tag] = stamp
        return stamps


class Link:
    """From one event loop to Redis: the connection, what the present tick asks for, and the circuit breaker.

    The breaker is closed while Redis answers. A failure opens it, and every call fails at once. The first call
    after a pause has one attempt to connect made, which it does not wait for; its success closes the breaker.
    """

    #: The refusals that say nothing of how Redis is.
    _harmless: Collection[str] = ("NOSCRIPT",)
    #: Whether those who share the store are known.
    _has_members = True

    def __init__(
        self,
        store: RedisStore,
        loop: asyncio.AbstractEventLoop,
        address: Address,
        always: tuple[str, ...],
        near: Near | None = None,
    ) -> None:
        self.near = near
        self._looking: asyncio.TimerHandle | None = None
        self._store = store
        self._loop = loop
        self._address = address
        #: What each look-up asks for: the clock, what is switched off, and until when all members can be heard.
        self._always = always
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._connecting_since = 0.0
        #: Whether Redis tells of every write on this connection.
        self._listens = False
        #: What the present tick asks for, and who does.
        self._names: dict[str, None] = {}
        self._readers: list[asyncio.Future[Answer]] = []
        #: The leases that are held, by their tokens, and when they are to be renewed.
        self._leases: dict[str, str] = {}
        self._renewal: asyncio.TimerHandle | None = None
        # The breaker. Without a time to retry at, it is closed.
        self._retry_at: float | None = None
        self._pause = _FIRST_PAUSE
        self._closed_at = float("-inf")
        self._why = ""
        self._warned: dict[str, float] = {}

    async def read(self, names: Collection[str]) -> Answer:
        """Return the clock and what lies under `names`, asked for together with what others ask for in this tick."""
        connection = self._connection or await self._connected()
        if connection.late:
            raise StoreUnavailable(_LATE)
        if not self._readers:
            self._loop.call_soon(self._send_reads)
        self._names.update(dict.fromkeys(names))
        reader: asyncio.Future[Answer] = self._loop.create_future()
        self._readers.append(reader)
        return await reader

    def _send_reads(self) -> None:
        names, self._names = self._names, {}
        readers, self._readers = self._readers, []
        deliver = partial(self._deliver, readers, list(names), self._loop.time())
        if self._connection is None:
            deliver(StoreUnavailable(self._why))
        else:
            self._store.trips += 1
            self._connection.send(("MGET", *self._always, *names), deliver, patient=False)

    def _deliver(self, readers: list[asyncio.Future[Answer]], names: list[str], sent: float, reply: Any) -> None:
        error = self._error(reply)
        waiting = [reader for reader in readers if not reader.done()]
        if error is not None:
            for reader in waiting:
                reader.set_exception(StoreUnavailable(str(error)))
            return
        self._store.batched += len(waiting)
        clock, off, *values = reply
        self._store.hear(off)
        until = float("inf")
        if self._has_members:
            trusted, *values = values
            if trusted is None:
                self._suspend(waiting)
                return
            until = self._store.member().until(int(trusted))
        answer = Answer(clock, dict(zip(names, values, strict=True)))
        if answer.instant is not None:
            self._store.saw(answer.instant)
            if self._listens and self.near is not None:
                self.near.confirm(answer.instant, min(sent + _NEAR_LEASE, until))
        for reader in waiting:
            reader.set_result(answer)

    def _suspend(self, waiting: list[asyncio.Future[Answer]]) -> None:
        """Answer nobody; what is near has ended by itself, and goes on where it was, as all writes are heard of."""
        self._store.suspended += 1
        self._warn(_CUT_OFF)
        for reader in waiting:
            reader.set_exception(StoreUnavailable(_CUT_OFF))

    def told(self, kind: bytes, payload: Any) -> None:
        """Take what Redis tells unasked."""
        if kind == b"subscribe":
            self._listens = True
        elif kind == b"message" and self.near is not None:
            self._store.heard(self.near, payload)

    def _look(self) -> None:
        """Ask for the clock where nobody has, so that entries may be kept near."""
        self._looking = None
        if self._connection is not None and self._listens:
            if not self._readers and not self._connection.late:
                self._send_reads()
            self._store.looked()
            self._looking = self._loop.call_later(_NEAR_RENEWAL, self._look)

    async def ask(self, *command: str | int | bytes, patient: bool = True) -> Any:
        """Send one command, and return the reply to it."""
        connection = self._connection or await self._connected()
        if connection.late and not patient:
            raise StoreUnavailable(_LATE)
        self._store.trips += 1
        reply = await connection.ask(*command, patient=patient)
        error = self._error(reply)
        if error is not None:
            raise error
        return reply

    def post(self, *command: str | int | bytes) -> asyncio.Future[StoreUnavailable | None]:
        """Send a command without waiting; the future's result is the error that has come of it, if any."""
        refusal: asyncio.Future[StoreUnavailable | None] = self._loop.create_future()
        if self._connection is None:
            refusal.set_result(StoreUnavailable(self._why))
        else:
            self._store.trips += 1
            self._connection.send(command, lambda reply: refusal.set_result(self._error(reply)), patient=True)
        return refusal

    def hold(self, lease: str, token: str) -> None:
        """Renew a lease until it is let go."""
        self._leases[token] = lease
        if self._renewal is None:
            self._renewal = self._loop.call_later(_RENEWAL, self._renew)

    def let_go(self, token: str) -> None:
        """Renew a lease no longer."""
        self._leases.pop(token, None)

    def _renew(self) -> None:
        self._renewal = None
        if self._leases:
            self.post("EVAL", _RENEW, len(self._leases), *self._leases.values(), _LEASE, *self._leases)
            self._renewal = self._loop.call_later(_RENEWAL, self._renew)

    def _error(self, reply: Any) -> StoreUnavailable | None:
        if isinstance(reply, StoreUnavailable):
            return reply
        if not isinstance(reply, ReplyError):
            return None
        error = StoreUnavailable(str(reply))
        code = _code(str(error))
        if code in _WRITE_REFUSALS:
            self._warn(_WRITE_REFUSALS[code])
        elif code not in self._harmless and self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close(str(error))
            self._open(str(error))
        return error

    def fell_behind(self) -> None:
        """Take note that look-ups are no longer waited for."""
        self._warn(_LATE)

    def _warn(self, message: str) -> None:
        now = time.monotonic()
        if now - self._warned.get(message, float("-inf")) >= _WARNING_INTERVAL:
            self._warned[message] = now
            logger.warning("the cache's store: %s", message)

    async def _connected(self) -> _Connection:
        now = self._loop.time()
        if self._retry_at is not None:
            if self._connecting is None and now >= self._retry_at:
                self._connect(now)
            raise StoreUnavailable(self._why)
        connecting = self._connecting or self._connect(now)
        if now - self._connecting_since > _PATIENCE:
            raise StoreUnavailable(_LATE)
        await asyncio.wait([connecting])
        if self._connection is None:
            raise StoreUnavailable(self._why)
        return self._connection

    def _connect(self, now: float) -> asyncio.Task[None]:
        self._connecting_since = now
        self._connecting = self._loop.create_task(self._try_to_connect())
        return self._connecting

    async def _try_to_connect(self) -> None:
        try:
            async with asyncio.timeout(_DEADLINE):
                self._listens = False
                self._connection = await self._address.connect(self, self._arrive)
                if self.near is not None:
                    await self._listen(self._connection)
        except TimeoutError:
            self._open(f"Redis has not answered for {_DEADLINE:g} s")
        except (OSError, UnicodeError, StoreUnavailable) as error:
            self._open(str(error) or type(error).__name__)
        else:
            self._close()
        finally:
            self._connecting = None

    async def _arrive(self, connection: _Connection) -> None:
        """Do what is to be done before anything is read: look whether this is the Redis of before, and join."""
        member = self._store.member()
        sent = time.monotonic()
        _, (seconds, microseconds) = await connection.demand(self._store.compare_history(), ("TIME",))
        member.learn(sent, time.monotonic(), int(seconds) * 1000 + int(microseconds) // 1000)
        if (renewal := member.renewal()) is not None:
            try:
                (reply,) = await connection.demand(renewal)
            except StoreUnavailable as error:
                # A Redis that is full refuses it, and serves what is trusted.
                if _code(str(error)) not in _WRITE_REFUSALS:
                    raise
            else:
                member.renewed([*reply[:3], *(other.decode() for other in reply[3:])])
        member.start()

    async def _listen(self, connection: _Connection) -> None:
        """Have Redis tell of every write, if it can and this user may: where not, nothing is kept near."""
        if not isinstance(await connection.ask("HELLO", 3), ReplyError):
            await connection.ask("SUBSCRIBE", self._store.channel)
        if self._listens and self._looking is None:
            self._looking = self._loop.call_later(0, self._look)

    def lost(self, connection: _Connection, why: str, *, waited: bool) -> None:
        """Take note that a connection is gone; that is a failure if somebody waited for an answer."""
        if self.near is not None:
            self.near.forget()
        if connection is self._connection:
            self._connection, self._why = None, why
            if waited:
                self._open(why)

    def _open(self, why: str) -> None:
        now = self._loop.time()
        if _code(why) in _REDIRECTIONS:
            why = _IS_CLUSTER
        if self._retry_at is None:
            # One that keeps failing right after it was reached is not to be tried ten times a second.
            if now - self._closed_at > _LONGEST_PAUSE:
                self._pause = _FIRST_PAUSE
            self._store.opened += 1
            logger.warning(
                "the cache's store at %s does not answer and is left alone until it does: %s", self._address.where, why
            )
        self._why = why
        self._retry_at = now + self._pause * random.uniform(0.5, 1)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _close(self) -> None:
        if self._retry_at is not None:
            self._retry_at = None
            self._closed_at = self._loop.time()
            logger.info("the cache's store at %s answers again", self._address.where)

    async def aclose(self) -> None:
        """Close the connection, or give up connecting."""
        self._why = "closed"
        for timer in (self._renewal, self._looking):
            if timer is not None:
                timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._connection is not None:
            connection, self._connection = self._connection, None
            if connection.is_awaited:
                # What was told is to arrive.
                await asyncio.wait([connection.ask("PING")], timeout=_PATIENCE)
            connection.close(self._why)
            await connection.closed


class _Trip:
    """A command that is on its way, and who gets the reply to it: its value, or the exception that it is."""

    __slots__ = ("deliver", "patient", "sent")

    def __init__(self, sent: float, deliver: Callable[[Any], None], patient: bool) -> None:
        self.sent = sent
        self.deliver = deliver
        self.patient = patient


class _Connection(asyncio.Protocol):
    """Commands on one socket, written at once and answered in their order.

    link: told when Redis is late, and when the socket is gone.
    """

    def __init__(self, link: Link) -> None:
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._reader = Reader(notEnoughData=_NOT_ALL)
        self._trips: deque[_Trip] = deque()
        self._heard = 0.0
        #: What looks whether Redis is late, when that is due, and how often it was put off since Redis was heard.
        self._watch: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._excuses = 0
        self._closing = False
        #: Whether Redis owes an answer for longer than a look-up waits for one.
        self.late = False
        self.closed: asyncio.Future[None] = self._loop.create_future()

    @property
    def is_awaited(self) -> bool:
        """Say whether an answer is on its way that may still come in time."""
        return bool(self._trips) and not self.late

    def ask(self, *command: str | int | bytes, patient: bool = True) -> asyncio.Future[Any]:
        """Send a command; the future's result is the reply, or the exception that it is."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self.send(command, partial(_settle, future), patient=patient)
        return future

    async def demand(self, *commands: tuple[str | int, ...]) -> list[Any]:
        """Send commands together and return the replies; raise `StoreUnavailable` if one of them is a refusal."""
        replies = [await reply for reply in [self.ask(*command) for command in commands]]
        for reply in replies:
            if isinstance(reply, ReplyError | StoreUnavailable):
                raise StoreUnavailable(str(reply))
        return replies

    def send(self, command: tuple[str | int | bytes, ...], deliver: Callable[[Any], None], *, patient: bool) -> None:
        """Send a command."""
        now = self._loop.time()
        self._trips.append(_Trip(now, deliver, patient))
        if self._watch is None:
            self._watch_until(now + _PATIENCE)
        self._transport.write(pack_command(command))  # type: ignore[arg-type]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the socket."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand out the replies that are complete."""
        self._heard, self._excuses = self._loop.time(), 0
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _NOT_ALL:
                if isinstance(reply, PushNotification):
                    self._link.told(reply[0], reply[-1])
                    # Who has asked to be told gets no other answer.
                    if reply[0] != b"subscribe":
                        continue
                self._trips.popleft().deliver(reply)
            self.late = self.late and bool(self._trips) and self._heard - self._trips[0].sent >= _PATIENCE
        except (ProtocolError, IndexError) as error:
            self.close(f"Redis is not understood: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """Fail what still waits."""
        self.close(f"Redis closed the connection{f': {error}' if error else ''}")
        self.closed.set_result(None)

    def close(self, why: str) -> None:
        """Drop the socket, and fail what still waits."""
        if self._closing:
            return
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        self._transport.abort()
        trips, self._trips = self._trips, deque()
        self._link.lost(self, why, waited=bool(trips))
        for trip in trips:
            trip.deliver(StoreUnavailable(why))

    def _judge(self) -> None:
        self._watch = None
        if not self._trips:
            return
        now, sent = self._loop.time(), self._trips[0].sent
        if now - self._due >= _PATIENCE / 2 and self._excuses < _MOST_EXCUSES:
            # It is the loop that was held up, by a crowd of requests, say; and the machine, it may be.
            self._excuses += 1
            self._watch_until(now + _PATIENCE)
            return
        heard = max(sent, self._heard)
        if now - heard >= _DEADLINE:
            self.close(f"Redis has not answered for {_DEADLINE:g} s")
            return
        # A reply that arrives in parts is not late. Loops read their sockets before they run their timers.
        since = heard if self._reader.has_data() else sent
        if now - since >= _PATIENCE and not self.late:
            self.late = True
            self._link.fell_behind()
            self._fail_look_ups()
        self._watch_until((now if self.late else since) + _PATIENCE)

    def _watch_until(self, due: float) -> None:
        self._due = due
        self._watch = self._loop.call_at(due, self._judge)

    def _fail_look_ups(self) -> None:
        for trip in self._trips:
            if not trip.patient:
                # Who was told does not listen to the reply any more.
                trip.deliver(StoreUnavailable(_LATE))


def _nothing() -> None:
    """Be told of what nobody wants to know."""


def _settle(future: asyncio.Future[Any], reply: Any) -> None:
    if not future.done():
        future.set_result(reply)


class Address:
    """Where a URL says that Redis is, and what is said to it first.

    where: the URL, without what is secret in it.
    database: its number, 0 or None for the first.
    """

    def __init__(self, url: str) -> None:
        self.where = _without_secrets(url)
        pool: Any = ConnectionPool.from_url(url)
        self._parts = parts = pool.make_connection()
        self.database = parts.db
        self._greeting: list[tuple[str | int, ...]] = []
        if parts.username or parts.password:
            self._greeting.append(("AUTH", *([parts.username] if parts.username else ()), parts.password or ""))
        if parts.client_name:
            self._greeting.append(("CLIENT", "SETNAME", parts.client_name))
        if parts.db:
            self._greeting.append(("SELECT", parts.db))
        # Refused by a server that is still loading, and by one that does not know us.
        self._greeting.append(("PING",))

    async def connect(self, link: Link, arrive: Callable[[_Connection], Awaitable[None]] | None = None) -> _Connection:
        """Open a connection, log in, choose the database and do as `arrive` does."""
        connection = await self._socket(partial(_Connection, link))
        try:
            await connection.demand(*self._greeting)
            if arrive is not None:
                await arrive(connection)
        except BaseException:
            connection.close("closed")
            await connection.closed
            raise
        return connection

    async def _socket(self, protocol: Callable[[], _Connection]) -> _Connection:
        loop, parts = asyncio.get_running_loop(), self._parts
        if isinstance(parts, UnixDomainSocketConnection):
            return (await loop.create_unix_connection(protocol, parts.path))[1]
        tls = parts.ssl_context.get() if isinstance(parts, SSLConnection) else None
        return (await loop.create_connection(protocol, parts.host, parts.port, ssl=tls))[1]


def _code(error: str) -> str | None:
    """Return the code of Redis' error, as `OOM`; before Redis 7 a script's error has that of its command inside."""
    codes: list[str] = re.findall(r"(?:^| -)([A-Z]+)\b", error)
    return codes[-1] if codes else None


def _is_about_login(error: str) -> bool:
    # A password where Redis has none is an `ERR AUTH <password> called without any password configured`.
    return _code(error) in ("WRONGPASS", "NOAUTH", "NOPERM") or "AUTH" in error


def _stamp_in(value: bytes) -> int:
    """Return the stamp of a tag: only while it is pending there is more than a number."""
    try:
        return int(value)
    except ValueError:
        return PENDING


def _instant(clock: bytes) -> Instant:
    epoch, now = clock.split()
    return Instant(epoch.decode(), int(now))


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
