"""What runs a service: whom to answer first, for how long, what stands in, and what to look at.

`uvicorn examples.operations:app`, then

    curl -s http://127.0.0.1:8000/ready                            # 503 from SIGTERM on, and while the database is away
    curl -s http://127.0.0.1:8000/orders -X POST                   # the first to be answered past capacity
    curl -si -H 'x-timeout-ms: 200' http://127.0.0.1:8000/slow     # 503: its statement ends with its time
    curl -s http://127.0.0.1:8000/metrics | grep -e ^db_client -e ^overdrive_cache
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy import func, literal, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from overdrive import Overdrive, SessionDep, Settings, cached, health_router, priority


class Base(DeclarativeBase):
    """The metadata of all tables."""


class Order(Base):
    """What somebody has ordered."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the table anew."""
    async with overdrive.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    yield


settings = Settings.load(
    database_url="sqlite:///operations.sqlite",
    pool={"size": 5, "deadline": 10, "deadline_header": "x-timeout-ms"},
    admission={"max_wait": 0.5},
)
app = FastAPI(lifespan=lifespan)
overdrive = Overdrive(app, settings=settings)
app.include_router(health_router)
app.include_router(overdrive.metrics_router())


@app.post("/orders", status_code=201)
@priority("high")
async def place_order(db: SessionDep) -> int:
    """Place an order: of all that waits, this is answered first."""
    order = Order()
    db.add(order)
    await db.flush()
    return order.id


@app.get("/orders/count")
@priority("low")
@cached(ttl=1, stale_if_error=3600)
async def count_orders(db: SessionDep) -> int:
    """Count the orders; past capacity, or without a database, the last count stands in."""
    return await db.scalar(select(func.count()).select_from(Order)) or 0


@app.get("/slow")
async def slow(db: SessionDep) -> int:
    """Take longer than anybody has time for."""
    numbers = select(literal(1).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(select(numbers.c.n + 1).where(numbers.c.n < 100_000_000))
    return await db.scalar(select(func.count()).select_from(numbers)) or 0
