"""Cached routes: what is kept, what drops it, and what is never kept. Promise 1, over an app."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
import pytest
from cache.service import Service, Work, serve
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Select, delete, exists, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, foreign, joinedload, relationship, selectinload
from starlette.background import BackgroundTask
from support import Item, Other, names, recorded

from overdrive import (
    ConfigurationError,
    Overdrive,
    SessionDep,
    SyncSessionDep,
    cached,
    declare,
    get_session,
    priority,
)
from overdrive.instrumentation.events import RequestEvent
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio

MISS_AND_HIT = ["miss", "hit"]


# What a hit looks like


async def test_a_hit_is_the_miss_again(service: Service) -> None:
    miss, hit = await service.get(), await service.get()
    assert service.ran == ["/names"]
    assert (hit.status_code, hit.content) == (miss.status_code, miss.content) == (200, b'["first"]')

    added = {"x-request-id", "x-cache", "cache-status", "age"}
    own = [[pair for pair in answer.headers.raw if pair[0].decode() not in added] for answer in (miss, hit)]
    assert own[0] == own[1]
    assert dict(own[0])[b"cache-control"] == b"no-cache"

    assert miss.headers["cache-status"] == "overdrive; fwd=uri-miss; stored"
    assert (miss.headers["x-cache"], hit.headers["x-cache"]) == ("miss", "hit")
    assert "age" not in miss.headers


async def test_age_and_time_to_live_follow_the_caches_clock(service: Service) -> None:
    clock = service.overdrive.cache.clock = Clock()

    @service.app.get("/short")
    @cached(ttl=10)
    async def short() -> int:
        return 1

    await service.get("/short")
    clock.tick(3)
    hit = await service.get("/short")
    assert (hit.headers["age"], hit.headers["cache-status"]) == ("3", "overdrive; hit; ttl=7")
    clock.tick(7)
    expired = await service.get("/short")
    assert expired.headers["cache-status"] == "overdrive; fwd=stale; detail=expired; stored"
    assert (await service.get("/short")).headers["age"] == "0"


async def test_every_way_to_mark_a_route(service: Service) -> None:
    app, clock = service.app, Clock()
    service.overdrive.cache.clock = clock

    @app.get("/below")
    @cached()
    async def below() -> int:
        return 1

    @cached()
    @app.get("/above")
    async def above() -> int:
        return 1

    @cached(ttl=10)
    @app.get("/above-ttl")
    async def above_ttl() -> int:
        return 1

    @app.get("/below-ttl")
    @cached(ttl=timedelta(seconds=10))
    async def below_ttl() -> int:
        return 1

    @app.get("/unmarked")
    async def unmarked() -> int:
        return 1

    paths = ["/names", "/below", "/above", "/above-ttl", "/below-ttl"]
    assert await service.marks(*paths) == ["miss"] * 5
    assert await service.marks(*paths) == ["hit"] * 5
    assert await service.marks("/unmarked", "/unmarked") == [None, None]
    clock.tick(10)
    assert await service.marks(*paths) == ["hit", "hit", "hit", "miss", "miss"]
    clock.tick(50)
    assert await service.marks(*paths[:3]) == ["miss"] * 3


async def test_a_hit_sends_no_statement_and_says_so_in_its_event(service: Service) -> None:
    with recorded() as events:
        await service.get()
        await service.get()
        service.overdrive.cache.enabled = False
        await service.get()
        await service.write(nothing_done)
    requests = [event for event in events if isinstance(event, RequestEvent)]
    assert [event.cache_status for event in requests] == ["miss", "hit", "bypass", None]
    assert [event.statements for event in requests] == [1, 0, 1, 0]
    assert [event.route for event in requests] == ["/names", "/names", "/names", "/write"]


async def nothing_done(_db: Any) -> None:
    pass


async def test_plain_functions_are_cached_too(service: Service) -> None:
    @service.app.get("/plain")
    @cached
    def plain(db: SyncSessionDep) -> list[str]:
        return list(db.scalars(select(Item.name)))

    miss, hit = await service.get("/plain"), await service.get("/plain")
    assert (miss.headers["x-cache"], hit.headers["x-cache"]) == ("miss", "hit")
    assert hit.content == miss.content == b'["first"]'
    await service.write(orm_insert)
    assert await service.marks("/plain") == ["miss"]


async def test_a_response_object_is_kept_with_its_headers(service: Service) -> None:
    @service.app.get("/object")
    @cached
    async def object_() -> Response:
        return PlainTextResponse("text", headers={"X-Own": "1", "Cache-Control": "public, max-age=5"})

    await service.get("/object")
    hit = await service.get("/object")
    assert (hit.headers["x-cache"], hit.text) == ("hit", "text")
    assert hit.headers["content-type"] == "text/plain; charset=utf-8"
    assert (hit.headers["x-own"], hit.headers["cache-control"]) == ("1", "public, max-age=5")


async def test_headers_of_dependencies_are_this_requests(service: Service) -> None:
    visits: list[int] = []

    def visit(response: Response) -> None:
        visits.append(1)
        response.headers["X-Visit"] = str(len(visits))

    @service.app.get("/visited", dependencies=[Depends(visit)])
    @cached
    async def visited(response: Response) -> int:
        response.headers["X-Made"] = "once"
        return 1

    await service.get("/visited")
    hit = await service.get("/visited")
    assert hit.headers["x-cache"] == "hit"
    assert hit.headers.get_list("x-visit") == ["2"]
    assert hit.headers.get_list("x-made") == ["once"]


async def test_an_error_in_place_of_a_stored_answer_is_no_hit(service: Service) -> None:
    async def leave() -> AsyncIterator[None]:
        yield
        if service.app.state.failing:
            raise HTTPException(503)

    @service.app.get("/left", dependencies=[Depends(leave, scope="function")])
    @cached
    async def left() -> int:
        return 1

    service.app.state.failing = False
    assert await service.marks("/left", "/left") == MISS_AND_HIT
    service.app.state.failing = True
    answer = await service.get("/left")
    assert (answer.status_code, answer.headers["cache-status"]) == (503, "overdrive; fwd=bypass; detail=status")
    assert "age" not in answer.headers


async def test_included_and_mounted_routes_have_entries_of_their_own(service: Service) -> None:
    router, mounted = APIRouter(), FastAPI()

    @router.get("/{number}")
    @mounted.get("/{number}")
    @cached
    async def echo(number: int, response: Response) -> int:
        service.ran.append(str(number))
        return number

    service.app.include_router(router, prefix="/one")
    service.app.include_router(router, prefix="/other")
    service.app.mount("/mounted", mounted)
    for prefix in ("/one", "/other", "/mounted"):
        assert await service.marks(f"{prefix}/1", f"{prefix}/1", f"{prefix}/2") == ["miss", "hit", "miss"], prefix
    assert service.ran == ["1", "2"] * 3


# What drops an entry


async def orm_insert(db: AsyncSession) -> None:
    db.add(Item(name="new"))


async def orm_update(db: AsyncSession) -> None:
    (await db.get_one(Item, 1)).name = "new"


async def orm_delete(db: AsyncSession) -> None:
    await db.delete(await db.get_one(Item, 1))


async def bulk_update(db: AsyncSession) -> None:
    await db.execute(update(Item).values(name="new"))


async def bulk_delete(db: AsyncSession) -> None:
    await db.execute(delete(Item).where(Item.id == 1))


async def core_insert(db: AsyncSession) -> None:
    await (await db.connection()).execute(insert(Item.__table__).values(name="new"))


async def textual(db: AsyncSession) -> None:
    await db.execute(text("UPDATE items SET name = 'new'"))


async def driver_sql(db: AsyncSession) -> None:
    await (await db.connection()).exec_driver_sql("UPDATE items SET name = 'new'")


async def released_savepoint(db: AsyncSession) -> None:
    async with db.begin_nested():
        db.add(Item(name="new"))


async def committed_by_the_endpoint(db: AsyncSession) -> None:
    db.add(Item(name="new"))
    await db.commit()


IN_A_SESSION = [
    orm_insert,
    orm_update,
    orm_delete,
    bulk_update,
    bulk_delete,
    core_insert,
    textual,
    driver_sql,
    released_savepoint,
    committed_by_the_endpoint,
]


async def session_of_a_script(service: Service) -> None:
    async with service.overdrive.session() as db:
        await orm_insert(db)


async def sync_session_of_a_script(service: Service) -> None:
    def work() -> None:
        with service.overdrive.sync_session() as db:
            db.add(Item(name="new"))

    await anyio.to_thread.run_sync(work)


async def connection_of_the_engine(service: Service) -> None:
    async with service.overdrive.engine.begin() as connection:
        await connection.execute(insert(Item).values(name="new"))


async def plain_function(service: Service) -> None:
    assert (await service.http.post("/plain-write")).status_code == 200


@pytest.mark.parametrize("work", IN_A_SESSION)
async def test_a_write_drops_what_read_its_table(on_each_driver: Service, work: Work) -> None:
    service = on_each_driver
    assert await service.marks("/names", "/names") == MISS_AND_HIT
    assert await service.write(work) == 200
    answer = await service.get()
    assert answer.headers["cache-status"] == "overdrive; fwd=stale; detail=invalidated; stored"
    assert answer.json() == names(service.database) != ["first"]
    assert await service.marks("/names") == ["hit"]


@pytest.mark.parametrize(
    "work", [session_of_a_script, sync_session_of_a_script, connection_of_the_engine, plain_function]
)
async def test_so_does_one_outside_the_requests_session(on_each_driver: Service, work: Any) -> None:
    service = on_each_driver

    @service.app.post("/plain-write")
    def plain_write(db: SyncSessionDep) -> None:
        db.add(Item(name="new"))

    assert await service.marks("/names", "/names") == MISS_AND_HIT
    await work(service)
    answer = await service.get()
    assert answer.headers["x-cache"] == "miss"
    assert answer.json() == names(service.database) == ["first", "new"]


async def other_table(db: AsyncSession) -> None:
    db.add(Other(name="new"))


async def rolled_back(db: AsyncSession) -> None:
    db.add(Item(name="new"))
    await db.flush()
    await db.rollback()


async def refused(db: AsyncSession) -> None:
    db.add(Item(name="new"))
    await db.flush()
    raise HTTPException(409)


@pytest.mark.parametrize(("work", "status"), [(other_table, 200), (rolled_back, 200), (refused, 409)])
async def test_nothing_is_dropped_needlessly(on_each_driver: Service, work: Work, status: int) -> None:
    service = on_each_driver
    assert await service.marks("/names", "/names") == MISS_AND_HIT
    assert await service.write(work) == status
    assert await service.marks("/names") == ["hit"]
    assert names(service.database) == ["first"]


class Mapped(DeclarativeBase):
    pass


class MappedOther(Mapped):
    __table__ = Other.__table__


class MappedItem(Mapped):
    __table__ = Item.__table__
    other = relationship(
        MappedOther, primaryjoin=foreign(Item.__table__.c.id) == Other.__table__.c.id, viewonly=True, uselist=False
    )


READS: dict[str, Select[Any]] = {
    "join": select(Item.id, Other.name).join(Other, Other.id == Item.id),
    "outer join": select(Item.id, Other.name).outerjoin(Other, Other.id == Item.id),
    "joinedload": select(MappedItem).options(joinedload(MappedItem.other)),
    "selectinload": select(MappedItem).options(selectinload(MappedItem.other)),
    "exists": select(Item.id).where(exists().where(Other.name == "new")),
    "in": select(Item.id).where(Item.id.in_(select(Other.id))),
    "scalar subquery": select(Item.id, select(func.count()).select_from(Other).scalar_subquery()),
    "cte": select(select(Other.name).cte("recent")),
    "union": select(Item.name).union(select(Other.name)),
}


@pytest.mark.parametrize("statement", READS.values(), ids=READS.keys())
async def test_every_table_of_a_statement_is_a_dependency(service: Service, statement: Select[Any]) -> None:
    @service.app.get("/read")
    @cached
    async def read(db: SessionDep) -> int:
        return len((await db.execute(statement)).all())

    assert await service.marks("/read", "/read") == MISS_AND_HIT
    await service.write(other_table)
    assert await service.marks("/read") == ["miss"]


async def test_what_a_dependency_reads_is_a_dependency(service: Service) -> None:
    async def count(db: SessionDep) -> int | None:
        return await db.scalar(select(func.count()).select_from(Other))

    @service.app.get("/counted")
    @cached
    async def counted(number: int = Depends(count)) -> int:
        return number

    # Nobody knows the time at which the first dependency of a process reads from a shared store.
    await service.marks("/names", "/counted")
    assert await service.marks("/counted") == ["hit"]
    await service.write(other_table)
    answer = await service.get("/counted")
    assert (answer.headers["x-cache"], answer.text) == ("miss", "2")


async def test_clear_and_invalidate(service: Service) -> None:
    @service.app.get("/others")
    @cached
    async def others(db: SessionDep) -> list[str]:
        return list(await db.scalars(select(Other.name)))

    cache, paths = service.overdrive.cache, ["/names", "/others"]
    await service.marks(*paths)
    await cache.invalidate("items")
    assert await service.marks(*paths) == ["miss", "hit"]
    await cache.invalidate("unheard-of")
    assert await service.marks(*paths) == ["hit", "hit"]
    await cache.clear()
    assert await service.marks(*paths) == ["miss", "miss"]
    assert await service.marks(*paths) == ["hit", "hit"]


async def test_tags_of_ones_own_drop_a_routes_responses(service: Service) -> None:
    @service.app.get("/products")
    @cached(tags=("catalogue", "prices/eur"))
    async def products(q: str = "") -> str:
        return q

    @service.app.get("/free", dependencies=[Depends(nothing_read)])
    @cached(tags=["catalogue"])
    async def behind_dependencies() -> int:
        return 1

    cache, paths = service.overdrive.cache, ["/products", "/products?q=x", "/free", "/names"]
    await service.marks(*paths)
    for _ in range(2):
        assert await service.marks(*paths) == ["hit"] * 4
        await cache.invalidate("catalogue")
        assert await service.marks(*paths) == ["miss"] * 3 + ["hit"]
    await cache.invalidate("prices/eur")
    assert await service.marks(*paths) == ["miss"] * 2 + ["hit"] * 2


def nothing_read() -> None:
    pass


async def test_a_tag_that_is_dropped_meanwhile_keeps_the_response_out(service: Service, gate: Gate) -> None:
    @service.app.get("/held")
    @cached(tags=["catalogue"])
    async def held() -> int:
        await gate.wait()
        return 1

    await service.get()
    older = asyncio.create_task(service.get("/held"))
    await asyncio.wait_for(gate.reached.wait(), 10)
    await service.overdrive.cache.invalidate("catalogue")
    gate.opened.set()
    await older
    assert await service.marks("/held", "/held") == MISS_AND_HIT


async def test_a_release_with_other_tags_has_entries_of_its_own(sqlite_url: str, redis_url: str) -> None:
    # What the former release has kept could not be dropped by the tag.
    def release(tags: list[str]) -> Callable[[Service], None]:
        def add(service: Service) -> None:
            service.app.get("/tagged")(cached(tags=tags)(same))

        return add

    for tags in ([], ["catalogue"]):
        async with serve(sqlite_url, redis_url) as service:
            release(tags)(service)
            assert await service.marks("/tagged", "/tagged") == MISS_AND_HIT


async def same() -> int:
    return 1


@pytest.mark.parametrize("wrong", ["catalogue", 5, None, [5], [""], [None]])
def test_tags_are_names(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="tag"):
        cached(tags=wrong)


class Shop:
    async def products(self) -> int:
        return 1


@pytest.mark.parametrize("mark", [cached, priority("high"), partial(declare, ignore=True)])
def test_a_bound_method_takes_no_mark(mark: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigurationError, match="where its class defines it"):
        mark(Shop().products)
    mark(Shop.products)


async def test_invalidate_takes_names_alone(service: Service) -> None:
    for wrong in (5, "", None):
        with pytest.raises(ConfigurationError, match="a tag is a name"):
            await service.overdrive.cache.invalidate(wrong)  # type: ignore[call-overload]


async def test_switched_off_and_on_at_run_time(service: Service) -> None:
    cache = service.overdrive.cache
    await service.get()
    cache.enabled = False
    bypassed = await service.get()
    assert bypassed.headers["cache-status"] == "overdrive; fwd=bypass; detail=off"
    assert bypassed.headers["x-cache"] == "bypass"
    await service.write(orm_insert)
    cache.enabled = True
    # What was written in between was heard of.
    assert await service.marks("/names", "/names") == MISS_AND_HIT


async def test_off_under_pytest_unless_asked_for(sqlite_url: str) -> None:
    overdrive = Overdrive(FastAPI(), database_url=sqlite_url)
    assert not overdrive.cache.enabled
    await overdrive.aclose()


# Writes that come in between


@pytest.fixture
def gate() -> Gate:
    return Gate()


class Gate:
    """Holds a request up at a place of the test's choice."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await self.opened.wait()


