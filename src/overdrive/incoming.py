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
        if ahead is None or (ahead.empty() and (watching is None or watching.done())):
            return await self._receive()
        return await ahead.get()

    async def look(self) -> bool:
        """Take the first message ahead, and say whether the client is there: at once, as long as there is no body."""
        self._ahead = asyncio.Queue()
        await self._take(self._ahead)
        return not self.has_ended

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` when the client leaves, unless it sends a body in pieces: who reads that learns of it."""
        if self.has_ended:
            gone()
            return
        self._gone.append(gone)
        if self._watching is None:
            self._ahead = self._ahead or asyncio.Queue()
            self._watching = asyncio.create_task(self._watch(self._ahead))

    async def _watch(self, ahead: asyncio.Queue[Message]) -> None:
        more = False
        while not (more or self.has_ended):
            more = await self._take(ahead)
        if self.has_ended:
            for gone in self._gone:
                gone()

    async def _take(self, ahead: asyncio.Queue[Message]) -> bool:
        message = await self._receive()
        self.has_ended = message["type"] == "http.disconnect"
        ahead.put_nowait(message)
        more: bool = message.get("more_body", False)
        return more

    def close(self) -> None:
        """Look no more."""
        if self._watching is not None:
            self._watching.cancel()
