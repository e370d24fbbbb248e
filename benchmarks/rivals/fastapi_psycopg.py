"""FastAPI on psycopg and its pool, without SQLAlchemy."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from benchmarks.rivals import shop
from benchmarks.rivals.shop import UserOut

_USER = "SELECT id, email, name, country, created_at, active FROM users WHERE id = %s"


def app() -> FastAPI:
    """Return an app that answers a user by id."""
    pool = AsyncConnectionPool(shop.DATABASE_URL, min_size=shop.POOL_SIZE, max_size=shop.POOL_SIZE, open=False)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with pool:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/users/{user_id}", response_model=UserOut)
    async def get_user(user_id: int) -> Any:
        async with pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(_USER, (user_id,))
            return await cursor.fetchone()

    return app
