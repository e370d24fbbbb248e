"""Totals and page boundaries that the cache keeps: what every request would find out again, and not one row else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context
from typing import Any, Literal

import httpx2
import pytest
import sqlalchemy
from cache.conftest import patient as patient
from fastapi import FastAPI, Request
from pydantic import BaseModel
from sqlalchemy import delete, event, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, with_loader_criteria
from support import Item, Other, client, recorded, tables

from overdrive import (
    CountedPage,
    LimitOffsetPage,
    Overdrive,
    Page,
    SessionDep,
    Settings,
    SyncSessionDep,
    cached,
    paginate,
)
from overdrive.instrumentation.events import StatementEvent
from overdrive.pagination import boundary, number

pytestmark = pytest.mark.anyio

ROWS = 60


class Views(DeclarativeBase):
    pass


class Seen(Views):
    __tablename__ = "seen"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class ItemOut(BaseModel):
    id: int
    name: str


class Service:
    """An app with lists, and the statements that its requests send."""

    def __init__(
        self, app: FastAPI, overdrive: Overdrive, http: httpx2.AsyncClient, database: sqlalchemy.Engine
    ) -> None:
        self.app, self.overdrive, self.http, self.database = app, overdrive, http, database
        self.sent: list[str] = []

    async def get(self, path: str, **options: Any) -> Any:
        with recorded() as events:
            response = await self.http.get(path, **options)
        self.sent = [each.sql for each in events if isinstance(each, StatementEvent)]
        assert response.status_code == 200, response.text
        return response.json()

    async def total(self, path: str, **options: Any) -> tuple[int, int]:
        """The total of a page, and how many statements have counted for it."""
        total = (await self.get(path, **options))["total"]
        return total, sum("count(" in sql for sql in self.sent)

    async def write(self, statement: Any) -> None:
        self.app.state.statement = statement
        assert (await self.http.post("/write")).status_code == 200


def _routes(app: FastAPI) -> None:
    @app.get("/items", response_model=Page[ItemOut])
    async def items(db: SessionDep, name: str | None = None) -> Any:
        stmt = select(Item) if name is None else select(Item).where(Item.name == name)
        return await paginate(db, stmt.order_by(Item.name.desc()))

    @app.get("/slice", response_model=LimitOffsetPage[ItemOut])
    async def sliced(db: SessionDep) -> Any:
        return await paginate(db, select(Item).order_by(Item.name.desc()))

    @app.get("/bare", response_model=CountedPage[ItemOut])
    async def bare(db: SessionDep) -> Any:
        return await paginate(db, select(Item).order_by(Item.name.desc()), total="none")

    @app.get("/plain", response_model=Page[ItemOut])
    def plain(db: SyncSessionDep) -> Any:
        return paginate(db, select(Item).order_by(Item.name.desc()))

    @app.get("/view/{total}", response_model=CountedPage[ItemOut])
    async def view(total: Literal["exact", "none"], db: SessionDep) -> Any:
        return await paginate(db, select(Seen).order_by(Seen.name.desc()), total=total)

    @app.get("/capped", response_model=CountedPage[ItemOut])
    async def capped(db: SessionDep) -> Any:
        return await paginate(db, select(Item), total="capped")

    @app.post("/write")
    async def write(db: SessionDep) -> None:
        await db.execute(app.state.statement)


@asynccontextmanager
async def served(
    url: str, redis_url: str | None = None, *, keep: bool = True, pool: Any = None, **options: Any
) -> AsyncIterator[Service]:
    with tables(url) as database:
        with database.begin() as connection:
            connection.execute(insert(Item), [{"name": f"name {each % 7}"} for each in range(ROWS)])
        app = FastAPI()
        _routes(app)
        pagination = {"cache_totals": keep}
        settings = Settings.load(database_url=url, redis_url=redis_url, pagination=pagination, pool=pool or {})
        overdrive = Overdrive(app, settings=settings, cache=True, **options)
        async with client(app) as http:
            # What the server says of its isolation level is known from the first connection on.
            async with overdrive.session() as db:
                await db.execute(select(1))
            yield Service(app, overdrive, http, database)
        await overdrive.aclose()


@pytest.fixture(params=["aiosqlite", "asyncpg"])
def url(request: pytest.FixtureRequest) -> str:
    """A database under one async driver of each kind; plain functions bring psycopg."""
    return request.getfixturevalue("sqlite_url" if request.param == "aiosqlite" else "postgres_url")


@pytest.fixture
async def service(url: str) -> AsyncIterator[Service]:
    async with served(url) as made:
        yield made


@pytest.fixture
async def lite(sqlite_url: str) -> AsyncIterator[Service]:
    async with served(sqlite_url) as made:
        yield made


@pytest.fixture
def all_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each page but the first were far behind, and each row worth remembering."""
    monkeypatch.setattr(number, "DEEP", 0)
    monkeypatch.setattr(boundary, "NEAR", 0)


