"""Every row of a statement as NDJSON or CSV: batch by batch, as fast as the client reads, whole or visibly broken."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import re
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from urllib.parse import unquote
from uuid import UUID

import anyio.to_thread
import httpx2
import pytest
import sqlalchemy
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError, computed_field, field_serializer
from sqlalchemy import JSON, ForeignKey, Numeric, column, delete, func, insert, literal, select, text, values
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
    with_loader_criteria,
)
from starlette.requests import ClientDisconnect
from support import Answer, call, client, on_uvicorn, outside, recorded

from overdrive import (
    ConfigurationError,
    Overdrive,
    PageError,
    SessionDep,
    SessionFactoryDep,
    Settings,
    SyncSessionDep,
    SyncSessionFactoryDep,
    cached,
    stream,
)
from overdrive.export import _cell, _csv
from overdrive.instrumentation.events import Event, RequestEvent, StatementEvent
from overdrive.pool.session import SyncSessions
from overdrive.testing import caching

pytestmark = pytest.mark.anyio


class Colour(Enum):
    RED = "red"


class Base(DeclarativeBase):
    type_annotation_map = {Decimal: Numeric(10, 2), dict[str, Any]: JSON}  # noqa: RUF012


class Owner(Base):
    __tablename__ = "export_owners"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    rows: Mapped[list[Entry]] = relationship(order_by="Entry.id", viewonly=True)


class Entry(Base):
    __tablename__ = "export_entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column("text")
    rank: Mapped[int | None]
    price: Mapped[Decimal | None]
    at: Mapped[datetime | None] = mapped_column(sqlalchemy.DateTime(timezone=True))
    uuid: Mapped[UUID | None]
    colour: Mapped[Colour | None]
    blob: Mapped[bytes | None]
    flag: Mapped[bool | None]
    owner_id: Mapped[int | None] = mapped_column(ForeignKey(Owner.id, deferrable=True, initially="DEFERRED"))
    more: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    owner: Mapped[Owner | None] = relationship(viewonly=True)


class EntryOut(BaseModel):
    id: int
    label: str = Field(serialization_alias="name")
    price: Decimal | None = None
    hidden: int = Field(0, exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.id


@pytest.fixture
async def database(url: str) -> AsyncIterator[sqlalchemy.Engine]:
    engine = outside(url)
    try:
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)
        yield engine
    finally:
        while opened:
            await opened.pop().aclose()
        engine.dispose()


def fill(engine: sqlalchemy.Engine, count: int, label: str = "x") -> None:
    """Rows 1 to `count`, of ranks that repeat and are NULL for every third."""
    add(engine, [{"id": n, "text": label, "rank": n % 7 if n % 3 else None} for n in range(1, count + 1)])


def add(engine: sqlalchemy.Engine, rows: list[dict[str, Any]]) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Entry.__table__), rows)


#: What `database` closes after its test.
opened: list[Overdrive] = []


def served(url: str) -> FastAPI:
    """An app that answers a second connection with an error, not with a wait."""
    app = FastAPI()
    pool: Any = {"size": 1, "max_overflow": 0, "timeout": 5}
    app.state.overdrive = Overdrive(app, settings=Settings(database_url=url, pool=pool))
    opened.append(app.state.overdrive)
    return app


def exporting(url: str, *args: Any, **options: Any) -> FastAPI:
    """An app with one export."""
    app = served(url)

    @app.get("/export")
    async def export(sessions: SessionFactoryDep) -> StreamingResponse:
        return stream(sessions, *args, **options)

    return app


async def exported(url: str, *args: Any, **options: Any) -> Answer:
    return await call(exporting(url, *args, **options), "/export")


def lines(answer: Answer) -> list[Any]:
    assert answer.error is None
    assert not answer.body or answer.body.endswith(b"\n")
    return [json.loads(line) for line in answer.body.splitlines()]


def table(answer: Answer) -> list[list[str]]:
    assert answer.error is None
    return list(csv.reader(io.StringIO(answer.body.decode(), newline="")))


def statements(events: list[Event]) -> int:
    return sum(isinstance(event, StatementEvent) for event in events)


def told(events: list[Event]) -> list[RequestEvent]:
    return [event for event in events if isinstance(event, RequestEvent)]


# What is written


@pytest.fixture
def one(database: sqlalchemy.Engine) -> None:
    entry = Entry(
        id=1,
        label='a "b", c',
        rank=-3,
        price=Decimal("-5.50"),
        at=datetime(2026, 1, 2, 3, 4, 5, 600, UTC),
        uuid=UUID(int=7),
        colour=Colour.RED,
        blob=b"bytes",
        flag=True,
    )
    with Session(database) as db, db.begin():
        db.add(entry)


COLUMNS = ["id", "label", "rank", "price", "at", "uuid", "colour", "blob", "flag", "owner_id"]


@pytest.mark.usefixtures("one")
async def test_a_row_without_a_model_is_the_columns_of_its_entity_as_pydantic_writes_them(url: str) -> None:
    answer = await exported(url, select(Entry))
    assert answer.error is None
    assert answer.headers["content-type"] == "application/x-ndjson"
    zone = "" if "sqlite" in url else "Z"
    shown = [1, 'a "b", c', -3, "-5.50", f"2026-01-02T03:04:05.000600{zone}", str(UUID(int=7)), "red", "bytes", True]
    assert lines(answer) == [dict(zip(COLUMNS, [*shown, None], strict=True))]
    answer = await exported(url, select(Entry), format="csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.body.decode() == (
        f'{",".join(COLUMNS)}\r\n1,"a ""b"", c",-3,-5.50,{shown[4]},{shown[5]},red,bytes,true,\r\n'
    )


@pytest.mark.usefixtures("one")
async def test_a_row_without_a_model_is_the_columns_that_are_selected(url: str) -> None:
    statement = select(Entry.id, Entry.price.label("cost"), func.length(Entry.label))
    assert lines(await exported(url, statement)) == [{"id": 1, "cost": "-5.50", "length": 8}]
    assert table(await exported(url, statement, format="csv")) == [["id", "cost", "length"], ["1", "-5.50", "8"]]
    assert lines(await exported(url, select(Entry.rank))) == [{"rank": -3}]
    assert table(await exported(url, select(Entry.rank), format="csv")) == [["rank"], ["-3"]]


@pytest.mark.usefixtures("one")
async def test_a_model_decides_on_names_and_columns(url: str) -> None:
    assert lines(await exported(url, select(Entry), EntryOut)) == [
        {"id": 1, "name": 'a "b", c', "price": "-5.50", "twice": 2}
    ]
    assert table(await exported(url, select(Entry), EntryOut, format="csv")) == [
        ["id", "name", "price", "twice"],
        ["1", 'a "b", c', "-5.50", "2"],
    ]
    # Rows of columns have attributes too.
    assert lines(await exported(url, select(Entry.id, Entry.label), EntryOut))[0]["twice"] == 2


async def test_no_rows_are_an_empty_body_or_a_header(url: str, database: sqlalchemy.Engine) -> None:
    assert (await exported(url, select(Entry), EntryOut)).body == b""
    assert (await exported(url, select(Entry), EntryOut, format="csv")).body == b"id,name,price,twice\r\n"


async def test_eager_loads_are_nested_in_ndjson(url: str, database: sqlalchemy.Engine) -> None:
    class RowOut(BaseModel):
        id: int

    class OwnerOut(BaseModel):
        id: int
        rows: list[RowOut]

    with database.begin() as connection:
        connection.execute(insert(Owner), [{"id": n, "name": "o"} for n in range(1, 251)])
    add(database, [{"id": n, "text": "x", "owner_id": (n + 1) // 2} for n in range(1, 501)])
    statement = select(Owner).options(selectinload(Owner.rows))
    with recorded() as events:
        found = lines(await exported(url, statement, OwnerOut))
    assert found == [{"id": n, "rows": [{"id": 2 * n - 1}, {"id": 2 * n}]} for n in range(1, 251)]
    assert statements(events) == 4
    # What is not loaded is not loaded row by row.
    answer = await exported(url, select(Owner), OwnerOut)
    assert isinstance(answer.error, ValidationError)
    assert "lazy load operation of attribute 'rows' cannot proceed" in str(answer.error)
    assert answer.status == 500


@pytest.mark.parametrize("written", ["ndjson", "csv"])
async def test_all_rows_come_once_and_in_order(url: str, database: sqlalchemy.Engine, written: Any) -> None:
    fill(database, 2_500)
    statement = select(Entry.id, Entry.rank).order_by(Entry.rank.desc().nulls_last())
    with database.connect() as connection:
        expected = [list(row) for row in connection.execute(statement.order_by(Entry.id.desc()))]
    answer = await exported(url, statement, format=written)
    if written == "csv":
        found = [[int(number), int(rank) if rank else None] for number, rank in table(answer)[1:]]
    else:
        found = [list(row.values()) for row in lines(answer)]
    assert found == expected


async def test_rows_that_nobody_touches_come_exactly_once(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 1_000)
    app = exporting(url, select(Entry.id, Entry.label).order_by(Entry.label, Entry.id))
    body = b""
    touched = 0

    async def send(message: Any) -> None:
        nonlocal body, touched
        if message.get("body"):
            body += message["body"]
            touched += 1
            with database.begin() as connection:
                # A row that has been sent goes, and the rows that follow would move up.
                connection.execute(delete(Entry).where(Entry.id == touched))
            add(database, [{"id": 10_000 + touched, "text": "a"}])

    await app(scope("/export"), never, send)
    assert [json.loads(line)["id"] for line in body.splitlines()] == list(range(1, 1_001))
    assert touched > 1


def scope(path: str, spec_version: str = "2.4") -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }


async def never() -> Any:
    await asyncio.Event().wait()


# CSV


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+SUM(A1)",
        "-1+1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "\0=1",
        "＝1",
        "＋1",
        "－1",
        "＠x",
        "-",
        "+1 2",
        "-1\n",
    ],
)
async def test_text_that_would_be_a_formula_is_text(text: str) -> None:
    assert _cell("a", text) == f"'{text}"


@pytest.mark.parametrize("value", [-1, -1.5, 1e300, "-5.50", "+49301234", "-1E-10", "3", "", "a=1", " =", None])
async def test_numbers_stay_numbers_and_text_stays_text(value: Any) -> None:
    assert _cell("a", value) == value


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4), max_size=4))
def test_what_is_written_is_what_a_reader_reads(rows: list[list[str]]) -> None:
    written = _csv(rows)
    assert list(csv.reader(io.StringIO(written.decode(), newline=""), strict=True)) == rows
    assert written.count(b"\r\n") >= len(rows)
    assert not written or written.endswith(b"\r\n")


async def test_a_formula_in_a_row_is_text(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 1, label='=HYPERLINK("http://evil","x")')
    answer = await exported(url, select(Entry.label), format="csv")
    assert answer.body == b'label\r\n"\'=HYPERLINK(""http://evil"",""x"")"\r\n'
    assert lines(await exported(url, select(Entry.label))) == [{"label": '=HYPERLINK("http://evil","x")'}]


class Inner(BaseModel):
    id: int


class Nested(BaseModel):
    id: int
    child: Inner | None = None


class Lists(BaseModel):
    id: int
    tags: list[str] = []


class Flattened(BaseModel):
    id: int
    tags: list[str] = []

    @field_serializer("tags")
    def joined(self, tags: list[str]) -> str:
        return " ".join(tags)


class Recursive(BaseModel):
    id: int
    parent: Recursive | None = None


@pytest.mark.parametrize("model", [Nested, Lists, Recursive])
async def test_csv_refuses_a_model_with_nested_fields_when_it_is_called(url: str, model: type[BaseModel]) -> None:
    with pytest.raises(PageError, match=r"these columns hold .*: (child|tags|parent)\. Pass a model without them"):
        stream(Overdrive(FastAPI(), database_url=url).sessions(), select(Entry), model, format="csv")


async def test_csv_takes_a_nested_field_that_is_serialized_to_text(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 1)
    assert (await exported(url, select(Entry), Flattened, format="csv")).body == b"id,tags\r\n1,\r\n"


async def test_csv_refuses_columns_of_json(url: str, database: sqlalchemy.Engine) -> None:
    with pytest.raises(PageError, match="these columns hold objects or lists: more"):
        stream(Overdrive(FastAPI(), database_url=url).sessions(), select(Entry.id, Entry.more), format="csv")

    class Anything(BaseModel):
        more: Any

    add(database, [{"id": 1, "text": "x", "more": {"a": [1]}}])
    assert lines(await exported(url, select(Entry.more))) == [{"more": {"a": [1]}}]
    # Only the value tells.
    answer = await exported(url, select(Entry.id, Entry.more), Anything, format="csv")
    assert isinstance(answer.error, PageError)
    assert "these columns hold objects or lists: more" in str(answer.error)


# What is asked of a call


@asynccontextmanager
async def a_session() -> AsyncIterator[AsyncSession]:
    yield AsyncSession()


REFUSED: list[tuple[Any, Any, str]] = [
    (AsyncSession(), {}, "take `sessions: SessionFactoryDep`"),
    (Session(), {}, "take `sessions: SessionFactoryDep`"),
    (sessionmaker(), {}, "take `sessions: SessionFactoryDep`"),
    (object(), {}, "take `sessions: SessionFactoryDep`"),
    (a_session, {"format": "xlsx"}, "ndjson or csv, not 'xlsx'"),
    (a_session, {"model": "csv"}, "a pydantic model, not with 'csv'"),
]


@pytest.mark.parametrize(("sessions", "options", "message"), REFUSED)
async def test_arguments_that_cannot_work_name_the_fix(sessions: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        stream(sessions, select(Entry), **options)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (text("SELECT 1"), "cannot be paginated"),
        (select(Entry).limit(5), "has its own LIMIT"),
        (select(Entry, Owner), "pass a model"),
        (select(Entry, Entry.id), "pass a model"),
        (select(Entry.id + 1), "label"),
    ],
)
async def test_statements_that_cannot_be_exported_name_the_fix(statement: Any, message: str) -> None:
    with pytest.raises(PageError, match=message):
        stream(a_session, statement)


@pytest.mark.parametrize(
    "name", ["users.csv", "Übersicht 2026.csv", 'a"; x=".csv', "../../etc/passwd", "a\r\nSet-Cookie: b"]
)
async def test_a_filename_is_one_name_whatever_is_in_it(name: str) -> None:
    header = stream(a_session, select(Entry), filename=name).headers["content-disposition"]
    found = re.fullmatch(r"""attachment; filename(?:="([\w.]+)"|\*=UTF-8''([\w.%-]+))""", header, re.ASCII)
    assert found is not None
    assert unquote(found[1] or found[2]) == name
    assert "content-disposition" not in stream(a_session, select(Entry)).headers


# Sessions and connections


async def test_no_connection_is_held_while_a_chunk_is_sent(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 3_000)
    app = exporting(url, select(Entry), EntryOut)
    pool = app.state.overdrive.engine.sync_engine.pool
    held: list[int] = []
    read: list[int] = []

    async def send(message: Any) -> None:
        held.append(pool.checkedout())
        read.append(statements(events))

    with recorded() as events:
        await app(scope("/export"), never, send)
    assert held == [0] * len(held)
    # The start has the first chunk behind it, and every chunk is sent before the next is read.
    assert read == [1, 1, 2, 3, 4, 4]
    [event] = told(events)
    assert (event.statements, event.rows, event.outcome) == (4, 3_003, "ok")


async def test_the_requests_session_is_committed_before_the_first_batch(url: str, database: sqlalchemy.Engine) -> None:
    app = served(url)

    async def user(db: SessionDep) -> None:
        db.add(Entry(id=1, label="mine"))
        await db.flush()

    @app.get("/export", dependencies=[Depends(user)])
    async def export(sessions: SessionFactoryDep) -> StreamingResponse:
        return stream(sessions, select(Entry.label))

    # Of a pool of one, the request holds the one connection.
    assert lines(await call(app, "/export")) == [{"label": "mine"}]


async def test_a_commit_that_fails_is_answered(url: str, database: sqlalchemy.Engine) -> None:
    app = served(url)

    @app.exception_handler(IntegrityError)
    async def conflict(_request: Request, _error: IntegrityError) -> JSONResponse:
        return JSONResponse({}, 409)

    @app.get("/export")
    async def export(db: SessionDep, sessions: SessionFactoryDep) -> StreamingResponse:
        db.add(Entry(id=1, label="mine", owner_id=99))
        return stream(sessions, select(Entry.label))

    assert (await call(app, "/export")).status == (409)


async def test_nothing_is_kept_of_what_a_batch_does(url: str, database: sqlalchemy.Engine) -> None:
    app = served(url)

    @app.get("/export")
    async def export(sessions: SessionFactoryDep) -> StreamingResponse:
        @asynccontextmanager
        async def tenant() -> AsyncIterator[AsyncSession]:
            async with sessions() as db:
                db.add(Entry(id=1, label="for this batch"))
                await db.flush()
                yield db

        return stream(tenant, select(Entry.label))

    assert lines(await call(app, "/export")) == [{"label": "for this batch"}]
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Entry)) == 0


async def test_a_sessionmaker_of_the_team_needs_no_overdrive(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 150)
    engine = create_async_engine(url)
    assert lines(await exported_by(async_sessionmaker(engine))) == [{"label": "x"}] * 150
    await engine.dispose()


@pytest.mark.parametrize("model", [None, EntryOut])
async def test_criteria_of_a_teams_sessions_hold_in_every_batch(
    url: str, database: sqlalchemy.Engine, model: type[BaseModel] | None
) -> None:
    class Even(Session):
        pass

    @sqlalchemy.event.listens_for(Even, "do_orm_execute")
    def only_even(state: ORMExecuteState) -> None:
        state.statement = state.statement.options(with_loader_criteria(Entry, Entry.id % 2 == 0))

    fill(database, 500)
    app = FastAPI()
    overdrive = Overdrive(app, sessionmaker=async_sessionmaker(create_async_engine(url), sync_session_class=Even))

    @app.get("/export")
    async def export(sessions: SessionFactoryDep) -> StreamingResponse:
        return stream(sessions, select(Entry), model)

    assert [row["id"] for row in lines(await call(app, "/export"))] == list(range(2, 501, 2))
    await overdrive.engine.dispose()


async def test_plain_functions_export_with_their_own_sessions(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 1_200)
    app = served(url)

    @app.get("/export")
    def export(sessions: SyncSessionFactoryDep, db: SyncSessionDep) -> StreamingResponse:
        db.execute(select(Entry.id).limit(1))
        return stream(sessions, select(Entry.id))

    @app.get("/broken")
    def broken(sessions: SyncSessionFactoryDep) -> StreamingResponse:
        return stream(sessions, select(column("nothing")).select_from(Entry))

    pool: Any = app.state.overdrive.sync_sessions().engine.pool
    held: list[int] = []
    with recorded() as events:
        answer = await call(app, "/export", at_start=lambda: held.append(pool.checkedout()))
    assert [row["id"] for row in lines(answer)] == list(range(1, 1_201))
    assert held == [0]
    assert statements(events) == 4
    for _ in range(3):  # each gives its place at the pool back
        assert (await call(app, "/broken")).status == 500


async def test_an_export_in_threads_waits_for_a_connection_outside_of_them(
    url: str, database: sqlalchemy.Engine
) -> None:
    app = served(url)
    holding, asking = asyncio.Event(), asyncio.Event()

    def holds(db: SyncSessionDep) -> None:
        db.execute(select(Entry.id))

    async def waits() -> None:
        holding.set()
        await asking.wait()

    @app.get("/other", dependencies=[Depends(holds), Depends(waits)])
    def other() -> int:
        return 1

    @app.get("/export")
    async def export(sessions: SyncSessionFactoryDep) -> StreamingResponse:
        # By then the export is waiting.
        asyncio.get_running_loop().call_later(0.1, asking.set)
        return stream(sessions, select(Entry.id))

    anyio.to_thread.current_default_thread_limiter().total_tokens = 1
    first = asyncio.create_task(call(app, "/other"))
    await holding.wait()
    assert lines(await call(app, "/export")) == []
    assert (await first).body == b"1"


async def test_nothing_is_kept_of_what_a_batch_in_a_thread_does(url: str, database: sqlalchemy.Engine) -> None:
    class Writing(Session):
        def execute(self, *args: Any, **options: Any) -> Any:
            self.connection().execute(insert(Entry.__table__), [{"id": 1, "text": "for this batch"}])
            return super().execute(*args, **options)

    engine = outside(url)
    answer = await exported_by(SyncSessions.of(engine, Writing))
    engine.dispose()
    assert lines(answer) == [{"label": "for this batch"}]
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Entry)) == 0


async def exported_by(sessions: Any) -> Answer:
    app = FastAPI()

    @app.get("/export")
    def export() -> StreamingResponse:
        return stream(sessions, select(Entry.label))

    return await call(app, "/export")


# Memory


async def test_batches_are_as_large_as_their_rows_allow(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 150, label="x" * 200_000)
    app = exporting(url, select(Entry.id, Entry.label))
    sizes: list[int] = []

    async def send(message: Any) -> None:
        if message.get("body"):
            sizes.append(message["body"].count(b"\n"))

    await app(scope("/export"), never, send)
    assert sizes == [100, *[5] * 10]


async def test_a_batch_has_one_row_at_least(
    url: str, database: sqlalchemy.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overdrive.export._BATCH_BYTES", 1)
    fill(database, 103)
    with recorded() as events:
        assert len(lines(await exported(url, select(Entry)))) == 103
    assert statements(events) == 4


async def test_memory_does_not_grow_with_the_rows(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 20_000, label="x" * 1_000)
    app = exporting(url, select(Entry).order_by(Entry.rank), EntryOut)
    sent = 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    await app(scope("/export"), never, send)
    tracemalloc.start()
    try:
        await app(scope("/export"), never, send)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent > 2 * 20_000_000
    assert peak < 10_000_000


# Errors


async def test_an_error_of_the_first_batch_is_answered(url: str, database: sqlalchemy.Engine) -> None:
    app = exporting(url, select(column("nothing")).select_from(Entry))

    @app.exception_handler(sqlalchemy.exc.DBAPIError)
    async def broken(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": type(error).__name__}, 503)

    answer = await call(app, "/export")
    assert (answer.status, answer.starts, answer.error) == (503, 1, None)
    # Nothing tells the rows of VALUES apart.
    answer = await exported(url, select(values(column("a", sqlalchemy.Integer)).data([(1,)])))
    assert answer.status == 500
    assert isinstance(answer.error, PageError)


class Low(BaseModel):
    id: int = Field(le=1_500)


def asked(address: tuple[str, int], path: str) -> socket.socket:
    """A connection that has sent a request, and takes in little of what it does not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(address)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
    return connection


