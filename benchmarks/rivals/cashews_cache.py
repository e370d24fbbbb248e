"""cashews around the endpoint, in memory and on Redis."""

from typing import Annotated

from cashews import Cache
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.rivals.shop import REDIS_URL, Sessions, User, UserOut


def memory() -> FastAPI:
    """Return an app that keeps answers in the process."""
    return _app("mem://")


def redis() -> FastAPI:
    """Return an app that keeps answers in Redis."""
    return _app(REDIS_URL)


def _app(url: str) -> FastAPI:
    cache = Cache()
    cache.setup(url)
    app = FastAPI()
    Session = Annotated[AsyncSession, Depends(Sessions().get_db)]  # noqa: N806 - an alias of a type

    @app.get("/cached/{user_id}")
    @cache(ttl="1h", key="user:{user_id}")
    async def get_user(user_id: int, db: Session) -> UserOut:
        return UserOut.model_validate(await db.get_one(User, user_id))

    return app
