"""No framework and no SQLAlchemy: asyncpg and orjson."""

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
