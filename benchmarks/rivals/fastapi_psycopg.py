"""FastAPI on psycopg's pool, as psycopg's documentation puts it into a lifespan."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

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


def overloaded(**bounds: Any) -> FastAPI:
    """Return an app whose five connections are busy for 50 ms each: it can answer 100 requests a second."""
    pool = AsyncConnectionPool(shop.DATABASE_URL, min_size=5, max_size=5, open=False, **bounds)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await pool.open()
        yield
        await pool.close()

    app = FastAPI(lifespan=lifespan)

    @app.exception_handler(TooManyRequests)
    @app.exception_handler(PoolTimeout)
    async def refuse(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "too much to do"}, 503, {"retry-after": "1"})

    @app.get("/slow")
    async def slow() -> dict[str, str]:
        async with pool.connection() as connection:
            await connection.execute("SELECT pg_sleep(0.05)")
        return {"status": "done"}

    return app


def overloaded_with_bounds() -> FastAPI:
    """Return the same with what the pool offers against overload, set for clients who wait for a second."""
    return overloaded(max_waiting=50, timeout=0.9)
