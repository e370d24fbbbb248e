"""Rows are told apart by their primary keys, and whatever changes what was read names something that was read."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Engine,
    ForeignKey,
    Identity,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)
from sqlalchemy.orm.exc import StaleDataError

from overdrive.context import collecting
from overdrive.pool.engine import create_sync_engine
from overdrive.pool.observe import Outcome, observe
from overdrive.pool.rows import condensed
from overdrive.pool.statement import facts_of


class Base(DeclarativeBase):
    pass


class Country(Base):
    __tablename__ = "rows_countries"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class User(Base):
    __tablename__ = "rows_users"
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    name: Mapped[str]
    country_id: Mapped[int | None] = mapped_column(
        ForeignKey("rows_countries.id", ondelete="CASCADE", onupdate="CASCADE")
    )
    country: Mapped[Country | None] = relationship()
    posts: Mapped[list[Post]] = relationship(back_populates="user", passive_deletes=True)


class Post(Base):
    __tablename__ = "rows_posts"
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    title: Mapped[str]
    user_id: Mapped[int | None] = mapped_column(ForeignKey("rows_users.id", ondelete="SET NULL", onupdate="CASCADE"))
    user: Mapped[User | None] = relationship(back_populates="posts")


class Place(Base):
    __tablename__ = "rows_places"
    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Token(Base):
    __tablename__ = "rows_tokens"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str]


class Code(Base):
    __tablename__ = "rows_codes"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


class Recorder:
    """Collects what commits have written."""

    def __init__(self) -> None:
        self.written: set[str] = set()

    async def before(self, writes: frozenset[str]) -> None:
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
TOKENS = [uuid.UUID(int=number) for number in range(4)]

Action = Callable[[Session], Any]


def rows_of(result: Any) -> list[tuple[Any, ...]]:
    return sorted(map(repr, map(tuple, result)))  # type: ignore[arg-type]


def shown(entity: Any) -> Any:
    return None if entity is None else {c.key: getattr(entity, c.key) for c in entity.__table__.columns}


def reads(i: int, j: int) -> dict[str, Action]:
    """What is read of rows i and j, in all the ways that come near to a primary key."""
    author = aliased(User)
    return {
        "get": lambda s: shown(s.get(User, i)),
        "get composite": lambda s: shown(s.get(Place, (i, j))),
        "get uuid": lambda s: shown(s.get(Token, TOKENS[i - 1])),
        "get text": lambda s: shown(s.get(Code, "ab"[i % 2])),
        "columns": lambda s: rows_of(s.execute(select(User.name).where(User.id == i))),
        "and more": lambda s: rows_of(s.execute(select(User.id).where(User.id == i, User.name == f"user {j}"))),
        "either": lambda s: rows_of(s.execute(select(User.id, User.name).where(or_(User.id == i, User.id == j)))),
        "one half": lambda s: rows_of(s.execute(select(Place.name).where(Place.row == i))),
        "both halves": lambda s: rows_of(s.execute(select(Place.name).where(and_(Place.row == i, Place.number == j)))),
        "count": lambda s: s.scalar(select(func.count()).select_from(User).where(User.id == i)),
        "exists": lambda s: s.scalar(select(exists().where(User.id == i))),
        "alias": lambda s: rows_of(s.execute(select(author.name).where(author.id == i))),
        "joined": lambda s: [
            (shown(u), shown(u.country))
            for u in s.scalars(select(User).where(User.id == i).options(joinedload(User.country)))
        ],
        "collection": lambda s: [
            (shown(u), [shown(p) for p in sorted(u.posts, key=lambda p: p.id)])
            for u in s.scalars(select(User).where(User.id == i).options(selectinload(User.posts)))
        ],
        "lazy": lambda s: (p := s.get(Post, i)) and shown(p.user),
        "inner join": lambda s: rows_of(s.execute(select(User.name, Post.title).join(User.posts).where(User.id == i))),
        "from the other side": lambda s: rows_of(s.execute(select(Post.title).join(Post.user).where(User.id == i))),
        "with itself": lambda s: rows_of(
            s.execute(select(User.name, author.name).join(author, author.id == User.id + 1).where(User.id == i))
        ),
        "subquery": lambda s: rows_of(
            s.execute(select(User.name).where(User.id == i, User.name.in_(select(User.name).where(User.id == j))))
        ),
        "scalar subquery": lambda s: rows_of(
            s.execute(
                select(User.name, select(func.max(author.name)).where(author.id == j).scalar_subquery()).where(
                    User.id == i
                )
            )
        ),
        "scalar subquery of the same": lambda s: rows_of(
            s.execute(
                select(Place.name, select(func.max(User.name)).where(User.id == j).scalar_subquery()).where(
                    Place.row == 1, Place.number == 1
                )
            )
        ),
        "all": lambda s: rows_of(s.execute(select(User.id, User.name))),
    }


def changed(entity: Any, **values: Any) -> None:
    if entity is not None:
        for name, value in values.items():
            setattr(entity, name, value)


def removed(session: Session, entity: Any) -> None:
    if entity is not None:
        session.delete(entity)


def writes(i: int, j: int, name: str) -> dict[str, Action]:
    """Every way of writing that the rows above may meet."""
    users = User.__table__
    upsert = postgresql.insert(User).values(id=i, name=name)
    return {
        "unit of work": lambda s: changed(s.get(User, i), name=name),
        "delete": lambda s: removed(s, s.get(User, i)),
        "delete what is referred to": lambda s: removed(s, s.get(Country, i)),
        "update by key": lambda s: s.execute(update(User).where(User.id == i).values(name=name)),
        "update by key and more": lambda s: s.execute(
            update(User).where(User.id == i, User.name != name).values(name=name)
        ),
        "update of two": lambda s: s.execute(update(User).where(or_(User.id == i, User.id == j)).values(name=name)),
        "update of all": lambda s: s.execute(update(User).values(name=name)),
        "update of a name": lambda s: s.execute(update(User).where(User.name == f"user {i}").values(name=name)),
        "update of a key": lambda s: s.execute(update(User).where(User.id == i).values(id=i + 10)),
        "update of a key in parts": lambda s: s.execute(
            update(Place).where(Place.row == i, Place.number == j).values(number=j + 10)
        ),
        "update in order": lambda s: s.execute(
            update(User).where(User.id == i).ordered_values((User.name, name), (User.id, i + 20))
        ),
        "bulk by key": lambda s: s.execute(update(User), [{"id": i, "name": name}, {"id": j, "name": name}]),
        "executemany": lambda s: s.connection().execute(
            update(users).where(users.c.id == bindparam("which")),
            [{"which": i, "name": name}, {"which": j, "name": name}],
        ),
        "core delete": lambda s: s.execute(delete(User).where(User.id == i)),
        "core delete of a parent": lambda s: s.execute(delete(Country).where(Country.id == i)),
        "renumbered parent": lambda s: s.execute(update(Country).where(Country.id == i).values(id=i + 10)),
        "upsert": lambda s: s.execute(upsert.on_conflict_do_update(index_elements=[User.id], set_={"name": name})),
        "insert": lambda s: s.execute(insert(User).values(name=name)),
        "insert with a key": lambda s: s.execute(upsert.on_conflict_do_nothing()),
        "add": lambda s: s.add(Post(title=name, user_id=None)),
        "place": lambda s: changed(s.get(Place, (i, j)), name=name),
        "token": lambda s: changed(s.get(Token, TOKENS[i - 1]), name=name),
        "text": lambda s: s.execute(update(Code).where(Code.code == "ab"[i % 2]).values(name=name)),
        "move": lambda s: changed(s.get(Post, i), user_id=None),
    }


READS, WRITES = sorted(reads(1, 1)), sorted(writes(1, 1, ""))


def filled(session: Session) -> None:
    for table in reversed(Base.metadata.sorted_tables):
        session.execute(delete(table))
    session.execute(insert(Country), [{"id": n, "name": f"country {n}"} for n in range(1, 5)])
    # Rows 4 are missing.
    session.execute(insert(User), [{"id": n, "name": f"user {n}", "country_id": n} for n in range(1, 4)])
    session.execute(insert(Post), [{"id": n, "title": f"post {n}", "user_id": n} for n in range(1, 4)])
    session.execute(insert(Place), [{"row": r, "number": n, "name": "place"} for r in (1, 2) for n in (1, 2)])
    session.execute(insert(Token), [{"id": each, "name": "token"} for each in TOKENS[:3]])
    session.execute(insert(Code), [{"code": each, "name": "code"} for each in "ab"])
    session.commit()


def read(engine: Engine, action: Action) -> tuple[Any, set[str]]:
    with collecting() as collected, Session(engine) as session:
        return action(session), collected.tags


@settings(max_examples=400, deadline=None)
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
