"""The names and shapes of fastapi-pagination, beside the original.

FastAPI reads the annotations here at run time, so this module does not postpone them.
"""

import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fastapi_pagination
import fastapi_pagination.cursor
import fastapi_pagination.ext.sqlalchemy
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel
from sqlalchemy import create_engine, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from support import Item, tables

from overdrive.compat import fastapi_pagination as compat

ROWS = 7


class Theirs:
    Page, Params = fastapi_pagination.Page, fastapi_pagination.Params
    LimitOffsetPage, LimitOffsetParams = fastapi_pagination.LimitOffsetPage, fastapi_pagination.LimitOffsetParams
    CursorPage, CursorParams = fastapi_pagination.cursor.CursorPage, fastapi_pagination.cursor.CursorParams
    add_pagination = staticmethod(fastapi_pagination.add_pagination)
    paginate = staticmethod(fastapi_pagination.ext.sqlalchemy.paginate)
    apaginate = staticmethod(fastapi_pagination.ext.sqlalchemy.apaginate)
    # It would warn of the extensions it might have been called from.
    of_sequence = staticmethod(partial(fastapi_pagination.paginate, safe=True))


class Ours(Theirs):
    Page, Params = compat.Page, compat.Params
    LimitOffsetPage, LimitOffsetParams = compat.LimitOffsetPage, compat.LimitOffsetParams
    CursorPage, CursorParams = compat.CursorPage, compat.CursorParams
    add_pagination = staticmethod(compat.add_pagination)
    paginate = staticmethod(compat.paginate)
    apaginate = staticmethod(compat.apaginate)
    of_sequence = staticmethod(compat.paginate)


class ItemOut(BaseModel):
    id: int
    name: str


def service(library: Any, url: str) -> FastAPI:
    """The same service, with either library."""
    app = FastAPI()
    engine = create_async_engine(url, poolclass=NullPool)
    plain_url = url.replace("postgresql+asyncpg", "postgresql+psycopg").replace("+aiosqlite", "")
    sync_engine = create_engine(plain_url, poolclass=NullPool)
    items = select(Item).order_by(Item.id)

    @app.get("/page", response_model=library.Page[ItemOut])
    async def page() -> Any:
        async with AsyncSession(engine) as db:
            return await library.apaginate(
                db, items, transformer=lambda rows: [ItemOut(id=r.id, name=r.name) for r in rows]
            )

    @app.get("/sync", response_model=library.LimitOffsetPage[ItemOut])
    def sync() -> Any:
        with Session(sync_engine) as db:
            return library.paginate(db, items)

    @app.get("/params", response_model=library.Page[ItemOut])
    def with_params(params: library.Params = Depends()) -> Any:  # noqa: B008
        with Session(sync_engine) as db:
            return library.paginate(db, items, params)

    @app.get("/sequence", response_model=library.Page[int])
    def sequence() -> Any:
        return library.of_sequence(range(ROWS))

    @app.get("/sequence-params", response_model=library.LimitOffsetPage[int])
    def sequence_params(params: library.LimitOffsetParams = Depends()) -> Any:  # noqa: B008
        return library.of_sequence(list(range(ROWS)), params)

    @app.get("/feed", response_model=library.CursorPage[ItemOut])
    async def feed() -> Any:
        async with AsyncSession(engine) as db:
            return await library.apaginate(db, items)

    library.add_pagination(app)
    return app


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    url = request.getfixturevalue(f"{request.param}_url")
    with tables(url) as engine:
        with engine.begin() as connection:
            connection.execute(insert(Item), [{"name": f"n{n}"} for n in range(ROWS)])
        yield url


QUERIES = [
    "/page",
    "/page?page=2&size=3",
    "/page?page=9",
    "/sync?limit=2&offset=3",
    "/params?page=2&size=4",
    "/sequence?page=2&size=4",
    "/sequence-params?offset=5&limit=1",
]


def test_the_bodies_are_the_same(database: str) -> None:
    with TestClient(service(Theirs, database)) as theirs, TestClient(service(Ours, database)) as ours:
        for query in QUERIES:
            expected, answer = theirs.get(query), ours.get(query)
            assert expected.status_code == answer.status_code == 200
            assert list(answer.json()) == list(expected.json())
            assert answer.json() == expected.json()
        for query in ("/page?page=0", "/page?size=101", "/params?size=101", "/sequence-params?limit=101"):
            assert (theirs.get(query).status_code, ours.get(query).status_code) == (422, 422)


def test_cursors_have_the_same_keys_and_each_library_its_own(database: str) -> None:
    with TestClient(service(Theirs, database)) as theirs, TestClient(service(Ours, database)) as ours:
        expected, answer = theirs.get("/feed?size=3").json(), ours.get("/feed?size=3").json()
        assert list(answer) == list(expected)
        assert (answer["items"], answer["total"]) == (expected["items"], expected["total"])
        second = ours.get("/feed", params={"size": 3, "cursor": answer["next_page"]}).json()
        assert [item["id"] for item in second["items"]] == [4, 5, 6]
        assert second["current_page"] == answer["next_page"]
        assert (
            ours.get("/feed", params={"size": 3, "cursor": second["previous_page"]}).json()["items"] == answer["items"]
        )
        foreign = ours.get("/feed", params={"cursor": expected["next_page"]})
        assert (foreign.status_code, foreign.json()["code"]) == (400, "invalid_cursor")


def test_fastapi_pagination_is_not_needed() -> None:
    tree = ast.parse(Path(compat.__file__).read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(module.startswith("fastapi_pagination") for module in modules)
    assert {name for name in vars(Ours) if not name.startswith("_")} - {"of_sequence"} <= set(compat.__all__)
