"""Users that clients sort, filter and search.

`uvicorn examples.listing:app`, then http://127.0.0.1:8000/docs, or
http://127.0.0.1:8000/users?sort=country,-created_at&country__in=DE,FR&created_at__gte=2024-01-02&q=a
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from overdrive import CursorPage, Listing, Overdrive, SessionDep, paginate


class Base(DeclarativeBase):
    """The metadata of all tables."""


class User(Base):
    """A user; `country` is an ISO 3166 code."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    country: Mapped[str | None]
    created_at: Mapped[datetime]


class UserOut(BaseModel):
    """What a client sees of a user."""

    id: int
    name: str
    country: str | None
    created_at: datetime


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the table anew."""
    async with overdrive.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        rows = [
            {"name": name, "country": country, "created_at": datetime(2024, 1, 1) + timedelta(days=day)}
            for day, (name, country) in enumerate([("Ada", "GB"), ("Carl", "DE"), ("Emmy", "DE"), ("Sophie", "FR")])
        ]
        await connection.execute(insert(User), rows)
    yield


app = FastAPI(lifespan=lifespan)
overdrive = Overdrive(app, database_url="sqlite:///listing.sqlite")

users = Listing(
    sort={"created_at": User.created_at, "name": User.name, "country": User.country.nulls_last()},
    default="-created_at",
    filters={"country": User.country, "created_at": User.created_at},
    search=[User.name],
)


@app.get("/users", response_model=CursorPage[UserOut])
async def list_users(db: SessionDep, listing: Annotated[Listing, Depends(users)]) -> Any:
    """Walk through the users, in the order and by the filters that the client asks for."""
    return await paginate(db, listing.apply(select(User)))
