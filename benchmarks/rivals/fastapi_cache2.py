"""fastapi-cache2 around the endpoint, in memory and on Redis."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi_cache import FastAPICache
from fastapi_cache.backends.inmemory import InMemoryBackend
from fastapi_cache.backends.redis import RedisBackend
from fastapi_cache.decorator import cache
from fastapi_cache.types import Backend
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.rivals.shop import REDIS_URL, Sessions, User, UserOut


def memory() -> FastAPI:
    """Return an app that keeps answers in the process."""
    return _app(InMemoryBackend())


def redis() -> FastAPI:
    """Return an app that keeps answers in Redis."""
    return _app(RedisBackend(Redis.from_url(REDIS_URL)))


def _by_path(_function: Any, _namespace: str = "", *, request: Request, **_values: Any) -> str:
    return request.url.path


def _app(backend: Backend) -> FastAPI:
    # Its default key holds the session, which is another one on each request: nothing would ever hit.
    FastAPICache.init(backend, prefix="fastapi-cache2", key_builder=_by_path)
    app = FastAPI()
    Session = Annotated[AsyncSession, Depends(Sessions().get_db)]  # noqa: N806 - an alias of a type

    @app.get("/cached/{user_id}")
    @cache(expire=3600)
    async def get_user(user_id: int, db: Session) -> UserOut:
        return UserOut.model_validate(await db.get_one(User, user_id))

    return app
