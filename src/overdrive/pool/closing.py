"""How connections of async drivers are closed behind the back of whoever had them, who may have been cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.util import greenlet_spawn

#: Seconds a server has to confirm that it has cancelled a statement.
_CLOSE_TIMEOUT = 2


async def close(dialect: Dialect, dbapi_connection: Any) -> None:
    """Close a connection, and return when the server knows, where it can be known.

    In a task of its own, so that the cancel request which asyncpg sends is not cancelled with the statement.
    """
    connection = dbapi_connection.driver_connection
    if dialect.driver == "asyncpg":
        try:
            await connection.close(timeout=_CLOSE_TIMEOUT)
        except Exception:
            connection.terminate()
    elif dialect.driver == "aiosqlite":
        # Its close is two steps with a wait each; cancelled between them, it waits for an answer that never comes,
        # and the event loop for it.
        if (stopped := connection.stop()) is not None:
            await stopped
    else:
        await greenlet_spawn(dialect.do_close, dbapi_connection)


def abandon(dialect: Dialect, dbapi_connection: Any) -> None:
    """Close a connection whose event loop is gone, or that is collected as garbage."""
    connection = dbapi_connection.driver_connection
    if dialect.driver == "aiosqlite":
        connection.stop()
    elif dialect.driver == "asyncpg":
        connection.terminate()


def has_loop() -> bool:
    """Say whether an event loop runs here."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
