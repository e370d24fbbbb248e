"""How a request is run: in its time, while its client is there, and once more where it met a dead connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio

from overdrive.context import RequestContext
from overdrive.errors import DeadlineExceededError

from .guard import SendGuard

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Any, Any, Any], Awaitable[None]]

#: Methods that ask for nothing to be changed (RFC 9110, section 9.2.1).
_SAFE = ("GET", "HEAD")
#: What a request adds to the repetitions there may be, and how many can be saved up. More than a tenth of all would
#: help a failing database down (Site Reliability Engineering, chapter 21, "Deciding to Retry").
_SHARE = 0.1
_SAVED = 10.0


class Attempts:
    """Runs the requests of an app.

    stop_abandoned: whether a safe request is cancelled when its client has left.
    """

    def __init__(self, *, stop_abandoned: bool) -> None:
        self._stop_abandoned = stop_abandoned
        self._repetitions = _SAVED

    async def run(
        self, app: App, context: RequestContext, scope: Any, asked: Any, receive: Receive, guard: SendGuard
    ) -> None:
        """Run one request, and once more if it is safe and has failed on a connection that was dead already.

        asked: the scope as it came: the router notes in the other where it leads to.

        Raises `DeadlineExceededError` where its time has run out, and whatever the app raises.
        """
        if scope["method"] not in _SAFE:
            await self._run(app, context, scope, receive, guard)
            return
        if self._repetitions < _SAVED:
            self._repetitions += _SHARE
        exchange, incoming = context.exchange, Incoming(receive)
        try:
            if context.deadline is None and not self._stop_abandoned:
                await app(scope, incoming, guard.send)
            else:
                await self._run(app, context, scope, incoming, guard)
        except Exception as error:
            unseen = not guard.has_begun and not incoming.is_read and context.exchange is exchange
            # SQLAlchemy says of an error whether the connection was lost with it.
            lost = getattr(error, "connection_invalidated", False) and not context.wrote
            if not unseen or not lost or self._repetitions < 1:
                raise
            self._repetitions -= 1
            await guard.abandon()
            context.work.clear()
            await self._run(app, context, dict(asked), incoming, guard)
        finally:
            incoming.close()

    async def _run(self, app: App, context: RequestContext, scope: Any, receive: Receive, guard: SendGuard) -> None:
        incoming = receive if self._stop_abandoned and isinstance(receive, Incoming) else None
        if context.deadline is None and incoming is None:
            await app(scope, receive, guard.send)
            return
        # Of anyio, so that what runs in a thread comes to its end before its session does.
        guard.limits = limits = anyio.CancelScope()
        failure: Exception | None = None
        with limits:
            if context.deadline is not None:
                limits.deadline = anyio.current_time() + context.deadline - time.monotonic()
            if incoming is not None:
                incoming.watch(lambda: None if guard.has_begun else limits.cancel())
            try:
                await app(scope, receive, guard.send)
            except Exception as error:
                failure = error
        if limits.cancel_called and (limits.cancelled_caught or failure is not None):
            # Whoever has left is not told.
            if incoming is None or not incoming.has_ended:
                raise DeadlineExceededError("the request's time has run out") from failure
        elif failure is not None:
            raise failure


class Incoming:
    """What a client sends, which may be looked at before the app asks for it.

    is_read: whether the app has asked for it.
    has_ended: whether the client was seen to leave.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ahead: asyncio.Queue[Message] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.is_read = self.has_ended = False

    async def __call__(self) -> Message:
        """Return the next message."""
        self.is_read = True
        ahead, watching = self._ahead, self._watching
        if ahead is None or watching is None or (watching.done() and ahead.empty()):
            return await self._receive()
        return await ahead.get()

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` when the client leaves, unless it sends a body in pieces: who reads that learns of it."""
        self.close()
        self._ahead = self._ahead or asyncio.Queue()
        self._watching = asyncio.create_task(self._watch(self._ahead, gone))

    async def _watch(self, ahead: asyncio.Queue[Message], gone: Callable[[], None]) -> None:
        more = False
        while not more:
            message = await self._receive()
            more = message.get("more_body", False)
            ahead.put_nowait(message)
            if message["type"] == "http.disconnect":
                self.has_ended = True
                gone()
                return

    def close(self) -> None:
        """Look no more."""
        if self._watching is not None:
            self._watching.cancel()