async def written_at_the_gate(service: Service, gate: Gate) -> None:
    """The older answer may be sent, but must not be served once the write was answered."""
    older = asyncio.create_task(service.get("/held"))
    await asyncio.wait_for(gate.reached.wait(), 10)
    assert await service.write(orm_insert) == 200
    gate.opened.set()
    assert (await older).json() == ["first"]
    after = await service.get("/held")
    assert (after.headers["x-cache"], after.json()) == ("miss", ["first", "new"])
    assert await service.marks("/held") == ["hit"]


def hold_after_reading(service: Service, gate: Gate) -> None:
    @service.app.get("/held")
    @cached
    async def held(db: SessionDep) -> list[str]:
        found = list(await db.scalars(select(Item.name).order_by(Item.id)))
        await gate.wait()
        return found


def hold_in_a_dependency(service: Service, gate: Gate) -> None:
    async def read(db: SessionDep) -> list[str]:
        found = list(await db.scalars(select(Item.name).order_by(Item.id)))
        await gate.wait()
        return found

    reading = Depends(read)

    @service.app.get("/held")
    @cached
    async def held(found: list[str] = reading) -> list[str]:
        return found


PLACES = [hold_after_reading, hold_in_a_dependency]


@pytest.mark.parametrize("place", PLACES)
async def test_an_answer_that_was_overtaken_is_not_served(
    on_each_driver: Service, gate: Gate, place: Callable[..., None]
) -> None:
    place(on_each_driver, gate)
    await written_at_the_gate(on_each_driver, gate)


