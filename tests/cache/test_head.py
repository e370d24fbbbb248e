"""HEAD, answered by the GET of a cached route (RFC 9110, section 9.3.2)."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from cache.service import Service, add_routes, serve
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import insert
from support import Item, client, eventually, on_uvicorn, recorded

from overdrive import Overdrive, cached, declare
from overdrive.instrumentation.events import RequestEvent
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio

#: Headers that differ with every answer, or with how it came about.
OF_THE_REQUEST = {"x-request-id", "cache-status", "x-cache", "age", "date"}


def described(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in OF_THE_REQUEST}


async def test_a_head_is_its_get_without_the_body(service: Service) -> None:
    made = await service.http.head("/names")
    assert (made.status_code, made.content, made.headers["x-cache"]) == (200, b"", "miss")
    got = await service.get()
    assert (got.headers["x-cache"], service.ran) == ("hit", ["/names"])
    found = await service.http.head("/names")
    assert (found.status_code, found.content, found.headers["x-cache"]) == (200, b"", "hit")
    assert described(made) == described(got) == described(found)
    assert found.headers["content-length"] == str(len(got.content))
    unmodified = await service.http.head("/names", headers={"If-None-Match": got.headers["etag"]})
    assert (unmodified.status_code, unmodified.headers["etag"]) == (304, got.headers["etag"])


async def test_its_event_says_that_it_was_a_head(service: Service) -> None:
    for mark in ("miss", "hit"):
        with recorded() as events:
            await service.http.head("/names")
        [event] = [each for each in events if isinstance(each, RequestEvent)]
        assert (event.method, event.route, event.cache_status, event.bytes_sent) == ("HEAD", "/names", mark, 0)


async def test_a_write_outdates_it(service: Service) -> None:
    await service.http.head("/names")
    before = (await service.http.head("/names")).headers

    async def add(db: Any) -> None:
        await db.execute(insert(Item).values(name="new"))

    await service.write(add)
    after = (await service.http.head("/names")).headers
    assert after["x-cache"] == "miss"
    assert after["etag"] != before["etag"]


async def test_what_is_not_cached_stays_as_it_is(service: Service) -> None:
    app = service.app

    @app.get("/plain")
    async def plain() -> int:
        return 1

    # In the order of routes, the first that takes the GET would have answered it.
    @app.get("/things/me")
    async def me() -> int:
        return 1

    @app.get("/things/{name}")
    @cached
    async def thing(name: str) -> str:
        return name

    assert (await service.http.head("/plain")).status_code == 405
    assert (await service.http.head("/things/me")).status_code == 405
    assert (await service.http.head("/things/you")).status_code == 200
    assert (await service.http.head("/none")).status_code == 404
    assert (await service.http.head("/write")).status_code == 405


async def test_a_declared_head_is_kept(service: Service) -> None:
    @service.app.get("/own")
    @cached
    async def own() -> int:
        return 1

    @service.app.head("/own")
    async def own_head(response: Response) -> None:
        response.headers["x-own"] = "yes"

    await service.get("/own")
    assert (await service.http.head("/own")).headers["x-own"] == "yes"


async def test_errors_and_streams_have_no_body_either(service: Service) -> None:
    @service.app.get("/numbers/{number}")
    @cached
    async def numbers(number: int) -> StreamingResponse:
        return StreamingResponse(iter([b"1", b"2"]))

    for path, status in (("/numbers/x", 422), ("/numbers/1", 200)):
        answer = await service.http.head(path)
        assert (answer.status_code, answer.content) == (status, b"")


async def test_the_document_says_what_it_said() -> None:
    def build(app: FastAPI) -> dict[str, Any]:
        @app.get("/names")
        @cached(stale_while_revalidate=1)
        async def names() -> list[str]:
            return []

        @app.post("/search")
        @cached(body=True)
        async def search(query: dict[str, str]) -> int:
            return 1

        return app.openapi()

    app = FastAPI()
    Overdrive(app, database_url="sqlite+aiosqlite://", cache=True)
    assert build(app) == build(FastAPI())


async def test_mounted_and_included_routes(service: Service) -> None:
    inner = FastAPI()

    @inner.get("/in")
    @cached
    async def inside() -> int:
        return 1

    @inner.get("/out")
    async def outside() -> int:
        return 1

    service.app.mount("/mounted", inner)
    assert [(await service.http.head("/mounted/in")).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
    assert (await service.http.head("/mounted/out")).status_code == 405


async def test_an_expired_response_is_made_anew_as_a_get(service: Service) -> None:
    methods: list[str] = []

    def method(request: Request) -> None:
        methods.append(request.method)

    declare(method, ignore=True)

    @service.app.get("/one", dependencies=[Depends(method)])
    @cached(ttl=10, stale_while_revalidate=30)
    async def one() -> int:
        return 1

    clock = service.overdrive.cache.clock = Clock()
    await service.http.head("/one")
    clock.tick(11)
    stale = await service.http.head("/one")
    assert (stale.content, stale.headers["cache-status"]) == (b"", "overdrive; hit; ttl=-1; detail=stale")
    await eventually(lambda: not service.overdrive.cache.refreshes._tasks)
    assert methods == ["GET", "GET", "GET"]
    assert (await service.get("/one")).content == b"1"


def test_over_a_socket(sqlite_url: str) -> None:
    app = FastAPI()
    Overdrive(app, database_url=sqlite_url, cache=True)

    @app.get("/one")
    @cached
    async def one() -> list[int]:
        return list(range(1_000))

    with on_uvicorn(app) as (host, port), httpx2.Client(base_url=f"http://{host}:{port}") as http:
        heads = [http.head("/one") for _ in range(3)]
        got = http.get("/one", headers={"Accept-Encoding": "identity"})
        plain = http.head("/one", headers={"Accept-Encoding": "identity"})
        assert [each.headers["x-cache"] for each in heads] == ["miss", "hit", "hit"]
        assert all(each.content == b"" for each in heads)
        # The connection is at its place: what follows a HEAD is not taken for its body.
        assert got.json() == list(range(1_000))
        assert plain.headers["content-length"] == str(len(got.content))
        assert heads[1].headers["content-encoding"] == "gzip"
        unmodified = http.head("/one", headers={"If-None-Match": got.headers["etag"]})
        assert (unmodified.status_code, unmodified.content) == (304, b"")


async def test_a_route_of_another_worker_is_found_by_a_head(sqlite_url: str, redis_url: str) -> None:
    async with serve(sqlite_url, redis_url) as one:
        await one.get()
        app = FastAPI()
        overdrive = Overdrive(app, engine=one.overdrive.engine, redis_url=redis_url, cache=True)
        other = Service(app, overdrive, one.http, one.database)
        add_routes(other)
        async with client(app) as http:
            assert (await http.head("/names")).headers["x-cache"] == "hit"
        assert other.ran == []
        await overdrive.aclose()
