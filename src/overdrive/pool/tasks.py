"""Work that goes on when the task that asked for it is cancelled."""

from __future__ import annotations

import asyncio
import logging
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
