"""Pages by cursor: the rows next to a position."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

from pydantic import BaseModel
from sqlalchemy import BindParameter, Integer, Select, bindparam, inspect, tuple_
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import (
    ColumnClause,
    ColumnElement,
    Over,
)
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.sql.visitors import iterate

from overdrive.errors import PageError

from . import keyset
from .cursor import Position, decode, encode
from .order import Sort, default_nulls_first, is_distinct_on, order_text, sorts_of
from .page import CursorParams, Found
from .projection import Projection, never, projected, row_maker
from .recipe import Query, Recipes
from .select import Steps, items_of, once, pageable, unique, width_of

_KEY_LABEL = "overdrive_key_"
_AT = "overdrive_at_"
_LIMIT = "overdrive_limit"


def cursor_page(
    stmt: Executable,
    params: CursorParams,
    *,
    recipes: Recipes,
    dialect_name: str,
    binding: bytes,
    keys: Sequence[bytes],
    model: type[BaseModel] | None = None,
    adds_nothing: Callable[[type], bool] = never,
) -> Steps[Found]:
    """Make the page next to a position, with as many statements as it takes to fill it.

    stmt: a `select()` without LIMIT. Its ORDER BY, made unique by the primary keys of what it selects from,
        is the order of the walk. A select of one entity has each row of it once, whatever it is joined to.
    recipes: remembers what is made of statements of the same shape.
    dialect_name: SQLAlchemy's name of the database's dialect.
    binding: the route and the filters the cursor is for; the order is added to it here.
    keys: the secrets of cursors: the first signs, each is accepted.
    model: what nothing but reads the items, if it is known: where it needs but columns of an entity, the items may be
        rows of these columns.
    adds_nothing: says whether reading rows of a class through the session is no more than sending the statement.

    Raises `PageError` where the statement cannot be walked, `InvalidCursorError` where the cursor is not one
    that this route, order and filter have given out.
    """
    walk, given = recipes.made(
        stmt, ("walk", dialect_name, model), partial(Walk.of, dialect_name=dialect_name, model=model)
    )
    types, binding = walk.types, binding + walk.bound(given)
    match params.cursor:
        case None:
            position = Position()
        # No signed cursor is as short.
        case "last":
            position = Position(backward=True)
        case cursor:
            position = decode(cursor, types, binding=binding, keys=keys)

    is_projected = walk.projection is not None and adds_nothing(walk.projection.class_)
    items, values = yield from walk.read(position, given, params.size + 1, is_projected)

    # One more row than asked for says that there is something beyond.
    beyond = len(items) > params.size
    items, values = items[: params.size], values[: params.size]
    if position.backward:
        items.reverse()
        values.reverse()

    def towards(backward: bool) -> str | None:
        if not (beyond if backward == position.backward else position.values):
            return None
        edge = walk.keys_in(values[0 if backward else -1], is_projected) if values else ()
        return encode(edge, types if edge else (), backward=backward, binding=binding, key=keys[0])

    following = towards(False)
    return Found(
        items,
        params,
        following is not None,
        next_cursor=following,
        prev_cursor=towards(True),
        columns=walk.projection.names if is_projected and walk.projection is not None else (),
    )


@dataclass(frozen=True, slots=True)
class Walk:
    """What is made once of all statements of one shape."""

    stmt: Select[Any]
    dialect_name: str
    sorts: list[Sort]
    types: list[type]
    #: A digest of the order but the values of its parameters, and their names.
    order: bytes
    order_names: list[str]
    width: int
    projection: Projection | None
    #: Makes rows of the columns of the projection, and those of the keys that are not among them.
    row: Callable[[Iterable[Any]], Any]
    #: Where the keys are in such a row.
    places: list[int]
    _templates: dict[Hashable, list[Select[Any]]]

    @classmethod
    def of(cls, stmt: Executable, dialect_name: str, model: type[BaseModel] | None) -> Walk:
        """Take a statement apart; raises `PageError` where it cannot be walked."""
        stmt = walkable(once(stmt))
        sorts = sorts_of(stmt, dialect_name)
        order = blake2b(order_text(sorts).encode(), digest_size=16).digest()
        parts = [part for sort in sorts for part in iterate(sort.expression)]
        order_names = [part.key for part in parts if isinstance(part, BindParameter)]
        projection = projected(stmt, model) if model is not None else None
        types = [sort.python_type for sort in sorts]
        names, places = _row_of(projection, sorts) if projection is not None else ([], [])
        width, row = width_of(stmt), row_maker(names)
        return cls(stmt, dialect_name, sorts, types, order, order_names, width, projection, row, places, {})

    def bound(self, given: Mapping[str, Any]) -> bytes:
        """Return what binds a cursor to this order, where its parameters have the given values."""
        return self.order + repr([given.get(name) for name in self.order_names]).encode()

    def read(
        self, position: Position, given: Mapping[str, Any], limit: int, is_projected: bool, *, inclusive: bool = False
    ) -> Steps[tuple[list[Any], list[tuple[Any, ...]]]]:
        """Read so many rows from a position: what a page holds of them, and the rows with their keys.

        inclusive: whether the row at the position is the first of them.
        """
        given = {**given, **named(position)}
        items: list[Any] = []
        values: list[tuple[Any, ...]] = []
        for template in self.templates(position, is_projected, inclusive):
            result = yield Query(template, given | {_LIMIT: limit - len(items)}, is_projected)
            if is_projected:
                rows = list(map(self.row, result))
                values += rows
                items += rows
            else:
                frozen = unique(result).freeze()
                values += frozen()
                items += items_of(list(frozen().columns(*range(self.width))), self.width)
            if len(items) >= limit:
                break
        return items, values

    def keys_in(self, row: Sequence[Any], is_projected: bool) -> tuple[Any, ...]:
        """Return the order keys of a row that `read` gave."""
        return tuple(row[place] for place in (self.places if is_projected else range(-len(self.types), 0)))

    def templates(self, position: Position, is_projected: bool, inclusive: bool) -> list[Select[Any]]:
        """Return the statements of the walk from a position, with names where its values and the limit go."""
        shape = (is_projected, inclusive, position.backward, *(value is None for value in position.values))
        templates = self._templates.get(shape)
        if templates is None:
            stmt, held = self.stmt, list[int]()
            if is_projected and self.projection is not None:
                columns = self.projection.columns.values()
                stmt = stmt.with_only_columns(*columns)
                held = [number for number, place in enumerate(self.places) if place < len(columns)]
            limit = bindparam(_LIMIT, type_=Integer())
            each = statements(stmt, self.sorts, position, self.dialect_name, held, inclusive=inclusive)
            templates = self._templates[shape] = [statement.limit(limit) for statement in each]
        return templates


def named(position: Position) -> dict[str, Any]:
    """Return a position's values by the names they have in the statements of a walk."""
    return {f"{_AT}{number}": value for number, value in enumerate(position.values)}


