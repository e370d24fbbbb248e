"""Walks beside the plain list, while others write, and the plans of their statements, on PostgreSQL and SQLite."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagination.cases import BINDING, KEY, Walk, Walker, walks
from sqlalchemy import (
    REAL,
    BigInteger,
    Column,
    Connection,
    Double,
    Engine,
    Enum,
    Index,
    Integer,
    Interval,
    MetaData,
    Numeric,
    Select,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, with_loader_criteria
from sqlalchemy.pool import NullPool

from overdrive.errors import InvalidCursorError, PageError
from overdrive.pagination import walk
from overdrive.pagination.cursor import Position, encode
from overdrive.pagination.order import order_text, sorts_of
from overdrive.pagination.page import CursorParams
from overdrive.pagination.recipe import Recipes
from overdrive.pagination.select import run, run_async
from overdrive.pagination.walk import cursor_page, statements

pytestmark = pytest.mark.anyio

relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def postgres(postgres_url: str) -> Iterator[Engine]:
    engine = create_engine(postgres_url.replace("asyncpg", "psycopg"))
    yield engine
    engine.dispose()


@pytest.fixture
def lite() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    yield engine
    engine.dispose()


@pytest.fixture(params=["lite", "postgres"])
def walker(request: pytest.FixtureRequest) -> Walker:
    made: Walker = request.getfixturevalue(f"{request.param}_walker")
    return made


@settings(max_examples=500, deadline=None, suppress_health_check=relaxed)
@given(walks(60))
def test_any_walk_is_the_list_on_sqlite(lite_walker: Walker, walk: Walk) -> None:
    lite_walker.check(walk)


@settings(max_examples=250, deadline=None, suppress_health_check=relaxed)
@given(walks(60))
def test_any_walk_is_the_list_on_postgresql(postgres_walker: Walker, walk: Walk) -> None:
    postgres_walker.check(walk)


@settings(max_examples=80, deadline=None, suppress_health_check=relaxed)
@given(walks(60), st.randoms(use_true_random=False))
def test_whatever_others_write_an_untouched_row_appears_once(
    walker: Walker, walk: Walk, generator: random.Random
) -> None:
    walker.check_under_writes(walk, generator)


# Plans

ROWS, SIZE = 20_000, 20
#: What one page may read, in blocks of PostgreSQL: two for each row, and the way to each range of the index.
BLOCKS = 2 * (SIZE + 1) + 30

directions = list(product([False, True], repeat=3))


def _table(nullable: tuple[bool, bool]) -> Table:
    return Table(
        "walk_plans",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("a", Integer, nullable=nullable[0]),
        Column("b", Integer, nullable=nullable[1]),
        Column("padding", String),
    )


def _fill(connection: Connection, table: Table, rows: int) -> None:
    """Fill in an order that no index has: with three values of a and a thousand of b, or with NULLs among them."""
    table.create(connection)
    ids = list(range(rows))
    random.Random(1).shuffle(ids)
    a = {i: None if table.c.a.nullable and i % 4 == 0 else i % 3 for i in ids}
    b = {i: None if table.c.b.nullable and i // 12 % 4 == 0 else i // 12 % 1000 for i in ids}
    connection.execute(insert(table), [{"id": i, "a": a[i], "b": b[i], "padding": "x" * 40} for i in ids])


def _orders(table: Table) -> Iterator[list[Any]]:
    places = [[None, "nulls_first", "nulls_last"] if table.c[name].nullable else [None] for name in "ab"]
    for descending, *nulls in product(directions, *places):
        order = []
        for column, desc, place in zip((table.c.a, table.c.b, table.c.id), descending, [*nulls, None], strict=True):
            directed = column.desc() if desc else column.asc()
            order.append(getattr(directed, place)() if place else directed)
        yield order


def _positions(connection: Connection, table: Table, order: list[Any]) -> list[tuple[Any, ...]]:
    """Positions at the ends, in the middle, and where a value or the NULLs of `a` begin and end."""
    keys = select(table.c.a, table.c.b, table.c.id)
    edges = connection.execute(
        select(func.min(table.c.id), func.max(table.c.id)).group_by(table.c.a, table.c.b.is_(None))
    )
    ids = {id_ for pair in edges for id_ in pair}
    rows = [connection.execute(keys.order_by(*order).offset(n).limit(1)).one() for n in (0, ROWS // 2, ROWS - 3)]
    return [tuple(row) for row in (*rows, *connection.execute(keys.where(table.c.id.in_(ids))))]


def _blocks_read(connection: Connection, stmt: Select[Any], position: Position) -> int:
    """Fill one page as `cursor_page` does; return the blocks all its statements have read."""
    blocks = found = 0
    for statement in statements(stmt, sorts_of(stmt, "postgresql"), position, "postgresql"):
        compiled = statement.limit(SIZE + 1 - found).compile(dialect=connection.dialect)
        explained = connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}", dict(compiled.params)
        ).scalar_one()
        plan = explained[0]["Plan"]
        blocks += plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        found += int(plan["Actual Rows"])
        if found > SIZE:
            break
    return blocks


@pytest.mark.parametrize("nullable", list(product([False, True], repeat=2)))
def test_a_page_reads_few_blocks_at_any_depth_in_any_order(postgres: Engine, nullable: tuple[bool, bool]) -> None:
    table = _table(nullable)
    with postgres.connect() as connection:
        _fill(connection, table, ROWS)
        connection.execute(text("ANALYZE walk_plans"))
        generator = random.Random(2)
        for order in _orders(table):
            stmt = select(table).order_by(*order)
            with connection.begin_nested() as savepoint:
                Index("walk_plans_order", *order).create(connection)
                positions = _positions(connection, table, order)
                for values in (*positions[:3], *generator.sample(positions[3:], 4)):
                    for backward in (False, True):
                        read = _blocks_read(connection, stmt, Position(values, backward))
                        assert read <= BLOCKS, (str(stmt), values, backward)
                savepoint.rollback()
        connection.rollback()


@pytest.mark.parametrize("nullable", list(product([False, True], repeat=2)))
def test_every_statement_is_one_search_of_the_index_on_sqlite(lite: Engine, nullable: tuple[bool, bool]) -> None:
    table = _table(nullable)
    with lite.connect() as connection:
        _fill(connection, table, 300)
        for order in _orders(table):
            # SQLite has no index that puts NULLs elsewhere; for the first of the compared keys it needs none.
            if "NULLS" in str(order[1]):
                continue
            stmt = select(table).order_by(*order)
            index = Index("walk_plans_order", *(part.element if "NULLS" in str(part) else part for part in order))
            index.create(connection)
            places = [(1, None) if each else (1,) for each in nullable]
            for values, backward in product(product(*places, [5]), [False, True]):
                for statement in statements(stmt, sorts_of(stmt, "sqlite"), Position(values, backward), "sqlite"):
                    compiled = statement.limit(5).compile(dialect=connection.dialect)
                    arguments = tuple(compiled.params[name] for name in compiled.positiontup or ())
                    plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}", arguments)
                    steps = [row[3].partition(" (")[0] for row in plan]
                    assert steps == ["SEARCH walk_plans USING INDEX walk_plans_order"], (str(compiled), arguments)
            index.drop(connection)


def test_ties_before_the_position_are_not_read_on_sqlite(lite: Engine) -> None:
    """A row value would leave out the rowid, and read the ties one by one."""
    table = _table((False, False))
    with lite.connect() as connection:
        _fill(connection, table, ROWS)
        Index("walk_plans_order", table.c.a, table.c.id).create(connection)
        stmt = select(table).order_by(table.c.a, table.c.id)
        instructions = 0

        def count() -> None:
            nonlocal instructions
            instructions += 100

        driver: Any = connection.connection.driver_connection
        driver.set_progress_handler(count, 100)
        walked = run(
            _steps(stmt, _cursor_after(connection, stmt, (1, ROWS // 2)), "sqlite"), _sender(connection.execute)
        )
        driver.set_progress_handler(None, 0)
    assert len(walked.items) == SIZE
    assert instructions < 100 * SIZE


def _steps(stmt: Any, cursor: str | None, dialect_name: str, size: int = SIZE) -> Any:
    params = CursorParams(cursor=cursor, size=size)
    return cursor_page(stmt, params, recipes=Recipes(), dialect_name=dialect_name, binding=BINDING, keys=[KEY])


def _sender(execute: Any) -> Any:
    return lambda statement, parameters, _projected: execute(statement, parameters)


def _cursor_after(connection: Connection, stmt: Select[Any], values: tuple[Any, ...], backward: bool = False) -> str:
    described = walk.Walk.of(stmt, connection.dialect.name, None)
    return encode(values, described.types, backward=backward, binding=BINDING + described.bound({}), key=KEY)


def test_one_statement_serves_an_order_of_one_direction_on_postgresql() -> None:
    table = _table((True, False))
    for stmt, texts in [
        (select(table.c.id).order_by(table.c.b), ["(walk_plans.b, walk_plans.id) > "]),
        (select(table.c.id).order_by(table.c.b.desc()), ["(walk_plans.b, walk_plans.id) < "]),
        (select(table.c.id).order_by(table.c.a.desc()), ["(walk_plans.a, walk_plans.id) < "]),
        (select(table.c.id).order_by(table.c.a), ["(walk_plans.a, walk_plans.id) > ", "a IS NULL"]),
        (select(table.c.id).order_by(table.c.b, table.c.id.desc()), ["id < ", "b > "]),
    ]:
        values = (1,) * len(sorts_of(stmt, "postgresql"))
        sent = [str(each) for each in statements(stmt, sorts_of(stmt, "postgresql"), Position(values), "postgresql")]
        assert len(sent) == len(texts)
        assert all(part in whole for part, whole in zip(texts, sent, strict=True))


# What a client asks for


def test_the_last_page_is_asked_for_by_name(walker: Walker) -> None:
    rows = [(n, 0, 0) for n in range(5)]
    _, stmt, _ = walker.prepare(Walk(1, rows, [], False, [(2, False)]))
    last = walker.page(stmt, "last", 2)
    assert (last.items, last.next_cursor) == ([3, 4], None)
    before = walker.page(stmt, last.prev_cursor, 2)
    assert before.items == [1, 2]
    assert walker.page(stmt, before.next_cursor, 2).items == [3, 4]
    assert walker.page(stmt, "last", 5).prev_cursor is None
    for other in ("Last", "first", "last "):
        with pytest.raises(InvalidCursorError):
            walker.page(stmt, other, 2)


# What hangs on a statement


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "walk_notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[int]
    mood: Mapped[int | None]
    topic: Mapped[str | None]


NOTES = [
    {"id": n, "tenant": n % 2, "mood": None if n % 3 == 0 else n % 4, "topic": None if n % 5 == 0 else f"t{n % 3}"}
    for n in range(40)
]
ORDERS: list[list[Any]] = [
    [Note.mood, Note.topic.desc()],
    [Note.mood.desc().nulls_last(), Note.topic.asc().nulls_first()],
    [Note.topic.asc().nulls_last(), Note.mood.desc()],
]


@pytest.mark.parametrize("where", ["statement", "session"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("database", ["lite", "postgres"])
def test_no_statement_of_a_page_loses_the_criteria(
    request: pytest.FixtureRequest, database: str, order: list[Any], where: str
) -> None:
    engine: Engine = request.getfixturevalue(database)
    mine = with_loader_criteria(Note, Note.tenant == 1)
    with engine.connect() as connection, Session(connection) as session:
        Base.metadata.create_all(connection)
        session.execute(insert(Note), NOTES)
        stmt = select(Note).order_by(*order)
        expected = [note.id for note in session.scalars(stmt.options(mine).order_by(Note.id))]
        if where == "statement":
            stmt = stmt.options(mine)
        else:
            event.listen(session, "do_orm_execute", lambda state: _add_option(state, mine))
        sent: list[str] = []
        event.listen(connection, "before_cursor_execute", lambda *arguments: sent.append(arguments[2]))
        walked, cursor = [], None
        while True:
            # One row a page stands at every kind of position, so every kind of statement is sent.
            page = run(_steps(stmt, cursor, engine.dialect.name, size=1), _sender(session.execute))
            walked += [note.id for note in page.items]
            if (cursor := page.next_cursor) is None:
                break
        session.rollback()
    assert sorted(walked) == sorted(expected)
    assert all("walk_notes.tenant = " in each for each in sent)
    assert len(set(sent)) > 4


def _add_option(state: Any, option: Any) -> None:
    state.statement = state.statement.options(option)


# Types that do not travel as they are


def _table_of(type_: Any, name: str = "walk_of_type") -> Table:
    return Table(name, MetaData(), Column("id", Integer, primary_key=True), Column("key", type_, nullable=False))


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        # Drivers say 365 days for a year, and PostgreSQL compares it as 360.
        (Interval(), ["interval '1 year'", "interval '361 days'", "interval '12 months'", "interval '364 days'"]),
        (Double(), ["'NaN'", "'Infinity'", "'-Infinity'", "-0.0", "0.0", "1e308", "5e-324"]),
        (Numeric(), ["'NaN'", "0", "0.00", "-1e40", "1e-40"]),
        (REAL(), ["0.1", "0.2", "16777216", "'NaN'"]),
    ],
)
async def test_values_are_found_again_as_the_database_has_them(
    postgres_url: str, type_: Any, values: list[str]
) -> None:
    table = _table_of(type_)
    for driver in ("asyncpg", "psycopg"):
        engine = create_async_engine(postgres_url.replace("asyncpg", driver), poolclass=NullPool)
        async with engine.connect() as connection:
            await connection.run_sync(table.create)
            for number, value in enumerate([*values, *values]):
                await connection.execute(text(f"INSERT INTO walk_of_type VALUES ({number}, {value})"))
            stmt = select(table.c.id).order_by(table.c.key)
            walked, cursor = [], None
            while True:
                page = await run_async(_steps(stmt, cursor, "postgresql", size=1), _sender(connection.execute))
                walked += page.items
                assert len(walked) <= 2 * len(values)
                if (cursor := page.next_cursor) is None:
                    break
            assert walked == list(await connection.scalars(stmt.order_by(table.c.id)))
            await connection.rollback()
        await engine.dispose()


@pytest.mark.parametrize("type_", [REAL(), Interval()])
def test_a_type_that_travels_as_another_is_compared_as_itself(type_: Any) -> None:
    stmt = select(_table_of(type_)).order_by("key")
    made = str(next(statements(stmt, sorts_of(stmt, "postgresql"), Position((1, 1)), "postgresql")))
    assert "WHERE (walk_of_type.key, walk_of_type.id) > (CAST(" in made
    assert "ORDER BY walk_of_type.key ASC" in made


@pytest.mark.parametrize("type_", [JSONB(), ARRAY(Integer)])
def test_what_no_cursor_holds_is_refused_on_the_first_page(type_: Any) -> None:
    with pytest.raises(PageError, match=r"cast\(\)"):
        next(_steps(select(_table_of(type_)).order_by("key"), None, "postgresql"))


def test_a_column_of_another_type_makes_another_order() -> None:
    texts = [
        order_text(sorts_of(select(_table_of(type_)).order_by("key"), "postgresql"))
        for type_ in (Integer(), BigInteger(), String(), Enum("a", "b", name="e"), Enum("a", "c", name="e"))
    ]
    assert len(set(texts)) == len(texts)