@pytest.mark.parametrize("place", PLACES)
async def test_nor_is_it_over_either_store(service: Service, gate: Gate, place: Callable[..., None]) -> None:
    place(service, gate)
    await service.get()
    await written_at_the_gate(service, gate)


async def test_an_answer_overtaken_before_it_reads_is_new(service: Service, gate: Gate) -> None:
    @service.app.get("/held")
    @cached
    async def held(db: SessionDep) -> list[str]:
        await gate.wait()
        return list(await db.scalars(select(Item.name).order_by(Item.id)))

    asking = asyncio.create_task(service.get("/held"))
    await asyncio.wait_for(gate.reached.wait(), 10)
    await service.write(orm_insert)
    gate.opened.set()
    assert (await asking).json() == (await service.get("/held")).json() == ["first", "new"]


# What is never kept


async def test_a_response_that_wrote_is_not_kept(service: Service) -> None:
    @service.app.get("/counting")
    @cached
    async def counting(db: SessionDep) -> int:
        db.add(Other(name="visit"))
        await db.flush()
        return 1

    for _ in range(2):
        assert (await service.get("/counting")).headers["cache-status"] == "overdrive; fwd=uri-miss; detail=wrote"


async def test_a_request_whose_dependencies_wrote_is_not_answered_from_the_cache(service: Service) -> None:
    async def audit(db: SessionDep) -> None:
        if service.app.state.audited:
            db.add(Other(name="audit"))
            await db.flush()

    @service.app.get("/audited", dependencies=[Depends(audit)])
    @cached
    async def audited(db: SessionDep) -> list[str]:
        return list(await db.scalars(select(Item.name)))

    service.app.state.audited = False
    assert await service.marks("/audited", "/audited") == MISS_AND_HIT
    service.app.state.audited = True
    assert (await service.get("/audited")).headers["cache-status"] == "overdrive; fwd=bypass; detail=wrote"