def walkable(stmt: Executable) -> Select[Any]:
    """Return the statement; raises `PageError` for one whose rows cannot be found again by their order keys."""
    stmt = pageable(stmt)
    if not isinstance(stmt, Select):
        raise PageError(
            "A union cannot be walked by cursor: make it a subquery, select(stmt.subquery()), and order by its columns."
        )
    if is_distinct_on(stmt):
        raise PageError(
            "DISTINCT ON cannot be walked by cursor: find the rows in a subquery, "
            "select(Entity).where(Entity.id.in_(select(stmt.subquery().c.id)))."
        )
    if any(map(_has_window, [*stmt.selected_columns, *stmt._order_by_clauses])):
        raise PageError(
            "A window function would see only the rows after the cursor: make the statement a subquery, "
            "select(stmt.subquery()), and order by its columns."
        )
    return stmt


def _has_window(element: Any) -> bool:
    if isinstance(element, Over):
        return True
    # What a subquery computes does not depend on this statement's WHERE; a column's children are its table.
    return not isinstance(element, (SelectBase, ColumnClause)) and any(map(_has_window, element.get_children()))


def _row_of(projection: Projection, sorts: list[Sort]) -> tuple[list[str], list[int]]:
    """Name the columns of a projected row, which has each order key once; say where in it the keys are."""
    held = [inspect(column).expression for column in projection.columns.values()]
    names, places = [*projection.columns], []
    for number, sort in enumerate(sorts):
        place = next((place for place, column in enumerate(held) if column.compare(sort.selected)), len(names))
        if place == len(names):
            names.append(f"{_KEY_LABEL}{number}")
        places.append(place)
    return names, places


