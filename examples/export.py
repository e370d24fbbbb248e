"""Orders as a file: CSV for a spreadsheet, or NDJSON for a program.

`uvicorn examples.export:app`, then http://127.0.0.1:8000/orders?kind=csv, or
`curl -N http://127.0.0.1:8000/orders | head -3`, which stops the reading of the other rows.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Literal

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from overdrive import Overdrive, SessionFactoryDep, stream


class Base(DeclarativeBase):
    """The metadata of all tables."""


class Order(Base):
    """An order; `total` is in cents."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    total: Mapped[int]
    placed_at: Mapped[datetime]


class OrderOut(BaseModel):
    """What a client sees of an order."""

    id: int
    customer: str
    total: int
    placed_at: datetime


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the table anew."""
    async with overdrive.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        first = datetime(2026, 1, 1)
        rows = [
            {
                "customer": f"Customer {n % 97}",
                "total": n,
                "placed_at": first + timedelta(minutes=n // 3),
            }
            for n in range(100_000)
        ]
        await connection.execute(insert(Order), rows)
    yield


app = FastAPI(lifespan=lifespan)
overdrive = Overdrive(app, database_url="sqlite:///export.sqlite")


@app.get("/orders")
async def export_orders(sessions: SessionFactoryDep, kind: Literal["ndjson", "csv"] = "ndjson") -> StreamingResponse:
    """Send all orders, the latest first."""
    newest_first = select(Order).order_by(Order.placed_at.desc())
    return stream(sessions, newest_first, OrderOut, format=kind, filename=f"orders.{kind}")