async def test_reads_that_name_no_tables_are_not_kept_and_the_log_says_why(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    @service.app.get("/textual/{number}")
    @cached
    async def textual(number: int, db: SessionDep) -> int:
        return len((await db.execute(text("SELECT name FROM items"))).all())

    with caplog.at_level(logging.WARNING, "overdrive"):
        answers = [await service.get(f"/textual/{number}") for number in (1, 1, 2)]
    said = {answer.headers["cache-status"] for answer in answers}
    assert said == {"overdrive; fwd=uri-miss; detail=unknown-reads"}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "/textual/{number} is marked @cached" in warnings[0]
    assert "textual SQL names no tables" in warnings[0]
    assert "@cached(depends=[...])" in warnings[0]


async def test_reads_that_name_no_tables_are_kept_where_they_are_declared(service: Service) -> None:
    @service.app.get("/counted")
    @cached(depends=["items"])
    async def counted(db: SessionDep) -> int:
        return (await db.execute(text("SELECT count(*) FROM items"))).scalar_one()

    async def other(db: AsyncSession) -> None:
        await db.execute(insert(Other).values(name="new"))

    async def item(db: AsyncSession) -> None:
        await db.execute(insert(Item).values(name="new"))

    async def anything(db: AsyncSession) -> None:
        await db.execute(text("DELETE FROM items"))

    assert await service.marks("/counted", "/counted") == MISS_AND_HIT
    await service.write(other)
    assert await service.marks("/counted") == ["hit"]
    for work, count in ((item, 2), (anything, 0)):
        await service.write(work)
        answer = await service.get("/counted")
        assert (answer.headers["x-cache"], answer.json()) == ("miss", count)
        assert await service.marks("/counted") == ["hit"]


async def cookie() -> Response:
    return PlainTextResponse("", headers={"Set-Cookie": "session=1"})


async def private() -> Response:
    return PlainTextResponse("", headers={"Cache-Control": "private"})


async def varying() -> Response:
    return PlainTextResponse("", headers={"Vary": "Accept-Language"})


async def missing() -> Response:
    raise HTTPException(404)


async def created() -> Response:
    return PlainTextResponse("", 201)


async def stream() -> Response:
    async def chunks() -> AsyncIterator[str]:
        yield "a"
        yield "b"

    return StreamingResponse(chunks())


async def large() -> Response:
    return PlainTextResponse("x" * 1_048_577)


async def misstated() -> Response:
    return PlainTextResponse("", headers={"Content-Length": "many"})


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        (cookie, "set-cookie"),
        (private, "cache-control"),
        (varying, "vary"),
        (missing, "status"),
        (created, "status"),
        (stream, "stream"),
        (large, "size"),
        (misstated, "stream"),
    ],
)
async def test_responses_that_are_not_kept(service: Service, endpoint: Any, why: str) -> None:
    service.app.get("/", response_model=None)(cached(endpoint))
    for _ in range(2):
        answer = await service.get("/")
        assert answer.headers["cache-status"] == f"overdrive; fwd=uri-miss; detail={why}"
        assert answer.headers["x-cache"] == "miss"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD"])