async def add(service: Service, name: str = "new") -> None:
    await service.write(insert(Item).values(name=name))


@contextmanager
def written_after_look_ups(service: Service) -> Iterator[None]:
    """Have somebody else write after each look-up, and before what is read then."""
    find = service.overdrive.cache.find

    async def write() -> None:
        async with service.overdrive.session() as db:
            await db.execute(insert(Item).values(name="late"))

    async def late(*args: Any, **options: Any) -> Any:
        turn = await find(*args, **options)
        await asyncio.create_task(write(), context=Context())
        return turn

    service.overdrive.cache.find = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        service.overdrive.cache.find = find  # type: ignore[method-assign]


@pytest.mark.usefixtures("all_deep")
async def test_nothing_is_kept_of_a_list_of_what_cannot_be_known(service: Service) -> None:
    with service.database.begin() as connection:
        connection.execute(text("CREATE VIEW seen AS SELECT id, name FROM items WHERE random() IS NOT NULL"))
    try:
        for gone in range(3):
            for total, rows in (("none", None), ("exact", ROWS - gone)):
                page = await service.get(f"/view/{total}?page=2&size=4")
                found = await service.get("/items?page=2&size=4")
                assert (page["items"], page["total"]) == (found["items"], rows)
            before = await service.get("/items?page=1&size=4")
            await service.write(delete(Item).where(Item.id == before["items"][0]["id"]))
    finally:
        with service.database.begin() as connection:
            connection.execute(text("DROP VIEW seen"))


# Totals


async def test_all_pages_of_a_list_are_counted_once(service: Service) -> None:
    assert await service.total("/items?size=5") == (ROWS, 1)
    for page in range(2, 6):
        assert await service.total(f"/items?size=5&page={page}") == (ROWS, 0)
    assert await service.total("/slice?limit=3") == (ROWS, 0)
    # Plain functions have another driver, whose statement is another text on PostgreSQL.
    await service.total("/plain?size=5")
    assert await service.total("/plain?size=5&page=2") == (ROWS, 0)


@pytest.mark.parametrize("path", ["/items?size=5", "/plain?size=5", "/capped?size=5"])
async def test_whoever_asks_after_a_write_is_told_the_new_total(service: Service, path: str) -> None:
    await service.total(path)
    assert await service.total(path) == (ROWS, 0)
    await add(service)
    assert await service.total(path) == (ROWS + 1, 1)
    await service.write(delete(Item).where(Item.name == "name 3"))
    total = ROWS + 1 - sum(each % 7 == 3 for each in range(ROWS))
    assert await service.total(path) == (total, 1)
    await service.write(insert(Other).values(name="elsewhere"))
    assert await service.total(path) == (total, 0)


async def test_lists_of_other_values_have_totals_of_their_own(lite: Service) -> None:
    for rest in (0, 1, 0):
        total, _ = await lite.total("/items", params={"name": f"name {rest}", "size": 2})
        assert total == sum(each % 7 == rest for each in range(ROWS))


