"""An export of two million rows, in the memory of one batch."""

from __future__ import annotations

import asyncio
from typing import Any

import psutil
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy import select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from support import outside

from overdrive import Overdrive, SessionFactoryDep, stream

pytestmark = pytest.mark.anyio

ROWS = 2_000_000
#: Bytes the process may grow by while it sends some 600 MB.
GROWTH = 20_000_000


class Base(DeclarativeBase):
    pass


class Reading(Base):
    __tablename__ = "soak_readings"

    id: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[int]
    note: Mapped[str]


class ReadingOut(BaseModel):
    id: int
    day: int
    note: str


async def test_two_million_rows_take_the_memory_of_one_batch(postgres_database: str) -> None:
    engine = outside(postgres_database)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO soak_readings (id, day, note) "
                f"SELECT n, n % 365, repeat('x', 280) FROM generate_series(1, {ROWS}) n"
            )
        )
        connection.execute(text("CREATE INDEX ON soak_readings (day, id)"))
    engine.dispose()

    app = FastAPI()
    overdrive = Overdrive(app, database_url=postgres_database)

    @app.get("/export")
    async def export(sessions: SessionFactoryDep) -> StreamingResponse:
        return stream(sessions, select(Reading).order_by(Reading.day), ReadingOut, format="csv")

    process = psutil.Process()
    rows = before = most = 0

    async def send(message: Any) -> None:
        nonlocal rows, before, most
        rows += message.get("body", b"").count(b"\n")
        memory = process.memory_info().rss
        before = before or memory
        most = max(most, memory)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/export",
        "raw_path": b"/export",
        "query_string": b"",
        "root_path": "",
        "headers": [],
    }
    await app(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]
    await overdrive.aclose()
    assert rows == ROWS + 1
    assert most - before < GROWTH
