"""What a write has outdated, served for a while where the route says so; what was dropped by hand never."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from cache.service import Service, serve
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.security import HTTPBearer
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from support import Item, client, eventually, tables

from overdrive import ConfigurationError, Overdrive, SessionDep, cached
from overdrive.cache.entry import FORMAT, Entry, State
from overdrive.cache.redis import RedisStore
from overdrive.cache.tags import CALL, TENANT, dropped
from overdrive.inspection import explain
from overdrive.testing import Clock, caching

pytestmark = pytest.mark.anyio

BEHIND = "overdrive; hit; ttl=-6; detail=outdated"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.cache.refresh._PAUSE", 0.05)


async def add_one(db: AsyncSession) -> None:
    await db.execute(insert(Item).values(name="new"))


class Route:
    """A cached route that counts its runs, and does what a test says."""

    def __init__(self, service: Service, path: str = "/one", **options: Any) -> None:
        self.runs = 0
        self.service = service
        self.clock = service.overdrive.cache.clock = Clock()
        self.does: Callable[[Response], Any] = lambda _response: None
        options = {"ttl": 60, "stale_while_revalidate": 30, "outdated": True, **options}

        @service.app.get(path)
        @cached(**options)
        async def one(db: SessionDep, response: Response) -> int:
            self.runs += 1
            number = self.runs
            await db.scalar(select(Item.id))
            if isinstance(done := self.does(response), Awaitable):
                await done
            return number

        self.endpoint = one

    async def outdate(self) -> None:
        """Make the entry, and write what it has read five and a half seconds later."""
        assert (await self.service.get("/one")).json() == 1
        self.clock.tick(5.5)
        assert await self.service.write(add_one) == 200

    async def made_anew(self) -> None:
        await eventually(lambda: not self.service.overdrive.cache.refreshes._tasks)


# In its windows


async def test_it_is_served_while_it_is_made_anew(sqlite_url: str, stores_url: str | None) -> None:
    async with serve(sqlite_url, stores_url) as service:
        route = Route(service)
        await route.outdate()
        behind = await service.get("/one")
        assert (behind.json(), behind.headers["cache-status"], behind.headers["age"]) == (1, BEHIND, "5")
        await route.made_anew()
        fresh = await service.get("/one")
        assert (fresh.json(), fresh.headers["cache-status"]) == (2, "overdrive; hit; ttl=60")
        assert route.runs == 2


async def test_the_window_counts_from_when_it_was_made(service: Service) -> None:
    route = Route(service)
    await route.outdate()
    route.clock.tick(24.5)
    # Its time to live is not over yet.
    miss = await service.get("/one")
    assert (miss.json(), miss.headers["cache-status"]) == (2, "overdrive; fwd=stale; detail=invalidated; stored")


async def test_it_stands_in_for_an_error(service: Service) -> None:
    route = Route(service, stale_while_revalidate=0, stale_if_error=30)
    await route.outdate()
    route.does = unavailable
    answer = await service.get("/one")
    assert (answer.status_code, answer.json()) == (200, 1)
    assert answer.headers["cache-status"] == "overdrive; fwd=stale; fwd-status=503; detail=stale-if-error"
    route.clock.tick(24.5)
    assert (await service.get("/one")).status_code == 503


async def test_without_an_error_that_window_answers_nobody(service: Service) -> None:
    route = Route(service, stale_while_revalidate=0, stale_if_error=30)
    await route.outdate()
    assert (await service.get("/one")).json() == 2


async def test_it_answers_where_the_request_is_refused(postgres_url: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=postgres_url)

    @app.get("/kept")
    @cached(ttl=60, stale_if_error=600, outdated=True)
    async def kept(db: SessionDep) -> list[str]:
        return list(await db.scalars(select(Item.name)))

    with tables(postgres_url), caching(overdrive) as clock:
        async with client(app) as http:
            await http.get("/kept")
            async with overdrive.session() as db:
                await add_one(db)
            (gate,) = overdrive.admission._gates["default"]
            gate.queue.at_work, gate.queue.stands = 100, True
            clock.tick(5)
            answer = await http.get("/kept")
            gate.queue.at_work, gate.queue.stands = 0, False
            assert (answer.json(), answer.headers["cache-status"]) == ([], "overdrive; hit; ttl=-5; detail=overloaded")
            await eventually(lambda: not overdrive.cache.refreshes._tasks)
            assert (await http.get("/kept")).json() == ["new"]
    await overdrive.aclose()


async def test_heads_tags_and_gzip_are_those_of_a_hit(service: Service) -> None:
    @service.app.get("/long")
    @cached(ttl=60, stale_while_revalidate=30, outdated=True)
    async def long(db: SessionDep) -> list[str]:
        return ["long"] * 500 + list(await db.scalars(select(Item.name)))

    service.overdrive.cache.clock = Clock()
    made = await service.get("/long")
    await service.write(add_one)
    # Nothing is made anew meanwhile.
    service.overdrive.cache.refreshes.start = lambda *_: None  # type: ignore[method-assign]
    head = await service.http.head("/long")
    held = await service.get("/long", headers={"If-None-Match": made.headers["etag"]})
    packed = await service.get("/long")
    plain = await service.get("/long", headers={"Accept-Encoding": "identity"})
    answers = (head, held, packed, plain)
    assert [each.status_code for each in answers] == [200, 304, 200, 200]
    assert {each.headers["cache-status"] for each in answers} == {"overdrive; hit; ttl=0; detail=outdated"}
    assert (head.content, held.content, packed.json(), plain.json()) == (b"", b"", made.json(), made.json())
    assert packed.headers["content-encoding"] == "gzip" != plain.headers.get("content-encoding")


async def test_another_workers_write(sqlite_url: str, redis_url: str) -> None:
    async with serve(sqlite_url, redis_url) as one, serve(sqlite_url, redis_url) as other:
        route, _ = Route(one), Route(other)
        store = one.overdrive.cache.store
        assert isinstance(store, RedisStore)
        near = store._link().near
        assert near is not None
        while not len(near._entries):
            assert (await one.get("/one")).json() == 1
            await asyncio.sleep(0.01)
        changes = near._changes
        assert await other.write(add_one) == 200
        await eventually(lambda: near._changes > changes)
        behind = await one.get("/one")
        assert (behind.json(), behind.headers["cache-status"]) == (1, "overdrive; hit; ttl=0; detail=outdated")
        await route.made_anew()
        assert (await one.get("/one")).json() == 2


# What is gone


async def by_table(service: Service, _route: Route) -> None:
    await service.overdrive.cache.invalidate("items")


async def by_tag(service: Service, _route: Route) -> None:
    await service.overdrive.cache.invalidate("catalogue")


async def by_call(service: Service, route: Route) -> None:
    await service.overdrive.cache.invalidate(route.endpoint)


async def by_clear(service: Service, _route: Route) -> None:
    await service.overdrive.cache.clear()


@pytest.mark.parametrize("drop", [by_table, by_tag, by_call, by_clear])
@pytest.mark.parametrize("written", [False, True])
async def test_what_was_dropped_by_hand_is_gone(
    service: Service, drop: Callable[[Service, Route], Awaitable[None]], written: bool
) -> None:
    route = Route(service, stale_if_error=30, tags=["catalogue"])
    assert (await service.get("/one")).json() == 1
    if written:
        await service.write(add_one)
    await drop(service, route)
    route.does = unavailable
    assert (await service.get("/one")).status_code == 503
    route.does = lambda _response: None
    assert (await service.get("/one")).headers["x-cache"] == "miss"


async def test_a_tenants_are_gone_with_it(sqlite_url: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True, tenant=lambda request: request.headers["x-tenant"])

    @app.get("/one")
    @cached(ttl=60, stale_while_revalidate=30, outdated=True)
    async def one(db: SessionDep) -> list[str]:
        return list(await db.scalars(select(Item.name)))

    with tables(sqlite_url):
        async with client(app) as http:

            async def ask(tenant: str) -> str:
                return (await http.get("/one", headers={"X-Tenant": tenant})).headers["cache-status"].split("; ")[1]

            assert [await ask(tenant) for tenant in ("one", "other")] == ["fwd=uri-miss"] * 2
            async with overdrive.session() as db:
                await add_one(db)
            await overdrive.cache.clear(tenant="one")
            assert [await ask(tenant) for tenant in ("one", "other", "third")] == ["fwd=stale", "hit", "fwd=uri-miss"]
            await eventually(lambda: not overdrive.cache.refreshes._tasks)
    await overdrive.aclose()


async def test_a_redis_that_has_lost_all_stamps_serves_nothing(sqlite_url: str, redis_url: str) -> None:
    async with serve(sqlite_url, redis_url, max_bytes=0) as service:
        route = Route(service)
        await service.get("/one")
        async with Redis.from_url(redis_url) as redis:
            for name in await redis.keys("overdrive:tag:dropped/*"):
                await redis.delete(name)
            # A write in between, as a stamp that is made up is that of the last write.
            await service.write(add_one)
            assert (await service.get("/one")).headers["x-cache"] == "miss"
            await redis.delete("overdrive:clock")
        assert (await service.get("/one")).headers["x-cache"] == "miss"
        assert route.runs == 3


@pytest.mark.parametrize("status", [404, 410])
async def test_what_is_there_no_more_is_not_served_on(service: Service, status: int) -> None:
    route = Route(service, stale_if_error=30)

    async def look(_response: Response) -> None:
        raise HTTPException(status)

    await route.outdate()
    route.does = look
    assert (await service.get("/one")).json() == 1
    await route.made_anew()
    assert (await service.get("/one")).status_code == status


async def test_what_is_not_kept_any_more_is_not_served_on(service: Service) -> None:
    route = Route(service)
    await route.outdate()
    route.does = lambda response: response.headers.update({"cache-control": "no-store"})
    assert (await service.get("/one")).json() == 1
    await route.made_anew()
    assert (await service.get("/one")).json() == 3


@pytest.mark.parametrize("status", [206, 304, 401, 429, 500])
async def test_what_is_said_to_one_client_takes_it_from_nobody(service: Service, status: int) -> None:
    route = Route(service)

    async def refuse(response: Response) -> None:
        response.status_code = status
        if status >= 400:
            raise HTTPException(status)

    await route.outdate()
    route.does = refuse
    assert (await service.get("/one")).json() == 1
    await route.made_anew()
    assert (await service.get("/one")).json() == 1


async def test_what_was_refused_does_not_come_back(service: Service) -> None:
    route = Route(service)

    async def written_meanwhile(_response: Response) -> None:
        await asyncio.create_task(service.write(add_one))

    await route.outdate()
    route.does = written_meanwhile
    assert (await service.get("/one")).json() == 1
    await route.made_anew()
    route.does = lambda _response: None
    assert (await service.get("/one")).json() == 1
    await route.made_anew()
    assert (await service.get("/one")).json() == 3


@pytest.mark.parametrize("control", ["max-age=5, must-revalidate", "Proxy-Revalidate"])
async def test_a_response_may_forbid_it(service: Service, control: str) -> None:
    route = Route(service, stale_if_error=30)
    route.does = lambda response: response.headers.update({"cache-control": control})
    assert (await service.get("/one")).json() == 1
    await service.write(add_one)
    assert (await service.get("/one")).json() == 2
    # Nor where it has expired.
    route.clock.tick(61)
    route.does = unavailable
    assert (await service.get("/one")).status_code == 503


async def test_a_release_that_allows_it_serves_nothing_of_one_that_did_not(sqlite_url: str, redis_url: str) -> None:
    async with serve(sqlite_url, redis_url) as before, serve(sqlite_url, redis_url) as after:
        Route(before, outdated=False)
        Route(after)
        await before.get("/one")
        assert (await after.get("/one")).headers["x-cache"] == "miss"


# Whose it is


async def test_it_is_nobody_elses(service: Service) -> None:
    revoked: set[str] = set()
    bearer: Any = Depends(HTTPBearer())

    async def user(token: Any = bearer) -> str:
        if token.credentials in revoked:
            raise HTTPException(401)
        return str(token.credentials)

    @service.app.get("/mine")
    @cached(ttl=60, stale_while_revalidate=30, stale_if_error=30, outdated=True)
    async def mine(db: SessionDep, name: str = Depends(user)) -> list[Any]:
        return [name, await db.scalar(text("SELECT count(*) FROM items").columns(Item.id))] if revoked else [name]

    service.overdrive.cache.clock = Clock()

    async def ask(name: str) -> Any:
        return await service.get("/mine", headers={"Authorization": f"Bearer {name}"})

    assert (await ask("alice")).json() == ["alice"]
    await service.write(add_one)
    assert (await ask("bob")).headers["x-cache"] == "miss"
    assert (await ask("alice")).json() == ["alice"]
    revoked.add("alice")
    assert (await ask("alice")).status_code == 401


async def test_a_request_that_has_written_is_not_answered_with_it(service: Service) -> None:
    async def writing(db: SessionDep) -> None:
        await add_one(db)
        await db.commit()

    @service.app.get("/own", dependencies=[Depends(writing)])
    @cached(ttl=60, stale_while_revalidate=30, stale_if_error=30, outdated=True)
    async def own(db: SessionDep) -> int:
        return len(list(await db.scalars(select(Item.id))))

    assert [(await service.get("/own")).json() for _ in range(3)] == [2, 3, 4]


async def test_a_value_of_ones_own_is_never_outdated(service: Service) -> None:
    overdrive = service.overdrive

    async def load() -> list[str]:
        async with overdrive.session() as db:
            return list(await db.scalars(select(Item.name)))

    @service.app.get("/values")
    @cached(ttl=60, stale_while_revalidate=30, outdated=True)
    async def values() -> list[str]:
        return await overdrive.cache.get_or_set("names", load, ttl=60)

    assert (await service.get("/values")).json() == ["first"]
    await service.write(add_one)
    assert (await service.get("/values")).json() == ["first"]
    await eventually(lambda: not overdrive.cache.refreshes._tasks)
    assert (await service.get("/values")).json() == ["first", "new"]


# How it is treated


async def test_in_shadow_it_answers_nobody(service: Service) -> None:
    route = Route(service, stale_if_error=30, mode="shadow")
    await route.outdate()
    assert (await service.get("/one")).json() == 2
    await service.write(add_one)
    route.does = unavailable
    assert (await service.get("/one")).status_code == 503


async def test_it_is_no_mismatch(service: Service) -> None:
    route = Route(service, verify=1.0)
    await route.outdate()
    behind = await service.get("/one")
    assert (behind.json(), behind.headers["cache-status"]) == (1, BEHIND)
    await route.made_anew()
    counts = service.overdrive.cache.statistics()["GET /one"]
    assert (counts["checked"], counts["mismatches"], counts["stores"]) == (0, 0, 2)


async def test_what_is_switched_off_answers_nobody(service: Service) -> None:
    route = Route(service)
    await route.outdate()
    await service.overdrive.cache.off("/one")
    assert (await service.get("/one")).json() == 2


async def test_it_is_said_of_the_route_and_of_the_entry(sqlite_url: str, redis_url: str) -> None:
    def with_route(service: Service) -> None:
        @service.app.get("/rows")
        @cached(ttl=60, stale_while_revalidate=20, stale_if_error=600, outdated=True)
        async def rows(db: SessionDep) -> list[str]:
            return list(await db.scalars(select(Item.name)))

    async with serve(sqlite_url, redis_url) as service, serve(sqlite_url, redis_url) as explaining:
        for each in (service, explaining):
            with_route(each)
        await service.get("/rows")
        await service.write(add_one)
        found = await explain(explaining.app, "GET", "/rows", {"Host": "test"})
        assert found["entry"] == (
            "not valid: default/items was written since, and served for 20 s while it is made anew "
            "and 600 s in place of an error"
        )
        assert found["verdict"] == "cached; up to 600 s outdated"


@pytest.mark.parametrize(
    "options", [{"outdated": True}, {"outdated": 1, "stale_if_error": 3}, {"outdated": "yes", "stale_if_error": 3}]
)
def test_it_needs_a_window(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="give it stale_while_revalidate= or stale_if_error="):
        cached(**options)


# The core


def unavailable(_response: Response) -> None:
    raise HTTPException(503)


TAGS = st.sets(st.sampled_from(["default/a", "default/b#1f", "default/*", f"{CALL}1", f"{TENANT}1"]))


@given(TAGS, TAGS, TAGS, st.booleans(), st.booleans())
def test_nothing_is_served_that_was_dropped(
    tags: set[str], written: set[str], dropped_: set[str], may: bool, cleared: bool
) -> None:
    """Writes stamp tags, and whoever drops by hand stamps what tells of it besides."""
    own = tags | (dropped(tags) if may else set())
    entry = Entry(FORMAT, "f", "e", dict.fromkeys(own, 1), 0.0, 60.0, 200, [], b"")
    # No write names calls and tenants.
    written = {tag for tag in written if tag not in (f"{CALL}1", f"{TENANT}1")}
    now = entry.versions | dict.fromkeys(own & (written | dropped_ | dropped(dropped_)), 2)
    epoch = "other" if cleared else "e"
    is_gone = cleared or bool(tags & dropped_) or bool(dropped(tags) & dropped(dropped_))
    if entry.may_be_outdated(epoch, now):
        assert may
        assert not is_gone
    else:
        assert not may or is_gone or not dropped(tags)
    assert (entry.state(0, epoch, now) is State.FRESH) == (not cleared and not own & now.keys() - _same(entry, now))


def _same(entry: Entry, now: dict[str, int]) -> set[str]:
    return {tag for tag, stamp in entry.versions.items() if now[tag] == stamp}


@given(st.floats(0, 1e9), st.floats(0, 1e6), st.floats(-1e6, 1e9), st.floats(0, 1e6))
def test_no_answer_is_further_behind_than_its_window(created: float, ttl: float, after: float, window: float) -> None:
    entry = Entry(FORMAT, "f", "e", {}, created, ttl, 200, [], b"")
    if entry.answers(created + after, window, State.INVALIDATED):
        # Whenever it was written: that was after it was made.
        assert created + after - created < window
        assert entry.answers(created + after, window, State.EXPIRED)
