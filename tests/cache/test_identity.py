"""The key holds every input an endpoint declares, so no one gets another's data. Promise 2, over an app."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import pytest
from cache.service import Service
from fastapi import APIRouter, Cookie, Depends, Header, HTTPException, Query, Security
from fastapi.security import (
    APIKeyCookie,
    APIKeyHeader,
    APIKeyQuery,
    HTTPBasic,
    HTTPBearer,
    OAuth2PasswordBearer,
)
from fastapi.security.base import SecurityBase
from pydantic import AliasChoices, BaseModel
from sqlalchemy import select
from support import Item

from overdrive import SessionDep, cached

pytestmark = pytest.mark.anyio


# Inputs


async def test_hosts_do_not_share_entries(service: Service) -> None:
    for host, mark in (("a.org", "miss"), ("b.org", "miss"), ("A.ORG", "hit"), ("b.org", "hit")):
        assert await service.marks("/names", headers={"Host": host}) == [mark], host


async def test_paths_and_queries_do_not_share_entries(service: Service) -> None:
    @service.app.get("/echo/{part:path}")
    @cached
    async def echo(part: str, a: str = "", b: str = "") -> list[str]:
        return [part, a, b]

    expected = {
        "/echo/a/b": ["a/b", "", ""],
        "/echo/a:b": ["a:b", "", ""],
        "/echo/a?a=1:b=2": ["a", "1:b=2", ""],
        "/echo/a?a=1&b=2": ["a", "1", "2"],
        "/echo/a?a=1%26b=2": ["a", "1&b=2", ""],
        "/echo/a?a=2&a=1": ["a", "1", ""],
        "/echo/a?a=1&a=2": ["a", "2", ""],
    }
    for mark in ("miss", "hit"):
        for path, body in expected.items():
            answer = await service.get(path)
            assert (answer.headers["x-cache"], answer.json()) == (mark, body), path
    assert await service.marks("/echo/a?b=2&a=1") == ["hit"]


def locale(accept_language: str | None = Header(None)) -> str | None:
    return accept_language


async def by_header(x_tenant: str | None = Header(None)) -> str | None:
    return x_tenant


async def by_alias(value: str | None = Header(None, alias="X-Tenant")) -> str | None:
    return value


async def by_cookie(tenant: str | None = Cookie(None)) -> str | None:
    return tenant


async def by_repeated_header(x_tenant: Annotated[list[str], Header()]) -> str:
    return x_tenant[-1]


async def by_choice(value: Annotated[str, Header(validation_alias=AliasChoices("x-id", "x-tenant"))]) -> str:
    return value


class Tenant(BaseModel):
    x_tenant: str | None = None


async def by_header_model(headers: Annotated[Tenant, Header()]) -> str | None:
    return headers.x_tenant


class TenantCookie(BaseModel):
    tenant: str | None = None


async def by_cookie_model(cookies: Annotated[TenantCookie, Cookie()]) -> str | None:
    return cookies.tenant


async def by_dependency(language: str | None = Depends(locale)) -> str | None:
    return language


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        (by_header, "x-tenant"),
        (by_alias, "x-tenant"),
        (by_choice, "x-tenant"),
        (by_header_model, "x-tenant"),
        (by_cookie_model, "cookie"),
        (by_dependency, "accept-language"),
        (by_cookie, "cookie"),
    ],
)
async def test_headers_and_cookies_that_are_read_are_in_the_key(service: Service, endpoint: Any, name: str) -> None:
    service.app.get("/read")(cached(endpoint))
    form = "tenant={}" if name == "cookie" else "{}"
    for mark in ("miss", "hit"):
        for value in ("a", "b", "A"):
            answer = await service.get("/read", headers={name: form.format(value)})
            assert (answer.headers["x-cache"], answer.json()) == (mark, value)
    private = "private, no-cache" if name == "cookie" else "no-cache"
    assert (await service.get("/read", headers={name: form.format("a")})).headers["cache-control"] == private


async def test_every_value_of_a_repeated_header_is_in_the_key(service: Service) -> None:
    service.app.get("/read")(cached(by_repeated_header))
    for mark in ("miss", "hit"):
        for last in ("a", "b"):
            answer = await service.get("/read", headers=[("x-tenant", "first"), ("x-tenant", last)])
            assert (answer.headers["x-cache"], answer.json()) == (mark, last)


class Filter(BaseModel):
    a: int = 0


async def by_query_model(chosen: Annotated[Filter, Query()]) -> int:
    return chosen.a


async def test_a_model_of_query_parameters_is_in_the_key(service: Service) -> None:
    service.app.get("/read")(cached(by_query_model))
    for mark in ("miss", "hit"):
        for value in (1, 2):
            answer = await service.get(f"/read?a={value}")
            assert (answer.headers["x-cache"], answer.json()) == (mark, value)


async def test_those_that_are_not_are_not(service: Service) -> None:
    headers = [{"user-agent": "one", "cookie": "a=1"}, {"user-agent": "other", "authorization": "Bearer b"}]
    assert [await service.marks("/names", headers=each) for each in headers] == [["miss"], ["hit"]]


# Identity


def basic(name: str) -> dict[str, Any]:
    return {"headers": {"Authorization": "Basic " + base64.b64encode(f"{name}:".encode()).decode()}}


def bearer(name: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {name}"}}


SCHEMES: list[tuple[SecurityBase, Any]] = [
    (OAuth2PasswordBearer("token"), bearer),
    (HTTPBearer(), bearer),
    (HTTPBasic(), basic),
    (APIKeyHeader(name="X-Key"), lambda name: {"headers": {"x-key": name}}),
    (APIKeyCookie(name="session"), lambda name: {"headers": {"cookie": f"session={name}"}}),
    (APIKeyQuery(name="key"), lambda name: {"params": {"key": name}}),
]


class Door:
    """A dependency that lets in whom it knows."""

    def __init__(self, scheme: SecurityBase) -> None:
        self.known = {"alice", "bob"}
        self.asked: list[str] = []

        given = Security(scheme)

        def enter(credential: Any = given) -> str:
            name = getattr(credential, "credentials", None) or getattr(credential, "username", credential)
            self.asked.append(name)
            if name not in self.known:
                raise HTTPException(401)
            return str(name)

        self.enter = enter


@pytest.mark.parametrize(("scheme", "as_"), SCHEMES, ids=[type(scheme).__name__ for scheme, _ in SCHEMES])
async def test_no_one_gets_another_principals_answer(service: Service, scheme: SecurityBase, as_: Any) -> None:
    door = Door(scheme)

    @service.app.get("/me")
    @cached
    async def me(db: SessionDep, user: str = Depends(door.enter)) -> list[str]:
        service.ran.append(user)
        return [user, *await db.scalars(select(Item.name))]

    for mark in ("miss", "hit"):
        for user in ("alice", "bob"):
            answer = await service.get("/me", **as_(user))
            assert (answer.headers["x-cache"], answer.json()) == (mark, [user, "first"])
            assert answer.headers["cache-control"] == "private, no-cache"
    assert service.ran == ["alice", "bob"]
    assert door.asked == ["alice", "bob"] * 2

    door.known.remove("alice")
    revoked = await service.get("/me", **as_("alice"))
    assert (revoked.status_code, revoked.headers.get("x-cache")) == (401, None)
    assert (await service.get("/me", **as_("mallory"))).status_code == 401
    assert (await service.get("/me")).status_code in (401, 403)
    assert (await service.get("/me", **as_("bob"))).headers["x-cache"] == "hit"


async def test_authentication_around_a_router_runs_on_hits_too(service: Service) -> None:
    scheme, as_ = SCHEMES[0]
    door, router = Door(scheme), APIRouter()

    @router.get("/report")
    @cached
    async def report() -> str:
        return "report"

    service.app.include_router(router, prefix="/guarded", dependencies=[Depends(door.enter)])
    assert [await service.marks("/guarded/report", **as_("alice")) for _ in range(2)] == [["miss"], ["hit"]]
    assert await service.marks("/guarded/report", **as_("bob")) == ["miss"]
    door.known.clear()
    assert (await service.get("/guarded/report", **as_("alice"))).status_code == 401


class HomeMade(SecurityBase):
    """A scheme of the team's own: what it reads is anybody's guess."""

    def __init__(self) -> None:
        self.scheme_name, self.model = "HomeMade", HTTPBearer().model

    async def __call__(self) -> str:
        return "alice"


async def test_an_unknown_scheme_is_not_cached(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    async def me(user: str = Security(HomeMade())) -> str:
        return user

    service.app.get("/me")(cached(me))
    assert await service.marks("/me", "/me") == [None, None]
    assert "GET /me is marked @cached but is not cached" in caplog.text
    assert "security scheme HomeMade" in caplog.text
