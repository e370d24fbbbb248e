"""The passage of one request through the cache."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from overdrive.context import RequestContext

from .conditional import Header, is_current, not_modified, with_etag
from .entry import Entry, Instant
from .flight import Flight, Landed, Landing
from .policy import Policy, reason_not_to_store
from .shadow import differs

if TYPE_CHECKING:
    from .cache import Cache

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


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
        "_doubted",
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
        "status",
        "why",
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
        #: Why the cache has had no answer, in a word.
        self.why = "error"
        #: The status of the response that is made instead, once it has begun.
        self.status: int | None = None
        self._cache = cache
        self._if_none_match = if_none_match
        self._mark = "bypass"
        self._status = ""
        #: What was found, where it is to be compared with what the endpoint gives.
        self._doubted: Entry | None = None
        self._flight: Flight | None = None
        self._start: Message | None = None
        self._not_modified = False
        self._storing = False
        self._chunks: list[bytes] = []

    async def look_up(self) -> None:
        """Set `entry` to what answers this request, if there is such an entry."""
        if self.context.wrote:
            self.bypass("wrote")
        elif self.policy.trust.mode == "off":
            self.bypass("off")
        else:
            await self._cache.look_up(self)

    # What the cache notes here

    def looked_up(self, instant: Instant) -> None:
        """Take the look-up's instant, the freshest there is, unless dependencies have read before it."""
        if not self.context.statements:
            self.instant = instant

    def bypass(self, why: str) -> None:
        """Note that the cache does not take part."""
        self._doubted = None
        self._mark, self.why, self._status = "bypass", why, f"fwd=bypass; detail={why}"

    def miss(self, kind: str, detail: str = "") -> None:
        """Note that the cache had no answer."""
        self._mark, self.why = "miss", kind
        self._status = f"fwd={kind}" + (f"; detail={detail}" if detail else "")

    def hit(self, entry: Entry, now: float, *, collapsed: bool = False) -> None:
        """Note that the cache had the answer, or got it meanwhile for another request."""
        if not collapsed and (why := self.policy.trust.doubts()):
            self.bypass(why)
            self._doubted = entry
            return
        self.entry, self._mark = entry, "hit"
        self._status = "fwd=uri-miss; collapsed" if collapsed else f"hit; ttl={int(entry.created + entry.ttl - now)}"

    def lead_or_follow(self) -> Flight | None:
        """Return the flight to wait for; None where this request goes ahead, for those that ask the same meanwhile."""
        # Nobody is sent another's response in shadow.
        if self.policy.trust.mode == "shadow":
            return None
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
        self.policy.trust.early += 1
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
        self.status = status
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
            if self._mark == "miss" or self._doubted is not None:
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
        self._storing = reason is None
        if self._doubted is not None:
            # Whether it is kept is decided when all of it is there.
            return
        if reason is None:
            self._status += "; stored"
        else:
            # A parameter has one value, and why nothing is stored outlives why nothing was found.
            self._status = f"{self._status.partition('; detail=')[0]}; detail={reason}"

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
        storing, self._storing = self._storing, False
        doubted, self._doubted = self._doubted, None
        body = b"".join(self._chunks)
        if doubted is not None and not await differs(self._cache, self, doubted, body if storing else None):
            storing = False
        if storing:
            kept = await self._cache.fill(self, body)
        self._end(kept or Landed.ALONE)

    def fail(self, error: Exception) -> None:
        """Share what the endpoint has raised with those who wait."""
        self._end(error)

    def leave(self) -> None:
        """Let somebody else take over, if this request was to answer others and has not; count it."""
        self._end(Landed.NOWHERE)
        self.policy.trust.count(self._mark, self.why)

    def _end(self, landed: Landing) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.end(landed)
