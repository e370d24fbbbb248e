"""Pages by number, and how many rows there are."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel
from sqlalchemy import (
    BindParameter,
    Integer,
    Select,
    UnaryExpression,
    bindparam,
    func,
    literal_column,
    select,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm.util import LoaderCriteriaOption
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import ColumnClause, ColumnElement

from overdrive.errors import PageError

from .jump import jump
from .keeper import Keeper
from .order import flat, identity_of
from .page import Found, LimitOffsetParams, PageParams, Total
from .projection import Projection, never, projected, row_maker
from .recipe import Query, Recipes
from .select import (
    Statement,
    Steps,
    among,
    bare,
    entity_of,
    is_alone,
    items_of,
    joined_loads,
    keys_of,
    limitable,
    own_table,
    roots_of,
    selected,
    unique,
    width_of,
)

#: Rows beyond which the keys of a page are found first, and the rest of its rows after.
DEEP = 1_000

#: What a capped total counts to.
CAP = 10_000

_LIMIT = "overdrive_limit"
_OFFSET = "overdrive_offset"


def page(
    stmt: Executable,
    params: PageParams | LimitOffsetParams,
    *,
    recipes: Recipes,
    total: Total = "exact",
    count_query: Executable | None = None,
    dialect_name: str = "",
    model: type[BaseModel] | None = None,
    adds_nothing: Callable[[type], bool] = never,
    keeper: Keeper | None = None,
) -> Steps[Found]:
    """Make one page by its number: its rows, then, where they do not tell it, the total.

    stmt: a `select()` or a union of them, without LIMIT, or `text().columns()`. Rows with equal order keys are
        in the order of their primary keys, where they have them.
    recipes: remembers what is made of statements of the same shape.
    total: which kind of total is wanted; see `total_of`.
    count_query: gives the exact total, instead of counting the rows of `stmt`.
    dialect_name: SQLAlchemy's name of the database's dialect.
    model: what nothing but reads the items, if it is known: where it needs but columns of an entity, the items may be
        rows of these columns.
    adds_nothing: says whether reading rows of a class through the session is no more than sending the statement.
    keeper: keeps totals, and where in the list which row is, if anything does.

    Raises `PageError` where the statement cannot be paginated.
    """
    plan, given = recipes.made(stmt, ("page", model), partial(Plan.of, model=model))
    count = partial(total_of, stmt, recipes=recipes, count_query=count_query, dialect_name=dialect_name, keeper=keeper)
    number: int | None = None
    kind = total
    counted = total == "exact" and params.offset > DEEP
    if counted:
        # To find out that a page lies beyond the end, counting is enough.
        number, kind = yield from count(total)

    # One row more says whether there are more, where no total will.
    limit = params.size if total == "exact" else params.size + 1
    items: list[Any] = []
    columns: tuple[str, ...] = ()
    if number is None or params.offset < number:
        jumped = None
        if keeper is not None and params.offset > DEEP:
            jumped = yield from jump(
                stmt,
                params.offset,
                limit,
                recipes=recipes,
                keeper=keeper,
                dialect_name=dialect_name,
                model=model,
                adds_nothing=adds_nothing,
            )
        if jumped is not None:
            items, columns = jumped
        else:
            is_projected = plan.projection is not None and adds_nothing(plan.projection.class_)
            template = plan.rows(params.offset > DEEP, is_projected)
            result = yield Query(template, given | {_LIMIT: limit, _OFFSET: params.offset}, is_projected)
            items = plan.items(result, is_projected)
            if is_projected and plan.projection is not None:
                columns = plan.projection.names
    seen = params.offset + len(items)
    if not counted and total != "none":
        if len(items) < limit and (items or not params.offset):
            number, kind = seen, "exact"
        else:
            number, kind = yield from count(total)
    if kind == "estimated" and number is not None:
        number = max(number, seen)
    has_more = seen < (number or 0) if total == "exact" else len(items) > params.size
    return Found(items[: params.size], params, has_more, number, kind, columns=columns)


def total_of(
    stmt: Executable,
    total: Total,
    *,
    recipes: Recipes,
    count_query: Executable | None = None,
    dialect_name: str = "",
    keeper: Keeper | None = None,
) -> Steps[tuple[int | None, Total]]:
    """Find the total of a statement's rows, and say which kind it is; for the parameters see `page`.

    total: "exact" counts them all; "capped" counts to 10,000, and is exact below; "estimated" asks PostgreSQL's
        planner, and is capped where there is none; "none" asks nothing.

    Raises `PageError` where `count_query` does not give one integer.
    """
    plain = bare(stmt) if keeper is not None else None
    plan, given = recipes.made(plain if plain is not None else stmt, ("page", None), partial(Plan.of, model=None))
    # What hangs on a statement that nothing can be taken off may be what nobody else's has.
    own = keeper if plain is not None else None
    return plan.total(total, given=given, count_query=count_query, dialect_name=dialect_name, keeper=own)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is made once of all statements of one shape."""

    stmt: Statement
    #: The statement with each entity once.
    roots: Statement
    width: int
    projection: Projection | None
    #: Makes rows of the columns of the projection.
    row: Callable[[Iterable[Any]], Any]
    _templates: dict[Hashable, Statement]

    @classmethod
    def of(cls, stmt: Executable, model: type[BaseModel] | None) -> Plan:
        """Take a statement apart; raises `PageError` where it cannot be paginated."""
        stmt = limitable(stmt)
        roots = roots_of(stmt)
        projection = projected(roots, model) if model is not None and not _fills(stmt, roots) else None
        row = row_maker(projection.columns if projection is not None else ())
        return cls(stmt, roots, width_of(stmt), projection, row, {})

    def rows(self, is_deep: bool, is_projected: bool) -> Statement:
        """Return the statement of a page, with names where its limit and its offset go."""
        shape = (is_deep, is_projected)
        template = self._templates.get(shape)
        if template is None:
            template = _rows(self.stmt, self.roots, is_deep)
            if is_projected and self.projection is not None and isinstance(template, Select):
                template = template.with_only_columns(*self.projection.columns.values())
            self._templates[shape] = template
        return template

    def items(self, result: Any, is_projected: bool) -> list[Any]:
        """Return the page's items of the result of `rows`."""
        if is_projected:
            return list(map(self.row, result))
        rows = (unique(result) if self.stmt is self.roots else result.unique()).all()
        return items_of(list(rows), self.width)

    def total(
        self,
        total: Total,
        *,
        given: Mapping[str, Any],
        count_query: Executable | None,
        dialect_name: str,
        keeper: Keeper | None,
    ) -> Steps[tuple[int | None, Total]]:
        """Find the total; see `total_of`."""
        if total == "none":
            return None, "none"
        if total == "exact":
            query = Query(self._count("exact"), given) if count_query is None else Query(count_query)
            return (yield from _number(query, keeper)), "exact"
        if total == "estimated" and dialect_name == "postgresql":
            plan = (yield Query(self._count("estimated"), given)).scalar_one()
            return int((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]["Plan Rows"]), "estimated"
        number = yield from _number(Query(self._count("capped"), given), keeper)
        return (CAP, "capped") if number > CAP else (number, "exact")

    def _count(self, kind: Total) -> Statement:
        template = self._templates.get(kind)
        if template is None:
            template = self._templates[kind] = _COUNTS[kind](self.roots)
        return template