async def test_a_count_of_ones_own_is_kept_by_its_values(lite: Service) -> None:
    @lite.app.get("/own", response_model=Page[ItemOut])
    async def own(db: SessionDep, names: str) -> Any:
        chosen = Item.name.in_(names.split(","))
        return await paginate(db, select(Item), count_query=select(func.count(Item.id)).where(chosen))

    for names, counted in (("name 1", 1), ("name 2,name 1", 1), ("name 1", 0), ("name 2,name 1", 0)):
        total = sum(f"name {each % 7}" in names for each in range(ROWS))
        assert await lite.total("/own?size=2", params={"size": 2, "names": names}) == (total, counted)


async def test_workers_share_what_is_kept(all_deep: None, url: str, redis_url: str) -> None:
    async with served(url, redis_url) as one:
        other_app = FastAPI()
        _routes(other_app)
        settings = Settings.load(database_url=url, redis_url=redis_url, pagination={"cache_totals": True})
        overdrive = Overdrive(other_app, settings=settings, cache=True)
        async with client(other_app) as http:
            other = Service(other_app, overdrive, http, one.database)
            async with overdrive.session() as db:
                await db.execute(select(1))
            await one.total("/items?size=5")
            assert await other.total("/items?size=5") == (ROWS, 0)
            for each in (one, other):
                await each.get("/items?size=5&page=7")
            assert not _skipped(other)
            await add(one)
            assert await one.total("/items?size=5") == (ROWS + 1, 1)
        await overdrive.aclose()


async def test_it_is_off_where_nobody_asks_for_it(sqlite_url: str) -> None:
    async with served(sqlite_url, keep=False) as service:
        assert [await service.total("/items?size=5") for _ in range(2)] == [(ROWS, 1)] * 2


async def test_those_who_count_at_once_count_once(service: Service) -> None:
    with recorded() as events:
        answers = await asyncio.gather(*(service.http.get(f"/items?size=5&page={page}") for page in range(1, 9)))
    assert {answer.json()["total"] for answer in answers} == {ROWS}
    assert sum("count(" in each.sql for each in events if isinstance(each, StatementEvent)) == 1


async def test_nobody_waits_with_a_connection_for_whoever_needs_it(sqlite_url: str) -> None:
    """One counts before it has a connection, and all there are belong to those who would wait for it."""
    async with served(sqlite_url, pool={"size": 2, "max_overflow": 0, "timeout": 5}) as service:
        both_read = asyncio.Barrier(3)

        @service.app.get("/second", response_model=Page[ItemOut])
        async def second(db: SessionDep) -> Any:
            await db.execute(select(Other))
            await both_read.wait()
            await asyncio.sleep(0.05)
            return await paginate(db, select(Item).order_by(Item.name.desc()))

        @service.app.get("/first", response_model=Page[ItemOut])
        async def first(db: SessionDep) -> Any:
            await both_read.wait()
            # It counts first, as its page is far behind.
            return await paginate(db, select(Item).order_by(Item.name.desc()))

        async with asyncio.timeout(4):
            paths = ("/second?size=5", "/second?size=5&page=2", "/first?size=5&page=900")
            answers = await asyncio.gather(*map(service.http.get, paths))
        assert [answer.json()["total"] for answer in answers] == [ROWS] * 3


async def test_tenants_count_for_themselves(sqlite_url: str) -> None:
    def tenant(request: Request) -> str | None:
        return request.headers.get("tenant")

    async with served(sqlite_url, tenant=tenant) as service:
        for name in ("a", "b"):
            assert await service.total("/items?size=5", headers={"tenant": name}) == (ROWS, 1)
            assert await service.total("/items?size=5", headers={"tenant": name}) == (ROWS, 0)
        for _ in range(2):
            # Nobody's: nothing is kept.
            assert await service.total("/items?size=5") == (ROWS, 1)


