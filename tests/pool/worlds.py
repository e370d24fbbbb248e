"""Schemas, readings and writings at random, and the question of them all: does a write name what it changes?

A world is a few mapped tables with rows 1 to 3, and all of it comes from a `Random`, whose seed makes it once more. A
write is made inside a transaction that is rolled back, so that the next one finds the same rows.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Engine,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Uuid,
    and_,
    bindparam,
    column,
    delete,
    event,
    exists,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    table,
    text,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.associationproxy import association_proxy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Session,
    aliased,
    backref,
    column_property,
    deferred,
    joinedload,
    relationship,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    undefer,
    with_loader_criteria,
    with_polymorphic,
)
from sqlalchemy.util.concurrency import in_greenlet
from support import outside

from overdrive.context import collecting
from overdrive.pool.engine import create_engine
from overdrive.pool.observe import Outcome, observe

#: Before SQLAlchemy 2.1 it is a method of statements.
distinct_on: Any = getattr(postgresql, "distinct_on", None)

Action = Callable[[Session], Any]

#: Rows that are there; the next one is missing.
ROWS = (1, 2, 3)
_numbers = count(1)


@dataclass(eq=False)
class Kind:
    """An entity.

    tables: those it has columns in; the last one is its own.
    keys: the primary key of each row.
    parents, children, groups: names of its relationships.
    """

    entity: Any
    tables: list[Table]
    keys: list[tuple[Any, ...]]
    parents: list[str] = field(default_factory=list)
    children: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    @property
    def table(self) -> Table:
        return self.tables[-1]

    def values(self, row: int) -> dict[str, Any]:
        """What a row is referred to by, by the keys of the columns."""
        return {**dict(zip((c.key for c in self.table.primary_key), self.keys[row], strict=True)), "unique": row}

    def is_row(self, row: int, of: Any = None) -> Any:
        """The condition that names a row by its key."""
        values = self.values(row)
        return and_(*(getattr(of or self.entity, c.key) == values[c.key] for c in self.table.primary_key))

    def is_core_row(self, row: int) -> Any:
        """The same of the table."""
        return self.is_row(row, self.table.c)


@dataclass(eq=False)
class World:
    """A schema.

    refers: of each table, the columns that refer to a kind, and what to of it.
    """

    metadata: MetaData
    postgres: bool
    kinds: list[Kind] = field(default_factory=list)
    links: list[Table] = field(default_factory=list)
    refers: dict[Table, list[tuple[list[Column[Any]], Kind, list[Column[Any]]]]] = field(default_factory=dict)

    def refer(self, columns: list[Column[Any]], kind: Kind, remote: list[Column[Any]], **actions: str | None) -> None:
        """Have columns of a table refer to a kind's."""
        constraint = ForeignKeyConstraint([c.key for c in columns], remote, **actions)  # type: ignore[arg-type]
        columns[0].table.append_constraint(constraint)
        self.refers.setdefault(columns[0].table, []).append((columns, kind, remote))


# Schemas


def made_up(rng: Random, *, postgres: bool) -> World:
    """Make up a schema."""
    name = f"w{next(_numbers)}"
    world = World(MetaData(), postgres)
    base: Any = type("Base", (DeclarativeBase,), {"metadata": world.metadata})
    for number in range(rng.randint(1, 3)):
        roots = [kind for kind in world.kinds if len(kind.tables) == 1 and kind.entity.__bases__ == (base,)]
        if roots and rng.random() < 0.3:
            world.kinds.append(_heir(rng, world, rng.choice(roots), f"{name}_{number}"))
        else:
            world.kinds.append(_kind(rng, world, base, f"{name}_{number}"))
    if rng.random() < 0.5:
        _link(rng, world, f"{name}_link")
    base.registry.configure()
    return world


def _like(columns: Any, prefix: str, **options: Any) -> list[Column[Any]]:
    return [Column(prefix + c.name, c.type, key=prefix + c.key, **options) for c in columns]