def everything(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65_536), b""))


async def test_an_error_on_the_way_leaves_a_broken_response(
    url: str, database: sqlalchemy.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    fill(database, 2_000)
    app = exporting(url, select(Entry), Low)

    @app.get("/whole")
    async def whole(sessions: SessionFactoryDep) -> StreamingResponse:
        return stream(sessions, select(Entry).where(Entry.id <= 1_500), Low)

    with recorded() as events, caplog.at_level(logging.ERROR), on_uvicorn(app) as address:
        complete = await asyncio.to_thread(everything, asked(address, "/whole"))
        assert not caplog.records
        broken = await asyncio.to_thread(everything, asked(address, "/export"))
    assert complete.startswith(b"HTTP/1.1 200 OK\r\n")
    assert complete.count(b'{"id":') == 1_500
    assert complete.endswith(b"0\r\n\r\n")
    assert broken.startswith(b"HTTP/1.1 200 OK\r\n")
    assert broken.count(b'{"id":') == 1_100
    # RFC 9112, section 7.1: a chunked message without its last chunk is incomplete.
    assert not broken.endswith(b"0\r\n\r\n")
    assert [event.outcome for event in told(events)] == ["ok", "error"]
    assert [record.name for record in caplog.records] == ["uvicorn.error"]


# Clients


def stalled(database: sqlalchemy.Engine, url: str) -> FastAPI:
    """An export of sixty batches, far more than any socket holds, beside an endpoint that needs a connection too."""
    fill(database, 6_000, label="x" * 10_000)
    app = exporting(url, select(Entry), EntryOut)

    @app.get("/other")
    async def other(db: SessionDep) -> int:
        return (await db.execute(select(literal(1)))).scalar_one()

    return app


async def test_a_client_that_stops_reading_stops_the_batches_and_holds_no_connection(
    url: str, database: sqlalchemy.Engine
) -> None:
    app = stalled(database, url)

    def exports() -> int:
        return sum("export_entries" in event.sql for event in events if isinstance(event, StatementEvent))

    with (
        recorded() as events,
        on_uvicorn(app) as address,
        asked(address, "/export") as connection,
        httpx2.Client(base_url=f"http://127.0.0.1:{address[1]}") as http,
    ):
        connection.recv(1)
        before = -1
        while before != exports():
            before = exports()
            # In a pool of one.
            assert all(http.get("/other").json() == 1 for _ in range(30))
        assert 1 < before < 50
    # The server's end has waited for the request's.
    [event] = [event for event in told(events) if event.path == "/export"]
    assert event.outcome == "disconnected"
    assert exports() == before


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_no_batch_is_begun_for_a_client_that_has_gone(
    url: str, database: sqlalchemy.Engine, spec_version: str
) -> None:
    fill(database, 3_000)
    app = exporting(url, select(Entry), EntryOut)
    gone, drained = asyncio.Event(), asyncio.Event()
    begun = 0

    def begin(*_: Any) -> None:
        nonlocal begun
        begun += 1

    def disconnect() -> None:
        gone.set()
        drained.set()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if not message.get("body"):
            return
        if spec_version == "2.4":
            raise OSError("gone")
        # As uvicorn does: both who wait are told at once, and the sender is told nothing.
        asyncio.get_running_loop().call_soon(disconnect)
        await drained.wait()

    sqlalchemy.event.listen(app.state.overdrive.engine.sync_engine, "before_cursor_execute", begin)
    with recorded() as events, suppress(ClientDisconnect):
        await app(scope("/export", spec_version), receive, send)
    assert begun == 1
    assert [event.outcome for event in told(events)] == ["disconnected"]
    assert app.state.overdrive.engine.sync_engine.pool.checkedout() == 0


# The cache


async def test_a_cached_route_keeps_no_export(url: str, database: sqlalchemy.Engine) -> None:
    fill(database, 250)
    app = served(url)

    @app.get("/export")
    @cached
    async def export(sessions: SessionFactoryDep) -> StreamingResponse:
        return stream(sessions, select(Entry.id))

    with caching(app.state.overdrive):
        async with client(app) as http:
            for _ in range(2):
                response = await http.get("/export")
                assert (response.headers["x-cache"], response.text.count("\n")) == ("miss", 250)
                assert "detail=stream" in response.headers["cache-status"]
