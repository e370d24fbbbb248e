"""Expired responses: served while they are made anew, and in place of errors (RFC 5861). Outdated ones never."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from cache.service import Service, serve
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item, call, client, eventually, on_uvicorn, outside, recorded

from overdrive import ConfigurationError, Overdrive, SessionDep, SyncSessionDep, cached, declare
from overdrive.cache.refresh import Refreshes
from overdrive.context import current
from overdrive.instrumentation.events import RequestEvent
from overdrive.pool.session import AsyncWork
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.refresh._PAUSE", 0.05)


async def add_one(db: AsyncSession) -> None:
    await db.execute(insert(Item).values(name="new"))


class Route:
    """A cached route that counts its runs, and does what a test says."""

    def __init__(self, service: Service, path: str = "/one", **options: Any) -> None:
        self.runs = 0
        self.clock = service.overdrive.cache.clock = Clock()
        self.does: Callable[[], Any] = lambda: None
        self.opened = asyncio.Event()
        self.opened.set()

        @service.app.get(path)
        @cached(**{"ttl": 10, **options})
        async def one(db: SessionDep) -> int:
            self.runs += 1
            number = self.runs
            await db.scalar(select(Item.id))
            await self.opened.wait()
            self.does()
            return number


def revalidated(service: Service) -> Callable[[], bool]:
    return lambda: not service.overdrive.cache.refreshes._tasks


# While it is made anew


async def test_an_expired_response_is_served_while_it_is_made_anew(service: Service) -> None:
    route = Route(service, stale_while_revalidate=30)
    assert (await service.get("/one")).json() == 1
    route.clock.tick(15.5)
    route.opened.clear()
    stale = await service.get("/one")
    assert (stale.json(), stale.headers["x-cache"], stale.headers["age"]) == (1, "hit", "15")
    assert stale.headers["cache-status"] == "overdrive; hit; ttl=-6; detail=stale"
    # One for the key, whoever asks meanwhile.
    assert {(await service.get("/one")).json() for _ in range(5)} == {1}
    await eventually(lambda: route.runs == 2)
    route.opened.set()
    await eventually(revalidated(service))
    fresh = await service.get("/one")
    assert (fresh.json(), fresh.headers["cache-status"]) == (2, "overdrive; hit; ttl=10")
    assert route.runs == 2


async def test_after_the_window_it_is_a_miss(service: Service) -> None:
    route = Route(service, stale_while_revalidate=timedelta(seconds=30))
    await service.get("/one")
    route.clock.tick(40)
    miss = await service.get("/one")
    assert (miss.json(), miss.headers["cache-status"]) == (2, "overdrive; fwd=stale; detail=expired; stored")


@pytest.mark.parametrize("windows", [{"stale_while_revalidate": 30}, {"stale_if_error": 30}])
async def test_what_was_written_meanwhile_is_never_served(service: Service, windows: dict[str, float]) -> None:
    route = Route(service, **windows)
    await service.get("/one")
    route.clock.tick(15)
    assert await service.write(add_one) == 200
    route.does = fail
    answer = await service.get("/one")
    assert (answer.status_code, route.runs) == (500, 2)


async def test_without_a_window_nothing_expired_is_served(service: Service) -> None:
    route = Route(service)
    await service.get("/one")
    route.clock.tick(10)
    assert (await service.get("/one")).json() == 2


async def test_the_store_keeps_it_for_the_longer_window(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[float] = []
    save = service.overdrive.cache.store.save

    async def noted(key: str, entry: Any, ttl: float) -> None:
        kept.append(ttl)
        await save(key, entry, ttl)

    monkeypatch.setattr(service.overdrive.cache.store, "save", noted)
    Route(service, stale_while_revalidate=30, stale_if_error=300)
    Route(service, "/plain")
    await service.get("/one")
    await service.get("/plain")
    assert kept == [310, 10]


async def test_a_refresh_is_a_request_of_its_own(service: Service) -> None:
    seen: list[Any] = []

    @service.app.get("/own/{name}")
    @cached(ttl=10, stale_while_revalidate=30)
    async def own(name: str, db: SessionDep, q: str = "") -> list[str]:
        context = current()
        assert context is not None
        seen.append((context.request_id, context.path, context.refreshing, name, q))
        return [name, q]

    clock = service.overdrive.cache.clock = Clock()
    await service.get("/own/a?q=b")
    clock.tick(11)
    with recorded() as events:
        stale = await service.get("/own/a?q=b")
        await eventually(lambda: len(seen) == 2 and revalidated(service)())
    assert [each[1:] for each in seen] == [("/own/a", False, "a", "b"), ("/own/a", True, "a", "b")]
    assert seen[1][0] != stale.headers["x-request-id"]
    # Nobody has asked for it, so there is no event of it.
    assert len([each for each in events if isinstance(each, RequestEvent)]) == 1
    assert (await service.get("/own/a?q=b")).headers["cache-status"] == "overdrive; hit; ttl=10"


async def test_a_refresh_in_a_mounted_app(service: Service) -> None:
    inner = FastAPI()

    # What is found before routing would not show where routing has led.
    @inner.get("/in/{number}", dependencies=[Depends(lambda: None)])
    @cached(ttl=10, stale_while_revalidate=30)
    async def inside(number: int, db: SessionDep) -> int:
        return number

    service.app.mount("/mounted", inner)
    clock = service.overdrive.cache.clock = Clock()
    assert await service.marks("/mounted/in/1", "/mounted/in/1") == ["miss", "hit"]
    for _ in range(2):
        clock.tick(11)
        assert (await service.get("/mounted/in/1")).headers["cache-status"].endswith("detail=stale")
        await eventually(revalidated(service))
    assert (await service.get("/mounted/in/1")).headers["cache-status"] == "overdrive; hit; ttl=10"


async def test_a_plain_function_behind_another_kind_of_middleware(sqlite_url: str) -> None:
    async with serve(sqlite_url) as service:
        threads: list[str] = []

        @service.app.middleware("http")
        async def passing(request: Request, call_next: Any) -> Response:
            return await call_next(request)  # type: ignore[no-any-return]

        @service.app.get("/plain")
        @cached(ttl=10, stale_while_revalidate=30)
        def plain(db: SyncSessionDep) -> list[str]:
            threads.append(threading.current_thread().name)
            return list(db.scalars(select(Item.name)))

        clock = service.overdrive.cache.clock = Clock()
        for _ in range(3):
            assert (await service.get("/plain")).json() == ["first"]
            await eventually(revalidated(service))
            clock.tick(11)
        assert len(threads) == 3
        assert service.overdrive.sync_sessions().engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_a_private_response_is_made_anew_for_who_it_belongs_to(service: Service) -> None:
    revoked: set[str] = set()
    ran: list[str] = []

    bearer: Any = Depends(HTTPBearer())

    async def user(token: Any = bearer) -> str:
        if token.credentials in revoked:
            raise HTTPException(401)
        return str(token.credentials)

    @service.app.get("/mine")
    @cached(ttl=10, stale_while_revalidate=30)
    async def mine(name: str = Depends(user)) -> str:
        ran.append(name)
        return f"{name} {len(ran)}"

    async def ask(name: str) -> Any:
        return await service.get("/mine", headers={"Authorization": f"Bearer {name}"})

    clock = service.overdrive.cache.clock = Clock()
    assert [(await ask(name)).json() for name in ("alice", "bob")] == ["alice 1", "bob 2"]
    clock.tick(11)
    stale = await ask("alice")
    assert (stale.json(), stale.headers["cache-status"]) == ("alice 1", "overdrive; hit; ttl=-1; detail=stale")
    await eventually(revalidated(service))
    assert (await ask("alice")).json() == "alice 3"
    assert ran == ["alice", "bob", "alice"]
    # Authentication comes first, and has its say when it is stale, too.
    clock.tick(11)
    revoked.add("alice")
    assert (await ask("alice")).status_code == 401
    assert (await ask("bob")).json() == "bob 2"


async def test_a_refresh_that_fails_is_said_once_and_leaves_what_there_is(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    route = Route(service, stale_while_revalidate=30, stale_if_error=300)
    await service.get("/one")
    route.clock.tick(15)
    route.does = fail
    with caplog.at_level(logging.ERROR, "overdrive"):
        for runs in (2, 3):
            assert (await service.get("/one")).json() == 1
            await eventually(lambda: route.runs == runs and revalidated(service)())  # noqa: B023
    [record] = caplog.records
    assert record.getMessage() == "/one raised when it was to refresh its response, which stays"
    assert record.exc_info is not None
    assert "broken" in str(record.exc_info[1])
    caplog.clear()
    # Once it has worked, the next failure is news.
    route.does = lambda: None
    await service.get("/one")
    await eventually(revalidated(service))
    assert (await service.get("/one")).json() == 4
    route.clock.tick(15)
    route.does = unavailable
    await service.get("/one")
    await eventually(revalidated(service))
    assert [each.getMessage() for each in caplog.records] == [
        "/one answered 503 when it was to refresh its response, which stays"
    ]


async def test_a_refresh_gives_its_connection_back(service: Service) -> None:
    route = Route(service, stale_while_revalidate=30)
    await service.get("/one")
    for does in (lambda: None, fail):
        route.does = does
        route.clock.tick(15)
        runs = route.runs
        await service.get("/one")
        await eventually(lambda: route.runs == runs + 1 and revalidated(service)())  # noqa: B023
        assert service.overdrive.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_refreshes_end_with_the_app(sqlite_url: str) -> None:
    async with serve(sqlite_url) as service:
        route = Route(service, stale_while_revalidate=30)
        await service.get("/one")
        route.clock.tick(15)
        route.opened.clear()
        await service.get("/one")
        await eventually(lambda: route.runs == 2)
        [task] = service.overdrive.cache.refreshes._tasks.values()
        await service.overdrive.aclose()
        assert task.cancelled()
        assert service.overdrive.cache.refreshes._tasks == {}


async def test_refreshes_are_one_for_each_key_and_bounded() -> None:
    refreshes, opened, ran = Refreshes(), asyncio.Event(), list[int]()

    def refresh(number: int) -> Callable[[], Any]:
        async def run() -> int:
            ran.append(number)
            await opened.wait()
            return 200

        return run

    for number in range(20):
        refreshes.start(f"{number // 2}", None, refresh(number))
    await asyncio.sleep(0)
    assert ran == list(range(0, 16, 2))
    opened.set()
    await eventually(lambda: not refreshes._tasks)
    refreshes.start("again", None, refresh(99))
    await eventually(lambda: not refreshes._tasks)
    assert ran[-1] == 99


async def test_a_refresh_finds_what_a_middleware_has_found_out(sqlite_url: str) -> None:
    app, seen = FastAPI(), list[str]()

    class Naming:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {})["who"] = "me"
            await self.app(scope, receive, send)

    app.add_middleware(Naming)
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True)

    def who(request: Request) -> str:
        return str(request.state.who)

    declare(who, principal=str)

    @app.get("/who")
    @cached(ttl=10, stale_while_revalidate=30)
    async def whoever(name: str = Depends(who)) -> str:
        seen.append(name)
        return name

    clock = overdrive.cache.clock = Clock()
    async with client(app) as http:
        await http.get("/who")
        clock.tick(11)
        await http.get("/who")
        await eventually(lambda: len(seen) == 2 and not overdrive.cache.refreshes._tasks)
        assert (await http.get("/who")).headers["cache-status"] == "overdrive; hit; ttl=10"
    assert seen == ["me", "me"]
    await overdrive.aclose()


# In place of an error


def fail() -> None:
    raise RuntimeError("broken")


def unavailable() -> None:
    raise HTTPException(503)


def missing() -> None:
    raise HTTPException(404)


@pytest.mark.parametrize(("does", "status"), [(fail, 500), (unavailable, 503)])
async def test_an_expired_response_stands_in_for_an_error(
    service: Service, caplog: pytest.LogCaptureFixture, does: Callable[[], None], status: int
) -> None:
    route = Route(service, stale_if_error=300)
    await service.get("/one")
    route.clock.tick(309.5)
    route.does = does
    caplog.clear()
    answer = await service.get("/one")
    assert (answer.status_code, answer.json(), answer.headers["x-cache"]) == (200, 1, "hit")
    assert answer.headers["cache-status"] == f"overdrive; fwd=stale; fwd-status={status}; detail=stale-if-error"
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    what = "raised" if does is fail else "answered 503"
    assert record.getMessage() == f"/one {what}, and an expired response stands in for it"
    assert bool(record.exc_info) is (does is fail)
    assert service.overdrive.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    # It was asked first, and what it answers once it is well again is what counts.
    route.does = lambda: None
    assert (await service.get("/one")).json() == 3


async def test_after_the_window_or_for_another_error_nothing_stands_in(service: Service) -> None:
    route = Route(service, stale_if_error=300)
    await service.get("/one")
    route.clock.tick(20)
    route.does = missing
    assert (await service.get("/one")).status_code == 404
    route.does = fail
    route.clock.tick(290)
    assert (await service.get("/one")).status_code == 500


async def test_it_answers_all_who_wait(service: Service) -> None:
    route = Route(service, stale_if_error=300)
    await service.get("/one")
    route.clock.tick(15)
    for does in (fail, unavailable):
        route.does = does
        runs = route.runs
        route.opened.clear()
        asking = [asyncio.create_task(service.get("/one")) for _ in range(5)]
        await eventually(lambda: route.runs == runs + 1)  # noqa: B023
        await asyncio.sleep(0.1)
        route.opened.set()
        assert {(each.status_code, each.text) for each in await asyncio.gather(*asking)} == {(200, "1")}
        assert route.runs == runs + 1


async def test_no_connection_is_held_while_it_is_sent(service: Service) -> None:
    route = Route(service, stale_if_error=300)
    held: list[int] = []
    pool: Any = service.overdrive.engine.pool
    await service.get("/one")
    route.clock.tick(15)
    for does in (fail, unavailable):
        route.does = does
        answer = await call(service.app, "/one", at_start=lambda: held.append(pool.checkedout()))
        assert (answer.status, answer.body) == (200, b"1")
    assert held == [0, 0]


async def test_a_commit_that_fails_is_such_an_error(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    route = Route(service, stale_if_error=300)
    await service.get("/one")
    route.clock.tick(15)

    async def lost(work: AsyncWork, status: int) -> None:
        await work.abandon()
        raise OSError("the connection is lost")

    monkeypatch.setattr(AsyncWork, "settle", lambda work, status: False)
    monkeypatch.setattr(AsyncWork, "end", lost)
    answer = await service.get("/one")
    assert (answer.status_code, answer.json()) == (200, 1)
    assert "detail=stale-if-error" in answer.headers["cache-status"]


async def test_what_has_begun_is_not_replaced(service: Service) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"begun"
        raise RuntimeError("broken")

    @service.app.get("/begun")
    @cached(ttl=10, stale_if_error=300)
    async def begun() -> Response:
        service.ran.append("/begun")
        return PlainTextResponse("whole") if len(service.ran) == 1 else StreamingResponse(broken())

    clock = service.overdrive.cache.clock = Clock()
    await service.get("/begun")
    clock.tick(11)
    answer = await call(service.app, "/begun")
    assert (answer.starts, answer.body) == (1, b"begun")
    assert "broken" in str(answer.error)


async def test_a_request_that_has_written_is_answered_its_error(service: Service) -> None:
    @service.app.get("/writes")
    @cached(ttl=10, stale_if_error=300)
    async def writes(db: SessionDep, response: Response) -> int:
        if service.ran:
            await db.execute(insert(Item).values(name="x"))
            await db.flush()
            raise RuntimeError("broken")
        service.ran.append("writes")
        return 1

    clock = service.overdrive.cache.clock = Clock()
    await service.get("/writes")
    clock.tick(11)
    assert (await service.get("/writes")).status_code == 500


async def test_where_the_database_is_away(postgres_database: str, redis_url: str) -> None:
    async with serve(postgres_database, redis_url) as service:

        @service.app.get("/names2")
        @cached(ttl=10, stale_if_error=300)
        async def names(db: SessionDep) -> list[str]:
            return list(await db.scalars(select(Item.name)))

        clock = service.overdrive.cache.clock = Clock()
        assert (await service.get("/names2")).json() == ["first"]
        clock.tick(11)
        name = service.overdrive.engine.url.database
        admin = outside(service.overdrive.engine.url.set(database="postgres").render_as_string(hide_password=False))
        service.database.dispose()
        with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))
            answer = await service.get("/names2")
            assert (answer.status_code, answer.json()) == (200, ["first"])
            assert "fwd-status=500; detail=stale-if-error" in answer.headers["cache-status"]
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        assert (await service.get("/names2")).headers["x-cache"] == "miss"
        admin.dispose()


# What is declared wrong


@pytest.mark.parametrize("name", ["ttl", "stale_while_revalidate", "stale_if_error", "browser_ttl"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "60", True, timedelta(seconds=-1)], ids=str)
def test_what_is_no_time_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"@cached\({name}=\.\.\.\) takes a.* number of seconds"):
        cached(**{name: value})


@pytest.mark.parametrize("value", [0, timedelta(0)])
def test_a_time_to_live_is_positive(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="positive"):
        cached(ttl=value)


def test_windows_over_a_socket(sqlite_url: str) -> None:
    app, runs = FastAPI(), list[int]()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True)
    clock = overdrive.cache.clock = Clock()

    @app.get("/one")
    @cached(ttl=10, stale_while_revalidate=30)
    async def one() -> int:
        runs.append(1)
        return len(runs)

    with on_uvicorn(app) as (host, port), httpx2.Client(base_url=f"http://{host}:{port}") as http:
        assert http.get("/one").json() == 1
        clock.tick(11)
        answers = []
        for _ in range(100):
            answers.append(http.get("/one").json())
            if answers[-1] == 2:
                break
        assert answers[0] == 1
        assert answers[-1] == 2
    assert len(runs) == 2
