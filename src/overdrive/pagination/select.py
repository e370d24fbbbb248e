"""Pages of SQLAlchemy statements.

A page is a generator that yields the statements it needs and is sent their results, so that `run` and
`run_async` share every line of it, and the caller decides how a statement reaches the database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

from sqlalchemy import (
    CompoundSelect,
    Result,
    Select,
    func,
    select,
)
from sqlalchemy.orm.util import LoaderCriteriaOption
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import (
    ColumnClause,
)

from overdrive.errors import PageError

from .order import identity_of
from .page import BasePage, Page, PageParams

P = TypeVar("P", bound=BasePage[Any])

Steps = Generator[Executable, Result[Any], P]


def run(steps: Steps[P], execute: Callable[[Executable], Result[Any]]) -> P:
    """Make the page, with `execute` sending each of its statements."""
    try:
        statement = next(steps)
        while True:
            statement = steps.send(execute(statement))
    except StopIteration as stop:
        made: P = stop.value
        return made


async def run_async(steps: Steps[P], execute: Callable[[Executable], Awaitable[Result[Any]]]) -> P:
    """Make the page, with `execute` sending each of its statements."""
    try:
        statement = next(steps)
        while True:
            statement = steps.send(await execute(statement))
    except StopIteration as stop:
        made: P = stop.value
        return made


def page(stmt: Executable, params: PageParams) -> Steps[Page[Any]]:
    """Make one page by its number: the total, then, where the page has rows, its items.

    stmt: a `select()` or a union of them, without LIMIT. One without ORDER BY is ordered by primary key,
        where there is one.

    Raises `PageError` where the statement cannot be paginated.
    """
    stmt = pageable(stmt)
    total = (yield _count(stmt)).scalar_one()
    offset = (params.page - 1) * params.size
    items: list[Any] = []
    if offset < total:
        result = yield _ordered(stmt).limit(params.size).offset(offset)
        items = items_of(list(unique(result).all()), width_of(stmt))
    return Page.model_construct(
        items=items, total=total, page=params.page, size=params.size, pages=-(-total // params.size)
    )


# What can be a page


def pageable(stmt: Executable) -> Select[Any] | CompoundSelect[Any]:
    """Return the statement; raises `PageError` for one of which no part can be a page."""
    if not isinstance(stmt, (Select, CompoundSelect)):
        raise PageError(
            f"A {type(stmt).__name__} cannot be paginated: pass a select(); of raw SQL, make one with "
            "select(text(...).columns(...).subquery())."
        )
    if stmt._has_row_limiting_clause:
        raise PageError("The statement has its own LIMIT, OFFSET or FETCH: remove it, the page sets them.")
    if isinstance(stmt, Select) and any(map(_is_joined_collection, stmt._with_options)):
        raise PageError(
            "contains_eager() of a collection makes a page of joined rows, not of entities: "
            "load the collection with selectinload()."
        )
    return stmt


def _is_joined_collection(option: Any) -> bool:
    # LIMIT would count the rows of contains_eager(); for joinedload() SQLAlchemy limits in a subquery.
    return any(
        "eager_from_alias" in load.local_opts and load.path[-2].uselist for load in getattr(option, "context", ())
    )


# Counting and reading


def _count(stmt: Select[Any] | CompoundSelect[Any]) -> Select[Any]:
    # Criteria set on the statement would not reach it inside the subquery.
    criteria = [option for option in stmt._with_options if isinstance(option, LoaderCriteriaOption)]
    return (
        select(func.count())
        .select_from(stmt.order_by(None).subquery())
        .options(*criteria)
        .execution_options(**stmt.get_execution_options())
    )


def _ordered(stmt: Select[Any] | CompoundSelect[Any]) -> Select[Any] | CompoundSelect[Any]:
    if not isinstance(stmt, Select) or stmt._order_by_clauses:
        return stmt
    # Without a plain column it may be one row of aggregates, which nothing can be ordered by.
    if not any(isinstance(column, ColumnClause) for column in stmt.selected_columns):
        return stmt
    return stmt.order_by(*(identity_of(stmt) or ()))


def width_of(stmt: Select[Any] | CompoundSelect[Any]) -> int:
    """Return how many values a row of the statement's result has."""
    return len(stmt.column_descriptions if isinstance(stmt, Select) else stmt.selected_columns)


def unique(result: Result[Any]) -> Result[Any]:
    """Return the result with each entity once, where joined collections have repeated it."""
    # Set where joined collections were loaded, to insist on unique(). Elsewhere, equal rows are rows.
    return result.unique() if result._unique_filter_state is not None else result


def items_of(rows: list[Any], width: int) -> list[Any]:
    """Return what a page holds of rows: the one value each has, or the rows."""
    return [row[0] for row in rows] if width == 1 else rows
