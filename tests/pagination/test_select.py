"""Pages of real statements, on SQLite and PostgreSQL."""

from __future__ import annotations

import enum
import random
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
from overdrive.pagination.order import order_text, sorts_of
from overdrive.pagination.page import CursorPage, CursorParams, Page, PageParams
from overdrive.pagination.select import page, run, run_async
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


def _page(session: Session, stmt: Any, number: int = 1, size: int = 5) -> Page[Any]:
    return run(page(stmt, PageParams(page=number, size=size)), session.execute)


def _cursor_page(
    session: Session, stmt: Any, cursor: str | None = None, size: int = 5, binding: bytes = BINDING
) -> CursorPage[Any]:
    steps = cursor_page(
        stmt,
        CursorParams(cursor=cursor, size=size),
        dialect_name=session.get_bind().dialect.name,
        binding=binding,
        key=KEY,
    )
    return run(steps, session.execute)


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

    def execute(statement: Any) -> Any:
        sent.append(statement)
        return session.execute(statement)

    made = run(page(select(User), PageParams(page=2**31 - 1, size=10_000)), execute)
    assert (made.items, made.total, made.pages, len(sent)) == ([], 12, 1, 1)


def test_no_rows_are_no_pages(session: Session) -> None:
    made = _page(session, select(User).where(User.id < 0))
    assert (made.items, made.total, made.pages) == ([], 0, 0)


@pytest.mark.parametrize("selected", [[User], [User.__table__], [User.name], [User.name, User.rank]])
def test_without_an_order_the_primary_key_is_it(session: Session, selected: list[Any]) -> None:
    session.execute(update(User).where(User.id == 1).values(name="moved"))
    sent: list[str] = []

    def execute(statement: Any) -> Any:
        sent.append(str(statement))
        return session.execute(statement)

    run(page(select(*selected), PageParams(page=1, size=5)), execute)
    assert "ORDER BY page_users.id" in sent[-1]
    assert "ORDER BY" not in sent[0]


def test_the_count_is_of_the_unordered_rows_under_the_same_options() -> None:
    options = {"schema_translate_map": {None: "tenant"}}
    counted: Any = next(page(select(User).order_by(User.name).execution_options(**options), PageParams()))
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
    joined = _page(session, select(User).join(User.posts).options(selectinload(User.posts)), size=100)
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
    _assert_walks(session, select(User).join(User.posts).order_by(User.name), User.id, Post.id, size=2)
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


def test_row_values_are_used_where_they_say_the_same(session: Session) -> None:
    def sent(*order: Any) -> str:
        first = _cursor_page(session, select(User).order_by(*order))
        steps = cursor_page(
            select(User).order_by(*order),
            CursorParams(cursor=first.next_cursor),
            dialect_name=session.get_bind().dialect.name,
            binding=BINDING,
            key=KEY,
        )
        return str(next(steps))

    assert "(page_users.name, page_users.id) <" in sent(User.name.desc())
    assert " OR " in sent(User.name.desc(), User.id)
    assert " OR " in sent(User.rank)


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


class Thing(Base):
    __tablename__ = "page_things"

    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int | None]
    b: Mapped[str | None]
    c: Mapped[int]


@st.composite
def _cases(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[Any], int]:
    row = st.fixed_dictionaries(
        {
            "a": st.none() | st.integers(0, 2),
            "b": st.none() | st.sampled_from(["", "x", "X", "é"]),
            "c": st.integers(0, 1),
        }
    )
    rows = [{"id": i, **values} for i, values in enumerate(draw(st.lists(row, min_size=1, max_size=14)))]
    expressions = [Thing.a, Thing.b, Thing.c, Thing.id, func.lower(Thing.b), func.coalesce(Thing.a, 1)]
    order = []
    for expression in draw(st.lists(st.sampled_from(expressions), max_size=3)):
        directed = draw(st.sampled_from([expression, expression.asc(), expression.desc()]))
        place = draw(st.sampled_from(["", "nulls_first", "nulls_last"]))
        order.append(getattr(directed, place)() if place else directed)
    return rows, order, draw(st.integers(1, 6))


def _check_walk(engine: Engine, case_: tuple[list[dict[str, Any]], list[Any], int]) -> None:
    rows, order, size = case_
    with Session(engine) as session:
        session.execute(insert(Thing), rows)
        descending = bool(order) and " DESC" in str(order[-1])
        _assert_walks(session, select(Thing).order_by(*order), Thing.id.desc() if descending else Thing.id, size=size)


relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=300, deadline=None, suppress_health_check=relaxed)
@given(_cases())
def test_any_walk_is_the_list_on_sqlite(lite: Engine, case_: Any) -> None:
    _check_walk(lite, case_)


@settings(max_examples=100, deadline=None, suppress_health_check=relaxed)
@given(_cases())
def test_any_walk_is_the_list_on_postgresql(postgres: Engine, case_: Any) -> None:
    _check_walk(postgres, case_)


@settings(max_examples=40, deadline=None, suppress_health_check=relaxed)
@given(_cases(), st.randoms(use_true_random=False))
def test_writes_to_other_rows_neither_skip_nor_repeat(lite: Engine, case_: Any, generator: random.Random) -> None:
    rows, order, size = case_
    touched = [row["id"] for row in rows if row["id"] % 2]
    with Session(lite) as session:
        session.execute(insert(Thing), rows)
        stmt = select(Thing.id).order_by(*order)
        walked: list[int] = []
        cursor, fresh = None, 1000
        while True:
            one = _cursor_page(session, stmt, cursor, size)
            walked += one.items
            assert len(walked) < 1000
            if (cursor := one.next_cursor) is None:
                break
            for id_ in generator.sample(touched, min(2, len(touched))):
                session.execute(delete(Thing).where(Thing.id == id_))
                session.execute(insert(Thing), [{**generator.choice(rows), "id": id_}])
            # The row the cursor was made from, too, may go.
            gone = [id_ for id_ in touched if id_ in one.items[-1:]]
            session.execute(delete(Thing).where(Thing.id.in_(gone)))
            if fresh < 1010:
                session.execute(insert(Thing), [{**generator.choice(rows), "id": (fresh := fresh + 1)}])
        untouched = [row["id"] for row in rows if row["id"] % 2 == 0]
        assert sorted(id_ for id_ in walked if id_ < 1000 and id_ % 2 == 0) == untouched


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
        (text("SELECT 1 AS x").columns(User.id), r"subquery\(\)"),
        (insert(User), r"pass a select\(\)"),
        (select(User).limit(3), "remove it"),
        (select(User).offset(3), "remove it"),
        (select(User).fetch(3), "remove it"),
        (union(select(User.id), select(Post.id)).limit(3), "remove it"),
        (select(User).join(User.posts).options(contains_eager(User.posts)), "selectinload"),
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
        total = (await run_async(page(stmt, PageParams(size=1)), connection.execute)).total
        cursor = None
        while True:
            steps = cursor_page(
                stmt,
                CursorParams(cursor=cursor, size=size),
                dialect_name=connection.dialect.name,
                binding=BINDING,
                key=KEY,
            )
            one = await run_async(steps, connection.execute)
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
