"""How a request is run: in its time, while its client is there, and once more where it met a dead connection."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from overdrive.context import RequestContext
from overdrive.errors import DeadlineExceededError
from overdrive.incoming import Incoming

from .guard import SendGuard

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

    async def run(self, app: App, context: RequestContext, guard: SendGuard) -> None:
        """Run one request, and once more if it is safe and has failed on a connection that was dead already.

        Raises `DeadlineExceededError` where its time has run out, and whatever the app raises.
        """
        scope, incoming, exchange = context.scope, context.incoming, context.exchange
        safe = scope["method"] in _SAFE
        watched = safe and self._stop_abandoned
        if safe and self._repetitions < _SAVED:
            self._repetitions += _SHARE
        try:
            if context.deadline is None and not watched:
                await app(scope, incoming, guard.send)
            else:
                await _limited(app, context, guard, watched=watched)
        except Exception as error:
            unseen = safe and not guard.has_begun and not incoming.is_read and context.exchange is exchange
            # SQLAlchemy says of an error whether the connection was lost with it.
            lost = getattr(error, "connection_invalidated", False) and not context.wrote
            if not unseen or not lost or self._repetitions < 1:
                raise
            self._repetitions -= 1
            await guard.abandon()
            context.work.clear()
            context.scope = dict(context.asked)
            await _limited(app, context, guard, watched=watched)


async def _limited(app: App, context: RequestContext, guard: SendGuard, *, watched: bool) -> None:
    """Run a request until its time has run out; or until its client has left, if it is watched."""
    incoming: Incoming = context.incoming
    # Of anyio, so that what runs in a thread comes to its end before its session does.
    guard.limits = limits = anyio.CancelScope()
    failure: Exception | None = None
    with limits:
        if context.deadline is not None:
            limits.deadline = anyio.current_time() + context.deadline - time.monotonic()
        if watched:
            incoming.watch(lambda: None if guard.has_begun else limits.cancel())
        try:
            await app(context.scope, incoming, guard.send)
        except Exception as error:
            failure = error
    if limits.cancel_called and (limits.cancelled_caught or failure is not None):
        # Whoever has left is not told.
        if not (watched and incoming.has_ended):
            raise DeadlineExceededError("the request's time has run out") from failure
    elif failure is not None:
        raise failure
