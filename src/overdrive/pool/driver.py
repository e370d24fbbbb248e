"""What a driver's connection says of itself; none of it asks the database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine

#: Whether a driver's connection has no transaction open.
_IDLE: dict[str, Callable[[Any], bool]] = {
    "aiosqlite": lambda connection: not connection.in_transaction,
    "asyncpg": lambda connection: not connection.is_in_transaction(),
    "psycopg": lambda connection: connection.pgconn.transaction_status == 0,
    "psycopg_async": lambda connection: connection.pgconn.transaction_status == 0,
}


def driver_of(pooled: Any) -> Any:
    """Return the driver's own connection of a pooled one, which is not told as taken out."""
    return getattr(pooled.dbapi_connection, "driver_connection", pooled.dbapi_connection)


def is_idle(engine: Engine, connection: Any) -> bool:
    """Say whether ending the transaction of a pooled connection would end nothing.

    With aiosqlite that would be a trip to its thread, and with psycopg one to its lock.
    """
    idle = _IDLE.get(engine.dialect.driver)
    return idle is not None and idle(driver_of(connection))
