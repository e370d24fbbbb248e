"""Pages of SQLAlchemy statements by number, and what a page of any style makes of a statement.

A page is a generator that yields the statements it needs and is sent their results, so that `run` and
`run_async` share every line of it, and the caller decides how a statement reaches the database.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Generator, Iterator
from itertools import takewhile
from typing import Any, TypeVar

from sqlalchemy import (
    BindParameter,
    CompoundSelect,
    FromClause,
    Join,
    Result,
    Select,
    TextClause,
    TextualSelect,
    UnaryExpression,
    func,
    inspect,
    literal_column,
    select,
    tuple_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm.util import LoaderCriteriaOption
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import (
    ColumnClause,
    ColumnElement,
    _textual_label_reference,
)
from sqlalchemy.sql.visitors import iterate

from overdrive.errors import PageError

from .order import flat, froms_of, identity_of, is_distinct_on
from .page import Found, LimitOffsetParams, PageParams, Total
from .recipe import Query

P = TypeVar("P")

Steps = Generator[Query, Result[Any], P]
Statement = Select[Any] | CompoundSelect[Any]

#: Rows beyond which the keys of a page are found first, and the rest of its rows after.
DEEP = 1_000

#: What a capped total counts to.
CAP = 10_000


def run(steps: Steps[P], send: Callable[[Query], Result[Any]]) -> P:
    """Make the page, with `send` sending each of its statements."""
    try:
        query = next(steps)
        while True:
            query = steps.send(send(query))
    except StopIteration as stop:
        made: P = stop.value
        return made


async def run_async(steps: Steps[P], send: Callable[[Query], Awaitable[Result[Any]]]) -> P:
    """Make the page, with `send` sending each of its statements."""
    try:
        query = next(steps)
        while True:
            query = steps.send(await send(query))
    except StopIteration as stop:
        made: P = stop.value
        return made


def page(
    stmt: Executable,
    params: PageParams | LimitOffsetParams,
    *,
    total: Total = "exact",
    count_query: Executable | None = None,
    dialect_name: str = "",
) -> Steps[Found]:
    """Make one page by its number: its rows, then, where they do not tell it, the total.

    stmt: a `select()` or a union of them, without LIMIT, or `text().columns()`. Rows with equal order keys are
        in the order of their primary keys, where they have them.
    total: which kind of total is wanted; see `total_of`.
    count_query: gives the exact total, instead of counting the rows of `stmt`.
    dialect_name: SQLAlchemy's name of the database's dialect.

    Raises `PageError` where the statement cannot be paginated.
    """
    stmt = _statement(stmt)
    roots = _roots(stmt)
    number: int | None = None
    kind = total
    counted = total == "exact" and params.offset > DEEP
    if counted:
        # To find out that a page lies beyond the end, counting is enough.
        number, kind = yield from total_of(roots, total, count_query=count_query)

    # One row more says whether there are more, where no total will.
    limit = params.size if total == "exact" else params.size + 1
    items: list[Any] = []
    if number is None or params.offset < number:
        result = yield Query(_rows(stmt, roots, limit, params.offset))
        items = items_of(list((unique(result) if stmt is roots else result.unique()).all()), width_of(stmt))
    seen = params.offset + len(items)
    if not counted and total != "none":
        if len(items) < limit and (items or not params.offset):
            number, kind = seen, "exact"
        else:
            number, kind = yield from total_of(roots, total, count_query=count_query, dialect_name=dialect_name)
    if kind == "estimated" and number is not None:
        number = max(number, seen)
    has_more = seen < (number or 0) if total == "exact" else len(items) > params.size
    return Found(items[: params.size], params, has_more, number, kind)


# What can be a page


def pageable(stmt: Executable) -> Statement:
    """Return the statement; raises `PageError` for one whose rows cannot be limited to those of a page."""
    stmt = _statement(stmt)
    if any(load.path[-2].uselist for load in _joined_loads(stmt)):
        raise PageError(
            "contains_eager() of a collection makes a cursor page of joined rows, not of entities: "
            "load the collection with selectinload(), or use Page."
        )
    return stmt


def _statement(stmt: Executable) -> Statement:
    if isinstance(stmt, TextualSelect):
        stmt = select(stmt.subquery())
    if not isinstance(stmt, (Select, CompoundSelect)):
        raise PageError(
            f"A {type(stmt).__name__} cannot be paginated: pass a select(); say what raw SQL selects, as in "
            "text(...).columns(User.id, User.name), and for entities of it select from an alias, "
            "aliased(User, text(...).columns(...).subquery())."
        )
    if stmt._has_row_limiting_clause:
        raise PageError("The statement has its own LIMIT, OFFSET or FETCH: remove it, the page sets them.")
    return stmt


def _joined_loads(stmt: Statement) -> Iterator[Any]:
    """Yield what `contains_eager()` fills from joined rows, which LIMIT would count."""
    for option in stmt._with_options:
        yield from (load for load in getattr(option, "context", ()) if "eager_from_alias" in load.local_opts)


# Each entity once


def once(stmt: Executable) -> Statement:
    """Return the statement so that a select of one entity has each row of it once, whatever it is joined to.

    Raises `PageError` where that cannot be, as for an order by what the joins repeat the entity for.
    """
    stmt = pageable(stmt)
    roots = _roots(stmt)
    if roots is not stmt and any(_joined_loads(stmt)):
        raise PageError(
            "contains_eager() needs the joined rows, in which the entity is repeated: load with selectinload() or "
            "joinedload(), or use Page."
        )
    return roots


def _roots(stmt: Statement) -> Statement:
    entity = entity_of(stmt)
    if entity is None or not isinstance(stmt, Select) or not _repeats(stmt, entity):
        return stmt
    own, joined = _own(entity), _tables(froms_of(stmt))
    joined = joined - _tables([own])
    order = list(takewhile(lambda clause: not _reaches(clause, own, joined), stmt._order_by_clauses))
    # What contains_eager() fills may be ordered by more: within each entity.
    if len(order) < len(stmt._order_by_clauses) and not (order and any(_joined_loads(stmt))):
        raise PageError(
            f"The joins repeat {own} for each row that they find, and it is ordered by one of these, "
            f"{stmt._order_by_clauses[len(order)]}: order by {own}'s own columns, by a scalar subquery such as "
            "select(func.max(...)).where(...).scalar_subquery() over an alias, or select the joined entity too."
        )
    keys = stmt.with_only_columns(*_keys(entity)).order_by(None)
    keys._for_update_arg = None
    return _selected(stmt, entity, keys, order)


def entity_of(stmt: Statement) -> Any:
    """Return the mapped class, or the alias of one, that is all the statement selects; None where it is not."""
    if not isinstance(stmt, Select) or stmt._distinct or stmt._group_by_clauses or is_distinct_on(stmt):
        return None
    described = stmt.column_descriptions
    entity = described[0].get("entity") if len(described) == 1 else None
    return entity if entity is not None and described[0]["expr"] is entity else None


def _own(entity: Any) -> FromClause:
    own: FromClause = inspect(entity).selectable
    return own


def _keys(entity: Any) -> list[Any]:
    mapper = inspect(entity).mapper
    return [getattr(entity, mapper.get_property_by_column(column).key) for column in mapper.primary_key]


def _is_alone(stmt: Select[Any], own: FromClause) -> bool:
    """Say whether the statement clearly selects from nothing else; other than `froms_of`, this takes no time."""
    froms = {source for clause in stmt._where_criteria for source in clause._from_objects}
    return not (stmt._from_obj or stmt._setup_joins or stmt._memoized_select_entities) and froms <= {own}


def _repeats(stmt: Select[Any], entity: Any) -> bool:
    own = _own(entity)
    if _is_alone(stmt, own):
        return False
    identity = identity_of(stmt)
    return identity is None or not set(identity) <= set(identity_of(own) or ())


def _tables(sources: list[FromClause]) -> set[FromClause]:
    found: set[FromClause] = set()
    for source in sources:
        found |= _tables([source.left, source.right]) if isinstance(source, Join) else {source}
    return found


def _reaches(clause: Any, own: FromClause, joined: set[FromClause]) -> bool:
    """Say whether an ORDER BY clause depends on a joined table, also through a subquery about its row."""
    for part in iterate(clause):
        if isinstance(part, TextClause) or (isinstance(part, _textual_label_reference) and part.element not in own.c):
            return True
        if isinstance(part, ColumnClause) and part.table in joined:
            return True
    return False


def _selected(stmt: Select[Any], entity: Any, keys: Select[Any], order: Any) -> Select[Any]:
    """Select the entities that have these keys as `stmt` does, and from nothing else."""
    chosen = select(entity).where(_among(entity, keys)).order_by(*order).options(*stmt._with_options)
    chosen._for_update_arg = stmt._for_update_arg
    return chosen.execution_options(**stmt.get_execution_options())


def _among(entity: Any, keys: Select[Any]) -> ColumnElement[bool]:
    columns = _keys(entity)
    return (tuple_(*columns) if len(columns) > 1 else columns[0]).in_(keys.correlate(None))


# Reading


def _rows(stmt: Statement, roots: Statement, limit: int, offset: int) -> Statement:
    ordered = _ordered(roots)
    entity = entity_of(stmt)
    fills = stmt is not roots and any(_joined_loads(stmt))
    if entity is None or not (fills or _is_deferred(ordered, entity, offset)):
        return ordered.limit(limit).offset(offset)
    assert isinstance(stmt, Select)
    assert isinstance(ordered, Select)
    keys = ordered.with_only_columns(*_keys(entity)).limit(limit).offset(offset)
    if fills:
        order = (*ordered._order_by_clauses, *stmt._order_by_clauses)
        return stmt.where(_among(entity, keys)).order_by(None).order_by(*order)
    return _selected(stmt, entity, keys, ordered._order_by_clauses)


def _is_deferred(stmt: Statement, entity: Any, offset: int) -> bool:
    """Say whether to skip rows by their keys alone: an index may have them, and the same rows follow."""
    return offset > DEEP and isinstance(stmt, Select) and stmt._for_update_arg is None and _is_alone(stmt, _own(entity))


def _ordered(stmt: Statement) -> Statement:
    # Without a plain column it may be one row of aggregates, which nothing can be ordered by.
    if not isinstance(stmt, Select) or not any(isinstance(column, ColumnClause) for column in stmt.selected_columns):
        return stmt
    given: set[Any] = set()
    descending = False
    for clause in flat(stmt._order_by_clauses):
        descending = False
        while isinstance(clause, UnaryExpression):
            descending = descending or clause.modifier is operators.desc_op
            clause = clause.element
        given.add(clause)
    rest = [column for column in _identity(stmt) if column not in given]
    # In the last key's direction, so that an index of one direction serves the whole order.
    return stmt.order_by(*(column.desc() if descending else column for column in rest))


def _identity(stmt: Select[Any]) -> list[ColumnElement[Any]]:
    entity = entity_of(stmt)
    alone = entity is not None and _is_alone(stmt, _own(entity))
    try:
        identity = identity_of(_own(entity) if alone else stmt) or []
    except PageError:
        # Grouped by text: nobody can tell.
        return []
    return [column for column in identity if not isinstance(column, BindParameter)]


def width_of(stmt: Statement) -> int:
    """Return how many values a row of the statement's result has."""
    return len(stmt.column_descriptions if isinstance(stmt, Select) else stmt.selected_columns)


