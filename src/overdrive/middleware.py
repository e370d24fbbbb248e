"""The request path, pure ASGI: the observer outside everything, guard and cache just before the router.

Between the two stand the app's own middlewares, so that CORS, authentication and rate limits see hits and misses
alike, and the request's event sees what they did.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import math
import os
import random
import re
import time
from typing import TYPE_CHECKING, Any
from zlib import crc32

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .cache.entry import Entry
from .cache.exchange import Exchange, replayed, wishes_of
from .context import Outcome, RequestContext, current, serve, serve_no_more, serving
from .errors import DeadlineExceededError, OverloadedError
from .incoming import Incoming
from .instrumentation.events import RequestEvent, listening, publish
from .instrumentation.repeats import Repetition
from .log.logger import bind_event, let_event_go, log_event
from .log.tail import end_tails
from .pool.guard import CommitFailed, SendGuard

if TYPE_CHECKING:
    from .caching import Known
    from .installer import Installation

logger = logging.getLogger("overdrive")
request_log = logging.getLogger("overdrive.request")

#: https://www.w3.org/TR/trace-context/#traceparent-header: there is no version ff, and 00 has nothing after its flags.
_TRACEPARENT = re.compile(
    rb"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?"
)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

_BEGINNINGS = frozenset(("http.response.start", "websocket.http.response.start"))

_MILLISECONDS = re.compile(rb"[0-9]{1,9}")

#: Where a scope tells a mounted app's Observer that it is being observed.
_OBSERVED = "overdrive"

#: Where a scope says what the store has answered the Observer, if it was asked.
_FOUND = "overdrive.found"


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
        if not self._installation.is_installed:
            self._installation.install()
        scope[_OBSERVED] = True
        # What tells tenants apart may fail, and then has the app's own answer.
        known = self._installation.known(scope, None) if self._is_innermost and self._installation.cached else None
        if known is not None:
            # Nothing between here and the router should have a look at the request.
            started = time.perf_counter()
            held = self._installation.cache.held(known.policy, known.key)
            if (entry := held or await self._glance(known, started, scope)) is not None:
                await self._answer(known, entry, started, scope, send)
                return
        if scope["type"] == "http" and self._installation.admission.refuses:
            receive = incoming = Incoming(receive)
            is_ours = known is None and self._is_innermost
            if await self._is_gone(scope, incoming) or (is_ours and await self._refuses(scope, send)):
                return
        await self._serve(scope, receive, send)

    async def _glance(self, known: Known, started: float, scope: Scope) -> Entry | None:
        """Ask the store, where it is not in this process, for what answers a request."""
        try:
            found = await self._installation.cache.glance(known.policy, known.key)
        except asyncio.CancelledError:
            self._tell_cancelled(_context_of(scope, self._installation), started)
            raise
        if isinstance(found, Entry):
            return found
        scope[_FOUND] = found
        return None

    async def _answer(self, known: Known, entry: Entry, started: float, scope: Scope, send: Send) -> None:
        installation, policy = self._installation, known.policy
        start, body = replayed(entry, policy, installation.cache.clock(), wishes_of(scope["headers"]))
        _tell_route(scope, known)
        if self._is_heard() or installation.log.trust_request_id or installation.log.server_timing:
            context = _context_of(scope, installation)
            context.route, context.cache_status, context.status = policy.route, "hit", start["status"]
            await self._replay(start, body, context, started, send)
            return
        start["headers"].append((installation.request_id_header, b"%016x" % _ids.getrandbits(64)))
        await send(start)
        await send(body)

    async def _is_gone(self, scope: Scope, incoming: Incoming) -> bool:
        """Say whether a client has left before its request was begun: who has fallen behind is not to answer nobody."""
        if scope["method"] not in ("GET", "HEAD") or await incoming.look():
            return False
        context = _context_of(scope, self._installation)
        context.outcome = "disconnected"
        self._tell(context)
        return True

    async def _refuses(self, scope: Scope, send: Send) -> bool:
        """Refuse what `RequestPath` would, before anything is done for it, and say whether: it may be nine in ten."""
        installation = self._installation
        if not installation.puts_off:
            return False
        started = time.perf_counter()
        refused = installation.refused(scope, None)
        if refused is None:
            return False
        error, route = refused
        response = putting_off(error)
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        context = _context_of(scope, installation)
        context.route, context.status, context.refused = route, response.status_code, error.reason
        context.outcome = "shed"
        await self._replay(start, {"type": "http.response.body", "body": response.body}, context, started, send)
        return True

    async def _replay(self, start: Message, body: Message, context: RequestContext, started: float, send: Send) -> None:
        """Send an answer and tell its event, in less time than `_serve`, which has anything to expect of an app."""
        self._installation.begin(context)
        self._mark(start["headers"], context, started)
        try:
            await send(start)
            context.bytes_sent = len(body["body"])
            await send(body)
        except BaseException as error:
            context.outcome = _outcome_of(error, gone=isinstance(error, OSError))
            raise
        finally:
            context.duration = time.perf_counter() - started
            self._tell(context)

    def _tell_cancelled(self, context: RequestContext, started: float) -> None:
        context.outcome, context.duration = "cancelled", time.perf_counter() - started
        self._tell(context)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._installation.started()
            elif message["type"] == "lifespan.shutdown.complete":
                await self._installation.shut_down()
            await send(message)

        async def heard() -> Message:
            message = await receive()
            self._installation.heard(message["type"])
            return message

        await self.app(scope, heard, told)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        installation = self._installation
        context = _context_of(scope, installation)
        installation.begin(context)
        if scope["type"] == "http":
            # What lives long repeats itself.
            context.repeated_statements = installation.log.repeated_statements
        complete = gone = False

        async def observed(message: Message) -> None:
            nonlocal complete, gone
            kind = message["type"]
            if kind == "http.response.body":
                context.bytes_sent += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            # A websocket may be denied with a response.
            elif kind in _BEGINNINGS:
                context.status = message["status"]
                # A new message: an app may send the same one to everybody.
                message = {**message, "headers": [*message.get("headers", ())]}
                self._mark(message["headers"], context, started)
            elif kind == "http.response.pathsend":
                complete = True
            elif kind == "websocket.http.response.body":
                context.bytes_sent += len(message.get("body", b""))
            try:
                await send(message)
            except OSError:
                # https://asgi.readthedocs.io/en/latest/specs/www.html#disconnected-client-send-exception
                gone = True
                raise

        started = time.perf_counter()
        before = serve(context)
        try:
            await self.app(scope, receive, observed)
            if context.status is not None and context.status >= 500:
                context.outcome = "error" if context.refused is None else "shed"
            elif not complete and scope["type"] == "http":
                context.outcome = "disconnected"
        except BaseException as error:
            context.outcome = _outcome_of(error, gone=gone)
            raise
        finally:
            context.duration = time.perf_counter() - started
            if context.repeats is not None and (worst := context.repeats.worst()) is not None:
                _warn(context, worst)
            end_tails(context)
            self._tell(context)
        # Not what has raised: the server is about to log that, and its record belongs to this request too. Nothing is
        # left behind, as a server runs each request in a context of its own.
        serve_no_more(before)

    def _mark(self, headers: list[Any], context: RequestContext, started: float) -> None:
        installation = self._installation
        headers.append((installation.request_id_header, context.request_id.encode()))
        if installation.log.server_timing:
            headers.append((b"server-timing", _server_timing(context, time.perf_counter() - started)))

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


def _outcome_of(error: BaseException, *, gone: bool) -> Outcome:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "disconnected" if gone else "error"


def _is_kept(context: RequestContext, share: float) -> bool:
    """Decide as every service does that sees the same trace."""
    if share == 1 or context.outcome != "ok":
        return True
    return crc32((context.trace_id or context.request_id).encode()) < share * 2**32


def _warn(context: RequestContext, worst: Repetition) -> None:
    file, line, function = worst.place
    logger.warning(
        "%s %s executed one statement %d times, at %s:%d in %s%s: load what it asks for at once, by a join, "
        "selectinload() or IN. %s",
        context.method,
        context.route or context.path,
        worst.count,
        file,
        line,
        function,
        f", and {worst.others} others too often" if worst.others else "",
        worst.sql,
    )


def _server_timing(context: RequestContext, elapsed: float) -> bytes:
    """Return where the time went: https://www.w3.org/TR/server-timing/, in milliseconds."""
    parts = [f"total;dur={elapsed * 1000:.1f}"]
    if context.admission_wait:
        parts.append(f"queue;dur={context.admission_wait * 1000:.1f}")
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


