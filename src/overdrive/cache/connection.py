"""One socket to Redis: its address, commands in their order, and what is late. The one module that imports its client.

redis-py reads the URL; commands go over one connection, answered in their order
(https://redis.io/docs/latest/develop/reference/protocol-spec/), and hiredis parses the answers.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from overdrive.errors import ConfigurationError

from . import member
from .store import StoreUnavailable

try:
    from hiredis import ProtocolError, PushNotification, Reader, pack_command
    from hiredis import ReplyError as ReplyError
    from redis import ConnectionPool as BlockingPool
    from redis.asyncio import ConnectionPool, SSLConnection, UnixDomainSocketConnection
    from redis.backoff import NoBackoff
    from redis.crc import key_slot as key_slot
    from redis.exceptions import RedisError as RedisError
    from redis.retry import Retry
except ImportError:
    raise ConfigurationError("redis_url needs redis-py, which is missing: pip install 'overdrive[redis]'") from None

if TYPE_CHECKING:
    from .link import Link

#: Seconds a look-up waits for Redis before it goes on without; the database answers sooner than a dead cache.
PATIENCE = 0.05

#: How often in a row a loop that is held up is no reason to call Redis late.
_MOST_EXCUSES = 10

#: Seconds of silence after which Redis is given up; a write should reach the other workers if it can.
DEADLINE = 0.5

LATE = f"Redis takes more than {PATIENCE:g} s to answer, which no request waits for"

#: What the parser says of a reply that has not arrived as a whole.
_NOT_ALL = object()


class _Trip:
    """A command that is on its way, and who gets the reply to it: its value, or the exception that it is."""

    __slots__ = ("deliver", "patient", "sent")

    def __init__(self, sent: float, deliver: Callable[[Any], None], patient: bool) -> None:
        self.sent = sent
        self.deliver = deliver
        self.patient = patient


class Connection(asyncio.Protocol):
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
        #: Why it is gone; None while it is there.
        self._gone: str | None = None
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
        """Send a command; on a connection that is gone it fails at once."""
        if self._gone is not None:
            deliver(StoreUnavailable(self._gone))
            return
        now = self._loop.time()
        self._trips.append(_Trip(now, deliver, patient))
        if self._watch is None:
            self._watch_until(now + PATIENCE)
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
            self.late = self.late and bool(self._trips) and self._heard - self._trips[0].sent >= PATIENCE
        except (ProtocolError, IndexError) as error:
            self.close(f"Redis is not understood: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """Fail what still waits."""
        self.close(f"Redis closed the connection{f': {error}' if error else ''}")
        self.closed.set_result(None)

    def close(self, why: str) -> None:
        """Drop the socket, and fail what still waits."""
        if self._gone is not None:
            return
        self._gone = why
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
        if now - self._due >= PATIENCE / 2 and self._excuses < _MOST_EXCUSES:
            # It is the loop that was held up, by a crowd of requests, say; and the machine, it may be.
            self._excuses += 1
            self._watch_until(now + PATIENCE)
            return
        heard = max(sent, self._heard)
        if now - heard >= DEADLINE:
            self.close(f"Redis has not answered for {DEADLINE:g} s")
            return
        # A reply that arrives in parts is not late. Loops read their sockets before they run their timers.
        since = heard if self._reader.has_data() else sent
        if now - since >= PATIENCE and not self.late:
            self.late = True
            self._link.fell_behind()
            self._fail_look_ups()
        self._watch_until((now if self.late else since) + PATIENCE)

    def _watch_until(self, due: float) -> None:
        self._due = due
        self._watch = self._loop.call_at(due, self._judge)

    def _fail_look_ups(self) -> None:
        for trip in self._trips:
            if not trip.patient:
                # Who was told does not listen to the reply any more.
                trip.deliver(StoreUnavailable(LATE))


def _settle(future: asyncio.Future[Any], reply: Any) -> None:
    if not future.done():
        future.set_result(reply)


class Address:
    """Where a URL says that Redis is, and what is said to it first.

    where: the URL, without what is secret in it.
    database: its number, 0 or None for the first.
    """

    def __init__(self, url: str) -> None:
        self.where = without_secrets(url)
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

    async def connect(self, link: Link, arrive: Callable[[Connection], Awaitable[None]] | None = None) -> Connection:
        """Open a connection, log in, choose the database and do as `arrive` does."""
        connection = await self._socket(partial(Connection, link))
        try:
            await connection.demand(*self._greeting)
            if arrive is not None:
                await arrive(connection)
        except BaseException:
            connection.close("closed")
            await connection.closed
            raise
        return connection

    async def _socket(self, protocol: Callable[[], Connection]) -> Connection:
        loop, parts = asyncio.get_running_loop(), self._parts
        if isinstance(parts, UnixDomainSocketConnection):
            return (await loop.create_unix_connection(protocol, parts.path))[1]
        tls = parts.ssl_context.get() if isinstance(parts, SSLConnection) else None
        return (await loop.create_connection(protocol, parts.host, parts.port, ssl=tls))[1]


def blocking_connection(url: str) -> member.Connection:
    """Return what a thread opens a connection of its own with."""
    pool: Any = BlockingPool.from_url(
        url,
        socket_timeout=DEADLINE,
        socket_connect_timeout=DEADLINE,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )
    connection: member.Connection = pool.make_connection()
    return connection


def code_of(error: str) -> str | None:
    """Return the code of Redis' error, as `OOM`; before Redis 7 a script's error has that of its command inside."""
    codes: list[str] = re.findall(r"(?:^| -)([A-Z]+)\b", error)
    return codes[-1] if codes else None


def without_secrets(url: str) -> str:
    """Return a URL without user, password and options."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
