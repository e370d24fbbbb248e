"""Installing into FastAPI: every less documented name has a canary here, and a check that switches its part off."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import fastapi.dependencies.utils
import fastapi.routing
import fastapi_pagination
import pytest
from cache.conftest import patient as patient
from fastapi import APIRouter, Depends, FastAPI, Request, Response, WebSocket
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from fastapi_pagination.ext.sqlalchemy import apaginate
from pydantic import BaseModel
from sqlalchemy import Engine, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.routing import compile_path
from support import Item, call, client, tables

from overdrive import (
    ConfigurationError,
    Overdrive,
    Page,
    PageError,
    SessionDep,
    add_pagination,
    cached,
    caching,
    installer,
    paginate,
)
from overdrive.caching import check_replaced_call
from overdrive.installer import Installation, Served, _finder
from overdrive.routes import check_added_dependency, check_walk, page_style, sites, works

pytestmark = pytest.mark.anyio

CHECKS = [check_walk, check_added_dependency, check_replaced_call]


class ItemOut(BaseModel):
    id: int
    name: str


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Engine]:
    with tables(sqlite_url) as engine:
        with engine.begin() as connection:
            connection.execute(insert(Item), [{"name": f"n{n}"} for n in range(7)])
        yield engine


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    works.cache_clear()
    yield
    works.cache_clear()


def add_items(router: Any, path: str = "/items") -> None:
    @router.get(path, response_model=Page[ItemOut])
    @cached
    async def items(db: SessionDep) -> Any:
        return await paginate(db, select(Item))


# The canaries


@pytest.mark.parametrize("check", CHECKS)
def test_this_fastapi_is_the_one_overdrive_is_made_for(check: Callable[[], None]) -> None:
    check()


BREAKAGES = {
    "iter_route_contexts is gone": (fastapi.routing, "iter_route_contexts", check_walk),
    "get_parameterless_sub_dependant is gone": (
        fastapi.dependencies.utils,
        "get_parameterless_sub_dependant",
        check_added_dependency,
    ),
    "an endpoint is not what it was": (caching, "_answered_from_cache", check_replaced_call),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
async def test_a_changed_fastapi_costs_one_part_and_one_error(
    sqlite_url: str,
    database: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    breakage: str,
) -> None:
    module, name, check = BREAKAGES[breakage]
    monkeypatch.delattr(module, name)
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True)
    add_items(app)
    add_items(app, "/more")

    @app.post("/")
    async def add(db: SessionDep, name: str) -> None:
        db.add(Item(name=name))

    async with client(app) as http:
        for _ in range(2):
            # What needs no such name goes on: sessions, their commit, and every other route.
            assert (await http.post("/?name=x")).status_code == 200
            paged = await http.get("/items")
            assert paged.headers.get("x-cache") in (None, "miss")
            assert paged.status_code == (200 if check is check_replaced_call else 500)
    [error] = [record for record in caplog.records if record.levelno == logging.ERROR and record.name == "overdrive"]
    assert "goes without one part" in error.getMessage()
    assert (check.__doc__ or "").split(":")[0] in error.getMessage()
    await overdrive.aclose()


# Where routes are found


class Timed(APIRoute):
    """A route class as teams write them."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def timed(request: Request) -> Response:
            response: Response = await handler(request)
            response.headers["x-timed"] = "yes"
            return response

        return timed


async def test_every_kind_of_route_is_found(sqlite_url: str, database: Engine) -> None:
    app, timed, inner, outer, mounted = FastAPI(), APIRouter(route_class=Timed), APIRouter(), APIRouter(), FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True)
    for router in (app, timed, inner, mounted):
        add_items(router)
    outer.include_router(inner, prefix="/inner")
    app.include_router(timed, prefix="/timed")
    app.include_router(outer, prefix="/once")
    app.include_router(outer, prefix="/twice")
    app.mount("/mounted", mounted)
    expected = ["/items", "/timed/items", "/once/inner/items", "/twice/inner/items", "/mounted/items"]
    assert [site.template for site in sites(app)] == expected
    async with client(app) as http:
        for path in expected:
            for mark in ("miss", "hit"):
                answer = await http.get(f"{path}?size=2&page=2")
                assert [item["id"] for item in answer.json()["items"]] == [3, 4], path
                assert answer.headers["x-cache"] == mark
        assert (await http.get("/timed/items")).headers["x-timed"] == "yes"
    await overdrive.aclose()


