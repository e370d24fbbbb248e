"""Whose a response is, where the app says so: principals, everybody, tenants. Promise 2, over an app."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx2
import pytest
from cache.service import Service
from fastapi import Depends, FastAPI, HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from pydantic import BaseModel
from sqlalchemy import insert, select
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


@pytest.fixture
async def tenants(sqlite_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True, tenant=tenant_of)

    # What nobody sees: it is neither a parameter nor a dependency.
    @app.middleware("http")
    async def remember(request: Request, call_next: Any) -> Any:
        app.state.tenant = tenant_of(request)
        return await call_next(request)

    @app.get("/ours")
    @cached
    async def ours() -> str | None:
        return app.state.tenant  # type: ignore[no-any-return]

    @app.get("/feed", response_model=CursorPage[int])
    async def feed(db: SessionDep) -> Any:
        return await paginate(db, select(Item.id).order_by(Item.id))

    with tables(sqlite_url) as database:
        with database.begin() as connection:
            connection.execute(insert(Item), [{"name": "a"}, {"name": "b"}])
        async with client(app) as http:
            yield http
    await overdrive.aclose()


async def test_no_tenant_gets_anothers_response(tenants: httpx2.AsyncClient) -> None:
    for mark in ("miss", "hit"):
        for tenant in ("a", "b"):
            answer = await tenants.get("/ours", headers={"x-tenant": tenant})
            assert (answer.json(), answer.headers["x-cache"]) == (tenant, mark)


async def test_without_a_tenant_nothing_is_cached(tenants: httpx2.AsyncClient) -> None:
    for _ in range(2):
        answer = await tenants.get("/ours")
        assert (answer.json(), answer.headers["cache-status"]) == (None, "overdrive; fwd=bypass; detail=no-tenant")


async def test_a_cursor_is_one_tenants(tenants: httpx2.AsyncClient) -> None:
    cursor = (await tenants.get("/feed?size=1", headers={"x-tenant": "a"})).json()["next_cursor"]
    for tenant, status in (({"x-tenant": "a"}, 200), ({"x-tenant": "b"}, 400), ({}, 400)):
        answer = await tenants.get("/feed", params={"size": 1, "cursor": cursor}, headers=tenant)
        assert answer.status_code == status
