"""Pages of real statements, on SQLite and PostgreSQL."""

from __future__ import annotations

import enum
import random
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from sqlalchemy import (
    CHAR,
    REAL,
    Column,
    DateTime,
    Engine,
    Enum,
    ForeignKey,
    LargeBinary,
    MetaData,
    Numeric,
    Row,
    Select,
    String,
    Table,
    TypeDecorator,
    Uuid,
    case,
    create_engine,
    delete,
    desc,
    event,
    func,
    insert,
    literal_column,
    select,
    text,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    contains_eager,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
    with_loader_criteria,
)
from sqlalchemy.pool import NullPool

from overdrive.errors import InvalidCursorError, PageError
from overdrive.pagination import number as numbered
from overdrive.pagination.number import CAP, DEEP
from overdrive.pagination.order import order_text, sorts_of
from overdrive.pagination.page import CursorPage, CursorParams, Found, LimitOffsetParams, PageParams
from overdrive.pagination.recipe import Recipes
from overdrive.pagination.select import once, run, run_async
from overdrive.pagination.walk import cursor_page, walkable

pytestmark = pytest.mark.anyio

BINDING, KEY = b"route", b"k" * 32


def order_binding(stmt: Any, dialect_name: str) -> str:
    """What a cursor is bound to of the order of `stmt`."""
    return order_text(sorts_of(walkable(stmt), dialect_name))


class Mood(enum.Enum):
    SAD = "s"
    OK = "o"
    GLAD = "g"


class Reversed(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value and value[::-1]

    process_result_value = process_bind_param


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "page_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    team: Mapped[int]
    rank: Mapped[int | None]
    nick: Mapped[str | None]
    posts: Mapped[list[Post]] = relationship(back_populates="user", order_by="Post.id")


class Post(Base):
    __tablename__ = "page_posts"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    user_id: Mapped[int | None] = mapped_column(ForeignKey("page_users.id"))
    user: Mapped[User | None] = relationship(back_populates="posts")


class Author(Base):
    __table__ = User.__table__

    posts = relationship(Post, lazy="joined", viewonly=True)


class Sample(Base):
    __tablename__ = "page_samples"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    made: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    day: Mapped[date]
    price: Mapped[Decimal] = mapped_column(Numeric(12, 4))
    loose: Mapped[float] = mapped_column(Numeric(30, 20, asdecimal=False))
    ratio: Mapped[float]
    mood: Mapped[Mood] = mapped_column(Enum(Mood))
    label: Mapped[str] = mapped_column(Enum("a", "b", name="page_label"))
    raw: Mapped[bytes] = mapped_column(LargeBinary)
    odd: Mapped[str] = mapped_column(Reversed)
    flag: Mapped[bool]
    wait: Mapped[timedelta]
    naive: Mapped[datetime]
    clock: Mapped[time]
    real: Mapped[float] = mapped_column(REAL)
    code: Mapped[str] = mapped_column(CHAR(4))
    token: Mapped[str] = mapped_column(Uuid(as_uuid=False))
    tag: Mapped[str] = mapped_column(String(collation="C").with_variant(String(), "sqlite"))


class Thing(Base):
    __tablename__ = "page_things"

    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int | None]
    b: Mapped[str | None]
    c: Mapped[int]


class Seat(Base):
    __tablename__ = "page_seats"

    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int]


plain = Table("page_plain", MetaData(), Column("x", String), Column("y", String))


def _users() -> list[User]:
    return [
        User(
            id=i,
            name=f"n{i % 4}",
            team=i % 3,
            rank=None if i % 4 == 0 else i % 3,
            nick=f"k{i}" if i % 2 else None,
        )
        for i in range(1, 13)
    ]


def _posts() -> list[Post]:
    return [Post(id=i, title=f"t{i % 5}", user_id=None if i % 7 == 0 else 1 + i % 6) for i in range(1, 21)]


