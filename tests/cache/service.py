"""An app with a table to read and ways to write it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import sqlalchemy
from fastapi import FastAPI
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item, Other, client, tables

from overdrive import Overdrive, SessionDep, Settings, cached

Work = Callable[[AsyncSession], Awaitable[Any]]


@dataclass
class Service:
    """An app with a cached route `/names`, a `/write` that does `work`, and whatever routes a test adds."""

    app: FastAPI
    overdrive: Overdrive
    http: httpx2.AsyncClient
    database: sqlalchemy.Engine
    #: The paths whose endpoints have run.
    ran: list[str] = field(default_factory=list)

    async def get(self, path: str = "/names", **options: Any) -> httpx2.Response:
        return await self.http.get(path, **options)

    async def marks(self, *paths: str, **options: Any) -> list[str | None]:
        """The `X-Cache` of each path, asked for in turn."""
        return [(await self.get(path, **options)).headers.get("x-cache") for path in paths]

    async def write(self, work: Work, path: str = "/write") -> int:
        self.app.state.work = work
        return (await self.http.post(path)).status_code


def add_routes(service: Service) -> None:
    app = service.app

    @app.get("/names")
    @cached
    async def names(db: SessionDep) -> list[str]:
        service.ran.append("/names")
        return list(await db.scalars(select(Item.name).order_by(Item.id)))

    @app.post("/write")
    async def write(db: SessionDep) -> None:
        await app.state.work(db)


@asynccontextmanager
async def serve(
    url: str, redis_url: str | None = None, max_bytes: int | None = None, **cache: Any
) -> AsyncIterator[Service]:
    with tables(url) as database:
        with database.begin() as connection:
            connection.execute(insert(Item).values(name="first"))
            connection.execute(insert(Other).values(name="other"))
        app = FastAPI()
        settings = Settings.load(database_url=url, redis_url=redis_url, cache={"max_bytes": max_bytes, **cache})
        overdrive = Overdrive(app, settings=settings, cache=True)
        async with client(app) as http:
            service = Service(app, overdrive, http, database)
            add_routes(service)
            yield service
        await overdrive.aclose()
