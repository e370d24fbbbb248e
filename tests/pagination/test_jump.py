"""Pages found from a row near them, beside the plain list and what PostgreSQL reads for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagination.cases import Keeping, Walk, Walker, at_once, walks
from sqlalchemy import Column, Connection, Engine, Integer, MetaData, Select, String, Table, create_engine, select, text

from overdrive.pagination import boundary, number
from overdrive.pagination.boundary import nearest, noted
from overdrive.pagination.page import LimitOffsetParams
from overdrive.pagination.recipe import Recipes
from overdrive.pagination.select import run

relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


# What is known of a list


@given(st.sets(st.integers(1, 10_000), max_size=50), st.integers(0, 10_000))
def test_nothing_known_is_nearer_than_the_nearest(numbers: set[int], wanted: int) -> None:
    found = nearest(numbers, wanted)
    assert found in {0, *numbers}
    assert abs(found - wanted) == min(abs(each - wanted) for each in {0, *numbers})


def test_a_list_read_from_end_to_end_is_known_evenly() -> None:
    known: dict[int, int] = {}
    for row in range(100, 250_000, 100):
        known = noted(known, row, row)
    rows = [0, *sorted(known)]
    assert len(known) == boundary.MOST
    assert known == {row: row for row in known}
    assert rows[-1] == 249_900
    # On average it is every 250 rows.
    assert max(after - before for before, after in pairwise(rows)) <= 1_000


# Any list


@pytest.fixture
def all_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each page were far behind, and each row worth remembering."""
    monkeypatch.setattr(number, "DEEP", -1)
    monkeypatch.setattr(boundary, "NEAR", 0)
    monkeypatch.setattr(boundary, "MOST", 3)


pages = st.lists(st.tuples(st.integers(0, 16), st.integers(1, 6)), min_size=1, max_size=6)


def _check(walker: Walker, walk: Walk, pages: list[tuple[int, int]]) -> None:
    _, stmt, tie_break = walker.prepare(walk)
    rows = list(walker.connection.scalars(stmt.order_by(*tie_break)))
    keeping = Keeping()
    for offset, size in pages:
        assert walker.numbered(stmt, offset, size, keeping) == rows[offset : offset + size]


@settings(max_examples=120, deadline=None, suppress_health_check=relaxed)
@given(walks(60), pages)
def test_any_page_is_a_piece_of_the_list_on_sqlite(
    all_deep: None, lite_walker: Walker, walk: Walk, pages: list[tuple[int, int]]
) -> None:
    _check(lite_walker, walk, pages)


@settings(max_examples=80, deadline=None, suppress_health_check=relaxed)
@given(walks(60), pages)
def test_any_page_is_a_piece_of_the_list_on_postgresql(
    all_deep: None, postgres_walker: Walker, walk: Walk, pages: list[tuple[int, int]]
) -> None:
    _check(postgres_walker, walk, pages)


# What PostgreSQL reads

ROWS, SIZE = 40_000, 20


@pytest.fixture(scope="module")
def postgres(postgres_url: str) -> Iterator[Engine]:
    engine = create_engine(postgres_url.replace("asyncpg", "psycopg"))
    yield engine
    engine.dispose()


class Reader:
    """Reads pages of a list, and counts the blocks that PostgreSQL reads for each."""

    def __init__(self, connection: Connection, stmt: Select[Any]) -> None:
        self.connection = connection
        self.stmt = stmt
        self.recipes = Recipes()
        self.blocks = 0

    def send(self, statement: Any, parameters: Any, _projected: bool) -> Any:
        compiled = statement.compile(self.connection.engine)
        values = compiled.construct_params(parameters)
        explained = self.connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}", values)
        plan = explained.scalar_one()[0]["Plan"]
        self.blocks += plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        return self.connection.execute(statement, parameters)

    def page(self, offset: int, keeping: Keeping | None) -> tuple[list[Any], int]:
        """Return the items of a page, and the blocks that were read for them."""
        self.blocks = 0
        params = LimitOffsetParams(limit=SIZE, offset=offset)
        options: dict[str, Any] = {"recipes": self.recipes, "total": "none", "dialect_name": "postgresql"}
        found = run(number.page(self.stmt, params, keeper=keeping, **options), self.send, at_once)
        return found.items, self.blocks


@pytest.mark.parametrize("mixed", [False, True])
def test_a_page_near_one_that_was_visited_costs_what_the_first_one_costs(postgres: Engine, mixed: bool) -> None:
    table = Table(
        "jump_plans", MetaData(), Column("id", Integer, primary_key=True), Column("a", Integer), Column("b", String)
    )
    with postgres.connect() as connection:
        table.drop(connection, checkfirst=True)
        table.create(connection)
        connection.execute(
            text(f"INSERT INTO jump_plans SELECT n, n % 5000, repeat('x', 100) FROM generate_series(1, {ROWS}) n")
        )
        directed = "a NULLS FIRST, id DESC" if mixed else "a NULLS FIRST, id"
        connection.execute(text(f"CREATE INDEX ON jump_plans ({directed})"))
        connection.commit()
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE jump_plans"))

        ids = [table.c.id.desc()] if mixed else []
        reader, keeping = Reader(connection, select(table).order_by(table.c.a.nulls_first(), *ids)), Keeping()
        deep = 30_000
        _, first = reader.page(0, keeping)
        items, cold = reader.page(deep, keeping)
        assert items == reader.page(deep, None)[0]
        for pages in (0, -1, 1, 5, -20):
            items, warm = reader.page(deep + pages * SIZE, keeping)
            plain, by_offset = reader.page(deep + pages * SIZE, None)
            assert items == plain
            # Where the visibility map says nothing yet, each row that is passed is a block.
            assert warm <= 3 * first + max(0, abs(pages) - 1) * SIZE
            assert by_offset > 2 * warm
        assert cold <= 1.5 * by_offset
        connection.rollback()
        table.drop(connection)
        connection.commit()