async def test_only_get_is_cached(service: Service, method: str) -> None:
    @service.app.api_route("/any", methods=["GET", method])
    @cached
    async def any_() -> int:
        service.ran.append("/any")
        return 1

    await service.marks("/any", "/any")
    for _ in range(2):
        answer = await service.http.request(method, "/any")
        assert (answer.status_code, answer.headers.get("x-cache")) == (200, None)
    assert service.ran == ["/any"] * 3


async def test_an_answer_cut_off_in_its_middle_is_not_kept(service: Service) -> None:
    async def cut_off() -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"half"
            raise ConnectionResetError

        return StreamingResponse(chunks(), headers={"Content-Length": "8"})

    service.app.get("/", response_model=None)(cached(cut_off))
    await service.get("/")
    assert (await service.get("/")).headers["x-cache"] == "miss"


# Routes that cannot be cached, and say so at start


async def whole_request(request: Request) -> int:
    return len(request.headers)


class EveryHeader(BaseModel):
    model_config = ConfigDict(extra="allow")


async def every_header(headers: Annotated[EveryHeader, Header()]) -> int:
    return 1


async def perhaps_every_header(headers: Annotated[EveryHeader | None, Header()] = None) -> int:
    return 1


async def background(tasks: BackgroundTasks) -> int:
    return 1