def _kind(rng: Random, world: World, base: Any, name: str) -> Kind:
    owner: Kind | None = None
    match rng.choice(["number", "number", "uuid", "text", "pair", "weak"]):
        case "uuid":
            key, keys = [Column("id", Uuid, primary_key=True)], [(uuid.UUID(int=row),) for row in range(5)]
        case "text":
            key, keys = [Column("id", String(9), primary_key=True)], [(f"k{row}",) for row in range(5)]
        case "pair":
            key = [Column(each, Integer, primary_key=True, autoincrement=False) for each in ("b", "a")]
            keys = [(row, 1) for row in range(5)]
        case "weak" if world.kinds:
            owner = rng.choice(world.kinds)
            key = _like(owner.table.primary_key, "of_", primary_key=True)
            key.append(Column("part", Integer, primary_key=True, autoincrement=False))
            keys = [(*each, 1) for each in owner.keys]
        case _:
            key, keys = [Column("id_", Integer, key="id", primary_key=True)], [(row,) for row in range(5)]
    own = Table(
        name,
        world.metadata,
        *key,
        Column("n", Integer),
        Column("s_", String, key="s"),
        Column("unique", Integer, unique=True),
        Column("gone", Boolean),
        Column("late", String),
        Column("kind", String, default=name),
        schema="elsewhere" if world.postgres and rng.random() < 0.3 else None,
    )
    properties: dict[str, Any] = {
        "late": deferred(own.c.late),
        "double": hybrid_property(lambda self: self.n + self.n),
    }
    if world.kinds and rng.random() < 0.4:
        other = rng.choice(world.kinds).tables[0]
        number = select(func.count()).select_from(other).where(other.c.n >= own.c.n).scalar_subquery()
        properties["counted"] = column_property(number, deferred=rng.random() < 0.3)
    mapping = {"polymorphic_on": own.c.kind, "polymorphic_identity": name}
    if rng.random() < 0.3:
        mapping["with_polymorphic"] = "*"
    kind = Kind(type(name, (base,), {"__table__": own, "__mapper_args__": mapping, **properties}), [own], keys)
    if owner is not None:
        world.refer(key[:-1], owner, list(owner.table.primary_key), ondelete="CASCADE", onupdate="CASCADE")
    for number in range(rng.randint(0, 2)):
        _parent(rng, world, kind, f"p{number}")
    return kind


def _parent(rng: Random, world: World, kind: Kind, name: str) -> None:
    """A foreign key to a kind's own or another unique key, and relationships along it."""
    target = rng.choice([kind, *world.kinds])
    remote = [target.tables[0].c.unique] if rng.random() < 0.3 else list(target.table.primary_key)
    columns = _like(remote, f"{name}_")
    for each in columns:
        kind.table.append_column(each)
        kind.entity.__mapper__.add_property(each.key, each)
    on_delete = rng.choice(["CASCADE", "SET NULL", "SET DEFAULT", None])
    if world.postgres and on_delete == "SET NULL" and rng.random() < 0.3:
        on_delete = f"SET NULL ({columns[0].name})"
    world.refer(columns, target, remote, ondelete=on_delete, onupdate=rng.choice(["CASCADE", "SET NULL", None]))
    lazy = ["select", "select", "joined", "selectin", "subquery"]
    others = f"{kind.table.name}_{name}"
    cascade = "all, delete-orphan" if rng.random() < 0.3 else "save-update, merge"
    passive = on_delete is not None and rng.random() < 0.7
    there = backref(
        others, cascade=cascade, passive_deletes=passive, lazy=rng.choice(lazy), single_parent="orphan" in cascade
    )
    condition = and_(*(mine == theirs for mine, theirs in zip(columns, remote, strict=True)))
    kind.entity.__mapper__.add_property(
        name,
        relationship(
            target.entity,
            foreign_keys=columns,
            primaryjoin=condition,
            remote_side=remote,
            lazy=rng.choice(lazy),
            backref=there,
        ),
    )
    kind.parents.append(name)
    target.children.append(others)
    setattr(target.entity, f"{others}_n", association_proxy(others, "n"))


def _heir(rng: Random, world: World, root: Kind, name: str) -> Kind:
    """A kind that inherits from another, in its table or with one of its own."""
    space: dict[str, Any] = {"__mapper_args__": {"polymorphic_identity": name}}
    tables = list(root.tables)
    if rng.random() < 0.6:
        key = [Column(c.name, c.type, key=c.key, primary_key=True, autoincrement=False) for c in root.table.primary_key]
        tables.append(Table(name, world.metadata, *key, Column("more", Integer)))
        world.refer(key, root, list(root.table.primary_key), ondelete="CASCADE", onupdate="CASCADE")
        space["__table__"] = tables[-1]
    return Kind(type(name, (root.entity,), space), tables, root.keys, root.parents, root.children, root.groups)


