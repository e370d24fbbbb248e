"""Pages through apps: the recipe, the bounds, the walk, and cursors that are not trusted (promises 7 and 8)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, Query
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import Engine, insert, select
from support import Item, client, tables

from overdrive import (
    CursorPage,
    CursorParams,
    Overdrive,
    Page,
    PageParams,
    SessionDep,
    Settings,
    SyncSessionDep,
    paginate,
)

pytestmark = pytest.mark.anyio

ROWS = 23


class ItemOut(BaseModel):
    id: int
    name: str


def routes(router: Any) -> None:
    @router.get("/items", response_model=Page[ItemOut])
    async def items(db: SessionDep, name: str | None = None) -> Any:
        return await paginate(db, filtered(name))

    @router.get("/feed", response_model=CursorPage[ItemOut])
    async def feed(db: SessionDep, name: str | None = None, newest: bool = True) -> Any:
        order = Item.name.desc() if newest else Item.name
        return await paginate(db, filtered(name).order_by(order))

    @router.get("/other-feed", response_model=CursorPage[ItemOut])
    async def other_feed(db: SessionDep) -> Any:
        return await paginate(db, select(Item).order_by(Item.name.desc()))

    @router.get("/sync", response_model=Page[ItemOut])
    def sync(db: SyncSessionDep) -> Any:
        return paginate(db, select(Item))

    @router.get("/sync-feed")
    def sync_feed(db: SyncSessionDep) -> CursorPage[ItemOut]:
        return paginate(db, select(Item))  # type: ignore[no-any-return]

    @router.get("/own", response_model=Page[ItemOut])
    async def own(db: SessionDep, page: Annotated[PageParams, Query()]) -> Any:
        return await paginate(db, select(Item), page=page)

    @router.get("/own-feed", response_model=CursorPage[ItemOut])
    async def own_feed(db: SessionDep, cursor: Annotated[CursorParams, Query()]) -> Any:
        return await paginate(db, select(Item), cursor=cursor)


def filtered(name: str | None) -> Any:
    statement = select(Item)
    return statement if name is None else statement.where(Item.name == name)


def served(url: str, **options: Any) -> tuple[FastAPI, Overdrive]:
    app, router, mounted = FastAPI(), APIRouter(), FastAPI()
    overdrive = Overdrive(app, settings=Settings(database_url=url, **options))
    for each in (app, router, mounted):
        routes(each)
    app.include_router(router, prefix="/router")
    app.mount("/mount", mounted)
    return app, overdrive


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    with tables(url) as engine:
        with engine.begin() as connection:
            connection.execute(insert(Item), [{"name": f"n{n % 5}"} for n in range(ROWS)])
        yield engine


@pytest.fixture
async def http(url: str, database: Engine) -> AsyncIterator[httpx2.AsyncClient]:
    app, overdrive = served(url)
    async with client(app) as http:
        yield http
    await overdrive.aclose()


@pytest.mark.parametrize("place", ["", "/router", "/mount"])
@pytest.mark.parametrize("path", ["/items", "/sync", "/own"])
async def test_page_by_number(http: httpx2.AsyncClient, place: str, path: str) -> None:
    answer = (await http.get(f"{place}{path}?page=3&size=10")).json()
    assert list(answer) == ["items", "total", "page", "size", "pages"]
    assert [item["id"] for item in answer.pop("items")] == [21, 22, 23]
    assert answer == {"total": ROWS, "page": 3, "size": 10, "pages": 3}


@pytest.mark.parametrize("place", ["", "/router", "/mount"])
@pytest.mark.parametrize("path", ["/feed", "/sync-feed", "/own-feed"])
async def test_walk_forward_and_back_visits_every_row_once(http: httpx2.AsyncClient, place: str, path: str) -> None:
    forward: list[list[int]] = []
    params: dict[str, Any] = {"size": 4}
    while True:
        page = (await http.get(place + path, params=params)).json()
        forward.append([item["id"] for item in page["items"]])
        assert len(forward) < ROWS
        if page["next_cursor"] is None:
            break
        # The size may change on the way.
        params = {"size": 4 + len(forward) % 2, "cursor": page["next_cursor"]}
    ids = [number for part in forward for number in part]
    assert sorted(ids) == list(range(1, ROWS + 1))
    assert list(page) == ["items", "next_cursor", "prev_cursor", "size"]

    back = list(reversed(forward[-1]))
    while page["prev_cursor"] is not None:
        page = (await http.get(place + path, params={"size": 3, "cursor": page["prev_cursor"]})).json()
        back += [item["id"] for item in reversed(page["items"])]
        assert len(back) <= ROWS
    assert back == ids[::-1]


@pytest.mark.parametrize("query", ["page=0", "page=-1", "size=0", "size=101", "page=9223372036854775808", "size=x"])
@pytest.mark.parametrize("path", ["/items", "/own"])
async def test_bad_numbers_are_422(http: httpx2.AsyncClient, path: str, query: str) -> None:
    if (path, query) == ("/own", "size=101"):
        query = "size=10001"  # one's own parameters have the bound of their class
    answer = await http.get(f"{path}?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", query.partition("=")[0]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(page=st.integers(), size=st.integers(-2, 200))
def test_no_integer_is_a_server_error(sqlite_url: str, page: int, size: int) -> None:
    with tables(sqlite_url):
        app, _ = served(sqlite_url)
        with TestClient(app) as http:
            for path in ("/items", "/sync", "/own"):
                answer = http.get(path, params={"page": page, "size": size})
                assert answer.status_code in (200, 422)


async def first_cursor(http: httpx2.AsyncClient, path: str) -> str:
    cursor = (await http.get(path)).json()["next_cursor"]
    assert isinstance(cursor, str)
    return cursor


FOREIGN = {
    "another route": "/other-feed?",
    "another filter": "/feed?name=n1",
    "another order": "/feed?newest=false",
    "a mounted twin": "/mount/feed?",
}


@pytest.mark.parametrize("foreign", FOREIGN)
async def test_cursor_is_for_one_route_filter_and_order(http: httpx2.AsyncClient, foreign: str) -> None:
    cursor = await first_cursor(http, "/feed?size=2")
    assert (await http.get("/feed", params={"cursor": cursor})).status_code == 200
    answer = await http.get(FOREIGN[foreign] + f"&cursor={cursor}")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


@pytest.mark.parametrize("place", ["", "/router", "/mount"])
@pytest.mark.parametrize("damage", ["", "x", "A" * 40, "é", "%00", "=" * 8, "A" * 4096])
async def test_damaged_cursor_is_a_coded_400(http: httpx2.AsyncClient, place: str, damage: str) -> None:
    answer = await http.get(f"{place}/feed?cursor={damage}")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


async def test_truncated_cursor_is_a_coded_400(http: httpx2.AsyncClient) -> None:
    cursor = await first_cursor(http, "/feed?size=2")
    for length in range(len(cursor)):
        answer = await http.get("/feed", params={"cursor": cursor[:length]})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


async def test_cursor_that_is_too_long_is_a_422(http: httpx2.AsyncClient) -> None:
    assert (await http.get("/feed?cursor=" + "A" * 4097)).status_code == 422


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_no_changed_cursor_is_accepted(http: httpx2.AsyncClient, data: st.DataObject) -> None:
    cursor = await first_cursor(http, "/feed?size=2")
    place = data.draw(st.integers(0, len(cursor) - 1))
    letter = data.draw(st.sampled_from("abcdefABCDEF0123456789-_"))
    changed = cursor[:place] + letter + cursor[place + 1 :]
    answer = await http.get("/feed", params={"size": 2, "cursor": changed})
    assert answer.status_code == (200 if changed == cursor else 400)


async def test_cursor_is_good_in_every_worker_that_has_the_secret(url: str, database: Engine) -> None:
    async def cross(first: Any, second: Any) -> int:
        apps = [served(url, pagination={"secret": secret} if secret else {}) for secret in (first, second)]
        async with client(apps[0][0]) as one, client(apps[1][0]) as two:
            answer = await two.get("/feed", params={"cursor": await first_cursor(one, "/feed?size=2")})
        for _, overdrive in apps:
            await overdrive.aclose()
        return answer.status_code

    assert await cross("s" * 32, "s" * 32) == 200
    assert await cross("s" * 32, "t" * 32) == 400
    assert await cross("s" * 32, None) == 400


async def test_sizes_are_what_the_settings_say(url: str, database: Engine) -> None:
    app, overdrive = served(url, pagination={"size": 3, "max_size": 7})
    async with client(app) as http:
        assert len((await http.get("/items")).json()["items"]) == 3
        assert len((await http.get("/feed?size=7")).json()["items"]) == 7
        assert (await http.get("/items?size=8")).status_code == 422
    await overdrive.aclose()


def test_openapi_has_the_parameters_and_their_bounds_before_any_request(sqlite_url: str) -> None:
    app, _ = served(sqlite_url)
    paths = app.openapi()["paths"]

    def parameters(path: str) -> dict[str, Any]:
        return {each["name"]: each["schema"] for each in paths[path]["get"]["parameters"]}

    for place in ("", "/router"):
        by_number = parameters(f"{place}/items")
        assert list(by_number) == ["name", "page", "size"]
        assert (by_number["page"]["minimum"], by_number["page"]["default"]) == (1, 1)
        assert (by_number["size"]["maximum"], by_number["size"]["default"]) == (100, 50)
        assert set(parameters(f"{place}/feed")) == {"name", "newest", "cursor", "size"}
        # Who takes the parameters gets no second set of them.
        assert [each["name"] for each in paths[f"{place}/own"]["get"]["parameters"]] == ["page", "size"]
    schema = app.openapi()["components"]["schemas"]["Page_ItemOut_"]
    assert list(schema["properties"]) == ["items", "total", "page", "size", "pages"]
