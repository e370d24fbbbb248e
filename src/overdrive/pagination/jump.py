"""A page by number, found by the order keys of a row near it whose number is known."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import msgspec
from pydantic import BaseModel
from sqlalchemy import Integer, Select, bindparam, func, select
from sqlalchemy.sql.base import Executable

from overdrive.errors import PageError

from . import boundary
from .cursor import Position, from_wire, to_wire
from .keeper import Keeper
from .order import Sort, sorts_of
from .recipe import Query, Recipes
from .select import Steps, bare, once
from .walk import Walk, named, statements, walkable

_OFFSET = "overdrive_offset"

#: Bytes; what is kept of one row.
_LONGEST = 256

Keys = tuple[Any, ...]


class Jumped(NamedTuple):
    """Rows from a number on, and the names of their columns where they are no entities."""

    items: list[Any]
    columns: tuple[str, ...]


def jump(
    stmt: Executable,
    offset: int,
    limit: int,
    *,
    recipes: Recipes,
    keeper: Keeper,
    dialect_name: str,
    model: type[BaseModel] | None,
    adds_nothing: Callable[[type], bool],
) -> Steps[Jumped | None]:
    """Read so many rows after the first `offset`; for the other parameters see `number.page`.

    None where their order is not by keys that tell all of them apart, or nothing can be kept of them.
    """
    plain = bare(stmt)
    if plain is None:
        return None
    order, given = recipes.made(plain, ("jump", dialect_name), partial(Order.of, dialect_name=dialect_name))
    name = None if order is None else keeper.name_of(Query(order.templates(Position())[0].one, given))
    if order is None or name is None:
        return None
    kept = yield partial(keeper.look, name)
    if kept is None:
        return None
    known = order.read(kept.body)
    keys = yield from order.seek(known, offset, given)
    if keys is None:
        return Jumped([], ())
    if abs(boundary.nearest(known, offset) - offset) > boundary.NEAR:
        body = order.write(boundary.noted(known, offset, keys))
        if body is not None:
            yield partial(keeper.keep, name, body, kept)

    walk, given = recipes.made(
        stmt, ("walk", dialect_name, model), partial(Walk.of, dialect_name=dialect_name, model=model)
    )
    projection = walk.projection
    is_projected = projection is not None and adds_nothing(projection.class_)
    items, _ = yield from walk.read(Position(keys), given, limit, is_projected, inclusive=True)
    return Jumped(items, projection.names if is_projected and projection is not None else ())


class Piece(NamedTuple):
    """One range of the rows beyond a position: statements of the keys of one of them, and of how many there are."""

    one: Select[Any]
    all: Select[Any]


@dataclass(frozen=True, slots=True)
class Order:
    """What is made once of all statements of one shape: how the keys of a row are found by its number."""

    stmt: Select[Any]
    sorts: list[Sort]
    dialect_name: str
    _templates: dict[Hashable, list[Piece]]

    @classmethod
    def of(cls, stmt: Executable, dialect_name: str) -> Order | None:
        """Take a statement apart; None where its rows are not found by keys."""
        try:
            walked = walkable(once(stmt))
            # Groups, and rows that are told apart by all that is selected, are not there without it.
            if walked._distinct or walked._group_by_clauses or walked._having_criteria:
                return None
            return cls(walked, sorts_of(walked, dialect_name), dialect_name, {})
        except PageError:
            return None

    def seek(self, known: Mapping[int, Keys], number: int, given: Mapping[str, Any]) -> Steps[Keys | None]:
        """Find the keys of a row by its number, from 0, beginning at one that is known; None beyond the end."""
        if number in known:
            return known[number]
        start = boundary.nearest(known, number)
        position = Position(known[start] if start else (), backward=start > number)
        # A row that is walked back from is none of those before it.
        skip = start - number - 1 if position.backward else number - start
        given = {**given, **named(position)}
        for piece in self.templates(position):
            row = (yield Query(piece.one, {**given, _OFFSET: skip})).first()
            if row is not None:
                return tuple(row)
            if skip:
                skip -= (yield Query(piece.all, given)).scalar_one()
        return None

    def templates(self, position: Position) -> list[Piece]:
        """Return the ranges beyond a position, the nearest first, with names where its values go."""
        shape = (position.backward, *(value is None for value in position.values))
        templates = self._templates.get(shape)
        if templates is None:
            stmt = self.stmt.with_only_columns(maintain_column_froms=True)
            offset = bindparam(_OFFSET, type_=Integer())
            each = statements(stmt, self.sorts, position, self.dialect_name, inclusive=not position.backward)
            templates = self._templates[shape] = [
                Piece(keys.limit(1).offset(offset), select(func.count()).select_from(keys.order_by(None).subquery()))
                for keys in each
            ]
        return templates

    def read(self, body: bytes | None) -> dict[int, Keys]:
        """Return what `write` was given."""
        if body is None:
            return {}
        types = [sort.python_type for sort in self.sorts]
        rows = msgspec.msgpack.decode(body, type=dict[int, list[Any]])
        return {number: tuple(map(from_wire, row, types)) for number, row in rows.items()}

    def write(self, known: Mapping[int, Keys]) -> bytes | None:
        """Return rows as they are kept; None where the keys of one are too long, or of another type than they say."""
        types = [sort.python_type for sort in self.sorts]
        try:
            rows = {number: [*map(to_wire, keys, types)] for number, keys in known.items()}
        except PageError:
            return None
        body = msgspec.msgpack.encode(rows)
        return body if len(body) <= _LONGEST * len(rows) else None
