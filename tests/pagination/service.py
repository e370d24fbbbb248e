"""An app with pages by cursor, for tests and soak."""

from __future__ import annotations

import os
from typing import Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel
from sqlalchemy import select
from support import Item

from overdrive import CursorPage, Overdrive, Page, SessionDep, Settings, paginate


class ItemOut(BaseModel):
    id: int
    name: str


def served(url: str, **pagination: Any) -> tuple[FastAPI, Overdrive]:
    """Return an app with two feeds, a filter and a sort, and what keeps its connections."""
    app = FastAPI()

    async def feed(db: SessionDep, response: Response, name: str | None = None, sort: Literal["a", "z"] = "a") -> Any:
        response.headers["x-pid"] = str(os.getpid())
        stmt = select(Item) if name is None else select(Item).where(Item.name == name)
        return await paginate(db, stmt.order_by(Item.name if sort == "a" else Item.name.desc(), Item.id))

    app.add_api_route("/feed", feed, response_model=CursorPage[ItemOut])
    app.add_api_route("/twin", feed, response_model=CursorPage[ItemOut])
    return app, Overdrive(app, settings=Settings(database_url=url, pagination=pagination))


def numbered(url: str) -> FastAPI:
    """Return an app without cursors."""
    app = FastAPI()

    @app.get("/items", response_model=Page[ItemOut])
    async def items(db: SessionDep) -> Any:
        return await paginate(db, select(Item))

    Overdrive(app, settings=Settings(database_url=url))
    return app


def workers() -> FastAPI:
    """Return the app for a server of its own: `uvicorn --factory`."""
    return served(os.environ["DATABASE_URL"])[0]
