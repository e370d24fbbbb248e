"""The passage of one request through the cache."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

from overdrive.context import RequestContext

from .coding import accepts_gzip, gzipped, is_worth_it
from .conditional import Header, held_tag, not_modified, with_etag
from .entry import Entry, Form, Instant, State
from .fields import combine
from .flight import Flight, Landed, Landing
from .http import is_error, kept
from .policy import Policy, is_whole, reason_not_to_store, supersedes, with_vary
from .shadow import differs

if TYPE_CHECKING:
    from .cache import Cache, Turn
    from .store import Found

logger = logging.getLogger("overdrive")

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Wishes(NamedTuple):
    """What a request says of the form of its answer.

    if_none_match: the header of this name.
    gzip: whether it takes gzip.
    """

    if_none_match: bytes = b""
    gzip: bool = False


#: What is said of a hit, by what the entry is worth.
_DETAILS = {State.FRESH: "", State.EXPIRED: "; detail=stale", State.INVALIDATED: "; detail=outdated"}
#: Bodies that the server fetches by itself (https://asgi.readthedocs.io/en/latest/extensions.html).
_UNSEEN = ("http.response.pathsend", "http.response.zerocopysend")

_NO_WISHES = Wishes()
_TAKES_GZIP = Wishes(gzip=True)


def wishes_of(headers: Iterable[Header]) -> Wishes:
    """Read a request's headers. Its `Cache-Control` is none of them: who may ask the database is not up to a client."""
    known = codings = b""
    for name, value in headers:
        if name == b"if-none-match":
            known = known + b", " + value if known else value
        elif name == b"accept-encoding":
            codings = codings + b", " + value if codings else value
    # Mostly it is one of two.
    wishes = _TAKES_GZIP if accepts_gzip(codings) else _NO_WISHES
    return wishes._replace(if_none_match=known) if known else wishes


def form_of(entry: Entry, wishes: Wishes) -> Entry | Form:
    """Return the form of an entry's body that answers a request."""
    return entry.gzipped if wishes.gzip and entry.gzipped is not None else entry


def replayed(entry: Entry, policy: Policy, now: float, wishes: Wishes, said: bytes = b"") -> tuple[Message, Message]:
    """Return the messages of a response that is answered from an entry.

    now: on the cache's clock.
    said: what Cache-Status says of it, if not that it is a hit.
    """
    form = form_of(entry, wishes)
    headers = [*form.headers]
    if policy.tells_age:
        headers.append((b"age", b"%d" % max(0, int(now - entry.created))))
    if not policy.hide_status:
        headers.append((b"cache-status", said or b"overdrive; hit; ttl=%d" % (entry.created + entry.ttl - now)))
        headers.append((b"x-cache", b"hit"))
    status, body = entry.status, form.body
    if wishes.if_none_match and (tag := held_tag(wishes.if_none_match, headers)) is not None:
        status, headers, body = 304, not_modified(headers, tag), b""
    start = {"type": "http.response.start", "status": status, "headers": headers}
    return start, {"type": "http.response.body", "body": body}