def hidden(count: int = Depends(whole_request)) -> int:
    return count


async def behind_a_dependency(count: int = Depends(hidden)) -> int:
    return count


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        (whole_request, "whole_request() takes the whole request"),
        (behind_a_dependency, "whole_request() takes the whole request"),
        (background, "background() takes BackgroundTasks"),
        (perhaps_every_header, "perhaps_every_header() takes every header or cookie there is"),
        (every_header, "every_header() takes every header or cookie there is"),
    ],
)
async def test_an_unknowable_route_is_not_cached_and_the_log_says_why(
    service: Service, caplog: pytest.LogCaptureFixture, endpoint: Any, why: str
) -> None:
    service.app.get("/unknowable")(cached(endpoint))
    with caplog.at_level(logging.WARNING, "overdrive"):
        service.overdrive.installation.install()
    assert f"GET /unknowable is marked @cached but is not cached: {why}" in caplog.text
    assert await service.marks("/unknowable", "/unknowable") == [None, None]


# Overridden dependencies


async def get_db() -> AsyncIterator[AsyncSession]:
    raise AssertionError("this one is overridden")
    yield


TeamSession = Annotated[AsyncSession, Depends(get_db)]


def language(accept_language: str = Header("en")) -> str:
    return accept_language


async def test_an_overridden_dependency_is_not_in_the_key_so_nothing_is_cached(service: Service) -> None:
    @service.app.get("/language")
    @cached
    async def speak(spoken: str = Depends(language)) -> str:
        return spoken

    assert await service.marks("/language", "/language") == MISS_AND_HIT
    service.app.dependency_overrides[language] = lambda: "fr"
    answer = await service.get("/language")
    assert answer.text == '"fr"'
    assert answer.headers["cache-status"] == "overdrive; fwd=bypass; detail=overridden-dependency"
    del service.app.dependency_overrides[language]
    assert (await service.get("/language")).text == '"en"'