def _link(rng: Random, world: World, name: str) -> None:
    """Many to many."""
    left, right = rng.choice(world.kinds), rng.choice(world.kinds)
    one = _like(left.table.primary_key, "l_", primary_key=True)
    other = _like(right.table.primary_key, "r_", primary_key=True)
    link = Table(name, world.metadata, *one, *other)
    conditions = []
    for columns, kind in ((one, left), (other, right)):
        remote = list(kind.table.primary_key)
        world.refer(columns, kind, remote, ondelete="CASCADE", onupdate="CASCADE")
        conditions.append(and_(*(mine == theirs for mine, theirs in zip(columns, remote, strict=True))))
    group = relationship(
        right.entity,
        secondary=link,
        primaryjoin=conditions[0],
        secondaryjoin=conditions[1],
        passive_deletes=rng.random() < 0.5,
        lazy=rng.choice(["select", "selectin", "joined"]),
    )
    left.entity.__mapper__.add_property("group", group)
    left.groups.append("group")
    world.links.append(link)


def fill(world: World, engine: Engine, rng: Random) -> None:
    """Make the tables, with rows 1 to 3: where kinds share a table, row 3 or row 2 is an heir."""
    kinds = {(kind.tables[0], row): kind for kind in world.kinds if len(kind.tables) == 1 for row in ROWS[:1]}
    for kind in world.kinds:
        for row in ROWS if (kind.tables[0], 1) not in kinds else ROWS[1:]:
            if len(kind.tables) == 1 or row == 2:
                kinds[kind.tables[0], row] = kind
    with engine.begin() as connection:
        if world.postgres:
            connection.execute(text("CREATE SCHEMA IF NOT EXISTS elsewhere"))
        world.metadata.create_all(connection)
        for each in world.metadata.sorted_tables:
            for row in ROWS:
                if each in world.links:
                    values: dict[str, Any] = {}
                else:
                    root = next(kind for kind in world.kinds if each in kind.tables).tables[0]
                    kind = kinds[root, row]
                    if each not in kind.tables:
                        continue
                    values = {
                        "n": row % 2,
                        "s": f"s{row}",
                        "gone": row == 3,
                        "late": "late",
                        "more": row,
                        "kind": kind.entity.__name__,
                        **kind.values(row),
                    }
                for columns, target, remote in world.refers.get(each, ()):
                    if not columns[0].primary_key and rng.random() < 0.3:
                        continue
                    owner = target.values(1 if target.table is each else row)
                    values |= {c.key: owner[to.key] for c, to in zip(columns, remote, strict=True)}
                with suppress(DBAPIError), connection.begin_nested():
                    connection.execute(insert(each).values({k: v for k, v in values.items() if k in each.c}))


@contextmanager
def forgotten(rng: Random, world: World) -> Iterator[None]:
    """Have models know nothing of some foreign keys, as where their tables are of another MetaData."""
    keys = [
        (each.foreign_keys, key)
        for each in world.metadata.sorted_tables
        for key in sorted(each.foreign_keys, key=lambda key: key.parent.key)
        if rng.random() < 0.3
    ]
    for kept, key in keys:
        kept.discard(key)
    try:
        yield
    finally:
        for kept, key in keys:
            kept.add(key)


# Readings


def shown(value: Any, depth: int = 2) -> Any:
    """What is loaded of a value, in an order that does not depend on the database's."""
    if isinstance(value, list):
        return sorted((shown(each, depth) for each in value), key=repr)
    if isinstance(value, tuple):
        return tuple(shown(each, depth) for each in value)
    if not hasattr(value, "_sa_instance_state"):
        return value
    # What is loaded by way of a relationship may lead back.
    loaded = sorted(value.__dict__.items()) if depth else ()
    return type(value).__name__, [(name, shown(each, depth - 1)) for name, each in loaded if name[0] != "_"]


def rows(result: Any) -> Any:
    """What a result has."""
    return shown([tuple(row) for row in result.unique()])


