"""The send guard: a request's sessions end before the first byte of its response leaves."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from anyio import CancelScope

from overdrive.context import RequestContext

from .tasks import to_the_end

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class CommitFailed(BaseException):
    """Carries a failed commit past everything between the response and the guard.

    Not an `Exception`: Starlette turns those into "response already started" once a response has begun, and an
    endpoint's own `except Exception` would swallow it.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error


class SendGuard:
    """Commits or rolls back at `http.response.start`, then lets the message pass, through the cache if that is asked.

    When the commit fails, nothing of the response leaves: `CommitFailed` is raised into whoever sends it.
    """

    def __init__(self, context: RequestContext, send: Send) -> None:
        self._context = context
        self._send = send
        self._failed = False
        #: What would cancel the app, and whether its response has begun: from then on nothing does.
        self.limits: CancelScope | None = None
        self.has_begun = False

    def send(self, message: Message) -> Awaitable[None]:
        """Pass `message` on once the request's sessions have ended."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            if self.limits is not None:
                self.limits.deadline = math.inf
            if self._context.work:
                return self._settle(message)
        return _nothing() if self._failed else self._pass(message)

    async def _settle(self, message: Message) -> None:
        try:
            for unit in self._context.work:
                if not unit.settle(message["status"]):
                    await to_the_end(unit.end(message["status"]))
        except Exception as error:
            self._failed = True
            raise CommitFailed(error) from error
        await self._pass(message)

    def _pass(self, message: Message) -> Awaitable[None]:
        exchange = self._context.exchange
        passed: Awaitable[None] = self._send(message) if exchange is None else exchange.send(message, self._send)
        return passed

    async def abandon(self) -> None:
        """Roll back whatever has not ended."""
        for unit in self._context.work:
            await to_the_end(unit.abandon())


async def _nothing() -> None:
    """Send nothing of a response that was given up."""