def unique(result: Result[Any]) -> Result[Any]:
    """Return the result with each entity once, where joined collections have repeated it."""
    # Set where joined collections were loaded, to insist on unique(). Elsewhere, equal rows are rows.
    return result.unique() if result._unique_filter_state is not None else result


def items_of(rows: list[Any], width: int) -> list[Any]:
    """Return what a page holds of rows: the one value each has, or the rows."""
    return [row[0] for row in rows] if width == 1 else rows


# Counting


def total_of(
    stmt: Statement, total: Total, *, count_query: Executable | None = None, dialect_name: str = ""
) -> Steps[tuple[int | None, Total]]:
    """Find the total of a statement's rows, and say which kind it is.

    total: "exact" counts them all; "capped" counts to 10,000, and is exact below; "estimated" asks PostgreSQL's
        planner, and is capped where there is none; "none" asks nothing.
    count_query: gives the exact total, instead of counting.

    Raises `PageError` where `count_query` does not give one integer.
    """
    if total == "none":
        return None, "none"
    if total == "exact":
        number = (yield Query(_count(stmt) if count_query is None else count_query)).scalar_one_or_none()
        if not isinstance(number, int):
            raise PageError(f"count_query gives {number!r}: select one integer, as in select(func.count(User.id)).")
        return number, "exact"
    if total == "estimated" and dialect_name == "postgresql":
        plan = (yield Query(_over(_Explained(literal_column("1")), stmt))).scalar_one()
        return int((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]["Plan Rows"]), "estimated"
    number = (yield Query(_count(stmt, CAP + 1))).scalar_one()
    return (CAP, "capped") if number > CAP else (number, "exact")


def _count(stmt: Statement, most: int | None = None) -> Select[Any]:
    return _over(select(func.count()), stmt.limit(most))


def _over(outer: Select[Any], stmt: Statement) -> Select[Any]:
    """Select from the statement's rows, as a subquery, under its options."""
    # Criteria set on the statement would not reach it inside the subquery.
    criteria = [option for option in stmt._with_options if isinstance(option, LoaderCriteriaOption)]
    return (
        outer.select_from(stmt.order_by(None).subquery())
        .options(*criteria)
        .execution_options(**stmt.get_execution_options())
    )


class _Explained(Select[Any]):
    """A SELECT whose plan is asked for, not its rows. A session's criteria apply to it as to any other."""

    inherit_cache = True


@compiles(_Explained)
def _compile_explained(stmt: _Explained, compiler: Any, **options: Any) -> str:
    # https://www.postgresql.org/docs/current/sql-explain.html
    return f"EXPLAIN (FORMAT JSON) {compiler.visit_select(stmt, **options)}"
