"""What is said of an app's cached routes, and of one request, before its endpoint runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import pytest
from cache.conftest import patient as patient
from fastapi import Depends, FastAPI, Header, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel
from redis.asyncio import Redis
from sqlalchemy import text
from starlette.middleware.base import BaseHTTPMiddleware
from support import client, outside

from overdrive import ConfigurationError, Overdrive, Page, SessionDep, cached, declare
from overdrive.cache.exchange import Exchange
from overdrive.inspection import explain, inspected

pytestmark = pytest.mark.anyio


class Row(BaseModel):
    id: int


def get_user(request: Request) -> str:
    return request.headers["x-user"]


declare(get_user, principal=str)


def whoever(request: Request) -> str:
    return request.headers["x-user"]


async def writes(db: SessionDep) -> None:
    await db.execute(text("CREATE TABLE written (id INT)"))
    await db.commit()


def fails() -> None:
    raise ZeroDivisionError("in a dependency")


class Shop:
    """An app whose endpoints say that they have run."""

    def __init__(self, url: str, redis_url: str | None = None, **options: Any) -> None:
        self.app = app = FastAPI()
        self.overdrive = Overdrive(app, database_url=url, redis_url=redis_url, cache=True, **options)
        self.ran: list[str] = []

        @app.get("/users/{user_id}")
        @cached(ttl=30, verify=0.25)
        async def user(user_id: int, size: int = 0, accept_language: Annotated[str, Header()] = "") -> int:
            self.ran.append("user")
            return user_id

        self.user = user

        @app.post("/users/{user_id}")
        @cached
        async def change(user_id: int) -> None:
            self.ran.append("change")

        @app.get("/rows", response_model=Page[Row])
        @cached(mode="off")
        async def rows(db: SessionDep) -> None:
            self.ran.append("rows")

        @app.get("/mine")
        @cached(mode="shadow")
        async def mine(user: Annotated[str, Depends(get_user)]) -> str:
            self.ran.append("mine")
            return user

        @app.get("/locked")
        @cached
        def locked(
            key: Annotated[str, Depends(APIKeyHeader(name="X-Key"))], token: Annotated[Any, Depends(HTTPBearer())]
        ) -> str:
            self.ran.append("locked")
            return key

        @app.get("/whole")
        @cached
        async def whole(user: Annotated[str, Depends(whoever)]) -> None:
            self.ran.append("whole")

        @app.get("/writing", dependencies=[Depends(writes)])
        @cached
        def writing() -> None:
            self.ran.append("writing")

        @app.get("/failing", dependencies=[Depends(fails)])
        @cached
        def failing() -> None:
            self.ran.append("failing")

        @app.get("/everybodys")
        @cached(scope="public")
        def everybodys() -> None:
            self.ran.append("everybodys")

        @app.get("/plain")
        def plain() -> None:
            self.ran.append("plain")


async def test_what_is_said_of_routes(sqlite_url: str) -> None:
    shop = Shop(sqlite_url, tenant=lambda _request: "one")
    found = await inspected(shop.overdrive)
    said = {name: (each.mode, each.verdict, ", ".join(each.key)) for name, each in found.cached.items()}
    assert said["GET /users/{user_id}"] == (
        "on, verify 0.25",
        "cached",
        "host, path, query size, header accept-language, tenant",
    )
    assert said["GET /rows"] == ("off", "cached", "host, path, every query parameter, tenant")
    assert said["GET /mine"] == ("shadow", "private: per get_user()", "host, path, get_user(), tenant")
    assert said["GET /locked"] == (
        "on",
        "private: per header authorization, header x-key",
        "host, path, header authorization, header x-key, tenant",
    )
    assert said["GET /whole"][1].startswith("not cached: whoever() takes the whole request")
    assert said["GET /everybodys"][1] == "public: the same for everybody"
    assert "GET /plain" not in said
    assert "overdrive.cache.statistics()" in str(found.note)
    assert found.routes["GET /rows"] == ["page by number", "async session"]
    await shop.overdrive.aclose()


async def test_what_is_said_where_redis_is_away(sqlite_url: str) -> None:
    found = await inspected(Shop(sqlite_url, "redis://127.0.0.1:1/0").overdrive)
    assert "the cache's store does not answer" in str(found.note)
    assert found.cached["GET /mine"].hit_ratio is None


async def verdict(url: str, request: Sequence[str], **headers: str) -> str:
    shop = Shop(url)
    findings = await explain(shop.app, request[0], request[1], headers)
    assert shop.ran == []
    return str(findings["verdict"])


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("GET /nowhere", "not looked up: no route has this path"),
        ("DELETE /users/1", "not looked up: this path takes GET, POST, and not DELETE"),
        ("GET /locked", "not looked up: 401 Unauthorized, from what comes before the endpoint; say who is asking"),
        ("GET /users/x", "not looked up: 422 Unprocessable"),
        ("GET /failing", "not looked up: the app raised ZeroDivisionError: in a dependency"),
        ("GET /writing", "not looked up: the app raised OperationalError: attempt to write a readonly database"),
        ("POST /users/1", "not cached: a POST that only asks for something is cached by its body"),
        ("GET /plain", "not cached: its endpoint is not marked @cached"),
        ("GET /whole", "not cached: whoever() takes the whole request"),
    ],
)
async def test_what_is_not_looked_up(sqlite_url: str, request_: str, expected: str) -> None:
    assert (await verdict(sqlite_url, request_.split(), **{"X-User": "ada"})).startswith(expected)
    assert outside(sqlite_url).connect().exec_driver_sql("SELECT name FROM sqlite_master").all() == []


@pytest.mark.parametrize(("method", "address"), [("GET", "users"), ("G T", "/users/1"), ("", "/")])
async def test_what_is_no_request(sqlite_url: str, method: str, address: str) -> None:
    with pytest.raises(ConfigurationError, match="it looks like GET /users/42"):
        await explain(Shop(sqlite_url).app, method, address, {})


async def test_an_app_without_overdrive() -> None:
    with pytest.raises(ConfigurationError, match=r"Overdrive\(app\)"):
        await explain(FastAPI(), "GET", "/", {})


async def test_without_a_tenant_nothing_is_looked_for(sqlite_url: str) -> None:
    shop = Shop(sqlite_url, tenant=lambda _request: None)
    assert (await explain(shop.app, "GET", "/users/1", {}))["entry"] == "not looked for: no-tenant"


async def test_a_middleware_with_tasks_of_its_own(sqlite_url: str) -> None:
    shop = Shop(sqlite_url)

    async def passed(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    shop.app.add_middleware(BaseHTTPMiddleware, dispatch=passed)
    findings = await explain(shop.app, "GET", "/locked", {"x-key": "hush", "Authorization": "Bearer hush"})
    assert findings["verdict"] == "private: per header authorization, header x-key"
    assert "hush" not in str(findings)
    assert shop.ran == []


async def test_what_is_said_of_an_entry(sqlite_url: str, redis_url: str) -> None:
    shop = Shop(sqlite_url, redis_url)

    async def asked(path: str = "/users/1") -> dict[str, Any]:
        explaining = Shop(sqlite_url, redis_url)
        findings = await explain(explaining.app, "GET", path, {"Host": "shop"})
        assert explaining.ran == []
        return findings

    async with client(shop.app) as http, Redis.from_url(redis_url) as server:
        keys: list[str] = []
        look_up = Exchange.look_up

        async def noting(exchange: Exchange) -> None:
            keys.append(exchange.key)
            await look_up(exchange)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Exchange, "look_up", noting)
            await http.get("/users/1", headers={"Host": "shop"})
        before = await server.hgetall("overdrive:counts")
        found = await asked()
        assert await server.hgetall("overdrive:counts") == before
        assert (found["key"], found["entry"], found["bytes"]) == (keys[0], "valid", 1)
        assert 0 < float(found["ttl left"].removesuffix(" s")) <= 30
        [(tag, versions)] = found["tags"].items()
        assert versions["then"] == versions["now"]
        assert (await asked("/users/2"))["entry"] == "none: the next request makes it"

        await shop.overdrive.cache.invalidate(shop.user, user_id=1)
        found = await asked()
        assert found["entry"] == f"not valid: {tag} was written since"
        assert found["tags"][tag]["then"] < found["tags"][tag]["now"]
        await shop.overdrive.cache.clear()
        await shop.overdrive.cache.off()
        found = await asked()
        assert found["entry"] == "not valid: the cache was cleared, or Redis emptied"
        assert found["mode"] == "off: switched"
    await shop.overdrive.aclose()
