"""Who has a connection for too long: the route, and the place in the code where it was taken."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from itertools import islice
from types import FrameType
from typing import Any

from greenlet import getcurrent  # type: ignore[import-untyped]

from overdrive.context import current

logger = logging.getLogger("overdrive")

#: Code that takes connections on behalf of others.
_LIBRARIES = ("sqlalchemy", "overdrive", "asyncio", "anyio", "starlette", "fastapi", "uvicorn", "greenlet", "threading")
#: What is called by nobody who has anything to do with the request.
_OUTSIDE = ("overdrive.middleware", "asyncio.events", "asyncio.runners")
#: Lines of code that are kept of a stack.
_DEPTH = 5

Line = tuple[str, int, str]


class Holders:
    """Whoever has a connection now.

    after: seconds a connection may be held before its holder is named, once.
    """

    def __init__(self, after: float) -> None:
        self._after = after
        self._held: dict[Any, tuple[float, str, list[Line]]] = {}

    def took(self, connection: Any, now: float) -> None:
        """Note who takes a connection."""
        context = current()
        route = f"{context.method} {context.path} (request {context.request_id})" if context else "no request"
        stack = list(islice(team_lines(), _DEPTH))
        self._held[connection] = (now, route, stack)

    def gave(self, connection: Any) -> None:
        """Forget who had a connection."""
        self._held.pop(connection, None)

    def name_leaks(self, now: float) -> None:
        """Log a WARNING for each connection held for too long."""
        for connection, (since, route, stack) in list(self._held.items()):
            if now - since < self._after:
                continue
            self.gave(connection)
            where = "".join(f"\n  {file}:{line} in {name}" for file, line, name in stack)
            logger.warning("a connection has been held for %.1f s by %s; it was taken at%s", now - since, route, where)


def team_lines() -> Iterator[Line]:
    """Yield the lines of the team's own code, innermost first, from a greenlet on into what has started it.

    Nothing of what stands around the router, or runs the loop.
    """
    frame: FrameType | None = sys._getframe(1)
    greenlet = getcurrent()
    while True:
        if frame is None:
            # The frames of a greenlet end where it was started.
            greenlet = greenlet.parent
            if greenlet is None or (frame := greenlet.gr_frame) is None:
                return
        module = frame.f_globals.get("__name__", "")
        if module in _OUTSIDE:
            return
        if module.partition(".")[0] not in _LIBRARIES:
            yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
