"""A shared cache in front of any ASGI app, which goes by what the app's responses say (RFC 9111).

It is for one process, and for one event loop: nothing here awaits between a look-up and what follows from it, so that
there are no locks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

from . import http
from .conditional import Header
from .fields import Directives, Fields, combine, delta_seconds
from .http import Stored, Target, Worth
from .memory import Memory

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("overdrive")

#: Seconds a request waits for another's response to the same, before it goes to the app itself.
_PATIENCE = 10.0
#: Responses of one target that are kept, each for other request headers.
_VARIANTS = 64
#: Targets that are remembered not to be worth waiting for.
_REMEMBERED = 4096

#: Request headers without which a fresh response is simply sent.
_ASKING = http.PASSED_ON | http.JUDGED | {b"cache-control", b"pragma"}


class CacheMiddleware:
    """Answers requests with what the app has said may be stored, for as long as it has said.

    It needs nothing but the app's response headers: Cache-Control (with s-maxage, stale-while-revalidate and
    stale-if-error), Expires, ETag, Last-Modified and Vary. Without any of these, nothing is stored. Concurrent requests
    for the same that is not stored become one. What is a part, or sets a cookie, passes as it is; so does what is
    longer than `max_body`, and a body of unknown length is sent on while it comes.

    max_bytes: bytes of all stored responses together.
    max_body: bytes above which a body is neither held nor stored.
    heuristics: whether responses that say nothing but when they were last modified are fresh for a tenth of the time
        since (RFC 9111, section 4.2.2).
    hide_status: whether to leave out Cache-Status (RFC 9211).
    clock: seconds since the epoch.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int = 64 * 1_048_576,
        max_body: int = 1_048_576,
        heuristics: bool = False,
        hide_status: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.app = app
        self.max_body = max_body
        self.heuristics = heuristics
        self.hide_status = hide_status
        self.clock = clock
        #: The responses of each target, the latest first.
        self._memory: Memory[tuple[Stored, ...]] = Memory(max_bytes)
        #: What is being asked of the app and may be stored, the first of each target leading.
        self._fills: dict[Target, list[_Fill]] = {}
        #: Targets whose last response was of no use to anybody else: nobody waits for the next one.
        self._unshared: set[Target] = set()
        self._refreshing: dict[Target, asyncio.Task[None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = scope["headers"]
        fields: Fields = dict(headers)
        if len(fields) != len(headers):
            fields = combine(headers)
        target = _target(scope, fields)
        method = scope["method"]
        if method not in ("GET", "HEAD"):
            await self._pass(target, scope, receive, send, b"method")
            return
        if _ASKING.isdisjoint(fields):
            now = self.clock()
            found = self._find(target, fields)
            if found is not None and now < found.expires:
                await self._answer(found, now, method, send)
                return
        await self._serve(target, fields, scope, receive, send)

    def _find(self, target: Target, fields: Fields) -> Stored | None:
        for found in self._memory.get(target) or ():
            if found.answers(fields):
                return found
        return None

    async def _answer(
        self,
        found: Stored,
        now: float,
        method: str,
        send: Send,
        *,
        said: bytes | None = None,
        asked: Fields | None = None,
        own: Iterable[Header] = (),
    ) -> None:
        """Send a stored response.

        said: its Cache-Status, if it is not a hit.
        asked: the request, if it may ask for less than all of it.
        own: headers that are this client's alone.
        """
        status, headers, body = found.status, found.hit(now), found.body
        if said or self.hide_status:
            headers.pop()
        if said and not self.hide_status:
            headers.append((b"cache-status", said))
        headers += own
        if asked is not None:
            status, headers, body = http.selected(asked, found, headers)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})

    async def _pass(self, target: Target, scope: Scope, receive: Receive, send: Send, reason: bytes) -> None:
        """Let a request through to which no stored response is an answer, and see what it makes wrong."""

        async def passed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                for wrong in http.invalidated(target, scope["method"], message["status"], headers):
                    self._invalidate(wrong)
                message = self._marked(message, http.status_of_forward(reason))
            await send(message)

        await self.app(scope, receive, passed)

    def _marked(self, message: Message, said: bytes) -> Message:
        if self.hide_status or message["status"] < 200:
            return message
        return {**message, "headers": [*message.get("headers", ()), (b"cache-status", said)]}

    def _invalidate(self, target: Target) -> None:
        self._memory.pop(target)
        # What is being made may have been read before the write.
        for fill in self._fills.pop(target, ()):
            fill.settle()

    async def _serve(self, target: Target, fields: Fields, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD that asks for something, or to which there is no fresh response."""
        method = scope["method"]
        if not http.PASSED_ON.isdisjoint(fields):
            await self._pass(target, scope, receive, send, b"bypass")
            return
        wishes = http.asked(fields)
        found, worth = self._judge(target, fields, wishes)
        reason = self._reason(target, found, worth)
        said = None
        leader = self._leader(target, fields)
        if worth is Worth.STALE and not wishes and leader is not None:
            await leader.wait()
            found, worth = self._judge(target, fields, wishes)
            said = http.status_of_forward(reason, collapsed=True)
        if found is not None and worth in (Worth.SERVED, Worth.REVALIDATED) and http.has_part(method, fields, found):
            if worth is Worth.REVALIDATED and b"no-store" not in wishes:
                self._refresh(target, fields, scope, found)
            await self._answer(found, self.clock(), method, send, said=said, asked=fields)
        elif b"only-if-cached" in wishes:
            # RFC 9111, section 5.2.1.7.
            await send({"type": "http.response.start", "status": 504, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        elif b"range" in fields:
            await self._pass(target, scope, receive, send, b"bypass")
        elif b"no-store" in wishes:
            await self._pass(target, scope, receive, send, b"request")
        elif method == "HEAD":
            await self._head(target, fields, found, scope, receive, send, reason)
        else:
            await _Fill(self, target, fields, found, reason, send).run(scope, receive)

    def _judge(self, target: Target, fields: Fields, wishes: Directives) -> tuple[Stored | None, Worth]:
        found = self._find(target, fields)
        return found, Worth.STALE if found is None else http.worth(found, wishes, self.clock())

    def _reason(self, target: Target, found: Stored | None, worth: Worth) -> bytes:
        """Say why a request is forwarded (RFC 9211, section 2.2)."""
        if found is not None:
            return worth.value.encode()
        return b"vary-miss" if self._memory.get(target) else b"uri-miss"

    def _leader(self, target: Target, fields: Fields) -> _Fill | None:
        """Return who is asking the app for what would probably answer this request too, if somebody is."""
        if target not in self._fills or target in self._unshared or b"authorization" in fields:
            return None
        return self._fills[target][0]

    async def _head(
        self,
        target: Target,
        fields: Fields,
        found: Stored | None,
        scope: Scope,
        receive: Receive,
        send: Send,
        reason: bytes,
    ) -> None:
        """Pass a HEAD on; what it says of the stored response to GET is used (RFC 9111, section 4.3.5)."""
        requested = self.clock()

        async def passed(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Not there any more, it was made wrong meanwhile.
                if found is not None and message["status"] in (200, 404, 410) and self._drop(target, found):
                    headers = list(message.get("headers", ()))
                    if http.is_confirmed_by_head(found, message["status"], headers):
                        headers = http.freshened(found, headers) or []
                        if (response := self._storable(fields, found.status, headers, requested)) is not None:
                            self._keep(target, fields, response.with_body(found.body))
                message = self._marked(message, http.status_of_forward(reason))
            await send(message)

        await self.app(scope, receive, passed)

    def _storable(self, fields: Fields, status: int, headers: list[Header], requested: float) -> Stored | None:
        return http.stored(
            fields, status, headers, requested=requested, received=self.clock(), heuristics=self.heuristics
        )

    def _keep(self, target: Target, fields: Fields, response: Stored) -> bool:
        """Keep a response in place of those the same request would have been answered with."""
        others: tuple[Stored, ...] = ()
        if response.vary:
            others = tuple(other for other in self._memory.get(target) or () if not other.answers(fields))
        # Of several that answer another request, it is the latest that counts (RFC 9111, section 4).
        latest = sorted((response, *others), key=lambda each: each.dated, reverse=True)
        return self._put(target, tuple(latest[:_VARIANTS]))

    def _drop(self, target: Target, response: Stored) -> bool:
        """Take out one response, and say whether it was there."""
        kept = self._memory.pop(target) or ()
        if left := tuple(other for other in kept if other is not response):
            self._put(target, left)
        return len(left) < len(kept)

    def _put(self, target: Target, responses: tuple[Stored, ...]) -> bool:
        return self._memory.put(target, responses, sum(response.size for response in responses))

    def _note(self, target: Target, *, shared: bool) -> None:
        """Remember whether it is worth waiting for the responses of a target."""
        if shared:
            self._unshared.discard(target)
            return
        if len(self._unshared) >= _REMEMBERED:
            self._unshared.clear()
        self._unshared.add(target)

    def _refresh(self, target: Target, fields: Fields, scope: Scope, found: Stored) -> None:
        """Revalidate in the background, once at a time for each target (RFC 5861, section 3)."""
        if target in self._refreshing:
            return
        fill = _Fill(self, target, fields, found, b"stale", _nowhere)
        # What comes with the server's own send is of no use here.
        scope = {**scope, "method": "GET", "extensions": {}}
        if "state" in scope:
            scope["state"] = scope["state"].copy()
        task = asyncio.get_running_loop().create_task(fill.run(scope, _without_body(fill.leave)))
        self._refreshing[target] = task
        task.add_done_callback(lambda task: self._refreshed(target, task))

    def _refreshed(self, target: Target, task: asyncio.Task[None]) -> None:
        del self._refreshing[target]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("revalidating %s failed", target[2], exc_info=error)


def _target(scope: Scope, fields: Fields) -> Target:
    path = scope["path"]
    return (
        scope.get("scheme", "http"),
        fields.get(b"host", b"").lower(),
        path,
        scope.get("raw_path") or path.encode(),
        scope.get("query_string", b""),
    )


class _Phase(Enum):
    """How far the app's response has come."""

    AWAITED = 0
    #: Held back, because it may be stored.
    HELD = 1
    #: Sent on as far as it has come, and stored when it is whole.
    SHOWN = 2
    PASSED = 3
    #: The client has its answer: what else the app sends is for nobody.
    ANSWERED = 4
    #: A 304 of something else than what was asked about: to be asked again.
    MISTAKEN = 5


class _Fill:
    """One GET on its way to the app: its response is stored or passed on, or a stored one stands in for it.

    found: the stored response that is validated, if there is one.
    reason: why it is forwarded, for Cache-Status.
    """

    def __init__(
        self, cache: CacheMiddleware, target: Target, fields: Fields, found: Stored | None, reason: bytes, send: Send
    ) -> None:
        self._cache = cache
        self._target = target
        self._fields = fields
        self._found = found
        self._reason = reason
        self._send = send
        self._requested = cache.clock()
        self._phase = _Phase.AWAITED
        #: Done once the response is stored, or will not be.
        self._settled = asyncio.get_running_loop().create_future()
        #: What the app has said so far: the start, what it is to be stored as, and the body, with its announced and
        #: present length.
        self._start: Message = {}
        self._response: Stored | None = None
        self._chunks: list[bytes] = []
        self._length: int | None = None
        self._size = 0

    async def wait(self) -> None:
        """Wait until the response is stored, or will not be."""
        await asyncio.wait({self._settled}, timeout=_PATIENCE)

    def settle(self) -> None:
        """Let nobody wait any longer; what is not stored by now will not be."""
        if self._settled.done():
            return
        self._settled.set_result(None)
        fills = self._cache._fills.get(self._target, [])
        if self in fills:
            fills.remove(self)
            if not fills:
                del self._cache._fills[self._target]

    async def leave(self) -> Message:
        """Be a client who stays until the response is stored, or will not be."""
        await asyncio.wait({self._settled})
        return {"type": "http.disconnect"}

    async def run(self, scope: Scope, receive: Receive) -> None:
        """Ask the app, and see to it that the client is answered."""
        self._cache._fills.setdefault(self._target, []).append(self)
        try:
            await self._ask(scope, receive)
            if self._phase is _Phase.MISTAKEN:
                self._found, self._phase = None, _Phase.AWAITED
                await self._ask(_with_headers(scope, []), _without_body(receive))
        finally:
            self.settle()

    async def _ask(self, scope: Scope, receive: Receive) -> None:
        found = self._found
        if found is not None:
            scope = _with_headers(scope, http.preconditions(found))
        try:
            await self._cache.app(scope, receive, self._told)
        except Exception as error:
            is_open = self._phase in (_Phase.AWAITED, _Phase.HELD)
            if found is None or not is_open or not http.serves_errors(found, self._fields, self._cache.clock()):
                raise
            logger.error("%s failed, and is answered with a stale response", self._target[2], exc_info=error)
            await self._stand_in(found, 500)
        if self._phase is _Phase.HELD:
            await self._pass_on()

    async def _told(self, message: Message) -> None:
        """Take what the app sends."""
        if self._phase is _Phase.AWAITED and message["type"] == "http.response.start" and message["status"] >= 200:
            await self._begin(message)
        elif self._phase is _Phase.HELD:
            await self._hold(message)
        elif self._phase is _Phase.SHOWN:
            await self._show(message)
        elif self._phase in (_Phase.AWAITED, _Phase.PASSED):
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        cache, found = self._cache, self._found
        status, headers = message["status"], list(message.get("headers", ()))
        if found is not None and http.is_error(status) and http.serves_errors(found, self._fields, cache.clock()):
            await self._stand_in(found, status)
            return
        if found is not None and status == 304:
            await self._validated(found, headers)
            return
        self._start = message
        self._length = delta_seconds(combine(headers).get(b"content-length"))
        if not self._settled.done() and not message.get("trailers") and (self._length or 0) <= cache.max_body:
            self._response = cache._storable(self._fields, status, headers, self._requested)
        if self._response is None:
            await self._pass_on()
        else:
            self._phase = _Phase.HELD

    async def _hold(self, message: Message) -> None:
        if not self._fits(message):
            await self._pass_on()
            await self._send(message)
            return
        self._chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            await self._complete()
        elif self._length is None:
            # It may be a stream, whose client is not kept waiting for all of it.
            self._phase = _Phase.SHOWN
            await self._send_start()
            await self._send(message)

    async def _show(self, message: Message) -> None:
        if not self._fits(message):
            self._give_up()
            self._chunks.clear()
        else:
            # Not the message, which others may change on its way.
            self._chunks.append(message.get("body", b""))
            if not message.get("more_body"):
                self._phase = _Phase.PASSED
                self._is_kept(self._whole())
        await self._send(message)

    def _fits(self, message: Message) -> bool:
        """Count a message of the body, and say whether it may still become what can be stored."""
        if message["type"] != "http.response.body":
            return False
        self._size += len(message.get("body", b""))
        if self._length is None:
            return self._size <= self._cache.max_body
        return self._size == self._length or (self._size < self._length and message.get("more_body", False))

    def _whole(self) -> Stored:
        assert self._response is not None
        return self._response.with_body(b"".join(self._chunks))

    async def _pass_on(self) -> None:
        """Send what was held, which cannot be stored, and let the rest through."""
        self._give_up()
        await self._send_start()
        if self._chunks:
            await self._send({"type": "http.response.body", "body": b"".join(self._chunks), "more_body": True})

    def _give_up(self) -> None:
        cache, status = self._cache, self._start["status"]
        self._phase = _Phase.PASSED
        # Neither an error nor a 304 to the client's own question says anything about the next response.
        if not self._settled.done() and status != 304 and status < 500:
            cache._note(self._target, shared=False)
            if self._found is not None:
                cache._drop(self._target, self._found)
        self.settle()

    async def _send_start(self) -> None:
        await self._send(self._cache._marked(self._start, http.status_of_forward(self._reason)))

    async def _complete(self) -> None:
        """Store a response, and send it on."""
        self._phase = _Phase.ANSWERED
        cache, response = self._cache, self._whole()
        said = http.status_of_forward(self._reason, stored=self._is_kept(response))
        if http.is_not_modified(self._fields, response):
            await self._answer(response, said)
            return
        start = {**self._start, "headers": response.completed(self._start.get("headers", ()))}
        await self._send(cache._marked(start, said))
        await self._send({"type": "http.response.body", "body": response.body})

    def _is_kept(self, response: Stored) -> bool:
        # Settled already, it may have been read before a write.
        is_kept = not self._settled.done() and self._cache._keep(self._target, self._fields, response)
        self._cache._note(self._target, shared=response.expires > self._cache.clock())
        self.settle()
        return is_kept

    async def _validated(self, found: Stored, received: list[Header]) -> None:
        """Answer with a stored response that is still right (RFC 9111, section 4.3.3)."""
        updated = http.freshened(found, received)
        if updated is None:
            self._phase = _Phase.MISTAKEN
            return
        self._phase = _Phase.ANSWERED
        cache = self._cache
        response = cache._storable(self._fields, found.status, updated, self._requested)
        if response is None:
            cache._drop(self._target, found)
            self.settle()
            headers = [pair for pair in updated if pair[0] != b"age"]
            response = replace(found, headers=headers, born=cache.clock())
            is_kept = False
        else:
            response = response.with_body(found.body)
            is_kept = self._is_kept(response)
        said = http.status_of_forward(self._reason, status=304, stored=is_kept)
        # What the app tells this client about itself is not to be lost with the 304, nor to be stored.
        await self._answer(response, said, [pair for pair in received if pair[0].lower() == b"set-cookie"])

    async def _stand_in(self, found: Stored, status: int) -> None:
        """Answer with a stale response in place of an error (RFC 5861, section 4)."""
        self._phase = _Phase.ANSWERED
        self.settle()
        await self._answer(found, http.status_of_forward(self._reason, status=status))

    async def _answer(self, response: Stored, said: bytes, own: Iterable[Header] = ()) -> None:
        cache = self._cache
        await cache._answer(response, cache.clock(), "GET", self._send, said=said, asked=self._fields, own=own)


def _with_headers(scope: Scope, preconditions: list[Header]) -> Scope:
    """Return a copy of the scope with these preconditions in place of the client's."""
    return {**scope, "headers": http.without_judged(scope["headers"]) + preconditions}


async def _nowhere(message: Message) -> None:
    """Be the client of a background task: it hears nothing."""


def _without_body(then: Receive) -> Receive:
    """Return what a client says that has no body to send, and `then` afterwards."""
    is_asked = False

    async def receive() -> Message:
        nonlocal is_asked
        if is_asked:
            return await then()
        is_asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return receive
