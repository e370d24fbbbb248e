"""What clients and the caches between are told: Vary, Cache-Control, and what is hidden from them."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Annotated, Any

import pytest
from cache.service import Service, serve
from fastapi import Cookie, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.security import APIKeyHeader
from hypothesis import given
from hypothesis import strategies as st
from support import client

from overdrive import ConfigurationError, Overdrive, SessionDep, Settings, cached, declare
from overdrive.cache.policy import with_vary
from overdrive.config import CacheSettings
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio


# Vary


async def test_declared_headers_are_in_vary_of_every_answer(service: Service) -> None:
    @service.app.get("/greeting")
    @cached
    async def greeting(number: int = 0, accept_language: Annotated[str, Header()] = "") -> str:
        if number == 404:
            raise HTTPException(404)
        return accept_language

    named = "Accept-Encoding, Accept-Language"
    miss = await service.get("/greeting", headers={"Accept-Language": "de"})
    hit = await service.get("/greeting", headers={"Accept-Language": "de"})
    known = {"Accept-Language": "de", "If-None-Match": miss.headers["etag"]}
    unmodified = await service.get("/greeting", headers=known)
    head = await service.http.head("/greeting", headers={"Accept-Language": "de"})
    invalid = await service.get("/greeting?number=x")
    missing = await service.get("/greeting?number=404")
    service.overdrive.cache.enabled = False
    bypassed = await service.get("/greeting")
    answers = (miss, hit, unmodified, head, invalid, missing, bypassed)
    assert [each.status_code for each in answers] == [200, 200, 304, 200, 422, 404, 200]
    assert [each.headers["x-cache"] for each in answers] == ["miss", "hit", "hit", "hit", "miss", "miss", "bypass"]
    assert {each.headers["vary"] for each in answers} == {named}


async def test_what_says_who_is_asking_is_in_vary(service: Service) -> None:
    def who(request: Request) -> str:
        return request.headers.get("x-who", "")

    declare(who, principal=str)
    key: Any = Depends(APIKeyHeader(name="X-Key", auto_error=False))
    principal: Any = Depends(who)

    @service.app.get("/keys")
    @cached
    async def keys(key: Any = key) -> int:
        return 1

    @service.app.get("/cookies")
    @cached
    async def cookies(session: Annotated[str, Cookie()] = "") -> int:
        return 1

    @service.app.get("/principals")
    @cached
    async def principals(name: str = principal) -> int:
        return 1

    @service.app.get("/public")
    @cached(scope="public")
    async def public(name: str = principal) -> int:
        return 1

    for path, named in (
        ("/keys", "Accept-Encoding, X-Key"),
        ("/cookies", "Accept-Encoding, Cookie"),
        ("/principals", "Accept-Encoding, Authorization, Cookie"),
        ("/public", "Accept-Encoding"),
    ):
        assert [(await service.get(path)).headers["vary"] for _ in range(2)] == [named] * 2


async def test_an_endpoints_own_vary_is_kept_in_the_same_line(service: Service) -> None:
    @service.app.get("/own")
    @cached
    async def own(response: Response, x_tenant: Annotated[str, Header()] = "") -> int:
        response.headers["vary"] = "x-tenant"
        return 1

    for mark in ("miss", "hit"):
        answer = await service.get("/own")
        assert (answer.headers["x-cache"], answer.headers.get_list("vary")) == (mark, ["x-tenant, Accept-Encoding"])


NAMES = st.lists(st.sampled_from([b"Accept-Encoding", b"cookie", b"X-A", b"*"]), max_size=3)


@given(NAMES, NAMES, NAMES)
def test_vary_is_one_line_that_names_all(own: list[bytes], second: list[bytes], names: list[bytes]) -> None:
    headers = [(b"a", b"b"), *((b"Vary", b", ".join(each)) for each in (own, second) if each)]
    said = {each.lower() for each in own + second}
    lines = [value for name, value in with_vary(headers, names) if name.lower() == b"vary"]
    named = {each.strip().lower() for value in lines for each in value.split(b",")}
    assert named >= said
    assert b"*" in said or named == said | {each.lower() for each in names}
    assert len(with_vary(with_vary(headers, names), names)) == len(with_vary(headers, names))


def test_what_varies_by_everything_says_no_more() -> None:
    assert with_vary([(b"vary", b"*")], [b"Cookie"]) == [(b"vary", b"*")]


# Cache-Control


async def test_a_browser_has_a_time_of_its_own(service: Service) -> None:
    key: Any = Depends(APIKeyHeader(name="X-Key", auto_error=False))

    @service.app.get("/plain")
    @cached(browser_ttl=5)
    async def plain() -> int:
        return 1

    @service.app.get("/keys")
    @cached(browser_ttl=timedelta(seconds=5))
    async def keys(key: Any = key) -> int:
        return 1

    @service.app.get("/public")
    @cached(browser_ttl=5, scope="public")
    async def public(key: Any = key) -> int:
        return 1

    @service.app.get("/own")
    @cached(browser_ttl=5)
    async def own(response: Response) -> int:
        response.headers["cache-control"] = "no-cache, must-revalidate"
        return 1

    clock = service.overdrive.cache.clock = Clock()
    said = {
        "/plain": "private, max-age=5",
        "/keys": "private, max-age=5",
        "/public": "max-age=5",
        "/own": "no-cache, must-revalidate",
    }
    for mark in ("miss", "hit"):
        for path, control in said.items():
            answer = await service.get(path)
            assert (answer.headers["x-cache"], answer.headers["cache-control"]) == (mark, control)
            # Its time begins with the answer: it is as right now as it was when it was stored.
            assert "age" not in answer.headers
        clock.tick(20)


@pytest.mark.parametrize("seconds", [0.5, 5.9, timedelta(milliseconds=1)])
def test_a_browser_counts_in_whole_seconds(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"@cached\(browser_ttl=\.\.\.\) takes whole seconds"):
        cached(browser_ttl=seconds)


async def test_without_it_browsers_ask_each_time(service: Service) -> None:
    for _ in range(2):
        assert (await service.get()).headers["cache-control"] == "no-cache"


async def test_tenants_have_browsers_ask(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    overdrive = Overdrive(
        app, database_url=sqlite_url, cache=True, tenant=lambda request: request.headers.get("x-tenant")
    )

    @app.get("/one")
    @cached(browser_ttl=5)
    async def one() -> int:
        return 1

    async with client(app) as http:
        for _ in range(2):
            answer = await http.get("/one", headers={"X-Tenant": "a"})
            assert answer.headers["cache-control"] == "no-cache"
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert record.getMessage().startswith("GET /one has a browser_ttl, and the app has tenants")
    await overdrive.aclose()


@pytest.mark.parametrize(
    "header",
    [
        {"Cache-Control": "no-cache"},
        {"Cache-Control": "no-store"},
        {"Cache-Control": "max-age=0"},
        {"Cache-Control": "min-fresh=1000"},
        {"Pragma": "no-cache"},
    ],
    ids=str,
)
async def test_a_client_cannot_ask_the_database(service: Service, header: dict[str, str]) -> None:
    assert await service.marks("/names") == ["miss"]
    assert await service.marks("/names", headers=header) == ["hit"]
    assert service.ran == ["/names"]


async def test_only_if_cached_is_answered_like_any(service: Service) -> None:
    answer = await service.get("/names", headers={"Cache-Control": "only-if-cached"})
    assert (answer.status_code, answer.headers["x-cache"]) == (200, "miss")


# What is hidden


async def test_nobody_is_told_of_the_cache(sqlite_url: str) -> None:
    app = FastAPI()
    settings = Settings(database_url=sqlite_url, cache=CacheSettings(hide_status=True, enabled=True))
    overdrive = Overdrive(app, settings=settings)
    ran: list[int] = []

    @app.get("/one")
    @cached
    async def one() -> int:
        ran.append(1)
        return 1

    @app.get("/guarded", dependencies=[Depends(lambda: None)])
    @cached(stale_if_error=300)
    async def guarded() -> int:
        ran.append(1)
        return 1

    async with client(app) as http:
        for path in ("/one", "/one", "/guarded", "/guarded"):
            answer = await http.get(path)
            assert answer.status_code == 200
            assert not {"cache-status", "x-cache"} & answer.headers.keys()
        overdrive.cache.enabled = False
        assert not {"cache-status", "x-cache"} & (await http.get("/one")).headers.keys()
    assert len(ran) == 3
    await overdrive.aclose()


async def test_two_releases_with_other_browser_times_share_nothing(sqlite_url: str, redis_url: str) -> None:
    controls = []
    for seconds in (5, 6):
        async with serve(sqlite_url, redis_url) as service:

            @service.app.get("/one")
            @cached(browser_ttl=seconds)
            async def one(db: SessionDep) -> int:
                return 1

            controls.append((await service.get("/one")).headers["cache-control"])
    assert controls == ["private, max-age=5", "private, max-age=6"]
