"""Every way of reading that comes near to a primary key, and every way of writing that such a reading may meet."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    Column,
    ForeignKey,
    Identity,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql
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


class Base(DeclarativeBase):
    pass


class Country(Base):
    __tablename__ = "rows_countries"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Group(Base):
    __tablename__ = "rows_groups"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


memberships = Table(
    "rows_memberships",
    Base.metadata,
    Column("user_id", ForeignKey("rows_users.id", ondelete="CASCADE", onupdate="CASCADE"), primary_key=True),
    Column("group_id", ForeignKey("rows_groups.id", ondelete="CASCADE", onupdate="CASCADE"), primary_key=True),
)


class User(Base):
    __tablename__ = "rows_users"
    id: Mapped[int] = mapped_column(Identity(start=100), primary_key=True)
    name: Mapped[str]
    country_id: Mapped[int | None] = mapped_column(
        ForeignKey("rows_countries.id", ondelete="CASCADE", onupdate="CASCADE")
    )
    country: Mapped[Country | None] = relationship()
    posts: Mapped[list[Post]] = relationship(back_populates="user", passive_deletes=True)
    groups: Mapped[list[Group]] = relationship(secondary=memberships, passive_deletes=True)


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
        "groups": lambda s: [
            (shown(u), sorted(g.name for g in u.groups))
            for u in s.scalars(select(User).where(User.id == i).options(selectinload(User.groups)))
        ],
        "members": lambda s: rows_of(s.execute(select(User.name).join(User.groups).where(Group.id == j))),
        "common table": lambda s: rows_of(
            s.execute(select((few := select(User.name, User.id).where(User.id <= i).cte()).c.name).where(few.c.id <= j))
        ),
        "union": lambda s: rows_of(
            s.execute(select(User.name).where(User.id == i).union(select(Post.title).where(Post.id == j)))
        ),
    }


def changed(entity: Any, **values: Any) -> None:
    if entity is not None:
        for name, value in values.items():
            setattr(entity, name, value)


def removed(session: Session, entity: Any) -> None:
    if entity is not None:
        session.delete(entity)


def joined(user: User | None, group: Group | None) -> None:
    if user is not None and group is not None and group not in user.groups:
        user.groups.append(group)


def nested(session: Session, statement: Any, *, kept: bool) -> None:
    savepoint = session.begin_nested()
    session.execute(statement)
    savepoint.commit() if kept else savepoint.rollback()


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
        "join a group": lambda s: joined(s.get(User, i), s.get(Group, j)),
        "leave all groups": lambda s: changed(s.get(User, i), groups=[]),
        "core membership": lambda s: s.execute(
            postgresql.insert(memberships).values(user_id=i, group_id=j).on_conflict_do_nothing()
        ),
        "core leave": lambda s: s.execute(delete(memberships).where(memberships.c.group_id == j)),
        "merge": lambda s: s.merge(User(id=i, name=name)),
        "textual": lambda s: s.execute(
            text("UPDATE rows_users SET name = :name WHERE id = :id"), {"name": name, "id": i}
        ),
        "driver's own": lambda s: s.connection().exec_driver_sql(
            f"UPDATE rows_users SET name = '{name}' WHERE id = {i}"
        ),
        "within a read": lambda s: s.execute(select(delete(Post).where(Post.id == i).returning(Post.id).cte().c.id)),
        "from a select": lambda s: s.execute(
            insert(Post).from_select(["title", "user_id"], select(User.name, User.id).where(User.id == i))
        ),
        "savepoint": lambda s: nested(s, update(User).where(User.id == i).values(name=name), kept=True),
        "savepoint undone": lambda s: nested(s, update(User).where(User.id == i).values(name=name), kept=False),
    }


READS, WRITES = sorted(reads(1, 1)), sorted(writes(1, 1, ""))


def filled(session: Session) -> None:
    for table in reversed(Base.metadata.sorted_tables):
        session.execute(delete(table))
    session.execute(insert(Country), [{"id": n, "name": f"country {n}"} for n in range(1, 5)])
    # Rows 4 are missing.
    session.execute(insert(User), [{"id": n, "name": f"user {n}", "country_id": n} for n in range(1, 4)])
    session.execute(insert(Group), [{"id": n, "name": f"group {n}"} for n in range(1, 4)])
    session.execute(insert(memberships), [{"user_id": n, "group_id": 1} for n in range(1, 3)])
    session.execute(insert(Post), [{"id": n, "title": f"post {n}", "user_id": n} for n in range(1, 4)])
    session.execute(insert(Place), [{"row": r, "number": n, "name": "place"} for r in (1, 2) for n in (1, 2)])
    session.execute(insert(Token), [{"id": each, "name": "token"} for each in TOKENS[:3]])
    session.execute(insert(Code), [{"code": each, "name": "code"} for each in "ab"])
    session.commit()