class Reader:
    """Makes up readings of a world."""

    def __init__(self, rng: Random, world: World) -> None:
        self.rng = rng
        self.world = world

    def kind(self) -> Kind:
        return self.rng.choice(self.world.kinds)

    def row(self) -> int:
        return self.rng.choice((1, 1, 2, 3, 4))

    def reading(self) -> Action:
        """Return one."""
        rng, kind = self.rng, self.kind()
        row, name = self.row(), rng.choice([*kind.parents, *kind.children, *kind.groups, "late"])
        entity, key = kind.entity, kind.keys[self.row()]
        match rng.choice(["get", "attribute", "refresh", "again", "statement", "statement", "statement", "statement"]):
            case "get":
                options = self.options(entity, kind)
                return lambda s: shown(s.get(entity, key, options=options))
            case "attribute":
                return lambda s: shown([(one, getattr(one, name)) for one in s.scalars(select(entity)).unique()])
            case "refresh":
                return lambda s: ((one := s.get(entity, key)) and s.refresh(one)) or shown(one)
            case "again":
                return lambda s: (
                    ((one := s.get(entity, key)) and s.expire(one)) or (one and (one.n, getattr(one, name), one))
                )
        statement = self.statement(kind, row)
        if rng.random() < 0.2:
            return lambda s: rows(s.connection().execute(statement))
        if rng.random() < 0.2:
            return lambda s: rows(s.execute(statement, execution_options={"yield_per": 2}))
        return lambda s: rows(s.execute(statement, execution_options={"populate_existing": True}))

    def statement(self, kind: Kind, row: int) -> Any:
        rng, core = self.rng, kind.table
        match rng.choice(
            ["select"] * 8 + ["union", "cte", "recursive", "lateral", "core", "light", "entities", "from"]
        ):
            case "union":
                both = [self.select(columns=1), self.select(columns=1)]
                return rng.choice([both[0].union, both[0].union_all, both[0].intersect, both[0].except_])(both[1])
            case "cte":
                few = self.select(columns=1, named=True).cte()
                other = self.select(columns=1).add_cte(few) if rng.random() < 0.3 else select(kind.entity.n)
                return other.where(kind.entity.n.in_(select(few.c.x)))
            case "recursive":
                step = select(core.c.n.label("x")).where(kind.is_core_row(row)).cte(recursive=True)
                return select(step.union(select(core.c.n + 1).join(step, core.c.n + 2 == step.c.x)))
            case "lateral" if self.world.postgres:
                beside = self.select(columns=1, named=True).lateral()
                return select(kind.entity.n, beside.c.x).join(beside, true())
            case "core":
                other = rng.choice([*self.world.links, *(each.table for each in self.world.kinds)]).alias()
                joined = core.join(other, true(), isouter=rng.random() < 0.5)
                return (
                    select(core.c.n, func.count()).select_from(joined).where(kind.is_core_row(row)).group_by(core.c.n)
                )
            case "light":
                light = table(core.name, column("n"), schema=core.schema)
                return select(light.c.n).where(light.c.n == row % 2)
            case "entities":
                inner = select(kind.entity).where(self.condition(kind.entity, kind)).subquery()
                return select(aliased(kind.entity, inner)) if rng.random() < 0.5 else select(inner)
            case "from":
                return select(kind.entity).from_statement(self.select(columns=1))
        return self.select()

    def select(self, columns: int = 0, *, named: bool = False) -> Any:
        """A SELECT; columns: how many it has to have, if it matters."""
        rng, kind = self.rng, self.kind()
        entity = rng.choice([kind.entity, kind.entity, aliased(kind.entity), with_polymorphic(kind.entity, "*")])
        what: list[Any]
        grouped = False
        match rng.choice(["column", "count", "greatest", "scalar"] if columns else range(9)):
            case "count" | 0:
                what = [func.count()]
            case "greatest" | 1:
                what = [func.max(entity.n)]
            case "scalar" | 2:
                what = [self.select_one(entity).scalar_subquery()]
            case 3:
                what, grouped = [entity.s, func.count()], True
            case 4:
                what = [entity.s, func.row_number().over(order_by=entity.unique)]
            case "column" | 5:
                what = [entity.n]
            case 6:
                what = [entity.s, entity.double]
            case _:
                what = [entity]
        found = select(what[0].label("x") if named else what[0], *what[1:]).select_from(entity)
        if (names := [*kind.parents, *kind.children, *kind.groups]) and rng.random() < 0.3:
            found = found.join(getattr(entity, rng.choice(names)), isouter=rng.random() < 0.5, full=rng.random() < 0.1)
        if rng.random() < 0.2:
            other = self.kind()
            side = aliased(other.entity)
            found = found.join(side, side.n == entity.n, isouter=rng.random() < 0.5)
            if rng.random() < 0.5:
                found = found.where(self.condition(side, other))
        for _ in range(rng.choice((0, 1, 1, 2))):
            found = found.where(self.condition(entity, kind))
        if grouped:
            found = found.group_by(entity.s)
        elif rng.random() < 0.1:
            found = found.having(func.count() >= 0)
        if rng.random() < 0.1 and not columns:
            ordered = found.order_by(entity.unique)
            found = ordered.ext(distinct_on(entity.unique)) if self.world.postgres and distinct_on else ordered.limit(2)
        return found if columns else found.options(*self.options(entity, kind))

    def select_one(self, outer: Any) -> Any:
        """A SELECT of one column and at most one row."""
        kind = self.kind()
        inner = aliased(kind.entity)
        found = select(func.max(inner.n)).where(self.condition(inner, kind, depth=0))
        return found.where(inner.n >= outer.n) if self.rng.random() < 0.5 else found

    def condition(self, entity: Any, kind: Kind, depth: int = 1) -> Any:
        """A condition of an entity or an alias of it."""
        rng, other = self.rng, self.kind()
        match rng.choice(
            ["row"] * 4 + ["and", "n", "in"] + ["or", "not", "exists", "any", "sub", "scalar", "whole"] * depth
        ):
            case "row":
                return kind.is_row(self.row(), entity)
            case "and":
                return and_(kind.is_row(self.row(), entity), entity.n >= rng.randint(0, 1))
            case "in":
                return entity.unique.in_([self.row(), self.row()])
            case "or":
                return or_(kind.is_row(self.row(), entity), kind.is_row(self.row(), entity))
            case "not":
                return not_(self.condition(entity, kind, 0))
            case "exists":
                inner = aliased(other.entity)
                return exists(select(inner).where(self.condition(inner, other, 0), inner.n == entity.n))
            case "any" if names := [*kind.children, *kind.groups]:
                return getattr(entity, rng.choice(names)).any()
            case "any" if kind.parents:
                return getattr(entity, rng.choice(kind.parents)).has()
            case "sub":
                return entity.n.in_(select(aliased(other.entity).n).where(other.entity.n == 1))
            case "scalar":
                return literal(rng.randint(0, 1)) == self.select_one(entity).scalar_subquery()
            case "whole":
                # What is told of an entity may be more than its table.
                whole = select(other.entity).subquery()
                return entity.n.in_(
                    select(whole.c[rng.choice(whole.c.keys())]).where(whole.c.n == 1).with_only_columns(whole.c.n)
                )
        return entity.n == rng.randint(0, 1)

    def options(self, entity: Any, kind: Kind) -> list[Any]:
        """Options of a statement that loads an entity."""
        rng, options = self.rng, []
        names = [*kind.parents, *kind.children, *kind.groups]
        if names and rng.random() < 0.4:
            load = rng.choice([joinedload, selectinload, subqueryload])
            options.append(load(getattr(entity, rng.choice(names))))
        if rng.random() < 0.2:
            options.append(undefer(entity.late))
        if rng.random() < 0.2:
            options.append(
                selectin_polymorphic(
                    kind.entity, [each.entity for each in self.world.kinds if each.tables[0] is kind.tables[0]][1:]
                )
            )
        if rng.random() < 0.3:
            hidden, other = self.kind(), self.kind()
            theirs = (
                select(other.table.c.n).where(other.table.c.unique <= 2)
                if "unique" in other.table.c
                else select(other.tables[0].c.n)
            )
            criteria = rng.choice([hidden.entity.gone.is_(False), hidden.entity.n.in_(theirs)])
            options.append(with_loader_criteria(hidden.entity, criteria, include_aliases=rng.random() < 0.7))
        return options


