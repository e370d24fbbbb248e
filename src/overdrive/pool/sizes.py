"""Whether the pools of a service fit into what its database allows, looked at with the first connection."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine, event

from overdrive.errors import ConfigurationError
from overdrive.workers import workers

from .pool import FairPool

logger = logging.getLogger("overdrive")

#: What ordinary roles may have; the second kind of reserved connections came with PostgreSQL 16.
_LIMITS = """
SELECT current_setting('max_connections')::int, current_setting('superuser_reserved_connections')::int
    + coalesce(current_setting('reserved_connections', true), '0')::int
"""

#: By host and port, the engines of this process.
_engines: dict[tuple[str | None, int | None], WeakSet[Engine]] = {}


def excess(processes: int, capacities: list[int], limit: int, reserved: int) -> str | None:
    """Say, with the arithmetic, that the pools of all processes do not fit; None where they do.

    capacities: the most connections of each pool of a process.
    limit, reserved: the server's connections, and how many of them are not for ordinary roles.
    """
    wanted, allowed = processes * sum(capacities), limit - reserved
    if wanted <= allowed:
        return None
    pools = " + ".join(map(str, capacities))
    return (
        f"the pools may open more connections than the database allows: {processes} processes x ({pools}) = {wanted}, "
        f"but max_connections {limit} - {reserved} reserved = {allowed}. Lower pool.size or pool.max_overflow, raise "
        "max_connections, or put a PgBouncer between (pool.pgbouncer); pool.processes says how many processes there are"
    )


def watch_sizes(engine: Engine, processes: int | None, *, strict: bool) -> None:
    """Log a WARNING with the first connection where the pools to this server cannot all be full at once.

    processes: how many processes have a pool like this one, on all machines; None takes WEB_CONCURRENCY, or 1.
    strict: raise `ConfigurationError` instead, with every connection.
    """
    if engine.dialect.name != "postgresql" or not isinstance(engine.pool, FairPool):
        return
    others = _engines.setdefault((engine.url.host, engine.url.port), WeakSet())
    others.add(engine)
    looked = False

    def look(dbapi_connection: Any, _record: Any) -> None:
        nonlocal looked
        if looked:
            return
        looked = True
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute(_LIMITS)
            limit, reserved = cursor.fetchone()
        finally:
            cursor.close()
            dbapi_connection.rollback()
        message = excess(processes or workers(), _capacities(others), limit, reserved)
        if message is None:
            return
        if strict:
            looked = False
            raise ConfigurationError(message)
        logger.warning(message)

    event.listen(engine, "connect", look)


def _capacities(engines: Iterable[Engine]) -> list[int]:
    """Return the most connections of each pool that has any: others may have been made and forgotten."""
    pools = [engine.pool for engine in engines]
    return [pool.capacity for pool in pools if isinstance(pool, FairPool) and pool.checkedout() + pool.checkedin()]
