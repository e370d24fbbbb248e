"""What many tests share: a table, an app around it, and a client that looks at the first byte."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import sqlalchemy
import uvicorn
from fastapi import FastAPI
from sqlalchemy import ForeignKey, Select, create_engine, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from overdrive.instrumentation.events import Event, subscribed


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    # Deferred, so that a violation is found by COMMIT and not before.
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("items.id", deferrable=True, initially="DEFERRED"))


class Other(Base):
    __tablename__ = "others"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


SYNC_DRIVERS = {"postgresql+asyncpg": "postgresql+psycopg", "sqlite+aiosqlite": "sqlite"}


def outside(url: str) -> sqlalchemy.Engine:
    """An engine that Overdrive has never heard of: what another program sees."""
    target = make_url(url)
    # A transaction that a fault has left open must fail the next test, not stop it for ever.
    arguments = {} if "sqlite" in url else {"options": "-c lock_timeout=5s"}
    driver = SYNC_DRIVERS.get(target.drivername, target.drivername)
    return create_engine(target.set(drivername=driver), connect_args=arguments)


@contextmanager
def tables(url: str) -> Iterator[sqlalchemy.Engine]:
    engine = outside(url)
    try:
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)
        yield engine
    finally:
        engine.dispose()


def names(engine: sqlalchemy.Engine, statement: Select[Any] | None = None) -> list[str]:
    """The names of all items, as another program sees them now."""
    with engine.connect() as connection:
        return list(connection.scalars(statement if statement is not None else select(Item.name).order_by(Item.id)))


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    starts: int = 0
    error: BaseException | None = None


async def call(
    app: FastAPI,
    path: str,
    method: str = "GET",
    *,
    at_start: Callable[[], None] = lambda: None,
    spec_version: str = "2.4",
) -> Answer:
    """Send one request straight to the app, and call `at_start` at the moment the first byte would leave."""
    answer = Answer()
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            at_start()
            answer.starts += 1
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")

    try:
        await app(scope, receive, send)
    except Exception as error:
        answer.error = error
    return answer


@asynccontextmanager
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


@contextmanager
def on_uvicorn(app: FastAPI) -> Iterator[tuple[str, int]]:
    """Serve the app on a socket, in a thread; yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """Every event of the block."""
    events: list[Event] = []
    with subscribed(events.append):
        yield events


async def eventually(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Wait until `condition` holds; fail when it does not within a time that no machine needs."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{condition} did not come true within {seconds} s")
