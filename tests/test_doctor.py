"""`overdrive doctor` on real databases: what it advises, what it proves, and what it never does."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path as FilePath
from typing import Annotated, Any

import psycopg
import pytest
from fastapi import BackgroundTasks, Cookie, Depends, FastAPI, Header, HTTPException, Path, Query, Request, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field
from shell import Command
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    func,
    insert,
    literal_column,
    make_url,
    select,
    text,
    union,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, joinedload, mapped_column, relationship
from support import outside

from overdrive import (
    CursorPage,
    Overdrive,
    Page,
    SessionDep,
    Settings,
    SyncSessionDep,
    add_pagination,
    cached,
    create_engine,
    paginate,
)
from overdrive.doctor import Advice, Report, examine
from overdrive.errors import ConfigurationError
from overdrive.instrumentation.events import RequestEvent, subscribed
from overdrive.pool.explain import read_only

pytestmark = pytest.mark.anyio


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    entries: Mapped[list[Entry]] = relationship(order_by="Entry.at")


class Entry(Base):
    __tablename__ = "entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("accounts.id"))
    code: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    title: Mapped[str]
    at: Mapped[int]
    score: Mapped[int | None]
    done: Mapped[bool]
    order: Mapped[int]


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "account_id": number % 2 + 1,
            "code": f"code {number}",
            "kind": "ab"[number % 2],
            "title": f"Title {number}",
            "at": number * 7 % 5 + number // 5 * 5,
            "score": number if number % 3 else None,
            "done": number % 2 == 0,
            "order": number,
        }
        for number in range(1, count + 1)
    ]


@pytest.fixture(params=["asyncpg", "aiosqlite"])
def url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("sqlite_url" if request.param == "aiosqlite" else "postgres_url")


@pytest.fixture
def database(url: str) -> Iterator[Engine]:
    engine = outside(url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Account), [{"name": f"Name {number}"} for number in range(1, 6)])
        connection.execute(insert(Entry), rows(6))
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


Route = Callable[..., Any]


async def examined(url: str, *routes: tuple[str, Any, Route], size: int = 2, **options: Any) -> Report:
    """Examine an app that has these routes: path, response model, endpoint."""
    app = FastAPI()
    overdrive = Overdrive(app, settings=Settings.load(database_url=url, pagination={"size": size}))
    for path, model, endpoint in routes:
        app.get(path, response_model=model)(endpoint)
    try:
        return await examine(app, **options)
    finally:
        await overdrive.aclose()


def page_of(statement: Any) -> Route:
    async def endpoint(db: SessionDep) -> Any:
        page = await paginate(db, statement)
        page.items = []
        return page

    return endpoint


# Statements and indexes, and what is to be said of them


@dataclass
class Case:
    """A statement, the indexes there are, and what the index that it lacks is on."""

    statement: Any
    indexes: Sequence[str] = ()
    advice: str | None = None
    sqlite: str | None = "same"
    note: str = ""
    model: Any = CursorPage[Any]
    #: Where SQLite has other indexes.
    sqlite_indexes: Sequence[str] | None = None

    def of(self, dialect: str) -> tuple[Sequence[str], str | None]:
        if dialect != "sqlite":
            return self.indexes, self.advice
        indexes = self.indexes if self.sqlite_indexes is None else self.sqlite_indexes
        return indexes, self.advice if self.sqlite == "same" else self.sqlite


E = aliased(Entry)
entries = select(Entry)
by_time = entries.order_by(Entry.at)
newest = entries.order_by(Entry.at.desc())
mixed = entries.order_by(Entry.at.desc(), Entry.id)
of_account = by_time.where(Entry.account_id == 1)
of_account_and_kind = of_account.where(Entry.kind == "a")
of_ordered_account = entries.where(Entry.account_id == 1).order_by(Entry.account_id, Entry.at)
of_kind = by_time.where(Entry.kind == literal_column("'a'"))
by_score = entries.order_by(Entry.score)
best = entries.order_by(Entry.score.desc().nulls_last())
by_lower = entries.order_by(func.lower(Entry.title))
joined = by_time.join(Account, Entry.account_id == Account.id).where(Account.name == "Name 1")
accounted = entries.join(Account, Entry.account_id == Account.id)
with_entries = select(Account).options(joinedload(Account.entries)).order_by(Account.name)
of_aliased = select(E).where(E.account_id == 1).order_by(E.at)
are_done = by_time.where(Entry.done)
by_word = entries.order_by(Entry.order, Entry.at)
counted = select(Entry.kind, func.count().label("n")).group_by(Entry.kind)
united = union(entries.where(Entry.id < 4), entries.where(Entry.id > 2)).order_by("at")
kinds = select(Entry.kind).distinct().order_by(Entry.kind)

CASES = {
    # All is well.
    "the primary key": Case(entries.order_by(Entry.id)),
    "the primary key, descending": Case(entries.order_by(Entry.id.desc())),
    "no order": Case(entries, model=Page[Any]),
    "ascending": Case(by_time, ["(at, id)"]),
    "descending, index read backwards": Case(newest, ["(at, id)"]),
    "descending, descending index": Case(newest, ["(at DESC, id DESC)"]),
    "ascending, descending index read backwards": Case(by_time, ["(at DESC, id DESC)"]),
    "mixed": Case(mixed, ["(at DESC, id)"]),
    "mixed, index read backwards": Case(mixed, ["(at, id DESC)"]),
    "nulls where they are anyway": Case(by_score, ["(score, id)"]),
    "nulls placed": Case(best, ["(score DESC NULLS LAST, id DESC)"], sqlite_indexes=["(score DESC, id DESC)"]),
    "nulls placed, index read backwards": Case(best, ["(score NULLS FIRST, id)"], sqlite_indexes=["(score, id)"]),
    "filter": Case(of_account, ["(account_id, at, id)"]),
    "filters in another order": Case(of_account_and_kind, ["(kind, account_id, at, id)"]),
    "filter on the key that orders": Case(of_ordered_account, ["(account_id, at, id)"]),
    "filter that is a boolean": Case(are_done, ["(done, at, id)"]),
    "filter that is negated": Case(by_time.where(~Entry.done), ["(done, at, id)"]),
    "filter by a list": Case(by_time.where(Entry.kind.in_(["a", "b"])), ["(at, id)"]),
    "filter by a range": Case(by_time.where(Entry.at >= 1), ["(at, id)"]),
    "filter that most rows pass": Case(of_account, ["(at, id)"]),
    "redundant index": Case(by_time, ["(at)", "(at, id)"]),
    "redundant index, the other way": Case(by_time, ["(at, id)", "(at)"]),
    "redundant index for the filter": Case(of_account, ["(account_id, at, id)", "(at, id)"]),
    "longer index": Case(by_time, ["(at, id, title)"]),
    "index of an expression": Case(by_lower, ["(lower(title), id)"]),
    "partial index": Case(of_kind, ["(at, id) WHERE kind = 'a'"]),
    "unique index": Case(by_time, ["UNIQUE (at, id)"]),
    "unique column": Case(entries.order_by(Entry.code)),
    "unique column, descending": Case(entries.order_by(Entry.code.desc())),
    "join": Case(joined, ["(at, id)"]),
    "joined collection": Case(with_entries, ["accounts (name, id)"]),
    "alias": Case(of_aliased, ["(account_id, at, id)"]),
    "reserved word": Case(by_word, ['("order", at, id)']),
    "groups from an index": Case(counted.order_by(Entry.kind), ["(kind)"]),
    "distinct from an index": Case(kinds, ["(kind)"]),
    # An index is missing.
    "ascending, no index": Case(by_time, [], "(at, id)"),
    "descending, no index": Case(newest, [], "(at, id)"),
    "by number, no index": Case(by_time, [], "(at, id)", model=Page[Any]),
    "mixed, uniform index": Case(mixed, ["(at, id)"], "(at, id DESC)"),
    "uniform, mixed index": Case(by_time, ["(at DESC, id)"], "(at, id)"),
    "keys in another order": Case(by_time, ["(id, at)"], "(at, id)"),
    "no tie-break": Case(by_time, ["(at)"], "(at, id)", sqlite=None),
    "nulls placed, no index": Case(best, [], "(score NULLS FIRST, id)", sqlite="(score, id)"),
    "nulls placed, index with others": Case(best, ["(score, id)"], "(score NULLS FIRST, id)", sqlite=None),
    "filter, no index": Case(of_account, [], "(account_id, at, id)"),
    "filter, its index alone": Case(of_account, ["(account_id)"], "(account_id, at, id)", sqlite_indexes=[]),
    "filters, no index": Case(of_account_and_kind, [], "(account_id, kind, at, id)"),
    "filter that is a boolean, no index": Case(are_done, [], "(done, at, id)"),
    "filter on the key that orders, no index": Case(
        entries.where(Entry.account_id == 1).order_by(Entry.account_id.desc(), Entry.at), [], "(account_id, at, id)"
    ),
    "filter by a list, no index": Case(by_time.where(Entry.kind.in_(["a", "b"])), [], "(at, id)"),
    "expression, no index": Case(by_lower, [], "((lower(title)), id)"),
    "expression, index of the column": Case(by_lower, ["(title, id)"], "((lower(title)), id)"),
    "partial index of other rows": Case(of_kind, ["(at, id) WHERE kind = 'b'"], "(at, id)"),
    "join, no index": Case(joined, [], "(at, id)"),
    "joined collection, no index": Case(with_entries, [], "(name, id)"),
    "alias, no index": Case(of_aliased, [], "(account_id, at, id)"),
    "reserved word, no index": Case(by_word, [], '("order", at, id)'),
    # No index would do.
    "order of another table": Case(accounted.order_by(Account.name), [], note="accounts and entries"),
    "order of groups": Case(counted.order_by(func.count(), Entry.kind), [], note="GROUP BY"),
    "order of a union": Case(united, [], note="union", model=Page[Any]),
    "order of a subquery": Case(select(by_time.subquery()).order_by("at"), [], note="no table", model=Page[Any]),
    "order in text": Case(entries.order_by(text("at")), [], note="text", model=Page[Any]),
    "order by chance": Case(entries.order_by(func.random()), [], note="nor would one on entries ((random()), id)"),
}  # fmt: skip


def create(engine: Engine, indexes: Sequence[str]) -> None:
    with engine.begin() as connection:
        for number, index in enumerate(indexes):
            unique = "UNIQUE " if index.startswith("UNIQUE ") else ""
            index = index.removeprefix("UNIQUE ")
            table = "" if index.startswith("accounts") else "entries "
            connection.exec_driver_sql(f"CREATE {unique}INDEX own_{number} ON {table}{index}")


def on(advice: Advice) -> str:
    """What the index is on, without its name and its table's."""
    return advice.sql.partition(" ON ")[2].partition(" ")[2]


