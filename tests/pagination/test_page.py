"""The envelopes and parameters, in a real FastAPI application."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

import pytest
from fastapi import FastAPI, Query
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from overdrive.pagination.page import CursorPage, CursorParams, Page, PageParams

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


@pytest.mark.parametrize("query", ["size=0", "size=10001", "cursor=" + "a" * 4097])
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
