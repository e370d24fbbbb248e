"""Pages through apps: the recipe, the bounds, the walk, and cursors that are not trusted (promises 7 and 8)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import product
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import httpx2
import pytest
from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import Engine, func, insert, select
from sqlalchemy.orm import Session, scoped_session
from support import Item, Other, client, tables

from overdrive import (
    BasePage,
    CountedCursorPage,
    CountedPage,
    CursorPage,
    CursorParams,
    Found,
    LimitOffsetPage,
    LimitOffsetParams,
    Overdrive,
    Page,
    PageError,
    PageParams,
    SessionDep,
    Settings,
    SyncSessionDep,
    cached,
    paginate,
)

T = TypeVar("T")

pytestmark = pytest.mark.anyio

ROWS = 23

#: Where the routes are, three times over.
PLACES = ["", "/router", "/mount"]


class ItemOut(BaseModel):
    id: int
    name: str


class Data(BasePage[T], Generic[T]):
    data: list[T]
    meta: dict[str, int | None]

    @classmethod
    def of(cls, found: Found) -> Self:
        return cls.model_construct(data=found.items, meta={"count": found.total, "page": found.page})


def routes(router: Any) -> None:
    @router.get("/items", response_model=Page[ItemOut])
    async def items(db: SessionDep, name: str | None = None) -> Any:
        return await paginate(db, filtered(name))

    @router.get("/window", response_model=LimitOffsetPage[ItemOut])
    async def window(db: SessionDep) -> Any:
        return await paginate(db, select(Item))

    @router.get("/sync-window")
    def sync_window(db: SyncSessionDep) -> LimitOffsetPage[ItemOut]:
        return paginate(db, select(Item))  # type: ignore[no-any-return]

    @router.get("/own-window", response_model=LimitOffsetPage[ItemOut])
    async def own_window(db: SessionDep, window: Annotated[LimitOffsetParams, Query()]) -> Any:
        return await paginate(db, select(Item), limit_offset=window)

    @router.get("/counted", response_model=CountedPage[ItemOut])
    async def counted(db: SessionDep, total: Literal["capped", "none"] = "capped") -> Any:
        return await paginate(db, select(Item), total=total)

    @router.get("/counted-own", response_model=CountedPage[ItemOut])
    def counted_own(db: SyncSessionDep, page: Annotated[PageParams, Depends()]) -> Any:
        return paginate(db, select(Item), page=page, total="estimated")

    @router.get("/counted-feed", response_model=CountedCursorPage[ItemOut])
    async def counted_feed(db: SessionDep, total: Literal["exact", "none"] = "exact") -> Any:
        return await paginate(db, select(Item), total=total)

    @router.get("/joined", response_model=Page[ItemOut])
    async def joined(db: SessionDep) -> Any:
        return await paginate(db, select(Item).join(Other, Other.id >= 0))

    @router.get("/joined-feed", response_model=CursorPage[ItemOut])
    async def joined_feed(db: SessionDep) -> Any:
        return await paginate(db, select(Item).join(Other, Other.id >= 0))

    @router.get("/list", response_model=Page[ItemOut])
    async def of_list() -> Any:
        return paginate([{"id": n, "name": "n"} for n in range(ROWS)])

    @router.get("/loud", response_model=Page[ItemOut])
    async def loud(db: SessionDep) -> Any:
        async def louder(items: list[Any]) -> list[Any]:
            return [{"id": item.id, "name": item.name.upper()} for item in items]

        return await paginate(db, select(Item), transform=louder)

    @router.get("/sync-loud", response_model=Page[ItemOut])
    def sync_loud(db: SyncSessionDep) -> Any:
        return paginate(db, select(Item), transform=lambda items: [{"id": i.id, "name": i.name.upper()} for i in items])

    @router.get("/enveloped", response_model=Data[ItemOut])
    async def enveloped(db: SessionDep) -> Any:
        return await paginate(db, select(Item))

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
            connection.execute(insert(Other), [{"name": "o"}] * 3)
        yield engine


@pytest.fixture
async def http(url: str, database: Engine) -> AsyncIterator[httpx2.AsyncClient]:
    app, overdrive = served(url)
    async with client(app) as http:
        yield http
    await overdrive.aclose()


async def test_page_by_number(http: httpx2.AsyncClient) -> None:
    for place, path in product(PLACES, ["/items", "/sync", "/own"]):
        answer = (await http.get(f"{place}{path}?page=3&size=10")).json()
        assert list(answer) == ["items", "total", "page", "size", "pages"], (place, path)
        assert [item["id"] for item in answer.pop("items")] == [21, 22, 23], (place, path)
        assert answer == {"total": ROWS, "page": 3, "size": 10, "pages": 3}, (place, path)


async def test_walk_forward_and_back_visits_every_row_once(http: httpx2.AsyncClient) -> None:
    for place, path in product(PLACES, ["/feed", "/sync-feed", "/own-feed"]):
        await walk_forward_and_back(http, place + path)


async def walk_forward_and_back(http: httpx2.AsyncClient, path: str) -> None:
    forward: list[list[int]] = []
    params: dict[str, Any] = {"size": 4}
    while True:
        page = (await http.get(path, params=params)).json()
        forward.append([item["id"] for item in page["items"]])
        assert len(forward) < ROWS
        if page["next_cursor"] is None:
            break
        # The size may change on the way.
        params = {"size": 4 + len(forward) % 2, "cursor": page["next_cursor"]}
    ids = [number for part in forward for number in part]
    assert sorted(ids) == list(range(1, ROWS + 1)), path
    assert list(page) == ["items", "next_cursor", "prev_cursor", "size"]

    back = list(reversed(forward[-1]))
    while page["prev_cursor"] is not None:
        page = (await http.get(path, params={"size": 3, "cursor": page["prev_cursor"]})).json()
        back += [item["id"] for item in reversed(page["items"])]
        assert len(back) <= ROWS
    assert back == ids[::-1], path


async def test_bad_numbers_are_422(http: httpx2.AsyncClient) -> None:
    queries = ["page=0", "page=-1", "size=0", "page=9223372036854775808", "size=x"]
    # One's own parameters have the bound of their class.
    for path, query in [*product(["/items", "/own"], queries), ("/items", "size=101"), ("/own", "size=10001")]:
        answer = await http.get(f"{path}?{query}")
        assert answer.status_code == 422, (path, query)
        assert answer.json()["detail"][0]["loc"] == ["query", query.partition("=")[0]], (path, query)


def test_no_integer_is_a_server_error(sqlite_url: str) -> None:
    with tables(sqlite_url), TestClient(served(sqlite_url)[0]) as http:

        @settings(max_examples=60, deadline=None)
        @given(page=st.integers(), size=st.integers(-2, 200))
        def check(page: int, size: int) -> None:
            answers = [http.get(path, params={"page": page, "size": size}) for path in ("/items", "/sync", "/own")]
            for answer in (*answers, http.get("/window", params={"offset": page, "limit": size})):
                assert answer.status_code in (200, 422) or answer.json()["code"] == "page_too_deep"

        check()


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


async def test_cursor_is_for_one_route_filter_and_order(http: httpx2.AsyncClient) -> None:
    cursor = await first_cursor(http, "/feed?size=2")
    assert (await http.get("/feed", params={"cursor": cursor})).status_code == 200
    for foreign, path in FOREIGN.items():
        answer = await http.get(path + f"&cursor={cursor}")
        assert (answer.status_code, answer.json().get("code")) == (400, "invalid_cursor"), foreign


async def test_damaged_cursor_is_a_coded_400(http: httpx2.AsyncClient) -> None:
    for place, damage in product(PLACES, ["", "x", "A" * 40, "é", "%00", "=" * 8, "A" * 4096]):
        answer = await http.get(f"{place}/feed?cursor={damage}")
        assert (answer.status_code, answer.json().get("code")) == (400, "invalid_cursor"), (place, damage)


async def test_truncated_cursor_is_a_coded_400(http: httpx2.AsyncClient) -> None:
    cursor = await first_cursor(http, "/feed?size=2")
    for length in range(len(cursor)):
        answer = await http.get("/feed", params={"cursor": cursor[:length]})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


async def test_cursor_that_is_too_long_is_a_coded_400(http: httpx2.AsyncClient) -> None:
    answer = await http.get("/feed?cursor=" + "A" * 4097)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        apps = [served(url, pagination={"secrets": secret} if secret else {}) for secret in (first, second)]
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


# Every style through the one call


async def test_page_by_limit_and_offset(http: httpx2.AsyncClient) -> None:
    for place, path in product(PLACES, ["/window", "/sync-window", "/own-window"]):
        answer = (await http.get(f"{place}{path}?limit=4&offset=21")).json()
        assert [item["id"] for item in answer.pop("items")] == [22, 23], (place, path)
        assert answer == {"total": ROWS, "limit": 4, "offset": 21}, (place, path)
        for wrong in ("offset=-1", "limit=0", f"offset={2**53}", "limit=10001"):
            assert (await http.get(f"{place}{path}?{wrong}")).status_code == 422, (place, path, wrong)


async def test_a_join_to_many_does_not_repeat_an_entity(http: httpx2.AsyncClient) -> None:
    for path in ("/joined", "/joined-feed"):
        answer = (await http.get(f"{path}?size=5")).json()
        assert [item["id"] for item in answer["items"]] == [1, 2, 3, 4, 5], path
        assert answer.get("total", ROWS) == ROWS


async def test_a_list_is_paginated(http: httpx2.AsyncClient) -> None:
    answer = await http.get("/list?page=3&size=10")
    assert [item["id"] for item in answer.json()["items"]] == [20, 21, 22]
    assert answer.json()["pages"] == 3
    assert 'rel="prev"' in answer.headers["link"]


@pytest.mark.parametrize("path", ["/loud", "/sync-loud"])
async def test_items_are_transformed_before_they_are_enveloped(http: httpx2.AsyncClient, path: str) -> None:
    assert (await http.get(f"{path}?size=2")).json()["items"] == [{"id": 1, "name": "N0"}, {"id": 2, "name": "N1"}]


async def test_an_envelope_of_ones_own(http: httpx2.AsyncClient) -> None:
    answer = (await http.get("/enveloped?page=12&size=2")).json()
    assert answer == {"data": [{"id": 23, "name": "n2"}], "meta": {"count": ROWS, "page": 12}}


# Totals


async def test_a_client_may_choose_the_total_where_the_route_lets_it(http: httpx2.AsyncClient) -> None:
    capped = (await http.get("/counted?size=5")).json()
    assert list(capped) == ["items", "total", "total_kind", "page", "size", "pages", "has_more"]
    assert (capped["total"], capped["total_kind"], capped["pages"], capped["has_more"]) == (ROWS, "exact", 5, True)
    none = (await http.get("/counted?total=none&page=5&size=5")).json()
    assert (none["total"], none["total_kind"], none["pages"], none["has_more"]) == (None, "none", None, False)
    assert (await http.get("/counted?total=exact")).status_code == 422
    own = (await http.get("/counted-own?page=5&size=5")).json()
    assert (own["total"], own["total_kind"], len(own["items"])) == (ROWS, "exact", 3)
    # Its own parameters have the bound of their class alone.
    assert (await http.get("/counted-own?size=101")).status_code == 200


async def test_a_cursor_page_with_a_total(http: httpx2.AsyncClient) -> None:
    answer = (await http.get("/counted-feed?size=5")).json()
    assert list(answer) == ["items", "total", "total_kind", "next_cursor", "prev_cursor", "size"]
    second = (await http.get("/counted-feed", params={"size": 5, "cursor": answer["next_cursor"]})).json()
    assert [(page["total"], page["total_kind"]) for page in (answer, second)] == [(ROWS, "exact")] * 2
    whole = (await http.get("/counted-feed?size=50")).json()
    assert (whole["total"], whole["next_cursor"]) == (ROWS, None)
    none = (await http.get("/counted-feed?size=50&total=none")).json()
    assert (none["total"], none["total_kind"]) == (None, "none")


@pytest.fixture
def session(sqlite_url: str) -> Iterator[Session]:
    with tables(sqlite_url) as engine, Session(engine) as session:
        session.add_all([Item(name=f"n{n % 5}") for n in range(ROWS)])
        session.flush()
        yield session


def test_outside_of_a_request_the_envelope_follows_from_what_is_asked(session: Session) -> None:
    stmt = select(Item)
    assert type(paginate(session, stmt, page=PageParams())) is Page
    assert type(paginate(session, stmt, page=PageParams(), total="capped")) is CountedPage
    assert type(paginate(session, stmt, limit_offset=LimitOffsetParams())) is LimitOffsetPage
    assert type(paginate(session, stmt, cursor=CursorParams())) is CursorPage
    assert paginate(session, stmt, cursor=CursorParams(size=5), total="capped").total == ROWS
    assert paginate((1, 2, 3), page=PageParams(size=2)).items == [1, 2]
    assert paginate(session, stmt, page=PageParams(), count_query=select(func.count(Item.id))).total == ROWS


MISUSES: list[tuple[Any, str]] = [
    (lambda db: paginate(db, select(Item)), "response_model=Page"),
    (lambda db: paginate(db, page=PageParams()), "needs a statement"),
    (lambda db: paginate(db, db.query(Item), page=PageParams()), "of a Query pass its `statement`"),
    (lambda db: paginate(db, Item, page=PageParams()), r"paginate\(db, select\(User\)\)"),
    (lambda db: paginate(db, "SELECT 1", cursor=CursorParams()), r"of SQL text\(...\).columns"),
    (lambda db: paginate(db, select(Item), page=PageParams(), cursor=CursorParams()), "one of"),
    (lambda db: paginate(db, select(Item), limit_offset=LimitOffsetParams(), total="none"), "CountedPage"),
    (lambda db: paginate(db, select(Item), page=PageParams(), total="none", count_query=select(1)), "leave out one"),
    (lambda db: paginate([1], select(Item), page=PageParams()), "a list of rows"),
    (lambda db: paginate("rows", page=PageParams()), "a list of rows"),
    (lambda db: paginate(scoped_session(lambda: db), select(Item), page=PageParams()), "session itself"),
    (lambda db: paginate([1], cursor=CursorParams()), "no order keys"),
    (lambda db: paginate([1], page=PageParams(), transform=_coroutine), "plain one"),
]


async def _coroutine(items: list[Any]) -> list[Any]:
    return items


@pytest.mark.parametrize(("call", "fix"), MISUSES)
def test_misuse_names_the_fix(session: Session, call: Any, fix: str) -> None:
    with pytest.raises(PageError, match=fix):
        call(session)


def test_what_the_declared_envelope_cannot_say_names_the_fix(session: Session) -> None:
    app = FastAPI()
    Overdrive(app, database_url="sqlite+aiosqlite://")
    raised: list[PageError] = []

    def refused(path: str, **options: Any) -> None:
        @app.get(path, response_model=Page[ItemOut])
        async def endpoint() -> Any:
            with pytest.raises(PageError) as caught:
                paginate(session, select(Item), **options)
            raised.append(caught.value)
            return paginate([])

    refused("/capped", total="capped")
    refused("/cursor", cursor=CursorParams())
    with TestClient(app) as http:
        assert http.get("/capped").status_code == http.get("/cursor").status_code == 200
    assert "declare CountedPage[...]" in str(raised[0])
    assert "declare CursorPage" in str(raised[1])


# Depth


async def test_too_deep_is_a_coded_400(url: str, database: Engine) -> None:
    app, overdrive = served(url, pagination={"max_offset": 20})
    async with client(app) as http:
        for place in PLACES:
            for path in ("/items?size=10&page=4", "/own?size=10&page=4", "/window?offset=21", "/own-window?offset=21"):
                answer = await http.get(place + path)
                assert (answer.status_code, answer.json()["code"]) == (400, "page_too_deep")
                assert "cursors" in answer.json()["detail"]
        deepest = await http.get("/items?size=10&page=3")
        assert len(deepest.json()["items"]) == 3
        assert 'rel="last"' in deepest.headers["link"]
        assert 'rel="last"' not in (await http.get("/window?offset=19&limit=1")).headers["link"]
    await overdrive.aclose()


# Links


def links(answer: Any) -> dict[str, str]:
    return {rel: link["url"] for rel, link in answer.links.items()}


async def test_links_lead_through_all_pages(http: httpx2.AsyncClient) -> None:
    paths = ["/items", "/sync", "/window", "/feed", "/counted-feed?total=none", "/own"]
    for place, path in product(["", "/mount"], paths):
        await follow_links(http, place + path)


async def follow_links(http: httpx2.AsyncClient, path: str) -> None:
    size = "limit" if "window" in path else "size"
    answer = await http.get(f"{path}{'&' if '?' in path else '?'}{size}=7")
    first = links(answer)["first"]
    seen: list[int] = []
    while True:
        seen += [item["id"] for item in answer.json()["items"]]
        assert links(answer)["first"] == first
        assert len(seen) <= ROWS
        if "next" not in links(answer):
            break
        answer = await http.get(links(answer)["next"])
    assert sorted(seen) == list(range(1, ROWS + 1)), path
    back = await http.get(links(answer)["prev"])
    assert [item["id"] for item in back.json()["items"]] == seen[14:21]
    assert (await http.get(first)).json()["items"] == (await http.get(path)).json()["items"][:7]


@pytest.mark.parametrize(
    ("root", "path", "public"),
    [
        ("", "/items", "/items"),
        ("/api", "/items", "/api/items"),
        ("/api", "/api/items", "/api/items"),
        ("/api/", "/router/items", "/api/router/items"),
        ("/api", "/api/mount/items", "/api/mount/items"),
        ("/it", "/items", "/it/items"),
    ],
)
async def test_links_are_right_behind_a_proxy(sqlite_url: str, root: str, path: str, public: str) -> None:
    with tables(sqlite_url):
        app, overdrive = served(sqlite_url)
        transport = httpx2.ASGITransport(app, root_path=root)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
            answer = await http.get(f"{path}?name=n%201&name=x")
        assert links(answer)["first"] == f"{public}?name=n+1&name=x&page=1"
        await overdrive.aclose()


async def test_links_survive_the_cache_and_head(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url, cache=True)

    @app.api_route("/items", methods=["GET", "HEAD"], response_model=Page[ItemOut])
    @cached
    async def items(db: SessionDep) -> Any:
        return await paginate(db, select(Item))

    async with client(app) as http:
        answers = [await http.get("/items?size=9") for _ in range(2)]
        assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit"]
        head = await http.head("/items?size=9")
        assert {str(links(answer)) for answer in (*answers, head)} == {str(links(answers[0]))}
        assert set(links(head)) == {"first", "next", "last"}
    await overdrive.aclose()


async def test_links_can_be_switched_off_and_are_not_guessed(url: str, database: Engine) -> None:
    app, overdrive = served(url, pagination={"link_header": False})
    async with client(app) as http:
        assert "link" not in (await http.get("/items")).headers
    await overdrive.aclose()

    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    @app.get("/items", response_model=Page[ItemOut])
    async def items(db: SessionDep, p: int = 1) -> Any:
        return await paginate(db, select(Item), page=PageParams(page=p, size=5))

    async with client(app) as http:
        assert "link" not in (await http.get("/items?p=2")).headers
    await overdrive.aclose()


def test_page_routes_and_no_others_document_what_they_refuse(sqlite_url: str) -> None:
    app, _ = served(sqlite_url)

    @app.get("/plain")
    async def plain(q: int = 0) -> int:
        return q

    @app.get("/taken", response_model=Page[ItemOut], responses={400: {"description": "Mine"}})
    async def taken() -> Any:
        return paginate([])

    paths = app.openapi()["paths"]

    def refusal(path: str) -> Any:
        return paths[path]["get"]["responses"].get("400")

    def code(path: str) -> Any:
        schema = refusal(path)["content"]["application/json"]["schema"]
        return schema["properties"]["code"]["examples"][0]

    assert refusal("/plain") is None
    assert refusal("/taken") == {"description": "Mine"}
    for place in ("", "/router"):
        assert code(f"{place}/items") == code(f"{place}/own") == code(f"{place}/window") == "page_too_deep"
        assert code(f"{place}/feed") == "invalid_cursor"
        assert [each["name"] for each in paths[f"{place}/own-window"]["get"]["parameters"]] == ["limit", "offset"]
        assert [each["name"] for each in paths[f"{place}/counted-own"]["get"]["parameters"]] == ["page", "size"]
    assert app.openapi() == app.openapi()
    assert list(app.openapi()["components"]["schemas"]["LimitOffsetPage_ItemOut_"]["properties"]) == [
        "items",
        "total",
        "limit",
        "offset",
    ]
