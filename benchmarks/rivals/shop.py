"""What all rivals share: the table, the shape of an answer, the pool's size and where the servers are."""

import os
from collections.abc import AsyncIterator
from datetime import datetime

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import Pool

POOL_SIZE = 10

#: The URL as drivers know it; SQLAlchemy is told the driver as well.
DATABASE_URL = os.environ.get("DATABASE_URL", "")
REDIS_URL = os.environ.get("REDIS_URL", "")

#: What every logging rival logs for a request, as a format and its argument.
LINES = [
    ("user %s signed in", 4711),
    ("basket has %d items", 3),
    ("stock checked for %s", "product 17"),
    ("price is %.2f", 19.99),
    ("order %s placed", "2026-000123"),
]


class Base(DeclarativeBase):
    """The metadata of the one table."""


class User(Base):
    """A user, of whom there are two million; the index for the newest first is (created_at, id)."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    name: Mapped[str]
    country: Mapped[str | None]
    created_at: Mapped[datetime]
    active: Mapped[bool]


class UserOut(BaseModel):
    """A user, as it is answered."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    email: str
    name: str
    country: str | None
    created_at: datetime
    active: bool


class Sessions:
    """The engine and the dependency that FastAPI's and SQLAlchemy's documentation have a team write."""

    def __init__(self, pool_size: int = POOL_SIZE, max_overflow: int = 0, poolclass: type[Pool] | None = None) -> None:
        url = DATABASE_URL.replace("postgresql://", "postgresql+asyncpg://")
        self.engine = create_async_engine(url, pool_size=pool_size, max_overflow=max_overflow, poolclass=poolclass)
        self.maker = async_sessionmaker(self.engine, expire_on_commit=False)

    async def get_db(self) -> AsyncIterator[AsyncSession]:
        """Yield a session that is rolled back on an error and closed after the response."""
        async with self.maker() as session:
            yield session


def constant_app(app: FastAPI) -> FastAPI:
    """Let an app answer user 4711 to everybody, as the databases of all runs hold it."""
    user = UserOut(
        id=4711,
        email="chen.lopez.4711@example.com",
        name="Chen Lopez",
        country="GB",
        created_at=datetime(2023, 2, 23, 4, 29, 22),
        active=False,
    )

    @app.get("/constant", response_model=UserOut)
    async def constant() -> UserOut:
        return user

    return app