async def test_what_was_written_while_it_was_counted_is_not_kept(service: Service) -> None:
    """The other half of reading versions before: a fill is refused what was stamped since."""

    @service.app.get("/slow", response_model=Page[ItemOut])
    async def slow(db: SessionDep) -> Any:
        return await paginate(db, select(Item).order_by(Item.name.desc()))

    with written_after_look_ups(service):
        await service.total("/slow?size=5")
    # It looks twice: once more when it has a connection to count with.
    assert await service.total("/slow?size=5") == (ROWS + 2, 1)
    assert await service.total("/slow?size=5") == (ROWS + 2, 0)


# Who counts by themselves


async def _counts_anew(service: Service, path: str, total: int = ROWS) -> None:
    await service.total("/items?size=5")
    for _ in range(2):
        assert await service.total(path) == (total, 1)
    # Nor is what they have found anybody else's.
    assert await service.total("/items?size=5") == (ROWS, 0)


async def test_a_session_with_changes_counts_them(all_deep: None, service: Service) -> None:
    @service.app.get("/own", response_model=Page[ItemOut])
    async def own(db: SessionDep, how: str) -> Any:
        own = insert(Item).values(name="own")
        if how == "executed":
            await db.execute(own)
        elif how == "elsewhere":
            # As in a thread that was given no context: the request is not known to have written.
            await asyncio.create_task(db.execute(own), context=Context())  # type: ignore[arg-type]
        else:
            db.add(Item(name="own"))
        found = await paginate(db, select(Item).order_by(Item.name.desc()))
        db.expunge_all()
        await db.rollback()
        return found

    for how in ("executed", "elsewhere", "added"):
        # Far behind, rows are counted before any are read.
        await _counts_anew(service, f"/own?size=5&page=7&how={how}", ROWS + 1)


async def test_a_request_that_has_written_counts_anew(service: Service) -> None:
    @service.app.get("/own", response_model=Page[ItemOut])
    async def own(db: SessionDep) -> Any:
        await db.execute(update(Other).values(name="own"))
        await db.commit()
        return await paginate(db, select(Item).order_by(Item.name.desc()))

    await _counts_anew(service, "/own?size=5")


@pytest.mark.parametrize("how", ["option", "event", "execution_options"])
async def test_criteria_of_a_team_are_counted(service: Service, how: str) -> None:
    criterion = with_loader_criteria(Item, Item.name == "name 1")

    @service.app.get("/own", response_model=Page[ItemOut])
    async def own(db: SessionDep) -> Any:
        stmt = select(Item).order_by(Item.name.desc())
        if how == "option":
            stmt = stmt.options(criterion)
        elif how == "execution_options":
            stmt = stmt.execution_options(tenant=1)
        else:

            @event.listens_for(db.sync_session, "do_orm_execute")
            def filtered(state: Any) -> None:
                state.statement = state.statement.options(criterion)

        return await paginate(db, stmt)

    total = ROWS if how == "execution_options" else sum(each % 7 == 1 for each in range(ROWS))
    await _counts_anew(service, "/own?size=5", total)


async def test_what_a_transaction_has_set_is_heeded(all_deep: None, postgres_url: str) -> None:
    async with served(postgres_url) as service:

        @service.app.get("/own", response_model=Page[ItemOut])
        async def own(db: SessionDep, how: str) -> Any:
            if how == "isolation":
                await db.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            elif how == "text":
                await db.execute(text("SET LOCAL app.tenant = '1'"))
            elif how == "committed":
                await db.execute(text("SET app.tenant = '1'"))
                await db.commit()
            else:
                await db.execute(select(func.set_config("app.tenant", "1", True)))
            return await paginate(db, select(Item).order_by(Item.name.desc()))

        for how in ("isolation", "text", "committed", "function"):
            await _counts_anew(service, f"/own?size=5&page=7&how={how}")