@pytest.fixture(scope="module")
def lite() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    plain.create(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def postgres(postgres_url: str) -> Iterator[Engine]:
    engine = create_engine(postgres_url.replace("asyncpg", "psycopg"))
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture(params=["lite", "postgres"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    with Session(request.getfixturevalue(request.param)) as session:
        session.add_all([*_users(), *_posts()])
        session.flush()
        yield session


@pytest.fixture
def lite_session(lite: Engine) -> Iterator[Session]:
    with Session(lite) as session:
        session.add_all([*_users(), *_posts()])
        session.flush()
        yield session


def _sender(execute: Any) -> Any:
    return lambda statement, parameters, _projected: execute(statement, parameters)


_recipes = Recipes()
page = partial(numbered.page, recipes=_recipes)
total_of = partial(numbered.total_of, recipes=_recipes)


def _page(session: Session, stmt: Any, number: int = 1, size: int = 5, **options: Any) -> Found:
    steps = page(stmt, PageParams(page=number, size=size), dialect_name=session.get_bind().dialect.name, **options)
    return run(steps, _sender(session.execute))


def _all_pages(session: Session, stmt: Any, size: int, **options: Any) -> list[Any]:
    """Return the items of all pages, each page full but the last, with the right total."""
    first = _page(session, stmt, 1, size, **options)
    pages = [_page(session, stmt, number, size, **options) for number in range(1, 1 + (first.pages or 0))]
    assert [len(one.items) for one in pages[:-1]] == [size] * (len(pages) - 1)
    assert [one.has_more for one in pages] == [True] * (len(pages) - 1) + [False]
    items = [item for one in pages for item in one.items]
    assert {one.total for one in pages} == {len(items)}
    return items


def _sent(session: Session, steps: Any) -> tuple[Any, list[str]]:
    """Return what the steps make, and the statements they send."""
    sent: list[str] = []

    def execute(statement: Any, parameters: Any, _projected: bool) -> Any:
        sent.append(str(statement))
        return session.execute(statement, parameters)

    return run(steps, execute), sent


def _cursor_page(
    session: Session, stmt: Any, cursor: str | None = None, size: int = 5, binding: bytes = BINDING
) -> CursorPage[Any]:
    steps = cursor_page(
        stmt,
        CursorParams(cursor=cursor, size=size),
        recipes=Recipes(),
        dialect_name=session.get_bind().dialect.name,
        binding=binding,
        keys=[KEY],
    )
    return run(steps, _sender(session.execute))


def _walk(session: Session, stmt: Any, size: int = 5) -> tuple[list[Any], list[Any]]:
    """Return the items of a walk to the last page, and those of the walk back to the first."""
    pages = [_cursor_page(session, stmt, None, size)]
    assert pages[0].prev_cursor is None
    while pages[-1].next_cursor is not None:
        assert len(pages[-1].items) == size
        assert len(pages) < 100
        pages.append(_cursor_page(session, stmt, pages[-1].next_cursor, size))
    back = [pages[-1]]
    while back[-1].prev_cursor is not None:
        back.append(_cursor_page(session, stmt, back[-1].prev_cursor, size))
        assert back[-1].next_cursor is not None
        assert len(back) < 100
    forward_items = [item for one in pages for item in one.items]
    return forward_items, [item for one in reversed(back) for item in one.items]


def _assert_walks(session: Session, stmt: Any, *tie_break: Any, size: int = 5) -> list[Any]:
    result = session.execute(stmt.order_by(*tie_break))
    rows: Sequence[Any] = (result.unique() if result._unique_filter_state else result).all()
    expected = [row[0] if len(row) == 1 else row for row in rows]
    assert expected
    forward, backward = _walk(session, stmt, size)
    assert forward == expected
    assert backward == expected
    return expected


# Pages by number


def test_a_page_has_its_numbers_and_its_entities(session: Session) -> None:
    made = _page(session, select(User).order_by(User.id.desc()), 3)
    assert [user.id for user in made.items] == [2, 1]
    assert (made.total, made.page, made.size, made.pages) == (12, 3, 5, 3)


def test_a_page_beyond_the_end_is_empty_and_costs_one_statement(session: Session) -> None:
    sent: list[Any] = []

    def execute(statement: Any, parameters: Any, _projected: bool) -> Any:
        sent.append(statement)
        return session.execute(statement, parameters)

    made = run(page(select(User), PageParams(page=2**31 - 1, size=10_000)), execute)
    assert (made.items, made.total, made.pages, len(sent)) == ([], 12, 1, 1)


def test_no_rows_are_no_pages(session: Session) -> None:
    made = _page(session, select(User).where(User.id < 0))
    assert (made.items, made.total, made.pages) == ([], 0, 0)


@pytest.mark.parametrize("selected", [[User], [User.__table__], [User.name], [User.name, User.rank]])
def test_without_an_order_the_primary_key_is_it(session: Session, selected: list[Any]) -> None:
    session.execute(update(User).where(User.id == 1).values(name="moved"))
    sent: list[str] = []

    def execute(statement: Any, parameters: Any, _projected: bool) -> Any:
        sent.append(str(statement))
        return session.execute(statement, parameters)

    run(page(select(*selected), PageParams(page=1, size=5)), execute)
    assert "ORDER BY page_users.id" in sent[0]
    assert "ORDER BY" not in sent[1]


def test_the_count_is_of_the_unordered_rows_under_the_same_options() -> None:
    options = {"schema_translate_map": {None: "tenant"}}
    steps = total_of(select(User).order_by(User.name).execution_options(**options), "exact")
    counted: Any = next(steps).statement
    assert "ORDER BY" not in str(counted)
    assert counted.get_execution_options() == options


def test_aggregates_alone_are_not_ordered(session: Session) -> None:
    assert _page(session, select(func.count(User.id))).items == [12]


def test_one_column_gives_values_and_more_give_rows(session: Session) -> None:
    assert _page(session, select(User.id)).items == [1, 2, 3, 4, 5]
    rows = _page(session, select(User.id, User.name.label("n"))).items
    assert isinstance(rows[0], Row)
    assert (rows[0].id, rows[0].n) == (1, "n1")


@pytest.mark.parametrize(
    "stmt",
    [
        select(User).options(joinedload(User.posts)),
        select(User).options(selectinload(User.posts)),
        select(User).options(joinedload(User.posts).joinedload(Post.user)),
        select(Author),
    ],
)
def test_eager_collections_do_not_shorten_a_page(session: Session, stmt: Select[Any]) -> None:
    table = User.__table__.c
    made = _page(session, stmt.order_by(table.id), size=4)
    assert [user.id for user in made.items] == [1, 2, 3, 4]
    assert made.total == 12
    assert "page_posts" not in order_binding(stmt, "sqlite")
    _assert_walks(session, stmt.order_by(table.team.desc()), table.id.desc())


def test_equal_rows_are_rows(session: Session) -> None:
    made = _page(session, select(User.team).order_by(User.team), size=12)
    assert len(made.items) == 12
    joined = _page(session, select(User, Post).join(User.posts).options(selectinload(User.posts)), size=100)
    assert len(joined.items) == joined.total == 18


def test_distinct_group_by_and_unions_are_counted_as_they_are(session: Session) -> None:
    assert _page(session, select(User.team).distinct().order_by(User.team)).items == [0, 1, 2]
    grouped = _page(session, select(User.team, func.count()).group_by(User.team))
    assert ([tuple(row) for row in grouped.items], grouped.total) == ([(0, 4), (1, 4), (2, 4)], 3)
    both = union(select(User.id), select(Post.id)).order_by("id")
    assert _page(session, both, 4).items == [16, 17, 18, 19, 20]
    assert _page(session, union_all(select(User.id, User.name), select(User.id, User.name)), size=100).total == 24
    cte = select(User).where(User.id > 3).cte()
    assert [row.id for row in _page(session, select(cte).order_by(cte.c.id)).items] == [4, 5, 6, 7, 8]


def test_criteria_of_the_statement_and_of_the_session_are_counted(session: Session) -> None:
    criteria = with_loader_criteria(User, User.team == 1)
    own = _page(session, select(User).options(criteria))
    assert (own.total, len(own.items)) == (4, 4)

    def only_team(state: Any) -> None:
        state.statement = state.statement.options(criteria)

    event.listen(session, "do_orm_execute", only_team)
    theirs = _page(session, select(User))
    assert (theirs.total, len(theirs.items)) == (4, 4)
    assert len(_walk(session, select(User), 2)[0]) == 4


def test_rows_are_limited_and_offset(session: Session) -> None:
    stmt = select(User.id)
    found = run(page(stmt, LimitOffsetParams(limit=4, offset=3)), _sender(session.execute))
    assert (found.items, found.total, found.limit, found.offset, found.has_more) == ([4, 5, 6, 7], 12, 4, 3, True)


@pytest.mark.parametrize("order", [[User.name], [User.team.desc()], [User.rank.desc().nulls_last()], ["name"]])
def test_rows_that_are_ordered_alike_are_on_one_page_only(session: Session, order: list[Any]) -> None:
    descending = str(order[0]).endswith(("DESC", "LAST"))
    # Moves rows in the heap, and with that the order in which equals are found.
    session.execute(update(User).where(User.id % 3 == 0).values(nick="moved"))
    expected = session.scalars(select(User).order_by(*order, User.id.desc() if descending else User.id)).all()
    assert _all_pages(session, select(User).order_by(*order), 5) == list(expected)


def test_groups_of_text_are_in_the_order_they_are_given(session: Session) -> None:
    stmt = select(User.team, func.count()).group_by(text("team")).order_by(User.team)
    assert [tuple(row) for row in _page(session, stmt).items] == [(0, 4), (1, 4), (2, 4)]


# Entities, whatever they are joined to

JOINED = [
    select(User).join(User.posts),
    select(User).join(User.posts).order_by(User.name.desc()),
    select(User).join(User.posts).order_by("team"),
    select(User).outerjoin(User.posts).where(User.team != 1),
    select(User).select_from(Post).join(Post.user),
    select(User).where(User.id == Post.user_id, Post.title.in_(["t1", "t2", "t3"])),
    select(User).join(User.posts).options(joinedload(User.posts)),
    select(User).join(User.posts).options(selectinload(User.posts)).execution_options(populate_existing=True),
    select(User).join(User.posts).options(with_loader_criteria(User, User.team != 1)),
    select(User).join(
        union_all(select(Post.user_id), select(Post.user_id)).subquery(), text("user_id = page_users.id")
    ),
    select(User)
    .join(User.posts)
    .order_by(select(func.max(aliased(Post, name="p").id)).where(aliased(Post, name="q").id > 0).scalar_subquery()),
    select(other := aliased(User)).join(other.posts).order_by(other.name),
    select(User).join(User.posts).where(User.id.in_(select(Post.user_id))),
    select(User).join(User.posts).with_for_update(),
]


@pytest.mark.parametrize("number", range(len(JOINED)))
@pytest.mark.filterwarnings("ignore:SELECT statement has a cartesian product")
def test_a_page_has_each_entity_once_whatever_it_is_joined_to(session: Session, number: int) -> None:
    stmt = JOINED[number]
    expected = {user.id for user in session.scalars(stmt).unique()}
    items = [user.id for user in _all_pages(session, stmt, 2)]
    assert sorted(items) == sorted(expected)
    assert len(items) > 3


def test_joins_keep_the_order_of_the_entity(session: Session) -> None:
    order = [User.name.desc(), User.id.desc()]
    expected = session.scalars(select(User.id).where(User.id.in_(select(Post.user_id))).order_by(*order)).all()
    stmt = select(User).join(User.posts).order_by(User.name.desc())
    assert [user.id for user in _all_pages(session, stmt, 4)] == list(expected)


def test_a_composite_key_tells_entities_apart(session: Session) -> None:
    session.add_all([Seat(row=i % 2, number=i, user_id=1 + i % 2) for i in range(6)])
    session.flush()
    stmt = select(Seat).join(Post, Post.user_id == Seat.user_id)
    assert [(seat.row, seat.number) for seat in _all_pages(session, stmt, 4)] == [
        (0, 0), (0, 2), (0, 4), (1, 1), (1, 3), (1, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "stmt",
    [
        select(User).join(User.posts).order_by(Post.title),
        select(User).join(User.posts).order_by(User.name, Post.id.desc()),
        select(User).join(User.posts).order_by(func.lower(User.name + Post.title)),
        select(User).join(User.posts).order_by("title"),
        select(User).join(User.posts).order_by(text("page_posts.id")),
        select(User)
        .join(User.posts)
        .order_by(select(func.count()).select_from(plain).where(plain.c.x == Post.title).scalar_subquery()),
        select(User).join(User.posts).options(contains_eager(User.posts)).order_by(Post.title, User.id),
    ],
)
def test_an_order_by_what_the_joins_repeat_names_the_fix(lite_session: Session, stmt: Any) -> None:
    with pytest.raises(PageError, match=r"own columns.*scalar_subquery"):
        _page(lite_session, stmt)


def test_joins_that_repeat_nothing_are_left_alone(session: Session) -> None:
    for stmt in (select(Post).join(Post.user), select(Post).outerjoin(Post.user).order_by(User.name)):
        assert once(stmt) is stmt
        assert len(_all_pages(session, stmt, 7)) in (18, 20)
    grouped = select(User).join(User.posts).group_by(User.id).order_by(func.count().desc(), User.id)
    assert once(grouped) is grouped
    assert [user.id for user in _page(session, grouped).items] == [user.id for user in session.scalars(grouped)][:5]
    distinct = select(User).join(User.posts).distinct()
    assert once(distinct) is distinct
    assert len(_all_pages(session, distinct, 4)) == 6


def test_what_is_joined_is_looked_for_on_its_own_and_not_for_each_entity() -> None:
    assert "FROM page_users, page_posts" in str(once(select(User).where(User.id == Post.user_id)))


def test_the_page_is_locked_and_not_all_that_is_joined() -> None:
    sql = str(once(select(User).join(User.posts).with_for_update()).compile(dialect=postgresql.dialect()))
    assert sql.endswith("FOR UPDATE")
    assert sql.count("FOR UPDATE") == 1


def test_a_walk_of_joined_entities_has_each_once(session: Session) -> None:
    stmt = once(select(User).join(User.posts).order_by(User.name))
    assert len(_assert_walks(session, stmt, User.id, size=2)) == 6
    others = aliased(Post)
    with pytest.raises(PageError, match="use Page"):
        once(select(Post).join(Post.user).join(User.posts.of_type(others)).options(contains_eager(Post.user)))


@pytest.mark.parametrize("order", [[], [User.name.desc()], [User.team, Post.id.desc()]])
def test_contains_eager_fills_the_entities_of_a_page(session: Session, order: list[Any]) -> None:
    session.expire_all()
    stmt = (
        select(User)
        .join(User.posts)
        .where(Post.title.in_(["t0", "t1", "t2"]))
        .options(contains_eager(User.posts))
        .order_by(*order)
        .execution_options(populate_existing=True)
    )

    def posts(user: User) -> list[int]:
        ids = [post.id for post in user.posts]
        return ids if len(order) == 2 else sorted(ids)

    expected = {user.id: posts(user) for user in session.scalars(stmt).unique()}
    session.expire_all()
    seen = {}
    for number in (1, 2, 3):
        for user in _page(session, stmt, number, 2).items:
            seen[user.id] = posts(user)
    assert seen == expected
    assert len(_all_pages(session, stmt, 2)) == len(expected) == 6


def test_contains_eager_of_one_beside_a_join_to_many(session: Session) -> None:
    others = aliased(Post)
    stmt = select(Post).join(Post.user).join(others, others.user_id == User.id).options(contains_eager(Post.user))
    items = _all_pages(session, stmt, 4)
    assert [post.id for post in items] == list(session.scalars(select(Post.id).where(Post.user_id > 0)))


# Raw SQL


def test_raw_sql_with_columns_is_a_page_and_keeps_its_parameters(session: Session) -> None:
    raw = text("SELECT id, name FROM page_users WHERE id > :least ORDER BY id").bindparams(least=3)
    found = _page(session, raw.columns(User.id, User.name), 2, 4)
    assert [tuple(row) for row in found.items] == [(8, "n0"), (9, "n1"), (10, "n2"), (11, "n3")]
    assert (found.items[0].id, found.total) == (8, 9)
    named = aliased(User, text("SELECT * FROM page_users WHERE team = 1").columns(*User.__table__.c).subquery())
    assert [user.id for user in _page(session, select(named).order_by(named.id)).items] == [1, 4, 7, 10]


# Totals


@pytest.mark.parametrize(("number", "count"), [(1, 1), (2, 1), (3, 0), (4, 1)])
def test_a_page_with_room_left_says_the_total_itself(session: Session, number: int, count: int) -> None:
    found, sent = _sent(session, page(select(User), PageParams(page=number, size=5)))
    assert (found.total, len([sql for sql in sent if "count" in sql])) == (12, count)


def test_no_rows_on_the_first_page_are_no_rows(session: Session) -> None:
    found, sent = _sent(session, page(select(User).where(User.id < 0), PageParams()))
    assert (found.total, found.pages, len(sent)) == (0, 0, 1)


def test_a_capped_total_counts_no_further(session: Session) -> None:
    session.execute(insert(Thing), [{"id": i, "c": 0} for i in range(CAP + 1)])
    stmt = select(Thing.id)
    found, sent = _sent(session, page(stmt, PageParams(page=2, size=5), total="capped"))
    assert (found.total, found.total_kind, found.pages, found.has_more) == (CAP, "capped", None, True)
    assert "LIMIT" in sent[-1]
    beyond = _page(session, stmt, 101, 100, total="capped")
    assert (beyond.items, beyond.total, beyond.total_kind, beyond.has_more) == ([CAP], CAP + 1, "exact", False)
    session.execute(delete(Thing).where(Thing.id == 0))
    at = _page(session, stmt, 1, 5, total="capped")
    assert (at.total, at.total_kind, at.pages) == (CAP, "exact", CAP // 5)
    eager = _page(session, select(Author), 1, 5, total="capped")
    assert (eager.total, eager.total_kind) == (12, "exact")


def test_no_total_asks_for_one_row_more(session: Session) -> None:
    found, sent = _sent(session, page(select(User.id), PageParams(page=2, size=6), total="none"))
    assert (found.items, found.has_more) == ([7, 8, 9, 10, 11, 12], False)
    assert (found.total, found.total_kind, found.pages, len(sent)) == (None, "none", None, 1)
    assert _page(session, select(User.id), 1, 6, total="none").has_more


def test_an_estimate_on_sqlite_is_capped(lite_session: Session) -> None:
    found = _page(lite_session, select(User), total="estimated")
    assert (found.total, found.total_kind) == (12, "exact")


def test_an_estimate_is_the_planners(postgres: Engine) -> None:
    with Session(postgres) as session:
        session.execute(insert(Thing), [{"id": i, "a": i % 4, "c": 0} for i in range(20_000)])
        session.execute(text("ANALYZE page_things"))
        whole = _page(session, select(Thing), total="estimated")
        assert whole.total_kind == "estimated"
        assert whole.total == pytest.approx(20_000, rel=0.1)
        assert whole.pages == -(-whole.total // 5)
        some = _page(session, select(Thing).where(Thing.a == 1).order_by(Thing.id), total="estimated")
        assert some.total == pytest.approx(5_000, rel=0.2)
        # As everywhere: what a session's listener adds holds for the estimate too.
        criteria = with_loader_criteria(Thing, Thing.a == 1)

        def only_some(state: Any) -> None:
            state.statement = state.statement.options(criteria)

        event.listen(session, "do_orm_execute", only_some)
        assert _page(session, select(Thing), total="estimated").total == pytest.approx(5_000, rel=0.2)


def test_an_estimate_is_never_less_than_what_the_page_shows(postgres: Engine) -> None:
    with Session(postgres) as session:
        session.execute(insert(Thing), [{"id": i, "a": 1, "c": 0} for i in range(200)])
        stmt = select(Thing).where(Thing.a == 1, Thing.c == 0, func.lower(Thing.b).is_(None), Thing.id % 2 >= 0)
        found = _page(session, stmt, 3, 50, total="estimated")
        assert (found.total_kind, found.has_more) == ("estimated", True)
        assert found.total is not None
        assert found.total >= 151


async def test_an_estimate_is_read_by_asyncpg(postgres_url: str, postgres: Engine) -> None:
    engine = create_async_engine(postgres_url, poolclass=NullPool)
    async with engine.connect() as connection:
        steps = total_of(select(Thing), "estimated", dialect_name="postgresql")
        total, kind = await run_async(steps, _sender(connection.execute))
        assert (isinstance(total, int), kind) == (True, "estimated")
    await engine.dispose()


def test_a_count_of_ones_own_is_the_total(session: Session) -> None:
    own = select(func.count(User.id) + 100)
    assert _page(session, select(User), count_query=own).total == 112
    for wrong in (select(User.name).limit(1), select(func.max(Thing.a))):
        with pytest.raises(PageError, match="one integer"):
            _page(session, select(User), count_query=wrong)


# Deep pages


def _deep(session: Session, stmt: Any, offset: int, **options: Any) -> tuple[list[Any], str]:
    found, sent = _sent(session, page(stmt, LimitOffsetParams(limit=3, offset=offset), total="none", **options))
    return found.items, sent[0]


@pytest.mark.parametrize(
    "stmt",
    [
        select(Thing),
        select(Thing).order_by(Thing.a.desc().nulls_last(), Thing.b),
        select(Thing).where(Thing.c == 1).order_by(func.coalesce(Thing.a, 2), Thing.id.desc()),
        select(Thing).options(with_loader_criteria(Thing, Thing.c == 1)).order_by("b"),
        select(deep := aliased(Thing)).order_by(deep.b),
    ],
)
def test_a_deep_page_has_the_rows_of_a_shallow_one(session: Session, stmt: Any) -> None:
    rows = [{"id": i, "a": [None, 1, 2][i % 3], "b": f"b{i % 7}", "c": i % 2} for i in range(2 * DEEP + 100)]
    session.execute(insert(Thing), rows)
    items, sql = _deep(session, stmt, DEEP + 1)
    assert " IN (SELECT" in sql
    shallow, sql = _deep(session, stmt, DEEP)
    assert " IN (SELECT" not in sql
    assert len(items) == 3
    assert shallow[1:] == items[:2]


def test_only_one_table_is_read_by_its_keys(session: Session) -> None:
    for stmt in (
        select(Post).join(Post.user),
        select(Thing.id),
        select(Thing).distinct(),
        select(Thing).with_for_update(),
    ):
        assert " IN (SELECT" not in _deep(session, stmt, DEEP + 1)[1]


def test_a_deep_page_beyond_the_end_is_not_looked_for(session: Session) -> None:
    found, sent = _sent(session, page(select(User), LimitOffsetParams(offset=DEEP + 1)))
    assert (found.items, found.total, len(sent)) == ([], 12, 1)


# Walks


def _orders() -> list[list[Any]]:
    named = func.lower(User.name).label("lowered")
    return [
        [],
        [User.name],
        [User.name.desc()],
        [User.team.desc(), User.id.desc()],
        [User.team, User.name.desc()],
        [User.rank],
        [User.rank.desc(), User.nick],
        [User.rank.asc().nulls_first(), User.nick.desc().nulls_last()],
        [User.rank.desc().nulls_last()],
        [func.lower(User.name).desc()],
        [func.coalesce(User.rank, 1), User.nick.desc()],
        [named.desc()],
        ["name"],
        [desc("team"), "name"],
        [case((User.rank.is_(None), 0), else_=1)],
    ]


@pytest.mark.parametrize("number", range(len(_orders())))
def test_a_walk_is_the_list(session: Session, number: int) -> None:
    order = _orders()[number]
    descending = bool(order) and str(order[-1]).endswith(("DESC", "DESC NULLS LAST"))
    tie_break = User.id.desc() if descending else User.id
    _assert_walks(session, select(User).order_by(*order), tie_break, size=5)
    _assert_walks(session, select(User.name).order_by(*order), tie_break, size=1)


def test_a_label_is_an_order_by_its_name(session: Session) -> None:
    posts = select(func.count()).where(Post.user_id == User.id).scalar_subquery().label("posts")
    items = _assert_walks(session, select(User, posts).order_by(desc("posts")), User.id.desc())
    assert items[0]._fields == ("User", "posts")
    _assert_walks(session, select(User.id, posts).order_by(posts), User.id)


def test_joined_rows_are_told_apart_by_all_their_tables(session: Session) -> None:
    _assert_walks(session, select(User, Post).join(User.posts).order_by(User.name), User.id, Post.id, size=2)
    _assert_walks(session, select(User.name, Post.title).join(User.posts).order_by(User.team), User.id, Post.id)
    _assert_walks(session, select(User, Post).where(User.id == Post.user_id).order_by(Post.title), User.id, Post.id)


def test_an_outer_join_makes_keys_null(session: Session) -> None:
    _assert_walks(session, select(User, Post).outerjoin(User.posts).order_by(Post.title), User.id, Post.id)
    _assert_walks(session, select(Post, User).join(Post.user, full=True).order_by(User.team), Post.id, User.id)
    sub = select(User.id, Post.id.label("post")).outerjoin(User.posts).subquery()
    _assert_walks(session, select(sub).order_by(sub.c.post.desc()), sub.c.id.desc())


def test_a_join_to_one_adds_no_keys(session: Session) -> None:
    text_ = order_binding(select(Post).join(Post.user).order_by(User.name), "sqlite")
    assert "page_users.id" not in text_
    _assert_walks(session, select(Post).outerjoin(Post.user).order_by(User.name), Post.id)
    counts = select(Post.user_id, func.count().label("n")).group_by(Post.user_id).subquery()
    stmt = select(User, counts.c.n).outerjoin(counts, counts.c.user_id == User.id).order_by(counts.c.n.desc())
    assert "user_id" not in order_binding(stmt, "sqlite")
    _assert_walks(session, stmt, User.id.desc())


def test_groups_are_told_apart_by_what_they_are_grouped_by(session: Session) -> None:
    stmt = select(Post.title, func.count().label("n")).group_by(Post.title).order_by(func.count().desc())
    _assert_walks(session, stmt, Post.title.desc(), size=2)
    sub = select(Post.user_id, func.count().label("n")).group_by(Post.user_id).subquery()
    _assert_walks(session, select(sub).order_by(sub.c.n), sub.c.user_id, size=2)


def test_distinct_rows_are_told_apart_by_what_is_selected(session: Session) -> None:
    stmt = select(User).join(User.posts).where(Post.id > 3).distinct().order_by(User.name)
    _assert_walks(session, stmt, User.id, size=2)
    _assert_walks(session, select(User.team, User.rank).distinct().order_by(User.team), User.rank, size=2)
    with pytest.raises(PageError, match=r"select page_users.team too"):
        _cursor_page(session, select(User.name).distinct().order_by(User.team))


def test_subqueries_aliases_and_unions_are_walked(session: Session) -> None:
    author = aliased(User)
    _assert_walks(session, select(author).order_by(author.rank.desc()), author.id.desc())
    sub = select(User).where(User.team > 0).subquery()
    inner = aliased(User, sub)
    _assert_walks(session, select(inner).order_by(inner.name), inner.id)
    both = union(select(User.id, User.name), select(Post.id, Post.title)).subquery()
    _assert_walks(session, select(both).order_by(both.c.name.desc()), both.c.id.desc())


def test_core_tables_are_walked(session: Session) -> None:
    table = User.__table__
    _assert_walks(session, select(table).order_by(table.c.rank), table.c.id)
    _assert_walks(session, select(table.c.name, table.c.team).order_by(table.c.name), table.c.id)


def _samples() -> list[Sample]:
    generator = random.Random(7)
    utc = UTC
    return [
        Sample(
            id=uuid.UUID(int=generator.getrandbits(128)),
            day=date(2026, 1, 1 + i % 3),
            price=Decimal(i % 3) / 3,
            loose=(i % 3) / 7,
            ratio=[0.1, float("inf"), 1 / 3, -0.0][i % 4],
            mood=list(Mood)[i % 3],
            label="ab"[i % 2],
            raw=bytes([i % 3, 0]),
            odd=["abc", "cba", "bac"][i % 3],
            flag=bool(i % 2),
            wait=timedelta(microseconds=i % 4),
            naive=datetime(2026, 1, 1, microsecond=i % 3),
            clock=time(12, 0, 0, i % 3),
            real=(i % 3) / 3,
            code=["a", "ab", "b"][i % 3],
            token=str(uuid.UUID(int=i % 3)),
            tag=["a", "B", "b"][i % 3],
            **({"made": datetime(2026, 1, 1, 0, 0, 0, i % 3, tzinfo=utc)} if i % 2 else {}),
        )
        for i in range(12)
    ]


COLUMNS = [column.name for column in Sample.__table__.c if column.name != "id"]


def _check_types(session: Session) -> None:
    session.add_all(_samples())
    session.flush()
    session.execute(update(Sample).where(Sample.flag).values(loose=literal_column("1.0 / 3")))
    for name in COLUMNS:
        key = getattr(Sample, name)
        _assert_walks(session, select(Sample).order_by(key.desc(), Sample.id), size=2)
        _assert_walks(session, select(Sample).order_by(key), Sample.id, size=3)


def test_every_type_is_a_key(session: Session) -> None:
    _check_types(session)


async def test_every_type_is_a_key_for_asyncpg(postgres: Engine, postgres_url: str) -> None:
    engine = create_async_engine(postgres_url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(lambda sync: _check_types(Session(sync)))
        await connection.rollback()
    await engine.dispose()


def test_times_as_the_database_writes_them_are_found_again(session: Session) -> None:
    # CURRENT_TIMESTAMP is one for all rows of a transaction: only the primary key walks them.
    session.add_all(_samples()[::2])
    session.flush()
    assert len(_assert_walks(session, select(Sample).order_by(Sample.made), Sample.id, size=1)) == 6


# Ends


def test_an_empty_list_has_no_cursors(session: Session) -> None:
    made = _cursor_page(session, select(User).where(User.id < 0))
    assert (made.items, made.next_cursor, made.prev_cursor) == ([], None, None)


def test_a_full_last_page_has_no_next(session: Session) -> None:
    made = _cursor_page(session, select(User), size=12)
    assert (len(made.items), made.next_cursor) == (12, None)


def test_from_a_page_whose_rows_are_gone_the_way_back_leads_to_every_row_left(session: Session) -> None:
    stmt = select(User.id).order_by(User.id)
    first = _cursor_page(session, stmt)
    session.execute(delete(Post))
    session.execute(delete(User).where(User.id > 5))
    empty = _cursor_page(session, stmt, first.next_cursor)
    assert (empty.items, empty.next_cursor) == ([], None)
    back = _cursor_page(session, stmt, empty.prev_cursor, size=3)
    assert (back.items, back.next_cursor) == ([3, 4, 5], None)
    front = _cursor_page(session, stmt, back.prev_cursor, size=3)
    assert (front.items, front.prev_cursor) == ([1, 2], None)


def test_from_a_page_before_which_rows_are_gone_the_way_on_leads_to_every_row_left(session: Session) -> None:
    stmt = select(User.id).order_by(User.id)
    second = _cursor_page(session, stmt, _cursor_page(session, stmt).next_cursor)
    session.execute(delete(Post))
    session.execute(delete(User).where(User.id <= 5))
    empty = _cursor_page(session, stmt, second.prev_cursor)
    assert (empty.items, empty.prev_cursor) == ([], None)
    start = _cursor_page(session, stmt, empty.next_cursor)
    assert (start.items, start.prev_cursor) == ([6, 7, 8, 9, 10], None)


# Refusals


@pytest.mark.parametrize(
    "other",
    [
        select(User).order_by(User.name.desc()),
        select(User).order_by(User.team),
        select(User).order_by(User.name.nulls_first(), User.id.desc()),
        select(User).order_by(func.lower(User.name)),
        select(User).order_by(User.name.collate("BINARY")),
        select(Post).order_by(Post.title),
    ],
)
def test_a_cursor_of_another_order_is_refused(lite_session: Session, other: Any) -> None:
    cursor = _cursor_page(lite_session, select(User).order_by(User.name)).next_cursor
    with pytest.raises(InvalidCursorError):
        _cursor_page(lite_session, other, cursor)


def test_parameters_of_the_order_are_part_of_it(lite_session: Session) -> None:
    one, other = (select(User).order_by(func.coalesce(User.rank, n)) for n in (1, 2))
    cursor = _cursor_page(lite_session, one).next_cursor
    assert _cursor_page(lite_session, one, cursor).items
    with pytest.raises(InvalidCursorError):
        _cursor_page(lite_session, other, cursor)


def test_a_cursor_of_another_route_is_refused(lite_session: Session) -> None:
    cursor = _cursor_page(lite_session, select(User)).next_cursor
    with pytest.raises(InvalidCursorError):
        _cursor_page(lite_session, select(User), cursor, binding=b"other")


@pytest.mark.parametrize(
    ("stmt", "fix"),
    [
        (text("SELECT 1"), r"pass a select\(\)"),
        (select(User).from_statement(select(User)), r"aliased\(User"),
        (insert(User), r"pass a select\(\)"),
        (select(User).limit(3), "remove it"),
        (select(User).offset(3), "remove it"),
        (select(User).fetch(3), "remove it"),
        (union(select(User.id), select(Post.id)).limit(3), "remove it"),
    ],
)
def test_what_cannot_be_a_page_names_the_fix(lite_session: Session, stmt: Any, fix: str) -> None:
    with pytest.raises(PageError, match=fix):
        _page(lite_session, stmt)
    with pytest.raises(PageError, match=fix):
        _cursor_page(lite_session, stmt)


everyone = union_all(select(User.id), select(Post.id)).subquery()


@pytest.mark.parametrize(
    ("stmt", "fix"),
    [
        (select(plain).order_by(plain.c.x), "primary key"),
        (select(everyone), "primary key"),
        (select(func.json_each("[1]").table_valued("value")), "primary key"),
        (select(User.team, func.count()).group_by(func.rollup(User.team)), "primary key"),
        (union(select(User.id), select(Post.id)), "make it a subquery"),
        (select(User, func.rank().over(order_by=User.rank)), "make the statement a subquery"),
        (select(User).order_by(1 + func.rank().over(order_by=User.rank)), "make the statement a subquery"),
        (select(User).order_by(text("name")), "order by a column"),
        (select(User).order_by(literal_column("2")), "order by a column"),
        (select(User).order_by("nothing"), "order by a column"),
        (text("SELECT 1 AS id").columns(User.id), "primary key"),
        (select(User).join(User.posts).options(contains_eager(User.posts)), "selectinload"),
    ],
)
def test_what_cannot_be_walked_names_the_fix(lite_session: Session, stmt: Any, fix: str) -> None:
    with pytest.raises(PageError, match=fix):
        _cursor_page(lite_session, stmt)


@pytest.mark.filterwarnings("ignore:Passing expression to")
def test_distinct_on_names_the_fix(lite_session: Session) -> None:
    stmts = [select(User).distinct(User.team)]
    if hasattr(postgresql, "distinct_on"):
        stmts.append(select(User).ext(postgresql.distinct_on(User.team)))
    for stmt in stmts:
        with pytest.raises(PageError, match="find the rows in a subquery"):
            _cursor_page(lite_session, stmt)
        with pytest.raises(PageError, match="primary key"):
            _cursor_page(lite_session, select(stmt.subquery()))


def test_contains_eager_of_one_is_a_page(session: Session) -> None:
    stmt = select(Post).join(Post.user).options(contains_eager(Post.user)).order_by(User.name)
    assert _page(session, stmt).total == 18
    _assert_walks(session, stmt, Post.id)


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(PageError, match="use Page"):
        order_binding(select(User), "oracle")


def test_a_json_key_is_refused(postgres: Engine) -> None:
    with Session(postgres) as session:
        session.add_all(_users())
        session.flush()
        with pytest.raises(PageError, match=r"cast\(\)"):
            _cursor_page(session, select(User).order_by(func.jsonb_build_array(User.id, type_=JSONB)))


def test_the_order_has_the_same_text_in_every_statement() -> None:
    stmt = select(User).order_by(func.coalesce(User.rank, 1).desc())
    assert order_binding(stmt, "sqlite") == order_binding(stmt.where(User.id > 3), "sqlite")
    assert "coalesce" in order_binding(stmt, "sqlite")


# Async


async def _walk_async(url: str, stmt: Any, size: int) -> list[Any]:
    engine = create_async_engine(url, poolclass=NullPool)
    walked: list[Any] = []
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(
            insert(Thing), [{"id": i, "a": i % 3 or None, "b": f"b{i % 2}", "c": i % 2} for i in range(11)]
        )
        total = (await run_async(page(stmt, PageParams(size=1)), _sender(connection.execute))).total
        cursor = None
        while True:
            steps = cursor_page(
                stmt,
                CursorParams(cursor=cursor, size=size),
                recipes=Recipes(),
                dialect_name=connection.dialect.name,
                binding=BINDING,
                keys=[KEY],
            )
            one = await run_async(steps, _sender(connection.execute))
            walked += one.items
            assert len(walked) < 1000
            if (cursor := one.next_cursor) is None:
                break
        assert [tuple(row) for row in walked] == [
            tuple(row) for row in await connection.execute(stmt.order_by(Thing.id.desc()))
        ]
        assert total == len(walked)
        await connection.rollback()
    await engine.dispose()
    return walked


@pytest.mark.parametrize("order", [[Thing.a.desc()], [Thing.c.desc(), Thing.b.desc()], [func.lower(Thing.b).desc()]])
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_async_walks_are_the_list(request: pytest.FixtureRequest, database: str, order: list[Any]) -> None:
    url = "sqlite+aiosqlite://" if database == "sqlite" else request.getfixturevalue("postgres_url")
    stmt = select(Thing.id, Thing.b).order_by(*order)
    assert len(await _walk_async(url, stmt, 3)) == 11
