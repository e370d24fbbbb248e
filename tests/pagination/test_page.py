"""The envelopes and parameters, in a real FastAPI application."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Self, TypeVar

import pytest
from fastapi import FastAPI, Query
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from overdrive.pagination.link import link_header
from overdrive.pagination.page import (
    BasePage,
    CountedPage,
    CursorPage,
    CursorParams,
    Found,
    LimitOffsetPage,
    LimitOffsetParams,
    Page,
    PageParams,
    Params,
    slice_of,
)

T = TypeVar("T")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    secret: Mapped[str]


class UserOut(BaseModel):
    id: int
    name: str


class Envelope(Page[T], Generic[T]):
    version: int = 1


def _rows(*selected: Any) -> list[Any]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(User(id=1, name="Ada", secret="x"))
        session.flush()
        rows = session.execute(select(*selected)).all()
        return [row[0] if len(row) == 1 else row for row in rows]


def _page(items: list[Any]) -> Page[Any]:
    return Page.model_construct(items=items, total=1, page=1, size=50, pages=1)


app = FastAPI()


@app.get("/users", response_model=Page[UserOut])
def users() -> Any:
    return _page(_rows(User))


@app.get("/rows")
def rows() -> Page[UserOut]:
    return _page(_rows(User.id, User.name, User.secret))


@app.get("/envelope", response_model=Envelope[UserOut])
def envelope() -> Any:
    return _page(_rows(User))


@app.get("/feed", response_model=CursorPage[UserOut])
def feed() -> Any:
    return CursorPage.model_construct(items=_rows(User), next_cursor=None, prev_cursor="x", size=50)


@app.get("/echo/page")
def echo_page(params: Annotated[PageParams, Query()]) -> dict[str, int]:
    return params.model_dump()


@app.get("/echo/cursor")
def echo_cursor(params: Annotated[CursorParams, Query()]) -> dict[str, Any]:
    return params.model_dump()


class Slim(BasePage[T], Generic[T]):
    items: list[T]
    has_more: bool


class Renamed(Page[T], Generic[T]):
    items: list[T] = Field(serialization_alias="data")


class Meta(BaseModel):
    total: int | None
    page: int | None


class Listing(BasePage[T], Generic[T]):
    data: list[T]
    meta: Meta

    @classmethod
    def of(cls, found: Found) -> Self:
        return cls.model_construct(data=found.items, meta=Meta(total=found.total, page=found.page))


class Users(Listing[UserOut]):
    """Without a parameter, the endpoint returns an instance of the response model itself."""


def own(path: str, model: type[BasePage[Any]]) -> None:
    @app.get(path, response_model=model)
    def endpoint() -> Any:
        return model.of(Found(_rows(User), PageParams(), False, 1, "exact"))


for number, model in enumerate([Slim[UserOut], Renamed[UserOut], Listing[UserOut], Users]):
    own(f"/own/{number}", model)

client = TestClient(app)
USER = {"id": 1, "name": "Ada"}
NUMBERS = {"total": 1, "page": 1, "size": 50, "pages": 1}


@pytest.mark.parametrize("path", ["/users", "/rows"])
def test_an_unparametrised_page_is_validated_by_the_response_model_from_attributes(path: str) -> None:
    assert client.get(path).json() == {"items": [USER], **NUMBERS}


def test_a_page_fills_an_envelope_that_is_derived_from_it() -> None:
    assert client.get("/envelope").json() == {"items": [USER], **NUMBERS, "version": 1}


def test_a_cursor_page_has_null_cursors_at_the_ends() -> None:
    assert client.get("/feed").json() == {
        "items": [USER],
        "next_cursor": None,
        "prev_cursor": "x",
        "size": 50,
    }


def test_the_envelope_tells_its_style() -> None:
    assert Page[UserOut].style == "page"
    assert Envelope[UserOut].style == "page"
    assert CursorPage.style == "cursor"


def test_parameters_have_defaults() -> None:
    assert client.get("/echo/page").json() == {"page": 1, "size": 50}
    assert client.get("/echo/cursor").json() == {"cursor": None, "size": 50}


@pytest.mark.parametrize(
    "query",
    [
        "page=0",
        "page=-1",
        f"page={2**31}",
        f"page={2**63}",
        "page=x",
        "size=0",
        "size=10001",
        f"size={2**70}",
    ],
)
def test_a_page_out_of_range_is_refused(query: str) -> None:
    assert client.get(f"/echo/page?{query}").status_code == 422


@pytest.mark.parametrize("query", ["size=0", "size=10001"])
def test_a_cursor_out_of_range_is_refused(query: str) -> None:
    assert client.get(f"/echo/cursor?{query}").status_code == 422


def test_no_offset_a_client_can_ask_for_overflows_a_database() -> None:
    params = PageParams(page=2**31 - 1, size=10_000)
    assert params.page * params.size < 2**63
    with pytest.raises(ValidationError):
        PageParams(page=2**31)


def test_parameters_are_documented() -> None:
    operations = client.get("/openapi.json").json()["paths"]
    for path in ("/echo/page", "/echo/cursor"):
        for parameter in operations[path]["get"]["parameters"]:
            assert parameter["schema"]["description"]
            assert parameter["schema"]["examples"]


def test_a_limit_and_an_offset_have_bounds() -> None:
    assert LimitOffsetParams(limit=10_000, offset=2**53 - 1).offset + 10_000 < 2**63
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"offset": -1}, {"offset": 2**53}):
        with pytest.raises(ValidationError):
            LimitOffsetParams.model_validate(wrong)


OWN = [
    {"items": [USER], "has_more": False},
    {"data": [USER], **NUMBERS},
    {"data": [USER], "meta": {"total": 1, "page": 1}},
    {"data": [USER], "meta": {"total": 1, "page": 1}},
]


@pytest.mark.parametrize("number", range(len(OWN)))
def test_an_envelope_of_ones_own_is_filled_and_its_items_are_validated(number: int) -> None:
    assert client.get(f"/own/{number}").json() == OWN[number]


def test_a_slice_knows_everything() -> None:
    found = slice_of(list("abcde"), PageParams(page=2, size=2))
    assert (found.items, found.total, found.pages, found.has_more) == (["c", "d"], 5, 3, True)
    assert LimitOffsetPage[str].of(slice_of("ab", LimitOffsetParams(offset=1))).model_dump() == {
        "items": ["b"],
        "total": 2,
        "limit": 50,
        "offset": 1,
    }
    assert slice_of([], PageParams()).pages == 0


def test_a_capped_total_counts_no_pages() -> None:
    found = Found([], PageParams(), True, 10_000, "capped")
    assert CountedPage[str].of(found).pages is None


# Links


def _links(params: Params, total: int | None = None, *, kind: Any = "exact", **found: Any) -> dict[str, str]:
    more = total is None or getattr(params, "offset", 0) + params.size < total
    value = link_header("/a", "", Found([], params, more, total, kind, **found), 1_000)
    links = dict(reversed(link.split("; ")) for link in value.split(", "))
    return {rel.removeprefix("rel=").strip('"'): target.strip("<>") for rel, target in links.items()}


def test_links_of_pages() -> None:
    assert _links(PageParams(page=2, size=10), 35) == {
        "first": "/a?page=1",
        "prev": "/a?page=1",
        "next": "/a?page=3",
        "last": "/a?page=4",
    }
    assert _links(PageParams(page=4, size=10), 40) == {
        "first": "/a?page=1",
        "prev": "/a?page=3",
        "last": "/a?page=4",
    }
    assert _links(PageParams(page=1, size=10), 0) == {"first": "/a?page=1", "last": "/a?page=1"}
    # From beyond the end the way back leads to the end.
    assert _links(PageParams(page=9, size=10), 35)["prev"] == "/a?page=4"
    assert set(_links(PageParams(page=2, size=10), 10_000, kind="capped")) == {"first", "prev", "next"}
    assert set(_links(PageParams(page=2, size=10))) == {"first", "prev", "next"}


def test_links_of_limit_and_offset() -> None:
    assert _links(LimitOffsetParams(limit=30, offset=20), 100) == {
        "first": "/a?offset=0",
        "prev": "/a?offset=0",
        "next": "/a?offset=50",
        "last": "/a?offset=90",
    }


def test_what_is_too_deep_is_not_named() -> None:
    assert set(_links(LimitOffsetParams(limit=10, offset=991), 5_000)) == {"first", "prev"}
    assert _links(LimitOffsetParams(limit=10, offset=990), 5_000)["next"] == "/a?offset=1000"


def test_links_of_cursors() -> None:
    assert _links(CursorParams(cursor="c"), next_cursor="n", prev_cursor="p") == {
        "first": "/a",
        "prev": "/a?cursor=p",
        "next": "/a?cursor=n",
        "last": "/a?cursor=last",
    }
    assert set(_links(CursorParams())) == {"first", "last"}


def test_links_keep_the_rest_of_the_query_and_cannot_be_broken_out_of() -> None:
    found = Found([], PageParams(), False)
    query = "q=a%20b%26%C3%A9%FF&q=&page=3&x=%3E;%20rel=%22next&y=>\u00e9&size=5"
    value = link_header("/\u00e4>/b c", query, found, 0)
    assert value == (
        '</%C3%A4%3E/b%20c?q=a+b%26%C3%A9%FF&q=&x=%3E%3B+rel%3D%22next&y=%3E%E9&size=5&page=1>; rel="first"'
    )