# Rows


def _rows(stmt: Statement, roots: Statement, is_deep: bool) -> Statement:
    limit, offset = bindparam(_LIMIT, type_=Integer()), bindparam(_OFFSET, type_=Integer())
    ordered = _ordered(roots)
    entity = entity_of(stmt)
    fills = _fills(stmt, roots)
    if entity is None or not (fills or (is_deep and _is_deferred(ordered, entity))):
        return ordered.limit(limit).offset(offset)
    assert isinstance(stmt, Select)
    assert isinstance(ordered, Select)
    keys = ordered.with_only_columns(*keys_of(entity)).limit(limit).offset(offset)
    if fills:
        order = (*ordered._order_by_clauses, *stmt._order_by_clauses)
        return stmt.where(among(entity, keys)).order_by(None).order_by(*order)
    return selected(stmt, entity, keys, ordered._order_by_clauses)


def _fills(stmt: Statement, roots: Statement) -> bool:
    """Say whether the rows that a statement joins to its entities fill them, so that they cannot be left out."""
    return stmt is not roots and any(joined_loads(stmt))


def _is_deferred(stmt: Statement, entity: Any) -> bool:
    """Say whether rows can be skipped by their keys alone: an index may have them, and the same rows follow."""
    return isinstance(stmt, Select) and stmt._for_update_arg is None and is_alone(stmt, own_table(entity))


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
    alone = entity is not None and is_alone(stmt, own_table(entity))
    try:
        identity = identity_of(own_table(entity) if alone else stmt) or []
    except PageError:
        # Grouped by text: nobody can tell.
        return []
    return [column for column in identity if not isinstance(column, BindParameter)]


# Counting


def _number(query: Query, keeper: Keeper | None) -> Steps[int]:
    name = keeper.name_of(query) if keeper is not None else None
    if keeper is None or name is None:
        return (yield from _counted(query))
    number: int = yield partial(keeper.number, name, _counted(query))
    return number


def _counted(query: Query) -> Steps[int]:
    number = (yield query).scalar_one_or_none()
    if not isinstance(number, int):
        raise PageError(f"count_query gives {number!r}: select one integer, as in select(func.count(User.id)).")
    return number


def _count(stmt: Statement) -> Select[Any]:
    return _over(select(func.count()), stmt)


def _count_to_cap(stmt: Statement) -> Select[Any]:
    return _over(select(func.count()), stmt.limit(CAP + 1))


def _estimate(stmt: Statement) -> Select[Any]:
    return _over(_Explained(literal_column("1")), stmt)


_COUNTS: dict[Total, Callable[[Statement], Select[Any]]] = {
    "exact": _count,
    "capped": _count_to_cap,
    "estimated": _estimate,
}


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
