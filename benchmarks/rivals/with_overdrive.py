"""The same app with Overdrive."""

import logging
from typing import Any

from fastapi import FastAPI
from sqlalchemy import func, select

from benchmarks.rivals import shop
from benchmarks.rivals.shop import User, UserOut, constant_app
from overdrive import CursorPage, LogHandler, Overdrive, Page, SessionDep, Settings, cached, log_directly, paginate


def _app(pool_size: int = shop.POOL_SIZE, max_overflow: int = 0, **settings: Any) -> FastAPI:
    app = FastAPI()
    pool = {"size": pool_size, "max_overflow": max_overflow}
    Overdrive(app, settings=Settings.load(database_url=shop.DATABASE_URL, pool=pool, **settings))
    return app


def constant() -> FastAPI:
    """Return an app that answers a constant, with nothing of Overdrive in use."""
    app = FastAPI()
    Overdrive(app)
    return constant_app(app)


def service(**settings: Any) -> FastAPI:
    """Return an app that answers a user by id, cached and not, and the users by page."""
    app = _app(**settings)

    @app.get("/users/{user_id}", response_model=UserOut)
    async def get_user(user_id: int, db: SessionDep) -> Any:
        return await db.get_one(User, user_id)

    @app.get("/cached/{user_id}", response_model=UserOut)
    @cached(ttl=3600)
    async def get_cached_user(user_id: int, db: SessionDep) -> Any:
        return await db.get_one(User, user_id)

    @app.get("/page", response_model=Page[UserOut])
    async def page(db: SessionDep) -> Any:
        return await paginate(db, select(User).order_by(User.created_at.desc(), User.id.desc()))

    @app.get("/feed", response_model=CursorPage[UserOut])
    async def feed(db: SessionDep) -> Any:
        return await paginate(db, select(User).order_by(User.created_at.desc(), User.id.desc()))

    return app


def service_for_many(max_overflow: int = 0) -> FastAPI:
    """Return the service for more clients than connections, of whom none is refused, however slow the machine."""
    return service(max_overflow=max_overflow, admission={"max_wait": 60})


def service_for_many_with_overflow() -> FastAPI:
    """Return the same with a pool that may grow."""
    return service_for_many(max_overflow=20)


def service_on_redis() -> FastAPI:
    """Return the service with its cache in Redis."""
    return service(redis_url=shop.REDIS_URL)


def service_asking_redis() -> FastAPI:
    """Return the service with nothing near: each hit asks Redis."""
    return service(redis_url=shop.REDIS_URL, cache={"max_bytes": 0})


def service_with_events() -> FastAPI:
    """Return the service with its cache in the process, and one event a request in a file."""
    logging.basicConfig(handlers=[LogHandler(path="log.txt")], level=logging.INFO)
    return service()


def overloaded() -> FastAPI:
    """Return an app whose five connections are busy for 50 ms each: it can answer 100 requests a second."""
    app = _app(pool_size=5)

    @app.get("/slow")
    async def slow(db: SessionDep) -> dict[str, str]:
        await db.execute(select(func.pg_sleep(0.05)))
        return {"status": "done"}

    @app.get("/copies/{number}")
    @cached(ttl=1, stale_if_error=3600, depends=["users"])
    async def copies(number: int, db: SessionDep) -> dict[str, str]:
        await db.execute(select(func.pg_sleep(0.05)))
        return {"status": "done"}

    return app


def log() -> FastAPI:
    """Return an app that logs with Overdrive's handler."""
    return _logging(FastAPI())


def direct_log() -> FastAPI:
    """Return an app whose loggers hand what they are told straight to Overdrive's handler."""
    log_directly()
    return _logging(FastAPI())


def log_and_event() -> FastAPI:
    """Return an app that logs so, and Overdrive one event a request besides."""
    log_directly()
    app = FastAPI()
    Overdrive(app)
    return _logging(app)


def log_off() -> FastAPI:
    """Return an app with Overdrive that logs nothing."""
    app = FastAPI()
    Overdrive(app, settings=Settings(log={"events": False}))
    return _logging(app, logging.WARNING)


def _logging(app: FastAPI, level: int = logging.INFO) -> FastAPI:
    logging.basicConfig(handlers=[LogHandler(path="log.txt")], level=level)
    logger = logging.getLogger("shop")

    @app.get("/log")
    async def five_lines() -> dict[str, str]:
        for line, argument in shop.LINES:
            logger.info(line, argument)
        return {"status": "done"}

    return app