async def test_listeners_of_a_team_may_have_set_anything(service: Service) -> None:
    await service.total("/items?size=5")
    engine = service.overdrive.engine.sync_engine

    def heard(*_args: Any) -> None:
        pass

    event.listen(engine, "before_execute", heard)
    try:
        assert await service.total("/items?size=5") == (ROWS, 1)
    finally:
        event.remove(engine, "before_execute", heard)
    assert await service.total("/items?size=5") == (ROWS, 0)


async def test_what_nobody_can_name_is_counted_each_time(service: Service) -> None:
    @service.app.get("/text", response_model=Page[ItemOut])
    async def by_text(db: SessionDep) -> Any:
        return await paginate(db, select(Item).where(text("name <> 'x'")))

    for _ in range(2):
        assert await service.total("/text?size=5") == (ROWS, 1)


async def test_a_response_in_shadow_is_not_made_of_what_is_kept(lite: Service) -> None:
    @lite.app.get("/shadow", response_model=Page[ItemOut])
    @cached(mode="shadow")
    async def shadow(db: SessionDep) -> Any:
        return await paginate(db, select(Item).order_by(Item.name.desc()))

    await lite.total("/shadow?size=5")
    assert await lite.total("/shadow?size=5") == (ROWS, 1)


async def test_a_response_made_of_a_kept_total_is_dropped_with_it(lite: Service) -> None:
    @lite.app.get("/kept", response_model=Page[ItemOut])
    @cached
    async def kept(db: SessionDep) -> Any:
        return await paginate(db, select(Item).order_by(Item.name.desc()))

    await lite.total("/items?size=5")
    for page in (1, 2, 1):
        assert (await lite.total(f"/kept?size=5&page={page}"))[0] == ROWS
    await add(lite)
    for page in (1, 2, 1):
        assert (await lite.total(f"/kept?size=5&page={page}"))[0] == ROWS + 1


async def test_sessions_of_ones_own_count_for_all(lite: Service) -> None:
    """A session that is not the request's has no notes of its connections, and keeps what it finds out first."""

    @lite.app.get("/own", response_model=Page[ItemOut])
    async def own() -> Any:
        async with AsyncSession(lite.overdrive.engine) as db:
            return await paginate(db, select(Item).order_by(Item.name.desc()))

    await lite.total("/items?size=5")
    assert (await lite.total("/own?size=5"))[0] == ROWS
    await add(lite)
    assert (await lite.total("/own?size=5"))[0] == ROWS + 1


async def test_a_plain_session_on_the_loop_counts_by_itself(lite: Service) -> None:
    @lite.app.get("/own", response_model=Page[ItemOut])
    async def own() -> Any:
        with Session(lite.overdrive.sync_sessions().engine) as db:
            return paginate(db, select(Item).order_by(Item.name.desc()))

    for _ in range(2):
        assert await lite.total("/own?size=5") == (ROWS, 1)


# Boundaries


def _skipped(service: Service) -> bool:
    """Whether the rows of the last page were found by skipping those from the beginning."""
    return any("OFFSET" in sql and ("WHERE" not in sql or "IN (SELECT" in sql) for sql in service.sent)


@pytest.mark.parametrize("route", ["/items", "/plain"])
async def test_pages_near_a_visited_one_are_found_from_there(all_deep: None, service: Service, route: str) -> None:
    rows = (await service.get(f"{route}?size={ROWS}"))["items"]
    await service.get(f"{route}?size=5&page=7")
    assert _skipped(service)
    for page in (7, 6, 8, 12):
        assert (await service.get(f"{route}?size=5&page={page}"))["items"] == rows[5 * page - 5 : 5 * page]
        assert not _skipped(service)
    await add(service, name="zzz")
    moved = (await service.get(f"{route}?size=5&page=7"))["items"]
    assert _skipped(service)
    assert moved == rows[29:34]


