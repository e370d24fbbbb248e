"""Values of one's own functions, kept until they expire or what they read is written.

`uvicorn examples.values:app`, then http://127.0.0.1:8000/prices/100?currency=EUR and, for the rates to change,
`curl -X PUT 'http://127.0.0.1:8000/rates/EUR?rate=0.8'`
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import msgspec
from fastapi import FastAPI, Query
from sqlalchemy import func, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from overdrive import Overdrive, SessionDep


class Base(DeclarativeBase):
    """The metadata of all tables."""


class Rate(Base):
    """What one dollar is in another currency."""

    __tablename__ = "rates"

    currency: Mapped[str] = mapped_column(primary_key=True)
    rate: Mapped[float]


class Summary(msgspec.Struct):
    """How many rates there are, and the highest of them."""

    count: int
    highest: float


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the table anew."""
    async with overdrive.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Rate), [{"currency": "EUR", "rate": 0.9}, {"currency": "USD", "rate": 1.0}])
    yield


app = FastAPI(lifespan=lifespan)
overdrive = Overdrive(app, database_url="sqlite:///values.sqlite")


@overdrive.cache.memoize(ttl=600)
async def rate_of(currency: str) -> float | None:
    """Return a rate: one value is kept for each currency."""
    async with overdrive.session() as db:
        return await db.scalar(select(Rate.rate).where(Rate.currency == currency))


@app.get("/prices/{dollars}")
async def price(dollars: int, currency: str = "EUR") -> float | None:
    """Convert a price."""
    rate = await rate_of(currency)
    return None if rate is None else dollars * rate


@app.get("/summary")
async def summary() -> dict[str, float]:
    """Say something of all rates, kept under a key of one's own."""

    async def load() -> Summary:
        async with overdrive.session() as db:
            count, highest = (await db.execute(select(func.count(), func.max(Rate.rate)))).one()
            return Summary(count, highest)

    found: Summary = await overdrive.cache.get_or_set("summary", load, ttl=600, type=Summary)
    return {"count": found.count, "highest": found.highest}


@app.put("/rates/{currency}", status_code=204)
async def put_rate(currency: str, rate: Annotated[float, Query(gt=0, allow_inf_nan=False)], db: SessionDep) -> None:
    """Set a rate: the commit drops what was kept of it."""
    await db.merge(Rate(currency=currency, rate=rate))
