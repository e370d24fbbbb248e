"""From one event loop to Redis: what look-ups of one tick ask for, what Redis tells unasked, and the circuit breaker.

What all look-ups of one tick of the event loop need is asked for with one MGET, which Redis answers as of one
moment. On the same connection Redis tells of every write (RESP3 lets it push), in their order among the answers: so
each answer says that all that was written before it has been heard, and entries may be kept in this process (`near`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from . import connection as wire
from .connection import LATE, Address, Connection, ReplyError, code_of
from .entry import Entry, Instant
from .near import Near
from .scripts import RENEW
from .store import PENDING, StoreUnavailable

if TYPE_CHECKING:
    from .redis import RedisStore

logger = logging.getLogger("overdrive")

#: Seconds until Redis is tried again: at first, and at most.
FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0

#: Seconds between two warnings of the same kind.
_WARNING_INTERVAL = 60.0

#: The refusals that leave look-ups possible, and what is to be done about them.
_WRITE_REFUSALS = {
    "OOM": "Redis is out of memory and keeps nothing new: raise its maxmemory, or let it evict with allkeys-lru",
    "READONLY": "Redis is a read-only replica and cannot be told of writes: redis_url must name the primary",
    "MISCONF": "Redis refuses writes since it cannot save to its disk: see its log",
}

#: What only the nodes of a cluster say.
REDIRECTIONS = ("MOVED", "ASK", "CROSSSLOT")
IS_CLUSTER = "it is a cluster: redis_url must begin with redis+cluster://, or rediss+cluster:// with TLS"

#: Seconds for which it is taken for granted that every write was heard, and between two looks where nobody asks.
_NEAR_LEASE = 1.0
_NEAR_RENEWAL = 0.3

#: Milliseconds a lease outlives its holder, and seconds between the renewals while one is held. A loop that a crowd
#: of thousands holds up for some seconds is not dead.
LEASE = 5000
_RENEWAL = 0.3

_CUT_OFF = "a process that shares it is cut off from it: nothing is served until it is back, or was away for 10 s"


class Route(Protocol):
    """From one event loop to Redis: to one server, or to several that share the keys.

    near: what is kept in this process besides, where anything is.
    is_told: whether Redis tells of every write.
    """

    near: Near | None

    @property
    def is_told(self) -> bool:
        """Say whether Redis tells of every write."""

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


class Answer:
    """What Redis held at one moment, under the names the look-ups of one tick asked for.

    instant: the clock; None where there is none.
    values: what lies under each name.
    entries: those of the values that have been decoded.
    """

    __slots__ = ("entries", "instant", "values")

    def __init__(self, clock: bytes | None, values: dict[str, bytes | None]) -> None:
        self.instant = None if clock is None else instant_of(clock)
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
            if value is None or self.instant.now < (stamp := stamp_in(value)) != PENDING:
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
        self._connection: Connection | None = None
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
        self._pause = FIRST_PAUSE
        self._closed_at = float("-inf")
        self._why = ""
        self._warned: dict[str, float] = {}

    async def read(self, names: Collection[str]) -> Answer:
        """Return the clock and what lies under `names`, asked for together with what others ask for in this tick."""
        connection = self._connection or await self._connected()
        if connection.late:
            raise StoreUnavailable(LATE)
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

    @property
    def is_told(self) -> bool:
        """Say whether Redis tells of every write."""
        return self._listens and self._connection is not None

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
            raise StoreUnavailable(LATE)
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
            self.post("EVAL", RENEW, len(self._leases), *self._leases.values(), LEASE, *self._leases)
            self._renewal = self._loop.call_later(_RENEWAL, self._renew)

    def _error(self, reply: Any) -> StoreUnavailable | None:
        if isinstance(reply, StoreUnavailable):
            return reply
        if not isinstance(reply, ReplyError):
            return None
        error = StoreUnavailable(str(reply))
        code = code_of(str(error))
        if code in _WRITE_REFUSALS:
            self._warn(_WRITE_REFUSALS[code])
        elif code not in self._harmless and self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close(str(error))
            self._open(str(error))
        return error

    def fell_behind(self) -> None:
        """Take note that look-ups are no longer waited for."""
        self._warn(LATE)

    def _warn(self, message: str) -> None:
        now = time.monotonic()
        if now - self._warned.get(message, float("-inf")) >= _WARNING_INTERVAL:
            self._warned[message] = now
            logger.warning("the cache's store: %s", message)

    async def _connected(self) -> Connection:
        now = self._loop.time()
        if self._retry_at is not None:
            if self._connecting is None and now >= self._retry_at:
                self._connect(now)
            raise StoreUnavailable(self._why)
        connecting = self._connecting or self._connect(now)
        if now - self._connecting_since > wire.PATIENCE:
            raise StoreUnavailable(LATE)
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
            async with asyncio.timeout(wire.DEADLINE):
                self._listens = False
                self._connection = await self._address.connect(self, self._arrive)
        except TimeoutError:
            self._open(f"Redis has not answered for {wire.DEADLINE:g} s")
        except (OSError, UnicodeError, StoreUnavailable) as error:
            self._open(str(error) or type(error).__name__)
        else:
            self._close()
            if self._listens and self._looking is None:
                self._looking = self._loop.call_later(0, self._look)
        finally:
            self._connecting = None

    async def _arrive(self, connection: Connection) -> None:
        """Do what is to be done before anything is read: look whether this is the Redis of before, join, and listen."""
        member = self._store.member()
        sent = time.monotonic()
        _, (seconds, microseconds) = await connection.demand(self._store.compare_history(), ("TIME",))
        member.learn(sent, time.monotonic(), int(seconds) * 1000 + int(microseconds) / 1000)
        if (renewal := member.renewal()) is not None:
            try:
                (reply,) = await connection.demand(renewal)
            except StoreUnavailable as error:
                # A Redis that is full refuses it, and serves what is trusted.
                if code_of(str(error)) not in _WRITE_REFUSALS:
                    raise
            else:
                member.renewed([*reply[:3], *([other.decode() for other in others] for others in reply[3:])])
        member.start()
        if self.near is not None:
            await self._listen(connection)

    async def _listen(self, connection: Connection) -> None:
        """Have Redis tell of every write, if it can and this user may: where not, nothing is kept near."""
        for command in (("HELLO", 3), ("SUBSCRIBE", self._store.channel)):
            reply = await connection.ask(*command)
            if isinstance(reply, StoreUnavailable):
                raise reply
            if isinstance(reply, ReplyError):
                return

    def lost(self, connection: Connection, why: str, *, waited: bool) -> None:
        """Take note that a connection is gone; that is a failure if somebody waited for an answer."""
        if self.near is not None:
            self.near.forget()
        if connection is self._connection:
            self._connection, self._why = None, why
            if waited:
                self._open(why)

    def _open(self, why: str) -> None:
        now = self._loop.time()
        if code_of(why) in REDIRECTIONS:
            why = IS_CLUSTER
        if self._retry_at is None:
            # One that keeps failing right after it was reached is not to be tried ten times a second.
            if now - self._closed_at > _LONGEST_PAUSE:
                self._pause = FIRST_PAUSE
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
                await asyncio.wait([connection.ask("PING")], timeout=wire.PATIENCE)
            connection.close(self._why)
            await connection.closed


def stamp_in(value: bytes) -> int:
    """Return the stamp of a tag: only while it is pending there is more than a number."""
    try:
        return int(value)
    except ValueError:
        return PENDING


def instant_of(clock: bytes) -> Instant:
    """Return what the clock in Redis says."""
    epoch, now = clock.split()
    return Instant(epoch.decode(), int(now))
