"""FastAPI and SQLAlchemy as a team writes them by hand."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.rivals.shop import Sessions, User, UserOut, constant_app
from overdrive import FairPool


class UserPage(BaseModel):
    """A page and where the next one begins."""

    items: list[UserOut]
    next_id: int | None


def constant() -> FastAPI:
    """Return an app that answers a constant."""
    return constant_app(FastAPI())


def service(**pool: Any) -> FastAPI:
    """Return an app that answers a user by id, and the users newest first by a keyset."""
    app = FastAPI()
    Session = Annotated[AsyncSession, Depends(Sessions(**pool).get_db)]  # noqa: N806 - an alias of a type

    @app.get("/users/{user_id}", response_model=UserOut)
    async def get_user(user_id: int, db: Session) -> User:
        user = await db.get(User, user_id)
        if user is None:
            raise HTTPException(404)
        return user

    @app.get("/feed", response_model=UserPage)
    async def feed(db: Session, after_id: int | None = None, size: int = 50) -> UserPage:
        statement = select(User).order_by(User.created_at.desc(), User.id.desc()).limit(size + 1)
        if after_id is not None:
            last = select(User.created_at, User.id).where(User.id == after_id).scalar_subquery()
            statement = statement.where(tuple_(User.created_at, User.id) < last)
        users = (await db.scalars(statement)).all()
        items = [UserOut.model_validate(user) for user in users[:size]]
        return UserPage(items=items, next_id=items[-1].id if len(users) > size else None)

    return app


def service_with_overflow() -> FastAPI:
    """Return the service with the pool that SQLAlchemy's users are advised to let grow."""
    return service(max_overflow=20)


def service_on_fair_pool() -> FastAPI:
    """Return the service with another class of pool, and nothing else."""
    return service(max_overflow=20, poolclass=FairPool)


def overloaded() -> FastAPI:
    """Return an app whose five connections are busy for 50 ms each: it can answer 100 requests a second."""
    app = FastAPI()
    Session = Annotated[AsyncSession, Depends(Sessions(pool_size=5).get_db)]  # noqa: N806 - an alias of a type

    @app.get("/slow")
    async def slow(db: Session) -> dict[str, str]:
        await db.execute(select(func.pg_sleep(0.05)))
        return {"status": "done"}

    return app
