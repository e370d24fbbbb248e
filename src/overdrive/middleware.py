"""The request path, pure ASGI: the observer outside everything, guard and cache just before the router.

Between the two stand the app's own middlewares, so that CORS, authentication and rate limits see hits and misses
alike, and the request's event sees what they did.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any
from zlib import crc32

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .cache.exchange import Exchange, replayed, wishes_of
from .context import RequestContext, current, serving
from .instrumentation.events import RequestEvent, listening, publish
from .log.logger import bind_event, let_event_go, log_event
from .log.tail import end_tails
from .pool.guard import CommitFailed, SendGuard

if TYPE_CHECKING:
    from .cache.entry import Entry
    from .caching import Known
    from .installer import Installation

request_log = logging.getLogger("overdrive.request")

#: https://www.w3.org/TR/trace-context/#traceparent-header: there is no version ff, and 00 has nothing after its flags.
_TRACEPARENT = re.compile(
    rb"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?"
)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

#: Where a scope tells a mounted app's Observer that it is being observed.
_OBSERVED = "overdrive"

#: Where a scope tells the Observer that there is nothing to answer with at once.
LOOKED_UP = "overdrive.looked_up"


class Observer:
    """Outermost: makes the request's context, and tells its one event whatever becomes of it."""

    def __init__(self, app: ASGIApp, installation: Installation) -> None:
        self.app = app
        self._installation = installation
        self._is_innermost = installation.is_innermost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if _OBSERVED in scope and self._installation.runtime is None:
            # A mounted app that was given add_pagination() of its own: what surrounds it has prepared its routes.
            await self.app(scope, receive, send)
            return
        self._installation.install()
        scope[_OBSERVED] = True
        if LOOKED_UP not in scope and (found := self.found(scope)) is not None:
            await self.answer(*found, scope, receive, send)
        else:
            await self._serve(self.app, scope, receive, send)

    def found(self, scope: Scope) -> tuple[Known, Entry] | None:
        """Return what answers a request at once."""
        # What tells tenants apart may fail, and then has the app's own answer.
        known = self._installation.known(scope, None) if self._is_innermost else None
        entry = self._installation.cache.held(known.policy, known.key) if known is not None else None
        return (known, entry) if known is not None and entry is not None else None

    async def answer(self, known: Known, entry: Entry, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer from the cache at once: there is nothing between here and the router that should have a look."""
        installation, policy = self._installation, known.policy
        start, body = replayed(entry, policy, installation.cache.clock(), wishes_of(scope["headers"]))
        _tell_route(scope, known)
        if not self._is_heard() and not installation.log.trust_request_id and not installation.log.server_timing:
            start["headers"].append((installation.request_id_header, _new_id().encode()))
            await send(start)
            await send(body)
            return

        async def replay(_scope: Scope, _receive: Receive, send: Send) -> None:
            context = current()
            assert context is not None
            context.route, context.cache_status = known.policy.route, "hit"
            await send(start)
            await send(body)

        await self._serve(replay, scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._installation.start_up()
            elif message["type"] == "lifespan.shutdown.complete":
                await self._installation.shut_down()
            await send(message)

        await self.app(scope, receive, told)

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        installation = self._installation
        context = _context_of(scope, installation)
        id_header = installation.request_id_header, context.request_id.encode()
        installation.begin(context)
        complete = gone = False

        async def observed(message: Message) -> None:
            nonlocal complete, gone
            # A websocket may be denied with a response.
            kind = message["type"].removeprefix("websocket.")
            if kind == "http.response.start":
                context.status = message["status"]
                # A new message: an app may send the same one to everybody.
                message = {**message, "headers": [*message.get("headers", ()), id_header]}
                if installation.log.server_timing:
                    timing = _server_timing(context, time.perf_counter() - started)
                    message["headers"].append((b"server-timing", timing))
            elif kind == "http.response.body":
                context.bytes_sent += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            elif kind == "http.response.pathsend":
                complete = True
            try:
                await send(message)
            except OSError:
                # https://asgi.readthedocs.io/en/latest/specs/www.html#disconnected-client-send-exception
                gone = True
                raise

        started = time.perf_counter()
        with serving(context):
            try:
                await app(scope, receive, observed)
                if context.status is not None and context.status >= 500:
                    context.outcome = "error"
                elif not complete and scope["type"] == "http":
                    context.outcome = "disconnected"
            except asyncio.CancelledError:
                context.outcome = "cancelled"
                raise
            except BaseException:
                context.outcome = "disconnected" if gone else "error"
                raise
            finally:
                context.duration = time.perf_counter() - started
                if context.tails is not None:
                    end_tails(context)
                self._tell(context)

    def _is_heard(self) -> bool:
        return listening() or self._is_logged()

    def _is_logged(self) -> bool:
        installation = self._installation
        return installation.log.events and (
            installation.events_to is not None or request_log.isEnabledFor(logging.INFO)
        )

    def _tell(self, context: RequestContext) -> None:
        if listening():
            publish(RequestEvent.of(context))
        if not self._is_logged():
            return
        installation = self._installation
        if installation.log.sample and not _is_kept(context, installation.log.sample.get(context.route or "", 1)):
            let_event_go(request_log)
        elif installation.events_to is not None:
            bind_event(installation.events_to, context)
        else:
            log_event(request_log, context)


def _is_kept(context: RequestContext, share: float) -> bool:
    """Decide as every service does that sees the same trace."""
    if share == 1 or context.outcome != "ok":
        return True
    return crc32((context.trace_id or context.request_id).encode()) < share * 2**32


def _server_timing(context: RequestContext, elapsed: float) -> bytes:
    """Return where the time went: https://www.w3.org/TR/server-timing/, in milliseconds."""
    parts = [f"total;dur={elapsed * 1000:.1f}"]
    if context.statements:
        parts.append(f'db;dur={context.database_time * 1000:.1f};desc="{context.statements} statements"')
        parts.append(f"pool;dur={context.pool_wait * 1000:.1f}")
    if context.cache_status is not None:
        parts.append(f'cache;desc="{context.cache_status}"')
    return ", ".join(parts).encode()


def _tell_route(scope: Scope, known: Known) -> None:
    """Tell those who measure, FastAPI's own telemetry among them, what otherwise the router does."""
    scope.update(known.routed)
    telemetry = scope.get("fastapi.telemetry")
    if telemetry is None:
        return
    route = telemetry.route = f"{getattr(telemetry, '_mount_prefix', '')}{known.policy.route}"
    if (span := getattr(telemetry, "span", None)) is not None:
        span.update_name(f"{scope['method']} {route}")


def _new_id() -> str:
    return os.urandom(8).hex()


def _context_of(scope: Scope, installation: Installation) -> RequestContext:
    trace = request_id = None
    trusted = installation.request_id_header if installation.log.trust_request_id else None
    for name, value in scope["headers"]:
        if name == b"traceparent":
            trace = _TRACEPARENT.fullmatch(value)
        elif name == trusted and _REQUEST_ID.fullmatch(value):
            request_id = value.decode()
    return RequestContext(
        request_id=request_id or _new_id(),
        method=scope.get("method", "WEBSOCKET"),
        path=scope["path"],
        query=scope["query_string"].decode("latin-1"),
        cursor_keys=installation.cursor_keys,
        runtime=installation.runtime,
        trace_id=trace[1].decode() if trace else None,
        span_id=trace[2].decode() if trace else None,
    )


class RequestPath:
    """Innermost: what the router sends passes the guard, which commits, and the cache, which keeps it."""

    def __init__(self, app: ASGIApp, installation: Installation) -> None:
        self.app = app
        self._installation = installation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        context = current()
        if context is None or context.runtime is not self._installation.runtime:
            await self.app(scope, receive, send)
            return
        # A mount changes the scope's root path. A middleware outside may have copied the scope, so the route is
        # looked for here.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and scope["method"] == "HEAD" and self._installation.has_head_of_get(path):
            # A copy, as the server looks at its own for the method.
            scope, send = {**scope, "method": "GET", "extensions": {}}, _without_body(send)
        # As it came: the router notes in the other where it leads to.
        asked = dict(scope)
        try:
            if scope["type"] == "http":
                await self._serve(context, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        finally:
            context.route = context.route or self._installation.route_of(scope, path)
            if context.exchange is not None and context.exchange.is_stale:
                self._refresh(context.exchange, asked)

    async def _serve(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        context.tenant = self._installation.tenant_of(scope)
        if (known := self._installation.known(scope, context.tenant)) is not None:
            wishes = wishes_of(scope["headers"])
            exchange = Exchange(self._installation.cache, known.policy, known.key, context, wishes)
            await exchange.look_up()
            context.exchange = exchange
            if exchange.entry is not None:
                context.route = known.policy.route
                _tell_route(scope, known)
                await exchange.answer(send)
                return
        guard = SendGuard(context, _recorded(context, send))
        failure: Exception | None = None
        try:
            await self.app(scope, receive, guard.send)
        except CommitFailed as failed:
            failure = failed.error
        except Exception as error:
            if context.exchange is None:
                raise
            context.exchange.fail(error)
            await guard.abandon()
            if not await context.exchange.stand_in(500, error, send):
                raise
        finally:
            await guard.abandon()
            if context.exchange is not None:
                context.exchange.leave()
        if failure is None:
            return
        if context.exchange is None or not await context.exchange.stand_in(500, failure, send):
            await _answer(failure, scope, receive, send)

    def _refresh(self, exchange: Exchange, scope: Scope) -> None:
        """Have the response that was served, and has expired, made anew."""
        again = functools.partial(self._serve_again, scope, exchange.body)
        self._installation.cache.refreshes.start(exchange.key, exchange.policy.route, again)

    async def _serve_again(self, scope: Scope, body: bytes) -> int | None:
        """Serve a request once more, for nobody but the cache, and return the response's status.

        Whatever the app's own middlewares have found out about it is still in the scope and in context variables. It
        has a context of its own, and no event: nobody has asked for it.
        """
        # What comes with the server's own send is of no use here.
        scope = {**scope, "extensions": {}}
        if "state" in scope:
            scope["state"] = scope["state"].copy()
        context = _context_of(scope, self._installation)
        context.refreshing = True
        self._installation.begin(context)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]

        with serving(context):
            await self._serve(context, scope, _client_with(body), told)
        return context.status


def _client_with(body: bytes) -> Receive:
    """Return a client that sends `body`, and then stays for the answer."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive


def _without_body(send: Send) -> Send:
    """Return what sends the answer to a GET as that to a HEAD (RFC 9110, section 9.3.2)."""

    async def headers_only(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return headers_only


def _recorded(context: RequestContext, send: Send) -> Send:
    """Let the cache see, mark and keep what is sent, on the routes that are cached."""

    async def recorded(message: Message) -> None:
        if context.exchange is None:
            await send(message)
        else:
            await context.exchange.send(message, send)

    return recorded


async def _answer(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a failed commit as the app answers any exception: with its own handler, else as a server error."""
    handlers: dict[Any, Any] = scope["app"].exception_handlers
    kinds = [getattr(error, "status_code", None), *type(error).__mro__]
    # `Exception` is the server error handler's: it also re-raises, for the server to log.
    handler = next((handlers[kind] for kind in kinds if kind in handlers and kind is not Exception), None)
    if handler is None:
        raise error
    request = Request(scope, receive)
    # Either may be a coroutine function: a function, or an object that is called.
    if any(map(inspect.iscoroutinefunction, (handler, type(handler).__call__))):
        response = await handler(request, error)
    else:
        response = await run_in_threadpool(handler, request, error)
    await response(scope, receive, send)