#: Ids are to be different, not to be secret. Of its own: nobody's `random.seed` makes two workers' the same.
_ids = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ids.seed)


def _context_of(scope: Scope, installation: Installation) -> RequestContext:
    context = RequestContext(f"{_ids.getrandbits(64):016x}", scope.get("method", "WEBSOCKET"), scope["path"])
    context.runtime, context.cursor_keys = installation.runtime, installation.cursor_keys
    if scope["query_string"]:
        context.query = scope["query_string"].decode("latin-1")
    budget, heeded = installation.deadline, installation.heeded
    for name, value in scope["headers"]:
        if name not in heeded:
            continue
        if name == b"traceparent":
            if (trace := _TRACEPARENT.fullmatch(value)) is not None:
                context.trace_id, context.span_id = trace[1].decode(), trace[2].decode()
        elif name == installation.request_id_header:
            if _REQUEST_ID.fullmatch(value):
                context.request_id = value.decode()
        elif _MILLISECONDS.fullmatch(value):
            budget = min(int(value) / 1000, math.inf if budget is None else budget)
    if budget is not None and scope["type"] == "http":
        context.deadline = time.monotonic() + budget
    return context


class RequestPath:
    """Innermost: what the router sends passes the guard, which commits, and the cache, which keeps it."""

    def __init__(self, app: ASGIApp, installation: Installation) -> None:
        self.app = app
        self._installation = installation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one scope."""
        context, installation = current(), self._installation
        if context is None or context.runtime is not installation.runtime:
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            context.scope, context.asked, context.find_route = scope, dict(scope), installation.route_of
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD" and installation.has_head_of_get(scope):
            # A copy, as the server looks at its own for the method.
            scope, send = {**scope, "method": "GET", "extensions": {}}, _without_body(send)
        try:
            await self._serve(context, scope, receive, send)
        finally:
            if context.exchange is not None and context.exchange.is_stale:
                self._refresh(context.exchange, context.asked)

    async def _serve(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        installation = self._installation
        # A middleware outside may have copied the scope: in this one the router notes where it leads to.
        context.scope, context.asked, context.find_route = scope, dict(scope), installation.route_of
        if installation.tenant is not None:
            context.tenant = installation.tenant(Request(scope))
        if installation.cached and (known := installation.known(scope, context.tenant)) is not None:
            wishes = wishes_of(scope["headers"])
            exchange = Exchange(installation.cache, known.policy, known.key, context, wishes)
            await exchange.look_up(scope.get(_FOUND))
            context.exchange = exchange
            if exchange.entry is not None:
                context.route = known.policy.route
                _tell_route(scope, known)
                await exchange.answer(send)
                return
        if installation.admission.refuses and (refused := installation.refused(context.asked, context)) is not None:
            error, context.route = refused
            context.refused = error.reason
            await self._refuse(error, context.exchange, scope, receive, send)
            return
        context.incoming = incoming = Incoming(receive)
        guard = SendGuard(context, send)
        failure: Exception | None = None
        try:
            await installation.attempts.run(self.app, context, guard)
        except CommitFailed as failed:
            failure = failed.error
        except DeadlineExceededError as error:
            failure = error
        except Exception as error:
            if context.exchange is None:
                raise
            context.exchange.fail(error)
            await guard.abandon()
            if not await context.exchange.stand_in(500, error, send):
                raise
        finally:
            if context.work:
                await guard.abandon()
            incoming.close()
            installation.admission.over(context)
            if context.exchange is not None:
                context.exchange.leave()
        if failure is None:
            return
        if context.exchange is None or not await context.exchange.stand_in(500, failure, send):
            await _answer(failure, scope, incoming, send)

    async def _refuse(
        self, error: OverloadedError, exchange: Exchange | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request that is not begun, by what stands in for its response, or by putting it off."""
        try:
            if exchange is None or not await exchange.stand_in(error.status, error, send):
                await _answer(error, scope, receive, send)
        finally:
            if exchange is not None:
                exchange.leave()

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


@functools.cache
def _told(detail: str, code: str) -> bytes:
    return json.dumps({"detail": detail, "code": code}).encode()


def putting_off(error: OverloadedError) -> Response:
    """Return the answer to a request that is worth making again."""
    headers = {"content-type": "application/json", "retry-after": str(math.ceil(error.retry_after))}
    return Response(_told(error.detail, error.code), error.status, headers)


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