async def test_a_session_of_ours_in_place_of_the_teams_is_no_obstacle(service: Service) -> None:
    @service.app.get("/team")
    @cached
    async def team(db: TeamSession) -> list[str]:
        return list(await db.scalars(select(Item.name)))

    service.app.dependency_overrides[get_db] = get_session
    assert await service.marks("/team", "/team") == MISS_AND_HIT
    await service.write(orm_insert)
    assert await service.marks("/team") == ["miss"]


async def test_response_with_a_task_in_it_is_not_stored(service: Service) -> None:
    ran: list[int] = []

    @service.app.get("/task")
    @cached
    async def task() -> Response:
        return PlainTextResponse("done", background=BackgroundTask(ran.append, 1))

    for _ in range(2):
        answer = await service.get("/task")
        assert answer.headers["cache-status"] == "overdrive; fwd=bypass; detail=background-task"
    assert ran == [1, 1]


async def set_header(response: Response) -> None:
    response.headers["x-dependency"] = "set"


async def test_hit_of_a_response_object_has_the_headers_of_the_miss(service: Service) -> None:
    @service.app.get("/object", dependencies=[Depends(set_header)])
    @cached
    async def plain() -> Response:
        return PlainTextResponse("text")

    first, second = await service.get("/object"), await service.get("/object")
    assert (first.headers["x-cache"], second.headers["x-cache"]) == ("miss", "hit")
    assert "x-dependency" not in first.headers
    assert "x-dependency" not in second.headers


async def test_what_a_middleware_has_read_before_a_write_is_not_stored_after_it(service: Service) -> None:
    """The clock is noted before anything of the request is read, in its outermost layer too."""
    seen: list[list[str]] = []

    async def write() -> None:
        async with service.overdrive.session() as db:
            db.add(Item(name="meanwhile"))

    class Reading:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async with service.overdrive.session() as db:
                seen.append(list(await db.scalars(select(Item.name))))
            if len(seen) == 1:
                # Somebody else's write, not this request's.
                await asyncio.create_task(write(), context=Context())
            await self.app(scope, receive, send)

    service.app.add_middleware(Reading)

    @service.app.get("/seen")
    @cached
    async def newest() -> list[str]:
        return seen[-1]

    assert "meanwhile" not in (await service.get("/seen")).json()
    second = await service.get("/seen")
    assert (second.headers["x-cache"], "meanwhile" in second.json()) == ("miss", True)
    assert (await service.get("/seen")).headers["x-cache"] == "hit"