async def test_a_list_that_was_written_meanwhile_is_not_noted(all_deep: None, service: Service) -> None:
    with written_after_look_ups(service):
        await service.get("/bare?size=5&page=7")
    assert _skipped(service)
    await service.get("/bare?size=5&page=7")
    assert _skipped(service)
    await service.get("/bare?size=5&page=7")
    assert not _skipped(service)


async def test_what_is_added_lives_no_longer_than_what_was_there(
    all_deep: None, lite: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers that nobody hears of are heeded after `cache.ttl`, however often a list is visited meanwhile."""
    now = 1_000.0
    monkeypatch.setattr(lite.overdrive.cache, "clock", lambda: now)
    for offset in (20, 30, 40):
        await lite.get(f"/slice?limit=5&offset={offset}")
        now += 25
    with lite.database.begin() as connection:
        connection.execute(insert(Item).values(name="zzz"))
    answer = await lite.get("/slice?limit=5&offset=41")
    assert _skipped(lite)
    with lite.database.begin() as connection:
        ids = connection.scalars(select(Item.id).order_by(Item.name.desc(), Item.id.desc()).offset(41).limit(5))
        assert [row["id"] for row in answer["items"]] == list(ids)


async def test_rows_that_nobody_can_name_are_not_noted(all_deep: None, service: Service) -> None:
    @service.app.get("/text", response_model=CountedPage[ItemOut])
    async def by_text(db: SessionDep) -> Any:
        return await paginate(db, select(Item).where(text("name <> 'x'")), total="none")

    for _ in range(2):
        await service.get("/text?size=5&page=7")
        assert any("OFFSET" in sql and "overdrive_key" not in sql for sql in service.sent)


async def test_a_request_that_has_written_skips_rows_itself(all_deep: None, service: Service) -> None:
    @service.app.get("/own", response_model=Page[ItemOut])
    async def own(db: SessionDep) -> Any:
        await db.execute(update(Other).values(name="own"))
        await db.commit()
        return await paginate(db, select(Item).order_by(Item.name.desc()))

    await service.get("/items?size=5&page=7")
    await service.get("/own?size=5&page=7")
    assert _skipped(service)


ORDERS: list[list[Any]] = [
    [],
    [Item.id.desc()],
    [Item.name],
    [Item.name.desc(), Item.id],
    [Item.parent_id],
    [Item.parent_id.desc(), Item.name],
    [Item.parent_id.nulls_first(), Item.name.desc()],
    [Item.parent_id.desc().nulls_last(), Item.id],
]


async def test_whatever_is_written_a_page_is_what_offset_gives(all_deep: None, service: Service) -> None:
    generator = random.Random(0)

    @service.app.get("/any", response_model=LimitOffsetPage[ItemOut])
    async def in_any_order(db: SessionDep, order: int) -> Any:
        return await paginate(db, select(Item).order_by(*ORDERS[order]))

    found = 0
    for _ in range(60):
        match generator.randrange(8):
            case 0:
                await add(service, name=f"name {generator.randrange(9)}")
            case 1:
                parent = generator.choice([None, 1, 2, 3])
                lucky = Item.id % 5 == generator.randrange(5)
                await service.write(update(Item).where(lucky).values(parent_id=parent))
            case 2:
                await service.write(delete(Item).where(Item.id == generator.randrange(4, ROWS)))
        number = generator.choice([0, 4, 6, generator.randrange(8)])
        offset, limit = generator.randrange(70), generator.randrange(1, 9)
        answer = await service.get(f"/any?order={number}&offset={offset}&limit={limit}")
        found += not _skipped(service)
        order = ORDERS[number]
        rest = Item.id.desc() if order and "DESC" in str(order[-1]) else Item.id
        with service.database.connect() as connection:
            ids = connection.scalars(select(Item.id).order_by(*order, rest).offset(offset).limit(limit))
            assert [row["id"] for row in answer["items"]] == list(ids)
            assert answer["total"] == connection.scalar(select(func.count(Item.id)))
    # Or it would say nothing of what is kept.
    assert found > 8