# The statements of a walk


def statements(
    stmt: Select[Any],
    sorts: list[Sort],
    position: Position,
    dialect_name: str,
    held: Sequence[int] = (),
    *,
    inclusive: bool = False,
) -> Iterator[Select[Any]]:
    """Yield the statements whose rows, one statement after the other, are those of the walk from `position` on.

    Each is `stmt` in the walk's direction, with its order keys as the last columns, but those that it has anyway
    (`held`, by their numbers), and within what an index in this order holds in one piece: sent one by one, each keeps
    whatever a team hangs on `stmt` or on its session.
    """
    keys = [sort.key for sort in sorts]
    if position.backward:
        keys = keyset.reverse(keys)
    columns = {
        number: sort.selected.label(f"{_KEY_LABEL}{number}") for number, sort in enumerate(sorts) if number not in held
    }
    # By its label where that is the same, or DISTINCT and GROUP BY would not know an expression with parameters.
    ordered = [
        columns[number] if number in columns and sort.selected is sort.expression else sort.expression
        for number, sort in enumerate(sorts)
    ]
    order = [_directed(column, key, dialect_name) for column, key in zip(ordered, keys, strict=True)]
    walked = stmt.add_columns(*columns.values()).order_by(None).order_by(*order)
    if not position.values:
        yield walked
        return
    expressions = [sort.expression for sort in sorts]
    # SQLite leaves a rowid, which most primary keys are, out of the range: it would read all ties before it.
    row_values = dialect_name != "sqlite"
    for range_ in keyset.after(keys, position.values, row_values=row_values, inclusive=inclusive):
        criteria = _within(range_, expressions, position.values)
        # Groups are compared once they are made: an order by an aggregate, too.
        yield walked.having(*criteria) if stmt._group_by_clauses else walked.where(*criteria)


def _directed(column: ColumnElement[Any], key: keyset.Key, dialect_name: str) -> ColumnElement[Any]:
    directed = column.desc() if key.descending else column.asc()
    # Said only where it is not so anyway: the way most indexes are declared.
    if key.nulls_first == default_nulls_first(key.descending, dialect_name):
        return directed
    return directed.nulls_first() if key.nulls_first else directed.nulls_last()


_COMPARISONS = {"lt": operators.lt, "le": operators.le, "gt": operators.gt, "ge": operators.ge}


def _within(
    range_: keyset.Range, expressions: Sequence[ColumnElement[Any]], values: Sequence[Any]
) -> list[ColumnElement[bool]]:
    # Each value with its key's type: asyncpg asks for one to prepare the statement.
    bound = [
        bindparam(f"{_AT}{number}", value, type_=expression.type)
        for number, (value, expression) in enumerate(zip(values, expressions, strict=True))
    ]
    equal = [
        expressions[number].is_(None) if values[number] is None else expressions[number] == bound[number]
        for number in range(range_.start)
    ]
    beyond = expressions[range_.start : range_.end]
    match range_.operator:
        case "is_null":
            return [*equal, beyond[0].is_(None)]
        case "is_not_null":
            return [*equal, beyond[0].is_not(None)]
        case operator:
            compare = _COMPARISONS[operator]
            if len(beyond) == 1:
                return [*equal, compare(beyond[0], bound[range_.start])]
            return [*equal, compare(tuple_(*beyond), tuple_(*bound[range_.start : range_.end]))]
