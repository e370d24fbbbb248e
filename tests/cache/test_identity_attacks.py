"""No way to another's response past what a key says: rewritten requests, guards, look-alikes. Promise 2, over apps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import UUID

import httpx2
import pytest
from cache.service import Service
from fastapi import APIRouter, Cookie, Depends, FastAPI, Header, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, model_validator
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.routing import BaseRoute, Match
from support import client

from overdrive import ConfigurationError, Overdrive, cached, declare
from overdrive.endpoint import RequestSession

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(app: FastAPI, url: str, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    overdrive = Overdrive(app, database_url=url, cache=True, **options)
    async with client(app) as http:
        yield http
    await overdrive.aclose()


# Where the app changes the request on its way


class Rewriting:
    """An ASGI middleware that asks for something else than the client did, by who is asking."""

    def __init__(self, app: Any, rewrite: Callable[[dict[str, Any], str], None]) -> None:
        self.app, self.rewrite = app, rewrite

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope = dict(scope)
            self.rewrite(scope, dict(scope["headers"]).get(b"x-user", b"nobody").decode())
        await self.app(scope, receive, send)


def into_the_path(scope: dict[str, Any], user: str) -> None:
    scope["path"] = f"/users/{user}"


def into_the_query(scope: dict[str, Any], user: str) -> None:
    scope["query_string"] = f"q={user}".encode()


def into_the_root_path(scope: dict[str, Any], user: str) -> None:
    scope["path"], scope["root_path"] = "/users/a/b", {"alice": "/users", "bob": "/users/a"}[user]


@pytest.mark.parametrize("rewrite", [into_the_path, into_the_query, into_the_root_path])
async def test_what_a_middleware_makes_of_the_address_is_in_the_key(sqlite_url: str, rewrite: Any) -> None:
    app = FastAPI()
    app.add_middleware(Rewriting, rewrite=rewrite)

    @app.get("/{rest:path}")
    @cached
    async def user(rest: str, q: str = "") -> list[str]:
        return [rest, q]

    async with serving(app, sqlite_url) as http:
        bodies = []
        for mark in ("miss", "hit"):
            for name in ("alice", "bob"):
                answer = await http.get("/users/me", headers={"x-user": name})
                assert answer.headers["x-cache"] == mark
                bodies.append(answer.json())
    assert bodies[:2] == bodies[2:]
    assert bodies[0] != bodies[1]


# Before a hit


class Guard:
    """An ASGI middleware that lets in who has a token."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = PlainTextResponse("no", 401)
        allowed = scope["type"] != "http" or (b"x-token", b"good") in scope["headers"]
        await (self.app if allowed else refused)(scope, receive, send)


async def report() -> str:
    return "report"


def guarded_mount(app: FastAPI) -> None:
    inner = FastAPI()
    inner.add_middleware(Guard)
    inner.get("/report")(cached(report))
    app.mount("/guarded", inner)


def deeper_mount(app: FastAPI) -> None:
    outer, inner = FastAPI(), FastAPI()
    outer.add_middleware(Guard)
    inner.get("/report")(cached(report))
    outer.mount("/", inner)
    app.mount("/guarded", outer)


def wrapped_mount(app: FastAPI) -> None:
    inner = FastAPI()
    inner.get("/report")(cached(report))
    build = inner.build_middleware_stack
    inner.build_middleware_stack = lambda: Guard(build())  # type: ignore[method-assign, assignment, return-value]
    app.mount("/guarded", inner)