# Writings


class Writer:
    """Makes up writings of a world."""

    def __init__(self, rng: Random, world: World) -> None:
        self.rng = rng
        self.world = world
        self.reader = Reader(rng, world)

    def writing(self) -> Action:
        """Return one."""
        rng = self.rng
        kinds = self.unit, self.unit, self.bulk, self.bulk, self.core, self.core, self.inserting, self.textual
        made = rng.choice(kinds)()
        if rng.random() < 0.1:
            released, after = rng.random() < 0.5, rng.choice(kinds)()
            return lambda s: _nested(s, made, after, released=released)
        return made

    def unit(self) -> Action:
        """What a unit of work does."""
        rng, kind = self.rng, self.reader.kind()
        entity, row, key = kind.entity, self.reader.row(), kind.keys[self.reader.row()]
        match rng.choice(["set", "set", "delete", "delete", "key", "parent", "child", "group", "add", "merge"]):
            case "delete":
                return lambda s: s.delete(s.get(entity, key))
            case "key":
                values = dict(zip((c.key for c in kind.table.primary_key), kind.keys[4], strict=True))
                return lambda s: _set(s.get(entity, key), **values)
            case "parent" if kind.parents:
                name = rng.choice(kind.parents)
                to = getattr(entity, name).property.mapper.class_
                return lambda s: _set(
                    s.get(entity, key), **{name: s.scalars(select(to).limit(row - 1)).unique().first()}
                )
            case "child" if kind.children:
                name = rng.choice(kind.children)
                return lambda s: getattr(s.get(entity, key), name).clear()
            case "group" if kind.groups:
                to = entity.group.property.mapper.class_
                if rng.random() < 0.5:
                    return lambda s: s.get(entity, key).group.clear()
                return lambda s: s.get(entity, key).group.extend(s.scalars(select(to)).unique().all())
            case "add":
                return lambda s: s.add(entity(**self.new(kind, 4)))
            case "merge":
                return lambda s: s.merge(entity(**self.new(kind, row)))
        values = rng.choice([{"n": 7}, {"s": "new"}, {"unique": 9}, {"gone": True}, {"late": "later"}])
        return lambda s: _set(s.get(entity, key), **values)

    def new(self, kind: Kind, row: int) -> dict[str, Any]:
        return kind.values(row) | {"n": 1, "s": "new", "gone": False}

    def bulk(self) -> Action:
        """An UPDATE or DELETE of entities, or of an alias."""
        rng, kind = self.rng, self.reader.kind()
        entity = rng.choice([kind.entity, kind.entity, aliased(kind.entity)])
        values = rng.choice([{"n": 7}, {"n": 7, "s": "new"}, {"unique": entity.unique + 10}, {"gone": True}])
        key = dict(zip((c.key for c in kind.table.primary_key), kind.keys[4], strict=True))
        options = {"synchronize_session": rng.choice([False, "fetch"])}
        condition = self.reader.condition(entity, kind)
        match rng.choice(["update", "update", "delete", "key", "by key", "ordered", "mappings", "returning"]):
            case "delete":
                statement: Any = delete(entity).where(condition)
            case "key":
                statement = update(entity).where(kind.is_row(self.reader.row(), entity)).values(key)
            case "by key":
                both = [self.by_key(kind, 1), self.by_key(kind, 2)]
                return lambda s: s.execute(update(kind.entity), both)
            case "ordered":
                first, *others = key.items()
                pairs = [("n", 7), *others, first]
                statement = (
                    update(kind.entity)
                    .where(condition)
                    .ordered_values(*((getattr(kind.entity, k), v) for k, v in pairs))
                )
            case "mappings":
                return lambda s: s.bulk_update_mappings(kind.entity.__mapper__, [self.by_key(kind, 2)])
            case "returning":
                statement = delete(kind.entity).where(condition).returning(kind.entity.n)
            case _:
                statement = update(entity).where(condition).values(values)
        return lambda s: s.execute(statement, execution_options=options)

    def by_key(self, kind: Kind, row: int) -> dict[str, Any]:
        return dict(zip((c.key for c in kind.table.primary_key), kind.keys[row], strict=True)) | {"n": 7}

    def core(self) -> Action:
        """The same of tables, their aliases, and those of which only the name is known."""
        rng, kind = self.rng, self.reader.kind()
        own = rng.choice(kind.tables)
        row, where = self.reader.row(), self.reader.row()
        named = and_(*(own.c[c.key] == v for c, v in zip(own.primary_key, kind.keys[where], strict=True)))
        changed = {rng.choice([c.key for c in own.c if isinstance(c.type, Integer)]): 8}
        light = table(own.name, *(column(c.name) for c in own.c), schema=own.schema)
        first = next(iter(own.primary_key))
        match rng.choice(["update", "delete", "many", "many gone", "alias", "light", "using", "cte", "link", "seen"]):
            case "update":
                statement: Any = update(own).where(named).values(changed)
            case "delete":
                statement = delete(own).where(named)
            case "many":
                is_one = and_(*(c == bindparam(f"k_{c.key}") for c in own.primary_key))
                parameters = [
                    {f"k_{c.key}": v for c, v in zip(own.primary_key, kind.keys[n], strict=True)} for n in (1, row)
                ]
                return lambda s: s.connection().execute(
                    update(own).where(is_one).values({name: bindparam("new") for name in changed}),
                    [each | {"new": 8} for each in parameters],
                )
            case "many gone":
                is_one = and_(*(c == bindparam(f"k_{c.key}") for c in own.primary_key))
                parameters = [
                    {f"k_{c.key}": v for c, v in zip(own.primary_key, kind.keys[n], strict=True)} for n in (1, row)
                ]
                return lambda s: s.connection().execute(delete(own).where(is_one), parameters)
            case "alias":
                other = own.alias()
                same = and_(*(other.c[c.key] == v for c, v in zip(own.primary_key, kind.keys[where], strict=True)))
                statement = rng.choice([delete(other).where(same), update(other).where(same).values(changed)])
            case "light":
                here = light.c[first.name] == kind.keys[where][0]
                statement = rng.choice(
                    [delete(light).where(here), update(light).where(here).values({own.c[next(iter(changed))].name: 8})]
                )
            case "using":
                other = self.reader.kind().tables[0].alias()
                statement = rng.choice([delete(own), update(own).values(changed)]).where(other.c.n == 1, named)
            case "cte" if self.world.postgres:
                gone = rng.choice([delete(own).where(named), update(own).where(named).values(changed)])
                few = gone.returning(first.label("x")).cte()
                statement = select(func.count()).select_from(few)
                if rng.random() < 0.5:
                    target = self.reader.kind().tables[0]
                    statement = update(target).values(n=select(func.count()).select_from(few).scalar_subquery())
            case "link" if self.world.links:
                statement = delete(self.world.links[0])
            case _:
                other = self.reader.kind().tables[0]
                statement = update(own).where(first.in_(select(first).where(named))).values(changed)
        return lambda s: s.connection().execute(statement)

    def inserting(self) -> Action:
        """An INSERT, or one that becomes an UPDATE."""
        rng, kind = self.rng, self.reader.kind()
        own, row = kind.tables[0], self.reader.row()
        values = self.new(kind, row) | {"kind": own.name}
        values = {name: value for name, value in values.items() if name in own.c}
        make = postgresql.insert if self.world.postgres else sqlite.insert
        key = list(own.primary_key)
        match rng.choice(
            ["insert", "do nothing", "do update", "new key", "replace", "select", "returning", "many", "entity"]
        ):
            case "insert":
                statement: Any = insert(own).values(values)
            case "do nothing":
                statement = make(own).values(values).on_conflict_do_nothing()
            case "do update":
                statement = make(own).values(values).on_conflict_do_update(index_elements=key, set_={"n": 9})
            case "new key":
                changed = rng.choice([{own.c.unique: 20}, dict(zip(key, kind.keys[4], strict=True))])
                statement = make(own).values(values).on_conflict_do_update(index_elements=key, set_=changed)
            case "replace" if not self.world.postgres:
                statement = insert(own).prefix_with("OR REPLACE").values(values)
            case "select":
                names = [c for c in own.c if c.key in values]
                statement = insert(own).from_select(names, select(*(literal(values[c.key], c.type) for c in names)))
            case "many":
                all_ = [values, values | {c.key: v for c, v in zip(key, kind.keys[4], strict=True)} | {"unique": 30}]
                return lambda s: s.connection().execute(insert(own), all_)
            case "entity":
                return lambda s: s.execute(insert(kind.entity).returning(kind.entity), [self.new(kind, 4)])
            case _:
                statement = insert(own).values(values).returning(*key)
        return lambda s: s.connection().execute(statement)

    def textual(self) -> Action:
        """SQL as it is written by hand."""
        rng, own = self.rng, self.reader.kind().tables[0]
        name = own.fullname
        sql = [f"UPDATE {name} SET n = 11", f"DELETE FROM {name}", f"WITH x AS (SELECT 1) UPDATE {name} SET n = 12"]
        if self.world.postgres:
            sql += [
                f"TRUNCATE {name} CASCADE",
                f"EXPLAIN ANALYZE UPDATE {name} SET n = 13",
                f"SELECT 1; DELETE FROM {name}",
            ]
            sql += [f"MERGE INTO {name} a USING {name} b ON a.n = b.n WHEN MATCHED THEN DELETE"]
        chosen = rng.choice(sql)
        if rng.random() < 0.3 and self.world.postgres:
            few = text(f"UPDATE {name} SET n = 14 RETURNING n").columns(n=Integer).cte()
            return lambda s: s.execute(select(func.count()).select_from(few))
        if rng.random() < 0.5:
            return lambda s: s.connection().exec_driver_sql(chosen)
        return lambda s: s.execute(text(chosen))


