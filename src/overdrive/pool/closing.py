"""How connections of async drivers are closed behind the back of whoever had them, who may have been cancelled.

A connection is closed for certain when the server has closed its end: until then it may be at work still.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import weakref
from functools import partial
from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.util import greenlet_spawn

from .tasks import to_the_end

#: Seconds a server has to confirm that it has cancelled a statement, and closed its end.
_CLOSE_TIMEOUT = 2

#: Seconds a server has to confirm that it has cancelled a statement of psycopg's, to whom alone it would be ten.
_CANCEL_TIMEOUT = 1.0
#: libpq's PQTRANS_ACTIVE: a statement is at work.
_ACTIVE = 1

#: Of a psycopg connection, a second handle of its socket. It cannot be asked for it once it is closed, and cancelled
#: twice it closes itself and leaves the server to its statement.
_psycopg: weakref.WeakKeyDictionary[Any, weakref.finalize[..., Any]] = weakref.WeakKeyDictionary()


def watch(dialect: Dialect, dbapi_connection: Any) -> None:
    """Note what `close` will need of a new connection."""
    connection = dbapi_connection.driver_connection
    # The server may have ended it already.
    if "psycopg" in dialect.driver and not connection.closed:
        handle = os.dup(connection.pgconn.socket)
        _psycopg[connection] = weakref.finalize(connection, os.close, handle)
        connection.cancel_safe = partial(_cancel, weakref.ref(connection))


async def _cancel(reference: weakref.ref[Any], **_options: Any) -> None:
    """Cancel the statement of a psycopg connection, which SQLAlchemy then discards, in less time than psycopg would."""
    if (connection := reference()) is None:
        return
    asyncio.get_running_loop().call_later(_CANCEL_TIMEOUT, _end_wait, reference)
    # Who is cancelled twice does not stay to see it sent.
    await to_the_end(type(connection).cancel_safe(connection, timeout=_CANCEL_TIMEOUT))


def _end_wait(reference: weakref.ref[Any]) -> None:
    if (connection := reference()) is not None:
        hang_up(connection)


def hang_up(connection: Any) -> None:
    """End the wait for an answer to a statement: what a psycopg connection reads from now on is the end.

    May be called from another thread than the one that waits.
    """
    pgconn = getattr(connection, "pgconn", None)
    if pgconn is not None and not connection.closed and pgconn.transaction_status == _ACTIVE:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(pgconn.socket)) as end:
            end.shutdown(socket.SHUT_RDWR)


async def close(dialect: Dialect, dbapi_connection: Any) -> None:
    """Close a connection, and return when the server has, where it can be known.

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
        # and the event loop for it. A statement that nobody waits for any more would be gone through to its end first.
        with contextlib.suppress(ValueError):
            await connection.interrupt()
        if (stopped := connection.stop()) is not None:
            await stopped
    elif (watched := _psycopg.pop(connection, None)) is not None:
        await greenlet_spawn(dialect.do_close, dbapi_connection)
        await _closed_by_server(watched)
    else:
        await greenlet_spawn(dialect.do_close, dbapi_connection)


async def _closed_by_server(handle: weakref.finalize[..., Any]) -> None:
    if (detached := handle.detach()) is None:
        return
    with socket.socket(fileno=detached[2][0]) as end, contextlib.suppress(OSError, TimeoutError):
        end.setblocking(False)
        end.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(_CLOSE_TIMEOUT):
            while await asyncio.get_running_loop().sock_recv(end, 65_536):
                pass


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
