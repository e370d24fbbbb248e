"""Work that goes on when the task that asked for it is cancelled, and work for those who have no event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger("overdrive")

T = TypeVar("T")

# The event loop itself keeps only weak references to its tasks.
_running: set[asyncio.Task[Any]] = set()


def start(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run `coroutine` in a task of its own, outside every cancel scope, to its end."""
    task = asyncio.ensure_future(coroutine)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task


async def to_the_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for `coroutine`, which goes on to its end when the waiting task is cancelled."""
    task = start(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_log_failure)
        raise


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("work that outlived its cancelled request failed", exc_info=error)


_beside: asyncio.AbstractEventLoop | None = None
_making = threading.Lock()


def loop_beside() -> asyncio.AbstractEventLoop:
    """Return a loop that runs in a thread of its own as long as this process does: what is opened on it lasts.

    A script, or a worker of Celery, has no other.
    """
    global _beside
    with _making:
        if _beside is None:
            _beside = asyncio.new_event_loop()
            threading.Thread(target=_beside.run_forever, name="overdrive-beside", daemon=True).start()
        return _beside


def _begin_anew() -> None:
    """Have a loop of its own in a forked child, which has inherited no threads."""
    global _beside, _making
    _beside, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