def _set(entity: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(entity, name, value)


def _nested(session: Session, first: Action, second: Action, *, released: bool) -> None:
    savepoint = session.begin_nested()
    first(session)
    session.flush()
    savepoint.commit() if released else savepoint.rollback()
    second(session)


# The question


class Recorder:
    """Collects what commits have written."""

    def __init__(self) -> None:
        self.written: set[str] = set()

    async def before(self, writes: frozenset[str], sql: str) -> None:
        self.written |= writes

    async def after(self, token: Any, outcome: Outcome) -> None:
        pass


#: What may come of what makes no sense here: a row that is missing, a key twice, an UPDATE of several tables.
ERRORS = (
    SQLAlchemyError,
    LookupError,
    AttributeError,
    AssertionError,
    TypeError,
    NotImplementedError,
    RecursionError,
    Warning,
)


@contextmanager
def _soon() -> Iterator[None]:
    """Raise what does not end: what loads itself eagerly along many ways takes SQLAlchemy hours."""

    def stop(_number: int, _frame: Any) -> None:
        # Where the database is waited for, it is the event loop that would be broken off.
        if in_greenlet():
            raise RecursionError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Judge:
    """Sets readings against writes, in one schema after the other.

    counts: how many there were of what; `changed` are answers, `kept` those that would still be served.
    """

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self.counts: Counter[str] = Counter()
        self._runner = runner
        self._is_postgres = "postgresql" in url
        self._database = outside(url)
        self._recorder = Recorder()
        self._sent: list[str] = []
        self._engine = create_engine(url)
        observe(self._engine.sync_engine, "main", self._recorder)
        event.listen(self._engine.sync_engine, "before_cursor_execute", self._note)

    def _note(self, _connection: Any, _cursor: Any, sql: str, parameters: Any, _context: Any, _many: bool) -> None:
        self._sent.append(f"{sql} {parameters}")

    def __call__(self, rng: Random, *, readings: int, writings: int) -> None:
        """Make up a schema and so many of each; raise `AssertionError` where a write has not named what it changed."""
        world = made_up(rng, postgres=self._is_postgres)

        async def ask() -> None:
            async with self._engine.connect() as connection:
                await connection.run_sync(self._ask, world, rng, readings, writings)

        try:
            fill(world, self._database, rng)
            with forgotten(rng, world):
                self._runner.run(ask())
        finally:
            world.metadata.drop_all(self._database)

    def _ask(self, connection: Connection, world: World, rng: Random, readings: int, writings: int) -> None:
        reader, writer = Reader(rng, world), Writer(rng, world)
        known = [each for _ in range(readings) if (each := self._read(connection, reader)) is not None]
        for _ in range(writings):
            with connection.begin() as transaction:
                self._write(connection, writer, known)
                transaction.rollback()

    def _read(self, connection: Connection, reader: Reader) -> tuple[Action, Any, set[str], str] | None:
        self._sent.clear()
        try:
            reading = reader.reading()
            with _soon(), collecting() as collected, Session(connection) as session:
                answer = shown(reading(session))
        except ERRORS:
            self.counts["senseless"] += 1
            return None
        finally:
            connection.rollback()
        self.counts["unknown" if collected.unknown else "reading"] += 1
        return None if collected.unknown else (reading, answer, collected.tags, "\n".join(self._sent))

    def _write(self, connection: Connection, writer: Writer, known: list[tuple[Action, Any, set[str], str]]) -> None:
        self._recorder.written.clear()
        self._sent.clear()
        try:
            writing = writer.writing()
            with _soon(), Session(connection, join_transaction_mode="create_savepoint") as session:
                writing(session)
                session.commit()
        except ERRORS:
            self.counts["senseless"] += 1
            return
        self.counts["writing"] += 1
        written, sent = set(self._recorder.written), "\n".join(self._sent)
        for reading, before, tags, read in known:
            with _soon(), Session(connection, join_transaction_mode="create_savepoint") as session:
                try:
                    now = shown(reading(session))
                except RecursionError:  # after this write it does not end
                    continue
                except ERRORS as error:
                    now = repr(error)
            self.counts["changed"] += now != before
            self.counts["kept"] += not tags & written
            told = f"{read}\n{before}\nwas changed by\n{sent}\nto {now}: {sorted(tags)}, {sorted(written)}"
            assert now == before or tags & written, told


@contextmanager
def judges(url: str) -> Iterator[Judge]:
    """A judge over a database."""
    with asyncio.Runner() as runner:
        judge = Judge(url, runner)
        try:
            yield judge
        finally:
            runner.run(judge._engine.dispose())
            judge._database.dispose()