@pytest.mark.parametrize("url", ["aiosqlite", "asyncpg"], indirect=True)
@pytest.mark.parametrize("name", CASES)
async def test_what_is_said_of_a_statement(url: str, database: Engine, name: str) -> None:
    case = CASES[name]
    indexes, advice = case.of(database.dialect.name)
    create(database, indexes)
    route = ("/page", case.model, page_of(case.statement))
    report = await examined(url, route)
    assert report.unexamined == []
    assert [on(each) for each in report.advice] == ([advice] if advice else [])
    assert [case.note in each.text for each in report.notes] == ([True] if case.note else [])
    if advice:
        assert "not with this index" in report.advice[0].proof
        sql = report.advice[0].sql
        assert ("CONCURRENTLY" in sql) == (database.dialect.name == "postgresql")
        apply(database, sql)
        assert (await examined(url, route)).as_text() == ""


def apply(engine: Engine, *statements: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for sql in statements:
            connection.exec_driver_sql(sql)


async def test_an_index_counts_at_any_size(url: str, database: Engine) -> None:
    create(database, ["(at, id)"])
    routes = ("/page", CursorPage[Any], page_of(newest))
    for more in (rows(3_000)[6:], []):
        if more:
            with database.begin() as connection:
                connection.execute(insert(Entry), more)
        else:
            apply(database, "DELETE FROM entries")
        apply(database, "ANALYZE entries")
        assert (await examined(url, routes)).as_text() == ""


async def test_a_filter_that_few_rows_pass(postgres_url: str) -> None:
    """PostgreSQL reads such a page in order and throws away most rows; SQLite has no statistics to tell by."""
    engine = outside(postgres_url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    create(engine, ["(at, id)"])
    with engine.begin() as connection:
        connection.execute(insert(Account), [{"name": f"Name {number}"} for number in range(3_000)])
        connection.execute(insert(Entry), [{**row, "order": row["id"] % 500} for row in rows(3_000)])
    few, many = by_time.where(Entry.order == 7), by_time.where(Entry.kind == "a")
    nested = select(Account).options(joinedload(Account.entries)).where(Account.name == "Name 7").order_by(Account.id)
    routes = [(f"/{n}", CursorPage[Any], page_of(each)) for n, each in enumerate((few, many, nested))]
    assert (await examined(postgres_url, *routes, size=50)).advice == []
    apply(engine, "ANALYZE entries", "ANALYZE accounts")
    (advice,) = (await examined(postgres_url, *routes, size=50)).advice
    assert (advice.route, on(advice)) == ("GET /0", '("order", at, id)')
    assert "Filter" in advice.plan
    apply(engine, advice.sql)
    assert (await examined(postgres_url, *routes, size=50)).as_text() == ""
    Base.metadata.drop_all(engine)
    engine.dispose()


# Tables of other kinds


async def test_tables_of_a_schema(postgres_url: str) -> None:
    class Elsewhere(DeclarativeBase):
        pass

    class Sale(Elsewhere):
        __tablename__ = "sales"
        __table_args__ = ({"schema": "shop"},)

        id: Mapped[int] = mapped_column(primary_key=True)
        at: Mapped[int]

    engine = outside(postgres_url)
    apply(engine, "DROP SCHEMA IF EXISTS shop CASCADE", "CREATE SCHEMA shop")
    Elsewhere.metadata.create_all(engine)
    route = ("/page", CursorPage[Any], page_of(select(Sale).order_by(Sale.at)))
    (advice,) = (await examined(postgres_url, route)).advice
    assert advice.sql == "CREATE INDEX CONCURRENTLY ix_sales_at_id ON shop.sales (at, id)"
    assert "not with this index" in advice.proof
    apply(engine, advice.sql)
    assert (await examined(postgres_url, route)).as_text() == ""
    apply(engine, "DROP SCHEMA shop CASCADE")
    engine.dispose()


async def test_who_may_only_read_and_has_temporary_tables_last(postgres_database: str) -> None:
    engine = outside(postgres_database)
    Base.metadata.create_all(engine)
    apply(engine, "DROP ROLE IF EXISTS looker", "CREATE ROLE looker LOGIN", "GRANT SELECT ON entries TO looker")
    apply(engine, f"ALTER DATABASE {engine.url.database} SET search_path = public, pg_temp")
    url = make_url(postgres_database).set(username="looker").render_as_string(hide_password=False)
    (advice,) = (await examined(url, ("/page", CursorPage[Any], page_of(by_time)))).advice
    assert "not with this index" in advice.proof
    apply(engine, "DROP OWNED BY looker", "DROP ROLE looker")
    engine.dispose()


async def test_what_takes_no_index_or_not_like_that(postgres_url: str) -> None:
    engine = outside(postgres_url)
    apply(
        engine,
        "DROP TABLE IF EXISTS parts CASCADE",
        "CREATE TABLE parts (id int PRIMARY KEY, at int NOT NULL) PARTITION BY RANGE (id)",
        "CREATE TABLE some_parts PARTITION OF parts FOR VALUES FROM (0) TO (9)",
        "CREATE VIEW all_parts AS SELECT * FROM parts",
    )
    parts, view = (
        Table(name, MetaData(), Column("id", Integer, primary_key=True), Column("at", Integer, nullable=False))
        for name in ("parts", "all_parts")
    )
    report = await examined(
        postgres_url,
        ("/parts", CursorPage[Any], page_of(select(parts).order_by(parts.c.at))),
        ("/view", CursorPage[Any], page_of(select(view).order_by(view.c.at))),
    )
    assert [each.sql for each in report.advice] == ["CREATE INDEX ix_parts_at_id ON parts (at, id)"]
    assert [(each.route, "is a view" in each.text) for each in report.notes] == [("GET /view", True)]
    apply(engine, "DROP TABLE parts CASCADE")
    engine.dispose()


async def test_where_no_copy_can_be_made(postgres_url: str) -> None:
    engine = outside(postgres_url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    apply(engine, "DROP ROLE IF EXISTS reader", "CREATE ROLE reader LOGIN", "GRANT SELECT ON entries TO reader")
    name = engine.url.database
    apply(engine, f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC")
    url = make_url(postgres_url).set(username="reader").render_as_string(hide_password=False)
    (advice,) = (await examined(url, ("/page", CursorPage[Any], page_of(by_time)))).advice
    assert on(advice) == "(at, id)"
    assert "not proven" in advice.proof
    assert "permission denied" in advice.proof
    apply(engine, f"GRANT TEMPORARY ON DATABASE {name} TO PUBLIC", "DROP OWNED BY reader", "DROP ROLE reader")
    Base.metadata.drop_all(engine)
    engine.dispose()


# What an examination does to an app and its data


async def test_nothing_is_written(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    @app.get("/flushed", response_model=CursorPage[Any])
    async def flushed(db: SessionDep) -> Any:
        db.add(Account(name="flushed"))
        await db.flush()
        return await paginate(db, by_time)

    @app.get("/sync", response_model=CursorPage[Any])
    def sync(db: SyncSessionDep) -> Any:
        db.execute(insert(Account).values(name="sync"))
        return paginate(db, by_time)

    @app.get("/own", response_model=CursorPage[Any])
    async def own(db: SessionDep) -> Any:
        with outside(url).begin() as connection:
            connection.execute(insert(Account).values(name="own"))
        return await paginate(db, by_time)

    @app.get("/in-the-end", response_model=Page[Any])
    async def in_the_end(db: SessionDep) -> Any:
        made = await paginate(db, entries)
        db.add(Account(name="in the end"))
        made.items = []
        return made

    report = await examine(app)
    assert {each.route for each in report.unexamined} == {"GET /flushed", "GET /sync", "GET /own", "GET /in-the-end"}
    assert all("read-only" in each.text or "readonly" in each.text for each in report.unexamined)
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Account)) == 5
    # Afterwards, all is as before.
    async with overdrive.session() as db:
        db.add(Account(name="after"))
    with overdrive.sync_session() as sync_db:
        sync_db.add(Account(name="after"))
    await overdrive.aclose()
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Account)) == 7


async def test_a_pool_gets_its_connections_back_as_they_were(url: str, database: Engine) -> None:
    engine = create_engine(url)
    app = FastAPI()
    Overdrive(app, engine=engine)
    app.get("/page", response_model=Page[Any])(page_of(entries))
    async with read_only(), engine.begin() as connection:
        with pytest.raises(DBAPIError):
            await connection.execute(insert(Account).values(name="refused"))
    assert (await examine(app)).status == 0
    async with engine.begin() as connection:
        await connection.execute(insert(Account).values(name="after"))
    await engine.dispose()
    with database.connect() as sync:
        assert sync.scalar(select(func.count()).select_from(Account)) == 6


async def test_a_database_in_memory_is_kept() -> None:
    engine = create_engine("sqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    app = FastAPI()
    Overdrive(app, engine=engine)
    app.get("/page", response_model=CursorPage[Any])(page_of(by_time))
    assert [on(each) for each in (await examine(app)).advice] == ["(at, id)"]
    async with engine.begin() as connection:
        await connection.execute(insert(Account).values(name="after"))
    await engine.dispose()


async def test_what_is_no_write_is_not_kept_either(postgres_url: str) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=postgres_url)

    @app.get("/page", response_model=Page[Any])
    async def page(db: SessionDep) -> Any:
        await db.execute(text("NOTIFY doctor"))
        return await paginate(db, select(literal_column("1").label("n")).order_by("n"))

    with psycopg.connect(make_url(postgres_url).set(drivername="postgresql").render_as_string(False)) as listener:
        listener.autocommit = True
        listener.execute("LISTEN doctor")
        assert (await examine(app)).examined == 1
        assert list(listener.notifies(timeout=0)) == []
        async with overdrive.session() as db:
            await db.execute(text("NOTIFY doctor"))
        await overdrive.aclose()
        assert len(list(listener.notifies(timeout=5, stop_after=1))) == 1


async def test_the_cache_is_off(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url, cache=True)
    app.get("/page", response_model=Page[Any])(cached(page_of(entries)))
    seen: list[str | None] = []
    with subscribed(lambda event: seen.append(event.cache_status) if isinstance(event, RequestEvent) else None):
        await examine(app)
    assert seen == ["bypass"]
    assert overdrive.cache.enabled


async def test_the_lifespan_runs_and_may_not_write(url: str, database: Engine) -> None:
    told = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        told.append("started")
        yield {"statement": by_time}
        told.append("ended")
        raise RuntimeError("too late to matter")

    app = FastAPI(lifespan=lifespan)
    Overdrive(app, database_url=url)

    @app.get("/page", response_model=Page[Any])
    async def page(request: Request, db: SessionDep) -> Any:
        return await page_of(request.state.statement)(db)

    assert len((await examine(app)).advice) == 1
    assert told == ["started", "ended"]

    @asynccontextmanager
    async def migrating(app: FastAPI) -> AsyncIterator[None]:
        async with app.state.overdrive_installation.runtime.session() as db:
            await db.execute(text("CREATE TABLE migrated (id int)"))
        yield

    app = FastAPI(lifespan=migrating)
    Overdrive(app, database_url=url)
    with pytest.raises(ConfigurationError, match="does not start where databases refuse writes"):
        await examine(app)


async def test_an_app_without_overdrive() -> None:
    with pytest.raises(ConfigurationError, match=r"Overdrive\(app\) or add_pagination\(app\)"):
        await examine(FastAPI())


async def test_pages_alone_with_an_engine_of_their_own(url: str, database: Engine) -> None:
    app = add_pagination(FastAPI())
    engine = database if "sqlite" in url else outside(url)

    @app.get("/page", response_model=CursorPage[Any])
    def page() -> Any:
        with Session(engine) as db:
            made = paginate(db, newest)
            made.items = []
            return made

    report = await examine(app)
    assert [on(each) for each in report.advice] == ["(at, id)"]
    engine.dispose()


# Routes and their parameters


class Filter(BaseModel):
    kind: str = Field(examples=["a"])
    done: bool | None = None


class Kind(Enum):
    A = "a"


async def test_parameters_that_routes_require(url: str, database: Engine) -> None:
    sent: list[Any] = []

    async def by_example(
        db: SessionDep,
        account: Annotated[int, Path(examples=[1])],
        kinds: Annotated[list[Kind], Query(examples=[[Kind.A, Kind.A]])],
        x_shop: Annotated[str, Header(examples=["shop"])],
        till: Annotated[str, Cookie(openapi_examples={"north": {"value": "north"}})],
        q: str | None = None,
    ) -> Any:
        sent.append((account, kinds, x_shop, till, q))
        return await page_of(entries)(db)

    async def by_model(db: SessionDep, wanted: Annotated[Filter, Query()]) -> Any:
        sent.append(wanted)
        return await page_of(entries)(db)

    async def without(db: SessionDep, account_id: int, other: int) -> Any: ...

    routes = [
        ("/accounts/{account}", Page[Any], by_example),
        ("/model", Page[Any], by_model),
        ("/without/{account_id}", Page[Any], without),
    ]
    report = await examined(url, *routes)
    assert sent == [(1, [Kind.A, Kind.A], "shop", "north", None), Filter(kind="a")]
    (reason,) = report.unexamined
    assert reason.route == "GET /without/{account_id}"
    assert "requires" in reason.text
    assert "--param" in reason.text
    assert report.status == 2

    sent.clear()
    await examined(url, *routes, parameters={"account": "2", "q": "x", "kind": "b", "till": "south", "x-shop": "y"})
    assert sent == [(2, [Kind.A, Kind.A], "y", "south", "x"), Filter(kind="b")]
    with pytest.raises(ConfigurationError, match="acount"):
        await examined(url, *routes, parameters={"acount": "2"})


async def test_routes_that_cannot_be_examined(url: str, database: Engine) -> None:
    async def guarded(db: SessionDep, token: Annotated[str, Depends(HTTPBearer())]) -> Any:
        return await page_of(entries)(db)

    async def missing(db: SessionDep) -> Any:
        raise HTTPException(404)

    async def failing(db: SessionDep) -> Any:
        raise RuntimeError("broken\nfor good")

    async def working(db: SessionDep, background: BackgroundTasks) -> Any:
        raise AssertionError("it is not called")

    async def by_hand() -> Any:
        return Page(items=[], total=0, page=1, size=2, pages=0)

    async def other(db: SessionDep) -> Any:
        return Response("[]", media_type="application/json")

    endpoints = [guarded, missing, failing, working, by_hand, other]
    report = await examined(url, *((f"/{each.__name__}", Page[Any], each) for each in endpoints))
    assert {each.route.removeprefix("GET /"): each.text for each in report.unexamined} == {
        "guarded": "HTTP 401: say --header 'authorization: ...'",
        "missing": "HTTP 404: say --param name=value for something that is there",
        "failing": "RuntimeError: broken",
        "working": "it takes BackgroundTasks, which would really run",
        "by_hand": "its page is not read from a database by paginate()",
        "other": "it answers with something else than a page",
    }
    assert (report.examined, report.status) == (0, 2)
    report = await examined(url, ("/guarded", Page[Any], guarded), headers={"Authorization": "Bearer x"})
    assert (report.examined, report.status) == (1, 0)


async def test_routes_that_are_no_pages_are_not_called(url: str, database: Engine) -> None:
    app = FastAPI()
    overdrive = Overdrive(app, database_url=url)

    @app.get("/other", response_model=list[Any])
    @app.post("/posted", response_model=Page[Any])
    async def other() -> Any:
        raise AssertionError("it is not called")

    mounted = FastAPI()
    mounted.get("/page", response_model=CursorPage[Any])(page_of(newest))
    app.mount("/mounted", mounted)
    report = await examine(app)
    assert [each.route for each in report.advice] == ["GET /mounted/page"]
    assert report.status == 1
    await overdrive.aclose()


async def test_the_page_is_what_is_examined_and_the_next_one(url: str, database: Engine) -> None:
    cursors: list[str | None] = []

    async def endpoint(db: SessionDep, request: Request) -> Any:
        await db.scalars(select(Account).order_by(Account.name).limit(1))
        cursors.append(request.query_params.get("cursor"))
        return await paginate(db, select(Entry.id).order_by(Entry.id))

    assert (await examined(url, ("/page", CursorPage[Any], endpoint))).as_text() == ""
    assert [cursor is None for cursor in cursors] == [True, False]


async def test_counting_many_rows_is_noted(url: str, database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overdrive.doctor._MANY_ROWS", 5)
    routes = [("/page", Page[Any], page_of(entries)), ("/walk", CursorPage[Any], page_of(entries))]
    report = await examined(url, *routes)
    assert [(each.route, "counts its 6 rows" in each.text) for each in report.notes] == [("GET /page", True)]
    assert report.status == 0


# What is printed


SHOP = """
from fastapi import FastAPI
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, select
from typing import Any
from overdrive import CursorPage, Overdrive, SessionDep, paginate

table = Table("things", MetaData(), Column("id", Integer, primary_key=True), Column("at", Integer, nullable=False))
engine = create_engine("sqlite:///shop.sqlite")
table.metadata.create_all(engine)
engine.dispose()
app = FastAPI()
Overdrive(app, database_url="sqlite:///shop.sqlite")
broken = FastAPI()

@app.get("/things", response_model=CursorPage[Any])
async def things(db: SessionDep):
    print("hello")
    return await paginate(db, select(table).order_by(table.c.at.desc()))
"""


def test_the_command(overdrive: Command, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(SHOP)
    done = overdrive("doctor", "shop:app")
    assert done.returncode == 1
    layers, route, nothing, *advice = done.stdout.splitlines()
    assert layers.startswith("layers  overdrive.Observer > ")
    assert (route, nothing) == ("route   GET /things  page by cursor; async session", "")
    assert "\n".join([*advice, ""]) == (
        "GET /things\n"
        "  order  at DESC, id DESC\n"
        "  plan   USE TEMP B-TREE FOR ORDER BY\n"
        "  run    CREATE INDEX ix_things_at_id ON things (at, id);\n"
        "  proof  on an empty copy of things, EXPLAIN sorts or filters row by row, but not with this index\n"
    )
    done = overdrive("doctor", "shop:app", "--json")
    document = json.loads(done.stdout)
    assert document.pop("setup")["findings"] == []
    assert document == {
        "examined": 1,
        "advice": [
            {
                "route": "GET /things",
                "order": "at DESC, id DESC",
                "plan": "USE TEMP B-TREE FOR ORDER BY",
                "sql": "CREATE INDEX ix_things_at_id ON things (at, id)",
                "proof": "on an empty copy of things, EXPLAIN sorts or filters row by row, but not with this index",
            }
        ],
        "notes": [],
        "unexamined": [],
    }
    with closing(sqlite3.connect("shop.sqlite")) as connection:
        connection.execute(document["advice"][0]["sql"])
    done = overdrive("doctor", "shop:app")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["layers", "route"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shop:broken"], "call Overdrive(app)"),
        (["nowhere:app"], "no module 'nowhere'"),
        (["shop:app", "--param", "user_id"], "'user_id' has no value"),
        (["shop:app", "--header", "token"], "'token' has no value"),
        (["shop:app", "--param", "user_id=7"], "no page has a parameter user_id"),
        (["failing:app"], "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_examined(
    overdrive: Command, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "failing.py").write_text("1 / 0")
    done = overdrive("doctor", *arguments)
    assert done.returncode == 2
    assert "wrong" not in done.stdout
    assert message in done.stderr
