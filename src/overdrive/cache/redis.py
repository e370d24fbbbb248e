"""Entries and versions in Redis, shared by all workers. The one module that knows Redis.

Under the prefix lie `clock` (a hash of the epoch and the number of writes, which can only vanish together),
`tag:*` (the write a tag was last named by) and `entry:*`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from overdrive.errors import ConfigurationError

from .entry import Entry, Instant, decode, encode
from .store import Found, StoreUnavailable

try:
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
except ImportError:
    raise ConfigurationError("redis_url needs redis-py, which is missing: pip install 'overdrive[redis]'") from None

T = TypeVar("T")

#: Seconds a request waits for Redis before it goes on without; the database answers sooner than a dead cache.
_TIMEOUT = 0.5

#: The most connections a worker opens, and the seconds a request waits for one: a crowd is slower than one request.
_CONNECTIONS = 50
_QUEUE_TIMEOUT = 2.0

# KEYS: clock, tags...  ARGV: an epoch, should there be none.  Returns the epoch and the tags' stamps.
# A tag whose stamp was evicted gets the present one: entries that hold an older stamp stay invalid, and one that
# holds this very stamp is right, since no write came after it. So does a tag whose stamp is ahead of the clock:
# it is of an earlier epoch, and no fill could be older than it.
_VERSIONS = """
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[1])
local now = redis.call('HGET', KEYS[1], 'now') or '0'
local answer = {redis.call('HGET', KEYS[1], 'epoch')}
for i = 2, #KEYS do
    local stamp = redis.call('GET', KEYS[i])
    if not stamp or tonumber(stamp) > tonumber(now) then
        stamp = now
        redis.call('SET', KEYS[i], stamp)
    end
    answer[i] = stamp
end
return answer
"""

# KEYS: clock, tags...  ARGV: an epoch, should there be none.
_BUMP = """
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[1])
local now = redis.call('HINCRBY', KEYS[1], 'now', 1)
for i = 2, #KEYS do
    redis.call('SET', KEYS[i], now)
end
"""

# KEYS: clock.  ARGV: the new epoch.
_CLEAR = """
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'now', 0)
"""


class RedisStore:
    """A store that all workers share.

    url: where Redis is.
    prefix: what every key starts with.

    Raises `ConfigurationError` for a URL that cannot be read.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self._url = url
        self._prefix = prefix
        self._clock = f"{prefix}:clock"
        self._seen: Instant | None = None
        # Connections belong to the loop they were opened on; scripts and tests have several.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Redis] = WeakKeyDictionary()
        try:
            self._connect()
        except ValueError as error:
            raise ConfigurationError(
                f"the Redis URL cannot be read: {error}; it looks like redis://host:6379/0"
            ) from None

    def _connect(self) -> Redis:
        # A crowd of requests waits for a connection; it does not take a busy Redis for a dead one.
        pool = BlockingConnectionPool.from_url(
            self._url,
            max_connections=_CONNECTIONS,
            timeout=_QUEUE_TIMEOUT,
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            retry=Retry(NoBackoff(), 1),
        )
        return Redis.from_pool(pool)

    async def ping(self) -> None:
        """Ask Redis for an answer; `ConfigurationError` says in one line why it gave none."""
        try:
            await self._ask(lambda client: client.ping())
        except StoreUnavailable as error:
            raise ConfigurationError(f"Redis at {_without_password(self._url)} cannot be reached: {error}") from None

    def seen(self) -> Instant | None:
        """Return the clock as it was in the last answer."""
        return self._seen

    def held(self, key: str) -> None:
        """Nothing is in this process."""

    async def load(self, key: str, fingerprint: str) -> Found:
        """Look up an entry and the clock, and then the stamps of its tags."""

        async def ask(client: Redis) -> Any:
            pipeline = client.pipeline(transaction=False)
            pipeline.get(f"{self._prefix}:entry:{key}")
            pipeline.hmget(self._clock, "epoch", "now")
            return await pipeline.execute()

        data, (epoch, now) = await self._ask(ask)
        if epoch is None:
            new_epoch, _ = await self.versions(())
            self._seen = Instant(new_epoch, 0)
        else:
            self._seen = Instant(epoch.decode(), int(now or 0))
        entry = decode(data, fingerprint) if data is not None else None
        if entry is None:
            return Found(None, self._seen, {})
        epoch, versions = await self.versions(entry.versions)
        # Cleared in between: the instant must not be later than what a request reads after it.
        return Found(entry if epoch == self._seen.epoch else None, self._seen, versions)

    async def versions(self, tags: Collection[str]) -> tuple[str, dict[str, int]]:
        """Return the epoch and the stamp of each tag, in one round trip."""
        epoch, *stamps = await self._run(_VERSIONS, tags)
        return epoch.decode(), dict(zip(tags, map(int, stamps), strict=True))

    async def save(self, key: str, entry: Entry, ttl: float) -> None:
        """Keep an entry for `ttl` seconds."""
        name, data = f"{self._prefix}:entry:{key}", encode(entry)
        await self._ask(lambda client: client.set(name, data, px=max(1, int(ttl * 1000))))

    async def bump(self, tags: Collection[str]) -> None:
        """Move the clock, and stamp `tags` with it."""
        await self._run(_BUMP, tags)

    async def clear(self) -> None:
        """Begin a new epoch; entries of the old one leave with their time to live."""
        await self._run(_CLEAR, ())

    async def aclose(self) -> None:
        """Close this loop's connections."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def _run(self, script: str, tags: Collection[str]) -> Any:
        keys = [self._clock, *(f"{self._prefix}:tag:{tag}" for tag in tags)]
        return await self._ask(lambda client: client.eval(script, len(keys), *keys, secrets.token_hex(8)))

    async def _ask(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = self._connect()
        try:
            return await command(client)
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable(str(error) or type(error).__name__) from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
