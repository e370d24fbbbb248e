"""Whose a response is, where the app says so: principals, everybody, tenants. Promise 2, over an app."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import httpx2
import pytest
from cache.service import Service
from fastapi import Depends, FastAPI, HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from pydantic import BaseModel
from sqlalchemy import insert, select, text
from support import Item, client, tables

from overdrive import ConfigurationError, CursorPage, Overdrive, SessionDep, cached, declare, paginate

pytestmark = pytest.mark.anyio


class User(BaseModel):
    id: int


#: Tokens, and whose they are.
TOKENS = {"a1": 1, "a2": 1, "b1": 2}


async def from_request(request: Request) -> User | None:
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token == "bad":
        raise HTTPException(401)
    return User(id=TOKENS[token]) if token else None


def from_scheme(
    scopes: SecurityScopes, token: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]
) -> User | None:
    if token.credentials not in TOKENS:
        raise HTTPException(401)
    return User(id=TOKENS[token.credentials])


async def limiter(request: Request) -> None:
    request.app.state.limited = getattr(request.app.state, "limited", 0) + 1


declare(from_request, principal=lambda user: user.id if user is not None else None)
declare(from_scheme, principal=lambda user: user.id)
declare(limiter, ignore=True)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def add_mine(service: Service, who: Any) -> None:
    @service.app.get("/mine")
    @cached
    async def mine(user: Any = who) -> int | None:
        service.ran.append("/mine")
        return user.id if user is not None else None


@pytest.mark.parametrize("who", [Depends(from_request), Depends(from_scheme), Security(from_scheme, scopes=["read"])])
async def test_each_principal_has_entries_whatever_their_credential(service: Service, who: Any) -> None:
    add_mine(service, who)
    for token, mark in (("a1", "miss"), ("a2", "hit"), ("b1", "miss"), ("a1", "hit"), ("b1", "hit")):
        answer = await service.get("/mine", headers=bearer(token))
        assert (answer.json(), answer.headers["x-cache"]) == (TOKENS[token], mark)
        assert answer.headers["cache-control"] == "private, no-cache"
    assert (await service.get("/mine", headers=bearer("bad"))).status_code == 401
    assert service.ran == ["/mine"] * 2


async def test_nobody_is_one_principal_too(service: Service) -> None:
    add_mine(service, Depends(from_request))
    for token, mark in (("", "miss"), ("a1", "miss"), ("", "hit"), ("a2", "hit")):
        answer = await service.get("/mine", headers=bearer(token))
        assert (answer.json(), answer.headers["x-cache"]) == (TOKENS.get(token), mark)


async def test_no_tag_of_one_is_confirmed_to_another(service: Service) -> None:
    add_mine(service, Depends(from_request))
    etag = (await service.get("/mine", headers=bearer("a1"))).headers["etag"]
    for token, status in (("a2", 304), ("b1", 200)):
        answer = await service.get("/mine", headers={**bearer(token), "If-None-Match": etag})
        assert answer.status_code == status


async def test_a_dependency_that_has_no_say_runs_on_every_hit(service: Service) -> None:
    @service.app.get("/limited", dependencies=[Depends(limiter)])
    @cached
    async def limited() -> int:
        return 1

    assert await service.marks("/limited", "/limited", "/limited") == ["miss", "hit", "hit"]
    assert service.app.state.limited == 3


async def test_what_is_everybodys_is_answered_before_anybody_is_asked(service: Service) -> None:
    @service.app.get("/public", dependencies=[Depends(from_scheme), Depends(from_request)])
    @cached(scope="public")
    async def public() -> int:
        service.ran.append("/public")
        return 1

    assert (await service.get("/public")).status_code in (401, 403)
    assert (await service.get("/public", headers=bearer("a1"))).headers["x-cache"] == "miss"
    for token in ("b1", "bad", ""):
        answer = await service.get("/public", headers=bearer(token))
        assert (answer.status_code, answer.headers["x-cache"]) == (200, "hit"), token
    assert service.ran == ["/public"]


async def test_what_a_request_says_besides_tells_public_responses_apart(service: Service) -> None:
    @service.app.get("/public/{number}", dependencies=[Depends(HTTPBearer(auto_error=False))])
    @cached(scope="public")
    async def public(number: int, q: str = "") -> list[Any]:
        return [number, q]

    for mark in ("miss", "hit"):
        for path, body in {"/public/1": [1, ""], "/public/2": [2, ""], "/public/1?q=x": [1, "x"]}.items():
            answer = await service.get(path, headers=bearer(f"token of {mark}"))
            assert (answer.json(), answer.headers["x-cache"]) == (body, mark)


@pytest.mark.parametrize("wrong", [{}, {"principal": str, "ignore": True}])
def test_a_declaration_says_one_thing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="either principal="):
        declare(from_request, **wrong)


def test_a_scope_is_public_or_none() -> None:
    with pytest.raises(ConfigurationError, match='takes "public"'):
        cached(scope="private")  # type: ignore[call-overload]


# Tenants


def tenant_of(request: Request) -> str | None:
    return request.headers.get("x-tenant")


@dataclass
class Tenants:
    overdrive: Overdrive
    http: httpx2.AsyncClient
    #: How often values were loaded.
    loaded: int = 0

    async def get(self, path: str, tenant: str | None) -> httpx2.Response:
        return await self.http.get(path, headers={} if tenant is None else {"x-tenant": tenant})

    async def load(self) -> int:
        self.loaded += 1
        return self.loaded

    async def text_is_read(self) -> int:
        async with self.overdrive.session() as db:
            await db.execute(text("SELECT 1"))
        return await self.load()


@pytest.fixture
async def tenants(sqlite_url: str, store_url: str | None) -> AsyncIterator[Tenants]:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, redis_url=store_url, cache=True, tenant=tenant_of)
    cache = overdrive.cache

    # What nobody sees: it is neither a parameter nor a dependency.
    @app.middleware("http")
    async def remember(request: Request, call_next: Any) -> Any:
        app.state.tenant = tenant_of(request)
        return await call_next(request)

    @app.get("/ours")
    @cached(tags=["catalogue"])
    async def ours() -> str | None:
        return app.state.tenant  # type: ignore[no-any-return]

    @app.get("/feed", response_model=CursorPage[int])
    async def feed(db: SessionDep) -> Any:
        return await paginate(db, select(Item.id).order_by(Item.id))

    @app.get("/value")
    async def value() -> int:
        return await cache.get_or_set("value", running.load, tags=["catalogue"])

    @app.get("/unknown")
    async def unknown() -> int:
        return await cache.get_or_set("unknown", running.text_is_read)

    @app.get("/shared")
    async def shared() -> int:
        return await cache.get_or_set("value", running.load, shared=True)

    @cache.memoize()
    async def memoized() -> int:
        return await running.load()

    @cache.memoize(shared=True)
    async def memoized_for_all() -> int:
        return await running.load()

    app.get("/memoized")(call_of(memoized))
    app.get("/memoized-for-all")(call_of(memoized_for_all))
    with tables(sqlite_url) as database:
        with database.begin() as connection:
            connection.execute(insert(Item), [{"name": "a"}, {"name": "b"}])
        async with client(app) as http:
            running = Tenants(overdrive, http)
            yield running
    await overdrive.aclose()


def call_of(function: Any) -> Any:
    async def endpoint() -> Any:
        return await function()

    return endpoint


async def test_no_tenant_gets_anothers_response(tenants: Tenants) -> None:
    for mark in ("miss", "hit"):
        for tenant in ("a", "b"):
            answer = await tenants.get("/ours", tenant)
            assert (answer.json(), answer.headers["x-cache"]) == (tenant, mark)


async def test_without_a_tenant_nothing_is_cached(tenants: Tenants) -> None:
    for _ in range(2):
        answer = await tenants.get("/ours", None)
        assert (answer.json(), answer.headers["cache-status"]) == (None, "overdrive; fwd=bypass; detail=no-tenant")


async def test_a_cursor_is_one_tenants(tenants: Tenants) -> None:
    cursor = (await tenants.get("/feed?size=1", "a")).json()["next_cursor"]
    for tenant, status in (("a", 200), ("b", 400), (None, 400)):
        answer = await tenants.get(f"/feed?size=1&cursor={cursor}", tenant)
        assert answer.status_code == status


@pytest.mark.parametrize("path", ["/value", "/memoized"])
async def test_no_tenant_gets_anothers_value(tenants: Tenants, path: str) -> None:
    asking = ["a", "b", "a", "b", None, None, "a"]
    assert [(await tenants.get(path, tenant)).json() for tenant in asking] == [1, 2, 1, 2, 3, 4, 1]


async def test_a_value_from_outside_of_requests_is_no_tenants(tenants: Tenants) -> None:
    cache = tenants.overdrive.cache
    assert [await cache.get_or_set("value", tenants.load, tags=["catalogue"]) for _ in range(2)] == [1, 1]
    assert [(await tenants.get("/value", tenant)).json() for tenant in ("a", None, "a")] == [2, 3, 2]


@pytest.mark.parametrize("path", ["/shared", "/memoized-for-all"])
async def test_a_value_that_is_said_to_be_shared_is_everybodys(tenants: Tenants, path: str) -> None:
    assert [(await tenants.get(path, tenant)).json() for tenant in ("a", "b", None)] == [1, 1, 1]


async def test_a_tenant_does_not_make_a_value_with_unknown_reads_one_that_can_be_dropped(tenants: Tenants) -> None:
    assert [(await tenants.get("/unknown", "a")).json() for _ in range(2)] == [1, 2]


async def test_what_is_kept_for_one_tenant_is_dropped_alone(tenants: Tenants) -> None:
    async def seen() -> list[Any]:
        answers = [await tenants.get(path, tenant) for path in ("/ours", "/value", "/shared") for tenant in ("a", "b")]
        return [answer.headers.get("x-cache", answer.json()) for answer in answers]

    # Nobody knows the time at which the first request of a process comes in, where the store is shared.
    await tenants.get("/ours", "c")
    assert await seen() == ["miss", "miss", 1, 2, 3, 3]
    assert await seen() == ["hit", "hit", 1, 2, 3, 3]
    await tenants.overdrive.cache.clear(tenant="a")
    assert await seen() == ["miss", "hit", 4, 2, 3, 3]
    assert await seen() == ["hit", "hit", 4, 2, 3, 3]
    await tenants.overdrive.cache.clear()
    assert await seen() == ["miss", "miss", 5, 6, 7, 7]


async def test_a_tag_is_dropped_for_all_tenants(tenants: Tenants) -> None:
    for tenant in ("c", "a", "b"):
        await tenants.get("/ours", tenant)
        await tenants.get("/value", tenant)
    await tenants.overdrive.cache.invalidate("catalogue")
    for tenant, value in (("a", 4), ("b", 5)):
        assert (await tenants.get("/ours", tenant)).headers["x-cache"] == "miss"
        assert (await tenants.get("/value", tenant)).json() == value
