"""Where a hit is answered, what its client has already, and one execution for all who ask at once."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx2
import pytest
from cache.service import Service, serve
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match
from support import Item, client, recorded

from overdrive import CursorPage, Overdrive, SessionDep, Settings, cached, get_session, paginate
from overdrive.cache.key import Shortcuts
from overdrive.cache.redis import RedisStore
from overdrive.config import CacheSettings
from overdrive.installer import Installation
from overdrive.instrumentation.events import RequestEvent
from overdrive.middleware import RequestPath
from overdrive.testing import Clock, recorded_events

pytestmark = pytest.mark.anyio


async def add_one(db: AsyncSession) -> None:
    await db.execute(insert(Item).values(name="new"))


class Seen:
    """An ASGI middleware that counts what passes."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["app"].state.passed = getattr(scope["app"].state, "passed", 0) + 1
        await self.app(scope, receive, send)


@asynccontextmanager
async def with_middleware(url: str) -> AsyncIterator[tuple[FastAPI, httpx2.AsyncClient, list[str]]]:
    """An app with a middleware of its own, whose one endpoint says when it runs."""
    app, ran = FastAPI(), list[str]()
    app.add_middleware(Seen)
    overdrive = Overdrive(app, database_url=url, cache=True)

    @app.get("/one")
    @cached
    async def one() -> int:
        ran.append("one")
        return 1

    async with client(app) as http:
        yield app, http, ran
    await overdrive.aclose()


# Before routing


class Watching(BaseRoute):
    """A route that is never taken, and counts how often it was asked."""

    asked = 0

    def matches(self, scope: Any) -> tuple[Match, dict[str, Any]]:
        self.asked += 1
        return Match.NONE, {}


async def test_a_hit_is_answered_before_routing(sqlite_url: str) -> None:
    async with serve(sqlite_url) as service:
        assert await service.marks("/names") == ["miss"]
        service.app.router.routes.insert(0, router := Watching())
        assert await service.marks("/names") == ["hit"]
        assert (service.ran, router.asked) == (["/names"], 0)
        with recorded() as events:
            hit = await service.get()
        assert hit.headers["x-cache"] == "hit"
    [event] = [each for each in events if isinstance(each, RequestEvent)]
    assert (event.route, event.cache_status, event.status, event.bytes_sent) == ("/names", "hit", 200, len(hit.content))
    assert (event.request_id, event.outcome) == (hit.headers["x-request-id"], "ok")
    assert event.duration > 0


async def test_the_apps_middlewares_see_every_hit(sqlite_url: str) -> None:
    async with with_middleware(sqlite_url) as (app, http, ran):
        answers = [await http.get("/one") for _ in range(3)]
        assert [each.headers["x-cache"] for each in answers] == ["miss", "hit", "hit"]
        assert app.state.passed == 3
    assert ran == ["one"]


