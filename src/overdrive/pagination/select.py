"""What a page of any style makes of a SQLAlchemy statement.

A page is a generator that yields the statements it needs and is sent their results, so that `run` and
`run_async` share every line of it, and the caller decides how a statement reaches the database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator
from itertools import takewhile
from typing import Any, TypeVar

from sqlalchemy import (
    CompoundSelect,
    FromClause,
    Join,
    Result,
    Select,
    TextClause,
    TextualSelect,
    inspect,
    select,
    tuple_,
)
from sqlalchemy.orm.strategy_options import _AbstractLoad
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import (
    ColumnClause,
    ColumnElement,
    _textual_label_reference,
)
from sqlalchemy.sql.visitors import iterate

from overdrive.errors import PageError

from .order import froms_of, identity_of, is_distinct_on
from .recipe import Query

P = TypeVar("P")

#: Yields statements, and what else is to be awaited between them, and is sent what they come to.
Steps = Generator[Query | Callable[[], Awaitable[Any]], Any, P]
Statement = Select[Any] | CompoundSelect[Any]

#: Rows beyond which the keys of a page are found first, and the rest of its rows after.
DEEP = 1_000

#: What a capped total counts to.
CAP = 10_000


def run(
    steps: Steps[P],
    send: Callable[..., Any],
    wait: Callable[[Callable[[], Awaitable[Any]]], Any] | None = None,
) -> P:
    """Make the page, with `send(*query)` sending each of its statements.

    wait: has what else is to be awaited awaited elsewhere; None where there is nothing.
    """
    try:
        step = next(steps)
        while True:
            if isinstance(step, Query):
                step = steps.send(send(*step))
            else:
                assert wait is not None
                step = steps.send(wait(step))
    except StopIteration as stop:
        made: P = stop.value
        return made


async def run_async(steps: Steps[P], send: Callable[..., Awaitable[Any]]) -> P:
    """Make the page, with `send(*query)` sending each of its statements."""
    try:
        step = next(steps)
        while True:
            step = steps.send(await (send(*step) if isinstance(step, Query) else step()))
    except StopIteration as stop:
        made: P = stop.value
        return made


# What can be a page


def pageable(stmt: Executable) -> Statement:
    """Return the statement; raises `PageError` for one whose rows cannot be limited to those of a page."""
    stmt = limitable(stmt)
    if any(load.path[-2].uselist for load in joined_loads(stmt)):
        raise PageError(
            "contains_eager() of a collection makes a cursor page of joined rows, not of entities: "
            "load the collection with selectinload(), or use Page."
        )
    return stmt


def limitable(stmt: Executable) -> Statement:
    """Return the statement; raises `PageError` for one that a page cannot put its LIMIT on."""
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


def joined_loads(stmt: Statement) -> Iterator[Any]:
    """Yield what `contains_eager()` fills from joined rows, which LIMIT would count."""
    for option in stmt._with_options:
        yield from (load for load in getattr(option, "context", ()) if "eager_from_alias" in load.local_opts)


def bare(stmt: Executable) -> Statement | None:
    """Return the statement without what says how its rows are loaded; None where more hangs on it than that."""
    if not isinstance(stmt, Select | CompoundSelect) or stmt._for_update_arg is not None:
        return None
    loads = stmt._with_options
    if stmt.get_execution_options() or not all(isinstance(load, _AbstractLoad) for load in loads):
        return None
    if not loads:
        return stmt
    if any(joined_loads(stmt)):
        return None
    plain = stmt._generate()
    plain._with_options = ()
    return plain


# Each entity once


def once(stmt: Executable) -> Statement:
    """Return the statement so that a select of one entity has each row of it once, whatever it is joined to.

    Raises `PageError` where that cannot be, as for an order by what the joins repeat the entity for.
    """
    stmt = pageable(stmt)
    roots = roots_of(stmt)
    if roots is not stmt and any(joined_loads(stmt)):
        raise PageError(
            "contains_eager() needs the joined rows, in which the entity is repeated: load with selectinload() or "
            "joinedload(), or use Page."
        )
    return roots


def roots_of(stmt: Statement) -> Statement:
    """Return the statement, or another one that selects the same entities, each once, where joins repeat them.

    Raises `PageError` where their order depends on what is joined.
    """
    entity = entity_of(stmt)
    if entity is None or not isinstance(stmt, Select) or not _repeats(stmt, entity):
        return stmt
    own, joined = own_table(entity), _tables(froms_of(stmt))
    joined = joined - _tables([own])
    order = list(takewhile(lambda clause: not _reaches(clause, own, joined), stmt._order_by_clauses))
    # What contains_eager() fills may be ordered by more: within each entity.
    if len(order) < len(stmt._order_by_clauses) and not (order and any(joined_loads(stmt))):
        raise PageError(
            f"The joins repeat {own} for each row that they find, and it is ordered by one of these, "
            f"{stmt._order_by_clauses[len(order)]}: order by {own}'s own columns, by a scalar subquery such as "
            "select(func.max(...)).where(...).scalar_subquery() over an alias, or select the joined entity too."
        )
    keys = stmt.with_only_columns(*keys_of(entity)).order_by(None)
    keys._for_update_arg = None
    return selected(stmt, entity, keys, order)


def entity_of(stmt: Statement) -> Any:
    """Return the mapped class, or the alias of one, that is all the statement selects; None where it is not."""
    if not isinstance(stmt, Select) or stmt._distinct or stmt._group_by_clauses or is_distinct_on(stmt):
        return None
    described = stmt.column_descriptions
    entity = described[0].get("entity") if len(described) == 1 else None
    return entity if entity is not None and described[0]["expr"] is entity else None


def own_table(entity: Any) -> FromClause:
    """Return what an entity is selected from."""
    own: FromClause = inspect(entity).selectable
    return own


def keys_of(entity: Any) -> list[Any]:
    """Return an entity's attributes that are its primary key."""
    mapper = inspect(entity).mapper
    return [getattr(entity, mapper.get_property_by_column(column).key) for column in mapper.primary_key]


def is_alone(stmt: Select[Any], own: FromClause) -> bool:
    """Say whether the statement clearly selects from nothing else; other than `froms_of`, this takes no time."""
    froms = {source for clause in stmt._where_criteria for source in clause._from_objects}
    return not (stmt._from_obj or stmt._setup_joins or stmt._memoized_select_entities) and froms <= {own}


def _repeats(stmt: Select[Any], entity: Any) -> bool:
    own = own_table(entity)
    if is_alone(stmt, own):
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


def selected(stmt: Select[Any], entity: Any, keys: Select[Any], order: Any) -> Select[Any]:
    """Select the entities that have these keys as `stmt` does, and from nothing else."""
    chosen = select(entity).where(among(entity, keys)).order_by(*order).options(*stmt._with_options)
    chosen._for_update_arg = stmt._for_update_arg
    return chosen.execution_options(**stmt.get_execution_options())


def among(entity: Any, keys: Select[Any]) -> ColumnElement[bool]:
    """Return the criterion that an entity is one of those whose keys a statement selects."""
    columns = keys_of(entity)
    return (tuple_(*columns) if len(columns) > 1 else columns[0]).in_(keys.correlate(None))


# Reading


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
