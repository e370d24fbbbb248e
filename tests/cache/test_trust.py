"""Modes, verified hits, switches and counts, over an app and both stores."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from itertools import count
from typing import Any

import httpx2
import pytest
from cache.service import Service, serve
from fastapi import Depends, FastAPI, HTTPException, Response
from pydantic import BaseModel
from redis.asyncio import Redis
from shell import Command
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.background import BackgroundTask
from support import Item, client, on_uvicorn

from overdrive import ConfigurationError, Overdrive, SessionDep, Settings, cached
from overdrive.cache.trust import hits, requests
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio

SHADOW = "overdrive; fwd=bypass; detail=shadow"
VERIFY = "overdrive; fwd=bypass; detail=verify"
OFF = "overdrive; fwd=bypass; detail=off"


class Rate(BaseModel):
    name: str
    rates: dict[str, int]


async def add_one(db: AsyncSession) -> None:
    await db.execute(insert(Item).values(name="new"))


async def written_by_another(service: Service) -> None:
    """Write as another request does, in a context of its own."""

    async def write() -> None:
        async with service.overdrive.session() as db:
            await add_one(db)

    await asyncio.create_task(write(), context=Context())


def drifting(service: Service, **options: Any) -> dict[str, Any]:
    """Add a route `/rate` that reads a table and something nobody sees; return that something."""
    state: dict[str, Any] = {"name": "secret-1", "rates": {"secret-key": 1}, "status": 200}

    @service.app.get("/rate", response_model=Rate)
    @cached(**options)
    async def rate(db: SessionDep, response: Response) -> Any:
        service.ran.append("/rate")
        await db.scalars(select(Item.name))
        if meanwhile := state.get("meanwhile"):
            await meanwhile()
        response.status_code = state["status"]
        return state

    return state


def counted(service: Service, route: str = "GET /rate") -> dict[str, int]:
    return service.overdrive.cache.statistics()[route]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "what is kept of it" in record.getMessage()]


# Shadow


async def test_shadow_sends_what_the_endpoint_gives_and_compares(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    state = drifting(service, mode="shadow")
    answers = [await service.get("/rate") for _ in range(3)]
    assert [each.headers["cache-status"] for each in answers] == [
        "overdrive; fwd=uri-miss; stored",
        SHADOW,
        SHADOW,
    ]
    assert len({each.headers["etag"] for each in answers}) == 1
    assert service.ran == ["/rate"] * 3
    assert (counted(service)["checked"], counted(service)["mismatches"]) == (2, 0)

    state["name"], state["rates"] = "secret-2", {"secret-key": 2}
    for _ in range(2):
        assert (await service.get("/rate")).json()["name"] == "secret-2"
    # What is kept was replaced, so that the second found no difference.
    assert (counted(service)["checked"], counted(service)["mismatches"], counted(service)["stores"]) == (4, 1, 2)
    [warning] = warnings(caplog)
    assert "$.name changed; $.rates.* changed" in warning
    assert "secret" not in warning


async def test_one_warning_a_minute(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    state = drifting(service, mode="shadow")
    for number in range(4):
        state["name"] = str(number)
        await service.get("/rate")
    assert counted(service)["mismatches"] == 3
    assert len(warnings(caplog)) == 1


async def test_a_write_meanwhile_is_no_mismatch(service: Service) -> None:
    state = drifting(service, mode="shadow")
    await service.get("/rate")

    async def meanwhile() -> None:
        state["name"] = "other"
        await written_by_another(service)

    state["meanwhile"] = meanwhile
    assert (await service.get("/rate")).headers["cache-status"] == SHADOW
    assert (counted(service)["checked"], counted(service)["mismatches"], counted(service)["stores"]) == (1, 0, 1)


@pytest.mark.parametrize(("status", "checked", "mismatches"), [(404, 1, 1), (500, 0, 0)])
async def test_another_status(service: Service, status: int, checked: int, mismatches: int) -> None:
    state = drifting(service, mode="shadow")
    await service.get("/rate")
    state["status"] = status
    assert (await service.get("/rate")).status_code == status
    assert (counted(service)["checked"], counted(service)["mismatches"]) == (checked, mismatches)
    assert counted(service)["stores"] == 1


async def test_nobody_waits_for_anothers_response_in_shadow(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    state = drifting(service, mode="shadow")
    monkeypatch.delattr("overdrive.cache.flight.Flight.landing")
    all_are_in = asyncio.Event()

    async def meanwhile() -> None:
        if len(service.ran) == 3:
            all_are_in.set()
        await asyncio.wait_for(all_are_in.wait(), 10)

    state["meanwhile"] = meanwhile
    answers = await asyncio.gather(*(service.get("/rate") for _ in range(3)))
    assert [each.status_code for each in answers] == [200] * 3
    assert service.ran == ["/rate"] * 3


async def test_a_response_with_a_task_in_it_replaces_nothing(service: Service) -> None:
    numbers = count()

    @service.app.get("/task")
    @cached(mode="shadow")
    async def task() -> Response:
        number = next(numbers)
        return Response(str(number), background=BackgroundTask(dict) if number else None)

    answers = [await service.get("/task") for _ in range(3)]
    assert [each.text for each in answers] == ["0", "1", "2"]
    assert answers[2].headers["cache-status"] == "overdrive; fwd=bypass; detail=background-task"
    assert counted(service, "GET /task")["stores"] == 1


async def test_what_is_not_kept_replaces_nothing(service: Service) -> None:
    numbers = count()

    @service.app.get("/cookie")
    @cached(mode="shadow")
    async def cookie(response: Response) -> int:
        if number := next(numbers):
            response.set_cookie("seen", str(number))
        return number

    answers = [await service.get("/cookie") for _ in range(3)]
    assert [each.json() for each in answers] == [0, 1, 2]
    assert counted(service, "GET /cookie")["stores"] == 1


# Verified hits


@pytest.mark.parametrize("guarded", [False, True])
async def test_a_share_of_hits_is_verified(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, guarded: bool
) -> None:
    # Each hit decides about the next one: every other is verified, beginning with the second.
    draws = iter([0.9, 0.1] * 20)
    monkeypatch.setattr("overdrive.cache.trust.random.random", lambda: next(draws))
    numbers = count()

    async def allowed() -> None: ...

    @service.app.get("/rate", dependencies=[Depends(allowed)] if guarded else [])
    @cached(verify=0.5)
    async def rate() -> int:
        return next(numbers)

    answers = [await service.get("/rate") for _ in range(6)]
    assert [each.headers["cache-status"] for each in answers[2::2]] == [VERIFY] * 2
    assert [each.headers["x-cache"] for each in answers] == ["miss", "hit", "bypass", "hit", "bypass", "hit"]
    # What was found to be different is replaced.
    assert [each.json() for each in answers] == [0, 0, 1, 1, 2, 2]
    assert (counted(service)["checked"], counted(service)["mismatches"]) == (2, 2)
    assert warnings(caplog) != []


async def test_all_or_no_hits_are_verified(service: Service) -> None:
    drifting(service, verify=1)
    assert await service.marks("/rate", "/rate", "/rate") == ["miss", "bypass", "bypass"]
    assert await service.marks(*["/names"] * 50) == ["miss"] + ["hit"] * 49
    assert counted(service, "GET /names")["checked"] == 0


@pytest.mark.parametrize(
    "options", [{"mode": "dark"}, {"mode": True}, {"verify": 1.1}, {"verify": -1}, {"verify": "1%"}]
)
def test_what_is_no_mode_and_no_share(options: Any) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        cached(**options)


async def test_settings_decide_where_a_route_says_nothing(sqlite_url: str) -> None:
    app, ran = FastAPI(), list[str]()
    settings = Settings(
        database_url=sqlite_url, cache={"mode": "shadow", "enabled": True, "off": ["GET /off/{number}", "/nowhere"]}
    )
    overdrive = Overdrive(app, settings=settings)

    @app.get("/shadow")
    @cached
    async def shadow() -> int:
        ran.append("shadow")
        return 1

    @app.get("/on")
    @cached(mode="on")
    async def on() -> int:
        ran.append("on")
        return 1

    @app.get("/off/{number}")
    @cached(mode="on")
    async def off(number: int) -> int:
        ran.append("off")
        return number

    async with client(app) as http:
        said = {
            path: [(await http.get(path)).headers["cache-status"] for _ in range(2)][1]
            for path in ("/shadow", "/on", "/off/1")
        }
    assert (said["/shadow"], said["/on"].partition("; ttl")[0], said["/off/1"]) == (SHADOW, "overdrive; hit", OFF)
    assert ran == ["shadow", "shadow", "on", "off", "off"]
    await overdrive.aclose()


async def test_a_name_in_the_settings_that_is_no_routes_is_told(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, settings=Settings(database_url=sqlite_url, cache={"off": ["/nowhere"]}))
    async with client(app) as http:
        await http.get("/")
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING] == [
        "OVERDRIVE_CACHE__OFF: no cached route is called /nowhere"
    ]
    await overdrive.aclose()


# Switches


async def test_a_route_that_is_off(service: Service) -> None:
    cache = service.overdrive.cache
    drifting(service)
    assert await service.marks("/rate", "/rate", "/names", "/names") == ["miss", "hit", "miss", "hit"]
    assert await cache.off("GET /rate") == {"/rate"}
    assert (await service.get("/rate")).headers["cache-status"] == OFF
    assert await service.marks("/rate", "/names") == ["bypass", "hit"]
    assert await cache.on("/rate") == frozenset()
    assert await service.marks("/rate") == ["hit"]
    assert service.ran.count("/rate") == 3


async def test_all_are_off_and_what_was_off_by_itself_stays_so(service: Service) -> None:
    cache = service.overdrive.cache
    drifting(service)
    await service.marks("/rate", "/names")
    await cache.off("/rate")
    assert await cache.off() == {"*", "/rate"}
    assert await service.marks("/rate", "/names") == ["bypass", "bypass"]
    loads = count()

    async def load() -> int:
        return next(loads)

    assert [await cache.get_or_set("key", load) for _ in range(2)] == [0, 1]
    assert await cache.on() == {"/rate"}
    assert await service.marks("/rate", "/names") == ["bypass", "hit"]
    assert [await cache.get_or_set("key", load) for _ in range(2)] == [2, 2]


async def test_writes_are_announced_while_it_is_off(service: Service) -> None:
    assert await service.marks("/names", "/names") == ["miss", "hit"]
    await service.overdrive.cache.off()
    await service.write(add_one)
    await service.overdrive.cache.on()
    answer = await service.get()
    assert (answer.headers["cache-status"], answer.json()) == (
        "overdrive; fwd=stale; detail=invalidated; stored",
        ["first", "new"],
    )


async def test_a_mode_off_writes_too(service: Service) -> None:
    drifting(service, mode="off")
    assert [(await service.get("/rate")).headers["cache-status"] for _ in range(2)] == [OFF, OFF]
    assert counted(service)["bypassed.off"] == 2


@pytest.mark.parametrize("name", ["/nowhere", "GET /nowhere", "POST /names", "names"])
async def test_a_name_that_is_no_routes(service: Service, name: str) -> None:
    await service.get()
    with pytest.raises(ConfigurationError, match="GET /names"):
        await service.overdrive.cache.off(name)


async def test_switches_and_counts_outlive_clearing_and_other_workers_hear_them(
    sqlite_url: str, redis_url: str
) -> None:
    async with serve(sqlite_url, redis_url) as service:
        other = Overdrive(FastAPI(), database_url=sqlite_url, redis_url=redis_url, cache=True)
        await service.marks("/names", "/names")
        await other.cache.off("/names")
        await other.cache.clear()
        # Heard with the look-up itself, not with the one after it.
        assert (await service.get()).headers["cache-status"] == OFF
        await other.cache.on("/names")
        assert await service.marks("/names", "/names") == ["miss", "hit"]
        await other.aclose()


async def test_the_command_switches_running_workers(overdrive: Command, sqlite_url: str, redis_url: str) -> None:
    def command(*arguments: str) -> str:
        return overdrive(*arguments, "--redis-url", redis_url).stdout

    async with serve(sqlite_url, redis_url) as service:
        with on_uvicorn(service.app) as (host, port):
            async with httpx2.AsyncClient(base_url=f"http://{host}:{port}") as http:

                async def mark() -> str:
                    return (await http.get("/names")).headers["x-cache"]

                assert [await mark(), await mark()] == ["miss", "hit"]
                told = await asyncio.to_thread(command, "off", "cache", "--route", "/names")
                assert (told, await mark()) == ("off now: /names\n", "bypass")
                told = await asyncio.to_thread(command, "off", "cache")
                assert told == "off now: the whole cache, and by themselves /names\n"
                assert await asyncio.to_thread(command, "on", "cache") == "off now: /names\n"
                assert await mark() == "bypass"
                assert await asyncio.to_thread(command, "on", "cache", "--route", "GET /names") == "off now: nothing\n"
                assert await mark() == "hit"


# Counts


async def test_counts_add_up(service: Service) -> None:
    clock = service.overdrive.cache.clock = Clock()
    failing = False

    async def allowed() -> None: ...

    @service.app.get("/counted", dependencies=[Depends(allowed)])
    @cached(ttl=10)
    async def behind(db: SessionDep) -> list[str]:
        if failing:
            raise HTTPException(503)
        return list(await db.scalars(select(Item.name)))

    async def written() -> None:
        await service.write(add_one)

    async def expired() -> None:
        clock.tick(11)

    async def off() -> None:
        await service.overdrive.cache.off("/counted")

    async def on() -> None:
        await service.overdrive.cache.on()
        await service.overdrive.cache.on("/counted")

    steps: list[Callable[[], Awaitable[None]] | None] = [None, None, written, None, expired, None, off, None, on, None]
    sent = 0
    for step in steps:
        if step is not None:
            await step()
        await service.get("/counted")
        sent += 1
    failing = True
    await service.write(add_one)
    assert (await service.get("/counted")).status_code == 503
    counts = counted(service, "GET /counted")
    assert requests(counts) == sent + 1
    assert (counts["late"], hits(counts), counts["misses"], counts["stale"]) == (5, 5, 4, 3)
    assert (counts["bypassed.off"], counts["stores"], counts["refused"]) == (2, 3, 0)
    assert counts["bytes"] > 0


async def test_where_a_hit_was_answered(service: Service) -> None:
    await service.marks(*["/names"] * 4)
    counts = counted(service, "GET /names")
    assert (counts["misses"], counts["at_once"], counts["early"]) == (1, 3, 0)


async def test_a_fill_that_is_refused(service: Service) -> None:
    state = drifting(service)

    async def meanwhile() -> None:
        await written_by_another(service)

    state["meanwhile"] = meanwhile
    await service.marks("/rate", "/rate")
    assert (counted(service)["refused"], counted(service)["stores"], counted(service)["misses"]) == (2, 0, 2)


async def test_a_failing_endpoint_is_counted(service: Service) -> None:
    @service.app.get("/broken")
    @cached
    async def broken() -> int:
        raise RuntimeError

    assert (await service.get("/broken")).status_code == 500
    assert requests(counted(service, "GET /broken")) == 1


async def test_workers_add_up_what_they_counted(
    sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(sqlite_url, redis_url, max_bytes=0) as service, Redis.from_url(redis_url) as server:
        cache = service.overdrive.cache
        await service.marks(*["/names"] * 3)
        assert await server.exists("overdrive:counts") == 0
        monkeypatch.setattr("overdrive.cache.cache._REPORT_INTERVAL", 0)
        await service.marks("/names")
        sums = await cache.store.sums()
        assert sums is not None
        assert (requests(sums["GET /names"]), hits(sums["GET /names"])) == (4, 3)
        assert 80_000 < await server.ttl("overdrive:counts") <= 86_400

        await service.overdrive.aclose()
        sums = await cache.store.sums()
        assert sums is not None
        assert (requests(sums["GET /names"]), hits(sums["GET /names"])) == (4, 3)
        assert sums["GET /names"]["bytes"] == cache.statistics()["GET /names"]["bytes"]
        await cache.store.aclose()


async def test_workers_whose_hits_ask_nobody_tell_of_them_too(
    sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.cache.cache._REPORT_INTERVAL", 0.1)
    async with serve(sqlite_url, redis_url) as service:
        await service.marks(*["/names"] * 10)
        for _ in range(100):
            sums = await service.overdrive.cache.store.sums() or {}
            if hits(sums.get("GET /names", {})) == 9:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"told of {sums}")


async def test_counts_wait_for_a_connection_and_not_for_redis(sqlite_url: str, redis_url: str) -> None:
    async with serve(sqlite_url, redis_url) as service:
        store = service.overdrive.cache.store
        assert store.add({("GET /names", "late"): 1}) is False
        await service.get()
        assert store.add({("GET /names", "late"): 1}) is True
        assert (await store.sums() or {})["GET /names"]["late"] == 1
