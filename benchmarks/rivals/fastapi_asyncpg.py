"""FastAPI on asyncpg, without SQLAlchemy."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import asyncpg
from fastapi import FastAPI

from benchmarks.rivals import shop
from benchmarks.rivals.plain_fastapi import UserPage
from benchmarks.rivals.shop import UserOut

_USER = "SELECT id, email, name, country, created_at, active FROM users WHERE id = $1"
_FIRST = "SELECT id, email, name, country, created_at, active FROM users ORDER BY created_at DESC, id DESC LIMIT $1"
_NEXT = _FIRST.replace("ORDER BY", "WHERE (created_at, id) < ($2, $3) ORDER BY")


def app() -> FastAPI:
    """Return an app that answers a user by id, and the users newest first by a keyset."""
    app = FastAPI()
    pool: asyncpg.Pool | None = None

    async def opened() -> asyncpg.Pool:
        nonlocal pool
        if pool is None:
            pool = await asyncpg.create_pool(shop.DATABASE_URL, min_size=shop.POOL_SIZE, max_size=shop.POOL_SIZE)
        return pool

    @app.get("/users/{user_id}", response_model=UserOut)
    async def get_user(user_id: int) -> Any:
        return dict(await (await opened()).fetchrow(_USER, user_id))

    @app.get("/feed", response_model=UserPage)
    async def feed(after_time: datetime | None = None, after_id: int = 0, size: int = 50) -> dict[str, Any]:
        if after_time is None:
            rows = await (await opened()).fetch(_FIRST, size + 1)
        else:
            rows = await (await opened()).fetch(_NEXT, size + 1, after_time, after_id)
        items = [dict(row) for row in rows[:size]]
        return {"items": items, "next_id": items[-1]["id"] if len(rows) > size else None}

    return app


def overloaded() -> FastAPI:
    """Return an app whose five connections are busy for 50 ms each: it can answer 100 requests a second."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with asyncpg.create_pool(shop.DATABASE_URL, min_size=5, max_size=5) as app.state.pool:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/slow")
    async def slow() -> dict[str, str]:
        async with app.state.pool.acquire() as connection:
            await connection.fetchval("SELECT pg_sleep(0.05)")
        return {"status": "done"}

    return app