def undecided(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as teams write them: a plain function around whatever there is."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Endpoint:
    """An object that is called and awaited."""

    __name__ = "endpoint"

    async def __call__(self, db: SessionDep) -> list[str]:
        return list(await db.scalars(select(Item.name)))


async def function(db: SessionDep) -> list[str]:
    return list(await db.scalars(select(Item.name)))


@pytest.mark.parametrize(
    "endpoint",
    [undecided(function), Endpoint(), functools.partial(function)],
    ids=["a decorated function", "an object", "a partial"],
)
async def test_whatever_is_awaited_may_be_an_endpoint(sqlite_url: str, database: Engine, endpoint: Any) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True)
    app.add_api_route("/", cached(endpoint), name="endpoint")
    async with client(app) as http:
        first, second = await http.get("/"), await http.get("/")
    assert first.json() == second.json() == [f"n{n}" for n in range(7)]
    assert (first.headers["x-cache"], second.headers["x-cache"]) == ("miss", "hit")
    await overdrive.aclose()


def test_routes_of_a_lifespan_are_found(sqlite_url: str, database: Engine) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        add_items(app)
        yield

    app = FastAPI(lifespan=lifespan)
    Overdrive(app, database_url=sqlite_url)
    with TestClient(app) as http:
        assert http.get("/items?size=3").json()["pages"] == 3


