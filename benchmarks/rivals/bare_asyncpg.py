"""No framework and no SQLAlchemy: asyncpg and orjson."""

import asyncio
from typing import Any

import asyncpg
import orjson

from benchmarks.rivals import shop

_PAGE = """
    SELECT id, email, name, country, created_at, active FROM users
    ORDER BY created_at DESC, id DESC LIMIT 50
"""


def page() -> Any:
    """Return an app that answers a page with asyncpg and orjson alone."""
    pool: asyncpg.Pool | None = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal pool
        if scope["type"] != "http":
            return
        if pool is None:
            pool = await asyncpg.create_pool(shop.DATABASE_URL, min_size=shop.POOL_SIZE, max_size=shop.POOL_SIZE)
        rows = await pool.fetch(_PAGE)
        body = orjson.dumps({"items": [dict(row) for row in rows]})
        headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def slow() -> Any:
    """Return an app whose five connections are busy for 50 ms each, and never with anything else."""
    idle: asyncio.Queue[asyncpg.Connection] = asyncio.LifoQueue()
    opened = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal opened
        if scope["type"] != "http":
            return
        if not opened:
            opened = True
            for _ in range(5):
                idle.put_nowait(await asyncpg.connect(shop.DATABASE_URL))
        connection = await idle.get()
        await connection.fetchval("SELECT pg_sleep(0.05)")
        idle.put_nowait(connection)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    return app