class Handled(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            if request.headers.get("x-token") != "good":
                return PlainTextResponse("no", 401)
            return await handler(request)

        return guarded


class Entered(APIRoute):
    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        await Guard(super().handle)(scope, receive, send)


class GuardedRouter(APIRouter):
    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        await Guard(super().handle)(scope, receive, send)


def of_router(app: FastAPI) -> None:
    router, inner = APIRouter(), GuardedRouter()
    inner.get("/report")(cached(report))
    router.include_router(inner)
    app.include_router(router, prefix="/guarded")


def of_class(kind: type[APIRoute]) -> Callable[[FastAPI], None]:
    def add(app: FastAPI) -> None:
        router = APIRouter(route_class=kind)
        router.get("/report")(cached(report))
        app.include_router(router, prefix="/guarded")

    return add


@pytest.mark.parametrize(
    "add",
    [guarded_mount, deeper_mount, wrapped_mount, of_class(Handled), of_class(Entered), of_router],
    ids=["mount", "deeper mount", "wrapped mount", "route handler", "route", "router"],
)
async def test_what_stands_before_a_route_is_asked_on_hits_too(sqlite_url: str, add: Any) -> None:
    app = FastAPI()
    add(app)
    async with serving(app, sqlite_url) as http:
        token = {"x-token": "good"}
        answers = [await http.get("/guarded/report", headers=each) for each in (token, token, {}, token)]
    assert [each.status_code for each in answers] == [200, 200, 401, 200]
    assert [each.headers.get("x-cache") for each in answers] == ["miss", "hit", None, "hit"]


class ForTheBrave(APIRoute):
    def matches(self, scope: Any) -> tuple[Match, Any]:
        brave = (b"brave", b"yes") in scope["headers"]
        return super().matches(scope) if brave else (Match.NONE, {})


@pytest.mark.parametrize("brave_is_cached", [True, False])
async def test_a_route_behind_one_that_is_found_by_more_than_its_address(
    sqlite_url: str, brave_is_cached: bool
) -> None:
    app = FastAPI()
    brave_router = APIRouter(route_class=ForTheBrave)

    async def brave() -> str:
        return "brave"

    async def plain() -> str:
        return "plain"

    brave_router.get("/den")(cached(brave) if brave_is_cached else brave)
    app.include_router(brave_router)
    app.get("/den")(cached(plain))
    async with serving(app, sqlite_url) as http:
        for _ in range(3):
            for value, body in (("no", "plain"), ("yes", "brave")):
                assert (await http.get("/den", headers={"brave": value})).json() == body


class ToOther(BaseRoute):
    """A route to another app, for the brave."""

    def matches(self, scope: Any) -> tuple[Match, Any]:
        return (Match.FULL if (b"brave", b"yes") in scope["headers"] else Match.NONE), {}

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("other")(scope, receive, send)


async def test_a_mounted_route_behind_one_that_is_found_by_more_than_its_address(sqlite_url: str) -> None:
    app, inner = FastAPI(), FastAPI()
    app.router.routes.insert(0, ToOther())
    inner.get("/report")(cached(report))
    app.mount("/inner", inner)
    async with serving(app, sqlite_url) as http:
        for _ in range(3):
            for value, body in (("no", '"report"'), ("yes", "other")):
                assert (await http.get("/inner/report", headers={"brave": value})).text == body


# What is read


async def test_cookies_tell_public_responses_apart(service: Service) -> None:
    @service.app.get("/public")
    @cached(scope="public")
    async def public(language: Annotated[str, Cookie()] = "") -> str:
        return language

    for mark in ("miss", "hit", "hit"):
        for value in ("de", "en", ""):
            headers = {"cookie": f"language={value}"} if value else {}
            answer = await service.get("/public", headers=headers)
            assert (answer.json(), answer.headers["x-cache"]) == (value, mark)


class TenantSession(RequestSession):
    """A session of the team's own, which reads whose data it is to show."""

    async def __call__(self, response: Response, x_tenant: Annotated[str, Header()] = "") -> AsyncSession:  # type: ignore[override]
        session = await super().__call__(response)
        session.info["tenant"] = x_tenant
        return session


async def test_what_a_session_of_the_teams_own_reads_is_in_the_key(service: Service) -> None:
    own = Depends(TenantSession())

    @service.app.get("/tenant")
    @cached
    async def tenant(db: AsyncSession = own) -> str:
        return str(db.info["tenant"])

    for mark in ("miss", "hit"):
        for value in ("a", "b"):
            answer = await service.get("/tenant", headers={"x-tenant": value})
            assert (answer.json(), answer.headers["x-cache"]) == (value, mark)


class Peeking(BaseModel):
    """A model of headers that sees more of them than it declares."""

    who: str = ""

    @model_validator(mode="before")
    @classmethod
    def peek(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "who": values.get("authorization", "")}


async def test_a_model_that_sees_every_header_is_not_cached(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    @service.app.get("/peek")
    @cached
    async def peek(headers: Annotated[Peeking, Header()]) -> str:
        return headers.who

    for who in ("alice", "bob"):
        answer = await service.get("/peek", headers={"authorization": who})
        assert (answer.json(), answer.headers.get("x-cache")) == (who, None)
    assert "GET /peek is marked @cached but is not cached" in caplog.text


async def test_services_behind_one_host_do_not_share_entries(sqlite_url: str, redis_url: str) -> None:
    async def everybody() -> str:
        return "everybody"

    async def visible() -> str:
        return "visible"

    for endpoint in (everybody, visible):
        app = FastAPI()
        app.get("/users")(cached(endpoint))
        async with serving(app, sqlite_url, redis_url=redis_url) as http:
            assert (await http.get("/users")).json() == endpoint.__name__


# Who is asking


class Key(BaseModel):
    number: int


async def test_principals_of_different_kinds_are_different(service: Service) -> None:
    values = (1, "1", None, "None", "", True, "True", ("a", "b"), "ab", UUID(int=1))

    def asking(request: Request) -> Any:
        return values[int(request.headers["x-number"])]

    declare(asking, principal=lambda who: who)
    given = Depends(asking)

    @service.app.get("/mine")
    @cached
    async def mine(who: Any = given) -> str:
        return repr(who)

    for mark in ("miss", "hit"):
        for number, value in enumerate(values):
            answer = await service.get("/mine", headers={"x-number": str(number)})
            assert (answer.json(), answer.headers["x-cache"]) == (repr(value), mark)


@pytest.mark.parametrize("who", [Key(number=1), 2**70])
async def test_a_principal_that_is_no_text_says_so(service: Service, who: Any) -> None:
    def asking() -> Any:
        return who

    declare(asking, principal=lambda key: key)

    @service.app.get("/mine", dependencies=[Depends(asking)])
    @cached
    async def mine() -> int:
        return 1

    transport = httpx2.ASGITransport(service.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        with pytest.raises(ConfigurationError, match="principal= of asking"):
            await http.get("/mine")


async def test_an_override_of_who_is_asking_need_not_be_of_its_kind(service: Service) -> None:
    def asking() -> Key:
        return Key(number=1)

    declare(asking, principal=lambda key: key.number)
    given = Depends(asking)

    @service.app.get("/mine")
    @cached
    async def mine(who: Any = given) -> str:
        return str(who)

    service.app.dependency_overrides[asking] = lambda: "test"
    answer = await service.get("/mine")
    assert (answer.json(), answer.headers["x-cache"]) == ("test", "bypass")
