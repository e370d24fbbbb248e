"""What a compiled statement says of itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import (
    ForeignKey,
    Integer,
    Sequence,
    String,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
    table,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine.interfaces import Compiled
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    column_property,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    with_loader_criteria,
)
from sqlalchemy.orm import aliased as orm_aliased
from sqlalchemy.sql import ColumnElement

from overdrive.pool.statement import EVERYTHING, Facts, facts_of, outline


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    posts: Mapped[list[Post]] = relationship(back_populates="user")


class Post(Base):
    __tablename__ = "posts"
    __table_args__ = {"schema": "blog"}  # noqa: RUF012
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    user: Mapped[User] = relationship(back_populates="posts")


class Clock(ColumnElement[int]):
    inherit_cache = True
    type = Integer()


@compiles(Clock)
def _compile_clock(element: Clock, compiler: Any, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())"


def compiled(statement: Any) -> Compiled:
    return statement.compile(dialect=postgresql.dialect())  # type: ignore[no-any-return]


def facts(statement: Any) -> Facts:
    return facts_of(compiled(statement), str(compiled(statement)))


USERS, POSTS, BOTH = {"users"}, {"blog.posts"}, {"users", "blog.posts"}

PLAIN = {
    "entity": (select(User), USERS),
    "columns": (select(User.id, User.name), USERS),
    "join": (select(User).join(User.posts), BOTH),
    "joined eager load": (select(User).options(joinedload(User.posts)), BOTH),
    "select-in eager load reads its tables with a statement of its own": (
        select(User).options(selectinload(User.posts)),
        USERS,
    ),
    "exists": (select(User).where(User.posts.any()), BOTH),
    "scalar exists": (select(exists().where(Post.id == 1)), POSTS),
    "in subquery": (select(User).where(User.id.in_(select(Post.user_id))), BOTH),
    "cte": (select(select(Post).cte("c")), POSTS),
    "union": (select(User.id).union(select(Post.id)), BOTH),
    "alias": (select(orm_aliased(User)), USERS),
    "core alias": (select(User.__table__.alias()), USERS),
    "lateral": (select(User, select(Post.id).where(Post.user_id == User.id).lateral()), BOTH),
    "loader criteria": (
        select(User).options(with_loader_criteria(User, User.id.in_(select(Post.user_id)))),
        BOTH,
    ),
    "lightweight table": (select(column("x")).select_from(table("t")), {"t"}),
    "aggregates": (select(func.count(), func.sum(Post.id), func.max(Post.id)).select_from(Post), POSTS),
    "window": (select(func.row_number().over(order_by=User.id)), USERS),
    "expressions": (select(cast(User.id, String), case((User.id > 1, 2), else_=3), User.name.ilike("a%")), USERS),
    "literals": (select(literal(1), null(), literal_column("1"), literal_column("'x'")), set()),
    "type coercion": (select(type_coerce(User.id, String)), USERS),
    "limit": (select(User).limit(3).offset(2), USERS),
}

NOT_PLAIN = {
    "for update": (select(User).with_for_update(), None),
    "now": (select(User).where(User.id > func.now()), "now()"),
    "random": (select(User).order_by(func.random()), "random()"),
    "unknown function": (select(func.charge_card(User.id)), "charge_card()"),
    "function of a schema": (select(func.billing.lower(User.name)), "lower()"),
    "sequence": (select(Sequence("s").next_value()), "next_value"),
    "text in a select": (select(User).where(text("1 = 1")), "text()"),
    "literal_column with a query in it": (select(literal_column("(SELECT 1 FROM t)")), "literal_column()"),
    "element of one's own": (select(Clock()), "Clock"),
    "clock by name": (select(User).where(User.name > literal_column("CURRENT_TIMESTAMP")), "literal_column()"),
    "role by name": (select(literal_column("current_user")), "literal_column()"),
}

WRITES = {
    "insert": (insert(User).values(name="x"), USERS),
    "update": (update(User).values(name="x").where(User.id.in_(select(Post.user_id))), USERS),
    "delete": (delete(Post), POSTS),
    "insert from select": (insert(Post).from_select(["user_id"], select(User.id)), POSTS),
    "upsert": (postgresql.insert(User).values(id=1, name="x").on_conflict_do_nothing(), USERS),
    "insert in a cte": (select(insert(Post).values(user_id=1).returning(Post.id).cte("c").c.id), POSTS),
    "table of which only the name is known": (delete(table("users", column("id"))), {EVERYTHING}),
    "insert into such a table": (insert(table("users", column("id"))), USERS),
    "alias": (update(orm_aliased(User)).values(name="x"), USERS),
    "text in a cte": (
        select(text("DELETE FROM users RETURNING id").columns(column("id", Integer)).cte()),
        {EVERYTHING},
    ),
    "text that explains by doing": (text("EXPLAIN (COSTS, ANALYZE) DELETE FROM users"), {EVERYTHING}),
    "text that does more": (text("SET x = 1; DELETE FROM users"), {EVERYTHING}),
    "text that does more than a savepoint": (text("SAVEPOINT x; DELETE FROM users"), {EVERYTHING}),
    "text": (text("UPDATE users SET name = 'x'"), {EVERYTHING}),
    "text with a cte": (text("WITH x AS (DELETE FROM users RETURNING 1) SELECT 1"), {EVERYTHING}),
    "text with a comment first": (text("/* x */ SELECT 1"), {EVERYTHING}),
}


class Parent(Base):
    __tablename__ = "parents"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    number: Mapped[int] = column_property(select(func.count(Post.id)).scalar_subquery())
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "parent", "with_polymorphic": "*"}  # noqa: RUF012


class Heir(Parent):
    __tablename__ = "heirs"
    __mapper_args__ = {"polymorphic_identity": "heir"}  # noqa: RUF012
    id: Mapped[int] = mapped_column(ForeignKey("parents.id"), primary_key=True)


#: What a mapping adds to a SELECT, it adds as well where that is a part of another statement.
WITHIN = {
    "column property": (select(select(Parent).subquery()), {"parents", "heirs", "blog.posts"}),
    "in a union": (select(Parent).union(select(Parent)), {"parents", "heirs", "blog.posts"}),
    "loader criteria": (
        select(Heir.id)
        .where(Heir.id.in_(select(User.id)))
        .options(with_loader_criteria(User, User.id.in_(select(Post.user_id)))),
        {"parents", "heirs", "users", "blog.posts"},
    ),
}


@pytest.mark.parametrize("name", WITHIN)
def test_what_mappings_add_inside_of_a_statement_is_read(name: str) -> None:
    statement, tables = WITHIN[name]
    assert facts(statement).reads == tables


@pytest.mark.parametrize("name", PLAIN)
def test_plain_reads_name_their_tables(name: str) -> None:
    statement, tables = PLAIN[name]
    assert facts(statement) == Facts(frozenset(tables), frozenset(), None, plain=True)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_depends_on_more_than_its_tables_is_not_plain(name: str) -> None:
    statement, why = NOT_PLAIN[name]
    found = facts(statement)
    assert not found.plain
    assert not found.writes
    assert (found.unknown is None) if why is None else (why in str(found.unknown))


@pytest.mark.parametrize("name", WRITES)
def test_writes_name_their_tables(name: str) -> None:
    statement, tables = WRITES[name]
    found = facts(statement)
    assert (found.writes, found.plain) == (frozenset(tables), False)


@pytest.mark.parametrize(
    "sql", ["SELECT 1", "  values (1)", "SHOW server_version", "explain SELECT 1", "SET x = 1", "SELECT 1; "]
)
def test_textual_reads_write_nothing_and_describe_nothing(sql: str) -> None:
    found = facts(text(sql))
    assert (found.reads, found.writes, found.plain) == ({EVERYTHING}, frozenset(), False)
    assert found.unknown


@pytest.mark.parametrize("sql", ["SAVEPOINT a", "RELEASE SAVEPOINT a", "ROLLBACK TO SAVEPOINT a"])
def test_savepoints_neither_read_nor_write(sql: str) -> None:
    assert facts(text(sql)) == Facts(frozenset(), frozenset(), None, plain=False)


def test_ddl_writes_everything() -> None:
    from sqlalchemy.schema import CreateTable

    assert facts(CreateTable(User.__table__)).writes == {EVERYTHING}  # type: ignore[arg-type]


def test_driver_sql_is_text() -> None:
    assert facts_of(None, "DELETE FROM users").writes == {EVERYTHING}


def test_compiled_statement_is_read_once() -> None:
    once = compiled(select(User))
    assert facts_of(once, "") is facts_of(once, "")


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("UPDATE t2\n SET name=$1::VARCHAR WHERE id = %(id_1)s", "UPDATE t2 SET name=$1::VARCHAR WHERE id = %(id_1)s"),
        ("UPDATE t2 SET a = 'it''s hush', b=-7.5e3 WHERE c IN (1, ?)", "UPDATE t2 SET a = ??, b=-? WHERE c IN (?, ?)"),
        (r"INSERT INTO t VALUES (E'it\'s hush', 'C:\', 'hush')", "INSERT INTO t VALUES (?, ?, ?)"),
        ("SELECT $$hush 'x$$, $q$hush$$ 'hush$q$ FROM t", "SELECT ?, ? FROM t"),
        ("/* don't */ UPDATE t -- can't\nSET a = 'hush'", "UPDATE t SET a = ?"),
        ("""INSERT INTO "o'clock" VALUES ('hush')""", """INSERT INTO "o'clock" VALUES (?)"""),
        ("UPDATE t SET a = 'hush " + "hush " * 1000, "UPDATE t SET a = ?"),
        ("UPDATE t SET " + "a" * 1000, ("UPDATE t SET " + "a" * 1000)[:200]),
    ],
)  # fmt: skip
def test_an_outline_has_no_values(sql: str, expected: str) -> None:
    assert outline(sql) == expected


@given(st.lists(st.sampled_from(["'", "''", "hush", " ", "\\", "$$", "$1", '"', "E'", "--", "/*", "*/", "\n", "x"])))
def test_an_outline_of_anything_is_short_and_one_line(parts: list[str]) -> None:
    found = outline("".join(parts))
    assert len(found) <= 200
    assert "\n" not in found


@given(st.text().filter(lambda value: "\0" not in value))
def test_a_literal_is_never_told(value: str) -> None:
    quoted = value.replace("'", "''")
    assert outline(f"SET a = '{quoted}', b = 'hush'").replace("?", "") == "SET a = , b = "
