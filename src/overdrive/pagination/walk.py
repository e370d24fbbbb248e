"""Pages by cursor: the rows next to a position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    Select,
    and_,
    false,
    literal,
    or_,
    tuple_,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import (
    ColumnClause,
    ColumnElement,
    Over,
)
from sqlalchemy.sql.selectable import SelectBase

from overdrive.errors import PageError

from . import keyset
from .cursor import Position, decode, encode
from .order import Sort, default_nulls_first, is_distinct_on, order_text, sorts_of
from .page import CursorPage, CursorParams
from .select import Steps, items_of, pageable, unique, width_of

_KEY_LABEL = "overdrive_key_"


def cursor_page(
    stmt: Executable, params: CursorParams, *, dialect_name: str, binding: bytes, key: bytes
) -> Steps[CursorPage[Any]]:
    """Make the page next to a position, in one statement.

    stmt: a `select()` without LIMIT. Its ORDER BY, made unique by the primary keys of what it selects from,
        is the order of the walk.
    dialect_name: SQLAlchemy's name of the database's dialect.
    binding: the route and the filters the cursor is for; the order is added to it here.
    key: the secret that signs cursors.

    Raises `PageError` where the statement cannot be walked, `InvalidCursorError` where the cursor is not one
    that this route, order and filter have given out.
    """
    stmt = walkable(stmt)
    sorts = sorts_of(stmt, dialect_name)
    types = [sort.python_type for sort in sorts]
    binding = binding + b"\0" + order_text(sorts).encode()
    position = Position()
    if params.cursor is not None:
        position = decode(params.cursor, types, binding=binding, key=key)

    result = yield _walk(stmt, sorts, position, dialect_name).limit(params.size + 1)
    width = width_of(stmt)
    frozen = unique(result).freeze()
    values = [tuple(row)[-len(sorts) :] for row in frozen()]
    items = items_of(list(frozen().columns(*range(width))), width)

    # One more row than asked for says that there is something beyond.
    beyond = len(items) > params.size
    items, values = items[: params.size], values[: params.size]
    if position.backward:
        items.reverse()
        values.reverse()

    def cursor(backward: bool) -> str | None:
        if not (beyond if backward == position.backward else position.values):
            return None
        edge = values[0 if backward else -1] if values else ()
        return encode(edge, types if edge else (), backward=backward, binding=binding, key=key)

    return CursorPage.model_construct(
        items=items, next_cursor=cursor(False), prev_cursor=cursor(True), size=params.size
    )


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


# The statement of one page of a walk


def _walk(stmt: Select[Any], sorts: list[Sort], position: Position, dialect_name: str) -> Select[Any]:
    keys = [sort.key for sort in sorts]
    if position.backward:
        keys = keyset.reverse(keys)
    if position.values:
        criterion = _after(sorts, keys, position.values)
        # Groups are compared once they are made: an order by an aggregate, too.
        stmt = stmt.having(criterion) if stmt._group_by_clauses else stmt.where(criterion)
    columns = [sort.expression.label(f"{_KEY_LABEL}{number}") for number, sort in enumerate(sorts)]
    order = [_directed(column, key, dialect_name) for column, key in zip(columns, keys, strict=True)]
    return stmt.add_columns(*columns).order_by(None).order_by(*order)


def _directed(column: ColumnElement[Any], key: keyset.Key, dialect_name: str) -> ColumnElement[Any]:
    directed = column.desc() if key.descending else column.asc()
    # Said only where it is not so anyway: the way most indexes are declared.
    if key.nulls_first == default_nulls_first(key.descending, dialect_name):
        return directed
    return directed.nulls_first() if key.nulls_first else directed.nulls_last()


def _after(sorts: list[Sort], keys: list[keyset.Key], values: tuple[Any, ...]) -> ColumnElement[bool]:
    plan = keyset.after(keys, values)
    expressions = [sort.expression for sort in sorts]
    if plan.row_value is not None:
        # Each value with its key's type: asyncpg asks for one to prepare the statement.
        bound = [literal(value, column.type) for value, column in zip(values, expressions, strict=True)]
        return _COMPARE[plan.row_value](tuple_(*expressions), tuple_(*bound))
    return or_(
        false(),
        *(
            and_(*(_comparison(term, expressions[term.key], values[term.key]) for term in terms))
            for terms in plan.alternatives
        ),
    )


_COMPARE: dict[str, Callable[[Any, Any], ColumnElement[bool]]] = {
    "eq": operators.eq,
    "lt": operators.lt,
    "gt": operators.gt,
}


def _comparison(term: keyset.Term, expression: ColumnElement[Any], value: Any) -> ColumnElement[bool]:
    if term.operator == "is_null":
        return expression.is_(None)
    if term.operator == "is_not_null":
        return expression.is_not(None)
    return _COMPARE[term.operator](expression, literal(value, expression.type))
