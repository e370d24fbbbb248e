"""Pages of SQLAlchemy statements.

A page is a generator that yields the statements it needs and is sent their results, so that `run` and
`run_async` share every line of it, and the caller decides how a statement reaches the database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import (
    REAL,
    Column,
    CompoundSelect,
    Double,
    Float,
    Join,
    Label,
    Numeric,
    Result,
    Select,
    Table,
    and_,
    cast,
    false,
    func,
    literal,
    or_,
    select,
    tuple_,
    type_coerce,
)
from sqlalchemy.orm import lazyload
from sqlalchemy.orm.util import LoaderCriteriaOption
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BooleanClauseList,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    Over,
    UnaryExpression,
    _label_reference,
    _textual_label_reference,
)
from sqlalchemy.sql.functions import cube, grouping_sets, rollup
from sqlalchemy.sql.selectable import AliasedReturnsRows, FromClause, SelectBase
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import TypeEngine, UserDefinedType

from overdrive.errors import PageError

from . import keyset
from .cursor import Position, decode, encode
from .page import BasePage, CursorPage, CursorParams, Page, PageParams

P = TypeVar("P", bound=BasePage[Any])

Steps = Generator[Executable, Result[Any], P]

#: Whether NULL sorts above every value where ORDER BY does not say, by SQLAlchemy's name of the dialect.
#: PostgreSQL: "Sorting Rows"; SQLite: "SELECT", the ORDER BY clause.
_NULLS_LARGEST = {"postgresql": True, "sqlite": False}

_KEY_LABEL = "overdrive_key_"


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
    stmt = _pageable(stmt)
    total = (yield _count(stmt)).scalar_one()
    offset = (params.page - 1) * params.size
    items: list[Any] = []
    if offset < total:
        result = yield _ordered(stmt).limit(params.size).offset(offset)
        items = _items(list(_unique(result).all()), _width(stmt))
    return Page.model_construct(
        items=items, total=total, page=params.page, size=params.size, pages=-(-total // params.size)
    )


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
    stmt = _walkable(stmt)
    sorts = _sorts(stmt, dialect_name)
    types = [sort.python_type for sort in sorts]
    binding = binding + b"\0" + _order_text(sorts).encode()
    position = Position()
    if params.cursor is not None:
        position = decode(params.cursor, types, binding=binding, key=key)

    result = yield _walk(stmt, sorts, position, dialect_name).limit(params.size + 1)
    width = _width(stmt)
    frozen = _unique(result).freeze()
    values = [tuple(row)[-len(sorts) :] for row in frozen()]
    items = _items(list(frozen().columns(*range(width))), width)

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


# What can be a page


def _pageable(stmt: Executable) -> Select[Any] | CompoundSelect[Any]:
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


def _walkable(stmt: Executable) -> Select[Any]:
    stmt = _pageable(stmt)
    if not isinstance(stmt, Select):
        raise PageError(
            "A union cannot be walked by cursor: make it a subquery, select(stmt.subquery()), and order by its columns."
        )
    if _is_distinct_on(stmt):
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


def _is_distinct_on(stmt: Select[Any]) -> bool:
    # The second is where SQLAlchemy 2.1 keeps the extension `distinct_on()`.
    return bool(stmt._distinct_on) or getattr(stmt, "_pre_columns_clause", None) is not None


def _has_window(element: Any) -> bool:
    if isinstance(element, Over):
        return True
    # What a subquery computes does not depend on this statement's WHERE; a column's children are its table.
    return not isinstance(element, (SelectBase, ColumnClause)) and any(map(_has_window, element.get_children()))


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
    return stmt.order_by(*(_identity(stmt) or ()))


def _width(stmt: Select[Any] | CompoundSelect[Any]) -> int:
    return len(stmt.column_descriptions if isinstance(stmt, Select) else stmt.selected_columns)


def _unique(result: Result[Any]) -> Result[Any]:
    # Set where joined collections were loaded, to insist on unique(). Elsewhere, equal rows are rows.
    return result.unique() if result._unique_filter_state is not None else result


def _items(rows: list[Any], width: int) -> list[Any]:
    return [row[0] for row in rows] if width == 1 else rows


# The order of a walk


@dataclass(frozen=True, slots=True)
class _Sort:
    """One order key.

    expression: what is compared, as `_exact` types it.
    python_type: as `cursor.encode` wants it.
    """

    expression: ColumnElement[Any]
    python_type: type
    key: keyset.Key


def _sorts(stmt: Select[Any], dialect_name: str) -> list[_Sort]:
    if dialect_name not in _NULLS_LARGEST:
        raise PageError(f"Cursor pages are for {' and '.join(_NULLS_LARGEST)}, not {dialect_name}: use Page.")
    tables = dict(_tables(stmt))
    orders = [_order(clause, stmt) for clause in _flat(stmt._order_by_clauses)]
    ordered = {expression for expression, _, _ in orders}
    # In the last key's direction, so that an index of one direction serves the whole order.
    descending = bool(orders) and orders[-1][1]
    orders += [(column, descending, None) for column in _tie_break(stmt) if column not in ordered]
    if stmt._distinct:
        _require_selected([expression for expression, _, _ in orders], stmt)
    return [
        _sort(expression, descending, nulls_first, tables, dialect_name)
        for expression, descending, nulls_first in orders
    ]


def _tie_break(stmt: Select[Any]) -> list[ColumnElement[Any]]:
    identity = _identity(stmt)
    if not identity:
        raise PageError(
            "Nothing tells the statement's rows apart where their order keys are equal. Select from tables "
            "with a primary key, and find the rows of anything else by "
            "select(Entity).where(Entity.id.in_(...)); or use Page."
        )
    return identity


def _require_selected(expressions: list[ColumnElement[Any]], stmt: Select[Any]) -> None:
    selected = [_unlabelled(column) for column in stmt.selected_columns]
    for expression in expressions:
        if not any(expression.compare(column) for column in selected):
            raise PageError(f"With DISTINCT, rows are ordered by what is selected: select {expression} too.")


def _flat(clauses: Any) -> Iterator[Any]:
    for clause in clauses:
        # A composite attribute is the list of its columns.
        if isinstance(clause, ColumnElement) or not hasattr(clause, "clauses"):
            yield clause
        else:
            yield from _flat(clause.clauses)


def _order(clause: Any, stmt: Select[Any]) -> tuple[ColumnElement[Any], bool, bool | None]:
    """Take an ORDER BY clause apart: the expression, whether descending, and where NULLs were told to go."""
    descending, nulls_first = False, None
    while True:
        if isinstance(clause, UnaryExpression) and clause.modifier in _MODIFIERS:
            descending = descending or clause.modifier is operators.desc_op
            if clause.modifier in (operators.nulls_first_op, operators.nulls_last_op):
                nulls_first = clause.modifier is operators.nulls_first_op
            clause = clause.element
        elif isinstance(clause, (Label, _label_reference)):
            clause = clause.element
        elif isinstance(clause, _textual_label_reference):
            clause = _named(clause.element, stmt)
        else:
            break
    if not isinstance(clause, ColumnElement) or (isinstance(clause, ColumnClause) and clause.name.isdigit()):
        raise PageError(f"ORDER BY {clause} is text, not a column: order by a column or an expression.")
    return clause, descending, nulls_first


_MODIFIERS = (operators.asc_op, operators.desc_op, operators.nulls_first_op, operators.nulls_last_op)


def _named(name: str, stmt: Select[Any]) -> ColumnElement[Any]:
    for columns in (stmt.selected_columns, *(table.c for table, _ in _tables(stmt))):
        if name in columns:
            return columns[name]
    raise PageError(f"ORDER BY {name!r} names no column: order by a column or an expression.")


def _sort(
    expression: ColumnElement[Any],
    descending: bool,
    nulls_first: bool | None,
    tables: dict[FromClause, bool],
    dialect_name: str,
) -> _Sort:
    if nulls_first is None:
        nulls_first = _default_nulls_first(descending, dialect_name)
    key = keyset.Key(descending, nulls_first, _is_nullable(expression, tables))
    exact = _exact(expression, dialect_name)
    return _Sort(exact, _python_type(exact.type), key)


def _default_nulls_first(descending: bool, dialect_name: str) -> bool:
    return descending if _NULLS_LARGEST[dialect_name] else not descending


def _is_nullable(expression: ColumnElement[Any], tables: dict[FromClause, bool]) -> bool:
    if not isinstance(expression, Column) or expression.nullable:
        return True
    # A subquery's column may be called NOT NULL for what an outer join inside it has made NULL.
    table = expression.table
    is_table = isinstance(table, Table) or isinstance(getattr(table, "element", None), Table)
    return not is_table or tables.get(table, True)


class _Stored(UserDefinedType[Any]):
    """A value as SQLite stores it.

    SQLAlchemy reads '2026-01-01 00:00:00', which CURRENT_TIMESTAMP writes, and binds
    '2026-01-01 00:00:00.000000': another text, with which the row would not be found again. Likewise Numeric,
    which is stored as a float.
    """

    cache_ok = True


def _exact(expression: ColumnElement[Any], dialect_name: str) -> ColumnElement[Any]:
    """Return the expression so typed that its values come back to the database as they were."""
    type_ = expression.type
    if dialect_name == "sqlite":
        return type_coerce(expression, _Stored())
    if isinstance(type_, Float) and (isinstance(type_, REAL) or (type_.precision or 53) < 25):
        # Drivers differ in whether they read single precision as the shortest decimal or as what it is.
        return cast(expression, Double())
    # A Float read as Decimal, and a Numeric read as float, come back rounded.
    if isinstance(type_, Float) and type_.asdecimal:
        return type_coerce(expression, Float())
    if isinstance(type_, Numeric) and not isinstance(type_, Float) and not type_.asdecimal:
        return type_coerce(expression, Numeric())
    return expression


def _python_type(type_: TypeEngine[Any]) -> type:
    # A decorator's values are of a type it does not tell.
    if isinstance(type_, _Stored) or hasattr(type_, "process_result_value"):
        return object
    try:
        return type_.python_type
    except NotImplementedError:
        return object


def _order_text(sorts: list[_Sort]) -> str:
    return "\n".join(map(_sort_text, sorts))


def _sort_text(sort: _Sort) -> str:
    compiled = sort.expression.compile()
    collation = getattr(sort.expression.type, "collation", None)
    return f"{compiled} {compiled.params} {collation} {sort.python_type.__name__} {sort.key}"


# The statement of one page of a walk


def _walk(stmt: Select[Any], sorts: list[_Sort], position: Position, dialect_name: str) -> Select[Any]:
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
    if key.nulls_first == _default_nulls_first(key.descending, dialect_name):
        return directed
    return directed.nulls_first() if key.nulls_first else directed.nulls_last()


def _after(sorts: list[_Sort], keys: list[keyset.Key], values: tuple[Any, ...]) -> ColumnElement[bool]:
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


# What tells rows apart


def _identity(source: ClauseElement) -> list[ColumnElement[Any]] | None:
    """Return columns of which no two rows of `source` have the same values; None where none are known."""
    if isinstance(source, Table):
        return list(source.primary_key) or None
    if isinstance(source, Join):
        return _join_identity(source)
    if isinstance(source, AliasedReturnsRows):
        return _exported(source, _identity(source.element))
    if isinstance(source, Select):
        return _select_identity(source)
    if isinstance(source, CompoundSelect) and "ALL" not in source.keyword.name:
        return list(source.selected_columns)
    return None


def _join_identity(join: Join) -> list[ColumnElement[Any]] | None:
    left, right = _identity(join.left), _identity(join.right)
    if left is None or right is None:
        return None
    # Joined on the whole identity of the right side, a row on the left finds one row at most.
    if not join.full and set(right) <= _equated(join):
        return left
    return left + right


def _equated(join: Join) -> set[ColumnElement[Any]]:
    """Return the right side's columns that the ON clause sets equal to the left side's."""
    clause = join.onclause
    terms = list(clause) if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_ else [clause]
    left, right = set(join.left.c), set(join.right.c)
    equated = set()
    for term in terms:
        if isinstance(term, BinaryExpression) and term.operator is operators.eq:
            for one, other in ((term.left, term.right), (term.right, term.left)):
                if one in right and other in left:
                    equated.add(one)
    return equated


def _exported(source: AliasedReturnsRows, columns: list[ColumnElement[Any]] | None) -> list[ColumnElement[Any]] | None:
    """Return the columns of an alias or a subquery that stand for the columns of what is inside."""
    outside = {_unlabelled(inside): column for column in source.c for inside in column._proxies}
    if columns is None or not all(column in outside for column in columns):
        return None
    return [outside[column] for column in columns]


def _select_identity(stmt: Select[Any]) -> list[ColumnElement[Any]] | None:
    if _is_distinct_on(stmt):
        return None
    if stmt._distinct:
        return _distinct_identity(stmt)
    if stmt._group_by_clauses:
        # A rollup's groups may be equal to each other in all of its columns.
        if any(isinstance(part, _ROLLUPS) for clause in stmt._group_by_clauses for part in iterate(clause)):
            return None
        return [_order(clause, stmt)[0] for clause in _flat(stmt._group_by_clauses)]
    columns: list[ColumnElement[Any]] = []
    for source in _froms(stmt):
        identity = _identity(source)
        if identity is None:
            return None
        columns += identity
    return columns or None


_ROLLUPS = (rollup, cube, grouping_sets)


def _distinct_identity(stmt: Select[Any]) -> list[ColumnElement[Any]]:
    """Return the selected columns, but of a table whose identity is among them only that."""
    selected = [_unlabelled(column) for column in stmt.selected_columns]
    identities = {table: _identity(table) for table, _ in _tables(stmt)}
    whole = {table: columns for table, columns in identities.items() if columns and set(columns) <= set(selected)}
    kept = [column for columns in whole.values() for column in columns]
    return kept + [column for column in selected if getattr(column, "table", None) not in whole]


def _froms(stmt: Select[Any]) -> list[FromClause]:
    """Return what the statement selects from, without the joins that loading brings, which add no rows."""
    plain = stmt.order_by(None)
    plain._with_options = ()
    return list(plain.options(lazyload("*")).get_final_froms())


def _tables(stmt: Select[Any]) -> Iterator[tuple[FromClause, bool]]:
    """Yield each joined table, and whether an outer join may fill it with NULLs."""
    for source in _froms(stmt):
        yield from _joined(source, False)


def _joined(source: FromClause, optional: bool) -> Iterator[tuple[FromClause, bool]]:
    if isinstance(source, Join):
        yield from _joined(source.left, optional or source.full)
        yield from _joined(source.right, optional or source.full or source.isouter)
    else:
        yield source, optional


def _unlabelled(column: Any) -> Any:
    return column.element if isinstance(column, Label) else column
