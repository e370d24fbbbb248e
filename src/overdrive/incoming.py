"""What a client sends, which may be looked at before the app asks for it: to learn whether it still waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Incoming:
    """A request's `receive`.

    is_read: whether the app has asked for anything.
    has_ended: whether the client was seen to leave.
    """

    __slots__ = ("_ahead", "_gone", "_receive", "_watching", "has_ended", "is_read")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ahead: asyncio.Queue[Message] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._gone: list[Callable[[], None]] = []
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
        if self.has_ended:
            gone()
            return
        self._gone.append(gone)
        if self._watching is None:
            self._ahead = asyncio.Queue()
            self._watching = asyncio.create_task(self._watch(self._ahead))

    async def _watch(self, ahead: asyncio.Queue[Message]) -> None:
        more = False
        while not (more or self.has_ended):
            message = await self._receive()
            more = message.get("more_body", False)
            self.has_ended = message["type"] == "http.disconnect"
            ahead.put_nowait(message)
        if self.has_ended:
            for gone in self._gone:
                gone()

    def close(self) -> None:
        """Look no more."""
        if self._watching is not None:
            self._watching.cancel()