async def test_whoever_instruments_the_app_sees_every_hit(sqlite_url: str) -> None:
    app, seen = FastAPI(), list[int]()
    built = app.build_middleware_stack

    def instrumented() -> Any:
        inner = built()

        async def outer(scope: Any, receive: Any, send: Any) -> None:
            seen.append(1)
            await inner(scope, receive, send)

        return outer

    app.build_middleware_stack = instrumented  # type: ignore[method-assign]
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True)

    @app.get("/one")
    @cached
    async def one() -> int:
        return 1

    async with client(app) as http:
        assert [(await http.get("/one")).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
    assert len(seen) == 2
    await overdrive.aclose()


async def test_fastapis_telemetry_is_told_the_route_of_a_hit(service: Service) -> None:
    class Telemetry:
        route: str | None = None

    seen: list[Telemetry] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(Telemetry())
        scope["fastapi.telemetry"] = seen[-1]
        await service.app(scope, receive, send)

    async with client(app) as http:  # type: ignore[arg-type]
        assert [(await http.get("/names")).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
    assert seen[-1].route == "/names"


async def test_a_write_drops_it_for_the_next_request(service: Service) -> None:
    for number in range(3):
        assert await service.marks("/names", "/names") == ["miss", "hit"]
        assert await service.write(add_one) == 200
        assert len((await service.get()).json()) == 2 + number
        await service.overdrive.cache.clear()


async def test_it_expires(service: Service) -> None:
    clock = service.overdrive.cache.clock = Clock()
    assert await service.marks("/names", "/names") == ["miss", "hit"]
    clock.tick(61)
    assert await service.marks("/names") == ["miss"]


async def test_switched_off_it_is_not_answered(service: Service) -> None:
    assert await service.marks("/names", "/names") == ["miss", "hit"]
    service.overdrive.cache.enabled = False
    assert await service.marks("/names") == ["bypass"]


async def test_an_overridden_dependency_has_its_say(service: Service) -> None:
    assert await service.marks("/names", "/names") == ["miss", "hit"]

    async def own_session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(service.overdrive.engine) as session:
            yield session

    service.app.dependency_overrides[get_session] = own_session
    assert await service.marks("/names") == ["bypass"]


async def test_a_route_that_is_found_by_more_than_its_address_is_asked(service: Service) -> None:
    class ForTheBrave(APIRoute):
        def matches(self, scope: Any) -> tuple[Match, Any]:
            brave = (b"brave", b"yes") in scope["headers"]
            return super().matches(scope) if brave else (Match.NONE, {})

    router = APIRouter(route_class=ForTheBrave)

    @router.get("/den")
    @cached
    async def den() -> int:
        return 1

    service.app.include_router(router)
    answers = [await service.get("/den", headers={"brave": brave}) for brave in ("yes", "yes", "no")]
    assert [each.status_code for each in answers] == [200, 200, 404]


async def test_what_depends_on_anything_else_is_asked_first(service: Service) -> None:
    revoked = False

    async def allowed() -> None:
        if revoked:
            raise HTTPException(401)

    @service.app.get("/guarded", dependencies=[Depends(allowed)])
    @cached
    async def guarded() -> int:
        return 1

    assert await service.marks("/guarded", "/guarded") == ["miss", "hit"]
    revoked = True
    assert (await service.get("/guarded")).status_code == 401


async def test_parameters_nobody_declared_split_nothing(service: Service) -> None:
    @service.app.get("/echo")
    @cached
    async def echo(a: str = "", language: Annotated[str, Header(alias="accept-language")] = "") -> list[str]:
        return [a, language]

    assert await service.marks("/echo?a=1", "/echo?a=1&utm_source=x", "/echo?utm_source=y&a=1") == [
        "miss",
        "hit",
        "hit",
    ]
    assert await service.marks("/echo?a=2", "/echo?a=1&a=2") == ["miss", "miss"]
    for language, mark in (("de", "miss"), ("en", "miss"), ("de", "hit"), ("en", "hit")):
        answer = await service.get("/echo?a=1", headers={"Accept-Language": language})
        assert (answer.json(), answer.headers["x-cache"]) == (["1", language], mark)


async def test_the_address_of_a_page_is_all_of_its_key(service: Service) -> None:
    @service.app.get("/pages", response_model=CursorPage[int])
    @cached
    async def pages(db: SessionDep) -> Any:
        return await paginate(db, select(Item.id).order_by(Item.id))

    assert await service.marks("/pages?size=1", "/pages?size=1", "/pages?size=1&x=2") == ["miss", "hit", "miss"]
    assert "x=2" in (await service.get("/pages?size=1&x=2")).headers["link"]


def test_shortcuts_are_bounded() -> None:
    shortcuts: Shortcuts[int] = Shortcuts()

    def scope(query: bytes, path: str = "/", **headers: bytes) -> dict[str, Any]:
        pairs = [(b"host", b"h"), *((name.encode(), value) for name, value in headers.items())]
        return {"headers": pairs, "path": path, "query_string": query}

    long = b"x" * 5_000
    for each in (scope(long), scope(b"", long.decode()), scope(b"", told=long)):
        shortcuts.add(each, None, ["told"], 1)
        assert shortcuts.find(each, None) is None
    shortcuts.add(scope(b"", other=long), None, ["told"], 1)
    assert shortcuts.find(scope(b"", other=long), None) == 1
    shortcuts = Shortcuts()
    for number in range(Shortcuts._MOST + 1):
        shortcuts.add(scope(b"%d" % number), None, (), number)
    assert shortcuts.find(scope(b"%d" % Shortcuts._MOST), None) == Shortcuts._MOST
    assert shortcuts.find(scope(b"0"), None) is None


# What the client has already


async def test_a_client_that_has_it_is_told_so(service: Service) -> None:
    miss = await service.get()
    etag = miss.headers["etag"]
    assert etag.startswith('"')
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = await service.get(headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b"")
        assert (answer.headers["etag"], answer.headers["cache-control"]) == (etag, "no-cache")
        assert not {"content-length", "content-type"} & answer.headers.keys()
        assert answer.headers["x-cache"] == "hit"
    for unknown in ('"other"', "nonsense", etag.strip('"')):
        assert (await service.get(headers={"If-None-Match": unknown})).status_code == 200


async def test_also_where_the_answer_was_made_anew(service: Service) -> None:
    etag = (await service.get()).headers["etag"]
    await service.overdrive.cache.clear()
    answer = await service.get(headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content, answer.headers["x-cache"]) == (304, b"", "miss")
    assert (await service.get()).content == b'["first"]'
    assert await service.write(add_one) == 200
    assert (await service.get(headers={"If-None-Match": etag})).status_code == 200


async def test_every_worker_gives_the_same_tag(service: Service, sqlite_url: str) -> None:
    first = (await service.get()).headers["etag"]
    async with serve(sqlite_url) as other:
        assert (await other.get()).headers["etag"] == first


async def test_an_endpoints_own_tag_is_kept(service: Service) -> None:
    @service.app.get("/own")
    @cached
    async def own(response: Response) -> int:
        response.headers["etag"] = 'W/"mine"'
        return 1

    assert [(await service.get("/own")).headers["etag"] for _ in range(2)] == ['W/"mine"'] * 2
    assert (await service.get("/own", headers={"If-None-Match": '"mine"'})).status_code == 304


async def test_a_stream_is_passed_on_piece_by_piece(service: Service) -> None:
    made: list[int] = []

    @service.app.get("/stream")
    @cached
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            for number in range(3):
                made.append(number)
                yield b"%d" % number

        return StreamingResponse(pieces())

    sent: list[tuple[str, int]] = []

    async def send(message: Any) -> None:
        sent.append((message["type"], len(made)))

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {
        "type": "http", "method": "GET", "path": "/stream", "raw_path": b"/stream", "query_string": b"",
        "root_path": "", "headers": [], "http_version": "1.1", "scheme": "http", "asgi": {"spec_version": "2.4"},
    }  # fmt: skip
    await service.app(scope, receive, send)
    assert sent[:3] == [("http.response.start", 0), ("http.response.body", 1), ("http.response.body", 2)]


# All who ask at once


class Held:
    """An endpoint that waits, and counts how often it runs."""

    def __init__(self, service: Service, answer: Callable[[], Any] = lambda: PlainTextResponse("answer")) -> None:
        self.runs, self.opened, self.reached = 0, asyncio.Event(), asyncio.Event()

        @service.app.get("/held")
        @cached
        async def held() -> Any:
            self.runs += 1
            self.leader = asyncio.current_task()
            self.reached.set()
            await self.opened.wait()
            return answer()


async def crowd(service: Service, held: Held, number: int = 20) -> list[asyncio.Task[httpx2.Response]]:
    """Requests that all wait."""
    tasks = [asyncio.create_task(service.get("/held")) for _ in range(number)]
    await asyncio.wait_for(held.reached.wait(), 10)
    await asyncio.sleep(0.1)
    return tasks


@pytest.mark.parametrize("seen_before", [True, False])
async def test_one_execution_answers_all(service: Service, seen_before: bool) -> None:
    held = Held(service)
    if seen_before:
        held.opened.set()
        await service.get("/held")
        await service.overdrive.cache.clear()
        held.opened.clear()
        held.reached.clear()
        held.runs = 0
    tasks = await crowd(service, held)
    held.opened.set()
    answers = await asyncio.gather(*tasks)
    assert held.runs == 1
    assert {(each.status_code, each.text) for each in answers} == {(200, "answer")}
    marks = sorted(each.headers["cache-status"] for each in answers)
    assert marks.count("overdrive; fwd=uri-miss; collapsed") == 19


async def test_whoever_is_cancelled_hands_over(service: Service) -> None:
    held = Held(service)
    leader = asyncio.create_task(service.get("/held"))
    await asyncio.wait_for(held.reached.wait(), 10)
    tasks = await crowd(service, held)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    await asyncio.sleep(0.1)
    held.opened.set()
    answers = await asyncio.gather(*tasks)
    assert held.runs == 2
    assert {each.text for each in answers} == {"answer"}


async def test_those_who_wait_may_leave(service: Service) -> None:
    held = Held(service)
    tasks = await crowd(service, held)
    for task in [task for task in tasks if task is not held.leader][:9]:
        task.cancel()
    held.opened.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert held.runs == 1
    assert [isinstance(each, asyncio.CancelledError) for each in answers].count(True) == 9


async def test_an_error_is_everybodys(service: Service) -> None:
    def broken() -> Any:
        raise RuntimeError("broken")

    held = Held(service, broken)
    tasks = await crowd(service, held)
    held.opened.set()
    answers = await asyncio.gather(*tasks)
    assert held.runs == 1
    assert {each.status_code for each in answers} == {500}
    assert (await service.get("/held")).status_code == 500
    assert held.runs == 2


async def test_what_is_not_for_others_each_makes_alone(service: Service) -> None:
    def with_cookie() -> Response:
        response = PlainTextResponse("answer")
        response.set_cookie("session", "mine")
        return response

    held = Held(service, with_cookie)
    tasks = await crowd(service, held)
    held.opened.set()
    answers = await asyncio.gather(*tasks)
    assert held.runs == 20
    assert all("session" in each.cookies for each in answers)


async def test_nobody_joins_what_began_before_a_write(service: Service) -> None:
    opened, reached = asyncio.Event(), asyncio.Event()

    @service.app.get("/slow")
    @cached
    async def slow(db: SessionDep) -> list[str]:
        service.ran.append("/slow")
        names = list(await db.scalars(select(Item.name).order_by(Item.id)))
        reached.set()
        await opened.wait()
        return names

    before = [asyncio.create_task(service.get("/slow")) for _ in range(3)]
    await asyncio.wait_for(reached.wait(), 10)
    assert await service.write(add_one) == 200
    after = [asyncio.create_task(service.get("/slow")) for _ in range(3)]
    await asyncio.sleep(0.1)
    opened.set()
    assert [each.json() for each in await asyncio.gather(*before)] == [["first"]] * 3
    assert [each.json() for each in await asyncio.gather(*after)] == [["first", "new"]] * 3
    assert service.ran == ["/slow"] * 2


async def test_a_client_that_takes_its_time_keeps_nobody_waiting(service: Service) -> None:
    held = Held(service)
    taken, stalled = asyncio.Event(), asyncio.Event()

    async def slow(message: Any) -> None:
        if message["type"] == "http.response.body":
            stalled.set()
            await taken.wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {
        "type": "http", "method": "GET", "path": "/held", "raw_path": b"/held", "query_string": b"",
        "root_path": "", "headers": [(b"host", b"test")], "http_version": "1.1", "scheme": "http",
        "asgi": {"spec_version": "2.4"},
    }  # fmt: skip
    leader = asyncio.create_task(service.app(scope, receive, slow))
    await asyncio.wait_for(held.reached.wait(), 10)
    tasks = await crowd(service, held, 3)
    held.opened.set()
    await asyncio.wait_for(stalled.wait(), 10)
    assert {each.text for each in await asyncio.wait_for(asyncio.gather(*tasks), 5)} == {"answer"}
    taken.set()
    await leader
    assert held.runs == 1


async def test_patience_ends(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.flight._PATIENCE", 0.05)
    held = Held(service)
    tasks = await crowd(service, held, 3)
    assert held.runs == 3
    held.opened.set()
    assert {each.text for each in await asyncio.gather(*tasks)} == {"answer"}


# What stands before FastAPI's own call


def counting(calls: list[str]) -> Any:
    """FastAPI's `__call__`, as something that measures would replace it."""
    call = FastAPI.__call__

    async def counted(self: FastAPI, scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope["path"])
        await call(self, scope, receive, send)

    return counted


def small(app: FastAPI, settings: Settings | None = None) -> FastAPI:
    Overdrive(app, cache=True, settings=settings)

    @app.get("/")
    @cached
    async def one() -> int:
        return 1

    return app


async def marks(app: FastAPI) -> list[str]:
    async with client(app) as http:
        return [(await http.get("/")).headers["x-cache"] for _ in range(3)]


async def test_a_hit_is_answered_before_fastapi_is_asked() -> None:
    app = small(FastAPI())
    assert await marks(app) == ["miss", "hit", "hit"]
    assert (isinstance(app, FastAPI), type(app).__name__, type(app).__module__) == (
        True,
        "FastAPI",
        "fastapi.applications",
    )
    assert type(app) is not FastAPI


async def test_a_patched_fastapi_is_asked_on_every_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(FastAPI, "__call__", counting(calls))
    assert await marks(small(FastAPI())) == ["miss", "hit", "hit"]
    assert calls == ["/"] * 3


async def test_a_request_is_counted_once_whoever_stands_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    app = small(FastAPI())
    overdrive = Installation.of(app).runtime
    assert overdrive is not None
    await marks(app)
    monkeypatch.setattr("overdrive.installer._LOOK_INTERVAL", 0)
    monkeypatch.setattr(FastAPI, "__call__", counting([]))
    await marks(app)
    counts = overdrive.cache.statistics()["GET /"]
    assert (counts["misses"], counts["at_once"]) == (1, 5)


@pytest.fixture
def elsewhere(redis_url: str) -> Settings:
    """Settings with which each hit asks Redis."""
    return Settings.load(redis_url=redis_url, cache=CacheSettings(max_bytes=0))


def store_of(app: FastAPI) -> RedisStore:
    overdrive = Installation.of(app).runtime
    assert overdrive is not None
    assert isinstance(overdrive.cache.store, RedisStore)
    return overdrive.cache.store


async def test_a_store_elsewhere_is_asked_once_before_fastapi(
    elsewhere: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, calls = small(FastAPI(), elsewhere), list[str]()
    served = RequestPath.__call__

    async def noted(self: RequestPath, scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope["path"])
        await served(self, scope, receive, send)

    monkeypatch.setattr(RequestPath, "__call__", noted)
    async with client(app) as http:

        async def trips(mark: str) -> int:
            before = store_of(app).trips
            assert (await http.get("/")).headers["x-cache"] == mark
            return store_of(app).trips - before

        await trips("miss")
        assert ([await trips("hit") for _ in range(3)], len(calls)) == ([1, 1, 1], 1)
        await store_of(app).clear()
        # What was found is not asked for again: the lease is taken with another look, then come versions, entry, lease.
        assert await trips("miss") == 1 + 2 + 3
    await store_of(app).aclose()


async def test_a_request_that_is_cancelled_while_the_store_is_asked_has_its_event(
    elsewhere: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, asked = small(FastAPI(), elsewhere), asyncio.Event()
    await marks(app)

    async def silent(*_: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(RedisStore, "load", silent)
    async with client(app) as http:
        with recorded_events() as events:
            request = asyncio.ensure_future(http.get("/"))
            await asyncio.wait_for(asked.wait(), 10)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
    assert [(event.path, event.outcome) for event in events if isinstance(event, RequestEvent)] == [("/", "cancelled")]
    await store_of(app).aclose()


async def test_what_patches_fastapi_later_is_asked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.installer._LOOK_INTERVAL", 0)
    app = small(FastAPI())
    assert await marks(app) == ["miss", "hit", "hit"]
    calls: list[str] = []
    monkeypatch.setattr(FastAPI, "__call__", counting(calls))
    assert await marks(app) == ["hit"] * 3
    assert calls == ["/"] * 3


async def test_a_patched_starlette_is_asked_on_every_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    call = Starlette.__call__

    @functools.wraps(call)
    async def counted(self: Any, scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope["path"])
        await call(self, scope, receive, send)

    monkeypatch.setattr(Starlette, "__call__", counted)
    assert await marks(small(FastAPI())) == ["miss", "hit", "hit"]
    assert calls == ["/"] * 3


async def test_a_class_of_the_teams_is_asked_on_every_hit() -> None:
    calls: list[str] = []

    class Own(FastAPI):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            calls.append(scope["path"])
            await super().__call__(scope, receive, send)

    assert await marks(small(Own())) == ["miss", "hit", "hit"]
    assert calls == ["/"] * 3


async def test_an_apps_middleware_is_asked_on_every_hit() -> None:
    calls: list[str] = []
    app = small(FastAPI())

    class Counts:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            calls.append(scope["path"])
            await self.app(scope, receive, send)

    app.add_middleware(Counts)
    assert await marks(app) == ["miss", "hit", "hit"]
    assert calls == ["/"] * 3


async def test_telemetry_that_comes_later_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.installer._LOOK_INTERVAL", 0)
    app = small(FastAPI())
    assert await marks(app) == ["miss", "hit", "hit"]
    asked: list[bool] = []
    telemetry: Any = app._native_telemetry  # type: ignore[attr-defined]
    monkeypatch.setattr(telemetry, "enabled", lambda: asked.append(True) or False)
    assert await marks(app) == ["hit"] * 3
    assert len(asked) == 3
    passed: list[str] = []
    monkeypatch.setattr(telemetry, "enabled", lambda: True)

    async def measured(**values: Any) -> None:
        passed.append(values["scope"]["path"])
        await values["app"](values["scope"], values["receive"], values["send"])

    monkeypatch.setattr(type(telemetry), "__call__", lambda _self, **values: measured(**values))
    assert await marks(app) == ["hit"] * 3
    assert passed == ["/"] * 3
