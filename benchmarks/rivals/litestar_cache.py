"""Litestar and its response cache, in memory and on Redis."""

from litestar import Litestar, get
from litestar.config.response_cache import ResponseCacheConfig
from litestar.stores.base import Store
from litestar.stores.memory import MemoryStore
from litestar.stores.redis import RedisStore

from benchmarks.rivals.shop import REDIS_URL, Sessions, User, UserOut


def memory() -> Litestar:
    """Return an app that keeps responses in the process."""
    return _app(MemoryStore())


def redis() -> Litestar:
    """Return an app that keeps responses in Redis."""
    return _app(RedisStore.with_client(url=REDIS_URL))


def _app(store: Store) -> Litestar:
    sessions = Sessions()

    @get("/cached/{user_id:int}", cache=3600)
    async def get_user(user_id: int) -> UserOut:
        async with sessions.maker() as db:
            return UserOut.model_validate(await db.get_one(User, user_id))

    config = ResponseCacheConfig(store="responses")
    return Litestar([get_user], stores={"responses": store}, response_cache_config=config, openapi_config=None)
