"""Rows are told apart by their primary keys, and whatever changes what was read names something that was read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool.actions import READS, WRITES, Action, Base, User, filled, reads, writes
from sqlalchemy import Engine, ForeignKey, delete, literal, select, true, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, aliased, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from overdrive.context import collecting
from overdrive.pool.engine import create_sync_engine
from overdrive.pool.observe import Outcome, observe
from overdrive.pool.rows import condensed
from overdrive.pool.statement import facts_of


class Recorder:
    """Collects what commits have written."""

    def __init__(self) -> None:
        self.written: set[str] = set()

    async def before(self, writes: frozenset[str], sql: str) -> None:
        self.written |= writes

    async def after(self, token: Any, outcome: Outcome) -> None:
        pass


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def engine(postgres_url: str, recorder: Recorder) -> Iterator[Engine]:
    engine = create_sync_engine(postgres_url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    observe(engine, "main", recorder)
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


IDS = st.integers(1, 4)


def read(engine: Engine, action: Action) -> tuple[Any, set[str]]:
    with collecting() as collected, Session(engine) as session:
        return action(session), collected.tags


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(READS), st.sampled_from(WRITES), IDS, IDS, IDS, IDS)
def test_what_changes_a_reading_names_something_of_it(
    engine: Engine, recorder: Recorder, how: str, change: str, i: int, j: int, k: int, m: int
) -> None:
    assert_named(engine, recorder, reads(i, j)[how], writes(k, m, "new")[change])


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("change", ["update by key", "core delete", "place"])
def test_the_second_row_of_a_reading_counts_as_well(engine: Engine, recorder: Recorder, how: str, change: str) -> None:
    assert_named(engine, recorder, reads(1, 2)[how], writes(2, 2, "new")[change])


def assert_named(engine: Engine, recorder: Recorder, reading: Action, writing: Action) -> None:
    with Session(engine) as session:
        filled(session)
    before, tags = read(engine, reading)
    recorder.written.clear()
    # A row may be missing, and a key there already: then nothing is written.
    with Session(engine) as session, contextlib.suppress(StaleDataError, IntegrityError):
        writing(session)
        session.commit()
    after, _ = read(engine, reading)
    assert after == before or tags & recorder.written


@pytest.mark.parametrize("how", ["get", "get composite", "get uuid", "columns", "both halves"])
@pytest.mark.parametrize(
    "change",
    ["unit of work", "update by key", "bulk by key", "executemany", "core delete", "insert", "place", "token", "add"],
)
def test_other_rows_are_of_no_interest(engine: Engine, recorder: Recorder, how: str, change: str) -> None:
    with Session(engine) as session:
        filled(session)
    _, tags = read(engine, reads(1, 2)[how])
    recorder.written.clear()
    with Session(engine) as session:
        writes(2, 1 if change == "place" else 3, "new")[change](session)
        session.commit()
    assert recorder.written
    assert not tags & recorder.written


def test_rows_beside_a_join_are_told_apart(engine: Engine, recorder: Recorder) -> None:
    with Session(engine) as session:
        filled(session)
    _, tags = read(engine, reads(1, 1)["joined"])
    assert {"main/rows_countries", "main/rows_users#"} <= tags
    assert "main/rows_users" not in tags


def test_what_is_missing_may_come_by_any_insert(engine: Engine) -> None:
    with Session(engine) as session:
        filled(session)
    assert "main/rows_users" in read(engine, reads(4, 1)["get"])[1]
    assert "main/rows_users" not in read(engine, reads(3, 1)["get"])[1]


def test_an_aggregate_of_nothing_is_a_row(engine: Engine, recorder: Recorder) -> None:
    """And what is missing may come without being named."""

    def add(session: Session) -> None:
        session.add(User(id=4, name="new"))

    assert_named(engine, recorder, reads(4, 1)["count"], add)
    statement = select(literal(1)).select_from(User).where(User.id == 4).having(true())
    assert_named(engine, recorder, lambda session: session.execute(statement).all(), add)


class Owner(Base):
    __tablename__ = "rows_owners"
    name: Mapped[str] = mapped_column(primary_key=True)


class Part(Base):
    """A part's key is its owner's, and what refers to it changes with that."""

    __tablename__ = "rows_parts"
    owner: Mapped[str] = mapped_column(
        ForeignKey("rows_owners.name", onupdate="CASCADE", ondelete="CASCADE"), primary_key=True
    )


class Detail(Base):
    __tablename__ = "rows_details"
    id: Mapped[int] = mapped_column(primary_key=True)
    part: Mapped[str | None] = mapped_column(
        ForeignKey("rows_parts.owner", onupdate="CASCADE", ondelete="SET NULL (part)")
    )


CHANGING = {
    "update": update(Owner).values(name="y"),
    "upsert": postgresql.insert(Owner)
    .values(name="x")
    .on_conflict_do_update(index_elements=[Owner.name], set_={"name": "y"}),
    "delete": delete(Owner),
    "delete by another name": delete(aliased(Owner)),
}


@pytest.mark.parametrize("how", CHANGING)
def test_what_changes_along_may_change_more(engine: Engine, recorder: Recorder, how: str) -> None:
    with Session(engine) as session:
        filled(session)
        session.add(Owner(name="x"))
        session.flush()
        session.add(Part(owner="x"))
        session.flush()
        session.add(Detail(id=1, part="x"))
        session.commit()
    before, tags = read(engine, lambda session: session.scalar(select(Detail.part).where(Detail.id == 1)))
    recorder.written.clear()
    with Session(engine) as session:
        session.execute(CHANGING[how], execution_options={"synchronize_session": False})
        session.commit()
    after, _ = read(engine, lambda session: session.scalar(select(Detail.part).where(Detail.id == 1)))
    assert after != before
    assert tags & recorder.written


def test_what_is_replaced_was_there_before() -> None:
    """SQLite's OR REPLACE deletes what is in the way, with all that refers to it."""
    statement = sqlite.insert(User).prefix_with("OR REPLACE").values(id=1, name="new")
    facts = facts_of(compiled := statement.compile(dialect=sqlite.dialect()), str(compiled))
    assert facts.scattered >= {"rows_users", "rows_memberships", "rows_posts"}


def test_a_key_of_another_type_is_not_compared() -> None:
    """SQLite finds row 1 by "1", too."""
    facts = facts_of(compiled := select(User).where(User.id == 1).compile(), str(compiled))
    [rows] = facts.rows_read
    assert rows.tags([{"id_1": "1"}]) is None
    assert rows.tags([{"id_1": True}]) is None
    assert rows.tags([{"id_1": 1}]) is not None


def test_many_rows_are_a_table() -> None:
    facts = facts_of(compiled := select(User).where(User.id == 1).compile(), str(compiled))
    [rows] = facts.rows_read
    assert rows.tags([{"id_1": number} for number in range(51)]) is None
    tags = {f"main/rows_users#{number:04x}" for number in range(60)} | {"main/rows_users#", "main/posts#0001", "main/*"}
    assert condensed(tags) == {"main/rows_users", "main/rows_users#", "main/posts#0001", "main/*"}


def test_a_reading_of_many_rows_has_few_tags(engine: Engine) -> None:
    def several(session: Session) -> None:
        for number in range(300):
            session.scalar(select(User.name).where(User.id == number))

    _, tags = read(engine, several)
    assert len(tags) <= 101
    assert {"main/rows_users", "main/rows_users#"} <= tags