def test_routes_of_a_lifespan_are_found_where_the_openapi_document_was_made_before(
    sqlite_url: str, database: Engine
) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        add_items(app, "/late")
        yield

    app = FastAPI(lifespan=lifespan)
    Overdrive(app, database_url=sqlite_url, cache=True)
    add_items(app)
    assert queries(app.openapi(), "/items") == ["page", "size"]
    with TestClient(app) as http:
        assert http.get("/late?size=3").json()["pages"] == 3
        # What was prepared for the document is not prepared again.
        assert [http.get("/items?size=3").headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
        document = http.get("/openapi.json").json()
        assert queries(document, "/items") == queries(document, "/late") == ["page", "size"]


def queries(document: dict[str, Any], path: str) -> list[str]:
    return [parameter["name"] for parameter in document["paths"][path]["get"]["parameters"]]


def test_each_route_is_prepared_once(sqlite_url: str) -> None:
    app, router, mounted = FastAPI(), APIRouter(), FastAPI()
    Overdrive(app, database_url=sqlite_url, cache=True)
    for each in (app, router, mounted):
        add_items(each)
    app.include_router(router, prefix="/included")
    app.mount("/mounted", mounted)
    for _ in range(2):
        app.openapi()
        with TestClient(app):
            pass
    # The session, the page, the cache.
    assert [len(site.route.dependant.dependencies) for site in sites(app)] == [3, 3, 3]


def test_mounted_app_documents_its_pages_once(sqlite_url: str, database: Engine) -> None:
    app, mounted = FastAPI(), FastAPI()
    Overdrive(app, database_url=sqlite_url)
    add_pagination(mounted)
    add_items(mounted)
    app.mount("/mounted", mounted)
    with TestClient(app) as http:
        assert queries(http.get("/mounted/openapi.json").json(), "/items") == ["page", "size"]
        assert http.get("/mounted/items?size=3").json()["pages"] == 3


@pytest.mark.parametrize("outer_first", [True, False])
def test_mounted_app_with_an_overdrive_of_its_own_is_left_to_it(
    sqlite_url: str, database: Engine, outer_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app, mounted = FastAPI(), FastAPI()
    apps = (app, mounted) if outer_first else (mounted, app)
    overdrives = {each: Overdrive(each, database_url=sqlite_url, cache=True) for each in apps}
    add_items(mounted)
    app.mount("/mounted", mounted)
    with TestClient(app) as http:
        assert queries(http.get("/mounted/openapi.json").json(), "/items") == ["page", "size"]
        assert [http.get("/mounted/items").headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
        assert http.portal is not None
        # Nobody runs the lifespan of a mounted app.
        http.portal.call(overdrives[mounted].aclose)
    assert not caplog.messages


def test_websocket_declares_no_page() -> None:
    app = FastAPI()

    @app.websocket("/ws")
    async def talk(socket: WebSocket) -> None: ...

    assert [(site.name, page_style(site)) for site in sites(app)] == [("WEBSOCKET /ws", None)]


async def test_route_added_after_the_start_is_told_so(sqlite_url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url)
    await call(app, "/")
    add_items(app)
    answer = await call(app, "/items")
    assert isinstance(answer.error, PageError)
    await overdrive.aclose()


def test_under_the_test_client_again_and_again(url: str) -> None:
    """Each time in an event loop of its own."""
    with tables(url) as database:
        with database.begin() as connection:
            connection.execute(insert(Item), [{"name": "x"}])
        app = FastAPI()
        Overdrive(app, database_url=url)
        add_items(app)
        for _ in range(3):
            with TestClient(app) as http:
                assert http.get("/items").json()["total"] == 1


# A connection whose event loop is gone can be left behind, not closed; Python says so. When aiosqlite's is collected,
# its thread reports to whatever loop there is, which here may be gone as well.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_under_the_test_client_without_a_lifespan(url: str) -> None:
    """Each request in an event loop of its own."""
    with tables(url) as database:
        with database.begin() as connection:
            connection.execute(insert(Item), [{"name": "x"}])
        app = FastAPI()
        overdrive = Overdrive(app, database_url=url)
        add_items(app)
        for _ in range(3):
            assert TestClient(app).get("/items").json()["total"] == 1
        http = TestClient(app)
        assert [http.get("/items").json()["total"] for _ in range(3)] == [1, 1, 1]
        overdrive.engine.sync_engine.dispose(close=False)
        gc.collect()


async def test_without_overdrive_pages_are_read_from_the_teams_own_async_session(
    sqlite_url: str, database: Engine
) -> None:
    engine = create_async_engine(sqlite_url)

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session

    app = FastAPI()

    async def items(db: Any) -> Any:
        return await paginate(db, select(Item))

    items.__annotations__["db"] = Annotated[AsyncSession, Depends(get_db)]
    app.add_api_route("/items", items, response_model=Page[ItemOut])
    add_pagination(app)
    async with client(app) as http:
        answer = (await http.get("/items?page=3&size=3")).json()
        assert answer == {"items": [{"id": 7, "name": "n6"}], "total": 7, "page": 3, "size": 3, "pages": 3}
        assert (await http.get("/items?size=101")).status_code == 422
    await engine.dispose()


# Beside another service


async def test_services_of_two_databases_share_a_redis_and_no_entries(
    sqlite_url: str, database: Engine, tmp_path: Path, redis_url: str
) -> None:
    other_url = f"sqlite+aiosqlite:///{tmp_path / 'other.sqlite'}"
    totals: dict[str, list[tuple[int, str]]] = {}
    with tables(other_url):
        for url in (sqlite_url, other_url):
            app = FastAPI()
            overdrive = Overdrive(app, database_url=url, redis_url=redis_url, cache=True)
            add_items(app)
            async with client(app) as http:
                answers = [await http.get("/items") for _ in range(2)]
            totals[url] = [(answer.json()["total"], answer.headers["x-cache"]) for answer in answers]
            await overdrive.aclose()
    assert totals == {sqlite_url: [(7, "miss"), (7, "hit")], other_url: [(0, "miss"), (0, "hit")]}


def test_a_new_password_is_no_other_database(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(installer, "cache_route", lambda *arguments: seen.append(arguments[3]))
    for password in ("old", "new"):
        app = FastAPI()
        Overdrive(app, database_url=f"postgresql+asyncpg://user:{password}@host/name", cache=True)
        add_items(app)
        app.openapi()
    assert seen == ["postgresql+asyncpg://user:***@host/name"] * 2


# Beside fastapi-pagination


@pytest.mark.parametrize("theirs_first", [True, False])
def test_beside_fastapi_pagination(sqlite_url: str, database: Engine, theirs_first: bool) -> None:
    app, router = FastAPI(), APIRouter()
    Overdrive(app, database_url=sqlite_url)
    if theirs_first:
        fastapi_pagination.add_pagination(app)
    for each in (app, router):
        add_items(each)

        @each.get("/theirs", response_model=fastapi_pagination.Page[ItemOut])
        async def theirs(db: SessionDep) -> Any:
            return await apaginate(db, select(Item).order_by(Item.id))

    app.include_router(router, prefix="/included")
    if not theirs_first:
        fastapi_pagination.add_pagination(app)
    add_pagination(app)
    with TestClient(app) as http:
        for place in ("", "/included"):
            assert http.get(f"{place}/items?size=2").json()["pages"] == 4
            answer = http.get(f"{place}/theirs?size=2&page=2").json()
            assert [item["id"] for item in answer["items"]] == [3, 4]
            assert (answer["total"], answer["page"], answer["pages"]) == (7, 2, 4)


# Where Overdrive stands


class Named:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


class Other(Named):
    pass


def test_layers(sqlite_url: str) -> None:
    app = FastAPI()
    app.add_middleware(Named)
    overdrive = Overdrive(app, database_url=sqlite_url)
    app.add_middleware(Other)
    layers = overdrive.layers()
    assert layers[0] == "Observer"
    assert layers[-1] == "APIRouter"
    assert layers.index("Other") < layers.index("Named") < layers.index("RequestPath")
    between = layers[layers.index("Named") + 1 : layers.index("APIRouter")]
    assert between[0] == "RequestPath"


def test_one_overdrive_an_app_and_before_its_first_request(sqlite_url: str) -> None:
    app = FastAPI()
    Overdrive(app, database_url=sqlite_url)
    with pytest.raises(ConfigurationError, match="an Overdrive already"):
        Overdrive(app, database_url=sqlite_url)

    serving = FastAPI()
    TestClient(serving).get("/")
    with pytest.raises(ConfigurationError, match="before the app serves its first request"):
        Overdrive(serving, database_url=sqlite_url)

    paginated = add_pagination(FastAPI())
    TestClient(paginated).get("/")
    with pytest.raises(ConfigurationError, match="before the app serves its first request"):
        Overdrive(paginated, database_url=sqlite_url)
    assert add_pagination(paginated) is paginated

    router: Any = APIRouter()
    with pytest.raises(ConfigurationError, match="takes the FastAPI app, not APIRouter"):
        add_pagination(router)


def test_installation_is_one_an_app() -> None:
    app = FastAPI()
    assert Installation.of(app) is Installation.of(app)
    assert add_pagination(app) is app


def test_one_expression_finds_the_route_that_is_first() -> None:
    templates = ["/a/new", "/a/{x:int}", "/a/{x}", "/a/{x}/b", "/a/{x:path}", "/{y:uuid}", "/a.c", "/{z}"]
    served = [Served(each, compile_path(each)[0], frozenset({"GET"}), False, object()) for each in templates]
    find = _finder(served)
    paths = ["/a/new", "/a/7", "/a/-7", "/a/x", "/a/7/b", "/a/7/b/c", "/a/", "/a.c", "/abc", "/", "/a/x\n", ""]
    for path in [*paths, "/6ba7b810-9dad-11d1-80b4-00c04fd430c8"]:
        assert find(path) is next((route for route in served if route.addresses.fullmatch(path)), None)
