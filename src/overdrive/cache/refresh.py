"""Expired entries that were served are made anew behind their client's back (RFC 5861, section 3)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("overdrive")

#: How many are made anew at once: they take connections from requests that somebody waits for.
_MOST = 8
#: Seconds until what has failed is tried again.
_PAUSE = 1.0


class Refreshes:
    """The refreshes under way: one for each key, and not too many."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        #: Routes whose last refresh has failed, and that was said.
        self._failing: set[str | None] = set()

    def start(self, key: str, route: str | None, refresh: Callable[[], Awaitable[int | None]]) -> None:
        """Have an entry made anew, unless that is under way, or too much is; the next request asks again.

        refresh: does it, and returns the response's status.
        """
        if key in self._tasks or len(self._tasks) >= _MOST:
            return
        task = self._tasks[key] = asyncio.get_running_loop().create_task(self._run(route, refresh))
        task.add_done_callback(lambda _task: self._tasks.pop(key))

    async def _run(self, route: str | None, refresh: Callable[[], Awaitable[int | None]]) -> None:
        error: Exception | None = None
        status: int | None = None
        try:
            status = await refresh()
        except Exception as raised:
            error = raised
        if error is None and (status is None or status < 500):
            self._failing.discard(route)
            return
        if route not in self._failing:
            self._failing.add(route)
            why = "raised" if error is not None else f"answered {status}"
            logger.error("%s %s when it was to refresh its response, which stays", route, why, exc_info=error)
        await asyncio.sleep(_PAUSE)

    async def aclose(self) -> None:
        """Cancel what is under way, and wait until it has let go of what it holds."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
