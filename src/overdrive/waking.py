"""Waking who waits in an event loop, from wherever a connection is given back: garbage is collected in any thread."""

from __future__ import annotations

import asyncio


def wake(waiting: asyncio.Future[None]) -> None:
    """Have whoever awaits this go on; at once, as far as that can be: what comes next sees that it does."""
    loop = waiting.get_loop()
    if asyncio._get_running_loop() is loop:
        _go_on(waiting)
    else:
        loop.call_soon_threadsafe(_go_on, waiting)


def _go_on(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