class Exchange:
    """One request to a cached route, from its look-up to its storing.

    The headers it adds are `Cache-Status` (RFC 9211), `X-Cache` (hit, miss or bypass), `Age` on a hit
    (RFC 9111, section 5.1), a strong `ETag` (RFC 9110, section 8.8.3), `Vary`, and where the endpoint sets none
    a `Cache-Control` that keeps browsers asking.
    """

    __slots__ = (
        "_begun",
        "_cache",
        "_chunks",
        "_doubted",
        "_fallback",
        "_former",
        "_held",
        "_is_over",
        "_keeping",
        "_mark",
        "_start",
        "_state",
        "_status",
        "_storing",
        "_superseded",
        "body",
        "context",
        "entry",
        "flight",
        "headers",
        "instant",
        "is_stale",
        "key",
        "policy",
        "status",
        "why",
        "wishes",
    )

    def __init__(
        self, cache: Cache, policy: Policy, key: str, context: RequestContext, wishes: Wishes = _NO_WISHES
    ) -> None:
        self.policy = policy
        self.key = key
        self.context = context
        self.wishes = wishes
        #: The request's own body, where it is part of the key.
        self.body = b""
        #: The instant before the first read of this request; a fill is refused what was written after it.
        self.instant: Instant | None = context.instant
        #: The response's headers, as they are stored.
        self.headers: list[Header] = []
        #: What answers this request, once the look-up has found it.
        self.entry: Entry | None = None
        #: Whom this request makes its response for, too.
        self.flight: Flight | None = None
        #: Whether that has expired, and is to be made anew.
        self.is_stale = False
        #: Why the cache has had no answer, in a word.
        self.why = "error"
        #: The status of the response that is made instead, once it has begun.
        self.status: int | None = None
        self._cache = cache
        self._mark = "bypass"
        self._status = ""
        #: What was found, where it is to be compared with what the endpoint gives.
        self._doubted: Entry | None = None
        self._start: Message | None = None
        self._begun = False
        #: What was found, and what it is worth, if it may answer yet; what of it stands in for an error, and whether
        #: it does; and whether this response is to be in its place, which is not kept.
        self._former: Entry | None = None
        self._state = State.FRESH
        self._fallback: Entry | None = None
        self._is_over = False
        self._superseded = False
        #: The tag under which the client has the response already.
        self._held: bytes | None = None
        self._storing = False
        self._chunks: list[bytes] = []
        self._keeping: asyncio.Task[None] | None = None

    async def look_up(self, found: Found | None = None) -> None:
        """Set `entry` to what answers this request, if there is such an entry.

        found: what the store has answered already.
        """
        if self.context.wrote:
            self.bypass("wrote")
        elif self.policy.trust.mode == "off":
            self.bypass("off")
        else:
            await self._cache.look_up(self, found)

    # What the cache notes here

    def looked_up(self, turn: Turn, now: float) -> None:
        """Take what the look-up has come to."""
        # Its instant is the freshest there is, unless dependencies have read before it.
        if not self.context.statements:
            self.instant = turn.instant
        self.flight = turn.flight
        if turn.is_off:
            self.bypass("off")
        elif turn.entry is not None:
            self.hit(turn.entry, now, collapsed=turn.collapsed)
        elif turn.former is not None and turn.state is not None and self._stale(turn.former, turn.state, now):
            return
        elif turn.state is None:
            self.miss("uri-miss")
        else:
            self.miss("stale", turn.state.value)

    def bypass(self, why: str) -> None:
        """Note that the cache does not take part."""
        self._doubted = None
        self._mark, self.why, self._status = "bypass", why, f"fwd=bypass; detail={why}"
        # What is made now is for nobody else.
        self._end(Landed.ALONE)

    @property
    def is_bypassed(self) -> bool:
        """Say whether the endpoint is to answer without anything that is kept."""
        return self._mark == "bypass"

    def miss(self, kind: str, detail: str = "") -> None:
        """Note that the cache had no answer."""
        self._mark, self.why = "miss", kind
        self._status = f"fwd={kind}" + (f"; detail={detail}" if detail else "")

    def hit(self, entry: Entry, now: float, *, collapsed: bool = False) -> None:
        """Note that the cache had the answer, or got it meanwhile for another request."""
        # That what was written since is another response is known.
        if not collapsed and self._state is not State.INVALIDATED and (why := self.policy.trust.doubts()):
            self.bypass(why)
            self._doubted, self.is_stale = entry, False
            return
        self.entry, self._mark = entry, "hit"
        if collapsed:
            self._status = "fwd=uri-miss; collapsed"
        else:
            # Below zero it says how long it has been stale (RFC 9211, section 2.4).
            self._status = f"hit; ttl={self._left(entry, now)}{_DETAILS[self._state]}"

    def _left(self, entry: Entry, now: float) -> int:
        return math.floor(entry.fresh_until(self._state) - now)

    @property
    def stale(self) -> float:
        """Seconds after its end in which an entry answers this request."""
        if self.context.refreshing or self.policy.trust.mode == "shadow":
            return 0
        return self.policy.stale_while_revalidate

    def _stale(self, entry: Entry, state: State, now: float) -> bool:
        """Take an entry that is stale, if it answers yet, and say whether; or have it ready for an error."""
        self._former, self._state = entry, state
        if self.policy.trust.mode != "shadow" and entry.answers(now, self.policy.stale_if_error, state):
            self._fallback = entry
        answers = self.is_stale = entry.answers(now, self.stale, state)
        if answers:
            self.hit(entry, now)
        return answers

    # What the response passes

    async def answer(self, send: Send) -> None:
        """Send the response that the look-up has found."""
        assert self.entry is not None
        self.context.cache_status = self._mark
        self.policy.trust.early += 1
        await self._replay(send)

    async def _replay(self, send: Send) -> None:
        assert self.entry is not None
        for message in replayed(self.entry, self.policy, self._cache.clock(), self.wishes, self._said()):
            await send(message)

    @property
    def may_stand_in(self) -> bool:
        """Say whether there is a stale entry that answers in place of an error."""
        # Whoever refreshes has nobody to answer, and must know.
        return not (self._fallback is None or self._begun or self.context.wrote or self.context.refreshing)

    async def stand_in(self, status: int, error: Exception | None, send: Send) -> bool:
        """Answer with a stale entry in place of an error, if there is one for it, and say whether.

        error: what was raised, if the status was not answered but is what becomes of that.
        """
        context = self.context
        if not self.may_stand_in:
            return False
        assert self._fallback is not None
        self.entry, self._mark, self._is_over = self._fallback, "hit", True
        if context.refused is not None:
            left = self._left(self._fallback, self._cache.clock())
            self._status, self.is_stale = f"hit; ttl={left}; detail=overloaded", True
        else:
            what = "raised" if error is not None else f"answered {status}"
            ended = "outdated" if self._state is State.INVALIDATED else "expired"
            said = "%s %s, and an %s response stands in for it"
            logger.error(said, self.policy.route, what, ended, exc_info=error)
            self._status = f"fwd=stale; fwd-status={status}; detail=stale-if-error"
        self._end(self._fallback)
        context.cache_status = self._mark
        await self._replay(send)
        return True

    async def send(self, message: Message, send: Send) -> None:
        """Send a message of the response on, marked, and keep what is to be kept."""
        if self._is_over:
            return
        match message["type"]:
            case "http.response.start":
                if is_error(message["status"]) and await self.stand_in(message["status"], None, send):
                    return
                self._start = message
                if not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                    await self._begin(send, None)
            case "http.response.body":
                chunk, more = message.get("body", b""), message.get("more_body", False)
                if self._start is not None:
                    await self._begin(send, None if more else chunk)
                await self._pass_on(message, chunk, more, send)
            case kind:
                if self._start is not None:
                    if kind in _UNSEEN:
                        self.bypass("file")
                    await self._begin(send, None)
                await send(message)

    async def _begin(self, send: Send, body: bytes | None) -> None:
        start, self._start = self._start, None
        assert start is not None
        self._begun = True
        headers = self._marked(start["status"], list(start.get("headers", ())), body)
        if self._held is not None:
            headers = not_modified(headers, self._held)
        await send({**start, "status": start["status"] if self._held is None else 304, "headers": headers})

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
        sent = with_vary(sent, self.policy.vary)
        if self.entry is not None:
            if self.policy.tells_age:
                sent.append((b"age", b"%d" % max(0, int(self._cache.clock() - self.entry.created))))
        else:
            if not any(name.lower() == b"cache-control" for name, _ in sent):
                sent.append((b"cache-control", self.policy.cache_control))
            if self._mark == "miss" or self._doubted is not None:
                self._decide(status, own)
                if status == 200 and body is not None:
                    sent = with_etag(sent, body)
                self.headers = kept(sent, combine(sent))
        if status == 200 and body is not None:
            self._held = held_tag(self.wishes.if_none_match, sent)
        if not self.policy.hide_status:
            sent += [(b"cache-status", self._said()), (b"x-cache", self._mark.encode())]
        return sent

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
            self._superseded = self._former is not None and supersedes(status)
            self._end(Landed.ALONE)

    def _reason_not_to_store(self, status: int, headers: list[Header]) -> str | None:
        if self.context.wrote:
            return "wrote"
        if (unknown := self.context.reads.unknown) and not self.policy.knows_reads:
            self._cache.complain_once(self.context.route, unknown[0])
            return "unknown-reads"
        if refused := self._cache.store.refuses(self.context.reads.tags):
            return refused
        return reason_not_to_store(status, headers, self.policy, self._cache.max_body)

    async def _pass_on(self, message: Message, chunk: bytes, more: bool, send: Send) -> None:
        if self._storing:
            self._chunks.append(chunk)
        message = message if self._held is None else {**message, "body": b""}
        if more or not (self._storing or self._superseded or self._doubted is not None):
            await send(message)
            return
        awaited = self.flight is not None and (self.flight.awaited or self.flight.lease is not None)
        if not awaited:
            await send(message)
            if len(self._chunks) == 1:
                await self._keep()
                return
        # What streams is cancelled by Starlette as soon as its client has all of it.
        self._keeping = asyncio.get_running_loop().create_task(self._keep())
        try:
            # A client that is slow to take its answer keeps nobody else waiting, here or in another process.
            if awaited:
                await send(message)
        finally:
            await asyncio.shield(self._keeping)

    async def _keep(self) -> None:
        """Store the response, now that all of it is there, and share it with those who wait."""
        storing, self._storing = self._storing, False
        doubted, self._doubted = self._doubted, None
        if self._superseded:
            await self._cache.supersede(self.key)
        body = b"".join(self._chunks)
        if doubted is not None and not await differs(self._cache, self, doubted, body if storing else None):
            return
        if storing and not is_whole(self.headers, body):
            self._end(Landed.ALONE)
        elif storing:
            headers = with_etag(self.headers, body)
            form: Form | None = None
            if self.policy.gzip and self.wishes.gzip and is_worth_it(headers, body):
                form = await gzipped(headers, body)
            self._end(await self._cache.fill(self, headers, body, form))

    def fail(self, error: Exception) -> None:
        """Share what the endpoint has raised with those who wait."""
        self._end(self._fallback or error)

    def leave(self) -> None:
        """Let somebody else take over, if this request was to answer others and has not; count it."""
        if self._keeping is None or self._keeping.done():
            self._end(Landed.NOWHERE)
        else:
            self._keeping.add_done_callback(lambda _: self._end(Landed.NOWHERE))
        self.policy.trust.count(self._mark, self.why)

    def _end(self, landed: Landing) -> None:
        flight, self.flight = self.flight, None
        if flight is not None:
            flight.end(landed)
